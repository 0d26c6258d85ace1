"""Nemotron-H and Nemotron-3: one part per layer, which is Mamba2, attention without positions, an MLP or experts.

MLPs and experts have no gate: squared ReLU between two products. In the larger releases the routed experts work in a
narrower latent space, while the router and the shared expert see the full width. One draft layer in some releases.
Definition: the `nemotron_h` classes of transformers. They bound the step of a prefill from below by `time_step_min` but
not that of a single token; here, as in the open serving engines, `time_step_limit` holds for both. The draft layer
follows those engines, since the classes leave it out.
"""

from dataclasses import dataclass
from typing import Any

from flax import nnx
from jaxtyping import Array

from kernels_pallas.op import Cache, RaggedBatch
from kernels_pallas.rotary import Rotary
from models.attention import GroupedAttention, GroupedShape
from models.decoder import Decoder, Draft, Layer, Mixer
from models.hf_fields import MOST_EXPERTS, MOST_HEADS, MOST_LAYERS, Fields
from models.layers import Embedding, Head, Linear, RMSNorm
from models.mamba2 import MAMBA2_IGNORED, Mamba2Mixer, Mamba2Shape, mamba2_rows, read_step_limit
from models.moe import BiasedRouter, GroupedSigmoid, MoE
from models.squared_relu import (
    LatentExperts,
    SquaredReLU,
    SquaredReLUExperts,
    squared_relu_expert_rows,
    squared_relu_rows,
)
from models.weights import Weight, WeightTable, trunk_rows, weight

ARCHITECTURES = ("NemotronHForCausalLM",)

MAMBA, FULL, DENSE, SPARSE = "M", "*", "-", "E"
WORDS = {
    "mamba": MAMBA,
    "linear_attention": MAMBA,
    "attention": FULL,
    "full_attention": FULL,
    "mlp": DENSE,
    "moe": SPARSE,
}
DRAFT_PATTERN = FULL + SPARSE

# Positions that nothing uses, initialisation, and choices among equal algorithms. The pattern alone counts the layers.
IGNORED_FIELDS = MAMBA2_IGNORED + tuple(
    (
        "rope_theta partial_rotary_factor expand chunk_size num_logits_to_keep use_mamba_kernels "
        "rescale_prenorm_residual moe_shared_expert_overlap"
    ).split()
)
SPARSE_FIELDS = (
    "n_routed_experts num_experts_per_tok n_group topk_group norm_topk_prob routed_scaling_factor n_shared_experts "
    "moe_intermediate_size moe_shared_expert_intermediate_size moe_latent_size"
).split()


@dataclass(frozen=True)
class SparseShape:
    """Sizes of the experts; `latent` is the width they work in, None for the model's."""

    experts: int
    width: int
    latent: int | None
    shared_width: int
    router: GroupedSigmoid


@dataclass(frozen=True)
class Config:
    """What the network computes, read from a published config. `kinds` has one character per layer."""

    vocabulary: int
    width: int
    kinds: str
    mamba: Mamba2Shape
    attention: GroupedShape
    dense_width: int
    sparse: SparseShape | None
    epsilon: float
    tied: bool
    draft: bool
    max_positions: int

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "Config":
        """Read a config.json. Raises ValueError for a missing or unknown field, or a value that is not implemented."""
        f = Fields(hf, "config.json of NemotronHForCausalLM")
        _refuse_variants(f)
        f.ignore(IGNORED_FIELDS)
        f.ignore(SPARSE_FIELDS)
        kinds = _read_kinds(f, "hybrid_override_pattern", "layers_block_type")
        f.whole("num_hidden_layers", len(kinds), most=MOST_LAYERS)
        draft = _read_draft(f)
        head_width = f.whole("attention_head_dim" if "attention_head_dim" in hf else "head_dim")
        config = cls(
            vocabulary=f.whole("vocab_size"),
            width=f.whole("hidden_size"),
            kinds=kinds,
            mamba=_read_mamba(f),
            attention=GroupedShape(
                f.whole("num_attention_heads", most=MOST_HEADS),
                f.whole("num_key_value_heads", most=MOST_HEADS),
                head_width,
            ),
            dense_width=f.whole("intermediate_size"),
            sparse=_read_sparse(f) if draft or SPARSE in kinds else None,
            epsilon=_read_epsilon(f),
            tied=f.flag("tie_word_embeddings", False),
            draft=draft,
            max_positions=f.whole("max_position_embeddings"),
        )
        f.equal("head_dim", head_width)
        f.done()
        return config


def sparse_shape(config: Config) -> SparseShape:
    """The sizes of the experts. Raises ValueError where a layer of experts was put into a config without them."""
    if config.sparse is None:
        raise ValueError("wanted sizes of the experts for a layer of experts, got none: read the config by from_hf")
    return config.sparse


def _refuse_variants(f: Fields) -> None:
    for name in ("use_bias", "mlp_bias", "mamba_proj_bias", "attention_bias", "residual_in_fp32"):
        f.accept(name, False)
    f.accept("use_conv_bias", True)
    f.accept("mamba_hidden_act", "silu")
    f.accept("mlp_hidden_act", "relu2")
    f.accept("mamba_ssm_cache_dtype", "float32")
    f.accept("sliding_window", None)


