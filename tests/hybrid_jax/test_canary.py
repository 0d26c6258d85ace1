"""The canary: silent while the schedule is right, and heard at the first read of a page or state of somebody else."""

import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import LLM, SamplingParams
from hybrid_jax.canary import Beliefs, empty_stamps, mismatched, stamped
from tests.models.reference import Fixture
from tests.ragged import make_batch

PAGE = 4
OWNER, OTHER = 7, 8


def believe(owner, state_owner, page_owners):
    return Beliefs(np.array([owner]), np.array([state_owner]), np.array([page_owners]))


def after_prefill():
    """Stamps after a row of `OWNER` has read 6 tokens into pages 1 and 2 and slot 3."""
    batch = make_batch([6], [0], read=[3], write=[3], pages=[[1, 2]], content="prefill")
    return stamped(empty_stamps(6, 6), batch, believe(OWNER, OWNER, [OWNER, OWNER]), PAGE)


def met(stamps, beliefs, seen=6, slot=3, pages=(1, 2)):
    batch = make_batch([1], [seen], read=[slot], write=[slot], pages=[list(pages)], decodes=1, content="decode")
    return mismatched(stamps, batch, beliefs, PAGE).tolist()


def test_what_a_row_wrote_itself_is_familiar():
    assert met(after_prefill(), believe(OWNER, OWNER, [OWNER, OWNER])) == [False]


@pytest.mark.parametrize(
    "strange",
    [
        {"seen": 5},  # a state of another length
        {"slot": 2},  # a slot that nobody wrote
        {"pages": (2, 1)},  # pages in another order
        {"pages": (1, 4)},  # a page that nobody wrote
    ],
)
def test_a_wrong_place_is_strange(strange):
    assert met(after_prefill(), believe(OWNER, OWNER, [OWNER, OWNER]), **strange) == [True]


@pytest.mark.parametrize("unit", ["slot", "page"])
def test_what_somebody_else_wrote_over_is_strange(unit):
    slots, pages = ([3], [[4]]) if unit == "slot" else ([5], [[2]])
    thief = make_batch([4], [0], read=slots, write=slots, pages=pages, content="prefill")
    stamps = stamped(after_prefill(), thief, believe(OTHER, OTHER, [OTHER]), PAGE)
    assert met(stamps, believe(OWNER, OWNER, [OWNER, OWNER])) == [True]


def test_a_new_request_reads_nothing_and_cannot_be_surprised():
    batch = make_batch([5], [0], read=[3], write=[3], pages=[[1, 2]], content="prefill")
    assert mismatched(after_prefill(), batch, believe(OTHER, OTHER, [OTHER, OTHER]), PAGE).tolist() == [False]


def test_null_units_are_never_stamped():
    stamps = after_prefill()
    assert jnp.all(stamps.slots[0] == 0) and jnp.all(stamps.pages[0] == 0)


@pytest.fixture(scope="module")
def llm():
    """A model of both kinds with pools so small that pages and slots change hands all the time."""
    path = Fixture("qwen3_5").path
    sizes = {"max_model_len": 128, "max_num_seqs": 2, "max_num_batched_tokens": 128, "pages": 12, "slots": 5}
    return LLM(path, "float32", page_size=16, decode_steps=4, canary=True, **sizes)


def run(llm, seed):
    vocabulary = llm.model_config.vocabulary
    prompts = [np.random.default_rng(seed + row % 3).integers(3, vocabulary, 70 + row).tolist() for row in range(6)]
    return [out.outputs[0].token_ids for out in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=50))]


@pytest.mark.slow
def test_it_is_silent_while_the_engine_is_right(llm):
    first = run(llm, 0)
    assert run(llm, 0) == first
    stats = llm.stats()
    assert stats.cache.hits > 0 and stats.cache.evicted_pages > 0
    assert (stats.pages.used, stats.slots.used) == (0, 0)


class WrittenByOther(dict):
    def __getitem__(self, unit):
        return OTHER


@pytest.mark.slow
def test_it_is_heard_when_a_snapshot_is_published_under_a_wrong_name(llm, monkeypatch):
    """The cache gives out a state of another prompt: no index is out of range, and nothing else would notice."""
    run(llm, 0)
    monkeypatch.setattr(llm._engine.scheduler, "_slot_writers", WrittenByOther())
    with pytest.raises(RuntimeError, match="canary: wanted pages and states"):
        run(llm, 0)
    monkeypatch.undo()
    run(llm, 50)  # and goes on, with an empty memory
