"""What two policies say differently: rule by rule, and which of them is the stricter."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from guardrails.changes import Change, Way, WrittenRule, changes
from guardrails.policy import Resolved
from guardrails.types import Example, Route

T = TypeVar("T")
Kind = Literal["added", "removed", "changed", "moved"]
SHOWN = 100
"""Characters of a value that are shown."""


@dataclass(frozen=True, slots=True)
class RuleDiff:
    """A rule that is not the same in both; `way` is that of all its changes together."""

    rule: str
    stage: str
    kind: Kind
    way: Way
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True, slots=True)
class Listing:
    """Things that have names: those that only one side has, and those that differ (name, before, after)."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[tuple[str, str, str], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)


@dataclass(frozen=True, slots=True)
class Diff:
    """What the policy `after` says differently from `before`; both are `name@version`."""

    before: str
    after: str
    rules: tuple[RuleDiff, ...]
    routes: Listing
    examples: Listing
    texts: Mapping[str, tuple[str, str]]

    @property
    def same(self) -> bool:
        """True when the two say the same."""
        return not (self.rules or self.routes or self.examples or self.texts)


def diff(before: Resolved, after: Resolved) -> Diff:
    """What `after` says differently from `before`."""
    old, new = before.policy, after.policy
    texts = {key: (getattr(old, key), getattr(new, key)) for key in ("description", "persona")}
    return Diff(
        before=old.id,
        after=new.id,
        rules=tuple(_rules(before.rules, after.rules)),
        routes=_named(old.routes, new.routes, _route),
        examples=_named(_examples(old.examples), _examples(new.examples), _expected),
        texts={key: pair for key, pair in texts.items() if pair[0] != pair[1]},
    )


def _rules(before: Sequence[WrittenRule], after: Sequence[WrittenRule]) -> list[RuleDiff]:
    """The rules that are not the same: removed, then added and changed in the order of `after`."""
    old, new = ({rule.table.name: rule for rule in rules} for rules in (before, after))
    found = [_whole(rule, "removed") for name, rule in old.items() if name not in new]
    for name, rule in new.items():
        was = old.get(name)
        if was is None:
            found.append(_whole(rule, "added"))
        elif was.stage != rule.stage or was.table.validator != rule.table.validator:
            found += [_whole(was, "removed"), _whole(rule, "added")]
        elif what := changes(was, rule):
            found.append(RuleDiff(name, rule.stage, "changed", _way(what), tuple(what)))
    both = [name for name in old if name in new]
    if both != [name for name in new if name in old]:
        found += [RuleDiff(name, new[name].stage, "moved", "other") for name in _moved(both, list(new))]
    return found


def _moved(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """The rules that stand behind another one than before."""
    kept = [name for name in after if name in before]
    ahead = dict(zip(before[1:], before, strict=False))
    return [name for name, other in zip(kept[1:], kept, strict=False) if ahead.get(name) != other]


def _whole(rule: WrittenRule, kind: Kind) -> RuleDiff:
    """A rule that only one side has: a guard more or less, unless it decides nothing."""
    idle = rule.table.mode == "shadow" or rule.table.action == "allow"
    way: Way = "wording" if idle else "stricter" if kind == "added" else "looser"
    return RuleDiff(rule.table.name, rule.stage, kind, way)


def _way(found: Sequence[Change]) -> Way:
    """The way of several changes together: `other` when they go both ways."""
    ways = {change.way for change in found} - {"wording"}
    return ways.pop() if len(ways) == 1 else "other" if ways else "wording"


def _named(before: Mapping[str, T], after: Mapping[str, T], said: Callable[[T], str]) -> Listing:
    """What only one side has, and what differs, in words."""
    return Listing(
        added=tuple(name for name in after if name not in before),
        removed=tuple(name for name in before if name not in after),
        changed=tuple(
            (name, said(before[name]), said(after[name]))
            for name in after
            if name in before and said(before[name]) != said(after[name])
        ),
    )


def _route(route: Route) -> str:
    return f"{route.queue}, {route.priority}, within {route.due:g} s"


def _examples(examples: Sequence[Example]) -> dict[str, Example]:
    """The examples by what is said in them."""
    found: dict[str, Example] = {}
    for example in examples:
        before = "".join(f"{turn.role}: {turn.content} / " for turn in example.turns)
        key = f"{'answer' if example.stage == 'output' else 'ask'}: {before}{example.text}"
        found[key + "".join(f" [{text}]" for text in example.documents)] = example
    return found


def _expected(example: Example) -> str:
    by = f" by {example.rule}" if example.rule else ""
    return f"{example.expect.word}{by}{f' to {example.becomes!r}' if example.becomes else ''}"


def render(found: Diff) -> str:
    """The difference for people: one line a rule, its changed keys below it."""
    if found.same:
        return f"{found.before} and {found.after} say the same"
    lines = [f"from {found.before} to {found.after}"]
    for rule in found.rules:
        way = {"wording": "", "other": "" if rule.kind == "moved" else ", may be stricter or looser"}
        told = way.get(rule.way, f", {rule.way}")
        lines.append(f"{rule.stage} rule {rule.rule}: {rule.kind}{told}")
        lines += [line for change in rule.changes for line in _told(change)]
    for key, (old, new) in found.texts.items():
        lines += [f"{key}:", *_pair(old, new)]
    for kind, same in (("route", found.routes), ("example", found.examples)):
        lines += [f"{kind} removed: {_cut(name)}" for name in same.removed]
        lines += [f"{kind} added: {_cut(name)}" for name in same.added]
        lines += [f"{kind} changed: {_cut(name)}: {old} -> {new}" for name, old, new in same.changed]
    return "\n".join(lines)


def _told(change: Change) -> list[str]:
    """The lines for one key; of a list only what was taken out and put in."""
    mark = {"stricter": " (stricter)", "looser": " (looser)"}.get(change.way, "")
    old, new = change.before, change.after
    if isinstance(old, list) and isinstance(new, list):
        out = [f"    - {_cut(_toml(one))}" for one in old if one not in new]
        into = [f"    + {_cut(_toml(one))}" for one in new if one not in old]
        return [f"  {change.key}:{mark}", *(out + into or ["    in another order"])]
    if change.key in ("reply", "placeholder"):
        return [f"  {change.key}:{mark}", *_pair(old, new)]
    return [f"  {change.key}: {_cut(_toml(old))} -> {_cut(_toml(new))}{mark}"]


def _pair(old: str, new: str) -> list[str]:
    """Two texts, one below the other."""
    return [f"    {sign} {_cut(text)}" for sign, text in (("-", old), ("+", new)) if text]


def _toml(value: Any) -> str:
    return "(not set)" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 1]}…"


def as_json(found: Diff) -> dict[str, object]:
    """The difference as plain values, for programs."""
    keys = ("key", "before", "after", "way")
    rules = [
        {"rule": one.rule, "stage": one.stage, "kind": one.kind, "way": one.way}
        | {"changes": [{key: getattr(change, key) for key in keys} for change in one.changes]}
        for one in found.rules
    ]
    return {"same": found.same} | asdict(found) | {"rules": rules}
