"""What two policies say differently: which rules are stricter, which looser, and what else."""

from __future__ import annotations

import json

import pytest

from guardrails.diff import Diff, as_json, diff, render
from guardrails.policy import Library, Source, resolve
from tests.guardrails.test_policy_locks import HOUSE


def between(before: str, after: str) -> Diff:
    return diff(*(resolve(Source("desk.toml", text), Library()) for text in (before, after)))


def lines(old: str, new: str) -> list[str]:
    assert HOUSE.count(old) >= 1
    return render(between(HOUSE, HOUSE.replace(old, new, 1))).splitlines()[1:]


def test_the_same_policy_has_no_difference() -> None:
    found = between(HOUSE, f"# A comment.\n{HOUSE}")
    assert found.same and render(found) == f"{found.before} and {found.after} say the same"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            'action = "refuse"\nreply = "No pets."',
            'action = "escalate"\nroute = "people"\nreply = "No pets."',
            [
                "input rule no-pets: changed, stricter",
                '  action: "refuse" -> "escalate" (stricter)',
                '  route: "" -> "people"',
            ],
        ),
        ("window = 3", "window = 1", ["input rule no-pets: changed, looser", "  window: 3 -> 1 (looser)"]),
        (
            'reply = "No pets."',
            'reply = "None."',
            ["input rule no-pets: changed", "  reply:", "    - No pets.", "    + None."],
        ),
        (
            '["pets?", "{cat}"]',
            '["dogs?", "{cat}"]',
            [
                "input rule no-pets: changed, may be stricter or looser",
                "  patterns:",
                '    - "pets?"',
                '    + "dogs?"',
            ],
        ),
        (
            "window = 3",
            "window = 0\nthreshold = 0.8",
            [
                "input rule no-pets: changed, may be stricter or looser",
                "  window: 3 -> 0 (stricter)",
                "  threshold: 0.5 -> 0.8 (looser)",
            ],
        ),
        (
            'mode = "shadow"',
            'confirm = { validator = "language", allow = ["en"] }',
            [
                "output rule rude: changed, may be stricter or looser",
                '  mode: "shadow" -> "enforce" (stricter)',
                '  confirm: (not set) -> ["language", {"allow": ["en"]}] (looser)',
            ],
        ),
        (
            'due = "1h"',
            'due = "2h"',
            ["route changed: people: people, normal, within 3600 s -> people, normal, within 7200 s"],
        ),
        ('name = "house"', 'name = "house"\npersona = "Be kind."', ["persona:", "    + Be kind."]),
        ('ask = "my fish"', 'ask = "my eel"', ["example removed: ask: my fish", "example added: ask: my eel"]),
        (
            'ask = "my fish"\nexpect = "allow"',
            'ask = "my fish"\nexpect = "refuse"\nrule = "no-pets"',
            ["example changed: ask: my fish: allow -> refuse by no-pets"],
        ),
        (
            'name = "cards"\nvalidator = "personal"\nkinds = ["card"]',
            'name = "cards"\nvalidator = "secrets"',
            ["input rule cards: removed, looser", "input rule cards: added, stricter"],
        ),
    ],
)  # fmt: skip
def test_a_change_is_told_with_its_way(old: str, new: str, said: list[str]) -> None:
    assert lines(old, new) == said


def test_a_rule_more_is_stricter_and_a_rule_less_looser() -> None:
    rule = '[[output]]\nname = "mail"\nvalidator = "personal"\naction = "redact"\n'
    more, less = between(HOUSE, HOUSE + rule), between(HOUSE + rule, HOUSE)
    assert [(one.rule, one.kind, one.way) for one in more.rules] == [("mail", "added", "stricter")]
    assert [(one.rule, one.kind, one.way) for one in less.rules] == [("mail", "removed", "looser")]
    idle = between(HOUSE, f'{HOUSE}{rule}mode = "shadow"\n')
    assert [(one.kind, one.way) for one in idle.rules] == [("added", "wording")]


def test_another_order_of_rules_is_told() -> None:
    rules = [
        f'[[output]]\nname = "{name}"\nvalidator = "personal"\naction = "redact"\n' for name in ("one", "two", "three")
    ]
    head = 'name = "x"\n'
    found = between(head + "".join(rules), head + "".join([rules[1], rules[0], rules[2]]))
    assert "one" in [one.rule for one in found.rules if one.kind == "moved"]
    assert render(found).splitlines()[1].endswith(": moved")


def test_the_difference_for_programs() -> None:
    told = json.loads(json.dumps(as_json(between(HOUSE, HOUSE.replace("window = 3", "window = 1")))))
    assert told["same"] is False
    [rule] = told["rules"]
    assert rule["changes"] == [{"key": "window", "before": 3, "after": 1, "way": "looser"}]
