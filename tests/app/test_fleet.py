"""The fleet: which release and which engine answer, and what happens when one does not."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from pydantic import ValidationError

from app.backends import OpenAIBackend, Prompt, Timeouts, Upstream
from app.engine import Engine
from app.errors import ApiError
from app.fleet import Caller, EngineView, Fleet, Release, Shadowed, Supervised, Trail, affinity_of
from app.fleet.probes import look
from app.frames import BackendError, Delta, Fault
from app.metrics import Metrics
from app.settings import EngineSettings, Settings
from guardrails.types import Message
from tests.fakes import FakeUpstream, Script

PROMPT = Prompt((Message("system", "Be brief."), Message("user", "Hello")), {"temperature": 0})
ROLE = Delta()
Step = Delta | BackendError | asyncio.Event
Models = frozenset[str] | BackendError | None


def fault(kind: Fault, retry_after: int | None = None) -> BackendError:
    return BackendError(kind, f"scripted {kind}", retry_after=retry_after)


def reply(text: str) -> list[Step]:
    return [ROLE, Delta(text), Delta(finish_reason="stop")]


class Engines:
    """All engines of a test, by the host of their URL: what each answers, and what it was asked.

    scripts: the next answers of an engine, one each; after them it says its own name. usual: what it answers then,
    where it is something else. trials: what it answers to a completion of one token. listed: its models, which it
    tells when its gate opens.
    """

    def __init__(self) -> None:
        self.scripts: defaultdict[str, deque[list[Step]]] = defaultdict(deque)
        self.usual: dict[str, list[Step]] = {}
        self.trials: dict[str, BackendError | asyncio.Event] = {}
        self.listed: dict[str, Models] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.asked: list[tuple[str, str]] = []
        self.tried: Counter[str] = Counter()
        self.looked: Counter[str] = Counter()
        self.closed: list[str] = []

    @property
    def hosts(self) -> list[str]:
        """Who was asked, in order."""
        return [host for host, _ in self.asked]

    async def look(self, upstream: Upstream) -> frozenset[str] | None:
        host = _host(upstream)
        self.looked[host] += 1
        if gate := self.gates.get(host):
            await gate.wait()
        models = self.listed.get(host)
        if isinstance(models, BackendError):
            raise models
        return models

    def _script(self, upstream: Upstream) -> list[Step]:
        host = _host(upstream)
        self.asked.append((host, upstream.model))
        waiting = self.scripts[host]
        return waiting.popleft() if waiting else self.usual.get(host) or reply(host)

    async def stream(self, upstream: Upstream, prompt: Prompt) -> AsyncGenerator[Delta, None]:
        try:
            for step in self._script(upstream):
                if isinstance(step, BackendError):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    yield step
        finally:
            self.closed.append(_host(upstream))

    async def complete(self, upstream: Upstream, prompt: Prompt) -> Delta:
        if prompt.sampling.get("max_tokens") == 1:
            self.tried[_host(upstream)] += 1
            trial = self.trials.get(_host(upstream))
            if isinstance(trial, BackendError):
                raise trial
            if trial:
                await trial.wait()
            return Delta("a", "length")
        async with aclosing(self.stream(upstream, prompt)) as deltas:
            told = [delta async for delta in deltas]
        return Delta("".join(delta.text for delta in told), told[-1].finish_reason)

    async def probability(self, upstream: Upstream, messages: Sequence[Message]) -> float:
        for step in self._script(upstream):
            if isinstance(step, BackendError):
                raise step
        return 0.75


def _host(upstream: Upstream) -> str:
    return upstream.url.removeprefix("http://").removesuffix("/v1")


class FakeEngine:
    """The engine under [engine] as the fleet sees it."""

    def __init__(self) -> None:
        self.state, self.url, self.model, self.api_key = "ready", "http://own/v1", "small", "key"
        self.without: frozenset[str] = frozenset()
        self.retry_after = 7


class Clock:
    """The loop's time, and what a test skips of it."""

    def __init__(self) -> None:
        self.skipped = 0.0
        self._loop = asyncio.get_running_loop()

    def __call__(self) -> float:
        return self._loop.time() + self.skipped


class Given:
    """A fleet of fake engines."""

    def __init__(self, **settings: Any):
        self.engines, self.engine, self.clock, self.metrics = Engines(), FakeEngine(), Clock(), Metrics()
        connect: Callable[[Timeouts], Caller] = lambda _: self.engines  # noqa: E731
        self.fleet = Fleet(
            Settings(**settings), self.engine, connect, self.engines.look, self.metrics, clock=self.clock
        )

    def release(self, model: str = "m", sticky: str = "") -> Release:
        return self.fleet.choose(model, sticky)

    async def say(self, model: str = "m", affinity: str = "", trail: Trail | None = None) -> str:
        stream = self.fleet.stream(PROMPT, self.release(model), affinity, trail)
        async with aclosing(stream) as deltas:
            return "".join([delta.text async for delta in deltas])

    async def fails(self, model: str = "m") -> BackendError:
        with pytest.raises(BackendError) as caught:
            await self.say(model)
        return caught.value

    async def hold(self, affinity: str = "", model: str = "m") -> AsyncGenerator[Delta, None]:
        """A reply that has begun and waits for its reader."""
        stream = self.fleet.stream(PROMPT, self.release(model), affinity)
        await anext(stream)
        return stream

    def view(self, engine: str) -> EngineView:
        return {f"{one.pool}/{one.name}": one for one in self.fleet.snapshot()}[engine]

    def states(self) -> dict[str, str]:
        return {one.name: one.state for one in self.fleet.snapshot()}


