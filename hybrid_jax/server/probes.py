"""GET /health, /ready, /version and /metrics: what supervisors and boards ask."""

from importlib.metadata import version

import jax
import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from hybrid_jax.server.errors import RETRY_AFTER_S, ApiError
from hybrid_jax.server.service import service_of


async def health(request: Request) -> Response:
    """200 while the engine's own loop turns, whether there is work or not; 503 once it is stuck or dead."""
    service = service_of(request)
    engine, age_s = service.engine, service.engine.beat_age_s
    healthy = engine.phase != "dead" and age_s <= service.config.stall_timeout_s
    stats = engine.stats
    body = {
        "status": "ok" if healthy else "failing",
        "phase": engine.phase,
        "running": stats.running,
        "waiting": stats.waiting,
        "last_turn_age_s": round(age_s, 3),
        "compiling": engine.phase == "compiling",
    }
    return Response(msgspec.json.encode(body), 200 if healthy else 503, _retry(healthy), "application/json")


async def ready(request: Request) -> Response:
    """200 once requests are taken, while the engine's loop turns: compiled, one token generated, not shutting down."""
    service = service_of(request)
    engine = service.engine
    body: dict[str, str | bool] = {"ready": True, "phase": engine.phase}
    try:
        engine.require_serving()
    except ApiError as error:
        body |= {"ready": False, "reason": error.message}
    age_s = engine.beat_age_s
    if body["ready"] is True and age_s > service.config.stall_timeout_s:
        body |= {"ready": False, "reason": f"the engine took no turn for {age_s:.0f} s: try another server"}
    serving = body["ready"] is True
    return Response(msgspec.json.encode(body), 200 if serving else 503, _retry(serving), "application/json")


async def versions(request: Request) -> Response:
    """Of this server and of JAX."""
    body = {"version": version("hybrid-jax"), "jax": jax.__version__}
    return Response(msgspec.json.encode(body), media_type="application/json")


async def metrics(request: Request) -> Response:
    """Prometheus' text."""
    return Response(service_of(request).metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _retry(fine: bool) -> dict[str, str]:
    return {} if fine else {"Retry-After": str(RETRY_AFTER_S)}
