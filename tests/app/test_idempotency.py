"""Idempotency keys: one answer for one key, whatever is sent again, at once, or after a gateway died."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest
from sqlalchemy import text, update

from app.errors import ApiError
from app.idempotency import Claim, Idempotency
from app.records import now
from app.store import migrate, tables
from app.store.database import Database
from app.store.idempotency import Slot
from tests.app.test_limits import database_of

LEASE = 600.0
ROOT = Path(__file__).parents[2]


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    """A migrated database."""
    await migrate(url)
    found = database_of(url)
    yield found
    await found.close()


@pytest.fixture
def keys(database: Database) -> Idempotency:
    """A replica whose second requests do not wait long."""
    return Idempotency(database, LEASE, wait=0.2)


@pytest.fixture
def name() -> str:
    """A key that no other test sends."""
    return f"order-{token_hex(4)}"


async def rows(database: Database, name: str) -> list[Any]:
    import hashlib

    query = text("SELECT * FROM idempotency WHERE hash = :hash")
    digest = hashlib.sha256(name.encode()).hexdigest()
    return await database.read(lambda one: _all(one, query, {"hash": digest}))


async def _all(connection: Any, query: Any, values: dict[str, str]) -> list[Any]:
    return list((await connection.execute(query, values)).mappings())


async def age(database: Database, claim: Claim, **columns: float) -> None:
    """Moves times of a claim into the past, by seconds."""
    values = {column: now() - timedelta(seconds=seconds) for column, seconds in columns.items()}
    change = update(tables.idempotency).where(tables.idempotency.c.hash == claim.slot.hash).values(values)

    async def write(connection: Any) -> None:
        await connection.execute(change)

    await database.write(write)


async def test_a_new_key_is_owned_and_what_is_answered_is_told_again(keys: Idempotency, name: str) -> None:
    claim = await keys.claim("acme", "key_1", name, "mac")
    assert claim.state == "new"
    assert await keys.complete(claim, "chatcmpl-1")
    for _ in range(2):
        again = await keys.claim("acme", "key_1", name, "mac")
        assert (again.state, again.turn) == ("done", "chatcmpl-1")


async def test_neither_the_key_nor_the_body_is_stored(keys: Idempotency, database: Database, name: str) -> None:
    await keys.claim("acme", "key_1", name, "mac")
    (row,) = await rows(database, name)
    assert name not in str(dict(row))
    assert set(row) == {"tenant", "key", "hash", "body", "turn", "state", "owner", "leased_until", "expires_at"}


@pytest.mark.parametrize(("tenant", "key"), [("other", "key_1"), ("acme", "key_2")])
async def test_another_api_key_has_keys_of_its_own(keys: Idempotency, name: str, tenant: str, key: str) -> None:
    await keys.complete(await keys.claim("acme", "key_1", name, "mac"), "chatcmpl-1")
    assert (await keys.claim(tenant, key, name, "mac")).state == "new"


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("elsewhere", [True, False])
async def test_another_body_is_a_mistake_whether_or_not_the_first_has_ended(
    keys: Idempotency, database: Database, name: str, ended: bool, elsewhere: bool
) -> None:
    claim = await keys.claim("acme", "key_1", name, "mac")
    if ended:
        await keys.complete(claim, "chatcmpl-1")
    with pytest.raises(ApiError) as error:
        await (Idempotency(database, LEASE) if elsewhere else keys).claim("acme", "key_1", name, "other")
    assert (error.value.status, error.value.code) == (422, "idempotency_key_reused")
    assert error.value.param == "Idempotency-Key"


@pytest.mark.parametrize("elsewhere", [True, False])
async def test_who_waits_too_long_is_told_to_come_back(
    keys: Idempotency, database: Database, name: str, elsewhere: bool
) -> None:
    await keys.claim("acme", "key_1", name, "mac")
    began = time.monotonic()
    with pytest.raises(ApiError) as error:
        await (Idempotency(database, LEASE, wait=0.2) if elsewhere else keys).claim("acme", "key_1", name, "mac")
    assert time.monotonic() - began >= 0.2
    assert (error.value.status, error.value.code, error.value.retry_after) == (409, "idempotency_key_in_use", 1)


@pytest.mark.parametrize("elsewhere", [True, False])
async def test_who_waits_gets_the_answer_of_the_first(database: Database, name: str, elsewhere: bool) -> None:
    keys = Idempotency(database, LEASE, wait=30.0)
    other = Idempotency(database, LEASE, wait=30.0) if elsewhere else keys
    claim = await keys.claim("acme", "key_1", name, "mac")
    second = asyncio.create_task(other.claim("acme", "key_1", name, "mac"))
    await asyncio.sleep(0.05)
    await keys.complete(claim, "chatcmpl-1")
    async with asyncio.timeout(10):
        found = await second
    assert (found.state, found.turn) == ("done", "chatcmpl-1")


async def test_a_key_that_was_given_up_is_new_again(database: Database, name: str) -> None:
    keys = Idempotency(database, LEASE, wait=30.0)
    claim = await keys.claim("acme", "key_1", name, "mac")
    waiting = [asyncio.create_task(keys.claim("acme", "key_1", name, "mac")) for _ in range(2)]
    await asyncio.sleep(0.02)
    await keys.abandon(claim)
    async with asyncio.timeout(10):
        (first,), _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        assert first.result().state == "new"
        await keys.complete(first.result(), "chatcmpl-2")
        others = [await one for one in waiting if one is not first]
    assert [(one.state, one.turn) for one in others] == [("done", "chatcmpl-2")]


async def test_what_was_answered_is_not_given_up(keys: Idempotency, name: str) -> None:
    claim = await keys.claim("acme", "key_1", name, "mac")
    await keys.complete(claim, "chatcmpl-1")
    await keys.abandon(claim)
    assert (await keys.claim("acme", "key_1", name, "mac")).state == "done"


async def test_the_key_of_a_gateway_that_died_is_free_after_its_lease(database: Database, name: str) -> None:
    died, other = Idempotency(database, LEASE), Idempotency(database, LEASE, wait=0.0)
    lost = await died.claim("acme", "key_1", name, "mac")
    with pytest.raises(ApiError):
        await other.claim("acme", "key_1", name, "mac")
    await age(database, lost, leased_until=1)
    with pytest.raises(ApiError, match="another request before"):
        await other.claim("acme", "key_1", name, "other")
    claim = await other.claim("acme", "key_1", name, "mac")
    assert claim.state == "new"
    assert not await died.complete(lost, "chatcmpl-late")
    await died.abandon(lost)
    assert await other.complete(claim, "chatcmpl-2")
    assert (await died.claim("acme", "key_1", name, "mac")).turn == "chatcmpl-2"


async def test_no_clock_ends_the_lease_of_what_runs_here(keys: Idempotency, database: Database, name: str) -> None:
    claim = await keys.claim("acme", "key_1", name, "mac")
    await age(database, claim, leased_until=3600, expires_at=3600)
    with pytest.raises(ApiError) as error:
        await keys.claim("acme", "key_1", name, "mac")
    assert error.value.status == 409


async def test_a_key_is_known_for_a_day_and_then_swept(keys: Idempotency, database: Database, name: str) -> None:
    claim = await keys.claim("acme", "key_1", name, "mac")
    await keys.complete(claim, "chatcmpl-1")
    (row,) = await rows(database, name)
    await keys.sweep()
    assert len(await rows(database, name)) == 1
    await age(database, claim, expires_at=1)
    again = await keys.claim("acme", "key_1", name, "other")
    assert again.state == "new"
    await age(database, claim, expires_at=1)
    assert await keys.sweep() >= 1
    assert await rows(database, name) == []
    assert row["state"] == "done"


async def test_of_many_at_once_one_is_the_first(database: Database, name: str) -> None:
    replicas = [Idempotency(database, LEASE, wait=30.0) for _ in range(3)]
    answers = 0

    async def request(keys: Idempotency) -> str:
        nonlocal answers
        claim = await keys.claim("acme", "key_1", name, "mac")
        if claim.state == "done":
            return claim.turn
        answers += 1
        await asyncio.sleep(0.02)
        await keys.complete(claim, f"chatcmpl-{answers}")
        return f"chatcmpl-{answers}"

    async with asyncio.timeout(30):
        said = await asyncio.gather(*(request(replicas[number % 3]) for number in range(12)))
    assert (answers, set(said)) == (1, {"chatcmpl-1"})


WORKER = """
import asyncio, json, sys
from app.errors import ApiError
from app.idempotency import Idempotency
from tests.app.test_limits import database_of
async def main():
    database = database_of(sys.argv[1])
    keys = Idempotency(database, 600.0, wait=20.0)
    print("ready", flush=True)
    sys.stdin.readline()
    said = []
    for number in range(20):
        claim = await keys.claim("acme", "key_1", f"{sys.argv[2]}-{number}", "mac")
        if claim.state == "new":
            await keys.complete(claim, f"{sys.argv[3]}-{number}")
        said.append([claim.state, claim.turn])
    print(json.dumps(said))
    await database.close()
