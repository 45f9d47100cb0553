"""SQLite in a thread of its own, with as few trips to it as there are statements.

aiosqlite goes to its thread and back to make a cursor, to execute, to fetch and to close, and each trip costs more than
most statements (about 0.1 ms of CPU, with both threads wanting the interpreter's lock). Here a statement is one trip,
and the begin of a transaction travels with its first statement.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import aiosqlite

T = TypeVar("T")


class LiteConnection(aiosqlite.Connection):
    """What SQLAlchemy takes for a connection of aiosqlite; a transaction begins with its first statement."""

    def __init__(self, connect: partial[sqlite3.Connection]):
        super().__init__(connect, 64)
        self._thread.daemon = True
        self.begun = ""

    def cursor(self) -> LiteCursor:  # type: ignore[override]
        """A cursor, without a trip."""
        return LiteCursor(self)

    async def commit(self) -> None:
        """Commits what was written."""
        await self._end(sqlite3.Connection.commit)

    async def rollback(self) -> None:
        """Takes back what was written."""
        await self._end(sqlite3.Connection.rollback)

    async def _end(self, how: Any) -> None:
        self.begun = ""
        if self.in_transaction:
            await self._execute(how, self._conn)  # type: ignore[no-untyped-call]

    async def run(self, statement: Any, *given: Any) -> Any:
        """What a function of the sqlite3 connection returns, which is called in the thread."""
        begun, self.begun = self.begun, ""
        return await self._execute(  # type: ignore[no-untyped-call]
            _begun, self._conn, begun, statement, given
        )


def _begun(connection: sqlite3.Connection, begun: str, statement: Any, given: Sequence[Any]) -> Any:
    if begun:
        connection.execute(begun)
    return statement(connection, *given)


def in_transaction(connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
    """What `work` returns, when all that it wrote is committed; for `LiteConnection.run`."""
    connection.execute("BEGIN IMMEDIATE")
    with connection:
        return work(connection)


class LiteCursor:
    """The result of one statement, fetched whole."""

    __slots__ = ("_connection", "_rows", "arraysize", "description", "lastrowid", "rowcount")

    def __init__(self, connection: LiteConnection):
        self._connection = connection
        self._rows: list[Any] = []
        self.arraysize = 1
        self.description: Any = None
        self.rowcount, self.lastrowid = -1, None

    async def __aenter__(self) -> LiteCursor:
        """Itself."""
        return self

    async def execute(self, sql: str, parameters: Any = ()) -> LiteCursor:
        """Executes one statement."""
        if sql.startswith("BEGIN "):
            self._connection.begun = sql
            return self
        return await self._run(_fetched, sql, parameters)

    async def executemany(self, sql: str, parameters: Any) -> LiteCursor:
        """Executes one statement for each of several rows."""
        return await self._run(_many, sql, parameters)

    async def _run(self, how: Any, sql: str, parameters: Any) -> LiteCursor:
        found = await self._connection.run(how, sql, parameters)
        self._rows, self.description, self.rowcount, self.lastrowid = found
        return self

    async def fetchall(self) -> list[Any]:
        """The rows."""
        return self._rows

    async def close(self) -> None:
        """Does nothing: the thread has closed what there was."""


def _fetched(connection: sqlite3.Connection, sql: str, parameters: Any) -> tuple[Any, ...]:
    cursor = connection.execute(sql, parameters)
    rows = cursor.fetchall() if cursor.description else []
    found = (rows, cursor.description, cursor.rowcount, cursor.lastrowid)
    cursor.close()
    return found


def _many(connection: sqlite3.Connection, sql: str, parameters: Any) -> tuple[Any, ...]:
    cursor = connection.executemany(sql, parameters)
    found: tuple[Any, ...] = ([], None, cursor.rowcount, None)
    cursor.close()
    return found


def lite(database: str, **more: Any) -> LiteConnection:
    """A connection, to be awaited; `more` is for `sqlite3.connect`."""
    return LiteConnection(partial(sqlite3.connect, database, **more))
