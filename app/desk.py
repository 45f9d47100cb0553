"""The desk: a turn becomes a ticket for a person, and the courier announces tickets to a webhook, signed.

Deliveries follow Standard Webhooks (https://www.standardwebhooks.com, specification 1.0.0).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import logging
import random
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime

import aiohttp

from app.egress import AddressRefused, Allowed, Target
from app.records import Delivery, Ticket, Turn, now
from app.settings import WebhookSettings
from app.store import Store, StoreError
from guardrails.types import Route, Verdict

log = logging.getLogger(__name__)
CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
"""No I, L, O, U: what is read out over a telephone is written down right."""
TOLERANCE = 300.0
"""Seconds that a receiver lets a delivery's time differ from its own clock."""
ANSWER_SECONDS = 15.0
LEASE_SECONDS = 60.0
"""Longer than any attempt, so that a claim never runs out while its holder is still sending."""
LONGEST_DELAY = 86_400.0
BATCH = 10


def hand_over(turn: Turn, verdict: Verdict, route: Route) -> Ticket:
    """A new ticket for this turn on `route`, due `route.due` seconds from now."""
    moment = now()
    return Ticket(
        id="ESC-" + "".join(secrets.choice(CROCKFORD) for _ in range(8)),
        tenant=turn.tenant,
        conversation=turn.conversation,
        turn=turn.id,
        queue=route.queue,
        priority=route.priority,
        due_at=moment + timedelta(seconds=route.due),
        rule=verdict.rule,
        created_at=moment,
    )


def _key(secret: str) -> bytes:
    """The bytes that sign: what follows `whsec_` is base64, anything else is taken as it is."""
    encoded = secret.removeprefix("whsec_")
    if encoded == secret:
        return secret.encode()
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ValueError("webhook.secret starts with whsec_, but what follows is not base64") from error


def sign(secret: str, id: str, timestamp: int, body: bytes) -> str:
    """The value of the header `webhook-signature`: HMAC-SHA256 of `id.timestamp.body`."""
    signed = b"%b.%d.%b" % (id.encode(), timestamp, body)
    return "v1," + base64.b64encode(hmac.digest(_key(secret), signed, hashlib.sha256)).decode()


def verify(
    secret: str, headers: Mapping[str, str], body: bytes, tolerance: float = TOLERANCE, at: float | None = None
) -> bool:
    """True when `body` was signed with `secret` within `tolerance` seconds of `at` (now): for receivers.

    headers: of the request, in any case. Several signatures may be given, for the time when a secret is changed.
    """
    given = {name.lower(): value for name, value in headers.items()}
    id, stamp = given.get("webhook-id", ""), given.get("webhook-timestamp", "")
    if not id or not stamp.isascii() or not stamp.isdigit() or len(stamp) > 12:
        return False
    moment = time.time() if at is None else at
    expected = sign(secret, id, int(stamp), body).encode()
    offered = given.get("webhook-signature", "").split()
    return any(hmac.compare_digest(expected, one.encode()) for one in offered) and abs(moment - int(stamp)) <= tolerance


def retry_after(value: str | None, moment: datetime) -> float:
    """The seconds that a `Retry-After` header asks for (RFC 9110, 10.2.3: seconds or a date); 0 without one."""
    if not value:
        return 0.0
    if value.isascii() and value.isdigit():
        return min(float(value[:12]), LONGEST_DELAY)
    with suppress(ValueError, TypeError):  # a date without a zone cannot be compared
        return min(max((parsedate_to_datetime(value) - moment).total_seconds(), 0.0), LONGEST_DELAY)
    return 0.0


def back_off(attempts: int, first: float) -> float:
    """The seconds before the next attempt: five times longer each time, up to a day, a fifth more or less."""
    return min(first * 5.0 ** (attempts - 1), LONGEST_DELAY) * random.uniform(0.8, 1.2)  # noqa: S311


