"""The lightning mixer: lightning attention between its projections, for families that differ in a few settings.

Knows no family: how fast each head decays, and in which layers, is the family's business.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas.lightning import LIGHTNING, LightningWeights
from kernels_pallas.op import ArraySpec, Cache, Memory, Place, RaggedBatch, StateSpec
from kernels_pallas.rotary import Rotary
from models.division import Divisible
from models.layers import Linear, RMSNorm, vector


@dataclass(frozen=True)
class LightningShape:
    """Settings of a lightning attention.

    heads, width: number and width of the heads. groups: parts of the output that are normed each on its own. epsilon:
    of all its norms. scale: factor of the queries. silu: whether queries, keys and values pass SiLU. normed: whether
    queries and keys have a norm per head. rotated: whether they are rotated.
    """

    heads: int
    width: int
    groups: int
    epsilon: float
    scale: float
    silu: bool
    normed: bool
    rotated: bool


class LightningAttention(Divisible):
    """Lightning attention with an output norm and a sigmoid output gate. `slopes`: the decay rate of each head."""

    kind = LIGHTNING.name

    def __init__(
        self, rngs: nnx.Rngs, width: int, shape: LightningShape, slopes: tuple[float, ...], dtype: str, backend: str
    ):
        inner = shape.heads * shape.width
        outputs = (3, shape.heads, shape.width)
        self.query_key_value = Linear(rngs, (width,), outputs, ("model", None, "linear_heads", None), dtype)
        self.gate = Linear(rngs, (width,), (inner,), ("model", "linear_heads"), dtype)
        self.output = Linear(rngs, (inner,), (width,), ("linear_heads", "model"), dtype)
        self.output_norm = vector(1.0, (shape.groups, inner // shape.groups), ("norm_groups", None))
        if shape.normed:
            self.query_norm = RMSNorm(shape.width, shape.epsilon)
            self.key_norm = RMSNorm(shape.width, shape.epsilon)
        self.shape = shape
        self.slopes = slopes
        axes = ("linear_heads", None, None)
        state = ArraySpec("state", (shape.heads, shape.width, shape.width), "float32", axes)
        self.memory: Memory = StateSpec((state,))
        self.place = Place(0, 0)
        self.backend = LIGHTNING.choose(backend, self.memory, dtype)

    def __call__(
        self, x: Float[Array, "T D"], rotary: Rotary | None, cache: Cache, batch: RaggedBatch
    ) -> tuple[Float[Array, "T D"], Cache]:
        shape = self.shape
        weights = LightningWeights(
            jnp.asarray(self.slopes, jnp.float32),
            self.output_norm[...].reshape(-1),
            self.query_norm.weight if shape.normed else None,
            self.key_norm.weight if shape.normed else None,
        )
        (pool,) = cache.slots(self.place)
        out, pool = self.division.op(
            LIGHTNING,
            self.backend,
            {"scale": shape.scale, "groups": shape.groups, "epsilon": shape.epsilon, "silu": shape.silu},
        )(
            self.query_key_value(x),
            self.gate(x),
            weights,
            rotary if shape.rotated else None,
            pool,
            self.place.layer,
            batch,
        )
        return self.output(out), cache.updated(self.place, (pool,))


def alibi_slopes(heads: int) -> np.ndarray:
    """ALiBi slopes (arXiv 2108.12409), float64: `2^(-8 (i + 1) / n)`, interleaved where n is no power of two."""
    power = 2 ** (heads.bit_length() - 1)
    first = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    rest = 2.0 ** (-8.0 * np.arange(1, 2 * power + 1) / (2 * power))
    return np.concatenate([first, rest[0::2][: heads - power]])
