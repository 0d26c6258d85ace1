"""How models spell thinking and calls of tools: one row a dialect, chosen by what the chat template itself spells.

Knows nothing of models by name, nor of HTTP. A body that is no call gives no call; nothing here raises for what a model
wrote. Every scan is linear.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Call:
    """A call of a tool: its name, and its arguments as JSON."""

    name: str
    arguments: str


Schemas = Mapping[str, Mapping[str, Any]]  # the parameters of each tool by its name


@dataclass(frozen=True)
class Dialect:
    """How a call is spelled: between `open` and `close`, read by `read`, which gives no call for a body that is none.

    silent: texts around calls that say nothing. id_form: how the id of a call is made of a random `key`, its `name` and
    its `index`; some templates spell it out to the model.
    """

    open: str
    close: str
    read: Callable[[str, Schemas], list[Call]]
    silent: tuple[str, ...] = ()
    id_form: str = "call_{key}"

    @property
    def markers(self) -> tuple[str, ...]:
        """All that must reach the parser as text."""
        return self.open, self.close, *self.silent


def find_dialect(template: str) -> Dialect | None:
    """The dialect that a chat template spells, None if none of ours."""
    return next((dialect for marker, dialect in DIALECTS if marker in template), None)


# ---------------------------------------------------------------------------------------------------------- JSON bodies


def read_json_calls(body: str, schemas: Schemas) -> list[Call]:
    """Objects with `name` and `arguments`: one, several in a row, or a list of them."""
    calls: list[Call] = []
    for value in _json_values(body):
        for one in value if isinstance(value, list) else [value]:
            call = _json_call(one)
            if call is None:
                return []
            calls.append(call)
    return calls


def _json_values(body: str) -> list[Any]:
    """The JSON values of which a text consists, separated by space; `[None]` if it is something else."""
    decoder, found, place = json.JSONDecoder(), list[Any](), 0
    while place < len(body):
        if body[place] in " \t\r\n":
            place += 1
            continue
        try:
            value, place = decoder.raw_decode(body, place)
        except (ValueError, RecursionError):
            return [None]
        found.append(value)
    return found


def _json_call(value: Any) -> Call | None:
    match value:
        case {"name": str(name), "arguments": dict(arguments)} if name:
            return _call(name, arguments)
        case {"name": str(name), "arguments": str(text)} if name and isinstance(parse_json(text), dict):
            return _call(name, parse_json(text))
        case {"name": str(name)} if name and "arguments" not in value:
            return _call(name, {})
    return None


def parse_json(text: str) -> Any:
    """The value of a JSON text, None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _call(name: str, arguments: Mapping[str, Any]) -> Call:
    return Call(name, json.dumps(arguments, ensure_ascii=False))


# -------------------------------------------------------------------------------------------------------- tagged bodies


def read_tagged_calls(body: str, schemas: Schemas) -> list[Call]:
    """`<function=NAME>` with `<parameter=NAME>` and values as text, which take the type that the tool's schema says."""
    calls: list[Call] = []
    rest = body.strip()
    while rest:
        if not rest.startswith("<function="):
            return []
        head, _, rest = rest.removeprefix("<function=").partition(">")
        inner, closed, rest = rest.partition("</function>")
        parameters = _tagged_parameters(inner) if closed else None
        if parameters is None or not head.strip():
            return []
        name = head.strip()
        stated = schemas.get(name, {}).get("properties")
        types = stated if isinstance(stated, dict) else {}
        calls.append(_call(name, {key: _typed(value, types.get(key)) for key, value in parameters.items()}))
        rest = rest.strip()
    return calls


def _tagged_parameters(text: str) -> dict[str, str] | None:
    """Values by name, None for a text that is something else. A value keeps all but one line break at its ends."""
    found: dict[str, str] = {}
    rest = text.strip()
    while rest:
        if not rest.startswith("<parameter="):
            return None
        name, opened, rest = rest.removeprefix("<parameter=").partition(">")
        value, closed, rest = rest.partition("</parameter>")
        if not (opened and closed):
            return None
        found[name.strip()] = value.removeprefix("\n").removesuffix("\n")
        rest = rest.lstrip()
    return found


def _typed(text: str, schema: Any) -> Any:
    """The value of a text by its schema: a text stays one unless the schema asks for something else and it is that."""
    kinds = _kinds(schema)
    value = parse_json(text)
    if value is None:
        return None if text.strip() == "null" and "string" not in kinds else text
    return text if "string" in kinds and not isinstance(value, dict | list) else value


def _kinds(schema: Any) -> set[str]:
    """The types that a schema names; text where it names none."""
    stated = schema.get("type") if isinstance(schema, dict) else None
    kinds = {stated} if isinstance(stated, str) else {k for k in stated if isinstance(k, str)} if stated else set()
    listed = [*schema.get("anyOf", []), *schema.get("oneOf", [])] if isinstance(schema, dict) else []
    for one in listed:
        kinds |= {one["type"]} if isinstance(one, dict) and isinstance(one.get("type"), str) else set()
    return kinds or {"string"}


# ----------------------------------------------------------------------------------------------------- sectioned bodies


def read_sectioned_call(body: str, schemas: Schemas) -> list[Call]:
    """`functions.NAME:INDEX`, a marker, and the arguments as JSON."""
    head, found, text = body.partition("<|tool_call_argument_begin|>")
    name = head.strip().rpartition(":")[0].removeprefix("functions.")
    arguments = parse_json(text)
    return [_call(name, arguments)] if found and name and isinstance(arguments, dict) else []


_SECTIONED = Dialect(
    "<|tool_call_begin|>",
    "<|tool_call_end|>",
    read_sectioned_call,
    ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    "functions.{name}:{index}",
)
# By what only this dialect's templates spell; the first that is there.
DIALECTS: tuple[tuple[str, Dialect], ...] = (
    ("<|tool_call_begin|>", _SECTIONED),
    ("<function=", Dialect("<tool_call>", "</tool_call>", read_tagged_calls)),
    ("<TOOLCALL>", Dialect("<TOOLCALL>", "</TOOLCALL>", read_json_calls)),
    ("<tool_calls>", Dialect("<tool_calls>", "</tool_calls>", read_json_calls)),
    ("<tool_call>", Dialect("<tool_call>", "</tool_call>", read_json_calls)),
)
