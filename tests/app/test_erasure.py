"""What was erased is nowhere any more: in no row and in no byte of a file. What is withheld is never in clear."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Iterable
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from app.cli import main
from app.export import export
from app.records import Retention, Tenant, Turn, new_id, now
from app.sealing import MARK, Seals, Unreadable
from app.service import pseudonym
from app.store import Owner, Sealed, Store, StoreDown, StoreError
from app.store import database as databases
from app.store.erasure import Removed
from app.store.spill import decode
from app.store.tables import metadata
from guardrails.types import Message, ToolMessage
from tests.app.earlier import as_it_was
from tests.app.turns import RAW, begun, escalated, finished, long_ago, opinion

SECRETS = (b"0" * 64,)
ANN, BOB = (pseudonym(SECRETS[0], "acme", name) for name in ("ann", "bob"))
MARKER = "Xylophone7"
"""What stands in every text of Ann, and in no other one."""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def own_url(url: str, home: Path, request: pytest.FixtureRequest) -> str:
    """An empty database of the same kind as `url`, for this test alone."""
    if url.startswith("sqlite"):
        return f"sqlite+aiosqlite:///{home}/newel.db"
    return str(request.getfixturevalue("cluster").create_database(f"newel_{token_hex(4)}"))


@pytest.fixture
async def store(own_url: str, home: Path) -> AsyncIterator[Store]:
    store = await Store.open(own_url, home / "spill", secrets=SECRETS)
    await store.put_tenant(Tenant("acme", "hr", "answer"))
    yield store
    await store.close()


def files(folder: Path, wanted: str = MARKER) -> list[str]:
    """The files under a folder in which these bytes are, whatever they are."""
    return [path.name for path in sorted(folder.rglob("*")) if path.is_file() and wanted.encode() in path.read_bytes()]


async def rows(url: str, wanted: str = MARKER) -> list[str]:
    """The tables in whose rows this text is."""
    engine = create_async_engine(databases.database_url(url))
    async with engine.connect() as connection:
        found = [
            name for name in metadata.tables if wanted in repr((await connection.execute(text(f"TABLE {name}"))).all())
        ] if connection.dialect.name == "postgresql" else [
            name
            for name in metadata.tables
            if wanted in repr((await connection.execute(text(f"SELECT * FROM {name}"))).all())
        ]  # fmt: skip
    await engine.dispose()
    return found


def of_ann(**changes: Any) -> Turn:
    """A finished turn of Ann with her words in every text that a turn has."""
    texts = {
        "subject": ANN,
        "history": (Message("user", f"{MARKER} before"), Message("assistant", f"Hello {MARKER}")),
        "asked": f"What does {MARKER} earn?",
        "withheld_asked": f"{RAW} {MARKER}",
        "reasoning": f"They ask about {MARKER}.",
        "calls": (ToolMessage("assistant", f'{{"name": "{MARKER}"}}', "c1", "find"),),
    }
    said = {"said": f"I do not know {MARKER}.", "withheld_said": f"{MARKER} earns a lot.", "tail_hash": new_id("tail-")}
    turn = begun("acme", **(texts | {name: value for name, value in changes.items() if name not in said}))
    return finished(turn, **(said | {name: value for name, value in changes.items() if name in said}))


def of_bob(**changes: Any) -> Turn:
    """A finished turn of Bob, who has nothing to do with Ann."""
    return finished(begun("acme", **({"subject": BOB} | changes)))


async def handed_over(store: Store, turn: Turn) -> Turn:
    """The turn with a ticket that was answered, and its webhook messages, in Ann's words."""
    turn = replace(escalated(turn), asked=turn.asked, history=turn.history)
    await store.finish(turn)
    assert turn.ticket is not None
    await store.answer_ticket(turn.ticket.id, f"Dear {MARKER}, it is band E4.", "dana")
    return turn


