"""Tokens of an OpenID Connect issuer: a JWT that its keys verify becomes a key of a tenant.

What a token may be is decided here and never by the token: the algorithms are listed in the settings, keys come from
the issuer's JWKS alone (a header's `jku`, `jwk` or `x5u` is not looked at), and a shared secret is no key.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import aiohttp
import orjson
from joserfc import jwk, jws
from joserfc.errors import ExpiredTokenError, JoseError, UnsupportedAlgorithmError
from joserfc.jwa import JWSAlgModel
from joserfc.jwt import JWTClaimsRegistry, decode

from app.errors import TokenRefused, unavailable
from app.logs import event
from app.metrics import Metrics
from app.records import OIDC_KEY, Key, KeyScope
from app.settings import OidcSettings

TOKEN_BYTES, DOCUMENT_BYTES, MOST_KEYS = 16_384, 262_144, 64
FETCH_SECONDS = 5.0
UNKNOWN_KID_SECONDS = 10.0
"""At least so far apart are two look-ups that tokens with unknown keys, or an issuer that is down, can cause."""
RSA_BITS = 2048
FAR = 2**53
"""A time that fits into a float."""
FAMILIES = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}
"""The kind of key for the first letters of an algorithm."""
TYPES = ("jwt", "at+jwt", "application/at+jwt")


@dataclass(frozen=True, slots=True)
class Verified:
    """What a token says: as a key, and until when it is good (Unix time)."""

    key: Key
    expires: float


class _Algorithms(jws.JWSRegistry):
    """The listed algorithms and no other; without the warning at each use that EdDSA has a new name (RFC 9864)."""

    def __init__(self, names: Collection[str]):
        super().__init__(algorithms=names, strict_check_header=False)  # unknown fields are ignored, `crit` is not
        self._names = frozenset(names)

    def get_alg(self, name: str) -> JWSAlgModel:
        """The algorithm; raises UnsupportedAlgorithmError for one that is not listed."""
        if name not in self._names:
            raise UnsupportedAlgorithmError("not in auth.oidc.algorithms")
        return self.algorithms[name]


class Jwks:
    """The issuer's public keys: kept when it is down, looked up anew when they are old or a token names another."""

    def __init__(self, settings: OidcSettings, session: aiohttp.ClientSession, metrics: Metrics):
        self._settings, self._session, self._metrics = settings, session, metrics
        self._keys: tuple[jwk.Key, ...] = ()
        self._fetched = self._tried = float("-inf")
        self._fetching: asyncio.Task[None] | None = None

    async def find(self, kid: str | None, algorithm: str) -> jwk.Key | None:
        """The key that a token names, or the only one that fits when it names none; raises ApiError 503 without any.

        Keys that are old are used while new ones are on their way: a slow issuer holds up nobody.
        """
        if not self._keys:
            await self._look_up()
            if not self._keys:
                message = "The keys that verify tokens cannot be had of their issuer just now; try again in a while."
                raise unavailable(message, "issuer_down", int(UNKNOWN_KID_SECONDS))
        elif time.monotonic() - self._fetched > self._settings.refresh:
            self._begin()
        if (found := self._fitting(kid, algorithm)) is None and kid is not None:
            await self._look_up()
            found = self._fitting(kid, algorithm)
        return found

    def _fitting(self, kid: str | None, algorithm: str) -> jwk.Key | None:
        fit = [key for key in self._keys if kid in (None, key.kid) and _fits(key, algorithm)]
        return fit[0] if len(fit) == 1 else None  # two that fit are a guess, and we do not guess

    async def close(self) -> None:
        """Ends a look-up that still runs."""
        if self._fetching is not None and self._fetching.cancel():
            await asyncio.wait({self._fetching})

    async def _look_up(self) -> None:
        if task := self._begin():
            await asyncio.shield(task)

    def _begin(self) -> asyncio.Task[None] | None:
        """The look-up that runs, or a new one; None when the last one was only just now."""
        if self._fetching is not None and not self._fetching.done():
            return self._fetching
        if time.monotonic() - self._tried < UNKNOWN_KID_SECONDS:
            return None
        self._tried = time.monotonic()
        self._fetching = asyncio.create_task(self._fetch(), name="newel-jwks")
        return self._fetching

    async def _fetch(self) -> None:
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                url = self._settings.jwks_url or await self._discovered()
                keys = usable(await self._document(url))
            if not keys:
                raise ValueError("no usable key in it")
        except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
            self._metrics.jwks.labels("failed").inc()
            event("jwks_failed", logging.WARNING, error=type(error).__name__)
            return
        self._metrics.jwks.labels("fetched").inc()
        self._keys, self._fetched = keys, time.monotonic()

    async def _discovered(self) -> str:
        """The address of the keys, from the issuer's discovery document (OpenID Connect Discovery 1.0, 4)."""
        issuer = self._settings.issuer
        told = await self._document(f"{issuer.rstrip('/')}/.well-known/openid-configuration")
        if told.get("issuer") != issuer:
            raise ValueError("the document is another issuer's")
        url = told.get("jwks_uri")
        if not isinstance(url, str) or not secure(url):
            raise ValueError("jwks_uri is not an https address")
        return url

    async def _document(self, url: str) -> dict[str, Any]:
        """The JSON object at `url`: no redirect is followed, and no more is read than a document has."""
        async with self._session.get(url, allow_redirects=False) as answer:
            if answer.status != 200:
                raise ValueError(f"status {answer.status}")
            body = bytearray()
            async for piece in answer.content.iter_any():
                body += piece
                if len(body) > DOCUMENT_BYTES:
                    raise ValueError("too large")
        document = orjson.loads(bytes(body))
        if not isinstance(document, dict):
            raise ValueError("not a JSON object")
        return document


