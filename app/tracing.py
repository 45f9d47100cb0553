"""Traces: one id from the client to the engine, and OpenTelemetry spans of what came between, without any text.

A trace is written `TRACE-SPAN-FLAGS-CALLER` in hex, the ids and flags of W3C Trace Context: span is the request's own,
below which all others are, and caller the client's, empty where the trace begins here. `TRACE-SPAN-FLAGS` is a client's
that is only passed on, since tracing is off. Spans are built when a turn has ended, from the times that were noted, and
sent by a thread of OpenTelemetry's; its libraries (extra `otel`) are imported by `open_tracer` alone.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal, TypeAlias
from urllib.parse import urlsplit

from app.records import Turn, new_id
from app.settings import TracingSettings
from guardrails.types import Verdict

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    from app.fleet import EngineView
    from app.schemas import ChatRequest

TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
KNOWN_FLAGS = 0b11
"""Sampled, and a random trace id."""
Attributes: TypeAlias = dict[str, str | bool | int | float | tuple[str, ...]]
REQUESTED = ("temperature", "top_p", "top_k", "seed", "presence_penalty", "frequency_penalty")
"""Parameters of a request that a span tells; `stop` is text of the client's."""


@dataclass(slots=True)
class Steps:
    """What the record of a turn does not keep of its way; times in seconds.

    asked, answered: after the turn's start, when an engine was first asked and when its reply ended; None: it was not.
    waited: for the engine, in all. pool, engine: who answered; tries: (`POOL/NAME`, fault) of those that failed before.
    """

    guard_input: float = 0.0
    guard_output: float = 0.0
    asked: float | None = None
    answered: float | None = None
    waited: float = 0.0
    pool: str = ""
    engine: str = ""
    tries: list[tuple[str, str]] = field(default_factory=list)


def trace_of(headers: Mapping[bytes, bytes], tracer: Tracer | None = None) -> str:
    """The trace of a request: its client's, or a new one where there is a tracer; else empty.

    A `traceparent` that is not valid counts as none.
    """
    header = headers.get(b"traceparent")
    if header is None and tracer is None:
        return ""
    caller = _read(header) if header else None
    if tracer is None:
        return "-".join(caller) if caller else ""
    trace, parent, flags = caller or (new_id("") + new_id("")[:8], "", tracer.flags())
    return f"{trace}-{new_id('')[:16]}-{flags}-{parent}"


def _read(header: bytes) -> tuple[str, str, str] | None:
    """(trace, span, flags) of a `traceparent`: of a later version than 00 as far as it is known."""
    found = TRACEPARENT.fullmatch(header)
    if not found:
        return None
    version, trace, span, flags, more = found.groups()
    if version == b"ff" or (version == b"00" and more) or not (trace.strip(b"0") and span.strip(b"0")):
        return None
    return trace.decode(), span.decode(), f"{int(flags, 16) & KNOWN_FLAGS:02x}"


def trace_id(trace: str) -> str:
    """The id of a trace, as logs and people name it."""
    return trace[:32]


def passed_on(turn: Turn) -> dict[str, str]:
    """The headers by which an engine's spans come below those of the turn."""
    if not turn.trace:
        return {}
    trace, span, flags, *ours = turn.trace.split("-")
    return {"traceparent": f"00-{trace}-{_span_of(turn) if ours else span}-{flags}"}


def answered(trace: str) -> list[tuple[bytes, bytes]]:
    """The header that tells a client which trace its request is in: `traceresponse`, where spans are made."""
    return [(b"traceresponse", b"00-" + trace[:52].encode())] if trace.count("-") == 3 else []


def _span_of(turn: Turn) -> str:
    """The id of the span of the engine's work: known before the span is made, and another one for each turn."""
    return blake2b(turn.id.encode(), digest_size=8).hexdigest()


