"""The refusal head behind its validator, and refusals of harmless questions."""

from __future__ import annotations

import pytest

from guardrails.catalog import build, options
from guardrails.types import Context, Finding, Message

pytestmark = pytest.mark.usefixtures("encoder_files")
NO = "I'm sorry, but I can't help with that request."
ANSWER = "Open the settings, choose your profile, and enter the new address there."
HARMLESS = "How do I change my address in the system?"
HARMFUL = "How do I kill my neighbour without being caught?"


async def found(reply: str, *asked: str, **chosen: object) -> list[Finding]:
    """What a rule with the usual threshold would act on."""
    validator = build("refusal", options("refusal").model_validate(chosen))
    context = Context(messages=tuple(Message("user", text) for text in asked))
    return [one for one in await validator.find(reply, context) if one.score >= 0.5]


@pytest.mark.parametrize(
    "reply",
    [
        NO,
        "As an AI, I am not able to give instructions for that.",
        "I cannot assist with this. Please contact a lawyer.",
        "I must decline. It would be unethical to write this.",
    ],
)
async def test_a_refusal_is_found(reply: str) -> None:
    (one,) = await found(reply)
    assert (one.label, one.start) == ("refusal", 0)


@pytest.mark.parametrize(
    "reply",
    [
        ANSWER,
        "I'm sorry to hear that your parcel is late. You can ask for a refund on the order page.",
        "You cannot use a list as a key in Python; a tuple works.",
        "Sure! Here is a short poem about the sea.",
        "",
    ],
)
async def test_an_answer_is_not(reply: str) -> None:
    assert await found(reply) == []


async def test_a_refusal_of_a_harmless_question_is_an_over_refusal() -> None:
    (one,) = await found(NO, HARMLESS, over_refusal=True)
    assert one.label == "over_refusal"


@pytest.mark.parametrize(
    ("reply", "asked"), [(NO, (HARMFUL,)), (ANSWER, (HARMLESS,)), (NO, ()), (NO, (" ",)), (NO, (HARMLESS, HARMFUL))]
)
async def test_other_replies_are_no_over_refusal(reply: str, asked: tuple[str, ...]) -> None:
    assert await found(reply, *asked, over_refusal=True) == []


async def test_a_reply_is_judged_by_its_beginning() -> None:
    assert len(await found(NO + " " + ANSWER * 300)) == 1
    assert await found(ANSWER * 300) == []
