"""What is told in one pass for many rules hides nothing: a guard that skips decides as one that reads everything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardrails.conversation import judge_messages
from guardrails.engine import Guard, judge
from guardrails.plan import MOST, Plan, plan_of
from guardrails.prefilter import Begun, Prefilter
from guardrails.reply import CONTENT, Reply
from guardrails.spans import PRECISE, PatternError, Span, Spans
from guardrails.types import Action, Context, Finding, Message, Rule, Verdict
from guardrails.validators import injection, personal, secrets
from guardrails.views.ordinary import ALL
from tests.conformance.disguises import DISGUISES, MORE
from tests.guardrails import test_validators_injection, test_validators_personal, test_validators_secrets
from tests.guardrails.test_prefilter import PATTERNS, TEXTS


@contextmanager
def reading_everything() -> Iterator[None]:
    """Every pattern is a candidate everywhere, and every stage of the views looks at all text itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prefilter, "candidates", lambda self, text: {*self._always, *self._numbers[1:]})
        patch.setattr(Begun, "first", lambda self, text, start, end: start)
        patch.setattr(Begun, "alive", lambda self, text, start, end: {number for number, _ in self._begun})
        patch.setattr("guardrails.views.certain", lambda text, start: (-1, -1))
        patch.setattr("guardrails.views.unusual", lambda part: ALL)
        patch.setattr("guardrails.reading.unusual", lambda part: ALL)
        yield


async def decided(rules: Sequence[Rule], text: str, size: int) -> tuple[object, ...]:
    """What is decided about a text: as a whole, as a question, as two messages, as a stream."""
    guard, half = Guard(rules), len(text) // 2
    said = [guard.feed(text[at : at + size]) for at in range(0, len(text), size)]
    last, verdict = await guard.finish()
    return (
        await judge(rules, text),
        await judge_messages(rules, [Message("user", text)]),
        await judge_messages(rules, [Message("user", text[:half]), Message("user", text[half:])]),
        "".join([*said, last]),
        verdict,
    )


WORDS = st.sampled_from(["ab", "kiss", "a-b", "K1", "İa", "salary", "éa", "bab", "a b", "ſk"])
DISGUISED = st.tuples(st.sampled_from(list({**DISGUISES, **MORE}.values())), WORDS).map(lambda two: two[0](two[1]))
MIXED = st.lists(TEXTS | WORDS | DISGUISED | st.sampled_from([" ", "\n", ". "]), max_size=5).map("".join)
SETTINGS = st.tuples(
    st.lists(PATTERNS | WORDS, min_size=1, max_size=3),
    st.sampled_from([Action.REDACT, Action.REFUSE, Action.APPEND]),
    st.sampled_from([None, None, PRECISE]),
    st.booleans(),
    st.sampled_from(["enforce", "enforce", "shadow"]),
)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@settings(max_examples=400, deadline=None)
@given(st.lists(SETTINGS, min_size=1, max_size=4), MIXED, st.integers(1, 9))
async def test_a_guard_that_skips_decides_as_one_that_reads_everything(chosen, text: str, size: int) -> None:
    rules: list[Rule] = []
    for number, (patterns, action, views, disguised, mode) in enumerate(chosen):
        try:
            spans = Spans([Span(f"x{number}", pattern) for pattern in patterns], views)
        except PatternError:
            return
        rules.append(Rule(f"rule {number}", spans, action, "No.", views=disguised, mode=mode))
    skipping = await decided(rules, text, size)
    with reading_everything():
        assert await decided(rules, text, size) == skipping


SHIPPED = (
    Rule("personal", personal.build(personal.Options(allow=["*@acme.com"])), Action.REDACT),
    Rule("secrets", secrets.build(secrets.Options()), Action.REDACT),
    Rule("injection", injection.build(injection.Options()), Action.REFUSE, "No.", threshold=0.3),
)
HITS = [
    text
    for tests in (test_validators_personal, test_validators_secrets, test_validators_injection)
    for text, _ in tests.HITS
]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(HITS) | st.sampled_from(HITS).map(lambda text: text[3:-3]), min_size=1, max_size=2),
    st.sampled_from([str, *DISGUISES.values()]),
    st.integers(1, 40),
)
async def test_the_shipped_patterns_together_decide_as_each_that_reads_everything(texts, disguise, size: int) -> None:
    text = disguise("\n".join(texts))[:600]
    skipping = await decided(SHIPPED, text, size)
    with reading_everything():
        assert await decided(SHIPPED, text, size) == skipping


def test_of_ordinary_text_no_rule_is_asked_and_no_view_is_made() -> None:
    from guardrails.reading import Seen

    seen = Seen("I have been here for two years. How do I ask for a raise?", plan_of(SHIPPED))
    assert all(seen.is_quiet(place) for place in range(len(SHIPPED)))
    assert list(seen.views) == []


