"""One tenant attacks another: what it guesses, spoofs or resends gets exactly the answer that a thing which does not
exist gets, and changes nothing."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson
import pytest

from app.records import Turn
from tests.fakes import FakeUpstream, Script
from tests.gateway import CRISIS, Gateway, running, settings

POLICY = f"""
name = "sealed"
persona = "You write letters."

[[input]]
name = "mine"
validator = "personal"
kinds = ["email"]
action = "redact"
vault = true

[[input]]
name = "crisis"
validator = "patterns"
patterns = ['harass\\w{{0,6}}']
action = "escalate"
route = "people"
reply = "{CRISIS}"

[routes.people]
queue = "hr"
priority = "high"
due = "4h"
"""
MAIL, SECRET, ANSWER = "xylophone7@example.com", "The merger is called Bluebird.", "We will protect you, Xenia."
THREAD, PERSON = "victims-thread", "xenia"
HEADERS = ("X-Conversation-Id", "X-OpenWebUI-Chat-Id", "ChatUI-Conversation-ID", "x-CONVERSATION-id")
NO_TURN, NO_TICKET = "chatcmpl-000000000000000000000000", "ESC-00000000"


@dataclass(frozen=True, slots=True)
class Scene:
    """A gateway where the victim (tenant `default`) has talked, and a person has answered; the attacker's keys."""

    gateway: Gateway
    upstream: FakeUpstream
    asked: str
    turn: Turn
    escalated: Turn
    ticket: str
    attacker: str
    reviewer: str


@pytest.fixture
async def scene(tmp_path: Path, upstream: FakeUpstream) -> AsyncIterator[Scene]:
    chosen = settings(tmp_path, upstream.url, default_policy="sealed")
    (tmp_path / "policies" / "sealed.toml").write_text(POLICY)
    async with running(tmp_path, upstream, settings=chosen) as gateway:
        attacker = await gateway.tenant("attacker", policy="sealed")
        reviewer = (await gateway.service.store.add_key("attacker", "reviewer"))[1]
        asked, headers = f"I am {MAIL}. {SECRET}", {"x-conversation-id": THREAD}
        upstream.script = Script(["Noted, [EMAIL_1]."])
        first = await gateway.ask(asked, headers=headers, user=PERSON)
        second = await gateway.ask("He harasses me", headers=headers, user=PERSON)
        turn, escalated = await gateway.turn(first.id), await gateway.turn(second.id)
        assert first.choices[0].message.content == f"Noted, {MAIL}."
        assert escalated.ticket
        await gateway.service.store.answer_ticket(escalated.ticket.id, ANSWER, "Dana")
        upstream.script = Script(["You said: [EMAIL_1]."])
        yield Scene(gateway, upstream, asked, turn, escalated, escalated.ticket.id, attacker, reviewer)


LEAKS = (MAIL, "Bluebird", "Xenia", "Dana", THREAD)


async def answer(scene: Scene, method: str, path: str, key: str, **more: Any) -> tuple[int, str, dict[str, str]]:
    """(status, body, headers) without what differs from request to request by its nature."""
    status, headers, body = await scene.gateway.raw(method, path, key=key, **more)
    text = body.decode()
    for leak in LEAKS:
        assert leak not in text
        assert leak not in str(headers)
    left = {name: value for name, value in headers.items() if name not in ("date", "x-request-id", "content-length")}
    return status, text, left


async def alike(scene: Scene, method: str, path: str, theirs: str, nothing: str, key: str, **more: Any) -> int:
    """The status of both requests, whose answers are the same but for the id in them."""
    told = []
    for id in (theirs, nothing):
        body = {name: orjson.loads(orjson.dumps(value).replace(b"{id}", id.encode())) for name, value in more.items()}
        status, text, headers = await answer(scene, method, path.replace("{id}", id), key, **body)
        told.append((status, text.replace(id, "{id}"), headers))
    assert told[0] == told[1]
    return told[0][0]


# --- ids


async def test_anothers_ticket_is_not_there(scene: Scene) -> None:
    path = "/v1/tickets/{id}"
    assert await alike(scene, "GET", path, scene.ticket, NO_TICKET, scene.attacker) == 404
    assert await alike(scene, "GET", path, scene.ticket.lower(), NO_TICKET.lower(), scene.attacker) == 404
    tricks = ("%00", "/", "/..", "%2f..%2f", "?tenant=default", "#x", ";tenant=default")
    for trick in tricks:
        status = await alike(scene, "GET", f"{path}{trick}", scene.ticket, NO_TICKET, scene.attacker)
        assert status in (307, 404)


