"""Texts that loop: the same words, line or sentence again and again, or a long run of one sign.

The text is read as words; signs and white space between them do not count, but a run of 16 equal ones counts as a short
word. A loop is a piece of up to `longest` words that stands there `times` times in a row and goes on for `least`
characters. Its finding starts where the piece comes for the second time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import regex
from pydantic import BaseModel, ConfigDict, Field

from guardrails.types import Context, Finding, Reading


class Options(BaseModel):
    """What counts as a loop."""

    model_config = ConfigDict(extra="forbid")
    times: int = Field(
        default=5, ge=2, le=100, description="How often a piece must stand in a row, the first included."
    )
    least: int = Field(
        default=100,
        ge=8,
        le=10_000,
        description="How many letters and digits the repeats must have together; a sign counts a quarter.",
    )
    longest: int = Field(default=80, ge=1, le=200, description="The most words of a piece.")


UNIT = regex.compile(r"[^\W_]{1,16}|([\W_])\1{15}")
SIGN = regex.compile(r"[\W_]")
RECENT = 8
"""How many earlier places of the same word may begin a loop."""
PIECE = 1000
"""Characters by which a loop that goes on is told."""


@dataclass(slots=True)
class Run:
    """Words that are the same as those `period` before them."""

    start: int
    words: int = 0
    weight: int = 0


class RepetitionReading:
    """One text, word by word."""

    __slots__ = ("_at", "_last", "_next", "_options", "_period", "_places", "_reach", "_runs", "_told", "_words")

    def __init__(self, options: Options):
        self._options = options
        self._next = self._at = 0
        self._words: deque[str] = deque(maxlen=options.longest)
        self._places: dict[str, deque[int]] = {}
        self._last = 0
        self._runs: dict[int, Run] = {}
        self._period = self._told = self._reach = 0  # of the loop that goes on: how long, told up to, reaching to

    def read(self, text: str, final: bool) -> tuple[Sequence[Finding], int]:
        """The new certain findings and how far the text is settled (see `guardrails.types.Reading`)."""
        found: list[Finding] = []
        for unit in UNIT.finditer(text, self._next):
            if not final and unit.end() == len(text) and len(unit.group()) < 16:
                break  # the word may go on
            self._word(unit.group().lower(), unit.start(), unit.end(), found)
            self._next = unit.end()
        if final:
            self._end(found)
            return found, len(text)
        self._next = self._open(text)
        if self._period:
            return found, self._told - 1
        return found, min((run.start for run in self._runs.values()), default=self._next)

    def _open(self, text: str) -> int:
        """Where the word or the equal signs begin that the end of the text may cut."""
        if unit := UNIT.search(text, self._next):
            return unit.start()
        tail = text[max(self._next, len(text) - 15) :]
        return len(text) - len(tail) + len(tail.rstrip(tail[-1:])) if SIGN.fullmatch(tail[-1:]) else len(text)

    def _word(self, word: str, start: int, end: int, found: list[Finding]) -> None:
        """Takes the next word in."""
        if self._period and self._words[-self._period] == word:
            self._reach = end
            if end - self._told >= PIECE:
                self._tell(found)
        else:
            if self._period:
                self._end(found)
            self._follow(word, start)
            self._check(start, end, found)
        self._words.append(word)
        self._at += 1
        places = self._places.setdefault(word, deque(maxlen=RECENT))
        places.append(self._at)
        if len(self._places) > 8 * self._options.longest:
            self._forget()

    def _follow(self, word: str, start: int) -> None:
        """The runs that this word goes on with, or begins."""
        places = self._places.get(word)
        weight = len(word) if word[0].isalnum() else len(word) // 4
        runs: dict[int, Run] = {}
        for place in reversed(places or ()):
            period = self._at + 1 - place
            if period > self._options.longest:
                break
            run = self._runs.get(period) or Run(start)
            run.words += 1
            run.weight += weight
            runs[period] = run
        self._runs = runs

    def _check(self, start: int, end: int, found: list[Finding]) -> None:
        """Tells the loop, where a run has become one."""
        for period, run in self._runs.items():  # the shortest first
            if run.words >= (self._options.times - 1) * period and run.weight >= self._options.least:
                found.append(Finding("repetition", run.start, end))
                self._period, self._told, self._reach, self._runs = period, end, end, {}
                return

    def _tell(self, found: list[Finding]) -> None:
        """Tells how the loop goes on, from the last character that was told."""
        found.append(Finding("repetition", self._told - 1, self._reach))
        self._told = self._reach

    def _end(self, found: list[Finding]) -> None:
        """The loop is over, or the text is."""
        if self._period and self._reach > self._told:
            self._tell(found)
        self._period = 0

    def _forget(self) -> None:
        """Drops the places that are too far back."""
        oldest = self._at - self._options.longest
        self._places = {word: places for word, places in self._places.items() if places[-1] >= oldest}


class Repetition:
    """A stream validator for texts that loop."""

    views = ()  # disguises loop less: its rule reads no views

    def __init__(self, options: Options):
        self._options = options

    def readings(self) -> Sequence[Reading]:
        """A fresh reading."""
        return [RepetitionReading(self._options)]

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        """The findings in the order of their start."""
        return RepetitionReading(self._options).read(text, True)[0]


def build(options: Options) -> Repetition:
    """The validator for these limits."""
    return Repetition(options)
