"""The same text as it may have been disguised, read while it grows, with the way back to the original.

A rule that looks for "salary" should see it in `s a l a r y`, in Cyrillic letters and in base64. Each `View` is a text
of its own, made of another one by a stage that only ever appends:

    raw -> folded    look-alike letters, full width, invisible signs between letters
        -> decoded   base64, hex, URL, HTML, escapes, morse, bidi overrides, markup inside words; nested
        -> loose     leet, accents, spaced and dotted letters, signs inside words
        -> spread    the same, but 1 is an l, and signs inside words and line ends are spaces
        -> turned    words that are English only when read backwards or in rot13

A view that is so far the same as the one it is made of costs no reading. Nothing is taken for an attack because it is
written unusually (emoji joiners, Persian and Indic joiners, soft hyphens): a view only shows a rule more text, and what
the rule finds there is mapped back to the original.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import html
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from pathlib import Path
from urllib.parse import unquote

import regex

from guardrails.types import Finding

DEPTH = 8
"""How often a text that was decoded is decoded again."""
TIMEOUT = 0.25
"""Seconds that one search of a stage may take before the text counts as unreadable (see `guardrails.spans`)."""


class View:
    """A growing text made of another view's, and where each character of it comes from.

    `at`: how much of the source has been turned into `text`. `same`: the two are equal so far. `twin`: a view
    that is equal to this one until it is `shown`. Offsets are kept as runs: a run maps character by character, or (`_ends` not negative)
    all of it to one piece of the source.
    """

    __slots__ = ("_ends", "_froms", "_starts", "_text", "at", "name", "parts", "same", "shown", "source", "twin")

    def __init__(self, name: str, source: View | None = None):
        self.name, self.source = name, source
        self.parts: list[View] = []
        self.twin: View | None = None
        self._text, self.at, self.same, self.shown = "", 0, True, True
        self._starts, self._froms, self._ends = [0], [0], [-1]
        if source is not None:
            source.parts.append(self)

    @property
    def text(self) -> str:
        """What has been made so far."""
        if self.same and self.source is not None:
            return self.source.text[: self.at]
        return self._text

    def grow(self, text: str) -> None:
        """Makes `text` the whole of this view, which has no source."""
        self._text, self.at = text, len(text)

    def keep(self, upto: int) -> None:
        """Takes the source over as it is, up to there."""
        start, self.at = self.at, max(self.at, upto)
        if self.same or start >= upto or self.source is None:
            return
        if self._ends[-1] >= 0 or self._froms[-1] + len(self._text) - self._starts[-1] != start:
            self._run(start, -1)
        self._text += self.source.text[start:upto]

    def put(self, text: str, upto: int) -> None:
        """Writes `text` for the source up to there."""
        if self.same:
            self._text, self.same = self.text, False
        start, self.at = self.at, upto
        if text:
            self._run(start, upto)
            self._text += text

    def _run(self, start: int, end: int) -> None:
        self._starts.append(len(self._text))
        self._froms.append(start)
        self._ends.append(end)

    def _back(self, start: int, end: int) -> tuple[int, int]:
        """The piece of the source that `text[start:end]` was made of."""
        if self.same:
            return start, end
        i = bisect_right(self._starts, start) - 1
        first = self._froms[i] + (start - self._starts[i] if self._ends[i] < 0 else 0)
        j = bisect_right(self._starts, max(start, end - 1)) - 1
        last = self._froms[j] + end - self._starts[j] if self._ends[j] < 0 else self._ends[j]
        return first, max(first, last if end > start else first)

    def origin(self, start: int, end: int) -> tuple[int, int]:
        """The piece of the original text that `text[start:end]` was made of."""
        return (start, end) if self.source is None else self.source.origin(*self._back(start, end))

    def home(self, place: int) -> int:
        """The place in the original text before which everything is in `text[:place]`."""
        if self.source is None:
            return place
        ended = self.at if place >= (self.at if self.same else len(self._text)) else self._back(place, place)[0]
        return self.source.home(ended)

    @property
    def cap(self) -> int:
        """How much of this text may be read: no more than what the views that are the same so far have taken over."""
        ends = [part.cap for part in self.parts if part.same]
        if self.twin and not self.twin.same and not self.twin.shown:
            ends.append(len(self.twin._text))
        return min([self.at if self.same or self.source is None else len(self._text), *ends])


Stage = Callable[[View, bool], None]


class Views:
    """All views of one growing text; `raw` is the text itself."""

    __slots__ = ("_made", "_stages", "raw")

    def __init__(self) -> None:
        self.raw = View("raw")
        folded = View("folded", self.raw)
        decoded = View("decoded", folded)
        loose, spread, turned = View("loose", decoded), View("spread", decoded), View("turned", decoded)
        loose.twin, spread.shown = spread, False
        self._made = (folded, decoded, loose, spread, turned)
        self._stages: tuple[Stage, ...] = (_fold, _decode, _loosen, _spread, _turn)

    def grow(self, text: str, final: bool) -> None:
        """Makes the views of `text`, which starts with what it was before; `final` says that it ends here."""
        self.raw.grow(text)
        for view, stage in zip(self._made, self._stages, strict=True):
            stage(view, final)

    @property
    def different(self) -> Iterator[View]:
        """The views that are not the same as what they are made of."""
        return (view for view in self._made if view.shown and not view.same)


def findings_home(view: View, findings: Sequence[Finding]) -> list[Finding]:
    """The findings in a view as findings in the original text; the note says which view."""
    out = []
    for one in findings:
        start, end = view.origin(one.start, one.end)
        out.append(Finding(one.label, start, end, one.score, one.note or view.name))
    return out


# --- Folding: a letter for what looks like it -----------------------------------------------------------------------

PLAIN = regex.compile(r"[^\x09\x0a\x0d\x20-\x7e]")
"""What plain ASCII text does not have."""
LOOKALIKES = {
    pair[0]: pair[1:]
    for pair in (
        # Cyrillic, Armenian
        "аa вb гr еe з3 иu кk мm нh оo пn рp сc тt уy хx ьb яr іi јj ѕs ԁd ԛq ԝw һh ѵv ԍg ӏl ҽe ґr ѡw єe ёe АA ВB ЕE ЅS ІI ЈJ КK МM НH ОO РP СC ТT УY ХX ҮY ԌG ԚQ ԜW ЬB ոn սu օo հh ցg յj զq քf Օo Տs Լl "
        # Greek
        "αa βb γy δd εe ηn ιi κk νv οo ρp σo τt υu χx ωw ϲc ϳj ΑA ΒB ΕE ΖZ ΗH ΙI ΚK ΜM ΝN ΟO ΡP ΤT ΥY ΧX ϹC "
        # Latin letters that have no plain form by themselves
        "ıi ɩi ɑa ɡg ɢg ʜh ɪi ʟl ɴn ʀr ʏy ɐa ɔc ǝe ɟf ɥh ɾj ʞk ɯm ɹr ʇt ʌv ʍw ʎy ɓb ƈc ɗd ƒf ɠg ɦh ƙk ɱm ɲn ƥp ɋq ʂs "
        "ƭt ʋv ʐz ᴀa ʙb ᴄc ᴅd ᴇe ꜰf ᴊj ᴋk ᴍm ᴏo ᴘp ꜱs ᴛt ᴜu ᴠv ᴡw ᴢz ſs łl ŁL đd ĐD ħh ĦH ŧt ꓮA ꓰE ꓲI ꓳO"
    ).split()
}  # fmt: skip
"""Letters by what they look like."""
KEPT = frozenset("ßæœðþøØ…™ªº²³¹·´`¨¸")
"""Letters and signs of ordinary text that are left as they are."""
NAMED = regex.compile(
    r"(?:NEGATIVE (?:CIRCLED|SQUARED)|REGIONAL INDICATOR SYMBOL|SQUARED|CIRCLED|PARENTHESIZED|TAG|LATIN|FULLWIDTH LATIN)"
    r"(?: LATIN)? (?:(?P<small>SMALL) )?(?:CAPITAL )?LETTER (?:SMALL CAPITAL )?(?P<letter>[A-Z])(?: WITH .*)?"
)
BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
INVISIBLE = frozenset("\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180e\u3164\uffa0\ufeff\u2800")


@lru_cache(maxsize=8192)
def fold(sign: str) -> str | None:
    """What a character looks like in plain letters; empty for one that is not seen, None for one that stays."""
    code, category = ord(sign), unicodedata.category(sign)
    if sign in BIDI or sign in KEPT:
        return None
    if 0xE0020 <= code <= 0xE007E:  # tags write hidden ASCII
        return chr(code - 0xE0000)
    if 0xE0100 <= code <= 0xE01EF:  # variation selectors can carry bytes
        return chr(code - 0xE0100 + 16) if 32 <= code - 0xE0100 + 16 < 127 else ""
    if category in ("Cf", "Mn", "Me") or sign in INVISIBLE or (category == "Cc" and sign not in "\t\n\r\v\f\x85"):
        return ""
    if sign in LOOKALIKES:
        return LOOKALIKES[sign]
    if category == "Zs" and sign != " ":
        return " "
    plain = unicodedata.normalize("NFKC", sign)
    if plain != sign and any(one.isascii() and one.isalnum() for one in plain):
        return plain
    named = NAMED.fullmatch(unicodedata.name(sign, ""))
    if named and category == "So":
        return str(named["letter"])
    return None


def _fold(view: View, final: bool) -> None:
    """Everything is certain at once."""
    assert view.source is not None
    text = view.source.text
    while odd := PLAIN.search(text, pos=view.at):
        place = odd.start()
        view.keep(place)
        folded = fold(text[place])
        if folded is None:
            view.keep(place + 1)
        else:
            view.put(folded, place + 1)
    view.keep(len(text))


# --- Decoding -------------------------------------------------------------------------------------------------------


def _readable(text: str) -> bool:
    """True for what a person could have written: printable, and mostly letters."""
    if len(text) < 3 or not all(sign.isprintable() or sign in "\t\n\r" for sign in text):
        return False
    return sum(sign.isalpha() or sign == " " for sign in text) >= 0.6 * len(text)


def _text_of(raw: bytes) -> str | None:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return None
    return text if _readable(text) or (text.isprintable() and _FOUND.fullmatch(text)) else None


def _base64(code: str) -> str | None:
    plain = code.rstrip("=").translate({45: "+", 95: "/"})
    plain = plain[: len(plain) - 1] if len(plain) % 4 == 1 else plain
    return _text_of(base64.b64decode(plain + "=" * (-len(plain) % 4)))


def _base32(code: str) -> str | None:
    plain = code.rstrip("=").upper()
    try:
        return _text_of(base64.b32decode(plain + "=" * (-len(plain) % 8)))
    except binascii.Error:
        return None


def _hex(code: str) -> str | None:
    digits = regex.sub(r"0x|\\x|[^0-9a-f]", "", code.lower())
    return _text_of(bytes.fromhex(digits[: len(digits) // 2 * 2]))


def _numbers(base: int) -> Callable[[str], str | None]:
    def read(code: str) -> str | None:
        size = 8 if base == 2 else None
        digits = "".join(code.split()) if size else code
        parts = [digits[i : i + 8] for i in range(0, len(digits), 8)] if size else regex.findall(r"\d+", digits)
        codes = [int(part, base) for part in parts]
        return _text_of(bytes(codes)) if max(codes) < 256 else None

    return read


def _escapes(code: str) -> str | None:
    def sign(match: regex.Match[str]) -> str:
        hexadecimal, octal = match[1] or match[2], match[3]
        number = int(hexadecimal, 16) if hexadecimal else int(octal, 8)
        return chr(number) if number < 0x110000 else match[0]

    return regex.sub(r"\\(?:[uUx]\{?([0-9a-fA-F]{2,8})\}?|N\{U\+([0-9a-fA-F]{2,6})\}|([0-7]{3}))", sign, code)


MORSE = dict(
    zip(
        ".- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- ...- .-- -..- -.-- --..".split(),
        "abcdefghijklmnopqrstuvwxyz",
        strict=True,
    )
)


def _morse(code: str) -> str | None:
    words = regex.split(r"\s*[/|]\s*|\s{3,}", code.translate({0x2D3: "-", 0x2013: "-", 0x2212: "-", 0xB7: ".", 0x2022: "."}).strip())
    letters = ["".join(MORSE.get(one, "\0") for one in word.split()) for word in words]
    text = " ".join(letters)
    return None if "\0" in text else text


def _backwards(code: str) -> str:
    return code.strip("\u202e\u202c\u2069\u2067")[::-1]


TAGS = r"(?:</?[a-zA-Z][^<>\n]{0,80}>|<!--[^<>\n]{0,80}-->){1,4}"
BREAKS = regex.compile(r"(?i)</?(?:br|p|div|li|t[dr]|h[1-6r]|[uo]l|table|section)\b")


def _markup(code: str) -> str:
    """Nothing for tags that a word goes on behind, a space for those that part words."""
    return " " if BREAKS.search(code) else ""


@dataclass(frozen=True, slots=True)
class Code:
    """A way to write text as something else: how it looks, and how it is read (None for what is no text)."""

    name: str
    pattern: str
    read: Callable[[str], str | None]


WORD = r"[A-Za-z0-9+/_-]"
CODES = (
    Code("bidi", r"[\u202e\u2067][^\u202c\u2069\n]{1,300}(?:[\u202c\u2069]|(?=\n)|\Z)", _backwards),
    Code("invisible", r"[\u202a-\u202e\u2066-\u2069]", lambda code: ""),
    Code("entity", r"(?:&(?:\#[0-9]{1,7}|\#[xX][0-9a-fA-F]{1,6}|[a-zA-Z]{2,8});?){1,500}", html.unescape),
    Code("percent", r"(?:%[0-9a-fA-F]{2}){1,500}", lambda code: unquote(code, errors="replace")),
    Code("escape", r"(?:\\(?:u[0-9a-fA-F]{4}|[uUx]\{[0-9a-fA-F]{1,6}\}|U[0-9a-fA-F]{8}|x[0-9a-fA-F]{2}|[0-7]{3})){1,500}", _escapes),
    Code("markup", rf"(?<=\w){TAGS}|{TAGS}(?=\w)", _markup),
    Code("joined", r"""(?<=\w)(?:"\s?[+.&]{0,2}\s?"|'\s?[+.&]{0,2}\s?')(?=\w)""", lambda code: ""),
    Code("binary", r"(?<![0-9])[01]{8}(?:\s?[01]{8}){2,500}(?![0-9])", _numbers(2)),
    Code("hex", r"(?<![0-9A-Za-z])(?:0x)?(?:[0-9a-fA-F]{2}){5,2000}(?![0-9A-Za-z])", _hex),
    Code("hex", r"(?<![0-9A-Za-z])(?:0x)?[0-9a-fA-F]{2}(?:[ ,:-]{1,2}(?:0x)?[0-9a-fA-F]{2}){4,500}(?![0-9A-Za-z])", _hex),
    Code("decimal", r"(?<![0-9])[0-9]{2,3}(?:[ ,]{1,2}[0-9]{2,3}){4,500}(?![0-9])", _numbers(10)),
    Code("morse", r"(?<!\S)[.·•–−-]{1,6}(?:(?: {1,3}| ?[/|] ?)[.·•–−-]{1,6}){3,300}(?!\S)", _morse),
    Code("base32", r"(?<![A-Za-z0-9])[A-Z2-7]{16,2000}={0,6}(?![A-Za-z0-9+/=_-])", _base32),
    Code("base64", rf"(?<!{WORD}){WORD}{{8,4000}}={{0,2}}(?![A-Za-z0-9+/=_-])", _base64),
)  # fmt: skip
_ANY = "|".join(f"(?:{code.pattern})" for code in CODES)
_FOUND = regex.compile(_ANY)
_LIVE = regex.compile(f"(?:{_ANY})(?s:.)(?!)")
_EACH = tuple((regex.compile(code.pattern), code.read) for code in CODES)
_START = regex.compile(
    rf"""[%&\\<"'0-9\u202a-\u202e\u2066-\u2069]|(?<!\S)[.·•–−-]|(?<!{WORD}){WORD}{{8}}"""
)
"""What every code that says something starts with (hex for a readable text starts with a digit)."""
_TAIL = regex.compile(rf"(?r){WORD}+")
LONGEST = 4000
"""Characters of the longest code; a word without an end is not waited for beyond it."""


