"""Words in unusual letters: leet, accents, spaced and dotted letters, signs inside words."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import lru_cache

import regex

from guardrails.views.folding import TIMEOUT
from guardrails.views.view import View

LEET = {
    "0": "o", "3": "e", "4": "a", "5": "s", "7": "t", "8": "b", "9": "g", "6": "g", "2": "z",
    "@": "a", "$": "s", "+": "t", "€": "e", "£": "l", "¢": "c", "§": "s",
}  # fmt: skip
UNSURE = "1!|"
"""Signs that stand for an i or an l: each of the two loose views takes one."""
SIGNS = regex.escape("".join([*LEET, *UNSURE]), special_only=False)
BETWEEN = r"[^\p{L}\p{N}]{1,5}"
SPACED = rf"(?<![\p{{L}}\p{{N}}])[\p{{L}}\p{{N}}@$](?:{BETWEEN}[\p{{L}}\p{{N}}@$!|]){{2,80}}(?![\p{{L}}\p{{N}}])"
"""Single letters: `s a l a r y`, `s.a.l.a.r.y`, one a line; the commonest gap goes, others part words."""
ODD = r"(?<![A-Za-z])(?=[A-Za-z]{0,40}[^A-Za-z\s])\S{1,200}"
"""A word that is not made of plain letters alone."""
GAP = r"\s{2,100}|[^\S ]"
_GAP = regex.compile(GAP)
_LEETED = regex.compile(rf"[{SIGNS}\w]+")
_INNER = regex.compile(r"(?<=\p{L})[^\p{L}\p{N}\s'’]{1,4}(?=\p{L})")
_MARKS = regex.compile(
    r"(?<!\p{L})[*_~`]{1,3}(?=\p{L})|(?<=\p{L})[*_~`]{1,3}(?!\p{L})|(?<=\p{L})(?:\*{1,3}|__|~~|`)(?=\p{L})"
)
"""Marks of emphasis, around words and inside them."""
_BREAK = regex.compile(r"[^\p{L}\p{N}@$!|]+|(?<=[\p{L}\p{N}])[@$!|]+(?=[\p{L}\p{N}])")


@lru_cache(maxsize=4096)
def bare(sign: str) -> str:
    """A Latin letter without its accents."""
    first = unicodedata.normalize("NFD", sign)[0]
    return first if first.isascii() else sign


def _leet(word: str, unsure: str) -> str:
    """A word with letters for the digits and signs in it; a number, or a word with a number behind it, stays."""
    core = word.rstrip("!|+")
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


START = r"(?![.,;:!?)\"'’]{1,3}(?:\s|\Z))[^A-Za-z\s]|(?<![\p{L}\p{N}])\p{L}(?![\p{L}\p{N}])"
"""An odd sign, unless it ends a word as signs usually do; a single letter."""
JOINING = Way("i", "", START, ODD)
SPREADING = Way("l", " ", f"{START}|{GAP}", f"{ODD}|{GAP}")
_LETTERS = regex.compile(r"(?r)[A-Za-z]{1,41}")
_OPEN = regex.compile(r"(?r)[A-Za-z]{0,41}[.,;:!?)\"'’]{1,3}|[A-Za-z]{1,41}|\s")
"""What may become a unit at the end of a text."""


def plain(unit: str, spaced: bool, way: Way) -> str:
    """A word, a run of spaced letters, or a gap, in plain letters."""
    if unit.isspace():
        return " "
    out = _closed(unit) if spaced else unit
    if not out.isascii():
        out = "".join(map(bare, out))
    if not out.isalpha():
        out = _MARKS.sub("", _LEETED.sub(lambda word: _leet(word.group(), way.unsure), out))
        out = _INNER.sub(way.inner, out)
    return out


def loosened(view: View, final: bool) -> None:
    """Words wait for their end."""
    for unit, spaced in _units(view, final, JOINING):
        _put(view, unit, plain(unit, spaced, JOINING))


def spread(view: View, final: bool) -> None:
    """As `loosened`; shown from the first word on that the two read differently."""
    for unit, spaced in _units(view, final, SPREADING):
        out = plain(unit, spaced, SPREADING)
        _put(view, unit, out)
        view.shown = view.shown or out != (unit if unit.isspace() else plain(unit, spaced, JOINING))


def gapped(view: View, end: int) -> None:
    """As `spread`, up to `end`, where no word reads differently; a gap must not go on there."""
    for gap in _GAP.finditer(view.made_of, view.at, end):
        view.keep(gap.start())
        _put(view, gap.group(), " ")
        view.shown = True
    view.keep(end)


def _units(view: View, final: bool, way: Way) -> Iterator[tuple[str, bool]]:
    """(unit, whether it is a run of spaced letters) for each that is certain; the rest is kept as it is."""
    text, place = view.made_of, view.at
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
