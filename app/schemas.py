"""What comes in over HTTP: strict models, and their mistakes as OpenAI error bodies."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from app.errors import ApiError
from guardrails.arguments import plain
from guardrails.types import Message, Role, ToolMessage

Model = TypeVar("Model", bound=BaseModel)
MAX_MESSAGES = 1000
MAX_TOKENS = 1_000_000
MAX_SEED = 2**63
"""Seeds are 64-bit integers with a sign, as in vLLM."""
MAX_TOOLS = 128
MAX_REPLIES = 16
"""Replies to one request (`n`)."""
BlockMode = Literal["message", "stop", "refusal", "error"]
SAMPLING = (
    "temperature",
    "top_p",
    "stop",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "reasoning_effort",
    "verbosity",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "top_k",
    "min_p",
    "repetition_penalty",
)
"""What goes to the engine as it came."""
IGNORED = frozenset(("store", "service_tier", "prompt_cache_key", "modalities"))
"""What is taken, because clients send it, and has no effect."""
TOOL = r"^[A-Za-z0-9_.:/-]{1,128}$"
"""Names of tools: nothing that a sentence could be written in, since they are not judged."""
CALL = r"^[!-~]{1,128}$"
DEFINING: tuple[Role, Role] = ("system", "developer")
"""The roles in which the guards read the definition of a tool, and the shape that a reply must have."""


class Body(BaseModel):
    """A JSON body: no unknown keys, and no conversions between types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Called(Body):
    """The function of a tool call, with its arguments in JSON."""

    name: str = Field(pattern=TOOL)
    arguments: str


class ToolCall(Body):
    """A tool call that an earlier reply made."""

    model_config = ConfigDict(extra="ignore")
    id: str = Field(pattern=CALL)
    type: Literal["function"] = "function"
    function: Called


class ChatMessage(Body):
    """One message; other keys that SDKs send back (`refusal`, `annotations`, ...) are not read and not forwarded."""

    model_config = ConfigDict(extra="ignore")
    role: Role
    content: str | None = None
    tool_calls: list[ToolCall] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_call_id: str | None = Field(default=None, pattern=CALL)

    @field_validator("content", mode="before", json_schema_input_type=str | list[dict[str, Any]] | None)
    @classmethod
    def _joined(cls, value: object) -> object:
        """The text of a list of text parts."""
        if not isinstance(value, list):
            return value
        texts = [part.get("text") for part in value if isinstance(part, dict) and part.get("type") == "text"]
        strings = [text for text in texts if isinstance(text, str)]
        if len(strings) < len(value):
            raise ValueError("only text parts are served, such as {'type': 'text', 'text': 'Hello'}")
        return "".join(strings)

    @model_validator(mode="after")
    def _has_content(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role '{self.role}' needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"a message of role '{self.role}' makes no tool calls")
        return self

    @property
    def messages(self) -> list[Message]:
        """The message as the guards read it: each tool call is one by itself, whose content are its arguments."""
        if self.role == "tool" and self.tool_call_id:
            return [ToolMessage("tool", self.content or "", self.tool_call_id, "")]
        calls: list[Message] = [
            ToolMessage("assistant", plain(one.function.arguments), one.id, one.function.name)
            for one in self.tool_calls or ()
        ]
        return [Message(self.role, self.content or ""), *calls] if self.content or not calls else calls


class Function(Body):
    """What a model is told of a tool; other keys are not forwarded."""

    model_config = ConfigDict(extra="ignore")
    name: str = Field(pattern=TOOL)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that a reply may call."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["function"]
    function: Function


class Named(Body):
    """The name of a tool."""

    name: str = Field(pattern=TOOL)


class Choose(Body):
    """The one tool that a reply must call."""

    type: Literal["function"]
    function: Named


