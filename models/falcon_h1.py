"""Falcon-H1: Mamba2 and attention side by side in every layer, on the same normed input, then an MLP.

Constants scale the embedding, the input and output of each part, the keys, the five parts of Mamba2's input projection,
the MLP's gate and output, and the logits. Definition: the `falcon_h1` classes of transformers; where these fuse Mamba2
for training they put the gate before the norm whatever the config says, here the config decides.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas.op import Cache, RaggedBatch
from kernels_pallas.rotary import Rotary, frequencies
from models.attention import GroupedAttention, GroupedShape
from models.decoder import Decoder, Mixer
from models.hf_fields import MOST_HEADS, MOST_LAYERS, Fields, check_multiple, is_finite
from models.layers import MLP, Embedding, Head, RMSNorm, swiglu
from models.mamba2 import MAMBA2_IGNORED, Mamba2Mixer, Mamba2Shape, mamba2_rows, read_mamba2
from models.nemotron_h import attention_rows
from models.weights import Weight, WeightTable, mlp_rows, trunk_rows, weight

ARCHITECTURES = ("FalconH1ForCausalLM",)

# Choices among equal algorithms, what only training uses, and a width that `intermediate_size` replaces.
IGNORED_FIELDS = (*MAMBA2_IGNORED, "mamba_chunk_size", "num_logits_to_keep", "mlp_expansion_factor")


@dataclass(frozen=True)
class Factors:
    """The constants that scale what flows through the network; `mamba_parts` are those of gate, x, B, C and step."""

    embedding: float
    logits: float
    mamba_in: float
    mamba_out: float
    mamba_parts: tuple[float, ...]
    attention_in: float
    attention_out: float
    keys: float
    mlp_gate: float
    mlp_out: float


@dataclass(frozen=True)
class Config:
    """What the network computes, read from a published config."""

    vocabulary: int
    width: int
    layers: int
    mamba: Mamba2Shape
    attention: GroupedShape
    inner: int
    factors: Factors
    epsilon: float
    rope_theta: float
    tied: bool
    max_positions: int

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "Config":
        """Read a config.json. Raises ValueError for a missing or unknown field, or a value that is not implemented."""
        f = Fields(hf, "config.json of FalconH1ForCausalLM")
        _refuse_variants(f)
        f.ignore(IGNORED_FIELDS)
        width, heads = f.whole("hidden_size"), f.whole("num_attention_heads", most=MOST_HEADS)
        head_width = f.whole_or_none("head_dim")
        if head_width is None:
            check_multiple("hidden_size", width, "num_attention_heads", heads)
            head_width = width // heads
        inner = f.whole_or_none("mamba_d_ssm") or f.whole("mamba_expand") * width
        f.ignore(["mamba_expand"])
        config = cls(
            vocabulary=f.whole("vocab_size"),
            width=width,
            layers=f.whole("num_hidden_layers", most=MOST_LAYERS),
            mamba=read_mamba2(f, inner, f.flag("mamba_rms_norm"), f.flag("mamba_norm_before_gate")),
            attention=GroupedShape(heads, f.whole("num_key_value_heads", most=MOST_HEADS), head_width),
            inner=f.whole("intermediate_size"),
            factors=_read_factors(f),
            epsilon=f.number("rms_norm_eps"),
            rope_theta=f.number("rope_theta"),
            tied=f.flag("tie_word_embeddings", False),
            max_positions=f.whole("max_position_embeddings"),
        )
        f.done()
        return config


def _refuse_variants(f: Fields) -> None:
    for name in ("attention_bias", "mlp_bias", "mamba_proj_bias", "projectors_bias"):
        f.accept(name, False)
    f.accept("mamba_conv_bias", True)
    f.accept("mamba_use_mlp", True)
    f.accept("hidden_act", "silu")
    f.accept("attn_layer_indices", None)
    f.accept("rope_scaling", None)
    f.accept("sliding_window", None)


def _read_factors(f: Fields) -> Factors:
    gate, out = _read_numbers(f, "mlp_multipliers", 2)
    return Factors(
        embedding=f.number("embedding_multiplier"),
        logits=f.number("lm_head_multiplier"),
        mamba_in=f.number("ssm_in_multiplier"),
        mamba_out=f.number("ssm_out_multiplier"),
        mamba_parts=_read_numbers(f, "ssm_multipliers", 5),
        attention_in=f.number("attention_in_multiplier"),
        attention_out=f.number("attention_out_multiplier"),
        keys=f.number("key_multiplier"),
        mlp_gate=gate,
        mlp_out=out,
    )


def _read_numbers(f: Fields, name: str, count: int) -> tuple[float, ...]:
    numbers = f.get(name)
    if not isinstance(numbers, list) or len(numbers) != count or not all(is_finite(n) for n in numbers):
        raise ValueError(f"config.json: wanted {name} to be {count} numbers, got {numbers!r}: correct config.json")
    return tuple(float(number) for number in numbers)


# -------------------------------------------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class ScaledSwiGLU:
    """`silu(factor * gate) * up`, computed in float32."""

    factor: float

    def __call__(self, gate_up: Float[Array, "T 2 F"]) -> Float[Array, "T F"]:
        scaled = gate_up.astype(jnp.float32) * jnp.asarray([self.factor, 1.0], jnp.float32)[None, :, None]
        return swiglu(scaled).astype(gate_up.dtype)


class ParallelLayer(nnx.Module):
    """`x + mamba(norm(x)) + attention(norm(x))`, then `x + mlp(norm(x))`, with a factor before and behind each part."""

    def __init__(
        self,
        mamba: Mamba2Mixer,
        attention: GroupedAttention,
        mlp: MLP,
        norm: RMSNorm,
        feed_forward_norm: RMSNorm,
        factors: Factors,
    ):
        self.norm = norm
        self.mamba = mamba
        self.attention = attention
        self.feed_forward_norm = feed_forward_norm
        self.feed_forward = mlp
        self.factors = factors

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """Both kinds: a slot and pages for every layer."""
        return (self.mamba, self.attention)

    def __call__(self, x: Array, rotary: Rotary | None, cache: Cache, batch: RaggedBatch) -> tuple[Array, Cache]:
        by, normed = self.factors, self.norm(x)
        recurrent, cache = self.mamba(normed * by.mamba_in, rotary, cache, batch)
        attended, cache = self.attention(normed * by.attention_in, rotary, cache, batch)
        x = x + recurrent * by.mamba_out + attended * by.attention_out
        return x + self.feed_forward(self.feed_forward_norm(x)) * by.mlp_out, cache


class Model(Decoder):
    """The decoder of this family."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: str = "bfloat16", backend: str = "auto"):
        parts = _Parts(config, rngs, dtype, backend)
        super().__init__(
            Embedding(rngs, config.vocabulary, config.width, dtype, config.factors.embedding),
            [parts.layer() for _ in range(config.layers)],
            parts.norm(),
            None if config.tied else Head(rngs, config.vocabulary, config.width, dtype),
            None,
            tuple(frequencies(config.attention.width, config.rope_theta).tolist()),
        )
        self.logits_factor = config.factors.logits

    def logits(self, hidden: Float[Array, "B D"]) -> Float[Array, "B Y"]:
        """Scores of the next token from hidden states after the final norm, float32."""
        return super().logits(hidden) * self.logits_factor


