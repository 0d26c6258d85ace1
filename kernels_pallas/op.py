"""The contract of every kernel: who owns which token, what a layer remembers, which backend computes it.

A step carries the tokens of many requests packed on one axis. `RaggedBatch` says which request owns which tokens, how
many tokens it has already seen, and where its memory lies. A layer remembers either so many bytes per token (`KVSpec`,
kept in pages) or so many bytes per request (`StateSpec`, kept in a slot). `Cache` holds the pools of all layers, and an
`Op` is one operation under one name with a function per backend.

This file knows no model, no kind of attention and no scheduler.

Letters: B requests, T tokens, M pages of a request, P pages, S tokens a page, N slots, C chunk, L layers of a pool.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

BACKENDS = ("xla", "tpu", "gpu")
AUTO_ON_TPU = "auto on tpu"  # the backend that 'auto' is on a TPU, for programs made where there is none
CHUNK = 64  # tokens that a linear kind prefills at once; snapshots of a state are taken at multiples of it

Content = Literal["mixed", "decode", "prefill"]


# ---------------------------------------------------------------------------------------------- what a layer remembers


@dataclass(frozen=True)
class ArraySpec:
    """One array of a layer's memory: its name, its shape for one token or one request, and its dtype.

    `axes` names the logical axes of the shape, those along which several devices may divide the array; () names none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes for one token (in a `KVSpec`) or one request (in a `StateSpec`)."""
        return prod(self.shape) * jnp.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class KVSpec:
    """Memory that grows with the tokens; kept in pages of S tokens: an array is `[L, P, S, w]`, its shape in one row.

    Only the first axis of a shape may divide over devices: a share of it is one range of the row.
    """

    arrays: tuple[ArraySpec, ...]

    def pool_shape(self, array: ArraySpec) -> tuple[int, ...]:
        """The axes of a pool of `array` behind layers, pages and tokens."""
        return (prod(array.shape),)

    @property
    def token_bytes(self) -> int:
        """Bytes that one layer keeps for one token."""
        return sum(array.size_bytes for array in self.arrays)


@dataclass(frozen=True)
class StateSpec:
    """Memory of constant size per request; kept in a slot: an array is `[L, N, *shape]`."""

    arrays: tuple[ArraySpec, ...]

    def pool_shape(self, array: ArraySpec) -> tuple[int, ...]:
        """The axes of a pool of `array` behind layers and slots."""
        return array.shape

    @property
    def request_bytes(self) -> int:
        """Bytes that one layer keeps for one request."""
        return sum(array.size_bytes for array in self.arrays)


Memory = KVSpec | StateSpec


@dataclass(frozen=True)
class Place:
    """Where a layer's memory lies: the pool, and the layer's index in that pool."""

    pool: int
    layer: int


def assign_places(memories: list[Memory]) -> tuple[tuple[Memory, ...], tuple[Place, ...]]:
    """Give each layer's memory a place; equal specs share a pool, stacked over layers in the order given.

    Returns the specs of the pools and one place per entry of `memories`.
    """
    specs = tuple(dict.fromkeys(memories))
    used = dict.fromkeys(specs, 0)
    places = []
    for memory in memories:
        places.append(Place(specs.index(memory), used[memory]))
        used[memory] += 1
    return specs, tuple(places)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The pools of all layers. Goes into a step and comes out of it, donated.

    `specs[i]` says what pool `i` keeps; `pools[i]` are its arrays in the order of `specs[i].arrays`.
    """

    specs: tuple[Memory, ...] = field(metadata={"static": True})
    pools: tuple[tuple[Array, ...], ...]

    def pages(self, place: Place) -> tuple[Array, ...]:
        """The arrays `[L, P, S, ...]` of a full-attention layer. Raises ValueError for a layer that keeps a slot."""
        return self._pool(place, KVSpec, "pages")

    def slots(self, place: Place) -> tuple[Array, ...]:
        """The arrays `[L, N, ...]` of a linear layer. Raises ValueError for a layer that keeps pages."""
        return self._pool(place, StateSpec, "slots")

    def updated(self, place: Place, arrays: tuple[Array, ...]) -> "Cache":
        """The cache with the arrays of one pool replaced."""
        pools = self.pools[: place.pool] + (tuple(arrays),) + self.pools[place.pool + 1 :]
        return Cache(self.specs, pools)

    def _pool(self, place: Place, wanted: type, word: str) -> tuple[Array, ...]:
        spec = self.specs[place.pool]
        if type(spec) is not wanted:
            raise ValueError(
                f"wanted {word} at {place}, got a pool of {type(spec).__name__}: look up by the right layer"
            )
        return self.pools[place.pool]


