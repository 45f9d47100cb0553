"""Reading a growing text with regular expressions, exactly: nothing is said about a span before it is certain.

`regex` can tell that a match is still possible when more text comes (partial matching). A second form of every
pattern, `(?:P)(?s:.)(?!)`, can never match whole, so a search with it returns the first place where P, or the
character after it, would have to read past the end of the text. What starts before that place cannot change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cached_property, lru_cache
from weakref import WeakValueDictionary

import regex

from guardrails.prefilter import Begun, Prefilter
from guardrails.types import Context, Finding, Reading

Accept = Callable[[str], bool]
TIMEOUT = 0.04
"""Seconds of CPU that one search may take before the rule counts as broken (hostile text against a slow pattern).

`regex` counts the time of all threads of the process, and lets other threads run meanwhile."""
SHORT, MOST = 20_000, 2.0
"""Up to how many characters that is enough, and the seconds for a text of any length; long ones are read aside."""


LONG = 24
"""How many characters something may be under way before it is read exactly instead of being held back."""
BEFORE = 64
"""How many characters before a match may decide whether it counts (see `Span.needed`)."""


SET_START = regex.compile(r"\^?\]?")
"""What a set may start with that does not end it."""
LAZY = regex.compile(r"([*+?]|\{[0-9]*,?[0-9]*\})\?")
ATOMIC = regex.compile(r"\(\?>|[*+?}]\+")
"""What keeps what it took; so it counts there how much is taken first."""
BEHIND = regex.compile(r"\(\?<[=!]")


PRECISE = ("folded", "decoded")
"""The views that change no digit and no sign between words: what has a shape of its own is looked for in these."""


class PatternError(ValueError):
    """A pattern that cannot be used; the message says why."""


def open_ended(pattern: str) -> str:
    r"""`pattern` with each word boundary also true at the end of the text, where more text could make it so.

    In a look-ahead, behind which no character is read, and in a negative look-around, where true means no, what the
    end could change asks for one more character instead. Lazy repeats are made greedy: what may match is the same, and
    `regex` does not see that a lazy one before a look-behind may go on at the end of the text.
    """
    greedy = not ATOMIC.search(pattern)
    out: list[str] = []
    groups: list[bool] = []  # of each open group: whether it stands in such a look-around
    in_class, i = False, 0
    while i < len(pattern):
        pair, asking = pattern[i : i + 2], groups[-1:] == [True]
        size = 2 if pair[0] == "\\" else 1
        sign = pair[:size]
        if in_class:
            in_class = sign != "]"
        elif sign == "[":
            in_class = True
            start = SET_START.match(pattern, i + 1)
            size += len(start[0]) if start else 0
            sign = pattern[i : i + size]
        elif sign == "(":
            groups.append(asking or pattern.startswith(("(?=", "(?!", "(?<!"), i))
        elif sign == ")":
            del groups[-1:]
        elif greedy and out[-1:] != ["("] and (lazy := LAZY.match(pattern, i)):
            sign, size = lazy[1], len(lazy[0])
        elif sign in (r"\b", r"\B", r"\m", r"\M", r"\Z", "$"):
            sign = rf"(?:(?=(?s:.)){sign})" if asking else sign if sign in (r"\Z", "$") else rf"(?:{sign}|\Z)"
        out.append(sign)
        i += size
    return "".join(out)


_COMPILED: WeakValueDictionary[str, regex.Pattern[str]] = WeakValueDictionary()


def _compiled(pattern: str) -> regex.Pattern[str]:
    """One object for all rules of all policies that have this pattern, as long as one of them lives.

    It may take 0.3 MB and 0.1 s; the cache of `regex` is too small for the patterns of one policy.
    """
    made = _COMPILED.get(pattern)
    if made is None:
        made = _COMPILED[pattern] = regex.compile(pattern, regex.MULTILINE, cache_pattern=False)
    return made


def allowed(characters: int) -> float:
    """Seconds of CPU that one search through so many characters may take."""
    return min(MOST, TIMEOUT * max(1.0, characters / SHORT))


class Span:
    """A compiled pattern with a label: `accept` may turn a match down (a checksum), `group` narrows what is found.
    A match that was turned down hides nothing that starts after it. `unfinished` is the second form of the pattern.

    Patterns are read with MULTILINE (`^` and `$` are line ends: the end of a growing text is not known). Raises
    PatternError for a pattern that does not compile or that matches the empty text.
    """

    __slots__ = ("_pattern", "accept", "group", "label", "pattern", "score", "unfinished")

    def __init__(self, label: str, pattern: str, accept: Accept | None = None, score: float = 1.0, group: str = ""):
        try:
            self._pattern = _compiled(pattern)
            self.unfinished = _compiled(f"(?:{open_ended(pattern)})(?s:.)(?!)")
        except regex.error as error:
            raise PatternError(f"not a valid regular expression: {error}") from None
        if any(not match.group() for match in self._pattern.finditer("a b\n1")):
            raise PatternError("the pattern matches the empty text, so it would fire everywhere")
        if ATOMIC.search(pattern) and LAZY.search(pattern) and BEHIND.search(pattern):
            raise PatternError(
                "a lazy repeat, a look-behind and an atomic group or possessive repeat in one pattern cannot be judged "
                "in a stream: write the repeat without its `?`"
            )
        self.label, self.pattern, self.accept, self.score, self.group = label, pattern, accept, score, group

    @property
    def needed(self) -> str:
        """A pattern that must match somewhere, at most BEFORE characters before what is found, if anything is."""
        return self.pattern

    def live(self, text: str, start: int) -> int:
        """The first place at or after `start` where this pattern could still match if more text came."""
        found = self.unfinished.search(text, pos=start, partial=True, timeout=allowed(len(text) - start))
        return len(text) if found is None else found.start()

    def _search(self, text: str, start: int) -> regex.Match[str] | None:
        return self._pattern.search(text, pos=start, timeout=allowed(len(text) - start))

    def part(self, text: str, match: regex.Match[str]) -> tuple[int, int] | None:
        """Where in `text` the part of this match lies that is found; None where the match is turned down."""
        first, last = match.span(self.group) if self.group else match.span()
        return (first, last) if self.accept is None or self.accept(text[first:last]) else None

    def rated(self, text: str) -> float:
        """The score of what is found, in 0..1."""
        return self.score

    def findings(self, text: str, start: int, settled: int) -> tuple[list[Finding], int]:
        """The findings whose match starts in `start..settled`, and the place to go on from."""
        found: list[Finding] = []
        while (match := self._search(text, start)) and match.start() < settled:
            part = self.part(text, match)
            if part:
                found.append(Finding(self.label, *part, self.rated(text[part[0] : part[1]])))
            start = max(part[1] if part else 0, match.start() + 1)
        return found, max(start, settled)


_prefilter, _begun = lru_cache(128)(Prefilter), lru_cache(128)(Begun)


class SpansReading:
    """The progress of many spans through one text.

    `look` says which spans may match in what is new, or have been under way for long; only they are watched: read
    exactly (`exact`) until every place is settled where they may have begun. What began shortly before the end waits.
    """

    __slots__ = ("_first", "_next", "_read", "_spans", "_watched", "settled")

    def __init__(self, spans: Spans):
        self._spans = spans
        self._next: dict[int, int] = {}  # by span: where to go on
        self._watched: set[int] = set()
        self._first = self._read = self.settled = 0  # what began before `_first` and may still end is watched

    def read(self, text: str, final: bool) -> tuple[Sequence[Finding], int]:
        """The new certain findings and how far the text is settled (see `guardrails.types.Reading`)."""
        numbers, settled = self.look(text, len(text), final)
        found: list[Finding] = []
        for number in numbers:
            more, reached = self.exact(number, text, final)
            found += self._spans.kept(text, more)
            settled = min(settled, reached)
        self.settled = max(self.settled, settled)
        return found, self.settled

    def look(self, text: str, end: int, final: bool) -> tuple[Sequence[int], int]:
        """(the spans that are to be read exactly in `text[:end]`, how far the text is settled for all others)."""
        spans, start = self._spans, self._first
        if final:
            return sorted(spans.prefilter.candidates(text[max(0, self.settled - BEFORE) : end])), end
        if end == self._read:
            return (), self.settled
        self._read = end
        numbers = spans.parts.candidates(text[max(0, start - 1) : end])
        first = spans.begun.first(text, start, end)
        if end - first > LONG:
            numbers |= spans.begun.alive(text, start, end)
            first = end
        self._first = first
        if numbers or self._watched or spans.begun.unread:
            return sorted(numbers.union(self._watched, spans.begun.unread)), first
        return (), first

    def exact(self, number: int, text: str, final: bool) -> tuple[list[Finding], int]:
        """(the new findings of one span, how far it is settled)."""
        span, start = self._spans.spans[number], max(self.settled, self._next.get(number, 0))
        reached = len(text) if final else span.live(text, start)
        found, self._next[number] = span.findings(text, start, reached)
        (self._watched.add if reached < self._first else self._watched.discard)(number)
        return found, reached


class Spans:
    """A stream validator made of patterns. views: in which views of a text they are looked for, all if None."""

    def __init__(self, spans: Sequence[Span], views: Collection[str] | None = None):
        self.spans, self.views = tuple(spans), views
        self.prefilter = _prefilter(tuple(span.needed for span in self.spans))

    @cached_property
    def parts(self) -> Prefilter:
        """Says what may match in a part of a text, which may begin behind what is needed before a match."""
        return _prefilter(tuple(span.pattern for span in self.spans))

    @cached_property
    def begun(self) -> Begun:
        """Says what may be under way at the end of a growing text."""
        return _begun(tuple(span.pattern for span in self.spans))

    def kept(self, text: str, found: list[Finding]) -> list[Finding]:
        """Those of the findings that count."""
        return found

    def readings(self) -> Sequence[Reading]:
        """Fresh readings: one for all patterns."""
        return [SpansReading(self)]

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        """The findings of all patterns, in the order of their start."""
        return self.kept(text, self.among(text, self.prefilter.candidates(text)))

    def among(self, text: str, candidates: Iterable[int]) -> list[Finding]:
        """The findings of the spans with these numbers, in the order of their start (see `Prefilter`)."""
        found = [one for i in sorted(candidates) for one in self.spans[i].findings(text, 0, len(text))[0]]
        return sorted(found, key=lambda finding: finding.start)
