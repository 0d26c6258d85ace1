"""Clients that leave at every point, that do not read, and that do not write: nothing of them stays in the server.

The engine runs on the oracle, which raises, and so ends the server, at any mix-up between requests.
"""

import json
import os
import re
import socket
import time

import pytest

from hybrid_jax.tokenizer import Tokenizer
from tests.hybrid_jax.server.faulty import BUFFER_BYTES, DEMO
from tests.hybrid_jax.server.test_faults import ask_all, body, start_faulty, wait_until_running

COMPLETIONS = "/v1/completions"
SLOW_S = 1.0
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One for all clients: what one of them left behind would meet the next."""
    found = start_faulty(tmp_path_factory.mktemp("clients"), "oracle", "--step", "0.03", "--slow_client", str(SLOW_S))
    try:
        found.wait_until_ready()
        yield found
        assert found.get("/health").json()["phase"] == "serving"
    finally:
        found.process.kill()
        found.process.wait()


def connect(server):
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    client.settimeout(20)
    client.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    return client


def raw(asked, length=None):
    """The bytes of a request: its head, and its body."""
    content = json.dumps(asked).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length or len(content)}\r\n\r\n".encode(), content


def new_lines(server, before, count):
    """The lines of the log that came since, once there are so many."""
    end_s = time.monotonic() + 15
    while len(found := server.log_lines()[before:]) < count:
        assert time.monotonic() < end_s, server.log_path.read_text()
        time.sleep(0.02)
    return found


def wait_until_waiting(server, count):
    while server.metric("vllm:num_requests_waiting") != count:
        time.sleep(0.02)


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize(
    "point", ["head", "no body", "half body", "whole body", "prefill", "decode", "queued", "choices"]
)
def test_a_client_that_leaves_takes_everything_with_it(server, point, streams):
    before = len(server.log_lines())
    neighbours = ask_all(server, [body(max_tokens=30, stream=True)] * (4 if point == "queued" else 1))
    wait_until_running(server, len(neighbours))
    asked = body(stream=streams, max_tokens=250)
    if point == "prefill":
        asked |= {"prompt": [5] * 250, "max_tokens": 6}
    if point == "choices":
        asked |= {"n": 6}
    head, content = raw(asked)
    with connect(server) as client:
        if point == "head":
            client.sendall(head[:40])
        elif point == "no body":
            client.sendall(head)
        elif point == "half body":
            client.sendall(head + content[: len(content) // 2])
        else:
            client.sendall(head + content)
        if point == "decode":
            wait_until_running(server, len(neighbours) + 1)
            time.sleep(0.1)
            if streams:
                assert client.recv(64).startswith(b"HTTP/1.1 200")
        if point == "choices":
            wait_until_running(server, 4)
        if point == "queued":
            wait_until_waiting(server, 1)
        time.sleep(0.05)
    assert all(one.result(30).text.endswith("data: [DONE]\n\n") for one in neighbours)
    server.wait_until_idle()
    wanted = sorted(["length"] * len(neighbours) + ([] if point == "head" else ["disconnect"]))
    lines = new_lines(server, before, len(wanted))
    assert sorted(re.search(r"reason=(\S+)", line)[1] for line in lines) == wanted
    gone = [line for line in lines if "reason=disconnect" in line]
    assert all(int(re.search(r"output=(\d+)", line)[1]) < 250 * asked.get("n", 1) for line in gone)


def test_a_client_that_does_not_read_is_dropped_and_nobody_waits_for_it(server):
    before, files = len(server.log_lines()), open_files(server)
    head, content = raw(body(stream=True, max_tokens=250, n=8))
    with connect(server) as client:
        client.sendall(head + content)
        line = new_lines(server, before, 1)[0]
        assert "reason=slow_client" in line and "status=200" in line
        neighbour = server.post(COMPLETIONS, body(max_tokens=8))
        assert neighbour.status_code == 200
    server.wait_until_idle()
    wait_for_files(server, files)


def test_an_answer_that_is_not_taken_does_not_hold_its_connection(server):
    files = open_files(server)
    vocabulary = Tokenizer.find(DEMO).backend.get_vocab()
    wide = [vocabulary[max(vocabulary, key=len)]] * 240  # an answer of more bytes than the two sockets hold
    head, content = raw(body(prompt=wide, echo=True, max_tokens=2, n=8))
    with connect(server) as client:
        before = len(server.log_lines())
        client.sendall(head.replace(b"Host:", b"Connection: close\r\nHost:") + content)
        assert "reason=length" in new_lines(server, before, 1)[0]
        assert open_files(server) > files
        wait_for_files(server, files)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nHost: localh"])
def test_a_head_that_does_not_come_is_not_waited_for(server, sent):
    with connect(server) as client:
        client.sendall(sent)
        begin_s = time.monotonic()
        answer = client.recv(1000)
        assert SLOW_S / 2 < time.monotonic() - begin_s < SLOW_S * 4
        assert answer.startswith(b"HTTP/1.1 408") if sent else answer == b""


def test_a_second_request_on_a_connection_has_its_own_time_for_its_head(server):
    head, content = raw(body(max_tokens=2))
    with connect(server) as client:
        for _ in range(3):
            client.sendall(head[:30])
            time.sleep(SLOW_S / 2)
            client.sendall(head[30:] + content)
            answer = client.recv(10_000)
            assert answer.startswith(b"HTTP/1.1 200")
            while not answer.endswith(b"}"):
                answer += client.recv(10_000)
        client.sendall(head[:30])
        assert client.recv(10_000).startswith(b"HTTP/1.1 408")


def open_files(server):
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def wait_for_files(server, count):
    end_s = time.monotonic() + SLOW_S * 5
    while open_files(server) > count:
        assert time.monotonic() < end_s
        time.sleep(0.05)


def test_a_full_queue_refuses_and_says_when_to_come_again(server):
    before = len(server.log_lines())
    running = ask_all(server, [body(max_tokens=40, n=4), body(max_tokens=40, n=8)])
    wait_until_waiting(server, 8)
    refused = server.post(COMPLETIONS, body(max_tokens=1))
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "queue_full"
    assert int(refused.headers["retry-after"]) >= 1
    assert all(one.result(60).status_code == 200 for one in running)
    assert server.post(COMPLETIONS, body(max_tokens=1)).status_code == 200
    assert sorted(re.search(r"reason=(\S+)", line)[1] for line in server.log_lines()[before:]) == sorted(
        ["length"] * 3 + ["queue_full"]
    )
    server.wait_until_idle()
