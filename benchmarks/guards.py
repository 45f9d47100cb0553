"""What the shipped policies cost: judging a question, and reading a reply piece by piece.

CPU time of one thread, medians over runs. The baseline joins the same pieces without any guard. "Rules only" leaves out
the rules that ask a model of their own; there the event loop is started once.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from itertools import count
from pathlib import Path

# guardrails.py beside this file has the name of the package: it is not what is meant here.
sys.path[:] = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]

from guardrails import load  # noqa: E402
from guardrails.conversation import judge_messages  # noqa: E402
from guardrails.engine import Guard  # noqa: E402
from guardrails.plan import streams  # noqa: E402
from guardrails.reply import CONTENT, Reply  # noqa: E402
from guardrails.types import Context, Message, Policy, Rule  # noqa: E402

REPLY = (
    "To ask for a raise, write down what you have done in the last year and what it was worth to the team. "
    "Pick a calm moment, ask your manager for half an hour, and name the figure that you have in mind. "
    "If the answer is no, ask what would have to change, and by when you may ask again.\n"
)
QUESTION = "I have been here for two years and took over the night shift in March. How do I ask for a raise? "
ENDINGS = ["week", "month", "year", "team", "plan", "boss", "shift", "raise", "night", "March", "office", "manager"]
"""What makes one question unlike another, so that nothing is remembered of it."""
RUNS, TEXTS = 15, 200


def pieces(text: str, size: int = 4) -> list[str]:
    """The text in pieces of `size` characters, about one token each."""
    return [text[i : i + size] for i in range(0, len(text), size)]


def cpu(work: Callable[[], object]) -> float:
    """Median CPU seconds of one call."""
    times = []
    for _ in range(RUNS):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return statistics.median(times)


def read(policy: Policy, parts: list[str]) -> tuple[str, list[int]]:
    """The reply as a stream would release it, and how many characters were held back after each piece."""
    guard = Guard(policy.output, Context())
    out, held = [], []
    fed = released = 0
    for part in parts:
        piece = guard.feed(part)
        out.append(piece)
        fed, released = fed + len(part), released + len(piece)
        held.append(fed - released)
    return "".join(out), held


async def per_text(work: Callable[[int], Coroutine[object, object, object]]) -> float:
    """Median CPU seconds of one of many calls in one event loop; `work` is given the number of the call."""
    times, number = [], count()
    for _ in range(RUNS):
        began = time.process_time()
        for _ in range(TEXTS):
            await work(next(number))
        times.append((time.process_time() - began) / TEXTS)
    return statistics.median(times)


async def rules_only(policy: Policy) -> tuple[float, float, float]:
    """CPU seconds of a question of 200 characters, a reply of 250 in one piece, and a token of a reply of 1100."""
    asked, said = ([rule for rule in rules if streams(rule.validator)] for rules in (policy.input, policy.output))

    async def question(number: int) -> None:
        ending = " ".join(ENDINGS[number // len(ENDINGS) ** n % len(ENDINGS)] for n in range(5))
        await judge_messages(asked, [Message("user", f"{(QUESTION * 3)[:169]} {ending}"[:200])])

    async def reply(_: int) -> None:
        whole = Reply(said, streamed=False)
        whole.feed(CONTENT, REPLY[:250])
        await whole.finish()

    parts = pieces(REPLY * 4)
    token = cpu(lambda: fed(said, parts)) / len(parts)
    return await per_text(question), await per_text(reply), token


def fed(rules: Sequence[Rule], parts: list[str]) -> None:
    """Reads a reply as a gateway does that streams it."""
    reply = Reply(rules)
    for part in parts:
        reply.feed(CONTENT, part)


def main() -> None:
    """Prints the three tables."""
    print(f"{'policy':<8} {'reply':>8} {'us/token':>9} {'bare':>6} {'held mean':>10} {'held max':>9}")
    for name in ("base", "hr"):
        policy = load(name)
        for repeats in (1, 4, 16):
            parts = pieces(REPLY * repeats)
            seconds = cpu(lambda: read(policy, parts))  # noqa: B023 called at once
            bare = cpu(lambda: "".join(list(parts)))  # noqa: B023 called at once
            held = read(policy, parts)[1]
            row = f"{seconds / len(parts) * 1e6:9.1f} {bare / len(parts) * 1e6:6.2f}"
            print(f"{name:<8} {len(parts):>4} tok {row} {statistics.mean(held):10.1f} {max(held):9d}")
    print(f"\n{'policy':<8} {'question':>10} {'us':>9} {'without heads':>14}")
    for name in ("base", "hr"):
        policy = load(name)
        alone = [rule for rule in policy.input if streams(rule.validator)]
        for length in (200, 1000, 4000):
            text = (QUESTION * (length // len(QUESTION) + 1))[:length]
            fresh = (Message("user", f"{name} {n} {text}") for n in count())  # what was read before is remembered
            both = [
                cpu(lambda: asyncio.run(judge_messages(rules, [next(fresh)])))  # noqa: B023 called at once
                for rules in (policy.input, alone)
            ]
            print(f"{name:<8} {length:>5} char {both[0] * 1e6:9.0f} {both[1] * 1e6:14.0f}")
    print(f"\n{'rules only':<10} {'question us':>12} {'reply us':>9} {'token us':>9}")
    for name in ("base", "hr"):
        costs = asyncio.run(rules_only(load(name)))
        print(f"{name:<10} {costs[0] * 1e6:12.1f} {costs[1] * 1e6:9.1f} {costs[2] * 1e6:9.1f}")


if __name__ == "__main__":
    main()
