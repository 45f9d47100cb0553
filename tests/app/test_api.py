"""The routes with everything that is wrong about a request: always OpenAI's error body, never a 500."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, get_args

import openai
import pytest
import pytest_asyncio
from fastapi.routing import APIRoute
from pydantic import BaseModel

from app import admin, api, embeddings, moderations, openapi
from app.admin import create_admin_app
from app.embeddings import EmbeddingRequest
from app.frames import Fault
from app.main import SURFACES, create_app
from app.metrics import Metrics
from app.moderations import ModerationRequest
from app.schemas import ChatRequest, FeedbackRequest, PolicyChoice, PolicyUpload, TicketAnswer
from app.surfaces.completions import CompletionRequest
from app.surfaces.messages import MessageRequest
from app.surfaces.responses import ResponseRequest
from tests.fakes import FakeUpstream
from tests.gateway import Gateway, running, settings

Message = dict[str, Any]
USER: Message = {"role": "user", "content": "Hello"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    """One gateway for all bad requests: a good one must work after each of them."""
    home = tmp_path_factory.mktemp("bad-input")
    async with FakeUpstream() as upstream, running(home, upstream, body_limit=65_536) as gateway:
        yield gateway


pytestmark = pytest.mark.asyncio(loop_scope="module")


def chat(*messages: Any, **more: Any) -> bytes:
    return json.dumps({"model": "fake", "messages": list(messages)} | more).encode()


def said(call: Message) -> Message:
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def deep(levels: int) -> bytes:
    return b'{"model": "fake", "messages": ' + b"[" * levels + b"]" * levels + b"}"


IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
INVALID_JSON = (400, "invalid_json", None)
LAST = "messages"

BAD: dict[str, tuple[bytes, int, str, str | None]] = {
    "nothing": (b"", *INVALID_JSON),
    "no JSON": (b"{model: fake}", *INVALID_JSON),
    "cut off": (chat(USER)[:-3], *INVALID_JSON),
    "a list": (b"[]", *INVALID_JSON),
    "a string": (b'"hello"', *INVALID_JSON),
    "null": (b"null", *INVALID_JSON),
    "invalid UTF-8": (b'{"model": "fake", "messages": [{"role": "user", "content": "\xff\xfe"}]}', *INVALID_JSON),
    "UTF-16": (chat(USER).decode().encode("utf-16"), *INVALID_JSON),
    "a lone surrogate": (b'{"model": "fake", "messages": [{"role": "user", "content": "\\ud800"}]}', *INVALID_JSON),
    "NaN": (b'{"model": "fake", "messages": [], "temperature": NaN}', *INVALID_JSON),
    "infinity": (b'{"model": "fake", "messages": [], "temperature": 1e999}', *INVALID_JSON),
    "huge nesting": (deep(20_000), *INVALID_JSON),
    "deep nesting": (deep(500), 400, "invalid_value", "messages[0]"),
    "no model": (json.dumps({"messages": [USER]}).encode(), 400, "missing_required_parameter", "model"),
    "an unknown model": (chat(USER, model="gpt-4o"), 404, "model_not_found", "model"),
    "an empty model": (chat(USER, model=""), 404, "model_not_found", "model"),
    "a model that is a number": (chat(USER, model=4), 400, "invalid_value", "model"),
    "no messages": (b'{"model": "fake"}', 400, "missing_required_parameter", "messages"),
    "empty messages": (chat(), 400, "invalid_value", "messages"),
    "messages that are no list": (chat(messages="Hello"), 400, "invalid_value", "messages"),
    "messages that are null": (chat(messages=None), 400, "invalid_value", "messages"),
    "too many messages": (chat(*[USER] * 1001), 400, "invalid_value", "messages"),
    "a message that is a string": (chat("Hello"), 400, "invalid_value", "messages[0]"),
    "a message without a role": (chat({"content": "x"}), 400, "missing_required_parameter", "messages[0].role"),
    "an unknown role": (chat({"role": "root", "content": "x"}), 400, "invalid_value", "messages[0].role"),
    "a function's role": (chat({"role": "function", "content": "x"}), 400, "invalid_value", "messages[0].role"),
    "no content": (chat({"role": "user"}), 400, "invalid_value", "messages[0]"),
    "null content": (chat({"role": "user", "content": None}), 400, "invalid_value", "messages[0]"),
    "content that is a number": (chat({"role": "user", "content": 3}), 400, "invalid_value", "messages[0].content"),
    "an image": (chat(IMAGE), 400, "invalid_value", "messages[0].content"),
    "a part without text": (
        chat(USER, {"role": "user", "content": [{"type": "text"}]}),
        400,
        "invalid_value",
        "messages[1].content",
    ),
    "the assistant last": (chat(USER, {"role": "assistant", "content": "Hi"}), 400, "invalid_value", LAST),
    "the system last": (chat({"role": "system", "content": "Be kind."}), 400, "invalid_value", LAST),
    "a user that calls a tool": (chat(USER | {"tool_calls": [CALL]}), 400, "invalid_value", "messages[0]"),
    "a call without an id": (
        chat(said(CALL | {"id": ""}), USER),
        400,
        "invalid_value",
        "messages[0].tool_calls[0].id",
    ),
    "a call of no function": (
        chat(said({"id": "c", "type": "function"}), USER),
        400,
        "missing_required_parameter",
        "messages[0].tool_calls[0].function",
    ),
    "a sentence as a tool's name": (
        chat(said(CALL | {"function": {"name": "tell me all", "arguments": "{}"}}), USER),
        400,
        "invalid_value",
        "messages[0].tool_calls[0].function.name",
    ),
    "arguments that are an object": (
        chat(said(CALL | {"function": {"name": "f", "arguments": {}}}), USER),
        400,
        "invalid_value",
        "messages[0].tool_calls[0].function.arguments",
    ),
    "negative temperature": (chat(USER, temperature=-0.1), 400, "invalid_value", "temperature"),
    "hot temperature": (chat(USER, temperature=2.1), 400, "invalid_value", "temperature"),
    "temperature in words": (chat(USER, temperature="hot"), 400, "invalid_value", "temperature"),
    "temperature as a string": (chat(USER, temperature="0.5"), 400, "invalid_value", "temperature"),
    "top_p of nothing": (chat(USER, top_p=0), 400, "invalid_value", "top_p"),
    "no tokens": (chat(USER, max_tokens=0), 400, "invalid_value", "max_tokens"),
    "half a token": (chat(USER, max_tokens=1.5), 400, "invalid_value", "max_tokens"),
    "endless tokens": (chat(USER, max_completion_tokens=10**30), 400, "invalid_value", "max_completion_tokens"),
    "a seed beyond 64 bits": (chat(USER, seed=2**63), 400, "invalid_value", "seed"),
    "stream as a string": (chat(USER, stream="yes"), 400, "invalid_value", "stream"),
    "stream as a number": (chat(USER, stream=1), 400, "invalid_value", "stream"),
    "no reply": (chat(USER, n=0), 400, "invalid_value", "n"),
    "many replies": (chat(USER, n=17), 400, "invalid_value", "n"),
    "alternatives without log-probabilities": (chat(USER, top_logprobs=3), 400, "invalid_value", "top_logprobs"),
    "a format that is not known": (
        chat(USER, response_format={"type": "xml"}),
        400,
        "invalid_value",
        "response_format",
    ),
    "a schema without a schema": (
        chat(USER, response_format={"type": "json_schema"}),
        400,
        "invalid_value",
        "response_format",
    ),
    "a forced tool and none there": (chat(USER, tool_choice="required"), 400, "invalid_value", "tool_choice"),
    "a choice that is not there": (
        chat(USER, tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}),
        400,
        "invalid_value",
        "tool_choice",
    ),
    "a choice in other words": (chat(USER, tools=[TOOL], tool_choice="any"), 400, "invalid_value", "tool_choice"),
    "a tool twice": (chat(USER, tools=[TOOL, TOOL]), 400, "invalid_value", "tools"),
    "a tool without a function": (
        chat(USER, tools=[{"type": "function"}]),
        400,
        "missing_required_parameter",
        "tools[0].function",
    ),
    "a tool of another kind": (chat(USER, tools=[TOOL | {"type": "custom"}]), 400, "invalid_value", "tools[0].type"),
    "too many tools": (chat(USER, tools=[TOOL] * 129), 400, "invalid_value", "tools"),
    "an effort that is a number": (chat(USER, reasoning_effort=3), 400, "invalid_value", "reasoning_effort"),
    "five stops": (chat(USER, stop=list("abcde")), 400, "invalid_value", "stop"),
    "a misspelt parameter": (chat(USER, temprature=1), 400, "unknown_parameter", "temprature"),
    "an unknown parameter": (chat(USER, frobnicate=1), 400, "unknown_parameter", "frobnicate"),
    "a parameter with a strange name": (chat(USER, **{"a b\n": 1}), 400, "unknown_parameter", "a b\n"),
    "metadata that is a list": (chat(USER, metadata=[]), 400, "invalid_value", "metadata"),
    "metadata of numbers": (chat(USER, metadata={"a": 1}), 400, "invalid_value", "metadata.a"),
    "a very long conversation": (
        chat(USER, metadata={"conversation_id": "x" * 129}),
        400,
        "invalid_value",
        "metadata.conversation_id",
    ),
    "a conversation that breaks the line": (
        chat(USER, metadata={"conversation_id": "x\r\nSet-Cookie: a=b"}),
        400,
        "invalid_value",
        "metadata.conversation_id",
    ),
    "a conversation in another alphabet": (
        chat(USER, metadata={"conversation_id": "Gespräch"}),
        400,
        "invalid_value",
        "metadata.conversation_id",
    ),
    "too large": (chat({"role": "user", "content": "x" * 70_000}), 413, "request_too_large", None),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_request_is_refused_with_openais_error(gateway: Gateway, name: str) -> None:
    body, status, code, param = BAD[name]
    before = len(gateway.upstream.requests)
    got, told = await gateway.json("POST", "/v1/chat/completions", data=body)
    error = told["error"]
    assert (got, error["code"], error["param"]) == (status, code, param), error["message"]
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith((".", "?")) and ".." not in error["message"]
    assert len(gateway.upstream.requests) == before


async def test_a_misspelt_parameter_comes_with_a_suggestion(gateway: Gateway) -> None:
    _, told = await gateway.json("POST", "/v1/chat/completions", data=chat(USER, temprature=1))
    assert told["error"]["message"] == "Unrecognized request argument: 'temprature'. Did you mean 'temperature'?"


async def test_a_mistake_is_not_answered_with_what_was_written(gateway: Gateway) -> None:
    body = chat({"role": "user", "content": ["Geheimnis"]}, {"role": "Geheimnis", "content": "Geheimnis"})
    _, _, raw = await gateway.raw("POST", "/v1/chat/completions", data=body)
    assert b"Geheimnis" not in raw


GOOD: dict[str, tuple[bytes, str]] = {
    "null bytes": (chat({"role": "user", "content": "a\x00b"}), "a\x00b"),
    "an emoji in escapes": (b'{"model":"fake","messages":[{"role":"user","content":"\\ud83d\\ude00"}]}', "😀"),
    "an empty text": (chat({"role": "user", "content": ""}), ""),
    "all that SDKs send back": (
        chat({"role": "assistant", "content": None, "refusal": None, "annotations": []}, USER),
        "Hello",
    ),
    "the limits": (chat(USER, temperature=0, top_p=1, max_tokens=1, seed=-(2**63), n=1, stop=[]), "Hello"),
    "nulls": (chat(USER, temperature=None, stream=None, tools=None, metadata=None, stop=None), "Hello"),
    "a byte less than too large": (
        chat({"role": "user", "content": "x" * (65_536 - len(chat({"role": "user", "content": ""})))}),
        "x" * (65_536 - len(chat({"role": "user", "content": ""}))),
    ),
}


@pytest.mark.parametrize("name", GOOD)
async def test_a_near_miss_is_served(gateway: Gateway, name: str) -> None:
    body, asked = GOOD[name]
    status, told = await gateway.json("POST", "/v1/chat/completions", data=body)
    assert status == 200, told
    assert gateway.upstream.seen[-1].body["messages"][-1] == {"role": "user", "content": asked}
    assert (await gateway.turn(told["id"])).asked == asked.replace("\x00", "\ufffd")


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_that_is_too_large_is_refused_before_it_is_read(gateway: Gateway, declared: bool) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.base.rpartition(":")[2]))
    length = b"Content-Length: 10000000000" if declared else b"Transfer-Encoding: chunked"
    head = f"Host: x\r\nAuthorization: Bearer {gateway.key}\r\n".encode()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\n" + head + length + b"\r\n\r\n")
    if not declared:
        for _ in range(2):
            writer.write(b"9000\r\n" + b"x" * 0x9000 + b"\r\n")
    answer = await asyncio.wait_for(reader.readuntil(b"}}"), 5)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 413") and b'"code":"request_too_large"' in answer


@pytest.mark.parametrize(
    ("authorization", "code"),
    [
        (None, "missing_api_key"),
        ("", "missing_api_key"),
        ("Bearer", "missing_api_key"),
        ("Bearer ", "missing_api_key"),
        ("Basic bmsteDo=", "missing_api_key"),
        ("Bearer nk-wrong", "invalid_api_key"),
        ("Bearer " + "x" * 5000, "invalid_api_key"),
        ("Bearer \u00e9\u00ff", "invalid_api_key"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/feedback", "/v1/models", "/admin/tickets"])
async def test_without_a_good_key_nothing_is_served(
    gateway: Gateway, authorization: str | None, code: str, path: str
) -> None:
    method = "GET" if path in ("/v1/models", "/admin/tickets") else "POST"
    headers = {} if authorization is None else {"authorization": authorization}
    status, got, raw = await gateway.raw(method, path, key="", headers=headers, data=chat(USER))
    error = json.loads(raw)["error"]
    assert (status, error["code"], error["type"]) == (401, code, "invalid_request_error")
    assert got["www-authenticate"] == "Bearer"


async def test_routes_and_methods_that_are_not_there(gateway: Gateway) -> None:
    for method, path, status, code in [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/tickets/ESC-NOTTHERE", 404, "ticket_not_found"),
        ("GET", "/v1/tickets/%00%ff", 404, "ticket_not_found"),
    ]:
        got, headers, raw = await gateway.raw(method, path)
        error = json.loads(raw)["error"]
        assert (got, error["code"], error["type"]) == (status, code, "invalid_request_error"), path
        assert headers["x-request-id"]
        assert ("allow" in headers) == (status == 405)


SDK: list[tuple[dict[str, Any], type[openai.APIStatusError]]] = [
    ({"temperature": -1}, openai.BadRequestError),
    ({"n": 0}, openai.BadRequestError),
    ({"model": "gpt-4o"}, openai.NotFoundError),
    ({"messages": []}, openai.BadRequestError),
    ({"messages": [{"role": "user", "content": "x" * 70_000}]}, openai.APIStatusError),
]


@pytest.mark.parametrize(("change", "kind"), SDK)
async def test_the_sdk_raises_its_own_class(
    gateway: Gateway, change: dict[str, Any], kind: type[openai.APIStatusError]
) -> None:
    async with gateway.sdk() as client:
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(**({"model": "fake", "messages": [USER]} | change))
    assert caught.value.type == "invalid_request_error" and caught.value.code
    assert caught.value.request_id


async def test_the_sdk_raises_its_own_class_for_keys(gateway: Gateway) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        await gateway.ask("Hello", key="nk-wrong")
    assert caught.value.code == "invalid_api_key"


async def test_a_fault_of_ours_is_a_500_in_openais_form_and_tells_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FakeUpstream() as upstream, running(tmp_path, upstream) as gateway:

        def broken(*args: object) -> None:
            raise RuntimeError("Geheimnis")

        for part in ("app.chat.judged", "guardrails.engine.Guard.feed", "app.exchange.answered"):
            with monkeypatch.context() as patch:
                patch.setattr(part, broken)
                status, headers, raw = await gateway.raw("POST", "/v1/chat/completions", data=chat(USER))
            error = json.loads(raw)["error"]
            assert (status, error["type"], error["code"]) == (500, "server_error", "internal_error"), part
            assert headers["x-request-id"] and b"Geheimnis" not in raw
        assert (await gateway.ask("Hello")).choices[0].message.content == "Hello there."


DOCS = Path(__file__).parents[2] / "docs"


async def test_every_route_is_on_the_page_of_the_api_and_no_other(tmp_path: Path) -> None:
    public = create_app(settings(tmp_path, "http://127.0.0.1:9/v1"))
    own = (*public.routes, *create_admin_app(public, Metrics()).routes)  # which hold no routes of routers
    included = (one for router in (api, moderations, embeddings, openapi, admin) for one in router.router.routes)
    routes = {
        f"{method} {route.path.replace(':path', '')}"
        for route in (*own, *included)
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }
    routes |= {f"POST {path}" for path in SURFACES}
    assert len(routes) >= 20
    assert set(re.findall(r"^\| `((?:GET|POST) /[^`]*)`", (DOCS / "api.md").read_text(), re.MULTILINE)) == routes


BODIES: tuple[type[BaseModel], ...] = (
    *(ChatRequest, CompletionRequest, ResponseRequest, MessageRequest, ModerationRequest, EmbeddingRequest),
    *(FeedbackRequest, TicketAnswer, PolicyUpload, PolicyChoice),
)


async def test_every_parameter_is_on_the_page_of_the_api() -> None:
    page = (DOCS / "api.md").read_text()
    for model in BODIES:
        names = [name for name in model.model_fields if not re.search(rf"[`\"]{name}\b", page)]
        assert names == [], model.__name__


async def test_every_error_is_on_the_page_of_the_api() -> None:
    source = "".join(path.read_text() for path in (Path(__file__).parents[2] / "app").rglob("*.py"))
    codes = set(re.findall(r'code="(\w+)"', source)) | set(re.findall(r'unavailable\([^()]*?"(\w+)", \w+', source))
    codes |= {f"engine_{fault}" for fault in get_args(Fault)} - {"engine_rejected"}
    page = (DOCS / "api.md").read_text()
    assert {"store_down", "invalid_value", "engine_not_ready", "insufficient_quota"} <= codes
    assert [code for code in sorted(codes - {"http_error", "client_gone"}) if f"`{code}`" not in page] == []
