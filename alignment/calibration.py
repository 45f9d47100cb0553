"""How far the chances that a model gives can be trusted, and how far a measured share can."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean
from typing import Any

SURE = 0.95
"""The share of intervals that hold the true value."""
SHARPEST, FLATTEST = 0.01, 100.0
"""The temperatures between which the best one is looked for."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value that was measured on `n` things, and between what its true one lies at 95 %."""

    value: float
    low: float
    high: float
    n: int

    def plain(self) -> dict[str, Any]:
        """It as JSON has it."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Bin:
    """Predictions whose confidence is in low..high: how many, their mean confidence, the share that was right."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def wilson(right: int, n: int) -> Interval:
    """The share right / n with Wilson's score interval (1927), which is sound for few and for extreme shares too.

    Raises ValueError for none.
    """
    if n < 1:
        raise ValueError("a share of nothing has no interval")
    z = NormalDist().inv_cdf((1 + SURE) / 2)
    share, room = right / n, z * z / n
    middle = (share + room / 2) / (1 + room)
    half = z / (1 + room) * math.sqrt(share * (1 - share) / n + room / (4 * n))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half), n)


def bootstrap(
    values: Sequence[float], statistic: Callable[[Sequence[float]], float] = fmean, rounds: int = 1000, seed: int = 0
) -> Interval:
    """A statistic of the values with its percentile interval over `rounds` draws with replacement (Efron 1979).

    For a difference of two measures give their difference for each thing. Raises ValueError for no values.
    """
    if not values:
        raise ValueError("no values have no interval")
    draw = random.Random(seed)
    found = sorted(statistic(draw.choices(values, k=len(values))) for _ in range(rounds))
    outside = (1 - SURE) / 2
    low, high = found[int(outside * rounds)], found[min(rounds - 1, int((1 - outside) * rounds))]
    return Interval(statistic(values), low, high, len(values))


def surprise(leads: Sequence[float], temperature: float = 1.0) -> float:
    """The mean of -ln sigmoid(lead / temperature), nats: what it costs to learn that the one in the lead was right."""
    return fmean(max(-x / temperature, 0.0) + math.log1p(math.exp(-abs(x / temperature))) for x in leads)


def temperature(leads: Sequence[float]) -> float:
    """The temperature at which sigmoid(lead / temperature) fits best (Guo et al. 2017, arXiv:1706.04599); 1 for none.

    leads: of what was right over what was wrong. The surprise is convex in 1 / temperature, so halving finds it: its
    slope there is the mean of -lead * sigmoid(-lead / temperature).
    """
    if not leads:
        return 1.0
    low, high = 1 / FLATTEST, 1 / SHARPEST
    for _ in range(60):
        middle = math.sqrt(low * high)
        slope = fmean(-x * _sigmoid(-x * middle) for x in leads)
        low, high = (middle, high) if slope < 0 else (low, middle)
    return 1 / math.sqrt(low * high)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def predictions(leads: Sequence[float], temperature: float) -> tuple[list[float], list[bool]]:
    """(confidence in 0.5..1 of the predicted winner, whether it was right) of each pair with this lead."""
    return [_sigmoid(abs(x) / temperature) for x in leads], [x > 0 for x in leads]


def reliability(
    confidences: Sequence[float], right: Sequence[bool], bins: int = 10, low: float = 0.5, high: float = 1.0
) -> list[Bin]:
    """The bins of equal width between low and high that have any predictions, from low to high."""
    width = (high - low) / bins
    members: list[list[int]] = [[] for _ in range(bins)]
    for i, confidence in enumerate(confidences):
        members[min(max(int((confidence - low) / width), 0), bins - 1)].append(i)
    return [
        Bin(
            round(low + k * width, 6), round(low + (k + 1) * width, 6), len(some),
            fmean(confidences[i] for i in some), fmean(right[i] for i in some),
        )
        for k, some in enumerate(members) if some
    ]  # fmt: skip


def ece(bins: Sequence[Bin]) -> float:
    """The expected calibration error: |accuracy - confidence|, as a mean over predictions; 0 for none."""
    total = sum(one.count for one in bins)
    return sum(one.count * abs(one.accuracy - one.confidence) for one in bins) / max(total, 1)


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """The chance that a positive scores higher than a negative, a tie being half; 0.5 where one kind is missing."""
    ups, downs = sum(positive), len(positive) - sum(positive)
    if not ups or not downs:
        return 0.5
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    ranks, at = 0.0, 0
    while at < len(order):
        end = at
        while end < len(order) and scores[order[end]] == scores[order[at]]:
            end += 1
        ranks += (at + 1 + end) / 2 * sum(positive[i] for i in order[at:end])  # ranks at+1..end, shared by equals
        at = end
    return (ranks - ups * (ups + 1) / 2) / (ups * downs)


def plain(bins: Sequence[Bin], temperature: float) -> Mapping[str, Any]:
    """A calibration as the report reads it."""
    return {"bins": [asdict(one) for one in bins], "ece": ece(bins), "temperature": temperature}