def pool(*engines: str, **more: Any) -> dict[str, Any]:
    """A pool that is looked at once and tries nobody, unless told."""
    usual: dict[str, Any] = {"probe_every": 1000.0, "trial_every": 0.0}
    return usual | {"engines": {name: {"url": f"http://{name}/v1"} for name in engines}} | more


def one_pool(*engines: str, **more: Any) -> dict[str, Any]:
    return {"pools": {"p": pool(*engines, **more)}, "models": {"m": {"pool": "p", "model": "up"}}}


@asynccontextmanager
async def fleet_of(*engines: str, **more: Any) -> AsyncIterator[Given]:
    """A fleet with one model on one pool."""
    async with started(**one_pool(*engines, **more)) as given:
        yield given


@asynccontextmanager
async def started(prepare: Callable[[Engines], None] = lambda _: None, **settings: Any) -> AsyncIterator[Given]:
    given = Given(**settings)
    prepare(given.engines)
    await given.fleet.start()
    await settle()
    yield given
    await given.fleet.close()
    assert all(one.in_flight == 0 for one in given.fleet.snapshot())


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def until(true: Callable[[], object], timeout: float = 5.0) -> None:
    async with asyncio.timeout(timeout):
        while not true():
            await asyncio.sleep(0.002)


# -- releases ----------------------------------------------------------------------------------------------------------


async def test_without_pools_the_one_engine_serves_its_one_model() -> None:
    async with started() as given:
        assert given.fleet.models == ("small",) and given.fleet.uses_engine
        release = given.release("small")
        assert (release.name, release.kind) == ("engine/small", "stable")
        assert await given.say("small") == "own" and given.engines.asked == [("own", "small")]
        given.engine.model = "other"  # what an engine of its own is called is known when it has been looked at
        assert given.fleet.models == ("other",) and await given.say("other") == "own"
        with pytest.raises(ApiError, match="The model 'small' does not exist; this gateway serves 'other'") as caught:
            given.release("small")
        assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
        given.engine.without = frozenset({"tools"})
        assert given.fleet.without(given.release("other")) == {"tools"}


@pytest.mark.parametrize(("state", "words"), [("starting", "is starting"), ("failed", "cannot be started")])
async def test_an_engine_that_does_not_run_is_said_to_be_away_and_for_how_long(state: str, words: str) -> None:
    async with started() as given:
        given.fleet.require(given.release("small"))
        given.engine.state = state
        with pytest.raises(ApiError, match=words) as caught:
            given.fleet.require(given.release("small"))
        assert (caught.value.status, caught.value.code) == (503, "engine_not_ready")
        assert caught.value.retry_after == given.fleet.retry_after == 7
        assert given.fleet.missing() == {"pool engine": "no engine answers"}
        error = await given.fails("small")
        assert (error.fault, error.retry_after) == ("unreachable", 7) and given.engines.asked == []


def canaried(share: float, model: str = "new") -> dict[str, Any]:
    canary = {"model": model, "share": share}
    return {"pools": {"p": pool("a")}, "models": {"m": {"pool": "p", "model": "up", "canary": canary}}}


def on_canary(given: Given) -> set[str]:
    people = [f"person-{i}" for i in range(4000)]
    return {person for person in people if given.release("m", person).kind == "canary"}


async def test_a_canary_gets_its_share_of_people_always_the_same_ones() -> None:
    five, again, twenty = (on_canary(Given(**canaried(share))) for share in (0.05, 0.05, 0.2))
    assert 150 < len(five) < 250 and 700 < len(twenty) < 900
    assert five == again and five < twenty, "a larger share moves nobody back"


async def test_the_next_canary_is_tried_on_other_people() -> None:
    first, second = (on_canary(Given(**canaried(0.1, model))) for model in ("one", "two"))
    assert len(first & second) < 100


async def test_a_canary_gets_its_share_of_those_of_whom_nothing_is_known() -> None:
    given = Given(**canaried(0.5))
    assert {given.release("m").kind for _ in range(64)} == {"stable", "canary"}


