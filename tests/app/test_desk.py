"""Tickets, and the courier against a real receiver on loopback."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from secrets import token_hex
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web
from pydantic import SecretStr

from app import desk
from app.desk import CROCKFORD, Courier, back_off, hand_over, retry_after, sign, verify
from app.records import Delivery, Tenant, Ticket, now
from app.settings import WebhookSettings
from app.store import Conflict, NotFound, Store, StoreDown
from app.store.database import Database
from guardrails.types import Action, Verdict
from tests.app.turns import ASKED, ROUTE, SECRET, begun, escalated
from tests.postgres import Cluster

KEY = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
"""The example key of the Standard Webhooks specification."""


# --- tickets


def test_a_turn_that_is_handed_over_becomes_a_ticket_on_its_route() -> None:
    turn, before = begun("acme"), now()
    ticket = hand_over(turn, Verdict(Action.ESCALATE, "A person will answer.", rule="harm", route="hr"), ROUTE)
    assert re.fullmatch(rf"ESC-[{CROCKFORD}]{{8}}", ticket.id)
    assert (ticket.tenant, ticket.conversation, ticket.turn) == ("acme", turn.conversation, turn.id)
    assert (ticket.queue, ticket.priority, ticket.rule, ticket.state) == ("hr-desk", "high", "harm", "open")
    assert ticket.due_at == ticket.created_at + timedelta(seconds=3600)
    assert before <= ticket.created_at <= now()
    assert ticket.id != hand_over(turn, Verdict(Action.ESCALATE, ""), ROUTE).id


def test_ticket_numbers_have_no_letters_that_look_like_others() -> None:
    assert len(set(CROCKFORD)) == 32
    assert not set("ILOU") & set(CROCKFORD)


# --- signatures


def test_a_signature_is_that_of_the_specification() -> None:
    # https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md, "Signature scheme"
    body = b'{"test": 2432232314}'
    assert sign(KEY, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body) == (
        "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    )


def signed(secret: str = KEY, body: bytes = b"{}", at: float = 1000.0) -> dict[str, str]:
    signature = sign(secret, "msg_1", int(at), body)
    return {"Webhook-Id": "msg_1", "Webhook-Timestamp": str(int(at)), "Webhook-Signature": signature}


@pytest.mark.parametrize("secret", [KEY, "a plain secret", "pl\u00e4in"])
def test_a_genuine_delivery_is_verified(secret: str) -> None:
    assert verify(secret, signed(secret), b"{}", at=1000.0)
    assert verify(secret, {name.upper(): value for name, value in signed(secret).items()}, b"{}", at=1299.0)
    rotated = signed(secret) | {"Webhook-Signature": f"v1,AAAA v1a,xyz {signed(secret)['Webhook-Signature']}"}
    assert verify(secret, rotated, b"{}", at=1000.0)


@pytest.mark.parametrize(
    ("changes", "body", "at"),
    [
        ({}, b"{ }", 1000.0),
        ({}, b"{}", 1301.0),
        ({}, b"{}", 699.0),
        ({"Webhook-Id": "msg_2"}, b"{}", 1000.0),
        ({"Webhook-Id": ""}, b"{}", 1000.0),
        ({"Webhook-Timestamp": "1001"}, b"{}", 1000.0),
        ({"Webhook-Timestamp": "soon"}, b"{}", 1000.0),
        ({"Webhook-Timestamp": "\u0661\u0660"}, b"{}", 1000.0),
        ({"Webhook-Timestamp": "9" * 5000}, b"{}", 1000.0),
        ({"Webhook-Timestamp": "-1000"}, b"{}", 1000.0),
        ({"Webhook-Signature": ""}, b"{}", 1000.0),
        ({"Webhook-Signature": "v1,\u00fc"}, b"{}", 1000.0),
        ({"Webhook-Signature": signed("another secret")["Webhook-Signature"]}, b"{}", 1000.0),
        ({"Webhook-Signature": signed()["Webhook-Signature"].removeprefix("v1,")}, b"{}", 1000.0),
    ],
)
def test_a_delivery_that_is_not_genuine_is_not_verified(changes: dict[str, str], body: bytes, at: float) -> None:
    assert not verify(KEY, signed() | changes, body, at=at)


def test_a_delivery_without_headers_is_not_verified() -> None:
    assert not verify(KEY, {}, b"{}")


def test_a_key_of_the_wrong_form_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="what follows is not base64"):
        sign("whsec_not base64!", "msg_1", 1, b"")


@pytest.mark.parametrize(
    ("url", "secret", "message"),
    [
        ("http://host/hook", None, "without webhook.secret"),
        ("http://host/hook", "", "without webhook.secret"),
        ("http://host/hook", "whsec_", "without webhook.secret"),
        ("http://host/hook", "whsec_%%%", "not base64"),
        ("ftp://host/hook", KEY, "http or https"),
        ("host/hook", KEY, "http or https"),
        ("http:///hook", KEY, "http or https"),
        ("http://host/hook", KEY, "must be https, or 'host:80' must be allowed"),
        ("https://user:password@host/hook", KEY, "must not carry a name and a password"),
        ("https://127.0.0.1/hook", KEY, "127.0.0.1 is not a public address"),
        ("https://169.254.169.254/latest/meta-data", KEY, "is not a public address"),
        ("https://[::1]/hook", KEY, "is not a public address"),
        ("https://[::ffff:10.0.0.1]/hook", KEY, "is not a public address"),
    ],
)
def test_a_courier_does_not_start_with_settings_that_cannot_work(
    store_nowhere: Store, url: str, secret: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Courier(store_nowhere, WebhookSettings(url=url, secret=SecretStr(secret) if secret is not None else None))


@pytest.fixture
async def store_nowhere(tmp_path: Path) -> AsyncIterator[Store]:
    store = await Store.open(f"sqlite+aiosqlite:///{tmp_path}/newel.db", tmp_path / "spill")
    yield store
    await store.close()


def test_a_courier_does_not_start_with_an_allowance_that_says_nothing(store_nowhere: Store) -> None:
    with pytest.raises(ValueError, match=r"webhook\.allow: 'internal' is neither host:port nor a network"):
        Courier(store_nowhere, WebhookSettings(url="https://host/", secret=SecretStr(KEY), allow=["internal"]))


async def test_a_courier_without_a_url_has_nothing_to_do(store_nowhere: Store) -> None:
    async with asyncio.timeout(5):
        await Courier(store_nowhere, WebhookSettings()).run()


# --- waiting


MOMENT = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0.0),
        ("", 0.0),
        ("120", 120.0),
        ("0", 0.0),
        ("Mon, 23 Nov 2026 12:01:30 GMT", 90.0),
        ("Mon, 23 Nov 2026 11:00:00 GMT", 0.0),
        ("Mon, 23 Nov 2026 12:01:30", 0.0),
        ("-5", 0.0),
        ("1e9", 0.0),
        ("soon", 0.0),
        ("\u0661\u0662", 0.0),
        ("9" * 400, 86_400.0),
        ("Mon, 23 Nov 2099 12:00:00 GMT", 86_400.0),
    ],
)
def test_retry_after_is_read_in_both_its_forms(header: str | None, seconds: float) -> None:
    assert retry_after(header, MOMENT) == seconds


def test_each_wait_is_five_times_longer_and_no_two_are_alike() -> None:
    waits = [[back_off(attempt, 5.0) for _ in range(50)] for attempt in range(1, 9)]
    for attempt, sample in enumerate(waits):
        middle = min(5.0 * 5**attempt, 86_400.0)
        assert all(0.8 * middle <= wait <= 1.2 * middle for wait in sample)
        assert len(set(sample)) > 1


# --- the courier


class Receiver:
    """An endpoint that answers what it is told to, and keeps what it got."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes, float]] = []
        self.answers: list[Callable[[], Awaitable[web.StreamResponse]]] = []
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.got.append((dict(request.headers), await request.read(), time.monotonic()))
        return await self.answers.pop(0)() if self.answers else web.Response(status=204)

    def will(self, *statuses: int, headers: dict[str, str] | None = None) -> None:
        async def respond(status: int) -> web.Response:
            return web.Response(status=status, headers=headers)

        self.answers += [lambda status=status: respond(status) for status in statuses]

    def bodies(self, ticket: Ticket) -> list[dict]:
        bodies = [json.loads(body) for _, body, _ in self.got]
        return [body for body in bodies if body["data"]["id"] == ticket.id]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    application = web.Application()
    application.router.add_post("/hook", receiver.handle)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    receiver.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/hook"
    yield receiver
    await runner.cleanup()


