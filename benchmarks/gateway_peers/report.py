"""What the benchmark of gateways found, as a section of docs/benchmarks.md and as a picture."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

HEADING = "## Gateway (`benchmarks/gateway.py`)"
INK, SOFT, LINE, OWN, PEER = "#1f2328", "#59636e", "#d8dee4", "#0969da", "#8c959f"

Figures = dict[str, float]
"""Of one way, by name: requests, cpu, p50, p99, bad, rss; of streams frames, tokens, frame_cpu, gap50, gap99, pause,
stalls, ttft50, ttft99, ttft, stream_bad, stream_rss."""


@dataclass(slots=True)
class Results:
    """All that was measured. about: how a way is set up; missing: why one could not be had; memory: MB by minute."""

    about: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Figures] = field(default_factory=dict)
    memory: list[float] = field(default_factory=list)
    memory_of: str = ""

    def added(self, name: str, what: str) -> float:
        """How much more than the direct way."""
        return self.figures[name][what] - self.figures["direct"][what]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def ms(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:,.0f}"


def whole_rows(results: Results) -> Iterable[list[str]]:
    floor = results.figures.get("ASGI floor", {}).get("cpu")
    for name, row in results.figures.items():
        own = name == "direct"
        ratio = f" ({row['cpu'] / floor:.1f})" if floor and not own else ""
        added = ["", ""] if own else [ms(results.added(name, "p50")), ms(results.added(name, "p99"))]
        cpu = "" if own else f"{row['cpu']:,.0f}{ratio}"
        bad = f", {row['bad']:.0f} failed" if row["bad"] else ""
        yield [name, f"{row['requests']:,.0f}{bad}", cpu, *added, "" if own else f"{row['rss']:.0f}"]


def stream_rows(results: Results) -> Iterable[list[str]]:
    for name, row in results.figures.items():
        if "frames" not in row:
            continue
        silent = f", {row['stream_bad']:.0f} streams without an answer" if row["stream_bad"] else ""
        said = [name, f"{row['frames']:,.0f}{silent}"]
        if not row["frames"]:
            yield [*said, *[""] * 9, f"{row['stream_rss']:.0f}"]
            continue
        own = name == "direct"
        joined = f"{row['tokens'] / row['frames']:.2f}"
        cpu, rss = ("", "") if own else (f"{row['frame_cpu']:,.1f}", f"{row['stream_rss']:.0f}")
        gaps, starts = (
            [ms(row[one]) if own else ms(results.added(name, one)) for one in names]
            for names in (("gap50", "gap99"), ("ttft50", "ttft99", "ttft"))
        )
        yield [*said, joined, cpu, f"{row['stalls']:,.0f}", ms(row["pause"]), *gaps, *starts, rss]


INTRODUCTION = """`python benchmarks/gateway.py --write` measures all of this in one run and writes this section.
The gateway has one core for itself (`taskset`), the engine and the load share the other, and ways that are not measured
stand still (SIGSTOP). Each question and each reply is new (a running number in it). Medians of {rounds} rounds of
{seconds:g} s in which the ways take turns. "Added" is against the direct way of the same run."""
WHOLE = """### Whole replies

`wrk`, a question of about 90 characters, a reply of 55 words: requests/s and CPU with 32 connections in a closed loop,
latency with one. In brackets: how many times the floor's CPU."""
STREAMS = """### Streams

{streams} streams of 50 tokens a second each ({frames:,} tokens/s, if the way can follow) that begin within {start:g} s.
A stall is a pause of more than 250 ms. Where a core is not enough for a frame a token, newel puts more tokens into one.
The first row has the gaps and the time to the first event themselves, the others what is added; the longest pause is
the way's own. Where a way cannot follow, pieces come in bursts: the gap's p50 is then less than nothing."""


