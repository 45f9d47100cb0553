"""One chat request, from top to bottom: nothing reaches the model or the client past a guard."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial

from app import desk
from app.backends import BackendError, Delta, Prompt
from app.errors import ApiError, internal, unavailable
from app.logs import event
from app.records import Tenant, Ticket, Turn, new_id
from app.schemas import ChatRequest
from app.service import Service
from app.speculate import speculated
from app.store import SpillFull, StoreDown, StoreError
from app.thread import SYSTEM, Thread, recall
from guardrails.arguments import plain
from guardrails.conversation import Judging, appended
from guardrails.reading import LONG
from guardrails.reply import ARGUMENTS, CONTENT, REASONING, Piece, Reply
from guardrails.types import Action, Context, Finding, Hit, Message, Policy, ToolMessage, Verdict
from guardrails.vault import NOTE, Restorer, Vault, restore

UNSTORED = "This turn cannot be recorded just now, so it was not answered. Please try again in a moment."
SEALING = 3
"""How often a turn is judged when other turns of its conversation give out the same placeholders at the same time."""


@dataclass(frozen=True, slots=True)
class Said:
    """A piece of the reply as the client is told it: of what is said, of the reasoning, or of a tool call.

    channel: as in `guardrails.reply`, or `refusal`, for a rule's reply where JSON was asked for. place: of a tool call
    among those of the reply; id, name: with the first piece of it.
    """

    channel: str
    text: str = ""
    place: int = 0
    id: str = ""
    name: str = ""


async def answer(service: Service, tenant: Tenant, turn: Turn, request: ChatRequest) -> AsyncGenerator[Said, None]:
    """The settled pieces of the reply; at the end `turn` tells everything that was decided.

    Nothing is given out before the engine's first token, and a turn is on record before its last piece is given out.
    Raises ApiError. When the generator is closed early, because the client went away, the engine's work is cancelled
    and the turn is recorded as it stands.
    """
    started = time.perf_counter()
    policy = await service.policies.of(tenant.policy)
    turn.policy = policy.id
    without = service.engine.without
    request.check(without)
    thread = await recall(service, turn, request.conversation(without))
    asked = await _judged(service, policy, turn, thread)
    verdict, judging = asked.verdict, asked.judging
    await _begin(service, tenant, turn)

    reply = _Reply(service, policy, turn, asked, thread, request, started)
    # What is made while the question is still judged is a reply of its own: until it passes, nothing of it was said.
    draft = _Reply(service, policy, turn, asked, thread, request, started) if judging.waiting else reply
    try:
        if verdict.action.stops:
            last = await reply.stop(verdict)
        else:
            prompt = Prompt(_prompt(policy, asked, thread.news), request.sampling(_definitions(asked.seen)))
            said: AsyncGenerator[Said | Verdict, None] = draft.generate(prompt)
            if draft is not reply:
                said = speculated(_judged_on(service, turn, judging), said)
            async with aclosing(said) as pieces:
                async for piece in pieces:
                    if isinstance(piece, Verdict):
                        verdict, reply = piece, reply if piece.action.stops else draft
                    else:
                        yield piece
            last = await (reply.stop(verdict) if verdict.action.stops else reply.finish(verdict))
        await reply.close()
        for piece in last:
            yield piece
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
    kept = tuple(message for message in asked.seen if not _defines(message))
    if kept[-1].role == "user":
        turn.history, turn.asked = kept[:-1], kept[-1].content
    else:
        turn.history = kept
    turn.input = replace(verdict, hits=_placed(verdict.hits, asked.judging))
    new = [message.content for message in turn.results] or [turn.asked]
    raw = [await _hidden(asked.vault, one.content, everywhere=True) for one in thread.messages[-len(new) :]]
    turn.withheld_asked = "\n\n".join(raw) if raw != new else ""
    return asked


def _defines(message: Message) -> bool:
    """True for the definition of a tool, or of the shape of a reply: no message of the conversation."""
    return isinstance(message, ToolMessage) and message.role in SYSTEM


def _definitions(messages: Sequence[Message]) -> list[ToolMessage]:
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
    before, hits = turn.input.hits if turn.input else (), _placed(verdict.hits, judging)
    turn.input = replace(verdict, hits=tuple(dict.fromkeys((*before, *hits))))
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
    system = [policy.persona, *(one.content for one in seen if one.role in SYSTEM and not _defines(one))]
    system += [NOTE] if asked.vault.values else []
    head = "\n\n".join(text for text in system if text.strip())
    talk = [message for message in seen if message.role not in SYSTEM]
    told = [Message("assistant", "\n\n".join(ticket.answer for ticket in news))] if news else []
    last = max((place for place, message in enumerate(talk) if message.role == "user"), default=0)
    return (*((Message("system", head),) if head else ()), *talk[:last], *told, *talk[last:])


class _Reply:
    """What is being said in one turn. A client that does not stream is given nothing before the verdict."""

    def __init__(
        self,
        service: Service,
        policy: Policy,
        turn: Turn,
        asked: _Asked,
        thread: Thread,
        request: ChatRequest,
        started: float,
    ):
        self._service, self._policy, self._turn, self._thread = service, policy, turn, thread
        self._started = started
        self._lead = f"{thread.greeting}\n\n" if thread.news else ""
        self._said: list[str] = []
        self._outlets: dict[str, _Outlet] = {}
        self._values, self._structured = asked.vault.values, request.structured
        self._reply = Reply(
            policy.output,
            replace(asked.judging.context, messages=asked.seen),
            offered=[one.name for one in _definitions(asked.seen) if one.name in request.offered],
            structured=request.structured,
            restored=partial(restore, values=self._values, json=True),
        )
        self._judging = 0.0
        self.closed = False

    def _say(self, text: str) -> Said:
        """The text as the client is told it, after what has to be said before anything else.

        It is noted as said with placeholders; the client is told what they stand for.
        """
        piece, self._lead = self._lead + text, ""
        self._said.append(piece)
        return self._tell(Piece(CONTENT, piece))

    def _tell(self, piece: Piece) -> Said:
        """The piece with what its placeholders stand for."""
        outlet = self._outlet(piece.channel)
        text = outlet.tell(piece.text)
        return Said(piece.channel, text, outlet.place, outlet.id if piece.name else "", piece.name)

    def _outlet(self, channel: str) -> _Outlet:
        if channel not in self._outlets:
            calls = sum(name.startswith(ARGUMENTS) for name in self._outlets)
            in_json = channel.startswith(ARGUMENTS) or (channel == CONTENT and self._structured)
            self._outlets[channel] = _Outlet(Restorer(self._values, json=in_json), calls, new_id("call_"))
        return self._outlets[channel]

    def _give(self, pieces: Sequence[Piece]) -> list[Said]:
        """The pieces as the client is told them; none that is empty."""
        said = [self._say(one.text) if one.channel == CONTENT else self._tell(one) for one in pieces]
        return [one for one in said if one.text or one.name]

    def _rest(self, channel: str) -> Said:
        """What was held back at the end of a channel: it might have become a placeholder."""
        outlet = self._outlet(channel)
        return Said(channel, outlet.end(), outlet.place)

    async def stop(self, verdict: Verdict, lead: str = "") -> list[Said]:
        """The reply of a rule, with a ticket's number when a person takes over.

        Where JSON was asked for, and none was said, it is a refusal: a client would read anything else as JSON.
        """
        turn = self._turn
        turn.action, turn.rule = verdict.action.word, verdict.rule
        turn.finish_reason = "content_filter" if verdict.action is Action.REFUSE else "stop"
        reference = f"\n\n{await self._hand_over(verdict)}" if verdict.action is Action.ESCALATE else ""
        refuses = self._structured and not "".join(self._said)
        turn.finish_reason = "stop" if refuses else turn.finish_reason
        told = [self._say(lead + verdict.text + reference), self._rest(CONTENT)]
        return [replace(one, channel="refusal") for one in told] if refuses else told

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

    async def generate(self, prompt: Prompt) -> AsyncGenerator[Said, None]:
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
                if not delta.says:
                    continue
                tokens += 1
                turn.first_token_ms = turn.first_token_ms or self._elapsed()
                pieces = await self._settled(delta)
                if turn.streamed:
                    for said in [*([self._say("")] if tokens == 1 else []), *self._give(pieces)]:
                        yield said
                if self._reply.stopped:
                    break
                if tokens >= limit:
                    turn.finish_reason = "length"
                    break
        turn.completion_tokens = turn.completion_tokens or tokens  # a stopped engine counts no more

    async def _settled(self, delta: Delta) -> list[Piece]:
        """What may be given out now that `delta` has come."""
        began = time.perf_counter()
        pieces = self._reply.feed(REASONING, delta.reasoning) + self._reply.feed(CONTENT, delta.text)
        for call in delta.calls:
            pieces += self._reply.feed(f"{ARGUMENTS}:{call.number}", call.arguments, call.name)
        while self._reply.asking:
            pieces += await self._reply.ask()
        self._judging += time.perf_counter() - began
        return pieces

    async def finish(self, asked: Verdict) -> list[Said]:
        """The end of the model's reply: its last words, what the rules add, or what they say instead."""
        turn, reply = self._turn, self._reply
        began = time.perf_counter()
        last, verdict = await reply.finish()
        self._service.metrics.guard.labels("output").observe(self._judging + time.perf_counter() - began)
        turn.output = verdict
        turn.withheld_said = reply.withheld if verdict.action >= Action.REDACT else ""
        if verdict.action.stops:
            said = self._give(last) if turn.streamed else []
            return [*said, *await self.stop(verdict, "\n\n" if turn.streamed and verdict.kept else "")]
        strictest = max(verdict, asked, key=lambda one: one.action)
        turn.action, turn.rule = strictest.action.word, strictest.rule
        if turn.finish_reason != "length":
            turn.finish_reason = "tool_calls" if reply.called else turn.finish_reason.replace("tool_calls", "stop")
        said = self._give(last if turn.streamed else reply.whole)
        said += self._give([Piece(CONTENT, self._ending(asked, verdict))])
        return [*said, *(self._rest(channel) for channel in self._outlets)]

    def _ending(self, asked: Verdict, verdict: Verdict) -> str:
        """The lines that rules add to what is said; JSON has none, nor has a reply that only calls tools."""
        if self._structured or (self._reply.called and not verdict.kept.strip()):
            return ""
        lines = [line for line in appended(self._policy.input, asked) if line not in verdict.closing]
        return verdict.closing + "".join(f"\n\n{line}" for line in lines)

    async def close(self, error: str = "") -> None:
        """Records the turn as it was said, once, even when the client goes meanwhile."""
        if self.closed:
            return
        self.closed = True
        turn, reply = self._turn, self._reply
        turn.error = error
        turn.said = "".join(self._said)
        if turn.streamed or (turn.output and not turn.output.action.stops and not error):
            turn.reasoning = reply.released(REASONING)
            turn.calls = tuple(self._call(channel, reply.released(channel)) for channel in reply.called)
        turn.total_ms = self._elapsed()
        if turn.output is None:
            turn.withheld_said = reply.withheld
        if (turn.said or turn.calls) and not error:
            after = (*self._thread.messages, *self._told())
            turn.tail_hash = self._service.fingerprint(turn.tenant, turn.subject, after)
        news = () if error else self._thread.news
        await asyncio.shield(self._service.spawn(_record(self._service, turn, news)))

    def _told(self) -> list[Message]:
        """The reply as the client will send it back."""
        said = Message("assistant", "".join(self._outlet(CONTENT).told))
        calls = [self._call(one, plain("".join(self._outlet(one).told))) for one in self._reply.called]
        return [*([said] if said.content or not calls else []), *calls]

    def _call(self, channel: str, arguments: str) -> ToolMessage:
        return ToolMessage("assistant", arguments, self._outlet(channel).id, self._reply.name(channel))

    def _elapsed(self) -> float:
        return round((time.perf_counter() - self._started) * 1000, 3)


class _Outlet:
    """Where the client is told one channel, with what its placeholders stand for; for a tool call, which one it is."""

    __slots__ = ("_restorer", "id", "place", "told")

    def __init__(self, restorer: Restorer, place: int, id: str):
        self._restorer, self.place, self.id = restorer, place, id
        self.told: list[str] = []

    def tell(self, text: str) -> str:
        """What the client is told now."""
        self.told.append(self._restorer.feed(text))
        return self.told[-1]

    def end(self) -> str:
        """The rest of it."""
        self.told.append(self._restorer.finish())
        return self.told[-1]


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
