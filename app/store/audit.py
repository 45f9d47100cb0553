"""The audit log: who did what to which thing; ids and names of fields, never what people wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.records import now
from app.store import tables


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One thing that somebody did."""

    at: datetime
    actor: str
    action: str
    subject: str
    detail: dict[str, object]


async def write(
    connection: AsyncConnection, actor: str, action: str, subject: str, detail: Mapping[str, object]
) -> None:
    """Adds an entry, in the transaction of what it tells about."""
    row = {"at": now(), "actor": actor, "action": action, "subject": subject, "detail": dict(detail)}
    await connection.execute(insert(tables.audit).values(row))


async def newest(connection: AsyncConnection, limit: int) -> list[AuditEntry]:
    """The last `limit` entries, newest first."""
    columns = [column for column in tables.audit.c if column.name != "id"]
    rows = await connection.execute(select(*columns).order_by(tables.audit.c.id.desc()).limit(limit))
    return [AuditEntry(**row) for row in rows.mappings()]
