"""What a key was granted or refused, in the words and headers that OpenAI's clients know."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from app.errors import ApiError
from app.limits.ledger import DAY, NANOS, NONE, REFUSALS, Caps, Hold, Ledger, Standing, month_end

IN_FLIGHT_WAIT = 1.0
"""Seconds after which to come back, where only what is in flight fills a budget: it is settled at any moment."""


@dataclass(slots=True)
class Reservation:
    """What a request may use at most. Give it to `Limits.settle` or `Limits.release`; the first of these counts.

    caps: those by which it was granted, a part of the whole where the ledger was down.
    """

    account: str
    caps: Caps
    whole: Caps
    hold: Hold
    standing: Standing
    ledger: Ledger
    open: bool = True

    @property
    def headers(self) -> dict[str, str]:
        """The `x-ratelimit-*` headers as they stand after this reservation."""
        return headers(self.caps, self.standing)


class Nothing:
    """The reservation of a key without limits, the same for all; it has no headers, and nothing to settle."""

    __slots__ = ()

    @property
    def headers(self) -> dict[str, str]:
        """None."""
        return {}


NOTHING = Nothing()


def headers(caps: Caps, standing: Standing) -> dict[str, str]:
    """OpenAI's headers for requests and tokens: the limit, what remains, and when all of it will be there again.

    Tokens are those of a minute, of a day where only a day is limited.
    """
    found: dict[str, str] = {}
    if caps.requests != NONE:
        found |= _triple("requests", caps.requests, caps.requests - standing.requests, caps.requests)
    if caps.tokens != NONE:
        found |= _triple("tokens", caps.tokens, caps.tokens - standing.tokens, caps.tokens)
    elif caps.day != NONE:
        left = caps.day - standing.day_used - standing.held_tokens
        until_reset = (standing.day + 1) * DAY - standing.now
        found |= _lines("tokens", caps.day, left, until_reset / 1e6)
    return found


def _triple(what: str, cap: int, left: float, rate: int) -> dict[str, str]:
    return _lines(what, cap, left, (cap - left) * 60 / rate if rate else 60.0)


def _lines(what: str, cap: int, left: float, seconds: float) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{what}": str(cap),
        f"x-ratelimit-remaining-{what}": str(max(0, math.floor(left + 1e-6))),
        f"x-ratelimit-reset-{what}": duration(seconds),
    }


def duration(seconds: float) -> str:
    """A time as OpenAI writes it: `120ms`, `1s`, `6m0s`, `1h0m0s`; never less than it is."""
    ms = max(0, math.ceil(seconds * 1000 - 1e-6))
    if ms < 1000:
        return f"{ms}ms"
    whole, rest = divmod(ms, 1000)
    minutes, secs = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    last = f"{secs}.{rest:03d}".rstrip("0") if rest and not minutes and not hours else f"{secs + (rest > 0)}"
    if last == "60":
        return duration(math.ceil(seconds))
    return f"{hours}h{minutes}m{last}s" if hours else f"{minutes}m{last}s" if minutes else f"{last}s"


def refusal(caps: Caps, hold: Hold, standing: Standing) -> ApiError:
    """The 429 for a reservation that was refused: what is full, and when to come back or that it helps nothing."""
    answers: dict[str, Callable[[], ApiError]] = {
        "requests_per_minute": partial(_too_fast, "requests", caps.requests, standing.requests, 1),
        "tokens_per_minute": partial(_too_fast, "tokens", caps.tokens, standing.tokens, hold.tokens),
        "tokens_per_day": lambda: _day_is_full(caps, hold, standing),
        "cost_per_month": lambda: _month_is_full(caps, hold, standing),
    }
    error = answers[str(REFUSALS[standing.refused])]()
    error.headers |= headers(caps, standing)
    return error


def _too_fast(what: str, cap: int, used: float, asked: int) -> ApiError:
    said = f"Rate limit reached: {cap} {what} a minute, used {math.ceil(used - 1e-6)}, requested {asked}."
    if asked > cap:
        advice = "This request alone is more than the limit: ask for fewer tokens (max_tokens) or send less text."
        never = {"x-should-retry": "false"}
        return ApiError(429, f"{said} {advice}", code="rate_limit_exceeded", kind=what, headers=never)
    return _later(said, what, (used + asked - cap) * 60 / cap)


def _later(said: str, kind: str, seconds: float) -> ApiError:
    ms = max(1, math.ceil(seconds * 1000 - 1e-6))
    return ApiError(
        429,
        f"{said} Try again in {duration(ms / 1000)}.",
        code="rate_limit_exceeded",
        kind=kind,
        retry_after=math.ceil(ms / 1000),
        headers={"retry-after-ms": str(ms)},
    )


def _day_is_full(caps: Caps, hold: Hold, standing: Standing) -> ApiError:
    said = f"{caps.day} tokens a day, used {standing.day_used}, requested {hold.tokens}"
    if standing.day_used + hold.tokens <= caps.day:
        held = f"The budget is held by requests in flight: {said}, held {standing.held_tokens}."
        return _later(held, "tokens", IN_FLIGHT_WAIT)
    return _spent(f"The budget of this key does not allow it: {said}.", (standing.day + 1) * DAY)


def _month_is_full(caps: Caps, hold: Hold, standing: Standing) -> ApiError:
    cap, used, asked = (f"{value / NANOS:.6g}" for value in (caps.month, standing.month_used, hold.nanos))
    said = f"a cost of {cap} a month, used {used}, requested up to {asked}"
    if standing.month_used + hold.nanos <= caps.month:
        held = f"The budget is held by requests in flight: {said}, held {standing.held_nanos / NANOS:.6g}."
        return _later(held, "tokens", IN_FLIGHT_WAIT)
    return _spent(f"The budget of this key does not allow it: {said}.", month_end(standing.month))


def _spent(said: str, reset: int) -> ApiError:
    when = datetime.fromtimestamp(reset / 1e6, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return ApiError(
        429,
        f"{said} Ask for less (max_tokens), wait until {when}, or ask your operator for a larger budget.",
        code="insufficient_quota",
        kind="insufficient_quota",
        headers={"x-should-retry": "false"},
    )
