"""From judged turns to training files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from alignment.collect import Collected, Unscrubbed, collect, hidden, lessons, quotes, write
from alignment.records import (
    BadRecords,
    Demonstration,
    Judged,
    Opinion,
    PreferencePair,
    Rating,
    Reply,
    Withheld,
    from_json,
    read,
    split_of,
    to_json,
)
from guardrails.types import Message

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
PROMPT = (Message("user", "Hello"), Message("assistant", "Hello!"), Message("user", "How do I ask for a raise?"))


def assistant(text: str) -> tuple[Message, ...]:
    return (Message("assistant", text),)


def judged(*opinions: Opinion, **changes) -> Judged:
    plain = Judged(Reply("turn-1", PROMPT, "I cannot help."), "conv-1", "acme", "hr@1", "refuse", NOON, opinions)
    return replace(plain, **changes)


def correction(text: str = "Prepare three results.") -> Opinion:
    return Opinion("correction", text=text)


def choice(which: str, said: str = "Gladly.", prompt: tuple[Message, ...] = PROMPT) -> Opinion:
    return Opinion("choice", choice=which, other=Reply("turn-2", prompt, said))


async def stream(turns: Iterable[Judged]) -> AsyncIterator[Judged]:
    for turn in turns:
        yield turn


async def as_it_is(text: str) -> str:
    return text


async def collected(*turns: Judged, scrub=as_it_is) -> Collected:
    return await collect(stream(turns), scrub)


def taught(turn: Judged) -> list[tuple[str, ...]]:
    """The lessons of a turn in short: kind, source, and what tells."""
    short: list[tuple[str, ...]] = []
    for lesson in lessons(turn):
        match lesson:
            case str():
                short.append(("left out", lesson))
            case Demonstration():
                assert lesson.messages[:-1] == turn.reply.prompt
                short.append(("demonstration", lesson.source, lesson.messages[-1].content))
            case PreferencePair():
                assert lesson.prompt == turn.reply.prompt
                short.append(("pair", lesson.source, lesson.chosen[0].content, lesson.rejected[0].content))
            case Rating():
                assert lesson.prompt == turn.reply.prompt
                short.append(("rating", lesson.source, lesson.completion[0].content, str(lesson.label)))
    return short


# --- what each judgement teaches


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (
            judged(correction()),
            [
                ("demonstration", "correction", "Prepare three results."),
                ("pair", "correction", "Prepare three results.", "I cannot help."),
            ],
        ),
        (
            judged(correction(), reply=Reply("t", PROMPT, "")),
            [("demonstration", "correction", "Prepare three results.")],
        ),
        (judged(correction(" \n")), [("left out", "empty")]),
        (judged(choice("this")), [("pair", "choice", "I cannot help.", "Gladly.")]),
        (judged(choice("other")), [("pair", "choice", "Gladly.", "I cannot help.")]),
        (judged(choice("tie")), [("left out", "tie")]),
        (judged(choice("this", prompt=PROMPT[2:])), [("left out", "other prompt")]),
        (judged(Opinion("choice", choice="this")), [("left out", "other prompt")]),
        (judged(choice("this", said="")), [("left out", "empty")]),
        (judged(Opinion("rating", 1.0)), [("rating", "rating", "I cannot help.", "True")]),
        (judged(Opinion("rating", 0.2)), [("rating", "rating", "I cannot help.", "True")]),
        (judged(Opinion("rating", -1.0)), [("rating", "rating", "I cannot help.", "False")]),
        (judged(Opinion("rating", 0.0)), [("left out", "neutral")]),
        (judged(Opinion("rating", 1.0), reply=Reply("t", PROMPT, " ")), [("left out", "empty")]),
        (judged(Opinion("should_have_helped")), [("rating", "should_have_helped", "I cannot help.", "False")]),
        (judged(Opinion("should_have_refused")), [("rating", "should_have_refused", "I cannot help.", "False")]),
        (
            judged(Opinion("should_have_helped", text="it was harmless!"), correction()),
            [
                ("demonstration", "correction", "Prepare three results."),
                ("pair", "correction", "Prepare three results.", "I cannot help."),
            ],
        ),
        (judged(Opinion("comment", text="This was quick.")), []),
        (
            judged(answer="Write to Ana."),
            [("demonstration", "ticket", "Write to Ana."), ("pair", "ticket", "Write to Ana.", "I cannot help.")],
        ),
        (judged(answer="Write to Ana.", action="escalate"), [("demonstration", "ticket", "Write to Ana.")]),
        (judged(), []),
        (judged(correction(), reply=Reply("t", (Message("user", "  "),), "Hm?")), [("left out", "empty")]),
        (judged(correction(), reply=Reply("t", (), "Hm?")), [("left out", "empty")]),
    ],
)
def test_each_judgement_teaches_what_it_says(turn: Judged, expected: list[tuple[str, ...]]) -> None:
    assert taught(turn) == expected


def test_every_record_says_where_it_comes_from() -> None:
    for record in lessons(judged(correction(), Opinion("rating", 1.0))):
        assert not isinstance(record, str)
        assert (record.turn, record.policy, record.split) == ("turn-1", "hr@1", split_of("acme", "conv-1"))


# --- splitting, duplicates, contradictions


def test_a_conversation_is_always_on_the_same_side_and_a_tenth_is_for_tests() -> None:
    splits = [split_of("acme", f"conv-{number}") for number in range(5000)]
    assert splits == [split_of("acme", f"conv-{number}") for number in range(5000)]
    assert 0.08 < splits.count("test") / 5000 < 0.12
    assert (split_of("acme", "conv-1"), split_of("acme", "conv-22")) == ("train", "test")  # and on every machine


async def test_the_same_record_is_taken_once() -> None:
    found = await collected(judged(correction()), judged(correction(), conversation="conv-2"))
    assert (len(found.demonstrations), len(found.pairs)) == (1, 1)
    assert found.left_out == {"duplicate": 2}


async def test_people_who_contradict_each_other_teach_nothing() -> None:
    rated = judged(Opinion("rating", 1.0), Opinion("rating", -1.0), Opinion("rating", 1.0))
    chosen = [judged(choice("this")), judged(choice("other"))]
    found = await collected(rated, *chosen)
    assert (found.ratings, found.pairs) == ((), ())
    assert found.left_out == {"contradicted": 4, "duplicate": 1}


async def test_what_is_left_out_is_counted() -> None:
    found = await collected(judged(Opinion("rating", 0.0), choice("tie"), choice("tie")), judged(correction("")))
    assert found.left_out == {"empty": 1, "neutral": 1, "tie": 2}
    assert found.turns == 2


# --- what must not get out


async def test_every_text_is_scrubbed() -> None:
    async def scrub(text: str) -> str:
        return text.replace("Jane", "[NAME]")

    prompt = (Message("system", "Jane rules."), Message("user", "I am Jane."))
    other = Opinion("choice", choice="this", other=Reply("t2", prompt, "Bye, Jane."))
    turn = judged(correction("Ask Jane."), other, Opinion("rating", 1.0), reply=Reply("t", prompt, "Hi Jane."))
    found = await collected(turn, scrub=scrub)
    records = (*found.demonstrations, *found.pairs, *found.ratings)
    assert len(records) == 4
    assert all("Jane" not in to_json(record) and "[NAME]" in to_json(record) for record in records)


async def test_each_text_is_scrubbed_once() -> None:
    seen: list[str] = []

    async def scrub(text: str) -> str:
        seen.append(text)
        return text

    await collected(judged(correction(), Opinion("rating", 1.0)), scrub=scrub)
    assert len(seen) == len(set(seen)) == 5


async def test_what_cannot_be_scrubbed_is_left_out_and_counted() -> None:
    async def scrub(text: str) -> str:
        if text == "Prepare three results.":
            raise Unscrubbed
        return text

    found = await collected(judged(correction(), Opinion("rating", 1.0)), scrub=scrub)
    assert (found.demonstrations, found.pairs, len(found.ratings)) == ((), (), 1)
    assert found.left_out == {"unscrubbed": 2}


async def test_a_pair_that_scrubbing_made_equal_is_left_out() -> None:
    async def scrub(text: str) -> str:
        return "[SECRET]" if text.startswith("key") else text

    found = await collected(judged(correction("key-1"), reply=Reply("t", PROMPT, "key-2")), scrub=scrub)
    assert (len(found.demonstrations), found.pairs, found.left_out) == (1, (), {"same": 1})


REDACTED = Withheld(
    "Project Bluebird ships on 2027-01-05, who leads it?", "Project [CODE] ships on [DATE], who leads it?"
)
REFUSED = Withheld(
    "The salary of Jane Doe is ninety thousand euros a year, and a bonus comes on top.",
    "I cannot share what colleagues earn. Please ask HR about the salary bands.",
)


@pytest.mark.parametrize(
    ("withheld", "text", "found"),
    [
        (REDACTED, "Bluebird is led by Ana.", True),
        (REDACTED, "It ships on 2027-01-05.", True),
        (REDACTED, "It ships on 2027/01/05, they say.", True),
        (REDACTED, REDACTED.raw, True),
        (REDACTED, REDACTED.raw.upper(), True),
        (REDACTED, REDACTED.kept, False),
        (REDACTED, "Who leads it? Ana leads it, and it ships in 2027.", False),
        (REFUSED, "Sure: Jane Doe is ninety thousand euros a year, more or less.", True),
        (REFUSED, "jane doe IS ninety\nthousand  euros a year!", True),
        (REFUSED, REFUSED.raw, True),
        (REFUSED, REFUSED.kept, False),
        (REFUSED, "Nobody may share the salary of Jane Doe; a bonus is not public either.", False),
        (REFUSED, "", False),
        (Withheld("hunter2", "[SECRET]"), "my password is hunter2", True),
        (Withheld("hunter2", "[SECRET]"), "my password is hunter3", False),
        (Withheld("the same", "the same"), "the same", False),
        (Withheld("...", "[X]"), "...", False),
    ],
)
def test_a_quotation_of_withheld_text_is_recognised(withheld: Withheld, text: str, found: bool) -> None:
    assert quotes(text, hidden(withheld)) is found


def test_a_long_withheld_text_is_compared_in_time() -> None:
    raw = " ".join(f"word{number}" for number in range(50_000))
    runs = hidden(Withheld(raw, raw.replace("word777 ", "[CODE] ")))
    assert quotes("and word775 word776 word777 word778 word779 word780 too", runs)
    assert not quotes("and word1 word2 word3 word4 word5 word6 too", runs)


async def test_what_quotes_a_withheld_text_is_left_out_and_counted() -> None:
    turn = judged(correction("You mean Bluebird."), Opinion("rating", 1.0), withheld=(REDACTED, REFUSED))
    found = await collected(turn)
    assert (found.demonstrations, found.pairs, len(found.ratings)) == ((), (), 1)
    assert found.left_out == {"withheld": 2}


async def test_a_prompt_that_quotes_a_withheld_text_is_left_out() -> None:
    prompt = (Message("user", "Who leads Bluebird?"),)
    found = await collected(judged(Opinion("rating", 1.0), reply=Reply("t", prompt, "Ana."), withheld=(REDACTED,)))
    assert (found.ratings, found.left_out) == ((), {"withheld": 1})


def test_withheld_text_is_not_in_the_repr() -> None:
    assert "Bluebird" not in repr(judged(withheld=(REDACTED,)))


# --- files

DEMONSTRATION = Demonstration(messages=(*PROMPT, *assistant("Prepare.")), source="ticket", turn="t", policy="p@1")
PAIR = PreferencePair(prompt=PROMPT, chosen=assistant("Prepare."), rejected=assistant("No."), split="test")
RATING = Rating(prompt=PROMPT, completion=assistant("No \u2028 \U0001f600."), label=False)


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        (DEMONSTRATION, {"messages"}),
        (PAIR, {"prompt", "chosen", "rejected"}),
        (RATING, {"prompt", "completion", "label"}),
    ],
)
def test_records_are_written_in_trls_conversational_formats(record, columns: set[str]) -> None:
    written = json.loads(to_json(record))
    ours = {"source", "turn", "turns", "policy", "split", "slice", "weight", "margin", "tie"}
    assert set(written) - ours == columns
    for column in columns - {"label"}:
        assert all(set(message) == {"role", "content"} for message in written[column])
    assert from_json(type(record), to_json(record)) == record
    assert len(to_json(record).encode().splitlines()) == 1


def test_a_line_of_a_public_data_set_is_read_without_its_origin() -> None:
    line = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'
    assert from_json(Demonstration, line).source == ""


PROMPT_JSON = '"prompt": [{"role": "user", "content": "Hi"}]'
SAID = '[{"role": "assistant", "content": "Hello"}]'


@pytest.mark.parametrize(
    ("kind", "line", "reason"),
    [
        (Demonstration, "{", "no JSON: "),
        (Demonstration, "[]", "Input should be a dictionary"),
        (Demonstration, "{}", "messages: Field required"),
        (Demonstration, '{"messages": []}', "must end with what the assistant said"),
        (Demonstration, '{"messages": [{"role": "user", "content": "Hi"}]}', "must end with what the assistant said"),
        (Demonstration, f'{{"messages": {SAID}, "extra": 1}}', "extra: Unexpected keyword argument"),
        (Demonstration, f'{{"messages": {SAID}, "split": "dev"}}', "split: Input should be 'train' or 'test'"),
        (Demonstration, '{"messages": [{"role": "cook", "content": "x"}]}', "messages.0.role: none of system"),
        (Demonstration, '{"messages": [{"role": "assistant"}]}', "messages.0.content: it is no text"),
        (
            Demonstration,
            '{"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "c"}]}]}',
            "messages.0.tool_calls.0: a call has a function with a name",
        ),
        (PreferencePair, f'{{{PROMPT_JSON}, "chosen": {SAID}}}', "rejected: Field required"),
        (PreferencePair, f'{{"prompt": {SAID}, "chosen": {SAID}, "rejected": {SAID}}}', "the prompt must end with"),
        (Rating, f'{{{PROMPT_JSON}, "completion": {SAID}, "label": "yes"}}', "label: Input should be a valid boolean"),
        (Rating, f'{{{PROMPT_JSON}, "completion": {SAID}, "label": 1}}', "label: Input should be a valid boolean"),
    ],
)
def test_a_line_that_is_no_record_is_turned_down_with_the_reason(kind, line: str, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        from_json(kind, line)
    assert reason in str(caught.value)


def test_all_bad_lines_of_a_file_are_listed_by_number(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{to_json(PAIR)}\n{{\n\n{to_json(RATING)}\n{to_json(PAIR)}\n")
    with pytest.raises(BadRecords) as caught:
        read(path, PreferencePair)
    assert list(caught.value.lines) == [2, 4]
    assert "2 of its lines cannot be read" in str(caught.value)
    assert "line 4: chosen: Field required; rejected: Field required" in str(caught.value)


async def test_what_is_written_can_be_read_and_is_what_the_manifest_says(tmp_path: Path) -> None:
    later = judged(Opinion("rating", 1.0), conversation="conv-22", at=NOON + timedelta(days=1))
    found = await collected(judged(correction(), choice("tie")), later)
    assert write(found, tmp_path / "out") == {"demonstrations": 1, "pairs": 1, "ratings": 1}
    assert read(tmp_path / "out" / "demonstrations.jsonl", Demonstration) == list(found.demonstrations)
    assert read(tmp_path / "out" / "pairs.jsonl", PreferencePair) == list(found.pairs)
    assert read(tmp_path / "out" / "ratings.jsonl", Rating) == list(found.ratings)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["turns"] == 2
    assert manifest["between"] == ["2026-11-23T12:00:00+00:00", "2026-11-24T12:00:00+00:00"]
    assert manifest["left_out"] == {"tie": 1}
    for name, listed in manifest["files"].items():
        content = (tmp_path / "out" / name).read_bytes()
        assert listed["sha256"] == hashlib.sha256(content).hexdigest()
        assert listed["records"] == 1
    assert [manifest["files"][f"{name}.jsonl"]["test"] for name in ("pairs", "ratings")] == [0, 1]


async def test_an_empty_collection_is_written_too(tmp_path: Path) -> None:
    assert write(await collected(), tmp_path) == {"demonstrations": 0, "pairs": 0, "ratings": 0}
    assert json.loads((tmp_path / "manifest.json").read_text())["between"] is None


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.endswith(".part")}


async def test_a_write_that_fails_leaves_the_old_files_whole(tmp_path: Path, monkeypatch) -> None:
    write(await collected(judged(correction())), tmp_path)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write(await collected(), tmp_path)
    assert contents(tmp_path) == before


def full(file: int) -> None:
    raise OSError(28, "No space left on device")
