"""Checking a policy: its own examples, and what can be told about its rules without any.

A policy that fails its check is not activated; that is up to who asks for the check.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import sqrt

from guardrails.engine import judge, judge_messages, stream
from guardrails.types import (
    Action,
    Context,
    Example,
    Grader,
    Message,
    Policy,
    Rule,
    Stage,
    StreamValidator,
    Verdict,
)

HOSTILE_UNITS = ("a", "A", "1", " ", "\n", ".", "-", "@", "(", "the ", "my ", "a1", "a b", "é", "a@a.")
HOSTILE_REPEATS = 5_000
HOSTILE_CHARACTERS = 10_000
HOSTILE_SECONDS = 1.0
"""CPU seconds that a rule may take to read one hostile text, whole, and an output rule also as a stream."""

HOSTILE_ADVICE = "bound its repeats, as in .{0,40} for .*, and let no two of them match the same text"

STREAM_CHARACTERS = 16
"""How many characters a hostile stream brings at a time, about four tokens."""


class NoGrader(Exception):
    """Raised in place of an answer where the check has no grader to ask."""


class _Absent:
    """Stands for the grader that the check was not given."""

    async def probability(self, messages: Sequence[Message]) -> float:
        """Never returns; raises NoGrader."""
        raise NoGrader


@dataclass(frozen=True, slots=True)
class Rate:
    """`count` of `total`, with the interval in which the true share lies with 95 % (Wilson 1927)."""

    count: int
    total: int

    @property
    def share(self) -> float:
        """The share that was seen, in 0..1; 0 when nothing was seen."""
        return self.count / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high), both in 0..1; (0, 1) when nothing was seen."""
        if not self.total:
            return 0.0, 1.0
        z, n, p = 1.959964, self.total, self.share
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.count} of {self.total} ({self.share:.1%}, 95 % interval {low:.1%} to {high:.1%})"


@dataclass(frozen=True, slots=True)
class Result:
    """What the policy made of one example; `fault` says what is wrong with that, empty when nothing is."""

    example: Example
    action: Action
    rule: str
    fault: str

    def __str__(self) -> str:
        shown = " ".join(self.example.text.split())
        shown = f"{shown[:60]}..." if len(shown) > 63 else shown
        return f"{self.example.file}:{self.example.line}: {self.fault}: {shown!r}"


@dataclass(frozen=True, slots=True)
class Tally:
    """How one rule did: of the examples that it decided, how many were right; of its own, how many it decided."""

    rule: str
    stage: Stage
    action: Action
    precision: Rate
    recall: Rate


@dataclass(frozen=True, slots=True)
class Report:
    """What a check found. `unchecked` rules ask a grader and there was none: nothing is known about them."""

    policy: str
    results: tuple[Result, ...]
    skipped: tuple[Example, ...]
    faults: tuple[str, ...]
    tallies: tuple[Tally, ...]
    unchecked: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """True when everything that could be checked is right; see `unchecked` for what could not."""
        return not self.faults and not self.failures

    @property
    def failures(self) -> tuple[Result, ...]:
        """The examples that the policy gets wrong."""
        return tuple(result for result in self.results if result.fault)

    @property
    def over_refusal(self) -> Rate:
        """How many of the examples that must be helped are refused or handed to a person."""
        allowed = [result for result in self.results if result.example.expect is Action.ALLOW]
        return Rate(sum(result.action.stops for result in allowed), len(allowed))


