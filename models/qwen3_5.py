"""Qwen3.5 and Qwen3.6 language models, dense and mixture of experts: gated delta rule with gated attention.

The checkpoints may hold a vision tower, which is left out: text only. For text the three position axes of the
multimodal rotary embedding are equal, so it is the plain one. Definition: the `qwen3_5` and `qwen3_5_moe` classes of
transformers; the draft layer follows the open serving engines, since those classes leave it out.
"""

from dataclasses import dataclass
from typing import Any

from flax import nnx

from kernels_pallas.rotary import frequencies
from models.attention import GatedGroupedAttention, GroupedShape, NormShape
from models.decoder import Decoder, Draft, Layer
from models.delta import DeltaAttention, DeltaShape, delta_rows, read_delta
from models.hf_fields import MOST_EXPERTS, MOST_HEADS, MOST_LAYERS, Fields
from models.layers import MLP, Embedding, Head, Linear, RMSNorm
from models.moe import Experts, GatedSharedExpert, MoE, PlainRouter, SoftmaxTopK
from models.weights import Source, Weight, WeightTable, expert_rows, mlp_rows, trunk_rows, weight

DENSE = ("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM")
SPARSE = ("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM")
ARCHITECTURES = DENSE + SPARSE

OUTER_FIELDS = (
    "image_token_id video_token_id vision_start_token_id vision_end_token_id vision_config text_config "
    "language_model_only"
).split()
LINEAR, FULL = "linear_attention", "full_attention"


@dataclass(frozen=True)
class SparseShape:
    """Sizes of the mixture of experts."""

    experts: int
    chosen: int
    width: int
    shared_width: int


@dataclass(frozen=True)
class Config:
    """What the network computes, read from a published config. `sparse` is None for a dense model."""

    vocabulary: int
    width: int
    kinds: tuple[str, ...]
    attention: GroupedShape
    delta: DeltaShape
    dense_width: int
    sparse: SparseShape | None
    epsilon: float
    rope_theta: float
    rotary_width: int
    tied: bool
    draft: bool
    max_positions: int

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "Config":
        """Read a config.json. Raises ValueError for a missing or unknown field, or a value that is not implemented."""
        architecture = hf["architectures"][0]
        f = Fields(_text_fields(hf, architecture), f"config.json of {architecture}")
        _refuse_variants(f)
        attention = GroupedShape(
            f.whole("num_attention_heads", most=MOST_HEADS),
            f.whole("num_key_value_heads", most=MOST_HEADS),
            f.whole("head_dim"),
        )
        theta, rotary_width = _read_rope(f, attention.width)
        sparse = architecture in SPARSE
        config = cls(
            vocabulary=f.whole("vocab_size"),
            width=f.whole("hidden_size"),
            kinds=_read_kinds(f),
            attention=attention,
            delta=read_delta(f),
            dense_width=0 if sparse else f.whole("intermediate_size"),
            sparse=read_sparse(f) if sparse else None,
            epsilon=f.number("rms_norm_eps"),
            rope_theta=theta,
            rotary_width=rotary_width,
            tied=f.flag("tie_word_embeddings", False),
            draft=f.whole("mtp_num_hidden_layers", 0, least=0) == 1,
            max_positions=f.whole("max_position_embeddings"),
        )
        if sparse:
            f.ignore(["intermediate_size"])
        f.done()
        return config


def _text_fields(hf: dict[str, Any], architecture: str) -> dict[str, Any]:
    """The language model's fields: the `text_config` of a multimodal config, or the config itself."""
    if "text_config" not in hf:
        return hf
    outer = Fields(hf, f"config.json of {architecture}")
    text = outer.section("text_config")
    tied = outer.flag("tie_word_embeddings", text.get("tie_word_embeddings", False))
    outer.ignore(OUTER_FIELDS)
    outer.done()
    return {**text, "tie_word_embeddings": tied}


def _refuse_variants(f: Fields) -> None:
    f.accept("hidden_act", "silu")
    f.accept("attention_bias", False)
    f.accept("attn_output_gate", True)
    f.accept("output_gate_type", None, "swish")
    f.accept("mtp_num_hidden_layers", 0, 1)
    f.accept("mtp_use_dedicated_embeddings", False)
    f.accept("mamba_ssm_dtype", "float32")
    f.accept("mlp_only_layers", [])
    f.accept("decoder_sparse_step", 1)
    f.accept("norm_topk_prob", True)
    f.accept("rope_scaling", None)
    f.accept("use_sliding_window", False)
    f.accept("sliding_window", None)


def _read_kinds(f: Fields) -> tuple[str, ...]:
    layers, interval = f.whole("num_hidden_layers", most=MOST_LAYERS), f.whole_or_none("full_attention_interval")
    if f.get("layer_types", None) is None:
        if interval is None:
            raise ValueError("config.json: wanted layer_types or full_attention_interval, got neither")
        return tuple(FULL if (index + 1) % interval == 0 else LINEAR for index in range(layers))
    return f.words("layer_types", (LINEAR, FULL), layers)


def read_sparse(f: Fields) -> SparseShape:
    """The sizes of the experts, from the fields that the Qwen families share."""
    shape = SparseShape(
        f.whole("num_experts", most=MOST_EXPERTS),
        f.whole("num_experts_per_tok"),
        f.whole("moe_intermediate_size"),
        f.whole("shared_expert_intermediate_size"),
    )
    if shape.chosen > shape.experts:
        raise ValueError(f"config.json: wanted at most {shape.experts} experts a token, got {shape.chosen}")
    return shape


