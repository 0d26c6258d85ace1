"""The Mamba2 mixer with its projections, its sizes, and its rows in a weight table, for the families that have it."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas.mamba2 import MAMBA2, Mamba2Weights
from kernels_pallas.op import ArraySpec, Cache, Memory, Place, RaggedBatch, StateSpec
from kernels_pallas.rotary import Rotary
from models.division import Divisible
from models.hf_fields import MOST_HEADS, Fields, is_finite
from models.layers import Linear, RMSNorm, matrix, vector
from models.weights import Source, Weight, weight

LARGEST = float(np.finfo(np.float32).max)
# They shape random weights or choose among equal algorithms.
MAMBA2_IGNORED = ("time_step_min", "time_step_max", "time_step_floor", "time_step_rank")


@dataclass(frozen=True)
class Mamba2Shape:
    """Sizes of a Mamba2 layer: heads, head width, state width, groups (of B, C and the output norm), convolution width.

    `step_limit`: smallest and largest step. `normed`: whether there is an output norm; `norm_first`: before the gate.
    Raises ValueError where the heads do not fall into groups.
    """

    heads: int
    width: int
    state_width: int
    groups: int
    convolution: int
    step_limit: tuple[float, float]
    normed: bool = True
    norm_first: bool = False

    def __post_init__(self) -> None:
        if self.heads % self.groups:
            raise ValueError(f"config.json: wanted Mamba2 heads in {self.groups} equal groups, got {self.heads} heads")

    @property
    def inner(self) -> int:
        """Channels of x, of the gate and of the output."""
        return self.heads * self.width

    @property
    def parts(self) -> tuple[int, ...]:
        """Channels of a group in the input projection: gate and x of its heads, B, C, steps of its heads."""
        each = self.inner // self.groups
        return each, each, self.state_width, self.state_width, self.heads // self.groups

    @property
    def channels(self) -> tuple[int, int]:
        """Channels of the convolution (x, B, C), by group: groups, channels of each."""
        return self.groups, sum(self.parts[1:4])


def read_step_limit(f: Fields) -> tuple[float, float]:
    """`time_step_limit`, unlimited where it is missing; what float32 cannot hold counts as infinite."""
    limits = f.get("time_step_limit", None)
    if limits is None:
        return 0.0, math.inf
    numbers = [_read_limit(limit) for limit in limits] if isinstance(limits, list) else []
    if len(numbers) != 2 or not 0 <= numbers[0] < numbers[1]:  # NaN fails, too
        raise ValueError(
            f"config.json: wanted time_step_limit to be [least, largest], got {limits!r}: correct the file"
        )
    return numbers[0], math.inf if numbers[1] > LARGEST else numbers[1]


def _read_limit(limit: Any) -> float:
    """A number, or what a config writes for an infinite one; NaN for everything else."""
    if limit == math.inf or (isinstance(limit, dict) and limit.get("__float__") in ("inf", "Infinity")):
        return math.inf
    return float(limit) if is_finite(limit) else math.nan


def read_mamba2(f: Fields, inner: int, normed: bool, norm_first: bool) -> Mamba2Shape:
    """The sizes from the fields `mamba_*`; `inner` channels fall into heads of `mamba_d_head`, which may be "auto"."""
    heads, given = f.whole("mamba_n_heads", most=MOST_HEADS), f.get("mamba_d_head", "auto")
    if inner % heads or given not in ("auto", inner // heads):
        raise ValueError(f"config.json: wanted {inner} Mamba2 channels in {heads} heads, got mamba_d_head {given!r}")
    return Mamba2Shape(
        heads,
        inner // heads,
        f.whole("mamba_d_state"),
        f.whole("mamba_n_groups"),
        f.whole("mamba_d_conv", least=2),
        read_step_limit(f),
        normed,
        norm_first,
    )


class Mamba2Mixer(Divisible):
    """Mamba2: projections around the op.

    `factors`: None, or the constants that scale the five parts of the input projection (gate, x, B, C, step).
    """

    kind = MAMBA2.name

    def __init__(
        self,
        rngs: nnx.Rngs,
        width: int,
        shape: Mamba2Shape,
        epsilon: float,
        dtype: str,
        backend: str,
        factors: tuple[float, ...] | None = None,
    ):
        projected, axes = (shape.groups, sum(shape.parts)), ("state_groups", None)
        self.input = Linear(rngs, (width,), projected, ("model", *axes), dtype)
        kernel = (shape.convolution, *shape.channels)
        self.convolution = matrix(rngs, kernel, (None, *axes), shape.convolution, "float32")
        self.convolution_bias = vector(0.0, shape.channels, axes)
        self.decay_log = vector(0.0, (shape.heads,), ("state_groups",))
        self.step_bias = vector(1.0, (shape.heads,), ("state_groups",))
        self.skip = vector(1.0, (shape.heads,), ("state_groups",))
        if shape.normed:
            self.output_norm = RMSNorm(shape.inner, epsilon, axis="state_groups")
        self.output = Linear(rngs, (shape.inner,), (width,), ("state_groups", "model"), dtype)
        self.shape, self.epsilon, self.factors = shape, epsilon, factors
        state = ArraySpec("state", (shape.heads, shape.width, shape.state_width), "float32", (*axes, None))
        tail = (shape.convolution - 1, math.prod(shape.channels))
        self.memory: Memory = StateSpec((state, ArraySpec("tail", tail, dtype, (None, "state_groups"))))
        self.place = Place(0, 0)
        self.backend = MAMBA2.choose(backend, self.memory, dtype)

    def __call__(
        self, x: Float[Array, "T D"], rotary: Rotary | None, cache: Cache, batch: RaggedBatch
    ) -> tuple[Float[Array, "T D"], Cache]:
        shape = self.shape
        ends = [shape.parts[0], sum(shape.parts[:4])]
        z, mixed, step = (part.reshape(x.shape[0], -1) for part in jnp.split(self._projected(x), ends, axis=2))
        state, tail = cache.slots(self.place)
        out, state, tail = self.division.op(
            MAMBA2,
            self.backend,
            {
                "groups": shape.groups,
                "epsilon": self.epsilon,
                "norm_first": shape.norm_first,
                "step_limit": shape.step_limit,
            },
        )(z, mixed, step, self._weights(), state, tail, self.place.layer, batch)
        return self.output(out), cache.updated(self.place, (state, tail))

    def _projected(self, x: Float[Array, "T D"]) -> Float[Array, "T G c"]:
        projected = self.input(x)
        if self.factors is None:
            return projected
        return projected * jnp.asarray(np.repeat(self.factors, self.shape.parts), projected.dtype)[None, None, :]

    def _weights(self) -> Mamba2Weights:
        kernel = self.convolution[...]
        return Mamba2Weights(
            kernel.reshape(kernel.shape[0], -1),
            self.convolution_bias[...].reshape(-1),
            self.decay_log[...],
            self.step_bias[...],
            self.skip[...],
            self.output_norm.weight if self.shape.normed else None,
        )


def mamba2_rows(shape: Mamba2Shape, ours: str, theirs: str) -> list[Weight]:
    """Rows of a Mamba2 mixer."""
    mixed = shape.parts[1:4]
    rows = [
        Weight(f"{ours}.input.kernel", (Source((f"{theirs}.in_proj.weight",), "(g p) d -> d g p", dealt=shape.parts),)),
        Weight(f"{ours}.convolution", (Source((f"{theirs}.conv1d.weight",), "(g p) 1 w -> w g p", dealt=mixed),)),
        Weight(f"{ours}.convolution_bias", (Source((f"{theirs}.conv1d.bias",), "(g p) -> g p", dealt=mixed),)),
        weight(f"{ours}.decay_log", f"{theirs}.A_log", "h -> h"),
        weight(f"{ours}.step_bias", f"{theirs}.dt_bias", "h -> h"),
        weight(f"{ours}.skip", f"{theirs}.D", "h -> h"),
        weight(f"{ours}.output.kernel", f"{theirs}.out_proj.weight", "d v -> v d"),
    ]
    return [*rows, weight(f"{ours}.output_norm.scale", f"{theirs}.norm.weight", "v -> v")] if shape.normed else rows
