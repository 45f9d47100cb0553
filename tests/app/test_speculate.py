"""Generating while the input is judged: both at once, nothing too early, nothing left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.speculate import speculated
from guardrails.types import Action, Verdict

ALLOW, REFUSE = Verdict(Action.ALLOW, "asked"), Verdict(Action.REFUSE, "No.", rule="guard")


class Engine:
    """Generates a piece each time that the loop comes round, and knows what became of it."""

    def __init__(self, pieces: int = 10, error: Exception | None = None):
        self.begun, self.given, self.closed = False, 0, False
        self._pieces, self._error = pieces, error

    async def stream(self) -> AsyncGenerator[str, None]:
        self.begun = True
        try:
            for i in range(self._pieces):
                await asyncio.sleep(0)
                self.given += 1
                yield f"{i} "
            if self._error:
                raise self._error
        finally:
            self.closed = True


class Guard:
    """A verdict that is there when the test says so."""

    def __init__(self) -> None:
        self.begun, self.cancelled = False, False
        self.verdict: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()

    async def judge(self) -> Verdict:
        self.begun = True
        try:
            return await self.verdict
        except asyncio.CancelledError:
            self.cancelled = True
            raise


@pytest.fixture(autouse=True)
async def no_task_left() -> AsyncIterator[None]:
    """Fails where a test leaves a task behind."""
    yield
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def gathered(
    verdict: Awaitable[Verdict], pieces: AsyncGenerator[str, None], held: int = 1024
) -> list[str | Verdict]:
    async with aclosing(speculated(verdict, pieces, held)) as given:
        return [one async for one in given]


async def test_both_begin_at_once_and_no_piece_comes_before_the_verdict() -> None:
    engine, guard = Engine(), Guard()
    async with aclosing(speculated(guard.judge(), engine.stream())) as given:
        first = asyncio.ensure_future(anext(given))
        await turns(30)
        assert guard.begun and engine.begun and engine.given == 10
        assert not first.done()
        guard.verdict.set_result(ALLOW)
        assert await first == ALLOW
        assert "".join([str(piece) async for piece in given]) == "0 1 2 3 4 5 6 7 8 9 "
    assert engine.closed


async def test_a_stop_cancels_the_engine_within_one_turn_of_the_loop_and_shows_nothing() -> None:
    engine, guard = Engine(10_000), Guard()
    work = asyncio.ensure_future(gathered(guard.judge(), engine.stream()))
    await turns(20)
    guard.verdict.set_result(REFUSE)
    await turns(1)  # the guard's task ends
    given = engine.given
    await turns(1)  # and the engine is cancelled
    assert engine.given <= given + 1
    await turns(1)
    assert engine.closed
    assert await work == [REFUSE]


async def test_a_verdict_that_is_there_at_once_generates_as_usual() -> None:
    async def now() -> Verdict:
        return ALLOW

    assert await gathered(now(), Engine(3).stream()) == [ALLOW, "0 ", "1 ", "2 "]


async def test_a_stop_that_is_there_at_once_never_begins_to_generate() -> None:
    engine = Engine()

    async def now() -> Verdict:
        return REFUSE

    assert await gathered(now(), engine.stream()) == [REFUSE]
    await turns(3)
    assert engine.given == 0


async def test_a_guard_that_fails_stops_the_turn() -> None:
    engine, guard = Engine(10_000), Guard()
    work = asyncio.ensure_future(gathered(guard.judge(), engine.stream()))
    await turns(20)
    guard.verdict.set_exception(RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        await work
    assert engine.closed and engine.given < 100


async def test_an_engine_that_fails_early_waits_for_the_verdict() -> None:
    for verdict, shown in ((ALLOW, [ALLOW, "0 ", "1 "]), (REFUSE, [REFUSE])):
        engine, guard = Engine(2, ConnectionError("gone")), Guard()
        given: list[str | Verdict] = []

        async def consume(into: list[str | Verdict], engine: Engine, guard: Guard) -> None:
            async with aclosing(speculated(guard.judge(), engine.stream())) as pieces:
                async for piece in pieces:
                    into.append(piece)  # noqa: PERF401  # what came before an error counts

        work = asyncio.ensure_future(consume(given, engine, guard))
        await turns(20)
        assert engine.closed and not given and not work.done()
        guard.verdict.set_result(verdict)
        if verdict is ALLOW:
            with pytest.raises(ConnectionError, match="gone"):
                await work
        else:
            await work
        assert given == shown


async def test_the_engine_waits_when_too_much_is_held_back() -> None:
    engine, guard = Engine(10_000), Guard()
    work = asyncio.ensure_future(gathered(guard.judge(), engine.stream(), held=5))
    await turns(100)
    assert engine.given == 6  # five in the queue, and one in hand
    guard.verdict.set_result(ALLOW)
    assert len(await work) == 10_001


@pytest.mark.parametrize("judged", [False, True])
async def test_a_client_that_goes_takes_both_with_it(judged: bool) -> None:
    engine, guard = Engine(10_000), Guard()
    work = asyncio.ensure_future(gathered(guard.judge(), engine.stream()))
    await turns(20)
    if judged:
        guard.verdict.set_result(ALLOW)
        await turns(20)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert engine.closed and guard.cancelled is not judged


async def test_a_consumer_that_stops_early_takes_the_engine_with_it() -> None:
    engine, guard = Engine(10_000), Guard()
    guard.verdict.set_result(ALLOW)
    async with aclosing(speculated(guard.judge(), engine.stream())) as given:
        assert [await anext(given) for _ in range(3)] == [ALLOW, "0 ", "1 "]
    assert engine.closed and engine.given < 10_000


async def test_a_cancelled_verdict_is_no_verdict() -> None:
    engine, guard = Engine(10_000), Guard()
    work = asyncio.ensure_future(gathered(guard.judge(), engine.stream()))
    await turns(20)
    guard.verdict.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert engine.closed


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 8), st.booleans())
async def test_for_any_timing_all_or_nothing_is_given_in_order(pieces: int, late: int, held: int, stops: bool) -> None:
    engine, guard = Engine(pieces), Guard()
    work = asyncio.ensure_future(gathered(guard.judge(), engine.stream(), held))
    await turns(late)
    guard.verdict.set_result(REFUSE if stops else ALLOW)
    assert await work == ([REFUSE] if stops else [ALLOW, *(f"{i} " for i in range(pieces))])
