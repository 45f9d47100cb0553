"""Prompt injection and jailbreaks, told by a trained head: wordings that no list of phrases has."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from guardrails.classify import Classifier, head


class Options(BaseModel):
    """Which head tells."""

    model_config = ConfigDict(extra="forbid")
    head: str = Field(default="", description="A folder or file with a head of your own; empty for the shipped one.")


def build(options: Options) -> Classifier:
    """The validator; raises ValueError where the head or the encoder is not there."""
    found = head("injection", options.head)
    return Classifier(found, found.labels)
