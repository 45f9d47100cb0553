"""Harm, told by a trained head, and which of MLCommons' twelve hazards it is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from guardrails.classify import Classifier, head


class Options(BaseModel):
    """Which hazards count, and which head tells."""

    model_config = ConfigDict(extra="forbid")
    hazards: list[str] = Field(
        default=[], description="The hazards that count, such as `self_harm`; empty for all that the head knows."
    )
    head: str = Field(default="", description="A folder or file with a head of your own; empty for the shipped one.")


def build(options: Options) -> Classifier:
    """The validator; raises ValueError for an unknown hazard, or where the head or the encoder is not there."""
    found = head("harm", options.head)
    if unknown := set(options.hazards) - set(found.labels):
        raise ValueError(f"hazards: there is no {', '.join(sorted(unknown))}; there are: {', '.join(found.labels)}")
    return Classifier(found, options.hazards or found.labels)
