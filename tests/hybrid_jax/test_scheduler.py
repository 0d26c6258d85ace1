"""Who runs, with how many tokens, pages and slots: the schedule by itself, on an oracle that answers at once."""

import pytest

from hybrid_jax.request import SamplingParams, make_request
from hybrid_jax.scheduler import QueueFull
from tests.hybrid_jax.oracle_device import Setup, check_balance, check_empty, make_engine

ROOMY = Setup(pages=200, slots=30, rows=4, page_size=16, loops=8, step_tokens=256)


class Host:
    """A schedule with a device that does each step when asked."""

    def __init__(self, **sizes):
        self.engine, self.device = make_engine(Setup(**{**vars(ROOMY), **sizes}))
        self.scheduler = self.engine.scheduler

    def add(self, name, prompt, limit=20, priority=0, **params):
        tokens = list(range(1000, 1000 + prompt)) if isinstance(prompt, int) else prompt
        given = {"max_tokens": limit, "ignore_eos": True, "seed": 0, **params}
        self.scheduler.add(make_request(name, tokens, SamplingParams(**given), 4000, priority=priority))

    def entry(self, name):
        return self.scheduler._entries[name]

    def plan(self):
        """The next step, which is done at once."""
        step = self.scheduler.schedule()
        if step is not None:
            self.scheduler.commit(step, self.device.collect(self.device.submit(step)))
            check_balance(self.engine)
        return step

    def plans(self, count):
        return [self.plan() for _ in range(count)]

    def finish(self):
        steps = []
        while self.scheduler.unfinished:
            steps.append(self.plan())
        return steps


def pieces(steps, name):
    """The spans of a prompt that each step fed, with its snapshot's position."""
    found = []
    for step in steps:
        for row in step.rows if step else ():
            if row.request.id == name and row.tokens:
                end = row.seen + len(row.tokens)
                found.append((row.seen, end, row.seen + row.snapshot_length if row.snapshot_slot else None))
    return found


# ------------------------------------------------------------------------------------------------------ cut and packed


def test_a_prompt_is_cut_at_chunks_and_its_end():
    host = Host(step_tokens=150, caching=False)
    host.add("a", 300)
    assert pieces(host.plans(3), "a") == [(0, 128, None), (128, 256, None), (256, 300, None)]


def test_a_second_prompt_takes_what_the_first_leaves_in_whole_chunks():
    host = Host(step_tokens=256, caching=False)
    host.add("a", 150)
    host.add("b", 300)
    steps = host.plans(2)
    assert pieces(steps, "b") == [(0, 64, None), (64, 300, None)]
    assert [row.request.id for row in steps[0].rows] == ["a", "b"]
    assert steps[0].rows[0].draws and not steps[0].rows[1].draws


def test_rows_in_decode_go_first_and_take_room_from_prompts():
    host = Host(step_tokens=130, caching=False)
    for name in "abc":
        host.add(name, 3)
    host.plan()
    host.add("d", 200)
    step = host.plan()
    assert [row.in_decode for row in step.rows] == [True, True, True, False]
    assert (step.decodes, len(step.rows[-1].tokens), step.loops) == (3, 64, 1)  # 127 would have room
    assert not step.decode_only and step.tokens == 67


def test_snapshots_lie_on_the_interval_and_at_the_last_grid_position():
    host = Host(step_tokens=256, interval=128)
    host.add("a", 400)
    assert pieces(host.plans(4), "a") == [(0, 192, 128), (192, 320, 256), (320, 400, 384)]


def test_a_piece_has_one_snapshot_at_most_and_all_points_get_theirs():
    host = Host(step_tokens=2048, interval=64)
    host.add("a", 300)
    assert [point for _, _, point in pieces(host.finish(), "a")] == [64, 128, 192, 256]


def test_the_branching_point_gets_a_snapshot():
    host = Host()
    host.add("a", [5] * 150 + [6] * 90)
    host.finish()
    host.add("b", [5] * 150 + [7] * 90)
    assert pieces(host.finish(), "b") == [(0, 128, 128), (128, 240, 192)]
    host.add("c", [5] * 150 + [8] * 90)
    assert pieces(host.finish(), "c") == [(128, 240, 192)]


def test_without_caching_nothing_is_kept():
    host = Host(caching=False, interval=64)
    host.add("a", 300)
    steps = host.finish()
    assert all(point is None for _, _, point in pieces(steps, "a"))
    assert not any(row.snapshot_slot for step in steps for row in step.rows)
    assert host.scheduler.pages.free == 199 and host.scheduler.slots.free == 29


def test_decoding_takes_one_snapshot_along():
    host = Host(loops=16)
    host.add("a", 60, limit=200)
    steps = [step for step in host.finish() if step.decode_only]
    slots = {row.snapshot_slot for step in steps for row in step.rows} - {0}
    assert len(slots) == 1
    crossing = [step.rows[0].seen for step in steps if step.rows[0].snapshot_slot]
    assert crossing == [60, 124, 188, 252]


# --------------------------------------------------------------------------------------------------------------- units


def test_a_short_prompt_holds_one_page_and_one_slot():
    host = Host(page_size=64, pages=10, slots=5)
    host.add("a", 12)
    host.plan()
    assert host.scheduler.pages.free == 8 and host.scheduler.slots.free == 3
    assert len(host.scheduler.pages.owners()) == len(host.scheduler.slots.owners()) == 1


def test_pages_for_all_loops_are_reserved_first():
    host = Host(loops=40)
    host.add("a", 10, limit=100)
    host.plan()
    step = host.plan()
    (row,) = step.rows
    assert (step.loops, row.ahead, row.seen, len(row.pages)) == (40, 40, 10, 4)


