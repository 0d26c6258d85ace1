"""Mamba2 over the rows that prefill, on a Hopper GPU: the scan over chunks with a decay per token and head.

No door calls this module: it must first pass the checks of `hybrid-jax bench kernels` on a device.

Letters: T tokens, H heads, G groups, K state width, V head width, C chunk, n chunks, N slots, L layers of the pool.
"""

from jaxtyping import Array, Float

from kernels_pallas.chunk_scan_gpu import scan
from kernels_pallas.chunks_gpu import check_tokens, plan, readable
from kernels_pallas.lightning.gpu_prefill import tiling
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
