"""A reply of several channels: each says what its own text would have said, and a stop in one of them ends them all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardrails.arguments import Arguments
from guardrails.engine import Guard
from guardrails.reply import ARGUMENTS, CONTENT, NOT_OFFERED, NOT_OFFERED_REPLY, REASONING, Piece, Reply
from guardrails.spans import Span, Spans
from guardrails.types import Action, Context, Finding, Rule, Verdict
from guardrails.validators import disclaimer, json_schema, tool_calls

Part = tuple[str, str]
FIRST, SECOND = f"{ARGUMENTS}:0", f"{ARGUMENTS}:1"
CHANNELS = (CONTENT, REASONING, FIRST, SECOND)


def spans(label: str, *patterns: str) -> Spans:
    return Spans([Span(label, pattern) for pattern in patterns])


class Word:
    """A validator that can only read whole texts."""

    def __init__(self, word: str):
        self.word = word
        self.asked: list[str] = []

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        self.asked.append(text)
        at = text.find(self.word)
        return [] if at < 0 else [Finding("word", at, at + len(self.word))]


EMAIL = Rule("email", spans("email", r"[\w.]{1,20}@[\w.]{1,20}\w"), Action.REDACT)
FALCON = Rule("falcon", spans("falcon", r"(?i)\bproject\s+falcon\b"), Action.REFUSE, "I cannot talk about that.")
HARM = Rule("harm", spans("harm", r"\bhurt\b"), Action.ESCALATE, "A person will read this.", route="people")
LEGAL = Rule("legal", spans("legal", r"(?i)\bovertime\b"), Action.APPEND, "Consult a legal professional.")
RULES = (EMAIL, FALCON, HARM, LEGAL)


async def played(reply: Reply, parts: Sequence[Part], names: tuple[str, ...] = ("send", "find")) -> dict[str, str]:
    """What came out of each channel when these pieces went in; a call's name goes in with its first piece."""
    out = dict.fromkeys(CHANNELS, "")
    unnamed = dict(zip((FIRST, SECOND), names, strict=True))
    for channel, text in parts:
        pieces = reply.feed(channel, text, unnamed.pop(channel, ""))
        pieces += await reply.ask()
        for piece in pieces:
            out[piece.channel] += piece.text
    assert all(out[channel] == reply.released(channel) for channel in CHANNELS)
    return out


async def whole(rules: Sequence[Rule], *parts: Part, **options: object) -> tuple[dict[str, str], Verdict]:
    reply = Reply(rules, offered=("send", "find"), **options)  # type: ignore[arg-type]
    out = await played(reply, parts)
    pieces, verdict = await reply.finish()
    for piece in pieces:
        out[piece.channel] += piece.text
    return out, verdict


async def test_a_reply_without_findings_passes_in_all_channels() -> None:
    parts = [
        (REASONING, "They ask for ann. "),
        (CONTENT, "One moment."),
        (FIRST, '{"to": 1}'),
        (SECOND, '{"q": "\\u00e9"}'),
    ]
    out, verdict = await whole(RULES, *parts)
    assert out == {
        REASONING: "They ask for ann. ",
        CONTENT: "One moment.",
        FIRST: '{"to": 1}',
        SECOND: '{"q": "é"}',
    }
    assert (verdict.action, verdict.text, verdict.rule, verdict.hits) == (Action.ALLOW, "One moment.", "", ())


@pytest.mark.parametrize("channel", [CONTENT, REASONING, FIRST])
async def test_personal_data_is_redacted_wherever_it_stands(channel: str) -> None:
    out, verdict = await whole(RULES, (channel, '{"to": "ann@example.com"}'), (CONTENT, " Done."))
    assert "ann" not in json.dumps(out) and '{"to": "[EMAIL]"}' in out[channel]
    assert (verdict.action, verdict.rule, [hit.rule for hit in verdict.hits]) == (Action.REDACT, "email", ["email"])


