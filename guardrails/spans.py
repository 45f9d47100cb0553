"""Reading a growing text with regular expressions, exactly: nothing is said about a span before it is certain.

`regex` can tell that a match is still possible when more text comes (partial matching). A second form of every
pattern, `(?:P)(?s:.)(?!)`, can never match whole, so a search with it returns the first place where P, or the
character after it, would have to read past the end of the text. What starts before that place cannot change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import regex

from guardrails.types import Context, Finding, Reading

Accept = Callable[[str], bool]
TIMEOUT = 0.25
"""Seconds that one search may take before the rule counts as broken (hostile text against a slow pattern)."""


class PatternError(ValueError):
    """A pattern that cannot be used; the message says why."""


def open_ended(pattern: str) -> str:
    r"""`pattern` with each word boundary also true at the end of the text, where more text could make it so.

    Raises PatternError for a boundary inside a negative look-ahead, whose truth at the end cannot be told.
    """
    out: list[str] = []
    in_class, i = False, 0
    while i < len(pattern):
        pair = pattern[i : i + 2]
        if pair in (r"\b", r"\B") and not in_class:
            if "".join(out).endswith("(?!"):
                raise PatternError(f"a word boundary right after '(?!' cannot be judged in a stream, at character {i}")
            out.append(rf"(?:{pair}|\Z)")
        elif pair.startswith("\\"):
            out.append(pair)
        else:
            in_class = pair[:1] == "[" or (in_class and pair[:1] != "]")
            out.append(pair[:1])
            i -= 1
        i += 2
    return "".join(out)


class Span:
    """A compiled pattern with a label: `accept` may turn a match down (a checksum), `group` narrows what is found.
    A match that was turned down hides nothing that starts after it.

    Patterns are read with MULTILINE (`^` and `$` are line ends: the end of a growing text is not known). Raises
    PatternError for a pattern that does not compile or that matches the empty text.
    """

    __slots__ = ("_live", "_pattern", "accept", "group", "label", "pattern", "score")

    def __init__(self, label: str, pattern: str, accept: Accept | None = None, score: float = 1.0, group: str = ""):
        try:
            self._pattern = regex.compile(pattern, regex.MULTILINE)
            self._live = regex.compile(f"(?:{open_ended(pattern)})(?s:.)(?!)", regex.MULTILINE)
        except regex.error as error:
            raise PatternError(f"not a valid regular expression: {error}") from None
        if any(not match.group() for match in self._pattern.finditer("a b\n1")):
            raise PatternError("the pattern matches the empty text, so it would fire everywhere")
        self.label, self.pattern, self.accept, self.score, self.group = label, pattern, accept, score, group

    def live(self, text: str, start: int) -> int:
        """The first place at or after `start` where this pattern could still match if more text came."""
        found = self._live.search(text, pos=start, partial=True, timeout=TIMEOUT)
        return len(text) if found is None else found.start()

    def part(self, text: str, match: regex.Match[str]) -> tuple[int, int] | None:
        """Where in `text` the part of this match lies that is found; None where the match is turned down."""
        first, last = match.span(self.group) if self.group else match.span()
        return (first, last) if self.accept is None or self.accept(text[first:last]) else None

    def findings(self, text: str, start: int, settled: int) -> tuple[list[Finding], int]:
        """The findings whose match starts in `start..settled`, and the place to go on from."""
        found: list[Finding] = []
        while (match := self._pattern.search(text, pos=start, timeout=TIMEOUT)) and match.start() < settled:
            part = self.part(text, match)
            if part:
                found.append(Finding(self.label, *part, self.score))
            start = max(part[1] if part else 0, match.start() + 1)
        return found, max(start, settled)


class SpanReading:
    """One span's progress through one text."""

    __slots__ = ("_next", "_span")

    def __init__(self, span: Span):
        self._span, self._next = span, 0

    def read(self, text: str, final: bool) -> tuple[Sequence[Finding], int]:
        """The new certain findings and how far the text is settled (see `guardrails.types.Reading`)."""
        settled = len(text) if final else self._span.live(text, self._next)
        found, self._next = self._span.findings(text, self._next, settled)
        return found, settled


class Spans:
    """A stream validator made of patterns."""

    def __init__(self, spans: Sequence[Span]):
        self.spans = tuple(spans)

    def readings(self) -> Sequence[Reading]:
        """Fresh readings, one a pattern."""
        return [SpanReading(span) for span in self.spans]

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        """The findings of all patterns, in the order of their start."""
        found = [finding for reading in self.readings() for finding in reading.read(text, True)[0]]
        return sorted(found, key=lambda finding: finding.start)
