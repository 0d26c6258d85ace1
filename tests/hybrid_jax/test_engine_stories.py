"""Single stories of the engine on the oracle: failures, broken devices, priorities, what is held twice."""

import sys
from pathlib import Path

import pytest

import hybrid_jax
from hybrid_jax.entry import Entry
from hybrid_jax.prefix_cache import PrefixCache
from hybrid_jax.request import SamplingParams, make_request
from tests.hybrid_jax.oracle_device import MixUp, Setup, answer, check_balance, check_empty, make_engine


def ask(engine, name, prompt, limit, **more):
    params = SamplingParams(max_tokens=limit, ignore_eos=True, seed=0)
    engine.add(make_request(name, prompt, params, 1000, **more))
    return engine.scheduler._entries[name].request


def run(engine):
    """Step to the end; the tokens and the reasons of all."""
    heard, reasons, steps = {}, {}, 0
    while engine.unfinished:
        for progress in engine.step():
            heard[progress.request_id] = heard.get(progress.request_id, ()) + progress.token_ids
            if progress.finish_reason:
                reasons[progress.request_id] = progress.finish_reason
        check_balance(engine)
        steps += 1
        assert steps < 1000, "the engine does not come to an end"
    return heard, reasons


def test_the_last_one_that_runs_gives_back_what_it_holds_twice_and_starts_again():
    """Two compute the same prompt at once; the second then holds its own pages, and the first's in the cache."""
    setup = Setup(pages=12, slots=4, rows=2, page_size=16, keeps_states=False)
    engine, _ = make_engine(setup)
    prompt = list(range(80))
    first, second = ask(engine, "first", prompt, 4), ask(engine, "second", prompt, 96)
    heard, _ = run(engine)
    assert (heard["first"], heard["second"]) == (answer(first)[0], answer(second)[0])
    assert engine.scheduler.preemptions == 1
    check_empty(engine)


def ask_for_a_slot_beside_a_hit():
    """One request hits the only snapshot, another comes along and would leave one; there is no slot for both."""
    engine, _ = make_engine(Setup(slots=4, rows=2, step_tokens=256))
    ask(engine, "before", list(range(70)), 1)
    run(engine)
    assert engine.scheduler.cache.evictable_slots == 1
    hitting, leaving = ask(engine, "hits", [*range(64), 1, 2, 3], 4), ask(engine, "leaves", [5] * 130, 4)
    heard, _ = run(engine)
    assert engine.scheduler.cache.statistics.hits == 1
    return heard == {"hits": answer(hitting)[0], "leaves": answer(leaving)[0]}


def test_a_snapshot_that_is_about_to_be_read_is_not_given_to_another(monkeypatch):
    assert ask_for_a_slot_beside_a_hit()
    whole = PrefixCache.open

    def unlocked(self, tokens, salt, owner):
        lease, hit = whole(self, tokens, salt, owner)
        self.started(lease)
        return lease, hit

    monkeypatch.setattr(PrefixCache, "open", unlocked)
    with pytest.raises(AssertionError, match="read"):
        ask_for_a_slot_beside_a_hit()


