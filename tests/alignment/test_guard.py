"""Training heads: splits by source, thresholds, adapting to feedback, and what is not accepted."""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alignment import corpora, guard
from alignment.corpora import BENIGN, CorpusError, Row, Shelf
from alignment.embeddings import Embeddings
from alignment.guard import Measured, Recipe, Rejected, adapt, auroc, folds, table, thresholds, train, verdict
from alignment.records import Rating
from guardrails import heads
from guardrails.encoder import SIZE, Windows
from guardrails.types import Message

PARTS = {"plain": ["friday table recipe", "weather printer garden"], "tricky": ["invoice ticket friday"]}
BAD = ("ignore", "rules", "reveal", "prompt", "override", "secret")
GOOD = ("table", "printer", "friday", "recipe", "weather", "invoice", "garden", "ticket")


class Words:
    """Stands for `Embeddings`: a text's vector is the sum of one random direction for each of its words."""

    def __init__(self) -> None:
        self.asked = 0

    def of(self, texts, report=print):
        self.asked += len(texts)
        return [self.windows(text) for text in texts]

    @staticmethod
    def windows(text: str) -> Windows:
        total = np.zeros(SIZE)
        for word in text.split():
            seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest())
            total += np.random.default_rng(seed).normal(size=SIZE)
        vector = total / max(1e-9, float(np.linalg.norm(total)))
        return Windows(((0, len(text)),) if text else (), vector[None].astype(np.float32)[: bool(text)])


def rows(count: int = 60, sources: tuple[str, ...] = ("a", "b", "c")) -> list[Row]:
    """So many texts of each kind and source, told apart by their words."""
    chance = np.random.default_rng(0)
    made = []
    for source in sources:
        for label, words in (("injection", BAD), (BENIGN, GOOD)):
            for i in range(count):
                picked = chance.choice(words, 3, replace=False)
                made.append(Row(f"{' '.join(picked)} {source}{label}{i}", label, source))
    return made


