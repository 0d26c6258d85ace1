"""The server as a client sees it: the official client against a real process on the demo model."""

import os
import re
import signal
import socket
import threading
import time

import httpx2
import openai
import pytest

from hybrid_jax.server.app import ROUTES
from hybrid_jax.server.gate import OPEN_PATHS
from hybrid_jax.server.settings import BODY_BYTES
from tests.hybrid_jax.server.live import KEY, Live, start

LONG = "The old oak stood beside the river. " * 20  # more than two pages of the prefix cache
HELLO = [{"role": "user", "content": "Tell me about the fox."}]
pytestmark = pytest.mark.slow
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def test_completions_of_texts_and_of_token_ids_are_the_same(live, client):
    ids = live.post("/tokenize", {"prompt": "Once upon a time"}).json()["tokens"]
    whole = client.completions.create(
        model="demo", prompt=["Once upon a time", "Dear Anna,"], max_tokens=8, temperature=0
    )
    assert [choice.index for choice in whole.choices] == [0, 1]
    alone = client.completions.create(model="demo", prompt=[ids], max_tokens=8, temperature=0)
    assert alone.choices[0].text == whole.choices[0].text != whole.choices[1].text
    assert alone.choices[0].finish_reason == "length"
    assert alone.usage.prompt_tokens == len(ids) and alone.usage.completion_tokens == 8
    flat = client.completions.create(model="demo", prompt=ids, max_tokens=8, temperature=0)
    assert flat.choices[0].text == alone.choices[0].text
    assert live.metric("hybrid_jax_compilations_after_ready") == 0


def test_a_seed_replays_and_the_drawn_one_is_reported(client):
    first = client.completions.create(model="demo", prompt="A letter", max_tokens=12, temperature=1.5)
    again = client.completions.create(model="demo", prompt="A letter", max_tokens=12, temperature=1.5, seed=first.seed)
    other = client.completions.create(
        model="demo", prompt="A letter", max_tokens=12, temperature=1.5, seed=first.seed + 1
    )
    assert again.choices[0].text == first.choices[0].text != other.choices[0].text


