"""Reading what models learn from, in the forms in which others write it, as the records of `alignment.records`.

The formats are TRL's (`messages`, `prompt` and `completion`, preference with an explicit or an implicit prompt,
unpaired, prompt only; conversations or plain texts), and the dialogue text of Anthropic's hh-rlhf.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Generic

import orjson

from alignment.progress import doing
from alignment.records import (
    CONVERSATIONS,
    BadRecords,
    Demonstration,
    PreferencePair,
    Prompt,
    R,
    Rating,
    Row,
    conversation,
    definitions,
    fingerprint,
    from_row,
    split_of,
)
from guardrails.types import Message

FORMS: Sequence[tuple[frozenset[str], type[Row]]] = (
    (frozenset(("messages",)), Demonstration),
    (frozenset(("chosen", "rejected")), PreferencePair),
    (frozenset(("prompt", "completion", "label")), Rating),
    (frozenset(("prompt", "completion")), Demonstration),
    (frozenset(("prompt",)), Prompt),
)
"""What a row is, by the columns that it has: the first form that fits."""
TEXTS = CONVERSATIONS | {"label", "tools"}
EXTRA = frozenset(("source", "slice", "margin", "tie", "weight", "turn", "turns", "after", "policy", "split"))
CONVERSATION = ("conversation_id", "conversation", "turn")
"""Columns that name a conversation; rows of the same one go to the same split."""
_SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")
WORDS = 13
"""Words of a sequence that two prompts have in common where they overlap (GPT-3's choice, arXiv:2005.14165)."""


class DatasetError(ValueError):
    """Data that cannot be read; the message says which, why, and what to do."""


@dataclass(frozen=True, slots=True)
class Dataset(Generic[R]):
    """The records of a file. fingerprint: SHA-256 of its bytes. ignored: columns that nobody reads here. lines: where
    in the file each record is, counted from 1: the line, or the row of what has no lines."""

    path: Path
    records: tuple[R, ...]
    fingerprint: str
    ignored: tuple[str, ...] = ()
    lines: tuple[int, ...] = ()


def read(source: Path | str, kind: type[R] | None = None, tell: Callable[[str], object] = print) -> Dataset[R]:
    """The records in a JSONL or JSON file (.gz too), a Parquet file, a folder of `datasets`, or a set on the hub.

    kind: what they must be; None for what the first row is. Rows without a `split` are split by conversation. Columns
    that nobody reads are told once. Raises BadRecords with all rows that are none, DatasetError.
    """
    doing(f"reading {source}")
    path, records, bad, unread = Path(source), dict[int, Any](), dict[int, str](), dict[str, None]()
    wanted: type[Any] | None = kind
    for number, row in _rows(source):
        try:
            found, others = _record(row, wanted)
        except ValueError as error:
            bad[number] = str(error)
            continue
        wanted = wanted or type(found)
        unread |= dict.fromkeys(others)
        records[number] = found
    if bad:
        raise BadRecords({path: bad})
    if not records:
        raise DatasetError(f"{source} has no rows")
    if unread:
        tell(f"{source}: columns that are not read: {', '.join(unread)}")
    digest = fingerprint(path.read_bytes()) if path.is_file() else _digest(list(records.values()))
    return Dataset(path, tuple(records.values()), digest, tuple(unread), tuple(records))


def prompt_of(record: Row) -> tuple[Message, ...]:
    """What is asked in a record: of a demonstration all that comes before its last reply."""
    if not isinstance(record, Demonstration):
        return record.prompt
    said = len(record.messages)
    while said and record.messages[said - 1].role == "assistant":  # a reply, and each call of a tool in it
        said -= 1
    return record.messages[:said]


# --- rows of files


def _rows(source: Path | str) -> Iterator[tuple[int, Any]]:
    """(number from 1, row) of everything in a source; a line that is no JSON is a ValueError in its place."""
    path = Path(source)
    name = path.name.removesuffix(".gz")
    if path.is_file() and name.endswith((".jsonl", ".ndjson")):
        yield from _lines(path)
    elif path.is_file() and name.endswith(".json"):
        yield from enumerate(_array(path), 1)
    elif path.is_file() and name.endswith(".parquet"):
        yield from enumerate(map(_without_none, _table("parquet", data_files=str(path))), 1)
    elif path.is_dir():
        yield from enumerate(map(_without_none, _saved(path)), 1)
    elif path.suffix or path.is_absolute():
        known = "a .jsonl, .json (also .gz) or .parquet file, or a folder that `datasets` has saved"
        raise DatasetError(f"{source}: {'not one of' if path.exists() else 'there is no such file; name'} {known}")
    else:
        yield from enumerate(map(_without_none, _table(str(source))), 1)


def _without_none(value: Any) -> Any:
    """A row of a table without what it does not have: there, the arguments of all calls have the keys of all others."""
    if isinstance(value, Mapping):
        return {name: _without_none(one) for name, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list) else value


def _bytes(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from None


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_bytes(path).splitlines(), 1):
        if line.strip():
            try:
                yield number, orjson.loads(line)
            except orjson.JSONDecodeError as error:
                yield number, ValueError(f"no JSON: {error}")


def _array(path: Path) -> list[Any]:
    try:
        found = orjson.loads(_bytes(path))
    except orjson.JSONDecodeError as error:
        raise DatasetError(f"{path}: no JSON: {error}") from None
    if not isinstance(found, list):
        raise DatasetError(f"{path}: a .json file holds one array of rows; for a row a line name it .jsonl")
    return found


def _table(name: str, **more: Any) -> Iterable[Any]:
    datasets = _library(name)
    try:
        return datasets.load_dataset(name, split="train", **more)  # type: ignore[no-any-return]
    except Exception as error:  # of many kinds, from the network, the hub and the file
        raise DatasetError(f"{more.get('data_files', name)}: {type(error).__name__}: {error}") from None


def _saved(path: Path) -> Iterable[Any]:
    found = _library(str(path)).load_from_disk(str(path))
    return found["train"] if isinstance(found, Mapping) else found  # type: ignore[no-any-return]


def _library(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DatasetError(f"{name}: reading it needs `datasets` (pip install 'newel[train]')") from None
    datasets.disable_progress_bars()
    return datasets


# --- a row as a record


def _record(row: Any, kind: type[Row] | None) -> tuple[Row, list[str]]:
    """The record in a row, and its columns that are not read; raises ValueError with the reasons."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, Mapping):
        raise ValueError("the row is no object with columns")
    given = {name: value for name, value in row.items() if value is not None}
    found: type[Any] = _form(given, kind)
    told = {name: _messages(name, given[name]) for name in CONVERSATIONS & given.keys()}
    told |= {"label": given["label"]} if "label" in given else {}
    wanted = {one.name for one in fields(found)}
    extra = {name: given[name] for name in EXTRA & given.keys() if name in wanted}
    made = _joined(found, told) | extra
    if "tools" in given:
        made["tools"] = definitions(given["tools"])
    if "split" not in made:
        made["split"] = split_of("", _conversation(given, made))
    return from_row(found, made), sorted(given.keys() - TEXTS - EXTRA - set(CONVERSATION))


def _form(row: Mapping[str, Any], kind: type[Row] | None) -> type[Row]:
    """What the row is; raises ValueError where it is nothing, or not what it must be."""
    found = next((form for columns, form in FORMS if columns <= row.keys()), None)
    if found is None:
        near = {name: difflib.get_close_matches(name, TEXTS, 1) for name in row.keys() - TEXTS}
        offers = [f"'{name}' may be meant as '{match[0]}'" for name, match in near.items() if match]
        named = ", ".join(sorted(row)) or "none"
        raise ValueError(f"it has none of the columns of a record (it has {named})" + "".join(f"; {o}" for o in offers))
    if kind is not None and found is not kind:
        raise ValueError(f"it is a {found.__name__} by its columns, not a {kind.__name__}")
    return found


def _joined(kind: type[Row], told: Mapping[str, Any]) -> dict[str, Any]:
    """The texts of a row under the names that the record has for them."""
    if kind is Demonstration and "messages" not in told:
        prompt, said = told["prompt"], told["completion"]
        several = any(one.role != "assistant" for one in said)
        return {"messages": (*prompt, *said)} | ({"after": len(prompt)} if several else {"turns": "last"})
    if kind is Demonstration:
        return {"messages": told["messages"]}
    if kind is PreferencePair and "prompt" not in told:
        return _with_prompt(told["chosen"], told["rejected"])
    if kind is PreferencePair:  # some repeat the prompt in the replies
        prompt, size = told["prompt"], len(told["prompt"])
        replies = {name: told[name] for name in ("chosen", "rejected")}
        return {"prompt": prompt} | {n: one[size:] if one[:size] == prompt else one for n, one in replies.items()}
    return dict(told)


def _with_prompt(chosen: Sequence[Message], rejected: Sequence[Message]) -> dict[str, Any]:
    """A pair of which the prompt is what both conversations have in common at the beginning."""
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    while common and chosen[common - 1].role == "assistant":
        common -= 1
    return {"prompt": chosen[:common], "chosen": chosen[common:], "rejected": rejected[common:]}


def _messages(name: str, value: Any) -> tuple[Message, ...]:
    """A column as messages: as they are, of a dialogue's text, or of a text that one side says."""
    if isinstance(value, str):
        return _dialogue(value) or (Message("user" if name == "prompt" else "assistant", value),)
    return conversation(name, [value] if isinstance(value, Mapping) else value)


def _dialogue(text: str) -> tuple[Message, ...]:
    """The messages of a dialogue as hh-rlhf writes it; none for another text."""
    if not text.startswith("\n\nHuman:"):
        return ()
    _, *parts = _SPEAKER.split(text)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return tuple(Message("user" if who == "Human" else "assistant", said.strip()) for who, said in pairs)


def _conversation(row: Mapping[str, Any], made: Mapping[str, Any]) -> str:
    """What names the row's conversation: its id, or else what the person said first."""
    named = next((str(row[name]) for name in CONVERSATION if row.get(name)), "")
    messages: Sequence[Message] = made.get("messages") or made.get("prompt") or ()
    return named or next((one.content for one in messages if one.role == "user"), "")


def _digest(records: Sequence[Any]) -> str:
    """The SHA-256 of records that are in no file."""
    whole = hashlib.sha256()
    for one in records:
        whole.update(repr(one).encode("utf-8", "surrogatepass"))
    return whole.hexdigest()


# --- the same prompts in several sets


@dataclass(frozen=True, slots=True)
class Overlap:
    """What two sets have in common: (row of the first, row of the second), counted from 0, each of the second once.

    exact: the same text but for case and white space. near: `WORDS` words in a row, or all words of a short one.
    """

    first: str
    second: str
    exact: tuple[tuple[int, int], ...] = ()
    near: tuple[tuple[int, int], ...] = field(default=())

    @property
    def rows(self) -> frozenset[int]:
        """The rows of the second set that overlap."""
        return frozenset(row for _, row in (*self.exact, *self.near))


def overlaps(sets: Mapping[str, Sequence[Row]]) -> list[Overlap]:
    """The overlap of the prompts of every two sets, in their order, where there is any."""
    names = list(sets)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    found = [overlap(a, sets[a], b, sets[b]) for a, b in pairs]
    return [one for one in found if one.rows]


def overlap(first: str, ours: Sequence[Row], second: str, theirs: Sequence[Row]) -> Overlap:
    """Which of their prompts are among ours."""
    texts, runs = dict[str, int](), dict[int, int]()
    wanted = {run for one in theirs for run in _runs(_words(one))}  # of ours only these are kept: memory
    for place, one in enumerate(ours):
        words = _words(one)
        texts.setdefault(" ".join(words), place)
        for run in _runs(words):
            if run in wanted:
                runs.setdefault(run, place)
    exact, near = list[tuple[int, int]](), list[tuple[int, int]]()
    for place, one in enumerate(theirs):
        words = _words(one)
        if (same := texts.get(" ".join(words))) is not None:
            exact.append((same, place))
        elif (like := next((runs[run] for run in _runs(words) if run in runs), None)) is not None:
            near.append((like, place))
    return Overlap(first, second, tuple(exact), tuple(near))


def without(records: Sequence[R], found: Overlap) -> list[R]:
    """The records of the second set that do not overlap."""
    return [one for place, one in enumerate(records) if place not in found.rows]


def _words(record: Row) -> list[str]:
    """The words of what the person asks, in small letters; what a system prompt says is the same in many rows."""
    return " ".join(one.content for one in prompt_of(record) if one.role == "user").casefold().split()


def _runs(words: Sequence[str]) -> Iterator[int]:
    """Hashes of all sequences of `WORDS` words."""
    for at in range(max(1, len(words) - WORDS + 1)):
        yield hash(tuple(words[at : at + WORDS]))


def told(found: Sequence[Overlap]) -> str:
    """Overlaps as lines for people."""
    lines = []
    for one in found:
        rows = ", ".join(str(row + 1) for row in sorted(one.rows)[:20])
        more = " ..." if len(one.rows) > 20 else ""
        lines.append(f"{one.first} and {one.second}: {len(one.exact)} prompts are the same, {len(one.near)} nearly")
        lines.append(f"  rows of {one.second}: {rows}{more}")
    return "\n".join(lines)
