"""The prefix cache against a model that knows nothing of trees: which contents are there, who locks them, when used."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hybrid_jax.pool import Pool
from hybrid_jax.prefix_cache import CACHE, Hit, Lease, PrefixCache
from hybrid_jax.prefix_tree import EvictionQueue, make_root

SALTS = ("", "tenant")
HOG = "somebody else"


@dataclass
class Running:
    """A request: its lease, what it may read, and what it owns."""

    owner: str
    lease: Lease
    salt: str
    tokens: list[int]
    table: list[int]
    locked: int  # tokens of its path that are locked
    reads: int  # the slot of its hit, 0 once started
    own: set[int] = field(default_factory=set)


class CacheMachine(RuleBasedStateMachine):
    """Contents are (salt, bytes of the tokens from position 0): a page's, or a snapshot's."""

    @initialize(
        page_size=st.sampled_from([16, 64, 128]),
        keeps=st.sampled_from([(True, True), (True, True), (True, False), (False, True)]),
        pages=st.one_of(st.integers(20, 50), st.integers(1, 20)),
        slots=st.one_of(st.integers(3, 9), st.integers(1, 3)),
    )
    def start(self, page_size, keeps, pages, slots):
        self.page_size, (self.keeps_pages, self.keeps_states) = page_size, keeps
        self.pages, self.slots = Pool("pages", pages), Pool("slots", slots)
        self.cache = PrefixCache(self.pages, self.slots, page_size, *keeps, max_snapshots_per_path=99)
        self.grid = self.cache.grid
        self.running: dict[str, Running] = {}
        self.page_content: dict[int, tuple[str, bytes]] = {}
        self.slot_content: dict[int, tuple[str, bytes]] = {}
        self.used, self.slot_used = Counter(), Counter()
        self.clock = self.opened = 0
        self.hogged = ([], [])

    # ------------------------------------------------------------------------------------------------- the model

    def cached(self, pool, content):
        """What the pool's cached units hold, each content once."""
        units = {content[unit]: unit for unit, owner in pool.owners().items() if owner == CACHE}
        assert len(units) == list(pool.owners().values()).count(CACHE), "a content is cached twice"
        return units

    def prefixes(self, salt, tokens, end):
        return [(salt, bytes(tokens[:at])) for at in range(self.page_size, end + 1, self.page_size)]

    def locked(self):
        runs = self.running.values()
        return {content for run in runs for content in self.prefixes(run.salt, run.tokens, run.locked)}

    def nodes(self):
        if self.keeps_pages:
            return set(self.cached(self.pages, self.page_content))
        ends = self.cached(self.slots, self.slot_content)
        return self.locked() | {prefix for salt, text in ends for prefix in self.prefixes(salt, text, len(text))}

    def children(self, nodes, content):
        return [n for n in nodes if (n[0], n[1][: -self.page_size]) == content]

    def superseded(self, nodes, snapshots, content):
        below = self.children(nodes, content)
        while len(below) == 1:
            if below[0] in snapshots:
                return True
            below = self.children(nodes, below[0])
        return False

    def first_page_to_go(self):
        cached, locked = self.cached(self.pages, self.page_content), self.locked()
        leaves = [content for content in set(cached) - locked if not self.children(cached, content)]
        return min(leaves, key=lambda content: self.used[content], default=None)

    def first_snapshot_to_go(self):
        nodes, snapshots = self.nodes(), self.cached(self.slots, self.slot_content)
        reads = {run.reads for run in self.running.values()}
        free = [content for content, slot in snapshots.items() if slot not in reads]
        rank = {c: (not self.superseded(nodes, snapshots, c), self.slot_used[c]) for c in free}
        return min(free, key=lambda content: rank[content], default=None)

    def tick(self, counter, contents):
        self.clock += 1
        counter.update({content: self.clock - counter[content] for content in contents})

    def expected_hit(self, tokens, salt):
        """And the contents that match, for the order of eviction."""
        nodes, pages = self.nodes(), self.cached(self.pages, self.page_content)
        slots = self.cached(self.slots, self.slot_content)
        path = self.prefixes(salt, tokens, len(tokens) - 1)
        depth = next((i for i, content in enumerate(path) if content not in nodes), len(path))
        ends = [i for i in range(1, depth + 1) if not self.keeps_states or path[i - 1] in slots]
        end = max(ends, default=0)
        matched = depth * self.page_size // self.grid * self.grid
        hit = Hit(
            length=end * self.page_size,
            pages=tuple(pages[content] for content in path[:end]) if self.keeps_pages else (),
            slot=slots[path[end - 1]] if end and self.keeps_states else 0,
            branch=matched if self.keeps_states and matched > end * self.page_size else 0,
        )
        return hit, path[:depth]

    # ------------------------------------------------------------------------------------------------- the rules

    def take_page(self, owner):
        free, goes = self.pages.free, self.first_page_to_go() if not self.pages.free else None
        before, unit = self.cached(self.pages, self.page_content), self.cache.take_page(owner)
        assert (unit is None) == (not free and goes is None)
        assert goes is None or unit == before[goes], "evicted another page than the least recently used"
        return unit

    def take_slot(self, owner):
        free, goes = self.slots.free, self.first_snapshot_to_go() if not self.slots.free else None
        before, unit = self.cached(self.slots, self.slot_content), self.cache.take_slot(owner)
        assert (unit is None) == (not free and goes is None)
        assert goes is None or unit == before[goes], "evicted another snapshot than the first in order"
        assert unit is None or unit not in {run.reads for run in self.running.values()}
        return unit

    @rule(
        symbols=st.lists(st.tuples(st.integers(0, 1), st.sampled_from([True, True, False])), min_size=1, max_size=4),
        tail=st.integers(0, 3),
        salt=st.sampled_from(SALTS),
        finish=st.integers(0, 2),
    )
    def open(self, symbols, tail, salt, finish):
        """Of three requests, one stays open untouched, one is published, one is published and closed."""
        tokens = [s for s, long in symbols for _ in range(self.grid if long else self.page_size)] + [7] * tail
        hit, matched = self.expected_hit(tokens, salt)
        statistics = self.cache.statistics
        assert self.cache.match(tokens, salt) == hit and self.cache.statistics == statistics
        self.opened += 1
        owner = f"request {self.opened}"
        lease, got = self.cache.open(tokens, salt, owner)
        assert got == hit and hit.length <= max(len(tokens) - 1, 0) and hit.length % self.page_size == 0
        self.tick(self.used, matched)
        if hit.slot:
            self.tick(self.slot_used, [self.slot_content[hit.slot]])
        run = Running(owner, lease, salt, tokens, list(hit.pages), hit.length, hit.slot)
        self.running[owner] = run
        if finish:
            self.advance(run, len(tokens), True, len(tokens) - (hit.branch or len(tokens)))
        if finish == 2:
            self.end(run)

    def choose(self, data):
        return self.running[data.draw(st.sampled_from(sorted(self.running)))]

    def advance(self, run, new_pages, snapshot, back):
        """Compute up to so many pages more, as far as there is room, and publish all but `back` tokens."""
        for _ in range(min(new_pages, len(run.tokens) // self.page_size - len(run.table)) if self.keeps_pages else 0):
            if (page := self.take_page(run.owner)) is not None:
                run.table.append(page)
                run.own.add(page)
        fed = min(len(run.tokens), len(run.table) * self.page_size if self.keeps_pages else len(run.tokens))
        position = max(fed - back, 0)
        slot = 0
        if snapshot and self.keeps_states and position >= self.grid:
            position = position // self.grid * self.grid
            slot = self.take_slot(run.owner) or 0
        passing = self.passing_pages(run, position)
        returned = self.cache.publish(run.lease, run.tokens, run.table, position, slot)
        assert returned == list(passing)
        self.page_content.update(passing)
        run.own -= set(returned)
        run.locked = max(run.locked, position // self.page_size * self.page_size)
        if slot:
            self.expect_snapshot(slot, (run.salt, bytes(run.tokens[:position])))

    def end(self, run):
        self.cache.close(run.lease)
        for page in sorted(run.own):
            self.pages.give_back(page, run.owner)
        self.tick(self.used, self.prefixes(run.salt, run.tokens, run.locked))
        del self.running[run.owner]
        for act in (self.cache.close, self.cache.started):
            with pytest.raises(ValueError, match="wanted an open lease"):
                act(run.lease)

    @precondition(lambda self: self.running)
    @rule(
        data=st.data(), symbols=st.lists(st.integers(0, 1), max_size=2), snapshot=st.booleans(), back=st.integers(0, 3)
    )
    def generate(self, data, symbols, snapshot, back):
        run = self.choose(data)
        run.tokens.extend(symbol for symbol in symbols for _ in range(self.grid))
        self.advance(run, 8, snapshot, back * self.page_size)

    def passing_pages(self, run, position):
        """Pages that enter the cache, with their contents: what it lacks or nobody locks."""
        cached, locked = self.cached(self.pages, self.page_content), self.locked()
        path = self.prefixes(run.salt, run.tokens, position if self.keeps_pages else 0)
        pairs = list(zip(run.table, path, strict=False))[run.locked // self.page_size :]
        return {page: content for page, content in pairs if content not in cached or content not in locked}

    def expect_snapshot(self, slot, content):
        old = {unit for unit, what in self.slot_content.items() if what == content and unit != slot}
        if any(self.slots.owners().get(unit) == CACHE for unit in old):
            assert slot not in self.slots.owners(), "a duplicate comes back"
            return
        assert self.slots.owners()[slot] == CACHE
        self.slot_content[slot] = content
        self.tick(self.slot_used, [content])

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def started(self, data):
        run = self.choose(data)
        self.cache.started(run.lease)
        run.reads = 0

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def close(self, data):
        self.end(self.choose(data))

    @rule(which=st.integers(0, 1), give=st.booleans())
    def hog(self, which, give):
        pool, units = (self.pages, self.slots)[which], self.hogged[which]
        if give and units:
            pool.give_back(units.pop(), HOG)
        elif (unit := (self.take_page, self.take_slot)[which](HOG)) is not None:
            units.append(unit)

    @rule(seldom=st.integers(0, 9))
    def clear(self, seldom):
        if seldom:
            return
        if self.running:
            with pytest.raises(ValueError, match="wanted no open lease"):
                self.cache.clear()
            return
        statistics = self.cache.statistics
        self.cache.clear()
        assert CACHE not in {*self.pages.owners().values(), *self.slots.owners().values()}
        assert self.cache.statistics == statistics

    # -------------------------------------------------------------------------------------------- what always holds

    @invariant()
    def tree_is_consistent(self):
        self.cache.check()

    @invariant()
    def pools_balance(self):
        pages, slots = self.cached(self.pages, self.page_content), self.cached(self.slots, self.slot_content)
        live = [page for run in self.running.values() for page in run.own] + self.hogged[0]
        assert self.pages.free + len(live) + len(pages) == self.pages.count - 1
        assert self.slots.free + len(self.hogged[1]) + len(slots) == self.slots.count - 1
        assert {unit for unit, owner in self.pages.owners().items() if owner != CACHE} == set(live)

    @invariant()
    def what_is_available_is_not_locked(self):
        pages, slots = self.cached(self.pages, self.page_content), self.cached(self.slots, self.slot_content)
        assert self.cache.evictable_pages == len(set(pages) - self.locked())
        assert self.cache.evictable_slots == len(set(slots.values()) - {run.reads for run in self.running.values()})
        assert self.cache.available_pages == self.pages.free + self.cache.evictable_pages
        assert self.cache.available_slots == self.slots.free + self.cache.evictable_slots


CacheMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestCacheMachine = CacheMachine.TestCase


def test_the_queue_follows_the_latest_ranks_and_forgets_the_others():
    queue, nodes = EvictionQueue(), [make_root(str(index)) for index in range(10)]
    for round_ in range(100):
        for index, node in enumerate(nodes):
            queue.put(node, (round_ * index) % 7)
    assert len(queue) == 10 and len(queue._heap) < 40
    queue.discard(nodes[3])
    ranks = {node: (99 * index) % 7 for index, node in enumerate(nodes) if index != 3}
    assert queue.ranks() == ranks and nodes[3] not in queue
    assert [queue.pop() for _ in range(10)] == [*sorted(ranks, key=lambda node: ranks[node]), None]
