"""What a run came to as tables: results, calibration, samples, the data that it learned from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from alignment.report.folder import finite
from alignment.report.plots import Scale, reliability_plot, shown

MOST_SAMPLES = 24
"""Samples that are shown."""
LONG = 700
"""Characters of a text beyond which it scrolls in its cell."""


def breaking(name: str) -> str:
    """A metric's name that may go on in the next line after a slash."""
    return escape(name).replace("/", "/<wbr>")


def tabled(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    """A table that scrolls sideways by itself; the cells are HTML, the first of each row is its head."""
    top = "".join(f'<th scope="col">{one}</th>' for one in heads)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{one}</td>" for one in row[1:])}</tr>' for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def evaluation(found: object) -> str:
    """The measures with their intervals, drawn where they are shares."""
    rows = []
    for name, fields in _measures(found):
        value, low, high, n = (finite(fields.get(key)) for key in ("value", "low", "high", "n"))
        if value is None:
            continue
        around = f"{shown(low)} to {shown(high)}" if low is not None and high is not None else "–"
        count = f"{n:,.0f}" if n is not None else "–"
        rows.append([breaking(name), f"<b>{shown(value)}</b>", around, count, _whisker(value, low, high)])
    heads = ["measure", "value", "interval", "n", '<span class="ends"><span>0</span><span>1</span></span>']
    if not any(row[4] for row in rows):
        heads, rows = heads[:4], [row[:4] for row in rows]
    return f'<div class="card">{tabled(heads, rows)}</div>' if rows else ""


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


def calibration(found: object) -> str:
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
    numbers = [{key: finite(row.get(key)) for key in keys} for row in rows]
    return [{key: v for key, v in row.items() if v is not None} for row in numbers if None not in row.values()]


def _reliable(name: str, one: Mapping[str, Any]) -> str:
    bins = _bins(one)
    figures = [(key, number) for key, value in one.items() if (number := finite(value)) is not None]
    told = "".join(f"<div><dt>{escape(key)}</dt><dd>{shown(value)}</dd></div>" for key, value in figures)
    heads = ["confidence", "mean confidence", "accuracy", "pairs"]
    rows = [[f"{shown(row['low'])} to {shown(row['high'])}", shown(row["confidence"]), shown(row["accuracy"]),
             f"{row['count']:,.0f}"] for row in bins]  # fmt: skip
    title = f"Reliability{f' of {name}' if name else ''}"
    return (
        f"<figure><figcaption><b>{escape(title)}</b><span>how often the model is right when it is so sure; on the "
        f"dashed line it is as sure as it should be, darker bars have more pairs</span></figcaption>"
        f'{reliability_plot(bins, title)}<dl class="pairs">{told}</dl>'
        f"<details open><summary>Values as a table</summary>{tabled(heads, rows)}</details></figure>"
    )


# --- texts


def samples(rows: Sequence[Mapping[str, Any]]) -> str:
    """The samples of the last step, then some of those before."""
    if not rows:
        return ""
    steps = [step for row in rows if (step := finite(row.get("step"))) is not None]
    last = max(steps, default=None)
    now = [row for row in rows if finite(row.get("step")) == last]
    before = [row for row in reversed(rows) if finite(row.get("step")) != last]
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
    reward = finite(row.get(f"reward_{key}"))
    chip = f'<span class="chip">reward {shown(reward)}</span>' if reward is not None else ""
    if isinstance(value, (str, list)):
        text = _said(value)
        long = ' class="long" tabindex="0"' if len(text) > LONG else ""
        inner = f"<div{long}>{text}</div>{chip}"
    else:
        inner = (f"{value:,.0f}" if key == "update" else shown(finite(value))) if finite(value) is not None else "–"
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


def data(found: object) -> str:
    """The files that the model learned from, with their fingerprints, and what of them is the same."""
    if isinstance(found, dict) and isinstance(found.get("files"), list):
        shared = found.get("overlaps")
        return data(found["files"]) + (_overlaps(shared) if isinstance(shared, list) else "")
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
    return f'<div class="card">{tabled(heads, table, "files")}</div>' if rows else ""


def _overlaps(found: Sequence[Any]) -> str:
    """What prompts two sets have in common; a held-out one that is trained on says less of new ones."""
    heads = ["sets", "the same prompts", "nearly the same", "where, in the second"]
    rows = [
        [f"{escape(str(one.get('first')))} and {escape(str(one.get('second')))}",
         *(_plain(one.get(key)) for key in ("same", "nearly", "where"))]
        for one in found if isinstance(one, dict)
    ]  # fmt: skip
    return f'<h3>Overlaps</h3><div class="card">{tabled(heads, rows, "files")}</div>' if rows else ""


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
