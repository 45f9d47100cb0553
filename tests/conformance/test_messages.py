"""Anthropic's messages through the gateway with the real `anthropic` SDK: verdicts, streams, tools and errors."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest
from anthropic.types import Message

from tests.conformance.test_openai_tools import call, script, thought
from tests.fakes import FakeUpstream, Script
from tests.gateway import BOMB, CRISIS, SALARY, Gateway

TOOLS: Any = [{"name": name, "input_schema": {"type": "object"}} for name in ("send", "find")]
STOPPED = ["First ", "mix the ", "grey ", "powder", " with oil", " and light it."]
both = pytest.mark.parametrize("stream", [False, True])


def sdk(gateway: Gateway, key: str = "") -> anthropic.AsyncAnthropic:
    """A real client, which sends its key as `x-api-key`."""
    return anthropic.AsyncAnthropic(base_url=gateway.base, api_key=key or gateway.key, max_retries=0)


async def ask(gateway: Gateway, stream: bool, asked: Any = "Hello", **more: Any) -> Message:
    """The message that answers, made of its events by the SDK's helper where it is streamed."""
    talk = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    options: dict[str, Any] = {"model": "fake", "max_tokens": 100, "messages": talk} | more
    async with sdk(gateway) as client:
        if not stream:
            reply: Message = await client.messages.create(**options)
            return reply
        async with client.messages.stream(**options) as events:
            return await events.get_final_message()


