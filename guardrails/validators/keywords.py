"""Words and phrases of a large list, in one pass over the text whatever the length of the list.

Measured on one core with 5,000 phrases: built in 25 ms; 0.02 microseconds a character of a whole text, 5 microseconds a
streamed token. `topics` knows grammar (salary, salaries) and is meant for short lists.
"""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from guardrails import attached
from guardrails.validators.lexicon import Entry, Lexicon


class Options(BaseModel):
    """The words to look for."""

    model_config = ConfigDict(extra="forbid")
    words: list[str] = Field(default=[], description="Words and phrases, each as it stands, thousands if need be.")
    file: str = Field(
        default="", description="A text file beside the policy with one word or phrase a line; `#` begins a comment."
    )
    ignore_case: bool = Field(default=True, description="Whether capitals and small letters are the same.")
    whole_words: bool = Field(default=True, description="Whether a word must not stand inside a longer one.")
    label: str = Field(default="keyword", min_length=1, description="What to call what is found.")

    @model_validator(mode="after")
    def with_file(self, info: ValidationInfo) -> Self:
        """The words of the file join the others; raises ValueError where there is no word at all."""
        if self.file:
            lines = (line.partition("#")[0].strip() for line in attached.read(self.file, info).splitlines())
            self.words = [*self.words, *filter(None, lines)]
            self.file = ""
        if not self.words:
            raise ValueError("write words, or a file that has some")
        return self


def build(options: Options) -> Lexicon:
    """The validator for these words; raises ValueError for one that cannot be looked for."""
    try:
        return Lexicon(
            [Entry(word, options.label, not options.ignore_case) for word in options.words], options.whole_words
        )
    except ValueError as error:
        raise ValueError(f"words: {error}") from None
