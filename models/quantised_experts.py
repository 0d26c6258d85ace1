"""Products of experts whose kernels have eight bits and scales; the sums over experts are those of `models/moe.py`.

Four ways to the same result, by the number of tokens: for few, each choice reads its expert (`gathered`, or `looped`
where some experts lie elsewhere); for more, each expert is read once and multiplies all tokens (`swept`): up to there
reading the weights takes longer than multiplying, and nothing is copied; for many, tokens are sorted by expert
(`grouped`), and the compiler writes a wide copy of the kernels, which the product of so many tokens outweighs.
Letters: T tokens, D model width, E experts, k experts a token, F expert width, n groups of g input channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Activation = Callable[[Array], Array]  # [m, parts, F], or [m, F] where the kernel has no parts, to [m, F]

SWEPT_TOKENS = 256  # a TPU multiplies so many rows by a weight of eight bits while it reads it


@dataclass(frozen=True)
class Kernels:
    """One product of some experts: values `[*e, i, *o]` and scales `[*e, n, *o]`, n groups of input channels."""

    values: Array
    scale: Array

    @property
    def count(self) -> int:
        """Experts."""
        return self.values.shape[0]

    def chosen(self, index: Array) -> "Kernels":
        """The kernels of some experts, in the shape of `index`."""
        return Kernels(self.values[index], self.scale[index])

    def product(self, x: Array, subscripts: str, axis: int) -> Array:
        """The einsum of `x [..., i]` and the kernels, whose input axis is number `axis`; `ng` stands for that axis."""
        groups = self.scale.shape[axis]
        x = x.reshape(*x.shape[:-1], groups, -1)
        shape = self.values.shape
        values = self.values.reshape(*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])
        if groups > 1:
            wide = (values.astype(jnp.float32) * jnp.expand_dims(self.scale, axis + 1)).astype(x.dtype)
            return jnp.einsum(subscripts, x, wide)
        y = jnp.einsum(subscripts, x, values.astype(x.dtype)).astype(jnp.float32)
        scale = self.scale.reshape(*self.scale.shape[:axis], *self.scale.shape[axis + 1 :])
        return (y * scale.reshape((1,) * (y.ndim - scale.ndim) + scale.shape)).astype(x.dtype)

    def wide(self, dtype: jnp.dtype) -> Float[Array, "E i o"]:
        """A wide copy of all kernels, without their scales where these are those of output channels."""
        count, inputs = self.values.shape[:2]
        if self.scale.shape[1] == 1:
            return self.values.astype(dtype).reshape(count, inputs, -1)
        values = self.values.reshape(count, self.scale.shape[1], -1, *self.values.shape[2:]).astype(jnp.float32)
        return (values * jnp.expand_dims(self.scale, 2)).astype(dtype).reshape(count, inputs, -1)

    def scaled(self, y: Float[Array, "m o"], expert: Int[Array, "m"]) -> Array:
        """Results of `wide`, of an expert a row, times what it left out."""
        outputs = self.values.shape[2:]
        y = y.reshape(-1, *outputs)
        return y if self.scale.shape[1] > 1 else (y.astype(jnp.float32) * self.scale[expert][:, 0]).astype(y.dtype)


def all_experts(
    x: Array, experts: Array, weights: Array, into: Kernels, out_of: Kernels, activate: Activation
) -> Float[Array, "T D"]:
    """The weighted sum of each token's experts."""
    if experts.size < into.count:
        return weighted_sum(gathered(x, experts, into, out_of, activate), weights)
    return _most_experts(x, experts, weights, into, out_of, activate)


def some_experts(
    x: Array, experts: Array, weights: Array, into: Kernels, out_of: Kernels, activate: Activation, part: Array
) -> Float[Array, "T D"]:
    """What the experts of one share add to `all_experts`; the kernels are theirs."""
    own = experts - part * into.count
    mine = (own >= 0) & (own < into.count)
    own, weights = jnp.where(mine, own, into.count), jnp.where(mine, weights, 0)
    if experts.size < into.count:
        return weighted_sum(looped(x, own, into, out_of, activate), weights)
    return _most_experts(x, own, weights, into, out_of, activate)


