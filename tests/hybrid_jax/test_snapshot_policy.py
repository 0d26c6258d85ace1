"""The order in which snapshots are evicted pays on chats and shared prefixes, and costs nothing where slots abound."""

import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from snapshot_policy import CONCURRENT, PAGE_SIZE, POLICIES, TRACES, make_chats, run_trace

from hybrid_jax.prefix_cache import MAX_SNAPSHOTS_PER_PATH, snapshot_points

OURS, CAPPED_LRU, PLAIN_LRU = POLICIES
CONVERSATIONS, PREFIXES = 30, 6


@cache
def run(trace, slots, policy):
    return run_trace(TRACES[trace](), slots, policy)


def best_chat_hit_rate():
    """Every turn but the first starts from the last grid position of what its conversation had before."""
    lasts, hits, total = {}, 0, 0
    for exchange in make_chats():
        start = exchange.prompt[:20]  # no conversation begins with fewer tokens, and none as another does
        hits += lasts.get(start, 0) // PAGE_SIZE * PAGE_SIZE
        total += len(exchange.prompt)
        lasts[start] = len(exchange.prompt + exchange.answer)
    assert len(lasts) == CONVERSATIONS
    return hits / total


def test_a_slot_and_a_third_for_each_chat_are_enough():
    ours, plain = run("chats", 40, OURS), run("chats", 40, PLAIN_LRU)
    assert ours.hit_rate == pytest.approx(best_chat_hit_rate()) and ours.hit_rate > 0.9
    assert plain.hit_rate < 0.2, "plain LRU keeps two snapshots of some chats instead of one of each"
    assert ours.taken < plain.taken


def test_shared_prefixes_keep_their_branching_points():
    ours, plain = run("shared prefixes", 2 * PREFIXES + CONCURRENT, OURS), run("shared prefixes", 16, PLAIN_LRU)
    assert ours.hit_rate > 0.5 and ours.hit_rate > plain.hit_rate + 0.05
    assert run("shared prefixes", 128, OURS).hit_rate > 0.85


@pytest.mark.parametrize(("trace", "slots"), [("chats", 24), ("chats", 320), ("shared prefixes", 8)])
@pytest.mark.parametrize("other", [CAPPED_LRU, PLAIN_LRU])
def test_it_is_never_worse_than_least_recently_used(trace, slots, other):
    ours, theirs = run(trace, slots, OURS), run(trace, slots, other)
    assert ours.hit_rate >= theirs.hit_rate
    assert max(ours.peak_slots, theirs.peak_slots) <= slots


def test_the_cap_bounds_the_slots_where_there_are_enough():
    ours, plain = run("chats", 320, OURS), run("chats", 320, PLAIN_LRU)
    assert ours.evicted == 0 and ours.trimmed > 0 and plain.evicted > 0
    # One more while a new snapshot has not yet pushed out an old one.
    assert ours.peak_slots <= CONVERSATIONS * MAX_SNAPSHOTS_PER_PATH + CONCURRENT + 1 < plain.peak_slots
    assert ours.hit_rate == plain.hit_rate


@pytest.mark.parametrize(
    ("start", "prompt_length", "branch", "interval", "points"),
    [
        (0, 64, 0, 0, ()),
        (0, 65, 0, 0, (64,)),
        (0, 1, 0, 64, ()),
        (0, 257, 0, 128, (128, 256)),
        (0, 300, 128, 0, (128, 256)),
        (0, 300, 256, 0, (256,)),
        (128, 300, 128, 128, (256,)),
        (128, 500, 192, 256, (192, 256, 448)),
        (256, 300, 0, 128, ()),
        (300, 1000, 0, 256, (512, 768, 960)),
        (0, 128, 128, 0, (64,)),
    ],
)
def test_a_prefill_leaves_snapshots_at_these_points(start, prompt_length, branch, interval, points):
    assert snapshot_points(start, prompt_length, branch, 64, interval) == points


@pytest.mark.parametrize(("branch", "interval"), [(65, 0), (0, 65), (0, -64)])
def test_points_off_the_grid_are_refused(branch, interval):
    with pytest.raises(ValueError, match="multiples of the grid"):
        snapshot_points(0, 100, branch, 64, interval)
