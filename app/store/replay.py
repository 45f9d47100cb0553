"""Turns to judge once more: with their raw texts, the reading of which is audited turn by turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.records import Turn
from app.store import audit, tables, turns

REASON = "replay"
"""The reason under which the withheld texts are read."""


@dataclass(frozen=True, slots=True)
class Logged:
    """A turn with its raw texts; `known` tells that its history was judged by this service before."""

    turn: Turn
    known: bool


async def logged(
    connection: AsyncConnection,
    actor: str,
    last: int,
    policy: str | None = None,
    tenant: str | None = None,
    since: datetime | None = None,
) -> list[Logged]:
    """The `last` newest turns that were judged, oldest first: those of a policy's name, a tenant, since a time."""
    table = tables.turns
    query = select(table.c.id).where(table.c.input_action.is_not(None))
    if policy is not None:
        query = query.where(table.c.policy.startswith(f"{policy}@", autoescape=True))
    query = query if tenant is None else query.where(table.c.tenant == tenant)
    query = query if since is None else query.where(table.c.created_at >= since)
    newest = query.order_by(table.c.created_at.desc(), table.c.id.desc()).limit(last).subquery()
    torn: set[str] = set()  # a judgement of a part of a conversation would be compared with that of the whole
    loaded = await turns.load(connection, table.c.id.in_(select(newest.c.id)), torn=torn)
    found = [turn for turn in loaded if turn.id not in torn]
    raw = await _withheld(connection, found, actor)
    known = await _known(connection, found)
    return [
        Logged(
            replace(turn, withheld_asked=raw.get((turn.id, "asked"), ""), withheld_said=raw.get((turn.id, "said"), "")),
            (turn.tenant, turn.head_hash) in known,
        )
        for turn in found
    ]


async def _withheld(connection: AsyncConnection, found: Sequence[Turn], actor: str) -> dict[tuple[str, str], str]:
    """The withheld texts by turn and kind; that each of these turns was read is in the audit log."""
    table, of = tables.withheld, {turn.id: turn.tenant for turn in found}
    rows = [
        row for ids in _some(list(of)) for row in await connection.execute(select(table).where(table.c.turn.in_(ids)))
    ]
    for id in sorted({row.turn for row in rows}):
        await audit.write(connection, actor, "withheld.read", id, {"tenant": of[id], "reason": REASON})
    return {
        (row.turn, row.kind): turns.unsealed(connection, of[row.turn], row.turn, row.kind, row.text) for row in rows
    }


async def _known(connection: AsyncConnection, found: Sequence[Turn]) -> set[tuple[str, str]]:
    """The (tenant, hash) with which a turn of this service ended: a history of that hash was judged before."""
    table = tables.turns
    hashes = sorted({turn.head_hash for turn in found if turn.head_hash})
    return {
        (row.tenant, row.tail_hash)
        for some in _some(hashes)
        for row in await connection.execute(
            select(table.c.tenant, table.c.tail_hash).where(table.c.tail_hash.in_(some))
        )
    }


def _some(values: Sequence[str], size: int = 500) -> list[Sequence[str]]:
    """The values in portions that a database takes as parameters."""
    return [values[at : at + size] for at in range(0, len(values), size)]
