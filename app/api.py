"""The routes that chat clients call; bodies are read and answered by hand, so that every error has OpenAI's form."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, TypeVar

import orjson
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from app.auth import identify
from app.chat import Said, answer
from app.errors import ApiError, unavailable
from app.middleware import client_gone, read_body
from app.records import Feedback, FeedbackKind, Key, Tenant, Ticket, Turn, new_id
from app.schemas import ChatRequest, FeedbackRequest, parse
from app.service import Service
from app.store import StoreError
from guardrails.reply import ARGUMENTS, CONTENT, REASONING

T = TypeVar("T")
router = APIRouter()
CONVERSATION_HEADERS = ("x-conversation-id", "x-openwebui-chat-id", "chatui-conversation-id")
CONVERSATION = re.compile(r"[!-~]{1,128}")
"""Printable ASCII, since it comes back in a header."""


def service_of(request: Request) -> Service:
    """The parts of the gateway that serves this request."""
    service: Service = request.app.state.service
    return service


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """A chat completion, whole or streamed, after the guards of the tenant's policy."""
    service = service_of(request)
    key, tenant = await identify(service.store, request)
    asked = parse(ChatRequest, await read_body(request, service.settings.body_limit))
    _check_engine(service, asked.model)
    turn = _turn(request, service, key, tenant, asked)
    pieces, ignored = answer(service, tenant, turn, asked), asked.ignored(service.engine.without)
    if asked.stream:
        first = await _while_connected(request, anext(pieces))
        usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return _EventStream(_frames(first, pieces, turn, usage), pieces, _headers(turn, ignored))
    told = await _while_connected(request, _collected(pieces))
    return JSONResponse(_completion(turn, told), headers=_headers(turn, ignored))


def _check_engine(service: Service, model: str) -> None:
    engine = service.engine
    if model != engine.model:
        raise _unknown_model(service, model)
    if engine.state != "ready":
        why = "cannot be started" if engine.state == "failed" else "is starting"
        raise unavailable(f"The inference engine {why}; try again in a while.", "engine_not_ready", engine.retry_after)


def _unknown_model(service: Service, model: str) -> ApiError:
    message = f"The model '{model}' does not exist; this gateway serves '{service.engine.model}'."
    return ApiError(404, message, code="model_not_found", param="model")


def _turn(request: Request, service: Service, key: Key, tenant: Tenant, asked: ChatRequest) -> Turn:
    headers = request.headers
    person = asked.safety_identifier or asked.user or headers.get("x-openwebui-user-id", "")
    retries = headers.get("x-stainless-retry-count", "")
    return Turn(
        id=new_id("chatcmpl-"),
        conversation=_conversation(request, asked),
        tenant=tenant.name,
        key=key.id,
        policy="",
        model=asked.model,
        request_id=request.state.request_id,
        streamed=bool(asked.stream),
        subject=service.pseudonym(tenant.name, person),
        retry_of=retries if re.fullmatch("[1-9][0-9]?", retries) else "",
    )


def _conversation(request: Request, asked: ChatRequest) -> str:
    """The conversation that the client names, or empty."""
    for name in CONVERSATION_HEADERS:
        if named := request.headers.get(name):
            return _sane(named, name)
    named = (asked.metadata or {}).get("conversation_id", "")
    return _sane(named, "metadata.conversation_id") if named else ""


def _sane(named: str, param: str) -> str:
    if not CONVERSATION.fullmatch(named):
        message = (
            f"Invalid value for '{param}': a conversation id is 1 to 128 printable ASCII characters, without spaces."
        )
        raise ApiError(400, message, code="invalid_value", param=param)
    return named


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled as soon as the client goes away (then ApiError 499)."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise client_gone()
        return task.result()
    finally:
        gone.cancel()
        if task.cancel():
            with suppress(ApiError, asyncio.CancelledError):
                await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _collected(pieces: AsyncGenerator[Said, None]) -> list[Said]:
    """The whole reply, as the client is told it: `Turn.said` has placeholders where values are restored."""
    async with aclosing(pieces):
        return [piece async for piece in pieces]


