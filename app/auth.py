"""API keys and tokens: who is asking, for which tenant, and what that one may do."""

from __future__ import annotations

import asyncio
import hashlib
import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from app.errors import ApiError, TokenRefused
from app.login import Failures, origin
from app.metrics import Metrics
from app.records import OIDC_KEY, Key, Tenant
from app.settings import Settings
from app.store import Store, StoreDown

if TYPE_CHECKING:
    from app.oidc import Oidc

T = TypeVar("T")
Need = Literal["chat", "tickets", "policies", "audit"]
SCOPES: Mapping[str, frozenset[Need]] = {
    "client": frozenset({"chat"}),
    "reviewer": frozenset({"tickets"}),
    "operator": frozenset({"chat", "tickets", "policies"}),
    "admin": frozenset({"chat", "tickets", "policies", "audit"}),
}
"""What a key of each scope may do."""
EVERYWHERE = frozenset({"operator", "admin"})
"""Scopes that act for all tenants; others see their own tenant alone."""
Headers = Iterable[tuple[bytes, bytes]] | Mapping[bytes, bytes] | Mapping[str, str]
Found = tuple[Key, Tenant]
GOOD_SECONDS, RENEW_SECONDS = 1.0, 0.5
"""A key that was looked up is good for so long, and is looked up anew beside the requests when it is older than so."""
PATIENCE = 1.0
"""Seconds that a request waits for the database when its key was good before."""
REMEMBERED = 10_000
LIMITED_LOOK_UPS = 4
"""Look-ups at a time for addresses that failed too often: their good keys are still found, the database is spared."""
HINT = 8
AUTHORIZATION = frozenset({b"authorization", "authorization"})
KEY_HEADERS = AUTHORIZATION | {b"x-api-key", "x-api-key", b"api-key", "api-key"}
"""OpenAI's and everybody's, Anthropic's, Azure's."""


@dataclass(slots=True)
class _Seen:
    """A key as it was when it was last looked up, at which time `read` (monotonic), and when it ends (Unix time)."""

    key: Key
    tenant: Tenant
    read: float
    expires: float
    needs: frozenset[Need]


@dataclass(frozen=True, slots=True)
class _Flight:
    """A look-up that runs since `began`."""

    task: asyncio.Task[_Seen | None]
    began: float


