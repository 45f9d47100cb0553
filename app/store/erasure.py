"""Erasure: everything that is kept of a person or a conversation, taken out; and what tells late writers not to bring
it back.

A mark is written first, so that a turn that was in flight, queued or spilled when it was erased is not stored
afterwards. Rows go in small batches, each its own transaction. What was left open by a crash is finished by a sweep.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

from sqlalchemy import ColumnElement, and_, delete, exists, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.records import Turn, new_id, now
from app.store import audit, tables
from app.store.database import moment

BATCH = 200
"""Turns that one transaction removes: some ten milliseconds, in which other writers wait."""
WINDOW = 5000
"""Rows of one look for turns that repeat others."""
ERASED = "[erased]"
"""What stands in a turn of somebody else for a person's answer that was brought in it."""


@dataclass(frozen=True, slots=True)
class Whose:
    """What is meant: all of one person (`subject`, a pseudonym) or of one conversation of a tenant."""

    tenant: str
    subject: str = ""
    conversation: str = ""

    def __post_init__(self) -> None:
        if bool(self.subject) == bool(self.conversation):
            raise ValueError("say whose texts they are: a person's or a conversation's, one of both")

    def rows(self, table: Any) -> ColumnElement[bool]:
        """The rows of a table with the columns tenant, subject and conversation."""
        mine = table.c.subject == self.subject if self.subject else table.c.conversation == self.conversation
        return and_(table.c.tenant == self.tenant, mine)


@dataclass(frozen=True, slots=True)
class Mark:
    """An erasure: of whose, and turns that began until when."""

    id: str
    whose: Whose
    at: datetime
    done_at: datetime | None = None

    def takes(self, tenant: str, conversation: str, subject: str, began: str) -> bool:
        """True for a turn that is not to be stored any more; `began` as `database.moment` gives it."""
        mine = subject == self.whose.subject if self.whose.subject else conversation == self.whose.conversation
        return tenant == self.whose.tenant and mine and began <= moment(self.at)

    def covers(self, turn: Turn) -> bool:
        """True for a turn that is not to be kept any more."""
        return self.takes(turn.tenant, turn.conversation, turn.subject, moment(turn.created_at))


