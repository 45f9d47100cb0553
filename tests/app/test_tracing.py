"""One trace id from the client to the engine, and spans as a real OTLP/HTTP receiver reads them."""

from __future__ import annotations

import asyncio
import gzip
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource

from app.fleet import EngineView
from app.records import Turn
from app.schemas import ChatRequest
from app.settings import TracingSettings
from app.tracing import Steps, Tracer, answered, open_tracer, passed_on, served, trace_id, trace_of, traced
from tests.app.turns import ASKED, RAW, begun, escalated, finished
from tests.fakes import _Loopback

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADER = f"00-{TRACE}-{PARENT}-01"
ENGINE = EngineView("qwen", "gpu", "http://gpu-1:8000/v1", "ready", 0, 8, 1.0, None, "", {})
REQUEST = ChatRequest.model_validate(
    {
        "model": "smol",
        "messages": [{"role": "user", "content": RAW}],
        "temperature": 0.5,
        "max_tokens": 64,
        "seed": 7,
        "stop": ["Geheimnis"],
        "n": 2,
        "response_format": {"type": "json_object"},
    }
)
STEPS = Steps(0.002, 0.003, asked=0.01, answered=0.11, waited=0.1, pool="qwen", engine="gpu")


class Receiver:
    """An OTLP/HTTP collector that keeps what it is sent."""

    def __init__(self) -> None:
        self.url = ""
        self.spans: dict[str, Any] = {}
        self.all: list[Any] = []
        self.resource: dict[str, Any] = {}
        self.bodies: list[bytes] = []
        app = web.Application()
        app.router.add_post("/v1/traces", self._take)
        self.server = _Loopback(app, 0)

    async def __aenter__(self) -> Receiver:
        self.url = f"{await self.server.start()}/v1/traces"
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.server.stop()

    async def _take(self, request: web.Request) -> web.Response:
        body = await request.read()
        body = gzip.decompress(body) if request.headers.get("Content-Encoding") == "gzip" else body
        self.bodies.append(body)
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resource = values(group.resource.attributes)
            for scope in group.scope_spans:
                self.spans |= {span.name: span for span in scope.spans}
                self.all += scope.spans
        return web.Response()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as receiver:
        yield receiver


@pytest.fixture
async def tracer(receiver: Receiver) -> AsyncIterator[Tracer]:
    tracer = open_tracer(TracingSettings(endpoint=receiver.url, timeout=5))
    assert tracer
    yield tracer
    await asyncio.to_thread(tracer.close)


def values(attributes: Any) -> dict[str, Any]:
    """Attributes as plain values."""
    told = {}
    for one in attributes:
        kind = one.value.WhichOneof("value")
        value = getattr(one.value, kind)
        told[one.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return told


def traced_turn(tracer: Tracer, turn: Turn, steps: Steps = STEPS, request: ChatRequest = REQUEST) -> None:
    traced(tracer, turn, request, steps, lambda: [ENGINE])


# --- the id


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (HEADER, f"{TRACE}-{PARENT}-01"),
        (f"00-{TRACE}-{PARENT}-00", f"{TRACE}-{PARENT}-00"),
        (f"00-{TRACE}-{PARENT}-ff", f"{TRACE}-{PARENT}-03"),
        (f"cc-{TRACE}-{PARENT}-01", f"{TRACE}-{PARENT}-01"),
        (f"cc-{TRACE}-{PARENT}-01-what-the-future-brings", f"{TRACE}-{PARENT}-01"),
        ("", ""),
        ("junk", ""),
        (f"00-{TRACE}-{PARENT}-01-more", ""),
        (f"cc-{TRACE}-{PARENT}-01.more", ""),
        (f"ff-{TRACE}-{PARENT}-01", ""),
        (f"00-{TRACE.upper()}-{PARENT}-01", ""),
        (f"00-{'0' * 32}-{PARENT}-01", ""),
        (f"00-{TRACE}-{'0' * 16}-01", ""),
        (f"00-{TRACE[:-1]}-{PARENT}-01", ""),
        (f"00-{TRACE}-{PARENT}-1", ""),
        (f"{HEADER}\n", ""),
        (f" {HEADER}", ""),
    ],
)
def test_a_clients_trace_is_read_if_it_is_valid(header: str, expected: str) -> None:
    assert trace_of({b"traceparent": header.encode()}) == expected


def test_without_a_tracer_nothing_is_made_and_a_clients_trace_goes_on_as_it_came() -> None:
    assert trace_of({}) == "" and passed_on(begun("acme")) == {} and answered("") == []
    turn = begun("acme", trace=trace_of({b"traceparent": HEADER.encode()}))
    assert passed_on(turn) == {"traceparent": HEADER}
    assert answered(turn.trace) == []


