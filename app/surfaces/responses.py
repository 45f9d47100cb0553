"""OpenAI's responses (https://platform.openai.com/docs/api-reference/responses), as docs/api.md describes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

import orjson
from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from app.errors import ApiError
from app.exchange import CONVERSATION, Exchange
from app.records import Key
from app.schemas import CALL, MAX_MESSAGES, MAX_TOKENS, MAX_TOOLS, TOOL, Body, ChatRequest
from app.surfaces.blocks import Block, Blocks, Step, blocks_of
from app.surfaces.chat import decision
from app.surfaces.translated import joined, read
from app.telling import REFUSAL, Said
from guardrails.reply import CONTENT, REASONING

TEXTS = ("input_text", "output_text", "text", "refusal")
LOGPROBS = "message.output_text.logprobs"
IDLE = ("max_tool_calls", "prompt_cache_retention", "truncation", "stream_options")
"""What is taken, because clients send it, and has no effect."""
SAME = (
    *("model", "stream", "temperature", "top_p", "user", "safety_identifier", "parallel_tool_calls"),
    *("store", "service_tier", "prompt_cache_key"),
)
"""What a chat completion has under the same name."""
TRUNCATED, FILTERED = "max_output_tokens", "content_filter"


class Item(Body):
    """One item of the input: a message, a call of a tool, what it came to. Reasoning is taken and not forwarded."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | None = None
    call_id: str | None = Field(default=None, pattern=CALL)
    name: str | None = Field(default=None, pattern=TOOL)
    arguments: str | None = None
    output: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _reasoning(cls, value: object) -> object:
        return {"type": "reasoning"} if isinstance(value, dict) and value.get("type") == "reasoning" else value

    @field_validator("content", "output", mode="before", json_schema_input_type=str | list[dict[str, Any]] | None)
    @classmethod
    def _joined(cls, value: object) -> object:
        """The text of a list of text parts."""
        return joined(value, TEXTS)

    @model_validator(mode="after")
    def _whole(self) -> Item:
        needed = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
        }
        for name in needed.get(self.type, ()):
            if getattr(self, name) is None:
                raise ValueError(f"a {self.type} needs '{name}'")
        return self

    @property
    def message(self) -> dict[str, Any] | None:
        """The item as a message of a chat completion; None for reasoning, and for a reply that says nothing: LangChain
        puts one between a call and its output."""
        if self.type == "message" and (self.content or self.role != "assistant"):
            return {"role": self.role, "content": self.content}
        if self.type == "function_call":
            call = {"id": self.call_id, "function": {"name": self.name, "arguments": self.arguments}}
            return {"role": "assistant", "content": None, "tool_calls": [call]}
        if self.type == "function_call_output":
            return {"role": "tool", "content": self.output, "tool_call_id": self.call_id}
        return None


class FunctionTool(Body):
    """A tool that a reply may call; other keys are not forwarded."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["function"]
    name: str = Field(pattern=TOOL)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(Body):
    """The one tool that a reply must call."""

    type: Literal["function"]
    name: str = Field(pattern=TOOL)


class Format(Body):
    """The shape that a reply must have."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _named(self) -> Format:
        if self.type == "json_schema" and (self.name is None or self.schema_ is None):
            raise ValueError("a 'json_schema' needs 'name' and 'schema'")
        return self

    @property
    def response_format(self) -> dict[str, Any]:
        """The same for a chat completion."""
        if self.type != "json_schema":
            return {"type": self.type}
        return {"type": self.type, "json_schema": self.model_dump(by_alias=True, exclude_none=True, exclude={"type"})}


class Text(Body):
    """How the reply is written."""

    format: Format | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Body):
    """How much the model reasons; a summary is not made."""

    model_config = ConfigDict(extra="ignore")
    effort: str | None = Field(default=None, pattern=r"^[a-z]{1,16}$")


class ConversationRef(Body):
    """A conversation by its id."""

    id: str


