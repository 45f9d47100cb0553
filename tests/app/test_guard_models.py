"""Guard models over HTTP: what they are sent, and every bound on asking them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pydantic import SecretStr, ValidationError

from app.backends import BackendError, tokens_of
from app.breaker import Breaker, BreakerOpen
from app.guard_models import Budget, BudgetSpent, GuardModel, GuardModels, OtherKind
from app.metrics import Metrics
from app.settings import GuardModelSettings
from guardrails.engine import judge
from guardrails.types import Action, Context, Message, Question, Rule, Token
from guardrails.validators import guard_model
from tests.fakes import FakeUpstream, Script
from tests.gateway import free_port, running, until

TOKENS = ({" Unsafe": 0.7, " Safe": 0.3}, {"\n": 1.0}, {"Categories:": 1.0}, {" Violent": 1.0})
PROMPT = Question("qwen3guard", prompt="a prompt", tokens=8, stop=("x",))
CHAT = Question("qwen3guard", (Message("user", "hi"),), template={"think": False}, tokens=8)
WAIT = 30.0


class Asking:
    """One guard model before a fake engine, its breaker's clock, and its counters."""

    def __init__(self, session: aiohttp.ClientSession, upstream: FakeUpstream):
        self.session, self.upstream = session, upstream
        self.metrics, self.now = Metrics(), 0.0
        self.model = self.made()

    def made(self, **changes: Any) -> GuardModel:
        usual: dict[str, Any] = {"url": self.upstream.url, "model": "qwen", "kind": "qwen3guard", "timeout": WAIT}
        settings = GuardModelSettings(**(usual | changes))
        breaker = Breaker(3, 10.0, lambda: self.now)
        return GuardModel("q", settings, self.session, self.metrics, breaker)

    async def ask(self, question: Question = PROMPT, budget: Budget | None = None) -> Sequence[Token]:
        return await self.model.ask(question, budget or Budget(9, WAIT))

    def counted(self) -> dict[str, float]:
        """How many questions ended how."""
        (family,) = self.metrics.guard_models.collect()
        return {one.labels["outcome"]: one.value for one in family.samples if one.name.endswith("_total")}


@pytest.fixture
async def asking() -> AsyncIterator[Asking]:
    async with FakeUpstream(Script(tokens=TOKENS)) as upstream, aiohttp.ClientSession() as session:
        yield Asking(session, upstream)


def numbered(number: int) -> Question:
    """A question that was not asked before."""
    return Question("qwen3guard", prompt=f"prompt {number}")


@pytest.mark.parametrize("question", [PROMPT, CHAT], ids=["prompt", "chat"])
async def test_the_answer_is_read_token_by_token(asking: Asking, question: Question) -> None:
    tokens = await asking.ask(question)
    assert "".join(token.text for token in tokens) == " Unsafe\nCategories: Violent"
    assert dict(tokens[0].alternatives) == pytest.approx({" Unsafe": math.log(0.7), " Safe": math.log(0.3)})
    assert asking.counted() == {"answered": 1}


async def test_a_prompt_goes_to_completions_as_it_is(asking: Asking) -> None:
    await asking.ask()
    assert asking.upstream.requests[0].body == {
        "model": "qwen",
        "prompt": "a prompt",
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": 20,
        "add_special_tokens": False,
        "stop": ["x"],
    }


async def test_messages_go_to_the_models_own_template(asking: Asking) -> None:
    asking.model = asking.made(api_key=SecretStr("sk-1"))
    await asking.ask(CHAT)
    (seen,) = asking.upstream.requests
    assert seen.body == {
        "model": "qwen",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 20,
        "chat_template_kwargs": {"think": False},
    }
    assert seen.headers["authorization"] == "Bearer sk-1"


@pytest.mark.parametrize(
    "question", [Question("qwen3guard", prompt="a\ud800b"), Question("qwen3guard", (Message("user", "\udfff"),))]
)
async def test_lone_surrogates_are_asked_about_too(asking: Asking, question: Question) -> None:
    await asking.ask(question)
    assert "?" in str(asking.upstream.requests[0].body)


