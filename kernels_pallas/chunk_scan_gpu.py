"""Carries a state along the chunks of each row on a Hopper GPU, and computes the outputs as it goes.

A persistent block takes one (row, head, value channels) after another and walks the row's chunks of 64 tokens. Its
warpgroups: one per 64 value channels carries their part of the state S `[V, K]` in registers, one computes the outputs,
one streams tiles. With writes u `[C, V]`, keys and queries as the kind streams them, a chunk does

    o = since (Q S^T) + P u;   S <- S decay + (until u)^T K

The state warpgroups publish S and u in bfloat16, which the output warpgroup reads. What u, P, since, until and decay
are, the kind says in a `Recurrence`; this module knows no kind.

Letters: B rows, T tokens, H value heads, G key heads, K key width, V value width, C chunk, n chunks, N slots, L layers.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.chunks_gpu import (
    BF16,
    BLOCKS,
    F32,
    FIRST_CHUNK,
    LENGTH,
    READ,
    SNAPSHOT,
    SNAPSHOT_LENGTH,
    START,
    TILED,
    WRITE,
    C,
    Work,
    along_rows,
    compiler_params,
    interpreting,
    iota,
    product,
    products,
    streamed,
    tiles,
    zeros,
)
from kernels_pallas.mosaic_gpu import interpreter, made_once

LAYER = 3  # of the counts, behind those of `Work`

Refs = Mapping[str, Any]  # the streamed tiles of one chunk by name: refs `[tiles, 64, 64]`, or `[rows, 64]` for a table


@dataclass(frozen=True)
class Stream:
    """An array of which each chunk needs a part.

    Of `keys` `[T, G, K]` the tokens of a chunk in the head's group; of `values` `[T, H, V]` its value channels; of
    `tiles` `[n, H, m, C, C]` m tiles; of `table` `[n, H, r, C]` r rows of float32.
    """

    of: Literal["keys", "values", "tiles", "table"]
    array: Array | jax.ShapeDtypeStruct

    def count(self, parts: int) -> int:
        """Tiles, or rows of a table, in SMEM."""
        return {"keys": self.array.shape[-1] // C, "values": parts}.get(self.of, self.array.shape[2])

    def copies(self, parts: int) -> int:
        """Copies that bring one chunk."""
        return 1 if self.of == "table" else self.count(parts)

    def smem(self, stages: int, parts: int) -> Any:
        count = self.count(parts)
        return plgpu.SMEM((stages, count, C), F32) if self.of == "table" else tiles(stages, count)


@dataclass(frozen=True)
class Recurrence:
    """What a kind streams, and what it makes of a chunk. `q` and `k` must be among the streams, K / 64 tiles each.

    writes: of the refs, the part, S in bfloat16 (one array `[64, 64]` per 64 keys), the valid tokens and the
      interpreter's stage: u^T `[64, C]` float32, zero past the last token, and (until u)^T as a sum of bfloat16 arrays.
    decay: of the refs and the 64 keys meant: what multiplies S `[64, 64]`.
    scores: of the refs and the stage: P `[C, C]` in bfloat16, in registers or SMEM, zero above the diagonal.
    since: of the refs: a factor per token of Q S^T, or None for one.
    """

    streams: Mapping[str, Stream]
    writes: Callable[[Refs, Array, list[Array], Array, Any], tuple[Array, list[Array]]]
    decay: Callable[[Refs, int], Array]
    scores: Callable[[Refs, Any], Any]
    since: Callable[[Refs], Array] | None

    @property
    def functions(self) -> tuple[Callable[..., Any] | None, ...]:
        """What tells this recurrence from another over the same streams."""
        return self.writes, self.decay, self.scores, self.since

    @property
    def form(self) -> "Recurrence":
        """The same with the shapes and dtypes of the arrays in their place, as a kernel that outlives them wants it."""
        forms = {
            name: Stream(stream.of, jax.ShapeDtypeStruct(stream.array.shape, stream.array.dtype))
            for name, stream in self.streams.items()
        }
        return replace(self, streams=forms)


@dataclass(frozen=True)
class Tiling:
    """Warpgroups for the state, each 64 value channels; chunks in flight. More parts share the keys' tiles."""

    parts: int
    stages: int

    @property
    def registers(self) -> tuple[int, int, int]:
        """Registers a thread: to carry the state, to write outputs, to stream. A block has 64 Ki."""
        return {1: (232, 232, 40), 2: (168, 144, 32)}[self.parts]


