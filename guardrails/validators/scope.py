"""What is in scope and what is not, told by how close a text is to example sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from guardrails.classify import LEAST
from guardrails.encoder import SIZE, Vectors, encoder, require
from guardrails.heads import BLOCK, ESCALATE
from guardrails.types import Context, Finding

Sentences = list[Annotated[str, Field(min_length=1)]]
FEW = 8
"""In-scope examples that are too few to tell how close to each other they are."""
COURTEOUS = 0.55
"""The least cosine to one of the courtesies that makes a text one of them."""
COURTESIES = (
    "Hello",
    "Hi, how are you?",
    "Good morning",
    "Good evening",
    "Thanks",
    "Thanks a lot",
    "Great, thanks",
    "Thank you very much, that helped",
    "Yes",
    "Yes, please",
    "No, thank you",
    "Ok",
    "Please go on",
    "Could you repeat that?",
    "I do not understand",
    "What do you mean?",
    "Can you explain that in more detail?",
    "Please make it shorter",
    "Can you help me?",
    "I have a question",
    "Who are you?",
    "What can you do?",
    "Sorry",
    "Goodbye",
    "Are you sure?",
    "Can I talk to a person?",
)


class Options(BaseModel):
    """Examples of what is in scope, of what is not, and of topics that have a name."""

    model_config = ConfigDict(extra="forbid")
    in_scope: Sentences = Field(
        default=[], description=f"Sentences that are in scope, at least {FEW}, better 40; the rest is out of scope."
    )
    out_of_scope: Sentences = Field(default=[], description="Sentences that are out of scope, near the border.")
    topics: dict[str, Sentences] = Field(
        default={}, description="Topics to find: a name (the label) and sentences that are about it."
    )
    courtesies: bool = Field(default=True, description="Whether greetings, thanks and the like are always in scope.")

    @model_validator(mode="after")
    def _enough(self) -> Options:
        if not self.in_scope and not self.topics:
            raise ValueError("name sentences that are `in_scope`, or `topics` to find")
        if self.in_scope and len(self.in_scope) < FEW:
            raise ValueError(f"in_scope: {len(self.in_scope)} sentences are too few to tell; write at least {FEW}")
        if empty := [name for name, sentences in self.topics.items() if not sentences]:
            raise ValueError(f"topics: {', '.join(empty)} has no sentence")
        return self


@dataclass(frozen=True, slots=True)
class Examples:
    """Sentences as vectors, and how close one of them is to its nearest neighbour: mean and spread of the cosine."""

    vectors: Vectors
    mean: float
    spread: float

    def nearest(self, vectors: Vectors) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """The cosine of each vector to the nearest example; -1 without any."""
        if not len(self.vectors):
            return np.full(len(vectors), -1.0)
        return np.asarray((vectors @ self.vectors.T).max(axis=1), np.float64)


async def examples(sentences: Sequence[str]) -> Examples:
    """The examples; of fewer than FEW, whose neighbours say little, with mean and spread of a usual set."""
    parts = [(await encoder().embed(sentence)).vectors for sentence in sentences]
    means = [part.mean(axis=0) / np.linalg.norm(part.mean(axis=0)) for part in parts if len(part)]
    vectors = np.array(means, np.float32).reshape(-1, SIZE)
    if len(vectors) < FEW:
        return Examples(vectors, 0.72, 0.13)
    near = vectors @ vectors.T - 2 * np.eye(len(vectors), dtype=np.float32)
    closest = near.max(axis=1)
    return Examples(vectors, float(closest.mean()), max(float(closest.std()), 0.02))


class Scope:
    """A validator for what is out of scope and for named topics; the examples are encoded with the first text."""

    channels = ("content",)

    def __init__(self, options: Options):
        self.options = options
        self._known: tuple[Examples, Examples, Examples, dict[str, Examples]] | None = None

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        """Findings over the windows that are out of scope, and over those that are about a topic."""
        windows = await encoder().embed(text)
        if not any(map(str.isalpha, text)):
            return []
        inside, outside, polite, topics = self._known = self._known or await self._read()
        own = inside.nearest(windows.vectors)
        scores: list[tuple[str, Sequence[float]]] = []
        if self.options.in_scope:
            border = outside.nearest(windows.vectors)
            far = [_beyond(a, b, inside) for a, b in zip(own, border, strict=True)]
            kind = polite.nearest(windows.vectors)
            scores.append(
                ("out_of_scope", [0.0 if k > max(a, 0.6) else f for a, k, f in zip(own, kind, far, strict=True)])
            )
        for name, topic in topics.items():
            close = topic.nearest(windows.vectors)
            scores.append((name, [_within(c, topic) if c > a else 0.0 for a, c in zip(own, close, strict=True)]))
        return [
            Finding(label, start, end, float(score))
            for label, each in scores
            for (start, end), score in zip(windows.spans, each, strict=True)
            if score >= LEAST
        ]

    async def _read(self) -> tuple[Examples, Examples, Examples, dict[str, Examples]]:
        return (
            await examples(self.options.in_scope),
            await examples(self.options.out_of_scope),
            await examples(COURTESIES if self.options.courtesies else ()),
            {name: await examples(sentences) for name, sentences in self.options.topics.items()},
        )


def _beyond(own: float, border: float, inside: Examples) -> float:
    """How surely a cosine of `own` to the nearest example, and of `border` to the nearest counterexample, is outside.

    0.5 where one in twenty of the examples would be (1.64 spreads below their mean), 0.9 where one in 500 would be
    (2.88); at least 0.5 where a counterexample is nearer.
    """
    below = (inside.mean - own) / inside.spread
    score = float(np.interp(below, (0.0, 1.64, 2.88, 6.0), (0.0, ESCALATE, BLOCK, 1.0)))
    return max(score, min(BLOCK, ESCALATE + 4 * (border - own))) if border > own else score


def _within(close: float, topic: Examples) -> float:
    """How surely a cosine to the nearest example is about the topic: 0.5 where all but one in twenty examples are."""
    above = (close - topic.mean) / topic.spread
    return float(np.interp(above, (-4.0, -1.64, 0.0, 2.0), (0.0, ESCALATE, BLOCK, 1.0)))


def build(options: Options) -> Scope:
    """The validator; raises ValueError where the encoder is not there."""
    require()
    return Scope(options)
