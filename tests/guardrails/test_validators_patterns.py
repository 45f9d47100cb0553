import pytest

from guardrails.spans import PatternError
from guardrails.types import Context, Finding
from guardrails.validators import patterns

OPTIONS = patterns.Options(patterns=[r"project (?:falcon|osprey)", r"\bACME-[0-9]{4}\b"], label="codename")
TEXTS = ["About Project Falcon.", "acme-1234 and ACME-12345", "projects falcon", "Project\nfalcon", "xACME-1234"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("About Project Falcon.", ["Project Falcon"]),
        ("acme-1234, project osprey", ["acme-1234", "project osprey"]),
        ("ACME-12345 xACME-1234 projects falcon", []),
    ],
)
async def test_patterns_are_found_in_any_case_under_their_label(text, expected):
    findings = await patterns.build(OPTIONS).find(text, Context())
    assert [text[one.start : one.end] for one in findings] == expected
    assert {one.label for one in findings} <= {"codename"}


async def test_case_counts_when_asked_for():
    validator = patterns.build(patterns.Options(patterns=["Falcon"], ignore_case=False))
    assert await validator.find("falcon Falcon", Context()) == [Finding("match", 7, 13)]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("[a-z", r"number 2, '\[a-z': "),
        ("a)(b", r"number 2, 'a\)\(b': .*unbalanced parenthesis"),
        ("x*", "matches the empty text"),
        (r"(?:\w+\s?)*!", r"number 2, .*'\(\?:\\\\w\+\\\\s\?\)\*' at character 0 takes"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_named_with_its_place_and_the_reason(pattern, message):
    with pytest.raises(PatternError, match=message):
        patterns.build(patterns.Options(patterns=["fine", pattern]))
