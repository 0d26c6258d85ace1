"""Replicas without a model, for tests of everything around one, and processes that run jobs on them.

Answers depend on the body alone, so that any two runs of a line agree.
"""

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_jax.batch.replica import Answered, Broken
from hybrid_jax.batch.settings import BatchConfig
from hybrid_jax.batch.verb import local_runner, run_batch


@dataclass(frozen=True)
class FakeOpener:
    """delay_s: of an answer, somewhere between none and twice that. journal: gets a line for every one begun.

    killers: prompts that kill the process; breakers: that break the engine; deaths: how often the latter do.
    remember: keep the order of prompts, and beside how many others each ran.
    """

    delay_s: float = 0.0
    window: int = 8
    journal: Path | None = None
    killers: tuple[str, ...] = ()
    breakers: tuple[str, ...] = ()
    deaths: int = 10**9
    remember: bool = True

    def __call__(self) -> "FakeReplica":
        return FakeReplica(self)


class FakeReplica:
    """Answers with the prompt upside down."""

    stalled_s = 0.0

    def __init__(self, about: FakeOpener):
        self.about, self.window = about, about.window
        self.starts = self.most = self.under_way = 0
        self.beside: Counter[str] = Counter()
        self.order: list[str] = []
        self._broken = asyncio.Event()
        self._deaths = about.deaths

    async def start(self) -> None:
        self.starts += 1
        self._broken = asyncio.Event()

    async def stop(self) -> None:
        pass

    async def answer(self, url: str, body: bytes) -> Answered:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            return await self._answer(json.loads(body))
        finally:
            self.under_way -= 1

    async def _answer(self, body: dict[str, Any]) -> Answered:
        prompt = body["prompt"]
        if self.about.remember:
            self.order.append(prompt)
            self.beside[prompt] = self.under_way - 1
        if self.about.journal is not None:
            with self.about.journal.open("a") as file:
                file.write(f"{os.getpid()} {prompt}\n")
        if prompt in self.about.killers:
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt in self.about.breakers and self._deaths:
            self._deaths -= 1
            self._broken.set()
        delay_s = 2 * self.about.delay_s * (hash_of(prompt) % 100) / 100
        try:
            await asyncio.wait_for(self._broken.wait(), delay_s or 1e-6)
        except TimeoutError:
            pass
        if self._broken.is_set():
            raise Broken
        return respond(body)


def hash_of(prompt: str) -> int:
    return sum(map(ord, prompt)) * 7919


def respond(body: dict[str, Any]) -> Answered:
    prompt = body["prompt"]
    if prompt.startswith("bad"):
        return Answered(400, b'{"error":{"message":"bad","code":"invalid_value"}}')
    usage = {"prompt_tokens": len(prompt), "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
    answer = {"id": f"cmpl-{body['request_id']}", "text": prompt[::-1], "seed": body["seed"], "usage": usage}
    return Answered(200, json.dumps(answer).encode())


def line(number: int, prompt: str | None = None, **body: Any) -> str:
    """A request line."""
    body = {"prompt": f"prompt {number}" if prompt is None else prompt, "max_tokens": 4} | body
    return json.dumps({"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": body})


def write_input(folder: Path, count: int, **prompts: str) -> Path:
    """Lines from 0; `prompts` are those of single lines, by `lN`."""
    path = folder / "in.jsonl"
    path.write_text("".join(line(n, prompts.get(f"l{n}")) + "\n" for n in range(count)))
    return path


def config_of(path: Path, **changes: Any) -> BatchConfig:
    fields = {"shard_lines": 16, "seed": 7, "grace_s": 5.0} | changes
    return BatchConfig(path, path.with_name("out.jsonl"), "fake", ("fake",), **fields)


def run_fake(config: BatchConfig, opener: Callable[[], Any] | None = None) -> int:
    """A job on a replica without a model, in this process; its exit code."""
    return run_batch(config, config.input.parent / "model.json", local_runner(opener or FakeOpener()))


def exit_with_fake(config: BatchConfig, opener: FakeOpener, prepare: Callable[[], None] | None = None) -> None:
    """The same as the end of this process; `prepare` runs before it."""
    if prepare is not None:
        prepare()
    try:
        code = run_fake(config, opener)
    except (ValueError, OSError) as error:
        print(error, flush=True)
        code = 2
    os._exit(code)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def check_output(config: BatchConfig, count: int, failed: tuple[int, ...] = ()) -> None:
    """Every line exactly once, in its order and with its own answer."""
    answered = read_lines(config.output)
    numbers = [n for n in range(count) if n not in failed]
    assert [found["custom_id"] for found in answered] == [f"line-{n}" for n in numbers]
    requests = {found["custom_id"]: found["body"]["prompt"] for found in read_lines(config.input)}
    for found in answered:
        assert found["response"]["body"]["text"] == requests[found["custom_id"]][::-1]
        assert found["error"] is None
    errors = read_lines(config.folder.errors)
    assert [found["custom_id"] for found in errors] == [f"line-{n}" for n in failed]
