"""The plan of real configs: weights, pages and slots as they are allocated, per device, and what the verb prints."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax import plan as planning
from hybrid_jax.cache import allocate
from hybrid_jax.hub import find_model
from hybrid_jax.memory import GIB, Limits, estimate_temporaries, plan_memory
from models.layers import Tally
from tests.models.reference import FOLDER
from tests.ragged import make_batch

CONFIGS = Path(__file__).parents[1] / "configs"


@functools.cache
def built(name, dtype="bfloat16"):
    path = CONFIGS / f"{name}.json"
    return planning.build(path if path.exists() else find_model(name), dtype, "xla")


def run(*arguments):
    command = [sys.executable, "-m", "hybrid_jax.cli", "plan", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", ["Qwen3.5-4B", "Ling-2.6-flash", "Nemotron-3-Nano-30B-A3B-BF16"])
def test_weights_are_two_bytes_a_parameter_and_four_where_they_stay_float32(name):
    model = built(name)
    parameters = jax.tree.leaves(nnx.state(model.decoder, nnx.Param))
    tallies = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model.decoder, Tally)))
    kept = sum(leaf.size for leaf in parameters if leaf.dtype == jnp.float32)
    count = sum(model.routing.parameters.values())
    assert planning.measure(model).weights_bytes == 2 * count + 2 * kept + 4 * tallies
    assert kept < count / 500


def test_the_weights_of_a_draft_count():
    assert planning.measure(built("Qwen3.5-4B")).weights_bytes > 2 * (4_205_751_296 + 120_599_552)


@pytest.mark.parametrize("name", ["demo", FOLDER / "ling2_5_mtp", FOLDER / "nemotron_h", FOLDER / "falcon_h1"])
@pytest.mark.parametrize("page_size", [16, 64])
def test_pools_weigh_what_is_allocated(name, page_size):
    model = built(str(name), "float32")
    sizes = planning.measure(model)
    plan = plan_memory(sizes, GIB, Limits(max_num_seqs=5, page_size=page_size))
    specs = model.decoder.specs
    cache = jax.eval_shape(lambda: allocate(specs, model.routing, plan.pages, plan.slots, plan.page_size))
    bytes_ = {"pages": 0, "slots": 0}
    for arrays in cache.pools:
        of_pages = arrays[0].shape[1:3] == (plan.pages, plan.page_size)
        bytes_["pages" if of_pages else "slots"] += sum(array.size * array.dtype.itemsize for array in arrays)
    assert bytes_ == {"pages": plan.pages_bytes, "slots": plan.slots_bytes} and min(bytes_.values()) > 0


def test_a_state_of_a_model_of_four_billion_weighs_50_mb():
    sizes = planning.measure(built("Qwen3.5-4B"))
    assert sizes.request_bytes == 24 * (32 * 128 * 128 * 4 + 3 * 8192 * 2) == 51_511_296
    assert sizes.token_bytes == (8 + 1) * 2 * 4 * 256 * 2  # eight layers and the draft


@pytest.mark.parametrize(
    "name, tokens",
    [("Ling-2.6-flash", 12_743), ("Ling-2.5-1T", 25_486), ("Ling-2.6-1T", 25_486), ("Kimi-Linear-48B-A3B", 5_384)],
)
def test_break_even(name, tokens):
    model = built(name)
    assert planning.break_even_tokens(model.routing, planning.plan_layout(model, 1)) == tokens


def test_break_even_of_recurrent_states_alone():
    routes = built("Kimi-Linear-48B-A3B").routing.routes
    states = sum(array.size_bytes for route in routes for array in route.memory.arrays if array.name == "state")
    assert states // planning.measure(built("Kimi-Linear-48B-A3B")).token_bytes == 5_201


# ------------------------------------------------------------------------------------------------------------- devices


def test_devices_divide_heads_and_repeat_latents():
    one, four = (planning.measure(built("Ling-2.6-flash"), devices) for devices in (1, 4))
    assert four.token_bytes == one.token_bytes and four.request_bytes * 4 == one.request_bytes
    assert one.weights_bytes / 4 < four.weights_bytes < one.weights_bytes / 4 * 1.05


def test_keys_and_values_divide_down_to_one_head():
    one, two, eight = (planning.measure(built("Qwen3.5-4B"), devices) for devices in (1, 2, 8))
    assert (two.token_bytes, eight.token_bytes) == (one.token_bytes // 2, one.token_bytes // 4)
    assert (two.request_bytes, eight.request_bytes) == (one.request_bytes // 2, one.request_bytes // 8)


def test_heads_divide_as_far_as_they_go():
    four, eight = (planning.measure(built("Ling-2.6-flash"), devices) for devices in (4, 8))
    assert four.request_bytes == eight.request_bytes and eight.weights_bytes < 0.6 * four.weights_bytes


def test_a_model_that_does_not_divide_is_not_planned_for():
    with pytest.raises(ValueError, match="wanted 256 expert .* expert_parallel 3: set tensor_parallel to 1, 2 or 4"):
        planning.measure(built("Ling-2.6-flash"), 3)


@pytest.mark.slow
def test_every_config_can_be_planned_for_eight_devices():
    for path in sorted(CONFIGS.glob("*.json")):
        model = built(path.stem)
        plan = plan_memory(planning.measure(model, 8), 288 * GIB, Limits())
        assert plan.total_bytes <= 0.9 * 288 * GIB and plan.pages > 1 and plan.slots_bytes > 0
        assert plan.max_model_len == min(8192, model.positions)


# --------------------------------------------------------------------------------------------------------- temporaries


@pytest.mark.slow
def test_estimated_temporaries_are_those_of_a_compiled_step():
    """Within a factor of 1.7 on the CPU, for a model of this size: enough to plan with until a step is compiled."""
    model, rows, tokens = built("demo", "float32"), 16, 512
    graph, state = nnx.split(model.decoder)
    cache = jax.eval_shape(lambda: allocate(model.decoder.specs, model.routing, 16 * rows + 1, rows + 1, 64))

    def step(state, cache, ids, batch):
        decoder = nnx.merge(graph, state)
        hidden, cache = decoder(ids, cache, batch)
        logits = decoder.logits(hidden[batch.query_start[1:] - 1])
        return jnp.argmax(jax.nn.softmax(logits), axis=-1), cache

    pages = np.arange(1, 16 * rows + 1).reshape(rows, 16)
    batch = make_batch([32] * rows, seen=[992] * rows, pages=pages, content="prefill")
    lowered = jax.jit(step, donate_argnums=(1,)).lower(state, cache, jnp.zeros(tokens, jnp.int32), batch)
    compiled_bytes = lowered.compile().memory_analysis().temp_size_in_bytes
    estimate_bytes = estimate_temporaries(planning.measure(model), tokens, rows, 1024, 64)
    assert compiled_bytes / 1.7 < estimate_bytes < compiled_bytes * 1.7


# ------------------------------------------------------------------------------------------------------------ the verb


def test_the_verb_prints_a_table_and_sentences():
    done = run(CONFIGS / "Qwen3.5-4B.json", "--hbm-gib", 80, "--max-num-seqs", 64)
    assert done.returncode == 0, done.stderr
    for text in (
        "weights     │                     │ 8.060  │ 10.1%",
        "64 requests run at once, of up to 8,192 tokens (193 slots, one of them null: 64 live and 128 for snapshots).",
        "A token takes 36,864 bytes of pages, a request 51,511,296 bytes of a slot.",
        "a slot weighs as much as the pages of 1,572 tokens",
        "The longest beginning of a prompt that can be cached has 8,192 tokens.",
    ):
        assert text in done.stdout, done.stdout
    assert "Assumed" not in done.stdout


def test_the_verb_says_what_it_assumes_of_several_devices():
    done = run(CONFIGS / "Ling-2.6-1T.json", "--hbm-gib", 141, "--devices", 16, "--no-prefix-caching")
    assert done.returncode == 0, done.stderr
    assert "16 devices divide weights" in done.stdout and "latent pages are whole on each" in done.stdout
    assert "the prefix cache is off" in done.stdout and "be cached" not in done.stdout


def test_the_verb_as_json():
    done = run("demo", "--hbm-gib", 1, "--json", "--pages", 100, "--slots", 30, "--page-size", 16)
    data = json.loads(done.stdout)
    sizes = planning.measure(planning.build(find_model("demo"), "bfloat16", "auto"))
    plan = plan_memory(sizes, GIB, Limits(pages=100, slots=30, page_size=16))
    assert data["parameters"] == 14_180_992 and data["weights_bytes"] == sizes.weights_bytes
    assert (data["pages"], data["slots"], data["max_num_seqs"]) == (100, 30, plan.max_num_seqs)
    parts = ("weights", "pages", "slots", "rows", "temporaries")
    assert sum(data[f"{part}_bytes"] for part in parts) == data["total_bytes"] == plan.total_bytes


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--hbm-gib", 1, "--max-num-seqs", 64, "--slots", 24], "set max_num_seqs 23 or slots 65"),
        (["--hbm-gib", 0.01], "wanted at least"),
        (["--hbm-gib", 0], "wanted hbm-gib above 0"),
        (["--hbm-gib", 1, "--devices", 0], "wanted at least 1 device"),
        (["--hbm-gib", 1, "--max-model-len", 2000], "wanted max_model_len up to 1024"),
    ],
)
def test_what_does_not_fit_is_one_message_and_exit_code_2(arguments, message):
    done = run("demo", *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not done.stdout
