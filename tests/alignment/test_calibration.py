"""Intervals, temperatures and reliability, against what was worked out by hand."""

from __future__ import annotations

import math
import random

import pytest

from alignment.calibration import (
    Bin,
    auroc,
    bootstrap,
    ece,
    plain,
    predictions,
    reliability,
    surprise,
    temperature,
    wilson,
)  # fmt: skip


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [  # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_is_the_published_one(right: int, n: int, low: float, high: float) -> None:
    found = wilson(right, n)
    assert (found.value, found.n) == (right / n, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=6e-5)


def test_a_share_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])


def test_the_bootstrap_finds_the_normal_interval_of_a_mean() -> None:
    draw = random.Random(1)
    values = [draw.gauss(2, 1) for _ in range(400)]
    found = bootstrap(values)
    assert found.value == pytest.approx(sum(values) / 400)
    assert found.high - found.low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert bootstrap(values) == found  # same seed, same interval


def test_the_bootstrap_takes_any_statistic() -> None:
    found = bootstrap([0.0] * 10 + [1.0], max)
    assert (found.value, found.low, found.high) == (1.0, 0.0, 1.0)


def test_surprise_is_log_2_where_nothing_leads() -> None:
    assert surprise([0.0, 0.0]) == pytest.approx(math.log(2))
    assert surprise([1000.0]) == 0
    assert surprise([-1000.0], 2.0) == pytest.approx(500)


def test_the_temperature_undoes_overconfidence() -> None:
    # Three of four leads of 4 are right: sigmoid(4 / T) = 3 / 4, so T = 4 / ln 3.
    assert temperature([4.0, 4.0, 4.0, -4.0]) == pytest.approx(4 / math.log(3), rel=1e-6)
    assert temperature([0.1, 0.1, 0.1, -0.1]) == pytest.approx(0.1 / math.log(3), rel=1e-6)
    assert temperature([]) == 1


def test_the_temperature_of_leads_that_say_nothing_is_bounded() -> None:
    assert temperature([1.0, -1.0]) == pytest.approx(100)
    assert temperature([1.0, 2.0]) == pytest.approx(0.01)


def test_reliability_puts_each_prediction_into_its_bin() -> None:
    bins = reliability([0.5, 0.52, 0.97, 0.99, 1.0], [True, False, True, True, False])
    assert bins == [Bin(0.5, 0.55, 2, pytest.approx(0.51), 0.5), Bin(0.95, 1.0, 3, pytest.approx(0.986667), 2 / 3)]  # type: ignore[arg-type]
    # 2/5 * |0.5 - 0.51| + 3/5 * |0.66667 - 0.98667|
    assert ece(bins) == pytest.approx(0.4 * 0.01 + 0.6 * 0.32)
    assert ece([]) == 0


def test_chances_that_are_true_have_no_calibration_error() -> None:
    draw = random.Random(0)
    leads = [draw.gauss(0, 2) for _ in range(20_000)]
    signed = [abs(x) if draw.random() < 1 / (1 + math.exp(-abs(x))) else -abs(x) for x in leads]
    assert temperature(signed) == pytest.approx(1, abs=0.05)
    assert ece(reliability(*predictions(signed, 1.0))) < 0.01
    assert ece(reliability(*predictions(signed, 0.2))) > 0.1  # five times too sure


def test_auroc_counts_pairs_and_halves_ties() -> None:
    assert auroc([3, 2, 1], [True, False, False]) == 1
    assert auroc([1, 2, 3], [True, False, False]) == 0
    assert auroc([1, 1, 0], [True, False, False]) == 0.75
    assert auroc([1, 2], [True, True]) == 0.5


def test_a_calibration_is_plain_json() -> None:
    found = plain(reliability([0.62], [True]), 1.5)
    assert found == {
        "bins": [{"low": 0.6, "high": 0.65, "count": 1, "confidence": 0.62, "accuracy": 1.0}],
        "ece": pytest.approx(0.38),
        "temperature": 1.5,
    }
