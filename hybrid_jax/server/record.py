"""What the log and the metrics say of one HTTP request. Knows nothing of engines."""

import logging
import re
import secrets
import time
from dataclasses import dataclass, field

log = logging.getLogger("hybrid_jax.server")
CLIENT_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass
class Record:
    """One HTTP request from its headers to its end; `reason` is set exactly once, by whoever ends it.

    Times are of `time.monotonic`, in seconds; 0 is one that has not come.
    """

    route: str
    client: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    began_s: float = field(default_factory=time.monotonic)
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    choices: int = 0
    status: int = 0
    reason: str = ""
    detail: str = ""

    def end(self, reason: str, detail: str = "") -> None:
        """Say why it ended; the first reason stands."""
        if not self.reason:
            self.reason, self.detail = reason, detail

    def write(self) -> None:
        """The one line in the log."""
        now = time.monotonic()
        first = f"{self.first_token_s - self.began_s:.3f}" if self.first_token_s else "-"
        log.info(
            f"request={self.id} client={self.client} route={self.route!r} status={self.status} reason={self.reason}"
            f" prompt={self.prompt_tokens} cached={self.cached_tokens} output={self.output_tokens}"
            f" ttft_s={first} total_s={now - self.began_s:.3f}" + (f" detail={self.detail!r}" if self.detail else "")
        )
