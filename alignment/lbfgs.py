"""L-BFGS for smooth convex losses, in numpy: what training a head needs of an optimiser (Nocedal and Wright, 7.4)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
MEMORY = 10
SUFFICIENT = 1e-4
"""The least share of the decrease that the slope promises (Armijo)."""


def minimise(loss: Callable[[Numbers], tuple[float, Numbers]], start: Numbers, steps: int) -> Numbers:
    """The point with the least loss that at most so many steps from `start` find; `loss` returns value and slope."""
    point = np.array(start, np.float64)
    value, slope = loss(point)
    pairs: deque[tuple[Numbers, Numbers, float]] = deque(maxlen=MEMORY)
    for _ in range(steps):
        way = -_scaled(slope, pairs)
        fall = float(slope @ way)
        if fall > -1e-14:
            break
        size = 1.0 if pairs else min(1.0, 1.0 / float(np.abs(slope).sum()))
        found = _line_search(loss, point, value, way, fall, size)
        if found is None:
            break
        moved, value, after = found
        step, bend = moved - point, after - slope
        if (along := float(step @ bend)) > 1e-12 * float(bend @ bend):
            pairs.append((step, bend, 1.0 / along))
        point, slope = moved, after
    return point


def _scaled(slope: Numbers, pairs: deque[tuple[Numbers, Numbers, float]]) -> Numbers:
    """The slope times the inverse curvature that the last steps tell (the two-loop recursion)."""
    line = slope.copy()
    shares = []
    for step, bend, weight in reversed(pairs):
        share = weight * float(step @ line)
        line -= share * bend
        shares.append(share)
    if pairs:
        step, bend, _ = pairs[-1]
        line *= float(step @ bend) / float(bend @ bend)
    for (step, bend, weight), share in zip(pairs, reversed(shares), strict=True):
        line += step * (share - weight * float(bend @ line))
    return line


def _line_search(
    loss: Callable[[Numbers], tuple[float, Numbers]],
    point: Numbers,
    value: float,
    way: Numbers,
    fall: float,
    size: float,
) -> tuple[Numbers, float, Numbers] | None:
    """The first point on the way that is low enough, its value and slope; longer steps while they are too short."""
    best = None
    for _ in range(30):
        moved = point + size * way
        lower, slope = loss(moved)
        if not lower <= value + SUFFICIENT * size * fall:
            if best is not None:
                return best
            size /= 2
        elif float(slope @ way) < 0.9 * fall:  # still steep: the step was too short
            best = moved, lower, slope
            size *= 2
        else:
            return moved, lower, slope
    return best
