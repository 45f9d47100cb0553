"""The report of a run: one HTML file with plots, samples, calibration and results, which opens anywhere.

It is made of what lies in the run's folder, whatever the method was; what is not there is left out, and what cannot be
read is told on the page. Nothing in it comes from elsewhere: no scripts, no fonts, plots are SVG drawn here.
"""

from __future__ import annotations

import json
import math
import statistics
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from html import escape
from itertools import count, pairwise
from pathlib import Path
from typing import Any, TypeAlias

NAME = "report.html"
MOST_POINTS = 600
"""Points of a line at most."""
MOST_SMOOTH = 400
"""Points of a moving mean at most."""
MOST_ROWS, MOST_ZONES, MOST_SAMPLES = 25, 40, 24
"""Rows of a plot's table, places where a plot can be read with the pointer, samples that are shown."""
LONG = 700
"""Characters of a text beyond which it scrolls in its cell."""

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


SECTIONS: dict[str, tuple[Plot, ...]] = {
    "Learning": (
        Plot("Reward", "reward", ("reward/*", "rewards/*", "reward", "held_out", "*/held_out", "held_out/reward*",
             "test/score"), "of a reply"),
        Plot("Loss", "nats", ("loss", "train/loss", "test/loss", "eval/loss"), "of the training, and held out"),
        Plot("Perplexity", "perplexity", ("perplexity", "*/perplexity"), "on held-out rows"),
        Plot("Accuracy", "share", ("accuracy", "*/accuracy", "accuracy/*", "*/accuracy/*", "*/accuracy_*"),
             "what the model prefers as people did"),
        Plot("Margin", "nats", ("margin", "*/margin", "margins", "*/margins"), "of the better reply over the other"),
        Plot("Gain", "nats per reply", ("gain", "gain/*", "*/gain", "*/gain/*", "baseline", "*/baseline"),
             "in likelihood over the reference"),
        Plot("Calibration error", "share", ("ece", "*/ece"), "expected calibration error", low=0),
    ),
    "Policy": (
        Plot("KL to the reference", "nats per reply", ("kl", "kl/reply", "kl/sequence"), "how far the policy has moved",
             (("target", "kl.target"), ("budget", "kl.budget"), ("bound", "bounds.kl"), ("bound", "monitor.kl")), 0),
        Plot("KL estimates", "nats per token", ("kl/k1", "kl/k2", "kl/k3"), "k1 is unbiased, k3 is never negative"),
        Plot("KL coefficient", "reward per nat", ("kl/coefficient", "kl/beta"), "what a nat costs", low=0),
        Plot("Entropy", "nats per token", ("entropy", "*/entropy"), "how undecided the policy is", low=0),
        Plot("KL of an update", "nats per token", ("ppo/kl",), "from the policy that drew the replies",
             (("stop", "stop"),), 0),
        Plot("Clipped", "share", ("policy/clipped", "*/clipfrac"), "tokens whose ratio left the clip", low=0),
        Plot("Constraints", "weight", ("constraint/*",), "multipliers; they rise while a limit is broken", low=0),
        Plot("Policy loss", "loss", ("policy/loss",), "the clipped objective; it need not fall"),
        Plot("Replay loss", "nats per token", ("replay/loss",), "on demonstrations, against the alignment tax"),
        Plot("Engine mismatch", "nats per token", ("engine/*", "rollout/kl*"), "between rollouts and the trainer"),
    ),
    "Replies": (
        Plot("Length", "tokens", ("reply/tokens", "length", "*/length", "length/*"), "of a reply", low=0),
        Plot("Words", "words", ("words", "*/words"), "of a reply", low=0),
        Plot("Ended by itself", "share", ("reply/ended",), "replies that were not cut off", low=0, high=1),
        Plot("Repetition and variety", "share", ("repeated", "distinct", "refused", "*/repeated", "*/distinct",
             "*/refused"), "signs of a reward that is gamed", low=0),
    ),
    "Critic": (
        Plot("Explained variance", "share", ("value/explained",), "of the returns; 1 is a perfect critic", high=1),
        Plot("Value and return", "reward", ("value/mean", "return/mean"), "what the critic expects, and what came"),
        Plot("Value loss", "squared reward", ("value/loss",), "half the squared error of the critic", low=0),
    ),
    "Optimiser": (
        Plot("Learning rate", "learning rate", ("lr", "*/lr", "lr/*"), "of each update", low=0),
        Plot("Gradient norm", "norm", ("grad", "*/grad", "grad/*", "grad_norm"), "before it is clipped", low=0),
    ),
    "Speed": (
        Plot("Throughput", "tokens per second", ("tokens/s", "*/tokens/s"), "all parts of an update counted", low=0),
        Plot("Throughput", "per second", ("per_second",), "tokens, or pairs", low=0),
        Plot("Time", "seconds", ("time/*",), "of an update and its parts", low=0),
    ),
}  # fmt: skip
"""The plots that are known, by section; a metric is in the first one that names it."""

