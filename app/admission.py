"""The queue before a pool of engines: bounded, fair between tenants, and strict about who goes first.

As many requests run at once as there is room for. Others wait, first come first served within a class and a tenant,
tenants of a class by turns, interactive before batch before shadow. What cannot wait is shed with a Retry-After: 429
when the tenant itself takes more than its part of the queue, else 503. A place that comes free is handed on, never
given back to be raced for, so that nobody overtakes and no wake-up is lost.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from types import TracebackType
from typing import Literal

from app.errors import ApiError, unavailable
from app.metrics import Metrics
from app.settings import AdmissionSettings

Priority = Literal["interactive", "batch", "shadow"]
PRIORITIES: tuple[Priority, ...] = ("interactive", "batch", "shadow")
"""Highest first."""
Reason = Literal["full", "share", "late", "evicted"]
PERIOD = 10.0
"""Seconds over which the rate is taken that Retry-After is reckoned from."""
LONGEST = 60
"""The largest Retry-After, in seconds."""


class _Waiter:
    """One request in the queue: its place comes as the result of `place`, or an ApiError."""

    __slots__ = ("place", "priority", "since", "tenant", "waiting")

    def __init__(self, priority: Priority, tenant: str, since: float, place: asyncio.Future[None]):
        self.priority, self.tenant, self.since, self.place = priority, tenant, since, place
        self.waiting = True


class _Line:
    """The waiters of one class: a row for each tenant that has any, the tenants in the order of their turns."""

    __slots__ = ("_rows", "size")

    def __init__(self) -> None:
        self._rows: OrderedDict[str, dict[_Waiter, None]] = OrderedDict()
        self.size = 0

    def of(self, tenant: str) -> int:
        """How many of a tenant wait."""
        return len(self._rows.get(tenant, ()))

    @property
    def tenants(self) -> int:
        """How many tenants have someone waiting."""
        return len(self._rows)

    def add(self, waiter: _Waiter) -> None:
        """Puts one at the end of its tenant's row."""
        self._rows.setdefault(waiter.tenant, {})[waiter] = None
        self.size += 1

    def remove(self, waiter: _Waiter) -> None:
        """Takes one out, wherever it stands."""
        row = self._rows[waiter.tenant]
        del row[waiter]
        self.size -= 1
        if not row:
            del self._rows[waiter.tenant]

    def first(self) -> _Waiter:
        """Takes out the first of the tenant whose turn it is; its next turn comes after all others'."""
        tenant, row = next(iter(self._rows.items()))
        waiter = next(iter(row))
        self.remove(waiter)
        if row:
            self._rows.move_to_end(tenant)
        return waiter

    def newest_of_largest(self) -> _Waiter:
        """The last one of the tenant with the most waiters."""
        row = max(self._rows.values(), key=len)
        return next(reversed(row))


class Slot:
    """A place among the requests that run, for as long as its `async with` lasts; made by `Admission.slot`."""

    __slots__ = ("_admission", "_deadline", "_priority", "_tenant")

    def __init__(self, admission: Admission, priority: Priority, deadline: float, tenant: str):
        self._admission, self._priority, self._deadline, self._tenant = admission, priority, deadline, tenant

    async def __aenter__(self) -> None:
        """Takes the place, at once when there is room; raises ApiError (429, 503)."""
        if not self._admission.enter(self._priority):
            await self._admission.wait(self._priority, self._deadline, self._tenant)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.leave()


