"""One chat request, from top to bottom: nothing reaches the model or the client past a guard."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from app import desk
from app.backends import BackendError, Prompt
from app.errors import ApiError, internal, unavailable
from app.logs import event
from app.records import Tenant, Ticket, Turn
from app.schemas import ChatRequest
from app.service import Service
from app.speculate import speculated
from app.store import SpillFull, StoreDown, StoreError
from app.thread import SYSTEM, Thread, recall
from guardrails.conversation import Judging, appended
from guardrails.engine import Guard
from guardrails.reading import LONG
from guardrails.types import Action, Context, Finding, Hit, Message, Policy, Verdict
from guardrails.vault import NOTE, Restorer, Vault

UNSTORED = "This turn cannot be recorded just now, so it was not answered. Please try again in a moment."
SEALING = 3
"""How often a turn is judged when other turns of its conversation give out the same placeholders at the same time."""


async def answer(service: Service, tenant: Tenant, turn: Turn, request: ChatRequest) -> AsyncGenerator[str, None]:
    """The settled pieces of the reply; at the end `turn` tells everything that was decided.

    Nothing is given out before the engine's first token, and a turn is on record before its last piece is given out.
    Raises ApiError. When the generator is closed early, because the client went away, the engine's work is cancelled
    and the turn is recorded as it stands.
    """
    started = time.perf_counter()
    policy = await service.policies.of(tenant.policy)
    turn.policy = policy.id
    thread = await recall(service, turn, tuple(message.message for message in request.messages))
    asked = await _judged(service, policy, turn, thread)
    verdict, judging = asked.verdict, asked.judging
    await _begin(service, tenant, turn)

    reply = _Reply(service, policy, turn, asked, thread, started)
    try:
        if verdict.action.stops:
            last = await reply.stop(verdict)
        else:
            prompt = Prompt(_prompt(policy, asked, thread.news), request.sampling())
            said: AsyncGenerator[str | Verdict, None] = reply.generate(prompt)
            if judging.waiting:
                said = speculated(_judged_on(service, turn, judging), said)
            async with aclosing(said) as pieces:
                async for piece in pieces:
                    if isinstance(piece, Verdict):
                        verdict = piece
                    else:
                        yield piece
            last = await (reply.stop(verdict) if verdict.action.stops else reply.finish(verdict))
        await reply.close()
        yield last
    except Exception as error:
        fault = _as_api_error(error, service)
        await reply.close(fault.code)
        raise fault from None
    finally:
        if not reply.closed:
            service.spawn(reply.close("client_gone"))


@dataclass(frozen=True, slots=True)
class _Asked:
    """The verdict on what is asked, the conversation as the model may see it, what placeholders in it stand for."""

    judging: Judging
    verdict: Verdict
    seen: tuple[Message, ...]
    vault: Vault


async def _judged(service: Service, policy: Policy, turn: Turn, thread: Thread) -> _Asked:
    """What is asked, judged and noted on the turn; a value of the vault is kept nowhere else, withheld or not."""
    began = time.perf_counter()
    asked = await _sealed(service, policy, turn, thread)
    verdict = asked.verdict
    service.metrics.guard.labels("input").observe(time.perf_counter() - began)
    if thread.forged:
        service.metrics.forged.inc()
        place = Hit("conversation-record", Action.ALLOW, "enforce", (Finding("forged_history", 0, 0),))
        verdict = replace(verdict, hits=(place, *verdict.hits))
    turn.input, turn.history, turn.asked = verdict, asked.seen[:-1], asked.seen[-1].content
    raw = await _hidden(asked.vault, thread.messages[-1].content, everywhere=True)
    turn.withheld_asked = raw if raw != turn.asked else ""
    return asked


async def _sealed(service: Service, policy: Policy, turn: Turn, thread: Thread) -> _Asked:
    """What is asked, judged, its values in the vault; while the database is down they are redacted for good.

    Rules that ask a language model are read while the reply is already being made (`_judged_on`), unless they redact:
    then the model must not see what they have not read.
    """

    async def judged(vault: Vault) -> _Asked:
        context = Context(thread.messages, service.backend, policy.persona, service.judges.of_turn(), vault)
        judging = Judging(policy.input, thread.messages, context, thread.trusted)
        verdict, seen = await judging.begin()
        if any(rule.action is Action.REDACT for rule in judging.waiting):
            verdict, seen = await judging.finish()
        hidden = [replace(message, content=await _hidden(vault, message.content)) for message in seen]
        return _Asked(judging, verdict, tuple(hidden), vault)

    try:
        for _ in range(SEALING if any(rule.vault for rule in policy.input) else 0):
            asked = await judged(await service.vaults.open(turn, thread.messages))
            if await service.vaults.keep(turn, asked.vault):
                return asked
    except StoreDown:
        service.metrics.store_errors.inc()
    return await judged(Vault(room=0))


async def _judged_on(service: Service, turn: Turn, judging: Judging) -> Verdict:
    """The verdict on what is asked once the rules that ask a language model are read, too."""
    began = time.perf_counter()
    verdict, _ = await judging.finish()
    service.metrics.guard.labels("input").observe(time.perf_counter() - began)
    before = turn.input.hits if turn.input else ()
    turn.input = replace(verdict, hits=tuple(dict.fromkeys((*before, *verdict.hits))))
    return turn.input


async def _hidden(vault: Vault, text: str, everywhere: bool = False) -> str:
    """`Vault.hide`, aside for a long text, so that other requests go on."""
    if len(text) <= LONG:
        return vault.hide(text, everywhere)
    return await asyncio.to_thread(vault.hide, text, everywhere)


def _prompt(policy: Policy, asked: _Asked, news: Sequence[Ticket]) -> tuple[Message, ...]:
    """The persona and the client's own system text as one system message, then the conversation.

    What people answered stands in it without the words that announce a person, lest the model imitate them.
    """
    seen = asked.seen
    system = [policy.persona, *(message.content for message in seen if message.role in SYSTEM)]
    system += [NOTE] if asked.vault.values else []
    head = "\n\n".join(text for text in system if text.strip())
    talk = [message for message in seen if message.role not in SYSTEM]
    told = [Message("assistant", "\n\n".join(ticket.answer for ticket in news))] if news else []
    return (*((Message("system", head),) if head else ()), *talk[:-1], *told, *talk[-1:])


class _Reply:
    """What is being said in one turn. A client that does not stream is given nothing before the verdict."""

    def __init__(self, service: Service, policy: Policy, turn: Turn, asked: _Asked, thread: Thread, started: float):
        self._service, self._policy, self._turn, self._thread = service, policy, turn, thread
        self._started = started
        self._lead = f"{thread.greeting}\n\n" if thread.news else ""
        self._said: list[str] = []
        self._told: list[str] = []
        self._restorer = Restorer(asked.vault.values)
        self._guard = Guard(policy.output, replace(asked.judging.context, messages=asked.seen))
        self._judging = 0.0
        self.closed = False

    def _say(self, text: str) -> str:
        """The text as the client is told it, after what has to be said before anything else.

        It is noted as said with placeholders; the client is told what they stand for.
        """
        piece, self._lead = self._lead + text, ""
        self._said.append(piece)
        self._told.append(self._restorer.feed(piece))
        return self._told[-1]

    def _end(self, text: str) -> str:
        """The same for the last text of the reply."""
        piece = self._say(text)
        self._told.append(self._restorer.finish())
        return piece + self._told[-1]

    async def stop(self, verdict: Verdict, lead: str = "") -> str:
        """The reply of a rule, with a ticket's number when a person takes over."""
        turn = self._turn
        turn.action, turn.rule = verdict.action.word, verdict.rule
        turn.finish_reason = "content_filter" if verdict.action is Action.REFUSE else "stop"
        reference = f"\n\n{await self._hand_over(verdict)}" if verdict.action is Action.ESCALATE else ""
        return self._end(lead + verdict.text + reference)

    async def _hand_over(self, verdict: Verdict) -> str:
        """What the client is told about the turn's ticket: a new one, unless one like it waits for a person."""
        turn, route = self._turn, self._policy.routes[verdict.route]
        try:
            waiting = await self._service.store.open_ticket_of(turn.tenant, turn.conversation)
        except StoreDown:
            waiting = None
        if (
            waiting
            and self._thread.owns(waiting)
            and (waiting.queue, waiting.priority) == (route.queue, route.priority)
        ):
            turn.ticket = waiting
            return f"A person already has this conversation. Your reference is {waiting.id}."
        turn.ticket = desk.hand_over(turn, verdict, route)
        return f"Your reference is {turn.ticket.id}."

    async def generate(self, prompt: Prompt) -> AsyncGenerator[str, None]:
        """The settled pieces of the model's reply, until its end, until a rule stops it, or until it is too long.

        The first one comes with the engine's first token, and is empty when that is held back. A request that names no
        limit is cut off here, since an engine refuses a limit that does not fit behind the prompt.
        """
        turn, tokens = self._turn, 0
        limit = math.inf if "max_tokens" in prompt.sampling else self._service.settings.max_tokens
        async with aclosing(self._service.backend.stream(prompt)) as deltas:
            async for delta in deltas:
                turn.prompt_tokens = delta.prompt_tokens or turn.prompt_tokens
                turn.completion_tokens = delta.completion_tokens or turn.completion_tokens
                turn.finish_reason = delta.finish_reason or turn.finish_reason
                if not delta.text:
                    continue
                tokens += 1
                turn.first_token_ms = turn.first_token_ms or self._elapsed()
                began = time.perf_counter()
                piece = self._guard.feed(delta.text)
                if self._guard.asking:
                    piece += await self._guard.ask()
                self._judging += time.perf_counter() - began
                if turn.streamed and (piece or tokens == 1):
                    yield self._say(piece)
                if self._guard.stopped:
                    break
                if tokens >= limit:
                    turn.finish_reason = "length"
                    break
        turn.completion_tokens = turn.completion_tokens or tokens  # a stopped engine counts no more

    async def finish(self, asked: Verdict) -> str:
        """The end of the model's reply: its last words, what the rules add, or what they say instead."""
        turn = self._turn
        began = time.perf_counter()
        last, verdict = await self._guard.finish()
        self._service.metrics.guard.labels("output").observe(self._judging + time.perf_counter() - began)
        turn.output = verdict
        turn.withheld_said = self._guard.draft if verdict.action >= Action.REDACT else ""
        if verdict.action.stops:
            return await self.stop(verdict, f"{last}\n\n" if turn.streamed and verdict.kept else "")
        strictest = max(verdict, asked, key=lambda one: one.action)
        turn.action, turn.rule = strictest.action.word, strictest.rule
        lines = [line for line in appended(self._policy.input, asked) if line not in verdict.closing]
        ending = verdict.closing + "".join(f"\n\n{line}" for line in lines)
        return self._end((last if turn.streamed else verdict.kept) + ending)

    async def close(self, error: str = "") -> None:
        """Records the turn as it was said, once, even when the client goes meanwhile."""
        if self.closed:
            return
        self.closed = True
        turn = self._turn
        turn.error = error
        turn.said = "".join(self._said)
        turn.total_ms = self._elapsed()
        if turn.output is None:
            turn.withheld_said = self._guard.draft
        if turn.said and not error:
            after = (*self._thread.messages, Message("assistant", "".join(self._told)))
            turn.tail_hash = self._service.fingerprint(turn.tenant, turn.subject, after)
        news = () if error else self._thread.news
        await asyncio.shield(self._service.spawn(_record(self._service, turn, news)))

    def _elapsed(self) -> float:
        return round((time.perf_counter() - self._started) * 1000, 3)