async def test_another_tenants_ticket_is_not_there_for_a_reviewer(scene: Scene) -> None:
    path, body = "/admin/tickets/{id}", {"answer": "Go away.", "by": "Dana"}
    assert await alike(scene, "GET", path, scene.ticket, NO_TICKET, scene.reviewer) == 404
    for deed in ("answer", "close"):
        assert await alike(scene, "POST", f"{path}/{deed}", scene.ticket, NO_TICKET, scene.reviewer, json=body) == 404
    for query in ("", "?tenant={id}", "?tenant={id}&state=answered", "?tenant=attacker&tenant={id}"):
        status = await alike(scene, "GET", f"/admin/tickets{query}", "default", "nobody", scene.reviewer)
        assert status == 200
    kept = await scene.gateway.service.store.ticket(scene.ticket)
    assert kept and (kept.answer, kept.answered_by, kept.state) == (ANSWER, "Dana", "answered")


async def test_a_reviewer_sees_and_answers_the_tickets_of_its_own_tenant(scene: Scene) -> None:
    gateway = scene.gateway
    mine = await gateway.ask("He harasses me", key=scene.attacker)
    ticket = (mine.model_extra or {})["guardrails"]["escalation"]["id"]
    _, listed = await gateway.json("GET", "/admin/tickets", key=scene.reviewer)
    assert [one["id"] for one in listed["data"]] == [ticket]
    body = {"answer": "We come.", "by": "Rob"}
    status, told = await gateway.json("POST", f"/admin/tickets/{ticket}/answer", key=scene.reviewer, json=body)
    assert (status, told["state"]) == (200, "answered")
    for path in ("/admin/policies", "/admin/audit", "/admin/policies/schema"):
        assert (await gateway.json("GET", path, key=scene.reviewer))[0] == 403
    assert (await gateway.raw("GET", "/v1/models", key=scene.reviewer))[0] == 403


@pytest.mark.parametrize(
    "thought",
    [
        {"rating": "up"},
        {"comment": "Bad."},
        {"correction": "My email is [EMAIL_1]."},
        {"should_have": "refused"},
        {"rating": "down", "comment": "x", "source": PERSON},
    ],
)
async def test_anothers_reply_cannot_be_judged(scene: Scene, thought: dict[str, str]) -> None:
    body = {"target": "{id}"} | thought
    for theirs in (scene.turn.id, scene.escalated.id):
        assert await alike(scene, "POST", "/v1/feedback", theirs, NO_TURN, scene.attacker, json=body) == 404
    assert await scene.gateway.service.store.feedback(scene.turn.id, "default", history=True) == []


async def test_anothers_reply_cannot_be_compared_with_ones_own(scene: Scene) -> None:
    mine = (await scene.gateway.ask("Hello", key=scene.attacker)).id
    for target, other in ((mine, "{id}"), ("{id}", mine)):
        body = {"target": target, "choice": {"other": other, "better": "other"}}
        assert await alike(scene, "POST", "/v1/feedback", scene.turn.id, NO_TURN, scene.attacker, json=body) == 404


async def test_anothers_idempotency_key_is_free(scene: Scene) -> None:
    gateway, headers = scene.gateway, {"idempotency-key": "the-same"}
    body = {"target": scene.turn.id, "rating": "up"}
    assert (await gateway.json("POST", "/v1/feedback", headers=headers, json=body))[0] == 200
    mine = await gateway.turn((await gateway.ask("Hello", key=scene.attacker)).id, "attacker")
    status, told = await gateway.json(
        "POST", "/v1/feedback", key=scene.attacker, headers=headers, json={"target": mine.id, "rating": "down"}
    )
    assert (status, told["recorded"][0]["created"]) == (200, True)


async def test_anothers_chat_is_not_played_back_by_its_idempotency_key(scene: Scene) -> None:
    gateway, headers = scene.gateway, {"idempotency-key": "chat-1"}
    theirs = await gateway.ask(scene.asked, headers=headers, user=PERSON)
    before = len(scene.upstream.seen)
    mine = await gateway.ask(scene.asked, key=scene.attacker, headers=headers, user=PERSON)
    assert mine.id != theirs.id
    assert len(scene.upstream.seen) == before + 1
    assert (await gateway.turn(mine.id, "attacker")).conversation != (await gateway.turn(theirs.id)).conversation


# --- conversations


