"""One chat request and its answer: several replies, log-probabilities, engine fields, idempotency, key limits."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import openai
import pytest

from app.records import KeyLimits
from tests.fakes import FakeUpstream, Script
from tests.gateway import BOMB, SALARY, Gateway, running, until

Json = dict[str, Any]


async def key_with(gateway: Gateway, **limits: Any) -> str:
    return (await gateway.service.store.add_key("default", "client", limits=KeyLimits(**limits)))[1]


async def post(gateway: Gateway, *said: str, headers: dict[str, str] | None = None, key: str = "", **more: Any) -> Any:
    body = gateway.body(*said, **more)
    return await gateway.raw("POST", "/v1/chat/completions", json=body, headers=headers, key=key or None)


def frames(raw: bytes) -> list[Json]:
    return [json.loads(line[6:]) for line in raw.splitlines() if line.startswith(b"data: {")]


# --- several replies


async def test_several_replies_are_turns_of_their_own(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.queue.extend([Script(["One."]), Script(["Then mix the grey powder."]), Script(["Three."])])
    reply = await gateway.ask("Hello", n=3, seed=5)
    assert [(one.index, one.message.content, one.finish_reason) for one in sorted_by_index(reply)] == [
        (0, "One.", "stop"),
        (1, BOMB, "content_filter"),
        (2, "Three.", "stop"),
    ]
    assert sorted(seen.body["seed"] for seen in upstream.seen) == [5, 6, 7]
    assert all("n" not in seen.body for seen in upstream.seen)
    turns = [await gateway.turn(f"{reply.id}{end}") for end in ("", "-1", "-2")]
    assert [turn.action for turn in turns] == ["allow", "refuse", "allow"]
    assert reply.usage and reply.usage.prompt_tokens == turns[0].prompt_tokens
    assert reply.usage.completion_tokens == sum(turn.completion_tokens for turn in turns)


def sorted_by_index(reply: Any) -> list[Any]:
    return sorted(reply.choices, key=lambda choice: choice.index)


async def test_several_replies_stream_side_by_side(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.queue.extend([Script(["One", 0.05, " and one."]), Script(["Two", 0.05, " and two."])])
    _, _, raw = await post(gateway, "Hello", n=2, stream=True)
    said, reasons = {0: "", 1: ""}, {}
    for choice in (choice for frame in frames(raw) for choice in frame["choices"]):
        said[choice["index"]] += choice["delta"].get("content", "")
        reasons |= {choice["index"]: choice["finish_reason"]} if choice["finish_reason"] else {}
    assert sorted(said.values()) == ["One and one.", "Two and two."]
    assert reasons == {0: "stop", 1: "stop"} and raw.endswith(b"data: [DONE]\n\n")


async def test_a_question_that_is_stopped_has_one_reply(gateway: Gateway, upstream: FakeUpstream) -> None:
    reply = await gateway.ask("What is the salary of Jane?", n=3)
    assert [choice.message.content for choice in reply.choices] == [SALARY] and not upstream.seen


async def test_one_reply_that_fails_fails_all_and_leaves_none_running(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.queue.extend([Script(["One"], end="hang"), Script(status=400, message="bad")])
    with pytest.raises(openai.BadRequestError):
        await gateway.ask("Hello", n=2)
    assert (await upstream.seen[0].finished(1.0)).over.is_set()


# --- log-probabilities


def token(text: str, logprob: str = "-0.10") -> str:
    return f'{{"token":{json.dumps(text)},"logprob":{logprob},"bytes":null,"top_logprobs":[]}}'


def piece(*tokens: str) -> bytes:
    entries = ",".join(token(text) for text in tokens)
    delta = json.dumps({"content": "".join(tokens)})
    return f'data: {{"choices":[{{"index":0,"delta":{delta},"logprobs":{{"content":[{entries}]}}}}]}}\n\n'.encode()


def told_tokens(raw: bytes) -> list[str]:
    entries = [choice["logprobs"] for frame in frames(raw) for choice in frame["choices"] if choice["logprobs"]]
    return [one["token"] for entry in entries for one in entry["content"]]


async def test_log_probabilities_come_with_their_text_and_those_of_hidden_text_do_not(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    tokens = ["Write", " to", " jane", "@exam", "ple", ".com", " now", "."]
    upstream.script = Script([piece(one) for one in tokens])
    _, _, raw = await post(gateway, "Hello", stream=True, logprobs=True, top_logprobs=0)
    assert upstream.seen[0].body["logprobs"] is True
    told = told_tokens(raw)
    assert told[0] == "Write" and told[-1] == "." and " now" in told
    assert not any(word in "".join(told) for word in ("jane", "exam", "ple"))
    assert b'"logprob":-0.10,' in raw  # byte by byte


async def test_log_probabilities_of_a_stopped_reply_end_with_what_was_said(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.script = Script([piece("Sure", ". "), piece("Then", " mix", " the"), piece(" grey", " powder", " now")])
    _, _, raw = await post(gateway, "Hello", stream=True, logprobs=True)
    assert not {" mix", " grey", " powder", " now"} & set(told_tokens(raw))


# --- fields of the engine


async def test_fields_that_hold_no_text_pass_byte_by_byte(gateway: Gateway, upstream: FakeUpstream) -> None:
    frame = (
        b'data: {"id":"x","system_fingerprint":"fp_44","speed":1.0E5,"choices":[{"index":0,'
        b'"delta":{"content":"Hi","mood":3},"stop_reason":null}]}\n\n'
    )
    upstream.script = Script([frame])
    _, _, raw = await post(gateway, "Hello", stream=True)
    assert b'"system_fingerprint":"fp_44"' in raw and b'"speed":1.0E5' in raw and b'"mood":3' in raw


@pytest.mark.parametrize("where", ["top", "choice", "delta"])
async def test_text_does_not_pass_in_a_field_of_another_name(
    gateway: Gateway, upstream: FakeUpstream, where: str
) -> None:
    secret: dict[str, Json] = {"top": {}, "choice": {}, "delta": {}}
    secret[where] = {"thinking": "mix the grey powder", "token_ids": [1, 2, 3]}
    choice = {"index": 0, "delta": {"content": "Hi"} | secret["delta"]} | secret["choice"]
    upstream.script = Script([b"data: " + json.dumps({"choices": [choice]} | secret["top"]).encode() + b"\n\n"])
    _, _, raw = await post(gateway, "Hello", stream=True)
    assert b"powder" not in raw and b"token_ids" not in raw and b"Hi" in raw


async def test_a_token_does_not_pass_in_a_field_of_a_delta(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = Script([{"content": "Hi", "thinking": "powder"}])
    _, _, raw = await post(gateway, "Hello", stream=True)
    assert b"powder" not in raw


# --- how a refusal is told


async def test_a_refusal_is_told_as_the_client_wants_it(gateway: Gateway) -> None:
    async def asked(mode: str, **more: Any) -> Any:
        return await post(gateway, "What is the salary of Jane?", headers={"x-guardrails-block-mode": mode}, **more)

    for mode, reason, content, refusal in [
        ("message", "content_filter", SALARY, None),
        ("stop", "stop", SALARY, None),
        ("refusal", "stop", None, SALARY),
    ]:
        _, _, raw = await asked(mode)
        choice = json.loads(raw)["choices"][0]
        told = choice["message"]
        assert (choice["finish_reason"], told["content"], told["refusal"]) == (reason, content, refusal)
    for stream in (False, True):
        status, _, raw = await asked("error", stream=stream)
        assert (status, json.loads(raw)["error"]["code"]) == (400, "content_filter")
    status, _, raw = await asked("loud")
    assert (status, json.loads(raw)["error"]["param"]) == (400, "x-guardrails-block-mode")


async def test_a_key_says_how_refusals_are_told(gateway: Gateway) -> None:
    key = await key_with(gateway, block_mode="stop")
    reply = await gateway.ask("What is the salary of Jane?", key=key)
    assert reply.choices[0].finish_reason == "stop"


# --- what a key may ask for


@pytest.mark.parametrize(
    ("limits", "asked", "param"),
    [
        ({"max_n": 1}, {"n": 2}, "n"),
        ({"max_tokens": 10}, {"max_tokens": 11}, "max_tokens"),
        ({"max_tokens": 10}, {"max_completion_tokens": 11}, "max_tokens"),
        ({"max_logprobs": 2}, {"logprobs": True, "top_logprobs": 3}, "top_logprobs"),
        ({}, {"chat_template": "x"}, "chat_template"),
    ],
)
async def test_a_key_that_asks_for_more_than_it_may_is_refused(
    gateway: Gateway, upstream: FakeUpstream, limits: Json, asked: Json, param: str
) -> None:
    key = await key_with(gateway, **limits)
    status, _, raw = await post(gateway, "Hello", key=key, **asked)
    assert (status, json.loads(raw)["error"]["param"]) == (400, param) and not upstream.seen


async def test_a_key_gets_its_own_limit_and_its_own_fields(gateway: Gateway, upstream: FakeUpstream) -> None:
    key = await key_with(gateway, max_tokens=7, allow=("chat_template_kwargs",))
    await post(gateway, "Hello", key=key, chat_template_kwargs={"enable_thinking": False})
    body = upstream.seen[0].body
    assert (body["max_tokens"], body["chat_template_kwargs"]) == (7, {"enable_thinking": False})


async def test_a_rate_is_held_and_told(gateway: Gateway, upstream: FakeUpstream) -> None:
    key = await key_with(gateway, requests_per_minute=2)
    first = await post(gateway, "Hello", key=key)
    assert first[1]["x-ratelimit-limit-requests"] == "2" and first[1]["x-ratelimit-remaining-requests"] == "1"
    answers = await asyncio.gather(*(post(gateway, "Hello", key=key) for _ in range(5)))
    assert sorted(status for status, _, _ in answers) == [200, 429, 429, 429, 429]
    refused = next(headers for status, headers, _ in answers if status == 429)
    assert int(refused["retry-after"]) >= 1 and len(upstream.seen) == 2


async def test_concurrent_requests_do_not_beat_a_budget_of_tokens(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = Script(["word ", 0.1], usage=(10, 90))
    key = await key_with(gateway, tokens_per_day=250)
    answers = await asyncio.gather(*(post(gateway, "Hello", key=key, max_tokens=90) for _ in range(8)))
    assert sorted({status for status, _, _ in answers}) == [200, 429]
    assert sum(status == 200 for status, _, _ in answers) == 2
    _, headers, raw = await post(gateway, "Hello", key=key, max_tokens=90)
    assert json.loads(raw)["error"]["code"] == "insufficient_quota"
    assert headers["x-should-retry"] == "false"


# --- idempotency


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_is_sent_again_gets_the_same_answer(
    gateway: Gateway, upstream: FakeUpstream, stream: bool
) -> None:
    named = {"idempotency-key": "order-1"}
    upstream.script = Script(["Hello ", "there."], usage=(3, 2))
    first = await post(gateway, "Hello", headers=named, stream=stream)
    again = await post(gateway, "Hello", headers=named, stream=stream)
    assert first[0] == again[0] == 200 and len(upstream.seen) == 1
    assert first[1]["x-guardrails-id"] == again[1]["x-guardrails-id"]
    if stream:
        text = [
            "".join(c["delta"].get("content", "") for f in frames(raw[2]) for c in f["choices"])
            for raw in (first, again)
        ]
        assert text == ["Hello there."] * 2
    else:
        assert json.loads(first[2]) == json.loads(again[2])


async def test_requests_with_one_key_at_the_same_time_ask_the_engine_once(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    upstream.script = Script(["Hello", 0.2])
    answers = await asyncio.gather(*(post(gateway, "Hello", headers={"idempotency-key": "once"}) for _ in range(4)))
    assert {status for status, _, _ in answers} == {200} and len(upstream.seen) == 1
    assert len({json.loads(raw)["id"] for _, _, raw in answers}) == 1


async def test_a_key_with_another_body_is_refused_and_one_that_failed_is_free(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    named = {"idempotency-key": "order-2"}
    upstream.queue.append(Script(status=503))
    assert (await post(gateway, "Hello", headers=named))[0] == 503
    assert (await post(gateway, "Hello", headers=named))[0] == 200
    status, _, raw = await post(gateway, "Something else", headers=named)
    assert (status, json.loads(raw)["error"]["code"]) == (422, "idempotency_key_reused")


async def test_an_answer_with_values_of_the_vault_is_told_again_with_them(
    tmp_path: Path, upstream: FakeUpstream
) -> None:
    policy = """
