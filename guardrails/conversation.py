"""Judging a conversation on its way in: everything that a client can send is read, whoever is said to have said it.

Cheap rules are read first, rules that ask a model last, and only where their answer could still change the verdict.
What is split over several messages is joined again, and what stands across a seam is found there.
"""

from __future__ import annotations

import asyncio
from bisect import insort
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from guardrails.arguments import Arguments
from guardrails.engine import Redaction, redact
from guardrails.plan import plan_of, tier
from guardrails.reading import LONG, Seen, find, once
from guardrails.types import (
    BROKEN_REPLY,
    Action,
    Context,
    Finding,
    Hit,
    Message,
    Rule,
    ToolMessage,
    Verdict,
)

JOINED_MESSAGES, JOINED_CHARACTERS = 16, 400
"""How many messages are joined, and how much of each: a longer one gives its beginning and its end."""
SCRAP, SCRAPS = 20, 4
"""Messages of up to so many characters are scraps, of which so many count as one; blank ones do not count."""
SEAMS = ("", "  ")
"""What is put between messages that are joined; two spaces also part letters that are spaced (`guardrails.views`)."""


class Judging:
    """One conversation and what its rules have found in it so far.

    `begin` reads the rules that cost little; where `waiting` then has rules, which ask a language model, `finish`
    reads those too. The first `trusted` messages are history that this service has judged and answered before: they
    are redacted, but do not stop the turn again; the question that a tool's result helps to answer is judged with each
    of them. A question that was answered by a rule's own reply is taken out together with that reply: the model does
    not see it, and the conversation goes on.
    """

    def __init__(
        self, rules: Sequence[Rule], messages: Sequence[Message], context: Context | None = None, trusted: int = 0
    ):
        self._plan = plan_of(rules)
        self.rules = self._plan.by_cost
        self.messages, self.trusted = messages, trusted
        self.context = context or Context(tuple(messages))
        self.settled = _refused_before(rules, messages)
        self.asked = _still_asked(messages)
        self.seen = [Seen(message.content, self._plan) for message in messages]
        self._hits: dict[str, list[Hit]] = {}
        self._redactions: dict[int, list[Redaction]] = {}
        self._in_scope: dict[tuple[str, int, bool], list[int]] = {}
        self._json: dict[int, Arguments] = {}
        self._sealed: tuple[Message, ...] = ()
        self._long = any(len(message.content) > LONG for message in messages)

    async def begin(self) -> tuple[Verdict, tuple[Message, ...]]:
        """(the verdict of the rules that cost little, the conversation as the model may see it)."""
        for rule in self._plan.cheap:
            if self._is_quiet(rule):
                continue
            idle = self._long and self.strictest.stops and rule.action <= self.strictest
            if not idle or rule.action is Action.REDACT:  # what is refused is kept, too
                await self._read(rule)
        if len(self.messages) > 1 and not self.strictest.stops:
            await self._read_joined(self._plan.cheap)
        if self._plan.asking:
            await self._ask(self._plan.asking)
        return self.verdict()

    @property
    def waiting(self) -> list[Rule]:
        """The rules that ask a language model and could still change the verdict."""
        return self._due(self._plan.asking_much) if self._plan.asking_much else []

    async def finish(self) -> tuple[Verdict, tuple[Message, ...]]:
        """(the verdict, the conversation as the model may see it)."""
        await self._ask(self.waiting)
        return self.verdict()

    def verdict(self) -> tuple[Verdict, tuple[Message, ...]]:
        """(the verdict as it stands, the conversation as the model may see it)."""
        seen = tuple(self._shown())
        hits = [hit for rule in self.rules for hit in self._hits.get(rule.name, ())] if self._hits else ()
        return _verdict(self.rules, hits, seen), seen

    @property
    def strictest(self) -> Action:
        """The strictest action that is certain by now."""
        enforced = (hit.action for hits in self._hits.values() for hit in hits if hit.mode == "enforce")
        return max(enforced, default=Action.ALLOW)

    def _due(self, rules: Sequence[Rule]) -> list[Rule]:
        """The rules that could change what is said or kept: all, until the turn is stopped; then those that are
        stricter, and those that redact."""
        stopped = self.strictest
        if not stopped.stops:
            return list(rules)
        enforced = [rule for rule in rules if rule.mode == "enforce"]
        return [rule for rule in enforced if rule.action > stopped or rule.action is Action.REDACT]

    async def _ask(self, rules: Sequence[Rule]) -> None:
        """Reads rules that ask a model: first those that redact, so that the others ask about what is left."""
        due = self._due(rules)
        if not due:
            return
        await asyncio.gather(*(self._read(rule) for rule in due if rule.action is Action.REDACT))
        if self.context.vault is not None and self._redactions:
            self._sealed = tuple(self._redacted(i) for i in range(len(self.messages)))
        await asyncio.gather(*(self._read(rule) for rule in due if rule.action is not Action.REDACT))

    def _is_quiet(self, rule: Rule) -> bool:
        """True where a rule is known to find nothing before it is read."""
        order = self._plan.places[id(rule)]
        return all(self.seen[place].is_quiet(order) for place in self._places(rule))

    async def _read(self, rule: Rule) -> None:
        places = self._places(rule)
        if tier(rule) <= 0:
            order = self._plan.places[id(rule)]
            places = [i for i in places if not self.seen[i].is_quiet(order)]
            results = [await find(rule, self.seen[i], self.context) for i in places]
        elif self._sealed and rule.action is not Action.REDACT:  # what a model is asked is a prompt, too
            context = replace(self.context, messages=self._sealed)
            results = await asyncio.gather(*(find(rule, Seen(self._sealed[i].content), context) for i in places))
        else:
            results = await asyncio.gather(*(find(rule, self.seen[i], self.context) for i in places))
        for place, (findings, broken) in zip(places, results, strict=True):
            self._note(rule, place, findings, broken)

    def _places(self, rule: Rule) -> Sequence[int]:
        """The places of the messages that a rule reads here."""
        key = (rule.scope, rule.window, rule.action is Action.REDACT)
        places = self._in_scope.get(key)
        if places is None:
            places = in_scope(rule, self.messages, self.settled)
            if rule.action is not Action.REDACT:
                places = [i for i in places if i >= self.trusted or i == self.asked]
            self._in_scope[key] = places
        return places

    def _note(self, rule: Rule, place: int, findings: Sequence[Finding], broken: str = "") -> None:
        if findings or broken:
            action = rule.if_broken if broken else rule.action
            hit = Hit(rule.name, action, rule.mode, tuple(findings), broken, place)
            self._hits.setdefault(rule.name, []).append(hit)
        if rule.action is Action.REDACT and rule.mode == "enforce":
            for finding in findings:
                message = self.messages[place]
                redaction = Redaction.of(rule, finding, message.content, self.context.vault)
                if isinstance(message, ToolMessage) and message.name:
                    redaction = redaction.written(self._in_json(place).placeholder)
                insort(self._redactions.setdefault(place, []), redaction)

    def _in_json(self, place: int) -> Arguments:
        """The arguments or the definition that this message holds, as JSON."""
        if place not in self._json:
            self._json[place] = Arguments()
            self._json[place].feed(self.messages[place].content, final=True)
        return self._json[place]

    async def _read_joined(self, rules: Sequence[Rule]) -> None:
        """Reads what the messages say together; only what stands across a seam, and ends in something new, counts."""
        everyone = [i for i, one in enumerate(self.messages) if i not in self.settled and one.content]
        users = [i for i in everyone if self.messages[i].role == "user"]
        rows = [_latest(self.messages, row) for row in ([users] if users == everyone else [users, everyone])]
        read = _joining(rules, rows, self.messages, self.settled)
        for row, seam in [(row, seam) for row in read for seam in SEAMS]:
            joined, pieces = _pieces(self.messages, row, seam)
            seen = Seen(joined, self._plan)
            for rule in read[row].values():
                if seen.is_quiet(self._plan.places[id(rule)]):
                    continue
                findings, broken = await find(rule, seen, self.context)
                if broken:
                    self._note(rule, row[-1], (), broken)
                known = {(hit.message, one.start) for hit in self._hits.get(rule.name, ()) for one in hit.findings}
                for place, parts in _across(findings, pieces, self.trusted, known).items():
                    self._note(rule, place, parts)

    def _shown(self) -> Iterable[Message]:
        """The conversation as the model may see it."""
        if not (self.settled or self._redactions):
            return self.messages
        return [self._redacted(i) for i in range(len(self.messages)) if i not in self.settled]

    def _redacted(self, place: int) -> Message:
        message, found = self.messages[place], self._redactions.get(place)
        text = message.content
        return replace(message, content=redact(text, found, 0, 0, len(text))[0]) if found else message


