"""An engine that costs next to nothing: it answers at once, or streams at a steady rate, from bytes made beforehand.

`python upstream.py PORT`. A stream has `max_tokens` pieces, 50 a second. Every reply is another one: 300 texts, each
with a running number in it, so that nothing that remembers texts is flattered.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from itertools import count

import uvloop

RATE = 50
TEXTS = 300
TEXT = (
    "team plan week house river train garden letter paper market winter summer window coffee bridge forest morning "
    "evening colour music story number answer question reason moment country city street doctor teacher student "
    "kitchen table bread water light sound travel budget report meeting project office printer holiday contract"
)
WORDS = TEXT.split()
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
NUMBER = b"@@@@@@@"
LIMIT = re.compile(rb'"max_tokens": ?(\d+)')
LENGTH = re.compile(rb"\r\ncontent-length: ?(\d+)", re.IGNORECASE)
NUMBERS = count()


def words(seed: int) -> list[str]:
    """50 words, others for each seed."""
    return [f"{WORDS[(seed * 7 + i * (seed % 11 + 1)) % len(WORDS)]} " for i in range(50)]


def completion(seed: int) -> tuple[bytes, bytes]:
    """A whole answer, cut where its number belongs."""
    text = f"Answer {NUMBER.decode()}: the {''.join(words(seed))}is all there is to say."
    body = {
        "id": "chatcmpl-x",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "fake",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 20, "completion_tokens": 55, "total_tokens": 75},
    }
    raw = json.dumps(body).encode()
    before, after = (HEAD % len(raw) + raw).split(NUMBER)
    return before, after


def frame(delta: dict[str, str], finish: str | None = None) -> bytes:
    """A chunk of a chat completion as a chunk of HTTP."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    body = {"id": "chatcmpl-x", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": "fake"}
    data = b"data: " + json.dumps(body | {"choices": [choice]}).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


WHOLE = [completion(seed) for seed in range(TEXTS)]
FRAMES = [[frame({"content": word}) for word in words(seed)] for seed in range(TEXTS)]
OPENING = STREAM + frame({"role": "assistant", "content": ""})
CLOSING = frame({}, "stop") + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
MODELS = b'{"object":"list","data":[{"id":"fake","object":"model"}]}'


class Engine(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.rest = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.rest += data
        while (end := self.rest.find(b"\r\n\r\n")) >= 0:
            found = LENGTH.search(self.rest, 0, end + 2)
            size = int(found.group(1)) if found else 0
            if len(self.rest) < end + 4 + size:
                return
            post, body = self.rest.startswith(b"POST"), self.rest[end + 4 : end + 4 + size]
            self.rest = self.rest[end + 4 + size :]
            self.answer(body) if post else self.transport.write(HEAD % len(MODELS) + MODELS)

    def answer(self, body: bytes) -> None:
        number = next(NUMBERS)
        if b'"stream":true' not in body and b'"stream": true' not in body:
            before, after = WHOLE[number % TEXTS]
            self.transport.write(before + b"%07d" % (number % 10_000_000) + after)
            return
        limit = LIMIT.search(body)
        self.transport.write(OPENING)
        self.speak(number % TEXTS, 0, int(limit.group(1)) if limit else 50, self.loop.time() + 1 / RATE)

    def speak(self, text: int, place: int, left: int, at: float) -> None:
        """The next piece, when its time has come."""
        if self.transport.is_closing():
            return
        if place:
            self.transport.write(FRAMES[text][place % 50])
        if left:
            self.loop.call_at(at, self.speak, text, place + 1, left - 1, at + 1 / RATE)
        else:
            self.transport.write(CLOSING)


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", int(sys.argv[1]), backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
