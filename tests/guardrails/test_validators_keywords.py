import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from guardrails.types import Context, Finding
from guardrails.validators import keywords, lexicon

WORDS = ["salary", "annual bonus", "bonus plan", "C++", "Straße", "don't tell", "Ελλάς", "#payday", "x"]
OPTIONS = keywords.Options(words=WORDS)
HITS = [
    ("Salary?", ["Salary"]),
    ("SALARY, salary", ["SALARY", "salary"]),
    ("the annual bonus", ["annual bonus"]),
    ("annual\n\tbonus", ["annual\n\tbonus"]),
    ("annual        bonus", ["annual        bonus"]),
    ("annual\u00a0bonus", ["annual\u00a0bonus"]),
    ("annual bonus plan", ["annual bonus"]),
    ("a bonus plan", ["bonus plan"]),
    ("I write c++, not C", ["c++"]),
    ("in der STRAßE", ["STRAßE"]),
    ("DON’T TELL anybody", ["DON’T TELL"]),
    ("ελλάς and ΕΛΛΆΣ", ["ελλάς", "ΕΛΛΆΣ"]),
    ("it is #PayDay", ["#PayDay"]),
    ("salary's", ["salary"]),
    ("İİ salary", ["salary"]),
    ("\ud800salary\udfff", ["salary"]),
    ("x x-x", ["x", "x", "x"]),
]
NEAR_MISSES = [
    "",
    "salaryman",
    "asalary",
    "salary_2",
    "annualbonus",
    "annual big bonus",
    "annual         bonus",
    "annual",
    "bonus",
    "C+ and C",
    "Strasse",
    "do not tell",
    "payday",
    "#paydays",
    "xx",
    "sal ary",
    "\ud800",
]
TEXTS = [*(text for text, _ in HITS), *NEAR_MISSES]


async def found(text: str, **options) -> list[str]:
    validator = keywords.build(keywords.Options(**{"words": WORDS, **options}))
    return [text[one.start : one.end] for one in await validator.find(text, Context())]


@pytest.mark.parametrize(("text", "expected"), HITS)
async def test_words_are_found_whole_and_in_any_case(text, expected):
    assert await found(text) == expected


@pytest.mark.parametrize("text", NEAR_MISSES)
async def test_near_misses_pass(text):
    assert await found(text) == []


async def test_case_and_parts_of_words_count_when_asked_for():
    assert await found("salary Salary", ignore_case=False) == ["salary"]
    assert await found("mysalaryman", whole_words=False) == ["salary"]


async def test_the_words_of_a_file_join_the_others(tmp_path):
    (tmp_path / "words.txt").write_text("# ours\nfalcon\n\nproject osprey # the second\n")
    options = keywords.Options.model_validate({"file": "words.txt", "label": "code"}, context={"folder": tmp_path})
    assert options.words == ["falcon", "project osprey"]
    assert await keywords.build(options).find("Falcon", Context()) == [Finding("code", 0, 6)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "write words, or a file that has some"),
        ({"file": "none.txt"}, r"'none.txt' cannot be read \(No such file or directory\); put it beside the policy"),
        ({"file": "../secret.txt"}, "leads out of the policy's folder"),
        ({"file": "/etc/hostname"}, "leads out of the policy's folder"),
        ({"file": "latin.txt"}, "'latin.txt' is not UTF-8 at byte 1"),
        ({"file": "empty.txt"}, "write words, or a file that has some"),
    ],
)
def test_a_list_that_cannot_be_had_is_refused_with_the_reason(tmp_path, given, message):
    (tmp_path / "latin.txt").write_bytes(b"f\xfcnf")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ValidationError, match=message):
        keywords.Options.model_validate(given, context={"folder": tmp_path})


def test_a_policy_that_is_in_no_folder_has_no_files():
    with pytest.raises(ValidationError, match="belongs in the folder of a policy, and this policy is in none"):
        keywords.Options.model_validate({"file": "words.txt"}, context={"folder": None})


@pytest.mark.parametrize(("word", "message"), [("--", "no letter or digit"), ("w" * 201, "more than 200 characters")])
def test_a_word_that_cannot_be_looked_for_is_named(word, message):
    with pytest.raises(ValueError, match=f"words: .*{message}"):
        keywords.build(keywords.Options(words=["fine", word]))


async def test_a_list_of_thousands_is_looked_for_in_a_long_text():
    words = [f"word{number}" for number in range(5000)]
    text = "filler " * 40_000 + "word4999 " * 100_000
    findings = await keywords.build(keywords.Options(words=words)).find(text, Context())
    assert len(findings) == 100_000
    assert text[findings[-1].start :] == "word4999 "


def test_folding_keeps_every_letter_in_its_place():
    letters = [chr(code) for code in range(sys.maxunicode + 1)]
    assert [letter for letter in letters if len(lexicon.folded(letter)) != 1] == []
    assert lexicon.folded("ΟΔΟΣ ΟΔΟΣΑ") == "".join(map(lexicon.folded, "ΟΔΟΣ ΟΔΟΣΑ"))


@given(st.text("ab -", max_size=24), st.sets(st.integers(1, 24), max_size=8), st.booleans())
def test_any_text_in_any_pieces_gives_the_findings_of_the_whole(text, cuts, whole):
    options = keywords.Options(words=["a", "a b", "ab", "b a-b", "bab a", "aa"], whole_words=whole)
    (reading,) = keywords.build(options).readings()
    pieces = []
    for end in sorted({*(cut for cut in cuts if cut < len(text)), len(text)}):
        new, settled = reading.read(text[:end], end == len(text))
        pieces += new
        assert settled <= end
    (reading,) = keywords.build(options).readings()
    assert pieces == list(reading.read(text, True)[0])
