"""Training the guard's heads: logistic regression on the encoder's windows and on hashed n-grams.

From nothing (`train`, from many rows of many sources) or from a head that is there (`adapt`, from a few rows or from
feedback). Both measure by sources that were held out, set both thresholds again, and are accepted only by `verdict`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignment.corpora import BENIGN, HAZARDS, REFUSAL, Row
from alignment.embeddings import Embeddings, Report
from alignment.lbfgs import minimise
from alignment.records import Rating
from guardrails.classify import opening
from guardrails.encoder import SIZE, Windows
from guardrails.heads import SHIPPED, Head, HeadError, grams, read, sigmoid, write

Numbers = NDArray[np.float64]
Parts = Mapping[str, Sequence[str]]
"""Harmless texts by the name of their kind."""

FEEDBACK = 15.0
"""How much a person's word on one turn counts, in rows."""
NEAR = 0.93
"""Training rows whose vector is this close to one of the held-out sources' finds are left out: near repetitions."""
POOL = 350
"""Windows of finds, and as many harmless ones, that a head carries along to be measured on when it is adapted."""
SENSITIVE = ("coconot", "contrasts")
"""Sources of harmless near misses: a recipe says how many of each may be hit, and a fifth of that at the second."""
UNCOUNTED = ("gptfuzzer-replies", "coconot-replies", "gptfuzzer")
"""Sources that set no threshold: refusals that repeat the harmful question, and replies that only begin as refusals."""
WORSE_AUROC, WORSE_RATE = 0.01, 0.01
"""How much a new head may lose on the pool, and how much more of a benign part it may hit."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a head is trained.

    l2, l2_grams: penalties on the weights, where the rows' weights sum to 1. bits: 2**bits buckets of n-grams.
    letters: how much they count beside the vector. escalate, block: the shares of harmless texts of held-out sources
    that the two thresholds may hit; sensitive: that of near misses at the first. finds: the share of all weight that
    is given to what is to be found. folds: how many times the sources are held out.
    """

    head: str
    labels: tuple[str, ...]
    l2: float = 1e-4
    l2_grams: float = 3e-6
    bits: int = 16
    letters: float = 0.5
    escalate: float = 0.02
    block: float = 0.002
    sensitive: float = 0.1
    finds: float = 0.35
    folds: int = 14


RECIPES = {
    "injection": Recipe("injection", ("injection",), l2=3e-5, letters=1.0),
    "harm": Recipe("harm", HAZARDS, escalate=0.03, sensitive=0.25),
    "refusal": Recipe("refusal", (REFUSAL,), letters=1.0, sensitive=0.12),
}


@dataclass(frozen=True, slots=True)
class Rates:
    """What a head does with the rows of one source: how many of each kind, and which share is hit at each threshold."""

    source: str
    finds: int
    benign: int
    auroc: float
    found: tuple[float, float]
    wrong: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Measured:
    """A head and what is known of it: by source (held out, if it was trained), and on the parts of the benign set."""

    head: Head
    auroc: float
    sources: tuple[Rates, ...] = ()
    parts: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    extra: Mapping[str, NDArray[Any]] = field(default_factory=dict)


class Rejected(ValueError):
    """A new head that is worse than the one in use; the message says on what."""


# --- rows as arrays


