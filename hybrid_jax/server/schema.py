"""Bodies of requests: their fields and types, and what becomes of fields that the server does not have.

A field that would constrain or change the answer is refused unless its value is the one that changes nothing. Other
unknown fields are ignored, or refused with `strict`. Knows nothing of the engine.
"""

import difflib
import re
from typing import Any

import msgspec
import numpy as np

from hybrid_jax.server.errors import bad_request
from hybrid_jax.server.settings import JSON_LEVELS

IGNORED = {"user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier", "store"}
CONSTRAINT = re.compile(
    r"guided|regex|grammar|schema|json|format|choice|constrain|structured|tool|function|penalt|stop"
)

# Names of fields that other servers act on, with the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),  # without tools there is nothing that could be parallel
    "functions": ([],),
    "function_call": ("none", "auto"),
    "structural_tag": (),
    "suffix": ("",),
    "best_of": (1,),
    "use_beam_search": (False,),
    "prompt_logprobs": (),
    "logprob_token_ids": (),
    "bad_words": ([],),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "truncate_prompt_tokens": (),
    "thinking_token_budget": (),
    "repetition_detection": (),
    "stream_interval": (1,),
    "length_penalty": (1,),
    "continue_final_message": (False,),
    "reasoning_effort": (),
    "chat_template": (),
    "documents": ([],),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "verbosity": ("medium",),
    "logits_processors": ([],),
    "kv_transfer_params": (),
}


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """usage in a last chunk, or running in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampling(msgspec.Struct, kw_only=True):
    """What both kinds of generation share. None is a field that was not sent."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int = 0
    cache_salt: str | None = None
    request_id: str | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class CompletionBody(Sampling, kw_only=True):
    """POST /v1/completions. prompt: a text, token ids, or a list of either."""

    prompt: str | list[Any]
    logprobs: int | None = None
    add_special_tokens: bool = True
    echo: bool = False


class ChatBody(Sampling, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


class TokenizeBody(msgspec.Struct, kw_only=True):
    """POST /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


def decode[Body: msgspec.Struct](body: bytes, kind: type[Body], strict: bool) -> tuple[Body, list[str]]:
    """The body, and the unknown fields that were ignored. Raises ApiError 400, which names the field."""
    levels = json_levels(body)
    if levels > JSON_LEVELS:
        raise bad_request(f"wanted JSON of at most {JSON_LEVELS} levels, got {levels}: flatten it", code="invalid_json")
    try:
        sent = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        known = set(kind.__struct_fields__)
        unknown = [name for name in sent if name not in known]
        for name in unknown:
            _refuse(name, sent[name], known, strict)
        return msgspec.json.decode(body, type=kind), unknown
    except msgspec.ValidationError as error:
        path = re.search(r"`\$\.?(\w+)", str(error))
        raise bad_request(str(error)[:500], path[1] if path else None, "invalid_type") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_request(f"wanted a JSON object, got {str(error)[:200]}", code="invalid_json") from None


def json_levels(body: bytes) -> int:
    """Most lists and objects that lie within each other in JSON, without recursion; anything for what is no JSON."""
    opened = body.count(b"[") + body.count(b"{")
    if opened <= JSON_LEVELS:
        return opened  # at most; the rest is worth its time only for bodies that could be too deep
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")  # from here on each quote begins or ends a text
    outside = np.frombuffer(b"".join(unescaped.split(b'"')[::2]), np.uint8)
    turns = np.isin(outside, (ord("["), ord("{"))).astype(np.int8) - np.isin(outside, (ord("]"), ord("}")))
    return int(np.cumsum(turns, dtype=np.int32).max(initial=0))


def _refuse(name: str, raw: msgspec.Raw, known: set[str], strict: bool) -> None:
    """Raise unless a field that the server does not have may be passed over."""
    value = msgspec.json.decode(raw)
    if value is None or name in IGNORED:
        return
    shown = name[:64]
    if name in REFUSED:
        if not any(type(value) is type(idle) and value == idle for idle in REFUSED[name]):
            raise bad_request(f"{shown} is not supported with this value: leave it out", shown, "unsupported_field")
        return
    if strict or CONSTRAINT.search(name.lower()):
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else "leave it out"
        raise bad_request(f"unknown field {shown!r}: {hint}", shown, "unknown_field")
