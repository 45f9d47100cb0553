"""A real vLLM on CPU, started by the gateway in its own environment, streamed through the guard."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from app.settings import EngineSettings, Settings
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
    args = ["--max-model-len", "1024", "--enforce-eager", "--max-num-seqs", "8"]
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
        import asyncio

        task = asyncio.ensure_future(asking)
        assert await until(lambda: busy(gateway), 60)
        task.cancel()
    left = time.monotonic()
    assert await until(lambda: idle(gateway), 10)
    print(f"vLLM was free {time.monotonic() - left:.2f} s after the client had gone")


async def idle(gateway: Gateway) -> bool:
    return await running_requests(gateway) == 0


async def busy(gateway: Gateway) -> bool:
    return await running_requests(gateway) == 1
