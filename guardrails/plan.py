"""What is made once for some rules and serves every text: their patterns as one, and who reads when.

All that is told of a text by one pass is told for all rules whose validators are patterns (`guardrails.spans.Spans`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeGuard

from guardrails.spans import Spans
from guardrails.types import Policy, Rule, StreamValidator, Validator
from guardrails.views import View

MOST = 256
"""Plans that are kept."""


def streams(validator: Validator) -> TypeGuard[StreamValidator]:
    """True for a validator that can read a growing text (`isinstance` with a protocol is slow)."""
    return hasattr(validator, "readings")


def whole(rule: Rule) -> bool:
    """True for a rule that cannot read a growing text by itself."""
    return rule.confirm is not None or not streams(rule.validator)


def tier(rule: Rule) -> int:
    """-1: looks at the length; 0: reads the text alone; 1: asks a model of its own; 2: asks a language model."""
    if rule.confirm is not None:
        return 2
    return int(getattr(rule.validator, "tier", 0 if streams(rule.validator) else 1))


def looks_at(rule: Rule, view: View) -> bool:
    """True where a rule reads this view: it may be for the text alone, its validator for some views only."""
    only = getattr(rule.validator, "views", None)
    return rule.views and (only is None or view.name in only)


def clearing(rule: Rule) -> Callable[[str], bool] | None:
    """What tells, before a text is read, that a rule would find nothing in it; for a rule that reads the text alone."""
    clears: Callable[[str], bool] | None = getattr(rule.validator, "clears", None)
    return clears if not rule.views or getattr(rule.validator, "views", None) == () else None


EVERYWHERE = ("content", "reasoning", "arguments")


def reads(rule: Rule) -> Collection[str]:
    """What a rule reads of a reply: `content`, `reasoning`, `arguments`; or `call`, a tool call as a whole."""
    channels: Collection[str] = getattr(rule.validator, "channels", EVERYWHERE)
    return channels


def is_joined(rule: Rule) -> bool:
    """True for a rule that reads by patterns and nothing else."""
    validator = rule.validator
    if not isinstance(validator, Spans):
        return False
    kind = type(validator)
    return kind.find is Spans.find and kind.readings is Spans.readings


class Joint:
    """The patterns of several rules as one validator. rules: by place; owners: the place of the rule of each span;
    budget: the shortest of the rules, in seconds. enforced, viewed: whether the first of them decides, and reads views:
    those that are read together in a growing text are alike in both."""

    __slots__ = ("_within", "budget", "enforced", "owners", "rules", "spans", "viewed")

    def __init__(self, rules: Iterable[tuple[int, Rule]]):
        self.rules = dict(rules)
        each = [(place, rule.validator) for place, rule in self.rules.items() if isinstance(rule.validator, Spans)]
        self.owners = [place for place, validator in each for _ in validator.spans]
        self.spans = (
            each[0][1] if len(each) == 1 else Spans([span for _, validator in each for span in validator.spans])
        )
        self.budget = min(rule.budget for rule in self.rules.values())
        first = next(iter(self.rules.values()))
        self.enforced, self.viewed = first.mode == "enforce", first.views
        self._within: dict[str, Joint | None] = {}

    def within(self, view: View) -> Joint | None:
        """The part that reads this view, if any does."""
        try:
            return self._within[view.name]
        except KeyError:
            looking = {place: rule for place, rule in self.rules.items() if looks_at(rule, view)}
            part = self if len(looking) == len(self.rules) else Joint(looking.items()) if looking else None
            self._within[view.name] = part
            return part

    def candidates(self, text: str) -> set[int]:
        """The places of the rules that may find something in a whole text; no other one does."""
        return {self.owners[number] for number in self.spans.prefilter.candidates(text)}


class Plan:
    """Some rules, sorted by how they read. joints: those whose patterns are read together in a growing text; single:
    the others that read it; sentences, whole: those that are asked about sentences, about all of it (all by place).
    patterns: all rules that read by patterns alone, or None. by_cost: the rules, the cheap ones first, then those that
    ask a model of their own, then those that ask a language model. places: by the id of a rule. clears: by place, what
    `clearing` returns. others: whether some rule reads what the views do not show yet."""

    __slots__ = (
        "_channels",
        "asking",
        "asking_much",
        "by_cost",
        "cheap",
        "clears",
        "held",
        "joints",
        "others",
        "patterns",
        "places",
        "rules",
        "sentences",
        "single",
        "viewed",
        "whole",
    )  # fmt: skip

    def __init__(self, rules: Sequence[Rule]):
        self.rules = tuple(rules)
        self.places = {id(rule): place for place, rule in enumerate(rules)}
        self.clears = {place: told for place, rule in enumerate(rules) if (told := clearing(rule))}
        self.by_cost = sorted(rules, key=tier)
        self.cheap = [rule for rule in self.by_cost if tier(rule) <= 0]
        self.asking = [rule for rule in self.by_cost if tier(rule) == 1]
        self.asking_much = [rule for rule in self.by_cost if tier(rule) > 1]
        places = range(len(rules))
        asked = [i for i in places if whole(rules[i])]
        self.sentences = [i for i in asked if rules[i].every == "sentence"]
        self.whole = [i for i in asked if rules[i].every == "text"]
        self.held = any(rules[i].mode == "enforce" for i in self.whole)
        growing = [i for i in places if i not in asked]
        self.viewed = any(rules[i].views for i in growing)
        joined = [i for i in growing if is_joined(rules[i])]
        self.single = [i for i in growing if i not in joined]
        self.others = bool(self.single) or not all(rules[i].views for i in joined)
        groups: dict[tuple[str, bool], list[tuple[int, Rule]]] = {}
        for i in joined:
            groups.setdefault((rules[i].mode, rules[i].views), []).append((i, rules[i]))
        self.joints = [Joint(group) for group in groups.values()]
        self._channels: dict[str, tuple[Rule, ...]] = {}
        together = [(i, rules[i]) for i in joined]
        self.patterns = self.joints[0] if len(self.joints) == 1 else Joint(together) if together else None

    def of_channel(self, channel: str) -> tuple[Rule, ...]:
        """The rules that read a channel of a reply."""
        if channel not in self._channels:
            self._channels[channel] = tuple(rule for rule in self.rules if channel in reads(rule))
        return self._channels[channel]


_PLANS: OrderedDict[tuple[int, ...], Plan] = OrderedDict()


def plan_of(rules: Sequence[Rule]) -> Plan:
    """The plan for these rules, made once for the same objects in the same order."""
    key = tuple(map(id, rules))
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS[key] = Plan(rules)  # which holds the rules, so that their ids stay theirs
        if len(_PLANS) > MOST:
            _PLANS.popitem(last=False)
    return plan


def prepare(policy: Policy) -> None:
    """Makes all that the first text of a policy would wait for (some 0.1 s for the shipped ones)."""
    for rules in (policy.input, policy.output):
        plan_of(rules)
    for channel in EVERYWHERE:
        plan = plan_of(plan_of(policy.output).of_channel(channel))
        for joint in plan.joints:
            joint.spans.parts.candidates("")
            joint.spans.begun.first("", 0, 0)
            joint.spans.begun.alive("", 0, 0)
