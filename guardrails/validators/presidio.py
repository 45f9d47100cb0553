"""Names, places and whatever else Presidio knows, by a language model of spaCy: an optional extra, heavy and inexact.

Nothing is loaded from a network: a model that is not installed is an error that says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field

from guardrails.types import Context, Finding


class Options(BaseModel):
    """What to look for, and with what."""

    model_config = ConfigDict(extra="forbid")
    entities: list[str] = Field(
        default=["PERSON", "LOCATION"],
        min_length=1,
        description="What to find, by Presidio's names; the labels are these in small letters.",
    )
    language: str = Field(default="en", pattern="^[a-z]{2}$", description="The language of the texts (ISO 639-1).")
    model: str = Field(
        default="en_core_web_sm", min_length=1, description="The installed package, or the folder, of a spaCy model."
    )


class Result(Protocol):
    """What Presidio found."""

    entity_type: str
    start: int
    end: int
    score: float


class Analyzer(Protocol):
    """The part of Presidio's analyzer that is used."""

    def analyze(self, text: str, language: str, entities: list[str]) -> Sequence[Result]:
        """What was found in the text."""
        ...


class Presidio:
    """A validator that asks Presidio, aside from the event loop; it reads whole texts."""

    def __init__(self, analyzer: Analyzer, options: Options):
        self._analyzer, self._options = analyzer, options

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        """The findings in the order of their start."""
        found = await asyncio.to_thread(self._analyzer.analyze, text, self._options.language, self._options.entities)
        findings = [Finding(one.entity_type.lower(), one.start, one.end, one.score) for one in found]
        return sorted(findings, key=lambda finding: finding.start)


def build(options: Options) -> Presidio:
    """The validator; raises ValueError, with what to install, where Presidio or the model is missing."""
    try:
        presidio, engines = import_module("presidio_analyzer"), import_module("presidio_analyzer.nlp_engine")
        is_package = import_module("spacy").util.is_package
    except ImportError as error:
        raise ValueError(f"Presidio is not installed ({error}): pip install 'newel[presidio]'") from None
    if not (is_package(options.model) or Path(options.model).is_dir()):
        raise ValueError(
            f"model: the spaCy model {options.model!r} is not installed: pip install it, or name its folder"
        )
    models = [{"lang_code": options.language, "model_name": options.model}]
    engine = engines.NlpEngineProvider(nlp_configuration={"nlp_engine_name": "spacy", "models": models}).create_engine()
    analyzer = presidio.AnalyzerEngine(nlp_engine=engine, supported_languages=[options.language])
    if unknown := set(options.entities) - set(analyzer.get_supported_entities(options.language)):
        raise ValueError(f"entities: Presidio does not know {', '.join(sorted(unknown))} in {options.language!r}")
    return Presidio(analyzer, options)
