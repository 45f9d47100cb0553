"""Views: one plain rule sees a phrase in its disguises, and what it finds is cut out of the original, exactly."""

from __future__ import annotations

import base64

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from guardrails.engine import judge
from guardrails.spans import Span, Spans
from guardrails.types import BROKEN_REPLY, Action, Rule
from guardrails.views import MOST, View, Views
from guardrails.views.ordinary import ALL as ALL_STAGES
from tests.conformance.disguises import DISGUISES, FRAME, HONEST, MORE, PATTERN, PHRASE, framed

ALL = {**DISGUISES, **MORE}
RULE = Rule("falcon", Spans([Span("falcon", f"(?i:{PATTERN})")]), Action.REDACT, placeholder="[X]")
PIECES = (
    *(disguise(PHRASE) for disguise in ALL.values()),
    *HONEST.values(),
    *(" ", "  ", "\n", ".", "-", "_", "'", '"', "4", "1!", "a b", "s a l", "%20", "&amp;", "\\x41", "<b>", "</b>", "é"),
    *("e\u0301", "\u200b", "🙂", "\ufe0f", "==", "7072", "QUJD"),
    *("noclaf", "\u202e", "\u202c", "12 34 56 78 90", ".-", "...", "i", '"+"', "\ud83d", "\udd25", "漢字", "नमस्ते"),
)
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join) | st.text(max_size=40)


def made(text: str) -> Views:
    views = Views()
    views.grow(text, True)
    return views


def every_view(views: Views) -> tuple[View, ...]:
    """The views but for the raw one; of an ordinary text they are made now."""
    if not views._full:
        views._make()
    return views._made


def shown(views: Views) -> list[tuple[object, ...]]:
    """Everything that a reader can be told of views."""

    def places(view: View) -> list[tuple[int, int]]:
        return [view.origin(i, i + 1) for i in range(len(view.text))]

    every = (views.raw, *every_view(views))
    return [(one.name, one.same, one.shown, one.text, places(one)) for one in every]


@pytest.mark.parametrize("name", ALL)
async def test_one_plain_rule_finds_every_disguise(name: str) -> None:
    disguised = framed(ALL[name](PHRASE))
    verdict = await judge([RULE], disguised)
    assert verdict.action is Action.REDACT
    before, after = FRAME.split("{}")
    assert verdict.text.startswith(before) and verdict.text.endswith(after)
    left = verdict.text.removeprefix(before).removesuffix(after)
    assert regex.sub(r"</?b>|[\W\p{M}_]", "", left) == "X"


@pytest.mark.parametrize("name", HONEST)
async def test_honest_text_is_left_alone(name: str) -> None:
    verdict = await judge([RULE], HONEST[name])
    assert (verdict.action, verdict.text) == (Action.ALLOW, HONEST[name])


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("the (pr0ject f4lcon), yes", "the ([X]), yes"),
        ("<b>project</b> <i>falcon</i>!", "<b>[X]</i>!"),
        ("see cHJvamVjdCBmYWxjb24= there", "see [X] there"),
        ("a pro\u200bject fal\u00adcon.", "a [X]."),
        ("'pro'+'ject fal' + 'con'", "'[X]'"),
        ("PROJECT%20FALCON/index", "[X]/index"),
        ("p r o j e c t  f a l c o n is it", "[X] is it"),
        ("projeсt fаlcon", "[X]"),
        ("-project_falcon-", "-[X]-"),
        ("🔥\u200dproject falcon\ufe0f!", "🔥\u200d[X]\ufe0f!"),
        ("&lt;project falcon&gt;", "&lt;[X]&gt;"),
        (". --- --.. / .--. .-. --- .--- . -.-. - / ..-. .- .-.. -.-. --- -. x", None),
        ("01110000 01110010 01101111 01101010 01100101 01100011 01110100 00100000 01100110 01100001 01101100 01100011 "
         "01101111 01101110", "[X]"),
        ("112 114 111 106 101 99 116 32 102 97 108 99 111 110", "[X]"),
        ("OBZG62TFMN2CAZTBNRRW63Q=", "[X]"),
        ("tcejorp noclaf", "[X]"),
        ("project\r\n  falcon", "[X]"),
        ("project\\nfalcon", "[X]"), ("see project\\t\\u0066alcon", "see [X]"), ("pr\\\\u006fject falcon", "[X]"),
    ],
)  # fmt: skip
async def test_what_is_found_is_cut_out_of_the_original(text: str, redacted: str | None) -> None:
    verdict = await judge([RULE], text)
    if redacted is None:
        assert "[X]" in verdict.text
    else:
        assert verdict.text == redacted


