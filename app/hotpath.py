"""The road of a chat request as plain ASGI: no router, no response classes, one task a request.

A status is sent only when the engine has said its first word, or a rule has decided: whatever fails before that has a
status of its own. After it the reply always ends with a terminal event.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from starlette.types import Message, Receive, Send

from app.errors import ApiError, client_gone, store_down
from app.exchange import Call, Exchange, begun, repeated
from app.idempotency import Claim
from app.service import Service
from app.store import StoreError
from app.surfaces import Frames, Surface

PATIENCE = 0.02
"""Seconds after which it is worth watching whether the client of a whole reply is still there."""
JSON = (b"content-type", b"application/json")
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
KEEP_ALIVE = b": keep-alive\n\n"


async def serve(service: Service, surface: Surface, call: Call, receive: Receive, send: Send) -> None:
    """Answers one request of a chat client; one that has gone is answered no more."""
    client = _Client(receive, send, service.settings.keepalive)
    try:
        await _answered(service, surface, call, client)
    except (ApiError, StoreError) as failure:
        error = failure if isinstance(failure, ApiError) else store_down()
        if not (client.gone or client.began):
            await client.refused(error, surface.error(error))
    except asyncio.CancelledError:
        if not client.gone:
            raise
        asyncio.current_task().uncancel()  # type: ignore[union-attr]
    finally:
        client.close()


async def _answered(service: Service, surface: Surface, call: Call, client: _Client) -> None:
    key, tenant = await service.auth.identify(call.raw, "chat", call.peer)
    body = await client.body(service.settings.body_limit, call.header(b"content-length"))
    asked = surface.read(body, key, call.headers)
    turn = begun(service, call, surface.name, key, tenant, asked)
    named = call.header(b"idempotency-key")
    claim = await service.idempotency.claim(tenant.name, key.id, named, service.digest(body)) if named else None
    if claim and claim.state == "done":
        told_before = await repeated(service, claim.turn, key, tenant, asked)
        return await _told(told_before, surface, client, None)
    try:
        permit = await service.traffic.admit(key, tenant, asked, turn)
        exchange = Exchange(service, key, tenant, asked, [turn], permit.release, permit.headers)
        try:
            async with permit.slot:
                await _told(exchange, surface, client, claim)
        finally:
            service.traffic.settle(permit, exchange.turns)
    except BaseException:
        if claim:
            await asyncio.shield(service.spawn(service.idempotency.abandon(claim)))
        raise


async def _told(exchange: Exchange, surface: Surface, client: _Client, claim: Claim | None) -> None:
    if exchange.asked.stream:
        client.watch()
        await _streamed(exchange, surface.frames(exchange), client, claim)
        return
    client.watch_soon()
    told = await exchange.whole()
    await _kept(exchange, claim)
    await client.answer(exchange.headers(), surface.whole(exchange, told))


async def _kept(exchange: Exchange, claim: Claim | None) -> None:
    """Makes sure that a request which is sent again gets this answer."""
    if claim:
        await exchange.service.store.flush()
        await exchange.service.idempotency.complete(claim, exchange.id)


async def _streamed(exchange: Exchange, frames: Frames, client: _Client, claim: Claim | None) -> None:
    async with aclosing(exchange.pieces()) as pieces:
        first = await anext(pieces, None)
        await client.begin(exchange.headers(), frames.begin() + (frames.piece(first) if first else b""))
        try:
            async for piece in pieces:
                if written := frames.piece(piece):
                    await client.write(written)
            await _kept(exchange, claim)
            last = frames.end()
        except (ApiError, StoreError) as error:
            await client.write(frames.failed(error if isinstance(error, ApiError) else store_down()), more=False)
            raise
        await client.write(last, more=False)


class _Client:
    """The other end of a request: its body comes in, an answer goes out, and it may go away meanwhile.

    When it does, the task of the request is cancelled, and with it the engine's work.
    """

    __slots__ = (
        "_answering",
        "_receive",
        "_send",
        "_silence",
        "_soon",
        "_task",
        "_watching",
        "_wrote",
        "began",
        "gone",
    )

    def __init__(self, receive: Receive, send: Send, silence: float):
        self._receive, self._send, self._silence = receive, send, silence
        self._task = asyncio.current_task()
        self._soon: asyncio.TimerHandle | None = None
        self._watching: asyncio.Task[None] | None = None
        self._answering = self._wrote = self.gone = self.began = False

    async def body(self, limit: int, declared: str) -> bytes:
        """The whole body; raises ApiError 413 as soon as it is longer than `limit` bytes, or declares to be."""
        if declared.isdecimal() and int(declared) > limit:
            raise _too_large(limit)
        message = await self._receive()
        if not message.get("more_body") and message["type"] == "http.request" and len(message["body"]) <= limit:
            return message["body"]  # type: ignore[no-any-return]
        body = bytearray()
        while message["type"] == "http.request":
            body += message.get("body", b"")
            if len(body) > limit:
                raise _too_large(limit)
            if not message.get("more_body"):
                return bytes(body)
            message = await self._receive()
        self.gone = True
        raise client_gone()

    def watch(self) -> None:
        """From now on the request ends when the client goes, and a stream that is silent for long says so."""
        self._watching = asyncio.create_task(self._watch())

    def watch_soon(self) -> None:
        """As `watch`, if the answer takes long enough for that to be of use."""
        self._soon = asyncio.get_running_loop().call_later(PATIENCE, self.watch)

    async def _watch(self) -> None:
        message: Message = {"type": ""}
        while message["type"] != "http.disconnect":
            self._wrote = False
            try:
                async with asyncio.timeout(self._silence):
                    message = await self._receive()
            except TimeoutError:
                if self._answering and not self._wrote:
                    await self._send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
        self.gone = True
        if self._task:
            self._task.cancel()

    async def answer(self, headers: list[tuple[bytes, bytes]], body: bytes, status: int = 200) -> None:
        """Sends a whole answer."""
        self.close()
        length = (b"content-length", str(len(body)).encode())
        await self._send({"type": "http.response.start", "status": status, "headers": [JSON, length, *headers]})
        await self._send({"type": "http.response.body", "body": body})

    async def refused(self, error: ApiError, body: bytes) -> None:
        """Sends an error with its status."""
        headers = error.all_headers.items()
        await self.answer([(name.encode(), value.encode()) for name, value in headers], body, error.status)

    async def begin(self, headers: list[tuple[bytes, bytes]], first: bytes) -> None:
        """Sends the status of a stream, and its first frames."""
        await self._send({"type": "http.response.start", "status": 200, "headers": [*EVENTS, *headers]})
        self._answering = self.began = True
        await self.write(first)

    async def write(self, frames: bytes, more: bool = True) -> None:
        """Sends frames of a stream; the last ones without `more`."""
        if not more:
            self._answering = False
            self.close()
        self._wrote = True
        await self._send({"type": "http.response.body", "body": frames, "more_body": more})

    def close(self) -> None:
        """Watches no longer."""
        if self._soon:
            self._soon.cancel()
        if self._watching:
            self._watching.cancel()


def _too_large(limit: int) -> ApiError:
    text = f"The body is larger than {limit} bytes; send less."
    return ApiError(413, text, code="request_too_large", headers={"connection": "close"})
