"""Anthropic's messages through the gateway with the real SDK: verdicts, streams, tools, errors."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic
from anthropic.types import Message

from tests.conformance.test_openai_tools import call, script, thought
from tests.fakes import FakeUpstream, Script
from tests.gateway import BOMB, CRISIS, LEGAL, SALARY, Gateway, running

TOOLS: Any = [{"name": name, "description": "A tool.", "input_schema": {"type": "object"}} for name in ("send", "find")]
STOPPED = ["First ", "mix the ", "grey ", "powder", " with oil", " and light it."]
both = pytest.mark.parametrize("stream", [False, True])


def sdk(gateway: Gateway, key: str = "", **options: Any) -> AsyncAnthropic:
    """A real client, which sends its key as `x-api-key`."""
    return AsyncAnthropic(base_url=gateway.base, api_key=key or gateway.key, **({"max_retries": 0} | options))


def user(text: str = "Hello") -> dict[str, Any]:
    return {"role": "user", "content": text}


async def ask(gateway: Gateway, stream: bool, *messages: Any, key: str = "", **more: Any) -> Message:
    """The reply to these messages; what the SDK puts together of its events when it is streamed."""
    body: Any = {"model": "fake", "max_tokens": 100, "messages": messages or [user()]} | more
    async with sdk(gateway, key) as client:
        if not stream:
            reply: Message = await client.messages.create(**body)
            return reply
        async with client.messages.stream(**body) as events:
            return await events.get_final_message()


async def events_of(gateway: Gateway, **more: Any) -> list[Any]:
    body: Any = {"model": "fake", "max_tokens": 100, "messages": [user()]} | more
    async with sdk(gateway) as client:
        return [event async for event in await client.messages.create(**body, stream=True)]


def text_of(reply: Message) -> str:
    return "".join(block.text for block in reply.content if block.type == "text")


async def verdict_of(gateway: Gateway, reply: Message) -> dict[str, Any]:
    """What is told of the verdict; in a stream it is at the end, where the SDK's snapshot has only the id."""
    told: dict[str, Any] = (reply.model_extra or {})["guardrails"]
    turn = await gateway.turn(told["id"])
    return {"action": turn.action, "ticket": turn.ticket.id if turn.ticket else ""}


# --- verdicts


@both
async def test_an_ordinary_question_is_helped(gateway: Gateway, upstream: FakeUpstream, stream: bool) -> None:
    more: dict[str, Any] = {"system": "Be brief.", "stop_sequences": ["X"], "metadata": {"user_id": "ann"}}
    more |= {"extra_body": {"temperature": 0.5, "top_p": 0.9, "top_k": 5}}  # later SDKs do not name them
    reply = await ask(gateway, stream, **more)
    assert (text_of(reply), reply.stop_reason, reply.stop_sequence) == ("Hello there.", "end_turn", None)
    assert (reply.type, reply.role, reply.model) == ("message", "assistant", "fake") and reply.id == (
        reply.model_extra or {}
    )["guardrails"]["id"]
    assert reply.usage.input_tokens > 3 and reply.usage.output_tokens == 3
    body = upstream.seen[0].body
    assert body["messages"] == [
        {"role": "system", "content": "You help people at work.\n\nBe brief."},
        {"role": "user", "content": "Hello"},
    ]
    assert {name: body[name] for name in ("temperature", "top_p", "top_k")} == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
    }
    assert (body["max_tokens"], body["stop"]) == (100, ["X"])
    turn = await gateway.turn(reply.id)
    assert turn.subject and turn.said == "Hello there."


@both
async def test_a_refused_question_is_a_refusal(gateway: Gateway, upstream: FakeUpstream, stream: bool) -> None:
    reply = await ask(gateway, stream, user("What is the salary of Jane?"))
    assert (text_of(reply), reply.stop_reason) == (SALARY, "refusal")
    assert reply.stop_details and reply.stop_details.type == "refusal"
    assert (await verdict_of(gateway, reply))["action"] == "refuse"
    assert upstream.requests == []


