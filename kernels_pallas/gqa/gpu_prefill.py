"""Causal attention of rows that prefill over pages of keys and values on Hopper.

A chunk is 64 new tokens of one row. Two warpgroups take the same chunk for two query heads of one key head, so that
both read the same blocks of keys and values, which a third streams from the pages. While one multiplies, the other
takes its exponentials (FlashAttention-3, arXiv 2407.08608). Programs are persistent: chunks with the longest contexts
come first and are dealt out back and forth, and the next unit's blocks are on their way before this one ends.

Letters: n chunks, C tokens of a chunk, H query heads, G key heads, D head width, M pages of a row, P pages, S tokens a
page, L layers of the pool.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.gqa.gpu_decode import FULL, PARAMS, ROW, clear_tail, product, tiled
from kernels_pallas.gqa.gpu_splits import MULTIPROCESSORS
from kernels_pallas.mosaic_gpu import interpreter, made_once
from kernels_pallas.op import RaggedBatch

CHUNK = 64
STAGES = 2  # blocks of keys, and of values, in shared memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Units:
    """Chunks by falling number of blocks, and the map between tokens and chunks."""

    token: Int[Array, "n C"]  # of each place of a chunk; T where there is none
    place: Int[Array, "T"]  # chunk * C + place of each token that prefills; n * C for every other
    order: Int[Array, "n"]  # chunks, longest context first
    row: Int[Array, "n"]
    start: Int[Array, "n"]  # position of the chunk's first token
    context: Int[Array, "n"]  # tokens up to the chunk's last; 0 for an empty chunk
    used: Int[Array, "1"]  # chunks that hold tokens
    length: Int[Array, "B"]  # tokens of each row, this step's included


def plan_units(batch: RaggedBatch, tokens: int, size: int = CHUNK) -> Units:
    """Cut the rows that prefill into chunks of `size` tokens and order them.

    By comparisons of all with all rows: on a GPU a search is a loop of launches.
    """
    most = batch.rows if batch.prefills is None else batch.prefills
    count = (tokens + most * (size - 1)) // size  # each row adds less than one chunk
    lengths = jnp.where(batch.in_decode, 0, batch.lengths)
    ends = jnp.cumsum((lengths + size - 1) // size)
    first = ends - (lengths + size - 1) // size
    index = jnp.arange(count, dtype=jnp.int32)
    row, used = _owner(index, ends)
    inside = (index - first[row]) * size
    length = jnp.where(used, jnp.clip(lengths[row] - inside, 0, size), 0)
    offset = jnp.arange(size, dtype=jnp.int32)[None, :]
    token = jnp.where(offset < length[:, None], (batch.query_start[row] + inside)[:, None] + offset, tokens)
    start = batch.seen[row] + inside
    context = jnp.where(length > 0, start + length, 0)
    order = jnp.argsort(-context).astype(jnp.int32)
    place = _places(batch, tokens, size, first, lengths, count * size)
    total = jnp.sum(length > 0, dtype=jnp.int32)[None]
    return Units(token, place, order, row, start, context, total, batch.seen + batch.lengths)


def _owner(index: Int[Array, "n"], ends: Int[Array, "B"]) -> tuple[Int[Array, "n"], Bool[Array, "n"]]:
    """The row whose range, which ends at `ends`, holds each index, and whether there is one (else row 0)."""
    row = (index[:, None] >= ends[None, :]).sum(axis=1, dtype=jnp.int32)
    used = row < ends.shape[0]
    return jnp.where(used, row, 0), used


def _places(
    batch: RaggedBatch, tokens: int, size: int, first: Int[Array, "B"], lengths: Int[Array, "B"], none: int
) -> Int[Array, "T"]:
    """Chunk times size plus place in the chunk of each token; `none` for a token that does not prefill."""
    token = jnp.arange(tokens, dtype=jnp.int32)
    row, real = _owner(token, batch.query_start[1:])
    inside = token - batch.query_start[row]
    return jnp.where(real & (lengths[row] > 0), first[row] * size + inside, none)


def block_tokens(width: int) -> int:
    """Cached tokens that one product takes: what registers and shared memory hold beside a 64-row output."""
    return 128 if width <= 128 else 64


def attend_chunks(
    q: Float[Array, "n C H D"],
    table: Int[Array, "B M"],
    units: Units,
    pages: Float[Array, "L P S G 2 D"],
    layer: Int[Array, "1"],
    scale: float,
) -> Float[Array, "n C H D"]:
    """The outputs of chunks, bfloat16; arbitrary for places without a token.

    `pages` are bfloat16 and hold this step's tokens already.
    """
    width, page, key_heads = q.shape[3], pages.shape[2], pages.shape[3]
    block, interpreted = block_tokens(width), interpreter() is not None
    own_output = width <= 128
    copies = max(1, block // page)
    scratch = [
        tiled((2, CHUNK, width)),
        tiled((STAGES, block, width)),
        tiled((STAGES, block, width)),
        tiled((2, CHUNK, width) if own_output else (1, 8, 64)),
        tiled((2, CHUNK, block) if interpreted else (1, 8, 64)),
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_barriers=STAGES, num_arrivals=copies),
        plgpu.Barrier(num_barriers=STAGES, num_arrivals=copies),
        plgpu.Barrier(num_barriers=STAGES, num_arrivals=2),
        plgpu.Barrier(num_barriers=STAGES, num_arrivals=2),
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=3),
    ]
    arguments = (q, table, units.order, units.row, units.start, units.context, units.used, units.length, layer, pages)
    kernel = made_once(
        ("gqa_prefill", scale),
        arguments,
        lambda: plgpu.kernel(
            _body(q.shape[2], key_heads, width, page, scale),
            out_type=jax.ShapeDtypeStruct(q.shape, jnp.bfloat16),
            scratch_types=scratch,
            grid=(min(MULTIPROCESSORS, q.shape[0] * q.shape[2]),),
            grid_names=("program",),
            num_threads=3,
            thread_name="warpgroup",
            compiler_params=PARAMS,
            kernel_name="gqa_prefill",
            interpret=interpreter(),
        ),
    )
    return kernel(*arguments)


def _body(heads: int, key_heads: int, width: int, page_size: int, scale: float) -> Callable[..., None]:
    group = heads // key_heads
    halves = (group + 1) // 2  # pairs of one key head; of an odd group one head is done twice, by both warpgroups
    pairs = key_heads * halves
    block, own_output = block_tokens(width), width <= 128
    copies = max(1, block // page_size)
    factor = scale * math.log2(math.e)

    def body(*refs: Any) -> None:
        q, table, order, rows, starts, contexts, used, length, layer_ref, pages, out, *scratch = refs
        q_s, k_s, v_s, o_s, p_s, q_full, q_free, k_full, v_full, k_free, v_free, turn, done = scratch
        if not own_output:
            o_s = q_s
        warpgroup = lax.axis_index("warpgroup")

        def head(pair: Any, member: Any) -> Any:
            inside = jnp.minimum(lax.rem(pair, halves) * 2 + member, group - 1)
            return lax.div(pair, halves) * group + inside

        def each_unit(run: Any) -> Any:
            return _deal(run, used[0] * pairs, pairs, block, order, contexts)

        @pl.when(warpgroup == 2)
        def _load() -> None:
            plgpu.set_max_registers(40, action="decrease")
            layer = layer_ref[0]

            def load(i: Any, before: Any, chunk: Any, pair: Any, blocks: Any) -> None:
                row, key_head = rows[chunk], lax.div(pair, halves)
                last = lax.div(length[row] - 1, page_size)

                def load_queries(w: Any) -> None:
                    @pl.when(i > 0)
                    def _() -> None:
                        plgpu.barrier_wait(q_free.at[w])

                    plgpu.copy_gmem_to_smem(q.at[chunk, :, head(pair, w)], q_s.at[w], q_full.at[w])

                load_queries(0)

                @pl.loop(0, blocks)
                def _(j: Any) -> None:
                    slot = lax.rem(before + j, STAGES)
                    size = block // copies
                    tokens = [j * block + c * size for c in range(copies)]
                    found = [table[row, jnp.minimum(lax.div(t, page_size), last)] for t in tokens]
                    for kind, tile, full, free in ((0, k_s, k_full, k_free), (1, v_s, v_full, v_free)):

                        @pl.when(before + j >= STAGES)
                        def _(free: Any = free) -> None:
                            plgpu.barrier_wait(free.at[slot])

                        for c in range(copies):
                            inside = pl.ds(lax.rem(tokens[c], page_size), size)
                            source = pages.at[layer, found[c], inside, key_head, kind]
                            plgpu.copy_gmem_to_smem(source, tile.at[slot, pl.ds(c * size, size)], full.at[slot])
                        if kind == 0:
                            # Warpgroup 1 gives its queries up only after the other has begun on these keys.
                            pl.when(j == 0)(lambda: load_queries(1))

            units, tiles = each_unit(load)

            pl.when(units > 0)(lambda: _await(q_free, 2))

            @pl.loop(jnp.maximum(tiles - STAGES, 0), tiles)
            def _(j: Any) -> None:
                plgpu.barrier_wait(k_free.at[lax.rem(j, STAGES)])
                plgpu.barrier_wait(v_free.at[lax.rem(j, STAGES)])

        @pl.when(warpgroup < 2)
        def _attend() -> None:
            plgpu.set_max_registers(232, action="increase")
            queries = q_s.at[warpgroup]

            def take_turn() -> None:
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            def attend(i: Any, before: Any, chunk: Any, pair: Any, blocks: Any) -> None:
                start, tokens = starts[chunk], length[rows[chunk]]
                plgpu.barrier_wait(q_full.at[warpgroup])
                plgpu.barrier_wait(k_full.at[lax.rem(before, STAGES)])

                def step(j: Any, carry: Any, masked: Any) -> Any:
                    acc, highest, sum_ = carry
                    slot = lax.rem(before + j, STAGES)

                    def multiply(scores: Any) -> Any:
                        plgpu.wgmma(scores, queries, k_s.at[slot].transpose((1, 0)))
                        take_turn()
                        return scores[...]

                    scores = pl.run_scoped(multiply, plgpu.ACC((CHUNK, block), jnp.float32))
                    plgpu.barrier_arrive(k_free.at[slot])
                    if masked:
                        scores = jnp.where(_visible(start, j * block, block), scores, -jnp.inf)
                    new = jnp.maximum(highest, scores.max(axis=1) * factor)
                    fading = jnp.exp2(highest - new)
                    shares = jnp.exp2(scores * factor - lax.broadcast_in_dim(new, scores.shape, [0]))
                    acc, sum_ = acc * lax.broadcast_in_dim(fading, acc.shape, [0]), sum_ * fading
                    rounded = shares.astype(jnp.bfloat16)

                    def await_turn() -> None:
                        plgpu.barrier_arrive(turn)
                        plgpu.barrier_wait(v_full.at[slot])
                        if masked:
                            left = tokens - j * block
                            pl.when(left < block)(lambda: _clear_values(v_s.at[slot], left))

                        plgpu.barrier_wait(turn)

                    if width <= 128:
                        sum_ = sum_ + shares.sum(axis=1)
                        acc, sum_, new, rounded = lax.optimization_barrier((acc, sum_, new, rounded))
                        await_turn()
                    else:
                        await_turn()
                        sum_ = sum_ + shares.sum(axis=1)

                    def wait_next() -> None:
                        @pl.when(j + 1 < blocks)
                        def _() -> None:
                            plgpu.barrier_wait(k_full.at[lax.rem(before + j + 1, STAGES)])

                    acc = _add_values(acc, rounded, p_s.at[warpgroup], v_s.at[slot], wait_next)
                    plgpu.barrier_arrive(v_free.at[slot])
                    return acc, new, sum_

                zero = plgpu.layout_cast(jnp.zeros((CHUNK, width), jnp.float32), FULL)
                highest = plgpu.layout_cast(jnp.full((CHUNK,), -jnp.inf, jnp.float32), ROW)
                sum_ = plgpu.layout_cast(jnp.zeros((CHUNK,), jnp.float32), ROW)
                past = lax.div(start + 1, block)  # blocks that every query sees in full
                carry = lax.fori_loop(0, past, lambda j, x: step(j, x, False), (zero, highest, sum_))
                acc, _, sum_ = lax.fori_loop(past, blocks, lambda j, x: step(j, x, True), carry)
                if own_output:
                    plgpu.barrier_arrive(q_free.at[warpgroup])
                _store(acc, sum_, o_s.at[warpgroup], out.at[chunk, :, head(pair, warpgroup)])
                if not own_output:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.barrier_arrive(q_free.at[warpgroup])

            pl.when(warpgroup == 1)(take_turn)
            each_unit(attend)
            pl.when(warpgroup == 0)(take_turn)
            plgpu.wait_smem_to_gmem(0)

        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    return body


def _deal(run: Any, total: Any, pairs: int, block: int, order: Any, contexts: Any) -> Any:
    """Run on each of this program's units: its number, the blocks before it, its chunk, pair of heads and blocks.

    Returns the number of units and of blocks. Units come longest first and are dealt to the programs back and forth.
    """
    program, programs = lax.axis_index("program"), lax.axis_size("program")

    def step(i: Any, carry: Any) -> Any:
        units, before = carry
        place = jnp.where(lax.rem(i, 2) == 0, program, programs - 1 - program)
        index = i * programs + place
        held = index < total
        index = jnp.minimum(index, total - 1)
        chunk = order[lax.div(index, pairs)]
        blocks = jnp.where(held, lax.div(contexts[chunk] + block - 1, block), 0)
        pl.when(held)(lambda: run(i, before, chunk, lax.rem(index, pairs), blocks))
        return units + held.astype(jnp.int32), before + blocks

    rounds = lax.div(total + programs - 1, programs)
    return lax.fori_loop(0, rounds, step, (jnp.int32(0), jnp.int32(0)))


def _add_values(acc: Any, shares: Any, staged: Any, values: Any, meanwhile: Callable[[], None]) -> Any:
    """`acc + shares @ values`, in the registers of `acc`; what is to do `meanwhile` is done while it runs.

    The interpreter knows neither that form nor shares in registers: there they go through shared memory (`staged`).
    """
    if interpreter() is not None:
        staged[...] = shares
        plgpu.commit_smem()
        meanwhile()
        return acc + product(staged, values, acc.shape[1])

    def run(total: Any) -> None:
        plgpu.wgmma(total, shares, values)
        meanwhile()

    return pl.run_state(run)(plgpu.ACC.init(acc))


def _store(acc: Any, sum_: Any, staged: Any, target: Any) -> None:
    """Send `acc / sum_` to `target` by way of `staged`, which the output before may still be leaving."""
    acc = acc / lax.broadcast_in_dim(sum_, acc.shape, [0])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    staged[...] = acc.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged, target)


def _await(barriers: Any, count: int) -> None:
    for i in range(count):
        plgpu.barrier_wait(barriers.at[i])


def _clear_values(values: Any, left: Any) -> None:
    """Set the rows from `left` on of a block of values to zero; both warpgroups write the same."""
    block, width = values.shape
    for c in range(block // CHUNK):
        clear_tail(values.at[pl.ds(c * CHUNK, CHUNK)], left - c * CHUNK, width)
    plgpu.commit_smem()


def _visible(start: jax.Array, first: jax.Array, block: int) -> jax.Array:
    """Which of `block` tokens from position `first` on each of 64 queries from position `start` on sees."""
    query = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=ROW) + start
    token = plgpu.broadcasted_iota(jnp.int32, (block,), 0, layout=FULL.reduce(0)) + first
    shape = (CHUNK, block)
    return lax.broadcast_in_dim(query, shape, [0]) >= lax.broadcast_in_dim(token, shape, [1])
