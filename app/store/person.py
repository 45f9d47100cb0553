"""What is kept of a person or a conversation, for somebody who has to be told."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.store import audit, tables, turns
from app.store.erasure import Whose


async def everything(connection: AsyncConnection, whose: Whose, actor: str, reason: str) -> dict[str, Any]:
    """All that is kept of a person or conversation, rows by table, what was withheld too; the reading is audited."""
    if not actor.strip() or not reason.strip():
        raise ValueError("what is kept of a person is shown only to somebody, for a reason: give both")
    names = {"tenant": whose.tenant, "subject": whose.subject, "conversation": whose.conversation, "reason": reason}
    await audit.write(connection, actor, "privacy.export", whose.subject or whose.conversation, names)
    mine = select(tables.turns.c.id).where(whose.rows(tables.turns))
    handed = select(tables.tickets.c.id).where(tables.tickets.c.turn.in_(mine))
    wanted: dict[str, ColumnElement[bool]] = {
        "turns": whose.rows(tables.turns),
        "verdicts": tables.verdicts.c.turn.in_(mine),
        "withheld": tables.withheld.c.turn.in_(mine),
        "feedback": tables.feedback.c.turn.in_(mine),
        "tickets": tables.tickets.c.turn.in_(mine),
        "deliveries": tables.deliveries.c.ticket.in_(handed),
        "exported": whose.rows(tables.exported),
    }
    found = {name: await _rows(connection, tables.metadata.tables[name], where) for name, where in wanted.items()}
    for row in found["withheld"]:
        row["text"] = turns.unsealed(connection, whose.tenant, row["turn"], row["kind"], row["text"])
    return found


async def _rows(connection: AsyncConnection, table: Any, where: ColumnElement[bool]) -> list[dict[str, Any]]:
    query = select(table).where(where).order_by(*table.primary_key)
    return [{str(name): value for name, value in row.items()} for row in (await connection.execute(query)).mappings()]
