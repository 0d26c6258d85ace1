"""One TCP connection: uvicorn's HTTP protocol, that gives up on clients which hold it and do not go on.

A client may take only so long to send the head of a request, and to make room for what it is to be sent. Knows nothing
of what is asked or answered.
"""

import asyncio
from typing import cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from hybrid_jax.server.record import Record
from hybrid_jax.server.settings import HEAD_S, SLOW_CLIENT_S

TOO_LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class Connection(H11Protocol):
    """A connection with two clocks."""

    _head: asyncio.TimerHandle | None = None  # runs while the head of a request is awaited
    _room: asyncio.TimerHandle | None = None  # runs while the client takes nothing

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head."""
        super().connection_made(transport)
        self._head = self.loop.call_later(HEAD_S, self._head_late)

    def data_received(self, data: bytes) -> None:
        """Take in bytes; those of a further request on the same connection have as much time."""
        if self._head is None and self.conn.their_state is h11.IDLE:
            self._head = self.loop.call_later(HEAD_S, self._head_late)
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head = _stop(self._head)

    def pause_writing(self) -> None:
        """The client takes less than it is sent."""
        super().pause_writing()
        self._room = self._room or self.loop.call_later(SLOW_CLIENT_S, self._drop)

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        self._room = _stop(self._room)

    def on_response_complete(self) -> None:
        """An answer is written; where the connection ends with it, the client has so long to take the rest."""
        super().on_response_complete()
        self._end_in_time()

    def timeout_keep_alive_handler(self) -> None:
        """No further request came."""
        super().timeout_keep_alive_handler()
        self._end_in_time()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._head, self._room = _stop(self._head), _stop(self._room)
        super().connection_lost(exc)

    def _end_in_time(self) -> None:
        """A transport that closes waits for the client to take what is left, without an end."""
        if self.transport.is_closing() and self._room is None:
            self._room = self.loop.call_later(SLOW_CLIENT_S, self.transport.abort)

    def _head_late(self) -> None:
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            if self.conn.trailing_data[0]:
                self.transport.write(TOO_LATE)
            self.transport.close()
            self._end_in_time()

    def _drop(self) -> None:
        scope = cast("dict[str, Record]", self.scope)
        scope["record"].end("slow_client")
        self.transport.abort()


def _stop(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Stop a clock; what to keep in its place."""
    if timer is not None:
        timer.cancel()
    return None
