r"""Ordinary text, which reads the same in every view, told in one pass over what is new (RE2).

For each stage there are patterns that match at least where the stage could write something else: no match, no
difference. Words are looked at whole, so what is told of a part ends where a word begins, or the white space before it.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache

import regex

from guardrails.prefilter import Begun, Prefilter
from guardrails.views.codes import BASE64, CODES, HEX, PAIR, WORD, says
from guardrails.views.folding import BIDI, fold
from guardrails.views.turning import is_turned
from guardrails.views.words import LEET, SPACED, bare

FOLDED, DECODED, LOOSE, SPREAD, TURNED = (1 << n for n in range(5))
"""The stages as bits, in the order in which they are made."""
WORDS, ALL = LOOSE | SPREAD, 31
GAPPED = 32
"""In place of SPREAD where no more than white space can be written otherwise."""
RUN = 64
"""Characters of a word from which on it is not waited for here."""
TOKENS, LONGEST_TOKEN = 50_000, 40
"""How many words are remembered that are not turned, and the longest of them."""

SHORT, REMEMBERED = 24, 16_384
"""Characters of a part of a text, a word or two, that is remembered with what is told of it; how many of them are."""

_RUNS = {
    code.name: code.pattern for code in CODES if code.name in ("markup", "joined", "hyphen", "points", "morse")
} | {
    "binary": r"(?<![0-9])[01]{8}\s?[01]{8}\s?[01]{8}",
    "pairs": rf"(?<![0-9A-Za-z])(?:0x)?[0-9]{HEX}(?:[ ,:-]{{1,2}}{PAIR}){{3}}",
    "decimal": r"(?<![0-9])[0-9]{2,3}(?:[ ,]{1,2}[0-9]{2,3}){3}",
    "lines": rf"{WORD}{{6}}{WORD}{{6}}{WORD}{{4}}{WORD}*\r?\n[ \t]{{0,4}}{WORD}{{4}}",
}
"""The codes that may have white space in them."""
_TAIL = regex.compile(rf"(?r)\s{{0,{RUN}}}(\S{{0,{RUN}}})")
"""The last word and the white space before it: a word that is not complete may come to say that it is white space, too,
or a single letter, so that what is under way before it is not certain either."""
_BEFORE = regex.compile(rf"(?r)\s{{1,{RUN}}}|\S{{1,{RUN}}}")
_LONG = re.compile(BASE64)


def _readable(signs: int) -> str:
    """The first signs of a base64 code that reads as UTF-8 without control characters, or as UTF-16."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    written = [*alphabet, "[+-]", "[/_]"]

    def after(waiting: int, byte: int) -> int | None:
        """How many more bytes the letter takes that `byte` belongs to; None where it cannot stand here."""
        if waiting:
            return waiting - 1 if 0x80 <= byte < 0xC0 else None
        if 0x20 <= byte < 0x7F or byte in (9, 10, 13):
            return 0
        return next((n for n, (low, high) in enumerate(((0xC2, 0xE0), (0xE0, 0xF0), (0xF0, 0xF5)), 1)
                     if low <= byte < high), None)  # fmt: skip

    @cache
    def code(left: int, bits: int, rest: int, waiting: int) -> str:
        ways: dict[str, list[str]] = {}
        for value in range(64 if left else 0):
            now, size, more = rest << 6 | value, bits + 6, waiting
            if size >= 8:
                told = after(waiting, now >> (size - 8))
                if told is None:
                    continue
                size, more = size - 8, told
                now &= (1 << size) - 1
            tail = code(left - 1, size, now, more)
            if tail != "(?!)":
                ways.setdefault(tail, []).append(written[value])
        if left and not ways:
            return "(?!)"
        rows = [f"(?:{'|'.join(those)}){tail}" for tail, those in ways.items()]
        return f"(?:{'|'.join(rows)})" if rows else ""

    return f"(?:{code(signs, 0, 0, 0)}|[A-Za-z0-9+/_-][AQgw][A-D])"


