"""What the prefix cache is worth to users, as exact `cached_tokens`; and nothing compiles once the engine is ready."""

import jax
import numpy as np
import pytest

from hybrid_jax import LLM, SamplingParams
from hybrid_jax.request import make_request
from tests.hybrid_jax.oracle_device import Setup, answer, check_balance, check_empty, make_engine
from tests.models.reference import FOLDER

ROOMY = Setup(pages=400, slots=40, rows=4, page_size=64, loops=16, step_tokens=256)
GRID = 64


class Service:
    """An engine on the oracle, which checks every token, and its users."""

    def __init__(self, **sizes):
        self.engine, self.device = make_engine(Setup(**{**vars(ROOMY), **sizes}))
        self.served = 0

    def add(self, prompt, limit=8, salt=""):
        self.served += 1
        params = SamplingParams(max_tokens=limit, ignore_eos=True, seed=0)
        request = make_request(str(self.served), prompt, params, 10_000, cache_salt=salt)
        self.engine.add(request)
        return request

    def serve(self, prompt, limit=8, salt=""):
        """Run a request to its end; how many tokens of the prompt it found, and its answer."""
        request, tokens = self.add(prompt, limit, salt), ()
        while self.engine.unfinished:
            for progress in self.engine.step():
                tokens += progress.token_ids
                cached = progress.cached_tokens
            check_balance(self.engine)
        assert tokens == answer(request)[0]
        return cached, tokens

    def hit(self, prompt, limit=8, salt=""):
        return self.serve(prompt, limit, salt)[0]


@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_of_three_requests_that_share_257_tokens_the_second_hits_256(page_size):
    service, shared = Service(interval=128, page_size=page_size), [5] * 257
    assert [service.hit(shared + [last] * 90) for last in (6, 7, 8)] == [0, 256, 256]


