"""The validator that asks a guard model: what it asks, how answers become findings, and that it never fails open."""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
from pydantic import ValidationError

from guardrails.answers import Undecided
from guardrails.engine import judge
from guardrails.types import Action, Context, Finding, Message, Question, Rule, StreamValidator, Token
from guardrails.validators import guard_model

TALK = (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "How do I pick a lock?"))


def word(*alternatives: tuple[str, float]) -> Token:
    return Token(alternatives[0][0], tuple((text, math.log(chance)) for text, chance in alternatives))


def said(text: str) -> list[Token]:
    return [word((text, 1.0))]


class Scripted:
    """A judge that answers as it is told and remembers what it was asked."""

    def __init__(self, answer: Sequence[Token] | Callable[[Question], Sequence[Token]]):
        self.asked: list[Question] = []
        self._answer = answer

    async def ask(self, question: Question) -> Sequence[Token]:
        self.asked.append(question)
        return self._answer(question) if callable(self._answer) else self._answer


class YesMan:
    """A chat model that says yes with this probability."""

    def __init__(self, yes: float):
        self.asked: list[Message] = []
        self._yes = yes

    async def probability(self, messages: Sequence[Message]) -> float:
        self.asked = list(messages)
        return self._yes


async def find(
    answer: Sequence[Token] | Callable[[Question], Sequence[Token]], text: str = "text", **options: Any
) -> tuple[list[Finding], list[Question]]:
    """(what is found, what was asked) where the model called `m` answers so."""
    model = Scripted(answer)
    validator = guard_model.build(guard_model.Options(model="m", **options))
    return list(await validator.find(text, Context(TALK, judges={"m": model}))), model.asked


QWEN = [word((" Unsafe", 0.6), (" Controversial", 0.2), (" Safe", 0.2)), *said("\nCategories: Violent, PII")]
LLAMA = [word(("unsafe", 0.9), ("safe", 0.1)), *said("\nS9,S1")]
SCORE = [*said("<think>\n</think>\n<score> "), word(("yes", 0.7), ("no", 0.3))]


@pytest.mark.parametrize(
    ("answer", "options", "expected"),
    [
        (QWEN, {"kind": "qwen3guard"}, Finding("violence", 0, 4, 0.7, "personal_data")),
        (QWEN, {"kind": "qwen3guard", "tier": "strict"}, Finding("violence", 0, 4, 0.8, "personal_data")),
        (QWEN, {"kind": "qwen3guard", "tier": "permissive"}, Finding("violence", 0, 4, 0.6, "personal_data")),
        (QWEN, {"kind": "qwen3guard", "categories": ["personal_data"]}, Finding("personal_data", 0, 4, 0.7)),
        (QWEN[:1], {"kind": "qwen3guard", "categories": ["copyright"]}, Finding("unsafe", 0, 4, 0.7)),
        (QWEN[:1], {"kind": "qwen3guard", "label": "bad"}, Finding("bad", 0, 4, 0.7)),
        (LLAMA, {"kind": "llama-guard-3"}, Finding("violent_crimes", 0, 4, 0.9, "indiscriminate_weapons")),
        ([*said("\n\n"), *LLAMA], {"kind": "llama-guard-4", "categories": ["violent_crimes"]},
         Finding("violent_crimes", 0, 4, 0.9)),
        ([word(("No", 0.8), ("Yes", 0.2))], {"kind": "granite-guardian-3"}, Finding("harm", 0, 4, 0.2)),
        (SCORE, {"kind": "granite-guardian-3.3"}, Finding("harm", 0, 4, 0.7)),
        (SCORE, {"kind": "granite-guardian-4.1", "categories": ["violence"]}, Finding("violence", 0, 4, 0.7)),
        (SCORE, {"kind": "granite-guardian-4.1", "policy": "No locks."}, Finding("unsafe", 0, 4, 0.7)),
        ([word(("Yes", 0.3), ("No", 0.7))], {"kind": "shieldgemma", "policy": "x"}, Finding("unsafe", 0, 4, 0.3)),
        (
            [*said("hm<|channel|>final<|message|>"), word(("1", 0.9), ("0", 0.1))],
            {"kind": "gpt-oss-safeguard", "policy": "No locks.", "label": "locks"},
            Finding("locks", 0, 4, 0.9),
        ),
        (
            [word(("1", 0.9), ("0", 0.1))],
            {"kind": "gpt-oss-safeguard", "policy": "No locks.", "effort": "none"},
            Finding("unsafe", 0, 4, 0.9),
        ),
        (
            [word(("The", 0.5), ("Yes", 0.3), ("No", 0.1))],
            {"kind": "plain", "question": "Is it rude?"},
            Finding("unsafe", 0, 4, 0.75),
        ),
    ],
)  # fmt: skip
async def test_an_answer_becomes_a_finding_over_the_whole_text(
    answer: Sequence[Token], options: dict[str, Any], expected: Finding
) -> None:
    (found,), _ = await find(answer, **options)
    assert (found.label, found.start, found.end, found.note) == (expected.label, 0, 4, expected.note)
    assert found.score == pytest.approx(expected.score)


