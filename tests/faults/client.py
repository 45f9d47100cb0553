"""Clients: what one request came to, over aiohttp or over a raw socket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from tests.faults.newel import Newel


@dataclass(slots=True)
class Heard:
    """What a client was told. error: of the body, or of the event in a stream; seconds: until the end.

    broken: how the connection ended, if not as HTTP wants it. first: seconds until the first text.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    text: str = ""
    finish: str = ""
    error: dict[str, Any] = field(default_factory=dict)
    done: bool = False
    broken: str = ""
    seconds: float = 0.0
    first: float | None = None

    @property
    def id(self) -> str:
        return self.headers.get("x-guardrails-id", "")

    @property
    def complete(self) -> bool:
        """A good answer, to its end."""
        return self.status == 200 and not self.broken and not self.error and bool(self.finish)

    @property
    def unavailable(self) -> bool:
        """A 503 that says when to come back, in OpenAI's form."""
        return self.status == 503 and int(self.headers.get("retry-after", "0")) >= 1 and "message" in self.error

    @property
    def ended(self) -> bool:
        """A stream that ended as it should, with an error or without: never in silence."""
        return self.status == 200 and not self.broken and self.done and bool(self.error or self.finish)


async def ask(
    http: aiohttp.ClientSession,
    gateway: Newel,
    text: str = "Hello",
    *,
    stream: bool = False,
    base: str = "",
    seen: list[str] | None = None,
    **more: Any,
) -> Heard:
    """What one chat request came to; pieces of a stream are added to `seen` as they come."""
    heard, began = Heard(), time.monotonic()
    url, body = f"{base or gateway.base}/v1/chat/completions", gateway.body(text, stream=stream, **more)
    try:
        async with http.post(url, json=body, headers=gateway.headers()) as answer:
            heard.status = answer.status
            heard.headers = {name.lower(): value for name, value in answer.headers.items()}
            if answer.content_type == "text/event-stream":
                await _listen(answer, heard, began, seen)
            else:
                _read(heard, await answer.read())
    except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
        heard.broken = type(error).__name__
    heard.seconds = time.monotonic() - began
    return heard


async def _listen(answer: aiohttp.ClientResponse, heard: Heard, began: float, seen: list[str] | None) -> None:
    async for line in answer.content:
        data = line.strip().removeprefix(b"data: ")
        if data == b"[DONE]":
            heard.done = True
        elif data.startswith(b"{"):
            frame = orjson.loads(data)
            heard.error = frame.get("error") or heard.error
            for choice in frame.get("choices") or ():
                heard.finish = choice.get("finish_reason") or heard.finish
                text = choice["delta"].get("content") or ""
                heard.text += text
                if text and heard.first is None:
                    heard.first = time.monotonic() - began
                if text and seen is not None:
                    seen.append(text)


def _read(heard: Heard, raw: bytes) -> None:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:  # a proxy's own page
        heard.broken = "no JSON"
        return
    heard.error = body.get("error") or {}
    for choice in body.get("choices") or ():
        heard.text, heard.finish = choice["message"]["content"] or "", choice["finish_reason"]


# --- raw bytes


@dataclass(frozen=True, slots=True)
class Response:
    """One HTTP response as it was read off a socket."""

    status: int
    headers: dict[str, str]
    body: bytes


def responses(raw: bytes) -> tuple[list[Response], bytes]:
    """The final responses in these bytes, in order, and what is no whole response behind them."""
    found: list[Response] = []
    while (end := raw.find(b"\r\n\r\n")) >= 0 and raw.startswith(b"HTTP/1."):
        first, *lines = raw[:end].decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in lines)}
        status, rest = int(first.split()[1]), raw[end + 4 :]
        if 100 <= status < 200:
            raw = rest
            continue
        body, left = _framed(headers, rest)
        if body is None:
            break
        found.append(Response(status, headers, body))
        raw = left
    return found, raw


def _framed(headers: dict[str, str], rest: bytes) -> tuple[bytes | None, bytes]:
    """(body, what follows it); no body while it is not whole."""
    if headers.get("transfer-encoding") != "chunked":
        size = int(headers.get("content-length", "0"))
        return (rest[:size], rest[size:]) if len(rest) >= size else (None, rest)
    body = b""
    while b"\r\n" in rest:
        line, rest = rest.split(b"\r\n", 1)
        size = int(line, 16)
        if len(rest) < size + 2:
            break
        body, rest = body + rest[:size], rest[size + 2 :]
        if not size:
            return body, rest
    return None, rest


async def talk(
    port: int, sent: Sequence[bytes | float], *, half_close: bool = False, timeout: float = 3.0, quiet: float = 0.3
) -> bytes:
    """All that comes back for these bytes (numbers are pauses in seconds) until the server hangs up, has said nothing
    for `quiet` seconds after it said something, or `timeout` is over."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    raw, writing = bytearray(), asyncio.create_task(_send(writer, sent, half_close))
    until = time.monotonic() + timeout
    try:
        while (left := until - time.monotonic()) > 0:
            patient = half_close or not raw or not writing.done()
            async with asyncio.timeout(left if patient else min(left, quiet)):
                got = await reader.read(1 << 16)
            if not got:
                break
            raw += got
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writing.cancel()
        writer.transport.abort()
    return bytes(raw)


async def _send(writer: asyncio.StreamWriter, sent: Sequence[bytes | float], half_close: bool) -> None:
    with suppress(ConnectionError):  # the server may have heard enough
        for part in sent:
            if isinstance(part, float):
                await asyncio.sleep(part)
            else:
                writer.write(part)
                await writer.drain()
        if half_close:
            writer.write_eof()
