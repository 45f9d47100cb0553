"""The policies in force: from the database, else a folder, else the ones that ship; swapped whole when they change.

What a policy extends is looked for in the same order, so that a policy is resolved anew when a parent of it changes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from app.errors import ApiError, unavailable
from app.logs import event
from app.metrics import Metrics
from app.records import PolicyVersion
from app.store import NotFound, Store, StoreDown
from guardrails.check import Report, check
from guardrails.plan import prepare
from guardrails.policy import Library, PolicyError, Problem, Resolved, Source, resolve
from guardrails.types import Grader, Judge, Message, Policy, Question, Token

if TYPE_CHECKING:  # the command line imports this module, and has no use for an HTTP client
    from app.guard_models import GuardModels

T = TypeVar("T")
WRONG = "correct the example, or the rule, in the policy that extends"


@dataclass(frozen=True, slots=True)
class _Live:
    """A policy as it is served, and of which stored versions it was made (by name, empty for one that is in none)."""

    policy: Policy
    of: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Put:
    """A policy that was stored, the report on it, and the policies that cannot follow it, with their problems."""

    policy: Policy
    report: Report
    left_behind: Mapping[str, Sequence[str]]


class PolicyBook:
    """The live policy of each name; a new version that cannot be loaded leaves the old one live.

    So does a new version of a parent, when the policy cannot be loaded with it or fails its own examples.
    """

    def __init__(
        self,
        store: Store,
        folders: Sequence[Path] = (),
        metrics: Metrics | None = None,
        judges: GuardModels | None = None,
    ):
        self._store, self._folders, self._metrics, self._judges = store, tuple(folders), metrics, judges
        self._live: dict[str, _Live] = {}
        self._failed: dict[str, Mapping[str, str]] = {}  # with which stored versions a policy could not be loaded
        self._changing = asyncio.Lock()

    async def of(self, name: str) -> Policy:
        """The live policy called `name`; raises ApiError 503 when there is none that loads (fail closed), StoreDown."""
        if name not in self._live:
            async with self._changing:
                await self._adopt(name, await self._store.active_versions())
        if name not in self._live:
            message = f"The policy '{name}' of this tenant cannot be loaded; nothing is answered without one."
            raise unavailable(message, "policy_unavailable", 30)
        return self._live[name].policy

    async def refresh(self) -> None:
        """Takes over versions that were activated elsewhere (another replica, the command line)."""
        async with self._changing:
            try:
                active = await self._store.active_versions()
                for name in list(self._live):
                    await self._adopt(name, active)
            except StoreDown:
                return

    async def _adopt(self, name: str, active: Mapping[str, str]) -> None:
        """Loads a policy if it, or what it extends, is not what it was; `active` has the version of each name."""
        live = self._live.get(name)
        if live and all(active.get(one, "") == version for one, version in live.of.items()):
            if self._failed.pop(name, None) is not None:  # what could not be loaded was taken back
                self._count(name, stale=False)
            return
        if self._failed.get(name) == active:
            return
        stored = await self._store.active_policies()
        try:
            found = await asyncio.to_thread(resolve, name, library(stored, self._folders))
            await asyncio.to_thread(prepare, found.policy)  # else the first request would wait for it
            if live and live.of[name] == active.get(name, ""):
                await examined(found.policy)
        except PolicyError as error:
            self._failed[name] = dict(active)
            self._count(name, stale=True)
            problems = [str(one) for one in error.problems] or [str(error)]
            kept = live.policy.id if live else ""
            event("policy_not_loaded", logging.ERROR, policy=name, kept=kept, problems=problems)
            return
        self._take(name, found, {one.name: one.version for one in stored})

    def _take(self, name: str, found: Resolved, stored: Mapping[str, str]) -> None:
        """Makes a policy the live one: whoever asks from now on is given it."""
        self._live[name] = _Live(found.policy, {one: stored.get(one, "") for one in (name, *found.parents)})
        self._failed.pop(name, None)
        self._count(name, stale=False)
        event("policy_live", policy=found.policy.id)

    def _count(self, name: str, stale: bool) -> None:
        if self._metrics:
            self._metrics.policy_stale.labels(name).set(stale)

    async def put(self, source: str, by: str, activate: bool, grader: Grader | None) -> Put:
        """The policy in `source`, checked, stored, and made live; raises ApiError 400 with every problem found.

        A policy that fails its check changes nothing, unless it is only to be stored.
        """
        return await self._set(Source("policy.toml", source), by, activate, grader)

    async def activate(self, name: str, start: str, by: str, grader: Grader | None) -> Put:
        """The stored version that starts so, checked anew and made live; raises NotFound, ApiError 400."""
        version = named(name, await self._store.policies(name), start)
        return await self._set(Source(f"{name}@{version.version}", version.source), by, True, grader, version)

    async def roll_back(self, name: str, start: str, by: str, grader: Grader | None) -> Put:
        """The version that was live before (or that starts so), as `activate` makes it live."""
        versions = await self._store.policies(name)
        version = named(name, versions, start) if start else former(name, versions)
        return await self._set(Source(f"{name}@{version.version}", version.source), by, True, grader, version)

    async def _set(
        self, source: Source, by: str, activate: bool, grader: Grader | None, known: PolicyVersion | None = None
    ) -> Put:
        """Checks a policy, stores it unless it is `known`, and makes it live if it passes and is to be activated."""
        stored = await self._store.active_policies()
        try:
            found = await asyncio.to_thread(resolve, source, library(stored, self._folders))
        except PolicyError as error:
            raise ApiError(400, str(error), code="invalid_policy", param="source") from None
        policy = found.policy
        report = await _checked(policy, grader, self._judges.of_check() if self._judges else {})
        if activate and not report.passed:
            problems = "\n".join([*map(str, report.failures), *report.faults])
            message = f"The policy fails its own check and was not activated:\n{problems}"
            raise ApiError(400, message, code="policy_check_failed", param="source")
        version = known or await self._store.put_policy(policy.name, source.text, policy.version, by)
        left = await left_behind(version, stored, [*self._live], self._folders) if activate else {}
        if activate:
            async with self._changing:
                await self._store.activate_policy(policy.name, version.version, by)
                self._take(policy.name, found, {one.name: one.version for one in (*stored, version)})
            await self.refresh()
        return Put(policy, report, left)


def library(stored: Iterable[PolicyVersion], folders: Sequence[Path]) -> Library:
    """Where policies are looked for: these versions by name, then the folders."""
    sources = {one.name: Source(f"{one.name}@{one.version}", one.source) for one in stored}
    return Library(tuple(folders), sources)


async def left_behind(
    version: PolicyVersion, stored: Sequence[PolicyVersion], names: Iterable[str], folders: Sequence[Path]
) -> dict[str, list[str]]:
    """The policies that extend this one and that could not be used with this version of it, with their problems.

    They are looked for among the `stored` and the other `names`. A gateway keeps them as they were.
    """
    before = library(stored, folders)
    after = library([*(one for one in stored if one.name != version.name), version], folders)
    problems: dict[str, list[str]] = {}
    for name in sorted({*before.stored, *names} - {version.name}):
        try:
            if version.name not in (await asyncio.to_thread(resolve, name, before)).parents:
                continue
        except PolicyError:  # it cannot be used as things are
            continue
        try:
            await examined((await asyncio.to_thread(resolve, name, after)).policy)
        except PolicyError as error:
            problems[name] = str(error).splitlines()
    return problems


async def examined(policy: Policy) -> None:
    """Raises PolicyError with every example that the policy gets wrong; rules that ask a model are left out."""
    report = await asyncio.to_thread(asyncio.run, check(policy, lint=False))
    if report.failures:
        raise PolicyError([Problem(one.example.file, one.example.line, one.fault, WRONG) for one in report.failures])


def named(name: str, versions: Sequence[PolicyVersion], start: str) -> PolicyVersion:
    """The one version that starts so; raises NotFound."""
    found = [version for version in versions if version.version.startswith(start)]
    if len(found) != 1:
        which = "more than one version" if found else "no version"
        raise NotFound(f"{which} of policy {name!r} starts with {start!r}; see: newel policy list {name}")
    return found[0]


def former(name: str, versions: Sequence[PolicyVersion]) -> PolicyVersion:
    """The version that was stored before the live one, and was live itself; raises NotFound."""
    live = next((place for place, version in enumerate(versions) if version.active), None)
    if live is None:
        raise NotFound(f"no stored version of policy {name!r} is live, so there is nothing to go back from")
    older = next((version for version in versions[live + 1 :] if version.state == "retired"), None)
    if older is None:
        what = f"no version that was stored before {name}@{versions[live].version} was ever live"
        raise NotFound(f"{what}; see: newel policy list {name}")
    return older


async def _checked(policy: Policy, grader: Grader | None, judges: Mapping[str, Judge]) -> Report:
    """The report on a policy, made in a thread: hostile texts keep it busy for seconds, and turns must go on."""
    loop = asyncio.get_running_loop()
    here = _GraderElsewhere(grader, loop) if grader else None
    others = {name: _JudgeElsewhere(judge, loop) for name, judge in judges.items()}
    return await asyncio.to_thread(asyncio.run, check(policy, here, others))


async def _there(loop: asyncio.AbstractEventLoop, asked: Coroutine[Any, Any, T]) -> T:
    """What is answered in the loop that the question belongs to."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asked, loop))


@dataclass(frozen=True, slots=True)
class _GraderElsewhere:
    """A grader that is asked from another thread."""

    grader: Grader
    loop: asyncio.AbstractEventLoop

    async def probability(self, messages: Sequence[Message]) -> float:
        """What the grader answers."""

        async def ask() -> float:
            return await self.grader.probability(messages)

        return await _there(self.loop, ask())


@dataclass(frozen=True, slots=True)
class _JudgeElsewhere:
    """A guard model that is asked from another thread."""

    judge: Judge
    loop: asyncio.AbstractEventLoop

    async def ask(self, question: Question) -> Sequence[Token]:
        """What the guard model answers."""

        async def ask() -> Sequence[Token]:
            return await self.judge.ask(question)

        return await _there(self.loop, ask())
