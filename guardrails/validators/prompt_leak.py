"""Replies that recite the system prompt: its canary, a run of its letters, or most of a sentence in other order.

Protected are the policy's persona and what the client sent as system or developer. Letters and digits alone are
compared, so spacing, case, punctuation and line breaks hide nothing. It needs the conversation, so it reads whole
texts; with `every = "sentence"` a stream waits for one sentence.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import regex
from pydantic import BaseModel, ConfigDict, Field, field_validator

from guardrails.types import Context, Finding
from guardrails.validators.lexicon import folded


class Options(BaseModel):
    """What must not be recited."""

    model_config = ConfigDict(extra="forbid")
    canary: list[str] = Field(
        default=[],
        description="Secret marks in the prompt, of 8 letters or digits and more; a line `canary: ...` of the persona "
        "is one, too.",
    )
    public: list[str] = Field(default=[], description="Parts of the prompt that may be said: facts, a greeting.")
    system: bool = Field(default=True, description="Whether the client's own system messages are protected, too.")
    letters: int = Field(default=50, ge=20, le=1000, description="Letters and digits in a row that are a recital.")
    similar: float = Field(
        default=0.75, ge=0.5, le=1, description="The share of a sentence's words, close together, that retells it."
    )

    @field_validator("canary")
    @classmethod
    def long_enough(cls, canary: list[str]) -> list[str]:
        """Raises ValueError for a canary that ordinary text could have."""
        if short := next((one for one in canary if len(Compact(one).text) < CANARY), None):
            raise ValueError(f"{short!r} has fewer than {CANARY} letters and digits")
        return canary


CANARY = 8
KEPT = 200_000
"""Characters of a protected text that is kept prepared."""
MARKED = regex.compile(r"(?im)^[ \t>#*-]{0,20}\[?canary\]?[ \t]{0,9}[:=]?[ \t]{0,9}(\S.{0,400})$")
RUN = regex.compile(r"[^\W_]+")
SENTENCE = regex.compile(r"[^.!?\n;]+")
STEM, WORDS = 4, 7
"""Letters by which a word is known in its other forms; words that a sentence must have to be told by them."""
PLAIN = frozenset(
    folded(
        "about after again all also and any answer anything are ask because been before but can cannot could does each "
        "for from have help here how into just like may more must need not only other our please question should some "
        "than that the their them then there these they this those use user very want was well were what when where "
        "which will with would you your"
    ).split()
)
"""Words that every answer may have."""


class Compact:
    """A text's letters and digits, folded, and the way back to their places."""

    __slots__ = ("_ends", "_starts", "text")

    def __init__(self, text: str):
        plain = folded(text)
        self._starts, self._ends = array("q"), array("q")
        out: list[str] = []
        size = 0
        for run in RUN.finditer(plain):
            out.append(run.group())
            self._starts.append(run.start() - size)
            self._ends.append(size := size + len(out[-1]))
        self.text = "".join(out)

    def place(self, at: int) -> int:
        """Where in the text the letter at `at` stands."""
        return at + self._starts[bisect_right(self._ends, at)]


@dataclass(frozen=True, slots=True)
class Sentence:
    """The words by which a protected sentence is known, and how many of them retell it."""

    stems: frozenset[str]
    enough: int


class Protected:
    """A protected text: what to look for of it."""

    def __init__(self, text: str, public: Sequence[str], letters: int, similar: float):
        for phrase in filter(str.strip, public):
            words = r"\s+".join(regex.escape(word) for word in phrase.split())
            text = regex.sub(f"(?i){words}", "\n", text)
        self.canaries = [found for line in MARKED.findall(text) if len(found := Compact(line).text) >= CANARY]
        text = MARKED.sub("\n", text)
        self._letters, self._step = letters, letters // 2
        self.compact = Compact(text).text
        size = self._step
        self._places: dict[str, int] = {}
        for at in range(len(self.compact) - size, -1, -1):
            self._places[self.compact[at : at + size]] = at
        sets = (frozenset(stems(sentence)) for sentence in SENTENCE.findall(text))
        self.sentences = [Sentence(words, ceil(len(words) * similar)) for words in sets if len(words) >= WORDS]

    def recited(self, said: str) -> Iterator[tuple[int, int]]:
        """(start, end) of the runs in `said` that are in this text, too.

        Any run of `letters` has an aligned piece of half that length, which is looked up and then drawn out.
        """
        at, size = 0, self._step
        while at + size <= len(said):
            place = self._places.get(said[at : at + size])
            if place is None:
                at += size
                continue
            start, end = self._drawn(said, at, place)
            if end - start >= self._letters:
                yield start, end
            at = max(at + size, end)

    def _drawn(self, said: str, at: int, place: int) -> tuple[int, int]:
        first, last, own = at, at + self._step, self.compact
        while first and place - (at - first) > 0 and said[first - 1] == own[place - (at - first) - 1]:
            first -= 1
        while last < len(said) and place + last - at < len(own) and said[last] == own[place + last - at]:
            last += 1
        return first, last


