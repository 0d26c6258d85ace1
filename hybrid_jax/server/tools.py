"""Tools of a chat: checked, offered to the template, and the grammar of calls that must be made.

Knows nothing of how models spell calls.
"""

import re
from dataclasses import dataclass
from typing import Any

from hybrid_jax.server.dialects import Schemas
from hybrid_jax.server.errors import bad_request
from hybrid_jax.server.schema import ChatBody
from hybrid_jax.server.service import Service
from hybrid_jax.server.settings import TOOLS
from hybrid_jax.server.structured import GrammarText, schema_grammar

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
FORCED_NAME = "tool_choice"
# Space where templates put it, and no other: a model that is held to a grammar can write space without end.
SPELLING = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}


@dataclass(frozen=True)
class Tools:
    """What a chat may do with tools.

    offered: as the template gets them, None for none. schemas: the parameters of each, by name. forced: the name of
    the one to call, "" for any, None where calls are free. most_calls: None for any number.
    """

    offered: list[dict[str, Any]] | None
    schemas: Schemas
    forced: str | None
    most_calls: int | None

    def grammar(self) -> GrammarText | None:
        """What holds an answer to the calls that it must make, None where there are none. Raises ApiError 400."""
        if self.forced is None:
            return None
        if self.forced:
            return schema_grammar({**self.schemas[self.forced], **SPELLING}, FORCED_NAME)
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, "parameters": schema},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
            for name, schema in self.schemas.items()
        ]
        listed: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, **SPELLING}
        if self.most_calls is not None:
            listed["maxItems"] = self.most_calls
        return schema_grammar(listed, FORCED_NAME)


def read_tools(service: Service, body: ChatBody) -> Tools:
    """The tools of a body. Raises ApiError 400 for what is none, and for a model that cannot be told of tools."""
    choice = body.tool_choice or "auto"
    offered = offered_tools(service, None if choice == "none" else body.tools)
    schemas = {tool["function"]["name"]: _parameters(tool) for tool in offered or ()}
    forced = _forced(choice, schemas)
    most_calls = 1 if body.parallel_tool_calls is False or forced else None
    if offered and forced is None and service.dialect is None:
        raise bad_request(
            "how this model spells calls is not known: use tool_choice required, or name a tool", "tools", "no_tools"
        )
    return Tools(offered, schemas, forced, most_calls)


def offered_tools(service: Service, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The tools for the template. Raises ApiError 400 for what is none."""
    if not tools:
        return None
    if len(tools) > TOOLS:
        raise bad_request(f"wanted at most {TOOLS} tools, got {len(tools)}: send fewer", "tools")
    template = service.tokenizer.chat_template
    if template is None or not template.reads_tools:
        raise bad_request("the chat template of this model takes no tools: leave them out", "tools", "no_tools")
    names = [_name(tool) for tool in tools]
    if len(set(names)) < len(names):
        raise bad_request("wanted tools of different names, got one twice: leave one out", "tools")
    return tools


def _name(tool: dict[str, Any]) -> str:
    match tool:
        case {"type": "function", "function": {"name": str(name), **rest}} if NAME.fullmatch(name):
            if isinstance(rest.get("description"), str | None) and isinstance(rest.get("parameters"), dict | None):
                return name
    raise bad_request(
        'wanted tools of {"type": "function", "function": {"name", "description", "parameters"}}, the name of 1 to 64'
        " letters, digits, dots, - or _",
        "tools",
    )


def _parameters(tool: dict[str, Any]) -> dict[str, Any]:
    """The schema of the arguments, which are an object."""
    schema: dict[str, Any] = tool["function"].get("parameters") or {}
    return schema if "type" in schema else schema | {"type": "object"}


def _forced(choice: str | dict[str, Any], schemas: Schemas) -> str | None:
    match choice:
        case "auto" | "none":
            return None
        case "required" if schemas:
            return ""
        case {"type": "function", "function": {"name": str(name)}} if name in schemas:
            return name
    raise bad_request(
        "wanted tool_choice auto, none, required with tools, or a function among them, got another", "tool_choice"
    )