TILES = (
    ("reward/mean", "Reward", ""), ("test/accuracy", "Held-out accuracy", ""), ("test/loss", "Held-out loss", "nats"),
    ("loss", "Loss", "nats"), ("accuracy", "Accuracy", ""), ("kl/reply", "KL to the reference", "nats per reply"),
    ("value/explained", "Explained variance", ""), ("reply/tokens", "Reply length", "tokens"),
    ("reply/entropy", "Entropy", "nats per token"), ("test/perplexity", "Held-out perplexity", ""),
    ("tokens/s", "Throughput", "tokens/s"), ("per_second", "Throughput", "per second"),
)  # fmt: skip
"""(metric, what it is, unit) of the figures at the top, of which the first six that are there are shown."""


def write(folder: Path, title: str) -> Path:
    """The file of the report on a run's folder, made anew; it is whole or the one before is still there."""
    page = _page(read(folder), title)
    path = folder / NAME
    new = folder / f"{NAME}.new"
    new.write_text(page, encoding="utf-8", errors="replace")
    new.replace(path)
    return path


# --- what lies in the folder


@dataclass(slots=True)
class Found:
    """What could be read of a run's folder, and what could not (`troubles`)."""

    folder: Path
    recipe: str = ""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    calibration: Any = None
    evaluation: Any = None
    data: Any = None
    troubles: list[str] = field(default_factory=list)


def read(folder: Path) -> Found:
    """What lies in a run's folder. A last line without an end is a crash's and is skipped."""
    found = Found(folder)
    recipe = folder / "recipe.toml"
    found.recipe = recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else ""
    found.metrics = _by_step(_lines(folder / "metrics.jsonl", found.troubles))
    found.samples = _lines(folder / "samples.jsonl", found.troubles)
    for name in ("calibration", "evaluation", "data"):
        path = folder / f"{name}.json"
        try:
            setattr(found, name, json.loads(path.read_bytes()) if path.is_file() else None)
        except ValueError as error:
            found.troubles.append(f"{path.name} is not JSON and was left out ({error}).")
    return found


