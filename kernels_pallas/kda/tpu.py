"""Kimi delta attention on a TPU: rows in decode by a kernel of one token a row, the others by chunks."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.kda.decay import Decay
from kernels_pallas.kda.tpu_decode import Settings, kda_kind
from kernels_pallas.kda.xla import KDAWeights
from kernels_pallas.kda.xla import kda as kda_prefill
from kernels_pallas.linear_decode_tpu import check_decode, decode, has_decode
from kernels_pallas.op import RaggedBatch, StateSpec
from kernels_pallas.rows import by_rows


def kda(
    mixed: Float[Array, "T 2*H*K+H*V"],
    f: Float[Array, "T H K"],
    b: Float[Array, "T H"],
    gate: Float[Array, "T H V"],
    weights: KDAWeights,
    state: Float[Array, "L N H V K"],
    tail: Float[Array, "L N W-1 2*H*K+H*V"],
    layer: int,
    batch: RaggedBatch,
    *,
    decay: Decay,
    epsilon: float,
) -> tuple[Float[Array, "T H*V"], Float[Array, "L N H V K"], Float[Array, "L N W-1 2*H*K+H*V"]]:
    """One Kimi delta attention layer between its projections, as `xla.kda`.

    Raises NotImplementedError unless activations and tails are all bfloat16 or all float32, states float32, and heads
    128 wide.
    """
    check_decode("kda", (mixed, f, b, gate), (tail,), state)
    kind = kda_kind(Settings(state.shape[2], decay, epsilon))
    inputs = (mixed, f.reshape(f.shape[0], -1), b, gate.reshape(gate.shape[0], -1))
    log, norm = (jnp.reshape(vector, (1, -1)) for vector in (weights.decay_log, weights.output_norm))
    lines = (weights.convolution, log, weights.decay_bias, norm)

    def prefill(pools: tuple[Array, ...], batch: RaggedBatch) -> tuple[Array, tuple[Array, ...]]:
        out, state, tail = kda_prefill(
            mixed, f, b, gate, weights, pools[0], pools[1], layer, batch, decay=decay, epsilon=epsilon
        )
        return out, (state, tail)

    def step(pools: tuple[Array, ...], batch: RaggedBatch) -> tuple[Array, tuple[Array, ...]]:
        return decode(kind, inputs, lines, pools, layer, batch)

    out, (state, tail) = by_rows(step, prefill, (state, tail), batch)
    return out, state, tail


def fits(memory: StateSpec, dtype: str) -> bool:
    """Whether the kernels have the shapes and dtypes of a layer that remembers this and computes in `dtype`."""
    return has_decode(memory.arrays[0], dtype)
