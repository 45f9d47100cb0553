import pytest
from pydantic import ValidationError

from guardrails.types import Context, Finding
from guardrails.validators import length


def at(place: int) -> Finding:
    return Finding("length", place, place)


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({"max_chars": 5}, "12345", []),
        ({"max_chars": 5}, "123456", [at(5)]),
        ({"max_chars": 5}, "👩‍👩‍👧!", [at(5)]),
        ({"max_chars": 5}, "", []),
        ({"max_chars": 2}, "\ud800\udfff\ud800", [at(2)]),
        ({"max_words": 100_000}, "a " * 5_000_000, [at(200_000)]),
        ({"max_words": 2}, "one  two ", []),
        ({"max_words": 2}, "one  two \nthree four", [at(10)]),
        ({"max_words": 2}, "  one-and-a-half two", []),
        ({"max_words": 1, "max_chars": 6}, "one     two", [at(6), at(8)]),
    ],
)
async def test_a_text_beyond_a_limit_has_an_empty_finding_where_it_goes_on(options, text, expected):
    assert await length.build(length.Options(**options)).find(text, Context()) == expected


@pytest.mark.parametrize(
    ("options", "text", "clear"),
    [
        ({"max_chars": 5}, "12345", True),
        ({"max_chars": 5}, "123456", False),
        ({"max_words": 2}, "a b", True),
        ({"max_words": 2}, "a b c", False),
        ({"max_words": 2, "max_chars": 2}, "a b", False),
    ],
)
def test_a_text_that_is_short_enough_is_told_without_being_read(options, text, clear):
    assert length.build(length.Options(**options)).clears(text) is clear


def test_a_stream_may_show_the_text_up_to_the_limit():
    (reading,) = length.build(length.Options(max_chars=5)).readings()
    assert reading.read("12345", False) == ([], 5)
    assert reading.read("1234567", False) == ([at(5)], 7)
    assert reading.read("12345678", True) == ([], 8)


def test_a_rule_without_a_limit_is_refused():
    with pytest.raises(ValidationError, match="set max_chars, max_words or both"):
        length.Options()