class Tracer:
    """Makes spans, and has them sent. share: of the traces that begin here, which are recorded."""

    def __init__(self, processor: SpanProcessor, resource: Resource, settings: TracingSettings):
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        self._processor, self._resource = processor, resource
        self._scope: InstrumentationScope = InstrumentationScope("newel")
        self._share, self.provider = settings.sample, settings.provider

    def flags(self) -> str:
        """The flags of a trace that begins here."""
        return "01" if random.random() < self._share else "00"  # noqa: S311 (no secret)

    def span(
        self,
        name: str,
        ids: tuple[str, str, str],
        times: tuple[int, int],
        kind: Literal["server", "client", "internal"],
        attributes: Attributes,
        events: Iterable[tuple[str, int, Attributes]] = (),
    ) -> None:
        """Hands over a finished span. ids: of trace, span, parent (or ""); times: begin and end, in ns since 1970."""
        from opentelemetry.sdk.trace import Event, ReadableSpan
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

        trace, sampled = int(ids[0], 16), TraceFlags(TraceFlags.SAMPLED)
        kinds = {"server": SpanKind.SERVER, "client": SpanKind.CLIENT, "internal": SpanKind.INTERNAL}
        self._processor.on_end(
            ReadableSpan(
                name,
                context=SpanContext(trace, int(ids[1], 16), False, sampled),
                parent=SpanContext(trace, int(ids[2], 16), kind == "server", sampled) if ids[2] else None,
                resource=self._resource,
                attributes=attributes,
                events=[Event(what, more, when) for what, when, more in events],
                kind=kinds[kind],
                status=Status(StatusCode.ERROR if "error.type" in attributes else StatusCode.UNSET),
                start_time=times[0],
                end_time=times[1],
                instrumentation_scope=self._scope,
            )
        )

    def close(self) -> None:
        """Sends what is left, and ends the thread; it waits for the collector, so call it beside the event loop."""
        self._processor.shutdown()


def open_tracer(settings: TracingSettings) -> Tracer | None:
    """The tracer, or None when tracing is off; raises ImportError without the extra `otel`."""
    if not settings.endpoint:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ImportError("[tracing] needs OpenTelemetry: pip install 'newel[otel]'") from error
    resource = Resource.create()  # OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES
    if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "newel"}))
    exporter = OTLPSpanExporter(endpoint=settings.endpoint, timeout=settings.timeout)
    return Tracer(BatchSpanProcessor(exporter), resource, settings)


def served(tracer: Tracer, trace: str, request_id: str, method: str, route: str, status: int, seconds: float) -> None:
    """Hands over the span of a request that has just been answered, after so many seconds."""
    if not _recorded(trace):
        return
    id, span, _, parent = trace.split("-")
    end = time.time_ns()
    attributes: Attributes = {
        "http.request.method": method,
        "http.route": route,
        "http.response.status_code": status,
        "newel.request.id": request_id,
    }
    if status >= 499:  # 499: the client has gone
        attributes["error.type"] = str(status)
    tracer.span(f"{method} {route}", (id, span, parent), (end - int(seconds * 1e9), end), "server", attributes)


def _recorded(trace: str) -> bool:
    """True when spans of this trace are made here and wanted."""
    return trace.count("-") == 3 and bool(int(trace[50:52], 16) & 1)


def traced(
    tracer: Tracer, turn: Turn, request: ChatRequest, steps: Steps, engines: Callable[[], Iterable[EngineView]]
) -> None:
    """Hands over the spans of a turn that has just ended: its guards, and the engine's work where there was any."""
    if not _recorded(turn.trace):
        return
    id, server, _, _ = turn.trace.split("-")
    end = time.time_ns()
    begin = end - _ns((turn.total_ms or 0.0) / 1000)
    if turn.input:
        times = (begin, begin + _ns(steps.guard_input))
        _guarded(tracer, turn, "input", turn.input, (id, _derived(turn, "input"), server), times)
    if steps.asked is not None:
        _chatted(tracer, turn, request, steps, _address(steps, engines), (id, _span_of(turn), server), (begin, end))
    if turn.output:
        times = (end - _ns(steps.guard_output), end)
        _guarded(tracer, turn, "output", turn.output, (id, _derived(turn, "output"), server), times)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def _derived(turn: Turn, stage: str) -> str:
    return blake2b(f"{turn.id} {stage}".encode(), digest_size=8).hexdigest()


