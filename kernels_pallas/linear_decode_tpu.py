"""Decode of the linear kinds on a TPU: the parts of a kernel that are the same for all of them.

One call takes one new token of every row in decode. The states lie in HBM, in the pool of all layers, and pass through
VMEM once: a ring of copies brings them in, in tiles of whole heads, and takes them back to the slot to be written and
to that of the snapshot, in place. The ring runs over all tiles of all tokens and never drains between tokens; its depth
comes from what the memory needs to have under way (`ring_depth`). Everything else is small and is done for a group of
up to 8 tokens at once, one a sublane: `convolve` with the tails of the group, what the kind makes of projections
(`prepare`), and the norm and gate of the outputs (`finish`).

A slab is 128 rows of a state, one value channel each, by K = 128 key channels: one head of width 128 or two of 64.
Vectors are kept in tiles of 128 channels, a token a line. A vector over key channels meets a slab as a row `[1, 128]`;
one over value channels is needed down its rows and goes there by sums over lanes of its products with the unit matrix,
`column`. These sums bound a step (their unit takes a register every other cycle), so a step has one of them; the output
leaves by the matrix unit, `times_state`, with operands of the precision of the activations.

Rows in decode are packed first, so token t of the call belongs to the t-th row that is present. Knows no kind's
mathematics.

Letters: B rows, T tokens, K key width, N slots, L layers of the pool, W convolution width, c channels.
"""

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.mosaic_tpu import interpreter
from kernels_pallas.op import ArraySpec, RaggedBatch

LANES = 128  # key channels of a state, rows of a slab
GROUP = 8  # tokens that are prepared and finished together: the sublanes of a float32 register
TILE_BYTES = 512 * 1024  # of one copy: large enough that its start costs nothing, small enough to overlap at batch 1
RING_BYTES = 8 * 1024 * 1024  # reads and writes under way, and work: 2 us of the fastest memory, 3.7 TB/s a core
VMEM_BYTES = int(0.7 * 64 * 1024 * 1024)  # of the smallest chip, v5p and v7x; the compiler needs the rest
UNROLLED = 4  # slabs of one turn of the loop: while one waits for its sums over lanes, another works

Ref = Any


@dataclass(frozen=True)
class Group:
    """What a kind sees of up to 8 tokens; references in VMEM.

    inputs: projections `[G, c]`. weights: as given. channels: what the convolution makes of the first input, float32
    `[tiles, G, 128]`. vectors: alike, the kind's own, from `prepare` to its steps. outputs: alike, of all slabs. unit:
    the unit matrix `[128, 128]`.
    """

    inputs: tuple[Ref, ...]
    weights: tuple[Ref, ...]
    channels: Ref
    vectors: tuple[Ref, ...]
    outputs: Ref
    unit: Ref


Prepare = Callable[[Any, Group], None]
Step = Callable[[Any, Group, Any, Any, Array], tuple[Array, Array]]  # settings, group, token, slab, state -> state, out
Finish = Callable[[Any, Group, Callable[[Any, Array], None]], None]  # the last stores a tile of lanes of the result


@dataclass(frozen=True)
class Kind:
    """A kind of linear attention: what it does around the copies, with `settings` of its own.

    tiles: of its vectors. convolved: whether the first input passes a convolution, whose weights come first.
    """

    name: str
    prepare: Prepare
    step: Step
    finish: Finish
    settings: Hashable
    tiles: tuple[int, ...]
    convolved: bool


@dataclass(frozen=True)
class _Plan:
    """Static numbers of a kernel: tokens of a group, groups, slabs of a layer and of a tile, tiles of the ring."""

    group: int
    groups: int
    slabs: int
    tile: int
    ring: int

    @property
    def parts(self) -> int:
        """Tiles of a token."""
        return self.slabs // self.tile


# ---------------------------------------------------------------------------------------------------------- the launch


