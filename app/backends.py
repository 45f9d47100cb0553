"""The engine as the gateway sees it: an OpenAI-compatible upstream, streamed over aiohttp.

Replies are always streamed from the engine, also for clients that do not stream: a stopped reply then ends the
engine's work at once, and there is one road to test.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import aiohttp
import orjson

from guardrails.types import Message

Fault = Literal["unreachable", "busy", "rejected", "timeout", "broken"]
MAX_EVENT = 4_194_304


class BackendError(Exception):
    """The engine did not answer as it should.

    unreachable: no connection; busy: it said so (503, 429); rejected: it refused the request (4xx, `code` and
    message are its own); timeout; broken: the reply broke off or was no event stream. retry_after in seconds.
    """

    def __init__(self, fault: Fault, message: str, *, code: str = "", retry_after: int | None = None):
        super().__init__(message)
        self.fault, self.message, self.code, self.retry_after = fault, message, code, retry_after


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the engine is asked: messages as the policy lets it see them, and sampling parameters."""

    messages: tuple[Message, ...]
    sampling: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a reply; the last ones carry the finish reason and the token counts."""

    text: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Backend(Protocol):
    """The seam to whatever generates text."""

    def stream(self, prompt: Prompt) -> AsyncGenerator[Delta, None]:
        """The reply in pieces; raises BackendError; closing the generator cancels the engine's work."""
        ...

    async def probability(self, messages: Sequence[Message]) -> float:
        """P(yes) for a yes/no question (see `guardrails.types.Grader`)."""
        ...


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: to the first token, between two pieces, for the whole reply."""

    first_token: float = 60.0
    idle: float = 60.0
    total: float = 600.0


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where the engine is now; read anew for each request, since a restarted engine has another port."""

    url: str
    model: str
    api_key: str = ""
    without: frozenset[str] = frozenset()


