"""The life of a server process: listen, compile, serve, drain, end with an exit code.

Exit codes: 0 drained after a signal; 1 the engine broke or got stuck. Bad settings raise before anything listens.
"""

import asyncio
import contextlib
import faulthandler
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from functools import partial

import uvicorn

from hybrid_jax.llm import LLM
from hybrid_jax.server.app import build_app
from hybrid_jax.server.engine_thread import EngineThread
from hybrid_jax.server.errors import unavailable
from hybrid_jax.server.metrics import Metrics
from hybrid_jax.server.service import Service
from hybrid_jax.server.settings import HEADER_BYTES, ServerConfig

log = logging.getLogger("hybrid_jax.server")
POLL_S = 0.05
BACKLOG = 2048  # connections that wait to be accepted
LAST_WORDS_S = 5  # for answers that are on their way when the server closes


class _Server(uvicorn.Server):
    """uvicorn, with signals left to `Process`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class Process:
    """One server from start to end."""

    def __init__(self, llm: LLM, config: ServerConfig):
        self._config = config
        metrics = Metrics(config.names[0])
        loop = asyncio.get_running_loop()
        self._engine = EngineThread(llm, loop, self._close)
        metrics.watch(lambda: self._engine.stats)
        app = build_app(Service(llm, self._engine, config, metrics))
        self._server = _Server(_uvicorn_config(app, config))
        self._draining: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Serve until a signal or the engine's death; the exit code. Raises ValueError for an address in use."""
        listening = _listen(self._config)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, partial(self._on_signal, number))
        self._engine.start()
        watchdog = asyncio.create_task(self._watch())
        try:
            await self._server.serve([listening])
        finally:
            watchdog.cancel()
        died = self._engine.phase == "dead"
        if not died:
            await asyncio.to_thread(self._engine.stop)
        log.info("ended" if not died else "ended, since the engine broke")
        return int(died)

    def _close(self) -> None:
        self._server.should_exit = True

    def _on_signal(self, number: int) -> None:
        """The first signal drains, the second ends at once what still runs."""
        if self._draining is None:
            log.info(f"{signal.Signals(number).name}: draining for up to {self._config.shutdown_timeout_s:g} s")
            self._engine.drain()
            self._draining = asyncio.create_task(self._drain())
        else:
            self._engine.fail_all(unavailable("the server ends now: try another one", "abort", "abort"))
            self._close()

    async def _drain(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.shutdown_timeout_s):
                while self._engine.live:
                    await asyncio.sleep(POLL_S)
        self._engine.fail_all(unavailable("the server ends: try another one", "abort", "abort"))
        self._close()

    async def _watch(self) -> None:
        """End a process whose engine is stuck: nothing in it can be trusted to end by itself."""
        while self._engine.beat_age_s <= self._config.watchdog_timeout_s:
            await asyncio.sleep(1)
        log.critical(f"the engine took no turn for {self._engine.beat_age_s:.0f} s: where its threads stand follows")
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        os._exit(1)


def _listen(config: ServerConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ValueError(
            f"wanted to listen on {config.host} port {config.port}, got {error.strerror}: take another port"
        ) from None


def _uvicorn_config(app: object, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        loop="asyncio",
        http="h11",  # bounds the headers, which the faster parser does not
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_graceful_shutdown=LAST_WORDS_S,
    )


def _start_log() -> None:
    """One line an event on standard error: ours, and uvicorn's, which says where it listens."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for logger in (log, logging.getLogger("uvicorn.error")):
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        logger.propagate = False


async def _serve(llm: LLM, config: ServerConfig) -> int:
    return await Process(llm, config).run()


def serve(llm: LLM, config: ServerConfig) -> int:
    """Serve a loaded model until a signal; the exit code."""
    _start_log()
    if not config.api_keys and not config.on_loopback:
        log.warning("everybody who reaches this port can use the model: set --api-key-file")
    return asyncio.run(_serve(llm, config))
