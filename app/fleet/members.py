"""One engine of a pool as it stands: whether it can be asked now, what it has in flight, how it has answered."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, Protocol

from app.backends import Prompt, Upstream
from app.breaker import Breaker
from app.frames import BackendError, Delta, Fault
from guardrails.types import Message

State = Literal["ready", "probing", "busy", "open", "draining"]
Outcome = Literal["answered", "cancelled"] | Fault
LONGEST_BUSY = 60.0
"""Seconds that a busy engine is left alone at most, whatever it says."""
SOON = 0.5
"""Seconds until an engine that is not well is looked at again, about."""


class Caller(Protocol):
    """The client of engines; `app.backends.OpenAIBackend` is it."""

    def stream(self, upstream: Upstream, prompt: Prompt) -> AsyncGenerator[Delta, None]:
        """The reply in pieces; raises BackendError."""
        ...

    async def complete(self, upstream: Upstream, prompt: Prompt) -> Delta:
        """The whole reply; raises BackendError."""
        ...

    async def post(self, upstream: Upstream, path: str, body: Mapping[str, Any]) -> bytes:
        """What the engine answers to another request, as it came; raises BackendError."""
        ...

    async def probability(self, upstream: Upstream, messages: Sequence[Message]) -> float:
        """P(yes) for a yes/no question; raises BackendError, ValueError."""
        ...


class Supervised(Protocol):
    """The engine under [engine], whose address and state change as it is started anew; `app.engine.Engine` is it."""

    @property
    def state(self) -> str:
        """`ready` when it answers."""
        ...

    url: str
    model: str
    api_key: str
    without: frozenset[str]

    @property
    def retry_after(self) -> int:
        """Seconds after which it makes sense to ask again."""
        ...


@dataclass(frozen=True, slots=True)
class Address:
    """Where an engine is, and the key it wants."""

    url: str
    api_key: str = ""
    weight: float = 1.0


class Member:
    """One engine. `enter` and `leave` frame each request to it."""

    __slots__ = (
        "_published",
        "_supervised",
        "_upstreams",
        "address",
        "breaker",
        "busy_until",
        "draining",
        "ends",
        "heard",
        "idle",
        "in_flight",
        "last_error",
        "limit",
        "misses",
        "models",
        "name",
        "pool",
        "probed",
        "room",
        "seed",
        "used",
        "wake",
        "weight",
        "without",
    )

    def __init__(
        self,
        pool: str,
        name: str,
        where: Address | Supervised,
        *,
        limit: int,
        breaker: Breaker,
        without: frozenset[str] = frozenset(),
    ):
        self.pool, self.name, self.breaker, self.without = pool, name, breaker, without
        self._supervised = None if isinstance(where, Address) else where
        self.address = where if isinstance(where, Address) else Address("")
        self.weight = self.address.weight
        self.limit = max(1, round(limit * self.weight))
        self.room = float(self.limit)
        """Requests that it takes at once: `limit`, or what it was found to take when it last said that it is busy."""
        self._upstreams: dict[str, Upstream] = {}
        self.seed = int.from_bytes(blake2b(f"{pool}/{name}".encode(), digest_size=8).digest())
        self.probed = self.draining = False
        self.models: frozenset[str] | None = None
        self.busy_until = self.heard = 0.0
        self.misses = self.in_flight = self.used = 0
        self.last_error = ""
        self.ends: Counter[Outcome] = Counter()
        self._published: Counter[Outcome] = Counter()
        self.wake, self.idle = asyncio.Event(), asyncio.Event()

    @property
    def supervised(self) -> Supervised | None:
        """The engine under [engine], where this is it."""
        return self._supervised

    @property
    def ready(self) -> bool:
        """True when it answered when it was last looked at."""
        return self._supervised.state == "ready" if self._supervised else self.probed

    @property
    def load(self) -> float:
        """Requests in flight for each unit of weight."""
        return self.in_flight / self.weight

    def upstream(self, model: str) -> Upstream:
        """How it is asked for a model now."""
        if one := self._supervised:
            return Upstream(one.url, model or one.model, one.api_key, one.without)
        known = self._upstreams.get(model)
        if known is None:
            known = Upstream(self.address.url, model, self.address.api_key, self.without)
            self._upstreams[model] = known
        return known

    def has_room(self, model: str, now: float) -> bool:
        """True when it can be asked for a model now; an open breaker aside."""
        return (
            not self.draining
            and self.in_flight < self.room
            and self.busy_until <= now
            and (self.models is None or model in self.models)
            and self.ready
        )

    def wait(self, now: float) -> float:
        """Seconds until it makes sense to ask again."""
        if self._supervised and not self.ready:
            return self._supervised.retry_after
        return max(self.busy_until - now, self.breaker.opens_in, 0.0 if self.ready else SOON)

    def state(self, now: float) -> State:
        """What keeps requests from it, if anything does."""
        if self.draining:
            return "draining"
        if not self.ready:
            return "probing"
        return "open" if self.breaker.open else "busy" if self.busy_until > now else "ready"

    def enter(self, turn: int) -> None:
        """A request begins, whose end must be told; raises BreakerOpen. turn: grows with every request."""
        self.breaker.admit()
        self.in_flight += 1
        self.used = turn

    def answers(self, now: float) -> None:
        """It has begun to answer the request: with each it is trusted with a little more."""
        self.heard, self.misses = now, 0
        self.breaker.succeeded()
        if self.room < self.limit:
            self.room = min(float(self.limit), self.room + 1 / self.room)

    def leave(self, outcome: Outcome) -> None:
        """A request has ended, its failure told with `fails`."""
        self.in_flight -= 1
        self.ends[outcome] += 1
        if outcome == "cancelled":
            self.breaker.unknown()
        if self.draining and not self.in_flight:
            self.idle.set()

    async def drained(self) -> None:
        """Returns when nothing is in flight any more; new requests must be kept from it meanwhile (`draining`)."""
        while self.in_flight:
            self.idle.clear()
            await self.idle.wait()

    def adapt(self, limit: int, without: frozenset[str]) -> None:
        """Takes new settings."""
        self.limit, self.without = max(1, round(limit * self.weight)), without
        self.room = float(self.limit)
        self._upstreams.clear()

    def unpublished(self) -> dict[Outcome, int]:
        """Requests that ended since this was last asked, by outcome."""
        new = self.ends - self._published
        self._published = self.ends.copy()
        return dict(new)

    def fails(self, error: BackendError, now: float) -> None:
        """A request has failed: what that says of the engine. One that is busy or refuses a request is alive.

        A busy engine is left alone for as long as it says; one that does not say (vLLM) gets no more at once than it
        had when it said so.
        """
        self.last_error = error.fault
        if error.fault == "rejected":
            self.breaker.succeeded()
        elif error.fault == "busy":
            self.breaker.unknown()
            if error.retry_after is None:
                self.room = float(max(1, min(self.limit, self.in_flight - 1)))
            else:
                self.busy_until = max(self.busy_until, now + min(float(error.retry_after), LONGEST_BUSY))
        else:
            self.breaker.failed()
            if self.breaker.open:
                self.wake.set()


def made(
    pool: str,
    name: str,
    where: Address | Supervised,
    limit: int,
    clock: Callable[[], float],
    without: frozenset[str] = frozenset(),
) -> Member:
    """A member with the breaker that engines have: five failures in a row or half of the last twenty, for 5 seconds."""
    return Member(pool, name, where, limit=limit, breaker=Breaker(5, 5.0, clock, ratio=0.5), without=without)
