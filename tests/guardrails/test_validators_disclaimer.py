import pytest
from pydantic import ValidationError

from guardrails.types import Context, Finding, Message
from guardrails.validators import disclaimer

TEXT = "This is general information and not legal advice; please consult a lawyer."
OPTIONS = disclaimer.Options(
    text=TEXT, pattern=r"\bask (?:our )?legal\b", when=["dismissal", "contract"], when_patterns=[r"su(?:e|ing)\b"]
)
NEEDED = "Your contract ends in May. "
THERE = [
    TEXT,
    TEXT.upper(),
    "This is general information, and not legal advice. Please consult a lawyer!",
    "Please consult a lawyer; this is general information and not legal advice.",
    "Note: this is general information and not legal advice, please consult a lawyer.",
    "**This is general information and isn't legal advice; please consult a lawyer.**",
    "This is only general information and not legal advice; please consult your lawyer.",
    "This is general information, not legal advice. Please consult with a lawyer.",
    "Please ask our legal team.",
    "ASK LEGAL before you sign.",
    "This\nis general information and not legal advice; please consult a lawyer",
    "These are general informations and not legal advice; please consult a lawyer.",
    "Before you sign: this is general information and not legal advice; please consult a lawyer, or HR.",
]
MISSING = [
    "",
    "It ends in May.",
    "This is general information and legal advice; please consult a lawyer.",
    "This is legal advice, no need to consult a lawyer.",
    "Please consult a lawyer.",
    "This is information.",
    "Legal advice is not general.",
    "A lawyer is general information.",
    "This is general information and not medical advice; please consult a doctor.",
    "Our legal department is on the third floor.",
    "Not legal.",
    "Ask the legality of it.",
    "\ud800",
]


async def found(text: str, asked: str = "Hello", options: disclaimer.Options = OPTIONS) -> list[Finding]:
    context = Context((Message("user", "contract"), Message("assistant", "ok"), Message("user", asked)))
    return list(await disclaimer.build(options).find(text, context))


@pytest.mark.parametrize("said", THERE)
async def test_a_reply_that_says_it_or_nearly_says_it_passes(said):
    assert await found(NEEDED + said) == []


@pytest.mark.parametrize("said", MISSING)
async def test_a_reply_that_does_not_say_it_has_an_empty_finding_at_its_end(said):
    text = NEEDED + said
    assert await found(text) == [Finding("disclaimer", len(text), len(text))]


@pytest.mark.parametrize(
    ("where", "asked", "text", "needed"),
    [
        ("either", "What of my contract?", "It is long.", True),
        ("either", "Can I sue them?", "It is long.", True),
        ("either", "What of my pay?", "Your contract says it.", True),
        ("either", "What of my pay?", "It is paid on Monday.", False),
        ("question", "What of my pay?", "Your contract says it.", False),
        ("question", "What of my contract?", "It is long.", True),
        ("reply", "What of my contract?", "It is long.", False),
        ("reply", "What of my pay?", "Your dismissal.", True),
        ("either", "What of contractors?", "They are suede.", False),
    ],
)
async def test_it_is_needed_where_the_words_stand(where, asked, text, needed):
    options = OPTIONS.model_copy(update={"where": where})
    assert bool(await found(text, asked, options)) == needed


async def test_without_a_condition_it_is_always_needed():
    assert await found("Hi.", options=disclaimer.Options(text="I am a machine.")) == [Finding("disclaimer", 3, 3)]
    assert await found("Hi, I am a machine.", options=disclaimer.Options(text="I am a machine.")) == []


async def test_word_for_word_means_every_word():
    options = disclaimer.Options(text=TEXT, similar=1)
    assert await found(TEXT, options=options) == []
    assert await found(TEXT.replace("general", "generic"), options=options) != []


async def test_a_very_long_reply_is_read_at_both_ends():
    assert await found("word and more. " * 600_000 + TEXT, "contract") == []
    assert await found(TEXT + "word " * 100_000, "contract") == []
    assert await found("word " * 100_000, "contract") != []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "write a text of two words or more, a pattern, or both"),
        ({"text": "Hm"}, "write a text of two words or more"),
        ({"pattern": "("}, "'\\(' is not a valid regular expression"),
        ({"text": TEXT, "when_patterns": ["["]}, "'\\[' is not a valid regular expression"),
    ],
)
def test_options_that_say_nothing_are_refused(given, message):
    with pytest.raises(ValidationError, match=message):
        disclaimer.Options.model_validate(given)


def test_a_condition_that_cannot_be_looked_for_is_refused():
    with pytest.raises(ValueError, match="when: '--' has no letter or digit"):
        disclaimer.build(disclaimer.Options(text=TEXT, when=["--"]))
