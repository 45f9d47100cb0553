"""What people thought of turns: the newest word of each person counts, and the earlier ones are kept."""

from __future__ import annotations

from dataclasses import fields, replace

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.records import Feedback
from app.store import tables, turns
from app.store.errors import Conflict
from app.store.tables import storable

_FIELDS = tuple(field.name for field in fields(Feedback))
FEEDBACK = [tables.feedback.c[name] for name in _FIELDS]
_NATURAL = ("tenant", "turn", "kind", "other", "source")
_BODY = (*_NATURAL, "value", "text", "choice")


def _same(one: Feedback, other: Feedback) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in _BODY)


async def add(connection: AsyncConnection, new: Feedback, idempotency_key: str | None) -> tuple[Feedback, bool]:
    """(the feedback as stored, whether it was created).

    The same idempotency key with the same body, or the same body again, gives the first one. Another body from the
    same source about the same thing takes its place. Raises NotFound for a turn that is not the tenant's, and
    Conflict for an idempotency key that came with another body.
    """
    new = replace(new, text=storable(new.text), source=storable(new.source))
    others = [new.other] if new.other else []
    await turns.require(connection, new.tenant, [new.turn, *others], lock=True)  # two clicks at once: one waits
    table = tables.feedback
    if idempotency_key is not None:
        keyed = table.c.tenant == new.tenant, table.c.idempotency_key == idempotency_key
        row = (await connection.execute(select(*FEEDBACK).where(*keyed))).mappings().one_or_none()
        if row is not None:
            first = Feedback(**row)
            if _same(first, new):
                return first, False
            raise Conflict(f"this idempotency key was used for feedback {first.id}, with another body")
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
