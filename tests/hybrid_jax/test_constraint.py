"""Requests whose tokens the host limits one by one, and the scores of prompts, on a tiny fixture."""

import numpy as np
import pytest

from hybrid_jax import LLM, SamplingParams
from hybrid_jax.request import make_request
from tests.models.reference import FOLDER

WORDS = 8
pytestmark = pytest.mark.slow


def words_of(*ids):
    """A mask of a few words that allows these ids."""
    words = np.zeros(WORDS, np.uint32)
    for one in ids:
        words[one // 32] |= np.uint32(1 << one % 32)
    return words


class Alternating:
    """Odd ids, then even ones, and so on; remembers all that it was told."""

    def __init__(self):
        self.seen = []

    def push(self, token_ids):
        self.seen += token_ids

    def mask(self):
        return words_of(*range((len(self.seen) + 1) % 2, 32 * WORDS, 2))


class Closed(Alternating):
    """Nothing after the second token."""

    def mask(self):
        return words_of(5) if len(self.seen) < 2 else words_of()


@pytest.fixture(scope="module")
def llm():
    return LLM(
        FOLDER / "qwen3_5",
        "float32",
        max_model_len=128,
        max_num_seqs=4,
        page_size=16,
        decode_steps=4,
        pages=14,
        max_num_batched_tokens=128,
    )


def run(llm, *requests):
    """The tokens and the reason of each."""
    found = {request.id: ([], None) for request in requests}
    for request in requests:
        llm.engine.add(request)
    while llm.engine.unfinished:
        for progress in llm.engine.step():
            tokens, _ = found[progress.request_id]
            found[progress.request_id] = ([*tokens, *progress.token_ids], progress.finish_reason)
    return [found[request.id] for request in requests]


def request(name, constraint=None, prompt=(3, 1, 4), **params):
    asked = SamplingParams(**({"temperature": 0, "max_tokens": 12, "ignore_eos": True} | params))
    return make_request(name, prompt, asked, 128, constraint=constraint)


def test_each_token_is_one_that_the_mask_of_its_place_allows(llm):
    limits = [Alternating(), Alternating()]
    drawn = run(llm, request("greedy", limits[0]), request("drawn", limits[1], temperature=1.5, seed=3))
    for (tokens, reason), limit in zip(drawn, limits, strict=True):
        assert reason == "length" and limit.seen == tokens
        assert [token % 2 for token in tokens] == [1, 0] * 6


def test_the_likeliest_allowed_token_is_taken_and_bias_still_counts(llm):
    (tokens, _), (biased, _) = run(
        llm, request("plain", Alternating()), request("biased", Alternating(), logit_bias={7: 100.0, 8: 100.0})
    )
    scores = llm.logits([3, 1, 4, *tokens])[2:-1, : 32 * WORDS]
    for place, (row, token) in enumerate(zip(scores, tokens, strict=True)):
        allowed = np.where(np.arange(len(row)) % 2 == (place + 1) % 2, row, -np.inf)
        assert token == allowed.argmax()
    assert biased == [7, 8] * 6


def test_a_neighbour_does_not_notice(llm):
    (alone,) = run(llm, request("alone", temperature=1.0, seed=9))
    together = run(llm, request("a", Alternating()), request("b", temperature=1.0, seed=9), request("c", Alternating()))
    assert together[1] == alone


def test_a_row_that_was_constrained_is_free_for_the_next_request(llm):
    (before,) = run(llm, request("before"))
    run(llm, *(request(f"c{index}", Alternating()) for index in range(4)))
    assert all(after == before for after in run(llm, *(request(f"after{index}") for index in range(4))))


def test_a_mask_that_allows_nothing_ends_the_request_alone(llm):
    (closed, other) = run(llm, request("closed", Closed()), request("other"))
    assert closed == ([5, 5], "error") and other[1] == "length"


def test_a_preempted_request_goes_on_where_it_was(llm):
    long = {"max_tokens": 60}
    (alone,) = run(llm, request("alone", Alternating(), **long))
    before = llm.stats().preemptions
    limits = [Alternating() for _ in range(4)]
    together = run(llm, *(request(f"r{index}", limit, **long) for index, limit in enumerate(limits)))
    assert llm.stats().preemptions > before, "the pool was meant to be too small for four"
    assert all(one == alone for one in together)


def test_a_constraint_and_a_set_of_tokens_exclude_each_other():
    with pytest.raises(ValueError, match="leave one out"):
        request("both", Alternating(), allowed_token_ids=(1,))


def test_a_prompt_is_scored_as_its_logits_say_whatever_is_cached(llm):
    prompt = [int(token) for token in np.random.default_rng(0).integers(0, 200, 100)]
    run(llm, request("fills the cache", prompt=tuple(prompt), max_tokens=1))
    scores = llm.logits(prompt)
    expected = scores - np.logaddexp.reduce(scores.astype(np.float64), axis=-1, keepdims=True)
    before = llm.stats()
    found = llm.engine.score_prompt(prompt, 3)
    assert [entry.token_id for entry in found] == prompt[1:]
    for place, entry in enumerate(found):
        best = np.argsort(-expected[place], kind="stable")[:3]
        assert entry.logprob == pytest.approx(expected[place, entry.token_id], abs=1e-4)
        assert [token for token, _ in entry.top] == best.tolist()
        assert [value for _, value in entry.top] == pytest.approx(expected[place, best].tolist(), abs=1e-4)
        if entry.token_id in dict(entry.top):
            assert dict(entry.top)[entry.token_id] == entry.logprob  # the same bits
    after = llm.stats()
    assert (after.pages, after.slots) == (before.pages, before.slots)
    assert after.cache == before.cache, "neither looked up nor filled"
    assert llm.engine.score_prompt(prompt[:1], 3) == ()


def test_nothing_compiles_after_ready_for_masks_and_scores():
    llm = LLM(
        FOLDER / "qwen3_5",
        "float32",
        max_model_len=64,
        max_num_seqs=1,
        page_size=16,
        decode_steps=2,
        max_num_batched_tokens=64,
    )
    llm.get_ready(prompt_scores=True)
    run(llm, request("masked", Alternating()))
    for length in (2, 64):
        llm.engine.score_prompt([1] * length, 0)
    assert llm.stats().compiled_after_ready == 0
