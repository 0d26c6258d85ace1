"""Qwen3-Next: gated delta rule with gated attention, a mixture of experts in every layer.

Same layers as Qwen3.5; the projections of the delta rule are published as they lie in the model. Published checkpoints
hold a draft layer (`mtp.*`) that their config does not announce: `complete` reads it off the tensors. Definition: the
`qwen3_next` classes of transformers, which leave the draft layer out; that follows the open serving engines.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from flax import nnx

from kernels_pallas.rotary import frequencies
from models.attention import GatedGroupedAttention, GroupedShape, NormShape
from models.decoder import Decoder, Draft, Layer, Mixer
from models.delta import DeltaAttention, DeltaShape, delta_rows, read_delta
from models.hf_fields import MOST_HEADS, MOST_LAYERS, Fields
from models.layers import Embedding, Head, Linear, RMSNorm
from models.moe import Experts, GatedSharedExpert, MoE, PlainRouter, SoftmaxTopK
from models.qwen3_5 import FULL, LINEAR, SparseShape, attention_rows, draft_rows, moe_rows, read_sparse
from models.weights import Weight, WeightTable, trunk_rows, weight

ARCHITECTURES = ("Qwen3NextForCausalLM",)
DRAFT_FIELD = "num_nextn_predict_layers"


@dataclass(frozen=True)
class Config:
    """What the network computes, read from a published config."""

    vocabulary: int
    width: int
    kinds: tuple[str, ...]
    attention: GroupedShape
    delta: DeltaShape
    sparse: SparseShape
    epsilon: float
    rope_theta: float
    rotary_width: int
    tied: bool
    draft: bool
    max_positions: int

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "Config":
        """Read a config.json. Raises ValueError for a missing or unknown field, or a value that is not implemented."""
        f = Fields(hf, "config.json of Qwen3NextForCausalLM")
        _refuse_variants(f)
        f.ignore(["intermediate_size"])  # of dense layers, which are refused
        attention = GroupedShape(
            f.whole("num_attention_heads", most=MOST_HEADS),
            f.whole("num_key_value_heads", most=MOST_HEADS),
            f.whole("head_dim"),
        )
        config = cls(
            vocabulary=f.whole("vocab_size"),
            width=f.whole("hidden_size"),
            kinds=_read_kinds(f),
            attention=attention,
            delta=read_delta(f),
            sparse=read_sparse(f),
            epsilon=f.number("rms_norm_eps"),
            rope_theta=f.number("rope_theta"),
            rotary_width=_read_rotary_width(f, attention.width),
            tied=f.flag("tie_word_embeddings", False),
            draft=f.whole(DRAFT_FIELD, 0, least=0) == 1,
            max_positions=f.whole("max_position_embeddings"),
        )
        f.done()
        return config


def _refuse_variants(f: Fields) -> None:
    f.accept("hidden_act", "silu")
    f.accept("attention_bias", False)
    f.accept("mlp_only_layers", [])
    f.accept("decoder_sparse_step", 1)
    f.accept("norm_topk_prob", True)
    f.accept("rope_scaling", None)
    f.accept("use_sliding_window", False)
    f.accept("sliding_window", None)
    f.accept(DRAFT_FIELD, 0, 1)


def _read_kinds(f: Fields) -> tuple[str, ...]:
    layers = f.whole("num_hidden_layers", most=MOST_LAYERS)
    f.ignore(["full_attention_interval"])  # a list of the layers decides, where there is one
    if f.get("layer_types", None) is None:
        interval = f.whole("full_attention_interval")
        return tuple(FULL if (index + 1) % interval == 0 else LINEAR for index in range(layers))
    return f.words("layer_types", (LINEAR, FULL), layers)


def _read_rotary_width(f: Fields, head_width: int) -> int:
    rotated = head_width * f.number("partial_rotary_factor")
    if rotated > head_width or rotated != int(rotated) or int(rotated) % 2:
        raise ValueError(f"config.json: wanted an even number of rotated channels, got {rotated} of {head_width}")
    return int(rotated)


def complete(hf: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
    """The config with the draft layer that is among the tensors, where it says nothing of one."""
    unannounced = DRAFT_FIELD not in hf and any(name.startswith("mtp.") for name in tensors)
    return hf | {DRAFT_FIELD: 1} if unannounced else hf


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
            tuple(frequencies(config.rotary_width, config.rope_theta).tolist()),
        )


class _Parts:
    """Builds the parts of one model."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: str, backend: str):
        self.config, self.rngs, self.dtype = config, rngs, dtype
        self.backend = backend

    def norm(self) -> RMSNorm:
        return RMSNorm(self.config.width, self.config.epsilon, offset=1.0)

    def layer(self, kind: str) -> Layer:
        mixer: Mixer = self._attention() if kind == FULL else self._delta()
        return Layer(mixer, self._moe(), self.norm(), self.norm())

    def draft(self) -> Draft:
        width = self.config.width
        project = Linear(self.rngs, (2 * width,), (width,), (None, "model"), self.dtype)
        return Draft(self.norm(), self.norm(), project, self.layer(FULL), self.norm())

    def _attention(self) -> GatedGroupedAttention:
        config = self.config
        norm, scale = NormShape(config.epsilon, offset=1.0), config.attention.width**-0.5
        return GatedGroupedAttention(self.rngs, config.width, config.attention, norm, scale, self.dtype, self.backend)

    def _delta(self) -> DeltaAttention:
        config = self.config
        return DeltaAttention(self.rngs, config.width, config.delta, config.epsilon, self.dtype, self.backend)

    def _moe(self) -> MoE:
        width, rngs, dtype, sparse = self.config.width, self.rngs, self.dtype, self.config.sparse
        router = PlainRouter(rngs, width, sparse.experts, SoftmaxTopK(sparse.chosen), dtype)
        experts = Experts(rngs, sparse.experts, width, sparse.width, dtype, backend=self.backend)
        return MoE(router, experts, GatedSharedExpert(rngs, width, sparse.shared_width, dtype))


