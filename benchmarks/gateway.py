"""What the gateway adds to a direct call: requests per second, latency, and its CPU time per request.

Three processes on loopback: an upstream that answers at once with 50 pieces, newel in front of it (SQLite, policy
`hr`, every turn stored), and this one, which asks both in turn. Machines differ and are shared: compare the ratios.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp

ROOT = Path(__file__).parents[1]
MODEL = "smollm2-135m-instruct"
PIECES = 50
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "How do I ask for a raise after two good years?"}]}
UPSTREAM = f"""
import asyncio, json
from aiohttp import web
async def chat(request):
    body = await request.json()
    if not body.get("stream"):
        message = {{"role": "assistant", "content": "word " * {PIECES}}}
        return web.json_response({{"choices": [{{"index": 0, "message": message, "finish_reason": "stop"}}]}})
    response = web.StreamResponse(headers={{"content-type": "text/event-stream"}})
    await response.prepare(request)
    for _ in range({PIECES}):
        await response.write(b'data: {{"choices":[{{"index":0,"delta":{{"content":"word "}}}}]}}\\n\\n')
    await response.write(b'data: {{"choices":[{{"index":0,"delta":{{}},"finish_reason":"stop"}}]}}\\n\\n')
    await response.write(b'data: [DONE]\\n\\n')
    return response
async def ok(request):
    return web.json_response({{"data": [{{"id": "{MODEL}"}}]}})
app = web.Application()
app.router.add_post("/v1/chat/completions", chat)
app.router.add_get("/v1/models", ok)
app.router.add_get("/health", ok)
import sys
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, access_log=None)
"""


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def process(*command: str, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """A running command, stopped at the end; its output goes to /dev/null."""
    running = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield running
    finally:
        running.terminate()
        running.wait()


def cpu_seconds(pid: int) -> float:
    """User and system seconds that a process has used (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def new_key(newel: list[str], env: dict[str, str]) -> str:
    """A fresh API key of the gateway's default tenant."""
    made = subprocess.run([*newel, "keys", "create"], env=os.environ | env, cwd=ROOT, capture_output=True, check=True)
    return made.stdout.decode().strip()


async def ready(url: str) -> None:
    """Returns when `url` answers 200."""
    async with aiohttp.ClientSession() as session:
        for _ in range(600):
            try:
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)
    raise SystemExit(f"{url} did not become ready")


async def load(url: str, key: str, stream: bool, requests: int, at_once: int) -> tuple[float, list[float]]:
    """(seconds in all, seconds of each request); a request that fails ends the benchmark."""
    todo = iter(range(requests))
    times: list[float] = []
    data = json.dumps(BODY | {"stream": stream}).encode()
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}

    async def worker(session: aiohttp.ClientSession) -> None:
        for _ in todo:
            began = time.perf_counter()
            async with session.post(f"{url}/v1/chat/completions", data=data, headers=headers) as response:
                body = await response.read()
            times.append(time.perf_counter() - began)
            if response.status != 200 or (stream and not body.rstrip().endswith(b"[DONE]")):
                raise SystemExit(f"{url}: {response.status} {body[:300]!r}")

    began = time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(worker(session) for _ in range(at_once)))
    return time.perf_counter() - began, times


async def measure(name: str, url: str, key: str, pid: int, rounds: int = 3) -> None:
    """Prints one row for each way of asking."""
    for stream in (False, True):
        for at_once in (1, 32):
            requests = 100 if at_once == 1 else 400
            rows = []
            await load(url, key, stream, 20, at_once)
            for _ in range(rounds):
                before = cpu_seconds(pid)
                seconds, times = await load(url, key, stream, requests, at_once)
                used = (cpu_seconds(pid) - before) / requests
                cuts = statistics.quantiles(times, n=100)
                rows.append((requests / seconds, cuts[49] * 1e3, cuts[98] * 1e3, used * 1e6))
            rate, p50, p99, used = (statistics.median(column) for column in zip(*rows, strict=True))
            how = "stream" if stream else "whole"
            print(f"{name:<8} {how:<7} {at_once:>7} {rate:10.0f} {p50:8.2f} {p99:8.2f} {used:12.0f}", flush=True)


async def main() -> None:
    """Starts the processes and prints the table."""
    upstream, gateway = free_port(), free_port()
    with tempfile.TemporaryDirectory() as home:
        env = {"NEWEL_HOME": home, "NEWEL_ENGINE__URL": f"http://127.0.0.1:{upstream}/v1", "NEWEL_DEFAULT_POLICY": "hr"}
        env |= {"NEWEL_PORT": str(gateway), "NEWEL_LOG_LEVEL": "warning", "NEWEL_ENGINE__MODEL": MODEL}
        newel = [str(Path(sys.executable).with_name("newel"))]
        with process(sys.executable, "-c", UPSTREAM, str(upstream)) as above, process(*newel, "serve", **env) as ours:
            await ready(f"http://127.0.0.1:{upstream}/health")
            await ready(f"http://127.0.0.1:{gateway}/readyz")
            key = new_key(newel, env)
            print("path     reply   at once requests/s   p50 ms   p99 ms   CPU us/req")
            await measure("direct", f"http://127.0.0.1:{upstream}", "", above.pid)
            await measure("newel", f"http://127.0.0.1:{gateway}", key, ours.pid)


if __name__ == "__main__":
    asyncio.run(main())