def _patterns(letter: str, digit: str) -> list[tuple[int, str]]:
    """(the stages, what must match where they write something else). letter, digit: as the inside of a set."""
    one = f"[{letter}]"
    return [
        (FOLDED, "[\x00-\x08\x0e-\x1f\x7f]"),
        *((DECODED, pattern) for pattern in _RUNS.values()),
        (DECODED, rf"&(?:amp;){{0,4}}(?:\#[0-9xX]|[a-zA-Z]{{2}})|%(?:25){{0,4}}{HEX}{{2}}|\\"),
        (DECODED, rf"(?<![0-9A-Za-z])(?:0x)?{HEX}{{6}}{HEX}{{4}}{HEX}*(?![0-9A-Za-z])|{HEX}{{2}}-{{1,2}}{HEX}{{2}}-"),
        (DECODED, r"(?<![A-Za-z0-9])(?:[A-Z2-7]{6}[A-Z2-7]{6}[A-Z2-7]{4}|[a-z2-7]{6}[a-z2-7]{6}[a-z2-7]{4})"),
        (0, rf"(?<![A-Za-z0-9+_-]){_readable(6)}{WORD}{{2}}"),
        (WORDS, SPACED),
        (WORDS, rf"[0-9@$+!|]_*{one}|{one}_*[@$]|{one}_+[0-9]|{one}[0-9]+[_@$]|[+!|][0-9@$_]"),
        (WORDS, rf"[*_~`]{one}|{one}[*_~`]|{one}[^{letter}{digit}\s'’]{{1,4}}{one}"),
        (GAPPED, "[\t-\r]|  "),
    ]


_PATTERNS = [_patterns("A-Za-z", "0-9"), _patterns(r"\p{L}", r"\p{N}")]
_STAGES = [stages for stages, _ in _PATTERNS[0]]
_CODE = _STAGES.index(0)
_OF_ASCII, _OF_ANY = (Prefilter([pattern for _, pattern in patterns]) for patterns in _PATTERNS)
_BEGUN = Begun([SPACED, *_RUNS.values()])
_straight: set[str] = set()


def certain(text: str, start: int) -> tuple[int, int]:
    """(how much of a growing text is certain if `unusual` finds nothing in it, how much it is to be asked about), from
    `start` on; -1 where that cannot be told."""
    tail = _TAIL.match(text)
    if tail is None or _is_far(tail):
        return -1, -1
    end: int = tail.start()
    word = tail[1]
    upto = len(text) if word and not word.isalnum() else end  # signs in the last word may say something by now
    if end <= start or (first := _first(text, start, tail.start(1))) >= end:
        return end, upto
    before = _BEFORE.match(text, endpos=first + 1)  # a unit is told by all of its word, or of its white space
    return (-1, -1) if before is None or first - before.start() >= RUN else (before.start(), upto)


def _first(text: str, start: int, end: int) -> int:
    """The first place from `start` on at which something with white space in it may begin that is under way at `end`;
    `end` if there is none."""
    if not start or end - start > SHORT:
        return _BEGUN.first(text, start, end)
    return end - _under_way(text[start - 1 : end])


@lru_cache(REMEMBERED)
def _under_way(part: str) -> int:
    """How many characters at the end of a part of a text, which has one more before it, may belong to such a thing."""
    return len(part) - _BEGUN.first(part, 1, len(part))


def _is_far(tail: regex.Match[str]) -> bool:
    """True where the last word, or the white space before it, is too long to be waited for here."""
    return tail.end() - tail.start(1) >= RUN or tail.start(1) - tail.start() >= RUN


def unusual(part: str) -> int:
    """The stages that may write something else for this part of a text; what they are made of is the text itself."""
    return _of_short(part) if len(part) <= SHORT else _stages(part)


def _stages(part: str) -> int:
    """The stages that may write something else for this part of a text; what they are made of is the text itself."""
    stages = 0
    if part.isascii():
        candidates = _OF_ASCII.candidates(part)
    else:
        for sign in set(part):
            stages |= _odd(sign)
        candidates = _OF_ANY.candidates(part)
    for number in candidates:
        stages |= _STAGES[number]
    if _CODE in candidates and not stages & DECODED and any(map(says, _LONG.findall(part))):
        stages |= DECODED
    if stages & (FOLDED | DECODED):  # all others are made of these
        return ALL
    return stages if _is_straight(part) else stages | TURNED


_of_short = lru_cache(REMEMBERED)(_stages)


@lru_cache(8192)
def _odd(sign: str) -> int:
    """The stages that may write something else for a character beyond ASCII, wherever it stands."""
    if sign.isascii():
        return 0
    if sign in BIDI or fold(sign) is not None:
        return ALL
    return WORDS if sign in LEET or bare(sign) != sign or sign.isspace() else 0


def _is_straight(part: str) -> bool:
    """True where no word looks turned; words that were seen before are remembered."""
    tokens = set(part.lower().split())
    if tokens <= _straight:
        return True
    for token in tokens - _straight:
        if any(map(is_turned, _LETTERS.findall(token))):
            return False
        if len(token) <= LONGEST_TOKEN:
            _straight.add(token)
    if len(_straight) > TOKENS:
        _straight.clear()
    return True


_LETTERS = re.compile("[a-z]{4,}")
