"""Mixture of experts: routers that choose experts for each token, and the experts.

A router gives every token k experts and their weights, float32. Experts that nobody chose cost nothing.
Letters: T tokens, D model width, E experts, k experts a token, F expert width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.division import Divisible, Part
from models.layers import MLP, Axes, Tally, matrix, swiglu

Choice = tuple[Int[Array, "T k"], Float[Array, "T k"]]
Activation = Callable[[Array], Array]  # [n, parts, F] to [n, F]


@dataclass(frozen=True)
class GroupedSigmoid:
    """Sigmoid scores, experts in groups (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    A bias helps to choose but is not part of the weights. A group scores the sum of its two best biased scores; only
    the `kept_groups` best groups take part. `normalised`: weights are divided by their sum, then times `factor`.
    """

    chosen: int
    groups: int
    kept_groups: int
    normalised: bool
    factor: float

    def check(self, experts: int) -> None:
        """Raises ValueError where so many experts do not fall into the groups, or the kept groups hold too few."""
        if experts % self.groups:
            raise ValueError(f"config.json: wanted experts in {self.groups} equal groups, got {experts} experts")
        reachable = self.kept_groups * experts // self.groups
        if self.kept_groups > self.groups or self.chosen > reachable:
            raise ValueError(f"config.json: wanted {self.chosen} experts in {self.kept_groups} groups, got {reachable}")

    def __call__(self, logits: Float[Array, "T E"], bias: Float[Array, "E"]) -> Choice:
        """The experts of each token and their weights."""
        scores = jax.nn.sigmoid(logits)
        biased = (scores + bias[None, :]).reshape(logits.shape[0], self.groups, -1)
        group_scores = jax.lax.top_k(biased, min(2, biased.shape[2]))[0].sum(-1)
        kept = jax.lax.top_k(group_scores, self.kept_groups)[1]
        open_TG = jnp.any(kept[:, :, None] == jnp.arange(self.groups)[None, None, :], axis=1)
        biased = jnp.where(open_TG[:, :, None], biased, -jnp.inf).reshape(logits.shape)
        experts = jax.lax.top_k(biased, self.chosen)[1]
        weights = jnp.take_along_axis(scores, experts, axis=1)
        if self.normalised:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        return experts, weights * self.factor


@dataclass(frozen=True)
class SoftmaxTopK:
    """Softmax over all experts, the k best, their weights divided by their sum."""

    chosen: int

    def __call__(self, logits: Float[Array, "T E"]) -> Choice:
        """The experts of each token and their weights."""
        weights, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), self.chosen)
        return experts, weights / weights.sum(-1, keepdims=True)


class RouterScores(nnx.Module):
    """The product that scores experts, in float32 whatever the model's dtype: near ties decide who computes."""

    def __init__(self, rngs: nnx.Rngs, width: int, experts: int, dtype: str):
        self.kernel = matrix(rngs, (width, experts), ("model", None), width, dtype)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T E"]:
        kernel = self.kernel[...].astype(jnp.float32)
        return jnp.dot(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)


class BiasedRouter(nnx.Module):
    """A router whose choice is helped by a bias per expert."""

    def __init__(self, rngs: nnx.Rngs, width: int, experts: int, choose: Callable[[Array, Array], Choice], dtype: str):
        self.scores = RouterScores(rngs, width, experts, dtype)
        self.bias = Tally(jnp.zeros((experts,), jnp.float32), axes=(None,))
        self.choose = choose

    def __call__(self, x: Float[Array, "T D"]) -> Choice:
        return self.choose(self.scores(x), self.bias[...])


class PlainRouter(nnx.Module):
    """A router without bias."""

    def __init__(self, rngs: nnx.Rngs, width: int, experts: int, choose: SoftmaxTopK, dtype: str):
        self.scores = RouterScores(rngs, width, experts, dtype)
        self.choose = choose

    def __call__(self, x: Float[Array, "T D"]) -> Choice:
        return self.choose(self.scores(x))


class Experts(nnx.Module):
    """E SwiGLU MLPs of width F; gate and up lie in one kernel `[E, D, 2, F]`."""

    def __init__(self, rngs: nnx.Rngs, experts: int, width: int, inner: int, dtype: str, activate: Activation = swiglu):
        gate_up_axes: Axes = ("expert", "model", None, "expert_mlp")
        self.gate_up = matrix(rngs, (experts, width, 2, inner), gate_up_axes, width, dtype)
        self.down = matrix(rngs, (experts, inner, width), ("expert", "expert_mlp", "model"), inner, dtype)
        self.activate = activate

    def __call__(self, x: Float[Array, "T D"], experts: Int[Array, "T k"], weights: Float[Array, "T k"]) -> Array:
        return all_experts(x, experts, weights, self.gate_up[...], self.down[...], self.activate)

    def partial(
        self, x: Float[Array, "T D"], experts: Int[Array, "T k"], weights: Float[Array, "T k"], part: Part
    ) -> Float[Array, "T D"]:
        """What share number `part` of the experts adds."""
        return some_experts(x, experts, weights, self.gate_up[...], self.down[...], self.activate, part)


def all_experts(
    x: Array, experts: Array, weights: Array, gate_up: Array, down: Array, activate: Activation
) -> Float[Array, "T D"]:
    """The weighted sum of each token's experts."""
    few = experts.size < gate_up.shape[0]  # gathering reads a kernel per choice, grouping reads every kernel
    compute = gathered_experts if few else grouped_experts
    out = compute(x, experts, gate_up, down, activate)
    return jnp.einsum("tkd,tk->td", out.astype(jnp.float32), weights).astype(x.dtype)


def some_experts(
    x: Array, experts: Array, weights: Array, gate_up: Array, down: Array, activate: Activation, part: Part
) -> Float[Array, "T D"]:
    """What the experts of one share add to `all_experts`; `gate_up` and `down` are theirs.

    Looping reads a kernel per choice that falls into the share, and waits for each; grouping reads every kernel.
    """
    count = gate_up.shape[0]
    own = experts - part * count
    mine = (own >= 0) & (own < count)
    own = jnp.where(mine, own, count)
    compute = looped_experts if experts.size < count else grouped_experts
    out = jnp.where(mine[:, :, None], compute(x, own, gate_up, down, activate), 0).astype(jnp.float32)
    return jnp.einsum("tkd,tk->td", out, weights).astype(x.dtype)


def looped_experts(
    x: Array, experts: Int[Array, "T k"], gate_up: Array, down: Array, activate: Activation
) -> Float[Array, "T k D"]:
    """The outputs of each token's experts, zeros for an expert out of range: for few tokens, of which few are here."""
    flat = experts.reshape(-1)
    here = flat < gate_up.shape[0]
    order = jnp.argsort(~here, stable=True)

    def one(index: Array, out: Array) -> Array:
        choice = order[index]
        expert = flat[choice]
        inner = activate(jnp.einsum("d,dcf->cf", x[choice // experts.shape[1]], gate_up[expert])[None])
        return out.at[choice].set(inner[0] @ down[expert])

    out = jax.lax.fori_loop(0, jnp.sum(here), one, jnp.zeros((len(flat), x.shape[1]), x.dtype))
    return out.reshape(*experts.shape, -1)


def gathered_experts(
    x: Array, experts: Int[Array, "T k"], gate_up: Array, down: Array, activate: Activation = swiglu
) -> Float[Array, "T k D"]:
    """The outputs of each token's experts, reading one kernel per choice: for few tokens."""
    inner = jnp.einsum("td,tkdcf->tkcf", x, gate_up[experts])
    shape = inner.shape
    inner = activate(inner.reshape(-1, *shape[2:])).reshape(*shape[:2], shape[3])
    return jnp.einsum("tkf,tkfd->tkd", inner, down[experts])


def grouped_experts(
    x: Array, experts: Int[Array, "T k"], gate_up: Array, down: Array, activate: Activation = swiglu
) -> Float[Array, "T k D"]:
    """The outputs of each token's experts, with the tokens sorted by expert: for many tokens."""
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=gate_up.shape[0]).astype(jnp.int32)
    rows = x[order // experts.shape[1]]
    inner = jax.lax.ragged_dot(rows, gate_up.reshape(*gate_up.shape[:2], -1), sizes)
    inner = activate(inner.reshape(-1, *gate_up.shape[2:]))
    out = jax.lax.ragged_dot(inner, down, sizes)
    return jnp.zeros_like(out).at[order].set(out).reshape(*experts.shape, -1)


class SharedExpert(nnx.Module):
    """An MLP that every token takes, added as it is."""

    def __init__(self, rngs: nnx.Rngs, width: int, inner: int, dtype: str, activate: Activation = swiglu):
        self.mlp = MLP(rngs, width, inner, dtype, activate)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return self.mlp(x)


class GatedSharedExpert(nnx.Module):
    """An MLP that every token takes, scaled by `sigmoid(x w)`."""

    def __init__(self, rngs: nnx.Rngs, width: int, inner: int, dtype: str):
        self.mlp = MLP(rngs, width, inner, dtype)
        self.gate = matrix(rngs, (width,), ("model",), width, dtype)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        share = jax.nn.sigmoid(jnp.dot(x, self.gate[...], preferred_element_type=jnp.float32))
        return (self.mlp(x).astype(jnp.float32) * share[:, None]).astype(x.dtype)


class SomeExperts(Protocol):
    """Experts, all of them or a share."""

    def __call__(self, x: Array, experts: Array, weights: Array) -> Float[Array, "T D"]:
        """The weighted sum of each token's experts."""

    def partial(self, x: Array, experts: Array, weights: Array, part: Part) -> Float[Array, "T D"]:
        """What a share of the experts adds to it."""


class MoE(Divisible):
    """Routed experts plus a shared one, whose result is a sum over its inner channels."""

    def __init__(self, router: Callable[[Array], Choice], experts: SomeExperts, shared: Callable[[Array], Array]):
        self.router = router
        self.experts = experts
        self.shared = shared

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return self.division.total(self, x)

    def whole(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """All experts."""
        return self.experts(x, *self.router(x)) + self.shared(x)

    def partial(self, x: Float[Array, "T D"], part: Part) -> Float[Array, "T D"]:
        """What a share of the experts and of the shared expert's inner channels adds."""
        return self.experts.partial(x, *self.router(x), part) + self.shared(x)


class RoutedExperts(Divisible):
    """Routed experts without a shared one."""

    def __init__(self, router: Callable[[Array], Choice], experts: SomeExperts):
        self.router = router
        self.experts = experts

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return self.division.total(self, x)

    def whole(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """All experts."""
        return self.experts(x, *self.router(x))

    def partial(self, x: Float[Array, "T D"], part: Part) -> Float[Array, "T D"]:
        """What a share of the experts adds."""
        return self.experts.partial(x, *self.router(x), part)
