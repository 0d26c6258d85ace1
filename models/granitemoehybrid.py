"""Granite 4: Mamba2 or attention, then routed experts with a shared one, or the shared MLP alone.

Constants scale the embedding, what each part adds to the residual stream, the attention's scores and, as a divisor, the
logits. Attention has no positions in the hybrid releases. Definition: the `granitemoehybrid` classes of transformers.
"""

from dataclasses import dataclass
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas.op import Cache, RaggedBatch
from kernels_pallas.rotary import Rotary, frequencies
from models.attention import GroupedAttention, GroupedShape
from models.decoder import Decoder, Mixer
from models.hf_fields import MOST_EXPERTS, MOST_HEADS, MOST_LAYERS, Fields, check_multiple
from models.layers import MLP, Embedding, Head, RMSNorm
from models.mamba2 import MAMBA2_IGNORED, Mamba2Mixer, Mamba2Shape, mamba2_rows, read_mamba2
from models.moe import Experts, MoE, PlainRouter, SharedExpert, SoftmaxTopK
from models.nemotron_h import attention_rows
from models.weights import Weight, WeightTable, trunk_rows, weight

ARCHITECTURES = ("GraniteMoeHybridForCausalLM",)

# Choices among equal algorithms, and how weights are first drawn.
IGNORED_FIELDS = (*MAMBA2_IGNORED, "mamba_chunk_size", "init_method", "logits_to_keep", "num_logits_to_keep")
MAMBA, FULL = "mamba", "attention"
WORDS = {"mamba": MAMBA, "linear_attention": MAMBA, "attention": FULL, "full_attention": FULL}


@dataclass(frozen=True)
class SparseShape:
    """Sizes of the routed experts."""

    experts: int
    chosen: int
    width: int


