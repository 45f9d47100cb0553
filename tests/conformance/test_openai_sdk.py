"""The real OpenAI Python SDK against the gateway: what it gets for every verdict, error and end of a stream."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from tests.fakes import FakeUpstream, Script
from tests.gateway import BOMB, CRISIS, LEGAL, SALARY, Gateway, free_port, running, settings, spoken, until

STOPPED = ["First ", "mix the ", "grey ", "powder", " with oil", " and light it."]


async def streamed(gateway: Gateway, *said: str, **more: Any) -> list[ChatCompletionChunk]:
    """All chunks of a streamed reply."""
    async with gateway.sdk() as client:
        stream = await client.chat.completions.create(**gateway.body(*said, stream=True, **more))
        return [chunk async for chunk in stream]


def text_of(chunks: Iterable[ChatCompletionChunk]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def end_of(chunks: list[ChatCompletionChunk]) -> tuple[str | None, dict[str, Any]]:
    """(finish reason, guardrails) of the last chunk."""
    return chunks[-1].choices[0].finish_reason, (chunks[-1].model_extra or {})["guardrails"]


# --- verdicts


async def test_an_ordinary_question_is_helped(gateway: Gateway) -> None:
    reply = await gateway.ask("How do I ask for a raise?")
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("Hello there.", "stop")
    assert reply.choices[0].message.refusal is None
    assert reply.object == "chat.completion" and reply.model == "fake" and reply.id.startswith("chatcmpl-")
    assert reply.usage and reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens > 3
    guardrails = (reply.model_extra or {})["guardrails"]
    assert guardrails == {
        "id": reply.id,
        "action": "allow",
        "stage": None,
        "policy": (await gateway.turn(reply.id)).policy,
        "escalation": None,
    }


async def test_a_streamed_reply_comes_in_pieces_and_ends_with_the_verdict(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.script = Script(["Ask your manager ", "for some time, ", "and bring along ", "what you have done."])
    chunks = await streamed(gateway, "How do I ask for a raise?")
    assert text_of(chunks) == upstream.script.text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert end_of(chunks)[0] == "stop" and end_of(chunks)[1]["action"] == "allow"
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 3
    assert all(len(chunk.choices) == 1 for chunk in chunks)


async def test_pieces_arrive_while_the_engine_is_still_writing(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = Script(["One. ", "Two. ", 1.0, "Three."])
    async with gateway.sdk() as client:
        stream = await client.chat.completions.create(**gateway.body("Count", stream=True))
        started = time.monotonic()
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        assert time.monotonic() - started < 0.5
        await stream.close()


async def test_the_engine_sees_the_persona_and_the_parameters(gateway: Gateway, upstream: FakeUpstream) -> None:
    sampling = {"temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["X"], "presence_penalty": 0.1}
    await gateway.ask("Hello", frequency_penalty=0.2, max_completion_tokens=50, **sampling)
    body = upstream.seen[0].body
    assert body["messages"] == [
        {"role": "system", "content": "You help people at work."},
        {"role": "user", "content": "Hello"},
    ]
    assert {name: body[name] for name in sampling} == sampling
    assert (body["max_tokens"], body["frequency_penalty"], body["model"]) == (50, 0.2, "fake")
    assert "temperature" not in (await one_more(gateway, upstream)).body


async def one_more(gateway: Gateway, upstream: FakeUpstream) -> Any:
    await gateway.ask("Hello again")
    return upstream.seen[-1]


async def test_the_clients_own_system_text_comes_after_the_persona(gateway: Gateway, upstream: FakeUpstream) -> None:
    async with gateway.sdk() as client:
        messages: Any = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
        ]
        await client.chat.completions.create(model="fake", messages=messages)
    assert upstream.seen[0].body["messages"] == [
        {"role": "system", "content": "You help people at work.\n\nBe brief."},
        {"role": "user", "content": "Hello"},
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refused_question_never_reaches_the_engine(
    gateway: Gateway, upstream: FakeUpstream, stream: bool
) -> None:
    if stream:
        chunks = await streamed(gateway, "What is the salary of Jane?")
        said, (reason, guardrails) = text_of(chunks), end_of(chunks)
    else:
        reply = await gateway.ask("What is the salary of Jane?")
        said, reason = reply.choices[0].message.content or "", reply.choices[0].finish_reason
        guardrails = (reply.model_extra or {})["guardrails"]
    assert (said, reason) == (SALARY, "content_filter")
    assert (guardrails["action"], guardrails["stage"]) == ("refuse", "input")
    assert "salary" not in json.dumps(guardrails), "which rule fired is an attacker's gradient"
    assert upstream.requests == []


async def test_a_reply_is_stopped_in_mid_stream_and_the_engine_with_it(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.script = Script([*STOPPED, *["More. ", 0.05] * 200])
    status, _, raw = await gateway.raw("POST", "/v1/chat/completions", json=gateway.body("How?", stream=True))
    frames = [json.loads(line[6:]) for line in raw.decode().splitlines() if line.startswith("data: {")]
    assert (status, spoken(raw)) == (200, f"First \n\n{BOMB}")
    assert frames[-1]["choices"][0]["finish_reason"] == "content_filter"
    assert frames[-1]["guardrails"]["action"] == "refuse" and frames[-1]["guardrails"]["stage"] == "output"
    assert raw.endswith(b"data: [DONE]\n\n")
    for hidden in (b"mix", b"grey", b"powder", b"oil"):
        assert hidden not in raw
    seen = await upstream.seen[0].finished(1.0)
    assert seen.gone and seen.sent < 20


async def test_a_stopped_reply_that_is_not_streamed_is_the_rules_reply_alone(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.script = Script(STOPPED)
    reply = await gateway.ask("How?")
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (BOMB, "content_filter")
    assert reply.usage and reply.usage.completion_tokens > 0, "what the engine wrote is counted, said or not"


@pytest.mark.parametrize("stream", [False, True])
async def test_what_comes_in_is_redacted_before_the_engine_sees_it(
    gateway: Gateway, upstream: FakeUpstream, stream: bool
) -> None:
    await streamed(gateway, "Card 4111 1111 1111 1111?") if stream else await gateway.ask("Card 4111 1111 1111 1111?")
    assert upstream.seen[0].body["messages"][-1]["content"] == "Card [CARD]?"
    assert "4111" not in json.dumps(upstream.seen[0].body["messages"])


@pytest.mark.parametrize("stream", [False, True])
async def test_what_goes_out_is_redacted(gateway: Gateway, upstream: FakeUpstream, stream: bool) -> None:
    upstream.script = Script(["Write to ja", "ne@exa", "mple.com", " today."])
    body = gateway.body("Who?", stream=stream)
    _, _, raw = await gateway.raw("POST", "/v1/chat/completions", json=body)
    assert b"jane" not in raw and b"ne@exa" not in raw and b"example" not in raw
    said = text_of(await streamed(gateway, "Who?")) if stream else None
    said = said or (await gateway.ask("Who?")).choices[0].message.content
    assert said == "Write to [EMAIL] today."


@pytest.mark.parametrize("stream", [False, True])
async def test_a_line_is_appended(gateway: Gateway, stream: bool) -> None:
    if stream:
        chunks = await streamed(gateway, "Is unpaid overtime legal?")
        said, (reason, guardrails) = text_of(chunks), end_of(chunks)
        assert (reason, guardrails["action"]) == ("stop", "append")
    else:
        said = (await gateway.ask("Is unpaid overtime legal?")).choices[0].message.content or ""
    assert said == f"Hello there.\n\n{LEGAL}"


async def test_an_escalated_turn_tells_its_ticket(gateway: Gateway, upstream: FakeUpstream) -> None:
    reply = await gateway.ask("My boss harasses me")
    choice, escalation = reply.choices[0], (reply.model_extra or {})["guardrails"]["escalation"]
    assert choice.finish_reason == "stop" and upstream.requests == []
    assert choice.message.content == f"{CRISIS}\n\nYour reference is {escalation['id']}."
    assert (escalation["status"], escalation["queue"]) == ("open", "hr")


# --- the protocol


async def test_usage_comes_as_a_chunk_without_choices_and_only_when_asked(gateway: Gateway) -> None:
    plain = await streamed(gateway, "Hello")
    asked = await streamed(gateway, "Hello", stream_options={"include_usage": True})
    assert all(chunk.choices and chunk.usage is None for chunk in plain)
    assert asked[-1].choices == [] and asked[-1].usage and asked[-1].usage.completion_tokens == 3
    assert all(chunk.usage is None for chunk in asked[:-1])


async def test_a_streams_headers(gateway: Gateway) -> None:
    status, headers, _ = await gateway.raw("POST", "/v1/chat/completions", json=gateway.body("Hello", stream=True))
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-store"
    assert headers["x-conversation-id"].startswith("conv_")
    assert headers["x-guardrails-id"].startswith("chatcmpl-")
    assert headers["x-guardrails-policy"].startswith("office@")
    assert headers["x-request-id"].startswith("req_")


async def test_a_whole_replys_headers(gateway: Gateway) -> None:
    body = gateway.body("What is the salary of Jane?")
    _, headers, raw = await gateway.raw("POST", "/v1/chat/completions", json=body)
    assert headers["x-guardrails-action"] == "refuse"
    assert headers["x-guardrails-id"] == json.loads(raw)["id"]


async def test_the_request_id_is_echoed_and_is_the_sdks(gateway: Gateway) -> None:
    reply = await gateway.ask("Hello", headers={"X-Request-Id": "mine-42"})
    assert reply._request_id == "mine-42"
    assert (await gateway.turn(reply.id)).request_id == "mine-42"


@pytest.mark.parametrize("bad", ["a b", "é", "x" * 65, "a\tb", "<script>"])
async def test_a_request_id_that_could_do_harm_is_replaced(gateway: Gateway, bad: str) -> None:
    _, headers, _ = await gateway.raw("GET", "/livez", headers={"X-Request-Id": bad})
    assert headers["x-request-id"].startswith("req_")


async def test_a_request_id_with_a_line_break_never_comes_back(gateway: Gateway) -> None:
    port = int(gateway.base.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\r\n\tSet-Cookie: b\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    assert b"set-cookie" not in answer.lower()


async def test_models_are_listed_and_found(gateway: Gateway) -> None:
    async with gateway.sdk() as client:
        assert [model.id async for model in client.models.list()] == ["fake"]
        assert (await client.models.retrieve("fake")).owned_by == "newel"
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("gpt-4o")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert gateway.metric("newel_requests_total", route="/v1/models", status="200") == 1
    assert gateway.metric("newel_requests_total", route="/v1/models/{model:path}", status="404") == 1


async def test_parameters_without_effect_are_named_in_a_header(gateway: Gateway, upstream: FakeUpstream) -> None:
    body = gateway.body("Hello", store=True, service_tier="auto")
    status, headers, _ = await gateway.raw("POST", "/v1/chat/completions", json=body)
    assert (status, headers["x-ignored-parameters"]) == (200, "store, service_tier")
    assert "store" not in upstream.seen[0].body


# --- failures of the engine


async def test_a_client_is_told_when_to_come_back_while_the_engine_starts(
    tmp_path: Path, upstream: FakeUpstream
) -> None:
    nowhere = settings(tmp_path, f"http://127.0.0.1:{free_port()}/v1")
    async with running(tmp_path, upstream, settings=nowhere, ready=False) as gateway:
        with pytest.raises(openai.InternalServerError) as caught:
            await gateway.ask("Hello")
        error = caught.value
        assert (error.status_code, error.code, error.type) == (503, "engine_not_ready", "server_error")
        assert int(error.response.headers["retry-after"]) >= 1
        status, _ = await gateway.json("GET", "/readyz")
        assert status == 503


BEFORE = [
    (Script(status=503, retry_after="7"), 503, "engine_busy", "7"),
    (Script(status=429), 503, "engine_busy", "1"),
    (Script(status=500), 503, "engine_broken", "1"),
    (Script(status=404), 503, "engine_broken", "1"),
    (Script(status=400, message="max_tokens is too large"), 400, "invalid_value", None),
    (Script(status=400, message="This model's maximum context length is 10"), 400, "context_length_exceeded", None),
    (Script([], end="error", message="overloaded"), 503, "engine_broken", "1"),
    (Script([b'data: {"error": {"message": "busy", "code": 503}}\n\n']), 503, "engine_busy", "1"),
    (Script([], end="cut"), 503, "engine_broken", "1"),
    (Script([b"data: {not json}\n\n"]), 503, "engine_broken", "1"),
    (Script([b"data: []\n\n"]), 503, "engine_broken", "1"),
    (Script([b'data: {"choices": [7]}\n\n']), 503, "engine_broken", "1"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("script", "status", "code", "retry_after"), BEFORE)
async def test_a_failure_before_the_first_token_is_a_real_status(
    gateway: Gateway, upstream: FakeUpstream, script: Script, status: int, code: str, retry_after: str, stream: bool
) -> None:
    if not stream and any(isinstance(delta, bytes) for delta in script.deltas):
        pytest.skip("a whole reply has no frames")
    upstream.script = script
    with pytest.raises(openai.APIStatusError) as caught:
        await (streamed(gateway, "Hello") if stream else gateway.ask("Hello"))
    error = caught.value
    assert (error.status_code, error.code) == (status, code)
    assert error.response.headers.get("retry-after") == retry_after
    assert "scripted" not in error.message
    (turn,) = await until(lambda: finished_turns(gateway))
    assert (turn.error, turn.said) == (code, "")


async def finished_turns(gateway: Gateway) -> list[Any]:
    from sqlalchemy import text

    async def ids(connection: Any) -> list[str]:
        return list((await connection.execute(text("SELECT id FROM turns WHERE finished_at IS NOT NULL"))).scalars())

    found = await gateway.service.store._db.read(ids)
    return [turn for id in found if (turn := await gateway.service.store.turn(id, "default"))]


AFTER = [
    (Script(["Hel", "lo. ", "And "], end="cut"), "engine_broken"),
    (Script(["Hel", "lo. ", "And "], end="error"), "engine_broken"),
    (Script(["Hel", "lo. ", "And ", b"data: {no json}\n\n"]), "engine_broken"),
    (Script(["Hel", "lo. ", "And ", b'data: {"error": {"code": 503}}\n\n']), "engine_busy"),
]


@pytest.mark.parametrize(("script", "code"), AFTER)
async def test_a_failure_after_the_first_token_is_an_error_event(
    gateway: Gateway, upstream: FakeUpstream, script: Script, code: str
) -> None:
    upstream.script = script
    chunks: list[ChatCompletionChunk] = []
    async with gateway.sdk() as client:
        stream = await client.chat.completions.create(**gateway.body("Hello", stream=True))
        with pytest.raises(openai.APIError) as caught:
            while True:
                chunks.append(await anext(aiter(stream)))
    assert caught.value.code == code
    assert text_of(chunks).startswith("Hel")
    turn = await gateway.turn(chunks[0].id)
    assert (turn.error, turn.said) == (code, text_of(chunks))
    _, _, raw = await gateway.raw("POST", "/v1/chat/completions", json=gateway.body("Hello", stream=True))
    assert raw.endswith(b"data: [DONE]\n\n") and b'"finish_reason":"stop"' not in raw


async def test_a_failure_of_a_reply_that_is_not_streamed_is_a_status_though_text_was_written(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.script = Script(["Hel", "lo. "], end="cut")
    with pytest.raises(openai.InternalServerError) as caught:
        await gateway.ask("Hello")
    assert (caught.value.status_code, caught.value.code) == (503, "engine_broken")


@pytest.mark.parametrize("reason", ["stop", "length"])
async def test_the_engines_reason_to_end_is_passed_on(gateway: Gateway, upstream: FakeUpstream, reason: str) -> None:
    upstream.script = Script(["Hello"], finish_reason=reason)
    assert (await gateway.ask("Hello")).choices[0].finish_reason == reason
    assert end_of(await streamed(gateway, "Hello"))[0] == reason


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_says_nothing_times_out(tmp_path: Path, upstream: FakeUpstream, stream: bool) -> None:
    limit = {"first_token_timeout": 0.3} if stream else {"total_timeout": 0.3}
    async with running(tmp_path, upstream, **limit) as gateway:
        for script in (Script(wait=60), Script([], end="hang")):
            upstream.script = script
            started = time.monotonic()
            with pytest.raises(openai.InternalServerError) as caught:
                await (streamed(gateway, "Hello") if stream else gateway.ask("Hello"))
            assert (caught.value.status_code, caught.value.code) == (504, "engine_timeout")
            assert 0.25 < time.monotonic() - started < 3
            assert (await upstream.seen[-1].finished(1.0)).gone


async def test_an_engine_that_stops_speaking_times_out(tmp_path: Path, upstream: FakeUpstream) -> None:
    async with running(tmp_path, upstream, idle_timeout=0.3) as gateway:
        upstream.script = Script(["Hello. ", "And "], end="hang")
        with pytest.raises(openai.APIError) as caught:
            await streamed(gateway, "Hello")
        assert caught.value.code == "engine_timeout"
        assert (await upstream.seen[-1].finished(1.0)).gone


async def test_a_reply_that_never_ends_times_out(tmp_path: Path, upstream: FakeUpstream) -> None:
    async with running(tmp_path, upstream, total_timeout=0.5) as gateway:
        upstream.script = Script(["on and on. ", 0.05] * 1000)
        with pytest.raises(openai.APIError) as caught:
            await streamed(gateway, "Hello")
        assert caught.value.code == "engine_timeout"


async def test_a_slow_reader_is_not_timed_out(tmp_path: Path, upstream: FakeUpstream) -> None:
    async with running(tmp_path, upstream, idle_timeout=0.5, default_policy="open") as gateway:
        upstream.script = Script(["word " * 20_000] * 80)
        reader, writer = await slow_reader(gateway)
        await asyncio.sleep(1.5)
        raw = await reader.read()
        assert raw.count(b"word ") == 1_600_000 and b'"finish_reason":"stop"' in raw and b"[DONE]" in raw
        writer.close()


async def slow_reader(gateway: Gateway) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A streamed request whose client reads nothing by itself, with small buffers."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", int(gateway.base.rpartition(":")[2])))
    reader, writer = await asyncio.open_connection(sock=client, limit=1024)
    body = json.dumps(gateway.body("Hello", stream=True)).encode()
    head = f"Host: x\r\nAuthorization: Bearer {gateway.key}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    writer.write(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + body)
    return reader, writer


@pytest.mark.parametrize(("asked", "said", "reason"), [(None, "a b c ", "length"), (5, "a b c d e ", "stop")])
async def test_a_reply_without_a_limit_of_its_own_is_cut_off(
    tmp_path: Path, upstream: FakeUpstream, asked: int | None, said: str, reason: str
) -> None:
    async with running(tmp_path, upstream, max_tokens=3) as gateway:
        upstream.script = Script(["a ", "b ", "c ", "d ", "e "])
        limit = {"max_tokens": asked} if asked else {}
        reply = await gateway.ask("Hello", **limit)
        assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (said, reason)
        assert upstream.seen[-1].body["max_tokens"] == (asked or 3)
        assert text_of(await streamed(gateway, "Hello", **limit)) == said
        assert upstream.seen[-1].body.get("max_tokens") == asked


async def test_a_limit_of_ours_that_does_not_fit_behind_the_prompt_is_left_to_the_engine(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    too_long = Script(status=400, message="This model's maximum context length is 10 tokens.")
    upstream.queue.extend([too_long, Script(["fits"])])
    assert (await gateway.ask("Hello")).choices[0].message.content == "fits"
    assert ["max_tokens" in one.body for one in upstream.seen] == [True, False]
    upstream.queue.append(too_long)
    with pytest.raises(openai.BadRequestError):
        await gateway.ask("Hello", max_tokens=5)


# --- clients that go


async def test_a_client_that_leaves_a_stream_stops_the_engine(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = Script(["word ", 0.02] * 5000)
    async with gateway.sdk() as client:
        stream = await client.chat.completions.create(**gateway.body("Hello", stream=True))
        seen: list[ChatCompletionChunk] = []
        async for chunk in stream:
            seen.append(chunk)
            if len(seen) == 5:
                break
        left = time.monotonic()
        await stream.close()
        upstream_request = await upstream.seen[0].finished(1.0)
        assert upstream_request.gone_at and upstream_request.gone_at - left < 1.0
    turn = await gateway.turn(seen[0].id)
    assert turn.error == "client_gone" and turn.said.startswith("word word ")
    assert gateway.metric("newel_turn_errors_total", error="client_gone") == 1


async def test_a_client_that_leaves_before_the_first_token_stops_the_engine(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.script = Script(wait=60)
    for stream in (True, False):
        with pytest.raises(openai.APITimeoutError):
            async with gateway.sdk(timeout=0.5) as client:
                await client.chat.completions.create(**gateway.body("Hello", stream=stream))
        assert (await upstream.seen[-1].finished(1.0)).gone
    turns = await until(lambda: two(gateway))
    assert [(turn.error, turn.said) for turn in turns] == [("client_gone", "")] * 2


async def two(gateway: Gateway) -> list[Any]:
    turns = await finished_turns(gateway)
    return turns if len(turns) == 2 else []


async def test_a_client_that_leaves_while_its_whole_reply_is_written_stops_the_engine(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.script = Script(["word ", 0.02] * 5000)
    with pytest.raises(openai.APITimeoutError):
        async with gateway.sdk(timeout=0.5) as client:
            await client.chat.completions.create(**gateway.body("Hello"))
    assert (await upstream.seen[0].finished(1.0)).gone
    (turn,) = await until(lambda: finished_turns(gateway))
    assert (turn.error, turn.said) == ("client_gone", "")


async def test_a_client_that_does_not_read_is_noticed_when_it_goes(tmp_path: Path, upstream: FakeUpstream) -> None:
    """The gateway is then stuck in sending, not in waiting for the engine."""
    async with running(tmp_path, upstream, default_policy="open") as gateway:
        upstream.script = Script(["word " * 20_000] * 200)
        _, writer = await slow_reader(gateway)
        request, sent = await upstream.asked(), 0
        while not sent or sent < request.sent:
            sent = request.sent
            await asyncio.sleep(0.5)
        assert 0 < sent < 200, "nothing flows any more"
        writer.transport.abort()
        assert (await request.finished(1.0)).gone


# --- the SDK's own retries


async def test_the_sdk_retries_a_busy_engine_and_the_retry_is_known_as_one(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.queue.append(Script(status=503))
    upstream.script = Script(["Fine."])
    async with gateway.sdk(max_retries=2) as client:
        reply = await client.chat.completions.create(**gateway.body("Hello"))
    assert reply.choices[0].message.content == "Fine."
    assert (await gateway.turn(reply.id)).retry_of == "1"


async def test_the_sync_client_works_too(gateway: Gateway) -> None:
    def ask() -> str | None:
        with openai.OpenAI(base_url=f"{gateway.base}/v1", api_key=gateway.key) as client:
            return client.chat.completions.create(**gateway.body("Hello")).choices[0].message.content

    assert await asyncio.to_thread(ask) == "Hello there."


async def test_the_sdks_stream_helper_reads_the_text(gateway: Gateway) -> None:
    async with gateway.sdk() as client, client.chat.completions.stream(**gateway.body("Hello")) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "Hello there."
    assert any(event.type == "content.delta" for event in events)


async def test_the_sdks_stream_helper_knows_of_a_refusal(gateway: Gateway) -> None:
    """It keeps the extras of the first chunk, which tells what is decided by then."""
    body = gateway.body("What is the salary of Jane?")
    async with gateway.sdk() as client, client.chat.completions.stream(**body) as stream:
        with pytest.raises(openai.ContentFilterFinishReasonError) as caught:
            await stream.get_final_completion()
    final = caught.value.completion
    assert final.choices[0].message.content == SALARY
    assert (final.model_extra or {})["guardrails"]["action"] == "refuse"
