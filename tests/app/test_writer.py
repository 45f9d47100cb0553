"""Turns that are logged: written in batches, seen at once, safe when the database is away, each message kept once."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiosqlite
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    DateTime,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    delete,
    insert,
    text,
    update,
)

from app.records import Tenant, Turn, new_id, now, row_id
from app.store import Conflict, NotFound, Replayed, SpillFull, Store, StoreDown, tables
from app.store import store as stores
from app.store import writer as writers
from app.store.database import Database, Quick, connect, database_url
from app.store.history import Kept, Records, encoded, kept, marks, said_in
from app.store.lite import LiteConnection
from app.store.spill import Spill, decode
from app.store.turns import Draft
from guardrails.types import Action, Message, ToolMessage, Verdict
from tests.app.earlier import as_it_was
from tests.app.turns import RAW, as_read, begun, escalated, finished, opinion

SYSTEM = Message("system", "You answer.")


@pytest.fixture
async def other(store: Store, url: str, tmp_path: Path) -> AsyncIterator[Store]:
    """Another process's store on the same database, as far as it matters."""
    opened = await Store.open(url, tmp_path / "spill-of-the-other", secrets=[b"s"])
    yield opened
    await opened.close()


@pytest.fixture
def transactions(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was written, a word for each transaction, by any store."""
    seen: list[str] = []
    write = Database.write

    async def counted(self: Database, work: object) -> object:
        seen.append("write" if isinstance(work, Quick) else getattr(work, "__qualname__", "?"))
        return await write(self, work)  # type: ignore[arg-type]

    monkeypatch.setattr(Database, "write", counted)
    return seen


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the database is down, a list with one value to be changed."""
    down = [False]
    write = Database.write

    async def perhaps(self: Database, work: object) -> object:
        if down[0]:
            raise StoreDown("away")
        return await write(self, work)  # type: ignore[arg-type]

    monkeypatch.setattr(Database, "write", perhaps)
    return down


@pytest.fixture
def no_disk(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the disk is full, a list with one value to be changed."""
    full = [False]
    write = Spill._append

    def perhaps(self: Spill, lines: bytes) -> None:
        if full[0]:
            raise OSError(28, "No space left on device")
        write(self, lines)

    monkeypatch.setattr(Spill, "_append", perhaps)
    return full


async def when(look: object, timeout: float = 10) -> None:
    """Returns when `look()` is true."""
    async with asyncio.timeout(timeout):
        while not look():  # type: ignore[operator]
            await asyncio.sleep(0.005)


# --- when turns are written


async def test_a_turn_that_ends_before_the_batch_is_written_once_and_whole(
    store: Store, tenant: str, transactions: list[str]
) -> None:
    turn = begun(tenant)
    store.log(turn)
    for name, value in ((one, getattr(escalated(turn), one)) for one in turn.__slots__):
        setattr(turn, name, value)
    store.log(turn)
    await store.flush()
    assert transactions == ["write"]
    assert await store.turn(turn.id, tenant) == as_read(turn)
    assert await store.tickets(tenant) == [turn.ticket]
    texts = {"asked": RAW, "said": turn.withheld_said}
    assert await store.withheld(turn.id, tenant, "ana", "test") == texts
    assert f"msg_{turn.ticket.id}_created" in [one.id for one in await store.deliveries()]


async def test_a_turn_that_runs_is_on_record_as_open_and_completed_at_its_end(store: Store, tenant: str) -> None:
    turn = begun(tenant)
    store.log(turn)
    await store.flush()
    async with asyncio.timeout(5):
        assert not (await store.turn(turn.id, tenant)).ended
    assert await store.turn(turn.id, tenant) == as_read(turn)
    done = finished(turn)
    store.log(done)
    await store.flush()
    assert await store.turn(turn.id, tenant) == as_read(done)


async def test_a_turn_that_ends_between_the_take_and_the_draft_of_its_batch_is_written_once(
    store: Store, tenant: str, transactions: list[str], monkeypatch
) -> None:
    turn, beside = begun(tenant), finished(begun(tenant))
    drafts = writers.TurnWriter._drafts

    async def ended_meanwhile(self: writers.TurnWriter, some: Sequence[Turn], linked: bool) -> list[Draft]:
        if not turn.ended:
            done = finished(turn)
            for name in turn.__slots__:
                setattr(turn, name, getattr(done, name))
            store.log(turn)
        return await drafts(self, some, linked)

    monkeypatch.setattr(writers.TurnWriter, "_drafts", ended_meanwhile)
    for one in (turn, beside):
        store.log(one)
    await store.flush()
    assert store.writer.waiting == 0
    await store.flush()
    assert transactions == ["write"], "one transaction for both, and no second one for the turn that was logged twice"
    assert await store.turn(turn.id, tenant) == as_read(turn)


async def test_a_batch_with_a_turn_that_was_written_before_is_halved_until_that_one_is_alone(
    store: Store, tenant: str, transactions: list[str]
) -> None:
    known, fresh = finished(begun(tenant)), [finished(begun(tenant)) for _ in range(63)]
    await store.keep(known)
    del transactions[:]
    for one in (*fresh[:20], known, *fresh[20:]):
        store.log(one)
    await store.flush()
    assert len(transactions) == 13, "64, and two halves of each of 64, 32, 16, 8, 4 and 2: one by one it would be 65"
    assert (store.writer.written, store.writer.waiting) == (64, 0)
    for turn in (known, *fresh[::9]):
        assert await store.turn(turn.id, tenant) == as_read(turn)


async def test_what_is_logged_is_written_by_itself_after_the_delay(store: Store, tenant: str, other: Store) -> None:
    turn = finished(begun(tenant))
    store.log(turn)
    assert store.writer.waiting == 1
    await when(lambda: store.writer.waiting == 0)
    assert await other.turn(turn.id, tenant) == as_read(turn)


async def test_a_full_batch_does_not_wait_for_the_delay(store: Store, tenant: str) -> None:
    store.writer.delay = 60.0
    for _ in range(writers.BATCH):
        store.log(finished(begun(tenant)))
    await when(lambda: store.writer.written == writers.BATCH)


async def test_turns_at_once_share_transactions(store: Store, tenant: str, transactions: list[str]) -> None:
    turns = [finished(begun(tenant)) for _ in range(200)]
    await asyncio.gather(*map(store.keep, turns))
    assert len(transactions) <= 2
    assert (store.writer.written, store.writer.waiting) == (200, 0)
    for turn in turns[::50]:
        assert await store.turn(turn.id, tenant) == as_read(turn)


async def test_a_batch_is_one_trip_to_the_thread_of_sqlite(store: Store, url: str, tenant: str, monkeypatch) -> None:
    if not url.startswith("sqlite"):
        pytest.skip("PostgreSQL has no such thread")
    trips: list[str] = []
    execute = aiosqlite.Connection._execute

    async def counted(self: LiteConnection, function: Any, *given: Any) -> Any:
        trips.append(getattr(function, "__name__", "?"))
        return await execute(self, function, *given)

    (first,) = await talk(store, tenant, [()])
    monkeypatch.setattr(LiteConnection, "_execute", counted)
    more = {"conversation": first.conversation, "parent": first.id, "history": exchanges(0, 1)}
    turns = [finished(begun(tenant)), begun(tenant), finished(begun(tenant, **more))]
    for turn in turns:
        store.log(turn)
    await store.flush()
    assert len(trips) == 1, "also with hits, texts that were withheld, and a turn that another one continues"
    monkeypatch.undo()
    assert await linked(store, turns) == [None, None, True]
    for turn in turns:
        assert await store.turn(turn.id, tenant) == as_read(turn)
        assert (await store.withheld(turn.id, tenant, "ana", "test"))["asked"] == RAW


async def test_more_than_a_batch_is_written_in_several(store: Store, tenant: str, monkeypatch) -> None:
    monkeypatch.setattr(store.writer, "_batch", 7)
    for _ in range(20):
        store.log(finished(begun(tenant)))
    await store.flush()
    assert (store.writer.batches, store.writer.written) == (3, 20)


async def test_long_texts_make_a_batch_shorter(store: Store, tenant: str, monkeypatch) -> None:
    monkeypatch.setattr(writers, "BATCH_CHARACTERS", 1000)
    for _ in range(4):
        store.log(finished(begun(tenant, asked="x" * 600)))
    await store.flush()
    assert store.writer.batches == 2


async def test_a_caller_that_is_cancelled_stops_no_batch(store: Store, tenant: str) -> None:
    turn = finished(begun(tenant))
    task = asyncio.create_task(store.keep(turn))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await store.turn(turn.id, tenant) == as_read(turn)


async def test_closing_writes_what_is_queued(store: Store, url: str, tenant: str, tmp_path: Path) -> None:
    closing_one = await Store.open(url, tmp_path / "closing", delay=60)
    turn = finished(begun(tenant))
    closing_one.log(turn)
    await closing_one.close()
    assert await store.turn(turn.id, tenant) == as_read(turn)


async def test_a_flush_of_nothing_is_nothing(store: Store, transactions: list[str]) -> None:
    await store.flush()
    assert transactions == []


async def test_a_turn_is_written_as_it_stands_with_all_its_fields(store: Store, tenant: str) -> None:
    more = {"release": "r7", "surface": "messages", "priority": "batch", "trace": "0af7", "choice": 2}
    turn = finished(begun(tenant, cached_tokens=17, parent="chatcmpl-none", **more))
    bare = finished(begun(tenant, surface="", priority="", input=None), output=None)
    for one in (turn, bare):
        store.log(one)
    for one in (turn, bare):
        assert await store.turn(one.id, tenant) == as_read(one)


async def test_hostile_texts_go_into_a_batch(store: Store, tenant: str) -> None:
    hostile, shown = 'a\x00b \ud800 \udc00 \\u0000 " \U0001f600', 'a\ufffdb \ufffd \ufffd \\u0000 " \U0001f600'
    turn = begun(tenant, asked=hostile, model=hostile, history=(Message("user", hostile),))
    store.log(finished(turn, said=hostile))
    read = await store.turn(turn.id, tenant)
    assert (read.asked, read.said, read.model, read.history) == (shown, shown, shown, (Message("user", shown),))


async def test_an_ended_turn_is_not_written_again(store: Store, tenant: str) -> None:
    turn, fresh = escalated(begun(tenant)), finished(begun(tenant))
    await store.keep(turn)
    for one in (replace(turn, said="something else"), fresh):
        store.log(one)
    await store.flush()
    assert await store.turn(turn.id, tenant) == as_read(turn)
    assert await store.turn(fresh.id, tenant) == as_read(fresh)
    assert len(await store.tickets(tenant)) == 1


async def test_nobody_overwrites_a_turn_of_another_tenant(store: Store, tenant: str) -> None:
    await store.put_tenant(Tenant(f"{tenant}-2", "hr"))
    turn = begun(tenant)
    await store.keep(turn)
    theirs = finished(replace(turn, tenant=f"{tenant}-2"))
    await store.keep(theirs)
    assert await store.turn(turn.id, tenant) == as_read(turn)
    assert await store.turn(turn.id, theirs.tenant) is None


async def test_an_interrupted_turn_is_completed_after_all(store: Store, tenant: str) -> None:
    turn = begun(tenant)
    await store.keep(turn)
    assert turn.id in await store.open_turns(now())
    await store.keep(done := finished(turn))
    assert await store.turn(turn.id, tenant) == as_read(done)


CRASH = """
import asyncio, os, signal, sys
from pathlib import Path
from app.store import Store
from tests.app.turns import begun, finished

async def main(url, spill, tenant):
    store = await Store.open(url, Path(spill))
    kept, running = finished(begun(tenant, id="chatcmpl-kept-" + tenant)), begun(tenant, id="chatcmpl-ran-" + tenant)
    store.log(running)
    await store.keep(kept)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main(*sys.argv[1:]))
"""


async def test_what_was_kept_survives_a_kill_and_what_ran_is_on_record(
    store: Store, tenant: str, url: str, tmp_path: Path
) -> None:
    arguments = ("-c", CRASH, url, str(tmp_path / "crash"), tenant)
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments)
    assert await process.wait() == -signal.SIGKILL
    assert (await store.turn(f"chatcmpl-kept-{tenant}", tenant)).ended
    assert f"chatcmpl-ran-{tenant}" in await store.open_turns(now())


# --- what look-ups see


async def test_look_ups_see_what_was_logged(store: Store, tenant: str) -> None:
    store.writer.delay = 60.0

    def fresh() -> Turn:
        turn = escalated(begun(tenant))
        store.log(turn)
        return turn

    turn = fresh()
    assert await store.turn(turn.id, tenant) == as_read(turn)
    turn = fresh()
    assert await store.turns(turn.conversation, tenant) == [as_read(turn)]
    turn = fresh()
    assert await store.turn_after(tenant, turn.tail_hash) == (turn.id, turn.conversation)
    assert await store.conversation_after(tenant, turn.tail_hash) == turn.conversation
    assert store.writer.waiting == 1, "the hash is known without the database"
    assert await store.ticket(turn.ticket.id) == turn.ticket
    turn = fresh()
    assert turn.ticket in await store.tickets(tenant)
    turn = fresh()
    assert await store.open_ticket_of(tenant, turn.conversation) == turn.ticket
    turn = fresh()
    assert (await store.answer_ticket(turn.ticket.id, "E4.", "ana")).answer == "E4."
    turn = fresh()
    assert (await store.close_ticket(turn.ticket.id, "ana")).state == "closed"
    turn = fresh()
    assert (await store.withheld(turn.id, tenant, "ana", "test"))["asked"] == RAW
    turn = fresh()
    assert (await store.add_feedback(opinion(turn)))[0][1]
    turn = fresh()
    assert turn.id in [one.turn.id for one in await store.logged_turns("ana", 5, tenant=tenant)]


async def test_an_export_has_what_was_logged(store: Store, tenant: str) -> None:
    turn = finished(begun(tenant))
    store.log(turn)
    await store.add_feedback(opinion(turn))
    assert [judged.reply.turn async for judged in store.judged_turns(tenant)] == [turn.id]


async def test_the_last_turns_of_a_conversation(store: Store, tenant: str) -> None:
    conversation = new_id("conv_")
    turns = [finished(begun(tenant, conversation=conversation)) for _ in range(5)]
    for turn in turns:
        store.log(turn)
    read = await store.turns(conversation, tenant, last=2)
    assert read == [as_read(turn) for turn in sorted(turns, key=lambda one: (one.created_at, one.id))[-2:]]


async def test_a_hash_that_was_written_by_another_process_is_found(store: Store, other: Store, tenant: str) -> None:
    turn = finished(begun(tenant))
    await store.keep(turn)
    assert await other.turn_after(tenant, turn.tail_hash) == (turn.id, turn.conversation)
    assert await other.turn_after("nobody", turn.tail_hash) is None
    store.writer.forget()
    assert await store.turn_after(tenant, turn.tail_hash) == (turn.id, turn.conversation)


async def test_feedback_that_is_ahead_of_its_turn_waits_for_it(store: Store, other: Store, tenant: str) -> None:
    turn = finished(begun(tenant))
    saying = asyncio.create_task(other.add_feedback(opinion(turn)))
    await asyncio.sleep(2 * other.writer.delay)
    assert not saying.done()
    await store.keep(turn)
    ((_, created),) = await saying
    assert created


async def test_feedback_on_what_never_comes_is_not_found_in_time(store: Store, tenant: str) -> None:
    turn = finished(begun(tenant))
    started = asyncio.get_running_loop().time()
    with pytest.raises(NotFound):
        await store.add_feedback(opinion(turn))
    assert 9 * store.writer.delay < asyncio.get_running_loop().time() - started < 5


# --- when something fails


async def test_while_the_database_is_away_turns_go_to_the_disk_and_come_back(
    store: Store, tenant: str, away: list[bool], monkeypatch
) -> None:
    monkeypatch.setattr(stores, "FIRST_REPLAY", 0.02)
    monkeypatch.setattr(writers, "PROBE", 0.02)
    away[0] = True
    turns = [finished(begun(tenant)) for _ in range(10)]
    running = begun(tenant)
    for turn in (*turns, running):
        store.log(turn)
    await store.flush()
    assert (store.spilled, store.writer.spilled, store.writer.waiting) == (11, 11, 0)
    assert not store.writer.healthy
    assert not await store.writer.prove()
    away[0] = False
    await when(lambda: store.writer.healthy and not store.spilled)
    for turn in turns:
        assert await store.turn(turn.id, tenant) == as_read(turn)
    assert await store.turn(running.id, tenant) == as_read(running)
    await store.keep(done := finished(running))
    assert await store.turn(running.id, tenant) == as_read(done)


async def test_an_outage_while_nothing_is_written_is_found_before_the_next_answer(
    store: Store, tenant: str, away: list[bool], transactions: list[str], monkeypatch
) -> None:
    monkeypatch.setattr(writers, "PROBE", 0.02)
    await store.keep(finished(begun(tenant)))
    del transactions[:]
    assert await store.writer.prove()
    assert transactions == [], "what was written a moment ago is proof enough"
    store.writer._proven -= writers.FRESH
    assert all(await asyncio.gather(*(store.writer.prove() for _ in range(5))))
    assert len(transactions) == 1
    store.writer._proven -= writers.FRESH
    away[0] = True
    assert not await store.writer.prove()
    assert not store.writer.healthy
    away[0] = False
    await when(lambda: store.writer.healthy)


async def test_what_can_be_recorded_nowhere_waits_and_is_written_later(
    store: Store, tenant: str, away: list[bool], no_disk: list[bool], monkeypatch
) -> None:
    monkeypatch.setattr(writers, "PROBE", 0.02)
    away[0] = no_disk[0] = True
    turn, late = finished(begun(tenant)), finished(begun(tenant))
    with pytest.raises(SpillFull, match="No space left"):
        await store.keep(turn)
    store.log(late)
    assert (store.writer.waiting, store.writer.lost, store.spilled) == (2, 0, 0)
    away[0] = no_disk[0] = False
    await when(lambda: store.writer.waiting == 0)
    for one in (turn, late):
        assert await store.turn(one.id, tenant) == as_read(one)


async def test_no_more_turns_wait_than_there_is_room_for(
    store: Store, tenant: str, away: list[bool], no_disk: list[bool], monkeypatch
) -> None:
    monkeypatch.setattr(store.writer, "_most", 3)
    away[0] = no_disk[0] = True
    turns = [begun(tenant) for _ in range(3)]
    for turn in turns:
        assert not store.writer.full
        store.log(turn)
    assert store.writer.full
    store.log(begun(tenant))
    assert store.writer.lost == 1
    with pytest.raises(SpillFull, match="3 turns wait already"):
        await store.keep(begun(tenant))
    store.log(ended := finished(turns[0]))
    assert store.writer.lost == 1, "a turn that waits already takes no more room"
    away[0] = no_disk[0] = False
    await store.flush()
    assert not store.writer.full
    assert await store.turn(ended.id, tenant) == as_read(ended)


async def test_what_is_still_queued_when_nothing_can_be_written_at_the_end_is_counted(
    url: str, store: Store, tenant: str, tmp_path: Path, away: list[bool], no_disk: list[bool]
) -> None:
    closing_one = await Store.open(url, tmp_path / "closing")
    away[0] = no_disk[0] = True
    closing_one.log(begun(tenant))
    await closing_one.close()
    assert closing_one.writer.lost == 1


async def test_a_turn_that_the_database_does_not_take_holds_up_no_other(
    store: Store, tenant: str, tmp_path: Path
) -> None:
    told: list[tuple[str, int]] = []
    store.writer.told = lambda what, more: told.append((what, more))
    stray, good = finished(begun("nobody")), [finished(begun(tenant)) for _ in range(3)]
    store.log(good[0])
    refused = asyncio.create_task(store.keep(stray))
    for turn in good[1:]:
        store.log(turn)
    with pytest.raises(Conflict):
        await refused
    for turn in good:
        assert await store.turn(turn.id, tenant) == as_read(turn)
    assert (store.writer.rejected, store.writer.written, store.writer.lost) == (1, 3, 0)
    assert sum(more for what, more in told if what == "written") == 3
    assert ("rejected", 1) in told
    assert decode((tmp_path / "spill" / "aside.jsonl").read_bytes()).id == stray.id
    assert store.writer.healthy


async def test_a_ticket_of_a_turn_on_the_disk_is_made_when_the_database_is_back(
    store: Store, tenant: str, away: list[bool]
) -> None:
    away[0] = True
    turn = escalated(begun(tenant))
    await store.keep(turn)
    away[0] = False
    assert await store.replay() == Replayed(written=1)
    assert await store.ticket(turn.ticket.id) == turn.ticket


# --- histories

T = tuple[Message, ...]


async def talk(store: Store, tenant: str, histories: Sequence[T], **changes: object) -> list[Turn]:
    """Turns with these histories, each the parent of the next; each is kept before the next one begins."""
    conversation, turns, parent = new_id("conv_"), list[Turn](), ""
    for place, history in enumerate(histories):
        more = {"conversation": conversation, "history": history, "parent": parent, "asked": f"q{place}"}
        more |= {"input": None} | changes  # a verdict is read with the texts of its turn
        turn = finished(begun(tenant, **more), said=f"a{place}", finish_reason="stop", output=None)  # type: ignore[arg-type]
        await store.keep(turn)
        turns.append(turn)
        parent = turn.id
    return turns


def exchange(place: int) -> T:
    """What was asked and said in that turn."""
    return (Message("user", f"q{place}"), Message("assistant", f"a{place}"))


def exchanges(start: int, stop: int) -> T:
    """Those of several turns."""
    return tuple(message for place in range(start, stop) for message in exchange(place))


CALL = ToolMessage("assistant", '{"q": 1}', "c1", "find")
RESULT = ToolMessage("tool", "42", "c1", "")
SHAPES: dict[str, list[T]] = {
    "resent as it was": [exchanges(0, n) for n in range(5)],
    "with the same system message before it": [(SYSTEM, *exchanges(0, n)) for n in range(5)],
    "with the same system message after it": [(*exchanges(0, n), SYSTEM) for n in range(5)],
    "with another system message each time": [(Message("system", f"It is {n}."), *exchanges(0, n)) for n in range(5)],
    "a window of it": [exchanges(max(n - 2, 0), n) for n in range(8)],
    "one exchange left out": [(), exchanges(0, 1), exchanges(0, 2), (*exchange(0), *exchange(2))],
    "one message changed": [(), exchanges(0, 1), (*exchange(0), Message("user", "forged"), *exchange(1)[1:])],
    "nothing in common": [(), (Message("user", "x"),), (Message("user", "y"), SYSTEM)],
    "sent again from an earlier place": [(), exchanges(0, 1), exchanges(0, 2), exchanges(0, 1)],
    "the same words again and again": [(Message("user", "ok"),) * n for n in range(5)],
    "with tools": [(), (*exchange(0), CALL, RESULT), (*exchange(0), CALL, RESULT, *exchange(1))],
    "long at once": [exchanges(5, 25), (*exchanges(5, 25), *exchange(0))],
}


@pytest.mark.parametrize("cold", [False, True], ids=["remembered", "read"])
@pytest.mark.parametrize("shape", SHAPES)
async def test_a_history_reads_back_exactly_whatever_the_client_sent(
    store: Store, tenant: str, shape: str, cold: bool, monkeypatch
) -> None:
    if cold:
        monkeypatch.setattr(store.writer._records, "_most", 0)
    turns = await talk(store, tenant, SHAPES[shape])
    assert [turn.history for turn in await store.turns(turns[0].conversation, tenant)] == SHAPES[shape]
    for turn in turns:
        assert await store.turn(turn.id, tenant) == as_read(turn)
    assert await store.turns(turns[0].conversation, tenant, last=1) == [as_read(turns[-1])]


async def test_turns_and_those_they_continue_in_one_batch(store: Store, tenant: str) -> None:
    conversation, turns = new_id("conv_"), list[Turn]()
    for place in range(6):
        parent = turns[-1].id if turns else ""
        turn = begun(tenant, conversation=conversation, history=exchanges(0, place), asked=f"q{place}", parent=parent)
        turns.append(finished(turn, said=f"a{place}", finish_reason="stop"))
        store.log(turns[-1])
    await store.flush()
    assert store.writer.batches == 1
    assert [one.history for one in await store.turns(conversation, tenant)] == [turn.history for turn in turns]
    assert await linked(store, turns) == [None, True, True, True, True, True]


async def linked(store: Store, turns: Sequence[Turn]) -> list[bool | None]:
    """Which of these turns need their parents."""
    query = "SELECT linked FROM turns WHERE id = :id"
    async with store._db._engine.connect() as connection:
        found = [(await connection.execute(text(query), {"id": turn.id})).scalar_one() for turn in turns]
    return [None if one is None else bool(one) for one in found]


async def room(store: Store, turns: Sequence[Turn]) -> int:
    """The characters that the histories of these turns take."""
    query = "SELECT length(CAST(history AS TEXT)) FROM turns WHERE id = :id"
    async with store._db._engine.connect() as connection:
        return sum([(await connection.execute(text(query), {"id": turn.id})).scalar_one() for turn in turns])


@pytest.mark.parametrize("shape", ["resent as it was", "with the same system message after it", "a window of it"])
async def test_a_message_is_kept_once(store: Store, tenant: str, shape: str) -> None:
    def history(place: int) -> T:
        start = max(place - 20, 0) if shape == "a window of it" else 0
        told = exchanges(start, place)
        return (*told, SYSTEM) if shape.endswith("after it") else told

    turns = await talk(store, tenant, [history(place) for place in range(60)])
    assert await room(store, turns) / len(turns) < 100
    assert (await store.turn(turns[-1].id, tenant)).history == history(59)


async def test_a_turn_of_another_process_is_continued(store: Store, other: Store, tenant: str) -> None:
    conversation, parent, turns = new_id("conv_"), "", list[Turn]()
    for place in range(4):
        more = {"conversation": conversation, "history": exchanges(0, place), "asked": f"q{place}", "parent": parent}
        turn = finished(begun(tenant, **more), said=f"a{place}", finish_reason="stop")
        await (store, other)[place % 2].keep(turn)
        turns.append(turn)
        parent = turn.id
    assert await linked(store, turns) == [None, True, True, True]
    assert [one.history for one in await store.turns(conversation, tenant)] == [turn.history for turn in turns]


@pytest.mark.parametrize("changes", [{"conversation": "elsewhere"}, {"tenant": "other"}, {"parent": "chatcmpl-none"}])
async def test_only_a_turn_of_the_same_conversation_is_continued(
    store: Store, tenant: str, changes: dict[str, str]
) -> None:
    changes = {name: f"{value}-{tenant}" for name, value in changes.items()}
    await store.put_tenant(Tenant(f"other-{tenant}", "hr"))
    (first,) = await talk(store, tenant, [()])
    more = {"conversation": first.conversation, "parent": first.id} | changes
    child = finished(replace(begun(tenant, history=exchanges(0, 1)), **more))
    await store.keep(child)
    assert await linked(store, [child]) == [None]
    assert await store.turn(child.id, child.tenant) == as_read(child)


@pytest.mark.parametrize("ending", [{"error": "client_gone"}, {"total_ms": None}], ids=["failed", "still running"])
async def test_only_a_turn_that_ended_well_is_continued(store: Store, tenant: str, ending: dict[str, object]) -> None:
    first = finished(begun(tenant, history=exchanges(0, 3)), **ending)
    await store.keep(first)
    more = {"conversation": first.conversation, "parent": first.id, "history": first.history}
    child = finished(begun(tenant, **more))
    await store.keep(child)
    assert await linked(store, [child]) == [None]
    assert await store.turn(child.id, tenant) == as_read(child)


async def test_a_spilled_turn_is_whole_and_linked_when_it_comes_back(
    store: Store, tenant: str, away: list[bool], tmp_path: Path
) -> None:
    (first,) = await talk(store, tenant, [()])
    more = {"conversation": first.conversation, "parent": first.id, "history": exchanges(0, 1)}
    child = finished(begun(tenant, **more))
    away[0] = True
    await store.keep(child)
    (file,) = (tmp_path / "spill").glob("turns-*")
    assert decode(file.read_bytes()).history == child.history
    away[0] = False
    await store.replay()
    assert await linked(store, [child]) == [True]
    assert await store.turn(child.id, tenant) == as_read(child)


async def test_a_turn_whose_parent_was_deleted_meanwhile_is_kept_whole(store: Store, tenant: str) -> None:
    turns = await talk(store, tenant, [(), exchanges(0, 1)])
    await remove(store, turns[1])
    more = {"conversation": turns[0].conversation, "parent": turns[1].id, "history": exchanges(0, 2)}
    child, beside = finished(begun(tenant, **more)), finished(begun(tenant))
    for one in (child, beside):
        store.log(one)
    for one in (child, beside):
        assert await store.turn(one.id, tenant) == as_read(one)


async def remove(store: Store, turn: Turn) -> None:
    """Deletes a turn, as somebody else would."""

    async def work(connection: object) -> None:
        for table in (tables.verdicts, tables.withheld):
            await connection.execute(delete(table).where(table.c.turn == turn.id))  # type: ignore[attr-defined]
        await connection.execute(delete(tables.turns).where(tables.turns.c.id == turn.id))  # type: ignore[attr-defined]

    await store._db.write(work)


async def test_what_went_with_an_earlier_turn_is_missing_and_nothing_is_in_its_place(store: Store, tenant: str) -> None:
    told = [(*exchanges(0, n), SYSTEM) if n == 2 else exchanges(0, n) for n in range(4)]
    turns = await talk(store, tenant, told, input=Verdict(Action.ALLOW, ""))
    await remove(store, turns[1])  # it held q0 and a0 for itself and those after it
    read = {one.id: one for one in await store.turns(turns[0].conversation, tenant)}
    assert read[turns[0].id].history == ()
    assert read[turns[2].id].history == (SYSTEM,)
    assert read[turns[3].id].history == exchange(2)
    for turn in turns[2:]:
        await store.add_feedback(opinion(turn))
    judged = [one.reply async for one in store.judged_turns(tenant)]
    assert [(reply.prompt, reply.said) for reply in judged] == [((), ""), ((), "")], "half a prompt teaches nothing"
    assert [one.turn.id for one in await store.logged_turns("ana", 9, tenant=tenant)] == [turns[0].id]


async def test_a_turn_from_which_something_was_taken_is_not_continued(store: Store, other: Store, tenant: str) -> None:
    turns = await talk(store, tenant, [exchanges(5, 9), (*exchanges(5, 9), *exchange(0))])

    async def cut(connection: object) -> None:
        statement = update(tables.turns).where(tables.turns.c.id == turns[0].id).values(history=[], linked=False)
        await connection.execute(statement)  # type: ignore[attr-defined]

    await other._db.write(cut)
    assert (await store.turn(turns[1].id, tenant)).history == ()
    more = {"conversation": turns[0].conversation, "parent": turns[0].id, "history": turns[1].history}
    child = finished(begun(tenant, **more))
    await store.keep(child)
    assert await linked(store, [child]) == [None]
    assert await store.turn(child.id, tenant) == as_read(child)


async def test_long_conversations_are_read_by_their_last_turn(store: Store, tenant: str, monkeypatch) -> None:
    monkeypatch.setattr("app.store.turns.LEVELS", 8)
    turns = await talk(store, tenant, [exchanges(0, place) for place in range(30)])
    assert await store.turn(turns[-1].id, tenant) == as_read(turns[-1])


async def test_turns_of_an_earlier_version_are_read_and_continued(
    url: str, store: Store, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    own = f"sqlite+aiosqlite:///{tmp_path}/old/newel.db"
    if not url.startswith("sqlite"):
        own = request.getfixturevalue("cluster").create_database(new_id("old_"))
    await as_it_was(own, "0004")
    old = replace(finished(begun("acme"), input=None, output=None), history=exchanges(0, 3))
    old = replace(old, guard_input_ms=None, guard_output_ms=None)
    await insert_old(own, old)
    opened = await Store.open(own, tmp_path / "old-spill")
    try:
        assert await opened.turn(old.id, "acme") == as_read(old)
        more = {"conversation": old.conversation, "parent": old.id}
        history = (*old.history, Message("user", old.asked), Message("assistant", old.said))
        child = finished(begun("acme", history=history, **more))
        await opened.keep(child)
        assert await linked(opened, [old, child]) == [None, True]
        assert await opened.turn(child.id, "acme") == as_read(child)
    finally:
        await opened.close()


async def insert_old(url: str, turn: Turn) -> None:
    """Inserts the turn as the version before histories were shared did."""
    names = set(turn.__slots__) - {"parent", "release", "surface", "priority", "trace", "choice", "cached_tokens"}
    names -= {"guard_input_ms", "guard_output_ms", "withheld_asked", "withheld_said", "input", "output"}
    kinds = {"history": JSON, "calls": JSON, "created_at": DateTime(timezone=True)}
    meta = MetaData()
    table = Table("turns", meta, *(Column(name, kinds.get(name, _same(turn, name))) for name in sorted(names)))
    finished_at = Column("finished_at", DateTime(timezone=True))
    table.append_column(finished_at)
    row = {name: getattr(turn, name) for name in names} | {"finished_at": turn.created_at, "ticket": None, "calls": []}
    row["history"] = [[one.role, one.content] for one in turn.history]
    talks = Table("conversations", meta, *(Column(name, String) for name in ("tenant", "id", "subject")))
    for name in ("created_at", "last_at"):
        talks.append_column(Column(name, DateTime(timezone=True)))
    people = Table("tenants", meta, *(Column(name, String) for name in ("name", "policy", "when_store_fails")))
    people.append_column(Column("created_at", DateTime(timezone=True)))
    began = {"created_at": turn.created_at}
    engine = connect(database_url(url))
    async with engine.begin() as connection:
        tenant = {"name": turn.tenant, "policy": "hr", "when_store_fails": "answer"}
        await connection.execute(insert(people).values(tenant | began))
        talk = {"tenant": turn.tenant, "id": turn.conversation, "subject": "", "last_at": turn.created_at}
        await connection.execute(insert(talks).values(talk | began))
        await connection.execute(insert(table).values(row))
    await engine.dispose()


def _same(turn: Turn, name: str) -> type:
    kinds = {bool: Boolean, int: Integer, float: Float}
    return kinds.get(type(getattr(turn, name)), String)


MESSAGES = st.lists(
    st.builds(Message, st.sampled_from(["user", "assistant", "system"]), st.sampled_from(["", "a", "b", "ok", "é"])),
    max_size=8,
).map(tuple)


@given(st.lists(st.tuples(MESSAGES, st.sampled_from(["", "q"]), st.sampled_from(["", "r"])), max_size=6))
def test_any_chain_of_histories_is_put_together_again(chain: list[tuple[T, str, str]]) -> None:
    turns: list[Kept] = []
    before = b""
    for place, (history, asked, said) in enumerate(chain):
        parts = [encoded(message) for message in history]
        text_, needs = kept(parts, marks(parts), before)
        added = said_in(asked, said, (), "stop")
        items = json.loads(text_)
        assert needs == any(not isinstance(item[0], str) for item in items)
        turns.append(Kept(f"t{place}", f"t{place - 1}", items, added))
        before = marks([*parts, *(encoded(message) for message in added)])
    known = Records(turns)
    for place in reversed(range(len(chain))):
        assert known.history(f"t{place}") == (chain[place][0], True)


def test_ids_of_rows_come_in_the_order_in_which_they_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = []
    for millisecond in (1, 255, 256, 10**12):
        monkeypatch.setattr("app.records.time.time_ns", lambda at=millisecond: at * 1_000_000)
        ids.append(row_id("conv_"))
    assert ids == sorted(ids)
    assert all(re.fullmatch("conv_[0-9a-f]{36}", one) for one in ids)
    assert row_id("conv_")[:17] == row_id("conv_")[:17] and row_id("conv_") != row_id("conv_")