async def test_a_release_knows_its_prices() -> None:
    model = {"pool": "p", "model": "up", "prompt_price": 2.0, "completion_price": 10.0}
    release = Given(pools={"p": pool("a")}, models={"m": model}).release()
    assert release.cost(1000, 100) == pytest.approx(0.003)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"models": {"m": {"pool": "q", "model": "up"}}}, r"models.m.pool: there is no pool 'q'; there are: engine"),
        ({"pools": {"p": pool("a")}}, r"\[pools\] without \[models\]"),
        ({"pools": {"engine": pool("a")}}, "choose another"),
        (one_pool("a") | {"models": {"m": {"pool": "p", "model": "x", "fallback": ["y"]}}}, "no model or pool 'y'"),
        (one_pool("a") | {"models": {"m": {"pool": "p", "model": "x", "canary": {"share": 0.1}}}}, "needs the `model`"),
        ({"pools": {"p": pool()}, "models": {"m": {"pool": "p", "model": "x"}}}, "at least 1 item"),
    ],
)
def test_settings_that_cannot_be_served_are_refused_with_the_place(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Settings(**settings)


# -- the choice of an engine -------------------------------------------------------------------------------------------


async def test_requests_with_the_same_beginning_go_to_the_same_engine_at_every_gateway() -> None:
    seen: dict[str, set[str]] = defaultdict(set)
    for _ in range(2):
        async with fleet_of("a", "b", "c") as given:
            for key in map(str, range(60)):
                seen[key] |= {await given.say(affinity=key), await given.say(affinity=key)}
    assert all(len(hosts) == 1 for hosts in seen.values())
    assert min(Counter(host for (host,) in seen.values()).values()) > 8


@pytest.mark.parametrize(
    ("own", "behind", "spreads"),
    [(("a",), (), False), (("a", "b"), (), True), (("a",), ("b",), False), (("a",), ("b", "c"), True)],
)
async def test_which_engine_is_asked_matters_where_a_pool_on_the_way_has_several(
    own: tuple[str, ...], behind: tuple[str, ...], spreads: bool
) -> None:
    pools = {"p": pool(*own)} | ({"q": pool(*behind)} if behind else {})
    models = {"m": {"pool": "p", "model": "up", "fallback": ["q"] if behind else []}}
    async with started(pools=pools, models=models) as given:
        assert given.fleet.spreads(given.release()) is spreads


async def test_an_engine_has_conversations_by_its_weight() -> None:
    engines = {name: {"url": f"http://{name}/v1", "weight": weight} for name, weight in (("a", 1.0), ("b", 3.0))}
    async with fleet_of(engines=engines) as given:
        said = Counter([await given.say(affinity=str(key)) for key in range(600)])
    assert 105 < said["a"] < 195


async def test_an_engine_that_goes_moves_only_its_own_conversations() -> None:
    async with fleet_of("a", "b", "c") as given:
        before = {key: await given.say(affinity=key) for key in map(str, range(60))}
        given.fleet.drain("p/b")
        after = {key: await given.say(affinity=key) for key in before}
        assert {key for key in before if before[key] != after[key]} == {k for k, host in before.items() if host == "b"}
        given.fleet.resume("p/b")
        assert before == {key: await given.say(affinity=key) for key in before}


@examples(max_examples=30, deadline=None)
@given(st.integers())
async def test_no_engine_is_much_busier_than_another_whatever_the_conversations_are(seed: int) -> None:
    random = Random(seed)
    async with fleet_of("a", "b", "c") as given:
        held: list[AsyncGenerator[Delta, None]] = []
        for _ in range(120):
            if held and random.random() < 0.3:
                await held.pop(random.randrange(len(held))).aclose()
                continue
            held.append(await given.hold(random.choice(["x", "x", "x", "y", ""])))
            loads = [one.in_flight for one in given.fleet.snapshot()]
            asked = {"a": 0, "b": 1, "c": 2}[given.engines.hosts[-1]]
            assert loads[asked] - 1 <= 1.25 * min(loads) + 4
        for stream in held:
            await stream.aclose()


async def test_requests_that_have_nothing_in_common_go_to_the_least_busy_engine_by_turns() -> None:
    async with fleet_of("a", "b", "c") as given:
        assert [await given.say() for _ in range(6)] == ["a", "b", "c", "a", "b", "c"]
        held = [await given.hold(), await given.hold()]
        assert given.engines.hosts[-2:] == ["a", "b"]
        assert [await given.say() for _ in range(3)] == ["c", "c", "c"]
        for stream in held:
            await stream.aclose()


async def test_an_engine_gets_no_more_at_once_than_it_may() -> None:
    async with fleet_of("a", in_flight=2) as given:
        held = [await given.hold(), await given.hold()]
        error = await given.fails()
        assert (error.fault, error.message, error.retry_after) == ("busy", "All engines are busy.", 1)
        await held[0].aclose()
        assert await given.say() == "a"
        await held[1].aclose()


async def test_an_engine_is_only_asked_for_models_that_it_lists() -> None:
    def listed(engines: Engines) -> None:
        engines.listed = {"a": frozenset({"up"}), "b": frozenset({"up", "new"}), "c": frozenset({"else"})}

    settings = one_pool("a", "b", "c") | {
        "models": {name: {"pool": "p", "model": model} for name, model in (("m", "up"), ("n", "new"))}
    }
    async with started(listed, **settings) as given:
        assert {await given.say("m") for _ in range(4)} == {"a", "b"}
        assert {await given.say("n") for _ in range(4)} == {"b"}
        assert given.states() == {"a": "ready", "b": "ready", "c": "probing"}
        assert given.view("p/c").last_error == "broken: it lists none of the models that it is asked for: up, new"


def test_what_begins_alike_has_the_same_affinity_for_one_tenant() -> None:
    told = [Message("system", "s"), Message("user", "u"), Message("assistant", "a"), Message("user", "v")]
    assert affinity_of("t", told) == affinity_of("t", told[:2])
    assert len({affinity_of(t, m) for t, m in (("t", told), ("u", told), ("t", told[1:]), ("t", told[:1]))}) == 4


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unreachable", "busy", "timeout", "broken"])
@pytest.mark.parametrize("opening", [[], [ROLE]])
async def test_an_engine_that_fails_before_it_says_anything_is_anothers_turn(kind: Fault, opening: list[Step]) -> None:
    async with fleet_of("a", "b") as given:
        given.engines.scripts["a"].append([*opening, fault(kind)])
        trail = Trail()
        assert await given.say(trail=trail) == "b"
        assert given.engines.hosts == ["a", "b"] == given.engines.closed
        assert trail.tries == [("p/a", kind)] and trail.engine == "b"
        assert trail.release == given.release()
        assert given.view("p/a").requests == {kind: 1} and given.view("p/b").requests == {"answered": 1}


async def test_once_something_is_said_an_error_is_passed_on_and_nobody_else_is_asked() -> None:
    async with fleet_of("a", "b") as given:
        given.engines.scripts["a"].append([ROLE, Delta("Hel"), fault("broken")])
        stream = given.fleet.stream(PROMPT, given.release())
        assert [(await anext(stream)).text, (await anext(stream)).text] == ["", "Hel"]
        with pytest.raises(BackendError, match="scripted broken"):
            await anext(stream)
        assert given.engines.hosts == ["a"] and given.view("p/a").requests == {"broken": 1}


async def test_what_an_engine_refuses_is_the_clients_fault_and_is_asked_of_no_other() -> None:
    settings = one_pool("a", "b") | {"models": {"m": {"pool": "p", "model": "up", "fallback": ["engine"]}}}
    async with started(**settings) as given:
        for _ in range(8):
            given.engines.scripts["a"].append([fault("rejected")])
        for _ in range(8):
            with pytest.raises(BackendError, match="scripted rejected"):
                await given.say(affinity="1" if given.engines.hosts else "")
            given.engines.scripts["b"] = given.engines.scripts["a"]
        assert len(given.engines.hosts) == 8 and set(given.states().values()) == {"ready"}


async def test_only_so_many_engines_are_asked() -> None:
    async with fleet_of("a", "b", "c", "d", retries=1) as given:
        given.engines.usual = {name: [fault("unreachable")] for name in "abcd"}
        assert (await given.fails()).fault == "unreachable"
        assert given.engines.hosts == ["a", "b"]


async def test_retries_stay_within_a_fifth_of_all_requests_when_every_engine_fails() -> None:
    async with fleet_of("a", "b", "c") as given:
        given.engines.usual = {name: [fault("busy", 0)] for name in "abc"}
        for _ in range(400):
            await given.fails()
        assert 400 + 70 < len(given.engines.hosts) <= 400 * 1.2 + 10 + 1


async def test_the_next_engine_has_only_what_is_left_of_the_clients_time() -> None:
    async with started(**one_pool("a", "b", "c"), first_token_timeout=0.05) as given:
        given.engines.scripts["a"].append([fault("broken")])
        given.engines.scripts["b"].append([ROLE, asyncio.Event(), Delta("late")])
        error = await given.fails()
        assert error.fault == "timeout" and given.engines.hosts == ["a", "b"] == given.engines.closed


async def test_after_the_clients_time_nobody_else_is_asked() -> None:
    async with fleet_of("a", "b") as given:
        gate = asyncio.Event()
        given.engines.scripts["a"].append([gate, fault("timeout")])
        asking = asyncio.create_task(given.fails())
        await settle()
        given.clock.skipped += 61
        gate.set()
        assert (await asking).fault == "timeout" and given.engines.hosts == ["a"]


async def test_a_busy_engine_is_left_alone_for_as_long_as_it_says() -> None:
    async with fleet_of("a", "b") as given:
        given.engines.scripts["a"].append([fault("busy", 20)])
        assert [await given.say() for _ in range(5)] == ["b"] * 5 and given.engines.hosts.count("a") == 1
        assert given.states() == {"a": "busy", "b": "ready"}
        given.engines.scripts["b"].append([fault("busy", 30)])
        assert (await given.fails()).retry_after == 20
        assert (await given.fails()).retry_after == 20, "and nobody is asked meanwhile"
        assert len(given.engines.hosts) == 7
        given.clock.skipped += 20
        assert await given.say() == "a"


async def test_a_busy_engine_that_does_not_say_for_how_long_gets_no_more_at_once_than_it_had() -> None:
    async with fleet_of("a", in_flight=50) as given:
        admission = given.fleet.slot(given.release())._admission
        held = [await given.hold() for _ in range(4)]
        given.engines.scripts["a"].append([fault("busy")])
        await given.fails()
        assert (await given.fails()).message == "All engines are busy." and len(given.engines.hosts) == 5
        assert admission.capacity == 4, "others wait in the queue"
        await held.pop().aclose()
        for _ in range(5):
            assert await given.say() == "a"
        assert admission.capacity == 5, "and it is trusted with more as it answers"
        for stream in held:
            await stream.aclose()


async def test_an_engine_that_fails_again_and_again_is_left_alone_until_it_can_write_a_token() -> None:
    async with fleet_of("a", "b", probe_every=0.02) as given:
        given.engines.usual["a"] = [fault("broken")]
        given.engines.trials["a"] = fault("broken")
        for _ in range(10):
            assert await given.say() == "b"
        assert given.engines.hosts.count("a") == 5 and given.states()["a"] in ("open", "probing")
        given.engines.usual.clear()
        given.clock.skipped += 5.0
        await until(lambda: given.engines.tried["a"])
        assert {await given.say() for _ in range(4)} == {"b"}, "its trial failed, too"
        given.engines.trials.clear()
        given.clock.skipped += 5.0
        await until(lambda: given.states()["a"] == "ready")
        assert {await given.say() for _ in range(4)} == {"a", "b"}


async def test_half_of_the_requests_failing_is_enough_even_if_not_in_a_row() -> None:
    async with fleet_of("a") as given:
        for number in range(20):
            if number % 2:
                given.engines.scripts["a"].append([fault("broken")])
                await given.fails()
            else:
                await given.say()
        assert given.states() == {"a": "open"}


async def test_where_there_is_no_other_one_request_tries_an_engine_that_was_left_alone() -> None:
    async with fleet_of("a") as given:
        given.engines.usual["a"] = [fault("broken")]
        for _ in range(5):
            await given.fails()
        error = await given.fails()
        assert (error.fault, error.retry_after) == ("busy", 5) and len(given.engines.hosts) == 5
        given.clock.skipped += 5.1
        gate = asyncio.Event()
        given.engines.scripts["a"].append([gate, Delta("back"), Delta(finish_reason="stop")])
        trying = asyncio.create_task(given.say())
        await settle()
        await given.fails()
        assert len(given.engines.hosts) == 6, "one at a time"
        gate.set()
        assert await trying == "back" and given.states() == {"a": "ready"}


async def test_a_whole_reply_and_a_graders_question_go_to_another_engine_too() -> None:
    async with fleet_of("a", "b") as given:
        given.engines.usual["a"] = [fault("broken")]
        whole = await given.fleet.complete(PROMPT, given.release())
        assert (whole.text, whole.finish_reason) == ("b", "stop")
        given.engines.asked.clear()
        assert await given.fleet.probability(PROMPT.messages) == 0.75
        assert given.engines.hosts == ["a", "b"]


# -- fallbacks ---------------------------------------------------------------------------------------------------------


def with_fallback(*fallback: str, **more: Any) -> dict[str, Any]:
    return {
        "pools": {"p": pool("a"), "q": pool("b"), "r": pool("c", **more)},
        "models": {
            "m": {"pool": "p", "model": "up", "fallback": list(fallback)},
            "n": {"pool": "q", "model": "lesser"},
        },
    }


async def test_a_model_that_cannot_be_had_is_answered_by_what_it_falls_back_to() -> None:
    # "n" is a model, "r" and "engine" are pools
    async with started(**with_fallback("n", "engine", "r")) as given:
        given.engines.usual["a"] = [fault("unreachable")]
        trail = Trail()
        assert await given.say(trail=trail) == "b" and given.engines.asked[-1] == ("b", "lesser")
        assert trail.release and (trail.release.name, trail.release.kind) == ("q/lesser", "fallback")
        given.engines.usual["b"] = [fault("busy", 9)]
        assert await given.say() == "own" and given.engines.asked[-1] == ("own", "small")
        given.engine.state = "starting"
        given.fleet.require(given.release())


async def test_when_all_fail_the_error_is_that_of_the_model_that_was_asked_for() -> None:
    async with started(**with_fallback("n")) as given:
        given.engines.usual = {"a": [fault("timeout")], "b": [fault("rejected")]}
        error = await given.fails()
        assert error.fault == "timeout" and given.engines.hosts == ["a", "b"]


async def test_a_fallback_that_cannot_be_sent_what_the_request_says_is_passed_over() -> None:
    async with started(**with_fallback("r", "n", without=["temperature"])) as given:
        given.engines.usual["a"] = [fault("broken")]
        assert await given.say() == "b"


async def test_a_canary_that_fails_is_answered_by_the_stable_release() -> None:
    settings = canaried(1.0) | {"pools": {"p": pool("a"), "q": pool("b")}}
    settings["models"]["m"]["canary"]["pool"] = "q"
    async with started(**settings) as given:
        given.engines.usual["b"] = [fault("broken")]
        assert given.release().kind == "canary" and await given.say() == "a"
        assert given.engines.asked == [("b", "new"), ("a", "up")]


# -- probes ------------------------------------------------------------------------------------------------------------


async def test_an_engine_gets_requests_once_it_has_written_a_token() -> None:
    def cold(engines: Engines) -> None:
        engines.trials["a"] = fault("broken")

    async with started(cold, **one_pool("a", probe_every=0.01, trial_every=60.0)) as given:
        await until(lambda: given.engines.tried["a"] > 1)
        assert given.states() == {"a": "probing"} and given.view("p/a").last_error == "broken: scripted broken"
        assert (await given.fails()).fault == "unreachable" and given.fleet.missing() == {"pool p": "no engine answers"}
        given.engines.trials.clear()
        await until(lambda: given.states() == {"a": "ready"})
        assert await given.say() == "a" and given.fleet.missing() == {}
        assert given.view("p/a").last_error == ""


async def test_an_engine_is_tried_only_when_nobody_has_asked_it_for_a_while() -> None:
    async with fleet_of("a", probe_every=0.01, trial_every=60.0) as given:
        await until(lambda: given.engines.looked["a"] > 3)
        assert given.engines.tried["a"] == 1
        given.clock.skipped += 59
        await given.say()
        given.clock.skipped += 59
        looks = given.engines.looked["a"]
        await until(lambda: given.engines.looked["a"] > looks + 2)
        assert given.engines.tried["a"] == 1
        given.clock.skipped += 2
        await until(lambda: given.engines.tried["a"] == 2)


@pytest.mark.parametrize(("kind", "looks"), [("unreachable", 1), ("timeout", 2), ("broken", 2)])
async def test_an_engine_that_is_gone_gets_no_more_requests(kind: Fault, looks: int) -> None:
    async with fleet_of("a", "b", probe_every=0.02) as given:
        given.engines.listed["a"] = fault(kind)
        before = given.engines.looked["a"]
        await until(lambda: given.states()["a"] == "probing")
        assert looks <= given.engines.looked["a"] - before <= looks + 3
        assert {await given.say() for _ in range(4)} == {"b"}
        given.engines.listed.clear()
        await until(lambda: given.states()["a"] == "ready")


async def test_an_engine_that_comes_back_writes_a_token_first_however_lately_it_was_asked() -> None:
    async with fleet_of("a", probe_every=0.01, trial_every=60.0) as given:
        await given.say()
        given.engines.listed["a"] = fault("unreachable")
        given.engines.trials["a"] = fault("broken")
        await until(lambda: given.states() == {"a": "probing"})
        given.engines.listed.clear()
        tried = given.engines.tried["a"]
        await until(lambda: given.engines.tried["a"] > tried + 1)
        assert given.states() == {"a": "probing"}


async def test_an_engine_that_answers_requests_is_not_down_because_it_is_too_busy_for_a_look() -> None:
    async with fleet_of("a", probe_every=0.01) as given:
        given.engines.listed["a"] = fault("timeout")
        for _ in range(4):
            gate = given.engines.gates["a"] = asyncio.Event()
            looks = given.engines.looked["a"]
            await until(lambda looks=looks: given.engines.looked["a"] > looks)  # type: ignore[misc]
            await given.say()
            gate.set()
        assert given.states() == {"a": "ready"}
        given.engines.gates.clear()
        await until(lambda: given.states() == {"a": "probing"})


async def test_an_engine_that_is_too_busy_for_a_trial_is_alive() -> None:
    async with fleet_of("a", probe_every=0.01, trial_every=60.0) as given:
        given.engines.trials["a"] = fault("busy")
        given.clock.skipped += 61
        await until(lambda: given.engines.tried["a"] > 8)
        assert given.states() == {"a": "ready"} and await given.say() == "a"


async def test_an_engine_that_writes_no_token_in_time_gets_no_requests() -> None:
    def silent(engines: Engines) -> None:
        engines.trials["a"] = asyncio.Event()

    async with started(silent, **one_pool("a", probe_every=0.01, trial_every=60.0, first_token_timeout=0.02)) as given:
        await until(lambda: given.view("p/a").last_error == "timeout: it wrote no token in time")
        assert given.states() == {"a": "probing"}


async def test_the_queue_is_as_wide_as_the_engines_that_answer_allow() -> None:
    async with fleet_of("a", "b", probe_every=0.02, in_flight=10) as given:
        admission = given.fleet.slot(given.release())._admission
        assert admission.capacity == 20
        given.engines.listed["a"] = fault("unreachable")
        await until(lambda: admission.capacity == 10)
        async with given.fleet.slot(given.release(), "batch", tenant="t"):
            assert admission.running == 1


# -- leaving, draining, other settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("opening", [[], [Delta("Hel")]])
async def test_a_client_that_leaves_closes_the_engines_stream_at_once(opening: list[Step]) -> None:
    async with fleet_of("a", "b") as given:
        given.engines.scripts["a"].append([*opening, asyncio.Event()])

        async def read() -> None:
            async with aclosing(given.fleet.stream(PROMPT, given.release())) as deltas:
                async for _ in deltas:
                    pass

        reading = asyncio.create_task(read())
        await settle()
        assert given.view("p/a").in_flight == 1
        reading.cancel()
        await asyncio.wait({reading})
        assert given.engines.closed == ["a"] == given.engines.hosts
        assert given.view("p/a").in_flight == 0 and given.view("p/a").requests == {"cancelled": 1}


async def test_closing_a_reply_between_two_pieces_closes_the_engines_stream_before_it_returns() -> None:
    async with fleet_of("a") as given:
        stream = await given.hold()
        await stream.aclose()
        assert given.engines.closed == ["a"]


async def test_a_draining_engine_ends_what_it_has_begun_and_gets_nothing_new() -> None:
    async with fleet_of("a", "b") as given:
        stream = await given.hold()
        given.fleet.drain("p/a")
        assert {await given.say() for _ in range(3)} == {"b"} and given.states()["a"] == "draining"
        assert await given.fleet.drained("p/a", 0.01) == 1
        waiting = asyncio.create_task(given.fleet.drained("p/a", 5))
        await settle()
        assert not waiting.done()
        assert [delta.text async for delta in stream] == ["a", ""]
        assert await waiting == 0
        with pytest.raises(ApiError, match="There is no engine 'p/x'"):
            given.fleet.drain("p/x")


async def test_other_settings_keep_the_engines_that_stay_and_let_the_others_end_their_work() -> None:
    async with fleet_of("a", "b") as given:
        given.engines.scripts["a"].append([fault("busy", 50)])
        assert await given.say() == "b"
        held = await given.hold()
        old = given.release()
        given.fleet.reload(Settings(**one_pool("a", "c")))
        await settle()
        assert given.states() == {"a": "busy", "c": "ready", "b": "draining"}
        assert {await given.say() for _ in range(3)} == {"c"}
        await held.aclose()
        await settle()
        assert set(given.states()) == {"a", "c"}
        sample = given.metrics.registry.get_sample_value
        given.fleet.publish()
        assert sample("newel_pool_engine_up", {"pool": "p", "engine": "c"}) == 1
        given.fleet.reload(Settings(pools={"q": pool("d")}, models={"m": {"pool": "q", "model": "up"}}))
        await settle()
        assert await given.say() == "d" and given.fleet.models == ("m",)
        with pytest.raises(ApiError, match="is served elsewhere now"):
            given.fleet.slot(old)
        given.fleet.publish()
        assert sample("newel_pool_engine_up", {"pool": "p", "engine": "c"}) is None


# -- shadows -----------------------------------------------------------------------------------------------------------


def shadowed(share: float = 1.0) -> dict[str, Any]:
    shadow = {"model": "next", "share": share}
    return {"pools": {"p": pool("a")}, "models": {"m": {"pool": "p", "model": "up", "shadow": shadow}}}


async def test_a_shadow_is_asked_the_same_in_the_background() -> None:
    async with started(**shadowed()) as given:
        told: list[Shadowed] = []
        gate = asyncio.Event()
        given.engines.scripts["a"].append([gate, *reply("from the shadow")])
        assert given.fleet.shadow(PROMPT, given.release(), "someone", said=told.append)
        await settle()
        assert await given.say() == "a" and not told
        gate.set()
        await settle()
        (one,) = told
        assert one.reply and (one.reply.text, one.error) == ("from the shadow", "")
        assert (one.release.kind, one.release.name) == ("shadow", "p/next")
        assert given.engines.asked == [("a", "next"), ("a", "up")]
        sample = given.metrics.registry.get_sample_value
        assert sample("newel_shadow_requests_total", {"model": "m", "outcome": "answered"}) == 1


async def test_a_broken_shadow_is_asked_once_and_says_nothing_of_the_engine() -> None:
    async with started(**shadowed()) as given:
        told: list[Shadowed] = []
        given.engines.usual["a"] = [fault("broken")]
        for _ in range(10):
            given.fleet.shadow(PROMPT, given.release(), said=told.append)
        await settle()
        assert [one.error for one in told] == ["broken"] * 10 and len(given.engines.hosts) == 10
        assert given.states() == {"a": "ready"}


async def test_a_shadow_that_answers_does_not_cover_up_an_engine_that_fails() -> None:
    async with started(**shadowed()) as given:
        for number in range(5):
            given.engines.scripts["a"].append([fault("broken")])
            await given.fails()
            if number < 4:
                given.fleet.shadow(PROMPT, given.release())
                await settle()
        assert len(given.engines.hosts) == 9 and given.states() == {"a": "open"}


async def test_only_so_many_copies_are_under_way() -> None:
    async with started(**shadowed()) as given:
        given.engines.usual["a"] = [asyncio.Event()]
        begun = [given.fleet.shadow(PROMPT, given.release()) for _ in range(70)]
        assert begun.count(True) == 64
        await settle()
        given.engines.usual.clear()


async def test_a_shadow_gives_way_when_there_is_no_room() -> None:
    settings = shadowed() | {"admission": {"in_flight": 2, "shadow_queue": 0, "reserved": 0.5}}
    async with started(**settings) as given:
        told: list[Shadowed] = []
        async with given.fleet.slot(given.release()):
            given.fleet.shadow(PROMPT, given.release(), said=told.append)
            await settle()
        assert [one.error for one in told] == ["overloaded"] and given.engines.asked == []


async def test_a_shadow_gets_its_share_of_conversations_and_none_without_one() -> None:
    async with started(**shadowed(0.25)) as given:
        begun = [given.fleet.shadow(PROMPT, given.release(), f"c{i}") for i in range(60)]
        assert 5 < sum(begun) < 28
        assert begun == [given.fleet.shadow(PROMPT, given.release(), f"c{i}") for i in range(60)]
        assert given.fleet.has_shadow(given.release())
        await settle()
    async with fleet_of("a") as given:
        assert not given.fleet.has_shadow(given.release())
        assert not given.fleet.shadow(PROMPT, given.release(), "someone")


async def test_what_engines_did_is_in_the_metrics() -> None:
    async with fleet_of("a", "b") as given:
        given.engines.scripts["a"].append([fault("busy", 50)])
        await given.say()
        stream = await given.hold()
        for _ in range(2):  # scraped twice, counted once
            given.fleet.publish()
        await stream.aclose()

        def sample(name: str, engine: str, **labels: str) -> float | None:
            return given.metrics.registry.get_sample_value(name, {"pool": "p", "engine": engine, **labels})

        assert (sample("newel_pool_engine_up", "a"), sample("newel_pool_engine_up", "b")) == (0, 1)
        assert sample("newel_pool_engine_in_flight", "b") == 1
        assert sample("newel_pool_engine_requests_total", "a", outcome="busy") == 1
        assert sample("newel_pool_engine_requests_total", "b", outcome="answered") == 1


def test_the_supervised_engine_is_one_that_the_fleet_can_ask(tmp_path: Path) -> None:
    engine: Supervised = Engine(EngineSettings(), tmp_path)
    assert engine.state == "stopped" and engine.retry_after >= 1


# -- real servers ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def loopback(upstreams: Mapping[str, str], **more: Any) -> AsyncIterator[Fleet]:
    """A fleet over HTTP; every engine has been looked at once."""
    engines = {name: {"url": url} for name, url in upstreams.items()}
    settings = Settings(pools={"p": pool() | {"engines": engines} | more}, models={"m": {"pool": "p", "model": "fake"}})
    async with aiohttp.ClientSession() as session:
        connect: Callable[[Timeouts], Caller] = partial(OpenAIBackend, session)
        fleet = Fleet(settings, FakeEngine(), connect, partial(look, session), Metrics())
        await fleet.start()
        await until(lambda: all(one.state == "ready" for one in fleet.snapshot()))
        yield fleet
        await fleet.close()


@asynccontextmanager
async def two(a: Script, b: Script, **more: Any) -> AsyncIterator[tuple[FakeUpstream, FakeUpstream, Fleet]]:
    """Two engines, of which the first is asked first, and their fleet."""
    async with FakeUpstream(a) as one, FakeUpstream(b) as other, loopback({"a": one.url, "b": other.url}, **more) as it:
        yield one, other, it


async def text_of(stream: AsyncGenerator[Delta, None]) -> str:
    async with aclosing(stream) as deltas:
        return "".join([delta.text async for delta in deltas])


def prompt() -> Prompt:
    return Prompt((Message("user", "Hello"),), {})


BAD = {
    "503": Script(status=503),
    "an error frame after a 200": Script(deltas=[b'data: {"error": {"code": 503}}\n\n']),
    "an end before a word": Script(deltas=[], end="cut"),
    "an end in the middle of the first frame": Script(deltas=[b"data: {"], end="cut"),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
async def test_over_http_another_engine_answers_in_place_of_one_that_gives(bad: Script) -> None:
    async with two(bad, Script(["fine"])) as (a, _, fleet):
        assert await text_of(fleet.stream(prompt(), fleet.choose("m"))) == "fine"
        assert len(a.seen) == 1


async def test_over_http_an_engine_that_is_killed_between_requests_costs_nobody_an_answer() -> None:
    async with two(Script(["a"]), Script(["b"])) as (a, _, fleet):
        assert await text_of(fleet.stream(prompt(), fleet.choose("m"))) == "a"
        await a.__aexit__()
        said = [await text_of(fleet.stream(prompt(), fleet.choose("m"))) for _ in range(12)]
        assert said == ["b"] * 12


async def test_over_http_a_client_that_leaves_ends_the_engines_work_within_a_second() -> None:
    async with FakeUpstream(Script(["Hel", 100.0, "lo"])) as a, loopback({"a": a.url}) as fleet:
        stream = fleet.stream(prompt(), fleet.choose("m"))
        assert (await anext(stream)).text == ""
        assert (await anext(stream)).text == "Hel"
        began = asyncio.get_running_loop().time()
        await stream.aclose()
        seen = await a.seen[0].finished(1.0)
        assert seen.gone and asyncio.get_running_loop().time() - began < 1


async def test_over_http_an_engine_that_is_silent_is_given_up_for_another() -> None:
    async with two(Script([], end="hang"), Script(["fine"]), first_token_timeout=0.1) as (a, _, fleet):
        assert await text_of(fleet.stream(prompt(), fleet.choose("m"))) == "fine"
        assert (await a.seen[0].finished(1.0)).gone


async def test_a_look_at_a_real_server_tells_what_it_lists_or_what_is_wrong() -> None:
    async with FakeUpstream() as a, aiohttp.ClientSession() as session:
        assert await look(session, Upstream(a.url, "")) == {"fake"}
        assert await look(session, Upstream(f"{a.root}/elsewhere", "")) is None
        url = a.url
        await a.__aexit__()
        with pytest.raises(BackendError, match="cannot be reached") as caught:
            await look(session, Upstream(url, ""))
        assert caught.value.fault == "unreachable"
