"""The connection to SQLite or PostgreSQL: engines, transactions, migrations, and drivers' errors in our words."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import orjson
from sqlalchemy import JSON, Boolean, Connection, Float, Insert, Integer, Table, event, inspect, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.util import greenlet_spawn

from app.sealing import Seals
from app.store.errors import Conflict, StoreDown, StoreError
from app.store.lite import LiteConnection, in_transaction, lite
from app.store.tables import Moment

log = logging.getLogger(__name__)
T = TypeVar("T")
Work = Callable[[AsyncConnection], Awaitable[T]]
MIGRATIONS = Path(__file__).with_name("migrations")
VERSIONS = "alembic_version"
BUSY_SECONDS = 5.0
"""How long SQLite waits for another process's lock, and a PostgreSQL connection for the server."""
PATIENCE = 10.0
"""Seconds that one transaction may take before the database counts as down."""
COMPACT_BUSY = 60.0
"""How long a rewrite of an SQLite file waits for other processes' readers and writers."""
MIGRATION_LOCK = 0x6E6577656C  # "newel"
PORTION = 100
"""Rows that are sent to PostgreSQL at once: to make their JSON takes the event loop about half a millisecond."""
STRETCH = 8
"""Rows that are written into SQLite in one go: about half a millisecond of CPU."""
BREATH = 0.0001
"""Seconds that its thread sleeps between two stretches."""
_FROM_JSON: tuple[tuple[type, tuple[str, str]], ...] = (
    (Moment, ("text", "({} || '+00')::timestamptz")),
    (JSON, ("text", "{}::json")),
    (Boolean, ("boolean", "{}")),
    (Integer, ("bigint", "{}")),
    (Float, ("double precision", "{}")),
)
"""How PostgreSQL reads the value of a column that stands in JSON: its type there, and what is made of it."""
_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgres": "postgresql+psycopg", "postgresql": "postgresql+psycopg"}


def database_url(url: str) -> URL:
    """`url` with its async driver; raises ValueError for what the store does not speak."""
    parsed = make_url(url)
    parsed = parsed.set(drivername=_DRIVERS.get(parsed.drivername, parsed.drivername))
    if parsed.drivername not in _DRIVERS.values():
        raise ValueError(f"the database {parsed.drivername!r} is not known: use sqlite+aiosqlite or postgresql+psycopg")
    if parsed.drivername == "sqlite+aiosqlite" and parsed.database in (None, "", ":memory:"):
        raise ValueError(
            "an SQLite database in memory would lose every turn: name a file, sqlite+aiosqlite:///newel.db"
        )
    return parsed


def connect(url: URL, busy: float = BUSY_SECONDS) -> AsyncEngine:
    """An engine for `url`; on SQLite its transactions start as the execution option `newel_begin` says."""
    if url.drivername != "sqlite+aiosqlite":
        wait = {"connect_timeout": int(BUSY_SECONDS)}
        return create_async_engine(
            url, hide_parameters=True, pool_pre_ping=True, pool_timeout=PATIENCE, pool_size=10, connect_args=wait
        )
    logging.getLogger("aiosqlite").setLevel(logging.INFO)  # its debug lines hold what people wrote
    how = {"timeout": busy, "async_creator_fn": lite}
    # the connection that wrote last writes next: it has the pages in its cache, and another one would read them again
    engine = create_async_engine(url, hide_parameters=True, pool_timeout=PATIENCE, pool_use_lifo=True, connect_args=how)
    event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: DBAPIConnection, record: object) -> None:
    connection.isolation_level = None  # sqlite3 begins no transaction of its own: `_begin_sqlite` does
    cursor = connection.cursor()
    # what is deleted is overwritten: a value of the vault, once expired, is not in a free page either
    for pragma in ("foreign_keys=ON", "synchronous=NORMAL", "secure_delete=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later cannot wait for a lock: a writer says so at once.
    connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get('newel_begin', 'DEFERRED')}")


def _cause(error: BaseException) -> str:
    """The kind of `error` and its first line, for errors whose text comes from the database's own machinery."""
    origin = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return f"{type(origin).__name__}: {str(origin).strip().partition(chr(10))[0]}"


