"""Ling-3.0: Kimi delta attention with a gated latent-attention layer at the end of each group.

Sigmoid-gated mixture of experts after the first dense layers, whose inner activations are clamped in some layers; one
draft layer in some releases, with latent attention whatever the target's layers are. Definition: the `bailing_hybrid`
class of transformers; compressed queries, element-wise gates, layers without rotary, clamps and the draft layer, which
that class leaves out, follow the open serving engines.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flax import nnx
from jaxtyping import Array

from kernels_pallas.kda import BoundedDecay, Decay, SoftplusDecay
from kernels_pallas.rotary import frequencies
from models.attention import LatentAttention, LatentShape
from models.decoder import Decoder, Draft, Layer
from models.hf_fields import MOST_EXPERTS, MOST_HEADS, MOST_LAYERS, Fields, is_finite
from models.kimi_linear import DeltaAttention, DeltaShape, delta_rows
from models.layers import MLP, ClampedSwiGLU, Embedding, Head, Linear, RMSNorm, swiglu
from models.moe import BiasedRouter, Experts, GroupedSigmoid, MoE, SharedExpert
from models.weights import Weight, WeightTable, expert_rows, latent_rows, mlp_rows, trunk_rows, weight

ARCHITECTURES = ("BailingMoeV3ForCausalLM",)

# Training; duplicates of fields that are read; settings of lightning attention, which this architecture does not have.
IGNORED_FIELDS = (
    "mtp_loss_scaling_factor num_key_value_heads num_kv_heads_for_linear_attn seq_aux scoring_func topk_method "
    "router_dtype partial_rotary_factor group_norm_size use_qk_norm linear_silu"
).split()
# Variants of the architecture that no checkpoint is known to use.
SWITCHED_OFF = (
    "use_bias use_qkv_bias use_kda_lora use_nGPT up_proj_norm value_norm scale_router_input mtp_use_kda multi_gate"
).split()
HEAD_WISE, ELEMENT_WISE = "head_wise", "element_wise"


@dataclass(frozen=True)
class Limits:
    """Where the inner activations of a layer's experts are cut; None: nowhere."""

    routed: float | None = None
    shared: float | None = None


@dataclass(frozen=True)
class Config:
    """What the network computes, read from a published config. `full[i]`: layer i is latent attention."""

    vocabulary: int
    width: int
    full: tuple[bool, ...]
    delta: DeltaShape
    decay: Decay
    latent: LatentShape
    latent_gate: tuple[int, ...]
    rotated: bool
    epsilon: float
    rope_theta: float
    dense_layers: int
    dense_width: int
    experts: int
    expert_width: int
    shared_experts: int
    router: GroupedSigmoid
    limits: tuple[Limits, ...]
    draft: bool
    tied: bool
    max_positions: int

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "Config":
        """Read a config.json. Raises ValueError for a missing or unknown field, or a value that is not implemented."""
        f = Fields(hf, "config.json of BailingMoeV3ForCausalLM")
        _refuse_variants(f)
        f.ignore(IGNORED_FIELDS)
        layers, dense_layers = f.whole("num_hidden_layers", most=MOST_LAYERS), f.whole("first_k_dense_replace", least=0)
        heads = f.whole("num_attention_heads", most=MOST_HEADS)
        latent = _read_latent(f, heads)
        expert_width, shared = f.whole("moe_intermediate_size"), f.whole("num_shared_experts", most=MOST_EXPERTS)
        f.equal("moe_shared_expert_intermediate_size", expert_width * shared)
        experts, router = f.whole("num_experts", most=MOST_EXPERTS), _read_router(f)
        router.check(experts)
        config = cls(
            vocabulary=f.whole("vocab_size"),
            width=f.whole("hidden_size"),
            full=_read_full(f, layers),
            delta=DeltaShape(heads, f.whole("head_dim"), f.whole("short_conv_kernel_size", least=2)),
            decay=_read_decay(f),
            latent=latent,
            latent_gate=_read_gate(f, latent),
            rotated=not f.flag("use_mla_nope", False),
            epsilon=f.number("rms_norm_eps"),
            rope_theta=f.number("rope_theta"),
            dense_layers=dense_layers,
            dense_width=f.whole("intermediate_size"),
            experts=experts,
            expert_width=expert_width,
            shared_experts=shared,
            router=router,
            limits=_read_limits(f, layers, dense_layers),
            draft=f.whole("num_nextn_predict_layers", 0, least=0) == 1,
            tied=f.flag("tie_word_embeddings", False),
            max_positions=f.whole("max_position_embeddings"),
        )
        f.done()
        return config


def _refuse_variants(f: Fields) -> None:
    f.accept("hidden_act", "silu")
    f.accept("no_kda_lora", True)
    f.accept("rope_interleave", True)
    f.accept("rope_scaling", None)
    f.accept("score_function", "sigmoid")
    f.accept("moe_router_enable_expert_bias", True)
    f.accept("router_type", None)
    f.accept("num_nextn_predict_layers", 0, 1)
    for name in SWITCHED_OFF:
        f.accept(name, False)


