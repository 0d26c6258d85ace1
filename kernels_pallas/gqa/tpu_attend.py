"""Attention of query tiles over pages: the TPU kernel behind grouped-query and latent attention.

An item is a tile of query rows of one request and the tokens they may see. The grid walks the items; within an item,
blocks of pages come from HBM through a ring of buffers that runs ahead of the computation, across items too, so that
only the first block of a step is waited for. Scores meet an online softmax (arXiv 1805.02867; FlashAttention, arXiv
2205.14135). A block starts at a multiple of its size in the request: a row's numbers depend on its own tokens alone.

A cached token is one row of `W` lanes; `Columns` says which lanes are the keys and the values of a head. Rows of tokens
on sublanes and channels on lanes make every head's keys a matrix that the MXU takes as it lies. Where new values are
given, an item is one token in decode: its row replaces what the last block has in its place, and goes to its page.

Scores are in base 2: the queries carry the scale and log2(e). Knows no norm, no rotary and no gate.

Letters: n items, B requests, M pages of a request, L layers, P pages, S tokens a page, W lanes of a cached token,
R query rows of one key head in an item, g key heads, D width of keys, V width of values.
"""

import dataclasses
import functools
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.mosaic_tpu import interpreter

RING = 3  # blocks in VMEM: one that is computed on and two on their way, so that no copy waits for another's end
BLOCK_BYTES = 1 << 21  # of a block: 1.3 us of a v6e's HBM, longer than a copy takes to start
MOST_TOKENS = 1024  # of a block
CHUNK_TOKENS = 512  # tokens of one round of the softmax
STACKED_ROWS = 64  # query rows of several heads that share a round; more rows keep the MXU busy alone
WINDOW = 16  # tokens that a copy to a page carries at least: a tile of bfloat16
STRAND_ROWS = 256  # one strand's products run beside another's softmax; more rows at once spill
LANES = 128
VMEM_BYTES = 44 << 20  # 0.7 of the smallest VMEM, 64 MiB
MOST_TABLE_BYTES = 768 << 10  # of the page table in scalar memory, 1 MiB

Ref = Any
Index = Any  # an int32 scalar of the kernel


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where a cached row of lanes keeps head `g`: keys at `g * key_step`, values at `value_start + g * value_step`."""

    heads: int
    key_width: int
    value_width: int
    key_step: int
    value_start: int
    value_step: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Items:
    """What each item of the grid attends to. An item without tokens is absent: its output is undefined."""

    row: Int[Array, "n"]
    start: Int[Array, "n"]  # position of the first query
    length: Int[Array, "n"]  # tokens that the item sees; 0: absent


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of one kernel. `queries`: tokens of an item, a power of two; query row r belongs to token r % queries."""

    queries: int
    block: int  # tokens of a buffer
    chunk: int  # tokens of a round of the softmax
    stacked: int  # heads of a round
    strand: int  # query rows that share one softmax in a round: of all stacked heads, or a part of one head's


