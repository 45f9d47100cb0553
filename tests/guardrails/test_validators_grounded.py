import pytest

from guardrails.types import Context, Finding, Message, StreamValidator
from guardrails.validators import grounded

DOCUMENT = """
Northwind Staff Handbook, in force since 1 March 2023.

Every employee has 28 working days of annual leave, and 1,250 euros of training budget a year. Up to five days may be
carried over until 31/03 of the next year; ask Anna Lee in People Operations (people@northwind.example).

Overtime is paid at 125 % from the third hour. Requests go through https://portal.northwind.com/leave by 5 pm on
Friday. The notice period is three months. Form HR-204 is needed. The pension fund holds $2.5 million.
"""
PENGUINS = "Penguins prefer chocolate cakes over boiled vegetables."
QUESTION = "I have worked here for 12 years. Can I carry over 9 days, and does Tom Parker approve it?"
SUPPORTED = [
    "",
    "You have 28 working days of annual leave.",
    "You have 28 days of annual leave a year.",
    "The training budget is €1,250, or EUR 1250, or 1.250 euros.",
    "Five days may be carried over, 5 days at most.",
    "The handbook is in force since March 1, 2023 (2023-03-01).",
    "It has been in force since March 2023.",
    "Overtime is paid at 125% and at 125 percent.",
    "The notice period is 3 months.",
    "Send requests by 17:00 on Friday.",
    "Ask Anna Lee, or Lee Anna, in People Operations.",
    "Contact Anna Lee's desk at people@northwind.example.",
    "Use https://portal.northwind.com/leave.",
    "Form HR-204 is needed.",
    "The pension fund holds $2,500,000.",
    "After 12 years you may ask Tom Parker.",
    "1. Ask Anna Lee.\n2. Fill in the form HR-204.\n3) Step 4 follows.",
    "There are two ways, and one of them is simple.",
    "## Next Steps\n**Good To Know:** ask first.\nYour Next Step: the form.",
    "I do not know what the Handbook says about that, let me know.",
    "It is paid once a week, or twice an hour, and one day you will ask.",
    "People Operations is there 24/7.",
    "You have 5-28 days, or 5 to 28.",
    "IMPORTANT: this is NOT the form.",
    "Thank you for asking! I hope this helps.",
    "Do penguins like chocolate cakes better than vegetables?",
    "\ud800",
]
WRONG = [
    ("You have 30 days of annual leave.", "number", "30 days"),
    ("You have 28 weeks of annual leave.", "number", "28 weeks"),
    ("The training budget is €1,520.", "number", "€1,520"),
    ("The training budget is $1,250.", "number", "$1,250"),
    ("Overtime is paid at 152%.", "number", "152%"),
    ("That makes 33 days with those carried over.", "number", "33 days"),
    ("The notice period is four months.", "number", "four months"),
    ("The notice period is 3-9 months.", "number", "9 months"),
    ("The notice period is 3 to 90 months.", "number", "90 months"),
    ("The notice period is one week.", "number", "one week"),
    ("The notice period is two weeks.", "number", "two weeks"),
    ("Send requests by 6 pm on Friday.", "number", "6 pm"),
    ("Send requests by 15:00 on Friday.", "number", "15:00"),
    ("The pension fund holds $2.5 billion.", "number", "$2.5 billion"),
    ("In force since 2 March 2023.", "date", "2 March 2023"),
    ("In force since March 2022.", "date", "March 2022"),
    ("In force since 2023-03-11.", "date", "2023-03-11"),
    ("Send requests on Monday.", "date", "Monday"),
    ("Ask Anna Smith in People Operations.", "name", "Anna Smith"),
    ("Please ask Bob Miller about that.", "name", "Bob Miller"),
    ("Form HR-240 is needed.", "name", "HR-240"),
    ("The FMLA says so.", "name", "FMLA"),
    ("Write to hr@northwind.example.", "link", "hr@northwind.example"),
    ("Use https://portal.northwind.com/pay.", "link", "https://portal.northwind.com/pay"),
    ("See www.evil.com for more.", "link", "www.evil.com"),
    (PENGUINS, "unsupported", PENGUINS),
]  # fmt: skip


def context(*messages: Message, grader=None) -> Context:
    return Context((*messages, Message("tool", DOCUMENT), Message("user", QUESTION)), grader)


