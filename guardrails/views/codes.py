"""Reading what was written as something else: base64, hex, URLs, HTML, escapes, morse, bidi overrides, markup."""

from __future__ import annotations

import base64
import binascii
import html
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote

import regex

from guardrails.views.folding import BIDI, TIMEOUT, fold
from guardrails.views.view import View

DEPTH = 8
"""How often a text that was decoded is decoded again."""


def _readable(text: str) -> bool:
    """True for what a person could have written: printable, and mostly letters."""
    if len(text) < 3 or not all(sign.isprintable() or sign in "\t\n\r" for sign in text):
        return False
    return sum(sign.isalpha() or sign == " " for sign in text) >= 0.6 * len(text)


def _text_of(raw: bytes) -> str | None:
    try:
        text = raw.decode("utf-16-le" if raw[1:2] == b"\0" else "utf-8")
    except UnicodeDecodeError:
        return None
    return text if _readable(text) or (text.isprintable() and _FOUND.fullmatch(text)) else None


def _base64(code: str) -> str | None:
    plain = regex.sub(r"\s+", "", code).rstrip("=").translate({45: "+", 95: "/"})
    plain = plain[: len(plain) - 1] if len(plain) % 4 == 1 else plain
    text = _text_of(base64.b64decode(plain + "=" * (-len(plain) % 4)))
    return _path(code) if text is None and "/" in code else text


def _path(code: str) -> str | None:
    """A path of which one or more parts are base64, read; None where none is."""
    parts = code.split("/")
    read = [_base64(part) if len(part) >= PART else None for part in parts]
    return "/".join(text or part for text, part in zip(read, parts, strict=True)) if any(read) else None


def _base32(code: str) -> str | None:
    plain = code.rstrip("=").upper()
    try:
        return _text_of(base64.b32decode(plain + "=" * (-len(plain) % 8)))
    except binascii.Error:
        return None