_kept = lru_cache(64)(Protected)


def protected(text: str, options: Options) -> Protected:
    """A protected text as it is prepared; short ones are kept, since they are asked for with every sentence."""
    make = _kept if len(text) <= KEPT else Protected
    return make(text, tuple(options.public), options.letters, options.similar)


def stems(text: str) -> list[str]:
    """The words that carry meaning, by their first letters."""
    words = (run.group() for run in RUN.finditer(folded(text)))
    return [word[:STEM] for word in words if len(word) > 2 and word not in PLAIN]


def retold(sentence: Sentence, words: Sequence[tuple[str, int, int]]) -> Iterator[tuple[int, int, float]]:
    """(start, end, share) of the places where enough of the sentence's words stand close together."""
    reach = 2 * len(sentence.stems) + 4
    seen: dict[str, int] = {}
    best: tuple[int, int, float] | None = None
    for at, (stem, _, end) in enumerate(words):
        if stem not in sentence.stems:
            continue
        if best and next(iter(seen.values())) < at - reach:
            yield best
            best = None
            seen.clear()
        seen.pop(stem, None)
        seen[stem] = at
        while (oldest := next(iter(seen.values()))) < at - reach:
            del seen[next(iter(seen))]
        share = len(seen) / len(sentence.stems)
        if len(seen) >= sentence.enough and (best is None or share > best[2]):
            best = (best[0] if best else words[oldest][1], end, share)
    if best:
        yield best


class PromptLeak:
    """A validator for recited prompts."""

    def __init__(self, options: Options):
        self._options = options

    def _texts(self, context: Context) -> list[Protected]:
        own = [message.content for message in context.messages if message.role in ("system", "developer")]
        texts = dict.fromkeys([context.persona, *(own if self._options.system else [])])
        return [protected(text, self._options) for text in texts if text]

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        """Findings `canary` and `recited` (score 1), and `retold` (0.5 to 0.9 by the share of a sentence's words)."""
        said, texts = Compact(text), self._texts(context)
        canaries = [Compact(one).text for one in self._options.canary]
        found = [
            Finding("canary", said.place(at), said.place(at + len(canary) - 1) + 1)
            for canary in dict.fromkeys([*canaries, *(one for known in texts for one in known.canaries)])
            for at in _places(said.text, canary)
        ]
        for known in texts:
            for start, end in known.recited(said.text):
                found.append(Finding("recited", said.place(start), said.place(end - 1) + 1))
        found += self._retold(text, texts)
        return sorted(found, key=lambda finding: finding.start)

    def _retold(self, text: str, texts: Sequence[Protected]) -> Iterator[Finding]:
        words = [
            (word[:STEM], run.start(), run.end())
            for run in RUN.finditer(folded(text))
            if len(word := run.group()) > 2 and word not in PLAIN
        ]
        there = {stem for stem, _, _ in words}
        least = self._options.similar
        for sentence in (sentence for known in texts for sentence in known.sentences):
            if len(sentence.stems & there) < sentence.enough:
                continue
            for start, end, share in retold(sentence, words):
                yield Finding("retold", start, end, 0.5 + (0.4 * (share - least) / (1 - least) if least < 1 else 0.4))


def _places(text: str, part: str) -> Iterator[int]:
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + len(part))


def build(options: Options) -> PromptLeak:
    """The validator for these options."""
    return PromptLeak(options)
