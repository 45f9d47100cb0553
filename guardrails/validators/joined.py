"""Many patterns read as one: two searches a token for the whole group, whatever the number of its patterns.

Exact for the same reason as `guardrails.spans`: where no pattern of the group can still match, none of them can on its
own, and where the union matches nowhere, no pattern of it does. Only where the union matches is each pattern asked.
"""

from __future__ import annotations

from collections.abc import Sequence

import regex

from guardrails.spans import Span, Spans
from guardrails.types import Finding, Reading


class Group:
    """Spans that are read together, and their union.

    gate: a character class that every match of every span starts with; text without it is settled at once. head: a
    longer pattern that every match starts with, read first because it fails fast. The spans' patterns must stay right
    inside an alternation: no numbered back-references, no global flags.
    """

    __slots__ = ("gate", "spans", "union")

    def __init__(self, spans: Sequence[Span], gate: str, head: str = ""):
        self.spans = tuple(spans)
        self.gate = regex.compile(gate)
        self.union = Span("", f"(?={gate})(?={head})(?:{'|'.join(f'(?:{span.pattern})' for span in spans)})")


class GroupReading:
    """One group's progress through one text."""

    __slots__ = ("_from", "_group", "_next")

    def __init__(self, group: Group):
        self._group, self._from, self._next = group, 0, [0] * len(group.spans)

    def read(self, text: str, final: bool) -> tuple[Sequence[Finding], int]:
        """The new certain findings and how far the text is settled (see `guardrails.types.Reading`)."""
        start, self._from = self._from, len(text)
        if self._group.gate.search(text, pos=start) is None:
            return (), len(text)
        settled = self._from = len(text) if final else self._group.union.live(text, start)
        if not self._group.union.findings(text, start, settled)[0]:
            return (), settled
        found: list[Finding] = []
        for i, span in enumerate(self._group.spans):
            more, self._next[i] = span.findings(text, max(start, self._next[i]), settled)
            found += more
        return found, settled


class Joined(Spans):
    """A stream validator made of groups of patterns; what it finds is what its patterns find one by one."""

    def __init__(self, groups: Sequence[Group]):
        super().__init__([span for group in groups for span in group.spans])
        self.groups = tuple(groups)

    def readings(self) -> Sequence[Reading]:
        """Fresh readings, one a group."""
        return [GroupReading(group) for group in self.groups]
