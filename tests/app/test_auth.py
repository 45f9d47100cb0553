"""Who is asking: keys are looked up once a second, so that a revoked one is refused within a second."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from ipaddress import ip_network
from typing import Any

import aiohttp
import pytest
from starlette.datastructures import Headers

from app import auth as module
from app.auth import SCOPES, Auth, presented
from app.errors import ApiError
from app.metrics import Metrics
from app.oidc import Oidc
from app.records import Key, KeyLimits, Tenant, now
from app.settings import AuthSettings, OidcSettings, Settings
from app.store import Store, StoreDown
from app.store.database import Database
from tests.issuer import FakeIssuer


class Clock:
    """Both clocks of an Auth, which stand still until they are moved."""

    def __init__(self) -> None:
        self.now = now().timestamp()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def auth(store: Store, clock: Clock) -> AsyncIterator[Auth]:
    auth = of(store, clock)
    yield auth
    await auth.close()


def of(store: Store, clock: Clock, verifier: Oidc | None = None, **settings: Any) -> Auth:
    return Auth(store, Settings(auth=AuthSettings(**settings)), Metrics(), verifier, clock, clock)


def bearer(secret: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"newel"), (b"authorization", f"Bearer {secret}".encode("latin-1"))]


async def refused(work: Awaitable[Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await work
    return caught.value


def counted(auth: Auth, name: str, **labels: str) -> float:
    return auth._metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each read of the database."""
    real, seen = Database.read, []

    async def counting(self: Database, work: Callable[..., Awaitable[Any]]) -> Any:
        seen.append(1)
        return await real(self, work)

    monkeypatch.setattr(Database, "read", counting)
    return seen


# --- what a request carries


@pytest.mark.parametrize("header", ["Bearer {}", "bearer {}", "BEARER  {} "])
async def test_a_key_tells_its_tenant(store: Store, tenant: str, auth: Auth, header: str) -> None:
    key, secret = await store.add_key(tenant)
    found, its = await auth.identify([(b"authorization", header.format(secret).encode())])
    assert (found.id, its.name, its.policy) == (key.id, tenant, "hr")


@pytest.mark.parametrize(
    "headers",
    [
        [(b"x-api-key", b"nk-1")],
        [(b"api-key", b" nk-1 ")],
        [(b"authorization", b"Bearer nk-1"), (b"x-api-key", b"nk-1")],
        [(b"authorization", b"Basic bmV3ZWw="), (b"x-api-key", b"nk-1")],
        [(b"authorization", b"Bearer nk-1"), (b"authorization", b"Bearer nk-1")],
        [(b"x-api-key", b""), (b"authorization", b"Bearer nk-1")],
        {b"authorization": b"Bearer nk-1"},
        {"x-api-key": "nk-1"},
        Headers({"Authorization": "Bearer nk-1"}),
    ],
)
def test_a_key_comes_in_the_header_that_the_clients_sdk_uses(headers: Any) -> None:
    assert presented(headers) == b"nk-1"


