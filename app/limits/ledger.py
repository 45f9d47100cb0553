"""What a ledger of limits is: accounts with two rates and two budgets, and the rules that all ledgers follow.

An account is a key. What is in flight is **held** until it is settled, and counts like what was used; so whatever
requests run at once, used and held together never pass a budget. The rules, the same in Python, Lua and PL/pgSQL:

* A rate is a leaky bucket: it fills by what is asked, drains by the cap in a minute, and never holds more than the cap.
* A budget is of a day or a month in UTC. A hold counts in the window that runs, a use in the window it was settled in.
* An account has a clock of its own. It goes on by what the clock outside went on, never back, and by `lease / 2` at
  most at once: a clock that jumps back locks nothing, one that jumps ahead lets no hold in flight expire.
* A window is never left backwards to the one before, so no jump there and back opens a budget twice. One that lies more
  than one ahead was opened by a broken clock: it becomes the current one, and keeps what was used.
* A hold that nobody settles expires after `lease`; what is settled later still counts as used.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, Protocol

from app.records import KeyLimits

Cap = Literal["requests_per_minute", "tokens_per_minute", "tokens_per_day", "cost_per_month"]

NONE = -1
"""A cap that is not set."""
MINUTE = 60_000_000
DAY = 24 * 60 * MINUTE
"""Microseconds, in which all ledgers reckon."""
NANOS = 1_000_000_000
"""Costs are whole billionths of the currency: sums of floats would drift apart from one ledger to the other."""
SLACK = 1e-6
"""Tokens by which a bucket may be overfull: rounding, where somebody comes back at exactly the time they were told."""
REFUSALS: tuple[Cap | None, ...] = (
    None,
    "tokens_per_day",
    "cost_per_month",
    "requests_per_minute",
    "tokens_per_minute",
)
"""What stands in the way, by the number that a ledger answers with; budgets come first, since to wait helps less."""


class LedgerDown(Exception):
    """The place where limits are counted cannot be reached, or did not answer in time."""


@dataclass(frozen=True, slots=True)
class Caps:
    """The caps of an account: requests and tokens a minute, tokens a day, billionths a month; NONE where not set."""

    requests: int = NONE
    tokens: int = NONE
    day: int = NONE
    month: int = NONE

    @property
    def has_budget(self) -> bool:
        """True when something must be held until it is settled."""
        return self.day != NONE or self.month != NONE


@dataclass(frozen=True, slots=True)
class Hold:
    """What a request may use at most: tokens, and a cost in billionths."""

    id: str
    tokens: int
    nanos: int


@dataclass(frozen=True, slots=True)
class Standing:
    """How an account stands after a ledger was asked. refused: a place in REFUSALS, 0 for granted. now: microseconds
    since 1970 by the ledger's clock. requests, tokens: what is in the buckets. day, month: the windows that run."""

    refused: int
    now: int
    requests: float
    tokens: float
    day: int
    day_used: int
    month: int
    month_used: int
    held_tokens: int
    held_nanos: int


class Ledger(Protocol):
    """Where it is counted. Every method may raise LedgerDown."""

    async def reserve(self, account: str, caps: Caps, hold: Hold) -> Standing:
        """The standing, with `hold` in it unless it is refused."""
        ...

    async def settle(self, account: str, caps: Caps, hold: Hold, tokens: int, nanos: int) -> None:
        """Puts what was used in the place of the hold."""
        ...

    async def tend(self) -> None:
        """Writes what is written in batches, and clears away what is old. May raise StoreError."""
        ...

    async def close(self) -> None:
        """Ends connections, and writes what was not written yet."""
        ...


def caps_of(limits: KeyLimits) -> Caps:
    """The caps of a key, in whole numbers."""
    requests, tokens, day = limits.requests_per_minute, limits.tokens_per_minute, limits.tokens_per_day
    return Caps(
        NONE if requests is None else requests,
        NONE if tokens is None else tokens,
        NONE if day is None else day,
        NONE if limits.cost_per_month is None else nanos(limits.cost_per_month),
    )


def nanos(cost: float) -> int:
    """A cost in whole billionths."""
    return round(cost * NANOS)


def day_of(moment: int) -> int:
    """The day in UTC of a time in microseconds, counted from 1970-01-01."""
    return moment // DAY


def month_of(day: int) -> int:
    """The month of a day, counted from January of the year 0."""
    date = datetime.fromtimestamp(day * 86_400, UTC)
    return date.year * 12 + date.month - 1


def month_end(month: int) -> int:
    """The time, in microseconds, at which the month is over."""
    year, index = divmod(month + 1, 12)
    return int(datetime(year, index + 1, 1, tzinfo=UTC).timestamp()) * 1_000_000


def window(stored: int, current: int) -> tuple[int, bool]:
    """(the window that runs, whether it is a new one), by the one that is stored and the one that the clock says."""
    if current > stored:
        return current, True
    return (stored if stored - current == 1 else current), False
