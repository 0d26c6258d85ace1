"""The gated delta rule on a TPU: rows in decode by a kernel of one token a row, the others by chunks."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.gdn.tpu_decode import Settings, gdn_kind
from kernels_pallas.gdn.xla import GDNWeights, gdn_unpacked, unpack
from kernels_pallas.linear_decode_tpu import check_decode, decode, has_decode
from kernels_pallas.op import RaggedBatch, StateSpec
from kernels_pallas.rows import by_rows


def gdn(
    projected: Float[Array, "T G c"],
    gates: Float[Array, "T G 2 n"],
    weights: GDNWeights,
    state: Float[Array, "L N H V K"],
    tail: Float[Array, "L N W-1 2*G*K+H*V"],
    layer: int,
    batch: RaggedBatch,
    *,
    epsilon: float,
    beta_scale: float = 1.0,
) -> tuple[Float[Array, "T H*V"], Float[Array, "L N H V K"], Float[Array, "L N W-1 2*G*K+H*V"]]:
    """One gated delta rule layer between its projections, as `xla.gdn`.

    Raises NotImplementedError unless activations and tails are all bfloat16 or all float32, states float32, and heads
    128 wide.
    """
    check_decode("gdn", (projected, gates), (tail,), state)
    mixed, z, b, a = unpack(projected, gates, state.shape)
    heads, key_heads = state.shape[2], projected.shape[1]
    kind = gdn_kind(Settings(heads, heads // key_heads, epsilon, beta_scale))
    inputs = (mixed, z.reshape(z.shape[0], -1), b, a)
    vectors = (weights.decay_log, weights.decay_bias, weights.output_norm)
    lines = (weights.convolution, *(jnp.reshape(vector, (1, -1)) for vector in vectors))

    def prefill(pools: tuple[Array, ...], batch: RaggedBatch) -> tuple[Array, tuple[Array, ...]]:
        out, state, tail = gdn_unpacked(
            mixed, z, b, a, weights, pools[0], pools[1], layer, batch,
            key_heads=key_heads, epsilon=epsilon, beta_scale=beta_scale,
        )  # fmt: skip
        return out, (state, tail)

    def step(pools: tuple[Array, ...], batch: RaggedBatch) -> tuple[Array, tuple[Array, ...]]:
        return decode(kind, inputs, lines, pools, layer, batch)

    out, (state, tail) = by_rows(step, prefill, (state, tail), batch)
    return out, state, tail


def fits(memory: StateSpec, dtype: str) -> bool:
    """Whether the kernels have the shapes and dtypes of a layer that remembers this and computes in `dtype`."""
    return has_decode(memory.arrays[0], dtype)
