"""The commands about API keys: who may come in, and how much they may use."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from app.records import BlockMode, Key, KeyLimits, KeyPriority, KeyScope, Tenant, now
from app.shell import Json, Refusal, actor, print_json, read_settings, show_table, stored, told
from app.store import Store
from app.store.access import written

keys_app = typer.Typer(no_args_is_help=True, help="API keys.")


@keys_app.command("create")
def create_key(
    tenant: Annotated[str, typer.Option(help="Whose key it is.")] = "default",
    scope: Annotated[
        KeyScope, typer.Option(help="What it opens: chat, tickets and feedback, policies and metrics, or everything.")
    ] = "client",
    note: Annotated[str, typer.Option(help="What it is for.")] = "",
    rpm: Annotated[int | None, typer.Option(min=1, help="Requests a minute.")] = None,
    tpm: Annotated[int | None, typer.Option(min=1, help="Tokens a minute.")] = None,
    tpd: Annotated[int | None, typer.Option(min=1, help="Tokens a day.")] = None,
    budget: Annotated[float | None, typer.Option(min=0, help="What a month may cost, in the prices' currency.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The longest reply, in tokens.")] = None,
    max_n: Annotated[int | None, typer.Option(min=1, help="The most choices of one request.")] = None,
    max_logprobs: Annotated[int | None, typer.Option(min=0, help="The most alternatives to a token.")] = None,
    allow: Annotated[list[str] | None, typer.Option(help="One more request field, such as top_k; repeatable.")] = None,
    priority: Annotated[KeyPriority | None, typer.Option(help="The class of its requests.")] = None,
    block_mode: Annotated[BlockMode | None, typer.Option(help="How its client is told of what was blocked.")] = None,
    expires: Annotated[datetime | None, typer.Option(help="When it ends (UTC).")] = None,
) -> None:
    """Makes a key and prints its secret. It cannot be shown again."""
    until = expires.replace(tzinfo=UTC) if expires else None
    if until is not None and until <= now():
        raise typer.BadParameter("a key that has ended opens nothing: give a time to come", param_hint="--expires")
    limits = KeyLimits(
        rpm, tpm, tpd, budget, max_tokens, max_n, max_logprobs, tuple(allow or ()), priority, block_mode, until
    )
    settings = read_settings()

    async def create(store: Store) -> tuple[str, str]:
        if not await store.tenants():  # as the gateway does at its first start
            await store.put_tenant(Tenant("default", settings.default_policy), actor())
        key, secret = await store.add_key(tenant, scope, note, limits, actor())
        return key.id, secret

    id, secret = stored(create)
    told(f"{id}, a {scope} key of tenant {tenant}; this is its secret, keep it:")
    print(secret)


@keys_app.command("list")
def list_keys(as_json: Json = False) -> None:
    """Lists all keys. Revoked and expired ones too, and never their secrets."""
    keys = stored(lambda store: store.keys())
    if as_json:
        print_json([_plain(key) for key in keys])
        return
    titles = ("id", "tenant", "scope", "hint", "note", "limits", "created", "revoked", "expires")
    show_table(
        titles,
        [
            (key.id, key.tenant, key.scope, key.hint, key.note, _told(key), key.created_at, key.revoked_at, until)
            for key in keys
            for until in [key.limits.expires_at]
        ],
    )


@keys_app.command("show")
def show_key(id: Annotated[str, typer.Argument(help="The key's id.")], as_json: Json = False) -> None:
    """Shows one key. What it opens and may use, never its secret."""
    key = next((one for one in stored(lambda store: store.keys()) if one.id == id), None)
    if key is None:
        raise Refusal(f"there is no key {id!r}; see: newel keys list")
    plain = _plain(key)
    if as_json:
        print_json(plain)
    else:
        limits = plain.pop("limits")
        show_table(("field", "value"), [*plain.items(), *limits.items()])


@keys_app.command("revoke")
def revoke_key(id: Annotated[str, typer.Argument(help="The key's id, from `newel keys list`.")]) -> None:
    """Ends a key. A running gateway turns it down at once."""
    stored(lambda store: store.revoke_key(id, actor()))
    print(f"{id} is revoked")


def _plain(key: Key) -> dict[str, Any]:
    return asdict(key) | {"limits": written(key.limits), "good": key.good(now())}


def _told(key: Key) -> str:
    """The limits in one cell, but for the end, which has a column."""
    limits = written(key.limits)
    return ", ".join(f"{name}={value}" for name, value in limits.items() if name != "expires_at")
