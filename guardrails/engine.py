"""Judging text: a conversation on its way in, a reply on its way out, whole or while it streams.

Invariant: for any chunking, what a stream has released at its end is `Verdict.streamed` of the whole text, and no
character of a stopped or redacted span is ever released. It holds because a stream releases only up to the smallest
`settled` of its rules, and because the first stop by place decides, not the first by time.

Rules that can only read a whole text (a plain `Validator`) make the stream wait and are asked last, and only when no
cheaper rule has stopped the text; where there are such rules, a stopped text keeps nothing of the draft.
"""

from __future__ import annotations

import asyncio
from bisect import insort
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field, replace

from guardrails.types import (
    BROKEN_REPLY,
    Action,
    Context,
    Finding,
    Hit,
    Message,
    Rule,
    Scope,
    StreamValidator,
    Validator,
    Verdict,
)

LONG = 20_000
"""Characters from which on a question is read in a thread, within its rule's budget."""


@dataclass(frozen=True, slots=True, order=True)
class _Redaction:
    start: int
    minus_end: int
    placeholder: str

    @classmethod
    def of(cls, rule: Rule, finding: Finding) -> _Redaction:
        return cls(finding.start, -finding.end, rule.placeholder or f"[{finding.label.upper()}]")


@dataclass(frozen=True, slots=True, order=True)
class _Stop:
    """Where a text stops: the first by place, then the strictest, then the first by rule order."""

    start: int
    minus_action: int
    order: int
    rule: Rule = field(compare=False)
    broken: bool = field(compare=False, default=False)

    @property
    def action(self) -> Action:
        return Action(-self.minus_action)

    @property
    def reply(self) -> str:
        return BROKEN_REPLY if self.broken else self.rule.reply


class _Reader:
    """One rule's progress through one text: what it has found, how far it has settled, whether it broke."""

    __slots__ = ("_readings", "broken", "findings", "order", "rule", "settled")

    def __init__(self, order: int, rule: Rule):
        self.order, self.rule = order, rule
        validator = rule.validator
        self._readings = validator.readings() if isinstance(validator, StreamValidator) else None
        self.findings: list[Finding] = []
        self.settled = 0
        self.broken = ""

    @property
    def whole(self) -> bool:
        return self._readings is None

    @property
    def enforced(self) -> bool:
        return self.rule.mode == "enforce"

    def read(self, text: str, final: bool) -> list[Finding]:
        """The new findings at or above the rule's threshold; a validator that raises breaks the rule, not the text."""
        if self.broken or self._readings is None:
            return []
        new: list[Finding] = []
        settled = len(text)
        try:
            for reading in self._readings:
                findings, reached = reading.read(text, final)
                new += [finding for finding in findings if finding.score >= self.rule.threshold]
                settled = min(settled, reached)
        except Exception as error:
            self.broken = type(error).__name__
            return []
        self.settled = settled
        self.findings += new
        return new

    async def find(self, text: str, context: Context) -> list[Finding]:
        """The findings in the whole text, within the rule's budget."""
        self.findings, self.broken = await _find(self.rule, text, context)
        self.settled = 0 if self.broken else len(text)
        return self.findings

    def stop(self, findings: Iterable[Finding]) -> list[_Stop]:
        """The places at which this rule stops the text, if it does."""
        if not self.enforced:
            return []
        if self.broken:
            stops = self.rule.if_broken.stops
            return [_Stop(self.settled, -self.rule.if_broken, self.order, self.rule, True)] if stops else []
        if not self.rule.action.stops:
            return []
        return [_Stop(finding.start, -self.rule.action, self.order, self.rule) for finding in findings]

    def hit(self, before: int) -> Hit | None:
        """What this rule saw up to `before`, or None when it saw nothing and did not break."""
        findings = tuple(sorted((f for f in self.findings if f.start <= before), key=lambda f: (f.start, f.end)))
        if not findings and not self.broken:
            return None
        action = self.rule.if_broken if self.broken else self.rule.action
        return Hit(self.rule.name, action, self.rule.mode, findings, self.broken)