def scan(
    recurrence: Recurrence,
    shape: tuple[int, ...],
    work: Work,
    pool: Float[Array, "L N H V K"],
    layer: int,
    tiling: Tiling,
    name: str,
) -> tuple[Float[Array, "T H V"], Float[Array, "L N H V K"]]:
    """Outputs of `shape` `[T, H, V]` in bfloat16, zero for padding and rows in decode, and the pool with the states."""
    tokens, heads, value_width = shape
    ref = jax.new_ref(pool)
    counts = jnp.append(work.counts, jnp.int32(layer))  # data, so that the layers of a model share one kernel
    arguments = (*(stream.array for stream in recurrence.streams.values()), work.rows, counts, ref)
    form = recurrence.form
    settings = (name, shape, tiling, tuple(form.streams.items()), form.functions)
    kernel = made_once(settings, arguments, lambda: _kernel(form, shape, work.rows.shape[0], tiling, name))
    return kernel(*arguments).reshape(shape), jax.freeze(ref)


def _kernel(recurrence: Recurrence, shape: tuple[int, ...], rows: int, tiling: Tiling, name: str) -> Callable[..., Any]:
    """The kernel for so many rows; `recurrence` with the forms of its arrays."""
    tokens, heads, value_width = shape
    parts = tiling.parts
    items_a_row = heads * value_width // C // parts
    blocks = min(BLOCKS, rows * items_a_row)
    names = list(recurrence.streams)

    def body(*refs: Any) -> None:
        sources = dict(zip(names, refs, strict=False))
        row_ref, count_ref, pool_ref, out_ref, scratch = refs[len(names) :]
        walk = _Walk(row_ref, count_ref, items_a_row, heads, parts, blocks)
        wg = lax.axis_index("wg")
        context = _Context(recurrence, tiling, walk, sources, scratch, pool_ref, out_ref, tokens, value_width)

        @pl.when(wg == parts + 1)
        def _stream() -> None:
            plgpu.set_max_registers(tiling.registers[2], action="decrease")
            stream(context)

        @pl.when(wg < parts)
        def _carry() -> None:
            plgpu.set_max_registers(tiling.registers[0], action="increase")
            carry_state(context, wg)

        @pl.when(wg == parts)
        def _write() -> None:
            plgpu.set_max_registers(tiling.registers[1], action="increase")
            write_outputs(context)

        plgpu.barrier_arrive(scratch["done"])  # nobody leaves while another still multiplies
        plgpu.barrier_wait(scratch["done"])

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((tokens, heads * value_width), BF16),
        scratch_types=[_scratch(recurrence, tiling)],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=parts + 2,
        thread_name="wg",
        compiler_params=compiler_params(),
        kernel_name=name,
        interpret=interpreter(),
    )


def _scratch(recurrence: Recurrence, tiling: Tiling) -> dict[str, Any]:
    parts, stages = tiling.parts, tiling.stages
    streams = recurrence.streams
    copies = sum(stream.copies(parts) for stream in streams.values())
    scratch = {f"in_{name}": stream.smem(stages, parts) for name, stream in streams.items()}
    scratch |= {
        "state": tiles(parts, streams["k"].count(parts)),
        "writes": tiles(parts),
        "out": tiles(parts),
        "tail": plgpu.SMEM((C, parts * C), BF16),
        "arrived": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=parts + 1, num_barriers=stages),
        "state_ready": plgpu.Barrier(num_arrivals=parts),
        "state_free": plgpu.Barrier(),
        "writes_ready": plgpu.Barrier(num_arrivals=parts),
        "writes_free": plgpu.Barrier(),
        "done": plgpu.Barrier(num_arrivals=parts + 2),
    }
    if interpreting():
        scratch["stage"] = tiles(parts + 1)
    return scratch


