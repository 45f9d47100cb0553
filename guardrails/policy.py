"""Policies: one TOML file that says what may be said here, and proves it with its own examples.

Reading is strict. Whatever is wrong with a file, and with the files it extends, is found in one go:

    PolicyError              a policy that cannot be used; `problems` lists every reason
        Problem              file, line, what is wrong, what to do

A file that extends another has its rules, in their order, and then its own. It may change a rule of the other by its
name, and take one away with `remove`; of a locked one nothing passes but what makes it stricter.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from guardrails import catalog, lines
from guardrails.changes import WrittenRule, changes
from guardrails.schema import (
    INPUT_ONLY,
    NAME,
    REPLIES,
    WHOLE_TEXT,
    ExampleTable,
    PolicyTable,
    RouteTable,
    RuleTable,
)
from guardrails.types import Action, Example, Message, Policy, Route, Rule, Stage, StreamValidator, Validator

SHIPPED = Path(__file__).parent / "policies"
"""The folder of the policies that come with newel."""

STAGES: tuple[Stage, ...] = ("input", "output")

PART = re.compile(r"(?<!\\)(?<!\\[pPN])\{([a-z_]{2,})\}")
"""`{pay}` in a pattern: the part of that name. Neither `a{2,3}` nor `\\p{lower}` nor `\\{pay}` is meant."""

LONGEST_FILE, LONGEST_PATTERN, LONGEST_EXAMPLE = 1_000_000, 100_000, 1_000_000
"""Characters of a file, of a pattern with its parts filled in, of an example with its repeats."""

_KEY = r"""(?:(?<![\w-])[\w-]++|"[^"\n]*+"|'[^'\n]*+')"""
LONG_KEY = re.compile(rf"{_KEY}(?:[ \t]*+\.[ \t]*+{_KEY}){{50}}")
"""A dotted key of which each part costs `tomllib` as much as all before it."""

MOST_MISTAKES = 20
"""How many mistakes of one table are told at most."""

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


@dataclass(frozen=True, slots=True)
class Source:
    """The TOML text of a policy that is in no file; `label` stands for the file in errors."""

    label: str
    text: str


@dataclass(frozen=True, slots=True)
class Resolved:
    """A policy with its rules as they are written.

    parents: the names of all that it extends, the next one first. files: where it and they were read, in that order.
    """

    policy: Policy
    rules: tuple[WrittenRule, ...]
    parents: tuple[str, ...]
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Library:
    """Where a policy that is named is looked for: `stored` by name, then `folders`, then the shipped ones."""

    folders: tuple[Path, ...] = ()
    stored: Mapping[str, Source] = field(default_factory=dict)

    def names(self) -> list[str]:
        """The names of all policies that are there."""
        files = {file.stem for folder in (*self.folders, SHIPPED) for file in folder.glob("*.toml")}
        return sorted(files | set(self.stored))

    def layer(self, source: Source) -> _Layer:
        """A text that is in no file, not yet read; files that it names are those of the first folder."""
        return _Layer(source.label, source.text, [], folder=next(iter(self.folders), None))

    def found(self, name: str, seen: Sequence[_Layer] = ()) -> _Layer | None:
        """The first of this name that is not in `seen`, not yet read; raises PolicyError when it cannot be opened.

        What is stored under a name may be another version, or a copy, of a policy of that name in `seen`.
        """
        if name in self.stored and name not in [layer.name for layer in seen]:
            return self.layer(self.stored[name])
        paths, texts = [layer.path for layer in seen], [layer.source for layer in seen]
        for file in (folder / f"{name}.toml" for folder in (*self.folders, SHIPPED)):
            if file.is_file() and file.resolve() not in paths and (layer := _opened(file)).source not in texts:
                return layer
        return None


@dataclass(frozen=True, slots=True)
class _Built:
    """A validator, and what it was built of: its name, and its options as far as they are no defaults."""

    name: str
    options: Mapping[str, Any]
    validator: Validator