async def found(text: str, where: Context | None = None, **options) -> list[tuple[str, str]]:
    validator = grounded.build(grounded.Options(**options))
    return [(one.label, text[one.start : one.end]) for one in await validator.find(text, where or context())]


@pytest.mark.parametrize("text", SUPPORTED)
async def test_what_the_documents_or_the_question_say_passes(text):
    assert await found(text) == []


@pytest.mark.parametrize(("text", "label", "what"), WRONG)
async def test_what_they_do_not_say_is_found_at_its_place(text, label, what):
    assert await found(text) == [(label, what)]


@pytest.mark.parametrize("text", [*SUPPORTED, *(text for text, _, _ in WRONG)])
async def test_sentence_by_sentence_the_same_is_found(text):
    whole = "You have 28 days of annual leave.\n" + text + "\nAsk Anna Lee."
    parts = [part.group() for part in grounded.SENTENCE.finditer(whole)]
    assert [one for part in parts for one in await found(part)] == await found(whole)


@pytest.mark.parametrize(
    ("messages", "sources", "expected"),
    [
        ((Message("tool", DOCUMENT),), ["tool"], []),
        ((Message("system", DOCUMENT),), ["system"], []),
        ((Message("developer", DOCUMENT),), ["tool", "system"], []),
        ((Message("user", f"<document id=1>{DOCUMENT}</document> How many?"),), ["marked"], []),
        ((Message("user", f"<document>\n{DOCUMENT}"),), ["marked"], []),
        ((Message("tool", "Bread costs 3 euros."), Message("system", DOCUMENT)), ["tool"], [("number", "28 days")]),
        ((Message("assistant", DOCUMENT), Message("tool", "Bread.")), ["tool"], [("number", "28 days")]),
    ],
)
async def test_documents_are_where_the_sources_say(messages, sources, expected):
    where = Context((*messages, Message("user", "How many?")))
    assert await found("You have 28 days.", where, sources=sources) == expected


async def test_the_policys_persona_can_be_a_document():
    where = Context((Message("user", "How many?"),), persona=DOCUMENT)
    assert await found("You have 30 days.", where, sources=["persona"]) == [("number", "30 days")]


async def test_without_documents_nothing_is_found_unless_they_are_required():
    where = Context((Message("user", "How many?"),))
    assert await found("You have 30 days, says Bob Miller.", where) == []
    assert await found("You have 30 days.", where, require=True) == [("unsupported", "You have 30 days.")]


async def test_what_is_checked_and_known_and_supported_are_options():
    assert await found("Ask Bob Miller for 30 days.", check=["name"]) == [("name", "Bob Miller")]
    assert await found("Ask Bob Miller for 30 days.", known=["Bob Miller", "30 days"]) == []
    assert await found(WRONG[-1][0], support=0) == []


class Scripted:
    """A grader that says one thing and remembers what it was asked."""

    def __init__(self, probability: float):
        self.asked: list[str] = []
        self._probability = probability

    async def probability(self, messages):
        self.asked.append(messages[-1].content)
        return self._probability


DOUBTFUL = "Annual leave of an employee doubles after marriage or childbirth."


async def test_a_model_is_asked_about_sentences_in_doubt_and_scores_them():
    model = Scripted(0.25)
    validator = grounded.build(grounded.Options(ask=True))
    text = f"You have 28 days. {DOUBTFUL}"
    findings = await validator.find(text, context(grader=model))
    assert findings == [Finding("unsupported", 18, len(text), 0.75, "asked")]
    assert DOUBTFUL in model.asked[0]
    assert "28 working days" in model.asked[0]


async def test_it_is_asked_so_many_questions_and_none_where_that_is_off():
    model = Scripted(0.25)
    text = f"{DOUBTFUL} " * 30
    assert len(await grounded.build(grounded.Options(ask=True, questions=3)).find(text, context(grader=model))) == 3
    assert await grounded.build(grounded.Options()).find(text, context(grader=model)) == []
    assert len(model.asked) == 3


def test_a_doubt_below_the_support_is_refused():
    with pytest.raises(ValueError, match="doubt: it must be above support"):
        grounded.build(grounded.Options(ask=True, support=0.6, doubt=0.5))


async def test_long_texts_with_many_findings_are_read_whole():
    assert len(await found("It costs 77 euros today. " * 5_000)) == 5_000


def test_it_needs_the_conversation_and_so_the_whole_text():
    assert not isinstance(grounded.build(grounded.Options()), StreamValidator)
