"""What the limits of keys cost with each ledger: reserves per second, latency, CPU time here and in the server.

A real redis-server and a real PostgreSQL (its disk is waited for, as in production) on Unix sockets; keys with all four
limits; each reserve is settled. Under uvloop, like the gateway. Machines differ and are shared: compare the ratios.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import uvloop

from app.limits import NOTHING, Limits
from app.limits.ledger import Ledger
from app.limits.memory import MemoryLedger
from app.limits.postgres import PostgresLedger
from app.limits.redis import RedisLedger
from app.metrics import Metrics
from app.records import Key, KeyLimits
from app.sealing import Seals
from app.store import migrate
from app.store.database import Database, database_url
from tests.postgres import Cluster, programs
from tests.redis_server import Server, program

LEASE, PATIENCE = 1320.0, 30.0
LIMITS = KeyLimits(10**9, 10**12, 10**12, 1e6)
ROUNDS = 3


def cpu_seconds(pids: list[int]) -> float:
    """User and system seconds that processes have used (proc(5))."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def tree(pid: int) -> list[int]:
    """A process and its children."""
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


async def load(limits: Limits, keys: list[Key], requests: int, at_once: int) -> list[float]:
    """Seconds of each reserve; all are settled when it returns."""
    todo = iter(range(requests))
    times: list[float] = []

    async def worker() -> None:
        for number in todo:
            began = time.perf_counter()
            held = await limits.reserve(keys[number % len(keys)], 1500, 0.01)
            times.append(time.perf_counter() - began)
            limits.settle(held, 500, 200, 0.002)

    await asyncio.gather(*(worker() for _ in range(at_once)))
    await limits.settled()
    return times


async def measure(name: str, ledger: Ledger, pids: Callable[[], list[int]], requests: int) -> None:
    """Prints a row for each load."""
    limits = Limits(ledger, Metrics(), LEASE)
    for keys_used, at_once in ((1, 1), (1, 32), (100, 32)):
        keys = [Key(f"key_{name}_{number}", "acme", "client", "nk", limits=LIMITS) for number in range(keys_used)]
        await load(limits, keys, max(100, requests // 10), at_once)
        rows = []
        for _ in range(ROUNDS):
            there, here, began = cpu_seconds(pids()), time.process_time(), time.perf_counter()
            times = await load(limits, keys, requests, at_once)
            took, here = time.perf_counter() - began, time.process_time() - here
            there = cpu_seconds(pids()) - there
            cuts = statistics.quantiles(times, n=100)
            each = 1e6 / requests
            rows.append((requests / took, cuts[49] * 1e3, cuts[98] * 1e3, here * each, there * each))
        rate, p50, p99, here, there = (statistics.median(column) for column in zip(*rows, strict=True))
        line = f"{name:<11} {keys_used:>4} {at_once:>7} {rate:>10.0f} {p50:>8.3f} {p99:>8.3f}"
        print(f"{line} {here:>12.1f} {there:>15.1f}", flush=True)


def without_limits() -> None:
    """Prints what a key without limits costs."""
    limits, key, rounds = Limits(MemoryLedger(LEASE), Metrics(), LEASE), Key("k", "acme", "client", "nk"), 1_000_000
    began = time.perf_counter()
    for _ in range(rounds):
        if limits.needed(key):
            raise SystemExit("this key has no limits")
        limits.settle(NOTHING, 1, 1)
    print(f"a key without limits: {(time.perf_counter() - began) / rounds * 1e9:.0f} ns for `needed` and `settle`")


async def with_postgres() -> None:
    """The rows of PostgreSQL; without its programs a note."""
    if (found := programs()) is None:
        print("postgresql: no programs on this machine")
        return
    cluster = Cluster(found)
    try:
        with (cluster.data / "postgresql.auto.conf").open("a") as file:
            file.write("fsync = on\nfull_page_writes = on\n")
        cluster.start()
        url = cluster.create_database("newel")
        await migrate(url)
        main = int((cluster.data / "postmaster.pid").read_text().split()[0])
        database = Database(database_url(url), Seals([b"0" * 64]))
        await measure("postgresql", PostgresLedger(database, LEASE, PATIENCE), lambda: tree(main), 1000)
        await database.close()
    finally:
        cluster.remove()


async def with_redis() -> None:
    """The rows of Redis; without its program a note."""
    if (found := program()) is None:
        print("redis: no redis-server on this machine")
        return
    server = Server(found)
    try:
        server.start()
        ledger = RedisLedger(server.url, LEASE, PATIENCE)
        process = server.process
        assert process is not None
        await measure("redis", ledger, lambda: [process.pid], 5000)
        await ledger.close()
    finally:
        server.remove()


async def main() -> None:
    """Prints the table."""
    without_limits()
    print("ledger      keys at once reserves/s   p50 ms   p99 ms  CPU us here  CPU us server")
    await measure("memory", MemoryLedger(LEASE), list, 20_000)
    await with_redis()
    await with_postgres()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
