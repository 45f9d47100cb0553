"""The commands about policies: check, compare and replay them, and what is stored and live."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import orjson
import typer

from app import policies
from app.records import PolicyVersion
from app.replay import exchange
from app.settings import Settings
from app.shell import Json, Refusal, actor, print_json, read_settings, show_table, stored, told
from app.store import Store
from guardrails import check as checking
from guardrails import diff as comparing
from guardrails import replay as replaying
from guardrails.policy import PolicyError, Resolved, Source, resolve
from guardrails.schema import json_schema
from guardrails.types import Grader, Judge, Policy

T = TypeVar("T")
Which = Annotated[str, typer.Argument(help="A file, a name, or name@version of a stored one.")]
EngineUrl = Annotated[
    str | None,
    typer.Option(help="An OpenAI-compatible engine; without it, rules that ask a model are skipped."),
]

policy_app = typer.Typer(no_args_is_help=True, help="Policies: which are stored, which are live.")


# --- finding a policy


def _folders(settings: Settings) -> list[Path]:
    return [settings.policies] if settings.policies else []


def _versions() -> list[PolicyVersion]:
    """All stored versions; none when there is no database yet, for a check needs none."""
    url = read_settings().database_url
    kind, _, path = url.partition(":///")
    if kind.startswith("sqlite") and not Path(path).exists():
        return []
    return stored(lambda store: store.policies())


def _found(which: str, versions: Sequence[PolicyVersion], live: bool = False) -> Resolved:
    """The policy in a file, of a name, or of name@version; of a name the one in the folder, or the `live` one."""
    active = [version for version in versions if version.active]
    folders = _folders(read_settings())
    name, at, start = which.partition("@")
    if at and not Path(which).exists():
        of_name = [version for version in versions if version.name == name]
        return resolve(_source(policies.named(name, of_name, start)), policies.library(active, folders))
    others = [version for version in active if live or version.name != which]
    return resolve(which, policies.library(others, folders))


def _source(version: PolicyVersion) -> Source:
    return Source(f"{version.name}@{version.version}", version.source)


@asynccontextmanager
async def _models(url: str | None) -> AsyncIterator[tuple[Grader | None, Mapping[str, Judge]]]:
    """The model behind an OpenAI-compatible URL as a grader, with the guard models that are set up; none without it."""
    if url is None:
        yield None, {}
        return
    import aiohttp

    from app.backends import OneEngine, OpenAIBackend, Upstream
    from app.guard_models import GuardModels
    from app.metrics import Metrics

    settings = read_settings()
    key = settings.engine.api_key
    secret = key.get_secret_value() if key else ""
    try:
        async with aiohttp.ClientSession() as session:
            headers = {"authorization": f"Bearer {secret}"} if secret else {}
            async with session.get(f"{url.rstrip('/')}/models", headers=headers, raise_for_status=True) as answer:
                name = (await answer.json())["data"][0]["id"]
            judges = GuardModels(settings.guard_models, session, Metrics(), 0, 0).of_check()
            yield OneEngine(OpenAIBackend(session), Upstream(url, name, secret)), judges
    except (aiohttp.ClientError, TimeoutError, KeyError, IndexError, TypeError) as error:
        raise Refusal(
            f"no engine answers at {url}/models ({type(error).__name__}); name its base URL, up to /v1"
        ) from None


def _with_models(url: str | None, work: Callable[[Grader | None, Mapping[str, Judge]], Awaitable[T]]) -> T:
    """What `work` returns for the model behind the URL and the guard models."""

    async def run() -> T:
        async with _models(url) as (grader, judges):
            return await work(grader, judges)

    return asyncio.run(run())


# --- check, diff, replay


def check(policy: Which, engine_url: EngineUrl = None, as_json: Json = False) -> None:
    """Checks a policy by its own examples. Also looks for rules that cannot work; exits with 1 when one is found."""
    found = _found(policy, _versions())
    if found.parents and not as_json:
        print(f"extends {', '.join(found.files[1:])}")
    _checked(found.policy, engine_url, as_json)


def _checked(policy: Policy, engine_url: str | None, as_json: bool = False) -> None:
    """Prints the report on a policy; raises Refusal when it fails."""
    report = _with_models(engine_url, lambda grader, judges: checking.check(policy, grader, judges))
    if as_json:
        print_json(checking.as_json(report))
    else:
        print(checking.render(report))
    if not report.passed:
        raise Refusal(f"{policy.id} fails its check: correct what is listed above")


def diff(before: Which, after: Which, as_json: Json = False) -> None:
    """Shows what two policies say differently. Rule by rule, and whether that is stricter or looser."""
    versions = _versions()
    found = comparing.diff(_found(before, versions, live=True), _found(after, versions, live=True))
    if as_json:
        print_json(comparing.as_json(found))
    else:
        print(comparing.render(found))


def replay(
    policy: Which,
    last: Annotated[int, typer.Option(min=1, max=100_000, help="So many of the newest turns.")] = 1000,
    since: Annotated[datetime | None, typer.Option(help="Only turns since this time (UTC).")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    judged_by: Annotated[
        str | None, typer.Option(help="Turns that the policy of this name judged; '*' for any. The candidate's name.")
    ] = None,
    engine_url: EngineUrl = None,
    show: Annotated[int, typer.Option(min=0, help="So many turns of each kind are listed.")] = 20,
    show_text: Annotated[bool, typer.Option("--show-text", help="Also what people wrote, raw.")] = False,
    fail_on_newly_allowed: Annotated[
        bool, typer.Option("--fail-on-newly-allowed", help="Exit with 1 if anything is let through that was not.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Judges logged turns by another policy. Shows what it would newly block, allow and redact.

    The raw texts are read, and the audit log says so of every turn that has withheld text.
    """
    found = _found(policy, _versions()).policy
    of = None if judged_by == "*" else judged_by or found.name
    moment = since.replace(tzinfo=UTC) if since else None
    turns = stored(lambda store: store.logged_turns(actor(), last, of, tenant, moment))
    exchanges = map(exchange, turns)
    replayed = _with_models(engine_url, lambda grader, judges: replaying.replay(found, exchanges, grader, judges))
    if as_json:
        print_json(replaying.as_json(replayed, show_text))
    else:
        print(replaying.render(replayed, show, show_text))
    if not turns:
        told(f"no logged turn was judged by a policy named {of!r}; --judged-by names another" if of else "no turns")
    if fail_on_newly_allowed and replayed.laxer:
        raise Refusal(f"{found.id} lets through what was not let through: see above")


