"""What a run learns from: bad rows of all files at once, what is left out, and held-out prompts that are trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignment.material import NAME, Material, write
from alignment.records import BadRecords, Demonstration
from alignment.tokens import TemplateError
from tests.alignment.test_dataset import GOOD, USER, written


def talk(asked: str, split: str = "train", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, GOOD], "split": split} | more


def quiet(text: str) -> None:
    """Tells nobody."""


def test_the_bad_lines_of_all_files_are_told_at_once(tmp_path: Path) -> None:
    paths = [written(tmp_path / name, "{", talk("Hi?"), '{"a": 1}') for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(BadRecords) as caught:
        Material.read(paths, Demonstration, quiet)
    assert {path.name: list(lines) for path, lines in caught.value.files.items()} == {
        "a.jsonl": [1, 3], "b.jsonl": [1, 3],
    }  # fmt: skip


def test_rows_that_the_template_turns_down_are_told_with_their_lines_and_each_reason_once(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", talk("good"), "", *[talk(f"bad {i}") for i in range(30)], talk("worse"))

    def made(one: Demonstration) -> str:
        if (said := one.messages[0].content.split()[0]) != "good":
            raise TemplateError(f"{said} turn")
        return said

    with pytest.raises(BadRecords) as caught:
        Material.read([path], Demonstration, quiet).made(made)
    assert list(caught.value.lines) == list(range(3, 34))
    listed = ", ".join(map(str, range(3, 23)))
    assert str(caught.value).split("\n") == [
        f"{path}: 31 of its lines cannot be read; correct or remove them",
        f"  lines {listed} and 10 more: bad turn",
        "  line 33: worse turn",
    ]


def test_what_is_too_long_or_skipped_is_counted_and_told_with_its_place(tmp_path: Path) -> None:
    told: list[str] = []
    path = written(tmp_path / "rows.jsonl", talk("a"), talk("bbbb", "test"), talk("ccc"), talk("skip", slice="x"))
    learnt = Material.read([path], Demonstration, told.append)
    found = learnt.made(lambda one: len(one.messages[0].content), lambda one: "odd" if one.slice else "")
    assert [(one.line, one.what) for one in found["train"]] == [(1, 1), (3, 3)]
    assert [one.line for one in found["test"]] == [2]
    assert [one.what for one in learnt.fitting(found["train"], 2, "max_length", int)] == [1]
    assert told == ["1 of 2 rows are longer than 2 tokens and left out (max_length; the longest has 3): rows.jsonl:3"]
    write(tmp_path, learnt, tell=quiet)
    [one] = json.loads((tmp_path / NAME).read_text())["files"]
    assert one["left_out"] == {"odd": 1, "longer than max_length": 1}
    assert one["rows"] == {"train": 3, "test": 1} and one["slices"] == {"(none)": 3, "x": 1}
    assert one["fingerprint"] == learnt.fingerprints[str(path)] and len(one["fingerprint"]) == 64


def test_held_out_prompts_that_are_trained_on_are_told_loudly_and_written(tmp_path: Path) -> None:
    told: list[str] = []
    first = written(tmp_path / "a.jsonl", talk("What is a pension?"), talk("Hello there"))
    second = written(tmp_path / "b.jsonl", talk("Something new", "test"), talk("what is a PENSION?", "test"))
    write(tmp_path, Material.read([first, second], Demonstration, quiet), tell=told.append)
    [line] = told
    assert line.startswith("WARNING: 1 of 2 held-out prompts are trained on (1 word for word, 0 nearly)")
    assert "They are at b.jsonl:2;" in line
    files, splits = json.loads((tmp_path / NAME).read_text())["overlaps"]
    assert files == {"first": str(first), "second": str(second), "same": 1, "nearly": 0, "where": [2]}
    assert splits == {"first": "train", "second": "test", "same": 1, "nearly": 0, "where": ["b.jsonl:2"]}


def test_sets_without_anything_in_common_are_no_overlap(tmp_path: Path) -> None:
    told: list[str] = []
    path = written(tmp_path / "a.jsonl", talk("What is a pension?"), talk("Hello there", "test"))
    write(tmp_path, Material.read([path], Demonstration, quiet), tell=told.append)
    assert told == [] and json.loads((tmp_path / NAME).read_text())["overlaps"] == []
    assert USER["content"] not in (tmp_path / NAME).read_text()
