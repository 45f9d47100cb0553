"""Tokens of an issuer on loopback: what opens the door, and what attackers send."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from joserfc import jwk

from app import oidc
from app.errors import ApiError
from app.metrics import Metrics
from app.oidc import Oidc, TokenRefused, claim, mapped, secure, usable, words
from app.settings import OidcSettings
from tests.fakes import _Loopback
from tests.issuer import FakeIssuer, encoded, signed

TENANTS = [("acme", "acme"), ("globex", "globex")]
SECRET = b"the service's secret"


@pytest.fixture
async def issuer() -> AsyncIterator[FakeIssuer]:
    async with FakeIssuer() as issuer:
        yield issuer


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as http:
        yield http


def verifier(issuer: FakeIssuer, http: aiohttp.ClientSession, secret: bytes = SECRET, **changes: Any) -> Oidc:
    usual: dict[str, Any] = {"issuer": issuer.url, "audience": ["newel"], "tenants": TENANTS}
    return Oidc(OidcSettings(**(usual | changes)), http, Metrics(), secret)


@pytest.fixture
async def verify(issuer: FakeIssuer, http: aiohttp.ClientSession) -> AsyncIterator[Oidc]:
    it = verifier(issuer, http)
    yield it
    await it.close()


async def refused(it: Oidc, token: str) -> TokenRefused:
    with pytest.raises(TokenRefused) as caught:
        await it.verify(token)
    assert token not in caught.value.message
    return caught.value


# --- what opens the door


@pytest.mark.parametrize(
    ("kid", "alg"), [("rsa", "RS256"), ("ec", "ES256"), ("ed", "EdDSA"), ("rsa", "PS256"), ("ed", "Ed25519")]
)
async def test_a_token_that_the_issuer_signed_is_a_key_of_its_tenant(
    issuer: FakeIssuer, http: aiohttp.ClientSession, kid: str, alg: str
) -> None:
    it = verifier(issuer, http, algorithms=["RS256", "ES256", "EdDSA", "PS256", "Ed25519"])
    verified = await it.verify(issuer.token(kid, alg))
    assert (verified.key.tenant, verified.key.scope) == ("acme", "client")
    assert verified.key.id.startswith("oidc:")
    assert "dana" not in repr(verified.key)
    assert verified.expires == pytest.approx(time.time() + 330, abs=5)


async def test_a_person_keeps_one_id_which_others_cannot_compute(
    issuer: FakeIssuer, http: aiohttp.ClientSession, verify: Oidc
) -> None:
    ids = [(await verify.verify(issuer.token(sub=sub))).key.id for sub in ("dana", "dana", "ana")]
    assert ids[0] == ids[1] != ids[2]
    elsewhere = verifier(issuer, http, secret=b"another")
    assert (await elsewhere.verify(issuer.token(sub="dana"))).key.id != ids[0]


async def test_the_issuers_keys_are_looked_up_once_for_many_tokens(issuer: FakeIssuer, verify: Oidc) -> None:
    await asyncio.gather(*(verify.verify(issuer.token()) for _ in range(20)))
    assert issuer.asked == ["/.well-known/openid-configuration", "/keys"]


async def test_without_a_kid_the_only_key_that_fits_is_taken(issuer: FakeIssuer, verify: Oidc) -> None:
    token = signed(issuer.keys["ec"], {"alg": "ES256"}, issuer.claims())
    assert (await verify.verify(token)).key.tenant == "acme"
    second = jwk.ECKey.generate_key("P-256", {"kid": "ec2"})
    issuer.keys["ec2"] = second
    other = verifier(issuer, verify._jwks._session)
    await refused(other, token)


@pytest.mark.parametrize("aud", ["newel", ["newel"], ["other", "newel"]])
async def test_one_of_several_audiences_may_be_us(issuer: FakeIssuer, verify: Oidc, aud: Any) -> None:
    assert (await verify.verify(issuer.token(aud=aud))).key.tenant == "acme"


async def test_clocks_may_differ_by_the_leeway(issuer: FakeIssuer, http: aiohttp.ClientSession) -> None:
    now = int(time.time())
    it = verifier(issuer, http, leeway=60)
    for changes in ({"exp": now - 50}, {"nbf": now + 50}, {"iat": now + 50}):
        assert (await it.verify(issuer.token(**changes))).key.tenant == "acme"


@pytest.mark.parametrize(
    ("told", "tenant", "scope"),
    [
        ({"org": {"id": "acme"}, "scope": "openid newel.operator"}, "acme", "operator"),
        ({"org": {"id": "globex"}, "scope": "openid"}, "globex", "client"),
        ({"org.id": "globex", "scope": ["x", "newel.admin"]}, "globex", "admin"),
        ({"org": {"id": ["else", "globex", "acme"]}}, "acme", "client"),  # the first pair counts
    ],
)
async def test_claims_are_mapped_to_tenant_and_scope(
    issuer: FakeIssuer, http: aiohttp.ClientSession, told: dict[str, Any], tenant: str, scope: str
) -> None:
    scopes = [("newel.admin", "admin"), ("newel.operator", "operator"), ("*", "client")]
    it = verifier(issuer, http, tenant_claim="org.id", scopes=scopes)
    key = (await it.verify(issuer.token(tenant=None, **told))).key
    assert (key.tenant, key.scope) == (tenant, scope)


@pytest.mark.parametrize(
    "told", [{"tenant": "initech"}, {"tenant": None}, {"tenant": "acme x"}, {"tenant": 7}, {"tenant": {"acme": 1}}]
)
async def test_a_token_without_a_tenant_that_is_mapped_opens_nothing(
    issuer: FakeIssuer, verify: Oidc, told: dict[str, Any]
) -> None:
    error = await refused(verify, signed(issuer.keys["rsa"], {"alg": "RS256", "kid": "rsa"}, issuer.claims(**told)))
    assert (error.status, error.code, error.reason) == (403, "tenant_needed", "tenant")


async def test_a_token_without_a_scope_that_is_mapped_opens_nothing(
    issuer: FakeIssuer, http: aiohttp.ClientSession
) -> None:
    it = verifier(issuer, http, scopes=[("newel", "client")])
    error = await refused(it, issuer.token(scope="openid"))
    assert (error.status, error.code) == (403, "scope_needed")


# --- what attackers send


def with_alg(issuer: FakeIssuer, alg: str, signature: bytes = b"") -> str:
    return f"{encoded({'alg': alg, 'kid': 'rsa'})}.{encoded(issuer.claims())}.{encoded(signature)}"


def with_public_key_as_secret(issuer: FakeIssuer, form: str) -> str:
    key = issuer.keys["rsa"]
    public = {
        "pem": lambda: key.as_pem(private=False),
        "der": lambda: key.as_der(private=False),
        "json": lambda: json.dumps(key.as_dict(private=False)).encode(),
    }[form]()
    told = f"{encoded({'alg': 'HS256', 'kid': 'rsa'})}.{encoded(issuer.claims())}"
    return f"{told}.{encoded(hmac.digest(public, told.encode(), hashlib.sha256))}"


def tampered(issuer: FakeIssuer) -> str:
    head, _, signature = issuer.token().split(".")
    return f"{head}.{encoded(issuer.claims(tenant='globex'))}.{signature}"


def with_own_key(issuer: FakeIssuer, **header: Any) -> str:
    mine = jwk.RSAKey.generate_key(2048, {"kid": "mine"})
    header = {"alg": "RS256"} | {name: value(mine) if callable(value) else value for name, value in header.items()}
    return signed(mine, header, issuer.claims())


ATTACKS: dict[str, Callable[[FakeIssuer], str]] = {
    "alg none": lambda it: with_alg(it, "none"),
    "alg None": lambda it: with_alg(it, "None"),
    "alg nOnE with a signature": lambda it: with_alg(it, "nOnE", b"x"),
    "alg empty": lambda it: with_alg(it, ""),
    "alg unknown": lambda it: with_alg(it, "RS1"),
    "public key as secret, PEM": lambda it: with_public_key_as_secret(it, "pem"),
    "public key as secret, DER": lambda it: with_public_key_as_secret(it, "der"),
    "public key as secret, JWK": lambda it: with_public_key_as_secret(it, "json"),
    "algorithm that is not listed": lambda it: it.token(alg="PS256"),
    "RSA key for ES256": lambda it: with_alg(it, "ES256", bytes(64)),
    "signature of zeros": lambda it: (
        f"{encoded({'alg': 'ES256', 'kid': 'ec'})}.{encoded(it.claims())}.{encoded(bytes(64))}"
    ),
    "no signature": lambda it: it.token().rpartition(".")[0] + ".",
    "claims changed": tampered,
    "own key, kid of the issuer's": lambda it: with_own_key(it, kid="rsa"),
    "own key in the header": lambda it: with_own_key(it, kid="mine", jwk=lambda key: key.as_dict(private=False)),
    "own key by jku": lambda it: with_own_key(it, kid="mine", jku=f"{it.url}/mine"),
    "own key by x5u": lambda it: with_own_key(it, kid="mine", x5u=f"{it.url}/mine"),
    "kid as a path": lambda it: with_own_key(it, kid="../../../../dev/null"),
    "kid as SQL": lambda it: with_own_key(it, kid="' UNION SELECT 'secret'--"),
    "kid as a number": lambda it: with_own_key(it, kid=7),
    "kid as a list": lambda it: with_own_key(it, kid=["rsa"]),
    "kid null": lambda it: with_own_key(it, kid=None),
    "crit unknown": lambda it: it.token(header={"crit": ["exp"], "exp": 1}),
    "unencoded payload": lambda it: it.token(header={"crit": ["b64"], "b64": False}),
    "typ of another kind": lambda it: it.token(header={"typ": "logout+jwt"}),
    "another audience": lambda it: it.token(aud="other"),
    "audience that contains ours": lambda it: it.token(aud="newel-admin"),
    "no audience": lambda it: it.token(aud=None),
    "empty audience": lambda it: it.token(aud=[]),
    "another issuer": lambda it: it.token(iss="https://evil.example"),
    "issuer with a slash": lambda it: it.token(iss=f"{it.url}/"),
    "issuer in a list": lambda it: it.token(iss=[it.url]),
    "no issuer": lambda it: it.token(iss=None),
    "not yet": lambda it: it.token(nbf=int(time.time()) + 3600),
    "issued in the future": lambda it: it.token(iat=int(time.time()) + 3600),
    "no end": lambda it: it.token(exp=None),
    "end as text": lambda it: it.token(exp="9999999999"),
    "end not a number": lambda it: it.token(exp=float("nan")),
    "end at infinity": lambda it: it.token(exp=float("inf")),
    "end true": lambda it: it.token(exp=True),
    "no person": lambda it: it.token(sub=None),
    "empty person": lambda it: it.token(sub=""),
    "person as a number": lambda it: it.token(sub=7),
    "claims are a list": lambda it: f"{encoded({'alg': 'RS256', 'kid': 'rsa'})}.{encoded(b'[1]')}.x",
    "deep claims": lambda it: f"{encoded({'alg': 'RS256', 'kid': 'rsa'})}.{encoded(b'[' * 9000)}.x",
    "deep header": lambda it: f"{encoded(b'[' * 9000)}.x.x",
    "header is a list": lambda it: f"{encoded(b'[]')}.x.x",
    "header is no base64": lambda it: "eyJ%.x.x",
    "encrypted": lambda it: ".".join([encoded({"alg": "RSA-OAEP", "enc": "A256GCM"}), "x", "x", "x", "x"]),
    "nothing": lambda it: "..",
    "not ASCII": lambda it: f"{it.token()}\u00fc",
    "very long": lambda it: it.token(pad="x" * 20_000),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
async def test_an_attack_opens_nothing(issuer: FakeIssuer, verify: Oidc, attack: Callable[[FakeIssuer], str]) -> None:
    await verify.verify(issuer.token())
    error = await refused(verify, attack(issuer))
    assert (error.status, error.code) == (401, "invalid_token")
    assert not {path for path in issuer.asked if "mine" in path}


async def test_an_expired_token_is_told_so(issuer: FakeIssuer, verify: Oidc) -> None:
    error = await refused(verify, issuer.token(exp=int(time.time()) - 3600))
    assert (error.status, error.code, error.reason) == (401, "token_expired", "expired")


async def test_an_end_beyond_all_time_is_no_fault_of_ours(issuer: FakeIssuer, verify: Oidc) -> None:
    assert (await verify.verify(issuer.token(exp=10**400))).expires > time.time()
    assert (await verify.verify(issuer.token(sub="\ud800"))).key.id.startswith("oidc:")


async def test_a_shared_secret_or_a_weak_key_among_the_issuers_keys_is_no_key(issuer: FakeIssuer, verify: Oidc) -> None:
    secret = jwk.OctKey.generate_key(256, {"kid": "shared"})
    for_encryption = jwk.RSAKey.generate_key(2048, {"kid": "enc", "use": "enc"})
    issuer.more_keys = [
        secret.as_dict(private=True),
        for_encryption.as_dict(private=False),
        {"kty": "RSA", "kid": "weak", "n": encoded(bytes([200]) * 128), "e": "AQAB"},
        {"kty": "EC", "kid": "broken", "crv": "P-256", "x": "AA", "y": "AA"},
        {"kty": "quantum"},
        {},
    ]
    await verify.verify(issuer.token())
    await refused(verify, signed(for_encryption, {"alg": "RS256", "kid": "enc"}, issuer.claims()))
    assert {key.kid for key in verify._jwks._keys} == {"rsa", "ec", "ed"}
    assert usable({"keys": "none"}) == usable({}) == usable({"keys": [1, None]}) == ()


async def test_a_key_is_used_for_the_algorithm_that_it_is_for_alone(
    issuer: FakeIssuer, http: aiohttp.ClientSession
) -> None:
    issuer.keys = {"rsa": jwk.RSAKey.generate_key(2048, {"kid": "rsa", "alg": "RS256"})}
    it = verifier(issuer, http, algorithms=["RS256", "PS256"])
    await it.verify(issuer.token())
    await refused(it, issuer.token(alg="PS256"))


# --- the issuer's keys


async def test_a_flood_of_unknown_kids_asks_the_issuer_once(issuer: FakeIssuer, verify: Oidc) -> None:
    mine = jwk.ECKey.generate_key("P-256")
    await verify.verify(issuer.token())
    before = len(issuer.asked)
    floods = [signed(mine, {"alg": "ES256", "kid": f"k{number}"}, issuer.claims()) for number in range(50)]
    told = await asyncio.gather(*(verify.verify(token) for token in floods), return_exceptions=True)
    assert all(isinstance(one, TokenRefused) for one in told)
    assert len(issuer.asked) == before  # the last look-up was only just now


async def test_a_new_key_of_the_issuer_is_found_by_its_kid(
    issuer: FakeIssuer, verify: Oidc, monkeypatch: pytest.MonkeyPatch
) -> None:
    await verify.verify(issuer.token())
    issuer.keys = {"new": jwk.ECKey.generate_key("P-256", {"kid": "new"})}
    await refused(verify, issuer.token("new", "ES256"))
    monkeypatch.setattr(oidc, "UNKNOWN_KID_SECONDS", 0.0)
    told = await asyncio.gather(*(verify.verify(issuer.token("new", "ES256")) for _ in range(10)))
    assert {one.key.tenant for one in told} == {"acme"}
    assert issuer.asked.count("/keys") == 2
    await refused(verify, issuer.token("new", "ES256", header={"kid": "rsa"}))  # the old one is gone


async def test_old_keys_are_used_while_new_ones_are_on_their_way(
    issuer: FakeIssuer, verify: Oidc, monkeypatch: pytest.MonkeyPatch
) -> None:
    await verify.verify(issuer.token())
    monkeypatch.setattr(oidc, "UNKNOWN_KID_SECONDS", 0.0)
    verify._jwks._fetched -= 1000
    old = issuer.token()
    issuer.keys = {"new": jwk.RSAKey.generate_key(2048, {"kid": "new"})}
    assert (await verify.verify(old)).key.tenant == "acme"
    assert verify._jwks._fetching
    await verify._jwks._fetching
    await refused(verify, old)


async def test_keys_that_are_known_are_good_while_the_issuer_is_down(
    issuer: FakeIssuer, verify: Oidc, monkeypatch: pytest.MonkeyPatch
) -> None:
    await verify.verify(issuer.token())
    issuer.down = True
    monkeypatch.setattr(oidc, "UNKNOWN_KID_SECONDS", 0.0)
    verify._jwks._fetched -= 1000
    for _ in range(3):
        assert (await verify.verify(issuer.token("ec", "ES256"))).key.tenant == "acme"
        assert verify._jwks._fetching
        await verify._jwks._fetching
    assert verify._jwks._metrics.registry.get_sample_value("newel_jwks_fetches_total", {"outcome": "failed"}) == 3


async def test_without_any_keys_it_is_503_and_the_issuer_is_not_pressed(issuer: FakeIssuer, verify: Oidc) -> None:
    issuer.down = True
    for _ in range(5):
        with pytest.raises(ApiError) as caught:
            await verify.verify(issuer.token())
        assert (caught.value.status, caught.value.code) == (503, "issuer_down")
        assert caught.value.retry_after
    assert len(issuer.asked) == 1


@pytest.mark.parametrize(
    "discovery",
    [
        {"issuer": "https://evil.example"},
        {"jwks_uri": "http://evil.example/keys"},
        {"jwks_uri": "file:///etc/passwd"},
        {"jwks_uri": 7},
        {"jwks_uri": None},
    ],
)
async def test_a_discovery_document_that_leads_astray_is_not_followed(
    issuer: FakeIssuer, verify: Oidc, discovery: dict[str, Any]
) -> None:
    issuer.discovery |= discovery
    with pytest.raises(ApiError) as caught:
        await verify.verify(issuer.token())
    assert caught.value.status == 503
    assert issuer.asked == ["/.well-known/openid-configuration"]


@pytest.mark.parametrize("how", ["redirect", "large", "list", "empty"])
async def test_keys_that_come_in_a_strange_way_are_not_taken(
    issuer: FakeIssuer, http: aiohttp.ClientSession, how: str
) -> None:
    async def keys(request: web.Request) -> web.Response:
        body = {"keys": issuer.public(), "pad": "x" * (oidc.DOCUMENT_BYTES if how == "large" else 0)}
        if how == "redirect":
            return web.Response(status=302, headers={"location": f"{issuer.url}/keys"})
        return web.json_response([body] if how == "list" else {"keys": []} if how == "empty" else body)

    app = web.Application()
    app.router.add_get("/keys", keys)
    server = _Loopback(app)
    it = verifier(issuer, http, jwks_url=f"{await server.start()}/keys")
    with pytest.raises(ApiError) as caught:
        await it.verify(issuer.token())
    assert (caught.value.status, issuer.asked) == (503, [])
    await server.stop()


async def test_a_slow_issuer_is_not_waited_for_long(
    issuer: FakeIssuer, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(oidc, "FETCH_SECONDS", 0.1)
    app = web.Application()
    app.router.add_get("/keys", never)
    server = _Loopback(app)
    it = verifier(issuer, http, jwks_url=f"{await server.start()}/keys")
    with pytest.raises(ApiError) as caught:
        await asyncio.wait_for(it.verify(issuer.token()), 5)
    assert caught.value.status == 503
    await server.stop()


# --- the settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audience": []}, "audience is empty"),
        ({"issuer": "http://login.example.com"}, "must be https"),
        ({"issuer": "login.example.com"}, "must be https"),
        ({"jwks_url": "http://login.example.com/keys"}, "must be https"),
    ],
)
async def test_settings_that_let_in_too_many_are_turned_down(
    http: aiohttp.ClientSession, changes: dict[str, Any], message: str
) -> None:
    usual: dict[str, Any] = {"issuer": "https://login.example.com", "audience": ["newel"]}
    with pytest.raises(ValueError, match=message):
        Oidc(OidcSettings(**(usual | changes)), http, Metrics(), SECRET)


@pytest.mark.parametrize("algorithm", ["none", "HS256", "HS512", "dir"])
def test_no_shared_secret_can_be_set(algorithm: str) -> None:
    with pytest.raises(ValueError, match="algorithms"):
        OidcSettings(algorithms=[algorithm])


def test_only_this_machine_may_speak_plain_http() -> None:
    assert secure("https://login.example.com") and secure("http://127.0.0.1:9/x") and secure("http://[::1]:9/x")
    for url in ("http://login.example.com", "http://127.0.0.1.evil.example", "http://localhost@evil.example", ""):
        assert not secure(url)


def test_a_claim_is_read_by_its_path() -> None:
    claims = {"a": {"b": ["x", 1, "y z"]}, "a.c": "dotted", "s": "one two"}
    assert claim(claims, "a.b") == ("x", "y z")
    assert claim(claims, "a.c") == ("dotted",)
    assert claim(claims, "a") == claim(claims, "nothing.at.all") == ()
    assert words(claim(claims, "s")) == ("one two", "one", "two")
    assert mapped([("two", "a"), ("*", "b")], ("one",)) == "b"
    assert mapped([], ("one",)) is None
