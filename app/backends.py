"""The engine as the gateway sees it: an OpenAI-compatible upstream, streamed over aiohttp.

Replies are always streamed from the engine, also for clients that do not stream: a stopped reply then ends the
engine's work at once, and there is one road to test.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import aiohttp
import orjson

from guardrails.answers import weighed
from guardrails.guard_formats import ANSWER
from guardrails.types import Message, Token, ToolMessage

T = TypeVar("T")
Fault = Literal["unreachable", "busy", "rejected", "timeout", "broken"]
MAX_CALLS = 128
"""Tool calls in one reply."""
MAX_EVENT = 4_194_304
"""Bytes of one event; a token with its log-probabilities has some hundred."""
DONE = b"[DONE]"


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
class CallDelta:
    """A piece of the tool call of this number: of its name, of its arguments."""

    number: int
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a reply; the last ones carry the finish reason and the token counts."""

    text: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()

    @property
    def says(self) -> bool:
        """True when the model has written something in it."""
        return bool(self.text or self.reasoning or self.calls)


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
    """Where the engine is now; read anew for each request, since a restarted engine has another port.

    without: sampling parameters that this engine must not be sent.
    """

    url: str
    model: str
    api_key: str = ""
    without: frozenset[str] = frozenset()


class OpenAIBackend:
    """A Backend over any server that speaks OpenAI's chat completions."""

    def __init__(
        self, session: aiohttp.ClientSession, upstream: Callable[[], Upstream], timeouts: Timeouts | None = None
    ):
        self._session, self._upstream = session, upstream
        self._timeouts = timeouts or Timeouts()

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Delta, None]:
        """The reply in pieces, in the order that the engine sends them.

        Only waits for the engine are timed: a consumer may take as long as it likes for a piece.
        """
        clock = asyncio.get_running_loop().time
        over = clock() + self._timeouts.total
        until, speaking = min(over, clock() + self._timeouts.first_token), False
        body = {"stream": True, "stream_options": {"include_usage": True}, **prompt.sampling}
        async with self._asked(body, prompt.messages, until) as response:
            finished = False
            async with aclosing(events(response.content.iter_any())) as source:
                while (event := await _within(until, anext(source, DONE))) != DONE:
                    delta = _delta(event)
                    finished = finished or bool(delta.finish_reason)
                    speaking = speaking or delta.says
                    yield delta
                    if speaking:
                        until = min(over, clock() + self._timeouts.idle)
            if not finished:
                raise BackendError("broken", "The engine broke off in the middle of its reply.")

    async def probability(self, messages: Sequence[Message]) -> float:
        """P(yes) / (P(yes) + P(no)) from the log-probabilities of the first token; raises BackendError, ValueError."""
        until = asyncio.get_running_loop().time() + self._timeouts.first_token
        body = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}
        async with self._asked(body, messages, until) as response:
            return yes_probability(tokens_of(orjson.loads(await _within(until, response.read()))))

    @asynccontextmanager
    async def _asked(
        self, body: Mapping[str, Any], messages: Sequence[Message], until: float
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The engine's answer to a request, status 200, and its failures as BackendError; hangs up at the end."""
        upstream = self._upstream()
        told = {name: value for name, value in body.items() if name not in upstream.without}
        told |= {"model": upstream.model, "messages": written(messages)}
        async with posted(self._session, upstream, "chat/completions", told, until) as response:
            yield response


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


@asynccontextmanager
async def posted(
    session: aiohttp.ClientSession, upstream: Upstream, path: str, body: Mapping[str, Any], until: float
) -> AsyncIterator[aiohttp.ClientResponse]:
    """An engine's answer to a request, status 200, and its failures as BackendError; hangs up at the end."""
    headers = {"content-type": "application/json"}
    if upstream.api_key:
        headers["authorization"] = f"Bearer {upstream.api_key}"
    url = f"{upstream.url.rstrip('/')}/{path}"
    try:
        response = await _within(until, session.post(url, data=orjson.dumps(body), headers=headers))
        try:
            if response.status != 200:
                raise _refusal(response, await _within(until, response.read()))
            yield response
        finally:
            response.close()  # an answer that was read to its end has given its connection back already
    except TimeoutError:
        raise BackendError("timeout", "The engine took too long to answer.") from None
    except aiohttp.ClientConnectorError:
        raise BackendError("unreachable", "The engine cannot be reached.", retry_after=5) from None
    except (aiohttp.ClientError, ConnectionError):
        raise BackendError("broken", "The connection to the engine broke off.") from None


async def answered(
    session: aiohttp.ClientSession, upstream: Upstream, path: str, body: Mapping[str, Any], until: float
) -> list[Token]:
    """The tokens of an engine's answer with their log-probabilities; raises BackendError, ValueError."""
    async with posted(session, upstream, path, body, until) as response:
        return tokens_of(orjson.loads(await _within(until, response.read())))


async def events(chunks: AsyncIterable[bytes]) -> AsyncGenerator[bytes, None]:
    """The data of each server-sent event, for any split of the bytes (WHATWG HTML, section 9.2.6).

    Comments and other fields are skipped, data lines are joined by newlines, CR, LF and CRLF end a line. Raises
    BackendError when one event grows beyond MAX_EVENT bytes. An event that the stream cuts off is dropped.
    """
    rest, after_cr = b"", False
    data: list[bytes] = []
    size = 0
    async for chunk in chunks:
        text = chunk.removeprefix(b"\n") if after_cr else chunk  # the second half of a CRLF
        after_cr = chunk.endswith(b"\r") or (after_cr and not chunk)
        *lines, rest = (rest + text).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            size += len(line)
            name, _, value = line.partition(b":")
            if name == b"data":
                data.append(value.removeprefix(b" "))
            elif not line:
                if data:
                    yield b"\n".join(data)
                data, size = [], 0
        if size + len(rest) > MAX_EVENT:
            raise BackendError("broken", "The engine sent an event without an end.")


async def _within(until: float, work: Awaitable[T]) -> T:
    """What `work` returns, by the time `until` of the loop's clock; raises TimeoutError."""
    async with asyncio.timeout_at(until):
        return await work


def _delta(event: bytes) -> Delta:
    try:
        frame = orjson.loads(event)
        if error := frame.get("error"):
            raise _error_frame(error)
        usage = frame.get("usage") or {}
        choice = (frame.get("choices") or [{}])[0]
        delta = choice.get("delta") or {}
        return Delta(
            str(delta.get("content") or ""),
            str(choice.get("finish_reason") or ""),
            int(usage.get("prompt_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
            str(delta.get("reasoning_content") or delta.get("reasoning") or ""),
            tuple(_call(place, call) for place, call in enumerate(delta.get("tool_calls") or ())),
        )
    except (orjson.JSONDecodeError, AttributeError, LookupError, TypeError, ValueError):
        raise BackendError("broken", "The engine sent an event that is no chunk of a chat completion.") from None


def _call(place: int, call: Any) -> CallDelta:
    number, function = call.get("index"), call.get("function") or {}
    number = place if number is None else int(number)
    if not 0 <= number < MAX_CALLS:
        raise ValueError
    arguments = function.get("arguments") or ""
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return CallDelta(number, str(function.get("name") or ""), written)


def _error_frame(error: Any) -> BackendError:
    """An error that came inside a 200 (vLLM does so when it is overloaded)."""
    code = error.get("code") if isinstance(error, dict) else None
    if code in (429, 503):
        return BackendError("busy", "The engine is busy.", retry_after=2)
    return BackendError("broken", "The engine reported an error in the middle of its reply.")


def _refusal(response: aiohttp.ClientResponse, body: bytes) -> BackendError:
    """What another status than 200 means."""
    after = response.headers.get("retry-after", "")
    retry_after = int(after) if after.isdecimal() else 2
    if response.status in (429, 503):
        return BackendError("busy", "The engine is busy.", retry_after=retry_after)
    if response.status in (400, 413, 422):
        message, code = _told(body)
        return BackendError("rejected", message, code=code)
    return BackendError("broken", f"The engine answered with status {response.status}.", retry_after=retry_after)


def _told(body: bytes) -> tuple[str, str]:
    """(message, code) of an OpenAI error body from the engine, or general words."""
    try:
        error = orjson.loads(body)["error"]
        message, code = str(error["message"]), str(error.get("code") or "")
    except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError):
        return "The engine refused the request.", "invalid_value"
    too_long = "context length" in message or "maximum context" in message
    return message, "context_length_exceeded" if too_long else code if not code.isdecimal() else "invalid_value"


def tokens_of(completion: Any) -> list[Token]:
    """The tokens of a completion or chat completion with their alternatives; raises ValueError where there are none."""
    try:
        logprobs = completion["choices"][0]["logprobs"]
        if "content" in logprobs:
            return [
                Token(str(one["token"]), tuple((str(other["token"]), float(other["logprob"])) for other in _tops(one)))
                for one in logprobs["content"]
            ]
        pairs = zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True)
        return [
            Token(str(token), tuple((str(text), float(log)) for text, log in (tops or {}).items()))
            for token, tops in pairs
        ]
    except (AttributeError, LookupError, TypeError, ValueError):
        raise ValueError("the engine returned no log-probabilities; it must support `logprobs`") from None


def _tops(token: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return token["top_logprobs"] or ()


def yes_probability(tokens: Sequence[Token]) -> float:
    """P(yes) / (P(yes) + P(no)) over the first token's alternatives; raises ValueError when neither is among them."""
    return weighed(tokens[0].alternatives if tokens else (), tuple(ANSWER), least=0.0)["yes"]