def test_a_validator_with_its_own_way_to_read_is_always_asked() -> None:
    class Own(Spans):
        async def find(self, text: str, context: Context) -> Sequence[Finding]:
            return [Finding("own", 0, 1)]

    rule = Rule("own", Own([Span("own", "zebra")]), Action.REFUSE, "No.")
    plan = Plan([rule])
    assert plan.joints == [] and plan.single == [0] and plan.patterns is None


def test_a_plan_is_made_once_for_the_same_rules_and_not_kept_for_ever() -> None:
    rules = [Rule("r", SHIPPED[1].validator, Action.REDACT)]
    plan = plan_of(rules)
    assert plan_of(tuple(rules)) is plan and plan_of([*rules, *rules]) is not plan
    kept = [plan_of([Rule(str(n), SHIPPED[1].validator, Action.REDACT)]) for n in range(MOST)]
    assert len(kept) == MOST and plan_of(rules) is not plan


class Slow(Span):
    """A pattern whose matches are looked at by something that fails."""

    def rated(self, text: str) -> float:
        raise OSError


async def test_a_pattern_that_breaks_breaks_its_own_rule_and_no_other() -> None:
    broken = Rule("broken", Spans([Slow("x", "zebra")]), Action.REDACT, if_broken=Action.ALLOW)
    horse = Rule("horse", Spans([Span("horse", "horse")]), Action.REDACT)
    for pieces in (["a zebra, a horse, a zebra"], list("a zebra, a horse, a zebra")):
        guard = Guard([broken, horse])
        said = [guard.feed(piece) for piece in pieces]
        last, verdict = await guard.finish()
        assert "".join([*said, last]) == "a zebra, a [HORSE], a zebra"
        assert [(hit.rule, hit.broken) for hit in verdict.hits] == [("broken", "OSError"), ("horse", "")]


async def test_a_rule_pays_for_its_own_searches_only() -> None:
    slow = Rule("slow", Spans([Span("x", "zebra")]), Action.REDACT, budget=1e-9, if_broken=Action.ALLOW)
    verdict = await judge([slow, Rule("horse", Spans([Span("horse", "horse")]), Action.REDACT)], "a zebra, a horse")
    assert [(hit.rule, hit.broken) for hit in verdict.hits] == [("slow", "TimeoutError"), ("horse", "")]


async def test_a_stream_that_can_no_longer_be_made_out_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guardrails.views.MOST", 12)
    one = Rule("one", Spans([Span("one", r"\bone\b")]), Action.REDACT)
    guard = Guard([one, Rule("horse", Spans([Span("horse", "horse")]), Action.REFUSE, "No.")])
    said = "".join(map(guard.feed, "one long word"[:12]))
    assert not guard.stopped and said == "[ONE] long"
    assert guard.feed("x") == "" and guard.stopped
    _, verdict = await guard.finish()
    assert (verdict.kept, [hit.rule for hit in verdict.hits]) == ("[ONE] long", ["one", "horse"])


EMAIL = Rule("email", Spans([Span("email", r"\b\w{1,20}@\w{1,20}\.\w{2,9}\b")]), Action.REDACT)
WIDE = Rule("wide", Spans([Span("wide", r"mail \w+@")]), Action.REDACT)


async def test_a_guard_says_how_far_it_has_come_and_what_it_hid_on_the_way() -> None:
    text = "To ann@example.com, my mail bob@example.org now and so on"
    first, second = (text.index("ann"), text.index(",")), (text.index("mail"), text.index(" now"))
    guard, said = Guard([EMAIL, WIDE]), ""
    assert (guard.cursor, guard.redacted) == (0, [])
    for end in range(len(text)):
        said += guard.feed(text[end])
        shown, at = "", 0
        for start, beyond in guard.redacted:
            shown, at = shown + text[at:start] + ("[EMAIL]" if start == first[0] else "[WIDE]"), beyond
        assert shown + text[at : guard.cursor] == said
    await guard.finish()
    assert (guard.cursor, guard.redacted) == (len(text), [first, second])


async def test_a_guard_that_is_stopped_has_come_to_the_stop() -> None:
    guard = Guard([EMAIL, Rule("no", Spans([Span("no", "zebra")]), Action.REFUSE, "No.")])
    guard.feed("To ann@example.com: a zebra is in it")
    assert guard.stopped and (guard.cursor, guard.redacted) == (len("To ann@example.com: a "), [(3, 18)])


async def test_a_reply_says_it_of_each_channel() -> None:
    reply = Reply([EMAIL])
    reply.feed(CONTENT, "To ann@example.com. And ")
    assert reply.cursor() == len("To ann@example.com. ") and reply.redacted() == [(3, 18)]
    assert (reply.cursor("reasoning"), reply.redacted("reasoning")) == (0, [])
    _, verdict = await reply.finish()
    assert isinstance(verdict, Verdict) and reply.cursor(CONTENT) == len("To ann@example.com. And ")
