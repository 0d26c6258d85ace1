"""The routes, put together behind the gate."""

from starlette.routing import Route, Router
from starlette.types import ASGIApp

from hybrid_jax.server import chat, completions, models, probes, tokens
from hybrid_jax.server.engine_view import engine_view
from hybrid_jax.server.gate import Gate
from hybrid_jax.server.openapi import openapi
from hybrid_jax.server.page import page
from hybrid_jax.server.service import Service

ROUTES = (
    Route("/", page),
    Route("/v1/completions", completions.complete, methods=["POST"]),
    Route("/v1/chat/completions", chat.chat, methods=["POST"]),
    Route("/v1/models", models.models),
    Route("/v1/models/{name:path}", models.model),
    Route("/tokenize", tokens.tokenize, methods=["POST"]),
    Route("/detokenize", tokens.detokenize, methods=["POST"]),
    Route("/tokenizer_info", tokens.tokenizer_info),
    Route("/engine", engine_view),
    Route("/health", probes.health),
    Route("/ready", probes.ready),
    Route("/version", probes.versions),
    Route("/openapi.json", openapi),
    Route("/metrics", probes.metrics),
)


def build_app(service: Service) -> ASGIApp:
    """The whole HTTP application."""
    return Gate(Router(ROUTES, redirect_slashes=False), service)