async def test_a_text_that_has_only_unwanted_categories_is_not_found() -> None:
    assert (await find(QWEN, kind="qwen3guard", categories=["copyright"]))[0] == []
    assert (await find(LLAMA, kind="llama-guard-3", categories=["hate"]))[0] == []


async def test_a_score_is_calibrated() -> None:
    (found,), _ = await find(LLAMA, kind="llama-guard-3", calibration={"scale": 0.5, "shift": -math.log(3)})
    assert found.score == pytest.approx(0.5)


async def test_a_family_that_judges_one_category_at_a_time_is_asked_for_each() -> None:
    def answer(question: Question) -> list[Token]:
        yes = 0.9 if "No Hate Speech" in question.prompt else 0.1
        return [word(("Yes", yes), ("No", 1 - yes))]

    found, asked = await find(answer, kind="shieldgemma")
    assert len(asked) == 4
    assert {one.label: round(one.score, 3) for one in found} == {
        "dangerous": 0.1,
        "harassment": 0.1,
        "hate": 0.9,
        "sexual_content": 0.1,
    }


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, ["USER: text"]),
        ({"about": "reply"}, ["USER: How do I pick a lock?", "ASSISTANT: text"]),
        ({"about": "reply", "history": 2}, ["USER: How do I pick a lock?", "ASSISTANT: text"]),
        (
            {"about": "reply", "history": 9},
            ["USER: Hi", "ASSISTANT: Hello", "USER: How do I pick a lock?", "ASSISTANT: text"],
        ),
        ({"history": 2}, ["USER: Hi", "ASSISTANT: Hello", "USER: text"]),
    ],
)  # fmt: skip
async def test_the_model_is_shown_what_the_rule_wants(options: dict[str, Any], shown: list[str]) -> None:
    _, (question,) = await find(QWEN, kind="qwen3guard", **options)
    talk = question.prompt.split("<BEGIN CONVERSATION>\n\n")[1].split("\n\n<END")[0]
    assert talk.split("\n\n") == shown


async def test_an_earlier_message_is_judged_with_what_came_before_it() -> None:
    _, (question,) = await find(QWEN, text="Hi", kind="qwen3guard", history=5)
    assert "USER: Hi\n\n<END" in question.prompt and "Hello" not in question.prompt


async def test_a_plain_question_without_a_model_goes_to_the_chat_model() -> None:
    chat = YesMan(0.8)
    validator = guard_model.build(guard_model.Options(kind="plain", question="Is it rude?", label="rude"))
    assert await validator.find("text", Context(TALK, chat)) == [Finding("rude", 0, 4, 0.8)]
    assert "Is it rude?" in chat.asked[1].content


async def test_a_long_text_is_judged_in_pieces_that_overlap() -> None:
    text = "".join(f"{i:06d} " for i in range(300))
    found, asked = await find(lambda _: LLAMA, text=text, kind="llama-guard-3", max_chars=500)
    spans = [(one.start, one.end) for one in found]
    assert spans[0] == (0, 500) and spans[-1][1] == len(text) and len(asked) == len(spans)
    assert all(left[1] - right[0] == 50 for left, right in pairwise(spans))
    for (start, end), question in zip(spans, asked, strict=True):
        assert text[start:end].strip() in question.prompt


@pytest.mark.parametrize("length", [0, 1, 499, 500, 501, 950, 951, 10_000])
async def test_every_character_is_in_a_piece(length: int) -> None:
    found, _ = await find(lambda _: LLAMA, text="x" * length, kind="llama-guard-3", max_chars=500)
    assert {place for one in found for place in range(one.start, one.end)} == set(range(length))
    assert found[0].start == 0 and found[-1].end == length


async def test_a_text_that_takes_too_many_questions_breaks_the_rule_at_once() -> None:
    model = Scripted(LLAMA)
    validator = guard_model.build(guard_model.Options(kind="llama-guard-3", model="m"))
    with pytest.raises(ValueError, match="would take more than 64 questions"):
        await validator.find("x" * 10_000_000, Context(judges={"m": model}))
    assert model.asked == []


