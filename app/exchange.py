"""One request of a chat client between its bytes and its answer: who asks, and the pieces of the reply."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from app.chat import answer, answered
from app.errors import ApiError
from app.fleet import Release
from app.records import Key, Tenant, Turn, row_id
from app.schemas import ChatRequest
from app.service import Service
from app.telling import Said
from guardrails.reply import ARGUMENTS, CONTENT, REASONING
from guardrails.vault import restore

CONVERSATION_HEADERS = (b"x-conversation-id", b"x-openwebui-chat-id", b"chatui-conversation-id")
CONVERSATION = re.compile(r"[!-~]{1,128}")
"""Printable ASCII, since it comes back in a header."""
RETRY = re.compile("[1-9][0-9]?")
IDS = {"chat": "chatcmpl-", "completions": "cmpl-", "responses": "resp_", "messages": "msg_"}
"""How the id of an answer begins in each API."""


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request: its headers (the first of each name, and all as they came), its id, and where it comes from."""

    headers: Mapping[bytes, bytes]
    raw: Sequence[tuple[bytes, bytes]]
    request_id: str
    peer: str = ""
    trace: str = ""

    def header(self, name: bytes) -> str:
        """A header's value, or empty."""
        value = self.headers.get(name)
        return value.decode("latin-1") if value else ""


@dataclass(slots=True)
class Exchange:
    """A request that may be answered, and its answer as it comes.

    turns: one for each reply; the first is the one that the client gets the id of. limits: headers that tell of the
    key's. again: what was told before, where this is the answer to a request that was sent again.
    """

    service: Service
    key: Key
    tenant: Tenant
    asked: ChatRequest
    turns: list[Turn]
    release: Release
    limits: Mapping[str, str] = field(default_factory=dict)
    again: tuple[Said, ...] = ()
    id: str = ""
    created: int = 0

    def __post_init__(self) -> None:
        self.id, self.created = self.turn.id, int(self.turn.created_at.timestamp())

    @property
    def turn(self) -> Turn:
        """The turn of the first reply."""
        return self.turns[0]

    @property
    def usage(self) -> tuple[int, int, int]:
        """(prompt, completion, cached) tokens; the prompt of several replies counts once."""
        turn = self.turn
        return turn.prompt_tokens, sum([one.completion_tokens for one in self.turns]), turn.cached_tokens

    def pieces(self) -> AsyncGenerator[Said, None]:
        """The settled pieces of all replies; raises ApiError."""
        if self.again:
            return _each(self.again)
        return answer(self.service, self.tenant, self.turns, self.asked, self.release)

    async def whole(self) -> Sequence[Said]:
        """All the pieces of all replies, for a client that wants them whole; raises ApiError."""
        return self.again or await answered(self.service, self.tenant, self.turns, self.asked, self.release)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What is known when the answer begins."""
        turn = self.turn
        out = [
            (b"x-conversation-id", turn.conversation.encode()),
            (b"x-guardrails-id", turn.id.encode()),
            (b"x-guardrails-policy", turn.policy.encode()),
        ]
        if turn.ended:
            out.append((b"x-guardrails-action", turn.action.encode()))
        if ignored := self.asked.ignored(self.service.fleet.without(self.release)):
            out.append((b"x-ignored-parameters", ", ".join(ignored).encode()))
        return out + [(name.encode(), value.encode()) for name, value in self.limits.items()]


async def _each(told: Sequence[Said]) -> AsyncGenerator[Said, None]:
    for said in told:
        yield said


async def repeated(service: Service, id: str, key: Key, tenant: Tenant, asked: ChatRequest) -> Exchange:
    """The exchange in which the turn of this id is told again, as it is on record; raises ApiError 404."""
    turns, told = list[Turn](), list[Said]()
    while turn := await service.store.turn(f"{id}-{len(turns)}" if turns else id, tenant.name):
        turns.append(turn)
        restored = partial(restore, values=await service.vaults.values_of(turn))
        told += [Said(REASONING, restored(turn.reasoning), choice=turn.choice)] if turn.reasoning else []
        told.append(Said(CONTENT, restored(turn.said), choice=turn.choice))
        for place, call in enumerate(turn.calls):
            arguments = restored(call.content, json=True)
            told.append(Said(f"{ARGUMENTS}:{place}", arguments, place, call.call, call.name, turn.choice))
    if not turns:
        raise ApiError(404, "The answer to this Idempotency-Key was erased.", code="not_found", param="idempotency-key")
    return Exchange(service, key, tenant, asked, turns, service.fleet.choose(turns[0].model), again=tuple(told))


def begun(service: Service, call: Call, surface: str, key: Key, tenant: Tenant, asked: ChatRequest) -> Turn:
    """The turn of a request; raises ApiError where it names a conversation that cannot be one."""
    person = asked.safety_identifier or asked.user or call.header(b"x-openwebui-user-id")
    retries = call.header(b"x-stainless-retry-count")
    return Turn(
        id=row_id(IDS.get(surface, "chatcmpl-")),
        conversation=_conversation(call, asked),
        tenant=tenant.name,
        key=key.id,
        policy="",
        model=asked.model,
        request_id=call.request_id,
        streamed=bool(asked.stream),
        subject=service.auth.person(key) or service.pseudonym(tenant.name, person),
        retry_of=retries if RETRY.fullmatch(retries) else "",
        surface=surface,
        trace=call.trace,
    )


def _conversation(call: Call, asked: ChatRequest) -> str:
    """The conversation that the client names, or empty."""
    for name in CONVERSATION_HEADERS:
        if named := call.header(name):
            return _sane(named, name.decode())
    named = (asked.metadata or {}).get("conversation_id", "")
    return _sane(named, "metadata.conversation_id") if named else ""


def _sane(named: str, param: str) -> str:
    if not CONVERSATION.fullmatch(named):
        message = (
            f"Invalid value for '{param}': a conversation id is 1 to 128 printable ASCII characters, without spaces."
        )
        raise ApiError(400, message, code="invalid_value", param=param)
    return named


def unknown_model(service: Service, model: str) -> ApiError:
    """What a client is told that names a model which is not served."""
    served = ", ".join(f"'{name}'" for name in service.fleet.models)
    message = f"The model '{model}' does not exist; this gateway serves {served}."
    return ApiError(404, message, code="model_not_found", param="model")
