"""Validators made of a head: one pass of the encoder for a text, whatever number of rules reads it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from guardrails import heads
from guardrails.encoder import encoder, require
from guardrails.heads import Head, Seen
from guardrails.types import Context, Finding

LEAST = 0.1
"""Windows that score less are not findings; a rule's threshold is far above."""


def head(name: str, named: str) -> Head:
    """The head of this name for a policy; raises ValueError, with what to do, where it or the encoder is not there."""
    require()
    return heads.load(name, named)


async def seen(head: Head, text: str) -> list[Seen]:
    """What the head sees in each window of a text."""
    return head.read(text, await encoder().embed(text))


class Classifier:
    """A validator for what one head finds; `labels` are those that count."""

    def __init__(self, head: Head, labels: Collection[str]):
        self.head, self.labels = head, frozenset(labels)

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        """A finding for each window that scores at least LEAST, over the window's span."""
        return [
            Finding(one.label, one.start, one.end, one.score)
            for one in await seen(self.head, text)
            if one.score >= LEAST and one.label in self.labels
        ]
