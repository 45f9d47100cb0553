"""Replaying exchanges by another policy: what is newly blocked, allowed, redacted, shown, and what cannot be said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from guardrails.check import Rate
from guardrails.conversation import judge_messages
from guardrails.engine import judge
from guardrails.policy import loads
from guardrails.replay import Exchange, Hidden, Replayed, as_json, hidden, render, replay
from guardrails.types import Action, Message

POLICY = """\
name = "desk"

[[input]]
name = "falcon"
validator = "patterns"
patterns = ["falcon"]
action = "refuse"
reply = "Not yet."

[[input]]
name = "cards"
validator = "personal"
kinds = ["card"]
action = "redact"

[[output]]
name = "mail"
validator = "personal"
kinds = ["email"]
action = "redact"

[[output]]
name = "powder"
validator = "patterns"
patterns = ["powder"]
action = "refuse"
reply = "No."
"""
CARD, MAIL = "4111 1111 1111 1111", "jane@example.com"
SAID = {
    "t-falcon": ("When does falcon start?", None),
    "t-eagle": ("When does eagle start?", "In May."),
    "t-card": (f"My card is {CARD}.", "Thank you."),
    "t-mail": ("Who helps?", f"Write to {MAIL}."),
    "t-powder": ("How?", "Mix the powder."),
    "t-plain": ("Hello", "Hello!"),
}


async def logged(source: str = POLICY) -> list[Exchange]:
    """The exchanges as this policy decided them."""
    policy, found = loads(source), []
    for id, (asked, draft) in SAID.items():
        messages = (Message("user", asked),)
        verdict, _ = await judge_messages(policy.input, messages)
        before, there = hidden(verdict.hits, 0), frozenset[int]()
        if draft is not None and not verdict.action.stops:
            said = await judge(policy.output, draft)
            verdict, there = max(said, verdict, key=lambda one: one.action), hidden(said.hits)
        found.append(Exchange(id, messages, 0, draft, verdict.action, verdict.rule, Hidden(before, there)))
    return found


async def replayed(old: str = "", new: str = "") -> Replayed:
    assert POLICY.count(old)
    return await replay(loads(POLICY.replace(old, new) if old else POLICY), await logged())


async def test_the_same_policy_changes_nothing() -> None:
    found = await replayed()
    assert {one.kind for one in found.outcomes} == {"same"} and not found.laxer
    assert found.rate("blocked") == Rate(0, 4) and found.rate("allowed") == Rate(0, 2)


@pytest.mark.parametrize(
    ("old", "new", "kind", "ids"),
    [
        ('["falcon"]', '["falcon", "eagle"]', "blocked", ["t-eagle"]),
        ('["powder"]', '["powder", "hello"]', "blocked", ["t-plain"]),
        ('["falcon"]', '["eagle"]', "allowed", ["t-falcon"]),
        ('["powder"]', '["dust"]', "allowed", ["t-powder"]),
        ('kinds = ["email"]', 'kinds = ["iban"]', "unredacted", ["t-mail"]),
        ('kinds = ["card"]', 'kinds = ["iban"]', "unredacted", ["t-card"]),
        (
            'validator = "personal"\nkinds = ["email"]',
            'validator = "patterns"\npatterns = ["jane@example.com", "thank"]',
            "redacted",
            ["t-card"],
        ),
        ('action = "refuse"\nreply = "No."', 'action = "append"\nreply = "No."', "allowed", ["t-powder"]),
        ('"Not yet."', '"Not yet."\nmode = "shadow"', "allowed", ["t-falcon"]),
    ],
)
async def test_what_changes_is_found_and_counted_by_its_kind(old: str, new: str, kind: str, ids: list[str]) -> None:
    found = await replayed(old, new)
    assert [one.id for one in found.of(kind)] == ids  # type: ignore[arg-type]
    assert found.laxer is (kind in ("allowed", "unredacted"))


async def test_a_redaction_that_covers_less_is_told_though_the_action_is_the_same() -> None:
    [turn] = [one for one in await logged() if one.id == "t-card"]
    both = replace(turn, hidden=Hidden(turn.hidden.asked | {0, 1}))
    found = await replay(loads(POLICY), [both])
    assert [one.kind for one in found.outcomes] == ["unredacted"]


async def test_what_never_reached_the_model_is_newly_allowed_and_marked() -> None:
    found = await replayed('["falcon"]', '["eagle"]')
    assert [(one.id, one.unasked) for one in found.of("allowed")] == [("t-falcon", True)]
    assert "of the newly allowed 1 never reached the model" in render(found)
    assert not (await replayed('["powder"]', '["dust"]')).of("allowed")[0].unasked


async def test_an_escalation_instead_of_a_refusal_is_a_change_and_neither_block_nor_pass() -> None:
    people = 'action = "escalate"\nroute = "people"\nreply = "Not yet."'
    source = (
        POLICY.replace('action = "refuse"\nreply = "Not yet."', people) + '[routes.people]\nqueue = "q"\ndue = "1h"\n'
    )
    found = await replay(loads(source), await logged())
    assert [(one.id, one.action) for one in found.of("changed")] == [("t-falcon", Action.ESCALATE)]
    assert not found.laxer


async def test_history_that_was_judged_before_does_not_block_again() -> None:
    said = (Message("user", "About falcon"), Message("assistant", "Well."), Message("user", "And now?"))
    known = Exchange("t", said, 2, "Fine.", Action.ALLOW, "")
    found = await replay(loads(POLICY), [known, replace(known, id="u", trusted=0)])
    assert [(one.id, one.kind) for one in found.outcomes] == [("t", "same"), ("u", "blocked")]


GRADED = """
[[output]]
name = "rude"
validator = "grader"
question = "Is it rude?"
action = "refuse"
reply = "No."
"""


class Rude:
    async def probability(self, messages: Sequence[Message]) -> float:
        return float("Hello!" in messages[-1].content)


async def test_what_a_rule_decided_that_cannot_be_asked_is_not_compared() -> None:
    turns = [*await logged(), Exchange("t-rude", (Message("user", "x"),), 0, "You!", Action.REFUSE, "rude")]
    found = await replay(loads(POLICY + GRADED), turns)
    assert (found.unchecked, found.left_out, len(found.outcomes)) == (("rude",), ("t-rude",), 6)
    assert "not compared, since such a rule decided them: 1 turns" in render(found)
    asked = await replay(loads(POLICY + GRADED), turns, Rude())
    assert asked.unchecked == () and [one.id for one in asked.of("blocked")] == ["t-plain"]
    assert [one.id for one in asked.of("allowed")] == ["t-rude"]


async def test_the_text_of_people_is_shown_only_when_it_is_asked_for() -> None:
    found = await replayed('["falcon"]', '["eagle"]')
    for shown in (render(found), json.dumps(as_json(found))):
        assert "t-falcon" in shown and "When does" not in shown
    for shown in (render(found, texts=True), json.dumps(as_json(found, texts=True))):
        assert "When does falcon start?" in shown


async def test_the_report_counts_rules_and_gives_intervals() -> None:
    found = await replayed('["falcon"]', '["eagle"]')
    text = render(found)
    assert text.splitlines()[0] == f"{found.policy} over 6 logged turns"
    assert "  newly blocked:      1 of 4 (25.0%, 95 % interval 4.6% to 69.9%)" in text
    assert "newly allowed, by rule:\n       1  falcon\n  t-falcon: refuse by falcon -> allow" in text
    assert "newly blocked, by rule:\n       1  falcon\n  t-eagle: allow -> refuse by falcon" in text
    assert "... and 1 more" in render(found, most=0)
    told = json.loads(json.dumps(as_json(found)))
    assert (told["allowed"]["rules"], told["allowed"]["total"]) == ({"falcon": 1}, 2)
