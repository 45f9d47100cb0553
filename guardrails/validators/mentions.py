"""Names that are mentioned: competitors, brands, people; with their other names, and the phrases that do not count."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict, Field

from guardrails.validators.lexicon import Entry, Lexicon


class Name(BaseModel):
    """A name, and how else it is written."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, description="The name: the label of its findings.")
    aliases: list[str] = Field(default=[], description="Other names of the same; a domain such as `acme.com`, too.")
    unless: list[str] = Field(
        default=[],
        description="Phrases with the name in them that do not mean it: `apple pie`, `Big Apple`.",
    )
    as_written: bool = Field(
        default=False, description="Whether capitals count, for names that are words, too: `Target` is not `target`."
    )


class Options(BaseModel):
    """The names to look for."""

    model_config = ConfigDict(extra="forbid")
    names: list[Name] = Field(min_length=1, description="The names: `name`, and if need be `aliases`, `unless`.")


def spellings(name: str) -> list[str]:
    """A name as people write it: in one word, with hyphens, with `and` for `&`; a possessive needs nothing."""
    parts = name.split()
    forms = [name, *(sep.join(parts) for sep in ("", "-", " ") if len(parts) > 1 and "&" not in parts)]
    if "&" in parts:
        forms += [" ".join("and" if part == "&" else part for part in parts), "".join(parts)]
    return list(dict.fromkeys(forms))


def entries(name: Name) -> Iterator[Entry]:
    """What is looked for; raises ValueError for an excuse that has none of the names in it."""
    own = [form for one in (name.name, *name.aliases) for form in spellings(one)]
    for form in own:
        yield Entry(form, name.name, name.as_written)
    for phrase in name.unless:
        if not any(form.casefold() in phrase.casefold() for form in own):
            raise ValueError(f"unless: {phrase!r} has no name of {name.name!r} in it, so it would excuse nothing")
        yield Entry(phrase, "")


def build(options: Options) -> Lexicon:
    """The validator for these names; raises ValueError for one that cannot be looked for."""
    try:
        return Lexicon([entry for name in options.names for entry in entries(name)])
    except ValueError as error:
        raise ValueError(f"names: {error}") from None