def _live(pattern: regex.Pattern[str], text: str, start: int, final: bool) -> int:
    """The first place from `start` on where the pattern could still match if more text came."""
    if final:
        return len(text)
    found = pattern.search(text, pos=start, partial=True, timeout=TIMEOUT)
    return len(text) if found is None else found.start()


def _said(text: str, start: int) -> tuple[str, int] | None:
    """(what the code at this place says, where it ends), or None where there is none that says anything."""
    for pattern, read in _EACH:
        match = pattern.match(text, pos=start, timeout=TIMEOUT)
        said = read(match.group()) if match else None
        if match and said is not None and said != match.group():
            return said, match.end()
    return None


def undone(text: str, depth: int = DEPTH) -> str:
    """A whole text folded and decoded, as often as that changes it."""
    for _ in range(depth):
        out, at = [], 0
        plain = "".join(sign if (seen := fold(sign)) is None else seen for sign in text)
        for start in _START.finditer(plain):
            if start.start() >= at and (said := _said(plain, start.start())):
                out += (plain[at : start.start()], said[0])
                at = said[1]
        before, text = text, "".join((*out, plain[at:]))
        if text == before or len(text) > 4 * len(before) + 64:
            break
    return text


def _decode(view: View, final: bool) -> None:
    """Text that may become a code is waited for; a code is one piece, and what it says comes from all of it."""
    assert view.source is not None
    text, place = view.source.text, view.at
    tail = None if final else _TAIL.match(text)
    upto = max(view.at, tail.start()) if tail and len(tail.group()) <= LONGEST else len(text)
    while (start := _START.search(text, pos=place)) and start.start() < upto:
        place = start.start()
        view.keep(place)
        if not final and _LIVE.match(text, pos=place, partial=True, timeout=TIMEOUT):
            return
        if said := _said(text, place):
            view.put(undone(said[0]), said[1])
            place = said[1]
        else:
            place += 1
    view.keep(upto)


