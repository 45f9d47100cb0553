"""The systems that the suite can be run against: a target makes a case's rules its own and guards a text with them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import aiohttp

from guardrails import judge, loads, stream
from guardrails.reply import Reply
from guardrails.types import Rule as Enforced
from guardrails.types import Verdict
from tests.conformance.streaming.cases import Channel, Rule
from tests.fakes import FakeUpstream, Script

Rules = tuple[Rule, ...]

ASKED = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "send", "parameters": {"type": "object"}}}


@dataclass(slots=True)
class Model:
    """The model's side of one stream: gives out `pieces`, and notes how much was held back when it was asked for more.

    given: characters that it has given out. shown: characters that a client has seen; the reader keeps it.
    held: (given, held back) at each time that it was asked for a piece.
    """

    pieces: Sequence[str]
    given: int = 0
    shown: int = 0
    held: list[tuple[int, int]] = field(default_factory=list)

    async def __aiter__(self) -> AsyncIterator[str]:
        for piece in self.pieces:
            self.held.append((self.given, self.given - self.shown))
            self.given += len(piece)
            yield piece


class Target(Protocol):
    """A guarded system.

    channels: those that it can be asked about. exact: it says a rule's own `reply` and `placeholder`, so that the text
    of a whole stream can be compared. live: a piece that may be shown is given out before the model is asked for the
    next, so that what is held back can be counted.
    """

    @property
    def name(self) -> str:
        """What to call it."""
        ...

    channels: frozenset[Channel]
    exact: bool
    live: bool

    def stream(self, rules: Rules, model: Model, channel: Channel) -> AsyncIterator[str]:
        """What a client sees while the model writes, piece by piece."""
        ...

    async def whole(self, rules: Rules, text: str, channel: Channel) -> str | None:
        """What a client sees that does not stream; None where there is no such way."""
        ...


def policy(name: str, rules: Rules) -> str:
    """The TOML of a newel policy that has these rules."""
    parts = [f"name = {_toml(name)}"]
    for rule in rules:
        keys: dict[str, object] = {"name": rule.name, "action": rule.action}
        keys |= {"placeholder": rule.placeholder} if rule.action == "redact" else {"reply": rule.reply}
        keys |= {"route": "people"} if rule.action == "escalate" else {}
        parts += [_table("[[output]]", keys | _validator(rule))]
        parts += [_table("[[example]]", {"answer": rule.example, "expect": rule.action, "rule": rule.name})]
    parts += [_table("[[example]]", {"answer": "Gladly.", "expect": "allow"})]
    if any(rule.action == "escalate" for rule in rules):
        parts += [_table("[routes.people]", {"queue": "people", "due": "1h"})]
    return "\n\n".join(parts)


def _table(head: str, keys: dict[str, object]) -> str:
    return "\n".join([head, *(f"{key} = {_toml(value)}" for key, value in keys.items())])


def _validator(rule: Rule) -> dict[str, object]:
    if rule.kind == "pattern":
        return {"validator": "patterns", "patterns": [rule.pattern]}
    if rule.kind == "phrase":
        return {"validator": "topics", "topics": [{"name": rule.name, "words": list(rule.phrases)}]}
    return {"validator": "personal" if rule.kind == "personal" else "secrets", "kinds": [rule.data]}


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


@cache
def enforced(rules: Rules) -> tuple[Enforced, ...]:
    """The rules as newel has them."""
    return loads(policy("conformance", rules)).output


class Newel:
    """newel in this process: the guard of one text, and that of a reply of several channels."""

    name, exact, live = "newel", True, True
    channels: frozenset[Channel] = frozenset({"content", "reasoning", "arguments"})

    async def stream(self, rules: Rules, model: Model, channel: Channel) -> AsyncIterator[str]:
        """What `guardrails.stream`, or a `Reply`, gives out."""
        if channel != "content":
            async for piece in self._reply(rules, model, "arguments:0" if channel == "arguments" else channel):
                yield piece
            return
        async for said in stream(enforced(rules), aiter(model)):
            if not isinstance(said, Verdict):
                yield said

    async def _reply(self, rules: Rules, model: Model, channel: str) -> AsyncIterator[str]:
        tool = "send" if channel != "reasoning" else ""
        reply = Reply(enforced(rules), offered=("send",))
        async for piece in model:
            for said in reply.feed(channel, piece, tool):
                yield said.text
            tool = ""
            if reply.stopped:
                return
        for said in (await reply.finish())[0]:
            yield said.text if said.channel == channel else ""

    async def whole(self, rules: Rules, text: str, channel: Channel) -> str | None:
        """What `guardrails.judge` delivers."""
        return (await judge(enforced(rules), text)).text if channel == "content" else None


@dataclass(slots=True)
class Gateway:
    """A gateway with an OpenAI-compatible API at `url`, whose model is the scripted `upstream`.

    keys: the API key for each set of rules, by their names joined with commas; the one of "" is for any set.
    torn: how many bytes of its event stream the model sends at a time, 0 for whole events.
    """

    url: str
    upstream: FakeUpstream
    keys: dict[str, str]
    model: str = "fake"
    channels: frozenset[Channel] = frozenset({"content", "reasoning", "arguments"})
    exact: bool = True
    live: bool = False
    torn: int = 0

    @property
    def name(self) -> str:
        """Its address."""
        return self.url

    async def stream(self, rules: Rules, model: Model, channel: Channel) -> AsyncIterator[str]:
        """The text of one channel in the server-sent events of a streamed chat."""
        events = [_event(piece, channel, i == 0) for i, piece in enumerate(model.pieces)]
        if self.torn:
            wire = b"".join(events)
            events = [wire[i : i + self.torn] for i in range(0, len(wire), self.torn)]
        self.upstream.script = Script(events)
        async with aiohttp.ClientSession() as http, self._ask(http, rules, channel, True) as response:
            response.raise_for_status()
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                frame = json.loads(line[6:])
                if "error" in frame:
                    raise RuntimeError(f"{self.url} answered in its stream: {frame['error']}")
                for choice in frame["choices"]:
                    yield _said(choice.get("delta", {}), channel)

    async def whole(self, rules: Rules, text: str, channel: Channel) -> str | None:
        """The text of a chat that is not streamed; the upstream plays that for content only."""
        if channel != "content":
            return None
        self.upstream.script = Script([text])
        async with aiohttp.ClientSession() as http, self._ask(http, rules, channel, False) as response:
            response.raise_for_status()
            return _said((await response.json())["choices"][0]["message"], channel)

    def _ask(self, http: aiohttp.ClientSession, rules: Rules, channel: Channel, streamed: bool) -> Any:
        key = self.keys.get(",".join(rule.name for rule in rules), self.keys.get("", ""))
        body: dict[str, object] = {"model": self.model, "stream": streamed, "messages": ASKED}
        body |= {"tools": [TOOL]} if channel == "arguments" else {}
        return http.post(f"{self.url}/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"})


def _event(piece: str, channel: Channel, first: bool) -> bytes:
    """What the upstream writes for a piece of this channel."""
    call: dict[str, object] = {"index": 0, "function": {"arguments": piece}}
    if first:
        call |= {"id": "call_1", "type": "function", "function": {"name": "send", "arguments": piece}}
    written = {"content": piece, "reasoning": piece, "arguments": [call]}[channel]
    delta = {{"content": "content", "reasoning": "reasoning_content", "arguments": "tool_calls"}[channel]: written}
    frame = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "fake"}
    choices = [{"index": 0, "delta": delta, "finish_reason": None}]
    return b"data: " + json.dumps(frame | {"choices": choices}, ensure_ascii=False).encode() + b"\n\n"


def _said(delta: dict[str, Any], channel: Channel) -> str:
    """The text of this channel in a piece of a reply."""
    if channel == "content":
        return str(delta.get("content") or "")
    if channel == "reasoning":
        return str(delta.get("reasoning_content") or delta.get("reasoning") or "")
    return "".join(str(call["function"].get("arguments") or "") for call in delta.get("tool_calls") or ())
