"""The parts of benchmarks/trainers.py that measure nothing: pairing, ratios, the pairs made where none are given."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from benchmarks import trainers


def runs(*found: tuple[trainers.Way, str, float]) -> trainers.Runs:
    made = trainers.Runs()
    for way, precision, speed in found:
        made.found.setdefault((way, precision), []).append({"per_second": speed})
    return made


def test_a_ratio_is_to_the_peer_of_the_same_precision_and_table() -> None:
    own, peer = trainers.Way("sft", "own", "", {}, "peer"), trainers.Way("sft", "peer", "1.16", {})
    other = trainers.Way("reward", "peer", "1.16", {})
    found = runs((own, "float32", 6.0), (other, "float32", 100.0), (peer, "bfloat16", 50.0), (peer, "float32", 2.0))
    assert found.beside(own, "float32", "per_second") == 3.0
    assert found.beside(peer, "float32", "per_second") is None


def test_a_ratio_is_of_medians() -> None:
    own, peer = trainers.Way("sft", "own", "", {}, "peer"), trainers.Way("sft", "peer", "1.16", {})
    speeds = [(own, "float32", one) for one in (1.0, 4.0, 100.0)] + [(peer, "float32", one) for one in (2.0, 2.0, 9.0)]
    assert runs(*speeds).beside(own, "float32", "per_second") == 2.0


def test_every_way_is_compared_with_one_that_is_run_in_its_table() -> None:
    ways = [*trainers.ppo_ways(), *trainers.learnt_ways(), *trainers.row_ways()]
    names = {(one.table, one.name) for one in ways}
    assert {(one.table, one.beside) for one in ways if one.beside} <= names
    assert all((trainers.HERE / f"{one.script}.py").is_file() for one in ways)


def test_made_pairs_end_with_a_question_and_are_the_same_each_time() -> None:
    made = list(trainers.made(20))
    assert made == list(trainers.made(20))
    assert len({len(str(one["prompt"])) for one in made}) > 10
    assert all(one["prompt"][-1]["role"] == "user" and one["chosen"] != one["rejected"] for one in made)


def test_several_seeds_are_shown_with_their_spread() -> None:
    assert trainers.spread([0.5]) == "0.500"
    assert trainers.spread([1.0, 3.0], 1) == "2.0 ± 1.4"
