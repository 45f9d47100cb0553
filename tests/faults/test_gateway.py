"""The gateway itself is killed, stopped, restarted, crowded, or its clock jumps."""

from __future__ import annotations

import asyncio
import json
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any

import aiohttp
import pytest

from tests.faults.client import Heard, ask
from tests.faults.clock import Clock
from tests.faults.conftest import Started, needed
from tests.faults.engine import Engine, slow
from tests.faults.newel import Newel
from tests.faults.page import Fault
from tests.gateway import free_port
from tests.postgres import Cluster

GROUP = "The gateway"
DAY = 86_400


# --- killed


@dataclass(slots=True)
class Acknowledged:
    """What clients were told is done, before the gateway was killed."""

    feedback: list[tuple[str, str]] = field(default_factory=list)
    tickets: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    turns: list[Heard] = field(default_factory=list)


async def call(
    http: aiohttp.ClientSession, method: str, url: str, key: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, Any]]:
    headers |= {"authorization": f"Bearer {key}"}
    async with http.request(method, url, json=body, headers=headers) as answer:
        return answer.status, json.loads(await answer.read())


async def judged(http: aiohttp.ClientSession, gateway: Newel, turn: str, key: str) -> list[bool]:
    """For each judgement whether it is new; raises when it is not acknowledged."""
    body = {"target": turn, "rating": "up"}
    headers = {"idempotency-key": key}
    status, told = await call(http, "POST", f"{gateway.base}/v1/feedback", gateway.key, body, **headers)
    assert status == 200, told
    return [one["created"] for one in told["recorded"]]


async def customer(http: aiohttp.ClientSession, gateway: Newel, number: int, done: Acknowledged) -> None:
    """Asks, judges, is handed to a person, and closes tickets, until the gateway is gone."""
    for step in range(1_000_000):
        heard = await ask(http, gateway, f"Question {number}.{step}", stream=step % 2 == 0)
        if not heard.complete:
            return
        done.turns.append(heard)
        try:
            key = f"{number}-{step}"
            await judged(http, gateway, heard.id, key)
            done.feedback.append((heard.id, key))
            body = gateway.body("I am being harassed.", metadata={"conversation_id": f"c-{number}-{step}"})
            status, told = await call(http, "POST", f"{gateway.base}/v1/chat/completions", gateway.key, body)
            assert status == 200, told
            done.tickets.append(told["guardrails"]["escalation"]["id"])
            if step % 2:
                url = f"{gateway.operators}/admin/tickets/{done.tickets[-1]}/close"
                status, told = await call(http, "POST", url, gateway.admin)
                assert status == 200, told
                done.closed.append(told["id"])
        except (aiohttp.ClientError, ConnectionError):
            return


@pytest.mark.parametrize("kind", ["SQLite", pytest.param("PostgreSQL", marks=pytest.mark.postgres)])
async def test_kill_9_under_load_loses_nothing_that_was_acknowledged(
    started: Started, http: aiohttp.ClientSession, fault: Fault, request: pytest.FixtureRequest, kind: str
) -> None:
    fault.tell(
        GROUP,
        f"`kill -9` of the gateway under load ({kind})",
        "the connection breaks",
        "every acknowledged feedback, ticket and audit entry",
    )
    database = ""
    if kind == "PostgreSQL":
        database = request.getfixturevalue("cluster").create_database(f"newel_{token_hex(4)}")
    gateway = await started(database=database)
    done = Acknowledged()
    customers = [asyncio.create_task(customer(http, gateway, number, done)) for number in range(12)]
    await asyncio.sleep(2)
    gateway.signal(signal.SIGKILL)
    await asyncio.gather(*customers)
    assert await gateway.ended() == -signal.SIGKILL
    gateway.start()
    fault.took("to the restart's first answer", await gateway.ready())
    assert len(done.feedback) > 10 and len(done.closed) > 5

    store = await gateway.store()
    tickets = {one.id: one for one in await store.tickets()}
    assert set(done.tickets) <= set(tickets)
    assert {tickets[id].state for id in done.closed} == {"closed"}
    audited = {one.subject for one in await store.audit_log(100_000) if one.action == "ticket.close"}
    assert set(done.closed) <= audited
    for turn, _ in done.feedback:
        assert await store.feedback(turn, "default")
    turns = [await store.turn(heard.id, "default") for heard in done.turns]
    await store.close()
    for turn, key in done.feedback[-20:]:
        assert await judged(http, gateway, turn, key) == [False], "sent again, it must be known"
    counts = f"{len(done.feedback)} feedback, {len(done.tickets)} tickets, {len(done.closed)} audit entries: 0 lost"
    fault.took("", counts)
    lost = sum(1 for turn in turns if turn is None)
    fault.took("plain turns whose record was not yet written", f"{lost} of {len(turns)}")
    assert lost <= 0.2 * len(turns) + 64, "what is written behind is a moment's work, no more"


