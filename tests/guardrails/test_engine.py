"""The guard engine: what is decided, and that a stream says exactly what the whole text would have said."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardrails.conversation import appended, judge_messages
from guardrails.engine import judge, stream
from guardrails.spans import PatternError, Span, Spans, open_ended
from guardrails.types import BROKEN_REPLY, Action, Context, Finding, Message, Rule, Verdict


def spans(label: str, *patterns: str) -> Spans:
    return Spans([Span(label, pattern) for pattern in patterns])


class WholeWord:
    """A validator that can only read whole texts."""

    def __init__(self, word: str):
        self.word = word

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        at = text.find(self.word)
        return [] if at < 0 else [Finding("word", at, at + len(self.word))]


class Broken:
    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        raise RuntimeError("the text must not be in here")


EMAIL = Rule("email", spans("email", r"[\w.]{1,20}@[\w.]{1,20}\w"), Action.REDACT)
SSN = Rule("ssn", spans("ssn", r"(?<!\d)\d{3}-\d{2}-\d{4}(?!\d)"), Action.REDACT)
SALARY = Rule("salary", spans("salary", r"(?i)\bearns? \$?\d+(?:,\d{3})*"), Action.REFUSE, "Ask HR.")
CRISIS = Rule(
    "crisis", spans("crisis", r"(?i)\bhurt myself\b"), Action.ESCALATE, "A person will read this.", route="crisis"
)
LEGAL = Rule("legal", spans("legal", r"(?i)\bovertime\b"), Action.APPEND, "Consult a legal professional.")
RULES = (EMAIL, SSN, SALARY, CRISIS, LEGAL)


async def deltas(pieces: Sequence[str]) -> AsyncIterator[str]:
    for piece in pieces:
        yield piece


async def run(rules: Sequence[Rule], pieces: Sequence[str]) -> tuple[str, Verdict]:
    events = [event async for event in stream(rules, deltas(pieces))]
    verdict = events.pop()
    assert isinstance(verdict, Verdict)
    return "".join(str(event) for event in events), verdict


@pytest.mark.parametrize(
    ("text", "action", "said"),
    [
        ("Hello there.", Action.ALLOW, "Hello there."),
        ("Write to ann@example.com now.", Action.REDACT, "Write to [EMAIL] now."),
        ("SSN 078-05-1120, ann@example.com", Action.REDACT, "SSN [SSN], [EMAIL]"),
        ("SSN 1078-05-1120 is no SSN", Action.ALLOW, "SSN 1078-05-1120 is no SSN"),
        ("Jane earns $90,000 a year", Action.REFUSE, "Ask HR."),
        ("I want to hurt myself", Action.ESCALATE, "A person will read this."),
        ("Overtime is paid.", Action.APPEND, "Overtime is paid.\n\nConsult a legal professional."),
        ("", Action.ALLOW, ""),
    ],
)
async def test_a_text_is_judged(text: str, action: Action, said: str) -> None:
    verdict = await judge(RULES, text)
    assert (verdict.action, verdict.text) == (action, said)


async def test_a_stop_keeps_only_what_came_before_it_redacted() -> None:
    verdict = await judge(RULES, "Mail ann@example.com: Jane earns 90000, SSN 078-05-1120")
    assert verdict.kept == "Mail [EMAIL]: Jane "
    assert verdict.streamed == "Mail [EMAIL]: Jane \n\nAsk HR."
    assert [hit.rule for hit in verdict.hits] == ["email", "salary"]


async def test_overlapping_redactions_leave_one_placeholder() -> None:
    wide = Rule("wide", spans("wide", r"mail \w+@\w+"), Action.REDACT)
    verdict = await judge([wide, EMAIL], "my mail ann@example.com.")
    assert verdict.text == "my [WIDE]."


async def test_the_first_stop_by_place_decides_in_a_reply() -> None:
    verdict = await judge(RULES, "She earns 5 and I hurt myself")
    assert verdict.rule == "salary"


async def test_a_whole_text_rule_holds_the_stream_until_the_end() -> None:
    held = (Rule("word", WholeWord("zebra"), Action.REFUSE, "No zebras."), SALARY)
    assert await run(held, ["a horse ", "and a cow"]) == ("a horse and a cow", await judge(held, "a horse and a cow"))
    said, verdict = await run(held, ["a horse ", "and a zebra"])
    assert (said, verdict.kept) == ("a horse and a \n\nNo zebras.", "a horse and a ")
    said, verdict = await run(held, ["a horse earns 12 ", "and a zebra"])
    assert (said, verdict.rule) == ("Ask HR.", "salary")


async def test_a_stream_stops_reading_the_model_once_it_is_stopped() -> None:
    taken: list[str] = []

    async def model() -> AsyncIterator[str]:
        for piece in ["Jane earns 90", ",000 a year", " and more", " and more"]:
            taken.append(piece)
            yield piece

    said = "".join([str(event) async for event in stream(RULES, model()) if not isinstance(event, Verdict)])
    assert said == "Jane \n\nAsk HR."
    assert len(taken) == 2


async def test_a_broken_rule_refuses_and_says_so() -> None:
    verdict = await judge([Rule("bad", Broken(), Action.APPEND, "x")], "hello")
    assert (verdict.action, verdict.text, verdict.kept) == (Action.REFUSE, BROKEN_REPLY, "")
    assert verdict.hits[0].broken == "RuntimeError"


async def test_a_broken_rule_may_be_told_to_let_pass_and_is_still_recorded() -> None:
    verdict = await judge([Rule("bad", Broken(), Action.REFUSE, "x", if_broken=Action.ALLOW)], "hello")
    assert (verdict.action, verdict.text, verdict.hits[0].broken) == (Action.ALLOW, "hello", "RuntimeError")


async def test_a_shadow_rule_is_recorded_and_changes_nothing() -> None:
    shadow = Rule("shadow", WholeWord("horse"), Action.REFUSE, "x", mode="shadow")
    said, verdict = await run([shadow], ["a ", "horse"])
    assert (said, verdict.action, [hit.rule for hit in verdict.hits]) == ("a horse", Action.ALLOW, ["shadow"])


async def test_a_slow_validator_breaks_its_rule_within_its_budget() -> None:
    import asyncio

    class Slow:
        async def find(self, text: str, context: Context) -> Sequence[Finding]:
            await asyncio.sleep(30)
            return []

    verdict = await judge([Rule("slow", Slow(), Action.REFUSE, "x", budget=0.01)], "hello")
    assert verdict.hits[0].broken == "TimeoutError"


WORDS = ["ann@example.com", "ann@", "example", "078-05-1120", "078-05-11", "0", "-", "Jane ", "earns ", "$90,000", "90",
         ",000", "hurt ", "myself", "overtime", "horse", " ", "\n", "é", "💬", ".", "x"]  # fmt: skip


@st.composite
def chunked(draw: st.DrawFn) -> tuple[str, list[str]]:
    text = "".join(draw(st.lists(st.sampled_from(WORDS), max_size=14)))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=10)))
    return text, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@settings(max_examples=600, deadline=None)
@given(chunked())
async def test_a_stream_equals_the_whole_for_any_chunking(case: tuple[str, list[str]]) -> None:
    text, pieces = case
    whole = await judge(RULES, text)
    said, verdict = await run(RULES, pieces)
    assert said == whole.streamed
    assert verdict == whole
    assert (await run(RULES, list(text)))[0] == whole.streamed


PATTERNS = st.recursive(
    st.sampled_from(["a", "b", "ab", r"\d", r"\w", "[ab]", ".", r"\b", r"\B", r"(?=a)", r"(?!b)", "(?<!a)", "$", "^"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["{0,3}", "{1,2}?", "?", "+"])).map(lambda two: f"(?:{two[0]}){two[1]}"),
    ),
    max_leaves=6,
)


@settings(max_examples=1500, deadline=None)
@given(PATTERNS, st.text("ab1 \n", max_size=12), st.booleans())
async def test_any_pattern_reads_a_stream_as_it_reads_the_whole(pattern: str, text: str, stops: bool) -> None:
    try:
        validator = spans("x", pattern)
    except PatternError:
        return
    rules = [Rule("r", validator, Action.REFUSE if stops else Action.REDACT, "no")]
    whole = await judge(rules, text)
    assert (await run(rules, list(text))) == (whole.streamed, whole)


@pytest.mark.parametrize("pattern", ["a*", "(", "(?=b)", "a?", r"a+?(?<=a)(?>b)", r"x{1,3}?b++(?<!c)"])
def test_a_pattern_that_cannot_be_judged_exactly_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        Span("x", pattern)


def test_word_boundaries_stay_open_at_the_end() -> None:
    assert open_ended(r"\bfoo[\b]\\b") == r"(?:\b|\Z)foo[\b]\\b"
    assert open_ended(r"a(?!b[]$]\b)[^]x]$") == r"a(?!b[]$](?:(?=(?s:.))\b))[^]x]$"
    assert open_ended(r"a(?= b\b)") == r"a(?= b(?:(?=(?s:.))\b))"
    assert open_ended(r"a{2,3}?b*?(c)??[+?]\??(?:d)") == r"a{2,3}b*(c)?[+?]\??(?:d)"
    assert open_ended(r"(?>a+?b)") == r"(?>a+?b)"


@pytest.mark.parametrize(
    ("pattern", "pieces"),
    [
        (r"cut(?= so\b)", ["cut so", "mewhere"]),
        (r"cut(?= so\b)", ["cut so", " it ends"]),
        (r"cut(?= so\B)", ["cut so", "mewhere"]),
        (r"cut(?= so$)", ["cut so", "mewhere"]),
        (r"cut(?=\s(?:so|now)\b)", ["cut now", "here"]),
        (r"[\w-]{3,9}?(?<![^\s-]{1,3}.) ", ["b-b", "-bAb", "-", "b x"]),
    ],
)
async def test_what_follows_a_match_is_waited_for(pattern: str, pieces: list[str]) -> None:
    rule = Rule("r", spans("r", pattern), Action.REFUSE, "No.", views=False)
    whole = await judge([rule], "".join(pieces))
    assert await run([rule], pieces) == (whole.streamed, whole)


async def test_halves_of_a_character_in_one_piece_are_one() -> None:
    bird = Rule("bird", spans("bird", "🦅"), Action.REDACT)
    assert (await judge([bird], "a \ud83e\udd85 b")).text == "a [BIRD] b"


def said_by(role: str, content: str) -> Message:
    return Message(role, content)  # type: ignore[arg-type]


async def test_the_strictest_action_over_the_conversation_decides() -> None:
    verdict, _ = await judge_messages(RULES, [said_by("user", "Jane earns 9. I hurt myself")])
    assert (verdict.action, verdict.rule, verdict.route) == (Action.ESCALATE, "crisis", "crisis")


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
async def test_every_role_is_read(role: str) -> None:
    verdict, _ = await judge_messages(RULES, [said_by(role, "Jane earns 9"), said_by("user", "hello")])
    assert verdict.rule == "salary"


async def test_redaction_reaches_every_message_and_the_model_sees_only_that() -> None:
    messages = [said_by("user", "I am ann@example.com"), said_by("assistant", "Hello"), said_by("user", "078-05-1120?")]
    verdict, seen = await judge_messages(RULES, messages, trusted=2)
    assert verdict.action is Action.REDACT
    assert [message.content for message in seen] == ["I am [EMAIL]", "Hello", "[SSN]?"]


async def test_trusted_history_does_not_stop_a_turn_again() -> None:
    messages = [said_by("user", "Jane earns 9"), said_by("assistant", "Fine"), said_by("user", "thanks")]
    assert (await judge_messages(RULES, messages))[0].action is Action.REFUSE
    assert (await judge_messages(RULES, messages, trusted=2))[0].action is Action.ALLOW


async def test_a_question_that_was_refused_before_is_taken_out_and_does_not_block_again() -> None:
    messages = [
        said_by("user", "Jane earns 9?"),
        said_by("assistant", "Ask HR."),
        said_by("user", "How do I ask for a raise?"),
    ]
    verdict, seen = await judge_messages(RULES, messages)
    assert verdict.action is Action.ALLOW
    assert [message.content for message in seen] == ["How do I ask for a raise?"]


async def test_a_long_question_does_not_hold_up_the_others() -> None:
    import asyncio

    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    beside = asyncio.create_task(others())
    verdict, seen = await judge_messages(RULES, [said_by("user", "1-" * 200_000 + " 078-05-1120")])
    beside.cancel()
    assert verdict.action is Action.REDACT and seen[0].content.endswith("[SSN]")
    assert turns > 10


async def test_scope_narrows_a_rule_to_the_last_question() -> None:
    narrow = Rule("legal", LEGAL.validator, Action.APPEND, LEGAL.reply, scope="last_user")
    messages = [said_by("user", "overtime?"), said_by("assistant", "Yes."), said_by("user", "thanks")]
    assert (await judge_messages([narrow], messages))[0].action is Action.ALLOW
    verdict, _ = await judge_messages([narrow], messages[:1])
    assert appended([narrow], verdict) == ["Consult a legal professional."]
