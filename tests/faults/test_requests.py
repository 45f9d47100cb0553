"""What clients send: half-closed sockets, too much of everything, and shapes that hide a second request in the first.

A hidden request asks for a route that answers with its own name, so that it shows if it ever reaches one.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.faults.client import responses, talk
from tests.faults.conftest import Started
from tests.faults.engine import Engine
from tests.faults.newel import Newel
from tests.faults.page import Fault

GROUP = "What clients send"


@pytest.fixture(scope="module")
def shared_engine() -> Iterator[Engine]:
    with Engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def served(shared_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Newel]:
    """One gateway for all of this: nothing that a client sends may hurt it."""
    gateway = Newel(tmp_path_factory.mktemp("gateway"), shared_engine.url)
    asyncio.run(gateway.prepared())
    gateway.start()
    asyncio.run(gateway.ready())
    yield gateway
    gateway.stop()


@pytest.fixture
async def gateway(served: Newel) -> AsyncIterator[Newel]:
    """The shared gateway, which must serve as well after each test."""
    yield served
    assert await served.ready(2) < 2


def post(gateway: Newel, *headers: str, body: bytes = b"", key: str = "", path: str = "/v1/chat/completions") -> bytes:
    """A POST with these headers and bytes, whether they fit or not."""
    lines = [f"POST {path} HTTP/1.1", "host: x", f"authorization: Bearer {key or gateway.key}"]
    lines += ["content-type: application/json", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def question(gateway: Newel, **more: object) -> bytes:
    return json.dumps(gateway.body("Hello", **more)).encode()


# --- half-closed


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_client_that_shuts_down_its_side_gets_its_answer(gateway: Newel, fault: Fault, stream: bool) -> None:
    fault.tell(GROUP, "Half-closed: the client shuts down its side after the request", "its answer, whole")
    body = question(gateway, stream=stream)
    began = time.monotonic()
    raw = await talk(gateway.port, [post(gateway, f"content-length: {len(body)}", body=body)], half_close=True)
    found, rest = responses(raw)
    assert [one.status for one in found] == [200] and not rest, raw
    assert b"Hello" in found[0].body and (not stream or found[0].body.endswith(b"data: [DONE]\n\n"))
    fault.took("", time.monotonic() - began)


# --- too much


async def test_headers_that_are_too_large(gateway: Newel, fault: Fault) -> None:
    fault.tell(GROUP, "Headers of 100 KB", "431 or 400, then the connection is closed")
    body = question(gateway)
    raw = await talk(
        gateway.port, [post(gateway, f"content-length: {len(body)}", f"x-padding: {'x' * 100_000}", body=body)]
    )
    found, _ = responses(raw)
    assert len(found) == 1 and found[0].status in (400, 431), raw[:300]


async def test_headers_without_an_end(gateway: Newel, fault: Fault) -> None:
    fault.tell(GROUP, "Headers without an end (50 MB)", "431 or 400, or the connection is closed; memory stays")
    before, sent = gateway.rss, 0
    _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n")
    try:
        for number in range(5000):
            writer.write(b"x-%d: %b\r\n" % (number, b"y" * 10_000))
            await writer.drain()
            sent += 10_000
    except ConnectionError:
        pass
    finally:
        grown = gateway.rss - before
        writer.transport.abort()
    assert sent < 5_000_000, "nobody needs that many headers"
    assert grown < 16
    fault.took("taken before it ends", f"{sent / 1000:.0f} KB")
    fault.took("memory of the gateway", f"+{grown:.0f} MB")


@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "chunked"])
async def test_a_body_that_is_too_large(gateway: Newel, fault: Fault, chunked: bool) -> None:
    fault.tell(GROUP, "A body of 20 MB, declared or chunked", "413; what is left of it is never read as a request")
    before = gateway.rss
    piece = b"x" * 99_000 + hidden(gateway)
    if chunked:
        sent = post(gateway, "transfer-encoding: chunked") + b"%x\r\n%b\r\n" % (len(piece), piece) * 200
    else:
        sent = post(gateway, f"content-length: {len(piece) * 200}") + piece * 200
    raw = await talk(gateway.port, [sent])
    found, _ = responses(raw)
    assert [one.status for one in found] == [413] and b"hidden" not in raw, raw[:300]
    assert gateway.rss - before < 32


# --- smuggling


def hidden(gateway: Newel) -> bytes:
    """A request that a proxy before us would not have seen."""
    return (
        f"GET /v1/models/hidden HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {gateway.key}\r\nx-a: b\r\n\r\n"
    ).encode()


async def test_a_hidden_request_would_be_seen(gateway: Newel) -> None:
    """The detector works: two honest requests in one packet get two answers, in order."""
    body = question(gateway)
    raw = await talk(
        gateway.port, [post(gateway, f"content-length: {len(body)}", body=body) + hidden(gateway)], timeout=2
    )
    found, rest = responses(raw)
    assert [one.status for one in found] == [200, 404] and b"hidden" in found[1].body and not rest


SHAPES: dict[str, tuple[list[str], str]] = {
    # what is wrong: (headers, body); {n} is the length of the hidden request, which stands behind the body
    "both lengths, CL first": (["content-length: 5", "transfer-encoding: chunked"], "0\r\n\r\n"),
    "both lengths, TE first": (["transfer-encoding: chunked", "content-length: 5"], "0\r\n\r\n"),
    "both lengths, CL spans the hidden one": (["transfer-encoding: chunked", "content-length: {n+5}"], "0\r\n\r\n"),
    "two lengths that differ": (["content-length: 0", "content-length: {n}"], ""),
    "two lengths that differ, the other way": (["content-length: {n}", "content-length: 0"], ""),
    "a list of lengths": (["content-length: 0, {n}"], ""),
    "a negative length": (["content-length: -1"], ""),
    "a length with a plus": (["content-length: +0"], ""),
    "a hexadecimal length": (["content-length: 0x0"], ""),
    "a length with a blank in it": (["content-length: 0 0"], ""),
    "a length that overflows": (["content-length: 18446744073709551616"], ""),
    "an empty length": (["content-length:"], ""),
    "a length that is a word": (["content-length: zero"], ""),
    "chunked is not last": (["transfer-encoding: chunked, identity"], "0\r\n\r\n"),
    "chunked twice": (["transfer-encoding: chunked", "transfer-encoding: chunked, chunked"], "0\r\n\r\n"),
    "an unknown coding": (["transfer-encoding: xchunked"], "0\r\n\r\n"),
    "a quoted coding": (['transfer-encoding: "chunked"'], "0\r\n\r\n"),
    "a blank before the colon": (["transfer-encoding : chunked", "content-length: {n}"], ""),
    "a length with a blank before the colon": (["content-length : {n}"], ""),
    "a tab before the coding": (["transfer-encoding:\tchunked", "content-length: {n+5}"], "0\r\n\r\n"),
    "a vertical tab before the coding": (["transfer-encoding:\x0bchunked", "content-length: 0"], ""),
    "a folded header": (["x-a: b\r\n c: d", "content-length: 0"], ""),
    "a folded coding": (["transfer-encoding:\r\n chunked", "content-length: 0"], ""),
    "a line that starts with a blank": ([" content-length: {n}", "content-length: 0"], ""),
    "bare LF after a header": (["x-a: b\ncontent-length: {n}", "content-length: 0"], ""),
    "bare LF before the body": (["content-length: 0\n\nGET /v1/models/hidden HTTP/1.1\nhost: x\n"], ""),
    "bare CR in a header": (["x-a: b\rcontent-length: {n}", "content-length: 0"], ""),
    "NUL in a header": (["x-a: b\x00", "content-length: 0"], ""),
    "NUL in a name": (["x-\x00a: b", "content-length: 0"], ""),
    "a header without a colon": (["x-a b", "content-length: 0"], ""),
    "a header without a name": ([": b", "content-length: 0"], ""),
    "a negative chunk": (["transfer-encoding: chunked"], "-1\r\n\r\n"),
    "a chunk with 0x": (["transfer-encoding: chunked"], "0x0\r\n\r\n"),
    "a chunk with a plus": (["transfer-encoding: chunked"], "+0\r\n\r\n"),
    "a chunk with a blank before": (["transfer-encoding: chunked"], " 0\r\n\r\n"),
    "a chunk that overflows": (["transfer-encoding: chunked"], "10000000000000000\r\n\r\n"),
    "a chunk without a size": (["transfer-encoding: chunked"], "\r\n\r\n"),
    "a chunk that is longer than it says": (["transfer-encoding: chunked"], "1\r\nab\r\n0\r\n\r\n"),
    "a chunk that ends with a bare LF": (["transfer-encoding: chunked"], "1\r\na\n0\r\n\r\n"),
    "a chunk size that ends with a bare LF": (["transfer-encoding: chunked"], "0\n\r\n"),
    "a chunk extension with a bare LF": (["transfer-encoding: chunked"], "0;a\nb\r\n\r\n"),
    "a chunk extension with a bare CR": (["transfer-encoding: chunked"], "0;a\rb\r\n\r\n"),
    "trailers that set a length": (["transfer-encoding: chunked"], "0\r\ncontent-length: {n}\r\n\r\n"),
    "trailers without an end": (["transfer-encoding: chunked"], "0\r\nx: y\r\n"),
    "an upgrade": (["connection: upgrade", "upgrade: websocket", "content-length: 0"], ""),
    "an upgrade to HTTP/2": (["connection: upgrade, http2-settings", "upgrade: h2c", "http2-settings: AA"], ""),
}
"""Where the framing is in doubt, one answer and a closed connection are right, whatever the answer says."""


def filled(text: str, gateway: Newel) -> str:
    size = len(hidden(gateway))
    return text.replace("{n+5}", str(size + 5)).replace("{n}", str(size))


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_request_of_a_doubtful_shape_hides_no_other(gateway: Newel, fault: Fault, shape: str) -> None:
    fault.tell(
        GROUP,
        f"Request smuggling: {len(SHAPES)} shapes (CL and TE, two lengths, folded headers, bare LF, chunk sizes, ...)",
        "one answer at most, then the connection is closed; the hidden request reaches no route",
    )
    headers, body = SHAPES[shape]
    sent = post(gateway, *(filled(one, gateway) for one in headers), body=filled(body, gateway).encode("latin-1"))
    raw = await talk(gateway.port, [sent + hidden(gateway)], timeout=1.5)
    found, rest = responses(raw)
    assert len(found) <= 1 and not rest, raw
    assert b"hidden" not in raw
    assert not found or 400 <= found[0].status < 500


BODIES: dict[str, tuple[list[str], str, str]] = {
    # what is sent: (headers, body, key); the hidden request is the body, which has to be read as one
    "a key that is unknown": (["content-length: {n}"], "", "nk-unknown"),
    "no JSON": (["content-length: {n}"], "", ""),
    "a chunk with an extension": (["transfer-encoding: chunked"], "{x};a=b\r\n{hidden}\r\n0\r\n\r\n", "nk-unknown"),
    "a chunk with leading zeros": (["transfer-encoding: chunked"], "0000{x}\r\n{hidden}\r\n0\r\n\r\n", "nk-unknown"),
    "trailers": (["transfer-encoding: chunked"], "{x}\r\n{hidden}\r\n0\r\nx-a: b\r\n\r\n", "nk-unknown"),
    "100-continue": (["expect: 100-continue", "content-length: {n}"], "", "nk-unknown"),
    "the same length twice": (["content-length: {n}", "content-length: {n}"], "", "nk-unknown"),
}


@pytest.mark.parametrize("what", BODIES)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/feedback", "/nowhere", "/livez"])
async def test_a_request_inside_of_a_body_stays_a_body(gateway: Newel, what: str, path: str) -> None:
    headers, body, key = BODIES[what]
    secret = hidden(gateway)
    raw_body = body.replace("{x}", f"{len(secret):x}").encode().replace(b"{hidden}", secret) or secret
    sent = post(gateway, *(filled(one, gateway) for one in headers), body=raw_body, key=key, path=path)
    raw = await talk(gateway.port, [sent], timeout=1.5, quiet=0.15)
    found, rest = responses(raw)
    assert len(found) == 1 and not rest, raw
    assert b"models/hidden" not in raw and b"'hidden'" not in raw
    assert 400 <= found[0].status < 500


async def test_a_request_that_comes_byte_by_byte(gateway: Newel) -> None:
    body = question(gateway)
    whole = post(gateway, f"content-length: {len(body)}", body=body)
    raw = await talk(gateway.port, [whole[i : i + 1] for i in range(len(whole))])
    assert [one.status for one in responses(raw)[0]] == [200]


async def test_clients_that_never_end_their_requests_keep_nobody_else_waiting(
    started: Started, fault: Fault, tmp_path: Path
) -> None:
    fault.tell(GROUP, "200 clients that send a byte of a header from time to time", "others are answered at once")
    gateway = await started()
    sockets = [await asyncio.open_connection("127.0.0.1", gateway.port) for _ in range(200)]
    for _, writer in sockets:
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nx-a: ")
    for _ in range(3):
        for _, writer in sockets:
            writer.write(b"b")
        began = time.monotonic()
        body = question(gateway)
        raw = await talk(gateway.port, [post(gateway, f"content-length: {len(body)}", body=body)], quiet=0.05)
        assert [one.status for one in responses(raw)[0]] == [200]
        fault.took("", time.monotonic() - began)
    assert fault.measured[""] < 1.0  # type: ignore[operator]
    for _, writer in sockets:
        writer.transport.abort()
