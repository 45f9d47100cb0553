"""OpenAI's older completions (https://platform.openai.com/docs/api-reference/completions), as docs/api.md has them.

The engine is asked for a chat completion: the prompt is one message of the user's, judged as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import orjson
from pydantic import Field, field_validator

from app.errors import ApiError
from app.exchange import Exchange
from app.records import Key, Turn
from app.schemas import MAX_REPLIES, MAX_SEED, MAX_TOKENS, Body, ChatRequest, StreamOptions
from app.surfaces.chat import DONE, decision, usage
from app.surfaces.translated import read
from app.telling import REFUSAL, Said
from guardrails.reply import CONTENT

SPOKEN = (CONTENT, REFUSAL)
"""What a completion has a place for; reasoning and tool calls have none."""


class CompletionRequest(Body):
    """The body of POST /v1/completions."""

    model: str
    prompt: str
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int | None = Field(default=None, ge=1, le=MAX_REPLIES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)
    stop: str | list[str] | None = None
    seed: int | None = Field(default=None, ge=-MAX_SEED, lt=MAX_SEED)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(default=None, max_length=1024)
    user: str | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None

    @field_validator("prompt", mode="before", json_schema_input_type=str | list[str])
    @classmethod
    def _one(cls, value: object) -> object:
        """The one prompt of a list of one."""
        if not isinstance(value, list):
            return value
        if len(value) == 1 and isinstance(value[0], str):
            return value[0]
        raise ValueError("one prompt is served, as a string; send further ones as requests of their own")

    @field_validator("echo", "suffix", "best_of", mode="before")
    @classmethod
    def _idle(cls, value: object) -> object:
        if value not in (None, False, "", 1) or value is True:
            raise ValueError("it is not served")
        return value

    def chat(self) -> dict[str, Any]:
        """The body of the chat completion that it becomes."""
        same = self.model_dump(exclude={"prompt", "logprobs", "echo", "suffix", "best_of"}, exclude_none=True)
        tops = {} if self.logprobs is None else {"logprobs": True, "top_logprobs": self.logprobs}
        return same | tops | {"messages": [{"role": "user", "content": self.prompt}]}


class Completions:
    """POST /v1/completions."""

    name = "completions"

    def read(self, body: bytes, key: Key, headers: Mapping[bytes, bytes]) -> ChatRequest:
        """The request; raises ApiError 400."""
        names = {"messages": "prompt", "top_logprobs": "logprobs"}
        return read(CompletionRequest, CompletionRequest.chat, body, key, headers, names=names)

    def whole(self, exchange: Exchange, told: Sequence[Said]) -> bytes:
        """A text completion."""
        choices = [_choice(exchange, turn, told) for turn in exchange.turns]
        return orjson.dumps(
            _head(exchange) | {"choices": choices, "usage": usage(exchange), "guardrails": decision(exchange.turn)}
        )

    def frames(self, exchange: Exchange) -> CompletionFrames:
        """The writer of its chunks."""
        return CompletionFrames(exchange)

    def error(self, error: ApiError) -> bytes:
        """OpenAI's error body."""
        return orjson.dumps(error.body)


class CompletionFrames:
    """The chunks of a streamed completion; the last ones are the finish reason, the usage if asked for, `[DONE]`."""

    __slots__ = ("_at", "_exchange", "_head")

    def __init__(self, exchange: Exchange):
        self._exchange = exchange
        self._head = b"data: " + orjson.dumps(_head(exchange))[:-1] + b',"choices":'
        self._at: dict[int, int] = {}

    def begin(self) -> bytes:
        """The id of the decision: all of it where a rule has stopped the question."""
        turn = self._exchange.turn
        return self._chunk("", verdict=decision(turn) if turn.ended else {"id": turn.id})

    def piece(self, said: Said) -> bytes:
        """A piece of the text."""
        if said.channel not in SPOKEN or not (said.text or said.logprobs):
            return b""
        at = self._at.get(said.choice, 0)
        self._at[said.choice] = at + len(said.text)
        return self._chunk(said.text, said.choice, logprobs=_logprobs(said.logprobs, said.text, at))

    def end(self) -> bytes:
        """The finish reason of every reply with the decision, the token counts if asked for, and `[DONE]`."""
        exchange = self._exchange
        out = [self._chunk("", one.choice, one.finish_reason, verdict=decision(one)) for one in exchange.turns]
        options = exchange.asked.stream_options
        if options and options.include_usage:
            out.append(self._head + b'[],"usage":' + orjson.dumps(usage(exchange)) + b"}\n\n")
        return b"".join([*out, DONE])

    def failed(self, error: ApiError) -> bytes:
        """The error as an event, and `[DONE]`."""
        return b"data: " + orjson.dumps(error.body) + b"\n\n" + DONE

    def _chunk(
        self,
        text: str,
        choice: int = 0,
        finish: str | None = None,
        logprobs: Mapping[str, Any] | None = None,
        verdict: Mapping[str, Any] | None = None,
    ) -> bytes:
        told = {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": finish}
        more = b',"guardrails":' + orjson.dumps(verdict) if verdict else b""
        return self._head + orjson.dumps([told]) + more + b"}\n\n"


def _head(exchange: Exchange) -> dict[str, Any]:
    return {
        "id": exchange.id,
        "object": "text_completion",
        "created": exchange.created,
        "model": exchange.turn.model,
    }


def _choice(exchange: Exchange, turn: Turn, told: Sequence[Said]) -> dict[str, Any]:
    said = [one for one in told if one.choice == turn.choice and one.channel in SPOKEN]
    text, entries = "".join(one.text for one in said), [entry for one in said for entry in one.logprobs]
    logprobs = _logprobs(entries, text, 0) if exchange.asked.logprobs else None
    return {"index": turn.choice, "text": text, "logprobs": logprobs, "finish_reason": turn.finish_reason}


def _logprobs(entries: Sequence[bytes], text: str, start: int) -> dict[str, Any] | None:
    """Entries of a chat completion as the older API writes them; a token's offset is where it stands in the text."""
    if not entries:
        return None
    told = [orjson.loads(entry) for entry in entries]
    offsets, at = list[int](), 0
    for one in told:
        found = text.find(one["token"], at)
        offsets.append(start + (at if found < 0 else found))
        at = at if found < 0 else found + len(one["token"])
    return {
        "tokens": [one["token"] for one in told],
        "token_logprobs": [one["logprob"] for one in told],
        "top_logprobs": [{top["token"]: top["logprob"] for top in one.get("top_logprobs") or ()} for one in told],
        "text_offset": offsets,
    }
