"""Tenants and their API keys."""

from __future__ import annotations

import hashlib
import secrets

from sqlalchemy import bindparam, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.records import Key, KeyScope, Tenant, new_id, now
from app.store import tables
from app.store.database import upsert
from app.store.errors import NotFound

_TENANT = [column for column in tables.tenants.c if column.name != "created_at"]
_KEY = [column for column in tables.keys.c if column.name != "sha256"]

_BY_SECRET = (
    select(*_KEY, tables.tenants.c.policy, tables.tenants.c.when_store_fails)
    .join(tables.tenants, tables.tenants.c.name == tables.keys.c.tenant)
    .where(tables.keys.c.sha256 == bindparam("secret"), tables.keys.c.revoked_at.is_(None))
)


def fingerprint(secret: str) -> str:
    """The SHA-256 of a key's secret: 240 random bits need no salt and no stretching."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


async def put_tenant(connection: AsyncConnection, tenant: Tenant) -> None:
    """Makes a tenant, or changes its policy and settings."""
    row = {
        "name": tenant.name,
        "policy": tenant.policy,
        "when_store_fails": tenant.when_store_fails,
        "created_at": now(),
    }
    await upsert(connection, tables.tenants, row, "policy", "when_store_fails")


async def tenants(connection: AsyncConnection, name: str | None = None) -> list[Tenant]:
    """All tenants by name, or the one that is called `name`."""
    query = select(*_TENANT).order_by(tables.tenants.c.name)
    rows = await connection.execute(query if name is None else query.where(tables.tenants.c.name == name))
    return [Tenant(**row) for row in rows.mappings()]


async def add_key(connection: AsyncConnection, tenant: str, scope: KeyScope, note: str) -> tuple[Key, str]:
    """(the key as stored, its secret): the secret is shown this once. Raises NotFound for an unknown tenant."""
    if not await tenants(connection, tenant):
        raise NotFound(f"there is no tenant {tenant!r}: make it first")
    secret = f"nk-{secrets.token_urlsafe(30)}"
    key = Key(id=new_id("key_"), tenant=tenant, scope=scope, hint=secret[:8], note=note)
    row = {column.name: getattr(key, column.name) for column in _KEY}
    await connection.execute(insert(tables.keys).values(row | {"sha256": fingerprint(secret)}))
    return key, secret


async def key(connection: AsyncConnection, secret: str) -> tuple[Key, Tenant] | None:
    """The key with this secret and its tenant; None when there is none or it was revoked."""
    row = (await connection.execute(_BY_SECRET, {"secret": fingerprint(secret)})).mappings().one_or_none()
    if row is None:
        return None
    tenant = Tenant(name=row["tenant"], policy=row["policy"], when_store_fails=row["when_store_fails"])
    return Key(**{column.name: row[column.name] for column in _KEY}), tenant


async def revoke_key(connection: AsyncConnection, id: str) -> None:
    """Ends a key; again does nothing. Raises NotFound."""
    found = await connection.execute(
        update(tables.keys).where(tables.keys.c.id == id, tables.keys.c.revoked_at.is_(None)).values(revoked_at=now())
    )
    if (
        not found.rowcount
        and not (await connection.execute(select(tables.keys.c.id).where(tables.keys.c.id == id))).first()
    ):
        raise NotFound(f"there is no key {id!r}")


async def keys(connection: AsyncConnection) -> list[Key]:
    """All keys, oldest first, revoked ones too."""
    rows = await connection.execute(select(*_KEY).order_by(tables.keys.c.created_at, tables.keys.c.id))
    return [Key(**row) for row in rows.mappings()]
