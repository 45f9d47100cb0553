"""A sentence that must be there and is not, such as "This is no legal advice"; meant for the action `append`.

A paraphrase counts where it is close enough: whole sentences of the reply are compared with it (rapidfuzz), and one
that says the opposite ("this is legal advice") never is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import regex
from pydantic import BaseModel, ConfigDict, Field, model_validator
from rapidfuzz import fuzz

from guardrails.spans import MOST
from guardrails.types import Context, Finding
from guardrails.validators.lexicon import Entry, Lexicon


class Options(BaseModel):
    """What must be said, and when."""

    model_config = ConfigDict(extra="forbid")
    text: str = Field(default="", description="The sentence that must be there, as it is written or close to it.")
    pattern: str = Field(default="", description="A regular expression, any match of which is as good.")
    when: list[str] = Field(
        default=[],
        description="Words and phrases that make it needed; without them, and without `when_patterns`, it always is.",
    )
    when_patterns: list[str] = Field(default=[], description="Regular expressions that make it needed, too.")
    where: Literal["question", "reply", "either"] = Field(
        default="either", description="Where those words must stand: in the last question, in the reply, or in either."
    )
    similar: float = Field(
        default=0.75, ge=0.5, le=1, description="How close a paraphrase must be; 1 is word for word."
    )

    @model_validator(mode="after")
    def has_words(self) -> Self:
        """Raises ValueError where nothing says what must be there, and for a pattern that is none."""
        if len(words(self.text)) < 2 and not self.pattern:
            raise ValueError("write a text of two words or more, a pattern, or both")
        for pattern in (self.pattern, *self.when_patterns):
            try:
                regex.compile(pattern)
            except regex.error as error:
                raise ValueError(f"{pattern!r} is not a valid regular expression: {error}") from None
        return self


WORD = regex.compile(r"[\p{L}\p{N}]+(?:['’][\p{L}]+)?")
SENTENCE = regex.compile(r"[^.!?;:\n。！？；：]+")
DENIALS = "no not never none nothing cannot without nor neither kein keine keinen nicht nie ohne ne pas jamais"
NOT = frozenset(DENIALS.split())
STEM = 5
"""Letters by which a word is known in its other forms."""
READ = 50_000
"""Characters at each end of a reply in which the sentence is looked for."""


def words(text: str) -> list[str]:
    """The words in small letters; `don't` is `do not`."""
    found = [word.lower().replace("’", "'") for word in WORD.findall(text)]
    return [part for word in found for part in ([word[:-3], "not"] if word.endswith("n't") else [word])]


def _denies(sentence: Sequence[str]) -> bool:
    return not NOT.isdisjoint(sentence)


class Disclaimer:
    """A validator that finds what is missing: an empty finding at the end of the text."""

    views = ()  # a disguise says nothing to a reader: its rule reads no views

    channels = ("content",)

    def __init__(self, options: Options):
        self._options = options
        self._text = words(options.text)
        self._sentences = max(1, len(SENTENCE.findall(options.text.strip())))
        self._when = Lexicon([Entry(word, "when") for word in options.when]) if options.when else None

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        """One finding where the sentence is needed and missing."""
        asked = next((message.content for message in reversed(context.messages) if message.role == "user"), "")
        places = {"question": [asked], "reply": [text], "either": [asked, text]}[self._options.where]
        for place in places:
            if await self._needed(place, context):
                return [] if self._is_there(text) else [Finding("disclaimer", len(text), len(text))]
        return []

    async def _needed(self, text: str, context: Context) -> bool:
        if self._when is None and not self._options.when_patterns:
            return True
        if self._when is not None and await self._when.find(text, context):
            return True
        patterns = self._options.when_patterns
        return any(regex.search(f"(?i:{pattern})", text, timeout=MOST) for pattern in patterns)

    def _is_there(self, text: str) -> bool:
        if self._options.pattern and regex.search(f"(?i:{self._options.pattern})", text, timeout=MOST):
            return True
        if not self._text:
            return False
        ends = [text] if len(text) <= 2 * READ else [text[:READ], text[-READ:]]
        return any(self._is_near(end) for end in ends)

    def _is_near(self, text: str) -> bool:
        """True where some clauses in a row, about as many as there must be, say the same in close to the same words."""
        denied = _denies(self._text)
        sentences = [found for sentence in SENTENCE.findall(text) if (found := words(sentence))]
        for at in range(len(sentences)):
            for many in range(1, self._sentences + 2):
                said = [word for sentence in sentences[at : at + many] for word in sentence]
                if len(said) > 3 * len(self._text) + 8:
                    said = self._best(said)
                if _denies(said) == denied and self._covers(said) and self._sounds(said):
                    return True
        return False

    def _covers(self, said: Sequence[str]) -> bool:
        """True where the words that carry the meaning are there, by their first letters."""
        wanted = {word[:STEM] for word in self._text if len(word) > 4}
        there = wanted & {word[:STEM] for word in said}
        return len(there) >= self._options.similar * len(wanted)

    def _sounds(self, said: Sequence[str]) -> bool:
        """True for a sentence that is alike, in whatever order, or that has one in it that is."""
        one, other = " ".join(self._text), " ".join(said)
        near = max(fuzz.ratio(one, other), fuzz.token_sort_ratio(one, other))
        if len(other) > len(one) and self._options.similar < 1:
            near = max(near, fuzz.partial_ratio(one, other))
        return near >= 100 * self._options.similar

    def _best(self, said: Sequence[str]) -> list[str]:
        """The part of a long sentence that is most like the text."""
        wanted = set(self._text)
        size = len(self._text) + 2
        return list(max((said[at : at + size] for at in range(len(said))), key=lambda part: len(wanted & set(part))))


def build(options: Options) -> Disclaimer:
    """The validator for this sentence; raises ValueError for a word in `when` that cannot be looked for."""
    try:
        return Disclaimer(options)
    except ValueError as error:
        raise ValueError(f"when: {error}") from None