RECIPE = Recipe("injection", ("injection",), bits=12, folds=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a head that was trained on `rows()`."""
    measured = train(RECIPE, rows(), Words(), PARTS, lambda _: None)
    return guard.keep(measured, tmp_path_factory.mktemp("heads"))


def test_a_head_tells_texts_of_sources_that_it_never_saw() -> None:
    measured = train(RECIPE, rows(), Words(), PARTS, lambda _: None)
    assert measured.auroc > 0.99
    assert [(one.source, one.finds, one.benign) for one in measured.sources] == [(s, 60, 60) for s in "abc"]
    assert measured.parts == {"plain": (0.0, 0.0), "tricky": (0.0, 0.0)}
    score = measured.head.score
    assert score("reveal secret rules", Words.windows("reveal secret rules")) >= 0.5
    assert score("friday garden recipe", Words.windows("friday garden recipe")) < 0.5


def test_what_a_head_was_made_of_does_not_depend_on_the_order_of_its_rows() -> None:
    one, other = (train(RECIPE, some, Words(), {}, lambda _: None).head.about for some in (rows(), rows()[::-1]))
    assert one["fingerprint"] == other["fingerprint"]
    assert one["sources"] == {f"{s} {kind}": 60 for s in "abc" for kind in ("benign", "finds")}
    changed = [replace(rows()[0], weight=2.0), *rows()[1:]]
    assert train(RECIPE, changed, Words(), {}, lambda _: None).head.about["fingerprint"] != one["fingerprint"]


@pytest.mark.parametrize(("finds", "benign"), [(19, 60), (60, 19), (0, 60)])
def test_too_few_rows_are_refused(finds: int, benign: int) -> None:
    some = [Row(f"x {i}", "injection", "a") for i in range(finds)] + [Row(f"y {i}", BENIGN, "a") for i in range(benign)]
    with pytest.raises(ValueError, match="at least 20 texts of each kind"):
        train(RECIPE, some, Words(), {}, lambda _: None)


def test_whole_sources_are_held_out_and_each_row_once() -> None:
    data = table(rows(10, ("a", "b", "c", "d", "e")), [Words.windows(row.text) for row in rows(10, tuple("abcde"))], 8)
    held = folds(data, 3)
    assert len(held) == 3
    assert (sum(out.astype(int) for out in held) == 1).all()
    assert all(len({out[i] for i in np.flatnonzero(data.sources == name)}) == 1 for out in held for name in "abcde")


def test_one_source_alone_is_split_by_text() -> None:
    some = rows(30, ("a",))
    held = folds(table(some, [Words.windows(row.text) for row in some], 8), 4)
    assert (sum(out.astype(int) for out in held) == 1).all()
    assert all(5 < out.sum() < 30 for out in held)


@pytest.mark.parametrize(
    ("finds", "benign", "area"),
    [
        ([3, 4], [1, 2], 1.0),
        ([1, 2], [3, 4], 0.0),
        ([1, 3], [2, 4], 0.25),  # one of four pairs
        ([2, 2], [2, 2], 0.5),
        ([], [1], 0.5),
    ],
)
def test_auroc_is_the_share_of_pairs(finds: list[float], benign: list[float], area: float) -> None:
    assert auroc(np.array(finds, float), np.array(benign, float)) == pytest.approx(area)


def test_thresholds_hit_the_shares_of_harmless_texts_that_the_recipe_says() -> None:
    values, sources = np.arange(1000) / 100.0, np.array(["chat"] * 1000)
    recipe = Recipe("x", ("x",), escalate=0.05, block=0.01)
    escalate, block = thresholds(values, sources, recipe)
    assert (values > escalate).mean() == pytest.approx(0.05)
    assert block == pytest.approx(escalate + 0.5)  # never closer than that
    near = np.concatenate([values, np.full(10, 11.0)]), np.concatenate([sources, np.array(["coconot"] * 10)])
    assert thresholds(*near, recipe)[0] == 11.0
    replies = near[0], np.where(near[1] == "coconot", "gptfuzzer-replies", near[1])
    assert thresholds(*replies, recipe) == (escalate, block)


def test_near_repetitions_of_what_is_held_out_do_not_teach() -> None:
    """Two sources hold the same finds: a head that saw one knows the other by heart, and the report must not say so."""
    chance = np.random.default_rng(1)
    noise = [f"w{chance.integers(10**9)} v{chance.integers(10**9)}" for _ in range(240)]
    same = [Row(text, "injection", source) for text in noise[:60] for source in ("a", "b")]
    other = [Row(text, BENIGN, f"c{i % 2}") for i, text in enumerate(noise[60:])]
    measured = train(replace(RECIPE, folds=4), [*same, *other], Words(), {}, lambda _: None)
    assert measured.auroc < 0.75


def test_a_head_is_adapted_to_a_few_rows_without_the_data_it_was_made_of(trained: Path) -> None:
    missed, wrong = "banana friday weather", "override telescope rules"
    feedback = [Row(missed, "injection", "feedback", 15.0), Row(wrong, BENIGN, "feedback", 15.0)]
    old, new = adapt(trained, feedback, Words(), PARTS, lambda _: None)
    for text, up in ((missed, True), (wrong, False)):
        before, after = (one.head.score(text, Words.windows(text)) for one in (old, new))
        assert (after > before) is up
    assert new.auroc > old.auroc - 0.01
    assert new.head.about["adapted"] == 2
    verdict(old, new)


def test_an_adapted_head_can_be_adapted_again(trained: Path, tmp_path: Path) -> None:
    _, first = adapt(trained, [Row("banana one", "injection", "f", 15.0)], Words(), PARTS, lambda _: None)
    path = guard.keep(first, tmp_path)
    _, second = adapt(path, [Row("banana two", "injection", "f", 15.0)], Words(), PARTS, lambda _: None)
    assert second.head.about["adapted"] == 2
    text = "banana"
    scores = [heads.read(trained), first.head, second.head]
    assert sorted(scores, key=lambda head: head.score(text, Words.windows(text))) == scores


def test_feedback_that_spoils_the_head_is_rejected(trained: Path) -> None:
    poison = [Row(row.text, BENIGN, "poison", 500.0) for row in rows() if row.label != BENIGN]
    poison += [Row(row.text, "injection", "poison", 500.0) for row in rows() if row.label == BENIGN]
    old, new = adapt(trained, poison, Words(), PARTS, lambda _: None)
    with pytest.raises(Rejected, match=r"the new injection head is worse and was not kept: AUROC 0\.\d+, was"):
        verdict(old, new)


def test_a_head_that_hits_more_harmless_texts_is_rejected(trained: Path) -> None:
    old = Measured(heads.read(trained), 0.95, parts={"plain": (0.01, 0.0), "own": (0.0, 0.0)})
    verdict(old, replace(old, auroc=0.941, parts={"plain": (0.02, 0.0), "own": (0.0, 0.0)}))
    with pytest.raises(Rejected, match=r"own: 3\.0% of the harmless texts hit at the threshold to block, was 0\.0%"):
        verdict(old, replace(old, parts={"plain": (0.01, 0.0), "own": (0.0, 0.03)}))


def test_a_head_without_its_curvature_cannot_be_adapted(trained: Path, tmp_path: Path) -> None:
    bare = tmp_path / "injection.npz"
    heads.write(heads.read(trained), bare)
    with pytest.raises(heads.HeadError, match="carries no curvature, pool"):
        adapt(bare, rows(5), Words(), PARTS, lambda _: None)


def test_the_previous_head_is_kept_and_comes_back(trained: Path, tmp_path: Path) -> None:
    head = heads.read(trained)
    first = guard.keep(Measured(head, 1.0), tmp_path)
    guard.keep(Measured(replace(head, bias=7.0), 1.0), tmp_path, first)
    assert (heads.read(first).bias, heads.read(guard.previous(first)).bias) == (7.0, head.bias)
    guard.roll_back(first)
    assert heads.read(first).bias == head.bias
    with pytest.raises(heads.HeadError, match="there is no head before"):
        guard.roll_back(first)


def test_feedback_becomes_rows_of_the_head_that_it_is_about() -> None:
    def rating(source: str) -> Rating:
        prompt = (Message("user", "first"), Message("assistant", "yes"), Message("user", "second"))
        return Rating(prompt=prompt, completion=(Message("assistant", "I cannot."),), label=False, source=source)

    ratings = [rating("should_have_helped"), rating("should_have_refused"), rating("rating")]
    assert [(row.text, row.label) for row in guard.feedback(ratings, "harm")] == [
        ("second", BENIGN),
        ("second", "harm"),
    ]
    assert [(row.text, row.label) for row in guard.feedback(ratings, "refusal")] == [
        ("I cannot.", "refusal"),
        ("I cannot.", BENIGN),
    ]


# --- rows


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a"}', "label: Field required"),
        ('{"text": "", "label": "x"}', "text: String should have at least 1"),
        ('{"text": "a", "label": "x", "weigth": 2}', "weigth: Extra inputs"),
        ('{"text": "a", "label": "x", "weight": 0}', "weight: Input should be greater than 0"),
        ("nonsense", "Invalid JSON"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"text": "a\\u2028b", "label": "x"}\n\n' + line)
    with pytest.raises(CorpusError, match=f"own.jsonl, line 3: .*{reason}"):
        corpora.read(file)


def test_rows_are_read_with_their_defaults(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(
        '{"text": "a\u2028b", "label": "x"}\n{"text": "c", "label": "benign", "source": "s", "weight": 3}\n'
    )
    assert corpora.read(file) == [Row("a\u2028b", "x", "own"), Row("c", BENIGN, "s", 3.0)]


def test_texts_with_the_same_letters_are_one() -> None:
    some = [
        Row("Hello, World", "x", "a"),
        Row("hello world!", "y", "b"),
        Row("hello word", "z", "c"),
        Row("?!", "w", "d"),
    ]
    assert [row.label for row in corpora.distinct(some)] == ["x", "z"]


def test_contrasts_are_of_both_kinds_all_different_and_always_the_same() -> None:
    for head, find in (("injection", "injection"), ("harm", "harm"), ("refusal", "refusal")):
        made = list(corpora.contrasts(head))
        assert {row.label for row in made} == {BENIGN, find}
        assert len(corpora.distinct(made)) > 0.8 * len(made) > 100
        assert not any(set(row.text) & set("{}|") for row in made)
        assert made == list(corpora.contrasts(head))


def test_nothing_that_is_trained_on_is_in_the_benign_set() -> None:
    held = {"".join(filter(str.isalnum, text.casefold())) for part in guard.benign_set().values() for text in part}
    made = [row for head in corpora.RECIPES for row in corpora.contrasts(head)]
    assert [row.text for row in made if "".join(filter(str.isalnum, row.text.casefold())) in held] == []


def test_a_folder_without_the_public_sets_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="holds none of the public sets"):
        corpora.recipe("injection", Shelf(tmp_path))


def test_a_shelf_reads_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "bastioncorpus").mkdir()
    lines = [{"text": "Ignore it all", "label": "malicious"}, {"text": "Ignore the noise", "label": "benign"}]
    (tmp_path / "bastioncorpus" / "injections.jsonl.gz").write_bytes(
        gzip.compress("\n".join(map(json.dumps, lines)).encode())
    )
    rows = [row for row in corpora.recipe("injection", Shelf(tmp_path)) if row.source == "bastion"]
    assert [(row.text, row.label) for row in rows] == [("Ignore it all", "injection"), ("Ignore the noise", BENIGN)]


# --- embeddings


def test_windows_are_kept_between_runs_without_the_text(encoder_files: Path, tmp_path: Path) -> None:
    path, texts = tmp_path / "cache" / "embeddings.npz", ["How many days of leave do I have?", "", "Ja, bitte."]
    first = Embeddings(path).of(texts, lambda _: None)
    reports: list[str] = []
    again = Embeddings(path).of([*texts, "new"], reports.append)
    assert reports == ["encoded 1 of 1 new texts"]
    assert [one.spans for one in first] == [one.spans for one in again[:3]]
    assert all(np.array_equal(a.vectors, b.vectors) for a, b in zip(first, again, strict=False))
    assert b"leave" not in path.read_bytes()


def test_windows_of_another_encoder_are_not_used(
    encoder_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "embeddings.npz"
    Embeddings(path).of(["one"], lambda _: None)
    monkeypatch.setattr("alignment.embeddings._encoder", lambda: b"other")
    reports: list[str] = []
    Embeddings(path).of(["one"], reports.append)
    assert reports == ["encoded 1 of 1 new texts"]
