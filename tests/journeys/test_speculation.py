"""A question that a language model judges while the reply is already made: what was made too early is never said."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest

from app.records import Turn
from tests.fakes import FakeUpstream, Script
from tests.gateway import POLICY, Gateway, running, settings, spoken, until

GRADED = """
[[input]]
name = "medical"
validator = "grader"
question = "Does it ask for medical advice?"
action = "refuse"
reply = "Ask a doctor."

"""
EAGER = Script(["I ", "made ", "this ", "too ", "early. "])


@pytest.fixture
async def graded(tmp_path: Path, upstream: FakeUpstream) -> AsyncIterator[Gateway]:
    """A gateway whose grader takes longer than the engine takes for a whole reply."""
    upstream.script, upstream.thinking = EAGER, 0.3
    chosen = settings(tmp_path, upstream.url, default_policy="graded")
    assert chosen.policies
    policy = POLICY.replace('name = "office"', 'name = "graded"').replace("[routes.people]", GRADED + "[routes.people]")
    (chosen.policies / "graded.toml").write_text(policy)
    async with running(tmp_path, upstream, settings=chosen) as gateway:
        yield gateway


@pytest.mark.parametrize("stream", [False, True])
async def test_a_reply_that_was_made_too_early_is_neither_said_nor_recorded_as_said(
    graded: Gateway, upstream: FakeUpstream, stream: bool
) -> None:
    upstream.yes = 1.0
    body = graded.body("Is this rash bad?", stream=stream)
    _, headers, raw = await graded.raw("POST", "/v1/chat/completions", json=body)
    assert b"Ask a doctor." in raw and b"early" not in raw and len(upstream.seen) == 1
    turn = await graded.turn(headers["x-guardrails-id"])
    assert (turn.action, turn.rule, turn.said) == ("refuse", "medical", "Ask a doctor.")
    assert (turn.reasoning, turn.calls) == ("", ())


async def test_a_reply_that_passes_was_begun_before_the_verdict(graded: Gateway, upstream: FakeUpstream) -> None:
    body = graded.body("Is this hat nice?", stream=True)
    _, headers, raw = await graded.raw("POST", "/v1/chat/completions", json=body)
    assert spoken(raw) == EAGER.text
    turn = await graded.turn(headers["x-guardrails-id"])
    assert turn.said == EAGER.text and turn.first_token_ms and turn.first_token_ms < 300


async def test_a_client_that_goes_before_the_verdict_was_told_nothing(graded: Gateway, upstream: FakeUpstream) -> None:
    upstream.thinking = 30.0
    with pytest.raises(openai.APITimeoutError):
        async with graded.sdk(timeout=0.5) as client:
            await client.chat.completions.create(
                **graded.body("Is this rash bad?", stream=True), extra_headers={"X-Conversation-Id": "gone"}
            )

    async def ended() -> list[Turn]:
        return [turn for turn in await graded.service.store.turns("gone", "default") if turn.ended]

    (turn,) = await until(ended)
    assert (turn.error, turn.said) == ("client_gone", "")
