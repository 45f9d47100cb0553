from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardrails.types import Context
from guardrails.validators import repetition

OPTIONS = repetition.Options()
WORDS = ["rain", "snow", "wind", "sun", "fog", "ice"]
SORRY = "I am sorry, I cannot say that. "
HITS = [
    (SORRY * 6, len(SORRY)),
    ("Fine: " + SORRY * 6 + "The end.", 6 + len(SORRY)),
    ("- take a day off\n" * 12, 19),
    ("I am sorry, I cannot say that.\ni AM sorry; I cannot say that!\n" * 4, 31),
    ("the the the " * 20, 4),
    ("no " * 60, 3),
    ("one two three four " * 10, 19),
    ("哈" * 200, 16),
    ("谢谢你的帮助。" * 20, 7),
    ("a" * 200, 16),
    ("Noooo" + "o" * 200, 32),
    ("abc" * 80, 48),
    ("." * 500, 16),
    ("Well" + "!" * 500, 20),
    ("\n" * 500, 16),
    ("x" + " " * 500, 17),
    ("0 " * 120, 2),
    ("\ud800 sad words here " * 12, 19),
    (" ".join(f"word{n % 60}" for n in range(400)), 410),
]
NEAR_MISSES = [
    "",
    "no " * 20,
    "very " * 10 + "good",
    "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is but a dream.",
    "Let it be, let it be, let it be, let it be. Whisper words of wisdom, let it be.",
    "\n\n".join(f"Verse {n} tells of {what}.\nHome, sweet home, my love, sweet home." for n, what in enumerate(WORDS)),
    "\n".join(f"- Item {n}: bring your badge and your contract" for n in range(20)),
    "\n".join(f"{n}. The plan of {name} is approved." for n, name in enumerate(WORDS)),
    "| name | yes | no |\n|------|-----|----|\n" + "\n".join(f"| row {n} | yes | yes |" for n in range(40)),
    "-" * 120,
    "=" * 200 + "\ntext\n" + "=" * 200,
    "Name: " + "_" * 80 + " Date: " + "_" * 40,
    "Wait" + "." * 60,
    "Noooooooooooooooooooooooooooo!",
    "1000000000000000000000000000000000",
    "    " * 60 + "indented",
    SORRY * 3,
    "\ud800" * 15,
]  # fmt: skip
TEXTS = [*(text[:700] for text, _ in HITS), *NEAR_MISSES]


async def found(text: str, **options) -> list[tuple[int, int]]:
    validator = repetition.build(repetition.Options(**options))
    return [(one.start, one.end) for one in await validator.find(text, Context())]


@pytest.mark.parametrize(("text", "start"), HITS)
async def test_a_loop_is_found_where_it_starts_to_repeat(text, start):
    assert (await found(text))[0][0] == start


@pytest.mark.parametrize("text", NEAR_MISSES)
async def test_lists_tables_poems_and_rules_pass(text):
    assert await found(text) == []


async def test_all_of_a_long_loop_is_found_and_nothing_behind_it():
    text = "Hello there. " + SORRY * 500 + "Goodbye."
    findings = await found(text)
    assert findings[0][0] == 13 + len(SORRY)
    assert findings[-1][1] == len(text) - len(". Goodbye.")
    assert all(later[0] == earlier[1] - 1 for earlier, later in pairwise(findings))


async def test_how_often_and_how_long_is_for_the_policy_to_say():
    assert await found("no " * 20, least=30) != []
    assert await found(SORRY * 3, times=3, least=40) != []
    assert await found("one two three four " * 10, longest=3) == []


@given(st.text("ab -", max_size=60), st.sets(st.integers(1, 60), max_size=8))
def test_any_text_in_any_pieces_gives_the_findings_of_the_whole(text, cuts):
    options = repetition.Options(times=2, least=8, longest=6)
    (reading,) = repetition.build(options).readings()
    pieces, before = [], 0
    for end in sorted({*(cut for cut in cuts if cut < len(text)), len(text)}):
        new, settled = reading.read(text[:end], end == len(text))
        assert all(one.start >= before for one in new)
        assert before <= settled <= end
        pieces, before = [*pieces, *new], settled
    (reading,) = repetition.build(options).readings()
    assert pieces == list(reading.read(text, True)[0])
