"""OpenAI's responses through the gateway with the real SDK: typed events, tools, refusals, and our conversations."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from app.records import Turn
from tests.conformance.test_openai_tools import call, script, thought
from tests.fakes import FakeUpstream, Script
from tests.gateway import BOMB, CRISIS, SALARY, Gateway

TOOLS: Any = [{"type": "function", "name": name, "parameters": {"type": "object"}} for name in ("send", "find")]
STOPPED: list[str | float] = ["First ", "mix the ", "grey ", "powder", " with oil", " and light it."]
both = pytest.mark.parametrize("stream", [False, True])


class Answer(BaseModel):
    """What a structured reply must be."""

    number: int


async def ask(gateway: Gateway, stream: bool, asked: Any = "Hello", **more: Any) -> tuple[Response, list[Any]]:
    """(the response, its events)."""
    async with gateway.sdk() as client:
        if not stream:
            return await client.responses.create(model="fake", input=asked, **more), []
        events = [one async for one in await client.responses.create(model="fake", input=asked, stream=True, **more)]
    return events[-1].response, events


def guardrails(response: Response) -> dict[str, Any]:
    told: dict[str, Any] = (response.model_extra or {})["guardrails"]
    return told


async def turn_of(gateway: Gateway, response: Response) -> Turn:
    return await gateway.turn(guardrails(response)["id"])


# --- verdicts


@both
async def test_an_ordinary_question_is_helped(gateway: Gateway, upstream: FakeUpstream, stream: bool) -> None:
    asked = {"instructions": "Be brief.", "temperature": 0.5, "max_output_tokens": 40, "metadata": {"a": "b"}}
    response, _ = await ask(gateway, stream, **asked)
    assert (response.output_text, response.status, response.incomplete_details) == ("Hello there.", "completed", None)
    assert (response.object, response.id) == ("response", guardrails(response)["id"])
    assert (response.instructions, response.temperature, response.metadata) == ("Be brief.", 0.5, {"a": "b"})
    assert response.usage and response.usage.total_tokens == response.usage.input_tokens + 3
    body = upstream.seen[0].body
    assert body["messages"] == [
        {"role": "system", "content": "You help people at work.\n\nBe brief."},
        {"role": "user", "content": "Hello"},
    ]
    assert (body["max_tokens"], body["temperature"]) == (40, 0.5)
    assert (await turn_of(gateway, response)).said == "Hello there."


@both
async def test_a_refused_question_is_an_incomplete_response(
    gateway: Gateway, upstream: FakeUpstream, stream: bool
) -> None:
    response, _ = await ask(gateway, stream, "What is the salary of Jane?")
    assert (response.output_text, response.status) == (SALARY, "incomplete")
    assert response.incomplete_details and response.incomplete_details.reason == "content_filter"
    assert (guardrails(response)["action"], guardrails(response)["stage"]) == ("refuse", "input")
    assert upstream.requests == []


async def test_a_stopped_stream_shows_what_stood_before_the_stop(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = Script([*STOPPED, *["More. ", 0.05] * 100])
    response, events = await ask(gateway, True, "How?")
    assert (response.output_text, response.status) == (f"First \n\n{BOMB}", "incomplete")
    assert "powder" not in "".join(one.model_dump_json() for one in events)
    assert events[-1].type == "response.incomplete"
    assert (await upstream.seen[0].finished(1.0)).gone


async def test_a_stopped_reply_that_is_not_streamed_is_the_rules_reply_alone(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.script = Script(STOPPED)
    response, _ = await ask(gateway, False, "How?")
    assert (response.output_text, response.status) == (BOMB, "incomplete")


@both
async def test_both_directions_are_redacted(gateway: Gateway, upstream: FakeUpstream, stream: bool) -> None:
    upstream.script = Script(["Write to ja", "ne@exa", "mple.com", " today."])
    response, events = await ask(gateway, stream, "Card 4111 1111 1111 1111?")
    assert response.output_text == "Write to [EMAIL] today." and response.status == "completed"
    assert "jane" not in "".join(one.model_dump_json() for one in events)
    assert "4111" not in str(upstream.seen[0].body["messages"])


@both
async def test_an_escalated_turn_is_complete_and_tells_its_ticket(gateway: Gateway, stream: bool) -> None:
    response, _ = await ask(gateway, stream, "My boss harasses me")
    escalation = guardrails(response)["escalation"]
    assert response.status == "completed"
    assert response.output_text == f"{CRISIS}\n\nYour reference is {escalation['id']}."


@both
@pytest.mark.parametrize("mode", ["stop", "refusal"])
async def test_block_modes(gateway: Gateway, stream: bool, mode: str) -> None:
    headers = {"x-guardrails-block-mode": mode}
    response, _ = await ask(gateway, stream, "What is the salary of Jane?", extra_headers=headers)
    assert response.status == "completed"
    (item,) = response.output
    assert item.type == "message"
    (part,) = item.content
    told = part.refusal if part.type == "refusal" else part.text
    assert (part.type, told) == ("refusal" if mode == "refusal" else "output_text", SALARY)


@both
async def test_block_mode_error_is_a_status(gateway: Gateway, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(gateway, stream, "What is the salary of Jane?", extra_headers={"x-guardrails-block-mode": "error"})
    assert caught.value.code == "content_filter"


@both
async def test_a_limit_makes_the_response_incomplete(gateway: Gateway, upstream: FakeUpstream, stream: bool) -> None:
    upstream.script = Script(["One", " two"], finish_reason="length")
    response, _ = await ask(gateway, stream)
    assert response.status == "incomplete" and response.incomplete_details
    assert response.incomplete_details.reason == "max_output_tokens"


# --- the events


async def test_events_open_fill_and_close_each_item(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = script(thought("Hm, ", "well."), "Let me see. ", call("find", '{"q": ', "1}"))
    response, events = await ask(gateway, True, tools=TOOLS)
    assert [one.sequence_number for one in events] == list(range(len(events)))
    kinds = [one.type.removeprefix("response.") for one in events]
    once = [kind for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]
    assert once == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("reasoning_text.delta", "output_text.delta"),  # their last words, which rules held back
        *("output_item.added", "function_call_arguments.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    done = [one.item for one in events if one.type == "response.output_item.done"]
    assert [one.model_dump() for one in done] == [one.model_dump() for one in response.output]
    assert [one.type for one in response.output] == ["reasoning", "message", "function_call"]
    deltas = "".join(one.delta for one in events if one.type == "response.function_call_arguments.delta")
    texts = [one.content[0].text for one in response.output[:2]]  # type: ignore[union-attr,index]
    assert texts == ["Hm, well.", "Let me see. "]
    assert response.output[2].type == "function_call" and deltas == response.output[2].arguments == '{"q": 1}'


async def test_calls_that_an_engine_writes_at_the_same_time_come_one_after_the_other(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    first, second = call("send", '{"a":', "1}"), call("find", '{"b":', "2}", index=1)
    upstream.script = script(*[one for pair in zip(first, second, strict=True) for one in pair])
    response, events = await ask(gateway, True, tools=TOOLS)
    calls = [one for one in response.output if one.type == "function_call"]
    assert [(one.name, one.arguments) for one in calls] == [("send", '{"a":1}'), ("find", '{"b":2}')]
    deltas = [one.output_index for one in events if one.type.endswith("arguments.delta")]
    assert deltas == sorted(deltas) and set(deltas) == {0, 1}


async def test_a_stop_in_a_call_leaves_it_incomplete(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = script(call("find", '{"q": "some words and ', 'then mix the grey powder with oil"}'))
    response, events = await ask(gateway, True, tools=TOOLS)
    assert response.status == "incomplete" and "powder" not in "".join(one.model_dump_json() for one in events)
    assert response.output_text == BOMB
    assert all(one.status == "incomplete" for one in response.output if one.type == "function_call")


@pytest.mark.parametrize("end", ["error", "cut"])
async def test_a_stream_that_breaks_off_ends_with_the_failure(
    gateway: Gateway, upstream: FakeUpstream, end: Any
) -> None:
    upstream.script = Script(["Some words. ", "More of them. "], end=end)
    response, events = await ask(gateway, True)
    assert [one.type for one in events[-2:]] == ["error", "response.failed"]
    assert events[-2].code == "engine_broken"
    assert response.status == "failed" and response.error and response.error.code == "server_error"


async def test_the_stream_helper_reads_text_and_calls(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = script("Let me see. ", call("find", '{"q": ', "1}"))
    async with gateway.sdk() as client, client.responses.stream(model="fake", input="Hi", tools=TOOLS) as stream:
        texts = [one.delta async for one in stream if one.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert "".join(texts) == final.output_text == "Let me see. "
    assert final.output[1].type == "function_call" and final.output[1].name == "find"


# --- structured replies


async def test_the_sdk_parses_a_reply_and_knows_a_refusal(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = Script(['{"number"', ": 42}"])
    async with gateway.sdk() as client:
        parsed = await client.responses.parse(model="fake", input="Which?", text_format=Answer)
        refused = await client.responses.parse(model="fake", input="salary of Jane", text_format=Answer)
    assert parsed.output_parsed == Answer(number=42)
    shape = upstream.seen[0].body["response_format"]
    assert shape["type"] == "json_schema" and shape["json_schema"]["name"] == "Answer"
    assert refused.output_parsed is None and refused.status == "completed"
    item = refused.output[0]
    assert item.type == "message" and item.content[0].type == "refusal" and item.content[0].refusal == SALARY


async def test_the_stream_helper_parses_a_reply(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = Script(['{"number"', ": 42}"])
    async with gateway.sdk() as client:
        async with client.responses.stream(model="fake", input="Which?", text_format=Answer) as stream:
            final = await stream.get_final_response()
        async with client.responses.stream(model="fake", input="salary of Jane", text_format=Answer) as stream:
            refused = await stream.get_final_response()
    assert final.output_parsed == Answer(number=42)
    assert refused.output_parsed is None


# --- tools


@both
async def test_a_whole_loop_with_a_tool(gateway: Gateway, upstream: FakeUpstream, stream: bool) -> None:
    upstream.queue += [script(call("find", '{"q": 1}')), Script(["It is 42."])]
    first, _ = await ask(gateway, stream, "What is it?", tools=TOOLS, parallel_tool_calls=False)
    (made,) = first.output
    assert made.type == "function_call" and made.status == "completed"
    talk: list[Any] = [{"role": "user", "content": "What is it?"}, made.model_dump(exclude_none=True)]
    talk.append({"type": "function_call_output", "call_id": made.call_id, "output": "42"})
    second, _ = await ask(gateway, stream, talk, tools=TOOLS)
    assert second.output_text == "It is 42."
    sent = upstream.seen[1].body["messages"]
    assert [one["role"] for one in sent] == ["system", "user", "assistant", "tool"]
    turns = [await turn_of(gateway, one) for one in (first, second)]
    assert turns[0].conversation == turns[1].conversation, "the history was recognised"
    assert upstream.seen[0].body["parallel_tool_calls"] is False


async def test_a_tool_can_be_demanded(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = script(call("find", "{}"))
    await ask(gateway, False, tools=TOOLS, tool_choice={"type": "function", "name": "find"})
    assert upstream.seen[0].body["tool_choice"] == {"type": "function", "function": {"name": "find"}}


async def test_an_empty_message_behind_a_call_is_left_out(gateway: Gateway, upstream: FakeUpstream) -> None:
    made = {"type": "function_call", "call_id": "c", "name": "find", "arguments": "{}"}
    empty = {"role": "assistant", "content": [{"type": "output_text", "text": "", "annotations": []}]}
    result = {"type": "function_call_output", "call_id": "c", "output": "42"}
    await ask(gateway, False, [{"role": "user", "content": "What is it?"}, made, empty, result], tools=TOOLS)
    sent = upstream.seen[0].body["messages"]
    assert [one["role"] for one in sent] == ["system", "user", "assistant", "tool"]


# --- conversations of ours


async def test_a_conversation_is_continued(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.queue += [Script(["Nice, Ann."]), Script(["You are Ann."]), Script(["Ann, still."])]
    first, _ = await ask(gateway, False, "I am Ann.", user="ann")
    conversation = (await turn_of(gateway, first)).conversation
    second, _ = await ask(gateway, False, "Who am I?", user="ann", conversation=conversation)
    await ask(gateway, False, "And now?", user="ann", conversation={"id": conversation})
    assert second.conversation and second.conversation.id == conversation
    asked = [one["content"] for one in upstream.seen[2].body["messages"][1:]]
    assert asked == ["I am Ann.", "Nice, Ann.", "Who am I?", "You are Ann.", "And now?"]


# --- what is not served


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content"),
        ({"input": [{"role": "assistant", "content": "Hello"}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": []}, "input"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"previous_response_id": "chatcmpl-1", "conversation": "c"}, "conversation"),
        ({"conversation": "with space"}, "conversation"),
    ],
    ids=str,
)
async def test_what_is_not_served_is_refused_by_name(gateway: Gateway, more: dict[str, Any], param: str) -> None:
    status, told = await gateway.json("POST", "/v1/responses", json={"model": "fake", "input": "Hello"} | more)
    assert (status, told["error"]["param"]) == (400, param), told
    assert told["error"]["type"] == "invalid_request_error"


async def test_what_has_no_effect_is_named_in_a_header(gateway: Gateway) -> None:
    body = {"model": "fake", "input": "Hello", "store": False, "truncation": "auto", "background": False}
    _, headers, _ = await gateway.raw("POST", "/v1/responses", json=body)
    assert headers["x-ignored-parameters"] == "store, truncation"


async def test_fields_that_a_key_may_send_go_to_the_engine(gateway: Gateway, upstream: FakeUpstream) -> None:
    status, told = await gateway.json("POST", "/v1/responses", json={"model": "fake", "input": "Hello", "top_k": 3})
    assert (status, told["error"]["code"]) == (400, "unknown_parameter")
    assert upstream.requests == []


# --- going on from a response


async def test_a_previous_response_is_gone_on_from(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.queue += [Script(["Nice, Ann."]), Script(["You are Ann."]), Script(["Ann, still."]), Script(["Yes."])]
    first, _ = await ask(gateway, False, "I am Ann.", instructions="Rhyme.")
    second, _ = await ask(gateway, False, "Who am I?", previous_response_id=first.id)
    again, _ = await ask(gateway, True, "Who am I, then?", previous_response_id=first.id)
    last, _ = await ask(gateway, False, "Sure?", previous_response_id=again.id)
    asked = [[one["content"] for one in seen.body["messages"][1:]] for seen in upstream.seen]
    assert asked[1] == ["I am Ann.", "Nice, Ann.", "Who am I?"]
    assert asked[2] == ["I am Ann.", "Nice, Ann.", "Who am I, then?"]
    assert asked[3] == [*asked[2], "Ann, still.", "Sure?"], "what was said on another way is not known on this one"
    assert "Rhyme" not in str(upstream.seen[1].body), "instructions are not carried over"
    assert second.previous_response_id == first.id
    turns = [await gateway.turn(one.id) for one in (first, second, again, last)]
    assert len({one.conversation for one in turns}) == 1


async def test_results_of_tools_go_on_from_a_previous_response(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.queue += [script(call("find", '{"q": 1}')), Script(["It is 42."])]
    first, _ = await ask(gateway, False, "What is it?", tools=TOOLS)
    assert first.output[0].type == "function_call"
    result = {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "42"}
    second, _ = await ask(gateway, False, [result], tools=TOOLS, previous_response_id=first.id)
    assert second.output_text == "It is 42."
    assert [one["role"] for one in upstream.seen[1].body["messages"]] == ["system", "user", "assistant", "tool"]


async def test_a_previous_response_is_nobody_elses(gateway: Gateway, upstream: FakeUpstream) -> None:
    first, _ = await ask(gateway, False, "I am Ann.", user="ann")
    other = await gateway.tenant("other")
    body = {"model": "fake", "input": "Who am I?", "previous_response_id": first.id, "user": "ann"}
    unknown = {"previous_response_id": "chatcmpl-0"}
    for key, more in ((other, {}), (gateway.key, {"user": "bob"}), (gateway.key, unknown)):
        status, told = await gateway.json("POST", "/v1/responses", json=body | more, key=key)
        assert (status, told["error"]["code"]) == (400, "previous_response_not_found")
        assert told["error"]["param"] == "previous_response_id"
    assert len(upstream.seen) == 1