@asynccontextmanager
async def couriers(store: Store, receiver: Receiver, count: int = 1, attempts: int = 3) -> AsyncIterator[None]:
    settings = WebhookSettings(url=receiver.url, secret=SecretStr(KEY), attempts=attempts, allow=["127.0.0.0/8"])
    running = [asyncio.create_task(Courier(store, settings, 0.02, idle=0.01).run()) for _ in range(count)]
    try:
        yield
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


@pytest.fixture
async def store(store: Store) -> Store:
    """A store whose outbox is empty: deliveries of earlier tests must not wake up in this one."""
    for delivery in await store.deliveries("pending"):
        await store.settle_delivery(delivery.id)
    return store


async def ticket_of(store: Store, tenant: str) -> Ticket:
    turn = escalated(begun(tenant))
    await store.finish(turn)
    return turn.ticket


async def delivery_of(store: Store, ticket: Ticket, kind: str = "ticket.created") -> Delivery:
    (found,) = [one for one in await store.deliveries() if (one.body["data"]["id"], one.kind) == (ticket.id, kind)]
    return found


async def until(store: Store, ticket: Ticket, state: str) -> Delivery:
    async with asyncio.timeout(20):
        while (delivery := await delivery_of(store, ticket)).state != state:
            await asyncio.sleep(0.01)
    return delivery


