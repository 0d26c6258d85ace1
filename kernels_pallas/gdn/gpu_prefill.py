"""Gated delta rule over the rows that prefill, on a Hopper GPU: two kernels over chunks of 64 tokens.

Per value head and chunk, with G_i = sum_{t <= i} g_t, the writes u of a chunk solve a triangular system (see `xla`):

    T = (I + A)^{-1},  A_ij = beta_i e^{G_i - G_j} (k_i . k_j) for i > j
    u = T (beta (v - e^G (K S_0)))
    o = e^G (Q S_0) + (tril(Q K^T) e^{G_i - G_j}) u
    S_C = e^{G_C} S_0 + (e^{G_C - G} u)^T K

`solve` finds T of every chunk at once; the scan carries S along the chunks of a row. No factor exceeds one.

Letters: B rows, T tokens, H value heads, G key heads, K key width, V value width, C chunk, n chunks, N slots, L layers.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.chunk_scan_gpu import Recurrence, Refs, Stream, Tiling, scan
from kernels_pallas.chunks_gpu import (
    BF16,
    F32,
    PER_COLUMN,
    PER_ROW,
    TILE,
    TILED,
    C,
    Work,
    along_columns,
    along_rows,
    check_tokens,
    clear_behind,
    compiler_params,
    iota,
    plan,
    product,
    readable,
    stage_tile,
    streamed,
    tiles,
)
from kernels_pallas.convolution_gpu import delta_inputs, store_tails
from kernels_pallas.gdn.xla import GDNWeights
from kernels_pallas.mosaic_gpu import interpreter, made_once
from kernels_pallas.op import RaggedBatch, read_states, take
from kernels_pallas.scalar_decay_gpu import (
    TOTAL,
    UNTIL,
    chunk_decay,
    decay_gates,
    decay_since,
    decayed_scores,
    gate,
)

BETA, BETA_SINCE = 2, 3  # rows of a chunk's gates beside those of the decay: beta, and beta e^G


def prefill(
    tokens: tuple[Array, Array, Array, Array, Array], pool: Float[Array, "L N H V K"], layer: int, batch: RaggedBatch
) -> tuple[Float[Array, "T H V"], Float[Array, "L N H V K"]]:
    """The rows that prefill, by chunks: what `recur` does for them with `gdn_chunk`.

    Args:
      tokens: q, k `[T, G, K]` bfloat16, q scaled and both of unit length; v `[T, H, V]` bfloat16; log decay, beta
        `[T, H]` float32.
      pool: states of this kind's layers, float32, updated in place where donated; layer: index of this layer in it.
    Returns the outputs in bfloat16, zeros for padding and for rows in decode, and the pool with final states and
    snapshots stored. Raises NotImplementedError for other dtypes and for widths other than 128.
    """
    q, k, v, decay, beta = tokens
    check_tokens(q, v, pool)
    work = plan(batch, q.shape[0])
    gates = delta_gates(decay, beta, work)
    q, k, values = readable(q), readable(k), readable(v)
    recurrence = gated_delta(q, k, values, solve(k, gates, work), gates)
    return scan(recurrence, v.shape, work, pool, layer, tiling(batch.rows), "gdn_scan")


def gdn_prefill(
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
    """One layer between its projections for the rows that prefill, as `xla.gdn`; none may be in decode.

    The gates and the output norm are left to XLA; queries, keys and values are rounded to bfloat16.
    """
    (heads, value_width, _), tokens = state.shape[2:], projected.shape[0]
    tails = read_states(tail, layer, batch)
    q, k, v = delta_inputs(projected, weights.convolution, tails, plan(batch, tokens))
    tail = store_tails(projected, tails, tail, layer, batch)
    z = projected[:, :, tail.shape[3] // projected.shape[1] :].reshape(tokens, heads, value_width)
    b, a = (gates[:, :, i].reshape(tokens, heads).astype(F32) for i in range(2))
    beta = beta_scale * jax.nn.sigmoid(b)
    decay = -jnp.exp(weights.decay_log)[None, :] * jax.nn.softplus(a + weights.decay_bias[None, :])
    out, state = prefill((q, k, v, decay, beta), state, layer, batch)
    out = gated_rms(out, weights.output_norm, jax.nn.silu(z.astype(F32)), epsilon)
    return clear_behind(out.reshape(tokens, -1).astype(projected.dtype), batch), state, tail


def gated_rms(
    out: Float[Array, "T H V"], weight: Float[Array, "V"], gate: Float[Array, "T H V"], epsilon: float
) -> Float[Array, "T H V"]:
    """`norm.rms` times a gate, in float32. The norm's factors stand alone, behind the barrier: with them in one fusion
    XLA stores the normed outputs in float32 and reads them again for the gate."""
    out = out.astype(F32)
    factor = lax.optimization_barrier(lax.rsqrt(jnp.mean(out * out, axis=-1, keepdims=True) + epsilon))
    return out * factor * weight.astype(F32)[None, None, :] * gate


def tiling(rows: int) -> Tiling:
    """Few rows leave most multiprocessors idle: then a block takes 64 value channels, so that there are more blocks."""
    return Tiling(parts=1, stages=3) if rows <= 2 else Tiling(parts=2, stages=2)


def delta_gates(decay: Float[Array, "T H"], beta: Float[Array, "T H"], work: Work) -> Float[Array, "n H 4 C"]:
    """The decay's gates, beta and beta e^G of each chunk and head; beta is 0 beyond the last token."""
    until, total = decay_gates(decay, work)
    beta_nCH = take(beta, work.tokens)
    return jnp.stack([until, total, beta_nCH, beta_nCH * jnp.exp2(total)]).transpose(1, 3, 0, 2)


