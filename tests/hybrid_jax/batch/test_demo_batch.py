"""The command on the built-in model: killed twice, and every line answered exactly once in the end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hybrid_jax.batch.replicas import read_lines

DEADLINE_S = 400  # compiling on two busy cores
PAIRS = 12


def body_of(pair: int) -> tuple[str, dict[str, Any]]:
    text = ["Once upon a time", "Dear Anna,", "The fox"][pair % 3] + f" {pair}"
    if pair % 2:
        return "/v1/completions", {"prompt": text, "max_tokens": 24, "temperature": 0}
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": text}], "max_tokens": 24, "temperature": 0}


def write_pairs(path: Path) -> None:
    """Every body twice, under two ids and far apart; one of them is refused by the server."""
    with path.open("w") as file:
        for number in range(2 * PAIRS):
            url, body = body_of(number % PAIRS)
            body |= {"temperature": 9} if number == 5 else {}
            request = {"custom_id": f"line-{number}", "method": "POST", "url": url, "body": body}
            file.write(json.dumps(request) + "\n")


def start(folder: Path, compiled: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "hybrid_jax.cli", "batch", "-i", "in.jsonl", "-o", "out.jsonl", "--model", "demo"]
    command += ["--compilation-cache", str(compiled), "--dtype", "float32", "--shard-lines", "8", "--seed", "1"]
    command += [
        "--max-num-seqs",
        "2",
        "--max-model-len",
        "128",
        "--max-num-batched-tokens",
        "64",
        "--decode-steps",
        "4",
    ]
    environment = os.environ | {
        "PYTHONPATH": os.getcwd(),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }
    with (folder / "words").open("ab") as words:
        return subprocess.Popen(command, cwd=folder, stdout=words, stderr=words, env=environment)


def begun(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("out.jsonl.work/shards/*.log"))


def wait_until(there: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not there() and process.poll() is None and time.monotonic() < end_s:
        time.sleep(0.02)


def kill_after(process: subprocess.Popen[bytes], folder: Path, more: int) -> None:
    """Kill a job when it has begun so many more lines."""
    before = begun(folder)
    wait_until(lambda: begun(folder) >= before + more, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL, (folder / "words").read_text()


@pytest.mark.slow
def test_the_demo_survives_a_signal_and_two_kills(tmp_path: Path) -> None:
    write_pairs(tmp_path / "in.jsonl")
    compiled = tmp_path / "compiled"
    loading = start(tmp_path, compiled)
    wait_until((tmp_path / "out.jsonl.work" / "manifest.json").exists, loading)
    loading.terminate()
    assert loading.wait(60) == 75, (tmp_path / "words").read_text()
    for more in (6, 9):
        kill_after(start(tmp_path, compiled), tmp_path, more)
    last = start(tmp_path, compiled)
    assert last.wait(DEADLINE_S) == 3, (tmp_path / "words").read_text()
    answers = {found["custom_id"]: found for found in read_lines(tmp_path / "out.jsonl")}
    assert list(answers) == [f"line-{n}" for n in range(2 * PAIRS) if n != 5]
    assert len(read_lines(tmp_path / "out.jsonl")) == 2 * PAIRS - 1
    (error,) = read_lines(tmp_path / "out.jsonl.errors.jsonl")
    assert error["custom_id"] == "line-5" and error["response"]["status_code"] == 400
    texts = {name: text_of(found["response"]["body"]) for name, found in answers.items()}
    for number in range(PAIRS):
        if number != 5:
            assert texts[f"line-{number}"] == texts[f"line-{number + PAIRS}"] != ""


def text_of(body: dict[str, Any]) -> str:
    choice = body["choices"][0]
    found: str = choice["message"]["content"] if "message" in choice else choice["text"]
    return found


def test_the_command_refuses_before_it_loads_a_model(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("{}\n")
    command = [sys.executable, "-m", "hybrid_jax.cli", "batch", "-i", "in.jsonl", "-o", "out.jsonl", "--model", "demo"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120)
    assert found.returncode == 2 and "line 1: " in found.stderr and "demo:" not in found.stderr
