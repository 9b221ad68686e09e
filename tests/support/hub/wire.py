"""Between the sockets and the routes: counts every byte, shapes the link, lets faults strike.

An ASGI middleware. It also hands the routes the path as it was sent, so that a slash sent as %2F
can be told from one that separates.
"""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import uvicorn
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tests.support.hub.faults import Fault, Faults, number

SHAPED_NBYTES = 16 << 10
CHUNK_NBYTES = 256 << 10


class Request(NamedTuple):
    """A request as it was seen on the wire. Bytes are those of bodies; 0 is a status not sent."""

    method: str
    path: str
    status: int
    bytes_sent: int
    bytes_received: int
    range: str | None
    with_token: bool


@dataclass
class Count:
    """The same while it is still going on. Bytes are counted before they can arrive."""

    method: str
    path: str
    range: str | None
    with_token: bool
    status: int = 0
    sent: int = 0
    received: int = 0

    def reading(self) -> Request:
        """What it says now."""
        return Request(
            self.method,
            self.path,
            self.status,
            self.sent,
            self.received,
            self.range,
            self.with_token,
        )


class Link:
    """One direction of a line that all connections share."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second
        self._free_at = 0.0

    async def carry(self, nbytes: int) -> None:
        """Return when so many bytes have gone through."""
        self._free_at = max(self._free_at, time.monotonic()) + nbytes / self._rate
        await asyncio.sleep(self._free_at - time.monotonic())


class Cut(Exception):
    """The connection has been ended on purpose."""


Ends = tuple[tuple[str, int], tuple[str, int]]


class CuttableProtocol(H11Protocol):
    """uvicorn's own, but the transport of a connection can be found by its two ends."""

    transports: ClassVar[dict[Ends, asyncio.Transport]] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transports[_ends(transport)] = transport

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.transports.pop(_ends(self.transport), None)


def _ends(transport: asyncio.Transport) -> Ends:
    # A client's port alone will not do: it may serve connections to both ports of a Hub.
    info = transport.get_extra_info
    return tuple(info("peername")[:2]), tuple(info("sockname")[:2])


class CuttingServer(uvicorn.Server):
    """uvicorn's own, but it drops its connections when it stops, in the middle of an answer."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http=CuttableProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",
                access_log=False,
                timeout_keep_alive=60,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await super().shutdown(sockets)


class Wire:
    """The middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.faults = Faults()
        self.latency = 0.0
        self.down: Link | None = None
        self.up: Link | None = None
        self._counts: list[Count] = []

    def requests(self) -> list[Request]:
        """All requests since the last reset, in the order in which they arrived."""
        return [count.reading() for count in list(self._counts)]

    def total(self, pattern: str, direction: str) -> int:
        """Bytes `sent` or `received` for requests whose `METHOD /path` the pattern is found in."""
        counts = list(self._counts)
        return sum(
            getattr(count, direction)
            for count in counts
            if re.search(pattern, f"{count.method} {count.path}")
        )

    def reset(self) -> None:
        """Forget what was counted; what is under way counts on, unseen."""
        self._counts = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope = {**scope, "path": scope["raw_path"].decode("ascii")}
        headers = dict(scope["headers"])
        wanted = headers.get(b"range", b"").decode("latin-1") or None
        count = Count(scope["method"], scope["path"], wanted, b"authorization" in headers)
        self._counts.append(count)
        fault = self.faults.strike(f"{count.method} {count.path}")
        passage = Passage(self, count, fault, scope, receive, send)
        try:
            await passage.go(self.app)
        except Exception:
            # By then a Cut may be wrapped by what handled the request.
            if not passage.ended:
                raise
        if passage.ended:
            # Let the loop tell the server that the connection is gone, or it complains.
            await asyncio.sleep(0)


