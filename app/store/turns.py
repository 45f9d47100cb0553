"""Turns as rows: one in `turns`, one a hit in `verdicts`, and what was withheld in a table of its own.

A turn is first drafted, which takes it down as it stands, and then written together with others. `begin` and `finish`
write a single one.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any, Literal

import orjson
from sqlalchemy import ColumnElement, RowMapping, literal, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.records import Ticket, Turn, now
from app.sealing import Seals, Unreadable
from app.store import audit, erasure, outbox, tables, tickets
from app.store.database import Bulk, Quick, insert_lite, insert_many, moment, seals_of
from app.store.errors import NotFound, StoreError
from app.store.history import Kept, Missing, Record, Records, encoded, kept, marks, said_in
from app.store.tables import storable
from guardrails.types import Action, Finding, Hit, Message, Stage, ToolMessage, Verdict

INTERRUPTED = "interrupted"
"""The `error` of a turn that began and never came to its end."""
MOST_FINDINGS = 1000
"""Findings of one rule in one text that are kept; a text full of numbers has any number of them."""
LEVELS = 64
"""Earlier turns that are looked up at once to put a history together."""
WithheldKind = Literal["asked", "said"]
_COLUMNS = (
    *("id", "tenant", "conversation", "key", "policy", "model", "request_id", "streamed", "subject"),
    *("history", "asked", "said", "reasoning", "calls", "input_action", "input_rule", "input_route"),
    *("output_action", "output_rule", "output_route", "action", "rule", "finish_reason", "error", "ticket"),
    *("prompt_tokens", "completion_tokens", "first_token_ms", "total_ms", "head_hash", "tail_hash", "retry_of"),
    *("parent", "linked", "release", "surface", "priority", "trace", "choice", "cached_tokens"),
    *("guard_input_ms", "guard_output_ms"),
    *("created_at", "finished_at"),
)
_OPEN = Bulk(tables.turns, _COLUMNS)
_ENDED = Bulk(
    tables.turns,
    _COLUMNS,
    tuple(f'"{name}" = new."{name}"' for name in _COLUMNS if name not in ("id", "tenant")),
    f"old.tenant = new.tenant AND (old.finished_at IS NULL OR old.error = '{INTERRUPTED}')",
)
_CONVERSATIONS = Bulk(
    tables.conversations,
    ("tenant", "id", "subject", "created_at", "last_at"),
    ("last_at = CASE WHEN new.last_at > old.last_at THEN new.last_at ELSE old.last_at END",),
)
_VERDICTS = Bulk(tables.verdicts, ("turn", "stage", "place", "rule", "action", "mode", "broken", "message", "findings"))
_WITHHELD = Bulk(tables.withheld, ("turn", "kind", "text"))
_LINKS = "SELECT count(*) FROM turns WHERE linked IS NOT 0 AND id IN (SELECT value FROM json_each(?))"
Rows = tuple[Bulk, list[tuple[Any, ...]]]
"""What one statement inserts."""
_LATER = ("reasoning", "parent", "release", "surface", "priority", "trace", "choice", "cached_tokens")
"""Columns that rows of earlier versions leave empty: they read as the field's default."""
_ELSEWHERE = ("history", "calls", "ticket", "finished_at", "linked")
_PLAIN = tuple(name for name in _COLUMNS if name not in _ELSEWHERE and not name.startswith(("input_", "output_")))
_KEPT = [
    tables.turns.c[name] for name in ("id", "parent", "linked", "history", "asked", "said", "calls", "finish_reason")
]


class Mixed(Exception):
    """Some of several turns were there already, or belong to another tenant: they have to be written one by one."""


class Unlinked(Exception):
    """The turns with these ids are gone or cut, though turns that are to be written continue them."""

    def __init__(self, ids: frozenset[str]):
        super().__init__(", ".join(sorted(ids)))
        self.ids = ids


@dataclass(slots=True)
class Draft:
    """A turn as it stood when it was drafted, ready to be written.

    record: what turns that continue it share with it, once it has ended without an error. link: the turn whose record
    its history needs. sealed: what was withheld is sealed already.
    """

    id: str
    ended: bool
    row: tuple[Any, ...]
    conversation: tuple[Any, ...]
    verdicts: list[tuple[Any, ...]]
    withheld: list[tuple[WithheldKind, str]]
    ticket: Ticket | None
    question: str
    record: Record | None
    link: str
    sealed: bool

    @property
    def tenant(self) -> str:
        """The tenant's name."""
        return str(self.conversation[0])


