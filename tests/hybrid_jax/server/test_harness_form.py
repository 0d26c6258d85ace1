"""The requests of lm-eval's `local-completions` with a remote tokenizer, and what it reads out of the answers."""

import pytest

pytestmark = pytest.mark.slow


def read_likelihoods(answer, context_lengths):
    """The sum of log-probabilities of each continuation, and whether every token of it was the likeliest."""
    found = []
    for choice, length in zip(sorted(answer["choices"], key=lambda one: one["index"]), context_lengths, strict=True):
        values, tops = (choice["logprobs"][name][length:-1] for name in ("token_logprobs", "top_logprobs"))
        found.append((sum(values), all(one == max(top.values()) for one, top in zip(values, tops, strict=True))))
    return found


def test_likelihoods_of_a_batch_of_token_prompts(live):
    ask = {"model": "demo", "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True, "temperature": 0}
    info = live.get("/tokenizer_info").json()
    assert set(info) == {"eos_token", "bos_token", "pad_token", "chat_template"}
    assert info["eos_token"] == "<|endoftext|>"
    context = live.post("/tokenize", {"prompt": "Once upon a time", "add_special_tokens": False}).json()["tokens"]
    assert live.post("/detokenize", {"tokens": context}).json()["prompt"] == "Once upon a time"
    likely = live.post(
        "/v1/completions", ask | {"prompt": context, "max_tokens": 6, "echo": False, "logprobs": 1}
    ).json()
    text = likely["choices"][0]["text"]
    ends = [
        live.post("/tokenize", {"prompt": end, "add_special_tokens": False}).json()["tokens"] for end in (text, " of")
    ]
    prompts = [context + end for end in ends]
    whole = live.post("/v1/completions", ask | {"prompt": prompts}).json()
    scores = read_likelihoods(whole, [len(context)] * 2)
    assert all(score < 0 for score, _ in scores)
    for prompt, (score, greedy) in zip(prompts, scores, strict=True):  # a batch is what each is alone
        alone = live.post("/v1/completions", ask | {"prompt": [prompt]}).json()
        assert read_likelihoods(alone, [len(context)])[0] == (pytest.approx(score, abs=1e-4), greedy)
    said = likely["choices"][0]["logprobs"]["token_logprobs"]
    if len(ends[0]) == len(said):  # the text was cut into the tokens that were drawn
        assert scores[0] == (pytest.approx(sum(said), abs=1e-3), True)
    assert scores[1][1] is False


def test_generation_until_a_stop(live):
    ask = {"model": "demo", "max_tokens": 32, "temperature": 0, "stop": [".", "<|endoftext|>"], "seed": 1234}
    answer = live.post("/v1/completions", ask | {"prompt": ["Once upon a time", "Dear Anna,"]}).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert all("." not in choice["text"] for choice in answer["choices"])
