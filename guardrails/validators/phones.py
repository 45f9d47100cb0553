"""Telephone numbers, in every country's own rules (phonenumbers), asked only about digits that could be one."""

from __future__ import annotations

from collections.abc import Sequence

import phonenumbers
import regex

from guardrails.spans import Accept, Span
from guardrails.validators.identifiers import GAP, Announced

CALL = r"phone|tele?|tel\.|telephone|mobile|cell|call|fax|whatsapp|sms|signal|dial|handy|tél|móvil"
"""Words for calling: after them even an unbroken row of digits may be a number."""
EU = "AT BE BG CY CZ DE DK EE ES FI FR GR HR HU IE IT LT LU LV MT NL PL PT RO SE SI SK"
"""The members of the European Union, for `regions = ["EU"]`."""
DATES = {(4, 2, 2), (4, 1, 2), (4, 2, 1), (4, 1, 1), (2, 2, 4), (1, 2, 4), (2, 1, 4), (1, 1, 4), (2, 2, 2)}
"""Sizes of the groups of digits in dates."""
DIGITS = regex.compile(r"([0-9]+)\)?")
START, END = r"(?<![0-9A-Za-z+])(?<![0-9][.,/:])", r"(?![0-9A-Za-z])"


class PhoneSpan(Span):
    """A span whose pattern takes in all groups of digits that follow; the longest part that is a number is found."""

    __slots__ = ()

    def part(self, text: str, match: regex.Match[str]) -> tuple[int, int] | None:
        """The longest part from the start of the match that is a number (ITU-T E.164: 15 digits at most)."""
        first, digits = match.start(), 0
        ends: list[int] = []
        for group in DIGITS.finditer(text, *match.span()):
            digits += len(group[1])
            if 7 <= digits <= 15:
                ends.append(group.end())
        return next(((first, end) for end in reversed(ends) if self.accept and self.accept(text[first:end])), None)


def spans(regions: Sequence[str]) -> list[Span]:
    """International and grouped national numbers, and unbroken ones after a word for calling.

    Raises ValueError for a region that is not known.
    """
    regions = list(dict.fromkeys(one for region in regions for one in (EU.split() if region == "EU" else [region])))
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
    shapes = [(region, *_shape(region)) for region in regions]

    def accept(text: str) -> bool:
        if text[0] == "+":
            return _is_valid(text, None)
        groups = "".join(c if c.isdigit() else " " for c in text).split()
        digits = "".join(groups)
        return tuple(map(len, groups)) not in DATES and any(
            len(digits) in lengths and digits.startswith(trunk) and _is_grouped(text, region)
            for region, trunk, lengths in shapes
        )

    return accept


def _shape(region: str) -> tuple[str, set[int]]:
    """How a region's numbers start within the country ("0", or anything), and how many digits they may have."""
    metadata = phonenumbers.PhoneMetadata.metadata_for_region(region)
    if metadata is None or metadata.general_desc is None:
        return "", set()
    prefix = metadata.national_prefix or ""
    national = set(metadata.general_desc.possible_length)
    return ("0" if prefix == "0" else "", national | {length + len(prefix) for length in national})


def _is_valid(text: str, region: str | None) -> bool:
    """True for a number that can be dialled, checked cheaply (25 microseconds)."""
    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(text, region))
    except phonenumbers.NumberParseException:
        return False


def _is_grouped(text: str, region: str) -> bool:
    """True for a valid national number that is written in groups as the region writes them (200 microseconds)."""
    if not _is_valid(text, region):
        return False
    matches = phonenumbers.PhoneNumberMatcher(text, region, phonenumbers.Leniency.STRICT_GROUPING)
    return any(match.raw_string == text for match in matches)
