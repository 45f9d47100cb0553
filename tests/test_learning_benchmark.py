"""benchmarks/learning.py deals conversations out so that nothing is measured on what was learnt."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import learning


def line(asked: str, chosen: str, rejected: str, before: str = "") -> str:
    start = f"{before}\n\nHuman: {asked}\n\nAssistant: "
    return json.dumps({"chosen": start + chosen, "rejected": start + rejected})


def test_pairs_with_an_empty_or_the_same_reply_or_no_question_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    broken = json.dumps(
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", "rejected": "\n\nHuman: a\n\nAssistant: d"}
    )
    lines = [line("One?", "yes", "no"), line("Two?", "", "no"), line("Three?", "no", "no"), broken]
    path.write_text("\n".join(lines) + "\n")
    found = [
        tuple(said.content for said in (*one.prompt, *one.chosen, *one.rejected))
        for one in learning.pairs(path, tmp_path)
    ]
    assert found == [("One?", "yes", "no")]


def test_no_conversation_is_in_two_sets_and_only_the_measured_ones_are_held_out(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [
        line(f"Follow {k}?", "yes", "no", f"\n\nHuman: Start {i}\n\nAssistant: Well") for i in range(60) for k in (0, 1)
    ]
    path.write_text("\n".join(rows) + "\n")
    sizes = learning.deal(path, tmp_path)
    assert sum(sizes.values()) == 120 and min(sizes.values()) > 0
    starts: dict[str, set[str]] = {}
    for name in sizes:
        found = [json.loads(one) for one in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        starts[name] = {one["prompt"][0]["content"] for one in found}
        assert {one["split"] for one in found} == {"test" if name == "measured" else "train"}
    assert not starts["first"] & starts["second"] and not (starts["first"] | starts["second"]) & starts["measured"]
    prompts = [json.loads(one) for one in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert {one["prompt"][0]["content"] for one in prompts if one["split"] == "test"} == starts["measured"]