async def check(policy: Policy, grader: Grader | None = None) -> Report:
    """The report on a policy: every example judged, every answer also streamed character by character, rules linted."""
    unchecked = () if grader else tuple([rule.name for rule in (*policy.input, *policy.output) if await _asks(rule)])
    rules: dict[Stage, list[Rule]] = {
        "input": [rule for rule in policy.input if rule.name not in unchecked],
        "output": [rule for rule in policy.output if rule.name not in unchecked],
    }
    examples = [example for example in policy.examples if example.rule not in unchecked]
    results = [await _tried(rules[example.stage], example, grader or _Absent()) for example in examples]
    faults = [*_reach(rules, results), *_both_sides(rules, results)]
    for stage, rule in [(stage, rule) for stage, those in rules.items() for rule in those]:
        own = [result.example.text for result in results if result.rule == rule.name]
        faults += await _hostile(rule, own, stage == "output")
    return Report(
        policy=policy.id,
        results=tuple(results),
        skipped=tuple(example for example in policy.examples if example.rule in unchecked),
        faults=tuple(faults),
        tallies=tuple(_tally(stage, rule, results) for stage, those in rules.items() for rule in those),
        unchecked=unchecked,
    )


async def _asks(rule: Rule) -> bool:
    """True for a rule that asks a grader."""
    if isinstance(rule.validator, StreamValidator):
        return False
    try:
        await rule.validator.find("Hello.", Context((Message("user", "Hello."),), _Absent()))
    except NoGrader:
        return True
    except Exception:  # the rule is broken for a reason of its own, and its examples will show it
        return False
    return False


async def _tried(rules: Sequence[Rule], example: Example, grader: Grader) -> Result:
    """What the rules of its stage make of one example."""
    if example.stage == "input":
        messages = (Message("user", example.text),)
        verdict, _ = await judge_messages(rules, messages, Context(messages, grader))
        fault = _fault(example, verdict)
    else:
        verdict = await judge(rules, example.text, Context(grader=grader))
        fault = _fault(example, verdict) or await _streamed(rules, example.text, verdict, grader)
    return Result(example, verdict.action, verdict.rule, fault)


def _fault(example: Example, verdict: Verdict) -> str:
    """What is wrong with this verdict on the example, or empty."""
    broken = [f"rule {hit.rule!r} broke ({hit.broken})" for hit in verdict.hits if hit.broken]
    if broken:
        return broken[0]
    by = f" by {example.rule!r}" if example.rule else ""
    got = f" by {verdict.rule!r}" if verdict.rule else ""
    if verdict.action is not example.expect or (example.rule and example.rule != verdict.rule):
        return f"expected {example.expect.word}{by}, got {verdict.action.word}{got}"
    if example.becomes and example.becomes != verdict.text:
        return f"expected to become {example.becomes!r}, became {verdict.text!r}"
    return ""


async def _streamed(rules: Sequence[Rule], text: str, verdict: Verdict, grader: Grader) -> str:
    """What is wrong with the example as a stream of single characters, or empty."""
    pieces = [piece async for piece in stream(rules, _pieces(text, 1), Context(grader=grader))]
    shown = "".join(piece for piece in pieces if isinstance(piece, str))
    if shown != verdict.streamed:
        return f"streamed by characters it becomes {shown!r} instead of {verdict.streamed!r}"
    if leaked := _leaked(text, verdict):
        return f"the stream shows {leaked!r}, which a rule hides"
    return ""


async def _pieces(text: str, size: int) -> AsyncIterator[str]:
    """The text, `size` characters at a time."""
    for start in range(0, len(text), size):
        yield text[start : start + size]


def _leaked(text: str, verdict: Verdict) -> str:
    """A hidden part of `text` that `verdict.kept` shows although it stands nowhere in the open, or empty."""
    hits = [hit for hit in verdict.hits if hit.mode == "enforce" and hit.action >= Action.REDACT]
    hidden = [finding for hit in hits for finding in hit.findings]
    secret = {place for finding in hidden for place in range(finding.start, finding.end)}
    in_the_open = "".join("\0" if place in secret else sign for place, sign in enumerate(text))
    parts = [text[finding.start : finding.end] for finding in hidden]
    return next((part for part in parts if part in verdict.kept and part not in in_the_open), "")


