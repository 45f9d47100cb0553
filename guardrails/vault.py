"""Values that the model must not see: `[EMAIL_1]` stands for one on the way in, and is the value again on the way out.

A `Vault` belongs to one person's conversation. It knows no database and no key: what keeps its entries, encrypted, is
`app.vault`. A `Restorer` gives the values back in a growing text, the same for any chunking.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ahocorasick
import regex

from guardrails.types import Finding

LIMIT = 1000
"""Values that one vault holds; what is found beyond them is redacted for good."""
HIDEABLE = 6
"""Characters from which on a known value is hidden in a message wherever it stands, though no rule found it there."""

NESTED = 3
"""Values that one value may end with (`a`, `aa`, `aaa`); beyond them only the shorter ones are looked for."""
NOTE = (
    "Words in brackets such as [EMAIL_1] stand for private data that the user has given. Write them exactly as they "
    "are where the data belongs, and do not ask what they stand for."
)
"""What a model is told when there are placeholders in what it reads."""

_GLUE = r"[ \u00a0_*~\\-]"
"""What may stand between the words of a placeholder: Markdown's escapes and emphasis come from models."""
_WRITTEN = regex.compile(
    rf"\[{_GLUE}{{0,4}}(?<name>[^\W_](?:[^\[\]\n]{{0,80}}?[^\W_])?)"
    rf"{_GLUE}{{1,4}}(?<number>[1-9][0-9]{{0,5}}){_GLUE}{{0,4}}\]"
)
_PLACE = regex.compile(rf"\\{{0,2}}\[[^\[\]\n]{{1,90}}?{_GLUE}[1-9][0-9]{{0,5}}{_GLUE}{{0,4}}\]")
_ISSUED = regex.compile(r"\[(?<name>[A-Z0-9_]+)_(?<number>[1-9][0-9]{0,5})\]")

_EXACT = regex.compile("KEY|PASS|SECRET|TOKEN")
_SPACED = regex.compile(r"\+?\(?[0-9A-Za-z](?:[\s.()-]{0,3}[0-9A-Za-z])*")
_ADDRESS = regex.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}")

_TAIL = 2000
"""Characters before a placeholder that are looked through for the start of a link."""
_SITE = regex.compile(r"(?i)(?:https?|ftp|wss?):|\\?/\\?/|\\\\")
_LAST_BREAK, _LAST_QUOTE = regex.compile(r'(?r)[\s"<>]'), regex.compile(r'(?r)["<>\n]')


@dataclass(frozen=True, slots=True)
class Entry:
    """A value and the placeholder that stands for it, brackets and all."""

    placeholder: str
    value: str


def name_of(label: str) -> str:
    """The label as a placeholder carries it: `EMAIL` for `email`, `US_SSN` for `[us ssn]`."""
    return regex.sub("[^A-Z0-9]+", "_", label.upper())[:40].strip("_") or "VALUE"


def same(name: str, value: str) -> str:
    """What the spellings of one value have in common.

    The case of an e-mail address does not count, nor do separators in a number of nine digits or more. Anything else
    has to be the same: a date or an IP address with its separators elsewhere is another one, and so is a password.
    """
    plain = "".join(c for c in unicodedata.normalize("NFKC", value) if unicodedata.category(c) != "Cf")
    plain = " ".join(plain.split())
    if _EXACT.search(name):
        return plain
    if "MAIL" in name:
        return plain.casefold()
    digits, letters = sum(map(str.isdigit, plain)), sum(map(str.isalpha, plain))
    if digits >= 9 and letters <= digits and _SPACED.fullmatch(plain) and not _ADDRESS.fullmatch(plain):
        return "".join(c for c in plain if c.isalnum() or c == "+")
    return plain


