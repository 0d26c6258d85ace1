"""Server-sent events, and requests whose client may leave. Knows nothing of what is in an event."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hybrid_jax.server.errors import ApiError
from hybrid_jax.server.generation import Generation
from hybrid_jax.server.settings import KEEP_ALIVE_S

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ClientGone(Exception):
    """The client closed the connection before its answer was whole."""


async def while_connected[Result](receive: Receive, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves. Raises ClientGone."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def start(receive: Receive, generation: Generation) -> None:
    """Hand a generation to the engine; whoever calls must close it from then on. Raises ClientGone."""
    try:
        await while_connected(receive, generation.start())
    except BaseException:
        generation.close()  # this task may be cancelled when the engine has it already
        raise


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends the events of a generation that was started, and closes it however that ends.

    events: the values to send, in order, one list a turn; `[DONE]` follows them. After an error it does not.
    """

    def __init__(self, generation: Generation, events: Callable[[Generation], AsyncIterator[list[Any]]]):
        super().__init__(None, 200, HEADERS, "text/event-stream")
        del self.headers["content-length"]
        self._generation, self._events = generation, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run to the end of the answer or of the connection."""
        try:
            await while_connected(receive, self._send_all(send))
        finally:
            self._generation.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for values in self._events(self._generation):
                await _send(send, b"".join(map(_frame, values)) or b": keep-alive\n\n")
            await _send(send, b"data: [DONE]\n\n")
        except ApiError as error:
            self._generation.record.end(error.reason)
            await _send(send, _frame(error.body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _frame(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


async def pieces_or_silence(generation: Generation) -> AsyncIterator[list[Any]]:
    """The pieces of each turn of a generation until it is over; an empty list after some idle seconds."""
    while not generation.over:
        try:
            yield await generation.take(KEEP_ALIVE_S)
        except TimeoutError:
            yield []