# --- Loosening ------------------------------------------------------------------------------------------------------

LEET = {
    "0": "o", "3": "e", "4": "a", "5": "s", "7": "t", "8": "b", "9": "g", "6": "g", "2": "z",
    "@": "a", "$": "s", "+": "t", "€": "e", "£": "l", "¢": "c", "§": "s", "(": "c",
}  # fmt: skip
UNSURE = "1!|"
"""Signs that stand for an i or an l: each of the two loose views takes one."""
SIGNS = regex.escape("".join([*LEET, *UNSURE]), special_only=False)
BETWEEN = r"(?: {1,4}|[^\p{L}\p{N}\s]{1,4}| {1,2}[^\p{L}\p{N}\s]{1,2} {1,2})"
SPACED = rf"(?<![\p{{L}}\p{{N}}])[\p{{L}}\p{{N}}@$](?:{BETWEEN}[\p{{L}}\p{{N}}@$!|]){{2,80}}(?![\p{{L}}\p{{N}}])"
"""Single letters: `s a l a r y`, `s.a.l.a.r.y`; the commonest gap goes, another one is a space between words."""
ODD = r"(?<![A-Za-z])(?=[A-Za-z]{0,40}[^A-Za-z\s])\S{1,200}"
"""A word that is not made of plain letters alone."""
GAP = r"\s{2,100}|[^\S ]"
_LEETED = regex.compile(rf"[{SIGNS}\w]+")
_INNER = regex.compile(r"(?<=\p{L})[^\p{L}\p{N}\s'’]{1,4}(?=\p{L})")
_MARKS = regex.compile(
    r"(?<!\p{L})[*_~`]{1,3}(?=\p{L})|(?<=\p{L})[*_~`]{1,3}(?!\p{L})|(?<=\p{L})(?:\*{1,3}|__|~~|`)(?=\p{L})"
)
"""Marks of emphasis, around words and inside them."""
_BREAK = regex.compile(r"[^\p{L}\p{N}@$!|]+|(?<=[\p{L}\p{N}])[@$!|]+(?=[\p{L}\p{N}])")