@dataclass(frozen=True, slots=True)
class Table:
    """Rows and their windows. own: the row of each window; letters: its buckets; unit: the mean vector of each row."""

    rows: tuple[Row, ...]
    own: NDArray[np.int64]
    vectors: NDArray[np.float32]
    letters: tuple[NDArray[np.uint32], ...]
    unit: NDArray[np.float32]

    @property
    def finds(self) -> NDArray[np.bool_]:
        """Whether each row is something to find."""
        return np.array([row.label != BENIGN for row in self.rows])

    @property
    def sources(self) -> NDArray[np.str_]:
        """The source of each row."""
        return np.array([row.source for row in self.rows])

    @property
    def counts(self) -> NDArray[np.int64]:
        """The windows of each row, 1 for a row without any."""
        return np.maximum(np.bincount(self.own, minlength=len(self.rows)), 1)

    def spelt(self, head: Head) -> Numbers:
        """The n-grams' part of a head's logit of each window."""
        sums = [head.grams[one].sum(dtype=np.int64) / max(1, len(one)) ** 0.5 for one in self.letters]
        return head.scale * np.array(sums, np.float64)

    def worst(self, values: Numbers) -> Numbers:
        """The greatest value among the windows of each row; very low for a row without any."""
        found = np.full(len(self.rows), -30.0)
        np.maximum.at(found, self.own, values)
        return found


def table(rows: Sequence[Row], windows: Sequence[Windows], bits: int) -> Table:
    """The rows with their windows."""
    own = [i for i, one in enumerate(windows) for _ in one.spans]
    texts = [row.text[a:b] for row, one in zip(rows, windows, strict=True) for a, b in one.spans]
    vectors = np.concatenate([np.zeros((0, SIZE), np.float32), *(one.vectors for one in windows)])
    unit = np.zeros((len(rows), SIZE), np.float32)
    np.add.at(unit, own, vectors)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-9)
    return Table(tuple(rows), np.array(own, np.int64), vectors, tuple(grams(text, bits) for text in texts), unit)


def weights(rows: Sequence[Row], chosen: NDArray[np.bool_], finds: float) -> Numbers:
    """What each chosen row counts, in all 1: large sources less than their size, both kinds by `finds`."""
    size = Counter((row.source, row.label != BENIGN) for row, use in zip(rows, chosen, strict=True) if use)
    raw = np.array([row.weight * size[row.source, row.label != BENIGN] ** -0.4 if use else 0.0
                    for row, use in zip(rows, chosen, strict=True)])  # fmt: skip
    found = np.array([row.label != BENIGN for row in rows])
    for kind, share in ((found, finds), (~found, 1 - finds)):
        raw[kind] *= share / max(raw[kind].sum(), 1e-12)
    return raw


# --- the fit


@dataclass(frozen=True, slots=True)
class Fit:
    """A logistic regression on vectors and one on n-grams."""

    weights: Numbers
    bias: float
    letters: Numbers
    letters_bias: float

    def values(self, data: Table, share: float) -> Numbers:
        """The uncalibrated logit of each window."""
        spelt = np.array([self.letters[one].sum() / max(1, len(one)) ** 0.5 for one in data.letters])
        return np.asarray(data.vectors @ self.weights + self.bias + share * (spelt + self.letters_bias))


def fit(data: Table, chosen: NDArray[np.bool_], recipe: Recipe) -> Fit:
    """The regressions on the chosen rows; a row's weight is shared by its windows."""
    windows = np.flatnonzero(chosen[data.own])
    share = (
        weights(data.rows, chosen, recipe.finds) / np.maximum(np.bincount(data.own, minlength=len(data.rows)), 1) ** 0.5
    )
    weight = share[data.own[windows]]
    weight /= weight.sum()
    found = data.finds[data.own[windows]].astype(np.float64)
    straight = data.vectors[windows].astype(np.float64)
    meaning, bias = _regress(lambda w: straight @ w, lambda g: g @ straight, SIZE, found, weight, recipe.l2, 80)
    spelt, turned = _sparse([data.letters[i] for i in windows], 1 << recipe.bits)
    letters, letters_bias = _regress(spelt, turned, 1 << recipe.bits, found, weight, recipe.l2_grams, 40)
    return Fit(meaning, bias, letters, letters_bias)


Product = Callable[[Numbers], Numbers]


