"""Turns that somebody judged, as `alignment.collect` takes them."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Select, and_, or_, select, union
from sqlalchemy.ext.asyncio import AsyncConnection

from alignment.records import Judged, Opinion, Reply, Withheld
from app.records import Feedback, Turn
from app.store import tables, tickets, turns
from app.store.feedback import FEEDBACK
from guardrails.types import Message

PAGE = 200


def _judged_ids(since: datetime | None) -> Select[tuple[str]]:
    said, answered = tables.feedback, tables.tickets
    by_feedback = select(said.c.turn).where(said.c.current)
    by_answer = select(answered.c.turn).where(answered.c.answered_at.is_not(None))
    if since is not None:
        by_feedback = by_feedback.where(said.c.created_at >= since)
        by_answer = by_answer.where(answered.c.answered_at >= since)
    return select(union(by_feedback, by_answer).subquery().c.turn)


async def page(
    connection: AsyncConnection, tenant: str | None, since: datetime | None, after: tuple[datetime, str] | None
) -> list[Judged]:
    """Up to `PAGE` turns, oldest first, that were judged at or after `since`, with all that was said of each.

    after: (time, id) of the last turn of the page before.
    """
    table = tables.turns
    query = select(table.c.id).where(table.c.id.in_(_judged_ids(since)))
    if tenant is not None:
        query = query.where(table.c.tenant == tenant)
    if after is not None:
        moment, id = after
        query = query.where(or_(table.c.created_at > moment, and_(table.c.created_at == moment, table.c.id > id)))
    ids = list((await connection.execute(query.order_by(table.c.created_at, table.c.id).limit(PAGE))).scalars())
    if not ids:
        return []
    opinions = await _opinions(connection, ids)
    withheld = await _withheld(connection, ids)
    answers = {ticket.turn: ticket.answer for ticket in await tickets.load(connection, tables.tickets.c.turn.in_(ids))}
    torn: set[str] = set()
    found = await turns.load(connection, table.c.id.in_(ids), torn=torn)
    said = {reply.turn: reply for reply in await _replies(connection, found, torn)}
    return [
        _judged(turn, said[turn.id], opinions.get(turn.id, ()), answers.get(turn.id, ""), withheld) for turn in found
    ]


async def _replies(connection: AsyncConnection, found: list[Turn], torn: set[str]) -> list[Reply]:
    """What was said in these turns; nothing where a person's answer to an earlier ticket was said along with it.

    A turn with tools gives nothing at all: a record for training is a conversation without them. Nor does a turn whose
    history is `torn`: what it answered is not known any more.
    """
    news = tables.tickets.c.delivered_in
    mixed = set((await connection.execute(select(news).where(news.in_([turn.id for turn in found])))).scalars())
    return [
        Reply(turn.id, (), "")
        if turn.uses_tools or turn.id in torn
        else Reply(turn.id, (*turn.history, Message("user", turn.asked)), "" if turn.id in mixed else turn.said)
        for turn in found
    ]


def _judged(
    turn: Turn,
    reply: Reply,
    opinions: tuple[Opinion, ...],
    answer: str,
    withheld: dict[tuple[str, str], tuple[Withheld, ...]],
) -> Judged:
    return Judged(
        reply,
        turn.conversation,
        turn.tenant,
        turn.policy,
        turn.action,
        turn.created_at,
        opinions,
        answer,
        withheld.get((turn.tenant, turn.conversation), ()),
    )


async def _opinions(connection: AsyncConnection, ids: list[str]) -> dict[str, tuple[Opinion, ...]]:
    table = tables.feedback
    query = select(*FEEDBACK).where(table.c.turn.in_(ids), table.c.current).order_by(table.c.created_at, table.c.id)
    said = [Feedback(**row) for row in (await connection.execute(query)).mappings()]
    compared = {one.other for one in said if one.other}
    torn: set[str] = set()
    found_others = await turns.load(connection, tables.turns.c.id.in_(compared), torn=torn)
    others = {reply.turn: reply for reply in await _replies(connection, found_others, torn)}
    found: dict[str, tuple[Opinion, ...]] = {}
    for one in said:
        opinion = Opinion(one.kind, one.value, one.text, one.choice, others.get(one.other))
        found[one.turn] = (*found.get(one.turn, ()), opinion)
    return found


async def _withheld(connection: AsyncConnection, ids: list[str]) -> dict[tuple[str, str], tuple[Withheld, ...]]:
    """Every withheld text of the conversations of these turns, and what was kept in its place."""
    mine, all_turns, raw = tables.turns, tables.turns.alias(), tables.withheld
    together = and_(all_turns.c.tenant == mine.c.tenant, all_turns.c.conversation == mine.c.conversation)
    columns = (
        all_turns.c.id,
        all_turns.c.tenant,
        all_turns.c.conversation,
        all_turns.c.asked,
        all_turns.c.said,
        raw.c.kind,
        raw.c.text,
    )
    query = (
        select(*columns)
        .select_from(mine.join(all_turns, together).join(raw, raw.c.turn == all_turns.c.id))
        .where(mine.c.id.in_(ids))
        .distinct()
    )
    found: dict[tuple[str, str], tuple[Withheld, ...]] = {}
    for id, tenant, conversation, asked, said, kind, text in await connection.execute(query):
        raw_text = turns.unsealed(connection, tenant, id, kind, text)
        kept = Withheld(raw_text, asked if kind == "asked" else said)
        found[tenant, conversation] = (*found.get((tenant, conversation), ()), kept)
    return found
