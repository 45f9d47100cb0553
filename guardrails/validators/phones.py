"""Telephone numbers, in every country's own rules (phonenumbers), asked only about digits that could be one."""

from __future__ import annotations

from collections.abc import Sequence

import phonenumbers
import regex

from guardrails.spans import Accept, Span
from guardrails.validators.identifiers import GAP, Announced

CALL = r"phone|tele?|tel\.|telephone|mobile|cell|call|fax|whatsapp|sms|signal|dial|handy|tél|móvil"
"""Words for calling: after them even an unbroken row of digits may be a number."""
DATES = {(4, 2, 2), (4, 1, 2), (4, 2, 1), (4, 1, 1), (2, 2, 4), (1, 2, 4), (2, 1, 4), (1, 1, 4), (2, 2, 2)}
"""Sizes of the groups of digits in dates."""
DIGITS = regex.compile(r"[0-9]+\)?")
START, END = r"(?<![0-9A-Za-z+])(?<![0-9][.,/:])", r"(?![0-9A-Za-z])"


class PhoneSpan(Span):
    """A span whose pattern takes in all groups of digits that follow; the longest part that is a number is found."""

    __slots__ = ()

    def part(self, text: str, match: regex.Match[str]) -> tuple[int, int] | None:
        """The longest part from the start of the match that is a number."""
        first, ends = match.start(), [group.end() for group in DIGITS.finditer(text, *match.span())]
        return next(((first, end) for end in reversed(ends) if self.accept and self.accept(text[first:end])), None)


def spans(regions: Sequence[str]) -> list[Span]:
    """International and grouped national numbers, and unbroken ones after a word for calling.

    Raises ValueError for a region that is not known.
    """
    if unknown := set(regions) - phonenumbers.SUPPORTED_REGIONS:
        raise ValueError(f"regions: {', '.join(sorted(unknown))} is not a country code; write two capitals such as US")
    digits, between = r"\(?[0-9]{1,15}\)?", rf"(?:[/{GAP}]{{1,3}}|(?<=\))|(?=\())"
    grouped = rf"(?:\+{digits}|{digits}{between}{digits})(?:{between}{digits}){{0,6}}"
    dialled = _dialled(regions)
    return [
        PhoneSpan("phone", f"{START}{grouped}{END}", lambda text: not text.isdigit() and dialled(text)),
        Announced("phone", f"{START}[0-9]{{7,15}}{END}", CALL, dialled),
    ]


def _dialled(regions: Sequence[str]) -> Accept:
    """True for what some country dials: international numbers by validity, national ones also by their grouping."""
    strict, matcher = phonenumbers.Leniency.STRICT_GROUPING, phonenumbers.PhoneNumberMatcher

    def accept(text: str) -> bool:
        sizes = tuple(len(group) for group in "".join(c if c.isdigit() else " " for c in text).split())
        if not 7 <= sum(sizes) <= 15 or (text[0] != "+" and sizes in DATES):
            return False
        if text[0] == "+":
            return any(match.raw_string == text for match in matcher(text, None))
        return any(match.raw_string == text for region in regions for match in matcher(text, region, strict))

    return accept