@lru_cache(maxsize=4096)
def _bare(sign: str) -> str:
    """A Latin letter without its accents."""
    first = unicodedata.normalize("NFD", sign)[0]
    return first if first.isascii() else sign


def _leet(word: str, unsure: str) -> str:
    """A word with letters for the digits and signs in it; a number, or a word with a number behind it, stays."""
    core = word.rstrip("!|+(")
    letters = sum(map(str.isalpha, core))
    signs = sum(sign in LEET or sign in UNSURE for sign in core)
    if not signs or 2 * letters < signs or regex.fullmatch(r"[^\W\d_]+\d+", core):
        return word
    return "".join(unsure if sign in UNSURE else LEET.get(sign, sign) for sign in core) + word[len(core) :]


def _closed(run: str) -> str:
    """Spaced letters as words."""
    gaps = _BREAK.findall(run)
    usual = max(set(gaps), key=gaps.count) if gaps else ""
    return _BREAK.sub(lambda gap: " " if gap[0] != usual and any(map(str.isspace, gap[0])) else "", run)


class Way:
    """A way to read unusual words: what 1 stands for, what a sign inside a word stands for, which units it reads.

    start: what a unit has at its first letter or, for a word, somewhere.
    """

    def __init__(self, unsure: str, inner: str, start: str, units: str):
        self.unsure, self.inner = unsure, inner
        self.start = regex.compile(start)
        self.found = regex.compile(f"(?P<spaced>{SPACED})|{units}")
        self.live = regex.compile(f"(?:{SPACED}|{units})(?s:.)(?!)")


