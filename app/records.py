"""The records of the service: what is decided and stored about a turn, a ticket, a judgement by a person."""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from guardrails.types import Hit, Message, Priority, ToolMessage, Verdict

WhenStoreFails = Literal["refuse", "answer"]
KeyScope = Literal["client", "reviewer", "operator", "admin"]
KeyPriority = Literal["interactive", "batch", "shadow"]
BlockMode = Literal["message", "stop", "refusal", "error"]
PolicyState = Literal["draft", "active", "retired"]
TicketState = Literal["open", "answered", "closed"]
RetentionKind = Literal["turns", "withheld", "feedback", "deliveries"]
DeliveryState = Literal["pending", "sent", "dead"]
FeedbackKind = Literal["rating", "comment", "correction", "choice", "should_have_helped", "should_have_refused"]


def now() -> datetime:
    """The current time, aware, in UTC."""
    return datetime.now(UTC)


def new_id(prefix: str) -> str:
    """A fresh identifier such as `chatcmpl-5f0c...` (96 random bits)."""
    if not _random:
        several = secrets.token_bytes(12 * 256)  # a system call for each would cost more than all the rest of it
        _random.extend(several[i : i + 12].hex() for i in range(0, len(several), 12))
    return prefix + _random.pop()


def row_id(prefix: str) -> str:
    """A fresh identifier of a row of a large table: the milliseconds since 1970 come before the random bits.

    Rows that are written together then stand together in the table's indexes; at random places each would cost the
    database a page of its own to read, to log and to write.
    """
    return f"{prefix}{time.time_ns() // 1_000_000:012x}{new_id('')}"


_random: list[str] = []
os.register_at_fork(after_in_child=_random.clear)


@dataclass(frozen=True, slots=True)
class Tenant:
    """One customer of the gateway: its policy, and what happens to its requests when the store fails."""

    name: str
    policy: str
    when_store_fails: WhenStoreFails = "refuse"


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What a key may use, None and empty: as the settings have it. Rates are per minute and day, cost_per_month is in
    the currency of the prices, allow names request fields beyond the usual ones ("top_k", "chat_template_kwargs")."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    cost_per_month: float | None = None
    max_tokens: int | None = None
    max_n: int | None = None
    max_logprobs: int | None = None
    allow: tuple[str, ...] = ()
    priority: KeyPriority | None = None
    block_mode: BlockMode | None = None
    expires_at: datetime | None = None


NO_LIMITS = KeyLimits()


OIDC_KEY = "oidc:"
"""How the id of a key begins that is a token of an OpenID Connect issuer."""


@dataclass(frozen=True, slots=True)
class Key:
    """An API key as it is stored: never the secret, only its SHA-256 and its first characters."""

    id: str
    tenant: str
    scope: KeyScope
    hint: str
    note: str = ""
    created_at: datetime = field(default_factory=now)
    revoked_at: datetime | None = None
    limits: KeyLimits = NO_LIMITS

    def may(self, needed: KeyScope) -> bool:
        """True when this key opens what asks for a scope: its own, or any for an admin's."""
        return self.scope in (needed, "admin")

    def good(self, moment: datetime) -> bool:
        """True when the key is neither revoked nor expired at that time; for those who remember keys."""
        expires = self.limits.expires_at
        return self.revoked_at is None and (expires is None or moment < expires)


