"""LFM2, dense and mixture of experts: gated short convolutions with grouped-query attention in some layers.

Definition: the `lfm2` and `lfm2_moe` classes of transformers.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas.op import ArraySpec, Cache, Memory, Place, RaggedBatch, StateSpec
from kernels_pallas.rotary import Rotary, frequencies
from kernels_pallas.short_conv import SHORT_CONV
from models.attention import GroupedAttention, GroupedShape, NormShape
from models.decoder import Decoder, Layer, Mixer
from models.division import Divisible
from models.hf_fields import LARGEST_WHOLE, MOST_EXPERTS, MOST_HEADS, MOST_LAYERS, Fields, check_multiple
from models.layers import MLP, Embedding, Head, Linear, RMSNorm, matrix
from models.moe import BiasedRouter, Choice, Experts, RoutedExperts
from models.weights import NUMBERED, Weight, WeightTable, expert_rows, mlp_rows, trunk_rows, weight

DENSE, SPARSE = "Lfm2ForCausalLM", "Lfm2MoeForCausalLM"
ARCHITECTURES = (DENSE, SPARSE)
CONVOLUTION, FULL = "conv", "full_attention"

# How weights were initialised.
IGNORED_FIELDS = "block_mlp_init_scale block_out_init_scale block_use_xavier_init conv_use_xavier_init".split()


@dataclass(frozen=True)
class BiasedSigmoid:
    """Sigmoid scores, the k best of them plus a bias; weights without the bias, over their sum, times `factor`."""

    chosen: int
    factor: float

    def __call__(self, logits: Float[Array, "T E"], bias: Float[Array, "E"]) -> Choice:
        """The experts of each token and their weights."""
        scores = jax.nn.sigmoid(logits)
        experts = jax.lax.top_k(scores + bias[None, :], self.chosen)[1]
        weights = jnp.take_along_axis(scores, experts, axis=1)
        return experts, weights / (weights.sum(-1, keepdims=True) + 1e-6) * self.factor


@dataclass(frozen=True)
class SparseShape:
    """Sizes of the mixture of experts, and how it chooses; the first `dense_layers` layers have an MLP instead."""

    dense_layers: int
    experts: int
    width: int
    router: BiasedSigmoid


@dataclass(frozen=True)
class Config:
    """What the network computes, read from a published config. `sparse` is None for a dense model."""

    vocabulary: int
    width: int
    kinds: tuple[str, ...]
    attention: GroupedShape
    convolution: int
    dense_width: int
    sparse: SparseShape | None
    epsilon: float
    rope_theta: float
    tied: bool
    max_positions: int

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "Config":
        """Read a config.json. Raises ValueError for a missing or unknown field, or a value that is not implemented."""
        architecture = hf["architectures"][0]
        f = Fields(hf, f"config.json of {architecture}")
        f.accept("conv_bias", False)
        f.accept("use_pos_enc", True)
        f.accept("rope_scaling", None)
        f.ignore(IGNORED_FIELDS)
        width, epsilon = f.whole("hidden_size"), f.number("norm_eps")
        sparse = architecture == SPARSE
        config = cls(
            vocabulary=f.whole("vocab_size"),
            width=width,
            kinds=_read_kinds(f),
            attention=_read_attention(f, width),
            convolution=f.whole("conv_L_cache", least=2),
            dense_width=f.whole("intermediate_size") if sparse else _read_dense(f, width, epsilon),
            sparse=_read_sparse(f) if sparse else None,
            epsilon=epsilon,
            rope_theta=_read_theta(f),
            tied=_read_tied(f),
            max_positions=f.whole("max_position_embeddings"),
        )
        f.done()
        return config


def _read_kinds(f: Fields) -> tuple[str, ...]:
    """Kind of each layer: the words of `layer_types`, or the older list of the attention layers, counted from 0."""
    layers = f.whole("num_hidden_layers", most=MOST_LAYERS)
    by_word, by_index = (f.get(name, None) is not None for name in ("layer_types", "full_attn_idxs"))
    full = f.wholes("full_attn_idxs", 0, layers - 1) if by_index else ()
    if list(full) != sorted(set(full)):
        raise ValueError(f"config.json: wanted full_attn_idxs in order and each once, got {list(full)}")
    if by_index and not by_word:
        return _kinds_of(full, layers)
    kinds = f.words("layer_types", (CONVOLUTION, FULL), layers)
    if by_index and kinds != _kinds_of(full, layers):
        raise ValueError(f"config.json: wanted full_attn_idxs as in layer_types {list(kinds)}, got {list(full)}")
    return kinds


def _kinds_of(full: tuple[int, ...], layers: int) -> tuple[str, ...]:
    chosen = frozenset(full)
    return tuple(FULL if index in chosen else CONVOLUTION for index in range(layers))


def _read_attention(f: Fields, width: int) -> GroupedShape:
    heads, key_heads = f.whole("num_attention_heads", most=MOST_HEADS), f.whole("num_key_value_heads", most=MOST_HEADS)
    f.equal("num_heads", heads)
    check_multiple("hidden_size", width, "num_attention_heads", heads)
    f.equal("head_dim", width // heads)
    return GroupedShape(heads, key_heads, width // heads)


def _read_dense(f: Fields, width: int, epsilon: float) -> int:
    """Width of the MLPs; the older names of other sizes must agree."""
    f.equal("block_dim", width)
    f.equal("conv_dim", width)
    f.equal("conv_dim_out", width)
    f.equal("block_norm_eps", epsilon)
    f.accept("block_use_swiglu", True)
    announced = f.whole("block_ff_dim", f.get("intermediate_size", None))
    f.equal("intermediate_size", announced)
    multiple, factor = f.whole("block_multiple_of", 256), f.number("block_ffn_dim_multiplier", 1.0)
    if not f.flag("block_auto_adjust_ff_dim", True):
        return announced
    inner = factor * int(2 * announced / 3)
    if not 1 <= inner <= LARGEST_WHOLE:
        raise ValueError(
            f"config.json: wanted an MLP width from 1 to {LARGEST_WHOLE}, got {inner}: correct config.json"
        )
    return -(-int(inner) // multiple) * multiple


def _read_sparse(f: Fields) -> SparseShape:
    f.accept("use_expert_bias", True)
    f.accept("norm_topk_prob", True)
    experts, chosen = f.whole("num_experts", most=MOST_EXPERTS), f.whole("num_experts_per_tok")
    if chosen > experts:
        raise ValueError(f"config.json: wanted at most {experts} experts a token, got {chosen}")
    router = BiasedSigmoid(chosen, f.number("routed_scaling_factor", 1.0))
    return SparseShape(f.whole("num_dense_layers", least=0), experts, f.whole("moe_intermediate_size"), router)


def _read_theta(f: Fields) -> float:
    """Base of the rotary frequencies, in a section of its own or at the top."""
    if f.get("rope_parameters", None) is None:
        theta = f.number("rope_theta")
    else:
        rope = Fields(f.section("rope_parameters"), "rope_parameters of config.json")
        rope.accept("rope_type", "default")
        theta = rope.number("rope_theta")
        rope.done()
    f.equal("rope_theta", theta)
    f.equal("theta", theta)
    return theta


def _read_tied(f: Fields) -> bool:
    """Whether the head is the embedding, under either of two names."""
    tied = f.flag("tie_embedding", f.get("tie_word_embeddings", True))
    f.equal("tie_word_embeddings", tied)
    return tied


class ShortConvolution(Divisible):
    """A causal depthwise convolution between two gates."""

    kind = SHORT_CONV.name

    def __init__(self, rngs: nnx.Rngs, width: int, convolution: int, dtype: str, backend: str):
        axes = (None, "convolution_channels")
        self.mixed = Linear(rngs, (width,), (3, width), ("model", None, "convolution_channels"), dtype)
        self.convolution = matrix(rngs, (convolution, width), axes, convolution, "float32")
        self.output = Linear(rngs, (width,), (width,), ("convolution_channels", "model"), dtype)
        self.memory: Memory = StateSpec((ArraySpec("tail", (convolution - 1, width), dtype, axes),))
        self.place = Place(0, 0)
        self.backend = SHORT_CONV.choose(backend, self.memory, dtype)

    def __call__(
        self, x: Float[Array, "T D"], rotary: Rotary | None, cache: Cache, batch: RaggedBatch
    ) -> tuple[Float[Array, "T D"], Cache]:
        (pool,) = cache.slots(self.place)
        layer = self.place.layer
        out, pool = self.division.op(SHORT_CONV, self.backend, {})(
            self.mixed(x), self.convolution[...], pool, layer, batch
        )
        return self.output(out), cache.updated(self.place, (pool,))


class Model(Decoder):
    """The decoder of this family."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: str = "bfloat16", backend: str = "auto"):
        parts = _Parts(config, rngs, dtype, backend)
        super().__init__(
            Embedding(rngs, config.vocabulary, config.width, dtype),
            [parts.layer(index, kind) for index, kind in enumerate(config.kinds)],
            RMSNorm(config.width, config.epsilon),
            None if config.tied else Head(rngs, config.vocabulary, config.width, dtype),
            None,
            tuple(frequencies(config.attention.width, config.rope_theta).tolist()),
        )


