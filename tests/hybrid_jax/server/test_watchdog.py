"""When a watchdog ends a process, and when it does not."""

import threading
import time
from dataclasses import dataclass, field

from hybrid_jax.server.watchdog import Watchdog


@dataclass
class Engine:
    """One whose last turn was so long ago."""

    beat_age_s: float
    in_flight: list[str] = field(default_factory=lambda: ["r1"])


def watch(age_s, timeout_s, last_words_s=0.05):
    said, left = threading.Event(), []
    dog = Watchdog(Engine(age_s), timeout_s, said.set, last_words_s, left.append)
    dog.start()
    return dog, said, left


def test_an_engine_that_is_stuck_is_told_of_and_left(capfd):
    _, said, left = watch(5.0, 1.0)
    assert said.wait(5)
    end_s = time.monotonic() + 5
    while not left:
        assert time.monotonic() < end_s
        time.sleep(0.01)
    assert left == [1]
    assert "in _watch" in capfd.readouterr().err  # where the threads stand


def test_an_engine_that_moves_is_left_alone_until_the_watchdog_is_stopped():
    dog, said, left = watch(0.0, 0.1)
    assert not said.wait(0.3)
    dog.stop()
    dog._thread.join(5)
    assert not dog._thread.is_alive() and not left


def test_whoever_was_told_can_end_the_wait():
    dog, said, left = watch(5.0, 1.0, last_words_s=60)
    assert said.wait(5) and not left
    dog.stop()
    dog._thread.join(5)
    assert left == [1]
