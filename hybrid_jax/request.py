"""What a user asks for and what comes back: sampling parameters, a request, its outputs.

Everything here is a value: checked when it is made, never changed afterwards. Knows nothing of text (`tokenizer.py`),
of the schedule (the engine) or of devices (`sampling.py`), and imports no JAX.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from hybrid_jax.constraint import Constraint

GREEDY_BELOW = 1e-5  # a temperature under this one takes the most likely token
MAX_TEMPERATURE = 2.0
MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 256  # of one stop string
MAX_STOP_TOKEN_IDS = 16
MAX_PENALTY = 2.0  # presence and frequency, either sign; repetition
MAX_LOGIT_BIAS = 100.0  # either sign
MAX_LOGIT_BIASES = 300
MAX_LOGPROBS = 20  # alternatives of one token
INT32_END = 2**31  # token ids, counts and limits are int32 on the device

# What a step says of each row, as a number on the device and as a `finish_reason` here. ERROR: the row's logits left
# nothing to draw from (a NaN, an infinity, or every token masked). "abort" is the host's word alone: a user took the
# request back.
RUNNING, STOP, LENGTH, ERROR = range(4)
FinishReason = Literal["stop", "length", "error", "abort"]
FINISH_REASONS: tuple[FinishReason | None, ...] = (None, "stop", "length", "error")


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends. Raises ValueError for anything out of range.

    What needs the size of the vocabulary is not checked here: that every id is below it is the engine's check.

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
    presence_penalty: -2 to 2, taken off the logit of every token that was generated before; 0 is off.
    frequency_penalty: -2 to 2, taken off once for each time that the token was generated; 0 is off.
    repetition_penalty: above 0 and at most 2; the logit of a token of the prompt or the output is divided by it where
      positive, else multiplied; 1 is off.
    logit_bias: id -> -100 to 100, added to the logit; at most 300 (kept as pairs, sorted by id).
    allowed_token_ids: no other token is chosen, not even one with a bias (kept as a tuple); None allows all.
    logprobs: give the log-probability of each token, with those of so many of the most likely ones, 0 to 20.
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
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()
    allowed_token_ids: Sequence[int] | None = None
    logprobs: int | None = None

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
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        self._settle_shape()
        self._check_lengths()

    def _settle_shape(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            self._set(name, _number(name, getattr(self, name), -MAX_PENALTY, MAX_PENALTY))
        self._set("repetition_penalty", _number("repetition_penalty", self.repetition_penalty, 0.0, MAX_PENALTY))
        if self.repetition_penalty == 0.0:
            raise ValueError("wanted repetition_penalty above 0 and at most 2, got 0: use 1 for no penalty")
        self._set("logit_bias", _logit_bias(self.logit_bias))
        self._set("allowed_token_ids", _allowed_token_ids(self.allowed_token_ids))

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

    @property
    def shaped(self) -> bool:
        """Whether the logits are changed before a token is chosen: by a penalty, a bias or a set of allowed tokens."""
        penalised = self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0
        return penalised or bool(self.logit_bias) or self.allowed_token_ids is not None


@dataclass(frozen=True)
class Request:
    """One sequence to generate: the part that never changes while it runs. Made by `make_request`.

    token_limit: most tokens to generate, with the context's end already counted in.
    seed: `params.seed`, or the entropy that was taken instead; with `choice` it replays the draws.
    choice: which of several answers to one prompt this is; they share a seed and differ in their draws.
    priority: the smaller runs first.
    cache_salt: requests with different salts never share what was computed for a prompt.
    constraint: what limits its tokens as they are drawn. It changes with them, so each request has its own.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    token_limit: int
    seed: int
    choice: int = 0
    priority: int = 0
    cache_salt: str = ""
    constraint: Constraint | None = field(default=None, repr=False, compare=False)

    @property
    def shaped(self) -> bool:
        """Whether its logits are changed before a token is chosen."""
        return self.params.shaped or self.constraint is not None

    @property
    def takes_likeliest(self) -> bool:
        """Whether each token is the likeliest of the logits as they are, and nothing is asked beside it."""
        return self.params.greedy and not self.shaped and not self.params.min_tokens and self.params.logprobs is None

    @property
    def watched(self) -> bool:
        """Whether the host must see each token before the next is drawn."""
        return bool(self.params.stop) or self.constraint is not None


