"""The turn writer: turns are queued as they begin and end, and written together, a batch a transaction.

A turn is written as it stands when its batch is: one that has ended by then is written once and whole, one that still
runs is written as open, so that a process that dies leaves it on record, and once more at its end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from itertools import chain
from typing import Literal

from app.records import Turn, now
from app.store import tables, turns
from app.store.database import Database, moment, upsert
from app.store.errors import SpillFull, StoreDown, StoreError
from app.store.history import Record
from app.store.turns import Draft, Mixed, Unlinked

log = logging.getLogger(__name__)
Count = Literal["written", "batches", "spilled", "rejected", "lost"]
DELAY = 0.03
"""Seconds that a turn may wait for others."""
BATCH = 500
"""Turns of one transaction at most."""
BATCH_CHARACTERS = 4 * 2**20
"""Characters of history, question and reply after which a batch takes no other turn."""
MOST = 10_000
"""Turns that wait at most, while they can be written nowhere."""
SLICE = 0.001
"""Seconds of drafting after which other tasks have their turn."""
REMEMBERED_TAILS = 10_000
"""Ends of turns by which those that continue them are found without the database."""
REMEMBERED_BYTES = 4 * 2**20
"""Of records of turns, for those that continue them."""
REFUSED = 1000
"""Turns that the database turned down, whose errors are kept for those who wait for them."""
FRESH = 1.0
"""Seconds for which a write that went well stands for the next one."""
PROBE, LAST_PROBE = 0.25, 5.0
"""Seconds between attempts to write while none succeeds, doubled from the first to the last."""


class RecentRecords:
    """The records of turns that ended lately, of which those that were not needed for longest go first."""

    __slots__ = ("_bytes", "_most", "_records")

    def __init__(self, most: int):
        self._most, self._bytes = most, 0
        self._records: OrderedDict[str, Record] = OrderedDict()

    def __getitem__(self, id: str) -> Record:
        """The record of a turn; raises KeyError."""
        self._records.move_to_end(id)
        return self._records[id]

    def __contains__(self, id: str) -> bool:
        """True when the turn's record is remembered."""
        return id in self._records

    def put(self, id: str, record: Record) -> None:
        """Remembers the record of a turn."""
        self.drop([id])
        self._records[id] = record
        self._bytes += _size(record)
        while self._bytes > self._most:
            self._bytes -= _size(self._records.popitem(last=False)[1])

    def drop(self, ids: Iterable[str]) -> None:
        """Forgets these."""
        for id in ids:
            if (record := self._records.pop(id, None)) is not None:
                self._bytes -= _size(record)

    def clear(self) -> None:
        """Forgets all."""
        self._records.clear()
        self._bytes = 0


def _size(record: Record) -> int:
    return 300 + len(record.marks)  # what an entry takes beside its marks


