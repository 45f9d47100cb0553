"""Checking a policy: its own examples, and what can be told about its rules without any.

A policy that fails its check is not activated; that is up to who asks for the check.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from math import ceil, sqrt

from guardrails.conversation import judge_messages
from guardrails.engine import judge, stream
from guardrails.types import (
    Action,
    Context,
    Example,
    Grader,
    Judge,
    Message,
    Mode,
    Policy,
    Question,
    Rule,
    Stage,
    StreamValidator,
    Token,
    Verdict,
)

HOSTILE_UNITS = ("a", "A", "1", " ", "\n", ".", "-", "@", "(", "the ", "my ", "a1", "a b", "é", "a@a.")
HOSTILE_REPEATS = 5_000
HOSTILE_CHARACTERS = 10_000
HOSTILE_SECONDS = 1.0
"""CPU seconds that a rule may take to read one hostile text, whole, and an output rule also as a stream."""

HOSTILE_ADVICE = "bound its repeats, as in .{0,40} for .*, and let no two of them match the same text"

LONGEST_NAME = 24
"""Characters of a rule's name in the report."""

STREAM_CHARACTERS = 16
"""How many characters a hostile stream brings at a time, about four tokens."""


class NoGrader(Exception):
    """Raised in place of an answer where the check has no grader to ask."""


class _Absent:
    """Stands for a model that the check was not given."""

    async def probability(self, messages: Sequence[Message]) -> float:
        """Never returns; raises NoGrader."""
        raise NoGrader

    async def ask(self, question: Question) -> Sequence[Token]:
        """Never returns; raises NoGrader."""
        raise NoGrader


class _Nobody(dict[str, Judge]):
    """Stands for the guard models: whichever is asked for, it is not there."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> Judge:
        return _Absent()

    def get(self, name: str, default: object = None) -> Judge:
        """A model that is not there."""
        return _Absent()


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
class Times:
    """Milliseconds that a rule takes for one example: half of them take at most `p50`, 99 of 100 at most `p99`."""

    p50: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """The times of what took so many seconds each (nearest rank); 0 for none."""
        ranked = sorted(seconds) or [0.0]
        at = (ranked[max(0, ceil(share * len(ranked)) - 1)] for share in (0.5, 0.99))
        return cls(*(round(one * 1000, 3) for one in at))


@dataclass(frozen=True, slots=True)
class Tally:
    """How one rule did over the examples of its stage; one in shadow mode as if it were enforced.

    precision: of those that it decided, how many were right. recall: of its own, how many it decided. over_refusal: of
    those that must be allowed, in how many it found something. wall and cpu: what it takes to read one, alone.
    """

    rule: str
    stage: Stage
    action: Action
    mode: Mode
    precision: Rate
    recall: Rate
    over_refusal: Rate
    wall: Times
    cpu: Times


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a rule in shadow mode would make of an example that is decided otherwise without it."""

    rule: str
    action: Action
    result: Result

    def __str__(self) -> str:
        is_wrong = " (wrongly)" if self.result.fault else ""
        what = f"in shadow mode, rule {self.rule!r} would {self.action.word}{is_wrong}"
        return str(replace(self.result, fault=what))


@dataclass(frozen=True, slots=True)
class Report:
    """What a check found. `unchecked` rules ask a model and there was none: nothing is known about them."""

    policy: str
    results: tuple[Result, ...]
    skipped: tuple[Example, ...]
    faults: tuple[str, ...]
    tallies: tuple[Tally, ...]
    unchecked: tuple[str, ...]
    shadow: tuple[Outlook, ...] = ()

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


