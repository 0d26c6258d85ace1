"""Mamba2 on a TPU: rows in decode by a kernel of one token a row, the others by chunks."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.linear_decode_tpu import LANES, check_decode, decode, has_decode
from kernels_pallas.mamba2.tpu_decode import Settings, mamba2_kind
from kernels_pallas.mamba2.tpu_prefill import mamba2_prefill
from kernels_pallas.mamba2.xla import UNLIMITED, Mamba2Weights
from kernels_pallas.op import RaggedBatch, StateSpec
from kernels_pallas.rows import by_rows

WIDTHS = (64, LANES)


def mamba2(
    z: Float[Array, "T H*V"],
    mixed: Float[Array, "T H*V+2*G*K"],
    step_size: Float[Array, "T H"],
    weights: Mamba2Weights,
    state: Float[Array, "L N H V K"],
    tail: Float[Array, "L N W-1 H*V+2*G*K"],
    layer: int,
    batch: RaggedBatch,
    *,
    groups: int,
    epsilon: float,
    norm_first: bool = False,
    step_limit: tuple[float, float] = UNLIMITED,
) -> tuple[Float[Array, "T H*V"], Float[Array, "L N H V K"], Float[Array, "L N W-1 H*V+2*G*K"]]:
    """One Mamba2 layer between its projections, as `xla.mamba2`.

    Raises NotImplementedError unless activations and tails are all bfloat16 or all float32, states float32, heads 64 or
    128 wide by a state of width 128, and the heads of a group multiples of 128 channels.
    """
    check_decode("mamba2", (z, mixed, step_size), (tail,), state, WIDTHS)
    heads, width, _ = state.shape[2:]
    if heads * width // groups % LANES:
        raise NotImplementedError(
            f"mamba2 on a TPU wants groups of whole multiples of {LANES} value channels, got {heads} heads of width"
            f" {width} in {groups} groups; use backend 'xla'"
        )
    slabs, normed = heads * width // LANES, weights.output_norm is not None
    kind = mamba2_kind(Settings(slabs, LANES // width, groups, epsilon, normed, norm_first, step_limit))
    vectors = (weights.convolution_bias, weights.decay_log, weights.step_bias, weights.skip, weights.output_norm)
    lines = (weights.convolution, *(jnp.reshape(vector, (1, -1)) for vector in vectors if vector is not None))

    def prefill(pools: tuple[Array, ...], batch: RaggedBatch) -> tuple[Array, tuple[Array, ...]]:
        out, state, tail = mamba2_prefill(
            z, mixed, step_size, weights, pools[0], pools[1], layer, batch,
            groups=groups, epsilon=epsilon, norm_first=norm_first, step_limit=step_limit,
        )  # fmt: skip
        return out, (state, tail)

    def step(pools: tuple[Array, ...], batch: RaggedBatch) -> tuple[Array, tuple[Array, ...]]:
        return decode(kind, (mixed, z, step_size), lines, pools, layer, batch)

    out, (state, tail) = by_rows(step, prefill, (state, tail), batch)
    return out, state, tail


def fits(memory: StateSpec, dtype: str) -> bool:
    """Whether the kernels have the shapes and dtypes of a layer that remembers this and computes in `dtype`."""
    state, tail = memory.arrays
    heads, width, key_width = state.shape
    groups = (tail.shape[1] - heads * width) // (2 * key_width)
    return has_decode(state, dtype, WIDTHS) and heads * width // groups % LANES == 0