class OpenAIBackend:
    """A Backend over any server that speaks OpenAI's chat completions."""

    def __init__(self, session: aiohttp.ClientSession, upstream: Callable[[], Upstream], timeouts: Timeouts | None = None):
        self._session, self._upstream = session, upstream
        self._timeouts = timeouts or Timeouts()

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Delta, None]:
        """The reply in pieces, in the order that the engine sends them."""
        upstream = self._upstream()
        sampling = {name: value for name, value in prompt.sampling.items() if name not in upstream.without}
        body = _body(upstream, prompt.messages) | sampling
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        try:
            async with asyncio.timeout(self._timeouts.total), self._post(upstream, body) as response:
                await _raise_for_status(response)
                finished = False
                async for event in self._timed(events(response.content.iter_any())):
                    if event == b"[DONE]":
                        break
                    delta = _delta(event)
                    finished = finished or bool(delta.finish_reason)
                    yield delta
                if not finished:
                    raise BackendError("broken", "The engine broke off in the middle of its reply.")
        except TimeoutError:
            raise BackendError("timeout", "The engine took too long to answer.") from None
        except aiohttp.ClientConnectorError:
            raise BackendError("unreachable", "The engine cannot be reached.", retry_after=5) from None
        except (aiohttp.ClientError, ConnectionError):
            raise BackendError("broken", "The connection to the engine broke off.") from None

    async def probability(self, messages: Sequence[Message]) -> float:
        """P(yes) / (P(yes) + P(no)) from the log-probabilities of the first token."""
        upstream = self._upstream()
        ask = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}
        try:
            async with (
                asyncio.timeout(self._timeouts.first_token),
                self._post(upstream, _body(upstream, messages) | ask) as response,
            ):
                await _raise_for_status(response)
                return yes_probability(orjson.loads(await response.read()))
        except (aiohttp.ClientError, TimeoutError, ConnectionError):
            raise BackendError("unreachable", "The engine did not answer the grader.") from None

    def _post(self, upstream: Upstream, body: dict[str, Any]) -> Any:
        headers = {"content-type": "application/json"}
        if upstream.api_key:
            headers["authorization"] = f"Bearer {upstream.api_key}"
        url = f"{upstream.url.rstrip('/')}/chat/completions"
        return self._session.post(url, data=orjson.dumps(body), headers=headers)

    async def _timed(self, source: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
        """The events, each within its time: the first within `first_token`, the others within `idle`."""
        limit = self._timeouts.first_token
        while True:
            try:
                async with asyncio.timeout(limit):
                    event = await anext(source)
            except StopAsyncIteration:
                return
            limit = self._timeouts.idle
            yield event


def _body(upstream: Upstream, messages: Sequence[Message]) -> dict[str, Any]:
    said = [{"role": message.role, "content": message.content} for message in messages]
    return {"model": upstream.model, "messages": said}


async def events(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The data of each server-sent event, for any split of the bytes (WHATWG HTML, section 9.2.6).

    Comments and other fields are skipped, data lines are joined by newlines, CR, LF and CRLF end a line. Raises
    BackendError when one event grows beyond MAX_EVENT bytes. An event that the stream cuts off is dropped.
    """
    buffer = b""
    data: list[bytes] = []
    async for chunk in chunks:
        buffer += chunk
        if len(buffer) > MAX_EVENT:
            raise BackendError("broken", "The engine sent an event without an end.")
        lines = buffer.replace(b"\r\n", b"\n")
        held = b"\r" if lines.endswith(b"\r") else b""
        lines = lines[: len(lines) - len(held)].replace(b"\r", b"\n")
        *complete, rest = lines.split(b"\n")
        buffer = rest + held
        for line in complete:
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data)
                data = []


def _delta(event: bytes) -> Delta:
    try:
        frame = orjson.loads(event)
    except orjson.JSONDecodeError:
        raise BackendError("broken", "The engine sent an event that is not JSON.") from None
    if not isinstance(frame, dict):
        raise BackendError("broken", "The engine sent an event that is not an object.")
    if error := frame.get("error"):
        raise _error_frame(error)
    usage = frame.get("usage") or {}
    choice = (frame.get("choices") or [{}])[0]
    return Delta(
        (choice.get("delta") or {}).get("content") or "",
        choice.get("finish_reason") or "",
        usage.get("prompt_tokens") or 0,
        usage.get("completion_tokens") or 0,
    )


def _error_frame(error: Any) -> BackendError:
    """An error that came inside a 200 (vLLM does so when it is overloaded)."""
    code = error.get("code") if isinstance(error, dict) else None
    if code in (429, 503):
        return BackendError("busy", "The engine is busy.", retry_after=2)
    return BackendError("broken", "The engine reported an error in the middle of its reply.")


async def _raise_for_status(response: aiohttp.ClientResponse) -> None:
    if response.status < 400:
        return
    after = response.headers.get("retry-after", "")
    retry_after = int(after) if after.isdigit() else 2
    if response.status in (429, 503):
        raise BackendError("busy", "The engine is busy.", retry_after=retry_after)
    if response.status in (400, 413, 422):
        message, code = _told(await response.read())
        raise BackendError("rejected", message, code=code)
    raise BackendError("broken", f"The engine answered with status {response.status}.", retry_after=retry_after)


def _told(body: bytes) -> tuple[str, str]:
    """(message, code) of an OpenAI error body from the engine, or general words."""
    try:
        error = orjson.loads(body)["error"]
        message, code = str(error["message"]), str(error.get("code") or "")
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return "The engine refused the request.", "invalid_value"
    too_long = "context length" in message or "maximum context" in message
    return message, "context_length_exceeded" if too_long else code if not code.isdigit() else "invalid_value"


def yes_probability(completion: dict[str, Any]) -> float:
    """P(yes) / (P(yes) + P(no)) over the first token's alternatives; raises ValueError when neither is among them."""
    try:
        alternatives = completion["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    except (KeyError, IndexError, TypeError):
        raise ValueError("the engine returned no log-probabilities") from None
    mass = {"yes": 0.0, "no": 0.0}
    for alternative in alternatives:
        word = alternative["token"].strip(" \n▁Ġ.\"'").lower()
        if word in mass:
            mass[word] += math.exp(alternative["logprob"])
    if not (total := mass["yes"] + mass["no"]):
        raise ValueError("neither yes nor no is among the first token's alternatives")
    return mass["yes"] / total