def secure(url: str) -> bool:
    """True for https, and for http on this very machine."""
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost"))


def usable(document: dict[str, Any]) -> tuple[jwk.Key, ...]:
    """The public signing keys of a JWKS; what is for encryption, a shared secret, weak or unknown is left out."""
    listed = document.get("keys")
    keys = []
    for data in listed[:MOST_KEYS] if isinstance(listed, list) else ():
        if not isinstance(data, dict) or data.get("kty") not in FAMILIES.values() or data.get("use", "sig") != "sig":
            continue
        if data["kty"] == "RSA" and len(str(data.get("n", ""))) * 6 < RSA_BITS:
            continue
        with suppress(JoseError, ValueError, TypeError, KeyError):
            public = {name: value for name, value in data.items() if name not in ("d", "p", "q", "dp", "dq", "qi")}
            public.pop("key_ops", None)
            key = jwk.import_key(public)
            if not (isinstance(key, jwk.RSAKey) and key.public_key.key_size < RSA_BITS):
                keys.append(key)
    return tuple(keys)


def _fits(key: jwk.Key, algorithm: str) -> bool:
    meant = key.get("alg") or algorithm
    same = meant == algorithm or {meant, algorithm} == {"EdDSA", "Ed25519"}  # the old and the new name
    return same and key.key_type == FAMILIES[algorithm[:2]]


class Oidc:
    """Verifies tokens."""

    def __init__(
        self,
        settings: OidcSettings,
        session: aiohttp.ClientSession,
        metrics: Metrics,
        secret: bytes,
        clock: Callable[[], float] = time.time,
    ):
        """secret: of the service, under which a token's `sub` becomes an id. Raises ValueError for settings that would
        let in what they should not: no audience, plain http.
        """
        if not settings.audience:
            raise ValueError("auth.oidc.audience is empty: any token of the issuer would open the door")
        if not secure(settings.issuer) or not secure(settings.jwks_url or settings.issuer):
            raise ValueError("auth.oidc.issuer and auth.oidc.jwks_url must be https addresses")
        self._settings, self._secret, self._clock = settings, secret, clock
        self._jwks = Jwks(settings, session, metrics)
        self._registry = _Algorithms(settings.algorithms)
        self._claims = JWTClaimsRegistry(
            now=lambda: int(clock()),
            leeway=settings.leeway,
            iss={"essential": True, "value": settings.issuer},
            aud={"essential": True, "values": list(settings.audience)},
            exp={"essential": True},
            sub={"essential": True},
        )

    async def verify(self, token: str) -> Verified:
        """The token as a key; raises TokenRefused (401, or 403 without a tenant), and ApiError 503 without keys."""
        if len(token) > TOKEN_BYTES:
            raise TokenRefused("The token is too long.")
        try:
            key = await self._key_of(jws.extract_compact(token.encode(), registry=self._registry).headers())
            claims = decode(token, key, registry=self._registry).claims
            self._claims.validate(claims)
        except ExpiredTokenError:
            raise TokenRefused("The token has expired; get a new one.", "expired", code="token_expired") from None
        except (JoseError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            # what is wrong with a forged token is not its sender's to know
            raise TokenRefused("The token does not verify: not signed by the issuer, for others, or not yet.") from None
        return Verified(self._as_key(claims), float(min(claims["exp"], FAR)) + self._settings.leeway)

    async def close(self) -> None:
        """Ends a look-up of keys that still runs."""
        await self._jwks.close()

    async def _key_of(self, header: dict[str, Any]) -> jwk.Key:
        algorithm, kid = header.get("alg"), header.get("kid")
        if not isinstance(algorithm, str) or not isinstance(kid, str | None):
            raise ValueError("header")
        self._registry.get_alg(algorithm)
        if str(header.get("typ", "JWT")).lower() not in TYPES:
            raise ValueError("typ")
        if (found := await self._jwks.find(kid, algorithm)) is None:
            raise ValueError("kid")
        return found

    def _as_key(self, claims: dict[str, Any]) -> Key:
        told = self._settings
        tenant = mapped(told.tenants, claim(claims, told.tenant_claim))
        scope = mapped(told.scopes, words(claim(claims, told.scope_claim)))
        if tenant is None or scope is None:
            missing = "tenant" if tenant is None else "scope"
            message = f"The token is good, but tells no {missing} that is known here: its issuer must say one."
            raise TokenRefused(message, missing, 403, f"{missing}_needed")
        person = f"{told.issuer}\0{claims['sub']}".encode("utf-8", "surrogatepass")
        who = hmac.new(self._secret, person, hashlib.sha256).hexdigest()[:24]
        return Key(id=f"{OIDC_KEY}{who}", tenant=tenant, scope=cast("KeyScope", scope), hint=OIDC_KEY)


def claim(claims: dict[str, Any], path: str) -> tuple[str, ...]:
    """The texts in a claim; `a.b` is a claim of this name, else the member b of the claim a."""
    value: Any = claims.get(path)
    if value is None:
        value = claims
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
    return tuple(one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str))


def words(texts: Collection[str]) -> tuple[str, ...]:
    """The texts and their words: OAuth's claim `scope` is a list with spaces between."""
    return (*texts, *(word for text in texts for word in text.split(" ")))


def mapped(pairs: Collection[tuple[str, str]], values: Collection[str]) -> str | None:
    """What the first pair stands for whose value is among these; `*` matches always."""
    return next((stands for value, stands in pairs if value == "*" or value in values), None)