def _read_full(f: Fields, layers: int) -> tuple[bool, ...]:
    """Which layers are latent attention: the last of each group, or those that a list marks with 0."""
    group = f.get("layer_group_size")
    if isinstance(group, list):
        return tuple(entry == 0 for entry in f.wholes("layer_group_size", 0, 1, layers))
    size = f.whole("layer_group_size")
    if layers % size:
        raise ValueError(
            f"config.json: wanted num_hidden_layers to be a multiple of layer_group_size ({size}), got {layers}: "
            "implementations disagree on an incomplete last group"
        )
    return tuple((layer + 1) % size == 0 for layer in range(layers))


def _read_decay(f: Fields) -> Decay:
    lowest = f.get("kda_lower_bound", None)
    if not f.flag("kda_safe_gate"):
        return SoftplusDecay()
    if not is_finite(lowest) or lowest >= 0:
        raise ValueError(f"config.json: wanted kda_lower_bound to be a finite number below 0, got {lowest!r}")
    return BoundedDecay(float(lowest))


def _read_latent(f: Fields, heads: int) -> LatentShape:
    plain, rotary = f.whole("qk_nope_head_dim"), f.whole("qk_rope_head_dim")
    f.equal("qk_head_dim", plain + rotary)
    f.equal("rotary_dim", rotary)
    if rotary % 2:
        raise ValueError(f"config.json: wanted an even qk_rope_head_dim, got {rotary}: channels rotate in pairs")
    return LatentShape(
        heads, f.whole_or_none("q_lora_rank"), f.whole("kv_lora_rank"), plain, rotary, f.whole("v_head_dim")
    )


def _read_gate(f: Fields, latent: LatentShape) -> tuple[int, ...]:
    """Outputs of the projection that gates latent attention."""
    f.accept("gated_attention_proj_granularity_type", HEAD_WISE, ELEMENT_WISE)
    each = f.get("gated_attention_proj_granularity_type") == ELEMENT_WISE
    return (latent.heads, latent.value_width) if each else (latent.heads,)


def _read_router(f: Fields) -> GroupedSigmoid:
    return GroupedSigmoid(
        f.whole("num_experts_per_tok"),
        f.whole("n_group"),
        f.whole("topk_group"),
        f.flag("norm_topk_prob"),
        f.number("routed_scaling_factor"),
    )


def _read_limits(f: Fields, layers: int, dense_layers: int) -> tuple[Limits, ...]:
    lists = [_read_limit(f, name, layers) for name in ("expert_swiglu_limit_list", "share_expert_swiglu_limit_list")]
    limits = tuple(Limits(routed, shared) for routed, shared in zip(*lists, strict=True))
    if set(limits[:dense_layers]) - {Limits()}:
        raise ValueError(f"config.json: wanted limits for experts only, got one for the {dense_layers} dense layers")
    return limits


def _read_limit(f: Fields, name: str, layers: int) -> list[float | None]:
    """One entry a layer; 0 means no limit."""
    values = f.get(name, None)
    if values is None:
        return [None] * layers
    fits = isinstance(values, list) and len(values) == layers
    if not fits or not all(is_finite(v) and v >= 0 for v in values):
        raise ValueError(f"config.json: wanted {layers} numbers of at least 0 in {name}, got {values!r}")
    return [float(value) if value else None for value in values]


class Model(Decoder):
    """The decoder of this family."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: str = "bfloat16", backend: str = "auto"):
        parts = _Parts(config, rngs, dtype, backend)
        super().__init__(
            Embedding(rngs, config.vocabulary, config.width, dtype),
            [parts.layer(index, full) for index, full in enumerate(config.full)],
            RMSNorm(config.width, config.epsilon),
            None if config.tied else Head(rngs, config.vocabulary, config.width, dtype),
            parts.draft() if config.draft else None,
            tuple(frequencies(config.latent.rotary_width, config.rope_theta).tolist()),
        )


class _Parts:
    """Builds the parts of one model."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: str, backend: str):
        self.config, self.rngs, self.dtype = config, rngs, dtype
        self.backend = backend

    def layer(self, index: int, full: bool) -> Layer:
        config = self.config
        mixer = self._latent() if full else self._delta()
        dense = index < config.dense_layers
        feed_forward = (
            MLP(self.rngs, config.width, config.dense_width, self.dtype) if dense else self._moe(config.limits[index])
        )
        return Layer(mixer, feed_forward, self._norm(), self._norm())

    def draft(self) -> Draft:
        width = self.config.width
        project = Linear(self.rngs, (2 * width,), (width,), (None, "model"), self.dtype)
        layer = Layer(self._latent(), self._moe(Limits()), self._norm(), self._norm())
        return Draft(self._norm(), self._norm(), project, layer, self._norm())

    def _norm(self) -> RMSNorm:
        return RMSNorm(self.config.width, self.config.epsilon)

    def _delta(self) -> DeltaAttention:
        config = self.config
        return DeltaAttention(
            self.rngs,
            config.width,
            config.delta,
            config.decay,
            self._gate(),
            self._gate(),
            config.epsilon,
            self.dtype,
            self.backend,
        )

    def _gate(self) -> Linear:
        shape = self.config.delta
        axes = ("model", "delta_heads", None)
        return Linear(self.rngs, (self.config.width,), (shape.heads, shape.width), axes, self.dtype)

    def _latent(self) -> LatentAttention:
        config, shape = self.config, self.config.latent
        scale = (shape.plain_width + shape.rotary_width) ** -0.5
        return LatentAttention(
            self.rngs, config.width, shape, scale, self.dtype, self.backend, config.rotated, config.latent_gate
        )

    def _moe(self, limits: Limits) -> MoE:
        config, rngs, dtype = self.config, self.rngs, self.dtype
        shared_width = config.expert_width * config.shared_experts
        shared = SharedExpert(rngs, config.width, shared_width, dtype, _activation(limits.shared))
        routed = _activation(limits.routed)
        experts = Experts(rngs, config.experts, config.width, config.expert_width, dtype, routed, self.backend)
        return MoE(BiasedRouter(rngs, config.width, config.experts, config.router, dtype), experts, shared)


