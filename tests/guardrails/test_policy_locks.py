"""What a policy may change of the rules that it extends, and what a lock keeps as it is."""

from __future__ import annotations

import pytest

from guardrails.changes import WrittenRule, changes
from guardrails.check import check
from guardrails.policy import Library, PolicyError, Resolved, Source, resolve
from guardrails.schema import RuleTable
from guardrails.types import Action, Message

HOUSE = """\
name = "house"

[parts]
cat = "cats?"

[[input]]
name = "no-pets"
validator = "patterns"
patterns = ["pets?", "{cat}"]
action = "refuse"
reply = "No pets."
scope = "user"
window = 3
locked = true

[[input]]
name = "cards"
validator = "personal"
kinds = ["card"]
action = "redact"
placeholder = "(card)"

[[output]]
name = "rude"
validator = "grader"
question = "Is it rude?"
mode = "shadow"
if_broken = "allow"
action = "refuse"
reply = "I will not say that."
locked = true

[routes.people]
queue = "people"
due = "1h"

[[example]]
ask = "my pet"
expect = "refuse"
rule = "no-pets"

[[example]]
ask = "It is 4111 1111 1111 1111"
expect = "redact"
rule = "cards"
becomes = "It is (card)"

[[example]]
ask = "my fish"
expect = "allow"
"""
LOCK = "house@1:14"


def child(said: str, *between: str) -> Resolved:
    """A policy that says this, extends those in between, and the house at last."""
    stored = {"house": Source("house@1", HOUSE)}
    parent = "house"
    for number, text in enumerate(between):
        name = f"floor{number}"
        stored[name] = Source(f"{name}@1", f'name = "{name}"\nextends = "{parent}"\n{text}')
        parent = name
    return resolve(Source("room.toml", f'name = "room"\nextends = "{parent}"\n{said}'), Library((), stored))