@dataclass(frozen=True, slots=True)
class _Run:
    """What is needed to judge the examples of a policy: its rules that can be asked, its persona, whom to ask."""

    rules: Mapping[Stage, Sequence[Rule]]
    examples: Sequence[Example]
    persona: str
    grader: Grader
    judges: Mapping[str, Judge]

    def context(self, example: Example) -> Context:
        """What a validator may know; documents stand in the conversation as results of a tool."""
        asked = (Message(example.role, example.text),) if example.stage == "input" else ()
        documents = (Message("tool", text) for text in example.documents)
        return Context((*example.turns, *documents, *asked), self.grader, self.persona, self.judges)

    async def verdict(self, rules: Sequence[Rule], example: Example) -> tuple[Verdict, str]:
        """(the verdict of these rules on an example, what becomes of its text)."""
        context = self.context(example)
        if example.stage == "output":
            verdict = await judge(rules, example.text, context)
            return verdict, verdict.text
        verdict, seen = await judge_messages(rules, context.messages, context)
        return verdict, verdict.text if verdict.action.stops or not seen else seen[-1].content

    async def tried(self, rules: Sequence[Rule], example: Example) -> Result:
        """What the rules of its stage make of an example; an answer is streamed, too."""
        verdict, text = await self.verdict(rules, example)
        fault = _fault(example, verdict, text)
        if example.stage == "output" and not fault:
            fault = await _streamed(rules, example.text, verdict, self.context(example))
        return Result(example, verdict.action, verdict.rule, fault)

    async def tally(self, stage: Stage, rule: Rule, results: Sequence[Result]) -> Tally:
        """How a rule did in `results`, and what it does alone."""
        alone = [replace(rule, mode="enforce", key="")]
        fired, wall, cpu = 0, list[float](), list[float]()
        allowed = 0
        for example in (one for one in self.examples if one.stage == stage):
            began, busy = time.perf_counter(), time.process_time()
            verdict, _ = await self.verdict(alone, example)
            wall.append(time.perf_counter() - began)
            cpu.append(time.process_time() - busy)
            allowed += example.expect is Action.ALLOW
            fired += example.expect is Action.ALLOW and bool(verdict.hits)
        decided = [result for result in results if result.rule == rule.name]
        right = sum(not result.fault for result in decided)
        missed = sum(result.example.rule == rule.name != result.rule for result in results)
        precision, recall = Rate(right, len(decided)), Rate(right, right + missed)
        seen = (precision, recall, Rate(fired, allowed), Times.of(wall), Times.of(cpu))
        return Tally(rule.name, stage, rule.action, rule.mode, *seen)


async def check(
    policy: Policy, grader: Grader | None = None, judges: Mapping[str, Judge] | None = None, lint: bool = True
) -> Report:
    """The report on a policy: every example judged, every answer also streamed character by character, rules linted.

    Without `lint` only the examples count: a policy whose parent has changed need not prove its rules again.
    """
    unchecked = await without_models(policy, grader, judges)
    run = _Run(
        rules={
            "input": [rule for rule in policy.input if rule.name not in unchecked],
            "output": [rule for rule in policy.output if rule.name not in unchecked],
        },
        examples=[example for example in policy.examples if example.rule not in unchecked],
        persona=policy.persona,
        grader=grader or _Absent(),
        judges=judges or {},
    )
    shadows = {rule.name: rule for rule in chain(*run.rules.values()) if rule.mode == "shadow"}
    results = [
        await run.tried(_enforcing(run.rules[example.stage], shadows.get(example.rule)), example)
        for example in run.examples
    ]
    tallies: list[Tally] = []
    outlooks: list[Outlook] = []
    faults = [*_reach(run.rules, results), *_both_sides(run.rules, results)] if lint else []
    for stage, rule in [(stage, rule) for stage, those in run.rules.items() for rule in those]:
        its = results
        if rule.name in shadows:
            enforcing = _enforcing(run.rules[stage], rule)
            its = [await run.tried(enforcing, one.example) for one in results if one.example.stage == stage]
            outlooks += _changed(rule, its)
        own = [result.example.text for result in its if result.rule == rule.name]
        faults += await _hostile(rule, own, stage == "output") if lint else []
        tallies.append(await run.tally(stage, rule, its))
    skipped = tuple(example for example in policy.examples if example.rule in unchecked)
    return Report(policy.id, tuple(results), skipped, tuple(faults), tuple(tallies), unchecked, tuple(outlooks))