def _most_experts(
    x: Array, experts: Array, weights: Array, into: Kernels, out_of: Kernels, activate: Activation
) -> Float[Array, "T D"]:
    """The sum where most experts are chosen; one out of range adds nothing."""
    if x.shape[0] <= SWEPT_TOKENS:
        return swept(x, experts, weights, into, out_of, activate)
    out = grouped(x, experts, into, out_of, activate)
    return weighted_sum(jnp.where((experts < into.count)[:, :, None], out, 0), weights)


def weighted_sum(out: Float[Array, "T k D"], weights: Float[Array, "T k"]) -> Float[Array, "T D"]:
    """The sum of the outputs, float32, in the order of the choices whatever the number of tokens."""
    terms = [out[:, i].astype(jnp.float32) * weights[:, i, None] for i in range(out.shape[1])]
    return sum(terms[1:], start=terms[0]).astype(out.dtype)


def gathered(
    x: Array, experts: Int[Array, "T k"], into: Kernels, out_of: Kernels, activate: Activation
) -> Float[Array, "T k D"]:
    """The outputs of each token's experts, reading one kernel per choice."""
    inner = into.chosen(experts).product(x, f"tng,tkng{_parts(into)}->tk{_parts(into)}", 2)
    shape = inner.shape
    inner = activate(inner.reshape(-1, *shape[2:])).reshape(*shape[:2], -1)
    return out_of.chosen(experts).product(inner, "tkng,tkngd->tkd", 2)


def looped(
    x: Array, experts: Int[Array, "T k"], into: Kernels, out_of: Kernels, activate: Activation
) -> Float[Array, "T k D"]:
    """The outputs of each token's experts, one choice after the other; zeros for an expert out of range."""
    flat = experts.reshape(-1)
    here = flat < into.count
    order = jnp.argsort(~here, stable=True)

    def one(index: Array, out: Array) -> Array:
        choice = order[index]
        token, expert = x[choice // experts.shape[1]], flat[choice]
        inner = into.chosen(expert).product(token, f"ng,ng{_parts(into)}->{_parts(into)}", 0)
        return out.at[choice].set(out_of.chosen(expert).product(activate(inner[None])[0], "ng,ngd->d", 0))

    out = jax.lax.fori_loop(0, jnp.sum(here), one, jnp.zeros((len(flat), x.shape[1]), x.dtype))
    return out.reshape(*experts.shape, -1)


def swept(
    x: Array, experts: Int[Array, "T k"], weights: Array, into: Kernels, out_of: Kernels, activate: Activation
) -> Float[Array, "T D"]:
    """The weighted sum of each token's experts, one expert after the other for all tokens, added in float32."""

    def one(expert: Array, total: Array) -> Array:
        share = jnp.sum(jnp.where(experts == expert, weights, 0), axis=1)
        inner = activate(into.chosen(expert).product(x, f"tng,ng{_parts(into)}->t{_parts(into)}", 0))
        out = out_of.chosen(expert).product(inner, "tng,ngd->td", 0).astype(jnp.float32)
        return total + jnp.where(share[:, None] == 0, 0, out * share[:, None])

    return jax.lax.fori_loop(0, into.count, one, jnp.zeros(x.shape, jnp.float32)).astype(x.dtype)


def grouped(
    x: Array, experts: Int[Array, "T k"], into: Kernels, out_of: Kernels, activate: Activation
) -> Float[Array, "T k D"]:
    """The outputs of each token's experts, with the tokens sorted by expert; anything for an expert out of range."""
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=into.count).astype(jnp.int32)
    expert = jnp.minimum(flat[order], into.count - 1)
    inner = into.scaled(jax.lax.ragged_dot(x[order // experts.shape[1]], into.wide(x.dtype), sizes), expert)
    out = out_of.scaled(jax.lax.ragged_dot(activate(inner), out_of.wide(x.dtype), sizes), expert)
    return jnp.zeros_like(out).at[order].set(out).reshape(*experts.shape, -1)


def _parts(into: Kernels) -> str:
    """Letters of the outputs of the first product: parts, if it has any, and the expert's width."""
    return "cf" if into.values.ndim == 4 else "f"