class Auth:
    """Tells who is asking; one for each gateway."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        metrics: Metrics,
        oidc: Oidc | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ):
        self._store, self._settings, self._metrics, self._oidc = store, settings.auth, metrics, oidc
        self._clock, self._wall = clock, wall
        self._failures = Failures(self._settings.failures, self._settings.failures_per_minute, clock)
        self._pepper = secrets.token_bytes(32)
        self._seen: dict[bytes, _Seen] = {}
        self._unknown: dict[bytes, float] = {}
        self._tenants: dict[str, Tenant] = {}
        self._flights: dict[bytes, _Flight] = {}
        self._limited_look_ups = 0

    async def identify(self, headers: Headers, need: Need = "chat", peer: str = "") -> Found:
        """The key (or the token, as one) of a request and its tenant; raises ApiError 401, 403, 429, and StoreDown.

        headers: as ASGI gives them, with names in small letters; in a mapping a header that came twice is not seen.
        peer: the address of the connection. For a key that was seen within the last second nothing is awaited.
        """
        try:
            given = presented(headers)
        except ApiError:
            self._metrics.auth_failures.labels("missing").inc()
            raise
        # with a pepper, so that the time of a look-up tells nothing of a secret's bytes, and no secret stays in memory
        digest = hashlib.sha256(self._pepper + given).digest()
        seen = self._seen.get(digest)
        age = GOOD_SECONDS if seen is None else self._clock() - seen.read
        if seen is None or age >= GOOD_SECONDS:
            seen = await self._looked_up(digest, given, seen, headers, peer)
        elif age >= RENEW_SECONDS:
            self._flight(digest, given)
        if seen.expires <= self._wall():
            self._metrics.auth_failures.labels("expired").inc()
            code = "token_expired" if seen.key.id.startswith(OIDC_KEY) else "invalid_api_key"
            raise ApiError(401, "The API key or token has expired; get a new one.", code=code)
        if need not in seen.needs:
            self._metrics.auth_failures.labels("scope").inc()
            raise scope_needed(seen.key, need)
        return seen.key, seen.tenant

    def person(self, key: Key) -> str:
        """What stands for the person of a token, where the settings say that tokens name the person; else empty."""
        return key.id if self._settings.oidc.subject and key.id.startswith(OIDC_KEY) else ""

    async def close(self) -> None:
        """Ends the look-ups that still run, also those of the issuer's keys."""
        for flight in self._flights.values():
            flight.task.cancel()
        if self._flights:
            await asyncio.wait({flight.task for flight in self._flights.values()})
        if self._oidc is not None:
            await self._oidc.close()

    async def _looked_up(self, digest: bytes, given: bytes, before: _Seen | None, headers: Headers, peer: str) -> _Seen:
        """The key as it is now, or as it was when the database does not say in time; raises for one that is unknown."""
        address = origin(peer, _values(headers, b"x-forwarded-for"), self._settings.trusted_proxies)
        try:
            found = await (self._renewed(digest, given, before) if before else self._first(digest, given, address))
        except TokenRefused as refused:
            raise self._refusal(given, address, refused.reason, refused) from None
        if found is None:
            unknown = ApiError(401, "The API key is not known, or was revoked.", code="invalid_api_key")
            raise self._refusal(given, address, "unknown", unknown)
        return found

    async def _first(self, digest: bytes, given: bytes, address: str) -> _Seen | None:
        if self._clock() < self._unknown.get(digest, 0.0):
            return None
        limited = self._failures.limited(address) and digest not in self._flights
        if limited and self._limited_look_ups >= LIMITED_LOOK_UPS:
            raise self._too_many(1.0)
        self._limited_look_ups += limited
        try:
            return await asyncio.shield(self._flight(digest, given).task)
        finally:
            self._limited_look_ups -= limited

    async def _renewed(self, digest: bytes, given: bytes, before: _Seen) -> _Seen | None:
        flight = self._flight(digest, given)
        try:
            async with asyncio.timeout(max(0.0, flight.began + PATIENCE - self._clock())):
                return await asyncio.shield(flight.task)
        except (TimeoutError, StoreDown):
            self._metrics.auth_stale.inc()
            return before

    def _flight(self, digest: bytes, given: bytes) -> _Flight:
        """The one look-up of this key that runs."""
        if (flight := self._flights.get(digest)) is None:
            task = asyncio.create_task(self._look_up(digest, given), name="newel-auth")
            flight = self._flights[digest] = _Flight(task, self._clock())
            task.add_done_callback(lambda done: self._landed(digest, done))
        return flight

    def _landed(self, digest: bytes, task: asyncio.Task[_Seen | None]) -> None:
        self._flights.pop(digest, None)
        if not task.cancelled():
            task.exception()  # who waits for it gets it; in the background nobody does

    async def _look_up(self, digest: bytes, given: bytes) -> _Seen | None:
        """Reads the key and remembers what came of it; it is as old as the beginning of the read."""
        began = self._clock()
        try:
            found = await self._read(given.decode("latin-1"))
        except TokenRefused:
            self._seen.pop(digest, None)
            raise
        self._seen.pop(digest, None)
        if found is None:
            _keep(self._unknown, digest, self._clock() + GOOD_SECONDS)
            return None
        key, tenant, expires = found
        seen = _Seen(key, tenant, began, expires, SCOPES.get(key.scope, frozenset()))
        _keep(self._seen, digest, seen)
        return seen

    async def _read(self, secret: str) -> tuple[Key, Tenant, float] | None:
        """(key, its tenant, when it ends); raises TokenRefused, and StoreDown for one that was not seen before."""
        if self._oidc is not None and _is_token(secret):
            verified = await self._oidc.verify(secret)
            return verified.key, await self._tenant(verified.key.tenant), verified.expires
        if (found := await self._store.key(secret)) is None:
            return None
        ends = found[0].limits.expires_at
        return *found, ends.timestamp() if ends else float("inf")

    async def _tenant(self, name: str) -> Tenant:
        """A token's tenant, as it was when the database is down; raises TokenRefused when there is none."""
        try:
            tenant = await self._store.tenant(name)
        except StoreDown:
            if name not in self._tenants:
                raise
            return self._tenants[name]
        if tenant is None:
            self._tenants.pop(name, None)
            message = "The token is good, but its tenant is not known here: make it with 'newel tenants put'."
            raise TokenRefused(message, "tenant", 403, "tenant_needed")
        self._tenants[name] = tenant
        return tenant

    def _refusal(self, given: bytes, address: str, reason: str, error: ApiError) -> ApiError:
        """What is answered to one that is not let in: why, or 429 to those who were told so too often."""
        start = "" if _is_token(given.decode("latin-1")) else given[:HINT].decode("latin-1")
        if wait := self._failures.note(address, start):
            return self._too_many(wait)
        self._metrics.auth_failures.labels(reason).inc()
        return error

    def _too_many(self, wait: float) -> ApiError:
        self._metrics.auth_failures.labels("limited").inc()
        message = "Too many attempts with keys that are not known; try again later, with a good one."
        kind = "rate_limit_error"
        return ApiError(429, message, code="too_many_failures", kind=kind, retry_after=max(1, math.ceil(wait)))


