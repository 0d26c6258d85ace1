"""Messages of a conversation: checked, and turned into token ids by the checkpoint's chat template."""

from typing import Any

from hybrid_jax.server.errors import bad_request
from hybrid_jax.server.service import Service
from hybrid_jax.server.settings import CHARACTERS_PER_TOKEN, MESSAGES

ROLES = ("system", "developer", "user", "assistant")
FIELDS = {"role", "content", "name", "reasoning_content", "reasoning"}
SILENT: tuple[Any, ...] = (None, [], {}, "")  # what the official client's own answers hold in fields that say nothing


def encode_messages(
    service: Service, messages: list[dict[str, Any]], add_generation_prompt: bool, variables: dict[str, Any] | None
) -> list[int]:
    """Token ids of a conversation. Raises ApiError 400, and ValueError with the template's own words."""
    if not 1 <= len(messages) <= MESSAGES:
        raise bad_request(f"wanted 1 to {MESSAGES} messages, got {len(messages)}", "messages")
    plain = [_plain(message) for message in messages]
    characters, longest = sum(_characters(message) for message in plain), service.llm.max_model_len
    if characters > longest * CHARACTERS_PER_TOKEN:
        raise bad_request(
            f"wanted messages of at most {longest * CHARACTERS_PER_TOKEN} characters, got {characters}: shorten them",
            "messages",
            "context_length_exceeded",
        )
    return service.tokenizer.encode_chat(plain, None, add_generation_prompt, variables)


def _characters(message: dict[str, str]) -> int:
    return sum(map(len, message.values()))


def _plain(message: dict[str, Any]) -> dict[str, str]:
    """A message whose every value is a text."""
    for name, value in message.items():
        if name not in FIELDS and value not in SILENT:
            raise bad_request(f"messages with {name[:64]!r} are not supported: leave it out", "messages")
    if message.get("role") not in ROLES:
        raise bad_request(f"wanted a role among {', '.join(ROLES)}, got {str(message.get('role'))[:64]!r}", "messages")
    plain = {"role": message["role"], "content": _text(message.get("content"))}
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    for name, value in (("name", message.get("name")), ("reasoning_content", reasoning)):
        if value is not None:
            if not isinstance(value, str):
                raise bad_request(f"wanted {name} of a message as a text", "messages")
            plain[name] = value
    return plain


def _text(content: Any) -> str:
    """A text, or the texts of a list of parts, a line each."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(_is_text(part) for part in content):
        return "\n".join(part["text"] for part in content)
    raise bad_request('wanted content as a text or a list of {"type": "text", "text": …}: send only text', "messages")


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
