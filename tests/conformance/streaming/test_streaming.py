"""newel passes its own conformance suite, in process and over HTTP; and the suite finds out systems that do not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.conformance.streaming.cases import Case, Channel, load
from tests.conformance.streaming.chunkings import chunkings, halves, joined
from tests.conformance.streaming.runner import leaked, run, table
from tests.conformance.streaming.targets import Gateway, Model, Newel, Rules, policy
from tests.fakes import FakeUpstream
from tests.gateway import running, settings

SUITE = load()
CONTENT = [case for case in SUITE.case if case.channel == "content"]
BY_NAME = {case.name: case for case in SUITE.case}


@pytest.mark.parametrize("case", SUITE.case, ids=lambda case: case.name)
async def test_newel_passes_in_process(case: Case) -> None:
    outcome = await run(Newel(), SUITE, case)
    assert outcome.faults == []
    assert outcome.ways > 10


@asynccontextmanager
async def gateway_with_rules(home: Path, upstream: FakeUpstream, cases: Sequence[Case]) -> AsyncIterator[Gateway]:
    """newel's gateway on loopback, with a tenant, a policy and a key for each set of rules."""
    sets = {",".join(case.rules): SUITE.rules_of(case) for case in cases}
    chosen = settings(home, upstream.url)
    for number, rules in enumerate(sets.values()):
        (home / "policies" / f"set-{number}.toml").write_text(policy(f"set-{number}", rules), encoding="utf-8")
    async with running(home, upstream, settings=chosen) as gateway:
        keys = {rules: await gateway.tenant(f"set-{number}", f"set-{number}") for number, rules in enumerate(sets)}
        yield Gateway(f"{gateway.base}/v1", upstream, keys, gateway.model)


async def test_newel_passes_over_http(tmp_path: Path, upstream: FakeUpstream) -> None:
    async with gateway_with_rules(tmp_path, upstream, SUITE.case) as target:
        outcomes = [await run(target, SUITE, case, thorough=False) for case in SUITE.case]
    assert not any(outcome.faults for outcome in outcomes), table(outcomes)


async def test_newel_passes_when_the_network_cuts_inside_characters(tmp_path: Path, upstream: FakeUpstream) -> None:
    cases = [case for case in CONTENT if not case.text.isascii()]
    async with gateway_with_rules(tmp_path, upstream, cases) as target:
        target.torn = 7
        outcomes = [await run(target, SUITE, case, thorough=False) for case in cases]
    assert len(cases) > 5 and not any(outcome.faults for outcome in outcomes), table(outcomes)


# --- the suite itself


class Unguarded:
    """Shows everything at once."""

    name, exact, live = "unguarded", True, True
    channels: frozenset[Channel] = frozenset({"content"})

    async def stream(self, rules: Rules, model: Model, channel: Channel) -> AsyncIterator[str]:
        async for piece in model:
            yield piece

    async def whole(self, rules: Rules, text: str, channel: Channel) -> str | None:
        return text


class ByPiece(Unguarded):
    """Guards each piece by itself, as if it were the whole."""

    async def stream(self, rules: Rules, model: Model, channel: Channel) -> AsyncIterator[str]:
        async for piece in model:
            guarded = await Newel().whole(rules, piece, channel)
            assert guarded is not None
            yield guarded
            if piece != guarded and any(rule.stops for rule in rules):
                return


class Patient(Unguarded):
    """Shows nothing before the end."""

    async def stream(self, rules: Rules, model: Model, channel: Channel) -> AsyncIterator[str]:
        text = "".join([piece async for piece in model])
        async for piece in Newel().stream(rules, Model([text]), channel):
            yield piece

    async def whole(self, rules: Rules, text: str, channel: Channel) -> str | None:
        return await Newel().whole(rules, text, channel)


@pytest.mark.parametrize("name", ["refused in the middle", "one redaction", "redacted, then refused"])
async def test_a_system_without_a_guard_is_found_out(name: str) -> None:
    outcome = await run(Unguarded(), SUITE, BY_NAME[name])
    assert outcome.leaked == max(map(len, BY_NAME[name].never))
    assert outcome.whole and len(outcome.wrong) == outcome.ways


@pytest.mark.parametrize("name", ["refused in the middle", "one redaction"])
async def test_a_system_that_guards_each_piece_alone_is_found_out(name: str) -> None:
    outcome = await run(ByPiece(), SUITE, BY_NAME[name])
    assert outcome.leaked > 0 and len(outcome.texts) > 1
    assert "whole" not in outcome.wrong or name == "refused in the middle"


async def test_a_system_that_waits_for_the_end_holds_back_more_than_it_needs() -> None:
    outcome = await run(Patient(), SUITE, BY_NAME["refused in the middle"])
    assert outcome.leaked == 0 and outcome.wrong == []
    assert any("held back 27 characters" in fault for fault in outcome.faults)


@pytest.mark.parametrize(
    ("said", "count"),
    [
        ("The budget is fine. Now to \n\nI cannot talk about that.", 0),
        ("The budget is fine. Now to Pro\n\nI cannot talk about that.", 3),
        ("The budget is fine. Now to Project Falcon, which", 14),
        ("Something else. Project Falcon.", 14),
        ("The bud", 0),
    ],
)
def test_leaked_characters_are_counted(said: str, count: int) -> None:
    assert leaked(BY_NAME["refused in the middle"], said) == count


@pytest.mark.parametrize("case", SUITE.case, ids=lambda case: case.name)
def test_every_way_of_cutting_is_the_same_text(case: Case) -> None:
    ways = dict(chunkings(case.text, case.spans))
    assert {joined(pieces) for pieces in ways.values()} == {case.text}
    assert joined(halves(case.text)) == case.text


def test_halves_are_cut_inside_a_character() -> None:
    assert halves("a🦅") == ["a", "\ud83e", "\udd85"]
