"""Limits of keys: the rules of the three ledgers, budgets that nothing at once can beat, and what a client is told."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from app.errors import ApiError
from app.limits import NOTHING, Limits, Reservation, open_limits
from app.limits.ledger import DAY, NANOS, NONE, Caps, Hold, Ledger, LedgerDown, Standing, month_end, month_of
from app.limits.limits import PAUSE
from app.limits.memory import Clock, MemoryLedger
from app.limits.postgres import PostgresLedger
from app.limits.redis import RedisLedger
from app.limits.reservation import duration, headers, refusal
from app.metrics import Metrics
from app.records import Key, KeyLimits
from app.settings import LimitSettings, Settings
from app.store import migrate
from app.store.budgets import Budgets, Used, delete_idle
from app.store.database import Database, database_url
from app.store.errors import StoreDown
from tests.postgres import Cluster
from tests.redis_server import Server, program

SECOND = 1_000_000
MINUTE, HOUR = 60 * SECOND, 3600 * SECOND
LEASE = 120.0
NOON = int(datetime(2027, 3, 10, 12, tzinfo=UTC).timestamp()) * SECOND
PATIENCE = 10.0
"""Seconds for one answer on a machine that is busy with other tests."""


def redis_program() -> str:
    """Redis's program; without it tests are skipped, and in CI they fail."""
    if (found := program()) is None:
        reason = "no redis-server on this machine (Debian: apt-get install redis-server)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture(scope="module")
def redis_server() -> Iterator[Server]:
    """A running Redis."""
    server = Server(redis_program())
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="module")
def postgres_url(cluster: Cluster) -> str:
    """A migrated database."""
    url = cluster.create_database(f"newel_{token_hex(4)}")
    with ThreadPoolExecutor(1) as thread:  # a loop may run here
        thread.submit(lambda: asyncio.run(migrate(url))).result()
    return url


@dataclass
class Place:
    """A ledger whose clock the test turns: time goes on, or the wall clock jumps."""

    ledger: Ledger
    utc: int = NOON
    steady: int = 0

    def set(self) -> None:
        if not isinstance(self.ledger, MemoryLedger):
            self.ledger.at = self.utc

    def wait(self, microseconds: float) -> None:
        self.steady += round(microseconds)
        self.jump(microseconds)

    def jump(self, microseconds: float) -> None:
        self.utc += round(microseconds)
        self.set()

    async def reserve(self, caps: Caps, tokens: int = 0, nanos: int = 0, *, account: str, id: str = "") -> Standing:
        return await self.ledger.reserve(account, caps, Hold(id or token_hex(6), tokens, nanos))


def memory_place(one_clock: bool = False) -> Place:
    """The ledger in memory; with one clock it sees jumps as a ledger does that other machines share."""
    place = Place(MemoryLedger(LEASE))
    steady = (lambda: place.utc) if one_clock else (lambda: place.steady)
    place.ledger = MemoryLedger(LEASE, clock=Clock(steady, lambda: place.utc))
    return place


def database_of(url: str) -> Database:
    from app.sealing import Seals

    return Database(database_url(url), Seals([b"0" * 64]))


def shared_ledger(kind: str, url: str, lease: float = LEASE) -> tuple[Ledger, Database | None]:
    """A replica's ledger, and the database to be closed after it."""
    if kind == "redis":
        return RedisLedger(url, lease, PATIENCE), None
    database = database_of(url)
    return PostgresLedger(database, lease, PATIENCE), database