@pytest.mark.parametrize(
    "text",
    [
        "A projection of falcons.", "The pr0jects falconer", "reproject falconry", "Covid19 and mp3 at 3rd place",
        "1337 4 5 6", "well-being, and/or e.g. co-op", "don't won't can’t",
        "The hash is d41d8cd98f00b204e9800998ecf8427e",
        "dGhpcyBpcyBhbm90aGVyIHRleHQ= is some other text", "I do not live there; evil deeds",
        "C:\\new\\project\\temp and falcon", "\\nabla \\text{project} \\rho falcon",
    ],
)  # fmt: skip
async def test_near_misses_are_left_alone(text: str) -> None:
    assert (await judge([RULE], text)).action is Action.ALLOW


@settings(max_examples=400, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 9), min_size=1, max_size=9))
def test_views_are_the_same_for_any_chunking(text: str, sizes: list[int]) -> None:
    views, end, n = Views(), 0, 0
    while end < len(text):
        end += sizes[n % len(sizes)] + (not any(sizes))
        views.grow(text[:end], False)
        n += 1
    views.grow(text, True)
    assert shown(views) == shown(made(text))


PLAIN = (
    *("How", "does", "our", "plan", "for", "the", "raise", "in", "March", "work?", "Yes,", "it", "is", "5", "or",),
    *("10", "of", "them.", "I", "have", "a", "well-known", "friend's", "idea",),
    *("3pm", "10am", "2nd", "mp3", "C++", "a+1", "R&D", "and/or", "U.S.", "a_b", "x!", "1!2", "a1_", "a1!2", "_",),
    *("“so”",),
    *("don’t", "—", "–", "café", "naïve", "…", "€5", "£", "½", "\x1c", "\x85", "\u2028", "\u00a0", "\t", "\r\n",),
    *("\f",),
    *("workplace", "yourself", "deadline", "cHJvamVjdA", "cHJvamVjdCBmYWxjb24", "0J/RgNC40LLQtdGC",),
    *("aGk/aGVsbG8gd29ybGQgeW8",),
    *("be ad ca fe 12 34", "ab-cd-ef-12-34", "0x70 72 6f 6a 65", "12 34 56", "99, 100", "decade", "deadbeefcafe",),
    *("facade",),
    *("01110000 01110010", "abcdefghijklmnopqrst", "mzuwy3dpnyqgs4za", "%", "%2", "50%", "&", "&am", "\\", "\\n",),
    *("U+0070 U+0071",),
    *("I", "a", "e.g.", "i.e.", "s a l", "c", '"', "'", '" + "', "' '", "<", "<a", "a <b> c", "<br/>", "-", "- -",),
    *("pro-", "ject",),
    *("noclaf", "tcejorp", "cebwrpg", "on", "no", "snake_case", "*bold*", "~x~", "`code`", "a@b.co", "$90,000",),
    *("(so)", "\u202e",),
    *("w", "a", "aGVs", "\ud83d", "漢字", "नमस्ते", "İ", "\u212a", "ª", "²", "\x00", "?", "a?b", "? a b", "٣",),
)  # fmt: skip
PROSE = st.lists(
    st.tuples(st.sampled_from(PLAIN), st.sampled_from([" ", " ", " ", "", "\n", "  ", ". ", "-", "\t"])), max_size=12
)


