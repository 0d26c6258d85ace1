"""From the fields of a body to choices that run, and from their pieces to what was answered in all.

The same for completions and chat. Knows nothing of the form of answers.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrid_jax.answer import Answer
from hybrid_jax.constraint import Constraint
from hybrid_jax.request import SamplingParams, TokenLogprobs, make_request
from hybrid_jax.server.engine_thread import Mailbox, Piece
from hybrid_jax.server.errors import ApiError, bad_request
from hybrid_jax.server.record import CLIENT_ID, Record
from hybrid_jax.server.schema import Sampling
from hybrid_jax.server.service import Service
from hybrid_jax.server.settings import CHOICES

SEED_BITS = 53  # of seeds that the server draws: every JSON reader keeps such a number exact
SALT_CHARACTERS = 128


def sampling_params(
    body: Sampling, max_tokens: int | None, logprobs: int | None, default: SamplingParams
) -> SamplingParams:
    """The request's own values, else those of the checkpoint, else OpenAI's. Raises ApiError 400."""
    try:
        return SamplingParams(
            temperature=default.temperature if body.temperature is None else body.temperature,
            top_k=default.top_k if body.top_k is None else body.top_k,
            top_p=default.top_p if body.top_p is None else body.top_p,
            min_p=default.min_p if body.min_p is None else body.min_p,
            seed=secrets.randbits(SEED_BITS) if body.seed is None else body.seed,
            stop=() if body.stop is None else body.stop,
            stop_token_ids=body.stop_token_ids or (),
            max_tokens=max_tokens,
            min_tokens=body.min_tokens or 0,
            ignore_eos=body.ignore_eos,
            include_stop_str_in_output=body.include_stop_str_in_output,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            logit_bias=body.logit_bias or {},
            allowed_token_ids=body.allowed_token_ids,
            logprobs=logprobs,
        )
    except ValueError as error:
        raise bad_request(str(error)) from None


def _free(prompt: list[int]) -> None:
    """No constraint."""


@dataclass
class Choice:
    """What one choice has given so far."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Generation:
    """The choices of one HTTP request: `start`, then `take` until all are over, and `close` in any case.

    prompts: token ids of each; choice i of prompt p has the index p * n + i.
    constrain: makes what limits the tokens of each choice, from its prompt. spelled_ids: as of `Answer`.
    Raises ApiError 400 for what does not fit the context, the vocabulary or the limits.
    """

    def __init__(
        self,
        service: Service,
        record: Record,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        body: Sampling,
        constrain: Callable[[list[int]], Constraint | None] = _free,
        spelled_ids: frozenset[int] = frozenset(),
    ):
        count = 1 if body.n is None else body.n
        if not 1 <= count <= CHOICES or count * len(prompts) > CHOICES:
            raise bad_request(f"wanted 1 to {CHOICES} choices of all prompts together, got {count} of each", "n")
        if body.stream_options is not None and not body.stream:
            raise bad_request("stream_options needs stream: true", "stream_options")
        if len(body.cache_salt or "") > SALT_CHARACTERS:
            raise bad_request(f"wanted cache_salt of at most {SALT_CHARACTERS} characters", "cache_salt")
        if body.request_id is not None:
            if not CLIENT_ID.fullmatch(body.request_id):
                raise bad_request("wanted request_id of 1 to 64 letters, digits, - or _", "request_id")
            record.id = body.request_id
        self.service, self.record, self.params, self.id = service, record, params, record.id
        self._constrain, self._spelled_ids, self._started = constrain, spelled_ids, False
        self.created = int(time.time())
        self.choices = [Choice() for _ in range(count * len(prompts))]
        self.prompt_tokens = sum(map(len, prompts))
        self._first_choices = range(0, len(self.choices), count)  # those whose hits count: the others find the first's
        self._answers = [
            self._answer(index, prompt, body) for index, prompt in enumerate(p for p in prompts for _ in range(count))
        ]
        self._mailbox = Mailbox()
        record.prompt_tokens, record.choices = self.prompt_tokens, len(self.choices)

    def _answer(self, index: int, prompt: list[int], body: Sampling) -> Answer:
        llm, params = self.service.llm, self.params
        asked = max(params.max_tokens or 1, params.min_tokens)
        if len(prompt) + asked > llm.max_model_len:
            message = (
                f"wanted at most {llm.max_model_len} tokens of context, got {len(prompt)} in the prompt and {asked} to"
                " generate: shorten the prompt or lower max_tokens"
            )
            raise bad_request(message, code="context_length_exceeded")
        vocabulary = llm.model_config.vocabulary
        for token in (*prompt, *dict(params.logit_bias), *(params.allowed_token_ids or ())):
            if not 0 <= token < vocabulary:
                raise bad_request(f"wanted token ids from 0 to {vocabulary - 1}, got {token}: is it the right model?")
        if params.stop:
            self.service.tokenizer  # noqa: B018  stop strings need text
        try:
            request = make_request(
                f"{secrets.token_hex(8)}-{index}",
                prompt,
                params,
                llm.max_model_len,
                choice=index,
                priority=body.priority,
                cache_salt=body.cache_salt or "",
                constraint=self._constrain(prompt),
            )
        except ValueError as error:
            raise bad_request(str(error)) from None
        return Answer(request, None, llm.tokenizer, self._spelled_ids)

    async def start(self) -> None:
        """Hand all choices to the engine; where that fails, none of them."""
        await self.service.engine.add(self._answers, self._mailbox)
        self._started = True

    def skip(self) -> None:
        """Generate nothing: every choice is over as it stands."""
        for choice in self.choices:
            choice.finish_reason = "length"
        self.record.end("length")

    @property
    def over(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finish_reason is not None for choice in self.choices)

    async def take(self, timeout_s: float | None = None) -> list[tuple[int, Piece]]:
        """Wait for new pieces, counted in. Raises TimeoutError, and ApiError 500 where the model's numbers broke."""
        async with asyncio.timeout(timeout_s):
            pieces = await self._mailbox.take()
        for index, piece in pieces:
            self._count(self.choices[index], piece)
        if any(choice.finish_reason == "error" for choice in self.choices):
            raise ApiError(
                500, "the scores of the model, or the grammar, left no token for this request", "model_error", "error"
            )
        if self.over:
            self.record.end("+".join(sorted({str(choice.finish_reason) for choice in self.choices})))
        return pieces

    def _count(self, choice: Choice, piece: Piece) -> None:
        now = time.monotonic()
        self.record.first_token_s = self.record.first_token_s or now
        self.record.last_token_s = now
        choice.token_ids += piece.token_ids
        choice.cached_tokens = piece.cached_tokens
        choice.finish_reason, choice.stop_reason = piece.finish_reason, piece.stop_reason
        self.record.output_tokens += len(piece.token_ids)
        self.record.cached_tokens = self.cached_tokens

    @property
    def cached_tokens(self) -> int:
        """Of the prompts, each counted once."""
        return sum(self.choices[index].cached_tokens for index in self._first_choices)

    async def finish(self) -> list[Choice]:
        """Run to the end; all that was answered."""
        while not self.over:
            for index, piece in await self.take():
                self.choices[index].text.append(piece.text)
                self.choices[index].logprobs += piece.logprobs
        return self.choices

    def close(self) -> None:
        """Take back what still runs."""
        if self._started:
            self._started = False
            self.service.engine.end(self._answers, self._mailbox)

    def usage(self) -> dict[str, Any]:
        """So far."""
        output = sum(len(choice.token_ids) for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": output,
            "total_tokens": self.prompt_tokens + output,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