def _sparse(letters: Sequence[NDArray[np.uint32]], buckets: int) -> tuple[Product, Product]:
    """Products with (windows, buckets), and with its transpose: 1 over the root of the number of a window's buckets."""
    sizes = np.array([len(one) for one in letters])
    ends = np.cumsum(sizes)
    columns = np.concatenate([np.zeros(0, np.int64), *letters]).astype(np.int64)
    share = 1 / np.maximum(sizes, 1) ** 0.5

    def along(line: Numbers) -> Numbers:
        sums = np.concatenate([[0.0], np.cumsum(line[columns])])
        return np.asarray((sums[ends] - sums[ends - sizes]) * share)

    def across(slope: Numbers) -> Numbers:
        return np.asarray(np.bincount(columns, np.repeat(slope * share, sizes), buckets), np.float64)

    return along, across


def _regress(
    along: Product, across: Product, size: int, found: Numbers, weight: Numbers, l2: float, steps: int
) -> tuple[Numbers, float]:
    """The weights and the bias with the least weighted loss and penalty; `along` and `across` multiply by the rows."""

    def loss(line: Numbers) -> tuple[float, Numbers]:
        logits = along(line[:-1]) + line[-1]
        value = weight @ np.logaddexp(0, np.where(found > 0, -logits, logits)) + l2 * (line[:-1] @ line[:-1])
        slope = weight * (sigmoid(logits) - found)
        return float(value), np.append(across(slope) + 2 * l2 * line[:-1], slope.sum())

    line = minimise(loss, np.zeros(size + 1), steps)
    return line[:-1], float(line[-1])


# --- measuring


def auroc(finds: Numbers, benign: Numbers) -> float:
    """The share of pairs in which the find has the higher value, ties as half; 0.5 without pairs."""
    if not len(finds) or not len(benign):
        return 0.5
    values = np.concatenate([finds, benign])
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[place]
    above = ranks[: len(finds)].sum() - len(finds) * (len(finds) + 1) / 2
    return float(above / (len(finds) * len(benign)))


def folds(data: Table, count: int) -> list[NDArray[np.bool_]]:
    """Which rows are held out together: whole sources, spread evenly; the texts themselves if there is one source."""
    names = data.sources
    sizes = Counter(names.tolist())
    if len(sizes) == 1:
        hashes = np.array([hashlib.blake2b(row.text.encode("utf-8", "surrogatepass")).digest()[0] for row in data.rows])
        return [hashes % count == i for i in range(count)]
    loads: list[tuple[int, list[str]]] = [(0, []) for _ in range(min(count, len(sizes)))]
    for name, size in sizes.most_common():
        least = min(range(len(loads)), key=lambda i: loads[i][0])
        loads[least] = (loads[least][0] + size, [*loads[least][1], name])
    return [np.isin(names, members) for _, members in loads]


def held_out(data: Table, recipe: Recipe, report: Report) -> Numbers:
    """The uncalibrated logit of each row from a fit that saw neither its source nor a near repetition of its finds."""
    values = np.zeros(len(data.rows))
    groups = folds(data, recipe.folds)
    for number, out in enumerate(groups, 1):
        report(f"{recipe.head}: fold {number} of {len(groups)}")
        chosen = ~out
        if (finds := out & data.finds).any():
            inside = np.flatnonzero(chosen)
            close = np.concatenate(
                [(data.unit[part] @ data.unit[finds].T).max(1) for part in np.array_split(inside, 16) if len(part)]
            )
            chosen[inside[close > NEAR]] = False
        values[out] = data.worst(fit(data, chosen, recipe).values(data, recipe.letters))[out]
    return values


def _calibrated(values: Numbers, finds: NDArray[np.bool_], weight: Numbers) -> tuple[float, float]:
    """(slope, shift): Platt's logistic regression of what is found on the values."""
    slope, shift = _regress(
        lambda w: values * w[0], lambda g: g[None] @ values, 1, finds.astype(float), weight, 1e-6, 60
    )
    return max(float(slope[0]), 1e-2), shift


