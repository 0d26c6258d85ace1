"""OLMo hybrid: gated delta rule that may reverse what a key recalls, with softmax attention in some layers.

Layers of the delta rule norm the input of each branch, layers of softmax attention its output. Definition: the
`olmo_hybrid` classes of transformers.
"""

from dataclasses import dataclass
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas.gqa import GQA, GQAWeights
from kernels_pallas.op import Cache, Memory, Place, RaggedBatch
from kernels_pallas.rotary import Rotary, frequencies
from models.attention import GroupedShape, kept_heads, repeated
from models.decoder import Decoder, Layer, Mixer
from models.delta import DeltaAttention, DeltaShape
from models.division import Divisible, Division
from models.hf_fields import MOST_HEADS, MOST_LAYERS, Fields, check_multiple
from models.layers import MLP, Embedding, Head, Linear, RMSNorm
from models.qwen3_5 import FULL, LINEAR
from models.weights import Source, Weight, WeightTable, mlp_rows, trunk_rows, weight

ARCHITECTURES = ("OlmoHybridForCausalLM",)

DELTA_EPSILON = 1e-5  # of the norm inside the delta rule, whatever the model's other norms use


@dataclass(frozen=True)
class Config:
    """What the network computes, read from a published config. `rope_theta` is None for a model without positions."""

    vocabulary: int
    width: int
    kinds: tuple[str, ...]
    attention: GroupedShape
    delta: DeltaShape
    beta_scale: float
    dense_width: int
    epsilon: float
    rope_theta: float | None
    tied: bool
    max_positions: int

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "Config":
        """Read a config.json. Raises ValueError for a missing or unknown field, or a value that is not implemented."""
        f = Fields(hf, "config.json of OlmoHybridForCausalLM")
        f.accept("hidden_act", "silu")
        f.accept("attention_bias", False)
        f.accept("rope_scaling", None)
        width, heads = f.whole("hidden_size"), f.whole("num_attention_heads", most=MOST_HEADS)
        config = cls(
            vocabulary=f.whole("vocab_size"),
            width=width,
            kinds=_read_kinds(f),
            attention=_read_attention(f, width, heads),
            delta=_read_delta(f, width, heads),
            beta_scale=2.0 if f.flag("linear_allow_neg_eigval", True) else 1.0,
            dense_width=f.whole("intermediate_size"),
            epsilon=f.number("rms_norm_eps"),
            rope_theta=_read_theta(f),
            tied=f.flag("tie_word_embeddings", False),
            max_positions=f.whole("max_position_embeddings"),
        )
        f.done()
        return config


def _read_kinds(f: Fields) -> tuple[str, ...]:
    return f.words("layer_types", (LINEAR, FULL), f.whole("num_hidden_layers", most=MOST_LAYERS))


