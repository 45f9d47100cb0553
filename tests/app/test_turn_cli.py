"""`newel turn`: what an operator is told of one exchange, and what not."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from app.cli import main
from app.records import Tenant, Turn, new_id
from app.store import Store
from tests.app.turns import RAW, SECRET, begun, escalated, finished, opinion

T = TypeVar("T")
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and no settings but that."""
    for name in [name for name in os.environ if name.startswith("NEWEL_") and name != "NEWEL_ENCODER"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NEWEL_HOME", str(tmp_path))
    monkeypatch.setenv("NEWEL_CONFIG", str(tmp_path / "newel.toml"))
    return tmp_path


Explain = Callable[..., str]


@pytest.fixture
def explain(home: Path, capsys: pytest.CaptureFixture[str]) -> Explain:
    """What `newel turn` prints."""

    def run(*args: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(("turn", *args))
        assert ended.value.code == 0
        return capsys.readouterr().out

    return run


def stored(home: Path, work: Callable[[Store], Awaitable[T]]) -> T:
    async def run() -> T:
        store = await Store.open(f"sqlite+aiosqlite:///{home / 'newel.db'}", home / "spill")
        try:
            await store.put_tenant(Tenant("acme", "base"))
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(run())


def put(home: Path, *turns: Turn) -> None:
    async def work(store: Store) -> None:
        for turn in turns:
            await store.finish(turn)

    stored(home, work)


def test_both_sides_are_told_with_who_decided_and_how_long_it_took(home: Path, explain: Explain) -> None:
    turn = finished(
        begun("acme"), trace=f"{TRACE}-00f067aa0ba902b7-01-", release="qwen/policy-3", surface="messages", retry_of="2"
    )
    put(home, turn)
    out = explain(turn.id)
    assert {
        "verdict: input, redact by ids",
        "verdict: output, refuse by salary",
        "hit: output, salary, refuse: SALARY at 0-21",
        f"trace: {TRACE}",
        "release: qwen/policy-3",
        "surface: messages",
        "retry of: 2",
        "first token ms: 41.5",
        "total ms: 120.25",
        "guard input ms: 2.5",
        "guard output ms: 3.75",
        "token ms: 7.159",
        "prompt tokens: 31",
        "completion tokens: 12",
    } <= set(out.splitlines())
    assert "cost" not in out and "sibling" not in out and "feedback" not in out


def test_withheld_text_is_nowhere_in_it(home: Path, explain: Explain) -> None:
    turn = finished(begun("acme"))
    put(home, turn)
    for out in (explain(turn.id), explain(turn.id, "--json")):
        assert SECRET not in out and RAW not in out and turn.withheld_said not in out


def test_the_cost_is_by_the_prices_of_the_model(home: Path, explain: Explain) -> None:
    (home / "newel.toml").write_text(
        "[models.smol]\npool = 'engine'\nmodel = 'smol'\nprompt_price = 100.0\ncompletion_price = 1000.0\n"
    )
    turn = finished(begun("acme"), release="engine/smol")
    second = replace(finished(begun("acme", conversation=turn.conversation)), id=f"{turn.id}-1", choice=1)
    put(home, turn, second)
    assert json.loads(explain(turn.id, "--json"))["cost"] == pytest.approx((31 * 100 + 12 * 1000) / 1e6)
    assert json.loads(explain(second.id, "--json"))["cost"] == pytest.approx(12 * 1000 / 1e6)


def test_other_replies_to_the_same_request_are_named_and_nothing_else_of_the_conversation(
    home: Path, explain: Explain
) -> None:
    turn = finished(begun("acme", retry_of="1"))
    second = replace(turn, id=f"{turn.id}-1", choice=1, action="allow", rule="", error="engine_timeout")
    later = replace(turn, id=new_id("chatcmpl-"), asked="And now?")
    put(home, turn, second, later)
    assert f"sibling: {second.id}, choice 1, allow, error engine_timeout" in explain(turn.id).splitlines()
    told = json.loads(explain(second.id, "--json"))
    assert [one["id"] for one in told["siblings"]] == [turn.id] and told["attempts"] == []


def test_what_the_client_sent_again_is_named(home: Path, explain: Explain) -> None:
    first = finished(begun("acme"), error="engine_unreachable", action="allow", rule="")
    again = replace(first, id=new_id("chatcmpl-"), retry_of="1", error="")
    put(home, first, again)
    assert f"attempt: {again.id}, retry 1, allow" in explain(first.id).splitlines()
    assert f"attempt: {first.id}, retry 0, allow, error engine_unreachable" in explain(again.id).splitlines()


def test_the_ticket_is_told_as_it_stands(home: Path, explain: Explain) -> None:
    turn = escalated(begun("acme"))
    assert turn.ticket
    put(home, turn)
    out = explain(turn.id).splitlines()
    assert {f"ticket: {turn.ticket.id}", "ticket state: open", "ticket queue: hr-desk", "ticket priority: high"} <= set(
        out
    )
    assert "verdict: output, escalate by harm, route hr" in out


def test_what_people_think_of_it_is_told_without_their_words(home: Path, explain: Explain) -> None:
    turn = finished(begun("acme"))
    put(home, turn)
    said = (opinion(turn), opinion(turn, kind="correction", value=None, text="Say it kindly, Jane Doe."))
    stored(home, lambda store: store.add_feedback(*said))
    out = explain(turn.id)
    assert "feedback: rating 1, ana, " in out and "feedback: correction, ana, " in out
    assert "Jane Doe" not in out + explain(turn.id, "--json")
