"""The breaker: when it opens, and what it lets through then."""

from __future__ import annotations

import pytest

from app.breaker import WINDOW, Breaker, BreakerOpen


def breaker() -> tuple[Breaker, list[float]]:
    now = [0.0]
    return Breaker(2, 10.0, lambda: now[0]), now


def admits(breaker: Breaker) -> bool:
    try:
        breaker.admit()
    except BreakerOpen:
        return False
    return True


def test_a_breaker_opens_after_failures_in_a_row_only() -> None:
    it, _ = breaker()
    for end in (it.failed, it.succeeded, it.failed, it.unknown):
        assert admits(it)
        end()
    assert admits(it) and not it.open
    it.failed()
    assert not admits(it)


@pytest.mark.parametrize(("end", "admitted"), [("succeeded", True), ("failed", False), ("unknown", True)])
def test_one_question_tries_an_open_breaker_after_its_pause(end: str, admitted: bool) -> None:
    it, now = breaker()
    it.failed()
    it.failed()
    now[0] = 9.9
    assert not admits(it)
    now[0] = 10.0
    assert admits(it) and not admits(it), "one at a time"
    getattr(it, end)()
    assert admits(it) is admitted
    assert it.open is (end != "succeeded")


def test_a_breaker_opens_when_half_of_the_last_ends_were_failures() -> None:
    it = Breaker(failures=WINDOW, pause=10.0, clock=lambda: 0.0, ratio=0.5)
    for _ in range(WINDOW // 2 - 1):
        it.succeeded()
        it.failed()
    assert not it.open, "too few ends to tell"
    it.succeeded()
    it.failed()
    assert it.open and it.shut and it.opens_in == 10.0


def test_what_was_before_a_breaker_closed_counts_no_more() -> None:
    it = Breaker(failures=WINDOW, clock=lambda: 0.0, ratio=0.5)
    for _ in range(WINDOW):
        it.failed()
    it.succeeded()
    it.failed()
    assert not it.open