async def test_a_ticket_reaches_its_receiver_signed_and_redacted(store: Store, tenant: str, receiver: Receiver) -> None:
    ticket = await ticket_of(store, tenant)
    async with couriers(store, receiver):
        assert (await until(store, ticket, "sent")).attempts == 1
    ((headers, body, _),) = receiver.got
    assert verify(KEY, headers, body)
    assert not verify("whsec_" + base64.b64encode(b"another").decode(), headers, body)
    assert headers["webhook-id"] == f"msg_{ticket.id}_created"
    assert headers["Content-Type"] == "application/json"
    event = json.loads(body)
    assert event["type"] == "ticket.created"
    assert datetime.fromisoformat(event["timestamp"]).tzinfo is not None
    assert event["data"] == {
        "id": ticket.id,
        "tenant": tenant,
        "conversation": ticket.conversation,
        "turn": ticket.turn,
        "queue": "hr-desk",
        "priority": "high",
        "rule": "harm",
        "state": "open",
        "created_at": ticket.created_at.isoformat(),
        "due_at": ticket.due_at.isoformat(),
        "asked": ASKED,
    }
    assert SECRET.encode() not in body


async def test_an_answer_reaches_the_receiver_too(store: Store, tenant: str, receiver: Receiver) -> None:
    ticket = await ticket_of(store, tenant)
    await store.answer_ticket(ticket.id, "Your band is E4.", "ana")
    async with couriers(store, receiver):
        await until(store, ticket, "sent")
        async with asyncio.timeout(20):
            while len(receiver.bodies(ticket)) < 2:
                await asyncio.sleep(0.01)
    data = next(body["data"] for body in receiver.bodies(ticket) if body["type"] == "ticket.answered")
    assert (data["state"], data["answer"], data["answered_by"]) == ("answered", "Your band is E4.", "ana")


@pytest.mark.parametrize("status", [500, 503, 404, 302, 429])
async def test_a_delivery_that_is_not_taken_is_sent_again(
    store: Store, tenant: str, receiver: Receiver, status: int
) -> None:
    receiver.will(status, status, headers={"Location": receiver.url})
    ticket = await ticket_of(store, tenant)
    async with couriers(store, receiver):
        delivery = await until(store, ticket, "sent")
    assert (delivery.attempts, delivery.error) == (3, "")
    ids = [headers["webhook-id"] for headers, _, _ in receiver.got]
    assert ids == [delivery.id] * 3  # by which a receiver knows what it has seen
    assert all(verify(KEY, headers, body) for headers, body, _ in receiver.got)


