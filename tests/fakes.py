"""The two shared fakes, real servers on loopback, and `serve` for an ASGI app under a real uvicorn.

async with FakeUpstream() as upstream, serve(create_app(settings_for(upstream.url))) as base:
    upstream.script = Script(["Hel", 0.2, "lo"])
    ...
"""

from __future__ import annotations

import asyncio
import json
import math
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, Self

import uvicorn
from aiohttp import web

End = Literal["stop", "error", "cut", "hang"]
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Script:
    """What the upstream does with one request, from top to bottom.

    wait: seconds before anything is sent, `math.inf` for ever. status: another one than 200 is answered as an OpenAI
    error, with `retry_after` as its Retry-After header. deltas: a str is a piece of the reply, a dict any other
    delta, a float a pause in seconds; bytes are written to the stream as they are. end: what comes after them: the
    final chunk ("stop"), an error frame ("error"), a closed connection without a final chunk ("cut"), or nothing for
    ever ("hang"). usage: (prompt, completion) tokens; counted in words and pieces unless given. tokens: a guard model's
    answer in place of `deltas`, each token as its alternatives with their probabilities, the written one first.
    """

    deltas: Sequence[str | float | bytes | Json] = ("Hello", " there", ".")
    wait: float = 0.0
    status: int = 200
    retry_after: str = ""
    message: str = "scripted failure"
    end: End = "stop"
    finish_reason: str = "stop"
    usage: tuple[int, int] | None = None
    tokens: Sequence[Mapping[str, float]] = ()

    @property
    def text(self) -> str:
        """The whole reply."""
        if self.tokens:
            return "".join(next(iter(token)) for token in self.tokens)
        return "".join(delta for delta in self.deltas if isinstance(delta, str))


@dataclass(slots=True)
class Seen:
    """A request as it came in and what became of it. Times are `time.monotonic()`; sent counts written deltas."""

    body: Json
    headers: Mapping[str, str]
    at: float = field(default_factory=time.monotonic)
    sent: int = 0
    cut: bool = False
    gone_at: float | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def grader(self) -> bool:
        """True for a yes/no question: one token, with log-probabilities."""
        limit = self.body.get("max_completion_tokens", self.body.get("max_tokens"))
        return limit == 1 and bool(self.body.get("logprobs"))

    @property
    def gone(self) -> bool:
        """True when the client hung up before the answer was complete."""
        return self.gone_at is not None

    async def finished(self, timeout: float = 5.0) -> Seen:
        """This request, once its answer is complete or its client has gone."""
        await asyncio.wait_for(self.over.wait(), timeout)
        return self


