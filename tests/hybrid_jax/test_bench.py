"""Benchmarks: that the numbers add up. What is counted, not how fast anything is."""

import json
from dataclasses import replace

import numpy as np
import pytest
from flax import nnx

from hybrid_jax.bench import verbs
from hybrid_jax.bench.ceilings import Ceilings
from hybrid_jax.bench.floors import decode_moved, prefill_moved, token_operations, weights_bytes
from hybrid_jax.bench.latency import measure_latency, token_times
from hybrid_jax.bench.run import Run, StepRecord, _batch_steps, _batches, _prompt_steps
from hybrid_jax.bench.step import Repeats, busy_s, decode_step, time_decode, time_steps
from hybrid_jax.bench.subject import chosen_experts, fill, open_subject
from hybrid_jax.bench.throughput import Bench, bucket_times, measure_throughput, median_run, outcome
from hybrid_jax.bench.traffic import Traffic, draw_traffic
from hybrid_jax.buckets import Bucket
from hybrid_jax.config import EngineConfig
from hybrid_jax.plan import build
from hybrid_jax.scheduler import Limits
from tests.models.reference import FOLDER

CONFIG = str(FOLDER / "qwen3_5" / "config.json")
CEILINGS = Ceilings("a device", read=1e9, copy=0.5e9, products=1e12, dtype="float32")
MIXED = Traffic(5, prompt=(3, 90), answer=(2, 14), seed=4)


@pytest.fixture(scope="module")
def bench():
    """The engine of a tiny checkpoint with few shapes of steps; its programs are compiled once for all tests."""
    subject = open_subject(str(FOLDER / "lfm2"), "float32", "xla")
    config = EngineConfig(
        dtype="float32",
        backend="xla",
        max_model_len=MIXED.longest,
        max_num_seqs=2,
        max_num_batched_tokens=64,
        decode_steps=4,
    )
    return Bench(subject, config)


@pytest.fixture(scope="module")
def throughput(bench):
    return measure_throughput(bench, MIXED, repeats=1)


@pytest.fixture(scope="module")
def subject():
    return open_subject(CONFIG, "bfloat16", "xla")


# ------------------------------------------------------------------------------------------------------------ traffic


def test_traffic_is_seeded_and_within_its_bounds():
    traffic = Traffic(300, prompt=(2, 70), answer=(5, 9), seed=1)
    arrivals = draw_traffic(traffic, 50)
    assert arrivals != draw_traffic(replace(traffic, seed=2), 50)
    prompts = [arrival.request.prompt_token_ids for arrival in arrivals]
    assert prompts == [arrival.request.prompt_token_ids for arrival in draw_traffic(traffic, 50)]
    lengths, answers = [len(prompt) for prompt in prompts], [arrival.request.token_limit for arrival in arrivals]
    assert (min(lengths), max(lengths)) == (2, 70) and set(answers) == {5, 6, 7, 8, 9}
    assert {token for prompt in prompts for token in prompt} == set(range(50))
    assert all(arrival.at_s == 0 and arrival.request.params.ignore_eos for arrival in arrivals)
    middle = np.median(lengths)  # of log-uniform lengths: the geometric mean of the bounds
    assert 9 < middle < 16


def test_a_rate_spreads_the_arrivals():
    times = [arrival.at_s for arrival in draw_traffic(Traffic(2000, (1, 1), (1, 1), rate=50.0), 10)]
    assert times == sorted(times) and times[-1] == pytest.approx(2000 / 50, rel=0.1)


@pytest.mark.parametrize("wrong", [{"requests": 0}, {"prompt": (0, 3)}, {"answer": (4, 3)}, {"rate": 0.0}])
def test_traffic_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match="wanted"):
        Traffic(**({"requests": 1, "prompt": (1, 2), "answer": (1, 2)} | wrong))


# ------------------------------------------------------------------------------------------------------------- floors


@pytest.fixture(scope="module")
def abstract():
    """A model with a draft, which no step measured here runs: nothing of it may count."""
    return build(FOLDER / "qwen3_5", "bfloat16", "xla")