def draft(turn: Turn, ended: bool, records: Mapping[str, Record], at: str, sealed: bool = False) -> Draft:
    """The turn as it stands now, to be written as open or as ended at the time `at` (`database.moment`).

    records: of the turns that may be its parent; without its parent's the history is kept whole.
    """
    messages = [encoded(message) for message in turn.history]
    own, before = b"", records.get(turn.parent) if turn.parent else None
    lasting = ended and not turn.error
    if messages and (before is not None or lasting):
        own = marks(messages)
    known = before is not None and (before.tenant, before.conversation) == (turn.tenant, turn.conversation)
    history, linked = kept(messages, own, before.marks if before is not None and known else b"")
    record = None
    if lasting:
        added = said_in(turn.asked, turn.said, turn.calls, turn.finish_reason)
        record = Record(turn.tenant, turn.conversation, own + marks(encoded(message) for message in added))
    began = moment(turn.created_at)
    tenant, conversation = storable(turn.tenant), storable(turn.conversation)
    return Draft(
        id=turn.id,
        ended=ended,
        row=_row(turn, history, linked, began, at if ended else None),
        conversation=(tenant, conversation, storable(turn.subject), began, began),
        verdicts=_verdicts(turn) if turn.input is not None or turn.output is not None else [],
        withheld=_withheld(turn) if turn.withheld_asked or turn.withheld_said else [],
        ticket=turn.ticket if ended else None,
        question=turn.question if ended and turn.ticket is not None else "",
        record=record,
        link=turn.parent if linked else "",
        sealed=sealed,
    )


def _row(turn: Turn, history: str, linked: bool, began: str, at: str | None) -> tuple[Any, ...]:
    """The values of `_COLUMNS`."""
    of = storable
    calls = f"[{b','.join([encoded(call) for call in turn.calls]).decode()}]" if turn.calls else None
    return (
        *(of(turn.id), of(turn.tenant), of(turn.conversation), of(turn.key), of(turn.policy), of(turn.model)),
        *(of(turn.request_id), turn.streamed, of(turn.subject)),
        *(history, of(turn.asked), of(turn.said), of(turn.reasoning), calls),
        *_decision(turn.input),
        *_decision(turn.output),
        *(of(turn.action), of(turn.rule), of(turn.finish_reason), of(turn.error), turn.ticket and turn.ticket.id),
        *(turn.prompt_tokens, turn.completion_tokens, turn.first_token_ms, turn.total_ms),
        *(of(turn.head_hash), of(turn.tail_hash), of(turn.retry_of)),
        *(of(turn.parent) or None, linked or None, of(turn.release) or None, of(turn.surface)),
        *(of(turn.priority), of(turn.trace) or None, turn.choice, turn.cached_tokens),
        *(turn.guard_input_ms, turn.guard_output_ms),
        *(began, at),
    )


def _decision(verdict: Verdict | None) -> tuple[str | None, str | None, str | None]:
    if verdict is None:
        return (None, None, None)
    return (verdict.action.word, storable(verdict.rule), storable(verdict.route))


def _verdicts(turn: Turn) -> list[tuple[Any, ...]]:
    """The values of `_VERDICTS`, for each hit."""
    rows: list[tuple[Any, ...]] = []
    for stage, verdict in (("input", turn.input), ("output", turn.output)):
        for place, hit in enumerate(verdict.hits if verdict else ()):
            found = [(storable(one.label), one.start, one.end, one.score) for one in hit.findings[:MOST_FINDINGS]]
            told = (storable(hit.rule), hit.action.word, hit.mode, storable(hit.broken), hit.message)
            rows.append((turn.id, stage, place, *told, orjson.dumps(found).decode()))
    return rows


def _withheld(turn: Turn) -> list[tuple[WithheldKind, str]]:
    kinds: tuple[tuple[WithheldKind, str], ...] = (("asked", turn.withheld_asked), ("said", turn.withheld_said))
    return [(kind, text) for kind, text in kinds if text]


