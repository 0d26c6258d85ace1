"""The plain parts of a network: weights with logical axes, products, norms, embedding, MLP.

Every weight names its logical axes (`axes`); models know no mesh. Matrices have the model's
dtype; norms and other small vectors stay float32. Inputs are packed tokens `[T, ...]` without a batch axis.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels_pallas.norm import rms

Axes = tuple[str | None, ...]


class Tally(nnx.Variable):
    """A learned correction that published parameter totals leave out, such as a router's selection bias."""


def matrix(rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, fan_in: int, dtype: str) -> nnx.Param:
    """A random matrix of standard deviation `fan_in ** -0.5`."""
    values = jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5
    return nnx.Param(values.astype(dtype), axes=axes)


def vector(value: float, shape: tuple[int, ...], axes: Axes) -> nnx.Param:
    """A float32 weight filled with one value."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


class Linear(nnx.Module):
    """`y = x W` without bias over the last axes of `x`; input and output may have several axes (heads, width)."""

    def __init__(self, rngs: nnx.Rngs, inputs: tuple[int, ...], outputs: tuple[int, ...], axes: Axes, dtype: str):
        self.kernel = matrix(rngs, inputs + outputs, axes, math.prod(inputs), dtype)
        self.inputs = len(inputs)

    def __call__(self, x: Float[Array, "T *i"]) -> Float[Array, "T *o"]:
        kernel = self.kernel[...]
        contracted = tuple(range(x.ndim - self.inputs, x.ndim)), tuple(range(self.inputs))
        return jax.lax.dot_general(x, kernel, (contracted, ((), ())))


class RMSNorm(nnx.Module):
    """RMS norm of the last axis. `offset` is added to the stored weight (1 where a family stores it zero-centred)."""

    def __init__(self, width: int, epsilon: float, axis: str | None = None, offset: float = 0.0):
        self.scale = vector(1.0 - offset, (width,), (axis,))
        self.epsilon = epsilon
        self.offset = offset

    @property
    def weight(self) -> Float[Array, "d"]:
        """The factor of each channel."""
        return self.scale[...] + self.offset

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        return rms(x, self.weight, self.epsilon).astype(x.dtype)


class Embedding(nnx.Module):
    """One row per token of the vocabulary, times a constant `factor`."""

    def __init__(self, rngs: nnx.Rngs, vocabulary: int, width: int, dtype: str, factor: float = 1.0):
        self.table = matrix(rngs, (vocabulary, width), ("vocabulary", "model"), width, dtype)
        self.factor = factor

    def __call__(self, tokens: Int[Array, "T"]) -> Float[Array, "T D"]:
        return self.table[...][tokens] * self.factor

    def transposed(self, x: Float[Array, "B D"]) -> Float[Array, "B Y"]:
        """Scores of every token, float32: the head of a model that ties it to its embedding."""
        return jnp.einsum("bd,yd->by", x, self.table[...], preferred_element_type=jnp.float32)


class Head(nnx.Module):
    """Scores of every token of the vocabulary."""

    def __init__(self, rngs: nnx.Rngs, vocabulary: int, width: int, dtype: str):
        self.kernel = matrix(rngs, (width, vocabulary), ("model", "vocabulary"), width, dtype)

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B Y"]:
        return jnp.einsum("bd,dy->by", x, self.kernel[...], preferred_element_type=jnp.float32)


def swiglu(gate_up: Float[Array, "T 2 F"]) -> Float[Array, "T F"]:
    """`silu(gate) * up`, computed in float32."""
    gate, up = gate_up[:, 0].astype(jnp.float32), gate_up[:, 1].astype(jnp.float32)
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)


@dataclass(frozen=True)
class ClampedSwiGLU:
    """`min(silu(gate), limit) * clip(up, -limit, limit)`, computed in float32; the gate is cut after its SiLU."""

    limit: float

    def __call__(self, gate_up: Float[Array, "T 2 F"]) -> Float[Array, "T F"]:
        gate, up = gate_up[:, 0].astype(jnp.float32), gate_up[:, 1].astype(jnp.float32)
        inner = jnp.minimum(jax.nn.silu(gate), self.limit) * jnp.clip(up, -self.limit, self.limit)
        return inner.astype(gate_up.dtype)


class MLP(nnx.Module):
    """SwiGLU (arXiv 2002.05202): `(silu(x Wg) * (x Wu)) Wd`; gate and up lie in one kernel `[D, 2, F]`.

    `activate` makes `[T, F]` of the products `[T, 2, F]`.
    """

    def __init__(self, rngs: nnx.Rngs, width: int, inner: int, dtype: str, activate: Callable[[Array], Array] = swiglu):
        self.gate_up = Linear(rngs, (width,), (2, inner), ("model", None, "mlp"), dtype)
        self.down = Linear(rngs, (inner,), (width,), ("mlp", "model"), dtype)
        self.activate = activate

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return self.down(self.activate(self.gate_up(x)))
