"""How a gate becomes the logarithm of a decay: without a lower bound, or bounded from below.

Both map `x = f + dt_bias` and `rate = exp(A_log)` to `g <= 0`, in float32 and elementwise, so that every backend can
call them on whatever tile it holds. They know nothing of the recurrence.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
from jaxtyping import Array, Float

Decay = Callable[[Float[Array, "*n"], Float[Array, "*n"]], Float[Array, "*n"]]


@dataclass(frozen=True)
class SoftplusDecay:
    """`g = -rate softplus(x)`: any decay from none to complete (Kimi Linear, arXiv 2510.26692)."""

    def __call__(self, x: Float[Array, "*n"], rate: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return -rate * jax.nn.softplus(x)


@dataclass(frozen=True)
class BoundedDecay:
    """`g = lowest sigmoid(rate x)`, between `lowest` and 0: one token never forgets more than `exp(lowest)`.

    Raises ValueError for a bound that is not below zero.
    """

    lowest: float

    def __post_init__(self) -> None:
        if not self.lowest < 0:
            raise ValueError(f"wanted a lowest log decay below 0, got {self.lowest}: a state must not grow")

    def __call__(self, x: Float[Array, "*n"], rate: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return self.lowest * jax.nn.sigmoid(rate * x)
