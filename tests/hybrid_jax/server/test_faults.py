"""What a server promises when its engine breaks, holds over real HTTP: each story is a process of its own."""

import concurrent.futures
import re
import signal
import sys
import time

import httpx2
import pytest

from tests.hybrid_jax.server.faulty import Mark
from tests.hybrid_jax.server.live import Live, free_port, launch

COMPLETIONS = "/v1/completions"
pytestmark = pytest.mark.slow


def start_faulty(folder, device, *flags):
    port = free_port()
    return launch(
        folder, port, sys.executable, "-m", "tests.hybrid_jax.server.faulty", device, "--port", str(port), *flags
    )


@pytest.fixture
def oracle(tmp_path, request):
    """A server on the oracle; ended by force where the test did not end it."""
    server = start_faulty(tmp_path, "oracle", *getattr(request, "param", ()))
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def flags(*given):
    return pytest.mark.parametrize("oracle", [given], indirect=True)


def body(mark=Mark.NOTHING, k=0, max_tokens=200, **fields):
    return {"prompt": [int(mark), k, 7], "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0} | fields


def ask_all(server: Live, bodies):
    """A thread for each; what they got, or that the connection broke."""
    pool = concurrent.futures.ThreadPoolExecutor(len(bodies))
    return [pool.submit(server.post, COMPLETIONS, one) for one in bodies]


def wait_until_running(server, count):
    end_s = time.monotonic() + 20
    while server.metric("vllm:num_requests_running") < count:
        assert time.monotonic() < end_s
        time.sleep(0.02)


def stick(server):
    """Two requests, one of which sticks a step."""
    stream = ask_all(server, [body(max_tokens=250, stream=True)])
    wait_until_running(server, 1)
    whole = ask_all(server, [body(Mark.STALL, 1)])
    while server.get("/health").json()["last_turn_age_s"] < 0.3:
        time.sleep(0.02)
    return stream + whole


def tokens(answer):
    return answer.json()["choices"][0]["text"]


def logprobs(answer):
    return answer.json()["choices"][0]["logprobs"]["token_logprobs"]


# ------------------------------------------------------------------------------------------- the engine ends with them


@pytest.mark.parametrize(("mark", "k"), [(Mark.RAISE, 4), (Mark.EXHAUST_TWICE, 0)])
def test_a_step_that_raises_answers_everybody_and_ends_the_process_with_1(oracle, mark, k):
    running = ask_all(oracle, [body(), body(stream=True)])
    wait_until_running(oracle, 2)
    (broken,) = ask_all(oracle, [body(mark, k)])
    begin_s = time.monotonic()
    assert oracle.process.wait(15) == 1
    assert time.monotonic() - begin_s < 8
    whole, stream = (one.result(10) for one in running)
    for answer in (whole, broken.result(10)):
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_dead"
    assert stream.status_code == 200 and '"engine_dead"' in stream.text and "[DONE]" not in stream.text
    assert oracle.reasons(3) == ["engine_dead"] * 3
    log = oracle.log_path.read_text()
    assert re.search(r"the engine broke with these requests in flight: \['\w+-0', ", log) and "told to b" in log


@flags("--stall", "0.7", "--watchdog", "3", "--step", "0.05")
def test_a_step_that_sticks_fails_health_then_ends_the_process_with_1(oracle):
    assert oracle.get("/health").status_code == 200
    stuck = stick(oracle)
    end_s = time.monotonic() + 10
    while (health := oracle.get("/health")).status_code == 200:
        assert time.monotonic() < end_s
        time.sleep(0.05)
    said = health.json()
    assert said["status"] == "failing" and 0.7 < said["last_turn_age_s"] < 3 and said["running"] >= 1
    assert oracle.process.wait(15) == 1
    stream, whole = (one.result(10) for one in stuck)
    assert whole.status_code == 500 and '"engine_dead"' in stream.text and "[DONE]" not in stream.text
    assert oracle.reasons(2) == ["engine_stuck"] * 2
    log = oracle.log_path.read_text()
    assert "with these requests in flight: ['" in log and re.search(r"File .*faulty.py.* in submit", log)


# ------------------------------------------------------------------------------------------------- the engine goes on


def test_a_full_device_is_emptied_once_and_nothing_is_lost(oracle):
    running = ask_all(oracle, [body(max_tokens=120), body(max_tokens=120, stream=True)])
    wait_until_running(oracle, 2)
    for mark in (Mark.EXHAUST, Mark.EXHAUST_LATE):  # the oracle raises where a history is not continued
        answer = oracle.post(COMPLETIONS, body(mark, 4, max_tokens=20))
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 20
    whole, stream = (one.result(30) for one in running)
    assert whole.json()["usage"]["completion_tokens"] == 120 and stream.text.endswith("data: [DONE]\n\n")
    assert oracle.metric("vllm:num_preemptions_total") >= 2
    assert oracle.reasons(4) == ["length"] * 4
    assert oracle.log_path.read_text().count("ran out of memory") == 2
    oracle.wait_until_idle()


def test_no_number_in_one_row_ends_that_request_alone_and_its_memory_is_good_again(tmp_path, compiled):
    server = start_faulty(tmp_path, "demo", "--compiled", str(compiled))
    try:
        server.wait_until_ready()
        asked = [body(prompt=[3, 50 + i, 90], max_tokens=40, logprobs=1) for i in range(3)]
        alone = _run_beside(server, asked, Mark.NOTHING)
        beside = _run_beside(server, asked, Mark.NAN)
        assert alone.pop().status_code == 200
        failed = beside.pop()
        assert failed.status_code == 500 and failed.json()["error"]["code"] == "model_error"
        for one, other in zip(alone, beside, strict=True):
            assert tokens(one) == tokens(other)
            assert logprobs(one) == pytest.approx(logprobs(other), abs=1e-4)  # as the steps are not of one shape
        server.wait_until_idle()
        again = _run_beside(server, asked, Mark.NOTHING)  # in the very slots and pages
        assert [tokens(one) for one in again[:3]] == [tokens(one) for one in alone]
        full = server.post(
            COMPLETIONS, body(Mark.EXHAUST_LATE, 5, prompt=[int(Mark.EXHAUST_LATE), 5, 90], max_tokens=40)
        )
        calm = server.post(COMPLETIONS, body(prompt=[int(Mark.EXHAUST_LATE), 99, 90], max_tokens=40))
        assert full.status_code == calm.status_code == 200
        server.wait_until_idle()
        assert sorted(set(server.reasons())) == ["error", "length"] and server.reasons().count("error") == 1
    finally:
        server.process.kill()
        server.process.wait()


def _run_beside(server, asked, mark):
    """The answers to all, with one more request that breaks or does not, all in the same steps."""
    found = ask_all(server, [*asked, body(mark, 9, max_tokens=40)])
    return [one.result(60) for one in found]


# ------------------------------------------------------------------------------------------------------------ signals


@flags("--shutdown", "1", "--step", "0.05")
def test_sigterm_ends_what_does_not_finish_in_time_and_the_process_with_0(oracle):
    long = ask_all(oracle, [body(max_tokens=250), body(max_tokens=250, stream=True)])
    wait_until_running(oracle, 2)
    oracle.process.send_signal(signal.SIGTERM)
    refused = oracle.post(COMPLETIONS, body(max_tokens=1))
    assert refused.status_code == 503 and refused.headers["retry-after"] and "draining" in refused.text
    ready = oracle.get("/ready")
    assert ready.status_code == 503 and "shutting down" in ready.json()["reason"]
    assert oracle.get("/health").status_code == 200
    assert oracle.process.wait(10) == 0
    whole, stream = (one.result(5) for one in long)
    assert whole.status_code == 503 and whole.json()["error"]["code"] == "abort"
    assert '"abort"' in stream.text and "[DONE]" not in stream.text
    assert sorted(oracle.reasons()) == ["abort", "abort", "draining"]


@flags("--step", "0.05")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once_even_where_the_engine_is_stuck(oracle, number):
    stuck = stick(oracle)
    oracle.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert oracle.process.poll() is None
    begin_s = time.monotonic()
    oracle.process.send_signal(number)
    assert oracle.process.wait(10) == 128 + number
    assert time.monotonic() - begin_s < 3
    for one in stuck:
        assert '"abort"' in one.result(5).text
    assert oracle.reasons(2) == ["abort"] * 2


def test_the_port_is_open_while_the_model_is_loaded(tmp_path):
    server = start_faulty(tmp_path, "oracle", "--slow-load")
    try:
        while not _listens(server):
            assert server.process.poll() is None, server.log_path.read_text()
            time.sleep(0.05)
        health, ready = server.get("/health"), server.get("/ready")
        assert (health.status_code, health.json()["phase"]) == (200, "loading")
        assert ready.status_code == 503 and "being loaded" in ready.json()["reason"]
        for path in (COMPLETIONS, "/v1/chat/completions", "/tokenize"):
            refused = server.post(path, body(max_tokens=1))
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "loading"
        server.wait_until_ready()
        assert server.post(COMPLETIONS, body(max_tokens=1)).status_code == 200
        assert server.reasons(3) == ["loading", "loading", "length"]
    finally:
        server.process.kill()
        server.process.wait()


def test_sigterm_while_the_model_is_loaded_ends_at_once_with_0(tmp_path):
    server = start_faulty(tmp_path, "oracle", "--slow-load")
    while not _listens(server):
        time.sleep(0.05)
    server.process.send_signal(signal.SIGTERM)
    begin_s = time.monotonic()
    assert server.process.wait(10) == 0
    assert time.monotonic() - begin_s < 5


def _listens(server):
    try:
        return server.get("/health").status_code > 0
    except httpx2.TransportError:
        return False


@flags("--queue", "0.5", "--step", "0.05")
def test_who_waits_too_long_for_a_turn_gets_a_503_and_the_others_go_on(oracle):
    running = ask_all(oracle, [body(max_tokens=200) for _ in range(4)])
    wait_until_running(oracle, 4)
    whole, stream = ask_all(oracle, [body(), body(stream=True)])
    refused = whole.result(20)
    assert refused.status_code == 503 and refused.headers["retry-after"]
    assert refused.json()["error"]["code"] == "queue_timeout"
    assert '"queue_timeout"' in stream.result(20).text and "[DONE]" not in stream.result(20).text
    assert [one.result(30).status_code for one in running] == [200] * 4
    assert sorted(oracle.reasons(6)) == ["length"] * 4 + ["queue_timeout"] * 2
    assert oracle.metric('hybrid_jax_requests_finished_total{reason="queue_timeout"}') == 2
    oracle.wait_until_idle()
