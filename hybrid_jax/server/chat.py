"""POST /v1/chat/completions: messages in, by the checkpoint's chat template, and an assistant's message out."""

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from hybrid_jax.server.body import read_json
from hybrid_jax.server.constraining import constrainer, thinking_after
from hybrid_jax.server.engine_thread import Piece
from hybrid_jax.server.errors import bad_request
from hybrid_jax.server.generation import Generation, sampling_params
from hybrid_jax.server.messages import encode_messages
from hybrid_jax.server.parsing import Reading
from hybrid_jax.server.reply import Reply
from hybrid_jax.server.schema import ChatBody
from hybrid_jax.server.service import Service, record_of, service_of
from hybrid_jax.server.spelled import chat_logprobs
from hybrid_jax.server.stream import EventStream, pieces_or_silence, start, while_connected
from hybrid_jax.server.structured import GrammarText, read_grammar
from hybrid_jax.server.tools import Tools, read_tools


async def chat(request: Request) -> Response:
    """Answer, whole or as a stream."""
    service = service_of(request)
    service.engine.require_serving()
    body = await read_json(request, ChatBody)
    name = service.model_name(body.model)
    params = sampling_params(body, _max_tokens(body), _logprobs(body), service.llm.default_params)
    tools = read_tools(service, body)
    grammar = _grammar(body, tools)
    encode = partial(
        encode_messages, service, body.messages, tools.offered, body.add_generation_prompt, body.chat_template_kwargs
    )
    prompt = await service.off_loop(encode)
    constrain, reading = await constrainer(service, grammar, may_open=True), _reading(service, prompt, tools)
    spelled_ids = Reply(service, reading).spelled_ids
    generation = Generation(service, record_of(request), [prompt], params, body, constrain, spelled_ids)
    replies = [Reply(service, reading) for _ in generation.choices]
    await start(request.receive, generation)
    if body.stream:
        return EventStream(generation, partial(_events, name=name, body=body, replies=replies))
    try:
        choices = await while_connected(request.receive, generation.finish())
    finally:
        generation.close()
    answered = []
    for index, (choice, reply) in enumerate(zip(choices, replies, strict=True)):
        reply.take("".join(choice.text), choice.token_ids, choice.finish_reason)
        logprobs = chat_logprobs(service.tokenizer, choice.logprobs) if body.logprobs else None
        answered.append(reply.choice(index, logprobs) | {"stop_reason": choice.stop_reason})
    answer = _frame(generation, "chat.completion", name, answered)
    answer |= {"usage": _usage(generation, replies), "seed": params.seed}
    return Response(msgspec.json.encode(answer), media_type="application/json")


def _grammar(body: ChatBody, tools: Tools) -> GrammarText | None:
    stated, forced = read_grammar(body), tools.grammar()
    if stated is not None and forced is not None:
        raise bad_request(f"wanted {stated.param} or a tool that must be called, got both: send one", "tool_choice")
    if forced is not None:
        read_grammar(msgspec.structs.replace(body, guided_regex="x"))  # the fields that no grammar goes with
    return stated or forced


def _reading(service: Service, prompt: list[int], tools: Tools) -> Reading:
    thinking = thinking_after(service, prompt)
    free = bool(tools.offered) and tools.forced is None
    return Reading(
        thinks=thinking.expected,
        inside=thinking.inside,
        dialect=service.dialect if free else None,
        schemas=tools.schemas,
        forced=tools.forced,
        most_calls=tools.most_calls,
    )


def _usage(generation: Generation, replies: list[Reply]) -> dict[str, Any]:
    counted = sum(reply.reasoning_tokens for reply in replies)
    return generation.usage() | {"completion_tokens_details": {"reasoning_tokens": counted}}


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


async def _events(generation: Generation, name: str, body: ChatBody, replies: list[Reply]) -> AsyncIterator[list[Any]]:
    options = body.stream_options
    running = options is not None and bool(options.continuous_usage_stats)
    counted = running or (options is not None and bool(options.include_usage))

    def chunk(delta: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": _usage(generation, replies) if running else None} if counted else {}
        return _frame(generation, "chat.completion.chunk", name, [delta]) | usage

    role = {"role": "assistant", "content": ""}
    yield [chunk({"index": i, "delta": role, "finish_reason": None}) for i in range(len(generation.choices))]
    async for pieces in pieces_or_silence(generation):
        yield [chunk(_delta(generation.service, index, piece, body, replies[index])) for index, piece in pieces]
    if counted:
        last = _frame(generation, "chat.completion.chunk", name, [])
        yield [last | {"usage": _usage(generation, replies), "seed": generation.params.seed}]


def _delta(service: Service, index: int, piece: Piece, body: ChatBody, reply: Reply) -> dict[str, Any]:
    delta = reply.take(piece.text, piece.token_ids, piece.finish_reason)
    return {
        "index": index,
        "delta": delta,
        "logprobs": chat_logprobs(service.tokenizer, piece.logprobs) if body.logprobs else None,
        "finish_reason": reply.finish_reason,
        "stop_reason": piece.stop_reason,
    }
