"""POST /v1/completions: texts or token ids in, text out."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from hybrid_jax.server.body import read_json
from hybrid_jax.server.constraining import constrainer
from hybrid_jax.server.engine_thread import Piece
from hybrid_jax.server.errors import bad_request
from hybrid_jax.server.generation import Choice, Generation, sampling_params
from hybrid_jax.server.schema import CompletionBody
from hybrid_jax.server.service import Service, record_of, service_of
from hybrid_jax.server.settings import CHARACTERS_PER_TOKEN, PROMPTS
from hybrid_jax.server.spelled import completion_logprobs, prompt_logprobs
from hybrid_jax.server.stream import EventStream, pieces_or_silence, start, while_connected
from hybrid_jax.server.structured import read_grammar


async def complete(request: Request) -> Response:
    """Answer, whole or as a stream."""
    service = service_of(request)
    service.engine.require_serving()
    body = await read_json(request, CompletionBody)
    name = service.model_name(body.model)
    nothing = body.echo and body.max_tokens == 0  # scores of the prompt alone
    params = sampling_params(body, 1 if nothing else body.max_tokens, body.logprobs, service.llm.default_params)
    if body.logprobs is not None or body.echo:
        service.tokenizer  # noqa: B018  they are given with the text of tokens
    prompts = await service.off_loop(partial(_encode, service, body))
    constrain = await constrainer(service, read_grammar(body), may_open=False)
    generation = Generation(service, record_of(request), prompts, params, body, constrain)
    echoes = await while_connected(request.receive, _echoes(service, prompts, body)) if body.echo else []
    if nothing:
        generation.skip()
    else:
        await start(request.receive, generation)
    if body.stream:
        return EventStream(generation, partial(_events, name=name, body=body, echoes=echoes))
    try:
        choices = await while_connected(request.receive, generation.finish())
    finally:
        generation.close()
    each = len(choices) // len(prompts)
    answered = [
        _choice(service, index, choice, body, echoes[index // each] if echoes else None)
        for index, choice in enumerate(choices)
    ]
    answer = _frame(generation, name, answered) | {"usage": generation.usage(), "seed": params.seed}
    return Response(msgspec.json.encode(answer), media_type="application/json")


def _encode(service: Service, body: CompletionBody) -> list[list[int]]:
    """Token ids of each prompt. Raises ApiError 400 for anything that is no prompt."""
    prompt = body.prompt
    listed: list[Any] = [prompt] if isinstance(prompt, str) or (prompt and type(prompt[0]) is int) else prompt
    if not 1 <= len(listed) <= PROMPTS:
        raise bad_request(f"wanted 1 to {PROMPTS} prompts, got {len(listed)}", "prompt")
    return [_encode_one(service, one, body.add_special_tokens) for one in listed]


def _encode_one(service: Service, prompt: Any, add_special_tokens: bool) -> list[int]:
    longest = service.llm.max_model_len * CHARACTERS_PER_TOKEN
    match prompt:
        case str() if len(prompt) <= longest:
            return service.tokenizer.encode(prompt, add_special_tokens)
        case str():
            raise bad_request(
                f"wanted a prompt of at most {longest} characters, got {len(prompt)}: shorten it",
                "prompt",
                "context_length_exceeded",
            )
        case list() if all(type(token) is int for token in prompt):
            return prompt
    raise bad_request("wanted prompts that are texts, or lists of token ids: correct the list", "prompt")


@dataclass(frozen=True)
class Echo:
    """A prompt as it is given back: its text and, where asked for, the form of its log-probabilities."""

    text: str
    logprobs: dict[str, Any] | None

    @property
    def length(self) -> int:
        """Characters of its tokens, which is where the offsets of the answer begin."""
        return sum(map(len, self.logprobs["tokens"])) if self.logprobs else 0


async def _echoes(service: Service, prompts: list[list[int]], body: CompletionBody) -> list[Echo]:
    """What each prompt is given back as. Its scores are computed anew, whatever is cached."""
    texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    found = []
    for index, prompt in enumerate(prompts):
        given = texts[index] if isinstance(texts[index], str) else None
        decode = partial(service.tokenizer.decode, prompt, skip_special_tokens=False)
        text = await service.off_loop(decode) if given is None else given
        logprobs = None
        if body.logprobs is not None:
            scores = await service.engine.score(prompt, body.logprobs)
            logprobs = await service.off_loop(partial(prompt_logprobs, service.tokenizer, prompt, scores))
        found.append(Echo(text, logprobs))
    return found


def _frame(generation: Generation, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": f"cmpl-{generation.id}",
        "object": "text_completion",
        "created": generation.created,
        "model": name,
        "choices": choices,
    }


def _choice(service: Service, index: int, choice: Choice, body: CompletionBody, echo: Echo | None) -> dict[str, Any]:
    logprobs = None
    if body.logprobs is not None:
        offset = echo.length if echo else 0
        logprobs = _joined(echo, completion_logprobs(service.tokenizer, choice.logprobs, offset))
    return {
        "index": index,
        "text": (echo.text if echo else "") + "".join(choice.text),
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }


def _joined(echo: Echo | None, logprobs: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of the prompt, and behind them those of the answer."""
    if echo is None or echo.logprobs is None:
        return logprobs
    return {name: echo.logprobs[name] + values for name, values in logprobs.items()}


async def _events(
    generation: Generation, name: str, body: CompletionBody, echoes: list[Echo]
) -> AsyncIterator[list[Any]]:
    options = body.stream_options
    running = options is not None and bool(options.continuous_usage_stats)
    counted = running or (options is not None and bool(options.include_usage))
    each = len(generation.choices) // max(len(echoes), 1)
    offsets = [echoes[index // each].length if echoes else 0 for index in range(len(generation.choices))]
    if echoes:
        over = generation.over
        first = [_echoed(index, echoes[index // each], over) for index in range(len(generation.choices))]
        usage = {"usage": None} if counted else {}
        yield [_frame(generation, name, [delta]) | usage for delta in first]
    async for pieces in pieces_or_silence(generation):
        events = []
        for index, piece in pieces:
            chunk = _frame(generation, name, [_delta(generation.service, index, piece, body, offsets)])
            events.append(chunk | ({"usage": generation.usage() if running else None} if counted else {}))
        yield events
    if counted:
        yield [_frame(generation, name, []) | {"usage": generation.usage(), "seed": generation.params.seed}]


def _echoed(index: int, echo: Echo, over: bool) -> dict[str, Any]:
    reason = "length" if over else None
    return {
        "index": index,
        "text": echo.text,
        "logprobs": echo.logprobs,
        "finish_reason": reason,
        "stop_reason": None,
    }


def _delta(service: Service, index: int, piece: Piece, body: CompletionBody, offsets: list[int]) -> dict[str, Any]:
    logprobs = None
    if body.logprobs is not None:
        logprobs = completion_logprobs(service.tokenizer, piece.logprobs, offsets[index])
        offsets[index] += sum(map(len, logprobs["tokens"]))
    return {
        "index": index,
        "text": piece.text,
        "logprobs": logprobs,
        "finish_reason": piece.finish_reason,
        "stop_reason": piece.stop_reason,
    }