async def everywhere(store: Store, folder: Path) -> list[Turn]:
    """Turns of Ann with her words in every place where newel puts any: database, spill, what was put aside, exports."""
    plain = {"calls": (), "withheld_asked": "", "withheld_said": ""}  # as training data has to be
    turns = [of_ann(), of_ann(**plain), of_ann(**plain, asked=f"Who is {MARKER}?")]
    for turn in turns:
        await store.finish(turn)
        comment = opinion(turn, kind="comment", value=None, text=f"{MARKER} is wrong")
        correction = opinion(turn, kind="correction", value=None, text=f"{MARKER} earns enough.")
        await store.add_feedback(comment, correction)
    turns.append(await handed_over(store, of_ann()))
    await store.begin(of_ann())  # and never ended
    owner = Owner("acme", turns[0].conversation, ANN)
    await store.keep_values(owner, [Sealed("[NAME_1]", "k", MARKER.encode())], now() + timedelta(hours=1))
    await export(store, folder / "exports" / "one", None, None, "dana")
    await export(store, folder / "exports" / "two", "acme", None, "dana")
    await store.spill(of_ann())
    spilled = next((folder / "spill").glob("turns-*.jsonl"))
    spilled.with_name("turns-20260101-0000.abcd.replaying").write_bytes(spilled.read_bytes())
    spilled.with_name("aside.jsonl").write_bytes(spilled.read_bytes() + spilled.read_bytes()[:-80])
    return turns


async def others(store: Store) -> list[Turn]:
    """Turns of Bob, judged, so that they are exported too."""
    turns = [of_bob(asked=f"How do I ask for raise {number}?") for number in range(3)]
    for turn in turns:
        await store.finish(turn)
        await store.add_feedback(
            opinion(turn, kind="correction", value=None, text=f"Ask for it, number {number_of(turn)}")
        )
    await store.spill(of_bob(id="chatcmpl-spilled"))
    return turns


def number_of(turn: Turn) -> str:
    return turn.asked.split()[-1]


