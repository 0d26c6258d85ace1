"""Single cases of the prefix cache: what hits and how far, what is locked, what goes first, what is refused."""

from collections import Counter
from dataclasses import dataclass

import pytest

from hybrid_jax import prefix_cache, prefix_tree
from hybrid_jax.pool import Pool
from hybrid_jax.prefix_cache import CACHE, Hit, PrefixCache, snapshot_points


@dataclass
class Host:
    """A cache with its pools, and requests that run one at a time and end at once."""

    page_size: int = 64
    pages_count: int = 100
    slots_count: int = 20
    keeps_pages: bool = True
    keeps_states: bool = True
    cap: int = 99

    def __post_init__(self):
        self.pages, self.slots = Pool("pages", self.pages_count), Pool("slots", self.slots_count)
        keeps = (self.keeps_pages, self.keeps_states)
        self.cache = PrefixCache(self.pages, self.slots, self.page_size, *keeps, max_snapshots_per_path=self.cap)

    def begin(self, tokens, salt="", owner="request"):
        """Open a lease and take the pages of all tokens; returns lease, hit and table."""
        lease, hit = self.cache.open(tokens, salt, owner)
        count = len(tokens) // self.page_size - len(hit.pages) if self.keeps_pages else 0
        return lease, hit, [*hit.pages, *(self.cache.take_page(owner) for _ in range(count))]

    def end(self, lease):
        self.cache.close(lease)
        for pool in (self.pages, self.slots):
            for unit in [unit for unit, owner in pool.owners().items() if owner == lease.owner]:
                pool.give_back(unit, lease.owner)
        self.cache.check()

    def serve(self, tokens, interval=0, salt="", points=None):
        """Run a request to its end; returns the length of its hit."""
        lease, hit, table = self.begin(tokens, salt)
        self.cache.started(lease)
        if points is None:
            points = snapshot_points(hit.length, len(tokens), hit.branch, self.cache.grid, interval)
        for point in points if self.keeps_states else ():
            self.cache.publish(lease, tokens, table, point, self.cache.take_slot("request") or 0)
        self.cache.publish(lease, tokens, table, len(tokens), 0)
        self.end(lease)
        return hit.length

    def snapshots(self, tokens):
        """Where on the path of these tokens a snapshot is."""
        ends = range(self.cache.grid, len(tokens) + 1, self.cache.grid)
        return [end for end in ends if self.cache.match([*tokens[:end], 99]).length == end]


@pytest.mark.parametrize("page_size", [16, 48, 64, 128])
@pytest.mark.parametrize("remainder", [-1, 0, 1])
def test_the_same_prompt_hits_at_the_last_grid_position_that_leaves_a_token(page_size, remainder):
    host = Host(page_size)
    for grids in (1, 3):
        prompt = [grids] * (grids * host.cache.grid + remainder)
        expected = (len(prompt) - 1) // host.cache.grid * host.cache.grid
        assert [host.serve(prompt), host.serve(prompt)] == [0, expected]


def test_a_prompt_within_the_grid_never_hits():
    host = Host(page_size=16)
    assert [host.serve([1] * 63) for _ in range(3)] == [0, 0, 0]
    assert host.cache.statistics.misses_no_snapshot == 2


def test_a_shared_prefix_of_257_tokens_hits_256_with_an_interval_of_128():
    host, shared = Host(), [5] * 257
    assert [host.serve(shared + [6] * 90, 128), host.serve(shared + [7] * 90, 128)] == [0, 256]


def test_the_second_request_of_a_prefix_makes_the_branching_snapshot_and_the_third_hits():
    host, shared = Host(), [5] * 257
    host.serve(shared + [6] * 90)
    assert host.cache.match(shared + [7] * 90) == Hit(0, (), 0, 256)
    assert [host.serve(shared + [last] * 90) for last in (7, 8)] == [0, 256]
    statistics = host.cache.statistics
    assert (statistics.lookups, statistics.hits, statistics.hit_tokens, statistics.branches_asked) == (3, 1, 256, 1)
    assert (statistics.looked_up_tokens, statistics.misses_no_pages, statistics.misses_no_snapshot) == (3 * 347, 1, 1)