class _EventStream(StreamingResponse):
    """Frames made of `pieces`, which are closed, and with them the engine's work, however the stream ends."""

    def __init__(self, frames: AsyncIterator[bytes], pieces: AsyncGenerator[Said, None], headers: dict[str, str]):
        super().__init__(frames, headers=headers | {"cache-control": "no-store"}, media_type="text/event-stream")
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the frames until their end, or until the client goes away."""
        async with aclosing(self._pieces):
            await super().__call__(scope, receive, send)


async def _frames(first: Said, pieces: AsyncGenerator[Said, None], turn: Turn, usage: bool) -> AsyncIterator[bytes]:
    """The reply as server-sent events; it always ends with a final chunk or an error, and `[DONE]`."""
    head = _envelope(turn, "chat.completion.chunk")

    def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return _frame(head | {"choices": [choice]} | more)

    yield chunk({"role": "assistant", "content": ""}, guardrails=decision(turn) if turn.ended else {"id": turn.id})
    try:
        if first.text or first.name:
            yield chunk(_delta(first))
        async for piece in pieces:
            if piece.text or piece.name:
                yield chunk(_delta(piece))
        yield chunk({}, turn.finish_reason, guardrails=decision(turn))
        if usage:
            yield _frame(head | {"choices": [], "usage": _usage(turn)})
    except ApiError as error:
        yield _frame(error.body)
    yield b"data: [DONE]\n\n"


def _delta(said: Said) -> dict[str, Any]:
    """A piece of the reply as OpenAI writes it; reasoning under both names that engines and clients have for it."""
    if said.channel == REASONING:
        return {"reasoning_content": said.text, "reasoning": said.text}
    if not said.channel.startswith(ARGUMENTS):
        return {said.channel: said.text}
    opening = {"id": said.id, "type": "function"} if said.name else {}
    function = ({"name": said.name} if said.name else {}) | {"arguments": said.text}
    return {"tool_calls": [{"index": said.place} | opening | {"function": function}]}


def _frame(data: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


def _completion(turn: Turn, told: Sequence[Said]) -> dict[str, Any]:
    choice = {"index": 0, "message": _message(told), "logprobs": None, "finish_reason": turn.finish_reason}
    return _envelope(turn, "chat.completion") | {
        "choices": [choice],
        "usage": _usage(turn),
        "guardrails": decision(turn),
    }


def _message(told: Sequence[Said]) -> dict[str, Any]:
    """The pieces of a reply as one message; its content is null where it only calls tools, or refuses."""
    texts: dict[str, str] = {}
    for said in told:
        texts[said.channel] = texts.get(said.channel, "") + said.text
    calls = [
        {"id": said.id, "type": "function", "function": {"name": said.name, "arguments": texts[said.channel]}}
        for said in told
        if said.name
    ]
    silent, reasoning = calls or "refusal" in texts, texts.get(REASONING)
    content = texts.get(CONTENT) or (None if silent else "")
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": texts.get("refusal")}
    message |= {"tool_calls": calls} if calls else {}
    return message | ({"reasoning_content": reasoning, "reasoning": reasoning} if reasoning else {})


def _envelope(turn: Turn, kind: str) -> dict[str, Any]:
    return {"id": turn.id, "object": kind, "created": int(turn.created_at.timestamp()), "model": turn.model}


def _usage(turn: Turn) -> dict[str, int]:
    total = turn.prompt_tokens + turn.completion_tokens
    return {"prompt_tokens": turn.prompt_tokens, "completion_tokens": turn.completion_tokens, "total_tokens": total}


def _headers(turn: Turn, ignored: Sequence[str]) -> dict[str, str]:
    """What is known when the answer begins."""
    headers = {"x-conversation-id": turn.conversation, "x-guardrails-id": turn.id, "x-guardrails-policy": turn.policy}
    headers |= {"x-guardrails-action": turn.action} if turn.ended else {}
    return headers | ({"x-ignored-parameters": ", ".join(ignored)} if ignored else {})


def decision(turn: Turn) -> dict[str, Any]:
    """What a client may know of a verdict: the action and where, not which rule or score (an attacker's gradient)."""
    stages = (("output", turn.output), ("input", turn.input))
    stage = next((name for name, verdict in stages if verdict and verdict.rule == turn.rule and turn.rule), None)
    escalation = _handed_over(turn.ticket) if turn.ticket else None
    return {"id": turn.id, "action": turn.action, "stage": stage, "policy": turn.policy, "escalation": escalation}


def _handed_over(ticket: Ticket) -> dict[str, Any]:
    return {"id": ticket.id, "status": ticket.state, "queue": ticket.queue, "due": ticket.due_at.isoformat()}


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The models that this key may use."""
    service = service_of(request)
    await identify(service.store, request)
    return JSONResponse({"object": "list", "data": [_model(service)]})


@router.get("/v1/models/{model:path}")
async def model(request: Request, model: str) -> Response:
    """One model, or 404."""
    service = service_of(request)
    await identify(service.store, request)
    if model != service.engine.model:
        raise _unknown_model(service, model)
    return JSONResponse(_model(service))


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.engine.model, "object": "model", "created": service.started, "owned_by": "newel"}


@router.post("/v1/feedback")
async def feedback(request: Request) -> Response:
    """Records what a person thought of a reply; the same `Idempotency-Key` and body is recorded once."""
    service = service_of(request)
    _, tenant = await identify(service.store, request)
    told = parse(FeedbackRequest, await read_body(request, service.settings.body_limit))
    turn = await service.store.turn(told.target, tenant.name) if told.comment or told.correction else None
    said, key = judgements(tenant.name, told), request.headers.get("idempotency-key")
    if turn:  # who corrects a reply quotes what it restored
        said = [replace(one, text=await service.vaults.hidden(turn, one.text)) for one in said]
    kept = await service.store.add_feedback(*said, idempotency_key=key)
    for one, created in kept:
        if created:
            service.metrics.feedback.labels(one.kind).inc()
    recorded = [{"id": one.id, "kind": one.kind, "created": created} for one, created in kept]
    return JSONResponse({"object": "feedback", "target": told.target, "recorded": recorded})


def judgements(tenant: str, told: FeedbackRequest) -> list[Feedback]:
    """One Feedback for each thing that was said."""

    def item(kind: FeedbackKind, **more: Any) -> Feedback:
        return Feedback(new_id("fb_"), tenant, told.target, kind, source=told.source, **more)

    out: list[Feedback] = []
    if told.rating is not None:
        value = {"up": 1.0, "down": -1.0}[told.rating] if isinstance(told.rating, str) else told.rating
        out.append(item("rating", value=value))
    if told.comment:
        out.append(item("comment", text=told.comment))
    if told.correction:
        out.append(item("correction", text=told.correction))
    if told.choice:
        out.append(item("choice", other=told.choice.other, choice=told.choice.better))
    if told.should_have:
        out.append(item("should_have_helped" if told.should_have == "helped" else "should_have_refused"))
    return out


@router.get("/v1/tickets/{ticket_id}")
async def ticket(request: Request, ticket_id: str) -> Response:
    """Where a ticket of this tenant stands, and the person's answer once there is one."""
    service = service_of(request)
    _, tenant = await identify(service.store, request)
    found = await service.store.ticket(ticket_id, tenant.name)
    if found is None:
        raise ApiError(404, f"There is no ticket '{ticket_id}'.", code="ticket_not_found", param="ticket_id")
    answered_at = found.answered_at and found.answered_at.isoformat()
    shown = {"object": "ticket"} | _handed_over(found) | {"answer": found.answer or None, "answered_at": answered_at}
    return JSONResponse(shown)


@router.get("/livez")
async def livez() -> Response:
    """200 while the process serves."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """200 when a turn can be answered, else 503 with what is missing."""
    service = service_of(request)
    missing: dict[str, str] = {} if service.engine.state == "ready" else {"engine": service.engine.state}
    try:
        await service.store.ping()
    except StoreError:
        missing["store"] = "down"
    if not missing:
        return JSONResponse({"status": "ready"})
    headers = {"retry-after": str(service.engine.retry_after)}
    return JSONResponse({"status": "not ready", "missing": missing}, 503, headers)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    service = service_of(request)
    service.metrics.engine_ready.set(service.engine.state == "ready")
    service.metrics.engine_restarts.set(service.engine.restarts)
    service.metrics.waiting.set(service.store.spilled)
    with suppress(StoreError, TimeoutError):  # a database that is down must not hide what tells so
        async with asyncio.timeout(1.0):
            service.metrics.count_deliveries(await service.store.delivery_counts())
    return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