def test_the_floor_of_a_decode_step_is_that_of_its_bytes(abstract):
    """Three linear layers of 4 heads of 16 x 16 and 128 channels, one full layer of 2 heads of 32, D 64, 256 tokens."""
    moved = decode_moved(abstract.decoder, abstract.routing, 0, rows=2, context=10)
    state = 4 * 16 * 16 * 4 + 3 * 128 * 2
    assert moved.states_bytes == 2 * 2 * 3 * state
    assert moved.pages_bytes == 2 * 10 * (2 * 2 * 32 * 2)
    assert moved.weights_bytes == sum(
        leaf.size * leaf.dtype.itemsize for _, leaf in weights(abstract, "layers", "norm", "head")
    )  # all but the draft and the embedding, of which two rows are read
    assert moved.total_bytes == moved.weights_bytes + moved.pages_bytes + moved.states_bytes
    read = prefill_moved(abstract.decoder, abstract.routing, 0, rows=2, tokens=10)
    assert read.states_bytes == moved.states_bytes // 2 and read.pages_bytes == moved.pages_bytes


def weights(model, *parts):
    return [(path, leaf) for path, leaf in nnx.to_flat_state(nnx.state(model.decoder)) if path[0] in parts]


def test_a_layer_counts_two_operations_a_weight(abstract):
    matrices = sum(leaf.size for _, leaf in weights(abstract, "layers") if len(leaf.shape) > 1)
    one = decode_moved(abstract.decoder, abstract.routing, 0, 1, 10).operations
    assert one == 2 * matrices + 2 * 64 * 256
    assert decode_moved(abstract.decoder, abstract.routing, 0, 3, 99).operations == 3 * one
    read = prefill_moved(abstract.decoder, abstract.routing, 0, 2, 10).operations
    assert read == 2 * (10 * 2 * matrices + 2 * 64 * 256)  # scores of the last token of each prompt alone


def test_experts_count_as_far_as_they_are_chosen():
    model = build(FOLDER / "ling2_5", "bfloat16", "xla")
    chosen = chosen_experts(json.loads((FOLDER / "ling2_5" / "config.json").read_text()))
    experts = [leaf for path, leaf in weights(model, "layers") if ".experts." in ".".join(map(str, path))]
    count = experts[0].shape[0]
    every = sum(2 * leaf.size for leaf in experts)
    rest = weights_bytes(model.decoder, 0, 1)
    for tokens in (1, 2, 100):
        share = 1 - (1 - chosen / count) ** tokens
        assert weights_bytes(model.decoder, chosen, tokens) == round(rest + share * every)
    assert token_operations(model.decoder, chosen) - token_operations(model.decoder, 0) == chosen / count * every
    assert chosen_experts({"text_config": {"num_experts_per_token": 3}}) == 3 and chosen_experts({}) == 0


def test_a_floor_is_the_longer_of_moving_and_computing():
    assert CEILINGS.floor_s(3e9) == pytest.approx(3.0)
    assert CEILINGS.floor_s(3e9, 1e9) == pytest.approx(2e9 / 0.5e9 + 2.0)  # one in and one out copied, two more read
    assert CEILINGS.floor_s(1e9, 0, 5e12) == pytest.approx(5.0)


# ------------------------------------------------------------------------------------------------------ random models


def test_random_weights_have_the_shapes_of_the_config_and_are_no_zeros(subject):
    assert subject.model.draft is None and len(subject.model.layers) == 4
    for path, leaf in nnx.to_flat_state(nnx.state(subject.model)):
        values = np.asarray(leaf[...], np.float32)
        assert np.isfinite(values).all() and values.std() > 0.005, path
    again = fill(nnx.eval_shape(lambda: subject.model))
    assert (again.embedding.table[...] == subject.model.embedding.table[...]).all()


def test_the_first_layers_have_memory_of_their_own():
    cut = open_subject(CONFIG, "bfloat16", "xla", layers=2)
    assert [route.place.layer for route in cut.routing.routes] == [0, 1] and len(cut.model.specs) == 1
    assert cut.routing.token_bytes == 0
    with pytest.raises(ValueError, match="wanted 1 to 4 layers"):
        open_subject(CONFIG, "bfloat16", "xla", layers=5)
    with pytest.raises(ValueError, match="wanted layers with a config.json"):
        open_subject(str(FOLDER / "qwen3_5"), "bfloat16", "xla", layers=2)


# -------------------------------------------------------------------------------------------------------------- steps


