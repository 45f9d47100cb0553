"""The audit log: who did what to which thing; ids and names of fields, never what people wrote.

Entries form a chain (`app.store.chain`). Its head is one row, which every writer locks first: so the chain never forks,
however many gateways write. A head that was not signed by us is extended all the same, since a service whose audited
actions could be stopped by one changed row would be worse; that it was so is an entry of its own, MENDED.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Literal

from sqlalchemy import RowMapping, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.records import now
from app.sealing import Signed
from app.store import tables
from app.store.chain import EMPTY, Head, link
from app.store.database import Database, seals_of, upsert
from app.store.tables import storable

MENDED = "audit.mended"
"""An entry before which the head of the log was not as this service had signed it."""
PAGE = 1000
Fault = Literal["changed", "missing", "moved", "mended", "tail cut", "added", "head changed", "head unsigned", "other"]
MEANING: dict[Fault, str] = {
    "changed": "is not what was written",
    "missing": "is not there any more",
    "moved": "does not follow the one before it: entries were removed, added or put elsewhere",
    "mended": "was written when the head of the log was not as this service had signed it",
    "tail cut": "is not there any more, nor is what came after it",
    "added": "was not written by this service: the signed head ends before it",
    "head changed": "is where the head points, whose signature is wrong",
    "head unsigned": "is where the head points, which none of the secrets here has signed",
    "other": "is another one than when the head was taken",
}
_HEAD = select(tables.audit_head).where(tables.audit_head.c.id == 1)
_SHOWN = ("at", "actor", "action", "subject", "detail")


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One thing that somebody did; `place` counts from 1, and `hash` covers it and all before it."""

    at: datetime
    actor: str
    action: str
    subject: str
    detail: dict[str, object]
    place: int = 0
    hash: str = ""


@dataclass(frozen=True, slots=True)
class Break:
    """Where the log is not what was written: the place of the entry, and what is wrong with it."""

    place: int
    fault: Fault

    def __str__(self) -> str:
        """A sentence for people."""
        return f"entry {self.place} {MEANING[self.fault]}"


@dataclass(frozen=True, slots=True)
class Audited:
    """What a check found: how many entries were good, where the log ends, and what is broken first, or None."""

    entries: int
    head: Head
    broken: Break | None


async def write(
    connection: AsyncConnection, actor: str, action: str, subject: str, detail: Mapping[str, object]
) -> None:
    """Adds an entry, in the transaction of what it tells about. From here to its end other writers of the log wait."""
    head, signature = await _signed_head(connection)
    if signature != "ours" and head != EMPTY:
        told = {"entries": head.entries, "hash": head.hash, "signature": signature}
        head = await _add(connection, head, "newel", MENDED, "audit", told)
    head = await _add(connection, head, actor, action, subject, detail)
    key, mac = seals_of(connection).signed(head.value)
    values = {"entries": head.entries, "hash": head.hash, "key": key, "mac": mac}
    await upsert(connection, tables.audit_head, values | {"id": 1}, *values)


async def _signed_head(connection: AsyncConnection) -> tuple[Head, Signed]:
    """The head, locked, and whose signature it bears; without one the last entry, unsigned."""
    row = (await connection.execute(_HEAD.with_for_update())).mappings().one_or_none()
    if row is None:
        last = next(iter(await newest(connection, 1)), None)
        return (Head(last.place, last.hash) if last else EMPTY), "changed"
    head = Head(row["entries"], row["hash"])
    return head, seals_of(connection).signature(head.value, row["key"], row["mac"])


async def _add(
    connection: AsyncConnection, head: Head, actor: str, action: str, subject: str, detail: Mapping[str, object]
) -> Head:
    """The head after one more entry, which is as the database will give it back."""
    at, actor, action, subject = now(), storable(actor), storable(action), storable(subject)
    plain = json.loads(json.dumps(dict(detail)))
    after = link(head, at, actor, action, subject, plain)
    row = {"id": after.entries, "at": at, "actor": actor, "action": action, "subject": subject, "detail": plain}
    await connection.execute(insert(tables.audit).values(row | {"previous": head.hash, "hash": after.hash}))
    return after


