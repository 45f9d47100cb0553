"""The database or the disk fails: each tenant is served as it chose, and nothing is lost without a word."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import openai
import pytest

from app.records import Turn, now
from app.store import SpillFull, Store, StoreDown
from app.store.database import Database
from app.store.spill import Spill
from tests.fakes import FakeUpstream, Script
from tests.gateway import SALARY, Gateway, running, spoken, until


async def disconnect(store: Store) -> None:
    """Closes the connections; one that was in use would be closed by nobody."""
    while store._db._running:
        await asyncio.wait(set(store._db._running))
    await store._db._engine.dispose()


@asynccontextmanager
async def broken_database(gateway: Gateway) -> AsyncIterator[None]:
    """The SQLite file is replaced by a folder, as the store finds out with its next connection."""
    store, home = gateway.service.store, gateway.service.settings.home
    file, away = home / "newel.db", home / "away"
    away.mkdir()
    await disconnect(store)
    parts = list(home.glob("newel.db*"))
    for part in parts:
        part.rename(away / part.name)
    file.mkdir()
    try:
        yield
    finally:
        await disconnect(store)
        file.rmdir()
        for part in parts:
            (away / part.name).rename(part)


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, kind: type, method: str, error: Exception) -> Iterator[None]:
    """This method raises this."""

    async def fail(*args: object, **more: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(kind, method, fail)
        yield


@contextmanager
def nowhere_to_write(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The database is down and the disk full."""
    down, full = StoreDown("the database cannot be used now"), SpillFull("no room")
    with failing(monkeypatch, Database, "write", down), failing(monkeypatch, Spill, "append", full):
        yield


