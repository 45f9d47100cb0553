"""What a guard model says about a text: the probability that it is unsafe, read from the model's own labels.

The model judges a text as the user's, or as the assistant's answer to what the user asked. It is shown the whole text,
in pieces that fit its context; a piece that it does not judge breaks the rule, so nothing passes unread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from itertools import chain
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from guardrails import answers
from guardrails.guard_formats import (
    ANSWER,
    CONTROVERSIAL,
    CONTROVERSIAL_COUNTS,
    FORMATS,
    Effort,
    Exchange,
    Format,
    Kind,
    Tier,
    Wish,
)
from guardrails.types import Context, Finding, Message, Question, Token
from guardrails.validators import grader

T = TypeVar("T")
MOST = 64
"""Questions about one text at most; a longer one breaks the rule."""

PLAIN_LEAST = 0.05
"""The share that yes and no must have together where any chat model is asked: it was not trained to say just that."""

STREAM = (
    "qwen3guard-stream cannot be served by vLLM's OpenAI server: it answers with heads on every token, which vLLM does "
    'not run and its API cannot carry. Serve Qwen3Guard-Gen, and write kind = "qwen3guard" and every = "sentence"'
)


class Calibration(BaseModel):
    """How a probability becomes a score: the logistic function of scale * logit(probability) + shift."""

    model_config = ConfigDict(extra="forbid")
    scale: float = Field(default=1.0, gt=0, le=100, description="How steep the score is; below 1 it is less sure.")
    shift: float = Field(default=0.0, ge=-100, le=100, description="Above 0 the score is higher, below 0 lower.")


class Options(BaseModel):
    """Which guard model is asked, and about what."""

    model_config = ConfigDict(extra="forbid")
    kind: Kind = Field(description="The family whose format the model was trained for.")
    model: str = Field(
        default="",
        description="Its name under `[guard_models]`; without one a `plain` question goes to the chat model.",
    )
    about: Literal["text", "reply"] = Field(
        default="text", description="`text` is judged as the user's; `reply` as the answer to what the user asked last."
    )
    history: int = Field(default=0, ge=0, le=50, description="How many messages before it are shown to the model, too.")
    categories: list[str] = Field(default=[], description="The model's categories that count; the usual ones if empty.")
    policy: str = Field(default="", description="What must not be, in your own words, for models that take a policy.")
    question: str = Field(default="", description="For `plain`: a question that yes answers; yes makes the rule fire.")
    tier: Tier = Field(
        default="balanced", description="How Qwen3Guard's `Controversial` counts: whole, half, or not at all."
    )
    effort: Effort = Field(default="low", description="How long gpt-oss-safeguard reasons; `none` is one token.")
    calibration: Calibration = Field(
        default=Calibration(), description="Makes 0.5 and 0.9 mean what they mean for other validators."
    )
    max_chars: int = Field(
        default=12_000, ge=500, le=1_000_000, description="Longer texts are judged in pieces of this many characters."
    )
    label: str = Field(default="unsafe", min_length=1, description="What to call a finding without a category.")

    @field_validator("kind", mode="before")
    @classmethod
    def servable(cls, kind: object) -> object:
        """Raises ValueError for a family that cannot be asked over HTTP, with what to use instead."""
        if kind == "qwen3guard-stream":
            raise ValueError(STREAM)
        return kind

    @model_validator(mode="after")
    def fitting(self) -> Self:
        """Raises ValueError for options that this kind of model has no use for, or lacks."""
        if (self.kind == "plain") != bool(self.question):
            raise ValueError('`question` is what kind "plain" asks, and only that: write a question that yes answers')
        if self.kind == "plain":
            if self.policy or self.categories:
                raise ValueError("a plain question has no `policy` and no `categories`: say it all in `question`")
            return self
        if not self.model:
            raise ValueError(f"a {self.kind} needs a `model`: its name under [guard_models] in newel.toml")
        form = FORMATS[self.kind]
        if self.policy and not form.policy:
            raise ValueError(f"{self.kind} has categories of its own and takes no `policy`")
        if not self.policy and form.policy == "must":
            raise ValueError(f"{self.kind} needs a `policy`: what must not be, in your own words")
        if self.policy and self.categories:
            raise ValueError("write a `policy` or `categories`, not both: make another rule")
        self._known(form)
        return self

    def _known(self, form: Format) -> None:
        answered = form.asked_only if self.about == "reply" else ()
        known = [label for label in form.categories if label not in answered]
        if wrong := [label for label in self.categories if label not in known]:
            there = f"there are: {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{self.kind} has no category {wrong[0]!r} for a {self.about}; {there}")


class GuardModel:
    """A validator that asks a guard model, so a stream waits for the whole text, or for each sentence."""

    tier = 2

    def __init__(self, options: Options):
        self._options = options
        plain = grader.Options(question=options.question, about=options.about) if options.kind == "plain" else None
        self._plain = grader.Grader(plain) if plain else None
        self._weights = dict(ANSWER) if self._plain else dict(FORMATS[options.kind].weights)
        if CONTROVERSIAL in self._weights:
            self._weights[CONTROVERSIAL] = CONTROVERSIAL_COUNTS[options.tier]

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        """A finding for each piece of the text and each category asked about, scored with the probability of unsafe.

        Raises ValueError for a text that is too long, LookupError where the model is not set up, and whatever the
        model's failure raises.
        """
        pieces = list(_pieces(text, self._options.max_chars))
        wishes = self._wishes()
        if len(pieces) * len(wishes) > MOST:
            raise ValueError(f"a text of {len(text)} characters would take more than {MOST} questions to judge")
        asked = [self._ask(start, piece, wish, context) for start, piece in pieces for wish in wishes]
        return list(chain.from_iterable(await _all(asked)))

    def _wishes(self) -> list[Wish]:
        options = self._options
        if self._plain or options.policy:
            return [Wish((), options.policy, options.effort)]
        form = FORMATS[options.kind]
        wanted = tuple(options.categories) or form.usual
        return [Wish((label,)) for label in wanted] if form.each else [Wish(wanted)]

    async def _ask(self, start: int, piece: str, wish: Wish, context: Context) -> list[Finding]:
        options, end = self._options, start + len(piece)
        if self._plain and not options.model:
            (found,) = await self._plain.find(piece, context)
            return [Finding(options.label, start, end, self._score(found.score))]
        judge = context.judges.get(options.model)
        if judge is None:
            there = ", ".join(sorted(context.judges)) or "none"
            raise LookupError(
                f"no guard model {options.model!r} is set up; there are: {there}. Add [guard_models.{options.model}]"
            )
        question = self.question(piece, context, wish)
        tokens = await judge.ask(question)
        least = PLAIN_LEAST if self._plain else answers.LEAST
        mass = answers.shares(tokens, tuple(self._weights), question.after, least)
        score = self._score(answers.risk(mass, self._weights))
        return [Finding(label, start, end, score, note) for label, note in self._named(tokens, question, wish)]

    def question(self, text: str, context: Context, wish: Wish) -> Question:
        """What the model is asked about one piece of text."""
        options = self._options
        if self._plain:
            return Question("plain", tuple(self._plain.messages(text, context)))
        role: Literal["assistant", "user"] = "assistant" if options.about == "reply" else "user"
        exchange = Exchange.of(_before(text, context.messages, options), Message(role, text))
        return FORMATS[options.kind].ask(exchange, wish)

    def _score(self, probability: float) -> float:
        calibration = self._options.calibration
        return answers.calibrated(probability, calibration.scale, calibration.shift)

    def _named(self, tokens: Sequence[Token], question: Question, wish: Wish) -> list[tuple[str, str]]:
        """(label, note) of the finding; none where the model names only categories that the rule does not want."""
        form = FORMATS.get(self._options.kind)
        if form is None or form.each or not form.categories:
            return [(wish.categories[0] if wish.categories else self._options.label, "")]
        named = form.named(answers.following(tokens, question.after))
        wanted = [label for label in named if not wish.categories or label in wish.categories]
        if named and not wanted:
            return []
        return [(wanted[0] if wanted else self._options.label, ", ".join(wanted[1:]))]


def _before(text: str, messages: Sequence[Message], options: Options) -> Sequence[Message]:
    """What was said before the text, as much of it as the rule wants; before a reply at least what was asked."""
    end = len(messages)
    if options.about == "text":
        end = next((i for i in range(end - 1, -1, -1) if messages[i].content == text), max(0, end - 1))
        return messages[max(0, end - options.history) : end]
    asked = next((i for i in range(end - 1, -1, -1) if messages[i].role == "user"), end)
    return messages[max(0, min(asked, end - options.history)) : end]


def _pieces(text: str, size: int) -> Iterator[tuple[int, str]]:
    """(start, piece) of at most `size` characters; neighbours share a tenth, so that nothing is cut unread."""
    step = size - size // 10
    for start in range(0, max(1, len(text) - size // 10), step):
        yield start, text[start : start + size]


async def _all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of them return; the first failure is raised, and the others are cancelled and gone by then."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def build(options: Options) -> GuardModel:
    """The validator that asks this model."""
    return GuardModel(options)