async def test_a_question_of_another_kind_is_not_asked(asking: Asking) -> None:
    with pytest.raises(OtherKind, match=r"\[guard_models.q\] is a qwen3guard, and a rule asks it as a shieldgemma"):
        await asking.ask(Question("shieldgemma", prompt="x"))
    assert asking.upstream.requests == [] and asking.counted() == {"kind": 1}


async def test_the_same_question_is_asked_once(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(1, WAIT)
    first = await asking.ask(PROMPT, budget)
    assert await asking.ask(PROMPT, budget) == first, "what is remembered costs nothing"
    assert len(asking.upstream.requests) == 1 and asking.counted() == {"answered": 1, "cached": 1}
    for other in (CHAT, Question("qwen3guard", prompt="a prompt"), Question("qwen3guard", prompt="b")):
        await asking.ask(other)
    assert len(asking.upstream.requests) == 4
    monkeypatch.setattr("app.guard_models.KEPT", 0.0)
    await asking.ask(PROMPT)
    assert len(asking.upstream.requests) == 5, "it was remembered for too long"


async def test_the_oldest_answers_are_forgotten(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.guard_models.REMEMBERED", 2 * len(TOKENS))
    for number in (1, 2, 1, 3, 1, 2):  # 2 is the oldest when 3 comes
        await asking.ask(numbered(number))
    asked = [seen.body["prompt"] for seen in asking.upstream.requests]
    assert asked == ["prompt 1", "prompt 2", "prompt 3", "prompt 2"]


async def test_a_failure_is_not_remembered(asking: Asking) -> None:
    asking.upstream.queue.append(Script(status=500))
    with pytest.raises(BackendError):
        await asking.ask()
    await asking.ask()
    assert asking.counted() == {"broken": 1, "answered": 1}


@pytest.mark.parametrize(
    ("script", "fault", "outcome"),
    [
        (Script(status=503), "busy", "busy"),
        (Script(status=429), "busy", "busy"),
        (Script(status=400), "rejected", "rejected"),
        (Script(status=404), "broken", "broken"),
        (Script(tokens=TOKENS, end="cut"), "broken", "broken"),
    ],
)
async def test_every_failure_is_raised_and_counted(asking: Asking, script: Script, fault: str, outcome: str) -> None:
    asking.upstream.script = script
    with pytest.raises(BackendError) as raised:
        await asking.ask()
    assert raised.value.fault == fault and asking.counted() == {outcome: 1}


async def test_an_engine_that_is_not_there_or_gives_no_probabilities_is_a_failure(asking: Asking) -> None:
    asking.upstream.script = Script(["Safe"])
    with pytest.raises(ValueError, match="no log-probabilities; it must support"):
        await asking.ask()
    asking.model = asking.made(url=f"http://127.0.0.1:{free_port()}/v1")
    with pytest.raises(BackendError, match="cannot be reached"):
        await asking.ask()
    assert asking.counted() == {"broken": 1, "unreachable": 1}


async def test_an_answer_that_is_late_is_a_failure_of_the_model(asking: Asking) -> None:
    asking.upstream.script = Script(tokens=TOKENS, wait=math.inf)
    asking.model = asking.made(timeout=0.05)
    with pytest.raises(BackendError, match="too long"):
        await asking.ask()
    assert asking.counted() == {"timeout": 1}
    assert (await asking.upstream.requests[0].finished()).gone


async def test_a_turn_may_ask_so_many_questions(asking: Asking) -> None:
    budget = Budget(2, WAIT)
    for number in (1, 2):
        await asking.ask(numbered(number), budget)
    with pytest.raises(BudgetSpent, match="as many guard questions as it may"):
        await asking.ask(numbered(3), budget)
    assert len(asking.upstream.requests) == 2 and asking.counted() == {"answered": 2, "budget": 1}


async def test_a_turn_may_wait_so_long_and_that_is_not_the_models_fault(asking: Asking) -> None:
    asking.upstream.script = Script(tokens=TOKENS, wait=math.inf)
    budget = Budget(9, 0.05)
    with pytest.raises(BackendError, match="too long"):
        await asking.ask(PROMPT, budget)
    with pytest.raises(BudgetSpent, match="as long as it may"):
        await asking.ask(PROMPT, budget)
    assert asking.counted() == {"budget": 2} and len(asking.upstream.requests) == 1


def test_only_waiting_counts_and_what_is_asked_side_by_side_counts_once() -> None:
    now = 0.0
    budget = Budget(9, 10.0, lambda: now)
    assert (budget.take(), budget.take()) == (10.0, 10.0)
    now = 4.0
    assert budget.take() == 10.0
    for _ in range(3):
        budget.give_back()
    now = 100.0  # the chat model writes
    assert budget.take() == 106.0
    now = 105.9
    budget.give_back()
    assert budget.take() == pytest.approx(106.0)
    now = 106.0
    with pytest.raises(BudgetSpent, match="has waited for guard models as long as it may"):
        budget.take()


async def test_a_model_that_fails_again_and_again_is_left_alone(asking: Asking) -> None:
    asking.upstream.script = Script(status=500)
    for number in range(3):
        with pytest.raises(BackendError):
            await asking.ask(numbered(number))
    with pytest.raises(BreakerOpen, match="failed 3 times in a row"):
        await asking.ask()
    assert len(asking.upstream.requests) == 3 and asking.counted() == {"broken": 3, "open": 1}
    assert asking.metrics.registry.get_sample_value("newel_guard_model_breaker_open", {"model": "q"}) == 1
    asking.now, asking.upstream.script = 10.0, Script(tokens=TOKENS)
    await asking.ask()
    await asking.ask(numbered(9))
    assert asking.counted() == {"broken": 3, "open": 1, "answered": 2}
    assert asking.metrics.registry.get_sample_value("newel_guard_model_breaker_open", {"model": "q"}) == 0


async def test_no_more_are_asked_at_once_than_there_is_room_for(asking: Asking) -> None:
    asking.upstream.script = Script(tokens=TOKENS, wait=0.05)
    asking.model = asking.made(concurrency=2)
    budget = Budget(9, WAIT)
    work = [asyncio.ensure_future(asking.ask(numbered(number), budget)) for number in range(6)]
    seen: list[int] = []
    while not all(one.done() for one in work):
        seen.append(sum(not request.over.is_set() for request in asking.upstream.requests))
        await asyncio.sleep(0.005)
    assert max(seen) == 2 and asking.counted() == {"answered": 6}


async def test_a_question_that_finds_no_room_in_time_is_an_error(asking: Asking) -> None:
    asking.upstream.script = Script(tokens=TOKENS, wait=math.inf)
    asking.model = asking.made(concurrency=1)
    first = asyncio.ensure_future(asking.ask(numbered(1)))
    await until(lambda: counted(asking))
    with pytest.raises(BackendError, match="no room for another question"):
        await asking.ask(numbered(2), Budget(1, 0.05))
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert asking.counted() == {"busy": 1, "cancelled": 1}


async def counted(asking: Asking) -> bool:
    return bool(asking.upstream.requests)


async def test_a_question_that_is_given_up_is_hung_up_on_and_frees_its_room(asking: Asking) -> None:
    asking.upstream.queue.append(Script(tokens=TOKENS, wait=math.inf))
    asking.model = asking.made(concurrency=1)
    work = asyncio.ensure_future(asking.ask())
    await until(lambda: counted(asking))
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert (await asking.upstream.requests[0].finished()).gone
    await asking.ask()
    assert asking.counted() == {"cancelled": 1, "answered": 1}


async def test_the_judges_of_a_turn_share_its_budget_and_no_other_turns(asking: Asking) -> None:
    one = GuardModelSettings(url=asking.upstream.url, model="m", kind="qwen3guard")
    models = GuardModels({"a": one, "b": one}, asking.session, Metrics(), 1, WAIT)
    judges = models.of_turn()
    await judges["a"].ask(PROMPT)
    with pytest.raises(BudgetSpent):
        await judges["b"].ask(PROMPT)
    await models.of_turn()["b"].ask(PROMPT)


async def test_a_rule_over_http_from_its_options_to_its_verdict(asking: Asking) -> None:
    models = GuardModels(
        {"qwen": GuardModelSettings(url=asking.upstream.url, model="m", kind="qwen3guard")},
        asking.session,
        Metrics(),
        9,
        WAIT,
    )
    validator = guard_model.build(guard_model.Options(kind="qwen3guard", model="qwen"))
    rule = Rule("guard", validator, Action.REFUSE, "No.")
    verdict = await judge([rule], "text", Context(judges=models.of_turn()))
    assert verdict.action is Action.REFUSE
    (found,) = verdict.hits[0].findings
    assert found.label == "violence" and found.score == pytest.approx(0.7)
    asking.upstream.script = Script(status=503)
    verdict = await judge([rule], "another text", Context(judges=models.of_turn()))
    assert (verdict.action, verdict.hits[0].broken) == (Action.REFUSE, "BackendError")


async def test_a_gateway_has_the_judges_of_its_settings(tmp_path: Path) -> None:
    async with FakeUpstream(Script(tokens=TOKENS)) as upstream:
        one = GuardModelSettings(url=upstream.url, model="m", kind="qwen3guard")
        async with running(tmp_path, upstream, guard_models={"qwen": one}, guard_requests=2) as gateway:
            judges = gateway.service.judges.of_turn()
            assert list(judges) == ["qwen"]
            await judges["qwen"].ask(PROMPT)
            assert gateway.metric("newel_guard_model_requests_total", model="qwen", outcome="answered") == 1
            assert gateway.metric("newel_guard_model_seconds_count", model="qwen") == 1


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"model": "m", "kind": "qwen3guard"}, "url"),
        ({"url": "u", "model": "m", "kind": "qwen"}, "Input should be 'plain'"),
        ({"url": "u", "model": "m", "kind": "plain", "timeout": 0}, "greater than 0"),
        ({"url": "u", "model": "m", "kind": "plain", "concurrency": 0}, "greater than or equal to 1"),
        ({"url": "u", "model": "m", "kind": "plain", "tier": "strict"}, "Extra inputs"),
    ],
)
def test_a_table_that_cannot_be_served_is_refused(table: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        GuardModelSettings.model_validate(table)


@pytest.mark.parametrize(
    "answer",
    [
        {},
        [],
        {"choices": []},
        {"choices": [{"logprobs": None}]},
        {"choices": [{"logprobs": {}}]},
        {"choices": [{"logprobs": {"tokens": ["a"], "top_logprobs": None}}]},
        {"choices": [{"logprobs": {"tokens": ["a"], "top_logprobs": []}}]},
        {"choices": [{"logprobs": {"tokens": ["a"], "top_logprobs": [{"a": None}]}}]},
        {"choices": [{"logprobs": {"content": [{"token": "a"}]}}]},
        {"choices": [{"logprobs": {"content": [{"token": "a", "top_logprobs": [{"token": "a"}]}]}}]},
        {"choices": [{"logprobs": {"content": None}}]},
    ],
)
def test_an_answer_without_probabilities_is_an_error(answer: Any) -> None:
    with pytest.raises(ValueError, match="the engine returned no log-probabilities"):
        tokens_of(answer)


def test_a_token_may_come_without_alternatives() -> None:
    completions = {"choices": [{"logprobs": {"tokens": ["a"], "top_logprobs": [None]}}]}
    chat = {"choices": [{"logprobs": {"content": [{"token": "a", "top_logprobs": []}]}}]}
    assert tokens_of(completions) == tokens_of(chat) == [Token("a")]
