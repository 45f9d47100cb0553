"""Idempotency keys as rows: whose insert comes first owns the key, until it is answered or its lease ends."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.records import now
from app.store import tables
from app.store.database import insert_new

Outcome = Literal["new", "running", "done", "mismatch"]


@dataclass(frozen=True, slots=True)
class Slot:
    """An idempotency key of an API key; `hash` stands for the key itself."""

    tenant: str
    key: str
    hash: str


@dataclass(frozen=True, slots=True)
class Found:
    """What became of a claim. turn: what answered the key, where it is done."""

    outcome: Outcome
    turn: str = ""


def _of(slot: Slot) -> tuple[ColumnElement[bool], ...]:
    table = tables.idempotency.c
    return table.tenant == slot.tenant, table.key == slot.key, table.hash == slot.hash


async def claim(connection: AsyncConnection, slot: Slot, body: str, owner: str, lease: float, ttl: float) -> Found:
    """New where `owner` has the key now, for `lease` seconds; else how it stands with who had it first.

    body: an HMAC of what was sent. ttl: seconds for which the key is known, from now.
    """
    moment = await _clock(connection)
    mine: dict[str, Any] = {"body": body, "turn": None, "state": "running", "owner": owner}
    mine |= {"leased_until": moment + timedelta(seconds=lease), "expires_at": moment + timedelta(seconds=ttl)}
    whose = {"tenant": slot.tenant, "key": slot.key, "hash": slot.hash}
    if await insert_new(connection, tables.idempotency, [whose | mine]):
        return Found("new")
    query = select(tables.idempotency).where(*_of(slot)).with_for_update()
    row = (await connection.execute(query)).mappings().one_or_none()
    if row is None:  # given up in between
        return Found("running")
    if row["expires_at"] > moment:
        if row["body"] != body:
            return Found("mismatch")
        if row["state"] == "done":
            return Found("done", row["turn"])
        if row["leased_until"] > moment:
            return Found("running")
    await connection.execute(update(tables.idempotency).where(*_of(slot)).values(mine))
    return Found("new")


async def complete(connection: AsyncConnection, slot: Slot, owner: str, turn: str) -> bool:
    """True when the key is answered by this turn; False when the lease had ended and another has the key."""
    mine = (*_of(slot), tables.idempotency.c.owner == owner)
    done = await connection.execute(update(tables.idempotency).where(*mine).values(state="done", turn=turn))
    return done.rowcount == 1


async def abandon(connection: AsyncConnection, slot: Slot, owner: str) -> None:
    """Gives the key up, so that the next request with it is a new one; nothing if another has it or it is answered."""
    table = tables.idempotency.c
    await connection.execute(
        delete(tables.idempotency).where(*_of(slot), table.owner == owner, table.state == "running")
    )


async def delete_expired(connection: AsyncConnection) -> int:
    """How many keys had expired and are forgotten now."""
    moment = await _clock(connection)
    return (
        await connection.execute(delete(tables.idempotency).where(tables.idempotency.c.expires_at <= moment))
    ).rowcount


async def _clock(connection: AsyncConnection) -> datetime:
    """The time of PostgreSQL's own clock, the same for all replicas; with SQLite there is only this machine's."""
    if connection.dialect.name != "postgresql":
        return now()
    moment: datetime = (await connection.execute(select(func.clock_timestamp()))).scalar_one()
    return moment
