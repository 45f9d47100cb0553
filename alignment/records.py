"""Training records: what a model learns from, one JSON object a line, in TRL's conversational formats.

Demonstrations are `{"messages"}`, preference pairs `{"prompt", "chosen", "rejected"}`, ratings (unpaired, KTO)
`{"prompt", "completion", "label"}`, prompts `{"prompt"}`; each line also says where it comes from, and `tools` has the
JSON schemas of what the assistant could call. `alignment.dataset` reads them in whatever form others write them.

In memory a conversation is the guards' `Message`s, in which each call of a tool is one of its own (`ToolMessage`), so
that whatever reads, scrubs or judges texts reads arguments and results, too; in a file calls are `tool_calls` of the
assistant's message, as TRL has them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

import orjson
from pydantic import ConfigDict, TypeAdapter, ValidationError

from guardrails.types import Message, Role, ToolMessage

Split = Literal["train", "test"]
OpinionKind = Literal["rating", "comment", "correction", "choice", "should_have_helped", "should_have_refused"]
SPLITS: tuple[Split, Split] = ("train", "test")
TEST_SHARE = 0.1
SHOWN = 20
"""Reasons why lines cannot be read, and lines of one reason, that a message lists at most."""
CONVERSATIONS = frozenset(("messages", "prompt", "completion", "chosen", "rejected"))
"""Columns that hold messages."""


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
        raise ValueError(f"{name} must end with what the assistant said; an empty reply teaches nothing")


def _check_weight(weight: float) -> None:
    if weight < 0:
        raise ValueError("weight is at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A conversation that ends as it should: `{"messages"}`.

    turns: which of the assistant's teach something; after: how many messages at the beginning teach nothing anyway.
    tools: JSON schemas of what the assistant could call, each as a text. weight: of its loss.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")
    messages: tuple[Message, ...]
    tools: tuple[str, ...] = ()
    turns: Literal["all", "last"] = "all"
    after: int = 0
    weight: float = 1.0
    source: str = ""
    slice: str = ""
    turn: str = ""
    policy: str = ""
    split: Split = "train"

    def __post_init__(self) -> None:
        _check_reply("messages", self.messages)
        _check_weight(self.weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """Two replies to one prompt, of which a person preferred one: `{"prompt", "chosen", "rejected"}`.

    margin: by how much, in the reward's own units. tie: neither was preferred. slice: what it is an example of.
    weight: of its loss. tools: as in Demonstration.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[str, ...] = ()
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
        _check_weight(self.weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rating:
    """One reply that a person found good or bad: `{"prompt", "completion", "label"}`."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")
    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    label: bool
    tools: tuple[str, ...] = ()
    weight: float = 1.0
    source: str = ""
    slice: str = ""
    turn: str = ""
    policy: str = ""
    split: Split = "train"

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        _check_reply("completion", self.completion)
        _check_weight(self.weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What is asked, without an answer: `{"prompt"}`."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")
    prompt: tuple[Message, ...]
    tools: tuple[str, ...] = ()
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
    """The record as one line of JSON, without the line's end; of a conversation without tools it names none."""
    told = {one.name: getattr(record, one.name) for one in fields(record)}
    told |= {name: written(told[name]) for name in CONVERSATIONS & told.keys()}
    told |= {"tools": [orjson.loads(one) for one in told["tools"]]}
    return orjson.dumps({name: one for name, one in told.items() if one or name not in ("tools", "after")}).decode()


def from_json(kind: type[R], line: str | bytes) -> R:
    """The record in `line`; raises ValueError with every reason why it is not one."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error}") from None
    if isinstance(row, dict):
        row |= {name: conversation(name, row[name]) for name in CONVERSATIONS & row.keys()}
        row |= {"tools": definitions(row["tools"])} if "tools" in row else {}
        if not isinstance(row.get("label", True), bool):
            raise ValueError("label: Input should be a valid boolean")  # which of people's ratings 2 is, nobody knows
    return from_row(kind, row)


def from_row(kind: type[R], row: Mapping[str, Any]) -> R:
    """The record in a row whose conversations have been read; raises ValueError with every reason why it is not one."""
    try:
        record: R = _ADAPTERS[kind].validate_python(row)
    except ValidationError as error:
        raise ValueError(_told(error)) from None
    return record


def _told(error: ValidationError) -> str:
    told = ((".".join(map(str, one["loc"])), one["msg"]) for one in error.errors())
    return "; ".join(f"{where}: {why}" if where else why.removeprefix("Value error, ") for where, why in told)


# --- conversations as files have them

ROLES: Mapping[str, Role] = {name: name for name in get_args(Role)} | {
    "human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "function": "tool",
}  # fmt: skip
"""What others call who speaks, too."""


def conversation(name: str, value: Any) -> tuple[Message, ...]:
    """The messages of a column, each call of a tool as one of its own; raises ValueError that says which is none."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise ValueError(f"{name}: neither a text nor a list of messages")
    return tuple(one for place, said in enumerate(value) for one in _message(f"{name}.{place}", said))


def _message(place: str, value: Any) -> list[Message]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place}: a message has a role and a content")
    role = ROLES.get(str(value.get("role") or value.get("from")))
    content = value.get("content") if "content" in value else value.get("value")
    calls = value.get("tool_calls") or ()
    if role is None:
        raise ValueError(f"{place}.role: none of {', '.join(get_args(Role))}")
    if not isinstance(content, str) and not (calls and content is None):
        raise ValueError(f"{place}.content: it is no text")
    if calls and (role != "assistant" or not isinstance(calls, Sequence) or isinstance(calls, str)):
        raise ValueError(f"{place}.tool_calls: a list of calls, of the assistant's")
    if role == "tool":
        return [ToolMessage(role, content or "", str(value.get("tool_call_id") or ""), str(value.get("name") or ""))]
    made = [_call(f"{place}.tool_calls.{n}", one) for n, one in enumerate(calls)]
    return [Message(role, content or ""), *made] if content or not made else list(made)


