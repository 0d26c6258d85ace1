"""Ring-linear-2.0: lightning attention with a grouped-query attention layer at the end of each group.

Sigmoid-gated mixture of experts after the first dense layers. Written from the published config and the open engines'
descriptions; there are no reference outputs of this family, so nothing but its parts and its shapes is tested. How the
decay falls with depth is not settled either: see `slope_layer_offset`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas.gqa import GQA, GQAWeights
from kernels_pallas.op import Cache, Memory, Place, RaggedBatch
from kernels_pallas.rotary import Rotary, frequencies
from models.attention import GroupedShape, kept_heads, repeated
from models.decoder import Decoder, Layer, Mixer
from models.division import Divisible, Division
from models.hf_fields import MOST_EXPERTS, MOST_HEADS, MOST_LAYERS, Fields, check_multiple
from models.layers import MLP, Embedding, Head, Linear, RMSNorm
from models.lightning import LightningAttention, LightningShape, alibi_slopes
from models.moe import BiasedRouter, Experts, GroupedSigmoid, MoE, SharedExpert
from models.weights import Weight, WeightTable, expert_rows, mlp_rows, trunk_rows, weight

ARCHITECTURES = ("BailingMoeLinearV2ForCausalLM",)


@dataclass(frozen=True)
class Config:
    """What the network computes, read from a published config.

    `slope_layer_offset`: the decay of layer l falls with l + offset. -1 is the rule of the same lab's next generation;
    no config holds it, and it is not known to be the rule of this one.
    """

    vocabulary: int
    width: int
    layers: int
    group: int
    attention: GroupedShape
    norm_groups: int
    epsilon: float
    rope_theta: float
    rotary_width: int
    dense_layers: int
    dense_width: int
    experts: int
    expert_width: int
    shared_experts: int
    router: GroupedSigmoid
    query_key_norm: bool
    tied: bool
    max_positions: int
    slope_layer_offset: int = -1

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "Config":
        """Read a config.json. Raises ValueError for a missing or unknown field, or a value that is not implemented."""
        f = Fields(hf, "config.json of BailingMoeLinearV2ForCausalLM")
        _refuse_variants(f)
        attention = GroupedShape(
            f.whole("num_attention_heads", most=MOST_HEADS),
            f.whole("num_key_value_heads", most=MOST_HEADS),
            f.whole("head_dim"),
        )
        expert_width, shared = f.whole("moe_intermediate_size"), f.whole("num_shared_experts", most=MOST_EXPERTS)
        f.equal("moe_shared_expert_intermediate_size", expert_width * shared)
        config = cls(
            vocabulary=f.whole("vocab_size"),
            width=f.whole("hidden_size"),
            layers=f.whole("num_hidden_layers", least=2, most=MOST_LAYERS),
            group=f.whole("layer_group_size"),
            attention=attention,
            norm_groups=f.whole("group_norm_size"),
            epsilon=f.number("rms_norm_eps"),
            rope_theta=f.number("rope_theta"),
            rotary_width=_read_rotary_width(f, attention.width),
            dense_layers=f.whole("first_k_dense_replace", least=0),
            dense_width=f.whole("intermediate_size"),
            experts=f.whole("num_experts", most=MOST_EXPERTS),
            expert_width=expert_width,
            shared_experts=shared,
            router=_read_router(f),
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
        return (factor[:, None] * alibi_slopes(self.attention.heads)[None, :]).astype(np.float32)

    def is_full(self, layer: int) -> bool:
        """Whether a layer is softmax attention: the last of each group, and every layer of an incomplete last group."""
        return (layer + 1) % self.group == 0 or layer >= self.layers // self.group * self.group


def _refuse_variants(f: Fields) -> None:
    f.accept("hidden_act", "silu")
    f.accept("use_bias", False)
    f.accept("use_qkv_bias", False)
    f.accept("use_rmsnorm", True)
    f.accept("linear_silu", False)
    f.accept("rope_scaling", None)
    f.accept("score_function", "sigmoid")
    f.accept("router_dtype", "fp32")
    f.accept("moe_router_enable_expert_bias", True)
    f.accept("num_nextn_predict_layers", 0)


def _read_router(f: Fields) -> GroupedSigmoid:
    return GroupedSigmoid(
        f.whole("num_experts_per_tok"),
        f.whole("n_group"),
        f.whole("topk_group"),
        f.flag("norm_topk_prob"),
        f.number("routed_scaling_factor"),
    )


def _read_rotary_width(f: Fields, head_width: int) -> int:
    rotated = head_width * f.number("partial_rotary_factor")
    if rotated > head_width or rotated != int(rotated) or int(rotated) % 2:
        raise ValueError(f"config.json: wanted an even number of rotated channels, got {rotated} of {head_width}")
    return int(rotated)


def _check_sizes(config: Config) -> None:
    config.router.check(config.experts)
    shape = config.attention
    check_multiple("num_attention_heads * head_dim", shape.heads * shape.width, "group_norm_size", config.norm_groups)


class FusedGroupedAttention(Divisible):
    """GQA with one projection, `[all query heads | all key heads | all value heads]`; rotary on half pairs."""

    kind = GQA.name

    def __init__(
        self, rngs: nnx.Rngs, width: int, shape: GroupedShape, epsilon: float, normed: bool, dtype: str, backend: str
    ):
        heads = (shape.heads + 2 * shape.key_heads, shape.width)
        self.query_key_value = Linear(rngs, (width,), heads, ("model", None, None), dtype)
        self.output = Linear(rngs, (shape.heads, shape.width), (width,), ("heads", None, "model"), dtype)
        if normed:
            self.query_norm = RMSNorm(shape.width, epsilon)
            self.key_norm = RMSNorm(shape.width, epsilon)
        self.normed = normed
        self.shape = shape
        self.epsilon = epsilon
        self.dtype = dtype
        self.memory: Memory = kept_heads(shape.key_heads, shape.width, dtype)
        self.place = Place(0, 0)
        self.backend = GQA.choose(backend, self.memory, dtype)

    def divide(self, division: Division) -> None:
        """Bind a division; keys and values are repeated where there are more devices than heads of them."""
        super().divide(division)
        self.memory = kept_heads(division.key_heads(self.shape.key_heads), self.shape.width, self.dtype)

    def __call__(
        self, x: Float[Array, "T D"], rotary: Rotary | None, cache: Cache, batch: RaggedBatch
    ) -> tuple[Float[Array, "T D"], Cache]:
        whole, keys_end = self.query_key_value(x), self.shape.heads + self.shape.key_heads
        weights = GQAWeights(self.query_norm.weight, self.key_norm.weight) if self.normed else GQAWeights()
        (pages,) = cache.pages(self.place)
        out, pages = self.division.op(
            GQA, self.backend, {"scale": self.shape.width ** (-0.5), "epsilon": self.epsilon}
        )(
            whole[:, : self.shape.heads],
            repeated(whole[:, self.shape.heads : keys_end], self.memory),
            repeated(whole[:, keys_end:], self.memory),
            None,
            weights,
            rotary,
            pages,
            self.place.layer,
            batch,
        )
        out = out.reshape(-1, self.shape.heads, self.shape.width)
        return self.output(out), cache.updated(self.place, (pages,))


class Model(Decoder):
    """The decoder of this family."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: str = "bfloat16", backend: str = "auto"):
        parts = _Parts(config, rngs, dtype, backend)
        super().__init__(
            Embedding(rngs, config.vocabulary, config.width, dtype),
            [parts.layer(index) for index in range(config.layers)],
            RMSNorm(config.width, config.epsilon),
            None if config.tied else Head(rngs, config.vocabulary, config.width, dtype),
            None,
            tuple(frequencies(config.rotary_width, config.rope_theta).tolist()),
        )


