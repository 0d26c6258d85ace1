"""Laws of the engine on a GPU with the kernels it chooses there: real widths in bfloat16, a few layers, random weights.

The laws over every way to run a request are in `test_laws_of_the_engine`, in float32, for which XLA computes. Here the
shapes of all runs are the same, so that a request's tokens must not change in a single bit of any logit's order.
"""

from pathlib import Path

import numpy as np
import pytest

from hybrid_jax.bench.subject import open_subject
from hybrid_jax.bench.throughput import Bench
from hybrid_jax.bench.traffic import Arrival
from hybrid_jax.config import EngineConfig
from hybrid_jax.request import SamplingParams, make_request

pytestmark = pytest.mark.gpu
CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = {
    "Qwen3.5-4B": (4, {"gdn", "gqa"}),
    "Ring-mini-linear-2.0": (5, {"lightning", "gqa"}),
    "Kimi-Linear-48B-A3B": (4, {"kda", "mla"}),
    "Nemotron-3-Nano-30B-A3B-BF16": (6, {"mamba2", "gqa"}),
}
PROMPT, ANSWER, ROWS = 100, 40, 4


@pytest.fixture(scope="module", params=sorted(MODELS))
def bench(request):
    layers, kinds = MODELS[request.param]
    subject = open_subject(str(CONFIGS / f"{request.param}.json"), "bfloat16", "auto", layers)
    assert subject.backends == dict.fromkeys(kinds, "gpu")
    sizes = {"max_model_len": 256, "max_num_seqs": ROWS, "max_num_batched_tokens": 512, "pages": 33, "slots": 17}
    return Bench(subject, EngineConfig(decode_steps=8, **sizes))


def tokens(bench, order, temperature=0.0):
    """The tokens of requests with these numbers, which come at once in this order; a number stands for a prompt."""

    def arrival(number):
        prompt = np.random.default_rng(number).integers(3, bench.subject.vocabulary, PROMPT).tolist()
        params = SamplingParams(temperature=temperature, seed=number, max_tokens=ANSWER, ignore_eos=True)
        return Arrival(make_request(str(number), prompt, params, 256), 0.0)

    return bench.continuous([arrival(number) for number in order]).tokens


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_neighbours_and_places_change_no_token(bench, temperature):
    first, other = tokens(bench, [0, 1, 2, 3], temperature), tokens(bench, [5, 3, 4, 0], temperature)
    assert len(set(map(tuple, [*first.values(), *other.values()]))) == 6, "equal answers prove nothing"
    assert first["0"] == other["0"] and first["3"] == other["3"] and len(first["0"]) == ANSWER


def test_the_same_traffic_gives_the_same_tokens_again(bench):
    assert tokens(bench, [0, 1, 2, 3]) == tokens(bench, [0, 1, 2, 3])


def test_a_loop_that_ends_early_leaves_what_goes_on_alone(bench):
    """Seven requests in four rows: rows end and are given to others while their neighbours run."""
    crowd, again = tokens(bench, range(7)), tokens(bench, range(7))
    assert crowd == again and all(len(made) == ANSWER for made in crowd.values())
