"""The ledger that replicas share in the PostgreSQL of the store: one statement a reserve, one a settle."""

from __future__ import annotations

import asyncio
import time

from app.limits.ledger import Caps, Hold, LedgerDown, Standing
from app.store import budgets
from app.store.database import Database
from app.store.errors import StoreError

SWEEP = 3600.0
"""Seconds between two looks for accounts that nobody uses."""
AT_ONCE = 6
"""Calls at once of a replica. More of them are not faster, and those that wait for the row of one account would have
connections in their hands that the store needs."""


class PostgresLedger:
    """Accounts in the table `budgets`, by the server's clock. timeout: seconds for one answer, with the wait for a
    connection. lease: seconds.

    `at`, in microseconds, stands in for the server's clock unless it is 0: for drills of a clock that jumps.
    """

    __slots__ = ("_db", "_lease", "_next_sweep", "_places", "_timeout", "at")

    def __init__(self, database: Database, lease: float, timeout: float):
        self._db, self._lease, self._timeout, self.at = database, round(lease * 1e6), timeout, 0
        self._next_sweep, self._places = 0.0, asyncio.Semaphore(AT_ONCE)

    async def reserve(self, account: str, caps: Caps, hold: Hold) -> Standing:
        """The standing, with `hold` in it unless it is refused; raises LedgerDown."""
        arguments = self._arguments(account, caps, hold)
        try:
            async with asyncio.timeout(self._timeout), self._places:
                row = await self._db.write(lambda connection: budgets.reserve(connection, arguments))
        except (StoreError, TimeoutError) as error:
            raise LedgerDown(f"PostgreSQL did not answer ({type(error).__name__})") from error
        return Standing(*row)

    async def settle(self, account: str, caps: Caps, hold: Hold, tokens: int, nanos: int) -> None:
        """Puts what was used in the place of the hold; raises LedgerDown."""
        arguments = self._arguments(account, caps, hold) | {"used_tokens": tokens, "used_nanos": nanos}
        try:
            async with asyncio.timeout(self._timeout), self._places:
                await self._db.write(lambda connection: budgets.settle(connection, arguments))
        except (StoreError, TimeoutError) as error:
            raise LedgerDown(f"PostgreSQL did not answer ({type(error).__name__})") from error

    async def tend(self) -> None:
        """Deletes accounts that were not used for 40 days, once an hour."""
        if time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + SWEEP
            await self._db.write(lambda connection: budgets.delete_idle(connection, time.time_ns() // 1000))

    async def close(self) -> None:
        """Does nothing: the connections are the store's."""

    def _arguments(self, account: str, caps: Caps, hold: Hold) -> dict[str, str | int]:
        limits: dict[str, str | int] = {
            "requests": caps.requests,
            "tokens": caps.tokens,
            "day": caps.day,
            "month": caps.month,
        }
        asked: dict[str, str | int] = {"hold": hold.id, "hold_tokens": hold.tokens, "hold_nanos": hold.nanos}
        return {"account": account, "lease": self._lease, "at": self.at, **limits, **asked}
