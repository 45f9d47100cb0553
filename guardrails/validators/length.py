"""Texts that are longer than they may be; in a stream the text up to the limit is let through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import regex
from pydantic import BaseModel, ConfigDict, Field, model_validator

from guardrails.types import Context, Finding, Reading

WORD_START = regex.compile(r"(?<!\S)\S")


class Options(BaseModel):
    """How long a text may be."""

    model_config = ConfigDict(extra="forbid")
    max_chars: int | None = Field(default=None, ge=1, description="The most characters (code points).")
    max_words: int | None = Field(default=None, ge=1, description="The most words (runs without white space).")

    @model_validator(mode="after")
    def limited(self) -> Self:
        """Raises ValueError where no limit is set."""
        if self.max_chars is None and self.max_words is None:
            raise ValueError("set max_chars, max_words or both")
        return self


class CharsReading:
    """One text against a number of characters; the finding is empty and lies at the limit."""

    __slots__ = ("_found", "_limit")

    def __init__(self, limit: int):
        self._limit, self._found = limit, False

    def read(self, text: str, final: bool) -> tuple[Sequence[Finding], int]:
        """The finding, as soon as the text is too long; all of the text is settled."""
        new, self._found = len(text) > self._limit and not self._found, len(text) > self._limit
        return [Finding("length", self._limit, self._limit)] if new else [], len(text)


class WordsReading:
    """One text against a number of words; the finding is empty and lies before the first word too many."""

    __slots__ = ("_from", "_left")

    def __init__(self, limit: int):
        self._left, self._from = limit, 0

    def read(self, text: str, final: bool) -> tuple[Sequence[Finding], int]:
        """The finding, as soon as one word too many begins; all of the text is settled."""
        found: list[Finding] = []
        for word in WORD_START.finditer(text, self._from):
            if self._left == 0:
                found.append(Finding("length", word.start(), word.start()))
            self._left -= 1
        self._from = len(text)
        return found, len(text)


class Length:
    """A stream validator for the length of a text; read before all others, which take longer the longer a text is."""

    views = ()  # a disguise has another length: its rule reads no views

    channels = ("content",)
    tier = -1

    def __init__(self, options: Options):
        self._options = options

    def readings(self) -> Sequence[Reading]:
        """Fresh readings, one a limit."""
        chars, words = self._options.max_chars, self._options.max_words
        by_chars: list[Reading] = [] if chars is None else [CharsReading(chars)]
        return by_chars if words is None else [*by_chars, WordsReading(words)]

    def clears(self, text: str) -> bool:
        """True for a text so short that nothing can be found in it (see `guardrails.plan`)."""
        chars, words = self._options.max_chars, self._options.max_words
        return (chars is None or len(text) <= chars) and (words is None or len(text) < 2 * words)

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        """An empty finding at each limit that the text goes beyond, in the order of their places."""
        found = [finding for reading in self.readings() for finding in reading.read(text, True)[0]]
        return sorted(found, key=lambda finding: finding.start)


def build(options: Options) -> Length:
    """The validator for these limits."""
    return Length(options)
