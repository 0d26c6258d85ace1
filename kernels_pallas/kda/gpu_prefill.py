"""Kimi delta attention over the rows that prefill, on a Hopper GPU: two kernels over chunks of 64 tokens.

With a decay per key channel, G_i = sum_{t <= i} g_t `[K]`, per head and chunk:

    T = (I + A)^{-1},  A_ij = beta_i sum_c k_ic k_jc e^{G_ic - G_jc} for i > j
    P_ij = sum_c q_ic k_jc e^{G_ic - G_jc} for i >= j
    u = T (beta (v - (e^G K) S_0));  o = (e^G Q) S_0 + P u;  S_C = S_0 diag(e^{G_C}) + u^T (e^{G_C - G} K)

`factors` computes T, P and the decayed queries and keys of every chunk at once; the scan carries S along the chunks.

The decay does not leave the sums over channels, and e^{G_i} e^{-G_j} overflows. So the pairs i > j are parted by size:
in each block of 2, 4, ... 64 tokens, those with j in the first half and i in the second. For these both factors of
e^{G_i - G_r} e^{G_r - G_j}, r the last token of the first half, are at most one: exact for any gate. The exponents are
sums of g over the tokens between, taken on the tensor cores as a matrix of ones and zeros times g, g in two bfloat16.

Letters: T tokens, H heads, K key width, V value width, C chunk, n chunks, N slots, L layers of the pool.
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
from kernels_pallas.gdn.gpu_prefill import gated_rms, unit_lower_inverse
from kernels_pallas.kda.decay import Decay
from kernels_pallas.kda.xla import KDAWeights
from kernels_pallas.mosaic_gpu import interpreter, made_once
from kernels_pallas.op import RaggedBatch, read_states, take
from kernels_pallas.scalar_decay_gpu import LOG2_E, LOWEST, gate

BETA, DECAY = 0, 1  # rows of a chunk's gates: beta, then e^{G_C} of 64 channels each
LEVELS = 6  # blocks of 2 to 64 tokens
HALVES = range(2)  # of 128 key channels


def prefill(
    tokens: tuple[Array, Array, Array, Array, Array], pool: Float[Array, "L N H V K"], layer: int, batch: RaggedBatch
) -> tuple[Float[Array, "T H V"], Float[Array, "L N H V K"]]:
    """The rows that prefill, by chunks: what `recur` does for them with `kda_chunk`.

    Args:
      tokens: q, k `[T, H, K]` bfloat16, q scaled and both of unit length; v `[T, H, V]` bfloat16; log decay
        `[T, H, K]`, beta `[T, H]` float32.
      pool: states of this kind's layers, float32, updated in place where donated; layer: index of this layer in it.
    Returns the outputs in bfloat16, zeros for padding and for rows in decode, and the pool with final states and
    snapshots stored. Raises NotImplementedError for other dtypes and for widths other than 128.
    """
    q, k, v, decay, beta = tokens
    check_tokens(q, v, pool)
    work = plan(batch, q.shape[0])
    beta_nHC = take(beta, work.tokens).transpose(0, 2, 1)
    made = factors(readable(q), readable(k), readable(decay), beta_nHC, work)
    recurrence = channel_decay(readable(v), made, beta_nHC)
    return scan(recurrence, v.shape, work, pool, layer, tiling(batch.rows), "kda_scan")


def kda_prefill(
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
    """One layer between its projections for the rows that prefill, as `xla.kda`; none may be in decode.

    The gates and the output norm are left to XLA; queries, keys and values are rounded to bfloat16.
    """
    tokens, heads = mixed.shape[0], state.shape[2]
    by_head, tails = mixed.reshape(tokens, heads, -1), read_states(tail, layer, batch)
    q, k, v = delta_inputs(by_head, weights.convolution, tails, plan(batch, tokens))
    tail = store_tails(by_head, tails, tail, layer, batch)
    g = decay(f.astype(F32) + weights.decay_bias[None], jnp.exp(weights.decay_log)[None, :, None])
    out, state = prefill((q, k, v, g, jax.nn.sigmoid(b.astype(F32))), state, layer, batch)
    out = gated_rms(out, weights.output_norm, jax.nn.sigmoid(gate.astype(F32)), epsilon)
    return clear_behind(out.reshape(tokens, -1).astype(mixed.dtype), batch), state, tail


def tiling(rows: int) -> Tiling:
    """All tiles of a chunk for 128 value channels leave no room for a second chunk, those for 64 do."""
    return Tiling(parts=1, stages=2)


def channel_decay(v: Array, made: tuple[Array, ...], beta: Float[Array, "n H C"]) -> Recurrence:
    """The delta rule with a decay per channel for the scan over chunks, from what `factors` made."""
    q, past, k, t, p, decay = made
    gates = jnp.concatenate([beta[:, :, None], decay], axis=2)
    streams = {
        "q": Stream("tiles", q),
        "past": Stream("tiles", past),
        "k": Stream("tiles", k),
        "v": Stream("values", v),
        "t": Stream("tiles", t),
        "p": Stream("tiles", p),
        "gates": Stream("table", gates),
    }
    return Recurrence(streams, _writes, _decay, _scores, None)


def _writes(refs: Refs, part: Array, state: list[Array], valid: Array, stage: Any) -> tuple[Array, list[Array]]:
    recalled = product([(piece, refs["past"].at[h].T) for h, piece in enumerate(state)], stage)
    values = plgpu.load(refs["v"].at[part].T, layout=TILED).astype(F32)
    wanted = (values - recalled) * along_columns(gate(refs, BETA))
    wanted = jnp.where(iota(1) < valid, wanted, 0.0)  # what lies past the row may be NaN
    writes = product([(wanted.astype(BF16), refs["t"].at[0].T)], stage, wanted)
    high = writes.astype(BF16)
    return writes, [high, (writes - high.astype(F32)).astype(BF16)]  # the keys are rounded already: not both


def _scores(refs: Refs, stage: Any) -> Any:
    return refs["p"].at[0]


def _decay(refs: Refs, keys: int) -> Float[Array, "V K"]:
    return along_columns(gate(refs, DECAY + keys))


# ------------------------------------------------------------------------------------ what a chunk is but for the state


def factors(
    q: Float[Array, "T H K"],
    k: Float[Array, "T H K"],
    decay: Float[Array, "T H K"],
    beta: Float[Array, "n H C"],
    work: Work,
) -> tuple[Array, ...]:
    """Of every chunk and head: e^G Q, e^G K, e^{G_C - G} K `[n, H, 2, C, 64]`, T - I and P `[n, H, 1, C, C]` in
    bfloat16, e^{G_C} `[n, H, 2, 64]` in float32. Rows past a chunk's last token are zero."""
    chunks, heads, _ = beta.shape

    def body(*refs: Any) -> None:
        q_ref, k_ref, g_ref, beta_ref, chunk_ref, *outs, s = refs
        n, head = lax.axis_index("n"), lax.axis_index("h")
        start, length = chunk_ref[n, 0], chunk_ref[n, 1]

        @pl.when(length > 0)
        def _used() -> None:
            rows = pl.ds(start, C)
            s["decay"], (s["keys"], s["square"]) = s.pop("spare")
            plgpu.copy_gmem_to_smem(g_ref.at[rows, head], s["decay"], s["decay_arrived"])
            for h in HALVES:
                columns = pl.ds(h * C, C)
                plgpu.copy_gmem_to_smem(q_ref.at[rows, head, columns], streamed(s["q"], h), s["arrived"])
                plgpu.copy_gmem_to_smem(k_ref.at[rows, head, columns], streamed(s["k"], h), s["arrived"])
            beta_row = plgpu.load(beta_ref.at[n, head], layout=PER_ROW, optimized=False)
            plgpu.barrier_wait(s["decay_arrived"])
            _split_decay(s, length)  # the decay's memory is free now
            plgpu.barrier_wait(s["arrived"])
            _clear(s, length)
            p, a = _pairs(s)
            a = jnp.where(iota(0) > iota(1), a * along_rows(beta_row), 0.0)
            inverse = unit_lower_inverse(a, s["square"].at[0], s["stage"])
            plgpu.commit_smem()  # all have read the squares
            s["square"].at[0][...] = jnp.where(iota(0) > iota(1), inverse, 0.0).astype(BF16)
            s["square"].at[1][...] = p.astype(BF16)
            _store(s, [out.at[n, head] for out in outs])

    arguments = (q, k, decay, beta, work.chunks)
    kernel = made_once(
        ("kda_factors",),
        arguments,
        lambda: plgpu.kernel(
            body,
            out_type=[jax.ShapeDtypeStruct((chunks, heads, 2, *TILE), BF16)] * 3
            + [jax.ShapeDtypeStruct((chunks, heads, 1, *TILE), BF16)] * 2
            + [jax.ShapeDtypeStruct((chunks, heads, 2, C), F32)],
            scratch_types=[_scratch()],
            grid=(chunks, heads),
            grid_names=("n", "h"),
            compiler_params=compiler_params(),
            kernel_name="kda_factors",
            interpret=interpreter(),
        ),
    )
    return kernel(*arguments)


