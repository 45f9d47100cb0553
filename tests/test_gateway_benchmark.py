"""What the benchmark of gateways asks, and what it writes: its section of the page, and the picture."""

import json
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest

from app.policies import library
from benchmarks.gateway import bodies
from benchmarks.gateway_peers.paths import MODELS, rules
from benchmarks.gateway_peers.report import HEADING, Results, picture, put, section
from guardrails.policy import Source, resolve


def row(requests: float, cpu: float, p99: float, frames: float = 25_000) -> dict[str, float]:
    """The figures of one way."""
    whole = {"requests": requests, "cpu": cpu, "p50": 0.5, "p99": p99, "bad": 0.0, "rss": 90.0}
    gaps = {"gap50": 20.0, "gap99": 21.0, "pause": 24.0, "ttft50": 1.0, "ttft99": 2.0, "ttft": 3.0, "stalls": 0.0}
    return (
        whole | gaps | {"frames": frames, "tokens": 25_000.0, "frame_cpu": 30.0, "stream_bad": 0.0, "stream_rss": 95.0}
    )


def results() -> Results:
    """The engine, newel, and a peer that streams nothing."""
    found = Results(about={"direct": "the engine", "newel, rules": "a policy", "Peer": "1.0"})
    found.figures = {
        "direct": row(60_000, 0, 0.1),
        "ASGI floor": row(8_000, 100, 0.3),
        "newel, rules": row(4_000, 250, 0.9, frames=20_000),
        "Peer": row(400, 2_000, 30) | {"frames": 0.0, "stream_bad": 500.0},
    }
    found.missing = {"Other": "not installed: it failed"}
    return found


@pytest.mark.parametrize(
    "line",
    [
        "| newel, rules | 4,000 | 250 (2.5) | 0.00 | 0.80 | 90 |",
        "| Peer | 400 | 2,000 (20.0) | 0.00 | 30 | 90 |",
        "| newel, rules | 20,000 | 1.25 | 30.0 | 0 | 24 | 0.00 | 0.00 | 0.00 | 0.00 | 0.00 | 95 |",
        "| Peer | 0, 500 streams without an answer |  |  |  |  |  |  |  |  |  | 95 |",
        "| Other | left out: not installed: it failed |",
        "Medians of 3 rounds of",
    ],
)
def test_the_section_says_what_was_measured(line: str) -> None:
    assert line in section(results(), 500, 3, 5.0, "x.svg")


def test_only_the_section_of_the_page_changes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# A\n\n{HEADING}\n\nold\n\n## B\n\nb\n")
    put(f"{HEADING}\n\n### new\n", page)
    assert page.read_text() == f"# A\n\n{HEADING}\n\n### new\n\n## B\n\nb\n"


def test_the_picture_says_in_words_what_it_shows() -> None:
    root = ElementTree.fromstring(picture(results()))
    assert "Requests per second: ASGI floor 8,000, newel, rules 4,000, Peer 400." in "".join(root.itertext())


def test_the_policy_of_rules_asks_no_encoder_and_is_a_policy() -> None:
    read = tomllib.loads(rules())
    assert read["name"] == "rules" and len(read["input"]) > 3
    assert not {rule["validator"] for rule in read["input"]} & set(MODELS)
    assert resolve(Source("rules.toml", rules()), library([], [])).policy.name == "rules"


def test_every_question_is_another_one() -> None:
    texts = [json.loads(body)["messages"][0]["content"] for body in bodies(50)]
    assert len(set(texts)) == 50 and all(text.count("@@@@@@@") == 1 for text in texts)
