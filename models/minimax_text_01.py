"""MiniMax-Text-01: lightning attention, softmax attention in every eighth layer, a mixture of experts in every layer.

The residual stream carries the normed input of each branch, `alpha * norm(x) + beta * branch(norm(x))`. Definition: the
`minimax` classes of transformers, but only the first `rotary_dim` channels of a head are rotated, as the published
config says.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas.op import Cache, RaggedBatch
from kernels_pallas.rotary import Rotary, frequencies
from models.attention import GroupedAttention, GroupedShape
from models.decoder import Decoder, Mixer
from models.hf_fields import MOST_EXPERTS, MOST_HEADS, MOST_LAYERS, Fields
from models.layers import Embedding, Head, RMSNorm
from models.lightning import LightningAttention, LightningShape, alibi_slopes
from models.moe import Experts, PlainRouter, RoutedExperts, SoftmaxTopK
from models.weights import NUMBERED, Weight, WeightTable, expert_rows, trunk_rows, weight

ARCHITECTURES = ("MiniMaxText01ForCausalLM",)

LIGHTNING_EPSILON = 1e-6  # of the norm inside lightning layers, whatever the model's other norms use
BUFFERS = (".slope_rate", ".query_decay", ".key_decay", ".diagonal_decay", "inv_freq")  # computed here, stored by some

# Training, and the form of a shared expert, which no checkpoint has.
IGNORED_FIELDS = ("router_jitter_noise", "shared_moe_mode")


@dataclass(frozen=True)
class Blend:
    """Factors of a residual: `alpha` of the normed input, `beta` of the branch."""

    alpha: float
    beta: float

    def __call__(self, normed: Float[Array, "T D"], branch: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """The blend, computed in float32."""
        whole = self.alpha * normed.astype(jnp.float32) + self.beta * branch.astype(jnp.float32)
        return whole.astype(normed.dtype)


@dataclass(frozen=True)
class Config:
    """What the network computes, read from a published config. `full` says which layers are softmax attention."""

    vocabulary: int
    width: int
    full: tuple[bool, ...]
    attention: GroupedShape
    rotary_width: int
    rope_theta: float
    epsilon: float
    experts: int
    chosen: int
    expert_width: int
    full_blend: Blend
    lightning_blend: Blend
    expert_blend: Blend
    tied: bool
    max_positions: int

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "Config":
        """Read a config.json. Raises ValueError for a missing or unknown field, or a value that is not implemented."""
        f = Fields(hf, "config.json of MiniMaxText01ForCausalLM")
        _refuse_variants(f)
        f.ignore(IGNORED_FIELDS)
        attention = GroupedShape(
            f.whole("num_attention_heads", most=MOST_HEADS),
            f.whole("num_key_value_heads", most=MOST_HEADS),
            f.whole("head_dim"),
        )
        config = cls(
            vocabulary=f.whole("vocab_size"),
            width=f.whole("hidden_size"),
            full=_read_full(f),
            attention=attention,
            rotary_width=f.whole("rotary_dim", attention.width, least=2),
            rope_theta=f.number("rope_theta"),
            epsilon=f.number("rms_norm_eps"),
            experts=f.whole("num_local_experts", most=MOST_EXPERTS),
            chosen=f.whole("num_experts_per_tok"),
            expert_width=f.whole("intermediate_size"),
            full_blend=_read_blend(f, "full_attention"),
            lightning_blend=_read_blend(f, "linear_attention"),
            expert_blend=_read_blend(f, "mlp"),
            tied=f.flag("tie_word_embeddings", False),
            max_positions=f.whole("max_position_embeddings"),
        )
        f.done()
        _check_sizes(config)
        return config

    @property
    def slopes(self) -> np.ndarray:
        """Decay rates `[layers, heads]` of the lightning layers, float32: ALiBi slopes times a factor of the layer."""
        layers = len(self.full)
        factor = 1 - np.arange(layers) / (layers - 1 + 1e-5) + 1e-5
        return (factor[:, None] * alibi_slopes(self.attention.heads)[None, :]).astype(np.float32)


def _refuse_variants(f: Fields) -> None:
    f.get("postnorm")  # its default is false
    f.accept("postnorm", True)
    f.accept("hidden_act", "silu")
    f.accept("shared_intermediate_size", 0)
    f.accept("sliding_window", None)
    f.accept("rope_scaling", None)
    f.accept("attention_bias", False)


def _read_full(f: Fields) -> tuple[bool, ...]:
    layers = f.whole("num_hidden_layers", most=MOST_LAYERS)
    return tuple(value == 1 for value in f.wholes("attn_type_list", 0, 1, layers))


def _read_blend(f: Fields, branch: str) -> Blend:
    return Blend(f.number(f"layernorm_{branch}_alpha"), f.number(f"layernorm_{branch}_beta"))


def _check_sizes(config: Config) -> None:
    shape = config.attention
    if shape.heads & (shape.heads - 1):
        raise ValueError(
            f"config.json: wanted a power of two as num_attention_heads, got {shape.heads}: how fast the states of "
            "another number decay is not settled"
        )
    if config.rotary_width % 2 or config.rotary_width > shape.width:
        raise ValueError(f"config.json: wanted an even rotary_dim up to {shape.width}, got {config.rotary_width}")
    if config.chosen > config.experts:
        raise ValueError(f"config.json: wanted at most {config.experts} experts a token, got {config.chosen}")


class NormedResidualLayer(nnx.Module):
    """`n = norm(x); x = alpha n + beta mixer(n)`, then the same with the experts."""

    def __init__(self, mixer: Mixer, feed_forward: nnx.Module, config: Config, blend: Blend):
        self.norm = RMSNorm(config.width, config.epsilon)
        self.mixer = mixer
        self.feed_forward_norm = RMSNorm(config.width, config.epsilon)
        self.feed_forward = feed_forward
        self.blend = blend
        self.feed_forward_blend = config.expert_blend

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """What mixes tokens in this layer."""
        return (self.mixer,)

    def __call__(self, x: Array, rotary: Rotary | None, cache: Cache, batch: RaggedBatch) -> tuple[Array, Cache]:
        normed = self.norm(x)
        mixed, cache = self.mixer(normed, rotary, cache, batch)
        normed = self.feed_forward_norm(self.blend(normed, mixed))
        return self.feed_forward_blend(normed, self.feed_forward(normed)), cache


class Model(Decoder):
    """The decoder of this family."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: str = "bfloat16", backend: str = "auto"):
        parts = _Parts(config, rngs, dtype, backend)
        super().__init__(
            Embedding(rngs, config.vocabulary, config.width, dtype),
            [parts.layer(index, full) for index, full in enumerate(config.full)],
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

    def layer(self, index: int, full: bool) -> NormedResidualLayer:
        config = self.config
        mixer: Mixer = self._attention() if full else self._lightning(index)
        blend = config.full_blend if full else config.lightning_blend
        return NormedResidualLayer(mixer, self._experts(), config, blend)

    def _attention(self) -> GroupedAttention:
        shape = self.config.attention
        scale = shape.width**-0.5
        return GroupedAttention(self.rngs, self.config.width, shape, None, True, scale, self.dtype, self.backend)

    def _lightning(self, index: int) -> LightningAttention:
        config, heads = self.config, self.config.attention
        shape = LightningShape(
            heads.heads, heads.width, 1, LIGHTNING_EPSILON, scale=1.0, silu=True, normed=False, rotated=False
        )
        slopes = tuple(config.slopes[index].tolist())
        return LightningAttention(self.rngs, config.width, shape, slopes, self.dtype, self.backend)

    def _experts(self) -> RoutedExperts:
        config, rngs, dtype = self.config, self.rngs, self.dtype
        router = PlainRouter(rngs, config.width, config.experts, SoftmaxTopK(config.chosen), dtype)
        experts = Experts(rngs, config.experts, config.width, config.expert_width, dtype, backend=self.backend)
        return RoutedExperts(router, experts)


# ------------------------------------------------------------------------------------------------------------- weights


def weight_table(config: Config) -> WeightTable:
    """Our parameters and the published tensors."""
    rows = trunk_rows("model.embed_tokens.weight", "model.norm.weight", config.tied)
    for index, full in enumerate(config.full):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        mixer = _attention_rows if full else _lightning_rows
        rows += [
            weight(f"{ours}.norm.scale", f"{theirs}.input_layernorm.weight", "d -> d"),
            weight(f"{ours}.feed_forward_norm.scale", f"{theirs}.post_attention_layernorm.weight", "d -> d"),
            *mixer(f"{ours}.mixer", f"{theirs}.self_attn"),
            *_expert_rows(config, f"{ours}.feed_forward", f"{theirs}.block_sparse_moe"),
        ]
    return WeightTable(tuple(rows), canonical)


def canonical(name: str) -> str | None:
    """Names need no change; stored buffers of the decay are left out."""
    return None if name.endswith(BUFFERS) else name


def _lightning_rows(ours: str, theirs: str) -> list[Weight]:
    return [
        weight(f"{ours}.query_key_value.kernel", f"{theirs}.qkv_proj.weight", "(h c k) d -> d c h k"),
        weight(f"{ours}.gate.kernel", f"{theirs}.output_gate.weight", "v d -> d v"),
        weight(f"{ours}.output.kernel", f"{theirs}.out_proj.weight", "d v -> v d"),
        weight(f"{ours}.output_norm", f"{theirs}.norm.weight", "(g v) -> g v"),
    ]


def _attention_rows(ours: str, theirs: str) -> list[Weight]:
    return [
        weight(f"{ours}.query.kernel", f"{theirs}.q_proj.weight", "(h k) d -> d h k"),
        weight(f"{ours}.key.kernel", f"{theirs}.k_proj.weight", "(g k) d -> d g k"),
        weight(f"{ours}.value.kernel", f"{theirs}.v_proj.weight", "(g k) d -> d g k"),
        weight(f"{ours}.output.kernel", f"{theirs}.o_proj.weight", "d v -> v d"),
    ]


def _expert_rows(config: Config, ours: str, theirs: str) -> list[Weight]:
    return [
        weight(f"{ours}.router.scores.kernel", f"{theirs}.gate.weight", "e d -> d e"),
        *expert_rows(f"{ours}.experts", f"{theirs}.experts", config.experts, NUMBERED),
    ]
