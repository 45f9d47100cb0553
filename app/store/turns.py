"""Turns as rows: one in `turns`, one a hit in `verdicts`, and what was withheld in a table of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, RowMapping, bindparam, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.records import Ticket, Turn, now
from app.store import audit, outbox, tables, tickets
from app.store.database import insert_new, upsert
from app.store.errors import NotFound
from app.store.tables import storable
from guardrails.types import Action, Finding, Hit, Message, Role, Stage, ToolMessage, Verdict

INTERRUPTED = "interrupted"
"""The `error` of a turn that began and never came to its end."""
MOST_FINDINGS = 1000
"""Findings of one rule in one text that are kept; a text full of numbers has any number of them."""
WithheldKind = Literal["asked", "said"]
_PLAIN = tuple(
    column.name
    for column in tables.turns.c
    if column.name not in ("history", "calls", "ticket", "finished_at")
    and not column.name.startswith(("input_", "output_"))
)
_CLOSE = update(tables.turns).where(
    tables.turns.c.id == bindparam("this"),
    tables.turns.c.tenant == bindparam("of"),
    or_(tables.turns.c.finished_at.is_(None), tables.turns.c.error == INTERRUPTED),
)


def _decision(stage: Stage, verdict: Verdict | None) -> dict[str, str | None]:
    decided = (None, None, None) if verdict is None else (verdict.action.word, verdict.rule, verdict.route)
    return dict(zip((f"{stage}_action", f"{stage}_rule", f"{stage}_route"), decided, strict=True))


def _messages(messages: Sequence[Message]) -> list[list[str]]:
    """[role, content] each, and for what is about a tool also the call and the name."""
    tools = ([one.call, one.name] if isinstance(one, ToolMessage) else [] for one in messages)
    return [[one.role, storable(one.content), *more] for one, more in zip(messages, tools, strict=True)]


def _message(role: Role, content: str, call: str | None = None, name: str = "") -> Message:
    return Message(role, content) if call is None else ToolMessage(role, content, call, name)


def _row(turn: Turn) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(turn, name) for name in _PLAIN}
    row["ticket"] = turn.ticket and turn.ticket.id
    row["history"], row["calls"] = _messages(turn.history), _messages(turn.calls)
    return row | _decision("input", turn.input) | _decision("output", turn.output)


def _verdict_rows(turn: Turn) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for stage, verdict in (("input", turn.input), ("output", turn.output)):
        for place, hit in enumerate(verdict.hits if verdict else ()):
            kept = hit.findings[:MOST_FINDINGS]
            found = [[finding.label, finding.start, finding.end, finding.score] for finding in kept]
            row = {"turn": turn.id, "stage": stage, "place": place, "rule": hit.rule, "action": hit.action.word}
            rows.append(row | {"mode": hit.mode, "broken": hit.broken, "message": hit.message, "findings": found})
    return rows


async def _put_evidence(connection: AsyncConnection, turn: Turn) -> None:
    kinds = (("asked", turn.withheld_asked), ("said", turn.withheld_said))
    raw = [{"turn": turn.id, "kind": kind, "text": text} for kind, text in kinds if text]
    await insert_new(connection, tables.verdicts, _verdict_rows(turn))
    await insert_new(connection, tables.withheld, raw)


async def begin(connection: AsyncConnection, turn: Turn) -> int:
    """Inserts the turn as open, with what is known of it, and its conversation; 0 when it is there already."""
    row = {"tenant": turn.tenant, "id": turn.conversation, "subject": turn.subject, "created_at": turn.created_at}
    await upsert(connection, tables.conversations, row | {"last_at": turn.created_at}, "last_at")
    inserted = await insert_new(connection, tables.turns, [_row(turn) | {"finished_at": None}])
    if inserted:
        await _put_evidence(connection, turn)
    return inserted


async def finish(connection: AsyncConnection, turn: Turn) -> int:
    """Completes the turn, its ticket and the ticket's announcement; 0 when that was done before.

    A turn whose `begin` was lost is inserted whole, and one that was given up as interrupted is completed after all.
    A ticket that an earlier turn opened is only pointed at.
    """
    if not await _close(connection, turn):
        await begin(connection, turn)
        if not await _close(connection, turn):
            return 0
    await _put_evidence(connection, turn)
    if turn.ticket is not None:
        await tickets.insert(connection, turn.ticket)
        await outbox.announce(connection, "ticket.created", turn.ticket, turn.question)
    return 1


async def _close(connection: AsyncConnection, turn: Turn) -> int:
    row = _row(turn) | {"finished_at": now(), "this": turn.id, "of": turn.tenant}
    return (await connection.execute(_CLOSE, row)).rowcount


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


async def load(connection: AsyncConnection, *where: ColumnElement[bool]) -> list[Turn]:
    """The turns that match, oldest first, with hits and tickets and without what was withheld."""
    table = tables.turns
    rows = (
        (await connection.execute(select(table).where(*where).order_by(table.c.created_at, table.c.id)))
        .mappings()
        .all()
    )
    if not rows:
        return []
    hits = await _hits(connection, tables.verdicts.c.turn.in_(select(table.c.id).where(*where)))
    named = tables.tickets.c.id.in_(select(table.c.ticket).where(*where))
    handed_over = {ticket.id: ticket for ticket in await tickets.load(connection, named)}
    return [_turn(row, hits, handed_over.get(row["ticket"])) for row in rows]


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


def _turn(row: RowMapping, hits: Mapping[tuple[str, str], tuple[Hit, ...]], ticket: Ticket | None) -> Turn:
    plain = Turn(**{name: row[name] for name in _PLAIN} | {"reasoning": row["reasoning"] or ""})
    history = tuple(_message(*one) for one in row["history"])
    calls = tuple(ToolMessage(*one) for one in row["calls"] or ())
    input, output = _verdict(row, "input", hits), _verdict(row, "output", hits)
    return replace(plain, history=history, calls=calls, input=input, output=output, ticket=ticket)


async def conversation_after(connection: AsyncConnection, tenant: str, tail_hash: str) -> str | None:
    """The conversation of the newest turn that ended with this hash."""
    table = tables.turns
    query = select(table.c.conversation).where(table.c.tenant == tenant, table.c.tail_hash == tail_hash)
    newest = query.order_by(table.c.created_at.desc(), table.c.id.desc()).limit(1)
    return (await connection.execute(newest)).scalar_one_or_none() if tail_hash else None


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
    return {row.kind: row.text for row in rows}
