"""Echo, structured output, tools and thinking through the official client, on a real process."""

import json
import time

import httpx2
import openai
import pytest

from tests.hybrid_jax.server.live import KEY

HELLO = [{"role": "user", "content": "Tell me about the fox."}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["fox", "crow"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}
FIND = {"type": "function", "function": {"name": "find", "description": "Find one.", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now"}}
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}
CALL = '<tool_call>\n{"name": "find", "arguments": {"kind": "fox", "age": 3}}\n</tool_call>'
pytestmark = pytest.mark.slow


# ---------------------------------------------------------------------------------------------------------------- echo


def test_echo_scores_the_prompt_as_generation_scored_it(live, client):
    """The request form of a well-known evaluation harness: log-likelihoods of given continuations."""
    start = client.completions.create(model="demo", prompt="Once upon a time", max_tokens=8, temperature=0, logprobs=1)
    ids = live.post("/tokenize", {"prompt": "Once upon a time"}).json()["tokens"]
    said = start.choices[0].logprobs
    spelled = [live.post("/tokenize", {"prompt": token}).json()["tokens"] for token in said.tokens]
    prompt = [*ids, *(one[0] for one in spelled if len(one) == 1)]
    assert len(prompt) == len(ids) + 8, "the tokens of the answer were meant to be found by their texts"
    answer = live.post(
        COMPLETIONS,
        {"prompt": [prompt, ids], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234},
    ).json()
    for given, choice in zip([prompt, ids], answer["choices"], strict=True):
        found = choice["logprobs"]
        assert len(found["tokens"]) == len(given) + 1 and choice["text"] == "".join(found["tokens"])
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        assert found["text_offset"] == [len("".join(found["tokens"][:i])) for i in range(len(given) + 1)]
    whole = answer["choices"][0]["logprobs"]
    scored = whole["token_logprobs"][len(ids) : -1]
    assert scored == pytest.approx(said.token_logprobs, abs=1e-4)
    assert all(
        value == max(top.values()) for value, top in zip(scored, whole["top_logprobs"][len(ids) : -1], strict=True)
    )
    unlikely = whole["token_logprobs"][1], max(whole["top_logprobs"][1].values())
    assert unlikely[0] <= unlikely[1]
    assert live.metric("hybrid_jax_compilations_after_ready") == 0


def test_scores_are_the_same_whatever_is_cached(live):
    long = "The old mill stood beside the river. " * 20
    asked = {"prompt": long, "max_tokens": 0, "echo": True, "logprobs": 2}
    first = live.post(COMPLETIONS, asked).json()
    assert live.post(COMPLETIONS, {"prompt": long, "max_tokens": 2}).status_code == 200
    again = live.post(COMPLETIONS, asked).json()
    assert first["choices"] == again["choices"] and first["choices"][0]["finish_reason"] == "length"
    assert first["choices"][0]["text"] == long and first["usage"]["completion_tokens"] == 0
    live.wait_until_idle()


def test_a_streamed_echo_is_the_whole_one(client):
    asked = {"model": "demo", "prompt": ["Once", "Dear Anna"], "max_tokens": 4, "temperature": 0, "logprobs": 2}
    whole = client.completions.create(**asked, n=2, echo=True)
    plain = client.completions.create(**asked, n=2)
    chunks = list(client.completions.create(**asked, n=2, echo=True, stream=True))
    for choice, prompt in zip(whole.choices, ("Once", "Once", "Dear Anna", "Dear Anna"), strict=True):
        assert choice.text == prompt + plain.choices[choice.index].text
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert sum((getattr(c.logprobs, name) for c in mine), []) == getattr(choice.logprobs, name)
    only = client.completions.create(model="demo", prompt="Once", max_tokens=0, echo=True, stream=True)
    assert [(c.text, c.finish_reason) for chunk in only for c in chunk.choices] == [("Once", "length")]


# --------------------------------------------------------------------------------------------------- structured output


@pytest.mark.parametrize("temperature", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_keeps_to_its_schema(live, client, temperature, stream):
    tight = SCHEMA | {"x-guidance": {"whitespace_flexible": False}}  # the demo likes space, and never ends it
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": tight, "strict": True}}
    asked = {"model": "demo", "messages": HELLO, "max_tokens": 60, "seed": 3, "response_format": form}
    answer = client.chat.completions.create(
        **asked, temperature=temperature, n=2, stream=stream, extra_body=NO_THINKING
    )
    texts, reasons = ["", ""], [None, None]
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            texts[choice.index] += (choice.delta if stream else choice.message).content or ""
            reasons[choice.index] = choice.finish_reason
    for text, reason in zip(texts, reasons, strict=True):
        value = json.loads(text)
        assert reason == "stop" and value["kind"] in ("fox", "crow") and 0 <= value["age"] <= 99
    assert live.metric("hybrid_jax_compilations_after_ready") == 0


def test_every_form_of_completion(client):
    def complete(**extra):
        asked = {"model": "demo", "prompt": "The fox", "max_tokens": 40, "temperature": 1.5, "seed": 1}
        return client.completions.create(**asked, extra_body=extra).choices[0]

    assert complete(guided_choice=["red", "blue"]).text in ("red", "blue")
    assert complete(structured_outputs={"regex": "[0-9]{3}-[a-f]{2}"}).text[3] == "-"
    assert complete(structured_outputs={"grammar": 'start: "a" NUM\nNUM: /[0-9]{4}/'}).text[1:].isdecimal()
    assert complete(structured_outputs={"choice": ["only this"]}).text == "only this"
    assert complete(structured_outputs={"choice": ["only this"]}, logit_bias={"5": 100}).text == "only this"
    cut = complete(structured_outputs={"regex": "[a-z ]{500}"})
    assert cut.finish_reason == "length"


def test_constrained_and_free_requests_run_together(live, client):
    asked = {"model": "demo", "prompt": "Rain", "max_tokens": 24, "temperature": 0}
    alone = client.completions.create(**asked).choices[0].text
    stream = client.completions.create(
        model="demo", prompt="The fox", max_tokens=60, stream=True, extra_body={"guided_regex": "[a-z ]{400}"}
    )
    next(iter(stream))
    assert client.completions.create(**asked).choices[0].text == alone
    assert all(character.islower() or character == " " for chunk in stream for character in chunk.choices[0].text)
    live.wait_until_idle()


@pytest.mark.parametrize("thinking", [None, True, False])
def test_a_grammar_begins_behind_thinking(live, client, thinking):
    """By the template, by the model (a bias makes it), and not at all."""
    opening, closing = (live.post("/tokenize", {"prompt": m}).json()["tokens"] for m in ("<think>", "</think>"))
    assert len(opening) == len(closing) == 1
    template = {} if thinking is None else {"chat_template_kwargs": {"enable_thinking": thinking}}
    bias = {str(opening[0]): 30, str(closing[0]): 40} if thinking is None else {str(closing[0]): 12}
    answer = client.chat.completions.create(
        model="demo",
        messages=HELLO,
        max_tokens=80,
        temperature=0,
        logit_bias=bias,
        extra_body={"guided_choice": ["yes", "no"], **template},
    )
    choice = answer.choices[0]
    if thinking is not False and choice.finish_reason == "length":
        pytest.fail(f"the model did not end its thinking: {choice.message.reasoning_content}")
    assert choice.message.content in ("yes", "no")
    counted = answer.usage.completion_tokens_details.reasoning_tokens
    assert (counted > 0) is (thinking is not False)


@pytest.mark.parametrize(
    "changed",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"uniqueItems": True}}}},
        {"guided_regex": "(a"},
        {"guided_grammar": "root ::= 'a'"},
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        {"guided_regex": "a", "min_tokens": 3},
        {"guided_backend": "other"},
        {"response_format": {"type": "json_object"}, "tools": [FIND], "tool_choice": "required"},
        {"tools": [FIND] * 129},
        {"tools": [FIND, FIND]},
        {"tools": [{"type": "web_search"}]},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tools": [FIND], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tools": [FIND], "tool_choice": "always"},
        {"tool_choice": "required"},
        {"functions": [FIND["function"]]},
        {"messages": [*HELLO, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}]},
        {"messages": [*HELLO, {"role": "user", "content": "a", "tool_calls": [{}]}]},
    ],
)
def test_what_cannot_be_kept_to_is_refused(live, changed):
    answer = live.post(CHAT, {"messages": HELLO, "max_tokens": 2} | changed)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


