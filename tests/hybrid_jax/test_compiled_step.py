"""Law 6, read off the compiled programs: memory is aliased, nothing copies a pool, nothing branches on a kind."""

import re

import jax
import pytest
from flax import nnx

from hybrid_jax import runner as runner_module
from hybrid_jax.buckets import Bucket
from hybrid_jax.routing import route_model
from hybrid_jax.runner import Runner, RunnerSizes
from tests.models.reference import Fixture

PAGES, SLOTS, PAGE, ROWS = 37, 11, 16, 6  # sizes that nothing else in the programs has
SIZES = RunnerSizes(PAGES, SLOTS, PAGE, ROWS, row_pages=8, step_tokens=128, loops=4, grid=64, canary=False)
BUCKETS = {
    "decode": Bucket(2, 0, 8),
    "likeliest": Bucket(2, 0, 8, likeliest=True),
    "mixed": Bucket(6, 64, 8),
}
TABLES = 4  # newest, reason, bias, tallies
BATCH, PLAN = 8, 16 + 2  # of the rows: where they are and what they own; how they are sampled, draw and loop


@pytest.fixture(scope="module", params=["ling2_5_mtp", "qwen3_5"])
def runner(request):
    """A runner of a model with both kinds, with its model."""
    model = Fixture(request.param).load()
    return Runner(model, route_model(model), SIZES, [0], "highest"), model


@pytest.fixture(scope="module", params=sorted(BUCKETS))
def compiled(request, runner):
    """The sort of a program, the program, its text, and the model."""
    program = runner[0].compiled(BUCKETS[request.param])
    return request.param, program, program.as_text(), runner[1]


def pool_arrays(model):
    return sum(len(spec.arrays) for spec in model.specs)


def test_every_pool_and_table_is_aliased(compiled):
    _, _, text, model = compiled
    (header,) = re.findall(r"input_output_alias=\{(.*?)\}, entry", text)
    assert header.count("-alias)") == pool_arrays(model) + TABLES


def test_no_pool_is_copied_in_a_step(compiled):
    """A pool may be laid out anew once before the loop of tokens, never within it."""
    sort, _, text, model = compiled
    sizes = rf"\[\d+,(?:{PAGES},{PAGE}|{SLOTS}),[\d,]+\]"
    assert len(set(re.findall(sizes, text))) >= 2, "a program without pools proves nothing"
    inside = text if sort == "mixed" else body_of_the_loop(text)
    copies = re.findall(rf"= \w+{sizes}\S* copy\(.*", inside)
    assert len(copies) <= (pool_arrays(model) if sort == "mixed" else 0), copies


def body_of_the_loop(text):
    """The text without the program's entry: the bodies of loops, and what they call."""
    return text[: text.index("\nENTRY ")]


def test_no_branch_on_a_kind(compiled):
    """The only branches are those of sampling: whether any row draws, is cut, shaped or wants log-probabilities."""
    _, _, text, _ = compiled
    branches = re.findall(r"conditional\(.*", text)
    names = [re.findall(r'op_name="([^"]*)"', branch) for branch in branches]
    assert all(name and "cond" in name[0] for name in names)
    assert len(branches) <= 8, names


def test_a_token_costs_one_branch_and_none_where_all_rows_take_the_likeliest(compiled):
    """A GPU waits for the host at each branch; all others lie inside the one that asks whether any is needed."""
    sort, _, text, _ = compiled
    assert len(re.findall(r" conditional\(", one_step(sort, text))) == (sort != "likeliest")


def one_step(sort, text):
    """The computation that runs once a step: the body of the loop over tokens, or the program's entry."""
    if sort == "mixed":
        return text[text.index("\nENTRY ") :]
    loop = re.findall(r" while\(.*body=(%?[\w.-]+)", text[text.index("\nENTRY ") :])
    assert len(loop) == 1
    start = text.index(f"\n{loop[0]} (")
    return text[start : text.index("\n}", start)]


def test_arguments_are_the_weights_the_memory_and_a_few_rows(compiled):
    sort, program, _, model = compiled
    arguments = len(jax.tree.leaves(program.in_avals))
    weights = len(jax.tree.leaves(nnx.split(model)[1]))
    tokens = int(sort == "mixed")
    assert arguments == weights + pool_arrays(model) + TABLES + tokens + BATCH + PLAN


def test_the_step_stays_on_the_device(compiled):
    _, _, text, _ = compiled
    assert not re.search(r"\b(infeed|outfeed|send|recv)\(", text)
    assert "callback" not in text


def test_the_tables_are_not_copied_in_a_step(compiled):
    """A row of them is as wide as the vocabulary: a copy of all of them would cost as much as the logits."""
    sort, _, text, model = compiled
    tables = rf"\w+\[{ROWS + 1},{model.logits_width}\]"
    assert re.search(tables, text)
    inside = text if sort == "mixed" else body_of_the_loop(text)
    assert not re.findall(rf"= {tables}\S* copy\(.*", inside)


@pytest.mark.parametrize(("name", "rows"), [("qwen3_5", 2), ("qwen3_5_moe", 1)])
def test_on_a_gpu_a_loop_without_experts_has_two_rows_at_least(monkeypatch, name, rows):
    model = Fixture(name).load()
    monkeypatch.setattr(runner_module, "_is_gpu", lambda: True)
    ladders = Runner(model, route_model(model), SIZES, [0], "highest").ladders
    assert ladders.decode_rows[0] == rows and ladders.likeliest
