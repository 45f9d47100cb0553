"""Judging a text, whole or while it streams.

Invariant: for any chunking, what a stream has released at its end is `Verdict.streamed` of the whole text, and no
character of a stopped or redacted span is ever released. It holds because a stream releases only up to the smallest
`settled` of its rules, over the text and over its views, and because the first stop by place decides, not the first by
time.

Rules that can only read a whole text make the stream wait and are asked last, and only when no cheaper rule has
stopped the text; where there are such rules, a stopped text keeps nothing of the draft. A rule with
`every = "sentence"` is asked about each sentence as it is completed, and the stream waits no longer than that.
"""

from __future__ import annotations

import asyncio
from bisect import insort
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from guardrails.plan import plan_of
from guardrails.reading import Reader, Readers, Together
from guardrails.types import BROKEN_REPLY, Action, Context, Finding, Hit, Placeholders, Rule, Verdict
from guardrails.views import Views

Write = Callable[[str, int, int], str]
"""How a placeholder is written in the place of `text[start:end]`."""
NOTHING = Context()
"""What is known beside a text that stands alone."""


@dataclass(frozen=True, slots=True, order=True)
class Redaction:
    """A place that is not shown, and what stands for it; the first by place, then the longest."""

    start: int
    minus_end: int
    placeholder: str

    @classmethod
    def of(cls, rule: Rule, finding: Finding, text: str = "", vault: Placeholders | None = None) -> Redaction:
        """The redaction of a finding: for good, or, where the rule says so, with a placeholder of the vault."""
        placeholder = rule.placeholder or f"[{finding.label.upper()}]"
        if rule.vault and vault is not None:
            placeholder = vault.placeholder(finding.label, text[finding.start : finding.end])
        return cls(finding.start, -finding.end, placeholder)

    def written(self, write: Write | None) -> Redaction:
        """The redaction with its placeholder as it is written in its place."""
        return replace(self, placeholder=write(self.placeholder, self.start, -self.minus_end)) if write else self


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


def _stops(reader: Reader, findings: Iterable[Finding]) -> list[_Stop]:
    """The places at which this rule stops the text, if it does."""
    rule = reader.rule
    if not reader.enforced:
        return []
    if reader.broken:
        stops = rule.if_broken.stops
        return [_Stop(reader.settled, -rule.if_broken, reader.order, rule, True)] if stops else []
    if not rule.action.stops:
        return []
    return [_Stop(finding.start, -rule.action, reader.order, rule) for finding in findings]


def _place(one: Finding) -> tuple[int, int, str]:
    return one.start, one.end, one.label


def _hit(reader: Reader, before: int) -> Hit | None:
    """What this rule saw up to `before`, or None when it saw nothing and did not break."""
    if not reader.findings and not reader.broken:
        return None
    findings = tuple(sorted((f for f in reader.findings if f.start <= before), key=_place))
    if not findings and not reader.broken:
        return None
    action = reader.rule.if_broken if reader.broken else reader.rule.action
    return Hit(reader.rule.name, action, reader.rule.mode, findings, reader.broken)


