"""What the benchmark found, as a section of docs/benchmarks.md and as a picture."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape

HEADING = "## Guardrails against peers"
SILENT = "silent: guards nothing"

Grid = dict[str, dict[str, bool]]


@dataclass(slots=True)
class Results:
    """All that was measured. The keys are systems, or systems with a variant ("NeMo Guardrails, as shipped").

    about: (version, how it is set up). missing: why a system could not be had. honest: which honest texts it stops.
    leaks: characters by way of cutting, with a note. typos: (what is misspelt, what came of it). frozen: seconds by
    hostile text, None where the system was ended, words where there is no such rule. costs: (CPU seconds, how many
    times newel's) by what was read.
    """

    about: dict[str, tuple[str, str]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    disguises: Grid = field(default_factory=dict)
    honest: dict[str, list[str]] = field(default_factory=dict)
    places: Grid = field(default_factory=dict)
    leaks: dict[str, dict[str, tuple[int, str]]] = field(default_factory=dict)
    typos: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    frozen: dict[str, dict[str, float | str | None]] = field(default_factory=dict)
    costs: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)

    def drop(self, system: str, reason: str) -> None:
        """Takes a system that failed out of all tables, and says why."""
        self.missing[system] = reason
        for rows in (
            self.about,
            self.disguises,
            self.honest,
            self.places,
            self.leaks,
            self.typos,
            self.frozen,
            self.costs,
        ):
            for row in [row for row in rows if row.split(",")[0] == system]:
                del rows[row]

    def without(self, rows: Mapping[str, object]) -> str:
        """The systems that have no row there, as words."""
        names = [name for name in self.about if not any(row.split(",")[0] == name for row in rows)]
        return " and ".join(names)


@dataclass(frozen=True, slots=True)
class Setting:
    """What the tables say about how they were made."""

    phrase: str
    honest: int
    number: int
    starts: int
    hostile: Mapping[str, str]
    freeze: float


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def grid(corner: str, columns: Grid, more: Sequence[Sequence[str]] = ()) -> str:
    """A table of yes and no, with the sums below."""
    kinds = next(iter(columns.values()))
    rows = [[kind, *("yes" if column[kind] else "-" for column in columns.values())] for kind in kinds]
    sums = [f"**{sum(column.values())} of {len(kinds)}**" for column in columns.values()]
    return table([corner, *columns], [*rows, ["**caught**", *sums], *more])


def micro(seconds: float) -> str:
    """A time with two or three figures."""
    value = seconds * 1e6
    return f"{value:.1f} us" if value < 10 else f"{value:,.0f} us" if value < 1000 else f"{value / 1000:,.1f} ms"


def times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 1 else f"{ratio:.1f}" if ratio < 10 else f"{ratio:,.0f}"


def frozen(found: float | str | None, freeze: float) -> tuple[float, str]:
    """(seconds, in words)."""
    if found is None:
        return freeze, f"over {freeze:.0f} s"
    return (0.0, found) if isinstance(found, str) else (found, f"{found:.2f} s")


def typo_rows(results: Results) -> Iterator[list[str]]:
    for name, tries in results.typos.items():
        silent = [what for what, came in tries if came == SILENT]
        yield [name, f"{len(tries) - len(silent)} of {len(tries)}", ", ".join(silent) or "-"]


def leak_rows(results: Results) -> Iterator[list[str]]:
    for name, row in results.leaks.items():
        notes = {note for _, note in row.values() if note}
        yield [name, *(str(count) for count, _ in row.values()), ", ".join(notes)]


def cost_rows(results: Results) -> Iterator[list[str]]:
    for name, row in results.costs.items():
        cells = (row.get(what) for what in results.costs["newel"])
        yield [name, *(f"{micro(cell[0])} ({times(cell[1])})" if cell else "-" for cell in cells)]


def disguises(results: Results, setting: Setting) -> Iterator[str]:
    yield (
        f'### Disguises\n\nOne banned phrase, "{setting.phrase}", disguised in 21 ways in one sentence '
        f"([disguises.py](../tests/conformance/disguises.py)),\nand {setting.honest} honest texts that look a little "
        "like it: emoji joiners, Persian and Hindi joiners, soft hyphens, a base64\nimage, a URL with `%20`."
    )
    wrong = ["honest texts stopped", *(f"{len(kinds)} of {setting.honest}" for kinds in results.honest.values())]
    yield grid("disguise", results.disguises, [wrong])
    said = [f"{name}: {', '.join(kinds)}" for name, kinds in results.honest.items() if kinds]
    yield f"Honest texts that are stopped: {'; '.join(said)}." if said else ""


def streams(results: Results, setting: Setting) -> Iterator[str]:
    still = results.without(results.leaks)
    yield (
        f"### Streams\n\nHow many of the {setting.number} characters of a social security number a client has been "
        f"given when the stream ends: the worst\nof {setting.starts} places in the reply, by the pieces that the model "
        "wrote."
    )
    yield table(["system", *results.leaks["newel, refuse"], ""], leak_rows(results))
    yield (
        "NeMo reads 200 pieces at a time, as shipped after they were given out; OpenAI Guardrails read each 100th "
        "piece and the end." + (f"\n{still} have no streams." if still else "")
    )


def mistakes(results: Results, setting: Setting) -> Iterator[str]:
    patterns = ", ".join(f"`{pattern}` ({name})" for name, pattern in setting.hostile.items())
    stuck = ([name, *(frozen(one, setting.freeze)[1] for one in row.values())] for name, row in results.frozen.items())
    yield (
        "### Misspelt configurations\n\nA section, a key or a name with letters swapped or lost: is one told, at the "
        "latest when it is first used?"
    )
    yield table(["system", "told", "silent, and nothing is guarded"], typo_rows(results))
    yield (
        "### Hostile patterns\n\nHow long an event loop did nothing else while one rule read one sentence:\n"
        f"{patterns}. A system is ended after {setting.freeze:.0f} s."
    )
    yield table(["system", *setting.hostile], stuck)


def section(results: Results, setting: Setting, picture: str) -> str:
    """The section of the page, from its heading on."""
    single = results.without(results.places)
    systems = [[name, *about] for name, about in results.about.items()]
    systems += [[name, "-", reason] for name, reason in results.missing.items()]
    parts = [
        HEADING,
        "`python benchmarks/guardrails.py --write` installs the peers, runs all of this in one go and writes this "
        "section. Each\nsystem has one plain rule, set up as its own documentation does it for that job. Over-refusal "
        "is not compared: where\npeers decide by meaning they ask models over a network, which this machine does not "
        "have.",
        f"![newel and its peers]({picture})",
        table(["system", "version", "set up with"], systems),
        *disguises(results, setting),
        "### Places\n\nThe phrase, plain, in 7 places of a conversation.",
        grid("place", results.places),
        f"{single} read one string; which messages they see is up to the caller." if single else "",
        *streams(results, setting),
        *mistakes(results, setting),
        "### Cost\n\nCPU time of one plain rule that finds nothing, on a question and on a reply in pieces of 4 "
        "characters: medians, and in\nbrackets how many times newel's, measured in turn. newel reads a text as it is "
        "and as it may be disguised, unless a rule has\n`views = false`.",
        table(["system", *results.costs["newel"]], cost_rows(results)),
        f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} shared cores, "
        f"{time.strftime('%Y-%m-%d')}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def put(text: str, page: Path) -> None:
    """Replaces the section of this heading in a page, or adds it at the end."""
    before, found, rest = page.read_text(encoding="utf-8").partition(HEADING)
    after = re.search(r"^## ", rest, re.MULTILINE) if found else None
    tail = f"\n{rest[after.start() :]}" if after else ""
    page.write_text(f"{before.rstrip()}\n\n{text}{tail}", encoding="utf-8")


# --- the picture

INK, SOFT, LINE, EMPTY = "#0f172a", "#475569", "#e2e8f0", "#f1f5f9"
OWN, PEER, BAD = "#16a34a", "#64748b", "#dc2626"
LEFT, WIDE, STEP, TOP, HIGH = 165, 128, 160, 86, 46


@dataclass(frozen=True, slots=True)
class Column:
    """One measure: for each system the share of the bar, and what stands below it; `without` for the others."""

    title: str
    note: str
    better: Literal["more", "less"]
    values: Mapping[str, tuple[float, str]]
    without: str = ""


def of(count: int, total: int) -> tuple[float, str]:
    return count / total, f"{count} of {total}"


def caught(rows: Grid) -> dict[str, tuple[float, str]]:
    """Each system at its best."""
    found: dict[str, tuple[float, str]] = {}
    for label, row in rows.items():
        name, value = label.split(",")[0], of(sum(row.values()), len(row))
        found[name] = max(found.get(name, value), value)
    return found


def columns(results: Results, setting: Setting) -> list[Column]:
    """The measures; a system that streams in several ways is shown as it is shipped, which its first row is."""
    leaks: dict[str, tuple[float, str]] = {}
    for label, cuts in results.leaks.items():
        worst = max(count for count, _ in cuts.values())
        leaks.setdefault(label.split(",")[0], of(worst, setting.number))
    typos = {name: of(sum(came == SILENT for _, came in tries), len(tries)) for name, tries in results.typos.items()}
    worst_of = {name: max(frozen(one, setting.freeze) for one in row.values()) for name, row in results.frozen.items()}
    blocked = {name: (seconds / setting.freeze, words) for name, (seconds, words) in worst_of.items()}
    return [
        Column("Disguises caught", "of one banned phrase", "more", caught(results.disguises)),
        Column("Places caught", "in a conversation", "more", caught(results.places), "reads one string"),
        Column("Leaked in a stream", "characters, as shipped", "less", leaks, "has no streams"),
        Column("Silent misspellings", "in a configuration", "less", typos),
        Column("Event loop blocked", "by one pattern", "less", blocked),
    ]


def picture(results: Results, setting: Setting) -> str:
    """The SVG: a row for each system, a column for each measure."""
    names, shown = list(results.about), columns(results, setting)
    width, height = LEFT + len(shown) * STEP, TOP + len(names) * HIGH + 12
    said = " ".join(
        f"{one.title}: {', '.join(f'{name} {one.values[name][1]}' for name in names if name in one.values)}."
        for one in shown
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" '
        'font-size="14" role="img" aria-labelledby="t d">',
        '  <title id="t">newel and other guardrails</title>',
        f'  <desc id="d">{escape(said)}</desc>',
        f'  <rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for number, one in enumerate(shown):
        x = LEFT + number * STEP
        parts += [
            f'  <text x="{x}" y="28" fill="{INK}" font-size="13.5" font-weight="600">{one.title}</text>',
            f'  <text x="{x}" y="45" fill="{SOFT}" font-size="11.5">{one.note}</text>',
            f'  <text x="{x}" y="60" fill="{SOFT}" font-size="11.5">{one.better} is better</text>',
        ]
    for row, name in enumerate(names):
        parts += drawn(name, shown, TOP + row * HIGH)
    return "\n".join([*parts, "</svg>"]) + "\n"


def drawn(name: str, shown: Sequence[Column], y: int) -> Iterator[str]:
    """One row of the picture."""
    weight = ' font-weight="700"' if name == "newel" else ""
    yield f'  <path d="M16 {y - 8}H{LEFT + len(shown) * STEP - 16}" stroke="{LINE}"/>'
    yield f'  <text x="16" y="{y + 20}" fill="{INK}"{weight}>{escape(name)}</text>'
    for number, one in enumerate(shown):
        x = LEFT + number * STEP
        if name not in one.values:
            yield f'  <text x="{x}" y="{y + 20}" fill="{SOFT}" font-size="12">{one.without}</text>'
            continue
        share, label = one.values[name]
        colour = BAD if one.better == "less" else OWN if name == "newel" else PEER
        yield f'  <rect x="{x}" y="{y + 2}" width="{WIDE}" height="9" rx="3" fill="{EMPTY}"/>'
        if share > 0.005:
            full = max(3, round(min(share, 1.0) * WIDE))
            yield f'  <rect x="{x}" y="{y + 2}" width="{full}" height="9" rx="3" fill="{colour}"/>'
        yield f'  <text x="{x}" y="{y + 27}" fill="{INK}" font-size="12"{weight}>{escape(label)}</text>'