def presented(headers: Headers) -> bytes:
    """The one secret that a request carries; raises ApiError 401 when there is none, or more than one."""
    given = b""
    # the quick question first: ASGI's headers are a list, and to ask for a Mapping costs ten times as much
    for name, value in headers if type(headers) is list else _pairs(headers):
        if name not in KEY_HEADERS:
            continue
        secret = value.encode("latin-1", "replace") if isinstance(value, str) else value
        if name in AUTHORIZATION:
            scheme, _, secret = secret.partition(b" ")
            if scheme.lower() != b"bearer":
                continue
        secret = secret.strip()
        if given and secret and secret != given:  # a proxy may have looked at the other one
            raise ApiError(401, "Two different API keys were given; send one.", code="invalid_api_key")
        given = secret or given
    if not given:
        message = "No API key was given: send 'Authorization: Bearer nk-...' (make one with 'newel keys create')."
        raise ApiError(401, message, code="missing_api_key")
    return given


def scope_needed(key: Key, need: Need) -> ApiError:
    """The 403 that says which scopes may do what was asked for."""
    may = [f"'{scope}'" for scope, needs in SCOPES.items() if need in needs]
    told = " or ".join(filter(None, [", ".join(may[:-1]), may[-1]]))
    message = f"This key's scope is '{key.scope}'; one of {told} is needed here."
    return ApiError(403, message, code="scope_needed", kind="permission_error")


def _is_token(secret: str) -> bool:
    return secret.startswith("eyJ") and secret.count(".") == 2


def _pairs(headers: Headers) -> Iterable[tuple[bytes | str, bytes | str]]:
    return headers.items() if isinstance(headers, Mapping) else headers


def _values(headers: Headers, wanted: bytes) -> list[bytes]:
    both = ((value, name in (wanted, wanted.decode())) for name, value in _pairs(headers))
    return [value.encode("latin-1", "replace") if isinstance(value, str) else value for value, is_it in both if is_it]


def _keep(known: dict[bytes, T], digest: bytes, what: T) -> None:
    """Remembers it, as the newest, and forgets the oldest of too many."""
    known.pop(digest, None)
    known[digest] = what
    if len(known) > REMEMBERED:
        del known[next(iter(known))]