async def write(connection: AsyncConnection, drafts: Sequence[Draft]) -> int:
    """How many turns were inserted or completed, with their conversations, verdicts, withheld texts and tickets.

    Of two drafts of one turn only one may be given. Raises Mixed when one of several was there already, Unlinked.
    """
    drafts = await erasure.kept(connection, drafts)
    await _require_links(connection, drafts)
    _, ended, begun = [await insert_many(connection, *rows) for rows in _turns(drafts)]
    if _all(drafts, ended + begun):
        for rows in _evidence(drafts, seals_of(connection)):
            await insert_many(connection, *rows)
        await _put_tickets(connection, drafts)
    return ended + begun


def batch(drafts: Sequence[Draft], seals: Seals) -> Quick[int]:
    """`write` for `Database.write`, which SQLite does in one trip unless there is a ticket, or something against it."""
    return Quick(partial(write, drafts=drafts), partial(_write_lite, drafts=drafts, seals=seals))


def _write_lite(connection: sqlite3.Connection, drafts: Sequence[Draft], seals: Seals) -> int | None:
    """What `write` returns; None, and nothing is written, when it has to be asked."""
    if not drafts or any(one.ticket is not None for one in drafts):
        return None
    if not erasure.none_since(connection, min(one.conversation[3] for one in drafts)):
        return None
    links = _links(drafts)
    if links and connection.execute(_LINKS, (orjson.dumps(links).decode(),)).fetchone()[0] < len(links):
        return None
    _, ended, begun = [insert_lite(connection, *rows) for rows in _turns(drafts)]
    for rows in _evidence(drafts, seals) if _all(drafts, ended + begun) else ():
        insert_lite(connection, *rows)
    return ended + begun


def _all(drafts: Sequence[Draft], wrote: int) -> bool:
    """Whether all were written; raises Mixed when one of several was not."""
    if wrote < len(drafts) and len(drafts) > 1:
        raise Mixed
    return wrote == len(drafts)


def _turns(drafts: Sequence[Draft]) -> tuple[Rows, Rows, Rows]:
    """The conversations, the turns that have ended, and those that run."""
    met = {one.conversation[:2]: one.conversation for one in drafts}
    talks = [met[key] for key in sorted(met)]  # in one order: no deadlock
    ended, begun = [one.row for one in drafts if one.ended], [one.row for one in drafts if not one.ended]
    return (_CONVERSATIONS, talks), (_ENDED, ended), (_OPEN, begun)


def _evidence(drafts: Sequence[Draft], seals: Seals) -> tuple[Rows, Rows]:
    """The verdicts, and what was withheld."""
    verdicts = [row for one in drafts for row in one.verdicts]
    raw = [
        (one.id, kind, storable(text if one.sealed else seals.seal(one.tenant, one.id, kind, text)))
        for one in drafts
        for kind, text in one.withheld
    ]
    return (_VERDICTS, verdicts), (_WITHHELD, raw)


def _links(drafts: Sequence[Draft]) -> list[str]:
    """The turns that these continue, but for those that are among them."""
    return sorted({one.link for one in drafts if one.link} - {one.id for one in drafts})


async def _require_links(connection: AsyncConnection, drafts: Sequence[Draft]) -> None:
    """Holds the turns that are continued, lest somebody delete or cut them before this is written."""
    links = _links(drafts)
    if links:
        table = tables.turns
        query = select(table.c.id).where(table.c.id.in_(links), table.c.linked.is_not(False))
        found = set((await connection.execute(query.order_by(table.c.id).with_for_update(read=True))).scalars())
        if gone := frozenset(links) - found:
            raise Unlinked(gone)


async def _put_tickets(connection: AsyncConnection, drafts: Sequence[Draft]) -> None:
    for one in drafts:
        if one.ticket is not None:
            await tickets.insert(connection, one.ticket)
            await outbox.announce(connection, "ticket.created", one.ticket, one.question)


async def begin(connection: AsyncConnection, turn: Turn, sealed: bool = False) -> int:
    """Inserts the turn as open, with what is known of it, and its conversation; 0 when it is there already."""
    return await write(connection, [draft(turn, False, await _of_parent(connection, turn), "", sealed)])


