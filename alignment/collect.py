"""From what people said of turns to training records, scrubbed, deduplicated and counted.

    correction                  demonstration + pair (correction over what was said)
    choice between two replies  pair, if both answered the same prompt
    answer to a ticket          demonstration + pair (answer over the model's reply, if it gave one)
    rating                      unpaired, good above zero and bad below
    should have helped/refused  unpaired, bad; nothing when there is a correction, which says it better
    comment                     nothing: it is about the reply, it is not a reply

Nothing that quotes a withheld text gets in, and every text goes through `scrub`.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from difflib import SequenceMatcher
from pathlib import Path
from typing import Literal, TypedDict, assert_never

from alignment.records import (
    Demonstration,
    Judged,
    Opinion,
    PreferencePair,
    Rating,
    Record,
    Split,
    Withheld,
    fingerprint,
    split_of,
    to_json,
)
from guardrails.types import Message

Scrub = Callable[[str], Awaitable[str]]
Reason = Literal[
    "tie", "neutral", "other prompt", "empty", "same", "withheld", "unscrubbed", "duplicate", "contradicted"
]
RUN = 6
"""So many words in a row, taken from a withheld text, are a quotation of it."""
_ALIGN = 2000
"""Words up to which a withheld text is compared word by word with what was kept of it."""


class Unscrubbed(Exception):
    """Raised by a `scrub` that could not read a text: what holds it is left out."""


@dataclass(frozen=True, slots=True)
class Collected:
    """The records of a collection, how many were left out and why, and when the turns were (first, last)."""

    demonstrations: tuple[Demonstration, ...] = ()
    pairs: tuple[PreferencePair, ...] = ()
    ratings: tuple[Rating, ...] = ()
    left_out: dict[Reason, int] = field(default_factory=dict)
    turns: int = 0
    between: tuple[datetime, datetime] | None = None


class _Origin(TypedDict):
    source: str
    turn: str
    policy: str
    split: Split


def _said(text: str) -> tuple[Message, ...]:
    return (Message("assistant", text),)


def _origin(judged: Judged, source: str) -> _Origin:
    split = split_of(judged.tenant, judged.conversation)
    return {"source": source, "turn": judged.reply.turn, "policy": judged.policy, "split": split}


def _better(judged: Judged, text: str, rejected: str, source: str) -> Iterator[Record | Reason]:
    """What `text`, written by a person, teaches: a demonstration, and a pair where the model had said something."""
    prompt, origin = judged.reply.prompt, _origin(judged, source)
    if not text.strip():
        yield "empty"
        return
    yield Demonstration(messages=(*prompt, *_said(text)), **origin)
    if rejected.strip():
        yield PreferencePair(prompt=prompt, chosen=_said(text), rejected=_said(rejected), **origin)


def _chosen(judged: Judged, opinion: Opinion) -> Record | Reason:
    this, other = judged.reply, opinion.other
    if opinion.choice not in ("this", "other"):
        return "tie"
    if other is None or other.prompt != this.prompt:
        return "other prompt"
    if not this.said.strip() or not other.said.strip():
        return "empty"
    good, bad = (this, other) if opinion.choice == "this" else (other, this)
    origin = _origin(judged, "choice")
    return PreferencePair(prompt=this.prompt, chosen=_said(good.said), rejected=_said(bad.said), **origin)


def _rated(judged: Judged, value: float, source: str) -> Record | Reason:
    reply = judged.reply
    if not reply.said.strip():
        return "empty"
    if value == 0:
        return "neutral"
    return Rating(prompt=reply.prompt, completion=_said(reply.said), label=value > 0, **_origin(judged, source))


def lessons(judged: Judged) -> Iterator[Record | Reason]:
    """The records that one judged turn gives, unscrubbed, and for each thing that gives none the reason."""
    reply, corrected = judged.reply, any(opinion.kind == "correction" for opinion in judged.opinions)
    if not reply.prompt or reply.prompt[-1].role == "assistant" or not reply.prompt[-1].content.strip():
        yield "empty"
        return
    for opinion in judged.opinions:
        match opinion.kind:
            case "correction":
                yield from _better(judged, opinion.text, reply.said, "correction")
            case "choice":
                yield _chosen(judged, opinion)
            case "rating":
                yield _rated(judged, opinion.value or 0.0, "rating")
            case "should_have_helped" | "should_have_refused":
                if not corrected:
                    yield _rated(judged, -1.0, opinion.kind)
            case "comment":
                pass
            case _:
                assert_never(opinion.kind)
    if judged.answer:
        # an escalated turn said that a person will answer: the policy's words, and no mistake of the model
        yield from _better(judged, judged.answer, "" if judged.action == "escalate" else reply.said, "ticket")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _runs(words: Sequence[str]) -> set[tuple[str, ...]]:
    length = min(RUN, len(words))
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)} if words else set()


def hidden(withheld: Withheld) -> set[tuple[str, ...]]:
    """The runs of words that give `withheld` away.

    Of a text that was redacted, the words in the redacted places; of any, every six words in a row that were not
    kept. A text of fewer words counts whole.
    """
    raw, kept = _words(withheld.raw), _words(withheld.kept)
    runs = _runs(raw) - _runs(kept)
    if len(raw) + len(kept) <= _ALIGN:
        matcher = SequenceMatcher(None, raw, kept, autojunk=False)
        if matcher.ratio() >= 0.5:
            runs |= {
                tuple(raw[start:end]) for tag, start, end, _, _ in matcher.get_opcodes() if tag in ("replace", "delete")
            }
    return runs - {()}


def quotes(text: str, runs: set[tuple[str, ...]]) -> bool:
    """True when one of the runs of words is in `text`."""
    words = _words(text)
    lengths = {len(run) for run in runs}
    return any(tuple(words[i : i + length]) in runs for length in lengths for i in range(len(words) - length + 1))


def _messages(record: Record) -> tuple[Message, ...]:
    match record:
        case Demonstration():
            return record.messages
        case PreferencePair():
            return (*record.prompt, *record.chosen, *record.rejected)
        case Rating():
            return (*record.prompt, *record.completion)


async def _scrubbed(record: Record, scrub: Scrub) -> Record:
    async def clean(messages: Sequence[Message]) -> tuple[Message, ...]:
        return tuple([replace(message, content=await scrub(message.content)) for message in messages])

    match record:
        case Demonstration():
            return replace(record, messages=await clean(record.messages))
        case PreferencePair():
            prompt, chosen, rejected = record.prompt, record.chosen, record.rejected
            return replace(
                record, prompt=await clean(prompt), chosen=await clean(chosen), rejected=await clean(rejected)
            )
        case Rating():
            return replace(record, prompt=await clean(record.prompt), completion=await clean(record.completion))


def _remembering(scrub: Scrub) -> Scrub:
    """`scrub`, asked once for each text: the turns of a conversation repeat its history."""
    known: dict[str, str] = {}

    async def remembered(text: str) -> str:
        if text not in known:
            known[text] = await scrub(text)
        return known[text]

    return remembered


def _question(record: Record) -> object:
    """What a record gives an opinion on: two records with equal questions agree or contradict each other."""
    match record:
        case Demonstration():
            return record.messages
        case PreferencePair():
            return record.prompt, frozenset((record.chosen, record.rejected))
        case Rating():
            return record.prompt, record.completion


def _opinion(record: Record) -> object:
    match record:
        case Demonstration():
            return None
        case PreferencePair():
            return record.chosen
        case Rating():
            return record.label


def agreed(records: Sequence[Record], left_out: Counter[Reason]) -> list[Record]:
    """The records without repetitions, and without those about which people contradict each other."""
    first: dict[tuple[type[Record], object], Record] = {}
    disputed: set[tuple[type[Record], object]] = set()
    for record in records:
        question = type(record), _question(record)
        if question not in first:
            first[question] = record
        elif _opinion(record) == _opinion(first[question]):
            left_out["duplicate"] += 1
        else:
            disputed.add(question)
            left_out["contradicted"] += 1
    left_out["contradicted"] += len(disputed)
    return [record for question, record in first.items() if question not in disputed]


async def _cleaned(record: Record, runs: set[tuple[str, ...]], scrub: Scrub) -> Record | Reason:
    if any(quotes(message.content, runs) for message in _messages(record)):
        return "withheld"
    try:
        clean = await _scrubbed(record, scrub)
    except Unscrubbed:
        return "unscrubbed"
    return "same" if isinstance(clean, PreferencePair) and clean.chosen == clean.rejected else clean


async def collect(judged: AsyncIterable[Judged], scrub: Scrub) -> Collected:
    """The training records that `judged` turns give.

    `scrub` returns a text without personal data and secrets, or raises Unscrubbed.
    """
    found: list[Record] = []
    left_out: Counter[Reason] = Counter()
    times: list[datetime] = []
    scrub = _remembering(scrub)
    async for turn in judged:
        times.append(turn.at)
        runs = {run for withheld in turn.withheld for run in hidden(withheld)}
        for lesson in lessons(turn):
            clean = lesson if isinstance(lesson, str) else await _cleaned(lesson, runs, scrub)
            if isinstance(clean, str):
                left_out[clean] += 1
            else:
                found.append(clean)
    records = agreed(found, left_out)
    return Collected(
        tuple(record for record in records if isinstance(record, Demonstration)),
        tuple(record for record in records if isinstance(record, PreferencePair)),
        tuple(record for record in records if isinstance(record, Rating)),
        {reason: count for reason, count in sorted(left_out.items()) if count},
        len(times),
        (min(times), max(times)) if times else None,
    )


def _put(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write(collected: Collected, folder: Path) -> dict[str, int]:
    """How many records each file got: demonstrations.jsonl, pairs.jsonl, ratings.jsonl.

    Each file is replaced whole or not at all; `manifest.json`, written last, holds the counts, the time range and
    the SHA-256 of each, so that a reader can tell whether the set belongs together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Sequence[Record]] = {
        "demonstrations": collected.demonstrations,
        "pairs": collected.pairs,
        "ratings": collected.ratings,
    }
    listed: dict[str, dict[str, str | int]] = {}
    for name, records in files.items():
        content = "".join(f"{to_json(record)}\n" for record in records).encode()
        _put(folder / f"{name}.jsonl", content)
        test = sum(record.split == "test" for record in records)
        listed[f"{name}.jsonl"] = {"records": len(records), "test": test, "sha256": fingerprint(content)}
    between = [time.isoformat() for time in collected.between] if collected.between else None
    manifest = {"files": listed, "turns": collected.turns, "between": between, "left_out": collected.left_out}
    _put(folder / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())
    return {name: len(records) for name, records in files.items()}
