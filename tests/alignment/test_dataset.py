"""Training data in the forms in which others write it; what is wrong is said of all rows at once."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from alignment.dataset import DatasetError, overlap, overlaps, prompt_of, read, told, without
from alignment.records import BadRecords, Demonstration, PreferencePair, Prompt, Rating, from_json, to_json
from alignment.records import written as to_messages
from guardrails.types import Message, ToolMessage

USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "Hi?"), ("assistant", "Yes."), ("assistant", "No.")))
ASKED, YES, NO = Message("user", "Hi?"), Message("assistant", "Yes."), Message("assistant", "No.")


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


PAIR = PreferencePair(prompt=(ASKED,), chosen=(YES,), rejected=(NO,))
THUMB = Rating(prompt=(ASKED,), completion=(NO,), label=False)
FORMS = {
    "messages": ({"messages": [USER, GOOD]}, Demonstration(messages=(ASKED, YES))),
    "prompt-completion": ({"prompt": [USER], "completion": [GOOD]}, Demonstration(messages=(ASKED, YES), turns="last")),
    "plain texts": ({"prompt": "Hi?", "completion": "Yes."}, Demonstration(messages=(ASKED, YES), turns="last")),
    "explicit preference": ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, PAIR),
    "implicit preference": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, PAIR),
    "prompt repeated in replies": ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, PAIR),
    "plain preference": ({"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}, PAIR),
    "dialogues of hh-rlhf": (
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Hi?\n\nAssistant: No."}, PAIR,
    ),
    "unpaired": ({"prompt": [USER], "completion": [BAD], "label": False}, THUMB),
    "prompt only": ({"prompt": [USER]}, Prompt(prompt=(ASKED,))),
    "other names of roles": (
        {"messages": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]},
        Demonstration(messages=(ASKED, YES)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(tmp_path: Path, form: str) -> None:
    row, expected = FORMS[form]
    found = read(written(tmp_path / "rows.jsonl", row | {"split": "train"}))
    assert found.records == (expected,)
    assert prompt_of(found.records[0]) == (ASKED,)


def test_an_implicit_prompt_ends_with_what_a_person_says(tmp_path: Path) -> None:
    more = {"role": "user", "content": "Why?"}
    row = {"chosen": [USER, GOOD, more, GOOD], "rejected": [USER, GOOD, more, BAD]}
    [pair] = read(written(tmp_path / "rows.jsonl", row), PreferencePair).records
    assert [one.content for one in pair.prompt] == ["Hi?", "Yes.", "Why?"]
    same_start = {"chosen": [USER, GOOD], "rejected": [USER, GOOD, more, BAD]}
    [pair] = read(written(tmp_path / "more.jsonl", same_start), PreferencePair).records
    assert [one.content for one in pair.prompt] == ["Hi?"] and len(pair.rejected) == 3


def test_extra_columns_are_kept_and_unknown_ones_told_once(tmp_path: Path) -> None:
    extra = {"margin": 0.5, "tie": True, "weight": 2, "source": "hr", "slice": "helpful", "split": "test"}
    lines: list[str] = []
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], **extra}
    found = read(written(tmp_path / "rows.jsonl", row | {"rater": 1}, row | {"rater": 2}), tell=lines.append)
    one = found.records[0]
    assert {name: getattr(one, name) for name in extra} == extra
    assert lines == [f"{tmp_path / 'rows.jsonl'}: columns that are not read: rater"] and found.ignored == ("rater",)
    [again] = read(written(tmp_path / "again.jsonl", to_json(one))).records
    assert again == one


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.json.gz", "rows.parquet", "saved"])
def test_every_kind_of_file_is_read(tmp_path: Path, name: str) -> None:
    rows = [{"messages": [USER, GOOD]}, {"messages": [USER, BAD]}]
    path = tmp_path / name
    lines, array = "".join(json.dumps(row) + "\n" for row in rows), json.dumps(rows)
    if name == "saved":
        from datasets import Dataset

        Dataset.from_list(rows).save_to_disk(path)
    elif name.endswith(".parquet"):
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(path)
    else:
        text = (lines if "jsonl" in name else array).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    found = read(path, Demonstration)
    assert [one.messages[-1].content for one in found.records] == ["Yes.", "No."] and len(found.fingerprint) == 64


HI = '{"role": "user", "content": "Hi?"}'
BROKEN = {
    "{": "no JSON",
    "[1]": "the row is no object with columns",
    '{"mesages": []}': "none of the columns of a record .it has mesages.; 'mesages' may be meant as 'messages'",
    '{"messages": []}': "must end with what the assistant said",
    f'{{"messages": [{HI}]}}': "must end with what the assistant said",
    f'{{"messages": [{HI}, {{"role": "assistant", "content": ""}}]}}': "must end with what the assistant said",
    f'{{"messages": [{{"role": "wizard", "content": "Hi?"}}, {json.dumps(GOOD)}]}}': "messages.0.role: ",
    f'{{"messages": [{{"role": "user"}}, {json.dumps(GOOD)}]}}': "messages.0.content: ",
    '{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}': "messages.0.tool_calls.0: a call has a",
    f'{{"messages": [{HI}, {{"role": "user", "tool_calls": [{{}}]}}]}}': "messages.1.tool_calls: a list of calls",
    f'{{"messages": [{HI}, {json.dumps(GOOD)}], "tools": "["}}': "tools: no JSON",
    f'{{"messages": [{HI}, {json.dumps(GOOD)}], "tools": [{{"name": 1}}]}}': "tools.0: a tool is ",
    f'{{"messages": [{HI}, {json.dumps(GOOD)}], "weight": -1}}': "weight is at least 0",
    '{"prompt": "Hi?"}': "it is a Prompt by its columns, not a Demonstration",
    '{"prompt": 5, "completion": "Yes."}': "prompt: neither a text nor a list of messages",
}


def test_all_rows_that_are_wrong_are_told_with_their_numbers(tmp_path: Path) -> None:
    good = json.dumps({"messages": [USER, GOOD]})
    with pytest.raises(BadRecords) as caught:
        read(written(tmp_path / "rows.jsonl", good, *BROKEN, good))
    assert list(caught.value.lines) == list(range(2, 2 + len(BROKEN)))
    for (row, why), said in zip(BROKEN.items(), caught.value.lines.values(), strict=True):
        assert re.search(why, said), (row, said)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("empty.jsonl", b"\n\n", "has no rows"),
        ("rows.csv", b"a,b", "not one of a .jsonl, .json .* or .parquet file"),
        ("rows.json", b'{"messages": []}', "holds one array of rows; for a row a line name it .jsonl"),
        ("rows.jsonl.gz", b"plain", "cannot be read: Not a gzipped file"),
        ("rows.parquet", b"plain", "rows.parquet: "),
    ],
)
def test_a_file_that_is_no_data_says_why(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=why):
        read(tmp_path / name)


def test_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"there is no such file; name a \.jsonl"):
        read(tmp_path / "rows.jsonl")


def test_a_conversation_is_on_one_side_only_and_always_on_the_same(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"Question {i // 3}?"}, {"role": "assistant", "content": f"{i}"}]}
        for i in range(900)
    ]
    found = read(written(tmp_path / "rows.jsonl", *rows)).records
    sides: dict[str, set[str]] = {}
    for one in found:
        sides.setdefault(one.messages[0].content, set()).add(one.split)
    assert all(len(side) == 1 for side in sides.values())
    assert 0.05 < sum(one.split == "test" for one in found) / 900 < 0.2
    assert read(tmp_path / "rows.jsonl").records == found
    by_id = read(written(tmp_path / "ids.jsonl", *(row | {"conversation_id": "one"} for row in rows))).records
    assert len({one.split for one in by_id}) == 1


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(prompt=(Message("system", "You help."), Message("user", text))) for text in texts]


def test_prompts_that_two_sets_share_are_found_and_taken_out() -> None:  # D8
    long = "please tell me in a few words how a person asks for a raise after many good years at work"
    ours = prompts("What is a pension?", long, "Something else entirely")
    theirs = prompts("Fresh question", "what  is a PENSION?", f"Dear bot, {long}, thanks", "Something else")
    found = overlap("train", ours, "eval", theirs)
    assert found.exact == ((0, 1),) and found.near == ((1, 2),) and found.rows == {1, 2}
    assert [one.prompt[1].content for one in without(theirs, found)] == ["Fresh question", "Something else"]
    assert overlaps({"train": ours, "eval": theirs, "other": prompts("Nothing")}) == [found]
    assert told([found]) == "train and eval: 1 prompts are the same, 1 nearly\n  rows of eval: 2, 3"


SCHEMA = {"type": "function", "function": {"name": "light", "parameters": {"type": "object"}}}
CALLS = [
    USER,
    {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "light", "arguments": {"on": True}}}],
    },
    {"role": "tool", "name": "light", "content": "done"},
    GOOD,
]
CALLED = (
    ASKED, ToolMessage("assistant", '{"on":true}', "", "light"), ToolMessage("tool", "done", "", "light"), YES,
)  # fmt: skip


@pytest.mark.parametrize("tools", [[SCHEMA], json.dumps([SCHEMA]), [SCHEMA["function"]]])
def test_calls_of_tools_are_read_as_trl_has_them_and_written_so_again(tmp_path: Path, tools: Any) -> None:
    [one] = read(written(tmp_path / "rows.jsonl", {"messages": CALLS, "tools": tools, "split": "train"})).records
    assert one == Demonstration(messages=CALLED, tools=(json.dumps(SCHEMA, separators=(",", ":")),))
    again = json.loads(to_json(one))
    assert again["tools"] == [SCHEMA]
    assert again["messages"] == [USER, CALLS[1] | {"content": ""}, CALLS[2], GOOD]
    assert from_json(Demonstration, to_json(one)) == one
    assert prompt_of(one) == CALLED[:3]


def test_arguments_may_be_json_and_results_are_named_after_the_call_with_their_id(tmp_path: Path) -> None:
    call = {"id": "c1", "function": {"name": "light", "arguments": '{"on": true}'}}
    talk = [USER, {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "done"}, GOOD]  # fmt: skip
    [one] = read(written(tmp_path / "rows.jsonl", {"prompt": talk[:1], "completion": talk[1:]})).records
    assert isinstance(one, Demonstration) and one.turns == "all" and one.after == 1
    assert to_messages(one.messages)[1]["tool_calls"][0]["function"]["arguments"] == {"on": True}
    assert to_messages(one.messages)[2] == {"role": "tool", "content": "done", "tool_call_id": "c1", "name": "light"}


def test_tables_give_calls_only_the_arguments_that_they_have(tmp_path: Path) -> None:
    from datasets import Dataset

    def row(**arguments: int) -> dict[str, Any]:
        call = {"function": {"name": "f", "arguments": {"a": None, "b": None} | arguments}}
        return {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}

    Dataset.from_list([row(a=1), row(b=2)]).to_parquet(tmp_path / "rows.parquet")
    found = read(tmp_path / "rows.parquet", Demonstration).records
    assert [one.messages[1].content for one in found] == ['{"a":1}', '{"b":2}']
