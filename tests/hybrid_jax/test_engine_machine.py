"""Any series of requests, aborts and steps on tiny pools: every request gets its own tokens, and everything comes back.

The schedule, the cache, the pools and the loop are the real ones; the device is the oracle, which raises at any mix-up.
At the end, the schedule is broken on purpose to see that the oracle and the balance notice.
"""

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hybrid_jax.pool import Pool
from hybrid_jax.prefix_cache import PrefixCache
from hybrid_jax.request import SamplingParams, make_request
from hybrid_jax.scheduler import QueueFull, Scheduler
from tests.hybrid_jax.oracle_device import (
    OracleDevice,
    Setup,
    answer,
    check_balance,
    check_empty,
    make_engine,
)

MAX_MODEL_LEN = 320
BLOCK = 32  # tokens; prompts are made of few blocks, so that many begin alike


@st.composite
def setups(draw):
    """Pools that hold one request of the greatest length, and hardly more; slots for the rows, and hardly more."""
    page_size = draw(st.sampled_from([16, 64, 128]))
    pages, states = draw(st.sampled_from([(True, True), (True, True), (True, False), (False, True)]))
    rows = draw(st.integers(1, 4))
    return Setup(
        pages=-(-MAX_MODEL_LEN // page_size) + 1 + draw(st.integers(0, 8)),
        slots=rows + 1 + draw(st.integers(0, 5)),
        rows=rows,
        page_size=page_size,
        loops=draw(st.sampled_from([1, 4, 16])),
        step_tokens=64 * draw(st.integers(1, 4)) + rows,
        keeps_pages=pages,
        keeps_states=states,
        interval=draw(st.sampled_from([0, 64, 128])),
        waiting=draw(st.sampled_from([3, 64])),
        caching=draw(st.sampled_from([True, True, True, False])),
        run_ahead=draw(st.booleans()),
    )


class EngineMachine(RuleBasedStateMachine):
    """Users who ask, ask on and give up, and an engine that goes step by step."""

    @initialize(setup=setups())
    def start(self, setup):
        self.setup = setup
        self.engine, self.device = make_engine(setup)
        self.requests, self.heard, self.over = {}, {}, {}
        self.numbers = itertools.count()

    # ---------------------------------------------------------------------------------------------------------- rules

    @rule(
        blocks=st.lists(st.integers(1, 3), max_size=6),
        tail=st.integers(1, 70),
        limit=st.integers(1, 150),
        priority=st.sampled_from([0, 0, 0, -1, 5]),
        salt=st.sampled_from(["", "", "", "other"]),
        params=st.sampled_from([{}, {"ignore_eos": True}, {"stop_token_ids": [3, 4, 5]}, {"stop": "x"}]),
        fails=st.sampled_from([None] * 8 + [-1, 0, 5, 20]),
    )
    def ask(self, blocks, tail, limit, priority, salt, params, fails):
        """Some requests fail at a token past the beginning of the prompt that others may have computed for them."""
        prompt = [*(block for block in blocks for _ in range(BLOCK)), *range(10, 10 + tail)]
        fails_at = None if fails is None else len(prompt) + fails
        self.add(next(self.numbers), prompt, limit, priority, salt, params, fails_at)

    @rule(which=st.integers(0, 1000), tail=st.integers(1, 40), limit=st.integers(1, 100))
    def ask_on(self, which, tail, limit):
        """The next turn of a chat: the prompt and the answer of a request, and more."""
        done = [name for name, reason in self.over.items() if reason != "abort"]
        if done:
            before = self.requests[done[which % len(done)]]
            history = [*before.prompt_token_ids, *self.heard[before.id], *range(100, 100 + tail)]
            if len(history) + limit <= MAX_MODEL_LEN:
                self.add(next(self.numbers), history, limit, 0, before.cache_salt, {"ignore_eos": True}, None)

    def add(self, number, prompt, limit, priority, salt, params, fails_at):
        limit = min(limit, MAX_MODEL_LEN - len(prompt))
        params = SamplingParams(max_tokens=limit, min_tokens=number % (limit + 1), seed=0, **params)
        request = make_request(str(number), prompt, params, MAX_MODEL_LEN, priority=priority, cache_salt=salt)
        full = len(self.engine.scheduler.waiting) >= self.setup.waiting
        if full:
            with pytest.raises(QueueFull):
                self.engine.add(request)
            return
        if fails_at is not None:
            self.device.fails[request.id] = fails_at
        self.engine.add(request)
        self.requests[request.id], self.heard[request.id] = request, []

    @rule(which=st.integers(0, 1000))
    def abort(self, which):
        live = [name for name in self.requests if name not in self.over]
        if live:
            name = live[which % len(live)]
            assert self.engine.abort(name)
            assert not self.engine.abort(name)
            self.over[name] = "abort"

    @precondition(lambda self: self.engine.unfinished)
    @rule()
    def step(self):
        for progress in self.engine.step():
            self.hear(progress)

    @precondition(lambda self: self.engine.unfinished)
    @rule(count=st.integers(2, 12))
    def steps(self, count):
        for _ in range(count):
            if self.engine.unfinished:
                self.step()
                self.balanced()

    def hear(self, progress):
        name = progress.request_id
        assert name not in self.over, "an answer goes on after its end"
        request = self.requests[name]
        self.heard[name] += progress.token_ids
        tokens, reason = answer(request, self.device.fails.get(name))
        got = tuple(self.heard[name])
        assert got == tokens[: len(got)]
        assert 0 <= progress.cached_tokens < len(request.prompt_token_ids)
        assert self.setup.caching or progress.cached_tokens == 0
        if progress.finish_reason is not None:
            self.over[name] = progress.finish_reason
            assert (got, progress.finish_reason) == (tokens, reason)

    # ----------------------------------------------------------------------------------------------------- invariants

    @invariant()
    def balanced(self):
        check_balance(self.engine)

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        live = [self.requests[name] for name in self.requests if name not in self.over]
        bound = 20 + 40 * sum(len(r.prompt_token_ids) // 64 + r.token_limit + 1 for r in live)
        steps = 0
        while self.engine.unfinished:
            self.step()
            self.balanced()
            steps += 1
            assert steps < bound, "the engine does not come to an end"
        assert set(self.over) == set(self.requests)
        check_empty(self.engine)


EngineMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestEngineMachine = EngineMachine.TestCase


@pytest.mark.slow
def test_many_more_series():
    run_state_machine_as_test(EngineMachine, settings=settings(max_examples=250, stateful_step_count=60))


# ------------------------------------------------------------------------------- the oracle and the balance do notice


def break_pool(monkeypatch):
    """A unit is given out again although somebody holds it."""

    def take(self, owner):
        if len(self._owners) == 5:
            return next(iter(self._owners))
        if not self._free:
            return None
        unit = self._free.pop()
        self._owners[unit] = owner
        return unit

    monkeypatch.setattr(Pool, "take", take)


def break_position(monkeypatch):
    """A snapshot is published under fewer tokens than it has seen."""
    whole = PrefixCache._attach
    monkeypatch.setattr(
        PrefixCache, "_attach", lambda self, lease, depth, slot: whole(self, lease, max(depth - 4, 4), slot)
    )


def break_page_lock(monkeypatch):
    """The pages that a request has found may be evicted."""
    whole = PrefixCache.open

    def unlocked(self, tokens, salt, owner):
        lease, hit = whole(self, tokens, salt, owner)
        self._tree.release(lease.node)
        lease.node = self._tree.root(salt)
        self._tree.hold(lease.node)
        return lease, hit

    monkeypatch.setattr(PrefixCache, "open", unlocked)


def break_early_release(monkeypatch):
    """What a request holds is given back while a step with it is in flight."""

    def release(self, entry):
        if entry.ended is not None and entry.row:
            self._give_back(entry)
        if entry.ended is not None and not entry.in_flight:
            del self._entries[entry.id]

    monkeypatch.setattr(Scheduler, "_release_if_over", release)


def break_slot_of_the_carried(monkeypatch):
    """The position of the snapshot that decoding takes along is one grid too far."""
    whole = Scheduler._publish_fed

    def publish(self, entry):
        if entry.carried_at > self.cache.grid:
            entry.carried_at -= self.cache.grid
        whole(self, entry)

    monkeypatch.setattr(Scheduler, "_publish_fed", publish)


def break_planned(monkeypatch):
    """A preempted request starts again without what it had drawn."""
    whole = Scheduler._row

    def forgetful(self, entry, *rest):
        row = whole(self, entry, *rest)
        object.__setattr__(row, "placed", ())
        return row

    monkeypatch.setattr(Scheduler, "_row", forgetful)


def break_salt(monkeypatch):
    """All salts share one tree."""
    whole = PrefixCache._matched
    monkeypatch.setattr(PrefixCache, "_matched", lambda self, tokens, salt: whole(self, tokens, ""))


def break_give_back(monkeypatch):
    """A request that is taken back keeps its slot."""
    whole = Pool.give_back

    def leaky(self, unit, owner):
        if not (self.name == "slots" and unit == 2):
            whole(self, unit, owner)

    monkeypatch.setattr(Pool, "give_back", leaky)


def break_ended_rows(monkeypatch):
    """The device goes on with rows that have ended."""
    whole = OracleDevice._run

    def run(self, step):
        for row in step.rows:
            self.rows[row.row].reason = 0
        return whole(self, step)

    monkeypatch.setattr(OracleDevice, "_run", run)


SEEN_AT_ONCE = [
    break_pool,
    break_page_lock,
    break_early_release,
    break_planned,
    break_salt,
    break_give_back,
    break_ended_rows,
]
SEEN_LATER = [break_position, break_slot_of_the_carried]
SLOW = [pytest.param(break_it, marks=pytest.mark.slow) for break_it in SEEN_LATER]


@pytest.mark.parametrize("break_it", SEEN_AT_ONCE + SLOW)
def test_a_fault_is_noticed(break_it, monkeypatch):
    break_it(monkeypatch)
    more = settings(max_examples=600, stateful_step_count=40, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises((AssertionError, ValueError, RuntimeError, KeyError, IndexError)):
        run_state_machine_as_test(EngineMachine, settings=more)
