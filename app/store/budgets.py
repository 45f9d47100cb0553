"""What keys have used, as rows: written whole by one replica, or by the functions of PostgreSQL for many.

The functions `newel_reserve` and `newel_settle` are made by migration 0006; their rules are in `app.limits.ledger`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import delete, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.store import tables
from app.store.database import Database, upsert

KEPT = 40 * 86_400 * 1_000_000
"""Microseconds that an account is kept after its last request: longer than a month's budget."""

_RESERVE = text(
    "SELECT * FROM newel_reserve(:account, :requests, :tokens, :day, :month, :lease, :at,"
    " :hold, :hold_tokens, :hold_nanos)"
)
_SETTLE = text(
    "SELECT newel_settle(:account, :requests, :tokens, :day, :month, :lease, :at,"
    " :hold, :hold_tokens, :hold_nanos, :used_tokens, :used_nanos)"
)


@dataclass(frozen=True, slots=True)
class Used:
    """What an account used: tokens in a day (counted from 1970-01-01), billionths of the currency in a month (counted
    from January of the year 0)."""

    day: int
    day_used: int
    month: int
    month_used: int


_USED = [tables.budgets.c[name] for name in ("day", "day_used", "month", "month_used")]
_EMPTY = {"seen": 0, "clock": 0, "requests": 0.0, "tokens": 0.0, "held_tokens": 0, "held_nanos": 0}


class Budgets:
    """The rows of one replica that reckons in memory: what is not in `Used` ends with its process."""

    __slots__ = ("_db",)

    def __init__(self, database: Database):
        self._db = database

    async def load(self, account: str) -> Used | None:
        """What the account had used when it was last saved; raises StoreDown."""
        query = select(*_USED).where(tables.budgets.c.account == account)

        async def read(connection: AsyncConnection) -> Used | None:
            row = (await connection.execute(query)).mappings().one_or_none()
            return None if row is None else Used(**row)

        return await self._db.read(read)

    async def save(self, used: Mapping[str, Used]) -> None:
        """Writes what accounts have used, in one transaction; raises StoreDown."""

        async def write(connection: AsyncConnection) -> None:
            for account, one in used.items():
                row = {"account": account} | _EMPTY | asdict(one)
                await upsert(connection, tables.budgets, row, *(column.name for column in _USED))

        await self._db.write(write)


async def reserve(connection: AsyncConnection, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """The columns of `app.limits.ledger.Standing`, after the hold was made or refused; PostgreSQL only."""
    return tuple((await connection.execute(_RESERVE, arguments)).one())


async def settle(connection: AsyncConnection, arguments: Mapping[str, Any]) -> None:
    """Puts what was used in the place of a hold; PostgreSQL only."""
    await connection.execute(_SETTLE, arguments)


async def delete_idle(connection: AsyncConnection, now: int) -> int:
    """How many accounts were last used too long before `now` (microseconds since 1970) to matter, and are gone."""
    idle = tables.budgets.c.seen.between(1, now - KEPT)
    gone = (await connection.execute(delete(tables.budgets).where(idle).returning(tables.budgets.c.account))).scalars()
    accounts = list(gone)
    if accounts:
        await connection.execute(delete(tables.budget_holds).where(tables.budget_holds.c.account.in_(accounts)))
    return len(accounts)
