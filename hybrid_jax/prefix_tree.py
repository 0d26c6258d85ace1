"""The tree of the prefix cache: its nodes, what they hold, their locks, and the order in which they are evicted.

A node stands for the tokens of one page under its parent, so the path to it spells a prefix. A held node keeps the path
to it, because only leaves are evicted. Knows nothing of requests and hits (`prefix_cache.py`). Imports no JAX.
"""

import hashlib
import heapq
import itertools
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrid_jax.pool import Pool

CACHE = "prefix cache"  # the owner of what the tree holds, in both pools
SnapshotOrder = Callable[[bool, int], tuple[int, int]]
DIGEST_BYTES = 16


@dataclass(eq=False, slots=True)
class Node:
    """One page's span of tokens. The root of a tree has no parent, no tokens, and its salt in `salt`.

    digest: key of this node under its parent, by itself a key of the whole prefix.
    depth: pages from the root to the end of this span.
    page, slot: what the node holds; 0 is nothing. The slot's state is the one after the span's last token.
    holds: leases that end here, plus children that are held: above 0 the node may not be evicted.
    readers: leases whose first step has yet to read the slot: above 0 the slot may not be evicted.
    used: last use of the path that ends here, in ticks of the clock. Longer paths count as uses too, without a record:
        a node becomes a leaf when the one below is evicted as the least recently used, and then goes right after it.
    slot_used: last use of the slot, in ticks.
    superseded: a deeper slot lies below with no branch in between, so a continuation will start from that one.
    """

    parent: "Node | None"
    tokens: bytes
    digest: bytes
    salt: str = ""
    depth: int = 0
    page: int = 0
    slot: int = 0
    children: dict[bytes, "Node"] = field(default_factory=dict)
    holds: int = 0
    readers: int = 0
    used: int = 0
    slot_used: int = 0
    superseded: bool = False


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Tokens as little-endian int32. Raises struct.error for one outside int32."""
    return struct.pack(f"<{len(tokens)}i", *tokens)


def make_digest(parent: bytes, content: bytes) -> bytes:
    """The key of a span after its parent's: a chain, so equal keys mean equal prefixes but for a collision."""
    return hashlib.blake2b(parent + content, digest_size=DIGEST_BYTES).digest()


def make_root(salt: str) -> Node:
    """A tree without a span."""
    return Node(None, b"", make_digest(b"", salt.encode("utf-8", "surrogatepass")), salt)


def make_child(parent: Node, tokens: bytes) -> Node:
    """Add a span below `parent`, which has none of this key."""
    child = Node(parent, tokens, make_digest(parent.digest, tokens), parent.salt, parent.depth + 1)
    parent.children[child.digest] = child
    return child


def find_child(node: Node, tokens: bytes) -> tuple[Node | None, bool]:
    """The child of exactly these tokens, and whether their key is free; a collision has neither."""
    child = node.children.get(make_digest(node.digest, tokens))
    return (child, False) if child is not None and child.tokens == tokens else (None, child is None)


def find_ancestor(node: Node, depth: int) -> Node:
    """The node at this depth on the path to `node`, or `node` where the path ends before."""
    while node.parent is not None and node.depth > depth:
        node = node.parent
    return node


def is_superseded(node: Node) -> bool:
    """Whether the chain below, up to its first branch, has a slot."""
    while len(node.children) == 1:
        (node,) = node.children.values()
        if node.slot:
            return True
    return False


def slot_above(node: Node) -> Node | None:
    """The nearest node with a slot above `node` and without a branch in between, itself not one."""
    above = node.parent
    while above is not None and len(above.children) == 1:
        if above.slot:
            return above
        above = above.parent
    return None


def walk(roots: Sequence[Node]) -> Iterator[Node]:
    """Every node of these trees, parents first."""
    rest = list(roots)
    while rest:
        node = rest.pop()
        yield node
        rest.extend(node.children.values())


def count_superseded_first(superseded: bool, used: int) -> tuple[int, int]:
    """The order of eviction of snapshots: superseded ones before others, the least recently used of each first."""
    return (0 if superseded else 1, used)


