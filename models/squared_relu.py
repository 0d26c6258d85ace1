"""MLPs and experts without a gate: squared ReLU between two products; and their rows in a weight table."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels_pallas.experts import choose_backend
from models.division import Part
from models.layers import Linear, matrix
from models.moe import all_experts, some_experts
from models.weights import Source, Weight, weight


def squared_relu(x: Float[Array, "*n F"]) -> Float[Array, "*n F"]:
    """`max(x, 0)^2` (arXiv 2109.08668), computed in float32."""
    return jnp.square(jnp.maximum(x.astype(jnp.float32), 0)).astype(x.dtype)


class SquaredReLU(nnx.Module):
    """An MLP without gate: `relu(x Wu)^2 Wd`."""

    def __init__(self, rngs: nnx.Rngs, width: int, inner: int, dtype: str):
        self.up = Linear(rngs, (width,), (inner,), ("model", "mlp"), dtype)
        self.down = Linear(rngs, (inner,), (width,), ("mlp", "model"), dtype)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return self.down(squared_relu(self.up(x)))


class SquaredReLUExperts(nnx.Module):
    """E MLPs without gate, of width F."""

    def __init__(self, rngs: nnx.Rngs, experts: int, width: int, inner: int, dtype: str, backend: str = "auto"):
        self.up = matrix(rngs, (experts, width, inner), ("expert", "model", "expert_mlp"), width, dtype)
        self.down = matrix(rngs, (experts, inner, width), ("expert", "expert_mlp", "model"), inner, dtype)
        self.backend = choose_backend(backend, dtype, (width, inner))

    def __call__(self, x: Float[Array, "T D"], experts: Int[Array, "T k"], weights: Float[Array, "T k"]) -> Array:
        return all_experts(x, experts, weights, self.up[...][:, :, None, :], self.down[...], _activate, self.backend)

    def partial(
        self, x: Float[Array, "T D"], experts: Int[Array, "T k"], weights: Float[Array, "T k"], part: Part
    ) -> Float[Array, "T D"]:
        """What share number `part` of the experts adds."""
        up, down = self.up[...][:, :, None, :], self.down[...]
        return some_experts(x, experts, weights, up, down, _activate, part, self.backend)


def _activate(inner: Float[Array, "n 1 F"]) -> Float[Array, "n F"]:
    return squared_relu(inner[:, 0])


class LatentExperts(nnx.Module):
    """Experts that work in a narrower space, between a projection into it and one out of it."""

    def __init__(
        self, rngs: nnx.Rngs, experts: int, width: int, latent: int, inner: int, dtype: str, backend: str = "auto"
    ):
        self.into = Linear(rngs, (width,), (latent,), ("model", None), dtype)
        self.experts = SquaredReLUExperts(rngs, experts, latent, inner, dtype, backend)
        self.out_of = Linear(rngs, (latent,), (width,), (None, "model"), dtype)

    def __call__(self, x: Float[Array, "T D"], experts: Int[Array, "T k"], weights: Float[Array, "T k"]) -> Array:
        return self.out_of(self.experts(self.into(x), experts, weights))

    def partial(
        self, x: Float[Array, "T D"], experts: Int[Array, "T k"], weights: Float[Array, "T k"], part: Part
    ) -> Float[Array, "T D"]:
        """What share number `part` of the experts adds: both projections are linear."""
        return self.out_of(self.experts.partial(self.into(x), experts, weights, part))


def squared_relu_rows(ours: str, theirs: str) -> list[Weight]:
    """Rows of an MLP without gate."""
    return [
        weight(f"{ours}.up.kernel", f"{theirs}.up_proj.weight", "f d -> d f"),
        weight(f"{ours}.down.kernel", f"{theirs}.down_proj.weight", "d f -> f d"),
    ]


def squared_relu_expert_rows(experts: int, ours: str, theirs: str) -> list[Weight]:
    """Rows of E experts without gate, published one by one or packed."""
    rows = []
    for part, pattern in (("up", "e f d -> e d f"), ("down", "e d f -> e f d")):
        names = tuple(f"{theirs}.{e}.{part}_proj.weight" for e in range(experts))
        packed = Source((f"{theirs}.{part}_proj",), pattern)
        rows.append(Weight(f"{ours}.{part}", (Source(names, pattern, (experts,)), packed)))
    return rows
