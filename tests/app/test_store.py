"""The store, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import os
import resource
import sqlite3
import stat
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import fields, replace
from datetime import datetime, timedelta
from pathlib import Path
from secrets import token_hex

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, event, text
from sqlalchemy.ext.asyncio import create_async_engine

from alignment.collect import lessons
from app.records import Tenant, Ticket, now
from app.store import Conflict, NotFound, Store, StoreDown, StoreError, migrate
from app.store import database as databases
from app.store.tables import metadata
from guardrails.types import Message, ToolMessage
from tests.app.turns import ASKED, RAW, SECRET, as_read, begun, escalated, finished, long_ago, opinion
from tests.postgres import Cluster


async def kept(store: Store, turn):
    await store.begin(turn)
    await store.finish(turn := finished(turn))
    return turn


# --- migrations


async def differences(url: str) -> list[object]:
    def compare(connection: Connection) -> list[object]:
        return compare_metadata(MigrationContext.configure(connection, opts={"compare_server_default": True}), metadata)

    engine = create_async_engine(url)
    async with engine.connect() as connection:
        found = await connection.run_sync(compare)
    await engine.dispose()
    return found


async def test_migrations_build_exactly_the_tables(store: Store, url: str) -> None:
    assert await differences(url) == []


async def test_the_comparison_sees_a_missing_index(store: Store, url: str) -> None:
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.execute(text("DROP INDEX ix_verdicts_rule"))
    assert [difference[0] for difference in await differences(url)] == ["add_index"]
    async with engine.begin() as connection:
        await connection.execute(text("CREATE INDEX ix_verdicts_rule ON verdicts (rule)"))
    await engine.dispose()


async def test_partial_indexes_are_partial_in_the_database_too(store: Store, url: str) -> None:
    table = "sqlite_master WHERE name" if url.startswith("sqlite") else "pg_indexes WHERE indexname"
    column = "sql" if url.startswith("sqlite") else "indexdef"
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        for name in ("ix_turns_open", "uq_feedback_current", "uq_policies_active"):
            query = text(f"SELECT {column} FROM {table} = '{name}'")
            assert " WHERE " in (await connection.execute(query)).scalar_one(), name
    await engine.dispose()


async def test_migrating_again_changes_nothing(store: Store, tenant: str, url: str) -> None:
    await migrate(url)
    assert await store.tenant(tenant) is not None


@pytest.fixture
def new_url(url: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """An empty database of the same kind as `url`, for this test alone."""
    if url.startswith("sqlite"):
        return f"sqlite+aiosqlite:///{tmp_path}/new/newel.db"
    return request.getfixturevalue("cluster").create_database(f"newel_{token_hex(4)}")


OPEN = """
import asyncio, sys
from pathlib import Path
from app.records import Tenant
from app.store import Store

async def main(url, spill, name):
    store = await Store.open(url, Path(spill))
    await store.put_tenant(Tenant(name, "hr"))
    await store.close()

