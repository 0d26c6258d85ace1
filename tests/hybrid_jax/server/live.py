"""A real server process on the demo model, for tests: start it, ask it, read its log."""

import os
import re
import socket
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import httpx2

KEY = "test-key"
READY_S = 600  # compiling on busy cores


@dataclass(frozen=True)
class Live:
    """A running server."""

    process: subprocess.Popen[bytes]
    url: str
    log_path: Path

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path, headers={"Authorization": f"Bearer {KEY}"}, timeout=30)

    def post(self, path: str, body: object) -> httpx2.Response:
        return httpx2.post(self.url + path, json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=120)

    def metric(self, name: str) -> float:
        """The value of the first series whose line begins so."""
        text = self.get("/metrics").text
        found = re.search(rf"^{re.escape(name)}\S* (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def log_lines(self) -> list[str]:
        """The lines of requests for answers."""
        return [line for line in self.log_path.read_text().splitlines() if "route='POST /v1/" in line]

    def reasons(self, count: int = 0) -> list[str]:
        """Why each of them ended, once `count` have: a line is written after the answer has gone."""
        end_s = time.monotonic() + 10
        while True:
            found = [re.search(r"reason=(\S+)", line) for line in self.log_lines()]
            reasons = [one[1] for one in found if one is not None]
            if len(reasons) >= count or time.monotonic() > end_s:
                return reasons
            time.sleep(0.05)

    def wait_until_ready(self) -> None:
        """Until it takes requests. One that cannot is ended."""
        end_s = time.monotonic() + READY_S
        while not _answers(f"{self.url}/ready"):
            if self.process.poll() is not None or time.monotonic() > end_s:
                self.process.kill()
                raise AssertionError(f"the server did not get ready:\n{self.log_path.read_text()}")
            time.sleep(0.2)

    def wait_until_idle(self) -> None:
        """Until nothing runs, waits or is held by a request."""
        end_s = time.monotonic() + 30
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        held = ('hybrid_jax_pages{state="used"}', 'hybrid_jax_state_slots{state="used"}')
        while any(self.metric(name) for name in (*names, *held)):
            assert time.monotonic() < end_s, self.get("/metrics").text
            time.sleep(0.1)


def start(folder: Path, compiled: Path, *flags: str, model: str = "demo") -> Live:
    """A server that is ready. `compiled`: folder of compiled programs, which several servers share."""
    (folder / "keys").write_text(f"another-key\n{KEY}\n")
    port = free_port()
    command = [sys.executable, "-m", "hybrid_jax.cli", "serve", model, "--port", str(port)]
    command += ["--api-key-file", str(folder / "keys"), "--compilation-cache", str(compiled)]
    command += ["--decode-steps", "4", "--dtype", "float32"]
    command += ["--max-num-seqs", "4", "--max-model-len", "256", "--max-num-batched-tokens", "64", "--max-waiting", "8"]
    live = launch(folder, port, *command, *flags)
    live.wait_until_ready()
    return live


def free_port() -> int:
    """A port that nobody listens on now."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def launch(folder: Path, port: int, *command: str) -> Live:
    """A server that has just been started by a command."""
    log_path = folder / "log"
    environment = os.environ | {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    return Live(process, f"http://127.0.0.1:{port}", log_path)


def _answers(url: str) -> bool:
    try:
        return httpx2.get(url).status_code == 200
    except httpx2.TransportError:
        return False
