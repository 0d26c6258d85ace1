"""Renders a chat template in processes that can be ended: a template that loops or grows costs a refusal, not a server.

Knows nothing of messages or tokens.
"""

import json
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from hybrid_jax import chat_template
from hybrid_jax.chat_template import RENDERED_BYTES, Scalar, Template

RENDER_S = 5.0
START_S = 60.0  # of a process, on a busy machine
READ_BYTES = 2**16


class IsolatedTemplate:
    """The same template, rendered elsewhere. Safe to use from several threads: each has a process of its own meanwhile.

    Raises ValueError as the template itself, and where it takes longer than `render_s` or more memory than it may have.
    """

    def __init__(self, template: Template, render_s: float = RENDER_S):
        self.source, self.special_tokens, self.reads_tools = (
            template.source,
            template.special_tokens,
            template.reads_tools,
        )
        self._render_s = render_s
        self._idle: list[_Renderer] = []
        self._lock = threading.Lock()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Scalar] | None = None,
        now: datetime | None = None,
    ) -> str:
        """The text of a conversation."""
        asked = {
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "variables": variables,
            "now": None if now is None else now.isoformat(),
        }
        with self._lock:
            renderer = self._idle.pop() if self._idle else None
        renderer = renderer or _Renderer(self.source, self.special_tokens)
        try:
            answer = renderer.ask(asked, self._render_s)
        except (OSError, EOFError, TimeoutError):
            renderer.end()
            raise ValueError(
                f"the chat template took over {self._render_s:g} s or too much memory for these messages: send less"
            ) from None
        with self._lock:
            self._idle.append(renderer)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["text"]

    def close(self) -> None:
        """End the processes that are idle."""
        with self._lock:
            idle, self._idle = self._idle, []
        for renderer in idle:
            renderer.end()


class _Renderer:
    """One process."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        command = [sys.executable, "-I", chat_template.__file__]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)
        try:
            self.ask({"source": source, "special_tokens": dict(special_tokens)}, START_S)
        except (OSError, EOFError, TimeoutError):
            self.end()
            raise RuntimeError("the process that renders chat templates did not start: see its error above") from None

    def ask(self, value: dict[str, Any], limit_s: float) -> dict[str, str]:
        """Its answer. Raises TimeoutError after so many seconds, EOFError and OSError when it has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value).encode() + b"\n")
        self._process.stdin.flush()
        answer: dict[str, str] = json.loads(self._line(time.monotonic() + limit_s))
        return answer

    def _line(self, end_s: float) -> bytes:
        assert self._process.stdout is not None
        parts, size_bytes = list[bytes](), 0
        while not (parts and parts[-1].endswith(b"\n")):
            ready, _, _ = select.select([self._process.stdout], [], [], max(end_s - time.monotonic(), 0))
            if not ready:
                raise TimeoutError
            part = self._process.stdout.read1(READ_BYTES)  # type: ignore[attr-defined]
            size_bytes += len(part)
            if not part or size_bytes > 8 * RENDERED_BYTES:
                raise EOFError
            parts.append(part)
        return b"".join(parts)

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass
        self._process.wait()