@dataclass(frozen=True)
class Config:
    """What the network computes, read from a published config. `rope_theta` is None for a model without positions."""

    vocabulary: int
    width: int
    kinds: tuple[str, ...]
    mamba: Mamba2Shape
    attention: GroupedShape
    attention_scale: float
    shared_width: int
    sparse: SparseShape | None
    embedding_factor: float
    residual_factor: float
    logits_divisor: float
    epsilon: float
    rope_theta: float | None
    tied: bool
    max_positions: int

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "Config":
        """Read a config.json. Raises ValueError for a missing or unknown field, or a value that is not implemented."""
        f = Fields(hf, "config.json of GraniteMoeHybridForCausalLM")
        _refuse_variants(f)
        f.ignore(IGNORED_FIELDS)
        width, heads = f.whole("hidden_size"), f.whole("num_attention_heads", most=MOST_HEADS)
        check_multiple("hidden_size", width, "num_attention_heads", heads)
        rotated = f.get("position_embedding_type", None) == "rope"
        theta = f.number("rope_theta", 10000.0)
        config = cls(
            vocabulary=f.whole("vocab_size"),
            width=width,
            kinds=_read_kinds(f),
            mamba=read_mamba2(f, f.whole("mamba_expand") * width, True, False),
            attention=GroupedShape(heads, f.whole("num_key_value_heads", most=MOST_HEADS), width // heads),
            attention_scale=f.number("attention_multiplier"),
            shared_width=f.whole("shared_intermediate_size"),
            sparse=_read_sparse(f),
            embedding_factor=f.number("embedding_multiplier"),
            residual_factor=f.number("residual_multiplier"),
            logits_divisor=f.number("logits_scaling"),
            epsilon=f.number("rms_norm_eps"),
            rope_theta=theta if rotated else None,
            tied=f.flag("tie_word_embeddings", False),
            max_positions=f.whole("max_position_embeddings"),
        )
        f.equal("head_dim", config.attention.width)
        f.done()
        return config


def _refuse_variants(f: Fields) -> None:
    f.accept("attention_bias", False)
    f.accept("mamba_proj_bias", False)
    f.accept("mamba_conv_bias", True)
    f.accept("hidden_act", "silu")
    f.accept("normalization_function", "rmsnorm")
    f.accept("position_embedding_type", None, "nope", "rope")
    f.accept("rope_scaling", None)


def _read_kinds(f: Fields) -> tuple[str, ...]:
    layers = f.whole("num_hidden_layers", most=MOST_LAYERS)
    return tuple(WORDS[word] for word in f.words("layer_types", WORDS, layers))


def _read_sparse(f: Fields) -> SparseShape | None:
    f.ignore(["num_experts_per_tok", "intermediate_size"])
    experts = f.whole_or_none("num_local_experts", most=MOST_EXPERTS)
    if experts is None:
        return None
    chosen = f.whole("num_experts_per_tok")
    if chosen > experts:
        raise ValueError(f"config.json: wanted num_experts_per_tok of {experts} experts, got {chosen}")
    return SparseShape(experts, chosen, f.whole("intermediate_size"))


# -------------------------------------------------------------------------------------------------------------- layers


class ScaledLayer(nnx.Module):
    """`x + factor * mixer(norm(x))`, then `x + factor * feed_forward(norm(x))`."""

    def __init__(
        self, mixer: Mixer, feed_forward: nnx.Module, norm: RMSNorm, feed_forward_norm: RMSNorm, factor: float
    ):
        self.norm = norm
        self.mixer = mixer
        self.feed_forward_norm = feed_forward_norm
        self.feed_forward = feed_forward
        self.factor = factor

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """The one mixer."""
        return (self.mixer,)

    def __call__(self, x: Array, rotary: Rotary | None, cache: Cache, batch: RaggedBatch) -> tuple[Array, Cache]:
        mixed, cache = self.mixer(self.norm(x), rotary, cache, batch)
        x = x + mixed * self.factor
        return x + self.feed_forward(self.feed_forward_norm(x)) * self.factor, cache


class Model(Decoder):
    """The decoder of this family."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: str = "bfloat16", backend: str = "auto"):
        parts = _Parts(config, rngs, dtype, backend)
        theta = config.rope_theta
        super().__init__(
            Embedding(rngs, config.vocabulary, config.width, dtype, config.embedding_factor),
            [parts.layer(kind) for kind in config.kinds],
            parts.norm(),
            None if config.tied else Head(rngs, config.vocabulary, config.width, dtype),
            None,
            None if theta is None else tuple(frequencies(config.attention.width, theta).tolist()),
        )
        self.logits_divisor = config.logits_divisor

    def logits(self, hidden: Float[Array, "B D"]) -> Float[Array, "B Y"]:
        """Scores of the next token from hidden states after the final norm, float32."""
        return super().logits(hidden) / self.logits_divisor


class _Parts:
    """Builds the parts of one model."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: str, backend: str):
        self.config, self.rngs, self.dtype = config, rngs, dtype
        self.backend = backend

    def norm(self) -> RMSNorm:
        return RMSNorm(self.config.width, self.config.epsilon)

    def layer(self, kind: str) -> ScaledLayer:
        mixer = self._mamba() if kind == MAMBA else self._attention()
        return ScaledLayer(mixer, self._feed_forward(), self.norm(), self.norm(), self.config.residual_factor)

    def _mamba(self) -> Mamba2Mixer:
        config = self.config
        return Mamba2Mixer(self.rngs, config.width, config.mamba, config.epsilon, self.dtype, self.backend)

    def _attention(self) -> GroupedAttention:
        config, rotated = self.config, self.config.rope_theta is not None
        scale = config.attention_scale
        return GroupedAttention(
            self.rngs, config.width, config.attention, None, rotated, scale, self.dtype, self.backend
        )

    def _feed_forward(self) -> nnx.Module:
        width, sparse, rngs, dtype = self.config.width, self.config.sparse, self.rngs, self.dtype
        if sparse is None:
            return MLP(rngs, width, self.config.shared_width, dtype)
        # Softmax over the chosen experts alone is softmax over all of them, divided by what the chosen ones get.
        router = PlainRouter(rngs, width, sparse.experts, SoftmaxTopK(sparse.chosen), dtype)
        experts = Experts(rngs, sparse.experts, width, sparse.width, dtype, backend=self.backend)
        return MoE(router, experts, SharedExpert(rngs, width, self.config.shared_width, dtype))


# ------------------------------------------------------------------------------------------------------------- weights


def weight_table(config: Config) -> WeightTable:
    """Our parameters and the published tensors."""
    rows = trunk_rows("model.embed_tokens.weight", "model.norm.weight", config.tied)
    for index, kind in enumerate(config.kinds):
        rows += _layer_rows(config, kind, f"layers.{index}", f"model.layers.{index}")
    return WeightTable(tuple(rows), canonical)


def canonical(name: str) -> str | None:
    """Names need no change."""
    return name


def _layer_rows(config: Config, kind: str, ours: str, theirs: str) -> list[Weight]:
    mixer = (
        mamba2_rows(config.mamba, f"{ours}.mixer", f"{theirs}.mamba")
        if kind == MAMBA
        else attention_rows(f"{ours}.mixer", f"{theirs}.self_attn")
    )
    feed_forward = _shared_rows if config.sparse is None else _moe_rows
    return [
        weight(f"{ours}.norm.scale", f"{theirs}.input_layernorm.weight", "d -> d"),
        weight(f"{ours}.feed_forward_norm.scale", f"{theirs}.post_attention_layernorm.weight", "d -> d"),
        *mixer,
        *feed_forward(f"{ours}.feed_forward", theirs),
    ]


def _shared_rows(ours: str, theirs: str) -> list[Weight]:
    return [
        weight(f"{ours}.gate_up.kernel", f"{theirs}.shared_mlp.input_linear.weight", "(c f) d -> d c f"),
        weight(f"{ours}.down.kernel", f"{theirs}.shared_mlp.output_linear.weight", "d f -> f d"),
    ]


def _moe_rows(ours: str, theirs: str) -> list[Weight]:
    moe = f"{theirs}.block_sparse_moe"
    return [
        weight(f"{ours}.router.scores.kernel", f"{moe}.router.layer.weight", "e d -> d e"),
        weight(f"{ours}.experts.gate_up", f"{moe}.input_linear.weight", "e (c f) d -> e d c f"),
        weight(f"{ours}.experts.down", f"{moe}.output_linear.weight", "e d f -> e f d"),
        *_shared_rows(f"{ours}.shared.mlp", theirs),
    ]