def _hex(code: str) -> str | None:
    digits = regex.sub(r"0x|\\x|[^0-9a-f]", "", code.lower())
    return _text_of(bytes.fromhex(digits[: len(digits) // 2 * 2]))


def _binary(code: str) -> str | None:
    digits = "".join(code.split())
    return _text_of(bytes(int(digits[i : i + 8], 2) for i in range(0, len(digits), 8)))


def _decimal(code: str) -> str | None:
    numbers = [int(number) for number in regex.findall(r"\d+", code)]
    signs = [chr(number) for number in numbers if 32 <= number < 127]
    text = "".join(signs)
    return text if len(signs) >= 0.8 * len(numbers) and _readable(text) else None


SPACES = {"n": "\n", "r": "\r", "t": "\t", "/": "/"}


def _escapes(code: str) -> str | None:
    def sign(match: regex.Match[str]) -> str:
        if match[4]:
            return SPACES[match[4]]
        hexadecimal, octal = match[1] or match[2], match[3]
        number = int(hexadecimal, 16) if hexadecimal else int(octal, 8)
        return chr(number) if number < 0x110000 else match[0]

    read = regex.sub(
        r"\\{1,4}(?:[uUx]\{?([0-9a-fA-F]{2,8})\}?|N\{U\+([0-9a-fA-F]{2,6})\}|([0-7]{3})|([nrt/]))", sign, code
    )
    return read.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")  # two halves are one character


def _points(code: str) -> str | None:
    numbers = [int(number, 16) for number in regex.findall(r"\+([0-9a-fA-F]+)", code)]
    text = "".join(chr(number) for number in numbers if number < 0x110000)
    return text if _readable(text) else None


MORSE = dict(
    zip(
        (
            ".-",
            "-...",
            "-.-.",
            "-..",
            ".",
            "..-.",
            "--.",
            "....",
            "..",
            ".---",
            "-.-",
            ".-..",
            "--",
            "-.",
            "---",
            ".--.",
            "--.-",
            ".-.",
            "...",
            "-",
            "..-",
            "...-",
            ".--",
            "-..-",
            "-.--",
            "--..",
        ),
        "abcdefghijklmnopqrstuvwxyz",
        strict=True,
    )
)


def _morse(code: str) -> str | None:
    words = regex.split(
        r"\s*[/|]\s*|\s{3,}", code.translate({0x2D3: "-", 0x2013: "-", 0x2212: "-", 0xB7: ".", 0x2022: "."}).strip()
    )
    letters = ["".join(MORSE.get(one, "\0") for one in word.split()) for word in words]
    text = " ".join(letters)
    return None if "\0" in text else text


def _backwards(code: str) -> str:
    return "".join(sign for sign in reversed(code) if sign not in BIDI)


TAGS = r"(?:</?[a-zA-Z][^<>\n]{0,80}>|<!--[^<>]{0,80}-->){1,4}"
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


WORD, HEX = r"[A-Za-z0-9+/_-]", "[0-9a-fA-F]"
LINES = rf"{WORD}{{16,80}}(?:\r?\n[ \t]{{0,4}}{WORD}{{4,80}}){{1,60}}"
BASE64 = rf"(?<!{WORD}){WORD}{{8,65000}}={{0,2}}"
PART = 16
"""Characters from which on a part of a path may be a code by itself."""
PAIR = f"(?:0x)?{HEX}{{2}}"
ESCAPES = rf"(?:\\{{1,4}}(?:[uUx]\{{{HEX}{{1,6}}\}}|u{HEX}{{4}}|U{HEX}{{8}}|x{HEX}{{2}}|[0-7]{{3}}|[nrt/])){{1,99}}"
CODES = (
    Code("bidi", r"[\u202e\u2067][^\u202a-\u202e\u2066-\u2069\n]{1,300}(?:[\u202c\u2069]|(?=\n)|\Z)", _backwards),
    Code("invisible", r"[\u202a-\u202e\u2066-\u2069]{1,200}", lambda code: ""),
    Code("entity", r"(?:&(?:amp;){0,4}(?:\#[0-9]{1,7}|\#[xX][0-9a-fA-F]{1,6}|[a-zA-Z]{2,8});?){1,500}", html.unescape),
    Code("percent", r"(?:%26(?:%23|\#)[xX]?[0-9a-fA-F]{1,6}%3[bB]){1,500}", unquote),
    Code("percent", r"(?:%(?:25){0,4}[0-9a-fA-F]{2}){1,500}", lambda code: unquote(code, errors="replace")),
    Code("escape", ESCAPES, _escapes),
    Code("markup", rf"(?<=\w){TAGS}|{TAGS}(?=\w)", _markup),
    Code("joined", r"""(?<=\w)(?:"\s?[+.&]{0,2}\s?"|'\s?[+.&]{0,2}\s?')(?=\w)""", lambda code: ""),
    Code("hyphen", r"(?<=\p{L})-\r?\n[ \t]{0,4}(?=\p{Ll})", lambda code: ""),
    Code("points", rf"[uU]\+{HEX}{{2,6}}(?:[ ,;]{{0,3}}[uU]\+{HEX}{{2,6}}){{2,500}}(?!{HEX})", _points),
    Code("binary", r"(?<![0-9])[01]{8}(?:\s?[01]{8}){2,500}(?![0-9])", _binary),
    Code("hex", r"(?<![0-9A-Za-z])(?:0x)?(?:[0-9a-fA-F]{2}){5,32000}(?![0-9A-Za-z])", _hex),
    Code("hex", rf"(?<![0-9A-Za-z])(?<!{HEX}{{2}}[ ,:-]){PAIR}(?:[ ,:-]{{1,2}}{PAIR}){{4,500}}(?![0-9A-Za-z])", _hex),
    Code("decimal", r"(?<![0-9])(?<![0-9]{2}[ ,])[0-9]{2,3}(?:[ ,]{1,2}[0-9]{2,3}){4,500}(?![0-9])", _decimal),
    Code("morse", r"(?<!\S)[.·•–−-]{1,6}(?:(?: {1,3}| ?[/|] ?)[.·•–−-]{1,6}){3,300}(?!\S)", _morse),
    Code("base32", r"(?<![A-Za-z0-9])(?:[A-Z2-7]{16,2000}|[a-z2-7]{16,2000})={0,6}(?![A-Za-z0-9+/=_-])", _base32),
    Code("base64", rf"(?<!{WORD}){LINES}={{0,2}}(?![A-Za-z0-9+/=_-])", _base64),
    Code("base64", rf"{BASE64}(?![A-Za-z0-9+/=_-])", _base64),
)  # fmt: skip
_ANY = "|".join(f"(?:{code.pattern})" for code in CODES)
_FOUND = regex.compile(_ANY)
_LIVE = regex.compile(f"(?:{_ANY})(?s:.)(?!)")
_EACH = tuple((regex.compile(code.pattern), code.read) for code in CODES)
_START = regex.compile(
    rf"""[%&\\<"'\u202a-\u202e\u2066-\u2069]|(?<![0-9A-Za-z])[0-9]|(?<!\S)[.·•–−-]|(?<=\p{{L}})-\r?\n|[uU]\+{HEX}{{2}}|(?<!{WORD}){WORD}{{8}}"""
)
"""What every code that says something starts with (hex for a readable text starts with a digit)."""
_TAIL = regex.compile(rf"(?r){WORD}+")
LONGEST = 65_500
"""Characters of the longest code; a word without an end is not waited for beyond it."""


def _said(text: str, start: int) -> tuple[str, int] | None:
    """(what the code at this place says, where it ends), or None where there is none that says anything."""
    if not _FOUND.match(text, pos=start, timeout=TIMEOUT):
        return None
    for pattern, read in _EACH:
        match = pattern.match(text, pos=start, timeout=TIMEOUT)
        said = read(match.group()) if match else None
        if match and said is not None and said != match.group():
            return said, match.end()
    return None


@lru_cache(4096)
def _reads(code: str) -> bool:
    return _base64(code) not in (None, code)


def says(code: str) -> bool:
    """True for a word that says something as base64."""
    return _reads(code) if len(code) <= 64 else True


def undone(text: str, depth: int = DEPTH) -> str:
    """A whole text folded and decoded, as often as that changes it."""
    for _ in range(depth):
        out, at = list[str](), 0
        plain = "".join(sign if (seen := fold(sign)) is None else seen for sign in text)
        for start in _START.finditer(plain):
            if start.start() >= at and (said := _said(plain, start.start())):
                out += (plain[at : start.start()], said[0])
                at = said[1]
        before, text = text, "".join((*out, plain[at:]))
        if text == before or len(text) > 4 * len(before) + 64:
            break
    return text


def decoded(view: View, final: bool) -> None:
    """Text that may become a code is waited for; a code is one piece, and what it says comes from all of it."""
    text, place = view.made_of, view.at
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
