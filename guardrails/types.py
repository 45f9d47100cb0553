"""The words of the guard: what is read, what is found, what is decided.

Validators find; rules bind a finding to an action; a verdict is a value, never an exception.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal, Protocol, runtime_checkable

Role = Literal["system", "developer", "user", "assistant", "tool"]
Scope = Literal["last_user", "user", "assistant", "tool", "all"]
Every = Literal["text", "sentence"]
Stage = Literal["input", "output"]
Mode = Literal["enforce", "shadow"]
Priority = Literal["low", "normal", "high", "urgent"]


class Action(IntEnum):
    """What a rule does when it fires, from mildest to strictest; verdicts combine by `max`."""

    ALLOW = 0
    APPEND = 1
    REDACT = 2
    REFUSE = 3
    ESCALATE = 4

    @property
    def stops(self) -> bool:
        """True when the text itself is not delivered."""
        return self >= Action.REFUSE

    @property
    def word(self) -> str:
        """The action as it is written in TOML, columns, metrics and headers."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Message:
    """One utterance of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class ToolMessage(Message):
    """What a conversation holds about a tool: its definition, a call of it, or what a call came to.

    content: the definition in JSON (system), the arguments in JSON (assistant), the result (tool). call: the id of the
    call, empty for a definition. name: the tool, empty for a result.
    """

    call: str
    name: str


@dataclass(frozen=True, slots=True)
class Finding:
    """What a validator saw and where: `text[start:end]`, in code points; `score` in 0..1."""

    label: str
    start: int
    end: int
    score: float = 1.0
    note: str = ""


class Grader(Protocol):
    """A model that can be asked a yes/no question."""

    async def probability(self, messages: Sequence[Message]) -> float:
        """P(yes) / (P(yes) + P(no)) for the first token of the reply to `messages`, in 0..1."""
        ...


@dataclass(frozen=True, slots=True)
class Question:
    """One request to a guard model: either chat messages for its own template, or a `prompt` that is complete.

    kind: the family whose format it is in. template: what the chat template is told beside the messages. tokens: how
    many the answer may have; stop: texts that end it. after: what its deciding word stands behind. alternatives: how
    many are wanted for each token.
    """

    kind: str
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    template: Mapping[str, object] = field(default_factory=dict)
    tokens: int = 1
    stop: tuple[str, ...] = ()
    after: str = ""
    alternatives: int = 20


@dataclass(frozen=True, slots=True)
class Token:
    """A token of an answer, and what could have stood in its place: (text, natural logarithm of the probability)."""

    text: str
    alternatives: tuple[tuple[str, float], ...] = ()


class Judge(Protocol):
    """A guard model that can be asked for the probabilities of its words."""

    async def ask(self, question: Question) -> Sequence[Token]:
        """The answer, token by token, as the most probable one; raises whatever keeps it from being had."""
        ...


class Placeholders(Protocol):
    """What gives a redacted value a placeholder that can be restored (`guardrails.vault.Vault`)."""

    def placeholder(self, label: str, value: str) -> str:
        """What stands for `value` in what the model reads, such as `[EMAIL_1]`: the same for the same value."""
        ...


@dataclass(frozen=True, slots=True)
class Context:
    """What a validator may know beside the text: the conversation so far, models to ask, the persona of the policy.

    judges: the guard models that the operator has set up, by name. vault: where rules with `vault` put what they
    redact; without one they redact for good.
    """

    messages: tuple[Message, ...] = ()
    grader: Grader | None = None
    persona: str = ""
    judges: Mapping[str, Judge] = field(default_factory=dict)
    vault: Placeholders | None = None


@runtime_checkable
class Validator(Protocol):
    """The seam for one's own checks: reads a whole text and returns what it found.

    A validator that can also judge a text while it grows is a `StreamValidator`; a plain one makes a stream
    wait for the whole reply.
    """

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        """The findings in `text`; raising makes the rule's `if_broken` decide."""
        ...