def decode(
    kind: Kind,
    inputs: tuple[Float[Array, "T ..."], ...],
    weights: tuple[Float[Array, "_ _"], ...],
    pools: tuple[Float[Array, "L N ..."], ...],
    layer: int,
    batch: RaggedBatch,
) -> tuple[Float[Array, "T c"], tuple[Array, ...]]:
    """One token of every row in decode.

    Args:
      inputs: `[T, c]` each, of the dtype that the output has. weights: float32; with a convolution `[W, c]` first.
      pools: states `[L, N, H, V, K]` and, with a convolution, tails `[L, N, W-1, c]`; updated in place.
    Returns the outputs `[T, H*V]`, and the pools. Tokens that are not in decode are zero where the batch has nothing
    but decodes, and undefined otherwise.
    """
    layers, slots, heads, width, key_width = pools[0].shape
    plan = _plan(batch, inputs[0].shape[0], heads * width // LANES)
    flat = pools[0].reshape(layers, slots, heads * width, key_width)
    places = _places(layer, batch, plan.group * plan.groups)
    grouped = tuple(_in_groups(x, plan.group) for x in inputs)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*grouped, *weights, flat, *pools[1:]))
    call = _built(kind, plan, len(inputs), len(weights), shapes, interpreter())
    out, state, *rest = call(*places, *grouped, *weights, flat, *pools[1:])
    return out.reshape(-1, out.shape[-1])[: inputs[0].shape[0]], (state.reshape(pools[0].shape), *rest)


def _in_groups(x: Float[Array, "T c"], group: int) -> Float[Array, "n G c"]:
    """The tokens by groups, padded to whole ones: a block is a whole plane, however a chip tiles rows in memory."""
    groups = pl.cdiv(x.shape[0], group)
    return jnp.pad(x, ((0, groups * group - x.shape[0]), (0, 0))).reshape(groups, group, x.shape[1])


def check_decode(
    name: str,
    activations: tuple[Array, ...],
    tails: tuple[Array, ...],
    state: Float[Array, "L N H V K"],
    widths: tuple[int, ...] = (LANES,),
) -> None:
    """Raises NotImplementedError for what the kernels do not have: see `has_decode`."""
    dtypes = sorted({str(array.dtype) for array in (*activations, *tails)})
    memory = ArraySpec("state", state.shape[2:], str(state.dtype))
    if len(dtypes) > 1 or not has_decode(memory, dtypes[0], widths):
        raise NotImplementedError(
            f"{name} on a TPU wants activations and tails of one dtype, bfloat16 or float32, and float32 states of key"
            f" width {LANES}, value width {' or '.join(map(str, widths))} and a multiple of {LANES} value channels,"
            f" got {', '.join(dtypes)} and states {memory.dtype} {memory.shape}; use backend 'xla'"
        )


def has_decode(state: ArraySpec, dtype: str, widths: tuple[int, ...] = (LANES,)) -> bool:
    """Whether the kernels have states `[H, V, K]` like this, with V one of `widths`, and activations of this dtype."""
    heads, width, key_width = state.shape
    whole = width in widths and heads * width % LANES == 0 and key_width == LANES
    return whole and state.dtype == "float32" and dtype in ("bfloat16", "float32")


def _plan(batch: RaggedBatch, tokens: int, slabs: int) -> _Plan:
    group = min(GROUP, tokens)
    covered = tokens if batch.content == "decode" else min(tokens, batch.rows)
    tile = max(n for n in range(1, slabs + 1) if slabs % n == 0 and n * LANES * LANES * 4 <= TILE_BYTES)
    return _Plan(group, pl.cdiv(covered, group), slabs, tile, ring_depth(tile * LANES * LANES * 4))


