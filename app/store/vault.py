"""The values behind placeholders as rows: what is stored here is encrypted, and no key is known here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, delete, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.records import now
from app.store import audit, tables
from app.store.database import insert_new
from app.store.erasure import Whose
from app.store.errors import Conflict


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose values they are. name: the person's pseudonym, or `turn:ID` where the client names no person, so that no
    other turn has the same owner."""

    tenant: str
    conversation: str
    name: str


@dataclass(frozen=True, slots=True)
class Sealed:
    """An encrypted value and its placeholder; `key` tells which secret its key comes from."""

    placeholder: str
    key: str
    data: bytes


_SEALED = [tables.vault.c[name] for name in ("placeholder", "key", "data")]


def _of(owner: Owner) -> tuple[ColumnElement[bool], ...]:
    table = tables.vault.c
    return table.tenant == owner.tenant, table.conversation == owner.conversation, table.owner == owner.name


async def load(connection: AsyncConnection, owner: Owner) -> list[Sealed]:
    """What is kept for this owner and has not expired."""
    query = select(*_SEALED).where(*_of(owner), tables.vault.c.expires_at > now())
    return [Sealed(**row) for row in (await connection.execute(query)).mappings()]


async def of(connection: AsyncConnection, whose: Whose) -> list[tuple[Owner, Sealed]]:
    """What is kept of a person or of a conversation, and has not expired."""
    table = tables.vault.c
    mine = table.owner == whose.subject if whose.subject else table.conversation == whose.conversation
    names = [table.tenant, table.conversation, table.owner]
    query = select(*names, *_SEALED).where(table.tenant == whose.tenant, mine, table.expires_at > now())
    rows = (await connection.execute(query.order_by(*names, table.placeholder))).all()
    return [(Owner(*row[:3]), Sealed(*row[3:])) for row in rows]


async def keep(connection: AsyncConnection, owner: Owner, new: Sequence[Sealed], until: datetime) -> None:
    """Keeps new values, and all that the owner has, until then; raises Conflict when a placeholder is taken."""
    await connection.execute(delete(tables.vault).where(*_of(owner), tables.vault.c.expires_at <= now()))
    await connection.execute(update(tables.vault).where(*_of(owner)).values(expires_at=until))
    whose = {"tenant": owner.tenant, "conversation": owner.conversation, "owner": owner.name, "expires_at": until}
    rows = [whose | {"placeholder": one.placeholder, "key": one.key, "data": one.data} for one in new]
    if await insert_new(connection, tables.vault, rows) < len(rows):
        raise Conflict("another turn of this conversation gave out one of these placeholders meanwhile")


async def reveal(connection: AsyncConnection, owner: Owner, turn: str, actor: str, reason: str) -> list[Sealed]:
    """What is kept for this owner; the reading is audited."""
    if not actor.strip() or not reason.strip():
        raise ValueError("values are shown only to somebody, for a reason: give both")
    await audit.write(connection, actor, "vault.read", turn, {"tenant": owner.tenant, "reason": reason})
    return await load(connection, owner)


async def forget(
    connection: AsyncConnection, tenant: str, actor: str, conversation: str | None, owner: str | None
) -> int:
    """How many values of a tenant, of one of its conversations or owners, were deleted; that is audited."""
    where = [tables.vault.c.tenant == tenant]
    where += [tables.vault.c.conversation == conversation] if conversation is not None else []
    where += [tables.vault.c.owner == owner] if owner is not None else []
    count = (await connection.execute(delete(tables.vault).where(*where))).rowcount
    detail = {"conversation": conversation, "owner": owner, "values": count}
    await audit.write(connection, actor, "vault.forget", tenant, detail)
    return count


async def delete_expired(connection: AsyncConnection) -> int:
    """How many values had expired and are deleted now."""
    return (await connection.execute(delete(tables.vault).where(tables.vault.c.expires_at <= now()))).rowcount