@dataclass(frozen=True, slots=True)
class Removed:
    """How many rows of each kind were removed; `histories` are other turns that lost what they repeated."""

    turns: int = 0
    withheld: int = 0
    feedback: int = 0
    tickets: int = 0
    deliveries: int = 0
    values: int = 0
    histories: int = 0
    spilled: int = 0

    def __add__(self, other: Removed) -> Removed:
        """The sum, field by field."""
        return Removed(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


# --- marks


async def mark(connection: AsyncConnection, whose: Whose, actor: str, reason: str) -> Mark:
    """A new mark, audited with who wants it and why."""
    if not actor.strip() or not reason.strip():
        raise ValueError("texts are erased only by somebody, for a reason: give both")
    made = Mark(new_id("erase_"), whose, now())
    names = {"tenant": whose.tenant, "subject": whose.subject, "conversation": whose.conversation}
    await connection.execute(tables.erasures.insert().values(names | {"id": made.id, "at": made.at, "done_at": None}))
    await audit.write(connection, actor, "privacy.erase", made.id, names | {"reason": reason})
    return made


async def done(connection: AsyncConnection, made: Mark, removed: Removed, actor: str) -> None:
    """Notes that nothing is left to remove; audited with how much it was."""
    ended = update(tables.erasures).where(tables.erasures.c.id == made.id, tables.erasures.c.done_at.is_(None))
    if (await connection.execute(ended.values(done_at=now()))).rowcount:
        counts = {name: getattr(removed, name) for name in removed.__dataclass_fields__}
        await audit.write(connection, actor, "privacy.erased", made.id, {"tenant": made.whose.tenant} | counts)


async def marks(connection: AsyncConnection, since: datetime | None = None, unfinished: bool = False) -> list[Mark]:
    """The marks that were set at or after `since`, the oldest first, or those whose work is not finished."""
    table = tables.erasures
    query = select(table).order_by(table.c.at)
    query = query if since is None else query.where(table.c.at >= since)
    query = query.where(table.c.done_at.is_(None)) if unfinished else query
    return [
        Mark(row.id, Whose(row.tenant, row.subject, row.conversation), row.at, row.done_at)
        for row in await connection.execute(query)
    ]


class Begun(Protocol):
    """What is about to be written: `conversation` starts with tenant, conversation, subject and when the turn began
    (`database.moment`)."""

    conversation: tuple[Any, ...]


Drafted = TypeVar("Drafted", bound=Begun)


async def kept(connection: AsyncConnection, drafts: Sequence[Drafted]) -> list[Drafted]:
    """Those of these turns that no erasure covers, asked in the transaction that inserts them."""
    if not drafts:
        return []
    first = min(one.conversation[3] for one in drafts)
    after = await marks(connection, datetime.fromisoformat(first).replace(tzinfo=UTC))
    return [one for one in drafts if not any(mark.takes(*one.conversation[:4]) for mark in after)]


def none_since(connection: sqlite3.Connection, began: str) -> bool:
    """True when no erasure covers what began at `began` (`database.moment`) or later; for `database.Quick`."""
    return connection.execute("SELECT 1 FROM erasures WHERE at >= ? LIMIT 1", (began,)).fetchone() is None


# --- rows


async def some(connection: AsyncConnection, made: Mark) -> list[str]:
    """The ids of up to `BATCH` turns that the mark covers."""
    table = tables.turns
    query = select(table.c.id).where(made.whose.rows(table), table.c.created_at <= made.at).limit(BATCH)
    return list((await connection.execute(query)).scalars())


async def remove(connection: AsyncConnection, ids: Sequence[str]) -> Removed:
    """What went with these turns: they and everything that hangs on them."""
    said, handed, sent = tables.feedback, tables.tickets, tables.deliveries
    mine = select(handed.c.id).where(handed.c.turn.in_(ids))
    histories = await _unsay_answers(connection, ids)
    deliveries = await _gone(connection, sent, sent.c.ticket.in_(mine))
    feedback = await _gone(connection, said, or_(said.c.turn.in_(ids), said.c.other.in_(ids)))
    tickets = await _gone(connection, handed, handed.c.turn.in_(ids))
    await _gone(connection, tables.verdicts, tables.verdicts.c.turn.in_(ids))
    withheld = await _gone(connection, tables.withheld, tables.withheld.c.turn.in_(ids))
    owners = [f"turn:{id}" for id in ids]
    values = await _gone(connection, tables.vault, tables.vault.c.owner.in_(owners))
    if (answers := tables.metadata.tables.get("idempotency")) is not None:
        await _gone(connection, answers, answers.c.turn.in_(ids))
    count = await _gone(connection, tables.turns, tables.turns.c.id.in_(ids))
    return Removed(count, withheld, feedback, tickets, deliveries, values, histories)


async def _gone(connection: AsyncConnection, table: Any, where: ColumnElement[bool]) -> int:
    return (await connection.execute(delete(table).where(where))).rowcount


async def _unsay_answers(connection: AsyncConnection, ids: Sequence[str]) -> int:
    """How many other turns brought the answer to a ticket of these turns, and lost what was said in them."""
    handed, table = tables.tickets, tables.turns
    brought = select(handed.c.delivered_in).where(handed.c.turn.in_(ids), handed.c.delivered_in != "")
    theirs = (
        update(table)
        .where(table.c.id.in_(brought), table.c.id.not_in(ids))
        .values(said=ERASED, history=[], parent=None, linked=False)
    )
    return (await connection.execute(theirs)).rowcount


async def remove_rest(connection: AsyncConnection, made: Mark, source: str) -> Removed:
    """What is kept of a person or conversation beside turns: values of the vault, and what they said of others' turns.

    source: what the person is called where they give feedback, beside the pseudonym.
    """
    whose, vault, said = made.whose, tables.vault, tables.feedback
    mine = vault.c.owner == whose.subject if whose.subject else vault.c.conversation == whose.conversation
    values = await _gone(connection, vault, and_(vault.c.tenant == whose.tenant, mine))
    names = [name for name in (whose.subject, source) if name]
    by_them = and_(said.c.tenant == whose.tenant, said.c.source.in_(names), said.c.created_at <= made.at)
    feedback = await _gone(connection, said, by_them) if names else 0
    return Removed(values=values, feedback=feedback)


async def remove_conversations(connection: AsyncConnection, made: Mark) -> None:
    """Deletes the conversations that have no turn any more; of those that others take part in, only the name goes."""
    table, turn = tables.conversations, tables.turns
    mine = table.c.subject == made.whose.subject if made.whose.subject else table.c.id == made.whose.conversation
    ours = and_(table.c.tenant == made.whose.tenant, mine)
    used = exists().where(turn.c.tenant == table.c.tenant, turn.c.conversation == table.c.id)
    await connection.execute(delete(table).where(ours, ~used))
    if made.whose.subject:
        await connection.execute(update(table).where(ours, table.c.created_at <= made.at).values(subject=""))


# --- what others repeat


@dataclass(frozen=True, slots=True)
class Trail:
    """By what turns that repeat removed ones are found: their conversations, subjects, and how each ended."""

    conversations: frozenset[str] = frozenset()
    subjects: frozenset[str] = frozenset()
    tails: frozenset[str] = frozenset()

    def __or__(self, other: Trail) -> Trail:
        """Both together."""
        talks, people = self.conversations | other.conversations, self.subjects | other.subjects
        return Trail(talks, people, self.tails | other.tails)


async def trail(connection: AsyncConnection, ids: Sequence[str]) -> Trail:
    """The trail of turns that are about to be removed."""
    table = tables.turns
    query = select(table.c.conversation, table.c.subject, table.c.tail_hash).where(table.c.id.in_(ids))
    rows = (await connection.execute(query)).all()
    talks, people = (frozenset(row[place] for row in rows) for place in (0, 1))
    return Trail(talks, people, frozenset(row.tail_hash for row in rows if row.tail_hash))


async def window(connection: AsyncConnection, tenant: str, left: Trail, after: str) -> list[tuple[str, str, str, str]]:
    """(id, conversation, head hash, tail hash) of `WINDOW` turns of the trail's subjects, after an id.

    A history that is sent with another conversation's id is recognised by its hash, in which the subject counts.
    """
    table = tables.turns
    query = select(table.c.id, table.c.conversation, table.c.head_hash, table.c.tail_hash)
    mine = (table.c.tenant == tenant, table.c.subject.in_(sorted(left.subjects)), table.c.id > after)
    rows = await connection.execute(query.where(*mine).order_by(table.c.id).limit(WINDOW))
    return [(row.id, row.conversation, row.head_hash, row.tail_hash) for row in rows]


async def blank_histories(
    connection: AsyncConnection, tenant: str, conversations: Sequence[str], until: datetime
) -> int:
    """How many turns of these conversations repeated what was said before, and do not any more.

    All of them: the places in a history that point into another one must not come to point elsewhere.
    """
    table = tables.turns
    mine = and_(table.c.tenant == tenant, table.c.conversation.in_(conversations), table.c.created_at <= until)
    return (await connection.execute(update(table).where(mine).values(history=[], parent=None, linked=False))).rowcount