async def newest(connection: AsyncConnection, limit: int, before: int | None = None) -> list[AuditEntry]:
    """The last `limit` entries, newest first; with `before` those before that place."""
    table = tables.audit
    columns = [table.c[name] for name in (*_SHOWN, "hash")]
    query = select(*columns, table.c.id.label("place")).order_by(table.c.id.desc()).limit(limit)
    rows = await connection.execute(query if before is None else query.where(table.c.id < before))
    return [AuditEntry(**row) for row in rows.mappings()]


async def head(connection: AsyncConnection) -> Head:
    """Where the log ends now, to be kept where nobody who can write to the database can write."""
    row = (await connection.execute(_HEAD)).mappings().one()
    return Head(row["entries"], row["hash"])


async def page(connection: AsyncConnection, after: int) -> list[RowMapping]:
    """Up to `PAGE` rows after a place, in order."""
    table = tables.audit
    rows = await connection.execute(select(table).where(table.c.id > after).order_by(table.c.id).limit(PAGE))
    return list(rows.mappings().all())


async def verify(db: Database, kept: Head | None, after: Head | None = None) -> Audited:
    """What a check of the whole log found, or of what came after a head that somebody looked into.

    kept: a head that was taken earlier, which the log must contain.
    """
    reached = after or EMPTY
    if after is not None and not await db.read(partial(holds, known=after)):
        return Audited(0, await db.read(head), Break(after.entries, "other"))
    return await _verify(db, kept, reached)


async def holds(connection: AsyncConnection, known: Head) -> bool:
    """True when the entry at this place has this hash."""
    query = select(tables.audit.c.hash).where(tables.audit.c.id == known.entries)
    return known == EMPTY or (await connection.execute(query)).scalar_one_or_none() == known.hash


async def _verify(db: Database, kept: Head | None, reached: Head) -> Audited:
    while True:
        rows = await db.read(partial(page, after=reached.entries))
        for row in rows:
            if isinstance(after := follow(reached, row), Break):
                return Audited(reached.entries, await db.read(head), after)
            if kept is not None and kept.entries == after.entries and kept.hash != after.hash:
                return Audited(reached.entries, await db.read(head), Break(kept.entries, "other"))
            reached = after
        if len(rows) < PAGE:
            break
    found = await db.write(partial(ending, reached=reached))
    if found.broken is None and kept is not None and kept.entries > found.entries:
        return replace(found, broken=Break(found.entries + 1, "tail cut"))
    return found


def follow(head: Head, row: RowMapping) -> Head | Break:
    """The head after this entry, or what is wrong with it after that head."""
    place = head.entries + 1
    own = link(Head(row["id"] - 1, row["previous"]), *(row[name] for name in _SHOWN))
    if own.hash != row["hash"]:
        return Break(row["id"], "changed")
    if row["id"] != place:
        return Break(place, "missing")
    if row["previous"] != head.hash:
        return Break(place, "moved")
    return Break(place, "mended") if row["action"] == MENDED else own


async def ending(connection: AsyncConnection, reached: Head) -> Audited:
    """What became of a check that was good as far as `reached`: the last entries and the head, which is locked."""
    head, signature = await _signed_head(connection)
    while rows := await page(connection, reached.entries):
        for row in rows:
            after = follow(reached, row)
            if isinstance(after, Break):
                return Audited(reached.entries, head, after)
            reached = after
    return Audited(reached.entries, head, _end(reached, head, signature))


def _end(reached: Head, head: Head, signature: Signed) -> Break | None:
    if head.entries > reached.entries:
        return Break(reached.entries + 1, "tail cut")
    if head.entries < reached.entries:
        return Break(head.entries + 1, "added")
    if head.hash != reached.hash or (signature == "changed" and head != EMPTY):
        return Break(head.entries, "head changed")
    return Break(head.entries, "head unsigned") if signature == "unknown" else None
