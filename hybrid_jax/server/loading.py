"""The routes while the weights are loaded: the process lives and is not ready, and everything else has to wait.

Knows nothing of models or engines.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from hybrid_jax.server.errors import RETRY_AFTER_S, unavailable
from hybrid_jax.server.gate import Gate
from hybrid_jax.server.metrics import Metrics
from hybrid_jax.server.page import page
from hybrid_jax.server.settings import ServerConfig

REASON = "the weights are being loaded: try again soon"


@dataclass(frozen=True)
class Unloaded:
    """A server that has no model yet."""

    config: ServerConfig
    metrics: Metrics


async def health(request: Request) -> Response:
    """200: loading may take long, and to start anew would not make it shorter."""
    counts = {"running": 0, "waiting": 0, "last_turn_age_s": 0.0}
    return _answer({"status": "ok", "phase": "loading", "compiling": False} | counts, 200)


async def ready(request: Request) -> Response:
    """503."""
    return _answer({"ready": False, "phase": "loading", "reason": REASON}, 503)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    raise unavailable(REASON, "loading", "loading")


def _answer(body: Mapping[str, Any], status: int) -> Response:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else {}
    return Response(msgspec.json.encode(body), status, headers, "application/json")


def build_loading_app(config: ServerConfig, metrics: Metrics) -> ASGIApp:
    """The whole HTTP application until there is a model."""
    routes = (Route("/", page), Route("/health", health), Route("/ready", ready))
    return Gate(Router(routes, redirect_slashes=False, default=_refuse), Unloaded(config, metrics))
