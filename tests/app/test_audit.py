"""The audit log as a chain: whatever is done to it behind the service's back is found out, and nothing forks it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from secrets import token_hex

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from app.cli import main
from app.records import KeyLimits, Tenant
from app.store import Audited, Break, Head, NotFound, Store, StoreDown, read_head
from app.store.chain import EMPTY, link
from tests.app.earlier import as_it_was

SECRETS = (b"0" * 64,)


@pytest.fixture
def own_url(url: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """An empty database of the same kind as `url`, for this test alone."""
    if url.startswith("sqlite"):
        return f"sqlite+aiosqlite:///{tmp_path}/own/newel.db"
    return str(request.getfixturevalue("cluster").create_database(f"newel_{token_hex(4)}"))


@pytest.fixture
async def log(own_url: str, tmp_path: Path) -> AsyncIterator[Store]:
    """A store with eight audit entries."""
    store = await Store.open(own_url, tmp_path / "spill", secrets=SECRETS)
    for number in range(8):
        await store.audit(f"ana-{number}", "key.create", f"key_{number}", {"scope": "client", "n": number})
    yield store
    await store.close()


async def behind(url: str, *statements: str) -> None:
    """Runs SQL as somebody would who can write to the database and has no secret."""
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        for statement in statements:
            await connection.execute(text(statement))
    await engine.dispose()


async def broken(store: Store, kept: Head | None = None) -> Break | None:
    return (await store.verify_audit(kept)).broken


# --- what is whole


async def test_a_log_that_nobody_touched_is_good_and_says_how_long_it_is(log: Store) -> None:
    head = await log.audit_head()
    assert await log.verify_audit() == Audited(8, head, None)
    assert head.entries == 8
    newest, *_ = await log.audit_log(2)
    assert (newest.place, newest.hash, newest.actor) == (8, head.hash, "ana-7")
    assert [entry.place for entry in await log.audit_log(2, before=5)] == [4, 3]


async def test_an_empty_log_is_good(own_url: str, tmp_path: Path) -> None:
    store = await Store.open(own_url, tmp_path / "spill", secrets=SECRETS)
    assert await store.verify_audit() == Audited(0, EMPTY, None)
    await store.close()


async def test_a_hash_can_be_computed_by_anybody(log: Store) -> None:
    """As docs/trust.md says it: SHA-256 of the JSON of place, time, texts, detail and the hash before."""
    second, first = (await log.audit_log(8))[-2:]
    entry = [2, second.at.isoformat(timespec="microseconds"), "ana-1", "key.create", "key_1"]
    canonical = json.dumps([*entry, second.detail, first.hash], sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(canonical.encode()).hexdigest() == second.hash


async def test_hostile_texts_and_details_read_back_as_they_were_hashed(log: Store) -> None:
    detail = {"b": 1.5, "a": ("x", "\x00\ud800é"), "c": None, 3: True}
    await log.audit("a\x00na", "x\ud800", "\u2028", detail)  # type: ignore[dict-item]
    assert await broken(log) is None


async def test_a_failed_transaction_leaves_no_entry(log: Store) -> None:
    with pytest.raises(NotFound):
        await log.add_key("nobody")
    await log.put_tenant(Tenant("acme", "hr"))
    with pytest.raises(ValueError, match="give both"):
        await log.withheld("chatcmpl-1", "acme", "ana", "")
    found = await log.verify_audit()
    assert (found.entries, found.broken) == (9, None)


# --- what is done behind its back


TAMPERED = {
    "an actor is changed": (("UPDATE audit SET actor = 'eve' WHERE id = 3",), Break(3, "changed")),
    "a time is changed": (
        ("UPDATE audit SET at = '2020-01-01 00:00:00.000000+00:00' WHERE id = 4",),
        Break(4, "changed"),
    ),
    "a detail is changed": (('UPDATE audit SET detail = \'{"scope":"admin"}\' WHERE id = 8',), Break(8, "changed")),
    "a hash is changed": ((f"UPDATE audit SET hash = '{'a' * 64}' WHERE id = 2",), Break(2, "changed")),
    "the first is removed": (("DELETE FROM audit WHERE id = 1",), Break(1, "missing")),
    "one is removed": (("DELETE FROM audit WHERE id = 5",), Break(5, "missing")),
    "one is removed and the gap closed": (
        (
            "DELETE FROM audit WHERE id = 5",
            *(f"UPDATE audit SET id = {place - 1} WHERE id = {place}" for place in (6, 7, 8)),
        ),
        Break(5, "changed"),
    ),
    "two change places": (
        (
            "UPDATE audit SET id = 99 WHERE id = 3",
            "UPDATE audit SET id = 3 WHERE id = 4",
            "UPDATE audit SET id = 4 WHERE id = 99",
        ),
        Break(3, "changed"),
    ),
    "one is put in between": (
        (
            *(f"UPDATE audit SET id = {place + 1} WHERE id = {place}" for place in (8, 7, 6, 5)),
            "INSERT INTO audit SELECT 5, at, 'eve', action, subject, detail, previous, hash FROM audit WHERE id = 4",
        ),
        Break(5, "changed"),
    ),
    "one is put at the end": (
        ("INSERT INTO audit SELECT 9, at, 'eve', action, subject, detail, hash, hash FROM audit WHERE id = 8",),
        Break(9, "changed"),
    ),
    "the tail is cut": (("DELETE FROM audit WHERE id > 6",), Break(7, "tail cut")),
    "everything is removed": (("DELETE FROM audit",), Break(1, "tail cut")),
    "the tail is cut, and the head set back": (
        (
            "DELETE FROM audit WHERE id > 6",
            "UPDATE audit_head SET entries = 6, hash = (SELECT hash FROM audit WHERE id = 6)",
        ),
        Break(6, "head changed"),
    ),
    "the head is removed": (("DELETE FROM audit_head",), Break(8, "head changed")),
    "the head names another secret": (("UPDATE audit_head SET key = 'deadbeef'",), Break(8, "head unsigned")),
}


@pytest.mark.parametrize("what", list(TAMPERED))
async def test_it_is_found_out_when(log: Store, own_url: str, what: str) -> None:
    statements, found = TAMPERED[what]
    await behind(own_url, *statements)
    assert await broken(log) == found


async def forge(url: str, keep: int) -> None:
    """Makes the log anew from its first `keep` entries on, with right hashes, as far as it goes without the secret."""
    engine, head = create_async_engine(url), EMPTY
    async with engine.begin() as connection:
        await connection.execute(text(f"DELETE FROM audit WHERE id > {keep}"))
        await connection.execute(text("UPDATE audit SET actor = 'eve' WHERE id = 1"))
        query = "SELECT at, actor, action, subject, detail FROM audit ORDER BY id"
        for at, actor, action, subject, detail in (await connection.execute(text(query))).all():
            moment = at if isinstance(at, datetime) else datetime.fromisoformat(at)
            values = json.loads(detail) if isinstance(detail, str) else detail
            after = link(head, moment, actor, action, subject, values)
            update = text("UPDATE audit SET previous = :previous, hash = :hash WHERE id = :id")
            row = {"previous": head.hash, "hash": after.hash, "id": after.entries}
            await connection.execute(update, row)
            head = after
        await connection.execute(
            text("UPDATE audit_head SET entries = :entries, hash = :hash"), {"entries": head.entries, "hash": head.hash}
        )
    await engine.dispose()


@pytest.mark.parametrize("keep", [8, 5])
async def test_a_chain_that_is_made_anew_throughout_lacks_the_signature(log: Store, own_url: str, keep: int) -> None:
    await forge(own_url, keep)
    assert await broken(log) == Break(keep, "head changed")


async def test_what_is_written_after_a_forgery_does_not_cover_it_up(log: Store, own_url: str) -> None:
    await forge(own_url, 5)
    await log.audit("ana", "key.revoke", "key_1", {})
    assert await broken(log) == Break(6, "mended")
    mended = (await log.audit_log(2))[1]
    assert (mended.action, mended.detail["entries"], mended.detail["signature"]) == ("audit.mended", 5, "changed")


async def test_a_log_that_was_set_back_whole_is_found_out_by_a_head_that_was_kept(
    log: Store, own_url: str, tmp_path: Path
) -> None:
    engine = create_async_engine(own_url)
    async with engine.connect() as connection:
        row = (await connection.execute(text("SELECT entries, hash, key, mac FROM audit_head"))).one()
    await engine.dispose()
    kept = [await log.audit_head()]
    await log.audit("eve", "withheld.read", "chatcmpl-1", {})
    kept.append(await log.audit_head())
    old = f"entries = {row.entries}, hash = '{row.hash}', key = '{row.key}', mac = '{row.mac}'"
    await behind(own_url, "DELETE FROM audit WHERE id = 9", f"UPDATE audit_head SET {old}")
    assert [await broken(log, head) for head in kept] == [None, Break(9, "tail cut")]
    await log.audit("eve", "nothing", "", {})
    assert await broken(log) is None
    assert await broken(log, kept[1]) == Break(9, "other")


async def test_after_a_break_was_looked_into_the_rest_can_be_checked(log: Store, own_url: str) -> None:
    fifth = (await log.audit_log(4))[-1]
    await behind(own_url, "UPDATE audit SET actor = 'eve' WHERE id = 3")
    after = Head(fifth.place, fifth.hash)
    assert (await log.verify_audit(after=after)).broken is None
    assert (await log.verify_audit(after=Head(4, fifth.hash))).broken == Break(4, "other")
    await behind(own_url, "UPDATE audit SET actor = 'eve' WHERE id = 7")
    assert (await log.verify_audit(after=after)).broken == Break(7, "changed")


async def test_a_secret_that_is_old_still_signs_for_what_it_signed(log: Store, own_url: str, tmp_path: Path) -> None:
    await log.close()
    other = await Store.open(own_url, tmp_path / "spill", secrets=[b"new", *SECRETS])
    await other.audit("ana", "key.create", "key_9", {})
    assert await broken(other) is None
    await other.close()
    third = await Store.open(own_url, tmp_path / "spill", secrets=[b"third"])
    assert await broken(third) == Break(9, "head unsigned")
    await third.close()


# --- many writers


async def test_writers_of_several_gateways_leave_one_chain(own_url: str, tmp_path: Path) -> None:
    stores = [await Store.open(own_url, tmp_path / f"spill-{number}", secrets=SECRETS) for number in range(4)]

    async def write(number: int) -> None:
        with suppress(StoreDown):  # a lock that was held too long on a busy machine: then it was not written
            await stores[number % 4].audit(f"writer-{number}", "x", "y", {"n": number})
            return
        await write(number)

    await asyncio.gather(*map(write, range(20)))
    found = await stores[0].verify_audit()
    assert found.broken is None
    assert found.entries >= 20
    assert {entry.actor for entry in await stores[0].audit_log()} == {f"writer-{number}" for number in range(20)}
    for store in stores:
        await store.close()


async def test_a_log_is_checked_while_others_write_to_it(log: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.store.audit.PAGE", 3)

    async def write() -> None:
        for number in range(10):
            await log.audit("ana", "x", "y", {"n": number})

    writing = asyncio.create_task(write())
    while not writing.done():
        assert await broken(log) is None
    await writing
    assert (await log.verify_audit()).entries == 18


# --- what an earlier version wrote


async def test_entries_of_an_earlier_version_are_chained_and_the_gaps_closed(own_url: str, tmp_path: Path) -> None:
    await as_it_was(own_url, "0003")
    columns = "(id, at, actor, action, subject, detail)"
    for id in (2, 5, 6):
        values = f"({id}, '2026-01-02 03:04:05.678901+00:00', 'ana', 'x', 'key_{id}', '{{\"n\": {id}}}')"
        await behind(own_url, f"INSERT INTO audit {columns} VALUES {values}")
    store = await Store.open(own_url, tmp_path / "spill", secrets=SECRETS)
    found = await store.verify_audit()
    assert (found.entries, found.broken) == (3, None)
    told = [(entry.place, entry.subject) for entry in await store.audit_log()]
    assert told == [(3, "key_6"), (2, "key_5"), (1, "key_2")]
    await store.audit("ana", "x", "y", {})
    assert await broken(store) is None
    await store.close()


# --- what is audited


async def test_every_change_of_a_key_or_tenant_is_audited_with_it(log: Store) -> None:
    await log.put_tenant(Tenant("acme", "hr"), by="ana")
    await log.put_tenant(Tenant("acme", "hr"), by="ana")  # nothing changes
    await log.put_tenant(Tenant("acme", "base"), by="bob")
    key, _ = await log.add_key("acme", "operator", "laptop", KeyLimits(requests_per_minute=3), by="ana")
    await log.revoke_key(key.id, by="bob")
    await log.revoke_key(key.id, by="eve")
    told = [(entry.actor, entry.action, entry.subject) for entry in (await log.audit_log())[:4]]
    assert told == [
        ("bob", "key.revoke", key.id),
        ("ana", "key.create", key.id),
        ("bob", "tenant.put", "acme"),
        ("ana", "tenant.put", "acme"),
    ]
    created = (await log.audit_log())[1]
    assert created.detail == {"tenant": "acme", "scope": "operator", "requests_per_minute": 3}


# --- the commands


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEWEL_HOME", str(tmp_path))
    monkeypatch.setenv("NEWEL_CONFIG", str(tmp_path / "newel.toml"))
    monkeypatch.setenv("NEWEL_SECRET", SECRETS[0].decode())
    return tmp_path


def newel(*args: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(args)
    return int(ended.value.code or 0)


def test_a_command_says_which_entry_is_broken(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("acme", "umbrella", "initech"):
        newel("tenants", "put", name, "--policy", "base")
    capsys.readouterr()
    assert newel("audit", "head") == 0
    head = capsys.readouterr().out.strip()
    assert read_head(head).entries == 3
    assert newel("audit", "verify", "--head", head) == 0
    assert capsys.readouterr().out == "good: 3 entries\n"
    assert newel("audit", "list", "--json") == 0
    assert [entry["subject"] for entry in json.loads(capsys.readouterr().out)] == ["initech", "umbrella", "acme"]
    with closing(sqlite3.connect(home / "newel.db")) as connection, connection:
        connection.execute("UPDATE audit SET subject = 'hooli' WHERE id = 2")
    assert newel("audit", "verify") == 1
    captured = capsys.readouterr()
    assert captured.out == "good: 1 entries\n"
    assert "the audit log is broken: entry 2 is not what was written" in captured.err


def test_a_command_finds_a_cut_tail_by_the_head_that_was_kept(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newel("tenants", "put", "acme", "--policy", "base")
    with closing(sqlite3.connect(home / "newel.db")) as connection, connection:
        before = connection.execute("SELECT entries, hash, key, mac FROM audit_head").fetchone()
    newel("tenants", "put", "umbrella", "--policy", "base")
    capsys.readouterr()
    newel("audit", "head")
    head = capsys.readouterr().out.strip()
    with closing(sqlite3.connect(home / "newel.db")) as connection, connection:
        connection.execute("DELETE FROM audit WHERE id = 2")
        connection.execute("UPDATE audit_head SET entries = ?, hash = ?, key = ?, mac = ?", before)
    assert newel("audit", "verify") == 0
    assert newel("audit", "verify", "--head", head) == 1
    assert "entry 2 is not there any more" in capsys.readouterr().err


@pytest.mark.parametrize("head", ["", "abc", "3:abc", "x:" + "a" * 64, f"3:{'g' * 64}"])
def test_a_head_that_is_none_is_a_wrong_command_line(home: Path, head: str) -> None:
    assert newel("audit", "verify", "--head", head) == 2
