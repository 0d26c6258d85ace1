"""Who answers lines: what the job asks of a replica, and the one that is a server's routes without a socket.

A line means what the server means, since the server's own routes answer it, in this process. Knows nothing of files.
"""

import asyncio
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import msgspec
from starlette.types import ASGIApp, Message

from hybrid_jax.config import EngineConfig
from hybrid_jax.llm import LLM
from hybrid_jax.server.app import build_app
from hybrid_jax.server.engine_thread import EngineThread
from hybrid_jax.server.metrics import Metrics
from hybrid_jax.server.service import Service
from hybrid_jax.server.settings import ServerConfig

POLL_S = 0.05
FULL_QUEUE_S = 0.1  # until a line asks again
LINES_PER_ROW = 2  # half of them run, half are tokenized and wait


class Broken(Exception):
    """The engine broke under this line; whether the line is to blame is not known."""


@dataclass(frozen=True)
class Answered:
    """A whole answer of the server."""

    status: int
    body: bytes


class Replica(Protocol):
    """One model that answers."""

    window: int
    """Most lines under way."""

    async def start(self) -> None:
        """Get ready, for the first time or after it broke. Raises RuntimeError where it cannot."""

    async def answer(self, url: str, body: bytes) -> Answered:
        """Answer one line. Raises Broken."""

    async def stop(self) -> None:
        """End."""

    @property
    def stalled_s(self) -> float:
        """For how long nothing has moved."""


class Opener(Protocol):
    """Makes a replica; a plain value, since it travels to other machines."""

    def __call__(self) -> Replica:
        """Load the model."""


class EngineReplica:
    """The routes of a server over one loaded model."""

    def __init__(self, llm: LLM, names: tuple[str, ...]):
        self.window = LINES_PER_ROW * llm.memory.max_num_seqs
        self._llm, self._config = llm, ServerConfig(names)
        self._engine: EngineThread | None = None
        self._app: ASGIApp | None = None

    async def start(self) -> None:
        """Compile every program, if that has not been done, and begin to take lines."""
        await self.stop()
        loop, as_long_as_it_takes = asyncio.get_running_loop(), math.inf
        engine = EngineThread(self._llm, loop, _nothing, as_long_as_it_takes)
        self._engine = engine
        self._app = build_app(Service(self._llm, engine, self._config, Metrics(self._config.names[0])))
        engine.start()
        while engine.phase == "compiling":
            await asyncio.sleep(POLL_S)
        if engine.phase == "dead":
            raise RuntimeError("the engine broke before the first line: its own words are above")

    async def stop(self) -> None:
        """End the engine's thread after its step."""
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop)
            self._engine = self._app = None

    @property
    def stalled_s(self) -> float:
        """Seconds since the engine's last turn."""
        return 0.0 if self._engine is None else self._engine.beat_age_s

    async def answer(self, url: str, body: bytes) -> Answered:
        """Ask the route. A full queue is asked again until it has room."""
        while True:
            answered = await self._ask(url, body)
            code = _error_code(answered)
            if code == "engine_dead":
                raise Broken
            if code != "queue_full":
                return answered
            await asyncio.sleep(FULL_QUEUE_S)

    async def _ask(self, url: str, body: bytes) -> Answered:
        if self._app is None:
            raise Broken
        exchange = _Exchange(body)
        await self._app(_scope(url, len(body)), exchange.receive, exchange.send)
        return Answered(exchange.status, b"".join(exchange.parts))


class _Exchange:
    """A client that sends one body and stays for the whole answer."""

    def __init__(self, body: bytes):
        self.status, self.parts = 0, list[bytes]()
        self._body, self._sent = body, False

    async def receive(self) -> Message:
        """The body; then nothing, for ever."""
        if self._sent:
            await asyncio.Event().wait()
        self._sent = True
        return {"type": "http.request", "body": self._body, "more_body": False}

    async def send(self, message: Message) -> None:
        """Take what the route answers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.parts.append(message.get("body", b""))


def _scope(url: str, size_bytes: int) -> dict[str, Any]:
    headers = {"host": "localhost", "content-type": "application/json", "content-length": str(size_bytes)}
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": url,
        "raw_path": url.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": _raw(headers),
        "client": ("batch", 0),
        "server": ("localhost", 0),
    }


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


class _Error(msgspec.Struct):
    code: str | None = None


class _Refusal(msgspec.Struct):
    error: _Error | None = None


def _error_code(answered: Answered) -> str | None:
    if answered.status < 500:
        return None
    refusal = msgspec.json.decode(answered.body, type=_Refusal)
    return refusal.error.code if refusal.error else None


def _nothing() -> None:
    """What the death of the engine needs beside the errors that its lines get."""


@dataclass(frozen=True)
class EngineOpener:
    """Loads a model by the settings of its engine."""

    model: str
    names: tuple[str, ...]
    engine: EngineConfig

    def __call__(self) -> EngineReplica:
        """Load it. Raises as `LLM` does."""
        return EngineReplica(LLM(self.model, **asdict(self.engine)), self.names)
