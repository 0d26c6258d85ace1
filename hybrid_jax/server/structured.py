"""Structured output as requests ask for it: from the fields of a body to one grammar. Knows nothing of tokens."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from hybrid_jax.server.errors import bad_request
from hybrid_jax.server.schema import Sampling

GRAMMAR_BYTES = 64 * 2**10
SCHEMA_DEPTH = 64
CHOICES_MOST = 4096
Form = Literal["schema", "regex", "lark"]
FORMS: dict[str, Form] = {"json": "schema", "regex": "regex", "grammar": "lark"}


@dataclass(frozen=True)
class GrammarText:
    """A grammar as it was sent: JSON schema, regular expression or Lark, within the limits of size and depth.

    param: the field that it came in.
    """

    form: Form
    text: str
    param: str


def read_grammar(body: Sampling) -> GrammarText | None:
    """The one grammar that a body asks for, None if none. Raises ApiError 400 for two, and for one that is none."""
    asked = [*_formats(body), *_structured(body)]
    if len(asked) > 1:
        names = " and ".join(grammar.param for grammar in asked)
        raise bad_request(f"wanted one form of structured output, got {names}: send one of them", asked[1].param)
    if asked and (body.min_tokens or body.ignore_eos or body.allowed_token_ids is not None):
        raise bad_request(
            "min_tokens, ignore_eos and allowed_token_ids are not supported with structured output: leave them out",
            asked[0].param,
            "unsupported_field",
        )
    return asked[0] if asked else None


def _formats(body: Sampling) -> Iterator[GrammarText]:
    """What `response_format` asks for."""
    stated = body.response_format
    match stated:
        case None | {"type": "text"}:
            return
        case {"type": "json_object"}:
            yield schema_grammar({"type": "object"}, "response_format")
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            yield schema_grammar(schema, "response_format")
        case _:
            raise bad_request(
                'wanted response_format of type "text", "json_object" or "json_schema" with json_schema.schema, got'
                f" another: {str(stated)[:100]}",
                "response_format",
            )


def _structured(body: Sampling) -> Iterator[GrammarText]:
    """What `structured_outputs` asks for, and the four fields that say the same."""
    inside = body.structured_outputs or {}
    names = (*FORMS, "choice")
    for name in inside:
        if name not in names:
            raise bad_request(
                f"wanted structured_outputs with one of {', '.join(names)}, got {name[:64]!r}", "structured_outputs"
            )
    if body.structured_outputs is not None and not any(value is not None for value in inside.values()):
        raise bad_request(f"wanted structured_outputs with one of {', '.join(names)}, got none", "structured_outputs")
    alone = {
        "json": body.guided_json,
        "regex": body.guided_regex,
        "grammar": body.guided_grammar,
        "choice": body.guided_choice,
    }
    for source, param in ((inside, "structured_outputs.{}"), (alone, "guided_{}")):
        for name, value in source.items():
            if value is not None:
                yield _grammar(name, value, param.format(name))


def _grammar(name: str, value: Any, param: str) -> GrammarText:
    match name, value:
        case "json", str():
            return schema_grammar(_parsed(value, param), param)
        case "json", dict():
            return schema_grammar(value, param)
        case "choice", list() if 1 <= len(value) <= CHOICES_MOST and all(isinstance(one, str) for one in value):
            return _checked("lark", "start: " + " | ".join(json.dumps(one) for one in value), param)
        case (("regex" | "grammar"), str()):
            return _checked(FORMS[name], value, param)
    raise bad_request(
        f"wanted a schema for json, a text for regex and grammar, 1 to {CHOICES_MOST} texts for choice", param
    )


def _parsed(text: str, param: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise bad_request(f"wanted a JSON schema, got {str(error)[:200]}", param) from None


def schema_grammar(schema: dict[str, Any], param: str) -> GrammarText:
    """A JSON schema. Raises ApiError 400 for one that is too deep, or has too many entries in a list."""
    level: list[Any] = [schema]
    for _ in range(SCHEMA_DEPTH):
        if any(isinstance(value, list) and len(value) > CHOICES_MOST for value in level):
            raise bad_request(f"wanted lists of at most {CHOICES_MOST} entries in a schema, got more", param)
        level = [part for value in level for part in _parts(value)]
        if not level:
            return _checked("schema", json.dumps(schema), param)
    raise bad_request(f"wanted a schema of at most {SCHEMA_DEPTH} levels, got more: flatten it", param)


def _parts(value: Any) -> list[Any]:
    match value:
        case dict():
            return list(value.values())
        case list():
            return value
    return []


def _checked(form: Form, text: str, param: str) -> GrammarText:
    size_bytes = len(text.encode("utf-8", "surrogatepass"))
    if size_bytes > GRAMMAR_BYTES:
        raise bad_request(f"wanted a grammar of at most {GRAMMAR_BYTES} bytes, got {size_bytes}: shorten it", param)
    return GrammarText(form, text, param)
