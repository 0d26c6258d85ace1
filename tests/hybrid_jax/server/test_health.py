"""What /health and /ready say of an engine, by the age of its last turn."""

import asyncio
import json
import types

import msgspec
import pytest

from hybrid_jax.server import answers
from hybrid_jax.server.engine_thread import EngineThread
from hybrid_jax.server.probes import health, ready
from hybrid_jax.server.settings import ServerConfig


class Engine(EngineThread):
    """One whose last turn was so long ago."""

    beat_age_s = 0.0

    def __init__(self, phase, age_s):
        self.phase, self.beat_age_s = phase, age_s
        self.stats = types.SimpleNamespace(running=1, waiting=2)


def ask(probe, form, phase, age_s):
    service = types.SimpleNamespace(engine=Engine(phase, age_s), config=ServerConfig(("m",), stall_timeout_s=60.0))
    answer = asyncio.run(probe(types.SimpleNamespace(scope={"service": service})))
    msgspec.json.decode(answer.body, type=form)
    assert (answer.status_code == 503) == ("retry-after" in answer.headers)
    return answer.status_code, json.loads(answer.body)


@pytest.mark.parametrize(
    ("phase", "age_s", "healthy", "serving"),
    [
        ("compiling", 0.0, 200, 503),
        ("serving", 0.0, 200, 200),
        ("serving", 60.0, 200, 200),
        ("serving", 60.1, 503, 503),  # and back to the line above with the next turn: nothing is kept
        ("draining", 0.0, 200, 503),
        ("draining", 60.1, 503, 503),
        ("dead", 0.0, 503, 503),
    ],
)
def test_probes_follow_the_phase_and_the_age_of_the_last_turn(phase, age_s, healthy, serving):
    status, said = ask(health, answers.Health, phase, age_s)
    assert status == healthy and said["status"] == ("ok" if healthy == 200 else "failing")
    status, said = ask(ready, answers.Ready, phase, age_s)
    assert status == serving and said["ready"] == ("reason" not in said) == (serving == 200)


def test_a_stall_is_the_reason():
    assert "no turn for 61 s" in ask(ready, answers.Ready, "serving", 61.0)[1]["reason"]