async def without_models(policy: Policy, grader: Grader | None, judges: Mapping[str, Judge] | None) -> tuple[str, ...]:
    """The names of the rules that ask a model which is not there, so that nothing can be said about them."""
    return tuple([rule.name for rule in (*policy.input, *policy.output) if await _asks(rule, grader, judges)])


def _enforcing(rules: Sequence[Rule], shadow: Rule | None) -> Sequence[Rule]:
    """The rules, of which this one is enforced whatever its mode."""
    return [replace(rule, mode="enforce") if rule is shadow else rule for rule in rules] if shadow else rules


def _changed(rule: Rule, results: Sequence[Result]) -> list[Outlook]:
    """What this rule would decide although the examples do not name it."""
    decided = [result for result in results if result.rule == rule.name != result.example.rule]
    return [Outlook(rule.name, rule.action, result) for result in decided]


async def _asks(rule: Rule, grader: Grader | None, judges: Mapping[str, Judge] | None) -> bool:
    """True for a rule that asks a model that is not there."""
    context = Context((Message("user", "Hello."),), grader or _Absent(), judges=judges or _Nobody())
    for validator in filter(None, (rule.validator, rule.confirm)):
        if isinstance(validator, StreamValidator) or (grader and judges):
            continue
        try:
            await validator.find("Hello.", replace(context, grader=_Absent()) if grader is None else context)
        except NoGrader:
            return True
        except Exception:  # noqa: S112 - the rule is broken for a reason of its own, and its examples will show it
            continue
    return False


def _fault(example: Example, verdict: Verdict, text: str) -> str:
    """What is wrong with this verdict on the example, and with what became of it, or empty."""
    broken = [f"rule {hit.rule!r} broke ({hit.broken})" for hit in verdict.hits if hit.broken]
    if broken:
        return broken[0]
    by = f" by {example.rule!r}" if example.rule else ""
    got = f" by {verdict.rule!r}" if verdict.rule else ""
    if verdict.action is not example.expect or (example.rule and example.rule != verdict.rule):
        return f"expected {example.expect.word}{by}, got {verdict.action.word}{got}"
    if example.becomes and example.becomes != text:
        return f"expected to become {example.becomes!r}, became {text!r}"
    return ""


async def _streamed(rules: Sequence[Rule], text: str, verdict: Verdict, context: Context) -> str:
    """What is wrong with the example as a stream of single characters, or empty."""
    pieces = [piece async for piece in stream(rules, _pieces(text, 1), context)]
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
    for unit in (*HOSTILE_UNITS, *(text[:-1] for text in own[:1])):
        await asyncio.sleep(0)  # a gateway that checks a policy goes on serving
        try:
            if await _busy(rule, unit, streamed) and (fault := await _busy(rule, unit, streamed)):
                return [fault]
        except NoGrader:
            return []
    return []


async def _busy(rule: Rule, unit: str, streamed: bool) -> str:
    """The complaint about a rule that a long text of `unit` keeps busy, or empty.

    What else runs on this machine can only add to the time, so that one complaint alone proves nothing.
    """
    started = time.thread_time()
    try:
        await _read(rule, (unit * HOSTILE_REPEATS)[:HOSTILE_CHARACTERS], streamed)
    except NoGrader:
        raise
    except Exception as error:
        return f"rule {rule.name!r} broke ({type(error).__name__}) on a long text of {unit[:20]!r}; {HOSTILE_ADVICE}"
    if (spent := time.thread_time() - started) > HOSTILE_SECONDS:
        return f"rule {rule.name!r} read {spent:.1f} s on a long text of {unit[:20]!r}; {HOSTILE_ADVICE}"
    return ""


