"""The routes that need an operator's key (scope `admin`), and that act for all tenants: tickets, policies, audit."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from app.api import service_of
from app.auth import identify
from app.errors import ApiError
from app.middleware import read_body
from app.policies import Put
from app.records import Key, Ticket, TicketState
from app.schemas import PolicyChoice, PolicyUpload, TicketAnswer, parse
from app.service import Service
from guardrails.check import render
from guardrails.schema import json_schema
from guardrails.types import Grader

router = APIRouter(prefix="/admin")
STATES: tuple[TicketState, ...] = ("open", "answered", "closed")


async def _admin(request: Request) -> tuple[Service, Key]:
    service = service_of(request)
    key, _ = await identify(service.store, request, "admin")
    return service, key


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
    service, _ = await _admin(request)
    chosen = next((known for known in STATES if known == state), None)
    if state is not None and chosen is None:
        raise ApiError(400, f"'state' is one of {', '.join(STATES)}.", code="invalid_value", param="state")
    return _list("ticket", await service.store.tickets(tenant, chosen))


@router.get("/tickets/{ticket_id}")
async def ticket(request: Request, ticket_id: str) -> Response:
    """One ticket, with its conversation as both sides saw it: what a person needs to answer."""
    service, _ = await _admin(request)
    found = await service.store.ticket(ticket_id)
    if found is None:
        raise ApiError(404, f"There is no ticket '{ticket_id}'.", code="ticket_not_found", param="ticket_id")
    turns = await service.store.turns(found.conversation, found.tenant)
    said = [{"id": turn.id, "asked": turn.question, "said": turn.said, "action": turn.action} for turn in turns]
    return JSONResponse(_shown("ticket", found) | {"turns": said})


@router.post("/tickets/{ticket_id}/answer")
async def answer_ticket(request: Request, ticket_id: str) -> Response:
    """Records a person's answer, once; it returns into the conversation with the next turn."""
    service, _ = await _admin(request)
    told = parse(TicketAnswer, await read_body(request, service.settings.body_limit))
    return _ticket(await service.store.answer_ticket(ticket_id, told.answer, told.by))


@router.post("/tickets/{ticket_id}/close")
async def close_ticket(request: Request, ticket_id: str) -> Response:
    """Closes a ticket that needs no answer."""
    service, key = await _admin(request)
    return _ticket(await service.store.close_ticket(ticket_id, key.id))


def _ticket(ticket: Ticket) -> Response:
    return JSONResponse(_shown("ticket", ticket))


@router.get("/policies")
async def policies(request: Request, name: str | None = None) -> Response:
    """The stored policy versions, newest first."""
    service, _ = await _admin(request)
    listed = [_shown("policy", one) | {"state": one.state} for one in await service.store.policies(name)]
    return JSONResponse({"object": "list", "data": listed})


@router.post("/policies")
async def put_policy(request: Request) -> Response:
    """Checks a policy, stores it, and makes it live unless told not to; a failing one changes nothing."""
    service, _ = await _admin(request)
    told = parse(PolicyUpload, await read_body(request, service.settings.body_limit))
    return _put(await service.policies.put(told.source, told.by, told.activate, _grader(service)), told.activate)


@router.get("/policies/schema")
async def policy_schema(request: Request) -> Response:
    """The JSON Schema of a policy file, for editors."""
    await _admin(request)
    return JSONResponse(json_schema())


@router.post("/policies/{name}/activate")
async def activate_policy(request: Request, name: str) -> Response:
    """Checks a stored version anew, a draft or a retired one, and makes it live."""
    service, _ = await _admin(request)
    told = parse(PolicyChoice, await read_body(request, service.settings.body_limit))
    if not told.version:
        raise ApiError(
            400, "Say which 'version' to activate, or its start.", code="missing_required_parameter", param="version"
        )
    return _put(await service.policies.activate(name, told.version, told.by, _grader(service)))


@router.post("/policies/{name}/rollback")
async def roll_back_policy(request: Request, name: str) -> Response:
    """Makes the version live again that was live before, or the one that is named, once it passes its check."""
    service, _ = await _admin(request)
    told = parse(PolicyChoice, await read_body(request, service.settings.body_limit))
    return _put(await service.policies.roll_back(name, told.version, told.by, _grader(service)))


def _grader(service: Service) -> Grader | None:
    return service.backend if service.engine.state == "ready" else None


def _put(put: Put, active: bool = True) -> Response:
    what = {"object": "policy", "id": put.policy.id, "active": active, "report": render(put.report)}
    return JSONResponse(what | {"left_behind": put.left_behind})


@router.get("/audit")
async def audit(request: Request, limit: int = 100) -> Response:
    """The newest entries of the audit log."""
    service, _ = await _admin(request)
    return _list("audit", await service.store.audit_log(min(max(limit, 1), 1000)))
