"""Clients that people already have, unchanged: LangChain and the `llm` command line's library."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from tests.conformance.test_openai_tools import call, script
from tests.fakes import FakeUpstream, Script
from tests.gateway import BOMB, SALARY, Gateway

FIND: Any = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}


def langchain(gateway: Gateway, key: str = "", **more: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model="fake", base_url=f"{gateway.base}/v1", api_key=SecretStr(key or gateway.key), max_retries=0, **more
    )


@pytest.mark.parametrize("responses", [False, True])
async def test_langchain_is_answered_and_refused(gateway: Gateway, upstream: FakeUpstream, responses: bool) -> None:
    model = langchain(gateway, use_responses_api=responses)
    reply = await model.ainvoke("Hello")
    refused = await model.ainvoke("What is the salary of Jane?")
    assert (reply.text, refused.text) == ("Hello there.", SALARY)
    assert len(upstream.seen) == 1
    if not responses:
        assert reply.response_metadata["finish_reason"] == "stop"
        assert refused.response_metadata["finish_reason"] == "content_filter"


@pytest.mark.parametrize("responses", [False, True])
async def test_langchain_streams_up_to_the_stop(gateway: Gateway, upstream: FakeUpstream, responses: bool) -> None:
    upstream.script = Script(["First ", "mix the ", "grey ", "powder", " with oil"])
    pieces = [one.text async for one in langchain(gateway, use_responses_api=responses).astream("How?")]
    assert "".join(pieces) == f"First \n\n{BOMB}" and len(pieces) > 1


@pytest.mark.parametrize("responses", [False, True])
async def test_langchain_calls_a_tool(gateway: Gateway, upstream: FakeUpstream, responses: bool) -> None:
    upstream.queue += [script(call("find", '{"q": 1}')), Script(["It is 42."])]
    model = langchain(gateway, use_responses_api=responses).bind_tools([FIND])
    first = await model.ainvoke("What is it?")
    assert isinstance(first, AIMessage)
    (made,) = first.tool_calls
    assert (made["name"], made["args"]) == ("find", {"q": 1})
    second = await model.ainvoke([HumanMessage("What is it?"), first, ToolMessage("42", tool_call_id=made["id"])])
    assert second.text == "It is 42."
    assert [one["role"] for one in upstream.seen[1].body["messages"]] == ["system", "user", "assistant", "tool"]


async def test_langchain_raises_openais_errors(gateway: Gateway) -> None:
    with pytest.raises(openai.AuthenticationError):
        await langchain(gateway, key="nk-wrong").ainvoke("Hello")


@pytest.mark.parametrize("stream", [False, True])
async def test_llm_is_answered_and_goes_on(
    gateway: Gateway, upstream: FakeUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    from llm.default_plugins.openai_models import Chat  # reads its folder when it is imported

    model = Chat("guarded", model_name="fake", api_base=f"{gateway.base}/v1", key=gateway.key)

    def talk() -> list[str]:
        conversation = model.conversation()
        asked = ("Hello", "What is the salary of Jane?", "And now?")
        return [conversation.prompt(one, key=gateway.key, stream=stream).text() for one in asked]

    assert await asyncio.to_thread(talk) == ["Hello there.", SALARY, "Hello there."]
    assert "salary" not in str(upstream.seen[1].body), "a refused question is taken out of the history"
