"""The service's server and the operators' beside it, in a real process: one signal ends both, and loses no request."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvicorn
import uvloop

from app import serving
from app.serving import Doorway

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


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    """An application that nobody asks."""


async def opened(listener: socket.socket) -> Doorway:
    """A server that serves the listener."""
    server = Doorway(uvicorn.Config(nothing, lifespan="off", log_config=None))
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await server.startup([listener])
    return server


async def turns_until(server: Doorway, connected: int) -> int:
    """How many turns of the event loop it takes to serve so many."""
    for turn in range(1000):
        if len(server.server_state.connections) == connected:
            return turn
        await asyncio.sleep(0)
    raise AssertionError(f"{len(server.server_state.connections)} of {connected} are served")


def test_those_who_come_together_are_all_taken_within_a_few_turns_of_the_loop() -> None:
    """uvloop by itself takes one a turn, and a turn is long where hundreds of streams are served."""

    async def main(listener: socket.socket, ends: ExitStack) -> int:
        server = await opened(listener)
        for _ in range(100):
            ends.enter_context(socket.create_connection(listener.getsockname(), timeout=5))
        turns = await turns_until(server, 100)
        await server.shutdown([listener])
        return turns

    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener, ExitStack() as ends:
        assert uvloop.run(main(listener, ends)) < 15


def test_where_the_system_has_no_room_for_a_connection_it_is_taken_a_moment_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serving, "AGAIN", 0.05)
    room = serving._waiting

    def full(listener: socket.socket) -> Any:
        monkeypatch.setattr(serving, "_waiting", room)
        raise OSError(errno.EMFILE, "Too many open files")

    async def main(listener: socket.socket) -> float:
        server = await opened(listener)
        monkeypatch.setattr(serving, "_waiting", full)
        began = asyncio.get_running_loop().time()
        with socket.create_connection(listener.getsockname(), timeout=5):
            while not server.server_state.connections:
                await asyncio.sleep(0.01)
            took = asyncio.get_running_loop().time() - began
        await server.shutdown([listener])
        return took

    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert 0.05 <= uvloop.run(main(listener)) < 3
    assert "connections_spent" in caplog.text
