"""LangChain's client for OpenAI against the gateway, unmodified: verdicts, streams, tools, JSON, errors."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from tests.conformance.test_openai_tools import call, script
from tests.fakes import FakeUpstream, Script
from tests.gateway import BOMB, CRISIS, SALARY, Gateway

STOPPED = ["First ", "mix the ", "grey ", "powder", " with oil", " and light it."]
apis = pytest.mark.parametrize("newer", [False, True], ids=["chat", "responses"])


class Answer(BaseModel):
    """What a structured reply must be."""

    number: int


@tool
def find(q: int) -> str:
    """Finds something."""
    return str(q)


def client(gateway: Gateway, newer: bool = False, **more: Any) -> ChatOpenAI:
    options: dict[str, Any] = {"model": "fake", "max_retries": 0, "api_key": SecretStr(gateway.key)} | more
    return ChatOpenAI(base_url=f"{gateway.base}/v1", use_responses_api=newer, **options)


async def streamed(llm: Any, *said: Any) -> AIMessageChunk:
    chunks = [chunk async for chunk in llm.astream(*said)]
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert isinstance(whole, AIMessageChunk)
    return whole


@apis
async def test_verdicts(gateway: Gateway, upstream: FakeUpstream, newer: bool) -> None:
    llm = client(gateway, newer)
    helped = await llm.ainvoke("Hello")
    assert helped.text == "Hello there." and helped.usage_metadata and helped.usage_metadata["output_tokens"] == 3
    refused = await llm.ainvoke("What is the salary of Jane?")
    assert refused.text == SALARY
    told = refused.response_metadata
    assert newer or told["finish_reason"] == "content_filter"
    assert not newer or told["incomplete_details"] == {"reason": "content_filter"}
    upstream.script = Script(["Write to jane@example.com."])
    assert (await llm.ainvoke("Who?")).text == "Write to [EMAIL]."
    assert (await llm.ainvoke("My boss harasses me")).text.startswith(f"{CRISIS}\n\nYour reference is ESC-")


@apis
async def test_streams(gateway: Gateway, upstream: FakeUpstream, newer: bool) -> None:
    llm = client(gateway, newer, stream_usage=True)
    helped = await streamed(llm, "Hello")
    assert helped.text == "Hello there." and helped.usage_metadata and helped.usage_metadata["output_tokens"] == 3
    assert (await streamed(llm, "What is the salary of Jane?")).text == SALARY
    upstream.script = Script(STOPPED)
    assert (await streamed(llm, "How?")).text == f"First \n\n{BOMB}"


@apis
@pytest.mark.parametrize("stream", [False, True])
async def test_a_whole_loop_with_a_tool(gateway: Gateway, upstream: FakeUpstream, newer: bool, stream: bool) -> None:
    upstream.queue += [script("Let me see, ", call("find", '{"q": ', "1}")), Script(["It is 1."])]
    llm = client(gateway, newer).bind_tools([find])
    first: Any = await (streamed(llm, "What?") if stream else llm.ainvoke("What?"))
    (made,) = first.tool_calls
    assert (made["name"], made["args"]) == ("find", {"q": 1})
    talk = [HumanMessage("What?"), first, ToolMessage("1", tool_call_id=made["id"])]
    second: Any = await (streamed(llm, talk) if stream else llm.ainvoke(talk))
    assert second.text == "It is 1."
    assert [one["role"] for one in upstream.seen[1].body["messages"]] == ["system", "user", "assistant", "tool"]


@apis
async def test_parallel_calls_of_a_stream_are_kept_apart(gateway: Gateway, upstream: FakeUpstream, newer: bool) -> None:
    first, second = call("find", '{"q":', "1}"), call("find", '{"q":', "2}", index=1)
    upstream.script = script("Two: ", *[one for pair in zip(first, second, strict=True) for one in pair])
    made = await streamed(client(gateway, newer).bind_tools([find]), "What?")
    assert [one["args"] for one in made.tool_calls] == [{"q": 1}, {"q": 2}] and not made.invalid_tool_calls


async def test_structured_replies(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = Script(['{"number"', ": 42}"])
    llm = client(gateway).with_structured_output(Answer, method="json_schema", include_raw=True)
    told: Any = await llm.ainvoke("Which?")
    assert told["parsed"] == Answer(number=42)
    refused: Any = await llm.ainvoke("salary of Jane")
    assert refused["parsed"] is None and refused["raw"].additional_kwargs["refusal"] == SALARY


async def test_errors_are_openais(gateway: Gateway, upstream: FakeUpstream) -> None:
    with pytest.raises(openai.AuthenticationError):
        await client(gateway, api_key=SecretStr("nk-wrong")).ainvoke("Hello")
    with pytest.raises(openai.NotFoundError):
        await client(gateway, model="none").ainvoke("Hello")
    upstream.script = Script(["Some words. ", "More of them. "], end="error")
    with pytest.raises(openai.APIError) as caught:
        await streamed(client(gateway), "Hello")
    assert caught.value.code == "engine_broken"
    upstream.script = Script(status=503)
    with pytest.raises(openai.InternalServerError):
        await client(gateway).ainvoke("Hello")
