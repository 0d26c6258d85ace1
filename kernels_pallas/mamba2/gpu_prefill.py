"""Mamba2 over the rows that prefill, on a Hopper GPU: the scan over chunks with a decay per token and head.

Letters: T tokens, H heads, G groups, K state width, V head width, C chunk, n chunks, N slots, L layers of the pool.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.chunk_scan_gpu import scan
from kernels_pallas.chunks_gpu import BF16, F32, check_tokens, clear_behind, plan, readable
from kernels_pallas.convolution_gpu import convolve
from kernels_pallas.lightning.gpu_prefill import tiling
from kernels_pallas.mamba2.xla import UNLIMITED, Mamba2Weights, gated_then_normed, normed_then_gated
from kernels_pallas.op import RaggedBatch
from kernels_pallas.scalar_decay_gpu import decay_gates, scalar_decay


def prefill(
    tokens: tuple[Array, Array, Array, Array], pool: Float[Array, "L N H V K"], layer: int, batch: RaggedBatch
) -> tuple[Float[Array, "T H V"], Float[Array, "L N H V K"]]:
    """The rows that prefill, by chunks: what `recur` does for them with `mamba2_chunk`.

    Args:
      tokens: c, b `[T, G, K]` bfloat16; x times its step `[T, H, V]` bfloat16; decay `[T, H]` float32.
      pool: states of this kind's layers, float32, updated in place where donated; layer: index of this layer in it.
    Returns the outputs without the skip in bfloat16, zeros for padding and for rows in decode, and the pool with final
    states and snapshots stored. Raises NotImplementedError for other dtypes, for states other than 128 wide and heads
    other than 64 or 128 wide.
    """
    c, b, x, decay = tokens
    check_tokens(c, x, pool)
    work = plan(batch, c.shape[0])
    gates = decay_gates(decay, work).transpose(1, 3, 0, 2)
    recurrence = scalar_decay(readable(c), readable(b), readable(x), gates)
    return scan(recurrence, x.shape, work, pool, layer, tiling(batch.rows, x.shape[2]), "mamba2_scan")


def mamba2_prefill(
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
    """One layer between its projections for the rows that prefill, as `xla.mamba2`; none may be in decode.

    The convolution, the gates and the output norm are left to XLA; B, C and the values are rounded to bfloat16.
    """
    (heads, width, key_width), tokens = state.shape[2:], mixed.shape[0]
    by_group = mixed.reshape(tokens, groups, -1)
    channels, tail = convolve(by_group, weights.convolution, tail, layer, batch)
    channels = jax.nn.silu(channels + weights.convolution_bias.reshape(1, groups, -1))
    values = heads * width // groups
    x, b, c = jnp.split(channels, [values, values + key_width], axis=2)
    x = x.reshape(tokens, heads, width)
    step = jnp.clip(jax.nn.softplus(step_size.astype(F32) + weights.step_bias[None, :]), *step_limit)
    decay = -jnp.exp(weights.decay_log)[None, :] * step
    moved = (c.astype(BF16), b.astype(BF16), (step[:, :, None] * x).astype(BF16), decay)
    out, state = prefill(moved, state, layer, batch)
    out = (out.astype(F32) + weights.skip[None, :, None] * x).reshape(tokens, -1)
    finish = normed_then_gated if norm_first else gated_then_normed
    out = finish(out, z, weights.output_norm, groups, epsilon).astype(mixed.dtype)
    return clear_behind(out, batch), state, tail
