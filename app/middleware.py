"""Pure ASGI middleware: request ids, the access log, the last resort for errors, and the road of chat requests."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import ApiError, client_gone, internal
from app.exchange import Call
from app.hotpath import serve
from app.logs import event, log
from app.metrics import Metrics
from app.records import new_id
from app.service import Service
from app.surfaces import Surface
from app.tracing import Tracer, answered, served, trace_of

SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestContext:
    """Gives every request an id (the client's own `X-Request-Id` when it is sane), counts it and logs it.

    Requests to the paths in `surfaces` are served here (`app.hotpath`), the others by the app behind.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        surfaces: Mapping[str, Surface],
        service: Callable[[], Service] | None = None,
    ):
        self.app, self.metrics, self._surfaces, self._service = app, metrics, surfaces, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request; other scopes pass through."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.perf_counter(), 0
        surface = self._surfaces.get(scope["path"])
        tracer = self._service().tracer if surface and self._service else None
        call = _call(scope, request_id, tracer)
        about = [(b"x-request-id", request_id.encode()), *answered(call.trace)]

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *about]
            await send(message)

        self.metrics.answering += 1
        try:
            if surface and scope["method"] != "POST":
                await _only_post(scope).response(scope, receive, send_with_id)
            elif surface and self._service:
                await serve(self._service(), surface, call, receive, send_with_id)
            else:
                await self.app(scope, receive, send_with_id)
        except Exception as error:
            event("request_failed", logging.ERROR, exc_info=error, id=request_id)
            if status:  # the answer has begun: the server can only close the connection
                raise
            await internal().response(scope, receive, send_with_id)
        finally:
            self.metrics.answering -= 1
            route = scope["path"] if surface else getattr(scope.get("route"), "path", "none")
            self.metrics.answered(route, status or 499)
            if tracer:
                seconds = time.perf_counter() - started
                served(tracer, call.trace, request_id, scope["method"], route, status or 499, seconds)
            if log.isEnabledFor(logging.INFO):
                elapsed = round((time.perf_counter() - started) * 1000, 2)
                event("request", id=request_id, method=scope["method"], route=route, status=status or 499, ms=elapsed)


def _only_post(scope: Scope) -> ApiError:
    message = f"{scope['method']} {scope['path']}: Method Not Allowed."
    return ApiError(405, message, code="method_not_allowed", headers={"allow": "POST"})


def _call(scope: Scope, request_id: str, tracer: Tracer | None) -> Call:
    headers = dict(reversed(scope["headers"]))
    peer = scope["client"][0] if scope.get("client") else ""
    return Call(headers, scope["headers"], request_id, peer, trace_of(headers, tracer))


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and SANE_ID.fullmatch(text := value.decode("latin-1")):
            return str(text)
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