# ------------------------------------------------------------------------------------------------- who owns which token


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RaggedBatch:
    """Who owns which of the T packed tokens of a step.

    Rows `[0, decodes)` are in decode: one new token each. The other rows prefill any number of tokens. Row `b` owns
    tokens `query_start[b]` to `query_start[b + 1]`; a row that owns none is absent, it reads and writes nothing. Slot 0
    and page 0 are null: nothing is read from them or written to them. A row with `seen == 0` starts from zero and never
    reads its slot. Slots written in one step are distinct, and nobody else reads them (`check_batch`).
    """

    query_start: Int[Array, "B+1"]
    seen: Int[Array, "B"]  # tokens before this step
    decodes: Int[Array, ""]
    read_slot: Int[Array, "B"]
    write_slot: Int[Array, "B"]
    snapshot_slot: Int[Array, "B"]  # 0: no snapshot
    snapshot_length: Int[Array, "B"]  # new tokens after which the state is stored a second time
    pages: Int[Array, "B M"]  # page table; unused entries are 0
    content: Content = field(default="mixed", metadata={"static": True})  # which rows there may be beside absent ones
    prefills: int | None = field(default=None, metadata={"static": True})  # most rows that prefill; None: all may

    @property
    def rows(self) -> int:
        """Number of rows, absent ones included."""
        return self.seen.shape[0]

    @property
    def lengths(self) -> Int[Array, "B"]:
        """New tokens of each row."""
        return self.query_start[1:] - self.query_start[:-1]

    @property
    def may_decode(self) -> bool:
        """Whether any row may be in decode; static."""
        return self.content != "prefill"

    @property
    def may_prefill(self) -> bool:
        """Whether any row may prefill; static."""
        return self.content != "decode"

    @property
    def in_decode(self) -> Bool[Array, "B"]:
        """Rows that take one token by the decode path."""
        return (jnp.arange(self.rows) < self.decodes) & (self.lengths > 0)


def host_batch(
    query_start: np.ndarray,
    seen: np.ndarray,
    decodes: int,
    slots: tuple[np.ndarray, np.ndarray, np.ndarray],
    snapshot_length: np.ndarray,
    pages: np.ndarray,
    content: Content,
    prefills: int | None = None,
) -> RaggedBatch:
    """A batch of NumPy arrays, as the host makes it; `slots` are those to read, to write, and of the snapshots."""
    listed = (query_start, seen, np.asarray(decodes), *slots, snapshot_length, pages)
    start, old, count, read, write, snapshot, length, table = (_int32(array) for array in listed)
    return RaggedBatch(start, old, count, read, write, snapshot, length, table, content, prefills)


def _int32(array: np.ndarray) -> Any:  # a host array where the device will have one of its own
    return array.astype(np.int32)


def token_rows(batch: RaggedBatch, tokens: int) -> tuple[Int[Array, "T"], Bool[Array, "T"]]:
    """The row of each token (0 for padding) and whether the token is real."""
    index = jnp.arange(tokens, dtype=jnp.int32)
    # Everything with everything: a search is a loop, of which each turn is several launches on a GPU.
    row = jnp.searchsorted(batch.query_start[1:], index, side="right", method="compare_all").astype(jnp.int32)
    real = row < batch.rows
    return jnp.where(real, row, 0), real


def token_positions(batch: RaggedBatch, tokens: int) -> Int[Array, "T"]:
    """The position of each token in its request; 0 for padding."""
    row, real = token_rows(batch, tokens)
    position = batch.seen[row] + jnp.arange(tokens, dtype=jnp.int32) - batch.query_start[row]
    return jnp.where(real, position, 0)