def section(results: Results, streams: int, rounds: int, seconds: float, picture: str, start: float = 1.0) -> str:
    """The section of the page, from its heading on."""
    ways = [[name, how] for name, how in results.about.items()]
    ways += [[name, f"left out: {why}"] for name, why in results.missing.items()]
    whole = ["way", "requests/s", "CPU us a request", "added p50, ms", "added p99, ms", "memory, MB"]
    spoken = [
        "way",
        "frames/s",
        "tokens a frame",
        "CPU us a frame",
        "stalls",
        "longest pause, ms",
        "gap p50, ms",
        "gap p99, ms",
        "first event p50, ms",
        "p99",
        "longest",
        "memory, MB",
    ]
    where = f"{platform.machine()}, {os.cpu_count()} shared cores, {time.strftime('%Y-%m-%d')}"
    parts = [
        HEADING,
        INTRODUCTION.format(rounds=rounds, seconds=seconds),
        f"![gateways side by side]({picture})",
        table(["way", "set up"], ways),
        WHOLE,
        table(whole, whole_rows(results)),
        *(
            [STREAMS.format(streams=streams, frames=streams * 50, start=start), table(spoken, stream_rows(results))]
            if streams
            else []
        ),
        memory(results),
        f"Python {platform.python_version()}, {where}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def memory(results: Results) -> str:
    if not results.memory:
        return ""
    head = ["minute", *(str(minute) for minute in range(len(results.memory)))]
    row = ["MB", *(f"{value:.0f}" for value in results.memory)]
    return f"### Memory\n\n{results.memory_of} under load, minute by minute.\n\n{table(head, [row])}"


def put(text: str, page: Path) -> None:
    """Replaces the section of this heading in a page, or adds it at the end."""
    before, found, rest = page.read_text(encoding="utf-8").partition(HEADING)
    after = re.search(r"^## ", rest, re.MULTILINE) if found else None
    tail = f"\n{rest[after.start() :]}" if after else ""
    page.write_text(f"{before.rstrip()}\n\n{text}{tail}", encoding="utf-8")


COLUMNS: Mapping[str, str] = {
    "Requests per second": "one core, 32 connections; more is better",
    "CPU of a request": "microseconds; less is better",
    "Added p99": "milliseconds at one connection; less is better",
}


def values(results: Results) -> list[dict[str, float]]:
    """The figures of each column, by way."""
    names = [name for name in results.figures if name != "direct"]
    return [
        {name: results.figures[name]["requests"] for name in names},
        {name: results.figures[name]["cpu"] for name in names},
        {name: max(results.added(name, "p99"), 0.0) for name in names},
    ]


def picture(results: Results) -> str:
    """The SVG: a row for each way, a column for each measure, bars to the largest of the column."""
    names = [name for name in results.figures if name != "direct"]
    left, step, wide, top, high = 170, 250, 210, 78, 44
    width, height = left + step * len(COLUMNS), top + high * len(names) + 12
    shown = values(results)
    said = " ".join(
        f"{title}: {', '.join(f'{name} {label(column[name])}' for name in names)}."
        for title, column in zip(COLUMNS, shown, strict=True)
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" '
        'font-size="14" role="img" aria-labelledby="t d">',
        '  <title id="t">Gateways side by side</title>',
        f'  <desc id="d">{escape(said)}</desc>',
        f'  <rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for number, (title, note) in enumerate(COLUMNS.items()):
        x = left + number * step
        parts += [
            f'  <text x="{x}" y="30" fill="{INK}" font-size="13.5" font-weight="600">{title}</text>',
            f'  <text x="{x}" y="48" fill="{SOFT}" font-size="11">{note}</text>',
        ]
    for row, name in enumerate(names):
        y = top + row * high
        own = name.startswith("newel")
        weight = ' font-weight="700"' if own else ""
        parts += [
            f'  <path d="M16 {y - 10}H{width - 16}" stroke="{LINE}"/>',
            f'  <text x="16" y="{y + 18}" fill="{INK}"{weight}>{escape(name)}</text>',
        ]
        for number, column in enumerate(shown):
            x = left + number * step
            full = max(2, round(wide * column[name] / max(max(column.values()), 1e-9)))
            parts += [
                f'  <rect x="{x}" y="{y}" width="{full}" height="9" rx="3" fill="{OWN if own else PEER}"/>',
                f'  <text x="{x}" y="{y + 25}" fill="{INK}" font-size="12"{weight}>{label(column[name])}</text>',
            ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def label(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"
