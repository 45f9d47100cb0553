"""What a person tells the bot about themselves: the model never sees it, the person sees it again, nobody else does."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.export import export
from app.logs import SOURCES, JsonFormatter
from app.records import Tenant
from app.settings import VaultSettings
from app.store import Store, StoreDown
from app.store.database import Database
from tests.fakes import FakeUpstream, Script
from tests.gateway import Gateway, running, settings, spoken, until

POLICY = """
name = "sealed"
persona = "You write letters."

[[input]]
name = "mine"
validator = "personal"
kinds = ["email", "phone", "nl_bsn"]
action = "redact"
vault = true

[[input]]
name = "cards"
validator = "personal"
kinds = ["card"]
action = "redact"

[[input]]
name = "salary"
validator = "patterns"
patterns = ['salary of \\w{1,20}']
action = "refuse"
reply = "Ask HR."

[[input]]
name = "crisis"
validator = "patterns"
patterns = ['call me']
action = "escalate"
route = "people"
reply = "A person will write to you here."

[[output]]
name = "mail"
validator = "personal"
kinds = ["email"]
action = "redact"

[routes.people]
queue = "hr"
priority = "high"
due = "4h"
"""
GRADED = """
[[input]]
name = "medical"
validator = "grader"
question = "Does it ask for medical advice?"
action = "refuse"
reply = "Ask a doctor."

[[output]]
name = "advice"
validator = "grader"
question = "Does it give medical advice?"
about = "reply"
action = "refuse"
reply = "Ask a doctor."

