"""The way from the store to training files: judged turns, scrubbed of personal data and secrets, as JSONL."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path

from alignment.collect import Collected, Scrub, Unscrubbed, collect, write
from alignment.records import Judged
from app.store import Store
from guardrails import catalog
from guardrails.engine import judge
from guardrails.types import Action, Rule

SCRUBBED = ("personal", "secrets")
"""The validators whose findings are taken out of every text, with all the kinds that they know."""


def scrubber() -> Scrub:
    """A function that redacts a text; it raises Unscrubbed where a rule broke, so that the text is left out."""
    rules = [Rule(name, catalog.build(name, catalog.options(name)()), Action.REDACT) for name in SCRUBBED]

    async def scrub(text: str) -> str:
        verdict = await judge(rules, text)
        if verdict.action.stops:
            raise Unscrubbed
        return verdict.text

    return scrub


async def export(
    store: Store, folder: Path, tenant: str | None, since: datetime | None, actor: str
) -> tuple[Collected, dict[str, int]]:
    """(what was collected, how many records each file in `folder` got); who exported is audited.

    Whose words are in which line is noted before the files are written, so that an erasure finds them.
    """
    lines = set[tuple[str, str]]()
    collected = await collect(_noting(store.judged_turns(tenant, since, actor), lines), scrubber())
    await store.register_export(folder, tenant, actor, lines)
    return collected, write(collected, folder)


async def _noting(judged: AsyncIterator[Judged], lines: set[tuple[str, str]]) -> AsyncIterator[Judged]:
    """The turns as they come; `lines` gets (the turn that a line will name, a turn whose words may be in it)."""
    async for turn in judged:
        lines.add((turn.reply.turn, turn.reply.turn))
        lines |= {(turn.reply.turn, opinion.other.turn) for opinion in turn.opinions if opinion.other}
        yield turn
