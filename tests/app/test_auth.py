"""Who is asking: keys are looked up each time, so that a revoked one is refused at once."""

from __future__ import annotations

import pytest
from starlette.requests import Request

from app.auth import identify
from app.errors import ApiError
from app.store import Store


def request(authorization: str | None) -> Request:
    headers = [] if authorization is None else [(b"authorization", authorization.encode("latin-1"))]
    return Request({"type": "http", "headers": headers})


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER  "])
async def test_a_key_tells_its_tenant(store: Store, tenant: str, scheme: str) -> None:
    key, secret = await store.add_key(tenant)
    found, its = await identify(store, request(scheme + secret))
    assert (found.id, its.name) == (key.id, tenant)


async def test_an_admin_key_opens_both_doors_and_a_clients_key_one(store: Store, tenant: str) -> None:
    (_, client), (_, admin) = await store.add_key(tenant), await store.add_key(tenant, "admin")
    await identify(store, request(f"Bearer {admin}"))
    await identify(store, request(f"Bearer {admin}"), "admin")
    await identify(store, request(f"Bearer {client}"))
    with pytest.raises(ApiError) as caught:
        await identify(store, request(f"Bearer {client}"), "admin")
    assert (caught.value.status, caught.value.code) == (403, "scope_needed")


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
    ],
)
async def test_another_key_is_refused(store: Store, tenant: str, sent: str | None, code: str) -> None:
    key, secret = await store.add_key(tenant)
    told = None if sent is None else sent.format(secret=secret, hint=key.hint)
    with pytest.raises(ApiError) as caught:
        await identify(store, request(told))
    assert (caught.value.status, caught.value.code) == (401, code)
    assert secret not in caught.value.message


async def test_a_revoked_key_is_refused_at_once(store: Store, tenant: str) -> None:
    key, secret = await store.add_key(tenant)
    await identify(store, request(f"Bearer {secret}"))
    await store.revoke_key(key.id)
    with pytest.raises(ApiError):
        await identify(store, request(f"Bearer {secret}"))
