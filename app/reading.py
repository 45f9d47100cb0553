"""Texts that a client sends to routes beside the chat, judged by its policy's input rules."""

from __future__ import annotations

from dataclasses import dataclass

from app.records import Tenant
from app.service import Service
from guardrails.conversation import judge_messages
from guardrails.types import Context, Judge, Message, Policy, Verdict


@dataclass(frozen=True, slots=True)
class Reader:
    """What reads texts by one policy; guard models are asked within the budget of one turn for all of them."""

    service: Service
    policy: Policy
    judges: dict[str, Judge]

    async def verdict(self, text: str) -> Verdict:
        """The verdict on a text, as if a user had said it; `Verdict.text` is the text as it may be used.

        What is redacted is so for good. A rule that breaks decides as its `if_broken` says, and fails closed.
        """
        message = Message("user", text)
        context = Context((message,), self.service.fleet, self.policy.persona, self.judges)
        return (await judge_messages(self.policy.input, (message,), context))[0]


async def reader(service: Service, tenant: Tenant) -> Reader:
    """The reader of a tenant; raises ApiError 503 where its policy cannot be loaded."""
    return Reader(service, await service.policies.of(tenant.policy), service.judges.of_turn())