def _read_attention(f: Fields, width: int, heads: int) -> GroupedShape:
    key_heads = f.whole_or_none("num_key_value_heads", most=MOST_HEADS) or heads
    check_multiple("hidden_size", width, "num_attention_heads", heads)
    f.equal("head_dim", width // heads)
    return GroupedShape(heads, key_heads, width // heads)


def _read_delta(f: Fields, width: int, attention_heads: int) -> DeltaShape:
    """Widths of the delta rule; what a config leaves out follows from the model's width and heads."""
    key_heads = f.whole_or_none("linear_num_key_heads", most=MOST_HEADS) or attention_heads
    key_width = f.whole_or_none("linear_key_head_dim") or int(0.75 * width / key_heads)
    shape = DeltaShape(
        key_heads,
        f.whole_or_none("linear_num_value_heads", most=MOST_HEADS) or attention_heads,
        key_width,
        f.whole_or_none("linear_value_head_dim") or 2 * key_width,
        f.whole("linear_conv_kernel_dim", 4, least=2),
    )
    check_multiple("linear_num_value_heads", shape.heads, "linear_num_key_heads", key_heads)
    if key_width < 1:
        raise ValueError(f"config.json: wanted linear_key_head_dim of at least 1, got {key_width} of width {width}")
    return shape


def _read_theta(f: Fields) -> float | None:
    """Base of the rotary frequencies; None where the section is null."""
    if f.get("rope_parameters") is None:
        return None
    rope = Fields(f.section("rope_parameters"), "rope_parameters of config.json")
    rope.accept("rope_type", "default")
    theta = rope.number("rope_theta") if rope.get("rope_theta") is not None else None
    rope.done()
    return theta


class JointNormAttention(Divisible):
    """GQA whose queries are normed over all heads together, and so are its keys. `rotated`: rotary on half pairs."""

    kind = GQA.name

    def __init__(
        self, rngs: nnx.Rngs, width: int, shape: GroupedShape, epsilon: float, rotated: bool, dtype: str, backend: str
    ):
        queries, keys = shape.heads * shape.width, shape.key_heads * shape.width
        kept = (shape.key_heads, shape.width)
        self.query = Linear(rngs, (width,), (shape.heads, shape.width), ("model", "heads", None), dtype)
        self.key = Linear(rngs, (width,), kept, ("model", "kv_heads", None), dtype)
        self.value = Linear(rngs, (width,), kept, ("model", "kv_heads", None), dtype)
        self.query_norm = RMSNorm(queries, epsilon, axis="heads")
        self.key_norm = RMSNorm(keys, epsilon, axis="kv_heads")
        self.output = Linear(rngs, (queries,), (width,), ("heads", "model"), dtype)
        self.shape = shape
        self.epsilon = epsilon
        self.rotated = rotated
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
        (pages,) = cache.pages(self.place)
        out, pages = self.division.op(
            GQA, self.backend, {"scale": self.shape.width ** (-0.5), "epsilon": self.epsilon}
        )(
            _normed(self.query_norm, self.query(x)),
            repeated(_normed(self.key_norm, self.key(x)), self.memory),
            repeated(self.value(x), self.memory),
            None,
            GQAWeights(),
            rotary if self.rotated else None,
            pages,
            self.place.layer,
            batch,
        )
        return self.output(out), cache.updated(self.place, (pages,))


def _normed(norm: RMSNorm, heads: Float[Array, "T H K"]) -> Float[Array, "T H K"]:
    return norm(heads.reshape(heads.shape[0], -1)).reshape(heads.shape)


class OutputNormLayer(nnx.Module):
    """`x + norm(mixer(x))`, then `x + norm(feed_forward(x))`."""

    def __init__(self, mixer: Mixer, feed_forward: nnx.Module, norm: RMSNorm, feed_forward_norm: RMSNorm):
        self.mixer = mixer
        self.norm = norm
        self.feed_forward = feed_forward
        self.feed_forward_norm = feed_forward_norm

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """What mixes tokens in this layer."""
        return (self.mixer,)

    def __call__(self, x: Array, rotary: Rotary | None, cache: Cache, batch: RaggedBatch) -> tuple[Array, Cache]:
        mixed, cache = self.mixer(x, rotary, cache, batch)
        x = x + self.norm(mixed)
        return x + self.feed_forward_norm(self.feed_forward(x)), cache


class Model(Decoder):
    """The decoder of this family."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: str = "bfloat16", backend: str = "auto"):
        parts = _Parts(config, rngs, dtype, backend)
        theta = config.rope_theta
        super().__init__(
            Embedding(rngs, config.vocabulary, config.width, dtype),
            [parts.attention_layer() if kind == FULL else parts.delta_layer() for kind in config.kinds],
            RMSNorm(config.width, config.epsilon),
            None if config.tied else Head(rngs, config.vocabulary, config.width, dtype),
            None,
            None if theta is None else tuple(frequencies(config.attention.width, theta).tolist()),
        )


class _Parts:
    """Builds the parts of one model."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: str, backend: str):
        self.config, self.rngs, self.dtype = config, rngs, dtype
        self.backend = backend

    def attention_layer(self) -> OutputNormLayer:
        config, rotated = self.config, self.config.rope_theta is not None
        mixer = JointNormAttention(
            self.rngs, config.width, config.attention, config.epsilon, rotated, self.dtype, self.backend
        )
        return OutputNormLayer(mixer, self._mlp(), self._norm(), self._norm())

    def delta_layer(self) -> Layer:
        config = self.config
        mixer = DeltaAttention(
            self.rngs, config.width, config.delta, DELTA_EPSILON, self.dtype, self.backend, config.beta_scale
        )
        return Layer(mixer, self._mlp(), self._norm(), self._norm())

    def _mlp(self) -> MLP:
        return MLP(self.rngs, self.config.width, self.config.dense_width, self.dtype)

    def _norm(self) -> RMSNorm:
        return RMSNorm(self.config.width, self.config.epsilon)


# ------------------------------------------------------------------------------------------------------------- weights


def weight_table(config: Config) -> WeightTable:
    """Our parameters and the published tensors."""
    rows = trunk_rows("model.embed_tokens.weight", "model.norm.weight", config.tied)
    for index, kind in enumerate(config.kinds):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        rows += _attention_rows(ours, theirs) if kind == FULL else _delta_rows(config.delta, ours, theirs)
        rows += mlp_rows(f"{ours}.feed_forward", f"{theirs}.mlp")
    return WeightTable(tuple(rows), canonical)


def canonical(name: str) -> str | None:
    """Names need no change."""
    return name


def _norm_row(path: str, layer: str, name: str, *others: str) -> Weight:
    """A norm under the usual name, and under those that some releases give it."""
    more = [Source((f"{layer}.{other}.weight",), "d -> d") for other in others]
    return weight(path, f"{layer}.{name}.weight", "d -> d", *more)


def _attention_rows(ours: str, theirs: str) -> list[Weight]:
    mixer, tensors = f"{ours}.mixer", f"{theirs}.self_attn"
    return [
        _norm_row(f"{ours}.norm.scale", theirs, "post_attention_layernorm", "feedforward_layer_norm"),
        _norm_row(f"{ours}.feed_forward_norm.scale", theirs, "post_feedforward_layernorm"),
        weight(f"{mixer}.query.kernel", f"{tensors}.q_proj.weight", "(h k) d -> d h k"),
        weight(f"{mixer}.key.kernel", f"{tensors}.k_proj.weight", "(g k) d -> d g k"),
        weight(f"{mixer}.value.kernel", f"{tensors}.v_proj.weight", "(g k) d -> d g k"),
        weight(f"{mixer}.query_norm.scale", f"{tensors}.q_norm.weight", "v -> v"),
        weight(f"{mixer}.key_norm.scale", f"{tensors}.k_norm.weight", "v -> v"),
        weight(f"{mixer}.output.kernel", f"{tensors}.o_proj.weight", "d v -> v d"),
    ]


def _delta_rows(shape: DeltaShape, ours: str, theirs: str) -> list[Weight]:
    mixer, tensors = f"{ours}.mixer", f"{theirs}.linear_attn"
    keys, values = shape.key_heads * shape.key_width, shape.heads * shape.value_width
    projection = Source(
        tuple(f"{tensors}.{part}_proj.weight" for part in "qkvg"),
        "(g p) d -> d g p",
        joined=(keys, keys, values, values),
        dealt=shape.projected,
    )
    gates = Source(tuple(f"{tensors}.{part}_proj.weight" for part in "ba"), "c (g r) d -> d g c r", (2,))
    convolution = Source(
        tuple(f"{tensors}.{part}_conv1d.weight" for part in "qkv"),
        "(g p) 1 w -> w g p",
        joined=(keys, keys, values),
        dealt=shape.parts,
    )
    return [
        _norm_row(f"{ours}.norm.scale", theirs, "input_layernorm", "attention_layer_norm"),
        _norm_row(f"{ours}.feed_forward_norm.scale", theirs, "post_attention_layernorm", "feedforward_layer_norm"),
        Weight(f"{mixer}.projection.kernel", (projection,)),
        Weight(f"{mixer}.gates.kernel", (gates,)),
        Weight(f"{mixer}.convolution", (convolution,)),
        weight(f"{mixer}.decay_log", f"{tensors}.A_log", "h -> h"),
        weight(f"{mixer}.decay_bias", f"{tensors}.dt_bias", "h -> h"),
        weight(f"{mixer}.output_norm.scale", f"{tensors}.o_norm.weight", "v -> v"),
        weight(f"{mixer}.output.kernel", f"{tensors}.o_proj.weight", "d v -> v d"),
    ]
