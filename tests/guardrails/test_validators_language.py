import subprocess
import sys

import pytest

from guardrails.types import Context
from guardrails.validators import language

ENGLISH = "How do I ask my manager for a raise without sounding greedy? I have been here for three years."
GERMAN = "Wie frage ich meine Vorgesetzte nach mehr Gehalt, ohne gierig zu wirken? Ich bin seit drei Jahren hier."
FRENCH = "Comment demander une augmentation à ma responsable sans paraître avide ? Je suis ici depuis trois ans."


async def found(text: str, **options) -> list[str]:
    validator = language.build(language.Options(**{"allow": ["en"], **options}))
    return [one.note for one in await validator.find(text, Context())]


@pytest.mark.parametrize(
    ("text", "allow", "expected"),
    [
        (ENGLISH, ["en"], []),
        (GERMAN, ["en"], ["de"]),
        (GERMAN, ["en", "de"], []),
        (FRENCH, ["en", "de"], ["fr"]),
        ("這份工作的薪水是多少?請告訴我我的同事每個月賺多少錢,謝謝你的幫助。", ["en"], ["zh"]),
        ("Ja, danke.", ["en"], []),
        ("12345 67890 12345 67890 == 42", ["en"], []),
    ],
)
async def test_a_language_that_is_not_allowed_is_found_and_short_texts_pass(text, allow, expected):
    assert await found(text, allow=allow) == expected


async def test_only_the_beginning_counts():
    assert await found(ENGLISH * 3 + GERMAN * 9, first=240) == []
    assert await found(GERMAN * 3 + ENGLISH * 9, first=240) == ["de"]


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_a_stream_waits_for_the_beginning_and_then_says_the_same_for_any_chunking(size):
    text = GERMAN * 4
    (reading,) = language.build(language.Options(allow=["en"], first=100)).readings()
    findings = []
    for end in [*range(size, len(text), size), len(text)]:
        new, settled = reading.read(text[:end], end == len(text))
        assert settled == (end if end >= 100 else 0)
        findings += new
    assert findings == language.judged(text, ["en"], 100) != []


@pytest.mark.parametrize("padding", [" " * 500, "1. " * 200, "\n\n* ", "\ud800" * 300])
async def test_blanks_and_signs_before_the_first_letter_hide_no_language(padding):
    text = padding + GERMAN * 3
    (finding,) = await language.build(language.Options(allow=["en"])).find(text, Context())
    assert (finding.start, finding.end) == (len(padding), len(padding) + 240)
    (reading,) = language.build(language.Options(allow=["en"])).readings()
    assert reading.read(padding + GERMAN[:20], False) == ([], 0)
    assert reading.read(text, False) == ([finding], len(text))


@pytest.mark.parametrize("text", ["", "\ud800" * 50, f"{ENGLISH} \ud800 \udfff"])
async def test_empty_texts_and_broken_letters_pass(text):
    assert await found(text) == []


def test_a_code_that_no_language_has_is_refused():
    with pytest.raises(ValueError, match="allow: english is not a language that can be told; write a code such as en"):
        language.build(language.Options(allow=["english"]))


def test_the_model_is_not_read_before_a_policy_asks_for_it():
    code = "import sys, guardrails.validators.language; sys.exit('py3langid' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