def ring_depth(tile_bytes: int) -> int:
    """Tiles of the ring: `RING_BYTES` together, at least one to work on, one to write and two to read, and not more
    than 32, beyond which a small tile costs more in its start than in bytes."""
    return max(4, min(32, RING_BYTES // tile_bytes))


def _places(layer: int, batch: RaggedBatch, tokens: int) -> tuple[Int[Array, "n"], ...]:
    """The layer, the number of tokens in decode, and of each the slots to read (0: from zero), to write, to snapshot.

    The layer is data, so that the layers of a model share one compiled kernel. Sums of products with a table of owners
    take the place of a search and a gather.
    """
    token = jnp.arange(tokens, dtype=jnp.int32)[:, None]
    start, end = batch.query_start[None, :-1], batch.query_start[None, 1:]
    owner = (start <= token) & (token < end) & (jnp.arange(batch.rows) < batch.decodes)[None, :]
    read = jnp.where(batch.seen > 0, batch.read_slot, 0)
    slots = [
        jnp.sum(jnp.where(owner, slot[None, :], 0), axis=1, dtype=jnp.int32)
        for slot in (read, batch.write_slot, batch.snapshot_slot)
    ]
    count = jnp.sum(batch.in_decode, dtype=jnp.int32)
    return jnp.full((1,), layer, jnp.int32), count.reshape(1), *slots


@functools.cache
def _built(
    kind: Kind,
    plan: _Plan,
    inputs: int,
    weights: int,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    interpret: pltpu.InterpretParams | bool,
) -> Callable[..., tuple[Array, ...]]:
    """The kernel. One object for equal arguments: a model's layers share it."""
    first, pools = shapes[0], shapes[inputs + weights :]
    slot = plan.slabs * LANES
    out = jax.ShapeDtypeStruct((*first.shape[:2], slot), first.dtype)

    def block_of_group(group: Any, layer: Ref, count: Ref, *_: Ref) -> tuple[Any, int, int]:
        last = lax.div(jnp.maximum(count[0] - 1, 0), plan.group)  # nothing is fetched for groups without tokens
        return jnp.minimum(group, last), 0, 0

    in_specs = [pl.BlockSpec((None, plan.group, x.shape[2]), block_of_group) for x in shapes[:inputs]]
    in_specs += [pl.BlockSpec(x.shape, lambda *_: (0, 0)) for x in shapes[inputs : inputs + weights]]
    anywhere = pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        functools.partial(_kernel, kind, plan, inputs, weights),
        out_shape=(out, *(pltpu.HBM(pool.shape, pool.dtype) for pool in pools)),  # else XLA may move one into VMEM
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(plan.groups,),
            in_specs=[*in_specs, *(anywhere for _ in pools)],
            out_specs=[
                pl.BlockSpec((None, plan.group, slot), lambda group, *_: (group, 0, 0)),
                *(anywhere for _ in pools),
            ],
            scratch_shapes=_scratch(kind, plan, first, pools),
        ),
        input_output_aliases={5 + inputs + weights + index: 1 + index for index in range(len(pools))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=VMEM_BYTES,
            disable_bounds_checks=True,  # half the cost of a copy's start; the host has checked all slots
        ),
        interpret=interpret,
        name=f"{kind.name}_decode",
    )


