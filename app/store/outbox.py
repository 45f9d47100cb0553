"""The outbox: webhook messages, written with what they tell about, waiting until a receiver took them.

A delivery is pending until it is sent or dead (given up). A courier claims it for a while; when that courier dies,
the claim runs out and another one takes it: at least once, and never by two at a time.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.records import Delivery, DeliveryState, Ticket, now
from app.store import tables
from app.store.database import insert_new
from app.store.errors import Conflict, NotFound
from app.store.tables import storable

Event = Literal["ticket.created", "ticket.answered"]
_DELIVERY = [tables.deliveries.c[name] for name in Delivery.__dataclass_fields__]


def message(event: Event, ticket: Ticket, asked: str) -> dict[str, Any]:
    """The body of a webhook: the event's type and time, the ticket, and what was asked as the policy let it be kept."""
    data: dict[str, Any] = {
        "id": ticket.id,
        "tenant": ticket.tenant,
        "conversation": ticket.conversation,
        "turn": ticket.turn,
        "queue": ticket.queue,
        "priority": ticket.priority,
        "rule": ticket.rule,
        "state": ticket.state,
        "created_at": ticket.created_at.isoformat(),
        "due_at": ticket.due_at.isoformat(),
        "asked": storable(asked),
    }
    if event == "ticket.answered":
        answered_at = ticket.answered_at and ticket.answered_at.isoformat()
        data |= {"answer": storable(ticket.answer), "answered_by": ticket.answered_by, "answered_at": answered_at}
    return {"type": event, "timestamp": now().isoformat(), "data": data}


async def announce(connection: AsyncConnection, event: Event, ticket: Ticket, asked: str) -> None:
    """Puts the news of a ticket into the outbox, once for each ticket and event."""
    row = {
        "id": f"msg_{ticket.id}_{event.partition('.')[2]}",
        "ticket": ticket.id,
        "kind": event,
        "body": message(event, ticket, asked),
        "state": "pending",
        "attempts": 0,
        "error": "",
        "next_at": now(),
        "leased_until": None,
        "created_at": now(),
        "sent_at": None,
    }
    await insert_new(connection, tables.deliveries, [row])


async def due(connection: AsyncConnection) -> bool:
    """True when a delivery waits that nobody has claimed (a cheap look before `claim`)."""
    table, moment = tables.deliveries, now()
    free = or_(table.c.leased_until.is_(None), table.c.leased_until <= moment)
    query = select(table.c.id).where(table.c.state == "pending", table.c.next_at <= moment, free).limit(1)
    return (await connection.execute(query)).first() is not None


async def claim(connection: AsyncConnection, limit: int, lease: float) -> list[Delivery]:
    """Up to `limit` due deliveries, which are the caller's for `lease` seconds; each claim counts as an attempt."""
    table, moment = tables.deliveries, now()
    free = or_(table.c.leased_until.is_(None), table.c.leased_until <= moment)
    due_now = (
        select(table.c.id)
        .where(table.c.state == "pending", table.c.next_at <= moment, free)
        .order_by(table.c.next_at, table.c.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    ids = list((await connection.execute(due_now)).scalars())
    if not ids:
        return []
    until = moment + timedelta(seconds=lease)
    changes = {"attempts": table.c.attempts + 1, "leased_until": until}
    claimed = await connection.execute(update(table).where(table.c.id.in_(ids)).values(changes).returning(*_DELIVERY))
    return sorted((Delivery(**row) for row in claimed.mappings()), key=lambda delivery: delivery.next_at)


async def settle(connection: AsyncConnection, id: str, error: str, retry_at: datetime | None) -> None:
    """Ends a claim: sent when `error` is empty, else to be tried again at `retry_at`, or dead without one."""
    table = tables.deliveries
    changes: dict[str, Any] = {"error": error, "leased_until": None}
    if not error:
        changes |= {"state": "sent", "sent_at": now()}
    elif retry_at is None:
        changes |= {"state": "dead"}
    else:
        changes |= {"next_at": retry_at}
    await connection.execute(update(table).where(table.c.id == id, table.c.state == "pending").values(changes))


async def retry(connection: AsyncConnection, id: str) -> None:
    """Makes a dead delivery pending again, with all its attempts; raises NotFound, or Conflict if it is not dead."""
    table = tables.deliveries
    changes = {"state": "pending", "attempts": 0, "next_at": now(), "leased_until": None}
    revived = update(table).where(table.c.id == id, table.c.state == "dead").values(changes)
    if (await connection.execute(revived)).rowcount:
        return
    state = (await connection.execute(select(table.c.state).where(table.c.id == id))).scalar_one_or_none()
    if state is None:
        raise NotFound(f"there is no delivery {id!r}")
    raise Conflict(f"delivery {id} is {state}: only a dead one is sent again")


async def deliveries(connection: AsyncConnection, state: DeliveryState | None, limit: int) -> list[Delivery]:
    """Up to `limit` deliveries, in one state or all, newest first."""
    table = tables.deliveries
    query = select(*_DELIVERY).order_by(table.c.created_at.desc(), table.c.id).limit(limit)
    rows = await connection.execute(query if state is None else query.where(table.c.state == state))
    return [Delivery(**row) for row in rows.mappings()]


async def counts(connection: AsyncConnection) -> dict[DeliveryState, int]:
    """How many deliveries are in each state, for a gauge."""
    query = select(tables.deliveries.c.state, func.count()).group_by(tables.deliveries.c.state)
    found = {row[0]: row[1] for row in await connection.execute(query)}
    return {"pending": found.get("pending", 0), "sent": found.get("sent", 0), "dead": found.get("dead", 0)}
