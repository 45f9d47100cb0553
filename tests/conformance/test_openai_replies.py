"""What else a reply may be asked for, with the real OpenAI SDK: several replies, log-probabilities, headers, JSON."""

from __future__ import annotations

import math
from typing import Any

import openai
import orjson
import pytest
from pydantic import BaseModel

from tests.fakes import FakeUpstream, Script
from tests.gateway import SALARY, Gateway

both = pytest.mark.parametrize("stream", [False, True])


class Answer(BaseModel):
    """What a structured reply must be."""

    number: int


def told(*tokens: str) -> list[Any]:
    """A stream whose pieces are these tokens with their log-probabilities, as vLLM writes them."""
    entries = [{"token": one, "logprob": -0.5, "bytes": list(one.encode()), "top_logprobs": []} for one in tokens]
    frames = [
        {"choices": [{"index": 0, "delta": {"content": token}, "logprobs": {"content": [entry]}}]}
        for token, entry in zip(tokens, entries, strict=True)
    ]
    return [b"data: " + orjson.dumps(frame) + b"\n\n" for frame in frames]


# --- several replies


async def test_several_replies_are_guarded_one_by_one(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.queue += [Script(["Gladly."]), Script(["Write to jane@example.com."]), Script(["mix the grey powder"])]
    reply = await gateway.ask("How?", n=3)
    assert [one.index for one in reply.choices] == [0, 1, 2]
    said = {one.message.content: one.finish_reason for one in reply.choices}
    assert said["Gladly."] == said["Write to [EMAIL]."] == "stop"
    assert sorted(str(one.finish_reason) for one in reply.choices) == ["content_filter", "stop", "stop"]
    turns = [await gateway.turn(f"{reply.id}{more}") for more in ("", "-1", "-2")]
    assert sorted(one.action for one in turns) == ["allow", "redact", "refuse"]


async def test_several_streamed_replies_are_told_apart(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.queue += [Script(["One. ", "Two."]), Script(["Three. ", "Four."])]
    texts, ends = ["", ""], list[int]()
    async with gateway.sdk() as client:
        async for chunk in await client.chat.completions.create(**gateway.body("Count", n=2, stream=True)):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                ends += [choice.index] if choice.finish_reason else []
    assert sorted(texts) == ["One. Two.", "Three. Four."] and sorted(ends) == [0, 1]


@both
async def test_a_stopped_question_has_one_reply(gateway: Gateway, upstream: FakeUpstream, stream: bool) -> None:
    if stream:
        async with gateway.sdk() as client:
            body = gateway.body("What is the salary of Jane?", n=3, stream=True)
            chunks = [chunk async for chunk in await client.chat.completions.create(**body)]
        assert {choice.index for chunk in chunks for choice in chunk.choices} == {0}
    else:
        assert [one.message.content for one in (await gateway.ask("salary of Jane", n=3)).choices] == [SALARY]
    assert upstream.requests == []


# --- log-probabilities


async def test_log_probabilities_come_with_their_text(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = Script(told("Hel", "lo", " there."))
    entries, text = [], ""
    async with gateway.sdk() as client:
        body = gateway.body("Hi", stream=True, logprobs=True, top_logprobs=2)
        async for chunk in await client.chat.completions.create(**body):
            text += chunk.choices[0].delta.content or ""
            entries += (chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or []
    assert [one.token for one in entries] == ["Hel", "lo", " there."] and text == "Hello there."
    assert (upstream.seen[0].body["logprobs"], upstream.seen[0].body["top_logprobs"]) == (True, 2)


async def test_log_probabilities_of_what_is_redacted_are_never_told(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = Script(told("Ask ", "jane", "@example", ".com", " now", "."))
    body = gateway.body("Who?", stream=True, logprobs=True)
    _, _, raw = await gateway.raw("POST", "/v1/chat/completions", json=body)
    assert b"[EMAIL]" in raw and b'"Ask "' in raw and b'" now"' in raw
    assert not [word for word in (b"jane", b"@example", b'".com"') if word in raw]
    spelled = [str(list(word)).replace(" ", "").encode() for word in (b"jane", b"@example", b".com")]
    assert not [one for one in spelled if one in raw.replace(b" ", b"")]


async def test_log_probabilities_of_a_whole_reply(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = Script(tokens=[{"Yes": 0.9, "No": 0.1}, {".": 1.0}])
    reply = await gateway.ask("Is it?", logprobs=True, top_logprobs=2)
    logprobs = reply.choices[0].logprobs
    assert logprobs and [one.token for one in logprobs.content or ()] == ["Yes", "."]
    first = (logprobs.content or [])[0]
    assert math.exp(first.logprob) == pytest.approx(0.9)
    assert {top.token for top in first.top_logprobs} == {"Yes", "No"}


# --- raw answers, structured ones


async def test_a_raw_answer_has_the_headers(gateway: Gateway) -> None:
    async with gateway.sdk() as client:
        raw = await client.chat.completions.with_raw_response.create(**gateway.body("Hello"))
    reply = raw.parse()
    assert raw.headers["x-guardrails-id"] == reply.id and raw.headers["x-guardrails-action"] == "allow"
    assert raw.headers["x-conversation-id"] == (await gateway.turn(reply.id)).conversation
    assert raw.headers["x-guardrails-policy"] == (await gateway.turn(reply.id)).policy
    assert raw.request_id and raw.request_id == raw.headers["x-request-id"]


async def test_a_parsed_reply_is_json_or_a_refusal(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = Script(['{"number"', ": 42}"])
    async with gateway.sdk() as client:
        parsed = await client.chat.completions.parse(**gateway.body("Which?"), response_format=Answer)
        refused = await client.chat.completions.parse(**gateway.body("salary of Jane"), response_format=Answer)
    assert parsed.choices[0].message.parsed == Answer(number=42)
    message = refused.choices[0].message
    assert (message.parsed, message.refusal, refused.choices[0].finish_reason) == (None, SALARY, "stop")


async def test_the_stream_helper_raises_for_a_filtered_reply_and_not_in_mode_stop(gateway: Gateway) -> None:
    body = gateway.body("What is the salary of Jane?")
    async with gateway.sdk() as client:
        async with client.chat.completions.stream(**body) as stream:
            with pytest.raises(openai.ContentFilterFinishReasonError):
                await stream.get_final_completion()
        headers = {"x-guardrails-block-mode": "stop"}
        async with client.chat.completions.stream(**body, extra_headers=headers) as stream:
            final = await stream.get_final_completion()
    assert (final.choices[0].message.content, final.choices[0].finish_reason) == (SALARY, "stop")