async def test_with_a_tracer_the_engine_is_below_a_span_of_the_turns_own(tracer: Tracer, receiver: Receiver) -> None:
    trace = trace_of({b"traceparent": HEADER.encode()}, tracer)
    first = finished(begun("acme", trace=trace))
    second = replace(first, id=f"{first.id}-1", choice=1)
    headers = passed_on(first)["traceparent"].split("-")
    assert headers[:2] == ["00", TRACE] and headers[3] == "01" and headers[2] != PARENT
    assert passed_on(second) != passed_on(first)
    [(name, value)] = answered(trace)
    assert name == b"traceresponse" and value.decode() == f"00-{TRACE}-{trace.split('-')[1]}-01"
    traced_turn(tracer, first)
    served(tracer, trace, "req-1", "POST", "/v1/chat/completions", 200, 0.2)
    await asyncio.to_thread(tracer.close)
    chat, server = receiver.spans["chat smol"], receiver.spans["POST /v1/chat/completions"]
    assert chat.span_id.hex() == headers[2] and chat.trace_id.hex() == TRACE == trace_id(trace)
    assert chat.parent_span_id == server.span_id == bytes.fromhex(trace.split("-")[1])
    assert server.parent_span_id.hex() == PARENT


async def test_a_trace_that_begins_here_has_no_parent_and_is_new_each_time(tracer: Tracer, receiver: Receiver) -> None:
    one, other = trace_of({}, tracer), trace_of({b"traceparent": b"junk"}, tracer)
    assert trace_id(one) != trace_id(other) and len(trace_id(one)) == 32
    served(tracer, one, "req-1", "POST", "/v1/messages", 200, 0.2)
    await asyncio.to_thread(tracer.close)
    server = receiver.spans["POST /v1/messages"]
    assert server.trace_id.hex() == trace_id(one) and not server.parent_span_id


@pytest.mark.parametrize(("sample", "flags"), [(0.0, "00"), (1.0, "01")])
async def test_a_share_of_traces_is_recorded_unless_the_client_decides(
    receiver: Receiver, sample: float, flags: str
) -> None:
    tracer = open_tracer(TracingSettings(endpoint=receiver.url, sample=sample))
    assert tracer
    assert trace_of({}, tracer).split("-")[2] == flags
    for sent in ("00", "01"):
        header = f"00-{TRACE}-{PARENT}-{sent}".encode()
        assert trace_of({b"traceparent": header}, tracer).split("-")[2] == sent
    await asyncio.to_thread(tracer.close)


# --- the spans


async def test_the_engines_work_is_told_by_the_genai_conventions(tracer: Tracer, receiver: Receiver) -> None:
    steps = replace(STEPS, tries=[("qwen/cpu", "unreachable")])
    turn = finished(
        begun("acme", trace=trace_of({}, tracer), release="qwen/Qwen3-8B"), finish_reason="stop", cached_tokens=16
    )
    before = time.time_ns()
    traced_turn(tracer, turn, steps)
    await asyncio.to_thread(tracer.close)
    span = receiver.spans["chat smol"]
    assert span.kind == span.SPAN_KIND_CLIENT and span.status.code == 0
    told = values(span.attributes)
    assert told.pop("gen_ai.response.time_to_first_chunk") == pytest.approx(0.0315)
    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.conversation.id": turn.conversation,
        "gen_ai.output.type": "json",
        "gen_ai.request.model": "smol",
        "gen_ai.request.stream": True,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 64,
        "gen_ai.request.seed": 7,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.id": turn.id,
        "gen_ai.response.model": "Qwen3-8B",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 31,
        "gen_ai.usage.output_tokens": 12,
        "gen_ai.usage.cache_read.input_tokens": 16,
        "server.address": "gpu-1",
        "server.port": 8000,
        "newel.tenant": "acme",
        "newel.policy.id": "hr@1",
        "newel.release": "qwen/Qwen3-8B",
        "newel.action": "refuse",
    }
    (retry,) = span.events
    assert (retry.name, values(retry.attributes)) == (
        "newel.retry",
        {"newel.engine": "qwen/cpu", "error.type": "unreachable"},
    )
    assert span.end_time_unix_nano - span.start_time_unix_nano == pytest.approx(0.1e9)
    assert abs(span.end_time_unix_nano - before) < 1e9
    assert receiver.resource["service.name"] == "newel"


async def test_each_guard_has_a_span_with_its_rules(tracer: Tracer, receiver: Receiver) -> None:
    turn = finished(begun("acme", trace=trace_of({}, tracer)))
    traced_turn(tracer, turn)
    await asyncio.to_thread(tracer.close)
    asked, said = receiver.spans["guard input"], receiver.spans["guard output"]
    assert values(asked.attributes) == {
        "gen_ai.conversation.id": turn.conversation,
        "newel.turn.id": turn.id,
        "newel.policy.id": "hr@1",
        "newel.guard.action": "redact",
        "newel.guard.rule": "ids",
    }
    assert [(event.name, values(event.attributes)) for event in asked.events] == [
        ("newel.rule", {"newel.rule.name": "ids", "newel.rule.action": "redact", "newel.rule.mode": "enforce"}),
        (
            "newel.rule",
            {
                "newel.rule.name": "tone",
                "newel.rule.action": "refuse",
                "newel.rule.mode": "shadow",
                "newel.rule.broken": "TimeoutError",
            },
        ),
    ]
    assert values(said.attributes)["newel.guard.rule"] == "salary"
    assert asked.end_time_unix_nano - asked.start_time_unix_nano == pytest.approx(2e6)
    assert said.end_time_unix_nano - said.start_time_unix_nano == pytest.approx(3e6)
    spans = {asked.span_id, said.span_id, receiver.spans["chat smol"].span_id}
    assert len(spans) == 3
    assert {asked.parent_span_id, said.parent_span_id} == {receiver.spans["chat smol"].parent_span_id}