asyncio.run(main())
"""


async def test_of_processes_at_once_one_is_the_first(database: Database, url: str, name: str) -> None:
    def run() -> list[list[list[str]]]:
        started = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, url, name, str(number)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(2)
        ]
        assert [one.stdout.readline() for one in started if one.stdout] == ["ready\n"] * 2
        for one in started:
            assert one.stdin
            one.stdin.write("go\n")
            one.stdin.flush()
        return [json.loads(one.communicate()[0]) for one in started]

    for pair in zip(*await asyncio.to_thread(run), strict=True):
        assert sorted(state for state, _ in pair) == ["done", "new"]


async def test_who_hangs_up_while_claiming_leaves_the_key_free(database: Database, name: str) -> None:
    keys, other = Idempotency(database, LEASE), Idempotency(database, LEASE, wait=10.0)
    claiming = asyncio.create_task(keys.claim("acme", "key_1", name, "mac"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    claiming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await claiming
    await keys.close()
    assert await rows(database, name) == []
    assert not keys._running
    assert (await other.claim("acme", "key_1", name, "mac")).state == "new"


async def test_without_a_database_no_key_is_claimed_or_answered(name: str) -> None:
    database = database_of("postgresql://newel@127.0.0.1:1/newel")
    keys = Idempotency(database, LEASE)
    claim = Claim(Slot("acme", "key_1", "hash"), "owner", "new")
    for call in (keys.claim("acme", "key_1", name, "mac"), keys.complete(claim, "chatcmpl-1")):
        with pytest.raises(ApiError) as error:
            await call
        assert (error.value.status, error.value.code, error.value.retry_after) == (503, "store_down", 5)
    await keys.abandon(claim)  # its lease ends it
    assert not keys._running
    await database.close()


async def test_strange_keys_are_keys(keys: Idempotency) -> None:
    for strange in ("", "\x00", "\ud800", "ключ", "x" * 10_000):
        strange += token_hex(3) if strange else ""
        assert (await keys.claim("acme", f"key_{token_hex(3)}", strange, "mac")).state == "new"
