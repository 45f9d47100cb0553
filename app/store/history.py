"""Histories as they are kept: each message of a conversation once.

The record of a turn is what a client sends back when it goes on: the turn's history, what was asked and what was said.
The history of a turn that has a parent is kept as JSON of messages, `[role, content]` or `[role, content, call, name]`,
and of places `[start, stop]` in the record of the parent. Whatever the client has changed is not found there and is
kept as it is, so what is read back is exact; a history without places, such as those of earlier versions, is whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import orjson

from app.store.tables import storable
from guardrails.types import Message, Role, ToolMessage

MARK = 16
"""Bytes of a message's mark: two messages with one mark are the same."""


def encoded(message: Message) -> bytes:
    """The message as JSON, with its texts as a database can hold them."""
    if isinstance(message, ToolMessage):
        return orjson.dumps((message.role, storable(message.content), storable(message.call), storable(message.name)))
    return orjson.dumps((message.role, storable(message.content)))


def decoded(role: Role, content: str, call: str | None = None, name: str = "") -> Message:
    """The message of such JSON."""
    return Message(role, content) if call is None else ToolMessage(role, content, call, name)


def marks(messages: Iterable[bytes]) -> bytes:
    """The marks of encoded messages, one after another."""
    return b"".join([blake2b(message, digest_size=MARK).digest() for message in messages])


def said_in(asked: str, said: str, calls: Sequence[ToolMessage], finish_reason: str) -> list[Message]:
    """What a turn adds to its history: the end of its record."""
    messages = [Message("user", asked)] if asked else []
    messages += [Message("assistant", said)] if said else []
    return [*messages, *calls] if finish_reason == "tool_calls" else messages


@dataclass(frozen=True, slots=True)
class Record:
    """The marks of the record of a finished turn, and whose it is."""

    tenant: str
    conversation: str
    marks: bytes


def kept(messages: Sequence[bytes], own: bytes, before: bytes) -> tuple[str, bool]:
    """(encoded messages as they are kept, whether places in the parent's record stand for some of them).

    own: their marks. before: the marks of the parent's record.
    """
    if before and own.startswith(before):
        shared = len(before) // MARK
        return _array((b"[0,%d]" % shared, *messages[shared:])), True
    if not before or not messages:
        return _array(messages), False
    items = list(_found(messages, own, before))
    return _array(items), any(item[1:2].isdigit() for item in items)


def _array(items: Iterable[bytes]) -> str:
    return f"[{b','.join(items).decode()}]"


def _found(messages: Sequence[bytes], own: bytes, before: bytes) -> Iterator[bytes]:
    """The messages, with places in the record instead of the runs that are found there."""
    record = [before[at : at + MARK] for at in range(0, len(before), MARK)]
    wanted = [own[at : at + MARK] for at in range(0, len(own), MARK)]
    places = {mark: place for place, mark in reversed(list(enumerate(record)))}
    at = 0
    while at < len(wanted):
        if (start := places.get(wanted[at])) is None:
            yield messages[at]
            at += 1
            continue
        stop = start
        while at < len(wanted) and stop < len(record) and record[stop] == wanted[at]:
            stop, at = stop + 1, at + 1
        yield b"[%d,%d]" % (start, stop)


@dataclass(frozen=True, slots=True)
class Kept:
    """A turn as far as its record goes: what is kept of its history, and what it adds to it.

    cut: something was taken out of it, so that no place in it means anything any more.
    """

    id: str
    parent: str
    items: Sequence[Sequence[Any]]
    added: Sequence[Message]
    cut: bool = False
    length: int = field(init=False)

    def __post_init__(self) -> None:
        """Counts the messages of the history."""
        object.__setattr__(self, "length", sum(1 if _is_message(item) else item[1] - item[0] for item in self.items))

    def needs(self, start: int, stop: int) -> tuple[int, int] | None:
        """The places of the parent's record that `record[start:stop]` needs; None when it needs nothing."""
        low, high, at = None, 0, 0
        for item in self.items:
            if _is_message(item):
                at += 1
                continue
            first, last = max(start - at, 0), min(stop - at, item[1] - item[0])
            at += item[1] - item[0]
            if first < last:
                low = item[0] + first if low is None else min(low, item[0] + first)
                high = max(high, item[0] + last)
        return None if low is None else (low, high)

    def record(self, start: int, stop: int, base: Sequence[Message | None], offset: int) -> list[Message | None]:
        """`record[start:stop]`; base: the parent's record from the place `offset` on, as far as it is needed.

        None stands for what is not in `base`: all else stays in its place.
        """
        found: list[Message | None] = []
        at = 0
        for item in self.items:
            if _is_message(item):
                found += [decoded(*item)] if start <= at < stop else []
                at += 1
                continue
            first, last = max(start - at, 0), min(stop - at, item[1] - item[0])
            at += item[1] - item[0]
            if first < last:
                shared = base[item[0] + first - offset : item[0] + last - offset] if base else ()
                found += [*shared, *([None] * (last - first - len(shared)))]
        return found + list(self.added[max(start - at, 0) : max(stop - at, 0)])


def _is_message(item: Sequence[Any]) -> bool:
    return isinstance(item[0], str)


class Missing(Exception):
    """The turn with this id is needed, too."""


class Records:
    """The records of some turns, put together from what is kept of them and of those that they continue."""

    __slots__ = ("_gone", "_kept", "_whole")

    def __init__(self, turns: Iterable[Kept]):
        self._kept = {turn.id: turn for turn in turns}
        self._whole: dict[str, list[Message | None]] = {}
        self._gone: set[str] = set()

    def add(self, turns: Iterable[Kept], asked: Iterable[str]) -> None:
        """Adds what was found of the turns that were `asked` for; what was not found is gone."""
        self._kept.update((turn.id, turn) for turn in turns)
        self._gone.update(id for id in asked if id not in self._kept)

    def history(self, id: str) -> tuple[tuple[Message, ...], bool]:
        """(the history of a turn, whether it is whole): what was deleted with an earlier turn is left out.

        Raises Missing with the id of a turn to be added.
        """
        record = self.record(id)
        history = record[: len(record) - len(self._kept[id].added)]
        found = tuple(message for message in history if message is not None)
        return found, len(found) == len(history)

    def record(self, id: str) -> list[Message | None]:
        """The record of a turn, with None for what is gone; raises Missing with the id of a turn to be added."""
        if id not in self._whole:
            turn = self._kept[id]
            self._whole[id] = self._put_together(turn, turn.length + len(turn.added))
        return self._whole[id]

    def _put_together(self, turn: Kept, length: int) -> list[Message | None]:
        way = [(turn, 0, length)]
        base: list[Message | None] = []
        offset = 0
        while (needed := way[-1][0].needs(*way[-1][1:])) is not None:
            parent = way[-1][0].parent
            if parent not in self._kept and parent not in self._gone:
                raise Missing(parent)
            if parent in self._gone or self._kept[parent].cut:
                break
            if parent in self._whole:
                base = self._whole[parent]
                break
            way.append((self._kept[parent], *needed))
        for one, start, stop in reversed(way):
            base, offset = one.record(start, stop, base, offset), start
        return base