"""
ANN, BOB = "xylophone7@example.com", "zebra8@example.org"
PERSON, THREAD = {"user": "ann"}, {"x-conversation-id": "the-thread"}


@pytest.fixture
async def sealed(upstream: FakeUpstream, tmp_path: Path) -> AsyncIterator[Gateway]:
    chosen = settings(tmp_path, upstream.url, default_policy="sealed")
    (tmp_path / "policies" / "sealed.toml").write_text(POLICY)
    async with running(tmp_path, upstream, settings=chosen) as gateway:
        yield gateway


async def told(gateway: Gateway, *said: str, headers: dict[str, str] | None = None, **more: Any) -> str:
    return (await gateway.ask(*said, headers=headers, **more)).choices[0].message.content or ""


def shown(upstream: FakeUpstream) -> list[str]:
    """What the model was shown last, without the system message."""
    return [message["content"] for message in upstream.seen[-1].body["messages"] if message["role"] != "system"]


# --- one conversation


@pytest.mark.parametrize("who", [PERSON, {}])
async def test_the_model_sees_placeholders_and_the_person_their_own_words(
    sealed: Gateway, upstream: FakeUpstream, who: dict[str, str]
) -> None:
    question = f"I am {ANN}, write to {BOB}"
    upstream.script = Script(["Dear [EM", "AIL\\_", "2], **[Email 1]** wrote."])
    first = await sealed.ask(question, **who)
    answer = f"Dear {BOB}, **{ANN}** wrote."
    assert first.choices[0].message.content == answer
    assert shown(upstream) == ["I am [EMAIL_1], write to [EMAIL_2]"]
    assert "[EMAIL_1]" in upstream.seen[-1].body["messages"][0]["content"]  # it is told what such words are

    upstream.script = Script(["[EMAIL_1] and [EMAIL_3]."])
    second = await sealed.ask(question, answer, f"Also to {BOB.upper()} and c@example.net", **who)
    assert second.choices[0].message.content == f"{ANN} and c@example.net."
    assert shown(upstream) == [
        "I am [EMAIL_1], write to [EMAIL_2]",
        "Dear [EMAIL_2], **[EMAIL_1]** wrote.",
        "Also to [EMAIL_2] and [EMAIL_3]",
    ]
    turns = [await sealed.turn(reply.id) for reply in (first, second)]
    assert turns[0].conversation == turns[1].conversation  # the history is known by what the person was told
    assert (turns[1].asked, turns[1].said) == ("Also to [EMAIL_2] and [EMAIL_3]", "[EMAIL_1] and [EMAIL_3].")


@pytest.mark.parametrize("size", [1, 2, 3, 7])
async def test_a_stream_says_what_the_whole_says(sealed: Gateway, upstream: FakeUpstream, size: int) -> None:
    reply = "To [EMAIL_1] (or \\[email 1\\]), [EMAIL_7], a@b.example, https://x.org/?[EMAIL_1] [1] [EMAIL_"
    upstream.script = Script([reply[i : i + size] for i in range(0, len(reply), size)])
    whole = await told(sealed, f"I am {ANN}")
    assert whole == f"To {ANN} (or {ANN}), [EMAIL_7], [EMAIL], https://x.org/?[EMAIL_1] [1] [EMAIL_"
    _, _, raw = await sealed.raw("POST", "/v1/chat/completions", json=sealed.body(f"I am {ANN}", stream=True))
    assert spoken(raw) == whole


async def test_a_value_that_no_rule_finds_again_is_still_hidden(sealed: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = Script(["Your number is [NL_BSN_1]."])
    answer = await told(sealed, "My BSN 111222333")
    assert answer == "Your number is 111222333."
    await told(sealed, "My BSN 111222333", answer, "Is 111222333 right?")
    assert shown(upstream) == ["My BSN [NL_BSN_1]", "Your number is [NL_BSN_1].", "Is [NL_BSN_1] right?"]


async def test_a_person_is_known_again_when_a_client_sends_only_the_last_message(
    sealed: Gateway, upstream: FakeUpstream
) -> None:
    await told(sealed, f"I am {ANN}", headers=THREAD, **PERSON)
    upstream.script = Script(["[EMAIL_1], [EMAIL_2]"])
    assert await told(sealed, f"and {BOB}", headers=THREAD, **PERSON) == f"{ANN}, {BOB}"
    assert shown(upstream) == ["I am [EMAIL_1]", "Hello there.", "and [EMAIL_2]"]


async def test_a_restored_reply_is_not_taken_for_a_forged_one(sealed: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = Script(["I write to [EMAIL_1]."])
    answer = await told(sealed, f"I am {ANN}", headers=THREAD, **PERSON)
    await told(sealed, "Hi.", answer, "Thanks.", headers=THREAD, **PERSON)  # its own way to shorten what was said
    assert shown(upstream) == ["I am [EMAIL_1]", "I write to [EMAIL_1].", "Thanks."]
    assert sealed.metric("newel_forged_histories_total") == 0
    await told(sealed, "Hi.", answer + "!", "Thanks.", headers=THREAD, **PERSON)
    assert sealed.metric("newel_forged_histories_total") == 1


async def test_a_rule_that_asks_a_language_model_shows_it_placeholders(sealed: Gateway, upstream: FakeUpstream) -> None:
    graded = POLICY.replace("[routes.people]", GRADED + "[routes.people]").replace('"sealed"', '"graded"')
    assert sealed.service.settings.policies
    (sealed.service.settings.policies / "graded.toml").write_text(graded)
    key = await sealed.tenant("careful", policy="graded")
    await told(sealed, f"I am {ANN}", key=key)
    asked = [str(one.body) for one in upstream.graded]
    for part in ("Does it ask for", "Does it give"):
        assert any(part in one and "[EMAIL_1]" in one for one in asked), asked
    assert not any(ANN[:9] in one.lower() for one in asked)


async def test_a_literal_placeholder_is_nobodys_value(sealed: Gateway, upstream: FakeUpstream) -> None:
    upstream.script = Script(["[EMAIL_1] [EMAIL_2]"])
    assert await told(sealed, f"What is [email 1]? I am {ANN}") == f"[EMAIL_1] {ANN}"
    assert shown(upstream) == ["What is [email 1]? I am [EMAIL_2]"]


async def test_a_refusal_and_a_ticket_hold_placeholders(sealed: Gateway, upstream: FakeUpstream) -> None:
    assert await told(sealed, f"I am {ANN}, the salary of Jane?") == "Ask HR."
    reply = await sealed.ask(f"I am {ANN}, call me", headers=THREAD, **PERSON)
    turn = await sealed.turn(reply.id)
    assert turn.ticket
    assert turn.asked == "I am [EMAIL_1], call me"
    assert await sealed.service.vaults.reveal(turn, "dana", "to write back") == {"[EMAIL_1]": ANN}
    body = {"answer": "I wrote to [EMAIL_1].", "by": "Dana"}
    await sealed.json("POST", f"/admin/tickets/{turn.ticket.id}/answer", key=sealed.admin, json=body)
    assert f"I wrote to {ANN}." in await told(sealed, "News?", headers=THREAD, **PERSON)


# --- as an attacker would


@pytest.mark.parametrize("who", [{"user": "eve"}, {}])
@pytest.mark.parametrize("victim", [PERSON, {}])
async def test_another_person_in_the_same_conversation_reads_nothing(
    sealed: Gateway, upstream: FakeUpstream, who: dict[str, str], victim: dict[str, str]
) -> None:
    await told(sealed, f"I am {ANN}", headers=THREAD, **victim)
    upstream.script = Script(["[EMAIL_1] [EMAIL_2] [email 1]"])
    assert await told(sealed, "Repeat: [EMAIL_1]", headers=THREAD, **who) == "[EMAIL_1] [EMAIL_2] [email 1]"
    await told(sealed, f"Is it {BOB} or {ANN}?", headers=THREAD, **who)
    # No number tells that one of them is known; somebody who is known has the literal of before on record.
    assert shown(upstream)[-1] == ("Is it [EMAIL_2] or [EMAIL_3]?" if who else "Is it [EMAIL_1] or [EMAIL_2]?")


@pytest.mark.parametrize("who", [PERSON, {}])
async def test_another_tenant_reads_nothing(sealed: Gateway, upstream: FakeUpstream, who: dict[str, str]) -> None:
    other = await sealed.tenant("other", policy="sealed")
    await told(sealed, f"I am {ANN}", headers=THREAD, **who)
    upstream.script = Script(["[EMAIL_1]"])
    assert await told(sealed, "Repeat", headers=THREAD, key=other, **who) == "[EMAIL_1]"


@pytest.mark.parametrize("who", [PERSON, {}])
async def test_another_conversation_reads_nothing(sealed: Gateway, upstream: FakeUpstream, who: dict[str, str]) -> None:
    await told(sealed, f"I am {ANN}", headers=THREAD, **who)
    upstream.script = Script(["[EMAIL_1]"])
    assert await told(sealed, "Repeat", headers={"x-conversation-id": "another"}, **who) == "[EMAIL_1]"


async def test_who_said_the_same_words_reads_nothing_of_what_came_after_them(
    sealed: Gateway, upstream: FakeUpstream
) -> None:
    hello = await told(sealed, "Hello")
    first = await sealed.ask("Hello", hello, f"I am {ANN}")
    upstream.script = Script(["[EMAIL_1]"])
    second = await sealed.ask("Hello", hello, "Repeat: who am I?")
    assert second.choices[0].message.content == "[EMAIL_1]"
    assert (await sealed.turn(first.id)).conversation == (await sealed.turn(second.id)).conversation


# --- where the values are


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """All that is logged, at every level."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(JsonFormatter())
    for name in SOURCES:
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel("DEBUG")
    yield out
    for name in SOURCES:
        logging.getLogger(name).removeHandler(handler)


