"""What the commands of `newel` share: settings, the store, who works here, and how things are shown."""

from __future__ import annotations

import asyncio
import getpass
import os
import sys
import tomllib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, TypeVar

import orjson
import typer
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import SettingsError
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from app.records import Turn
from app.sealing import read_secret, sealing_secrets
from app.settings import Settings
from app.store import Store
from guardrails import encoder

T = TypeVar("T")
Json = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]


class Refusal(Exception):
    """Something that cannot be done; the message says why and what to do. `code` is what the command exits with."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def read_settings(**changes: Any) -> Settings:
    """The settings with `changes`; raises Refusal with every mistake in them."""
    try:
        settings = Settings(**changes)
    except ValidationError as error:
        raise Refusal("\n".join(_mistake(one) for one in error.errors(include_url=False)), 2) from None
    except tomllib.TOMLDecodeError as error:
        raise Refusal(f"{os.environ.get('NEWEL_CONFIG', 'newel.toml')} is not valid TOML: {error}", 2) from None
    except SettingsError as error:
        raise Refusal(f'settings: {error}; a list is written as JSON, such as ["--flag"]', 2) from None
    encoder.look_in(settings.home)
    return settings


def _mistake(error: ErrorDetails) -> str:
    place = ".".join(map(str, error["loc"]))
    name = f"NEWEL_{place.upper().replace('.', '__')}"
    return f"settings: {place} (in newel.toml, or {name} in the environment): {error['msg']}"


def told(line: str) -> None:
    """Prints a line for people, beside what a program reads."""
    print(line, file=sys.stderr, flush=True)


def login() -> str:
    """The name of the person at the shell."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def actor() -> str:
    """Who works here, for the audit log."""
    return f"cli:{login()}"


def stored(work: Callable[[Store], Awaitable[T]]) -> T:
    """What `work` returns on the store that the settings name."""
    settings = read_settings()

    async def run() -> T:
        secrets = sealing_secrets(settings, await asyncio.to_thread(read_secret, settings))
        store = await Store.open(settings.database_url, settings.home / "spill", secrets=secrets)
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(run())


async def find_turn(store: Store, id: str) -> Turn:
    """The turn with this id, of whichever tenant; raises Refusal."""
    for tenant in await store.tenants():
        if turn := await store.turn(id, tenant.name):
            return turn
    raise Refusal(f"there is no turn {id!r}: give the id of a completion, chatcmpl-...")


def show(items: Iterable[Any], columns: Sequence[str], as_json: bool) -> None:
    """Prints dataclasses as a table of some of their fields, or whole as JSON."""
    if as_json:
        print_json([asdict(item) for item in items])
    else:
        titles = [column.removesuffix("_at").replace("_", " ") for column in columns]
        show_table(titles, [[getattr(item, column) for column in columns] for item in items])


def show_table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table, or `none` when it has no rows."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 1000)
    table = Table(*(Column(title, overflow="fold") for title in titles), box=None, header_style="bold")
    for row in rows:
        table.add_row(*(Text(cell(value)) for value in row))
    console.print(table if table.row_count else "none")


def cell(value: object) -> str:
    """A value as it stands in a table."""
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    if isinstance(value, bool):
        return "yes" if value else ""
    return "" if value is None else str(value)


def print_json(value: object) -> None:
    """Prints plain values, for programs."""
    print(orjson.dumps(value, option=orjson.OPT_INDENT_2, default=str).decode())