def _call(place: str, value: Any) -> ToolMessage:
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{place}: a call has a function with a name and arguments")
    given = function.get("arguments")
    arguments = given if isinstance(given, str) else orjson.dumps({} if given is None else given).decode()
    return ToolMessage("assistant", arguments or "{}", str(value.get("id") or ""), function["name"])


def definitions(value: Any) -> tuple[str, ...]:
    """The JSON schemas of a column `tools`, a list or its JSON; raises ValueError where one is no function's."""
    try:
        listed = orjson.loads(value) if isinstance(value, str) else value
    except orjson.JSONDecodeError as error:
        raise ValueError(f"tools: no JSON: {error}") from None
    if not isinstance(listed, Sequence) or isinstance(listed, (str, bytes)):
        raise ValueError("tools: a list of JSON schemas, or the JSON of one")
    return tuple(_definition(f"tools.{n}", one) for n, one in enumerate(listed))


def _definition(place: str, value: Any) -> str:
    whole = value if isinstance(value, Mapping) and "function" in value else {"type": "function", "function": value}
    function = whole["function"]
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f'{place}: a tool is {{"type": "function", "function": {{"name", "description", ...}}}}')
    return orjson.dumps(whole).decode()


def written(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as files and chat templates have them: calls belong to the assistant's message before them.

    Arguments that are the JSON of an object are that object, for templates write them their own way. A result has the
    name of the tool whose call has its id.
    """
    out, names = list[dict[str, Any]](), dict[str, str]()
    for one in messages:
        if not isinstance(one, ToolMessage):
            out.append({"role": one.role, "content": one.content})
        elif one.role == "tool":
            name = one.name or names.get(one.call, "")
            more = {"tool_call_id": one.call, "name": name}
            out.append({"role": "tool", "content": one.content} | {key: said for key, said in more.items() if said})
        else:
            if not out or out[-1]["role"] != "assistant":
                out.append({"role": "assistant", "content": ""})
            call = {"type": "function", "function": {"name": one.name, "arguments": _arguments(one.content)}}
            out[-1].setdefault("tool_calls", []).append(call | ({"id": one.call} if one.call else {}))
            names |= {one.call: one.name} if one.call else {}
    return out


def _arguments(text: str) -> Any:
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        return text
    return found if isinstance(found, dict) else text


# --- files


class BadRecords(ValueError):
    """Files with lines that are not records; `files` says why, by file and line number."""

    def __init__(self, files: Mapping[Path, Mapping[int, str]]):
        self.files = files
        super().__init__("\n".join(_listed(path, lines) for path, lines in files.items()))

    @property
    def lines(self) -> Mapping[int, str]:
        """Those of the first file."""
        return next(iter(self.files.values()))


def _listed(path: Path, lines: Mapping[int, str]) -> str:
    reasons: dict[str, list[int]] = {}
    for number, reason in lines.items():
        reasons.setdefault(reason, []).append(number)
    told = [
        f"\n  line{'s' * (len(some) > 1)} {', '.join(map(str, some[:SHOWN]))}"
        f"{f' and {len(some) - SHOWN} more' if len(some) > SHOWN else ''}: {reason}"
        for reason, some in list(reasons.items())[:SHOWN]
    ]
    more = sum(len(some) for some in list(reasons.values())[SHOWN:])
    rest = f"\n  and {more} more lines for other reasons" if more else ""
    return f"{path}: {len(lines)} of its lines cannot be read; correct or remove them{''.join(told)}{rest}"


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
        raise BadRecords({path: bad})
    return records


def fingerprint(content: bytes) -> str:
    """The SHA-256 of a file's content, as manifests and releases name their data."""
    return hashlib.sha256(content).hexdigest()


def split_of(tenant: str, conversation: str) -> Split:
    """Where a conversation's records go, always the same: about a tenth to test, so that none is on both sides."""
    place = int.from_bytes(hashlib.sha256(f"{tenant}\n{conversation}".encode("utf-8", "replace")).digest()[:8])
    return "test" if place < TEST_SHARE * 2**64 else "train"
