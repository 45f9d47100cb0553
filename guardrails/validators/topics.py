"""Topics told by words and phrases, in any case and in their usual English forms (salary, salaries; fire, fired)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import regex
from pydantic import BaseModel, ConfigDict, Field

from guardrails.spans import SHORT, Span, Spans, allowed
from guardrails.types import Context, Finding, Validator


class Topic(BaseModel):
    """One topic and the words that tell it."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, description="What to call it: the label of its findings.")
    words: list[str] = Field(
        min_length=1,
        description="Words and phrases, any of which tells the topic. Whole words; `discriminat*` stands for all "
        "that begin so.",
    )
    also: list[list[str]] = Field(
        default=[], description="Groups of words; the topic counts only if the text has a word of every group, too."
    )
    unless: list[str] = Field(
        default=[], description="Words and phrases; a sentence that has one of them does not tell the topic."
    )


class Options(BaseModel):
    """The topics to look for."""

    model_config = ConfigDict(extra="forbid")
    topics: list[Topic] = Field(
        min_length=1, description="The topics: `name`, `words`, and if need be `also`, `unless`."
    )
    inflect: bool = Field(default=True, description="Whether `salary` also stands for `salaries` and `salary's`.")


SENTENCE = regex.compile(r"[^.!?\n]+(?:[.!?]+(?!\s)[^.!?\n]+)*")
"""A sentence; a full stop inside a number or a name (3.5, e.g) does not end it."""


def phrase(words: str, inflect: bool) -> str:
    """The pattern of a word or phrase; raises ValueError where nothing is left to look for."""
    forms = [_forms(word, inflect) for word in words.split()]
    if not any(any(map(str.isalnum, word)) for word in words.split()):
        raise ValueError(f"topics: {words!r} has no letter or digit to look for")
    return r"[\s-]{1,3}".join(forms)


def _forms(word: str, inflect: bool) -> str:
    """A word, or its plural, possessive and verb forms after the rules of English spelling."""
    if word.endswith("*"):
        return _plain(word[:-1]) + r"\w{0,24}"
    if not inflect or len(word) < 3 or not word.isalpha():
        return _plain(word)
    stem, last = _plain(word[:-1]), word[-1].lower()
    own = "['’]s?"
    if last == "y" and word[-2].lower() not in "aeiou":
        return f"{stem}(?:y(?:ing|{own})?|ie[sd])"
    if word[-2:].lower() == "ie":
        return f"{_plain(word[:-2])}(?:ie(?:[sd]|{own})?|ying)"
    if last == "e":
        return f"{stem}(?:e(?:[sd]|{own})?|ing)"
    return f"{stem}{last}(?:e?s|{last}?(?:ed|ing)|{own})?"


def _plain(word: str) -> str:
    return regex.escape(word).replace("'", "['’]")


def _pattern(words: Sequence[str], inflect: bool) -> str:
    """Any of the words, the longest first, as whole words and in any case."""
    forms = "|".join(phrase(one, inflect) for one in sorted(words, key=len, reverse=True))
    return rf"(?i:(?<!\w)(?:{forms})(?!\w))"


@dataclass(frozen=True, slots=True)
class Bound:
    """A topic that other words decide about: all of `also` must be in the text, none of `unless` in the sentence."""

    span: Span
    also: tuple[regex.Pattern[str], ...]
    unless: regex.Pattern[str] | None

    def findings(self, text: str) -> list[Finding]:
        """The findings in the whole text."""
        seconds = allowed(len(text))
        if not all(group.search(text, timeout=seconds) for group in self.also):
            return []
        found, _ = self.span.findings(text, 0, len(text))
        return found if self.unless is None else list(self._meant(text, found, self.unless))

    def _meant(self, text: str, found: Sequence[Finding], unless: regex.Pattern[str]) -> Iterator[Finding]:
        """The findings whose sentence has no excuse; each sentence with a finding is looked into once."""
        sentences = SENTENCE.finditer(text, timeout=allowed(len(text)))
        sentence, excused = next(sentences, None), None
        for finding in found:
            while sentence and sentence.end() <= finding.start:
                sentence, excused = next(sentences, None), None
            if sentence and excused is None:
                excused = unless.search(text, *sentence.span(), timeout=allowed(len(sentence.group()))) is not None
            if not excused:
                yield finding


class Topics:
    """A validator for topics that need the whole text."""

    def __init__(self, topics: Sequence[Bound]):
        self.topics = tuple(topics)

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        """The findings of all topics, in the order of their start."""
        return await asyncio.to_thread(self._find, text) if len(text) > SHORT else self._find(text)

    def _find(self, text: str) -> list[Finding]:
        found = [finding for topic in self.topics for finding in topic.findings(text)]
        return sorted(found, key=lambda finding: finding.start)


def build(options: Options) -> Validator:
    """The validator for these topics: one for streams, unless `also` or `unless` need the whole text."""
    spans = [Span(topic.name, _pattern(topic.words, options.inflect)) for topic in options.topics]
    if not any(topic.also or topic.unless for topic in options.topics):
        return Spans(spans)
    return Topics(
        [
            Bound(
                span,
                tuple(regex.compile(_pattern(group, options.inflect)) for group in topic.also),
                regex.compile(_pattern(topic.unless, options.inflect)) if topic.unless else None,
            )
            for span, topic in zip(spans, options.topics, strict=True)
        ]
    )
