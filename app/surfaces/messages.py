"""Anthropic's messages (https://platform.claude.com/docs/en/api/messages), as docs/api.md describes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import orjson
from pydantic import ConfigDict, Field, field_validator, model_validator

from app.errors import ApiError
from app.exchange import Exchange
from app.frames import More
from app.records import Key
from app.schemas import CALL, MAX_MESSAGES, MAX_TOKENS, MAX_TOOLS, TOOL, Body, ChatRequest
from app.surfaces.blocks import Block, Blocks, Step, blocks_of
from app.surfaces.chat import decision
from app.surfaces.translated import joined, read
from app.telling import REFUSAL, Said
from guardrails.reply import REASONING

IDLE = ("service_tier", "cache_control", "inference_geo", "speed")
"""What is taken, because clients send it, and has no effect."""
EFFORTS = {"xhigh": "high", "max": "high"}
"""Efforts that engines do not know, and the nearest that they do."""
ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
"""Anthropic's types of errors by status; other statuses below 500 are like 400, those above are `api_error`."""


class Part(Body):
    """A block of a message. Thinking is taken and not forwarded."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["text", "tool_use", "tool_result", "thinking", "redacted_thinking"]
    text: str | None = None
    id: str | None = Field(default=None, pattern=CALL)
    name: str | None = Field(default=None, pattern=TOOL)
    input: dict[str, Any] | None = None
    tool_use_id: str | None = Field(default=None, pattern=CALL)
    content: str | None = None
    is_error: bool | None = None

    @field_validator("content", mode="before", json_schema_input_type=str | list[dict[str, Any]] | None)
    @classmethod
    def _joined(cls, value: object) -> object:
        """The text of the blocks of a result."""
        return joined(value, ("text",), "\n\n")

    @model_validator(mode="after")
    def _whole(self) -> Part:
        needed = {"text": ("text",), "tool_use": ("id", "name", "input"), "tool_result": ("tool_use_id",)}
        for name in needed.get(self.type, ()):
            if getattr(self, name) is None:
                raise ValueError(f"a block of type '{self.type}' needs '{name}'")
        return self


class MessageParam(Body):
    """One message: text, or blocks of it."""

    role: Literal["user", "assistant"]
    content: list[Part]

    @field_validator("content", mode="before", json_schema_input_type=str | list[Part])
    @classmethod
    def _in_parts(cls, value: object) -> object:
        """A text as the one block that it is."""
        return [{"type": "text", "text": value}] if isinstance(value, str) else value

    @property
    def messages(self) -> Iterator[dict[str, Any]]:
        """The same as messages of a chat completion."""
        if self.role == "assistant":
            yield from self._said(self.content)
        else:
            yield from self._asked(self.content)

    def _said(self, parts: Sequence[Part]) -> Iterator[dict[str, Any]]:
        """What the model said, then what it called: so the turn is on record, whatever the order of the blocks was."""
        text = "".join(part.text or "" for part in parts if part.type == "text")
        calls = [
            {"id": part.id, "function": {"name": part.name, "arguments": orjson.dumps(part.input).decode()}}
            for part in parts
            if part.type == "tool_use"
        ]
        if text or calls:
            yield {"role": "assistant", "content": text or None} | ({"tool_calls": calls} if calls else {})

    def _asked(self, parts: Sequence[Part]) -> Iterator[dict[str, Any]]:
        texts = list[str]()
        for part in parts:
            if part.type == "tool_result":
                yield from _user(texts)
                texts = []
                yield {"role": "tool", "content": part.content or "", "tool_call_id": part.tool_use_id}
            elif part.text is not None:
                texts.append(part.text)
        yield from _user(texts)


def _user(texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    if texts:
        yield {"role": "user", "content": "\n\n".join(texts)}


class ToolParam(Body):
    """A tool that a reply may call; other keys are not forwarded."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["custom"] | None = None
    name: str = Field(pattern=TOOL)
    description: str | None = None
    input_schema: dict[str, Any]

    @property
    def function(self) -> dict[str, Any]:
        """The same for a chat completion."""
        described = {"description": self.description} if self.description is not None else {}
        return {"type": "function", "function": {"name": self.name, "parameters": self.input_schema} | described}


