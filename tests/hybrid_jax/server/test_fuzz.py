"""Hostile requests to a real server: every limit and one past it, bodies made from the schemas, raw bytes cut anywhere.

Whatever comes, the answer is 200 or a 4xx in OpenAI's form, in the form that the document states, and the next request
is answered.
"""

import json
import socket
from contextlib import closing

import httpx2
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid_jax.server import answers
from hybrid_jax.server.settings import BODY_BYTES, CHOICES, HEADER_BYTES, HEADERS, JSON_LEVELS, MESSAGES, PROMPTS
from tests.hybrid_jax.server.live import KEY

pytestmark = pytest.mark.slow
CONTEXT, WAITING = 256, 8  # as the server was started
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FORMS = {
    COMPLETIONS: answers.Completion,
    CHAT: answers.ChatCompletion,
    "/tokenize": answers.Tokens,
    "/detokenize": answers.Text,
}


def checked(path: str, answer: httpx2.Response) -> int:
    """Its status, once its form is the one that the document states."""
    msgspec.json.decode(answer.content, type=FORMS[path] if answer.status_code == 200 else answers.Error)
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
    return answer.status_code


LIMITS = [  # a field, its values at the limit, its values one past it
    ("temperature", [0, 2], [-0.001, 2.001]),
    ("top_p", [1e-9, 1], [0, 1.001, -1]),
    ("min_p", [0, 1], [-0.001, 1.001]),
    ("top_k", [-1, 0, 2**31 - 1], [-2, 2**31]),
    ("presence_penalty", [-2, 2], [-2.01, 2.01]),
    ("frequency_penalty", [-2, 2], [-2.01, 2.01]),
    ("repetition_penalty", [0.01, 2], [0, -1, 2.01]),
    ("seed", [-(2**63), 2**63 - 1], [-(2**63) - 1, 2**63, 10**30]),
    ("stop", [["!"] * 4, "x" * 256], [["!"] * 5, "x" * 257, ""]),
    ("stop_token_ids", [[0], [1]], [[-1], [2**31]]),
    (
        "logit_bias",
        [{str(i): 100 for i in range(300)}, {"0": -100}],
        [{str(i): 1 for i in range(301)}, {"0": 101}, {"-1": 0}],
    ),
    ("logprobs", [0, 20], [-1, 21]),
    ("max_tokens", [1], [0, -1, CONTEXT, 2**31, 10**30]),
    ("n", [1, WAITING], [0, -1, WAITING + 1, CHOICES + 1]),
    ("cache_salt", ["s" * 128], ["s" * 129]),
    ("request_id", ["r" * 64], ["r" * 65, "", "a b"]),
    (
        "prompt",
        [[0], [[0]], "x"],
        [[-1], [2**31], [], [[]], [0.5], [None], "x" * (CONTEXT * 16 + 1), [[0]] * (PROMPTS + 1)],
    ),
    ("priority", [0, 1], ["1", 10**30]),
    ("stream_options", [None], [{}, {"x": 1}, 1]),
]


@pytest.mark.parametrize(("field", "fits", "past"), LIMITS, ids=[row[0] for row in LIMITS])
def test_a_limit_is_kept_and_one_past_it_is_refused(live, field, fits, past):
    body = {"prompt": "The fox", "max_tokens": 1}
    for value in fits:
        answer = live.post(COMPLETIONS, body | {field: value})
        assert checked(COMPLETIONS, answer) == 200, (value, answer.text)
    for value in past:
        answer = live.post(COMPLETIONS, body | {field: value})
        assert checked(COMPLETIONS, answer) == 400, (value, answer.text)


def test_sizes_of_bodies_messages_and_heads(live):
    key = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    for size_bytes, status in ((BODY_BYTES, 400), (BODY_BYTES + 1, 413)):
        body = b'{"prompt": "' + b"x" * (size_bytes - 14) + b'"}'
        answer = httpx2.post(live.url + COMPLETIONS, content=body, headers=key, timeout=60)
        assert checked(COMPLETIONS, answer) == status
    said = {"role": "user", "content": ""}
    assert checked(CHAT, live.post(CHAT, {"messages": [said] * (MESSAGES + 1)})) == 400
    deep = b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    assert checked(COMPLETIONS, httpx2.post(live.url + COMPLETIONS, content=deep, headers=key, timeout=60)) == 400
    for levels, status in ((JSON_LEVELS, 200), (JSON_LEVELS + 1, 400)):  # the object is one of them
        field = {"prompt": [1], "max_tokens": 1, "user": json.loads("[" * (levels - 1) + "]" * (levels - 1))}
        answer = live.post(COMPLETIONS, field)
        assert checked(COMPLETIONS, answer) == status
    assert live.get("/health").status_code == 200


def test_size_and_number_of_headers(live):
    fixed_bytes = len("Host: localhost\r\nX: \r\n")
    for length, status in ((HEADER_BYTES - fixed_bytes, b"200"), (HEADER_BYTES - fixed_bytes + 1, b"431")):
        got = _raw(live, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * length + b"\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 " + status), got[:80]
    for count, status in ((HEADERS - 1, b"200"), (HEADERS, b"431")):
        got = _raw(live, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: x\r\n" * count + b"\r\n")
        assert got.startswith(b"HTTP/1.1 " + status), got[:80]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system", "x"]), "content": st.text(max_size=9) | VALUES},
    optional={"tool_calls": VALUES, "name": VALUES, "reasoning_content": VALUES},
)


@pytest.mark.parametrize("path", FORMS)
def test_bodies_of_any_values_are_answered_or_refused(live, path):
    from hybrid_jax.server.openapi import OPERATIONS

    (kind,) = [one.body for one in OPERATIONS if one.path == path]
    assert kind is not None
    names = [name for name in kind.__struct_fields__ if name not in ("stream", "max_tokens", "n")]

    @few
    @given(st.dictionaries(st.sampled_from(names), VALUES, max_size=2), st.lists(MESSAGE, max_size=2))
    def check(fields, messages):
        body = {"max_tokens": 1, "n": 1} if path.startswith("/v1") else {}
        body |= {CHAT: {"messages": messages}, COMPLETIONS: {"prompt": "a"}, "/detokenize": {"tokens": [1]}}.get(
            path, {}
        )
        checked(path, live.post(path, body | fields))

    check()
    live.wait_until_idle()


def _raw(live, sent: bytes) -> bytes:
    """All that comes back on a connection whose client sends these bytes and then no more."""
    with closing(socket.create_connection(("127.0.0.1", int(live.url.rsplit(":", 1)[1])), timeout=30)) as line:
        line.sendall(sent)
        line.shutdown(socket.SHUT_WR)
        parts = []
        while part := line.recv(65536):
            parts.append(part)
        return b"".join(parts)


BODY = json.dumps({"prompt": "The fox", "max_tokens": 2, "stream": True}).encode()
HEAD = (
    f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    f"Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\n\r\n"
).encode()


@few
@given(st.integers(0, len(HEAD) + len(BODY) - 1))
def test_a_request_cut_anywhere_leaves_nothing_behind(live, length):
    got = _raw(live, (HEAD + BODY)[:length])
    assert not got or got.startswith(b"HTTP/1.1 4"), got
    live.wait_until_idle()


@few
@given(st.integers(0, len(HEAD) - 1), st.binary(min_size=1, max_size=4))
def test_a_damaged_head_is_refused_or_served(live, place, damage):
    got = _raw(live, HEAD[:place] + damage + HEAD[place + len(damage) :] + BODY)
    assert not got or got.startswith((b"HTTP/1.1 2", b"HTTP/1.1 4")), got
    assert live.get("/health").status_code == 200