def make_request(
    request_id: str,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    max_model_len: int,
    choice: int = 0,
    priority: int = 0,
    cache_salt: str = "",
    constraint: Constraint | None = None,
) -> Request:
    """Settle what `params` leaves open: the limit of tokens and the seed. `max_model_len` counts prompt and output.

    Raises ValueError for an empty prompt, a token id that is not an int32, a negative choice, a priority beyond 64
    bits, a salt that is no string, a constraint beside a set of allowed tokens, and a prompt that leaves no room in the
    context or not as much as `max_tokens` and `min_tokens` ask for.
    """
    prompt = tuple(_integer("prompt token id", token, 0, INT32_END - 1) for token in prompt_token_ids)
    if not prompt:
        raise ValueError("wanted at least one prompt token, got none: start from the model's begin token")
    if not isinstance(cache_salt, str):
        raise ValueError(f"wanted cache_salt as a string, got {cache_salt!r}: put it in quotes, or leave it out")
    if constraint is not None and params.allowed_token_ids is not None:
        raise ValueError("wanted a constraint or allowed_token_ids, got both: leave one out")
    return Request(
        id=request_id,
        prompt_token_ids=prompt,
        params=params,
        token_limit=_token_limit(len(prompt), params, max_model_len),
        seed=secrets.randbits(63) if params.seed is None else params.seed,
        choice=_integer("choice", choice, 0, INT32_END - 1),
        priority=_integer("priority", priority, -(2**63), 2**63 - 1),
        cache_salt=cache_salt,
        constraint=constraint,
    )


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probability (natural) of one token that was chosen, and of the most likely ones at its place.

    Both are the model's own: before masks, bias, penalties and temperature.
    top: `SamplingParams.logprobs` pairs of id and log-probability, the most likely first, the lower id on ties. The
      chosen token may be among them; then its number is the same one.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class CompletionOutput:
    """One answer to a prompt, so far or whole.

    finish_reason: None while it runs.
    stop_reason: the stop string or the entry of `stop_token_ids` that ended it; None for the model's own end ids.
    logprobs: one entry for each of `token_ids`; None where they were not asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    logprobs: tuple[TokenLogprobs, ...] | None = None


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


def _allowed_token_ids(ids: object) -> tuple[int, ...] | None:
    if ids is None:
        return None
    items = _items("allowed_token_ids", ids)
    if not items:
        raise ValueError("wanted at least one of allowed_token_ids, got none: leave it out to allow every token")
    return tuple(_integer("each of allowed_token_ids", item, 0, INT32_END - 1) for item in items)


def _logit_bias(bias: object) -> tuple[tuple[int, float], ...]:
    """Pairs of id and bias, sorted by id, from a mapping or from such pairs."""
    pairs = list(bias.items()) if isinstance(bias, Mapping) else _items("logit_bias", bias)
    if len(pairs) > MAX_LOGIT_BIASES:
        raise ValueError(f"wanted at most {MAX_LOGIT_BIASES} entries of logit_bias, got {len(pairs)}: drop some")
    settled = dict(_biased_token(pair) for pair in pairs)
    if len(settled) < len(pairs):
        raise ValueError(f"wanted one logit_bias for each id, got {len(pairs)} for {len(settled)} ids: drop the others")
    return tuple(sorted(settled.items()))


def _biased_token(pair: object) -> tuple[int, float]:
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise ValueError(f"wanted logit_bias as a mapping of ids to numbers, got the entry {pair!r}: pass {{id: bias}}")
    token, bias = pair
    return (
        _integer("each id of logit_bias", token, 0, INT32_END - 1),
        _number(f"logit_bias of id {token}", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS),
    )


def _items(name: str, value: object) -> list[object]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise ValueError(f"wanted {name} as a list or tuple, got {value!r}: put it in brackets")
    return list(value)
