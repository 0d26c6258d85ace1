"""GET /v1/models: what is served."""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from hybrid_jax.server.service import Service, service_of


async def models(request: Request) -> Response:
    """All names of the model."""
    service = service_of(request)
    data = [_card(service, name) for name in service.config.names]
    return Response(msgspec.json.encode({"object": "list", "data": data}), media_type="application/json")


async def model(request: Request) -> Response:
    """One of them."""
    service = service_of(request)
    card = _card(service, service.model_name(request.path_params["name"]))
    return Response(msgspec.json.encode(card), media_type="application/json")


def _card(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "hybrid-jax",
        "root": service.config.names[0],
        "parent": None,
        "max_model_len": service.llm.max_model_len,
    }
