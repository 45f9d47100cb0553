"""The policies in force: from the database, else a folder, else the ones that ship; swapped whole when they change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from app.errors import ApiError, unavailable
from app.logs import event
from app.records import PolicyVersion
from app.store import Store, StoreDown
from guardrails.check import Report, check
from guardrails.policy import PolicyError, load, loads
from guardrails.types import Grader, Message, Policy


class PolicyBook:
    """The live policy of each name; a new version that cannot be loaded leaves the old one live."""

    def __init__(self, store: Store, folders: Sequence[Path] = ()):
        self._store, self._folders = store, tuple(folders)
        self._live: dict[str, Policy] = {}
        self._seen: dict[str, str] = {}  # the stored version that was last looked at, whether it could be loaded or not

    async def of(self, name: str) -> Policy:
        """The live policy called `name`; raises ApiError 503 when there is none that loads (fail closed), StoreDown."""
        if name not in self._live:
            await self._adopt(name)
        if name not in self._live:
            message = f"The policy '{name}' of this tenant cannot be loaded; nothing is answered without one."
            raise unavailable(message, "policy_unavailable", 30)
        return self._live[name]

    async def refresh(self) -> None:
        """Takes over versions that were activated elsewhere (another replica, the command line)."""
        for name in list(self._live):
            try:
                await self._adopt(name)
            except StoreDown:
                return

    async def _adopt(self, name: str) -> None:
        version = await self._store.active_policy(name)
        stored = version.version if version else ""
        if name in self._live and self._seen[name] == stored:
            return
        self._seen[name] = stored
        try:
            policy = await asyncio.to_thread(self._load, name, version)
        except PolicyError as error:
            event("policy_not_loaded", logging.ERROR, policy=name, problems=[str(one) for one in error.problems])
            return
        self._live[name] = policy
        event("policy_live", policy=policy.id)

    def _load(self, name: str, version: PolicyVersion | None) -> Policy:
        if version is None:
            return load(name, self._folders)
        return loads(version.source, f"{name}@{version.version}", self._folders)

    async def put(self, source: str, by: str, activate: bool, grader: Grader | None) -> tuple[Policy, Report]:
        """The policy in `source`, checked, stored, and made live; raises ApiError 400 with every problem found.

        A policy that fails its check changes nothing, unless it is only to be stored.
        """
        try:
            policy = await asyncio.to_thread(loads, source, "policy.toml", self._folders)
        except PolicyError as error:
            raise ApiError(400, str(error), code="invalid_policy", param="source") from None
        report = await _checked(policy, grader)
        if activate and not report.passed:
            found = "\n".join([*map(str, report.failures), *report.faults])
            message = f"The policy fails its own check and was not activated:\n{found}"
            raise ApiError(400, message, code="policy_check_failed", param="source")
        await self._store.put_policy(policy.name, source, policy.version, by)
        if activate:
            await self._store.activate_policy(policy.name, policy.version, by)
            self._live[policy.name], self._seen[policy.name] = policy, policy.version
        return policy, report


async def _checked(policy: Policy, grader: Grader | None) -> Report:
    """The report on a policy, made in a thread: hostile texts keep it busy for seconds, and turns must go on."""
    here = _Elsewhere(grader, asyncio.get_running_loop()) if grader else None
    return await asyncio.to_thread(asyncio.run, check(policy, here))


class _Elsewhere:
    """A grader that is asked from another thread, and answers in its own loop."""

    def __init__(self, grader: Grader, loop: asyncio.AbstractEventLoop):
        self._grader, self._loop = grader, loop

    async def probability(self, messages: Sequence[Message]) -> float:
        """What the grader answers."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_ask(self._grader, messages), self._loop))


async def _ask(grader: Grader, messages: Sequence[Message]) -> float:
    return await grader.probability(messages)
