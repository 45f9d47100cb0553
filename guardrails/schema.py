"""What a policy file may hold: its tables as models, and the same as a JSON Schema for editors."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from guardrails import catalog
from guardrails.types import Every, Mode, Priority, Role, Scope

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
DUE = r"[1-9][0-9]{0,5}[smhd]"

WHOLE_TEXT = ("disclaimer", "grader", "guard_model", "json_schema", "language", "length", "tool_calls")
"""Validators that judge a text as a whole and so cannot say which part of it to redact."""

NAME = r"^[a-z0-9]+(-[a-z0-9]+)*$"
"""How policies and rules are named: names end up in headers, metrics and columns."""

NAME_OR_NONE = f"{NAME}|^$"

REPLIES = ("append", "refuse", "escalate")
"""The actions that say something, and so need a `reply`."""

INPUT_ONLY = ("scope", "window", "vault")
"""Keys of rules that only an input rule has."""

Word = Literal["allow", "append", "redact", "refuse", "escalate"]
Json = dict[str, Any]


class Table(BaseModel):
    """A table of a policy file: no unknown keys, no conversions."""

    model_config = ConfigDict(extra="forbid", strict=True)


class RouteTable(Table):
    """`[routes.NAME]`: who answers an escalated turn, how urgent it is, and by when (`due`, such as `15m`)."""

    queue: str = Field(min_length=1, description="Who answers.")
    priority: Priority = Field(default="normal", description="How urgent it is.")
    due: float = Field(
        description="By when: 45s, 15m, 4h or 2d.", json_schema_extra={"type": "string", "pattern": f"^{DUE}$"}
    )

    @field_validator("due", mode="before")
    @classmethod
    def seconds(cls, written: object) -> float:
        """The seconds in `15m`; raises ValueError for anything else."""
        if not isinstance(written, str) or not re.fullmatch(DUE, written):
            raise ValueError("write a number and a unit, such as 45s, 15m, 4h or 2d")
        return float(written[:-1]) * SECONDS[written[-1]]


class RuleTable(Table):
    """`[[input]]` or `[[output]]`: the keys that every rule knows; the other keys are its validator's options."""

    name: str = Field(
        pattern=NAME, max_length=100, description="Unique over the whole policy, or that of a parent's rule to change."
    )
    validator: str = Field(description="Who looks; all keys that are not listed for every rule are its options.")
    action: Word = Field(description="What happens when it finds something; the strictest of all rules decides.")
    reply: str = Field(default="", description="What is said; needed by append, refuse and escalate.")
    route: str = Field(default="", description="The [routes.NAME] of an escalation.")
    scope: Scope = Field(default="all", description="Which messages an input rule reads.")
    window: int = Field(default=0, ge=0, description="Only the last so many of them; 0 for all.")
    threshold: float = Field(default=0.5, ge=0, le=1, description="Findings that score lower are ignored.")
    placeholder: str = Field(default="", description="What a redacted place becomes; [LABEL] if nothing is said.")
    vault: bool = Field(
        default=False, description="A redacted place becomes a numbered placeholder that is restored in the reply."
    )
    views: bool = Field(default=True, description="Read the text as it may have been disguised, too.")
    every: Every = Field(
        default="text",
        description="What a validator that needs a whole text is given: a text, or sentence by sentence.",
    )
    confirm: dict[str, Any] | None = Field(
        default=None, description="A second validator with its options, which must agree where the first is not sure."
    )
    sure: float = Field(default=0.9, ge=0, le=1, description="The score from which on `confirm` is not asked.")
    if_broken: Literal["allow", "refuse", "escalate"] = Field(
        default="refuse", description="What happens when the validator fails or is late."
    )
    mode: Mode = Field(default="enforce", description="A rule in shadow mode is counted and logged, decides nothing.")
    budget: float = Field(
        default=10.0, gt=0, allow_inf_nan=False, description="Seconds until the validator counts as late."
    )
    locked: bool = Field(
        default=False, description="Policies that extend this one may make the rule stricter, and nothing else."
    )


class MessageTable(Table):
    """One of the `turns` of an example: what somebody said before."""

    role: Role = Field(description="Who said it.")
    content: str = Field(description="What was said.")


class ExampleTable(Table):
    """`[[example]]`: what somebody asks, or what the model answers, and what the policy must make of it."""

    ask: str = Field(default="", description="A user's message, judged by the input rules.")
    answer: str = Field(default="", description="A model's answer, judged by the output rules, whole and as a stream.")
    turns: list[MessageTable] = Field(
        default=[], description="What was said before; without `ask` and `answer` the conversation that is judged."
    )
    documents: list[str] = Field(default=[], description="The documents that an answer must be grounded in.")
    times: int = Field(default=1, ge=1, le=100_000, description="The text this many times over.")
    expect: Word = Field(description="The action that must come out; allow where the rules must let it through.")
    rule: str = Field(default="", description="The rule that must decide.")
    becomes: str = Field(default="", description="The exact text after a redaction, or with what is appended.")

    @property
    def text(self) -> str:
        """What is judged: a long text is a short one, many `times`."""
        said = self.ask or self.answer or (self.turns[-1].content if self.turns else "")
        return said * self.times