def test_without_an_interval_the_second_leaves_the_snapshot_for_the_third():
    service, shared = Service(), [5] * 257
    assert [service.hit(shared + [last] * 90) for last in (6, 7, 8)] == [0, 0, 256]


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("question, limit, step", [(40, 70, 16), (33, 31, 1), (7, 90, 16), (64, 65, 4)])
def test_a_chat_hits_its_history_at_every_turn(question, limit, step, run_ahead):
    """As far as a snapshot can be: the last grid position that the turn before fed a token past, or decoded up to."""
    service, history, expected = Service(loops=step, run_ahead=run_ahead), [], 0
    for turn in range(20):
        history = [*history, *range(100 * turn, 100 * turn + question)]
        cached, tokens = service.serve(history, limit)
        assert cached == expected, turn
        prompt, fed = len(history), len(history) + len(tokens) - 1
        decoded = fed // GRID * GRID if fed // GRID > prompt // GRID else 0
        expected = max((prompt - 1) // GRID * GRID, decoded)
        history = [*history, *tokens]
    assert service.engine.scheduler.cache.statistics.hits >= 18
    check_empty(service.engine)


@pytest.mark.parametrize("length, hit", [(12, 0), (63, 0), (64, 0), (65, 64), (128, 64), (129, 128)])
def test_a_prompt_hits_itself_up_to_the_grid(length, hit):
    service = Service(page_size=16)
    assert [service.hit([5] * length, limit=1) for _ in range(3)] == [0, hit, hit]


@pytest.mark.parametrize("length, hit", [(12, 0), (16, 0), (17, 16), (63, 48), (65, 64)])
def test_without_states_a_prompt_hits_itself_up_to_the_page(length, hit):
    service = Service(page_size=16, keeps_states=False)
    assert [service.hit([5] * length, limit=1) for _ in range(2)] == [0, hit]


def test_without_pages_the_states_alone_are_found():
    service = Service(keeps_pages=False)
    assert [service.hit([5] * 200, limit=1) for _ in range(2)] == [0, 192]


def test_a_larger_page_makes_the_grid():
    service = Service(page_size=128)
    assert [service.hit([5] * 200, limit=1) for _ in range(2)] == [0, 128]


def test_salts_share_nothing():
    service, prompt = Service(), [5] * 200
    assert [service.hit(prompt, salt=salt) for salt in ("a", "b", "", "a", "")] == [0, 0, 0, 192, 192]


def test_switched_off_nothing_is_found():
    service = Service(caching=False)
    assert [service.hit([5] * 300) for _ in range(2)] == [0, 0]


def test_requests_that_start_together_find_nothing_of_each_other():
    service = Service(rows=2)
    first, second = (service.add([5] * 200) for _ in range(2))
    found = {}
    while service.engine.unfinished:
        for progress in service.engine.step():
            found[progress.request_id] = progress.cached_tokens
        check_balance(service.engine)
    assert found == {first.id: 0, second.id: 0}
    assert service.hit([5] * 200) == 192


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_an_abort_in_the_middle_of_a_prompt_keeps_what_was_computed(steps, run_ahead):
    service = Service(interval=128, step_tokens=128 + 4, run_ahead=run_ahead)
    prompt = list(range(500))
    request = service.add(prompt)
    for _ in range(steps):
        service.engine.step()
    service.engine.abort(request.id)
    while service.engine.unfinished:
        assert service.engine.step() == []
        check_balance(service.engine)
    assert service.hit(prompt) == min(128 * steps, 448)
    check_empty(service.engine)


def test_cached_tokens_are_those_of_the_first_start():
    """A preempted request finds its own beginning when it starts again; the user's prompt was not cached."""
    service = Service(pages=12, page_size=16, rows=2, loops=1)
    first, second = service.add([5] * 70, limit=60), service.add([6] * 70, limit=60)
    found = {}
    while service.engine.unfinished:
        for progress in service.engine.step():
            found[progress.request_id] = progress.cached_tokens
    assert service.engine.scheduler.preemptions > 0
    assert found == {first.id: 0, second.id: 0}


# ------------------------------------------------------------------------------------------ nothing compiles when ready


@pytest.fixture(scope="module")
def ready():
    """A small engine that says that it is ready, and what JAX itself compiled since."""
    llm = LLM(FOLDER / "qwen3_5", "float32", max_model_len=192, max_num_seqs=2, max_num_batched_tokens=128)
    llm.get_ready()
    compiled = []

    def note(event, duration, **more):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    return llm, compiled


def test_nothing_compiles_after_ready(ready):
    llm, compiled = ready
    assert llm.stats().compilations == len(llm._runner.ladders.all()) == 4
    shapes = [
        SamplingParams(temperature=0, max_tokens=40),
        SamplingParams(seed=3, max_tokens=20, top_k=9, top_p=0.9, logprobs=20),
        SamplingParams(seed=4, max_tokens=30, repetition_penalty=1.3, presence_penalty=0.5, logit_bias={3: 2.0}),
        SamplingParams(temperature=0, max_tokens=9, allowed_token_ids=[4, 5, 6], min_tokens=3, stop_token_ids=[5]),
        SamplingParams(seed=5, max_tokens=1),
    ]
    for lengths in ([1], [150, 3], [64, 65, 12], [5, 130, 70, 1, 100]):
        llm.generate([[7, *range(length - 1)] for length in lengths], shapes[: len(lengths)])
    assert llm.stats().compiled_after_ready == 0
    assert llm.stats().cache.hits > 0
    assert compiled == []
    jax.jit(lambda x: 3 * x)(np.ones(17, np.float32))
    assert len(compiled) == 1, "the witness must see a compilation"


def test_a_compilation_after_ready_is_counted(ready):
    llm, _ = ready
    before = llm.stats()
    del llm._runner._programs[next(iter(llm._runner._programs))]
    for lengths in ([3], [3, 3], [80, 80]):
        llm.generate([[9] * length for length in lengths], SamplingParams(max_tokens=3, ignore_eos=True))
    after = llm.stats()
    assert (after.compilations - before.compilations, after.compiled_after_ready) == (1, 1)
