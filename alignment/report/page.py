"""The page: its head, the figures at its top, its sections, its style."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from alignment.report.curves import curves
from alignment.report.folder import Found, finite, read
from alignment.report.plots import shown
from alignment.report.tables import calibration, data, evaluation, samples

NAME = "report.html"

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
    html = page(read(folder), title)
    path = folder / NAME
    new = folder / f"{NAME}.new"
    new.write_text(html, encoding="utf-8", errors="replace")
    new.replace(path)
    return path


def page(found: Found, title: str) -> str:
    """The whole page as HTML."""
    rows = found.metrics
    parts = [
        ("results", "Results", evaluation(found.evaluation)),
        ("calibration", "Calibration", calibration(found.calibration)),
        *((name.lower(), name, inner) for name, inner in curves(found)),
        ("samples", "Samples", samples(found.samples)),
        ("data", "Data", data(found.data)),
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
    times = [t for row in rows if (t := finite(row.get("time"))) is not None]
    if rows:
        facts.append(f"{rows[-1]['step']:,} updates")
    if times:
        began = datetime.fromtimestamp(times[0], UTC)
        facts.append(f'<time datetime="{began.isoformat(timespec="seconds")}">{began:%d %B %Y, %H:%M} UTC</time>')
    if len(times) > 1:
        facts.append(_lasted(times[-1] - times[0]))
    tokens = sum(n for row in rows if (n := finite(row.get("tokens"))) is not None)
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
        values = [v for row in rows if (v := finite(row.get(name))) is not None]
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
