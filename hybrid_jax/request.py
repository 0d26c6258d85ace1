"""What a user asks for and what comes back: sampling parameters, a request, its outputs.

Everything here is a value: checked when it is made, never changed afterwards. Knows nothing of text (`tokenizer.py`),
of the schedule (the engine) or of devices (`sampling.py`), and imports no JAX.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

GREEDY_BELOW = 1e-5  # a temperature under this one takes the most likely token
MAX_TEMPERATURE = 2.0
MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 256  # of one stop string
MAX_STOP_TOKEN_IDS = 16
INT32_END = 2**31  # token ids, counts and limits are int32 on the device

# What a step says of each row, as a number on the device and as a `finish_reason` here. ERROR: the row's logits left
# nothing to draw from (a NaN, an infinity, or every token masked).
RUNNING, STOP, LENGTH, ERROR = range(4)
FinishReason = Literal["stop", "length", "error"]
FINISH_REASONS: tuple[FinishReason | None, ...] = (None, "stop", "length", "error")


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends. Raises ValueError for anything out of range.

    temperature: 0 to 2; under 1e-5 the most likely token is taken, the lowest id on ties.
    top_k: only the k most likely tokens; 0 or -1 is off (kept as 0).
    top_p: only the fewest most likely tokens whose probabilities reach p, of what top_k left; 1 is off.
    min_p: only tokens at least this many times as likely as the most likely one; 0 is off.
    seed: 64-bit signed; the same seed draws the same tokens from the same logits. None takes fresh entropy.
    stop: up to four strings that end the text; it is cut before the match (kept as a tuple).
    stop_token_ids: up to 16 ids that end the request, beside the model's own (kept as a tuple).
    max_tokens: most tokens to generate; None is the rest of the context.
    min_tokens: no stop id and no stop string before so many tokens.
    ignore_eos: the model's own end ids do not end the request; `stop_token_ids` still do.
    include_stop_str_in_output: the text keeps the stop string that ended it.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        self._set("temperature", _number("temperature", self.temperature, 0.0, MAX_TEMPERATURE))
        self._set("top_p", _number("top_p", self.top_p, 0.0, 1.0))
        self._set("min_p", _number("min_p", self.min_p, 0.0, 1.0))
        if self.top_p == 0.0:
            raise ValueError("wanted top_p above 0 and at most 1, got 0: use temperature=0 for the most likely token")
        self._set("top_k", max(_integer("top_k", self.top_k, -1, INT32_END - 1), 0))
        self._set("stop", _stop_strings(self.stop))
        self._set("stop_token_ids", _stop_token_ids(self.stop_token_ids))
        _flag("ignore_eos", self.ignore_eos)
        _flag("include_stop_str_in_output", self.include_stop_str_in_output)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        self._check_lengths()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the one moment at which a frozen value may be put in its final form

    def _check_lengths(self) -> None:
        _integer("min_tokens", self.min_tokens, 0, INT32_END - 1)
        if self.max_tokens is None:
            return
        _integer("max_tokens", self.max_tokens, 1, INT32_END - 1)
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"wanted min_tokens up to max_tokens={self.max_tokens}, got {self.min_tokens}: lower it")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken and nothing is drawn."""
        return self.temperature < GREEDY_BELOW


@dataclass(frozen=True)
class Request:
    """One sequence to generate: the part that never changes while it runs. Made by `make_request`.

    token_limit: most tokens to generate, with the context's end already counted in.
    seed: `params.seed`, or the entropy that was taken instead; with `choice` it replays the draws.
    choice: which of several answers to one prompt this is; they share a seed and differ in their draws.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    token_limit: int
    seed: int
    choice: int = 0


def make_request(
    request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams, max_model_len: int, choice: int = 0
) -> Request:
    """Settle what `params` leaves open: the limit of tokens and the seed. `max_model_len` counts prompt and output.

    Raises ValueError for an empty prompt, a token id that is not an int32, a negative choice, and a prompt that leaves
    no room in the context or not as much as `max_tokens` and `min_tokens` ask for.
    """
    prompt = tuple(_integer("prompt token id", token, 0, INT32_END - 1) for token in prompt_token_ids)
    if not prompt:
        raise ValueError("wanted at least one prompt token, got none: start from the model's begin token")
    return Request(
        id=request_id,
        prompt_token_ids=prompt,
        params=params,
        token_limit=_token_limit(len(prompt), params, max_model_len),
        seed=secrets.randbits(63) if params.seed is None else params.seed,
        choice=_integer("choice", choice, 0, INT32_END - 1),
    )


@dataclass(frozen=True)
class CompletionOutput:
    """One answer to a prompt, so far or whole.

    finish_reason: None while it runs.
    stop_reason: the stop string or the entry of `stop_token_ids` that ended it; None for the model's own end ids.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None


@dataclass(frozen=True)
class RequestOutput:
    """The answers to one prompt. `prompt` is None for a request given as token ids.

    cached_tokens: how many tokens of the prompt were already computed.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[CompletionOutput]
    cached_tokens: int
    finished: bool


def _token_limit(prompt_tokens: int, params: SamplingParams, max_model_len: int) -> int:
    room = max_model_len - prompt_tokens
    asked = max(params.max_tokens or 1, params.min_tokens)
    if asked > room:
        raise ValueError(
            f"wanted at most max_model_len={max_model_len} tokens, got {prompt_tokens} in the prompt and {asked} to"
            " generate: shorten the prompt, ask for fewer tokens or raise max_model_len"
        )
    return room if params.max_tokens is None else params.max_tokens


def _number(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"wanted {name} as a number, got {value!r}: pass {low:g} to {high:g}")
    if not low <= value <= high:  # a NaN fails this too
        raise ValueError(f"wanted {name} from {low:g} to {high:g}, got {value!r}: bring it into that range")
    return float(value)


def _integer(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"wanted {name} as an integer, got {value!r}: pass {low} to {high}")
    if not low <= value <= high:
        raise ValueError(f"wanted {name} from {low} to {high}, got {value}: bring it into that range")
    return value


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"wanted {name} as True or False, got {value!r}: pass one of the two")


def _stop_strings(stop: object) -> tuple[str, ...]:
    strings = _items("stop", [stop] if isinstance(stop, str) else stop)
    if len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"wanted at most {MAX_STOP_STRINGS} stop strings, got {len(strings)}: drop some")
    return tuple(_stop_string(string) for string in strings)


def _stop_string(string: object) -> str:
    if not isinstance(string, str) or not 1 <= len(string) <= MAX_STOP_CHARACTERS:
        raise ValueError(
            f"wanted stop strings of 1 to {MAX_STOP_CHARACTERS} characters, got {str(string)[:40]!r}: shorten it"
        )
    return string


def _stop_token_ids(ids: object) -> tuple[int, ...]:
    items = _items("stop_token_ids", ids)
    if len(items) > MAX_STOP_TOKEN_IDS:
        raise ValueError(f"wanted at most {MAX_STOP_TOKEN_IDS} stop_token_ids, got {len(items)}: drop some")
    return tuple(_integer("each of stop_token_ids", item, 0, INT32_END - 1) for item in items)


def _items(name: str, value: object) -> list[object]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise ValueError(f"wanted {name} as a list or tuple, got {value!r}: put it in brackets")
    return list(value)
