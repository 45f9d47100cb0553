"""What a policy would have made of exchanges that another one judged: what it newly blocks, allows, hides and shows."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from guardrails.check import Rate, without_models
from guardrails.conversation import judge_messages
from guardrails.engine import judge
from guardrails.types import Action, Context, Grader, Hit, Judge, Message, Policy, Verdict

Kind = Literal["blocked", "allowed", "redacted", "unredacted", "changed", "same"]
MEANING: dict[Kind, str] = {
    "blocked": "newly blocked",
    "allowed": "newly allowed",
    "redacted": "newly redacted",
    "unredacted": "no longer redacted",
    "changed": "decided otherwise",
}
TOGETHER = 8
"""How many exchanges are judged at a time, so that a model that is asked is not asked one question at a time."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """Which characters of the last message and of the draft were redacted."""

    asked: frozenset[int] = frozenset()
    draft: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Exchange:
    """What was said, raw, and what was decided then.

    The first `trusted` messages were judged in turns before. draft: what the model wrote, None when it was not asked.
    """

    id: str
    messages: tuple[Message, ...]
    trusted: int
    draft: str | None
    action: Action
    rule: str
    hidden: Hidden = field(default_factory=Hidden)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was decided, and what the candidate decides; `unasked`: what the model would have written is not known."""

    exchange: Exchange
    kind: Kind
    action: Action
    rule: str
    unasked: bool = False

    @property
    def id(self) -> str:
        """The turn's."""
        return self.exchange.id


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a candidate makes of the exchanges; `unchecked` rules ask a model and there was none.

    left_out: the ids of exchanges that such a rule decided, which therefore cannot be compared.
    """

    policy: str
    outcomes: tuple[Outcome, ...]
    unchecked: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def of(self, kind: Kind) -> list[Outcome]:
        """The outcomes of one kind."""
        return [one for one in self.outcomes if one.kind == kind]

    def rate(self, kind: Kind) -> Rate:
        """How many of those that it could have happened to: only what was blocked can be newly allowed."""
        before = [one.exchange for one in self.outcomes]
        could = {
            "blocked": [one for one in before if not one.action.stops],
            "allowed": [one for one in before if one.action.stops],
            "redacted": [one for one in before if not one.action.stops],
            "unredacted": [one for one in before if one.hidden != Hidden()],
        }
        return Rate(len(self.of(kind)), len(could.get(kind, before)))

    @property
    def laxer(self) -> bool:
        """True when something is let through that was not."""
        return bool(self.of("allowed") or self.of("unredacted"))


async def replay(
    policy: Policy,
    exchanges: Iterable[Exchange],
    grader: Grader | None = None,
    judges: Mapping[str, Judge] | None = None,
) -> Replayed:
    """What `policy` makes of the exchanges, in their order. Rules that ask a model are left out where there is none."""
    unchecked = await without_models(policy, grader, judges)
    input, output = ([r for r in rules if r.name not in unchecked] for rules in (policy.input, policy.output))
    asked = replace(policy, input=tuple(input), output=tuple(output))
    turns = list(exchanges)
    compared = [one for one in turns if one.rule not in unchecked]
    gate = asyncio.Semaphore(TOGETHER)

    async def judged(one: Exchange) -> Outcome:
        async with gate:
            return await _judged(asked, one, Context(one.messages, grader, policy.persona, judges or {}))

    outcomes = await asyncio.gather(*map(judged, compared))
    return Replayed(policy.id, tuple(outcomes), unchecked, tuple(one.id for one in turns if one.rule in unchecked))


async def _judged(policy: Policy, one: Exchange, context: Context) -> Outcome:
    """What the policy makes of one exchange, as `app.chat.answer` would: the question, then the draft."""
    asked, _ = await judge_messages(policy.input, one.messages, context, one.trusted)
    here = hidden(asked.hits, len(one.messages) - 1)
    if asked.action.stops or one.draft is None:
        return _outcome(one, asked, Hidden(here), unasked=not asked.action.stops)
    said = await judge(policy.output, one.draft, context)
    strictest = said if said.action.stops else max(said, asked, key=lambda verdict: verdict.action)
    return _outcome(one, strictest, Hidden(here, hidden(said.hits)))


def hidden(hits: Sequence[Hit], message: int = -1) -> frozenset[int]:
    """The places of the text (of the message of this number) that enforced rules redact."""
    found = (hit for hit in hits if hit.message == message and hit.mode == "enforce" and hit.action is Action.REDACT)
    return frozenset(at for hit in found for finding in hit.findings for at in range(finding.start, finding.end))


def _outcome(one: Exchange, verdict: Verdict, now: Hidden, unasked: bool = False) -> Outcome:
    """The kind of the change: a block counts before a redaction, and that before another reply."""
    before = one.hidden
    kind: Kind = "same"
    if one.action.stops != verdict.action.stops:
        kind = "blocked" if verdict.action.stops else "allowed"
    elif not verdict.action.stops and (before.asked - now.asked or before.draft - now.draft):
        kind = "unredacted"
    elif not verdict.action.stops and (now.asked - before.asked or now.draft - before.draft):
        kind = "redacted"
    elif one.action is not verdict.action:
        kind = "changed"
    return Outcome(one, kind, verdict.action, verdict.rule, unasked and kind == "allowed")


def render(found: Replayed, most: int = 20, texts: bool = False) -> str:
    """The replay for people: counts with intervals, rules, and up to `most` turns of each kind.

    Without `texts` nothing of what people wrote is in it.
    """
    lines = [f"{found.policy} over {len(found.outcomes)} logged turns"]
    for kind, meaning in MEANING.items():
        lines.append(f"  {meaning + ':':<20}{found.rate(kind)}")
    unasked = sum(one.unasked for one in found.of("allowed"))
    if unasked:
        lines.append(f"  of the newly allowed {unasked} never reached the model: what it would have said is not known")
    lines += [f"  not replayed, for want of a model: rule {name!r}" for name in found.unchecked]
    if found.left_out:
        lines.append(f"  not compared, since such a rule decided them: {len(found.left_out)} turns")
    for kind, meaning in MEANING.items():
        if its := found.of(kind):
            lines += ["", f"{meaning}, by rule:", *_by_rule(its, kind), *(_line(one, texts) for one in its[:most])]
            if len(its) > most:
                lines.append(f"  ... and {len(its) - most} more")
    return "\n".join(lines)


def _deciding(one: Outcome, kind: Kind) -> str:
    """The rule that explains a change: for what is let through now, the one that did not let it through."""
    return one.exchange.rule if kind in ("allowed", "unredacted") else one.rule or one.exchange.rule


def _by_rule(outcomes: Sequence[Outcome], kind: Kind) -> list[str]:
    counted = Counter(_deciding(one, kind) for one in outcomes)
    return [f"  {count:>6}  {rule or '(none)'}" for rule, count in counted.most_common()]


def _line(one: Outcome, texts: bool) -> str:
    """One turn: its id, what was decided by which rule, and what is decided now."""
    was, now = (f"{action.word}{f' by {rule}' if rule else ''}" for action, rule in _decisions(one))
    line = f"  {one.id}: {was} -> {now}"
    if not texts:
        return line
    said = [f"    asked: {one.exchange.messages[-1].content!r}"]
    said += [f"    draft: {one.exchange.draft!r}"] if one.exchange.draft is not None else []
    return "\n".join([line, *said])


def _decisions(one: Outcome) -> tuple[tuple[Action, str], tuple[Action, str]]:
    return (one.exchange.action, one.exchange.rule), (one.action, one.rule)


def as_json(found: Replayed, texts: bool = False) -> dict[str, object]:
    """The replay as plain values, for programs; every turn that is decided otherwise is in it."""

    def turn(one: Outcome) -> dict[str, object]:
        (was, rule), (now, by) = _decisions(one)
        plain: dict[str, object] = {"id": one.id, "before": was.word, "rule_before": rule}
        plain |= {"after": now.word, "rule_after": by, "never_reached_the_model": one.unasked}
        if texts:
            plain |= {"asked": one.exchange.messages[-1].content, "draft": one.exchange.draft}
        return plain

    def kind(name: Kind) -> dict[str, object]:
        rate, its = found.rate(name), found.of(name)
        rules = Counter(_deciding(one, name) for one in its)
        counts: dict[str, object] = {"count": rate.count, "total": rate.total, "interval": list(rate.interval)}
        return counts | {"rules": dict(rules.most_common()), "turns": [turn(one) for one in its]}

    return {
        "policy": found.policy,
        "turns": len(found.outcomes),
        **{name: kind(name) for name in MEANING},
        "unchecked": list(found.unchecked),
        "not_compared": list(found.left_out),
    }