class ToolChoice(Body):
    """Whether a reply may, or must, call a tool, and which one."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(default=None, pattern=TOOL)
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _named(self) -> ToolChoice:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("'name' goes with the type 'tool', and only with it")
        return self

    @property
    def choice(self) -> Any:
        """The same for a chat completion."""
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class Metadata(Body):
    """Who the request is for."""

    user_id: str | None = None


class Thinking(Body):
    """Whether the model's reasoning is told."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["enabled", "disabled", "adaptive"]


class JsonFormat(Body):
    """The shape that a reply must have."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """How the reply is written."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class MessageRequest(Body):
    """The body of POST /v1/messages; what newel does not serve is refused by name (docs/api.md)."""

    model: str
    max_tokens: int = Field(ge=1, le=MAX_TOKENS)
    messages: list[MessageParam] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: str | None = None
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=MAX_TOKENS)
    stop_sequences: list[str] | None = Field(default=None, max_length=4)
    tools: list[ToolParam] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    metadata: Metadata | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    service_tier: str | None = None
    cache_control: dict[str, Any] | None = None
    inference_geo: str | None = None
    speed: str | None = None

    @field_validator("system", mode="before", json_schema_input_type=str | list[dict[str, Any]] | None)
    @classmethod
    def _joined(cls, value: object) -> object:
        """The text of a list of text blocks."""
        return joined(value, ("text",), "\n\n")

    @field_validator("messages")
    @classmethod
    def _asks_something(cls, messages: list[MessageParam]) -> list[MessageParam]:
        if messages[-1].role != "user" or not messages[-1].content:
            raise ValueError("the last message must be the user's and say something, since it is what is answered")
        return messages

    @property
    def thinks(self) -> bool:
        """True when the model's reasoning is to be told."""
        return self.thinking is not None and self.thinking.type != "disabled"

    def chat(self) -> dict[str, Any]:
        """The body of the chat completion that it becomes."""
        told = [message for one in self.messages for message in one.messages]
        choice, wish = self.tool_choice, self.output_config or OutputConfig()
        out = {name: getattr(self, name) for name in ("model", "max_tokens", "stream", "temperature", "top_p", "top_k")}
        return out | {
            "messages": [{"role": "system", "content": self.system}, *told] if self.system else told,
            "stop": self.stop_sequences or None,
            "tools": [one.function for one in self.tools] if self.tools else None,
            "tool_choice": choice.choice if choice else None,
            "parallel_tool_calls": False if choice and choice.disable_parallel_tool_use else None,
            "user": self.metadata.user_id if self.metadata else None,
            "reasoning_effort": EFFORTS.get(wish.effort, wish.effort) if wish.effort else None,
            "response_format": _format(wish.format.schema_) if wish.format else None,
        }


def _format(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema, "strict": True}}


class Messages:
    """POST /v1/messages."""

    name = "messages"
    _names: Mapping[str, str] = {
        "stop": "stop_sequences",
        "user": "metadata.user_id",
        "response_format": "output_config.format",
        "reasoning_effort": "output_config.effort",
    }

    def read(self, body: bytes, key: Key, headers: Mapping[bytes, bytes]) -> ChatRequest:
        """The request; raises ApiError 400."""
        return read(MessageRequest, MessageRequest.chat, body, key, headers, names=self._names, idle=IDLE)

    def whole(self, exchange: Exchange, told: Sequence[Said]) -> bytes:
        """A message."""
        blocks = blocks_of([one for one in told if _shown(exchange, one)], stopped(exchange))
        ended = _ended(exchange, next((one.more for one in told if one.more), None), blocks)
        content = [_content(block, block.text) for block in blocks]
        return orjson.dumps(_message(exchange) | {"content": content} | ended | {"usage": _usage(exchange)})

    def frames(self, exchange: Exchange) -> MessageFrames:
        """The writer of its events."""
        return MessageFrames(exchange)

    def error(self, error: ApiError) -> bytes:
        """Anthropic's error body."""
        return orjson.dumps(error_body(error))


