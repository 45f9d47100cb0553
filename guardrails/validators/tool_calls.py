"""Tool calls that a model may not make: tools that are not on a list, and arguments against its rules.

A text is read as a call `{"name": ..., "arguments": {...} or "JSON"}`, as a list of calls, or as OpenAI writes them
(`{"function": {...}}`, `{"tool_calls": [...]}`). What cannot be read so is found, too; an empty text calls nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Self

import regex
from pydantic import BaseModel, ConfigDict, Field, model_validator

from guardrails.spans import MOST
from guardrails.types import Context, Finding
from guardrails.validators import strict_json
from guardrails.validators.strict_json import Json, Unreadable

Type = Literal["string", "integer", "number", "boolean", "array", "object"]


class Argument(BaseModel):
    """What an argument may be."""

    model_config = ConfigDict(extra="forbid")
    type: Type = Field(description="Its type in JSON.")
    required: bool = Field(default=True, description="Whether it must be there.")
    enum: list[str | int | float] = Field(default=[], description="The values that it may have.")
    pattern: str = Field(default="", description="What a string must match, from its beginning to its end.")
    min: float | None = Field(default=None, description="The least: of a number, or of a string's or list's length.")
    max: float | None = Field(default=None, description="The most, of the same.")
    items: Argument | None = Field(default=None, description="What the items of a list may be; anything without it.")
    fields: dict[str, Argument] | None = Field(
        default=None, description="What an object may hold, and nothing else; anything without it."
    )

    @model_validator(mode="after")
    def fits_its_type(self) -> Self:
        """Raises ValueError for a rule that its type has no use for, and for a pattern that is none."""
        if self.pattern and self.type != "string":
            raise ValueError("pattern is for strings")
        if (self.items and self.type != "array") or (self.fields is not None and self.type != "object"):
            raise ValueError("items is for lists (type array), fields for objects")
        if self.type in ("boolean", "object") and (self.min is not None or self.max is not None):
            raise ValueError("min and max are for numbers, strings and lists")
        try:
            regex.compile(self.pattern)
        except regex.error as error:
            raise ValueError(f"pattern: not a valid regular expression: {error}") from None
        return self


class Tool(BaseModel):
    """A tool that may be called."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, description="Its name.")
    arguments: dict[str, Argument] = Field(default={}, description="Its arguments; it may have no others.")


class Options(BaseModel):
    """The tools that may be called."""

    model_config = ConfigDict(extra="forbid")
    tools: list[Tool] = Field(description="The tools: `name` and `arguments`. An empty list lets none be called.")


AROUND = frozenset({"id", "type", "index", "call_id", "status"})
"""Keys that stand beside a call and mean nothing to the tool."""
TYPES: dict[Type, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}
MOST_FINDINGS = 100


def calls(text: str) -> Iterator[tuple[str, dict[str, Json]]]:
    """(name, arguments) of each call in the text; raises Unreadable."""
    value = strict_json.read(text)
    if isinstance(value, dict) and value.keys() == {"tool_calls"}:
        value = value["tool_calls"]
    for one in value if isinstance(value, list) else [value]:
        yield _call(one)


def _call(value: Json) -> tuple[str, dict[str, Json]]:
    if isinstance(value, dict):
        value = {key: inner for key, inner in value.items() if key not in AROUND}
        if value.keys() == {"function"}:
            value = value["function"]
    if not isinstance(value, dict) or not value.keys() <= {"name", "arguments"}:
        raise Unreadable("not a tool call: write a name and arguments, and nothing else")
    name, arguments = value.get("name"), value.get("arguments", {})
    if isinstance(arguments, str):
        arguments = strict_json.read(arguments) if arguments.strip() else {}
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise Unreadable("not a tool call: its name is no string, or its arguments are no object")
    return name, arguments


def wrong(rules: dict[str, Argument], given: dict[str, Json], place: str) -> Iterator[str]:
    """What is wrong with the arguments, and where; never their values."""
    if given.keys() - rules.keys():
        yield f"{place}: an argument that is not on its list"
    for name, rule in rules.items():
        if name in given:
            yield from _wrong(rule, given[name], f"{place}.{name}")
        elif rule.required:
            yield f"{place}.{name}: missing"


def _wrong(rule: Argument, value: Json, place: str) -> Iterator[str]:
    if not isinstance(value, TYPES[rule.type]) or (isinstance(value, bool) and rule.type != "boolean"):
        yield f"{place}: not of type {rule.type}"
        return
    if rule.enum and not any(value == one and isinstance(one, str) == isinstance(value, str) for one in rule.enum):
        yield f"{place}: not one of its values"
    if isinstance(value, str) and rule.pattern and not regex.fullmatch(rule.pattern, value, timeout=MOST):
        yield f"{place}: does not match its pattern"
    size = len(value) if isinstance(value, str | list) else value
    if isinstance(size, int | float):
        if rule.min is not None and size < rule.min:
            yield f"{place}: less than {rule.min:g}"
        if rule.max is not None and size > rule.max:
            yield f"{place}: more than {rule.max:g}"
    if isinstance(value, list) and rule.items:
        for item in value:
            yield from _wrong(rule.items, item, f"{place}[]")
    if isinstance(value, dict) and rule.fields is not None:
        yield from wrong(rule.fields, value, place)


class ToolCalls:
    """A validator for tool calls; it reads whole texts only."""

    views = ()  # a disguise is not the call: its rule reads no views

    channels = ("call",)

    def __init__(self, options: Options):
        self._rules = {tool.name: tool.arguments for tool in options.tools}

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        """Findings over the whole text: `tool`, `argument`, `unreadable`; the note says which and why."""
        if not text.strip():
            return []
        found: list[Finding] = []
        try:
            for name, arguments in calls(text):
                found += self._judged(name, arguments, len(text))
                if len(found) >= MOST_FINDINGS:
                    break
        except Unreadable as error:
            found.append(Finding("unreadable", 0, len(text), note=str(error)))
        return found[:MOST_FINDINGS]

    def _judged(self, name: str, arguments: dict[str, Json], end: int) -> list[Finding]:
        rules = self._rules.get(name)
        if rules is None:
            return [Finding("tool", 0, end, note="a tool that is not on the list")]
        notes = dict.fromkeys(wrong(rules, arguments, name))
        return [Finding("argument", 0, end, note=note) for note in notes]


def build(options: Options) -> ToolCalls:
    """The validator for these tools; raises ValueError for one that is named twice."""
    names = [tool.name for tool in options.tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"tools: {twice!r} is named twice")
    return ToolCalls(options)
