"""Tenants and their API keys."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime
from typing import Any

from sqlalchemy import RowMapping, bindparam, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.records import NO_LIMITS, Key, KeyLimits, KeyScope, Tenant, new_id, now
from app.store import audit, tables
from app.store.database import upsert
from app.store.errors import NotFound

_TENANT = [column for column in tables.tenants.c if column.name != "created_at"]
_KEY = [column for column in tables.keys.c if column.name != "sha256"]

_BY_SECRET = (
    select(tables.keys, tables.tenants.c.policy, tables.tenants.c.when_store_fails)
    .join(tables.tenants, tables.tenants.c.name == tables.keys.c.tenant)
    .where(tables.keys.c.sha256 == bindparam("secret"), tables.keys.c.revoked_at.is_(None))
)


def fingerprint(secret: str) -> str:
    """The SHA-256 of a key's secret: 240 random bits need no salt and no stretching."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


async def put_tenant(connection: AsyncConnection, tenant: Tenant, by: str) -> None:
    """Makes a tenant, or changes its policy and settings; audited where something changes."""
    if await tenants(connection, tenant.name) == [tenant]:
        return
    told = {"policy": tenant.policy, "when_store_fails": tenant.when_store_fails}
    await upsert(connection, tables.tenants, {"name": tenant.name, "created_at": now()} | told, *told)
    await audit.write(connection, by, "tenant.put", tenant.name, told)


async def tenants(connection: AsyncConnection, name: str | None = None) -> list[Tenant]:
    """All tenants by name, or the one that is called `name`."""
    query = select(*_TENANT).order_by(tables.tenants.c.name)
    rows = await connection.execute(query if name is None else query.where(tables.tenants.c.name == name))
    return [Tenant(**row) for row in rows.mappings()]


async def add_key(
    connection: AsyncConnection, tenant: str, scope: KeyScope, note: str, limits: KeyLimits, by: str
) -> tuple[Key, str]:
    """(the key as stored, its secret): the secret is shown this once. Raises NotFound for an unknown tenant."""
    if not await tenants(connection, tenant):
        raise NotFound(f"there is no tenant {tenant!r}: make it first")
    secret = f"nk-{secrets.token_urlsafe(30)}"
    key = Key(id=new_id("key_"), tenant=tenant, scope=scope, hint=secret[:8], note=note, limits=limits)
    row = {column.name: getattr(key, column.name) for column in _KEY}
    row |= {"sha256": fingerprint(secret), "limits": written(limits)}
    await connection.execute(insert(tables.keys).values(row))
    await audit.write(connection, by, "key.create", key.id, {"tenant": tenant, "scope": scope} | written(limits))
    return key, secret


def written(limits: KeyLimits) -> dict[str, Any]:
    """Those limits that are set, as JSON."""
    told = {one.name: getattr(limits, one.name) for one in fields(limits)}
    return {
        name: value.isoformat() if isinstance(value, datetime) else list(value) if isinstance(value, tuple) else value
        for name, value in told.items()
        if value is not None and value != ()
    }


def read(limits: Mapping[str, Any] | None) -> KeyLimits:
    """The limits that were written so; a name that this version does not know is left out."""
    if not limits:
        return NO_LIMITS
    known = {one.name for one in fields(KeyLimits)}
    values = {name: value for name, value in limits.items() if name in known}
    if "expires_at" in values:
        values["expires_at"] = datetime.fromisoformat(values["expires_at"])
    return KeyLimits(**values | {"allow": tuple(values.get("allow", ()))})


def _key(row: RowMapping) -> Key:
    return Key(**{column.name: row[column.name] for column in _KEY} | {"limits": read(row["limits"])})


async def key(connection: AsyncConnection, secret: str) -> tuple[Key, Tenant] | None:
    """The key with this secret and its tenant; None when there is none, or it was revoked or has expired.

    The index is searched for the SHA-256, of which nobody can choose the beginning, and what it gives is compared in
    constant time: how long that takes tells nothing about any secret.
    """
    digest = fingerprint(secret)
    row = (await connection.execute(_BY_SECRET, {"secret": digest})).mappings().one_or_none()
    if row is None or not hmac.compare_digest(row["sha256"], digest):
        return None
    found = _key(row)
    tenant = Tenant(name=row["tenant"], policy=row["policy"], when_store_fails=row["when_store_fails"])
    return (found, tenant) if found.good(now()) else None


async def revoke_key(connection: AsyncConnection, id: str, by: str) -> None:
    """Ends a key; again does nothing. Raises NotFound."""
    table = tables.keys
    ended = update(table).where(table.c.id == id, table.c.revoked_at.is_(None)).values(revoked_at=now())
    if (await connection.execute(ended)).rowcount:
        await audit.write(connection, by, "key.revoke", id, {})
    elif not (await connection.execute(select(table.c.id).where(table.c.id == id))).first():
        raise NotFound(f"there is no key {id!r}")


async def keys(connection: AsyncConnection) -> list[Key]:
    """All keys, oldest first, revoked ones too."""
    rows = await connection.execute(select(*_KEY).order_by(tables.keys.c.created_at, tables.keys.c.id))
    return [_key(row) for row in rows.mappings()]
