"""The database is down, frozen or locked, or the disk is full: nothing is acknowledged that is not kept."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from secrets import token_hex

import aiohttp
import pytest

from tests.faults.client import Heard, ask
from tests.faults.conftest import Started, needed
from tests.faults.engine import Engine, slow
from tests.faults.newel import Newel
from tests.faults.page import Fault
from tests.postgres import Cluster

GROUP = "Database and disk"


async def judge(http: aiohttp.ClientSession, gateway: Newel, turn: str, comment: str) -> int:
    """The status of feedback on this turn, with the comment as its idempotency key."""
    headers = gateway.headers() | {"idempotency-key": comment}
    body = {"target": turn, "comment": comment}
    async with http.post(f"{gateway.base}/v1/feedback", json=body, headers=headers) as answer:
        if answer.status != 200:
            error = (await answer.json())["error"]
            assert answer.status == 503 and error["code"] and int(answer.headers["retry-after"]) >= 1, error
        return answer.status


async def comments(gateway: Newel, turn: str) -> list[str]:
    """The comments that are kept on a turn."""
    store = await gateway.store()
    try:
        return [one.text for one in await store.feedback(turn, "default", history=True) if one.text]
    finally:
        await store.close()


async def recorded(gateway: Newel, heard: list[Heard], timeout: float = 15.0) -> None:
    """Returns when each of these answers is on record as it was told."""
    store = await gateway.store()
    try:
        async with asyncio.timeout(timeout):
            for one in heard:
                while not ((turn := await store.turn(one.id, "default")) and turn.ended):
                    await asyncio.sleep(0.1)
                assert turn.said == one.text
    finally:
        await store.close()


class Trouble:
    """What clients were told while the store could not be used."""

    def __init__(self, http: aiohttp.ClientSession, gateway: Newel):
        self.http, self.gateway = http, gateway
        self.heard: list[Heard] = []
        self.kept: list[str] = []
        self.turned_away: list[str] = []
        self.waits: list[float] = []

    @asynccontextmanager
    async def watched(self, fault: Fault, seconds: float) -> AsyncIterator[None]:
        """Asks and judges for so long at least; the body takes the trouble away at the end of it."""
        self.before = await ask(self.http, self.gateway)
        assert self.before.complete
        assert await judge(self.http, self.gateway, self.before.id, "before") == 200
        self.kept.append("before")
        yield
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            await self.once()
        assert self.turned_away, "this trouble troubled nobody"
        fault.took("to the 503", max([*self.waits, *(one.seconds for one in self.heard if one.status == 503)]))
        answered = sum(one.complete for one in self.heard)
        fault.took("chats answered meanwhile", f"{answered} of {len(self.heard)}")

    async def once(self) -> None:
        """One chat request, streamed or not, and one judgement."""
        number = len(self.heard)
        asking = asyncio.create_task(ask(self.http, self.gateway, f"Hello {number}", stream=number % 2 == 0))
        await self.judged(f"meanwhile {number}")
        self.heard.append(await asking)
        assert self.heard[-1].complete or self.heard[-1].unavailable, self.heard[-1]

    async def judged(self, comment: str) -> bool:
        began = time.monotonic()
        good = await judge(self.http, self.gateway, self.before.id, comment) == 200
        self.waits += [] if good else [time.monotonic() - began]
        (self.kept if good else self.turned_away).append(comment)
        return good

    async def over(self, fault: Fault, timeout: float = 20.0) -> None:
        """Waits until everything is answered again, and looks whether all that was acknowledged is there."""
        began = time.monotonic()
        number = 0
        while not (await self.judged(f"after {number}") and (last := await ask(self.http, self.gateway)).complete):
            assert time.monotonic() - began < timeout, "it did not recover"
            await asyncio.sleep(0.1)
            number += 1
        fault.took("to recovery", time.monotonic() - began)
        await recorded(self.gateway, [one for one in (self.before, *self.heard, last) if one.complete])
        found = await comments(self.gateway, self.before.id)
        assert set(self.kept) <= set(found), "acknowledged, and lost"


@pytest.mark.postgres
async def test_a_database_that_is_down_and_comes_back(
    started: Started, http: aiohttp.ClientSession, engine: Engine, cluster: Cluster, fault: Fault
) -> None:
    fault.tell(
        GROUP,
        "PostgreSQL stopped for 3 s and started, a stream in flight",
        "503 with `Retry-After` (or an answer, where its record waits on disk); the stream goes on to its end",
        "every acknowledged feedback, and every answered turn",
    )
    gateway = await started(database=cluster.create_database(f"newel_{token_hex(4)}"))
    trouble = Trouble(http, gateway)
    try:
        async with trouble.watched(fault, 3):
            engine.scripts["Slowly, please"] = slow
            stream = asyncio.create_task(ask(http, gateway, "Slowly, please", stream=True))
            await engine.asked(2)
            await asyncio.sleep(0.2)
            cluster.stop()
        heard = await stream
        assert heard.ended
        async with http.get(f"{gateway.base}/livez") as answer:
            assert answer.status == 200
    finally:
        cluster.start()
    await trouble.over(fault)
    if heard.complete:
        await recorded(gateway, [heard])


@pytest.mark.postgres
async def test_a_database_that_does_not_answer(
    started: Started, http: aiohttp.ClientSession, cluster: Cluster, fault: Fault
) -> None:
    fault.tell(
        GROUP,
        "PostgreSQL frozen (SIGSTOP), as behind a dead network",
        "503 with `Retry-After` (or an answer, where its record waits on disk); `/livez` goes on at once",
        "every acknowledged feedback, and every answered turn",
    )
    gateway = await started(database=cluster.create_database(f"newel_{token_hex(4)}"))
    trouble = Trouble(http, gateway)
    try:
        async with trouble.watched(fault, 0.1):
            cluster.freeze(True)
            began = time.monotonic()
            async with http.get(f"{gateway.base}/livez") as answer:
                assert answer.status == 200
            assert time.monotonic() - began < 1
    finally:
        cluster.freeze(False)
    await trouble.over(fault)
    waits = [*trouble.waits, *(one.seconds for one in trouble.heard)]
    assert max(waits) < 25, "a call waits 10 s for the database, and feedback makes two"


async def test_a_database_file_that_another_process_locks(
    started: Started, http: aiohttp.ClientSession, fault: Fault
) -> None:
    fault.tell(
        GROUP,
        "SQLite's file locked by another process",
        "503 with `Retry-After` (or an answer, where its record waits on disk)",
        "every acknowledged feedback, and every answered turn",
    )
    gateway = await started()
    trouble = Trouble(http, gateway)
    lock = sqlite3.connect(gateway.home / "newel.db", isolation_level=None)
    try:
        async with trouble.watched(fault, 0.1):
            lock.execute("BEGIN IMMEDIATE")
    finally:
        lock.execute("ROLLBACK")
        lock.close()
    await trouble.over(fault)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A file system of its own in `folder`, which only root can make."""
    if os.geteuid() != 0:
        needed("a small disk can only be mounted by root")
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0700", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        needed(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


async def test_a_disk_that_is_full(started: Started, http: aiohttp.ClientSession, tmp_path: Path, fault: Fault) -> None:
    fault.tell(
        GROUP,
        "Disk full (a tmpfs of 16 MB under `home`, SQLite and spill on it)",
        "503 with `Retry-After` for what has to be kept before it is acknowledged",
        "every acknowledged feedback, and every answered turn",
    )
    home = tmp_path / "small"
    with small_disk(home, 16):
        gateway = await started(home=home, more={"log_level": "error"})
        trouble = Trouble(http, gateway)
        try:
            async with trouble.watched(fault, 2):
                _fill(home / "filler")
            (home / "filler").unlink()
            await trouble.over(fault)
        finally:
            gateway.stop()


def _fill(file: Path) -> None:
    """Leaves no room on the disk: what the database frees meanwhile is taken as well."""
    with file.open("wb", buffering=0) as filler:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    filler.write(b"x" * size)
            except OSError:
                continue