name = "sealed"
persona = "You talk."
[[input]]
name = "mail"
validator = "personal"
kinds = ["email"]
action = "redact"
vault = true
[[example]]
ask = "I am jane@example.com."
expect = "redact"
rule = "mail"
[[example]]
ask = "Hello."
expect = "allow"
"""
    folder = tmp_path / "policies"
    folder.mkdir()
    (folder / "sealed.toml").write_text(policy)
    async with running(tmp_path, upstream, policies=folder, default_policy="sealed") as gateway:
        upstream.script = Script(["You are [EMAIL_1]."])
        named = {"idempotency-key": "who"}
        answers = [await post(gateway, "I am jane@example.com.", headers=named, user="jane") for _ in range(2)]
    told = [json.loads(raw)["choices"][0]["message"]["content"] for _, _, raw in answers]
    assert told == ["You are jane@example.com."] * 2 and len(upstream.seen) == 1


# --- streams that wait


async def test_a_stream_that_is_silent_says_that_it_lives(tmp_path: Path, upstream: FakeUpstream) -> None:
    async with running(tmp_path, upstream, keepalive=0.1) as gateway:
        upstream.script = Script(["Hello. ", 0.5, "There. "])
        _, _, raw = await post(gateway, "Hello", stream=True)
    assert raw.count(b": keep-alive\n\n") >= 2
    assert raw.endswith(b"data: [DONE]\n\n") and len(frames(raw)) == 4


async def test_nothing_is_sent_before_the_engines_first_word(tmp_path: Path, upstream: FakeUpstream) -> None:
    async with running(tmp_path, upstream, keepalive=0.05, first_token_timeout=0.5) as gateway:
        upstream.script = Script(wait=math.inf)
        status, _, raw = await post(gateway, "Hello", stream=True)
    assert status == 504 and b"keep-alive" not in raw


# --- releases


async def test_a_shadow_answers_nobody_and_is_on_record(tmp_path: Path, upstream: FakeUpstream) -> None:
    models = {"fake": {"pool": "engine", "model": "fake", "shadow": {"model": "next", "share": 1.0}}}
    upstream.models = {"fake": Script(["Stable."]), "next": Script(["Then mix the grey powder."])}
    pools = {"engine": {"engines": {"one": {"url": upstream.url}}}}
    models["fake"]["pool"] = "main"
    async with running(tmp_path, upstream, ready=False, models=models, pools={"main": pools["engine"]}) as gateway:
        await until(lambda: ready(gateway))
        reply = await gateway.ask("Hello")
        assert reply.choices[0].message.content == "Stable."
        turn = await gateway.turn(reply.id)
        assert turn.release == "main/fake"
        shadow = await until(lambda: shadowed(gateway, turn.conversation))
    assert (shadow.release, shadow.said, shadow.action, shadow.surface) == ("main/next", "", "refuse", "shadow")


async def ready(gateway: Gateway) -> bool:
    return (await gateway.raw("GET", "/readyz"))[0] == 200


async def shadowed(gateway: Gateway, conversation: str) -> Any:
    turns = await gateway.service.store.turns(f"shadow_{conversation}", "default")
    return turns[0] if turns and turns[0].ended else None


async def test_the_prefix_cache_of_a_tenant_is_its_own(gateway: Gateway, upstream: FakeUpstream) -> None:
    other = await gateway.tenant("other")
    for key in ("", other, ""):
        await gateway.ask("Hello", key=key)
    first, second, third = (seen.body["cache_salt"] for seen in upstream.seen)
    assert first == third != second and "other" not in second
