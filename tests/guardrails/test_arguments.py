"""JSON that grows: as plain as it can be, the same for any pieces, and JSON still where something was redacted."""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardrails.arguments import Arguments, plain


def fed(text: str, cuts: list[int]) -> str:
    arguments = Arguments()
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return "".join(arguments.feed(text[a:b]) for a, b in pairwise(places)) + arguments.finish()


PLAIN = [
    (r'{"a": "\u0073alary"}', '{"a": "salary"}'),
    (r'"http:\/\/x"', '"http://x"'),
    (r'"\u00e9 \u4e2d"', '"é 中"'),
    (r'"\ud83d\ude00 \uD83D\uDE00"', '"😀 😀"'),
    (r'"\u0022 \u005c \u000a \u0001"', r'"\" \\ \n \u0001"'),
    (r'"\\u0073 \\\u0073"', r'"\\u0073 \\s"'),
    (r'"\n \t \" \\"', r'"\n \t \" \\"'),
    (r'"\ud83d \ude00 \ud83dx"', r'"\ud83d \ude00 \ud83dx"'),
    (r'"\x \u00"', r'"\x \u00"'),
    ("\\", "\\"),
    (r"\u00", r"\u00"),
    (r'"\ud83d\ud', r'"\ud83d\ud'),
    ("🦅", "🦅"),
    ("", ""),
]


@pytest.mark.parametrize(("written", "read"), PLAIN)
def test_escapes_are_undone_where_json_allows(written: str, read: str) -> None:
    assert fed(written, []) == read
    with suppress(json.JSONDecodeError):
        assert json.loads(written) == json.loads(read)


ESCAPED = st.lists(st.sampled_from([*'"\\/untabx09{}:, ', "\\u0073", "\\ud83d", "\\ude00", "\\u0022", "😀", "\ud83e"]))


@given(ESCAPED.map("".join), st.lists(st.integers(0, 99), max_size=6))
def test_the_text_is_the_same_for_any_pieces(text: str, cuts: list[int]) -> None:
    assert fed(text, cuts) == fed(text, [])


def test_halves_of_a_character_are_one() -> None:
    arguments = Arguments()
    assert [arguments.feed(half) for half in ("\ud83e", "\udd85")] == ["", "🦅"]
    arguments = Arguments()
    assert arguments.feed("\ud83e") + arguments.finish() == "\ud83e"


@given(st.recursive(st.none() | st.text() | st.integers(), lambda inner: st.dictionaries(st.text(), inner)))
def test_json_stays_what_it_says(value: object) -> None:
    for escaped in (True, False):
        written = json.dumps(value, ensure_ascii=escaped)
        assert json.loads(fed(written, [3, 5, 9])) == value
        with suppress(UnicodeEncodeError):
            plain(written).encode()
            assert json.loads(plain(written)) == value


TEXT = r'{"a":"x\nann@x.com","n":4111,"q":"z\"q","e":"\u0001"}'


@pytest.mark.parametrize(
    ("span", "becomes"),
    [
        ("ann@x.com", {"a": 'x\n["E]', "n": 4111, "q": 'z"q', "e": "\1"}),
        ("nann@x.com", {"a": 'x\n["E]', "n": 4111, "q": 'z"q', "e": "\1"}),
        (r"x\nann@x.com", {"a": '["E]', "n": 4111, "q": 'z"q', "e": "\1"}),
        ("x\\", {"a": '["E]\nann@x.com', "n": 4111, "q": 'z"q', "e": "\1"}),
        ("4111", {"a": "x\nann@x.com", "n": '["E]', "q": 'z"q', "e": "\1"}),
        ('ann@x.com","n":4111', {"a": 'x\n["E]', "q": 'z"q', "e": "\1"}),
        ("z\\", {"a": "x\nann@x.com", "n": 4111, "q": '["E]"q', "e": "\1"}),
        ('"q', {"a": "x\nann@x.com", "n": 4111, "q": 'z"["E]', "e": "\1"}),
        ("001", {"a": "x\nann@x.com", "n": 4111, "q": 'z"q', "e": '\1["E]'}),
        ("u00", {"a": "x\nann@x.com", "n": 4111, "q": 'z"q', "e": '\1["E]\1'}),
    ],
)
def test_what_is_redacted_leaves_json(span: str, becomes: object) -> None:
    start = TEXT.rindex(span) if span == '"q' else TEXT.index(span)
    end = start + len(span)
    arguments = Arguments()
    assert arguments.feed(TEXT, final=True) == TEXT
    written = arguments.placeholder('["E]', start, end)
    with suppress(json.JSONDecodeError):
        assert json.loads(TEXT[:start] + written + TEXT[end:]) == becomes
        return
    raise AssertionError(TEXT[:start] + written + TEXT[end:])


def test_arguments_that_were_written_otherwise_are_the_same() -> None:
    assert plain('{ "a" : 1,\n "b": "\\u00e9" }') == plain('{"a":1,"b":"é"}') == '{"a":1,"b":"é"}'
    assert plain('{"a": 1, "a": 2}') == '{"a":2}'


@pytest.mark.parametrize("text", ["", "no JSON", '{"a": 1', '"\\ud800"', "[" * 100_000])
def test_what_is_no_json_keeps_its_form(text: str) -> None:
    assert plain(text) == text
