"""How a Pallas Mosaic TPU kernel is launched: on the TPU, or interpreted on a CPU where a test asks for it.

Knows no kind of attention. Activations may be bfloat16 or float32; states and sums are float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from jax.experimental.pallas import tpu as pltpu

_interpreter: ContextVar[pltpu.InterpretParams | None] = ContextVar("interpreter", default=None)


@contextmanager
def interpreted(params: pltpu.InterpretParams | None = None) -> Iterator[None]:
    """Kernels traced inside are interpreted on the CPU. Read at trace time: jit afresh inside."""
    token = _interpreter.set(pltpu.InterpretParams() if params is None else params)
    try:
        yield
    finally:
        _interpreter.reset(token)


def interpreter() -> pltpu.InterpretParams | bool:
    """What to pass as `interpret` to `pl.pallas_call`."""
    return _interpreter.get() or False
