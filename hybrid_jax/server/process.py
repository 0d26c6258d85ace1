"""The life of a server process: listen, load, compile, serve, drain, end with an exit code.

Exit codes: 0 drained after a signal; 1 the engine broke or got stuck; 128 and the number of the signal after a second
one. An address in use, bad settings and a model that cannot be loaded raise.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from hybrid_jax.llm import LLM
from hybrid_jax.server.app import build_app
from hybrid_jax.server.connection import Connection
from hybrid_jax.server.engine_thread import EngineThread
from hybrid_jax.server.errors import unavailable
from hybrid_jax.server.loading import build_loading_app
from hybrid_jax.server.metrics import Metrics
from hybrid_jax.server.service import Service
from hybrid_jax.server.settings import HEADER_BYTES, ServerConfig
from hybrid_jax.server.watchdog import Watchdog

log = logging.getLogger("hybrid_jax.server")
POLL_S = 0.05
BACKLOG = 2048  # connections that wait to be accepted
LAST_WORDS_S = 5  # for answers that are on their way when the server closes
SIGNALLED_CODE = 128


class _Server(uvicorn.Server):
    """uvicorn, with signals left to `Process`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class _Front:
    """The application as it is now: it changes once the model is there."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


class Process:
    """One server from start to end.

    load: gives the model, in a thread. leave: ends the process at once with an exit code.
    """

    def __init__(self, load: Callable[[], LLM], config: ServerConfig, leave: Callable[[int], None] = os._exit):
        self._load, self._config, self._leave = load, config, leave
        self._loop = asyncio.get_running_loop()
        self._metrics = Metrics(config.names[0])
        self._front = _Front(build_loading_app(config, self._metrics))
        self._server = _Server(_uvicorn_config(self._front, config))
        self._engine: EngineThread | None = None
        self._watchdog: Watchdog | None = None
        self._draining: asyncio.Task[None] | None = None
        self._refusal: BaseException | None = None  # why there is no model
        self._second_signal = 0

    async def run(self) -> int:
        """Serve until a signal or the engine's death; the exit code. Raises as loading, and for an address in use."""
        listening = _listen(self._config)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, partial(self._on_signal, number))
        threading.Thread(target=self._open, name="loader", daemon=True).start()
        await self._server.serve([listening])
        if self._watchdog is not None:
            self._watchdog.stop()
        if self._refusal is not None:
            raise self._refusal
        code = self._exit_code()
        log.info(f"ended with {code}")
        return code

    def _exit_code(self) -> int:
        if self._second_signal:
            return SIGNALLED_CODE + self._second_signal
        return int(self._engine is not None and self._engine.phase == "dead")

    def close_threads(self) -> bool:
        """End the engine's thread; whether nothing is left that would hold up the end of the process."""
        at_once = bool(self._second_signal) or self._exit_code() != 0
        return self._engine is not None and self._engine.stop(0.0 if at_once else LAST_WORDS_S)

    # ------------------------------------------------------------------------------------------------------- loading

    def _open(self) -> None:
        """Load, in a thread."""
        try:
            llm = self._load()
        except BaseException as error:
            self._say(partial(self._refuse, error))
        else:
            self._say(partial(self._opened, llm))

    def _say(self, what: Callable[[], None]) -> None:
        """Have the event loop do it, if it still turns."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(what)

    def _refuse(self, error: BaseException) -> None:
        self._refusal = error
        self._close()

    def _opened(self, llm: LLM) -> None:
        if self._draining is not None:
            return
        engine = EngineThread(llm, self._loop, self._close, self._config.queue_timeout_s)
        self._engine = engine
        self._metrics.watch(lambda: engine.stats)
        self._front.app = build_app(Service(llm, engine, self._config, self._metrics))
        stuck = partial(self._say, self._give_up)
        self._watchdog = Watchdog(engine, self._config.watchdog_timeout_s, stuck, LAST_WORDS_S, self._leave)
        engine.start()
        self._watchdog.start()

    # ------------------------------------------------------------------------------------------------------- the end

    def _close(self) -> None:
        self._server.should_exit = True

    def _give_up(self) -> None:
        """The engine is stuck."""
        if self._engine is not None:
            self._engine.give_up()
        self._close()

    def _on_signal(self, number: int) -> None:
        """The first signal drains, the second ends at once what still runs."""
        name = signal.Signals(number).name
        if self._draining is None:
            log.info(f"{name}: draining for up to {self._config.shutdown_timeout_s:g} s")
            self._draining = asyncio.create_task(self._drain())
        elif not self._second_signal:
            log.info(f"{name} again: ending at once")
            self._second_signal = number
            self._server.force_exit = True
            self._end_requests()
            self._close()

    async def _drain(self) -> None:
        if self._engine is not None:
            self._engine.drain()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.shutdown_timeout_s):
                    while self._engine.live:
                        await asyncio.sleep(POLL_S)
        self._end_requests()
        self._close()

    def _end_requests(self) -> None:
        if self._engine is not None:
            self._engine.fail_all(unavailable("the server ends: try another one", "abort", "abort"))


def _listen(config: ServerConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ValueError(
            f"wanted to listen on {config.host} port {config.port}, got {error.strerror}: take another port"
        ) from None


def _uvicorn_config(app: ASGIApp, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="asyncio",
        http=Connection,  # of h11, which bounds the headers; the faster parser does not
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
    for logger in (logging.getLogger("hybrid_jax"), logging.getLogger("uvicorn.error")):
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        logger.propagate = False


async def _serve(load: Callable[[], LLM], config: ServerConfig) -> tuple[Process, int]:
    process = Process(load, config)
    return process, await process.run()


def serve(load: Callable[[], LLM], config: ServerConfig) -> int:
    """Serve the model that `load` gives, until a signal; the exit code.

    Raises as `load`, which runs when the port is open, and ValueError for an address in use. Does not return where a
    thread is stuck or compiles: it ends the process.
    """
    _start_log()
    if not config.api_keys and not config.on_loopback:
        log.warning("everybody who reaches this port can use the model: set --api-key-file")
    process, code = asyncio.run(_serve(load, config))
    if not process.close_threads():
        sys.stderr.flush()
        os._exit(code)
    return code