async def judge_messages(
    rules: Sequence[Rule], messages: Sequence[Message], context: Context | None = None, trusted: int = 0
) -> tuple[Verdict, tuple[Message, ...]]:
    """(the verdict on a conversation, the conversation as the model may see it); see `Judging`.

    The strictest action over all rules and messages decides. `Verdict.text` is the rule's reply for a stop, else the
    last user message, redacted. A rule that costs much and could not change the verdict any more is not read.
    """
    judging = Judging(rules, messages, context, trusted)
    await judging.begin()
    return await judging.finish()


def in_scope(rule: Rule, messages: Sequence[Message], without: Collection[int] = ()) -> list[int]:
    """The places of the messages that a rule reads: those of its scope, the last `window` of them.

    without: the places of messages that the model does not see; they do not count.
    """
    wanted = "user" if rule.scope == "last_user" else rule.scope
    every = wanted == "all"
    places = [i for i, message in enumerate(messages) if (every or message.role == wanted) and i not in without]
    last = 1 if rule.scope == "last_user" else rule.window
    return places[-last:] if last else places


# --- What is split over several messages ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a message in a joined text: `joined[at:at + len(text)]` is `message[start:][:len(text)]`."""

    message: int
    start: int
    text: str
    at: int


def _latest(messages: Sequence[Message], row: Sequence[int]) -> Sequence[int]:
    """The last of these messages, as many as are joined."""
    room = JOINED_MESSAGES * SCRAPS
    for n, i in enumerate(reversed(row)):
        room -= 0 if messages[i].content.isspace() else 1 if len(messages[i].content) <= SCRAP else SCRAPS
        if room < 0:
            return row[-n:]
    return row


