"""The service's server and the operators' beside it, in a real process: one signal ends both, and loses no request."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

SCRIPT = '''
import asyncio, socket, sys
import uvicorn
from app.serving import Serving

go, state = asyncio.Event(), {"open": False}

async def lifespan(receive, send):
    while True:
        kind = (await receive())["type"]
        state["open"] = kind == "lifespan.startup"
        print(kind, flush=True)
        await send({"type": kind + ".complete"})
        if kind == "lifespan.shutdown":
            return

def app(name):
    async def serve(scope, receive, send):
        if scope["type"] == "lifespan":
            return await lifespan(receive, send)
        if scope["path"] == "/wait":
            print("waiting", name, flush=True)
            await asyncio.wait_for(go.wait(), 20)
        if scope["path"] == "/go":
            go.set()
        body = f"{name} {state['open']}".encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})
    return serve

def config(name, lifespan):
    return uvicorn.Config(app(name), lifespan=lifespan, log_config=None, timeout_graceful_shutdown=20)

async def late(where):
    """Lets the requests end once neither server takes a new connection."""
    for port in where:
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                await asyncio.sleep(0.02)
            except OSError:
                break
    print("closed", flush=True)
    go.set()

service, operators = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
ports = [listener.getsockname()[1] for listener in (service, operators)]
server = Serving(config("service", "on"), config("operators", "off"), operators)

async def main():
    print(*ports, flush=True)
    task = asyncio.create_task(server.serve([service]))
    while not server.should_exit and not task.done():
        await asyncio.sleep(0.01)
    await late(ports)
    await task

asyncio.run(main())
'''


@pytest.fixture
async def process() -> AsyncIterator[asyncio.subprocess.Process]:
    root = str(Path(__file__).parents[2])
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SCRIPT, cwd=root, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    yield process
    if process.returncode is None:
        process.kill()
    await process.communicate()


async def line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout
    return (await asyncio.wait_for(process.stdout.readline(), 20)).decode().strip()


async def text(http: aiohttp.ClientSession, port: int, path: str) -> str:
    async with http.get(f"http://127.0.0.1:{port}{path}") as answer:
        return await answer.text()


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
async def test_one_signal_ends_both_servers_once_their_requests_have_ended(
    process: asyncio.subprocess.Process, ending: signal.Signals
) -> None:
    ports = [int(port) for port in (await line(process)).split()]
    assert await line(process) == "lifespan.startup"
    async with aiohttp.ClientSession() as http:
        waiting = [asyncio.create_task(text(http, port, "/wait")) for port in ports]
        assert {await line(process), await line(process)} == {"waiting service", "waiting operators"}
        process.send_signal(ending)
        assert await line(process) == "closed"  # both have stopped to listen while both requests are still running
        assert await asyncio.gather(*waiting) == ["service True", "operators True"]
    assert await line(process) == "lifespan.shutdown"
    assert await asyncio.wait_for(process.wait(), 20) in (-ending, 1)


async def test_a_server_that_does_not_start_leaves_the_other_one_closed(tmp_path: Path) -> None:
    script = SCRIPT.replace('state["open"] = kind', 'raise RuntimeError("no") ; state["open"] = kind')
    root = str(Path(__file__).parents[2])
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, cwd=root, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, _ = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 3
    with pytest.raises(OSError, match=r"."):
        socket.create_connection(("127.0.0.1", int(out.split()[1])), timeout=2).close()
