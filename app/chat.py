"""One chat request, from top to bottom: nothing reaches the model or the client past a guard."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from app import desk
from app.backends import BackendError, Prompt
from app.errors import ApiError, unavailable
from app.logs import event
from app.records import Tenant, Ticket, Turn, new_id
from app.schemas import ChatRequest
from app.service import Service
from app.store import SpillFull, StoreDown
from guardrails.engine import Guard, appended, judge_messages
from guardrails.types import Action, Context, Message, Policy, Verdict

UNSTORED = "This turn cannot be recorded just now, so it was not answered. Please try again in a moment."


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that the client may see now."""

    text: str


@dataclass(frozen=True, slots=True)
class Fault:
    """The reply broke off after its first piece: what to tell the client."""

    error: ApiError


Event = Piece | Fault | Turn


async def answer(service: Service, tenant: Tenant, turn: Turn, request: ChatRequest) -> AsyncGenerator[Event, None]:
    """The settled pieces of the reply, and at last the finished turn (or a Fault).

    Raises ApiError as long as nothing has been said. When the generator is closed early, because the client went
    away, the engine's work is cancelled and the turn is recorded as it stands. A turn is on record before its last
    piece is given out.
    """
    started = time.perf_counter()
    policy = await service.policies.of(tenant.policy)
    turn.policy = policy.id
    messages = tuple(message.message for message in request.messages)
    trusted = await _recognise(service, turn, messages)
    news = await _news(service, turn)
    context = Context(messages, service.backend)

    verdict, seen = await judge_messages(policy.input, messages, context, trusted)
    service.metrics.guard.labels("input").observe(time.perf_counter() - started)
    _note_input(turn, messages, verdict, seen)
    await _begin(service, tenant, turn)

    reply = _Reply(service, policy, turn, context, started)
    given = False
    try:
        if greeting := _greeting(news):
            given = True
            yield reply.say(greeting)
        if verdict.action.stops:
            last = await reply.stop(verdict)
        else:
            prompt = Prompt(_prompt(policy, seen, news), request.sampling())
            async for piece in reply.generate(prompt):
                given = True
                yield piece
            last = await reply.finish(verdict)
        await reply.close()
        await _delivered(service, news, turn)
        yield last
        yield turn
    except Exception as error:
        fault = _as_api_error(error, service)
        turn.error = fault.code
        await reply.close()
        if not given:
            raise fault from None
        yield Fault(fault)
    finally:
        if not reply.closed:
            turn.error = "client_gone"
            service.spawn(reply.close())


class _Reply:
    """What is being said in one turn. A client that does not stream is given nothing before the verdict."""

    def __init__(self, service: Service, policy: Policy, turn: Turn, context: Context, started: float):
        self._service, self._policy, self._turn, self._started = service, policy, turn, started
        self._messages = context.messages
        self._said: list[str] = []
        self._guard = Guard(policy.output, context)
        self._judging = 0.0
        self.closed = False

    def say(self, text: str) -> Piece:
        """The text as a piece, noted as said."""
        self._said.append(text)
        return Piece(text)

    async def stop(self, verdict: Verdict, lead: str = "") -> Piece:
        """The reply of a rule, with a ticket's number when a person takes over."""
        turn = self._turn
        turn.action, turn.rule = verdict.action.word, verdict.rule
        turn.finish_reason = "content_filter" if verdict.action is Action.REFUSE else "stop"
        lines = [verdict.text]
        if verdict.action is Action.ESCALATE:
            turn.ticket, line = await _hand_over(self._service, self._policy, turn, verdict)
            lines.append(line)
        return self.say(lead + "\n\n".join(filter(None, lines)))

    async def generate(self, prompt: Prompt) -> AsyncGenerator[Piece, None]:
        """The settled pieces of the model's reply, until its end or until a rule stops it."""
        turn = self._turn
        deltas = self._service.backend.stream(prompt)
        try:
            async for delta in deltas:
                if turn.first_token_ms is None and delta.text:
                    turn.first_token_ms = self._elapsed()
                turn.prompt_tokens = delta.prompt_tokens or turn.prompt_tokens
                turn.completion_tokens = delta.completion_tokens or turn.completion_tokens
                turn.finish_reason = delta.finish_reason or turn.finish_reason
                began = time.perf_counter()
                piece = self._guard.feed(delta.text)
                self._judging += time.perf_counter() - began
                if piece and turn.streamed:
                    yield self.say(piece)
                if self._guard.stopped:
                    break
        finally:
            await deltas.aclose()

    async def finish(self, asked: Verdict) -> Piece:
        """The end of the model's reply: its last words, what the rules add, or what they say instead."""
        turn = self._turn
        began = time.perf_counter()
        last, verdict = await self._guard.finish()
        self._service.metrics.guard.labels("output").observe(self._judging + time.perf_counter() - began)
        turn.output = verdict
        turn.withheld_said = self._guard.draft if verdict.action >= Action.REDACT else ""
        if not turn.streamed:
            last = "" if verdict.action.stops else verdict.kept
        if verdict.action.stops:
            return await self.stop(verdict, f"{last}\n\n" if last or (turn.streamed and verdict.kept) else "")
        strictest = max(verdict, asked, key=lambda one: one.action)
        turn.action, turn.rule = strictest.action.word, strictest.rule
        closing = verdict.closing
        lines = [line for line in appended(self._policy.input, asked) if line not in closing]
        return self.say(last + closing + "".join(f"\n\n{line}" for line in lines))

    async def close(self) -> None:
        """Records the turn as it was said; counts it and logs it, without its text."""
        if self.closed:
            return
        self.closed = True
        turn = self._turn
        turn.said = "".join(self._said)
        turn.total_ms = self._elapsed()
        if turn.output is None:
            turn.withheld_said = self._guard.draft
        if turn.said and not turn.error:
            after = (*self._messages, Message("assistant", turn.said))
            turn.tail_hash = self._service.fingerprint(turn.tenant, after)
        await _record(self._service, turn)

    def _elapsed(self) -> float:
        return round((time.perf_counter() - self._started) * 1000, 3)


