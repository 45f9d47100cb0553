"""A reply as blocks, for APIs whose streams open a block, fill it, and close it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import orjson

from app.telling import Said
from guardrails.reply import ARGUMENTS

Step = tuple[Literal["open", "fill", "close"], "Block", str]
"""What happens to a block; the text is what it is filled with."""


@dataclass(slots=True)
class Block:
    """A part of a reply: what is said, reasoning, a refusal, or one tool call, whose text are its arguments.

    logprobs: entries in JSON of the tokens of the text, of which `told` were written.
    """

    index: int
    channel: str
    id: str = ""
    name: str = ""
    parts: list[str] = field(default_factory=list)
    logprobs: list[bytes] = field(default_factory=list)
    told: int = 0

    @property
    def text(self) -> str:
        """All that was filled in."""
        return "".join(self.parts)

    @property
    def is_call(self) -> bool:
        """True for a tool call."""
        return self.channel.startswith(ARGUMENTS)

    @property
    def is_complete(self) -> bool:
        """True for all but a tool call whose arguments are no whole JSON value yet."""
        if not self.is_call:
            return True
        try:
            orjson.loads(self.text)
        except orjson.JSONDecodeError:
            return False
        return True


class Blocks:
    """The blocks of one reply, as its pieces come; each is open until the end.

    The last words of reasoning or of a text may come behind what follows them, since rules hold them back: they go to
    the block that they belong to. No other block is filled between the pieces of a tool call, which clients put
    together as they come: what comes meanwhile waits until the arguments are complete, or the reply is.
    """

    __slots__ = ("_blocks", "_call", "_waiting")

    def __init__(self) -> None:
        self._blocks: dict[str, Block] = {}
        self._call: Block | None = None
        self._waiting: list[Said] = []

    @property
    def all(self) -> list[Block]:
        """The blocks so far."""
        return list(self._blocks.values())

    def feed(self, said: Said) -> Iterator[Step]:
        """What a piece of the reply does."""
        if not (said.text or said.name or said.logprobs):
            return
        if self._call and self._call.channel != said.channel and not self._call.is_complete:
            self._waiting.append(said)
            return
        yield from self._told(said)
        if self._waiting and (self._call is None or self._call.is_complete):
            waiting, self._waiting = self._waiting, []
            for one in waiting:
                yield from self.feed(one)

    def finish(self, stopped: bool) -> Iterator[Step]:
        """What is left to do at the end of the reply; one that was stopped begins no more calls."""
        waiting = [one for one in self._waiting if not (stopped and one.channel.startswith(ARGUMENTS))]
        for channel in dict.fromkeys(one.channel for one in waiting):
            for said in waiting:
                if said.channel == channel:
                    yield from self._told(said)
        for block in self.all:
            yield "close", block, ""

    def _told(self, said: Said) -> Iterator[Step]:
        block = self._blocks.get(said.channel)
        if block is None:
            block = self._blocks[said.channel] = Block(len(self._blocks), said.channel, said.id, said.name)
            yield "open", block, ""
        self._call = block if block.is_call else self._call
        block.parts.append(said.text)
        block.logprobs += said.logprobs
        if said.text:
            yield "fill", block, said.text


def blocks_of(told: Sequence[Said], stopped: bool) -> list[Block]:
    """The blocks of a whole reply."""
    blocks = Blocks()
    for said in told:
        for _ in blocks.feed(said):
            pass
    for _ in blocks.finish(stopped):
        pass
    return blocks.all
