"""The routes that chat clients call; bodies are read and answered by hand, so that every error has OpenAI's form."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from app.chat import Event, Fault, Piece, answer
from app.errors import ApiError, unavailable
from app.middleware import read_body
from app.records import Feedback, FeedbackKind, Key, Tenant, Turn, new_id
from app.schemas import ChatRequest, FeedbackRequest, parse
from app.service import Service
from app.store import Conflict, NotFound, StoreError

router = APIRouter()
CONVERSATION_HEADERS = ("x-conversation-id", "x-openwebui-chat-id", "chatui-conversation-id")
DONE = b"data: [DONE]\n\n"


class JsonResponse(Response):
    """A JSON answer written by orjson."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The content as JSON bytes."""
        return orjson.dumps(content)


def service_of(request: Request) -> Service:
    """The parts of the gateway that serves this request."""
    service: Service = request.app.state.service
    return service


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """A chat completion, whole or streamed, after the guards of the tenant's policy."""
    service = service_of(request)
    key, tenant = await service.keys.identify(request)
    asked = parse(ChatRequest, await read_body(request, service.settings.body_limit))
    _check_engine(service, asked.model)
    turn = _turn(request, service, key, tenant, asked)
    events = answer(service, tenant, turn, asked)
    headers = {"x-conversation-id": "", "x-guardrails-id": turn.id}
    if asked.ignored:
        headers["x-ignored-parameters"] = ", ".join(asked.ignored)
    if not asked.stream:
        return await _whole(request, events, turn, headers)
    first = await _while_connected(request, _first(events))
    headers |= {"x-conversation-id": turn.conversation, "x-guardrails-policy": turn.policy, "cache-control": "no-store"}
    usage = bool(asked.stream_options and asked.stream_options.include_usage)
    return StreamingResponse(_frames(first, events, turn, usage), media_type="text/event-stream", headers=headers)


def _check_engine(service: Service, model: str) -> None:
    engine = service.engine
    if model != engine.model:
        raise ApiError(404, f"The model '{model}' does not exist; this gateway serves '{engine.model}'.",
                       code="model_not_found", param="model")  # fmt: skip
    if engine.state != "ready":
        why = "cannot be started" if engine.state == "failed" else "is starting"
        raise unavailable(f"The inference engine {why}; try again in a while.", "engine_not_ready", engine.retry_after)


def _turn(request: Request, service: Service, key: Key, tenant: Tenant, asked: ChatRequest) -> Turn:
    named = next((value for name in CONVERSATION_HEADERS if (value := request.headers.get(name))), "")
    conversation = named or (asked.metadata or {}).get("conversation_id", "")
    if len(conversation) > 128:
        raise ApiError(400, "A conversation id is at most 128 characters long.", code="invalid_value", param="metadata")
    person = asked.safety_identifier or asked.user or request.headers.get("x-openwebui-user-id", "")
    return Turn(
        id=new_id("chatcmpl-"),
        conversation=conversation,
        tenant=tenant.name,
        key=key.id,
        policy="",
        model=asked.model,
        request_id=request.state.request_id,
        streamed=asked.stream,
        subject=service.pseudonym(tenant.name, person),
        retry_of=request.headers.get("x-stainless-retry-count", "0").replace("0", ""),
    )


