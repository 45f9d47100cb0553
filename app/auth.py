"""API keys: who is asking, for which tenant, with which scope."""

from __future__ import annotations

from starlette.requests import Request

from app.errors import ApiError
from app.records import Key, KeyScope, Tenant
from app.store import Store


async def identify(store: Store, request: Request, scope: KeyScope = "client") -> tuple[Key, Tenant]:
    """The key of a request and its tenant; raises ApiError 401 or 403, and StoreDown."""
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        message = "No API key was given: send 'Authorization: Bearer nk-...' (make one with 'newel keys create')."
        raise ApiError(401, message, code="missing_api_key")
    found = await store.key(secret.strip())
    if found is None:
        raise ApiError(401, "The API key is not known, or was revoked.", code="invalid_api_key")
    if scope == "admin" and found[0].scope != "admin":
        raise ApiError(403, "This key's scope is 'client'; an 'admin' key is needed here.", code="scope_needed")
    return found