# ------------------------------------------------------------------------------------------------------------- weights


def weight_table(config: Config) -> WeightTable:
    """Our parameters and the published tensors."""
    rows = trunk_rows("model.embed_tokens.weight", "model.norm.weight", config.tied)
    for index, kind in enumerate(config.kinds):
        rows += _layer_rows(config, kind, f"layers.{index}", f"model.layers.{index}")
    if config.draft:
        rows += draft_rows(_layer_rows(config, FULL, "draft.layer", "mtp.layers.0"))
    return WeightTable(tuple(rows), _own_name if config.draft else _without_draft)


def _own_name(name: str) -> str | None:
    return name


def _without_draft(name: str) -> str | None:
    return None if name.startswith("mtp.") else name


def _layer_rows(config: Config, kind: str, ours: str, theirs: str) -> list[Weight]:
    mixer = f"{ours}.mixer"
    return [
        weight(f"{ours}.norm.scale", f"{theirs}.input_layernorm.weight", "d -> d"),
        weight(f"{ours}.feed_forward_norm.scale", f"{theirs}.post_attention_layernorm.weight", "d -> d"),
        *(attention_rows(mixer, theirs) if kind == FULL else _delta_rows(config.delta, mixer, theirs)),
        *moe_rows(config.sparse, f"{ours}.feed_forward", f"{theirs}.mlp"),
    ]


def _delta_rows(shape: DeltaShape, ours: str, theirs: str) -> list[Weight]:
    theirs = f"{theirs}.linear_attn"
    return [
        weight(f"{ours}.projection.kernel", f"{theirs}.in_proj_qkvz.weight", "(g p) d -> d g p"),
        weight(f"{ours}.gates.kernel", f"{theirs}.in_proj_ba.weight", "(g c r) d -> d g c r"),
        *delta_rows(shape, ours, theirs),
    ]