async def test_a_stopped_stream_shows_what_stood_before_the_stop(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = Script([*STOPPED, *["More. ", 0.05] * 100])
    body = {"model": "fake", "max_tokens": 100, "messages": [user("How?")], "stream": True}
    _, _, raw = await gateway.raw("POST", "/v1/messages", json=body)
    assert not [word for word in (b"mix", b"grey", b"powder", b"oil") if word in raw]
    assert raw.rstrip().endswith(b'event: message_stop\ndata: {"type":"message_stop"}')
    assert (await upstream.seen[0].finished(1.0)).gone
    reply = await ask(gateway, True, user("How?"))
    assert (text_of(reply), reply.stop_reason) == (f"First \n\n{BOMB}", "refusal")


async def test_a_stopped_reply_that_is_not_streamed_is_the_rules_reply_alone(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.script = Script(STOPPED)
    reply = await ask(gateway, False, user("How?"))
    assert (text_of(reply), reply.stop_reason) == (BOMB, "refusal")


@both
async def test_both_directions_are_redacted_and_lines_appended(
    gateway: Gateway, upstream: FakeUpstream, stream: bool
) -> None:
    upstream.script = Script(["Write to ja", "ne@exa", "mple.com", " today."])
    reply = await ask(gateway, stream, user("Card 4111 1111 1111 1111, unpaid overtime?"))
    assert text_of(reply) == f"Write to [EMAIL] today.\n\n{LEGAL}" and reply.stop_reason == "end_turn"
    assert "4111" not in str(upstream.seen[0].body["messages"])


@both
async def test_an_escalated_turn_tells_its_ticket(gateway: Gateway, stream: bool) -> None:
    reply = await ask(gateway, stream, user("My boss harasses me"))
    ticket = (await verdict_of(gateway, reply))["ticket"]
    assert text_of(reply) == f"{CRISIS}\n\nYour reference is {ticket}." and reply.stop_reason == "end_turn"


@both
@pytest.mark.parametrize(("mode", "reason"), [("stop", "end_turn"), ("refusal", "refusal"), ("message", "refusal")])
async def test_block_modes(gateway: Gateway, stream: bool, mode: str, reason: str) -> None:
    headers = {"x-guardrails-block-mode": mode}
    reply = await ask(gateway, stream, user("What is the salary of Jane?"), extra_headers=headers)
    assert (text_of(reply), reply.stop_reason) == (SALARY, reason)


@both
async def test_block_mode_error_is_a_status(gateway: Gateway, stream: bool) -> None:
    headers = {"x-guardrails-block-mode": "error"}
    with pytest.raises(anthropic.BadRequestError) as caught:
        await ask(gateway, stream, user("What is the salary of Jane?"), extra_headers=headers)
    assert caught.value.body["error"]["code"] == "content_filter"  # type: ignore[index]


# --- the end of a reply


@both
@pytest.mark.parametrize(("reason", "told"), [("length", "max_tokens"), ("stop", "end_turn")])
async def test_why_a_reply_ended(
    gateway: Gateway, upstream: FakeUpstream, stream: bool, reason: str, told: str
) -> None:
    upstream.script = Script(["One", " two"], finish_reason=reason)
    assert (await ask(gateway, stream)).stop_reason == told


async def test_a_stop_sequence_is_told_where_the_engine_tells_it(gateway: Gateway, upstream: FakeUpstream) -> None:
    final = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop","stop_reason":"END"}]}\n\n'
    upstream.script = Script(["One.", final])
    reply = await ask(gateway, True, stop_sequences=["END"])
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", "END")


async def test_a_streams_events_are_those_of_the_protocol(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = script("Let me see. ", call("find", '{"q": ', "1}"))
    events = await events_of(gateway, tools=TOOLS)
    assert events[0].type == "message_start" and events[0].message.content == []
    assert [one.type for one in events[-2:]] == ["message_delta", "message_stop"]
    opened = [(one.index, one.content_block.type) for one in events if one.type == "content_block_start"]
    closed = [one.index for one in events if one.type == "content_block_stop"]
    assert (opened, closed) == ([(0, "text"), (1, "tool_use")], [0, 1])
    assert events[-2].delta.stop_reason == "tool_use"
    assert events[-2].model_extra["guardrails"]["action"] == "allow"
    assert events[-2].usage.output_tokens and events[-2].usage.input_tokens


# --- tools and thinking


@both
async def test_a_whole_loop_with_a_tool(gateway: Gateway, upstream: FakeUpstream, stream: bool) -> None:
    upstream.queue += [script("Let me see. ", call("find", '{"q":', " 1}")), Script(["It is 42."])]
    question = user("What is it?")
    choice = {"type": "any", "disable_parallel_tool_use": True}
    first = await ask(gateway, stream, question, tools=TOOLS, tool_choice=choice)
    assert first.stop_reason == "tool_use" and [one.type for one in first.content] == ["text", "tool_use"]
    made = first.content[1]
    assert made.type == "tool_use" and (made.name, made.input) == ("find", {"q": 1})
    assert upstream.seen[0].body["tool_choice"] == "required"
    assert upstream.seen[0].body["parallel_tool_calls"] is False
    assert upstream.seen[0].body["tools"][1] == {
        "type": "function",
        "function": {"name": "find", "description": "A tool.", "parameters": {"type": "object"}},
    }
    result = {"type": "tool_result", "tool_use_id": made.id, "content": [{"type": "text", "text": "42"}]}
    said = [one.model_dump(include={"type", "text", "id", "name", "input"}) for one in first.content]
    talk = [question, {"role": "assistant", "content": said}, {"role": "user", "content": [result]}]
    second = await ask(gateway, stream, *talk, tools=TOOLS)
    assert text_of(second) == "It is 42."
    assert [one["role"] for one in upstream.seen[1].body["messages"]] == ["system", "user", "assistant", "tool"]
    turns = [await gateway.turn(one.id) for one in (first, second)]
    assert turns[0].conversation == turns[1].conversation, "the history was recognised"


async def test_parallel_calls_are_kept_apart(gateway: Gateway, upstream: FakeUpstream) -> None:
    first, second = call("send", '{"a":', "1}"), call("find", '{"b":', "2}", index=1)
    upstream.script = script(*[one for pair in zip(first, second, strict=True) for one in pair])
    reply = await ask(gateway, True, tools=TOOLS)
    assert [(one.name, one.input) for one in reply.content if one.type == "tool_use"] == [
        ("send", {"a": 1}),
        ("find", {"b": 2}),
    ]


async def test_a_stop_in_a_call_is_a_refusal(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = script(call("find", '{"q": "some words and ', 'then mix the grey powder with oil"}'))
    reply = await ask(gateway, True, tools=TOOLS)
    assert (text_of(reply), reply.stop_reason) == (BOMB, "refusal")
    assert "powder" not in reply.model_dump_json()


@both
async def test_thinking_is_told_to_those_who_ask(gateway: Gateway, upstream: FakeUpstream, stream: bool) -> None:
    upstream.script = script(thought("Hm, ", "well."), "Yes.", reason="stop")
    plain = await ask(gateway, stream)
    asked = await ask(gateway, stream, thinking={"type": "enabled", "budget_tokens": 1024})
    assert [one.type for one in plain.content] == ["text"]
    assert [one.type for one in asked.content] == ["thinking", "text"]
    assert asked.content[0].type == "thinking" and asked.content[0].thinking == "Hm, well."
    said = [one.model_dump() for one in asked.content]
    talk = [user(), {"role": "assistant", "content": said}, user("And?")]
    again = await ask(gateway, stream, *talk, thinking={"type": "adaptive"})
    turns = [await gateway.turn(one.id) for one in (asked, again)]
    assert turns[0].conversation == turns[1].conversation


@both
async def test_a_structured_reply_is_json_or_a_refusal(gateway: Gateway, upstream: FakeUpstream, stream: bool) -> None:
    upstream.script = Script(['{"number"', ": 42}"])
    shape = {"type": "json_schema", "schema": {"type": "object"}}
    reply = await ask(gateway, stream, output_config={"format": shape, "effort": "max"})
    assert text_of(reply) == '{"number": 42}'
    body = upstream.seen[0].body
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"} and body["reasoning_effort"] == "high"
    refused = await ask(gateway, stream, user("salary of Jane"), output_config={"format": shape})
    assert (text_of(refused), refused.stop_reason) == (SALARY, "refusal")


# --- errors


async def test_errors_are_the_sdks(gateway: Gateway, upstream: FakeUpstream) -> None:
    async def told(**more: Any) -> anthropic.APIStatusError:
        with pytest.raises(anthropic.APIStatusError) as caught:
            await ask(gateway, False, **more)
        error: dict[str, Any] = caught.value.body  # type: ignore[assignment]
        assert error["type"] == "error" and error["error"]["message"]
        return caught.value

    def kind(error: anthropic.APIStatusError) -> str:
        return str(error.body["error"]["type"])  # type: ignore[index]

    unknown = await told(key="nk-wrong")
    assert isinstance(unknown, anthropic.AuthenticationError) and kind(unknown) == "authentication_error"
    missing = await told(model="other")
    assert isinstance(missing, anthropic.NotFoundError) and kind(missing) == "not_found_error"
    wrong = await told(extra_body={"temperature": 1.5})
    assert isinstance(wrong, anthropic.BadRequestError) and kind(wrong) == "invalid_request_error"
    upstream.script = Script(status=503, retry_after="7")
    busy = await told()
    assert isinstance(busy, anthropic.InternalServerError) and kind(busy) == "overloaded_error"
    assert busy.status_code == 503 and int(busy.response.headers["retry-after"]) > 0


@pytest.mark.parametrize("end", ["error", "cut"])
async def test_a_stream_that_breaks_off_ends_with_an_error_event(
    gateway: Gateway, upstream: FakeUpstream, end: Any
) -> None:
    upstream.script = Script(["Some words. ", "More of them. "], end=end)
    with pytest.raises(anthropic.APIStatusError) as caught:
        await events_of(gateway)
    assert "overloaded_error" in str(caught.value.body)


async def test_the_sdk_retries_a_busy_engine(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.queue += [Script(status=503, retry_after="0")]
    async with sdk(gateway, max_retries=2) as client:
        reply = await client.messages.create(model="fake", max_tokens=9, messages=[user()])  # type: ignore[list-item]
    assert text_of(reply) == "Hello there."


async def test_a_silent_stream_keeps_the_connection_alive(tmp_path: Any, upstream: FakeUpstream) -> None:
    upstream.script = Script(["One. ", 0.3, "Two."])
    async with running(tmp_path, upstream, keepalive=0.05) as gateway:
        body = {"model": "fake", "max_tokens": 9, "messages": [user()], "stream": True}
        _, _, raw = await gateway.raw("POST", "/v1/messages", json=body)
        assert b": keep-alive" in raw
        assert text_of(await ask(gateway, True)) == "One. Two."


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type"),
        ({"messages": [user(), {"role": "assistant", "content": "I"}]}, "messages"),
        ({"messages": [{"role": "system", "content": "Be."}]}, "messages[0].role"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"stop_sequences": ["a", "b", "c", "d", "e"]}, "stop_sequences"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"top_logprobs": 2}, "top_logprobs"),
    ],
    ids=str,
)
async def test_what_is_not_served_is_refused_by_name(gateway: Gateway, more: dict[str, Any], param: str) -> None:
    body = {"model": "fake", "max_tokens": 9, "messages": [user()]} | more
    status, told = await gateway.json("POST", "/v1/messages", json=body)
    assert (status, told["error"]["param"]) == (400, param), told
    assert (told["type"], told["error"]["type"]) == ("error", "invalid_request_error")


async def test_a_key_comes_in_either_header(gateway: Gateway) -> None:
    body = {"model": "fake", "max_tokens": 9, "messages": [user()]}
    for headers in ({"x-api-key": gateway.key, "anthropic-version": "2023-06-01"}, {}):
        status, _ = await gateway.json("POST", "/v1/messages", json=body, key="" if headers else None, headers=headers)
        assert status == 200
    status, told = await gateway.json("POST", "/v1/messages", json=body, key="")
    assert (status, told["error"]["type"]) == (401, "authentication_error")