# --- nothing is left


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is spilled is replayed when the test says so: else a slow machine does it before."""
    monkeypatch.setattr("app.store.store.FIRST_REPLAY", 600.0)


async def test_no_byte_of_a_person_is_left_and_nothing_else_is_missing(
    unhurried: None, store: Store, own_url: str, home: Path
) -> None:
    kept = await others(store)
    turns = await everywhere(store, home)
    before = set(files(home))
    assert {"aside.jsonl", "demonstrations.jsonl", "pairs.jsonl"} <= before
    assert {"turns", "feedback", "tickets", "deliveries", "vault"} <= set(await rows(own_url))

    erased = await store.erase("acme", subject=ANN, actor="dana", reason="asked for it", source="ann")

    assert files(home) == []
    assert await rows(own_url) == []
    assert erased.clean
    assert erased.removed == Removed(
        turns=5, withheld=6, feedback=6, tickets=1, deliveries=2, values=1, histories=0, spilled=erased.removed.spilled
    )
    assert erased.removed.spilled >= 4
    assert [await store.turn(turn.id, "acme") for turn in turns] == [None] * 4
    assert await rows(own_url, ANN) == ["audit", "erasures"]
    for turn in kept:
        assert await store.turn(turn.id, "acme") is not None
        assert len(await store.feedback(turn.id, "acme")) == 1
    lines = (home / "exports" / "one" / "demonstrations.jsonl").read_text().splitlines()
    assert {json.loads(line)["turn"] for line in lines} == {turn.id for turn in kept}
    assert store.spilled >= 1  # Bob's
    await store.replay()
    assert await store.turn("chatcmpl-spilled", "acme") is not None
    assert (await store.verify_audit()).broken is None


async def test_no_byte_is_left_of_many_turns_among_many_others(store: Store, own_url: str, home: Path) -> None:
    """SQLite moves rows within and between its pages, and leaves copies of them in the gaps."""
    turns = []
    for number in range(120):
        words = " ".join([MARKER] * (number % 40))
        turns.append(of_ann(asked=f"{words}?", history=(), withheld_asked="", withheld_said=""))
        await store.begin(replace(turns[-1], total_ms=None, said=""))
        await store.finish(of_bob(asked="word " * (number % 60)))
    for turn in turns[::3] + turns[1::3] + turns[2::3]:
        await store.finish(replace(turn, said=turn.asked * 2))
    assert await rows(own_url) == ["turns"]
    erased = await store.erase("acme", subject=ANN, actor="dana", reason="asked for it")
    assert (erased.removed.turns, erased.clean) == (120, True)
    assert files(home) == []
    assert await rows(own_url) == []


async def test_a_conversation_is_erased_and_the_persons_other_ones_stay(store: Store, own_url: str, home: Path) -> None:
    talk = [of_ann(conversation="talk") for _ in range(2)]
    other = finished(begun("acme", subject=ANN, conversation="other"))
    for turn in (*talk, other):
        await store.finish(turn)
    await store.keep_values(Owner("acme", "talk", f"turn:{talk[0].id}"), [Sealed("[X_1]", "k", MARKER.encode())], now())
    erased = await store.erase("acme", conversation="talk", actor="dana", reason="complaint 12")
    assert erased.removed.turns == 2
    assert await rows(own_url) == []
    assert files(home) == []
    assert await store.turn(other.id, "acme") is not None


async def test_another_tenants_person_of_the_same_name_stays(store: Store) -> None:
    await store.put_tenant(Tenant("umbrella", "hr"))
    mine, theirs = of_ann(), replace(of_ann(), tenant="umbrella")
    await store.finish(mine)
    await store.finish(theirs)
    await store.erase("acme", subject=ANN, actor="dana", reason="asked for it")
    assert await store.turn(mine.id, "acme") is None
    assert await store.turn(theirs.id, "umbrella") is not None


# --- what others repeat


async def test_others_in_the_same_conversation_keep_their_words_and_lose_the_history(
    store: Store, own_url: str
) -> None:
    ann = of_ann(conversation="talk", tail_hash="one")
    repeats = (Message("user", ann.asked), Message("assistant", ann.said))
    bob = of_bob(conversation="talk", history=repeats, parent=ann.id)
    later = of_bob(conversation="talk", history=(*repeats, Message("user", bob.asked)), parent=bob.id)
    for turn in (ann, bob, later):
        await store.finish(turn)
    erased = await store.erase("acme", subject=ANN, actor="dana", reason="asked for it")
    assert (erased.removed.turns, erased.removed.histories) == (1, 2)
    assert await rows(own_url) == []
    for turn in (bob, later):
        found = await store.turn(turn.id, "acme")
        assert found is not None
        assert (found.asked, found.said, found.history) == (turn.asked, turn.said, ())


@pytest.mark.parametrize("subject", [ANN, ""])
async def test_a_history_that_went_on_under_another_id_is_emptied(store: Store, own_url: str, subject: str) -> None:
    first = of_ann(conversation="one", subject=subject, tail_hash="a")
    repeats = (Message("user", first.asked), Message("assistant", first.said))
    second = finished(begun("acme", conversation="two", subject=subject, history=repeats, head_hash="a"), tail_hash="b")
    third = finished(begun("acme", conversation="six", subject=subject, history=repeats, head_hash="b"), tail_hash="c")
    stranger = finished(begun("acme", conversation="ten", subject=subject, head_hash="z"))
    for turn in (first, second, third, stranger):
        await store.finish(turn)
    await store.erase("acme", conversation="one", actor="dana", reason="complaint 12")
    assert await rows(own_url) == []
    found = await store.turn(stranger.id, "acme")
    assert found is not None
    assert found.history == stranger.history


async def test_an_answer_that_was_brought_to_somebody_else_is_taken_back(store: Store, own_url: str) -> None:
    turn = await handed_over(store, of_ann(conversation="talk"))
    assert turn.ticket is not None
    bringing = finished(begun("acme", conversation="talk", subject=BOB, history=()), said=f"A person: Dear {MARKER}.")
    await store.finish(bringing)
    await store.mark_delivered([turn.ticket.id], bringing.id)
    await store.erase("acme", subject=ANN, actor="dana", reason="asked for it")
    assert await rows(own_url) == []
    found = await store.turn(bringing.id, "acme")
    assert found is not None
    assert found.said == "[erased]"


async def test_what_a_person_said_of_others_turns_goes_too(store: Store, own_url: str) -> None:
    bob = of_bob()
    await store.finish(bob)
    for source in ("ann", ANN, "dana"):
        await store.add_feedback(opinion(bob, kind="comment", value=None, text=f"of {source}", source=source))
    erased = await store.erase("acme", subject=ANN, actor="dana", reason="asked for it", source="ann")
    assert erased.removed.feedback == 2
    assert [one.source for one in await store.feedback(bob.id, "acme")] == ["dana"]


# --- what comes late


async def test_a_turn_that_was_in_flight_is_not_stored_afterwards(store: Store, own_url: str, home: Path) -> None:
    running, unwritten = of_ann(), of_ann()
    await store.begin(replace(running, total_ms=None, said=""))
    await store.erase("acme", subject=ANN, actor="dana", reason="asked for it")
    await store.finish(running)
    await store.finish(unwritten)
    await store.begin(unwritten)
    assert await rows(own_url) == []
    assert files(home) == []
    new = replace(of_ann(), created_at=now())
    await store.finish(new)
    assert await store.turn(new.id, "acme") is not None  # who comes back is kept as anybody is


async def test_a_turn_that_another_gateway_spilled_is_dropped_there(store: Store, own_url: str, home: Path) -> None:
    other = await Store.open(own_url, home / "elsewhere" / "spill", secrets=SECRETS)
    await other.spill(of_ann())
    await other.spill(of_bob(id="chatcmpl-bob"))
    await store.erase("acme", subject=ANN, actor="dana", reason="asked for it")
    assert files(home / "elsewhere") != []  # another machine's disk, as far as the one that erased knows
    await other.sweep(Retention())
    assert (files(home), other.spilled) == ([], 1)
    await other.replay()
    assert await store.turn("chatcmpl-bob", "acme") is not None
    await other.close()


async def test_a_spilled_turn_is_not_replayed_after_the_erasure(store: Store, own_url: str, home: Path) -> None:
    other = await Store.open(own_url, home / "elsewhere" / "spill", secrets=SECRETS)
    await other.spill(of_ann())
    await store.erase("acme", subject=ANN, actor="dana", reason="asked for it")
    await other.replay()
    assert other.spilled == 0
    assert await rows(own_url) == []
    assert files(home) == []
    await other.close()


async def test_an_erasure_that_was_cut_off_is_finished_by_a_sweep(
    store: Store, own_url: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.finish(of_ann())

    async def down(*args: object, **more: object) -> None:
        raise StoreDown("away")

    with monkeypatch.context() as broken:
        broken.setattr("app.store.erasure.remove", down)
        with pytest.raises(StoreDown):
            await store.erase("acme", subject=ANN, actor="dana", reason="asked for it")
    assert await rows(own_url) != []
    await store.sweep(Retention())
    assert await rows(own_url) != []  # it may still be at work
    monkeypatch.setattr("app.store.privacy.UNFINISHED", timedelta(0))
    await store.sweep(Retention())
    assert (await rows(own_url), files(home)) == ([], [])
    assert [entry.action for entry in await store.audit_log(2)] == ["privacy.erased", "privacy.erase"]


# --- who wanted it


async def test_an_erasure_is_audited_with_ids_and_counts_alone(store: Store) -> None:
    await store.finish(of_ann())
    erased = await store.erase("acme", subject=ANN, actor="dana", reason="asked for it")
    done, wanted = await store.audit_log(2)
    assert (wanted.actor, wanted.action, wanted.subject) == ("dana", "privacy.erase", erased.id)
    assert wanted.detail == {"tenant": "acme", "subject": ANN, "conversation": "", "reason": "asked for it"}
    assert (done.action, done.detail["turns"], done.detail["withheld"]) == ("privacy.erased", 1, 2)


@pytest.mark.parametrize(
    ("whose", "actor", "reason"),
    [
        ({"subject": ANN}, "", "x"),
        ({"subject": ANN}, "dana", " "),
        ({}, "dana", "x"),
        ({"subject": ANN, "conversation": "talk"}, "dana", "x"),
    ],
)
async def test_nothing_is_erased_without_somebody_a_reason_and_one_target(
    store: Store, whose: dict[str, str], actor: str, reason: str
) -> None:
    turn = of_ann(conversation="talk")
    await store.finish(turn)
    with pytest.raises(ValueError, match="both"):
        await store.erase("acme", **whose, actor=actor, reason=reason)
    assert await store.turn(turn.id, "acme") is not None


async def test_all_that_is_kept_of_a_person_can_be_told(store: Store, home: Path) -> None:
    turns = await everywhere(store, home)
    await store.finish(of_bob())
    found = await store.everything_of("acme", subject=ANN, actor="dana", reason="asked for it")
    counts = {name: len(listed) for name, listed in found.items()}
    assert counts == {
        "turns": 5, "verdicts": counts["verdicts"], "withheld": 6, "feedback": 6, "tickets": 1, "deliveries": 2,
        "exported": 8,
    }  # fmt: skip
    assert f"{RAW} {MARKER}" in {row["text"] for row in found["withheld"]}
    assert {row["id"] for row in found["turns"]} > {turn.id for turn in turns[:3]}
    assert {row["subject"] for row in found["turns"]} == {ANN}
    (entry,) = await store.audit_log(1)
    assert (entry.actor, entry.action, entry.subject) == ("dana", "privacy.export", ANN)


# --- exported files


async def judged(store: Store, *turns: Turn) -> None:
    for turn in turns:
        await store.finish(turn)
        await store.add_feedback(opinion(turn, kind="correction", value=None, text=f"Better: {turn.id}"))


def lines_of(folder: Path) -> set[str]:
    found = (json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines())
    return {record["turn"] for record in found}


async def test_an_export_stays_whole_without_the_lines_that_were_erased(store: Store, tmp_path: Path) -> None:
    ann, bob = of_ann(calls=(), asked="What is E4?"), of_bob(asked="What is E5?")
    await judged(store, ann, bob)
    folder = tmp_path / "away"
    await export(store, folder, "acme", None, "dana")
    assert lines_of(folder) == {ann.id, bob.id}
    erased = await store.erase("acme", subject=ANN, actor="dana", reason="asked for it")
    ((cleaned),) = erased.exports
    assert (cleaned.folder, cleaned.lines, cleaned.found) == (str(folder), 2, True)
    assert lines_of(folder) == {bob.id}
    import hashlib

    manifest = json.loads((folder / "manifest.json").read_text())
    for name, listed in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert listed["sha256"] == hashlib.sha256(content).hexdigest()
        assert listed["records"] == len(content.splitlines())


async def test_a_choice_against_an_erased_reply_is_erased_too(store: Store, tmp_path: Path) -> None:
    same = {"history": (), "asked": "What is E4?", "calls": (), "withheld_asked": ""}
    bob, ann = of_bob(**same), of_ann(**same, withheld_said="")
    for turn in (bob, ann):
        await store.finish(turn)
    await store.add_feedback(opinion(bob, kind="choice", value=None, other=ann.id, choice="this"))
    await export(store, tmp_path / "away", None, None, "dana")
    assert files(tmp_path / "away") == ["pairs.jsonl"]
    await store.erase("acme", subject=ANN, actor="dana", reason="asked for it")
    assert files(tmp_path / "away") == []
    assert await store.turn(bob.id, "acme") is not None


async def test_an_export_that_is_not_there_is_named_and_cleaned_when_it_is(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = of_ann(calls=(), history=())
    await judged(store, ann)
    await export(store, tmp_path / "away", None, None, "dana")
    (tmp_path / "away").rename(tmp_path / "moved")
    (missing,) = (await store.erase("acme", subject=ANN, actor="dana", reason="asked for it")).exports
    assert (missing.folder, missing.found) == (str(tmp_path / "away"), False)
    (tmp_path / "moved").rename(tmp_path / "away")
    await store.sweep(Retention())
    assert files(tmp_path / "away") == []


async def test_an_export_outlives_the_turns_and_is_found_all_the_same(store: Store, tmp_path: Path) -> None:
    ann = long_ago(of_ann(calls=(), history=()))
    await judged(store, ann)
    await export(store, tmp_path / "away", None, None, "dana")
    await store.sweep(Retention(turns=timedelta(hours=1)))
    assert await store.turn(ann.id, "acme") is None
    assert files(tmp_path / "away") != []
    await store.erase("acme", subject=ANN, actor="dana", reason="asked for it")
    assert files(tmp_path / "away") == []


# --- what is withheld


async def test_withheld_text_is_in_no_byte_in_clear(store: Store, own_url: str, home: Path) -> None:
    turn = begun("acme", withheld_asked=f"raw {MARKER}")
    await store.begin(turn)
    await store.finish(finished(turn, withheld_said=f"draft {MARKER}"))
    await store.spill(finished(begun("acme"), withheld_said=f"draft {MARKER}"))
    assert (await rows(own_url), files(home)) == ([], [])
    read = await store.withheld(turn.id, "acme", "dana", "complaint 12")
    assert read == {"asked": f"raw {MARKER}", "said": f"draft {MARKER}"}
    await store.replay()
    assert await rows(own_url) == []


async def test_withheld_text_that_was_spilled_reads_back(store: Store) -> None:
    turn = of_bob(withheld_asked=f"raw {MARKER}")
    await store.spill(turn)
    await store.replay()
    read = await store.withheld(turn.id, "acme", "dana", "complaint 12")
    assert read["asked"] == f"raw {MARKER}"


async def test_words_that_look_sealed_are_sealed_like_any(store: Store) -> None:
    for number, words in enumerate(
        (f"{MARK}:", f"{MARK}:deadbeef:{'A' * 64}", Seals(SECRETS).seal("a", "b", "c", "d"))
    ):
        turn = of_bob(id=f"chatcmpl-{number}", withheld_asked=words)
        await store.finish(turn)
        assert (await store.withheld(turn.id, "acme", "dana", "x"))["asked"] == words


async def test_withheld_text_of_an_earlier_version_is_sealed_at_the_start(own_url: str, home: Path) -> None:
    await as_it_was(own_url, "0003")
    engine = create_async_engine(databases.database_url(own_url))
    moment = "2026-01-02 03:04:05.678901+00:00"
    numbers = range(700)
    async with engine.begin() as connection:
        await connection.execute(text(f"INSERT INTO tenants VALUES ('acme', 'hr', 'refuse', '{moment}')"))
        await connection.execute(text(f"INSERT INTO conversations VALUES ('acme', 'talk', '', '{moment}', '{moment}')"))
        names = (
            "id, tenant, conversation, key, policy, model, request_id, streamed, subject, history, asked, said, action,"
            " rule, finish_reason, error, prompt_tokens, completion_tokens, head_hash, tail_hash, retry_of, created_at"
        )
        empty = ", ".join(["''"] * 6)
        values = f":id, 'acme', 'talk', '', '', '', '', false, '', '[]', {empty}, 0, 0, '', '', '', '{moment}'"
        insert = text(f"INSERT INTO turns ({names}) VALUES ({values})")
        await connection.execute(insert, [{"id": f"chatcmpl-{number}"} for number in numbers])
        raw = [{"id": f"chatcmpl-{number}", "text": f"{MARKER} " * (number % 30 + 1)} for number in numbers]
        await connection.execute(text("INSERT INTO withheld VALUES (:id, 'asked', :text)"), raw)
    await engine.dispose()
    assert await rows_of_withheld(own_url) == 700
    store = await Store.open(own_url, home / "spill", secrets=SECRETS)
    assert await rows_of_withheld(own_url) == 0
    assert files(home) == []
    assert (await store.withheld("chatcmpl-3", "acme", "dana", "x"))["asked"] == f"{MARKER} " * 4
    await store.close()
    assert files(home) == []


async def rows_of_withheld(url: str) -> int:
    engine = create_async_engine(databases.database_url(url))
    async with engine.connect() as connection:
        query = text(f"SELECT count(*) FROM withheld WHERE text LIKE '%{MARKER}%'")
        count: int = (await connection.execute(query)).scalar_one()
    await engine.dispose()
    return count


async def test_a_new_secret_takes_over_what_the_old_one_sealed(store: Store, own_url: str, home: Path) -> None:
    turn = of_bob(withheld_asked=MARKER)
    await store.finish(turn)
    both = await Store.open(own_url, home / "spill", secrets=[b"new", *SECRETS])
    assert (await both.withheld(turn.id, "acme", "dana", "x"))["asked"] == MARKER
    assert await both.seal_withheld() == 2
    assert await both.seal_withheld() == 0
    await both.close()
    new = await Store.open(own_url, home / "spill", secrets=[b"new"])
    assert (await new.withheld(turn.id, "acme", "dana", "x"))["asked"] == MARKER
    with pytest.raises(StoreError, match="its secret is not in"):
        await store.withheld(turn.id, "acme", "dana", "x")
    await new.close()


async def test_an_export_that_cannot_read_what_it_must_leave_out_writes_nothing(
    store: Store, own_url: str, home: Path, tmp_path: Path
) -> None:
    await judged(store, of_bob())
    other = await Store.open(own_url, home / "spill", secrets=[b"other"])
    with pytest.raises(StoreError, match="its secret is not in"):
        await export(other, tmp_path / "away", None, None, "dana")
    assert lines_of(tmp_path / "away") == set()
    await other.close()


def test_a_sealed_text_opens_in_its_place_alone() -> None:
    seals = Seals(SECRETS)
    sealed = seals.seal("acme", "chatcmpl-1", "asked", "words")
    assert seals.unseal("acme", "chatcmpl-1", "asked", sealed) == "words"
    assert seals.seal("acme", "chatcmpl-1", "asked", "words") != sealed
    head, _, data = sealed.rpartition(":")
    changed = f"{head}:{data[:-8]}{'A' if data[-8] != 'A' else 'B'}{data[-7:]}"
    for place, one in (
        (("umbrella", "chatcmpl-1", "asked"), sealed),
        (("acme", "chatcmpl-2", "asked"), sealed),
        (("acme", "chatcmpl-1", "said"), sealed),
        (("acme", "chatcmpl-1", "asked"), changed),
    ):
        with pytest.raises(Unreadable) as caught:
            seals.unseal(*place, one)
        assert "words" not in str(caught.value)


def test_a_spilled_line_holds_no_withheld_text(tmp_path: Path) -> None:
    async def spill() -> None:
        store = await Store.open(f"sqlite:///{tmp_path}/newel.db", tmp_path / "spill", secrets=SECRETS)
        await store.spill(of_bob(withheld_asked=MARKER))
        await store.close()

    asyncio.run(spill())
    (path,) = (tmp_path / "spill").glob("*.jsonl")
    assert MARKER not in path.read_text()
    assert decode(path.read_bytes()).withheld_asked.startswith(MARK)


async def test_without_secrets_texts_are_sealed_with_a_file_beside_the_spill(tmp_path: Path) -> None:
    store = await Store.open(f"sqlite:///{tmp_path}/newel.db", tmp_path / "spill")
    await store.put_tenant(Tenant("acme", "hr"))
    await store.finish(of_bob(withheld_asked=MARKER))
    assert files(tmp_path) == []
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    await store.close()


# --- retention


DAY = timedelta(days=1)


def aged(turn: Turn, days: int) -> Turn:
    return replace(turn, created_at=now() - timedelta(days=days))


async def test_what_is_too_old_goes_and_what_is_not_stays(store: Store, own_url: str, home: Path) -> None:
    old, new = aged(of_ann(), 31), aged(of_bob(), 29)
    for turn in (old, new):
        await store.finish(turn)
        await store.add_feedback(opinion(turn, kind="comment", value=None, text="words"))
    kept = Retention(turns=30 * DAY)
    assert await store.sweep(kept, dry=True) == {"turns": 1}
    assert await store.turn(old.id, "acme") is not None
    assert await store.sweep(kept) == {"turns": 1}
    assert await store.sweep(kept) == {"turns": 0}
    assert await store.turn(old.id, "acme") is None
    assert await store.turn(new.id, "acme") is not None
    assert await rows(own_url) == []
    assert await rows(own_url, old.conversation) == []
    entries = [entry for entry in await store.audit_log() if entry.action == "privacy.sweep"]
    assert [entry.detail for entry in entries] == [{"turns": 1}]


async def test_each_kind_has_its_own_time(store: Store, own_url: str) -> None:
    turn = aged(of_bob(), 10)
    await store.finish(turn)
    said = replace(opinion(turn, kind="comment", value=None, text="words"), created_at=now() - 10 * DAY)
    await store.add_feedback(said)
    assert await store.sweep(Retention(withheld=11 * DAY, feedback=11 * DAY)) == {"withheld": 0, "feedback": 0}
    assert await store.sweep(Retention(withheld=9 * DAY)) == {"withheld": 2}
    assert await store.withheld(turn.id, "acme", "dana", "x") == {}
    assert len(await store.feedback(turn.id, "acme")) == 1
    assert await store.sweep(Retention(feedback=9 * DAY)) == {"feedback": 1}
    assert await store.turn(turn.id, "acme") is not None


async def test_a_webhook_message_goes_once_it_was_sent(store: Store) -> None:
    turn = escalated(begun("acme"))
    await store.finish(turn)
    soon = Retention(deliveries=timedelta(microseconds=1))
    assert await store.sweep(soon) == {"deliveries": 0}
    (claimed,) = await store.claim_deliveries(10, 60)
    await store.settle_delivery(claimed.id)
    assert await store.sweep(soon) == {"deliveries": 1}
    assert await store.deliveries() == []


async def test_a_turn_whose_ticket_is_open_waits_for_its_answer(store: Store) -> None:
    turn = aged(escalated(begun("acme")), 40)
    await store.finish(turn)
    assert await store.sweep(Retention(turns=30 * DAY)) == {"turns": 0}
    assert turn.ticket is not None
    await store.answer_ticket(turn.ticket.id, "E4.", "dana")
    assert await store.sweep(Retention(turns=30 * DAY)) == {"turns": 1}


async def test_for_ever_is_the_default(store: Store) -> None:
    await store.finish(aged(of_bob(), 4000))
    assert await store.sweep(Retention()) == {}
    assert len(await store.tenants()) == 1


async def test_others_write_while_much_is_removed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.store.erasure.BATCH", 5)
    for _ in range(40):
        await store.finish(aged(of_bob(), 40))
    sweeping, written = asyncio.create_task(store.sweep(Retention(turns=30 * DAY))), 0
    while not sweeping.done():
        await store.finish(of_bob())
        written += 1
    assert await sweeping == {"turns": 40}
    assert written >= 3  # a batch for each at least, not one wait for all


async def test_a_turn_that_continued_a_swept_one_is_still_read(store: Store) -> None:
    old = aged(finished(begun("acme", conversation="talk")), 40)
    await store.finish(old)
    history = (*old.history, Message("user", old.asked), Message("assistant", old.said))
    new = finished(begun("acme", conversation="talk", history=history, parent=old.id))
    await store.finish(new)
    await store.sweep(Retention(turns=30 * DAY))
    found = await store.turn(new.id, "acme")
    assert found is not None
    assert (found.asked, found.said) == (new.asked, new.said)


# --- the commands


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEWEL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NEWEL_CONFIG", str(tmp_path / "newel.toml"))
    monkeypatch.setenv("NEWEL_SECRET", SECRETS[0].decode())
    return tmp_path / "home"


def newel(*args: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(args)
    return int(ended.value.code or 0)


def filled(home: Path, turns: Iterable[Turn] = ()) -> None:
    async def fill() -> None:
        store = await Store.open(f"sqlite:///{home}/newel.db", home / "spill", secrets=SECRETS)
        await store.put_tenant(Tenant("acme", "hr"))
        if turns:
            for turn in turns:
                await store.finish(turn)
        else:
            await everywhere(store, home)
        await store.close()

    asyncio.run(fill())


def test_a_command_erases_a_person(shell: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(shell)
    assert files(shell) != []
    erase = ("privacy", "erase", "--tenant", "acme", "--reason", "asked for it", "--by", "dana")
    assert newel(*erase, "--subject", "bob", "--json") == 0
    assert json.loads(capsys.readouterr().out)["removed"]["turns"] == 0
    assert newel(*erase, "--subject", "ann") == 0
    out = capsys.readouterr().out
    assert "turns: 6" in out  # with the one that was spilled
    assert f"{shell / 'exports' / 'one'}: " in out
    assert files(shell) == []
    with closing(sqlite3.connect(shell / "newel.db")) as connection:
        query = "SELECT actor FROM audit WHERE action = 'privacy.erase'"
        assert connection.execute(query).fetchall() == [("dana",), ("dana",)]


def test_a_command_tells_what_is_kept_of_a_person(shell: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(shell, [of_ann(), of_bob()])
    ask = ("privacy", "export", "--tenant", "acme", "--reason", "asked for it", "--subject", "ann")
    assert newel(*ask) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["asked"] for row in found["turns"]] == [f"What does {MARKER} earn?"]
    assert {row["kind"] for row in found["withheld"]} == {"asked", "said"}
    assert MARKER in found["withheld"][0]["text"]
    assert newel(*ask, "--output", str(shell / "ann.json")) == 0
    assert json.loads((shell / "ann.json").read_text())["turns"] == found["turns"]
    assert (shell / "ann.json").stat().st_mode & 0o777 == 0o600


def test_a_command_tells_what_is_kept_too_long_and_removes_it_when_told_so(
    shell: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(shell, [aged(of_ann(), 40), of_bob()])
    assert newel("privacy", "retain") == 0
    assert "for ever" in capsys.readouterr().out
    monkeypatch.setenv("NEWEL_RETENTION__TURNS_DAYS", "30")
    assert newel("privacy", "retain") == 0
    assert capsys.readouterr().out == "turns: 1 would be removed\n"
    assert newel("privacy", "retain", "--now") == 0
    assert newel("privacy", "retain", "--json") == 0
    assert capsys.readouterr().out.endswith('"turns": 0\n}\n')


def test_a_command_seals_with_a_new_secret(
    shell: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(shell, [of_ann()])
    monkeypatch.setenv("NEWEL_VAULT__SECRET", "another")
    assert newel("privacy", "seal") == 0
    assert newel("privacy", "seal") == 0
    assert capsys.readouterr().out == "sealed: 2\nsealed: 0\n"


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("--subject", "ann", "--conversation", "talk", "--reason", "x"), 2),
        (("--reason", "x"), 2),
        (("--subject", "ann", "--reason", " "), 2),
        (("--subject", "ann"), 2),
        (("--subject", "ann", "--reason", "x", "--tenant", "nobody"), 1),
    ],
)
def test_a_command_that_does_not_say_all_erases_nothing(shell: Path, args: tuple[str, ...], code: int) -> None:
    filled(shell, [of_ann()])
    assert newel("privacy", "erase", *(() if "--tenant" in args else ("--tenant", "acme")), *args) == code
    assert files(shell) != []
