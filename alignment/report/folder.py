"""What lies in a run's folder, as the report reads it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


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
    steps = {row["step"]: row for row in rows if finite(row.get("step")) is not None}
    return [steps[step] for step in sorted(steps)]


def finite(value: object) -> float | None:
    """A number that can be drawn, or None: not one that is infinite, or so large that differences of it would be."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e150:
        return None
    return float(value) if abs(value) > 1e-150 else 0.0
