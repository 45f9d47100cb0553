"""What people write is in the database and nowhere else: not in logs, not in metrics, not in what others are told."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from app.logs import SOURCES, JsonFormatter
from tests.fakes import FakeUpstream, Script
from tests.gateway import Gateway

MARK = "Xylophon7"


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """All that is logged, at every level, as it is written."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(JsonFormatter())
    for name in SOURCES:
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel("DEBUG")
    yield out
    for name in SOURCES:
        logging.getLogger(name).removeHandler(handler)


QUESTIONS = [
    f"Hello {MARK}",
    f"The salary of {MARK}?",
    f"My card is 4111 1111 1111 1111, {MARK}",
    f"{MARK} harasses me",
    f"Is overtime legal, {MARK}?",
]
SCRIPTS = [
    Script([f"Hello {MARK}."]),
    Script([f"You mix the {MARK} powder"]),
    Script([f"Write to {MARK}@example.com"]),
    Script([f"Hello {MARK}", " and"], end="cut"),
    Script([f"Hello {MARK}", " and"], end="error", message=f"failed at {MARK}"),
    Script(status=400, message=f"cannot read {MARK}"),
    Script(status=500, message=f"cannot read {MARK}"),
    Script([f"data: {MARK}\n\n".encode()]),
]


async def test_what_people_write_is_neither_in_the_logs_nor_in_the_metrics(
    gateway: Gateway, upstream: FakeUpstream, written: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {"X-Conversation-Id": "talk", "X-Request-Id": "sane"}
    for stream in (False, True):
        for question in QUESTIONS:
            await post(gateway, gateway.body(question, stream=stream, user=MARK), headers)
        for script in SCRIPTS:
            upstream.queue.append(script)
            await post(gateway, gateway.body("Hello", stream=stream), headers)
    for bad in ({"temperature": MARK}, {MARK: 1}, {"messages": [{"role": MARK, "content": MARK}]}, {"model": MARK}):
        await post(gateway, gateway.body(MARK) | bad, {})
    await gateway.raw("POST", "/v1/chat/completions", data=f"{{{MARK}".encode())
    await gateway.raw("GET", f"/v1/{MARK}?{MARK}={MARK}", headers={"X-Request-Id": f"{MARK} {MARK}"})
    await gateway.raw("GET", f"/v1/tickets/{MARK}")
    await gateway.raw("GET", "/v1/models", key=f"nk-{MARK}")
    await gateway.raw("POST", "/v1/feedback", json={"target": MARK, "rating": "up", "comment": MARK})

    upstream.script = Script(["word ", 0.02] * 1000)
    with pytest.raises(openai.APITimeoutError):
        async with gateway.sdk(timeout=0.3) as client:
            await client.chat.completions.create(**gateway.body(MARK))

    async def fail(*args: object) -> None:
        raise RuntimeError(f"could not judge {MARK}") from ValueError(MARK)

    monkeypatch.setattr("app.chat.judged", fail)
    assert await post(gateway, gateway.body(MARK), {}) == 500
    gateway.service.spawn(fail())
    await asyncio.sleep(0.1)

    for ticket in await gateway.service.store.tickets():
        body = {"answer": MARK, "by": "Dana"}
        await gateway.json("POST", f"/admin/tickets/{ticket.id}/answer", key=gateway.admin, json=body)
    _, _, page = await gateway.raw("GET", "/metrics")
    log = written.getvalue()
    assert log.count('"event":"turn"') > 20 and "RuntimeError" in log and "test_privacy.py:" in log
    assert MARK not in log
    assert MARK not in page.decode() and b"newel_turns_total" in page
    assert all(json.loads(line)["time"] for line in log.splitlines())


async def post(gateway: Gateway, body: dict[str, Any], headers: dict[str, str]) -> int:
    status, _, _ = await gateway.raw("POST", "/v1/chat/completions", json=body, headers=headers)
    return status


async def test_what_was_withheld_stands_in_a_class_of_its_own(gateway: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = Script(["Write to jane@example.com"])
    reply = await gateway.ask("My card is 4111 1111 1111 1111")
    turn = await gateway.turn(reply.id)
    assert (turn.asked, turn.said) == ("My card is [CARD]", "Write to [EMAIL]")
    assert "4111" not in str(turn) and "jane" not in str(turn)
    withheld = await gateway.service.store.withheld(reply.id, "default", "dana", "a complaint")
    assert withheld == {"asked": "My card is 4111 1111 1111 1111", "said": "Write to jane@example.com"}


async def test_a_tasks_unseen_failure_is_logged_without_its_text(gateway: Gateway, written: io.StringIO) -> None:
    async def fail() -> None:
        raise RuntimeError(MARK)

    failed = asyncio.create_task(fail())
    await asyncio.wait({failed})
    del failed
    gc.collect()
    assert "Task exception was never retrieved" in written.getvalue()
    assert MARK not in written.getvalue()
