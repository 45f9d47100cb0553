"""Generating while the input is still judged: the reply is begun at once, and nothing of it is given out too early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from typing import Any, TypeVar, cast

from guardrails.types import Verdict

T = TypeVar("T")
HELD = 1024
"""Pieces that are held back at most; the engine waits when there are more."""
_END = object()


async def speculated(
    verdict: Awaitable[Verdict], pieces: AsyncGenerator[T, None], held: int = HELD
) -> AsyncGenerator[Verdict | T, None]:
    """The verdict, and then the pieces, unless the verdict stops the turn.

    Both are begun at once. No piece is given out before the verdict is there; a verdict that stops, or cannot be had,
    cancels the generation in the next turn of the event loop and closes `pieces`. An exception of `verdict` is raised;
    one of `pieces` is raised in its place, after the verdict and the pieces before it. When this generator is closed,
    both are cancelled, and gone when it returns.
    """
    queue: asyncio.Queue[T] = asyncio.Queue(held)
    judging = asyncio.ensure_future(verdict)
    reading = asyncio.create_task(_read(pieces, queue))
    judging.add_done_callback(lambda done: None if _passes(done) else reading.cancel())
    try:
        found = await judging
        yield found
        if not found.action.stops:
            while (piece := await _next(queue, reading)) is not _END:
                yield cast(T, piece)
    finally:
        judging.cancel()
        reading.cancel()
        await asyncio.gather(judging, reading, return_exceptions=True)
        await pieces.aclose()


async def merged(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """The pieces of all the sources, as they come; the first exception of one ends them all, and is raised."""
    queue: asyncio.Queue[T] = asyncio.Queue(HELD)
    tasks = [asyncio.create_task(_read(source, queue)) for source in sources]
    reading = asyncio.gather(*tasks)
    try:
        while (piece := await _next(queue, reading)) is not _END:
            yield cast(T, piece)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(reading, *tasks, return_exceptions=True)
        for source in sources:
            await source.aclose()


async def _read(pieces: AsyncGenerator[T, None], queue: asyncio.Queue[T]) -> None:
    async for piece in pieces:
        await queue.put(piece)


async def _next(queue: asyncio.Queue[T], reading: asyncio.Future[Any]) -> T | object:
    """The next piece, or `_END` when there are no more; raises what reading them raised."""
    if queue.empty() and not reading.done():
        getting = asyncio.ensure_future(queue.get())
        try:
            await asyncio.wait({getting, reading}, return_when=asyncio.FIRST_COMPLETED)
            if getting.done():
                return getting.result()
        finally:
            getting.cancel()
    if queue.empty():
        await reading
        return _END
    return queue.get_nowait()


def _passes(judging: asyncio.Future[Verdict]) -> bool:
    """True for a verdict that lets the turn go on."""
    return not judging.cancelled() and judging.exception() is None and not judging.result().action.stops