def _pieces(messages: Sequence[Message], places: Sequence[int], seam: str) -> tuple[str, list[_Piece]]:
    """(the joined text, its pieces): short messages whole, of long ones both ends."""
    out, pieces, at = list[str](), list[_Piece](), 0
    for n, i in enumerate(places):
        text, half = messages[i].content, JOINED_CHARACTERS // 2
        cuts = [0] if len(text) <= JOINED_CHARACTERS else [0, len(text) - half]
        for cut in cuts:
            shown = text[cut:] if cut or len(cuts) == 1 else text[:half]
            gap = "\n\n\n" if cut else _gap(seam, out) if n else ""
            pieces.append(_Piece(i, cut, shown, at + len(gap)))
            out += (gap, shown)
            at += len(gap) + len(shown)
    return "".join(out), pieces


def _gap(seam: str, before: Sequence[str]) -> str:
    """The seam; a line end in place of nothing behind a message that ends its sentence."""
    return seam or ("\n" if before and before[-1].rstrip()[-1:] in tuple("?!.") else "")


def _joining(
    rules: Sequence[Rule], rows: Sequence[Sequence[int]], messages: Sequence[Message], without: Collection[int]
) -> Mapping[tuple[int, ...], Mapping[str, Rule]]:
    """The rules by name that read the messages of a row together: of each row a rule reads what is in its scope.

    What is redacted is not looked for in several people's words.
    """
    out: dict[tuple[int, ...], dict[str, Rule]] = {}
    for rule in rules:
        if rule.scope in ("assistant", "tool"):
            continue
        wide = replace(rule, scope="user") if rule.scope == "last_user" else rule
        scope = set(in_scope(wide, messages, without))
        for row in (tuple(i for i in row if i in scope) for row in rows):
            several = rule.action is not Action.REDACT or all(messages[i].role == "user" for i in row)
            if len(row) > 1 and several:
                out.setdefault(row, {})[rule.name] = rule
    return out