@pytest.mark.parametrize(
    "text",
    [
        "about project falcon",
        r'{"q": "about \u0070roject falcon"}',
        r'{"q": "about project\nfalcon"}',
        r'{"q": "about pr\u006fject\u0020falcon"}',
        r'{"q": "{\"in\": \"about \\u0070roject falcon\"}"}',
    ],
)
@pytest.mark.parametrize("channel", [REASONING, FIRST])
async def test_a_stop_in_any_channel_ends_the_reply(channel: str, text: str) -> None:
    reply = Reply(RULES, offered=["send"])
    out = await played(reply, [(CONTENT, "Well, "), *((channel, sign) for sign in text), (CONTENT, "and more")])
    pieces, verdict = await reply.finish()
    assert reply.stopped and pieces == []
    assert (verdict.action, verdict.text, verdict.rule) == (Action.REFUSE, "I cannot talk about that.", "falcon")
    assert (out[CONTENT], verdict.kept) == ("Well, ", "Well, ")
    assert out[channel] == text[: text.index("about ") + 6]


async def test_the_strictest_stop_at_the_end_decides_and_nothing_else_is_released() -> None:
    late = (
        Rule("late", Word("zebra"), Action.REFUSE, "No zebras."),
        Rule("sad", Word("hurt"), Action.ESCALATE, "Help."),
    )
    out, verdict = await whole(late, (CONTENT, "A zebra. "), (REASONING, "hurt"), (FIRST, "{}"))
    assert (verdict.rule, verdict.text, out) == ("sad", "Help.", dict.fromkeys(CHANNELS, ""))


async def test_only_what_is_said_gets_lines() -> None:
    _, verdict = await whole(RULES, (REASONING, "overtime?"), (CONTENT, "Yes."), (FIRST, '{"q": "overtime"}'))
    assert (verdict.action, verdict.text, verdict.closing) == (Action.ALLOW, "Yes.", "")
    _, verdict = await whole(RULES, (CONTENT, "Overtime is paid."))
    assert (verdict.action, verdict.closing) == (Action.APPEND, "\n\nConsult a legal professional.")
    _, verdict = await whole(RULES, (CONTENT, '{"a": "overtime"}'), structured=True)
    assert (verdict.action, verdict.text, verdict.closing) == (Action.APPEND, '{"a": "overtime"}', "")


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [(CONTENT, "Write to ann@example.com.\nOvertime is paid.")],
        [(CONTENT, '{"to": "ann@example.com", "n": [1]}')],
        [(CONTENT, "You may hurt. About project falcon.")],
        [(CONTENT, "About project "), (CONTENT, "falcon.")],
        [(CONTENT, "About project falcon."), (FIRST, '{"q": 1}')],
        [(CONTENT, "One moment, ann@example.com"), (FIRST, '{"q": "hurt"}'), (CONTENT, "!")],
        [(REASONING, "They ask about project falcon"), (CONTENT, "You may hurt.")],
        [(CONTENT, "It is \ud83d"), (CONTENT, "\udd25 hot."), (REASONING, "Done.")],
    ],
)
@pytest.mark.parametrize("structured", [False, True])
async def test_a_reply_that_is_not_streamed_comes_to_the_same(parts: list[Part], structured: bool) -> None:
    ends = []
    for streamed in (True, False):
        reply = Reply(RULES, offered=["send"], structured=structured, streamed=streamed)
        for channel, text in parts:
            reply.feed(channel, text, "" if reply.draft(channel) or channel != FIRST else "send")
        _, verdict = await reply.finish()
        ends.append((verdict, reply.whole, reply.withheld, reply.stopped, reply.redacted()))
    assert ends[0] == ends[1]


async def test_what_is_said_is_given_out_at_the_end_where_nothing_is_streamed() -> None:
    reply = Reply(RULES, streamed=False)
    assert reply.feed(CONTENT, "About project falcon.") == [] and not reply.stopped
    assert reply.withheld == "About project falcon."
    pieces, verdict = await reply.finish()
    assert (pieces, verdict.rule, reply.stopped) == ([Piece(CONTENT, "About ")], "falcon", True)


