"""Regular expressions of one's own."""

from __future__ import annotations

import regex
from pydantic import BaseModel, ConfigDict, Field

from guardrails.hostile import complaint
from guardrails.spans import PatternError, Span, Spans


class Options(BaseModel):
    """What to look for."""

    model_config = ConfigDict(extra="forbid")
    patterns: list[str] = Field(
        min_length=1,
        description="Regular expressions as the `regex` module reads them. Bound what repeats (`{1,64}`, not `*`): "
        "a stream holds back all that may still belong to a match.",
    )
    ignore_case: bool = Field(default=True, description="Whether capitals and small letters are the same.")
    label: str = Field(default="match", min_length=1, description="What to call a match.")


def build(options: Options) -> Spans:
    """The validator for these patterns.

    Raises PatternError, with its place in the list, for one that is no use or that hostile text could keep busy.
    """
    flags = "i" if options.ignore_case else ""
    spans: list[Span] = []
    for number, pattern in enumerate(options.patterns, 1):
        try:
            regex.compile(pattern, regex.MULTILINE)  # alone first: `a)(b` is only wrong without the brackets around it
            spans.append(Span(options.label, f"(?{flags}:{pattern})"))
            if wrong := complaint(pattern, spans[-1].unfinished):
                raise PatternError(wrong)
        except (regex.error, PatternError) as error:
            shown = pattern if len(pattern) <= 80 else f"{pattern[:77]}..."
            raise PatternError(f"patterns: number {number}, {shown!r}: {error}") from None
    return Spans(spans)
