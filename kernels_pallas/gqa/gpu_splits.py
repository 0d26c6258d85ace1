"""Split of the cached tokens of rows in decode into items that fill a GPU, and the sum of their partial outputs.

A row's tokens are cut into blocks of 64, and its blocks into equal runs. How many blocks a run has follows from the
row's own length and from static shapes alone, so that a row's result never depends on its neighbours. The items of all
rows lie densely in one list, a row's own one after another. Knows no kind of attention.

Letters: B rows, I items, G key heads, R query heads of one key head rounded up to 8, D width of an output.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.mosaic_gpu import interpreter, made_once

BLOCK = 64  # cached tokens that one product takes
MULTIPROCESSORS = 132
LONGEST_RUN = 32  # blocks of an item, unless a row would have too many items
FEW_HEADS = 1024
UNROLLED = 8  # partial outputs on their way at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Items:
    """The work list. Entries past `count` are arbitrary."""

    row: Int[Array, "I"]
    first: Int[Array, "I"]  # first block
    blocks: Int[Array, "I"]
    count: Int[Array, "1"]
    start: Int[Array, "B"]  # first item of a row
    splits: Int[Array, "B"]  # items of a row; 0 for a row that takes no part


def most_splits(rows: int, blocks: int) -> int:
    """The most items of one row of at most `blocks` blocks: bounds the memory of partial outputs."""
    return min(blocks, max(32, min(256, 4096 // rows)))


def split_rows(length: Int[Array, "B"], blocks: int, lanes: int, overhead: float) -> Items:
    """Cut rows of `length` cached tokens (0: takes no part), at most `blocks` blocks each.

    Args:
      lanes: units of work that every item has, one for each key head or tile of queries.
      overhead: what a unit costs beside its blocks, in blocks: its partial output goes to memory and comes back.
    """
    rows = length.shape[0]
    limit = most_splits(rows, blocks)
    used = (length + BLOCK - 1) // BLOCK
    run = _run_blocks(used, rows * lanes, blocks, limit, overhead)
    splits = (used + run - 1) // run
    ends = jnp.cumsum(splits)
    index = jnp.arange(rows * limit, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(ends[None, :] <= index[:, None], axis=1), rows - 1).astype(jnp.int32)
    start = (ends - splits).astype(jnp.int32)
    first = (index - start[row]) * run[row]
    count = jnp.clip(used[row] - first, 0, run[row])
    return Items(row, first, count, ends[-1:].astype(jnp.int32), start, splits.astype(jnp.int32))


def _run_blocks(used: Int[Array, "B"], units: int, blocks: int, limit: int, overhead: float) -> Int[Array, "B"]:
    """Blocks of one item of each row: what would finish first if all rows were as long as this one.

    Runs stay short enough for a long row among short ones to spread over the chip.
    """
    splits = jnp.arange(1, limit + 1, dtype=jnp.int32)[None, :]
    run = (used[:, None] + splits - 1) // splits
    waves = ((units * splits + MULTIPROCESSORS - 1) // MULTIPROCESSORS).astype(jnp.float32)
    cost = jnp.where(
        run <= max(LONGEST_RUN, -(-blocks // limit)), waves * (run.astype(jnp.float32) + overhead), jnp.inf
    )
    best = jnp.argmin(cost, axis=1)[:, None]
    return jnp.maximum(jnp.take_along_axis(run, best, axis=1)[:, 0], 1)


def sum_splits(
    out: Float[Array, "I G R D"], top: Float[Array, "I G 64"], total: Float[Array, "I G 64"], items: Items, heads: int
) -> Float[Array, "B H D"]:
    """The outputs of rows, bfloat16, from the partial sums of their items; arbitrary for a row without items.

    Args:
      out, total: sums of shares times values, and of shares. top: the power of two that an item's shares are relative
        to. heads: query heads.
    """
    rows, (_, key_heads, _, width) = items.start.shape[0], out.shape
    group = heads // key_heads
    columns = width if rows * heads > FEW_HEADS else 128  # of one program: few heads are spread over more programs
    layout = plgpu.Layout.WG_STRIDED((columns,), vec_size=columns // 128)

    def body(out_ref: Any, top_ref: Any, total_ref: Any, start_ref: Any, splits_ref: Any, result_ref: Any) -> None:
        row, head = lax.axis_index("row"), lax.axis_index("head")
        inside = pl.ds(lax.axis_index("part") * columns, columns)
        key_head, member = lax.div(head, group), lax.rem(head, group)
        start, splits = start_ref[row], splits_ref[row]

        def step(i: Any, carry: Any) -> Any:
            acc, highest, sum_ = carry
            parts = []
            for j in range(UNROLLED):
                split = i * UNROLLED + j
                item = start + jnp.minimum(split, splits - 1)
                part = plgpu.load(out_ref.at[item, key_head, member, inside], layout=layout, optimized=False)
                power = jnp.where(split < splits, top_ref[item, key_head, member], -jnp.inf)
                parts.append((part, power, total_ref[item, key_head, member]))
            new = highest
            for _, power, _ in parts:
                new = jnp.maximum(new, power)
            factor = jnp.exp2(highest - new)
            acc, sum_ = acc * factor, sum_ * factor
            for part, power, count in parts:
                factor = jnp.exp2(power - new)
                acc, sum_ = acc + part * factor, sum_ + count * factor
            return acc, new, sum_

        @pl.when(splits > 0)
        def _() -> None:
            zero = plgpu.layout_cast(jnp.zeros((columns,), jnp.float32), layout)
            first = (zero, jnp.float32(-1e30), jnp.float32(0))
            acc, _, sum_ = lax.fori_loop(0, lax.div(splits + UNROLLED - 1, UNROLLED), step, first)
            result_ref.at[row, head, inside][...] = (acc / sum_).astype(jnp.bfloat16)

    arguments = (out, top, total, items.start, items.splits)
    kernel = made_once(
        ("sum_splits", heads),
        arguments,
        lambda: plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((rows, heads, width), jnp.bfloat16),
            grid=(width // columns, heads, rows),
            grid_names=("part", "head", "row"),
            compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
            kernel_name="sum_splits",
            interpret=interpreter(),
        ),
    )
    return kernel(*arguments)
