"""The operators' routes, and the app that serves them on a port of their own, with the metrics.

Each route names what it needs (`app.auth.SCOPES`). Operators and admins act for all tenants; for a reviewer's key other
tenants' tickets are not there.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import JSONResponse, Response

from app.api import caller, livez, readyz, service_of
from app.auth import EVERYWHERE, Need
from app.errors import ApiError
from app.metrics import Metrics
from app.middleware import RequestContext, read_body
from app.policies import Put
from app.records import Key, Ticket, TicketState
from app.schemas import PolicyChoice, PolicyUpload, TicketAnswer, parse
from app.service import Service
from app.store import StoreError
from guardrails.check import render
from guardrails.schema import json_schema
from guardrails.types import Grader

router = APIRouter(prefix="/admin")
STATES: tuple[TicketState, ...] = ("open", "answered", "closed")


def create_admin_app(public: FastAPI, metrics: Metrics) -> FastAPI:
    """The app of the admin port: these routes, `/metrics` and the probes, on the parts that `public` runs."""
    app = FastAPI(title="newel admin", openapi_url=None)
    app.state = public.state
    app.exception_handlers.update(public.exception_handlers)
    app.include_router(router)
    for path, route in (("/metrics", show_metrics), ("/livez", livez), ("/readyz", readyz)):
        app.add_api_route(path, route, methods=["GET"])
    app.add_middleware(RequestContext, metrics=metrics, surfaces={})
    return app


async def show_metrics(request: Request) -> Response:
    """Prometheus metrics; they tell no secrets, but how much this service has to do."""
    service = service_of(request)
    service.metrics.engine_ready.set(service.engine.state == "ready")
    service.metrics.engine_restarts.set(service.engine.restarts)
    service.metrics.waiting.set(service.store.spilled)
    service.fleet.publish()
    with suppress(StoreError, TimeoutError):  # a database that is down must not hide what tells so
        async with asyncio.timeout(1):
            service.metrics.count_deliveries(await service.store.delivery_counts())
    return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _for(request: Request, need: Need) -> tuple[Service, Key]:
    key, _ = await caller(request, need)
    return service_of(request), key


def _tenant_of(key: Key) -> str | None:
    """The only tenant that this key sees, or None for one that sees all."""
    return None if key.scope in EVERYWHERE else key.tenant


def _shown(kind: str, record: Any) -> dict[str, Any]:
    """A record as JSON, its times in ISO 8601."""
    values = {
        name: value.isoformat() if isinstance(value, datetime) else value for name, value in asdict(record).items()
    }
    return {"object": kind} | values


def _list(kind: str, records: list[Any]) -> Response:
    return JSONResponse({"object": "list", "data": [_shown(kind, record) for record in records]})


@router.get("/tickets")
async def tickets(request: Request, state: str | None = None, tenant: str | None = None) -> Response:
    """Tickets, the one that is due first first, of one `state` and `tenant` or of all."""
    service, key = await _for(request, "tickets")
    chosen = next((known for known in STATES if known == state), None)
    if state is not None and chosen is None:
        raise ApiError(400, f"'state' is one of {', '.join(STATES)}.", code="invalid_value", param="state")
    only = _tenant_of(key)
    if only and tenant not in (None, only):
        return _list("ticket", [])
    return _list("ticket", await service.store.tickets(only or tenant, chosen))


async def _seen(service: Service, key: Key, ticket_id: str) -> Ticket:
    found = await service.store.ticket(ticket_id, _tenant_of(key))
    if found is None:
        raise ApiError(404, f"There is no ticket '{ticket_id}'.", code="ticket_not_found", param="ticket_id")
    return found


@router.get("/tickets/{ticket_id}")
async def ticket(request: Request, ticket_id: str) -> Response:
    """One ticket, with its conversation as both sides saw it: what a person needs to answer."""
    service, key = await _for(request, "tickets")
    found = await _seen(service, key, ticket_id)
    turns = await service.store.turns(found.conversation, found.tenant)
    said = [{"id": turn.id, "asked": turn.question, "said": turn.said, "action": turn.action} for turn in turns]
    return JSONResponse(_shown("ticket", found) | {"turns": said})


@router.post("/tickets/{ticket_id}/answer")
async def answer_ticket(request: Request, ticket_id: str) -> Response:
    """Records a person's answer, once; it returns into the conversation with the next turn."""
    service, key = await _for(request, "tickets")
    told = parse(TicketAnswer, await read_body(request, service.settings.body_limit))
    await _seen(service, key, ticket_id)
    return _ticket(await service.store.answer_ticket(ticket_id, told.answer, told.by))


@router.post("/tickets/{ticket_id}/close")
async def close_ticket(request: Request, ticket_id: str) -> Response:
    """Closes a ticket that needs no answer."""
    service, key = await _for(request, "tickets")
    await _seen(service, key, ticket_id)
    return _ticket(await service.store.close_ticket(ticket_id, key.id))


def _ticket(ticket: Ticket) -> Response:
    return JSONResponse(_shown("ticket", ticket))


@router.get("/policies")
async def policies(request: Request, name: str | None = None) -> Response:
    """The stored policy versions, newest first."""
    service, _ = await _for(request, "policies")
    listed = [_shown("policy", one) | {"state": one.state} for one in await service.store.policies(name)]
    return JSONResponse({"object": "list", "data": listed})


@router.post("/policies")
async def put_policy(request: Request) -> Response:
    """Checks a policy, stores it, and makes it live unless told not to; a failing one changes nothing."""
    service, _ = await _for(request, "policies")
    told = parse(PolicyUpload, await read_body(request, service.settings.body_limit))
    return _put(await service.policies.put(told.source, told.by, told.activate, _grader(service)), told.activate)


@router.get("/policies/schema")
async def policy_schema(request: Request) -> Response:
    """The JSON Schema of a policy file, for editors."""
    await caller(request, "policies")
    return JSONResponse(json_schema())


@router.post("/policies/{name}/activate")
async def activate_policy(request: Request, name: str) -> Response:
    """Checks a stored version anew, a draft or a retired one, and makes it live."""
    service, _ = await _for(request, "policies")
    told = parse(PolicyChoice, await read_body(request, service.settings.body_limit))
    if not told.version:
        raise ApiError(
            400, "Say which 'version' to activate, or its start.", code="missing_required_parameter", param="version"
        )
    return _put(await service.policies.activate(name, told.version, told.by, _grader(service)))


@router.post("/policies/{name}/rollback")
async def roll_back_policy(request: Request, name: str) -> Response:
    """Makes the version live again that was live before, or the one that is named, once it passes its check."""
    service, _ = await _for(request, "policies")
    told = parse(PolicyChoice, await read_body(request, service.settings.body_limit))
    return _put(await service.policies.roll_back(name, told.version, told.by, _grader(service)))


def _grader(service: Service) -> Grader | None:
    return service.fleet if service.engine.state == "ready" else None


def _put(put: Put, active: bool = True) -> Response:
    what = {"object": "policy", "id": put.policy.id, "active": active, "report": render(put.report)}
    return JSONResponse(what | {"left_behind": put.left_behind})


@router.get("/audit")
async def audit(request: Request, limit: int = 100) -> Response:
    """The newest entries of the audit log."""
    service, _ = await _for(request, "audit")
    return _list("audit", await service.store.audit_log(min(max(limit, 1), 1000)))
