"""How the benchmark talks to one system in a process of its own: a line of JSON asks, a line of JSON answers.

Only the standard library is used here: every system's script imports this in an environment of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from typing import Protocol

PHRASE = "project falcon"
PATTERN = r"\bproject falcon\b"
"""The plain rule of the tables about disguises and places, case ignored."""

SSN = r"\b\d{3}-\d{2}-\d{4}\b"
"""The plain rule of the table about streams, where a system has none of its own for this."""


class System(Protocol):
    """What a script offers; every method is asked with the keys of its line."""

    def about(self) -> dict[str, object]:
        """`version`; the variants that each table shows (`checks`, `places`, `streams`, `costs`); `how`: one line."""
        ...

    def check(self, variant: str, messages: list[dict[str, str]]) -> bool:
        """True when the conversation is stopped, or the phrase is taken out of it."""
        ...

    def stream(self, variant: str, chunks: list[str]) -> dict[str, object]:
        """`text`: all that a client has been given when the stream ends; `note`: what else happened, if anything."""
        ...

    def typos(self) -> list[dict[str, str]]:
        """For each misspelt word of the configuration: `what`, and what came of it."""
        ...

    def hostile(self, pattern: str, text: str) -> float | str:
        """Seconds in which an event loop could do nothing else while a rule with this pattern read this text, or why
        there is no such rule."""
        ...

    def cost(self, variant: str, text: str, runs: int) -> list[float]:
        """CPU seconds of checking a question, once a run."""
        ...

    def cost_of_stream(self, variant: str, chunks: list[str], runs: int) -> list[float]:
        """CPU seconds of one streamed reply, once a run; empty for a variant without streams."""
        ...


def serve(system: System) -> None:
    """Answers until its input ends; whatever the system prints goes to the error stream."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        ask = json.loads(line)
        try:
            answer = {"ok": getattr(system, ask.pop("op"))(**ask)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        answers.write(json.dumps(answer) + "\n")


NUMBERS = count(10_000_000)


def fresh(text: str) -> str:
    """The text with another end each time, of the same length: no system may answer from what it remembers."""
    return f"{text[:-8]}{next(NUMBERS)}"


def cpu(work: Callable[[], object], runs: int) -> list[float]:
    """CPU seconds of the process, once a run."""
    times = []
    for _ in range(runs):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return times


async def blocked(work: Callable[[], Awaitable[object]]) -> float:
    """The longest time, in seconds, in which an event loop that does this work did nothing else."""
    longest, last = 0.0, time.perf_counter()

    async def tick() -> None:
        nonlocal longest, last
        while True:
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
            await asyncio.sleep(0.005)

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0.02)
    longest = 0.0
    try:
        await work()
        await asyncio.sleep(0.02)
    finally:
        ticking.cancel()
    return longest


def outcome(load: Callable[[], Callable[[], bool]]) -> str:
    """What a misspelt configuration comes to: "error", "silent: guards nothing", or "silent: guards"."""
    try:
        guards = load()
    except (Exception, SystemExit):
        return "error"
    try:
        return "silent: guards" if guards() else "silent: guards nothing"
    except Exception:
        return "error when it is used"


def user(text: str) -> list[dict[str, str]]:
    """A conversation of one question."""
    return [{"role": "user", "content": text}]


def last_user(messages: Sequence[dict[str, str]]) -> str:
    """What the user said last."""
    return next(message["content"] for message in reversed(messages) if message["role"] == "user")
