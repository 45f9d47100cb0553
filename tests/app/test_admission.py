"""The queue before a pool: how many run, who is next, who is turned away and with what words."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.admission import PRIORITIES, Admission, Priority
from app.errors import ApiError
from app.metrics import Metrics
from app.settings import AdmissionSettings


def queue(capacity: int = 1, **changes: Any) -> Admission:
    usual: dict[str, Any] = {"reserved": 0.0}
    return Admission(AdmissionSettings(**(usual | changes)), Metrics(), "p", capacity)


class Request:
    """One request of a test: it runs from when it is let through until it is told to end."""

    def __init__(self, admission: Admission, priority: Priority = "interactive", tenant: str = "", **more: float):
        self.admission, self.slot = admission, admission.slot(priority, tenant=tenant, **more)
        self.runs, self.ends = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with self.slot:
            self.runs.set()
            await self.ends.wait()

    async def end(self) -> None:
        self.ends.set()
        await self.task

    async def error(self) -> ApiError:
        with pytest.raises(ApiError) as caught:
            await self.task
        return caught.value


async def settle() -> None:
    """Returns when every task has done what it can."""
    for _ in range(6):
        await asyncio.sleep(0)


@asynccontextmanager
async def busy(admission: Admission) -> AsyncIterator[Request]:
    """All the room is taken by one request after another; at the end nothing runs and nothing waits."""
    holder = Request(admission)
    await settle()
    yield holder
    if not holder.task.done():
        await holder.end()
    await settle()
    assert (admission.running, admission.queued) == (0, 0)


async def order(admission: Admission, holder: Request, waiting: dict[str, Request]) -> list[str]:
    """The names of those that wait, in the order in which they are let through one after the other."""
    served, running = [], holder
    for _ in range(len(waiting)):
        await running.end()
        await settle()
        ((name, running),) = [(name, one) for name, one in waiting.items() if one.runs.is_set() and name not in served]
        served.append(name)
        assert admission.running == 1
    await running.end()
    return served


async def test_a_request_with_room_is_let_through_without_giving_way_to_anything() -> None:
    admission = queue(2)
    entering = admission.slot().__aenter__()
    with pytest.raises(StopIteration):
        entering.send(None)
    assert admission.running == 1


async def test_no_more_run_than_there_is_room_for() -> None:
    admission = queue(2)
    requests = [Request(admission) for _ in range(3)]
    await settle()
    assert [one.runs.is_set() for one in requests] == [True, True, False]
    await requests[0].end()
    await settle()
    assert requests[2].runs.is_set() and admission.running == 2
    await asyncio.gather(requests[1].end(), requests[2].end())
    assert admission.running == 0


async def test_a_higher_class_goes_first_and_a_class_is_served_in_order() -> None:
    admission = queue()
    async with busy(admission) as holder:
        names: list[tuple[str, Priority]] = [("s", "shadow"), ("b1", "batch"), ("i1", "interactive"), ("b2", "batch")]
        waiting = {name: Request(admission, priority) for name, priority in [*names, ("i2", "interactive")]}
        await settle()
        assert await order(admission, holder, waiting) == ["i1", "i2", "b1", "b2", "s"]


async def test_tenants_take_turns() -> None:
    admission = queue()
    async with busy(admission) as holder:
        names = ["a1", "a2", "a3", "b1", "b2", "c1"]
        waiting = {name: Request(admission, tenant=name[0]) for name in names}
        await settle()
        assert await order(admission, holder, waiting) == ["a1", "b1", "c1", "a2", "b2", "a3"]


@pytest.mark.parametrize("reserved", [0.0, 0.5])
async def test_batch_gets_every_third_place_when_that_is_set_however_many_interactive_ones_wait(
    reserved: float,
) -> None:
    admission = queue(batch_every=3, reserved=reserved)
    async with busy(admission) as holder:
        waiting = {f"b{i}": Request(admission, "batch") for i in range(2)}
        waiting |= {f"i{i}": Request(admission) for i in range(8)}
        await settle()
        served = await order(admission, holder, waiting)
    assert served == ["i0", "i1", "b0", "i2", "i3", "b1", "i4", "i5", "i6", "i7"]


async def test_batch_leaves_room_for_interactive_requests_which_need_not_wait() -> None:
    admission = queue(4, reserved=0.5)
    batch = [Request(admission, "batch") for _ in range(4)]
    await settle()
    assert admission.running == 2 and admission.queued_of("batch") == 2
    interactive = Request(admission)
    await settle()
    assert interactive.runs.is_set()
    await batch[0].end()
    await settle()
    assert not batch[2].runs.is_set(), "three run, of which two at most with batch"
    await interactive.end()
    await settle()
    assert batch[2].runs.is_set()
    for one in (*batch[1:3], batch[3]):
        await one.end()


async def test_a_wait_ends_at_its_deadline() -> None:
    admission = queue()
    async with busy(admission):
        error = await Request(admission, deadline=asyncio.get_running_loop().time() + 0.02).error()
        assert (error.status, error.code) == (503, "overloaded") and error.retry_after
        assert admission.queued == 0
        past = await Request(admission, deadline=asyncio.get_running_loop().time() - 1).error()
        assert past.status == 503


async def test_no_wait_is_longer_than_the_setting() -> None:
    admission = queue(wait=0.02)
    async with busy(admission):
        assert (await Request(admission).error()).status == 503


async def test_a_full_queue_turns_away_with_a_retry_after_and_counts_it() -> None:
    admission = queue(queue=1)
    async with busy(admission) as holder:
        waiting = Request(admission)
        await settle()
        error = await Request(admission).error()
        assert (error.status, error.code) == (503, "overloaded") and error.retry_after == 2
        sample = admission._metrics.registry.get_sample_value
        labels = {"pool": "p", "class": "interactive", "reason": "full"}
        assert sample("newel_admission_shed_total", labels) == 1
        await holder.end()
        await waiting.end()
        assert sample("newel_admission_wait_seconds_count", {"pool": "p", "class": "interactive"}) == 1


async def test_the_lowest_class_is_shed_first_and_its_newest_request_first() -> None:
    admission = queue(queue=3)
    async with busy(admission) as holder:
        batch, old, new = Request(admission, "batch"), Request(admission, "shadow"), Request(admission, "shadow")
        await settle()
        interactive = [Request(admission)]
        assert (await new.error()).status == 503
        interactive.append(Request(admission))
        assert (await old.error()).status == 503
        interactive.append(Request(admission))
        assert (await batch.error()).status == 503
        assert (await Request(admission).error()).status == 503, "only its own class is left"
        await holder.end()
        for one in interactive:
            await one.end()


@pytest.mark.parametrize(("priority", "bound"), [("batch", "batch_queue"), ("shadow", "shadow_queue")])
async def test_a_lower_class_has_a_bound_of_its_own(priority: Priority, bound: str) -> None:
    admission = queue(**{bound: 1})
    async with busy(admission) as holder:
        first = Request(admission, priority)
        await settle()
        assert (await Request(admission, priority).error()).status == 503
        await holder.end()
        await first.end()


async def test_a_tenant_that_fills_the_queue_makes_room_for_another_and_is_told_so() -> None:
    admission = queue(queue=3)
    async with busy(admission) as holder:
        loud = [Request(admission, tenant="loud") for _ in range(3)]
        await settle()
        quiet = Request(admission, tenant="quiet")
        error = await loud[2].error()
        assert (error.status, error.code) == (429, "too_many_waiting") and error.retry_after
        assert (await Request(admission, tenant="loud").error()).status == 429, "it has more than its part"
        await holder.end()
        await asyncio.gather(*(one.end() for one in (*loud[:2], quiet)))


async def test_those_that_give_up_leave_at_once() -> None:
    admission = queue(queue=1)
    async with busy(admission) as holder:
        gone = Request(admission)
        await settle()
        gone.task.cancel()
        await settle()
        assert admission.queued == 0
        there = Request(admission)
        await settle()
        await holder.end()
        await there.end()


async def test_a_place_that_comes_as_its_request_gives_up_goes_to_the_next() -> None:
    admission = queue()
    assert admission.enter("interactive")
    first, second = Request(admission), Request(admission)
    await settle()
    admission.leave()  # `first` has been handed the place, and has not run since
    first.task.cancel()
    await settle()
    assert first.task.cancelled() and second.runs.is_set()
    await second.end()
    assert (admission.running, admission.queued) == (0, 0)


async def test_more_room_lets_those_through_that_wait_and_less_ends_nothing() -> None:
    admission = queue(1)
    requests = [Request(admission) for _ in range(3)]
    await settle()
    admission.resize(3)
    await settle()
    assert admission.running == 3
    admission.resize(1)
    late = Request(admission)
    for one in requests:
        assert not late.runs.is_set()
        await one.end()
    await late.end()


async def test_retry_after_is_reckoned_from_the_rate_at_which_requests_end(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, skipped = asyncio.get_running_loop(), [0.0]
    real = loop.time
    monkeypatch.setattr(loop, "time", lambda: real() + skipped[0])
    admission = queue(queue=40, wait=1000)
    first = Request(admission)
    waiting = [Request(admission) for _ in range(40)]
    await settle()
    await first.end()
    for one in waiting[:9]:
        await one.end()
    skipped[0] += 5.0  # ten in five seconds
    await settle()
    assert admission.queued == 30 and admission.retry_after == 16
    for one in waiting[9:]:
        await one.end()


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5), st.integers(0, 6), st.sampled_from([0.0, 0.4]), st.sampled_from([0, 3]), st.integers())
async def test_whatever_happens_the_room_is_kept_and_never_left_empty(
    capacity: int, length: int, reserved: float, every: int, seed: int
) -> None:
    random = Random(seed)
    admission = queue(capacity, queue=length, batch_queue=length, reserved=reserved, batch_every=every)
    requests: list[Request] = []
    for _ in range(60):
        alive = [one for one in requests if not one.task.done()]
        match random.choice(("new", "new", "end", "cancel", "cancel", "resize", "pause")):
            case "new":
                requests.append(Request(admission, random.choice(PRIORITIES), random.choice("abc")))
            case "end" if alive:
                random.choice(alive).ends.set()
            case "cancel" if alive:
                random.choice(alive).task.cancel()
            case "resize":
                admission.resize(capacity + random.randrange(2))
            case "pause":
                await settle()
        if random.random() < 0.5:
            await asyncio.sleep(0)
        assert admission.running <= capacity + 1
        if admission.queued_of("interactive"):
            assert admission.running >= admission.capacity, "someone waits although there is room"
    for one in requests:
        one.ends.set()
    ends = await asyncio.wait_for(asyncio.gather(*(one.task for one in requests), return_exceptions=True), 5)
    assert all(one is None or isinstance(one, ApiError | asyncio.CancelledError) for one in ends)
    assert (admission.running, admission.queued) == (0, 0)