class _Parts:
    """Builds the parts of one model."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: str, backend: str):
        self.config, self.rngs, self.dtype = config, rngs, dtype
        self.backend = backend

    def layer(self, index: int) -> Layer:
        config = self.config
        mixer: Mixer = self._attention() if config.is_full(index) else self._lightning(index)
        norms = RMSNorm(config.width, config.epsilon), RMSNorm(config.width, config.epsilon)
        return Layer(mixer, self._feed_forward(index), *norms)

    def _attention(self) -> FusedGroupedAttention:
        config = self.config
        return FusedGroupedAttention(
            self.rngs, config.width, config.attention, config.epsilon, config.query_key_norm, self.dtype, self.backend
        )

    def _lightning(self, index: int) -> LightningAttention:
        config, heads = self.config, self.config.attention
        shape = LightningShape(
            heads.heads,
            heads.width,
            config.norm_groups,
            config.epsilon,
            scale=heads.width**-0.5,
            silu=False,
            normed=config.query_key_norm,
            rotated=True,
        )
        slopes = tuple(config.slopes[index].tolist())
        return LightningAttention(self.rngs, config.width, shape, slopes, self.dtype, self.backend)

    def _feed_forward(self, index: int) -> nnx.Module:
        config, rngs, dtype = self.config, self.rngs, self.dtype
        if index < config.dense_layers:
            return MLP(rngs, config.width, config.dense_width, dtype)
        router = BiasedRouter(rngs, config.width, config.experts, config.router, dtype)
        experts = Experts(rngs, config.experts, config.width, config.expert_width, dtype, backend=self.backend)
        shared = SharedExpert(rngs, config.width, config.expert_width * config.shared_experts, dtype)
        return MoE(router, experts, shared)


# ------------------------------------------------------------------------------------------------------------- weights


def weight_table(config: Config) -> WeightTable:
    """Our parameters and the published tensors."""
    rows = trunk_rows("model.word_embeddings.weight", "model.norm.weight", config.tied)
    for index in range(config.layers):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        mixer = _attention_rows if config.is_full(index) else _lightning_rows
        rows += [
            weight(f"{ours}.norm.scale", f"{theirs}.input_layernorm.weight", "d -> d"),
            weight(f"{ours}.feed_forward_norm.scale", f"{theirs}.post_attention_layernorm.weight", "d -> d"),
            *mixer(config, f"{ours}.mixer", f"{theirs}.attention"),
        ]
        ours, theirs = f"{ours}.feed_forward", f"{theirs}.mlp"
        rows += mlp_rows(ours, theirs) if index < config.dense_layers else _moe_rows(config, ours, theirs)
    return WeightTable(tuple(rows), canonical)


def canonical(name: str) -> str | None:
    """Names need no change, but some releases store decay buffers and call the router's bias otherwise."""
    if name.endswith((".slope", "inv_freq")):
        return None
    return name.replace("gate.e_score_correction_bias", "gate.expert_bias")


