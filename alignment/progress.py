"""How far a run is, for whoever watches it: the terminal's display, trackers, plain lines.

What takes long says what it does where it does it, with `doing` and `through`, and need not know who watches: the
command that starts a run says so, with `watched`. Of several processes only the leading one is watched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

T = TypeVar("T")
Tell = Callable[[str], object]
WINDOW = 50
"""Updates whose pace is that of the rest: as many as lie between two measurements, so that it has one of them."""


@dataclass(frozen=True, slots=True)
class Start:
    """A run before its first update. step: updates that are done, more than 0 where it goes on. told: those that were
    recorded before it was killed, which come again from `step` on. recipe: as TOML."""

    folder: Path
    recipe: str
    updates: int
    step: int = 0
    told: int = 0


class Watcher:
    """Who is told how a run goes; each takes of it what it wants, this one nothing."""

    def doing(self, what: str, done: int = 0, of: int = 0) -> None:
        """Something has begun that may take long, or goes on: so many of its parts are done, 0 of 0 if it has none."""

    def began(self, start: Start) -> None:
        """All is loaded; updates follow."""

    def updated(self, step: int, metrics: Mapping[str, float]) -> None:
        """An update has ended; steps are counted from 1."""

    def sampled(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replies were drawn during an update, for people to read."""

    def ended(self, results: Mapping[str, Any]) -> None:
        """The last update is done, and the model was measured; nothing more is told."""


_watcher: ContextVar[Watcher | None] = ContextVar("_watcher", default=None)


@contextmanager
def watched(by: Watcher) -> Iterator[None]:
    """Meanwhile what goes on in this thread is told to a watcher."""
    before = _watcher.set(by)
    try:
        yield
    finally:
        _watcher.reset(before)


def watcher() -> Watcher | None:
    """Who watches, if anybody does."""
    return _watcher.get()


def doing(what: str, done: int = 0, of: int = 0) -> None:
    """Tells who watches of something that may take long: `loading the model`."""
    if found := _watcher.get():
        found.doing(what, done, of)


def through(parts: Sequence[T], what: str) -> Iterator[T]:
    """The parts one by one; who watches is told how many of them are done."""
    for done, part in enumerate(parts):
        doing(what, done, len(parts))
        yield part


@dataclass(slots=True)
class Pace:
    """How long updates take: as the last ones did, without the first, which loads, warms up and measures besides."""

    ends: deque[float] = field(default_factory=lambda: deque([monotonic()], WINDOW + 2))

    def ended(self, now: float | None = None) -> None:
        """An update has ended; now: in seconds, None for the clock's."""
        self.ends.append(monotonic() if now is None else now)

    def left(self, updates: int) -> float | None:
        """Seconds that so many updates will take, None before the first has ended."""
        known = list(self.ends)
        known = known[1:] if len(known) > 2 else known
        return (known[-1] - known[0]) / (len(known) - 1) * updates if len(known) > 1 else None


@dataclass(slots=True)
class Lines(Watcher):
    """A line an update, for logs."""

    tell: Tell
    updates: int = 0
    pace: Pace = field(default_factory=Pace)

    def began(self, start: Start) -> None:
        """Tells where a run goes on."""
        self.updates, self.pace = start.updates, Pace()

    def updated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tells the first metrics, and the time that is left."""
        self.pace.ended()
        shown = "  ".join(f"{name} {value:.4g}" for name, value in islice(metrics.items(), 6))
        left = clock(self.pace.left(self.updates - step))
        self.tell(f"update {step}/{self.updates}  {shown}  {left} left")


def clock(seconds: float | None) -> str:
    """Hours, minutes and seconds: `1:02:03`."""
    if seconds is None:
        return "-:--:--"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
