"""The commands about what is kept of people: to seal it, to tell it, to take it out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from app.shell import Json, Refusal, login, print_json, read_settings, stored, told
from app.store import Cleaned, Erased, Store

privacy_app = typer.Typer(no_args_is_help=True, help="What is kept of people.")

Tenant = Annotated[str, typer.Option(help="The tenant that it is about.")]
Subject = Annotated[str | None, typer.Option(help="A person, as clients send it in `user`.")]
Conversation = Annotated[str | None, typer.Option(help="A conversation's id.")]
By = Annotated[str | None, typer.Option(help="Who wants it; your login name.")]
Reason = Annotated[str, typer.Option(help="Why; it is audited.")]


@privacy_app.command("erase")
def erase(
    tenant: Tenant,
    reason: Reason,
    subject: Subject = None,
    conversation: Conversation = None,
    by: By = None,
    compact: Annotated[bool, typer.Option(help="Rewrite an SQLite file; writers wait meanwhile.")] = True,
    as_json: Json = False,
) -> None:
    """Deletes all texts of a person or conversation. For good: turns, feedback, tickets, spilled and exported ones."""
    whose = _whose(tenant, subject, conversation, reason)

    async def work(store: Store) -> Erased:
        await _require(store, tenant)
        return await store.erase(
            tenant, **whose, actor=by or login(), reason=reason, source=subject or "", compact=compact
        )

    erased = stored(work)
    if as_json:
        print_json(asdict(erased))
        return
    for name, count in asdict(erased.removed).items():
        print(f"{name}: {count}")
    _tell_exports(erased.exports)
    if not erased.clean:
        told("newel: bytes may be left in the SQLite file or its log: erase once more when nobody reads, compacting")


def _tell_exports(cleaned: tuple[Cleaned, ...]) -> None:
    for one in cleaned:
        if one.found:
            print(f"{one.folder}: {one.lines} lines")
        else:
            told(f"newel: {one.folder} (written on {one.host}) was not found here: clean it there, or delete it")


@privacy_app.command("export")
def export(
    tenant: Tenant,
    reason: Reason,
    subject: Subject = None,
    conversation: Conversation = None,
    by: By = None,
    output: Annotated[Path | None, typer.Option(help="A file, instead of the screen.")] = None,
) -> None:
    """Prints what is kept of a person or conversation. As JSON, in clear; that it was read is audited."""
    whose = _whose(tenant, subject, conversation, reason)

    async def work(store: Store) -> dict[str, Any]:
        await _require(store, tenant)
        found: dict[str, Any] = await store.everything_of(tenant, **whose, actor=by or login(), reason=reason)
        return found | {"values": await _values(store, tenant, **whose)}

    found = stored(work)
    if output is None:
        print_json(found)
        return
    _write(output, found)
    told(f"{output}: {', '.join(f'{len(rows)} {name}' for name, rows in found.items() if rows) or 'nothing'}")


def _write(path: Path, found: dict[str, Any]) -> None:
    import os

    import orjson

    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(orjson.dumps(found, option=orjson.OPT_INDENT_2, default=str))


async def _values(store: Store, tenant: str, subject: str = "", conversation: str = "") -> list[dict[str, str]]:
    """The values behind placeholders, in clear, that are kept of a person or conversation."""
    from app.sealing import read_secret
    from app.vault import opened

    settings = read_settings()
    values = await store.values_of(tenant, subject=subject, conversation=conversation)
    return [
        {"conversation": owner.conversation, "placeholder": entry.placeholder, "value": entry.value}
        for owner, entry in opened(settings, read_secret(settings), values)
    ]


@privacy_app.command("retain")
def retain(
    now: Annotated[bool, typer.Option("--now", help="Remove it; a running gateway does so by itself.")] = False,
    as_json: Json = False,
) -> None:
    """Counts what is kept for too long. By the settings in [retention]; with --now it is removed."""
    settings = read_settings()
    swept = stored(lambda store: store.sweep(settings.retention.periods, dry=not now))
    if as_json:
        print_json(swept)
        return
    for kind, count in swept.items():
        print(f"{kind}: {count} {'removed' if now else 'would be removed'}")
    if not swept:
        print("everything is kept for ever: [retention] sets no number of days")


@privacy_app.command("seal")
def seal() -> None:
    """Encrypts withheld texts with today's secret. For after a change of the secret; old_secrets can go then."""
    print(f"sealed: {stored(lambda store: store.seal_withheld())}")


def _whose(tenant: str, subject: str | None, conversation: str | None, reason: str) -> dict[str, str]:
    if (subject is None) == (conversation is None):
        raise typer.BadParameter("say whose texts: --subject or --conversation, one of both")
    if not reason.strip():
        raise typer.BadParameter("a reason is needed: it is audited", param_hint="--reason")
    if conversation is not None:
        return {"conversation": conversation}
    from app.sealing import read_secret
    from app.service import pseudonym

    return {"subject": pseudonym(read_secret(read_settings()), tenant, subject or "")}


async def _require(store: Store, tenant: str) -> None:
    if await store.tenant(tenant) is None:
        raise Refusal(f"there is no tenant {tenant!r}; newel tenants list shows them")
