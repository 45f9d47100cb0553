"""The validators that a policy can name: the ones that ship with newel, and those of installed packages.

A validator is a module (or any object) with two names: `Options`, a pydantic model of what can be set, and `build`,
which makes a `Validator` of them. A package offers one as an entry point of the group `newel.validators`. Nothing is
imported before it is asked for.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, cast

from pydantic import BaseModel

from guardrails.types import Validator

GROUP = "newel.validators"
BUILT_IN = (
    "code",
    "disclaimer",
    "grader",
    "grounded",
    "guard_model",
    "harm",
    "injection",
    "injection_model",
    "json_schema",
    "keywords",
    "language",
    "length",
    "mentions",
    "patterns",
    "personal",
    "presidio",
    "prompt_leak",
    "refusal",
    "repetition",
    "scope",
    "secrets",
    "tool_calls",
    "topics",
    "urls",
)


class CatalogError(ValueError):
    """A validator that cannot be had: unknown, clashing with another, or broken in its package."""


class Entry(Protocol):
    """What stands behind a name. `build` raises ValueError, with what to do, for options it cannot work with."""

    @property
    def Options(self) -> type[BaseModel]:
        """What can be set; `extra="forbid"`, and a description on every field."""
        ...

    def build(self, options: Any) -> Validator:
        """The validator for these options."""
        ...


@cache
def plugins() -> dict[str, EntryPoint]:
    """The validators of installed packages by name; raises CatalogError where two would share a name."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        other = "newel itself" if point.name in BUILT_IN else _package(found[point.name]) if point.name in found else ""
        if other:
            raise CatalogError(
                f"validator {point.name!r} of {_package(point)} has the name of one of {other}: uninstall one of them"
            )
        found[point.name] = point
    return found


def names() -> list[str]:
    """All names that `validator = "..."` may have, sorted."""
    return sorted((*BUILT_IN, *plugins()))


def options(name: str) -> type[BaseModel]:
    """The model of what can be set for this validator; raises CatalogError for one that cannot be had."""
    return _entry(name).Options


def build(name: str, options: BaseModel) -> Validator:
    """The validator of this name with these options; raises ValueError for values it cannot work with."""
    return _entry(name).build(options)


def _entry(name: str) -> Entry:
    if name in BUILT_IN:
        return cast(Entry, import_module(f"guardrails.validators.{name}"))
    point = plugins().get(name)
    if point is None:
        raise CatalogError(f"there is no validator {name!r}; there are: {', '.join(names())}")
    return _load(point)


def _load(point: EntryPoint) -> Entry:
    try:
        entry = point.load()
    except Exception as error:  # whatever a stranger's module raises on import
        what = f"{type(error).__name__}: {error}"
        raise CatalogError(f"validator {point.name!r} of {_package(point)} cannot be imported: {what}") from error
    if not (isinstance(getattr(entry, "Options", None), type) and issubclass(entry.Options, BaseModel)):
        raise CatalogError(f"validator {point.name!r} of {_package(point)} has no `Options`, a pydantic model")
    if not callable(getattr(entry, "build", None)):
        raise CatalogError(f"validator {point.name!r} of {_package(point)} has no `build` function")
    return cast(Entry, entry)


def _package(point: EntryPoint) -> str:
    """The distribution that offers this entry point, as a person would look for it."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value
