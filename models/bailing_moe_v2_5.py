"""Ling-2.5, Ling-2.6 and Ring-2.5: lightning attention with a latent-attention layer at the end of each group.

Sigmoid-gated mixture of experts after the first dense layers; one draft layer in some releases. The decay of a head is
its ALiBi slope times a factor that falls with depth (`slope_layer_offset` below). Definition: the modelling files that
are published with the checkpoints.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

from kernels_pallas.rotary import frequencies
from models.attention import LatentAttention, LatentShape
from models.decoder import Decoder, Draft, Layer
from models.hf_fields import MOST_EXPERTS, MOST_HEADS, MOST_LAYERS, Fields, check_multiple
from models.layers import MLP, Embedding, Head, Linear, RMSNorm
from models.lightning import LightningAttention, LightningShape, alibi_slopes
from models.moe import BiasedRouter, Experts, GroupedSigmoid, MoE, SharedExpert
from models.weights import Weight, WeightTable, expert_rows, latent_rows, mlp_rows, trunk_rows, weight

ARCHITECTURES = ("BailingMoeV2_5ForCausalLM",)

# Training, and duplicates of fields that are read; MLA and lightning layers are multi-head whatever the key heads say.
IGNORED_FIELDS = (
    "mtp_loss_scaling_factor num_key_value_heads num_kv_heads_for_linear_attn seq_aux scoring_func topk_method "
    "router_dtype pad_token_id"
).split()


@dataclass(frozen=True)
class Config:
    """What the network computes, read from a published config."""

    vocabulary: int
    width: int
    layers: int
    group: int
    heads: int
    head_width: int
    norm_groups: int
    epsilon: float
    rope_theta: float
    latent: LatentShape
    dense_layers: int
    dense_width: int
    experts: int
    expert_width: int
    shared_experts: int
    router: GroupedSigmoid
    draft: bool
    query_key_norm: bool
    tied: bool
    max_positions: int
    slope_layer_offset: int = -1  # the published code counts layers from -1 in the decay; other engines count from 0

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "Config":
        """Read a config.json. Raises ValueError for a missing or unknown field, or a value that is not implemented."""
        f = Fields(hf, "config.json of BailingMoeV2_5ForCausalLM")
        f.absent("kda_lower_bound", "kda_safe_gate", "no_kda_lora", "short_conv_kernel_size")
        _refuse_variants(f)
        f.ignore(IGNORED_FIELDS)
        heads, head_width = f.whole("num_attention_heads", most=MOST_HEADS), f.whole("head_dim")
        latent = _read_latent(f, heads, head_width)
        chosen, expert_width = f.whole("num_experts_per_tok"), f.whole("moe_intermediate_size")
        shared = f.whole("num_shared_experts", most=MOST_EXPERTS)
        f.equal("moe_shared_expert_intermediate_size", expert_width * shared)
        router = GroupedSigmoid(
            chosen,
            f.whole("n_group"),
            f.whole("topk_group"),
            f.flag("norm_topk_prob", True) and chosen > 1,
            f.number("routed_scaling_factor"),
        )
        config = cls(
            vocabulary=f.whole("vocab_size"),
            width=f.whole("hidden_size"),
            layers=f.whole("num_hidden_layers", least=2, most=MOST_LAYERS),
            group=f.whole("layer_group_size"),
            heads=heads,
            head_width=head_width,
            norm_groups=f.whole("group_norm_size"),
            epsilon=f.number("rms_norm_eps"),
            rope_theta=f.number("rope_theta"),
            latent=latent,
            dense_layers=f.whole("first_k_dense_replace", least=0),
            dense_width=f.whole("intermediate_size"),
            experts=f.whole("num_experts", most=MOST_EXPERTS),
            expert_width=expert_width,
            shared_experts=shared,
            router=router,
            draft=f.whole("num_nextn_predict_layers", 0, least=0) == 1,
            query_key_norm=f.flag("use_qk_norm"),
            tied=f.flag("tie_word_embeddings", False),
            max_positions=f.whole("max_position_embeddings"),
        )
        f.done()
        _check_sizes(config)
        return config

    @property
    def slopes(self) -> np.ndarray:
        """Decay rates `[layers, heads]` of the lightning layers, float32: ALiBi slopes times a factor of the layer."""
        index = np.arange(self.layers) + self.slope_layer_offset
        factor = 1 - index / (self.layers - 1) + 1e-5
        return (factor[:, None] * alibi_slopes(self.heads)[None, :]).astype(np.float32)

    def is_full(self, layer: int) -> bool:
        """Whether a layer is latent attention: the last of each group, and every layer of an incomplete last group."""
        return (layer + 1) % self.group == 0 or layer >= self.layers // self.group * self.group


def _refuse_variants(f: Fields) -> None:
    f.accept("hidden_act", "silu")
    f.accept("use_bias", False)
    f.accept("use_qkv_bias", False)
    f.accept("linear_silu", False)
    f.accept("rope_interleave", True)
    f.accept("rope_scaling", None)
    f.accept("full_attention_type", "mla")
    f.accept("score_function", "sigmoid")
    f.accept("moe_router_enable_expert_bias", True)
    f.accept("num_nextn_predict_layers", 0, 1)


def _read_latent(f: Fields, heads: int, head_width: int) -> LatentShape:
    plain, rotary = f.whole("qk_nope_head_dim"), f.whole("qk_rope_head_dim")
    f.equal("qk_head_dim", plain + rotary)
    f.equal("rotary_dim", rotary)
    if head_width * f.number("partial_rotary_factor") != rotary:
        raise ValueError(
            f"config.json: wanted head_dim * partial_rotary_factor to equal qk_rope_head_dim ({rotary}), got head_dim "
            f"{head_width}: both kinds of layers share one rotary table"
        )
    return LatentShape(
        heads, f.whole_or_none("q_lora_rank"), f.whole("kv_lora_rank"), plain, rotary, f.whole("v_head_dim")
    )


def _check_sizes(config: Config) -> None:
    config.router.check(config.experts)
    inner = config.heads * config.head_width
    check_multiple("num_attention_heads * head_dim", inner, "group_norm_size", config.norm_groups)


class Model(Decoder):
    """The decoder of this family."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: str = "bfloat16", backend: str = "auto"):
        parts = _Parts(config, rngs, dtype, backend)
        super().__init__(
            Embedding(rngs, config.vocabulary, config.width, dtype),
            [parts.layer(index, config.is_full(index)) for index in range(config.layers)],
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
        mixer = self._latent() if full else self._lightning(index)
        dense = index < self.config.dense_layers
        feed_forward = MLP(self.rngs, self.config.width, self.config.dense_width, self.dtype) if dense else self._moe()
        return Layer(mixer, feed_forward, self._norm(), self._norm())

    def draft(self) -> Draft:
        width = self.config.width
        project = Linear(self.rngs, (2 * width,), (width,), (None, "model"), self.dtype)
        layer = Layer(self._latent(), self._moe(), self._norm(), self._norm())
        return Draft(self._norm(), self._norm(), project, layer, self._norm())

    def _norm(self) -> RMSNorm:
        return RMSNorm(self.config.width, self.config.epsilon)

    def _lightning(self, index: int) -> LightningAttention:
        config = self.config
        shape = LightningShape(
            config.heads,
            config.head_width,
            config.norm_groups,
            config.epsilon,
            scale=config.head_width**-0.5,
            silu=False,
            normed=config.query_key_norm,
            rotated=True,
        )
        slopes = tuple(config.slopes[index].tolist())
        return LightningAttention(self.rngs, config.width, shape, slopes, self.dtype, self.backend)

    def _latent(self) -> LatentAttention:
        shape = self.config.latent
        scale = (shape.plain_width + shape.rotary_width) ** -0.5
        return LatentAttention(self.rngs, self.config.width, shape, scale, self.dtype, self.backend)

    def _moe(self) -> MoE:
        config, rngs, dtype = self.config, self.rngs, self.dtype
        shared = SharedExpert(rngs, config.width, config.expert_width * config.shared_experts, dtype)
        experts = Experts(rngs, config.experts, config.width, config.expert_width, dtype, backend=self.backend)
        return MoE(BiasedRouter(rngs, config.width, config.experts, config.router, dtype), experts, shared)


# ------------------------------------------------------------------------------------------------------------- weights


def weight_table(config: Config) -> WeightTable:
    """Our parameters and the published tensors."""
    rows = trunk_rows("model.word_embeddings.weight", "model.norm.weight", config.tied)
    for index in range(config.layers):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        mixer = _latent_rows if config.is_full(index) else _lightning_rows
        rows += _norm_rows(ours, theirs) + mixer(config, ours, theirs)
        rows += mlp_rows(f"{ours}.feed_forward", f"{theirs}.mlp") if index < config.dense_layers else []
        rows += _moe_rows(config, ours, theirs) if index >= config.dense_layers else []
    if config.draft:
        rows += _draft_rows(config)
    return WeightTable(tuple(rows), canonical)


def canonical(name: str) -> str | None:
    """Names need no change, but some releases store decay buffers and call the router's bias otherwise."""
    if name.endswith((".slope", "inv_freq")):
        return None
    return name.replace("gate.e_score_correction_bias", "gate.expert_bias")


def _norm_rows(ours: str, theirs: str) -> list[Weight]:
    return [
        weight(f"{ours}.norm.scale", f"{theirs}.input_layernorm.weight", "d -> d"),
        weight(f"{ours}.feed_forward_norm.scale", f"{theirs}.post_attention_layernorm.weight", "d -> d"),
    ]


def _lightning_rows(config: Config, ours: str, theirs: str) -> list[Weight]:
    rows = [
        weight(
            f"{ours}.mixer.query_key_value.kernel",
            f"{theirs}.attention.query_key_value.weight",
            "(c h k) d -> d c h k",
        ),
        weight(f"{ours}.mixer.gate.kernel", f"{theirs}.attention.g_proj.weight", "v d -> d v"),
        weight(f"{ours}.mixer.output.kernel", f"{theirs}.attention.dense.weight", "d v -> v d"),
        weight(f"{ours}.mixer.output_norm", f"{theirs}.attention.g_norm.weight", "(g v) -> g v"),
    ]
    if config.query_key_norm:
        for part in ("query", "key"):
            rows.append(
                weight(f"{ours}.mixer.{part}_norm.scale", f"{theirs}.attention.{part}_layernorm.weight", "k -> k")
            )
    return rows


def _latent_rows(config: Config, ours: str, theirs: str) -> list[Weight]:
    compressed_query = config.latent.query_rank is not None
    return latent_rows(f"{ours}.mixer", f"{theirs}.attention", compressed_query, "dense")


def _moe_rows(config: Config, ours: str, theirs: str) -> list[Weight]:
    ours, theirs = f"{ours}.feed_forward", f"{theirs}.mlp"
    return [
        weight(f"{ours}.router.scores.kernel", f"{theirs}.gate.weight", "e d -> d e"),
        weight(f"{ours}.router.bias", f"{theirs}.gate.expert_bias", "e -> e"),
        *expert_rows(f"{ours}.experts", f"{theirs}.experts", config.experts),
        *mlp_rows(f"{ours}.shared.mlp", f"{theirs}.shared_experts"),
    ]


def _draft_rows(config: Config) -> list[Weight]:
    theirs = f"model.layers.{config.layers}"
    return [
        weight("draft.embedding_norm.scale", f"{theirs}.enorm.weight", "d -> d"),
        weight("draft.hidden_norm.scale", f"{theirs}.hnorm.weight", "d -> d"),
        weight("draft.project.kernel", f"{theirs}.eh_proj.weight", "d i -> i d"),
        weight("draft.norm.scale", f"{theirs}.final_layernorm.weight", "d -> d"),
        *_norm_rows("draft.layer", theirs),
        *_latent_rows(config, "draft.layer", theirs),
        *_moe_rows(config, "draft.layer", theirs),
    ]