def decode_tokens(batch: RaggedBatch, tokens: int) -> Int[Array, "B"]:
    """The token of each row in decode; `tokens` (out of range) for every other row."""
    return jnp.where(batch.in_decode, batch.query_start[:-1], tokens)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunks:
    """The tokens of the rows that prefill, cut into chunks of at most C; a chunk never crosses rows.

    The grid of a row starts at its first new token, and its chunks follow one another.
    """

    token: Int[Array, "n C"]  # index of each token; T where the chunk has none
    row: Int[Array, "n"]  # 0 for an empty chunk
    first: Bool[Array, "n"]  # the row's first chunk
    length: Int[Array, "n"]  # tokens in the chunk, 0 for an empty one
    end: Int[Array, "n"]  # new tokens of the row up to the end of this chunk


def prefill_chunks(batch: RaggedBatch, tokens: int, size: int) -> Chunks:
    """Cut the rows that prefill into chunks of `size` tokens."""
    most = batch.rows if batch.prefills is None else batch.prefills
    count = (tokens + most * (size - 1)) // size  # each row adds less than one chunk
    lengths = jnp.where(batch.in_decode, 0, batch.lengths)
    ends = jnp.cumsum((lengths + size - 1) // size)
    index = jnp.arange(count, dtype=jnp.int32)
    row = jnp.searchsorted(ends, index, side="right", method="compare_all").astype(jnp.int32)
    used = row < batch.rows
    row = jnp.where(used, row, 0)
    start = (index - jnp.where(row > 0, ends[row - 1], 0)) * size
    length = jnp.where(used, jnp.clip(lengths[row] - start, 0, size), 0).astype(jnp.int32)
    inside = jnp.arange(size, dtype=jnp.int32)
    token = (batch.query_start[row] + start)[:, None] + inside[None, :]
    token = jnp.where(inside[None, :] < length[:, None], token, tokens).astype(jnp.int32)
    return Chunks(token, row, (start == 0) & used, length, (start + length).astype(jnp.int32))


def take(values: Array, index: Int[Array, "..."]) -> Array:
    """Rows of `values` at `index`; zeros where the index is out of range."""
    return values.at[index].get(mode="fill", fill_value=0)


def put(values: Array, index: Int[Array, "..."], rows: Array) -> Array:
    """`values` with `rows` stored at `index`; an index out of range stores nothing."""
    return values.at[index].set(rows.astype(values.dtype), mode="drop")


def clear_padding(values: Array, batch: RaggedBatch) -> Array:
    """`values` `[T, ...]` with zeros selected for padding tokens, whatever they hold."""
    _, real = token_rows(batch, values.shape[0])
    return jnp.where(real.reshape((-1,) + (1,) * (values.ndim - 1)), values, jnp.zeros((), values.dtype))


def gather_parts(tokens: int, parts: list[tuple[Int[Array, "..."], Array]]) -> Array:
    """The outputs `[T, ...]` from parts, each the indices of its tokens and their outputs; zeros elsewhere."""
    _, first = parts[0]
    depth = parts[0][0].ndim
    out = jnp.zeros((tokens, *first.shape[depth:]), first.dtype)
    for index, values in parts:
        out = put(out, index.reshape(-1), values.reshape(-1, *out.shape[1:]))
    return out


# ------------------------------------------------------------------------------------------------------ slots and pages


def read_states(pool: Array, layer: int, batch: RaggedBatch) -> Array:
    """The states `[B, ...]` that rows start from; zeros, whatever is in the slot, for a row that has seen nothing."""
    states = pool[layer, batch.read_slot]
    old = (batch.seen > 0) & (batch.read_slot > 0)
    return jnp.where(old.reshape((-1,) + (1,) * (states.ndim - 1)), states, jnp.zeros((), states.dtype))


def write_states(pool: Array, layer: int, slot: Int[Array, "B"], written: Bool[Array, "B"], states: Array) -> Array:
    """The pool `[L, N, ...]` with the states `[B, ...]` of the `written` rows stored; slot 0 stores nothing."""
    index = jnp.where(written & (slot > 0), slot, pool.shape[1])
    if len(index) == 1:  # XLA makes one row an update of a slice, for which a GPU copies the whole pool first
        index = jnp.concatenate([index, jnp.full_like(index, pool.shape[1])])
        states = jnp.concatenate([states, states])
    return pool.at[layer, index].set(states.astype(pool.dtype), mode="drop")


def store_states(pool: Array, layer: int, batch: RaggedBatch, final: Array, snapshot: Array) -> Array:
    """Store the rows' final states in their write slots and their snapshots in their snapshot slots."""
    present = batch.lengths > 0
    pool = write_states(pool, layer, batch.write_slot, present, final)
    return write_states(pool, layer, batch.snapshot_slot, present, snapshot)


def write_pages(pages: Array, layer: int, batch: RaggedBatch, values: Array) -> Array:
    """The pool `[L, P, S, ...]` with the values `[T, ...]` of this step's tokens stored at their positions."""
    row, real = token_rows(batch, values.shape[0])
    position = token_positions(batch, values.shape[0])
    page = batch.pages[row, position // pages.shape[2]]
    page = jnp.where(real & (page > 0), page, pages.shape[1])
    return pages.at[layer, page, position % pages.shape[2]].set(values.astype(pages.dtype), mode="drop")


def read_pages(pages: Array, layer: int, table: Int[Array, "... M"]) -> Array:
    """The tokens `[..., M * S, ...]` behind a page table; what lies past a row's last token is arbitrary."""
    found = pages[layer, table]
    return found.reshape(table.shape[:-1] + (-1,) + pages.shape[3:])


def check_batch(batch: RaggedBatch, tokens: int, slots: int, pages: int, page_size: int) -> None:
    """Check a batch of NumPy arrays before it goes to the device, where a bad index would be clamped in silence.

    Args:
      tokens: length of the packed token axis. slots, pages: sizes of the pools (no pages for a model that keeps none).
      page_size: tokens a page.
    Raises ValueError, naming the array that breaks a rule.
    """
    start, lengths = np.asarray(batch.query_start), np.diff(batch.query_start)
    rising = start[0] == 0 and start[-1] <= tokens and (lengths >= 0).all()
    _require(bool(rising), "query_start", f"rising from 0 to at most {tokens}", start)
    decodes = int(batch.decodes)
    _require(0 <= decodes <= len(lengths), "decodes", f"0 to {len(lengths)}", decodes)
    _require((lengths[:decodes] <= 1).all(), "length of a row in decode", "at most 1", lengths[:decodes])
    _require(batch.may_prefill or (lengths[decodes:] == 0).all(), "rows past decodes", "absent", lengths)
    _require(batch.may_decode or decodes == 0, "decodes of a batch without decodes", "0", decodes)
    prefills = int((lengths[decodes:] > 0).sum())
    most = len(lengths) if batch.prefills is None else batch.prefills
    _require(prefills <= most, "rows that prefill", f"at most {most}", prefills)
    present = lengths > 0
    _check_slots(batch, present, slots)
    _check_pages(batch, present, lengths, pages, page_size)


def _check_slots(batch: RaggedBatch, present: np.ndarray, slots: int) -> None:
    read, write, snapshot = (np.asarray(s) for s in (batch.read_slot, batch.write_slot, batch.snapshot_slot))
    for name, slot in (("read_slot", read), ("write_slot", write), ("snapshot_slot", snapshot)):
        _require(((slot >= 0) & (slot < slots)).all(), name, f"0 to {slots - 1}", slot)
        _require((slot[~present] == 0).all(), f"{name} of an absent row", "0", slot)
    old = present & (np.asarray(batch.seen) > 0)
    _require((read[old] > 0).all(), "read_slot of a row that has seen tokens", "1 or more", read)
    written = np.concatenate([write[write > 0], snapshot[snapshot > 0]])
    _require(len(np.unique(written)) == len(written), "slots written", "distinct", written)
    writer = np.full(slots, -1)
    writer[write[write > 0]] = np.flatnonzero(write > 0)
    writer[snapshot[snapshot > 0]] = len(write)
    clash = old & (writer[read] >= 0) & (writer[read] != np.arange(len(read)))
    _require(not clash.any(), f"read_slot of rows {np.flatnonzero(clash)}", "written by nobody else", read[clash])
    _check_snapshots(batch, snapshot)


def _check_snapshots(batch: RaggedBatch, slot: np.ndarray) -> None:
    length, new = np.asarray(batch.snapshot_length), np.diff(batch.query_start)
    at_border = (length % CHUNK == 0) | (length == new)
    legal = (length >= 1) & (length <= new) & at_border
    wanted = f"1 to the new tokens, a multiple of {CHUNK} or all of them"
    _require((legal | (slot == 0)).all(), "snapshot_length", wanted, length)


def _check_pages(batch: RaggedBatch, present: np.ndarray, lengths: np.ndarray, pages: int, page_size: int) -> None:
    table, seen = np.asarray(batch.pages), np.asarray(batch.seen)
    most = max(pages - 1, 0)  # a model that keeps no pages has tables of null pages
    _require(((table >= 0) & (table <= most)).all(), "page", f"0 to {most}", table)
    _require((seen >= 0).all(), "seen", "0 or more", seen)
    needed = np.where(present, -(-(seen + lengths) // page_size), 0) if pages else np.zeros_like(seen)
    _require((needed <= table.shape[1]).all(), "pages of a row", f"at most {table.shape[1]}", needed)
    used = np.arange(table.shape[1])[None, :] < needed[:, None]
    _require((table[used] > 0).all(), "page in use", "1 or more", table)
    first_new = seen // page_size
    new = used & (np.arange(table.shape[1])[None, :] >= first_new[:, None])
    _require(len(np.unique(table[new])) == new.sum(), "pages written", "distinct", table[new])
    kept = np.unique(table[used & ~new])
    _require(not np.isin(table[new], kept).any(), "pages written", "not in use for earlier tokens", table[new])


def _require(holds: bool | np.bool, what: str, wanted: str, got: object) -> None:
    if not holds:
        raise ValueError(f"wanted {what}: {wanted}, got {got}: whoever made the batch gave out a bad index")


# --------------------------------------------------------------------------------------------- one name, three backends


CONSTANT = "constant"  # in `Shares`: an argument that is no array


@dataclass(frozen=True)
class Shares:
    """How an operation falls into shares, each of some of its heads or groups, that need nothing of one another.

    A share is the same function of fewer heads. `arguments` says of each positional argument along which axis its array
    divides: a number, None for what every share has whole, a tuple of these for the fields of a dataclass, or CONSTANT.
    `results` says it of what comes back. `counts` are the keyword arguments that count heads or groups. `axis` is the
    logical axis.
    """

    axis: str
    arguments: tuple[Any, ...]
    results: tuple[int | None, ...]
    counts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Op:
    """One operation under one name, with one function per backend, all of the same signature.

    shares: how it divides. fits: for a backend that has only some shapes or dtypes, whether it has those of a layer,
    told from what the layer remembers and the dtype of its activations. kept: for a backend that keeps more than a
    layer remembers, such as rows filled up to whole registers, what it keeps.
    """

    name: str
    backends: Mapping[str, Callable[..., Any]]
    shares: Shares
    fits: Mapping[str, Callable[[Any, str], bool]] = field(default_factory=dict)
    kept: Mapping[str, Callable[[Any], Memory]] = field(default_factory=dict)

    def on(self, backend: str) -> Callable[..., Any]:
        """The function of a backend. Raises NotImplementedError where the kind does not have it."""
        if backend not in BACKENDS:
            raise ValueError(f"wanted a backend of {', '.join(BACKENDS)}, got {backend!r}")
        if backend not in self.backends:
            have = ", ".join(self.backends)
            raise NotImplementedError(f"{self.name} has no {backend} kernel, it has: {have}; choose one or 'auto'")
        return self.backends[backend]

    def choose(self, backend: str, memory: Memory, dtype: str, platform: str | None = None) -> str:
        """The name of the backend to use: `backend` itself, or for 'auto' the platform's own kernel where it fits.

        Args:
          backend: 'auto', AUTO_ON_TPU or one of BACKENDS. memory: what the layer remembers. dtype: of its activations.
          platform: 'cpu', 'gpu' or 'tpu'; None is where JAX runs.
        """
        if backend not in ("auto", AUTO_ON_TPU):
            self.on(backend)
            return backend
        own = "tpu" if backend == AUTO_ON_TPU else platform or jax.default_backend()
        fits = own in self.backends and (own not in self.fits or self.fits[own](memory, dtype))
        return own if fits else "xla"

    def keep(self, backend: str, memory: Memory) -> Memory:
        """What a backend, chosen already, keeps for a layer that remembers this."""
        return self.kept[backend](memory) if backend in self.kept else memory