# --- stopped


async def test_sigterm_with_streams_in_flight(
    started: Started, http: aiohttp.ClientSession, engine: Engine, fault: Fault
) -> None:
    fault.tell(
        GROUP,
        "SIGTERM with 50 streams and 50 whole replies in flight",
        "each of them to its end; new connections are turned away",
        "every turn; exit code 0",
    )
    gateway = await started()
    engine.script = slow
    asked = [asyncio.create_task(ask(http, gateway, stream=stream)) for stream in (True, False) * 50]
    await engine.asked(100, timeout=10)
    gateway.signal(signal.SIGTERM)
    began = time.monotonic()
    await asyncio.sleep(0.7)
    late = await ask(http, gateway)
    assert not late.complete and (late.broken or late.unavailable)
    heard = await asyncio.gather(*asked)
    assert all(one.complete for one in heard), next(one for one in heard if not one.complete)
    assert await gateway.ended() in (0, -signal.SIGTERM)
    fault.took("failed requests", "0 of 100")
    fault.took("to the end of the process, with replies of 2 s", time.monotonic() - began)
    store = await gateway.store()
    turns = [await store.turn(one.id, "default") for one in heard]
    await store.close()
    assert all(turn and turn.ended and not turn.error for turn in turns)


NGINX = """
daemon off;
worker_processes 1;
pid {folder}/pid;
error_log {folder}/error.log warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream newel {{
        # never marked as down: a refused connection costs nothing, and both would be down for a moment else
        server 127.0.0.1:{first} max_fails=0;
        server 127.0.0.1:{second} max_fails=0;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://newel;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            # a connection that is refused goes to the other replica; a POST that was sent is never sent again
            proxy_next_upstream error;
        }}
    }}
}}
"""


