"""A text is only passed over where no pattern can match: what may match, or may be under way, is never missed."""

from __future__ import annotations

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guardrails.prefilter import Begun, Prefilter, rewritten
from guardrails.spans import PatternError, Span, Spans
from guardrails.syntax import Unreadable, parse
from guardrails.types import Finding
from guardrails.validators import injection, secrets
from tests.guardrails import test_validators_injection, test_validators_personal, test_validators_secrets

ATOMS = [
    "a", "b", "k", "s", "i", "ß", "é", "É", "ſ", "\u212a", "İ", "ı", "Σ", "ab", "-", r"\.", r"\-", r"\d", r"\w", r"\s",
    r"\W", r"\D",
    r"\S", r"\p{L}", r"\P{L}", r"\p{Lu}", r"\pN", "[ab]", "[^ab]", "[a-k]", "[^a-zé]", "[[:alpha:]_]", r"[\w-]",
    r"[^\W\d_]", "[]a]", "[^]a]", r"[\]a\-]", r"[ß-ſ]", ".", "(?s:.)", r"\b", r"\B", "^", "$", r"\A", r"\Z", r"\m",
    "(?=a)", "(?!b)", "(?<=a)", "(?<!a)", r"(?<!\w)", r"(?!\w)", r"(?<![a-z]\.)", "(?!ab)", "(?<!ab)", "(?=[^k])",
    r"\x61", r"\u017f", r"\t", r"\n", "(?#note)", r"(?i)", r"(?<!(?<!a)b)", "}", "]",
]  # fmt: skip
REPEATS = ["{0,3}", "{1,2}?", "?", "+", "*", "*?", "++", "{2}", "{2,}", "{0,9}+", "{7,30}", "{,2}", "??"]
PATTERNS = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda some: f"(?:{'|'.join(some)})"),
        st.tuples(inner, st.sampled_from(REPEATS)).map(lambda two: f"(?:{two[0]}){two[1]}"),
        st.tuples(st.sampled_from(["(?i:", "(?-i:", "(?>", "(?s:", "(?si-m:"]), inner).map(
            lambda two: f"{two[0]}{two[1]})"
        ),
        inner.map(lambda one: rf"({one})\1"),
        inner.map(lambda one: f"(?P<n>{one})(?P=n)" if "?P<" not in one else one),
        inner.map(lambda one: f"(?i){one}"),
        st.tuples(st.sampled_from(["(?=", "(?!", "(?<=", "(?<!"]), inner, inner).map(
            lambda three: f"{three[0]}{three[1]}){three[2]}"
        ),
        st.tuples(inner, st.sampled_from(["(?=", "(?!", "(?<!"]), inner).map(
            lambda three: f"{three[0]}{three[1]}{three[2]})"
        ),
    ),
    max_leaves=8,
)
TEXTS = st.text("abkKsSiIABé Éßſ\u212aİıσςΣ1٣.-_?\n\t \ud800\udfff😀漢", max_size=14)


def findings(span: Span, text: str) -> list[Finding]:
    """What the span finds by itself, without anything before it."""
    return span.findings(text, 0, len(text))[0]