def test_choices_of_one_prompt_differ_and_share_its_usage(client):
    answer = client.chat.completions.create(model="demo", messages=HELLO, n=3, max_tokens=10, temperature=1.5, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    alone = client.chat.completions.create(model="demo", messages=HELLO, max_tokens=10, temperature=1.5, seed=7)
    assert alone.choices[0].message.content == answer.choices[0].message.content
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens
    assert answer.usage.completion_tokens == sum(len(_tokens(client, seed=7, choice=i)) for i in range(3))


def _tokens(client: openai.OpenAI, seed: int, choice: int) -> list[object]:
    answer = client.chat.completions.create(
        model="demo", messages=HELLO, n=3, max_tokens=10, temperature=1.5, seed=seed, logprobs=True
    )
    return answer.choices[choice].logprobs.content


def test_a_streamed_chat_is_the_whole_one(client):
    asked = {"model": "demo", "messages": HELLO, "max_tokens": 24, "n": 2, "seed": 5, "logprobs": True}
    whole = client.chat.completions.create(**asked, top_logprobs=2)
    chunks = list(
        client.chat.completions.create(**asked, top_logprobs=2, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for index, choice in enumerate(whole.choices):
        mine = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
        assert [entry for c in mine if c.logprobs for entry in c.logprobs.content] == choice.logprobs.content


def test_a_streamed_completion_is_the_whole_one(client):
    asked = {"model": "demo", "prompt": ["Once", "Dear"], "max_tokens": 12, "temperature": 0, "logprobs": 2}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert sum((getattr(c.logprobs, name) for c in mine), []) == getattr(choice.logprobs, name)


def test_a_stream_ends_with_done(live):
    answer = live.post(COMPLETIONS, {"prompt": "Once", "max_tokens": 3, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")
    assert all(frame.startswith("data: ") for frame in answer.text.strip().split("\n\n"))


def test_a_stop_string_cuts_the_answer(client):
    asked = {"model": "demo", "prompt": "Once upon a time", "temperature": 0}
    whole = client.completions.create(**asked, max_tokens=20).choices[0].text
    stop = whole[20:26]
    cut = client.completions.create(**asked, max_tokens=20, stop=[stop]).choices[0]
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (whole[: whole.index(stop)], "stop", stop)
    pieces = [c.choices[0] for c in client.completions.create(**asked, max_tokens=20, stop=stop, stream=True)]
    assert "".join(piece.text for piece in pieces) == cut.text and pieces[-1].finish_reason == "stop"


def test_logprobs_bias_and_allowed_tokens(live, client):
    token = live.post("/tokenize", {"prompt": " fox"}).json()["tokens"][0]
    asked = {"model": "demo", "messages": HELLO, "max_tokens": 4, "temperature": 0, "logprobs": True}
    forced = client.chat.completions.create(**asked, top_logprobs=3, logit_bias={str(token): 100}).choices[0]
    assert forced.message.content == " fox" * 4
    for entry in forced.logprobs.content:
        assert (entry.token, bytes(entry.bytes), len(entry.top_logprobs)) == (" fox", b" fox", 3)
        assert entry.logprob <= entry.top_logprobs[0].logprob <= 0
    only = client.chat.completions.create(**asked, extra_body={"allowed_token_ids": [token]})
    assert only.choices[0].message.content == " fox" * 4


def test_penalties_and_limits_of_sampling_change_the_answer(client):
    asked = {"model": "demo", "prompt": "the fox the fox the fox the", "max_tokens": 16}
    greedy = client.completions.create(**asked, temperature=0).choices[0].text
    penalised = client.completions.create(**asked, temperature=0, frequency_penalty=2, presence_penalty=2)
    assert penalised.choices[0].text != greedy
    for narrow in ({"top_k": 1}, {"min_p": 1.0}):
        assert client.completions.create(**asked, temperature=2, extra_body=narrow).choices[0].text == greedy
    assert client.completions.create(**asked, temperature=2, top_p=1e-6).choices[0].text == greedy


def test_the_second_of_two_equal_prompts_is_cached_unless_salted(live, client):
    asked = {"model": "demo", "prompt": LONG, "max_tokens": 2}
    first = client.completions.create(**asked).usage
    second = client.completions.create(**asked).usage
    assert first.prompt_tokens_details.cached_tokens == 0
    assert 64 <= second.prompt_tokens_details.cached_tokens < second.prompt_tokens
    salted = client.completions.create(**asked, extra_body={"cache_salt": "other"}).usage
    assert salted.prompt_tokens_details.cached_tokens == 0
    assert live.metric("vllm:prefix_cache_hits_total") >= second.prompt_tokens_details.cached_tokens


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"tools": [{"type": "function"}]}, "unsupported_field"),
        ({"echo": 0}, "invalid_type"),
        ({"guided_jsons": {}}, "unknown_field"),
        ({"my_regex": "a"}, "unknown_field"),
        ({"temperature": "hot"}, "invalid_type"),
        ({"temperature": 2.1}, "invalid_value"),
        ({"top_p": 0}, "invalid_value"),
        ({"max_tokens": 0}, "invalid_value"),
        ({"max_tokens": 256}, "context_length_exceeded"),
        ({"prompt": []}, "invalid_value"),
        ({"prompt": ["a", 1]}, "invalid_value"),
        ({"prompt": [[8192]]}, "invalid_value"),
        ({"prompt": [True]}, "invalid_value"),
        ({"prompt": "a" * 4097}, "context_length_exceeded"),
        ({"n": 0}, "invalid_value"),
        ({"n": 13}, "invalid_value"),  # one more than may run and wait
        ({"stop": ["a"] * 5}, "invalid_value"),
        ({"logprobs": 21}, "invalid_value"),
        ({"logit_bias": {"8192": 1}}, "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "invalid_value"),
        ({"cache_salt": "a" * 129}, "invalid_value"),
        ({"request_id": "a b"}, "invalid_value"),
    ],
)
def test_what_cannot_be_answered_is_refused(live, changed, code):
    answer = live.post(COMPLETIONS, {"prompt": "Once", "max_tokens": 2} | changed)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["code"] == code and error["type"] == "invalid_request_error" and error["message"]


@pytest.mark.parametrize(
    "changed",
    [
        {"messages": []},
        {"messages": [{"role": "system", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        {"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]},
        {"max_tokens": 3, "max_completion_tokens": 4},
        {"top_logprobs": 3},
        {"chat_template_kwargs": {"no_such_variable": 1}},
        {"continue_final_message": True},
    ],
)
def test_what_no_chat_can_be_is_refused(live, changed):
    answer = live.post(CHAT, {"messages": HELLO, "max_completion_tokens": 2} | changed)
    assert answer.status_code == 400, answer.text


def test_fields_that_ask_for_nothing_are_passed_over(live):
    idle = {"tools": None, "tool_choice": "none", "echo": False, "best_of": 1, "user": "me", "x_trace": 1}
    assert live.post(COMPLETIONS, {"prompt": "Once", "max_tokens": 1} | idle).status_code == 200
    spoken = [*HELLO, {"role": "assistant", "content": "It runs.", "refusal": None, "tool_calls": None}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "text", "text": "then?"}]}]
    assert live.post(CHAT, {"messages": spoken + parts, "max_completion_tokens": 1}).status_code == 200


def test_bodies_that_are_none_are_refused(live):
    def send(content: bytes, kind: str = "application/json", host: str = "localhost") -> int:
        headers = {"Content-Type": kind, "Authorization": f"Bearer {KEY}", "Host": host}
        return httpx2.post(live.url + COMPLETIONS, content=content, headers=headers).status_code

    assert send(b'{"prompt": "a", "max_tokens": 1}') == 200
    for body in (b"", b"[]", b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "\xff"}', b'{"x":' + b"[" * 100_000):
        assert send(body) == 400
    assert send(b"{}", kind="text/plain") == 415
    assert send(b'{"prompt": "a", "max_tokens": 1}', host="evil.example") == 400
    assert send(b" " * (BODY_BYTES + 1)) == 413
    assert send(b" " * BODY_BYTES) == 400  # no JSON, and not too much of it


def test_every_route_but_the_open_ones_needs_the_key(live):
    for path in (route.path for route in ROUTES):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
            status = httpx2.get(live.url + path, headers=headers).status_code
            assert status == (200 if path in OPEN_PATHS else 401), path
    assert live.get("/nothing").status_code == 404 and live.get(CHAT).status_code == 405


def test_models_tokens_and_version(live, client):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").max_model_len == 256
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")
    found = live.post("/tokenize", {"prompt": "Grüße, 狐!"}).json()
    assert found["count"] == len(found["tokens"]) and found["max_model_len"] == 256
    assert live.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "Grüße, 狐!"}
    assert live.post("/tokenize", {"messages": HELLO}).json()["count"] > 5
    assert live.post("/detokenize", {"tokens": [8192]}).status_code == 400
    assert set(live.get("/version").json()) == {"version", "jax"}
    assert live.get("/health").json()["phase"] == "serving"


def test_a_full_queue_is_a_503_and_nothing_is_lost(live, client):
    asked = {"model": "demo", "prompt": "Once", "max_tokens": 32, "stream": True, "extra_body": {"ignore_eos": True}}
    first = client.completions.create(**asked, n=6)
    next(iter(first))  # it runs
    second = client.completions.create(**asked, n=6)
    refused = live.post(COMPLETIONS, {"prompt": "Once", "max_tokens": 1})
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
    ended = [c.finish_reason for stream in (first, second) for chunk in stream for c in chunk.choices]
    assert ended.count("length") == 12
    live.wait_until_idle()


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_leaves_frees_everything(live, streams):
    lines = len(live.log_lines())
    body = b'{"prompt": "Once", "max_tokens": 250, "n": 6, "ignore_eos": true, "stream": %s}' % (
        b"true" if streams else b"false"
    )
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(live.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(head.encode() + body)
        if streams:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        while live.metric("vllm:num_requests_running") == 0:
            time.sleep(0.02)
    live.wait_until_idle()
    (line,) = live.log_lines()[lines:]
    assert "reason=disconnect" in line
    output = re.search(r"output=(\d+)", line)
    assert output is not None and int(output[1]) < 6 * 250


def test_sigterm_under_load_finishes_what_runs(tmp_path, compiled):
    server = start(tmp_path, compiled)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(_read(server))) for _ in range(6)]
    for thread in threads:
        thread.start()
    while server.metric("vllm:num_requests_running") < 4:
        time.sleep(0.05)
    os.kill(server.process.pid, signal.SIGTERM)
    try:
        late = server.post(COMPLETIONS, {"prompt": "Once", "max_tokens": 1})
        assert late.status_code == 503 and late.json()["error"]["code"] == "draining"
        assert httpx2.get(server.url + "/ready").status_code == 503
        assert httpx2.get(server.url + "/health").status_code == 200
    finally:
        for thread in threads:
            thread.join(90)
        assert server.process.wait(60) == 0
    assert len(found) == 6 and all(text.endswith("data: [DONE]\n\n") for text in found)
    reasons = [re.search(r"reason=(\S+)", line)[1] for line in server.log_lines()]
    assert sorted(reasons) == ["draining"] + ["length"] * 6


def _read(server: Live) -> str:
    body = {"prompt": "Once", "max_tokens": 48, "stream": True, "ignore_eos": True}
    return server.post(COMPLETIONS, body).text
