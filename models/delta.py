"""The gated delta rule between the projections of a family: sizes, weights of the op, memory, output projection.

Knows no family: how the channels and gates are projected is the family's business.
"""

from dataclasses import dataclass

from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas.gdn import GDN, GDNWeights
from kernels_pallas.op import ArraySpec, Cache, Memory, Place, RaggedBatch, StateSpec
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


class DeltaCore(Divisible):
    """The gated delta rule between its input projections and the model: weights of the op, memory, output projection.

    `epsilon` is that of the output norm; `beta_scale` multiplies the strength of the update.
    """

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
        self.convolution = matrix(rngs, kernel, (None, "delta_heads", None), shape.convolution, "float32")
        self.decay_log = vector(0.0, (heads,), ("delta_heads",))
        self.decay_bias = vector(1.0, (heads,), ("delta_heads",))
        self.output_norm = RMSNorm(shape.value_width, epsilon)
        self.output = Linear(rngs, (heads * shape.value_width,), (width,), ("delta_heads", "model"), dtype)
        self.key_heads = shape.key_heads
        self.epsilon = epsilon
        self.beta_scale = beta_scale
        axes = ("delta_heads", None, None)
        state = ArraySpec("state", (heads, shape.value_width, shape.key_width), "float32", axes)
        tail = (shape.convolution - 1, shape.key_heads * sum(shape.parts))
        self.memory: Memory = StateSpec((state, ArraySpec("tail", tail, dtype, (None, "delta_heads"))))
        self.backend = GDN.choose(backend, self.memory, dtype)

    def __call__(
        self,
        mixed: Float[Array, "T G c"],
        z: Float[Array, "T H V"],
        b: Float[Array, "T H"],
        a: Float[Array, "T H"],
        place: Place,
        cache: Cache,
        batch: RaggedBatch,
    ) -> tuple[Float[Array, "T D"], Cache]:
        kernel = self.convolution[...]
        weights = GDNWeights(
            kernel.reshape(kernel.shape[0], -1), self.decay_log[...], self.decay_bias[...], self.output_norm.weight
        )
        state, tail = cache.slots(place)
        out, state, tail = self.division.op(
            GDN, self.backend, {"key_heads": self.key_heads, "epsilon": self.epsilon, "beta_scale": self.beta_scale}
        )(mixed.reshape(mixed.shape[0], -1), z, b, a, weights, state, tail, place.layer, batch)
        return self.output(out), cache.updated(place, (state, tail))


def core_rows(shape: DeltaShape, ours: str, theirs: str) -> list[Weight]:
    """Rows of a `DeltaCore` with one convolution over all channels, in a weight table."""
    convolution = Source((f"{theirs}.conv1d.weight",), "(g p) 1 w -> w g p", dealt=shape.parts)
    return [
        Weight(f"{ours}.convolution", (convolution,)),
        weight(f"{ours}.decay_log", f"{theirs}.A_log", "h -> h"),
        weight(f"{ours}.decay_bias", f"{theirs}.dt_bias", "h -> h"),
        weight(f"{ours}.output_norm.scale", f"{theirs}.norm.weight", "v -> v"),
        weight(f"{ours}.output.kernel", f"{theirs}.out_proj.weight", "d v -> v d"),
    ]