def _across(
    findings: Iterable[Finding], pieces: Sequence[_Piece], trusted: int, known: set[tuple[int, int]]
) -> Mapping[int, list[Finding]]:
    """The findings that begin in one message and end in a later, new one, as their parts by message.

    `known`: where single messages have findings; one that only goes on behind a seam is the same one.
    """
    out: dict[int, list[Finding]] = {}
    for one in findings:
        within = [piece for piece in pieces if piece.at < one.end and one.start < piece.at + len(piece.text)]
        parts = [_part(one, piece) for piece in within]
        if len({place for place, _ in parts}) < 2 or parts[-1][0] < trusted:
            continue
        if not any((place, part.start) in known for place, part in parts):
            for place, part in parts:
                out.setdefault(place, []).append(part)
    return {place: once(parts) for place, parts in out.items()}


def _part(one: Finding, piece: _Piece) -> tuple[int, Finding]:
    """(the message, the part of the finding that stands in it)."""
    start = max(one.start - piece.at, 0) + piece.start
    end = min(one.end - piece.at, len(piece.text)) + piece.start
    return piece.message, Finding(one.label, start, end, one.score, one.note or "joined")


# --- The verdict ------------------------------------------------------------------------------------------------------


def _refused_before(rules: Sequence[Rule], messages: Sequence[Message]) -> set[int]:
    """The places of questions that were answered by a rule's own reply, and of those replies.

    A person's answer may stand before the reply, and a ticket's number after it, as paragraphs of their own. A question
    that no rule could read counts too: nothing is known about it.
    """
    if len(messages) < 2:
        return set()
    replies = [BROKEN_REPLY, *(rule.reply.strip() for rule in rules if rule.action.stops and rule.reply.strip())]
    paragraphs = [f"\n\n{reply}\n\n" for reply in replies]
    out: set[int] = set()
    for i in range(1, len(messages)):
        asked, answered = messages[i - 1], messages[i]
        if asked.role == "user" and answered.role == "assistant" and not isinstance(answered, ToolMessage):
            said = f"\n\n{answered.content.strip()}\n\n"
            out |= {i - 1, i} if any(paragraph in said for paragraph in paragraphs) else set()
    return out


def _still_asked(messages: Sequence[Message]) -> int:
    """The place of the question that is still being answered where a tool's result comes last, else -1."""
    users = [i for i, message in enumerate(messages) if message.role == "user"]
    return users[-1] if users and messages[-1].role == "tool" else -1


def _verdict(rules: Sequence[Rule], hits: Sequence[Hit], seen: Sequence[Message]) -> Verdict:
    last = next((message.content for message in reversed(seen) if message.role == "user"), "")
    if not hits:
        return Verdict(Action.ALLOW, last)
    enforced = [hit for hit in hits if hit.mode == "enforce"]
    action = max((hit.action for hit in enforced), default=Action.ALLOW)
    strictest = [hit for hit in enforced if hit.action is action and action]
    decider = min(strictest, key=lambda hit: bool(hit.broken), default=None)  # a rule's own reply says more
    if decider is None or not action.stops:
        return Verdict(action, last, rule=decider.rule if decider else "", hits=tuple(hits))
    rule = next(rule for rule in rules if rule.name == decider.rule)
    reply = BROKEN_REPLY if decider.broken else rule.reply
    route = rule.route if action is Action.ESCALATE else ""
    return Verdict(action, reply, rule=rule.name, route=route, hits=tuple(hits))


def appended(rules: Sequence[Rule], verdict: Verdict) -> list[str]:
    """The lines that an input verdict adds to the end of the reply, in rule order."""
    fired = {hit.rule for hit in verdict.hits if hit.mode == "enforce" and hit.action is Action.APPEND}
    return list(dict.fromkeys(rule.reply for rule in rules if rule.name in fired))