async def test_a_question_that_was_stopped_has_no_span_of_an_engine(tracer: Tracer, receiver: Receiver) -> None:
    turn = replace(finished(begun("acme", trace=trace_of({}, tracer))), output=None)
    traced_turn(tracer, turn, Steps(guard_input=0.001))
    await asyncio.to_thread(tracer.close)
    assert set(receiver.spans) == {"guard input"}


@pytest.mark.parametrize("error", ["engine_timeout", "client_gone"])
async def test_an_error_is_told_by_its_code(tracer: Tracer, receiver: Receiver, error: str) -> None:
    trace = trace_of({}, tracer)
    traced_turn(tracer, finished(begun("acme", trace=trace), error=error, first_token_ms=None))
    served(tracer, trace, "req-1", "POST", "/v1/chat/completions", 504, 0.2)
    await asyncio.to_thread(tracer.close)
    chat, server = receiver.spans["chat smol"], receiver.spans["POST /v1/chat/completions"]
    assert values(chat.attributes)["error.type"] == error and chat.status.code == chat.status.STATUS_CODE_ERROR
    assert values(server.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 504,
        "newel.request.id": "req-1",
        "error.type": "504",
    }
    assert server.kind == server.SPAN_KIND_SERVER


async def test_no_text_is_ever_sent(tracer: Tracer, receiver: Receiver) -> None:
    for turn in (finished(begun("acme")), escalated(begun("acme"))):
        one = replace(turn, trace=trace_of({}, tracer), reasoning="Gedanken")
        traced_turn(tracer, one)
    await asyncio.to_thread(tracer.close)
    sent = b"".join(receiver.bodies).decode("utf-8", "replace")
    assert turn.id in sent
    texts = [RAW, ASKED, turn.said, turn.withheld_said, "Gedanken", "Geheimnis", "Hello", "SALARY"]
    assert [text for text in texts if text in sent] == []


async def test_what_is_not_sampled_is_not_sent_but_passed_on(tracer: Tracer, receiver: Receiver) -> None:
    trace = trace_of({b"traceparent": f"00-{TRACE}-{PARENT}-00".encode()}, tracer)
    turn = finished(begun("acme", trace=trace))
    traced_turn(tracer, turn)
    served(tracer, trace, "req-1", "POST", "/v1/messages", 200, 0.2)
    served(tracer, "", "req-1", "POST", "/v1/messages", 200, 0.2)
    await asyncio.to_thread(tracer.close)
    assert receiver.bodies == []
    assert passed_on(turn)["traceparent"].endswith("-00")


async def test_a_collector_that_is_away_stops_nothing_and_is_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    tracer = open_tracer(TracingSettings(endpoint="http://127.0.0.1:9/v1/traces", timeout=0.2))
    assert tracer
    served(tracer, trace_of({}, tracer), "req-1", "POST", "/v1/messages", 200, 0.2)
    with caplog.at_level(logging.WARNING, "opentelemetry"):
        async with asyncio.timeout(20):
            await asyncio.to_thread(tracer.close)
    assert any(record.name.startswith("opentelemetry") for record in caplog.records)


# --- what it costs


def test_it_is_off_by_default_and_then_imports_nothing() -> None:
    assert open_tracer(TracingSettings()) is None
    sending = "name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))"  # FastAPI imports the API by itself
    code = f"import sys, app.main; sys.exit(any({sending} for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_the_extra_an_endpoint_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(ImportError, match=r"newel\[otel\]"):
        open_tracer(TracingSettings(endpoint="http://127.0.0.1:9/v1/traces"))


def test_a_request_without_a_trace_costs_next_to_nothing() -> None:
    headers = {b"host": b"x", b"authorization": b"y"}
    assert best(lambda: trace_of(headers)) < 10e-6, "five times the target"


async def test_the_spans_of_a_turn_cost_little(receiver: Receiver) -> None:
    taken: list[object] = []
    tracer = Tracer(SimpleNamespace(on_end=taken.append), Resource({}), TracingSettings())  # type: ignore[arg-type]
    turn = finished(begun("acme", trace=trace_of({}, tracer)))
    assert best(lambda: traced_turn(tracer, turn)) < 1e-3
    assert len(taken) % 3 == 0


def best(work: Any, times: int = 200) -> float:
    """Seconds of one call, the least of several rounds."""
    rounds = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(times):
            work()
        rounds.append((time.perf_counter() - began) / times)
    return min(rounds)
