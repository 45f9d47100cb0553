"""OpenAI's chat completions (https://platform.openai.com/docs/api-reference/chat), as docs/api.md describes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from app.errors import ApiError
from app.exchange import Exchange
from app.frames import More
from app.records import Key, Ticket, Turn
from app.schemas import BlockMode, ChatRequest, chat_request, json_object
from app.telling import Said
from guardrails.reply import ARGUMENTS, CONTENT, REASONING

BLOCK_MODES: tuple[BlockMode, ...] = ("message", "stop", "refusal", "error")
DONE = b"data: [DONE]\n\n"


class Chat:
    """POST /v1/chat/completions."""

    name = "chat"

    def read(self, body: bytes, key: Key, headers: Mapping[bytes, bytes]) -> ChatRequest:
        """The request; raises ApiError 400."""
        return chat_request(json_object(body), key.limits.allow, block_mode(key, headers))

    def whole(self, exchange: Exchange, told: Sequence[Said]) -> bytes:
        """A chat completion."""
        more = _joined(told)
        choices = [
            _choice(exchange, turn, [one for one in told if one.choice == turn.choice], more) for turn in exchange.turns
        ]
        body = {
            "id": exchange.id,
            "object": "chat.completion",
            "created": exchange.created,
            "model": exchange.turn.model,
            "choices": choices,
            "usage": usage(exchange, more),
            "guardrails": decision(exchange.turn),
        }
        return orjson.dumps(body | _fields(more.top if more else None))

    def frames(self, exchange: Exchange) -> ChatFrames:
        """The writer of its chunks."""
        return ChatFrames(exchange)

    def error(self, error: ApiError) -> bytes:
        """OpenAI's error body."""
        return orjson.dumps(error.body)


class ChatFrames:
    """The chunks of a streamed chat completion; the last ones: finish reason, usage if asked for, `[DONE]`."""

    __slots__ = ("_begun", "_exchange", "_head", "_tail")

    def __init__(self, exchange: Exchange):
        self._exchange = exchange
        head = {
            "id": exchange.id,
            "object": "chat.completion.chunk",
            "created": exchange.created,
            "model": exchange.turn.model,
        }
        self._head = b"data: " + orjson.dumps(head)[:-1] + b',"choices":'
        self._begun: set[int] = set()

    def begin(self) -> bytes:
        """The role, and the id of the decision: all of it where a rule has stopped the question."""
        turn = self._exchange.turn
        return self._role(0, decision(turn) if turn.ended else {"id": turn.id})

    def _role(self, choice: int, verdict: Mapping[str, Any] | None = None) -> bytes:
        self._begun.add(choice)
        more = b',"guardrails":' + orjson.dumps(verdict) if verdict else b""
        return self._chunk({"role": "assistant", "content": ""}, choice, more=more)

    def piece(self, said: Said) -> bytes:
        """A piece of the reply; one that says nothing writes nothing."""
        if not said.tells:
            return b""
        role = b"" if said.choice in self._begun else self._role(said.choice)
        if said.channel == CONTENT and not (said.choice or said.logprobs or said.more):
            return role + b"".join(
                (
                    self._head,
                    b'[{"index":0,"delta":{"content":',
                    orjson.dumps(said.text),
                    b'},"logprobs":null,"finish_reason":null}]}\n\n',
                )
            )
        more = b"".join(b',"%b":%b' % (_name(name), raw) for name, raw in said.more.top.items()) if said.more else b""
        return role + self._chunk(_delta(said), said.choice, logprobs=_logprobs(said.logprobs), said=said, more=more)

    def _chunk(
        self,
        delta: Mapping[str, Any],
        choice: int = 0,
        finish: str | None = None,
        logprobs: Any = None,
        said: Said | None = None,
        more: bytes = b"",
    ) -> bytes:
        extra = said.more if said else None
        told = {"index": choice, "delta": {**delta, **_fields(extra.message if extra else None)}, "logprobs": logprobs}
        told |= {"finish_reason": finish, **_fields(extra.choice if extra else None)}
        return self._head + orjson.dumps([told]) + more + b"}\n\n"

    def end(self) -> bytes:
        """The finish reason of every reply with the decision, the token counts if asked for, and `[DONE]`."""
        exchange = self._exchange
        out = []
        for turn in exchange.turns:
            verdict = b',"guardrails":' + orjson.dumps(decision(turn))
            out.append(self._chunk({}, turn.choice, turn.finish_reason, more=verdict))
        options = exchange.asked.stream_options
        if options and options.include_usage:
            out.append(self._head + b'[],"usage":' + orjson.dumps(usage(exchange)) + b"}\n\n")
        return b"".join([*out, DONE])

    def failed(self, error: ApiError) -> bytes:
        """The error as an event, and `[DONE]`."""
        return b"data: " + orjson.dumps(error.body) + b"\n\n" + DONE