# ------------------------------------------------------------------------------------------------- the walk over chunks


@dataclass(frozen=True)
class Item:
    """What a block works on at a time: 64 value channels a part, from `part` on, of one head of one row."""

    row_ref: Any
    row: Array
    head: Array
    part: Array

    def __getitem__(self, column: int) -> Array:
        return self.row_ref[self.row, column]

    @property
    def chunks(self) -> Array:
        return lax.div(self[LENGTH] + C - 1, C)


@dataclass(frozen=True)
class _Walk:
    row_ref: Any
    count_ref: Any
    items_a_row: int
    heads: int
    parts: int
    blocks: int

    def over_items(self, visit: Callable[[Item, Array], None]) -> Array:
        """`visit(item, chunks before it)` for each item of this block; returns the number of chunks."""
        block = lax.axis_index("block")
        splits = self.items_a_row // self.heads

        def one(j: Array, done: Array) -> Array:
            index = block + j * self.blocks
            rest = lax.rem(index, self.items_a_row)
            item = Item(
                self.row_ref,
                lax.div(index, self.items_a_row),
                lax.div(rest, splits),
                lax.rem(rest, splits) * self.parts,
            )
            visit(item, done)
            return done + item.chunks

        mine = lax.div(self.count_ref[0] * self.items_a_row - block + self.blocks - 1, self.blocks)
        return lax.fori_loop(0, mine, one, jnp.int32(0))


@dataclass(frozen=True)
class _Context:
    recurrence: Recurrence
    tiling: Tiling
    walk: _Walk
    sources: Refs
    scratch: Refs
    pool_ref: Any
    out_ref: Any
    tokens: int
    value_width: int

    def inputs(self, slot: Array) -> Refs:
        return {name: self.scratch[f"in_{name}"].at[slot] for name in self.sources}


def stream(context: _Context) -> None:
    """The warpgroup that brings the tiles of chunk after chunk, as many ahead as there are stages."""
    scratch, stages, parts = context.scratch, context.tiling.stages, context.tiling.parts

    def one_item(item: Item, done: Array) -> None:
        first, first_chunk, count = item[START], item[FIRST_CHUNK], item.chunks

        @pl.loop(0, count)
        def _chunk(c: Array) -> None:
            slot = lax.rem(done + c, stages)

            @pl.when(done + c >= stages)
            def _wait() -> None:
                plgpu.barrier_wait(scratch["free"].at[slot])

            for name, source in context.recurrence.streams.items():
                place = (context.sources[name], scratch[f"in_{name}"], slot, scratch["arrived"].at[slot])
                _bring(source, place, item, first + c * C, first_chunk + c, context.walk.heads, parts)

    total = context.walk.over_items(one_item)

    @pl.loop(jnp.maximum(total - stages, 0), total)
    def _drain(i: Array) -> None:
        plgpu.barrier_wait(scratch["free"].at[lax.rem(i, stages)])