def _read_kinds(f: Fields, characters: str, words: str) -> str:
    """One character per layer, from the field of characters or the field of words."""
    pattern, listed = f.get(characters, None), f.get(words, None)
    if pattern is None and listed is not None:
        pattern = "".join(WORDS[word] for word in f.words(words, WORDS))
    fits = isinstance(pattern, str) and 1 <= len(pattern) <= MOST_LAYERS
    if not fits or not set(pattern) <= set(WORDS.values()):
        raise ValueError(
            f"config.json: wanted {characters} of 1 to {MOST_LAYERS} characters M * - E, or {words} of the words "
            f"{', '.join(WORDS)}; got {pattern!r} and {listed!r}"
        )
    return pattern


def _read_draft(f: Fields) -> bool:
    f.accept("num_nextn_predict_layers", 0, 1)
    f.ignore(["mtp_hybrid_override_pattern", "mtp_layers_block_type"])
    if f.get("num_nextn_predict_layers", 0) == 0:
        return False
    pattern = _read_kinds(f, "mtp_hybrid_override_pattern", "mtp_layers_block_type")
    if pattern != DRAFT_PATTERN:
        raise ValueError(f"config.json: wanted the draft pattern {DRAFT_PATTERN}, got {pattern}: not implemented")
    return True


def _read_mamba(f: Fields) -> Mamba2Shape:
    return Mamba2Shape(
        f.whole("mamba_num_heads", most=MOST_HEADS),
        f.whole("mamba_head_dim"),
        f.whole("ssm_state_size"),
        f.whole("n_groups"),
        f.whole("conv_kernel", least=2),
        read_step_limit(f),
    )


def _read_sparse(f: Fields) -> SparseShape:
    f.accept("n_shared_experts", 1)
    experts = f.whole("n_routed_experts", most=MOST_EXPERTS)
    router = GroupedSigmoid(
        f.whole("num_experts_per_tok"),
        f.whole("n_group"),
        f.whole("topk_group"),
        f.flag("norm_topk_prob"),
        f.number("routed_scaling_factor"),
    )
    router.check(experts)
    return SparseShape(
        experts,
        f.whole("moe_intermediate_size"),
        f.whole_or_none("moe_latent_size"),
        f.whole("moe_shared_expert_intermediate_size"),
        router,
    )


def _read_epsilon(f: Fields) -> float:
    names = ("layer_norm_epsilon", "norm_eps", "rms_norm_eps")
    given = [name for name in names if f.get(name, None) is not None]
    epsilon = f.number(given[0] if given else names[0])
    for name in given:
        f.equal(name, epsilon)
    return epsilon


# -------------------------------------------------------------------------------------------------------------- layers


class MixerLayer(nnx.Module):
    """`x + mixer(norm(x))`."""

    def __init__(self, mixer: Mixer, norm: RMSNorm):
        self.norm = norm
        self.mixer = mixer

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """The one mixer."""
        return (self.mixer,)

    def __call__(self, x: Array, rotary: Rotary | None, cache: Cache, batch: RaggedBatch) -> tuple[Array, Cache]:
        mixed, cache = self.mixer(self.norm(x), rotary, cache, batch)
        return x + mixed, cache


class FeedForwardLayer(nnx.Module):
    """`x + feed_forward(norm(x))`."""

    def __init__(self, feed_forward: nnx.Module, norm: RMSNorm):
        self.norm = norm
        self.feed_forward = feed_forward

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """None: every token is on its own."""
        return ()

    def __call__(self, x: Array, rotary: Rotary | None, cache: Cache, batch: RaggedBatch) -> tuple[Array, Cache]:
        return x + self.feed_forward(self.norm(x)), cache


