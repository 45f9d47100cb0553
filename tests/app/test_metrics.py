"""The page of the metrics names every metric with its labels, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from app.metrics import Metrics

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_every_metric_is_on_its_page_with_its_labels() -> None:
    page = {
        name: set(re.findall(r"`(\w+)`", labels))
        for name, labels in re.findall(r"^\| `(newel_\w+)` \| ([^|]*)\|", PAGE.read_text(), re.MULTILINE)
    }
    there = {
        collector.describe()[0].name + ("_total" if collector._type == "counter" else ""): set(collector._labelnames)
        for collector in vars(Metrics()).values()
        if hasattr(collector, "describe") and hasattr(collector, "_labelnames")
    }
    assert len(there) > 10
    assert page == there