def _guarded(
    tracer: Tracer, turn: Turn, stage: str, verdict: Verdict, ids: tuple[str, str, str], times: tuple[int, int]
) -> None:
    attributes: Attributes = {
        "gen_ai.conversation.id": turn.conversation,
        "newel.turn.id": turn.id,
        "newel.policy.id": turn.policy,
        "newel.guard.action": verdict.action.word,
        "newel.guard.rule": verdict.rule,
    }
    events: list[tuple[str, int, Attributes]] = []
    for hit in verdict.hits:
        told: Attributes = {"newel.rule.name": hit.rule, "newel.rule.action": hit.action.word}
        told["newel.rule.mode"] = hit.mode
        if hit.broken:
            told["newel.rule.broken"] = hit.broken
        events.append(("newel.rule", times[1], told))
    tracer.span(f"guard {stage}", ids, times, "internal", attributes, events)


def _chatted(
    tracer: Tracer,
    turn: Turn,
    request: ChatRequest,
    steps: Steps,
    address: tuple[str, int],
    ids: tuple[str, str, str],
    times: tuple[int, int],
) -> None:
    asked, (begin, end) = steps.asked or 0.0, times
    start = begin + _ns(asked)
    attributes = _request(turn, request) | _response(turn, address)
    attributes["gen_ai.provider.name"] = tracer.provider
    if turn.streamed and turn.first_token_ms is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = max(0.0, turn.first_token_ms / 1000 - asked)
    retries: list[tuple[str, int, Attributes]] = [
        ("newel.retry", start, {"newel.engine": engine, "error.type": fault}) for engine, fault in steps.tries
    ]
    done = end if steps.answered is None else begin + _ns(steps.answered)
    tracer.span(f"chat {turn.model}", ids, (start, max(start, done)), "client", attributes, retries)


def _request(turn: Turn, request: ChatRequest) -> Attributes:
    attributes: Attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": turn.model,
        "gen_ai.request.stream": turn.streamed,
        "gen_ai.conversation.id": turn.conversation,
        "gen_ai.output.type": "json" if request.structured else "text",
        "newel.tenant": turn.tenant,
        "newel.policy.id": turn.policy,
    }
    for name in REQUESTED:
        if (value := getattr(request, name)) is not None:
            attributes[f"gen_ai.request.{name}"] = value
    if request.limit:
        attributes["gen_ai.request.max_tokens"] = request.limit
    if request.replies > 1:
        attributes["gen_ai.request.choice.count"] = request.replies
    return attributes


def _response(turn: Turn, address: tuple[str, int]) -> Attributes:
    attributes: Attributes = {
        "gen_ai.response.id": turn.id,
        "gen_ai.response.model": turn.release.partition("/")[2] or turn.model,
        "gen_ai.usage.input_tokens": turn.prompt_tokens,
        "gen_ai.usage.output_tokens": turn.completion_tokens,
        "newel.release": turn.release,
        "newel.action": turn.action,
    }
    if turn.finish_reason:
        attributes["gen_ai.response.finish_reasons"] = (turn.finish_reason,)
    if turn.cached_tokens:
        attributes["gen_ai.usage.cache_read.input_tokens"] = turn.cached_tokens
    if address[0]:
        attributes["server.address"], attributes["server.port"] = address
    if turn.error:
        attributes["error.type"] = turn.error
    return attributes


def _address(steps: Steps, engines: Callable[[], Iterable[EngineView]]) -> tuple[str, int]:
    """Host and port of the engine that was asked; ("", 0) when it is gone."""
    found = (one.url for one in engines() if (one.pool, one.name) == (steps.pool, steps.engine))
    parts = urlsplit(next(found, ""))
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