class Model(Decoder):
    """The decoder of this family."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: str = "bfloat16", backend: str = "auto"):
        parts = _Parts(config, rngs, dtype, backend)
        super().__init__(
            Embedding(rngs, config.vocabulary, config.width, dtype),
            [parts.layer(kind) for kind in config.kinds],
            parts.norm(),
            None if config.tied else Head(rngs, config.vocabulary, config.width, dtype),
            parts.draft() if config.draft else None,
            None,
        )


class _Parts:
    """Builds the parts of one model."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: str, backend: str):
        self.config, self.rngs, self.dtype = config, rngs, dtype
        self.backend = backend

    def norm(self) -> RMSNorm:
        return RMSNorm(self.config.width, self.config.epsilon)

    def layer(self, kind: str) -> MixerLayer | FeedForwardLayer:
        if kind == MAMBA:
            return MixerLayer(self._mamba(), self.norm())
        if kind == FULL:
            return MixerLayer(self._attention(), self.norm())
        return FeedForwardLayer(self._dense() if kind == DENSE else self._sparse(), self.norm())

    def draft(self) -> Draft:
        width = self.config.width
        project = Linear(self.rngs, (2 * width,), (width,), (None, "model"), self.dtype)
        layer = Layer(self._attention(), self._sparse(), self.norm(), self.norm())
        return Draft(self.norm(), self.norm(), project, layer, self.norm())

    def _mamba(self) -> Mamba2Mixer:
        config = self.config
        return Mamba2Mixer(self.rngs, config.width, config.mamba, config.epsilon, self.dtype, self.backend)

    def _attention(self) -> GroupedAttention:
        width, shape = self.config.width, self.config.attention
        return GroupedAttention(self.rngs, width, shape, None, False, shape.width**-0.5, self.dtype, self.backend)

    def _dense(self) -> SquaredReLU:
        return SquaredReLU(self.rngs, self.config.width, self.config.dense_width, self.dtype)

    def _sparse(self) -> MoE:
        width, sparse, rngs, dtype = self.config.width, sparse_shape(self.config), self.rngs, self.dtype
        router = BiasedRouter(rngs, width, sparse.experts, sparse.router, dtype)
        experts = (
            SquaredReLUExperts(rngs, sparse.experts, width, sparse.width, dtype, self.backend)
            if sparse.latent is None
            else LatentExperts(rngs, sparse.experts, width, sparse.latent, sparse.width, dtype, self.backend)
        )
        return MoE(router, experts, SquaredReLU(rngs, width, sparse.shared_width, dtype))


# ------------------------------------------------------------------------------------------------------------- weights


def weight_table(config: Config) -> WeightTable:
    """Our parameters and the published tensors."""
    rows = trunk_rows("backbone.embeddings.weight", "backbone.norm_f.weight", config.tied)
    for index, kind in enumerate(config.kinds):
        ours, theirs = f"layers.{index}", f"backbone.layers.{index}"
        part = "mixer" if kind in (MAMBA, FULL) else "feed_forward"
        rows.append(weight(f"{ours}.norm.scale", f"{theirs}.norm.weight", "d -> d"))
        rows += _part_rows(config, kind, f"{ours}.{part}", f"{theirs}.mixer")
    if config.draft:
        rows += _draft_rows(config)
    return WeightTable(tuple(rows), canonical)


def canonical(name: str) -> str | None:
    """Names need no change."""
    return name


def _part_rows(config: Config, kind: str, ours: str, theirs: str) -> list[Weight]:
    if kind == MAMBA:
        return mamba2_rows(config.mamba, ours, theirs)
    if kind == FULL:
        return attention_rows(ours, theirs)
    return squared_relu_rows(ours, theirs) if kind == DENSE else _sparse_rows(sparse_shape(config), ours, theirs)


def attention_rows(ours: str, theirs: str) -> list[Weight]:
    """Rows of grouped-query attention without norms."""
    return [
        weight(f"{ours}.query.kernel", f"{theirs}.q_proj.weight", "(h k) d -> d h k"),
        weight(f"{ours}.key.kernel", f"{theirs}.k_proj.weight", "(g k) d -> d g k"),
        weight(f"{ours}.value.kernel", f"{theirs}.v_proj.weight", "(g k) d -> d g k"),
        weight(f"{ours}.output.kernel", f"{theirs}.o_proj.weight", "d v -> v d"),
    ]


def _sparse_rows(sparse: SparseShape, ours: str, theirs: str) -> list[Weight]:
    rows = [
        weight(f"{ours}.router.scores.kernel", f"{theirs}.gate.weight", "e d -> d e"),
        weight(f"{ours}.router.bias", f"{theirs}.gate.e_score_correction_bias", "e -> e"),
        *squared_relu_rows(f"{ours}.shared", f"{theirs}.shared_experts"),
    ]
    if sparse.latent is None:
        return rows + squared_relu_expert_rows(sparse.experts, f"{ours}.experts", f"{theirs}.experts")
    return [
        *rows,
        weight(f"{ours}.experts.into.kernel", f"{theirs}.fc1_latent_proj.weight", "z d -> d z"),
        *squared_relu_expert_rows(sparse.experts, f"{ours}.experts.experts", f"{theirs}.experts"),
        weight(f"{ours}.experts.out_of.kernel", f"{theirs}.fc2_latent_proj.weight", "d z -> z d"),
    ]


def _draft_rows(config: Config) -> list[Weight]:
    first, last = "mtp.layers.0", "mtp.layers.1"
    return [
        weight("draft.embedding_norm.scale", f"{first}.enorm.weight", "d -> d"),
        weight("draft.hidden_norm.scale", f"{first}.hnorm.weight", "d -> d"),
        weight("draft.project.kernel", f"{first}.eh_proj.weight", "d i -> i d"),
        weight("draft.layer.norm.scale", f"{first}.norm.weight", "d -> d"),
        *attention_rows("draft.layer.mixer", f"{first}.mixer"),
        weight("draft.layer.feed_forward_norm.scale", f"{last}.norm.weight", "d -> d"),
        *_sparse_rows(sparse_shape(config), "draft.layer.feed_forward", f"{last}.mixer"),
        weight("draft.norm.scale", f"{last}.final_layernorm.weight", "d -> d"),
    ]
