"""What may be said: policies, validators and the engine that judges text, whole or while it streams."""

from guardrails.conversation import judge_messages
from guardrails.engine import judge, stream
from guardrails.policy import PolicyError, load, loads
from guardrails.types import Action, Context, Finding, Message, Policy, Rule, Validator, Verdict

__all__ = [
    "Action",
    "Context",
    "Finding",
    "Message",
    "Policy",
    "PolicyError",
    "Rule",
    "Validator",
    "Verdict",
    "judge",
    "judge_messages",
    "load",
    "loads",
    "stream",
]