class FakeUpstream:
    """An OpenAI-compatible upstream that does what its scripts say and records what it is asked.

    A request takes the first of `queue`, else the script of its model in `models`, else `script`; all three may be
    changed at any time. A grader's request (one token, with log-probabilities) takes no script: after `thinking`
    seconds it is answered from `yes`, P(yes) or a function of the request. Embeddings are answered with `vectors`, the
    body as it is; without them there is no such route. `url` is what an OpenAI SDK takes as its base URL.
    """

    def __init__(self, script: Script | None = None, yes: float | Callable[[Seen], float] = 0.0, port: int = 0):
        self.script = script or Script()
        self.models: dict[str, Script] = {}
        self.queue: deque[Script] = deque()
        self.yes, self.thinking = yes, 0.0
        self.vectors: bytes | None = None
        self.requests: list[Seen] = []
        self._closing = False
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._chat)
        app.router.add_post("/v1/embeddings", self._embeddings)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        self._server = _Loopback(app, port)

    async def __aenter__(self) -> Self:
        self.root = await self._server.start()
        self.url = f"{self.root}/v1"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._closing = True
        await self._server.stop()

    @property
    def seen(self) -> list[Seen]:
        """The chat requests so far, without the graders'."""
        return [request for request in self.requests if not request.grader]

    @property
    def graded(self) -> list[Seen]:
        """The graders' requests so far."""
        return [request for request in self.requests if request.grader]

    async def asked(self, count: int = 1, timeout: float = 5.0) -> Seen:
        """The chat request number `count`, counted from 1, as soon as it is there."""
        async with asyncio.timeout(timeout):
            while len(self.seen) < count:
                await asyncio.sleep(0.005)
        return self.seen[count - 1]

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        names = list(self.models) or ["fake"]
        return web.json_response({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

    async def _embeddings(self, request: web.Request) -> web.Response:
        if self.vectors is None:
            raise web.HTTPNotFound
        self.requests.append(Seen(await request.json(), request.headers.copy()))
        return web.Response(body=self.vectors, content_type="application/json")

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        seen = Seen(await request.json(), request.headers.copy())
        self.requests.append(seen)
        try:
            if seen.grader and "messages" in seen.body:
                await _pause(self.thinking)
                return web.json_response(_graded(seen, self.yes(seen) if callable(self.yes) else self.yes))
            script = self.queue.popleft() if self.queue else self.models.get(seen.body.get("model", ""), self.script)
            return await self._answer(request, seen, script)
        except (asyncio.CancelledError, ConnectionError):
            if not (self._closing or seen.cut):
                seen.gone_at = time.monotonic()
            raise
        finally:
            seen.over.set()

    async def _answer(self, request: web.Request, seen: Seen, script: Script) -> web.StreamResponse:
        await _pause(script.wait)
        if script.status != 200:
            headers = {"Retry-After": script.retry_after} if script.retry_after else {}
            return web.json_response(_error(script), status=script.status, headers=headers)
        if seen.body.get("stream"):
            return await _streamed(request, seen, script)
        await _pause(sum(delta for delta in script.deltas if isinstance(delta, float)))
        if script.end == "error":
            return web.json_response(_error(script), status=500)
        if script.end == "stop":
            more = {"logprobs": _logprobs(seen, script)} if script.tokens else {}
            return web.json_response(_completion(seen, script, **more))
        await _break_off(request, seen, script)


async def _streamed(request: web.Request, seen: Seen, script: Script) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    await response.write(_chunk(seen, {"role": "assistant", "content": ""}))
    for delta in script.deltas:
        if isinstance(delta, float):
            await _pause(delta)
            continue
        said = {"content": delta} if isinstance(delta, str) else delta
        await response.write(said if isinstance(said, bytes) else _chunk(seen, said))
        seen.sent += 1
    if script.end in ("cut", "hang"):
        await _break_off(request, seen, script)
    if script.end == "error":
        await response.write(_frame(_error(script)))
    else:
        await response.write(_chunk(seen, {}, script.finish_reason))
        if (seen.body.get("stream_options") or {}).get("include_usage"):
            await response.write(
                _frame(_head(seen, "chat.completion.chunk") | {"choices": [], "usage": _usage(seen, script)})
            )
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


async def _break_off(request: web.Request, seen: Seen, script: Script) -> NoReturn:
    """Never returns: the handler is cancelled when the connection ends, which a cut does at once."""
    if script.end == "cut" and request.transport is not None:
        seen.cut = True
        request.transport.close()
    await _pause(math.inf)
    raise AssertionError


async def _pause(seconds: float) -> None:
    if seconds == math.inf:
        await asyncio.Event().wait()
    await asyncio.sleep(seconds)


def _head(seen: Seen, kind: str) -> Json:
    return {"id": "chatcmpl-fake", "object": kind, "created": 1_700_000_000, "model": seen.body.get("model", "")}


def _chunk(seen: Seen, delta: Json, finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return _frame(_head(seen, "chat.completion.chunk") | {"choices": [choice]})


def _frame(data: Json) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def _completion(seen: Seen, script: Script, **choice: Any) -> Json:
    message, cut = _message(seen, script)
    choices = [{"index": 0, "message": message, "finish_reason": "length" if cut else script.finish_reason} | choice]
    return _head(seen, "chat.completion") | {"choices": choices, "usage": _usage(seen, script)}


def _message(seen: Seen, script: Script) -> tuple[Json, bool]:
    """(the deltas as one message, whether the request's limit has cut it off); a piece counts as a token."""
    pieces = [delta for delta in script.deltas if isinstance(delta, str)]
    limit = seen.body.get("max_tokens") or math.inf
    cut = bool(pieces) and len(pieces) > limit
    text = script.text if script.tokens else "".join(pieces[: int(limit)] if cut else pieces)
    message: Json = {"role": "assistant", "content": text}
    for delta in (delta for delta in script.deltas if isinstance(delta, dict)):
        for name, value in delta.items():
            if name == "tool_calls":
                _add_calls(message.setdefault(name, []), value or ())
            elif isinstance(value, str) and name != "role":
                message[name] = (message.get(name) or "") + value
    return message, cut


def _add_calls(calls: list[Json], pieces: Sequence[Json]) -> None:
    for place, piece in enumerate(pieces):
        number, function = piece.get("index", place), piece.get("function") or {}
        while len(calls) <= number:
            calls.append({"id": f"call_{len(calls)}", "type": "function", "function": {"name": "", "arguments": ""}})
        for name, value in function.items():
            whole = value if isinstance(value, str) else json.dumps(value)
            calls[number]["function"][name] += whole


def _graded(seen: Seen, yes: float) -> Json:
    words = [("Yes", yes), ("No", 1.0 - yes)] if yes >= 0.5 else [("No", 1.0 - yes), ("Yes", yes)]
    tokens = [{"token": word, "logprob": _log(chance), "bytes": None} for word, chance in words]
    content = [tokens[0] | {"top_logprobs": tokens}]
    script = Script([words[0][0]], finish_reason="length")
    return _completion(seen, script, logprobs={"content": content})


def _logprobs(seen: Seen, script: Script) -> Json:
    """The tokens of an answer with their alternatives, as chat completions or as completions write them."""
    if "messages" not in seen.body:
        tops = [{text: _log(chance) for text, chance in token.items()} for token in script.tokens]
        return {"tokens": [next(iter(top)) for top in tops], "top_logprobs": tops}
    told = [[{"token": text, "logprob": _log(chance)} for text, chance in token.items()] for token in script.tokens]
    return {"content": [tops[0] | {"top_logprobs": tops} for tops in told]}


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -9999.0


def _usage(seen: Seen, script: Script) -> Json:
    words = sum(len(str(message.get("content", "")).split()) for message in seen.body.get("messages", []))
    prompt, completion = script.usage or (words, sum(isinstance(delta, str) for delta in script.deltas))
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _error(script: Script) -> Json:
    code = script.status if script.status != 200 else 500
    return {"error": {"message": script.message, "type": "server_error", "param": None, "code": code}}


@dataclass(frozen=True, slots=True)
class Delivered:
    """A webhook message as it arrived and how it was answered."""

    headers: Mapping[str, str]
    body: bytes
    status: int
    at: float = field(default_factory=time.monotonic)

    @property
    def json(self) -> Json:
        """The body, parsed."""
        parsed: Json = json.loads(self.body)
        return parsed


class FakeReceiver:
    """A webhook receiver on loopback that records what arrives.

    answers: (status, headers) for the next deliveries, one each; what comes after them is accepted with 204.
    """

    def __init__(self, *answers: tuple[int, dict[str, str]] | int):
        self.answers = deque(answers)
        self.deliveries: list[Delivered] = []
        app = web.Application()
        app.router.add_post("/hook", self._hook)
        self._server = _Loopback(app)

    async def __aenter__(self) -> Self:
        self.url = f"{await self._server.start()}/hook"
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._server.stop()

    @property
    def accepted(self) -> list[Delivered]:
        """The deliveries that were answered with success."""
        return [delivery for delivery in self.deliveries if delivery.status < 300]

    async def arrived(self, count: int = 1, timeout: float = 10.0) -> list[Delivered]:
        """The accepted deliveries, once there are `count` of them."""
        async with asyncio.timeout(timeout):
            while len(self.accepted) < count:
                await asyncio.sleep(0.005)
        return self.accepted

    async def _hook(self, request: web.Request) -> web.Response:
        answer = self.answers.popleft() if self.answers else 204
        status, headers = (answer, {}) if isinstance(answer, int) else answer
        self.deliveries.append(Delivered(request.headers.copy(), await request.read(), status))
        return web.Response(status=status, headers=headers)


class _Loopback:
    """An aiohttp application on a port of 127.0.0.1, 0 for a free one; its handlers are cancelled when clients go."""

    def __init__(self, app: web.Application, port: int = 0):
        self._port = port
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.05, access_log=None)

    async def start(self) -> str:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        await self._runner.cleanup()


class _Uvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals to pytest."""
        yield


@asynccontextmanager
async def serve(app: Any, **config: Any) -> AsyncIterator[str]:
    """The base URL of `app` under a real uvicorn on a free loopback port, in the test's own loop.

    Start-up and shutdown of the app's lifespan run; an app that fails to start raises RuntimeError. `config` goes to
    `uvicorn.Config`.
    """
    defaults: Json = {"lifespan": "on", "log_config": None, "access_log": False, "ws": "none"}
    server = _Uvicorn(uvicorn.Config(app, **(defaults | {"timeout_graceful_shutdown": 1} | config)))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = asyncio.create_task(_run(server, listener))
        try:
            while not (server.started or running.done()):
                await asyncio.sleep(0.005)
            if not server.started:
                raise RuntimeError("the app did not start; its traceback is in the log of uvicorn.error")
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await running


async def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    with suppress(SystemExit):  # how uvicorn says that the app did not start
        await server.serve(sockets=[listener])
