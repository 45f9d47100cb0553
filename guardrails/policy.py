"""Policies: one TOML file that says what may be said here, and proves it with its own examples.

Reading is strict. Whatever is wrong with a file, and with the files it extends, is found in one go:

    PolicyError              a policy that cannot be used; `problems` lists every reason
        Problem              file, line, what is wrong, what to do
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from guardrails import catalog, lines
from guardrails.types import Action, Example, Mode, Policy, Priority, Route, Rule, Scope, Stage, Validator

SHIPPED = Path(__file__).parent / "policies"
"""The folder of the policies that come with newel."""

STAGES: tuple[Stage, ...] = ("input", "output")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
WHOLE_TEXT = ("grader", "language", "length")
"""Validators that judge a text as a whole and so cannot say which part of it to redact."""

NAME = r"^[a-z0-9]+(-[a-z0-9]+)*$"
"""How policies and rules are named: names end up in headers, metrics and columns."""

PART = re.compile(r"(?<!\\)(?<!\\[pPN])\{([a-z_]{2,})\}")
"""`{pay}` in a pattern: the part of that name. Neither `a{2,3}` nor `\\p{lower}` nor `\\{pay}` is meant."""

Word = Literal["allow", "append", "redact", "refuse", "escalate"]
Model = TypeVar("Model", bound=BaseModel)
_Shown: TypeAlias = "tuple[_Layer, lines.Path, ExampleTable]"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a policy, where, and what to do about it."""

    file: str
    line: int
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}; {self.advice}"


class PolicyError(ValueError):
    """A policy that cannot be used; `problems` has every reason, one a line in the message."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


class Table(BaseModel):
    """A table of a policy file: no unknown keys, no conversions."""

    model_config = ConfigDict(extra="forbid", strict=True)


class RouteTable(Table):
    """`[routes.NAME]`: who answers an escalated turn, how urgent it is, and by when (`due`, such as `15m`)."""

    queue: str = Field(min_length=1)
    priority: Priority = "normal"
    due: float

    @field_validator("due", mode="before")
    @classmethod
    def seconds(cls, written: object) -> float:
        """The seconds in `15m`; raises ValueError for anything else."""
        match = re.fullmatch(r"([1-9]\d{0,5})([smhd])", str(written))
        if not match:
            raise ValueError("write a number and a unit, such as 45s, 15m, 4h or 2d")
        return float(match[1]) * SECONDS[match[2]]


class RuleTable(Table):
    """`[[input]]` or `[[output]]`: the keys that every rule knows; the other keys are its validator's options."""

    name: str = Field(pattern=NAME)
    validator: str
    action: Word
    reply: str = ""
    route: str = ""
    scope: Scope = "all"
    threshold: float = Field(default=0.5, ge=0, le=1)
    placeholder: str = ""
    if_broken: Literal["allow", "refuse", "escalate"] = "refuse"
    mode: Mode = "enforce"
    budget: float = Field(default=10.0, gt=0, allow_inf_nan=False)


class ExampleTable(Table):
    """`[[example]]`: what somebody asks, or what the model answers, and what the policy must make of it."""

    ask: str = ""
    answer: str = ""
    times: int = Field(default=1, ge=1, le=100_000)
    expect: Word
    rule: str = ""
    becomes: str = ""

    @property
    def text(self) -> str:
        """What is judged: a long text is a short one, many `times`."""
        return (self.ask or self.answer) * self.times


class PolicyTable(Table):
    """The whole file; the tables in it are read one by one, so that all of their problems are found."""

    name: str = Field(pattern=NAME)
    description: str = ""
    extends: str = ""
    persona: str = ""
    parts: dict[str, str | list[str]] = {}
    input: list[dict[str, Any]] = []
    output: list[dict[str, Any]] = []
    routes: dict[str, dict[str, Any]] = {}
    example: list[dict[str, Any]] = []


@dataclass(frozen=True, slots=True)
class _RuleRead:
    """A rule as far as it could be read, and where."""

    layer: _Layer
    stage: Stage
    path: lines.Path
    table: RuleTable
    options: Mapping[str, Any]
    validator: Validator

    def wrong(self, key: str, what: str, advice: str) -> None:
        """Notes a problem of this rule at the line of `key`."""
        self.layer.wrong((*self.path, key), f"rule {self.table.name!r} {what}", advice)

    def rule(self) -> Rule:
        """The rule as the engine knows it."""
        known = self.table.model_dump(exclude={"validator", "action", "if_broken"})
        action, broken = Action[self.table.action.upper()], Action[self.table.if_broken.upper()]
        return Rule(validator=self.validator, action=action, if_broken=broken, **known)