async def said_in(scene: Scene, headers: dict[str, str] | None = None, **more: Any) -> tuple[str, list[Any]]:
    """What the attacker is told by a question, and what the model was shown for it."""
    before = len(scene.upstream.seen)
    told = await scene.gateway.ask("What did I say before?", key=scene.attacker, headers=headers, **more)
    shown = [message for seen in scene.upstream.seen[before:] for message in seen.body["messages"]]
    said = told.choices[0].message.content or ""
    assert not [leak for leak in LEAKS if leak in said or leak in str(shown)]
    return said, shown


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("person", [PERSON, ""])
async def test_anothers_conversation_is_a_new_one(scene: Scene, header: str, person: str) -> None:
    told = [await said_in(scene, {header: thread}, user=person) for thread in (THREAD, f"{THREAD}-2")]
    assert told[0] == told[1]
    theirs = await scene.gateway.service.store.turns(THREAD, "default")
    assert [turn.id for turn in theirs] == [scene.turn.id, scene.escalated.id]
    assert await scene.gateway.service.store.undelivered_answers("default", THREAD)  # still the victim's to be told


async def test_anothers_conversation_is_a_new_one_in_the_metadata_too(scene: Scene) -> None:
    told = [
        await said_in(scene, extra_body={"metadata": {"conversation_id": thread}, "user": PERSON})
        for thread in (THREAD, f"{THREAD}-2")
    ]
    assert told[0] == told[1]


@pytest.mark.parametrize(
    "spoofed",
    [
        {"x-openwebui-user-id": PERSON},
        {"x-openwebui-user-id": PERSON, "x-openwebui-user-role": "admin", "x-openwebui-user-email": MAIL},
        {"X-OpenWebUI-Chat-Id": THREAD, "X-OpenWebUI-User-Id": PERSON},
        {"x-tenant": "default", "x-newel-tenant": "default", "x-tenant-id": "default"},
        {"openai-organization": "default", "openai-project": "default"},
        {"x-forwarded-user": PERSON, "x-forwarded-for": "127.0.0.1", "x-real-ip": "127.0.0.1"},
        {"x-forwarded-host": "admin.internal", "forwarded": "for=127.0.0.1;host=admin.internal"},
        {"cookie": "tenant=default"},
    ],
)
async def test_a_spoofed_header_makes_nobody_another_tenants(scene: Scene, spoofed: dict[str, str]) -> None:
    plain = await said_in(scene, {"x-conversation-id": "mine-1"})
    assert await said_in(scene, {"x-conversation-id": "mine-2"} | spoofed) == plain
    turns = [
        turn for thread in ("mine-1", "mine-2") for turn in await scene.gateway.service.store.turns(thread, "default")
    ]
    assert turns == []


async def test_a_resent_history_of_another_joins_nothing_and_restores_nothing(scene: Scene) -> None:
    gateway = scene.gateway
    turns = []
    for question in (scene.asked, scene.asked.replace(SECRET, "Another secret.")):
        reply = await gateway.ask(question, f"Noted, {MAIL}.", "And now?", key=scene.attacker, user=PERSON)
        turns.append(await gateway.turn(reply.id, "attacker"))
    assert all(turn.conversation not in ("", THREAD) for turn in turns)
    assert turns[0].conversation != turns[1].conversation
    theirs = await gateway.service.store.turns(THREAD, "default")
    assert len(theirs) == 2


@pytest.mark.parametrize("asked", ["Say [EMAIL_1]", "Say [EMAIL_1] [EMAIL_2] [Email 1]", "[EMAIL\u200b_1]"])
async def test_anothers_placeholders_stay_placeholders(scene: Scene, asked: str) -> None:
    scene.upstream.script = Script(["It is [EMAIL_1], **[Email 1]**."])
    told = []
    for thread in (THREAD, "nothing-here"):
        reply = await scene.gateway.ask(asked, key=scene.attacker, headers={"x-conversation-id": thread}, user=PERSON)
        told.append(reply.choices[0].message.content)
    assert told[0] == told[1]
    assert MAIL not in (told[0] or "")
    mine = await scene.gateway.ask(
        f"I am other@example.org. {asked}", key=scene.attacker, headers={"x-conversation-id": THREAD}, user=PERSON
    )
    assert MAIL not in (mine.choices[0].message.content or "")


async def test_the_victim_still_has_everything(scene: Scene) -> None:
    await said_in(scene, {"x-conversation-id": THREAD}, user=PERSON)
    told = await scene.gateway.ask("And?", headers={"x-conversation-id": THREAD}, user=PERSON)
    assert ANSWER in (told.choices[0].message.content or "")
    assert MAIL in (told.choices[0].message.content or "")


# --- doors


async def exchange(base: str, request: str) -> tuple[int, bytes]:
    """(status, body) of a request that is sent byte by byte as it is written here."""
    where = urlsplit(base)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    writer.write(request.replace("\n", "\r\n").encode("latin-1"))
    async with asyncio.timeout(10):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    return int(head.split(b" ", 2)[1]), body


