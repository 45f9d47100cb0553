"""The parts of a running gateway, in one value that is passed where they are needed."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from app.auth import Keys
from app.backends import Backend
from app.engine import Engine
from app.metrics import Metrics
from app.policies import PolicyBook
from app.settings import Settings
from app.store import Store
from guardrails.types import Message


@dataclass(slots=True)
class Service:
    """Everything `app.chat.answer` and the routes work with; made once in `app.main`."""

    settings: Settings
    secret: bytes
    store: Store
    keys: Keys
    policies: PolicyBook
    engine: Engine
    backend: Backend
    metrics: Metrics
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Runs `work` to its end, whatever happens to the request that asked for it; shutdown waits for it."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def fingerprint(self, tenant: str, messages: Sequence[Message]) -> str:
        """An HMAC of a conversation so far: the same history of the same tenant is recognised, nothing is revealed."""
        said = orjson.dumps([tenant, *([message.role, message.content] for message in messages)])
        return hmac.new(self.secret, said, hashlib.sha256).hexdigest()

    def pseudonym(self, tenant: str, subject: str) -> str:
        """An HMAC that stands for a person, so that what belongs to them can be found without their name."""
        return hmac.new(self.secret, f"{tenant}\0{subject}".encode(), hashlib.sha256).hexdigest()[:32] if subject else ""