@dataclass(slots=True)
class _Layer:
    """One file of a policy, as far as it could be read, and the problems of the whole policy."""

    file: str
    source: str
    problems: list[Problem]
    path: Path | None = None
    places: dict[lines.Path, int] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    top: Mapping[str, Any] = field(default_factory=dict)
    rules: list[_RuleRead] = field(default_factory=list)
    routes: dict[str, RouteTable] = field(default_factory=dict)
    examples: list[tuple[lines.Path, ExampleTable]] = field(default_factory=list)

    def wrong(self, path: lines.Path, what: str, advice: str) -> None:
        """Notes a problem at the line of `path`."""
        self.problems.append(Problem(self.file, lines.nearest(self.places, path), what, advice))

    def filled(self, path: lines.Path, pattern: str) -> str:
        """`pattern` with the parts that it names in their places."""
        for name in PART.findall(pattern):
            if name not in self.parts:
                advice = _offer(name, list(self.parts), "add a table [parts] that has it")
                self.wrong(path, f"there is no part {{{name}}} above this line", f"{advice} (\\{{ is a plain brace)")
        return PART.sub(lambda match: self.parts.get(match[1], match[0]), pattern)

    def read(self, model: type[Model], raw: object, path: lines.Path, whose: str) -> Model | None:
        """`raw` as a `model`, or None with its problems noted."""
        try:
            return model.model_validate(raw)
        except ValidationError as error:
            for one in error.errors():
                self.wrong((*path, *one["loc"]), *_explained(one, whose, model))
            return None


def load(path_or_name: str | Path, folders: Sequence[Path] = ()) -> Policy:
    """The policy in a file, or the one that goes by a bare name in `folders` or among the shipped ones.

    What it extends is looked up beside the file, then in `folders`, then among the shipped ones. Raises PolicyError.
    """
    named, path = str(path_or_name), Path(path_or_name)
    if isinstance(path_or_name, str) and re.fullmatch(NAME, named):
        found = _found(named, folders, ())
        if found is None:
            raise PolicyError([Problem(named, 1, "there is no policy of this name", _offer(named, _there(folders)))])
        return _resolved(_opened(found), folders)
    return _resolved(_opened(path), (path.parent, *folders))


def loads(source: str, name: str = "<string>", folders: Sequence[Path] = ()) -> Policy:
    """The policy in a TOML text; `name` stands for the file in errors. Raises PolicyError."""
    return _resolved(_Layer(name, source, []), folders)


def _there(folders: Sequence[Path]) -> list[str]:
    """The names of the policies in `folders` and among the shipped ones."""
    return sorted({file.stem for folder in (*folders, SHIPPED) for file in folder.glob("*.toml")})


def _found(name: str, folders: Sequence[Path], seen: Sequence[Path | None]) -> Path | None:
    """The first file of this name that is not in `seen`."""
    files = (folder / f"{name}.toml" for folder in (*folders, SHIPPED))
    return next((file for file in files if file.is_file() and file.resolve() not in seen), None)


def _opened(path: Path) -> _Layer:
    """The file at `path`, not yet read; raises PolicyError when it cannot be."""
    try:
        return _Layer(str(path), path.read_text(encoding="utf-8"), [], path.resolve())
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise PolicyError([Problem(str(path), line, "the file is not UTF-8", "save it as UTF-8")]) from None
    except OSError as error:
        advice = _offer(path.stem, sorted(file.stem for file in path.parent.glob("*.toml")))
        raise PolicyError([Problem(str(path), 1, f"cannot be read ({error.strerror})", advice)]) from None


