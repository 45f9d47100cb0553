"""The conversation that a turn continues: what this service knows of it, whatever the client says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from app.errors import ApiError
from app.records import Ticket, Turn, row_id
from app.service import Service
from app.store import StoreDown
from guardrails.types import Message, ToolMessage
from guardrails.vault import may_be

REMEMBERED = 50
"""Turns of a conversation, the newest ones, that stand for its history."""
SYSTEM = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Thread:
    """What is known of the conversation that a turn continues.

    messages: the conversation that is judged and answered. trusted: how many leading ones this service has judged and
    said before. news: people's answers that were not said yet. named: the client says which conversation it is; one
    that does not may resend the words of another, so a ticket is its own only when its history holds the ticket's
    number. forged: the client put words into the assistant's mouth that this service never said.
    """

    messages: tuple[Message, ...]
    trusted: int
    named: bool
    heard: str
    news: tuple[Ticket, ...] = ()
    forged: bool = False

    def owns(self, ticket: Ticket) -> bool:
        """True when this client may hear of the ticket."""
        return self.named or ticket.id in self.heard

    @property
    def greeting(self) -> str:
        """What people answered since the last turn, as the client is told."""
        told = (f"A person from {one.queue} has answered your question ({one.id}):\n{one.answer}" for one in self.news)
        return "\n\n".join(told)


async def recall(service: Service, turn: Turn, messages: tuple[Message, ...], after: str = "") -> Thread:
    """The thread of this turn; gives the turn its conversation.

    after: the turn that this one goes on from, by its id; then `messages` are what is new. Raises ApiError 400 where it
    is not there, and StoreDown.

    A history is known by the fingerprint that its last turn left, which also tells the conversation of a client that
    names none. One that is not known, of a conversation that the client names and this service has on record, is
    replaced by that record. While the database is down nothing is recognised, and everything is judged anew.
    """
    if after:
        return await _continued(service, turn, messages, after)
    named = bool(turn.conversation)
    replies = [place for place, message in enumerate(messages) if message.role == "assistant"]
    heard = "\n".join(messages[place].content for place in replies)
    thread, news = Thread(messages, 0, named, heard), list[Ticket]()
    try:
        if replies:
            known = messages[: replies[-1] + 1]
            turn.head_hash = service.fingerprint(turn.tenant, turn.subject, known)
            if found := await service.store.turn_after(turn.tenant, turn.head_hash):
                thread = replace(thread, trusted=len(known))
                before, conversation = found
                turn.conversation = turn.conversation or conversation
                turn.parent = before if turn.conversation == conversation else ""
        if named and not thread.trusted:
            ended = await _ended_before(service, turn)
            said = [message for one in ended for message in one.exchange]
            on_record = _on_record(thread, said, bool(turn.subject))
            if on_record.trusted:
                turn.parent = ended[-1].id
            thread = on_record
        if turn.conversation:
            news = await service.store.undelivered_answers(turn.tenant, turn.conversation)
    except StoreDown:
        service.metrics.store_errors.inc()
    turn.conversation = turn.conversation or row_id("conv_")
    return replace(thread, news=tuple(ticket for ticket in news if thread.owns(ticket))) if news else thread


async def _continued(service: Service, turn: Turn, messages: tuple[Message, ...], after: str) -> Thread:
    """The thread of a turn that goes on from another one, whose id nobody knows but those who were told it."""
    last = await service.store.turn(after, turn.tenant)
    if last is None or not last.ended or last.error or last.subject != turn.subject:
        message = f"Previous response with id '{after}' not found."
        raise ApiError(400, message, code="previous_response_not_found", param="previous_response_id")
    turn.conversation, turn.parent = last.conversation, last.id
    before = {one.id: one for one in await _ended_before(service, turn)}
    way, id = list[Turn](), last.id
    while id in before:
        way.append(before.pop(id))
        id = way[-1].parent
    said = [message for one in reversed(way) for message in one.exchange]
    heard = "\n".join(one.content for one in said if one.role == "assistant")
    new = sorted(messages, key=lambda one: one.role not in SYSTEM)
    news = await service.store.undelivered_answers(turn.tenant, turn.conversation)
    return Thread((*said, *new), len(said), True, heard, tuple(news))


async def _ended_before(service: Service, turn: Turn) -> list[Turn]:
    """The newest turns of the conversation in which this person was told something."""
    before = await service.store.turns(turn.conversation, turn.tenant)
    mine = [one for one in before if one.subject == turn.subject and one.ended and not one.error]
    return [one for one in mine if one.said or one.calls][-REMEMBERED:]


def _on_record(thread: Thread, said: Sequence[Message], known: bool) -> Thread:
    """The thread with the record in place of the history that the client sent; its system messages are kept.

    A person that nobody knows (not `known`) must show a reply of the conversation: its name may have been guessed.
    """
    if not said:
        return thread
    replies = [place for place, message in enumerate(thread.messages) if message.role == "assistant"]
    new = thread.messages[replies[-1] + 1 :] if replies else thread.messages
    told = [message for message in thread.messages[: len(thread.messages) - len(new)] if message.role in SYSTEM]
    true = [place for place in replies if _is_ours(thread.messages[place], said)]
    forged = true != replies
    if not known and all(isinstance(thread.messages[place], ToolMessage) for place in true):
        return replace(thread, forged=forged)  # the arguments of a call, such as {}, are guessed as well
    return replace(thread, messages=(*said, *told, *new), trusted=len(said), forged=forged)


def _is_ours(reply: Message, said: Sequence[Message]) -> bool:
    """True for a reply, or a tool call, that we have given."""
    named = isinstance(reply, ToolMessage) and reply.name
    return any(
        one.role == "assistant"
        and (isinstance(one, ToolMessage) and one.name) == named
        and may_be(reply.content.strip(), one.content.strip())
        for one in said
    )