def test_fewer_loops_where_pages_are_short():
    host = Host(loops=40, pages=6, rows=2)  # five pages: two each, and one to grow
    host.add("a", 20, limit=50)
    host.add("b", 20, limit=50)
    host.plan()
    step = host.plan()
    assert step.loops == 1 and [row.ahead for row in step.rows] == [1, 1]
    assert host.scheduler.preemptions == 0


@pytest.mark.parametrize("run_ahead", [False, True])
def test_nothing_is_planned_past_the_limit(run_ahead, monkeypatch):
    host, steps = Host(loops=7, run_ahead=run_ahead), []
    submit = host.device.submit
    monkeypatch.setattr(host.device, "submit", lambda step: steps.append(step) or submit(step))
    host.add("a", 10, limit=16)
    while host.engine.unfinished:
        host.engine.step()
    assert [step.rows[0].ahead for step in steps] == [0, 7, 7, 1]


def test_a_limit_of_one_token_never_decodes():
    host = Host()
    host.add("a", 10, limit=1)
    assert [step.decodes for step in host.finish()] == [0]


def test_a_stop_string_makes_the_whole_batch_go_token_by_token():
    host = Host(loops=8)
    host.add("a", 10, limit=60)
    host.plan()
    assert host.plan().loops == 8
    host.add("b", 10, limit=5, stop="x")
    host.plan()
    steps = [host.plan() for _ in range(4)]
    assert [step.loops for step in steps] == [1] * 4
    assert host.plan().loops == 8  # b is over


def test_a_prompt_on_its_way_makes_the_batch_go_token_by_token():
    host = Host(loops=8, step_tokens=72)
    host.add("a", 10, limit=60)
    host.plan()
    host.add("b", 200)
    assert [host.plan().loops for _ in range(5)] == [1, 1, 1, 1, 8]


# ----------------------------------------------------------------------------------------------------------- admission


def test_the_urgent_go_first_but_do_not_throw_others_out():
    host = Host(rows=1)
    host.add("a", 10, limit=4)
    host.plan()
    host.add("b", 10, limit=4)
    host.add("c", 10, limit=4, priority=-5)
    order = list(dict.fromkeys(row.request.id for step in host.finish() for row in step.rows))
    assert order == ["a", "c", "b"] and host.scheduler.preemptions == 0


def test_what_blocks_the_first_in_line_is_counted():
    rows, slots, pages = Host(rows=1), Host(rows=2, slots=2), Host(rows=2, pages=4)
    for host in (rows, slots, pages):
        host.add("a", 30, limit=10)
        host.add("b", 30, limit=10)
        host.plan()
        assert len(host.scheduler.running) == 1 and len(host.scheduler.waiting) == 1
    assert [dict(host.scheduler.blocked) for host in (rows, slots, pages)] == [{"rows": 1}, {"slots": 1}, {"pages": 1}]
    for host in (rows, slots, pages):
        host.finish()
        check_empty(host.engine)


def test_nobody_smaller_slips_past_the_first_in_line():
    host = Host(pages=9, rows=3)
    host.add("a", 60, limit=4)
    host.add("large", 100, limit=4)
    host.add("small", 5, limit=4)
    host.plan()
    assert [entry.id for entry in host.scheduler.running] == ["a"]


def test_the_line_is_bounded():
    host = Host(waiting=2)
    for name in "ab":
        host.add(name, 10)
    with pytest.raises(QueueFull, match="max_waiting=2"):
        host.add("c", 10)
    host.plan()
    host.add("c", 10)


def test_an_id_in_use_and_a_request_that_no_pool_holds_are_refused():
    host = Host(pages=5)
    host.add("a", 10)
    with pytest.raises(ValueError, match="wanted a new request id, got 'a'"):
        host.add("a", 10)
    with pytest.raises(ValueError, match=r"at most 4 pages of 16 tokens, got one of 5: .* set pages=6"):
        host.add("b", 50, limit=16)
    host.add("b", 50, limit=15)  # the last token is never fed
    host.finish()
    host.add("a", 10)


# ---------------------------------------------------------------------------------------------------------- preemption


def test_the_last_in_order_gives_way_and_comes_back():
    host = Host(pages=9, rows=3, loops=1)
    host.add("old", 30, limit=60)
    host.add("urgent", 30, limit=60, priority=-1)
    host.plan()
    while not host.scheduler.preemptions:
        host.plan()
    assert [entry.id for entry in host.scheduler.running] == ["urgent"]
    assert [entry.id for entry in (host.scheduler.waiting.first(),)] == ["old"]
    drawn = list(host.entry("old").drawn)
    assert drawn and host.entry("old").row == host.entry("old").slot == 0
    rows = [row for step in host.finish() for row in step.rows if row.request.id == "old" and row.fresh]
    assert len(rows) == 1 and rows[0].placed == tuple(drawn)
    check_empty(host.engine)


def test_abort_gives_everything_back_wherever_the_request_is():
    host = Host(rows=1)
    for name in "ab":
        host.add(name, 200, limit=30)
    host.plan()
    step = host.scheduler.schedule()
    assert host.scheduler.abort("b") and not host.scheduler.abort("b") and not host.scheduler.abort("nobody")
    assert host.scheduler.abort("a")
    assert host.scheduler.unfinished, "its step is still on the device"
    assert host.scheduler.commit(step, host.device.collect(host.device.submit(step))) == []
    assert not host.scheduler.unfinished
    check_empty(host.engine)


def test_scoring_takes_free_units_and_gives_them_back():
    host = Host(pages=7, slots=3, rows=1)
    assert host.engine.score(range(96)).shape[0] == 96
    with pytest.raises(ValueError, match="wanted room for 97 tokens"):
        host.engine.score(range(97))
    check_empty(host.engine)
