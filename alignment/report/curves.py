"""A run's metrics as figures: which of them share a plot, and what is told beside it."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from html import escape
from itertools import count
from typing import Any

from alignment.report.folder import Found, finite
from alignment.report.plots import Plot, Series, limits, line_plot, names_of, series, shown, trimmed
from alignment.report.tables import breaking, tabled

MOST_ROWS = 25
"""Rows of a plot's table."""

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


def curves(found: Found) -> Iterator[tuple[str, str]]:
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
            elif (number := finite(value)) is not None:
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
        f'<tr><th scope="row"><i class="s{n % 8}"></i><code>{breaking(one.name)}</code></th>'
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
    return notes + [f"The {name} of {trimmed(shown(v))} is far above the plot." for name, v in far]


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
    return f"<details><summary>Values as a table</summary>{tabled(heads, rows)}</details>"
