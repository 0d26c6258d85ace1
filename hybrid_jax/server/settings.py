"""What the server is told at its start, checked. Knows nothing of models."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

BODY_BYTES = 8 * 2**20
BODY_IDLE_S = 30.0
HEAD_S = 10.0  # for all of the head of a request
HEADER_BYTES = 64 * 2**10  # of all of a request's, as they are sent
HEADERS = 100
JSON_LEVELS = 128  # of lists and objects within each other in a body
PROMPTS = 128
MESSAGES = 4096
TOOLS = 128
CHOICES = 128
CHARACTERS_PER_TOKEN = 16  # a text longer than this many times the context is refused before it is tokenized
KEEP_ALIVE_S = 15.0
QUEUE_TIMEOUT_S = 600.0
SLOW_CLIENT_S = 60.0  # for a client to make room for what it is to be sent


@dataclass(frozen=True)
class ServerConfig:
    """How the server listens and when it gives up. Raises ValueError for a value out of range.

    names: of the model, the first one in answers. api_keys: any of them opens every route; none leaves all open.
    shutdown_timeout_s: running requests may finish for so long after SIGTERM.
    stall_timeout_s: `/health` fails when the engine took no turn for so long.
    watchdog_timeout_s: the process ends with exit code 1 when the engine took no turn for so long.
    queue_timeout_s: a request that waited so long for its turn ends with a 503.
    strict_fields: unknown fields are refused even where they could not change an answer.
    """

    names: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    shutdown_timeout_s: float = 30.0
    stall_timeout_s: float = 60.0
    watchdog_timeout_s: float = 300.0
    strict_fields: bool = False
    queue_timeout_s: float = QUEUE_TIMEOUT_S

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"wanted port from 0 to 65535, got {self.port}: take 8000, or 0 for a free one")
        if any(not key or not key.isascii() or key != key.strip() for key in self.api_keys):
            raise ValueError("wanted API keys of ASCII characters without spaces around, got another: make a new key")
        for name in ("shutdown_timeout_s", "stall_timeout_s", "watchdog_timeout_s", "queue_timeout_s"):
            if not 0 <= getattr(self, name) < 1e9:
                raise ValueError(f"wanted {name} of at least 0, got {getattr(self, name)}: set seconds")
        if self.queue_timeout_s == 0:
            raise ValueError("wanted queue_timeout_s above 0, got 0: no request could get a turn")

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def read_keys(path: Path | None) -> tuple[str, ...]:
    """The keys of a file, one a line. Raises ValueError where a file holds none."""
    if path is None:
        return ()
    keys = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not keys:
        raise ValueError(f"wanted a key a line in {path.name}, got none: write one, or leave the flag out")
    return keys