@pytest.mark.parametrize(
    "headers",
    [
        [(b"authorization", b"Bearer nk-1"), (b"authorization", b"Bearer nk-2")],
        [(b"authorization", b"Bearer nk-1"), (b"x-api-key", b"nk-2")],
        [(b"api-key", b"nk-1"), (b"x-api-key", b"nk-2")],
        Headers(raw=[(b"x-api-key", b"nk-1"), (b"x-api-key", b"nk-2")]),
    ],
)
def test_two_different_keys_are_none(headers: Any) -> None:
    with pytest.raises(ApiError) as caught:
        presented(headers)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (None, "missing_api_key"),
        ("", "missing_api_key"),
        ("Bearer", "missing_api_key"),
        ("Bearer   ", "missing_api_key"),
        ("{secret}", "missing_api_key"),
        ("Basic {secret}", "missing_api_key"),
        ("Bearer {secret}x", "invalid_api_key"),
        ("Bearer {secret} {secret}", "invalid_api_key"),
        ("Bearer {hint}", "invalid_api_key"),
        ("Bearer \u00ff\x00", "invalid_api_key"),
        ("Bearer eyJhbGciOiJub25lIn0.e30.", "invalid_api_key"),  # no issuer is set: it is a key like any other
    ],
)
async def test_another_key_is_refused(store: Store, tenant: str, auth: Auth, sent: str | None, code: str) -> None:
    key, secret = await store.add_key(tenant)
    told = [] if sent is None else [(b"authorization", sent.format(secret=secret, hint=key.hint).encode("latin-1"))]
    error = await refused(auth.identify(told))
    assert (error.status, error.code) == (401, code)
    assert secret not in error.message
    assert error.response.headers["www-authenticate"] == "Bearer"
    reason = "missing" if code == "missing_api_key" else "unknown"
    assert counted(auth, "newel_auth_failures_total", reason=reason) == 1


# --- what a key may do


@pytest.mark.parametrize("scope", SCOPES)
async def test_a_scope_opens_what_the_table_says_and_nothing_else(
    store: Store, tenant: str, auth: Auth, scope: Any
) -> None:
    _, secret = await store.add_key(tenant, scope)
    for need in ("chat", "tickets", "policies", "audit"):
        if need in SCOPES[scope]:
            assert (await auth.identify(bearer(secret), need))[0].scope == scope
        else:
            error = await refused(auth.identify(bearer(secret), need))
            assert (error.status, error.code) == (403, "scope_needed")
            assert f"scope is '{scope}'" in error.message
            assert all((f"'{other}'" in error.message) == (need in SCOPES[other]) for other in SCOPES if other != scope)


def test_the_table_is_what_it_should_be() -> None:
    assert {scope: "".join(sorted(need[0] for need in needs)) for scope, needs in SCOPES.items()} == {
        "client": "c",
        "reviewer": "t",
        "operator": "cpt",
        "admin": "acpt",
    }


# --- a key is looked up once a second


async def test_a_key_that_was_just_seen_is_known_without_the_database_or_a_wait(
    store: Store, tenant: str, auth: Auth, reads: list[int], clock: Clock
) -> None:
    key, secret = await store.add_key(tenant)
    await auth.identify(bearer(secret))
    before = len(reads)
    clock.now += 0.49
    with pytest.raises(StopIteration) as done:  # a coroutine that ends at its first step has awaited nothing
        auth.identify(bearer(secret)).send(None)
    assert done.value.value[0].id == key.id
    assert len(reads) == before


async def test_many_requests_with_a_new_key_are_one_look_up(
    store: Store, tenant: str, auth: Auth, reads: list[int]
) -> None:
    _, secret = await store.add_key(tenant)
    before = len(reads)
    found = await asyncio.gather(*(auth.identify(bearer(secret)) for _ in range(50)))
    assert len({key.id for key, _ in found}) == 1
    assert len(reads) == before + 1


async def test_a_request_that_is_cancelled_does_not_cancel_the_look_up_of_others(
    store: Store, tenant: str, auth: Auth
) -> None:
    _, secret = await store.add_key(tenant)
    gone, stays = (asyncio.create_task(auth.identify(bearer(secret))) for _ in range(2))
    await asyncio.sleep(0)
    gone.cancel()
    assert (await stays)[1].name == tenant


async def test_a_revoked_key_is_refused_within_a_second(store: Store, tenant: str, auth: Auth, clock: Clock) -> None:
    key, secret = await store.add_key(tenant)
    await auth.identify(bearer(secret))
    await store.revoke_key(key.id)
    clock.now += 1.0
    error = await refused(auth.identify(bearer(secret)))
    assert (error.status, error.code) == (401, "invalid_api_key")