@pytest.fixture
def doubtful(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that went well stands for no other: as when nothing was written for a while."""
    monkeypatch.setattr("app.store.writer.FRESH", 0.0)


async def back(gateway: Gateway, ids: list[str], tenant: str) -> list[Turn]:
    """These turns as the database holds them, once the spill was replayed by itself."""

    async def look() -> bool:
        return gateway.service.store.spilled == 0

    await until(look, 10)
    return [await gateway.turn(id, tenant) for id in ids]


# --- a tenant that wants no answer without a record


@pytest.mark.usefixtures("doubtful")
@pytest.mark.parametrize("stream", [False, True])
async def test_a_tenant_that_refuses_is_told_before_anything_is_said(
    gateway: Gateway, upstream: FakeUpstream, stream: bool
) -> None:
    await gateway.ask("Hello")
    asked = len(upstream.requests)
    async with broken_database(gateway):
        with pytest.raises(openai.InternalServerError) as caught:
            async with gateway.sdk() as client:
                await client.chat.completions.create(**gateway.body("Hello", stream=stream))
        assert (caught.value.status_code, caught.value.code) == (503, "store_down")
        assert caught.value.type == "server_error"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert (await gateway.json("GET", "/readyz"))[1]["missing"] == {"store": "down"}
        assert (await gateway.raw("GET", "/livez"))[0] == 200
        assert (await gateway.raw("GET", "/metrics"))[0] == 200
        assert gateway.metric("newel_store_errors_total") > 0
    assert len(upstream.requests) == asked
    assert (await gateway.ask("Hello")).choices[0].message.content == "Hello there."


async def test_everything_else_says_that_the_database_is_down(gateway: Gateway) -> None:
    reply = await gateway.ask("He harasses me")
    ticket = (reply.model_extra or {})["guardrails"]["escalation"]["id"]
    for key in (gateway.key, gateway.admin):
        await gateway.raw("GET", "/v1/models", key=key)
    async with broken_database(gateway):
        for method, path, body in [
            ("POST", "/v1/feedback", {"target": reply.id, "rating": "up"}),
            ("GET", f"/v1/tickets/{ticket}", None),
            ("GET", "/admin/tickets", None),
            ("POST", f"/admin/tickets/{ticket}/answer", {"answer": "x", "by": "y"}),
            ("GET", "/admin/policies", None),
            ("GET", "/admin/audit", None),
        ]:
            key = gateway.admin if path.startswith("/admin") else gateway.key
            status, headers, raw = await gateway.raw(method, path, key=key, json=body)
            assert (status, json.loads(raw)["error"]["code"]) == (503, "store_down"), path
            assert int(headers["retry-after"]) >= 1
        status, told = await gateway.json("GET", "/v1/models", key="nk-never-seen")
        assert (status, told["error"]["code"]) == (503, "store_down"), "who asks cannot be told"


# --- a tenant that wants to be answered


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tenant_that_is_answered_loses_no_turn(gateway: Gateway, upstream: FakeUpstream, stream: bool) -> None:
    key = await gateway.tenant("bold", when="answer")
    await gateway.ask("Hello", key=key)
    ids = []
    async with broken_database(gateway):
        for question, said in [("Hello", "Hello there."), ("The salary of Jane?", SALARY)]:
            body = gateway.body(question, stream=stream)
            status, headers, raw = await gateway.raw("POST", "/v1/chat/completions", key=key, json=body)
            given = spoken(raw) if stream else json.loads(raw)["choices"][0]["message"]["content"]
            assert (status, given) == (200, said)
            ids.append(headers["x-guardrails-id"])
            await gateway.service.store.flush()
        spilled = gateway.service.store.spilled
        assert spilled >= 2, "a turn is there once, or twice when it was written while it ran"
        _, _, page = await gateway.raw("GET", "/metrics")
        assert f"newel_turns_waiting {spilled}.0" in page.decode()
        assert f"newel_turns_spilled_total {spilled}.0" in page.decode()
    helped, refused = await back(gateway, ids, "bold")
    assert (helped.asked, helped.said, helped.error, helped.action) == ("Hello", "Hello there.", "", "allow")
    assert (refused.said, refused.action, refused.rule) == (SALARY, "refuse", "salary")
    assert gateway.metric("newel_turns_lost_total") == 0


async def test_a_ticket_of_a_spilled_turn_is_there_when_the_database_is(gateway: Gateway) -> None:
    key = await gateway.tenant("bold", when="answer")
    await gateway.ask("Hello", key=key)
    async with broken_database(gateway):
        reply = await gateway.ask("He harasses me", key=key)
    ticket = (reply.model_extra or {})["guardrails"]["escalation"]["id"]
    (turn,) = await back(gateway, [reply.id], "bold")
    assert turn.ticket and turn.ticket.id == ticket
    assert (await gateway.json("GET", f"/v1/tickets/{ticket}", key=key))[1]["status"] == "open"


async def test_turns_that_can_be_written_nowhere_wait_and_more_than_there_is_room_for_are_refused(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await gateway.tenant("bold", when="answer")
    monkeypatch.setattr(gateway.service.store.writer, "_most", 2)
    with nowhere_to_write(monkeypatch):
        ids = [(await gateway.ask("Hello", key=key)).id for _ in range(2)]
        with pytest.raises(openai.InternalServerError) as caught:
            await gateway.ask("Hello", key=key)
        assert (caught.value.status_code, caught.value.code) == (503, "store_down")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert gateway.metric("newel_turns_lost_total") == 0, "nothing was said, so nothing is lost"
    for turn in [await gateway.turn(id, "bold") for id in ids]:
        assert (turn.asked, turn.said) == ("Hello", "Hello there.")


async def test_a_really_full_disk(gateway: Gateway) -> None:
    key = await gateway.tenant("bold", when="answer")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        body = gateway.body("word " * 20_000)
        _, headers, _ = await gateway.raw("POST", "/v1/chat/completions", key=key, json=body)
        with pytest.raises(SpillFull):
            await gateway.service.store.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    turn = await gateway.turn(headers["x-guardrails-id"], "bold")
    assert turn.asked == ("word " * 20_000).strip() or turn.asked == "word " * 20_000
    assert (await gateway.ask("Hello", key=key)).choices[0].message.content == "Hello there."


# --- the database dies while a reply is written


@pytest.mark.parametrize("when", ["refuse", "answer"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_database_that_dies_in_mid_reply_costs_nothing(
    gateway: Gateway, upstream: FakeUpstream, stream: bool, when: Any
) -> None:
    key = await gateway.tenant("some", when=when)
    upstream.script = Script(["Hello. ", 1.0, "There."])
    asking = asyncio.create_task(
        gateway.raw("POST", "/v1/chat/completions", key=key, json=gateway.body("Hello", stream=stream))
    )
    await upstream.asked()
    async with broken_database(gateway):
        status, headers, raw = await asking
        assert status == 200 and b"There." in raw
    (turn,) = await back(gateway, [headers["x-guardrails-id"]], "some")
    assert (turn.said, turn.error) == ("Hello. There.", "")


async def test_a_ticket_that_can_be_recorded_nowhere_is_not_promised(
    gateway: Gateway, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await gateway.tenant("bold", when="answer")
    with nowhere_to_write(monkeypatch):
        for stream in (False, True):
            body = gateway.body("He harasses me", stream=stream)
            status, _, raw = await gateway.raw("POST", "/v1/chat/completions", key=key, json=body)
            assert (status, json.loads(raw)["error"]["code"]) == (503, "store_down")
            assert b"ESC-" not in raw
    assert gateway.metric("newel_turns_lost_total") == 0, "they are kept in memory until they can be written"


async def test_a_turn_that_a_dead_gateway_left_open_is_closed_by_the_next_one(tmp_path: Path) -> None:
    async with FakeUpstream() as upstream:
        async with running(tmp_path, upstream) as gateway:
            turn = await gateway.turn((await gateway.ask("Hello")).id)
            turn.id, turn.created_at, turn.total_ms = "chatcmpl-left", now() - timedelta(hours=1), None
            await gateway.service.store.begin(turn)
        async with running(tmp_path, upstream) as gateway:
            left = await gateway.service.store.turn("chatcmpl-left", "default")
            assert left and left.error == "interrupted"
