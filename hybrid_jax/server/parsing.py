"""Takes the text of an answer apart as it comes: thinking, content, calls of tools.

What comes out does not depend on how the text was cut. A call comes out whole once it is closed and well-formed; one
that never is comes out as content. Knows nothing of tokens or HTTP.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from hybrid_jax.server.dialects import THINK_CLOSE, THINK_OPEN, Call, Dialect, Schemas, parse_json

BODY_CHARACTERS = 2**18  # a longer call is content
Part = Literal["thinking", "content", "call"]


@dataclass(frozen=True)
class Parsed:
    """What a piece of text added."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[Call, ...] = ()

    def then(self, later: "Parsed") -> "Parsed":
        """Both in one."""
        return Parsed(self.reasoning + later.reasoning, self.content + later.content, self.calls + later.calls)


@dataclass(frozen=True)
class Reading:
    """What to look for in an answer.

    thinks: whether there may be thinking. inside: whether the prompt has begun it. dialect: of calls, None for none.
    schemas: the parameters of each tool. forced: whether the whole content is a call: the arguments of the tool of this
    name, or with "" a list of objects with `name` and `parameters`. most_calls: calls beyond are left out.
    """

    thinks: bool = False
    inside: bool = False
    dialect: Dialect | None = None
    schemas: Schemas = field(default_factory=dict)
    forced: str | None = None
    most_calls: int | None = None


class AnswerParser:
    """One answer. `feed` until the end, then `finish`.

    Space around thinking and around calls is left out; all other text comes out as it was.
    """

    def __init__(self, reading: Reading):
        self._reading = reading
        self._part: Part = "thinking" if reading.inside else "content"
        self._may_think = reading.thinks and not reading.inside  # nothing came yet
        self._trims = reading.inside  # whether space that comes next is left out
        self._space = ""  # that came last, and goes with the text behind it
        self._text = ""  # not taken apart yet
        self._searched = 0  # characters of it in which the end of a call was looked for
        self._calls = 0

    def feed(self, text: str) -> Parsed:
        """What is certain with this text."""
        self._text += text
        return _joined(self._turns())

    def finish(self) -> Parsed:
        """The rest, once no more text comes."""
        text = self._take(len(self._text))
        match self._part:
            case "thinking":
                return self._say(text)
            case "call":
                text = self._dialect.open + text
            case "content" if self._reading.forced is not None:
                return self._forced_calls(text)
        parsed, space = self._say(text), self._space
        self._space = ""
        return parsed.then(Parsed(content=space))

    # ---------------------------------------------------------------------------------------------------------- turns

    def _turns(self) -> Iterator[Parsed]:
        """Go on as far as the text is clear."""
        while True:
            before = self._part, len(self._text), self._may_think
            match self._part:
                case "thinking":
                    yield self._thinking()
                case "content":
                    yield self._first_content() if self._may_think else self._content()
                case "call":
                    yield self._call()
            if (self._part, len(self._text), self._may_think) == before:
                return

    def _thinking(self) -> Parsed:
        place = self._text.find(THINK_CLOSE)
        if place < 0:
            return self._say(self._take(len(self._text) - _open_length(self._text, (THINK_CLOSE,))))
        parsed = self._say(self._take(place))
        self._go_on("content", THINK_CLOSE)
        return parsed

    def _first_content(self) -> Parsed:
        """At the very start: thinking, if it begins so."""
        start = self._text.lstrip()
        if THINK_OPEN.startswith(start) and start != THINK_OPEN:
            return Parsed()
        self._may_think = False
        if start.startswith(THINK_OPEN):
            self._take(len(self._text) - len(start))
            self._go_on("thinking", THINK_OPEN)
        return Parsed()

    def _content(self) -> Parsed:
        if self._reading.forced is not None:
            return Parsed()  # it is read as a whole
        dialect = self._reading.dialect
        markers = () if dialect is None else (dialect.open, *dialect.silent)
        found = min(((self._text.find(marker), marker) for marker in markers if marker in self._text), default=None)
        if found is None:
            return self._say(self._take(len(self._text) - _open_length(self._text, markers)))
        place, marker = found
        parsed = self._say(self._take(place))
        if marker == self._dialect.open:
            self._take(len(marker))  # and the space before it waits for what this turns out to be
            self._part, self._searched = "call", 0
        else:
            self._go_on("content", marker)
        return parsed

    def _call(self) -> Parsed:
        dialect = self._dialect
        place = self._text.find(dialect.close, self._searched)
        if place < 0 and len(self._text) <= BODY_CHARACTERS + len(dialect.close):
            self._searched = max(len(self._text) - len(dialect.close) + 1, 0)
            return Parsed()
        if not 0 <= place <= BODY_CHARACTERS:
            self._part = "content"
            return self._say(dialect.open)
        body = self._take(place)
        calls = dialect.read(body, self._reading.schemas)
        if calls:
            self._go_on("content", dialect.close)
            return Parsed(calls=self._counted(calls))
        self._part = "content"
        return self._say(dialect.open + body + self._take(len(dialect.close)))

    # ----------------------------------------------------------------------------------------------------------- text

    @property
    def _dialect(self) -> Dialect:
        assert self._reading.dialect is not None
        return self._reading.dialect

    def _take(self, length: int) -> str:
        taken, self._text = self._text[:length], self._text[length:]
        return taken

    def _go_on(self, part: Part, marker: str) -> None:
        """Go on behind a marker, without the space around it."""
        self._take(len(marker))
        self._part, self._space, self._trims = part, "", True

    def _say(self, text: str) -> Parsed:
        """Text of this part; the space at its end waits."""
        text = text.lstrip() if self._trims else text
        if not text:
            return Parsed()
        self._trims = False
        kept = text.rstrip()
        if not kept:
            self._space += text
            return Parsed()
        said, self._space = self._space + kept, text[len(kept) :]
        return Parsed(reasoning=said) if self._part == "thinking" else Parsed(content=said)

    def _counted(self, calls: list[Call]) -> tuple[Call, ...]:
        most = self._reading.most_calls
        kept = calls if most is None else calls[: max(most - self._calls, 0)]
        self._calls += len(calls)
        return tuple(kept)

    def _forced_calls(self, text: str) -> Parsed:
        """The calls that the whole content is, or the content where it was cut."""
        value, name = parse_json(text), self._reading.forced
        listed = [{"name": name, "parameters": value}] if name else value
        if not isinstance(listed, list) or not listed:
            return Parsed(content=text)
        calls = [_forced_call(one) for one in listed]
        known = [call for call in calls if call is not None]
        return Parsed(calls=self._counted(known)) if len(known) == len(calls) else Parsed(content=text)


def _forced_call(value: Any) -> Call | None:
    match value:
        case {"name": str(name), "parameters": dict(parameters)}:
            return Call(name, json.dumps(parameters, ensure_ascii=False))
    return None


def _joined(parts: Iterator[Parsed]) -> Parsed:
    whole = Parsed()
    for part in parts:
        whole = whole.then(part)
    return whole


def _open_length(text: str, markers: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that begins a marker."""
    longest = min(len(text), max(map(len, markers), default=1) - 1)
    return next((n for n in range(longest, 0, -1) if any(marker.startswith(text[-n:]) for marker in markers)), 0)
