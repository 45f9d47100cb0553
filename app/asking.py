"""What is asked, judged: by rules now, by language models while the reply is already being made."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from app.records import Ticket, Turn
from app.service import Service
from app.store import StoreDown
from app.thread import SYSTEM, Thread
from guardrails.conversation import Judging
from guardrails.reading import LONG
from guardrails.types import Action, Context, Finding, Hit, Message, Policy, ToolMessage, Verdict
from guardrails.vault import NOTE, Vault

SEALING = 3
"""How often a turn is judged when other turns of its conversation give out the same placeholders at the same time."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The verdict on what is asked, the conversation as the model may see it, what placeholders in it stand for.

    seconds: how long it was judged.
    """

    judging: Judging
    verdict: Verdict
    seen: tuple[Message, ...]
    vault: Vault
    seconds: float = 0.0

    @property
    def context(self) -> Context:
        """What the rules of the reply may know."""
        context = self.judging.context
        return context if context.messages == self.seen else replace(context, messages=self.seen)


async def judged(service: Service, policy: Policy, turn: Turn, thread: Thread) -> Asked:
    """What is asked, judged and noted on the turn; a value of the vault is kept nowhere else, withheld or not."""
    began = time.perf_counter()
    judging, verdict, seen, vault = await _sealed(service, policy, turn, thread)
    asked = Asked(judging, verdict, seen, vault, time.perf_counter() - began)
    service.metrics.guarded("input", asked.seconds)
    if thread.forged:
        service.metrics.forged.inc()
        place = Hit("conversation-record", Action.ALLOW, "enforce", (Finding("forged_history", 0, 0),))
        verdict = replace(verdict, hits=(place, *verdict.hits))
    kept = tuple([message for message in seen if not _defines(message)])
    if kept[-1].role == "user":
        turn.history, turn.asked = kept[:-1], kept[-1].content
    else:
        turn.history = kept
    turn.input = replace(verdict, hits=_placed(verdict.hits, judging)) if verdict.hits else verdict
    new = [message.content for message in turn.results] or [turn.asked]
    raw = [await _hidden(vault, one.content, everywhere=True) for one in thread.messages[-len(new) :]]
    turn.withheld_asked = "\n\n".join(raw) if raw != new else ""
    return asked


def _defines(message: Message) -> bool:
    """True for the definition of a tool, or of the shape of a reply: no message of the conversation."""
    return isinstance(message, ToolMessage) and message.role in SYSTEM


def definitions(messages: Sequence[Message]) -> list[ToolMessage]:
    """The definitions among the messages: of tools, and of the shape of a reply."""
    return [one for one in messages if isinstance(one, ToolMessage) and _defines(one)]


def _placed(hits: Sequence[Hit], judging: Judging) -> tuple[Hit, ...]:
    """The hits with their places in the conversation that is kept; -1 for what is not in it.

    Definitions are not, nor are questions that were taken out together with a rule's reply.
    """
    places, place = {-1: -1}, 0
    for i, message in enumerate(judging.messages):
        kept = not _defines(message) and i not in judging.settled
        places[i] = place if kept else -1
        place += kept
    return tuple(replace(hit, message=places[hit.message]) for hit in hits)


_Judged = tuple[Judging, Verdict, tuple[Message, ...], Vault]


async def _sealed(service: Service, policy: Policy, turn: Turn, thread: Thread) -> _Judged:
    """What is asked, judged, its values in the vault; while the database is down they are redacted for good.

    Rules that ask a language model are read while the reply is already being made (`judged_on`), unless they redact:
    then the model must not see what they have not read.
    """

    async def judged(vault: Vault) -> _Judged:
        context = Context(thread.messages, service.fleet, policy.persona, service.judges.of_turn(), vault)
        judging = Judging(policy.input, thread.messages, context, thread.trusted)
        verdict, seen = await judging.begin()
        if any(rule.action is Action.REDACT for rule in judging.waiting):
            verdict, seen = await judging.finish()
        if vault.values:
            seen = tuple([replace(message, content=await _hidden(vault, message.content)) for message in seen])
        return judging, verdict, seen, vault

    try:
        for _ in range(SEALING if any(rule.vault for rule in policy.input) else 0):
            found = await judged(vault := await service.vaults.open(turn, thread.messages))
            if await service.vaults.keep(turn, vault):
                return found
    except StoreDown:
        service.metrics.store_errors.inc()
    return await judged(Vault(room=0))


async def judged_on(service: Service, turn: Turn, judging: Judging) -> Verdict:
    """The verdict on what is asked once the rules that ask a language model are read, too."""
    began = time.perf_counter()
    verdict, _ = await judging.finish()
    service.metrics.guarded("input", time.perf_counter() - began)
    before, hits = turn.input.hits if turn.input else (), _placed(verdict.hits, judging)
    turn.input = replace(verdict, hits=tuple(dict.fromkeys((*before, *hits))))
    return turn.input


async def _hidden(vault: Vault, text: str, everywhere: bool = False) -> str:
    """`Vault.hide`, aside for a long text, so that other requests go on."""
    if len(text) <= LONG:
        return vault.hide(text, everywhere)
    return await asyncio.to_thread(vault.hide, text, everywhere)


def prompted(policy: Policy, asked: Asked, news: Sequence[Ticket]) -> tuple[Message, ...]:
    """The persona and the client's own system text as one system message, then the conversation.

    What people answered stands in it without the words that announce a person, lest the model imitate them.
    """
    system, talk = [policy.persona], list[Message]()
    for one in asked.seen:
        if one.role not in SYSTEM:
            talk.append(one)
        elif not _defines(one):
            system.append(one.content)
    system += [NOTE] if asked.vault.values else []
    head = "\n\n".join([text for text in system if text.strip()])
    before = (Message("system", head),) if head else ()
    if not news:
        return (*before, *talk)
    told = Message("assistant", "\n\n".join(ticket.answer for ticket in news))
    last = max((place for place, message in enumerate(talk) if message.role == "user"), default=0)
    return (*before, *talk[:last], told, *talk[last:])