class Guard:
    """One text on its way out: `feed` it pieces, release what comes back, `finish` for the verdict.

    Where `asking` is true after `feed`, a rule is to be asked about whole sentences: `await ask()` for what that
    releases. write: how a placeholder is written in the place of `text[start:end]` (in JSON, say). growing: false for a
    text of which nothing is to be released before its end: it is read there, in one go (or from `grow` on).
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        context: Context | None = None,
        write: Write | None = None,
        growing: bool = True,
    ):
        self._plan = plan = plan_of(rules)
        self._context, self._write = context or NOTHING, write
        self._readers = readers = Readers(plan.rules)
        self._joint = [Together(joint, readers) for joint in plan.joints]
        self._single = [readers[place] for place in plan.single]
        self._sentences = [readers[place] for place in plan.sentences]
        self._held = plan.held
        self._growing = growing or bool(plan.sentences)
        self._views, self._moved = Views(), True
        self._text, self._half = "", ""
        self._cursor = 0
        self._kept: list[str] = []
        self._redactions: list[Redaction] = []
        self._next_redaction = 0
        self._stops: list[_Stop] = []
        self.stopped = False

    @property
    def draft(self) -> str:
        """Everything fed so far, as it was written."""
        return self._text

    @property
    def cursor(self) -> int:
        """How many characters of the draft have been released, or were redacted; the next is released after them."""
        return self._cursor

    @property
    def redacted(self) -> list[tuple[int, int]]:
        """(start, end) of the parts of `draft[:cursor]` that were not released as they are, in order, none touching."""
        parts: list[tuple[int, int]] = []
        for one in self._redactions[: self._next_redaction]:
            if parts and one.start < parts[-1][1]:
                parts[-1] = parts[-1][0], max(parts[-1][1], -one.minus_end)
            else:
                parts.append((one.start, -one.minus_end))
        return parts

    @property
    def asking(self) -> bool:
        """True where a rule waits to be asked about a sentence that is complete."""
        if not self._sentences or self.stopped:
            return False
        return any(reader.pieces(self._text, False) for reader in self._sentences)

    def feed(self, delta: str) -> str:
        """What may be released now that `delta` has come; `stopped` is true when nothing more ever will be."""
        if self.stopped:
            return ""
        self._text += delta if delta.isascii() and not self._half else self._mended(delta)
        return self._advance(final=False) if self._growing else ""

    def grow(self) -> str:
        """What may be released of a text that was not to be read before its end, and is from now on."""
        self._growing = True
        return self._advance(final=False) if self._text else ""

    def _mended(self, delta: str) -> str:
        """The new text with both halves of a character that came apart (UTF-16) as one; a first half waits."""
        delta = self._half + delta
        self._half = delta[-1] if "\ud800" <= delta[-1:] <= "\udbff" else ""
        whole = delta[: len(delta) - len(self._half)]
        return whole.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")

    async def ask(self, final: bool = False) -> str:
        """What may be released now that the rules that read sentences have been asked about the complete ones."""
        asked = [(reader, reader.pieces(self._text, final)) for reader in self._sentences]
        results = await asyncio.gather(*(reader.ask(self._text, pieces, self._context) for reader, pieces in asked))
        for (reader, _), findings in zip(asked, results, strict=True):
            self._note(reader, findings)
        return self._release(self._settled(final), final)

    async def finish(self, rest: str = "") -> tuple[str, Verdict]:
        """(the last piece of the text itself, the verdict): the text ends here, with `rest`."""
        if rest or self._half:
            self._text += self._mended(rest) + self._half
            self._half = ""
        piece = "" if self.stopped else self._advance(final=True)
        if self._sentences and not self.stopped:
            piece += await self.ask(final=True)
        if self._plan.whole and not self.stopped:
            readers = [self._readers[place] for place in self._plan.whole]
            asked = (reader.ask_whole(self._text, self._context) for reader in readers)
            for reader, findings in zip(readers, await asyncio.gather(*asked), strict=True):
                self._note(reader, findings)
            self._held = False
            piece += self._release(len(self._text), final=True)
        return piece, self.verdict()

    def _advance(self, final: bool) -> str:
        self._look(final)
        if not (self._moved or final or self._plan.others):
            return ""
        for joint in self._joint:
            if self._moved or final or not joint.viewed:
                for reader, found in joint.read(self._views, final):
                    self._note(reader, found)
        for reader in self._single:
            broken_before = reader.broken
            found = reader.read(self._views, final)
            if found or reader.broken != broken_before:
                self._note(reader, found)
        return self._release(self._settled(final), final and not self._sentences)

    def _look(self, final: bool) -> None:
        """Makes the views; text that cannot be made out breaks the rules that want to read them."""
        if not self._plan.viewed:
            self._views.raw.grow(self._text)
            return
        try:
            self._moved = self._views.grow(self._text, final)
        except Exception as error:
            self._moved = True
            self._views.raw.grow(self._text)
            kind = type(error).__name__
            for joint in self._joint:
                for reader in joint.give_up(kind) if joint.viewed else ():
                    self._note(reader, ())
            for reader in self._single:
                if reader.rule.views and not reader.broken:
                    reader.broken = kind
                    self._note(reader, ())

    def _settled(self, final: bool) -> int:
        """How much of the text every enforced rule has finished with, of those that read it while it grows."""
        settled = len(self._text)
        for joint in self._joint:
            if joint.settled < settled and joint.enforced and joint.left:
                settled = joint.settled
        for reader in (*self._single, *self._sentences):
            if reader.settled < settled and reader.enforced and not reader.broken:
                settled = reader.settled
        return settled

    def _note(self, reader: Reader, findings: Sequence[Finding]) -> None:
        for stop in _stops(reader, findings):
            insort(self._stops, stop)
        if reader.enforced and reader.rule.action is Action.REDACT:
            for finding in findings:
                insort(self._redactions, Redaction.of(reader.rule, finding).written(self._write))

    def _release(self, settled: int, final: bool) -> str:
        """The newly certain text; a stop that is certain ends it (a broken rule's stop is certain at once)."""
        upto = settled
        first = self._stops[0] if self._stops else None
        if first and (first.start < settled or final or first.broken):
            self.stopped = True
            upto = min(first.start, settled) if first.broken else first.start
        if self._held:
            return ""
        piece, self._cursor, self._next_redaction = redact(
            self._text, self._redactions, self._next_redaction, self._cursor, upto
        )
        self._kept.append(piece)
        return piece

    def verdict(self) -> Verdict:
        """The verdict as it stands; the one on the whole text is what `finish` returns."""
        stop = self._stops[0] if self.stopped else None
        before = stop.start if stop else len(self._text)
        hits = self._hits(before)
        kept = "".join(self._kept)
        if stop:
            route = stop.rule.route if stop.action is Action.ESCALATE else ""
            return Verdict(stop.action, stop.reply, kept, stop.rule.name, route, hits)
        return _delivered(kept, hits, self._plan.rules) if hits else Verdict(Action.ALLOW, kept, kept)

    def hits(self) -> tuple[Hit, ...]:
        """What the rules saw that counts by now, as in the verdict."""
        return self._hits(self._stops[0].start if self.stopped else len(self._text))

    def _hits(self, before: int) -> tuple[Hit, ...]:
        readers = [self._readers[place] for place in sorted(self._readers)]
        return tuple([hit for reader in readers if (hit := _hit(reader, before))])


def redact(text: str, redactions: Sequence[Redaction], index: int, cursor: int, upto: int) -> tuple[str, int, int]:
    """(`text[cursor:upto]` with its redactions, new cursor, index of the next redaction to look at)."""
    if index == len(redactions):
        return text[cursor:upto], max(cursor, upto), index
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


async def judge(rules: Sequence[Rule], text: str, context: Context | None = None) -> Verdict:
    """The verdict on a whole text."""
    return (await Guard(rules, context).finish(text))[1]


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
        if guard.asking and (piece := await guard.ask()):
            yield piece
        if guard.stopped:
            break
    piece, verdict = await guard.finish()
    if piece:
        yield piece
    if closing := verdict.closing:
        yield closing
    yield verdict
