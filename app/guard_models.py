"""The guard models that an operator has set up, asked over HTTP within bounds.

A question costs a GPU some milliseconds and a person some of their wait, so it is bounded: how many a model is asked at
once, how long one may take, how many a turn may ask and how long they may all take. A breaker stops asking a model that
fails. What was asked before is answered from memory. Whatever keeps an answer from being had raises, and the rule's
`if_broken` decides: nothing passes because a guard was busy.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import aiohttp
import orjson

from app.backends import Upstream, answered
from app.breaker import Breaker, BreakerOpen
from app.frames import BackendError
from app.metrics import Metrics
from app.settings import GuardModelSettings
from guardrails.types import Judge, Question, Token

Outcome = Literal[
    "answered", "cached", "timeout", "unreachable", "busy", "rejected", "broken", "open", "budget", "kind", "cancelled"
]
REMEMBERED = 16_384
"""Tokens of answers that are kept of one model: with their alternatives some 3 kB each, 50 MB in all."""
KEPT = 3600.0
"""Seconds for which an answer is kept: another model may be served under the same name by then."""


class GuardModelError(Exception):
    """A guard model was not asked: the turn's budget is spent, or it is of another kind."""


class BudgetSpent(GuardModelError):
    """The turn has asked as many questions as it may, or waited as long as it may."""


class OtherKind(GuardModelError):
    """The rule asks in the format of another family than the one that is served."""


class Budget:
    """What one turn may ask of all guard models together: so many questions, and so many seconds of waiting for them.

    Only time in which a question is out counts, not the time in which the chat model writes.
    """

    def __init__(self, questions: int, seconds: float, clock: Callable[[], float] | None = None):
        self._left, self._seconds = questions, seconds
        self._clock = clock or asyncio.get_running_loop().time
        self._out, self._since, self._waited = 0, 0.0, 0.0

    def take(self) -> float:
        """The clock's time by which the answer must be there; raises BudgetSpent. `give_back` ends the question."""
        now = self._clock()
        self._since = self._since if self._out else now
        left = self._seconds - self._waited - (now - self._since)
        if self._left < 1:
            raise BudgetSpent("the turn has asked as many guard questions as it may (guard_requests)")
        if left <= 0:
            raise BudgetSpent("the turn has waited for guard models as long as it may (guard_seconds)")
        self._left -= 1
        self._out += 1
        return now + left

    def give_back(self) -> None:
        """A question has ended."""
        self._out -= 1
        if not self._out:
            self._waited += self._clock() - self._since


class GuardModel:
    """One guard model behind an OpenAI-compatible URL."""

    def __init__(
        self,
        name: str,
        settings: GuardModelSettings,
        session: aiohttp.ClientSession,
        metrics: Metrics,
        breaker: Breaker | None = None,
    ):
        self._name, self._settings, self._session, self._metrics = name, settings, session, metrics
        secret = settings.api_key.get_secret_value() if settings.api_key else ""
        self._upstream = Upstream(settings.url, settings.model, secret)
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._breaker = breaker or Breaker()
        self._answers: OrderedDict[bytes, tuple[float, list[Token]]] = OrderedDict()
        self._kept = 0
        metrics.guard_breaker.labels(name).set(0)

    async def ask(self, question: Question, budget: Budget) -> Sequence[Token]:
        """The answer, remembered or asked for; raises GuardModelError, BreakerOpen, BackendError, ValueError."""
        if question.kind != self._settings.kind:
            self._count("kind")
            raise OtherKind(
                f"[guard_models.{self._name}] is a {self._settings.kind}, and a rule asks it as a {question.kind}"
            )
        key = _key(question)
        if (known := self._remembered(key)) is not None:
            self._count("cached")
            return known
        try:
            until = budget.take()
        except BudgetSpent:
            self._count("budget")
            raise
        try:
            tokens = await self._asked(question, until)
        finally:
            budget.give_back()
        self._remember(key, tokens)
        return tokens

    def _remembered(self, key: bytes) -> list[Token] | None:
        since, tokens = self._answers.get(key, (0.0, []))
        if not tokens or time.monotonic() - since > KEPT:
            return None
        self._answers.move_to_end(key)
        return tokens

    def _remember(self, key: bytes, tokens: list[Token]) -> None:
        _, before = self._answers.pop(key, (0.0, []))
        self._answers[key] = (time.monotonic(), tokens)
        self._kept += len(tokens) - len(before)
        while self._kept > REMEMBERED:
            _, (_, oldest) = self._answers.popitem(last=False)
            self._kept -= len(oldest)

    async def _asked(self, question: Question, until: float) -> list[Token]:
        """The model's answer, once there is room for the question; every end of it is counted."""
        began = asyncio.get_running_loop().time()
        late: Outcome = "budget" if until < began + self._settings.timeout else "timeout"
        until = min(until, began + self._settings.timeout)
        outcome: Outcome = "cancelled"
        try:
            async with asyncio.timeout_at(until):
                await self._slots.acquire()
        except TimeoutError:
            self._count("busy")
            raise BackendError("busy", f"The guard model {self._name!r} has no room for another question.") from None
        try:
            self._breaker.admit()
            tokens = await answered(self._session, self._upstream, *_request(question, self._upstream.model), until)
            outcome = "answered"
            self._metrics.guard_model_time.labels(self._name).observe(asyncio.get_running_loop().time() - began)
            return tokens
        except BreakerOpen:
            outcome = "open"
            raise
        except BackendError as error:
            outcome = late if error.fault == "timeout" else error.fault
            raise
        except ValueError:
            outcome = "broken"
            raise
        finally:
            self._slots.release()
            self._tell(outcome)

    def _tell(self, outcome: Outcome) -> None:
        """Counts how a question ended, and tells the breaker what that says about the model."""
        self._count(outcome)
        if outcome in ("answered", "rejected"):  # a model that refuses a question is alive
            self._breaker.succeeded()
        elif outcome in ("timeout", "unreachable", "busy", "broken"):
            self._breaker.failed()
        elif outcome != "open":
            self._breaker.unknown()
        self._metrics.guard_breaker.labels(self._name).set(self._breaker.open)

    def _count(self, outcome: Outcome) -> None:
        self._metrics.guard_models.labels(self._name, outcome).inc()


