"""Pure ASGI middleware: request ids, the access log, the last resort for errors, and the size of a body."""

from __future__ import annotations

import logging
import re
import time

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import ApiError, internal
from app.logs import event
from app.metrics import Metrics
from app.records import new_id

SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestContext:
    """Gives every request an id (the client's own `X-Request-Id` when it is sane), counts it and logs it."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request; other scopes pass through."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        self.metrics.in_flight.inc()
        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            event("request_failed", logging.ERROR, exc_info=error, id=request_id)
            if status:  # the answer has begun: the server can only close the connection
                raise
            await internal().response(scope, receive, send_with_id)
        finally:
            self.metrics.in_flight.dec()
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.requests.labels(route, str(status or 499)).inc()
            elapsed = round((time.perf_counter() - started) * 1000, 2)
            event("request", id=request_id, method=scope["method"], route=route, status=status or 499, ms=elapsed)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        text: str = value.decode("latin-1")
        if name == b"x-request-id" and SANE_ID.fullmatch(text):
            return text
    return new_id("req_")


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body; raises ApiError 413 as soon as it is longer than `limit` bytes, whatever it declares."""
    too_large = ApiError(413, f"The body is larger than {limit} bytes; send less.", code="request_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                raise too_large
    except ClientDisconnect:
        raise client_gone() from None
    return bytes(body)


def client_gone() -> ApiError:
    """What is logged and counted for a client that did not wait for its answer; nobody reads it."""
    return ApiError(499, "The client went away.", code="client_gone")