def _resolved(leaf: _Layer, folders: Sequence[Path]) -> Policy:
    """The policy of `leaf` and of all that it extends; raises PolicyError with the problems of all of them."""
    layers = _lineage(leaf, folders)
    routes = {name: route for layer in layers for name, route in layer.routes.items()}
    rules = [rule for layer in layers for rule in layer.rules]
    examples = {(_stage(one[2]), one[2].text): one for one in _shown(layers)}
    _check(layers, rules, list(examples.values()))
    if leaf.problems:
        raise PolicyError(sorted(set(leaf.problems), key=lambda one: (one.file, one.line)))
    top = PolicyTable.model_validate(leaf.top)
    persona = next((text for layer in reversed(layers) if (text := layer.top.get("persona", "").strip())), "")
    content = {
        "name": top.name,
        "description": top.description,
        "persona": persona,
        "routes": {name: route.model_dump(mode="json") for name, route in routes.items()},
        "examples": [shown.model_dump(mode="json") for _, _, shown in examples.values()],
    }
    return Policy(
        name=top.name,
        description=top.description,
        version=_version(content, rules),
        persona=persona,
        input=tuple(one.rule() for one in rules if one.stage == "input"),
        output=tuple(one.rule() for one in rules if one.stage == "output"),
        routes={name: Route(name, **route.model_dump()) for name, route in routes.items()},
        examples=tuple(_example(*found) for found in examples.values()),
        source=leaf.source,
    )


def _check(layers: Sequence[_Layer], rules: Sequence[_RuleRead], examples: Sequence[_Shown]) -> None:
    """Notes what does not fit together. Routes and rules with mistakes of their own count as written here."""
    _check_names(rules)
    routes = [name for layer in layers for name, _ in _named(layer.top.get("routes"))]
    for rule in rules:
        _check_rule(rule, routes)
    stages: dict[str, Stage] = {}
    for layer in layers:
        for stage in STAGES:
            stages |= {str(raw.get("name")): stage for _, raw in _tables(layer.top.get(stage))}
    for example in examples:
        _check_example(*example, stages)


def _lineage(leaf: _Layer, folders: Sequence[Path]) -> list[_Layer]:
    """`leaf` and what it extends, the eldest first, each read."""
    layers: list[_Layer] = []
    layer: _Layer | None = leaf
    while layer:
        _read(layer)
        layers.insert(0, layer)
        layer = _parent(layer, folders, [known.path for known in layers])
    return layers


def _parent(layer: _Layer, folders: Sequence[Path], seen: Sequence[Path | None]) -> _Layer | None:
    """The file that `layer` extends, not yet read; a file of its own name is looked for further on."""
    name = layer.top.get("extends")
    if not isinstance(name, str) or not name:
        return None
    if path := _found(name, folders, seen):
        try:
            parent = _opened(path)
        except PolicyError as error:
            layer.problems.extend(error.problems)
            return None
        parent.problems = layer.problems
        return parent
    if _found(name, folders, ()):
        layer.wrong(("extends",), f"the policy extends {name!r} in a circle", "remove one `extends` of the circle")
    else:
        layer.wrong(("extends",), f"there is no policy {name!r} to extend", _offer(name, _there(folders)))
    return None


def _read(layer: _Layer) -> None:
    """Reads the source of `layer` into tables, noting every problem."""
    try:
        layer.top = tomllib.loads(layer.source)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"(.*) \(at line (\d+), column (\d+)\)$", str(error))
        line = int(place[2]) if place else layer.source.count("\n") + 1
        what = f"{place[1]} at column {place[3]}" if place else str(error)
        layer.problems.append(Problem(layer.file, line, f"not valid TOML: {what}", "correct this line"))
        return
    layer.places = lines.lines(layer.source)
    layer.read(PolicyTable, layer.top, (), "the policy")
    _read_parts(layer)
    for stage in STAGES:
        for number, raw in _tables(layer.top.get(stage)):
            _read_rule(layer, stage, (stage, number), raw)
    for name, raw in _named(layer.top.get("routes")):
        if route := layer.read(RouteTable, raw, ("routes", name), f"route {name!r}"):
            layer.routes[name] = route
    for number, raw in _tables(layer.top.get("example")):
        if shown := layer.read(ExampleTable, raw, ("example", number), "the example"):
            layer.examples.append((("example", number), shown))


def _read_parts(layer: _Layer) -> None:
    """Reads the parts of patterns; each may be made of those above it. A list is a choice of its items."""
    parts = layer.top.get("parts")
    for name, raw in parts.items() if isinstance(parts, dict) else ():
        items = [item for item in (raw if isinstance(raw, list) else [raw]) if isinstance(item, str)]
        if not re.fullmatch(r"[a-z_]{2,}", name):
            layer.wrong(("parts", name), f"a part has the name {name!r}", "use two or more small letters")
        filled = [layer.filled(("parts", name, n), item) for n, item in enumerate(items)]
        layer.parts[name] = f"(?:{'|'.join(filled)})"


