"""The client of an engine: any server that speaks OpenAI's chat completions, over aiohttp.

A reply that the client wants whole is asked for whole, which costs a tenth of the CPU; one that is streamed ends the
engine's work as soon as it is stopped.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any, TypeVar

import aiohttp
import orjson
from yarl import URL

from app.frames import (
    BackendError,
    Chunks,
    Delta,
    read_completion,
    tokens_of,
    yes_probability,
)
from guardrails.types import Message, Token, ToolMessage

T = TypeVar("T")
LATE = "The engine took too long to answer."
LAST_WORDS = 1.0
"""Seconds that an engine has to tell its token counts after it has finished."""
MAX_ANSWER = 67_108_864
"""Bytes of a whole reply."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the engine is asked: messages as the policy lets it see them, and sampling parameters.

    headers: what tells the engine of the request that this is part of (its id, its trace).
    """

    messages: tuple[Message, ...]
    sampling: Mapping[str, Any]
    headers: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: to the first token, between two pieces, for the whole reply."""

    first_token: float = 60.0
    idle: float = 60.0
    total: float = 600.0


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where an engine is now; read anew for each request, since a restarted engine has another port.

    without: sampling parameters that this engine must not be sent.
    """

    url: str
    model: str
    api_key: str = ""
    without: frozenset[str] = frozenset()


class OpenAIBackend:
    """Asks engines, each as an Upstream. Errors are BackendError; those before the first item are safe to try again."""

    def __init__(self, session: aiohttp.ClientSession, timeouts: Timeouts | None = None):
        self._session, self._timeouts = session, timeouts or Timeouts()

    async def stream(self, upstream: Upstream, prompt: Prompt) -> AsyncGenerator[Delta, None]:
        """The reply in pieces, in the order that the engine sends them; closing it cancels the engine's work.

        Only waits for the engine are timed: a consumer may take as long as it likes for a piece.
        """
        clock, chunks = asyncio.get_running_loop().time, Chunks()
        over, finished, speaking = clock() + self._timeouts.total, False, False
        until = min(over, clock() + self._timeouts.first_token)
        body = {"stream": True, "stream_options": {"include_usage": True}, **prompt.sampling}
        async with self._asked(upstream, body, prompt, until) as response:
            with closing(Alarm(response.content)) as alarm:
                while data := await alarm.read(until, finished):
                    for delta in chunks.feed(data):
                        finished = finished or bool(delta.finish_reason)
                        speaking = speaking or delta.says
                        yield delta
                    if chunks.ended:
                        break
                    if finished:
                        until = min(over, clock() + LAST_WORDS)
                    elif speaking and chunks.came:
                        until = min(over, clock() + self._timeouts.idle)
            if not finished:
                raise BackendError("broken", "The engine broke off in the middle of its reply.")

    async def complete(self, upstream: Upstream, prompt: Prompt) -> Delta:
        """The whole reply in one piece; cancelling it cancels the engine's work."""
        try:
            async with (
                asyncio.timeout(self._timeouts.total),
                self._asked(upstream, prompt.sampling, prompt, None) as response,
            ):
                reply = read_completion(await _whole(response))
        except TimeoutError:
            raise BackendError("timeout", LATE) from None
        if not reply.finish_reason:
            raise BackendError("broken", "The engine sent a reply without a finish reason.")
        return reply

    async def post(self, upstream: Upstream, path: str, body: Mapping[str, Any]) -> bytes:
        """What the engine answers to another request, as it came; raises BackendError."""
        try:
            async with (
                asyncio.timeout(self._timeouts.total),
                posted(self._session, upstream, path, {"model": upstream.model, **body}, None) as response,
            ):
                return await _whole(response)
        except TimeoutError:
            raise BackendError("timeout", LATE) from None

    async def probability(self, upstream: Upstream, messages: Sequence[Message]) -> float:
        """P(yes) / (P(yes) + P(no)) from the log-probabilities of the first token; raises BackendError, ValueError."""
        until = asyncio.get_running_loop().time() + self._timeouts.first_token
        body = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}
        async with self._asked(upstream, body, Prompt(tuple(messages), body), until) as response:
            return yes_probability(tokens_of(orjson.loads(await _within(until, response.read()))))

    def _asked(self, upstream: Upstream, body: Mapping[str, Any], prompt: Prompt, until: float | None) -> posted:
        """The engine's answer to a request, status 200, and its failures as BackendError; hangs up at the end."""
        told = {name: value for name, value in body.items() if name not in upstream.without}
        told["model"], told["messages"] = upstream.model, written(prompt.messages)
        return posted(self._session, upstream, "chat/completions", told, until, prompt.headers)


@dataclass(frozen=True, slots=True)
class OneEngine:
    """One engine with its client, for who asks no other: a Grader (`guardrails.types.Grader`)."""

    backend: OpenAIBackend
    upstream: Upstream

    async def probability(self, messages: Sequence[Message]) -> float:
        """P(yes) for a yes/no question; raises BackendError, ValueError."""
        return await self.backend.probability(self.upstream, messages)


