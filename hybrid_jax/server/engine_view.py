"""GET /engine: what the engine does now and how the model is routed, as JSON for the page.

The numbers are those of /metrics, which stays the place for boards and alarms.
"""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from hybrid_jax.routing import to_json
from hybrid_jax.server.service import service_of


async def engine_view(request: Request) -> Response:
    """One look."""
    service = service_of(request)
    stats = service.engine.stats
    cache = stats.cache
    body = {
        "model": service.config.names[0],
        "max_model_len": service.llm.max_model_len,
        "phase": service.engine.phase,
        "running": stats.running,
        "waiting": stats.waiting,
        "pages": stats.pages,
        "slots": stats.slots,
        "prefix_cache": {"looked_up_tokens": cache.looked_up_tokens, "hit_tokens": cache.hit_tokens},
        "generated_tokens": stats.generated_tokens,
        "prompt_tokens": stats.prompt_tokens,
        "steps": stats.steps,
        "step_s": stats.step_s,
        "preemptions": stats.preemptions,
        "compilations_after_ready": stats.compiled_after_ready,
        "routing": to_json(service.llm.routing),
    }
    return Response(msgspec.json.encode(body), media_type="application/json")