class Reading(Protocol):
    """One validator's progress through one growing text."""

    def read(self, text: str, final: bool) -> tuple[Sequence[Finding], int]:
        """(new certain findings, settled): whatever comes after `text`, every finding that starts before
        `settled` has been returned by now, with its true end. `text` only ever grows; `final` says that it ends
        here, and then `settled == len(text)`. Findings that were returned once are not returned again.
        """
        ...


@runtime_checkable
class StreamValidator(Validator, Protocol):
    """A validator that says how much of a growing text it has finished judging."""

    def readings(self) -> Sequence[Reading]:
        """Fresh readings for one text; their findings together are what `find` returns."""
        ...


@dataclass(frozen=True, slots=True)
class Rule:
    """A validator bound to an action.

    threshold: findings that score below it are ignored. reply: what is said instead (refuse, escalate) or added
    (append). placeholder: what a redacted span becomes; empty means `[LABEL]`. route: the escalation route's name.
    scope: which messages an input rule reads; window: only the last so many of them, 0 for all.
    views: whether the text is read as it may have been disguised, too (`guardrails.views`).
    every: what a validator that cannot read a growing text is given at a time; by sentences a stream waits less.
    confirm: a second validator that is asked where no finding of the first scores `sure`; the rule fires only if it
    finds something, too. if_broken: what happens when a validator raises or is slower than `budget` seconds.
    vault: a redacted span becomes a numbered placeholder that is restored in the reply.
    """

    name: str
    validator: Validator
    action: Action
    reply: str = ""
    scope: Scope = "all"
    threshold: float = 0.5
    placeholder: str = ""
    route: str = ""
    if_broken: Action = Action.REFUSE
    mode: Mode = "enforce"
    budget: float = 10.0
    window: int = 0
    views: bool = True
    every: Every = "text"
    confirm: Validator | None = None
    sure: float = 0.9
    vault: bool = False
    key: str = ""


@dataclass(frozen=True, slots=True)
class Hit:
    """A rule that fired (or broke) and what it saw; never the text itself."""

    rule: str
    action: Action
    mode: Mode
    findings: tuple[Finding, ...] = ()
    broken: str = ""
    message: int = -1


@dataclass(frozen=True, slots=True)
class Verdict:
    """What may be said instead, and why.

    text: what may be delivered, whole (for a stop: the reply alone). kept: the part of the draft, redacted, that a
    stream has released. rule: the name of the rule that decided, empty for a plain allow.
    """

    action: Action
    text: str
    kept: str = ""
    rule: str = ""
    route: str = ""
    hits: tuple[Hit, ...] = ()

    @property
    def streamed(self) -> str:
        """The text that a streaming client has seen at the end, the same for any chunking."""
        if not self.action.stops:
            return self.text
        return f"{self.kept}\n\n{self.text}" if self.kept else self.text

    @property
    def closing(self) -> str:
        """What a stream adds after `kept`: the appended lines, or the reply that stands for the rest."""
        return self.streamed[len(self.kept) :]


@dataclass(frozen=True, slots=True)
class Route:
    """Where an escalated turn goes: a queue of people, how urgent, and within how many seconds."""

    name: str
    queue: str
    priority: Priority
    due: float


@dataclass(frozen=True, slots=True)
class Example:
    """A sentence that the policy must treat as `expect` says; `rule` names the rule that must decide.

    turns: what was said before it, and role who says it (of an input example). documents: what an answer must keep to.
    """

    stage: Stage
    text: str
    expect: Action
    rule: str = ""
    becomes: str = ""
    line: int = 0
    file: str = ""
    role: Role = "user"
    turns: tuple[Message, ...] = ()
    documents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Policy:
    """What may be said here. `version` is the hash of its resolved content; `source` is the TOML as written."""

    name: str
    version: str
    persona: str
    input: tuple[Rule, ...]
    output: tuple[Rule, ...]
    routes: Mapping[str, Route] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()
    source: str = ""
    description: str = ""

    @property
    def id(self) -> str:
        """`name@version`, as headers, columns and metrics carry it."""
        return f"{self.name}@{self.version}"


BROKEN_REPLY = "This message could not be checked, so it was not answered. Please try again in a moment."
"""Said when a rule broke and its `if_broken` stops the turn, whatever the rule's own reply is."""
