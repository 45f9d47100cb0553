"""Many words and phrases looked for at once, exactly in streams (Aho-Corasick, pyahocorasick).

Read from left to right: at each place the longest entry counts, and the next is looked for behind it. Held back is
only the longest end of the text that an entry begins with. White space of up to eight characters stands for a space.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import ahocorasick
import regex

from guardrails.types import Context, Finding, Reading

LONGEST = 200
"""Characters of an entry."""
STEP = 1 << 16
"""Characters that are read at a time, so that a long text needs little memory."""
SPACES = {code: " " for code in range(0x3001) if chr(code).isspace()}
RUN = regex.compile(" {2,}")
WIDEST = 8
"""Characters of white space that still stand for one space."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A word or phrase. label: what to call it; empty for one that is only there to excuse the entries inside it.

    exact: whether capitals and small letters must be as they are written here.
    """

    text: str
    label: str
    exact: bool = False


def folded(text: str) -> str:
    """`text` in small letters, with plain spaces and apostrophes, letter by letter: as long as before."""
    return text.translate(SPACES).replace("İ", "i").lower().replace("ς", "σ").replace("’", "'")


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"


class Part:
    """`text[start:end]` as it is compared: folded, its runs of spaces squeezed, with the way back to the places."""

    __slots__ = ("_cuts", "_lost", "_start", "before", "text")

    def __init__(self, text: str, start: int, end: int):
        self.before = text[start - 1 : start] if start else ""
        self._start = start
        self._cuts: list[int] = []
        self._lost: list[int] = []
        plain = folded(text[start:end])
        out: list[str] = []
        last = lost = 0
        for run in RUN.finditer(plain):
            first, beyond = run.span()
            out += (plain[last:first], " " if beyond - first <= WIDEST else "\n")
            last, lost = beyond, lost + beyond - first - 1
            self._cuts.append(beyond - lost)
            self._lost.append(lost)
        self.text = "".join((*out, plain[last:]))

    def place(self, at: int) -> int:
        """Where in the whole text the character at `at` stands."""
        index = bisect_right(self._cuts, at)
        return self._start + at + (self._lost[index - 1] if index else 0)

    def starts(self, at: int) -> bool:
        """True where no word goes on: the character at `at` or the one before it is not of a word."""
        before = self.text[at - 1] if at else self.before
        return not (before and _is_word(before) and _is_word(self.text[at]))

    def ends(self, at: int) -> bool:
        """True where no word goes on beyond `at`."""
        return at >= len(self.text) or not (_is_word(self.text[at - 1]) and _is_word(self.text[at]))


class LexiconReading:
    """A lexicon's progress through one text."""

    __slots__ = ("_lexicon", "_next")

    def __init__(self, lexicon: Lexicon):
        self._lexicon, self._next = lexicon, 0

    def read(self, text: str, final: bool) -> tuple[Sequence[Finding], int]:
        """The new certain findings and how far the text is settled (see `guardrails.types.Reading`)."""
        found: list[Finding] = []
        for end in range(self._next + STEP, len(text), STEP):
            self._step(text, end, False, found)
        self._step(text, len(text), final, found)
        return found, self._next

    def _step(self, text: str, end: int, final: bool, found: list[Finding]) -> None:
        part = Part(text, self._next, end)
        live = [] if final else self._lexicon.live(part)
        done = 0
        for first, last, entries in self._lexicon.hits(part):
            if first < done:
                continue
            if (index := bisect_left(live, done)) < len(live) and first >= live[index]:
                break
            start, beyond = part.place(first), part.place(last - 1) + 1
            entry = self._lexicon.meant(entries, text[start:beyond])
            if entry is None:
                continue
            done = last
            if entry.label:
                found.append(Finding(entry.label, start, beyond))
        index = bisect_left(live, done)
        self._next = part.place(live[index]) if index < len(live) else end


class Lexicon:
    """A stream validator made of words and phrases; raises ValueError for an entry that cannot be looked for.

    whole: whether an entry that begins or ends with a letter must not stand inside a longer word.
    """

    def __init__(self, entries: Iterable[Entry], whole: bool = True):
        by_text: dict[str, list[Entry]] = {}
        for entry in entries:
            by_text.setdefault(self._key(entry.text), []).append(entry)
        if not by_text:
            raise ValueError("there is no word to look for: write words, or a file that has some")
        self._whole = whole
        self._most = max(map(len, by_text))
        self._automaton = ahocorasick.Automaton()
        for key, same in by_text.items():
            self._automaton.add_word(key, (len(key), tuple(same)))
        self._automaton.make_automaton()

    @staticmethod
    def _key(text: str) -> str:
        key = " ".join(folded(text).split())
        if not any(map(str.isalnum, key)):
            raise ValueError(f"{text!r} has no letter or digit to look for")
        if len(key) > LONGEST:
            raise ValueError(f"{text[:20]!r}... has more than {LONGEST} characters; name a part of it")
        return key

    def live(self, part: Part) -> list[int]:
        """The places from which on an entry may still become longer, or be told only by the next character."""
        text, size = part.text, len(part.text)
        return [
            at
            for at in range(max(0, size - self._most), size)
            if (not self._whole or part.starts(at)) and self._automaton.longest_prefix(text[at:]) == size - at
        ]

    def hits(self, part: Part) -> Iterator[tuple[int, int, tuple[Entry, ...]]]:
        """(start, end, entries) of what stands in the text, by start, the longest first."""
        found = [
            (end + 1 - size, -end - 1, entries)
            for end, (size, entries) in self._automaton.iter(part.text)
            if not self._whole or (part.starts(end + 1 - size) and part.ends(end + 1))
        ]
        for first, minus_last, entries in sorted(found, key=lambda hit: hit[:2]):
            yield first, -minus_last, entries

    def meant(self, entries: Sequence[Entry], written: str) -> Entry | None:
        """The first of the entries that is written so, or None."""
        plain = " ".join(written.split())
        return next((entry for entry in entries if not entry.exact or plain == " ".join(entry.text.split())), None)

    def readings(self) -> Sequence[Reading]:
        """A fresh reading."""
        return [LexiconReading(self)]

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        """The findings in the order of their start."""
        return LexiconReading(self).read(text, True)[0]
