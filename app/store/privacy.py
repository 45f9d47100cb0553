"""What is done about privacy, in steps that keep no writer waiting for long: sealing, erasing, sweeping."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

from app.records import Retention, RetentionKind, now
from app.store import erasure, exports, retention, sealed
from app.store.database import Database
from app.store.erasure import Mark, Removed, Trail, Whose
from app.store.errors import Conflict
from app.store.exports import Cleaned
from app.store.retention import KINDS
from app.store.spill import Spill

UNFINISHED = timedelta(minutes=10)
"""After so long an erasure that is not finished was cut off, and is finished by a sweep."""


@dataclass(frozen=True, slots=True)
class Erased:
    """What an erasure did: its id in the audit log, how much was removed, and what became of exported files.

    clean: False when a reader kept the write-ahead log of an SQLite database from being emptied, or copies of rows may
    be left in the file, which was not rewritten.
    """

    id: str
    removed: Removed
    exports: tuple[Cleaned, ...]
    clean: bool


# --- sealing


async def seal(db: Database, everything: bool) -> int:
    """How many withheld texts were not sealed with the first secret and are now: all, or only those that an earlier
    version stored in clear. Nothing of these stays in the file of an SQLite database."""
    count, after = 0, ("", "")
    while rows := await db.read(partial(sealed.page, everything=everything, after=after)):
        after = rows[-1][0], rows[-1][1]
        count += await db.write(partial(sealed.seal, rows=rows))
    if count:
        await db.compact(whole=True)
    return count


# --- erasing


async def erase(
    db: Database, spill: Spill, whose: Whose, actor: str, reason: str, source: str = "", compact: bool = True
) -> Erased:
    """What was removed of a person or of a conversation; see `Store.erase`."""
    mark = await db.write(lambda connection: erasure.mark(connection, whose, actor, reason))
    return await _finish(db, spill, mark, actor, source, compact)


async def _finish(db: Database, spill: Spill, mark: Mark, actor: str, source: str, compact: bool) -> Erased:
    removed, left = Removed(), Trail()
    while ids := await db.read(partial(erasure.some, made=mark)):
        left |= await db.read(partial(erasure.trail, ids=ids))
        removed += await db.write(partial(erasure.remove, ids=ids))
    removed += await db.write(partial(erasure.remove_rest, made=mark, source=source))
    removed += Removed(histories=await _blank(db, mark, left), spilled=await spill.remove(mark.covers))
    with suppress(Conflict):  # somebody has begun a turn there just now
        await db.write(partial(erasure.remove_conversations, made=mark))
    cleaned = await _clean_exports(db, mark)
    clean = await db.compact(whole=compact) and compact
    await db.write(partial(erasure.done, made=mark, removed=removed, actor=actor))
    return Erased(mark.id, removed, cleaned, clean)


async def _blank(db: Database, mark: Mark, left: Trail) -> int:
    """How many turns that are not removed repeated removed ones, and do not any more."""
    talks, new = set(left.conversations), left.tails
    while new and mark.whose.conversation:  # of one person the turns are removed in all conversations
        found = await _continued(db, mark, left, new)
        new = frozenset(tail for talk, tail in found if tail and talk not in talks)
        talks |= {talk for talk, _ in found}
    tenant, until = mark.whose.tenant, mark.at
    blank = partial(erasure.blank_histories, tenant=tenant, until=until)
    return sum([await db.write(partial(blank, conversations=some)) for some in portions(sorted(talks))])


async def _continued(db: Database, mark: Mark, left: Trail, tails: frozenset[str]) -> set[tuple[str, str]]:
    """(conversation, how it ended) of the turns that begin as one of these ended."""
    found, after = set[tuple[str, str]](), ""
    while rows := await db.read(partial(erasure.window, tenant=mark.whose.tenant, left=left, after=after)):
        after = rows[-1][0]
        found |= {(talk, tail) for _, talk, head, tail in rows if head in tails}
    return found


async def _clean_exports(db: Database, mark: Mark) -> tuple[Cleaned, ...]:
    held = await db.read(partial(exports.holding, mark=mark))
    return tuple([await _clean_export(db, host, folder, names) for (host, folder), names in sorted(held.items())])


async def _clean_export(db: Database, host: str, folder: str, names: set[str]) -> Cleaned:
    cleaned = await asyncio.to_thread(exports.clean, host, folder, names)
    if cleaned.found:
        await db.write(partial(exports.forget, host=host, folder=folder, turns=sorted(names)))
    return cleaned


# --- sweeping


async def sweep(db: Database, spill: Spill, kept: Retention, dry: bool) -> dict[RetentionKind, int]:
    """How much was too old; see `Store.sweep`."""
    moment, swept = now(), dict[RetentionKind, int]()
    for kind in KINDS:
        if (before := kept.cutoff(kind, moment)) is None:
            continue
        count = partial(retention.count, kind=kind, before=before)
        swept[kind] = await db.read(count) if dry else await _sweep(db, kind, before)
    if not dry:
        await _erase_again(db, spill)
        if any(swept.values()):
            await db.write(partial(retention.note, swept=swept))
            await db.compact(whole=False)
    return swept


async def _sweep(db: Database, kind: RetentionKind, before: datetime) -> int:
    count = 0
    while keys := await db.read(partial(retention.some, kind=kind, before=before)):
        count += await db.write(partial(retention.remove, kind=kind, keys=keys))
    if kind == "turns" and count:
        with suppress(Conflict):
            await db.write(partial(retention.remove_conversations, before=before))
    return count


async def _erase_again(db: Database, spill: Spill) -> None:
    """Finishes erasures that were cut off, and takes what was erased elsewhere out of the files of this machine."""
    marks = await db.read(erasure.marks)
    for mark in marks:
        if mark.done_at is None and mark.at < now() - UNFINISHED:
            await _finish(db, spill, mark, "newel", "", True)
    if marks and (spill.waiting or spill.aside):
        await spill.remove(lambda turn: any(mark.covers(turn) for mark in marks))
    for mark in marks:
        await _clean_exports(db, mark)


def portions(names: Sequence[str], size: int = 200) -> Iterator[Sequence[str]]:
    """The names in portions that a database takes as parameters."""
    return (names[at : at + size] for at in range(0, len(names), size))
