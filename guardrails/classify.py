"""Validators made of a head: one pass of the encoder for a text, whatever number of rules reads it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from guardrails import heads
from guardrails.encoder import encoder, require
from guardrails.heads import Head, Seen
from guardrails.types import Context, Finding

OPENING = 280
"""Characters of a reply's beginning, about two sentences."""
LEAST = 0.1
"""Windows that score less are not findings; a rule's threshold is far above."""


def head(name: str, named: str) -> Head:
    """The head of this name for a policy; raises ValueError, with what to do, where it or the encoder is not there."""
    require()
    return heads.load(name, named)


async def seen(head: Head, text: str) -> list[Seen]:
    """What the head sees in each window of a text."""
    return head.read(text, await encoder().embed(text))


def opening(text: str) -> str:
    """The beginning of a reply, in which it is said whether it refuses: OPENING characters, to the end of the word."""
    if len(text) <= OPENING:
        return text
    end = text.find(" ", OPENING, OPENING + 40)
    return text[: end if end > 0 else OPENING]


class Classifier:
    """A validator for what one head finds; `labels` are those that count."""

    def __init__(self, head: Head, labels: Collection[str], only_opening: bool = False):
        self.head, self.labels, self.only_opening = head, frozenset(labels), only_opening

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        """A finding for each window that scores at least LEAST, over the window's span."""
        return [
            Finding(one.label, one.start, one.end, one.score)
            for one in await seen(self.head, opening(text) if self.only_opening else text)
            if one.score >= LEAST and one.label in self.labels
        ]
