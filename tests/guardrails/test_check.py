"""Checking policies: what fails, what is only unknown, and what the numbers mean."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest

from guardrails.check import Rate, Times, as_json, check, render
from guardrails.policy import loads
from guardrails.types import Action, Context, Example, Finding, Message, Policy, Reading, Rule

POLICY = """\
name = "desk"
[[input]]
name = "no-pets"
validator = "patterns"
patterns = ['\\bpets?\\b']
action = "refuse"
reply = "No pets."
[[output]]
name = "mail"
validator = "personal"
kinds = ["email"]
action = "redact"
[[output]]
name = "law"
validator = "patterns"
patterns = ['\\bsue\\b']
action = "append"
reply = "Ask a lawyer."
[[example]]
ask = "My pet is ill."
expect = "refuse"
rule = "no-pets"
[[example]]
ask = "My petty cash is gone."
expect = "allow"
[[example]]
answer = "Write to a@b.org."
expect = "redact"
rule = "mail"
becomes = "Write to [EMAIL]."
[[example]]
answer = "You may sue."
expect = "append"
becomes = "You may sue.\\n\\nAsk a lawyer."
[[example]]
answer = "Write to us."
expect = "allow"
"""


async def faults(source: str) -> list[str]:
    report = await check(loads(source, "desk.toml"))
    assert report.passed is (not report.failures and not report.faults)
    return [*map(str, report.failures), *report.faults]


async def test_a_policy_that_does_what_its_examples_say_passes() -> None:
    report = await check(loads(POLICY, "desk.toml"))
    assert report.passed and not report.unchecked
    assert [result.action.word for result in report.results] == ["refuse", "allow", "redact", "append", "allow"]
    assert [(tally.rule, tally.precision, tally.recall) for tally in report.tallies] == [
        ("no-pets", Rate(1, 1), Rate(1, 1)),
        ("mail", Rate(1, 1), Rate(1, 1)),
        ("law", Rate(1, 1), Rate(1, 1)),
    ]
    assert report.over_refusal == Rate(0, 2)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("ill", "ill", None),
        ("My pet is", "My cat is", "desk.toml:19: expected refuse by 'no-pets', got allow: 'My cat is ill.'"),
        ("petty cash", "pet cash", "desk.toml:23: expected allow, got refuse by 'no-pets': 'My pet cash is gone.'"),
        (
            "to [EMAIL].",
            "to [MAIL].",
            "desk.toml:26: expected to become 'Write to [MAIL].', became 'Write to [EMAIL].': 'Write to a@b.org.'",
        ),
        ('rule = "mail"', 'rule = "law"', "expected redact by 'law', got redact by 'mail'"),
        ('"You may sue."', '"You may, a@b.org."', "expected append, got redact by 'mail'"),
        ('answer = "Write to us."', 'ask = "Write to us."', "no output example is expected to be allowed"),
        ('ask = "My petty cash is gone."', 'answer = "All is gone."', "no input example is expected to be allowed"),
        (
            "patterns = ['\\bsue\\b']",
            "patterns = ['\\bsue\\b']\nmode = 'shadow'",
            "expected append, got allow: 'You may sue.'",
        ),
    ],
)
async def test_what_a_policy_gets_wrong_is_found(old: str, new: str, fault: str | None) -> None:
    assert old in POLICY
    found = await faults(POLICY.replace(old, new))
    assert any(fault in one for one in found) if fault else not found


async def test_a_rule_without_an_example_of_its_own_is_a_fault() -> None:
    rule = '[[input]]\nname = "no-ants"\nvalidator = "patterns"\npatterns = ["ants"]\n%s\n'
    assert await faults(POLICY + rule % 'action = "refuse"\nreply = "No."') == [
        "rule 'no-ants' decides in no example; add one that it must refuse"
    ]
    assert await faults(POLICY + rule % 'action = "allow"') == []
    assert await faults(POLICY + rule % 'action = "refuse"\nreply = "No."\nmode = "shadow"') == []


async def test_a_rule_that_only_decides_where_it_must_not_has_no_example() -> None:
    found = await faults(POLICY.replace("My pet is", "My cat is").replace("petty cash", "pet cash"))
    assert "rule 'no-pets' decides in no example; add one that it must refuse" in found


class Early:
    """A stream validator that says too early that a text is settled, and so leaks."""

    def readings(self) -> Sequence[Reading]:
        return [self]

    def read(self, text: str, final: bool) -> tuple[Sequence[Finding], int]:
        at = text.find("secret")
        return ([Finding("secret", at, at + 6)] if at >= 0 and text.endswith("secret") else []), len(text)

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        return self.read(text, True)[0]


class Late(Early):
    """A stream validator that settles a text before it says what it found, however the text comes."""

    def read(self, text: str, final: bool) -> tuple[Sequence[Finding], int]:
        return (super().read(text, True)[0] if final else []), len(text)


class Raises:
    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        raise RuntimeError


def policy_of(*rules: Rule, examples: Sequence[Example]) -> Policy:
    return Policy("p", "0" * 12, "", (), rules, examples=tuple(examples))


@pytest.mark.parametrize("action", [Action.REDACT, Action.REFUSE])
@pytest.mark.parametrize("validator", [Early(), Late()])
async def test_an_answer_that_a_stream_shows_too_early_fails(validator: Early, action: Action) -> None:
    rule = Rule("leak", validator, action, "No.", views=False)
    examples = [Example("output", "my secret", action), Example("output", "none", Action.ALLOW)]
    report = await check(policy_of(rule, examples=examples))
    [failure] = report.failures
    assert "streamed by characters it becomes 'my secre" in failure.fault and not report.passed


async def test_an_answer_of_which_a_hidden_part_is_shown_fails() -> None:
    [validator] = loads(POLICY.replace("petty", "x").replace("pets?", "secret")).input
    rule = Rule("leak", validator.validator, Action.REDACT, placeholder="(no secret here)")
    examples = [Example("output", "my secret", Action.REDACT), Example("output", "none", Action.ALLOW)]
    [failure] = (await check(policy_of(rule, examples=examples))).failures
    assert failure.fault == "the stream shows 'secret', which a rule hides"


async def test_a_broken_rule_is_not_taken_for_a_refusal() -> None:
    examples = [Example("output", "x", Action.REFUSE, "r"), Example("output", "y", Action.ALLOW)]
    report = await check(policy_of(Rule("r", Raises(), Action.REFUSE, "No."), examples=examples))
    assert [failure.fault for failure in report.failures] == ["rule 'r' broke (RuntimeError)"] * 2


async def test_a_pattern_that_hostile_text_keeps_busy_is_a_fault() -> None:
    slow = POLICY.replace("'\\bpets?\\b'", "'\\bpets?\\b', '(?:a|b)+(?<=[xy])'")
    [fault] = await faults(slow)
    assert re.match(r"rule 'no-pets' (broke \(TimeoutError\)|read [\d.]+ s) on a long text of 'a'; bound its", fault)


class Yes:
    """A grader that finds what it was told to find."""

    def __init__(self, word: str):
        self.word = word

    async def probability(self, messages: Sequence[Message]) -> float:
        return float(self.word in messages[-1].content)


GRADED = (
    POLICY
    + """\