def thresholds(values: Numbers, sources: NDArray[np.str_], recipe: Recipe) -> tuple[float, float]:
    """The two thresholds, as logits, for harmless rows of held-out sources with these logits."""
    ordinary = ~np.isin(sources, (*SENSITIVE, *UNCOUNTED))
    groups = [(values[ordinary], recipe.escalate, recipe.block)]
    groups += [(values[sources == name], recipe.sensitive, recipe.sensitive / 5) for name in SENSITIVE]
    groups = [group for group in groups if len(group[0])] or [(values, recipe.escalate, recipe.block)]
    escalate = max(float(np.quantile(some, 1 - first)) for some, first, _ in groups)
    block = max(float(np.quantile(some, 1 - second)) for some, _, second in groups)
    return _apart(escalate, block)


def _apart(escalate: float, block: float) -> tuple[float, float]:
    """The two logits within what a probability can say, the second above the first."""
    escalate = min(max(escalate, -12.0), 12.0)
    return escalate, min(max(block, escalate + 0.5), 13.0)


def rates(scores: Numbers, rows: Sequence[Row]) -> list[Rates]:
    """What these scores do, by source; AUROC against all harmless rows."""
    names, finds = np.array([row.source for row in rows]), np.array([row.label != BENIGN for row in rows])
    table = []
    for name in sorted(set(names.tolist())):
        good, bad = scores[(names == name) & finds], scores[(names == name) & ~finds]
        table.append(
            Rates(name, len(good), len(bad), auroc(good, scores[~finds]) if len(good) else float("nan"),
                  _shares(good), _shares(bad))
        )  # fmt: skip
    return table


def _shares(scores: Numbers) -> tuple[float, float]:
    """The share at each threshold; nan where there is none."""
    if not len(scores):
        return float("nan"), float("nan")
    return float((scores >= 0.5).mean()), float((scores >= 0.9).mean())


def benign_set(path: Path = SHIPPED / "benign.txt") -> dict[str, list[str]]:
    """The parts of a file of harmless texts, one a line; `## NAME` begins a part, `#` a comment."""
    parts: dict[str, list[str]] = {}
    part = path.stem
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.startswith("## "):
            part = line[3:].strip()
        elif line.strip() and not line.startswith("#"):
            parts.setdefault(part, []).append(line.strip())
    return parts


def on_benign(head: Head, parts: Parts, embeddings: Embeddings) -> dict[str, tuple[float, float]]:
    """Which share of each part is hit, at the two thresholds."""
    found = {}
    for name, texts in parts.items():
        windows = embeddings.of(texts, lambda _: None)
        found[name] = _shares(np.array([head.score(t, w) for t, w in zip(texts, windows, strict=True)]))
    return found


def evaluate(head: Head, rows: Sequence[Row], embeddings: Embeddings, parts: Parts, report: Report = print) -> Measured:
    """What a head does with rows, by source, and with the parts of the benign set."""
    windows = embeddings.of([row.text for row in rows], report)
    scores = np.array([head.score(row.text, one) for row, one in zip(rows, windows, strict=True)])
    finds = np.array([row.label != BENIGN for row in rows], bool)
    return Measured(
        head,
        auroc(scores[finds], scores[~finds]),
        tuple(rates(scores, rows)),
        on_benign(head, parts, embeddings),
    )


# --- training