# ---------------------------------------------------------------------------------------------------------------- tools


def called(client, stream=False, **asked):
    """The choice of an answer, put together from its deltas where it is streamed."""
    asked = {"model": "demo", "messages": HELLO, "max_tokens": 160, "temperature": 0} | asked
    asked["extra_body"] = asked.get("extra_body", {}) | NO_THINKING
    if not stream:
        choice = client.chat.completions.create(**asked).choices[0]
        calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or []]
        return choice.message.content, calls, choice.finish_reason
    content, calls, ids, reason = "", [], [], None
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                assert call.index == len(calls) and call.type == "function"
                ids.append(call.id)
                calls.append((call.function.name, call.function.arguments))
            reason = choice.finish_reason or reason
    assert len(set(ids)) == len(calls)
    return content or None, calls, reason


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_model_spells_as_a_call_is_one(client, stream):
    written = {"guided_choice": ["Let me see.\n" + CALL + "\n" + CALL]}
    content, calls, reason = called(client, stream, tools=[FIND, NOW], extra_body=written)
    assert content == "Let me see." and reason == "tool_calls"
    assert calls == [("find", '{"kind": "fox", "age": 3}')] * 2
    _, calls, _ = called(client, stream, tools=[FIND], parallel_tool_calls=False, extra_body=written)
    assert len(calls) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_none_and_calls_that_are_not_wanted_are_content(client, stream):
    broken = CALL.replace("}}", "}")
    found = called(client, stream, tools=[FIND], extra_body={"guided_choice": [broken]})
    assert found == (broken, [], "stop")
    found = called(client, stream, tools=[FIND], tool_choice="none", extra_body={"guided_choice": [CALL]})
    assert found == (CALL, [], "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_can_be_demanded(client, stream):
    named = {"type": "function", "function": {"name": "find"}}
    for choice in ("required", named):
        content, calls, reason = called(client, stream, tools=[FIND], tool_choice=choice, parallel_tool_calls=False)
        ((name, arguments),) = calls
        assert (content, name, reason) == (None, "find", "tool_calls")
        assert set(json.loads(arguments)) == {"kind", "age"}


def test_the_answers_of_tools_are_read(live, client):
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"kind": "fox"}'}}
    story = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    story.append({"role": "tool", "tool_call_id": "c1", "content": "It is red."})
    assert client.chat.completions.create(model="demo", messages=story, max_tokens=2, tools=[FIND]).choices
    ids = live.post("/tokenize", {"messages": story, "tools": [FIND]}).json()["tokens"]
    text = live.post("/detokenize", {"tokens": ids}).json()["prompt"]
    assert '{"name": "find", "arguments": {"kind": "fox"}}' in text and "It is red." in text


