"""Lightning attention over the rows that prefill, on a Hopper GPU: the scan over chunks with a constant decay.

Letters: T tokens, H heads, K key width, V value width, C chunk, n chunks, N slots, L layers of the pool.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.chunk_scan_gpu import Tiling, scan
from kernels_pallas.chunks_gpu import BF16, F32, C, Work, check_tokens, clear_behind, plan, readable
from kernels_pallas.lightning.xla import LightningWeights, _prepare
from kernels_pallas.norm import group_rms
from kernels_pallas.op import RaggedBatch
from kernels_pallas.rotary import Rotary
from kernels_pallas.scalar_decay_gpu import LOG2_E, scalar_decay


def prefill(
    tokens: tuple[Array, Array, Array, Array], pool: Float[Array, "L N H V K"], layer: int, batch: RaggedBatch
) -> tuple[Float[Array, "T H V"], Float[Array, "L N H V K"]]:
    """The rows that prefill, by chunks: what `recur` does for them with `lightning_chunk`.

    Args:
      tokens: q, k `[T, H, K]`, v `[T, H, V]` bfloat16, q scaled; slopes `[H]` float32.
      pool: states of this kind's layers, float32, updated in place where donated; layer: index of this layer in it.
    Returns the outputs in bfloat16, zeros for padding and for rows in decode, and the pool with final states and
    snapshots stored. Raises NotImplementedError for other dtypes and for keys other than 128 wide.
    """
    q, k, v, slopes = tokens
    check_tokens(q, v, pool)
    work = plan(batch, q.shape[0])
    recurrence = scalar_decay(readable(q), readable(k), readable(v), slope_gates(slopes, work))
    return scan(recurrence, v.shape, work, pool, layer, tiling(batch.rows, v.shape[2]), "lightning_scan")


def lightning_prefill(
    qkv: Float[Array, "T 3 H K"],
    gate: Float[Array, "T H*V"],
    weights: LightningWeights,
    rotary: Rotary | None,
    pool: Float[Array, "L N H V K"],
    layer: int,
    batch: RaggedBatch,
    *,
    scale: float,
    groups: int,
    epsilon: float,
    silu: bool = False,
) -> tuple[Float[Array, "T H*V"], Float[Array, "L N H V K"]]:
    """One layer between its projections for the rows that prefill, as `xla.lightning`; none may be in decode.

    The norms, the rotary embedding and the gate are left to XLA; queries, keys and values are rounded to bfloat16.
    """
    active = jax.nn.silu(qkv.astype(F32)) if silu else qkv
    q = _prepare(active[:, 0], weights.query_norm, rotary, epsilon) * scale
    k = _prepare(active[:, 1], weights.key_norm, rotary, epsilon)
    tokens = (q.astype(BF16), k.astype(BF16), active[:, 2].astype(BF16), weights.slopes)
    out, pool = prefill(tokens, pool, layer, batch)
    out = group_rms(out.reshape(out.shape[0], -1), weights.output_norm, groups, epsilon)
    return clear_behind((out * jax.nn.sigmoid(gate.astype(F32))).astype(qkv.dtype), batch), pool


def tiling(rows: int, value_width: int) -> Tiling:
    """Few rows leave most multiprocessors idle: then a block takes 64 value channels, so that there are more blocks."""
    return Tiling(parts=1, stages=3) if rows <= 2 or value_width == C else Tiling(parts=2, stages=2)


def slope_gates(slopes: Float[Array, "H"], work: Work) -> Float[Array, "n H 2 C"]:
    """e^{G_C - G}, and G in base 2, of each chunk and head; G stays beyond the last token."""
    passed_nC = jnp.minimum(jnp.arange(1, C + 1)[None, :], work.chunks[:, 1:2]).astype(jnp.float32)
    left_nC = passed_nC[:, -1:] - passed_nC
    slope_H = slopes.astype(jnp.float32)[None, :, None] * LOG2_E
    return jnp.stack([jnp.exp2(-slope_H * left_nC[:, None]), -slope_H * passed_nC[:, None]], axis=2)