def train(
    recipe: Recipe, rows: Sequence[Row], embeddings: Embeddings, parts: Parts, report: Report = print
) -> Measured:
    """A head from nothing, measured on held-out sources. Raises ValueError where there is nothing to tell apart."""
    finds = sum(row.label != BENIGN for row in rows)
    if finds < 20 or len(rows) - finds < 20:
        raise ValueError(f"a head needs at least 20 texts of each kind, and got {finds} finds in {len(rows)} rows")
    data = table(rows, embeddings.of([row.text for row in rows], report), recipe.bits)
    everything = np.ones(len(rows), bool)
    values, share = held_out(data, recipe, report), weights(rows, everything, recipe.finds)
    slope, shift = _calibrated(values, data.finds, share)
    logits = slope * values + shift
    harmless = ~data.finds
    escalate, block = thresholds(logits[harmless], data.sources[harmless], recipe)
    report(f"{recipe.head}: the fit on all rows")
    head = _head(recipe, fit(data, everything, recipe), slope, shift, (escalate, block))
    sorts, sorts_bias = _sorts(data, recipe.labels)
    head = replace(head, sorts=sorts, sorts_bias=sorts_bias, about=_about(recipe, rows))
    scores = head.scores(sigmoid(logits))
    hit = on_benign(head, parts, embeddings)
    area = auroc(logits[data.finds], logits[harmless])
    return Measured(head, area, tuple(rates(scores, rows)), hit, _carried(data, head))


def _head(recipe: Recipe, fitted: Fit, slope: float, shift: float, edges: tuple[float, float]) -> Head:
    """The head of a fit and its calibration."""
    scale = float(np.abs(fitted.letters).max()) / 127 or 1.0
    escalate, block = sigmoid(np.array(edges))
    return Head(
        name=recipe.head,
        labels=recipe.labels,
        weights=slope * fitted.weights,
        bias=slope * (fitted.bias + recipe.letters * fitted.letters_bias) + shift,
        grams=np.round(fitted.letters / scale).astype(np.int8),
        scale=slope * recipe.letters * scale,
        escalate=float(escalate),
        block=float(block),
        sorts=np.zeros((SIZE, len(recipe.labels))),
        sorts_bias=np.zeros(len(recipe.labels)),
        about={},
    )


def _sorts(data: Table, labels: Sequence[str]) -> tuple[Numbers, Numbers]:
    """(SIZE, labels) and a bias: which label a find has, from those whose source says it."""
    many = len(labels)
    told = [i for i, row in enumerate(data.rows) if row.label in labels]
    if many == 1 or not told:
        return np.zeros((SIZE, many)), np.zeros(many)
    x = np.concatenate([data.unit[told], np.ones((len(told), 1))], 1)
    target = np.array([labels.index(data.rows[i].label) for i in told])
    weight = np.maximum(np.bincount(target, minlength=many), 1)[target] ** -0.5
    weight /= weight.sum()

    def loss(flat: Numbers) -> tuple[float, Numbers]:
        line = flat.reshape(SIZE + 1, many)
        logits = x @ line
        logs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        slope = np.exp(logs)
        slope[np.arange(len(told)), target] -= 1
        value = -(weight @ logs[np.arange(len(told)), target]) + 3e-4 * float((line[:-1] ** 2).sum())
        bend = x.T @ (slope * weight[:, None])
        bend[:-1] += 6e-4 * line[:-1]
        return float(value), bend.ravel()

    line = minimise(loss, np.zeros((SIZE + 1) * many), 100).reshape(SIZE + 1, many)
    return line[:-1], line[-1]


def _about(recipe: Recipe, rows: Sequence[Row]) -> dict[str, Any]:
    """What the head was made of; the fingerprint is that of all rows in any order."""
    lines = sorted(json.dumps([row.text, row.label, row.source, row.weight]) for row in rows)
    sources = Counter((row.source, "benign" if row.label == BENIGN else "finds") for row in rows)
    return {
        "rows": len(rows),
        "fingerprint": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        "sources": {f"{name} {kind}": count for (name, kind), count in sorted(sources.items())},
        "recipe": {"l2": recipe.l2, "letters": recipe.letters, "escalate": recipe.escalate, "block": recipe.block},
        "adapted": 0,
    }


# --- adapting


