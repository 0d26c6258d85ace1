"""Full-attention mixers: grouped-query attention and latent attention, between their projections and ops."""

from dataclasses import dataclass

from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas.gqa import GQA, GQAWeights
from kernels_pallas.mla import MLA, MLAWeights
from kernels_pallas.op import ArraySpec, Cache, KVSpec, Place, RaggedBatch
from kernels_pallas.rotary import Rotary
from models.layers import Linear, RMSNorm

LATENT_EPSILON = 1e-6  # of the norms inside MLA, whatever the model's other norms use


@dataclass(frozen=True)
class LatentShape:
    """Widths of a latent attention: heads, query rank (None: no compression of queries), latent rank, head widths."""

    heads: int
    query_rank: int | None
    latent_rank: int
    plain_width: int
    rotary_width: int
    value_width: int


class LatentAttention(nnx.Module):
    """MLA with rotary on interleaved pairs: projections around the op."""

    kind = MLA.name

    def __init__(self, rngs: nnx.Rngs, width: int, shape: LatentShape, scale: float, dtype: str, backend: str):
        query_width = shape.plain_width + shape.rotary_width
        cached = shape.latent_rank + shape.rotary_width
        if shape.query_rank is not None:
            self.query_down = Linear(rngs, (width,), (shape.query_rank,), ("model", None), dtype)
            self.query_norm = RMSNorm(shape.query_rank, LATENT_EPSILON)
        inputs = (shape.query_rank or width,)
        self.query = Linear(rngs, inputs, (shape.heads, query_width), (None, "heads", None), dtype)
        self.latent = Linear(rngs, (width,), (cached,), ("model", None), dtype)
        self.latent_norm = RMSNorm(shape.latent_rank, LATENT_EPSILON)
        expanded = (shape.heads, shape.plain_width + shape.value_width)
        self.expansion = Linear(rngs, (shape.latent_rank,), expanded, (None, "heads", None), dtype)
        self.output = Linear(rngs, (shape.heads * shape.value_width,), (width,), ("heads", "model"), dtype)
        self.compressed_query = shape.query_rank is not None
        self.scale = scale
        self.memory = KVSpec((ArraySpec("latent", (cached,), dtype),))
        self.place = Place(0, 0)
        self.backend = backend

    def __call__(
        self, x: Float[Array, "T D"], rotary: Rotary | None, cache: Cache, batch: RaggedBatch
    ) -> tuple[Float[Array, "T D"], Cache]:
        q = self.query(self.query_norm(self.query_down(x)) if self.compressed_query else x)
        weights = MLAWeights(self.latent_norm.weight, self.expansion.kernel[...])
        (pages,) = cache.pages(self.place)
        out, pages = MLA.on(self.backend)(
            q, self.latent(x), weights, rotary, pages, self.place.layer, batch, scale=self.scale, epsilon=LATENT_EPSILON
        )
        return self.output(out), cache.updated(self.place, (pages,))


@dataclass(frozen=True)
class GroupedShape:
    """Widths of a grouped-query attention: query heads, key and value heads, head width."""

    heads: int
    key_heads: int
    width: int


class GatedGroupedAttention(nnx.Module):
    """GQA with norms of queries and keys per head, and a sigmoid gate on the output that is projected with the query."""

    kind = GQA.name

    def __init__(
        self,
        rngs: nnx.Rngs,
        width: int,
        shape: GroupedShape,
        epsilon: float,
        norm_offset: float,
        dtype: str,
        backend: str,
    ):
        heads, keys = (shape.heads, 2, shape.width), (shape.key_heads, shape.width)
        self.query_gate = Linear(rngs, (width,), heads, ("model", "heads", None, None), dtype)
        self.key = Linear(rngs, (width,), keys, ("model", "kv_heads", None), dtype)
        self.value = Linear(rngs, (width,), keys, ("model", "kv_heads", None), dtype)
        self.query_norm = RMSNorm(shape.width, epsilon, offset=norm_offset)
        self.key_norm = RMSNorm(shape.width, epsilon, offset=norm_offset)
        self.output = Linear(rngs, (shape.heads * shape.width,), (width,), ("heads", "model"), dtype)
        self.scale = shape.width**-0.5
        self.epsilon = epsilon
        self.memory = KVSpec((ArraySpec("kv", (2, *keys), dtype),))
        self.place = Place(0, 0)
        self.backend = backend

    def __call__(
        self, x: Float[Array, "T D"], rotary: Rotary | None, cache: Cache, batch: RaggedBatch
    ) -> tuple[Float[Array, "T D"], Cache]:
        query_gate = self.query_gate(x)
        weights = GQAWeights(self.query_norm.weight, self.key_norm.weight)
        (pages,) = cache.pages(self.place)
        out, pages = GQA.on(self.backend)(
            query_gate[:, :, 0],
            self.key(x),
            self.value(x),
            query_gate[:, :, 1],
            weights,
            rotary,
            pages,
            self.place.layer,
            batch,
            scale=self.scale,
            epsilon=self.epsilon,
        )
        return self.output(out), cache.updated(self.place, (pages,))
