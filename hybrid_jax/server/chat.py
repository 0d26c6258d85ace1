"""POST /v1/chat/completions: messages in, by the checkpoint's chat template, and an assistant's message out."""

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
from hybrid_jax.server.messages import encode_messages
from hybrid_jax.server.schema import ChatBody
from hybrid_jax.server.service import Service, record_of, service_of
from hybrid_jax.server.spelled import chat_logprobs
from hybrid_jax.server.stream import EventStream, pieces_or_silence, while_connected


async def chat(request: Request) -> Response:
    """Answer, whole or as a stream."""
    service = service_of(request)
    service.engine.require_serving()
    body = await read_json(request, ChatBody)
    name = service.model_name(body.model)
    params = sampling_params(body, _max_tokens(body), _logprobs(body), service.llm.default_params)
    encode = partial(encode_messages, service, body.messages, body.add_generation_prompt, body.chat_template_kwargs)
    prompt = await service.off_loop(encode)
    generation = Generation(service, record_of(request), [prompt], params, body)
    await generation.start()
    if body.stream:
        return EventStream(generation, partial(_events, name=name, body=body))
    try:
        choices = await while_connected(request.receive, generation.finish())
    finally:
        generation.close()
    answered = [_choice(service, index, choice, body) for index, choice in enumerate(choices)]
    answer = _frame(generation, "chat.completion", name, answered) | {"usage": generation.usage(), "seed": params.seed}
    return Response(msgspec.json.encode(answer), media_type="application/json")


def _max_tokens(body: ChatBody) -> int | None:
    both = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(both) > 1:
        raise bad_request("max_tokens and max_completion_tokens differ: send one of them", "max_tokens")
    return both.pop() if both else None


def _logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _frame(generation: Generation, kind: str, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{generation.id}",
        "object": kind,
        "created": generation.created,
        "model": name,
        "choices": choices,
    }


def _choice(service: Service, index: int, choice: Choice, body: ChatBody) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
        "logprobs": chat_logprobs(service.tokenizer, choice.logprobs) if body.logprobs else None,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }


async def _events(generation: Generation, name: str, body: ChatBody) -> AsyncIterator[list[Any]]:
    options = body.stream_options
    running = options is not None and bool(options.continuous_usage_stats)
    counted = running or (options is not None and bool(options.include_usage))

    def chunk(delta: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": generation.usage() if running else None} if counted else {}
        return _frame(generation, "chat.completion.chunk", name, [delta]) | usage

    role = {"role": "assistant", "content": ""}
    yield [chunk({"index": i, "delta": role, "finish_reason": None}) for i in range(len(generation.choices))]
    async for pieces in pieces_or_silence(generation):
        yield [chunk(_delta(generation.service, index, piece, body)) for index, piece in pieces]
    if counted:
        last = _frame(generation, "chat.completion.chunk", name, [])
        yield [last | {"usage": generation.usage(), "seed": generation.params.seed}]


def _delta(service: Service, index: int, piece: Piece, body: ChatBody) -> dict[str, Any]:
    return {
        "index": index,
        "delta": {"content": piece.text} if piece.text or piece.finish_reason is None else {},
        "logprobs": chat_logprobs(service.tokenizer, piece.logprobs) if body.logprobs else None,
        "finish_reason": piece.finish_reason,
        "stop_reason": piece.stop_reason,
    }