def tile(queries: int, rows: int, columns: Columns, lanes: int, page: int, itemsize: int) -> Tiling:
    """Sizes for items of `queries` tokens and `rows` query rows a head, a multiple of 8.

    A block has about BLOCK_BYTES, so that the start of a copy is hidden and three blocks fit. Heads are stacked in one
    round where a head's rows alone leave the softmax waiting for the MXU and back.
    """
    fitting = BLOCK_BYTES // (-(-lanes // LANES) * LANES * itemsize)
    block = max(min(1 << max(fitting.bit_length() - 1, 0), MOST_TOKENS), LANES, page)
    most = max(STACKED_ROWS // rows, 1)
    stacked = max(size for size in range(1, min(most, columns.heads) + 1) if columns.heads % size == 0)
    strands = [size for size in range(8, min(rows, STRAND_ROWS) + 1, 8) if rows % size == 0]
    strand = strands[-1] if stacked == 1 else stacked * rows
    return Tiling(queries, block, min(block, CHUNK_TOKENS), stacked, strand)


def attend(
    q: Float[Array, "n g*R D"],
    new: Float[Array, "n W"] | None,
    pages: Float[Array, "L P S W"],
    layer: int | Int[Array, ""],
    table: Int[Array, "B M"],
    items: Items,
    columns: Columns,
    tiling: Tiling,
) -> tuple[Float[Array, "n g*R V"], Float[Array, "L P S W"]]:
    """Softmax attention of every item over its pages; stores `new`, one token an item, where it is given.

    Args:
      q: query rows times the scale and log2(e), head by head; `tiling.queries` tokens, the token running fastest.
      new: the cached rows of the items' tokens, or None where the pages hold them already.
    Returns the outputs in the dtype of `q`, undefined for absent items, and the pages, changed in place.
    Raises NotImplementedError for a page table that does not fit scalar memory.
    """
    if table.size * 4 > MOST_TABLE_BYTES:
        wanted = f"a page table of at most {MOST_TABLE_BYTES // 4} entries"
        raise NotImplementedError(f"attention on tpu: wanted {wanted}, got {table.size}: use larger pages or 'xla'")
    (count, rows, _), lanes = q.shape, pages.shape[3]
    present = items.length > 0
    scalars = (
        *(items.row, items.start, items.length, _following(present), _homes(present), table.reshape(-1)),
        jnp.asarray(layer, jnp.int32).reshape(1),
    )
    own = pl.BlockSpec((1, *q.shape[1:]), _at_home)
    stored = [] if new is None else [new[:, None]]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    result = jax.ShapeDtypeStruct((count, rows, columns.value_width), q.dtype)
    out = pl.BlockSpec((1, *result.shape[1:]), _at_home)
    body = functools.partial(
        _attend_item, stores=new is not None, pages_a_row=table.shape[1], columns=columns, t=tiling
    )
    outputs = pl.pallas_call(
        body,
        out_shape=(result, *([pages] if stored else [])),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(count,),
            in_specs=[own, *[pl.BlockSpec((1, 1, lanes), _at_home) for _ in stored], anywhere],
            out_specs=[out, *[anywhere for _ in stored]],
            scratch_shapes=_scratch(rows, columns.value_width, pages, tiling),
        ),
        input_output_aliases={len(scalars) + 2: 1} if stored else {},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES),
        interpret=interpreter(),
        name="attend_pages",
    )(*scalars, q, *stored, pages)
    return outputs[0], outputs[1] if stored else pages


def _scratch(rows: int, value_width: int, pages: Array, tiling: Tiling) -> list[Any]:
    return [
        pltpu.VMEM((RING, tiling.block, pages.shape[3]), pages.dtype),
        pltpu.VMEM((WINDOW, pages.shape[3]), pages.dtype),
        pltpu.VMEM((rows, LANES), jnp.float32),
        pltpu.VMEM((rows, LANES), jnp.float32),
        pltpu.VMEM((rows, value_width), jnp.float32),
        pltpu.SMEM((4,), jnp.int32),
        pltpu.SemaphoreType.DMA((RING,)),
        pltpu.SemaphoreType.DMA(()),
    ]


def _at_home(item: Index, *scalars: Ref) -> tuple[Index, ...]:
    return scalars[4][item], 0, 0


def _following(present: Bool[Array, "n"]) -> Int[Array, "n+1"]:
    """The first present item, then for each item the next one that is present; n where there is none."""
    count = present.shape[0]
    index = jnp.where(present, jnp.arange(count, dtype=jnp.int32), count)
    later = jax.lax.cummin(index, reverse=True)
    return jnp.concatenate([later, jnp.full((1,), count, jnp.int32)])


def _homes(present: Bool[Array, "n"]) -> Int[Array, "n"]:
    """The item whose queries and outputs lie in VMEM at each step: an absent item leaves those of the last one."""
    return jax.lax.cummax(jnp.where(present, jnp.arange(present.shape[0], dtype=jnp.int32), 0))