def _tables(raw: object) -> Iterable[tuple[int, dict[str, Any]]]:
    """The tables of a list, with their numbers; what is not a table was complained about with the whole."""
    return [(n, one) for n, one in enumerate(raw) if isinstance(one, dict)] if isinstance(raw, list) else []


def _named(raw: object) -> Iterable[tuple[str, dict[str, Any]]]:
    """The tables of a table, with their names."""
    return [(name, one) for name, one in raw.items() if isinstance(one, dict)] if isinstance(raw, dict) else []


def _read_rule(layer: _Layer, stage: Stage, path: lines.Path, raw: Mapping[str, Any]) -> None:
    """Reads one rule and builds its validator."""
    whose = f"rule {raw.get('name', '')!r}"
    own = {key: raw[key] for key in raw if key in RuleTable.model_fields}
    table = layer.read(RuleTable, own, path, whose)
    name = raw.get("validator")
    if not isinstance(name, str):
        return
    given = {key: raw[key] for key in raw if key not in own}
    if isinstance(patterns := given.get("patterns"), list):
        filled = [
            layer.filled((*path, "patterns", n), one) if isinstance(one, str) else one for n, one in enumerate(patterns)
        ]
        given["patterns"] = filled
    built = _built(layer, path, whose, name, given)
    if table and built:
        layer.rules.append(_RuleRead(layer, stage, path, table, *built))


def _built(
    layer: _Layer, path: lines.Path, whose: str, name: str, given: Mapping[str, Any]
) -> tuple[dict[str, Any], Validator] | None:
    """(the options of validator `name` with its defaults, the validator), or None with the problems noted."""
    try:
        if name not in (names := catalog.names()):
            layer.wrong((*path, "validator"), f"{whose} has an unknown validator {name!r}", _offer(name, names))
            return None
        model = catalog.options(name)
    except ValueError as error:
        layer.wrong((*path, "validator"), f"{whose}: {error}", "repair that package or use another validator")
        return None
    unknown = [key for key in given if key not in model.model_fields]
    for key in unknown:
        advice = _offer(key, [*RuleTable.model_fields, *model.model_fields])
        layer.wrong((*path, key), f"{whose} has an unknown key {key!r}", advice)
    options = layer.read(model, {key: given[key] for key in given if key not in unknown}, path, whose)
    if options is None:
        return None
    try:
        return options.model_dump(mode="json"), catalog.build(name, options)
    except ValueError:
        for place, what in _culprits(name, options):
            layer.wrong((*path, *place), f"{whose}: {what}", "correct this value")
        return None


def _culprits(name: str, options: BaseModel) -> list[tuple[lines.Path, str]]:
    """Why a validator refuses its options: every list item that is wrong on its own, else the options as a whole."""
    found: list[tuple[lines.Path, str]] = []
    for key in options.model_fields_set:
        values = getattr(options, key)
        for number, value in enumerate(values if isinstance(values, list) else []):
            if what := _refusal(name, options.model_copy(update={key: [value]})):
                found.append(((key, number), what.removeprefix(f"{key}: number 1, ")))
    return found or [((), _refusal(name, options))]


def _refusal(name: str, options: BaseModel) -> str:
    """The message with which a validator refuses its options, or empty."""
    try:
        catalog.build(name, options)
    except ValueError as error:
        return str(error)
    return ""


def _check_names(rules: Sequence[_RuleRead]) -> None:
    """Notes every rule whose name an earlier rule has."""
    first: dict[str, _RuleRead] = {}
    for rule in rules:
        other = first.setdefault(rule.table.name, rule)
        if other is not rule:
            place = f"{other.layer.file}:{lines.nearest(other.layer.places, other.path)}"
            rule.wrong("name", f"has the name of another rule ({place})", "give it a name of its own")


