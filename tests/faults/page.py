"""The table of faults: what the client sees, what is kept, and what was measured, each row from a test that passed."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

HEAD = """# Faults

Each row is a test in [tests/faults](../tests/faults) with real processes on loopback: `newel serve` in a process of its
own, killed for real, and an engine on raw sockets that does what the row says. `python -m tests.faults` runs them and
writes this page; the figures are from that run, the worst one where a test has several cases.
"""


@dataclass(slots=True)
class Fault:
    """One row. measured: words and seconds (or a text), such as {"to the error": 0.02}."""

    group: str = ""
    name: str = ""
    sees: str = ""
    kept: str = ""
    measured: dict[str, float | str] = field(default_factory=dict)

    def tell(self, group: str, name: str, sees: str, kept: str = "") -> None:
        """What the row says, apart from the figures."""
        self.group, self.name, self.sees, self.kept = group, name, sees, kept

    def took(self, what: str, value: float | str) -> None:
        """A figure: seconds, or a text."""
        known = self.measured.get(what)
        worst = isinstance(value, float) and isinstance(known, float)
        self.measured[what] = max(value, known) if worst else value  # type: ignore[type-var]


@dataclass(slots=True)
class Page:
    """All rows, in the order of the tests; `missing` are tests that did not pass, with their outcome."""

    rows: dict[str, Fault] = field(default_factory=dict)
    missing: list[tuple[str, str]] = field(default_factory=list)

    def add(self, row: Fault) -> None:
        """Adds a row, or its figures to the row of the same name."""
        if not row.name:
            return
        known = self.rows.setdefault(row.name, row)
        if known is not row:
            for what, value in row.measured.items():
                known.took(what, value)

    def text(self) -> str:
        """The page."""
        return "\n".join([HEAD, *self._tables(), *self._missing(), self._setting()])

    def _tables(self) -> Iterator[str]:
        for group in dict.fromkeys(row.group for row in self.rows.values()):
            yield f"## {group}\n"
            yield "| fault | what the client sees | what is kept | measured |\n|---|---|---|---|"
            for row in self.rows.values():
                if row.group == group:
                    yield f"| {row.name} | {row.sees} | {row.kept} | {_figures(row)} |"
            yield ""

    def _missing(self) -> Iterator[str]:
        if self.missing:
            yield "## What did not hold in this run\n"
            yield from (f"* {name} ({outcome})" for name, outcome in self.missing)
            yield ""

    def _setting(self) -> str:
        where = f"{platform.machine()}, {os.cpu_count()} shared cores"
        return f"Python {platform.python_version()}, {where}, {time.strftime('%Y-%m-%d')}.\n"


def _figures(row: Fault) -> str:
    return "; ".join(f"{what} {_shown(value)}".strip() for what, value in row.measured.items())


def _shown(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
