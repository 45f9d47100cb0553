"""A scripted engine on raw sockets: it can drip, lie, break off and die, as no HTTP library would.

with Engine() as engine:
    engine.script = broken_off      # async def broken_off(call: Call) -> None

`python -m tests.faults.engine PORT` is one in a process of its own, to be killed.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

EVENT_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"
OVERLOADED = {"error": {"message": "The engine is currently busy.", "type": "Service Unavailable", "code": 503}}
"""What vLLM says when its queue is full: as the body of a 503, or as a frame inside of a 200."""


class Over(Exception):
    """The script hung up: nothing more can be sent."""


def event(data: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
    """A chunk of a chat completion, as an event."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return event({"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "fake", "choices": [choice]})


FIRST, LAST = chunk({"role": "assistant", "content": ""}), chunk({}, "stop")


def completion(text: str) -> dict[str, Any]:
    """A whole chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    return {"id": "x", "object": "chat.completion", "created": 1, "model": "fake", "choices": [choice], "usage": usage}


@dataclass(slots=True)
class Call:
    """One chat request as it came in, and the means to answer it. Times are `time.monotonic()`."""

    body: dict[str, Any]
    writer: asyncio.StreamWriter
    at: float = field(default_factory=time.monotonic)
    gone_at: float | None = None
    keep: bool = True

    @property
    def streamed(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def question(self) -> str:
        """What the user said last."""
        return str(self.body["messages"][-1].get("content")) if self.body.get("messages") else ""

    async def send(self, raw: bytes) -> None:
        """Bytes, as they are."""
        self.writer.write(raw)
        await self.writer.drain()

    async def piece(self, data: bytes) -> None:
        """One chunk of HTTP's chunked coding."""
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def begin(self, *texts: str, pause: float = 0.0) -> None:
        """The head of an event stream, and these pieces of a reply."""
        await self.send(EVENT_STREAM)
        await self.piece(FIRST)
        await self.say(*texts, pause=pause)

    async def say(self, *texts: str, pause: float = 0.0) -> None:
        """These pieces of a reply, with a pause of so many seconds before each."""
        for text in texts:
            await asyncio.sleep(pause)
            await self.piece(chunk({"content": text}))

    async def end(self) -> None:
        """The end of a chunked body."""
        await self.send(b"0\r\n\r\n")

    async def reply(self, *texts: str, pause: float = 0.0) -> None:
        """A good reply, streamed or whole as it was asked for."""
        if not self.streamed:
            await asyncio.sleep(pause * len(texts))
            return await self.json(completion("".join(texts)))
        await self.begin(*texts, pause=pause)
        await self.piece(LAST)
        await self.piece(DONE)
        await self.end()

    async def json(self, body: Any, status: str = "200 OK", *headers: str) -> None:
        """A JSON answer."""
        raw = json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status}", "content-type: application/json", f"content-length: {len(raw)}", *headers]
        await self.send("\r\n".join([*lines, "", ""]).encode() + raw)

    def hang_up(self, hard: bool = False) -> None:
        """Ends the connection: with FIN, or with RST."""
        if hard:
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
            self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.writer.transport.abort()
        self.writer.close()
        raise Over


Script = Callable[[Call], Coroutine[Any, Any, None]]


async def good(call: Call) -> None:
    """The usual reply."""
    await call.reply("Hello", " there", ".")


async def slow(call: Call) -> None:
    """A reply that takes 2 seconds."""
    await call.reply(*(f" word{i}" for i in range(40)), pause=0.05)


class Engine:
    """The engine, in a thread with a loop of its own.

    A request meets the script in `scripts` that is named as its question, else `script`; both may be changed.
    """

    def __init__(self, script: Script = good, port: int = 0):
        self.script = script
        self.scripts: dict[str, Script] = {}
        self.calls: list[Call] = []
        self._loop = asyncio.new_event_loop()
        self._serving: set[asyncio.Task[None]] = set()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._start())
        return self

    def __exit__(self, *error: object) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._connected, sock=self._listener)

    async def _stop(self) -> None:
        self._server.close()
        serving = list(self._serving)
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._serving.add(task)
        try:
            await self._serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError, Over):
            pass
        finally:
            self._serving.discard(task)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        early = b""
        while True:
            head = early + await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ", 2)[1]
            call = Call(await _body(head, reader), writer)
            if not path.endswith(b"/completions"):
                await call.json({"object": "list", "data": [{"id": "fake", "object": "model"}]})
                early = b""
                continue
            self.calls.append(call)
            early = await self._answered(call, reader)

    async def _answered(self, call: Call, reader: asyncio.StreamReader) -> bytes:
        """Runs the script until its end, or until the client goes; returns what has come meanwhile."""
        script = self.scripts.get(call.question, self.script)
        work, peer = asyncio.ensure_future(script(call)), asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({work, peer}, return_when=asyncio.FIRST_COMPLETED)
            if peer.done() and not work.done():
                if not peer.exception() and peer.result():
                    await work
                    return peer.result()
                call.gone_at = time.monotonic()
                raise Over
            work.result()
            return b""
        finally:
            for task in (work, peer):
                task.cancel()
                with suppress(asyncio.CancelledError, ConnectionError, Over):
                    await task

    async def asked(self, count: int = 1, timeout: float = 5.0) -> Call:
        """The chat request number `count`, counted from 1, as soon as it is there."""
        async with asyncio.timeout(timeout):
            while len(self.calls) < count:
                await asyncio.sleep(0.005)
        return self.calls[count - 1]


async def _body(head: bytes, reader: asyncio.StreamReader) -> dict[str, Any]:
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
    raw = await reader.readexactly(int(fields.get(b"content-length", b"0")))
    body: dict[str, Any] = json.loads(raw or b"{}")
    return body


def main() -> None:
    """Serves slow replies until it is killed."""
    with Engine(slow, int(sys.argv[1])):
        print("ready", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
