"""The server's routes without a socket, over the real engine on a device that needs no model."""

import asyncio
import json
import math
import threading
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from hybrid_jax.answer import Answer
from hybrid_jax.batch.replica import Answered, Broken, EngineReplica
from hybrid_jax.engine import Engine
from hybrid_jax.request import SamplingParams
from hybrid_jax.server.engine_thread import EngineThread, Mailbox
from hybrid_jax.step import Progress
from tests.hybrid_jax.oracle_device import OracleDevice, Setup, check_balance, make_engine


def make_llm(setup: Setup) -> tuple[Any, Engine, OracleDevice]:
    """As much of a model as a server asks for."""
    engine, device = make_engine(setup)
    llm = SimpleNamespace(
        config=SimpleNamespace(max_waiting=setup.waiting, canary=False),
        memory=SimpleNamespace(max_num_seqs=setup.rows),
        model_config=SimpleNamespace(vocabulary=2**31),
        max_model_len=256,
        tokenizer=None,
        default_params=SamplingParams(),
        engine=engine,
        stats=engine.stats,
        get_ready=lambda *_, **__: None,
        generate=lambda *_, **__: None,
    )
    return llm, engine, device


def body_of(number: int, **fields: Any) -> bytes:
    return json.dumps({"prompt": [7, 8, number], "max_tokens": 5, "seed": number, "ignore_eos": True} | fields).encode()


def with_replica(setup: Setup, story: Callable[[EngineReplica, Engine, OracleDevice], Awaitable[None]]) -> None:
    async def run() -> None:
        llm, engine, device = make_llm(setup)
        replica = EngineReplica(llm, ("model",))
        await replica.start()
        try:
            await asyncio.wait_for(story(replica, engine, device), 60)
        finally:
            await replica.stop()

    asyncio.run(run())


def test_lines_are_answered_as_the_server_answers_them() -> None:
    async def story(replica: EngineReplica, engine: Engine, device: OracleDevice) -> None:
        asked = [replica.answer("/v1/completions", body_of(n)) for n in range(12)]
        for answered in await asyncio.gather(*asked):
            found = json.loads(answered.body)
            assert answered.status == 200 and found["model"] == "model" and found["object"] == "text_completion"
            assert found["usage"]["completion_tokens"] == 5 and found["usage"]["prompt_tokens"] == 3
        assert replica.stalled_s < 30

    with_replica(Setup(), story)


def test_a_line_waits_for_its_turn_as_long_as_it_takes() -> None:
    async def story(replica: EngineReplica, engine: Engine, device: OracleDevice) -> None:
        assert replica._engine is not None and replica._engine._queue_timeout_s == math.inf
        assert (await replica.answer("/v1/completions", body_of(1))).status == 200

    with_replica(Setup(), story)


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"temperature": 9}, 400, "invalid_value"),
        ({"max_tokens": 1000}, 400, "context_length_exceeded"),
        ({"prompt": "text"}, 400, "invalid_value"),
        ({"model": "another"}, 404, "model_not_found"),
        ({"tool": 1}, 400, "unknown_field"),
        ({"prompt": "x" * 9 * 2**20}, 413, "body_too_large"),
    ],
)
def test_lines_are_refused_as_the_server_refuses_them(fields: dict[str, Any], status: int, code: str) -> None:
    async def story(replica: EngineReplica, engine: Engine, device: OracleDevice) -> None:
        answered = await replica.answer("/v1/completions", body_of(1, **fields))
        assert (answered.status, json.loads(answered.body)["error"]["code"]) == (status, code)

    with_replica(Setup(), story)


def test_a_full_queue_is_asked_again() -> None:
    async def story(replica: EngineReplica, engine: Engine, device: OracleDevice) -> None:
        found = await asyncio.gather(*(replica.answer("/v1/completions", body_of(n)) for n in range(30)))
        assert {answered.status for answered in found} == {200}

    with_replica(Setup(rows=2, waiting=1), story)


def test_a_broken_engine_is_told_apart_and_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(replica: EngineReplica, engine: Engine, device: OracleDevice) -> None:
        submit = device.submit

        def break_once(step: Any) -> Any:
            monkeypatch.setattr(device, "submit", submit)
            raise RuntimeError("out of memory")

        monkeypatch.setattr(device, "submit", break_once)
        asked = [replica.answer("/v1/completions", body_of(n)) for n in range(6)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(each, Broken) for each in found)
        with pytest.raises(Broken):
            await replica.answer("/v1/completions", body_of(1))
        await replica.start()
        answered: Answered = await replica.answer("/v1/completions", body_of(1))
        assert answered.status == 200
        check_balance(engine)

    with_replica(Setup(), story)


@pytest.mark.parametrize("when", ["running", "just handed over"])
def test_a_line_that_is_taken_back_leaves_the_engine(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(replica: EngineReplica, engine: Engine, device: OracleDevice) -> None:
        taken_back, step, add = threading.Event(), engine.step, EngineThread.add

        def first_step_waits() -> list[Progress]:
            assert taken_back.wait(60)
            return step()

        async def add_then_cancel(self: EngineThread, answers: Sequence[Answer], mailbox: Mailbox) -> None:
            await add(self, answers, mailbox)
            task.cancel()

        monkeypatch.setattr(engine, "step", first_step_waits)
        if when == "just handed over":
            monkeypatch.setattr(EngineThread, "add", add_then_cancel)
        task = asyncio.ensure_future(replica.answer("/v1/completions", body_of(1, max_tokens=200)))
        while not engine.unfinished:
            await asyncio.sleep(0.001)
        if when == "running":
            await asyncio.sleep(0.05)
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        taken_back.set()
        monkeypatch.setattr(EngineThread, "add", add)
        assert (await replica.answer("/v1/completions", body_of(2))).status == 200
        while engine.unfinished:
            await asyncio.sleep(0.001)
        assert engine.stats().generated_tokens < 100
        assert replica._engine is not None and replica._engine.live == 0
        check_balance(engine)

    with_replica(Setup(), story)
