"""The policies in force: from the database, else a folder, else the ones that ship; swapped whole when they change."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from app.errors import ApiError
from app.logs import event
from app.records import PolicyVersion
from app.store import Store, StoreError
from guardrails.check import Report, check
from guardrails.policy import PolicyError, load, loads
from guardrails.types import Grader, Policy


class PolicyBook:
    """The live policy of each name; a new version that cannot be loaded leaves the old one live."""

    def __init__(self, store: Store, folders: Sequence[Path] = ()):
        self._store, self._folders = store, tuple(folders)
        self._live: dict[str, Policy] = {}

    async def of(self, name: str) -> Policy:
        """The live policy called `name`; raises ApiError 503 when there is none that loads (fail closed)."""
        if name not in self._live:
            await self._adopt(name)
        if name not in self._live:
            message = f"The policy '{name}' of this tenant cannot be loaded; nothing is answered without one."
            raise ApiError(503, message, code="policy_unavailable", kind="server_error", retry_after=30)
        return self._live[name]

    async def refresh(self) -> None:
        """Takes over versions that were activated elsewhere (another replica, the command line)."""
        for name in list(self._live):
            await self._adopt(name)

    async def _adopt(self, name: str) -> None:
        try:
            version = await self._store.active_policy(name)
        except StoreError:
            version = None
            if name in self._live:
                return
        if version and name in self._live and self._live[name].version == version.version:
            return
        if not version and name in self._live:
            return
        try:
            policy = loads(version.source, name, self._folders) if version else load(name, self._folders)
        except PolicyError as error:
            event("policy_not_loaded", logging.ERROR, policy=name, problems=len(error.problems))
            return
        self._live[name] = policy
        event("policy_live", policy=policy.id)

    async def put(self, source: str, by: str, activate: bool, grader: Grader | None) -> tuple[Policy, Report]:
        """The policy in `source`, checked, stored, and made live; raises ApiError 400 with every problem found."""
        try:
            policy = loads(source, "policy.toml", self._folders)
        except PolicyError as error:
            raise ApiError(400, str(error), code="invalid_policy", param="source") from None
        report = await check(policy, grader)
        if activate and not report.passed:
            failed = "; ".join(str(failure) for failure in report.failures[:5])
            message = f"The policy fails its own check and was not activated: {failed}"
            raise ApiError(400, message, code="policy_check_failed", param="source")
        await self._store.put_policy(policy.name, source, policy.version, by)
        if activate:
            await self._store.activate_policy(policy.name, policy.version, by)
            self._live[policy.name] = policy
        return policy, report

    async def versions(self, name: str | None = None) -> list[PolicyVersion]:
        """The stored versions, newest first."""
        return await self._store.policies(name)
