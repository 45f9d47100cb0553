"""What two versions of a rule say differently, and which is the stricter: for locks, and for `newel diff`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from guardrails.schema import RuleTable
from guardrails.types import Action, Stage

Way = Literal["stricter", "looser", "other", "wording"]
"""How a change of one key changes a rule; `other` may be either, `wording` is neither."""

WIDER = {
    "last_user": ("user", "all"),
    "user": ("all",),
    "assistant": ("all",),
    "tool": ("all",),
    "all": (),
}
"""The scopes that read all that a scope reads, and more."""

WORDING = ("reply", "placeholder", "route")
UNSET = object()


@dataclass(frozen=True, slots=True)
class WrittenRule:
    """A rule as its policy and the parents of that say it: its keys, its validator's options, its `confirm`."""

    stage: Stage
    table: RuleTable
    options: Mapping[str, Any]
    confirm: tuple[str, Mapping[str, Any]] | None = None

    @property
    def content(self) -> list[object]:
        """All that the rule says, as plain values; what is a default is not said."""
        keys = self.table.model_dump(mode="json", exclude={"confirm"}, exclude_defaults=True)
        return [self.stage, keys, self.options, self.confirm]


@dataclass(frozen=True, slots=True)
class Change:
    """One key that says something else; None stands for a key that is not there. `allowed` is for a locked rule."""

    key: str
    before: Any
    after: Any
    way: Way
    allowed: str = ""


def changes(before: WrittenRule, after: WrittenRule) -> list[Change]:
    """What `after` says differently from `before`, key by key, in the order of the tables."""
    found = [_change(key, before.table, after.table) for key in RuleTable.model_fields]
    said = {**before.options, **after.options}
    found += [
        Change(key, before.options.get(key), after.options.get(key), "other", "the validator's options as they are")
        for key in said
        if before.options.get(key, UNSET) != after.options.get(key, UNSET)
    ]
    if before.confirm != after.confirm:
        way: Way = "looser" if before.confirm is None else "stricter" if after.confirm is None else "other"
        found.append(Change("confirm", before.confirm, after.confirm, way, _CONFIRM))
    return [one for one in found if one]


_CONFIRM = "no `confirm` but the one that is there; `sure` may be lower"


def _change(key: str, before: RuleTable, after: RuleTable) -> Change | None:
    """How this key changed, or None when it did not."""
    old, new = getattr(before, key), getattr(after, key)
    if key == "confirm" or (old == new and not (key == "window" and _narrowed(before, after))):
        return None
    way, allowed = _judged(key, before, after)
    return Change(key, old, new, way, allowed)


def _judged(key: str, before: RuleTable, after: RuleTable) -> tuple[Way, str]:
    """(which way the change of this key goes, what a lock allows)."""
    old, new = getattr(before, key), getattr(after, key)
    match key:
        case "action" | "if_broken":
            words = [word for word in _words(key) if Action[word.upper()] >= Action[old.upper()]]
            return ("stricter" if new in words else "looser"), _or(words)
        case "threshold" | "sure":
            return ("stricter" if new < old else "looser"), f"{old} or lower"
        case "mode" | "views" | "locked" | "vault":
            strict = {"mode": "enforce", "views": True, "locked": True, "vault": False}[key]
            return ("stricter" if new == strict else "looser"), _toml(strict)
        case "scope":
            wider = WIDER[old]
            return ("stricter" if new in wider else "looser" if old in WIDER[new] else "other"), _or([old, *wider])
        case "window":
            return ("looser" if _narrowed(before, after) else "stricter"), _window(before, after)
        case "budget":
            # Where a late validator lets the text through, less time guards less.
            short = new < old and after.if_broken == "allow"
            return ("looser" if short else "wording"), f"{old} or more, since if_broken is 'allow'"
    return ("wording", "any") if key in WORDING else ("other", _toml(old))


def _narrowed(before: RuleTable, after: RuleTable) -> bool:
    """True when the window may leave out a message that was read before.

    A window counts the messages of its scope: of a wider scope the same window reaches less far back.
    """
    if after.window == 0 or (before.scope == "last_user" and after.scope in ("last_user", "user")):
        return False
    return after.scope != before.scope or before.window == 0 or after.window < before.window


def _window(before: RuleTable, after: RuleTable) -> str:
    if before.window == 0 or after.scope != before.scope:
        return "0, which is all of them"
    return f"{before.window} or more, or 0 for all"


def _words(key: str) -> list[str]:
    return ["allow", "refuse", "escalate"] if key == "if_broken" else [action.word for action in Action]


def _or(words: list[str]) -> str:
    return " or ".join(map(repr, words))


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