@pytest.mark.parametrize(
    ("judges", "error", "reason"),
    [
        ({}, LookupError, r"no guard model 'm' is set up; there are: none. Add \[guard_models.m\]"),
        ({"other": Scripted(LLAMA)}, LookupError, "there are: other"),
        ({"m": Scripted([])}, Undecided, "returned no log-probabilities"),
        ({"m": Scripted([Token("safe")])}, Undecided, "returned no log-probabilities"),
        ({"m": Scripted(said("I cannot help with that."))}, Undecided, "none of safe, unsafe"),
    ],
)
async def test_what_cannot_be_judged_breaks_the_rule(
    judges: Mapping[str, Scripted], error: type[Exception], reason: str
) -> None:
    validator = guard_model.build(guard_model.Options(kind="llama-guard-3", model="m"))
    with pytest.raises(error, match=reason):
        await validator.find("text", Context(judges=judges))
    rule = Rule("guard", validator, Action.ESCALATE, "A person will look.", route="people")
    verdict = await judge([rule], "text", Context(judges=judges))
    assert (verdict.action, verdict.hits[0].broken) == (Action.REFUSE, error.__name__)


@pytest.mark.parametrize(("unsafe", "action"), [(0.95, Action.REFUSE), (0.85, Action.ALLOW)])
async def test_a_rule_fires_from_its_threshold_on(unsafe: float, action: Action) -> None:
    model = Scripted([word(("unsafe", unsafe), ("safe", 1 - unsafe))])
    validator = guard_model.build(guard_model.Options(kind="llama-guard-3", model="m"))
    verdict = await judge(
        [Rule("guard", validator, Action.REFUSE, "No.", threshold=0.9)], "x", Context(judges={"m": model})
    )
    assert verdict.action is action


async def test_one_failure_ends_the_other_questions() -> None:
    gone: list[str] = []

    class Slow:
        async def ask(self, question: Question) -> Sequence[Token]:
            if "No Hate Speech" in question.prompt:
                raise ConnectionError
            try:
                await asyncio.sleep(60)
            finally:
                gone.append(question.kind)
            raise AssertionError

    validator = guard_model.build(guard_model.Options(kind="shieldgemma", model="m"))
    before = asyncio.all_tasks()
    with pytest.raises(ConnectionError):
        await validator.find("text", Context(judges={"m": Slow()}))
    assert len(gone) == 3 and asyncio.all_tasks() == before


async def test_who_gives_up_leaves_no_question_behind() -> None:
    asking, gone = asyncio.Event(), asyncio.Event()

    class Stuck:
        async def ask(self, question: Question) -> Sequence[Token]:
            asking.set()
            try:
                await asyncio.sleep(60)
            finally:
                gone.set()
            raise AssertionError

    validator = guard_model.build(guard_model.Options(kind="llama-guard-3", model="m"))
    task = asyncio.ensure_future(validator.find("text", Context(judges={"m": Stuck()})))
    await asking.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gone.is_set()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kind": "qwen3guard-stream"}, "cannot be served by vLLM's OpenAI server.* every = \"sentence\""),
        ({"kind": "llama-guard-9"}, "Input should be 'plain'"),
        ({"kind": "plain"}, "`question` is what kind \"plain\" asks"),
        ({"kind": "plain", "question": "Rude?", "policy": "x"}, "say it all in `question`"),
        ({"kind": "qwen3guard", "model": "m", "question": "Rude?"}, "and only that"),
        ({"kind": "qwen3guard"}, r"needs a `model`: its name under \[guard_models\]"),
        ({"kind": "qwen3guard", "model": "m", "policy": "x"}, "takes no `policy`"),
        ({"kind": "gpt-oss-safeguard", "model": "m"}, "needs a `policy`"),
        ({"kind": "gpt-oss-safeguard", "model": "m", "policy": "x", "categories": ["y"]}, "not both"),
        ({"kind": "shieldgemma", "model": "m", "categories": ["hat"]}, "'hat' for a text; there are: dangerous"),
        ({"kind": "qwen3guard", "model": "m", "about": "reply", "categories": ["jailbreak"]}, "for a reply"),
        ({"kind": "llama-guard-3", "model": "m", "calibration": {"scale": 0}}, "greater than 0"),
        ({"kind": "llama-guard-3", "model": "m", "calibration": {"slope": 1}}, "Extra inputs"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused_with_what_to_do(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        guard_model.Options.model_validate(options)


def test_a_stream_waits_for_the_whole_text() -> None:
    options = guard_model.Options(kind="llama-guard-3", model="m")
    assert not isinstance(guard_model.build(options), StreamValidator)