async def test_a_delivery_is_given_up_after_its_attempts_and_can_be_revived(
    store: Store, tenant: str, receiver: Receiver, caplog
) -> None:
    receiver.will(500, 500, 500)
    ticket = await ticket_of(store, tenant)
    dead_before = (await store.delivery_counts())["dead"]
    with caplog.at_level(logging.DEBUG):
        async with couriers(store, receiver):
            delivery = await until(store, ticket, "dead")
            await asyncio.sleep(0.1)
    assert (delivery.attempts, delivery.error, len(receiver.got)) == (3, "500", 3)
    assert (await store.delivery_counts())["dead"] == dead_before + 1
    assert delivery in await store.deliveries("dead")
    assert "given up" in caplog.text
    assert "Lisbon" not in caplog.text
    await store.retry_delivery(delivery.id)
    async with couriers(store, receiver):
        assert (await until(store, ticket, "sent")).attempts == 1
    with pytest.raises(Conflict, match="is sent: only a dead one"):
        await store.retry_delivery(delivery.id)
    with pytest.raises(NotFound, match="no delivery 'msg_none'"):
        await store.retry_delivery("msg_none")


async def test_a_receiver_that_is_gone_for_good_is_not_asked_again(
    store: Store, tenant: str, receiver: Receiver
) -> None:
    receiver.will(410)
    ticket = await ticket_of(store, tenant)
    async with couriers(store, receiver):
        delivery = await until(store, ticket, "dead")
    assert (delivery.attempts, delivery.error) == (1, "410")


async def test_a_receiver_is_not_asked_before_the_time_it_named(store: Store, tenant: str, receiver: Receiver) -> None:
    receiver.will(503, headers={"Retry-After": "1"})
    ticket = await ticket_of(store, tenant)
    async with couriers(store, receiver):
        await until(store, ticket, "sent")
    first, second = [when for _, _, when in receiver.got]
    assert second - first >= 1.0


async def test_a_receiver_that_does_not_listen_costs_attempts(store: Store, tenant: str, receiver: Receiver) -> None:
    ticket = await ticket_of(store, tenant)
    receiver.url = "http://127.0.0.1:1/hook"
    async with couriers(store, receiver, attempts=2):
        delivery = await until(store, ticket, "dead")
    assert (delivery.attempts, delivery.error) == (2, "ClientConnectorError")


async def test_a_name_that_leads_inside_is_not_called(
    store: Store, tenant: str, receiver: Receiver, monkeypatch
) -> None:
    async def inside(self, host: str, port: int = 0, family: int = 0) -> list[dict]:
        place = {"hostname": host, "host": "127.0.0.1", "port": int(urlsplit(receiver.url).port or 0)}
        return [place | {"family": socket.AF_INET, "proto": 0, "flags": 0}]

    monkeypatch.setattr(aiohttp.ThreadedResolver, "resolve", inside)
    monkeypatch.setattr(aiohttp.AsyncResolver, "resolve", inside)
    ticket = await ticket_of(store, tenant)
    settings = WebhookSettings(url="https://hooks.example.com/hook", secret=SecretStr(KEY), attempts=1)
    task = asyncio.create_task(Courier(store, settings, 0.02, idle=0.01).run())
    delivery = await until(store, ticket, "dead")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (delivery.error, receiver.got) == ("AddressRefused", [])


async def test_an_endless_answer_is_not_read(store: Store, tenant: str, receiver: Receiver) -> None:
    sent = 0

    async def endless() -> web.StreamResponse:
        async def pieces() -> AsyncIterator[bytes]:
            nonlocal sent
            while True:
                sent += 65_536
                yield bytes(65_536)

        return web.Response(body=pieces())

    receiver.answers = [endless]
    ticket = await ticket_of(store, tenant)
    async with couriers(store, receiver):
        assert (await until(store, ticket, "sent")).attempts == 1
    assert sent < 64 << 20


