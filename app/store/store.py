"""The store: one object in front of the database and the spill."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from alignment.records import Judged
from app.records import (
    NO_LIMITS,
    Delivery,
    DeliveryState,
    Feedback,
    Key,
    KeyLimits,
    KeyScope,
    PolicyVersion,
    Retention,
    RetentionKind,
    Tenant,
    Ticket,
    TicketState,
    Turn,
    now,
)
from app.sealing import Seals, secret_in
from app.store import (
    access,
    audit,
    exports,
    feedback,
    judged,
    outbox,
    person,
    policies,
    privacy,
    replay,
    tables,
    tickets,
    turns,
    vault,
)
from app.store.audit import Audited, AuditEntry
from app.store.chain import Head
from app.store.database import Database, database_url, migrate, upsert
from app.store.erasure import Whose
from app.store.errors import NotFound, SpillFull, StoreDown
from app.store.privacy import Erased
from app.store.replay import Logged
from app.store.spill import Replayed, Spill
from app.store.turns import WithheldKind
from app.store.vault import Owner, Sealed
from app.store.writer import DELAY, TurnWriter

log = logging.getLogger(__name__)
REMEMBERED_KEYS = 10_000
FIRST_REPLAY, LAST_REPLAY = 1.0, 30.0
"""Seconds between two attempts to replay the spill, doubled from the first to the last."""


class Store:
    """What is kept.

    A look-up returns None for what is not there or belongs to another tenant; a change raises NotFound. Every method
    may raise StoreDown. A call that is cancelled still goes to its end; who must know how it ended shields it. Ids
    are opaque; those that come from a client should be bounded (PostgreSQL indexes no more than 2,704 bytes).
    """

    __slots__ = ("_db", "_known_keys", "_replaying", "_seals", "_spill", "writer")

    def __init__(self, database: Database, spill: Spill, seals: Seals, delay: float = DELAY):
        self._db, self._spill, self._seals = database, spill, seals
        self._known_keys: dict[str, tuple[Key, Tenant]] = {}
        self._replaying: asyncio.Task[None] | None = None
        self.writer = TurnWriter(database, self._spill_all, self._put_aside, delay)
        """What writes the turns that are logged: see there for what to watch."""

    @classmethod
    async def open(cls, url: str, spill: Path, delay: float = DELAY, secrets: Sequence[bytes] = ()) -> Self:
        """A store on the migrated database at `url`, with what waited in the folder `spill` replayed into it.

        delay: seconds that a logged turn may wait, to be written with others. secrets: what withheld texts are sealed
        and the audit log is signed with, the first one now, the others before (`app.sealing.sealing_secrets`); else
        the file `secret` beside the spill, which is made.

        Raises ValueError for a URL it does not speak, StoreDown, and SpillFull when the folder cannot be written.
        """
        database_url(url)
        seals = Seals(secrets or [await asyncio.to_thread(secret_in, spill.parent)])
        await migrate(url, seals)
        store = cls(Database(database_url(url), seals), await asyncio.to_thread(Spill, spill), seals, delay)
        try:
            await privacy.seal(store._db, everything=False)
            await store.replay()
        except BaseException:
            await store.close()
            raise
        return store

    async def close(self) -> None:
        """Writes what was logged and closes all connections; what is spilled stays for the next start."""
        await self.writer.close()
        if self._replaying is not None:
            self._replaying.cancel()
            with suppress(asyncio.CancelledError):
                await self._replaying
        await self._db.close()

    @property
    def database(self) -> Database:
        """The database itself, for what keeps rows of its own there: limits, idempotency keys."""
        return self._db

    async def ping(self) -> None:
        """Returns when a row could be written and committed; raises StoreDown."""
        row = {"id": 1, "at": now()}
        await self._db.write(lambda connection: upsert(connection, tables.pulse, row, "at"))

    # --- tenants and keys

    async def put_tenant(self, tenant: Tenant, by: str = "newel") -> None:
        """Makes a tenant, or changes its policy and settings; audited where something changes."""
        await self._db.write(lambda connection: access.put_tenant(connection, tenant, by))

    async def tenant(self, name: str) -> Tenant | None:
        """The tenant of this name."""
        return next(iter(await self._db.read(lambda connection: access.tenants(connection, name))), None)

    async def tenants(self) -> list[Tenant]:
        """All tenants, by name."""
        return await self._db.read(access.tenants)

    async def add_key(
        self, tenant: str, scope: KeyScope = "client", note: str = "", limits: KeyLimits = NO_LIMITS, by: str = "newel"
    ) -> tuple[Key, str]:
        """(the key as stored, its secret): the secret cannot be read again. Audited."""
        return await self._db.write(lambda connection: access.add_key(connection, tenant, scope, note, limits, by))

    async def key(self, secret: str) -> tuple[Key, Tenant] | None:
        """The key with this secret and its tenant; None when there is none, or it was revoked or has expired.

        While the database is down a key that was good when it was last seen is still good: only so can a tenant
        whose `when_store_fails` is "answer" be answered.
        """
        digest = access.fingerprint(secret)
        try:
            found = await self._db.read(lambda connection: access.key(connection, secret))
        except StoreDown:
            if (known := self._known_keys.get(digest)) is None:
                raise
            return known if known[0].good(now()) else None
        self._known_keys.pop(digest, None)
        if found is not None:
            self._known_keys[digest] = found
            if len(self._known_keys) > REMEMBERED_KEYS:
                del self._known_keys[next(iter(self._known_keys))]
        return found

    async def revoke_key(self, id: str, by: str = "newel") -> None:
        """Ends a key, audited; raises NotFound."""
        await self._db.write(lambda connection: access.revoke_key(connection, id, by))

    async def keys(self) -> list[Key]:
        """All keys, oldest first, revoked ones too."""
        return await self._db.read(access.keys)

    # --- turns

    def log(self, turn: Turn) -> None:
        """Queues the turn, to be written with others; at its begin, and again when it has ended. See `TurnWriter.log`.

        What this process has logged its look-ups see at once.
        """
        self.writer.log(turn)

    async def flush(self) -> None:
        """Returns when all that was logged before is in the database or the spill; raises SpillFull."""
        await self.writer.flush()

    async def keep(self, turn: Turn) -> None:
        """Logs the turn and returns when it is in the database or the spill; raises StoreError when it is in neither.

        For a turn whose client is told that it is on record: one with a ticket, or with texts that a person will need.
        """
        await self.writer.keep(turn)

    async def begin(self, turn: Turn) -> None:
        """Stores the turn as open, in a transaction of its own: what was asked, and what the input guard decided."""
        await self._db.write(lambda connection: turns.begin(connection, turn))

    async def finish(self, turn: Turn) -> None:
        """Completes the turn, its ticket and the ticket's delivery in one transaction; a second time does nothing.

        A turn whose `begin` failed is stored whole.
        """
        await self._db.write(lambda connection: turns.finish(connection, turn))

    async def turn(self, id: str, tenant: str) -> Turn | None:
        """The turn as the client saw it, without what was withheld."""
        await self._written(lambda one: one.id == id)
        where = (tables.turns.c.tenant == tenant, tables.turns.c.id == id)
        return next(iter(await self._db.read(lambda connection: turns.load(connection, *where))), None)

    async def turns(self, conversation: str, tenant: str, last: int | None = None) -> list[Turn]:
        """The turns of a conversation, or the `last` ones, oldest first, without what was withheld."""
        await self._written(lambda one: one.conversation == conversation)
        where = (tables.turns.c.tenant == tenant, tables.turns.c.conversation == conversation)
        return await self._db.read(lambda connection: turns.load(connection, *where, last=last))

    async def turn_after(self, tenant: str, tail_hash: str) -> tuple[str, str] | None:
        """(id, conversation) of the tenant's newest turn that ended with this hash: what a resent history continues.

        Of turns with the same hash that several processes wrote it may be the last one of this process.
        """
        if (known := self.writer.ended_with(tenant, tail_hash)) is not None:
            return known
        return await self._db.read(lambda connection: turns.ended_with(connection, tenant, tail_hash))

    async def conversation_after(self, tenant: str, tail_hash: str) -> str | None:
        """The conversation of that turn: where a resent history belongs."""
        found = await self.turn_after(tenant, tail_hash)
        return None if found is None else found[1]

    async def _written(self, which: Callable[[Turn], bool] = lambda _: True) -> None:
        """Returns when no such turn waits to be written, or when it cannot be written now."""
        if self.writer.waiting and self.writer.any(which):
            with suppress(SpillFull):
                await self.writer.flush()

    async def open_turns(self, before: datetime) -> list[str]:
        """The ids of the turns that began before this moment and never finished; they are interrupted now.

        For the start of a gateway. `before` must lie further back than the longest turn: others may be running.
        """
        return await self._db.write(lambda connection: turns.interrupt(connection, before))

    async def withheld(self, turn: str, tenant: str, actor: str, reason: str) -> dict[WithheldKind, str]:
        """The raw texts that were withheld from one side of a turn; who reads them and why is audited.

        Raises NotFound, and ValueError without an actor and a reason.
        """
        await self._written(lambda one: one.id == turn)
        return await self._db.write(lambda connection: turns.read_withheld(connection, turn, tenant, actor, reason))

    # --- the vault: values behind placeholders, encrypted by `app.vault`

    async def sealed_values(self, owner: Owner) -> list[Sealed]:
        """What is kept for this owner and has not expired."""
        return await self._db.read(lambda connection: vault.load(connection, owner))

    async def keep_values(self, owner: Owner, new: Sequence[Sealed], until: datetime) -> None:
        """Keeps new values, and all that the owner has, until then; raises Conflict, and keeps none, when one of the
        placeholders was given out meanwhile."""
        await self._db.write(lambda connection: vault.keep(connection, owner, new, until))

    async def reveal_values(self, owner: Owner, turn: str, actor: str, reason: str) -> list[Sealed]:
        """What is kept for this owner, for somebody who has to see the values of a turn; who and why is audited.

        Raises ValueError without an actor and a reason.
        """
        return await self._db.write(lambda connection: vault.reveal(connection, owner, turn, actor, reason))

    async def forget_values(
        self, tenant: str, actor: str, *, conversation: str | None = None, owner: str | None = None
    ) -> int:
        """How many values of a tenant, of one conversation or of one owner were deleted; that is audited."""
        return await self._db.write(lambda connection: vault.forget(connection, tenant, actor, conversation, owner))

    async def delete_expired_values(self) -> int:
        """How many values had expired and are deleted now."""
        return await self._db.write(vault.delete_expired)

    # --- the spill

    async def spill(self, turn: Turn) -> None:
        """Returns when the turn is on the disk, to be written when the database is back; raises SpillFull.

        May be called with the turn as it was to begin, and again when it is finished.
        """
        await self._spill_all([turn])

    async def _spill_all(self, some: Sequence[Turn]) -> None:
        await self._spill.append(*map(self._seals.sealed, some))
        if self._replaying is None or self._replaying.done():
            self._replaying = asyncio.create_task(self._keep_replaying(), name="newel-replay")

    async def replay(self) -> Replayed:
        """What became of the spilled turns, now in the database; raises StoreDown, and what is left stays."""
        done = await self._spill.replay(self._restore)
        if done != Replayed():
            log.warning(
                "replayed the spill: %d written, %d known, %d torn, %d rejected",
                done.written,
                done.known,
                done.torn,
                done.rejected,
            )
        return done

    @property
    def spilled(self) -> int:
        """How many spilled turns wait for the database, for a gauge."""
        return self._spill.waiting

    async def _put_aside(self, turn: Turn) -> None:
        await self._spill.put_aside(self._seals.sealed(turn))

    async def _restore(self, turn: Turn) -> int:
        turn = self._seals.unsealed(turn)
        ended = turn.ended or bool(turn.error)
        return await self._db.write(lambda connection: (turns.finish if ended else turns.begin)(connection, turn))

    async def _keep_replaying(self) -> None:
        delay = FIRST_REPLAY
        while self._spill.waiting:
            await asyncio.sleep(delay)
            delay = min(delay * 2, LAST_REPLAY)
            try:
                await self.replay()
            except (StoreDown, SpillFull) as error:
                log.warning("%d spilled turns wait: %s", self._spill.waiting, error)

    # --- tickets

    async def tickets(
        self, tenant: str | None = None, state: TicketState | None = None, limit: int = 1000
    ) -> list[Ticket]:
        """Up to `limit` tickets, the one that is due first first."""
        await self._written(lambda one: one.ticket is not None)
        table = tables.tickets
        where = [table.c.tenant == tenant] if tenant is not None else []
        where += [table.c.state == state] if state is not None else []
        return await self._db.read(lambda connection: tickets.load(connection, *where, limit=limit))

    async def ticket(self, id: str, tenant: str | None = None) -> Ticket | None:
        """The ticket; with `tenant` only that tenant's."""
        await self._written(lambda one: one.ticket is not None)
        where = [tables.tickets.c.id == id, *([tables.tickets.c.tenant == tenant] if tenant is not None else [])]
        return next(iter(await self._db.read(lambda connection: tickets.load(connection, *where))), None)

    async def answer_ticket(self, id: str, answer: str, by: str) -> Ticket:
        """The ticket with its answer, once; raises NotFound, or Conflict with who answered or closed it and when."""
        await self._written(lambda one: one.ticket is not None)
        return await self._db.write(lambda connection: tickets.answer(connection, id, answer, by))

    async def close_ticket(self, id: str, by: str) -> Ticket:
        """The ticket, closed; raises NotFound, or Conflict with who closed it and when."""
        await self._written(lambda one: one.ticket is not None)
        return await self._db.write(lambda connection: tickets.close(connection, id, by))

    async def open_ticket_of(self, tenant: str, conversation: str) -> Ticket | None:
        """The open ticket of a conversation; of several the one that is due first."""
        await self._written(lambda one: one.ticket is not None)
        table = tables.tickets
        where = (table.c.tenant == tenant, table.c.conversation == conversation, table.c.state == "open")
        return next(iter(await self._db.read(lambda connection: tickets.load(connection, *where, limit=1))), None)

    async def undelivered_answers(self, tenant: str, conversation: str) -> list[Ticket]:
        """The tickets of a conversation whose answers were not said in it yet."""
        table = tables.tickets
        mine = (table.c.tenant == tenant, table.c.conversation == conversation)
        new = (table.c.answered_at.is_not(None), table.c.delivered_at.is_(None))
        return await self._db.read(lambda connection: tickets.load(connection, *mine, *new))

    async def mark_delivered(self, ids: Sequence[str], turn_id: str) -> None:
        """Notes that the answers of these tickets were said in that turn."""
        await self._db.write(lambda connection: tickets.mark_delivered(connection, ids, turn_id))

    # --- the webhook outbox

    async def deliveries_due(self) -> bool:
        """True when there is something for `claim_deliveries`; cheaper than to claim."""
        return await self._db.read(outbox.due)

    async def claim_deliveries(self, limit: int, lease: float) -> list[Delivery]:
        """Up to `limit` due deliveries, which nobody else gets for `lease` seconds."""
        return await self._db.write(lambda connection: outbox.claim(connection, limit, lease))

    async def settle_delivery(self, id: str, error: str = "", retry_at: datetime | None = None) -> None:
        """Notes how an attempt ended: sent, or with an `error` to be tried again at `retry_at`, or dead without."""
        await self._db.write(lambda connection: outbox.settle(connection, id, error, retry_at))

    async def retry_delivery(self, id: str) -> None:
        """Sends a dead delivery again, from its first attempt; raises NotFound, or Conflict if it is not dead."""
        await self._db.write(lambda connection: outbox.retry(connection, id))

    async def deliveries(self, state: DeliveryState | None = None, limit: int = 1000) -> list[Delivery]:
        """Up to `limit` deliveries, newest first."""
        return await self._db.read(lambda connection: outbox.deliveries(connection, state, limit))

    async def delivery_counts(self) -> dict[DeliveryState, int]:
        """How many deliveries are in each state, for a gauge."""
        return await self._db.read(outbox.counts)

    # --- feedback

    async def add_feedback(self, *said: Feedback, idempotency_key: str | None = None) -> list[tuple[Feedback, bool]]:
        """(the feedback as stored, whether it was created) for all that one person said at once, of one kind each.

        The same key and body, or without a key the same body again, gives the first one. Another body from the same
        source on the same thing takes its place, and both are kept. Raises NotFound, or Conflict for a reused key.

        Another gateway may have answered, and not have written the turn yet: it is looked for a little longer.
        """
        named = {id for one in said for id in (one.turn, one.other)}
        await self._written(lambda one: one.id in named)
        delay = max(self.writer.delay, 0.001)
        for pause in (delay, 2 * delay, 3 * delay, 4 * delay, None):
            try:
                return await self._db.write(lambda connection: feedback.add(connection, said, idempotency_key))
            except NotFound:
                if pause is None:
                    raise
            await asyncio.sleep(pause)
        raise AssertionError  # not reached

    async def feedback(self, turn: str, tenant: str, history: bool = False) -> list[Feedback]:
        """What people say of a turn, oldest first; with `history` also what they said before."""
        return await self._db.read(lambda connection: feedback.of_turn(connection, turn, tenant, history))

    async def judged_turns(
        self, tenant: str | None = None, since: datetime | None = None, actor: str = "export"
    ) -> AsyncIterator[Judged]:
        """The turns that were judged at or after `since`, oldest first, for `alignment.collect`; that is audited."""
        await self._written()
        detail = {"tenant": tenant, "since": since and since.isoformat()}
        await self.audit(actor, "turns.export", tenant or "*", detail)
        after: tuple[datetime, str] | None = None
        while page := await self._judged_page(tenant, since, after):
            for turn in page:
                yield turn
            after = page[-1].at, page[-1].reply.turn

    async def _judged_page(
        self, tenant: str | None, since: datetime | None, after: tuple[datetime, str] | None
    ) -> list[Judged]:
        return await self._db.read(lambda connection: judged.page(connection, tenant, since, after))

    async def logged_turns(
        self, actor: str, last: int, policy: str | None = None, tenant: str | None = None, since: datetime | None = None
    ) -> list[Logged]:
        """The `last` newest judged turns, oldest first, with their raw texts; that these are read is audited."""
        await self._written()
        return await self._db.write(lambda connection: replay.logged(connection, actor, last, policy, tenant, since))

    # --- policies and audit

    async def put_policy(self, name: str, source: str, version: str, by: str) -> PolicyVersion:
        """The version as stored, not active yet; one that is there already stays as it is."""
        return await self._db.write(lambda connection: policies.put(connection, name, source, version, by))

    async def activate_policy(self, name: str, version: str, by: str) -> PolicyVersion:
        """The version, now the active one of its name; audited, as a rollback when it is older than the last one."""
        return await self._db.write(lambda connection: policies.activate(connection, name, version, by))

    async def active_policy(self, name: str) -> PolicyVersion | None:
        """The active version of a policy."""
        found = await self._db.read(lambda connection: policies.versions(connection, name, active=True))
        return next(iter(found), None)

    async def active_versions(self) -> dict[str, str]:
        """The active version of every policy, by its name; without their texts, for those who look often."""
        return await self._db.read(policies.active)

    async def active_policies(self) -> list[PolicyVersion]:
        """The active version of every policy, by name."""
        return await self._db.read(lambda connection: policies.versions(connection, active=True))

    async def policies(self, name: str | None = None) -> list[PolicyVersion]:
        """The versions of one policy or of all, by name and newest first."""
        return await self._db.read(lambda connection: policies.versions(connection, name))

    async def audit(self, actor: str, action: str, subject: str, detail: Mapping[str, object]) -> None:
        """Adds an audit entry: ids and names, never what people wrote."""
        await self._db.write(lambda connection: audit.write(connection, actor, action, subject, detail))

    async def audit_log(self, limit: int = 100, before: int | None = None) -> list[AuditEntry]:
        """The last `limit` audit entries, newest first; with `before` those before that place."""
        return await self._db.read(lambda connection: audit.newest(connection, limit, before))

    async def audit_head(self) -> Head:
        """Where the audit log ends, to be kept elsewhere: with it a log that was cut or made anew is found out."""
        return await self._db.read(audit.head)

    async def verify_audit(self, kept: Head | None = None, after: Head | None = None) -> Audited:
        """What a check of the whole audit log found, or of what came `after` a head that somebody looked into.

        kept: a head that was taken earlier, which the log must contain.
        """
        return await audit.verify(self._db, kept, after)

    # --- privacy: what is sealed, kept, and taken out

    async def seal_withheld(self) -> int:
        """How many withheld texts were sealed with another secret than the first and are now sealed with that."""
        return await privacy.seal(self._db, everything=True)

    async def erase(
        self,
        tenant: str,
        *,
        subject: str = "",
        conversation: str = "",
        actor: str,
        reason: str,
        source: str = "",
        compact: bool = True,
    ) -> Erased:
        """What was removed of a person (`subject`, a pseudonym) or of a conversation: every text, for good; audited.

        source: what the person is called as the source of feedback. compact: rewrites an SQLite file, in which copies
        of deleted rows are left otherwise; writers wait meanwhile. Raises ValueError without an actor and a reason.
        """
        whose = Whose(tenant, subject, conversation)
        await self._written()
        erased = await privacy.erase(self._db, self._spill, whose, actor, reason, source, compact)
        self.writer.forget()
        return erased

    async def everything_of(
        self, tenant: str, *, subject: str = "", conversation: str = "", actor: str, reason: str
    ) -> dict[str, list[dict[str, Any]]]:
        """All that is kept of a person or of a conversation, rows by table, withheld texts in clear; audited."""
        whose = Whose(tenant, subject, conversation)
        return await self._db.write(lambda connection: person.everything(connection, whose, actor, reason))

    async def values_of(self, tenant: str, *, subject: str = "", conversation: str = "") -> list[tuple[Owner, Sealed]]:
        """The sealed values that are kept of a person or of a conversation, and whose each is."""
        whose = Whose(tenant, subject, conversation)
        return await self._db.read(lambda connection: vault.of(connection, whose))

    async def register_export(
        self, folder: Path, tenant: str | None, by: str, lines: Iterable[tuple[str, str]]
    ) -> None:
        """Notes what the files in `folder` hold, (the turn that a line names, a turn whose words are in it) each, so
        that an erasure can take it out of them."""
        path = str(await asyncio.to_thread(folder.resolve))
        await self._db.write(lambda connection: exports.register(connection, path, tenant, by, lines))

    async def sweep(self, kept: Retention, dry: bool = False) -> dict[RetentionKind, int]:
        """How much was too old, by kind, and is removed unless `dry`; in batches, between which others write.

        Erasures that were cut off are finished, and files on this machine are rid of what was erased elsewhere.
        """
        return await privacy.sweep(self._db, self._spill, kept, dry)