class ResponseRequest(Body):
    """The body of POST /v1/responses; what newel does not serve is refused by name (docs/api.md)."""

    model: str
    input: list[Item] = Field(min_length=1, max_length=MAX_MESSAGES)
    instructions: str | None = None
    tools: list[FunctionTool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["auto", "none", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    stream: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    previous_response_id: str | None = Field(default=None, pattern=CALL)
    conversation: str | ConversationRef | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    background: Literal[False] | None = None
    include: list[str] | None = Field(default=None, max_length=32)
    max_tool_calls: int | None = None
    prompt_cache_retention: str | None = None
    stream_options: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None

    @field_validator("input", mode="before", json_schema_input_type=str | list[Item])
    @classmethod
    def _one_message(cls, value: object) -> object:
        """A text as what the user says."""
        return [{"role": "user", "content": value}] if isinstance(value, str) else value

    @field_validator("input")
    @classmethod
    def _asks_something(cls, items: list[Item]) -> list[Item]:
        if not (items[-1].type == "function_call_output" or items[-1].role == "user"):
            raise ValueError("the last item must be the user's or the output of a tool, since it is what is answered")
        return items

    @field_validator("conversation")
    @classmethod
    def _sane(cls, value: str | ConversationRef | None, info: ValidationInfo) -> str | ConversationRef | None:
        named = value.id if isinstance(value, ConversationRef) else value
        if named is not None and info.data.get("previous_response_id"):
            raise ValueError("send either it or 'previous_response_id'")
        if named is not None and not CONVERSATION.fullmatch(named):
            raise ValueError("a conversation id is 1 to 128 printable ASCII characters, without spaces")
        return value

    @property
    def conversation_id(self) -> str:
        """The conversation that is continued, or empty."""
        named = self.conversation
        return named.id if isinstance(named, ConversationRef) else named or ""

    @property
    def wants_logprobs(self) -> bool:
        """True when the log-probabilities of what is said are asked for."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    def chat(self) -> dict[str, Any]:
        """The body of the chat completion that it becomes."""
        out = {name: getattr(self, name) for name in SAME}
        shape, named = self.text and self.text.format, self.conversation_id
        return out | {
            "messages": self._messages(),
            "max_completion_tokens": self.max_output_tokens,
            "metadata": (self.metadata or {}) | {"conversation_id": named} if named else self.metadata,
            "tools": [_tool(one) for one in self.tools] if self.tools else None,
            "tool_choice": _choice(self.tool_choice),
            "response_format": shape.response_format if shape else None,
            "verbosity": self.text.verbosity if self.text else None,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "logprobs": True if self.wants_logprobs else None,
            "top_logprobs": self.top_logprobs if self.wants_logprobs else None,
        }

    def _messages(self) -> list[dict[str, Any]]:
        told = _turns([message for item in self.input if (message := item.message)])
        return [{"role": "system", "content": self.instructions}, *told] if self.instructions else told


def _turns(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, each row of the assistant's with a call among them as one: what was said, then the calls.

    So a reply is on record; clients send its items back in the order in which their pieces came.
    """
    out: list[dict[str, Any]] = []
    for by_assistant, row in groupby(messages, lambda one: one["role"] == "assistant"):
        said = list(row)
        calls = [call for one in said for call in one.get("tool_calls", ())]
        if by_assistant and calls:
            text = "".join(one["content"] or "" for one in said)
            out.append({"role": "assistant", "content": text or None, "tool_calls": calls})
        else:
            out += said
    return out


def _tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _choice(choice: str | FunctionChoice | None) -> Any:
    return {"type": "function", "function": {"name": choice.name}} if isinstance(choice, FunctionChoice) else choice


class Responses:
    """POST /v1/responses."""

    name = "responses"
    _names: Mapping[str, str] = {
        "messages": "input",
        "max_completion_tokens": "max_output_tokens",
        "response_format": "text.format",
        "reasoning_effort": "reasoning.effort",
        "metadata.conversation_id": "conversation",
    }

    def read(self, body: bytes, key: Key, headers: Mapping[bytes, bytes]) -> ChatRequest:
        """The request; raises ApiError 400."""
        asked = read(ResponseRequest, ResponseRequest.chat, body, key, headers, names=self._names, idle=IDLE)
        asked.__dict__["after"] = asked.origin.previous_response_id or ""
        return asked

    def whole(self, exchange: Exchange, told: Sequence[Said]) -> bytes:
        """A response."""
        items = [item(exchange, block) for block in blocks_of(told, stopped(exchange))]
        return orjson.dumps(_ended(exchange, items, reasoning_tokens(told)))

    def frames(self, exchange: Exchange) -> ResponseFrames:
        """The writer of its events."""
        return ResponseFrames(exchange)

    def error(self, error: ApiError) -> bytes:
        """OpenAI's error body."""
        return orjson.dumps(error.body)


class ResponseFrames:
    """The events of a streamed response; the last one is `response.completed`, `.incomplete` or `.failed`."""

    __slots__ = ("_blocks", "_exchange", "_number", "_reasoned")

    def __init__(self, exchange: Exchange):
        self._exchange, self._blocks = exchange, Blocks()
        self._number = self._reasoned = 0

    def begin(self) -> bytes:
        """The response as it begins, with the id of the decision, or all of it where a rule stopped the question."""
        turn = self._exchange.turn
        verdict = decision(turn) if turn.ended else {"id": turn.id}
        told = response(self._exchange, "in_progress", [], guardrails=verdict)
        return self._event("response.created", response=told) + self._event("response.in_progress", response=told)

    def piece(self, said: Said) -> bytes:
        """The events of one piece of the reply."""
        self._reasoned = max(self._reasoned, reasoning_tokens([said]))
        return b"".join(map(self._step, self._blocks.feed(said)))

    def end(self) -> bytes:
        """What is left of the reply, and the whole response."""
        exchange = self._exchange
        last = b"".join(map(self._step, self._blocks.finish(stopped(exchange))))
        whole = _ended(exchange, [item(exchange, block) for block in self._blocks.all], self._reasoned)
        return last + self._event(f"response.{whole['status']}", response=whole)

    def failed(self, error: ApiError) -> bytes:
        """The error as an event, and the response as far as it came."""
        items = [item(self._exchange, block, "incomplete") for block in self._blocks.all]
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        failed = response(self._exchange, "failed", items, error={"code": code, "message": error.message})
        told = {"code": error.code, "message": error.message, "param": error.param}
        return self._event("error", **told) + self._event("response.failed", response=failed)

    def _event(self, kind: str, **more: Any) -> bytes:
        told = {"type": kind, "sequence_number": self._number} | more
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps(told))

    def _step(self, step: Step) -> bytes:
        what, block, text = step
        if what == "open":
            return b"".join(self._opened(block))
        if what == "close":
            return b"".join(self._closed(block))
        kind = _writing(block)
        more: dict[str, Any] = {"logprobs": []} if block.channel == CONTENT else {}
        if more and self._exchange.asked.logprobs:
            more = {"logprobs": [orjson.Fragment(one) for one in block.logprobs[self._told(block) :]]}
        return self._event(f"{kind}.delta", **self._place(block), delta=text, **more)

    def _told(self, block: Block) -> int:
        """How many log-probabilities of this block were told with earlier pieces."""
        told, block.told = block.told, len(block.logprobs)
        return told

    def _place(self, block: Block) -> dict[str, Any]:
        place = {"item_id": item_id(self._exchange, block), "output_index": block.index}
        return place if block.is_call else place | {"content_index": 0}

    def _opened(self, block: Block) -> Iterator[bytes]:
        empty = item(self._exchange, block, "in_progress", empty=True)
        yield self._event("response.output_item.added", output_index=block.index, item=empty)
        if not block.is_call:
            yield self._event("response.content_part.added", **self._place(block), part=part(block, ""))

    def _closed(self, block: Block) -> Iterator[bytes]:
        kind, place = _writing(block), self._place(block)
        done: dict[str, Any] = {_named(block): block.text}
        done |= {"logprobs": list(map(orjson.Fragment, block.logprobs))} if block.channel == CONTENT else {}
        done |= {"name": block.name} if block.is_call else {}
        yield self._event(f"{kind}.done", **place, **done)
        if not block.is_call:
            yield self._event("response.content_part.done", **place, part=part(block, block.text))
        whole = item(self._exchange, block)
        yield self._event("response.output_item.done", output_index=block.index, item=whole)


def stopped(exchange: Exchange) -> bool:
    """True where a rule has stopped the question or the reply."""
    return exchange.turn.action in ("refuse", "escalate")


def _ended(exchange: Exchange, items: Sequence[Mapping[str, Any]], reasoned: int) -> dict[str, Any]:
    """The response as it ended: complete, or cut off by the number of tokens or a rule."""
    why = {"length": TRUNCATED, "content_filter": FILTERED}.get(exchange.turn.finish_reason)
    status = "incomplete" if why else "completed"
    return response(exchange, status, items, why=why, usage=_usage(exchange, reasoned))


def response(
    exchange: Exchange,
    status: str,
    items: Sequence[Mapping[str, Any]],
    *,
    why: str | None = None,
    error: Mapping[str, Any] | None = None,
    usage: Mapping[str, Any] | None = None,
    guardrails: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The response object, with what was asked for as OpenAI repeats it."""
    asked: ResponseRequest = exchange.asked.origin  # type: ignore[attr-defined]
    text = asked.text.model_dump(by_alias=True, exclude_none=True) if asked.text else {}
    choice = asked.tool_choice
    return {
        "id": exchange.id,
        "object": "response",
        "created_at": exchange.created,
        "status": status,
        "background": False,
        "error": error,
        "incomplete_details": {"reason": why} if why else None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "model": exchange.turn.model,
        "output": items,
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": asked.previous_response_id,
        "conversation": {"id": exchange.turn.conversation} if asked.conversation_id else None,
        "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
        "store": True,
        "temperature": asked.temperature,
        "text": {"format": {"type": "text"}} | text,
        "tool_choice": choice.model_dump() if isinstance(choice, FunctionChoice) else choice or "auto",
        "tools": [{"strict": None} | one.model_dump(exclude_unset=True) for one in asked.tools or ()],
        "top_p": asked.top_p,
        "truncation": "disabled",
        "usage": usage,
        "user": asked.user,
        "metadata": asked.metadata or {},
        "guardrails": guardrails or decision(exchange.turn),
    }


def item(exchange: Exchange, block: Block, status: str = "completed", empty: bool = False) -> dict[str, Any]:
    """A block of the reply as an item of the output; `empty`, as it begins."""
    status = "incomplete" if status == "completed" and not block.is_complete else status
    told: dict[str, Any] = {"id": item_id(exchange, block), "status": status}
    text = "" if empty else block.text
    if block.is_call:
        return told | {"type": "function_call", "call_id": block.id, "name": block.name, "arguments": text}
    content = [] if empty else [part(block, text)]
    if block.channel == REASONING:
        return told | {"type": "reasoning", "summary": [], "content": content}
    return told | {"type": "message", "role": "assistant", "content": content}


def item_id(exchange: Exchange, block: Block) -> str:
    """The id of an item, unique within all responses."""
    kind = "fc" if block.is_call else "rs" if block.channel == REASONING else "msg"
    return f"{kind}_{exchange.id.partition('_')[2] or exchange.id}_{block.index}"


def part(block: Block, text: str) -> dict[str, Any]:
    """The content of a block as a content part."""
    if block.channel == REFUSAL:
        return {"type": "refusal", "refusal": text}
    if block.channel == REASONING:
        return {"type": "reasoning_text", "text": text}
    logprobs = [orjson.Fragment(entry) for entry in block.logprobs] if text else []
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _writing(block: Block) -> str:
    """The kind of the events that write this block."""
    if block.is_call:
        return "response.function_call_arguments"
    return {REFUSAL: "response.refusal", REASONING: "response.reasoning_text"}.get(
        block.channel, "response.output_text"
    )


def _named(block: Block) -> str:
    """What the text of a block is called where it is done."""
    return "arguments" if block.is_call else "refusal" if block.channel == REFUSAL else "text"


def _usage(exchange: Exchange, reasoned: int) -> dict[str, Any]:
    prompt, completion, cached = exchange.usage
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": reasoned},
        "total_tokens": prompt + completion,
    }


def reasoning_tokens(told: Sequence[Said]) -> int:
    """How many tokens of the reply were reasoning, where the engine says so; else 0."""
    for said in told:
        raw = said.more.usage.get("completion_tokens_details") if said.more else None
        details = orjson.loads(raw) if raw else None
        if isinstance(details, dict) and isinstance(count := details.get("reasoning_tokens"), int):
            return count
    return 0
