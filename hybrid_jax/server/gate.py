"""What every HTTP request passes: its record, the key, the host, and the one line in the log at its end.

Deny by default: only the routes named here are open without a key.
"""

import hashlib
import hmac
import logging
import time
from collections.abc import Sequence
from typing import Protocol

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybrid_jax.server.errors import CODES, ApiError
from hybrid_jax.server.metrics import Metrics
from hybrid_jax.server.record import Record
from hybrid_jax.server.settings import HEADER_BYTES, HEADERS, ServerConfig
from hybrid_jax.server.stream import ClientGone

log = logging.getLogger("hybrid_jax.server")
OPEN_PATHS = ("/", "/health", "/ready")
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
ROUTE_CHARACTERS = 64  # of a path in the log


class Guarded(Protocol):
    """What stands behind a gate."""

    @property
    def config(self) -> ServerConfig:
        """Its settings."""

    @property
    def metrics(self) -> Metrics:
        """Its counters."""


class Gate:
    """Wraps the routes. Whatever they raise becomes an answer and a reason."""

    def __init__(self, app: ASGIApp, service: Guarded):
        self._app, self._service, self._config = app, service, service.config
        self._keys = [_digest(key.encode()) for key in service.config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One HTTP request."""
        if scope["type"] != "http":
            return
        scope["app"], scope["service"] = self._app, self._service  # with an app, routes raise what they do not have
        client = scope.get("client")
        route = f"{scope['method']} {scope['path']}"[:ROUTE_CHARACTERS]
        record = scope["record"] = Record(route, client[0] if client else "-")

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.id.encode())]
            await send(message)

        try:
            await self._pass(scope, receive, send_noted, record)
        except BaseException:
            record.end("abort")  # the server ends and did not wait
            raise
        finally:
            record.end("done")
            record.write()
            self._service.metrics.observe(record, time.monotonic())

    async def _pass(self, scope: Scope, receive: Receive, send: Send, record: Record) -> None:
        try:
            self._check(scope)
            await self._app(scope, receive, send)
        except ClientGone:
            record.end("disconnect")
        except ApiError as error:
            await self._refuse(error, scope, receive, send)
        except HTTPException as error:
            code = CODES.get(error.status_code, "http_error")
            refused = ApiError(error.status_code, f"{record.route}: {error.detail}", code)
            await self._refuse(refused, scope, receive, send)
        except Exception:
            log.exception(f"request {record.id} failed inside")
            message = f"request {record.id} failed inside: see the log"
            await self._refuse(ApiError(500, message, "internal_error", "internal_error"), scope, receive, send)

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        record: Record = scope["record"]
        record.end(error.reason, error.message if error.status < 500 else "")
        if not record.status:
            await error.response()(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        _check_size(scope["headers"])
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = host[: host.index("]") + 1] if "]" in host else host.split(":")[0]
        if self._config.on_loopback and name.lower() not in (*LOCAL_HOSTS, self._config.host):
            raise ApiError(400, "wanted a local Host header on a loopback address: call 127.0.0.1", "bad_host")
        if self._keys and scope["path"] not in OPEN_PATHS:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            sent = _digest(key.strip().encode())
            fits = [hmac.compare_digest(sent, known) for known in self._keys]  # all of them: no early end
            if not any(fits) or scheme.lower() != "bearer":
                raise ApiError(401, "the API key is missing or wrong: send Authorization: Bearer …", "invalid_api_key")


def _check_size(headers: Sequence[tuple[bytes, bytes]]) -> None:
    """The parser bounds a head that comes in pieces; one that comes at once is bounded here."""
    size_bytes = sum(len(name) + len(value) + 4 for name, value in headers)  # a colon, a space and the line's end
    if len(headers) > HEADERS or size_bytes > HEADER_BYTES:
        raise ApiError(
            431,
            f"wanted at most {HEADERS} headers of {HEADER_BYTES} bytes in all, got {len(headers)} of {size_bytes}:"
            " send fewer",
            "headers_too_large",
        )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
