"""LLM Guard: its BanSubstrings scanner, alone and behind InvisibleText. It reads one string and no stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from importlib.metadata import version

import protocol
import structlog
from llm_guard import scan_prompt
from llm_guard.input_scanners import BanSubstrings, InvisibleText, Regex, get_scanner_by_name

structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))

VARIANTS = {
    "BanSubstrings": [BanSubstrings([protocol.PHRASE])],
    "InvisibleText, BanSubstrings": [InvisibleText(), BanSubstrings([protocol.PHRASE])],
}


def stopped(scanners: list[object], text: str) -> bool:
    return not all(scan_prompt(scanners, text)[1].values())


class LLMGuard:
    def about(self) -> dict[str, object]:
        return {
            "version": version("llm-guard"),
            "checks": list(VARIANTS),
            "places": [],
            "streams": [],
            "costs": ["BanSubstrings"],
            "how": "`scan_prompt` with `BanSubstrings`, as shipped (`str`, case ignored)",
        }

    def check(self, variant: str, messages: list[dict[str, str]]) -> bool:
        return stopped(VARIANTS[variant], protocol.last_user(messages))

    def stream(self, variant: str, chunks: list[str]) -> dict[str, object]:
        raise NotImplementedError

    def typos(self) -> list[dict[str, str]]:
        def scanner(name: str, **config: object) -> Callable[[], Callable[[], bool]]:
            def load() -> Callable[[], bool]:
                made = get_scanner_by_name(name, config)
                return lambda: stopped([made], f"Tell me about {protocol.PHRASE}.")

            return load

        tries = {
            "key `substring`": scanner("BanSubstrings", substring=[protocol.PHRASE]),
            "key `match_typ`": scanner("BanSubstrings", substrings=[protocol.PHRASE], match_typ="word"),
            "name `BanSubstrngs`": scanner("BanSubstrngs", substrings=[protocol.PHRASE]),
        }
        return [{"what": what, "came": protocol.outcome(load)} for what, load in tries.items()]

    def hostile(self, pattern: str, text: str) -> float:
        scanner = Regex([pattern])

        async def check() -> None:
            stopped([scanner], text)

        return asyncio.run(protocol.blocked(check))

    def cost(self, variant: str, text: str, runs: int) -> list[float]:
        return protocol.cpu(lambda: stopped(VARIANTS[variant], protocol.fresh(text)), runs)

    def cost_of_stream(self, variant: str, chunks: list[str], runs: int) -> list[float]:
        raise NotImplementedError


if __name__ == "__main__":
    protocol.serve(LLMGuard())