def _read_rope(f: Fields, head_width: int) -> tuple[float, int]:
    """Base of the frequencies and number of rotated channels."""
    rope = Fields(f.section("rope_parameters"), "rope_parameters of config.json")
    rope.accept("rope_type", "default")
    rope.accept("mrope_interleaved", True)
    rope.ignore(["mrope_section"])  # splits the frequencies over position axes that are equal for text
    theta, factor = rope.number("rope_theta"), rope.number("partial_rotary_factor")
    rope.done()
    rotated = head_width * factor
    if rotated > head_width or rotated != int(rotated) or int(rotated) % 2:
        raise ValueError(f"config.json: wanted an even number of rotated channels, got {rotated} of {head_width}")
    return theta, int(rotated)


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
        mixer = self._attention() if kind == FULL else self._delta()
        return Layer(mixer, self._feed_forward(), self.norm(), self.norm())

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

    def _feed_forward(self) -> nnx.Module:
        width, rngs, dtype, sparse = self.config.width, self.rngs, self.dtype, self.config.sparse
        if sparse is None:
            return MLP(rngs, width, self.config.dense_width, dtype)
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
    return WeightTable(tuple(rows), canonical)


def canonical(name: str) -> str | None:
    """Multimodal releases put the language model one level deeper; a vision tower is left out."""
    if name.startswith("model.visual."):
        return None
    return name.replace("model.language_model.", "model.", 1) if name.startswith("model.language_model.") else name


def _layer_rows(config: Config, kind: str, ours: str, theirs: str) -> list[Weight]:
    sparse, mixer = config.sparse, f"{ours}.mixer"
    feed_forward = (
        mlp_rows(f"{ours}.feed_forward", f"{theirs}.mlp")
        if sparse is None
        else moe_rows(sparse, f"{ours}.feed_forward", f"{theirs}.mlp")
    )
    return [
        weight(f"{ours}.norm.scale", f"{theirs}.input_layernorm.weight", "d -> d"),
        weight(f"{ours}.feed_forward_norm.scale", f"{theirs}.post_attention_layernorm.weight", "d -> d"),
        *(attention_rows(mixer, theirs) if kind == FULL else _delta_rows(config.delta, mixer, theirs)),
        *feed_forward,
    ]


def attention_rows(ours: str, theirs: str) -> list[Weight]:
    """Rows of a gated attention, published with queries and gates in one matrix."""
    theirs = f"{theirs}.self_attn"
    return [
        weight(f"{ours}.query_gate.kernel", f"{theirs}.q_proj.weight", "(h c k) d -> d h c k"),
        weight(f"{ours}.key.kernel", f"{theirs}.k_proj.weight", "(g k) d -> d g k"),
        weight(f"{ours}.value.kernel", f"{theirs}.v_proj.weight", "(g k) d -> d g k"),
        weight(f"{ours}.query_norm.scale", f"{theirs}.q_norm.weight", "k -> k"),
        weight(f"{ours}.key_norm.scale", f"{theirs}.k_norm.weight", "k -> k"),
        weight(f"{ours}.output.kernel", f"{theirs}.o_proj.weight", "d v -> v d"),
    ]


def _delta_rows(shape: DeltaShape, ours: str, theirs: str) -> list[Weight]:
    theirs = f"{theirs}.linear_attn"
    channels, gated = (heads * width for heads, width in (shape.channels, (shape.heads, shape.value_width)))
    names = (f"{theirs}.in_proj_qkv.weight", f"{theirs}.in_proj_z.weight")
    projection = Source(names, "(g p) d -> d g p", joined=(channels, gated), dealt=shape.projected)
    gates = Source((f"{theirs}.in_proj_b.weight", f"{theirs}.in_proj_a.weight"), "c (g r) d -> d g c r", (2,))
    return [
        Weight(f"{ours}.projection.kernel", (projection,)),
        Weight(f"{ours}.gates.kernel", (gates,)),
        *delta_rows(shape, ours, theirs),
    ]


def moe_rows(sparse: SparseShape, ours: str, theirs: str) -> list[Weight]:
    """Rows of a mixture of experts with a gated shared expert."""
    return [
        weight(f"{ours}.router.scores.kernel", f"{theirs}.gate.weight", "e d -> d e"),
        *expert_rows(f"{ours}.experts", f"{theirs}.experts", sparse.experts),
        *mlp_rows(f"{ours}.shared.mlp", f"{theirs}.shared_expert"),
        weight(f"{ours}.shared.gate", f"{theirs}.shared_expert_gate.weight", "1 d -> d"),
    ]


def draft_rows(layer: list[Weight]) -> list[Weight]:
    """Rows of a draft layer, with those of its one layer."""
    return [
        weight("draft.embedding_norm.scale", "mtp.pre_fc_norm_embedding.weight", "d -> d"),
        weight("draft.hidden_norm.scale", "mtp.pre_fc_norm_hidden.weight", "d -> d"),
        weight("draft.project.kernel", "mtp.fc.weight", "d i -> i d"),
        weight("draft.norm.scale", "mtp.norm.weight", "d -> d"),
        *layer,
    ]