def _reach(rules: Mapping[Stage, Sequence[Rule]], results: Sequence[Result]) -> list[str]:
    """Complaints about enforced rules that decide in no example."""
    deciding = {result.rule for result in results if not result.fault}
    return [
        f"rule {rule.name!r} decides in no example; add one that it must {rule.action.word}"
        for rule in chain(*rules.values())
        if rule.mode == "enforce" and rule.action is not Action.ALLOW and rule.name not in deciding
    ]


def _both_sides(rules: Mapping[Stage, Sequence[Rule]], results: Sequence[Result]) -> list[str]:
    """Complaints about stages whose rules have no example of what must be let through."""
    word = {"input": "ask", "output": "answer"}
    helped = {result.example.stage for result in results if result.example.expect is Action.ALLOW}
    return [
        f'no {stage} example is expected to be allowed; add near misses: {word[stage]} = "...", expect = "allow"'
        for stage, those in rules.items()
        if those and stage not in helped
    ]


async def _hostile(rule: Rule, own: Sequence[str], streamed: bool) -> list[str]:
    """Complaints about a rule that hostile text can keep busy: `own` are texts that make it fire."""
    units = [*HOSTILE_UNITS, *(text[:-1] for text in own[:1])]
    for unit in units:
        text = (unit * HOSTILE_REPEATS)[:HOSTILE_CHARACTERS]
        await asyncio.sleep(0)  # a gateway that checks a policy goes on serving
        started = time.thread_time()
        try:
            await _read(rule, text, streamed)
        except NoGrader:
            return []
        except Exception as error:
            return [
                f"rule {rule.name!r} broke ({type(error).__name__}) on a long text of {unit[:20]!r}; {HOSTILE_ADVICE}"
            ]
        if (spent := time.thread_time() - started) > HOSTILE_SECONDS:
            return [f"rule {rule.name!r} read {spent:.1f} s on a long text of {unit[:20]!r}; {HOSTILE_ADVICE}"]
    return []


async def _read(rule: Rule, text: str, streamed: bool) -> None:
    """Reads a text as this rule would, whole and perhaps as it grows; raises what its validator raises."""
    await rule.validator.find(text, Context((Message("user", text),), _Absent()))
    if streamed and isinstance(rule.validator, StreamValidator):
        for reading in rule.validator.readings():
            for end in range(STREAM_CHARACTERS, len(text), STREAM_CHARACTERS):
                reading.read(text[:end], False)
            reading.read(text, True)


def _tally(stage: Stage, rule: Rule, results: Sequence[Result]) -> Tally:
    """How this rule did over the examples."""
    decided = [result for result in results if result.rule == rule.name]
    right = sum(not result.fault for result in decided)
    missed = sum(result.example.rule == rule.name != result.rule for result in results)
    return Tally(rule.name, stage, rule.action, Rate(right, len(decided)), Rate(right, right + missed))


def render(report: Report) -> str:
    """The report for people: verdict, rules, over-refusal, what was not checked, and what to correct, with places."""
    state = "passed" if report.passed else "FAILED"
    lines = [f"{report.policy} {state}: {len(report.results)} examples, {len(report.tallies)} rules"]
    width = max((len(tally.rule) for tally in report.tallies), default=4)
    lines.append(f"  {'rule':<{width}}  stage   action    precision      recall")
    for tally in report.tallies:
        rates = "  ".join(f"{_short(rate):>10}" for rate in (tally.precision, tally.recall))
        lines.append(f"  {tally.rule:<{width}}  {tally.stage:<6}  {tally.action.word:<8}  {rates}")
    lines.append(f"  refused although it should be helped: {report.over_refusal}")
    lines += [f"  not checked, for want of a grader: rule {name!r}" for name in report.unchecked]
    if report.skipped:
        lines.append(f"  not checked, for want of a grader: {len(report.skipped)} examples")
    return "\n".join([*lines, *map(str, report.failures), *report.faults])


def _short(rate: Rate) -> str:
    """`3/4 75%`, or a dash when there is nothing to divide."""
    return f"{rate.count}/{rate.total} {rate.share:.0%}" if rate.total else "-"
