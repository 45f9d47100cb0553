"""L-BFGS against points that can be computed by hand, and where it must stop."""

from __future__ import annotations

import numpy as np
import pytest

from alignment.lbfgs import minimise


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
def test_the_least_point_of_a_quadratic_is_found_however_stretched(scale: float) -> None:
    bend = np.array([[2.0, 0.3], [0.3, 1.0 * scale]])
    goal = np.array([3.0, -2.0])

    def loss(x):
        return float((x - goal) @ bend @ (x - goal) / 2), bend @ (x - goal)

    assert minimise(loss, np.zeros(2), 100) == pytest.approx(goal, abs=1e-5)


def test_a_logistic_regression_ends_where_its_slope_is_nought() -> None:
    chance = np.random.default_rng(0)
    x, y = chance.normal(size=(200, 5)), chance.random(200) < 0.4

    def loss(w):
        logits = x @ w
        value = np.logaddexp(0, np.where(y, -logits, logits)).mean() + 0.01 * w @ w
        return float(value), x.T @ (1 / (1 + np.exp(-logits)) - y) / 200 + 0.02 * w

    start = np.full(5, 4.0)
    found = minimise(loss, start, 100)
    assert np.abs(loss(found)[1]).max() < 1e-6
    assert loss(found)[0] < loss(start)[0]


def test_no_more_steps_than_allowed_and_none_uphill() -> None:
    seen: list[float] = []

    def loss(x):
        seen.append(float(x @ x))
        return float(x @ x), 2 * x

    assert minimise(loss, np.array([5.0]), 0).tolist() == [5.0]
    after = minimise(loss, np.array([5.0]), 1)
    assert abs(after[0]) < 5


def test_a_start_at_the_least_point_stays_there() -> None:
    assert minimise(lambda x: (float(x @ x), 2 * x), np.zeros(3), 10).tolist() == [0, 0, 0]


def test_a_loss_that_is_no_number_ends_the_search() -> None:
    assert np.isfinite(minimise(lambda x: (float("nan"), np.ones(1)), np.zeros(1), 10)).all()