async def finish(connection: AsyncConnection, turn: Turn, sealed: bool = False) -> int:
    """Completes the turn, its ticket and the ticket's announcement; 0 when that was done before.

    A turn whose `begin` was lost is inserted whole, and one that was given up as interrupted is completed after all.
    A ticket that an earlier turn opened is only pointed at.
    """
    return await write(connection, [draft(turn, True, await _of_parent(connection, turn), moment(now()), sealed)])


async def _of_parent(connection: AsyncConnection, turn: Turn) -> dict[str, Record]:
    return await records(connection, [turn.parent] if turn.parent else [])


async def records(connection: AsyncConnection, ids: Sequence[str]) -> dict[str, Record]:
    """The records of those of these turns that have ended without an error, by id."""
    table = tables.turns
    if not ids:
        return {}
    query = select(*_KEPT, table.c.tenant, table.c.conversation).where(table.c.id.in_(ids))
    good = (table.c.finished_at.is_not(None), table.c.error == "", table.c.linked.is_not(False))
    rows = (await connection.execute(query.where(*good))).mappings().all()
    known = Records(_kept(row) for row in rows)
    found = {}
    for row in rows:
        record = await _complete(connection, known, row["id"])
        if None not in record:
            own = marks(encoded(message) for message in record if message is not None)
            found[row["id"]] = Record(row["tenant"], row["conversation"], own)
    return found


def _kept(row: RowMapping) -> Kept:
    calls = [ToolMessage(*one) for one in row["calls"] or ()]
    added = said_in(row["asked"], row["said"], calls, row["finish_reason"])
    return Kept(row["id"], row["parent"] or "", row["history"], added, cut=row["linked"] is False)


async def _complete(connection: AsyncConnection, known: Records, id: str) -> list[Message | None]:
    """The record of a turn; what it continues is looked up, as far as it is needed."""
    while True:
        try:
            return known.record(id)
        except Missing as missing:
            wanted = str(missing)
            known.add([_kept(row) for row in await _chain(connection, wanted)], [wanted])


async def _chain(connection: AsyncConnection, id: str) -> Sequence[RowMapping]:
    """A turn and up to LEVELS of those that its history needs."""
    table = tables.turns
    start = select(table.c.id, table.c.parent, table.c.linked, table.c.tenant, literal(1).label("level"))
    up = start.where(table.c.id == id).cte("up", recursive=True)
    on = (table.c.id == up.c.parent) & (table.c.tenant == up.c.tenant) & up.c.linked & (up.c.level < LEVELS)
    next = select(table.c.id, table.c.parent, table.c.linked, table.c.tenant, up.c.level + 1).join(up, on)
    query = select(*_KEPT).where(table.c.id.in_(select(up.union_all(next).c.id)))
    return (await connection.execute(query)).mappings().all()


async def interrupt(connection: AsyncConnection, before: datetime) -> list[str]:
    """The ids of the turns that began before `before` and never finished; from now on they are interrupted."""
    table = tables.turns
    statement = (
        update(table)
        .where(table.c.finished_at.is_(None), table.c.created_at < before)
        .values(error=INTERRUPTED, finished_at=now())
        .returning(table.c.id)
    )
    return list((await connection.execute(statement)).scalars())


async def load(
    connection: AsyncConnection, *where: ColumnElement[bool], last: int | None = None, torn: set[str] | None = None
) -> list[Turn]:
    """The turns that match, oldest first, with hits and tickets and without what was withheld.

    last: only so many, the newest. torn: gets the ids of turns of whose history a part was deleted with an earlier
    turn; it is left out of the history.
    """
    table = tables.turns
    newest = select(table).where(*where).order_by(table.c.created_at.desc(), table.c.id.desc()).limit(last)
    rows = (await connection.execute(newest)).mappings().all()[::-1]
    if not rows:
        return []
    chosen = newest.subquery()
    hits = await _hits(connection, tables.verdicts.c.turn.in_(select(chosen.c.id)))
    named = tables.tickets.c.id.in_(select(chosen.c.ticket))
    handed_over = {ticket.id: ticket for ticket in await tickets.load(connection, named)}
    known = Records(_kept(row) for row in rows)
    found = []
    for row in rows:
        await _complete(connection, known, row["id"])
        history, whole = known.history(row["id"])
        if torn is not None and not whole:
            torn.add(row["id"])
        found.append(_turn(row, history, hits, handed_over.get(row["ticket"])))
    return found