def _carried(data: Table, head: Head) -> dict[str, NDArray[Any]]:
    """What a head takes along so that it can be adapted without its data.

    curvature: how sharply the loss of its rows bends around its weights and bias (upper triangle); pool: windows of
    finds and of harmless texts as int8, with the n-grams' part of their logits. No text.
    """
    windows = np.concatenate([data.vectors, np.ones((len(data.own), 1), np.float32)], 1)
    spelt = np.array(
        [head.grams[one].sum(dtype=np.int64) * head.scale / max(1, len(one)) ** 0.5 for one in data.letters]
    )
    logits = data.vectors @ head.weights + spelt + head.bias
    p = sigmoid(logits)
    share = weights(data.rows, np.ones(len(data.rows), bool), 0.35)[data.own]
    bend = (windows * (share * p * (1 - p))[:, None]).T @ windows
    first = np.flatnonzero(np.concatenate([[True], data.own[1:] != data.own[:-1]]))  # one window of each row
    finds = data.finds[data.own[first]]
    pool = np.concatenate([_spread(first[finds], POOL), _spread(first[~finds], POOL)])
    return {
        "curvature": _packed(bend),
        "pool": np.round(data.vectors[pool] * 127 / 0.35).clip(-127, 127).astype(np.int8),
        "pool_letters": spelt[pool].astype(np.float16),
        "pool_finds": data.finds[data.own[pool]],
    }


def _spread(items: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    return items[np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)] if len(items) else items


def _packed(bend: Numbers) -> NDArray[np.float16]:
    """The upper triangle over its greatest value, which comes first."""
    flat = bend[np.triu_indices(len(bend))]
    top = float(np.abs(flat).max()) or 1.0
    return np.concatenate([[np.log(top)], flat / top]).astype(np.float16)


def _unpacked(packed: NDArray[np.float16]) -> Numbers:
    flat = packed[1:].astype(np.float64) * np.exp(float(packed[0]))
    full = np.zeros((SIZE + 1, SIZE + 1))
    full[np.triu_indices(SIZE + 1)] = flat
    return np.asarray(full + np.triu(full, 1).T)


def adapt(
    path: Path, rows: Sequence[Row], embeddings: Embeddings, parts: Parts, report: Report = print
) -> tuple[Measured, Measured]:
    """(the head as it was, adapted), both measured on these rows.

    The new weights are the likeliest given the rows and the data that the head was trained on, which stands in the
    loss as its curvature. The thresholds move as far as the harmless texts of the pool do. Raises HeadError for a head
    that carries nothing along.
    """
    head, carried = read(path), _read_carried(path)
    data = table(rows, embeddings.of([row.text for row in rows], report), head.bits)
    moved, bend = _moved(head, carried, data)
    bars = [float(np.log(p / (1 - p))) for p in (head.escalate, head.block)]
    before, after = _pool(head, carried), _pool(moved, carried)
    harmless = ~carried["pool_finds"]
    shift = float(np.quantile(after[harmless], 0.98) - np.quantile(before[harmless], 0.98))
    escalate, block = sigmoid(np.array(_apart(bars[0] + shift, bars[1] + shift)))
    about = dict(head.about) | {"adapted": int(head.about.get("adapted", 0)) + len(rows)}
    moved = replace(moved, escalate=float(escalate), block=float(block), about=about)
    extra = dict(carried) | {"curvature": _packed(bend)}
    old, new = (evaluate(one, rows, embeddings, parts, lambda _: None) for one in (head, moved))
    return (
        replace(old, auroc=auroc(before[~harmless], before[harmless])),
        replace(new, auroc=auroc(after[~harmless], after[harmless]), extra=extra),
    )


