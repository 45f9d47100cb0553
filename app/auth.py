"""API keys: who is asking, for which tenant, with which scope."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict

from starlette.requests import Request

from app.errors import ApiError, unavailable
from app.records import Key, Tenant
from app.store import Store, StoreDown

FRESH = 5.0
"""Seconds for which a key is not looked up again; a revoked key works at most this long."""
STALE = 3600.0
"""Seconds for which a known key keeps working while the database cannot be reached."""
REMEMBERED = 10_000


class Keys:
    """Looks keys up, remembers them for a short while, and longer while the database is down."""

    def __init__(self, store: Store):
        self._store = store
        self._known: OrderedDict[str, tuple[float, Key, Tenant]] = OrderedDict()

    async def identify(self, request: Request, scope: str = "client") -> tuple[Key, Tenant]:
        """The key of a request and its tenant; raises ApiError 401, 403 or 503."""
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            message = "No API key was given: send 'Authorization: Bearer nk-...' (make one with 'newel keys create')."
            raise ApiError(401, message, code="missing_api_key")
        found = await self._find(secret.strip())
        if found is None:
            raise ApiError(401, "The API key is not known, or was revoked.", code="invalid_api_key")
        key, tenant = found
        if scope == "admin" and key.scope != "admin":
            raise ApiError(403, "This key's scope is 'client'; an 'admin' key is needed here.", code="scope_needed")
        return key, tenant

    async def _find(self, secret: str) -> tuple[Key, Tenant] | None:
        digest = hashlib.sha256(secret.encode()).hexdigest()
        known = self._known.get(digest)
        age = time.monotonic() - known[0] if known else STALE
        if known and age < FRESH:
            return known[1:]
        try:
            found = await self._store.key(secret)
        except StoreDown:
            if known and age < STALE:
                return known[1:]
            raise unavailable("Keys cannot be checked just now: the database is down.", "store_down", 5) from None
        if found is None:
            self._known.pop(digest, None)
            return None
        self._known[digest] = (time.monotonic(), *found)
        self._known.move_to_end(digest)
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return found
