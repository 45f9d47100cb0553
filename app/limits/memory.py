"""The ledger of one replica, in its memory: by the monotonic clock, with the windows in the wall clock's UTC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from app.limits.ledger import MINUTE, NONE, SLACK, Caps, Hold, LedgerDown, Standing, day_of, month_of, window
from app.store.budgets import Used
from app.store.errors import StoreError


class Keeper(Protocol):
    """Where budgets stay over a restart; both may raise StoreError."""

    async def load(self, account: str) -> Used | None:
        """What the account had used."""
        ...

    async def save(self, used: Mapping[str, Used]) -> None:
        """Writes what accounts have used."""
        ...


@dataclass(frozen=True, slots=True)
class Clock:
    """Two clocks in microseconds: one that only goes on, and UTC. Tests turn them by hand."""

    steady: Callable[[], int] = lambda: time.monotonic_ns() // 1000
    utc: Callable[[], int] = lambda: time.time_ns() // 1000


@dataclass(slots=True)
class _Account:
    seen: int
    clock: int = 0
    requests: float = 0.0
    tokens: float = 0.0
    day: int = 0
    day_used: int = 0
    month: int = 0
    month_used: int = 0
    held_tokens: int = 0
    held_nanos: int = 0
    holds: dict[str, tuple[Hold, int]] = field(default_factory=dict)  # by the time at which they expire


class MemoryLedger:
    """Accounts in this process. With a `keeper`, what budgets have used is loaded at an account's first request, and
    kept when `tend` is called: a kill loses what was used since."""

    __slots__ = ("_accounts", "_changed", "_clock", "_keeper", "_lease", "_loading")

    def __init__(self, lease: float, keeper: Keeper | None = None, clock: Clock | None = None):
        self._lease, self._keeper, self._clock = round(lease * 1e6), keeper, clock or Clock()
        self._accounts: dict[str, _Account] = {}
        self._loading: dict[str, asyncio.Task[_Account]] = {}
        self._changed: set[str] = set()

    async def reserve(self, account: str, caps: Caps, hold: Hold) -> Standing:
        """The standing, with `hold` in it unless it is refused; raises LedgerDown when its past cannot be loaded."""
        found = self._accounts.get(account) or await self._open(account)
        now = self._go_on(found, caps)
        refused = _refusal(found, caps, hold)
        if not refused:
            found.requests += caps.requests != NONE
            found.tokens += hold.tokens if caps.tokens != NONE else 0
            if caps.has_budget:
                found.holds[hold.id] = (hold, found.clock + self._lease)
                found.held_tokens += hold.tokens
                found.held_nanos += hold.nanos
        return _standing(found, refused, now)

    async def settle(self, account: str, caps: Caps, hold: Hold, tokens: int, nanos: int) -> None:
        """Puts what was used in the place of the hold."""
        if account not in self._accounts:
            await self._open(account)
        self.put(account, caps, hold, tokens, nanos)

    def put(self, account: str, caps: Caps, hold: Hold, tokens: int, nanos: int) -> None:
        """The same at once, for an account from which something was reserved."""
        found = self._accounts[account]
        self._go_on(found, caps)
        if caps.tokens != NONE:
            found.tokens = max(0.0, found.tokens + tokens - hold.tokens)
        if caps.has_budget:
            _drop(found, hold.id)
            found.day_used += tokens
            found.month_used += nanos
            self._changed.add(account)

    async def tend(self) -> None:
        """Writes what was used since the last time; what cannot be written is kept for the next."""
        changed, self._changed = self._changed, set()
        if self._keeper is None or not changed:
            return
        accounts = {name: self._accounts[name] for name in changed}
        rows = {name: Used(one.day, one.day_used, one.month, one.month_used) for name, one in accounts.items()}
        try:
            await self._keeper.save(rows)
        except StoreError:
            self._changed |= changed
            raise

    async def close(self) -> None:
        """Writes what was used since the last time."""
        await self.tend()

    async def _open(self, account: str) -> _Account:
        """The account; one load for all who ask while it runs."""
        task = self._loading.get(account)
        if task is None:
            task = self._loading[account] = asyncio.create_task(self._load(account))
            task.add_done_callback(lambda _: self._loading.pop(account, None))
        return await asyncio.shield(task)

    async def _load(self, account: str) -> _Account:
        try:
            used = await self._keeper.load(account) if self._keeper else None
        except StoreError as error:
            raise LedgerDown("what this key has used cannot be read from the database") from error
        opened = self._accounts[account] = _Account(self._clock.steady())
        if used is not None:
            opened.day, opened.day_used = used.day, used.day_used
            opened.month, opened.month_used = used.month, used.month_used
        return opened

    def _go_on(self, account: _Account, caps: Caps) -> int:
        """UTC; the account's clock, buckets and windows have gone on to it, and old holds are gone."""
        steady, utc = self._clock.steady(), self._clock.utc()
        passed = min(max(steady - account.seen, 0), self._lease // 2)
        account.seen = steady
        account.clock += passed
        if caps.requests != NONE:
            account.requests = max(0.0, account.requests - passed * caps.requests / MINUTE)
        if caps.tokens != NONE:
            account.tokens = max(0.0, account.tokens - passed * caps.tokens / MINUTE)
        if caps.has_budget:
            _turn_windows(account, utc)
            while account.holds and (oldest := next(iter(account.holds.values())))[1] <= account.clock:
                _drop(account, oldest[0].id)
        return utc


def _turn_windows(account: _Account, utc: int) -> None:
    day = day_of(utc)
    if day != account.day:
        account.day, fresh = window(account.day, day)
        account.day_used = 0 if fresh else account.day_used
    month = month_of(day)
    if month != account.month:
        account.month, fresh = window(account.month, month)
        account.month_used = 0 if fresh else account.month_used


def _drop(account: _Account, id: str) -> None:
    held = account.holds.pop(id, None)
    if held is not None:
        account.held_tokens -= held[0].tokens
        account.held_nanos -= held[0].nanos


def _refusal(account: _Account, caps: Caps, hold: Hold) -> int:
    """A place in REFUSALS."""
    if caps.day != NONE and account.day_used + account.held_tokens + hold.tokens > caps.day:
        return 1
    if caps.month != NONE and account.month_used + account.held_nanos + hold.nanos > caps.month:
        return 2
    if caps.requests != NONE and account.requests + 1 > caps.requests + SLACK:
        return 3
    if caps.tokens != NONE and account.tokens + hold.tokens > caps.tokens + SLACK:
        return 4
    return 0


def _standing(one: _Account, refused: int, now: int) -> Standing:
    return Standing(
        refused,
        now,
        one.requests,
        one.tokens,
        one.day,
        one.day_used,
        one.month,
        one.month_used,
        one.held_tokens,
        one.held_nanos,
    )
