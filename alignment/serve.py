"""The embedded CPU engine: an OpenAI-compatible server over `alignment.batch`, for a machine without vLLM.

`python -m alignment.serve --model DIR --host 127.0.0.1 --port 8000 --served-model-name NAME`. It listens once the model
is loaded. NEWEL_ENGINE_API_KEY, when set, is asked for on all of /v1.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import hmac
import json
import logging
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from alignment.batch import Batch, Busy, Piece, Sequence, Text
from alignment.decoder import Decoder, Sampling, Scored, Unsupported

log = logging.getLogger("newel.engine")


class Refused(Exception):
    """A request that this engine cannot serve, as an OpenAI error."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry

    def response(self) -> JSONResponse:
        """Returns the error in OpenAI's form, with Retry-After (seconds) where it helps to try again."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        headers = {"Retry-After": str(self.retry)} if self.retry else {}
        return JSONResponse({"error": self.body(kind)}, self.status, headers)

    def body(self, kind: str) -> dict[str, str | None]:
        """Returns the inside of `error`."""
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}


class Part(BaseModel):
    """One part of a message's content; this engine reads text only."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None

    def plain(self) -> dict[str, str]:
        """Returns what chat templates take: a role that they know, and one string."""
        content = "".join(p.text for p in self.content) if isinstance(self.content, list) else self.content or ""
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(BaseModel):
    """Whether a last chunk tells the number of tokens."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """The fields of /v1/chat/completions that are known here; what would silently change the answer is refused."""

    model_config = ConfigDict(extra="ignore")
    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    cache_salt: str = ""
    n: Literal[1] | None = None
    tools: list[Any] | None = Field(default=None, max_length=0)
    functions: list[Any] | None = Field(default=None, max_length=0)
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    def sampling(self, usual: tuple[float, float]) -> Sampling:
        """Returns how tokens are chosen; `usual` is the model's own temperature and top_p."""
        return Sampling(
            temperature=usual[0] if self.temperature is None else self.temperature,
            top_p=usual[1] if self.top_p is None else self.top_p,
            presence=self.presence_penalty,
            frequency=self.frequency_penalty,
            seed=self.seed,
            top=(self.top_logprobs or 0) if self.logprobs else None,
        )

    def stops(self) -> tuple[str, ...]:
        """Returns the stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request on its way: its sequence, and the pieces of its reply (None: the client has gone)."""

    asked: ChatRequest
    sequence: Sequence
    pieces: asyncio.Queue[Piece | None]
    id: str
    created: int

    async def read(self) -> AsyncIterator[Piece]:
        """Yields the pieces up to the last one, or until the client goes. Raises Refused when the engine failed."""
        while (piece := await self.pieces.get()) is not None:
            if piece.finish == "error":
                raise Refused(500, "the engine failed while it wrote this reply; its log says why", code="engine_error")
            yield piece
            if piece.finish:
                return

    def usage(self) -> dict[str, Any]:
        """Returns the numbers of tokens so far."""
        prompt, written = len(self.sequence.prompt), self.sequence.written
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": self.sequence.reused},
        }

    def head(self, kind: str) -> dict[str, Any]:
        """Returns what every answer of this exchange begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.asked.model}


class Server:
    """The HTTP side of one model."""

    def __init__(self, decoder: Decoder, batch: Batch, name: str, key: str | None) -> None:
        self._decoder, self._batch, self._name, self._key = decoder, batch, name, key
        # The worker thread decodes with the other one: a tokenizer does not take two threads at once.
        self._tokenizer = copy.deepcopy(decoder.tokenizer)
        self._started = int(time.time())

    def app(self) -> Starlette:
        """Returns the ASGI application."""
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
        ]
        return Starlette(routes=routes, exception_handlers={Refused: _refuse, HTTPException: _refuse_plain})

    async def health(self, request: Request) -> Response:
        """Returns 200 while the model is loaded and its thread runs."""
        running, waiting = self._batch.load
        body = {"running": running, "waiting": waiting, "packed": self._decoder.packed}
        return JSONResponse(body, 200 if self._batch.alive else 503)

    async def models(self, request: Request) -> Response:
        """Returns the one model that is served."""
        self._admit(request)
        model = {"id": self._name, "object": "model", "created": self._started, "owned_by": "newel"}
        return JSONResponse({"object": "list", "data": [{**model, "max_model_len": self._decoder.context}]})

    async def chat(self, request: Request) -> Response:
        """Returns a completion, whole or as a stream; the sequence leaves the batch when the client goes."""
        self._admit(request)
        exchange = self._begin(_parse(await request.body()))
        return Reply(exchange)

    def _admit(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._key and not hmac.compare_digest(given.encode(), self._key.encode()):
            raise Refused(401, "this engine asks for the API key that its supervisor gave it", code="invalid_api_key")

    def _begin(self, asked: ChatRequest) -> Exchange:
        """Queues a request. Raises Refused when it cannot be served or there is no room."""
        if asked.model != self._name:
            raise Refused(
                404,
                f"the model {asked.model!r} does not exist here, only {self._name!r}",
                param="model",
                code="model_not_found",
            )
        prompt = self._encode(asked)
        limit = self._limit(asked, len(prompt))
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece | None]()

        def emit(piece: Piece) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        text = Text(self._decoder.tokenizer, asked.stops())
        sequence = Sequence(prompt, limit, asked.sampling(self._decoder.usual), text, emit, asked.cache_salt)
        try:
            self._batch.submit(sequence)
        except Busy as busy:
            raise Refused(503, str(busy), code="engine_busy", retry=busy.retry_after) from None
        return Exchange(asked, sequence, pieces, f"chatcmpl-{uuid.uuid4().hex}", int(time.time()))

    def _encode(self, asked: ChatRequest) -> list[int]:
        chat = [m.plain() for m in asked.messages]
        try:
            found: Any = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # the edge: a template is a program that came with the model
            raise Refused(
                400, f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return cast(list[int], found["input_ids"])

    def _limit(self, asked: ChatRequest, prompt: int) -> int:
        """Returns the most tokens of the reply. Raises Refused when they cannot fit behind the prompt."""
        context, wanted = self._decoder.context, asked.max_completion_tokens or asked.max_tokens
        if prompt + (wanted or 1) > context:
            detail = f"{prompt} tokens in the messages" + (f" and {wanted} asked for in the reply" if wanted else "")
            message = f"this model's maximum context length is {context} tokens; this request has {detail}"
            raise Refused(400, message, param="messages", code="context_length_exceeded")
        return wanted or context - prompt


class Reply(Response):
    """The answer to one exchange; however it ends, also by the client going, the sequence leaves the batch."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Returns when the answer was sent or the client went."""
        watch = asyncio.create_task(self._watch(receive))
        try:
            if self._exchange.asked.stream:
                await self._stream(send)
            elif (whole := await self._whole()) is not None:
                await whole(scope, receive, send)
        except OSError:
            pass  # the client went while we wrote to it
        finally:
            self._exchange.sequence.cancelled = True
            watch.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._exchange.sequence.cancelled = True
        self._exchange.pieces.put_nowait(None)

    async def _stream(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for event in self._events():
            data = b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _events(self) -> AsyncIterator[dict[str, Any]]:
        """Yields the chunks in OpenAI's order: role, text, reason, usage if asked for; or an error in its place."""
        exchange, head = self._exchange, self._exchange.head("chat.completion.chunk")
        yield head | {"choices": [_choice({"role": "assistant", "content": ""}, None, None)]}
        reason: str | None = None
        try:
            async for piece in exchange.read():
                if piece.text or piece.tokens:
                    yield head | {"choices": [_choice({"content": piece.text}, None, self._logprobs(piece.tokens))]}
                reason = piece.finish
        except Refused as refused:
            yield {"error": refused.body("server_error")}
            return
        yield head | {"choices": [_choice({}, reason, None)]}
        if exchange.asked.stream_options and exchange.asked.stream_options.include_usage:
            yield head | {"choices": [], "usage": exchange.usage()}

    async def _whole(self) -> Response | None:
        """Returns the completion in one piece, or None when the client went."""
        text, reason = "", None
        tokens: list[Scored] = []
        try:
            async for piece in self._exchange.read():
                text += piece.text
                tokens += piece.tokens
                reason = piece.finish
        except Refused as refused:
            return refused.response()
        if reason is None:
            return None
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(tokens),
            "finish_reason": reason,
        }
        return JSONResponse(
            self._exchange.head("chat.completion") | {"choices": [choice], "usage": self._exchange.usage()}
        )

    def _logprobs(self, tokens: Iterable[Scored]) -> dict[str, Any] | None:
        if not self._exchange.asked.logprobs:
            return None
        decode = self._exchange.sequence.text.name
        content = [
            _named(decode(t.token), t.logprob) | {"top_logprobs": [_named(decode(i), p) for i, p in t.top]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}


def _choice(delta: dict[str, str], reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _named(token: str, logprob: float) -> dict[str, Any]:
    # JSON has no infinity: a token that is impossible gets the value that vLLM gives it.
    return {"token": token, "logprob": max(logprob, -9999.0), "bytes": list(token.encode())}


def _parse(body: bytes) -> ChatRequest:
    """Returns the request. Raises Refused that names the first field that is wrong."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        raise Refused(400, f"{param or 'body'}: {first['msg']}", param=param) from None


def _refuse(request: Request, error: Exception) -> Response:
    return cast(Refused, error).response()


def _refuse_plain(request: Request, error: Exception) -> Response:
    plain = cast(HTTPException, error)
    return Refused(plain.status_code, plain.detail).response()


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line, read."""
    parser = argparse.ArgumentParser(prog="python -m alignment.serve", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint folder")
    parser.add_argument("--served-model-name", help="the name that clients ask for (default: the folder's)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-num-seqs", type=int, default=8, help="sequences decoded at once")
    parser.add_argument("--max-queue", type=int, default=64, help="requests that may wait; more get 503")
    parser.add_argument("--max-model-len", type=int, default=8192, help="longest sequence in tokens")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=0, help="threads of the arithmetic (default: one core less)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status once the server was told to stop; 1, with the reason on stderr, if it cannot load."""
    args = arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    began = time.monotonic()
    # Everything that computes happens in this one thread (see Batch.run); this one only talks.
    worker = ThreadPoolExecutor(1, "decoder")
    try:
        decoder = worker.submit(_load, args).result()
    except (Unsupported, OSError, ValueError, MemoryError) as error:
        print(f"cannot serve {args.model}: {error}", file=sys.stderr)
        return 1
    name = args.served_model_name or args.model.name
    log.info(
        "%s loaded in %.1f s, weights %s", name, time.monotonic() - began, "packed" if decoder.packed else "not packed"
    )
    batch = Batch(decoder, queue=args.max_queue)
    worker.submit(batch.run)
    app = Server(decoder, batch, name, os.environ.get("NEWEL_ENGINE_API_KEY")).app()
    try:
        uvicorn.run(
            app, host=args.host, port=args.port, access_log=False, log_level="warning", timeout_graceful_shutdown=5
        )
    finally:
        batch.stop()
        worker.shutdown()
    return 0


def _cores() -> int:
    """Returns the number of cores that we may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()  # a container's limit (cgroup v2)
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # none, or "max"
        return cores


def _load(args: argparse.Namespace) -> Decoder:
    # One core stays free for the gateway. A thread that loses its core holds up all others, 200 times in each step:
    # on 2 cores that others use too, 1 thread was 5 to 10 times as fast as 2; on idle ones 2 are 1.5 times as fast.
    torch.set_num_threads(args.threads or max(1, _cores() - 1))
    return Decoder(args.model, slots=args.max_num_seqs, context=args.max_model_len, dtype=getattr(torch, args.dtype))


if __name__ == "__main__":
    sys.exit(main())