def url_of(kind: str, request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue("redis_server").url if kind == "redis" else request.getfixturevalue("postgres_url")


SHARED = ["redis", pytest.param("postgresql", marks=pytest.mark.postgres)]
KINDS = ["memory", *SHARED]


@pytest.fixture(params=KINDS)
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """Each ledger, at noon."""
    if request.param == "memory":
        yield memory_place()
        return
    database = None
    if request.param == "redis":
        found = Place(RedisLedger(request.getfixturevalue("redis_server").url, LEASE, PATIENCE))
    else:
        database = database_of(request.getfixturevalue("postgres_url"))
        found = Place(PostgresLedger(database, LEASE, PATIENCE))
    found.set()
    yield found
    await found.ledger.close()
    if database is not None:
        await database.close()


@pytest.fixture
def account() -> str:
    """A name that no other test has."""
    return f"key_{token_hex(6)}"


# --- rates


async def test_a_rate_grants_a_burst_and_then_as_many_as_drained(place: Place, account: str) -> None:
    caps = Caps(requests=3)
    assert [(await place.reserve(caps, account=account)).refused for _ in range(4)] == [0, 0, 0, 3]
    place.wait(20 * SECOND - 1000)
    assert (await place.reserve(caps, account=account)).refused == 3
    place.wait(1000)
    assert [(await place.reserve(caps, account=account)).refused for _ in range(2)] == [0, 3]
    place.wait(10 * LEASE * SECOND)
    assert [(await place.reserve(caps, account=account)).refused for _ in range(4)] == [0, 0, 0, 3]


async def test_tokens_that_were_not_used_are_free_again(place: Place, account: str) -> None:
    caps = Caps(tokens=100)
    assert (await place.reserve(caps, 90, account=account, id="a")).refused == 0
    assert (await place.reserve(caps, 20, account=account)).refused == 4
    await place.ledger.settle(account, caps, Hold("a", 90, 0), 10, 0)
    assert (await place.reserve(caps, 91, account=account)).refused == 4
    assert (await place.reserve(caps, 90, account=account)).tokens == 100


async def test_tokens_beyond_what_was_reserved_are_a_debt(place: Place, account: str) -> None:
    caps = Caps(tokens=60)
    await place.reserve(caps, 10, account=account, id="a")
    await place.ledger.settle(account, caps, Hold("a", 10, 0), 90, 0)
    place.wait(30 * SECOND)
    assert (await place.reserve(caps, 1, account=account)).refused == 4
    place.wait(SECOND)
    assert (await place.reserve(caps, 1, account=account)).refused == 0


async def test_a_refused_request_is_charged_nowhere(place: Place, account: str) -> None:
    caps = Caps(requests=10, tokens=100, day=1000, month=NANOS)
    standing = await place.reserve(caps, 101, 5, account=account)
    assert replace(standing, now=0, day=0, month=0) == Standing(4, 0, 0, 0, 0, 0, 0, 0, 0, 0)


async def test_accounts_are_apart(place: Place, account: str) -> None:
    assert [(await place.reserve(Caps(requests=1), account=account + end)).refused for end in "aab"] == [0, 3, 0]


# --- budgets


async def test_a_budget_counts_what_is_in_flight_and_what_was_used(place: Place, account: str) -> None:
    caps = Caps(day=100, month=50)
    assert (await place.reserve(caps, 60, 20, account=account, id="a")).refused == 0
    assert (await place.reserve(caps, 41, 0, account=account)).refused == 1
    assert (await place.reserve(caps, 0, 31, account=account)).refused == 2
    await place.ledger.settle(account, caps, Hold("a", 60, 20), 30, 10)
    standing = await place.reserve(caps, 70, 40, account=account)
    assert (standing.refused, standing.day_used, standing.held_tokens) == (0, 30, 70)
    assert (standing.month_used, standing.held_nanos) == (10, 40)


async def test_budgets_begin_anew_at_midnight_and_on_the_first_in_utc(place: Place, account: str) -> None:
    caps = Caps(day=10, month=30)
    place.jump(datetime(2028, 2, 28, 23, 59, 59, tzinfo=UTC).timestamp() * 1e6 - place.utc)
    for day in range(3):  # the 28th, the 29th, the 1st of March
        standing = await place.reserve(caps, 10, 15, account=account, id=f"{day}")
        assert standing.month % 12 == (2 if day == 2 else 1)
        await place.ledger.settle(account, caps, Hold(f"{day}", 10, 15), 10, 15)
        assert standing.refused == 0
        assert (await place.reserve(caps, 1, 0, account=account)).refused == 1
        place.wait(DAY)
    assert (await place.reserve(caps, 0, 16, account=account)).refused == 2


async def test_what_runs_over_midnight_counts_in_the_day_in_which_it_is_settled(place: Place, account: str) -> None:
    caps = Caps(day=100)
    place.jump(12 * HOUR - SECOND)
    await place.reserve(caps, 100, account=account, id="a")
    place.wait(2 * SECOND)
    assert (await place.reserve(caps, 1, account=account)).refused == 1
    await place.ledger.settle(account, caps, Hold("a", 100, 0), 70, 0)
    assert (await place.reserve(caps, 31, account=account)).refused == 1
    assert (await place.reserve(caps, 30, account=account)).day_used == 70


async def test_what_nobody_settles_is_free_after_the_lease(place: Place, account: str) -> None:
    caps = Caps(day=100)
    await place.reserve(caps, 100, account=account, id="killed")
    place.wait(60 * SECOND)
    assert (await place.reserve(caps, 1, account=account)).refused == 1
    place.wait(60 * SECOND)
    standing = await place.reserve(caps, 100, account=account)
    assert (standing.refused, standing.held_tokens, standing.day_used) == (0, 100, 0)


async def test_what_is_settled_after_its_lease_is_used_all_the_same(place: Place, account: str) -> None:
    caps = Caps(day=100)
    await place.reserve(caps, 60, account=account, id="slow")
    for _ in range(2):
        place.wait(60 * SECOND)
        await place.reserve(Caps(day=0), 1, account=account)
    await place.ledger.settle(account, caps, Hold("slow", 60, 0), 60, 0)
    standing = await place.reserve(caps, 41, account=account)
    assert (standing.refused, standing.day_used, standing.held_tokens) == (1, 60, 0)


# --- clocks that jump


@pytest.mark.parametrize("jump", [-HOUR, -DAY, -400 * DAY])
async def test_a_clock_that_jumps_back_neither_locks_nor_unlocks(place: Place, account: str, jump: int) -> None:
    caps = Caps(requests=2, tokens=10, day=100)
    for id in "ab":
        await place.reserve(caps, 5, account=account, id=id)
        await place.ledger.settle(account, caps, Hold(id, 5, 0), 5, 0)
    place.jump(jump)
    standing = await place.reserve(caps, 1, account=account)
    assert (standing.refused, standing.day_used) == (3, 10)
    place.wait(30 * SECOND)
    assert (await place.reserve(caps, 1, account=account)).refused == 0


async def test_a_clock_that_jumps_ahead_frees_nothing_that_runs(place: Place, account: str) -> None:
    caps = Caps(day=100)
    await place.reserve(caps, 100, account=account, id="a")
    place.wait(50 * SECOND)
    place.jump(HOUR)
    assert (await place.reserve(caps, 1, account=account)).refused == 1
    place.jump(-HOUR)
    assert (await place.reserve(caps, 1, account=account)).refused == 1
    await place.ledger.settle(account, caps, Hold("a", 100, 0), 0, 0)
    assert (await place.reserve(caps, 100, account=account)).refused == 0


async def test_a_jump_over_midnight_and_back_opens_no_budget_twice(place: Place, account: str) -> None:
    caps = Caps(day=100)
    place.jump(11.5 * HOUR)
    used = 0
    for _ in range(4):
        for jump in (HOUR, -HOUR):
            if not (await place.reserve(caps, 100, account=account, id=f"{used}")).refused:
                await place.ledger.settle(account, caps, Hold(f"{used}", 100, 0), 100, 0)
                used += 100
            place.jump(jump)
    assert used == 200  # that day's, and the next day's
    place.jump(HOUR)
    assert (await place.reserve(caps, 1, account=account)).refused == 1
    place.jump(DAY)
    assert (await place.reserve(caps, 100, account=account)).refused == 0


async def test_a_clock_that_was_years_ahead_locks_no_longer_than_a_window(place: Place, account: str) -> None:
    caps = Caps(day=100, month=100)
    place.jump(4000 * DAY)
    await place.reserve(caps, 100, 50, account=account, id="a")
    await place.ledger.settle(account, caps, Hold("a", 100, 50), 100, 50)
    place.jump(-4000 * DAY)
    assert (await place.reserve(caps, 1, 1, account=account)).refused == 1
    place.jump(DAY)
    standing = await place.reserve(caps, 100, 50, account=account)
    assert (standing.refused, standing.month_used) == (0, 50)


# --- the three ledgers are one

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), st.integers(0, 40), st.integers(0, 40)),
        st.tuples(st.just("settle"), st.integers(0, 60), st.integers(0, 60)),
        st.tuples(st.just("wait"), st.integers(0, 70 * SECOND), st.just(0)),
        st.tuples(st.just("jump"), st.sampled_from([-HOUR, HOUR, -DAY, DAY, 40 * DAY, -40 * DAY]), st.just(0)),
    ),
    max_size=25,
)
CAP = st.one_of(st.just(NONE), st.integers(0, 200))