def _activation(limit: float | None) -> Callable[[Array], Array]:
    return swiglu if limit is None else ClampedSwiGLU(limit)


# ------------------------------------------------------------------------------------------------------------- weights


def weight_table(config: Config) -> WeightTable:
    """Our parameters and the published tensors."""
    rows = trunk_rows("model.word_embeddings.weight", "model.norm.weight", config.tied)
    for index, full in enumerate(config.full):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        dense = index < config.dense_layers
        rows += [
            *_norm_rows(ours, theirs),
            *(_latent_rows(config, ours, theirs) if full else _delta_rows(ours, theirs)),
            *(mlp_rows(f"{ours}.feed_forward", f"{theirs}.mlp") if dense else _moe_rows(config, ours, theirs)),
        ]
    if config.draft:
        rows += _draft_rows(config)
    return WeightTable(tuple(rows), canonical)


def canonical(name: str) -> str | None:
    """Names need no change, but some releases call the router's bias otherwise or store rotary frequencies."""
    if name.endswith("inv_freq"):
        return None
    return name.replace("gate.e_score_correction_bias", "gate.expert_bias")


def _norm_rows(ours: str, theirs: str) -> list[Weight]:
    return [
        weight(f"{ours}.norm.scale", f"{theirs}.input_layernorm.weight", "d -> d"),
        weight(f"{ours}.feed_forward_norm.scale", f"{theirs}.post_attention_layernorm.weight", "d -> d"),
    ]


def _delta_rows(ours: str, theirs: str) -> list[Weight]:
    ours, theirs = f"{ours}.mixer", f"{theirs}.attention"
    return [
        *delta_rows(ours, theirs, "dense", "h -> h"),
        weight(f"{ours}.decay_gate.kernel", f"{theirs}.f_proj.weight", "(h k) d -> d h k"),
        weight(f"{ours}.output_gate.kernel", f"{theirs}.g_proj.weight", "(h k) d -> d h k"),
    ]


def _latent_rows(config: Config, ours: str, theirs: str) -> list[Weight]:
    ours, theirs = f"{ours}.mixer", f"{theirs}.attention"
    pattern = "h d -> d h" if len(config.latent_gate) == 1 else "(h v) d -> d h v"
    return [
        *latent_rows(ours, theirs, config.latent.query_rank is not None, "dense"),
        weight(f"{ours}.gate.kernel", f"{theirs}.g_proj.weight", pattern),
    ]


def _moe_rows(config: Config, ours: str, theirs: str) -> list[Weight]:
    ours, theirs = f"{ours}.feed_forward", f"{theirs}.mlp"
    return [
        weight(f"{ours}.router.scores.kernel", f"{theirs}.gate.weight", "e d -> d e"),
        weight(f"{ours}.router.bias", f"{theirs}.gate.expert_bias", "e -> e"),
        *expert_rows(f"{ours}.experts", f"{theirs}.experts", config.experts),
        *mlp_rows(f"{ours}.shared.mlp", f"{theirs}.shared_experts"),
    ]


def _draft_rows(config: Config) -> list[Weight]:
    theirs = f"model.layers.{len(config.full)}"
    return [
        weight("draft.embedding_norm.scale", f"{theirs}.enorm.weight", "d -> d"),
        weight("draft.hidden_norm.scale", f"{theirs}.hnorm.weight", "d -> d"),
        weight("draft.project.kernel", f"{theirs}.eh_proj.weight", "d i -> i d"),
        weight("draft.norm.scale", f"{theirs}.final_layernorm.weight", "d -> d"),
        *_norm_rows("draft.layer", theirs),
        *_latent_rows(config, "draft.layer", theirs),
        *_moe_rows(config, "draft.layer", theirs),
    ]
