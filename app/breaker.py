"""A breaker: what fails again and again is left alone for a while, and then tried once."""

from __future__ import annotations

import time
from collections.abc import Callable

FAILURES = 5
"""Failures one after the other that open it."""
PAUSE = 15.0
"""Seconds that it waits, once open, before it lets one request through to try."""
WINDOW = 20
"""The last ends that its ratio is taken over."""


class BreakerOpen(Exception):
    """What is behind the breaker failed again and again and is left alone for a while."""


class Breaker:
    """Closed, open for `pause` seconds after `failures` in a row, then one try decides.

    ratio: the share of failures among the last WINDOW ends that opens it, too; 1.0 leaves that to failures in a row.
    """

    __slots__ = ("_bits", "_clock", "_failed", "_limit", "_pause", "_ratio", "_trying", "_until", "open")

    def __init__(
        self,
        failures: int = FAILURES,
        pause: float = PAUSE,
        clock: Callable[[], float] = time.monotonic,
        ratio: float = 1.0,
    ):
        self._limit, self._pause, self._clock, self._ratio = failures, pause, clock, ratio
        self._failed, self._bits = 0, 0
        self._until = 0.0
        self._trying = False
        self.open = False
        """True from the failure that opened it to the success that closes it."""

    @property
    def shut(self) -> bool:
        """True while nothing is let through: it is open and its pause lasts, or its one try is out."""
        return self.open and (self._trying or self._clock() < self._until)

    @property
    def opens_in(self) -> float:
        """Seconds until it lets something through."""
        return max(0.0, self._until - self._clock()) if self.open else 0.0

    def admit(self) -> None:
        """Lets a request through, whose end must be told; raises BreakerOpen."""
        if not self.open:
            return
        if self.shut:
            raise BreakerOpen(f"it failed {self._failed} times in a row and is not asked for a while")
        self._trying = True

    def succeeded(self) -> None:
        """The request was answered."""
        if self.open:
            self._bits = 0  # what was before is over
        self._note(0)
        self._failed, self._trying, self.open = 0, False, False

    def failed(self) -> None:
        """The request was not answered."""
        self._note(1)
        self._failed, self._trying = self._failed + 1, False
        if self._failed >= self._limit or self._failing:
            self.open = True
        self._until = self._clock() + self._pause

    def unknown(self) -> None:
        """The request was given up: nothing is known."""
        self._trying = False

    def _note(self, failed: int) -> None:
        self._bits = (self._bits << 1 | failed) & ((1 << WINDOW) - 1)

    @property
    def _failing(self) -> bool:
        return self._ratio < 1 and self._bits.bit_count() >= self._ratio * WINDOW