class Guard:
    """One text on its way out: `feed` it pieces, release what comes back, `finish` for the verdict."""

    def __init__(self, rules: Sequence[Rule], context: Context | None = None):
        readers = [_Reader(order, rule) for order, rule in enumerate(rules)]
        self._context = context or Context()
        self._all = readers
        self._streaming = [reader for reader in readers if not reader.whole]
        self._whole = [reader for reader in readers if reader.whole]
        self._held = any(reader.enforced for reader in self._whole)
        self._text = ""
        self._cursor = 0
        self._kept: list[str] = []
        self._redactions: list[_Redaction] = []
        self._next_redaction = 0
        self._stops: list[_Stop] = []
        self.stopped = False

    @property
    def draft(self) -> str:
        """Everything fed so far, as the model wrote it."""
        return self._text

    def feed(self, delta: str) -> str:
        """What may be released now that `delta` has come; `stopped` is true when nothing more ever will be."""
        if self.stopped:
            return ""
        self._text += delta
        return self._advance(final=False)

    async def finish(self) -> tuple[str, Verdict]:
        """(the last piece of the text itself, the verdict): the text ends here."""
        piece = "" if self.stopped else self._advance(final=True)
        if self._whole and not self.stopped:
            for reader, findings in zip(self._whole, await self._ask_whole(), strict=True):
                self._note(reader, findings)
            self._held = False
            piece += self._release(len(self._text), final=True)
        return piece, self._verdict()

    async def _ask_whole(self) -> list[list[Finding]]:
        return await asyncio.gather(*(reader.find(self._text, self._context) for reader in self._whole))

    def _advance(self, final: bool) -> str:
        settled = len(self._text)
        for reader in self._streaming:
            broken_before = reader.broken
            found = reader.read(self._text, final)
            if found or reader.broken != broken_before:
                self._note(reader, found)
            if reader.enforced and not reader.broken:
                settled = min(settled, reader.settled)
        return self._release(settled, final)

    def _note(self, reader: _Reader, findings: Sequence[Finding]) -> None:
        for stop in reader.stop(findings):
            insort(self._stops, stop)
        if reader.enforced and reader.rule.action is Action.REDACT:
            for finding in findings:
                insort(self._redactions, _Redaction.of(reader.rule, finding))

    def _release(self, settled: int, final: bool) -> str:
        """The newly certain text; a stop that is certain ends it (a broken rule's stop is certain at once)."""
        upto = settled
        first = self._stops[0] if self._stops else None
        if first and (first.start < settled or final or first.broken):
            self.stopped = True
            upto = min(first.start, settled) if first.broken else first.start
        if self._held:
            return ""
        piece, self._cursor, self._next_redaction = _redact(
            self._text, self._redactions, self._next_redaction, self._cursor, upto
        )
        self._kept.append(piece)
        return piece

    def _verdict(self) -> Verdict:
        stop = self._stops[0] if self.stopped else None
        before = stop.start if stop else len(self._text)
        hits = tuple(hit for reader in self._all if (hit := reader.hit(before)))
        kept = "".join(self._kept)
        if stop:
            route = stop.rule.route if stop.action is Action.ESCALATE else ""
            return Verdict(stop.action, stop.reply, kept, stop.rule.name, route, hits)
        return _delivered(kept, hits, [reader.rule for reader in self._all])


def _redact(text: str, redactions: Sequence[_Redaction], index: int, cursor: int, upto: int) -> tuple[str, int, int]:
    """(`text[cursor:upto]` with its redactions, new cursor, index of the next redaction to look at)."""
    out: list[str] = []
    while index < len(redactions) and redactions[index].start < upto:
        redaction = redactions[index]
        index += 1
        if redaction.start >= cursor:
            out += (text[cursor : redaction.start], redaction.placeholder)
        cursor = max(cursor, -redaction.minus_end)
    if cursor < upto:
        out.append(text[cursor:upto])
        cursor = upto
    return "".join(out), cursor, index


def _delivered(text: str, hits: tuple[Hit, ...], rules: Sequence[Rule]) -> Verdict:
    """The verdict on a text that was not stopped: appended lines, the strictest action, the rule that decided."""
    enforced = {hit.rule: hit.action for hit in hits if hit.mode == "enforce"}
    action = max(enforced.values(), default=Action.ALLOW)
    decider = next((name for name, its in enforced.items() if its is action), "")
    lines = dict.fromkeys(rule.reply for rule in rules if enforced.get(rule.name) is Action.APPEND)
    return Verdict(action, "\n\n".join(filter(None, [text, *lines])), text, decider, hits=hits)


async def _find(rule: Rule, text: str, context: Context) -> tuple[list[Finding], str]:
    """(findings at or above the threshold, the kind of error or empty)."""
    try:
        if isinstance(rule.validator, StreamValidator) and len(text) <= LONG:
            findings = await rule.validator.find(text, context)
        else:
            async with asyncio.timeout(rule.budget):
                findings = await _found(rule.validator, text, context)
    except Exception as error:
        return [], type(error).__name__
    return [finding for finding in findings if finding.score >= rule.threshold], ""


async def _found(validator: Validator, text: str, context: Context) -> Sequence[Finding]:
    """The findings of a slow validator; one that reads a long text does so aside, so that other requests go on."""
    if not isinstance(validator, StreamValidator):
        return await validator.find(text, context)
    readings = validator.readings()
    return await asyncio.to_thread(lambda: [found for reading in readings for found in reading.read(text, True)[0]])


