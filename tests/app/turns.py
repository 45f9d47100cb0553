"""Turns to store, as the gateway would fill them in."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

from app.desk import hand_over
from app.records import Feedback, Turn, new_id, now
from guardrails.types import Action, Finding, Hit, Message, Route, Verdict

SECRET = "123-45-6789"
RAW = f"My number is {SECRET}, what does Jane earn in the Lisbon office?"
ASKED = "My number is [SSN], what does Jane earn in the Lisbon office?"
ROUTE = Route("hr", "hr-desk", "high", 3600)


def begun(tenant: str, **changes: Any) -> Turn:
    """A turn whose question was redacted and that has no answer yet."""
    hit = Hit("ids", Action.REDACT, "enforce", (Finding("SSN", 13, 24, 0.9),), message=2)
    shadow = Hit("tone", Action.REFUSE, "shadow", broken="TimeoutError")
    turn = Turn(
        id=new_id("chatcmpl-"),
        conversation=new_id("conv-"),
        tenant=tenant,
        key="key_1",
        policy="hr@1",
        model="smol",
        request_id="req-1",
        streamed=True,
        subject="subject-hash",
        history=(Message("user", "Hello"), Message("assistant", "Hello! How can I help?")),
        asked=ASKED,
        withheld_asked=RAW,
        input=Verdict(Action.REDACT, ASKED, rule="ids", hits=(hit, shadow)),
        action="redact",
        rule="ids",
        head_hash=new_id("head-"),
    )
    return replace(turn, **changes)


def finished(turn: Turn, **changes: Any) -> Turn:
    """The same turn after its reply was stopped by the output guard."""
    said = "I cannot share what colleagues earn. Please ask HR."
    hit = Hit("salary", Action.REFUSE, "enforce", (Finding("SALARY", 0, 21),))
    done = replace(
        turn,
        said=said,
        withheld_said="Jane earns ninety thousand euros a year before her bonus.",
        output=Verdict(Action.REFUSE, said, rule="salary", hits=(hit,)),
        action="refuse",
        rule="salary",
        finish_reason="content_filter",
        prompt_tokens=31,
        completion_tokens=12,
        first_token_ms=41.5,
        total_ms=120.25,
        guard_input_ms=2.5,
        guard_output_ms=3.75,
        tail_hash=new_id("tail-"),
    )
    return replace(done, **changes)


def escalated(turn: Turn) -> Turn:
    """The same turn, handed to a person."""
    said = "A person will answer."
    verdict = Verdict(Action.ESCALATE, said, rule="harm", route="hr", hits=(Hit("harm", Action.ESCALATE, "enforce"),))
    ticket = hand_over(turn, verdict, ROUTE)
    return finished(turn, ticket=ticket, action="escalate", rule="harm", said=said, output=verdict)


def as_read(turn: Turn) -> Turn:
    """What the store shows of this turn: all but what was withheld."""
    return replace(turn, withheld_asked="", withheld_said="")


def opinion(turn: Turn, /, **changes: Any) -> Feedback:
    """A rating of the turn, unless `changes` say otherwise."""
    plain = Feedback(id=new_id("fb_"), tenant=turn.tenant, turn=turn.id, kind="rating", value=1.0, source="ana")
    return replace(plain, **changes)


def long_ago(turn: Turn) -> Turn:
    """The same turn, begun a day earlier."""
    return replace(turn, created_at=now() - timedelta(days=1))