async def _recognise(service: Service, turn: Turn, messages: Sequence[Message]) -> int:
    """The number of leading messages that this service has judged and said before.

    A history is known by the fingerprint that its last turn left. It also tells the conversation of a client that
    names none.
    """
    places = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if places:
        known = messages[: places[-1] + 1]
        turn.head_hash = service.fingerprint(turn.tenant, known)
        try:
            conversation = await service.store.conversation_after(turn.tenant, turn.head_hash)
        except StoreDown:
            conversation = None
        if conversation:
            turn.conversation = turn.conversation or conversation
            return len(known)
    turn.conversation = turn.conversation or new_id("conv_")
    return 0


async def _news(service: Service, turn: Turn) -> list[Ticket]:
    """Answers that people gave since this conversation's last turn."""
    try:
        return await service.store.undelivered_answers(turn.tenant, turn.conversation)
    except StoreDown:
        return []


def _greeting(news: Sequence[Ticket]) -> str:
    return "".join(
        f"A person from {ticket.queue} has answered your question ({ticket.id}):\n{ticket.answer}\n\n" for ticket in news
    )


async def _delivered(service: Service, news: Sequence[Ticket], turn: Turn) -> None:
    if not news:
        return
    try:
        await service.store.mark_delivered([ticket.id for ticket in news], turn.id)
    except StoreDown:
        event("answers_not_marked", logging.WARNING, turn=turn.id)


def _prompt(policy: Policy, seen: Sequence[Message], news: Sequence[Ticket]) -> tuple[Message, ...]:
    """The persona and the client's own system text as one system message, then the conversation."""
    system = [policy.persona, *(message.content for message in seen if message.role in ("system", "developer"))]
    told = [Message("assistant", _greeting(news).strip())] if news else []
    talk = [message for message in seen if message.role not in ("system", "developer")]
    head = "\n\n".join(text for text in system if text.strip())
    return tuple([*([Message("system", head)] if head else []), *talk[:-1], *told, *talk[-1:]])


def _note_input(turn: Turn, messages: Sequence[Message], verdict: Verdict, seen: Sequence[Message]) -> None:
    turn.input = verdict
    turn.history = tuple(seen[:-1])
    turn.asked = seen[-1].content
    raw = messages[-1].content
    turn.withheld_asked = raw if raw != turn.asked else ""


async def _hand_over(service: Service, policy: Policy, turn: Turn, verdict: Verdict) -> tuple[Ticket | None, str]:
    """(the new ticket, or None when a person has this conversation already; what the client is told)."""
    try:
        waiting = await service.store.open_ticket_of(turn.tenant, turn.conversation)
    except StoreDown:
        waiting = None
    if waiting:
        return None, f"A person already has this conversation. Your reference is {waiting.id}."
    ticket = desk.hand_over(turn, verdict, policy.routes[verdict.route])
    return ticket, f"Your reference is {ticket.id}."


async def _begin(service: Service, tenant: Tenant, turn: Turn) -> None:
    """Makes sure that the turn will be on record before anything is said, as its tenant wants it."""
    try:
        await service.store.begin(turn)
        return
    except StoreDown:
        service.metrics.store_errors.inc()
    if tenant.when_store_fails == "refuse":
        raise unavailable(UNSTORED, "store_down", 5)
    try:
        await service.store.spill(turn)
        service.metrics.spilled.inc()
    except SpillFull:
        raise unavailable(UNSTORED, "store_down", 30) from None


async def _record(service: Service, turn: Turn) -> None:
    """Stores the finished turn: in the database, else in the spill file; when both fail, that is said and counted."""
    service.metrics.count(turn)
    try:
        await service.store.finish(turn)
    except StoreDown:
        service.metrics.store_errors.inc()
        try:
            await service.store.spill(turn)
            service.metrics.spilled.inc()
        except SpillFull:
            service.metrics.lost.inc()
            event("turn_lost", logging.ERROR, turn=turn.id, tenant=turn.tenant)
            if turn.ticket:
                raise unavailable(UNSTORED, "store_down", 30) from None
    event(
        "turn",
        turn=turn.id,
        request=turn.request_id,
        conversation=turn.conversation,
        tenant=turn.tenant,
        policy=turn.policy,
        action=turn.action,
        rule=turn.rule,
        error=turn.error,
        ticket=turn.ticket.id if turn.ticket else "",
        tokens=turn.completion_tokens,
        first_token_ms=turn.first_token_ms,
        total_ms=turn.total_ms,
    )


def _as_api_error(error: Exception, service: Service) -> ApiError:
    """What the client is told of a failure: 400 for its own mistake, else 503 or 504; 500 is a fault of ours."""
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, BackendError):
        event("turn_failed", logging.ERROR, exc_info=error)
        return ApiError(500, "Something went wrong on our side.", code="internal_error", kind="server_error")
    if error.fault == "rejected":
        return ApiError(400, error.message, code=error.code or "invalid_value", param="messages")
    if error.fault == "timeout":
        return ApiError(504, error.message, code="engine_timeout", kind="server_error", retry_after=5)
    starting = service.engine.state != "ready"
    retry_after = service.engine.retry_after if starting else error.retry_after or 2
    return unavailable(error.message, f"engine_{error.fault}", retry_after)
