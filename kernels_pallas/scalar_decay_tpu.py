"""Prefill of the kinds with a scalar decay on TPU: the frame that walks the chunks of a ragged batch.

The grid is sequential: one step for each chunk of at most 128 tokens, all heads of the layer inside it. The state of a
row stays in VMEM from its first chunk to its last. While a chunk is computed, the tokens of the next one arrive; two
buffers of states take turns by row, so that a row's final state leaves, and the next row's arrives, while tokens are
computed. Nothing but tokens, states of rows, and outputs crosses HBM.

Copies from HBM start at a multiple of 16 tokens, but a row starts anywhere: a chunk lies `offset` rows into a *window*
of nine tiles of 16 tokens. Chunks follow one another without gaps in the packed tokens, so outputs leave as whole
tiles: the rows of a tile that belong to the chunk before are kept, finished again with the same result, and written
again.

A kind gives two parts: `scan` computes the recurrence of a chunk and leaves raw outputs in `block.raw`, `finish` turns
the rows of the window into outputs (norm over heads, gate). Which token belongs to whom, slots and snapshots live here.

A snapshot at an odd multiple of 64 lies inside a chunk: `scan` then leaves the memory after so many tokens in
`block.stage` as well. Knows no kind's mathematics.

Letters: T tokens, C tokens of a chunk, n chunks, N slots, L layers of a pool, H heads, V value width, K key width.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.mosaic_tpu import interpreter
from kernels_pallas.op import RaggedBatch, prefill_chunks

C = 128  # a power of two and the side of the matrix units; the serial chain over chunks is half of that with 64
TILE = 16  # tokens that copies move: a tile of bfloat16, two of float32
TILES = C // TILE + 1
WINDOW = TILES * TILE
LANES = 128

Ref = Any
Index = Any  # an int32 scalar of the kernel, or an int

# Copies that may be under way, each with a signal: final states from both buffers, a snapshot at the end of a chunk,
# one inside it, outputs, the state of the next row.
_STORE, _SNAPSHOT, _STAGE, _OUT, _READ, _COPIES = 0, 2, 3, 4, 5, 6


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Work:
    """The chunks of the rows that prefill, in the order of their tokens; empty ones at the end.

    A slot is 0 where a chunk has nothing to read, write or snapshot. `taken`: tokens of the chunk in its snapshot.
    """

    layer: Int[Array, "1"]
    end: Int[Array, "1"]  # tokens that are no padding
    start: Int[Array, "n+1"]
    length: Int[Array, "n+1"]  # 0 for an empty chunk
    first: Int[Array, "n+1"]  # 1 for the first chunk of a row
    buffer: Int[Array, "n+1"]  # of the row's state, 0 or 1
    read: Int[Array, "n+1"]
    write: Int[Array, "n+1"]
    snapshot: Int[Array, "n+1"]
    taken: Int[Array, "n+1"]


_LISTS = len(fields(Work))


def plan(layer: int, batch: RaggedBatch, tokens: int) -> Work:
    """The work list of a batch."""
    chunks = prefill_chunks(batch, tokens, C)
    row, used = chunks.row, chunks.length > 0
    begin = chunks.end - chunks.length
    last = used & (chunks.end == batch.lengths[row])
    length = batch.snapshot_length[row]
    snapped = used & (begin < length) & (length <= chunks.end)
    lists = (
        batch.query_start[row] + begin,
        chunks.length,
        chunks.first,
        jnp.cumsum(chunks.first.astype(jnp.int32)) & 1,
        jnp.where(chunks.first & (batch.seen[row] > 0), batch.read_slot[row], 0),
        jnp.where(last, batch.write_slot[row], 0),
        jnp.where(snapped, batch.snapshot_slot[row], 0),
        jnp.where(snapped, length - begin, 0),
    )
    one = (jnp.full((1,), layer, jnp.int32), batch.query_start[-1:].astype(jnp.int32))
    return Work(*one, *(jnp.pad(x.astype(jnp.int32), (0, 1)) for x in lists))


@dataclass(frozen=True)
class Stream:
    """An array that chunks read windows of: `values` as they lie in HBM, and which of their axes counts tokens."""

    values: Array
    axis: int = 0

    @property
    def window(self) -> tuple[int, ...]:
        """The shape of a window."""
        shape = self.values.shape
        return (*shape[: self.axis], WINDOW, *shape[self.axis + 1 :])


@dataclass(frozen=True)
class Block:
    """What a chunk works on: scalars and references inside a kernel.

    offset: of the chunk's first token in its window. length: its tokens, 1 to C. taken: tokens of a snapshot inside the
    chunk, 0 without one. windows: one `[..., WINDOW, ...]` for each stream. constants: as handed in. memory: state
    `[H, V, K]` and what else the kind remembers, of the row. stage: the same for a snapshot inside the chunk.
    raw: `[n, WINDOW, 128]` float32, raw outputs by lane tile. out: `[WINDOW, c]`. scratch: the kind's own.
    """

    offset: Index
    length: Index
    taken: Index
    windows: tuple[Ref, ...]
    constants: tuple[Ref, ...]
    memory: tuple[Ref, ...]
    stage: tuple[Ref, ...]
    raw: Ref
    out: Ref
    scratch: tuple[Ref, ...]

    @property
    def snapped(self) -> Any:
        """Whether a snapshot is to be left in `stage`."""
        return (self.taken > 0) & (self.taken < self.length)


Part = Callable[[Block], None]


Buffer = tuple[tuple[int, ...], Any]  # shape and dtype of an array in VMEM


@dataclass(frozen=True)
class Recurrence:
    """A kind as the frame sees it.

    scalars: constants that are read one by one; tables: constants in VMEM. width: c, channels of the output, a multiple
    of 128; dtype: of the output. scratch: buffers of the kind's own.
    """

    name: str
    scan: Part
    finish: Part
    streams: tuple[Stream, ...]
    scalars: tuple[Array, ...]
    tables: tuple[Array, ...]
    width: int
    dtype: Any
    scratch: tuple[Buffer, ...] = ()

    @property
    def tokens(self) -> int:
        """T."""
        return self.streams[0].values.shape[self.streams[0].axis]


def prefill(
    recurrence: Recurrence, pools: tuple[Float[Array, "L N ..."], ...], work: Work
) -> tuple[Float[Array, "T c"], tuple[Float[Array, "L N ..."], ...]]:
    """Run a recurrence over all chunks. Streams must count a multiple of 16 tokens.

    Args:
      pools: states, and what else the kind keeps in slots; updated in place where donated.
    Returns the outputs, zeros for padding and undefined for tokens in front of the first row that prefills, and the
    pools with final states and snapshots stored. Raises NotImplementedError for a layer that takes too much VMEM.
    """
    taken_bytes = vmem_bytes(recurrence, pools)
    if taken_bytes > VMEM_BYTES:
        raise NotImplementedError(
            f"{recurrence.name} on a TPU wants a layer within {VMEM_BYTES} bytes of VMEM, got {taken_bytes}; spread its"
            " heads over more chips or use backend 'xla'"
        )
    lists, constants = jax.tree.leaves(work), (*recurrence.scalars, *recurrence.tables)
    anywhere, count = pl.BlockSpec(memory_space=pl.ANY), work.start.shape[0] - 1
    spaces = [pltpu.SMEM] * len(recurrence.scalars) + [pltpu.VMEM] * len(recurrence.tables)
    streams = [stream.values for stream in recurrence.streams]
    buffers = _buffers(recurrence, pools)
    first = len(lists) + len(streams) + len(constants)
    out, *stored = pl.pallas_call(
        _kernel(recurrence, len(pools), count),
        out_shape=[jax.ShapeDtypeStruct((recurrence.tokens, recurrence.width), recurrence.dtype), *pools],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(lists),
            grid=(count,),
            in_specs=[anywhere] * len(streams)
            + [pl.BlockSpec(memory_space=space) for space in spaces]
            + [anywhere] * len(pools),
            out_specs=[anywhere] * (1 + len(pools)),
            scratch_shapes=[pltpu.VMEM(*buffer) for buffer in buffers] + _signals(len(streams), len(pools)),
        ),
        input_output_aliases={first + index: 1 + index for index in range(len(pools))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=taken_bytes),
        interpret=interpreter(),
        name=recurrence.name,
    )(*lists, *streams, *constants, *pools)
    return out, tuple(stored)


VMEM_BYTES = 50 << 20  # most that a kernel may take: three quarters of the smallest VMEM, 64 MiB of v5p and TPU7x
_SPILLED_BYTES = 6 << 20  # for registers that the compiler spills and the constants it makes


def vmem_bytes(recurrence: Recurrence, pools: tuple[Any, ...]) -> int:
    """VMEM that a kernel takes."""
    held = [*_buffers(recurrence, pools), *((table.shape, table.dtype) for table in recurrence.tables)]
    return sum(_tiled_bytes(*buffer) for buffer in held) + _SPILLED_BYTES


def _tiled_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    *lead, rows, lanes = shape
    size = jnp.dtype(dtype).itemsize
    tile = 8 * 4 // size
    return prod(lead) * -(-rows // tile) * tile * -(-lanes // LANES) * LANES * size


def _buffers(recurrence: Recurrence, pools: tuple[Any, ...]) -> list[Buffer]:
    """Two windows of each stream, two states of rows, one of a snapshot, raw and finished outputs, the kind's own."""
    windows = [((2, *stream.window), stream.values.dtype) for stream in recurrence.streams]
    memory = [((2, *pool.shape[2:]), pool.dtype) for pool in pools]
    stage = [(pool.shape[2:], pool.dtype) for pool in pools]
    raw = ((recurrence.width // LANES, WINDOW, LANES), jnp.float32)
    return [*windows, *memory, *stage, raw, ((WINDOW, recurrence.width), recurrence.dtype), *recurrence.scratch]


def _signals(streams: int, pools: int) -> list[Any]:
    windows, others = pltpu.SemaphoreType.DMA((2, streams)), pltpu.SemaphoreType.DMA((_COPIES, max(pools, 1)))
    return [windows, others, pltpu.SMEM((_COPIES,), jnp.int32)]


@dataclass(frozen=True)
class _Frame:
    """All references of the kernel."""

    work: Work
    streams: tuple[Ref, ...]
    axes: tuple[int, ...]
    constants: tuple[Ref, ...]
    out_hbm: Ref
    pools: tuple[Ref, ...]
    windows: tuple[Ref, ...]
    memory: tuple[Ref, ...]
    stage: tuple[Ref, ...]
    raw: Ref
    out: Ref
    scratch: tuple[Ref, ...]
    arrived: Ref
    done: Ref
    pending: Ref  # copies under way, by what they carry; tiles for the outputs

    def block(self, item: Index) -> Block:
        """What an item works on."""
        work, buffer = self.work, self.work.buffer[item]
        return Block(
            work.start[item] % TILE,
            work.length[item],
            work.taken[item],
            tuple(window.at[item % 2] for window in self.windows),
            self.constants,
            tuple(memory.at[buffer] for memory in self.memory),
            self.stage,
            self.raw,
            self.out,
            self.scratch,
        )


def _kernel(recurrence: Recurrence, pools: int, count: int) -> Callable[..., None]:
    """The body: one chunk."""
    streams, constants = len(recurrence.streams), len(recurrence.scalars) + len(recurrence.tables)
    sizes = (_LISTS, streams, constants, pools, 1, pools, streams, pools, pools, 1, 1, len(recurrence.scratch), 3)
    axes = tuple(stream.axis for stream in recurrence.streams)

    def body(*refs: Ref) -> None:
        rest, parts = list(refs), []
        for size in sizes:
            parts.append(tuple(rest[:size]))
            del rest[:size]
        lists, sources, fixed, _, (out_hbm,), stored, windows, memory, stage, (raw,), (out,), scratch, signals = parts
        frame = _Frame(
            Work(*lists), sources, axes, fixed, out_hbm, stored, windows, memory, stage, raw, out, scratch, *signals
        )
        item = pl.program_id(0)

        pl.when(item == 0)(lambda: _begin(frame))
        pl.when(frame.work.length[item] > 0)(lambda: _advance(frame, recurrence, item))
        pl.when(item == count - 1)(lambda: _end(frame, recurrence.tokens))

    return body


def _begin(frame: _Frame) -> None:
    for copy in range(_COPIES):
        frame.pending[copy] = 0
    _start_windows(frame, 0)
    _start_read(frame, 0)


def _advance(frame: _Frame, recurrence: Recurrence, item: Index) -> None:
    """One chunk: its tokens have been asked for by the chunk before."""
    block = frame.block(item)
    _start_windows(frame, item + 1)
    _await_windows(frame, item)
    _await_memory(frame, item)
    recurrence.scan(block)
    _store_memory(frame, item)
    _start_read(frame, item + 1)
    _settle_outputs(frame)
    recurrence.finish(block)
    _store_outputs(frame, item)


def _end(frame: _Frame, tokens: int) -> None:
    for copy in (_STORE, _STORE + 1, _SNAPSHOT, _STAGE):
        _settle(frame, copy)
    _settle_outputs(frame)
    _clear_padding(frame, tokens)


def padded(tokens: int) -> int:
    """Tokens that the arrays of a step are padded to: whole tiles."""
    return -(-tokens // TILE) * TILE


def sigmoid(x: Array) -> Array:
    """One transcendental operation instead of two."""
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


def dot(x: Array, y: Array, x_axis: int = 1, y_axis: int = 0) -> Array:
    """The product over one axis of each, summed in float32; exact for float32 operands."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    axes = (((x_axis,), (y_axis,)), ((), ()))
    return lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)


def split(x: Array, dtype: Any) -> list[Array]:
    """Terms in the dtype of the products: two of bfloat16, for sums whose error would stay in a state for ever."""
    if dtype == jnp.float32:
        return [x]
    rounded = x.astype(dtype)
    return [rounded, (x - rounded.astype(jnp.float32)).astype(dtype)]


# ------------------------------------------------------------------------------------------------- tokens and outputs


def _tiles(work: Work, item: Index) -> Index:
    """Tiles of an item's window that hold a token of it."""
    used = (work.start[item] % TILE + work.length[item] + TILE - 1) // TILE
    return jnp.where(work.length[item] > 0, used, 0)


def _each_tile(frame: _Frame, item: Index, act: Callable[[Any], None]) -> None:
    """`act` on the copies of an item's tiles from HBM."""
    begin = pl.multiple_of(frame.work.start[item] // TILE * TILE, TILE)

    def tile(index: Index, _: None) -> None:
        here, there = pl.ds(begin + index * TILE, TILE), pl.ds(pl.multiple_of(index * TILE, TILE), TILE)
        for stream, (source, window) in enumerate(zip(frame.streams, frame.windows, strict=True)):
            lead = (slice(None),) * frame.axes[stream]
            target = window.at[item % 2, *lead, there]
            act(pltpu.make_async_copy(source.at[*lead, here], target, frame.arrived.at[item % 2, stream]))

    lax.fori_loop(0, _tiles(frame.work, item), tile, None)


def _start_windows(frame: _Frame, item: Index) -> None:
    _each_tile(frame, item, lambda copy: copy.start())


def _await_windows(frame: _Frame, item: Index) -> None:
    _each_tile(frame, item, lambda copy: copy.wait())


def _out_copy(frame: _Frame, index: Index, token: Index) -> Any:
    rows = frame.out.at[pl.ds(index * TILE, TILE)]
    return pltpu.make_async_copy(rows, frame.out_hbm.at[pl.ds(token, TILE)], frame.done.at[_OUT, 0])


def _store_outputs(frame: _Frame, item: Index) -> None:
    """Send the tiles of an item; keep the raw outputs of the last one, which the next chunk shares, at the top."""
    begin, used = pl.multiple_of(frame.work.start[item] // TILE * TILE, TILE), _tiles(frame.work, item)
    end = frame.work.start[item] % TILE + frame.work.length[item]
    kept = pl.multiple_of((used - 1) * TILE, TILE)
    real = kept + lax.broadcasted_iota(jnp.int32, (TILE, LANES), 0) < end

    def lane_tile(index: Index, _: None) -> None:
        columns = pl.ds(pl.multiple_of(index * LANES, LANES), LANES)
        rows = pl.ds(kept, TILE)
        frame.raw[index, :TILE, :] = frame.raw[index, rows, :]
        last = frame.out[rows, columns]
        frame.out[rows, columns] = jnp.where(real, last, jnp.zeros_like(last))

    lax.fori_loop(0, frame.raw.shape[0], lane_tile, None)
    lax.fori_loop(0, used, lambda index, _: _out_copy(frame, index, begin + index * TILE).start(), None)
    frame.pending[_OUT] = used


def _settle_outputs(frame: _Frame) -> None:
    lax.fori_loop(0, frame.pending[_OUT], lambda index, _: _out_copy(frame, index, 0).wait(), None)
    frame.pending[_OUT] = 0


def _clear_padding(frame: _Frame, tokens: int) -> None:
    """Zeros behind the last token. Where no row prefills, also behind it in its own tile."""
    end = frame.work.end[0]
    begin = jnp.where(frame.work.length[0] > 0, (end + TILE - 1) // TILE, end // TILE)
    frame.out[:TILE, :] = jnp.zeros((TILE, frame.out.shape[1]), frame.out.dtype)

    def copy(tile: Index) -> Any:
        return _out_copy(frame, 0, pl.multiple_of(tile * TILE, TILE))

    lax.fori_loop(begin, tokens // TILE, lambda tile, _: copy(tile).start(), None)
    lax.fori_loop(begin, tokens // TILE, lambda tile, _: copy(tile).wait(), None)


# ------------------------------------------------------------------------------------------------------- slots of rows


def _slot_copies(frame: _Frame, copy: int, held: tuple[Ref, ...], slot: Index, signal: Index) -> list[Any]:
    layer = frame.work.layer[0]
    pairs = []
    for index, (pool, array) in enumerate(zip(frame.pools, held, strict=True)):
        kept, sent = pool.at[layer, slot], frame.done.at[signal, index]
        source, target = (kept, array) if copy == _READ else (array, kept)
        pairs.append(pltpu.make_async_copy(source, target, sent))
    return pairs


def _held(frame: _Frame, buffer: Index) -> tuple[Ref, ...]:
    return tuple(memory.at[buffer] for memory in frame.memory)


def _start(frame: _Frame, copy: int, held: tuple[Ref, ...], slot: Index, signal: Index) -> None:
    for pair in _slot_copies(frame, copy, held, slot, signal):
        pair.start()
    frame.pending[signal] = 1


def _settle(frame: _Frame, signal: Index, copy: int = _STORE) -> None:
    """Wait for a copy, if one is under way. All copies between a slot and VMEM are of one size."""

    @pl.when(frame.pending[signal] > 0)
    def _() -> None:
        for pair in _slot_copies(frame, copy, frame.stage, 0, signal):
            pair.wait()
        frame.pending[signal] = 0


def _start_read(frame: _Frame, item: Index) -> None:
    """Ask for the state of a row that begins with `item`, into the buffer that the row before does not use."""
    buffer = frame.work.buffer[item]

    @pl.when(frame.work.read[item] > 0)
    def _() -> None:
        _settle(frame, _STORE + buffer)
        _start(frame, _READ, _held(frame, buffer), frame.work.read[item], _READ)


def _await_memory(frame: _Frame, item: Index) -> None:
    """The memory of the item's row is in its buffer, and nothing that the item may change is still being copied."""
    work = frame.work
    pl.when(work.first[item] > 0)(lambda: _begin_row(frame, item))
    _settle(frame, _SNAPSHOT)
    pl.when((work.taken[item] > 0) & (work.taken[item] < work.length[item]))(lambda: _settle(frame, _STAGE))


def _begin_row(frame: _Frame, item: Index) -> None:
    buffer = frame.work.buffer[item]
    _settle(frame, _READ, _READ)
    _settle(frame, _STORE + buffer)

    @pl.when(frame.work.read[item] == 0)
    def _() -> None:
        for memory in frame.memory:
            memory[buffer] = jnp.zeros(memory.shape[1:], memory.dtype)


def _store_memory(frame: _Frame, item: Index) -> None:
    """Send the row's final state, and its snapshot, to their slots."""
    work, buffer = frame.work, frame.work.buffer[item]
    write, snapshot, held = work.write[item], work.snapshot[item], _held(frame, buffer)
    whole = work.taken[item] == work.length[item]
    pl.when(write > 0)(lambda: _start(frame, _STORE, held, write, _STORE + buffer))
    pl.when((snapshot > 0) & whole)(lambda: _start(frame, _SNAPSHOT, held, snapshot, _SNAPSHOT))
    pl.when((snapshot > 0) & ~whole)(lambda: _start(frame, _STAGE, frame.stage, snapshot, _STAGE))