SIGNS = [*map(chr, range(256)), *"ſ\u212aİıẞŞşΣςσАаЯя١漢ʼ’—\u2028\ufeff\ud800\udfff😀"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("flags", ["", "i"])
@pytest.mark.parametrize("atom", ATOMS)
def test_what_one_character_may_be_is_never_missed(atom: str, flags: str) -> None:
    pattern = f"(?{flags}:{atom})"
    one, compiled = Prefilter([pattern]), regex.compile(pattern, regex.MULTILINE)
    assert [sign for sign in SIGNS if compiled.search(sign) and not one.candidates(sign)] == []


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@settings(max_examples=1500, deadline=None)
@given(PATTERNS, TEXTS)
def test_a_pattern_that_matches_is_a_candidate(pattern: str, text: str) -> None:
    try:
        compiled = regex.compile(pattern, regex.MULTILINE)
    except regex.error:
        return
    if compiled.search(text):
        assert Prefilter(["zzz", pattern]).candidates(text) >= {1}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@settings(max_examples=1000, deadline=None)
@given(st.lists(PATTERNS, min_size=1, max_size=3), TEXTS, st.sets(st.integers(1, 14)))
@example(["(?-i:(?i)(?i)a)"], "A", set())
def test_spans_find_in_any_pieces_what_each_finds_alone(patterns: list[str], text: str, cuts: set[int]) -> None:
    try:
        spans = [Span(str(i), pattern) for i, pattern in enumerate(patterns)]
    except PatternError:
        return
    alone = [one for span in spans for one in findings(span, text)]
    machine = Spans(spans)
    assert machine.among(text, machine.prefilter.candidates(text)) == sorted(alone, key=lambda one: one.start)
    for ends in (sorted({*(cut for cut in cuts if cut < len(text)), len(text)}), range(1, len(text) + 1)):
        (reading,), found, settled = machine.readings(), [], 0
        for end in ends:
            new, reached = reading.read(text[:end], end == len(text))
            assert all(finding.start >= settled for finding in new)
            assert settled <= reached <= end
            found, settled = [*found, *new], reached
        assert sorted(found, key=place) == sorted(alone, key=place)


def place(finding: Finding) -> tuple[int, int, str]:
    return finding.start, finding.end, finding.label


SHIPPED: list[tuple[Spans, list[str]]] = [
    (test_validators_personal.EVERYTHING, [text for text, _ in test_validators_personal.HITS]),
    (secrets.build(secrets.Options()), [text for text, _ in test_validators_secrets.HITS]),
    (injection.build(injection.Options()), [text for text, _ in test_validators_injection.HITS]),
]


@st.composite
def mutated(draw: st.DrawFn) -> tuple[Spans, str]:
    """Shipped patterns and one of their hits with a few characters taken out, put in, or in other case."""
    spans, texts = draw(st.sampled_from(SHIPPED))
    signs = list(draw(st.sampled_from(texts)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(signs) - 1))
        signs[at] = draw(st.sampled_from(["", signs[at].swapcase(), " ", "\n", "é", "ſ", "\ud800", "1", "?", "漢"]))
    return spans, draw(st.sampled_from(["", "x", "é", " ", "1"])) + "".join(signs) + draw(
        st.sampled_from(["", "é", "1"])
    )


@settings(max_examples=1500, deadline=None)
@given(mutated())
def test_a_shipped_pattern_that_finds_something_is_a_candidate(case: tuple[Spans, str]) -> None:
    spans, text = case
    candidates = spans.prefilter.candidates(text)
    missed = [span.pattern for i, span in enumerate(spans.spans) if i not in candidates and findings(span, text)]
    assert not missed


@pytest.mark.parametrize("spans", [spans for spans, _ in SHIPPED], ids=["personal", "secrets", "injection"])
def test_every_shipped_pattern_is_read_by_both_and_ordinary_text_has_no_candidate(spans: Spans) -> None:
    assert not spans.begun.unread
    assert all(rewritten(span.needed) for span in spans.spans)
    assert spans.prefilter.candidates("How do I ask for a raise? I took over the night shift in March.") == set()


@pytest.mark.parametrize(
    "pattern", ["(?V1)a", "a{e<=1}", r"(a)(?R)?", r"\X", "(?(1)a|b)", "(?L:a)", r"\N{BULLET}", "a{"]
)
def test_what_cannot_be_rewritten_is_always_a_candidate(pattern: str) -> None:
    with pytest.raises(Unreadable):
        parse(pattern)
    assert Prefilter(["zzz", pattern]).candidates("nothing of that") == {1}


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        (r"\braise\b", ["a raise", "raise", "éraise?"], ["praised", "raised", "_raise"]),
        (r"(?<![0-9])[0-9]{3}(?![0-9])", ["x123y", "123"], ["1234", "12"]),
        (r"^ab$", ["x\nab\ny"], ["xab", "abx"]),
        (r"(?i:kiss)", ["KISS", "Kiſs"], ["kis", "kids"]),
    ],
)
def test_look_arounds_at_the_rim_still_tell_texts_apart(pattern: str, yes: list[str], no: list[str]) -> None:
    one = Prefilter([pattern])
    assert [text for text in yes if not one.candidates(text)] == []
    assert [text for text in no if one.candidates(text)] == []


def test_a_number_that_must_be_announced_is_asked_for_with_its_announcement() -> None:
    personal = SHIPPED[0][0]
    assert "pl_pesel" not in {personal.spans[i].label for i in personal.prefilter.candidates("case 44051401359")}
    assert "pl_pesel" in {personal.spans[i].label for i in personal.prefilter.candidates("PESEL: 44051401359")}


def test_a_long_text_without_memory_makes_all_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Prefilter(["a", "b"])
    monkeypatch.setattr(one, "_set", type("Full", (), {"Match": lambda self, text: []})())
    assert one.candidates("nothing") == {0, 1}


@pytest.mark.parametrize(
    ("pattern", "text", "begun"),
    [
        (r"(?<![0-9])[0-9]{3}-[0-9]{2}", "call 123-4", "123-4"),
        (r"(?<![0-9])[0-9]{3}-[0-9]{2}", "call 123 4", "4"),
        (r"(?<![0-9])[0-9]{3}-[0-9]{2}", "call 1234", ""),
        (r"\bignore (?:all |the )*rules\b", "please ignore all the ru", "ignore all the ru"),
        (r"\bignore (?:all |the )*rules\b", "please ignore all the rum", ""),
        (r"\bignore (?:all |the )*rules\b", "ignore", "ignore"),
    ],
)
def test_what_is_under_way_at_the_end_of_a_text_is_told_by_its_first_character(
    pattern: str, text: str, begun: str
) -> None:
    one = Begun(["zzz", pattern])
    assert text[one.first(text, 0, len(text)) :] == begun
    assert one.alive(text, 0, len(text)) == ({1} if begun else set())


def test_where_it_cannot_be_told_everything_may_be_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guardrails.prefilter.begun", lambda pattern: b"(")  # as if it were too large for RE2
    one = Begun(["a", "b"])
    monkeypatch.undo()
    assert one.first("nothing! of! that!", 3, 18) == 3
    assert one.alive("nothing! of! that!", 3, 18) == {0, 1}
    assert Begun(["(?V1)a", "a*"]).unread == (0, 1)
