"""Attention of rows in decode over pages of keys and values on Hopper: a key head's queries against 64 tokens at once.

A warpgroup streams blocks of 64 tokens from the pages into a ring of shared memory, another multiplies: the query heads
of one key head fill (with padding) the 64 rows of a product. Blocks run over persistent programs as `gpu_splits` cut
them. Tokens past a row's last may hold anything: scores are selected away, values are set to zero.

Letters: B rows, G key heads, R query heads of one key head rounded up to 8, D head width, P pages, S tokens a page,
M pages of a row, L layers of the pool, I items.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.gqa.gpu_splits import BLOCK, MULTIPROCESSORS, Items
from kernels_pallas.mosaic_gpu import interpreter, made_once

ROWS = 64  # rows of a product of a warpgroup
TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
RING_BYTES = 96 * 1024  # keys and values on their way or in use
LANE = plgpu.LoweringSemantics.Lane
# Sums along a row of a product stay within four threads: they need no shared memory, of which there is none to spare.
PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=LANE, reduction_scratch_bytes=0)
FULL, ROW = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)


@dataclass(frozen=True)
class Plan:
    """Static shapes of one kernel. `ring`: tiles of 64 tokens in shared memory. `columns`: of one product's output."""

    heads: int
    group: int
    width: int
    page: int
    ring: int
    query_slots: int
    columns: int

    @property
    def copies(self) -> int:
        """Pages that make up a block."""
        return max(1, BLOCK // self.page)


def decode_plan(heads: int, group: int, width: int, page: int) -> Plan:
    """Tiles by shape: a ring of 96 KiB keeps the memory busy while a product or an item's end takes its time."""
    ring = RING_BYTES // (BLOCK * width * 2)
    return Plan(heads, group, width, page, ring, 2 if width <= 128 else 1, width)


def tiled(shape: tuple[int, ...]) -> Any:
    """Shared memory in the form that products read: bfloat16, rows of 128 bytes, swizzled."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=TRANSFORMS)


def attend_items(
    q: Float[Array, "B G R D"],
    table: Int[Array, "B M"],
    length: Int[Array, "B"],
    items: Items,
    pages: Float[Array, "L P S G 2 D"],
    layer: Int[Array, "1"],
    scale: float,
    plan: Plan,
) -> tuple[Float[Array, "I G R E"], Float[Array, "I G 64"], Float[Array, "I G 64"]]:
    """Partial outputs of the items (E is D or 128, whichever is more), and what `sum_splits` needs to join them.

    Args:
      length: cached tokens of each row, this step's included; `pages`, bfloat16, hold them already.
    """
    count, width = items.row.shape[0], max(plan.width, 128)
    programs = min(MULTIPROCESSORS, count * plan.heads)
    bf16_queries, f32 = tiled((plan.query_slots, ROWS, plan.width)), jnp.float32
    arguments = (q, table, length, items.row, items.first, items.blocks, items.count, layer, pages)
    kernel = made_once(
        ("gqa_decode", plan, scale),
        arguments,
        lambda: plgpu.kernel(
            _body(plan, scale),
            out_type=[
                jax.ShapeDtypeStruct((count, plan.heads, plan.group, width), f32),
                jax.ShapeDtypeStruct((count, plan.heads, ROWS), f32),
                jax.ShapeDtypeStruct((count, plan.heads, ROWS), f32),
            ],
            scratch_types=[
                bf16_queries,
                tiled((plan.ring, BLOCK, plan.width)),
                tiled((ROWS, BLOCK)),
                plgpu.SMEM((ROWS, 64), f32),
                plgpu.Barrier(num_barriers=plan.query_slots),
                plgpu.Barrier(num_barriers=plan.query_slots),
                plgpu.Barrier(num_barriers=plan.ring, num_arrivals=plan.copies),
                plgpu.Barrier(num_barriers=plan.ring),
                plgpu.Barrier(num_arrivals=2),
            ],
            grid=(programs,),
            grid_names=("program",),
            num_threads=2,
            thread_name="warpgroup",
            compiler_params=PARAMS,
            kernel_name="gqa_decode",
            interpret=interpreter(),
        ),
    )
    return kernel(*arguments)


def _body(plan: Plan, scale: float) -> Callable[..., None]:
    heads, width, columns = plan.heads, plan.width, plan.columns
    factor = scale * math.log2(math.e)

    def body(*refs: Any) -> None:
        q, table, length, rows, firsts, blocks, count, layer_ref, pages, out, top, total, *scratch = refs
        q_s, ring_s, p_s, o_s, q_full, q_free, full, free, done = scratch
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
        programs = lax.axis_size("program")
        units = lax.div(count[0] * heads - program + programs - 1, programs)

        def unit(i: Any) -> Any:
            index = program + i * programs
            item = lax.div(index, heads)
            return item, lax.rem(index, heads), rows[item], firsts[item], blocks[item]

        @pl.when(warpgroup == 1)
        def _load() -> None:
            plgpu.set_max_registers(40, action="decrease")
            layer = layer_ref[0]

            def load_block(row: Any, last: Any, head: Any, block: Any, tile: Any) -> None:
                for kind in range(2):
                    slot = lax.rem(tile + kind, plan.ring)

                    @pl.when(tile + kind >= plan.ring)
                    def _(slot: Any = slot) -> None:
                        plgpu.barrier_wait(free.at[slot])

                    for part in range(plan.copies):
                        size = BLOCK // plan.copies
                        token = block * BLOCK + part * size
                        page = table[row, jnp.minimum(lax.div(token, plan.page), last)]
                        source = pages.at[layer, page, pl.ds(lax.rem(token, plan.page), size), head, kind]
                        target = ring_s.at[slot, pl.ds(part * size, size)]
                        plgpu.copy_gmem_to_smem(source, target, full.at[slot])

            def load_unit(i: Any, tile: Any) -> Any:
                _, head, row, first, n = unit(i)
                slot = lax.rem(i, plan.query_slots)
                pl.when(i >= plan.query_slots)(lambda: plgpu.barrier_wait(q_free.at[slot]))

                plgpu.copy_gmem_to_smem(q.at[row, head], q_s.at[slot, pl.ds(0, plan.group)], q_full.at[slot])
                last = lax.div(length[row] - 1, plan.page)

                def step(j: Any, tile: Any) -> Any:
                    load_block(row, last, head, first + j, tile)
                    return tile + 2

                return lax.fori_loop(0, n, step, tile)

            tiles = lax.fori_loop(0, units, load_unit, jnp.int32(0))

            @pl.loop(jnp.maximum(tiles - plan.ring, 0), tiles)
            def _drain(tile: Any) -> None:
                plgpu.barrier_wait(free.at[lax.rem(tile, plan.ring)])

            @pl.loop(jnp.maximum(units - plan.query_slots, 0), units)
            def _release(i: Any) -> None:
                plgpu.barrier_wait(q_free.at[lax.rem(i, plan.query_slots)])

        @pl.when(warpgroup == 0)
        def _multiply() -> None:
            plgpu.set_max_registers(232, action="increase")

            def attend_block(queries: Any, left: Any, tile: Any, carry: Any) -> Any:
                accs, highest, sum_ = carry
                slot, value_slot = lax.rem(tile, plan.ring), lax.rem(tile + 1, plan.ring)
                plgpu.barrier_wait(full.at[slot])
                scores = product(queries, ring_s.at[slot].transpose((1, 0)), BLOCK) * factor
                plgpu.barrier_arrive(free.at[slot])
                token = plgpu.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 1, layout=FULL)
                scores = jnp.where(token < left, scores, -jnp.inf)
                new = jnp.maximum(highest, scores.max(axis=1))
                shares = jnp.exp2(scores - lax.broadcast_in_dim(new, scores.shape, [0]))
                fading = jnp.exp2(highest - new)
                sum_ = sum_ * fading + shares.sum(axis=1)
                p_s[...] = shares.astype(jnp.bfloat16)
                plgpu.barrier_wait(full.at[value_slot])

                pl.when(left < BLOCK)(lambda: clear_tail(ring_s.at[value_slot], left, width))

                plgpu.commit_smem()
                added = []
                for c, acc in enumerate(accs):
                    values = ring_s.at[value_slot, :, pl.ds(c * columns, columns)]
                    faded = acc * lax.broadcast_in_dim(fading, acc.shape, [0])
                    added.append(accumulate(faded, p_s, values))
                plgpu.barrier_arrive(free.at[value_slot])
                return tuple(added), new, sum_

            def store_output(item: Any, head: Any, accs: Any) -> None:
                for c, acc in enumerate(accs):
                    for d in range(columns // 64):
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        o_s[...] = acc[:, d * 64 : (d + 1) * 64]
                        plgpu.commit_smem()
                        target = out.at[item, head, :, pl.ds(c * columns + d * 64, 64)]
                        plgpu.copy_smem_to_gmem(o_s.at[pl.ds(0, plan.group)], target)

            def attend_unit(i: Any, tile: Any) -> Any:
                item, head, row, first, n = unit(i)
                slot = lax.rem(i, plan.query_slots)
                tokens = length[row]
                plgpu.barrier_wait(q_full.at[slot])
                zero = plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), FULL)
                highest = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW)
                sum_ = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)

                def step(j: Any, carry: Any) -> Any:
                    return attend_block(q_s.at[slot], tokens - (first + j) * BLOCK, tile + 2 * j, carry)

                start = ((zero,) * (width // columns), highest, sum_)
                accs, highest, sum_ = lax.fori_loop(0, n, step, start)
                plgpu.barrier_arrive(q_free.at[slot])
                store_output(item, head, accs)
                top.at[item, head][...] = highest
                total.at[item, head][...] = sum_
                return tile + 2 * n

            lax.fori_loop(0, units, attend_unit, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    return body


def product(a: jax.Ref, b: jax.Ref, columns: int) -> jax.Array:
    """`a @ b`, 64 rows, both in shared memory."""

    def run(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return lax.optimization_barrier(pl.run_scoped(run, plgpu.ACC((ROWS, columns), jnp.float32)))


def accumulate(acc: jax.Array, a: jax.Ref, b: jax.Ref) -> jax.Array:
    """`acc + a @ b`, in the registers of `acc`; by a product of its own in the interpreter, which lacks that form."""
    if interpreter() is not None:
        return acc + product(a, b, acc.shape[1])

    def run(total: Any) -> None:
        plgpu.wgmma(total, a, b)

    return lax.optimization_barrier(pl.run_state(run)(plgpu.ACC.init(acc)))


def clear_tail(values: jax.Ref, left: jax.Array, width: int) -> None:
    """Set the rows from `left` on of a tile `[64, width]` to zero."""
    for c in range(width // 64):
        part = values.at[:, pl.ds(c * 64, 64)]
        token = plgpu.broadcasted_iota(jnp.int32, (BLOCK, 64), 0, layout=FULL)
        held = plgpu.load(part, layout=FULL)
        part[...] = jnp.where(token < left, held, jnp.zeros((), held.dtype))
