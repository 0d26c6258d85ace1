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

from kernels_pallas.experts import EXPERTS, Activation, choose_backend
from models.division import Divisible, Part
from models.layers import MLP, Axes, Tally, matrix, swiglu

MOST_COMPARISONS = 2**21  # of scores; one H100 takes 2 us for them, and 6 us for the least that it sorts
Choice = tuple[Int[Array, "T k"], Float[Array, "T k"]]


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
        group_scores = best(biased, min(2, biased.shape[2]))[0].sum(-1)
        open_TG = ranks(group_scores) < self.kept_groups
        biased = jnp.where(open_TG[:, :, None], biased, -jnp.inf).reshape(logits.shape)
        experts = best(biased, self.chosen)[1]
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
        weights, experts = best(jax.nn.softmax(logits, axis=-1), self.chosen)
        return experts, weights / weights.sum(-1, keepdims=True)


def best(scores: Float[Array, "*n E"], count: int) -> tuple[Float[Array, "*n k"], Int[Array, "*n k"]]:
    """The `count` greatest scores and their indices, the greatest first, of equal ones the lowest index first.

    Few scores are compared all with all, which takes less time than to sort them.
    """
    if scores.size * scores.shape[-1] > MOST_COMPARISONS:
        return jax.lax.top_k(scores, count)
    places = jnp.arange(count, dtype=jnp.int32).reshape((1,) * (scores.ndim - 1) + (count, 1))
    taken = ranks(scores)[..., None, :] == places
    return jnp.where(taken, scores[..., None, :], 0).sum(-1), jnp.argmax(taken, axis=-1).astype(jnp.int32)


def ranks(scores: Float[Array, "*n E"]) -> Int[Array, "*n E"]:
    """How many scores come before each: greater ones, and equal ones of a lower index."""
    index = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    lower = (index[None, :] < index[:, None]).reshape((1,) * (scores.ndim - 1) + (len(index), len(index)))
    own, other = scores[..., :, None], scores[..., None, :]
    return jnp.sum((other > own) | ((other == own) & lower), axis=-1, dtype=jnp.int32)


def by_several_rows(compute: Callable[[Array], Array], x: Float[Array, "T D"]) -> Float[Array, "T F"]:
    """`compute(x)`, where a row does not depend on the others; one row is given rows of zeros for company.

    XLA multiplies one row without the matrix units of a GPU, which took two to three times as long on an H100.
    """
    return compute(x) if x.shape[0] > 1 else compute(jnp.concatenate([x, jnp.zeros((7, x.shape[1]), x.dtype)]))[:1]


class RouterScores(nnx.Module):
    """The product that scores experts, with float32 sums whatever the model's dtype: near ties decide who computes.

    A product of two bfloat16 numbers is exact in float32: they need not be widened before.
    """

    def __init__(self, rngs: nnx.Rngs, width: int, experts: int, dtype: str):
        self.kernel = matrix(rngs, (width, experts), ("model", None), width, dtype)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T E"]:
        return by_several_rows(self._product, x)

    def _product(self, x: Float[Array, "T D"]) -> Float[Array, "T E"]:
        kernel = self.kernel[...]
        highest, float32 = jax.lax.Precision.HIGHEST, jnp.float32
        common = x.dtype if x.dtype == kernel.dtype else float32
        return jnp.dot(x.astype(common), kernel.astype(common), precision=highest, preferred_element_type=float32)


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

    def __init__(
        self,
        rngs: nnx.Rngs,
        experts: int,
        width: int,
        inner: int,
        dtype: str,
        activate: Activation = swiglu,
        backend: str = "auto",
    ):
        gate_up_axes: Axes = ("expert", "model", None, "expert_mlp")
        self.gate_up = matrix(rngs, (experts, width, 2, inner), gate_up_axes, width, dtype)
        self.down = matrix(rngs, (experts, inner, width), ("expert", "expert_mlp", "model"), inner, dtype)
        self.activate = activate
        self.backend = choose_backend(backend, dtype, (width, inner))

    def __call__(self, x: Float[Array, "T D"], experts: Int[Array, "T k"], weights: Float[Array, "T k"]) -> Array:
        return all_experts(x, experts, weights, self.gate_up[...], self.down[...], self.activate, self.backend)

    def partial(
        self, x: Float[Array, "T D"], experts: Int[Array, "T k"], weights: Float[Array, "T k"], part: Part
    ) -> Float[Array, "T D"]:
        """What share number `part` of the experts adds."""
        gate_up, down = self.gate_up[...], self.down[...]
        return some_experts(x, experts, weights, gate_up, down, self.activate, part, self.backend)


def all_experts(
    x: Array, experts: Array, weights: Array, gate_up: Array, down: Array, activate: Activation, backend: str = "xla"
) -> Float[Array, "T D"]:
    """The weighted sum of each token's experts."""
    return _weighed(EXPERTS[backend].whole(x, experts, gate_up, down, activate), weights)


def some_experts(
    x: Array,
    experts: Array,
    weights: Array,
    gate_up: Array,
    down: Array,
    activate: Activation,
    part: Part,
    backend: str = "xla",
) -> Float[Array, "T D"]:
    """What the experts of one share add to `all_experts`; `gate_up` and `down` are theirs."""
    own = experts - part * gate_up.shape[0]
    return _weighed(EXPERTS[backend].share(x, own, gate_up, down, activate), weights)


def _weighed(out: Float[Array, "T k D"], weights: Float[Array, "T k"]) -> Float[Array, "T D"]:
    """The weighted sum, float32, in the order of the choices whatever the number of tokens."""
    terms = [out[:, i].astype(jnp.float32) * weights[:, i, None] for i in range(out.shape[1])]
    return sum(terms[1:], start=terms[0]).astype(out.dtype)


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
        return self.experts(x, *self.router(x)) + by_several_rows(self.shared, x)

    def partial(self, x: Float[Array, "T D"], part: Part) -> Float[Array, "T D"]:
        """What a share of the experts and of the shared expert's inner channels adds."""
        return self.experts.partial(x, *self.router(x), part) + by_several_rows(self.shared, x)


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
