"""Law 4 on real models in float32: whatever runs beside, before or between, a request gets the tokens of a lone run.

One model of each linear kind. All runs of a model share one engine, whose limits are changed on the way, so that every
law is about the same compiled programs; the log-probabilities of the 20 likeliest tokens are witnesses of the logits.
They are equal bit for bit where a request meets the same shapes, and within `NEAR` where it does not.
"""

import contextlib
from dataclasses import dataclass, replace

import numpy as np
import pytest

from hybrid_jax import LLM, SamplingParams
from tests.models.reference import FOLDER

KINDS = {
    "gdn": "qwen3_5",
    "lightning": "ling2_5",
    "kda": "kimi_linear",
    "mamba2": "nemotron_h",
    "short_conv": "lfm2",
}
FAST = "gdn"
NEAR = 1e-5  # of the largest of a token's log-probabilities (6 to 10): other shapes add up in another order
ROWS, VOCABULARY = 4, 256


def load(name, **sizes):
    given = {"max_model_len": 256, "max_num_seqs": ROWS, "max_num_batched_tokens": 192, "snapshot_interval": 64}
    given |= {"page_size": 64, "pages": 41, "slots": 17, "decode_steps": 16, **sizes}
    return LLM(FOLDER / name, "float32", **given)


@pytest.fixture(scope="module", params=[FAST, *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != FAST)])
def llm(request):
    return load(KINDS[request.param])


@pytest.fixture(scope="module")
def lone(llm):
    """Each request alone and fresh."""
    return [fresh(llm, [one])[0] for one in requests()]


# ------------------------------------------------------------------------------------------------------- requests, runs


@dataclass(frozen=True)
class Ask:
    prompt: tuple[int, ...]
    params: SamplingParams


def make_prompt(length, seed):
    return tuple(np.random.default_rng(seed).integers(3, VOCABULARY, length).tolist())


def requests():
    """Prompts of lengths around the chunk; greedy, seeded, shaped, stopping."""
    more = {"logprobs": 20, "ignore_eos": True}
    return [
        Ask(make_prompt(1, 0), SamplingParams(temperature=0, max_tokens=20, **more)),
        Ask(make_prompt(63, 1), SamplingParams(seed=1, max_tokens=30, **more)),
        Ask(make_prompt(64, 2), SamplingParams(seed=2, max_tokens=70, top_k=20, top_p=0.9, **more)),
        Ask(make_prompt(65, 3), SamplingParams(temperature=0, max_tokens=30, repetition_penalty=1.4, **more)),
        Ask(
            make_prompt(130, 4),
            SamplingParams(seed=4, max_tokens=25, presence_penalty=1.0, frequency_penalty=0.7, **more),
        ),
        Ask(make_prompt(150, 5), SamplingParams(seed=5, max_tokens=20, allowed_token_ids=range(9, 90), **more)),
        Ask(make_prompt(70, 6), SamplingParams(temperature=0, max_tokens=20, logit_bias={7: 3.0, 8: -100.0}, **more)),
    ]


def run(llm, asks):
    """The answers, and that everything came back."""
    answers = llm.generate([list(ask.prompt) for ask in asks], [ask.params for ask in asks])
    stats = llm.stats()
    assert (stats.running, stats.waiting, stats.slots.used) == (0, 0, 0)
    assert stats.pages.used == len(held(llm))
    llm._engine.scheduler.cache.check()
    return answers


def fresh(llm, asks):
    llm._engine.scheduler.cache.clear()
    return run(llm, asks)


def held(llm):
    """Pages that a test keeps from the engine."""
    return [page for page, owner in llm._engine.scheduler.pages.owners().items() if owner == "test"]


@contextlib.contextmanager
def limited(llm, **limits):
    """The same engine with other limits of its schedule."""
    scheduler = llm._engine.scheduler
    before = scheduler.limits
    scheduler.limits = replace(before, **limits)
    try:
        yield
    finally:
        scheduler.limits = before


@contextlib.contextmanager
def few_pages(llm, pages):
    """The same engine with so many pages left."""
    scheduler = llm._engine.scheduler
    scheduler.cache.clear()
    while scheduler.pages.free > pages:
        scheduler.pages.take("test")
    try:
        yield
    finally:
        for page in held(llm):
            scheduler.pages.give_back(page, "test")


def assert_same(got, wanted, near=0.0):
    for one, other in zip(got, wanted, strict=True):
        a, b = one.outputs[0], other.outputs[0]
        assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
        for x, y in zip(a.logprobs, b.logprobs, strict=True):
            if near == 0.0:
                assert x == y
            else:
                assert [i for i, _ in x.top[:1]] == [i for i, _ in y.top[:1]]
                found, known = (np.array([z.logprob, *(p for _, p in z.top)]) for z in (x, y))
                np.testing.assert_allclose(found, known, rtol=0, atol=near * np.abs(known).max())


# ------------------------------------------------------------------------------------------------------------ the laws