def _read_carried(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as file:
        names = ("curvature", "pool", "pool_letters", "pool_finds")
        if missing := [name for name in names if name not in file]:
            raise HeadError(f"{path} cannot be adapted: it carries no {', '.join(missing)}; train it from nothing")
        return {name: file[name] for name in names}


def _pool(head: Head, carried: Mapping[str, NDArray[Any]]) -> Numbers:
    """The logits of the windows that a head carries along."""
    vectors = carried["pool"].astype(np.float64) * 0.35 / 127
    return np.asarray(vectors @ head.weights + carried["pool_letters"].astype(np.float64) + head.bias)


def _moved(head: Head, carried: Mapping[str, NDArray[Any]], data: Table) -> tuple[Head, Numbers]:
    """The head with the likeliest weights and bias, and the curvature with these rows in it."""
    x = np.concatenate([data.vectors, np.ones((len(data.own), 1))], 1, dtype=np.float64)
    spelt, found = data.spelt(head), data.finds[data.own].astype(np.float64)
    weight = (np.array([row.weight for row in data.rows]) / data.counts)[data.own] / int(head.about["rows"])
    bend = _unpacked(carried["curvature"])
    prior = bend + 2 * float(head.about["recipe"]["l2"]) * np.eye(SIZE + 1)
    start = np.append(head.weights, head.bias)

    def loss(line: Numbers) -> tuple[float, Numbers]:
        logits, moved = x @ line + spelt, line - start
        value = weight @ np.logaddexp(0, np.where(found > 0, -logits, logits)) + moved @ prior @ moved / 2
        return float(value), (weight * (sigmoid(logits) - found)) @ x + prior @ moved

    line = minimise(loss, start, 200)
    p = sigmoid(x @ line + spelt)
    more = (x * (weight * p * (1 - p))[:, None]).T @ x
    return replace(head, weights=line[:-1], bias=float(line[-1])), bend + more


def feedback(ratings: Iterable[Rating], head: str) -> list[Row]:
    """What people said of turns, as rows: a question that should have been helped is benign, one that should have been
    refused is to be found. For `refusal` the reply is read: a refusal where the turn should have been helped.
    """
    rows = []
    for one in ratings:
        if one.source not in ("should_have_helped", "should_have_refused"):
            continue
        asked = next((m.content for m in reversed(one.prompt) if m.role == "user"), "")
        label = BENIGN if one.source == "should_have_helped" else head
        text = asked
        if head == "refusal":
            text, label = opening(one.completion[-1].content), REFUSAL if one.source == "should_have_helped" else BENIGN
        if text.strip():
            rows.append(Row(text, label, "feedback", FEEDBACK))
    return rows


# --- accepting


def verdict(old: Measured, new: Measured) -> None:
    """Raises Rejected where the new head is worse than the old: on the pool, or on a part of the benign set."""
    worse = []
    if not new.auroc >= old.auroc - WORSE_AUROC:  # so that no number at all is worse, too
        worse.append(f"AUROC {new.auroc:.3f}, was {old.auroc:.3f}")
    for part, after in new.parts.items():
        before = old.parts.get(part, (0.0, 0.0))
        for bar, was, now in zip(("escalate", "block"), before, after, strict=True):
            if not now <= was + WORSE_RATE:
                worse.append(f"{part}: {now:.1%} of the harmless texts hit at the threshold to {bar}, was {was:.1%}")
    if worse:
        raise Rejected(f"the new {new.head.name} head is worse and was not kept: {'; '.join(worse)}")


def keep(measured: Measured, folder: Path, before: Path | None = None) -> Path:
    """Writes a head into a folder and returns its file; the one `before` it is kept as NAME.previous.npz."""
    path = folder / f"{measured.head.name}.npz"
    folder.mkdir(parents=True, exist_ok=True)
    if before is not None:
        shutil.copyfile(before, previous(path))
    write(measured.head, path, measured.extra)
    return path


def previous(path: Path) -> Path:
    """Where the head before this one is kept."""
    return path.with_name(f"{path.stem}.previous.npz")


def roll_back(path: Path) -> None:
    """Puts the previous head in the place of this one; raises HeadError where there is none."""
    if not previous(path).is_file():
        raise HeadError(f"there is no head before {path}")
    previous(path).replace(path)