class PolicyTable(Table):
    """The whole file; the tables in it are read one by one, so that all of their problems are found."""

    name: str = Field(pattern=NAME, max_length=100, description="What headers, logs and columns call the policy.")
    description: str = Field(default="", description="One line for people.")
    extends: str = Field(
        default="", pattern=NAME_OR_NONE, max_length=100, description="A policy whose rules come before these."
    )
    remove: list[str] = Field(
        default=[], description="Rules of the parents that do not hold here; none that is locked."
    )
    persona: str = Field(default="", description="The system prompt; without one, the parent's holds.")
    parts: dict[str, str | list[str]] = Field(default={}, description="Pieces of patterns: {name} in a pattern.")
    input: list[dict[str, Any]] = Field(default=[], description="The rules for what clients send.")
    output: list[dict[str, Any]] = Field(default=[], description="The rules for what the model answers.")
    routes: dict[str, dict[str, Any]] = Field(default={}, description="The people that escalated turns go to.")
    example: list[dict[str, Any]] = Field(default=[], description="The examples that prove the policy.")


def json_schema() -> Json:
    """The JSON Schema (draft 2020-12) of a policy file, with the options of every validator that is installed.

    Raises ValueError when an installed validator cannot be had.
    """
    whole, defs = _parts(PolicyTable, "")
    options: dict[str, Json] = {}
    for name in catalog.names():
        options[name], more = _parts(catalog.options(name), f"{name}.")
        defs |= more
    for table, key in ((RouteTable, "route"), (ExampleTable, "example")):
        defs[key], more = _parts(table, f"{key}.")
        defs |= more
    defs["confirm"] = _confirm(options)
    for stage in ("input", "output"):
        defs[stage] = _rule(stage, options)
        whole["properties"][stage] |= {"items": {"$ref": f"#/$defs/{stage}"}}
    whole["properties"]["routes"] |= {"additionalProperties": {"$ref": "#/$defs/route"}}
    whole["properties"]["example"] |= {"items": {"$ref": "#/$defs/example"}}
    whole["properties"]["parts"] |= {"propertyNames": {"pattern": "^[a-z_]{2,}$"}}
    defs["example"]["oneOf"] = [
        {"required": ["ask"]},
        {"required": ["answer"]},
        {"required": ["turns"], "not": {"anyOf": [{"required": ["ask"]}, {"required": ["answer"]}]}},
    ]
    every_rule_whole = {"items": {"required": ["validator"]}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A policy of newel",
        **whole,
        "if": {"not": {"required": ["extends"]}},
        "then": {"properties": {"input": every_rule_whole, "output": every_rule_whole}},
        "$defs": defs,
    }


def _parts(model: type[BaseModel], prefix: str) -> tuple[Json, Json]:
    """(the schema of a model without its titles, the schemas that it refers to, their names after `prefix`)."""
    schema: Json = _untitled(model.model_json_schema(ref_template=f"#/$defs/{prefix}{{model}}"))
    inner: Json = schema.pop("$defs", {})
    return schema, {f"{prefix}{name}": part for name, part in inner.items()}


def _untitled(schema: Any) -> Any:
    """The schema without the titles that pydantic makes of names; a property may be called `title`."""
    if isinstance(schema, list):
        return [_untitled(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    titled = isinstance(schema.get("title"), str)
    return {key: _untitled(value) for key, value in schema.items() if not (titled and key == "title")}


def _rule(stage: str, options: dict[str, Json]) -> Json:
    """The schema of a rule of this stage: one of each validator, or a change of a parent's rule.

    The validator's branch is chosen by its name, not tried like the others of a `oneOf`: an editor can then say which
    key is wrong. All options are listed beside, for what an editor offers while one writes.
    """
    shared, _ = _parts(RuleTable, "")
    keys: Json = {name: key for name, key in shared["properties"].items() if stage == "input" or name not in INPUT_ONLY}
    keys["confirm"] = {"$ref": "#/$defs/confirm", "description": keys["confirm"]["description"]}
    keys["validator"] |= {"enum": list(options)}
    found: dict[str, list[Json]] = {}
    for model in options.values():
        for key, schema in model["properties"].items():
            found.setdefault(key, []).append(schema)
    some = {key: schemas[0] if len(schemas) == 1 else {"anyOf": schemas} for key, schemas in found.items()}
    offered = {key: {"description": schemas[0].get("description", "")} for key, schemas in found.items()}
    change = {"properties": dict.fromkeys(keys, True) | some, "additionalProperties": False}
    speaking = {"properties": {"action": {"enum": list(REPLIES)}}, "required": ["validator", "action"]}
    return {
        "type": "object",
        "properties": offered | keys,
        "required": ["name"],
        "allOf": [
            *_by_validator(options, dict.fromkeys(keys, True), ["name", "action"]),
            {"if": {"not": {"required": ["validator"]}}, "then": change},
            {"if": speaking, "then": {"required": ["reply"]}},
        ],
    }


def _confirm(options: dict[str, Json]) -> Json:
    """The schema of `confirm`: a validator and its options."""
    return {
        "type": "object",
        "properties": {"validator": {"enum": list(options)}},
        "required": ["validator"],
        "allOf": _by_validator(options, {"validator": True}, []),
    }


def _by_validator(options: dict[str, Json], keys: Json, required: list[str]) -> list[Json]:
    """One branch for each validator: `keys`, and its options."""
    branches: list[Json] = []
    for name, model in options.items():
        properties = keys | model["properties"]
        if "action" in keys and name in WHOLE_TEXT:
            properties["action"] = {"enum": [word for word in get_args(Word) if word != "redact"]}
        then = {
            "properties": properties,
            "required": [*required, *model.get("required", ())],
            "additionalProperties": False,
        }
        branches.append({"if": {"properties": {"validator": {"const": name}}, "required": ["validator"]}, "then": then})
    return branches
