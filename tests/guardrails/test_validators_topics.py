import pytest

from guardrails.spans import Spans
from guardrails.types import Context, StreamValidator
from guardrails.validators import topics

PAY = topics.Topic(name="pay", words=["salary", "raise", "annual bonus", "fire", "die", "discriminat*", "C++", "leave"])
SIMPLE = topics.Options(topics=[PAY, topics.Topic(name="boss", words=["my boss"])])
TEXTS = [
    "Salaries, SALARY'S and salary.",
    "She was fired; they are firing, dying and raising leaves.",
    "annual\n bonuses of discrimination in C++",
    "My bosses said raise",
    "salaryman firefly biannual bonus undie discrimina leaveless C+",
]


async def found(options: topics.Options, text: str) -> list[tuple[str, str]]:
    findings = await topics.build(options).find(text, Context())
    return [(one.label, text[one.start : one.end]) for one in findings]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Salaries, SALARY’S and salary.", ["Salaries", "SALARY’S", "salary"]),
        ("fired, firing, fires, dying, dies", ["fired", "firing", "fires", "dying", "dies"]),
        ("annual\n bonuses, annual-bonus", ["annual\n bonuses", "annual-bonus"]),
        ("discrimination and discriminated", ["discrimination", "discriminated"]),
        ("C++ or c++", ["C++", "c++"]),
        ("salaryman, firefly, biannual bonus, undie, leaveless, C+, annual big bonus", []),
    ],
)
async def test_words_are_found_whole_in_any_case_and_form(text, expected):
    assert await found(SIMPLE, text) == [("pay", word) for word in expected]


async def test_other_forms_are_left_alone_when_asked_for():
    exact = topics.Options(topics=[topics.Topic(name="pay", words=["salary"])], inflect=False)
    assert await found(exact, "salaries and Salary") == [("pay", "Salary")]


def test_plain_topics_can_be_judged_in_a_stream_and_bound_ones_cannot():
    bound = topics.Options(topics=[PAY, topics.Topic(name="x", words=["raise"], unless=["ask for a raise"])])
    assert isinstance(topics.build(SIMPLE), Spans)
    assert not isinstance(topics.build(bound), StreamValidator)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("How do I ask for a raise?", []),
        ("Asking for a raise: how?", []),
        ("Give me a raise!", [("pay", "raise")]),
        ("How do I ask for a raise? And who got a raise last year?", [("pay", "raise")]),
        ("Who earned 3.5 raises more? I ask for a raise", [("pay", "raises")]),
    ],
)
async def test_unless_lets_its_own_sentence_pass_and_no_other(text, expected):
    options = topics.Options(topics=[topics.Topic(name="pay", words=["raise"], unless=["ask for a raise"])])
    assert await found(options, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is the salary of my colleague?", [("pay", "salary")]),
        ("My colleague Bob is nice. Tell me his salary.", [("pay", "salary")]),
        ("What is the salary of an engineer?", []),
        ("My colleague is nice. What is the salary of an engineer?", []),
    ],
)
async def test_also_needs_a_word_of_every_group_somewhere(text, expected):
    pay = topics.Topic(name="pay", words=["salary"], also=[["colleague", "manager"], ["tell", "of my"]])
    assert await found(topics.Options(topics=[pay]), text) == expected


def test_words_without_a_letter_are_refused():
    with pytest.raises(ValueError, match=r"'-- !' has no letter or digit"):
        topics.build(topics.Options(topics=[topics.Topic(name="x", words=["fine", "-- !"])]))


BOUND = topics.Options(
    topics=[topics.Topic(name="pay", words=["raise"], also=[["his", "her"]], unless=["ask for a raise"])]
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("\ud800 his raise", 1),
        ("his raise \udfff? Ask for a raise!", 1),
        ("raise. Ask for a raise and a raise. His raise", 2),
        ("He got his raise. " * 50_000, 50_000),
        ("His raise? I ask for a raise. " * 20_000, 20_000),
        ("his " * 200_000 + "raise, ask for a raise", 0),
        ("his. " * 200_000 + "raise", 1),
    ],
    ids=range(8),
)
async def test_long_and_broken_texts_are_read_whole(text, expected):
    assert len(await found(BOUND, text)) == expected
