"""The routes that need an admin key: tickets, policies, one turn with its verdicts, the audit log."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app.api import JsonResponse, service_of
from app.errors import ApiError, unavailable
from app.middleware import read_body
from app.records import Ticket, TicketState
from app.schemas import PolicyUpload, TicketAnswer, parse
from app.service import Service
from app.store import Conflict, NotFound, StoreError
from guardrails.check import render

router = APIRouter(prefix="/admin")
STATES: tuple[TicketState, ...] = ("open", "answered", "closed")


async def _admin(request: Request) -> Service:
    service = service_of(request)
    await service.keys.identify(request, "admin")
    return service


def _shown(ticket: Ticket) -> dict[str, Any]:
    return {"object": "ticket"} | asdict(ticket)


@router.get("/tickets")
async def tickets(request: Request, state: str | None = None) -> Response:
    """Tickets, the most urgent first, of one `state` or of all."""
    service = await _admin(request)
    if state is not None and state not in STATES:
        raise ApiError(400, f"'state' is one of {', '.join(STATES)}.", code="invalid_value", param="state")
    found = await service.store.tickets(state=next((known for known in STATES if known == state), None))
    return JsonResponse({"object": "list", "data": [_shown(ticket) for ticket in found]})


@router.post("/tickets/{ticket_id}/answer")
async def answer_ticket(request: Request, ticket_id: str) -> Response:
    """Records a person's answer, once; it returns into the conversation with the next turn."""
    service = await _admin(request)
    told = parse(TicketAnswer, await read_body(request, service.settings.body_limit))
    try:
        return JsonResponse(_shown(await service.store.answer_ticket(ticket_id, told.answer, told.by)))
    except (NotFound, Conflict, StoreError) as error:
        raise _as_api_error(error, "ticket") from None


@router.post("/tickets/{ticket_id}/close")
async def close_ticket(request: Request, ticket_id: str) -> Response:
    """Closes a ticket that needs no answer."""
    service = await _admin(request)
    try:
        return JsonResponse(_shown(await service.store.close_ticket(ticket_id, "admin")))
    except (NotFound, Conflict, StoreError) as error:
        raise _as_api_error(error, "ticket") from None


@router.get("/policies")
async def policies(request: Request, name: str | None = None) -> Response:
    """The stored policy versions, newest first."""
    service = await _admin(request)
    return JsonResponse({"object": "list", "data": [asdict(version) for version in await service.policies.versions(name)]})


@router.post("/policies")
async def put_policy(request: Request) -> Response:
    """Checks a policy, stores it, and makes it live unless told not to; a failing one changes nothing."""
    service = await _admin(request)
    told = parse(PolicyUpload, await read_body(request, service.settings.body_limit))
    grader = service.backend if service.engine.state == "ready" else None
    policy, report = await service.policies.put(told.source, told.by, told.activate, grader)
    return JsonResponse({"object": "policy", "id": policy.id, "active": told.activate, "report": render(report)})


@router.get("/audit")
async def audit(request: Request, limit: int = 100) -> Response:
    """The newest entries of the audit log."""
    service = await _admin(request)
    entries = await service.store.audit_log(min(max(limit, 1), 1000))
    return JsonResponse({"object": "list", "data": [asdict(entry) for entry in entries]})


def _as_api_error(error: Exception, what: str) -> ApiError:
    if isinstance(error, NotFound):
        return ApiError(404, f"There is no such {what}.", code=f"{what}_not_found")
    if isinstance(error, Conflict):
        return ApiError(422, str(error), code="conflict")
    return unavailable("The database is down.", "store_down", 5)
