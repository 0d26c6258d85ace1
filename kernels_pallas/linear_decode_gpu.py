"""Decode of the linear kinds on Hopper: the parts of a kernel that are the same for all of them.

One block of threads serves one row in decode and one slab of its state: neighbouring value channels, of one head or
of several, by all K = 128 key channels. The slab is copied into shared memory, changed there, and copied to the slot
to be written and to that of the snapshot, in place in the pool of all layers. Nothing else of a pool moves, and blocks
of rows that are absent or prefill end at once. Many small blocks, several of them resident on a multiprocessor, keep
copies in both directions under way without a pipeline inside a block.

Blocks whose slabs share keys and queries are the members of one cluster: the tail of the shared channels is replaced
only after all of them have read it. So a slot may be read and written by the same step.

A slab is held as tiles of 64 rows in the layout of the matrix units: a row lies in 4 threads of one warp, so that sums
over the key channels need no barrier, and it is worked on in parts of 32 key channels, so that registers leave room
for three blocks on a multiprocessor. A vector over key channels is the same in every row (a column vector), a vector
over value channels the same in every column (a row vector). Sums over vectors, as norms need them, are taken as sums
over the rows of a tile that repeats the vector: all threads have them at once.

Kernels are compiled without automatic barriers. A thread may read back what it wrote to the state, which has one layout
throughout; vectors are written in another layout than they are read, with `share` between. A body reads all that it
needs from global memory before its first barrier: behind one, every read would cost its whole latency again.

Knows no kind's mathematics.

Letters: B rows, T tokens, K key width, N slots, L layers of the pool, W convolution width, c channels.
"""

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.mosaic_gpu import interpreter
from kernels_pallas.op import RaggedBatch

WIDTH = 128  # key channels of a state, and channels that a warpgroup works on at once: one a thread
TILE = 64  # rows of a tile, as the layout of the matrix units wants
PART = 32  # key channels of a part: one swizzled line of 128 bytes
MULTIPROCESSORS = 132  # of an H100 and of an H200
MEMBERS = 8  # blocks of a cluster that every Hopper GPU can place