@contextmanager
def nginx(folder: Path, first: int, second: int) -> Iterator[str]:
    """A real nginx before two replicas."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        needed("no nginx on this machine (Debian: apt-get install nginx-light)")
        raise AssertionError
    folder.mkdir()
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, first=first, second=second, port=port))
    folder.chmod(0o755)
    with subprocess.Popen([program, "-p", str(folder), "-c", str(config), "-e", str(folder / "error.log")]) as process:
        try:
            _reachable(port)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def _reachable(port: int) -> None:
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise AssertionError("nginx did not start")


@pytest.mark.postgres
async def test_a_rolling_restart_of_two_replicas_fails_no_request(
    started: Started, http: aiohttp.ClientSession, engine: Engine, cluster: Cluster, tmp_path: Path, fault: Fault
) -> None:
    fault.tell(
        GROUP,
        "Rolling restart of two replicas (PostgreSQL) behind nginx, under load",
        "nothing of it: 0 failed requests, whole and streamed, without retries of the client",
        "every turn",
    )

    engine.script = a_moment
    database = cluster.create_database(f"newel_{token_hex(4)}")
    replicas = [await started(database=database) for _ in range(2)]
    heard: list[Heard] = []
    over = asyncio.Event()

    async def client(base: str, number: int) -> None:
        while not over.is_set():
            key = f"{number}-{len(heard)}"
            heard.append(await ask(http, replicas[0], f"Question {key}", stream=number % 2 == 0, base=base))

    with nginx(tmp_path / "nginx", replicas[0].port, replicas[1].port) as base:
        clients = [asyncio.create_task(client(base, number)) for number in range(8)]
        began = time.monotonic()
        await asyncio.sleep(0.5)
        for replica in replicas:
            replica.signal(signal.SIGTERM)
            assert await replica.ended() in (0, -signal.SIGTERM)
            replica.start()
            await replica.ready()
            await asyncio.sleep(0.3)
        took = time.monotonic() - began
        over.set()
        await asyncio.gather(*clients)
    failed = [one for one in heard if not one.complete]
    errors = (tmp_path / "nginx" / "error.log").read_text()[-600:]
    assert not failed, (len(failed), len(heard), failed[0], errors)
    fault.took("failed requests", f"0 of {len(heard)}")
    fault.took("both restarts", took)


async def a_moment(call: Any) -> None:
    """A reply that takes a fifth of a second when it is streamed, else next to nothing."""
    await call.reply("Hello", " there", ".", " How are", " you?", pause=0.04 if call.streamed else 0.0)


# --- the clock, and the crowd


async def test_a_wall_clock_that_jumps(
    started: Started, http: aiohttp.ClientSession, engine: Engine, tmp_path: Path, fault: Fault
) -> None:
    fault.tell(
        GROUP,
        "The wall clock jumps: a day forward, then two days back (a library before libc shifts CLOCK_REALTIME)",
        "nothing of it: a stream in flight goes on, requests are answered, in time",
        "turns with true durations, feedback and tickets",
    )
    if not Clock.possible():
        needed("no C compiler for the clock (Debian: apt-get install gcc)")
    clock = Clock(tmp_path)
    gateway = await started(env=clock.environment)
    engine.scripts["Slowly, please"] = slow
    for jump in (DAY, -DAY):
        streamed = asyncio.create_task(ask(http, gateway, "Slowly, please", stream=True))
        await asyncio.sleep(0.4)
        clock.jump(jump)
        for _ in range(3):
            heard = await ask(http, gateway)
            assert heard.complete
            fault.took("longest answer after a jump", heard.seconds)
        assert await judged(http, gateway, heard.id, f"judged at {jump}") == [True]
        assert await judged(http, gateway, heard.id, f"judged at {jump}") == [False]
        body = gateway.body("I am being harassed.", metadata={"conversation_id": f"jump{jump}"})
        status, told = await call(http, "POST", f"{gateway.base}/v1/chat/completions", gateway.key, body)
        assert status == 200 and told["guardrails"]["escalation"]["id"]
        assert abs(told["created"] - time.time() - jump) < 10, "the clock of this process did not jump"
        stream = await streamed
        assert stream.complete and stream.done and stream.seconds < 6
        store = await gateway.store()
        async with asyncio.timeout(5):
            while not ((turn := await store.turn(stream.id, "default")) and turn.total_ms):
                await asyncio.sleep(0.05)
        await store.close()
        assert 1_000 < turn.total_ms < 10_000
    assert await gateway.ready(2) < 2


CROWD = 10_000


async def test_ten_thousand_idle_connections(started: Started, http: aiohttp.ClientSession, fault: Fault) -> None:
    fault.tell(GROUP, "10,000 idle connections", "others are answered at once")
    room = CROWD + 2_000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < room:
        needed(f"a process may have {hard} open files here; {room} are needed (ulimit -n)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, room), hard))
    crowd: list[socket.socket] = []
    try:
        gateway = await started(files=room)
        await ask(http, gateway)
        before = gateway.rss
        crowd.extend(socket.create_connection(("127.0.0.1", gateway.port)) for _ in range(CROWD))
        heard = [await ask(http, gateway, stream=stream) for stream in (False, True) * 5]
        slowest = max(one.seconds for one in heard)
        assert all(one.complete for one in heard) and slowest < 1
        grown = gateway.rss - before
        fault.took("slowest of 10 answers", slowest)
        fault.took("memory", f"{gateway.rss:.0f} MB, {grown * 1024 / CROWD:.1f} KB a connection")
    finally:
        for one in crowd:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (await ask(http, gateway)).complete
