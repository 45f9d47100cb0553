"""Whatever bytes a policy is made of: it loads, or every reason why not is said; nothing else is raised, and soon."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guardrails.policy import Library, PolicyError, Source, load, resolve
from tests.guardrails.test_policy_locks import HOUSE
from tests.guardrails.test_schema import DESK

SECONDS = 10.0
"""Far above what any of them takes (some 0.1 s); a regular expression or a loop that explodes takes minutes."""

SEEDS = (DESK, HOUSE, 'name = "kid"\nextends = "house"\n[[input]]\nname = "no-pets"\nthreshold = 0.4\n')
LIBRARY = Library((), {"house": Source("house", HOUSE)})
PIECES = (
    "[", "]", "[[", "]]", "{", "}", "=", ".", ",", '"', "'", '"""', "'''", "#", "\n", "\r\n", "\0", "\\", "\\u0000",
    "true", "nan", "-inf", "1979-05-27", "1e400", "9" * 5000, "\ud800", "\U0001f600", "é", " ", "{aa}", "\\p{L}", "(",
    "[[input]]", "[parts]", "[routes.x]", "[[example]]", "name = ", "extends = ", '"base"', '"desk"', "validator = ",
    '"topics"', '"grader"', "confirm = {", "locked = true", "remove = [", "patterns = ['(']", "turns = [",
)  # fmt: skip
QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A policy of which parts are cut out, doubled, swapped, or replaced by what TOML and patterns are made of."""
    text = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 40)))
        piece = draw(st.one_of(st.just(""), st.sampled_from(PIECES), st.just(text[start:end] * 2), st.text(max_size=8)))
        text = text[:start] + piece + text[end:]
    return text


def survives(text: str) -> None:
    began = time.monotonic()
    try:
        resolve(Source("fuzz.toml", text), LIBRARY)
    except PolicyError as error:
        assert error.problems
        for problem in error.problems:
            assert problem.what and problem.advice and problem.line >= 1
    assert time.monotonic() - began < SECONDS


@QUICK
@given(mutated())
def test_a_mutated_policy_loads_or_says_why_not(text: str) -> None:
    survives(text)


@QUICK
@given(st.text(st.characters()))
def test_any_text_loads_or_says_why_not(text: str) -> None:
    survives(text)


@QUICK
@given(st.binary())
def test_any_file_loads_or_says_why_not(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_bytes(content)
    with pytest.raises(PolicyError):  # no random bytes have a name
        load(path)


VALUES = st.recursive(
    st.one_of(st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.dates().map(str)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("abc", min_size=1), inner, max_size=3)
    ),
    max_leaves=6,
)


def toml(value: object) -> str:
    """A value as TOML, as far as the fuzz needs it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(sign):08x}" for sign in value if not 0xD800 <= ord(sign) < 0xE000) + '"'
    return str(value).lower()


KEYS = sorted({line.partition("=")[0].strip() for seed in SEEDS for line in seed.splitlines() if "=" in line})


@QUICK
@given(st.sampled_from(SEEDS), st.sampled_from(KEYS), VALUES, st.integers(0, 50))
def test_a_value_of_any_kind_loads_or_says_why_not(seed: str, key: str, value: object, place: int) -> None:
    lines = seed.splitlines()
    lines.insert(place % (len(lines) + 1), f"{key} = {toml(value)}")
    survives("\n".join(lines))


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 100_000,
        "a = " + "{b = " * 100_000,
        "[" * 100_000,
        "a" + ".a" * 50_000 + " = 1",
        "[x" + " . 'a'" * 50_000 + "]",
        "a" * 900_000,
        '"' * 900_001,
        "a.'" * 300_000,
        'a = "' + "\\u0000" * 100_000 + '"',
        "\n" * 999_999,
        "".join(f"k{number} = 1\n" for number in range(50_000)),
        "".join(f"[[input]]\nname = 'r{number}'\n" for number in range(5_000)),
        'name = "x"\n[[input]]\nname = "r"\nvalidator = "patterns"\naction = "refuse"\nreply = "x"\npatterns = ['
        + "'a{1,9}(b', " * 2_000 + "]",
        'name = "x"\n[[input]]\nname = "r"\nvalidator = "patterns"\naction = "refuse"\nreply = "x"\n'
        + "".join(f"key{number} = 1\n" for number in range(20_000)),
        'name = "x"\nremove = [' + "'r', " * 50_000 + "]",
        "x = '''" + "'" * 500_000,
        'x = """' + '\\"' * 300_000,
    ],
    ids=range(17),
)  # fmt: skip
def test_a_policy_that_is_made_to_keep_the_loader_busy_does_not(text: str) -> None:
    survives(text)


def test_a_folder_and_a_name_with_a_zero_byte_are_no_policy(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "a\0b"):
        with pytest.raises(PolicyError):
            load(path)
