"""Kimi-Linear: Kimi delta attention with a latent-attention layer without positions after every third.

Sigmoid-gated mixture of experts after the first dense layers. No layer knows positions but through the recurrence: the
latent attention keeps the channels that others rotate and leaves them as they are. Definition: the `kimi_linear` class
of transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas.kda import KDA, Decay, KDAWeights, SoftplusDecay
from kernels_pallas.op import ArraySpec, Cache, Memory, Place, RaggedBatch, StateSpec
from kernels_pallas.rotary import Rotary
from models.attention import LatentAttention, LatentShape
from models.decoder import Decoder, Layer
from models.division import Divisible
from models.hf_fields import MOST_EXPERTS, MOST_HEADS, MOST_LAYERS, Fields
from models.layers import MLP, Axes, Embedding, Head, Linear, RMSNorm, matrix, vector
from models.moe import BiasedRouter, Experts, GroupedSigmoid, MoE, SharedExpert
from models.weights import NUMBERED, Source, Weight, WeightTable, expert_rows, latent_rows, mlp_rows, trunk_rows, weight

ARCHITECTURES = ("KimiLinearForCausalLM",)

# Rotary settings of layers that do not rotate, key heads of layers that are multi-head whatever they say, and a width
# of heads that neither kind of layers uses.
IGNORED_FIELDS = ("rope_theta", "num_key_value_heads", "head_dim")


@dataclass(frozen=True)
class DeltaShape:
    """Widths of a Kimi delta attention: heads, width of queries, keys and values, width of the convolution."""

    heads: int
    width: int
    convolution: int


@dataclass(frozen=True)
class Config:
    """What the network computes, read from a published config. `full[i]`: layer i is latent attention."""

    vocabulary: int
    width: int
    full: tuple[bool, ...]
    delta: DeltaShape
    latent: LatentShape
    epsilon: float
    dense_layers: int
    dense_width: int
    experts: int
    expert_width: int
    shared_experts: int
    router: GroupedSigmoid
    tied: bool
    max_positions: int

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "Config":
        """Read a config.json. Raises ValueError for a missing or unknown field, or a value that is not implemented."""
        f = Fields(hf, "config.json of KimiLinearForCausalLM")
        _refuse_variants(f)
        f.ignore(IGNORED_FIELDS)
        full, delta = _read_linear(f.section("linear_attn_config"), f.whole("num_hidden_layers", most=MOST_LAYERS))
        experts, router = f.whole("num_experts", most=MOST_EXPERTS), _read_router(f)
        router.check(experts)
        config = cls(
            vocabulary=f.whole("vocab_size"),
            width=f.whole("hidden_size"),
            full=full,
            delta=delta,
            latent=_read_latent(f),
            epsilon=f.number("rms_norm_eps"),
            dense_layers=f.whole("first_k_dense_replace", least=0),
            dense_width=f.whole("intermediate_size"),
            experts=experts,
            expert_width=f.whole("moe_intermediate_size"),
            shared_experts=f.whole("num_shared_experts", most=MOST_EXPERTS),
            router=router,
            tied=f.flag("tie_word_embeddings", False),
            max_positions=f.whole("model_max_length"),
        )
        f.done()
        return config


def _refuse_variants(f: Fields) -> None:
    f.accept("hidden_act", "silu")
    f.get("mla_use_nope")  # must be there: its default is the value that is refused
    f.accept("mla_use_nope", True)
    f.accept("q_lora_rank", None)
    f.accept("rope_scaling", None)
    f.accept("moe_layer_freq", 1)
    f.accept("moe_router_activation_func", "sigmoid")
    f.accept("use_grouped_topk", True)
    f.accept("num_nextn_predict_layers", 0)


def _read_linear(section: dict[str, Any], layers: int) -> tuple[tuple[bool, ...], DeltaShape]:
    """Which layers are latent attention, from two lists that count layers from 1, and the shape of the others."""
    f = Fields(section, "linear_attn_config of config.json")
    linear, full = (f.wholes(name, 1, layers) for name in ("kda_layers", "full_attn_layers"))
    shape = DeltaShape(
        f.whole("num_heads", most=MOST_HEADS), f.whole("head_dim"), f.whole("short_conv_kernel_size", least=2)
    )
    f.done()
    if sorted(linear + full) != list(range(1, layers + 1)):
        raise ValueError(
            f"config.json: wanted every layer of 1 to {layers} once in kda_layers or full_attn_layers, got "
            f"{list(linear)} and {list(full)}"
        )
    chosen = frozenset(full)
    return tuple(layer in chosen for layer in range(1, layers + 1)), shape


def _read_latent(f: Fields) -> LatentShape:
    return LatentShape(
        f.whole("num_attention_heads", most=MOST_HEADS),
        None,
        f.whole("kv_lora_rank"),
        f.whole("qk_nope_head_dim"),
        f.whole("qk_rope_head_dim"),
        f.whole("v_head_dim"),
    )


def _read_router(f: Fields) -> GroupedSigmoid:
    return GroupedSigmoid(
        f.whole("num_experts_per_token"),
        f.whole("num_expert_group"),
        f.whole("topk_group"),
        f.flag("moe_renormalize"),
        f.number("routed_scaling_factor"),
    )


class LowRank(nnx.Module):
    """Two products with nothing between them: a matrix of limited rank."""

    def __init__(self, rngs: nnx.Rngs, width: int, rank: int, outputs: tuple[int, ...], axes: Axes, dtype: str):
        self.down = Linear(rngs, (width,), (rank,), ("model", None), dtype)
        self.up = Linear(rngs, (rank,), outputs, (None, *axes), dtype)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T *o"]:
        return self.up(self.down(x))


class DeltaAttention(Divisible):
    """Kimi delta attention between its projections.

    `decay_gate` and `output_gate` project to `[T, H, K]`, each in the way of its family; `decay` makes a log decay of
    the first.
    """

    kind = KDA.name

    def __init__(
        self,
        rngs: nnx.Rngs,
        width: int,
        shape: DeltaShape,
        decay: Decay,
        decay_gate: Callable[[Array], Array],
        output_gate: Callable[[Array], Array],
        epsilon: float,
        dtype: str,
        backend: str,
    ):
        heads, inner, axes = (shape.heads, shape.width), shape.heads * shape.width, ("delta_heads", None)
        mixed = (shape.heads, 3, shape.width)
        self.query_key_value = Linear(rngs, (width,), mixed, ("model", "delta_heads", None, None), dtype)
        self.update_gate = Linear(rngs, (width,), (shape.heads,), ("model", "delta_heads"), dtype)
        self.decay_gate = decay_gate
        self.output_gate = output_gate
        kernel = (shape.convolution, *mixed)
        self.convolution = matrix(rngs, kernel, (None, "delta_heads", None, None), shape.convolution, "float32")
        self.decay_log = vector(0.0, (shape.heads,), ("delta_heads",))
        self.decay_bias = vector(1.0, heads, axes)
        self.output_norm = RMSNorm(shape.width, epsilon)
        self.output = Linear(rngs, (inner,), (width,), ("delta_heads", "model"), dtype)
        self.decay = decay
        self.epsilon = epsilon
        state = ArraySpec("state", (shape.heads, shape.width, shape.width), "float32", (*axes, None))
        tail = ArraySpec("tail", (shape.convolution - 1, 3 * inner), dtype, (None, "delta_heads"))
        self.memory: Memory = StateSpec((state, tail))
        self.place = Place(0, 0)
        self.backend = KDA.choose(backend, self.memory, dtype)

    def __call__(
        self, x: Float[Array, "T D"], rotary: Rotary | None, cache: Cache, batch: RaggedBatch
    ) -> tuple[Float[Array, "T D"], Cache]:
        kernel = self.convolution[...]
        weights = KDAWeights(
            kernel.reshape(kernel.shape[0], -1), self.decay_log[...], self.decay_bias[...], self.output_norm.weight
        )
        state, tail = cache.slots(self.place)
        out, state, tail = self.division.op(KDA, self.backend, {"decay": self.decay, "epsilon": self.epsilon})(
            self.query_key_value(x).reshape(x.shape[0], -1),
            self.decay_gate(x),
            self.update_gate(x),
            self.output_gate(x),
            weights,
            state,
            tail,
            self.place.layer,
            batch,
        )
        return self.output(out), cache.updated(self.place, (state, tail))


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
            None,
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
        feed_forward = MLP(self.rngs, config.width, config.dense_width, self.dtype) if dense else self._moe()
        return Layer(mixer, feed_forward, RMSNorm(config.width, config.epsilon), RMSNorm(config.width, config.epsilon))

    def _delta(self) -> DeltaAttention:
        config, shape = self.config, self.config.delta
        return DeltaAttention(
            self.rngs,
            config.width,
            shape,
            SoftplusDecay(),
            self._gate(),
            self._gate(),
            config.epsilon,
            self.dtype,
            self.backend,
        )

    def _gate(self) -> LowRank:
        shape = self.config.delta
        outputs = (shape.heads, shape.width)
        return LowRank(self.rngs, self.config.width, shape.width, outputs, ("delta_heads", None), self.dtype)

    def _latent(self) -> LatentAttention:
        shape = self.config.latent
        scale = (shape.plain_width + shape.rotary_width) ** -0.5
        return LatentAttention(self.rngs, self.config.width, shape, scale, self.dtype, self.backend, rotated=False)

    def _moe(self) -> MoE:
        config, rngs, dtype = self.config, self.rngs, self.dtype
        shared = SharedExpert(rngs, config.width, config.expert_width * config.shared_experts, dtype)
        experts = Experts(rngs, config.experts, config.width, config.expert_width, dtype, backend=self.backend)
        return MoE(BiasedRouter(rngs, config.width, config.experts, config.router, dtype), experts, shared)


# ------------------------------------------------------------------------------------------------------------- weights


def weight_table(config: Config) -> WeightTable:
    """Our parameters and the published tensors."""
    rows = trunk_rows("model.embed_tokens.weight", "model.norm.weight", config.tied)
    for index, full in enumerate(config.full):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        dense = index < config.dense_layers
        rows += [
            weight(f"{ours}.norm.scale", f"{theirs}.input_layernorm.weight", "d -> d"),
            weight(f"{ours}.feed_forward_norm.scale", f"{theirs}.post_attention_layernorm.weight", "d -> d"),
            *(_latent_rows if full else _delta_rows)(f"{ours}.mixer", f"{theirs}.self_attn"),
            *(_dense_rows(ours, theirs) if dense else _moe_rows(config, ours, theirs)),
        ]
    return WeightTable(tuple(rows), canonical)


def canonical(name: str) -> str | None:
    """Names need no change."""
    return name


def _latent_rows(ours: str, theirs: str) -> list[Weight]:
    return latent_rows(ours, theirs, False, "o_proj")


def _delta_rows(ours: str, theirs: str) -> list[Weight]:
    rows = delta_rows(ours, theirs, "o_proj", "1 1 h 1 -> h")
    for part, letter in (("decay_gate", "f"), ("output_gate", "g")):
        rows += [
            weight(f"{ours}.{part}.down.kernel", f"{theirs}.{letter}_a_proj.weight", "r d -> d r"),
            weight(f"{ours}.{part}.up.kernel", f"{theirs}.{letter}_b_proj.weight", "(h k) r -> r h k"),
        ]
    return rows


def delta_rows(ours: str, theirs: str, output: str, decay_log: str) -> list[Weight]:
    """Rows of a Kimi delta attention without its decay and output gates.

    `output` is the published name of its last projection, `decay_log` the pattern of its `A_log`.
    """
    projections = tuple(f"{theirs}.{part}_proj.weight" for part in "qkv")
    convolutions = tuple(f"{theirs}.{part}_conv1d.weight" for part in "qkv")
    return [
        Weight(f"{ours}.query_key_value.kernel", (Source(projections, "c (h k) d -> d h c k", (3,)),)),
        Weight(f"{ours}.convolution", (Source(convolutions, "c (h k) 1 w -> w h c k", (3,)),)),
        weight(f"{ours}.update_gate.kernel", f"{theirs}.b_proj.weight", "h d -> d h"),
        weight(f"{ours}.decay_log", f"{theirs}.A_log", decay_log),
        weight(f"{ours}.decay_bias", f"{theirs}.dt_bias", "(h k) -> h k"),
        weight(f"{ours}.output_norm.scale", f"{theirs}.o_norm.weight", "v -> v"),
        weight(f"{ours}.output.kernel", f"{theirs}.{output}.weight", "d v -> v d"),
    ]


def _dense_rows(ours: str, theirs: str) -> list[Weight]:
    """A dense layer's MLP, published under its own name or, as transformers saves it, under that of the experts."""
    ours = f"{ours}.feed_forward"
    spellings = zip(mlp_rows(ours, f"{theirs}.mlp"), mlp_rows(ours, f"{theirs}.block_sparse_moe"), strict=True)
    return [Weight(usual.path, usual.sources + other.sources) for usual, other in spellings]


def _moe_rows(config: Config, ours: str, theirs: str) -> list[Weight]:
    ours, theirs = f"{ours}.feed_forward", f"{theirs}.block_sparse_moe"
    return [
        weight(f"{ours}.router.scores.kernel", f"{theirs}.gate.weight", "e d -> d e"),
        weight(f"{ours}.router.bias", f"{theirs}.gate.e_score_correction_bias", "e -> e"),
        *expert_rows(f"{ours}.experts", f"{theirs}.experts", config.experts, NUMBERED),
        *mlp_rows(f"{ours}.shared.mlp", f"{theirs}.shared_experts"),
    ]