class _Parts:
    """Builds the parts of one model."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: str, backend: str):
        self.config, self.rngs, self.dtype = config, rngs, dtype
        self.backend = backend

    def layer(self, index: int, kind: str) -> Layer:
        config = self.config
        mixer: Mixer = self._attention() if kind == FULL else self._convolution()
        norms = RMSNorm(config.width, config.epsilon), RMSNorm(config.width, config.epsilon)
        return Layer(mixer, self._feed_forward(index), *norms)

    def _attention(self) -> GroupedAttention:
        config, shape = self.config, self.config.attention
        norm, scale = NormShape(config.epsilon), shape.width**-0.5
        return GroupedAttention(self.rngs, config.width, shape, norm, True, scale, self.dtype, self.backend)

    def _convolution(self) -> ShortConvolution:
        config = self.config
        return ShortConvolution(self.rngs, config.width, config.convolution, self.dtype, self.backend)

    def _feed_forward(self, index: int) -> nnx.Module:
        config, rngs, dtype, sparse = self.config, self.rngs, self.dtype, self.config.sparse
        if sparse is None or index < sparse.dense_layers:
            return MLP(rngs, config.width, config.dense_width, dtype)
        router = BiasedRouter(rngs, config.width, sparse.experts, sparse.router, dtype)
        experts = Experts(rngs, sparse.experts, config.width, sparse.width, dtype, backend=self.backend)
        return RoutedExperts(router, experts)


# ------------------------------------------------------------------------------------------------------------- weights


def weight_table(config: Config) -> WeightTable:
    """Our parameters and the published tensors; `embedding_norm` is the norm before the head in spite of its name."""
    rows = trunk_rows("model.embed_tokens.weight", "model.embedding_norm.weight", config.tied)
    for index, kind in enumerate(config.kinds):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        rows += [
            weight(f"{ours}.norm.scale", f"{theirs}.operator_norm.weight", "d -> d"),
            weight(f"{ours}.feed_forward_norm.scale", f"{theirs}.ffn_norm.weight", "d -> d"),
            *(_attention_rows(f"{ours}.mixer", theirs) if kind == FULL else _convolution_rows(f"{ours}.mixer", theirs)),
        ]
        rows += _feed_forward_rows(config.sparse, index, f"{ours}.feed_forward", f"{theirs}.feed_forward")
    return WeightTable(tuple(rows), canonical)


def canonical(name: str) -> str | None:
    """Names need no change."""
    return name


def _attention_rows(ours: str, theirs: str) -> list[Weight]:
    theirs = f"{theirs}.self_attn"
    return [
        weight(f"{ours}.query.kernel", f"{theirs}.q_proj.weight", "(h k) d -> d h k"),
        weight(f"{ours}.key.kernel", f"{theirs}.k_proj.weight", "(g k) d -> d g k"),
        weight(f"{ours}.value.kernel", f"{theirs}.v_proj.weight", "(g k) d -> d g k"),
        weight(f"{ours}.query_norm.scale", f"{theirs}.q_layernorm.weight", "k -> k"),
        weight(f"{ours}.key_norm.scale", f"{theirs}.k_layernorm.weight", "k -> k"),
        weight(f"{ours}.output.kernel", f"{theirs}.out_proj.weight", "d v -> v d"),
    ]


def _convolution_rows(ours: str, theirs: str) -> list[Weight]:
    theirs = f"{theirs}.conv"
    return [
        weight(f"{ours}.mixed.kernel", f"{theirs}.in_proj.weight", "(c v) d -> d c v"),
        weight(f"{ours}.convolution", f"{theirs}.conv.weight", "c 1 w -> w c"),
        weight(f"{ours}.output.kernel", f"{theirs}.out_proj.weight", "d v -> v d"),
    ]


def _feed_forward_rows(sparse: SparseShape | None, index: int, ours: str, theirs: str) -> list[Weight]:
    if sparse is None or index < sparse.dense_layers:
        return mlp_rows(ours, theirs, NUMBERED)
    return [
        weight(f"{ours}.router.scores.kernel", f"{theirs}.gate.weight", "e d -> d e"),
        weight(f"{ours}.router.bias", f"{theirs}.expert_bias", "e -> e"),
        *expert_rows(f"{ours}.experts", f"{theirs}.experts", sparse.experts, NUMBERED),
    ]
