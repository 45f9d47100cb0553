"""Patterns that hostile text could keep busy are refused when a policy is loaded, others are not."""

import pytest

from guardrails import hostile
from guardrails.spans import MOST, TIMEOUT, PatternError, Span, allowed
from guardrails.validators import injection, patterns, personal, secrets


@pytest.mark.parametrize(
    ("pattern", "part"),
    [
        (r"(?:\w+)+!", r"(?:\w+)+"),
        (r"id: (?:a|aa)+b", "(?:a|aa)+"),
        (r"(?:x+x+)+y", "(?:x+x+)+"),
        (r"(\w+\s?)*!", r"(\w+\s?)*"),
    ],
)
def test_a_pattern_that_can_be_kept_busy_is_refused_with_the_part_and_what_to_write(pattern, part):
    with pytest.raises(PatternError) as error:
        patterns.build(patterns.Options(patterns=[pattern]))
    assert repr(part) in str(error.value)
    assert f"character {pattern.index(part)}" in str(error.value)
    assert "possessive" in str(error.value)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?:\w++)+!",
        r"\w{1,40}@\w{1,40}\.com",
        r'"(?:[^"\\]|\\.)*"',
        r"^(?:\d+,)+\d+$",
        r"(?:foo|bar|baz)+",
        r"secret\s*=\s*\S+",
        r"(?:\.\w{1,20}){1,8}",
        r"(?i)project falcon",
    ],
)
def test_a_pattern_that_is_only_long_or_repeated_is_not_refused(pattern):
    assert hostile.complaint(pattern) == ""


def test_a_pattern_beyond_the_bounds_is_refused_unread():
    assert hostile.complaint("a|" * 15_000 + "b") == (
        "it has 30001 characters, 20000 are allowed: make several patterns of it"
    )
    assert "its counted repeats stand for" in hostile.complaint("(?:(?:a{1,50}){1,50}){1,50}b")


def test_what_ships_cannot_be_kept_busy():
    built = [module.build(module.Options()) for module in (injection, personal, secrets)]
    patterns_shipped = [span.pattern for spans in built for span in spans.spans]
    assert [complaint for pattern in patterns_shipped if (complaint := hostile.complaint(pattern))] == []


def test_a_search_that_takes_too_long_ends_within_what_an_event_loop_can_bear():
    span = Span("busy", r"(?:a|aa)+b")
    with pytest.raises(TimeoutError):
        span.findings("a" * 5000, 0, 5000)
    assert allowed(20_000) == TIMEOUT <= 0.05
    assert allowed(10_000_000) == MOST