START = r"[^A-Za-z\s]|(?<![\p{L}\p{N}])\p{L}(?![\p{L}\p{N}])"
JOINING = Way("i", "", START, ODD)
SPREADING = Way("l", " ", f"{START}|{GAP}", f"{ODD}|{GAP}")
_LETTERS = regex.compile(r"(?r)[A-Za-z]{1,41}")
_OPEN = regex.compile(r"(?r)[A-Za-z]{1,41}|\s")
"""What may become a unit at the end of a text."""


def loosened(unit: str, spaced: bool, way: Way) -> str:
    """A word, a run of spaced letters, or a gap, in plain letters."""
    if unit.isspace():
        return " "
    out = _closed(unit) if spaced else unit
    if not out.isascii():
        out = "".join(map(_bare, out))
    if not out.isalpha():
        out = _MARKS.sub("", _LEETED.sub(lambda word: _leet(word.group(), way.unsure), out))
        out = _INNER.sub(way.inner, out)
    return out


def _loosen(view: View, final: bool) -> None:
    """Words wait for their end."""
    for unit, spaced in _units(view, final, JOINING):
        _put(view, unit, loosened(unit, spaced, JOINING))


def _spread(view: View, final: bool) -> None:
    """As `_loosen`; shown from the first word on that the two read differently."""
    for unit, spaced in _units(view, final, SPREADING):
        out = loosened(unit, spaced, SPREADING)
        _put(view, unit, out)
        view.shown = view.shown or out != (unit if unit.isspace() else loosened(unit, spaced, JOINING))


