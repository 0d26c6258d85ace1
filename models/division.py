"""How a model's work may be divided among devices, as the layers ask for it; they know no mesh.

Weights name their logical axes, and the compiler divides plain products by them. What it cannot divide, or would divide
badly, asks a `Division`: the operations between two products, the sum over experts, the logits. A model is built
undivided; `Decoder.divide` binds another division to all its layers, once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from flax import nnx
from jaxtyping import Array, Float, Int

from kernels_pallas.op import Op

Part = Int[Array, ""]  # number of a share


class Summand(Protocol):
    """What adds up over shares of its experts and inner channels."""

    def whole(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """The result, with all weights."""

    def partial(self, x: Float[Array, "T D"], part: Part) -> Float[Array, "T D"]:
        """What share number `part` adds to the result, with its share of the weights."""


class Division(Protocol):
    """How work is divided among devices."""

    def op(self, op: Op, backend: str, options: Mapping[str, Any]) -> Callable[..., Any]:
        """The function of a backend with its keyword arguments, each device with its share of the heads."""

    def key_heads(self, heads: int) -> int:
        """Heads of keys and values that are kept: every device needs one at least, so they may be repeated."""

    def total(self, summand: Summand, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """The result of a module that adds up over shares."""

    def gathered(self, logits: Float[Array, "B Y"]) -> Float[Array, "B Y"]:
        """The logits of the whole vocabulary on every device."""


@dataclass(frozen=True)
class Undivided:
    """One device does everything."""

    def op(self, op: Op, backend: str, options: Mapping[str, Any]) -> Callable[..., Any]:
        """The function of a backend with its keyword arguments."""
        return partial(op.on(backend), **options)

    def key_heads(self, heads: int) -> int:
        """All, once."""
        return heads

    def total(self, summand: Summand, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """The result."""
        return summand.whole(x)

    def gathered(self, logits: Float[Array, "B Y"]) -> Float[Array, "B Y"]:
        """The logits."""
        return logits


UNDIVIDED = Undivided()


class Divisible(nnx.Module):
    """A module that asks a division for part of its work."""

    division: Division = UNDIVIDED

    def divide(self, division: Division) -> None:
        """Bind a division."""
        self.division = division