@settings(max_examples=1500, deadline=None)
@given(
    PROSE.map(lambda some: "".join(map("".join, some))) | TEXTS, st.lists(st.integers(1, 12), min_size=1, max_size=6)
)
def test_what_is_taken_for_ordinary_is_what_every_stage_would_have_left_as_it_is(text: str, sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("guardrails.views.certain", lambda text, start: (-1, -1))
        patch.setattr("guardrails.views.unusual", lambda part: ALL_STAGES)
        exact = shown(made(text))
    assert shown(made(text)) == exact
    views, end, n = Views(), 0, 0
    while end < len(text):
        end += sizes[n % len(sizes)]
        views.grow(text[:end], False)
        assert all(view.cap <= len(view) for view in (views.raw, *views._made))
        n += 1
    views.grow(text, True)
    assert shown(views) == exact


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_every_character_comes_from_a_place_in_the_text_and_places_only_go_forward(text: str) -> None:
    for view in every_view(made(text)):
        places = [view.origin(i, i + 1) for i in range(len(view.text))]
        assert all(0 <= start <= end <= len(text) for start, end in places)
        assert places == sorted(places)
        assert view.home(len(view.text)) == len(text)


@settings(max_examples=200, deadline=None)
@given(TEXTS)
async def test_a_guarded_stream_of_disguises_equals_the_whole(text: str) -> None:
    from guardrails.engine import Guard

    guard = Guard([RULE])
    said = "".join(map(guard.feed, text))
    last, verdict = await guard.finish()
    whole = await judge([RULE], text)
    if not regex.search("[\ud800-\udfff]", text):  # halves that come apart are mended
        assert (said + last, verdict) == (whole.streamed, whole)


@pytest.mark.parametrize("layers", range(1, 9))
async def test_nested_codes_are_read(layers: int) -> None:
    code = PHRASE.encode()
    for _ in range(layers):
        code = base64.b64encode(code)
    assert (await judge([RULE], code.decode())).text == "[X]"


@pytest.mark.parametrize(
    "unit",
    ["1-", "a ", "word ", "a", "a\u0301", "\u200b", "%41", "&amp;", "<", "<b>a", "12 34 ", ". ", '"', "\ud800",
     "\u202e", "漢字", "नमस्ते ", "a1!", "👨‍👩‍👧 ", "noclaf tcejorp ", "7072", "QUJDREVG"],
)  # fmt: skip
def test_a_long_text_is_read_in_work_that_grows_with_its_length(unit: str) -> None:
    """Counted, not timed: no view may grow faster than the text."""
    views = made(unit * (20_000 // len(unit)))
    assert all(len(view.text) <= 5 * 20_000 for view in every_view(views))
    assert all(view.home(len(view.text)) == len(views.raw.text) for view in every_view(views))


async def test_a_text_that_is_too_long_to_make_out_is_never_let_through_unread() -> None:
    verdict = await judge([RULE], "a" * (MOST + 1))
    assert (verdict.action, verdict.text, verdict.kept) == (Action.REFUSE, BROKEN_REPLY, "")
    assert verdict.hits[0].broken == "ValueError"


async def test_a_rule_without_views_reads_the_text_as_it_is() -> None:
    from dataclasses import replace

    plain = replace(RULE, views=False)
    assert (await judge([plain], "pr0ject falcon")).action is Action.ALLOW
    assert (await judge([plain], "project falcon")).action is Action.REDACT


def test_a_view_that_is_the_same_costs_no_text_of_its_own() -> None:
    views = made("An ordinary sentence, nothing odd about it. And a second one.")
    assert list(views.different) == []


def test_a_view_maps_what_was_made_of_several_characters_to_all_of_them() -> None:
    raw = View("raw")
    view = View("upper", raw)
    raw.grow("ab&amp;cd")
    view.keep(2)
    view.put("&", 7)
    view.keep(9)
    assert view.text == "ab&cd"
    assert [view.origin(i, i + 1) for i in range(5)] == [(0, 1), (1, 2), (2, 7), (7, 8), (8, 9)]
    assert view.origin(1, 4) == (1, 8) and view.home(2) == 2 and view.home(5) == 9


BRAILLE = str.maketrans("abcefjlnoprt", "⠁⠃⠉⠑⠋⠚⠇⠝⠕⠏⠗⠞")
COPTIC = str.maketrans("acenopt", "ⲁⲥⲉⲛⲟⲣⲧ")
LINE = f"All that I would like to read is {PHRASE}, and its budget."
WIDE = base64.b64encode(LINE.encode("utf-16-le")).decode()
CODE = base64.b64encode(LINE.encode()).decode()


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(PHRASE),
        "\n\n".join("\n".join(word) for word in PHRASE.split()),
        "\t".join(PHRASE.replace(" ", "  ")),
        "→".join(PHRASE),
        "pro-\nject falcon",
        "pro<!-- one\ntwo -->ject falcon",
        "".join(f"%25{sign:02X}" for sign in PHRASE.encode()),
        "".join(f"%26%23{sign}%3B" for sign in PHRASE.encode()),
        "".join(f"&amp;#{sign};" for sign in PHRASE.encode()),
        " ".join(f"U+{sign:04X}" for sign in PHRASE.encode()),
        "".join(f"\\ud835\\u{0xDC1A + ord(sign) - 97:04x}" if sign != " " else sign for sign in PHRASE),
        "".join(chr(0x249C + ord(sign) - 97) if sign != " " else sign for sign in PHRASE),
        PHRASE.translate(BRAILLE),
        PHRASE.translate(COPTIC),
        base64.b32encode(PHRASE.encode()).decode().lower(),
        "\n".join(CODE[i : i + 20] for i in range(0, len(CODE), 20)),
        f"https://a.example/read/{CODE.rstrip('=')}/now",
        WIDE,
    ],
)
async def test_further_disguises_are_read(text: str) -> None:
    assert (await judge([RULE], framed(text))).action is Action.REDACT
