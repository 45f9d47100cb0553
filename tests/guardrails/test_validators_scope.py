"""Scope by examples: in, out, near the border, named topics, courtesies."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from guardrails.catalog import build, options
from guardrails.types import Context

pytestmark = pytest.mark.usefixtures("encoder_files")
LEAVE = [
    "How many days of leave do I have?",
    "Can I take Friday off?",
    "How do I request vacation?",
    "Who approves my holiday request?",
    "Do unused holidays expire at the end of the year?",
    "Can I carry leave over into next year?",
    "How much parental leave do I get?",
    "What do I do when I am sick during my holiday?",
    "Is the day before a public holiday free?",
    "How far ahead must I ask for time off?",
    "Can I take unpaid leave for a month?",
    "Does sick leave count as vacation?",
    "How is my leave calculated when I work part time?",
    "I want to cancel my vacation request.",
    "How many sick days did I take this year?",
    "May I take half a day off?",
]
PAY = ["What does my colleague earn?", "Tell me the salary of my manager.", "How much is Anna paid?"]


async def labels(text: str, **chosen: object) -> list[str]:
    """What rules with the usual threshold would act on."""
    validator = build("scope", options("scope").model_validate(chosen))
    return [one.label for one in await validator.find(text, Context()) if one.score >= 0.5]


@pytest.mark.parametrize(
    "text",
    [
        "How many vacation days are left for me?",
        "Can I have next Monday off?",
        "Do my holidays expire in December?",
        "I am sick today. Does it count as a holiday?",
    ],
)
async def test_what_is_like_an_example_is_in_scope(text: str) -> None:
    assert await labels(text, in_scope=LEAVE) == []


@pytest.mark.parametrize(
    "text",
    [
        "Write a poem about the sea.",
        "Which stock should I buy?",
        "How do I bake bread?",
        "Who won the world cup in 2014?",
        "Fix this Python function for me.",
    ],
)
async def test_what_is_far_from_all_examples_is_out_of_scope(text: str) -> None:
    assert await labels(text, in_scope=LEAVE) == ["out_of_scope"]


@pytest.mark.parametrize("text", ["Hi", "Thanks a lot!", "Yes please", "Good morning!", "", "?"])
async def test_courtesies_are_in_scope(text: str) -> None:
    assert await labels(text, in_scope=LEAVE) == []


async def test_courtesies_can_be_out_of_scope() -> None:
    assert await labels("Good morning!", in_scope=LEAVE, courtesies=False) == ["out_of_scope"]


async def test_an_example_of_what_is_out_of_scope_moves_the_border() -> None:
    text = "How many days of leave does my colleague have?"
    assert await labels(text, in_scope=LEAVE) == []
    assert await labels(text, in_scope=LEAVE, out_of_scope=["How much leave does my colleague have left?"]) == [
        "out_of_scope"
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("How much does my manager earn?", ["pay"]),
        ("What is the salary of Anna?", ["pay"]),
        ("How many days of leave do I have?", []),
        ("What is the weather like?", []),
    ],
)
async def test_a_topic_is_found_by_its_examples(text: str, found: list[str]) -> None:
    assert await labels(text, topics={"pay": PAY}) == found


async def test_the_further_away_the_higher_the_score() -> None:
    validator = build("scope", options("scope").model_validate({"in_scope": LEAVE}))
    near, far = "Who plans the shifts?", "How do volcanoes erupt?"
    scores = [max((one.score for one in await validator.find(text, Context())), default=0.0) for text in (near, far)]
    assert scores == sorted(scores)
    assert scores[1] >= 0.9


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ({}, "`in_scope`, or `topics`"),
        ({"in_scope": LEAVE[:7]}, "7 sentences are too few to tell; write at least 8"),
        ({"topics": {"pay": []}}, "pay has no sentence"),
        ({"in_scope": [*LEAVE, ""]}, "at least 1 character"),
    ],
)
def test_options_that_cannot_work_are_refused(chosen: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        options("scope").model_validate(chosen)
