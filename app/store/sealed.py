"""Withheld texts that are not sealed, or not with the secret of today."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import bindparam, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.sealing import MARK, Unreadable
from app.store import tables
from app.store.database import seals_of

PAGE = 500
Row = tuple[str, str, str, str]
"""(turn, kind, tenant, text)."""
_SEAL = (
    update(tables.withheld)
    .where(
        tables.withheld.c.turn == bindparam("of"),
        tables.withheld.c.kind == bindparam("side"),
        tables.withheld.c.text == bindparam("before"),
    )
    .values(text=bindparam("after"))
)


async def page(connection: AsyncConnection, everything: bool, after: tuple[str, str]) -> list[Row]:
    """The rows after (turn, kind) that are in clear, or with `everything` that another secret than the first sealed."""
    table, turn, seals = tables.withheld, tables.turns, seals_of(connection)
    begins = f"{MARK}:{seals.current_key}:" if everything else f"{MARK}:"
    query = (
        select(table.c.turn, table.c.kind, turn.c.tenant, table.c.text)
        .join(turn, turn.c.id == table.c.turn)
        .where(tuple_(table.c.turn, table.c.kind) > after, ~table.c.text.startswith(begins, autoescape=True))
    )
    rows = await connection.execute(query.order_by(table.c.turn, table.c.kind).limit(PAGE))
    return [(row.turn, row.kind, row.tenant, row.text) for row in rows]


async def seal(connection: AsyncConnection, rows: Sequence[Row]) -> int:
    """How many of these rows are sealed now; what no secret opens stays as it is."""
    seals, values = seals_of(connection), []
    for turn, kind, tenant, text in rows:
        try:
            plain = seals.unseal(tenant, turn, kind, text)
        except Unreadable:
            continue
        after = seals.seal(tenant, turn, kind, plain)
        values.append({"of": turn, "side": kind, "before": text, "after": after})
    if values:
        await connection.execute(_SEAL, values)
    return len(values)
