"""Absorbed latent attention of rows in decode on Hopper: the queries of up to 64 heads against 64 cached rows at once.

A cached row is key and value in one: its first Z numbers are the value. One warpgroup streams blocks of 64 rows from
the pages, one computes the shares of a block while two others still add up the values of the block before, half of the
output's columns each. Blocks run over persistent programs as `gqa.gpu_splits` cut them.

Letters: B rows, N tiles of heads, R heads of a tile, Z latent width, W cached width, P pages, S tokens a page, M pages
of a row, L layers of the pool, I items.
"""

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
from kernels_pallas.gqa.gpu_splits import BLOCK, MULTIPROCESSORS, Items
from kernels_pallas.mosaic_gpu import interpreter, made_once

LOAD, SCORE = 2, 3  # warpgroups; 0 and 1 add up values
COLUMNS = 128  # of one product's output
RING = 2  # tiles of 64 cached rows in shared memory; a third does not fit beside the queries


def attend_items(
    q: Float[Array, "B N R W"],
    table: Int[Array, "B M"],
    length: Int[Array, "B"],
    items: Items,
    pages: Float[Array, "L P S W"],
    layer: Int[Array, "1"],
    scale: float,
    latent: int,
) -> tuple[Float[Array, "I N R Z"], Float[Array, "I N 64"], Float[Array, "I N 64"]]:
    """Partial outputs of the items, before the value expansion, and what `sum_splits` needs to join them.

    Args:
      length: cached rows of each row, this step's included; `pages`, bfloat16, hold them already. latent: Z.
    """
    _, parts, group, width = q.shape
    count, page, f32 = items.row.shape[0], pages.shape[2], jnp.float32
    arguments = (q, table, length, items.row, items.first, items.blocks, items.count, layer, pages)
    kernel = made_once(
        ("mla_decode", latent, scale),
        arguments,
        lambda: plgpu.kernel(
            _body(parts, group, width, latent, page, scale),
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
            kernel_name="mla_decode",
            interpret=interpreter(),
        ),
    )
    return kernel(*arguments)


def _body(parts: int, group: int, width: int, latent: int, page_size: int, scale: float) -> Callable[..., None]:
    factor, half = scale * math.log2(math.e), latent // 2
    copies = max(1, BLOCK // page_size)

    def body(*refs: Any) -> None:
        q, table, length, rows, firsts, blocks, count, layer_ref, pages, out, top, total, *scratch = refs
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
                item, part, row, first, n = unit(i)
                run(i, tile, item, part, row, first, n)
                return tile + n

            return lax.fori_loop(0, units, step, jnp.int32(0))

        @pl.when(warpgroup == LOAD)
        def _load() -> None:
            plgpu.set_max_registers(24, action="decrease")
            layer = layer_ref[0]

            def load_unit(i: Any, tile: Any, item: Any, part: Any, row: Any, first: Any, n: Any) -> None:
                @pl.when(i > 0)
                def _() -> None:
                    plgpu.barrier_wait(q_free)

                plgpu.copy_gmem_to_smem(q.at[row, part], q_s.at[pl.ds(0, group)], q_full)
                last = lax.div(length[row] - 1, page_size)

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

            def score_block(left: Any, tile: Any, carry: Any) -> Any:
                highest, sum_ = carry
                slot = lax.rem(tile, RING)
                plgpu.barrier_wait(full.at[slot])
                scores = product(q_s, ring_s.at[slot].transpose((1, 0)), BLOCK) * factor
                token = plgpu.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 1, layout=FULL)
                scores = jnp.where(token < left, scores, -jnp.inf)
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

            def score_unit(i: Any, tile: Any, item: Any, part: Any, row: Any, first: Any, n: Any) -> None:
                tokens = length[row]
                plgpu.barrier_wait(q_full)
                highest = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW)
                sum_ = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)

                def step(j: Any, carry: Any) -> Any:
                    return score_block(tokens - (first + j) * BLOCK, tile + j, carry)

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

            def add_unit(i: Any, tile: Any, item: Any, part: Any, row: Any, first: Any, n: Any) -> None:
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
