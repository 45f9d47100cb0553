"""What happens to turns while the database is away."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from secrets import token_hex

import pytest

from app.records import Tenant, Turn, now
from app.store import Replayed, SpillFull, Store, StoreDown
from app.store import store as stores
from app.store.database import Database
from app.store.spill import Spill, decode, encode
from guardrails.types import Message, ToolMessage
from tests.app.turns import as_read, begun, escalated, finished
from tests.postgres import Cluster


class Taken:
    """Stands where the database is: takes turns, or is down."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.down = False

    async def put(self, turn: Turn) -> int:
        if self.down:
            raise StoreDown("away")
        known = any(one.id == turn.id for one in self.turns)
        self.turns.append(turn)
        return 0 if known else 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "spill"


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("turns-*"))


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- the file

CALL = ToolMessage("assistant", '{"q": "\ud800"}', "c", "find")


@pytest.mark.parametrize(
    "turn",
    [
        begun("acme"),
        finished(begun("acme")),
        escalated(begun("acme", retry_of="chatcmpl-0", streamed=False)),
        begun("acme", asked='a\x00b \ud800 \u2028\n"', history=(Message("tool", "\r\n"),)),
        begun("acme", asked="", history=(CALL, ToolMessage("tool", "42", "c", "")), calls=(CALL,), reasoning="Hm."),
    ],
    ids=["begun", "finished", "escalated", "hostile", "tools"],
)
def test_a_line_holds_everything_that_the_turn_holds(turn: Turn) -> None:
    line = encode(turn)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert decode(line) == turn


def test_a_line_that_was_cut_or_changed_is_not_read() -> None:
    line = encode(finished(begun("acme")))
    record = json.loads(line)
    record["turn"]["said"] = "something else"
    broken = [line[:-20], line[5:], b"", b"{}", b"[1]", b"null", b'{"sha256": "x"}', json.dumps(record).encode()]
    for one in broken:
        with pytest.raises(ValueError):
            decode(one)
    decode(line)


async def test_a_spilled_turn_is_on_the_disk_and_private(folder: Path) -> None:
    spill, turn = Spill(folder), begun("acme")
    await spill.append(turn)
    (file,) = files(folder)
    assert decode(file.read_bytes()) == turn
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


async def test_a_spilled_turn_is_synced_before_append_returns(folder: Path, monkeypatch) -> None:
    synced: list[int] = []
    sync = os.fsync

    def noting(file: int) -> None:
        synced.append(os.fstat(file).st_size)
        sync(file)

    monkeypatch.setattr(os, "fsync", noting)
    spill, turn = Spill(folder), begun("acme")
    await spill.append(turn)
    assert synced[0] == len(encode(turn))
    assert len(synced) == 2  # the new file's folder too


async def test_files_are_changed_by_day_and_by_size(folder: Path, monkeypatch) -> None:
    spill = Spill(folder, max_bytes=4000)
    for _ in range(5):
        await spill.append(begun("acme"))
    tomorrow = now() + timedelta(days=1)
    monkeypatch.setattr("app.store.spill.now", lambda: tomorrow)
    await spill.append(begun("acme"))
    days = [file.name.split("-")[1] for file in files(folder)]
    assert len(set(days)) == 2
    assert len(days) > 2
    taken = Taken()
    assert await spill.replay(taken.put) == Replayed(written=6)


async def test_turns_that_come_at_once_are_all_kept(folder: Path) -> None:
    spill, turns = Spill(folder), [begun("acme") for _ in range(30)]
    await asyncio.gather(*map(spill.append, turns))
    assert spill.waiting == 30
    taken = Taken()
    await spill.replay(taken.put)
    assert {turn.id for turn in taken.turns} == {turn.id for turn in turns}
    assert spill.waiting == 0
    assert files(folder) == []


SPILL = """
import asyncio, sys
from pathlib import Path
from app.store.spill import Spill
from tests.app.turns import begun

async def main(folder):
    spill = Spill(Path(folder), max_bytes=20_000)
    for _ in range(40):
        await spill.append(begun("acme"))

asyncio.run(main(sys.argv[1]))
"""


async def test_processes_share_the_folder(folder: Path) -> None:
    command = [sys.executable, "-c", SPILL, str(folder)]
    writers = [await asyncio.create_subprocess_exec(*command) for _ in range(3)]
    taken, reader = Taken(), Spill(folder)
    while any(writer.returncode is None for writer in writers):  # replaying while they write
        await reader.replay(taken.put)
        await asyncio.wait([asyncio.create_task(writer.wait()) for writer in writers], timeout=0.05)
    await reader.replay(taken.put)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert len({turn.id for turn in taken.turns}) == 120