def test_a_decode_step_gives_every_row_its_own_memory():
    rows = decode_step(rows=3, context=100, loops=30).rows
    pages = [page for row in rows for page in row.pages]
    assert sorted(pages) == list(range(1, 1 + 3 * 3)) and sorted(row.write_slot for row in rows) == [1, 2, 3]
    assert all(row.in_decode and row.seen == 100 and row.ahead == 30 for row in rows)


def test_bench_step_prints_what_it_measured(monkeypatch, capsys):
    monkeypatch.setattr(verbs, "measure_ceilings", lambda: CEILINGS)
    verbs.step(CONFIG, 2, (70,), (2,), loops=3, dispatches=2, backend="xla", json=True)
    printed = json.loads(capsys.readouterr().out)
    (case,) = printed["cases"]
    assert printed["layers"] == 2 and printed["backends"] == {"gdn": "xla"} and printed["read"] == CEILINGS.read
    assert (case["sort"], case["rows"], case["context"], case["device_s"]) == ("decode", 2, 70, None)
    assert case["step_s"] > 0 and case["ratio"] == pytest.approx(case["floor_s"] / case["step_s"])
    assert case["tokens_per_s"] == pytest.approx(2 / case["step_s"])
    assert case["floor_s"] == pytest.approx(sum(v for k, v in case["moved"].items() if k != "operations") / 1e9)


@pytest.mark.slow
def test_a_step_that_draws_nothing_has_no_time(subject):
    poisoned = nnx.clone(subject.model)
    poisoned.norm.scale[...] = poisoned.norm.scale[...] * np.float32("nan")
    with pytest.raises(RuntimeError, match="are the logits finite"):
        time_decode(replace(subject, model=poisoned), CEILINGS, 1, 10, Repeats(2, 1))


def test_a_context_past_the_positions_is_refused(subject):
    with pytest.raises(ValueError, match="the model's 4096 positions"):
        next(time_steps(subject, CEILINGS, (4096,), (1,), (0, 1), Repeats(4, 1)))


def test_spans_that_overlap_count_once():
    assert busy_s([(10, 30), (0, 20), (100, 110), (12, 15), (14, 25)]) == pytest.approx(40e-9)


# -------------------------------------------------------------------------------------------------- continuous, static


def test_both_ways_draw_the_same_tokens(bench, throughput):
    arrivals = draw_traffic(MIXED, bench.subject.vocabulary)
    continuous, static = bench.continuous(arrivals), bench.static(arrivals)
    assert continuous.tokens == static.tokens
    assert {key: len(tokens) for key, tokens in static.tokens.items()} == {
        arrival.request.id: arrival.request.token_limit for arrival in arrivals
    }


def test_the_numbers_of_a_run_add_up(bench, throughput):
    arrivals = draw_traffic(MIXED, bench.subject.vocabulary)
    for found in (throughput.continuous, throughput.static):
        assert found.generated_tokens == sum(arrival.request.token_limit for arrival in arrivals)
        assert found.prompt_tokens == sum(len(arrival.request.prompt_token_ids) for arrival in arrivals)
        assert found.wait_s + found.submit_s + found.other_s == pytest.approx(found.seconds)
        assert sum(bucket.steps for bucket in found.buckets) == found.steps
        assert sum(bucket.seconds for bucket in found.buckets) <= found.seconds
        assert found.rates["requests_per_s"] == pytest.approx(5 / found.seconds)
    assert throughput.compiled_in_time == 0 and throughput.compilations > 0 and throughput.hits == 0
    printed = json.loads(json.dumps(throughput.to_json()))
    assert printed["ratio"] == pytest.approx(printed["static"]["seconds"] / printed["continuous"]["seconds"])
    assert any("continuous over static" in line for line in throughput.lines())


def test_all_memory_comes_back(bench, throughput):
    bench.scheduler.reset()
    for pool in (bench.scheduler.pages, bench.scheduler.slots, bench.scheduler.rows):
        assert pool.free == pool.count - 1


def test_latency_has_a_time_for_each_token(bench):
    found = measure_latency(bench, batch=2, prompt=20, answer=6, repeats=2)
    assert 0 < found.first_token.median_s <= found.first_token.p90_s and found.token.median_s > 0
    assert found.tokens_per_dispatch == pytest.approx(2.5)  # five further tokens in dispatches of four and one
    assert found.prompt_step.median_s > 0 and found.decode_step.median_s > 0
    assert 0 < found.decode_host.median_s < 4 * found.decode_step.p90_s
    assert json.loads(json.dumps(found.to_json()))["batch"] == 2 and "first token" in found.line