class StreamOptions(Body):
    """`include_usage` asks for a last chunk with token counts."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool | None = None


class ChatRequest(Body):
    """The body of POST /v1/chat/completions; what newel does not serve is refused by name (docs/api.md)."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    stop: str | list[str] | None = None
    seed: int | None = Field(default=None, ge=-MAX_SEED, lt=MAX_SEED)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    n: int | None = Field(default=None, ge=1, le=MAX_REPLIES)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    logit_bias: dict[str, float] | None = Field(default=None, max_length=1024)
    top_k: int | None = Field(default=None, ge=-1, le=MAX_TOKENS)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["auto", "none", "required"] | Choose | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = Field(default=None, pattern=r"^[a-z]{1,16}$")
    verbosity: Literal["low", "medium", "high"] | None = None
    modalities: list[Literal["text"]] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    block_mode: ClassVar[BlockMode] = "message"
    """How a refusal is told: as a filtered message, a plain one, a `refusal`, or an error 400."""
    allowed: ClassVar[Mapping[str, Any]] = {}
    """Further fields, which go to the engine as they are."""
    after: ClassVar[str] = ""
    """The id of the turn that this one goes on from, where the client names one: then the messages are what is new."""

    @field_validator("top_logprobs")
    @classmethod
    def _with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("it needs 'logprobs': true")
        return value

    @field_validator("response_format")
    @classmethod
    def _known_format(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value and value.get("type") not in ("text", "json_object", "json_schema"):
            raise ValueError("its type must be 'text', 'json_object' or 'json_schema'")
        if value and value["type"] == "json_schema" and not isinstance(value.get("json_schema"), dict):
            raise ValueError("'json_schema' must be an object with a name and a schema")
        return value

    @field_validator("tools")
    @classmethod
    def _once(cls, value: list[Tool] | None) -> list[Tool] | None:
        names = [tool.function.name for tool in value or ()]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"the tool '{twice}' is defined twice")
        return value

    @field_validator("tool_choice")
    @classmethod
    def _among(cls, value: str | Choose | None, info: ValidationInfo) -> str | Choose | None:
        names = [tool.function.name for tool in info.data.get("tools") or ()]
        if value not in (None, "auto", "none") and not names:
            raise ValueError("it asks for a tool, but 'tools' has none")
        if isinstance(value, Choose) and value.function.name not in names:
            raise ValueError("it names a tool that is not in 'tools'")
        return value

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > 4:
            raise ValueError("at most 4 stop sequences are allowed")
        return value

    @field_validator("messages")
    @classmethod
    def _asks_something(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        if messages[-1].role not in ("user", "tool"):
            raise ValueError("the last message must be from the user or a tool, since it is what is answered")
        return messages

    @property
    def replies(self) -> int:
        """How many replies are asked for."""
        return self.n or 1

    @property
    def beginning(self) -> str:
        """What the conversation began with, which tells it from others."""
        for one in self.messages:
            if one.role == "user" and one.content:
                return one.content
        return ""

    @property
    def limit(self) -> int | None:
        """How many tokens a reply may have, if the request says so."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def forced(self) -> bool:
        """True when the reply has to call a tool."""
        return self.tool_choice is not None and self.tool_choice not in ("auto", "none")

    @property
    def structured(self) -> bool:
        """True when the reply has to be JSON."""
        return bool(self.response_format) and self.response_format != {"type": "text"}

    @property
    def offered(self) -> frozenset[str]:
        """The names of the tools that the reply may call."""
        if not self.tools or self.tool_choice == "none":
            return frozenset()
        return frozenset([tool.function.name for tool in self.tools])

    def ignored(self, without: Collection[str] = ()) -> list[str]:
        """Parameters that were sent and have no effect with an engine that is not sent those in `without`."""
        if not (self.model_fields_set & IGNORED or without):
            return []
        names = {*IGNORED, *without}
        return [name for name in type(self).model_fields if name in names and getattr(self, name) is not None]

    def check(self, without: Collection[str]) -> None:
        """Raises ApiError 400 where it would be wrong to ignore what the engine cannot do."""
        if self.forced and "tools" in without:
            message = "The engine that is served calls no tools: 'tool_choice' must be 'auto' or 'none'."
            raise ApiError(400, message, code="invalid_value", param="tool_choice")
        if self.structured and "response_format" in without:
            message = "The engine that is served keeps to no format: 'response_format' must be {'type': 'text'}."
            raise ApiError(400, message, code="invalid_value", param="response_format")

    def conversation(self, without: Collection[str] = ()) -> tuple[Message, ...]:
        """All that the engine is to read, as the guards read it: definitions of tools, a format, then the messages."""
        out: list[Message] = []
        if "tools" not in without:
            told = ((tool.function.model_dump(exclude_none=True), tool.function.name) for tool in self.tools or ())
            out += [ToolMessage(DEFINING[0], _json(function), "", name) for function, name in told]
        if self.structured and self.response_format:
            out.append(ToolMessage(DEFINING[1], _json(self.response_format), "", "response_format"))
        for one in self.messages:
            out += one.messages
        return tuple(out)

    def sampling(self, definitions: Sequence[ToolMessage] = ()) -> dict[str, Any]:
        """The parameters that go to the engine; `definitions`: those of `conversation`, as the policy lets them be."""
        given = self.model_fields_set
        out = {name: value for name in SAMPLING if name in given and (value := getattr(self, name)) is not None}
        tools = [{"type": "function", "function": _read(one)} for one in definitions if one.role == DEFINING[0]]
        if tools and self.parallel_tool_calls is not None:
            out["parallel_tool_calls"] = self.parallel_tool_calls
        if self.limit:
            out["max_tokens"] = self.limit
        if tools:
            choice = self.tool_choice
            chosen = {"tool_choice": choice.model_dump() if isinstance(choice, Choose) else choice} if choice else {}
            out |= {"tools": tools} | chosen
        formats = [_read(one) for one in definitions if one.role == DEFINING[1]]
        if formats:
            out["response_format"] = formats[0]
        return {**out, **self.allowed} if self.allowed else out


def _json(value: object) -> str:
    return orjson.dumps(value).decode()


def _read(definition: ToolMessage) -> Any:
    """The definition as JSON again; raises ApiError 400 where a redaction has left none behind."""
    try:
        return orjson.loads(definition.content)
    except orjson.JSONDecodeError:
        place = "tools" if definition.role == DEFINING[0] else "response_format"
        message = f"'{place}' holds what this policy redacts, in a place where it cannot be: '{definition.name}'."
        raise ApiError(400, message, code="invalid_value", param=place) from None


class Choice(Body):
    """Which of two replies is better: the `target`, the `other`, or neither."""

    other: str
    better: Literal["this", "other", "tie"]


class FeedbackRequest(Body):
    """The body of POST /v1/feedback: what a person thought of the reply `target` (its completion id)."""

    target: str
    rating: float | Literal["up", "down"] | None = None
    comment: str | None = Field(default=None, min_length=1, max_length=20_000)
    correction: str | None = Field(default=None, min_length=1, max_length=50_000)
    choice: Choice | None = None
    should_have: Literal["helped", "refused"] | None = None
    source: str = Field(default="user", max_length=64, pattern=r"^[\w.:-]+$")

    @field_validator("rating", mode="before")
    @classmethod
    def _in_range(cls, value: object) -> object:
        number = isinstance(value, int | float) and not isinstance(value, bool) and -1 <= value <= 1
        if not (number or value in ("up", "down", None)):
            raise ValueError("a rating is 'up', 'down' or a number from -1 to 1")
        return value

    @model_validator(mode="after")
    def _says_something(self) -> FeedbackRequest:
        if all(value is None for value in (self.rating, self.comment, self.correction, self.choice, self.should_have)):
            raise ValueError("say at least one of rating, comment, correction, choice, should_have")
        return self


class TicketAnswer(Body):
    """The body of POST /admin/tickets/{id}/answer."""

    answer: str = Field(max_length=50_000, pattern=r"\S")
    by: str = Field(max_length=200, pattern=r"\S")


class PolicyUpload(Body):
    """The body of POST /admin/policies: the TOML text of one policy."""

    source: str = Field(min_length=1)
    activate: bool = True
    by: str = Field(max_length=200, pattern=r"\S")


class PolicyChoice(Body):
    """The body of POST /admin/policies/{name}/activate and .../rollback: a version, or its start."""

    version: str = Field(default="", max_length=64)
    by: str = Field(max_length=200, pattern=r"\S")


def chat_request(data: dict[str, Any], allow: Collection[str] = (), mode: BlockMode = "message") -> ChatRequest:
    """The body of a chat completion; `allow` names further fields, which go to the engine as they are.

    Raises ApiError 400.
    """
    allowed = {name: data.pop(name) for name in allow if name in data and name not in ChatRequest.model_fields}
    request = validated(ChatRequest, data)
    # no fields, which a body could set; and no private attributes of pydantic, which cost more than all the rest
    request.__dict__.update(block_mode=mode, allowed=allowed)
    return request


def parse(model: type[Model], body: bytes) -> Model:
    """The body as a model; raises ApiError 400 that names the first mistake, its place and what to do."""
    return validated(model, json_object(body))


def json_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object; raises ApiError 400."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    return data


def validated(model: type[Model], data: Mapping[str, Any]) -> Model:
    """The data as a model; raises ApiError 400 that names the first mistake, its place and what to do."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _bad_request(model, error.errors(include_url=False)[0]) from None


def _bad_request(model: type[BaseModel], error: ErrorDetails) -> ApiError:
    place = _place(error["loc"])
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(place, model.model_fields, 1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        return ApiError(400, f"Unrecognized request argument: '{place}'.{hint}", code="unknown_parameter", param=place)
    if error["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{place}'.", code="missing_required_parameter", param=place)
    reason = error["msg"].removeprefix("Value error, ")
    where = f" for '{place}'" if place else ""
    return ApiError(400, f"Invalid value{where}: {reason}.", code="invalid_value", param=place or None)


def _place(loc: tuple[int | str, ...]) -> str:
    """('messages', 0, 'role') as `messages[0].role`; the names of union branches are left out."""
    out = ""
    for part in loc:
        if isinstance(part, int):
            out += f"[{part}]"
        elif not out:
            out = part
        elif part.isidentifier() and part not in ("str", "float"):
            out += f".{part}"
    return out
