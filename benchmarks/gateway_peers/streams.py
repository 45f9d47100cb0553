"""Many streams at once: `python streams.py '{"url", "headers", "body", "streams", "seconds", "start"}'` writes a line.

The streams begin spread over `start` seconds; what is counted is a window of `seconds` after another one. gaps:
milliseconds between two reads of one stream. stalls: pauses of more than 250 ms, a stream that says nothing in the
window among them; pause: the longest. tokens: a word of the engine's is one, whichever frame it came in.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import sys
import time
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import uvloop

STALL = 0.25
CONTENT = re.compile(rb'"content": ?"((?:[^"\\]|\\.)*)"')


class Stream(asyncio.Protocol):
    """One stream: when something came, and how many events were in it."""

    def __init__(self, request: bytes):
        self.request = request
        self.began = self.last = 0.0
        self.first = 0.0
        self.reads: list[tuple[float, int, int]] = []
        self.status = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.began = time.perf_counter()
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self.status:
            self.status = data[9:12]
        events = data.count(b"data: ")
        if events:
            self.first = self.first or now
            self.reads.append((now, events, sum(said.count(b" ") for said in CONTENT.findall(data))))


def counted(streams: list[Stream], start: float, end: float) -> dict[str, Any]:
    """What is told of the window from `start` to `end`."""
    gaps, pauses, frames, tokens = list[float](), list[float](), 0, 0
    for one in streams:
        window = [read for read in one.reads if start <= read[0] < end]
        frames += sum(many for _, many, _ in window)
        tokens += sum(many for _, _, many in window)
        times = [start, *(at for at, _, _ in window), end]
        between = [later - earlier for earlier, later in pairwise(times)]
        gaps += between[1:-1]
        pauses += between
    first = [one.first - one.began for one in streams if one.first]
    cuts = statistics.quantiles(gaps, n=100, method="inclusive") if len(gaps) > 1 else [0.0] * 99
    starts = statistics.quantiles(first, n=100, method="inclusive") if len(first) > 1 else [0.0] * 99
    return {
        "p50": cuts[49] * 1e3,
        "p99": cuts[98] * 1e3,
        "pause": max(pauses, default=0.0) * 1e3,
        "ttft50": starts[49] * 1e3,
        "ttft99": starts[98] * 1e3,
        "ttft": max(first, default=0.0) * 1e3,
        "frames": frames,
        "tokens": tokens,
        "stalls": sum(pause > STALL for pause in pauses),
        "bad": sum(one.status != b"200" for one in streams),
        "seconds": end - start,
    }


async def main() -> None:
    asked = json.loads(sys.argv[1])
    url = urlsplit(asked["url"])
    streams, opening = list[Stream](), list[asyncio.Future[Any]]()
    loop = asyncio.get_running_loop()
    for number in range(asked["streams"]):
        body = asked["body"].replace("@@@@@@@", f"{number:07d}").encode()
        lines = [f"POST {url.path} HTTP/1.1", f"host: {url.netloc}", "content-type: application/json"]
        lines += [f"{name}: {value}" for name, value in asked["headers"].items()]
        request = "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body
        stream = Stream(request)
        streams.append(stream)
        opening.append(asyncio.ensure_future(loop.create_connection(lambda it=stream: it, url.hostname, url.port)))
        if asked["start"]:
            await asyncio.sleep(asked["start"] / asked["streams"])
    await asyncio.gather(*opening)
    await asyncio.sleep(1)
    print("counting", flush=True)
    start = time.perf_counter()
    await asyncio.sleep(asked["seconds"])
    end = time.perf_counter()
    print(json.dumps(counted(streams, start, end)), flush=True)
    for stream in streams:
        stream.transport.abort()


if __name__ == "__main__":
    uvloop.run(main())