class Vault:
    """The values of one conversation by placeholder; `new` has those that were not among `known`.

    A number that is given out is never given to another value. room: how many values there may be; in a vault without
    any room all values are redacted for good.
    """

    __slots__ = ("_last", "_placeholders", "_reserved", "_room", "_search", "_spellings", "_values", "new")

    def __init__(self, known: Iterable[Entry] = (), room: int = LIMIT):
        self._room = room
        self._values: dict[str, str] = {}
        self._placeholders: dict[tuple[str, str], str] = {}
        self._last: dict[str, int] = {}
        self._reserved: set[tuple[str, int]] = set()
        self._spellings: dict[str, str] = {}
        self._search: Any = None
        self.new: list[Entry] = []
        for entry in known:
            self._learn(entry)

    @property
    def values(self) -> Mapping[str, str]:
        """The values by their placeholders, brackets and all."""
        return self._values

    def reserve(self, texts: Iterable[str]) -> None:
        """Keeps the numbers of placeholders that stand in these texts already from being given to a value.

        Somebody who writes `[EMAIL_1]` means these letters, and a placeholder whose value has expired means a value
        that is gone: neither may come to mean a value that is found later.
        """
        for text in texts:
            self._reserved |= {(name_of(found["name"]), int(found["number"])) for found in _WRITTEN.finditer(text)}

    def placeholder(self, label: str, value: str) -> str:
        """What stands for `value`: the same for every spelling of it; `[LABEL]`, for good, once the vault is full."""
        name = name_of(label)
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        full = len(self._values) >= self._room
        known = self._spellings.get(value) if full else self._placeholders.get((name, same(name, value)))
        if known is None and value.strip() and not full:
            self.new.append(Entry(f"[{name}_{self._next(name)}]", value))
            known = self._learn(self.new[-1])
        self._spell(value, known or f"[{name}]")
        return known or f"[{name}]"

    def seal(self, text: str, findings: Sequence[Finding]) -> str:
        """`text` with the placeholder of each finding in its place; of findings that overlap the first one counts."""
        out: list[str] = []
        cursor = 0
        for finding in sorted(findings, key=lambda one: (one.start, -one.end)):
            if finding.start >= cursor:
                value = text[finding.start : finding.end]
                out += (text[cursor : finding.start], self.placeholder(finding.label, value))
            cursor = max(cursor, finding.end)
        return "".join(out) + text[cursor:]

    def hide(self, text: str, everywhere: bool = False) -> str:
        """`text` with placeholders for the values that stand in it as they were written before.

        A rule may not find a value again: in `BSN 111222333` it is announced, the bare number later is not. Short
        values and parts of words are left alone unless `everywhere`, which is for what is kept, not for the model.
        """
        places: list[
            tuple[int, int, int, int]
        ] = []  # start and end of what is hidden, and of the value it is hidden as
        for first, last in self._found(text):
            if not everywhere and (last - first < HIDEABLE or not _alone(text, first, last)):
                continue
            start, end = first, last
            while places and places[-1][1] > start:  # values that overlap are hidden together, as the longest one
                before, _, other, its_end = places.pop()
                start = min(start, before)
                if its_end - other >= last - first:
                    first, last = other, its_end
            places.append((start, end, first, last))
        out: list[str] = []
        cursor = 0
        for start, end, first, last in places:
            out += (text[cursor:start], self._spellings[text[first:last]])
            cursor = end
        return "".join(out) + text[cursor:]

    def _found(self, text: str) -> Iterator[tuple[int, int]]:
        """Where spellings of values stand, in the order of their ends, in one pass over the text."""
        if not self._spellings:
            return
        if self._search is None:
            lengths = sorted({len(spelling) for spelling in self._spellings})
            self._search = ahocorasick.Automaton()
            for spelling in self._spellings:
                inner = (spelling[-length:] in self._spellings for length in lengths if length < len(spelling))
                if sum(inner) <= NESTED:
                    self._search.add_word(spelling, len(spelling))
            self._search.make_automaton()
        for last, length in self._search.iter(text):
            yield last + 1 - length, last + 1

    def _learn(self, entry: Entry) -> str:
        found = _ISSUED.fullmatch(entry.placeholder)
        if found is None:
            raise ValueError(f"{entry.placeholder!r} is no placeholder: it has to look like [EMAIL_1]")
        name, number = found["name"], int(found["number"])
        self._values[entry.placeholder] = entry.value
        self._last[name] = max(number, self._last.get(name, 0))
        self._spell(entry.value, entry.placeholder)
        return self._placeholders.setdefault((name, same(name, entry.value)), entry.placeholder)

    def _spell(self, spelling: str, placeholder: str) -> None:
        if spelling.strip() and spelling not in self._spellings:
            self._spellings[spelling] = placeholder
            self._search = None

    def _next(self, name: str) -> int:
        number = self._last.get(name, 0) + 1
        while (name, number) in self._reserved:
            number += 1
        return number


