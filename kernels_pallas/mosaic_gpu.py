"""How a Pallas Mosaic GPU kernel is launched: on the GPU, or interpreted on a CPU where a test asks for it.

Knows no kind of attention. Kernels are bfloat16 in and out, with float32 states and sums.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax.experimental.pallas.mosaic_gpu as plgpu

_interpreter: ContextVar[plgpu.InterpretGPUParams | None] = ContextVar("interpreter", default=None)


@contextmanager
def interpreted(params: plgpu.InterpretGPUParams | None = None) -> Iterator[None]:
    """Kernels traced inside are interpreted on the CPU. Read at trace time: jit afresh inside."""
    token = _interpreter.set(plgpu.InterpretGPUParams() if params is None else params)
    try:
        yield
    finally:
        _interpreter.reset(token)


def interpreter() -> plgpu.InterpretGPUParams | None:
    """What to pass as `interpret` to `plgpu.kernel`."""
    return _interpreter.get()
