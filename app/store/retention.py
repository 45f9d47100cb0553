"""Retention: what is older than it has to be, taken out in small batches."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Select, and_, delete, exists, func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from app.records import RetentionKind, now
from app.store import audit, erasure, tables

KINDS: tuple[RetentionKind, ...] = ("turns", "withheld", "feedback", "deliveries")


def _old(kind: RetentionKind, before: datetime) -> Select[Any]:
    """The primary keys of what is too old. A turn stays while its ticket is open: somebody waits for its answer."""
    turn = tables.turns.c
    match kind:
        case "turns":
            waits = exists().where(tables.tickets.c.turn == turn.id, tables.tickets.c.state == "open")
            return select(turn.id).where(turn.created_at < before, ~waits)
        case "withheld":
            raw = tables.withheld.c
            return select(raw.turn, raw.kind).join(tables.turns, turn.id == raw.turn).where(turn.created_at < before)
        case "feedback":
            return select(tables.feedback.c.id).where(tables.feedback.c.created_at < before)
        case "deliveries":
            sent = tables.deliveries.c
            return select(sent.id).where(sent.state != "pending", sent.created_at < before)


async def count(connection: AsyncConnection, kind: RetentionKind, before: datetime) -> int:
    """How many are too old."""
    return (await connection.execute(select(func.count()).select_from(_old(kind, before).subquery()))).scalar_one()


async def some(connection: AsyncConnection, kind: RetentionKind, before: datetime) -> list[tuple[str, ...]]:
    """The keys of up to `erasure.BATCH` that are too old; read in a transaction that keeps no writer waiting."""
    return [tuple(row) for row in await connection.execute(_old(kind, before).limit(erasure.BATCH))]


async def remove(connection: AsyncConnection, kind: RetentionKind, keys: Sequence[tuple[str, ...]]) -> int:
    """How many of these were removed."""
    if kind == "turns":
        return (await erasure.remove(connection, [id for (id,) in keys])).turns
    table = tables.metadata.tables[kind]
    return (await connection.execute(delete(table).where(tuple_(*table.primary_key).in_(keys)))).rowcount


async def remove_conversations(connection: AsyncConnection, before: datetime) -> None:
    """Deletes the conversations that have no turn any more."""
    table, turn = tables.conversations, tables.turns
    used = exists().where(turn.c.tenant == table.c.tenant, turn.c.conversation == table.c.id)
    await connection.execute(delete(table).where(and_(table.c.last_at < before, ~used)))


async def note(connection: AsyncConnection, swept: dict[RetentionKind, int]) -> None:
    """Audits how much was removed."""
    await audit.write(connection, "newel", "privacy.sweep", f"{now():%Y-%m-%d}", dict[str, object](swept.items()))