@dataclass(slots=True)
class _Layer:
    """One file of a policy, as far as it could be read, and the problems of the whole policy."""

    file: str
    source: str
    problems: list[Problem]
    path: Path | None = None
    folder: Path | None = None
    places: dict[lines.Path, int] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    top: Mapping[str, Any] = field(default_factory=dict)
    routes: dict[str, RouteTable] = field(default_factory=dict)
    examples: list[tuple[lines.Path, ExampleTable]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name that the file gives to its policy."""
        return str(self.top.get("name", ""))

    def wrong(self, path: lines.Path, what: str, advice: str) -> None:
        """Notes a problem at the line of `path`."""
        self.problems.append(Problem(self.file, lines.nearest(self.places, path), what, advice))

    def read(self, model: type[Model], raw: object, path: lines.Path, whose: str) -> Model | None:
        """`raw` as a `model`, or None with its problems noted."""
        return _Spot(((self, path),)).read(model, raw, whose)

    def filled(self, path: lines.Path, pattern: str) -> str:
        """`pattern` with the parts that it names in their places."""
        named = PART.findall(pattern)
        for name in (name for name in named if name not in self.parts):
            advice = _offer(name, list(self.parts), "add a table [parts] that has it")
            self.wrong(path, f"there is no part {{{name}}} above this line", f"{advice} (\\{{ is a plain brace)")
        if len(pattern) + sum(len(self.parts.get(name, "")) for name in named) > LONGEST_PATTERN:
            what = f"with its parts filled in this has more than {LONGEST_PATTERN:,} characters"
            self.wrong(path, what, "write several patterns")
            return ""
        return PART.sub(lambda match: self.parts.get(match[1], match[0]), pattern)


@dataclass(frozen=True, slots=True)
class _Spot:
    """Where a table is written: in one layer, or in several of which each changes keys of the one before."""

    written: tuple[tuple[_Layer, lines.Path], ...]

    @property
    def place(self) -> str:
        """File and line of the first that wrote it."""
        layer, path = self.written[0]
        return f"{layer.file}:{lines.nearest(layer.places, path)}"

    def inner(self, key: str) -> _Spot:
        """Where the table `key` in this table is written."""
        return _Spot(tuple((layer, (*path, key)) for layer, path in self.written))

    def age(self, key: str) -> int:
        """Which layer wrote `key` last: 1 for the eldest, 0 when none did."""
        numbered = enumerate(self.written, 1)
        return max((age for age, (layer, path) in numbered if (*path, key) in layer.places), default=0)

    def wrong(self, tail: lines.Path, what: str, advice: str) -> None:
        """Notes a problem at the line of the key `tail`, in the layer that wrote it last."""
        age = self.age(str(tail[0])) if tail else 0
        layer, path = self.written[age - 1]
        layer.wrong((*path, *tail), what, advice)

    def read(self, model: type[Model], raw: object, whose: str) -> Model | None:
        """`raw` as a `model`, or None with its problems noted."""
        try:
            return model.model_validate(raw, context={"folder": self.written[0][0].folder})
        except ValidationError as error:
            for one in error.errors()[:MOST_MISTAKES]:
                self.wrong(one["loc"], *_explained(one, whose, model))
            return None


@dataclass(frozen=True, slots=True)
class _RuleRead:
    """A rule as far as it could be read, with the changes of all layers so far; None is what could not be read.

    age: how many layers there were when it was touched last; what is written later is younger.
    """

    name: str
    stage: Stage
    spot: _Spot
    raw: Mapping[str, Any]
    age: int
    table: RuleTable | None = None
    built: _Built | None = None
    confirm: _Built | None = None
    lock: str = ""

    def wrong(self, key: str, what: str, advice: str) -> None:
        """Notes a problem of this rule at the line of `key`."""
        self.spot.wrong((key,), f"rule {self.name!r} {what}", advice)

    @property
    def written(self) -> WrittenRule | None:
        """What the rule says, or None when it could not be read."""
        if self.table is None or self.built is None:
            return None
        confirm = (self.confirm.name, self.confirm.options) if self.confirm else None
        return WrittenRule(self.stage, self.table, self.built.options, confirm)

    def rule(self) -> Rule:
        """The rule as the engine knows it."""
        assert self.table and self.built  # noqa: S101 - a policy with a rule that could not be read is not made
        known = self.table.model_dump(exclude={"validator", "action", "if_broken", "confirm", "locked"})
        known["views"] = self.table.views and getattr(self.built.validator, "views", None) != ()
        second = (self.confirm.name, self.confirm.options) if self.confirm else None
        return Rule(
            validator=self.built.validator,
            action=Action[self.table.action.upper()],
            if_broken=Action[self.table.if_broken.upper()],
            confirm=self.confirm.validator if self.confirm else None,
            key=_digest([self.built.name, self.built.options, second])[:16],
            **known,
        )


def load(path_or_name: str | Path, folders: Sequence[Path] = ()) -> Policy:
    """The policy in a file, or the one that goes by a bare name in `folders` or among the shipped ones.

    What it extends is looked up beside the file, then in `folders`, then among the shipped ones. Raises PolicyError.
    """
    return resolve(path_or_name, Library(tuple(folders))).policy


def loads(source: str, name: str = "<string>", folders: Sequence[Path] = ()) -> Policy:
    """The policy in a TOML text; `name` stands for the file in errors. Raises PolicyError."""
    return resolve(Source(name, source), Library(tuple(folders))).policy


def resolve(policy: str | Path | Source, library: Library) -> Resolved:
    """The policy in a text, in a file, or of a bare name in `library`, where its parents are looked for, too.

    The folder of a file comes before the others. Raises PolicyError.
    """
    if isinstance(policy, Source):
        return _resolved(library.layer(policy), library)
    if isinstance(policy, str) and re.fullmatch(NAME, policy):
        leaf = library.found(policy)
        if leaf is None:
            raise PolicyError([Problem(policy, 1, "there is no policy of this name", _offer(policy, library.names()))])
        return _resolved(leaf, library)
    path = Path(policy)
    return _resolved(_opened(path), replace(library, folders=(path.parent, *library.folders)))


def _opened(path: Path) -> _Layer:
    """The file at `path`, not yet read; raises PolicyError when it cannot be."""
    try:
        return _Layer(str(path), path.read_text(encoding="utf-8"), [], path.resolve(), path.parent)
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise PolicyError([Problem(str(path), line, "the file is not UTF-8", "save it as UTF-8")]) from None
    except OSError as error:
        advice = _offer(path.stem, sorted(file.stem for file in path.parent.glob("*.toml")))
        raise PolicyError([Problem(str(path), 1, f"cannot be read ({error.strerror})", advice)]) from None
    except ValueError as error:  # a path with a zero byte
        raise PolicyError([Problem(repr(str(path)), 1, f"cannot be read ({error})", "name a file")]) from None


def _resolved(leaf: _Layer, library: Library) -> Resolved:
    """The policy of `leaf` and of all that it extends; raises PolicyError with the problems of all of them."""
    layers = _lineage(leaf, library)
    rules, removed = _rules(layers)
    routes = {name: route for layer in layers for name, route in layer.routes.items()}
    shown = _shown(layers, rules, removed)
    examples = {(_stage(one[2]), one[2].text, _before(one[2])): one for one in shown}
    _check(layers, rules, list(examples.values()))
    if leaf.problems:
        raise PolicyError(sorted(set(leaf.problems), key=lambda one: (one.file, one.line)))
    top = PolicyTable.model_validate(leaf.top)
    persona = next((text for layer in reversed(layers) if (text := layer.top.get("persona", "").strip())), "")
    written = tuple(one for rule in rules if (one := rule.written))
    content = {
        "name": top.name,
        "description": top.description,
        "persona": persona,
        "routes": {name: route.model_dump(mode="json") for name, route in routes.items()},
        "examples": [one.model_dump(mode="json", exclude_defaults=True) for _, _, one in examples.values()],
        "rules": [rule.content for rule in written],
    }
    policy = Policy(
        name=top.name,
        description=top.description,
        version=_digest(content)[:12],
        persona=persona,
        input=tuple(one.rule() for one in rules if one.stage == "input"),
        output=tuple(one.rule() for one in rules if one.stage == "output"),
        routes={name: Route(name, **route.model_dump()) for name, route in routes.items()},
        examples=tuple(_example(*found) for found in examples.values()),
        source=leaf.source,
    )
    youngest_first = layers[::-1]
    parents = tuple(str(layer.top["extends"]) for layer in youngest_first[:-1])
    return Resolved(policy, written, parents, tuple(layer.file for layer in youngest_first))


def _digest(content: object) -> str:
    """The SHA-256 of plain values, written in one way, in hex."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


# --- reading the files


def _lineage(leaf: _Layer, library: Library) -> list[_Layer]:
    """`leaf` and what it extends, the eldest first, each read but for its rules."""
    layers: list[_Layer] = []
    layer: _Layer | None = leaf
    while layer:
        _read(layer)
        layers.insert(0, layer)
        layer = _parent(layer, library, layers)
    return layers


def _parent(layer: _Layer, library: Library, seen: Sequence[_Layer]) -> _Layer | None:
    """What `layer` extends, not yet read; one of its own name is looked for further on."""
    name = layer.top.get("extends")
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        return None
    try:
        if parent := library.found(name, seen):
            parent.problems = layer.problems
            return parent
        circle = library.found(name) is not None
    except PolicyError as error:
        layer.problems.extend(error.problems)
        return None
    if circle or name in [one.name for one in seen]:
        layer.wrong(("extends",), f"the policy extends {name!r} in a circle", "remove one `extends` of the circle")
    else:
        layer.wrong(("extends",), f"there is no policy {name!r} to extend", _offer(name, library.names()))
    return None


def _read(layer: _Layer) -> None:
    """Reads the source of `layer` into tables, noting every problem; its rules are read with those they change."""
    if not _parsed(layer):
        return
    layer.read(PolicyTable, layer.top, (), "the policy")
    _read_parts(layer)
    for name, raw in _named(layer.top.get("routes")):
        if route := layer.read(RouteTable, raw, ("routes", name), f"route {name!r}"):
            layer.routes[name] = route
    for number, raw in _tables(layer.top.get("example")):
        if shown := layer.read(ExampleTable, raw, ("example", number), "the example"):
            _read_example(layer, ("example", number), shown)


def _parsed(layer: _Layer) -> bool:
    """True when the source is TOML; it is then in `top`, and the lines of its keys in `places`."""
    line, what, advice = 1, "", "correct this line"
    try:
        layer.source.encode()
        if len(layer.source) > LONGEST_FILE:
            what, advice = f"the file has more than {LONGEST_FILE:,} characters", "divide it: extend another policy"
        elif long := LONG_KEY.search(layer.source):
            line = layer.source.count("\n", 0, long.start()) + 1
            what, advice = "a key has more than 50 parts", "write tables less nested"
        else:
            layer.top = tomllib.loads(layer.source)
            layer.places = lines.lines(layer.source)
    except UnicodeEncodeError as error:
        line = layer.source.count("\n", 0, error.start) + 1
        what, advice = "half of a surrogate pair is no character", "save the text as UTF-8"
    except ValueError as error:  # the TOMLDecodeError, and numbers that are too long for Python
        place = re.search(r"(.*) \(at line (\d+), column (\d+)\)$", str(error))
        line = int(place[2]) if place else layer.source.count("\n") + 1
        what = f"not valid TOML: {f'{place[1]} at column {place[3]}' if place else str(error)}"
    except RecursionError:
        what, advice = "brackets are nested too deep", "write lists and tables less nested"
    if what:
        layer.top, layer.places = {}, {}
        layer.problems.append(Problem(layer.file, line, what, advice))
    return not what


def _read_parts(layer: _Layer) -> None:
    """Reads the parts of patterns; each may be made of those above it. A list is a choice of its items."""
    parts = layer.top.get("parts")
    for name, raw in parts.items() if isinstance(parts, dict) else ():
        items = [item for item in (raw if isinstance(raw, list) else [raw]) if isinstance(item, str)]
        if not re.fullmatch(r"[a-z_]{2,}", name):
            layer.wrong(("parts", name), f"a part has the name {name!r}", "use two or more small letters")
        filled = [layer.filled(("parts", name, n), item) for n, item in enumerate(items)]
        layer.parts[name] = f"(?:{'|'.join(filled)})"


def _read_example(layer: _Layer, path: lines.Path, shown: ExampleTable) -> None:
    """Notes an example, unless its text would fill the memory."""
    said = shown.ask or shown.answer or (shown.turns[-1].content if shown.turns else "")
    if len(said) * shown.times > LONGEST_EXAMPLE:
        what = f"the example has more than {LONGEST_EXAMPLE:,} characters"
        layer.wrong((*path, "times"), what, "repeat it fewer times")
    else:
        layer.examples.append((path, shown))


def _tables(raw: object) -> Iterable[tuple[int, dict[str, Any]]]:
    """The tables of a list, with their numbers; what is not a table was complained about with the whole."""
    return [(n, one) for n, one in enumerate(raw) if isinstance(one, dict)] if isinstance(raw, list) else []


def _named(raw: object) -> Iterable[tuple[str, dict[str, Any]]]:
    """The tables of a table, with their names."""
    return [(name, one) for name, one in raw.items() if isinstance(one, dict)] if isinstance(raw, dict) else []


# --- reading the rules


def _rules(layers: Sequence[_Layer]) -> tuple[list[_RuleRead], dict[str, int]]:
    """(the rules of all layers in their order, which layer took away which rule)."""
    rules: dict[str, _RuleRead] = {}
    removed: dict[str, int] = {}
    for age, layer in enumerate(layers):
        for name in _removed(layer, rules, age):
            del rules[name]
            removed[name] = age
        unnamed = 0
        for stage in STAGES:
            for number, raw in _tables(layer.top.get(stage)):
                rule = _read_rule(layer, stage, (stage, number), raw, rules, age)
                unnamed += not rule.name
                rules[rule.name or f"{age}.{unnamed}"] = rule
    return list(rules.values()), removed


def _removed(layer: _Layer, rules: Mapping[str, _RuleRead], age: int) -> list[str]:
    """The rules that this layer takes away from those before it."""
    found: list[str] = []
    raw = layer.top.get("remove")
    for number, name in enumerate(raw if isinstance(raw, list) else ()):
        if not isinstance(name, str) or name in found:
            continue
        rule, path = rules.get(name), ("remove", number)
        if rule is None:
            which = f"rule {name!r}, which no policy that it extends has"
            layer.wrong(path, f"the policy removes {which}", _offer(name, list(rules), "remove this line"))
        elif rule.lock:
            what = f"rule {name!r} is locked ({rule.lock}) and cannot be removed"
            layer.wrong(path, what, "leave it, or make it stricter")
        else:
            found.append(name)
    return found


def _read_rule(
    layer: _Layer,
    stage: Stage,
    path: lines.Path,
    raw: Mapping[str, Any],
    rules: Mapping[str, _RuleRead],
    age: int,
) -> _RuleRead:
    """A rule of this layer: a new one, or one of an earlier layer with this layer's changes."""
    name = str(raw.get("name", ""))
    before = rules.get(name)
    spot = _Spot(((layer, path),))
    own = _filled(layer, path, raw)
    if before and before.age == age:
        what = f"rule {name!r} has the name of another rule ({before.spot.place})"
        spot.wrong(("name",), what, "give it a name of its own")
        _built_rule(_RuleRead(name, stage, spot, own, age))  # for its other mistakes
        return before
    if before is None:
        if age and "validator" not in raw and len(layer.problems) < MOST_MISTAKES:
            what = f"rule {name!r} has no 'validator', and no policy that is extended has a rule of this name"
            parents = [other for other, rule in rules.items() if rule.age < age]
            near = difflib.get_close_matches(name[:100], parents, 1)
            spot.wrong(("name",), what, f"did you mean {near[0]!r}?" if near else 'add validator = "..."')
            return _RuleRead(name, stage, spot, own, age)
        return _locked(_built_rule(_RuleRead(name, stage, spot, own, age)))
    validator = before.raw.get("validator")
    if before.stage != stage:
        what = f"rule {name!r} is an {before.stage} rule ({before.spot.place})"
        spot.wrong(("name",), what, f"write [[{before.stage}]], or give it a name of its own")
        return before
    if own.get("validator", validator) != validator:
        what = f"rule {name!r} is a rule of validator {validator!r} ({before.spot.place})"
        spot.wrong(("validator",), what, "give the other rule a name of its own; `remove` takes this one away")
        return before
    merged = {**before.raw, **own}
    changed = replace(before, spot=_Spot((*before.spot.written, (layer, path))), raw=merged, age=age)
    changed = _built_rule(_without_unread(changed, own))
    if before.lock:
        _check_lock(before, changed)
    return _locked(changed)


def _filled(layer: _Layer, path: lines.Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """A rule's keys, with the parts in its patterns filled in; they are those of its own file."""
    filled = dict(raw)
    if isinstance(patterns := raw.get("patterns"), list):
        filled["patterns"] = [
            layer.filled((*path, "patterns", n), one) if isinstance(one, str) else one for n, one in enumerate(patterns)
        ]
    if isinstance(confirm := raw.get("confirm"), dict):
        filled["confirm"] = _filled(layer, (*path, "confirm"), confirm)
    return filled


def _without_unread(rule: _RuleRead, own: Mapping[str, Any]) -> _RuleRead:
    """The rule without what only its former action used: a child that refuses need not undo a placeholder."""
    unread = {
        "placeholder": rule.raw.get("action") != "redact",
        "vault": rule.raw.get("action") != "redact",
        "reply": rule.raw.get("action") not in REPLIES,
        "route": "escalate" not in (rule.raw.get("action"), rule.raw.get("if_broken")),
    }
    kept = {key: value for key, value in rule.raw.items() if key in own or not unread.get(key)}
    return replace(rule, raw=kept)


def _built_rule(rule: _RuleRead) -> _RuleRead:
    """The rule with its table and validators, as far as they can be read."""
    whose = f"rule {rule.raw.get('name', '')!r}"
    own = {key: rule.raw[key] for key in rule.raw if key in RuleTable.model_fields}
    table = rule.spot.read(RuleTable, own, whose)
    built = _built(rule.spot, whose, rule.raw, tuple(RuleTable.model_fields))
    second, confirm = rule.raw.get("confirm"), None
    if isinstance(second, dict):
        confirm = _built(rule.spot.inner("confirm"), f"{whose}, confirm", second, ("validator",))
        built = built if confirm else None
    return replace(rule, table=table, built=built, confirm=confirm)


def _locked(rule: _RuleRead) -> _RuleRead:
    """The rule, which is locked from now on if it says so; `lock` is the place where that is said first."""
    if rule.lock or rule.raw.get("locked") is not True:
        return rule
    layer, path = rule.spot.written[-1]
    return replace(rule, lock=f"{layer.file}:{lines.nearest(layer.places, (*path, 'locked'))}")


def _check_lock(before: _RuleRead, after: _RuleRead) -> None:
    """Notes every change of a locked rule that does not make it stricter, in the layer that changes it."""
    old, new = before.written, after.written
    layer, path = after.spot.written[-1]
    for change in changes(old, new) if old and new else ():
        if change.way in ("looser", "other"):
            was = "reaches less far back than before" if change.before == change.after else _is_not(change.before)
            what = f"rule {after.name!r} is locked ({before.lock}): {change.key} = {_said(change.after)} {was}"
            layer.wrong((*path, change.key), what, f"allowed is {change.allowed}")


def _is_not(before: object) -> str:
    return "is not stricter than none" if before is None else f"is not stricter than {_said(before)}"


def _said(value: object) -> str:
    """A value as TOML would say it, cut where it is long."""
    said = json.dumps(value, ensure_ascii=False, default=str)
    return said if len(said) <= 60 else f"{said[:57]}..."


def _built(spot: _Spot, whose: str, raw: Mapping[str, Any], own: Sequence[str]) -> _Built | None:
    """The validator that a table names, of all its keys but `own`; None with the problems noted."""
    name = raw.get("validator")
    if not isinstance(name, str):
        if own == ("validator",):  # of a rule's own table this was noted with the rest
            spot.wrong(("validator",), f"{whose} has no 'validator'", 'add validator = "..."')
        return None
    model = _options(spot, whose, name)
    if model is None:
        return None
    given = {key: raw[key] for key in raw if key not in own}
    unknown = {key: True for key in given if key not in model.model_fields}
    for key in list(unknown)[:MOST_MISTAKES]:
        spot.wrong((key,), f"{whose} has an unknown key {key!r}", _offer(key, [*own, *model.model_fields]))
    options = spot.read(model, {key: given[key] for key in given if key not in unknown}, whose)
    if options is None:
        return None
    try:
        return _Built(name, options.model_dump(mode="json", exclude_defaults=True), catalog.build(name, options))
    except ValueError:
        for place, what in _culprits(name, options):
            spot.wrong(place, f"{whose}: {what}", "correct this value")
        return None


def _options(spot: _Spot, whose: str, name: str) -> type[BaseModel] | None:
    """The model of what can be set for validator `name`, or None with the problem noted."""
    try:
        if name in (names := catalog.names()):
            return catalog.options(name)
        spot.wrong(("validator",), f"{whose} has an unknown validator {name!r}", _offer(name, names))
    except ValueError as error:
        spot.wrong(("validator",), f"{whose}: {error}", "repair that package or use another validator")
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


# --- what does not fit together


def _check(layers: Sequence[_Layer], rules: Sequence[_RuleRead], examples: Sequence[_Shown]) -> None:
    """Notes what does not fit together. Routes and rules with mistakes of their own count as written here."""
    routes = [name for layer in layers for name, _ in _named(layer.top.get("routes"))]
    for rule in rules:
        if rule.table and rule.built:
            _check_rule(rule, rule.table, rule.built.validator, routes)
    stages = {rule.name: rule.stage for rule in rules}
    for example in examples:
        _check_example(*example, stages)


def _check_rule(rule: _RuleRead, table: RuleTable, validator: Validator, routes: Sequence[str]) -> None:
    """Notes what a rule lacks for its action, and what it says that nobody would read."""
    action = table.action
    replies = action in REPLIES
    if replies and not table.reply.strip():
        key = "reply" if rule.spot.age("reply") > rule.spot.age("action") else "action"
        rule.wrong(key, f"has no reply, but its action is {action!r}", 'add reply = "..." with what to say')
    if action == "redact" and table.validator in WHOLE_TEXT:
        what = f"cannot redact: {table.validator!r} judges a text as a whole"
        rule.wrong("action", what, "refuse instead, or use a validator that finds places")
    routed = "escalate" in (action, table.if_broken)
    if routed and table.route not in routes:
        what = f"has an unknown route {table.route!r}" if table.route else "has no route to escalate to"
        rule.wrong("route", what, _offer(table.route, routes, 'add a table [routes.NAME] and route = "NAME"'))
    by_action = f"is not used by action {action!r}"
    unread = {
        "reply": not replies and table.reply and by_action,
        "placeholder": action != "redact" and table.placeholder and by_action,
        "route": not routed and table.route and by_action,
        "vault": action != "redact" and table.vault and by_action,
        "sure": table.confirm is None and "sure" in table.model_fields_set and "is for rules with `confirm`",
        "every": table.every != "text"
        and table.confirm is None
        and isinstance(validator, StreamValidator)
        and f"{table.validator!r} does not need: it reads a text as it grows",
    }
    if rule.stage == "output":
        unread |= {key: key in table.model_fields_set and "is for input rules" for key in INPUT_ONLY}
    for key, why in unread.items():
        if why:
            rule.wrong(key, f"says {key!r}, which {why}", "remove it")


def _stage(shown: ExampleTable) -> Stage:
    """An example that is answered is judged by the output rules, any other by the input rules."""
    return "output" if shown.answer else "input"


def _before(shown: ExampleTable) -> tuple[tuple[str, str], ...]:
    """The conversation of an example: the same text after another one is another example."""
    return (*((turn.role, turn.content) for turn in shown.turns), *(("", text) for text in shown.documents))


def _shown(layers: Sequence[_Layer], rules: Sequence[_RuleRead], removed: Mapping[str, int]) -> Iterable[_Shown]:
    """The examples that hold, the eldest layer's first; the place of each is kept beside it.

    What an elder layer says of a rule that was taken away since does not hold, and of a rule that was changed since
    the new action is expected.
    """
    touched = {rule.name: rule for rule in rules}
    for age, layer in enumerate(layers):
        for path, shown in layer.examples:
            rule = touched.get(shown.rule)
            if rule and rule.table and rule.age > age and removed.get(rule.name, -1) <= age:
                yield layer, path, _adapted(shown, rule, rule.table)
            elif removed.get(shown.rule, -1) <= age:
                yield layer, path, shown


def _adapted(shown: ExampleTable, rule: _RuleRead, table: RuleTable) -> ExampleTable:
    """An example of a parent that names a rule, as it is after a change of the rule."""
    changed: dict[str, object] = {"expect": table.action}
    if table.action == "allow":
        changed["rule"] = ""
    said_anew = any(rule.spot.age(key) > 1 for key in ("placeholder", "reply", "vault"))
    if table.action != shown.expect or said_anew:
        changed["becomes"] = ""
    return shown.model_copy(update=changed)


def _check_example(layer: _Layer, path: lines.Path, shown: ExampleTable, stages: Mapping[str, Stage]) -> None:
    """Notes what makes an example unclear."""
    if (bool(shown.ask) + bool(shown.answer) != 1) and (shown.ask or not shown.turns):
        what = "an example says what is asked or what is answered"
        layer.wrong(path, what, "write either `ask` or `answer`, or `turns` alone")
    elif shown.rule and stages.get(shown.rule) != _stage(shown):
        names = [name for name, stage in stages.items() if stage == _stage(shown)]
        what = f"the example names {shown.rule!r}, which is not an {_stage(shown)} rule"
        layer.wrong((*path, "rule"), what, _offer(shown.rule, names))
    if shown.rule and shown.expect == "allow":
        layer.wrong((*path, "rule"), "an example that is allowed names a rule", "remove `rule`: no rule decides")
    changed = ("redact", "append") if shown.answer else ("redact",)
    if shown.becomes and shown.expect not in changed:
        layer.wrong((*path, "becomes"), f"{shown.expect!r} does not change this text", "remove `becomes`")


def _example(layer: _Layer, path: lines.Path, shown: ExampleTable) -> Example:
    """The example as the check knows it."""
    alone = not shown.ask and not shown.answer
    before = shown.turns[:-1] if alone else shown.turns
    return Example(
        stage=_stage(shown),
        text=shown.text,
        expect=Action[shown.expect.upper()],
        rule=shown.rule,
        becomes=shown.becomes,
        line=lines.nearest(layer.places, path),
        file=layer.file,
        role=shown.turns[-1].role if alone else "user",
        turns=tuple(Message(turn.role, turn.content) for turn in before),
        documents=tuple(shown.documents),
    )


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
    near = difflib.get_close_matches(wrong[:100], names, 1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"there are {', '.join(names)}" if names else none
