"""The gated delta rule between the projections of a family: sizes, weights of the op, memory, output projection.

Knows no family: how the channels and gates are projected is the family's business.
"""

from dataclasses import dataclass

from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas.gdn import GDN, GDNWeights
from kernels_pallas.op import ArraySpec, Cache, Memory, Place, RaggedBatch, StateSpec
from models.hf_fields import MOST_HEADS, Fields, check_multiple
from models.layers import Linear, RMSNorm, matrix, vector
from models.weights import Weight, weight


@dataclass(frozen=True)
class DeltaShape:
    """Widths of a gated delta rule: key heads, value heads, their widths, width of the convolution."""

    key_heads: int
    heads: int
    key_width: int
    value_width: int
    convolution: int

    @property
    def channels(self) -> int:
        """Channels of the convolution: all queries, all keys, all values."""
        return 2 * self.key_heads * self.key_width + self.heads * self.value_width


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


class DeltaCore(nnx.Module):
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
        heads, kernel = shape.heads, (shape.convolution, shape.channels)
        self.convolution = matrix(rngs, kernel, (None, "delta_channels"), shape.convolution, "float32")
        self.decay_log = vector(0.0, (heads,), ("heads",))
        self.decay_bias = vector(1.0, (heads,), ("heads",))
        self.output_norm = RMSNorm(shape.value_width, epsilon)
        self.output = Linear(rngs, (heads * shape.value_width,), (width,), ("heads", "model"), dtype)
        self.key_heads = shape.key_heads
        self.epsilon = epsilon
        self.beta_scale = beta_scale
        state = ArraySpec("state", (heads, shape.value_width, shape.key_width), "float32")
        self.memory: Memory = StateSpec((state, ArraySpec("tail", (shape.convolution - 1, shape.channels), dtype)))
        self.backend = GDN.choose(backend, self.memory, dtype)

    def __call__(
        self,
        mixed: Float[Array, "T c"],
        z: Float[Array, "T H V"],
        b: Float[Array, "T H"],
        a: Float[Array, "T H"],
        place: Place,
        cache: Cache,
        batch: RaggedBatch,
    ) -> tuple[Float[Array, "T D"], Cache]:
        weights = GDNWeights(self.convolution[...], self.decay_log[...], self.decay_bias[...], self.output_norm.weight)
        state, tail = cache.slots(place)
        out, state, tail = GDN.on(self.backend)(
            mixed,
            z,
            b,
            a,
            weights,
            state,
            tail,
            place.layer,
            batch,
            key_heads=self.key_heads,
            epsilon=self.epsilon,
            beta_scale=self.beta_scale,
        )
        return self.output(out), cache.updated(place, (state, tail))


def core_rows(ours: str, theirs: str) -> list[Weight]:
    """Rows of a `DeltaCore` with one convolution over all channels, in a weight table."""
    return [
        weight(f"{ours}.convolution", f"{theirs}.conv1d.weight", "c 1 w -> w c"),
        weight(f"{ours}.decay_log", f"{theirs}.A_log", "h -> h"),
        weight(f"{ours}.decay_bias", f"{theirs}.dt_bias", "h -> h"),
        weight(f"{ours}.output_norm.scale", f"{theirs}.norm.weight", "v -> v"),
        weight(f"{ours}.output.kernel", f"{theirs}.out_proj.weight", "d v -> v d"),
    ]