def _bring(source: Stream, place: tuple, item: Item, token: Array, chunk: Array, heads: int, parts: int) -> None:
    ref, target, slot, arrived = place
    if source.of == "table":
        plgpu.copy_gmem_to_smem(ref.at[chunk, item.head], target.at[slot], arrived)
        return
    for tile in range(source.count(parts)):
        if source.of == "tiles":
            plgpu.copy_gmem_to_smem(ref.at[chunk, item.head, tile], target.at[slot, tile], arrived)
            continue
        if source.of == "keys":
            part = ref.at[pl.ds(token, C), lax.div(item.head, heads // source.array.shape[1]), pl.ds(tile * C, C)]
        else:
            part = ref.at[pl.ds(token, C), item.head, pl.ds((item.part + tile) * C, C)]
        plgpu.copy_gmem_to_smem(part, streamed(target, slot, tile), arrived)


def carry_state(context: _Context, wg: Array) -> None:
    """A warpgroup that carries 64 value channels of the state, publishes it and the writes of each chunk."""
    scratch, stages, kind = context.scratch, context.tiling.stages, context.recurrence
    stage = scratch["stage"].at[wg] if interpreting() else None
    key_tiles = range(kind.streams["k"].count(1))

    def one_item(item: Item, done: Array) -> None:
        length, write, snapshot, wanted_length = item[LENGTH], item[WRITE], item[SNAPSHOT], item[SNAPSHOT_LENGTH]

        def place(slot: Array, h: int) -> Any:
            rows, columns = pl.ds((item.part + wg) * C, C), pl.ds(h * C, C)
            return context.pool_ref.at[context.walk.count_ref[LAYER], slot, item.head, rows, columns]

        def store(slot: Array, state: tuple[Array, ...]) -> None:
            for h in key_tiles:
                place(slot, h)[...] = state[h]

        def one_chunk(c: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            slot = lax.rem(done + c, stages)
            valid = length - c * C
            state = advance(context, wg, slot, done + c > 0, state, valid, stage)

            @pl.when((snapshot > 0) & (jnp.minimum((c + 1) * C, length) == wanted_length))
            def _snapshot() -> None:
                store(snapshot, state)

            return state

        def load() -> tuple[Array, ...]:
            return tuple(plgpu.load(place(item[READ], h), layout=TILED, optimized=False) for h in key_tiles)

        start = lax.cond(item[READ] > 0, load, lambda: tuple(zeros() for _ in key_tiles))
        final = lax.fori_loop(0, item.chunks, one_chunk, start)

        @pl.when(write > 0)
        def _final() -> None:
            store(write, final)

    total = context.walk.over_items(one_item)

    @pl.when(total > 0)
    def _drain() -> None:
        plgpu.barrier_wait(scratch["state_free"])
        plgpu.barrier_wait(scratch["writes_free"])


def advance(
    context: _Context, wg: Array, slot: Array, later: Array, state: tuple[Array, ...], valid: Array, stage: Any
) -> tuple[Array, ...]:
    """The state after one chunk; `later`: not the block's first chunk, so the one before must have been read."""
    scratch, kind = context.scratch, context.recurrence

    @pl.when(later)
    def _state_read() -> None:
        plgpu.barrier_wait(scratch["state_free"])

    state_lo = [part.astype(BF16) for part in state]
    for h, part in enumerate(state_lo):
        scratch["state"].at[wg, h][...] = part
    plgpu.commit_smem()
    plgpu.barrier_arrive(scratch["state_ready"])
    plgpu.barrier_wait(scratch["arrived"].at[slot])
    refs = context.inputs(slot)
    writes, kept = kind.writes(refs, wg, state_lo, valid, stage)

    @pl.when(later)
    def _writes_read() -> None:
        plgpu.barrier_wait(scratch["writes_free"])

    scratch["writes"].at[wg][...] = writes.astype(BF16)
    plgpu.commit_smem()
    plgpu.barrier_arrive(scratch["writes_ready"])

    @pl.when(valid < C)
    def _clear_keys() -> None:  # keys past the row may be NaN, which a weight of zero would keep
        for h in range(len(state)):
            keys = plgpu.load(refs["k"].at[h], layout=TILED)
            refs["k"].at[h][...] = jnp.where(iota(0) < valid, keys, jnp.zeros_like(keys))
        plgpu.commit_smem()

    after = products([(part * kind.decay(refs, h), kept, refs["k"].at[h]) for h, part in enumerate(state)], stage)
    plgpu.barrier_arrive(scratch["free"].at[slot])
    return tuple(after)


def write_outputs(context: _Context) -> None:
    """The warpgroup that computes the outputs of each chunk from the published state and writes."""
    scratch, stages, parts, kind = context.scratch, context.tiling.stages, context.tiling.parts, context.recurrence
    stage = scratch["stage"].at[parts] if interpreting() else None
    key_tiles = range(kind.streams["q"].count(parts))
    clear_others(context)

    def one_item(item: Item, done: Array) -> None:
        first, length = item[START], item[LENGTH]

        @pl.loop(0, item.chunks)
        def _chunk(c: Array) -> None:
            slot = lax.rem(done + c, stages)
            plgpu.barrier_wait(scratch["arrived"].at[slot])
            refs = context.inputs(slot)
            scores = kind.scores(refs, stage)
            since = None if kind.since is None else along_rows(kind.since(refs))
            plgpu.barrier_wait(scratch["state_ready"])
            recalled = [
                product([(refs["q"].at[h], scratch["state"].at[p, h].T) for h in key_tiles], stage)
                for p in range(parts)
            ]
            plgpu.barrier_arrive(scratch["state_free"])
            recalled = recalled if since is None else [part * since for part in recalled]
            plgpu.barrier_wait(scratch["writes_ready"])
            outs = products([(recalled[p], [scores], scratch["writes"].at[p].T) for p in range(parts)], stage)
            plgpu.barrier_arrive(scratch["writes_free"])
            plgpu.barrier_arrive(scratch["free"].at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the chunk before has left SMEM
            store_outputs(context, outs, item, first + c * C, length - c * C)

    context.walk.over_items(one_item)
    plgpu.wait_smem_to_gmem(0)


def store_outputs(context: _Context, outs: list[Array], item: Item, token: Array, valid: Array) -> None:
    """Store a chunk's outputs; of a chunk that is not full only the row's own tokens."""
    parts, out_ref = context.tiling.parts, context.out_ref
    whole, tail = context.scratch["out"], context.scratch["tail"]
    column = item.head * context.value_width + item.part * C

    @pl.when(valid >= C)
    def _whole() -> None:
        for p in range(parts):
            whole.at[p][...] = outs[p].astype(BF16)
        plgpu.commit_smem()
        for p in range(parts):
            target = out_ref.at[pl.ds(token, C), pl.ds(column + p * C, C)]
            plgpu.copy_smem_to_gmem(streamed(whole, p), target)

    @pl.when(valid < C)
    def _tail() -> None:  # in pieces of a power of two
        for p in range(parts):
            tail.at[:, pl.ds(p * C, C)][...] = outs[p].astype(BF16)
        plgpu.commit_smem()
        for size in (32, 16, 8, 4, 2, 1):
            before = valid & (C - 2 * size)

            @pl.when((valid & size) != 0)
            def _piece(size: int = size, before: Array = before) -> None:
                target = out_ref.at[pl.ds(token + before, size), pl.ds(column, parts * C)]
                plgpu.copy_smem_to_gmem(tail.at[pl.ds(before, size)], target)


def clear_others(context: _Context) -> None:
    """Zero the outputs of the tokens that no row in prefill owns: those before its rows and the padding behind."""
    walk, width = context.walk, context.out_ref.shape[1]
    decoded, padding = walk.count_ref[1], walk.count_ref[2]
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=math.gcd(8, width // 128))
    line = plgpu.layout_cast(jnp.zeros((width,), BF16), layout)
    block = lax.axis_index("block")
    mine = lax.div(decoded + context.tokens - padding - block + walk.blocks - 1, walk.blocks)

    @pl.loop(0, mine)
    def _token(j: Array) -> None:
        n = block + j * walk.blocks
        context.out_ref.at[jnp.where(n < decoded, n, n - decoded + padding)][...] = line
