"""The JSON Schema for editors: what a policy may say passes, and a typo does not."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from guardrails import catalog
from guardrails.policy import SHIPPED, PolicyError, loads
from guardrails.schema import RuleTable, json_schema
from tests.guardrails.test_policy_locks import HOUSE

SCHEMA = Draft202012Validator(json_schema())
DESK = """\
name = "desk"

[[input]]
name = "no-pets"
validator = "patterns"
patterns = ["pets?"]
action = "refuse"
reply = "No pets."
confirm = { validator = "language", allow = ["en"] }
sure = 0.8
scope = "tool"
window = 2

[[input]]
name = "cards"
validator = "personal"
kinds = ["card"]
action = "redact"
vault = true

[[output]]
name = "about"
validator = "topics"
action = "append"
reply = "Ask a lawyer."
[[output.topics]]
name = "law"
words = ["lawsuit"]

[routes.people]
queue = "people"
due = "15m"

[[example]]
ask = "my pet"
turns = [{ role = "user", content = "Hello" }, { role = "assistant", content = "Hello!" }]
expect = "refuse"
rule = "no-pets"

[[example]]
turns = [{ role = "tool", content = "my pet" }]
expect = "refuse"

[[example]]
answer = "It is 5 euros."
documents = ["The price is 5 euros."]
expect = "allow"
"""
KID = 'name = "kid"\nextends = "base"\nremove = ["too-long"]\n[[input]]\nname = "injection"\nthreshold = 0.4\n'


def wrong(source: str) -> list[str]:
    return [error.message for error in SCHEMA.iter_errors(tomllib.loads(source))]


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA.schema)
    assert SCHEMA.schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.toml")), ids=lambda file: file.stem)
def test_every_shipped_policy_is_valid(file: Path) -> None:
    assert wrong(file.read_text()) == []


@pytest.mark.parametrize("source", [DESK, HOUSE, KID])
def test_what_the_loader_takes_the_schema_takes(source: str) -> None:
    loads(source)
    assert wrong(source) == []


TYPOS = [
    ("", 'personna = "x"\n'),
    ('name = "desk"', 'name = "My Desk"'),
    ('name = "desk"\n', ""),
    ("[[input]]\nname", "[[inputs]]\nname"),
    ('"patterns"', '"paterns"'),
    ("patterns = [", "pattern = ["),
    ('patterns = ["pets?"]', 'patterns = "pets?"'),
    ('action = "refuse"', 'action = "refuze"'),
    ('reply = "No pets."', 'replly = "No pets."'),
    ('reply = "No pets."\n', ""),
    ('reply = "No pets."', "reply = 3"),
    ('scope = "tool"', 'scope = "tools"'),
    ("window = 2", "window = -1"),
    ("window = 2", 'window = "2"'),
    ("sure = 0.8", "sure = 1.8"),
    ("sure = 0.8", "threshold = 2"),
    ("sure = 0.8", 'mode = "shade"'),
    ("sure = 0.8", 'if_broken = "redact"'),
    ("sure = 0.8", "budget = 0"),
    ("sure = 0.8", 'views = "yes"'),
    ("sure = 0.8", 'every = "word"'),
    ("sure = 0.8", "locked = 1"),
    ('{ validator = "language", allow', '{ validator = "languages", allow'),
    ('allow = ["en"]', 'alow = ["en"]'),
    ('{ validator = "language", ', "{ "),
    ('kinds = ["card"]', 'kinds = ["cards"]'),
    ('kinds = ["card"]', 'kind = ["card"]'),
    ("vault = true", 'vault = "yes"'),
    ('action = "append"', 'action = "append"\nscope = "all"'),
    ('action = "append"', 'action = "append"\nvault = true'),
    ('words = ["lawsuit"]', 'word = ["lawsuit"]'),
    ('due = "15m"', 'due = "15"'),
    ('due = "15m"', "due = 15"),
    ('queue = "people"\n', ""),
    ('queue = "people"', 'queue = "people"\npriority = "urgnt"'),
    ('ask = "my pet"', 'asks = "my pet"'),
    ('ask = "my pet"', 'ask = "my pet"\nanswer = "x"'),
    ('role = "user"', 'role = "usr"'),
    ("content = ", "contents = "),
    ('expect = "allow"', 'expect = "alow"'),
    ('expect = "allow"', 'expect = "allow"\ntimes = 0'),
    ('documents = ["The price is 5 euros."]', 'documents = "The price is 5 euros."'),
    ('validator = "topics"\n', ""),
]


@pytest.mark.parametrize(("old", "new"), TYPOS, ids=[f"{old!r} {new!r}" for old, new in TYPOS])
def test_a_typo_is_found_by_the_schema_and_by_the_loader(old: str, new: str) -> None:
    assert DESK.count(old) >= 1
    source = DESK.replace(old, new, 1) if old else new + DESK
    assert source != DESK and wrong(source)
    with pytest.raises(PolicyError):
        loads(source)


@pytest.mark.parametrize(("old", "new"), [("threshold", "treshold"), ("0.4", "4"), ('extends = "base"\n', "")])
def test_a_typo_in_a_change_of_a_parents_rule_is_found(old: str, new: str) -> None:
    assert wrong(KID.replace(old, new))


def test_a_typo_is_said_as_such() -> None:
    """Not as "valid under none of the schemas", which is what an editor says of alternatives."""
    said = wrong(DESK.replace("kinds =", "kind ="))
    assert said == ["Additional properties are not allowed ('kind' was unexpected)"]


def branches(stage: str) -> dict[str, Any]:
    rules = [one for one in SCHEMA.schema["$defs"][stage]["allOf"] if "properties" in one["if"]]
    named = [one for one in rules if "validator" in one["if"]["properties"]]
    return {one["if"]["properties"]["validator"]["const"]: one["then"] for one in named}


def test_every_key_explains_itself_and_every_validator_is_there() -> None:
    keys: dict[str, Any] = SCHEMA.schema["$defs"]["input"]["properties"]
    assert [key for key in RuleTable.model_fields if not keys[key].get("description")] == []
    assert list(branches("input")) == catalog.names()
    for name, branch in branches("output").items():
        assert set(catalog.options(name).model_fields) <= set(branch["properties"]), name


def test_a_validator_that_judges_a_whole_text_offers_no_redaction() -> None:
    offered = branches("output")
    assert "redact" not in offered["language"]["properties"]["action"]["enum"]
    assert offered["personal"]["properties"]["action"] is True