def _alone(text: str, start: int, end: int) -> bool:
    """True when `text[start:end]` is not a part of a longer word or number."""
    joined_before = text[start - 1 : start].isalnum() and text[start].isalnum()
    return not joined_before and not (text[end : end + 1].isalnum() and text[end - 1].isalnum())


@lru_cache(maxsize=256)
def _tolerant(names: frozenset[str]) -> regex.Pattern[str]:
    r"""Placeholders of these names as models write them: `[EMAIL_1]`, `[Email 1]`, `\[EMAIL\_1\]`, `[**EMAIL-1**]`."""
    spelt = "|".join(f"{_GLUE}{{1,4}}".join(name.split("_")) for name in sorted(names))
    number = rf"{_GLUE}{{1,4}}(?<number>[1-9][0-9]{{0,5}})"
    return regex.compile(rf"(?i)\\{{0,2}}\[{_GLUE}{{0,4}}(?<name>{spelt}){number}{_GLUE}{{0,4}}\]")


class Restorer:
    """One text on its way out: `feed` it pieces, give out what comes back, and `finish`.

    Only what may still become a placeholder is held back. A placeholder that was never given out stays as it is, and
    so does one inside the address of a link: it would carry the value to whoever talked the model into the link.
    json: the text is JSON, such as the arguments of a tool call; values are escaped as the inside of a string.
    """

    __slots__ = ("_buffer", "_json", "_pattern", "_said", "_values")

    def __init__(self, values: Mapping[str, str], *, json: bool = False):
        names = frozenset(placeholder[1:-1].rpartition("_")[0] for placeholder in values)
        self._values, self._json = dict(values), json
        self._pattern = _tolerant(names) if names else None
        self._buffer = self._said = ""

    def feed(self, piece: str) -> str:
        """What may be given out now that `piece` has come."""
        return self._advance(piece, final=False)

    def finish(self) -> str:
        """What was held back: the text ends here."""
        return self._advance("", final=True)

    def _advance(self, piece: str, final: bool) -> str:
        if self._pattern is None:
            return piece
        text, cursor, out = self._buffer + piece, 0, list[str]()
        while found := self._pattern.search(text, pos=cursor, partial=not final):
            if found.partial or (found.end() == len(text) and not final):
                break  # it may still become one, or what follows makes it the text of a link
            out.append(self._say(text[cursor : found.start()]))
            out.append(self._say(self._restored(found)))
            cursor = found.end()
        held = found.start() if found else len(text)
        out.append(self._say(text[cursor:held]))
        self._buffer = text[held:]
        return "".join(out)

    def _say(self, text: str) -> str:
        self._said = (self._said + text)[-_TAIL:]
        return text

    def _restored(self, found: regex.Match[str]) -> str:
        value = self._values.get(f"[{name_of(found['name'])}_{found['number']}]")
        if value is None or self._in_link():
            return found.group()
        if self._json:
            return json.dumps(value, ensure_ascii=False)[1:-1]
        names_a_link = found.string.startswith("(", found.end())
        return f"[{value}]" if names_a_link else value

    def _in_link(self) -> bool:
        """True when what is said next belongs to an address on some host, bare or between quotes or brackets."""
        said = self._said
        space, quote = _LAST_BREAK.search(said), _LAST_QUOTE.search(said)
        if space is None and len(said) == _TAIL:
            return True  # where so long a word began is forgotten
        quoted = quote is not None and quote.group() in '"<' and _SITE.match(said, quote.end())
        return bool(quoted or _SITE.search(said, space.end() if space else 0))


def may_be(told: str, said: str) -> bool:
    """True when `told` is `said` with some values, whatever they are, in the places of its placeholders."""
    first, *between = _PLACE.split(said)
    if not between:
        return told == said
    last, place = between.pop(), len(first)
    for part in between:
        found = told.find(part, place)
        if found < 0:
            return False
        place = found + len(part)
    return told.startswith(first) and told.endswith(last) and place <= len(told) - len(last)


def restore(text: str, values: Mapping[str, str], *, json: bool = False) -> str:
    """A whole text with the values in the places of their placeholders (see `Restorer`)."""
    restorer = Restorer(values, json=json)
    return restorer.feed(text) + restorer.finish()
