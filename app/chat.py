"""One chat request, from top to bottom: nothing reaches the model or the client past a guard."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace

from app.asking import Asked, definitions, judged, judged_on, prompted
from app.backends import Prompt
from app.errors import ApiError, internal, unavailable
from app.fleet import Release, Shadowed
from app.frames import BackendError, Delta
from app.logs import event
from app.records import Tenant, Turn, new_id
from app.schemas import ChatRequest
from app.service import Service
from app.speculate import merged, speculated
from app.store import SpillFull, StoreError
from app.telling import Said, Telling
from app.thread import Thread, recall
from app.tracing import trace_id, traced
from guardrails.engine import judge
from guardrails.types import Context, Message, Policy, Verdict

BEHIND = 1000
"""So many turns that wait to be written make new ones wait for them: a busy gateway leaves its writer no time."""
UNSTORED = "This turn cannot be recorded just now, so it was not answered. Please try again in a moment."


@dataclass(slots=True)
class _Work:
    """A question that is on record, and what is answered to it: the first reply is that of the first turn."""

    service: Service
    tenant: Tenant
    turns: list[Turn]
    request: ChatRequest
    release: Release
    policy: Policy
    thread: Thread
    asked: Asked
    started: float
    replies: list[Telling]

    def telling(self, turn: Turn) -> Telling:
        """Another reply."""
        return Telling(
            self.service, self.policy, turn, self.asked, self.thread, self.request, self.release, self.started
        )

    def prompt(self) -> Prompt:
        """What the model is asked; its release that is tried in the shadow is asked the same."""
        service, asked, turn = self.service, self.asked, self.turns[0]
        sampling = self.request.sampling(definitions(asked.seen))
        sampling["cache_salt"] = service.salt(self.tenant.name)
        prompt = Prompt(prompted(self.policy, asked, self.thread.news), sampling, service.marks(turn))
        if service.fleet.has_shadow(self.release):
            shadow(service, self.policy, turn, prompt, self.release)
        return prompt


async def answer(
    service: Service, tenant: Tenant, turns: list[Turn], request: ChatRequest, release: Release
) -> AsyncGenerator[Said, None]:
    """The settled pieces of the reply; at the end the turn tells everything that was decided.

    turns: the turn of this request, to which those of further replies are added (`n`); where the question itself is
    stopped there is one reply. Nothing is given out before the engine's first token. Raises ApiError. When the
    generator is closed early, because the client went away, the engine's work is cancelled and the turns are recorded
    as they stand.
    """
    work = await _begun(service, tenant, turns, request, release)
    try:
        async with aclosing(_said(work)) as pieces:
            async for piece in pieces:
                yield piece
    except Exception as error:
        raise await _failed(work, error) from None
    finally:
        _left(work)


async def answered(
    service: Service, tenant: Tenant, turns: list[Turn], request: ChatRequest, release: Release
) -> list[Said]:
    """All the pieces of the reply, as `answer` would give them, for a client that wants it whole."""
    work = await _begun(service, tenant, turns, request, release)
    try:
        verdict = work.asked.verdict
        if verdict.action.stops:
            return await _stopped(service, work.replies[0], verdict)
        if request.replies == 1 and not work.asked.judging.waiting:
            reply = work.replies[0]
            await reply.complete(work.prompt())
            return await _finished(service, reply, verdict)
        async with aclosing(_said(work)) as pieces:
            return [piece async for piece in pieces]
    except Exception as error:
        raise await _failed(work, error) from None
    finally:
        _left(work)


async def _begun(service: Service, tenant: Tenant, turns: list[Turn], request: ChatRequest, release: Release) -> _Work:
    """The question, judged, and sure to be on record; raises ApiError, StoreError."""
    started, turn = time.perf_counter(), turns[0]
    policy = await service.policies.of(tenant.policy)
    turn.policy = policy.id
    without = service.fleet.without(release)
    request.check(without)
    thread = await recall(service, turn, request.conversation(without), request.after)
    asked = await judged(service, policy, turn, thread)
    await _begin(service, tenant, turn)
    work = _Work(service, tenant, turns, request, release, policy, thread, asked, started, [])
    work.replies.append(work.telling(turn))
    return work


def _said(work: _Work) -> AsyncGenerator[Said, None]:
    """The pieces of the reply, by one of the ways on which it can come about."""
    reply, asked = work.replies[0], work.asked
    if asked.verdict.action.stops:
        return _refused(work.service, reply, asked.verdict)
    prompt = work.prompt()
    if work.request.replies > 1:
        return _spoken(work, prompt)
    return _speculated(work, prompt) if asked.judging.waiting else _told(work.service, reply, prompt, asked.verdict)


async def _failed(work: _Work, error: Exception) -> ApiError:
    """What the client is told of an error that ends the replies, which are on record with it then."""
    fault = _as_api_error(error, work.service)
    for reply in work.replies:
        await _close(work.service, reply, fault.code)
    return fault


def _left(work: _Work) -> None:
    """Has replies recorded that nobody has ended: their client is gone."""
    for reply in work.replies:
        if not reply.closed:
            work.service.spawn(_close(work.service, reply, "client_gone"))


def shadow(service: Service, policy: Policy, turn: Turn, prompt: Prompt, release: Release) -> None:
    """Asks the release that is tried in the shadow of this one the same, for its share of conversations.

    Its reply is judged and put on record as a turn of its own, with nothing said to anybody.
    """

    def answered(told: Shadowed) -> None:
        service.spawn(_shadowed(service, policy, turn, told))

    limited = {"max_tokens": service.settings.max_tokens, **prompt.sampling}
    service.fleet.shadow(replace(prompt, sampling=limited), release, turn.conversation, said=answered)


async def _shadowed(service: Service, policy: Policy, turn: Turn, told: Shadowed) -> None:
    reply = told.reply or Delta()
    verdict = await judge(policy.output, reply.text, Context((Message("user", turn.asked),), service.fleet))
    of_its_own = replace(
        turn,
        id=new_id("shadow_"),
        conversation=f"shadow_{turn.conversation}",
        surface="shadow",
        priority="shadow",
        release=told.release.name,
        said="",
        reasoning="",
        calls=(),
        withheld_said=reply.text,
        output=verdict,
        action=verdict.action.word,
        rule=verdict.rule,
        finish_reason=reply.finish_reason,
        error=told.error,
        ticket=None,
        prompt_tokens=reply.prompt_tokens,
        completion_tokens=reply.completion_tokens,
        first_token_ms=None,
        total_ms=round(told.seconds * 1000, 3),
        tail_hash="",
    )
    service.store.log(of_its_own)


async def _stopped(service: Service, reply: Telling, verdict: Verdict) -> list[Said]:
    """The reply of a rule in place of the model's."""
    last = await reply.stop(verdict)
    await _close(service, reply)
    return last


