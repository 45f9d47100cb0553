"""NeMo Guardrails: its regex rails on input and output, a scripted model behind them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version

import protocol
from nemoguardrails import LLMRails, RailsConfig
from nemoguardrails.guardrails.iorails import IORails
from nemoguardrails.rails.llm.options import RailStatus, RailType
from nemoguardrails.testing import FakeLLMModel

logging.disable(logging.CRITICAL)

CONFIG = r"""
models:
  - {{type: main, engine: openai, model: scripted}}
rails:
  config:
    regex_detection:
      input: {{patterns: ['{pattern}'], case_insensitive: true}}
      output: {{patterns: ['{ssn}']}}
  input: {{flows: [regex check input]}}
  output:
    flows: [regex check output]
    streaming: {{enabled: true{streaming}}}
"""
STREAMING = {"as shipped": "", "stream_first: false": ", stream_first: false"}


def config(pattern: str = protocol.PATTERN, streaming: str = "") -> str:
    return CONFIG.format(pattern=pattern, ssn=protocol.SSN, streaming=streaming)


def rails(text: str) -> LLMRails:
    return LLMRails(RailsConfig.from_content(yaml_content=text), llm=FakeLLMModel(["Certainly."] * 100_000))


async def reply(guard: LLMRails, messages: list[dict[str, str]]) -> str:
    return (await guard.generate_async(messages=[dict(message) for message in messages]))["content"]


class Nemo:
    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        self.guards = {name: rails(config(streaming=option)) for name, option in STREAMING.items()}
        self.fast = IORails(RailsConfig.from_content(yaml_content=config()))

    def about(self) -> dict[str, object]:
        return {
            "version": version("nemoguardrails"),
            "checks": [""],
            "places": [""],
            "streams": list(STREAMING),
            "costs": ["LLMRails", "IORails"],
            "how": "`regex check input` / `output`, `case_insensitive`; `LLMRails.generate_async`, `stream_async`",
        }

    def check(self, variant: str, messages: list[dict[str, str]]) -> bool:
        return self.loop.run_until_complete(reply(self.guards["as shipped"], messages)) != "Certainly."

    def stream(self, variant: str, chunks: list[str]) -> dict[str, object]:
        return {"text": self.loop.run_until_complete(self._stream(variant, chunks))}

    async def _stream(self, variant: str, chunks: list[str]) -> str:
        async def model() -> AsyncIterator[str]:
            for chunk in chunks:
                yield chunk

        guard = self.guards[variant]
        pieces = guard.stream_async(messages=protocol.user("What is on file?"), generator=model())
        return "".join([piece async for piece in pieces])

    def typos(self) -> list[dict[str, str]]:
        good = config()
        changed = {
            "section `inptu:`": good.replace("\n  input: {flows", "\n  inptu: {flows"),
            "key `flow:`": good.replace("{flows: [regex check input]", "{flow: [regex check input]"),
            "key `pattern:`": good.replace("input: {patterns:", "input: {pattern:"),
            "name `regex chek input`": good.replace("regex check input", "regex chek input"),
        }
        return [{"what": what, "came": protocol.outcome(self._loader(text))} for what, text in changed.items()]

    def _loader(self, text: str) -> Callable[[], Callable[[], bool]]:
        def load() -> Callable[[], bool]:
            guard = rails(text)
            asked = protocol.user(f"Tell me about {protocol.PHRASE}.")
            return lambda: self.loop.run_until_complete(reply(guard, asked)) != "Certainly."

        return load

    def hostile(self, pattern: str, text: str) -> float:
        guard = rails(config(pattern))
        return self.loop.run_until_complete(protocol.blocked(lambda: reply(guard, protocol.user(text))))

    def cost(self, variant: str, text: str, runs: int) -> list[float]:
        guard = self.fast if variant == "IORails" else self.guards["as shipped"]

        async def check() -> None:
            result = await guard.check_async(protocol.user(protocol.fresh(text)), rail_types=[RailType.INPUT])
            assert result.status is RailStatus.PASSED, result

        return protocol.cpu(lambda: self.loop.run_until_complete(check()), runs)

    def cost_of_stream(self, variant: str, chunks: list[str], runs: int) -> list[float]:
        return [] if variant == "IORails" else protocol.cpu(lambda: self.stream("as shipped", chunks), runs)


if __name__ == "__main__":
    protocol.serve(Nemo())