@dataclasses.dataclass(frozen=True)
class _Ring:
    """The buffers of pages and the cursor of what to load next: item, block, blocks asked for, blocks used."""

    pages: Ref
    buffers: Ref
    cursor: Ref
    arrived: Ref
    following: Ref
    row: Ref
    length: Ref
    table: Ref
    layer: Index
    pages_a_row: int

    def start_first(self, item: Index) -> None:
        self.cursor[0] = item
        for place in range(1, 4):
            self.cursor[place] = 0
        for _ in range(RING - 1):
            self.load_next()

    def load_next(self) -> None:
        """Start the copies of the block under the cursor, and move it on."""
        item, block = self.cursor[0], self.cursor[1]

        @pl.when(item < self.row.shape[0])
        def _load() -> None:
            slot = jax.lax.rem(self.cursor[2], RING)
            self._each_page(item, block, slot, lambda copy: copy.start())
            more = (block + 1) * self.buffers.shape[1] < self.length[item]
            self.cursor[0] = jnp.where(more, item, self.following[item + 1])
            self.cursor[1] = jnp.where(more, block + 1, 0)
            self.cursor[2] = self.cursor[2] + 1

    def next_block(self, item: Index, block: Index) -> Index:
        """Wait for the next block and ask for one more. Returns the buffer's number."""
        slot = jax.lax.rem(self.cursor[3], RING)
        self._each_page(item, block, slot, lambda copy: copy.wait())
        self.cursor[3] = self.cursor[3] + 1
        self.load_next()
        return slot

    def _each_page(self, item: Index, block: Index, slot: Index, act: Any) -> None:
        size, page = self.buffers.shape[1], self.pages.shape[2]
        left = self.length[item] - block * size
        first = self.row[item] * self.pages_a_row + block * (size // page)

        def one(i: Index, nothing: None) -> None:
            source = self.pages.at[self.layer, self.table[first + i]]
            target = self.buffers.at[slot, pl.ds(pl.multiple_of(i * page, page), page)]
            act(pltpu.make_async_copy(source, target, self.arrived.at[slot]))

        jax.lax.fori_loop(0, jnp.minimum(pl.cdiv(left, page), size // page), one, None)


def _attend_item(*refs: Ref, stores: bool, pages_a_row: int, columns: Columns, t: Tiling) -> None:
    row, start, length, following, _, table, layer, q = refs[:8]
    new, out, held = (refs[8], refs[10], refs[11]) if stores else (None, refs[9], refs[8])
    buffers, window, peak, total, sums, cursor, arrived, stored = refs[-8:]
    item = pl.program_id(0)
    ring = _Ring(held, buffers, cursor, arrived, following, row, length, table, layer[0], pages_a_row)
    pl.when(item == following[0])(lambda: ring.start_first(item))
    seen = length[item]
    last = pl.cdiv(seen, t.block) - 1

    @pl.when(seen > 0)
    def _present() -> None:
        peak[...] = jnp.full(peak.shape, -jnp.inf, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        sums[...] = jnp.zeros(sums.shape, jnp.float32)
        place = seen - 1 - last * t.block  # of the last token in its block
        target = _window_of(held, layer[0], table, row[item] * pages_a_row, seen - 1) if stores else None
        copy = pltpu.make_async_copy(window, target, stored) if stores else None

        def one_block(block: Index, nothing: None) -> None:
            slot = ring.next_block(item, block)
            buffer = buffers.at[slot]

            @pl.when(block == last)
            def _finish_block() -> None:
                if new is not None and copy is not None:
                    _insert(buffer, window, new, place)
                    copy.start()
                _clear_tail(buffer, place + 1, t.chunk)

            _attend_block(q, buffer, (peak, total, sums), block * t.block, seen, start[item], columns, t)

        jax.lax.fori_loop(0, last + 1, one_block, None)
        out[0] = (sums[...] / total[:, :1]).astype(out.dtype)
        if copy is not None:
            copy.wait()


def _window_of(pages: Ref, layer: Index, table: Ref, first: Index, position: Index) -> Ref:
    """The window of a page that holds a position of a request whose page table starts at `first`."""
    page = pages.shape[2]
    inside = jax.lax.rem(position, page)
    aligned = pl.multiple_of(inside - jax.lax.rem(inside, WINDOW), WINDOW)
    return pages.at[layer, table[first + jax.lax.div(position, page)], pl.ds(aligned, WINDOW)]


def _insert(buffer: Ref, window: Ref, new: Ref, place: Index) -> None:
    """Put the new token in its place in the block, and the window around it where it is stored from."""
    aligned = pl.multiple_of(place - jax.lax.rem(place, WINDOW), WINDOW)
    held = buffer[pl.ds(aligned, WINDOW), :].astype(jnp.float32)
    token = jax.lax.broadcasted_iota(jnp.int32, held.shape, 0) + aligned
    fresh = jnp.broadcast_to(new[0].astype(jnp.float32), held.shape)
    filled = jnp.where(token == place, fresh, held).astype(window.dtype)
    buffer[pl.ds(aligned, WINDOW), :] = filled
    window[...] = filled


def _clear_tail(buffer: Ref, used: Index, chunk: int) -> None:
    """Zeros from the first unused token to the end of its chunk: a share of zero times what lies there must be zero."""

    def clear(i: Index, nothing: None) -> None:
        aligned = pl.multiple_of(i * WINDOW, WINDOW)
        held = buffer[pl.ds(aligned, WINDOW), :].astype(jnp.float32)
        token = jax.lax.broadcasted_iota(jnp.int32, held.shape, 0) + aligned
        buffer[pl.ds(aligned, WINDOW), :] = jnp.where(token < used, held, 0.0).astype(buffer.dtype)

    jax.lax.fori_loop(jax.lax.div(used, WINDOW), pl.cdiv(used, chunk) * (chunk // WINDOW), clear, None)


def _attend_block(
    q: Ref,
    buffer: Ref,
    sums: tuple[Ref, Ref, Ref],
    first: Index,
    seen: Index,
    start: Index,
    columns: Columns,
    t: Tiling,
) -> None:
    """All heads over the chunks of one block; only chunks that some query may not see are masked."""
    chunks = jnp.minimum(pl.cdiv(seen - first, t.chunk), t.block // t.chunk)
    free = jnp.clip(jax.lax.div(start + 1 - first, t.chunk), 0, chunks)
    groups = columns.heads // t.stacked

    def rounds(masked: bool) -> Any:
        def one(i: Index, nothing: None) -> None:
            chunk = jax.lax.div(i, groups)
            group = i - chunk * groups
            offset = start - first - chunk * t.chunk if masked else None
            _attend_round(q, buffer, sums, chunk, group, offset, columns, t)

        return one

    jax.lax.fori_loop(0, free * groups, rounds(masked=False), None)
    jax.lax.fori_loop(free * groups, chunks * groups, rounds(masked=True), None)


def _attend_round(
    q: Ref,
    buffer: Ref,
    sums: tuple[Ref, Ref, Ref],
    chunk: Index,
    group: Index,
    offset: Index | None,
    columns: Columns,
    t: Tiling,
) -> None:
    """One chunk of tokens for the stacked heads of a group. offset: of the first query from the chunk's first token."""
    height = q.shape[1] // columns.heads * t.stacked
    tokens = pl.ds(pl.multiple_of(chunk * t.chunk, t.chunk), t.chunk)

    def lanes(head: int, at: int, step: int, width: int) -> Array:
        index = at + (group * t.stacked + head) * step
        return buffer[tokens, pl.ds(pl.multiple_of(index, gcd(at, step, LANES)), width)]

    keys = [lanes(head, 0, columns.key_step, columns.key_width) for head in range(t.stacked)]
    values = [lanes(head, columns.value_start, columns.value_step, columns.value_width) for head in range(t.stacked)]
    for first in range(0, height, t.strand):
        rows = pl.ds(pl.multiple_of(group * height + first, 8), t.strand)
        own = (sums[0].at[rows], sums[1].at[rows], sums[2].at[rows])
        newest = None if offset is None else offset + _query_of(first, t)
        _attend_strand(q[0, rows, :], keys, values, own, newest)


def _query_of(first: int, t: Tiling) -> Int[Array, "strand 1"]:
    """The query token in its item of each row of a strand that begins at row `first`."""
    return (jax.lax.broadcasted_iota(jnp.int32, (t.strand, 1), 0) + first) & (t.queries - 1)


def _attend_strand(
    q: Array, keys: list[Array], values: list[Array], sums: tuple[Ref, Ref, Ref], newest: Array | None
) -> None:
    """One round of the softmax for query rows, equal parts of them for each of the heads whose keys are given.

    newest: for each row the last token of the chunk that it may see, or None where it may see all.
    """
    peak, total, read = sums
    scores = _joined([_product(part, key, 1) for part, key in zip(_parts(q, len(keys)), keys, strict=True)])
    if newest is not None:
        token = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where(token <= newest, scores, -jnp.inf)
    old = peak[:, :1]
    high = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
    shares = jnp.exp2(scores - high)
    kept = jnp.exp2(old - high)
    peak[...] = jnp.broadcast_to(high, peak.shape)
    total[...] = total[...] * kept + jnp.sum(shares, axis=1, keepdims=True)
    parts = _parts(shares.astype(values[0].dtype), len(values))
    added = _joined([_product(part, value, 0) for part, value in zip(parts, values, strict=True)])
    read[...] = read[...] * kept + added


def _parts(rows: Array, count: int) -> list[Array]:
    size = len(rows) // count
    return [rows[i * size : (i + 1) * size] for i in range(count)]


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)


def _product(a: Array, b: Array, axis: int) -> Array:
    """`a` times `b` over the last axis of `a` and `axis` of `b`, summed in float32; float32 operands stay exact."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    contract = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, b, contract, precision=exact, preferred_element_type=jnp.float32)