async def test_what_is_said_in_json_stays_json() -> None:
    quoted = replace(EMAIL, placeholder='"mail"')
    _, verdict = await whole([quoted], (CONTENT, '{"to": "ann@example.com", "n": [1]}'), structured=True)
    assert json.loads(verdict.text) == {"to": '"mail"', "n": [1]}


# --- tool calls


async def test_a_call_begins_with_its_name() -> None:
    reply = Reply((), offered=["send"])
    assert reply.feed(FIRST, "", "se") == []
    assert reply.feed(FIRST, "", "nd") == []
    assert reply.feed(FIRST, '{"a') == [Piece(FIRST, '{"a', "send")]
    assert reply.feed(FIRST, '"}', "more") == [Piece(FIRST, '"}')]
    assert (await reply.finish())[0] == []
    assert (reply.calls, reply.name(FIRST), reply.released(FIRST)) == ([FIRST], "send", '{"a"}')


async def test_a_call_without_arguments_is_a_call() -> None:
    reply = Reply(RULES, offered=["send"])
    assert reply.feed(FIRST, "", "send") == []
    pieces, verdict = await reply.finish()
    assert (pieces, verdict.action) == ([Piece(FIRST, "", "send")], Action.ALLOW)


@pytest.mark.parametrize("arguments", ["", "{}"])
@pytest.mark.parametrize("name", ["", "delete_all", "Send", "send "])
async def test_a_tool_that_was_not_offered_is_not_called(name: str, arguments: str) -> None:
    reply = Reply((), offered=["send"])
    said = [*reply.feed(CONTENT, "So. "), *reply.feed(FIRST, arguments, name)]
    pieces, verdict = await reply.finish()
    assert [*said, *pieces] == [Piece(CONTENT, "So. ")]
    assert (verdict.action, verdict.text, verdict.rule) == (Action.REFUSE, NOT_OFFERED_REPLY, NOT_OFFERED)
    assert (verdict.kept, [hit.rule for hit in verdict.hits]) == ("So. ", [NOT_OFFERED])


async def test_white_space_beside_a_call_is_nothing_said() -> None:
    asked = Word("zebra")
    reply = Reply([Rule("word", asked, Action.REFUSE, "No.")], offered=["send", "find"])
    await played(reply, [(CONTENT, "\n\n"), (FIRST, "{}")])
    assert [piece.channel for piece in (await reply.finish())[0]] == [FIRST]
    assert asked.asked == ["{}"]


OURS = tool_calls.Argument(type="string", pattern=r"\w+@ours\.com")
LISTED = tool_calls.build(tool_calls.Options(tools=[tool_calls.Tool(name="send", arguments={"to": OURS})]))


@pytest.mark.parametrize(
    ("to", "passes"), [("ann@ours.com", True), ("ann@evil.com", False), ("[EMAIL_1]", True), ("[EMAIL_2]", False)]
)
async def test_a_rule_about_whole_calls_makes_them_wait(to: str, passes: bool) -> None:
    rule = Rule("listed", LISTED, Action.REFUSE, "Not that tool.")
    reply = Reply([rule], offered=["send"], restored=lambda text: text.replace("[EMAIL_1]", "bob@ours.com"))
    assert reply.feed(CONTENT, "I send it. ") == [Piece(CONTENT, "I send it. ")]
    assert reply.feed(FIRST, json.dumps({"to": to}), "send") == []
    pieces, verdict = await reply.finish()
    if passes:
        assert pieces == [Piece(FIRST, json.dumps({"to": to}), "send")] and verdict.action is Action.ALLOW
    else:
        assert (pieces, verdict.text, verdict.rule, verdict.kept) == ([], "Not that tool.", "listed", "I send it. ")
        assert reply.released(FIRST) == ""