# --- what is stored and live


@policy_app.command("list")
def list_policies(
    name: Annotated[str | None, typer.Argument(help="Only the versions of this one.")] = None, as_json: Json = False
) -> None:
    """Lists the stored versions. Newest first, which are active, and which of those cannot follow their parents."""
    versions = stored(lambda store: store.policies())
    rows = [_row(version, versions) for version in versions if name in (None, version.name)]
    if as_json:
        print_json(rows)
        return
    columns = ("name", "version", "state", "live as", "created", "by", "problem")
    show_table(columns, [[row[column.replace(" ", "_")] for column in columns] for row in rows])


def _row(version: PolicyVersion, versions: Sequence[PolicyVersion]) -> dict[str, Any]:
    """A version as it is listed; `live_as` is its hash with the parents of today, where that is another."""
    row: dict[str, Any] = asdict(version) | {"state": version.state, "live_as": "", "problem": ""}
    row |= {"created": version.created_at, "by": version.created_by}
    if version.active:
        active = [one for one in versions if one.active]
        try:
            now = resolve(_source(version), policies.library(active, _folders(read_settings()))).policy
            if now.version != version.version:
                row["live_as"] = now.version
                asyncio.run(policies.examined(now))
        except PolicyError as error:
            row["problem"] = f"gateways keep what they had: {error}"
    return row


@policy_app.command()
def put(policy: Which, engine_url: EngineUrl = None) -> None:
    """Checks a policy and stores it as a draft. It is not live; a draft may fail its check."""
    found = _found(policy, _versions())
    _as_the_gateway(policy, found)
    try:
        _checked(found.policy, engine_url)
    except Refusal as refusal:
        told(f"{refusal}, before it is activated")
    one = found.policy
    version = stored(lambda store: store.put_policy(one.name, one.source, one.version, actor()))
    print(f"{one.id} is stored ({version.state}); newel policy activate {one.id} makes it live")


@policy_app.command()
def activate(policy: Which, engine_url: EngineUrl = None) -> None:
    """Checks a policy and makes it live. One that fails its check changes nothing."""
    versions = _versions()
    found = _found(policy, versions)
    _as_the_gateway(policy, found)
    name, at, start = policy.partition("@")
    known = at and not Path(policy).exists()
    version = policies.named(name, [one for one in versions if one.name == name], start) if known else None
    _checked(found.policy, engine_url)
    _make_live(found.policy, version)
    print(f"{found.policy.id} is live; a running gateway takes it over within a second")


def _as_the_gateway(policy: str, found: Resolved) -> None:
    """Raises Refusal when a gateway, which has the text and not the file, would read something else."""
    active = [version for version in _versions() if version.active]
    library = policies.library(active, _folders(read_settings()))
    try:
        same = resolve(Source(policy, found.policy.source), library).policy.version == found.policy.version
    except PolicyError:
        same = False
    if not same:
        files = ", ".join(found.files[1:])
        advice = "put it into the folder of `policies`, or activate it first"
        raise Refusal(f"{policy} extends what the gateway does not read ({files}); {advice}")


def _make_live(policy: Policy, known: PolicyVersion | None = None) -> None:
    """Stores a policy unless it is `known`, makes it live, and tells which others cannot follow it."""
    folders = _folders(read_settings())

    async def work(store: Store) -> dict[str, list[str]]:
        version = known or await store.put_policy(policy.name, policy.source, policy.version, actor())
        names = [tenant.policy for tenant in await store.tenants()]
        left = await policies.left_behind(version, await store.active_policies(), names, folders)
        await store.activate_policy(policy.name, version.version, actor())
        return left

    for name, problems in stored(work).items():
        told(f"newel: policy {name!r} cannot follow {policy.id}; a running gateway keeps it as it was, and one that")
        told("starts anew has none, until this is corrected:")
        for problem in problems:
            told(f"  {problem}")


@policy_app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="The name of a policy.")],
    version: Annotated[
        str | None, typer.Argument(help="A version, or its start; the one that was live before.")
    ] = None,
    engine_url: EngineUrl = None,
) -> None:
    """Makes an older version live again. It is checked anew, since what it extends may have changed."""
    versions = [one for one in _versions() if one.name == name]
    chosen = policies.former(name, versions) if version is None else policies.named(name, versions, version)
    found = _found(f"{name}@{chosen.version}", _versions())
    _checked(found.policy, engine_url)
    _make_live(found.policy, chosen)
    print(f"{name}@{chosen.version} is live again; a running gateway takes it over within a second")


@policy_app.command()
def schema(
    output: Annotated[Path | None, typer.Option(help="A file to write it to, instead of the screen.")] = None,
) -> None:
    """Prints the JSON Schema of a policy. An editor completes and checks policy files with it."""
    text = orjson.dumps(json_schema(), option=orjson.OPT_INDENT_2).decode()
    if output is None:
        print(text)
        return
    output.write_text(f"{text}\n", encoding="utf-8")
    told(f"begin a policy with the line: #:schema {output}")
