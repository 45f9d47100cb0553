"""The whole stack with the real small model on the embedded CPU engine."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio

from app.records import Tenant
from app.settings import EngineSettings, Settings
from guardrails.policy import loads
from tests.fakes import FakeUpstream
from tests.gateway import Gateway, running, until

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module")]
GRADED = """
name = "graded"
persona = "You are a helpful assistant."

[[input]]
name = "weather"
validator = "grader"
question = "Is this text about the weather?"
action = "refuse"
threshold = 0.0
mode = "shadow"
reply = "No weather."
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(
    model_home: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    """A gateway with the policy `hr` and an engine process of its own."""
    engine = EngineSettings(kind="cpu", model=str(model_dir), start_timeout=300)
    chosen = Settings(home=tmp_path_factory.mktemp("model"), default_policy="hr", engine=engine)
    async with FakeUpstream() as unused, running(chosen.home, unused, settings=chosen, start=300) as gateway:
        yield gateway


async def test_an_ordinary_question_is_helped(gateway: Gateway) -> None:
    reply = await gateway.ask("How do I ask for a raise?", temperature=0, max_tokens=40)
    choice = reply.choices[0]
    assert len(choice.message.content or "") > 40 and choice.finish_reason in ("stop", "length")
    assert reply.usage and reply.usage.completion_tokens > 5 and reply.usage.prompt_tokens > 40
    turn = await gateway.turn(reply.id)
    assert (turn.action, turn.error, turn.policy.partition("@")[0]) == ("allow", "", "hr")
    assert turn.first_token_ms and turn.first_token_ms < (turn.total_ms or 0)


async def test_a_stream_says_the_same_as_a_whole_reply(gateway: Gateway) -> None:
    ask: dict[str, Any] = {"temperature": 0, "max_tokens": 40}
    whole = await gateway.ask("What is a notice period?", **ask)
    async with gateway.sdk() as client:
        stream = await client.chat.completions.create(**gateway.body("What is a notice period?", stream=True, **ask))
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == whole.choices[0].message.content
    assert sum(bool(piece) for piece in pieces) > 5, "it came in pieces"


async def test_several_are_answered_at_once(gateway: Gateway) -> None:
    replies = await asyncio.gather(*(gateway.ask(f"Count from {n}.", max_tokens=12) for n in range(4)))
    assert all(reply.choices[0].message.content for reply in replies)


async def test_a_grader_reads_a_real_probability(gateway: Gateway) -> None:
    store, policy = gateway.service.store, loads(GRADED)
    await store.put_policy("graded", GRADED, policy.version, "test")
    await store.activate_policy("graded", policy.version, "test")
    await store.put_tenant(Tenant("graded", "graded"))
    key = (await store.add_key("graded"))[1]
    scores = []
    for text in ("It will rain tomorrow, with a cold wind from the north.", "My invoice was paid twice."):
        reply = await gateway.ask(text, key=key, max_tokens=5)
        turn = await gateway.turn(reply.id, "graded")
        assert turn.input
        (hit,) = turn.input.hits
        assert not hit.broken
        scores.append(hit.findings[0].score)
    assert all(0 < score < 1 for score in scores) and scores[0] != scores[1]


async def test_an_engine_that_is_killed_in_mid_stream_ends_it_honestly_and_is_started_again(gateway: Gateway) -> None:
    engine = gateway.service.engine
    before = engine.restarts
    async with gateway.sdk() as client:
        stream = await client.chat.completions.create(
            **gateway.body("Tell me a long story about an office.", stream=True, temperature=0, max_tokens=400)
        )
        seen = []
        with pytest.raises(openai.APIError) as caught:
            async for chunk in stream:
                seen.append(chunk)
                if len(seen) == 5:
                    kill(engine.pid)
    assert caught.value.code in ("engine_broken", "engine_unreachable")
    turn = await gateway.turn(seen[0].id)
    assert turn.error == caught.value.code and turn.said

    async def refused() -> bool:
        try:
            await gateway.ask("Hello", max_tokens=3)
        except openai.InternalServerError as error:
            return error.status_code == 503 and int(error.response.headers["retry-after"]) >= 1
        return False

    assert await until(refused, 30)
    assert await until(lambda: is_ready(gateway), 300)
    assert engine.restarts > before
    assert (await gateway.ask("Hello", max_tokens=3)).choices[0].message.content


def kill(leash: int | None) -> None:
    """Kills the engine itself, which the process that holds it then reports."""
    children = Path(f"/proc/{leash}/task/{leash}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)


async def is_ready(gateway: Gateway) -> bool:
    return gateway.service.engine.state == "ready"
