"""The forms of answers, as types: what the OpenAPI document says of them, and what tests hold real answers to.

Fields with a default may be missing. Knows nothing of how answers are made.
"""

from typing import Any, Literal

import msgspec

from hybrid_jax.stats import Units

FinishReason = str | None  # stop, length, tool_calls


class Form(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A form with no other fields."""


class ErrorBody(Form):
    """What went wrong. param: the field, where one is to blame."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str


class Error(Form):
    """Every refusal and failure; in a stream, its last event."""

    error: ErrorBody


class CachedTokens(Form):
    """Of the prompt, not computed again."""

    cached_tokens: int


class ReasoningTokens(Form):
    """Of the answer, markers included."""

    reasoning_tokens: int


class Usage(Form):
    """Tokens; a prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens | None = None


class TextLogprobs(Form):
    """A list entry a token. The first token of a prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Form):
    """An answer to one prompt, or a piece of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None


class Completion(Form):
    """POST /v1/completions, whole and as each event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None
    seed: int | None = None


class Function(Form):
    """arguments: JSON of an object."""

    name: str
    arguments: str


class ToolCall(Form):
    """index: in streams."""

    id: str
    type: Literal["function"]
    function: Function
    index: int | None = None


class TopToken(Form):
    """bytes: of its spelling, which may be no text by itself."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(TopToken):
    """With the most likely ones."""

    top_logprobs: list[TopToken]


class ChatLogprobs(Form):
    """A list entry a token."""

    content: list[ChosenToken]
    refusal: None = None


class Message(Form):
    """The assistant's."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Form):
    """A whole message."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None


class ChatCompletion(Form):
    """POST /v1/chat/completions, whole."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    seed: int


class Delta(Form):
    """What an event adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatDelta(Form):
    """A piece of a message."""

    index: int
    delta: Delta
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None
    stop_reason: int | str | None = None


class ChatChunk(Form):
    """POST /v1/chat/completions, each event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatDelta]
    usage: Usage | None = None
    seed: int | None = None


class Tokens(Form):
    """POST /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int


class Text(Form):
    """POST /detokenize."""

    prompt: str


class Card(Form):
    """A name of the model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class Cards(Form):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[Card]


class TokenizerInfo(Form):
    """GET /tokenizer_info."""

    eos_token: str | None
    bos_token: str | None
    pad_token: str | None
    chat_template: str | None


class Versions(Form):
    """GET /version."""

    version: str
    jax: str


class Health(Form):
    """GET /health, fine or not."""

    status: Literal["ok", "failing"]
    phase: Literal["loading", "compiling", "serving", "draining", "dead"]
    running: int
    waiting: int
    last_turn_age_s: float
    compiling: bool


class Ready(Form):
    """GET /ready, fine or not. reason: why not."""

    ready: bool
    phase: Literal["loading", "compiling", "serving", "draining", "dead"]
    reason: str | None = None


class PrefixHits(Form):
    """In tokens, since the start."""

    looked_up_tokens: int
    hit_tokens: int


class EngineView(Form):
    """GET /engine. routing: the layers, each with its kind and kernel."""

    model: str
    max_model_len: int
    phase: str
    running: int
    waiting: int
    pages: Units
    slots: Units
    prefix_cache: PrefixHits
    generated_tokens: int
    prompt_tokens: int
    steps: int
    step_s: float
    preemptions: int
    compilations_after_ready: int
    routing: dict[str, Any]
