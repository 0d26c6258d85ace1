"""The prefix cache: which pages and which state a new request can take over from requests before it.

Full attention needs the pages of every token before; linear attention needs one state, valid at one exact length. So a
node of the tree holds a page for its span of tokens and, sometimes, a *snapshot*: a slot with the state after its last
token. A hit ends at a snapshot, so pages and state agree by construction. Snapshots lie on the *grid*, the least common
multiple of chunk and page: there a prefill can stop and go on without changing the arithmetic.

Pages are evicted from the leaves, least recently used first, and take a snapshot along. Snapshots are evicted alone:
first the superseded ones (a deeper one lies on the same unbranched chain, so that a continuation will start from it),
then the least recently used. Pages without a snapshot stay: they show where the next request has to leave a new one.

Knows tokens, pages and slots as numbers; not what they store, who runs or when. Imports no JAX.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hybrid_jax.config import CHUNK_TOKENS
from hybrid_jax.pool import Pool
from hybrid_jax.prefix_tree import (
    CACHE,
    Node,
    PrefixTree,
    SnapshotOrder,
    count_superseded_first,
    find_ancestor,
    find_child,
    token_bytes,
)

__all__ = ["CACHE", "Hit", "Lease", "PrefixCache", "Statistics", "snapshot_points"]
MAX_SNAPSHOTS_PER_PATH = 8  # one path is one conversation: only its last turns are likely to be taken up again


@dataclass(frozen=True)
class Hit:
    """What of a prompt is already computed.

    length: tokens whose keys, values and state are there: a multiple of the grid (of the page if the model keeps no
        states), less than the prompt, because the last token's logits are always wanted.
    pages: the pages of those tokens; none if the model keeps no pages.
    slot: the snapshot to start from; 0 if length is 0 or the model keeps no states.
    branch: where a snapshot is missing: the last grid position beyond `length` up to which the tree knows the tokens;
        else 0. A prefill that leaves one there lets the next request with this prefix start from it.
    """

    length: int
    pages: tuple[int, ...]
    slot: int
    branch: int


@dataclass(frozen=True)
class Statistics:
    """Counts since the cache was made. Tokens are of prompts; a trimmed snapshot was one too many on its path."""

    lookups: int = 0
    hits: int = 0
    looked_up_tokens: int = 0
    hit_tokens: int = 0
    misses_no_pages: int = 0
    misses_no_snapshot: int = 0
    branches_asked: int = 0
    evicted_pages: int = 0
    evicted_snapshots: int = 0
    trimmed_snapshots: int = 0


@dataclass(eq=False, slots=True)
class Lease:
    """A running request's hold on the path to `node`, from `open` to `close`. Only the cache looks inside.

    reading: the node whose snapshot the request's first step has yet to read.
    trail: the nodes with snapshots that the request met or left on its path.
    """

    owner: str
    node: Node
    reading: Node | None
    trail: list[Node] = field(default_factory=list)
    counted: Counter[str] = field(default_factory=Counter)


class PrefixCache:
    """A tree of prefixes for each salt, over units of two pools that it shares with running requests.

    page_size: tokens of a page, and of a node also where the model keeps no pages.
    max_snapshots_per_path: most snapshots from a root to one just published, as far as its request has met them; of
        more, the shallowest are dropped, branching points last.
    snapshot_order: rank of a snapshot from (superseded, last use in ticks); the least is evicted first.
    Raises ValueError for sizes below 1 and for a model that keeps neither pages nor states.
    """

    def __init__(
        self,
        pages: Pool,
        slots: Pool,
        page_size: int,
        keeps_pages: bool,
        keeps_states: bool,
        max_snapshots_per_path: int = MAX_SNAPSHOTS_PER_PATH,
        snapshot_order: SnapshotOrder = count_superseded_first,
    ) -> None:
        if page_size < 1 or max_snapshots_per_path < 1:
            raise ValueError(
                f"wanted page_size and max_snapshots_per_path of at least 1, got {page_size} and "
                f"{max_snapshots_per_path}: raise them"
            )
        if not keeps_pages and not keeps_states:
            raise ValueError("wanted a model that keeps pages or states, got neither: run it without a prefix cache")
        self.grid = math.lcm(CHUNK_TOKENS, page_size)
        self._pages, self._slots, self._page_size = pages, slots, page_size
        self._keeps_pages, self._keeps_states = keeps_pages, keeps_states
        self._max_snapshots_per_path = max_snapshots_per_path
        self._snapshot_order = snapshot_order
        self._tree = PrefixTree(pages, slots, keeps_pages, snapshot_order)
        self._leases: set[Lease] = set()
        self._counts: Counter[str] = Counter()

    # ------------------------------------------------------------------------------------------------------ look-up

    def match(self, tokens: Sequence[int], salt: str = "") -> Hit:
        """What a request of these tokens would find; changes nothing."""
        return self._make_hit(self._matched(tokens, salt))

    def open(self, tokens: Sequence[int], salt: str, owner: str) -> tuple[Lease, Hit]:
        """Look up and lock what is found: the path until `close`, the snapshot until `started`."""
        path = self._matched(tokens, salt)
        hit = self._make_hit(path)
        counted = _count_lookup(len(tokens), hit, path)
        self._counts.update(counted)
        if path:
            self._tree.touch(path[-1])
        used = path[: hit.length // self._page_size]
        node = used[-1] if used else self._tree.root(salt)
        self._tree.hold(node)
        lease = Lease(owner, node, node if hit.slot else None, [node for node in used if node.slot], counted)
        self._leases.add(lease)
        if hit.slot:
            self._tree.lock_snapshot(node)
        return lease, hit

    def started(self, lease: Lease) -> None:
        """The step that reads the snapshot has been issued: unlock it, keep the pages.

        Does nothing for a lease that reads no snapshot or has started already. Raises ValueError if it is closed.
        """
        self._require_open(lease)
        node, lease.reading = lease.reading, None
        if node is not None:
            self._tree.unlock_snapshot(node)

    def uncount(self, lease: Lease) -> None:
        """Take back that the look-up was counted: the request could not start, and will ask again."""
        self._counts.subtract(lease.counted)
        lease.counted.clear()

    def close(self, lease: Lease) -> None:
        """Unlock everything the lease holds. Raises ValueError if it is closed already."""
        self.started(lease)
        self._leases.remove(lease)
        self._tree.touch(lease.node)
        self._tree.release(lease.node)

    def _matched(self, tokens: Sequence[int], salt: str) -> list[Node]:
        """The nodes that spell these tokens, whole pages of all but the last token."""
        return self._tree.spell(salt, self._spans(tokens, 0, (len(tokens) - 1) // self._page_size))

    def _spans(self, tokens: Sequence[int], first: int, last: int) -> Iterator[bytes]:
        """The contents of pages first to last - 1."""
        for start in range(first * self._page_size, last * self._page_size, self._page_size):
            yield token_bytes(tokens[start : start + self._page_size])

    def _make_hit(self, path: list[Node]) -> Hit:
        matched = len(path) * self._page_size // self.grid * self.grid
        depth = len(path)
        while self._keeps_states and depth and not path[depth - 1].slot:
            depth -= 1
        length = depth * self._page_size
        return Hit(
            length=length,
            pages=tuple(node.page for node in path[:depth]) if self._keeps_pages else (),
            slot=path[depth - 1].slot if depth else 0,
            branch=matched if self._keeps_states and matched > length else 0,
        )

    # ------------------------------------------------------------------------------------------------------ publish

    def publish(self, lease: Lease, tokens: Sequence[int], table: Sequence[int], position: int, slot: int) -> list[int]:
        """Put the request's full pages up to `position`, and the snapshot `slot` taken there if not 0, in the tree.

        tokens: all tokens of the request so far, from position 0; table: its pages in order, which hold them.
        What enters the tree passes from the lease's owner to `CACHE`, and the path to it is locked by the lease. Where
        the tree has a page for a span already, it takes the request's instead and gives its own back, unless another
        lease holds that: then the request keeps its page. A snapshot that the tree has already is given back.
        Takes time for the new pages only. Returns the pages of `table` that the request no longer owns.
        Raises ValueError for a closed lease, a position beyond tokens or table, a snapshot off the grid or of a model
        that keeps no states, and a page or slot that the request does not own.
        """
        self._require_open(lease)
        depth = position // self._page_size
        if not 0 <= position <= len(tokens) or (self._keeps_pages and depth > len(table)):
            raise ValueError(
                f"wanted a position within {len(tokens)} tokens and {len(table)} pages of {self._page_size}, "
                f"got {position}: publish what has been computed"
            )
        if slot and (not self._keeps_states or position == 0 or position % self.grid):
            raise ValueError(
                f"wanted a snapshot of a model that keeps states at a multiple of {self.grid}, got slot {slot} at "
                f"{position}: take snapshots on the grid"
            )
        passed = self._extend(lease, tokens, table, depth)
        if slot:
            self._attach(lease, depth, slot)
        return passed

    def _extend(self, lease: Lease, tokens: Sequence[int], table: Sequence[int], depth: int) -> list[int]:
        """Move the lease down to `depth`; a collision of digests ends it earlier."""
        first, passed = lease.node.depth, []
        for index, span in enumerate(self._spans(tokens, first, depth), start=first):
            page = table[index] if self._keeps_pages else 0
            child, free = find_child(lease.node, span)
            if child is None and not free:
                break
            if child is None:
                child = self._tree.insert(lease.node, span, page, lease.owner)
                passed.append(page)
            elif not child.holds and self._keeps_pages:
                # Else a request alone would lock this prefix twice, and might then never fit in the pool.
                self._tree.replace_page(child, page, lease.owner)
                passed.append(page)
            self._move(lease, child)
        return passed if self._keeps_pages else []

    def _move(self, lease: Lease, child: Node) -> None:
        """One node down."""
        self._tree.hold(child)
        self._tree.release(lease.node)
        lease.node = child
        if child.slot:
            lease.trail.append(child)

    def _attach(self, lease: Lease, depth: int, slot: int) -> None:
        node = find_ancestor(lease.node, depth)
        if node.depth < depth or node.slot:  # after a collision there is no node
            self._slots.give_back(slot, lease.owner)
            return
        lease.trail = [*(before for before in lease.trail if before.slot), node]
        self._tree.attach(node, slot, lease.owner)
        self._trim(lease, node)

    def _trim(self, lease: Lease, newest: Node) -> None:
        excess = max(len(lease.trail) - self._max_snapshots_per_path, 0)
        spare = [node for node in lease.trail if node is not newest and not node.readers]
        spare.sort(key=lambda node: (len(node.children) > 1, node.depth))
        for node in spare[:excess]:
            self._tree.drop_snapshot(node)
            self._counts["trimmed_snapshots"] += 1
        lease.trail = [node for node in lease.trail if node.slot]

    # ----------------------------------------------------------------------------------------------------- eviction

    @property
    def evictable_pages(self) -> int:
        """Pages of the tree that `take_page` can free."""
        return self._tree.evictable_pages

    @property
    def evictable_slots(self) -> int:
        """Snapshots of the tree that `take_slot` can free."""
        return self._tree.evictable_slots

    @property
    def available_pages(self) -> int:
        """How many times `take_page` will succeed."""
        return self._pages.free + self.evictable_pages

    @property
    def available_slots(self) -> int:
        """How many times `take_slot` will succeed."""
        return self._slots.free + self.evictable_slots

    @property
    def statistics(self) -> Statistics:
        """The counts so far."""
        return Statistics(**self._counts)

    def take_page(self, owner: str) -> int | None:
        """A page for `owner`: a free one, else from the least recently used leaf; None if all are held."""
        free_slots = self._slots.free
        if not self._pages.free and self._tree.evict_leaf():
            self._counts["evicted_pages"] += 1
            self._counts["evicted_snapshots"] += self._slots.free - free_slots
        return self._pages.take(owner)

    def take_slot(self, owner: str) -> int | None:
        """A slot for `owner`: a free one, else a snapshot's; None if all are live or about to be read."""
        if not self._slots.free and self._tree.evict_snapshot():
            self._counts["evicted_snapshots"] += 1
        return self._slots.take(owner)

    def clear(self) -> None:
        """Forget everything. Raises ValueError, and forgets nothing, while a lease is open."""
        if self._leases:
            raise ValueError(f"wanted no open lease, got {len(self._leases)}: finish or abort the requests first")
        while self._tree.evict_leaf() or self._tree.evict_snapshot():
            pass

    def reset(self) -> None:
        """Forget everything, open leases too, in whatever condition it is. The pools are to be reset along with it."""
        self._tree = PrefixTree(self._pages, self._slots, self._keeps_pages, self._snapshot_order)
        self._leases.clear()

    # -------------------------------------------------------------------------------------------------------- check

    def check(self) -> None:
        """Compare everything with everything, for tests. Raises AssertionError that names what broke."""
        held = Counter(lease.node for lease in self._leases)
        read = Counter(lease.reading for lease in self._leases if lease.reading is not None)
        self._tree.check(self._page_size, self.grid, held, read)

    def _require_open(self, lease: Lease) -> None:
        if lease not in self._leases:
            raise ValueError(f"wanted an open lease, got a closed one of {lease.owner!r}: close a lease once, last")