async def _finished(service: Service, reply: Telling, verdict: Verdict) -> list[Said]:
    """The end of a reply of the model's."""
    last = await reply.finish(verdict)
    await _close(service, reply)
    return last


async def _refused(service: Service, reply: Telling, verdict: Verdict) -> AsyncGenerator[Said, None]:
    """The reply of a rule, for one that streams."""
    for piece in await _stopped(service, reply, verdict):
        yield piece


async def _told(service: Service, reply: Telling, prompt: Prompt, verdict: Verdict) -> AsyncGenerator[Said, None]:
    """One reply of the model's, as it comes."""
    async with aclosing(reply.generate(prompt)) as pieces:
        async for piece in pieces:
            yield piece
    for piece in await _finished(service, reply, verdict):
        yield piece


async def _spoken(work: _Work, prompt: Prompt) -> AsyncGenerator[Said, None]:
    """So many replies to a question that has passed, each a turn of its own, made at the same time."""
    service, turns, replies = work.service, work.turns, work.replies
    turn, verdict = turns[0], work.asked.verdict
    if work.asked.judging.waiting:
        verdict = await judged_on(service, turn, work.asked.judging)
    if verdict.action.stops:
        said = _refused(service, replies[0], verdict)
    else:
        for place in range(1, work.request.replies):
            turns.append(replace(turn, id=f"{turn.id}-{place}", choice=place, input=None))
            replies.append(work.telling(turns[-1]))
            await _begin(service, work.tenant, turns[-1])
        said = merged([_told(service, one, _of_its_own(service, prompt, one.turn), verdict) for one in replies])
    async with aclosing(said) as pieces:
        async for piece in pieces:
            yield piece