@dataclass(slots=True)
class Turn:
    """One exchange and every decision on the way; filled in from top to bottom by `app.chat.answer`.

    asked is what was asked as the policy lets it be kept (redacted); said is what the client saw, and so are reasoning
    and calls, the tool calls. Where a tool's result is what is answered, asked is empty, and the results end history.
    withheld_* hold the raw texts where they differ, and are stored apart, in a stricter class.

    parent: the id of the finished turn that this one continues. It may be set when the service itself has found that
    turn (by the hash that its history ends with, or as the last one of the conversation on record), before the turn is
    logged, and only to a turn of the same tenant and conversation. It saves space and is never trusted: a history is
    compared with what is on record of the parent, and what differs is stored with the turn. release: which release of
    the model answered. surface: the API that was used (chat, completions, responses, messages). priority: the class of
    the request. trace: the id of its trace. choice: which one of n choices; siblings share the prefix of the id.
    cached_tokens: how many of the prompt's tokens the engine had read before. guard_*_ms: how long a side was judged.
    """

    id: str
    conversation: str
    tenant: str
    key: str
    policy: str
    model: str
    request_id: str
    streamed: bool
    subject: str = ""
    history: tuple[ToolMessage | Message, ...] = ()
    asked: str = ""
    withheld_asked: str = ""
    said: str = ""
    reasoning: str = ""
    calls: tuple[ToolMessage, ...] = ()
    withheld_said: str = ""
    input: Verdict | None = None
    output: Verdict | None = None
    action: str = "allow"
    rule: str = ""
    finish_reason: str = ""
    error: str = ""
    ticket: Ticket | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_ms: float | None = None
    total_ms: float | None = None
    head_hash: str = ""
    tail_hash: str = ""
    retry_of: str = ""
    parent: str = ""
    release: str = ""
    surface: str = "chat"
    priority: str = "interactive"
    trace: str = ""
    choice: int = 0
    cached_tokens: int = 0
    guard_input_ms: float | None = None
    guard_output_ms: float | None = None
    created_at: datetime = field(default_factory=now)

    @property
    def ended(self) -> bool:
        """True when nothing more will be said or decided."""
        return self.total_ms is not None

    @property
    def uses_tools(self) -> bool:
        """True when tools were called in it or before it."""
        return bool(self.calls) or any(isinstance(message, ToolMessage) for message in self.history)

    @property
    def results(self) -> tuple[Message, ...]:
        """The results of tools that are what is answered, where nothing is asked: the end of the history."""
        new = len(self.history)
        while not self.asked and new and self.history[new - 1].role == "tool":
            new -= 1
        return self.history[new:]

    @property
    def exchange(self) -> tuple[Message, ...]:
        """What was new in this turn: the question or the results of tools, and the reply."""
        asked = self.results or (Message("user", self.asked),)
        calls = self.calls if self.finish_reason == "tool_calls" else ()  # others were not made to their end
        return (*asked, *((Message("assistant", self.said),) if self.said else ()), *calls)

    @property
    def question(self) -> str:
        """What the person has asked, also where results of tools came after it."""
        told = (message.content for message in reversed(self.history) if message.role == "user")
        return self.asked or next(told, "")

    @property
    def hits(self) -> tuple[tuple[str, Hit], ...]:
        """(stage, hit) for every rule that fired or broke."""
        stages = (("input", self.input), ("output", self.output))
        return tuple((stage, hit) for stage, verdict in stages if verdict for hit in verdict.hits)


@dataclass(frozen=True, slots=True)
class Ticket:
    """A turn handed to a person."""

    id: str
    tenant: str
    conversation: str
    turn: str
    queue: str
    priority: Priority
    due_at: datetime
    rule: str
    state: TicketState = "open"
    answer: str = ""
    answered_by: str = ""
    answered_at: datetime | None = None
    delivered_at: datetime | None = None
    created_at: datetime = field(default_factory=now)


@dataclass(frozen=True, slots=True)
class Feedback:
    """What a person thought of a turn. value: rating -1..1; text: comment or correction; other: the turn that was
    compared with this one, where `choice` says which of the two is better ("this", "other", "tie")."""

    id: str
    tenant: str
    turn: str
    kind: FeedbackKind
    value: float | None = None
    text: str = ""
    other: str = ""
    choice: str = ""
    source: str = ""
    created_at: datetime = field(default_factory=now)


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """A policy as it was written, by name and content hash."""

    name: str
    version: str
    source: str
    active: bool
    created_at: datetime = field(default_factory=now)
    created_by: str = ""
    activated_at: datetime | None = None

    @property
    def state(self) -> PolicyState:
        """A draft was never active, a retired one was."""
        return "active" if self.active else "retired" if self.activated_at else "draft"


@dataclass(frozen=True, slots=True)
class Delivery:
    """A webhook message in the outbox; error says why the last attempt failed (a status or a kind of error)."""

    id: str
    kind: str
    body: dict[str, Any]
    attempts: int = 0
    state: DeliveryState = "pending"
    error: str = ""
    next_at: datetime = field(default_factory=now)


@dataclass(frozen=True, slots=True)
class Retention:
    """For how long texts are kept; None is for ever. A turn goes with all that hangs on it."""

    turns: timedelta | None = None
    withheld: timedelta | None = None
    feedback: timedelta | None = None
    deliveries: timedelta | None = None

    def cutoff(self, kind: RetentionKind, moment: datetime) -> datetime | None:
        """What began before this is too old."""
        kept: timedelta | None = getattr(self, kind)
        return None if kept is None else moment - kept