def _lightning_rows(config: Config, ours: str, theirs: str) -> list[Weight]:
    return [
        weight(f"{ours}.query_key_value.kernel", f"{theirs}.query_key_value.weight", "(c h k) d -> d c h k"),
        weight(f"{ours}.gate.kernel", f"{theirs}.g_proj.weight", "v d -> d v"),
        weight(f"{ours}.output_norm", f"{theirs}.g_norm.weight", "(g v) -> g v"),
        weight(f"{ours}.output.kernel", f"{theirs}.dense.weight", "d v -> v d"),
        *_norm_rows(config, ours, theirs),
    ]


def _attention_rows(config: Config, ours: str, theirs: str) -> list[Weight]:
    return [
        weight(f"{ours}.query_key_value.kernel", f"{theirs}.query_key_value.weight", "(h k) d -> d h k"),
        weight(f"{ours}.output.kernel", f"{theirs}.dense.weight", "d (h k) -> h k d"),
        *_norm_rows(config, ours, theirs),
    ]


def _norm_rows(config: Config, ours: str, theirs: str) -> list[Weight]:
    """Rows of the norms of queries and keys, which both kinds of layers have or lack."""
    parts = ("query", "key") if config.query_key_norm else ()
    return [weight(f"{ours}.{part}_norm.scale", f"{theirs}.{part}_layernorm.weight", "k -> k") for part in parts]


def _moe_rows(config: Config, ours: str, theirs: str) -> list[Weight]:
    return [
        weight(f"{ours}.router.scores.kernel", f"{theirs}.gate.weight", "e d -> d e"),
        weight(f"{ours}.router.bias", f"{theirs}.gate.expert_bias", "e -> e"),
        *expert_rows(f"{ours}.experts", f"{theirs}.experts", config.experts),
        *mlp_rows(f"{ours}.shared.mlp", f"{theirs}.shared_experts"),
    ]
