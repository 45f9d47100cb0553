"""What it costs to put turns on record: CPU per turn, how long the event loop is blocked, and how much room it takes.

    python -m benchmarks.store [--turns 5000] [--batch 100]

SQLite in a temporary file, and PostgreSQL (over its socket, without fsync) where its programs are found. The CPU time
is that of this process, all threads. Turns come in batches and each batch is awaited, so that none is larger than said.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

from sqlalchemy import text

from app.records import Tenant, Turn, new_id, row_id
from app.store import Store
from guardrails.types import Action, Finding, Hit, Message, Verdict
from tests.postgres import Cluster, programs

QUESTION = "How do I ask for a raise after two good years?"
ANSWER = "word " * 50
HITS = (Hit("mail", Action.REDACT, "enforce", (Finding("EMAIL", 9, 25, 0.9),)),)
HISTORY = (Message("system", "You answer questions about work."),)


def turn(conversation: str = "", **changes: object) -> Turn:
    """A turn as it begins: allowed by every rule."""
    plain = Turn(
        id=row_id("chatcmpl-"),
        conversation=conversation or row_id("conv_"),
        tenant="acme",
        key="key_1",
        policy="hr@3f2c9a1b7d5e",
        model="smollm2-135m-instruct",
        request_id=new_id("req_"),
        streamed=True,
        subject="5b1f0c2a9e7d4b3a",
        history=HISTORY,
        asked=QUESTION,
        input=Verdict(Action.ALLOW, QUESTION),
        head_hash="",
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def end(one: Turn, said: str = ANSWER) -> Turn:
    """The same turn, once it has ended."""
    one.said, one.finish_reason, one.output = said, "stop", Verdict(Action.ALLOW, said)
    one.prompt_tokens, one.completion_tokens, one.first_token_ms, one.total_ms = 31, 50, 41.5, 120.25
    one.tail_hash = one.id[-24:] * 2
    return one


def withheld(one: Turn) -> Turn:
    """The same turn, with a redacted question."""
    one.input = Verdict(Action.REDACT, one.asked, rule="mail", hits=HITS)
    one.withheld_asked = f"jane@example.com: {one.asked}"
    return one


async def _watch(gaps: list[tuple[float, float]]) -> None:
    wall, cpu = time.perf_counter(), time.thread_time()
    while True:
        await asyncio.sleep(0)
        gaps.append((time.perf_counter() - wall, time.thread_time() - cpu))
        wall, cpu = time.perf_counter(), time.thread_time()


async def logged(store: Store, turns: Sequence[Turn], batch: int) -> None:
    """Logs the turns and waits, so many at a time."""
    for at in range(0, len(turns), batch):
        for one in turns[at : at + batch]:
            store.log(one)
        await store.flush()


async def begun_and_ended(store: Store, turns: Sequence[Turn], batch: int) -> None:
    """Writes each turn as open, and again when it has ended."""
    for at in range(0, len(turns), batch):
        some = turns[at : at + batch]
        for _ in range(2):
            for one in some:
                store.log(one)
            await store.flush()
            for one in some:
                end(one)


async def one_by_one(store: Store, turns: Sequence[Turn], batch: int) -> None:
    """What was done before turns were logged: two transactions a turn."""
    for one in turns:
        await store.begin(one)
        await store.finish(end(one))


async def cost(store: Store, turns: Sequence[Turn], batch: int, how: Callable[..., Awaitable[None]] = logged) -> float:
    """CPU microseconds a turn to write these."""
    gc.collect()
    before = time.process_time()
    await how(store, turns, batch)
    return (time.process_time() - before) / len(turns) * 1e6


async def blocked(store: Store, count: int) -> tuple[float, float]:
    """How long in milliseconds the event loop did not come round while batches of 500 are written: by the clock, in
    which other processes have their share, and of its own CPU. The best of five times, garbage collection aside."""
    found = []
    for _ in range(5):
        turns, gaps = [end(turn()) for _ in range(count)], list[tuple[float, float]]()
        watch = asyncio.create_task(_watch(gaps))
        await asyncio.sleep(0.05)
        gc.disable()
        gaps.clear()
        await logged(store, turns, 500)
        found.append((max(gap[0] for gap in gaps) * 1000, max(gap[1] for gap in gaps) * 1000))
        gc.enable()
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
    return min(one[0] for one in found), min(one[1] for one in found)


async def room(store: Store, length: int, linked: bool) -> int:
    """The bytes that the histories, questions and replies of a conversation of so many turns take."""
    conversation, talk, parent = row_id("conv_"), list(HISTORY), ""
    for number in range(length):
        one = turn(conversation, history=tuple(talk), parent=parent if linked else "", asked=f"{number}: {QUESTION}")
        await store.keep(end(one, f"{number}: {ANSWER}"))
        talk += [Message("user", one.asked), Message("assistant", one.said)]
        parent = one.id
    assert (await store.turns(conversation, "acme"))[-1].history == tuple(talk[:-2])
    query = (
        "SELECT sum(length(CAST(history AS TEXT)) + length(asked) + length(said)) FROM turns WHERE conversation = :c"
    )
    async with store._db._engine.connect() as connection:
        return int((await connection.execute(text(query), {"c": conversation})).scalar_one())


def log_cost(store: Store, turns: Sequence[Turn]) -> float:
    """Microseconds that `Store.log` takes."""
    before = time.perf_counter()
    for one in turns:
        store.log(one)
    return (time.perf_counter() - before) / len(turns) * 1e6


@asynccontextmanager
async def stores() -> AsyncIterator[dict[str, Store]]:
    """An empty store on each database that there is."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        cluster = None if (found := programs()) is None else Cluster(found)
        opened = {"SQLite": await Store.open(f"sqlite:///{home}/newel.db", home / "spill")}
        try:
            if cluster is not None:
                cluster.start()
                url = cluster.create_database("newel_benchmark")
                opened["PostgreSQL"] = await Store.open(url, home / "spill-pg")
            for store in opened.values():
                await store.put_tenant(Tenant("acme", "hr"))
            yield opened
        finally:
            for store in opened.values():
                await store.close()
            if cluster is not None:
                cluster.remove()


async def main(count: int, batch: int) -> None:
    """Prints the table."""
    async with stores() as opened:
        print(f"CPU microseconds a turn, {count} turns, batches of {batch}:")
        for name, store in opened.items():
            await logged(store, [end(turn()) for _ in range(batch)], batch)
            plain = await cost(store, [end(turn()) for _ in range(count)], batch)
            twice = await cost(store, [turn() for _ in range(count)], batch, begun_and_ended)
            redacted = await cost(store, [withheld(end(turn())) for _ in range(count)], batch)
            single = await cost(store, [turn() for _ in range(count // 20)], 1, one_by_one)
            clock, own = await blocked(store, count)
            call = log_cost(store, [end(turn()) for _ in range(100)])
            await store.flush()
            print(f"  {name}: log() {call:.1f}; allowed {plain:.0f}; written as open first {twice:.0f};", end=" ")
            print(f"redacted {redacted:.0f}; begin and finish, one by one {single:.0f}")
            print(f"  {name}: event loop blocked for at most {clock:.1f} ms, of which {own:.1f} ms were its own work")
            whole, shared = await room(store, 200, False), await room(store, 200, True)
            print(f"  {name}: text of a conversation of 200 turns: {whole:,} bytes whole, {shared:,} bytes linked")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=100)
    chosen = parser.parse_args()
    asyncio.run(main(chosen.turns, chosen.batch))
