"""The page of the metrics names every metric with its type and labels, and nothing else; what a turn adds to them."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from app.metrics import Metrics
from app.store import Store
from app.tracing import Steps
from guardrails.types import Action, Hit, Verdict
from tests.app.turns import begun, escalated, finished

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(newel_\w+)` \| (\w+) \| ([^|]*)\| (.+) \|$", re.MULTILINE)


def there() -> dict[str, tuple[str, set[str]]]:
    """Every metric of the gateway with its type and its labels, as Prometheus will name it."""
    collectors = vars(Metrics()).values()
    return {
        one.describe()[0].name + ("_total" if one._type == "counter" else ""): (one._type, set(one._labelnames))
        for one in collectors
        if hasattr(one, "describe") and hasattr(one, "_labelnames")
    }


def test_every_metric_is_on_its_page_with_its_type_and_labels_and_nothing_else() -> None:
    rows = ROW.findall(PAGE.read_text())
    page = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _ in rows}
    assert page == there() and len(page) == len(rows) > 40


def test_every_line_of_the_page_that_names_a_metric_names_one_that_is_there() -> None:
    named = re.findall(r"newel_[a-z_]+", PAGE.read_text())
    assert set(named) <= set(there())


def test_what_is_scraped_is_what_the_page_says() -> None:
    told = Metrics().render().decode()
    kinds = dict(re.findall(r"^# TYPE (newel_\w+) (\w+)$", told, re.MULTILINE))
    kinds = {name: kind for name, kind in kinds.items() if not name.endswith("_created")}
    assert kinds == {name: kind for name, (kind, _) in there().items()}


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"newel_{name}", labels)


def test_a_turn_is_counted_with_its_rules_its_tokens_and_its_ticket() -> None:
    metrics, turn = Metrics(), escalated(begun("acme"))
    for _ in range(2):
        metrics.count(turn)
    assert value(metrics, "turns_total", tenant="acme", policy="hr", action="escalate") == 2
    hit = {"policy": "hr", "stage": "input", "rule": "ids", "action": "redact", "mode": "enforce"}
    assert value(metrics, "rule_hits_total", **hit) == 2
    assert value(metrics, "rule_broken_total", policy="hr", rule="tone", action="refuse") == 2
    assert value(metrics, "tokens_total", tenant="acme", direction="prompt") == 62
    assert value(metrics, "tokens_total", tenant="acme", direction="completion") == 24
    assert value(metrics, "tickets_total", queue="hr-desk", priority="high") == 2
    metrics.count(replace(turn, id="chatcmpl-later"))
    assert value(metrics, "tickets_total", queue="hr-desk", priority="high") == 2, "of the turn before"


@pytest.mark.parametrize(
    ("mode", "action", "decided", "counted"),
    [
        ("shadow", Action.REFUSE, "allow", 1),
        ("shadow", Action.REFUSE, "refuse", None),
        ("shadow", Action.ALLOW, "allow", None),
        ("enforce", Action.REFUSE, "allow", None),
    ],
)
def test_a_rule_in_shadow_mode_that_would_have_changed_a_turn_is_counted(
    mode: str, action: Action, decided: str, counted: int | None
) -> None:
    metrics = Metrics()
    verdict = Verdict(Action.ALLOW, "", hits=(Hit("tone", action, mode),))  # type: ignore[arg-type]
    metrics.count(finished(begun("acme", input=None), output=verdict, action=decided))
    labels = {"policy": "hr", "stage": "output", "rule": "tone", "action": action.word}
    assert value(metrics, "shadow_changes_total", **labels) == counted


def test_the_time_to_the_first_token_and_between_tokens_is_measured() -> None:
    metrics = Metrics()
    metrics.count(finished(begun("acme"), first_token_ms=40.0, total_ms=240.0, completion_tokens=11))
    assert value(metrics, "first_token_seconds_sum") == pytest.approx(0.04)
    assert value(metrics, "turn_seconds_sum") == pytest.approx(0.24)
    assert value(metrics, "token_seconds_sum") == pytest.approx(0.02)
    for changes in ({"streamed": False}, {"completion_tokens": 1}, {"first_token_ms": None}):
        metrics.count(replace(finished(begun("acme")), **changes))  # type: ignore[arg-type]
    assert value(metrics, "token_seconds_count") == 1


def test_the_overhead_is_what_a_turn_took_beside_its_engine() -> None:
    metrics = Metrics()
    metrics.count(finished(begun("acme"), total_ms=120.0), Steps(waited=0.118))
    assert value(metrics, "overhead_seconds_sum") == pytest.approx(0.002)
    metrics.count(finished(begun("acme"), total_ms=120.0), Steps(waited=0.121))  # rounded times
    metrics.count(finished(begun("acme"), total_ms=120.0))
    assert value(metrics, "overhead_seconds_sum") == pytest.approx(0.002)
    assert value(metrics, "overhead_seconds_count") == 2


async def test_what_the_writer_of_turns_does_is_counted(store: Store, tenant: str) -> None:
    metrics = Metrics()
    metrics.watch(store.writer)
    for _ in range(3):
        store.log(finished(begun(tenant)))
    store.log(finished(begun("nobody")))
    assert value(metrics, "turns_queued") == 4
    await store.flush()
    assert (value(metrics, "turns_written_total"), value(metrics, "turns_rejected_total")) == (3, 1)
    assert value(metrics, "turn_batches_total") == store.writer.batches > 0
    assert (value(metrics, "turns_queued"), value(metrics, "turns_lost_total")) == (0, 0)


def test_counting_a_turn_costs_little() -> None:
    metrics, steps = Metrics(), Steps(waited=0.1)
    turn = replace(finished(begun("acme")), input=None, output=None)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        for _ in range(500):
            metrics.count(turn, steps)
        best = min(best, time.perf_counter() - began)
    assert best / 500 < 50e-6, "five times the target"