async def test_a_call_that_is_redacted_is_left_out() -> None:
    rule = Rule("listed", LISTED, Action.REDACT)
    out, verdict = await whole([rule], (FIRST, '{"to": "a@ours.com"}'), (SECOND, "{}"))
    assert (out[FIRST], out[SECOND]) == ('{"to": "a@ours.com"}', "")
    assert (verdict.action, verdict.rule) == (Action.REDACT, "listed")


async def test_a_rule_that_is_only_watched_makes_nothing_wait() -> None:
    reply = Reply([Rule("listed", LISTED, Action.REFUSE, "No.", mode="shadow")], offered=["find"])
    assert reply.feed(FIRST, "{}", "find") == [Piece(FIRST, "{}", "find")]
    _, verdict = await reply.finish()
    assert (verdict.action, [hit.rule for hit in verdict.hits]) == (Action.ALLOW, ["listed"])


async def test_rules_about_what_is_said_do_not_read_the_rest() -> None:
    schema = json_schema.build(json_schema.Options(shape={"type": "object"}))
    needed = disclaimer.build(disclaimer.Options(text="This is no advice."))
    rules = [Rule("shape", schema, Action.REFUSE, "No."), Rule("advice", needed, Action.REFUSE, "No.")]
    _, verdict = await whole(rules, (REASONING, "Hm."), (FIRST, "{}"))
    assert (verdict.action, verdict.hits) == (Action.ALLOW, ())


# --- any pieces in any order

STOPS, SIGNS = ["project", "falcon", "Falcon ", "hurt"], [" ", ". ", "{", '"', "\\u0070", "\\n", "\\", "é", "x"]
WORDS = [*STOPS, *SIGNS, "ann@x.co", "overtime"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=8).map("".join)


async def alone(rules: Sequence[Rule], channel: str, text: str) -> Verdict:
    """What the rules would deliver of this channel alone."""
    in_json = Arguments() if channel.startswith(ARGUMENTS) else None
    guard = Guard(rules, None, in_json.placeholder if in_json else None)
    guard.feed(in_json.feed(text, final=True) if in_json else text)
    return (await guard.finish())[1]


def stirred(texts: dict[str, str], choose: Callable[[st.SearchStrategy[int]], int]) -> list[Part]:
    """The texts in pieces, in some order."""
    rest, parts = {channel: text for channel, text in texts.items() if text}, list[Part]()
    while rest:
        channel = sorted(rest)[choose(st.integers(0, len(rest) - 1))]
        size = choose(st.integers(1, len(rest[channel])))
        parts.append((channel, rest[channel][:size]))
        rest = {name: text[size:] if name == channel else text for name, text in rest.items()}
        rest = {name: text for name, text in rest.items() if text}
    return parts


@pytest.mark.parametrize("every", ["text", "sentence"])
@given(st.fixed_dictionaries(dict.fromkeys(CHANNELS, TEXTS)), st.data())
async def test_streamed_is_whole_and_nothing_leaks(every: str, texts: dict[str, str], data: st.DataObject) -> None:
    late = Rule("late", Word("xx"), Action.REFUSE, "No.", every="sentence" if every == "sentence" else "text")
    for rules in (RULES, (*RULES, late)):
        expected = {channel: await alone(rules, channel, text) for channel, text in texts.items() if text}
        out, verdict = await whole(rules, *stirred(texts, data.draw))
        for channel, one in expected.items():
            assert one.kept.startswith(out[channel]), channel
        stops = {one.rule for one in expected.values() if one.action.stops}
        if stops:
            assert verdict.action.stops and verdict.rule in stops
            assert verdict.kept == out[CONTENT]
        else:
            assert not verdict.action.stops
            silent = not texts[CONTENT].strip() and (texts[FIRST] or texts[SECOND])
            for channel, one in expected.items():
                assert out[channel] == one.kept or (channel == CONTENT and silent)
            assert verdict.closing == (expected[CONTENT].closing if CONTENT in expected and not silent else "")
