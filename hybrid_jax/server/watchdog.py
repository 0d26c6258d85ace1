"""Ends a process whose engine is stuck. A thread of its own, since whatever sticks may hold up the event loop too."""

import faulthandler
import logging
import sys
import threading
from collections.abc import Callable
from typing import Protocol

log = logging.getLogger("hybrid_jax.server")
LOOK_S = 1.0  # between two looks, or a quarter of the timeout where that is less
STUCK_CODE = 1


class Watched(Protocol):
    """What is looked at."""

    @property
    def beat_age_s(self) -> float:
        """For how long nothing has moved."""

    @property
    def in_flight(self) -> list[str]:
        """The requests that wait for it."""


class Watchdog:
    """Looks at an engine until `stop`.

    A beat that is older than timeout_s: where all threads stand goes to the log, `tell` has some seconds to say it to
    the clients, and `leave` gets the exit code.
    """

    def __init__(
        self,
        engine: Watched,
        timeout_s: float,
        tell: Callable[[], None],
        last_words_s: float,
        leave: Callable[[int], None],
    ):
        self._engine, self._timeout_s, self._tell = engine, timeout_s, tell
        self._last_words_s, self._leave = last_words_s, leave
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more. Whoever is being told may call it, to leave sooner."""
        self._stopped.set()

    def _watch(self) -> None:
        pause_s = min(LOOK_S, self._timeout_s / 4)
        while (age_s := self._engine.beat_age_s) <= self._timeout_s:
            if self._stopped.wait(pause_s):
                return
        waiting = self._engine.in_flight
        log.critical(f"the engine took no turn for {age_s:.0f} s with these requests in flight: {waiting}")
        log.critical("where the threads stand:")
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        self._tell()
        self._stopped.wait(self._last_words_s)
        self._leave(STUCK_CODE)
