"""Reading probabilities off a guard model's answer: which token decides, which words count, what is an error."""

import math
from collections.abc import Sequence

import pytest

from guardrails.answers import Undecided, calibrated, following, risk, shares
from guardrails.types import Token

SAFETY = ("safe", "unsafe")
QWEN = ("safe", "controversial", "unsafe")
ANSWER = ("no", "yes")


def token(*alternatives: tuple[str, float], text: str = "") -> Token:
    """A token with these alternatives and their probabilities; its text is the first one's unless given."""
    told = tuple((word, math.log(chance)) for word, chance in alternatives)
    return Token(text or (alternatives[0][0] if alternatives else ""), told)


def plain(*texts: str) -> list[Token]:
    """Tokens that were certain."""
    return [token((text, 1.0)) for text in texts]


@pytest.mark.parametrize(
    ("alternatives", "labels", "expected"),
    [
        ([("safe", 0.8), ("unsafe", 0.2)], SAFETY, {"safe": 0.8, "unsafe": 0.2}),
        ([(" Safe", 0.6), (" Unsafe", 0.2), (" Controversial", 0.2)], QWEN, {"unsafe": 0.2, "controversial": 0.2}),
        ([("Yes", 0.3), (" yes", 0.3), ("YES", 0.2), ("No", 0.2)], ANSWER, {"yes": 0.8}),
        ([("▁yes", 0.5), ("Ġno", 0.5)], ANSWER, {"yes": 0.5}),
        ([("\nyes\n", 0.9), ("'No'", 0.1)], ANSWER, {"yes": 0.9}),
        ([("1", 0.9), ("0", 0.1)], ("0", "1"), {"1": 0.9}),
        ([("safe", 0.45), ("unsafe", 0.15), ("Sure", 0.4)], SAFETY, {"safe": 0.75, "unsafe": 0.25}),
        ([(" Cont", 0.5), (" Safe", 0.5)], QWEN, {"controversial": 0.5, "safe": 0.5}),
        ([("uns", 0.9), ("safe", 0.1)], SAFETY, {"unsafe": 0.9}),
        ([("unsafe", 0.4), ("un", 0.4), ("safe", 0.2)], SAFETY, {"unsafe": 0.8}),
        ([("No", 0.6), ("Not", 0.2), ("None", 0.2)], ANSWER, {"no": 1.0, "yes": 0.0}),
        ([("Yes", 0.6), ("Yesterday", 0.4)], ANSWER, {"yes": 1.0}),
        ([("safe", 0.6), ("safely", 0.2), ("s", 0.2)], SAFETY, {"safe": 1.0}),
    ],
)
def test_a_label_counts_however_a_vocabulary_writes_it(
    alternatives: list[tuple[str, float]], labels: Sequence[str], expected: dict[str, float]
) -> None:
    found = shares([token(*alternatives)], labels)
    assert {label: found[label] for label in expected} == pytest.approx(expected)
    assert sum(found.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("before", "after", "deciding"),
    [
        (plain("\n\n"), "", "unsafe"),
        (plain("\n", " ", "**"), "", "unsafe"),
        (plain("<think>", "\n", "</think>", "\n", "<score>", " "), "<score>", " unsafe"),
        (plain("<think>", "unsafe", "</think>", "<", "score", ">"), "<score>", " unsafe"),
        (plain("<score>no, I mean", "<score>"), "<score>", "unsafe"),
        (
            plain("<|channel|>", "analysis", "<|message|>", "safe?", "<|end|>")
            + plain("<|start|>", "assistant", "<|channel|>", "final", "<|message|>"),
            "<|channel|>final<|message|>",
            "unsafe",
        ),
    ],
)
def test_the_first_word_behind_the_marker_decides(before: list[Token], after: str, deciding: str) -> None:
    answer = [*before, token((deciding, 0.7), (deciding.replace("unsafe", "safe"), 0.3)), *plain("\n", "safe")]
    assert shares(answer, SAFETY, after)["unsafe"] == pytest.approx(0.7)


def test_a_token_that_begins_before_the_marker_ends_is_read_behind_it() -> None:
    answer = [token(("<score", 1.0)), token(("> yes", 0.6), ("> no", 0.3), (" no", 0.1))]
    assert shares(answer, ANSWER, "<score>")["yes"] == pytest.approx(2 / 3)
    assert following(answer, "<score>") == " yes"


def test_what_follows_begins_with_the_deciding_word() -> None:
    assert following(plain("\n\n", "unsafe", "\n", "S1", ",S9")) == "unsafe\nS1,S9"


@pytest.mark.parametrize(
    ("answer", "after", "reason"),
    [
        ([], "", "returned no log-probabilities"),
        ([Token("safe")], "", "returned no log-probabilities"),
        ([token(("I", 0.9), ("safe", 0.1))], "", r"none of safe, unsafe \(together 0.1 probable"),
        ([token(("Maybe", 1.0))], "", "is it the model that this kind of question is made for"),
        ([token(("s", 1.0))], "", "none of"),
        (plain("\n", " "), "", "no word that decides"),
        (plain("unsafe"), "<score>", "has no '<score>' within its 1 tokens"),
        (plain("<score>", " "), "<score>", "no word that decides"),
        ([Token("safe", (("safe", math.nan),))], "", "none of"),
        ([Token("safe", (("safe", -math.inf),))], "", "none of"),
    ],
)
def test_an_answer_that_does_not_decide_is_an_error(answer: list[Token], after: str, reason: str) -> None:
    with pytest.raises(Undecided, match=reason):
        shares(answer, SAFETY, after)


def test_how_little_is_enough_can_be_said() -> None:
    weak = [token(("The", 0.9), ("yes", 0.06), ("no", 0.02))]
    assert shares(weak, ANSWER, least=0.05)["yes"] == pytest.approx(0.75)
    with pytest.raises(Undecided):
        shares(weak, ANSWER, least=0.1)


@pytest.mark.parametrize(("controversial", "expected"), [(1.0, 0.5), (0.5, 0.3), (0.0, 0.1)])
def test_a_tier_says_how_much_the_middle_counts(controversial: float, expected: float) -> None:
    mass = {"safe": 0.5, "controversial": 0.4, "unsafe": 0.1}
    assert risk(mass, {"safe": 0.0, "controversial": controversial, "unsafe": 1.0}) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("probability", "scale", "shift", "expected"),
    [
        (0.3, 1.0, 0.0, 0.3),
        (0.5, 3.0, 0.0, 0.5),
        (0.9, 2.0, 0.0, 81 / 82),
        (0.5, 1.0, math.log(9), 0.9),
        (0.5, 1.0, -math.log(9), 0.1),
        (0.0, 2.0, 5.0, 0.0),
        (1.0, 0.1, -5.0, 1.0),
        (1e-300, 100.0, 0.0, 0.0),
    ],
)
def test_a_score_is_calibrated_by_its_log_odds(probability: float, scale: float, shift: float, expected: float) -> None:
    assert calibrated(probability, scale, shift) == pytest.approx(expected, abs=1e-12)


def test_two_thresholds_of_a_model_become_the_two_that_rules_know() -> None:
    """The formula of docs/llm-guards.md: raw 0.2 shall be 0.5 and raw 0.95 shall be 0.9."""
    scale = math.log(9) / (math.log(0.95 / 0.05) - math.log(0.2 / 0.8))
    shift = -scale * math.log(0.2 / 0.8)
    assert (calibrated(0.2, scale, shift), calibrated(0.95, scale, shift)) == pytest.approx((0.5, 0.9))