class TurnWriter:
    """Queues turns and writes them.

    healthy: False from a batch that the database did not take until it takes one, or answers a probe. For counters:
    written, batches: turns and transactions that went well. spilled: turns that went to the disk instead. rejected:
    turns that the database turned down for good, put aside on the disk. lost: turns that are recorded nowhere.
    told: called with the name of one of these five and how many there are more.
    """

    __slots__ = (
        *("_armed", "_aside", "_batch", "_current", "_db", "_failures", "_flying", "_most", "_next", "_probing"),
        *("_proven", "_proving", "_records", "_refused", "_spill", "_tails", "_waiting"),
        *("batches", "delay", "healthy", "lost", "rejected", "spilled", "told", "written"),
    )

    def __init__(
        self,
        database: Database,
        spill: Callable[[Sequence[Turn]], Awaitable[None]],
        aside: Callable[[Turn], Awaitable[None]],
        delay: float = DELAY,
        batch: int = BATCH,
        most: int = MOST,
    ):
        """spill: returns when these turns are on the disk, to be replayed; raises SpillFull, and then none is. aside:
        keeps a turn that the database does not take; raises SpillFull. delay: seconds a turn may wait for others."""
        self._db, self._spill, self._aside = database, spill, aside
        self.delay, self._batch, self._most = delay, batch, most
        self._waiting: dict[str, Turn] = {}
        self._flying: dict[str, Turn] = {}
        self._refused: OrderedDict[str, StoreError] = OrderedDict()
        self._tails: OrderedDict[tuple[str, str], tuple[str, str]] = OrderedDict()
        self._records = RecentRecords(REMEMBERED_BYTES)
        self._armed: asyncio.TimerHandle | None = None
        self._current: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[None] | None = None
        self._proving: asyncio.Task[bool] | None = None
        self._proven = float("-inf")
        self._failures = 0
        self.healthy = True
        self.written = self.batches = self.spilled = self.rejected = self.lost = 0
        self.told: Callable[[Count, int], object] = lambda what, more: None

    # --- for the request

    def log(self, turn: Turn) -> None:
        """Queues the turn, to be written as it stands then; at its begin, and again when it has ended.

        It must be called before `ended` is true of a turn that was queued, or at once after: a turn that is queued may
        be written at any time. A turn for which there is no room is lost, and counted.
        """
        waiting = self._waiting
        if len(waiting) >= self._most and turn.id not in waiting:
            self._count("lost", 1)
            log.error("turn %s of tenant %s is lost: %d turns wait already", turn.id, turn.tenant, len(waiting))
            return
        waiting[turn.id] = turn
        if turn.tail_hash:
            self._remember(turn)
        if self._next is None:
            if self._armed is None:
                self._armed = asyncio.get_running_loop().call_later(self.delay, self._start)
            elif len(waiting) >= self._batch and not self._failures:
                self._start()

    async def flush(self) -> None:
        """Returns when all that was queued before is committed, on the disk to be replayed, or turned down for good.

        Raises SpillFull when it can be neither; then it stays queued. Callers at the same time share a transaction.
        """
        task = self._start() if self._waiting else self._current
        if task is not None:
            await asyncio.shield(task)

    async def keep(self, turn: Turn) -> None:
        """`log` and `flush` for one turn: when this returns, it is on record as it stood; raises StoreError."""
        if self.full and turn.id not in self._waiting:
            raise SpillFull(f"turn {turn.id} cannot be queued: {len(self._waiting)} turns wait already")
        self._refused.pop(turn.id, None)
        self.log(turn)
        await self.flush()
        if (error := self._refused.pop(turn.id, None)) is not None:
            raise error

    async def prove(self) -> bool:
        """True when the database has taken a write within the last second, or takes one now.

        For a request of a tenant that wants no answer without a record: an outage that began while nothing was written
        is found before the request is answered.
        """
        if self.healthy and asyncio.get_running_loop().time() - self._proven < FRESH:
            return True
        if self._proving is None or self._proving.done():
            self._proving = asyncio.create_task(self._pulse(), name="newel-turns-pulse")
        return await asyncio.shield(self._proving)

    async def close(self) -> None:
        """Writes what is queued; what cannot be written or spilled now is lost, and counted."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait([self._probing])
        with suppress(SpillFull):
            await self.flush()
        self._disarm()
        if self._waiting:
            self._count("lost", len(self._waiting))
            log.error("%d turns are lost: they could be written nowhere", len(self._waiting))
            self._waiting.clear()

    # --- what is known of what is queued

    @property
    def waiting(self) -> int:
        """How many turns are queued or being written, for a gauge."""
        return len(self._waiting) + len(self._flying)

    @property
    def full(self) -> bool:
        """True when the next turn would be lost: take none."""
        return len(self._waiting) >= self._most

    def holds(self, *ids: str) -> bool:
        """True when one of these turns is queued or being written."""
        return any(id in self._waiting or id in self._flying for id in ids)

    def any(self, which: Callable[[Turn], bool]) -> bool:
        """True when there is such a turn among those that are queued or being written."""
        return any(map(which, chain(self._waiting.values(), self._flying.values())))

    def ended_with(self, tenant: str, tail_hash: str) -> tuple[str, str] | None:
        """(id, conversation) of the last turn of this process that ended with this hash, as far as it is remembered."""
        return self._tails.get((tenant, tail_hash))

    def forget(self) -> None:
        """Forgets what was written before, for those who delete turns. What waits is not touched: flush first."""
        self._tails.clear()
        self._records.clear()

    def _count(self, what: Count, more: int) -> None:
        setattr(self, what, getattr(self, what) + more)
        self.told(what, more)

    def _remember(self, turn: Turn) -> None:
        key = (turn.tenant, turn.tail_hash)
        self._tails[key] = (turn.id, turn.conversation)
        self._tails.move_to_end(key)
        if len(self._tails) > REMEMBERED_TAILS:
            self._tails.popitem(last=False)

    # --- when it is written

    def _start(self) -> asyncio.Task[None]:
        """The task that takes all that is queued now, after the one that is at work."""
        self._disarm()
        if self._next is None:
            self._next = asyncio.create_task(self._after(self._current), name="newel-turns")
            self._next.add_done_callback(_seen)
        return self._next

    def _disarm(self) -> None:
        if self._armed is not None:
            self._armed.cancel()
            self._armed = None

    async def _after(self, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        self._current, self._next = self._next, None
        try:
            await self._drain()
        finally:
            self._current = None

    async def _drain(self) -> None:
        left = len(self._waiting)
        while left > 0 and self._waiting:
            self._flying = self._take(left)
            left -= len(self._flying)
            try:
                await self._put(list(self._flying.values()))
            except BaseException:
                self._waiting = self._flying | self._waiting
                self._disarm()
                loop = asyncio.get_running_loop()
                self._armed = loop.call_later(min(PROBE * 2**self._failures, LAST_PROBE), self._start)
                self._failures += 1
                raise
            finally:
                self._flying = {}
        self._failures = 0

    def _take(self, most: int) -> dict[str, Turn]:
        """The turns of the next batch, the oldest ones, which are not queued any more."""
        batch: dict[str, Turn] = {}
        characters = 0
        for id, turn in self._waiting.items():
            if len(batch) == min(most, self._batch) or characters > BATCH_CHARACTERS:
                break
            batch[id] = turn
            characters += len(turn.asked) + len(turn.said) + sum([len(one.content) for one in turn.history])
        if len(batch) == len(self._waiting):
            self._waiting = {}
        else:
            for id in batch:
                del self._waiting[id]
        return batch

    async def _put(self, some: list[Turn]) -> None:
        """Writes a batch into the database, or else to the disk; raises SpillFull."""
        try:
            await self._write(some)
        except StoreDown as error:
            if self.healthy:
                log.warning("turns go to the disk: %s", error)
            self._ail()
            await self._spill(some)
            self._count("spilled", len(some))
        else:
            self._took()

    async def _write(self, some: list[Turn]) -> None:
        """Returns when these are committed, those apart that the database turns down; raises StoreDown."""
        linked = True
        while True:
            drafts = await self._drafts(some, linked)
            try:
                wrote = await self._db.write(turns.batch(drafts, self._db.seals))
            except Unlinked as error:
                linked = any(id in self._records for id in error.ids)  # else they went just now: keep all whole
                self._records.drop(error.ids)
            except StoreDown:
                raise
            except (StoreError, Mixed) as error:
                if middle := len(some) // 2:
                    for half in (some[:middle], some[middle:]):
                        await self._write(half)
                elif isinstance(error, StoreError):
                    await self._reject(some[0], error)
                return
            else:
                self._written(drafts, wrote)
                return

    def _written(self, drafts: Sequence[Draft], wrote: int) -> None:
        self._count("batches", 1)
        self._count("written", wrote)
        if wrote == len(drafts):
            for one in drafts:
                if one.record is not None:
                    self._records.put(one.id, one.record)

    async def _drafts(self, some: Sequence[Turn], linked: bool) -> list[Draft]:
        """The turns as they stand now, in slices, so that requests go on meanwhile."""
        parents = {turn.parent for turn in some if turn.parent} if linked else set()
        known = {id: self._records[id] for id in parents if id in self._records}
        if unknown := sorted(parents - known.keys() - {turn.id for turn in some}):
            known |= await self._db.read(lambda connection: turns.records(connection, unknown))
        drafts, at, began = [], moment(now()), time.perf_counter()
        for turn in some:
            drafts.append(one := turns.draft(turn, turn.ended, known, at))
            if one.ended:
                self._waiting.pop(one.id, None)  # it ended, and was queued again, since this batch was taken
            if one.record is not None and one.id in parents:
                known[one.id] = one.record
            if time.perf_counter() - began > SLICE:
                await asyncio.sleep(0)
                began = time.perf_counter()
        return drafts

    async def _reject(self, turn: Turn, error: StoreError) -> None:
        self._count("rejected", 1)
        self._refused[turn.id] = error
        if len(self._refused) > REFUSED:
            self._refused.popitem(last=False)
        log.error("turn %s of tenant %s is put aside: %s", turn.id, turn.tenant, error)
        try:
            await self._aside(turn)
        except SpillFull:
            self._count("lost", 1)
            log.error("turn %s of tenant %s is lost: it cannot be put aside either", turn.id, turn.tenant)

    # --- when the database is down

    def _took(self) -> None:
        self.healthy, self._proven = True, asyncio.get_running_loop().time()

    def _ail(self) -> None:
        self.healthy = False
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._probe(), name="newel-turns-probe")

    async def _probe(self) -> None:
        """Finds out when the database can be written again, though no turn comes."""
        delay = PROBE
        while not self.healthy:
            await asyncio.sleep(delay)
            delay = min(delay * 2, LAST_PROBE)
            await self._pulse()

    async def _pulse(self) -> bool:
        """Whether a row can be written."""
        try:
            await self._db.write(lambda connection: upsert(connection, tables.pulse, {"id": 1, "at": now()}, "at"))
        except StoreError:
            self._ail()
            return False
        self._took()
        return True


def _seen(task: asyncio.Task[None]) -> None:
    """Tells of a flush that failed, though perhaps nobody waited for it."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("turns wait in memory: %s", error)