async def run_on(place: Place, caps: Caps, operations: list[Any], account: str) -> list[Standing]:
    standings: list[Standing] = []
    held: list[Hold] = []
    for number, (what, one, two) in enumerate(operations):
        match what:
            case "wait":
                place.wait(one)
            case "jump":
                place.jump(one)
            case "reserve":
                hold = Hold(f"{account}-{number}", one, two)
                standings.append(await place.ledger.reserve(account, caps, hold))
                if not standings[-1].refused:
                    held.append(hold)
            case "settle" if held:
                await place.ledger.settle(account, caps, held.pop(one % len(held)), one, two)
    standings.append(await place.ledger.reserve(account, caps, Hold(f"{account}-last", 1, 1)))
    return standings


def close_to(one: Standing, other: Standing) -> bool:
    same = replace(one, requests=0, tokens=0) == replace(other, requests=0, tokens=0)
    return same and abs(one.requests - other.requests) < 1e-4 and abs(one.tokens - other.tokens) < 1e-4


@pytest.mark.parametrize("kind", SHARED)
def test_the_ledgers_answer_alike(kind: str, request: pytest.FixtureRequest) -> None:
    url = url_of(kind, request)

    @settings(max_examples=200 if kind == "redis" else 60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(caps=st.builds(Caps, CAP, CAP, CAP, CAP), operations=OPERATIONS)
    @example(caps=Caps(day=100), operations=[("reserve", 40, 0), ("jump", HOUR, 0)])
    @example(caps=Caps(5, 100, 100, 100), operations=[("reserve", 40, 9), ("jump", 40 * DAY, 0), ("settle", 0, 50)])
    @example(caps=Caps(1, 40, 40, 40), operations=[("reserve", 40, 40), ("settle", 40, 40), ("jump", -40 * DAY, 0)])
    def alike(caps: Caps, operations: list[Any]) -> None:
        async def both() -> tuple[list[Standing], list[Standing]]:
            account = f"key_{token_hex(6)}"
            database = None if kind == "redis" else database_of(url)
            shared = PostgresLedger(database, LEASE, PATIENCE) if database else RedisLedger(url, LEASE, PATIENCE)
            place = Place(shared)
            place.set()
            try:
                return (
                    await run_on(place, caps, operations, account),
                    await run_on(memory_place(one_clock=True), caps, operations, account),
                )
            finally:
                await shared.close()
                if database:
                    await database.close()

        there, here = asyncio.run(both())
        assert all(map(close_to, there, here)), (there, here)

    alike()


# --- nothing at once beats a budget


def key_with(limits: KeyLimits, id: str | None = None) -> Key:
    return Key(id or f"key_{token_hex(6)}", "acme", "client", "nk-12345", limits=limits)


@given(
    budget=st.integers(50, 2000),
    sizes=st.lists(st.tuples(st.integers(1, 300), st.floats(0, 1)), min_size=1, max_size=40),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_however_requests_run_at_once_no_budget_is_passed(
    budget: int, sizes: list[tuple[int, float]], seed: int
) -> None:
    asyncio.run(race([MemoryLedger(LEASE)], budget, sizes, seed))


@pytest.mark.parametrize("kind", SHARED)
async def test_however_requests_run_on_replicas_no_budget_is_passed(kind: str, request: pytest.FixtureRequest) -> None:
    databases: list[Database] = []
    if kind == "redis":
        url = request.getfixturevalue("redis_server").url
        ledgers: list[Ledger] = [RedisLedger(url, LEASE, PATIENCE) for _ in range(3)]
    else:
        databases = [database_of(request.getfixturevalue("postgres_url")) for _ in range(2)]
        ledgers = [PostgresLedger(one, LEASE, PATIENCE) for one in databases]
    for seed in range(3):
        chance = random.Random(seed)
        sizes = [(chance.randint(1, 300), chance.random()) for _ in range(60)]
        await race(ledgers, 1500, sizes, seed)
    for one in [*ledgers, *databases]:
        await one.close()


async def race(ledgers: list[Ledger], budget: int, sizes: list[tuple[int, float]], seed: int) -> None:
    """Requests at once on all ledgers, by a key with three budgets of the same size; counts what is out at any time."""
    limits = KeyLimits(tokens_per_day=budget, cost_per_month=budget / 1e9, tokens_per_minute=10**9)
    key, chance = key_with(limits), random.Random(seed)
    replicas = [Limits(one, Metrics(), LEASE) for one in ledgers]
    granted = used = most = 0

    async def request(number: int, size: int, part: float) -> None:
        nonlocal granted, used, most
        limits = replicas[number % len(replicas)]
        await asyncio.sleep(chance.random() / 1000)
        try:
            held = await limits.reserve(key, size, size / 1e9)
        except ApiError as error:
            assert error.status == 429
            return
        granted += size
        most = max(most, granted + used)
        assert granted + used <= budget
        await asyncio.sleep(chance.random() / 1000)
        took = int(size * part)
        granted, used = granted - size, used + took
        limits.settle(held, took, 0, took / 1e9)
        if isinstance(held, Reservation) and chance.random() < 0.2:
            limits.release(held)  # a second time: nothing

    await asyncio.gather(*(request(number, *size) for number, size in enumerate(sizes)))
    assert used <= budget
    for one in replicas:
        await one.settled()
    left = budget - used
    if left:
        last = await replicas[0].reserve(key, left, left / 1e9)
        assert isinstance(last, Reservation)
        assert (last.standing.day_used, last.standing.held_tokens) == (used, left)
        assert (last.standing.month_used, last.standing.held_nanos) == (used, left)
    with pytest.raises(ApiError, match="a day"):
        await replicas[0].reserve(key, 1)


WORKER = """
import asyncio, json, random, sys
from app.errors import ApiError
from app.limits import Limits
from app.metrics import Metrics
from app.records import Key, KeyLimits
from tests.app.test_limits import database_of, LEASE, PATIENCE
kind, url, account, seed, budget = sys.argv[1:]
key = Key(account, "acme", "client", "nk", limits=KeyLimits(tokens_per_day=int(budget)))
async def main():
    chance = random.Random(int(seed))
    if kind == "redis":
        from app.limits.redis import RedisLedger
        ledger = RedisLedger(url, LEASE, PATIENCE)
    else:
        from app.limits.postgres import PostgresLedger
        ledger = PostgresLedger(database_of(url), LEASE, PATIENCE)
    limits = Limits(ledger, Metrics(), LEASE)
    used = most = 0
    async def one():
        nonlocal used, most
        for _ in range(10):
            size = chance.randint(1, 100)
            try:
                held = await limits.reserve(key, size)
            except ApiError:
                continue
            most = max(most, held.standing.day_used + held.standing.held_tokens)
            await asyncio.sleep(chance.random() / 500)
            took = chance.randint(0, size)
            used += took
            limits.settle(held, took, 0)
    print("ready", flush=True)
    sys.stdin.readline()
    await asyncio.gather(*(one() for _ in range(10)))
    await limits.close()
    print(json.dumps([used, most]), flush=True)
asyncio.run(main())
"""
ROOT = Path(__file__).parents[2]


def started(program: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kind", SHARED)
async def test_processes_at_once_pass_no_budget(kind: str, request: pytest.FixtureRequest, account: str) -> None:
    url = url_of(kind, request)
    budget = 2000
    processes = [started(WORKER, kind, url, account, str(seed), str(budget)) for seed in range(3)]
    assert [one.stdout.readline() for one in processes if one.stdout] == ["ready\n"] * 3
    said = [one.communicate("go\n")[0] for one in processes]
    found = [json.loads(one) for one in said]
    used, most = sum(one[0] for one in found), max(one[1] for one in found)
    assert budget / 2 < used <= budget
    assert budget / 2 < most <= budget
    database = database_of(url) if kind == "postgresql" else None
    ledger: Ledger = PostgresLedger(database, LEASE, PATIENCE) if database else RedisLedger(url, LEASE, PATIENCE)
    standing = await ledger.reserve(account, Caps(day=0), Hold("x", 1, 0))
    assert (standing.day_used, standing.held_tokens) == (used, 0)
    await ledger.close()
    if database:
        await database.close()


KILLED = """
import asyncio, sys
from app.limits import Limits
from app.metrics import Metrics
from app.records import Key, KeyLimits
from tests.app.test_limits import shared_ledger
kind, url, account = sys.argv[1:]
async def main():
    key = Key(account, "acme", "client", "nk", limits=KeyLimits(tokens_per_day=100))
    ledger, _ = shared_ledger(kind, url, 0.6)
    await Limits(ledger, Metrics(), 0.6).reserve(key, 100)
    print("held", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.mark.parametrize("kind", SHARED)
async def test_what_a_killed_gateway_held_comes_back(kind: str, request: pytest.FixtureRequest, account: str) -> None:
    url = url_of(kind, request)
    gateway = started(KILLED, kind, url, account)
    assert gateway.stdout and gateway.stdout.readline() == "held\n"
    gateway.send_signal(signal.SIGKILL)
    gateway.communicate()
    ledger, database = shared_ledger(kind, url, 0.6)
    limits = Limits(ledger, Metrics(), 0.6)
    key = key_with(KeyLimits(tokens_per_day=100), account)
    with pytest.raises(ApiError, match="held by requests in flight"):
        await limits.reserve(key, 100)
    async with asyncio.timeout(10):
        while True:
            try:
                await limits.reserve(key, 100)
                break
            except ApiError:
                await asyncio.sleep(0.1)
    await limits.close()
    if database:
        await database.close()


# --- Limits: the fast path, settling, and a ledger that is down


class Ledgers:
    """A ledger in memory that can be down."""

    def __init__(self) -> None:
        self.inner, self.down, self.calls = MemoryLedger(LEASE), False, 0

    async def reserve(self, account: str, caps: Caps, hold: Hold) -> Standing:
        self.calls += 1
        if self.down:
            raise LedgerDown("down")
        return await self.inner.reserve(account, caps, hold)

    async def settle(self, account: str, caps: Caps, hold: Hold, tokens: int, nanos: int) -> None:
        self.calls += 1
        if self.down:
            raise LedgerDown("down")
        await self.inner.settle(account, caps, hold, tokens, nanos)

    async def tend(self) -> None: ...
    async def close(self) -> None: ...

    def standing(self, account: str) -> tuple[int, int]:
        found = self.inner._accounts[account]
        return found.day_used, found.held_tokens


def test_a_key_without_limits_waits_for_nothing() -> None:
    limits, key = Limits(Ledgers(), Metrics(), LEASE), key_with(KeyLimits(max_tokens=5, allow=("top_k",)))
    assert not limits.needed(key)
    with pytest.raises(StopIteration) as ended:
        limits.reserve(key, 10**9, 1e9).send(None)
    assert ended.value.value is NOTHING
    limits.settle(NOTHING, 1, 1, 1.0)
    limits.release(NOTHING)
    assert NOTHING.headers == {}


@pytest.mark.parametrize("name", ["requests_per_minute", "tokens_per_minute", "tokens_per_day", "cost_per_month"])
def test_a_limit_of_zero_is_a_limit(name: str) -> None:
    key = key_with(KeyLimits(**{name: 0}))
    assert Limits.needed(key)
    with pytest.raises(ApiError) as error:
        asyncio.run(Limits(MemoryLedger(LEASE), Metrics(), LEASE).reserve(key, 1, 1.0))
    assert error.value.status == 429


async def test_a_released_request_gives_back_its_tokens_and_stays_a_request() -> None:
    limits, key = Limits(MemoryLedger(LEASE), Metrics(), LEASE), key_with(KeyLimits(2, 100, 100, 1.0))
    held = await limits.reserve(key, 100, 1.0)
    limits.release(held)
    limits.settle(held, 100, 0, 1.0)  # too late
    again = await limits.reserve(key, 100, 1.0)
    assert isinstance(again, Reservation)
    assert (again.standing.day_used, again.standing.month_used) == (0, 0)
    assert again.standing.requests == pytest.approx(2, abs=0.01)


async def test_a_refusal_waits_for_what_is_being_settled(redis_server: Server) -> None:
    ledger = RedisLedger(redis_server.url, LEASE, PATIENCE)
    limits, key = Limits(ledger, Metrics(), LEASE), key_with(KeyLimits(tokens_per_day=100))
    for _ in range(10):
        limits.settle(await limits.reserve(key, 91), 1, 0)
    await limits.close()


class Slow(Ledgers):
    """A ledger that hears of a use when `hear` is set, and whose answers arrive when `arrive` is."""

    def __init__(self) -> None:
        super().__init__()
        self.hear, self.answered, self.arrive = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def reserve(self, account: str, caps: Caps, hold: Hold) -> Standing:
        standing = await super().reserve(account, caps, hold)
        self.answered.set()
        await self.arrive.wait()
        return standing

    async def settle(self, account: str, caps: Caps, hold: Hold, tokens: int, nanos: int) -> None:
        await self.hear.wait()
        await super().settle(account, caps, hold, tokens, nanos)


async def test_a_settling_that_ends_while_a_refusal_is_on_its_way_is_heard() -> None:
    ledger, key = Slow(), key_with(KeyLimits(tokens_per_day=100))
    limits = Limits(ledger, Metrics(), LEASE)
    ledger.arrive.set()
    first = await limits.reserve(key, 91)
    ledger.arrive.clear()
    ledger.answered.clear()
    limits.settle(first, 1, 0)
    second = asyncio.create_task(limits.reserve(key, 91))
    await ledger.answered.wait()  # it is refused: the first is held
    ledger.hear.set()
    await limits.settled()
    ledger.arrive.set()
    assert isinstance(await second, Reservation)


async def test_a_refusal_is_not_told_before_the_settling_has_ended() -> None:
    ledger, key = Slow(), key_with(KeyLimits(tokens_per_day=100))
    limits = Limits(ledger, Metrics(), LEASE)
    ledger.arrive.set()
    limits.settle(await limits.reserve(key, 91), 1, 0)
    second = asyncio.create_task(limits.reserve(key, 91))
    for _ in range(20):  # enough for a refusal, were it told
        await asyncio.sleep(0)
    assert not second.done()
    ledger.hear.set()
    assert isinstance(await second, Reservation)


async def test_who_is_cancelled_while_the_ledger_is_asked_holds_nothing() -> None:
    ledger, key = Slow(), key_with(KeyLimits(tokens_per_day=100))
    limits = Limits(ledger, Metrics(), LEASE)
    asking = asyncio.create_task(limits.reserve(key, 100))
    await ledger.answered.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert ledger.standing(key.id) == (0, 100)
    ledger.arrive.set()
    ledger.hear.set()
    await limits.settled()
    assert ledger.standing(key.id) == (0, 0)


async def test_refusals_are_counted_by_what_was_full() -> None:
    metrics = Metrics()
    limits = Limits(MemoryLedger(LEASE), metrics, LEASE)
    with pytest.raises(ApiError):
        await limits.reserve(key_with(KeyLimits(tokens_per_day=1)), 2)
    assert 'newel_limit_refusals_total{limit="tokens_per_day"} 1.0' in metrics.render().decode()


async def test_while_the_ledger_is_down_a_replica_grants_its_share_of_what_was_left() -> None:
    ledger, metrics = Ledgers(), Metrics()
    limits, key = Limits(ledger, metrics, LEASE, share=0.25), key_with(KeyLimits(tokens_per_day=1000))
    limits.settle(await limits.reserve(key, 500), 200, 0)
    await limits.settled()
    running = await limits.reserve(key, 400)  # 200 used, 400 held: 400 left, and a quarter of it is 100
    ledger.down = True
    alone = await limits.reserve(key, 60)
    with pytest.raises(ApiError) as error:
        await limits.reserve(key, 60)
    assert (error.value.status, error.value.code, error.value.retry_after) == (429, "rate_limit_exceeded", 2)
    said = metrics.render().decode()
    assert 'newel_limits_failed_total{call="reserve",outcome="local"} 2.0' in said
    assert "newel_limits_down 1.0" in said
    limits.settle(alone, 50, 0)
    limits.settle(running, 300, 0)
    await limits.settled()
    ledger.down, limits._down_until = False, 0.0
    await limits.reserve(key, 1)
    await limits.settled()
    # what was used meanwhile is charged; the hold whose settling was not heard expires by itself
    assert ledger.standing(key.id) == (200 + 50 + 300, 400 + 1)
    assert "newel_limits_down 0.0" in metrics.render().decode()


async def test_a_rate_of_the_share_is_never_nothing() -> None:
    ledger = Ledgers()
    ledger.down = True
    limits, key = Limits(ledger, Metrics(), LEASE, share=0.1), key_with(KeyLimits(requests_per_minute=3))
    await limits.reserve(key, 1)
    with pytest.raises(ApiError):
        await limits.reserve(key, 1)


async def test_a_ledger_that_is_down_is_asked_by_one_request_each_second() -> None:
    ledger = Ledgers()
    ledger.down = True
    limits, key = Limits(ledger, Metrics(), LEASE), key_with(KeyLimits(requests_per_minute=1000))
    await asyncio.gather(*(limits.reserve(key, 1) for _ in range(50)))
    before = ledger.calls
    assert before <= 50
    await asyncio.gather(*(limits.reserve(key, 1) for _ in range(50)))
    assert ledger.calls == before
    limits._down_until -= PAUSE
    await asyncio.gather(*(limits.reserve(key, 1) for _ in range(50)))
    assert ledger.calls == before + 1


async def test_who_prefers_it_is_refused_while_the_ledger_is_down() -> None:
    ledger = Ledgers()
    ledger.down = True
    limits = Limits(ledger, Metrics(), LEASE, "refuse")
    with pytest.raises(ApiError) as error:
        await limits.reserve(key_with(KeyLimits(requests_per_minute=10)), 1)
    assert (error.value.status, error.value.code, error.value.retry_after) == (503, "limits_down", 1)


async def test_a_redis_that_is_gone_and_comes_back(account: str) -> None:
    server = Server(redis_program())
    metrics = Metrics()
    key = key_with(KeyLimits(tokens_per_day=1000), account)
    try:
        server.start()
        limits = Limits(RedisLedger(server.url, LEASE, 0.3), metrics, LEASE, share=0.5)
        limits.settle(await limits.reserve(key, 100), 100, 0)
        await limits.settled()
        server.freeze(True)
        began = asyncio.get_running_loop().time()
        alone = await limits.reserve(key, 400)
        assert asyncio.get_running_loop().time() - began < 3
        assert isinstance(alone, Reservation)
        assert alone.caps.day == 450
        limits.settle(alone, 400, 0)
        server.freeze(False)
        limits._down_until = 0.0
        back = await limits.reserve(key, 1)
        await limits.settled()
        assert isinstance(back, Reservation)
        assert back.ledger is limits._ledger
        last = await limits.reserve(key, 1)
        assert isinstance(last, Reservation)
        assert last.standing.day_used == 500
        server.stop()
        assert isinstance(await limits.reserve(key, 1), Reservation)
        await limits.close()
    finally:
        server.remove()


@pytest.mark.parametrize("kind", ["redis", "postgresql"])
async def test_a_ledger_that_is_not_there_is_down(kind: str, account: str, tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/nowhere" if kind == "redis" else "postgresql://newel@127.0.0.1:1/newel"
    ledger, database = shared_ledger(kind, url)
    with pytest.raises(LedgerDown):
        await ledger.reserve(account, Caps(day=1), Hold("a", 1, 0))
    with pytest.raises(LedgerDown):
        await ledger.settle(account, Caps(day=1), Hold("a", 1, 0), 1, 0)
    await ledger.close()
    if database:
        await database.close()


async def test_a_redis_that_lost_its_scripts_is_told_them_again(redis_server: Server, account: str) -> None:
    ledger = RedisLedger(redis_server.url, LEASE, PATIENCE)
    await ledger.reserve(account, Caps(requests=5), Hold("a", 0, 0))
    await ledger._client.script_flush()
    assert (await ledger.reserve(account, Caps(requests=5), Hold("b", 0, 0))).requests > 1
    await ledger.close()


# --- what a client is told


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0ms"),
        (0.0001, "1ms"),
        (0.12, "120ms"),
        (1, "1s"),
        (6.5, "6.5s"),
        (7.66, "7.66s"),
        (59.9996, "1m0s"),
        (60, "1m0s"),
        (360, "6m0s"),
        (119.5, "2m0s"),
        (3600, "1h0m0s"),
        (86_399.2, "24h0m0s"),
    ],
)
def test_times_are_written_as_openai_writes_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def standing(**changes: Any) -> Standing:
    at = Standing(0, NOON, 0.0, 0.0, NOON // DAY, 0, month_of(NOON // DAY), 0, 0, 0)
    return replace(at, **changes)


def test_the_headers_tell_what_remains_and_when_all_of_it_is_back() -> None:
    assert headers(Caps(60, 6000), standing(requests=1.0, tokens=36.0)) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "5964",
        "x-ratelimit-reset-tokens": "360ms",
    }
    assert headers(Caps(day=1000), standing(day_used=300, held_tokens=100)) == {
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "600",
        "x-ratelimit-reset-tokens": "12h0m0s",
    }
    assert headers(Caps(month=1), standing()) == {}


def test_a_full_rate_says_when_to_come_back() -> None:
    error = refusal(Caps(requests=60), Hold("a", 1, 0), standing(refused=3, requests=59.75))
    assert (error.status, error.code, error.kind) == (429, "rate_limit_exceeded", "requests")
    assert (error.retry_after, error.headers["retry-after-ms"]) == (1, "750")
    assert error.headers["x-ratelimit-remaining-requests"] == "0"
    assert "x-should-retry" not in error.headers
    assert error.response.headers["retry-after"] == "1"
    tokens = refusal(Caps(tokens=600), Hold("a", 300, 0), standing(refused=4, tokens=600.0))
    assert (tokens.kind, tokens.retry_after, tokens.headers["retry-after-ms"]) == ("tokens", 30, "30000")


async def test_who_comes_back_when_told_is_served(place: Place, account: str) -> None:
    caps, size = Caps(requests=7, tokens=97), 13
    for _ in range(40):
        standing = await place.reserve(caps, size, account=account)
        if standing.refused:
            place.wait(int(refusal(caps, Hold("", size, 0), standing).headers["retry-after-ms"]) * 1000)
            assert (await place.reserve(caps, size, account=account)).refused == 0


def test_a_request_that_can_never_fit_is_not_to_be_sent_again() -> None:
    error = refusal(Caps(tokens=100), Hold("a", 101, 0), standing(refused=4))
    assert (error.status, error.headers["x-should-retry"], error.retry_after) == (429, "false", None)
    assert "max_tokens" in error.message


def test_a_spent_budget_is_a_quota_that_waiting_does_not_help() -> None:
    day = refusal(Caps(day=100), Hold("a", 10, 0), standing(refused=1, day_used=95))
    assert (day.status, day.code, day.kind) == (429, "insufficient_quota", "insufficient_quota")
    assert (day.headers["x-should-retry"], day.retry_after) == ("false", None)
    assert "2027-03-11T00:00:00Z" in day.message
    month = refusal(Caps(month=2 * NANOS), Hold("a", 0, NANOS), standing(refused=2, month_used=3 * NANOS // 2))
    assert (month.code, month.headers["x-should-retry"]) == ("insufficient_quota", "false")
    assert "2 a month, used 1.5, requested up to 1" in month.message
    assert "2027-04-01T00:00:00Z" in month.message


def test_a_budget_that_only_running_requests_fill_is_worth_another_try() -> None:
    day = refusal(Caps(day=100), Hold("a", 10, 0), standing(refused=1, day_used=50, held_tokens=45))
    assert (day.code, day.retry_after, day.headers.get("x-should-retry")) == ("rate_limit_exceeded", 1, None)


def test_the_end_of_december_is_in_the_next_year() -> None:
    assert month_end(2027 * 12 + 11) == int(datetime(2028, 1, 1, tzinfo=UTC).timestamp()) * SECOND


# --- one replica: budgets stay over a restart


async def test_a_restart_keeps_what_budgets_have_used(url: str, account: str) -> None:
    await migrate(url)
    database = database_of(url)
    key = key_with(KeyLimits(tokens_per_day=100, cost_per_month=1.0), account)
    for _ in range(2):
        ledger = MemoryLedger(LEASE, Budgets(database))
        limits = Limits(ledger, Metrics(), LEASE)
        many = await asyncio.gather(*(limits.reserve(key, 10, 0.1) for _ in range(5)))
        for one in many:
            limits.settle(one, 9, 1, 0.1)
        await limits.close()
    again = MemoryLedger(LEASE, Budgets(database))
    with pytest.raises(ApiError, match="used 100, requested 1"):
        await Limits(again, Metrics(), LEASE).reserve(key, 1)
    await database.close()


class Broken:
    """A keeper whose database is down."""

    async def load(self, account: str) -> Used | None:
        raise StoreDown("down")

    async def save(self, used: Any) -> None:
        raise StoreDown("down")


async def test_a_budget_whose_past_is_unknown_is_no_budget_yet(account: str) -> None:
    limits = Limits(MemoryLedger(LEASE, Broken()), Metrics(), LEASE, "refuse")
    with pytest.raises(ApiError) as error:
        await limits.reserve(key_with(KeyLimits(tokens_per_day=100), account), 1)
    assert error.value.status == 503


async def test_what_could_not_be_saved_is_saved_the_next_time(account: str) -> None:
    ledger = MemoryLedger(LEASE)
    caps = Caps(day=100)
    await ledger.reserve(account, caps, Hold("a", 10, 0))
    ledger.put(account, caps, Hold("a", 10, 0), 10, 0)
    ledger._keeper = Broken()
    with pytest.raises(StoreDown):
        await ledger.tend()
    assert ledger._changed == {account}


@pytest.mark.postgres
async def test_accounts_that_nobody_uses_are_cleared_away(postgres_url: str, account: str) -> None:
    database = database_of(postgres_url)
    ledger = PostgresLedger(database, LEASE, PATIENCE)
    ledger.at = NOON
    await ledger.reserve(account, Caps(day=10), Hold(token_hex(4), 5, 0))
    clear = lambda now: database.write(lambda connection: delete_idle(connection, now))  # noqa: E731
    await clear(NOON + 39 * DAY)
    ledger.at = NOON + 39 * DAY
    assert (await ledger.reserve(account, Caps(day=10), Hold(token_hex(4), 1, 0))).held_tokens == 6
    assert await clear(NOON + 80 * DAY) >= 1
    assert (await ledger.reserve(account, Caps(day=10), Hold(token_hex(4), 10, 0))).held_tokens == 10
    await database.close()


# --- which ledger


@pytest.mark.parametrize(
    ("database", "limits", "kind"),
    [
        ("", {}, MemoryLedger),
        ("postgresql://newel@db/newel", {}, PostgresLedger),
        ("postgresql://newel@db/newel", {"redis_url": "redis://cache/0"}, RedisLedger),
        ("postgresql://newel@db/newel", {"backend": "memory"}, MemoryLedger),
        ("", {"redis_url": "redis://cache/0", "backend": "redis"}, RedisLedger),
    ],
)
def test_the_settings_choose_the_ledger(database: str, limits: dict[str, Any], kind: type) -> None:
    chosen = Settings(database=database, limits=LimitSettings(**limits))
    opened = open_limits(chosen, None, Metrics())  # type: ignore[arg-type]
    assert type(opened._ledger) is kind


@pytest.mark.parametrize("backend", ["redis", "postgresql"])
def test_a_ledger_that_is_not_there_is_said_at_the_start(backend: str) -> None:
    with pytest.raises(ValueError, match=f'limits.backend = "{backend}" needs'):
        open_limits(Settings(limits=LimitSettings(backend=backend)), None, Metrics())  # type: ignore[arg-type]
