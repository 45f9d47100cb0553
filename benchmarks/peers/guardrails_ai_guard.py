"""Guardrails AI: BanList from its hub on messages, a validator of one's own as its docs show one on streamed output."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version

import protocol
from guardrails_ai.ban_list import BanList

from guardrails import AsyncGuard, Guard, OnFailAction
from guardrails.settings import settings
from guardrails.validator_base import FailResult, PassResult, ValidationResult, Validator, register_validator

settings.rc.enable_metrics = False  # nothing is to be sent anywhere
REDACTED = "[SSN]"


@register_validator(name="newel/pattern", data_type="string")
class Pattern(Validator):
    """A regular expression that must not be there; the fix takes the match out."""

    def __init__(self, pattern: str, on_fail: object = None):
        super().__init__(on_fail=on_fail, pattern=pattern)
        self._pattern = re.compile(pattern)

    def validate(self, value: str, metadata: dict[str, object]) -> ValidationResult:
        if self._pattern.search(value):
            return FailResult(error_message="there it is", fix_value=self._pattern.sub(REDACTED, value))
        return PassResult()


def model(*args: object, **kwargs: object) -> str:
    return "Certainly."


class GuardrailsAI:
    def __init__(self) -> None:
        self.input = Guard().use(BanList(banned_words=[protocol.PHRASE], on_fail="exception"), on="messages")
        self.text = Guard().use(BanList(banned_words=[protocol.PHRASE], on_fail="exception"))

    def about(self) -> dict[str, object]:
        return {
            "version": version("guardrails-ai"),
            "checks": [""],
            "places": [""],
            "streams": [f"on_fail={one}" for one in ("exception", "fix", "refrain", "filter")],
            "costs": [""],
            "how": "`BanList` (hub) on messages, `exception`; a validator of one's own with the SSN pattern on streams",
        }

    def check(self, variant: str, messages: list[dict[str, str]]) -> bool:
        plain = [
            {"role": one["role"], "content": one["content"].replace("{", "{{").replace("}", "}}")} for one in messages
        ]
        try:
            return not self.input(model, messages=plain).validation_passed
        except Exception as error:
            if "failed" not in str(error):
                raise
            return True

    def stream(self, variant: str, chunks: list[str]) -> dict[str, object]:
        guard = Guard().use(Pattern(protocol.SSN, on_fail=variant.removeprefix("on_fail=")))

        def streaming(*args: object, **kwargs: object) -> Iterator[str]:
            yield from chunks

        said, note = [], ""
        try:
            outcomes = guard(streaming, messages=protocol.user("What is on file?"), stream=True)
            said.extend(outcome.validated_output or "" for outcome in outcomes)
        except Exception as error:
            note = "" if "failed" in str(error) else f"ends with {type(error).__name__}"
        return {"text": "".join(said), "note": note}

    def typos(self) -> list[dict[str, str]]:
        def using(**options: object) -> Callable[[], Callable[[], bool]]:
            def load() -> Callable[[], bool]:
                guard = Guard().use(BanList(**options))
                return lambda: self._fails(guard, f"Tell me about {protocol.PHRASE}.")

            return load

        words = [protocol.PHRASE]
        tries = {
            "key `baned_words`": using(baned_words=words, on_fail="exception"),
            "key `on_fial`": using(banned_words=words, on_fial="exception"),
            "name `excepton`": using(banned_words=words, on_fail="excepton"),
            "section `mesages`": self._elsewhere,
        }
        return [{"what": what, "came": protocol.outcome(load)} for what, load in tries.items()]

    def _elsewhere(self) -> Callable[[], bool]:
        guard = Guard().use(BanList(banned_words=[protocol.PHRASE], on_fail="exception"), on="mesages")

        def guards() -> bool:
            try:
                asked = protocol.user(f"Tell me about {protocol.PHRASE}.")
                return not guard(model, messages=asked).validation_passed
            except Exception as error:
                return "failed" in str(error)

        return guards

    def _fails(self, guard: Guard, text: str) -> bool:
        try:
            return not guard.validate(text).validation_passed
        except Exception:
            return True

    def hostile(self, pattern: str, text: str) -> float:
        guard = AsyncGuard().use(Pattern(pattern, on_fail=OnFailAction.NOOP))
        return asyncio.run(protocol.blocked(lambda: guard.validate(text)))

    def cost(self, variant: str, text: str, runs: int) -> list[float]:
        return protocol.cpu(lambda: self.text.validate(protocol.fresh(text)), runs)

    def cost_of_stream(self, variant: str, chunks: list[str], runs: int) -> list[float]:
        return protocol.cpu(lambda: self.stream("on_fail=exception", chunks), runs)


if __name__ == "__main__":
    protocol.serve(GuardrailsAI())