asyncio.run(main(*sys.argv[1:]))
"""


async def test_processes_that_start_at_once_migrate_once(new_url: str, tmp_path: Path) -> None:
    async def start(name: str) -> tuple[int | None, str]:
        arguments = ("-W", "error", "-c", OPEN, new_url, str(tmp_path / "spill"), name)
        process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stderr=asyncio.subprocess.PIPE)
        _, errors = await process.communicate()
        return process.returncode, errors.decode()

    names = [f"gateway-{number}" for number in range(4)]
    assert await asyncio.gather(*map(start, names)) == [(0, "")] * 4
    store = await Store.open(new_url, tmp_path / "spill")
    assert [tenant.name for tenant in await store.tenants()] == names
    await store.close()


async def test_stores_that_open_at_once_in_one_process_do_not_disturb_each_other(new_url: str, tmp_path: Path) -> None:
    stores = await asyncio.gather(*(Store.open(new_url, tmp_path / "spill") for _ in range(4)))
    for store in stores:
        await store.ping()
        await store.close()


@pytest.mark.parametrize("url", ["sqlite+aiosqlite://", "sqlite:///:memory:", "mysql+aiomysql://host/name"])
async def test_urls_that_would_not_keep_turns_are_turned_down(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="database"):
        await Store.open(url, tmp_path)


async def test_an_sqlite_file_is_private_and_has_a_write_ahead_log(tmp_path: Path) -> None:
    path = tmp_path / "home" / "newel.db"
    store = await Store.open(f"sqlite:///{path}", tmp_path / "spill")
    await store.put_tenant(Tenant("acme", "hr"))
    files = [path, path.with_name("newel.db-wal"), path.with_name("newel.db-shm"), path.parent]
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600, 0o600, 0o600, 0o700]
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    await store.close()


# --- tenants and keys


async def test_a_tenant_is_made_and_changed(store: Store, tenant: str) -> None:
    assert await store.tenant(tenant) == Tenant(tenant, "hr", "answer")
    await store.put_tenant(Tenant(tenant, "finance", "refuse"))
    assert await store.tenant(tenant) == Tenant(tenant, "finance", "refuse")
    assert Tenant(tenant, "finance", "refuse") in await store.tenants()
    assert await store.tenant("nobody") is None


async def test_a_key_opens_until_it_is_revoked(store: Store, tenant: str) -> None:
    key, secret = await store.add_key(tenant, "admin", note="laptop")
    assert secret.startswith("nk-")
    assert len(secret) == 43
    assert key.hint == secret[:8]
    assert await store.key(secret) == (key, Tenant(tenant, "hr", "answer"))
    for wrong in ("", secret[:-1], secret + "x", secret.upper(), "nk-\ud800", "nk-\x00"):
        assert await store.key(wrong) is None
    await store.revoke_key(key.id)
    await store.revoke_key(key.id)
    assert await store.key(secret) is None
    (listed,) = [one for one in await store.keys() if one.id == key.id]
    assert listed.revoked_at is not None
    assert replace(listed, revoked_at=None) == key


async def test_a_key_needs_its_tenant_and_a_revocation_its_key(store: Store) -> None:
    with pytest.raises(NotFound, match="no tenant 'nobody'"):
        await store.add_key("nobody")
    with pytest.raises(NotFound, match="no key 'key_0'"):
        await store.revoke_key("key_0")


async def test_the_secret_of_a_key_is_stored_nowhere(store: Store, tenant: str, url: str) -> None:
    _, secret = await store.add_key(tenant)
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        rows = (await connection.execute(text("SELECT * FROM keys"))).all()
    await engine.dispose()
    assert secret not in repr(rows)
    assert hashlib.sha256(secret.encode()).hexdigest() in repr(rows)


# --- turns


async def test_a_turn_reads_back_as_the_client_saw_it(store: Store, tenant: str) -> None:
    turn = begun(tenant)
    await store.begin(turn)
    assert await store.turn(turn.id, tenant) == as_read(turn)
    turn = finished(turn)
    await store.finish(turn)
    assert await store.turn(turn.id, tenant) == as_read(turn)
    assert await store.turns(turn.conversation, tenant) == [as_read(turn)]


async def test_a_finish_whose_begin_was_lost_stores_the_whole_turn(store: Store, tenant: str) -> None:
    turn = escalated(begun(tenant))
    await store.finish(turn)
    assert await store.turn(turn.id, tenant) == as_read(turn)


async def test_finishing_twice_is_finishing_once(store: Store, tenant: str) -> None:
    turn = escalated(begun(tenant))
    await store.begin(turn)
    await store.finish(turn)
    await store.finish(replace(turn, said="something else"))
    assert await store.turn(turn.id, tenant) == as_read(turn)
    assert len(await store.tickets(tenant)) == 1


async def test_turns_of_a_conversation_come_in_their_order(store: Store, tenant: str) -> None:
    first = await kept(store, begun(tenant))
    later = replace(begun(tenant, conversation=first.conversation), created_at=first.created_at + timedelta(seconds=1))
    second = await kept(store, later)
    assert [turn.id for turn in await store.turns(first.conversation, tenant)] == [first.id, second.id]


async def test_a_resent_history_finds_its_conversation(store: Store, tenant: str) -> None:
    old = await kept(store, long_ago(begun(tenant)))
    new = begun(tenant)
    await store.begin(new)
    assert await store.conversation_after(tenant, old.tail_hash) == old.conversation
    await store.finish(finished(new, tail_hash=old.tail_hash))
    assert await store.conversation_after(tenant, old.tail_hash) == new.conversation
    assert await store.conversation_after(tenant, "unknown") is None
    assert await store.conversation_after(tenant, "") is None


async def test_turns_that_never_finished_are_interrupted_at_the_next_start(store: Store, tenant: str) -> None:
    lost, running = long_ago(begun(tenant)), begun(tenant)
    await store.begin(lost)
    await store.begin(running)
    done = await kept(store, long_ago(begun(tenant)))
    assert await store.open_turns(now() - timedelta(hours=1)) == [lost.id]
    assert await store.open_turns(now() - timedelta(hours=1)) == []
    errors = [(await store.turn(turn.id, tenant)).error for turn in (lost, running, done)]
    assert errors == ["interrupted", "", ""]
    lost = finished(lost)
    await store.finish(lost)  # its gateway was alive after all, or had spilled it
    assert await store.turn(lost.id, tenant) == as_read(lost)


async def test_texts_that_only_json_can_hold_are_stored(store: Store, tenant: str) -> None:
    hostile = "a\x00b \ud800 \udc00 c \U0001f600 d\u2028e"
    shown = "a\ufffdb \ufffd \ufffd c \U0001f600 d\u2028e"
    turn = begun(tenant, asked=hostile, conversation=f"c{hostile}{token_hex(4)}", history=(Message("user", hostile),))
    await store.begin(turn)
    await store.finish(finished(turn, said=hostile))
    (read,) = await store.turns(turn.conversation, tenant)
    assert (read.asked, read.said, read.history) == (shown, shown, (Message("user", shown),))


async def test_a_turn_of_an_unknown_tenant_is_a_conflict_and_leaves_nothing(store: Store) -> None:
    turn = begun("nobody")
    with pytest.raises(Conflict):
        await store.begin(turn)
    assert await store.turn(turn.id, "nobody") is None


async def test_errors_of_the_database_never_quote_what_people_wrote(store: Store, caplog) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(Conflict) as caught:
        await store.finish(finished(begun("nobody")))
    chain = [caught.value, caught.value.__cause__, caught.value.__context__]
    assert SECRET not in " ".join(map(str, chain[:2])) + caplog.text
    assert "Lisbon" not in " ".join(map(str, chain)) + caplog.text


async def test_a_cancelled_call_goes_to_its_end_and_holds_up_nobody(store: Store, tenant: str) -> None:
    turns = [begun(tenant) for _ in range(40)]
    async with asyncio.timeout(databases.BUSY_SECONDS - 0.5):  # SQLite used to stay locked for longer
        for number, turn in enumerate(turns):
            task = asyncio.create_task(store.finish(finished(turn)))
            await asyncio.sleep(0.0003 * (number + 1))
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await store.ping()
    for turn in turns:
        read = await store.turn(turn.id, tenant)
        assert read is not None
        assert (len(read.hits), read.finish_reason) == (3, "content_filter")


async def test_many_turns_at_once_are_all_kept(store: Store, tenant: str) -> None:
    conversation = f"busy-{token_hex(4)}"
    turns = await asyncio.gather(*(kept(store, begun(tenant, conversation=conversation)) for _ in range(40)))
    read = await store.turns(conversation, tenant)
    assert {turn.id for turn in read} == {turn.id for turn in turns}


# --- what was withheld


async def test_withheld_text_is_shown_to_somebody_for_a_reason_and_audited(store: Store, tenant: str) -> None:
    turn = await kept(store, begun(tenant))
    texts = await store.withheld(turn.id, tenant, actor="ana", reason="complaint 12")
    assert texts == {"asked": RAW, "said": turn.withheld_said}
    (entry, *_) = await store.audit_log(1)
    assert (entry.actor, entry.action, entry.subject) == ("ana", "withheld.read", turn.id)
    assert entry.detail == {"tenant": tenant, "reason": "complaint 12"}


@pytest.mark.parametrize(("actor", "reason"), [("", "complaint"), ("ana", ""), ("ana", "  ")])
async def test_withheld_text_is_not_shown_without_both(store: Store, tenant: str, actor: str, reason: str) -> None:
    turn = await kept(store, begun(tenant))
    with pytest.raises(ValueError, match="give both"):
        await store.withheld(turn.id, tenant, actor, reason)


async def test_no_other_reading_shows_withheld_text(store: Store, tenant: str) -> None:
    turn = escalated(begun(tenant))
    await store.finish(turn)
    await store.answer_ticket(turn.ticket.id, "Please call me.", "ana")
    await store.add_feedback(opinion(turn))
    shown = [
        await store.turn(turn.id, tenant),
        await store.turns(turn.conversation, tenant),
        await store.tickets(tenant),
        await store.deliveries(),
        await store.feedback(turn.id, tenant),
        await store.audit_log(),
        [repr(judged) async for judged in store.judged_turns(tenant)],
    ]
    assert ASKED in repr(shown)
    assert SECRET not in repr(shown)
    assert "ninety thousand" not in repr(shown)


async def test_no_table_holds_withheld_texts_in_clear(store: Store, tenant: str, url: str) -> None:
    turn = escalated(begun(tenant))
    await store.finish(turn)
    await store.answer_ticket(turn.ticket.id, "Please call me.", "ana")
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        holders = [
            table
            for table in metadata.tables
            if SECRET in repr((await connection.execute(text(f"SELECT * FROM {table}"))).all())
        ]
    await engine.dispose()
    assert holders == []


# --- tickets


async def ticket_of(store: Store, tenant: str, **changes) -> Ticket:
    turn = escalated(begun(tenant, **changes))
    await store.finish(turn)
    return turn.ticket


async def test_a_ticket_is_answered_once_and_its_answer_delivered_once(store: Store, tenant: str) -> None:
    ticket = await ticket_of(store, tenant)
    assert await store.ticket(ticket.id) == ticket
    assert await store.open_ticket_of(tenant, ticket.conversation) == ticket
    answered = await store.answer_ticket(ticket.id, "Your band is E4.", "ana")
    assert (answered.state, answered.answer, answered.answered_by) == ("answered", "Your band is E4.", "ana")
    with pytest.raises(Conflict, match=rf"{ticket.id} was answered by ana at {answered.answered_at:%Y-%m-%d %H:%M}"):
        await store.answer_ticket(ticket.id, "No, E5.", "bob")
    assert await store.open_ticket_of(tenant, ticket.conversation) is None
    assert await store.undelivered_answers(tenant, ticket.conversation) == [answered]
    await store.mark_delivered([ticket.id], "chatcmpl-next")
    first = (await store.ticket(ticket.id)).delivered_at
    await store.mark_delivered([ticket.id], "chatcmpl-later")
    assert first == (await store.ticket(ticket.id)).delivered_at is not None
    assert await store.undelivered_answers(tenant, ticket.conversation) == []


async def test_a_later_turn_points_at_the_ticket_that_is_open(store: Store, tenant: str) -> None:
    ticket = await ticket_of(store, tenant)
    later = finished(begun(tenant, conversation=ticket.conversation), ticket=ticket)
    await store.begin(later)
    await store.finish(later)
    assert await store.turn(later.id, tenant) == as_read(later)
    assert await store.tickets(tenant) == [ticket]
    assert len([one for one in await store.deliveries() if one.body["data"]["id"] == ticket.id]) == 1


async def test_of_two_answers_at_once_one_wins(store: Store, tenant: str) -> None:
    ticket = await ticket_of(store, tenant)
    answers = (store.answer_ticket(ticket.id, f"from {name}", name) for name in ("ana", "bob", "eve"))
    outcomes = await asyncio.gather(*answers, return_exceptions=True)
    (winner,) = [outcome for outcome in outcomes if isinstance(outcome, Ticket)]
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 2
    assert await store.ticket(ticket.id) == winner


async def test_a_closed_ticket_takes_no_answer_and_is_not_closed_again(store: Store, tenant: str) -> None:
    ticket = await ticket_of(store, tenant)
    assert (await store.close_ticket(ticket.id, "bob")).state == "closed"
    for late in (store.answer_ticket(ticket.id, "hello", "ana"), store.close_ticket(ticket.id, "ana")):
        with pytest.raises(Conflict, match="was closed by bob"):
            await late
    assert await store.undelivered_answers(tenant, ticket.conversation) == []


async def test_an_answer_is_delivered_though_the_ticket_is_closed_meanwhile(store: Store, tenant: str) -> None:
    ticket = await ticket_of(store, tenant)
    await store.answer_ticket(ticket.id, "hello", "ana")
    await store.close_ticket(ticket.id, "ana")
    assert [one.id for one in await store.undelivered_answers(tenant, ticket.conversation)] == [ticket.id]


async def test_unknown_tickets_are_not_found(store: Store) -> None:
    assert await store.ticket("ESC-NONE") is None
    for change in (store.answer_ticket("ESC-NONE", "a", "b"), store.close_ticket("ESC-NONE", "b")):
        with pytest.raises(NotFound, match="no ticket 'ESC-NONE'"):
            await change


async def test_an_empty_answer_is_no_answer(store: Store, tenant: str) -> None:
    ticket = await ticket_of(store, tenant)
    with pytest.raises(ValueError, match="is empty"):
        await store.answer_ticket(ticket.id, " \n", "ana")
    assert (await store.ticket(ticket.id)).state == "open"


async def test_tickets_are_listed_by_tenant_and_state_and_due_time(store: Store, tenant: str) -> None:
    later, sooner, answered = [await ticket_of(store, tenant, id=f"chatcmpl-{token_hex(8)}") for _ in range(3)]
    await store.answer_ticket(answered.id, "a", "ana")
    assert [one.id for one in await store.tickets(tenant, "open")] == [later.id, sooner.id]
    assert [one.id for one in await store.tickets(tenant, "answered")] == [answered.id]
    assert len(await store.tickets(tenant)) == 3
    assert {one.id for one in await store.tickets(state="open")} >= {later.id, sooner.id}


async def test_tickets_are_announced_in_the_transaction_that_makes_them(store: Store, tenant: str) -> None:
    ticket = await ticket_of(store, tenant)
    await store.answer_ticket(ticket.id, "Your band is E4.", "ana")
    mine = [one for one in await store.deliveries() if one.body["data"]["id"] == ticket.id]
    created, answered = sorted(mine, key=lambda one: one.kind, reverse=True)
    assert (created.kind, created.state, created.body["type"]) == ("ticket.created", "pending", "ticket.created")
    assert created.body["data"]["asked"] == ASKED
    assert "answer" not in created.body["data"]
    assert (answered.kind, answered.body["data"]["answer"]) == ("ticket.answered", "Your band is E4.")


# --- feedback


async def test_a_newer_opinion_takes_the_place_of_the_older_one(store: Store, tenant: str) -> None:
    turn = await kept(store, begun(tenant))
    up, down = opinion(turn), opinion(turn, value=-1.0)
    assert await store.add_feedback(up) == [(up, True)]
    assert await store.add_feedback(down) == [(down, True)]
    assert await store.feedback(turn.id, tenant) == [down]
    assert await store.feedback(turn.id, tenant, history=True) == [up, down]


async def test_the_same_opinion_again_is_the_first_one(store: Store, tenant: str) -> None:
    turn = await kept(store, begun(tenant))
    first = opinion(turn, kind="correction", value=None, text="Band E4.")
    await store.add_feedback(first)
    again = opinion(turn, kind="correction", value=None, text="Band E4.")
    assert await store.add_feedback(again) == [(first, False)]


@pytest.mark.parametrize(
    "changes", [{"source": "bob"}, {"kind": "comment"}, {"kind": "should_have_helped"}], ids=lambda one: str(one)
)
async def test_opinions_of_others_and_on_other_things_stand_beside_it(store: Store, tenant: str, changes) -> None:
    turn = await kept(store, begun(tenant))
    await store.add_feedback(opinion(turn))
    await store.add_feedback(opinion(turn, **changes))
    assert len(await store.feedback(turn.id, tenant)) == 2


async def test_an_idempotency_key_gives_the_first_answer_again(store: Store, tenant: str) -> None:
    turn = await kept(store, begun(tenant))
    first, second = opinion(turn), opinion(turn, kind="comment", value=None, text="Clear.")
    said = [first, second]
    assert await store.add_feedback(*said, idempotency_key="key-1") == [(first, True), (second, True)]
    again = [replace(one, id=f"{one.id}-again") for one in said]
    assert await store.add_feedback(*again, idempotency_key="key-1") == [(first, False), (second, False)]
    for other in ([opinion(turn, value=-1.0), second], [first], [second], [*said, opinion(turn, kind="correction")]):
        with pytest.raises(Conflict, match=f"used for feedback {first.id}, with another body"):
            await store.add_feedback(*other, idempotency_key="key-1")
    assert await store.feedback(turn.id, tenant, history=True) == [first, second]


async def test_an_idempotency_key_belongs_to_one_tenant(store: Store, tenant: str) -> None:
    other = f"other-{token_hex(4)}"
    await store.put_tenant(Tenant(other, "hr"))
    turn, foreign = await kept(store, begun(tenant)), await kept(store, begun(other))
    await store.add_feedback(opinion(turn), idempotency_key="key-2")
    assert (await store.add_feedback(opinion(foreign), idempotency_key="key-2"))[0][1]


async def test_two_clicks_at_once_leave_one_opinion(store: Store, tenant: str) -> None:
    turn = await kept(store, begun(tenant))
    clicks = [store.add_feedback(opinion(turn, value=value)) for value in (1.0, -1.0) for _ in range(2)]
    outcomes = await asyncio.gather(*clicks)
    assert len(await store.feedback(turn.id, tenant)) == 1
    eve = (store.add_feedback(opinion(turn, source="eve"), idempotency_key="key-3") for _ in range(4))
    keyed = await asyncio.gather(*eve)
    assert sum(created for ((_, created),) in keyed) == 1
    assert len({one.id for ((one, _),) in keyed}) == 1
    assert len(outcomes) == 4


async def test_feedback_on_what_is_not_there_is_not_found(store: Store, tenant: str) -> None:
    turn = await kept(store, begun(tenant))
    with pytest.raises(NotFound, match="no turn 'chatcmpl-none'"):
        await store.add_feedback(opinion(turn, turn="chatcmpl-none"))
    with pytest.raises(NotFound, match="no turn 'chatcmpl-none'"):
        await store.add_feedback(opinion(turn, kind="choice", other="chatcmpl-none", choice="this"))


# --- policies


async def test_a_policy_version_is_put_activated_and_rolled_back(store: Store) -> None:
    name = f"hr-{token_hex(4)}"
    first = await store.put_policy(name, 'name = "hr"', "aaa", "ana")
    assert (first.active, first.source, first.created_by) == (False, 'name = "hr"', "ana")
    assert await store.active_policy(name) is None
    assert (await store.activate_policy(name, "aaa", "ana")).active
    await store.put_policy(name, 'name = "hr" # 2', "bbb", "bob")
    assert (await store.active_policy(name)).version == "aaa"
    await store.activate_policy(name, "bbb", "bob")
    await store.activate_policy(name, "bbb", "bob")
    assert [(one.version, one.active) for one in await store.policies(name)] == [("bbb", True), ("aaa", False)]
    await store.activate_policy(name, "aaa", "eve")
    assert (await store.active_policy(name)).version == "aaa"
    log = [entry for entry in await store.audit_log() if entry.subject.startswith(name)]
    assert [(entry.actor, entry.action, entry.subject, entry.detail) for entry in reversed(log)] == [
        ("ana", "policy.put", f"{name}@aaa", {}),
        ("ana", "policy.activate", f"{name}@aaa", {"before": ""}),
        ("bob", "policy.put", f"{name}@bbb", {}),
        ("bob", "policy.activate", f"{name}@bbb", {"before": "aaa"}),
        ("eve", "policy.rollback", f"{name}@aaa", {"before": "bbb"}),
    ]


async def test_a_policy_version_that_is_put_again_stays_as_it_was(store: Store) -> None:
    name = f"hr-{token_hex(4)}"
    first = await store.put_policy(name, "one", "aaa", "ana")
    assert await store.put_policy(name, "one", "aaa", "bob") == first
    assert [entry.actor for entry in await store.audit_log() if entry.subject == f"{name}@aaa"] == ["ana"]


async def test_an_unknown_policy_version_is_not_activated(store: Store) -> None:
    with pytest.raises(NotFound, match="no version 'zzz' of policy 'hr-none'"):
        await store.activate_policy("hr-none", "zzz", "ana")


async def test_activations_at_once_leave_one_version_active(store: Store) -> None:
    name = f"hr-{token_hex(4)}"
    for version in ("aaa", "bbb", "ccc"):
        await store.put_policy(name, version, version, "ana")
    for versions in itertools.permutations(("aaa", "bbb", "ccc", "aaa")):
        await asyncio.gather(*(store.activate_policy(name, version, "ana") for version in versions))
    assert sum(one.active for one in await store.policies(name)) == 1


# --- tenants do not see each other


async def test_no_reading_shows_a_tenant_what_belongs_to_another(store: Store, tenant: str) -> None:
    other = f"other-{token_hex(4)}"
    await store.put_tenant(Tenant(other, "hr"))
    turn = escalated(begun(tenant))
    await store.finish(turn)
    await store.add_feedback(opinion(turn))
    await store.answer_ticket(turn.ticket.id, "hello", "ana")
    waiting = await ticket_of(store, tenant, conversation=turn.conversation)

    assert await store.turn(turn.id, other) is None
    assert await store.turns(turn.conversation, other) == []
    assert await store.conversation_after(other, turn.tail_hash) is None
    assert await store.tickets(other) == []
    assert await store.ticket(waiting.id, other) is None
    assert await store.ticket(waiting.id, tenant) == waiting
    assert await store.open_ticket_of(other, turn.conversation) is None
    assert await store.undelivered_answers(other, turn.conversation) == []
    assert await store.feedback(turn.id, other) == []
    assert [judged async for judged in store.judged_turns(other)] == []
    with pytest.raises(NotFound):
        await store.withheld(turn.id, other, "ana", "curious")
    with pytest.raises(NotFound):
        await store.add_feedback(replace(opinion(turn), tenant=other))
    mine = await kept(store, begun(other))
    with pytest.raises(NotFound):
        await store.add_feedback(opinion(mine, kind="choice", other=turn.id, choice="other"))


async def test_two_tenants_may_use_the_same_conversation_id(store: Store, tenant: str) -> None:
    other = f"other-{token_hex(4)}"
    await store.put_tenant(Tenant(other, "hr"))
    conversation = f"support-{token_hex(4)}"
    mine = await kept(store, begun(tenant, conversation=conversation))
    theirs = await kept(store, begun(other, conversation=conversation))
    assert [turn.id for turn in await store.turns(conversation, tenant)] == [mine.id]
    assert [turn.id for turn in await store.turns(conversation, other)] == [theirs.id]


async def test_a_turn_cannot_be_finished_by_another_tenant(store: Store, tenant: str) -> None:
    other = f"other-{token_hex(4)}"
    await store.put_tenant(Tenant(other, "hr"))
    turn = begun(tenant)
    await store.begin(turn)
    await store.finish(finished(replace(turn, tenant=other)))
    assert await store.turn(turn.id, tenant) == as_read(turn)
    assert await store.turn(turn.id, other) is None


# --- what an export reads


async def test_judged_turns_carry_opinions_answers_and_what_was_withheld(store: Store, tenant: str) -> None:
    rated, other = await kept(store, begun(tenant)), await kept(store, begun(tenant))
    await store.add_feedback(opinion(rated, value=1.0))
    await store.add_feedback(opinion(rated, value=-1.0))
    await store.add_feedback(opinion(rated, kind="choice", value=None, other=other.id, choice="other"))
    ticket = await ticket_of(store, tenant)
    await store.answer_ticket(ticket.id, "Your band is E4.", "ana")
    await kept(store, begun(tenant))
    first, second = [judged async for judged in store.judged_turns(tenant)]
    assert first.reply.turn == rated.id
    assert first.reply.prompt == (*rated.history, Message("user", ASKED))
    assert [(one.kind, one.value) for one in first.opinions] == [("rating", -1.0), ("choice", None)]
    assert first.opinions[1].other.turn == other.id
    assert [one.raw for one in sorted(first.withheld, key=lambda one: one.raw)] == [rated.withheld_said, RAW]
    assert (second.reply.turn, second.answer, second.action) == (ticket.turn, "Your band is E4.", "escalate")
    (entry, *_) = await store.audit_log(1)
    assert (entry.actor, entry.action, entry.subject) == ("export", "turns.export", tenant)


async def test_a_reply_that_brought_a_persons_answer_is_not_taken_for_the_models(store: Store, tenant: str) -> None:
    ticket = await ticket_of(store, tenant)
    await store.answer_ticket(ticket.id, "Your band is E4.", "ana")
    bringing = finished(begun(tenant, conversation=ticket.conversation), said="A person has answered: E4.\n\nHello!")
    await store.finish(bringing)
    await store.mark_delivered([ticket.id], bringing.id)
    await store.add_feedback(opinion(bringing, value=-1.0))
    said = {judged.reply.turn: judged.reply.said async for judged in store.judged_turns(tenant)}
    assert said == {ticket.turn: "A person will answer.", bringing.id: ""}


async def test_turns_with_tools_are_kept_whole_and_are_no_training_data(store: Store, tenant: str) -> None:
    made, result = ToolMessage("assistant", '{"q":"é"}', "c1", "find"), ToolMessage("tool", "4\x002", "c1", "")
    called = await kept(store, begun(tenant, reasoning="They ask.", calls=(made,)))
    history = (*called.history, Message("user", called.asked), made, result)
    answered = await kept(store, begun(tenant, history=history, asked=""))
    found = [await store.turn(turn.id, tenant) for turn in (called, answered)]
    assert [(turn.reasoning, turn.calls) for turn in found if turn] == [("They ask.", (made,)), ("", ())]
    assert found[1] and found[1].history == (*history[:-1], replace(result, content="4\ufffd2"))
    assert found[1].exchange == (*found[1].history[-1:], Message("assistant", answered.said))
    assert (found[1].question, found[1].results) == (called.asked, found[1].history[-1:])
    for turn in (called, answered):
        await store.add_feedback(opinion(turn, value=1.0))
    judged = [judged async for judged in store.judged_turns(tenant)]
    assert [(one.reply.prompt, one.reply.said) for one in judged] == [((), "")] * 2
    assert [list(lessons(one)) for one in judged] == [["empty"]] * 2


async def test_judged_turns_can_start_where_the_last_export_ended(store: Store, tenant: str) -> None:
    old, new = await kept(store, begun(tenant)), await kept(store, begun(tenant))
    await store.add_feedback(replace(opinion(old), created_at=now() - timedelta(days=2)))
    await store.add_feedback(opinion(new))
    since = now() - timedelta(days=1)
    assert [judged.reply.turn async for judged in store.judged_turns(tenant, since)] == [new.id]


async def test_judged_turns_come_page_by_page_without_gaps(store: Store, tenant: str, monkeypatch) -> None:
    monkeypatch.setattr("app.store.judged.PAGE", 3)
    moment = now()
    turns = [begun(tenant, created_at=moment) for _ in range(7)]  # all at one moment: the id breaks the tie
    for turn in turns:
        await kept(store, turn)
        await store.add_feedback(opinion(turn))
    read = [judged.reply.turn async for judged in store.judged_turns(tenant)]
    assert read == sorted(turn.id for turn in turns)


# --- when the database fails


async def test_a_ping_writes(store: Store) -> None:
    await store.ping()


@pytest.mark.postgres
async def test_a_server_that_stops_is_down_and_is_back_by_itself(cluster: Cluster, tmp_path: Path) -> None:
    store = await Store.open(cluster.create_database(f"newel_{token_hex(4)}"), tmp_path / "spill")
    await store.put_tenant(Tenant("acme", "hr", "answer"))
    _, secret = await store.add_key("acme")
    known = await store.key(secret)
    turn = begun("acme")
    await store.begin(turn)
    cluster.stop()
    try:
        for broken in (store.finish(finished(turn)), store.turn(turn.id, "acme"), store.ping(), store.key("nk-new")):
            with pytest.raises(StoreDown):
                await broken
        assert await store.key(secret) == known  # seen before: its tenant may be answered meanwhile
    finally:
        cluster.start()
    done = finished(turn)
    await store.finish(done)
    await store.ping()
    assert await store.turn(turn.id, "acme") == as_read(done)
    await store.close()


@pytest.mark.postgres
async def test_a_server_that_does_not_answer_is_down_in_time(cluster: Cluster, tmp_path: Path, monkeypatch) -> None:
    store = await Store.open(cluster.create_database(f"newel_{token_hex(4)}"), tmp_path / "spill")
    monkeypatch.setattr(databases, "PATIENCE", 0.5)
    cluster.freeze(True)
    try:
        started = asyncio.get_running_loop().time()
        with pytest.raises(StoreDown, match=r"within 0\.5 s"):
            await store.ping()
        assert asyncio.get_running_loop().time() - started < 15
    finally:
        cluster.freeze(False)
    monkeypatch.undo()
    await store.ping()
    await store.close()


async def test_a_key_that_was_revoked_is_not_remembered(store: Store, tenant: str, monkeypatch) -> None:
    key, secret = await store.add_key(tenant)
    await store.key(secret)
    await store.revoke_key(key.id)
    assert await store.key(secret) is None

    async def down(self, work):
        raise StoreDown("the database cannot be reached")

    monkeypatch.setattr(databases.Database, "read", down)
    with pytest.raises(StoreDown):
        await store.key(secret)


@pytest.fixture
async def lite(tmp_path: Path):
    """A store on an SQLite file of its own, to be broken."""
    store = await Store.open(f"sqlite+aiosqlite:///{tmp_path}/home/newel.db", tmp_path / "spill")
    await store.put_tenant(Tenant("acme", "hr", "answer"))
    yield store
    await store.close()


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file of this process may grow beyond `limit` bytes: what a full disk looks like to it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_a_full_disk_is_down_and_is_back_by_itself(lite: Store) -> None:
    turn = begun("acme", withheld_asked="x" * 200_000)
    with full_disk(100_000):
        with pytest.raises(StoreDown):
            await lite.begin(turn)
        assert await lite.turn(turn.id, "acme") is None
    await lite.begin(turn)
    assert await lite.turn(turn.id, "acme") == as_read(turn)


async def test_a_lock_that_another_process_holds_is_down_in_time(lite: Store, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(databases, "PATIENCE", 0.3)
    with closing(sqlite3.connect(tmp_path / "home" / "newel.db", isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreDown):
            await lite.ping()
        assert await lite.tenants() == [Tenant("acme", "hr", "answer")]  # a reader does not wait for a writer
        holder.execute("ROLLBACK")
    monkeypatch.undo()
    await lite.ping()


async def test_a_file_that_may_not_be_written_is_down(lite: Store, tmp_path: Path) -> None:
    def read_only(connection, record) -> None:  # as root every mode can be written: the pragma stands for it
        cursor = connection.cursor()
        cursor.execute("PRAGMA query_only=ON")
        cursor.close()

    engine = lite._db._engine.sync_engine
    event.listen(engine, "connect", read_only)
    await lite._db._engine.dispose()
    with pytest.raises(StoreDown, match="readonly"):
        await lite.ping()
    assert await lite.tenant("acme") is not None


async def test_a_broken_file_is_down(tmp_path: Path) -> None:
    (tmp_path / "newel.db").write_bytes(b"this is no database" * 1000)
    with pytest.raises(StoreDown, match="not a database"):
        await Store.open(f"sqlite+aiosqlite:///{tmp_path}/newel.db", tmp_path / "spill")


async def test_a_server_that_is_not_there_is_down(tmp_path: Path) -> None:
    with pytest.raises(StoreDown):
        await Store.open(f"postgresql+psycopg://newel@/newel?host={tmp_path}", tmp_path / "spill")


@pytest.mark.postgres
async def test_a_value_that_is_too_large_is_an_error_of_its_own(cluster: Cluster, tmp_path: Path) -> None:
    store = await Store.open(cluster.create_database(f"newel_{token_hex(4)}"), tmp_path / "spill")
    await store.put_tenant(Tenant("acme", "hr"))
    with pytest.raises(StoreError) as caught:  # an index of PostgreSQL holds at most 2,704 bytes
        await store.begin(begun("acme", conversation=os.urandom(8000).hex()))
    assert not isinstance(caught.value, StoreDown)
    await store.close()


def test_the_turn_has_no_field_that_the_store_forgets() -> None:
    """A field added to a record needs a column, or a word here."""
    from app.records import Turn

    elsewhere = {"withheld_asked", "withheld_said", "input", "output"}
    columns = {column.name for column in metadata.tables["turns"].c}
    assert {field.name for field in fields(Turn)} - elsewhere <= columns
    assert {field.name for field in fields(Ticket)} <= {column.name for column in metadata.tables["tickets"].c}
    assert isinstance(now(), datetime)