async def _while_connected(request: Request, work: Coroutine[Any, Any, Event]) -> Event:
    """The result of `work`, which is cancelled as soon as the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
            raise ApiError(499, "The client went away.", code="client_gone")
        return task.result()
    finally:
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _first(events: AsyncGenerator[Event, None]) -> Event:
    return await anext(events)


async def _last(events: AsyncGenerator[Event, None]) -> Event:
    """The finished turn; raises ApiError for a fault, since a client that does not stream has seen nothing."""
    async for event in events:
        if isinstance(event, Fault):
            raise event.error
    return event


async def _whole(
    request: Request, events: AsyncGenerator[Event, None], turn: Turn, headers: dict[str, str]
) -> Response:
    await _while_connected(request, _last(events))
    message = {"role": "assistant", "content": turn.said, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": turn.finish_reason}
    body = _envelope(turn, "chat.completion") | {"choices": [choice], "usage": _usage(turn), "guardrails": decision(turn)}
    headers |= {"x-conversation-id": turn.conversation, "x-guardrails-policy": turn.policy}
    return JsonResponse(body, headers=headers | {"x-guardrails-action": turn.action})


async def _frames(
    first: Event, events: AsyncGenerator[Event, None], turn: Turn, usage: bool
) -> AsyncIterator[bytes]:
    """The reply as server-sent events; it always ends with a final chunk or an error, and `[DONE]`."""
    head = _envelope(turn, "chat.completion.chunk")

    def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return b"data: " + orjson.dumps(head | {"choices": [choice]} | more) + b"\n\n"

    yield chunk({"role": "assistant", "content": ""}, guardrails={"id": turn.id})
    event = first
    try:
        while True:
            if isinstance(event, Piece):
                yield chunk({"content": event.text})
            elif isinstance(event, Fault):
                yield b"data: " + orjson.dumps(event.error.body) + b"\n\n"
            else:
                yield chunk({}, turn.finish_reason, guardrails=decision(turn))
                if usage:
                    yield b"data: " + orjson.dumps(head | {"choices": [], "usage": _usage(turn)}) + b"\n\n"
            try:
                event = await anext(events)
            except StopAsyncIteration:
                break
        yield DONE
    finally:
        await events.aclose()


def _envelope(turn: Turn, kind: str) -> dict[str, Any]:
    return {"id": turn.id, "object": kind, "created": int(turn.created_at.timestamp()), "model": turn.model}


def _usage(turn: Turn) -> dict[str, int]:
    total = turn.prompt_tokens + turn.completion_tokens
    return {"prompt_tokens": turn.prompt_tokens, "completion_tokens": turn.completion_tokens, "total_tokens": total}


def decision(turn: Turn) -> dict[str, Any]:
    """What a client may know of a verdict: the action and where, not which rule or score (an attacker's gradient)."""
    deciding = (("output", turn.output), ("input", turn.input))
    stage = next((name for name, verdict in deciding if verdict and verdict.rule == turn.rule and turn.rule), None)
    ticket = turn.ticket
    escalation = ticket and {"id": ticket.id, "status": ticket.state, "queue": ticket.queue, "due": ticket.due_at}
    return {"id": turn.id, "action": turn.action, "stage": stage, "policy": turn.policy, "escalation": escalation}


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The models that this key may use."""
    service = service_of(request)
    await service.keys.identify(request)
    model = {"id": service.engine.model, "object": "model", "created": int(time.time()), "owned_by": "newel"}
    return JsonResponse({"object": "list", "data": [model]})


@router.get("/v1/models/{model:path}")
async def model(request: Request, model: str) -> Response:
    """One model, or 404."""
    service = service_of(request)
    await service.keys.identify(request)
    if model != service.engine.model:
        raise ApiError(404, f"The model '{model}' does not exist.", code="model_not_found", param="model")
    return JsonResponse({"id": model, "object": "model", "created": int(time.time()), "owned_by": "newel"})


@router.post("/v1/feedback")
async def feedback(request: Request) -> Response:
    """Records what a person thought of a reply; the same `Idempotency-Key` and body is recorded once."""
    service = service_of(request)
    _, tenant = await service.keys.identify(request)
    told = parse(FeedbackRequest, await read_body(request, service.settings.body_limit))
    idempotency = request.headers.get("idempotency-key")
    recorded = []
    try:
        for item in judgements(tenant.name, told):
            key = f"{idempotency}:{item.kind}" if idempotency else None
            kept, created = await service.store.add_feedback(item, key)
            recorded.append({"id": kept.id, "kind": kept.kind, "created": created})
            if created:
                service.metrics.feedback.labels(kept.kind).inc()
    except NotFound:
        raise ApiError(404, "No such reply; 'target' and 'choice.other' are completion ids of your own requests.",
                       code="target_not_found", param="target") from None  # fmt: skip
    except Conflict as conflict:
        raise ApiError(422, str(conflict), code="idempotency_key_reused") from None
    except StoreError:
        raise unavailable("Feedback cannot be stored just now.", "store_down", 5) from None
    return JsonResponse({"object": "feedback", "target": told.target, "recorded": recorded})


def judgements(tenant: str, told: FeedbackRequest) -> list[Feedback]:
    """One Feedback for each thing that was said."""

    def item(kind: FeedbackKind, **more: Any) -> Feedback:
        return Feedback(new_id("fb_"), tenant, told.target, kind, source=told.source, **more)

    out: list[Feedback] = []
    if told.rating is not None:
        value = {"up": 1.0, "down": -1.0}.get(told.rating) if isinstance(told.rating, str) else told.rating
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
    _, tenant = await service.keys.identify(request)
    try:
        found = await service.store.ticket(ticket_id, tenant.name)
    except StoreError:
        raise unavailable("Tickets cannot be read just now.", "store_down", 5) from None
    if found is None:
        raise ApiError(404, f"There is no ticket '{ticket_id}'.", code="ticket_not_found", param="ticket_id")
    return JsonResponse(
        {"object": "ticket", "id": found.id, "status": found.state, "queue": found.queue, "due": found.due_at,
         "answer": found.answer or None, "answered_at": found.answered_at}
    )  # fmt: skip


@router.get("/livez")
async def livez() -> Response:
    """200 while the process serves."""
    return JsonResponse({"status": "ok"})


@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """200 when a turn can be answered, else 503 with what is missing."""
    service = service_of(request)
    missing = {} if service.engine.state == "ready" else {"engine": service.engine.state}
    try:
        await service.store.ping()
    except StoreError:
        missing["store"] = "down"
    if not missing:
        return JsonResponse({"status": "ready"})
    headers = {"retry-after": str(service.engine.retry_after)}
    return JsonResponse({"status": "not ready", "missing": missing}, status_code=503, headers=headers)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    service = service_of(request)
    service.metrics.engine_ready.set(service.engine.state == "ready")
    service.metrics.engine_restarts.set(service.engine.restarts)
    return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