async def _read(rule: Rule, text: str, streamed: bool) -> None:
    """Reads a text as this rule would, whole and perhaps as it grows; raises what its validator raises."""
    await rule.validator.find(text, Context((Message("user", text),), _Absent(), judges=_Nobody()))
    if streamed and isinstance(rule.validator, StreamValidator):
        for reading in rule.validator.readings():
            for end in range(STREAM_CHARACTERS, len(text), STREAM_CHARACTERS):
                reading.read(text[:end], False)
            reading.read(text, True)


def render(report: Report) -> str:
    """The report for people: verdict, rules, over-refusal, what was not checked, and what to correct, with places."""
    state = "passed" if report.passed else "FAILED"
    lines = [f"{report.policy} {state}: {len(report.results)} examples, {len(report.tallies)} rules"]
    width = min(max((len(tally.rule) for tally in report.tallies), default=4), LONGEST_NAME)
    lines.append(f"  {'rule':<{width}}  stage   action     precision      recall  over-refusal  p50 ms  p99 ms")
    lines += [_row(tally, width) for tally in report.tallies]
    if any(tally.mode == "shadow" for tally in report.tallies):
        lines.append("  * in shadow mode: what it would do if it were enforced")
    lines.append(f"  refused although it should be helped: {report.over_refusal}")
    lines += [f"  not checked, for want of a grader: rule {name!r}" for name in report.unchecked]
    if report.skipped:
        lines.append(f"  not checked, for want of a grader: {len(report.skipped)} examples")
    return "\n".join([*lines, *map(str, report.shadow), *map(str, report.failures), *report.faults])


def _row(tally: Tally, width: int) -> str:
    """One rule as a line of the table, of at most 100 characters."""
    name = tally.rule if len(tally.rule) <= width else f"{tally.rule[: width - 1]}…"
    action = f"{tally.action.word}*" if tally.mode == "shadow" else tally.action.word
    rates = "  ".join(f"{_short(rate):>10}" for rate in (tally.precision, tally.recall))
    times = "  ".join(f"{one:>6.{0 if one >= 100 else 2}f}" for one in (tally.wall.p50, tally.wall.p99))
    return f"  {name:<{width}}  {tally.stage:<6}  {action:<9}{rates}  {_wide(tally.over_refusal):>12}  {times}"


def _wide(rate: Rate) -> str:
    """`1/40 1-13%`: how many, and the interval of the share; a dash when there is nothing to divide."""
    low, high = rate.interval
    return f"{rate.count}/{rate.total} {low * 100:.0f}-{high * 100:.0f}%" if rate.total else "-"


def _short(rate: Rate) -> str:
    """`3/4 75%`, or a dash when there is nothing to divide."""
    return f"{rate.count}/{rate.total} {rate.share:.0%}" if rate.total else "-"


def as_json(report: Report) -> dict[str, object]:
    """The report as plain values, for programs; texts of examples are in it."""

    def rate(one: Rate) -> dict[str, object]:
        return {"count": one.count, "total": one.total, "share": one.share, "interval": list(one.interval)}

    def example(result: Result) -> dict[str, object]:
        one = result.example
        where = {"file": one.file, "line": one.line, "stage": one.stage, "text": one.text[:200]}
        return where | {
            "expect": one.expect.word,
            "got": result.action.word,
            "rule": result.rule,
            "fault": result.fault,
        }

    def rule(tally: Tally) -> dict[str, object]:
        rates = {name: rate(getattr(tally, name)) for name in ("precision", "recall", "over_refusal")}
        what = {"rule": tally.rule, "stage": tally.stage, "action": tally.action.word, "mode": tally.mode}
        return what | rates | {"wall_ms": asdict(tally.wall), "cpu_ms": asdict(tally.cpu)}

    return {
        "policy": report.policy,
        "passed": report.passed,
        "examples": len(report.results),
        "over_refusal": rate(report.over_refusal),
        "rules": [rule(tally) for tally in report.tallies],
        "shadow": [{"rule": one.rule, "action": one.action.word} | example(one.result) for one in report.shadow],
        "failures": [example(result) for result in report.failures],
        "faults": list(report.faults),
        "unchecked": list(report.unchecked),
        "skipped": len(report.skipped),
    }
