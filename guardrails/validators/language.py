"""The language of a text, told from its beginning (py3langid, 140 languages)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol, cast

import regex
from pydantic import BaseModel, ConfigDict, Field

from guardrails.types import Context, Finding, Reading


class Identifier(Protocol):
    """What is used of `py3langid.langid.LanguageIdentifier`."""

    @property
    def labels(self) -> list[str]:
        """The languages that it knows."""
        ...

    def rank(self, text: str) -> list[tuple[str, float]]:
        """All languages with their probabilities, the likeliest first."""
        ...


class Options(BaseModel):
    """The languages that may be written."""

    model_config = ConfigDict(extra="forbid")
    allow: list[str] = Field(min_length=1, description="Languages that are welcome, as ISO 639-1 codes such as `en`.")
    first: int = Field(default=240, ge=40, le=4000, description="How many characters are read to tell the language.")


LETTER = regex.compile(r"\p{L}")
LETTERS = 20
"""With fewer letters than this no language is told, and the text passes."""
CERTAIN = 0.9
"""The least probability of one language for the text to count as decided; less passes."""


@cache
def identifier() -> Identifier:
    """The model, read once in a process (about a second, 60 MB) and only where a policy names a language."""
    from py3langid import langid

    make = cast(Callable[..., Identifier], langid.LanguageIdentifier.from_model_file)
    return make(langid.MODEL_FILE, norm_probs=True)


def beginning(text: str) -> int:
    """Where the first letter stands: blanks and signs before it tell no language."""
    letter = LETTER.search(text)
    return letter.start() if letter else len(text)


def judged(text: str, allow: Sequence[str], first: int) -> list[Finding]:
    """A finding over the beginning, `first` characters from the first letter on, if it is surely in another language.

    Its score is the probability of all languages that are not allowed; its note is the language.
    """
    lead = beginning(text)
    start = text[lead : lead + first]
    if sum(map(str.isalpha, start)) < LETTERS:
        return []
    ranks = identifier().rank(start)
    language, certainty = ranks[0]
    if language in allow or certainty < CERTAIN:
        return []
    allowed = sum(float(probability) for code, probability in ranks if code in allow)
    return [Finding("language", lead, lead + len(start), max(0.0, 1 - allowed), str(language))]


class LanguageReading:
    """One text's language, told once its beginning is there."""

    channels = ("content",)

    __slots__ = ("_done", "_options")

    def __init__(self, options: Options):
        self._options, self._done = options, False

    def read(self, text: str, final: bool) -> tuple[Sequence[Finding], int]:
        """Nothing, settled at 0, until the beginning is there; then its finding and all of the text as settled."""
        if self._done:
            return [], len(text)
        if not final and len(text) - beginning(text) < self._options.first:
            return [], 0
        self._done = True
        return judged(text, self._options.allow, self._options.first), len(text)


class Language:
    """A stream validator for the language of a text."""

    views = ()  # a disguise has no language: its rule reads no views

    def __init__(self, options: Options):
        self._options = options

    def readings(self) -> Sequence[Reading]:
        """A fresh reading."""
        return [LanguageReading(self._options)]

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        """The finding for the beginning of the text, if any."""
        return judged(text, self._options.allow, self._options.first)


def build(options: Options) -> Language:
    """The validator for these languages; reads the model, and raises ValueError for a code that it does not know."""
    if unknown := set(options.allow) - set(identifier().labels):
        raise ValueError(
            f"allow: {', '.join(sorted(unknown))} is not a language that can be told; write a code such as en"
        )
    return Language(options)