@contextmanager
def our_errors() -> Iterator[None]:
    """Drivers' errors become StoreError, Conflict or StoreDown; messages never carry values."""
    try:
        yield
    except IntegrityError as error:
        raise Conflict(f"the database keeps this unique or tied to a row that is not there ({_name(error)})") from None
    except DataError as error:
        raise StoreError(f"the database cannot hold this value ({_name(error)})") from None
    except DBAPIError as error:
        if str(getattr(error.orig, "sqlstate", None)).startswith("54"):
            raise StoreError(f"a value is too large for the database ({_name(error)})") from None
        raise StoreDown(f"the database cannot be used now ({_cause(error)})") from error
    except PoolTimeout as error:
        raise StoreDown(f"every connection to the database is busy ({PATIENCE:g} s waited)") from error
    except TimeoutError as error:
        raise StoreDown(f"the database did not answer within {PATIENCE:g} s") from error
    except OSError as error:
        raise StoreDown(f"the database cannot be reached ({_cause(error)})") from error


def _name(error: DBAPIError) -> str:
    constraint = getattr(getattr(error.orig, "diag", None), "constraint_name", None)
    return constraint or type(error.orig).__name__


@dataclass(frozen=True, slots=True)
class Quick(Generic[T]):
    """Work for `Database.write` that SQLite can do in one trip to its thread, past SQLAlchemy.

    lite: does what `work` does, with the sqlite3 connection in a transaction; or it returns None and has written
    nothing, and then `work` is called.
    """

    work: Work[T]
    lite: Callable[[sqlite3.Connection], T | None]

    def __call__(self, connection: AsyncConnection) -> Awaitable[T]:
        """Does it with SQLAlchemy."""
        return self.work(connection)


