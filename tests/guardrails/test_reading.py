"""Rules asked about sentences: a stream waits for one of them, and says what the whole text would have said."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardrails.engine import Guard, judge, stream
from guardrails.reading import (
    MANY,
    SENTENCE_CHARACTERS,
    SENTENCE_MOST,
    Reader,
    Remembered,
    Seen,
    find,
    once,
    sentence_end,
)
from guardrails.spans import Span, Spans
from guardrails.types import BROKEN_REPLY, Action, Context, Finding, Mode, Rule, Verdict

LONG = "This is an ordinary sentence of some length, which says nothing much at all. "
HARM = "Here is a zebra sentence that somebody should really not be shown by anybody. "


class Zebras:
    """A validator that cannot read a growing text: it says no to every text with a zebra in it."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        self.texts.append(text)
        return [Finding("zebra", 0, len(text))] if "zebra" in text else []


def rule(action: Action = Action.REFUSE) -> Rule:
    return Rule("zebras", Zebras(), action, "No zebras.", every="sentence")


EMAIL = Rule("email", Spans([Span("email", r"\b\w{1,20}@\w{1,20}\.\w{2,9}\b")]), Action.REDACT)


async def spoken(rules: Sequence[Rule], pieces: Sequence[str]) -> tuple[list[str], Verdict]:
    async def model():
        for piece in pieces:
            yield piece

    events = [event async for event in stream(rules, model())]
    verdict = events.pop()
    assert isinstance(verdict, Verdict)
    return [str(event) for event in events], verdict


async def test_a_sentence_is_released_once_it_is_judged() -> None:
    zebras = rule()
    said, verdict = await spoken([zebras], [LONG, LONG, LONG.strip()])
    assert said[0] == LONG and "".join(said) == LONG * 2 + LONG.strip() and verdict.action is Action.ALLOW
    assert isinstance(zebras.validator, Zebras) and zebras.validator.texts == [LONG, LONG, LONG.strip()]


async def test_a_sentence_that_is_stopped_never_begins() -> None:
    said, verdict = await spoken([rule()], list(LONG + HARM + LONG))
    assert "".join(said) == f"{LONG}\n\nNo zebras." and verdict.kept == LONG


async def test_nothing_more_is_read_from_the_model_after_a_stop() -> None:
    taken: list[str] = []

    async def model():
        for piece in [LONG, HARM, "x", LONG, LONG]:
            taken.append(piece)
            yield piece

    async for _ in stream([rule()], model()):
        pass
    assert taken == [LONG, HARM, "x"]


TEXTS = st.lists(
    st.sampled_from(
        [LONG, HARM, "Short. ", "No end", "\n\n", "ann@example.com ", "3.5 ", "Wait... ", "好。", " ", "zebra"]
    ),
    max_size=9,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from([Action.REFUSE, Action.REDACT]))
async def test_a_stream_by_sentences_equals_the_whole(text: str, sizes: list[int], action: Action) -> None:
    pieces, at, n = list[str](), 0, 0
    while at < len(text):
        pieces.append(text[at : at + sizes[n % len(sizes)]])
        at, n = at + len(pieces[-1]), n + 1
    said, verdict = await spoken([EMAIL, rule(action)], pieces)
    whole = await judge([EMAIL, rule(action)], text)
    assert ("".join(said), verdict) == (whole.streamed, whole)


@settings(max_examples=300, deadline=None)
@given(st.text("ab .!\n。)", max_size=300) | TEXTS)
def test_where_a_sentence_ends_does_not_depend_on_when_it_is_asked(text: str) -> None:
    ends = {sentence_end(text[:upto], 0, False) for upto in range(len(text) + 1)} - {0}
    assert len(ends) <= 1
    assert ends <= {sentence_end(text, 0, True)}


@pytest.mark.parametrize(
    ("text", "end"),
    [
        (LONG + "And more", len(LONG)),
        ("Short. Short. " + LONG + "x", 14 + len(LONG)),
        (LONG, len(LONG)),
        ("a" * 2000, SENTENCE_MOST),
        ("", 0),
    ],
)
def test_a_sentence_is_not_too_short_and_not_too_long(text: str, end: int) -> None:
    assert sentence_end(text, 0, True) == end
    assert end in (0, len(text)) or SENTENCE_CHARACTERS <= end <= SENTENCE_MOST


