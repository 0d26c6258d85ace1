"""A device that runs out of memory once: all that runs starts again and nobody notices; twice in a row: all is over."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.errors import JaxRuntimeError

from hybrid_jax.request import SamplingParams, make_request
from tests.hybrid_jax.oracle_device import Setup, answer, make_engine


class Full:
    """An oracle that says that it is full at some of its calls, counted from 0."""

    def __init__(self, device, calls, words):
        self._device, self._calls, self._words, self._count = device, set(calls), words, 0

    def __getattr__(self, name):
        return getattr(self._device, name)

    def submit(self, step):
        self._call()
        return self._device.submit(step)

    def collect(self, ticket):
        self._call()
        return self._device.collect(ticket)

    def _call(self):
        self._count += 1
        if self._count - 1 in self._calls:
            raise JaxRuntimeError(self._words)


def make_full(calls, words="RESOURCE_EXHAUSTED: out of memory", **sizes):
    engine, device = make_engine(Setup(**sizes))
    engine._device = Full(device, calls, words)
    return engine


def requests(count, lengths):
    params = [SamplingParams(max_tokens=3 + 5 * index, ignore_eos=True) for index in range(count)]
    return [make_request(f"r{i}", [i] * lengths[i], params[i], 512) for i in range(count)]


def run(engine, aborted=()):
    """The tokens of each request and why it ended."""
    tokens, reasons = {}, {}
    steps = 0
    while engine.unfinished:
        for progress in engine.step():
            tokens[progress.request_id] = tokens.get(progress.request_id, ()) + progress.token_ids
            reasons[progress.request_id] = progress.finish_reason
        steps += 1
        if steps == 3:
            for name in aborted:
                engine.abort(name)
    return {name: (tokens[name], reasons[name]) for name in tokens}


@settings(max_examples=60, deadline=None)
@given(
    calls=st.sets(st.integers(0, 40).map(lambda call: call * 7), max_size=4),
    lengths=st.lists(st.integers(1, 200), min_size=6, max_size=6),
    run_ahead=st.booleans(),
    caching=st.booleans(),
)
def test_a_full_device_changes_no_answer(calls, lengths, run_ahead, caching):
    engine = make_full(calls, run_ahead=run_ahead, caching=caching, pages=65)
    asked = requests(6, lengths)
    for request in asked:
        engine.add(request)
    assert run(engine) == {request.id: answer(request) for request in asked}
    stats = engine.stats()
    assert stats.pages.used == stats.slots.used == stats.running == stats.waiting == 0


@pytest.mark.parametrize("call", range(2, 12))
def test_a_request_that_was_aborted_meanwhile_does_not_come_back(call):
    engine = make_full({call}, loops=1)
    asked = requests(4, [20, 40, 60, 80])
    for request in asked:
        engine.add(request)
    found = run(engine, aborted=("r2", "r3"))
    assert {name: found[name] for name in ("r0", "r1")} == {one.id: answer(one) for one in asked[:2]}
    stats = engine.stats()
    assert stats.pages.used == stats.slots.used == 0
    engine.add(asked[2])  # its id is free
    assert run(engine)["r2"] == answer(asked[2])


@pytest.mark.parametrize(
    ("calls", "words"), [({0, 1}, "RESOURCE_EXHAUSTED: out of memory"), ({0}, "INTERNAL: a kernel failed")]
)
def test_twice_without_a_step_between_and_any_other_error_drop_everything(calls, words):
    engine = make_full(calls, words)
    for request in requests(2, [5, 5]):
        engine.add(request)
    with pytest.raises(JaxRuntimeError):
        run(engine)
    assert not engine.unfinished and engine.stats().pages.used == 0
