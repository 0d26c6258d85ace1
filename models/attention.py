"""Full-attention mixers: grouped-query attention and latent attention, between their projections and ops."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas.gqa import GQA, GQAWeights
from kernels_pallas.mla import MLA, MLAWeights
from kernels_pallas.op import ArraySpec, Cache, KVSpec, Memory, Place, RaggedBatch
from kernels_pallas.rotary import Rotary
from models.division import Divisible, Division
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


class LatentAttention(Divisible):
    """MLA: projections around the op.

    `rotated`: queries and shared keys pass a rotary embedding on interleaved pairs. `gate`: None, or the outputs of a
    projection whose sigmoid scales the attention's output: `(heads,)` or `(heads, value width)`.
    """

    kind = MLA.name

    def __init__(
        self,
        rngs: nnx.Rngs,
        width: int,
        shape: LatentShape,
        scale: float,
        dtype: str,
        backend: str,
        rotated: bool = True,
        gate: tuple[int, ...] | None = None,
    ):
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
        if gate is not None:
            self.gate = Linear(rngs, (width,), gate, ("model", "heads", None)[: 1 + len(gate)], dtype)
        self.gated, self.rotated = gate is not None, rotated
        self.compressed_query = shape.query_rank is not None
        self.heads = shape.heads
        self.scale = scale
        memory = KVSpec((ArraySpec("latent", (cached,), dtype),))
        self.place = Place(0, 0)
        self.backend = MLA.choose(backend, memory, dtype)
        self.memory: Memory = MLA.keep(self.backend, memory)

    def __call__(
        self, x: Float[Array, "T D"], rotary: Rotary | None, cache: Cache, batch: RaggedBatch
    ) -> tuple[Float[Array, "T D"], Cache]:
        q = self.query(self.query_norm(self.query_down(x)) if self.compressed_query else x)
        weights = MLAWeights(self.latent_norm.weight, self.expansion.kernel[...])
        tables = rotary if self.rotated else None
        (pages,) = cache.pages(self.place)
        out, pages = self.division.op(MLA, self.backend, {"scale": self.scale, "epsilon": LATENT_EPSILON})(
            q, self.latent(x), weights, tables, pages, self.place.layer, batch
        )
        out = self._scaled(out, x) if self.gated else out
        return self.output(out), cache.updated(self.place, (pages,))

    def _scaled(self, out: Float[Array, "T H*V"], x: Float[Array, "T D"]) -> Float[Array, "T H*V"]:
        """The output times the sigmoid of its gate, in float32."""
        gate = jax.nn.sigmoid(self.gate(x).astype(jnp.float32)).reshape(x.shape[0], self.heads, -1)
        per_head = out.reshape(x.shape[0], self.heads, -1).astype(jnp.float32)
        return (per_head * gate).reshape(out.shape).astype(out.dtype)


@dataclass(frozen=True)
class GroupedShape:
    """Widths of a grouped-query attention: query heads, key and value heads, head width.

    Raises ValueError where the query heads are no multiple of the key heads.
    """

    heads: int
    key_heads: int
    width: int

    def __post_init__(self) -> None:
        if self.heads % self.key_heads:
            raise ValueError(
                f"config.json: wanted query heads to be a multiple of {self.key_heads} key heads, got {self.heads}: "
                "correct num_attention_heads or num_key_value_heads"
            )


@dataclass(frozen=True)
class NormShape:
    """Norms of queries and keys per head: epsilon, and what is added to the stored weight."""

    epsilon: float
    offset: float = 0.0


def kept_heads(key_heads: int, width: int, dtype: str) -> KVSpec:
    """What a grouped-query attention remembers of a token: for each head its key, then its value."""
    return KVSpec((ArraySpec("kv", (key_heads, 2 * width), dtype, ("kept_heads", None)),))


def repeated(heads: Float[Array, "T G K"], memory: Memory) -> Float[Array, "T n K"]:
    """Keys or values, each head as often as the memory keeps it."""
    return jnp.repeat(heads, memory.arrays[0].shape[0] // heads.shape[1], axis=1)


class _Grouped(Divisible):
    """What every GQA has: keys, values, output, memory. How queries come about is the business of its two forms."""

    kind = GQA.name

    def __init__(
        self,
        rngs: nnx.Rngs,
        width: int,
        shape: GroupedShape,
        norm: NormShape | None,
        scale: float,
        dtype: str,
        backend: str,
    ):
        keys = (shape.key_heads, shape.width)
        self.key = Linear(rngs, (width,), keys, ("model", "kv_heads", None), dtype)
        self.value = Linear(rngs, (width,), keys, ("model", "kv_heads", None), dtype)
        if norm is not None:
            self.query_norm = RMSNorm(shape.width, norm.epsilon, offset=norm.offset)
            self.key_norm = RMSNorm(shape.width, norm.epsilon, offset=norm.offset)
        self.normed, self.epsilon = norm is not None, 0.0 if norm is None else norm.epsilon
        self.output = Linear(rngs, (shape.heads * shape.width,), (width,), ("heads", "model"), dtype)
        self.scale = scale
        self.shape, self.dtype = shape, dtype
        self.memory: Memory = kept_heads(shape.key_heads, shape.width, dtype)
        self.place = Place(0, 0)
        self.backend = GQA.choose(backend, self.memory, dtype)

    def divide(self, division: Division) -> None:
        """Bind a division; keys and values are repeated where there are more devices than heads of them."""
        super().divide(division)
        self.memory = kept_heads(division.key_heads(self.shape.key_heads), self.shape.width, self.dtype)

    def _attend(
        self, q: Array, gate: Array | None, x: Array, rotary: Rotary | None, cache: Cache, batch: RaggedBatch
    ) -> tuple[Array, Cache]:
        weights = GQAWeights(self.query_norm.weight, self.key_norm.weight) if self.normed else GQAWeights()
        (pages,) = cache.pages(self.place)
        options = {"scale": self.scale, "epsilon": self.epsilon}
        keys, values = repeated(self.key(x), self.memory), repeated(self.value(x), self.memory)
        out, pages = self.division.op(GQA, self.backend, options)(
            q, keys, values, gate, weights, rotary, pages, self.place.layer, batch
        )
        return self.output(out), cache.updated(self.place, (pages,))


class GroupedAttention(_Grouped):
    """GQA: projections around the op. `norm`: norms of queries and keys, or None. `rotated`: rotary on half pairs."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        width: int,
        shape: GroupedShape,
        norm: NormShape | None,
        rotated: bool,
        scale: float,
        dtype: str,
        backend: str,
    ):
        super().__init__(rngs, width, shape, norm, scale, dtype, backend)
        self.query = Linear(rngs, (width,), (shape.heads, shape.width), ("model", "heads", None), dtype)
        self.rotated = rotated

    def __call__(
        self, x: Float[Array, "T D"], rotary: Rotary | None, cache: Cache, batch: RaggedBatch
    ) -> tuple[Float[Array, "T D"], Cache]:
        return self._attend(self.query(x), None, x, rotary if self.rotated else None, cache, batch)


class GatedGroupedAttention(_Grouped):
    """GQA whose output is scaled by a sigmoid gate, projected together with the query: per head `[query | gate]`."""

    def __init__(
        self, rngs: nnx.Rngs, width: int, shape: GroupedShape, norm: NormShape, scale: float, dtype: str, backend: str
    ):
        super().__init__(rngs, width, shape, norm, scale, dtype, backend)
        axes = ("model", "heads", None, None)
        self.query_gate = Linear(rngs, (width,), (shape.heads, 2, shape.width), axes, dtype)

    def __call__(
        self, x: Float[Array, "T D"], rotary: Rotary | None, cache: Cache, batch: RaggedBatch
    ) -> tuple[Float[Array, "T D"], Cache]:
        query_gate = self.query_gate(x)
        return self._attend(query_gate[:, :, 0], query_gate[:, :, 1], x, rotary, cache, batch)