def _of_its_own(service: Service, prompt: Prompt, turn: Turn) -> Prompt:
    """The prompt of another reply: with a seed of its own, or a seed would make all of them the same."""
    if not turn.choice:
        return prompt
    sampling = dict(prompt.sampling)
    if "seed" in sampling:
        sampling["seed"] += turn.choice
    return replace(prompt, sampling=sampling, headers=service.marks(turn))


async def _speculated(work: _Work, prompt: Prompt) -> AsyncGenerator[Said, None]:
    """The reply to a question that is still judged: what is made meanwhile counts as said only once it passes."""
    service, [reply], verdict = work.service, work.replies, work.asked.verdict
    draft, judging = work.telling(reply.turn), judged_on(work.service, reply.turn, work.asked.judging)
    async with aclosing(speculated(judging, draft.generate(prompt))) as pieces:
        async for piece in pieces:
            if isinstance(piece, Verdict):
                verdict = piece
                if not verdict.action.stops:
                    work.replies[0] = reply = draft
            else:
                yield piece
    for piece in await (_stopped if verdict.action.stops else _finished)(service, reply, verdict):
        yield piece


async def _begin(service: Service, tenant: Tenant, turn: Turn) -> None:
    """Makes sure that the turn will be on record, as its tenant wants it; raises ApiError 503."""
    writer = service.store.writer
    takes = await writer.prove() if tenant.when_store_fails == "refuse" else writer.healthy
    if not takes:
        service.metrics.store_errors.inc()
        if tenant.when_store_fails == "refuse":
            raise unavailable(UNSTORED, "store_down", 5)
    if writer.waiting >= BEHIND:
        with suppress(SpillFull):
            await service.store.flush()
    if writer.full:
        raise unavailable(UNSTORED, "store_down", 30)
    if writer.delay:
        service.store.log(turn)
    else:
        await _kept(service, turn)


async def _close(service: Service, reply: Telling, error: str = "") -> None:
    """Records the turn as it was said, once, even when the client goes meanwhile.

    It is written with others a moment later, but for one with a ticket: that is on record before it is told.
    """
    if reply.closed:
        return
    reply.end(error)
    turn = reply.turn
    service.metrics.count(turn, reply.steps)
    _log(turn)
    if service.tracer and turn.trace:
        traced(service.tracer, turn, reply.request, reply.steps, service.fleet.snapshot)
    if turn.ticket or reply.news or not service.store.writer.delay:
        await asyncio.shield(service.spawn(_kept(service, turn, [ticket.id for ticket in reply.news])))
    else:
        service.store.log(turn)


async def _kept(service: Service, turn: Turn, news: Sequence[str] = ()) -> None:
    """Puts the turn, and which news it brought, on record now; raises ApiError 503."""
    try:
        await service.store.keep(turn)
        if news:
            await service.store.mark_delivered(news, turn.id)
    except StoreError:
        service.metrics.store_errors.inc()
        event("turn_not_kept", logging.ERROR, turn=turn.id, tenant=turn.tenant)
        raise unavailable(UNSTORED, "store_down", 5) from None


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
        trace=trace_id(turn.trace),
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
    return unavailable(error.message, f"engine_{error.fault}", error.retry_after or 2)