def test_an_incomplete_answer_is_no_result():
    arrivals = draw_traffic(Traffic(1, (1, 1), (3, 3)), 10)
    with pytest.raises(RuntimeError, match="wanted 3 tokens of request 0, got 2"):
        outcome(Run(seconds=1.0, tokens={"0": [1, 2]}), arrivals)


def test_times_of_tokens_are_from_the_arrival():
    run = Run()
    (arrival,) = draw_traffic(Traffic(1, (1, 1), (3, 3), rate=1.0), 10)
    run.take(arrival, [7], arrival.at_s + 2.0)
    run.take(arrival, [8, 9], arrival.at_s + 5.0)
    first, further = token_times([run])
    assert first == [pytest.approx(2.0)] and further == [pytest.approx(1.5)]


def test_padding_is_counted_over_all_steps_of_a_shape():
    loop, prompt = Bucket(4, 0, 8), Bucket(8, 64, 8)
    steps = [
        StepRecord(loop, 40, 64, 16, 0.1, 0.2, 1.0),
        StepRecord(prompt, 60, 64, 1, 0.1, 0.2, 5.0),
        StepRecord(loop, 8, 16, 4, 0.1, 0.2, 0.5),
    ]
    first, second = bucket_times(steps)
    assert (first.tokens, first.steps, first.seconds) == (64, 1, 5.0)
    assert (second.rows, second.steps, second.seconds, second.padding_ratio) == (4, 2, 1.5, 1 - 48 / 80)
    assert median_run([Run(3.0), Run(1.0), Run(2.0)]).seconds == 2.0


# ------------------------------------------------------------------------------------------------------ static batches


def limits(rows, step_tokens=128, page_size=16):
    return Limits(rows, step_tokens, 4, page_size, True, True, 0, 100, False)


def requests(traffic):
    return [arrival.request for arrival in draw_traffic(traffic, 50)]


def test_static_batches_keep_to_rows_and_pages():
    arrivals = draw_traffic(Traffic(40, (1, 90), (1, 60), seed=2), 50)
    batches = list(_batches(limits(6), 20, arrivals))
    assert [arrival for batch in batches for arrival in batch] == list(arrivals)
    needed = [
        sum(-(-(len(a.request.prompt_token_ids) + a.request.token_limit) // 16) for a in batch) for batch in batches
    ]
    assert max(needed) <= 19 and max(map(len, batches)) == 6 > min(map(len, batches[:-1]))
    for batch, following, pages in zip(batches, batches[1:], needed, strict=False):
        first = following[0].request
        own = -(-(len(first.prompt_token_ids) + first.token_limit) // 16)
        assert len(batch) == 6 or pages + own > 19


def test_prompts_of_a_static_batch_are_fed_once_and_cut_at_chunks():
    asked = requests(Traffic(6, (60, 300), (1, 5), seed=3))
    tables = [tuple(range(100))] * len(asked)
    fed = {request.id: [] for request in asked}
    cuts = 0
    for step in _prompt_steps(limits(6, step_tokens=130), asked, tables):
        assert step.rows and step.tokens <= 130
        for row in step.rows:
            cuts += row.seen > 0
            assert row.seen == len(fed[row.request.id]) and row.seen % 64 == 0
            fed[row.request.id] += row.tokens
            assert row.draws == (len(fed[row.request.id]) == len(row.request.prompt_token_ids))
    assert cuts > 1
    assert all(tuple(fed[request.id]) == request.prompt_token_ids for request in asked)


def test_a_static_batch_goes_on_until_its_longest_answer_ends():
    asked = requests(Traffic(3, (10, 10), (2, 30), seed=0))
    longest = max(request.token_limit for request in asked)
    decodes = [step for step in _batch_steps(limits(3), asked) if step.decode_only]
    assert len(decodes) == -(-(longest - 1) // 4) and all(len(step.rows) == 3 for step in decodes)
    for index, request in enumerate(asked):
        assert sum(step.rows[index].ahead for step in decodes) == request.token_limit - 1
        assert set(decodes[0].rows[index].pages).isdisjoint(decodes[0].rows[index - 1].pages)