def request(path: str, key: str, *more: str, method: str = "GET", host: str = "newel") -> str:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", f"Authorization: Bearer {key}", "Connection: close", *more]
    return "\n".join([*lines, "", ""])


PATHS = [
    "/admin/tickets",
    "/admin/tickets/",
    "/admin/policies",
    "/admin/policies/schema",
    "/admin/audit",
    "/metrics",
    "/admin",
    "//admin/tickets",
    "/./admin/tickets",
    "/v1/../admin/tickets",
    "/v1/%2e%2e/admin/tickets",
    "/v1/..%2fadmin/tickets",
    "/v1/..;/admin/tickets",
    "/%61dmin/tickets",
    "/admin%2ftickets",
    "/ADMIN/tickets",
    "/Admin/Tickets",
    "/admin/tickets%00",
    "/admin/tickets?x=/v1/models",
    "/admin\\tickets",
    "/v1/chat/completions/../../../admin/tickets",
    "http://127.0.0.1/admin/tickets",
    "http://admin.internal/admin/audit",
]


@pytest.mark.parametrize("path", PATHS)
async def test_the_operators_routes_are_not_on_the_services_port_for_anybody(scene: Scene, path: str) -> None:
    gateway = scene.gateway
    for key in (gateway.admin, scene.attacker):
        told = [await exchange(gateway.base, request(one, key)) for one in (path, "/nothing/here")]
        assert told[0][0] == told[1][0] == 404, told
        shapes = [re.sub(rb'"message":"[^"]*"', b"", body) for _, body in told]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    "header",
    [
        "Host: localhost",
        "Host: 127.0.0.1:9080",
        "X-Original-URL: /admin/tickets",
        "X-Rewrite-URL: /admin/tickets",
        "X-Forwarded-Prefix: /admin",
        "X-Forwarded-Host: admin.internal",
        "X-HTTP-Method-Override: DELETE",
        "X-Forwarded-For: 127.0.0.1",
    ],
)
async def test_no_header_leads_to_the_operators_routes(scene: Scene, header: str) -> None:
    for path, wanted in (("/admin/tickets", 404), ("/v1/models", 200)):
        text = request(path, scene.gateway.key, header)
        if header.startswith("Host"):
            text = request(path, scene.gateway.key, host=header.removeprefix("Host: "))
        status, body = await exchange(scene.gateway.base, text)
        assert status == wanted
        assert b"ticket" not in body.replace(b"/admin/tickets", b"")


@pytest.mark.parametrize("path", [path for path in PATHS if "metrics" not in path])
async def test_no_spelling_of_a_path_opens_the_operators_port_to_a_clients_key(scene: Scene, path: str) -> None:
    status, body = await exchange(scene.gateway.operators, request(path, scene.attacker))
    assert status in (307, 403, 404)
    assert not [leak for leak in (*LEAKS, scene.ticket) if leak.encode() in body]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/v1/feedback", "/v1/tickets/ESC-1"])
async def test_the_services_routes_are_not_on_the_operators_port(scene: Scene, path: str) -> None:
    for method in ("GET", "POST"):
        assert (await exchange(scene.gateway.operators, request(path, scene.gateway.admin, method=method)))[0] == 404


@pytest.mark.parametrize("order", ["mine first", "theirs first"])
@pytest.mark.parametrize("second", ["Authorization: Bearer ", "authorization: bearer ", "X-Api-Key: ", "Api-Key: "])
async def test_two_keys_in_a_request_are_none(scene: Scene, order: str, second: str) -> None:
    one, other = scene.attacker, "nk-guessed-of-the-victim"
    if order == "theirs first":
        one, other = other, one
    status, body = await exchange(scene.gateway.base, request("/v1/models", one, f"{second}{other}"))
    assert status == 401
    assert orjson.loads(body)["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("header", ["x-api-key", "api-key", "X-API-Key"])
async def test_another_header_for_the_key_gives_no_other_tenant(scene: Scene, header: str) -> None:
    status, _, headers = await answer(scene, "GET", f"/v1/tickets/{scene.ticket}", "", headers={header: scene.attacker})
    assert status == 404
    assert headers


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
async def test_no_method_tells_whether_a_ticket_is_there(scene: Scene, method: str) -> None:
    await alike(scene, method, "/v1/tickets/{id}", scene.ticket, NO_TICKET, scene.attacker)


async def test_what_is_not_there_is_named_as_it_was_asked_for_and_no_more(scene: Scene) -> None:
    _, told, _ = await answer(scene, "GET", f"/v1/tickets/{scene.ticket}", scene.attacker)
    assert set(orjson.loads(told)["error"]) == {"message", "type", "param", "code"}
    assert "default" not in told
