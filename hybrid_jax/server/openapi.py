"""GET /openapi.json: the routes in OpenAPI's form, with schemas made from the types that bodies are decoded with."""

from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from hybrid_jax.server import answers, schema

JSON, EVENTS = "application/json", "text/event-stream"
ALWAYS = (400, 405, 431, 500)  # a Host from elsewhere, a method, headers, a failure inside
OF_BODIES = (404, 408, 413, 415)  # 404: the model that it names


@dataclass(frozen=True)
class Operation:
    """One route. body: what it is sent; answer: what it answers, as JSON; event: what each event of a stream is."""

    method: str
    path: str
    summary: str
    body: type[msgspec.Struct] | None = None
    answer: type[msgspec.Struct] | None = None
    event: type[msgspec.Struct] | None = None
    media: str = JSON
    needs_key: bool = True
    failing: type[msgspec.Struct] = answers.Error  # what comes with 503

    @property
    def types(self) -> list[type[msgspec.Struct]]:
        """All that it names."""
        return [one for one in (self.body, self.answer, self.event, self.failing) if one is not None]


OPERATIONS = (
    Operation(
        *("post", "/v1/completions", "Texts or token ids in, text out"),
        *(schema.CompletionBody, answers.Completion, answers.Completion),
    ),
    Operation(
        *("post", "/v1/chat/completions", "Messages in, a message out"),
        *(schema.ChatBody, answers.ChatCompletion, answers.ChatChunk),
    ),
    Operation("get", "/v1/models", "Names of the model", answer=answers.Cards),
    Operation("get", "/v1/models/{name}", "One of them", answer=answers.Card),
    Operation("post", "/tokenize", "Token ids of a prompt or of messages", schema.TokenizeBody, answers.Tokens),
    Operation("post", "/detokenize", "The text of token ids", schema.DetokenizeBody, answers.Text),
    Operation("get", "/tokenizer_info", "Special tokens and the chat template", answer=answers.TokenizerInfo),
    Operation("get", "/engine", "What the engine does now, and the routing of the layers", answer=answers.EngineView),
    Operation("get", "/version", "Of the server and of JAX", answer=answers.Versions),
    Operation("get", "/openapi.json", "This document"),
    Operation("get", "/metrics", "Prometheus' text", media="text/plain"),
    Operation("get", "/", "The page", media="text/html", needs_key=False),
    Operation(
        *("get", "/health", "Whether the engine's loop turns"),
        answer=answers.Health,
        failing=answers.Health,
        needs_key=False,
    ),
    Operation(
        *("get", "/ready", "Whether requests are taken"),
        answer=answers.Ready,
        failing=answers.Ready,
        needs_key=False,
    ),
)


async def openapi(request: Request) -> Response:
    """The document."""
    return Response(_encoded(), media_type=JSON)


@cache
def _encoded() -> bytes:
    return msgspec.json.encode(document())


def document() -> dict[str, Any]:
    """All of it, as plain data."""
    named = [answers.Error, *(one for operation in OPERATIONS for one in operation.types)]
    _, schemas = msgspec.json.schema_components(named, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation)
    key = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "hybrid-jax", "version": version("hybrid-jax")},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": key}},
    }


def _described(operation: Operation) -> dict[str, Any]:
    content = {operation.media: {"schema": _schema(operation.answer)}}
    if operation.event is not None:
        content[EVENTS] = {"schema": {"type": "string"}, "x-event-schema": _schema(operation.event)}
    answered = {"200": {"description": "The answer", "content": content}}
    found: dict[str, Any] = {"summary": operation.summary, "responses": answered | _refusals(operation)}
    if operation.body is not None:
        found["requestBody"] = {"required": True, "content": {JSON: {"schema": _schema(operation.body)}}}
    if "{name}" in operation.path:
        found["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    if operation.needs_key:
        found["security"] = [{"key": []}]
    return found


def _refusals(operation: Operation) -> dict[str, Any]:
    statuses = {*ALWAYS, 503}
    if operation.body is not None:
        statuses |= {*OF_BODIES}
    if operation.needs_key:
        statuses.add(401)
    if "{name}" in operation.path:
        statuses.add(404)
    return {str(status): _refused(answers.Error if status != 503 else operation.failing) for status in sorted(statuses)}


def _refused(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {"description": "Refused or failed", "content": {JSON: {"schema": _schema(kind)}}}


def _schema(kind: type[msgspec.Struct] | None) -> dict[str, str]:
    return {} if kind is None else {"$ref": f"#/components/schemas/{kind.__name__}"}
