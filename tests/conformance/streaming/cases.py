"""The cases of the suite, read from cases.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Channel = Literal["content", "reasoning", "arguments"]
Action = Literal["refuse", "escalate", "redact", "append"]


class Strict(BaseModel):
    """A table of the file; a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Acts(Strict):
    name: str
    action: Action
    example: str
    reply: str = ""
    placeholder: str = ""

    @property
    def stops(self) -> bool:
        """True when the text ends where this rule fires."""
        return self.action in ("refuse", "escalate")


class PatternRule(_Acts):
    """Fires where a regular expression matches, case ignored."""

    kind: Literal["pattern"]
    pattern: str


class PhraseRule(_Acts):
    """Fires where one of these phrases stands, as whole words in any case."""

    kind: Literal["phrase"]
    phrases: tuple[str, ...]


class PersonalRule(_Acts):
    """Fires where a piece of personal data of this kind stands."""

    kind: Literal["personal"]
    data: Literal["email", "card"]


class SecretRule(_Acts):
    """Fires where a secret of this kind stands."""

    kind: Literal["secret"]
    data: Literal["aws_access_key"]


Rule = Annotated[PatternRule | PhraseRule | PersonalRule | SecretRule, Field(discriminator="kind")]


class Case(Strict):
    """One text, and what a client may see of it; see cases.toml for the keys."""

    name: str
    rules: tuple[str, ...]
    text: str
    channel: Channel = "content"
    streamed: str | None = None
    never: tuple[str, ...] = ()
    around: tuple[str, ...] = ()
    hold: int | None = None
    disguised: bool = False

    @model_validator(mode="after")
    def _places(self) -> Case:
        missing = [place for place in (*self.never, *self.around) if place not in self.text]
        if missing:
            raise ValueError(f"case {self.name!r}: {missing[0]!r} is not in its text")
        return self

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The places that are cut at each character, as (start, end) in the text."""
        return [(self.text.index(place), self.text.index(place) + len(place)) for place in self.around or self.never]

    @property
    def first(self) -> int:
        """Where the first of these places starts; the end of the text when there is none."""
        return min((start for start, _ in self.spans), default=len(self.text))


class Suite(Strict):
    """All cases and the rules that they name."""

    rules: dict[str, Rule]
    case: tuple[Case, ...]

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: dict[str, dict[str, dict[str, object]]]) -> dict[str, object]:
        return {**data, "rules": {name: rule | {"name": name} for name, rule in data["rules"].items()}}

    @model_validator(mode="after")
    def _known(self) -> Suite:
        unknown = [name for case in self.case for name in case.rules if name not in self.rules]
        names = [case.name for case in self.case]
        if unknown or len(set(names)) < len(names):
            raise ValueError(f"rules that are not there: {unknown}; or two cases of one name")
        return self

    def rules_of(self, case: Case) -> tuple[Rule, ...]:
        """The rules that this case is judged by, in its order."""
        return tuple(self.rules[name] for name in case.rules)


def load() -> Suite:
    """The suite."""
    return Suite.model_validate(tomllib.loads(Path(__file__).with_name("cases.toml").read_text(encoding="utf-8")))