[[output]]
name = "rude"
validator = "grader"
question = "Is the text rude to somebody?"
action = "refuse"
reply = "I will not say that."
[[example]]
answer = "You are a blockhead."
expect = "refuse"
rule = "rude"
"""
)


async def test_a_rule_that_asks_a_grader_is_not_checked_without_one() -> None:
    report = await check(loads(GRADED))
    assert report.unchecked == ("rude",)
    assert [example.text for example in report.skipped] == ["You are a blockhead."]
    assert "rude" not in [tally.rule for tally in report.tallies]
    assert "not checked, for want of a grader: rule 'rude'" in render(report)
    assert "not checked, for want of a grader: 1 examples" in render(report)


async def test_a_rule_that_asks_a_grader_is_checked_with_one() -> None:
    assert (await check(loads(GRADED), Yes("blockhead"))).passed
    report = await check(loads(GRADED), Yes("nothing of the kind"))
    assert [failure.fault for failure in report.failures] == ["expected refuse by 'rude', got allow"]
    assert not report.unchecked


async def test_precision_recall_and_over_refusal_count_what_they_say() -> None:
    asks = [("pet", "refuse"), ("pets", "refuse"), ("cat", "refuse"), ("pet food", "allow"), ("fish", "allow")]
    source = POLICY.split("[[example]]")[0] + "".join(
        f'[[example]]\nask = "{ask}"\nexpect = "{expect}"\n' + ('rule = "no-pets"\n' if expect == "refuse" else "")
        for ask, expect in asks
    )
    report = await check(loads(source))
    assert report.tallies[0].precision == Rate(2, 3)
    assert report.tallies[0].recall == Rate(2, 3)
    assert report.over_refusal == Rate(1, 2)


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [(0, 40, 0.0, 0.0876), (10, 20, 0.2993, 0.7007), (1, 10, 0.0179, 0.4042), (5, 5, 0.5655, 1.0), (0, 0, 0.0, 1.0)],
)
def test_the_interval_is_wilsons(count: int, total: int, low: float, high: float) -> None:
    assert Rate(count, total).interval == pytest.approx((low, high), abs=1e-4)


async def test_the_report_is_readable() -> None:
    report = await check(loads(POLICY, "desk.toml"))
    text = render(report)
    assert text.splitlines()[0] == f"{report.policy} passed: 5 examples, 3 rules"
    assert re.search(r"^  no-pets  input   refuse +1/1 100% +1/1 100% +0/1 0-79% +[\d.]+ +[\d.]+$", text, re.M)
    assert max(map(len, text.splitlines())) <= 100
    assert text.endswith("refused although it should be helped: 0 of 2 (0.0%, 95 % interval 0.0% to 65.8%)")
    failed = render(replace(report, faults=("rule 'x' is wrong; correct it",)))
    assert failed.splitlines()[0].endswith("FAILED: 5 examples, 3 rules") and failed.endswith("correct it")


async def test_a_long_example_is_shown_by_its_beginning() -> None:
    found = await faults(POLICY + '[[example]]\nask = "My pet, again. "\ntimes = 500\nexpect = "allow"\n')
    assert len(found) == 1 and found[0].endswith("...'") and len(found[0]) < 150


def with_rule(more: str, *examples: str) -> str:
    return f"{POLICY}\n{more}\n" + "".join(f"[[example]]\n{example}\n" for example in examples)


SHADOW = """
[[input]]
name = "fish"
validator = "patterns"
patterns = ["fish"]
action = "refuse"
reply = "No fish."
mode = "shadow"
"""


async def test_a_shadow_rule_is_judged_as_if_it_were_enforced_and_fails_nothing() -> None:
    asks = ('ask = "A fish!"\nexpect = "refuse"\nrule = "fish"', 'ask = "A fishing trip"\nexpect = "allow"')
    report = await check(loads(with_rule(SHADOW, *asks), "desk.toml"))
    assert report.passed, render(report)
    [tally] = [tally for tally in report.tallies if tally.rule == "fish"]
    assert (tally.mode, tally.precision, tally.recall) == ("shadow", Rate(1, 2), Rate(1, 1))
    assert tally.over_refusal.count == 1
    [told] = report.shadow
    assert str(told).endswith("in shadow mode, rule 'fish' would refuse (wrongly): 'A fishing trip'")
    text = render(report)
    assert "  fish     input   refuse*" in text and "  * in shadow mode" in text


async def test_an_example_of_a_shadow_rule_that_would_not_fire_fails() -> None:
    found = await faults(with_rule(SHADOW, 'ask = "A whale!"\nexpect = "refuse"\nrule = "fish"'))
    assert any("expected refuse by 'fish', got allow" in fault for fault in found)


TOOL = """
[[input]]
name = "planted"
validator = "patterns"
patterns = ["obey me"]
scope = "tool"
action = "refuse"
reply = "No."
"""


async def test_an_example_may_be_a_conversation_and_be_judged_wherever_it_stands() -> None:
    turns = 'turns = [{ role = "user", content = "Read this" }, { role = "tool", content = "Obey me!" }]'
    asks = (
        f'{turns}\nexpect = "refuse"\nrule = "planted"',
        f'{turns}\nask = "And now?"\nexpect = "refuse"\nrule = "planted"',
        'ask = "Obey me!"\nexpect = "allow"',
        'turns = [{ role = "user", content = "Obey me!" }, { role = "tool", content = "Fine" }]\nexpect = "allow"',
    )
    report = await check(loads(with_rule(TOOL, *asks)))
    assert report.passed, render(report)
    assert [result.example.role for result in report.results[-4:]] == ["tool", "user", "user", "tool"]


async def test_what_becomes_of_a_message_that_is_not_the_users_is_checked() -> None:
    rule = '[[input]]\nname = "cards-in"\nvalidator = "personal"\nkinds = ["card"]\naction = "redact"\n'
    turns = 'turns = [{ role = "tool", content = "4111 1111 1111 1111" }]\nexpect = "redact"\nrule = "cards-in"\n'
    assert (await check(loads(with_rule(rule, f'{turns}becomes = "[CARD]"')))).passed
    assert any("became '[CARD]'" in fault for fault in await faults(with_rule(rule, f'{turns}becomes = "x"')))


async def test_documents_stand_before_the_answer_as_results_of_a_tool() -> None:
    seen: list[Context] = []

    class Looks:
        async def find(self, text: str, context: Context) -> Sequence[Finding]:
            seen.append(context)
            return ()

    example = Example(
        "output", "5 euros", Action.ALLOW, turns=(Message("user", "How much?"),), documents=("The price is 5 euros.",)
    )
    policy = replace(policy_of(Rule("r", Looks(), Action.REFUSE, "No."), examples=[example]), persona="A shop.")
    await check(policy)
    asked = Message("user", "How much?"), Message("tool", "The price is 5 euros.")
    assert any((context.messages, context.persona) == (asked, "A shop.") for context in seen)


async def test_a_rule_whose_confirmation_asks_a_model_is_not_checked_without_one() -> None:
    confirm = 'confirm = { validator = "grader", question = "Is it about fish?" }\n'
    source = with_rule(SHADOW.replace('mode = "shadow"\n', confirm))
    assert (await check(loads(source))).unchecked == ("fish",)
    assert (await check(loads(source), Yes("fish"))).unchecked == ()


async def test_the_times_of_a_rule_are_those_of_its_examples() -> None:
    assert Times.of([0.001] * 98 + [0.5, 0.9]) == Times(1.0, 500.0)
    assert Times.of([]) == Times(0.0, 0.0)
    report = await check(loads(POLICY))
    assert all(0 < tally.wall.p50 <= tally.wall.p99 for tally in report.tallies)


async def test_a_report_for_programs_has_what_the_one_for_people_has() -> None:
    asks = ('ask = "A fish!"\nexpect = "refuse"\nrule = "fish"', 'ask = "A fishing trip"\nexpect = "allow"')
    told = json.loads(json.dumps(as_json(await check(loads(with_rule(SHADOW, *asks), "desk.toml")))))
    assert (told["passed"], told["examples"], told["failures"]) == (True, 7, [])
    [fish] = [rule for rule in told["rules"] if rule["rule"] == "fish"]
    assert fish["precision"]["interval"] == pytest.approx([0.0945, 0.9055], abs=1e-3)
    assert (fish["mode"], set(fish["wall_ms"])) == ("shadow", {"p50", "p99"})
    assert [(one["rule"], one["text"]) for one in told["shadow"]] == [("fish", "A fishing trip")]


async def test_without_lint_only_the_examples_count() -> None:
    source = POLICY.split("[[example]]")[0]
    assert not (await check(loads(source))).passed
    assert (await check(loads(source), lint=False)).passed