def problems(said: str, *between: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        child(said, *between)
    return [str(problem) for problem in caught.value.problems]


def change(key: str, name: str = "no-pets", stage: str = "input") -> str:
    return f'[[{stage}]]\nname = "{name}"\n{key}\n'


@pytest.mark.parametrize(
    "key",
    [
        'action = "escalate"\nroute = "people"',
        "threshold = 0.4",
        'if_broken = "escalate"\nroute = "people"',
        'scope = "all"\nwindow = 0',
        "window = 4",
        "window = 0",
        "budget = 0.1",
        "budget = 60",
        "views = true",
        "locked = true",
        'reply = "Another reply."',
        'patterns = ["pets?", "(?:cats?)"]',
        'validator = "patterns"',
    ],
)
def test_a_locked_rule_may_become_stricter(key: str) -> None:
    assert child(change(key)).policy.input[0].name == "no-pets"


@pytest.mark.parametrize(
    ("key", "said", "allowed"),
    [
        ('action = "redact"', 'action = "redact" is not stricter than "refuse"', "'refuse' or 'escalate'"),
        ("threshold = 0.6", "threshold = 0.6 is not stricter than 0.5", "0.5 or lower"),
        ('mode = "shadow"', 'mode = "shadow" is not stricter than "enforce"', "'enforce'"),
        ('if_broken = "allow"', 'if_broken = "allow" is not stricter than "refuse"', "'refuse' or 'escalate'"),
        ('scope = "last_user"\nwindow = 0', 'scope = "last_user" is not stricter than "user"', "'user' or 'all'"),
        ('scope = "assistant"\nwindow = 0', 'scope = "assistant" is not stricter than "user"', "'user' or 'all'"),
        ("window = 2", "window = 2 is not stricter than 3", "3 or more, or 0 for all"),
        ("views = false", "views = false is not stricter than true", "true"),
        ("locked = false", "locked = false is not stricter than true", "true"),
        ('patterns = ["pets?"]', 'patterns = ["pets?"] is not stricter than', "options as they are"),
        ('patterns = ["pets?", "(?:cats?)", "x"]', "is not stricter than", "options as they are"),
        ("ignore_case = false", "ignore_case = false is not stricter than none", "options as they are"),
        (
            'confirm = { validator = "patterns", patterns = ["x"] }',
            'confirm = ["patterns", {"patterns": ["x"]}] is not stricter than none',
            "no `confirm` but the one that is there",
        ),
    ],
)
def test_anything_else_is_an_error_that_says_what_is_locked_where_and_what_is_allowed(
    key: str, said: str, allowed: str
) -> None:
    [problem] = problems(change(key))
    assert problem.startswith(f"room.toml:5: rule 'no-pets' is locked ({LOCK}): ")
    assert (said in problem and problem.endswith(f"allowed is {allowed}")) or allowed in problem


def test_a_wider_scope_with_the_same_window_reaches_less_far_back() -> None:
    [problem] = problems(change('scope = "all"'))
    assert problem == (
        f"room.toml:3: rule 'no-pets' is locked ({LOCK}): window = 3 reaches less far back than before; "
        "allowed is 0, which is all of them"
    )


def test_where_a_late_validator_lets_the_text_through_its_time_may_not_be_cut() -> None:
    [problem] = problems(change("budget = 0.001", "rude", "output"))
    assert "budget = 0.001 is not stricter than 10.0; allowed is 10.0 or more" in problem
    assert child(change("budget = 20", "rude", "output")).policy.output[0].budget == 20
    both = 'budget = 0.001\nif_broken = "refuse"'
    assert child(change(both, "rude", "output")).policy.output[0].budget == 0.001


def test_a_shadow_rule_may_be_enforced_and_a_grader_confirmed_no_more_often() -> None:
    said = change('mode = "enforce"\nif_broken = "refuse"', "rude", "output")
    assert child(said).policy.output[0].mode == "enforce"
    [problem] = problems(change('every = "sentence"', "rude", "output"))
    assert 'every = "sentence" is not stricter than "text"' in problem


def test_a_locked_rule_cannot_be_removed_and_another_can_with_its_examples() -> None:
    assert problems('remove = ["no-pets"]\n') == [
        f"room.toml:3: rule 'no-pets' is locked ({LOCK}) and cannot be removed; leave it, or make it stricter"
    ]
    policy = child('remove = ["cards"]\n').policy
    assert [rule.name for rule in policy.input] == ["no-pets"]
    assert [example.text for example in policy.examples] == ["my pet", "my fish"]


def test_a_removed_rules_name_may_be_used_again_and_its_place_is_the_last() -> None:
    policy = child(f'remove = ["cards"]\n{change("", "first")}'.replace('name = "first"\n', FIRST)).policy
    assert [rule.name for rule in policy.input] == ["no-pets", "first", "cards"]
    assert [example.text for example in policy.examples] == ["my pet", "my fish"]


FIRST = """name = "first"
validator = "length"
max_words = 9
action = "refuse"
reply = "Too long."
[[input]]
name = "cards"
validator = "length"
max_words = 8
action = "refuse"
reply = "Too long."
"""


def test_the_locks_of_grandparents_hold_and_a_parent_may_add_its_own() -> None:
    stricter, laxer = change("threshold = 0.3"), change("threshold = 0.4")
    assert problems(laxer, stricter) == [
        f"room.toml:5: rule 'no-pets' is locked ({LOCK}): threshold = 0.4 is not stricter than 0.3; "
        "allowed is 0.3 or lower"
    ]
    locked = change("locked = true", "cards")
    assert child(change('placeholder = "x"', "cards"), locked).policy.input[1].placeholder == "x"
    [problem] = problems(change('kinds = ["email"]', "cards"), "", locked)
    assert "is locked (floor1@1:5): kinds" in problem
    [problem] = problems('remove = ["cards"]\n', locked, "")
    assert "is locked (floor0@1:5) and cannot be removed" in problem


def test_every_looser_change_is_told_at_once() -> None:
    said = change('threshold = 1.0\nviews = false\nmode = "shadow"')
    assert [problem.split(": ")[0] for problem in problems(said)] == [f"room.toml:{line}" for line in (5, 6, 7)]


async def test_an_unlocked_rule_may_be_changed_freely_key_by_key() -> None:
    policy = child(change('placeholder = "[gone]"\nkinds = ["card", "email"]\nmode = "enforce"', "cards")).policy
    [_, cards] = policy.input
    assert (cards.action, cards.placeholder, cards.scope) == (Action.REDACT, "[gone]", "all")
    found = await cards.validator.find("jane@example.com", context_of("x"))
    assert [finding.label for finding in found] == ["email"]
    assert [example.becomes for example in policy.examples if example.rule == "cards"] == [""]


def context_of(text: str):  # type: ignore[no-untyped-def]
    from guardrails.types import Context

    return Context((Message("user", text),))


async def test_the_examples_of_the_parent_expect_what_the_changed_rule_does() -> None:
    said = change('action = "escalate"\nroute = "people"') + change('action = "refuse"\nreply = "No cards."', "cards")
    found = child(said)
    assert [rule.placeholder for rule in found.policy.input] == ["", ""], "what only a redaction says is dropped"
    assert (await check(found.policy)).failures == ()
    expected = {example.text: example.expect for example in found.policy.examples}
    assert list(expected.values()) == [Action.ESCALATE, Action.REFUSE, Action.ALLOW]


def test_a_change_belongs_to_the_place_of_the_rule_and_a_new_rule_to_the_end() -> None:
    new = '[[input]]\nname = "new"\nvalidator = "length"\nmax_words = 9\naction = "refuse"\nreply = "Too long."\n'
    policy = child(new + change("threshold = 0.1")).policy
    assert [rule.name for rule in policy.input] == ["no-pets", "cards", "new"]


@pytest.mark.parametrize(
    ("said", "line", "what", "advice"),
    [
        (change('validator = "topics"'), 5, "is a rule of validator 'patterns' (house@1:6)", "`remove` takes this one"),
        (change("", stage="output"), 4, "is an input rule (house@1:6)", "write [[input]]"),
        (change("threshold = 0.1", "no-petz"), 4, "no policy that is extended has a rule of this name", "'no-pets'?"),
        (change("threshold = 0.1", "other"), 4, "has no 'validator', and no policy", "add validator"),
        (change("paterns = []"), 5, "unknown key 'paterns'", "did you mean 'patterns'?"),
        (change('reply = " "'), 5, "has no reply", "with what to say"),
        (change("threshold = 3"), 5, "'threshold'", "correct this value"),
        (change('patterns = ["{cat}"]', "cards"), 5, "no part {cat}", "[parts]"),
        (change("threshold = 0.3") * 2, 7, "name of another rule (house@1:6)", "a name of its own"),
        ('remove = ["no-petz"]\n', 3, "which no policy that it extends has", "did you mean 'no-pets'?"),
    ],
)
def test_what_is_wrong_with_a_change_is_said_at_the_child(said: str, line: int, what: str, advice: str) -> None:
    found = problems(said)
    assert any(
        problem.startswith(f"room.toml:{line}: ") and what in problem and advice in problem for problem in found
    ), found


def test_a_mistake_of_the_parent_is_told_once_and_at_the_parent() -> None:
    stored = {"house": Source("house@1", HOUSE.replace('scope = "user"', 'scope = "usr"'))}
    with pytest.raises(PolicyError) as caught:
        resolve(Source("room", f'name = "room"\nextends = "house"\n{change("threshold = 0.1")}'), Library((), stored))
    assert [str(one) for one in caught.value.problems] == [
        "house@1:12: rule 'no-pets' has scope = 'usr'; did you mean 'user'?"
    ]


PLAIN = RuleTable(name="r", validator="patterns", action="refuse")


@pytest.mark.parametrize("key", [key for key in RuleTable.model_fields if key not in ("name", "validator", "confirm")])
def test_a_change_and_its_undoing_go_opposite_ways(key: str) -> None:
    other: dict[str, object] = {
        "action": "redact", "reply": "x", "route": "x", "scope": "user", "window": 3, "threshold": 0.9, "sure": 0.1,
        "placeholder": "x", "vault": True, "views": False, "every": "sentence", "if_broken": "allow", "mode": "shadow",
        "budget": 1.0, "locked": True,
    }  # fmt: skip
    before = WrittenRule("input", PLAIN, {})
    after = WrittenRule("input", PLAIN.model_copy(update={key: other[key]}), {})
    (there,) = [one for one in changes(before, after) if one.key == key]
    (back,) = [one for one in changes(after, before) if one.key == key]
    opposite = {"stricter": "looser", "looser": "stricter", "other": "other", "wording": "wording"}
    assert back.way == opposite[there.way]
    assert (there.before, there.after) == (back.after, back.before)
