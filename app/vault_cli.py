"""The commands about values behind placeholders: who has to see them, and what has to be forgotten."""

from __future__ import annotations

from typing import Annotated

import typer

from app.shell import Json, Refusal, actor, find_turn, print_json, read_settings, show_table, stored
from app.store import Store

vault_app = typer.Typer(no_args_is_help=True, help="Values behind placeholders such as [EMAIL_1].")


@vault_app.command("show")
def show_values(
    turn: Annotated[str, typer.Argument(help="The completion's id, chatcmpl-...")],
    reason: Annotated[str, typer.Option(help="Why the values are needed; it is audited.")],
    as_json: Json = False,
) -> None:
    """Shows the values behind one exchange. Those that have not expired; who looked and why is audited."""
    from app.sealing import read_secret
    from app.vault import open_vaults

    if not reason.strip():
        raise typer.BadParameter("values are shown only for a reason", param_hint="--reason")
    settings = read_settings()

    async def look(store: Store) -> dict[str, str]:
        vaults = open_vaults(store, settings, read_secret(settings))
        return await vaults.reveal(await find_turn(store, turn), actor(), reason)

    values = stored(look)
    if as_json:
        print_json(values)
    else:
        show_table(("placeholder", "value"), sorted(values.items()))


@vault_app.command("forget")
def forget_values(
    tenant: Annotated[str, typer.Argument(help="The tenant whose values they are.")],
    conversation: Annotated[str | None, typer.Option(help="Those of this conversation.")] = None,
    user: Annotated[str | None, typer.Option(help="Those of this person, as clients send it in `user`.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of the tenant's.")] = False,
) -> None:
    """Deletes values for good. Placeholders in what is stored then stand for nothing; that is audited."""
    from app.sealing import read_secret
    from app.service import pseudonym

    if everything == (conversation is not None or user is not None):
        raise typer.BadParameter("say whose values: --conversation, --user or both, or else --all")
    settings = read_settings()
    owner = pseudonym(read_secret(settings), tenant, user) if user else None

    async def forget(store: Store) -> int:
        if await store.tenant(tenant) is None:
            raise Refusal(f"there is no tenant {tenant!r}; newel tenants list shows them")
        return await store.forget_values(tenant, actor(), conversation=conversation, owner=owner)

    print(f"deleted: {stored(forget)}")
