"""What comes in over HTTP: strict models, and their mistakes as OpenAI error bodies."""

from __future__ import annotations

import difflib
from typing import Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from app.errors import ApiError
from guardrails.types import Message, Role

Model = TypeVar("Model", bound=BaseModel)
MAX_MESSAGES = 1000
MAX_TOKENS = 1_000_000
MAX_SEED = 2**63
"""Seeds are 64-bit integers with a sign, as in vLLM."""


class Body(BaseModel):
    """A JSON body: no unknown keys, and no conversions between types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ChatMessage(Body):
    """One message; other keys that SDKs send back (`refusal`, `annotations`, ...) are not read and not forwarded."""

    model_config = ConfigDict(extra="ignore")
    role: Role
    content: str | None = None

    @field_validator("content", mode="before")
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
        return self

    @property
    def message(self) -> Message:
        """The message as the guards and the engine read it."""
        return Message(self.role, self.content or "")


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
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("response_format")
    @classmethod
    def _text_only(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value and value.get("type") != "text":
            raise ValueError("only {'type': 'text'} is served")
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
        if messages[-1].role != "user":
            raise ValueError("the last message must be from the user, since it is what is answered")
        return messages

    @property
    def ignored(self) -> list[str]:
        """Parameters that were sent and have no effect."""
        names = ("tools", "tool_choice", "parallel_tool_calls", "store", "service_tier", "prompt_cache_key")
        return [name for name in names if getattr(self, name) is not None]

    def sampling(self) -> dict[str, Any]:
        """The parameters that go to the engine."""
        names = ("temperature", "top_p", "stop", "seed", "presence_penalty", "frequency_penalty")
        out = {name: value for name in names if (value := getattr(self, name)) is not None}
        limit = self.max_completion_tokens or self.max_tokens
        return out | ({"max_tokens": limit} if limit else {})


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


def parse(model: type[Model], body: bytes) -> Model:
    """The body as a model; raises ApiError 400 that names the first mistake, its place and what to do."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
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
