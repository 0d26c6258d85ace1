"""Reads the body of a POST within its limits. Knows nothing of what is in it."""

import asyncio

import msgspec
from starlette.requests import ClientDisconnect, Request

from hybrid_jax.server.errors import ApiError
from hybrid_jax.server.record import log
from hybrid_jax.server.schema import decode
from hybrid_jax.server.service import service_of
from hybrid_jax.server.settings import BODY_BYTES, BODY_IDLE_S

_seen_fields: set[str] = set()  # each unknown name is logged once, and only so many of them
_SEEN_MOST = 100


async def read_json[Body: msgspec.Struct](request: Request, kind: type[Body]) -> Body:
    """The body as a `kind`. Raises ApiError 400, 408, 413, 415."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "wanted Content-Type: application/json: set the header", "unsupported_media_type")
    body, unknown = decode(await _read(request), kind, service_of(request).config.strict_fields)
    for name in unknown:
        if name not in _seen_fields and len(_seen_fields) < _SEEN_MOST:
            _seen_fields.add(name)
            log.warning(f"field {name[:64]!r} of {request.url.path} is ignored")
    return body


async def _read(request: Request) -> bytes:
    stated = request.headers.get("content-length", "0")
    if stated.isdecimal() and int(stated) > BODY_BYTES:
        raise _too_large()
    parts, size_bytes, stream = list[bytes](), 0, request.stream()
    try:
        while True:
            async with asyncio.timeout(BODY_IDLE_S):
                part = await anext(stream)
            size_bytes += len(part)
            if size_bytes > BODY_BYTES:
                raise _too_large()
            parts.append(part)
    except StopAsyncIteration:
        return b"".join(parts)
    except TimeoutError:
        raise ApiError(408, f"no byte of the body for {BODY_IDLE_S:g} s: send it at once", "body_timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "the client left before the end of the body", "disconnect", "disconnect") from None


def _too_large() -> ApiError:
    return ApiError(413, f"wanted a body of at most {BODY_BYTES} bytes, got more: send less", "body_too_large")
