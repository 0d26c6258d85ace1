"""Law 6, read off the compiled programs: pools are aliased, nothing copies a pool, nothing branches on a kind."""

import re

import jax
import numpy as np
import pytest
from flax import nnx

from hybrid_jax.request import SamplingParams, make_request
from hybrid_jax.routing import route_model
from hybrid_jax.runner import Runner
from hybrid_jax.sampling import pack
from tests.models.reference import Fixture
from tests.ragged import make_batch

PAGES, SLOTS, PAGE = 37, 11, 16  # sizes that nothing else in the program has


@pytest.fixture(scope="module", params=["ling2_5_mtp", "qwen3_5"])
def compiled(request):
    """The compiled decode program of a model with both kinds, its runner, and the number of its pool arrays."""
    model = Fixture(request.param).load()
    runner = Runner(model, route_model(model), PAGES, SLOTS, PAGE, "highest")
    requests = [make_request(str(row), [1], SamplingParams(max_tokens=8, seed=row), 64) for row in range(2)]
    batch = make_batch([1, 1], [1, 1], pages=[[1, 2], [3, 4]], decodes=2, content="decode")
    rows = pack(requests, [1, 1], 2, [0])
    program = runner.compiled_decode(np.zeros(2, np.int32), batch, rows, steps=4)
    pools = sum(len(spec.arrays) for spec in model.specs)
    return program, runner, pools, nnx.split(model)[1]


def test_every_pool_is_aliased(compiled):
    program, _, pools, _ = compiled
    (header,) = re.findall(r"input_output_alias=\{(.*?)\}, entry", program.as_text())
    assert header.count("-alias)") == pools


def test_no_pool_is_copied_in_a_step(compiled):
    """A pool may be laid out anew once before the loop of tokens, never within it."""
    program, _, _, _ = compiled
    text = program.as_text()
    sizes = rf"\[\d+,(?:{PAGES},{PAGE}|{SLOTS}),[\d,]+\]"
    assert re.search(sizes, text), "the pools must be found in the program for this test to mean anything"
    assert not re.findall(rf"= \w+{sizes}\S* copy\(", text)


def test_no_branch_on_a_kind(compiled):
    """The only branches are those of sampling: whether any row draws, masks, or cuts. None is inside a layer."""
    program, _, _, _ = compiled
    branches = re.findall(r"conditional\(.*", program.as_text())
    names = [re.findall(r'op_name="([^"]*)"', branch) for branch in branches]
    assert all(name and "cond" in name[0] for name in names)
    assert len(branches) <= 5, names


def test_arguments_are_the_weights_the_pools_and_a_few_rows(compiled):
    program, _, pools, state = compiled
    arguments = len(jax.tree.leaves(program.in_avals))
    assert arguments == len(jax.tree.leaves(state)) + pools + 1 + 8 + 10


def test_the_loop_stays_on_the_device(compiled):
    program, _, _, _ = compiled
    assert not re.search(r"\b(infeed|outfeed|send|recv)\(", program.as_text())
    assert "callback" not in program.as_text()
