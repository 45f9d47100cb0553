"""What keys may use: an upper bound is reserved before a request runs, and settled to what it used."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from itertools import count
from secrets import token_hex
from typing import Any, Literal

from app.errors import ApiError, unavailable
from app.limits.ledger import NONE, REFUSALS, Caps, Hold, Ledger, LedgerDown, Standing, caps_of, day_of, month_of, nanos
from app.limits.memory import MemoryLedger
from app.limits.reservation import NOTHING, Nothing, Reservation, refusal
from app.logs import event
from app.metrics import Metrics
from app.records import Key

WhenLimitsFail = Literal["refuse", "local"]
PAUSE = 1.0
"""Seconds that a ledger is left alone after it failed; then one request tries it, and no other waits for that."""
REMEMBERED = 10_000
"""Accounts whose last standing is known, for the time when the ledger is down."""


class Limits:
    """Grants and settles what keys may use.

    lease: seconds after which a hold that nobody settles expires; twice the longest request, so that a clock which
    jumps ahead frees nothing that runs, and at least 120, so that a pause drains the rate of a minute. share: the part
    of each cap, or of what was left of it, that this replica grants by itself while `ledger` is down.
    """

    __slots__ = (
        "_count",
        "_down_until",
        "_failing",
        "_known",
        "_lease",
        "_ledger",
        "_local",
        "_metrics",
        "_name",
        "_owed",
        "_settling",
        "_share",
        "_when_down",
    )

    def __init__(
        self,
        ledger: Ledger,
        metrics: Metrics,
        lease: float,
        when_limits_fail: WhenLimitsFail = "local",
        share: float = 0.25,
    ):
        self._ledger, self._metrics, self._lease = ledger, metrics, lease
        self._when_down, self._share = when_limits_fail, share
        self._local = MemoryLedger(lease)
        self._down_until, self._failing = 0.0, False
        self._known: dict[str, Standing] = {}
        self._owed: dict[str, tuple[Caps, int, int]] = {}
        self._settling: dict[str, set[asyncio.Task[None]]] = {}
        self._name, self._count = token_hex(6), count()

    @staticmethod
    def needed(key: Key) -> bool:
        """True when this key has a limit; where it has none, `NOTHING` is its reservation."""
        limits = key.limits
        return not (
            limits.requests_per_minute is None
            and limits.tokens_per_minute is None
            and limits.tokens_per_day is None
            and limits.cost_per_month is None
        )

    async def reserve(self, key: Key, tokens: int, cost: float = 0.0) -> Reservation | Nothing:
        """A hold of `tokens` (of the prompt, and `max_tokens`) and `cost`, the most that the request can use.

        Raises ApiError: 429 `rate_limit_exceeded` or `insufficient_quota`; 503 where limits cannot be reckoned.
        """
        if not self.needed(key):
            return NOTHING
        caps, hold = caps_of(key.limits), Hold(f"{self._name}-{next(self._count)}", tokens, nanos(cost))
        # noted before it is asked: what ends while the ledger's answer is on its way may not be in that answer
        settling = tuple(self._settling.get(key.id, ()))
        asked = await self._ask(key.id, caps, hold)
        if asked.standing.refused and (settling := (*settling, *self._settling.get(key.id, ()))):
            await asyncio.wait(settling)  # less will be held when they are through
            asked = await self._ask(key.id, caps, hold)
        if not asked.standing.refused:
            return asked
        self._metrics.limit_refusals.labels(REFUSALS[asked.standing.refused]).inc()
        raise refusal(caps, hold, asked.standing) if asked.ledger is self._ledger else _of_a_share()

    def settle(
        self, reservation: Reservation | Nothing, prompt_tokens: int, completion_tokens: int, cost: float = 0.0
    ) -> None:
        """Puts what was used in the place of a reservation, at once or in the background; a second time is nothing."""
        if not isinstance(reservation, Reservation) or not reservation.open:
            return
        reservation.open = False
        held, tokens, used = reservation, prompt_tokens + completion_tokens, nanos(cost)
        if held.caps.tokens == NONE and not held.caps.has_budget:
            return  # it was counted as a request, and stays so
        if isinstance(held.ledger, MemoryLedger):
            held.ledger.put(held.account, held.caps, held.hold, tokens, used)
        if held.ledger is not self._ledger:
            # to the ledger that was down this is a use without a hold, and its bucket of a minute ago is empty
            self._charge(held.account, held.whole, Hold(held.hold.id, tokens, used), tokens, used)
        elif not isinstance(held.ledger, MemoryLedger):
            self._charge(held.account, held.whole, held.hold, tokens, used)

    def release(self, reservation: Reservation | Nothing) -> None:
        """Gives back the tokens and the cost of a request that used none; it still counts as a request."""
        self.settle(reservation, 0, 0)

    async def tend(self) -> None:
        """For every few seconds: writes what was used where that is done in batches, and clears away what is old."""
        await self._ledger.tend()

    async def close(self) -> None:
        """Waits for what is being settled, and closes the ledger."""
        await self.settled()
        await self._ledger.close()

    async def settled(self) -> None:
        """Returns when all that was given to `settle` is through, or owed to a ledger that is down."""
        while running := [one for tasks in self._settling.values() for one in tasks]:
            await asyncio.wait(running)

    # --- the ledger, and what takes its place while it is down

    async def _ask(self, account: str, caps: Caps, hold: Hold) -> Reservation:
        """What the ledger granted or refused; or this replica's share, while the ledger is down."""
        if not self._failing or self._may_try():
            try:
                standing = await self._granted(account, caps, hold)
            except LedgerDown as error:
                self._failed(error)
            else:
                self._answered(account, standing)
                return Reservation(account, caps, caps, hold, standing, self._ledger)
        self._metrics.limits_failed.labels("reserve", self._when_down).inc()
        if self._when_down == "refuse":
            raise unavailable("The limits of your key cannot be checked just now; try again.", "limits_down", 1)
        part = _part(caps, self._known.get(account), self._share)
        standing = await self._local.reserve(account, part, hold)
        return Reservation(account, part, caps, hold, standing, self._local)

    async def _granted(self, account: str, caps: Caps, hold: Hold) -> Standing:
        """What the ledger answers; whoever is cancelled before it has answered holds nothing for long."""
        if isinstance(self._ledger, MemoryLedger):
            return await self._ledger.reserve(account, caps, hold)
        asking = asyncio.create_task(self._ledger.reserve(account, caps, hold))
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            self._spawn(account, self._give_back(asking, account, caps, hold))
            raise

    async def _give_back(self, asking: asyncio.Task[Standing], account: str, caps: Caps, hold: Hold) -> None:
        try:
            standing = await asking
        except LedgerDown:
            return  # its lease ends what was held all the same
        if not standing.refused:
            await self._settled(account, caps, hold, 0, 0)

    def _may_try(self) -> bool:
        """True for one caller each PAUSE."""
        if time.monotonic() < self._down_until:
            return False
        self._down_until = time.monotonic() + PAUSE
        return True

    def _failed(self, error: LedgerDown) -> None:
        self._down_until = time.monotonic() + PAUSE
        if not self._failing:
            self._failing = True
            self._metrics.limits_down.set(1)
            event("limits_down", logging.ERROR, cause=str(error), meanwhile=self._when_down)

    def _answered(self, account: str, standing: Standing) -> None:
        self._known[account] = standing
        if len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]
        if not self._failing:
            return
        self._failing, self._local = False, MemoryLedger(self._lease)
        self._metrics.limits_down.set(0)
        owed, self._owed = self._owed, {}
        event("limits_are_back", logging.WARNING, accounts_owing=len(owed))
        for name, (caps, tokens, cost) in owed.items():
            self._charge(name, caps, Hold(f"{self._name}-owed", tokens, cost), tokens, cost)

    def _charge(self, account: str, caps: Caps, hold: Hold, tokens: int, cost: int) -> None:
        self._spawn(account, self._settled(account, caps, hold, tokens, cost))

    def _spawn(self, account: str, work: Coroutine[Any, Any, None]) -> None:
        tasks, task = self._settling.setdefault(account, set()), asyncio.create_task(work)
        tasks.add(task)

        def ended(one: asyncio.Task[None]) -> None:
            tasks.discard(one)
            if not tasks and self._settling.get(account) is tasks:
                del self._settling[account]

        task.add_done_callback(ended)

    async def _settled(self, account: str, caps: Caps, hold: Hold, tokens: int, cost: int) -> None:
        """Settled with the ledger, or owed to it until it is back: then its hold expires by itself."""
        if not self._failing:
            try:
                return await self._ledger.settle(account, caps, hold, tokens, cost)
            except LedgerDown as error:
                self._failed(error)
        if caps.has_budget:
            self._metrics.limits_failed.labels("settle", "owed").inc()
            _, more_tokens, more_cost = self._owed.get(account, (caps, 0, 0))
            self._owed[account] = (caps, tokens + more_tokens, cost + more_cost)


def _part(caps: Caps, known: Standing | None, share: float) -> Caps:
    """A replica's caps while it is alone: its share of the rates, and of what was free of the budgets at last.

    What was in flight then counts as used: it will be.
    """
    day_gone = month_gone = 0
    if known is not None:
        today = day_of(time.time_ns() // 1000)
        day_gone = known.held_tokens + (known.day_used if known.day >= today else 0)
        month_gone = known.held_nanos + (known.month_used if known.month >= month_of(today) else 0)

    def part(cap: int, gone: int = 0) -> int:
        return NONE if cap == NONE else max(0, int((cap - gone) * share))

    requests = max(1, part(caps.requests)) if caps.requests > 0 else caps.requests
    return Caps(requests, part(caps.tokens), part(caps.day, day_gone), part(caps.month, month_gone))


def _of_a_share() -> ApiError:
    return ApiError(
        429,
        "This server counts limits by itself just now, and grants a part of them: try again in 2 seconds.",
        code="rate_limit_exceeded",
        kind="requests",
        retry_after=2,
        headers={"retry-after-ms": "2000"},
    )
