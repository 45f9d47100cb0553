"""Plots as SVG, and numbers as people read them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any, TypeAlias

from alignment.report.folder import finite

MOST_POINTS = 600
"""Points of a line at most."""
MOST_SMOOTH = 400
"""Points of a moving mean at most."""
MOST_ZONES = 40
"""Places where a plot can be read with the pointer."""

Points: TypeAlias = Sequence[tuple[float, float | None]]
"""(update, value); None leaves a gap."""


@dataclass(frozen=True, slots=True)
class Plot:
    """What one plot shows.

    names: metrics as patterns, `*` for anything. levels: (label, end of a key in the recipe) of lines to keep under.
    low, high: what the axis shows at least.
    """

    title: str
    unit: str
    names: tuple[str, ...]
    about: str = ""
    levels: tuple[tuple[str, str], ...] = ()
    low: float | None = None
    high: float | None = None


# --- lines


@dataclass(frozen=True, slots=True)
class Series:
    """A metric over the updates; `spread` is half the width of its band at each point, None for no band."""

    name: str
    points: Points
    spread: Sequence[float | None] | None = None

    @property
    def values(self) -> list[float]:
        """What is there, without the gaps."""
        return [y for _, y in self.points if y is not None]


def names_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics that have a number anywhere, in the order in which they come."""
    known = {name: None for row in rows for name, value in row.items() if finite(value) is not None}
    return [name for name in known if name not in ("step", "time")]


def series(rows: Sequence[Mapping[str, Any]], name: str) -> Series:
    """A metric with its gaps: where it is no number, and where it lacks for longer than it usually does."""
    there = [row for row in rows if name in row]
    steps = [float(row["step"]) for row in there]
    usual = statistics.median([b - a for a, b in pairwise(steps)]) if len(steps) > 1 else 0
    band = f"{name.removesuffix('/mean')}/std"
    points, spread = list[tuple[float, float | None]](), list[float | None]()
    for row, step in zip(there, steps, strict=True):
        if points and step - points[-1][0] > 1.5 * usual:
            points.append(((step + points[-1][0]) / 2, None))
            spread.append(None)
        points.append((step, finite(row[name])))
        spread.append(finite(row.get(band)))
    return Series(name, points, spread if any(one is not None for one in spread) and band != name else None)


def thinned(points: Points, most: int = MOST_POINTS) -> list[int]:
    """The numbers of at most `most` points that draw the same line: of each stretch its least, greatest and a gap."""
    if len(points) <= most:
        return list(range(len(points)))
    stretches = most // 3
    edges = [round(n * len(points) / stretches) for n in range(stretches + 1)]
    kept = set[int]()
    for start, end in pairwise(edges):
        there = [(y, n) for n in range(start, end) if (y := points[n][1]) is not None]
        gap = next((n for n in range(start, end) if points[n][1] is None), None)
        kept |= {min(there)[1], max(there)[1]} if there else set()
        kept |= {gap} if gap is not None else set()
    return sorted(kept)


