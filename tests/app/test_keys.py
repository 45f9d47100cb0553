"""API keys: what they open, what they may use, and until when."""

from __future__ import annotations

import hmac
import json
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import get_args

import pytest

from app.cli import main
from app.records import NO_LIMITS, KeyLimits, KeyScope, now
from app.store import Store, StoreDown
from app.store import database as databases
from app.store.access import read, written

ALL = KeyLimits(
    requests_per_minute=60,
    tokens_per_minute=10_000,
    tokens_per_day=1_000_000,
    cost_per_month=12.5,
    max_tokens=512,
    max_n=2,
    max_logprobs=5,
    allow=("top_k", "chat_template_kwargs"),
    priority="batch",
    block_mode="refusal",
    expires_at=now() + timedelta(days=1),
)


def test_every_limit_is_written_and_read_back() -> None:
    assert all(getattr(ALL, one.name) != getattr(NO_LIMITS, one.name) for one in fields(KeyLimits))
    assert read(json.loads(json.dumps(written(ALL)))) == ALL
    assert (written(NO_LIMITS), read({}), read(None)) == ({}, NO_LIMITS, NO_LIMITS)
    assert read({"max_n": 0, "of a later version": 1}) == KeyLimits(max_n=0)


async def test_a_key_keeps_its_limits(store: Store, tenant: str) -> None:
    key, secret = await store.add_key(tenant, "operator", "laptop", ALL, by="ana")
    found = await store.key(secret)
    assert found is not None
    assert found[0] == key
    assert found[0].limits == ALL
    assert key in await store.keys()
    plain, _ = await store.add_key(tenant)
    assert plain.limits == NO_LIMITS


SCOPES: tuple[KeyScope, ...] = get_args(KeyScope)


@pytest.mark.parametrize("scope", SCOPES)
async def test_a_scope_opens_its_own_door_and_an_admin_all(store: Store, tenant: str, scope: KeyScope) -> None:
    key, _ = await store.add_key(tenant, scope)
    opens = {needed for needed in SCOPES if key.may(needed)}
    assert opens == (set(SCOPES) if scope == "admin" else {scope})


async def test_a_key_that_has_expired_opens_nothing(store: Store, tenant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    until = now() + timedelta(hours=1)
    key, secret = await store.add_key(tenant, limits=KeyLimits(expires_at=until))
    assert await store.key(secret) is not None
    assert (key.good(until - timedelta(seconds=1)), key.good(until)) == (True, False)
    assert not replace(key, revoked_at=now()).good(now())
    monkeypatch.setattr("app.store.access.now", lambda: until)
    assert await store.key(secret) is None


async def test_a_key_that_is_remembered_expires_too(store: Store, tenant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    until = now() + timedelta(hours=1)
    _, secret = await store.add_key(tenant, limits=KeyLimits(expires_at=until))
    await store.key(secret)

    async def down(*args: object) -> None:
        raise StoreDown("away")

    monkeypatch.setattr(databases.Database, "read", down)
    assert await store.key(secret) is not None
    monkeypatch.setattr("app.store.store.now", lambda: until)
    assert await store.key(secret) is None


async def test_digests_are_compared_in_constant_time(
    store: Store, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, secret = await store.add_key(tenant)
    compared: list[tuple[str, str]] = []
    real = hmac.compare_digest

    def compare(one: str, other: str) -> bool:
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr("app.store.access.hmac.compare_digest", compare)
    assert await store.key(secret) is not None
    ((stored, given),) = compared
    assert stored == given
    assert key.hint not in stored


# --- the commands


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEWEL_HOME", str(tmp_path))
    monkeypatch.setenv("NEWEL_CONFIG", str(tmp_path / "newel.toml"))
    return tmp_path


def newel(*args: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(args)
    return int(ended.value.code or 0)


def test_a_command_sets_every_limit(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = "--scope reviewer --rpm 60 --tpm 10000 --tpd 1000000 --budget 12.5 --max-tokens 512 --max-n 2"
    more = "--max-logprobs 5 --allow top_k --allow chat_template_kwargs --priority batch --block-mode refusal"
    assert newel("keys", "create", *told.split(), *more.split(), "--expires", "2100-01-02T03:04:05") == 0
    secret = capsys.readouterr().out.strip()
    newel("keys", "list", "--json")
    (key,) = json.loads(capsys.readouterr().out)
    expires = "2100-01-02T03:04:05+00:00"
    assert key["limits"] == {**written(ALL), "expires_at": expires}
    assert (key["scope"], key["good"]) == ("reviewer", True)
    assert newel("keys", "show", key["id"]) == 0
    shown = capsys.readouterr().out
    assert "requests_per_minute" in shown and "reviewer" in shown
    assert newel("keys", "list") == 0
    listed = capsys.readouterr().out
    assert "max_n=2" in listed
    assert secret not in listed + shown
    newel("keys", "revoke", key["id"])
    newel("keys", "show", key["id"], "--json")
    assert json.loads(capsys.readouterr().out.partition("\n")[2])["good"] is False


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("create", "--expires", "2001-01-01"), 2),
        (("create", "--rpm", "0"), 2),
        (("create", "--scope", "root"), 2),
        (("create", "--block-mode", "silence"), 2),
        (("show", "key_1"), 1),
    ],
)
def test_a_wrong_command_makes_no_key(
    home: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], code: int
) -> None:
    assert newel("keys", *args) == code
    newel("keys", "list", "--json")
    assert json.loads(capsys.readouterr().out) == []