def _count_lookup(tokens: int, hit: Hit, path: list[Node]) -> Counter[str]:
    """What a look-up adds to the counts; nothing where there was nothing to look up."""
    if not tokens:
        return Counter()
    outcome = "hits" if hit.length else "misses_no_snapshot" if path else "misses_no_pages"
    counts = {"lookups": 1, outcome: 1, "looked_up_tokens": tokens, "hit_tokens": hit.length}
    return Counter(counts | {"branches_asked": int(hit.branch > 0)})


def snapshot_points(start: int, prompt_length: int, branch: int, grid: int, interval: int) -> tuple[int, ...]:
    """Where a prefill from `start` should leave snapshots: rising positions inside (start, prompt_length).

    These are the branching point (`Hit.branch`, 0: none), so that other requests with this prefix hit; the last grid
    position that leaves a token to compute, so that this prompt and its continuations hit; and the multiples of
    `interval` (0: none). Raises ValueError where branch or interval are not multiples of the grid.
    """
    if grid < 1 or branch % grid or interval % grid or interval < 0:
        raise ValueError(
            f"wanted branch and interval as multiples of the grid, got {branch} and {interval} for {grid}: round them"
        )
    points = {branch, (prompt_length - 1) // grid * grid}
    if interval:
        points.update(range(start // interval * interval, prompt_length, interval))
    return tuple(sorted(point for point in points if start < point < prompt_length))