def _units(view: View, final: bool, way: Way) -> Iterator[tuple[str, bool]]:
    """(unit, whether it is a run of spaced letters) for each that is certain; the rest is kept as it is."""
    assert view.source is not None
    text, place = view.source.text, view.at
    tail = None if final else _OPEN.match(text)
    upto = max(view.at, tail.start()) if tail else len(text)
    while odd := way.start.search(text, pos=place):
        before = None if odd.group().isspace() else _LETTERS.match(text, pos=view.at, endpos=odd.start())
        start = before.start() if before else odd.start()
        if start >= upto:
            break
        view.keep(start)
        if not final and way.live.match(text, pos=start, partial=True, timeout=TIMEOUT):
            return
        match = way.found.match(text, pos=start, timeout=TIMEOUT)
        if match:
            yield match.group(), match["spaced"] is not None
            view.keep(match.end())
        place = match.end() if match else odd.start() + 1
    view.keep(upto)


def _put(view: View, unit: str, out: str) -> None:
    """Writes `out` for the unit that comes next: what the two have in common at both ends is kept as it is."""
    if out == unit:
        return
    most = min(len(unit), len(out))
    head = next((i for i in range(most) if unit[i] != out[i]), most)
    tail = next((i for i in range(most - head) if unit[-1 - i] != out[-1 - i]), most - head)
    start = view.at
    view.keep(start + head)
    view.put(out[head : len(out) - tail], start + len(unit) - tail)