async def test_one_process_replays_at_a_time(folder: Path) -> None:
    first, second, taken = Spill(folder), Spill(folder), Taken()
    await first.append(begun("acme"))
    entered, leave = asyncio.Event(), asyncio.Event()

    async def slow(turn: Turn) -> int:
        entered.set()
        await leave.wait()
        return await taken.put(turn)

    running = asyncio.create_task(first.replay(slow))
    await entered.wait()
    assert await second.replay(taken.put) == Replayed()
    leave.set()
    assert await running == Replayed(written=1)


# --- what goes wrong


async def test_a_torn_last_line_is_put_aside_and_counted(folder: Path) -> None:
    spill, whole, later = Spill(folder), begun("acme"), begun("acme")
    await spill.append(whole)
    (file,) = files(folder)
    torn = encode(begun("acme"))[:-30]
    with file.open("ab") as end:
        end.write(torn)  # the machine lost its power here
    restarted = Spill(folder)
    assert restarted.waiting == 2
    await restarted.append(later)  # must not be glued to it
    taken = Taken()
    assert await restarted.replay(taken.put) == Replayed(written=2, torn=1)
    assert [turn.id for turn in taken.turns] == [whole.id, later.id]
    assert (folder / "aside.jsonl").read_bytes() == torn + b"\n"
    assert stat.S_IMODE((folder / "aside.jsonl").stat().st_mode) == 0o600
    assert await restarted.replay(taken.put) == Replayed()


async def test_a_full_disk_is_told_and_leaves_no_half_line(folder: Path) -> None:
    spill, first, second = Spill(folder), begun("acme"), begun("acme")
    await spill.append(first)
    (file,) = files(folder)
    size = file.stat().st_size
    with full_disk(size + 100), pytest.raises(SpillFull, match=f"turn {second.id} cannot be spilled .* make room"):
        await spill.append(second)
    assert file.stat().st_size == size
    assert spill.waiting == 1
    await spill.append(second)
    taken = Taken()
    assert await spill.replay(taken.put) == Replayed(written=2)


async def test_a_disk_that_does_not_sync_is_told(folder: Path, monkeypatch) -> None:
    spill = Spill(folder)

    def broken(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(SpillFull, match="Input/output error"):
        patch.setattr(os, "fsync", broken)
        await spill.append(begun("acme"))
    assert await spill.replay(Taken().put) == Replayed()


def test_a_folder_that_cannot_be_made_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SpillFull, match="cannot be used: Not a directory"):
        Spill(tmp_path / "file" / "spill")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or (done := subprocess.run(mount, capture_output=True, text=True)).returncode:
        pytest.skip("no small disk can be mounted here" + ("" if os.geteuid() else f": {done.stderr.strip()}"))
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


async def test_a_small_disk_takes_what_it_can_and_loses_nothing_silently(small_disk: Path) -> None:
    spill, taken, kept = Spill(small_disk / "spill"), Taken(), []
    with pytest.raises(SpillFull, match="No space left on device"):
        for _ in range(200):
            turn = begun("acme")
            await spill.append(turn)
            kept.append(turn.id)
    assert kept
    assert await spill.replay(taken.put) == Replayed(written=len(kept))
    assert [turn.id for turn in taken.turns] == kept


async def test_a_replay_that_is_interrupted_goes_on_later(folder: Path) -> None:
    spill, taken = Spill(folder, max_bytes=1), Taken()
    turns = [begun("acme") for _ in range(4)]
    for turn in turns:
        await spill.append(turn)

    async def until_third(turn: Turn) -> int:
        if len(taken.turns) == 2:
            raise StoreDown("away again")
        return await taken.put(turn)

    with pytest.raises(StoreDown):
        await spill.replay(until_third)
    late = begun("acme")
    await spill.append(late)
    restarted = Spill(folder)
    assert restarted.waiting == 3
    assert await restarted.replay(taken.put) == Replayed(written=3)
    assert {turn.id for turn in taken.turns} == {turn.id for turn in (*turns, late)}


# --- with a database


async def test_a_spilled_turn_is_written_with_all_that_belongs_to_it(store: Store, tenant: str) -> None:
    turn = escalated(begun(tenant))
    await store.spill(turn)
    assert store.spilled == 1
    assert await store.replay() == Replayed(written=1)
    assert store.spilled == 0
    assert await store.turn(turn.id, tenant) == as_read(turn)
    assert await store.ticket(turn.ticket.id) == turn.ticket
    assert await store.withheld(turn.id, tenant, "ana", "test") == {
        "asked": turn.withheld_asked,
        "said": turn.withheld_said,
    }
    assert f"msg_{turn.ticket.id}_created" in [one.id for one in await store.deliveries()]


@pytest.mark.parametrize("order", ["begin then finish", "finish then begin"])
async def test_both_ends_of_a_turn_may_be_spilled_in_any_order(store: Store, tenant: str, order: str) -> None:
    start = begun(tenant)
    end = finished(start)
    for turn in (start, end) if order == "begin then finish" else (end, start):
        await store.spill(turn)
    await store.replay()
    assert await store.turn(start.id, tenant) == as_read(end)


