"""What every validator that reads streams promises, over the tables of all of their tests."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardrails.spans import Spans
from guardrails.types import Context, Finding, StreamValidator
from guardrails.validators import (
    code,
    injection,
    keywords,
    language,
    length,
    mentions,
    patterns,
    repetition,
    secrets,
    topics,
    urls,
)
from tests.guardrails import (
    test_validators_code,
    test_validators_injection,
    test_validators_keywords,
    test_validators_language,
    test_validators_mentions,
    test_validators_patterns,
    test_validators_personal,
    test_validators_repetition,
    test_validators_secrets,
    test_validators_topics,
    test_validators_urls,
)

PERSONAL = [text for text, _ in test_validators_personal.HITS] + test_validators_personal.NEAR_MISSES
SECRETS = [text for text, _ in test_validators_secrets.HITS] + test_validators_secrets.NEAR_MISSES
INJECTION = [text for text, _ in test_validators_injection.HITS] + test_validators_injection.NEAR_MISSES
LANGUAGE = [test_validators_language.ENGLISH, test_validators_language.GERMAN * 2, "kurz"]
GUARDS: dict[str, tuple[StreamValidator, list[str]]] = {
    "personal": (test_validators_personal.EVERYTHING, PERSONAL),
    "secrets": (secrets.build(secrets.Options()), SECRETS),
    "injection": (injection.build(injection.Options()), INJECTION),
    "patterns": (patterns.build(test_validators_patterns.OPTIONS), test_validators_patterns.TEXTS),
    "topics": (topics.build(test_validators_topics.SIMPLE), test_validators_topics.TEXTS),
    "length": (
        length.build(length.Options(max_chars=20, max_words=4)),
        [*INJECTION, " ", "one  two\nthree four   five"],
    ),
    "language": (language.build(language.Options(allow=["en"], first=40)), LANGUAGE),
    "keywords": (keywords.build(test_validators_keywords.OPTIONS), test_validators_keywords.TEXTS),
    "mentions": (mentions.build(test_validators_mentions.OPTIONS), test_validators_mentions.TEXTS),
    "urls": (urls.build(test_validators_urls.LISTED), test_validators_urls.TEXTS),
    "code": (code.build(test_validators_code.OPTIONS), test_validators_code.TEXTS),
    "repetition": (repetition.build(test_validators_repetition.OPTIONS), test_validators_repetition.TEXTS),
}
TABLE = [(name, text) for name, (_, texts) in GUARDS.items() for text in texts]
BENIGN = (
    "The quick answer is that your manager will review the request in March, and once it is approved by Anna in "
    "Finance you will get a letter. Most employees see the change in the next pay period (about 2 to 3 weeks), and you "
    "can check the status in the portal under Requests, item 14. Your password is never asked for; call us at any time."
)


def streamed(validator: StreamValidator, ends: list[int], text: str) -> list[Finding]:
    """The findings of all readings that see the text grow to each of `ends`; fails where one comes too late."""
    found = []
    for reading in validator.readings():
        settled = 0
        for end in ends:
            new, reached = reading.read(text[:end], end == len(text))
            assert all(finding.start >= settled for finding in new), f"said after {settled} was settled: {new}"
            assert settled <= reached <= end
            settled = reached
            found += new
        assert settled == len(text)
    return sorted(found, key=place)


def place(finding: Finding) -> tuple[int, int, str]:
    return finding.start, finding.end, finding.label


@pytest.mark.parametrize(("name", "text"), TABLE)
async def test_a_text_that_comes_letter_by_letter_gives_the_findings_of_the_whole(name, text):
    validator = GUARDS[name][0]
    whole = sorted(await validator.find(text, Context()), key=place)
    assert streamed(validator, list(range(1, len(text) + 1)), text) == whole


@pytest.mark.parametrize(("name", "text"), [row for row in TABLE if row[0] in ("personal", "secrets", "injection")])
async def test_patterns_find_together_what_each_finds_alone(name, text):
    validator = GUARDS[name][0]
    assert isinstance(validator, Spans)
    alone = [finding for span in validator.spans for finding in span.findings(text, 0, len(text))[0]]
    assert sorted(await validator.find(text, Context()), key=place) == sorted(alone, key=place)


@settings(max_examples=150, deadline=None)
@given(st.data())
@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("personal", PERSONAL),
        ("secrets", SECRETS),
        *((name, GUARDS[name][1]) for name in ("keywords", "mentions", "urls", "code", "repetition")),
    ],
)
def test_any_texts_in_any_pieces_give_the_findings_of_the_whole(name, texts, data):
    separator = st.sampled_from(["", " ", "\n", ".", "1", "-", "a"])
    text = data.draw(separator).join(data.draw(st.lists(st.sampled_from(texts), min_size=1, max_size=3)))
    cuts = data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=12))
    ends = sorted({*(cut for cut in cuts if cut < len(text)), len(text)})
    validator = GUARDS[name][0]
    assert streamed(validator, ends, text) == streamed(validator, [len(text)], text)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("personal", 16),
        ("secrets", 24),
        ("injection", 32),
        ("topics", 16),
        ("keywords", 12),
        ("code", 32),
        ("repetition", 40),
        ("mentions", 12),
        ("urls", 16),
    ],
)
def test_of_ordinary_text_little_is_held_back(name, most):
    held = 0
    for reading in GUARDS[name][0].readings():
        for end in range(1, len(BENIGN)):
            found, settled = reading.read(BENIGN[:end], False)
            assert not found
            held = max(held, end - settled)
    assert held <= most


@pytest.mark.parametrize(
    "name", ["personal", "secrets", "injection", "keywords", "mentions", "urls", "code", "repetition"]
)
@pytest.mark.parametrize(
    "unit",
    [
        "89 ",
        "1 ",
        "1111 ",
        "+1(",
        "a@a.",
        "token=",
        "eyJaaaaaaaa.",
        "<!--",
        "ignore all ",
        "a.de/",
        "https://a.de/",
        "](",
        "x ",
    ],
)
def test_hostile_text_costs_little(name, unit):
    text = unit * (8000 // len(unit))
    start = time.process_time()
    for reading in GUARDS[name][0].readings():
        reading.read(text, True)
    assert time.process_time() - start < 3
