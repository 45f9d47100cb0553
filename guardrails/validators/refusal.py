"""Replies that refuse, told by a trained head; and those that refuse a harmless question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pydantic import BaseModel, ConfigDict, Field

from guardrails.classify import Classifier, head
from guardrails.encoder import encoder
from guardrails.heads import ESCALATE, Head
from guardrails.types import Context, Finding


class Options(BaseModel):
    """Which refusals count, and which heads tell."""

    model_config = ConfigDict(extra="forbid")
    over_refusal: bool = Field(
        default=False, description="Whether only a refusal of a harmless question counts; labelled `over_refusal`."
    )
    head: str = Field(default="", description="A folder or file with a head of your own; empty for the shipped one.")
    harm_head: str = Field(default="", description="The same for the head that judges the question.")


class OverRefusal:
    """A validator for refusals of questions that the harm head lets pass."""

    channels = ("content",)

    def __init__(self, refusals: Classifier, harm: Head):
        self.refusals, self.harm = refusals, harm

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        """The refusals in a reply; none where the last message of the user is not surely harmless, or not known."""
        asked = next((one.content for one in reversed(context.messages) if one.role == "user"), "")
        found = [replace(one, label="over_refusal") for one in await self.refusals.find(text, context)]
        if not found or not asked.strip():
            return []
        harm = self.harm.score(asked, await encoder().embed(asked))
        return found if harm < ESCALATE else []


def build(options: Options) -> Classifier | OverRefusal:
    """The validator; raises ValueError where a head or the encoder is not there."""
    found = head("refusal", options.head)
    refusals = Classifier(found, found.labels, only_opening=True)
    return OverRefusal(refusals, head("harm", options.harm_head)) if options.over_refusal else refusals