def _check_rule(rule: _RuleRead, routes: Sequence[str]) -> None:
    """Notes what a rule lacks for its action, and what it says that nobody would read."""
    table, action = rule.table, rule.table.action
    replies = action in ("append", "refuse", "escalate")
    if replies and not table.reply.strip():
        rule.wrong("action", f"has no reply, but its action is {action!r}", 'add reply = "..." with what to say')
    if action == "redact" and table.validator in WHOLE_TEXT:
        what = f"cannot redact: {table.validator!r} judges a text as a whole"
        rule.wrong("action", what, "refuse instead, or use a validator that finds places")
    routed = "escalate" in (action, table.if_broken)
    if routed and table.route not in routes:
        what = f"has an unknown route {table.route!r}" if table.route else "has no route to escalate to"
        rule.wrong("route", what, _offer(table.route, routes, 'add a table [routes.NAME] and route = "NAME"'))
    unread = {
        "reply": not replies and bool(table.reply),
        "placeholder": action != "redact" and bool(table.placeholder),
        "route": not routed and bool(table.route),
        "scope": rule.stage == "output" and "scope" in table.model_fields_set,
    }
    for key in (key for key, said in unread.items() if said):
        why = "is for input rules" if key == "scope" else f"is not used by action {action!r}"
        rule.wrong(key, f"says {key!r}, which {why}", "remove it")


def _stage(shown: ExampleTable) -> Stage:
    """An example that is asked is judged by the input rules, an answer by the output rules."""
    return "input" if shown.ask else "output"


def _shown(layers: Sequence[_Layer]) -> Iterable[_Shown]:
    """All examples, the eldest layer's first; the place of each is kept beside it."""
    return ((layer, path, shown) for layer in layers for path, shown in layer.examples)


def _check_example(layer: _Layer, path: lines.Path, shown: ExampleTable, stages: Mapping[str, Stage]) -> None:
    """Notes what makes an example unclear."""
    if bool(shown.ask) == bool(shown.answer):
        layer.wrong(path, "an example says what is asked or what is answered", "write either `ask` or `answer`")
    elif shown.rule and stages.get(shown.rule) != _stage(shown):
        names = [name for name, stage in stages.items() if stage == _stage(shown)]
        what = f"the example names {shown.rule!r}, which is not an {_stage(shown)} rule"
        layer.wrong((*path, "rule"), what, _offer(shown.rule, names))
    if shown.rule and shown.expect == "allow":
        layer.wrong((*path, "rule"), "an example that is allowed names a rule", "remove `rule`: no rule decides")
    changed = ("redact",) if shown.ask else ("redact", "append")
    if shown.becomes and shown.expect not in changed:
        layer.wrong((*path, "becomes"), f"{shown.expect!r} does not change this text", "remove `becomes`")


def _example(layer: _Layer, path: lines.Path, shown: ExampleTable) -> Example:
    """The example as the check knows it."""
    return Example(
        stage=_stage(shown),
        text=shown.text,
        expect=Action[shown.expect.upper()],
        rule=shown.rule,
        becomes=shown.becomes,
        line=lines.nearest(layer.places, path),
        file=layer.file,
    )


def _version(content: Mapping[str, Any], rules: Sequence[_RuleRead]) -> str:
    """The first 12 hex digits of the SHA-256 of all that a policy says, written in one way."""
    written = [[rule.stage, rule.table.model_dump(mode="json"), rule.options] for rule in rules]
    canonical = json.dumps({**content, "rules": written}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _explained(error: ErrorDetails, whose: str, model: type[BaseModel]) -> tuple[str, str]:
    """(what is wrong, what to do) for an error of pydantic's."""
    key, given = ".".join(map(str, error["loc"])), error["input"]
    if error["type"] == "extra_forbidden":
        wrong = str(error["loc"][-1])
        names = list(model.model_fields) if len(error["loc"]) == 1 else []
        return f"{whose} has an unknown key {key!r}", _offer(wrong, names, "remove it; docs/validators.md has the keys")
    if error["type"] == "missing":
        return f"{whose} has no {key!r}", f"add {key} = ..."
    if error["type"] == "literal_error":
        expected = re.findall(r"'([^']+)'", error["ctx"]["expected"])
        return f"{whose} has {key} = {given!r}", _offer(str(given), expected)
    if error["type"] == "list_type" and key in ("input", "output", "example"):
        return f"{key!r} is a table of its own", f"write [[{key}]] with two brackets"
    if error["type"] == "string_pattern_mismatch":
        return f"{whose} has {key} = {given!r}", "use lower-case letters, digits and single hyphens"
    return f"{whose}{f', {key!r}' if key else ''}: {error['msg'].removeprefix('Value error, ')}", "correct this value"


def _offer(wrong: str, names: Sequence[str], none: str = "there is none") -> str:
    """What to write instead of `wrong`: the nearest name, else all of them."""
    near = difflib.get_close_matches(wrong, names, 1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"there are {', '.join(names)}" if names else none