def written(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation as engines read it: tool calls belong to the message before them."""
    out: list[dict[str, Any]] = []
    for one in messages:
        if not isinstance(one, ToolMessage):
            out.append({"role": one.role, "content": one.content})
        elif one.role == "tool":
            out.append({"role": "tool", "content": one.content, "tool_call_id": one.call})
        else:
            if not out or out[-1]["role"] != "assistant":
                out.append({"role": "assistant", "content": None})
            function = {"name": one.name, "arguments": _valid(one.content)}
            out[-1].setdefault("tool_calls", []).append({"id": one.call, "type": "function", "function": function})
    return out


def _valid(arguments: str) -> str:
    """Arguments that are JSON, though they were written or redacted so that they are none: engines refuse those."""
    try:
        json.loads(arguments)
    except (ValueError, RecursionError):
        return json.dumps({"arguments": arguments}, ensure_ascii=False)
    return arguments


@lru_cache(256)
def _url(base: str, path: str) -> URL:
    return URL(f"{base.rstrip('/')}/{path}")


class posted:
    """An engine's answer to a request, status 200, and its failures as BackendError; hangs up at the end.

    until: the loop's time by which it must be there; None where the caller times it.
    """

    __slots__ = ("_body", "_headers", "_path", "_response", "_session", "_until", "_upstream")

    def __init__(
        self,
        session: aiohttp.ClientSession,
        upstream: Upstream,
        path: str,
        body: Mapping[str, Any],
        until: float | None,
        more_headers: Mapping[str, str] | None = None,
    ):
        self._session, self._upstream, self._path, self._until = session, upstream, path, until
        self._body = orjson.dumps(body)
        self._headers = {"content-type": "application/json", **(more_headers or {})}
        if upstream.api_key:
            self._headers["authorization"] = f"Bearer {upstream.api_key}"
        self._response: aiohttp.ClientResponse | None = None

    async def __aenter__(self) -> aiohttp.ClientResponse:
        until = self._until
        try:
            asking = self._session.post(_url(self._upstream.url, self._path), data=self._body, headers=self._headers)
            self._response = response = await (_within(until, asking) if until else asking)
            if self._path == "embeddings" and response.status in (404, 405, 501):
                raise BackendError("rejected", "The engine has no such route.", code="embeddings_not_served")
            if response.status != 200:
                raise _refusal(response, await (_within(until, response.read()) if until else response.read()))
        except BaseException as error:
            self._hang_up()
            if fault := _fault(error):
                raise fault from None
            raise
        return response

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hang_up()
        if error is not None and (fault := _fault(error)):
            raise fault from None

    def _hang_up(self) -> None:
        if self._response is not None:
            self._response.close()  # an answer that was read to its end has given its connection back already


def _fault(error: BaseException) -> BackendError | None:
    """What an error says of the engine, if anything."""
    if isinstance(error, TimeoutError):
        return BackendError("timeout", LATE)
    if isinstance(error, aiohttp.ClientConnectorError):
        return BackendError("unreachable", "The engine cannot be reached.", retry_after=5)
    if isinstance(error, aiohttp.ClientError | ConnectionError):
        return BackendError("broken", "The connection to the engine broke off.")
    return None


async def answered(
    session: aiohttp.ClientSession, upstream: Upstream, path: str, body: Mapping[str, Any], until: float
) -> list[Token]:
    """The tokens of an engine's answer with their log-probabilities; raises BackendError, ValueError."""
    async with posted(session, upstream, path, body, until) as response:
        return tokens_of(orjson.loads(await _within(until, response.read())))


class Alarm:
    """Reads a reply with time-outs, one short wait after another, with one timer: it is set anew only when it rings too
    early. A wait that takes too long ends all reading."""

    __slots__ = ("_content", "_loop", "_timer", "_until", "_waits")

    def __init__(self, content: aiohttp.StreamReader):
        self._content, self._loop = content, asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._until, self._waits = math.inf, False

    async def read(self, until: float, finished: bool) -> bytes:
        """All that has come, by the time `until` of the loop's clock; nothing at the end.

        Of an engine that has `finished` it is the end, too, when it says no more until then; else raises TimeoutError.
        """
        self._until, self._waits = until, True
        if self._timer is None or until < self._timer.when():
            self._set(until)
        try:
            return await self._content.readany()
        except TimeoutError:
            if finished:
                return b""
            raise
        finally:
            self._waits = False

    def close(self) -> None:
        """Rings no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _set(self, when: float) -> None:
        self.close()
        self._timer = self._loop.call_at(when, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if not self._waits:
            return
        if self._until > self._loop.time():
            self._set(self._until)
        else:
            self._content.set_exception(TimeoutError())


async def _whole(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    while piece := await response.content.readany():
        body += piece
        if len(body) > MAX_ANSWER:
            raise BackendError("broken", "The engine sent an answer without an end.")
    return bytes(body)


async def _within(until: float, work: Awaitable[T]) -> T:
    """What `work` returns, by the time `until` of the loop's clock; raises TimeoutError."""
    async with asyncio.timeout_at(until):
        return await work


def _refusal(response: aiohttp.ClientResponse, body: bytes) -> BackendError:
    """What another status than 200 means."""
    after = response.headers.get("retry-after", "")
    retry_after = int(after) if after.isdecimal() else None
    if response.status in (429, 503):
        return BackendError("busy", "The engine is busy.", retry_after=retry_after)
    if response.status in (400, 413, 422):
        message, code = _told(body)
        return BackendError("rejected", message, code=code)
    return BackendError("broken", f"The engine answered with status {response.status}.", retry_after=retry_after or 2)


def _told(body: bytes) -> tuple[str, str]:
    """(message, code) of an OpenAI error body from the engine, or general words."""
    try:
        error = orjson.loads(body)["error"]
        message, code = str(error["message"]), str(error.get("code") or "")
    except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError):
        return "The engine refused the request.", "invalid_value"
    too_long = "context length" in message or "maximum context" in message
    return message, "context_length_exceeded" if too_long else code if not code.isdecimal() else "invalid_value"