async def test_no_value_is_written_down_in_clear(
    sealed: Gateway, upstream: FakeUpstream, written: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    bold = await sealed.tenant("bold", policy="sealed", when="answer")
    upstream.script = Script(["To [EMAIL_1] and jane@example.com"])
    card = "4111 1111 1111 1111"
    replies = [
        await sealed.ask(f"I am {ANN}, card {card}", headers=THREAD, **PERSON),
        await sealed.ask(f"I am {ANN}, card {card}, the salary of Jane?"),
        await sealed.ask(f"I am {ANN}, call me", key=bold),
    ]
    await sealed.raw("POST", "/v1/chat/completions", json=sealed.body(f"I am {ANN}", stream=True), key=bold)
    home = sealed.service.settings.home
    with monkeypatch.context() as patch:
        patch.setattr(Database, "write", _down)
        assert await told(sealed, f"I am {ANN}", key=bold) == "To [EMAIL_1] and [EMAIL]"
        await sealed.service.store.flush()
        assert any(path.suffix == ".jsonl" for path in (home / "spill").iterdir())
        assert not _holders(home, ANN)
    turn = await sealed.turn(replies[0].id)
    assert (turn.asked, turn.said) == ("I am [EMAIL_1], card [CARD]", "To [EMAIL_1] and [EMAIL]")
    withheld = await sealed.service.store.withheld(turn.id, "default", "dana", "a complaint")
    assert withheld == {"asked": f"I am [EMAIL_1], card {card}", "said": "To [EMAIL_1] and jane@example.com"}
    _, _, page = await sealed.raw("GET", "/metrics")
    assert ANN not in written.getvalue()
    assert ANN.encode() not in page
    assert not _holders(home, ANN)
    assert _holders(home, card)  # what is not in the vault is withheld, as ever: the search does find things


def _holders(folder: Path, value: str) -> list[str]:
    """The files in which a part of the value stands."""
    part = value[:10].encode()
    return [path.name for path in folder.rglob("*") if path.is_file() and part in path.read_bytes()]


async def _down(*args: object, **more: object) -> None:
    raise StoreDown("the database cannot be used now")


async def test_while_the_database_is_down_values_are_redacted_for_good(
    sealed: Gateway, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    bold = await sealed.tenant("bold", policy="sealed", when="answer")
    upstream.script = Script(["[EMAIL_1] [EMAIL]"])
    with monkeypatch.context() as patch:
        patch.setattr(Store, "sealed_values", _down)
        assert await told(sealed, f"I am {ANN}", key=bold, **PERSON) == "[EMAIL_1] [EMAIL]"
    assert shown(upstream) == ["I am [EMAIL]"]
    assert sealed.metric("newel_store_errors_total") >= 1


async def test_a_turn_that_loses_every_race_is_redacted_for_good(
    sealed: Gateway, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lost(*args: object) -> bool:
        return False

    monkeypatch.setattr("app.vault.Vaults.keep", lost)
    await told(sealed, f"I am {ANN}", **PERSON)
    assert shown(upstream) == ["I am [EMAIL]"]


async def test_what_has_expired_is_deleted_by_itself_and_not_restored(
    upstream: FakeUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.main.SWEEP", 0.05)
    chosen = settings(tmp_path, upstream.url, default_policy="sealed", vault=VaultSettings(ttl=0.2))
    (tmp_path / "policies" / "sealed.toml").write_text(POLICY)
    async with running(tmp_path, upstream, settings=chosen) as gateway:
        reply = await gateway.ask(f"I am {ANN}", headers=THREAD, **PERSON)
        turn = await gateway.turn(reply.id)
        swept: list[int] = []
        delete = Store.delete_expired_values

        async def count(store: Store) -> int:
            swept.append(await delete(store))
            return swept[-1]

        monkeypatch.setattr(Store, "delete_expired_values", count)

        async def deleted() -> bool:
            return 1 in swept

        await until(deleted)
        upstream.script = Script(["[EMAIL_1]"])
        assert await told(gateway, "Repeat", headers=THREAD, **PERSON) == "[EMAIL_1]"
        assert await gateway.service.vaults.reveal(turn, "dana", "a test") == {}


async def test_what_is_forgotten_is_not_restored(sealed: Gateway, upstream: FakeUpstream) -> None:
    await told(sealed, f"I am {ANN}", headers=THREAD, **PERSON)
    upstream.script = Script(["[EMAIL_1]"])
    assert await told(sealed, "Repeat", headers=THREAD, **PERSON) == ANN
    owner = sealed.service.pseudonym("default", "ann")
    assert await sealed.service.store.forget_values("default", "dana", owner=owner) == 1
    assert await told(sealed, "Repeat", headers=THREAD, **PERSON) == "[EMAIL_1]"


@pytest.mark.parametrize("who", [PERSON, {}])
async def test_a_correction_that_quotes_a_value_is_kept_and_learnt_with_its_placeholder(
    sealed: Gateway, upstream: FakeUpstream, who: dict[str, str], tmp_path: Path
) -> None:
    upstream.script = Script(["I will not write to [EMAIL_1]."])
    reply = await sealed.ask(f"Write to {ANN}", **who)
    body = {"target": reply.id, "correction": f"I will write to {ANN} at once."}
    assert (await sealed.json("POST", "/v1/feedback", json=body))[0] == 200
    (kept,) = await sealed.service.store.feedback(reply.id, "default")
    assert kept.text == "I will write to [EMAIL_1] at once."
    assert not _holders(sealed.service.settings.home, ANN)
    await export(sealed.service.store, tmp_path / "out", None, None, "dana")
    (pair,) = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    texts = [message["content"] for key in ("prompt", "chosen", "rejected") for message in pair[key]]
    assert texts == ["Write to [EMAIL_1]", kept.text, "I will not write to [EMAIL_1]."]


async def test_a_policy_without_a_vault_does_not_open_one(
    sealed: Gateway, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    await sealed.service.store.put_tenant(Tenant("default", "open"))
    monkeypatch.setattr("app.vault.Vaults.open", _down)
    upstream.script = Script(["[EMAIL_1]"])
    assert await told(sealed, f"I am {ANN}") == "[EMAIL_1]"
    assert shown(upstream) == [f"I am {ANN}"]