class EvictionQueue:
    """Nodes that may be evicted, each with a rank; the least rank goes first, equal ranks as they came.

    A heap from which outdated entries are dropped when met, and all at once when they outnumber the others, so
    every operation takes logarithmic time on average.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int, Node]] = []
        self._ranks: dict[Node, tuple[Any, int]] = {}
        self._serial = itertools.count()

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, node: Node) -> bool:
        return node in self._ranks

    def put(self, node: Node, rank: Any) -> None:
        """Add a node, or change its rank."""
        entry = (rank, next(self._serial))
        self._ranks[node] = entry
        heapq.heappush(self._heap, (*entry, node))
        if len(self._heap) > 2 * len(self._ranks) + 16:
            self._heap = [(*entry, node) for node, entry in self._ranks.items()]
            heapq.heapify(self._heap)

    def discard(self, node: Node) -> None:
        """Take a node out, if it is in."""
        self._ranks.pop(node, None)

    def pop(self) -> Node | None:
        """Take out the node that goes first; None if there is none."""
        while self._heap:
            rank, serial, node = heapq.heappop(self._heap)
            if self._ranks.get(node) == (rank, serial):
                del self._ranks[node]
                return node
        return None

    def ranks(self) -> dict[Node, Any]:
        """The rank of every node: a copy, for checks."""
        return {node: rank for node, (rank, _) in self._ranks.items()}


class PrefixTree:
    """The trees of all salts: nodes with units of two pools, locks on paths and snapshots, and what may be evicted.

    keeps_pages: whether every node holds a page; else nodes with neither a snapshot nor one below are removed.
    snapshot_order: rank of a snapshot from (superseded, last use in ticks); the least is evicted first.
    """

    def __init__(self, pages: Pool, slots: Pool, keeps_pages: bool, snapshot_order: SnapshotOrder) -> None:
        self._pages, self._slots, self._keeps_pages = pages, slots, keeps_pages
        self._snapshot_order = snapshot_order
        self._roots: dict[str, Node] = {}
        self._leaves = EvictionQueue()  # nodes that hold a page, have no child and are not held
        self._snapshots = EvictionQueue()  # nodes with a snapshot that nobody is about to read
        self._unheld = 0  # nodes, roots apart, that nobody holds
        self._clock = 0

    @property
    def evictable_pages(self) -> int:
        """Pages that `evict_leaf`, called again and again, frees."""
        return self._unheld if self._keeps_pages else 0

    @property
    def evictable_slots(self) -> int:
        """Snapshots that `evict_snapshot`, called again and again, frees."""
        return len(self._snapshots)

    def root(self, salt: str) -> Node:
        """The root of a salt; a new one stays only if it is held next."""
        if salt not in self._roots:
            self._roots[salt] = make_root(salt)
        return self._roots[salt]

    def spell(self, salt: str, spans: Iterable[bytes]) -> list[Node]:
        """The nodes from below the root on that spell these spans, as far as there are any; changes nothing."""
        node, path = self._roots.get(salt), []
        for span in spans:
            node = find_child(node, span)[0] if node is not None else None
            if node is None:
                break
            path.append(node)
        return path

    # ------------------------------------------------------------------------------------------------------- locks

    def hold(self, node: Node) -> None:
        """Lock the path to `node`; climbs only to the first node that is locked already."""
        node.holds += 1
        while node.holds == 1 and node.parent is not None:
            self._unheld -= 1
            self._leaves.discard(node)
            node = node.parent
            node.holds += 1

    def release(self, node: Node) -> None:
        """Undo one `hold`."""
        node.holds -= 1
        while not node.holds and node.parent is not None:
            parent = node.parent
            self._unheld += 1
            self._settle(node)
            node = parent
            node.holds -= 1
        self._settle(node)

    def touch(self, node: Node) -> None:
        """Count this as the last use of the path to `node`."""
        node.used = self._tick()
        if node in self._leaves:
            self._leaves.put(node, node.used)

    def lock_snapshot(self, node: Node) -> None:
        """Keep the snapshot of a held node until it has been read, and count this as its last use."""
        node.readers += 1
        node.slot_used = self._tick()
        self._snapshots.discard(node)

    def unlock_snapshot(self, node: Node) -> None:
        """Undo one `lock_snapshot`."""
        node.readers -= 1
        self._queue_snapshot(node)

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    # ------------------------------------------------------------------------------------------------------- growth

    def insert(self, parent: Node, span: bytes, page: int, owner: str) -> Node:
        """Add a span below a held node, with a page of `owner` if the model keeps pages. Hold it next."""
        if self._keeps_pages:
            self._pages.transfer(page, owner, CACHE)
        child = make_child(parent, span)
        child.page, child.used = page, self._tick()
        self._unheld += 1
        if len(parent.children) == 2:
            self._rank_chain(parent)
        return child

    def replace_page(self, node: Node, page: int, owner: str) -> None:
        """Free the page of a node that nobody holds, and put one of `owner` with the same content in its place."""
        self._pages.transfer(page, owner, CACHE)
        self._pages.give_back(node.page, CACHE)
        node.page = page

    def attach(self, node: Node, slot: int, owner: str) -> None:
        """Put a snapshot of `owner` at a held node that has none."""
        self._slots.transfer(slot, owner, CACHE)
        node.slot, node.slot_used = slot, self._tick()
        self._rank_chain(node)
        self._rank_above(node)

    # ----------------------------------------------------------------------------------------------------- eviction

    def evict_leaf(self) -> bool:
        """Remove the least recently used leaf that nobody holds; False if there is none."""
        node = self._leaves.pop()
        if node is None or node.parent is None:
            return False
        parent = node.parent
        self._detach(node, parent)
        self._settle(parent)
        return True

    def evict_snapshot(self) -> bool:
        """Drop the snapshot that goes first; False if all are about to be read, or there is none."""
        node = self._snapshots.pop()
        if node is None:
            return False
        self.drop_snapshot(node)
        self._settle(node)
        return True

    def drop_snapshot(self, node: Node) -> None:
        """Free the slot of a node; the node stays."""
        self._slots.give_back(node.slot, CACHE)
        node.slot, node.superseded = 0, False
        self._snapshots.discard(node)
        self._rank_above(node)

    def _detach(self, node: Node, parent: Node) -> None:
        """Take a leaf that nobody holds out of the tree, and free what it has."""
        if node.slot:
            self.drop_snapshot(node)
        if node.page:
            self._pages.give_back(node.page, CACHE)
        self._leaves.discard(node)
        self._unheld -= 1
        del parent.children[node.digest]
        if len(parent.children) == 1:
            self._rank_chain(parent)

    def _settle(self, node: Node) -> None:
        """Offer `node` for eviction if it is a free leaf; remove it, and then those above, if it holds nothing."""
        while not node.holds and not node.children:
            if node.parent is None:
                del self._roots[node.salt]
                return
            if node.page:
                self._leaves.put(node, node.used)
            if node.page or node.slot:
                return
            parent = node.parent
            self._detach(node, parent)
            node = parent

    def _queue_snapshot(self, node: Node) -> None:
        if not node.readers:
            self._snapshots.put(node, self._snapshot_order(node.superseded, node.slot_used))

    def _rank_chain(self, node: Node) -> None:
        """Rank anew the snapshot at `node`, or else the one that reaches it from above."""
        if node.slot:
            self._rank(node)
        else:
            self._rank_above(node)

    def _rank_above(self, node: Node) -> None:
        above = slot_above(node)
        if above is not None:
            self._rank(above)

    def _rank(self, node: Node) -> None:
        node.superseded = is_superseded(node)
        self._queue_snapshot(node)

    # -------------------------------------------------------------------------------------------------------- check

    def check(self, page_size: int, grid: int, held: Counter[Node], read: Counter[Node]) -> None:
        """Compare tree, locks, queues and pools with what `held` and `read`, the ends of the leases, ask for.

        Takes time for the whole tree. Raises AssertionError that names what broke.
        """
        nodes = list(walk(list(self._roots.values())))
        spans = [node for node in nodes if node.parent is not None]
        for node in nodes:
            self._check_node(node, page_size, grid, held[node], read[node])
        _expect(set(held) | set(read) <= set(nodes), "a lease ends outside the tree")
        _expect(all(self._roots[root.salt] is root for root in self._roots.values()), "a root under another's salt")
        _expect(self._unheld == sum(not node.holds for node in spans), "the count of nodes that nobody holds")
        leaves = {node: node.used for node in spans if node.page and not node.holds and not node.children}
        _expect(self._leaves.ranks() == leaves, "the queue of leaves")
        order = self._snapshot_order
        free = {node: order(node.superseded, node.slot_used) for node in nodes if node.slot and not node.readers}
        _expect(self._snapshots.ranks() == free, "the queue of snapshots")
        for pool, units in ((self._pages, [n.page for n in spans]), (self._slots, [n.slot for n in spans])):
            cached = sorted(unit for unit, owner in pool.owners().items() if owner == CACHE)
            _expect(sorted(filter(None, units)) == cached, f"{pool.name} of the tree are not those of the pool")

    def _check_node(self, node: Node, page_size: int, grid: int, held: int, read: int) -> None:
        children = list(node.children.values())
        useful = bool(node.holds or children or node.slot or node.page)
        for child in children:
            _expect(child.parent is node and node.children[child.digest] is child, "a child lost its parent")
            _expect(child.depth == node.depth + 1 and len(child.tokens) == 4 * page_size, "a child's depth or length")
            _expect(child.digest == make_digest(node.digest, child.tokens), "a digest is not of its tokens")
        _expect(node.holds == held + sum(child.holds > 0 for child in children), "a count of holds")
        _expect(node.readers == read and (not read or node.slot > 0), "a count of readers")
        _expect(not node.slot or (node.depth > 0 and node.depth * page_size % grid == 0), "a snapshot off the grid")
        _expect(bool(node.page) == (self._keeps_pages and node.parent is not None), "a node with or without a page")
        _expect(node.superseded == (node.slot > 0 and is_superseded(node)), "a snapshot wrongly superseded or not")
        _expect(useful, "a node that nobody needs")


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(f"prefix cache is inconsistent: {what}")