class Database:
    """A pool of connections to one database; every call is one transaction, whole or not at all.

    A transaction goes to its end though its caller is cancelled: SQLite would stay locked, because a statement that
    was cut off in its thread keeps its connection open until the garbage collector finds it.
    """

    __slots__ = ("_engine", "_line", "_running", "_writer", "seals")

    def __init__(self, url: URL, seals: Seals):
        self._engine, self.seals = connect(url), seals
        self._engine.sync_engine.update_execution_options(newel_seals=seals)
        self._writer = self._engine.execution_options(newel_begin="IMMEDIATE")
        # SQLite has one writer: to wait in line here is fair and costs no thread, its own busy loop is neither
        self._line = asyncio.Lock() if url.drivername == "sqlite+aiosqlite" else None
        self._running: set[asyncio.Task[Any]] = set()

    async def read(self, work: Work[T]) -> T:
        """What `work` returns, read in one transaction; raises StoreDown."""
        return await self._whole(self._transact(self._engine, work))

    async def write(self, work: Work[T]) -> T:
        """What `work` returns, when all that it wrote is committed; raises StoreDown, Conflict, StoreError."""
        lite = work.lite if isinstance(work, Quick) and self._line is not None else None

        async def transaction() -> T:
            async with self._place_in_line():
                found: T | None = None if lite is None else await self._trip(lite)
                return await self._transact(self._writer, work) if found is None else found

        return await self._whole(transaction())

    async def close(self) -> None:
        """Closes every connection, after what is running has ended."""
        await asyncio.gather(*self._running, return_exceptions=True)
        await self._engine.dispose()

    async def compact(self, whole: bool) -> bool:
        """True when what was deleted is neither in the file nor in the write-ahead log of an SQLite database any more.

        whole: rewrites the file. `secure_delete` overwrites rows, not the copies of them that SQLite leaves in gaps
        when it moves rows within and between pages. Writers wait meanwhile. False while a reader holds on to the log.
        On PostgreSQL, whose files are the server's, there is nothing to do here.
        """
        if self._line is None:
            return True
        with our_errors():
            async with self._line:
                return await asyncio.shield(asyncio.create_task(self._rewrite(whole)))

    async def _rewrite(self, whole: bool) -> bool:
        options = {"isolation_level": "AUTOCOMMIT", "connect_args": {"timeout": COMPACT_BUSY}}
        engine = create_async_engine(self._engine.url, hide_parameters=True, **options)  # no transaction around these
        try:
            async with engine.connect() as connection:
                await connection.exec_driver_sql("PRAGMA secure_delete=ON")
                if whole:
                    await connection.exec_driver_sql("VACUUM")
                busy, *_ = (await connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")).one()
                return not busy
        finally:
            await engine.dispose()

    @asynccontextmanager
    async def _place_in_line(self) -> AsyncIterator[None]:
        if self._line is None:
            yield
            return
        async with asyncio.timeout(PATIENCE):
            await self._line.acquire()
        try:
            yield
        finally:
            self._line.release()

    async def _transact(self, engine: AsyncEngine, work: Work[T]) -> T:
        # PostgreSQL can be told to stop; SQLite stops by itself, when it has waited for a lock long enough
        async with asyncio.timeout(PATIENCE if self._line is None else None), engine.begin() as connection:
            return await work(connection)

    async def _trip(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What `work` returns, in a transaction of SQLite; errors are SQLAlchemy's."""
        try:
            pooled = await self._engine.raw_connection()
            try:
                found: T = await cast(LiteConnection, pooled.driver_connection).run(in_transaction, work)
            finally:
                await greenlet_spawn(pooled.close)
        except sqlite3.Error as error:
            raise DBAPIError.instance(None, None, error, sqlite3.Error, hide_parameters=True) from error
        return found

    async def _whole(self, transaction: Coroutine[Any, Any, T]) -> T:
        task = asyncio.create_task(transaction)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        with our_errors():
            try:
                async with asyncio.timeout(None if self._line is None else PATIENCE):
                    return await asyncio.shield(task)
            except (asyncio.CancelledError, TimeoutError):
                task.add_done_callback(_report)
                raise


def seals_of(connection: AsyncConnection) -> Seals:
    """What seals texts and signs the head of the audit log, in the transactions of a store."""
    seals: Seals = connection.sync_connection.get_execution_options()["newel_seals"]  # type: ignore[union-attr]
    return seals


def _report(task: asyncio.Task[Any]) -> None:
    """Tells of a transaction that failed after its caller had gone."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("a transaction that nobody waited for any more failed: %s", type(error).__name__)


@cache
def _insert(dialect: str, table: Table, changes: tuple[str, ...]) -> Insert:
    """An insert that does nothing, or sets `changes`, where the key is there; to build it costs more than to run it."""
    insert = sqlite.insert(table) if dialect == "sqlite" else postgresql.insert(table)
    if not changes:
        return insert.on_conflict_do_nothing()
    new = {name: insert.excluded[name] for name in changes}
    return insert.on_conflict_do_update(index_elements=list(table.primary_key), set_=new)


async def insert_new(connection: AsyncConnection, table: Table, rows: Sequence[dict[str, Any]]) -> int:
    """How many of `rows` were inserted; those whose key is there already stay as they are."""
    if not rows:
        return 0
    statement, options = _insert(connection.dialect.name, table, ()), {"preserve_rowcount": True}
    return (await connection.execute(statement, list(rows), execution_options=options)).rowcount


async def upsert(connection: AsyncConnection, table: Table, row: dict[str, Any], *changes: str) -> None:
    """Inserts `row`, or sets the columns `changes` of the row with the same primary key."""
    await connection.execute(_insert(connection.dialect.name, table, changes), row)


@dataclass(frozen=True, slots=True)
class Bulk:
    """An insert of many rows in one statement: of a row whose key is there it sets `changes` if `where` is true.

    A row is a tuple of the values of `columns`, as the driver takes them, past SQLAlchemy. Texts have to be `storable`,
    JSON is text, times are as `moment` gives them. In SQL `old.` and `new.` are the two rows.
    """

    table: Table
    columns: tuple[str, ...]
    changes: tuple[str, ...] = ()
    where: str = "true"


def moment(when: datetime) -> str:
    """The time as `Bulk` takes it: `YYYY-MM-DD HH:MM:SS.ffffff`, in UTC, as it stands in SQLite."""
    return when.astimezone(UTC).isoformat(" ", "microseconds")[:26]


@cache
def _bulk(dialect: str, bulk: Bulk) -> str:
    quoted = [f'"{name}"' for name in bulk.columns]
    key = ", ".join(f'"{column.name}"' for column in bulk.table.primary_key)
    into = f"INSERT INTO {bulk.table.name} AS old ({', '.join(quoted)})"
    then = f"DO UPDATE SET {', '.join(bulk.changes)} WHERE {bulk.where}" if bulk.changes else "DO NOTHING"
    then = f"ON CONFLICT ({key}) {then}".replace("new.", "excluded.")
    if dialect == "sqlite":
        return f"{into} VALUES ({', '.join('?' * len(quoted))}) {then}"
    shape, values = [], []
    for name in bulk.columns:
        column = bulk.table.c[name].type
        kind, cast = next((how for type, how in _FROM_JSON if isinstance(column, type)), ("text", "{}"))
        shape.append(f'"{name}" {kind}')
        values.append(cast.format(f'given."{name}"'))
    given = f"json_to_recordset(%s::json) AS given({', '.join(shape)})"
    return f"{into} SELECT {', '.join(values)} FROM {given} {then}"  # noqa: S608 - names of our own tables


async def insert_many(connection: AsyncConnection, bulk: Bulk, rows: Sequence[tuple[Any, ...]]) -> int:
    """How many of `rows` were inserted or changed, in one statement; on PostgreSQL in one for every PORTION of them."""
    sql, count = _bulk(connection.dialect.name, bulk), 0
    if connection.dialect.name == "sqlite":
        return (await connection.exec_driver_sql(sql, list(rows))).rowcount if rows else 0
    for at in range(0, len(rows), PORTION):
        some = [dict(zip(bulk.columns, row, strict=True)) for row in rows[at : at + PORTION]]
        count += (await connection.exec_driver_sql(sql, (orjson.dumps(some).decode(),))).rowcount
    return count


def insert_lite(connection: sqlite3.Connection, bulk: Bulk, rows: Sequence[tuple[Any, ...]]) -> int:
    """What `insert_many` does on SQLite, for `Quick`, in stretches: where there is one core, requests go on between."""
    sql, count = _bulk("sqlite", bulk), 0
    for at in range(0, len(rows), STRETCH):
        if at:
            time.sleep(BREATH)
        count += connection.executemany(sql, rows[at : at + STRETCH]).rowcount
    return count


async def migrate(url: str, seals: Seals | None = None) -> None:
    """Brings the database at `url` to this version's tables, making an SQLite file (0600) where there is none.

    `seals` sign the head of an audit log that an earlier version wrote; without them it is left unsigned. Any number of
    processes may call it at once: one works, the others wait. Raises StoreDown.
    """
    parsed = database_url(url)
    engine = connect(parsed, busy=600.0)
    with our_errors():
        try:
            async with _alone(parsed), engine.execution_options(newel_begin="IMMEDIATE").begin() as connection:
                if connection.dialect.name == "postgresql":
                    await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
                await connection.run_sync(_upgrade, seals)
        finally:
            await engine.dispose()


@asynccontextmanager
async def _alone(url: URL) -> AsyncIterator[None]:
    """On SQLite: the file exists, nobody else migrates it, and it keeps a write-ahead log."""
    if url.drivername != "sqlite+aiosqlite":
        yield
        return
    path = Path(str(url.database))
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    lock = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX)
        await _write_ahead(url)
        yield
    finally:
        os.close(lock)


async def _write_ahead(url: URL) -> None:
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")  # this pragma is not allowed in a transaction
    try:
        async with engine.connect() as connection:
            await connection.exec_driver_sql("PRAGMA journal_mode=WAL")
    finally:
        await engine.dispose()


def _upgrade(connection: Connection, seals: Seals | None) -> None:
    """Runs the migrations that are due; where none is, Alembic and its 15 MB are not loaded."""
    if _is_current(connection):
        return
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.attributes["seals"] = seals
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    script = ScriptDirectory.from_config(config)
    with EnvironmentContext(config, script, fn=lambda revision, _: script._upgrade_revs("head", revision)) as run:
        run.configure(connection=connection)
        run.run_migrations()


def _is_current(connection: Connection) -> bool:
    """True when the last migration that there is was the last one that ran."""
    if not inspect(connection).has_table(VERSIONS):
        return False
    ran = connection.execute(text(f"SELECT version_num FROM {VERSIONS}")).scalars().all()  # noqa: S608 - our own name
    newest = max(path.name.partition("_")[0] for path in (MIGRATIONS / "versions").glob("[0-9]*_*.py"))
    return ran == [newest]