_TILE_LAYOUT = plgpu.Layout.WGMMA
_ROW_LAYOUT, _COLUMN_LAYOUT = _TILE_LAYOUT.reduce(1), _TILE_LAYOUT.reduce(0)
CHANNEL_LAYOUT = plgpu.Layout.WG_STRIDED((WIDTH,), vec_size=1)
# JAX gives these classes' protocol methods without a body, which mypy takes for abstract.
_STATE_TRANSFORMS = (plgpu.TilingTransform((8, PART)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]

Ref = Any


@dataclass(frozen=True)
class Slabs:
    """How the states of a layer are dealt out. families: heads or groups that share keys. members: blocks of a family.

    rows: value channels of a slab. warpgroups: of a block; each works on its own tiles.
    """

    families: int
    members: int
    rows: int
    warpgroups: int

    @property
    def tiles(self) -> int:
        """Tiles of one warpgroup."""
        return self.rows // TILE // self.warpgroups


@dataclass(frozen=True)
class Block:
    """What a block and its warpgroup work on; scalars and references inside a kernel.

    token, layer, read, write, snapshot: of its row. fresh: the row starts from zero. family, member, slab: its place.
    warpgroup: the one that runs. pool: all states `[L, N, c, K]`. state `[rows, K]`, vectors `[warpgroups, n K]` and
    output `[rows]` are in shared memory.
    """

    slabs: Slabs
    layer: Any
    token: Any
    read: Any
    write: Any
    snapshot: Any
    fresh: Any
    family: Any
    member: Any
    warpgroup: Any
    pool: Ref
    state: Ref
    vectors: Ref
    output: Ref
    arrived: Ref
    shared: Ref
    met: Ref
    tails_seen: Ref

    @property
    def slab(self) -> Any:
        """Index of the slab in its layer."""
        return self.family * self.slabs.members + self.member

    def tile(self, index: int, start: Any = 0) -> Any:
        """Rows, in the slab or in what holds its rows from `start` on, of a tile of this warpgroup."""
        return pl.ds(start + (self.warpgroup * self.slabs.tiles + index) * TILE, TILE)

    def channels(self, index: int) -> Any:
        """Value channels, in the layer, of a tile of this warpgroup."""
        start = self.slab * self.slabs.rows + (self.warpgroup * self.slabs.tiles + index) * TILE
        return pl.ds(start, TILE)

    def vector(self, index: int, shift: int = 0, size: int = WIDTH) -> Ref:
        """A vector of this warpgroup in shared memory, or `size` floats `shift` floats from its start."""
        return self.vectors.at[self.warpgroup, pl.ds(index * WIDTH + shift, size)]

    def vector_tile(self, first: int, index: int) -> Ref:
        """The part for a tile of this warpgroup of `rows` floats that start at a vector."""
        start = first * WIDTH + (self.warpgroup * self.slabs.tiles + index) * TILE
        return self.vectors.at[self.warpgroup, pl.ds(start, TILE)]


def warpgroups(blocks: int) -> int:
    """Warpgroups of a block. Two halve the work of a block where there is not more than one on a multiprocessor; one
    leaves registers for three blocks on each, whose copies overlap."""
    return 2 if blocks <= MULTIPROCESSORS else 1


Body = Callable[..., None]  # (settings, block, inputs, tail if there is one, out): one block, one row in decode


# ---------------------------------------------------------------------------------------------------------- the launch


def decode(
    name: str,
    body: Body,
    settings: Hashable,
    slabs: Slabs,
    vectors: int,
    inputs: tuple[Array, ...],
    pools: tuple[Float[Array, "L N ..."], ...],
    layer: int,
    batch: RaggedBatch,
    dtype: jnp.dtype,
) -> tuple[Float[Array, "T c"], tuple[Array, ...]]:
    """Run `body` for every row in decode and every slab.

    Args:
      body: the work of one block for one row, with `settings`, the kind's own.
      vectors: vectors of 128 floats that each warpgroup keeps in shared memory.
      inputs: arrays handed to the body; the first has one line per token.
      pools: states `[L, N, H, V, K]` and, where the kind has a convolution, tails `[L, N, W-1, c]`; updated in place.
      dtype: of the output.
    Returns the outputs, and the pools. Tokens that are not in decode are zero where the batch has nothing but decodes,
    and undefined otherwise.
    """
    tokens, heads = inputs[0].shape[0], pools[0].shape[2:]
    flat = pools[0].reshape(*pools[0].shape[:2], heads[0] * heads[1], heads[2])
    refs = tuple(jax.new_ref(pool) for pool in (flat, *pools[1:]))
    out_type = jax.ShapeDtypeStruct((tokens, heads[0] * heads[1]), dtype)
    options = (slabs, vectors, len(inputs), batch.rows, tokens if batch.content == "decode" else 0)
    out = _built(name, body, settings, *options, out_type, interpreter())(*_places(layer, batch), *inputs, *refs)
    state, *rest = (jax.freeze(ref) for ref in refs)
    return out, (state.reshape(pools[0].shape), *rest)


@functools.cache
def _built(
    name: str,
    body: Body,
    settings: Hashable,
    slabs: Slabs,
    vectors: int,
    inputs: int,
    rows: int,
    cleared: int,
    out_type: jax.ShapeDtypeStruct,
    interpret: plgpu.InterpretGPUParams | None,
) -> Callable[..., Array]:
    """The kernel. One object for equal arguments: each object is traced and compiled on its own, so a model's layers
    must share it. `interpret` tells kernels that are interpreted from those that are not."""
    clustered = slabs.members > 1
    return plgpu.kernel(
        _kernel(body, settings, slabs, inputs, rows, cleared),
        out_type=out_type,
        scratch_types=_scratch(slabs, vectors),
        grid=(max(rows, cleared), slabs.families),
        grid_names=("row", "family"),
        cluster=(slabs.members,) if clustered else (),
        cluster_names=("member",) if clustered else (),
        num_threads=slabs.warpgroups,
        thread_name="warpgroup",
        kernel_name=name,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )


def check_decode(name: str, activations: tuple[Array, ...], state: Float[Array, "L N H V K"]) -> None:
    """Raises NotImplementedError unless activations are bfloat16, and states float32 with 128 key channels."""
    dtypes = sorted({str(array.dtype) for array in (*activations, state)})
    legal = all(array.dtype == jnp.bfloat16 for array in activations) and state.dtype == jnp.float32
    if not legal or state.shape[-1] != WIDTH:
        raise NotImplementedError(
            f"{name} on a GPU wants bfloat16 activations, float32 states and key width {WIDTH}, got {', '.join(dtypes)}"
            f" and key width {state.shape[-1]}; use backend 'xla'"
        )


def _places(layer: int, batch: RaggedBatch) -> tuple[Array, ...]:
    """Where the rows lie. The layer is data, so that the layers of a model share one compiled kernel."""
    which = jnp.full((1,), layer, jnp.int32)
    slots = (batch.read_slot, batch.write_slot, batch.snapshot_slot)
    return which, batch.query_start, batch.seen, jnp.reshape(batch.decodes, (1,)), *slots


def _scratch(slabs: Slabs, vectors: int) -> list[Any]:
    every = slabs.warpgroups
    return [
        plgpu.SMEM((slabs.rows, WIDTH), jnp.float32, transforms=_STATE_TRANSFORMS),
        plgpu.SMEM((slabs.warpgroups, vectors * WIDTH), jnp.float32),
        plgpu.SMEM((slabs.rows,), jnp.float32),
        plgpu.Barrier(num_barriers=slabs.warpgroups),
        plgpu.Barrier(num_barriers=slabs.warpgroups),
        plgpu.Barrier(num_arrivals=every),
        plgpu.ClusterBarrier(collective_axes=("member",), num_arrivals=every)
        if slabs.members > 1
        else plgpu.Barrier(num_arrivals=every),
    ]


def _kernel(body: Body, settings: Hashable, slabs: Slabs, inputs: int, rows: int, cleared: int) -> Callable[..., None]:
    pools = 7 + inputs

    def kernel(*refs: Ref) -> None:
        layer, query_start, seen, decodes, read, write, snapshot = refs[:7]
        out_at = len(refs) - 8
        pool, tail, out = refs[pools], refs[pools + 1 : out_at], refs[out_at]
        state, vectors, output, arrived, shared, met, tails_seen = refs[out_at + 1 :]
        line, warpgroup = lax.axis_index("row"), lax.axis_index("warpgroup")
        row = jnp.minimum(line, rows - 1)
        fresh = (seen[row] == 0) | (read[row] == 0)
        member = lax.axis_index("member") if slabs.members > 1 else 0
        block = Block(
            slabs, layer[0], query_start[row], read[row], write[row], snapshot[row], fresh, lax.axis_index("family"),
            member, warpgroup, pool, state, vectors, output, arrived, shared, met, tails_seen,
        )  # fmt: skip

        @pl.when((line < decodes[0]) & (query_start[row + 1] > query_start[row]))
        def _() -> None:
            body(settings, block, refs[7:pools], *tail, out)

        if cleared:
            padding = (line >= query_start[jnp.minimum(decodes[0], rows)]) & (line < cleared)

            @pl.when(padding)
            def _() -> None:
                _clear(block, out.at[jnp.minimum(line, cleared - 1)])

    return kernel


def _clear(block: Block, line: Ref) -> None:
    for index in range(block.slabs.tiles):
        zeros = plgpu.layout_cast(jnp.zeros((TILE,), line.dtype), _ROW_LAYOUT)
        line.at[block.channels(index)][...] = zeros


# --------------------------------------------------------------------------------------------------- states and vectors


def fetch_state(block: Block) -> None:
    """Start copying the rows of this warpgroup; a fresh row's are never looked at."""
    rows = block.slabs.tiles * TILE
    here = pl.ds(block.warpgroup * rows, rows)
    there = pl.ds(block.slab * block.slabs.rows + block.warpgroup * rows, rows)
    source = block.pool.at[block.layer, block.read, there]
    plgpu.copy_gmem_to_smem(source, block.state.at[here], block.arrived.at[block.warpgroup])


def await_state(block: Block) -> None:
    """Wait for what `fetch_state` copies."""
    plgpu.barrier_wait(block.arrived.at[block.warpgroup])


def store_state(block: Block) -> None:
    """Start copying the rows of this warpgroup to the slots that the row writes; `finish` waits for it."""
    rows = block.slabs.tiles * TILE
    here = pl.ds(block.warpgroup * rows, rows)
    there = pl.ds(block.slab * block.slabs.rows + block.warpgroup * rows, rows)
    plgpu.commit_smem()
    for slot in (block.write, block.snapshot):

        @pl.when(slot > 0)
        def _(slot: Any = slot) -> None:
            plgpu.copy_smem_to_gmem(block.state.at[here], block.pool.at[block.layer, slot, there])


def load_channels(source: Ref) -> Float[Array, "128"]:
    """128 neighbouring channels, one a thread."""
    return plgpu.load(source, layout=CHANNEL_LAYOUT, optimized=False).astype(jnp.float32)


def load_row(source: Ref) -> Float[Array, "64"]:
    """A vector over the value channels of a tile."""
    return plgpu.load(source, layout=_ROW_LAYOUT, optimized=False).astype(jnp.float32)


def share(block: Block) -> None:
    """Wait until all threads of this warpgroup have stored their parts of its vectors."""
    plgpu.barrier_arrive(block.shared.at[block.warpgroup])
    plgpu.barrier_wait(block.shared.at[block.warpgroup])


def load_column(block: Block, vector: int, start: int = 0, size: int = WIDTH) -> Float[Array, "64 k"]:
    """Part of a shared vector over key channels, the same in every row."""
    return _column(block.vector(vector, start, size))


def dot(block: Block, first: int, second: int) -> Float[Array, "64"]:
    """The product of two shared vectors over key channels, in every row."""
    return (load_column(block, first) * load_column(block, second)).sum(axis=1)


def products(block: Block, index: int, vectors: tuple[int, ...]) -> tuple[Float[Array, "64"], ...]:
    """The products of a tile of the state with shared vectors over key channels."""
    totals: list[Array] = []
    for start in range(0, WIDTH, PART):
        part = _part(block, index, start)
        terms = [part * load_column(block, vector, start, PART) for vector in vectors]
        totals = [total + term for total, term in zip(totals, terms, strict=True)] if totals else terms
    return tuple(total.sum(axis=1) for total in totals)


def update(block: Block, index: int, kept: Callable[[int], Any], added: Float[Array, "64"], vector: int) -> None:
    """`S <- S * kept + added k^T` for a tile; `kept` gives the factor of the 32 key channels that start at a number."""
    for start in range(0, WIDTH, PART):
        here = block.state.at[block.tile(index), pl.ds(start, PART)]
        new = lax.broadcast_in_dim(added, (TILE, PART), (0,)) * load_column(block, vector, start, PART)
        here[...] = _part(block, index, start) * kept(start) + new


def alike(factor: Any) -> Callable[[int], Any]:
    """What `update` wants where all key channels decay by one factor."""
    return lambda start: factor


def _part(block: Block, index: int, start: int) -> Float[Array, "64 32"]:
    """Part of a tile of the state; zeros, whatever was in the slot, for a row that has seen nothing."""
    part = plgpu.load(block.state.at[block.tile(index), pl.ds(start, PART)], layout=_TILE_LAYOUT)
    return jnp.where(block.fresh, jnp.zeros_like(part), part)


def _column(source: Ref) -> Float[Array, "64 k"]:
    vector = plgpu.load(source, layout=_COLUMN_LAYOUT, optimized=False)
    return lax.broadcast_in_dim(vector, (TILE, vector.shape[0]), (1,))


def squared(block: Block, outputs: list[Float[Array, "64"]]) -> Float[Array, "64"]:
    """The sum of the squares of the slab's outputs, of which each warpgroup has those of its tiles, in every row."""
    for index, output in enumerate(outputs):
        block.output.at[block.tile(index)][...] = output
    plgpu.barrier_arrive(block.met)
    plgpu.barrier_wait(block.met)
    parts = [_column(block.output.at[pl.ds(start, WIDTH)]) for start in range(0, block.slabs.rows, WIDTH)]
    return sum(((part * part).sum(axis=1) for part in parts[1:]), start=(parts[0] * parts[0]).sum(axis=1))


# --------------------------------------------------------------------------------------------------------- convolution


@dataclass(frozen=True)
class Window:
    """The inputs of 128 channels, oldest first, and what the convolution multiplies them by, one channel a thread."""

    channels: Any
    inputs: tuple[Float[Array, "128"], ...]
    weights: tuple[Float[Array, "128"], ...]
    owned: Any

    def convolved(self) -> Float[Array, "128"]:
        """The output of the convolution for this token."""
        terms = [x.astype(jnp.float32) * w for x, w in zip(self.inputs, self.weights, strict=True)]
        return sum(terms[1:], start=terms[0])


def read_window(
    block: Block, projected: Ref, first: Any, weight: Ref, tail: Ref, start: Any, owner: int | None
) -> Window:
    """Read this token's 128 channels, which are projected from `first` on, and the row's tail of them.

    start: of these channels among those of the convolution. owner: the member that stores the new tail of channels that
    the whole family reads; None for a block's own.
    """
    channels = pl.ds(start, WIDTH)
    width = weight.shape[0]
    new = plgpu.load(projected.at[block.token, pl.ds(first, WIDTH)], layout=CHANNEL_LAYOUT, optimized=False)
    weights = tuple(load_channels(weight.at[age, channels]) for age in range(width))
    old = []
    for age in range(width - 1):
        value = plgpu.load(tail.at[block.layer, block.read, age, channels], layout=CHANNEL_LAYOUT, optimized=False)
        old.append(jnp.where(block.fresh, jnp.zeros_like(value), value))
    owned = block.warpgroup == 0
    if owner is not None:
        owned = owned & (block.member == owner)
    return Window(channels, (*old, new), weights, owned)


def tails_read(block: Block) -> None:
    """Say that this warpgroup has read the tails that it needs. Comes after `share`: all its threads have them then."""
    plgpu.barrier_arrive(block.tails_seen)


def finish(block: Block, tail: Ref, windows: tuple[Window, ...]) -> None:
    """Store the tails, when nobody reads them any more, and wait until the copies have left shared memory."""
    if windows:
        plgpu.barrier_wait(block.tails_seen)
    for window in windows:
        for slot in (block.write, block.snapshot):

            @pl.when(window.owned & (slot > 0))
            def _(window: Window = window, slot: Any = slot) -> None:
                for age, value in enumerate(window.inputs[1:]):
                    tail.at[block.layer, slot, age, window.channels][...] = value

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def silu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """`x sigmoid(x)`."""
    return x * jax.nn.sigmoid(x)


def softplus(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """`log(1 + exp(x))`, of operations that a Mosaic kernel has: exact to a few units for results near 0 as well."""
    small = jnp.exp(-jnp.abs(x))
    above_one = 1.0 + small
    grown = above_one - 1.0
    exact = jnp.log(above_one) * (small / jnp.where(grown == 0.0, jnp.ones_like(grown), grown))
    return jnp.maximum(x, jnp.zeros_like(x)) + jnp.where(grown == 0.0, small, exact)
