"""Engines that share a load: which one a request goes to, and whether it may go to another when that one fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from hashlib import blake2b

from app.admission import Admission
from app.fleet.members import Caller, Member
from app.frames import BackendError
from guardrails.types import Message

BALANCE = 1.25
"""How many times as busy as the least busy engine the one may be that has a conversation's prefix in its cache."""
SLACK = 4.0
"""And how many requests more, for each unit of weight: a batch of a few costs an engine hardly more than one."""
EXTRA = 0.2
"""Requests that may be made again, for each request."""
FLOOR = 10
"""Requests in a WINDOW that may be made again however few there are."""
WINDOW = 10.0
"""Seconds that the budget looks back, and up to as many more."""
_MASK = (1 << 64) - 1


class RetryBudget:
    """How many requests may be made again: a share of those of late, so that retries cannot bring engines down."""

    __slots__ = ("_clock", "_ends", "_now", "_past")

    def __init__(self, clock: Callable[[], float]):
        self._clock, self._ends = clock, clock() + WINDOW
        self._now, self._past = [0, 0], [0, 0]

    def ask(self, now: float) -> None:
        """Counts a request."""
        if now >= self._ends:
            self._turn(now)
        self._now[0] += 1

    def take(self) -> bool:
        """Counts a request that is made again, if it may be."""
        now = self._clock()
        if now >= self._ends:
            self._turn(now)
        if self._now[1] + self._past[1] >= EXTRA * (self._now[0] + self._past[0]) + FLOOR:
            return False
        self._now[1] += 1
        return True

    def _turn(self, now: float) -> None:
        self._past = self._now if now < self._ends + WINDOW else [0, 0]
        self._now, self._ends = [0, 0], now + WINDOW


class Pool:
    """The engines of one pool, with their client and the queue before them."""

    __slots__ = ("_without", "admission", "budget", "caller", "in_flight", "members", "name", "retries", "turns")

    def __init__(
        self,
        name: str,
        caller: Caller,
        admission: Admission,
        *,
        retries: int,
        in_flight: int,
        without: frozenset[str],
        clock: Callable[[], float],
    ):
        self.name, self.caller, self.admission = name, caller, admission
        self.retries, self.in_flight, self._without = retries, in_flight, without
        self.members: tuple[Member, ...] = ()
        self.budget = RetryBudget(clock)
        self.turns = 0
        """Requests to its engines so far."""

    def pick(self, model: str, affinity: str, now: float, tried: Collection[Member] = ()) -> Member | None:
        """The engine to ask, or None when none can be asked now.

        The one that has the prefix in its cache (the same for the same `affinity` at every gateway), unless it is
        clearly busier than the least busy one: then that. One whose breaker is open is tried when there is no other.
        """
        free = [one for one in self.members if one.has_room(model, now) and one not in tried]
        if sound := [one for one in free if not one.breaker.open]:
            return sound[0] if len(sound) == 1 else _chosen(sound, affinity)
        return next((one for one in free if not one.breaker.shut), None)

    @property
    def without(self) -> frozenset[str]:
        """Request parameters that its engines must not be sent."""
        supervised = self.members[0].supervised if self.members else None
        return supervised.without if supervised else self._without

    def wait(self, now: float) -> int:
        """Seconds after which it makes sense to ask again, at least 1: the best of its engines."""
        return max(1, math.ceil(min((one.wait(now) for one in self.members), default=5.0)))

    @property
    def ready(self) -> bool:
        """True while an engine answers and takes new requests."""
        return any(one.ready and not one.draining for one in self.members)

    def answers(self, member: Member, now: float) -> None:
        """An engine has begun to answer."""
        learns = member.room < member.limit
        member.answers(now)
        if learns:
            self.resize()

    def fails(self, member: Member, error: BackendError, now: float) -> None:
        """An engine has failed."""
        member.fails(error, now)
        if error.fault == "busy":
            self.resize()

    def resize(self) -> None:
        """Opens the queue as wide as the engines that answer allow."""
        room = [int(one.room) for one in self.members if one.ready and not one.draining]
        capacity = sum(room) or self.in_flight
        if capacity != self.admission.capacity:
            self.admission.resize(capacity)


def _chosen(free: Sequence[Member], affinity: str) -> Member:
    # Among equals the one that was not asked for longest.
    least = min(free, key=lambda one: ((one.in_flight + 1) / one.weight, one.used))
    if not affinity:
        return least
    key = int.from_bytes(blake2b(affinity.encode("utf-8", "surrogatepass"), digest_size=8).digest())
    preferred = max(free, key=lambda one: _score(key, one))
    return preferred if preferred.load <= BALANCE * least.load + SLACK else least


def _score(key: int, member: Member) -> float:
    """Weighted rendezvous hashing: a member that comes or goes moves only the keys that it has.

    The score of -weight / ln(u), u uniform in (0, 1); Schindelhauer and Schomaker 2005. The mixing is splitmix64's.
    """
    mixed = (key ^ member.seed) * 0xBF58476D1CE4E5B9 & _MASK
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _MASK
    return -member.weight / math.log((((mixed ^ mixed >> 31) >> 12) + 0.5) / 2**52)


def affinity_of(tenant: str, messages: Sequence[Message]) -> str:
    """What requests with the same beginning have in common: a hash of the messages up to the first of a user."""
    told = blake2b(tenant.encode("utf-8", "surrogatepass"), digest_size=8)
    for message in messages:
        told.update(f"\0{message.role}\0{message.content}".encode("utf-8", "surrogatepass"))
        if message.role == "user":
            break
    return told.hexdigest()