def test_thinking_is_apart_from_content(live, client):
    closing = live.post("/tokenize", {"prompt": "</think>"}).json()["tokens"][0]
    asked = {"model": "demo", "messages": HELLO, "max_tokens": 40, "temperature": 0, "logit_bias": {str(closing): 12}}
    extra = {"chat_template_kwargs": {"enable_thinking": True}, "guided_choice": ["It runs."]}
    whole = client.chat.completions.create(**asked, extra_body=extra)
    message = whole.choices[0].message
    assert message.content == "It runs." and "think>" not in (message.reasoning_content or "")
    chunks = list(client.chat.completions.create(**asked, extra_body=extra, stream=True))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == message.content
    reasoning = [delta.model_extra.get("reasoning_content") or "" for delta in deltas]
    assert "".join(reasoning) == (message.reasoning_content or "")
    assert 0 < whole.usage.completion_tokens_details.reasoning_tokens <= whole.usage.completion_tokens


# ------------------------------------------------------------------------------------------------------------ templates


def test_a_template_that_loops_is_cut_and_nobody_waits_for_it(live):
    began = time.monotonic()
    with httpx2.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http:
        answer = http.post(
            live.url + CHAT, json={"messages": [{"role": "user", "content": "loop forever"}], "max_tokens": 1}
        )
    assert answer.status_code == 400 and "template took over" in answer.text
    assert time.monotonic() - began < 30
    with openai.OpenAI(base_url=live.url + "/v1", api_key=KEY, max_retries=0) as client:
        assert client.chat.completions.create(model="demo", messages=HELLO, max_tokens=1).choices