async def test_a_rule_that_breaks_on_a_sentence_ends_the_stream_there() -> None:
    class Broken:
        async def find(self, text: str, context: Context) -> Sequence[Finding]:
            if "zebra" in text:
                raise OSError
            return []

    said, verdict = await spoken([Rule("b", Broken(), Action.APPEND, "x", every="sentence")], [LONG, HARM, LONG])
    assert "".join(said) == f"{LONG}\n\n{BROKEN_REPLY}" and verdict.hits[0].broken == "OSError"


async def test_a_shadow_rule_holds_nothing_back() -> None:
    watched = Rule("w", Zebras(), Action.REFUSE, "No.", mode="shadow", every="sentence")
    guard = Guard([watched])
    assert guard.feed("A zebra. ") == "A zebra. "
    _, verdict = await guard.finish()
    assert (verdict.action, [hit.mode for hit in verdict.hits]) == (Action.ALLOW, ["shadow"])


def test_of_what_several_views_find_at_one_place_the_highest_score_counts() -> None:
    found = [Finding("a", 3, 5, 0.4), Finding("a", 3, 5, 0.9), Finding("b", 3, 5, 0.1), Finding("a", 0, 1)]
    assert once(found) == [Finding("a", 0, 1), Finding("a", 3, 5, 0.9), Finding("b", 3, 5, 0.1)]


def test_the_oldest_findings_are_forgotten_first() -> None:
    kept = Remembered(most=2)
    for name in "abc":
        kept.put((name, b""), [Finding(name, 0, 1)])
        kept.get(("a", b""))
    assert [bool(kept.get((name, b""))) for name in "abc"] == [True, False, True]


def test_a_great_many_findings_are_not_remembered() -> None:
    kept = Remembered()
    kept.put(("few", b""), [Finding("a", 0, 1)] * MANY)
    kept.put(("many", b""), [Finding("a", 0, 1)] * (MANY + 1))
    assert kept.get(("few", b"")) and kept.get(("many", b"")) is None


def test_findings_at_one_place_have_one_order() -> None:
    found = [Finding("b", 3, 5), Finding("a", 3, 5)]
    assert once(found) == once(found[::-1]) == found[::-1]


async def test_the_views_of_a_text_that_is_not_short_are_made_aside() -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    beside = asyncio.create_task(others())
    found, broken = await find(EMAIL, Seen("6a " * 3000 + "ann @example.com"), Context())
    beside.cancel()
    assert (found, broken) == ([], "") and turns > 2


async def test_halves_of_a_character_that_come_apart_are_one_again() -> None:
    guard = Guard([Rule("bird", Spans([Span("bird", "🦅")]), Action.REDACT)])
    said = [guard.feed(piece) for piece in ("a ", "\ud83e", "\udd85", " b", "\ud83e")]
    last, _ = await guard.finish()
    assert "".join(said) + last == "a [BIRD] b\ud83e"


def test_a_reader_says_once_what_it_found() -> None:
    from guardrails.views import Views

    reader, views = Reader(0, EMAIL), Views()
    views.grow("ann@example.com and аnn@example.com ", True)  # the second one begins with a Cyrillic letter
    assert [one.start for one in reader.read(views, True)] == [0, 20]
    assert reader.read(views, True) == []


async def test_a_rule_whose_readings_take_longer_than_its_budget_is_broken() -> None:
    verdict = await judge([Rule("slow", EMAIL.validator, Action.REDACT, budget=1e-9)], "Hello there.")
    assert (verdict.action, verdict.hits[0].broken) == (Action.REFUSE, "TimeoutError")


@pytest.mark.parametrize("mode", ["enforce", "shadow"])
async def test_a_broken_rule_that_lets_pass_is_not_asked_again(mode: Mode) -> None:
    class Broken:
        async def find(self, text: str, context: Context) -> Sequence[Finding]:
            raise OSError

    rules = [Rule("b", Broken(), Action.REFUSE, "No.", mode=mode, if_broken=Action.ALLOW, every="sentence")]
    guard = Guard(rules)
    guard.feed(LONG + LONG + "and")
    assert guard.asking
    await guard.ask()
    assert not guard.asking
    _, verdict = await guard.finish()
    assert (verdict.action, verdict.text, verdict.hits[0].broken) == (Action.ALLOW, LONG + LONG + "and", "OSError")