class _Within:
    """A guard model as the validators of one turn may ask it."""

    def __init__(self, model: GuardModel, budget: Budget):
        self._model, self._budget = model, budget

    async def ask(self, question: Question) -> Sequence[Token]:
        """The model's answer, paid from the turn's budget."""
        return await self._model.ask(question, self._budget)


CHECK_QUESTIONS, CHECK_SECONDS = 100_000, 3600.0
"""What the check of one policy may ask."""


class GuardModels:
    """All guard models of a gateway."""

    def __init__(
        self,
        settings: Mapping[str, GuardModelSettings],
        session: aiohttp.ClientSession,
        metrics: Metrics,
        questions: int,
        seconds: float,
    ):
        self._models = {name: GuardModel(name, one, session, metrics) for name, one in settings.items()}
        self._questions, self._seconds = questions, seconds

    def of_turn(self) -> dict[str, Judge]:
        """A turn's judges by name, for its `Context`; they share its budget."""
        budget = Budget(self._questions, self._seconds)
        return {name: _Within(model, budget) for name, model in self._models.items()}

    def of_check(self) -> dict[str, Judge]:
        """The judges by name for the check of a policy, which asks as often as it has examples."""
        budget = Budget(CHECK_QUESTIONS, CHECK_SECONDS)
        return {name: _Within(model, budget) for name, model in self._models.items()}


def _key(question: Question) -> bytes:
    """What an answer is remembered by: a hash, so that no text is kept."""
    messages = [[one.role, _sound(one.content)] for one in question.messages]
    parts = [messages, _sound(question.prompt), question.template, question.tokens, question.stop]
    return hashlib.sha256(orjson.dumps([*parts, question.alternatives], option=orjson.OPT_SORT_KEYS)).digest()


def _request(question: Question, model: str) -> tuple[str, dict[str, Any]]:
    """(route, body) of the question. A prompt brings its own first token; a greedy answer is the most probable one."""
    body: dict[str, Any] = {"model": model, "max_tokens": question.tokens, "temperature": 0}
    if question.stop:
        body["stop"] = list(question.stop)
    if question.prompt:
        prompt = {"prompt": _sound(question.prompt), "logprobs": question.alternatives, "add_special_tokens": False}
        return "completions", body | prompt
    body |= {"logprobs": True, "top_logprobs": question.alternatives}
    if question.template:
        body["chat_template_kwargs"] = dict(question.template)
    messages = [{"role": one.role, "content": _sound(one.content)} for one in question.messages]
    return "chat/completions", body | {"messages": messages}


def _sound(text: str) -> str:
    """The text without lone surrogates, which JSON in UTF-8 cannot carry."""
    with suppress(UnicodeEncodeError):
        text.encode()
        return text
    return text.encode("utf-8", "replace").decode()