class Admission:
    """The queue before engines that can take `capacity` requests at once. Use it from one event loop."""

    def __init__(self, settings: AdmissionSettings, metrics: Metrics, pool: str = "", capacity: int | None = None):
        self._settings, self._metrics, self._pool = settings, metrics, pool
        self._loop = asyncio.get_running_loop()
        self._lines: dict[Priority, _Line] = {priority: _Line() for priority in PRIORITIES}
        self._bounds = dict(zip(PRIORITIES, (settings.queue, settings.batch_queue, settings.shadow_queue), strict=True))
        self._passed_by = 0
        self._left = 0
        self._before = self._mark = (self._loop.time(), 0)
        self.running = 0
        """Requests that have a place."""
        self.queued = 0
        """Requests that wait for one."""
        self.resize(settings.in_flight if capacity is None else capacity)

    def slot(self, priority: Priority = "interactive", deadline: float = math.inf, tenant: str = "") -> Slot:
        """A place for one request: `async with admission.slot(...)`.

        deadline: the loop's time until which it may wait, which is never longer than the setting `wait`. Raises
        ApiError: 429 when the tenant's own requests fill the queue, 503 when others' do or it waited too long.
        """
        return Slot(self, priority, deadline, tenant)

    def resize(self, capacity: int) -> None:
        """Sets how many requests may run at once; those that run already are left alone."""
        self.capacity = max(1, capacity)
        shared = max(1, self.capacity - math.floor(self.capacity * self._settings.reserved))
        self._room: dict[Priority, int] = {"interactive": self.capacity, "batch": shared, "shadow": shared}
        self._hand_on()

    def enter(self, priority: Priority) -> bool:
        """Takes a place, which `leave` gives back, if there is one.

        Then nobody of this class or a higher one waits: whoever waited has been handed the place when it came free.
        """
        if self.running >= self._room[priority]:
            return False
        self.running += 1
        return True

    def leave(self) -> None:
        """Gives a place back: to whoever is next."""
        self.running -= 1
        self._left += 1
        if self.queued:
            self._passed_by += 1
            self._hand_on()

    async def wait(self, priority: Priority, deadline: float, tenant: str) -> None:
        """Returns when there is a place for the request, which then has it; raises ApiError."""
        now = self._loop.time()
        self._sample(now)
        until = min(deadline, now + self._settings.wait)
        if until <= now:
            raise self._shed(priority, "late")
        self._make_room(priority, tenant)
        waiter = _Waiter(priority, tenant, now, self._loop.create_future())
        self._lines[priority].add(waiter)
        self.queued += 1
        timer = self._loop.call_at(until, self._turn_away, waiter, "late")
        try:
            await waiter.place
        except asyncio.CancelledError:
            if waiter.waiting:
                self._take_out(waiter)
            elif not waiter.place.cancelled() and waiter.place.exception() is None:
                self.leave()  # the place came in the same moment
            raise
        finally:
            timer.cancel()

    def queued_of(self, priority: Priority) -> int:
        """How many requests of a class wait."""
        return self._lines[priority].size

    def publish(self) -> None:
        """Sets the gauges of the metrics."""
        self._metrics.admission_running.labels(self._pool).set(self.running)
        for priority, line in self._lines.items():
            self._metrics.admission_queued.labels(self._pool, priority).set(line.size)

    @property
    def retry_after(self) -> int:
        """Seconds in which as many requests end as wait now, by the rate of late; 1 to LONGEST."""
        since, left = self._before
        elapsed, ended = self._loop.time() - since, self._left - left
        if not ended or elapsed < 0.1:
            return 2
        return min(LONGEST, max(1, math.ceil((self.queued + 1) * elapsed / ended)))

    def _sample(self, now: float) -> None:
        """Notes how many have ended by now. A queue that was empty says nothing of how fast a full one is served."""
        if not self.queued:
            self._before = self._mark = (now, self._left)
        elif now - self._mark[0] >= PERIOD:
            self._before, self._mark = self._mark, (now, self._left)

    def _hand_on(self) -> None:
        """Gives places to those who wait, as long as there are both."""
        while (priority := self._next()) is not None:
            waiter = self._lines[priority].first()
            self.queued -= 1
            waiter.waiting = False
            if waiter.place.done():  # its task was cancelled and has not run since
                continue
            self.running += 1
            self._passed_by = 0 if priority == "batch" else self._passed_by
            self._metrics.admission_wait.labels(self._pool, priority).observe(self._loop.time() - waiter.since)
            waiter.place.set_result(None)

    def _next(self) -> Priority | None:
        """The class that the next place goes to."""
        batch, every = self._lines["batch"].size, self._settings.batch_every
        if not batch:
            self._passed_by = 0
        elif every and self._passed_by >= every and self.running < self.capacity:
            return "batch"
        for priority in PRIORITIES:
            if self._lines[priority].size:
                return priority if self.running < self._room[priority] else None
        return None

    def _make_room(self, priority: Priority, tenant: str) -> None:
        """Sees to it that one more can wait: someone of a lower class, or of a tenant with more waiting, must go.

        Raises ApiError where that is the request itself.
        """
        line = self._lines[priority]
        if line.size < self._bounds[priority]:
            if self.queued < self._settings.queue:
                return
            for lower in reversed(PRIORITIES[PRIORITIES.index(priority) + 1 :]):
                if self._lines[lower].size:
                    return self._turn_away(self._lines[lower].newest_of_largest(), "evicted")
        own = line.of(tenant)
        if line.size and line.of((other := line.newest_of_largest()).tenant) > own + 1:
            return self._turn_away(other, "share")
        raise self._shed(priority, "share" if own * line.tenants > line.size else "full")

    def _turn_away(self, waiter: _Waiter, reason: Reason) -> None:
        """Ends the wait of one that waits."""
        if waiter.waiting:
            self._take_out(waiter)
            if not waiter.place.done():
                waiter.place.set_exception(self._shed(waiter.priority, reason))

    def _take_out(self, waiter: _Waiter) -> None:
        self._lines[waiter.priority].remove(waiter)
        self.queued -= 1
        waiter.waiting = False

    def _shed(self, priority: Priority, reason: Reason) -> ApiError:
        """What a request is told that cannot be served, counted."""
        self._metrics.admission_shed.labels(self._pool, priority, reason).inc()
        seconds = self.retry_after
        if reason == "share":
            message = f"You have more requests waiting than your part of the queue; try again in {seconds} s."
            kind = "rate_limit_error"
            return ApiError(429, message, code="too_many_waiting", kind=kind, retry_after=seconds)
        return unavailable(f"The service is busy; try again in {seconds} s.", "overloaded", seconds)