def _scratch(kind: Kind, plan: _Plan, first: Any, pools: tuple[Any, ...]) -> list[Any]:
    def lines(tiles: int) -> Any:
        return pltpu.VMEM((tiles, plan.group, LANES), jnp.float32)

    scratch = [
        pltpu.VMEM((plan.ring, plan.tile * LANES, LANES), jnp.float32),
        pltpu.SemaphoreType.DMA((plan.ring,)),
        pltpu.SemaphoreType.DMA((plan.ring,)),
        pltpu.VMEM((LANES, LANES), jnp.float32),
        lines(plan.slabs),
        *(lines(tiles) for tiles in kind.tiles),
    ]
    if kind.convolved:
        tails = pltpu.VMEM((2, plan.group, *pools[1].shape[2:]), pools[1].dtype)
        scratch += [
            lines(first.shape[2] // LANES),
            tails,
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
        ]
    return scratch


def _kernel(kind: Kind, plan: _Plan, inputs: int, weights: int, *refs: Ref) -> None:
    """One group of tokens. The pools are named by their outputs, which are the same memory as the inputs."""
    places, refs = _Places(*refs[:5]), refs[5:]
    pools = 1 + kind.convolved
    out, *memory = refs[inputs + weights + pools : inputs + weights + 2 * pools + 1]
    buffer, arrived, left, unit, outputs, *rest = refs[inputs + weights + 2 * pools + 1 :]
    vectors, rest = tuple(rest[: len(kind.tiles)]), rest[len(kind.tiles) :]
    ring = _Ring(plan, places, memory[0], buffer, arrived, left)
    channels = rest[0] if kind.convolved else None
    group = Group(refs[:inputs], refs[inputs : inputs + weights], channels, vectors, outputs, unit)
    index = pl.program_id(0)
    first = index * plan.group
    present = jnp.clip(places.count[0] - first, 0, plan.group)

    @pl.when(index == 0)
    def _() -> None:
        ring.fill()
        on_diagonal = lax.broadcasted_iota(jnp.int32, unit.shape, 0) == lax.broadcasted_iota(jnp.int32, unit.shape, 1)
        unit[...] = jnp.where(on_diagonal, 1.0, 0.0)

    if kind.convolved:
        tails = _Tails(plan, places, memory[1], *rest[1:])
        tails.turn(index)
        convolve(group.inputs[0], group.weights[0], tails.buffer.at[lax.rem(index, 2)], channels)
        tails.store(index)

    @pl.when(present > 0)
    def _() -> None:
        kind.prepare(kind.settings, group)

    def item(number: Any, carry: None) -> None:
        ring.receive(number)
        token, part = lax.div(number, plan.parts) - first, lax.rem(number, plan.parts)
        _step_tile(kind, plan, group, ring.tile(number), token, part)
        ring.send(number)
        return carry

    lax.fori_loop(first * plan.parts, (first + present) * plan.parts, item, None)

    def store(lanes: Any, value: Array) -> None:
        token = lax.broadcasted_iota(jnp.int32, value.shape, 0)
        out[:, lanes] = jnp.where(token < present, value, 0.0).astype(out.dtype)

    @pl.when(present > 0)
    def _() -> None:
        kind.finish(kind.settings, group, store)

    @pl.when(present == 0)
    def _() -> None:
        out[...] = jnp.zeros(out.shape, out.dtype)

    @pl.when(index == plan.groups - 1)
    def _() -> None:
        ring.drain()
        if kind.convolved:
            tails.drain(index)


def _step_tile(kind: Kind, plan: _Plan, group: Group, tile: Ref, token: Any, part: Any) -> None:
    together = max(n for n in range(1, UNROLLED + 1) if plan.tile % n == 0)

    def turn(number: Any, carry: None) -> None:
        for which in range(together):
            slab = number * together + which
            rows = pl.ds(pl.multiple_of(slab * LANES, LANES), LANES)
            there = part * plan.tile + slab
            tile[rows, :], out = kind.step(kind.settings, group, token, there, tile[rows, :])
            group.outputs[there, pl.ds(token, 1), :] = out
        return carry

    lax.fori_loop(0, plan.tile // together, turn, None)


# ---------------------------------------------------------------------------------------------------------- the copies


@dataclass(frozen=True)
class _Places:
    """Where the memory of each token lies; scalars."""

    layer: Ref
    count: Ref
    read: Ref
    write: Ref
    snapshot: Ref


@dataclass(frozen=True)
class _Ring:
    """Tiles of states on their way in and out. Item n is a tile of token n // parts; it uses place n % ring."""

    plan: _Plan
    places: _Places
    pool: Ref
    buffer: Ref
    arrived: Ref
    left: Ref

    @property
    def lead(self) -> int:
        """Items that a read is ahead; the other places of the ring hold one item at work and one that leaves."""
        return self.plan.ring - 2

    @property
    def items(self) -> Any:
        """Items of the whole call."""
        return self.places.count[0] * self.plan.parts

    def tile(self, item: Any) -> Ref:
        """The rows `[n, K]` of an item."""
        return self.buffer.at[lax.rem(item, self.plan.ring)]

    def fill(self) -> None:
        """Start the first reads."""
        lax.fori_loop(0, jnp.minimum(self.lead, self.items), lambda item, _: self._start(item), None)

    def receive(self, item: Any) -> None:
        """Wait until an item is here, and start the read of one that comes later."""
        later = item + self.lead

        @pl.when(later < self.items)
        def _() -> None:
            @pl.when(later >= self.plan.ring)
            def _() -> None:
                self._await_stores(later - self.plan.ring)

            self._start(later)

        @pl.when(self._slot(self.places.read, item) > 0)
        def _() -> None:
            self._read(item).wait()

    def send(self, item: Any) -> None:
        """Start the stores of an item."""
        for slots in (self.places.write, self.places.snapshot):

            @pl.when(self._slot(slots, item) > 0)
            def _(slots: Ref = slots) -> None:
                self._store(slots, item).start()

    def drain(self) -> None:
        """Wait for the stores that nobody has waited for."""
        first = jnp.maximum(self.items - self.plan.ring, 0)
        lax.fori_loop(first, self.items, lambda item, _: self._await_stores(item), None)

    def _start(self, item: Any) -> None:
        read = self._slot(self.places.read, item) > 0

        @pl.when(read)
        def _() -> None:
            self._read(item).start()

        @pl.when(jnp.logical_not(read))
        def _() -> None:
            tile = self.tile(item)
            tile[...] = jnp.zeros(tile.shape, tile.dtype)

    def _await_stores(self, item: Any) -> None:
        for slots in (self.places.write, self.places.snapshot):

            @pl.when(self._slot(slots, item) > 0)
            def _(slots: Ref = slots) -> None:
                self._store(slots, item).wait()

    def _slot(self, slots: Ref, item: Any) -> Any:
        return slots[lax.div(item, self.plan.parts)]

    def _there(self, slots: Ref, item: Any) -> Ref:
        size = self.plan.tile * LANES
        rows = pl.ds(pl.multiple_of(lax.rem(item, self.plan.parts) * size, size), size)
        return self.pool.at[self.places.layer[0], self._slot(slots, item), rows]

    def _read(self, item: Any) -> Any:
        place = self.arrived.at[lax.rem(item, self.plan.ring)]
        return pltpu.make_async_copy(self._there(self.places.read, item), self.tile(item), place)

    def _store(self, slots: Ref, item: Any) -> Any:
        place = self.left.at[lax.rem(item, self.plan.ring)]
        return pltpu.make_async_copy(self.tile(item), self._there(slots, item), place)


@dataclass(frozen=True)
class _Tails:
    """The tails of two groups: those of one are at work while the next ones come and the last ones leave."""

    plan: _Plan
    places: _Places
    pool: Ref
    buffer: Ref
    arrived: Ref
    left: Ref

    def turn(self, group: Any) -> None:
        """Wait for the tails of a group, and start the reads of the next."""

        @pl.when(group == 0)
        def _() -> None:
            self._each(group, self._fetch)

        @pl.when(group > 0)
        def _() -> None:
            self._each(group - 1, self._await_stores)

        self._each(group + 1, self._fetch)
        self._each(group, self._receive)

    def store(self, group: Any) -> None:
        """Start the stores of a group."""
        self._each(group, self._send)

    def drain(self, group: Any) -> None:
        """Wait for the stores of the last group."""
        self._each(group, self._await_stores)

    def _each(self, group: Any, act: Callable[[Any, Any], None]) -> None:
        first = group * self.plan.group
        end = jnp.minimum(first + self.plan.group, self.places.count[0])
        lax.fori_loop(first, end, lambda token, _: act(group, token), None)

    def _fetch(self, group: Any, token: Any) -> None:
        read = self.places.read[token] > 0

        @pl.when(read)
        def _() -> None:
            self._read(group, token).start()

        @pl.when(jnp.logical_not(read))
        def _() -> None:
            here = self._here(group, token)
            here[...] = jnp.zeros(here.shape, here.dtype)

    def _receive(self, group: Any, token: Any) -> None:
        @pl.when(self.places.read[token] > 0)
        def _() -> None:
            self._read(group, token).wait()

    def _send(self, group: Any, token: Any) -> None:
        for slots in (self.places.write, self.places.snapshot):

            @pl.when(slots[token] > 0)
            def _(slots: Ref = slots) -> None:
                self._store(slots, group, token).start()

    def _await_stores(self, group: Any, token: Any) -> None:
        for slots in (self.places.write, self.places.snapshot):

            @pl.when(slots[token] > 0)
            def _(slots: Ref = slots) -> None:
                self._store(slots, group, token).wait()

    def _here(self, group: Any, token: Any) -> Ref:
        return self.buffer.at[lax.rem(group, 2), token - group * self.plan.group]

    def _read(self, group: Any, token: Any) -> Any:
        there = self.pool.at[self.places.layer[0], self.places.read[token]]
        return pltpu.make_async_copy(there, self._here(group, token), self.arrived.at[lax.rem(group, 2)])

    def _store(self, slots: Ref, group: Any, token: Any) -> Any:
        there = self.pool.at[self.places.layer[0], slots[token]]
        return pltpu.make_async_copy(self._here(group, token), there, self.left.at[lax.rem(group, 2)])


def convolve(x: Ref, weight: Ref, tails: Ref, out: Ref) -> None:
    """The causal depthwise convolution of one token per line, and the tails after it in place of those before.

    Lines without a token give arbitrary values, and tails that nobody stores.
    """
    tokens, tiles = x.shape[0], x.shape[1] // LANES
    together = max(n for n in range(1, 9) if tiles % n == 0)

    def turn(number: Any, carry: None) -> None:
        for tile in (number * together + which for which in range(together)):
            new, taps = x[:, lanes(tile)].astype(jnp.float32), weight[:, lanes(tile)]
            for token in range(tokens):
                tail = tails[token, :, lanes(tile)].astype(jnp.float32)
                window = jnp.concatenate([tail, new[token : token + 1]], axis=0)
                out[tile, token : token + 1] = _sum_lines(window * taps)
                tails[token, :, lanes(tile)] = window[1:].astype(tails.dtype)
        return carry

    lax.fori_loop(0, tiles // together, turn, None)


def _sum_lines(x: Float[Array, "n 128"]) -> Float[Array, "1 128"]:
    """The sum over few lines, by halves where their number is even: a turn of the lines and a sum for each halving."""
    while x.shape[0] % 2 == 0:
        x = x[: x.shape[0] // 2] + x[x.shape[0] // 2 :]
    return jnp.sum(x, axis=0, keepdims=True)


# ---------------------------------------------------------------------------------------------------------- vectors


def lanes(tile: Any) -> Any:
    """The 128 lanes of a tile of channels."""
    return pl.ds(pl.multiple_of(tile * LANES, LANES), LANES)


def row(vectors: Ref, token: Any, tile: Any) -> Float[Array, "1 128"]:
    """128 channels of one token."""
    return vectors[tile, pl.ds(token, 1), :]


def spread(scalars: Float[Array, "n H"], head: Any) -> Float[Array, "n 128"]:
    """The scalar of a head in every lane."""
    lane = lax.broadcasted_iota(jnp.int32, scalars.shape, 1)
    chosen = jnp.sum(jnp.where(lane == head, scalars, 0.0), axis=1, keepdims=True)
    return jnp.broadcast_to(chosen, (scalars.shape[0], LANES))


def column(values: Float[Array, "1 128"], unit: Ref) -> Float[Array, "128 1"]:
    """The value of each lane in the row of its number."""
    return jnp.sum(values * unit[...], axis=1, keepdims=True)


def times_state(vector: Float[Array, "1 K"], slab: Float[Array, "128 K"], operand: jnp.dtype) -> Float[Array, "1 128"]:
    """The product of each row of a slab with a vector over key channels, of operands rounded to `operand`, which is the
    dtype of the activations; sums are float32."""
    lines = jnp.broadcast_to(vector, (8, vector.shape[1]))
    contracted = (((1,), (1,)), ((), ()))
    precision = lax.Precision.HIGHEST if operand == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(lines, slab, contracted, precision=precision, preferred_element_type=jnp.float32)[:1]


def silu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """`x sigmoid(x)`."""
    return x * jax.nn.sigmoid(x)
