import pytest
from pydantic import ValidationError

from guardrails.types import Context
from guardrails.validators import mentions

OPTIONS = mentions.Options(
    names=[
        mentions.Name(name="Burger Barn", aliases=["BB Grill", "burgerbarn.example"]),
        mentions.Name(name="Apple", unless=["Big Apple", "apple pie", "Apple Street"], as_written=True),
        mentions.Name(name="Hart & Lowe"),
        mentions.Name(name="Yo!"),
    ]
)
HITS = [
    ("Try Burger Barn.", [("Burger Barn", "Burger Barn")]),
    ("burger barn is better", [("Burger Barn", "burger barn")]),
    ("Burger\nBarn", [("Burger Barn", "Burger\nBarn")]),
    ("Burger-Barn, BurgerBarn", [("Burger Barn", "Burger-Barn"), ("Burger Barn", "BurgerBarn")]),
    ("Burger Barn's fries", [("Burger Barn", "Burger Barn")]),
    ("Burger Barn’s fries", [("Burger Barn", "Burger Barn")]),
    ("bb grill!", [("Burger Barn", "bb grill")]),
    ("see www.burgerbarn.example/menu", [("Burger Barn", "burgerbarn.example")]),
    ("#BurgerBarn @burgerbarn", [("Burger Barn", "BurgerBarn"), ("Burger Barn", "burgerbarn")]),
    ("Apple makes phones", [("Apple", "Apple")]),
    ("Apple's pie chart", [("Apple", "Apple")]),
    ("the Big Apple and Apple", [("Apple", "Apple")]),
    ("Hart and Lowe, Hart&Lowe", [("Hart & Lowe", "Hart and Lowe"), ("Hart & Lowe", "Hart&Lowe")]),
    ("at yo!", [("Yo!", "yo!")]),
]
NEAR_MISSES = [
    "",
    "a burger from the barn",
    "Burger Barnaby",
    "SuperBurger Barn",
    "an apple a day",
    "apples and pears",
    "APPLE",
    "the Big Apple",
    "Apple Pie with cream",
    "12 Apple Street",
    "Pineapple",
    "Hart or Lowe",
    "Hartford & Lowell",
    "Lowe & Hart",
    "yo, what's up",
    "\ud800",
]
TEXTS = [*(text for text, _ in HITS), *NEAR_MISSES]


async def found(text: str) -> list[tuple[str, str]]:
    return [(one.label, text[one.start : one.end]) for one in await mentions.build(OPTIONS).find(text, Context())]


@pytest.mark.parametrize(("text", "expected"), HITS)
async def test_names_are_found_as_people_write_them(text, expected):
    assert await found(text) == expected


@pytest.mark.parametrize("text", NEAR_MISSES)
async def test_near_misses_pass(text):
    assert await found(text) == []


def test_an_excuse_without_the_name_is_refused():
    with pytest.raises(ValueError, match="names: unless: 'orchard' has no name of 'Apple' in it"):
        mentions.build(mentions.Options(names=[mentions.Name(name="Apple", unless=["orchard"])]))


def test_a_name_that_cannot_be_looked_for_is_refused():
    with pytest.raises(ValueError, match="names: '!!' has no letter or digit"):
        mentions.build(mentions.Options(names=[mentions.Name(name="!!")]))
    with pytest.raises(ValidationError):
        mentions.Options(names=[])
