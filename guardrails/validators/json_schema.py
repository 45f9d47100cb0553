"""Replies that must be JSON of a given shape (JSON Schema, the jsonschema library)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Self, cast
from urllib.parse import unquote

import regex
from jsonschema import ValidationError, validators
from jsonschema.exceptions import SchemaError
from jsonschema.protocols import Validator as Checker
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from guardrails import attached
from guardrails.spans import MOST
from guardrails.types import Context, Finding
from guardrails.validators import strict_json
from guardrails.validators.strict_json import Json, Unreadable


class Options(BaseModel):
    """The shape that a reply must have."""

    model_config = ConfigDict(extra="forbid")
    shape: dict[str, Any] = Field(
        default={}, description="The JSON Schema, as a table (draft 2020-12, or its `$schema`)."
    )
    file: str = Field(default="", description="A JSON file beside the policy that has the schema, in place of `shape`.")
    fenced: bool = Field(
        default=True, description="Whether the JSON may stand in one fenced block, with nothing around."
    )
    max_chars: int = Field(default=200_000, ge=1, le=10_000_000, description="The most characters that are read.")

    @model_validator(mode="after")
    def one_shape(self, info: ValidationInfo) -> Self:
        """The schema of the file, if one is named; raises ValueError where there is none, or two."""
        if self.file and self.shape:
            raise ValueError("write shape or file, not both")
        if self.file:
            shape = json.loads(attached.read(self.file, info))
            if not isinstance(shape, dict):
                raise ValueError(f"{self.file!r} holds no JSON object")
            self.shape, self.file = shape, ""
        if not self.shape:
            raise ValueError("write a shape, or a file that has one")
        return self


ASIDE = 20_000
"""Characters from which on a reply is checked in a thread."""
MOST_ERRORS = 20
"""Findings for one text; a reply that is wrong everywhere need not say so everywhere."""
FENCE = regex.compile(
    r"\s{0,99}```[ \t]{0,9}(?:json\w{0,2})?[ \t]{0,9}\n(?P<inside>.*)\n[ \t]{0,9}```\s{0,99}", regex.DOTALL
)
TRIALS: tuple[Json, ...] = ({}, [], "", 0, 1.5, True, None, [{}], [0, 0], {"a": {}})


def _pattern(checker: Checker, pattern: str, value: object, schema: Mapping[str, Any]) -> Iterator[ValidationError]:
    """The keyword `pattern`, with a limit on its time."""
    if isinstance(value, str) and not regex.search(pattern, value, timeout=MOST):
        yield ValidationError("does not match")


def _unique(checker: Checker, wanted: bool, value: object, schema: Mapping[str, Any]) -> Iterator[ValidationError]:
    """The keyword `uniqueItems`, in linear time."""
    if wanted and isinstance(value, list):
        seen = {json.dumps(_plain(item), sort_keys=True) for item in value}
        if len(seen) < len(value):
            yield ValidationError("has an item twice")


def _plain(value: Json) -> Json:
    """The value with 1.0 as 1: they are one number to JSON Schema."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _names(schema: object) -> Iterator[str]:
    """The property names that a schema writes out; they may be told, keys that the model made up may not."""
    if isinstance(schema, dict):
        properties = schema.get("properties")
        if isinstance(properties, dict):
            yield from properties
        for inner in schema.values():
            yield from _names(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from _names(inner)


def _resolves(schema: Json, reference: str) -> bool:
    """True for a reference to a place that the schema has; what an anchor (`#name`) means is told by a trial."""
    if not reference.startswith("#/"):
        return reference.startswith("#")
    for step in unquote(reference[2:]).split("/"):
        name = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(schema, dict) or name not in schema:
            return False
        schema = schema[name]
    return True


def _references(schema: object) -> Iterator[str]:
    """All that a schema refers to."""
    if isinstance(schema, dict):
        yield from (str(value) for key, value in schema.items() if key in ("$ref", "$dynamicRef", "$recursiveRef"))
        schema = list(schema.values())
    if isinstance(schema, list):
        for inner in schema:
            yield from _references(inner)


class JsonSchema:
    """A validator for replies that must be JSON; raises ValueError for a schema that is none, or that may fail."""

    views = ()  # a disguise is not the reply: its rule reads no views

    channels = ("content",)

    def __init__(self, options: Options):
        self._options = options
        self._known = frozenset(_names(options.shape))
        base = validators.validator_for(options.shape, default=validators.Draft202012Validator)
        for reference in _references(options.shape):
            if not _resolves(options.shape, reference):
                raise ValueError(f"shape: it refers to {reference!r}; put that under $defs and write '#/$defs/...'")
        try:
            base.check_schema(options.shape)
            extend = cast(Callable[..., Callable[..., Checker]], validators.extend)
            self._checker = extend(base, {"pattern": _pattern, "uniqueItems": _unique})(options.shape)
            for trial in TRIALS:
                self._errors(trial)
        except SchemaError as error:
            raise ValueError(f"shape: {self._place(error.absolute_path, False)}: {error.message}") from None
        except Exception as error:  # whatever a schema does that refers to nothing, or to itself without end
            raise ValueError(f"shape: it cannot be used: {type(error).__name__}: {str(error)[:200]}") from None

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        """One finding where the text is not JSON, else one for each place that does not fit; over the whole text."""
        if len(text) > self._options.max_chars:
            return [Finding("json", 0, len(text), note=f"more than {self._options.max_chars} characters")]
        inside = FENCE.fullmatch(text) if self._options.fenced else None
        try:
            value = strict_json.read(inside["inside"] if inside else text)
        except Unreadable as error:
            return [Finding("json", 0, len(text), note=str(error))]
        notes = await asyncio.to_thread(self._errors, value) if len(text) > ASIDE else self._errors(value)
        return [Finding("schema", 0, len(text), note=note) for note in notes]

    def _errors(self, value: Json) -> list[str]:
        """Where the value does not fit, and by which keyword of the schema: `/pay/amount: type`."""
        errors = islice(self._checker.iter_errors(value), MOST_ERRORS)
        return [f"{self._place(error.absolute_path)}: {error.validator}" for error in errors]

    def _place(self, path: Sequence[str | int], known: bool = True) -> str:
        """A JSON pointer (RFC 6901); a key that the schema does not write out is `*`."""
        steps = [str(step) if not known or isinstance(step, int) or step in self._known else "*" for step in path]
        return "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in steps) or "/"


def build(options: Options) -> JsonSchema:
    """The validator for this schema; raises ValueError for one that cannot be used."""
    return JsonSchema(options)
