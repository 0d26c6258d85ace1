"""The Python API on the demo model and on tiny fixtures: text, tokens, stops, streams, logits, errors."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hybrid_jax import LLM, SamplingParams, runner
from hybrid_jax.config import CHUNK_TOKENS, EngineConfig
from kernels_pallas.op import CHUNK
from tests.models.reference import FOLDER

GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def demo():
    return LLM("demo", "float32", max_model_len=256, max_num_seqs=4, page_size=256, decode_steps=8)


@pytest.fixture(scope="module")
def fixture_llm():
    return LLM(FOLDER / "qwen3_5", "float32", max_model_len=128, max_num_seqs=2, page_size=16, decode_steps=4)


def test_the_demo_writes_english(demo):
    (answer,) = demo.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=60))
    words = answer.outputs[0].text.lower().split()
    common = {"the", "a", "and", "of", "to", "was", "in", "he", "she", "they", "his", "her", "had", "with", "that"}
    assert len(words) > 25 and sum(word in common for word in words) > len(words) / 5
    assert answer.prompt == "Once upon a time" and answer.finished and answer.cached_tokens == 0


def test_text_is_what_the_tokens_say(demo):
    (answer,) = demo.generate("The sea", GREEDY)
    done = answer.outputs[0]
    assert done.text == demo.tokenizer.decode(done.token_ids)
    assert list(answer.prompt_token_ids) == demo.encode("The sea")


def test_alone_and_together_give_the_same_tokens(demo):
    prompts = ["The sea", "Dear Anna,", "A fox met a crow who", "Rain"]
    together = [answer.outputs[0].token_ids for answer in demo.generate(prompts, GREEDY)]
    alone = [demo.generate(prompt, GREEDY)[0].outputs[0].token_ids for prompt in prompts]
    assert together == alone


def test_more_prompts_than_rows_come_back_in_order(demo):
    prompts = ["The sea", "Dear Anna,", "A fox", "Rain", "Why", "The sea"]
    answers = demo.generate(prompts, SamplingParams(temperature=0, max_tokens=5))
    assert [answer.prompt for answer in answers] == prompts
    assert answers[0].outputs == answers[5].outputs


def test_each_prompt_may_have_its_own_parameters(demo):
    lengths = [1, 7, 19]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    answers = demo.generate(["The sea"] * 3, params)
    assert [len(answer.outputs[0].token_ids) for answer in answers] == lengths
    longest = answers[2].outputs[0].token_ids
    assert all(answer.outputs[0].token_ids == longest[:n] for answer, n in zip(answers, lengths, strict=True))


def test_a_seed_gives_the_same_text_in_any_company(demo):
    seeded = SamplingParams(temperature=1.0, max_tokens=12, seed=5)
    alone = demo.generate("The sea", seeded)[0].outputs[0].token_ids
    company = demo.generate(["Rain", "Dear Anna,", "The sea"], [GREEDY, SamplingParams(max_tokens=12), seeded])
    assert company[2].outputs[0].token_ids == alone
    other = demo.generate("The sea", SamplingParams(temperature=1.0, max_tokens=12, seed=6))[0].outputs[0].token_ids
    assert other != alone


def test_a_stop_string_cuts_the_text_before_it(demo):
    (whole,) = demo.generate("The sea", GREEDY)
    text = whole.outputs[0].text
    stop = text[20:26]
    (cut,) = demo.generate("The sea", SamplingParams(temperature=0, max_tokens=24, stop=stop))
    done = cut.outputs[0]
    assert (done.text, done.finish_reason, done.stop_reason) == (text[: text.index(stop)], "stop", stop)
    assert len(done.token_ids) < len(whole.outputs[0].token_ids)
    kept = SamplingParams(temperature=0, max_tokens=24, stop=stop, include_stop_str_in_output=True)
    assert demo.generate("The sea", kept)[0].outputs[0].text == text[: text.index(stop) + len(stop)]


def test_a_stop_token_ends_the_answer_and_has_no_text(demo):
    (whole,) = demo.generate("The sea", GREEDY)
    token = whole.outputs[0].token_ids[10]
    first = whole.outputs[0].token_ids.index(token)
    (cut,) = demo.generate("The sea", SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[token]))
    done = cut.outputs[0]
    assert (done.token_ids, done.finish_reason, done.stop_reason) == (
        whole.outputs[0].token_ids[: first + 1], "stop", token,
    )  # fmt: skip
    assert done.text == demo.tokenizer.decode(done.token_ids[:-1])


def test_min_tokens_keeps_a_stop_token_away(demo):
    (whole,) = demo.generate("The sea", GREEDY)
    token = whole.outputs[0].token_ids[2]
    params = SamplingParams(temperature=0, max_tokens=24, min_tokens=9, stop_token_ids=[token])
    ids = demo.generate("The sea", params)[0].outputs[0].token_ids
    assert token not in ids[:8] and len(ids) >= 9


def test_the_answer_ends_with_the_context(demo):
    (answer,) = demo.generate("The sea", SamplingParams(temperature=0, ignore_eos=True))
    assert len(answer.prompt_token_ids) + len(answer.outputs[0].token_ids) == demo.max_model_len
    assert answer.outputs[0].finish_reason == "length"


def test_a_stream_is_the_answer_in_pieces(demo):
    pieces = list(demo.stream("The sea", GREEDY))
    assert len(pieces) > 1 and "".join(pieces) == demo.generate("The sea", GREEDY)[0].outputs[0].text


def test_a_chat_ends_with_its_turn(demo):
    questions = ["What is a fox?", "Explain to a child why we need water.", "Write one sentence about rain.", "Hello!"]
    answers = demo.generate([demo.encode_chat(question) for question in questions], SamplingParams(seed=1))
    ended = [answer.outputs[0] for answer in answers if answer.outputs[0].finish_reason == "stop"]
    assert ended and all(answer.prompt is None for answer in answers)
    assert {demo.tokenizer.backend.id_to_token(done.token_ids[-1]) for done in ended} == {"<|end|>"}


def test_logits_say_what_greedy_decoding_takes(demo):
    prompt = demo.encode("The sea was calm and")
    ids = demo.generate(prompt, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))[0].outputs[0].token_ids
    logits = demo.logits([*prompt, *ids])
    assert logits.shape == (len(prompt) + 10, 8192) and logits.dtype == np.float32
    assert tuple(logits[len(prompt) - 1 : -1].argmax(-1)) == ids


def assert_near(logits, known):
    """Other shapes add up in another order."""
    np.testing.assert_allclose(logits, known, rtol=0, atol=1e-5 * np.abs(known).max())


def test_logits_do_not_depend_on_how_the_tokens_were_cut(fixture_llm):
    tokens = np.random.default_rng(0).integers(0, 256, 128).tolist()
    whole = fixture_llm.logits(tokens)
    small = LLM(FOLDER / "qwen3_5", "float32", max_model_len=128, max_num_seqs=2, max_num_batched_tokens=64)
    assert_near(small.logits(tokens), whole)


def test_bfloat16_stays_near_float32(fixture_llm):
    tokens = np.random.default_rng(1).integers(0, 256, 64).tolist()
    low = LLM(FOLDER / "qwen3_5", "bfloat16", max_model_len=128, max_num_seqs=2).logits(tokens)
    high = fixture_llm.logits(tokens)
    assert np.abs(low - high).mean() < 0.1 * high.std() and low.dtype == np.float32


@pytest.mark.slow
def test_programs_for_a_gpu_give_the_same_tokens(fixture_llm, monkeypatch):
    """Loops of the likeliest tokens that meet no branch, and loops of two rows at least, with one in use at the end."""
    prompts = [[1, 2, 3], [4]]
    ends = (
        fixture_llm.generate([4], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))[0].outputs[0].token_ids
    )
    params = [
        SamplingParams(temperature=0, max_tokens=7, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=30, stop_token_ids=(ends[2],)),
    ]
    drawn = [SamplingParams(temperature=0.7, seed=3, max_tokens=6), *params[1:]]
    wanted = [fixture_llm.generate(prompts, each) for each in (params, drawn)]
    monkeypatch.setattr(runner, "_is_gpu", lambda: True)
    llm = LLM(FOLDER / "qwen3_5", "float32", max_model_len=128, max_num_seqs=2, page_size=16, decode_steps=6)
    got = [llm.generate(prompts, each) for each in (params, drawn)]
    assert [[a.outputs[0].token_ids for a in g] for g in got] == [[a.outputs[0].token_ids for a in w] for w in wanted]
    used = [use for use in llm.stats().buckets if not use.tokens and use.steps]
    assert {use.likeliest for use in used} == {True, False} and {use.rows for use in used} == {2}


def test_a_model_without_tokenizer_takes_token_lists(fixture_llm):
    answers = fixture_llm.generate([[1, 2, 3], [4]], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    assert [len(answer.outputs[0].token_ids) for answer in answers] == [3, 3]
    assert [answer.outputs[0].text for answer in answers] == ["", ""]
    with pytest.raises(ValueError, match="no tokenizer"):
        fixture_llm.generate("text")
    with pytest.raises(ValueError, match="no tokenizer"):
        fixture_llm.generate([1], SamplingParams(stop="x"))
    with pytest.raises(ValueError, match="no tokenizer"):
        next(fixture_llm.stream([1]))


@pytest.mark.parametrize("ids", [[256], [-1], [1, 2, 9999]])
def test_token_ids_outside_the_vocabulary_are_refused(fixture_llm, ids):
    with pytest.raises(ValueError, match="wanted token ids from 0 to 255"):
        fixture_llm.generate(ids)
    with pytest.raises(ValueError, match="wanted token ids from 0 to 255"):
        fixture_llm.logits(ids)


def test_prompts_that_do_not_fit_are_refused(fixture_llm):
    with pytest.raises(ValueError, match="max_model_len=128"):
        fixture_llm.generate([1] * 128)
    with pytest.raises(ValueError, match="max_model_len=128"):
        fixture_llm.logits([1] * 129)
    with pytest.raises(ValueError, match="at least one prompt token"):
        fixture_llm.generate([[]])
    with pytest.raises(ValueError, match="one SamplingParams"):
        fixture_llm.generate([[1], [2]], [GREEDY])


def test_logits_of_any_legal_length(fixture_llm):
    tokens = np.random.default_rng(2).integers(0, 256, 128).tolist()
    whole = fixture_llm.logits(tokens)
    one_row = LLM(FOLDER / "qwen3_5", "float32", max_model_len=112, max_num_seqs=1, page_size=16)
    assert_near(one_row.logits(tokens[:112]), whole[:112])
    assert_near(one_row.logits(tokens[:70]), whole[:70])


def test_streams_and_calls_run_beside_each_other(demo):
    alone = {prompt: "".join(demo.stream(prompt, GREEDY)) for prompt in ("The sea", "Rain")}
    sea, rain = demo.stream("The sea", GREEDY), demo.stream("Rain", GREEDY)
    texts = {"The sea": next(sea), "Rain": next(rain)}
    assert demo.stats().running == 2
    assert demo.generate("Rain", GREEDY)[0].outputs[0].text == alone["Rain"]
    assert demo.logits(demo.encode("Rain")).argmax(-1)[-1] == demo.encode(alone["Rain"])[0]
    texts["Rain"] += "".join(rain)
    texts["The sea"] += "".join(sea)
    assert texts == alone


def test_a_stream_that_is_closed_leaves_the_engine(demo):
    whole = "".join(demo.stream("The sea", GREEDY))
    unread = demo.stream("The sea", SamplingParams(temperature=0, ignore_eos=True))
    never_begun = demo.stream("The sea", GREEDY)
    next(unread)
    assert demo.stats().running == 1
    unread.close()
    never_begun.close()
    assert demo.generate("The sea", GREEDY)[0].outputs[0].text == whole
    stats = demo.stats()
    assert (stats.running, stats.waiting, stats.pages.used, stats.slots.used) == (0, 0, 0, 0)


def test_threads_share_the_engine(demo):
    prompts = ["The sea", "Dear Anna,", "A fox met a crow who", "Rain", "Why", "Once"]
    alone = [demo.generate(prompt, GREEDY)[0].outputs for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as threads:
        together = list(threads.map(lambda prompt: demo.generate(prompt, GREEDY)[0].outputs, prompts))
    assert together == alone


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_call_loses_no_more_than_its_requests(demo, monkeypatch, when):
    before = demo.generate("The sea", GREEDY)
    other = demo.stream("Rain", GREEDY)
    next(other)
    find = demo._runner._program

    def interrupted(bucket):
        def program(*arguments):
            if when == "after":
                find(bucket)(*arguments)  # the memory is donated and gone
            raise KeyboardInterrupt

        return program

    monkeypatch.setattr(demo._runner, "_program", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.generate("The sea", GREEDY)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="another request broke the engine"):
        list(other)
    assert demo.generate("The sea", GREEDY)[0].outputs == before[0].outputs
    assert (demo.stats().pages.used, demo.stats().slots.used) == (0, 0)


def test_a_queue_shorter_than_the_call_is_waited_for():
    llm = LLM(FOLDER / "qwen3_5", "float32", max_model_len=128, max_num_seqs=1, page_size=16, max_waiting=1)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    answers = llm.generate([[token, 5, 6] for token in range(5)], params)
    assert [answer.prompt_token_ids[0] for answer in answers] == list(range(5))
    assert all(len(answer.outputs[0].token_ids) == 3 for answer in answers)


def test_token_ids_may_be_arrays_but_must_be_whole(fixture_llm):
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    wanted = fixture_llm.generate([5, 6, 7], params)[0].outputs
    assert fixture_llm.generate(np.array([5, 6, 7]), params)[0].outputs == wanted
    assert fixture_llm.generate([np.array([5, 6, 7])], params)[0].outputs == wanted
    for bad in ([1.7, 2.0], [True, 2], ["a"], [None]):
        with pytest.raises(ValueError, match="wanted a list of token ids"):
            fixture_llm.logits(bad)
    for bad in (None, {"prompt": "x"}, 7):
        with pytest.raises(ValueError, match="wanted a text, token ids"):
            fixture_llm.generate(bad)
    with pytest.raises(ValueError, match="wanted SamplingParams"):
        fixture_llm.generate([1], {"temperature": 0})


def copy_with_generation_config(tmp_path, text):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((FOLDER / "qwen3_5" / name).read_bytes())
    (tmp_path / "generation_config.json").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    "text, temperature, top_p",
    [
        ("{}", 1.0, 1.0),
        ('{"do_sample": false, "temperature": 0.6}', 0.0, 1.0),
        ('{"temperature": 0.6, "top_p": 0.9, "top_k": null}', 0.6, 0.9),
        ('{"temperature": 0}', 0.0, 1.0),
    ],
)
def test_the_checkpoint_says_how_it_is_sampled(tmp_path, text, temperature, top_p):
    llm = LLM(copy_with_generation_config(tmp_path, text), max_model_len=64, max_num_seqs=1)
    assert (llm.default_params.temperature, llm.default_params.top_p) == (temperature, top_p)


def test_end_ids_are_read_without_a_tokenizer(tmp_path):
    path = copy_with_generation_config(tmp_path, '{"eos_token_id": [7, 9]}')
    assert LLM(path, max_model_len=64, max_num_seqs=1).eos_token_ids == (7, 9, 2)


@pytest.mark.parametrize(
    "text", ["[1]", "{bad", '{"eos_token_id": [null]}', '{"eos_token_id": -5}', '{"temperature": 9}']
)
def test_a_bad_generation_config_is_named(tmp_path, text):
    with pytest.raises(ValueError, match="generation_config.json"):
        LLM(copy_with_generation_config(tmp_path, text), max_model_len=64, max_num_seqs=1)


def test_models_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not found"):
        LLM("no-such-model")
    with pytest.raises(ValueError, match="config.json"):
        LLM(tmp_path)
    with pytest.raises(ValueError, match="positions"):
        LLM(FOLDER / "qwen3_5", max_model_len=10**6)
    with pytest.raises(NotImplementedError, match="has no gpu kernel"):
        LLM(FOLDER / "lfm2", backend="gpu")


@pytest.mark.parametrize(
    "change",
    [{"page_size": 0}, {"max_num_seqs": -1}, {"max_num_batched_tokens": 100}, {"dtype": "int8"}, {"backend": "cuda"}],
)
def test_configs_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=f"wanted {next(iter(change))}"):
        EngineConfig(**change)


def test_the_host_cuts_prompts_where_the_kinds_cut_chunks():
    assert CHUNK_TOKENS == CHUNK  # stated twice, since the config imports no JAX
