"""Stores the cached rows of prefilled tokens in their pages, by copies of whole windows, in place.

Copies to a page carry a tile of 16 tokens. A window is such a tile of one page: one that the step fills is only
written; one that it fills in part is read first, and keeps its other tokens. Knows nothing of what a row means.

Letters: T tokens, n windows, L layers, P pages, S tokens a page, W lanes of a cached token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.gqa.tpu_attend import VMEM_BYTES, WINDOW
from kernels_pallas.mosaic_tpu import interpreter
from kernels_pallas.op import RaggedBatch, take

BATCH_BYTES = 1 << 20  # of the windows that one step of the grid carries, read, filled and written at once
MOST_BATCH = 16

Ref = Any
Index = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Windows:
    """The windows that rows in prefill write. One that writes no token is absent."""

    token: Int[Array, "n"]  # the token that lies at the window's first place, if the row has it in this step
    page: Int[Array, "n"]
    place: Int[Array, "n"]  # of the window's first token in the page
    first: Int[Array, "n"]  # new tokens are places `first` to `end` of the window
    end: Int[Array, "n"]


def plan_windows(batch: RaggedBatch, tokens: int, page: int) -> Windows:
    """The windows of all rows in prefill, in the order of the tokens."""
    most = batch.rows if batch.prefills is None else batch.prefills
    count = max((tokens + 30 * most) // WINDOW, 1)  # a row of n tokens touches at most (n + 30) // 16
    lengths = jnp.where(batch.in_decode, 0, batch.lengths)
    last = (batch.seen + lengths + WINDOW - 1) // WINDOW
    ends = jnp.cumsum(jnp.where(lengths > 0, last - batch.seen // WINDOW, 0))
    index = jnp.arange(count, dtype=jnp.int32)
    row = jnp.searchsorted(ends, index, side="right", method="compare_all").astype(jnp.int32)
    used = row < batch.rows
    row = jnp.where(used, row, 0)
    position = (index - jnp.where(row > 0, ends[row - 1], 0) + batch.seen[row] // WINDOW) * WINDOW
    first = jnp.maximum(batch.seen[row] - position, 0)
    end = jnp.minimum(batch.seen[row] + lengths[row] - position, WINDOW)
    token = batch.query_start[row] + position - batch.seen[row]
    number = batch.pages[row, jnp.where(used, position // page, 0)]
    end = jnp.where(used & (number > 0), end, 0)
    return Windows(*(x.astype(jnp.int32) for x in (token, number, position % page, first, end)))


def store_windows(
    values: Float[Array, "T W"], pages: Float[Array, "L P S W"], layer: int | Int[Array, ""], windows: Windows
) -> Float[Array, "L P S W"]:
    """The pages with the new tokens of all windows stored, in place."""
    lanes = pages.shape[3]
    batch = max(min(MOST_BATCH, BATCH_BYTES // (WINDOW * lanes * pages.dtype.itemsize)), 1)
    padding = -windows.page.shape[0] % batch
    token, page, place, first, end = (jnp.pad(x, (0, padding)) for x in dataclasses.astuple(windows))
    inside = jnp.arange(WINDOW, dtype=jnp.int32)[None, :]
    new = (inside >= first[:, None]) & (inside < end[:, None])
    source = take(values, jnp.where(new, token[:, None] + inside, values.shape[0])).astype(pages.dtype)
    scalars = (page, place, first, end, jnp.asarray(layer, jnp.int32).reshape(1))
    block = (batch, WINDOW, lanes)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        _store_batch,
        out_shape=pages,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(len(page) // batch,),
            in_specs=[pl.BlockSpec(block, lambda i, *_: (i, 0, 0)), anywhere],
            out_specs=anywhere,
            scratch_shapes=[pltpu.VMEM(block, pages.dtype), *[pltpu.SemaphoreType.DMA(()) for _ in range(2)]],
        ),
        input_output_aliases={len(scalars) + 1: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES),
        interpret=interpreter(),
        name="store_windows",
    )(*scalars, source, pages)


def _store_batch(
    page: Ref, place: Ref, first: Ref, end: Ref, layer: Ref, source: Ref, _: Ref, pages: Ref, held: Ref, *arrived: Ref
) -> None:
    batch = source.shape[0]
    lead = pl.program_id(0) * batch

    def stored(i: Index) -> Ref:
        at = pl.ds(pl.multiple_of(place[lead + i], WINDOW), WINDOW)
        return pages.at[layer[0], page[lead + i], at]

    def partly(i: Index) -> Any:
        return (end[lead + i] > 0) & (end[lead + i] - first[lead + i] < WINDOW)

    def each(wanted: Any, act: Any) -> None:
        jax.lax.fori_loop(0, batch, lambda i, _: pl.when(wanted(i))(lambda: act(i)), None)

    def load(i: Index) -> Any:
        return pltpu.make_async_copy(stored(i), held.at[i], arrived[0])

    def store(i: Index) -> Any:
        return pltpu.make_async_copy(held.at[i], stored(i), arrived[1])

    def fill(i: Index) -> None:
        old, new = held[i].astype(jnp.float32), source[i].astype(jnp.float32)
        inside = jax.lax.broadcasted_iota(jnp.int32, old.shape, 0)
        mine = (inside >= first[lead + i]) & (inside < end[lead + i])
        held[i] = jnp.where(mine, new, old).astype(held.dtype)
        store(i).start()

    def present(i: Index) -> Any:
        return end[lead + i] > 0

    each(partly, lambda i: load(i).start())
    each(partly, lambda i: load(i).wait())
    each(present, fill)
    each(present, lambda i: store(i).wait())
