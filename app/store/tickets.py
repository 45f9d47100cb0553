"""Tickets: turns that wait for a person, are answered once, and whose answers go back into the conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.records import Ticket, now
from app.store import audit, outbox, tables
from app.store.database import insert_new
from app.store.errors import Conflict, NotFound

_FIELDS = tuple(field.name for field in fields(Ticket))
_TICKET = [tables.tickets.c[name] for name in _FIELDS]


async def insert(connection: AsyncConnection, ticket: Ticket) -> None:
    """Stores a new ticket; one that is there already stays as it is."""
    row: dict[str, Any] = {name: getattr(ticket, name) for name in _FIELDS}
    await insert_new(connection, tables.tickets, [row | {"closed_by": "", "closed_at": None, "delivered_in": ""}])


async def load(connection: AsyncConnection, *where: ColumnElement[bool], limit: int | None = None) -> list[Ticket]:
    """The tickets that match, the one that is due first first."""
    query = select(*_TICKET).where(*where).order_by(tables.tickets.c.due_at, tables.tickets.c.id).limit(limit)
    return [Ticket(**row) for row in (await connection.execute(query)).mappings()]


async def answer(connection: AsyncConnection, id: str, answer: str, by: str) -> Ticket:
    """The open ticket with its answer, which is announced; raises NotFound, or Conflict with who was first."""
    if not answer.strip():
        raise ValueError(f"the answer to {id} is empty")
    changes = {"state": "answered", "answer": answer, "answered_by": by, "answered_at": now()}
    ticket = await _change(connection, id, ("open",), changes)
    asked = select(tables.turns.c.asked).where(tables.turns.c.id == ticket.turn)
    await outbox.announce(connection, "ticket.answered", ticket, (await connection.execute(asked)).scalar_one())
    await audit.write(connection, by, "ticket.answer", id, {"tenant": ticket.tenant})
    return ticket


async def close(connection: AsyncConnection, id: str, by: str) -> Ticket:
    """The ticket, closed, answered or not; raises NotFound, or Conflict with who closed it."""
    changes = {"state": "closed", "closed_by": by, "closed_at": now()}
    ticket = await _change(connection, id, ("open", "answered"), changes)
    await audit.write(connection, by, "ticket.close", id, {"tenant": ticket.tenant})
    return ticket


async def _change(connection: AsyncConnection, id: str, before: Sequence[str], changes: dict[str, Any]) -> Ticket:
    table = tables.tickets
    statement = update(table).where(table.c.id == id, table.c.state.in_(before)).values(changes).returning(*_TICKET)
    changed = (await connection.execute(statement)).mappings().one_or_none()
    if changed is not None:
        return Ticket(**changed)
    row = (await connection.execute(select(table).where(table.c.id == id))).mappings().one_or_none()
    if row is None:
        raise NotFound(f"there is no ticket {id!r}")
    who: str = row["closed_by"] if row["state"] == "closed" else row["answered_by"]
    when: datetime = row["closed_at"] if row["state"] == "closed" else row["answered_at"]
    raise Conflict(f"ticket {id} was {row['state']} by {who} at {when:%Y-%m-%d %H:%M:%S} UTC")


async def mark_delivered(connection: AsyncConnection, ids: Sequence[str], turn: str) -> None:
    """Notes that the answers of these tickets were said in `turn`; the first time counts."""
    table = tables.tickets
    fresh = update(table).where(table.c.id.in_(ids), table.c.delivered_at.is_(None))
    await connection.execute(fresh.values(delivered_at=now(), delivered_in=turn))
