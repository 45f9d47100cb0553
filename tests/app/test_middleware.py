"""Request ids, the access log, the size of bodies, and the last resort for errors, on bare ASGI apps."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from app.errors import ApiError
from app.metrics import Metrics
from app.middleware import RequestContext, read_body


def scope(*headers: tuple[str, str], kind: str = "http") -> Scope:
    pairs = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    return {"type": kind, "method": "POST", "path": "/secret", "headers": pairs}


def receiving(*messages: Message) -> Receive:
    queue = iter(messages)

    async def receive() -> Message:
        return next(queue)

    return receive


def pieces(*chunks: bytes) -> Iterable[Message]:
    return [{"type": "http.request", "body": chunk, "more_body": i < len(chunks)} for i, chunk in enumerate(chunks, 1)]


async def served(app: Any, *headers: tuple[str, str]) -> tuple[list[Message], Metrics]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    metrics = Metrics()
    await RequestContext(app, metrics, {})(scope(*headers), receiving(), send)
    return sent, metrics


async def fine(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": [(b"a", b"b")]})
    await send({"type": "http.response.body", "body": scope["state"]["request_id"].encode()})


def id_of(sent: list[Message]) -> str:
    return str(dict(sent[0]["headers"])[b"x-request-id"].decode())


@pytest.mark.parametrize("sane", ["a", "A-1_b.c", "x" * 64])
async def test_a_sane_request_id_is_kept(sane: str) -> None:
    sent, _ = await served(fine, ("X-Request-Id", sane))
    assert id_of(sent) == sane and sent[1]["body"] == sane.encode()


@pytest.mark.parametrize("bad", ["", " ", "a b", "x" * 65, "a\r\nb: c", "\u00e9", "a;b", "../a", "{{7*7}}"])
async def test_another_request_id_is_replaced(bad: str) -> None:
    sent, _ = await served(fine, ("X-Request-Id", bad))
    assert id_of(sent).startswith("req_") and len(id_of(sent)) == 28
    assert sent[0]["headers"][0] == (b"a", b"b")


async def test_a_request_is_counted_and_logged_without_its_path(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "newel")
    _, metrics = await served(fine)
    assert metrics.registry.get_sample_value("newel_requests_total", {"route": "none", "status": "204"}) == 1
    assert metrics.registry.get_sample_value("newel_requests_in_flight") == 0
    fields = caplog.records[-1].__dict__["fields"]
    assert (fields["status"], fields["route"], fields["method"]) == (204, "none", "POST")
    assert "secret" not in str(fields)


async def test_requests_that_are_being_answered_are_counted_until_they_end() -> None:
    metrics, seen = Metrics(), list[float | None]()

    async def looking(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(metrics.registry.get_sample_value("newel_requests_in_flight"))
        raise RuntimeError

    async def send(message: Message) -> None: ...

    context = RequestContext(looking, metrics, {})
    for _ in range(2):
        await context(scope(), receiving(), send)
    assert seen == [1, 1] and metrics.registry.get_sample_value("newel_requests_in_flight") == 0


async def test_an_error_before_the_answer_is_a_500_with_the_request_id() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("Geheimnis")

    sent, metrics = await served(broken, ("X-Request-Id", "mine"))
    assert (sent[0]["status"], id_of(sent)) == (500, "mine")
    assert b'"code":"internal_error"' in sent[1]["body"] and b"Geheimnis" not in sent[1]["body"]
    assert metrics.registry.get_sample_value("newel_requests_total", {"route": "none", "status": "500"}) == 1


async def test_an_error_within_the_answer_is_left_to_the_server() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await fine(scope, receive, send)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        await served(broken)


async def test_a_request_without_an_answer_counts_as_given_up() -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None: ...

    _, metrics = await served(silent)
    assert metrics.registry.get_sample_value("newel_requests_total", {"route": "none", "status": "499"}) == 1


async def test_other_scopes_pass_through() -> None:
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    await RequestContext(app, Metrics(), {})(scope(kind="lifespan"), receiving(), fine)  # type: ignore[arg-type]
    assert seen == ["lifespan"]


@pytest.mark.parametrize("chunks", [(b"",), (b"abc", b"defg"), (b"x" * 10,), (b"", b"x" * 10, b"")])
async def test_a_body_up_to_the_limit_is_read(chunks: tuple[bytes, ...]) -> None:
    request = Request(scope(), receiving(*pieces(*chunks)))
    assert await read_body(request, 10) == b"".join(chunks)


@pytest.mark.parametrize(
    ("headers", "chunks"),
    [
        ((("Content-Length", "11"),), ()),
        ((("Content-Length", "9" * 400),), ()),
        ((), (b"x" * 11,)),
        ((), (b"x" * 6, b"x" * 6, b"never read")),
        ((("Content-Length", "3"),), (b"x" * 11,)),
        ((("Content-Length", "\u00b2"),), (b"x" * 11,)),
        ((("Content-Length", "-1"),), (b"x" * 11,)),
    ],
)
async def test_a_longer_body_is_refused_as_early_as_it_is_known(
    headers: tuple[tuple[str, str], ...], chunks: tuple[bytes, ...]
) -> None:
    with pytest.raises(ApiError) as caught:
        await read_body(Request(scope(*headers), receiving(*pieces(*chunks))), 10)
    assert (caught.value.status, caught.value.code) == (413, "request_too_large")


async def test_a_client_that_leaves_while_it_sends_is_given_up() -> None:
    messages = [*pieces(b"abc", b""), {"type": "http.disconnect"}]
    with pytest.raises(ApiError) as caught:
        await read_body(Request(scope(), receiving(messages[0], messages[-1])), 10)
    assert (caught.value.status, caught.value.code) == (499, "client_gone")
