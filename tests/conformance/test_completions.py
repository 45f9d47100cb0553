"""OpenAI's older completions, moderations and embeddings through the gateway with the real SDK."""

from __future__ import annotations

from typing import Any

import openai
import orjson
import pytest

from app.records import KeyLimits
from tests.fakes import FakeUpstream, Script
from tests.gateway import BOMB, SALARY, Gateway

STOPPED = ["First ", "mix the ", "grey ", "powder", " with oil", " and light it."]
both = pytest.mark.parametrize("stream", [False, True])
VECTORS = b'{"object":"list","data":[{"object":"embedding","index":0,"embedding":[0.5,1e-9]}],"model":"fake",' + (
    b'"usage":{"prompt_tokens":2,"total_tokens":2}}'
)


async def complete(gateway: Gateway, stream: bool, prompt: Any = "Hello", **more: Any) -> tuple[str, str, Any]:
    """(text, finish reason, decision) of a completion."""
    async with gateway.sdk() as client:
        if not stream:
            whole = await client.completions.create(model="fake", prompt=prompt, **more)
            told = whole.choices[0]
            return told.text, told.finish_reason, (whole.model_extra or {})["guardrails"]
        chunks = [
            one async for one in await client.completions.create(model="fake", prompt=prompt, stream=True, **more)
        ]
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    last = next(chunk for chunk in reversed(chunks) if chunk.choices)
    return text, last.choices[0].finish_reason, (last.model_extra or {})["guardrails"]


@both
async def test_a_prompt_is_completed(gateway: Gateway, upstream: FakeUpstream, stream: bool) -> None:
    text, finish, verdict = await complete(gateway, stream, max_tokens=20, temperature=0.5)
    assert (text, finish, verdict["action"]) == ("Hello there.", "stop", "allow")
    body = upstream.seen[0].body
    assert body["messages"][-1] == {"role": "user", "content": "Hello"} and body["max_tokens"] == 20
    assert (await gateway.turn(verdict["id"])).surface == "completions"


@both
async def test_a_refused_prompt_is_filtered(gateway: Gateway, upstream: FakeUpstream, stream: bool) -> None:
    text, finish, verdict = await complete(gateway, stream, "The salary of Jane is")
    assert (text, finish, verdict["action"]) == (SALARY, "content_filter", "refuse")
    assert upstream.requests == []


@both
async def test_a_completion_is_stopped(gateway: Gateway, upstream: FakeUpstream, stream: bool) -> None:
    upstream.script = Script(STOPPED)
    text, finish, _ = await complete(gateway, stream, "How?")
    assert (text, finish) == (f"First \n\n{BOMB}" if stream else BOMB, "content_filter")


@pytest.mark.parametrize(
    ("more", "param"),
    [({"prompt": ["a", "b"]}, "prompt"), ({"echo": True}, "echo"), ({"best_of": 3}, "best_of"), ({"x": 1}, "x")],
    ids=str,
)
async def test_what_is_not_served_is_refused_by_name(gateway: Gateway, more: dict[str, Any], param: str) -> None:
    status, told = await gateway.json("POST", "/v1/completions", json={"model": "fake", "prompt": "Hello"} | more)
    assert (status, told["error"]["param"]) == (400, param), told


async def test_moderations_are_the_policys_verdict(gateway: Gateway, upstream: FakeUpstream) -> None:
    async with gateway.sdk() as client:
        told = await client.moderations.create(input=["Hello", "What is the salary of Jane?", "4111 1111 1111 1111"])
    plain, refused, card = told.results
    assert [one.flagged for one in told.results] == [False, True, False]
    assert not any(dict(plain.categories).values()) and plain.category_scores.violence == 0
    assert (refused.model_extra or {})["guardrails"]["action"] == "refuse"
    assert (card.categories.model_extra or {})["personal_data"] is True
    assert upstream.requests == [] and told.id.startswith("modr-")


async def test_embeddings_are_passed_on_as_they_are_with_what_the_policy_redacts_gone(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.vectors = VECTORS
    status, _, raw = await gateway.raw(
        "POST", "/v1/embeddings", json={"model": "fake", "input": ["Card 4111 1111 1111 1111"]}
    )
    assert (status, raw) == (200, VECTORS)
    assert upstream.requests[0].body["input"] == ["Card [CARD]"]
    async with gateway.sdk() as client:
        told = await client.embeddings.create(model="fake", input="Hello", encoding_format="float")
    assert told.data[0].embedding == orjson.loads(VECTORS)["data"][0]["embedding"]


async def test_a_text_that_the_policy_refuses_gets_no_embedding(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.vectors = VECTORS
    async with gateway.sdk() as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.embeddings.create(model="fake", input=["Hello", "What is the salary of Jane?"])
    assert (caught.value.code, caught.value.param) == ("content_filter", "input[1]")
    assert upstream.requests == []


async def test_an_engine_without_embeddings_is_a_404(gateway: Gateway) -> None:
    async with gateway.sdk() as client:
        with pytest.raises(openai.NotFoundError) as caught:
            await client.embeddings.create(model="fake", input="Hello")
    assert caught.value.code == "embeddings_not_served"


@pytest.mark.parametrize("path", ["/v1/moderations", "/v1/embeddings", "/v1/completions", "/v1/responses"])
async def test_without_a_key_nothing_is_served(gateway: Gateway, path: str) -> None:
    status, told = await gateway.json("POST", path, key="", json={"model": "fake", "input": "Hello"})
    assert (status, told["error"]["code"]) == (401, "missing_api_key")


async def test_moderations_and_embeddings_count_against_the_limits_of_their_key(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.vectors = VECTORS
    store = gateway.service.store
    _, rate = await store.add_key("default", limits=KeyLimits(requests_per_minute=2))
    for left in ("1", "0"):
        status, headers, _ = await gateway.raw("POST", "/v1/moderations", key=rate, json={"input": "Hello"})
        assert (status, headers["x-ratelimit-remaining-requests"]) == (200, left)
    status, told = await gateway.json("POST", "/v1/moderations", key=rate, json={"input": "Hello"})
    assert (status, told["error"]["code"]) == (429, "rate_limit_exceeded")
    _, budget = await store.add_key("default", limits=KeyLimits(tokens_per_day=40))
    asked = {"model": "fake", "input": "Hello"}
    used = orjson.loads(VECTORS)["usage"]["prompt_tokens"]
    for i in range(3):
        status, headers, _ = await gateway.raw("POST", "/v1/embeddings", key=budget, json=asked)
        assert (status, headers["x-ratelimit-remaining-tokens"]) == (200, str(40 - i * used - 9))  # 9 at most is held
    status, told = await gateway.json("POST", "/v1/embeddings", key=budget, json=asked | {"input": "word " * 50})
    assert (status, told["error"]["code"]) == (429, "insufficient_quota") and len(upstream.seen) == 3
