"""Absorbed latent attention of rows that prefill on Hopper: 64 queries of one or several tokens against 64 cached rows.

A cached row is key and value in one: its first Z numbers are the value. One warpgroup streams blocks of 64 rows from
the pages, one computes the shares of a block while two others still add up the values of the block before, half of the
output's columns each. Programs are persistent; tiles with the longest contexts come first.

Letters: T tokens, H heads, A tiles of tokens, N tiles of heads, R queries of a tile rounded up to 8, Z latent
width, W cached width, B rows, P pages, S tokens a page, M pages of a row, L layers of the pool, I items.
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
from jaxtyping import Array, Float, Int

from kernels_pallas.gqa.gpu_decode import FULL, PARAMS, ROW, ROWS, accumulate, clear_tail, product, tiled
from kernels_pallas.gqa.gpu_prefill import plan_units
from kernels_pallas.gqa.gpu_splits import BLOCK, MULTIPROCESSORS, Items
from kernels_pallas.mosaic_gpu import interpreter, made_once
from kernels_pallas.op import RaggedBatch, take

TILE = 64  # queries of a tile at most
LOAD, SCORE = 2, 3  # warpgroups; 0 and 1 add up values
COLUMNS = 128  # of one product's output
LOWEST = -1e30  # a finite start: a query may see nothing of a block that a later token of its tile sees
RING = 2  # tiles of 64 cached rows in shared memory; a third does not fit beside the queries


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """What the queries of a tile belong to: consecutive tokens of one row."""

    row: Int[Array, "A"]
    start: Int[Array, "A"]  # position of the first token
    length: Int[Array, "A"]  # cached tokens up to the last token's own


def prefill(
    queries: Float[Array, "T H W"], pages: Array, layer: Array, batch: RaggedBatch, scale: float, latent: int
) -> Float[Array, "T H Z"]:
    """What the tokens of rows that prefill read of the latents, bfloat16; zeros for other tokens.

    Args:
      queries: absorbed. pages: bfloat16; they hold this step's tokens already. latent: Z.
    """
    tokens, heads, width = queries.shape
    parts = -(-heads // TILE)
    inside = heads // parts
    together = TILE // inside  # tokens of a tile
    units = plan_units(batch, tokens, together)
    held = take(queries, units.token).reshape(-1, together, parts, inside, width).swapaxes(1, 2)
    held = held.reshape(-1, parts, together * inside, width)
    blocks = ((units.context + BLOCK - 1) // BLOCK)[units.order]
    none = jnp.zeros_like(units.order)
    items = Items(units.order, none, blocks, units.used, none, none)
    tiles = Tiles(units.row, units.start, units.context)
    out, _, total = attend_tiles(held, batch.pages, tiles, items, pages, layer, scale, latent, inside)
    read = (out / total[:, :, : out.shape[2], None]).astype(queries.dtype)
    read = read.reshape(-1, parts, together, inside, latent).swapaxes(1, 2).reshape(-1, heads, latent)
    rank = jnp.zeros_like(units.order).at[units.order].set(jnp.arange(units.order.size, dtype=jnp.int32))
    place = jnp.where(units.place < read.shape[0], rank[units.place // together] * together, read.shape[0])
    return take(read, jnp.where(place < read.shape[0], place + units.place % together, place))


def attend_tiles(
    q: Float[Array, "A N R W"],
    table: Int[Array, "B M"],
    tiles: Tiles,
    items: Items,
    pages: Float[Array, "L P S W"],
    layer: Int[Array, "1"],
    scale: float,
    latent: int,
    heads: int,
) -> tuple[Float[Array, "I N R Z"], Float[Array, "I N 64"], Float[Array, "I N 64"]]:
    """Sums of shares times latents of the items, what the shares are relative to, and sums of shares.

    Args:
      items: of which the `row` is a tile. pages: bfloat16; they hold this step's tokens already.
      latent: Z. heads: queries of one token in a tile; a tile's queries are token by token.
    """
    _, parts, group, width = q.shape
    count, page, f32 = items.row.shape[0], pages.shape[2], jnp.float32
    arguments = (
        q,
        table,
        tiles.row,
        tiles.start,
        tiles.length,
        items.row,
        items.first,
        items.blocks,
        items.count,
        layer,
        pages,
    )
    kernel = made_once(
        ("mla_prefill", latent, heads, scale),
        arguments,
        lambda: plgpu.kernel(
            _body(parts, group, width, latent, heads, page, scale),
            out_type=[
                jax.ShapeDtypeStruct((count, parts, group, latent), f32),
                jax.ShapeDtypeStruct((count, parts, ROWS), f32),
                jax.ShapeDtypeStruct((count, parts, ROWS), f32),
            ],
            scratch_types=[
                plgpu.RefUnion(tiled((ROWS, width)), plgpu.SMEM((2, ROWS, COLUMNS), f32)),
                tiled((RING, BLOCK, width)),
                tiled((ROWS, BLOCK)),
                plgpu.SMEM((ROWS,), f32),
                plgpu.Barrier(),
                plgpu.Barrier(num_arrivals=2),
                plgpu.Barrier(num_barriers=RING, num_arrivals=max(1, BLOCK // page)),
                plgpu.Barrier(num_barriers=RING, num_arrivals=2),
                plgpu.Barrier(),
                plgpu.Barrier(num_arrivals=2),
                plgpu.Barrier(num_arrivals=4),
            ],
            grid=(min(MULTIPROCESSORS, count * parts),),
            grid_names=("program",),
            num_threads=4,
            thread_name="warpgroup",
            compiler_params=PARAMS,
            kernel_name="mla_prefill",
            interpret=interpreter(),
        ),
    )
    return kernel(*arguments)


def _body(
    parts: int, group: int, width: int, latent: int, heads: int, page_size: int, scale: float
) -> Callable[..., None]:
    factor, half = scale * math.log2(math.e), latent // 2
    copies = max(1, BLOCK // page_size)

    def body(*refs: Any) -> None:
        q, table, owner, start, length, rows, firsts, blocks, count, layer_ref, pages, out, top, total, *scratch = refs
        shared, ring_s, p_s, fading_s, q_full, q_free, full, free, shares_full, shares_free, done = scratch
        q_s, o_s = shared
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
        programs = lax.axis_size("program")
        units = lax.div(count[0] * parts - program + programs - 1, programs)

        def unit(i: Any) -> Any:
            index = program + i * programs
            item = lax.div(index, parts)
            return item, lax.rem(index, parts), rows[item], firsts[item], blocks[item]

        def each_unit(run: Any) -> Any:
            def step(i: Any, tile: Any) -> Any:
                item, part, queries, first, n = unit(i)
                run(i, tile, item, part, queries, first, n)
                return tile + n

            return lax.fori_loop(0, units, step, jnp.int32(0))

        @pl.when(warpgroup == LOAD)
        def _load() -> None:
            plgpu.set_max_registers(24, action="decrease")
            layer = layer_ref[0]

            def load_unit(i: Any, tile: Any, item: Any, part: Any, queries: Any, first: Any, n: Any) -> None:
                @pl.when(i > 0)
                def _() -> None:
                    plgpu.barrier_wait(q_free)

                plgpu.copy_gmem_to_smem(q.at[queries, part], q_s.at[pl.ds(0, group)], q_full)
                row, last = owner[queries], lax.div(length[queries] - 1, page_size)

                @pl.loop(0, n)
                def _(j: Any) -> None:
                    slot = lax.rem(tile + j, RING)
                    size = BLOCK // copies
                    token = (first + j) * BLOCK
                    found = [table[row, jnp.minimum(lax.div(token + c * size, page_size), last)] for c in range(copies)]

                    @pl.when(tile + j >= RING)
                    def _() -> None:
                        plgpu.barrier_wait(free.at[slot])

                    for c, page in enumerate(found):
                        source = pages.at[layer, page, pl.ds(lax.rem(token + c * size, page_size), size)]
                        plgpu.copy_gmem_to_smem(source, ring_s.at[slot, pl.ds(c * size, size)], full.at[slot])

            blocks_loaded = each_unit(load_unit)

            @pl.loop(jnp.maximum(blocks_loaded - RING, 0), blocks_loaded)
            def _(tile: Any) -> None:
                plgpu.barrier_wait(free.at[lax.rem(tile, RING)])

            pl.when(units > 0)(lambda: plgpu.barrier_wait(q_free))

        @pl.when(warpgroup == SCORE)
        def _score() -> None:
            plgpu.set_max_registers(136, action="increase")

            def score_block(visible: Any, left: Any, tile: Any, carry: Any) -> Any:
                highest, sum_ = carry
                slot = lax.rem(tile, RING)
                plgpu.barrier_wait(full.at[slot])
                scores = product(q_s, ring_s.at[slot].transpose((1, 0)), BLOCK) * factor
                token = plgpu.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 1, layout=FULL)
                scores = jnp.where(token < lax.broadcast_in_dim(visible, scores.shape, [0]), scores, -jnp.inf)
                new = jnp.maximum(highest, scores.max(axis=1))
                shares = jnp.exp2(scores - lax.broadcast_in_dim(new, scores.shape, [0]))
                fading = jnp.exp2(highest - new)
                sum_ = sum_ * fading + shares.sum(axis=1)

                @pl.when(left < BLOCK)
                def _() -> None:
                    clear_tail(ring_s.at[slot], left, latent)

                @pl.when(tile > 0)
                def _() -> None:
                    plgpu.barrier_wait(shares_free)

                p_s[...] = shares.astype(jnp.bfloat16)
                fading_s[...] = fading
                plgpu.commit_smem()
                plgpu.barrier_arrive(shares_full)
                return new, sum_

            def score_unit(i: Any, tile: Any, item: Any, part: Any, queries: Any, first: Any, n: Any) -> None:
                plgpu.barrier_wait(q_full)
                highest = plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), ROW)
                sum_ = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
                query = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
                visible = lax.div(query, jnp.full_like(query, heads)) + start[queries] + 1

                def step(j: Any, carry: Any) -> Any:
                    before = (first + j) * BLOCK
                    return score_block(visible - before, length[queries] - before, tile + j, carry)

                highest, sum_ = lax.fori_loop(0, n, step, (highest, sum_))
                top.at[item, part][...] = highest
                total.at[item, part][...] = sum_

            scored = each_unit(score_unit)
            pl.when(scored > 0)(lambda: plgpu.barrier_wait(shares_free))

        @pl.when(warpgroup < 2)
        def _add() -> None:
            plgpu.set_max_registers(176, action="increase")
            first_column = warpgroup * half

            def add_block(tile: Any, accs: Any) -> Any:
                slot = lax.rem(tile, RING)
                plgpu.barrier_wait(shares_full)
                fading = plgpu.load(fading_s, layout=ROW)
                added = []
                for c, acc in enumerate(accs):
                    values = ring_s.at[slot, :, pl.ds(first_column + c * COLUMNS, COLUMNS)]
                    added.append(accumulate(acc * lax.broadcast_in_dim(fading, acc.shape, [0]), p_s, values))
                plgpu.barrier_arrive(shares_free)
                plgpu.barrier_arrive(free.at[slot])
                return tuple(added)

            def add_unit(i: Any, tile: Any, item: Any, part: Any, queries: Any, first: Any, n: Any) -> None:
                zero = plgpu.layout_cast(jnp.zeros((ROWS, COLUMNS), jnp.float32), FULL)
                accs = lax.fori_loop(0, n, lambda j, accs: add_block(tile + j, accs), (zero,) * (half // COLUMNS))
                staged = o_s.at[warpgroup]
                for c, acc in enumerate(accs):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    staged[...] = acc
                    plgpu.commit_smem()
                    target = out.at[item, part, :, pl.ds(first_column + c * COLUMNS, COLUMNS)]
                    plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, group)], target)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(q_free)

            each_unit(add_unit)
            plgpu.wait_smem_to_gmem(0)

        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    return body
