"""Policy versions as they were written, and which one of each name is active."""

from __future__ import annotations

from dataclasses import fields
from datetime import datetime

from sqlalchemy import ScalarSelect, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.records import PolicyVersion, now
from app.store import audit, tables
from app.store.database import insert_new
from app.store.errors import NotFound

_PLAIN = [tables.policies.c[field.name] for field in fields(PolicyVersion) if field.name != "activated_at"]
ACTIVATIONS = ("policy.activate", "policy.rollback")
"""What the audit log calls it when a version becomes the active one."""


def _activated_at() -> ScalarSelect[datetime]:
    """When a version became the active one for the last time, as the audit log tells."""
    log, table = tables.audit, tables.policies
    entry = (log.c.subject == table.c.name + "@" + table.c.version) & log.c.action.in_(ACTIVATIONS)
    return select(log.c.at).where(entry).order_by(log.c.id.desc()).limit(1).correlate(table).scalar_subquery()


async def put(connection: AsyncConnection, name: str, source: str, version: str, by: str) -> PolicyVersion:
    """The version as stored, not active yet; one that is there already stays as it is."""
    row = {"name": name, "version": version, "source": source, "active": False, "created_at": now(), "created_by": by}
    if await insert_new(connection, tables.policies, [row]):
        await audit.write(connection, by, "policy.put", f"{name}@{version}", {})
    return next(stored for stored in await versions(connection, name) if stored.version == version)


async def activate(connection: AsyncConnection, name: str, version: str, by: str) -> PolicyVersion:
    """The version, now the active one of its name; raises NotFound. Going back to an older one is a rollback."""
    table = tables.policies
    every = select(*_PLAIN).where(table.c.name == name).order_by(table.c.version)  # in one order, or two would deadlock
    rows = await connection.execute(every.with_for_update())
    stored = {row["version"]: PolicyVersion(**row) for row in rows.mappings()}
    if version not in stored:
        raise NotFound(f"there is no version {version!r} of policy {name!r}: put it first")
    chosen, current = stored[version], next((policy for policy in stored.values() if policy.active), None)
    if current == chosen:
        return chosen
    await connection.execute(update(table).where(table.c.name == name, table.c.active).values(active=False))
    await connection.execute(update(table).where(table.c.name == name, table.c.version == version).values(active=True))
    back = current is not None and chosen.created_at < current.created_at
    detail = {"before": current.version if current else ""}
    await audit.write(connection, by, "policy.rollback" if back else "policy.activate", f"{name}@{version}", detail)
    return next(policy for policy in await versions(connection, name) if policy.active)


async def active(connection: AsyncConnection) -> dict[str, str]:
    """The active version of every policy, by its name."""
    table = tables.policies
    rows = await connection.execute(select(table.c.name, table.c.version).where(table.c.active))
    return {row.name: row.version for row in rows}


async def versions(connection: AsyncConnection, name: str | None = None, active: bool = False) -> list[PolicyVersion]:
    """The versions of one policy or of all, by name and newest first; with `active` only those in force."""
    table = tables.policies
    query = select(*_PLAIN, _activated_at().label("activated_at")).order_by(
        table.c.name, table.c.created_at.desc(), table.c.version
    )
    query = query if name is None else query.where(table.c.name == name)
    rows = await connection.execute(query.where(table.c.active) if active else query)
    return [PolicyVersion(**row) for row in rows.mappings()]