def smoothed(points: Points) -> list[tuple[float, float | None]]:
    """The moving mean over about a twentieth of the points, of the middle half of them so that no spike moves it.

    Gaps are kept; of a long run there is a point for every stretch of updates.
    """
    each = -(-len(points) // MOST_SMOOTH)
    stretches = [points[n : n + each] for n in range(0, len(points), each)]
    whole = [(some[len(some) // 2][0], _middle([y for _, y in some])) for some in stretches]
    half = max(2, len(whole) // 40)
    return [
        (x, None if y is None else _middle([one for _, one in whole[max(0, n - half) : n + half + 1]]))
        for n, (x, y) in enumerate(whole)
    ]


def _middle(values: Sequence[float | None]) -> float | None:
    """The mean of the middle half; None where there is nothing."""
    order = sorted(one for one in values if one is not None)
    cut = len(order) // 4
    return statistics.fmean(order[cut : len(order) - cut]) if order else None


def _noisy(points: Points) -> bool:
    """Whether a line is easier to read with its moving mean drawn over it: many points, and it bends at most."""
    values = [y for _, y in points if y is not None]
    bends = [abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return len(values) > 40 and statistics.fmean(bends) > 0.01 * (max(values) - min(values))


# --- numbers as text


def shown(value: float | None) -> str:
    """A number with 3 significant digits: 0.0123, 12.3, 12.3k, 1.23×10⁻⁵; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value and (abs(value) < 0.001 or abs(value) >= 1e12):
        digits, _, power = f"{value:.2e}".partition("e")
        return _signed(f"{trimmed(digits)}×10{str(int(power)).translate(_RAISED)}")
    rounded = float(f"{value:.3g}")
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(rounded) >= size:
            scale = 1e3 if sign == "k" else size
            return _signed(f"{rounded / scale:.{max(0, 2 - _power(rounded / scale))}f}{sign}")
    if float(value).is_integer() and abs(value) < 10000:
        return _signed(f"{value:.0f}")
    return _signed(f"{rounded:.{max(0, 2 - _power(rounded))}f}")


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _power(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else 0


def trimmed(digits: str) -> str:
    """A decimal number without zeros at its end."""
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def _signed(text: str) -> str:
    return text.replace("-", "−")


def _marked(value: float, step: float) -> str:
    """A number at an axis, with as many digits as its neighbours need."""
    if abs(value) < step / 1e6:
        return "0"
    size = max(abs(value), step)
    if size < 0.001 or size >= 1e12:
        return shown(value)
    for scale, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= scale * (10 if sign == "k" else 1):
            return _signed(trimmed(f"{value / scale:.2f}") + sign)
    return _signed(f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}")


# --- drawing


WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 56, 18, 26, 38
"""The plot in SVG units, which are about pixels, and the room around it for ticks and units."""


@dataclass(frozen=True, slots=True)
class Scale:
    """From values to places: of `low` at 0 to that of `high` at `size`, or the other way round."""

    low: float
    high: float
    size: float
    up: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value."""
        share = (value - self.low) / (self.high - self.low)
        place = (1 - share if self.up else share) * self.size
        return round(min(max(place, -20 * self.size), 20 * self.size), 1)  # far outside is far enough


def ticks(low: float, high: float, wanted: int = 5) -> tuple[list[float], float]:
    """(round numbers between two, the step from one to the next): 1, 2 or 5 times a power of ten."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(one * power for one in (1, 2, 5, 10) if one * power >= rough * 0.999)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)], step


def limits(values: Sequence[float], low: float | None = None, high: float | None = None) -> tuple[float, float]:
    """What an axis shows: all values with room around them, but for a few that would flatten all others."""
    order = sorted(values)
    if len(order) >= 20:
        under, over = order[len(order) // 50], order[-1 - len(order) // 50]
        most = 4 * max(over - under, abs(over) * 1e-3)
        order = [one for one in order if under - most <= one <= over + most]
    bottom = order[0] if low is None else min(low, order[0])
    top = order[-1] if high is None else max(high, order[-1])
    span = top - bottom
    room = span * 0.06 if span > 1e-4 * abs(top) else abs(top) * 0.1 or 1.0
    return (bottom if bottom == low else bottom - room), (top if top == high else top + room)


def path(points: Points, x: Scale, y: Scale) -> str:
    """A line through points with its gaps; a point without neighbours is a dot."""
    drawn, pen = list[str](), False
    for n, (step, value) in enumerate(points):
        if value is None:
            pen = False
            continue
        drawn.append(f"{'L' if pen else 'M'}{x(step):g} {y(value):g}")
        alone = not pen and (n + 1 == len(points) or points[n + 1][1] is None)
        drawn += ["h0"] if alone else []
        pen = True
    return "".join(drawn)


def band(one: Series, kept: Sequence[int], x: Scale, y: Scale) -> str:
    """The area of a series' spread, in as many pieces as there are stretches without gaps."""
    pieces, piece = list[str](), list[tuple[float, float, float]]()
    spread = one.spread or ()
    for n in (*kept, None):
        value = one.points[n][1] if n is not None else None
        wide = spread[n] if n is not None else None
        if n is not None and value is not None and wide is not None:
            piece.append((one.points[n][0], value - wide, value + wide))
        elif piece:
            there = [f"{x(step):g} {y(high):g}" for step, _, high in piece]
            back = [f"{x(step):g} {y(low):g}" for step, low, _ in reversed(piece)]
            pieces.append(f"M{'L'.join(there + back)}Z")
            piece = []
    return "".join(pieces)


def _axes(x: Scale, y: Scale, unit: str, under: str = "update") -> str:
    """Grid, ticks and units around a plot whose corner is at (LEFT, TOP)."""
    parts = [f'<text class="unit" x="2" y="13">{escape(unit)}</text>']
    marks, step = ticks(y.low, y.high)
    for mark in marks:
        at = TOP + y(mark)
        zero = " zero" if abs(mark) < step / 1e6 else ""
        parts.append(f'<path class="grid{zero}" d="M{LEFT} {at:g}h{x.size:g}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 7}" y="{at + 4:g}">{_marked(mark, step)}</text>')
    marks, step = ticks(x.low, x.high)
    for mark in marks:
        at = LEFT + x(mark)
        parts.append(f'<text class="tick mid" x="{at:g}" y="{TOP + y.size + 17:g}">{_marked(mark, step)}</text>')
    parts.append(f'<text class="unit end" x="{WIDTH - RIGHT}" y="{TOP + y.size + BOTTOM - 5:g}">{escape(under)}</text>')
    return "".join(parts)


def _zones(lines: Sequence[Series], x: Scale, y: Scale) -> str:
    """Places where the pointer shows the values below it, by style alone."""
    steps = sorted({step for one in lines for step, value in one.points if value is not None})
    picked = [steps[round(n * (len(steps) - 1) / (MOST_ZONES - 1))] for n in range(MOST_ZONES)]
    picked = steps if len(steps) <= MOST_ZONES else sorted(set(picked))
    known = [dict(one.points) for one in lines[:6]]
    parts = []
    for n, step in enumerate(picked):
        start = x((picked[n - 1] + step) / 2) if n else 0
        end = x((picked[n + 1] + step) / 2) if n + 1 < len(picked) else x.size
        here = [(k, one.name, v) for k, one in enumerate(lines[:6]) if (v := known[k].get(step)) is not None]
        dots = "".join(f'<circle class="s{k % 8}" cx="{x(step):g}" cy="{y(v):g}" r="3.5"/>' for k, _, v in here)
        texts = [f"update {_marked(step, 1)}", *(f"{_short(name)}  {shown(v)}" for _, name, v in here)]
        parts.append(
            f'<g class="z"><rect x="{start:g}" y="0" width="{max(end - start, 1):g}" height="{y.size:g}"/>'
            f'<g><path class="cross" d="M{x(step):g} 0v{y.size:g}"/>{dots}{_told(texts, x(step), x.size)}</g></g>'
        )
    return "".join(parts)


def _told(texts: Sequence[str], at: float, size: float) -> str:
    """A small box with lines of text, on the side of `at` that has more room."""
    wide = 7 * max(map(len, texts)) + 14
    left = at - wide - 8 if at > size / 2 else at + 8
    left = min(max(left, 0), size - wide)
    told = "".join(f'<text x="{left + 7:g}" y="{18 + 16 * n}">{escape(one)}</text>' for n, one in enumerate(texts))
    return f'<rect class="box" x="{left:g}" y="3" width="{wide}" height="{16 * len(texts) + 7}" rx="4"/>{told}'


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"…{name[-23:]}"


def line_plot(lines: Sequence[Series], plot: Plot, levels: Sequence[tuple[str, float]], label: str) -> str:
    """A plot of some series over the updates, as SVG. levels: horizontal lines with what they are."""
    kept = [thinned(one.points) for one in lines]
    edges = [v + s * w for one in lines for (_, v), w in zip(one.points, one.spread or (), strict=False)
             if v is not None and w is not None for s in (-1, 1)]  # fmt: skip
    low, high = limits([v for one in lines for v in one.values] + edges, plot.low, plot.high)
    steps = [step for one in lines for step, _ in one.points]
    inside = [(name, v) for name, v in levels if v <= low + 4 * (high - low)]
    for _, value in inside:  # with room for what is written above it
        low, high = min(low, value), max(high, value + 0.12 * (value - low))
    first, last = min(steps), max(steps)
    x = Scale(first, last if last > first else first + 1, WIDTH - LEFT - RIGHT)
    y = Scale(low, high, HEIGHT - TOP - BOTTOM, up=True)
    bands = {n: band(one, kept[n], x, y) for n, one in enumerate(lines) if one.spread}
    parts = [f'<path class="band s{n % 8}" d="{area}"/>' for n, area in bands.items()]
    for n, one in enumerate(lines):
        raw, noisy = [one.points[k] for k in kept[n]], _noisy(one.points)
        parts.append(f'<path class="line s{n % 8}{" raw" if noisy else ""}" d="{path(raw, x, y)}"/>')
        if noisy:
            parts.append(f'<path class="line s{n % 8}" d="{path(smoothed(one.points), x, y)}"/>')
    for name, value in inside:
        text = (
            f'<text class="level" x="{x.size - 4:g}" y="{y(value) - 5:g}">{escape(name)} {trimmed(shown(value))}</text>'
        )
        parts.append(f'<path class="level" d="M0 {y(value):g}h{x.size:g}"/>{text}')
    return _svg(label, WIDTH, HEIGHT, _axes(x, y, plot.unit) + _area(x, y, "".join(parts) + _zones(lines, x, y)))


def _area(x: Scale, y: Scale, inner: str) -> str:
    """A part of an SVG that nothing leaves."""
    return f'<svg x="{LEFT}" y="{TOP}" width="{x.size:g}" height="{y.size:g}">{inner}</svg>'


def _svg(label: str, width: float, height: float, inner: str) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{inner}</svg>"
    )


def reliability_plot(bins: Sequence[Mapping[str, float]], label: str) -> str:
    """How often the model is right (bars) at each confidence, against the diagonal where both are the same."""
    low = 0.5 if min(one["low"] for one in bins) >= 0.5 else 0.0
    x, y = Scale(low, 1, WIDTH - LEFT - RIGHT), Scale(min([low, *(one["accuracy"] for one in bins)]), 1, 250, up=True)
    most = max(one["count"] for one in bins) or 1
    parts = []
    for one in bins:
        if not one["count"]:
            continue
        start, wide, top = x(one["low"]) + 1, max(x(one["high"]) - x(one["low"]) - 2, 1), y(one["accuracy"])
        told = f"confidence {shown(one['confidence'])}, accuracy {shown(one['accuracy'])}, n = {shown(one['count'])}"
        parts.append(
            f'<g><title>{told}</title><rect class="bar" x="{start:g}" y="{top:g}" width="{wide:g}" '
            f'height="{y.size - top:g}" opacity="{0.25 + 0.55 * one["count"] / most:.2f}"/>'
            f'<circle class="s0" cx="{x(one["confidence"]):g}" cy="{top:g}" r="5"/></g>'
        )
    parts.insert(0, f'<path class="level" d="M0 {y(low):g}L{x.size:g} {y(1):g}"/>')
    height = TOP + 250 + BOTTOM
    return _svg(label, WIDTH, height, _axes(x, y, "accuracy", "confidence") + _area(x, y, "".join(parts)))