class Passage:
    """One request on its way to the routes and back."""

    def __init__(
        self,
        wire: Wire,
        count: Count,
        fault: Fault | None,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        self._wire, self._count, self._fault = wire, count, fault or Fault("")
        self._scope, self._receive, self._send = scope, receive, send
        self._trickle = Link(self._fault.bytes_per_second) if self._fault.bytes_per_second else None
        self._cut_at = None if self._fault.cut_after is None else number(self._fault.cut_after)
        upload = self._fault.cut_upload_after
        self._cut_upload_at = None if upload is None else number(upload)
        # Whether the connection was ended here.
        self.ended = False
        login = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        self._token = login.partition(" ")[2]
        # The head and the body so far of an answer that is to be changed.
        self._held: Message = {}
        self._body = b""

    async def go(self, app: ASGIApp) -> None:
        """Through, or into the fault."""
        fault = self._fault
        if fault.do is not None:
            await _elsewhere(fault.do)
        await asyncio.sleep(self._wire.latency + fault.delay)
        self._change_range()
        if fault.status is not None:
            app = _answer(fault, self._token)
        await app(self._scope, self.receive, self.send)

    def _change_range(self) -> None:
        fault, wanted = self._fault, self._count.range
        if wanted is None or not (fault.ignore_range or fault.shift_range):
            return
        headers = [pair for pair in self._scope["headers"] if pair[0] != b"range"]
        if fault.shift_range:
            shifted = re.sub(r"\d+", lambda digits: str(int(digits[0]) + fault.shift_range), wanted)
            headers.append((b"range", shifted.encode()))
        self._scope["headers"] = headers

    async def receive(self) -> Message:
        """A piece of the request's body."""
        message = await self._receive()
        nbytes = len(message.get("body", b""))
        self._count.received += nbytes
        if self._cut_upload_at is not None and self._count.received >= self._cut_upload_at:
            await self._hang_up()
        if self._wire.up is not None:
            await self._wire.up.carry(nbytes)
        return message

    async def send(self, message: Message) -> None:
        """The head of the answer or a piece of its body, in smaller pieces."""
        if self.ended:
            return
        if self._fault.lose_answer:
            await self._hang_up()
        if message["type"] == "http.response.start":
            self._count.status = message["status"]
            self._held = self._with_headers(message)
            if self._fault.rewrite is None:
                await self._send(self._held)
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if self._fault.rewrite is not None:
            self._body += body
            if more:
                return
            body = self._fault.rewrite(self._body)
            length = (b"content-length", b"%d" % len(body))
            kept = [pair for pair in self._held["headers"] if pair[0] != length[0]]
            await self._send({**self._held, "headers": [*kept, length]})
        shaped = self._wire.down is not None or self._trickle is not None
        step = 1 if self._fault.drip else SHAPED_NBYTES if shaped else CHUNK_NBYTES
        for begin in range(0, max(len(body), 1), step):
            last = begin + step >= len(body)
            await self._send_piece(body[begin : begin + step], more=more or not last)

    def _with_headers(self, message: Message) -> Message:
        changed = {
            name.lower().encode(): value.replace("{token}", self._token).encode("latin-1")
            for name, value in self._fault.headers.items()
        }
        kept = [pair for pair in message["headers"] if pair[0].lower() not in changed]
        return {**message, "headers": [*kept, *changed.items()]}

    async def _send_piece(self, piece: bytes, *, more: bool) -> None:
        cut_at = self._cut_at
        torn = cut_at is not None and self._count.sent + len(piece) > cut_at
        if torn and cut_at is not None:
            piece = piece[: cut_at - self._count.sent]
        for link in (self._wire.down, self._trickle):
            if link is not None:
                await link.carry(len(piece))
        if self._fault.drip:
            await asyncio.sleep(self._fault.drip)
        self._count.sent += len(piece)
        await self._send({"type": "http.response.body", "body": piece, "more_body": more or torn})
        if torn:
            await self._hang_up()

    async def _hang_up(self) -> None:
        ends = tuple(self._scope["client"]), tuple(self._scope["server"])
        transport = CuttableProtocol.transports.get(ends)
        if transport is not None:
            # close() still sends what was written, abort() does not.
            transport.abort() if self._fault.reset else transport.close()
        self.ended = True
        raise Cut


def _answer(fault: Fault, token: str) -> ASGIApp:
    headers = {}
    if fault.retry_after is not None:
        headers["Retry-After"] = str(fault.retry_after)
    if fault.ratelimit_reset is not None:
        headers["RateLimit"] = f'"resolvers";r=0;t={fault.ratelimit_reset}'
        headers["RateLimit-Policy"] = '"fixed window";"resolvers";q=3000;w=300'
    assert fault.status is not None
    if fault.body is not None:
        return Response(fault.body.replace(b"{token}", token.encode()), fault.status, headers)
    return JSONResponse({"error": f"fault {fault.status}"}, fault.status, headers)


async def _elsewhere(do: Callable[[], object]) -> None:
    """Run it in a thread that the shutdown does not wait for: it may itself restart the server."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def finish() -> None:
        if not done.done():
            done.set_result(None)

    def run() -> None:
        try:
            do()
        finally:
            # The loop is closed where `do` stopped the server.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(finish)

    threading.Thread(target=run, daemon=True).start()
    await done