def test_the_same_request_again_is_the_same_bit_for_bit(llm, lone):
    assert_same([fresh(llm, [ask])[0] for ask in requests()], lone)
    assert all(answer.cached_tokens == 0 for answer in lone)


def test_together_is_as_alone(llm, lone):
    assert_same(fresh(llm, requests()), lone, NEAR)
    assert_same(fresh(llm, requests()[::-1])[::-1], lone, NEAR)


@pytest.mark.parametrize("step_tokens", [64 + ROWS, 128 + ROWS])
def test_a_prompt_in_pieces_is_as_in_one(llm, lone, step_tokens):
    with limited(llm, step_tokens=step_tokens):
        assert_same([fresh(llm, [ask])[0] for ask in requests()], lone, NEAR)
        assert_same(fresh(llm, requests()), lone, NEAR)


def test_cached_is_as_fresh(llm, lone):
    """Every prompt a second time finds all of itself that it can."""
    fresh(llm, requests())
    again = run(llm, requests())
    assert [answer.cached_tokens for answer in again] == [0, 0, 0, 64, 128, 128, 64]
    assert_same(again, lone, NEAR)


def test_a_longer_prompt_is_as_fresh_from_a_shared_prefix_on(llm):
    shared, params = make_prompt(140, 8), SamplingParams(temperature=0, max_tokens=12, logprobs=20, ignore_eos=True)
    asks = [Ask((*shared, *make_prompt(length, 9 + length)), params) for length in (5, 60, 1)]
    wanted = [fresh(llm, [ask])[0] for ask in asks]
    llm._engine.scheduler.cache.clear()
    got = [run(llm, [ask])[0] for ask in asks]
    assert [answer.cached_tokens for answer in got] == [0, 128, 128]
    assert_same(got, wanted, NEAR)


def test_a_chat_goes_on_as_fresh(llm):
    """The next turn starts from the state that decoding left."""
    params = SamplingParams(seed=3, max_tokens=70, logprobs=20, ignore_eos=True)
    first = Ask(make_prompt(50, 10), params)
    answer = fresh(llm, [first])[0].outputs[0].token_ids
    turn = Ask((*first.prompt, *answer, *make_prompt(9, 11)), replace(params, max_tokens=30))
    (cached,) = run(llm, [turn])
    assert cached.cached_tokens == 64
    (whole,) = fresh(llm, [turn])
    assert whole.cached_tokens == 0
    assert_same([cached], [whole], NEAR)


@pytest.mark.parametrize("caching", [True, False])
def test_preempted_is_as_undisturbed(llm, lone, caching):
    before = llm._engine.scheduler.preemptions
    with few_pages(llm, 5), limited(llm, caching=caching):
        assert_same(run(llm, requests()), lone, NEAR)
    assert llm._engine.scheduler.preemptions > before


def test_running_ahead_changes_nothing(llm, lone, monkeypatch):
    monkeypatch.setattr(llm._engine, "_ahead", 1 - llm._engine._ahead)
    assert_same([fresh(llm, [ask])[0] for ask in requests()], lone)
    assert_same(fresh(llm, requests()), lone, NEAR)


@pytest.mark.parametrize("loops", [1, 5])
def test_the_length_of_the_loop_changes_nothing(llm, lone, loops):
    with limited(llm, loops=loops):
        assert_same([fresh(llm, [ask])[0] for ask in requests()], lone)


def test_switching_the_cache_off_changes_nothing(llm, lone):
    with limited(llm, caching=False):
        assert_same([fresh(llm, [ask])[0] for ask in requests()], lone, NEAR)


def test_a_stop_id_leaves_the_state_that_a_chat_goes_on_from(llm, lone):
    """Steps that were planned past the end must not have moved the state or the pages."""
    ask, tokens = requests()[2], lone[2].outputs[0].token_ids
    stop = next(i for i in range(20, 60) if tokens[i] not in tokens[:i])
    params = replace(ask.params, stop_token_ids=[tokens[stop]])
    (stopped,) = fresh(llm, [Ask(ask.prompt, params)])
    assert (stopped.outputs[0].token_ids, stopped.outputs[0].finish_reason) == (tokens[: stop + 1], "stop")
    turn = Ask((*ask.prompt, *stopped.outputs[0].token_ids, *make_prompt(80, 12)), requests()[0].params)
    (cached,) = run(llm, [turn])
    assert_same([cached], fresh(llm, [turn]), NEAR)


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [16, 128])
def test_the_size_of_a_page_changes_nothing(llm, lone, page_size):
    other = load(llm.path.name, page_size=page_size, pages=None, max_num_seqs=1, slots=None)
    assert_same([fresh(other, [ask])[0] for ask in requests()], lone, NEAR)
    assert_same(run(other, requests()), lone, NEAR)


def test_everything_comes_back(llm):
    scheduler = llm._engine.scheduler
    scheduler.cache.clear()
    for pool in (scheduler.pages, scheduler.slots, scheduler.rows):
        assert pool.free == pool.count - 1
