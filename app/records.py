"""The records of the service: what is decided and stored about a turn, a ticket, a judgement by a person."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from guardrails.types import Hit, Message, Priority, ToolMessage, Verdict

WhenStoreFails = Literal["refuse", "answer"]
KeyScope = Literal["client", "admin"]
PolicyState = Literal["draft", "active", "retired"]
TicketState = Literal["open", "answered", "closed"]
DeliveryState = Literal["pending", "sent", "dead"]
FeedbackKind = Literal["rating", "comment", "correction", "choice", "should_have_helped", "should_have_refused"]


def now() -> datetime:
    """The current time, aware, in UTC."""
    return datetime.now(UTC)


def new_id(prefix: str) -> str:
    """A fresh identifier such as `chatcmpl-5f0c...` (96 random bits)."""
    return f"{prefix}{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True)
class Tenant:
    """One customer of the gateway: its policy, and what happens to its requests when the store fails."""

    name: str
    policy: str
    when_store_fails: WhenStoreFails = "refuse"


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


@dataclass(slots=True)
class Turn:
    """One exchange and every decision on the way; filled in from top to bottom by `app.chat.answer`.

    asked is what was asked as the policy lets it be kept (redacted); said is what the client saw, and so are reasoning
    and calls, the tool calls. Where a tool's result is what is answered, asked is empty, and the results end history.
    withheld_* hold the raw texts where they differ, and are stored apart, in a stricter class.
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
