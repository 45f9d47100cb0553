"""All engines and releases of a gateway: what answers a request, whichever of them that is."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from app.admission import Priority, Slot
from app.backends import Prompt, Timeouts
from app.errors import ApiError, unavailable
from app.fleet.journey import Journey, Trail
from app.fleet.layout import Layout
from app.fleet.members import Caller, Member, Outcome, State, Supervised
from app.fleet.probes import Look
from app.fleet.releases import Release
from app.frames import BackendError, Delta
from app.logs import event
from app.metrics import Metrics
from app.settings import SUPERVISED, Settings
from guardrails.types import Message

T = TypeVar("T")
HELD = 64
"""Pieces that say nothing (a role, an id) and are held back so that another engine can still be asked."""
SHADOWS = 64
"""Copies of requests for shadow releases that may be under way at once."""


@dataclass(frozen=True, slots=True)
class Shadowed:
    """What a shadow release answered, or the error (a fault, or a code of ours), and the seconds that it took."""

    release: Release
    reply: Delta | None
    error: str
    seconds: float


@dataclass(frozen=True, slots=True)
class EngineView:
    """One engine as an operator sees it; last_error is the kind of what went wrong last, "" since it is well."""

    pool: str
    name: str
    url: str
    state: State
    in_flight: int
    limit: int
    weight: float
    models: tuple[str, ...] | None
    last_error: str
    requests: Mapping[Outcome, int]


class Fleet:
    """What `app.chat` asks. Use it from one event loop; `start` begins to look at the engines, `close` ends that.

    engine: the one under [engine], which starts and stops by itself. connect: makes a pool's client. look: how an
    engine is probed.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Supervised,
        connect: Callable[[Timeouts], Caller],
        look: Look,
        metrics: Metrics,
        clock: Callable[[], float] | None = None,
    ):
        self._engine, self._metrics = engine, metrics
        self._clock = clock or asyncio.get_running_loop().time
        self._layout = Layout(settings, engine, connect, look, metrics, self._clock)
        self._patience = settings.first_token_timeout
        self._shadows: set[asyncio.Task[None]] = set()
        self._shown: set[tuple[str, str]] = set()

    # -- what is served ---------------------------------------------------------------------------------------------

    @property
    def models(self) -> tuple[str, ...]:
        """The public models."""
        return tuple(self._layout.lines)

    @property
    def uses_engine(self) -> bool:
        """True when requests may go to the engine under [engine]; where not, it need not run."""
        return SUPERVISED in self._layout.pools

    def choose(self, model: str, sticky: str = "") -> Release:
        """The release of a public model that answers this conversation or person, always the same one.

        Raises ApiError (404).
        """
        line = self._layout.lines.get(model)
        if line is None:
            served = ", ".join(f"'{name}'" for name in self.models)
            message = f"The model '{model}' does not exist; this gateway serves {served}."
            raise ApiError(404, message, code="model_not_found", param="model")
        return line.choose(sticky) if line.canary_share else line.stable

    def without(self, release: Release) -> frozenset[str]:
        """Request parameters that the engines of a release must not be sent."""
        return self._layout.pool(release).without

    def spreads(self, release: Release) -> bool:
        """True when there are several engines that could be asked for a release."""
        pools = self._layout.pools
        return any(len(pools[one.pool].members) > 1 for one in self._layout.way(release))

    def require(self, release: Release) -> None:
        """Raises ApiError (503) when no engine answers that could be asked for a release or one it falls back to."""
        pools = [self._layout.pools[one.pool] for one in self._layout.way(release)]
        if not any(pool.ready for pool in pools):
            after = min(pool.wait(self._clock()) for pool in pools)
            failed = release.pool == SUPERVISED and self._engine.state == "failed"
            why = "cannot be started" if failed else "is starting"
            raise unavailable(f"The inference engine {why}; try again in a while.", "engine_not_ready", after)

    def slot(
        self, release: Release, priority: Priority = "interactive", deadline: float = math.inf, tenant: str = ""
    ) -> Slot:
        """A place before the engines of a release, for an `async with`; see `Admission.slot`."""
        return self._layout.pool(release).admission.slot(priority, deadline, tenant)

    # -- asking -----------------------------------------------------------------------------------------------------

    async def stream(
        self, prompt: Prompt, release: Release, affinity: str = "", trail: Trail | None = None
    ) -> AsyncGenerator[Delta, None]:
        """The reply in pieces; closing it cancels the engine's work.

        affinity: the same for requests with the same beginning, whose prefix an engine may have in its cache. An engine
        that fails before it has said anything is another's turn; after that its error is raised. Raises BackendError.
        """
        journey = self._journey(prompt, release, affinity, trail)
        while True:
            member = journey.next()
            source = journey.pool.caller.stream(member.upstream(journey.release.model), prompt)
            outcome: Outcome = "cancelled"
            spoke = False
            try:
                first = await _opening(source, journey.deadline)
                spoke = True
                journey.pool.answers(member, self._clock())
                for delta in first:
                    yield delta
                async for delta in source:
                    yield delta
                outcome = "answered"
                return
            except BackendError as error:
                outcome = error.fault
                if spoke:
                    journey.pool.fails(member, error, self._clock())
                    raise
                journey.failed(member, error)
            finally:
                member.leave(outcome)
                await source.aclose()

    async def complete(self, prompt: Prompt, release: Release, affinity: str = "", trail: Trail | None = None) -> Delta:
        """The whole reply; cancelling it cancels the engine's work. Raises BackendError."""
        journey = self._journey(prompt, release, affinity, trail)
        return await self._whole(
            journey, lambda member: journey.pool.caller.complete(member.upstream(journey.release.model), prompt)
        )

    async def post(self, path: str, body: Mapping[str, Any], release: Release) -> bytes:
        """What an engine answers to another request than for a chat, as it came; raises BackendError."""
        journey = self._journey(Prompt((), body), release, "", None)
        return await self._whole(
            journey,
            lambda member: journey.pool.caller.post(member.upstream(journey.release.model), path, body),
        )

    async def probability(self, messages: Sequence[Message], release: Release | None = None) -> float:
        """P(yes) for a yes/no question (a Grader), to the first model unless told; raises BackendError, ValueError."""
        release = release or next(iter(self._layout.lines.values())).stable
        journey = self._journey(Prompt(tuple(messages), {}), release, "", None)
        return await self._whole(
            journey,
            lambda member: journey.pool.caller.probability(member.upstream(journey.release.model), messages),
        )

    def has_shadow(self, release: Release) -> bool:
        """True when another release is tried in the shadow of this one's model."""
        line = self._layout.lines.get(release.public)
        return line is not None and line.shadow is not None

    def shadow(
        self,
        prompt: Prompt,
        release: Release,
        sticky: str = "",
        affinity: str = "",
        said: Callable[[Shadowed], None] | None = None,
    ) -> bool:
        """Asks the shadow of a model the same in the background, for its share of conversations; returns whether.

        said: is told what came of it. Nothing of it reaches the request itself, and it gives way to every other.
        """
        line = self._layout.lines.get(release.public)
        target = line.shadowed(sticky) if line else None
        if target is None:
            return False
        if len(self._shadows) >= SHADOWS:
            self._metrics.shadow_requests.labels(target.public, "dropped").inc()
            return False
        task = asyncio.create_task(self._shadowed(prompt, target, affinity, said), name="shadow")
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)
        return True

    async def _shadowed(
        self, prompt: Prompt, release: Release, affinity: str, said: Callable[[Shadowed], None] | None
    ) -> None:
        began = self._clock()
        reply, error = None, ""
        try:
            async with self._layout.pool(release).admission.slot("shadow"):
                reply = await self.complete(prompt, release, affinity)
        except ApiError as shed:
            error = shed.code
        except BackendError as failure:
            error = failure.fault
        except Exception as unknown:  # the edge: nobody awaits this
            event("shadow_failed", logging.ERROR, exc_info=unknown)
            error = "internal_error"
        self._metrics.shadow_requests.labels(release.public, error or "answered").inc()
        if said is not None:
            said(Shadowed(release, reply, error, self._clock() - began))

    async def _whole(self, journey: Journey, ask: Callable[[Member], Awaitable[T]]) -> T:
        """What the first engine answers that answers at all."""
        while True:
            member = journey.next()
            outcome: Outcome = "cancelled"
            try:
                reply = await ask(member)
                outcome = "answered"
                if not journey.shadow:
                    journey.pool.answers(member, self._clock())
                return reply
            except BackendError as error:
                outcome = error.fault
                journey.failed(member, error)
            finally:
                member.leave(outcome)

    def _journey(self, prompt: Prompt, release: Release, affinity: str, trail: Trail | None) -> Journey:
        layout = self._layout
        way = layout.way(release)
        return Journey(layout.pools, way, prompt.sampling, affinity, self._clock, self._patience, trail)

    # -- operating --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begins to look at the engines, and returns at once."""
        self._layout.watch()

    async def close(self) -> None:
        """Ends what runs in the background; requests in flight are the callers' own."""
        await self._layout.close()
        for task in (tasks := list(self._shadows)):
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def reload(self, settings: Settings) -> None:
        """Takes other pools and models; engines that stay keep what they have in flight and how they were.

        Those that are gone get no more requests, and end what they have begun. Queues keep their settings.
        """
        self._patience = settings.first_token_timeout
        self._layout.take(settings)

    def drain(self, engine: str) -> None:
        """Sends an engine (`POOL/NAME`) no more requests; raises ApiError (404)."""
        self._member(engine).draining = True
        self._layout.resize()

    def resume(self, engine: str) -> None:
        """Sends an engine requests again; raises ApiError (404)."""
        self._member(engine).draining = False
        self._layout.resize()

    async def drained(self, engine: str, timeout: float) -> int:
        """How many requests an engine still has in flight after so many seconds; returns at once when none."""
        member = self._member(engine)
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await member.drained()
        return member.in_flight

    def missing(self) -> dict[str, str]:
        """What keeps `/readyz` from being 200: pools of which no engine answers; empty while a model can be had."""
        layout = self._layout
        if any(layout.pools[line.stable.pool].ready for line in layout.lines.values()):
            return {}
        return {f"pool {name}": "no engine answers" for name, pool in layout.pools.items() if not pool.ready}

    @property
    def retry_after(self) -> int:
        """Seconds after which it makes sense to ask again, at least 1."""
        return min((pool.wait(self._clock()) for pool in self._layout.pools.values()), default=1)

    def snapshot(self) -> list[EngineView]:
        """Every engine as it stands, also those that end what they have begun after a reload."""
        return [self._view(one) for one in (*self._layout.members(), *self._layout.going)]

    def publish(self) -> None:
        """Brings the metrics up to date; call it before they are rendered."""
        now, metrics = self._clock(), self._metrics
        for pool in self._layout.pools.values():
            pool.admission.publish()
        shown = set()
        for one in self._layout.members():
            engine = (one.pool, one.name)
            shown.add(engine)
            metrics.engine_up.labels(*engine).set(one.state(now) == "ready")
            metrics.engine_in_flight.labels(*engine).set(one.in_flight)
            for outcome, number in one.unpublished().items():
                metrics.engine_requests.labels(*engine, outcome).inc(number)
        for engine in self._shown - shown:  # an engine that was taken out of the settings is neither up nor down
            metrics.engine_up.remove(*engine)
            metrics.engine_in_flight.remove(*engine)
        self._shown = shown

    def _view(self, one: Member) -> EngineView:
        models = None if one.models is None else tuple(sorted(one.models))
        url = one.supervised.url if one.supervised else one.address.url
        state = one.state(self._clock())
        return EngineView(
            one.pool, one.name, url, state, one.in_flight, one.limit, one.weight, models, one.last_error, dict(one.ends)
        )

    def _member(self, engine: str) -> Member:
        for one in self._layout.members():
            if engine == f"{one.pool}/{one.name}":
                return one
        raise ApiError(404, f"There is no engine '{engine}'; write POOL/NAME.", code="not_found")


async def _opening(source: AsyncGenerator[Delta, None], deadline: float | None) -> list[Delta]:
    """The pieces up to the first that says something; raises BackendError, also when it is not there by `deadline`."""
    if deadline is not None:
        try:
            async with asyncio.timeout_at(deadline):
                return await _opening(source, None)
        except TimeoutError:
            raise BackendError("timeout", "The engine took too long to answer.") from None
    held: list[Delta] = []
    async for delta in source:
        held.append(delta)
        if delta.says or delta.finish_reason or len(held) >= HELD:
            break
    return held
