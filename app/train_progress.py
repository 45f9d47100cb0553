"""What a run looks like in a terminal: how far it is, what it does, how long it will take, and what it has learnt."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from time import monotonic

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from alignment.progress import Pace, Start, Watcher, clock

UNITS = {"sft": "tokens", "reward": "pairs", "dpo": "pairs", "kto": "replies", "ppo": "tokens"}
"""What the speed of each method is of."""
SHOWN = ("loss", "reward/mean", "accuracy", "margin", "baseline", "kl/reply", "reply/tokens", "grad")
"""Metrics that have a row, of those that there are; so have all that are measured on held-out rows."""
BARS = "▁▂▃▄▅▆▇█"
ROWS, COLUMNS, RECENT = 10, 24, 10


@dataclass(slots=True)
class Display(Watcher):
    """The live display of a run; what is told meanwhile stands above it. Use it as a context, inside `watched`.

    unit: what the speed is of. Rendered by rich four times a second, from another thread.
    """

    console: Console
    unit: str
    phase: str = "loading the model"
    parts: tuple[int, int] = (0, 0)
    since: float = field(default_factory=monotonic)
    began_at: float = field(default_factory=monotonic)
    step: int = 0
    updates: int = 0
    pace: Pace = field(default_factory=Pace)
    values: dict[str, list[float]] = field(default_factory=dict)
    speeds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _spinner: Spinner = field(default_factory=lambda: Spinner("dots"))
    _live: Live | None = None

    def __enter__(self) -> Display:
        self._live = Live(self, console=self.console, refresh_per_second=4, transient=False)
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def tell(self, line: str) -> None:
        """Writes a line above the display."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def doing(self, what: str, done: int = 0, of: int = 0) -> None:
        """Shows what is being done, and since when."""
        if what != self.phase:
            self.phase, self.since = what, monotonic()
        self.parts = done, of

    def began(self, start: Start) -> None:
        """Shows the bar."""
        self.step, self.updates, self.pace = start.step, start.updates, Pace()
        self.doing("learning")

    def updated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Moves the bar, and adds to the trends."""
        self.pace.ended()
        self.step = step
        self.speeds.extend(metrics[name] for name in ("per_second", "tokens/s") if name in metrics)
        for name in shown(metrics):
            self.values.setdefault(name, []).append(metrics[name])

    def ended(self, results: Mapping[str, object]) -> None:
        """Shows that only the release is still to be written."""
        self.doing("writing the release")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The bar, what is being done, and a row a metric."""
        yield Group(*([self._bar()] if self.updates else []), self._doing(), self._metrics())

    def _bar(self) -> Table:
        row = Table.grid(padding=(0, 2))
        left = clock(self.pace.left(self.updates - self.step))
        speed = f"{fmean(list(self.speeds)):,.4g} {self.unit}/s" if self.speeds else ""
        bar = ProgressBar(self.updates, self.step, width=max(10, min(40, self.console.width - 50)))
        row.add_row(bar, f"{self.step}/{self.updates}", f"{left} left", speed)
        return row

    def _doing(self) -> Table:
        done, of = self.parts
        row = Table.grid(padding=(0, 1))
        what = f"{self.phase} {done}/{of}" if of > 1 else self.phase
        times = f"{clock(monotonic() - self.since)}, {clock(monotonic() - self.began_at)} in all"
        row.add_row(self._spinner, Text(what), Text(times, style="dim"))
        return row

    def _metrics(self) -> Table:
        rows = Table.grid(padding=(0, 2))
        for name, values in list(self.values.items())[:ROWS]:
            rows.add_row(Text(name), Text(f"{values[-1]:.4g}", justify="right"), Text(trend(values), style="cyan"))
        return rows


def shown(metrics: Mapping[str, float]) -> list[str]:
    """The metrics that have a row: the method's own first, then those of held-out rows."""
    own = [name for name in SHOWN if name in metrics]
    return own + [name for name in metrics if name.startswith("test/")]


def trend(values: list[float], columns: int = COLUMNS) -> str:
    """All values as so many bars at most, each the mean of a stretch, from the least to the greatest."""
    n = min(columns, len(values))
    means = [fmean(values[len(values) * i // n : len(values) * (i + 1) // n]) for i in range(n)]
    low, high = min(means), max(means)
    if not low < high:  # or one is not a number
        return BARS[0] * n
    return "".join(BARS[round((one - low) / (high - low) * (len(BARS) - 1))] for one in means)