class _Parts:
    """Builds the parts of one model."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: str, backend: str):
        self.config, self.rngs, self.dtype = config, rngs, dtype
        self.backend = backend

    def norm(self) -> RMSNorm:
        return RMSNorm(self.config.width, self.config.epsilon)

    def layer(self) -> ParallelLayer:
        config = self.config
        mlp = MLP(self.rngs, config.width, config.inner, self.dtype, ScaledSwiGLU(config.factors.mlp_gate))
        return ParallelLayer(self._mamba(), self._attention(), mlp, self.norm(), self.norm(), config.factors)

    def _mamba(self) -> Mamba2Mixer:
        config, parts = self.config, self.config.factors.mamba_parts
        return Mamba2Mixer(self.rngs, config.width, config.mamba, config.epsilon, self.dtype, self.backend, parts)

    def _attention(self) -> GroupedAttention:
        config, shape = self.config, self.config.attention
        scale = shape.width**-0.5 * config.factors.keys  # scores are linear in the keys
        return GroupedAttention(self.rngs, config.width, shape, None, True, scale, self.dtype, self.backend)


# ------------------------------------------------------------------------------------------------------------- weights


def weight_table(config: Config) -> WeightTable:
    """Our parameters and the published tensors."""
    rows = trunk_rows("model.embed_tokens.weight", "model.final_layernorm.weight", config.tied)
    for index in range(config.layers):
        rows += _layer_rows(config, f"layers.{index}", f"model.layers.{index}")
    return WeightTable(tuple(rows), canonical)


def canonical(name: str) -> str | None:
    """Names need no change."""
    return name


def _layer_rows(config: Config, ours: str, theirs: str) -> list[Weight]:
    return [
        weight(f"{ours}.norm.scale", f"{theirs}.input_layernorm.weight", "d -> d"),
        *mamba2_rows(config.mamba, f"{ours}.mamba", f"{theirs}.mamba"),
        *attention_rows(f"{ours}.attention", f"{theirs}.self_attn"),
        weight(f"{ours}.feed_forward_norm.scale", f"{theirs}.pre_ff_layernorm.weight", "d -> d"),
        *mlp_rows(f"{ours}.feed_forward", f"{theirs}.feed_forward"),
    ]
