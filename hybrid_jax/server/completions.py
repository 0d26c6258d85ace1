"""POST /v1/completions: texts or token ids in, text out."""

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from hybrid_jax.server.body import read_json
from hybrid_jax.server.engine_thread import Piece
from hybrid_jax.server.errors import bad_request
from hybrid_jax.server.generation import Choice, Generation, sampling_params
from hybrid_jax.server.schema import CompletionBody
from hybrid_jax.server.service import Service, record_of, service_of
from hybrid_jax.server.settings import CHARACTERS_PER_TOKEN, PROMPTS
from hybrid_jax.server.spelled import completion_logprobs
from hybrid_jax.server.stream import EventStream, pieces_or_silence, while_connected


async def complete(request: Request) -> Response:
    """Answer, whole or as a stream."""
    service = service_of(request)
    service.engine.require_serving()
    body = await read_json(request, CompletionBody)
    name = service.model_name(body.model)
    params = sampling_params(body, body.max_tokens, body.logprobs, service.llm.default_params)
    if body.logprobs is not None:
        service.tokenizer  # noqa: B018  they are given with the text of tokens
    prompts = await service.off_loop(partial(_encode, service, body))
    generation = Generation(service, record_of(request), prompts, params, body)
    await generation.start()
    if body.stream:
        return EventStream(generation, partial(_events, name=name, body=body))
    try:
        choices = await while_connected(request.receive, generation.finish())
    finally:
        generation.close()
    answered = [_choice(service, index, choice, body) for index, choice in enumerate(choices)]
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


def _frame(generation: Generation, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": f"cmpl-{generation.id}",
        "object": "text_completion",
        "created": generation.created,
        "model": name,
        "choices": choices,
    }


def _choice(service: Service, index: int, choice: Choice, body: CompletionBody) -> dict[str, Any]:
    return {
        "index": index,
        "text": "".join(choice.text),
        "logprobs": None
        if body.logprobs is None
        else completion_logprobs(service.tokenizer, choice.logprobs, offset=0),
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }


async def _events(generation: Generation, name: str, body: CompletionBody) -> AsyncIterator[list[Any]]:
    options = body.stream_options
    running = options is not None and bool(options.continuous_usage_stats)
    counted = running or (options is not None and bool(options.include_usage))
    offsets = [0] * len(generation.choices)
    async for pieces in pieces_or_silence(generation):
        events = []
        for index, piece in pieces:
            chunk = _frame(generation, name, [_delta(generation.service, index, piece, body, offsets)])
            events.append(chunk | ({"usage": generation.usage() if running else None} if counted else {}))
        yield events
    if counted:
        yield [_frame(generation, name, []) | {"usage": generation.usage(), "seed": generation.params.seed}]


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
