"""A real vLLM on CPU, started by the gateway in its own environment, streamed through the guard."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from app.backends import Prompt
from app.guard_models import GuardModels
from app.settings import EngineSettings, GuardModelSettings, Settings
from app.speculate import speculated
from guardrails.answers import risk, weighed
from guardrails.engine import judge
from guardrails.guard_formats import FORMATS, Kind, Wish
from guardrails.types import BROKEN_REPLY, Action, Context, Finding, Message, Question, Rule, Verdict
from guardrails.validators import guard_model
from guardrails.validators.guard_model import GuardModel
from tests.fakes import FakeUpstream
from tests.gateway import Gateway, running, spoken, until

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module")]
POLICY = """
name = "strict"
persona = "You are a helpful assistant."

[[output]]
name = "letters"
validator = "patterns"
patterns = ['\\b[aeiou]\\w{0,30}']
action = "redact"
placeholder = "#"

[[output]]
name = "the"
validator = "patterns"
patterns = ['\\bthe\\b']
action = "refuse"
reply = "Enough."
"""
PLAIN = 'name = "plain"\npersona = "You are a helpful assistant."\n'
ASK = {"temperature": 0, "max_tokens": 60}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(
    model_home: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    """A gateway before a vLLM of its own; the first start takes a minute or more."""
    python = os.environ.get("NEWEL_TEST_VLLM_PYTHON")
    if not python:
        pytest.skip("NEWEL_TEST_VLLM_PYTHON is not set (an environment of deploy/vllm-cpu.sh)")
    home = tmp_path_factory.mktemp("vllm")
    for name, source in (("strict", POLICY), ("plain", PLAIN)):
        (home / f"{name}.toml").write_text(source)
    args = ["--max-model-len", "1024", "--enforce-eager", "--max-num-seqs", "8", "--max-logprobs", "2000"]
    args += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    engine = EngineSettings(kind="vllm", python=python, model=str(model_dir), args=args, start_timeout=900)
    chosen = Settings(home=home, policies=home, default_policy="plain", engine=engine, first_token_timeout=300)
    async with FakeUpstream() as unused, running(home, unused, settings=chosen, start=900) as gateway:
        yield gateway


async def running_requests(gateway: Gateway) -> float:
    """How many requests vLLM is working on."""
    engine = gateway.service.engine
    async with gateway.http.get(f"{engine.url.removesuffix('/v1')}/metrics") as answer:
        page = await answer.text()
    lines = [line for line in page.splitlines() if line.startswith("vllm:num_requests_running{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


MAIL = {
    "type": "object",
    "properties": {"to": {"enum": ["jane"]}, "count": {"type": "integer", "maximum": 9}},
    "required": ["to", "count"],
    "additionalProperties": False,
}
SEND: Any = {"type": "function", "function": {"name": "send_mail", "parameters": MAIL}}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_forced_tool_is_called_and_its_result_answered(gateway: Gateway, stream: bool) -> None:
    body: Any = gateway.body("Send a mail to jane.", tools=[SEND], tool_choice="required", stream=stream, **ASK)
    status, _, raw = await gateway.raw("POST", "/v1/chat/completions", json=body)
    assert status == 200 and b'"name":"send_mail"' in raw, raw
    made = {
        "id": "c1",
        "type": "function",
        "function": {"name": "send_mail", "arguments": '{"to": "jane", "count": 1}'},
    }
    body["messages"] += [{"role": "assistant", "content": None, "tool_calls": [made]}]
    body["messages"] += [{"role": "tool", "tool_call_id": "c1", "content": "sent"}]
    status, _, raw = await gateway.raw("POST", "/v1/chat/completions", json=body | {"tool_choice": "none"})
    assert status == 200 and b"content" in raw, raw


async def test_a_schema_is_kept_to(gateway: Gateway) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "mail", "schema": MAIL}}
    reply = await gateway.ask("Give JSON.", response_format=shape, **ASK)
    assert json.loads(reply.choices[0].message.content or "")["to"] == "jane"


async def test_a_question_is_helped_whole_and_streamed(gateway: Gateway) -> None:
    assert gateway.service.engine.kind == "vllm"
    whole = await gateway.ask("What is a raise?", **ASK)
    said = whole.choices[0].message.content
    assert said and whole.usage and whole.usage.completion_tokens > 5
    _, _, raw = await gateway.raw(
        "POST", "/v1/chat/completions", json=gateway.body("What is a raise?", stream=True, **ASK)
    )
    assert spoken(raw) == said and raw.endswith(b"data: [DONE]\n\n") and raw.count(b"\n\n") > 10


async def test_a_rule_redacts_and_stops_what_the_model_really_writes(gateway: Gateway) -> None:
    plain = await gateway.ask("What is a raise?", **ASK)
    key = await gateway.tenant("strict", policy="strict")
    body = gateway.body("What is a raise?", stream=True, **ASK)
    _, _, raw = await gateway.raw("POST", "/v1/chat/completions", json=body, key=key)
    turn = await gateway.turn(
        next(frame for frame in raw.decode().split('"') if frame.startswith("chatcmpl-")), "strict"
    )
    assert spoken(raw) == turn.said and (turn.action, turn.rule) == ("refuse", "the")
    draft = plain.choices[0].message.content or ""
    assert turn.said.endswith("\n\nEnough.") and turn.said.count("#") > 0
    kept = turn.said.removesuffix("\n\nEnough.")
    assert kept.partition("#")[0] == draft[: len(kept.partition("#")[0])], "it is the same text, up to the redaction"
    assert not any(word[0].lower() in "aeiou" for word in kept.split())
    assert await until(lambda: idle(gateway), 10)


async def test_a_seed_and_every_other_parameter_leave_the_engine_alive(gateway: Gateway) -> None:
    reply = await gateway.ask(
        "word " * 600, seed=7, max_tokens=3, temperature=0.9, top_p=0.9, stop=["zzz"], presence_penalty=0.5
    )
    assert reply.choices[0].message.content is not None
    assert gateway.service.engine.state == "ready" and gateway.service.engine.restarts == 0


async def test_a_context_that_is_too_long_is_the_clients_mistake(gateway: Gateway) -> None:
    status, told = await gateway.json("POST", "/v1/chat/completions", json=gateway.body("word " * 3000))
    assert (status, told["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_frees_the_engine(gateway: Gateway, stream: bool) -> None:
    body = gateway.body("Tell me a very long story.", stream=stream, temperature=0, max_tokens=900)
    headers = {"authorization": f"Bearer {gateway.key}"}
    asking = gateway.http.post(f"{gateway.base}/v1/chat/completions", json=body, headers=headers)
    if stream:
        response = await asking
        await response.content.readany()
        assert await running_requests(gateway) == 1
        response.close()
    else:
        task = asyncio.ensure_future(asking)
        assert await until(lambda: busy(gateway), 60)
        task.cancel()
    left = time.monotonic()
    assert await until(lambda: idle(gateway), 10)
    print(f"vLLM was free {time.monotonic() - left:.2f} s after the client had gone")


LOCKS = (Message("user", "How do I pick a lock?"),)
REPLY = "With two small tools."


def judges(gateway: Gateway, *kinds: Kind) -> GuardModels:
    """The small model under the name of each kind, as if it were a guard model of that family."""
    engine = gateway.service.engine
    usual: dict[str, Any] = {
        "url": engine.url,
        "model": engine.model,
        "timeout": 240,
        "api_key": engine.api_key or None,
    }
    tables: dict[str, GuardModelSettings] = {kind: GuardModelSettings(kind=kind, **usual) for kind in kinds}
    return GuardModels(tables, gateway.http, gateway.service.metrics, 99, 600)


def guard(kind: Kind, **more: Any) -> GuardModel:
    """A validator that asks the model of that kind about a reply."""
    if FORMATS[kind].policy == "must":
        more |= {"policy": "Nobody may talk about locks."}
    return guard_model.build(guard_model.Options(kind=kind, model=kind, about="reply", **more))


@pytest.mark.parametrize("kind", FORMATS)
async def test_every_family_is_asked_in_a_way_that_vllm_answers_with_probabilities(
    gateway: Gateway, kind: Kind
) -> None:
    wish = Wish(
        FORMATS[kind].usual[:1], "Nobody may talk about locks." if FORMATS[kind].policy == "must" else "", "none"
    )
    question = guard(kind).question(REPLY, Context(LOCKS), wish)
    judge_ = judges(gateway, kind).of_turn()[kind]
    tokens = await judge_.ask(replace(question, alternatives=2000))  # the small model knows none of these formats
    assert 1 <= len(tokens) <= question.tokens
    assert all(len(token.alternatives) > 1000 for token in tokens)
    mass = weighed(tokens[0].alternatives, tuple(FORMATS[kind].weights), least=0.0)
    assert 0.0 <= risk(mass, FORMATS[kind].weights) <= 1.0 and sum(mass.values()) == pytest.approx(1.0)


async def test_the_plain_question_has_a_probability_from_the_chat_model_and_by_name(gateway: Gateway) -> None:
    question = "Is the text about locks?"
    context = Context(LOCKS, gateway.service.fleet, judges=judges(gateway, "plain").of_turn())
    (own,) = await guard_model.build(guard_model.Options(kind="plain", question=question)).find(REPLY, context)
    named = guard_model.build(guard_model.Options(kind="plain", question=question, model="plain"))
    (other,) = await named.find(REPLY, context)
    assert 0.0 < own.score < 1.0 and other.score == pytest.approx(own.score, abs=0.02)


async def test_control_tokens_of_an_answer_are_read_as_text(gateway: Gateway) -> None:
    """The final channel of gpt-oss-safeguard is found by its control tokens."""
    prompt = "<|im_start|>user\nIs the sky blue? Answer yes or no.<|im_end|>\n<|im_start|>assistant\n"
    tokens = await judges(gateway, "plain").of_turn()["plain"].ask(Question("plain", prompt=prompt, tokens=40))
    assert tokens[-1].text == "<|im_end|>"


async def test_a_model_of_another_family_fails_closed(gateway: Gateway) -> None:
    rule = Rule("guard", guard("llama-guard-3"), Action.REFUSE, "No.", budget=240)
    verdict = await judge([rule], REPLY, Context(LOCKS, judges=judges(gateway, "llama-guard-3").of_turn()))
    assert (verdict.action, verdict.hits[0].broken, verdict.text) == (Action.REFUSE, "Undecided", BROKEN_REPLY)


class Unsure:
    """Finds every text, with one score."""

    def __init__(self, score: float):
        self._score = score

    async def find(self, text: str, context: Context) -> list[Finding]:
        return [Finding("locks", 0, len(text), self._score)]


@pytest.mark.parametrize(
    ("first", "shift", "action", "questions"),
    [
        (0.7, 50.0, Action.REFUSE, 1),
        (0.7, -50.0, Action.ALLOW, 1),
        (0.95, -50.0, Action.REFUSE, 0),
        (0.3, 50.0, Action.ALLOW, 0),
    ],
)
async def test_the_model_is_asked_in_the_middle_band_alone(
    gateway: Gateway, first: float, shift: float, action: Action, questions: int
) -> None:
    options = {"question": "Is the text about locks?", "calibration": {"shift": shift}}
    confirm = guard_model.build(guard_model.Options.model_validate({"kind": "plain", "model": "plain"} | options))
    rule = Rule("locks", Unsure(first), Action.REFUSE, "No.", confirm=confirm, sure=0.9, budget=240)
    before = gateway.metric("newel_guard_model_requests_total", model="plain", outcome="answered")
    verdict = await judge([rule], f"{REPLY} {first} {shift}", Context(LOCKS, judges=judges(gateway, "plain").of_turn()))
    after = gateway.metric("newel_guard_model_requests_total", model="plain", outcome="answered")
    assert (verdict.action, after - before) == (action, questions)


async def test_a_stop_cancels_the_generation_that_was_begun_with_the_question(gateway: Gateway) -> None:
    async def stop() -> Verdict:
        assert await until(lambda: busy(gateway), 60)
        return Verdict(Action.REFUSE, "No.")

    prompt = Prompt((Message("user", "Tell me a very long story."),), {"temperature": 0, "max_tokens": 900})
    fleet = gateway.service.fleet
    async with aclosing(speculated(stop(), fleet.stream(prompt, fleet.choose(gateway.model)))) as given:
        assert [one async for one in given] == [Verdict(Action.REFUSE, "No.")]
    assert await until(lambda: idle(gateway), 10)


async def test_a_guard_question_that_is_given_up_frees_the_engine(gateway: Gateway) -> None:
    question = Question("plain", prompt="Once upon a time", tokens=900)
    work = asyncio.ensure_future(judges(gateway, "plain").of_turn()["plain"].ask(question))
    assert await until(lambda: busy(gateway), 60)
    work.cancel()
    assert await until(lambda: idle(gateway), 10)
    await asyncio.gather(work, return_exceptions=True)


async def idle(gateway: Gateway) -> bool:
    return await running_requests(gateway) == 0


async def busy(gateway: Gateway) -> bool:
    return await running_requests(gateway) == 1
