"""What people thought of turns: the newest word of each person counts, and the earlier ones are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.records import Feedback, FeedbackKind
from app.store import tables, turns
from app.store.errors import Conflict
from app.store.tables import storable

_FIELDS = tuple(field.name for field in fields(Feedback))
FEEDBACK = [tables.feedback.c[name] for name in _FIELDS]
_NATURAL = ("tenant", "turn", "kind", "other", "source")
_BODY = (*_NATURAL, "value", "text", "choice")


def _same(one: Feedback, other: Feedback) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in _BODY)


async def add(
    connection: AsyncConnection, said: Sequence[Feedback], idempotency_key: str | None
) -> list[tuple[Feedback, bool]]:
    """(the feedback as stored, whether it was created) for all that one person said at once, each of another kind.

    The same idempotency key with the same body, or the same body again, gives the first one. Another body from the
    same source about the same thing takes its place. Raises NotFound for a turn that is not the tenant's, and
    Conflict for an idempotency key that came with another body; then nothing is stored.
    """
    said = [replace(one, text=storable(one.text), source=storable(one.source)) for one in said]
    tenant = said[0].tenant
    named = {name for one in said for name in (one.turn, one.other) if name}
    await turns.require(connection, tenant, sorted(named), lock=True)  # two clicks at once: one waits
    if idempotency_key is not None and (known := await _keyed(connection, tenant, idempotency_key)):
        if known.keys() == {one.kind for one in said} and all(_same(known[one.kind], one) for one in said):
            return [(known[one.kind], False) for one in said]
        first = min(known.values(), key=lambda one: one.created_at)
        raise Conflict(f"this idempotency key was used for feedback {first.id}, with another body")
    return [await _put(connection, one, idempotency_key) for one in said]


async def _keyed(connection: AsyncConnection, tenant: str, idempotency_key: str) -> dict[FeedbackKind, Feedback]:
    """What came with this key, by kind."""
    table = tables.feedback
    query = select(*FEEDBACK).where(table.c.tenant == tenant, table.c.idempotency_key == idempotency_key)
    found = [Feedback(**row) for row in (await connection.execute(query)).mappings()]
    return {one.kind: one for one in found}


async def _put(connection: AsyncConnection, new: Feedback, idempotency_key: str | None) -> tuple[Feedback, bool]:
    table = tables.feedback
    natural = [table.c[name] == getattr(new, name) for name in _NATURAL]
    row = (await connection.execute(select(*FEEDBACK).where(*natural, table.c.current))).mappings().one_or_none()
    if row is not None and idempotency_key is None and _same(Feedback(**row), new):
        return Feedback(**row), False
    await connection.execute(update(table).where(*natural, table.c.current).values(current=False))
    values = {name: getattr(new, name) for name in _FIELDS} | {"idempotency_key": idempotency_key, "current": True}
    await connection.execute(insert(table).values(values))
    return new, True


async def of_turn(connection: AsyncConnection, turn: str, tenant: str, history: bool) -> list[Feedback]:
    """What was said about a turn, oldest first: what counts now, or with `history` all of it."""
    table = tables.feedback
    query = select(*FEEDBACK).where(table.c.tenant == tenant, table.c.turn == turn)
    rows = await connection.execute(
        (query if history else query.where(table.c.current)).order_by(table.c.created_at, table.c.id)
    )
    return [Feedback(**row) for row in rows.mappings()]