def text_of(message: Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


@both
async def test_an_ordinary_question_is_helped(gateway: Gateway, upstream: FakeUpstream, stream: bool) -> None:
    sampling = {"temperature": 0.5, "top_k": 5}  # the SDK names them no longer, and its older versions did
    reply = await ask(gateway, stream, system="Be brief.", stop_sequences=["END"], extra_body=sampling)
    assert (text_of(reply), reply.stop_reason) == ("Hello there.", "end_turn")
    assert (reply.role, reply.model, reply.usage.output_tokens) == ("assistant", "fake", 3)
    body = upstream.seen[0].body
    assert body["messages"] == [
        {"role": "system", "content": "You help people at work.\n\nBe brief."},
        {"role": "user", "content": "Hello"},
    ]
    assert (body["max_tokens"], body["temperature"], body["stop"], body["top_k"]) == (100, 0.5, ["END"], 5)
    assert (await gateway.turn(reply.id)).said == "Hello there."


@both
async def test_a_refused_question_ends_with_a_refusal(gateway: Gateway, upstream: FakeUpstream, stream: bool) -> None:
    reply = await ask(gateway, stream, "What is the salary of Jane?")
    assert (text_of(reply), reply.stop_reason) == (SALARY, "refusal")
    assert upstream.requests == []


@both
async def test_a_reply_is_stopped(gateway: Gateway, upstream: FakeUpstream, stream: bool) -> None:
    upstream.script = Script(STOPPED)
    reply = await ask(gateway, stream, "How?")
    assert (text_of(reply), reply.stop_reason) == (f"First \n\n{BOMB}" if stream else BOMB, "refusal")


@both
async def test_both_directions_are_redacted(gateway: Gateway, upstream: FakeUpstream, stream: bool) -> None:
    upstream.script = Script(["Write to ja", "ne@exa", "mple.com", " today."])
    reply = await ask(gateway, stream, "Card 4111 1111 1111 1111?")
    assert text_of(reply) == "Write to [EMAIL] today."
    assert "4111" not in str(upstream.seen[0].body)


@both
async def test_an_escalated_turn_tells_its_ticket(gateway: Gateway, stream: bool) -> None:
    reply = await ask(gateway, stream, "My boss harasses me")
    assert text_of(reply).startswith(f"{CRISIS}\n\nYour reference is ESC-") and reply.stop_reason == "end_turn"


@both
async def test_a_limit_and_reasoning_are_told(gateway: Gateway, upstream: FakeUpstream, stream: bool) -> None:
    upstream.script = Script([*thought("Hm, ", "well."), "One two"], finish_reason="length")
    shown = await ask(gateway, stream, thinking={"type": "enabled", "budget_tokens": 1024})
    assert [block.type for block in shown.content] == ["thinking", "text"] and shown.stop_reason == "max_tokens"
    assert shown.content[0].type == "thinking" and shown.content[0].thinking == "Hm, well."
    hidden = await ask(gateway, stream)
    assert [block.type for block in hidden.content] == ["text"]


@both
async def test_a_whole_loop_with_a_tool(gateway: Gateway, upstream: FakeUpstream, stream: bool) -> None:
    upstream.queue += [script("Let me see. ", call("find", '{"q": ', "1}")), Script(["It is 42."])]
    first = await ask(gateway, stream, "What is it?", tools=TOOLS, tool_choice={"type": "any"})
    made = first.content[-1]
    assert made.type == "tool_use" and (made.name, made.input, first.stop_reason) == ("find", {"q": 1}, "tool_use")
    result = {"type": "tool_result", "tool_use_id": made.id, "content": [{"type": "text", "text": "42"}]}
    said = [block.model_dump(exclude_none=True) for block in first.content]
    talk = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": said}]
    second = await ask(gateway, stream, [*talk, {"role": "user", "content": [result]}], tools=TOOLS)
    assert text_of(second) == "It is 42."
    assert upstream.seen[0].body["tool_choice"] == "required"
    sent = upstream.seen[1].body["messages"]
    assert [one["role"] for one in sent] == ["system", "user", "assistant", "tool"]
    turns = [await gateway.turn(one.id) for one in (first, second)]
    assert turns[0].conversation == turns[1].conversation, "the history was recognised"


async def test_a_tool_that_was_not_offered_is_not_called(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = script(call("shell", '{"run": 1}'))
    reply = await ask(gateway, False, tools=TOOLS)
    assert reply.stop_reason == "refusal" and all(block.type == "text" for block in reply.content)


@pytest.mark.parametrize("end", ["error", "cut"])
async def test_a_stream_that_breaks_off_raises(gateway: Gateway, upstream: FakeUpstream, end: Any) -> None:
    upstream.script = Script(["Some words. ", "More of them. "], end=end)
    with pytest.raises(anthropic.APIStatusError) as caught:
        await ask(gateway, True)
    assert "engine_broken" in str(caught.value.body)


@pytest.mark.parametrize(
    ("change", "kind", "name"),
    [
        ({"max_tokens": 0}, anthropic.BadRequestError, "invalid_request_error"),
        ({"frobnicate": 1}, anthropic.BadRequestError, "invalid_request_error"),
        ({"tools": [{"type": "web_search_20250305", "name": "x"}]}, anthropic.BadRequestError, "invalid_request_error"),
        ({"model": "claude"}, anthropic.NotFoundError, "not_found_error"),
    ],
    ids=str,
)
async def test_mistakes_are_anthropics_errors(
    gateway: Gateway, change: dict[str, Any], kind: type[anthropic.APIStatusError], name: str
) -> None:
    body = {"model": "fake", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]} | change
    async with sdk(gateway) as client:
        with pytest.raises(kind) as caught:
            await client.post("/v1/messages", body=body, cast_to=Message)
    told: Any = caught.value.body
    assert told["type"] == "error" and told["error"]["type"] == name and told["error"]["message"]


async def test_a_wrong_key_is_anthropics_error(gateway: Gateway) -> None:
    async with sdk(gateway, "nk-wrong") as client:
        with pytest.raises(anthropic.AuthenticationError) as caught:
            await client.messages.create(model="fake", max_tokens=9, messages=[{"role": "user", "content": "Hi"}])
    told: Any = caught.value.body
    assert told["error"]["type"] == "authentication_error" and told["error"]["code"] == "invalid_api_key"


async def test_an_engine_that_fails_is_an_overloaded_error(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = Script(status=503)
    with pytest.raises(anthropic.InternalServerError) as caught:
        await ask(gateway, False)
    told: Any = caught.value.body
    assert (caught.value.status_code, told["error"]["type"]) == (503, "overloaded_error")


async def test_block_mode_error_is_a_status(gateway: Gateway) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        await ask(gateway, False, "What is the salary of Jane?", extra_headers={"x-guardrails-block-mode": "error"})
    told: Any = caught.value.body
    assert told["error"]["code"] == "content_filter" and told["error"]["message"] == SALARY
