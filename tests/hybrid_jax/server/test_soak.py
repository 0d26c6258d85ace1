"""The soak: a short one of many streams on the demo model, and that each thing it checks is found where it is wrong."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from scripts.soak import Seen, check

ROOT = Path(__file__).parents[3]
FLAGS = "--streams 40 --minutes 0.25 --most-tokens 20 --alone-minutes 0 --growth 0.2"
SIZES = "--max-num-seqs 4 --max-model-len 256 --max-num-batched-tokens 64 --decode-steps 4"  # of the other live servers
LINE = "request=0 route='POST /v1/completions' status=200 reason={}\n"


@pytest.mark.slow
def test_a_short_soak_holds(compiled):
    command = [sys.executable, str(ROOT / "scripts" / "soak.py"), *FLAGS.split(), *SIZES.split()]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }
    command += ["--compilation-cache", str(compiled)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0 and "all holds" in done.stdout, done.stdout + done.stderr
    assert " 0 errors" in done.stdout and " 1 answer;" in done.stdout


class Ended:
    """A process that ends as it is told."""

    def __init__(self, code):
        self.code = code

    def send_signal(self, number):
        pass

    def wait(self, timeout_s):
        return self.code


@dataclass
class Told:
    """A server that says what a test wants."""

    log: Path
    code: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def process(self):
        return Ended(self.code)

    def metric(self, name):
        return self.metrics.get(name, 0.0)


def _seen(**changed):
    whole = {"whole": 3, "left": 1, "sizes_bytes": [100] * 8, "files": [9] * 8, "canaries": ["a", "a"]}
    return Seen(**whole | changed)


def _told(folder, lines=("length",) * 5 + ("disconnect",), **changed):
    (folder / "log").write_text("".join(map(LINE.format, lines)))
    return Told(folder / "log", **changed)


def test_what_is_right_is_let_pass(tmp_path):
    assert check(_told(tmp_path), _seen(), 0.02) == []
    assert check(_told(tmp_path, ("length",) * 6), _seen(), 0.02) == []  # over before its client had left


@pytest.mark.parametrize(
    ("seen", "told", "words"),
    [
        ({}, {"metrics": {'hybrid_jax_state_slots{state="used"}': 1.0}}, "1 state_slots did not come back"),
        ({}, {"metrics": {'hybrid_jax_pages{state="used"}': 2.0}}, "2 pages did not come back"),
        ({}, {"metrics": {"hybrid_jax_compilations_after_ready": 1.0}}, "1 programs were compiled"),
        ({}, {"code": 1}, "the server ended with 1"),
        ({}, {"lines": ("length",) * 4 + ("disconnect",)}, "the log has"),
        ({}, {"lines": ("length",) * 4 + ("disconnect", "error")}, "the log has"),
        ({}, {"lines": ("length",) * 4 + ("disconnect",) * 2}, "the log has"),
        ({"sizes_bytes": [100] * 6 + [103] * 2}, {}, "memory grew"),
        ({"files": [9] * 6 + [12] * 2}, {}, "open files grew"),
        ({"canaries": ["a", "b"]}, {}, "2 different answers of 2"),
        ({"errors": ["a stream of 4 tokens"]}, {}, "1 errors, the first: a stream of 4 tokens"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, seen, told, words):
    found = check(_told(tmp_path, **told), _seen(**seen), 0.02)
    assert len(found) == 1 and words in found[0]