def test_each_turn_of_a_chat_hits_where_the_turn_before_left_its_snapshot():
    host, history, hits = Host(cap=3), [], []
    for turn in range(12):
        history = history + [turn] * 100
        hits.append((host.serve(history), (len(history) - 1) // 64 * 64))
    assert [hit for hit, _ in hits[1:]] == [end for _, end in hits[:-1]]
    assert host.snapshots(history) == [end for _, end in hits[-3:]], "the cap keeps the deepest"
    assert host.cache.statistics.trimmed_snapshots == 9


def test_the_cap_keeps_branching_points_before_chains():
    host, shared = Host(cap=2), [5] * 64
    host.serve(shared + [6] * 64, points=[64, 128])
    host.serve(shared + [7] * 256, points=[192])
    host.serve(shared + [7] * 256, points=[256])
    assert host.snapshots(shared + [7] * 256) == [64, 256]


def test_salts_share_nothing():
    host, prompt = Host(), [5] * 200
    assert [host.serve(prompt, salt=salt) for salt in ("a", "b", "", "a")] == [0, 0, 0, 192]
    assert len(host.pages.owners()) == 9


def test_a_collision_of_digests_does_not_hit(monkeypatch):
    monkeypatch.setattr(prefix_tree, "make_digest", lambda parent, content: b"same")
    host = Host()
    assert [host.serve([1] * 200), host.serve([2] * 200), host.serve([1] * 200)] == [0, 0, 192]
    assert host.cache.match([1] * 64 + [2] * 136).branch == 64
    assert host.serve([1] * 64 + [2] * 136) == 0 and host.slots.free == 17
    host.cache.clear()
    assert (host.pages.free, host.slots.free) == (99, 19)


def test_without_states_a_hit_ends_at_any_page():
    host = Host(page_size=16, keeps_states=False, slots_count=1)
    assert [host.serve([5] * 100), host.serve([5] * 50 + [6])] == [0, 48]
    assert host.cache.match([5] * 200) == Hit(96, tuple(host.cache.match([5] * 200).pages), 0, 0)


def test_without_pages_a_hit_needs_the_snapshot_only_and_nodes_go_with_it():
    host = Host(pages_count=1, slots_count=3, keeps_pages=False)
    assert [host.serve([5] * 200), host.serve([5] * 200)] == [0, 192]
    assert host.cache.match([5] * 129) == Hit(0, (), 0, 128)
    assert [host.serve([6] * 200), host.serve([7] * 200)] == [0, 0]
    assert host.cache.match([5] * 200) == Hit(0, (), 0, 0), "the first snapshot, and its nodes, had to go"
    assert (host.cache.available_pages, host.cache.take_page("request")) == (0, None)


def test_pools_of_minimum_size_serve_without_caching():
    host = Host(pages_count=2, slots_count=1)
    assert [host.serve([1] * 100), host.serve([2] * 100), host.serve([1] * 100)] == [0, 0, 0]
    assert host.cache.statistics.evicted_pages == 2
    lease, _, table = host.begin([3] * 128)
    assert table[1] is None and host.cache.take_slot("request") is None, "a failed take is not an error"
    host.end(lease)


@pytest.mark.parametrize("stage", range(5))
def test_an_abort_at_any_stage_leaks_nothing(stage):
    host, prompt = Host(), [5] * 300
    host.serve(prompt)
    lease, hit, table = host.begin([*prompt, *([6] * 100)])
    live = host.cache.take_slot("request")
    if stage > 0:
        host.cache.started(lease)
    if stage > 1:
        host.cache.publish(lease, prompt + [6] * 100, table, 320, 0)
    if stage > 2:
        host.cache.publish(lease, prompt + [6] * 100, table, 384, live)
    if stage > 3:
        host.cache.publish(lease, prompt + [6] * 100, table, 320, host.cache.take_slot("request"))
    host.end(lease)
    host.cache.clear()
    assert (host.pages.free, host.slots.free, hit.length) == (99, 19, 256)


def test_a_snapshot_is_locked_until_started_and_pages_until_closed():
    host = Host(pages_count=4, slots_count=2)
    host.serve([5] * 192)
    lease, hit = host.cache.open([5] * 192, "", "reader")
    assert (hit.length, host.cache.take_slot("x"), host.cache.available_slots) == (128, None, 0)
    assert [host.cache.take_page("x") in (*hit.pages, None) for _ in range(2)] == [False, True]
    host.cache.started(lease)
    assert (host.cache.take_slot("x"), host.cache.take_page("x")) == (hit.slot, None)
    host.cache.close(lease)
    assert [host.cache.take_page("x") for _ in range(2)] == [*reversed(hit.pages)], "leaves go first"


def test_a_request_that_recomputes_a_cached_prefix_alone_does_not_hold_it_twice():
    host = Host(pages_count=5, slots_count=1)  # no snapshots: the second request hits nothing
    host.serve([5] * 128)
    lease, _, table = host.begin([5] * 128)
    assert host.cache.publish(lease, [5] * 128, table, 128, 0) == table
    assert (host.cache.available_pages, host.cache.match([5] * 256).branch) == (2, 128)
    host.end(lease)


def test_a_duplicate_of_a_page_in_use_stays_with_its_request():
    host = Host()
    (first, _, table), (second, _, other) = host.begin([5] * 130, owner="a"), host.begin([5] * 130, owner="b")
    assert host.cache.publish(first, [5] * 130, table, 128, host.cache.take_slot("a")) == table
    assert host.cache.publish(second, [5] * 130, other, 128, host.cache.take_slot("b")) == []
    assert {host.pages.owners()[page] for page in other} == {"b"} and host.slots.free == 18
    assert host.cache.match([5] * 130).pages == tuple(table)
    host.end(first), host.end(second)


def test_superseded_snapshots_go_first_until_a_branch_makes_them_useful():
    host = Host(slots_count=4)
    host.serve([1] * 200, points=[64, 192])
    host.serve([2] * 100)
    host.cache.open([1] * 100, "", "a")  # the most recent use of all, but superseded
    for lease in list(host.cache._leases):
        host.end(lease)
    host.serve([3] * 100)
    assert (host.snapshots([1] * 200), host.snapshots([2] * 100)) == ([192], [64])
    host.serve([1] * 64 + [4] * 90)  # leaves two more, at the branch and at its end: LRU takes [2]
    assert host.snapshots([1] * 64 + [4] * 90) == [64, 128] and host.snapshots([2] * 100) == []


def test_where_a_branch_is_evicted_the_snapshot_above_is_superseded_again():
    host = Host(pages_count=5, slots_count=3)
    host.serve([1] * 200, points=[64, 192])
    host.serve([1] * 64 + [2] * 64, points=[])
    assert [host.serve([1] * length, points=[]) for length in (200, 65)] == [192, 64]
    slot = host.cache.match([1] * 65).slot  # the last one used
    assert host.cache.take_page("x") is not None
    host.cache.check()
    assert host.snapshots([1] * 200) == [64, 192] and host.cache.take_slot("x") == slot


def test_where_the_deeper_snapshot_is_evicted_the_one_above_is_no_longer_superseded():
    host = Host(pages_count=5, slots_count=4)
    host.serve([1] * 200, points=[64, 192])
    host.serve([2] * 64, points=[64])
    host.cache.close(host.cache.open([1] * 65, "", "a")[0])
    assert host.cache.take_page("x") is not None and host.slots.free == 1, "the leaf of [1] took its snapshot along"
    assert (host.cache.statistics.evicted_pages, host.cache.statistics.evicted_snapshots) == (1, 1)
    host.cache.check()
    assert None not in [host.cache.take_slot("x") for _ in range(2)]
    assert (host.snapshots([1] * 200), host.snapshots([2] * 64)) == ([64], [])


def test_a_path_was_in_use_until_its_lease_was_closed():
    host = Host(pages_count=3)
    (first, _, table), (second, _, other) = host.begin([1] * 64, owner="a"), host.begin([2] * 64, owner="b")
    host.cache.publish(first, [1] * 64, table, 64, 0)
    host.cache.publish(second, [2] * 64, other, 64, 0)
    host.end(second), host.end(first)
    assert [host.cache.take_page("x") for _ in range(2)] == [*other, *table]


def test_the_cap_spares_a_snapshot_that_has_yet_to_be_read():
    host = Host(cap=1)
    host.serve([5] * 129, points=[64])
    lease, hit, table = host.begin([5] * 200)
    host.cache.publish(lease, [5] * 200, table, 128, host.cache.take_slot("request"))
    assert hit.length == 64 and host.snapshots([5] * 200) == [64, 128]
    host.cache.started(lease)
    host.cache.publish(lease, [5] * 200, table, 192, host.cache.take_slot("request"))
    assert host.snapshots([5] * 200) == [192]
    host.end(lease)


def test_the_cap_counts_snapshots_that_others_left_on_the_way():
    host = Host(cap=1)
    lease, _, table = host.begin([5] * 200, owner="a")
    host.serve([5] * 65, points=[64])
    host.cache.publish(lease, [5] * 200, table, 128, host.cache.take_slot("a"))
    assert host.snapshots([5] * 200) == [128]
    host.end(lease)


def test_a_long_path_costs_only_its_new_pages(monkeypatch):
    host = Host(page_size=16, pages_count=3002)
    tokens = [5] * 48_016
    lease, _, table = host.begin(tokens)
    calls = Counter()
    spell = prefix_cache.token_bytes
    monkeypatch.setattr(prefix_cache, "token_bytes", lambda span: calls.update(spans=1) or spell(span))
    for position in range(1600, 48_001, 1600):
        host.cache.publish(lease, tokens, table, position, host.cache.take_slot("request") or 0)
    assert calls["spans"] == 3000
    host.end(lease)
    assert host.cache.evictable_pages == 3000
    host.cache.clear()


@pytest.mark.parametrize(
    ("position", "slot", "match"),
    [
        (201, 0, "wanted a position within 200 tokens"),
        (-1, 0, "wanted a position within"),
        (100, 1, "multiple of 64, got slot 1 at 100"),
        (0, 1, "multiple of 64"),
        (128, 5, "got unit 5, which is free"),
    ],
)
def test_a_wrong_publish_is_refused_and_leaves_the_tree_whole(position, slot, match):
    host = Host()
    lease, _, table = host.begin([5] * 200)
    assert host.cache.take_slot("request") == 1
    with pytest.raises(ValueError, match=match):
        host.cache.publish(lease, [5] * 200, table, position, slot)
    with pytest.raises(ValueError, match="2 pages of 64, got 192"):
        host.cache.publish(lease, [5] * 200, table[:2], 192, 0)
    with pytest.raises(ValueError, match="got unit 0, out of the range"):
        host.cache.publish(lease, [6] * 200, [0, 0, 0], 192, 0) if position < 128 else host.pages.give_back(0, "x")
    host.end(lease)


def test_impossible_caches_are_refused():
    pools = Pool("pages", 2), Pool("slots", 2)
    with pytest.raises(ValueError, match="got neither"):
        PrefixCache(*pools, 64, keeps_pages=False, keeps_states=False)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        PrefixCache(*pools, 0, keeps_pages=True, keeps_states=True)
    cache = PrefixCache(*pools, 64, keeps_pages=True, keeps_states=False)
    lease, _ = cache.open([5] * 99, "", "a")
    with pytest.raises(ValueError, match="of a model that keeps states"):
        cache.publish(lease, [5] * 99, [cache.take_page("a")], 64, pools[1].take("a"))


BREAKS = {
    "a count of holds": lambda node, host: setattr(node, "holds", 3),
    "a count of readers": lambda node, host: setattr(node, "readers", 1),
    "a digest is not of its tokens": lambda node, host: setattr(node, "tokens", bytes(256)),
    "a child's depth": lambda node, host: setattr(node, "depth", 7),
    "the queue of leaves": lambda node, host: setattr(node, "used", 999),
    "the queue of snapshots": lambda node, host: setattr(node, "slot_used", 999),
    "wrongly superseded": lambda node, host: setattr(node, "superseded", True),
    "a node with or without a page": lambda node, host: setattr(node, "page", 0),
    "slots of the tree": lambda node, host: host.slots.give_back(node.slot, CACHE),
    "pages of the tree": lambda node, host: host.pages.transfer(node.page, CACHE, "x"),
    "a child lost its parent": lambda node, host: setattr(node, "parent", None),
    "nobody holds": lambda node, host: setattr(host.cache._tree, "_unheld", 5),
}


@pytest.mark.parametrize("what", BREAKS)
def test_the_check_finds_what_is_broken(what):
    host = Host()
    host.serve([5] * 65)
    (root,) = host.cache._tree._roots.values()
    (node,) = root.children.values()
    BREAKS[what](node, host)
    with pytest.raises(AssertionError, match=what):
        host.cache.check()


def test_a_look_up_that_led_to_nothing_is_not_counted():
    host = Host()
    tokens = list(range(200))
    host.serve(tokens, interval=64)
    before = host.cache.statistics
    for asked in (tokens, [], [7] * 100):
        lease, _ = host.cache.open(asked, "", "request")
        host.cache.uncount(lease)
        host.cache.close(lease)
    assert host.cache.statistics == before
    host.cache.close(host.cache.open([], "", "request")[0])
    assert host.cache.statistics == before  # and nothing was looked up for no tokens
