"""The routes that clients call beside the chat itself (`app.hotpath`); every error has OpenAI's form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from app.auth import Need
from app.errors import ApiError
from app.exchange import unknown_model
from app.middleware import read_body
from app.records import Feedback, FeedbackKind, Key, Tenant, new_id
from app.schemas import FeedbackRequest, parse
from app.service import Service
from app.store import StoreError
from app.surfaces.chat import handed_over

router = APIRouter()


def service_of(request: Request) -> Service:
    """The parts of the gateway that serves this request."""
    service: Service = request.app.state.service
    return service


async def caller(request: Request, need: Need = "chat") -> tuple[Key, Tenant]:
    """Who sent this request; raises ApiError 401, 403, 429."""
    peer = request.client.host if request.client else ""
    return await service_of(request).auth.identify(request.scope["headers"], need, peer)


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The models that this key may use."""
    service = service_of(request)
    await caller(request)
    return JSONResponse({"object": "list", "data": [_model(service, name) for name in service.fleet.models]})


@router.get("/v1/models/{model:path}")
async def model(request: Request, model: str) -> Response:
    """One model, or 404."""
    service = service_of(request)
    await caller(request)
    if model not in service.fleet.models:
        raise unknown_model(service, model)
    return JSONResponse(_model(service, model))


def _model(service: Service, model: str) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": service.started, "owned_by": "newel"}


@router.post("/v1/feedback")
async def feedback(request: Request) -> Response:
    """Records what a person thought of a reply; the same `Idempotency-Key` and body is recorded once."""
    service = service_of(request)
    _, tenant = await caller(request)
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
    _, tenant = await caller(request)
    found = await service.store.ticket(ticket_id, tenant.name)
    if found is None:
        raise ApiError(404, f"There is no ticket '{ticket_id}'.", code="ticket_not_found", param="ticket_id")
    answered_at = found.answered_at and found.answered_at.isoformat()
    shown = {"object": "ticket"} | handed_over(found) | {"answer": found.answer or None, "answered_at": answered_at}
    return JSONResponse(shown)


@router.get("/livez")
async def livez() -> Response:
    """200 while the process serves."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """200 when a turn can be answered, else 503 with what is missing."""
    service = service_of(request)
    missing = service.fleet.missing()
    try:
        await service.store.ping()
    except StoreError:
        missing["store"] = "down"
    if not missing:
        return JSONResponse({"status": "ready"})
    headers = {"retry-after": str(service.fleet.retry_after)}
    return JSONResponse({"status": "not ready", "missing": missing}, 503, headers)
