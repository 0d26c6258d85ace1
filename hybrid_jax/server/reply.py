"""One assistant's message as it grows: thinking, content, calls, in the form of OpenAI's answers and deltas."""

import secrets
from collections.abc import Sequence
from typing import Any

from hybrid_jax.server.dialects import THINK_CLOSE, THINK_OPEN, Call
from hybrid_jax.server.parsing import AnswerParser, Parsed, Reading
from hybrid_jax.server.service import Service


class Reply:
    """The message of one choice. `take` all of its text in any pieces, with the reason of its end in the last.

    reasoning_tokens: ids of thinking, its markers included, where they are tokens of their own.
    """

    def __init__(self, service: Service, reading: Reading):
        self.finish_reason: str | None = None
        self.reasoning_tokens = 0
        self._reading, self._parser, self._whole = reading, AnswerParser(reading), Parsed()
        self._calls: list[dict[str, Any]] = []
        find = service.tokenizer.backend.token_to_id
        self._open, self._close = find(THINK_OPEN), find(THINK_CLOSE)
        self._thinking = reading.inside and self._close is not None
        markers = [*((THINK_OPEN, THINK_CLOSE) if reading.thinks else ())]
        markers += reading.dialect.markers if reading.dialect else ()
        self.spelled_ids = frozenset(one for one in map(find, markers) if one is not None)

    def take(self, text: str, token_ids: Sequence[int], finish_reason: str | None) -> dict[str, Any]:
        """Take in what is new of the answer; what it adds, as a delta."""
        self._count(token_ids)
        parsed = self._parser.feed(text)
        if finish_reason is not None:
            parsed = parsed.then(self._parser.finish())
        self._whole = self._whole.then(parsed)
        begun = len(self._calls)
        self._calls += [self._spelled(call, begun + index) for index, call in enumerate(parsed.calls)]
        self.finish_reason = "tool_calls" if finish_reason == "stop" and self._calls else finish_reason
        return self._delta(parsed, begun, finish_reason is None)

    def _delta(self, parsed: Parsed, begun: int, goes_on: bool) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if parsed.reasoning:
            delta["reasoning_content"] = parsed.reasoning
        if parsed.calls:
            delta["tool_calls"] = [{"index": begun + i} | call for i, call in enumerate(self._calls[begun:])]
        if parsed.content or (goes_on and not delta):
            delta["content"] = parsed.content
        return delta

    def choice(self, index: int, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """The whole of it."""
        whole = self._whole
        content = None if self._calls and not whole.content else whole.content
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._reading.thinks:
            message["reasoning_content"] = whole.reasoning or None
        if self._calls:
            message["tool_calls"] = self._calls
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}

    def _spelled(self, call: Call, index: int) -> dict[str, Any]:
        dialect = self._reading.dialect
        form = dialect.id_form if dialect else "call_{key}"
        key = form.format(key=secrets.token_hex(12), name=call.name, index=index)
        return {"id": key, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}

    def _count(self, token_ids: Sequence[int]) -> None:
        if not self._reading.thinks or self._close is None:
            return
        for token in token_ids:
            if token == self._open and not self.reasoning_tokens:
                self._thinking = True
            self.reasoning_tokens += self._thinking
            if token == self._close:
                self._thinking = False
