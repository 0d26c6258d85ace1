"""One engine shared by several answers: what an interruption, a failure or the garbage collector does to the others.

The engine is the real one on the oracle device, so nothing is loaded and nothing is compiled.
"""

import gc
import itertools
import threading
import time
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest

from hybrid_jax.llm import LLM
from hybrid_jax.programs import DeviceMemory
from hybrid_jax.request import SamplingParams
from hybrid_jax.row_tables import empty_tables, place_row
from hybrid_jax.runner import Runner
from tests.hybrid_jax.oracle_device import Setup, answer, check_balance, check_empty, make_engine


def make_llm(**setup):
    """The Python API without a model."""
    llm = object.__new__(LLM)
    llm._engine, device = make_engine(Setup(**setup))
    llm.tokenizer, llm.max_model_len = None, 400
    llm.model_config = SimpleNamespace(vocabulary=1000)
    llm._answers, llm._ids, llm._left = {}, itertools.count(), deque()
    llm._driving, llm._next, llm._driver = threading.RLock(), threading.RLock(), 0
    return llm, device


def prepare(llm, *prompts, limit=9):
    return llm._prepare([list(p) for p in prompts], SamplingParams(max_tokens=limit, ignore_eos=True, seed=0), 0, "")


def assert_usable(llm):
    check_balance(llm._engine)
    (fresh,) = prepare(llm, [4, 5, 6])
    llm._run([fresh])
    assert tuple(fresh._tokens) == answer(fresh.request)[0]
    check_empty(llm._engine)


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("when", range(1, 4))
def test_an_answer_that_cannot_be_taken_in_leaves_no_hole_in_another(when, run_ahead, monkeypatch):
    llm, _ = make_llm(run_ahead=run_ahead)
    first, second = prepare(llm, [1, 2, 3], [7, 8])
    assert llm._begin(first) and llm._begin(second)
    whole, calls = first.push, itertools.count(1)
    monkeypatch.setattr(first, "push", lambda progress: whole(progress) if next(calls) < when else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        while True:
            llm._advance()
    if second.finish_reason is None:
        with pytest.raises(RuntimeError, match="another request broke the engine"):
            llm._require_alive(second)
    else:
        assert tuple(second._tokens) == answer(second.request)[0]
    assert_usable(llm)


@pytest.mark.parametrize("inside", ["_decode_row", "_take_in", "_prefill_rows", "_publish", "_release_if_over"])
def test_a_stream_that_the_garbage_collector_closes_in_the_middle_of_a_step_is_ended_after_it(inside, monkeypatch):
    llm, _ = make_llm(loops=1)
    (left,) = prepare(llm, [1, 2, 3], limit=50)
    stream = llm._read(left)
    monkeypatch.setattr(left, "take_text", lambda: "text")
    for _ in range(3):
        next(stream)
    cycle = [stream]
    cycle.append(cycle)
    whole = getattr(llm._engine.scheduler, inside)

    def collecting(*arguments):
        gc.collect()
        return whole(*arguments)

    monkeypatch.setattr(llm._engine.scheduler, inside, collecting)
    del stream, cycle
    (other,) = prepare(llm, [7, 8], limit=20)
    llm._run([other])
    assert tuple(other._tokens) == answer(other.request)[0]
    assert not llm._answers and not llm._left and not llm._engine.unfinished
    assert_usable(llm)


def test_logits_that_fail_drop_what_runs_and_no_units(monkeypatch):
    llm, device = make_llm()
    (running,) = prepare(llm, [1, 2, 3], limit=50)
    assert llm._begin(running)
    llm._advance()
    monkeypatch.setattr(device, "score", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llm.logits([1, 2, 3])
    assert device.resets == 1
    with pytest.raises(RuntimeError, match="another request broke the engine"):
        llm._require_alive(running)
    assert_usable(llm)


def test_logits_without_room_disturb_nobody():
    llm, device = make_llm(slots=2, rows=1)
    (running,) = prepare(llm, [1, 2, 3], limit=30)
    assert llm._begin(running)
    llm._advance()
    with pytest.raises(ValueError, match="wanted room for 3 tokens"):
        llm.logits([1, 2, 3])
    while running.finish_reason is None:
        llm._advance()
    assert tuple(running._tokens) == answer(running.request)[0] and device.resets == 0
    llm._end(running)
    assert_usable(llm)


# ----------------------------------------------------------------------------------------------------------- the runner


def make_runner(tables):
    runner = object.__new__(Runner)
    runner.ladders, runner._memory = SimpleNamespace(all=tuple), DeviceMemory({}, tables, None)
    return runner


def test_getting_ready_takes_nothing_from_a_request_that_runs():
    runner = make_runner(place_row(empty_tables(3, 8), 1, np.ones(8, np.float32), np.full(8, 7, np.int32)))
    runner.compile_all()
    assert runner._memory.tables.bias[1].tolist() == [1.0] * 8
    assert runner._memory.tables.tallies[1].tolist() == [7] * 8


def test_memory_that_cannot_be_made_anew_at_once_can_be_made_later():
    runner = make_runner(empty_tables(3, 8))
    runner._allocate = lambda: 1 / 0
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            runner.reset()
    runner._allocate = lambda: DeviceMemory({}, empty_tables(3, 8), None)
    runner.reset()
    assert runner._memory.tables.newest.tolist() == [0, 0, 0]


def test_no_thread_keeps_the_engine_while_others_wait_for_it():
    llm, _ = make_llm()
    turns, all_there = [], threading.Barrier(3)

    def drive(name):
        all_there.wait()
        for _ in range(60):
            with llm._turn():
                turns.append(name)
                time.sleep(0.001)

    threads = [threading.Thread(target=drive, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    contested = turns[: min(len(turns) - 1 - turns[::-1].index(name) for name in range(3))]
    streaks = [len(list(streak)) for _, streak in itertools.groupby(contested)]
    assert len(contested) > 100 and max(streaks) <= 10, streaks