def block_mode(key: Key, headers: Mapping[bytes, bytes]) -> BlockMode:
    """How this client wants to be told of a refusal: by its header, else by its key; raises ApiError 400."""
    asked = headers.get(b"x-guardrails-block-mode", b"").decode("latin-1") or key.limits.block_mode or "message"
    mode = next((mode for mode in BLOCK_MODES if mode == asked), None)
    if mode is None:
        message = f"Invalid value for 'x-guardrails-block-mode': it is one of {', '.join(BLOCK_MODES)}."
        raise ApiError(400, message, code="invalid_value", param="x-guardrails-block-mode")
    return mode


def _choice(exchange: Exchange, turn: Turn, told: Sequence[Said], more: More | None) -> dict[str, Any]:
    logprobs = tuple(entry for said in told for entry in said.logprobs)
    choice = {"index": turn.choice, "message": message(told) | _fields(more.message if more else None)}
    choice |= {"logprobs": _logprobs(logprobs) if exchange.asked.logprobs else None}
    return choice | {"finish_reason": turn.finish_reason} | _fields(more.choice if more else None)


def message(told: Sequence[Said]) -> dict[str, Any]:
    """The pieces of a reply as one message; its content is null where it only calls tools, or refuses."""
    texts: dict[str, str] = {}
    for said in told:
        texts[said.channel] = texts.get(said.channel, "") + said.text
    calls = [
        {"id": said.id, "type": "function", "function": {"name": said.name, "arguments": texts[said.channel]}}
        for said in told
        if said.name
    ]
    silent, reasoning = calls or "refusal" in texts, texts.get(REASONING)
    content = texts.get(CONTENT) or (None if silent else "")
    whole: dict[str, Any] = {"role": "assistant", "content": content, "refusal": texts.get("refusal")}
    whole |= {"tool_calls": calls} if calls else {}
    return whole | ({"reasoning_content": reasoning, "reasoning": reasoning} if reasoning else {})


def _delta(said: Said) -> dict[str, Any]:
    """A piece of the reply as OpenAI writes it; reasoning under both names that engines and clients have for it."""
    if said.channel == REASONING:
        return {"reasoning_content": said.text, "reasoning": said.text}
    if not said.channel.startswith(ARGUMENTS):
        return {said.channel: said.text}
    opening = {"id": said.id, "type": "function"} if said.name else {}
    function = ({"name": said.name} if said.name else {}) | {"arguments": said.text}
    return {"tool_calls": [{"index": said.place} | opening | {"function": function}]}


def _logprobs(entries: Sequence[bytes]) -> dict[str, Any] | None:
    return {"content": [orjson.Fragment(entry) for entry in entries], "refusal": None} if entries else None


def _joined(told: Sequence[Said]) -> More | None:
    return next((said.more for said in told if said.more), None)


def _fields(raw: Mapping[str, bytes] | None) -> dict[str, Any]:
    """Fields of the engine, byte by byte."""
    return {name: orjson.Fragment(value) for name, value in raw.items()} if raw else {}


def _name(name: str) -> bytes:
    return orjson.dumps(name)[1:-1]


def usage(exchange: Exchange, more: More | None = None) -> dict[str, Any]:
    """The token counts."""
    prompt, completion, cached = exchange.usage
    counts: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    counts |= {"prompt_tokens_details": {"cached_tokens": cached}} if cached else {}
    return counts | _fields(more.usage if more else None)


def decision(turn: Turn) -> dict[str, Any]:
    """What a client may know of a verdict: the action and where, not which rule or score (an attacker's gradient)."""
    stages = (("output", turn.output), ("input", turn.input))
    stage = next((name for name, verdict in stages if verdict and verdict.rule == turn.rule and turn.rule), None)
    escalation = handed_over(turn.ticket) if turn.ticket else None
    return {"id": turn.id, "action": turn.action, "stage": stage, "policy": turn.policy, "escalation": escalation}


def handed_over(ticket: Ticket) -> dict[str, Any]:
    """What a client may know of a ticket."""
    return {"id": ticket.id, "status": ticket.state, "queue": ticket.queue, "due": ticket.due_at.isoformat()}