@pytest.mark.parametrize("steps", range(12))
@pytest.mark.parametrize("run_ahead", [False, True])
def test_a_broken_device_loses_its_requests_and_no_units(steps, run_ahead, monkeypatch):
    engine, device = make_engine(Setup(interval=64, run_ahead=run_ahead, slots=12))
    for name in "abc":
        ask(engine, name, list(range(300)), 100)
    for _ in range(steps):
        engine.step()
    monkeypatch.setattr(device, "collect", lambda ticket: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        while True:
            engine.step()
    assert device.resets == 1
    check_balance(engine)
    check_empty(engine)
    monkeypatch.undo()
    again = ask(engine, "a", list(range(300)), 30)
    assert run(engine)[0]["a"] == answer(again)[0]


HOST_WING = {str(Path(hybrid_jax.__path__[0], f"{name}.py")) for name in ("scheduler", "prefix_cache", "prefix_tree")}


def interrupt_after(lines):
    """Have the host's plan interrupted, as by Ctrl-C, before it runs its `lines`th line from now on."""
    left = lines

    def trace_line(frame, event, _):
        nonlocal left
        left -= event == "line"
        if not left:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace_line

    sys.settrace(lambda frame, *_: trace_line if frame.f_code.co_filename in HOST_WING else None)


@pytest.mark.parametrize("lines", range(5, 9000, 101))
def test_an_interruption_anywhere_in_the_plan_loses_its_requests_and_no_units(lines):
    engine, device = make_engine(Setup(interval=64, pages=30, rows=3))
    for name in "abcd":
        ask(engine, name, list(range(150)), 60)
    tracer = sys.gettrace()
    with pytest.raises(KeyboardInterrupt):
        interrupt_after(lines)
        try:
            while True:
                engine.step()
        finally:
            sys.settrace(tracer)
    assert device.resets == 1
    check_balance(engine)
    again = ask(engine, "a", list(range(150)), 30)
    assert run(engine)[0]["a"] == answer(again)[0]
    check_empty(engine)


def test_nothing_is_cached_of_a_request_from_its_first_failure_on():
    """It fails in the first piece of its prompt, while the next piece is in flight."""
    engine, device = make_engine(Setup(step_tokens=68, interval=64, slots=12))
    device.fails["bad"] = 70
    ask(engine, "bad", list(range(300)), 10)
    assert run(engine)[1] == {"bad": "error"}
    twin = ask(engine, "twin", list(range(300)), 10)
    assert run(engine) == ({"twin": answer(twin)[0]}, {"twin": "length"})
    check_empty(engine)


@pytest.mark.parametrize("fails_after", range(65, 128, 6))
def test_a_request_that_was_taken_back_and_then_fails_leaves_no_wrong_snapshot(fails_after):
    """The device overwrote the snapshot that decoding takes along before it failed, and the user was gone by then."""
    engine, device = make_engine(Setup(loops=64, slots=12, pages=65))
    request = make_request("bad", [7] * 30, SamplingParams(max_tokens=200, ignore_eos=True, seed=0), 1000)
    device.fails["bad"] = 30 + fails_after
    engine.add(request)
    while not engine.scheduler._entries["bad"].carried_at:
        engine.step()
    engine.abort("bad")
    run(engine)
    known = (*request.prompt_token_ids, *answer(request, device.fails["bad"])[0])
    twin = ask(engine, "twin", [*known, 5], 10)
    assert run(engine)[0] == {"twin": answer(twin)[0]}


def test_a_priority_beyond_the_running_ones_waits_for_room_but_not_for_the_line():
    engine, _ = make_engine(Setup(rows=1, slots=3, loops=1))
    for name in "abc":
        ask(engine, name, [1, 2, 3], 5)
    ask(engine, "urgent", [1, 2, 3], 5, priority=-1)
    order = []
    while engine.unfinished:
        order += [progress.request_id for progress in engine.step() if progress.finish_reason]
    assert order == ["urgent", "a", "b", "c"]


def test_the_newest_token_counted_as_fed_is_noticed(monkeypatch):
    """It is not in its page yet, which shows where it is the last one of the page and the chat goes on."""

    def chat():
        engine, _ = make_engine(Setup(keeps_states=False))
        first = ask(engine, "first", [1] * 10, 22)
        run(engine)
        ask(engine, "second", [1] * 10 + [*answer(first)[0], 5], 3)
        run(engine)

    chat()
    counted = property(lambda self: len(self.request.prompt_token_ids) + len(self.drawn))
    monkeypatch.setattr(Entry, "fed_for_sure", counted)
    with pytest.raises(MixUp, match="page of second at 31: wanted .*, got None"):
        chat()
