"""A reply that is more than one text: what is said, the reasoning before it, the arguments of tool calls.

Every one of them passes the same rules, each as a text of its own; a stop in any of them ends the whole reply. A
validator may say by `channels` what it reads: a JSON schema is for what is said, an allow-list of tools for calls.

Invariant: what is released of a channel is the beginning of what its rules would deliver of it alone, and all of it
where nothing stops the reply, for any pieces in any order.
"""

from __future__ import annotations

import asyncio
import json
from bisect import insort
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from guardrails.arguments import Arguments
from guardrails.engine import Guard, judge
from guardrails.plan import plan_of
from guardrails.types import Action, Context, Hit, Rule, Verdict

T = TypeVar("T")
CONTENT, REASONING, ARGUMENTS, CALL = "content", "reasoning", "arguments", "call"
NOT_OFFERED = "tool-not-offered"
"""What stops a reply that calls a tool which it was not offered, as a rule's name."""
NOT_OFFERED_REPLY = "The answer was stopped, because it would have used a tool that it was not given."


UNDECIDED = Verdict(Action.ALLOW, "")


class Piece(NamedTuple):
    """What may be released in a channel now; the first piece of a tool call has its `name`."""

    channel: str
    text: str
    name: str = ""


class Reply:
    """One reply on its way out: `feed` it the pieces of its channels, release what comes back, `finish`.

    A channel is `content`, `reasoning`, or `arguments:N` for the tool call of that number. offered: the tools that may
    be called. structured: what is said is JSON, as arguments are; nothing is appended to it. restored: the arguments
    as the tool gets them, for the rules that read whole calls; where there are such rules, calls wait for the end.
    streamed: false where nothing is given out before the end: what is said, and nothing else, is then read in one go.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        context: Context | None = None,
        *,
        offered: Collection[str] = (),
        structured: bool = False,
        restored: Callable[[str], str] = str,
        streamed: bool = True,
    ):
        self._plan, self._context = plan_of(rules), context
        self._offered, self._structured, self._restored = offered, structured, restored
        self._call_rules = self._plan.of_channel(CALL)
        self._held = any(rule.mode == "enforce" for rule in self._call_rules)
        self._parts: dict[str, _Part] = {}
        self._calls: list[str] = []
        self._streamed, self._unread = streamed, False
        self._stopped = ""
        self._unknown = False

    @property
    def stopped(self) -> bool:
        """True when nothing more will be released in any channel."""
        return bool(self._stopped)

    @property
    def asking(self) -> str:
        """The channel in which a rule waits to be asked about a sentence that is complete, or empty."""
        if self._stopped or not self._plan.sentences:
            return ""
        return next((name for name, part in self._parts.items() if part.guard.asking), "")

    @property
    def calls(self) -> list[str]:
        """The channels of the tool calls, in the order of their numbers."""
        return self._calls

    @property
    def called(self) -> list[str]:
        """Those of them that were given out, whole or in part."""
        return [name for name in self.calls if self._parts[name].opened]

    @property
    def whole(self) -> list[Piece]:
        """All that was released, as it is given out by whoever does not stream."""
        said = [Piece(name, self.released(name)) for name in (REASONING, CONTENT)]
        return [*said, *(Piece(name, self.released(name), self.name(name)) for name in self.called)]

    @property
    def withheld(self) -> str:
        """What the model has said, as it was written, and of the rest what was not given out so."""
        titles = {REASONING: REASONING} | {name: f"{CALL} {self.name(name)}" for name in self.calls}
        changed = [name for name in titles if self.draft(name) != self.released(name)]
        other = (f"[{titles[name]}]\n{self.draft(name)}" for name in changed)
        return "\n\n".join(filter(None, [self.draft(), *other]))

    def name(self, channel: str) -> str:
        """The name of the tool that is called in this channel."""
        return self._parts[channel].name

    def draft(self, channel: str = CONTENT) -> str:
        """Everything that was fed to a channel, as it was written (escapes in JSON apart)."""
        return self._parts[channel].guard.draft if channel in self._parts else ""

    def released(self, channel: str = CONTENT) -> str:
        """Everything that was released in a channel."""
        return "".join(self._parts[channel].given) if channel in self._parts else ""

    def cursor(self, channel: str = CONTENT) -> int:
        """How many characters of a channel's draft have been released, or were redacted, by its rules."""
        return self._parts[channel].guard.cursor if channel in self._parts else 0

    def redacted(self, channel: str = CONTENT) -> list[tuple[int, int]]:
        """(start, end) of the parts of the draft up to the cursor that were not released as they are."""
        return self._parts[channel].guard.redacted if channel in self._parts else []

    def feed(self, channel: str, delta: str, name: str = "") -> list[Piece]:
        """What may be released now that `delta` has come, and with it perhaps a part of the name of the tool.

        A name ends where its arguments begin.
        """
        if self._unread and channel != CONTENT:
            return [*self._read(), *self.feed(channel, delta, name)]
        if self._stopped:
            return []
        part = self._parts.get(channel) or self._part(channel)
        if part.calls:
            if not part.begun:
                part.name += name
            if delta and not self._begin(channel, part):
                return []
        return self._release(channel, part.feed(delta)) if delta else []

    async def ask(self) -> list[Piece]:
        """What may be released now that the rules that read sentences have been asked about a complete one."""
        name = self.asking
        return self._release(name, await self._parts[name].guard.ask()) if name else []

    async def finish(self) -> tuple[list[Piece], Verdict]:
        """(the last piece of each channel, the verdict on the reply): everything ends here."""
        if not (self._stopped or self._parts.keys() - {CONTENT}):
            return await self._end_of_said()
        calls = self._calls
        for name in calls:
            if not self.stopped:
                self._begin(name, self._parts[name])
        if not (calls or CONTENT in self._parts):
            self._part(CONTENT)
        if self._stopped:
            return await self._end_of_stopped(), self._stop_verdict()
        names = sorted((name for name in self._parts if not self._silent(name)), key=_order)
        lasts = await _each([self._parts[name].finish() for name in names])
        stops = [name for name in names if self._parts[name].verdict.action.stops]
        if stops:
            self._stopped = max(stops, key=lambda name: self._parts[name].verdict.action)
            last = dict(zip(names, lasts, strict=True))[self._stopped]
            return self._give(self._stopped, last), self._stop_verdict()
        await _each([self._judge_call(self._parts[name]) for name in calls])
        if refused := [name for name in calls if self._parts[name].call.action.stops]:
            self._stopped = max(refused, key=lambda name: self._parts[name].call.action)
            return [], self._stop_verdict()
        pieces = [piece for name, last in zip(names, lasts, strict=True) for piece in self._give(name, last, True)]
        return pieces, self._verdict()

    async def _end_of_said(self) -> tuple[list[Piece], Verdict]:
        """What `finish` returns for a reply that has no channel but what is said."""
        part = self._parts.get(CONTENT) or self._part(CONTENT)
        last = await part.finish()
        if part.verdict.action.stops:
            self._stopped = CONTENT
            return self._give(CONTENT, last), self._stop_verdict()
        return self._give(CONTENT, last, True), self._verdict()

    def _part(self, channel: str) -> _Part:
        """A new channel."""
        kind = ARGUMENTS if _is_call(channel) else channel
        in_json = kind == ARGUMENTS or (self._structured and kind == CONTENT)
        self._unread = channel == CONTENT and not (self._streamed or self._parts)
        if kind == ARGUMENTS:
            insort(self._calls, channel, key=_order)
        part = _Part(self._plan.of_channel(kind), self._context, kind == ARGUMENTS, in_json, not self._unread)
        self._parts[channel] = part
        return part

    def _read(self) -> list[Piece]:
        """What may be released of what is said, which is not all any more: it is read as if it were streamed."""
        self._unread = False
        return self._release(CONTENT, self._parts[CONTENT].guard.grow())

    def _silent(self, channel: str) -> bool:
        """True for the white space that a model may write beside its tool calls: nothing is said there."""
        return channel == CONTENT and bool(self._calls) and not self.draft().strip()

    def _begin(self, channel: str, part: _Part) -> bool:
        """True when the tool of this call, whose name is complete now, may be called."""
        part.begun = True
        if part.name not in self._offered:
            self._stopped, self._unknown = channel, True
        return not self.stopped

    def _release(self, channel: str, text: str) -> list[Piece]:
        if self._parts[channel].guard.stopped:
            self._stopped = channel
        return self._give(channel, text)

    def _give(self, channel: str, text: str, final: bool = False) -> list[Piece]:
        """What is given out of a channel now that its rules have released `text`: calls may have to wait for the end.

        A call that its rules want to have redacted is left out.
        """
        part = self._parts[channel]
        if not part.calls:
            part.given.append(text)
            return [Piece(channel, text)] if text else []
        if not (text or part.waiting or final):
            return []
        part.waiting += text
        if part.call.action is Action.REDACT or (self._held and not final):
            return []
        opening = part.name if final or part.waiting else ""
        piece = Piece(channel, part.waiting, "" if part.opened else opening)
        part.given.append(part.waiting)
        part.waiting = ""
        part.opened = part.opened or bool(piece.name)
        return [piece] if piece.text or piece.name else []

    async def _judge_call(self, part: _Part) -> None:
        call = {"name": part.name, "arguments": self._restored(part.verdict.kept)}
        part.call = await judge(self._call_rules, json.dumps(call, ensure_ascii=False), self._context)

    async def _end_of_stopped(self) -> list[Piece]:
        part = self._parts[self._stopped]
        return [] if self._unknown else self._give(self._stopped, await part.finish())

    def _stop_verdict(self) -> Verdict:
        part = self._parts[self._stopped]
        stop = part.call if part.call.action.stops else part.verdict
        hits = self._hits()
        if self._unknown:
            stop = Verdict(Action.REFUSE, NOT_OFFERED_REPLY, rule=NOT_OFFERED)
            hits = (Hit(NOT_OFFERED, Action.REFUSE, "enforce"), *hits)
        return Verdict(stop.action, stop.text, self.released(), stop.rule, stop.route, hits)

    def _verdict(self) -> Verdict:
        """The verdict on a reply that nothing stops: lines are appended to what is said only."""
        if CONTENT in self._parts and not self._silent(CONTENT):
            said = self._parts[CONTENT].verdict
        else:
            said = Verdict(Action.ALLOW, self.released(), self.released())
        if list(self._parts) == [CONTENT]:
            return replace(said, text=said.kept) if self._structured else said
        verdicts = [said, *(verdict for part in self._parts.values() for verdict in (part.verdict, part.call))]
        strictest = max(verdicts, key=lambda verdict: verdict.action if verdict.action > Action.APPEND else 0)
        decider = strictest if strictest.action > max(said.action, Action.APPEND) else said
        text = said.kept if self._structured else said.text
        return Verdict(decider.action, text, said.kept, decider.rule, hits=self._hits())

    def _hits(self) -> tuple[Hit, ...]:
        """What every rule saw in any channel."""
        parts = [self._parts[name] for name in sorted(self._parts, key=_order)]
        return tuple(hit for part in parts for hit in (*part.guard.hits(), *part.call.hits))