async def judge(rules: Sequence[Rule], text: str, context: Context | None = None) -> Verdict:
    """The verdict on a whole text."""
    guard = Guard(rules, context)
    guard.feed(text)
    return (await guard.finish())[1]


async def stream(
    rules: Sequence[Rule], deltas: AsyncIterable[str], context: Context | None = None
) -> AsyncIterator[str | Verdict]:
    """The settled pieces of a growing text, the closing lines, and at last the verdict.

    The pieces joined are `Verdict.streamed`. Reading of `deltas` ends as soon as the text is stopped.
    """
    guard = Guard(rules, context)
    async for delta in deltas:
        if piece := guard.feed(delta):
            yield piece
        if guard.stopped:
            break
    piece, verdict = await guard.finish()
    if piece:
        yield piece
    if closing := verdict.closing:
        yield closing
    yield verdict


def _in_scope(scope: Scope, messages: Sequence[Message]) -> list[int]:
    users = [i for i, message in enumerate(messages) if message.role == "user"]
    if scope == "all":
        return list(range(len(messages)))
    return users if scope == "user" else users[-1:]


async def judge_messages(
    rules: Sequence[Rule], messages: Sequence[Message], context: Context | None = None, trusted: int = 0
) -> tuple[Verdict, tuple[Message, ...]]:
    """(the verdict on a conversation, the conversation as the model may see it).

    The strictest action over all rules and messages decides. The first `trusted` messages are history that this
    service has judged and answered before: they are redacted, but do not stop the turn again. A question that was
    answered by a rule's own reply is taken out together with that reply: the model does not see it, and the
    conversation goes on. `Verdict.text` is the rule's reply for a stop, else the last user message, redacted.
    """
    context = context or Context(tuple(messages))
    kept = list(messages)
    settled = _refused_before(rules, messages)
    hits: list[Hit] = []
    redactions: dict[int, list[_Redaction]] = {}
    for rule in rules:
        places = [i for i in _in_scope(rule.scope, messages) if i not in settled]
        if rule.action is not Action.REDACT:
            places = [i for i in places if i >= trusted]
        results = [await _find(rule, messages[i].content, context) for i in places]
        for i, (findings, broken) in zip(places, results, strict=True):
            if findings or broken:
                action = rule.if_broken if broken else rule.action
                hits.append(Hit(rule.name, action, rule.mode, tuple(findings), broken, i))
            if rule.action is Action.REDACT and rule.mode == "enforce":
                for finding in findings:
                    insort(redactions.setdefault(i, []), _Redaction.of(rule, finding))
    for i, found in redactions.items():
        text = messages[i].content
        kept[i] = replace(messages[i], content=_redact(text, found, 0, 0, len(text))[0])
    seen = tuple(message for i, message in enumerate(kept) if i not in settled)
    return _input_verdict(rules, hits, seen), seen


def _refused_before(rules: Sequence[Rule], messages: Sequence[Message]) -> set[int]:
    """The places of questions that were answered by a rule's own reply, and of those replies.

    A person's answer may stand before the reply, and a ticket's number after it. A question that no rule could read
    counts too: nothing is known about it.
    """
    replies = [BROKEN_REPLY, *(rule.reply for rule in rules if rule.action.stops and rule.reply)]
    out: set[int] = set()
    for i in range(1, len(messages)):
        asked, answered = messages[i - 1], messages[i]
        if asked.role == "user" and answered.role == "assistant":
            out |= {i - 1, i} if any(reply in answered.content for reply in replies) else set()
    return out


def _input_verdict(rules: Sequence[Rule], hits: Sequence[Hit], seen: Sequence[Message]) -> Verdict:
    by_name = {rule.name: rule for rule in rules}
    enforced = [hit for hit in hits if hit.mode == "enforce"]
    action = max((hit.action for hit in enforced), default=Action.ALLOW)
    strictest = [hit for hit in enforced if hit.action is action and action]
    decider = min(strictest, key=lambda hit: bool(hit.broken), default=None)  # a rule's own reply says more
    last = next((message.content for message in reversed(seen) if message.role == "user"), "")
    if decider is None or not action.stops:
        return Verdict(action, last, rule=decider.rule if decider else "", hits=tuple(hits))
    rule = by_name[decider.rule]
    reply = BROKEN_REPLY if decider.broken else rule.reply
    route = rule.route if action is Action.ESCALATE else ""
    return Verdict(action, reply, rule=rule.name, route=route, hits=tuple(hits))


def appended(rules: Sequence[Rule], verdict: Verdict) -> list[str]:
    """The lines that an input verdict adds to the end of the reply, in rule order."""
    fired = {hit.rule for hit in verdict.hits if hit.mode == "enforce" and hit.action is Action.APPEND}
    return list(dict.fromkeys(rule.reply for rule in rules if rule.name in fired))
