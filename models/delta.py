"""The mixer of the gated delta rule: sizes, products, weights of the op, memory. Knows no family."""

from dataclasses import dataclass

from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas.gdn import GDN, GDNWeights
from kernels_pallas.op import ArraySpec, Cache, Memory, Place, RaggedBatch, StateSpec
from kernels_pallas.rotary import Rotary
from models.division import Divisible
from models.hf_fields import MOST_HEADS, Fields, check_multiple
from models.layers import Linear, RMSNorm, matrix, vector
from models.weights import Source, Weight, weight


@dataclass(frozen=True)
class DeltaShape:
    """Widths of a gated delta rule: key heads, value heads, their widths, width of the convolution."""

    key_heads: int
    heads: int
    key_width: int
    value_width: int
    convolution: int

    @property
    def parts(self) -> tuple[int, ...]:
        """Channels of a key head in the convolution: its query, its key, the values of the heads that read it."""
        return self.key_width, self.key_width, self.heads // self.key_heads * self.value_width

    @property
    def projected(self) -> tuple[int, ...]:
        """Channels that are projected for a key head: those, and the output gates of its value heads."""
        return *self.parts, self.parts[-1]

    @property
    def channels(self) -> tuple[int, int]:
        """Channels of the convolution, by key head: key heads, channels of each."""
        return self.key_heads, sum(self.parts)


def read_delta(f: Fields) -> DeltaShape:
    """The sizes, from the fields that the Qwen families share."""
    shape = DeltaShape(
        f.whole("linear_num_key_heads", most=MOST_HEADS),
        f.whole("linear_num_value_heads", most=MOST_HEADS),
        f.whole("linear_key_head_dim"),
        f.whole("linear_value_head_dim"),
        f.whole("linear_conv_kernel_dim", least=2),
    )
    check_multiple("linear_num_value_heads", shape.heads, "linear_num_key_heads", shape.key_heads)
    return shape


class DeltaAttention(Divisible):
    """The gated delta rule between two products with the residual stream.

    Its inputs lie packed per key head, `[q | k | v.. | z..]` and `[b.. | a..]`, the dots standing for the value heads
    that read the key head: a share of the heads is one range, and a step multiplies by two matrices instead of by six.
    `epsilon` is that of the output norm; `beta_scale` multiplies the strength of the update.
    """

    kind = GDN.name

    def __init__(
        self,
        rngs: nnx.Rngs,
        width: int,
        shape: DeltaShape,
        epsilon: float,
        dtype: str,
        backend: str,
        beta_scale: float = 1.0,
    ):
        heads, kernel = shape.heads, (shape.convolution, *shape.channels)
        axes = ("model", "delta_heads", None)
        self.projection = Linear(rngs, (width,), (shape.key_heads, sum(shape.projected)), axes, dtype)
        self.gates = Linear(rngs, (width,), (shape.key_heads, 2, heads // shape.key_heads), (*axes, None), dtype)
        self.convolution = matrix(rngs, kernel, (None, "delta_heads", None), shape.convolution, "float32")
        self.decay_log = vector(0.0, (heads,), ("delta_heads",))
        self.decay_bias = vector(1.0, (heads,), ("delta_heads",))
        self.output_norm = RMSNorm(shape.value_width, epsilon)
        self.output = Linear(rngs, (heads * shape.value_width,), (width,), ("delta_heads", "model"), dtype)
        self.epsilon = epsilon
        self.beta_scale = beta_scale
        state = ArraySpec("state", (heads, shape.value_width, shape.key_width), "float32", ("delta_heads", None, None))
        tail = (shape.convolution - 1, shape.key_heads * sum(shape.parts))
        self.memory: Memory = StateSpec((state, ArraySpec("tail", tail, dtype, (None, "delta_heads"))))
        self.place = Place(0, 0)
        self.backend = GDN.choose(backend, self.memory, dtype)

    def __call__(
        self, x: Float[Array, "T D"], rotary: Rotary | None, cache: Cache, batch: RaggedBatch
    ) -> tuple[Float[Array, "T D"], Cache]:
        kernel = self.convolution[...]
        weights = GDNWeights(
            kernel.reshape(kernel.shape[0], -1), self.decay_log[...], self.decay_bias[...], self.output_norm.weight
        )
        state, tail = cache.slots(self.place)
        op = self.division.op(GDN, self.backend, {"epsilon": self.epsilon, "beta_scale": self.beta_scale})
        out, state, tail = op(self.projection(x), self.gates(x), weights, state, tail, self.place.layer, batch)
        return self.output(out), cache.updated(self.place, (state, tail))


def delta_rows(shape: DeltaShape, ours: str, theirs: str) -> list[Weight]:
    """Rows of what lies between the two products and after, published with one convolution over all channels."""
    convolution = Source((f"{theirs}.conv1d.weight",), "(g p) 1 w -> w g p", dealt=shape.parts)
    return [
        Weight(f"{ours}.convolution", (convolution,)),
        weight(f"{ours}.decay_log", f"{theirs}.A_log", "h -> h"),
        weight(f"{ours}.decay_bias", f"{theirs}.dt_bias", "h -> h"),
        weight(f"{ours}.output_norm.scale", f"{theirs}.norm.weight", "v -> v"),
        weight(f"{ours}.output.kernel", f"{theirs}.out_proj.weight", "d v -> v d"),
    ]