async def _hits(connection: AsyncConnection, where: ColumnElement[bool]) -> dict[tuple[str, str], tuple[Hit, ...]]:
    table = tables.verdicts
    found: dict[tuple[str, str], tuple[Hit, ...]] = {}
    query = select(table).where(where).order_by(table.c.turn, table.c.stage, table.c.place)
    for row in (await connection.execute(query)).mappings():
        findings = tuple(Finding(*finding) for finding in row["findings"])
        hit = Hit(row["rule"], Action[row["action"].upper()], row["mode"], findings, row["broken"], row["message"])
        found[row["turn"], row["stage"]] = (*found.get((row["turn"], row["stage"]), ()), hit)
    return found


def _verdict(row: RowMapping, stage: Stage, hits: Mapping[tuple[str, str], tuple[Hit, ...]]) -> Verdict | None:
    if row[f"{stage}_action"] is None:
        return None
    action = Action[row[f"{stage}_action"].upper()]
    text = row["asked"] if stage == "input" and not action.stops else row["said"]
    found = hits.get((row["id"], stage), ())
    return Verdict(action, text, rule=row[f"{stage}_rule"], route=row[f"{stage}_route"], hits=found)


def _turn(
    row: RowMapping,
    history: tuple[Message, ...],
    hits: Mapping[tuple[str, str], tuple[Hit, ...]],
    ticket: Ticket | None,
) -> Turn:
    plain = Turn(**{name: row[name] for name in _PLAIN if name not in _LATER or row[name] is not None})
    calls = tuple(ToolMessage(*one) for one in row["calls"] or ())
    input, output = _verdict(row, "input", hits), _verdict(row, "output", hits)
    return replace(plain, history=history, calls=calls, input=input, output=output, ticket=ticket)


async def ended_with(connection: AsyncConnection, tenant: str, tail_hash: str) -> tuple[str, str] | None:
    """(id, conversation) of the newest turn that ended with this hash."""
    table = tables.turns
    query = select(table.c.id, table.c.conversation).where(table.c.tenant == tenant, table.c.tail_hash == tail_hash)
    newest = query.order_by(table.c.created_at.desc(), table.c.id.desc()).limit(1)
    row = (await connection.execute(newest)).one_or_none() if tail_hash else None
    return None if row is None else (row.id, row.conversation)


async def require(connection: AsyncConnection, tenant: str, ids: Sequence[str], lock: bool = False) -> None:
    """Raises NotFound unless all these turns are the tenant's; `lock` holds them against other writers."""
    query = select(tables.turns.c.id).where(tables.turns.c.tenant == tenant, tables.turns.c.id.in_(ids))
    found = set((await connection.execute(query.with_for_update() if lock else query)).scalars())
    if missing := [id for id in ids if id not in found]:
        raise NotFound(f"there is no turn {missing[0]!r} of tenant {tenant!r}")


async def read_withheld(
    connection: AsyncConnection, id: str, tenant: str, actor: str, reason: str
) -> dict[WithheldKind, str]:
    """The raw texts that were kept from the other side, by kind (asked, said); the reading is audited."""
    if not actor.strip() or not reason.strip():
        raise ValueError("withheld text is shown only to somebody, for a reason: give both")
    await require(connection, tenant, [id])
    await audit.write(connection, actor, "withheld.read", id, {"tenant": tenant, "reason": reason})
    rows = await connection.execute(select(tables.withheld).where(tables.withheld.c.turn == id))
    return {row.kind: unsealed(connection, tenant, id, row.kind, row.text) for row in rows}


def unsealed(connection: AsyncConnection, tenant: str, turn: str, kind: str, text: str) -> str:
    """A withheld text as it was written; raises StoreError when no secret opens it."""
    try:
        return seals_of(connection).unseal(tenant, turn, kind, text)
    except Unreadable as error:
        raise StoreError(str(error)) from None
