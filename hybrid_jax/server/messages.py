"""Messages of a conversation: checked, and turned into token ids by the checkpoint's chat template."""

import json
from typing import Any

from hybrid_jax.server.dialects import parse_json
from hybrid_jax.server.errors import bad_request
from hybrid_jax.server.service import Service
from hybrid_jax.server.settings import CHARACTERS_PER_TOKEN, MESSAGES, TOOLS

ROLES = ("system", "developer", "user", "assistant", "tool")
FIELDS = {"role", "content", "name", "reasoning_content", "reasoning", "tool_calls", "tool_call_id"}
SILENT: tuple[Any, ...] = (None, [], {}, "")  # what the official client's own answers hold in fields that say nothing


def encode_messages(
    service: Service,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    add_generation_prompt: bool,
    variables: dict[str, Any] | None,
) -> list[int]:
    """Token ids of a conversation. Raises ApiError 400, and ValueError with the template's own words."""
    if not 1 <= len(messages) <= MESSAGES:
        raise bad_request(f"wanted 1 to {MESSAGES} messages, got {len(messages)}", "messages")
    plain = [_plain(message) for message in messages]
    longest = service.llm.max_model_len
    characters = sum(len(json.dumps(value, ensure_ascii=False)) for value in (*plain, *(tools or ())))
    if characters > longest * CHARACTERS_PER_TOKEN:
        raise bad_request(
            f"wanted messages of at most {longest * CHARACTERS_PER_TOKEN} characters, got {characters}: shorten them",
            "messages",
            "context_length_exceeded",
        )
    return service.tokenizer.encode_chat(plain, tools, add_generation_prompt, variables)


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose every value is a text, but for calls of tools."""
    for name, value in message.items():
        if name not in FIELDS and value not in SILENT:
            raise bad_request(f"messages with {name[:64]!r} are not supported: leave it out", "messages")
    if message.get("role") not in ROLES:
        raise bad_request(f"wanted a role among {', '.join(ROLES)}, got {str(message.get('role'))[:64]!r}", "messages")
    calls = message.get("tool_calls") or []
    silent = bool(calls) and message.get("content") is None
    plain: dict[str, Any] = {"role": message["role"], "content": "" if silent else _text(message.get("content"))}
    if calls:
        plain["tool_calls"] = _calls(message["role"], calls)
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    named = {name: message.get(name) for name in ("name", "tool_call_id")}
    for name, value in (*named.items(), ("reasoning_content", reasoning)):
        if value is not None:
            if not isinstance(value, str):
                raise bad_request(f"wanted {name} of a message as a text", "messages")
            plain[name] = value
    return plain


def _calls(role: str, calls: Any) -> list[dict[str, Any]]:
    """Calls with their arguments as an object, which is what templates read."""
    if role != "assistant" or not isinstance(calls, list) or len(calls) > TOOLS:
        raise bad_request(f"wanted tool_calls as a list of at most {TOOLS} in a message of the assistant", "messages")
    return [_call(call) for call in calls]


def _call(call: Any) -> dict[str, Any]:
    match call:
        case {"function": {"name": str(name), "arguments": str() | dict() as stated}}:
            arguments = parse_json(stated) if isinstance(stated, str) else stated
            key = call.get("id")
            if isinstance(arguments, dict) and isinstance(key, str | None):
                spelled = {"type": "function", "function": {"name": name, "arguments": arguments}}
                return spelled if key is None else spelled | {"id": key}
    raise bad_request(
        'wanted tool_calls of {"id", "type": "function", "function": {"name", "arguments"}} with arguments as JSON of'
        " an object",
        "messages",
    )


def _text(content: Any) -> str:
    """A text, or the texts of a list of parts, a line each."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(_is_text(part) for part in content):
        return "\n".join(part["text"] for part in content)
    raise bad_request('wanted content as a text or a list of {"type": "text", "text": …}: send only text', "messages")


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
