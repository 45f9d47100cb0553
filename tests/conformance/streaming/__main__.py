"""`python -m tests.conformance.streaming --target newel`, or `--target http://127.0.0.1:8000/v1 --key KEY`."""

from __future__ import annotations

import argparse
import asyncio

from tests.conformance.streaming.cases import Case, Suite, load
from tests.conformance.streaming.runner import flat, run, table
from tests.conformance.streaming.targets import Gateway, Newel, Target
from tests.fakes import FakeUpstream

ABOUT = """
A guarded stream must show the same text whatever pieces the model's text comes in, and never a character of what a
rule hides. Against a URL, the gateway there has to use http://127.0.0.1:PORT/v1 as its model, and to enforce the rules
of cases.toml that --rules names on what the model writes.
"""


async def measure(target: Target, suite: Suite, cases: list[Case], quick: bool) -> bool:
    """Prints the table; True when every case passes."""
    outcomes = [await run(target, suite, case, not quick) for case in cases]
    print(f"{target.name}\n\n{table(outcomes)}")
    if target.live:
        print(f"A character costs {await flat(target, suite):.2f} times as much in a reply of ten times the length.")
    return not any(outcome.faults for outcome in outcomes)


async def main() -> bool:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.streaming", description=ABOUT)
    parser.add_argument("--target", required=True, help="newel, or the base URL of an OpenAI-compatible gateway")
    parser.add_argument("--key", default="", help="the API key for the URL")
    parser.add_argument("--model", default="fake", help="the model's name there (fake)")
    parser.add_argument("--port", type=int, default=9009, help="where the model is played (9009)")
    parser.add_argument("--rules", default="", help="only cases whose rules are all among these: falcon,email")
    every = "content,reasoning,arguments"
    parser.add_argument("--channels", default=every, help=f"where the model writes: {every}, all by default")
    parser.add_argument("--plain", action="store_true", help="leave out the disguised cases")
    parser.add_argument("--own-words", action="store_true", help="it says other replies than the rules: compare leaks")
    parser.add_argument("--quick", action="store_true", help="a tenth of the ways to cut a text")
    asked = parser.parse_args()
    suite, channels, rules = load(), asked.channels.split(","), set(filter(None, asked.rules.split(",")))
    cases = [
        case
        for case in suite.case
        if case.channel in channels and (not rules or rules >= set(case.rules)) and not (asked.plain and case.disguised)
    ]
    if asked.target == "newel":
        return await measure(Newel(), suite, cases, asked.quick)
    async with FakeUpstream(port=asked.port) as upstream:
        target = Gateway(asked.target.rstrip("/"), upstream, {"": asked.key}, asked.model, exact=not asked.own_words)
        return await measure(target, suite, cases, asked.quick)


if __name__ == "__main__":
    raise SystemExit(0 if asyncio.run(main()) else 1)