def _target(settings: WebhookSettings) -> Target | None:
    if not settings.url:
        return None
    try:
        allowed = Allowed.read(settings.allow)
    except ValueError as error:
        raise ValueError(f"webhook.allow: {error}") from None
    try:
        return Target.read(settings.url, allowed)
    except (ValueError, AddressRefused) as error:
        raise ValueError(f"webhook.url: {error} (webhook.allow names internal receivers)") from None


def why(failure: BaseException) -> str:
    """The kind of a failed call, without its text; AddressRefused also where the client has wrapped it."""
    cause: BaseException | None = failure
    while cause is not None:
        if isinstance(cause, AddressRefused):
            return AddressRefused.__name__
        cause = cause.__cause__
    return type(failure).__name__


class Courier:
    """Sends the outbox to the webhook: at least once, in no promised order, several couriers at a time."""

    def __init__(self, store: Store, settings: WebhookSettings, first_delay: float = 5.0, idle: float = 1.0):
        """first_delay: seconds before the second attempt. idle: seconds between two looks at an empty outbox.

        Raises ValueError for a `url` that must not be called (`app.egress`), or that comes without a usable `secret`.
        """
        self._url, self._attempts = settings.url or "", settings.attempts
        self._secret = settings.secret.get_secret_value() if settings.secret else ""
        if self._url and not _key(self._secret):
            raise ValueError("webhook.url is set without webhook.secret: a receiver could not tell who sends")
        self._target = _target(settings)
        self._store, self._first_delay, self._idle = store, first_delay, idle

    async def run(self) -> None:
        """Sends what is due until it is cancelled; returns at once without a `webhook.url`."""
        if not (target := self._target):
            return
        limit = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
        async with aiohttp.ClientSession(connector=target.connector(), timeout=limit) as session:
            sent, failing = 0, False
            while True:
                try:
                    sent, failing = await self._round(session), False
                except StoreError as error:
                    if not failing:
                        log.warning("the outbox cannot be read: %s", error)
                    sent, failing = 0, True
                if sent < BATCH:
                    await asyncio.sleep(self._idle)

    async def _round(self, session: aiohttp.ClientSession) -> int:
        if not await self._store.deliveries_due():
            return 0
        claimed = await self._store.claim_deliveries(BATCH, LEASE_SECONDS)
        await asyncio.gather(*(self._deliver(session, delivery) for delivery in claimed))
        return len(claimed)

    async def _deliver(self, session: aiohttp.ClientSession, delivery: Delivery) -> None:
        try:
            error, wait = await self._post(session, delivery)
        except (aiohttp.ClientError, TimeoutError, OSError) as failure:
            error, wait = why(failure), 0.0
        retry_at = now() + timedelta(seconds=max(wait, back_off(delivery.attempts, self._first_delay)))
        dead = error == "410" or delivery.attempts >= self._attempts  # 410: the receiver wants no more
        if error:
            fate = "given up" if dead else f"again at {retry_at:%Y-%m-%d %H:%M:%S} UTC"
            log.warning("delivery %s failed (%s), attempt %d: %s", delivery.id, error, delivery.attempts, fate)
        try:
            await self._store.settle_delivery(delivery.id, error, None if dead else retry_at)
        except StoreError as failure:  # the claim runs out, and it is sent once more: receivers know its id
            log.warning("how delivery %s ended could not be noted: %s", delivery.id, failure)

    async def _post(self, session: aiohttp.ClientSession, delivery: Delivery) -> tuple[str, float]:
        """(why the receiver did not take it, or empty; the seconds it asks us to wait)."""
        body = json.dumps(delivery.body, separators=(",", ":")).encode()
        stamp = int(time.time())
        headers = {
            "content-type": "application/json",
            "user-agent": "newel",
            "webhook-id": delivery.id,
            "webhook-timestamp": str(stamp),
            "webhook-signature": sign(self._secret, delivery.id, stamp, body),
        }
        # a redirect is an error: the operator named this receiver, and no other one; what it answers is not read
        async with session.post(self._url, data=body, headers=headers, allow_redirects=False) as answer:
            if 200 <= answer.status < 300:
                return "", 0.0
            return str(answer.status), retry_after(answer.headers.get("Retry-After"), now())