def _scratch() -> dict[str, Any]:
    return {
        "q": tiles(2),
        "k": tiles(2),
        "high": tiles(2),
        "low": tiles(2),
        "spare": plgpu.RefUnion(plgpu.SMEM((C, 2 * C), F32), [tiles(2), tiles(2)]),  # the decay, then keys and squares
        "ones": tiles(),
        "stage": stage_tile(),
        "decay_arrived": plgpu.Barrier(),
        "arrived": plgpu.Barrier(num_arrivals=4),
    }


def _split_decay(s: Refs, length: Array) -> None:
    """The decay in base 2 as a sum of two bfloat16, zero past the last token."""
    for h in HALVES:
        decay = plgpu.load(s["decay"].at[:, pl.ds(h * C, C)], layout=TILED, optimized=False)
        decay = jnp.where(iota(0) < length, jnp.maximum(decay * LOG2_E, LOWEST), 0.0)
        high = decay.astype(BF16)
        s["high"].at[h][...] = high
        s["low"].at[h][...] = (decay - high.astype(F32)).astype(BF16)
    plgpu.commit_smem()


def _clear(s: Refs, length: Array) -> None:
    """Zero queries and keys past the last token, which may be NaN."""

    @pl.when(length < C)
    def _tail() -> None:
        for name in ("q", "k"):
            for h in HALVES:
                tile = plgpu.load(s[name].at[h], layout=TILED)
                s[name].at[h][...] = jnp.where(iota(0) < length, tile, jnp.zeros_like(tile))
        plgpu.commit_smem()


