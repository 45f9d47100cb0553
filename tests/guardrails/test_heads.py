"""Heads: n-grams, the map from probability to score, files that are damaged, and the heads that ship."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from guardrails import heads
from guardrails.encoder import SIZE, Encoder, Windows
from guardrails.heads import SHIPPED, Head, HeadError, grams

NAMES = ("injection", "harm", "refusal")


def tiny(**changes: object) -> Head:
    """A head that reads the first number of a vector, and the n-grams `cat` and `dog` (up and down)."""
    letters = np.zeros(1 << 12, np.int8)
    letters[grams("cat", 12)] = 100
    letters[grams("dog", 12)] = -100
    head = Head(
        name="tiny",
        labels=("one", "two"),
        weights=np.eye(SIZE)[0] * 4,
        bias=-1.0,
        grams=letters,
        scale=0.01,
        escalate=0.6,
        block=0.95,
        sorts=np.stack([np.eye(SIZE)[1], np.eye(SIZE)[2]], 1),
        sorts_bias=np.zeros(2),
        about={"rows": 2},
    )
    return replace(head, **changes)  # type: ignore[arg-type]


def windows(*vectors: tuple[float, ...], span: int = 3) -> Windows:
    """Windows of `span` characters each, their vectors filled up with zeros."""
    filled = np.zeros((len(vectors), SIZE), np.float32)
    for i, vector in enumerate(vectors):
        filled[i, : len(vector)] = vector
    return Windows(tuple((i * span, (i + 1) * span) for i in range(len(vectors))), filled)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Ignore this", "IGNORE  \n this ", True),
        ("straße", "STRASSE", True),
        ("ignore this", "ignore that", False),
        ("abc", "acb", False),
        ("a", "b", False),
    ],
)
def test_ngrams_do_not_see_case_and_white_space(one: str, other: str, same: bool) -> None:
    assert (grams(one, 16).tolist() == grams(other, 16).tolist()) is same


def test_ngrams_are_distinct_and_within_their_buckets() -> None:
    for text in ("", " ", "a", "\ud800", "the same the same the same", "😀" * 50):
        found = grams(text, 10)
        assert len(set(found.tolist())) == len(found)
        assert all(0 <= bucket < 1 << 10 for bucket in found)
    assert len(grams("", 10)) == 0
    # " ab ": 2 of length 3, 1 of length 4
    assert len(grams("ab", 30)) == 3


def test_the_buckets_never_change() -> None:
    """The heads that ship were trained with these."""
    assert grams("Hi!", 16).tolist() == [8106, 10081, 13413, 15822, 19962, 31574]


def test_a_logit_is_the_vector_and_the_letters_and_the_bias() -> None:
    head = tiny()
    buckets = len(grams("cat", 12))
    (logit,) = head.logits("cat", windows((0.5,)))
    assert logit == pytest.approx(4 * 0.5 + 100 * buckets * 0.01 / math.sqrt(buckets) - 1)
    assert head.logits("dog", windows((0.5,)))[0] < head.logits("rat", windows((0.5,)))[0] < logit


@pytest.mark.parametrize(
    ("probability", "score"), [(0, 0), (0.3, 0.25), (0.6, 0.5), (0.775, 0.7), (0.95, 0.9), (0.975, 0.95), (1, 1)]
)
def test_scores_are_straight_lines_through_the_thresholds(probability: float, score: float) -> None:
    assert float(tiny().scores(probability)) == pytest.approx(score)


def test_a_text_scores_as_its_worst_window_and_each_window_has_its_label() -> None:
    head = tiny()
    both = windows((0.9, 0, 1), (0.1, 1, 0))
    first, second = head.read("xyzxyz", both)
    assert (first.start, first.end, first.label, second.label) == (0, 3, "two", "one")
    assert first.score > second.score
    assert head.score("xyzxyz", both) == pytest.approx(first.score)


def test_a_text_without_words_scores_nothing() -> None:
    assert (tiny().score(" ", windows()), tiny().read(" ", windows())) == (0.0, [])


def test_a_head_is_read_as_it_was_written(tmp_path: Path) -> None:
    head, path = tiny(), tmp_path / "tiny.npz"
    heads.write(head, path, {"more": np.arange(3)})
    again = heads.read(path)
    text, seen = "the cat", windows((0.3, 0.2, 0.1), span=7)
    assert again.read(text, seen)[0].score == pytest.approx(head.read(text, seen)[0].score, abs=1e-3)
    assert (again.labels, again.about, again.grams.tolist()) == (head.labels, {"rows": 2}, head.grams.tolist())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"escalate": 0.96}, "thresholds"),
        ({"escalate": 0.0}, "thresholds"),
        ({"block": 1.0}, "thresholds"),
        ({"weights": np.zeros(5)}, "do not fit"),
        ({"labels": ("one",)}, "do not fit"),
        ({"grams": np.zeros(1000, np.int8)}, "do not fit"),
        ({"bias": float("nan")}, "not finite"),
        ({"weights": np.full(SIZE, np.inf)}, "not finite"),
    ],
)
def test_a_head_that_cannot_work_is_refused(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    path = tmp_path / "tiny.npz"
    heads.write(tiny(**changes), path)
    with pytest.raises(HeadError, match=rf"tiny\.npz is not a head that can be read \(.*{reason}"):
        heads.read(path)


def test_a_damaged_file_and_a_pickle_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.npz"
    heads.write(tiny(), path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(HeadError, match="train it again or restore it"):
        heads.read(path)
    np.savez(path, head=np.array([{"name": "pickled"}], dtype=object))
    with pytest.raises(HeadError, match="train it again or restore it"):
        heads.read(path)


def test_own_heads_go_first_and_those_that_ship_fill_the_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEWEL_HEADS", raising=False)
    assert heads.find("harm") == SHIPPED / "harm.npz"
    heads.write(tiny(), tmp_path / "harm.npz")
    monkeypatch.setenv("NEWEL_HEADS", str(tmp_path))
    assert heads.find("harm") == tmp_path / "harm.npz"
    assert heads.find("refusal") == SHIPPED / "refusal.npz"
    assert heads.find("harm", str(tmp_path / "harm.npz")) == tmp_path / "harm.npz"
    with pytest.raises(HeadError, match=r"there is no head .*refusal\.npz: train it \(newel guard train refusal\)"):
        heads.find("refusal", str(tmp_path))


def test_a_head_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "harm.npz"
    heads.write(tiny(), path)
    assert heads.load("harm", str(path)).bias == -1
    heads.write(tiny(bias=2.0), path)
    assert heads.load("harm", str(path)).bias == 2


@pytest.mark.parametrize("name", NAMES)
def test_the_heads_that_ship_say_what_they_are_made_of(name: str) -> None:
    head = heads.read(SHIPPED / f"{name}.npz")
    assert head.name == name
    assert len(head.about["fingerprint"]) == 64
    assert head.about["rows"] == sum(head.about["sources"].values())
    card = (SHIPPED / "README.md").read_text()
    assert head.about["fingerprint"][:12] in card
    assert [one for one in head.about["sources"] if one.split()[0] not in card] == []


def test_the_heads_that_ship_are_small() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.glob("*.npz")) < 2_000_000


PLAIN, TRICKY = 0.02, 0.08


@pytest.mark.parametrize("name", NAMES)
def test_harmless_texts_pass_the_heads_that_ship(name: str, encoder_dir: Path) -> None:
    head, encoder = heads.read(SHIPPED / f"{name}.npz"), Encoder(encoder_dir)
    hit: dict[str, list[bool]] = {}
    part = ""
    for line in (SHIPPED / "benign.txt").read_text().splitlines():
        if line.startswith("## "):
            part = line[3:]
        elif line and not line.startswith("#"):
            hit.setdefault(part, []).append(head.score(line, encoder.windows(line)) >= 0.5)
    assert len([one for each in hit.values() for one in each]) >= 150
    assert sum(hit["plain"]) / len(hit["plain"]) <= PLAIN
    assert all(sum(each) / len(each) <= TRICKY for each in hit.values())