async def test_a_replayed_begin_does_not_undo_a_finish_that_was_stored(store: Store, tenant: str) -> None:
    start = begun(tenant)
    await store.spill(start)
    await store.finish(finished(start, tail_hash="t"))
    assert await store.replay() == Replayed(known=1)
    assert await store.turn(start.id, tenant) == as_read(finished(start, tail_hash="t"))


async def test_a_replay_that_is_repeated_changes_nothing(store: Store, tenant: str, tmp_path: Path) -> None:
    turn = escalated(begun(tenant))
    await store.spill(turn)
    (file,) = files(tmp_path / "spill")
    copy = file.read_bytes()
    await store.replay()
    file.write_bytes(copy)
    assert await store.replay() == Replayed(known=1)
    assert len(await store.tickets(tenant)) == 1


async def test_a_turn_that_the_database_does_not_take_is_put_aside(store: Store, tenant: str, tmp_path: Path) -> None:
    stray, good = finished(begun("nobody")), finished(begun(tenant))
    await store.spill(stray)
    await store.spill(good)
    assert await store.replay() == Replayed(written=1, rejected=1)
    aside = decode((tmp_path / "spill" / "aside.jsonl").read_bytes())
    assert as_read(aside) == as_read(stray)
    assert stray.withheld_asked not in aside.withheld_asked
    assert await store.turn(good.id, tenant) == as_read(good)


async def test_what_was_spilled_before_a_crash_is_replayed_at_the_next_start(
    store: Store, tenant: str, url: str, tmp_path: Path
) -> None:
    turn = finished(begun(tenant))
    await Spill(tmp_path / "crashed").append(turn)
    again = await Store.open(url, tmp_path / "crashed")
    assert await again.turn(turn.id, tenant) == as_read(turn)
    assert again.spilled == 0
    await again.close()


async def test_the_spill_is_replayed_by_itself_when_the_database_is_back(
    store: Store, tenant: str, monkeypatch
) -> None:
    monkeypatch.setattr(stores, "FIRST_REPLAY", 0.02)
    write, down = Database.write, True

    async def away(self, work):
        if down:
            raise StoreDown("away")
        return await write(self, work)

    monkeypatch.setattr(Database, "write", away)
    turn = begun(tenant)
    with pytest.raises(StoreDown):
        await store.begin(turn)
    await store.spill(turn)
    await store.spill(finished(turn, tail_hash="t"))
    await asyncio.sleep(0.1)
    assert store.spilled == 2
    down = False
    async with asyncio.timeout(5):
        while store.spilled:
            await asyncio.sleep(0.01)
    assert await store.turn(turn.id, tenant) == as_read(finished(turn, tail_hash="t"))


@pytest.mark.postgres
async def test_no_turn_is_lost_while_a_server_is_down(cluster: Cluster, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(stores, "FIRST_REPLAY", 0.05)
    store = await Store.open(cluster.create_database(f"newel_{token_hex(4)}"), tmp_path / "spill")
    await store.put_tenant(Tenant("acme", "hr", "answer"))
    kept: list[Turn] = []

    async def answer() -> None:
        turn = begun("acme")
        try:
            await store.begin(turn)
        except StoreDown:
            await store.spill(turn)
        await asyncio.sleep(0.01)
        turn = escalated(turn)
        try:
            await store.finish(turn)
        except StoreDown:
            await store.spill(turn)
        kept.append(turn)

    async def traffic() -> None:
        for _ in range(25):
            await asyncio.gather(*(answer() for _ in range(4)))

    running = asyncio.create_task(traffic())
    await asyncio.sleep(0.1)
    await asyncio.to_thread(cluster.stop)
    await asyncio.sleep(0.3)
    await asyncio.to_thread(cluster.start)
    await running
    async with asyncio.timeout(20):
        while store.spilled:
            await asyncio.sleep(0.05)
    assert len(kept) == 100
    for turn in kept:
        assert await store.turn(turn.id, "acme") == as_read(turn)
    assert len(await store.tickets("acme")) == 100
    assert len(await store.deliveries()) == 100
    await store.close()


async def test_a_disk_that_is_full_for_both_refuses_the_turn(tmp_path: Path) -> None:
    store = await Store.open(f"sqlite+aiosqlite:///{tmp_path}/newel.db", tmp_path / "spill")
    await store.put_tenant(Tenant("acme", "hr", "answer"))
    turn = replace(begun("acme"), withheld_asked="x" * 200_000)
    with full_disk(100_000):
        with pytest.raises(StoreDown):
            await store.begin(turn)
        with pytest.raises(SpillFull):
            await store.spill(turn)
    assert store.spilled == 0
    assert await store.turn(turn.id, "acme") is None
    await store.close()