async def test_a_receiver_that_does_not_answer_costs_attempts(
    store: Store, tenant: str, receiver: Receiver, monkeypatch
) -> None:
    async def never() -> web.StreamResponse:
        await asyncio.sleep(60)
        raise AssertionError

    monkeypatch.setattr(desk, "ANSWER_SECONDS", 0.2)
    receiver.answers = [never, never]
    ticket = await ticket_of(store, tenant)
    async with couriers(store, receiver, attempts=2):
        delivery = await until(store, ticket, "dead")
    assert (delivery.attempts, delivery.error) == (2, "TimeoutError")


async def test_one_bad_delivery_does_not_hold_up_the_others(store: Store, tenant: str, receiver: Receiver) -> None:
    tickets = [await ticket_of(store, tenant) for _ in range(25)]
    receiver.will(500)
    async with couriers(store, receiver):
        for ticket in tickets:
            await until(store, ticket, "sent")
    assert len(receiver.got) == 26


async def test_several_couriers_do_not_send_the_same_at_the_same_time(
    store: Store, url: str, tenant: str, receiver: Receiver, tmp_path: Path
) -> None:
    tickets = [await ticket_of(store, tenant) for _ in range(30)]
    second = await Store.open(url, tmp_path / "second")
    async with couriers(store, receiver, count=2), couriers(second, receiver, count=2):
        for ticket in tickets:
            await until(store, ticket, "sent")
    await second.close()
    assert [len(receiver.bodies(ticket)) for ticket in tickets] == [1] * 30


async def test_a_claim_is_the_holders_until_it_runs_out(store: Store, tenant: str) -> None:
    ticket = await ticket_of(store, tenant)
    (claimed,) = await store.claim_deliveries(10, lease=0.3)
    assert claimed.body["data"]["id"] == ticket.id
    assert await store.claim_deliveries(10, lease=0.3) == []
    assert not await store.deliveries_due()
    await asyncio.sleep(0.4)
    (again,) = await store.claim_deliveries(10, lease=60)
    assert (again.id, again.attempts) == (claimed.id, 2)
    await store.settle_delivery(again.id)


async def test_a_courier_that_died_leaves_its_delivery_to_the_next(
    store: Store, url: str, tenant: str, receiver: Receiver, tmp_path: Path
) -> None:
    ticket = await ticket_of(store, tenant)
    await store.claim_deliveries(10, lease=0.2)  # and then the process was killed
    restarted = await Store.open(url, tmp_path / "restarted")
    async with couriers(restarted, receiver):
        delivery = await until(restarted, ticket, "sent")
    await restarted.close()
    assert delivery.attempts == 2


async def test_a_delivery_that_was_sent_stays_sent(store: Store, tenant: str) -> None:
    ticket = await ticket_of(store, tenant)
    (claimed,) = await store.claim_deliveries(10, lease=60)
    await store.settle_delivery(claimed.id)
    await store.settle_delivery(claimed.id, "500")  # from a holder whose claim ran out
    assert (await delivery_of(store, ticket)).state == "sent"


async def test_a_courier_outlives_a_store_that_fails(
    store: Store, tenant: str, receiver: Receiver, monkeypatch, caplog
) -> None:
    ticket = await ticket_of(store, tenant)
    read = Database.read

    async def down(self, work):
        raise StoreDown("away")

    monkeypatch.setattr(Database, "read", down)
    async with couriers(store, receiver):
        await asyncio.sleep(0.1)
        monkeypatch.setattr(Database, "read", read)
        await until(store, ticket, "sent")
    assert caplog.text.count("the outbox cannot be read: away") == 1  # told once, not at every look


@pytest.mark.postgres
async def test_tickets_are_announced_after_the_server_was_killed(
    cluster: Cluster, receiver: Receiver, tmp_path: Path
) -> None:
    store = await Store.open(cluster.create_database(f"newel_{token_hex(4)}"), tmp_path / "spill")
    await store.put_tenant(Tenant("acme", "hr"))
    ticket = await ticket_of(store, "acme")
    await asyncio.to_thread(cluster.stop)
    async with couriers(store, receiver):
        await asyncio.sleep(0.1)
        await asyncio.to_thread(cluster.start)
        await until(store, ticket, "sent")
    await store.close()
    assert len(receiver.got) == 1
