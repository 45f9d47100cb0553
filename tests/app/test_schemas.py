"""Bodies: what is read from them, and how a mistake is placed and explained (the table of bad ones is in test_api)."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from app.errors import ApiError
from app.schemas import ChatRequest, FeedbackRequest, PolicyUpload, TicketAnswer, parse
from guardrails.types import Message, ToolMessage

ASK = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


def chat(**more: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps(ASK | more).encode())


def problem(model: Any, body: dict[str, Any]) -> tuple[str | None, str]:
    with pytest.raises(ApiError) as caught:
        parse(model, json.dumps(body).encode())
    assert caught.value.status == 400
    return caught.value.param, caught.value.message


CALL = {"id": "c1", "type": "function", "function": {"name": "send", "arguments": '{ "to": "\\u0061nn" }'}}
SENT = ToolMessage("assistant", '{"to":"ann"}', "c1", "send")


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        ({"role": "user", "content": "a"}, [Message("user", "a")]),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            [Message("user", "ab")],
        ),
        ({"role": "user", "content": []}, [Message("user", "")]),
        ({"role": "assistant", "content": None, "refusal": "no"}, [Message("assistant", "")]),
        ({"role": "assistant", "content": None, "tool_calls": []}, [Message("assistant", "")]),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, [SENT]),
        ({"role": "assistant", "content": "", "tool_calls": [CALL | {"index": 0}]}, [SENT]),
        ({"role": "assistant", "content": "So:", "tool_calls": [CALL]}, [Message("assistant", "So:"), SENT]),
        ({"role": "developer", "content": "a", "name": "x"}, [Message("developer", "a")]),
        ({"role": "tool", "content": "42", "tool_call_id": "c"}, [ToolMessage("tool", "42", "c", "")]),
        ({"role": "tool", "content": [{"type": "text", "text": "42"}]}, [Message("tool", "42")]),
    ],
)
def test_a_message_is_read(sent: dict[str, Any], read: list[Message]) -> None:
    assert list(chat(messages=[sent, *ASK["messages"]]).conversation()) == [*read, Message("user", "Hello")]


TOOL = {"type": "function", "function": {"name": "send", "description": "Sends mail.", "strict": True}, "cache": 1}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}


def test_definitions_are_read_before_the_messages_and_go_to_the_engine_as_they_were_read() -> None:
    asked = chat(tools=[TOOL], tool_choice="required", parallel_tool_calls=False, response_format=SCHEMA)
    tool, shape, _ = asked.conversation()
    assert tool == ToolMessage("system", '{"name":"send","description":"Sends mail.","strict":true}', "", "send")
    assert isinstance(tool, ToolMessage) and isinstance(shape, ToolMessage)
    changed = replace(tool, content=tool.content.replace("mail", "[X]"))
    assert asked.sampling([changed, shape]) == {
        "tools": [{"type": "function", "function": {"name": "send", "description": "Sends [X].", "strict": True}}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "response_format": SCHEMA,
    }
    assert asked.sampling() == {}
    with pytest.raises(ApiError) as caught:
        asked.sampling([replace(tool, content="[X]")])
    assert (caught.value.status, caught.value.param) == (400, "tools")


def test_what_an_engine_cannot_do_is_named_or_refused() -> None:
    cannot = {"tools", "tool_choice", "parallel_tool_calls", "reasoning_effort", "response_format", "seed"}
    asked = chat(tools=[TOOL], tool_choice="auto", reasoning_effort="low", seed=1, response_format={"type": "text"})
    assert asked.ignored(cannot) == ["seed", "response_format", "tools", "tool_choice", "reasoning_effort"]
    asked.check(cannot)
    assert asked.conversation(cannot) == (Message("user", "Hello"),)
    named = {"type": "function", "function": {"name": "send"}}
    for more, param in (
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": named}, "tool_choice"),
        ({"response_format": SCHEMA}, "response_format"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ):
        chat(**more).check(())
        with pytest.raises(ApiError) as caught:
            chat(**more).check(cannot)
        assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("more", "offered"),
    [({}, set()), ({"tools": [TOOL]}, {"send"}), ({"tools": [TOOL], "tool_choice": "none"}, set())],
)
def test_only_tools_that_may_be_called_are_offered(more: dict[str, Any], offered: set[str]) -> None:
    assert chat(**more).offered == offered


def test_only_what_was_sent_goes_to_the_engine() -> None:
    assert chat().sampling() == {}
    assert chat(max_tokens=5).sampling() == {"max_tokens": 5}
    assert chat(max_tokens=5, max_completion_tokens=3).sampling() == {"max_tokens": 3}
    assert chat(temperature=0, seed=0, stop="x").sampling() == {"temperature": 0, "seed": 0, "stop": "x"}
    assert chat(user="u", metadata={"a": "b"}, store=False, n=1).sampling() == {}
    assert chat(reasoning_effort="low", response_format={"type": "text"}).sampling() == {"reasoning_effort": "low"}
    assert chat(tools=[], tool_choice="auto", parallel_tool_calls=True).sampling() == {}


def test_what_has_no_effect_is_named() -> None:
    assert chat().ignored() == chat(tools=[TOOL]).ignored() == []
    names = ["store", "service_tier", "prompt_cache_key"]
    assert chat(store=True, service_tier="auto", prompt_cache_key="k").ignored() == names


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (ASK | {"modle": "x"}, "modle", "Did you mean 'model'?"),
        (ASK | {"max_token": 3}, "max_token", "Did you mean 'max_tokens'?"),
        (ASK | {"functions": []}, "functions", "Unrecognized request argument: 'functions'."),
        (ASK | {"stop": 1}, "stop", "should be a valid string"),
        (ASK | {"stream_options": {"include_usage": "x"}}, "stream_options.include_usage", "valid boolean"),
        (ASK | {"messages": [{"role": "user"}]}, "messages[0]", "a message of role 'user' needs content"),
        ({"model": "m"}, "messages", "Missing required parameter: 'messages'."),
    ],
)
def test_a_mistake_has_its_place_and_its_remedy(body: dict[str, Any], param: str, message: str) -> None:
    told = problem(ChatRequest, body)
    assert told[0] == param and message in told[1]


@pytest.mark.parametrize("rating", ["up", "down", -1, 0, 1, 0.5])
def test_a_rating_is_a_thumb_or_a_number(rating: Any) -> None:
    assert parse(FeedbackRequest, json.dumps({"target": "t", "rating": rating}).encode()).rating == rating


@pytest.mark.parametrize("rating", ["left", -1.01, 2, True, [], {}])
def test_another_rating_is_refused(rating: Any) -> None:
    assert problem(FeedbackRequest, {"target": "t", "rating": rating})[0] == "rating"


def test_feedback_says_something() -> None:
    assert "say at least one of" in problem(FeedbackRequest, {"target": "t"})[1]
    assert "say at least one of" in problem(FeedbackRequest, {"target": "t", "rating": None})[1]


def test_an_operator_says_who_it_is() -> None:
    assert problem(TicketAnswer, {"answer": "x"})[0] == "by"
    assert problem(TicketAnswer, {"answer": "  ", "by": "d"})[0] == "answer"
    assert problem(PolicyUpload, {"source": "x", "by": " "})[0] == "by"
    assert problem(PolicyUpload, {"source": "", "by": "d"})[0] == "source"