async def _each(jobs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What they return, in their order; more than one at once."""
    return [await job for job in jobs] if len(jobs) < 2 else await asyncio.gather(*jobs)


class _Part:
    """One channel: its guard, what was given out of it, and what was decided about it at its end.

    calls: whether it is a tool call. waiting: what of one its rules have released and is not given out yet. call: the
    verdict on the whole of it. begun: its arguments have begun; opened: its name was given out.
    """

    __slots__ = ("_json", "begun", "call", "calls", "given", "guard", "name", "opened", "verdict", "waiting")

    def __init__(self, rules: Sequence[Rule], context: Context | None, calls: bool, in_json: bool, growing: bool):
        self.calls, self._json = calls, Arguments() if in_json else None
        self.guard = Guard(rules, context, self._json.placeholder if self._json else None, growing)
        self.verdict = self.call = UNDECIDED
        self.given = list[str]()
        self.waiting = self.name = ""
        self.begun = self.opened = False

    def feed(self, delta: str) -> str:
        """What its rules release now."""
        return self.guard.feed(self._json.feed(delta) if self._json else delta)

    async def finish(self) -> str:
        """What its rules release at the end; `verdict` is the one on all of it then."""
        rest = self.guard.feed(self._json.finish()) if self._json else ""
        last, self.verdict = await self.guard.finish()
        return rest + last


def _is_call(channel: str) -> bool:
    return channel.startswith(ARGUMENTS)


def _order(channel: str) -> tuple[int, int]:
    kind, _, number = channel.partition(":")
    return (REASONING, CONTENT, ARGUMENTS).index(kind), int(number or 0)