def _decay_over(s: Refs, h: int, spans: Array) -> Float[Array, "C K"]:
    """e^g summed over the tokens of each row of `spans` `[C, C]`, of 64 channels.

    The ones go through shared memory: from registers, with the next ones made in the meantime, sums come out wrong.
    """
    plgpu.commit_smem()  # all have read the ones before
    s["ones"][...] = jnp.where(spans, 1.0, 0.0).astype(BF16)
    plgpu.commit_smem()
    return jnp.exp2(product([(s["ones"], s["high"].at[h]), (s["ones"], s["low"].at[h])], s["stage"]))


def _pairs(s: Refs) -> tuple[Float[Array, "C C"], Float[Array, "C C"]]:
    """sum_c q_ic k_jc e^{G_ic - G_jc} for i >= j, and the same of k and k for i > j; zero above the diagonal."""
    row, column = iota(0), iota(1)

    def level_pairs(level: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        half = lax.shift_left(jnp.int32(1), level)
        last = (row | (2 * half - 1)) - half  # of the first half of the row's block
        second = (row & half) != 0
        spans = jnp.where(second, (column > last) & (column <= row), (column > row) & (column <= last))
        queries = []
        for h in HALVES:
            decay = _decay_over(s, h, spans)
            s["keys"].at[h][...] = (plgpu.load(s["k"].at[h], layout=TILED).astype(F32) * decay).astype(BF16)
            queries.append((plgpu.load(s["q"].at[h], layout=TILED).astype(F32) * decay).astype(BF16))
        plgpu.commit_smem()
        scores = product([(queries[h], s["keys"].at[h].T) for h in HALVES], s["stage"])
        overlap = product([(s["keys"].at[h], s["keys"].at[h].T) for h in HALVES], s["stage"])
        plgpu.commit_smem()  # all have read the keys
        parted = ((row ^ column) >= half) & ((row ^ column) < 2 * half) & (row > column)
        return jnp.where(parted, scores, found[0]), jnp.where(parted, overlap, found[1])

    same = product([(s["q"].at[h], s["k"].at[h].T) for h in HALVES], s["stage"])
    start = jnp.where(row == column, same, 0.0), plgpu.layout_cast(jnp.zeros(TILE, F32), TILED)
    return lax.fori_loop(0, LEVELS, level_pairs, start)


def _store(s: Refs, outs: list[Any]) -> None:
    """Store the decayed queries and keys, T - I, P, and the decay of the whole chunk."""
    row, column = iota(0), iota(1)
    for h in HALVES:
        since, until = _decay_over(s, h, column <= row), _decay_over(s, h, column > row)
        queries, keys = (plgpu.load(s[name].at[h], layout=TILED).astype(F32) for name in ("q", "k"))
        s["keys"].at[h][...] = (keys * until).astype(BF16)
        s["q"].at[h][...] = (queries * since).astype(BF16)
        s["k"].at[h][...] = (keys * since).astype(BF16)
        outs[5].at[h][...] = jnp.where(row == C - 1, since, 0.0).sum(axis=0)
    plgpu.commit_smem()
    for h in HALVES:
        for name, out in zip(("q", "k", "keys"), outs, strict=False):
            plgpu.copy_smem_to_gmem(s[name].at[h], out.at[h])
    for tile in range(2):
        plgpu.copy_smem_to_gmem(s["square"].at[tile], outs[3 + tile].at[0])
    plgpu.wait_smem_to_gmem(0)