def gated_delta(q: Array, k: Array, v: Array, solved: Array, gates: Array) -> Recurrence:
    """The gated delta rule for the scan over chunks."""
    streams = {
        "q": Stream("keys", q),
        "k": Stream("keys", k),
        "v": Stream("values", v),
        "t": Stream("tiles", solved),
        "gates": Stream("table", gates),
    }
    return Recurrence(streams, _writes, chunk_decay, decayed_scores, decay_since)


def _writes(refs: Refs, part: Array, state: list[Array], valid: Array, stage: Any) -> tuple[Array, list[Array]]:
    recalled = product([(piece, refs["k"].at[h].T) for h, piece in enumerate(state)], stage)
    beta, since, until = gate(refs, BETA), gate(refs, BETA_SINCE), gate(refs, UNTIL)
    values = plgpu.load(refs["v"].at[part].T, layout=TILED).astype(F32)
    wanted = values * along_columns(beta) - recalled * along_columns(since)
    wanted = jnp.where(iota(1) < valid, wanted, 0.0)  # what lies past the row may be NaN
    writes = product([(wanted.astype(BF16), refs["t"].at[0].T)], stage, wanted)
    return writes, [(writes * along_columns(until)).astype(BF16)]


# ----------------------------------------------------------------------------------------------- the triangular systems


def solve(k: Float[Array, "T G K"], gates: Float[Array, "n H 4 C"], work: Work) -> Float[Array, "n H 1 C C"]:
    """T - I of every chunk and value head, bfloat16; rows past a chunk's last token are zero.

    Without its diagonal of ones T leaves the writes' own terms to float32 sums.
    """
    chunks, heads = gates.shape[:2]
    each = heads // k.shape[1]

    def body(*refs: Any) -> None:
        k_ref, gate_ref, chunk_ref, out_ref, k_s, b_s, t_s, stage, arrived = refs
        n, group = lax.axis_index("n"), lax.axis_index("g")
        start, length = chunk_ref[n, 0], chunk_ref[n, 1]

        @pl.when(length > 0)
        def _used() -> None:
            for half in range(2):
                source = k_ref.at[pl.ds(start, C), group, pl.ds(half * C, C)]
                plgpu.copy_gmem_to_smem(source, streamed(k_s, half), arrived)
            plgpu.barrier_wait(arrived)
            overlap = product([(k_s.at[half], k_s.at[half].T) for half in range(2)], stage)
            for r in range(each):
                beta, total, other = _system_gates(gate_ref.at[n, group * each + r])
                row, column = iota(0), iota(1)
                used = (row > column) & (row < length)
                apart = jnp.where(used, along_rows(total) - along_columns(other), 0.0)
                a = jnp.where(used, overlap * along_rows(beta) * jnp.exp2(apart), 0.0)
                inverse = unit_lower_inverse(a, b_s, stage)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                t_s[...] = jnp.where(row > column, inverse, 0.0).astype(BF16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(t_s, out_ref.at[n, group * each + r, 0])
            plgpu.wait_smem_to_gmem(0)

    arguments = (k, gates, work.chunks)
    kernel = made_once(
        ("gdn_solve",),
        arguments,
        lambda: plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((chunks, heads, 1, *TILE), BF16),
            scratch_types=[tiles(2), tiles(), tiles(), stage_tile(), plgpu.Barrier(num_arrivals=2)],
            grid=(chunks, k.shape[1]),
            grid_names=("n", "g"),
            compiler_params=compiler_params(),
            kernel_name="gdn_solve",
            interpret=interpreter(),
        ),
    )
    return kernel(*arguments)


def _system_gates(gates: Any) -> tuple[Array, Array, Array]:
    beta = plgpu.load(gates.at[BETA], layout=PER_ROW, optimized=False)
    total = plgpu.load(gates.at[TOTAL], layout=PER_ROW, optimized=False)
    return beta, total, plgpu.load(gates.at[TOTAL], layout=PER_COLUMN, optimized=False)


def unit_lower_inverse(a: Float[Array, "C C"], b_s: Any, stage: Any) -> Float[Array, "C C"]:
    """`(I + a)^{-1}` of a strictly lower `a` in registers, by the tensor cores.

    Blocks of 4 by the series `(I - N)(I + N^2)`, which ends there, then twice the size at a time:
    `X <- X - X L X` with L the blocks of `a` that join two of X. Wider series would cancel huge powers of N.

    Args:
      b_s: a tile in SMEM, for the right operands. stage: the interpreter's.
    """
    row, column = iota(0), iota(1)
    minus = jnp.where(row // 4 == column // 4, -a, 0.0)
    minus_lo = minus.astype(BF16)
    square = _times(minus_lo, minus_lo, b_s, stage)
    x = jnp.where(row == column, 1.0, minus + square)
    x = _times(minus_lo, square.astype(BF16), b_s, stage, x)
    for size in (8, 16, 32, 64):
        joins = (row // size == column // size) & (row % size >= size // 2) & (column % size < size // 2)
        x_lo = x.astype(BF16)
        link = _times(jnp.where(joins, a, 0.0).astype(BF16), x_lo, b_s, stage)
        x = _times(-x_lo, link.astype(BF16), b_s, stage, x)
    return x


def _times(a: Array, b: Array, b_s: Any, stage: Any, start: Array | None = None) -> Array:
    b_s[...] = b
    plgpu.commit_smem()
    return product([(a, b_s)], stage, start)
