"""One trace from the client through the gateway to the engine, and to a collector."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.logs import JsonFormatter, log
from app.settings import TracingSettings
from tests.app.test_tracing import HEADER, PARENT, TRACE, Receiver, values
from tests.fakes import FakeUpstream, Script
from tests.gateway import Gateway, running


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as receiver:
        yield receiver


async def post(gateway: Gateway, headers: dict[str, str], said: str = "Hello", **more: object) -> dict[str, str]:
    body = gateway.body(said, **more)
    status, answer, _ = await gateway.raw("POST", "/v1/chat/completions", json=body, headers=headers)
    assert status == 200
    return answer


async def test_without_tracing_a_clients_trace_is_kept_logged_and_passed_on(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonFormatter())
    log.addHandler(handler)
    answer = await post(gateway, {"traceparent": HEADER, "X-Request-Id": "mine"})
    log.removeHandler(handler)
    assert upstream.seen[0].headers["traceparent"] == HEADER and upstream.seen[0].headers["x-request-id"] == "mine"
    turn = await gateway.turn(answer["x-guardrails-id"])
    assert turn.trace.startswith(TRACE) and "traceresponse" not in answer
    (line,) = [one for one in map(json.loads, written.getvalue().splitlines()) if one["event"] == "turn"]
    assert line["trace"] == TRACE
    answer = await post(gateway, {})
    assert "traceparent" not in upstream.seen[1].headers
    assert (await gateway.turn(answer["x-guardrails-id"])).trace == ""


@pytest.mark.parametrize("stream", [False, True])
async def test_the_engines_span_is_below_the_gateways_and_that_below_the_clients(
    tmp_path: Path, upstream: FakeUpstream, receiver: Receiver, stream: bool
) -> None:
    upstream.script = Script(["Write to ", 0.02, "jane@example.com"])
    async with running(tmp_path, upstream, tracing=TracingSettings(endpoint=receiver.url)) as gateway:
        answer = await post(gateway, {"traceparent": HEADER}, "Hello", stream=stream, temperature=0.5)
        turn = await gateway.turn(answer["x-guardrails-id"])
        count, total = (gateway.metric(f"newel_overhead_seconds_{one}") for one in ("count", "sum"))
        assert count == 1 and 0 < total < turn.total_ms / 1000 - 0.015
    server, chat = receiver.spans["POST /v1/chat/completions"], receiver.spans["chat fake"]
    guards = [receiver.spans["guard input"], receiver.spans["guard output"]]
    assert {span.trace_id.hex() for span in (server, chat, *guards)} == {TRACE}
    assert server.parent_span_id.hex() == PARENT
    assert {span.parent_span_id for span in (chat, *guards)} == {server.span_id}
    assert upstream.seen[0].headers["traceparent"] == f"00-{TRACE}-{chat.span_id.hex()}-01"
    assert answer["traceresponse"] == f"00-{TRACE}-{server.span_id.hex()}-01"
    told = values(chat.attributes)
    assert told["gen_ai.response.id"] == turn.id and told["gen_ai.request.temperature"] == 0.5
    assert f"http://{told['server.address']}:{told['server.port']}/v1" == upstream.url
    assert values(guards[1].attributes)["newel.guard.rule"] == "mail"
    for span in (chat, *guards):
        assert server.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= server.end_time_unix_nano + 1_000_000
    assert b"jane" not in b"".join(receiver.bodies)


async def test_engines_that_failed_and_replies_that_were_never_asked_for_are_told(
    tmp_path: Path, upstream: FakeUpstream, receiver: Receiver
) -> None:
    upstream.script = Script(status=500)
    async with running(tmp_path, upstream, tracing=TracingSettings(endpoint=receiver.url)) as gateway:
        status, answer, _ = await gateway.raw("POST", "/v1/chat/completions", json=gateway.body("Hello"))
        assert status >= 500 and answer["traceresponse"].startswith("00-")
    chat, server = receiver.spans["chat fake"], receiver.spans["POST /v1/chat/completions"]
    assert values(chat.attributes)["error.type"].startswith("engine_")
    assert values(server.attributes)["error.type"] == str(status) and not server.parent_span_id
    assert [values(event.attributes)["newel.engine"].split("/")[0] for event in chat.events] == ["engine"]
    receiver.spans.clear()
    async with running(tmp_path, upstream, tracing=TracingSettings(endpoint=receiver.url)) as gateway:
        await post(gateway, {}, "What is the salary of Jane?")
    assert set(receiver.spans) == {"POST /v1/chat/completions", "guard input"}


async def test_each_of_several_replies_has_a_span(tmp_path: Path, upstream: FakeUpstream, receiver: Receiver) -> None:
    async with running(tmp_path, upstream, tracing=TracingSettings(endpoint=receiver.url)) as gateway:
        await post(gateway, {}, n=3)
    assert len({span.span_id for span in receiver.all if span.name == "chat fake"}) == 3
    asked = {seen.headers["traceparent"].split("-")[2] for seen in upstream.seen}
    assert asked == {span.span_id.hex() for span in receiver.all if span.name == "chat fake"}
