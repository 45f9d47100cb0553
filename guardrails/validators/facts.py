"""What a text states that can be looked up letter by letter: numbers, dates, names, links; each in one form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, TypeAlias

import regex

from guardrails.validators import domains

Kind = Literal["number", "date", "name", "link"]
Value: TypeAlias = "Decimal | str | tuple[int, int, int]"
"""Of a number its value, of a date (year, month, day) with 0 for what is not said, of the others their words."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A stated fact: where, and what it may mean (`1.234` is two numbers, `3/4/2024` two dates).

    unit: of a number, in one form; empty where it has none. loose: a written-out number, perhaps a figure of speech.
    """

    kind: Kind
    start: int
    end: int
    values: frozenset[Value]
    unit: str = ""
    loose: bool = False


UNIT_NAMES = {
    "%": "% percent pct prozent percentage", "second": "second seconds sec secs", "minute": "minute minutes min mins",
    "hour": "hour hours hr hrs h", "day": "day days", "week": "week weeks", "month": "month months",
    "year": "year years yr yrs", "eur": "€ eur euro euros", "usd": "$ usd us$ dollar dollars",
    "gbp": "£ gbp pound pounds", "chf": "chf", "jpy": "¥ jpy yen", "cent": "cent cents", "cm": "cm", "mm": "mm",
    "km": "km kilometer kilometers kilometre kilometres", "mile": "mile miles", "m": "meter meters metre metres",
    "kg": "kg", "g": "gram grams", "mg": "mg", "ml": "ml", "l": "liter liters litre litres", "gb": "gb", "mb": "mb",
    "degree": "degree degrees °c °f",
}  # fmt: skip
UNITS = {name: unit for unit, names in UNIT_NAMES.items() for name in names.split()}
SCALES = {
    "hundred": 100, "thousand": 1000, "k": 1000, "million": 10**6, "mn": 10**6, "mio": 10**6, "billion": 10**9,
    "bn": 10**9, "mrd": 10**9, "trillion": 10**12,
}  # fmt: skip
SMALL_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
SMALL = {word: number for number, word in enumerate(SMALL_WORDS.split())}
TEN_WORDS = "twenty thirty forty fifty sixty seventy eighty ninety"
TENS = {word: 10 * number for number, word in enumerate(TEN_WORDS.split(), 2)}
MONTH_NAMES = (
    "January Jan|February Feb|March Mar|April Apr|May|June Jun|July Jul|August Aug|September Sept Sep|October Oct"
    "|November Nov|December Dec"
)
MONTHS = {name: n for n, names in enumerate(MONTH_NAMES.split("|"), 1) for name in names.split()}
UNIT = (
    r"(?:[ \u00a0\u202f-]?(?:(?:working|business|calendar|consecutive|paid|unpaid|full|extra|additional|more)[ -])?"
    rf"(?P<unit>%|[€$£¥]|(?i:{'|'.join(sorted((name for name in UNITS if name[0].isalpha()), key=len, reverse=True))})"
    r"(?![\p{L}\p{N}])))?"
)
SCALE = rf"(?:[ \u00a0-]?(?P<scale>(?i:{'|'.join(sorted(SCALES, key=len, reverse=True))})(?![\p{{L}}\p{{N}}])))?"
NUMBER = regex.compile(
    r"(?<![\p{L}\p{N}_.,/:]|[^0-9]-|^-)(?P<money>US\$|[€$£¥]|(?:EUR|USD|GBP|CHF|JPY)[ \u00a0])?[ \u00a0]?[-−+]?"
    r"(?P<digits>[0-9]{1,3}(?P<sep>[,.'’ \u00a0\u202f])[0-9]{3}(?:(?P=sep)[0-9]{3}){0,5}(?:[.,][0-9]{1,4})?(?![0-9])"
    r"|[0-9]{1,18}(?:[.,][0-9]{1,9}){0,3})(?:st|nd|rd|th)?(?![0-9])" + SCALE + UNIT
)
ONES = "|".join(sorted(SMALL, key=len, reverse=True))
WRITTEN = regex.compile(
    rf"(?i)(?<![\p{{L}}\p{{N}}-])(?:(?P<tens>{'|'.join(TENS)})(?:[ -](?P<one>{ONES}))?|(?P<small>{ONES})"
    r"|(?P<a>an?)(?=[ -]))"
    r"(?![\p{L}\p{N}])" + SCALE + UNIT
)
CLOCK = regex.compile(
    r"(?<![\p{L}\p{N}.,:/-])(?P<hour>[0-9]{1,2})(?:[:.](?P<minute>[0-5][0-9]))?[ \u00a0]?(?P<half>[ap]\.?m\b\.?)"
    r"|(?<![\p{L}\p{N}.,:/-])(?P<hour>[0-9]{1,2}):(?P<minute>[0-5][0-9])(?![0-9:])",
    regex.IGNORECASE,
)
MONTH = f"(?P<month>{'|'.join(sorted(MONTHS, key=len, reverse=True))})\\.?(?![\\p{{L}}])"
DATE = regex.compile(
    r"(?<![\p{L}\p{N}.,/-])(?:"
    r"(?P<y>[12][0-9]{3})[-/.](?P<m>[01]?[0-9])[-/.](?P<d>[0-3]?[0-9])(?![0-9])"
    r"|(?P<one>[0-3]?[0-9])(?P<by>[./-])(?P<two>[0-3]?[0-9])(?P=by)(?P<y>[12][0-9]{3}|[0-9]{2})(?![0-9])"
    rf"|(?P<d>[0-3]?[0-9])(?:st|nd|rd|th|\.)?[ \u00a0](?:of[ ])?{MONTH}(?:,?[ \u00a0](?P<y>[12][0-9]{{3}})(?![0-9]))?"
    rf"|{MONTH}[ \u00a0](?P<d>[0-3]?[0-9])(?:st|nd|rd|th)?(?![0-9\p{{L}}])"
    r"(?:,?[ \u00a0](?P<y>[12][0-9]{3})(?![0-9]))?"
    rf"|{MONTH},?[ \u00a0](?:of[ ])?(?P<y>[12][0-9]{{3}})(?![0-9])"
    r"|(?P<weekday>(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day)s?(?![\p{L}]))"
)
LINK = regex.compile(
    rf"(?i)(?<![\w.+%-])[\w.+%-]{{1,64}}@[\w-]{{1,63}}(?:\.[\w-]{{1,63}}){{1,6}}|https?://[^\s<>\"'`()\[\]]{{1,2000}}"
    rf"|(?<![\w@./-]){domains.BARE}(?:[/?#][^\s<>\"'`()\[\]]{{0,2000}})?"
)
CAPITAL = r"\p{Lu}[\p{L}\p{M}]{1,30}(?:['’-][\p{L}\p{M}]{1,30}){0,2}"
NAME = regex.compile(
    rf"(?<![\p{{L}}\p{{N}}_]){CAPITAL}(?:[ \u00a0](?:(?:of|de|van|von|der|den|la|du|di)[ ]){{0,2}}{CAPITAL}){{1,5}}"
    r"(?![\p{L}\p{N}_]|-[\p{L}\p{N}])"
    r"|(?<![\p{L}\p{N}_-])(?=[A-Z0-9-]{0,12}[A-Z])[A-Z0-9]{2,20}(?:-[A-Z0-9]{1,20}){0,4}(?![\p{L}\p{N}_])"
)
NUMBERED = regex.compile(
    r"^[ \t>]{0,20}(?:[-*•][ \t]{1,4})?(?:\*\*|#{1,6}[ \t])?\(?[0-9]{1,3}[.):](?:[*\s]|\Z)"
    r"|(?i:\b(?:step|option|point|item|part|question|answer|example)[ \u00a0]#?[0-9]{1,3}(?![0-9.,%]))"
    r"|(?<![0-9])24/7(?![0-9])",
    regex.MULTILINE,
)
TITLES = regex.compile(
    r"^[ \t]{0,20}#{1,6}[ \t].{0,200}$|^[ \t>]{0,20}(?:[-*•]|[0-9]{1,3}[.)])?[ \t]{0,4}\*\*.{1,120}?\*\*:?"
    r"|^[ \t>]{0,20}(?:[-*•]|[0-9]{1,3}[.)])?[ \t]{0,4}[\p{L} ]{1,60}:",
    regex.MULTILINE,
)
"""Headings and the words that open a line: their capitals name nothing."""
OPENERS_WORDS = (
    "the a an this that these those your our my his her their its if when as in on at for from with by to and but so "
    "dear hi hello contact ask see call email please yes no mr ms mrs dr miss according under since while after "
    "before once until both each every all any some both only also"
)
OPENERS = frozenset(OPENERS_WORDS.split())
"""Words with which a sentence opens: their capital belongs to no name."""
WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+")
POSSESSIVE = regex.compile(r"['’]s\b")


def facts(text: str) -> list[Fact]:
    """The facts of a text, in the order of their start; no letter belongs to two of them, but for names."""
    taken = [match.span() for match in NUMBERED.finditer(text)] if DIGIT.search(text) else []
    found: list[Fact] = []
    for gate, pattern, read in READERS:
        if not gate.search(text):
            continue
        text_left = _without(text, taken)
        for match in pattern.finditer(text_left):
            if fact := read(match):
                found.append(fact)
                taken.append(match.span())
    found += _names(text, taken)
    return sorted(found, key=lambda fact: fact.start)


def _without(text: str, taken: list[tuple[int, int]]) -> str:
    """The text with signs that mean nothing in the taken places."""
    out: list[str] = []
    last = 0
    for start, end in sorted(taken):
        if start >= last:
            out += (text[last:start], "\x1f" * (end - start))
            last = end
    return "".join((*out, text[last:]))


def link(written: str) -> str:
    """A link in one form: without scheme, `www.`, closing signs; in small letters."""
    plain = regex.sub(r"^https?://|^mailto:", "", written.lower()).removeprefix("www.")
    return plain.rstrip(".,;:!?*_~/")


def words(text: str) -> str:
    """The words of a text in one form, a space around each: what names are looked up in."""
    return f" {' '.join(WORD.findall(POSSESSIVE.sub('', text.casefold())))} "


def _link(match: regex.Match[str]) -> Fact:
    end = match.end() - (len(match.group()) - len(match.group().rstrip(".,;:!?*_~")))
    return Fact("link", match.start(), end, frozenset([link(match.group())]))


def _date(match: regex.Match[str]) -> Fact | None:
    if match["weekday"]:
        return Fact("date", *match.span(), frozenset([match["weekday"].lower()]))
    year = int(match["y"] or 0)
    year += 2000 if 0 < year < 70 else 1900 if 70 <= year < 100 else 0
    if match["one"]:
        one, two = int(match["one"]), int(match["two"])
        pairs = [(one, two), (two, one)]
    else:
        pairs = [(MONTHS[match["month"]] if match["month"] else int(match["m"]), int(match["d"] or 0))]
    dates = frozenset((year, month, day) for month, day in pairs if 0 < month <= 12 and day <= 31)
    return Fact("date", *match.span(), dates) if dates else None


def _clock(match: regex.Match[str]) -> Fact | None:
    hour, minute, half = int(match["hour"]), int(match["minute"] or 0), (match["half"] or "").lower()
    if hour > 24:
        return None
    hour = hour % 12 + 12 * half.startswith("p") if half else hour
    hours = {hour} if half or hour >= 12 else {hour, hour + 12}
    return Fact("number", *match.span(), frozenset(f"{one}:{minute:02}" for one in hours), "o'clock")


def _number(match: regex.Match[str]) -> Fact:
    scale = SCALES.get((match["scale"] or "").lower(), 1)
    unit = UNITS.get((match["unit"] or match["money"] or "").strip().lower(), "")
    return Fact("number", *match.span(), frozenset(value * scale for value in _values(match["digits"])), unit)


def _values(digits: str) -> Iterator[Decimal]:
    """What the digits may mean: `1.234` is a thousand to some and one to others."""
    plain = regex.sub(r"['’ \u00a0\u202f]", "", digits)
    signs = [sign for sign in plain if not sign.isdigit()]
    if len(signs) > 1 and len(set(signs)) == 1:
        yield Decimal(plain.replace(signs[0], ""))
        return
    whole, _, part = plain.rpartition(signs[-1]) if signs else (plain, "", "")
    whole = whole.replace(",", "").replace(".", "")
    yield Decimal(f"{whole}.{part or 0}").normalize()
    if len(signs) == 1 and len(part) == 3:
        yield Decimal(whole + part)


def _written(match: regex.Match[str]) -> Fact | None:
    unit, scale = UNITS.get((match["unit"] or "").lower(), ""), SCALES.get((match["scale"] or "").lower(), 1)
    if match["a"]:
        if not unit and scale == 1:
            return None
        value = 1
    else:
        value = TENS.get((match["tens"] or "").lower(), 0)
        value += SMALL.get((match["one"] or match["small"] or "zero").lower(), 0)
    return Fact("number", *match.span(), frozenset([Decimal(value * scale)]), unit, loose=scale == 1)


def _names(text: str, taken: list[tuple[int, int]]) -> Iterator[Fact]:
    if not CAPITALS.search(text):
        return
    titles = [match.span() for match in TITLES.finditer(text)]
    left = _without(text, [*taken, *titles])
    for match in NAME.finditer(left):
        start, name = match.start(), match.group()
        while (parts := regex.split("[ \u00a0]", name, maxsplit=1))[0].lower() in OPENERS and len(parts) == 2:
            start, name = start + len(parts[0]) + 1, parts[1]
        if " " in name or "\u00a0" in name or name.isupper():
            yield Fact("name", start, match.end(), frozenset([words(name)]))


DIGIT, DOT, CAPITALS, LETTER = (regex.compile(sign) for sign in ("[0-9]", f"@|:|{domains.DOT}", r"\p{Lu}", "[A-Za-z]"))
READERS: tuple[tuple[regex.Pattern[str], regex.Pattern[str], Callable[[regex.Match[str]], Fact | None]], ...] = (
    (DOT, LINK, _link),
    (regex.compile(r"[0-9]|\p{Lu}"), DATE, _date),
    (DIGIT, CLOCK, _clock),
    (DIGIT, NUMBER, _number),
    (LETTER, WRITTEN, _written),
)
"""What must be in a text at all, a pattern, and what makes a fact of its match; the first to match a place has it."""
