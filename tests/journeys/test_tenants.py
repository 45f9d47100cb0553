"""Tenants do not see each other, keys end when they are revoked, and only operators reach the operators' routes."""

from __future__ import annotations

import asyncio

import openai
import pytest

from app.auth import GOOD_SECONDS
from tests.fakes import FakeUpstream
from tests.gateway import SALARY, Gateway

ADMIN = [
    ("GET", "/admin/tickets"),
    ("GET", "/admin/tickets/ESC-1"),
    ("POST", "/admin/tickets/ESC-1/answer"),
    ("POST", "/admin/tickets/ESC-1/close"),
    ("GET", "/admin/policies"),
    ("POST", "/admin/policies"),
    ("GET", "/admin/audit"),
]


async def test_two_tenants_have_policies_conversations_and_tickets_of_their_own(
    gateway: Gateway, upstream: FakeUpstream
) -> None:
    other = await gateway.tenant("other", policy="open")
    assert (await gateway.ask("The salary of Jane?")).choices[0].message.content == SALARY
    assert (await gateway.ask("The salary of Jane?", key=other)).choices[0].message.content == "Hello there."

    headers = {"X-Conversation-Id": "the-same"}
    escalated = await gateway.ask("He harasses me", headers=headers)
    ticket = (escalated.model_extra or {})["guardrails"]["escalation"]["id"]
    assert (await gateway.json("GET", f"/v1/tickets/{ticket}"))[0] == 200
    assert (await gateway.json("GET", f"/v1/tickets/{ticket}", key=other))[0] == 404
    body = {"answer": "We will talk.", "by": "Dana"}
    await gateway.json("POST", f"/admin/tickets/{ticket}/answer", key=gateway.admin, json=body)
    theirs = await gateway.ask("News?", headers=headers, key=other)
    assert theirs.choices[0].message.content == "Hello there."
    mine = await gateway.ask("News?", headers=headers)
    assert "We will talk." in (mine.choices[0].message.content or "")
    assert await gateway.service.store.turn(mine.id, "other") is None

    said = mine.choices[0].message.content or ""
    resent = await gateway.ask("News?", said, "The salary of Jane?", key=other)
    assert (await gateway.turn(resent.id, "other")).conversation not in ("the-same", "")


async def test_a_revoked_key_is_refused_within_a_second(gateway: Gateway) -> None:
    key, secret = await gateway.service.store.add_key("default")
    assert (await gateway.ask("Hello", key=secret)).id
    await gateway.service.store.revoke_key(key.id)
    await asyncio.sleep(GOOD_SECONDS)
    with pytest.raises(openai.AuthenticationError):
        await gateway.ask("Hello", key=secret)


@pytest.mark.parametrize(("method", "path"), ADMIN)
async def test_a_clients_key_does_not_open_an_operators_route(gateway: Gateway, method: str, path: str) -> None:
    status, told = await gateway.json(method, path, json={})
    assert (status, told["error"]["code"]) == (403, "scope_needed")
    status, told = await gateway.json(method, path, key="", json={})
    assert (status, told["error"]["code"]) == (401, "missing_api_key")


async def test_what_operators_do_is_on_record(gateway: Gateway) -> None:
    escalated = await gateway.ask("He harasses me")
    ticket = (escalated.model_extra or {})["guardrails"]["escalation"]["id"]
    await gateway.json("POST", f"/admin/tickets/{ticket}/answer", key=gateway.admin, json={"answer": "x", "by": "Dana"})
    _, told = await gateway.json("GET", "/admin/audit?limit=1", key=gateway.admin)
    (entry,) = told["data"]
    assert (entry["actor"], entry["action"], entry["subject"]) == ("Dana", "ticket.answer", ticket)
