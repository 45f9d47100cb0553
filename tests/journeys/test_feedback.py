"""What people think of replies: every kind, once per key, on one's own replies only."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gateway import Gateway

KINDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"rating": "up"}, {"kind": "rating", "value": 1.0}),
    ({"rating": "down"}, {"kind": "rating", "value": -1.0}),
    ({"rating": 0.25}, {"kind": "rating", "value": 0.25}),
    ({"rating": 0}, {"kind": "rating", "value": 0.0}),
    ({"comment": "Too long.\x00"}, {"kind": "comment", "text": "Too long.\ufffd"}),
    ({"correction": "Say it so."}, {"kind": "correction", "text": "Say it so."}),
    ({"should_have": "helped"}, {"kind": "should_have_helped"}),
    ({"should_have": "refused", "source": "reviewer:7"}, {"kind": "should_have_refused", "source": "reviewer:7"}),
]


async def give(gateway: Gateway, body: dict[str, Any], **more: Any) -> tuple[int, dict[str, Any]]:
    return await gateway.json("POST", "/v1/feedback", json=body, **more)


@pytest.mark.parametrize(("thought", "stored"), KINDS)
async def test_each_kind_is_recorded(gateway: Gateway, thought: dict[str, Any], stored: dict[str, Any]) -> None:
    reply = await gateway.ask("Hello")
    status, told = await give(gateway, {"target": reply.id} | thought)
    (one,) = await gateway.service.store.feedback(reply.id, "default")
    assert (status, told) == (
        200,
        {
            "object": "feedback",
            "target": reply.id,
            "recorded": [{"id": one.id, "kind": stored["kind"], "created": True}],
        },
    )
    assert {name: getattr(one, name) for name in stored} == stored
    assert gateway.metric("newel_feedback_total", kind=stored["kind"]) == 1


async def test_a_choice_names_both_replies(gateway: Gateway) -> None:
    one, other = [await gateway.ask("Hello") for _ in range(2)]
    status, _ = await give(gateway, {"target": one.id, "choice": {"other": other.id, "better": "other"}})
    (stored,) = await gateway.service.store.feedback(one.id, "default")
    assert (status, stored.kind, stored.other, stored.choice) == (200, "choice", other.id, "other")


async def test_several_kinds_come_in_one_request(gateway: Gateway) -> None:
    reply = await gateway.ask("Hello")
    _, told = await give(gateway, {"target": reply.id, "rating": "down", "comment": "No.", "should_have": "helped"})
    assert [one["kind"] for one in told["recorded"]] == ["rating", "comment", "should_have_helped"]


async def test_the_same_key_and_body_is_recorded_once(gateway: Gateway) -> None:
    reply = await gateway.ask("Hello")
    body, headers = {"target": reply.id, "rating": "up", "comment": "Good."}, {"Idempotency-Key": "k1"}
    first = await give(gateway, body, headers=headers)
    again = await give(gateway, body, headers=headers)
    assert [one["created"] for one in first[1]["recorded"]] == [True, True]
    assert [one["created"] for one in again[1]["recorded"]] == [False, False]
    assert [one["id"] for one in first[1]["recorded"]] == [one["id"] for one in again[1]["recorded"]]
    assert len(await gateway.service.store.feedback(reply.id, "default", history=True)) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"rating": "down", "comment": "Good."},
        {"rating": "up", "comment": "Bad."},
        {"rating": "up"},
        {"comment": "Good."},
        {"rating": "up", "comment": "Good.", "correction": "Better."},
        {"rating": "up", "comment": "Good.", "source": "eve"},
    ],
)
async def test_the_same_key_with_another_body_changes_nothing(gateway: Gateway, other: dict[str, Any]) -> None:
    reply = await gateway.ask("Hello")
    headers = {"Idempotency-Key": "k1"}
    await give(gateway, {"target": reply.id, "rating": "up", "comment": "Good."}, headers=headers)
    status, told = await give(gateway, {"target": reply.id} | other, headers=headers)
    assert (status, told["error"]["code"]) == (422, "conflict")
    assert len(await gateway.service.store.feedback(reply.id, "default", history=True)) == 2


async def test_without_a_key_the_newest_word_counts(gateway: Gateway) -> None:
    reply = await gateway.ask("Hello")
    for rating in ("up", "up", "down"):
        await give(gateway, {"target": reply.id, "rating": rating})
    (stored,) = await gateway.service.store.feedback(reply.id, "default")
    assert stored.value == -1.0
    assert len(await gateway.service.store.feedback(reply.id, "default", history=True)) == 2


async def test_a_reply_that_is_not_there_or_not_ones_own_is_not_found(gateway: Gateway) -> None:
    mine = await gateway.ask("Hello")
    stranger = await gateway.tenant("stranger")
    theirs = await gateway.ask("Hello", key=stranger)
    for body in (
        {"target": "chatcmpl-nothing", "rating": "up"},
        {"target": "\x00", "rating": "up"},
        {"target": theirs.id, "rating": "up"},
        {"target": mine.id, "choice": {"other": theirs.id, "better": "this"}},
        {"target": mine.id, "rating": "up", "choice": {"other": "chatcmpl-nothing", "better": "this"}},
    ):
        status, told = await give(gateway, body)
        assert (status, told["error"]["code"]) == (404, "not_found"), body
    assert await gateway.service.store.feedback(mine.id, "default", history=True) == []
    assert await gateway.service.store.feedback(theirs.id, "stranger", history=True) == []


@pytest.mark.parametrize(
    ("thought", "param"),
    [
        ({}, None),
        ({"rating": "good"}, "rating"),
        ({"rating": 1.5}, "rating"),
        ({"rating": True}, "rating"),
        ({"comment": ""}, "comment"),
        ({"correction": 5}, "correction"),
        ({"choice": {"other": "x"}}, "choice.better"),
        ({"choice": {"other": "x", "better": "both"}}, "choice.better"),
        ({"should_have": "waited"}, "should_have"),
        ({"rating": "up", "source": "a b"}, "source"),
        ({"raiting": "up"}, "raiting"),
    ],
)
async def test_a_mistake_is_named(gateway: Gateway, thought: dict[str, Any], param: str | None) -> None:
    status, told = await give(gateway, {"target": "chatcmpl-1"} | thought)
    assert (status, told["error"]["param"]) == (400, param), told