def _lines(path: Path, troubles: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSONL file; bad lines but the last are noted."""
    rows, bad = list[dict[str, Any]](), list[int]()
    written = path.read_bytes().split(b"\n") if path.is_file() else []
    last = max((n for n, line in enumerate(written, 1) if line.strip()), default=0)
    for number, line in enumerate(written[:last], 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            row = ()
        if isinstance(row, dict):
            rows.append(row)
        elif row is not None and number != last:
            bad.append(number)
    if bad:
        shown = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
        troubles.append(f"{path.name}: {len(bad)} of its lines cannot be read and were left out (line {shown}).")
    return rows


def _by_step(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a step, in order; the later one where a run went on from a checkpoint."""
    steps = {row["step"]: row for row in rows if _number(row.get("step")) is not None}
    return [steps[step] for step in sorted(steps)]


def _number(value: object) -> float | None:
    """A number that can be drawn, or None: not one that is infinite, or so large that differences of it would be."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e150:
        return None
    return float(value) if abs(value) > 1e-150 else 0.0


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
    known = {name: None for row in rows for name, value in row.items() if _number(value) is not None}
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
        points.append((step, _number(row[name])))
        spread.append(_number(row.get(band)))
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
        return _signed(f"{_cut(digits)}×10{str(int(power)).translate(_RAISED)}")
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


def _cut(digits: str) -> str:
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
            return _signed(_cut(f"{value / scale:.2f}") + sign)
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
        text = f'<text class="level" x="{x.size - 4:g}" y="{y(value) - 5:g}">{escape(name)} {_cut(shown(value))}</text>'
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


# --- the page


def _page(found: Found, title: str) -> str:
    rows = found.metrics
    parts = [
        ("results", "Results", _evaluation(found.evaluation)),
        ("calibration", "Calibration", _calibration(found.calibration)),
        *((name.lower(), name, inner) for name, inner in _curves(found)),
        ("samples", "Samples", _samples(found.samples)),
        ("data", "Data", _data(found.data)),
        ("recipe", "Recipe", f'<pre tabindex="0">{escape(found.recipe)}</pre>' if found.recipe else ""),
    ]
    parts = [one for one in parts if one[2]]
    links = "".join(f'<a href="#{key}">{escape(name)}</a>' for key, name, _ in parts)
    body = "".join(f'<section id="{key}"><h2>{escape(name)}</h2>{inner}</section>' for key, name, inner in parts)
    told = "".join(f"<p>{escape(one)}</p>" for one in found.troubles)
    told = f'<div class="note" role="note">{told}</div>' if told else ""
    none = "" if rows else '<p class="note">There are no metrics: the run has not finished an update.</p>'
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        'content="light dark"><meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        f"style-src 'unsafe-inline'\"><title>{escape(title)} – {escape(found.folder.resolve().name)}</title>"
        f"<style>{STYLE}</style></head><body><header><h1>{escape(title)}</h1>{_facts(found)}"
        f'<nav aria-label="Sections">{links}</nav></header><main>'
        f"{told}{none}{_tiles(rows)}{body}</main>"
        "<footer>Made by newel from the files of the run. Numbers have 3 significant digits.</footer></body></html>\n"
    )


def _facts(found: Found) -> str:
    """Where, when, how long."""
    rows = found.metrics
    facts = [f"<code>{escape(found.folder.resolve().name)}</code>"]
    times = [t for row in rows if (t := _number(row.get("time"))) is not None]
    if rows:
        facts.append(f"{rows[-1]['step']:,} updates")
    if times:
        began = datetime.fromtimestamp(times[0], UTC)
        facts.append(f'<time datetime="{began.isoformat(timespec="seconds")}">{began:%d %B %Y, %H:%M} UTC</time>')
    if len(times) > 1:
        facts.append(_lasted(times[-1] - times[0]))
    tokens = sum(n for row in rows if (n := _number(row.get("tokens"))) is not None)
    if tokens:
        facts.append(f"{shown(tokens)} tokens")
    return f'<p class="facts">{"<span>·</span>".join(facts)}</p>'


def _lasted(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _tiles(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figures at the top: means over the last updates, and over the first ones."""
    tiles = list[str]()
    for name, what, unit in TILES:
        values = [v for row in rows if (v := _number(row.get(name))) is not None]
        if not values or len(tiles) == 6:
            continue
        few = max(1, min(10, len(values) // 4))
        first, last = statistics.fmean(values[:few]), statistics.fmean(values[-few:])
        before = f"{shown(first)} at first" if len(values) > 1 else "one value"
        tiles.append(
            f'<div class="tile"><dt>{what}<code>{escape(name)}</code></dt><dd><b>{shown(last)}</b> '
            f"<small>{unit}</small><span>{before}</span></dd></div>"
        )
    told = (
        '<p class="hint">Means over the last ten updates (a quarter of them in short runs), and over the first. In the '
        "plots, thin lines are what was measured and thick ones moving means.</p>"
    )
    return f'<dl class="tiles">{"".join(tiles)}</dl>{told}' if tiles else ""


def _curves(found: Found) -> Iterator[tuple[str, str]]:
    """(section, its plots) of all metrics: the known ones, then the others by prefix."""
    left = names_of(found.metrics)
    keys, numbers = _flat(found.recipe), count(1)
    for section, plots in SECTIONS.items():
        figures = []
        for plot in plots:
            names = [one for one in left if any(fnmatchcase(one, pattern) for pattern in plot.names)]
            left = [one for one in left if one not in names]
            figures += [_figure(group, plot, keys, next(numbers)) for group in _plotted(found.metrics, names, plot)]
        yield section, f'<div class="grid">{"".join(figures)}</div>' if figures else ""
    figures = [
        _figure(
            group, Plot(group[0].name if len(group) == 1 else _prefix(group[0].name), "value", ()), keys, next(numbers)
        )
        for group in _alike([series(found.metrics, name) for name in left])
    ]
    yield "Others", f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def _plotted(rows: Sequence[Mapping[str, Any]], names: Sequence[str], plot: Plot) -> list[list[Series]]:
    """The series of a known plot; those that are a band of another are not drawn again."""
    lines = [series(rows, name) for name in names]
    bands = {f"{one.name.removesuffix('/mean')}/std" for one in lines if one.spread}
    drawn = [one for one in lines if one.name not in bands]
    return [drawn[n : n + 8] for n in range(0, len(drawn), 8)]


def _prefix(name: str) -> str:
    return name.partition("/")[0]


def _alike(lines: Sequence[Series]) -> list[list[Series]]:
    """Series in groups of one prefix and of sizes that can be seen together."""
    groups = list[list[Series]]()
    for one in sorted(lines, key=lambda one: _prefix(one.name)):
        size = max(map(abs, one.values))
        for group in groups:
            other = max(map(abs, group[0].values))
            near = size == other or (size and other and 0.05 < size / other < 20)
            if near and _prefix(group[0].name) == _prefix(one.name) and len(group) < 8:
                group.append(one)
                break
        else:
            groups.append([one])
    return groups


def _flat(recipe: str) -> dict[str, float]:
    """The numbers of a recipe by dotted key; nothing of one that is no TOML."""
    found = dict[str, float]()

    def walk(table: Mapping[str, Any], before: str) -> None:
        for key, value in table.items():
            if isinstance(value, dict):
                walk(value, f"{before}{key}.")
            elif (number := _number(value)) is not None:
                found[f"{before}{key}"] = number

    try:
        walk(tomllib.loads(recipe), "")
    except tomllib.TOMLDecodeError:
        return {}
    return found


def _levels(plot: Plot, keys: Mapping[str, float]) -> list[tuple[str, float]]:
    return [
        (label, value) for label, end in plot.levels for key, value in keys.items() if f".{key}".endswith(f".{end}")
    ]


def _figure(lines: Sequence[Series], plot: Plot, keys: Mapping[str, float], number: int) -> str:
    """A plot with its title, a table that is its legend, and all its values as a table."""
    levels = _levels(plot, keys)
    steps = [step for one in lines for step, _ in one.points]
    ranges = "; ".join(f"{one.name} from {shown(one.values[0])} to {shown(one.values[-1])}" for one in lines)
    label = f"{plot.title}: {ranges}, updates {shown(min(steps))} to {shown(max(steps))}"
    legend = "".join(
        f'<tr><th scope="row"><i class="s{n % 8}"></i><code>{_breaking(one.name)}</code></th>'
        + "".join(f"<td>{shown(v)}</td>" for v in (one.values[0], one.values[-1], min(one.values), max(one.values)))
        + "</tr>"
        for n, one in enumerate(lines)
    )
    heads = "".join(f'<th scope="col">{one}</th>' for one in ("first", "last", "least", "most"))
    told = [plot.about, "the band is one standard deviation to each side" if any(one.spread for one in lines) else ""]
    about = f"<span>{escape('; '.join(filter(None, told)))}</span>"
    notes = "".join(f'<p class="hint">{escape(one)}</p>' for one in _beyond(lines, plot, levels))
    return (
        f'<figure aria-labelledby="f{number}"><figcaption id="f{number}"><b>{escape(plot.title)}</b>{about}'
        f"</figcaption>{line_plot(lines, plot, levels, label)}{notes}"
        f'<table class="legend"><thead><tr><th scope="col">metric</th>{heads}</tr></thead><tbody>{legend}</tbody>'
        f"</table>{_values(lines)}</figure>"
    )


def _breaking(name: str) -> str:
    """A metric's name that may go on in the next line after a slash."""
    return escape(name).replace("/", "/<wbr>")


def _beyond(lines: Sequence[Series], plot: Plot, levels: Sequence[tuple[str, float]]) -> list[str]:
    """What the plot does not show."""
    values = [v for one in lines for v in one.values]
    edges = [v + w for one in lines for (_, v), w in zip(one.points, one.spread or (), strict=False)
             if v is not None and w is not None]  # fmt: skip
    low, high = limits(values + edges, plot.low, plot.high)
    over, under = [v for v in values if v > high], [v for v in values if v < low]
    notes = [f"{_values_are(over)} above the plot, up to {shown(max(over))}."] if over else []
    notes += [f"{_values_are(under)} below the plot, down to {shown(min(under))}."] if under else []
    far = [(name, v) for name, v in levels if v > low + 4 * (high - low)]
    return notes + [f"The {name} of {_cut(shown(v))} is far above the plot." for name, v in far]


def _values_are(values: Sequence[float]) -> str:
    return "One value is" if len(values) == 1 else f"{len(values)} values are"


def _values(lines: Sequence[Series]) -> str:
    """The series as a table of at most MOST_ROWS updates."""
    known = [dict(one.points) for one in lines]
    steps = sorted({step for one in lines for step, value in one.points if value is not None})
    if len(steps) > MOST_ROWS:
        steps = sorted({steps[round(n * (len(steps) - 1) / (MOST_ROWS - 1))] for n in range(MOST_ROWS)})
    heads = ["update", *(f"<code>{escape(one.name)}</code>" for one in lines)]
    rows = [[f"{step:,.0f}", *(shown(one.get(step)) for one in known)] for step in steps]
    return f"<details><summary>Values as a table</summary>{_table(heads, rows)}</details>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    """A table that scrolls sideways by itself; the cells are HTML, the first of each row is its head."""
    top = "".join(f'<th scope="col">{one}</th>' for one in heads)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{one}</td>" for one in row[1:])}</tr>' for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _evaluation(found: object) -> str:
    """The measures with their intervals, drawn where they are shares."""
    rows = []
    for name, fields in _measures(found):
        value, low, high, n = (_number(fields.get(key)) for key in ("value", "low", "high", "n"))
        if value is None:
            continue
        around = f"{shown(low)} to {shown(high)}" if low is not None and high is not None else "–"
        count = f"{n:,.0f}" if n is not None else "–"
        rows.append([_breaking(name), f"<b>{shown(value)}</b>", around, count, _whisker(value, low, high)])
    heads = ["measure", "value", "interval", "n", '<span class="ends"><span>0</span><span>1</span></span>']
    if not any(row[4] for row in rows):
        heads, rows = heads[:4], [row[:4] for row in rows]
    return f'<div class="card">{_table(heads, rows)}</div>' if rows else ""


def _measures(found: object, name: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, value with its interval) of all that is measured, at any depth, with slashes in the name."""
    if isinstance(found, dict) and "value" not in found:
        for key, inner in found.items():
            yield from _measures(inner, f"{name}/{key}" if name else str(key))
    elif isinstance(found, list):
        for number, inner in enumerate(found, 1):
            yield from _measures(inner, f"{name}/{number}")
    elif name:
        yield name, found if isinstance(found, dict) else {"value": found}


def _whisker(value: float, low: float | None, high: float | None) -> str:
    """A share between 0 and 1 with its interval, drawn."""
    if not 0 <= value <= 1 or low is None or high is None or not 0 <= low <= high <= 1:
        return ""
    x = Scale(0, 1, 200)
    return (
        '<svg class="whisker" viewBox="-6 0 212 16" aria-hidden="true"><path class="grid" d="M0 8h200M100 3v10"/>'
        f'<path class="line s0" d="M{x(low):g} 8H{x(high):g}"/>'
        f'<circle class="s0" cx="{x(value):g}" cy="8" r="4.5"/></svg>'
    )


def _calibration(found: object) -> str:
    """Reliability diagrams: one, or one for each objective."""
    if not isinstance(found, dict):
        return ""
    each = {"": found} if "bins" in found else {name: one for name, one in found.items() if isinstance(one, dict)}
    figures = [_reliable(name, one) for name, one in each.items() if _bins(one)]
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def _bins(one: Mapping[str, Any]) -> list[dict[str, float]]:
    """The bins whose numbers are all there; an empty one has neither confidence nor accuracy."""
    keys = ("low", "high", "count", "confidence", "accuracy")
    bins = one.get("bins")
    rows = [row for row in bins if isinstance(row, dict)] if isinstance(bins, list) else []
    numbers = [{key: _number(row.get(key)) for key in keys} for row in rows]
    return [{key: v for key, v in row.items() if v is not None} for row in numbers if None not in row.values()]


def _reliable(name: str, one: Mapping[str, Any]) -> str:
    bins = _bins(one)
    figures = [(key, number) for key, value in one.items() if (number := _number(value)) is not None]
    told = "".join(f"<div><dt>{escape(key)}</dt><dd>{shown(value)}</dd></div>" for key, value in figures)
    heads = ["confidence", "mean confidence", "accuracy", "pairs"]
    rows = [[f"{shown(row['low'])} to {shown(row['high'])}", shown(row["confidence"]), shown(row["accuracy"]),
             f"{row['count']:,.0f}"] for row in bins]  # fmt: skip
    title = f"Reliability{f' of {name}' if name else ''}"
    return (
        f"<figure><figcaption><b>{escape(title)}</b><span>how often the model is right when it is so sure; on the "
        f"dashed line it is as sure as it should be, darker bars have more pairs</span></figcaption>"
        f'{reliability_plot(bins, title)}<dl class="pairs">{told}</dl>'
        f"<details open><summary>Values as a table</summary>{_table(heads, rows)}</details></figure>"
    )


# --- texts


def _samples(rows: Sequence[Mapping[str, Any]]) -> str:
    """The samples of the last step, then some of those before."""
    if not rows:
        return ""
    steps = [step for row in rows if (step := _number(row.get("step"))) is not None]
    last = max(steps, default=None)
    now = [row for row in rows if _number(row.get("step")) == last]
    before = [row for row in reversed(rows) if _number(row.get("step")) != last]
    told = f"<p>After update {last:,.0f}{_of(now)}.</p>" if last is not None else ""
    html = told + _sample_table(now[:MOST_SAMPLES])
    if before:
        shown_some = _sample_table(before[:MOST_SAMPLES], steps=True)
        html += f"<details><summary>Earlier samples{_of(before)}</summary>{shown_some}</details>"
    return f'<div class="card">{html}</div>'


def _of(rows: Sequence[object]) -> str:
    return f": {MOST_SAMPLES} of {len(rows)}" if len(rows) > MOST_SAMPLES else ""


def _sample_table(rows: Sequence[Mapping[str, Any]], steps: bool = False) -> str:
    """Prompts with what was said before and after the training, or with whatever else the rows have."""
    given = {key: None for row in rows for key in row}
    texts = [key for key in given if key != "step" and any(isinstance(row.get(key), (str, list)) for row in rows)]
    first = [key for key in ("prompt", "before", "after") if key in texts]
    columns = [*first, *(key for key in texts if key not in first)]
    numbers = [key for key in given if key not in (*columns, "step") and not _beside(key, columns)]
    heads = [*(["update"] if steps else []), *columns, *numbers]
    top = "".join(f'<th scope="col" role="columnheader">{escape(_spoken(one))}</th>' for one in heads)
    body = "".join(
        '<tr role="row">' + "".join(_cell(row, one, _spoken(one)) for one in heads) + "</tr>" for row in rows
    )
    return f'<table class="samples" role="table"><thead><tr role="row">{top}</tr></thead><tbody>{body}</tbody></table>'


def _beside(key: str, columns: Sequence[str]) -> bool:
    """Whether a number is told with a text: `reward_after` with `after`."""
    return key.startswith("reward_") and key.removeprefix("reward_") in columns


def _spoken(key: str) -> str:
    return key.replace("_", " ")


def _cell(row: Mapping[str, Any], key: str, label: str) -> str:
    value = row.get("step" if key == "update" else key)
    reward = _number(row.get(f"reward_{key}"))
    chip = f'<span class="chip">reward {shown(reward)}</span>' if reward is not None else ""
    if isinstance(value, (str, list)):
        text = _said(value)
        long = ' class="long" tabindex="0"' if len(text) > LONG else ""
        inner = f"<div{long}>{text}</div>{chip}"
    else:
        inner = (f"{value:,.0f}" if key == "update" else shown(_number(value))) if _number(value) is not None else "–"
    kind = "text" if isinstance(value, (str, list)) else "figure"
    return f'<td class="{kind}" role="cell" data-label="{escape(label)}">{inner}</td>'


def _said(value: str | list[Any]) -> str:
    """A text, or the messages of a conversation with who said each."""
    if isinstance(value, str):
        return escape(value) if value.strip() else '<em class="empty">empty</em>'
    parts = []
    for one in value:
        message = one if isinstance(one, dict) else {"content": one}
        role = f'<span class="role">{escape(str(message["role"]))}</span> ' if "role" in message else ""
        parts.append(f"<p>{role}{escape(str(message.get('content', '')))}</p>")
    return "".join(parts)


def _data(found: object) -> str:
    """The files that the model learned from, with their fingerprints."""
    rows: list[tuple[str, Mapping[str, Any]]] = []
    if isinstance(found, dict):
        rows = [(str(name), one if isinstance(one, dict) else {"fingerprint": one}) for name, one in found.items()]
    elif isinstance(found, list):
        rows = [
            (str(one.get("path", one.get("name", n))), one) for n, one in enumerate(found, 1) if isinstance(one, dict)
        ]
    keys = list({key: None for _, one in rows for key in one if key not in ("path", "name")})
    table = [[f"<code>{escape(name)}</code>", *(_plain(one.get(key)) for key in keys)] for name, one in rows]
    heads = ["file", *(escape(_spoken(key)) for key in keys)]
    return f'<div class="card">{_table(heads, table, "files")}</div>' if rows else ""


def _plain(value: object) -> str:
    """A value of any kind in a cell."""
    if isinstance(value, dict):
        return escape(", ".join(f"{key} {_whole(one)}" for key, one in value.items()))
    if isinstance(value, list):
        return escape(", ".join(map(_whole, value)))
    text = _whole(value)
    return f'<code class="wrap">{escape(text)}</code>' if len(text) > 20 and " " not in text else escape(text)


def _whole(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return shown(value) if isinstance(value, float) else str(value)


STYLE = """
:root{color-scheme:light dark;--bg:#f5f6f8;--card:#fff;--ink:#17212f;--soft:#526073;--edge:#dde2e9;--grid:#e8ecf1;
--zero:#b4bfcc;--link:#1d4ed8;--mark:#b42318;--warn:#fff4e0;--bar:#2563eb;
--s0:#2563eb;--s1:#d9540b;--s2:#0a7f5f;--s3:#a21caf;--s4:#8a6a00;--s5:#0e7490;--s6:#be123c;--s7:#475569}
@media (prefers-color-scheme:dark){:root{--bg:#0e1319;--card:#161d26;--ink:#e5ebf3;--soft:#a2b0c2;--edge:#2a3543;
--grid:#232d39;--zero:#4b5a6c;--link:#8ab4ff;--mark:#ff8f85;--warn:#33270f;--bar:#5b9bff;
--s0:#6ea8ff;--s1:#ff9f5c;--s2:#4fd1a5;--s3:#e58cf0;--s4:#e3c04b;--s5:#55cfe6;--s6:#ff8fa3;--s7:#b6c2d1}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main,footer{max-width:86rem;margin:auto;padding:0 1.5rem}
header{padding-top:2rem}
h1{font-size:1.9rem;line-height:1.2;margin:0;letter-spacing:-.015em}
h2{font-size:1.3rem;margin:2.25rem 0 .75rem;letter-spacing:-.01em}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.875em}
.facts{color:var(--soft);margin:.4rem 0 0}.facts span{margin:0 .5rem}
nav{display:flex;flex-wrap:wrap;gap:.35rem 1.1rem;margin:1rem 0 1.5rem;padding-bottom:.9rem;
border-bottom:1px solid var(--edge)}
a{color:var(--link);text-decoration:none}a:hover,a:focus-visible{text-decoration:underline}
:focus-visible{outline:2px solid var(--link);outline-offset:2px;border-radius:3px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,12rem),1fr));gap:1rem;margin:0}
.tile,figure,.card{background:var(--card);border:1px solid var(--edge);border-radius:10px}
.tile{padding:.8rem 1rem}
.tile dt{font-size:.875rem;color:var(--soft)}.tile dt code{display:block;font-size:.75rem}
.tile dd{margin:.2rem 0 0;line-height:1.3}.tile b{font-size:1.65rem;font-weight:650;letter-spacing:-.02em}
.tile small{color:var(--soft);font-size:.875rem}.tile span{display:block;color:var(--soft);font-size:.875rem}
.hint{color:var(--soft);font-size:.8125rem;margin:.5rem 0 0}
.note{background:var(--warn);border-radius:10px;padding:.75rem 1rem;margin:0 0 1rem}.note p{margin:0}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,25rem),1fr));gap:1rem;align-items:start}
figure{margin:0;padding:1rem 1rem .75rem;min-width:0}
figcaption{min-height:3rem;line-height:1.35}figcaption b{display:block;font-size:1.0625rem}
figcaption span{color:var(--soft);font-size:.875rem}
svg.plot{display:block;width:100%;height:auto;margin-top:.4rem}
svg text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--soft);
font-variant-numeric:tabular-nums}
.end{text-anchor:end}.mid{text-anchor:middle}
svg .grid{stroke:var(--grid);fill:none;display:inline}svg .zero{stroke:var(--zero)}
.line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.raw{stroke-width:1;opacity:.42}.band{fill:currentColor;opacity:.14;stroke:none}
svg circle{fill:currentColor}
path.level{stroke:var(--mark);stroke-width:1.5;stroke-dasharray:5 4;fill:none}
svg text.level{fill:var(--mark);text-anchor:end;font-weight:600}
.bar{fill:var(--bar)}
.s0{color:var(--s0)}.s1{color:var(--s1)}.s2{color:var(--s2)}.s3{color:var(--s3)}.s4{color:var(--s4)}.s5{color:var(--s5)}
.s6{color:var(--s6)}.s7{color:var(--s7)}
.z>rect{fill:transparent}.z>g{visibility:hidden;pointer-events:none}.z:hover>g{visibility:visible}
.cross{stroke:var(--zero)}.box{fill:var(--card);stroke:var(--edge)}.z text{fill:var(--ink)}
table{border-collapse:collapse;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.3rem .5rem;font-weight:400;vertical-align:top}
th:first-child,td:first-child{text-align:left;padding-left:0}th:last-child,td:last-child{padding-right:0}
thead th{color:var(--soft);font-size:.8125rem}tbody tr{border-top:1px solid var(--grid)}
.legend{margin-top:.5rem;font-size:.8125rem}.legend th:first-child{overflow-wrap:break-word}
.legend td,.legend thead th{white-space:nowrap}
i{display:inline-block;width:.9rem;height:.25rem;border-radius:2px;background:currentColor;margin-right:.45rem;
vertical-align:middle}
details{margin-top:.5rem;font-size:.875rem}summary{cursor:pointer;color:var(--link);padding:.2rem 0}
.scroll{overflow-x:auto}
.card{padding:1rem 1.25rem}.card p{margin:0 0 .75rem}
.numbers td{white-space:nowrap}.numbers tbody th{min-width:7rem}.numbers b{font-weight:650}
.whisker{width:13rem;height:1rem;vertical-align:middle}
.ends{display:inline-flex;justify-content:space-between;width:12.3rem;margin-right:.35rem}
.files td,.files th{text-align:left}.wrap{display:block;min-width:16rem;overflow-wrap:anywhere}
.pairs{display:flex;flex-wrap:wrap;gap:.25rem 1.5rem;margin:.75rem 0 0}.pairs dt{color:var(--soft);font-size:.8125rem}
.pairs dd{margin:0;font-weight:650}
.samples{table-layout:fixed}.samples td,.samples th{text-align:left;padding:.75rem .75rem .75rem 0}
.samples td.text{overflow-wrap:anywhere;font-size:.9375rem}.samples td.text>div{white-space:pre-wrap}
.samples p{margin:0 0 .4rem}.samples th[scope=col]{padding-bottom:.3rem}
.role{color:var(--soft);font-size:.8125rem}.empty{color:var(--soft)}
.long{max-height:18rem;overflow-y:auto}
.chip{display:inline-block;margin-top:.5rem;padding:.05rem .55rem;border:1px solid var(--edge);border-radius:1rem;
font-size:.8125rem;color:var(--soft)}
pre{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:1rem;overflow-x:auto;margin:0}
footer{color:var(--soft);font-size:.8125rem;padding-top:2rem;padding-bottom:2rem}
@media (min-width:60rem){figure:only-child{grid-column:1/-1;display:grid;column-gap:2.5rem;
grid-template:auto auto auto 1fr/minmax(0,36rem) minmax(0,1fr)}figure:only-child>:not(svg){grid-column:2}
figure:only-child>svg{grid-column:1;grid-row:1/6}}
@media (max-width:44rem){header,main,footer{padding-left:1rem;padding-right:1rem}header{padding-top:1.25rem}
h1{font-size:1.5rem}figcaption{min-height:0}svg text{font-size:14.5px}.z text{font-size:12px}
figure{padding:.85rem .75rem .6rem}
.tiles{grid-template-columns:repeat(2,minmax(0,1fr));gap:.6rem}.tile{padding:.65rem .75rem}.tile b{font-size:1.35rem}
.samples,.samples tbody,.samples tr,.samples td{display:block}.samples tr{padding:.5rem 0}
.samples thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.samples td,.samples td:last-child{padding:.35rem 0}
.samples td::before{content:attr(data-label);display:block;color:var(--soft);font-size:.8125rem}
.card{padding:.85rem .75rem}th,td{padding:.3rem}.legend code{font-size:.8rem}
.numbers{font-size:.8125rem}.whisker,.ends{display:none}}
@media print{body{background:#fff}figure,.tile{break-inside:avoid}}
"""
