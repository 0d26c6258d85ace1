"""How a Pallas Mosaic GPU kernel is launched: on the GPU, or interpreted on a CPU where a test asks for it.

Knows no kind of attention. Kernels are bfloat16 in and out, with float32 states and sums.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

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


_made: dict[Hashable, Callable[..., Any]] = {}


def made_once(
    settings: Hashable, arguments: Sequence[Any], make: Callable[[], Callable[..., Any]]
) -> Callable[..., Any]:
    """The kernel that `make` gives, the same object for equal settings and for arguments of equal shapes and dtypes.

    Each object is traced, lowered and compiled on its own, a second or more a piece: the layers of a model must share
    it. `make` may depend on nothing but `settings`, those shapes and dtypes, and whether kernels are interpreted.
    """
    key = settings, tuple((array.shape, str(array.dtype)) for array in arguments), interpreter()
    if key not in _made:
        _made[key] = make()
    return _made[key]
