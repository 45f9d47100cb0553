"""Runs the cases against a target, in every way that a text can be cut, and says what a client saw."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tests.conformance.streaming.cases import Case, Suite
from tests.conformance.streaming.chunkings import chunkings, every, halves, joined
from tests.conformance.streaming.targets import Model, Rules, Target

BENIGN = "Your manager will look at it in March, and you will get a letter after that. "


@dataclass(slots=True)
class Outcome:
    """What became of one case.

    leaked: the most characters of what must never be seen that a client saw. wrong: the ways of cutting that came to
    another text than `streamed`. texts: how many different texts came of all ways. whole: what is wrong with the reply
    that is not streamed. held: (mean, most) characters that waited while there was nothing to find.
    """

    case: Case
    ways: int = 0
    leaked: int = 0
    wrong: list[str] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)
    whole: str = ""
    held: tuple[float, int] | None = None
    error: str = ""

    @property
    def faults(self) -> list[str]:
        """Everything that is not as it must be, in words; empty when the case passes."""
        found = [self.error] if self.error else []
        if self.leaked:
            found.append(f"{self.leaked} characters were seen that must not be")
        if self.wrong:
            found.append(f"another text than expected: {', '.join(self.wrong[:3])} ({len(self.wrong)} ways)")
        if len(self.texts) > 1:
            found.append(f"{len(self.texts)} different texts, by how it was cut")
        if self.whole:
            found.append(self.whole)
        if self.held and self.case.hold is not None and self.held[1] > self.case.hold:
            found.append(f"held back {self.held[1]} characters, {self.case.hold} are enough")
        return found


def leaked(case: Case, said: str) -> int:
    """How many characters a client saw of what it must never see: of a whole one anywhere, or of the first one's start
    where it would stand."""
    if not case.never:
        return 0
    whole = max((len(hidden) for hidden in case.never if hidden in said), default=0)
    first = min(case.never, key=case.text.index)
    start = case.text.index(first)
    begun = next((n for n in range(len(first), 0, -1) if said.startswith(case.text[: start + n])), 0)
    return max(whole, begun)


def as_expected(expected: str, said: str, rules: Rules) -> bool:
    """True for the expected text; who hands over to a person may add how to be found again."""
    handed = any(rule.action == "escalate" and expected.endswith(rule.reply) for rule in rules)
    return said == expected or (handed and said.startswith(f"{expected}\n\n"))


def fault_of_whole(case: Case, rules: Rules, said: str) -> str:
    """What is wrong with a reply that was not streamed: a stop leaves the rule's own reply, the rest is the same."""
    if leaked(case, said):
        return "not streamed, it shows what must not be seen"
    stop = next((rule.reply for rule in rules if rule.stops and (case.streamed or "").endswith(rule.reply)), "")
    right = said.startswith(stop) if stop else said == case.streamed
    return "" if right else "not streamed, it says something else"


async def run(target: Target, suite: Suite, case: Case, thorough: bool = True) -> Outcome:
    """The outcome of one case."""
    rules, outcome = suite.rules_of(case), Outcome(case)
    try:
        for way, pieces in ways(case, target, thorough):
            model = Model(pieces)
            said = await _read(target, rules, model, case)
            outcome.ways += 1
            outcome.leaked = max(outcome.leaked, leaked(case, said))
            if target.exact and case.streamed is not None and not as_expected(case.streamed, said, rules):
                outcome.wrong.append(way)
            outcome.texts.add(said if case.streamed is None or not as_expected(case.streamed, said, rules) else "")
            if way == "1 character" and target.live:
                outcome.held = _held(case, model)
        whole = await target.whole(rules, case.text, case.channel)
        if target.exact and whole is not None and case.streamed is not None:
            outcome.whole = fault_of_whole(case, rules, whole)
    except Exception as error:
        outcome.error = f"{type(error).__name__}: {error}"
    return outcome


def ways(case: Case, target: Target, thorough: bool) -> Iterable[tuple[str, list[str]]]:
    """All ways to cut the text of this case."""
    yield from chunkings(case.text, case.spans, thorough)
    if target.live:
        yield "UTF-16 halves", halves(case.text)  # JSON has no way to send these to a gateway


async def _read(target: Target, rules: Rules, model: Model, case: Case) -> str:
    seen: list[str] = []
    async for piece in target.stream(rules, model, case.channel):
        model.shown += len(piece)
        seen.append(piece)
    return joined(seen)


def _held(case: Case, model: Model) -> tuple[float, int] | None:
    waiting = [held for given, held in model.held if 0 < given <= case.first]
    return (statistics.mean(waiting), max(waiting)) if waiting else None


async def flat(target: Target, suite: Suite, names: Sequence[str] = ("falcon", "email", "ssn", "overtime")) -> float:
    """How much more CPU time a character costs in a long reply than in a short one; 1.0 is flat."""
    rules = tuple(suite.rules[name] for name in names)

    async def cost(repeats: int) -> float:
        times = []
        for _ in range(3):
            model, began = Model(every(BENIGN * repeats, 4)), time.process_time()
            async for piece in target.stream(rules, model, "content"):
                model.shown += len(piece)
            times.append((time.process_time() - began) / len(model.pieces))
        return min(times)

    await cost(5)
    short = await cost(20)
    return await cost(200) / short


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a Markdown table, and a line of sums."""
    lines = ["| case | channel | ways | seen | texts | held, mean / most | |", "|---|---|---|---|---|---|---|"]
    for one in outcomes:
        held = f"{one.held[0]:.1f} / {one.held[1]}" if one.held else ""
        says = "; ".join(one.faults) or "passed"
        lines.append(
            f"| {one.case.name} | {one.case.channel} | {one.ways} | {one.leaked} | {len(one.texts)} | {held} | {says} |"
        )
    passed = sum(not one.faults for one in outcomes)
    leaks = sum(one.leaked > 0 for one in outcomes)
    total = f"{passed} of {len(outcomes)} cases pass; in {leaks} a client saw what it must not."
    return "\n".join([*lines, "", total])
