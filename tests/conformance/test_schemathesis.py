"""Requests that schemathesis makes of the OpenAPI document, good ones and bad ones: no 5xx, and answers as it says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode

from app.main import SURFACES
from app.openapi import document
from tests.conformance.test_completions import VECTORS
from tests.fakes import FakeUpstream
from tests.gateway import Gateway, running

EXAMPLES = 15
"""Requests of each kind to each route: some seconds for all of them."""


def _answerable() -> dict[str, Any]:
    """The document, with a model that is served and messages of a user's: of random ones hardly any is answered."""
    told = document()
    schemas = told["components"]["schemas"]
    for name, schema in schemas.items():
        if name.endswith("Request") and "model" in schema["properties"]:
            schema["properties"]["model"] = {"const": "fake"}
    said = {"role": {"const": "user"}, "content": {"type": "string"}}
    schemas["ChatMessage"] = {"type": "object", "required": list(said), "properties": said}
    return told


SCHEMA: Any = schemathesis.openapi.from_dict(_answerable())
OPERATIONS = {f"{one.ok().method.upper()} {one.ok().path}": one.ok() for one in SCHEMA.get_all_operations()}
NOT_THERE = ("/v1/feedback", "/v1/models/{model}", "/v1/tickets/{ticket_id}")
"""Routes that name something, which chance does not find."""
CHECKS: Any = [
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.response_schema_conformance,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.status_code_conformance,
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    """One gateway for all requests."""
    async with FakeUpstream() as upstream, running(tmp_path_factory.mktemp("fuzzed"), upstream) as gateway:
        upstream.vectors = VECTORS
        yield gateway


@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")  # schemathesis does
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
@pytest.mark.parametrize("route", OPERATIONS)
async def test_a_route_keeps_to_the_document(gateway: Gateway, route: str, mode: GenerationMode) -> None:
    operation = OPERATIONS[route]
    if mode is GenerationMode.NEGATIVE and not operation.body:
        pytest.skip("nothing is sent that could be wrong")

    statuses = set[int]()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def asked(case: Any) -> None:
        headers = {"authorization": f"Bearer {gateway.key}", "x-api-key": gateway.key}
        response = case.call(base_url=gateway.base, headers=headers)
        statuses.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    await asyncio.to_thread(asked)
    if mode is GenerationMode.POSITIVE and operation.path not in NOT_THERE:
        assert 200 in statuses, "none of them was answered"


def test_every_public_route_is_in_the_document() -> None:
    assert {f"POST {path}" for path in SURFACES} <= set(OPERATIONS)


@pytest.mark.asyncio(loop_scope="module")
async def test_the_document_needs_no_key(gateway: Gateway) -> None:
    status, told = await gateway.json("GET", "/openapi.json", key="")
    assert (status, told) == (200, document())
