"""The pools and releases that the settings describe, and the watch over every engine of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from app.admission import Admission
from app.backends import Timeouts
from app.errors import unavailable
from app.fleet.members import Address, Caller, Member, Supervised, made
from app.fleet.pools import Pool
from app.fleet.probes import Look, Watch
from app.fleet.releases import Line, Release, lines, single
from app.metrics import Metrics
from app.settings import SUPERVISED, PoolSettings, Settings


class Layout:
    """Pools by name and lines by public model. Engines that stay when the settings change keep their state."""

    def __init__(
        self,
        settings: Settings,
        engine: Supervised,
        connect: Callable[[Timeouts], Caller],
        look: Look,
        metrics: Metrics,
        clock: Callable[[], float],
    ):
        self._engine, self._connect, self._look, self._metrics, self._clock = engine, connect, look, metrics, clock
        self._lines: dict[str, Line] = {}
        self._watches: dict[Member, asyncio.Task[None]] = {}
        self._watching = False
        self.pools: dict[str, Pool] = {}
        self.going: dict[Member, asyncio.Task[None]] = {}
        """Engines that are no longer in the settings and end what they have begun."""
        self.take(settings)

    @property
    def lines(self) -> dict[str, Line]:
        """The lines by public model; the supervised engine's own model is known once that is."""
        if not self._settings.models and self._engine.model not in self._lines:
            self._lines = single(self._engine.model)
        return self._lines

    def pool(self, release: Release) -> Pool:
        """The pool of a release; raises ApiError (503) where the settings have changed and it is gone."""
        if (pool := self.pools.get(release.pool)) is None:
            raise unavailable(f"'{release.public}' is served elsewhere now; try again.", "release_gone", 1)
        return pool

    def way(self, release: Release) -> tuple[Release, ...]:
        """The releases that are asked one after the other; a shadow is alone. Raises ApiError (503)."""
        line = self._lines.get(release.public)
        if line is not None and line.stable is release:
            return line.way
        rest: tuple[Release, ...] = ()
        if line is not None and release.kind in ("stable", "canary"):
            rest = line.way if release.kind == "canary" else line.way[1:]
        there = tuple(one for one in (release, *rest) if one.pool in self.pools)
        if not there:
            self.pool(release)
        return there

    def members(self) -> Iterator[Member]:
        """Every engine."""
        return (one for pool in self.pools.values() for one in pool.members)

    def take(self, settings: Settings) -> None:
        """Takes settings: at the start, and others later."""
        self._settings = settings
        self._lines = lines(settings.models) if settings.models else single(self._engine.model)
        before = self.pools
        wanted = dict.fromkeys(release.pool for line in self._lines.values() for release in line.all)
        self.pools = {name: self._pool(name, before.get(name)) for name in wanted}
        there = set(self.members())
        for member in (one for pool in before.values() for one in pool.members if one not in there):
            self._retire(member)
        self.resize()
        if self._watching:
            self.watch()

    def watch(self) -> None:
        """Begins to look at every engine, each with the settings that its pool has now."""
        self._watching = True
        for pool in self.pools.values():
            for member in pool.members:
                if task := self._watches.pop(member, None):
                    task.cancel()
                work = self._watch_of(pool, member).run()
                self._watches[member] = asyncio.create_task(work, name=f"watch {pool.name}/{member.name}")

    async def close(self) -> None:
        """Ends the watch."""
        self._watching = False
        tasks = [*self._watches.values(), *self.going.values()]
        self._watches.clear()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def resize(self) -> None:
        """Opens every pool's queue as wide as its engines allow now."""
        for pool in self.pools.values():
            pool.resize()

    def _pool(self, name: str, before: Pool | None) -> Pool:
        of, shared = self._settings_of(name), self._settings
        limit, without = of.in_flight or shared.admission.in_flight, frozenset(of.without)
        admission = before.admission if before else Admission(shared.admission, self._metrics, name, limit)
        caller = self._connect(_timeouts(of, shared))
        pool = Pool(name, caller, admission, retries=of.retries, in_flight=limit, without=without, clock=self._clock)
        there = {(one.name, one.address): one for one in before.members} if before else {}
        addresses = {SUPERVISED: Address("")} if name == SUPERVISED else _addresses(of)
        members: list[Member] = []
        for engine, address in addresses.items():
            where = self._engine if name == SUPERVISED else address
            member = there.get((engine, address)) or made(name, engine, where, limit, self._clock)
            member.adapt(limit, without)
            members.append(member)
        pool.members = tuple(members)
        return pool

    def _watch_of(self, pool: Pool, member: Member) -> Watch:
        of = self._settings_of(pool.name)
        return Watch(
            member,
            pool.caller,
            self._look,
            lambda: [one.model for line in self.lines.values() for one in line.all if one.pool == pool.name],
            self._clock,
            self.resize,
            every=of.probe_every,
            trial_every=of.trial_every,
            patience=of.first_token_timeout or self._settings.first_token_timeout,
            listed=of.listed,
        )

    def _settings_of(self, pool: str) -> PoolSettings:
        """Those of the pool; the supervised engine has the defaults."""
        return self._settings.pools.get(pool) or PoolSettings.model_construct(engines={})

    def _retire(self, member: Member) -> None:
        """An engine that is no longer in the settings."""
        member.draining = True
        if task := self._watches.pop(member, None):
            task.cancel()
        if member.in_flight:
            self.going[member] = asyncio.create_task(member.drained())
            self.going[member].add_done_callback(lambda _: self.going.pop(member))


def _addresses(settings: PoolSettings) -> dict[str, Address]:
    return {
        name: Address(one.url.rstrip("/"), one.api_key.get_secret_value() if one.api_key else "", one.weight)
        for name, one in settings.engines.items()
    }


def _timeouts(pool: PoolSettings, settings: Settings) -> Timeouts:
    return Timeouts(
        pool.first_token_timeout or settings.first_token_timeout,
        pool.idle_timeout or settings.idle_timeout,
        pool.total_timeout or settings.total_timeout,
    )