class MessageFrames:
    """The events of a streamed message; the last one is `message_stop`, or `error`."""

    __slots__ = ("_blocks", "_exchange", "_more")

    def __init__(self, exchange: Exchange):
        self._exchange, self._blocks = exchange, Blocks()
        self._more: More | None = None

    def begin(self) -> bytes:
        """The message as it begins, with the id of the decision, or all of it where a rule has stopped the question."""
        turn = self._exchange.turn
        verdict = {} if turn.ended else {"guardrails": {"id": turn.id}}
        return _event("message_start", message=_message(self._exchange) | {"usage": _usage(self._exchange)} | verdict)

    def piece(self, said: Said) -> bytes:
        """The events of one piece of the reply."""
        if said.more:
            self._more = said.more.joined(self._more)
        return b"".join(map(_step, self._blocks.feed(said))) if _shown(self._exchange, said) else b""

    def end(self) -> bytes:
        """What is left of the reply, why it ended, and the decision."""
        exchange = self._exchange
        last = b"".join(map(_step, self._blocks.finish(stopped(exchange))))
        delta, usage = _ended(exchange, self._more, self._blocks.all), _usage(exchange)
        told = _event("message_delta", delta=delta, usage=usage, guardrails=decision(exchange.turn))
        return last + told + _event("message_stop")

    def failed(self, error: ApiError) -> bytes:
        """The error as an event, which ends the stream."""
        return _event("error", **{name: value for name, value in error_body(error).items() if name != "type"})


def _event(kind: str, **more: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind} | more))


def _step(step: Step) -> bytes:
    what, block, text = step
    if what == "open":
        return _event("content_block_start", index=block.index, content_block=_content(block, ""))
    if what == "close":
        return _event("content_block_stop", index=block.index)
    if block.is_call:
        delta = {"type": "input_json_delta", "partial_json": text}
    elif block.channel == REASONING:
        delta = {"type": "thinking_delta", "thinking": text}
    else:
        delta = {"type": "text_delta", "text": text}
    return _event("content_block_delta", index=block.index, delta=delta)


def _content(block: Block, text: str) -> dict[str, Any]:
    """A block of the reply as a content block."""
    if block.is_call:
        return {"type": "tool_use", "id": block.id, "name": block.name, "input": _input(text) if text else {}}
    if block.channel == REASONING:
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "text", "text": text}


def _input(arguments: str) -> dict[str, Any]:
    """The arguments of a call; what is no JSON object, because it was cut off, as one that holds it."""
    try:
        told = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        told = None
    return told if isinstance(told, dict) else {"arguments": arguments}


def _message(exchange: Exchange) -> dict[str, Any]:
    return {
        "id": exchange.id,
        "type": "message",
        "role": "assistant",
        "model": exchange.turn.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "guardrails": decision(exchange.turn),
    }


def _ended(exchange: Exchange, more: More | None, blocks: Sequence[Block]) -> dict[str, Any]:
    """Why the reply ended."""
    refused = exchange.turn.finish_reason == "content_filter" or any(one.channel == REFUSAL for one in blocks)
    if refused:
        details = {"type": "refusal", "category": None, "explanation": None}
        return {"stop_reason": "refusal", "stop_sequence": None, "stop_details": details}
    if stop := _stop(exchange.asked, more):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    reasons = {"length": "max_tokens", "tool_calls": "tool_use"}
    return {"stop_reason": reasons.get(exchange.turn.finish_reason, "end_turn"), "stop_sequence": None}


def _stop(asked: ChatRequest, more: More | None) -> str:
    """The stop sequence that ended the reply, where the engine tells (vLLM does so), or empty."""
    raw = more.choice.get("stop_reason") if more else None
    told = orjson.loads(raw) if raw else None
    return told if isinstance(told, str) and told in (asked.stop or ()) else ""


def _usage(exchange: Exchange) -> dict[str, Any]:
    prompt, completion, cached = exchange.usage
    return {
        "input_tokens": prompt - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": completion,
    }


def _shown(exchange: Exchange, said: Said) -> bool:
    """Reasoning is told to those who ask for it."""
    return said.channel != REASONING or bool(exchange.asked.origin.thinks)  # type: ignore[attr-defined]


def stopped(exchange: Exchange) -> bool:
    """True where a rule has stopped the question or the reply."""
    return exchange.turn.action in ("refuse", "escalate")


def error_body(error: ApiError) -> dict[str, Any]:
    """An error as Anthropic writes it; our code stands beside."""
    kind = ERRORS.get(error.status) or ("invalid_request_error" if error.status < 500 else "api_error")
    told = {"type": kind, "message": error.message} | {"code": error.code}
    return {"type": "error", "error": told | ({"param": error.param} if error.param else {})}
