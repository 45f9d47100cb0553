"""The header Idempotency-Key: the same request, sent again, gets the same answer and asks no model twice.

Nothing of the answer is kept here but the id of its turn. A key belongs to one API key, and is stored as a hash.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any, Literal

from app.errors import ApiError, unavailable
from app.logs import event
from app.store import idempotency as rows
from app.store.database import Database
from app.store.errors import StoreDown, StoreError
from app.store.idempotency import Slot

TTL = 86_400.0
"""Seconds for which a key is known."""
FIRST_LOOK, LAST_LOOK = 0.02, 0.5
"""Seconds between two looks at a key that another replica holds, doubled from the first to the last."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A key that is claimed. new: the request is to be answered, and then given to `complete` or `abandon`; done: it
    was answered by `turn`, which is to be told again."""

    slot: Slot
    owner: str
    state: Literal["new", "done"]
    turn: str = ""


@dataclass(slots=True)
class _Running:
    """A claim of this process that is not answered yet; not `claimed` while the database is asked for it."""

    owner: str
    body: str
    claimed: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Idempotency:
    """Claims keys across replicas: the database decides who came first. A claim commits before it is answered.

    lease: seconds after which the key of a gateway that died may be claimed anew; more than the longest request.
    wait: seconds that a second request waits for the first. ttl: seconds for which a key is known.
    """

    __slots__ = ("_db", "_lease", "_running", "_tasks", "_ttl", "_wait")

    def __init__(self, database: Database, lease: float, wait: float = 10.0, ttl: float = TTL):
        self._db, self._lease, self._wait, self._ttl = database, lease, wait, ttl
        self._running: dict[Slot, _Running] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def claim(self, tenant: str, key_id: str, idempotency_key: str, fingerprint: str) -> Claim:
        """The claim of `idempotency_key`; fingerprint is an HMAC of the request's body.

        Raises ApiError 422 where the key came with another body, 409 where the request is still running after `wait`
        seconds, 503 `store_down` without the database: who sends such a key must not be answered twice.
        """
        slot = Slot(tenant, key_id, hashlib.sha256(idempotency_key.encode("utf-8", "surrogatepass")).hexdigest())
        owner, until, pause = token_hex(8), time.monotonic() + self._wait, FIRST_LOOK
        while True:
            # what runs here is known here: no clock can end its lease
            if (mine := self._running.get(slot)) is None:
                found = await self._look(slot, fingerprint, owner)
                if found is not None:
                    return found
            elif mine.claimed and mine.body != fingerprint:
                raise _reused()
            left = until - time.monotonic()
            if left <= 0:
                raise _in_use()
            await _pause(left if mine else min(left, pause), mine)
            pause = min(pause * 2, LAST_LOOK)

    async def complete(self, claim: Claim, turn: str) -> bool:
        """True when all replicas answer the key with this turn from now on; False when the lease had ended before.

        To be awaited before the answer's last piece is sent. Raises ApiError 503 `store_down`; the key is then free
        after its lease.
        """
        try:
            return await self._db.write(lambda connection: rows.complete(connection, claim.slot, claim.owner, turn))
        except StoreDown as error:
            raise _down() from error
        finally:
            self._end(claim)

    async def abandon(self, claim: Claim) -> None:
        """Gives the key up after a failure that told the client nothing: the next request with it is a new one.

        Without the database its lease ends it; that is no reason to tell the client of another failure than the first.
        """
        try:
            await self._db.write(lambda connection: rows.abandon(connection, claim.slot, claim.owner))
        except StoreError as error:
            event("idempotency_key_not_freed", logging.WARNING, kind=type(error).__name__)
        finally:
            self._end(claim)

    async def sweep(self) -> int:
        """How many keys had expired and are forgotten now; for every few minutes."""
        return await self._db.write(rows.delete_expired)

    async def close(self) -> None:
        """Waits for what is being given back; before the database is closed."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _look(self, slot: Slot, body: str, owner: str) -> Claim | None:
        """The claim, or None while another has the key."""
        running = self._running[slot] = _Running(owner, body)
        lease, ttl = self._lease, self._ttl
        claiming = self._db.write(lambda connection: rows.claim(connection, slot, body, owner, lease, ttl))
        asked = asyncio.create_task(claiming)
        try:
            found = await asyncio.shield(asked)
        except asyncio.CancelledError:  # the client is gone, and nobody will end what may be claimed all the same
            self._spawn(self._give_back(asked, Claim(slot, owner, "new")))
            raise
        except BaseException as error:
            self._forget(slot, running)
            if isinstance(error, StoreDown):
                raise _down() from error
            raise
        if found.outcome == "new":
            running.claimed = True
            return Claim(slot, owner, "new")
        self._forget(slot, running)
        if found.outcome == "mismatch":
            raise _reused()
        return Claim(slot, owner, "done", found.turn) if found.outcome == "done" else None

    async def _give_back(self, asked: asyncio.Task[rows.Found], claim: Claim) -> None:
        try:
            if (await asked).outcome == "new":
                await self.abandon(claim)
        except StoreError:
            pass  # then its lease ends it
        finally:
            self._end(claim)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _end(self, claim: Claim) -> None:
        running = self._running.get(claim.slot)
        if running is not None and running.owner == claim.owner:
            self._forget(claim.slot, running)

    def _forget(self, slot: Slot, running: _Running) -> None:
        del self._running[slot]
        running.ended.set()


async def _pause(seconds: float, mine: _Running | None) -> None:
    """Waits that long, or until the request that runs here has ended."""
    if mine is None:
        await asyncio.sleep(seconds)
        return
    try:
        async with asyncio.timeout(seconds):
            await mine.ended.wait()
    except TimeoutError:
        pass


def _down() -> ApiError:
    return unavailable("The Idempotency-Key cannot be looked up just now; try again in a while.", "store_down", 5)


def _reused() -> ApiError:
    return ApiError(
        422,
        "This Idempotency-Key came with another request before: use a new key for a new request.",
        code="idempotency_key_reused",
        param="Idempotency-Key",
    )


def _in_use() -> ApiError:
    return ApiError(
        409,
        "A request with this Idempotency-Key is still being answered: send it again in a second.",
        code="idempotency_key_in_use",
        param="Idempotency-Key",
        retry_after=1,
    )