# --- Turning --------------------------------------------------------------------------------------------------------

_WORDS = regex.compile(r"[A-Za-z]+")
_MODEL = Path(__file__).parent / "models" / "bigrams.txt"
MARGIN = 2.0
"""How much more English a word must look when turned, in tenths of a nat a letter."""
RUN = 12
"""Words at most that are turned together."""


@lru_cache(maxsize=1)
def _bigrams() -> tuple[tuple[int, ...], ...]:
    """Costs of letter pairs in English words, -10 ln P(second | first); row and column 0 is the edge of a word."""
    return tuple(tuple(map(int, row.split())) for row in _MODEL.read_text().splitlines())


def _cost(word: str) -> float:
    """How little a word looks like English: the mean cost of its letter pairs."""
    costs, total, before = _bigrams(), 0, 0
    for sign in word:
        this = ord(sign) - 96
        total, before = total + costs[before][this], this
    return (total + costs[before][0]) / (len(word) + 1)


@lru_cache(maxsize=16384)
def is_turned(word: str) -> bool:
    """True for a word of small letters that looks more English backwards or in rot13."""
    if not 4 <= len(word) <= 40:
        return False
    turned = min(_cost(codecs.encode(word, "rot13")), _cost(word[::-1]), inf)
    return turned < _cost(word) - MARGIN


def _turn(view: View, final: bool) -> None:
    """Runs of words that look turned are written in all the ways they may be read; short words in them go along."""
    assert view.source is not None
    text = view.source.text
    run: list[tuple[int, int]] = []
    end = view.at
    for match in _WORDS.finditer(text, pos=view.at):
        if match.end() == len(text) and not final:
            break
        gap = text[end : match.start()]
        if run and (len(run) == RUN or not (0 < len(gap) <= 2 and gap.isspace())):
            run = _close(view, text, run)
        turned, short = is_turned(match.group().lower()), len(match.group()) < 4
        if turned or (run and short):
            run.append(match.span())
        elif run:
            run = _close(view, text, run)
        end = match.end()
        if not run:
            view.keep(end)
    else:
        if run and (final or (len(text) > end and not text[end:].isspace()) or len(text) > end + 2):
            run = _close(view, text, run)
        if not run:
            view.keep(len(text))


def _close(view: View, text: str, run: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Writes a run, without the short words at its end."""
    while run and run[-1][1] - run[-1][0] < 4:
        run.pop()
    start, end = run[0][0], run[-1][1]
    whole = text[start:end]
    each = " ".join(word[::-1] for word in whole.split())
    view.keep(start)
    view.put(" \n".join((codecs.encode(whole, "rot13"), whole[::-1], each)), end)
    return []
