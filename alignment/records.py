"""Training records: what a model learns from, one JSON object a line, in TRL's conversational formats.

Demonstrations are `{"messages"}`, preference pairs `{"prompt", "chosen", "rejected"}`, ratings (unpaired, KTO)
`{"prompt", "completion", "label"}`, prompts `{"prompt"}`; each line also says where it comes from. `alignment.dataset`
reads them in whatever form others write them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from guardrails.types import Message

Split = Literal["train", "test"]
OpinionKind = Literal["rating", "comment", "correction", "choice", "should_have_helped", "should_have_refused"]
TEST_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Reply:
    """What was said to a prompt, in one turn."""

    turn: str
    prompt: tuple[Message, ...]
    said: str


@dataclass(frozen=True, slots=True)
class Opinion:
    """What one person thought of a reply: a rating in -1..1, a correction, or a choice against `other`
    ("this", "other", "tie")."""

    kind: OpinionKind
    value: float | None = None
    text: str = ""
    choice: str = ""
    other: Reply | None = None


@dataclass(frozen=True, slots=True)
class Withheld:
    """A text that somebody was not to see, and what was kept in its place."""

    raw: str = field(repr=False)
    kept: str


@dataclass(frozen=True, slots=True)
class Judged:
    """A reply with everything that people said of it, and a person's own `answer` where its ticket got one.

    action is what the guard did with the turn; withheld is every withheld text of the conversation, given only so
    that what quotes one can be left out.
    """

    reply: Reply
    conversation: str
    tenant: str
    policy: str
    action: str
    at: datetime
    opinions: tuple[Opinion, ...] = ()
    answer: str = ""
    withheld: tuple[Withheld, ...] = ()


def _check_prompt(prompt: Sequence[Message]) -> None:
    if not prompt or prompt[-1].role == "assistant":
        raise ValueError("the prompt must end with a message that the assistant answers")


def _check_reply(name: str, reply: Sequence[Message]) -> None:
    if not reply or reply[-1].role != "assistant" or not reply[-1].content:
        raise ValueError(f"{name} must end with what the assistant said")


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A conversation that ends as it should: `{"messages"}`; turns: which of the assistant's teach something."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")
    messages: tuple[Message, ...]
    turns: Literal["all", "last"] = "all"
    weight: float = 1.0
    source: str = ""
    slice: str = ""
    turn: str = ""
    policy: str = ""
    split: Split = "train"

    def __post_init__(self) -> None:
        _check_reply("messages", self.messages)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """Two replies to one prompt, of which a person preferred one: `{"prompt", "chosen", "rejected"}`.

    margin: by how much, in the reward's own units. tie: neither was preferred. slice: what it is an example of.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    margin: float = 0.0
    tie: bool = False
    weight: float = 1.0
    source: str = ""
    slice: str = ""
    turn: str = ""
    policy: str = ""
    split: Split = "train"

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        _check_reply("chosen", self.chosen)
        _check_reply("rejected", self.rejected)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rating:
    """One reply that a person found good or bad: `{"prompt", "completion", "label"}`."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")
    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    label: bool
    weight: float = 1.0
    source: str = ""
    slice: str = ""
    turn: str = ""
    policy: str = ""
    split: Split = "train"

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        _check_reply("completion", self.completion)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What is asked, without an answer: `{"prompt"}`."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")
    prompt: tuple[Message, ...]
    source: str = ""
    slice: str = ""
    turn: str = ""
    policy: str = ""
    split: Split = "train"

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)


Record = Demonstration | PreferencePair | Rating
"""What people's opinions become."""
Row = Record | Prompt
"""What a data file has in a line."""
R = TypeVar("R", Demonstration, PreferencePair, Rating, Prompt)


_ADAPTERS: dict[type[Row], TypeAdapter[Any]] = {
    kind: TypeAdapter(kind) for kind in (Demonstration, PreferencePair, Rating, Prompt)
}


def to_json(record: Row) -> str:
    """The record as one line of JSON, without the line's end."""
    return _ADAPTERS[type(record)].dump_json(record).decode()


def from_json(kind: type[R], line: str | bytes) -> R:
    """The record in `line`; raises ValueError with every reason why it is not one."""
    try:
        record: R = _ADAPTERS[kind].validate_json(line, strict=True)
    except ValidationError as error:
        raise ValueError(_told(error)) from None
    return record


def from_row(kind: type[R], row: Mapping[str, Any]) -> R:
    """The record in a table's row; raises ValueError with every reason why it is not one."""
    try:
        record: R = _ADAPTERS[kind].validate_python(row)
    except ValidationError as error:
        raise ValueError(_told(error)) from None
    return record


def _told(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, one['loc'])) or 'line'}: {one['msg']}" for one in error.errors())


class BadRecords(ValueError):
    """A file with lines that are not records; `lines` says why, by line number."""

    def __init__(self, path: Path, lines: dict[int, str]):
        self.path, self.lines = path, lines
        listed = "".join(f"\n  line {number}: {reason}" for number, reason in lines.items())
        super().__init__(f"{path}: {len(lines)} of its lines cannot be read; correct or remove them{listed}")


def read(path: Path, kind: type[R]) -> list[R]:
    """The records in a JSONL file, empty lines skipped; raises BadRecords with all bad lines at once."""
    records: list[R] = []
    bad: dict[int, str] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            records.append(from_json(kind, line))
        except ValueError as error:
            bad[number] = str(error)
    if bad:
        raise BadRecords(path, bad)
    return records


def fingerprint(content: bytes) -> str:
    """The SHA-256 of a file's content, as manifests and releases name their data."""
    return hashlib.sha256(content).hexdigest()


def split_of(tenant: str, conversation: str) -> Split:
    """Where a conversation's records go, always the same: about a tenth to test, so that none is on both sides."""
    place = int.from_bytes(hashlib.sha256(f"{tenant}\n{conversation}".encode("utf-8", "replace")).digest()[:8])
    return "test" if place < TEST_SHARE * 2**64 else "train"
