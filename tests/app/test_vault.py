"""Values at rest: encrypted for one owner, gone when they expire or are forgotten, read by nobody else."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from app import vault as vaults
from app.cli import main
from app.records import Tenant, Turn, now
from app.service import pseudonym
from app.settings import Settings, VaultSettings
from app.store import Conflict, Owner, Sealed, Store, StoreDown
from app.vault import Cipher, Unreadable, Vaults, open_vaults, owner_of
from guardrails.types import Message
from guardrails.vault import Entry, Vault
from tests.app.turns import begun

OWNER = Owner("acme", "talk", "person")
EMAIL = Entry("[EMAIL_1]", "ann@example.com")
SECRET, OTHER = b"0" * 64, b"1" * 64
HOUR = 3600.0


def keeper(store: Store, *secrets: bytes, ttl: float = HOUR) -> Vaults:
    return Vaults(store, Cipher(secrets or (SECRET,)), ttl)


async def put(vaults: Vaults, turn: Turn, *values: str, label: str = "email") -> Vault:
    """The vault of a turn in which these values were found, kept."""
    vault = await vaults.open(turn, ())
    for value in values:
        vault.placeholder(label, value)
    assert await vaults.keep(turn, vault)
    return vault


async def seen(vaults: Vaults, turn: Turn) -> dict[str, str]:
    return dict((await vaults.open(turn, ())).values)


async def rows(url: str) -> list[Any]:
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        found = (await connection.execute(text("SELECT * FROM vault"))).all()
    await engine.dispose()
    return list(found)


# --- the cipher


def test_what_is_sealed_is_opened_and_never_looks_the_same_twice() -> None:
    cipher = Cipher([SECRET])
    one, two = cipher.seal(OWNER, EMAIL), cipher.seal(OWNER, EMAIL)
    assert cipher.open(OWNER, one) == cipher.open(OWNER, two) == EMAIL
    assert one.data != two.data
    assert len(one.data) == 12 + len(EMAIL.value) + 16
    assert EMAIL.value.encode() not in one.data


@pytest.mark.parametrize(
    "elsewhere",
    [replace(OWNER, tenant="other"), replace(OWNER, conversation="other"), replace(OWNER, name="other")],
)
def test_a_row_that_is_moved_to_another_owner_cannot_be_read(elsewhere: Owner) -> None:
    cipher = Cipher([SECRET])
    with pytest.raises(Unreadable):
        cipher.open(elsewhere, cipher.seal(OWNER, EMAIL))


@pytest.mark.parametrize(
    "changed",
    [
        lambda sealed: replace(sealed, placeholder="[EMAIL_2]"),
        lambda sealed: replace(sealed, data=bytes([sealed.data[0] ^ 1]) + sealed.data[1:]),
        lambda sealed: replace(sealed, data=sealed.data[:-1] + bytes([sealed.data[-1] ^ 1])),
        lambda sealed: replace(sealed, data=sealed.data[:-1]),
        lambda sealed: replace(sealed, data=b""),
        lambda sealed: replace(sealed, key="00000000"),
    ],
)
def test_a_row_that_was_changed_cannot_be_read(changed: Any) -> None:
    cipher = Cipher([SECRET])
    with pytest.raises(Unreadable, match="EMAIL") as caught:
        cipher.open(OWNER, changed(cipher.seal(OWNER, EMAIL)))
    assert EMAIL.value not in str(caught.value)


def test_owners_whose_names_run_together_alike_are_different() -> None:
    cipher = Cipher([SECRET])
    with pytest.raises(Unreadable):
        cipher.open(Owner("acme", "talkper", "son"), cipher.seal(OWNER, EMAIL))


def test_old_secrets_are_read_and_the_first_one_writes() -> None:
    old = Cipher([SECRET]).seal(OWNER, EMAIL)
    both = Cipher([OTHER, SECRET])
    assert both.open(OWNER, old) == EMAIL
    assert both.seal(OWNER, EMAIL).key != old.key
    with pytest.raises(Unreadable, match="old_secrets"):
        Cipher([OTHER]).open(OWNER, old)
    with pytest.raises(Unreadable):
        Cipher([OTHER]).open(OWNER, replace(old, key=Cipher([OTHER]).seal(OWNER, EMAIL).key))


# --- one conversation over its turns


async def test_a_person_finds_the_values_again_in_the_next_turn(store: Store, tenant: str) -> None:
    vaults, turn = keeper(store), begun(tenant)
    await put(vaults, turn, "a@x.org", "b@x.org")
    later = begun(tenant, conversation=turn.conversation)
    vault = await put(vaults, later, "B@x.org", "c@x.org")
    assert vault.values == {"[EMAIL_1]": "a@x.org", "[EMAIL_2]": "b@x.org", "[EMAIL_3]": "c@x.org"}
    assert await seen(vaults, turn) == vault.values


async def test_a_restart_with_a_new_secret_still_reads_what_the_old_one_wrote(store: Store, tenant: str) -> None:
    turn = begun(tenant)
    await put(keeper(store), turn, "a@x.org")
    vault = await put(keeper(store, OTHER, SECRET), turn, "b@x.org")
    assert vault.values == {"[EMAIL_1]": "a@x.org", "[EMAIL_2]": "b@x.org"}


async def test_what_cannot_be_read_is_never_replaced_and_said_in_the_log(store: Store, tenant: str, caplog) -> None:
    turn = begun(tenant)
    await put(keeper(store), turn, "a@x.org")
    with caplog.at_level(logging.WARNING, "newel"):
        vault = await put(keeper(store, OTHER), turn, "b@x.org")
    assert vault.values == {"[EMAIL_2]": "b@x.org"}
    assert [record.getMessage() for record in caplog.records] == ["vault_unreadable"]
    assert "x.org" not in caplog.text


async def test_turns_at_once_do_not_give_one_placeholder_to_two_values(store: Store, tenant: str) -> None:
    vaults, turn = keeper(store), begun(tenant)

    async def one(value: str) -> str:
        while True:
            vault = await vaults.open(turn, ())
            given = vault.placeholder("email", value)
            await asyncio.sleep(0)
            if await vaults.keep(turn, vault):
                return given

    given = await asyncio.gather(*(one(f"{n}@x.org") for n in range(8)))
    assert await seen(vaults, turn) == {given[n]: f"{n}@x.org" for n in range(8)}


async def test_a_lost_race_keeps_nothing(store: Store, tenant: str) -> None:
    vaults, turn = keeper(store), begun(tenant)
    late = await vaults.open(turn, ())
    await put(vaults, turn, "a@x.org")
    late.placeholder("card", "4111111111111111")
    late.placeholder("email", "b@x.org")
    assert not await vaults.keep(turn, late)
    assert await seen(vaults, turn) == {"[EMAIL_1]": "a@x.org"}


async def test_a_literal_of_the_user_is_not_given_out_and_one_of_ours_is(store: Store, tenant: str) -> None:
    messages = [
        Message("user", "[EMAIL_1]?"),
        Message("assistant", "https://x.org/[EMAIL_2]"),
        Message("tool", "[EMAIL_3]"),
    ]
    vault = await keeper(store).open(begun(tenant), messages)
    assert [vault.placeholder("email", f"{n}@x.org") for n in range(2)] == ["[EMAIL_2]", "[EMAIL_4]"]


# --- as an attacker would


@pytest.mark.parametrize(
    "attack",
    [
        {"subject": "somebody-else"},
        {"subject": ""},
        {"conversation": "another"},
        {"subject": "", "conversation": "another"},
    ],
)
async def test_nobody_else_finds_the_values_nor_learns_their_numbers(
    store: Store, tenant: str, attack: dict[str, str]
) -> None:
    vaults, turn = keeper(store), begun(tenant)
    await put(vaults, turn, "a@x.org")
    theirs = begun(tenant, **({"conversation": turn.conversation} | attack))
    assert await seen(vaults, theirs) == {}
    assert (await put(vaults, theirs, "a@x.org")).new[
        0
    ].placeholder == "[EMAIL_1]"  # no oracle: as if nothing was there
    assert await seen(vaults, turn) == {"[EMAIL_1]": "a@x.org"}


async def test_another_tenant_finds_nothing_under_the_same_names(store: Store, tenant: str) -> None:
    vaults, turn = keeper(store), begun(tenant)
    await put(vaults, turn, "a@x.org")
    other = f"other-{token_hex(4)}"
    await store.put_tenant(Tenant(other, "hr"))
    assert await seen(vaults, replace(turn, tenant=other)) == {}


async def test_who_is_not_named_finds_nothing_of_an_earlier_turn(store: Store, tenant: str) -> None:
    vaults, turn = keeper(store), begun(tenant, subject="")
    await put(vaults, turn, "a@x.org")
    assert await seen(vaults, begun(tenant, subject="", conversation=turn.conversation)) == {}
    pretending = begun(tenant, subject=f"turn:{turn.id}", conversation=turn.conversation)
    assert owner_of(pretending) == owner_of(turn)  # which no client can send: `subject` is an HMAC
    assert await seen(vaults, turn) == {}


async def test_a_row_that_was_copied_to_ones_own_conversation_is_of_no_use(store: Store, tenant: str, url: str) -> None:
    vaults, turn = keeper(store), begun(tenant)
    await put(vaults, turn, "a@x.org")
    mine = begun(tenant, subject="mine")
    columns = "placeholder, key, data, expires_at FROM vault WHERE conversation = :its"
    copy = f"INSERT INTO vault SELECT tenant, :mine, 'mine', {columns}"
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.execute(text(copy), {"mine": mine.conversation, "its": turn.conversation})
    await engine.dispose()
    assert await seen(vaults, mine) == {}


# --- the end of a value


async def test_values_expire_and_are_not_read_before_they_are_deleted(store: Store, tenant: str, url: str) -> None:
    turn = begun(tenant)
    await put(keeper(store, ttl=-1), turn, "a@x.org")
    other = begun(tenant)
    await put(keeper(store), other, "b@x.org")
    assert await seen(keeper(store), turn) == {}
    assert turn.conversation in repr(await rows(url))
    await keeper(store).sweep()
    assert turn.conversation not in repr(await rows(url))
    assert await seen(keeper(store), other) == {"[EMAIL_1]": "b@x.org"}


async def test_each_turn_keeps_the_values_for_longer(store: Store, tenant: str, monkeypatch) -> None:
    vaults, turn = keeper(store), begun(tenant)
    await put(vaults, turn, "a@x.org")
    for hours in (0.9, 1.8):
        _at(monkeypatch, hours)
        assert (await put(vaults, turn)).values == {"[EMAIL_1]": "a@x.org"}
    _at(monkeypatch, 2.9)
    assert await seen(vaults, turn) == {}
    assert (await put(vaults, turn, "c@x.org")).values == {"[EMAIL_1]": "c@x.org"}


def _at(monkeypatch: pytest.MonkeyPatch, hours: float) -> None:
    later = now() + timedelta(hours=hours)
    monkeypatch.setattr("app.store.vault.now", lambda: later)
    monkeypatch.setattr("app.vault.now", lambda: later)


@pytest.mark.parametrize(
    ("what", "left"), [({}, 0), ({"conversation": "one"}, 2), ({"owner": "ann"}, 1), ({"conversation": "none"}, 3)]
)
async def test_values_are_forgotten_on_request_and_that_is_audited(
    store: Store, tenant: str, what: dict[str, str], left: int
) -> None:
    vaults = keeper(store)
    turns = [
        begun(tenant, conversation=conversation, subject=subject)
        for conversation, subject in (("one", "ann"), ("two", "ann"), ("two", "bob"))
    ]
    other = f"other-{token_hex(4)}"
    for turn in (*turns, begun(other, conversation="one", subject="ann")):
        await put(vaults, turn, "a@x.org")
    assert await store.forget_values(tenant, "dana", **what) == 3 - left
    assert [bool(await seen(vaults, turn)) for turn in turns].count(True) == left
    assert await seen(vaults, begun(other, conversation="one", subject="ann"))
    (entry, *_) = await store.audit_log(1)
    assert (entry.actor, entry.action, entry.subject, entry.detail["values"]) == (
        "dana",
        "vault.forget",
        tenant,
        3 - left,
    )


async def test_a_database_that_is_down_says_so(store: Store, tenant: str, monkeypatch) -> None:
    async def down(self, work):
        raise StoreDown("the database cannot be reached")

    vaults, turn = keeper(store), begun(tenant)
    vault = await vaults.open(turn, ())
    vault.placeholder("email", "a@x.org")
    monkeypatch.setattr("app.store.database.Database.read", down)
    monkeypatch.setattr("app.store.database.Database.write", down)
    with pytest.raises(StoreDown):
        await vaults.open(turn, ())
    with pytest.raises(StoreDown):
        await vaults.keep(turn, vault)


# --- people who have to know


@pytest.mark.parametrize("subject", ["person", ""])
async def test_a_person_sees_the_values_of_a_turn_for_a_reason(store: Store, tenant: str, subject: str) -> None:
    vaults, turn = keeper(store), begun(tenant, subject=subject, asked="Call [PHONE_1]", history=())
    await put(vaults, turn, "a@x.org")
    await put(vaults, turn, "+1 415 555 2671", label="phone")
    assert await vaults.reveal(turn, "dana", "ticket 12") == {"[PHONE_1]": "+1 415 555 2671"}
    (entry, *_) = await store.audit_log(1)
    assert (entry.actor, entry.action, entry.subject) == ("dana", "vault.read", turn.id)
    assert entry.detail == {"tenant": tenant, "reason": "ticket 12"}
    with pytest.raises(ValueError, match="give both"):
        await vaults.reveal(turn, "dana", " ")


# --- at rest


async def test_no_value_is_in_the_database_in_clear(store: Store, tenant: str, url: str, tmp_path: Path) -> None:
    turn = begun(tenant)
    await put(keeper(store), turn, "xylophone7@example.com")
    assert "xylophone7" not in repr(await rows(url))
    assert turn.conversation in repr(await rows(url))


async def test_what_is_deleted_is_overwritten_in_an_sqlite_file(tmp_path: Path) -> None:
    path = tmp_path / "home" / "newel.db"
    store = await Store.open(f"sqlite:///{path}", tmp_path / "spill")
    turn = begun("acme")
    owner, data = owner_of(turn), token_hex(200).encode()
    await store.keep_values(owner, [Sealed("[X_1]", "k", data)], now())
    await store.delete_expired_values()
    await store.close()  # the last connection puts what is in the write-ahead log into the file
    assert not path.with_name("newel.db-wal").exists()
    assert data not in path.read_bytes()


async def test_a_placeholder_that_is_taken_is_a_conflict(store: Store, tenant: str) -> None:
    owner = owner_of(begun(tenant))
    await store.keep_values(owner, [Sealed("[X_1]", "k", b"1")], now() + timedelta(hours=1))
    with pytest.raises(Conflict):
        await store.keep_values(owner, [Sealed("[X_1]", "k", b"2")], now() + timedelta(hours=1))
    assert [one.data for one in await store.sealed_values(owner)] == [b"1"]


# --- the commands


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEWEL_HOME", str(tmp_path))
    monkeypatch.setenv("NEWEL_CONFIG", str(tmp_path / "newel.toml"))
    monkeypatch.setenv("NEWEL_SECRET", SECRET.decode())
    return tmp_path


def newel(*args: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(args)
    return int(ended.value.code or 0)


async def with_values(home: Path) -> list[Turn]:
    """Three turns of two people in two conversations, each with a value."""
    store = await Store.open(f"sqlite:///{home}/newel.db", home / "spill")
    await store.put_tenant(Tenant("acme", "hr"))
    turns = []
    for conversation, person in (("one", "ann"), ("two", "ann"), ("two", "bob")):
        turn = begun(
            "acme", conversation=conversation, subject=pseudonym(SECRET, "acme", person), asked="I am [EMAIL_1]"
        )
        await put(keeper(store), turn, f"{person}@x.org")
        await store.begin(turn)
        turns.append(turn)
    await store.close()
    return turns


def test_a_command_shows_the_values_of_a_turn_for_a_reason(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turn, *_ = asyncio.run(with_values(home))
    assert newel("vault", "show", turn.id, "--reason", "ticket 12", "--json") == 0
    assert capsys.readouterr().out.split() == ["{", '"[EMAIL_1]":', '"ann@x.org"', "}"]
    assert newel("vault", "show", turn.id, "--reason", "ticket 12") == 0
    assert "ann@x.org" in capsys.readouterr().out
    assert (newel("vault", "show", turn.id), newel("vault", "show", turn.id, "--reason", " ")) == (2, 2)
    assert "ann@x.org" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "deleted"),
    [
        (("--all",), 3),
        (("--conversation", "two"), 2),
        (("--user", "ann"), 2),
        (("--user", "ann", "--conversation", "two"), 1),
        (("--user", "eve"), 0),
    ],
)
def test_a_command_deletes_what_has_to_be_forgotten(
    home: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], deleted: int
) -> None:
    asyncio.run(with_values(home))
    assert newel("vault", "forget", "acme", *args) == 0
    assert capsys.readouterr().out == f"deleted: {deleted}\n"


@pytest.mark.parametrize("args", [(), ("--all", "--user", "ann")])
def test_a_command_that_does_not_say_whose_values_deletes_none(
    home: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...]
) -> None:
    asyncio.run(with_values(home))
    assert newel("vault", "forget", "acme", *args) == 2
    assert newel("vault", "forget", "acme", "--all") == 0
    assert capsys.readouterr().out == "deleted: 3\n"


# --- the settings


async def test_the_keys_come_from_the_service_s_secret_unless_the_vault_has_one(store: Store, tenant: str) -> None:
    turn = begun(tenant)
    plain, own = Settings(), Settings(vault=VaultSettings(secret=SecretStr("a"), old_secrets=[SecretStr("b")], ttl=5))
    await put(open_vaults(store, plain, SECRET), turn, "a@x.org")
    await put(keeper(store, b"b"), turn, "b@x.org")
    await put(open_vaults(store, own, SECRET), turn, "c@x.org")
    everything = {"[EMAIL_1]": "a@x.org", "[EMAIL_2]": "b@x.org", "[EMAIL_3]": "c@x.org"}
    assert await seen(open_vaults(store, own, SECRET), turn) == everything
    assert (await seen(keeper(store, b"a"), turn)) == {"[EMAIL_3]": "c@x.org"}
    assert vaults.SWEEP < VaultSettings().ttl == 24 * HOUR