async def test_a_revoked_key_that_is_in_use_is_refused_sooner(
    store: Store, tenant: str, auth: Auth, clock: Clock
) -> None:
    key, secret = await store.add_key(tenant)
    await auth.identify(bearer(secret))
    await store.revoke_key(key.id)
    clock.now += 0.5
    await auth.identify(bearer(secret))  # this one is let in, and begins the look-up
    (flight,) = auth._flights.values()
    await flight.task
    assert (await refused(auth.identify(bearer(secret)))).code == "invalid_api_key"


async def test_a_look_up_that_takes_long_does_not_make_a_key_younger(
    store: Store, tenant: str, auth: Auth, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, secret = await store.add_key(tenant)
    real = Database.read

    async def slow(self: Database, work: Callable[..., Awaitable[Any]]) -> Any:
        found = await real(self, work)
        clock.now += 1.0
        return found

    monkeypatch.setattr(Database, "read", slow)
    await auth.identify(bearer(secret))
    await store.revoke_key(key.id)
    assert (await refused(auth.identify(bearer(secret)))).code == "invalid_api_key"


async def test_a_tenants_new_policy_holds_within_a_second(store: Store, tenant: str, auth: Auth, clock: Clock) -> None:
    _, secret = await store.add_key(tenant)
    await auth.identify(bearer(secret))
    await store.put_tenant(Tenant(tenant, "finance"))
    clock.now += 1.0
    assert (await auth.identify(bearer(secret)))[1].policy == "finance"


async def test_a_key_ends_at_its_time_though_it_was_just_seen(
    store: Store, tenant: str, auth: Auth, clock: Clock
) -> None:
    clock.now = now().timestamp()
    limits = KeyLimits(expires_at=now() + timedelta(seconds=60))
    _, secret = await store.add_key(tenant, limits=limits)
    await auth.identify(bearer(secret))
    clock.now += 59.9
    auth._seen[next(iter(auth._seen))].read = clock.now
    await auth.identify(bearer(secret))
    clock.now += 0.2
    error = await refused(auth.identify(bearer(secret)))
    assert (error.status, error.code) == (401, "invalid_api_key")


async def test_no_secret_stays_in_memory(store: Store, tenant: str, auth: Auth) -> None:
    _, secret = await store.add_key(tenant)
    await auth.identify(bearer(secret))
    await refused(auth.identify(bearer("nk-unknown")))
    kept = repr({name: getattr(auth, name) for name in vars(auth)})
    assert secret not in kept
    assert "nk-unknown" not in kept


async def test_memory_is_bounded(store: Store, tenant: str, auth: Auth, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 3)
    good = [(await store.add_key(tenant))[1] for _ in range(5)]
    for secret in good:
        await auth.identify(bearer(secret))
    for number in range(5):
        await refused(auth.identify(bearer(f"nk-{number}")))
    assert (len(auth._seen), len(auth._unknown), len(auth._flights)) == (3, 3, 0)


# --- when the database fails


async def test_while_the_database_is_down_a_key_that_was_good_is_good(
    store: Store, tenant: str, auth: Auth, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    (_, known), (_, other) = [await store.add_key(tenant) for _ in range(2)]
    await auth.identify(bearer(known))

    async def down(self: Database, work: object) -> None:
        raise StoreDown("away")

    monkeypatch.setattr(Database, "read", down)
    for _ in range(3):
        clock.now += 3600
        assert (await auth.identify(bearer(known)))[1].name == tenant
    with pytest.raises(StoreDown):
        await auth.identify(bearer(other))


async def test_a_database_that_hangs_is_not_waited_for_when_the_key_was_good(
    store: Store, tenant: str, auth: Auth, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    _, secret = await store.add_key(tenant)
    await auth.identify(bearer(secret))

    async def hangs(self: Database, work: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Database, "read", hangs)
    clock.now += 3600
    async with asyncio.timeout(5):
        assert (await auth.identify(bearer(secret)))[1].name == tenant
        clock.now += 10
        assert (await auth.identify(bearer(secret)))[1].name == tenant  # the same look-up still runs
    assert counted(auth, "newel_auth_stale_total") == 2


async def test_a_key_that_expired_while_the_database_is_down_is_refused(
    store: Store, tenant: str, auth: Auth, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, secret = await store.add_key(tenant, limits=KeyLimits(expires_at=now() + timedelta(seconds=60)))
    await auth.identify(bearer(secret))

    async def down(self: Database, work: object) -> None:
        raise StoreDown("away")

    monkeypatch.setattr(Database, "read", down)
    clock.now += 3600
    assert (await refused(auth.identify(bearer(secret)))).status == 401


# --- those who guess


async def test_who_guesses_is_told_to_wait_and_a_good_key_from_there_still_works(
    store: Store, tenant: str, clock: Clock
) -> None:
    auth = of(store, clock, failures=3, failures_per_minute=6)
    _, secret = await store.add_key(tenant)
    guesses = [await refused(auth.identify(bearer(f"nk-guess{n}"), peer="1.2.3.4")) for n in range(6)]
    assert [error.status for error in guesses] == [401, 401, 401, 429, 429, 429]
    assert (guesses[-1].code, guesses[-1].retry_after) == ("too_many_failures", 10)
    assert counted(auth, "newel_auth_failures_total", reason="limited") == 3
    assert (await auth.identify(bearer(secret), peer="1.2.3.4"))[1].name == tenant  # not seen before
    assert (await refused(auth.identify(bearer("nk-other"), peer="1.2.3.5"))).status == 401
    clock.now += 10
    assert (await refused(auth.identify(bearer("nk-again"), peer="1.2.3.4"))).status == 401
    await auth.close()


async def test_one_keys_start_is_not_guessed_from_many_addresses(store: Store, tenant: str, clock: Clock) -> None:
    auth = of(store, clock, failures=3)
    key, secret = await store.add_key(tenant)
    guesses = [await refused(auth.identify(bearer(f"{key.hint}{n}"), peer=f"1.2.3.{n}")) for n in range(5)]
    assert [error.status for error in guesses] == [401, 401, 401, 429, 429]
    assert (await auth.identify(bearer(secret), peer="1.2.3.99"))[0].id == key.id
    await auth.close()


async def test_the_same_bad_key_does_not_ask_the_database_each_time(
    store: Store, auth: Auth, reads: list[int], clock: Clock
) -> None:
    before = len(reads)
    for _ in range(10):
        await refused(auth.identify(bearer("nk-bad"), peer="1.2.3.4"))
    assert len(reads) == before + 1
    clock.now += 1.0
    await refused(auth.identify(bearer("nk-bad"), peer="1.2.3.4"))
    assert len(reads) == before + 2


async def test_a_flood_of_guesses_has_few_look_ups_at_a_time(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    auth = of(store, clock, failures=1)
    await refused(auth.identify(bearer("nk-first"), peer="1.2.3.4"))
    real, running, most, go = Database.read, 0, 0, asyncio.Event()

    async def counting(self: Database, work: Callable[..., Awaitable[Any]]) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await go.wait()
        running -= 1
        return await real(self, work)

    monkeypatch.setattr(Database, "read", counting)
    flood = [asyncio.create_task(refused(auth.identify(bearer(f"nk-{n}"), peer="1.2.3.4"))) for n in range(50)]
    await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
    go.set()
    assert {error.status for error in await asyncio.gather(*flood)} == {429}
    assert most == module.LIMITED_LOOK_UPS
    await auth.close()


async def test_behind_a_proxy_of_ours_each_client_has_its_own_failures(store: Store, tenant: str, clock: Clock) -> None:
    auth = of(store, clock, failures=1, trusted_proxies=[ip_network("10.0.0.0/8")])

    async def status(client: str, peer: str, guess: str) -> int:
        headers = [*bearer(guess), (b"x-forwarded-for", client.encode())]
        return (await refused(auth.identify(headers, peer=peer))).status

    assert await status("1.1.1.1", "10.0.0.1", "nk-aaaaa1") == 401
    assert await status("1.1.1.1", "10.0.0.1", "nk-bbbbb1") == 429
    assert await status("1.1.1.2", "10.0.0.1", "nk-ccccc1") == 401
    assert await status("9.9.9.1", "8.8.8.8", "nk-ddddd1") == 401
    assert await status("9.9.9.2", "8.8.8.8", "nk-eeeee1") == 429  # a header from elsewhere says nothing
    await auth.close()


# --- tokens


@pytest.fixture
async def issuer() -> AsyncIterator[FakeIssuer]:
    async with FakeIssuer() as issuer:
        yield issuer


@pytest.fixture
async def tokens(store: Store, tenant: str, clock: Clock, issuer: FakeIssuer) -> AsyncIterator[Auth]:
    """An Auth that takes the issuer's tokens: `acme` is the test's tenant, `gone` is one that is not there."""
    told = OidcSettings(
        issuer=issuer.url, audience=["newel"], tenants=[("acme", tenant), ("gone", f"not-{tenant}")], subject=True
    )
    async with aiohttp.ClientSession() as http:
        auth = of(store, clock, Oidc(told, http, Metrics(), b"secret", clock), oidc=told)
        yield auth
        await auth.close()


async def test_a_token_opens_its_own_tenant(tokens: Auth, tenant: str, issuer: FakeIssuer, clock: Clock) -> None:
    token = issuer.token()
    key, its = await tokens.identify(bearer(token))
    assert (its.name, its.policy, key.tenant, key.scope) == (tenant, "hr", tenant, "client")
    assert tokens.person(key) == key.id
    assert tokens.person(Key("key_1", tenant, "client", "nk-12345")) == ""
    with pytest.raises(StopIteration):
        tokens.identify(bearer(token)).send(None)
    assert (await refused(tokens.identify(bearer(token), "tickets"))).code == "scope_needed"
    clock.now += 3600
    assert (await refused(tokens.identify(bearer(token)))).code == "token_expired"


async def test_a_token_of_a_tenant_that_is_not_here_opens_nothing(tokens: Auth, issuer: FakeIssuer) -> None:
    error = await refused(tokens.identify(bearer(issuer.token(tenant="gone"))))
    assert (error.status, error.code) == (403, "tenant_needed")
    assert counted(tokens, "newel_auth_failures_total", reason="tenant") == 1


async def test_forged_tokens_are_limited_as_keys_are_and_good_ones_are_not(
    store: Store, tenant: str, clock: Clock, issuer: FakeIssuer, tokens: Auth
) -> None:
    tokens._failures = module.Failures(2, 6, clock)
    forged = [f"{issuer.token(sub=str(n))[:-4]}AAAA" for n in range(4)]
    statuses = [(await refused(tokens.identify(bearer(one), peer="1.2.3.4"))).status for one in forged]
    assert statuses == [401, 401, 429, 429]
    assert (await tokens.identify(bearer(issuer.token()), peer="1.2.3.4"))[1].name == tenant


async def test_tokens_are_good_while_the_database_is_down(
    tokens: Auth, tenant: str, issuer: FakeIssuer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await tokens.identify(bearer(issuer.token()))

    async def down(self: Database, work: object) -> None:
        raise StoreDown("away")

    monkeypatch.setattr(Database, "read", down)
    clock.now += 2
    assert (await tokens.identify(bearer(issuer.token(sub="another"))))[1].name == tenant


async def test_an_issuer_that_is_down_before_it_was_ever_asked_is_503(tokens: Auth, issuer: FakeIssuer) -> None:
    issuer.down = True
    error = await refused(tokens.identify(bearer(issuer.token()), peer="1.2.3.4"))
    assert (error.status, error.code) == (503, "issuer_down")
