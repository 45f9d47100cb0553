"""The commands about the audit log: who did what, and whether the log is what was written."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from app.shell import Json, Refusal, print_json, show, stored
from app.store import Head, read_head

audit_app = typer.Typer(no_args_is_help=True, help="Who did what; nobody can change it unseen.")


@audit_app.command("list")
def list_entries(
    limit: Annotated[int, typer.Option(min=1, help="So many, the newest.")] = 100,
    before: Annotated[int | None, typer.Option(help="Those before this place.")] = None,
    as_json: Json = False,
) -> None:
    """Lists the newest entries. Ids and names, never what people wrote."""
    entries = stored(lambda store: store.audit_log(limit, before))
    show(entries, ("place", "at", "actor", "action", "subject", "detail"), as_json)


@audit_app.command("head")
def show_head() -> None:
    """Prints where the log ends. Keep it where nobody who can write to the database can write."""
    print(stored(lambda store: store.audit_head()).value)


@audit_app.command("verify")
def verify(
    head: Annotated[str | None, typer.Option(help="A head that was kept: the log must contain it.")] = None,
    after: Annotated[str | None, typer.Option(help="A head that was looked into: only what came after it.")] = None,
    as_json: Json = False,
) -> None:
    """Checks every entry and the log's end. Exits with 1 and says which entry is not what was written."""
    kept, known = _head(head, "--head"), _head(after, "--after")
    found = stored(lambda store: store.verify_audit(kept, known))
    if as_json:
        print_json(asdict(found) | {"head": found.head.value})
    else:
        print(f"good: {found.entries} entries")
    if found.broken is not None:
        raise Refusal(f"the audit log is broken: {found.broken}")


def _head(value: str | None, option: str) -> Head | None:
    try:
        return None if value is None else read_head(value)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None
