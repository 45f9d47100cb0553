"""One request's way from engine to engine and from release to release, until one begins to answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.fleet.members import Member
from app.fleet.pools import Pool
from app.fleet.releases import Release
from app.frames import BackendError


@dataclass(slots=True)
class Trail:
    """What became of a request: the release and the engine that answered, and who failed before (engine, fault)."""

    release: Release | None = None
    engine: str = ""
    tries: list[tuple[str, str]] = field(default_factory=list)


class Journey:
    """Which engine is asked next. Call `next`, and `failed` with the error of the engine that it returned.

    releases: the one that was chosen, then those to fall back to. deadline: the clock's time after which no other
    engine is asked. A shadow is asked once, and tells nothing of an engine's health: its release may be broken.
    """

    __slots__ = (
        "_affinity",
        "_clock",
        "_deadline",
        "_error",
        "_place",
        "_pools",
        "_releases",
        "_sampling",
        "_tried",
        "deadline",
        "pool",
        "release",
        "shadow",
        "trail",
    )

    def __init__(
        self,
        pools: Mapping[str, Pool],
        releases: Sequence[Release],
        sampling: Mapping[str, Any],
        affinity: str,
        clock: Callable[[], float],
        patience: float,
        trail: Trail | None,
    ):
        self._pools, self._releases, self._sampling, self._affinity = pools, releases, sampling, affinity
        self._clock, self._deadline = clock, clock() + patience
        self._place = 0
        self._tried: tuple[Member, ...] = ()
        self._error: BackendError | None = None
        self.release, self.trail = releases[0], trail
        self.pool = pools[self.release.pool]
        self.shadow = self.release.kind == "shadow"
        self.deadline: float | None = None
        """By when the first token must be there; the first engine has the client's own time-out."""

    def next(self) -> Member:
        """The engine to ask now, entered; raises BackendError when there is none left."""
        now = self._clock()
        while True:
            pool = self.pool
            if len(self._tried) <= pool.retries and (member := self._picked(now)) is not None:
                pool.turns += 1
                member.enter(pool.turns)
                if self.trail is not None:
                    self.trail.release, self.trail.engine = self.release, member.name
                return member
            if not self._onwards():
                raise self._end(now)

    def _picked(self, now: float) -> Member | None:
        pool = self.pool
        member = pool.pick(self.release.model, self._affinity, now, self._tried)
        if member is None or (self.shadow and member.breaker.open):
            return None
        if not self._tried:
            pool.budget.ask(now)
        elif not pool.budget.take():
            return None
        return member

    def failed(self, member: Member, error: BackendError) -> None:
        """Notes that the engine failed before it said anything; raises BackendError when no other is to be asked."""
        now = self._clock()
        if self.shadow:
            raise error
        self.pool.fails(member, error, now)
        if self.trail is not None:
            self.trail.tries.append((f"{self.pool.name}/{member.name}", error.fault))
        if not self._place or self._error is None:
            self._error = error
        if error.fault == "rejected" and not self._place:
            raise error
        if now >= self._deadline:
            raise self._end(now)
        self.deadline = self._deadline
        # What one engine of a pool refuses, the others do.
        self._tried = self.pool.members if error.fault == "rejected" else (*self._tried, member)

    def _onwards(self) -> bool:
        """True when there is another release to fall back to, which can be sent what this request says."""
        first = self._pools[self._releases[0].pool].without
        while self._place + 1 < len(self._releases):
            self._place += 1
            self.release = self._releases[self._place]
            self.pool, self._tried = self._pools[self.release.pool], ()
            if not self._sampling.keys() & (self.pool.without - first):
                return True
        return False

    def _end(self, now: float) -> BackendError:
        """The error of the release that was chosen, with the best time to come back."""
        pools = {self._pools[release.pool] for release in self._releases[: self._place + 1]}
        after = min(pool.wait(now) for pool in pools)
        if (error := self._error) is not None:
            return BackendError(error.fault, error.message, code=error.code, retry_after=after)
        if any(pool.ready for pool in pools):
            return BackendError("busy", "All engines are busy.", retry_after=after)
        return BackendError("unreachable", "No engine can be reached.", retry_after=after)
