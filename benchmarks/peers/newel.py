"""newel: the `patterns` validator in a policy, through the calls that its gateway makes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import protocol

from guardrails import PolicyError, judge_messages, loads, stream
from guardrails.engine import Guard
from guardrails.types import Action, Message, Policy, Verdict

POLICY = f"""
name = "bench"

[[input]]
name = "banned"
validator = "patterns"
patterns = ['{protocol.PATTERN}']
action = "refuse"
reply = "I cannot talk about that."

[[output]]
name = "ssn"
validator = "patterns"
patterns = ['{protocol.SSN}']
action = "refuse"
reply = "I cannot say that."
"""
REDACTING = POLICY.replace(
    '''action = "refuse"
reply = "I cannot say that."''',
    '''action = "redact"
placeholder = "[SSN]"''',
)
PLAIN = POLICY.replace('action = "refuse"', 'action = "refuse"\nviews = false')
POLICIES = {"refuse": loads(POLICY), "redact": loads(REDACTING)}


def conversation(messages: list[dict[str, str]]) -> list[Message]:
    return [Message(one["role"], one["content"]) for one in messages]


async def stopped(policy: Policy, messages: list[dict[str, str]]) -> bool:
    verdict, _ = await judge_messages(policy.input, conversation(messages))
    return verdict.action >= Action.REDACT


class Newel:
    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.policy = POLICIES["refuse"]
        self.costs = {"": self.policy, "views = false": loads(PLAIN)}

    def about(self) -> dict[str, object]:
        return {
            "version": "this tree",
            "checks": [""],
            "places": [""],
            "streams": list(POLICIES),
            "costs": ["", "views = false"],
            "how": "`patterns` in a policy; `judge_messages`, `stream`",
        }

    def check(self, variant: str, messages: list[dict[str, str]]) -> bool:
        return self.loop.run_until_complete(stopped(self.policy, messages))

    def stream(self, variant: str, chunks: list[str]) -> dict[str, object]:
        return {"text": self.loop.run_until_complete(self._stream(POLICIES[variant], chunks))}

    async def _stream(self, policy: Policy, chunks: list[str]) -> str:
        async def model() -> AsyncIterator[str]:
            for chunk in chunks:
                yield chunk

        pieces = [piece async for piece in stream(policy.output, model())]
        return "".join(piece for piece in pieces if not isinstance(piece, Verdict))

    def typos(self) -> list[dict[str, str]]:
        changed = {
            "section `[[inptu]]`": POLICY.replace("[[input]]", "[[inptu]]"),
            "key `valdiator`": POLICY.replace("validator", "valdiator", 1),
            "key `pattern`": POLICY.replace("patterns =", "pattern =", 1),
            "name `paterns`": POLICY.replace('"patterns"', '"paterns"', 1),
        }
        return [{"what": what, "came": protocol.outcome(self._loader(text))} for what, text in changed.items()]

    def _loader(self, text: str) -> Callable[[], Callable[[], bool]]:
        def load() -> Callable[[], bool]:
            policy = loads(text)
            asked = protocol.user(f"Tell me about {protocol.PHRASE}.")
            return lambda: self.loop.run_until_complete(stopped(policy, asked))

        return load

    def hostile(self, pattern: str, text: str) -> float | str:
        try:
            policy = loads(POLICY.replace(protocol.PATTERN, pattern))
        except PolicyError:
            return "refused at load"
        return self.loop.run_until_complete(protocol.blocked(lambda: stopped(policy, protocol.user(text))))

    def cost(self, variant: str, text: str, runs: int) -> list[float]:
        def check() -> None:
            asked = [Message("user", protocol.fresh(text))]
            self.loop.run_until_complete(judge_messages(self.costs[variant].input, asked))

        return protocol.cpu(check, runs)

    def cost_of_stream(self, variant: str, chunks: list[str], runs: int) -> list[float]:
        def read() -> None:
            guard = Guard(self.costs[variant].output)
            for chunk in chunks:
                guard.feed(chunk)

        return protocol.cpu(read, runs)


if __name__ == "__main__":
    protocol.serve(Newel())
