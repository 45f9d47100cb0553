"""The parts of a running gateway, in one value that is passed where they are needed."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import orjson

from app.engine import Engine
from app.guard_models import GuardModels
from app.logs import event
from app.metrics import Metrics
from app.policies import PolicyBook
from app.records import Turn
from app.settings import Settings
from app.store import Store
from app.tracing import Tracer, passed_on
from app.vault import Vaults
from guardrails.types import Message, ToolMessage

if TYPE_CHECKING:
    from app.auth import Auth
    from app.fleet import Fleet
    from app.idempotency import Idempotency
    from app.traffic import Traffic


@dataclass(slots=True)
class Service:
    """Everything `app.chat.answer` and the routes work with; made once in `app.main`."""

    settings: Settings
    secret: bytes
    store: Store
    policies: PolicyBook
    engine: Engine
    fleet: Fleet
    auth: Auth
    traffic: Traffic
    idempotency: Idempotency
    metrics: Metrics
    judges: GuardModels
    vaults: Vaults
    tracer: Tracer | None = None
    started: int = field(default_factory=lambda: int(time.time()))
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _salts: dict[str, str] = field(default_factory=dict)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """The task that runs `work` to its end, whatever happens to the request; shutdown waits for it."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            event("background_work_failed", logging.ERROR, exc_info=error)

    def fingerprint(self, tenant: str, subject: str, messages: Sequence[Message]) -> str:
        """An HMAC of a conversation so far, by which the same history of the same person is recognised.

        White space around messages does not count: clients trim it.
        """
        said = _mac(self.secret).copy()
        said.update(orjson.dumps([tenant, subject, *map(_fingered, messages)]))
        return said.hexdigest()

    def salt(self, tenant: str) -> str:
        """What keeps a tenant's prefixes in an engine's cache apart: others would know of them by how fast they are."""
        found = self._salts.get(tenant)
        if found is None:
            found = self._salts[tenant] = hmac.digest(self.secret, f"cache\0{tenant}".encode(), "sha256").hex()
        return found

    def digest(self, body: bytes) -> str:
        """An HMAC of a request's body, by which the same request is recognised."""
        return hmac.digest(self.secret, body, "sha256").hex()

    def marks(self, turn: Turn) -> dict[str, str]:
        """The headers that tell an engine which request it works for."""
        return {"x-request-id": turn.request_id, **passed_on(turn)}

    def pseudonym(self, tenant: str, person: str) -> str:
        """What stands for a person in the store."""
        return pseudonym(self.secret, tenant, person)


def _fingered(message: Message) -> list[str]:
    """What counts of a message in a fingerprint."""
    told = [message.role, message.content.strip()]
    if isinstance(message, ToolMessage) and message.name:
        told.append(message.name)
    return told


@lru_cache(1)
def _mac(secret: bytes) -> hmac.HMAC:
    """An HMAC that has read the secret, to be copied: to begin one costs more than to reckon with it."""
    return hmac.new(secret, digestmod="sha256")


def pseudonym(secret: bytes, tenant: str, person: str) -> str:
    """An HMAC that stands for a person, so that what belongs to them can be found without their name."""
    return hmac.digest(secret, f"{tenant}\0{person}".encode(), "sha256").hex()[:32] if person else ""
