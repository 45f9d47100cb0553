"""A token issuer on loopback: its discovery document, its public keys, and tokens that it signs."""

from __future__ import annotations

import base64
import json
import time
import warnings
from functools import cache
from typing import Any, Self

from aiohttp import web
from joserfc import jwk, jws

from tests.fakes import _Loopback

Json = dict[str, Any]


def encoded(value: Json | bytes) -> str:
    """base64url without padding, of JSON where it is no bytes."""
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@cache
def _keys() -> dict[str, jwk.Key]:
    return {
        "rsa": jwk.RSAKey.generate_key(2048, {"kid": "rsa"}),
        "ec": jwk.ECKey.generate_key("P-256", {"kid": "ec"}),
        "ed": jwk.OKPKey.generate_key("Ed25519", {"kid": "ed"}),
    }


class FakeIssuer:
    """What an identity provider is to the gateway. `keys` are its private keys by kid; `down` makes it answer 500."""

    def __init__(self) -> None:
        self.keys = dict(_keys())
        self.more_keys: list[Json] = []
        self.down = False
        self.asked: list[str] = []
        self.discovery: Json = {}
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self._server = _Loopback(app)

    async def __aenter__(self) -> Self:
        self.url = await self._server.start()
        self.discovery = {"issuer": self.url, "jwks_uri": f"{self.url}/keys"}
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._server.stop()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        if self.down:
            return web.Response(status=500)
        if request.path == "/.well-known/openid-configuration":
            return web.json_response(self.discovery)
        return web.json_response({"keys": [*self.public(), *self.more_keys]})

    def public(self) -> list[Json]:
        """Its public keys as they are published."""
        return [key.as_dict(private=False) for key in self.keys.values()]

    def claims(self, **changes: Any) -> Json:
        """The claims of a good token of tenant `acme`; a change to None leaves a claim out."""
        now = int(time.time())
        usual = {"iss": self.url, "aud": "newel", "sub": "dana@acme.example", "iat": now, "exp": now + 300}
        told = usual | {"tenant": "acme"} | changes
        return {name: value for name, value in told.items() if value is not None}

    def token(self, kid: str = "rsa", alg: str = "RS256", header: Json | None = None, **changes: Any) -> str:
        """A token that it signs with one of its keys."""
        return signed(self.keys[kid], {"alg": alg, "kid": kid, "typ": "JWT"} | (header or {}), self.claims(**changes))


def signed(key: jwk.Key, header: Json, claims: Json) -> str:
    """The token that a key makes of a header and claims, whatever they say; the signature is by `alg` of the header."""
    told = f"{encoded(header)}.{encoded(claims)}".encode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # EdDSA has a new name
        registry = jws.JWSRegistry(algorithms=[header["alg"]])
        return f"{told.decode()}.{encoded(registry.get_alg(header['alg']).sign(told, key))}"