async def _begin(service: Service, tenant: Tenant, turn: Turn) -> None:
    """Makes sure that the turn will be on record before anything is said, as its tenant wants it."""
    try:
        await service.store.begin(turn)
        return
    except StoreDown:
        service.metrics.store_errors.inc()
    if tenant.when_store_fails == "refuse":
        raise unavailable(UNSTORED, "store_down", 5)
    await _spill(service, turn)


async def _record(service: Service, turn: Turn, news: Sequence[Ticket]) -> None:
    """Stores the finished turn and which news it brought: in the database, else in the spill; raises ApiError 503."""
    service.metrics.count(turn)
    _log(turn)
    try:
        await service.store.finish(turn)
        if news:
            await service.store.mark_delivered([ticket.id for ticket in news], turn.id)
        return
    except StoreError:
        service.metrics.store_errors.inc()
    try:
        await _spill(service, turn)
    except ApiError:
        service.metrics.lost.inc()
        event("turn_lost", logging.ERROR, turn=turn.id, tenant=turn.tenant)
        raise


async def _spill(service: Service, turn: Turn) -> None:
    try:
        await service.store.spill(turn)
    except SpillFull:
        raise unavailable(UNSTORED, "store_down", 30) from None
    service.metrics.spilled.inc()


def _log(turn: Turn) -> None:
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
        return internal()
    if error.fault == "rejected":
        return ApiError(400, error.message, code=error.code or "invalid_value", param="messages")
    if error.fault == "timeout":
        return ApiError(504, error.message, code="engine_timeout", kind="server_error", retry_after=5)
    starting = service.engine.state != "ready"
    retry_after = service.engine.retry_after if starting else error.retry_after or 2
    return unavailable(error.message, f"engine_{error.fault}", retry_after)
