"""One rule and one text: what the rule finds in it, as it is and as it may be disguised, whole or while it grows."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import perf_counter
from typing import TypeGuard

import regex

from guardrails.types import Context, Finding, Reading, Rule, StreamValidator, Validator
from guardrails.views import View, Views, findings_home

LONG = 20_000
"""Characters from which on a text is read in a thread, within its rule's budget."""
BUSY = 2_000
"""Characters from which on the views of a text are made in a thread, and other requests go on between its rules."""
DISGUISED, DISGUISED_LEAST = 0.15, 5
"""The share, and the number, of characters that must look otherwise in a view before a model is shown it, too."""
MANY = 100
"""Findings in one text from which on they are not remembered."""
SENTENCE_CHARACTERS, SENTENCE_MOST = 60, 600
"""How long a piece is that a rule with `every = "sentence"` is given: at least, and at most."""

_END = regex.compile(r"[.!?…。！？]+[\"'”’)\]]*\s+|\n+\s*|[。！？]")


def streams(validator: Validator) -> TypeGuard[StreamValidator]:
    """True for a validator that can read a growing text (`isinstance` with a protocol is slow)."""
    return hasattr(validator, "readings")


def whole(rule: Rule) -> bool:
    """True for a rule that cannot read a growing text by itself."""
    return rule.confirm is not None or not streams(rule.validator)


def looks_at(rule: Rule, view: View) -> bool:
    """True where a rule reads this view: it may be for the text alone, its validator for some views only."""
    only = getattr(rule.validator, "views", None)
    return rule.views and (only is None or view.name in only)


class Seen:
    """A whole text that several rules read: its views are made once, and what was found before is remembered."""

    __slots__ = ("_digest", "_views", "text")

    def __init__(self, text: str):
        self.text = text
        self._views: Views | None = None
        self._digest = b""

    @property
    def views(self) -> list[View]:
        """The views that differ from the text; raises TimeoutError for a text that takes too long to make out."""
        return list(self._made().different)

    async def look(self) -> None:
        """Makes the views of a text that is not short aside, so that other requests go on; raises as `views` does."""
        await (asyncio.to_thread(self._made) if self._views is None else asyncio.sleep(0))

    def _made(self) -> Views:
        if self._views is None:
            views = Views()
            views.grow(self.text, True)
            self._views = views
        return self._views

    @property
    def digest(self) -> bytes:
        """A hash that stands for the text."""
        if not self._digest:
            self._digest = hashlib.blake2b(self.text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        return self._digest


class Remembered:
    """The findings of rules in texts, by rule key and hash of the text; the oldest are forgotten."""

    def __init__(self, most: int = 8192):
        self._most = most
        self._kept: OrderedDict[tuple[str, bytes], tuple[Finding, ...]] = OrderedDict()

    def get(self, key: tuple[str, bytes]) -> tuple[Finding, ...] | None:
        """What was found then, or None when nothing is known."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def put(self, key: tuple[str, bytes], findings: Sequence[Finding]) -> None:
        """Remembers what was found, unless that is so much that many such texts would fill the memory."""
        if len(findings) > MANY:
            return
        self._kept[key] = tuple(findings)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)


REMEMBERED = Remembered()
"""Of this process; findings hold places and labels, never text."""


async def find(rule: Rule, seen: Seen, context: Context) -> tuple[list[Finding], str]:
    """(findings at or above the threshold and confirmed, the kind of error or empty)."""
    try:
        if len(seen.text) <= LONG and not whole(rule):  # a timer could not interrupt it
            return await _found(rule, seen, context), ""
        async with asyncio.timeout(rule.budget):
            return await _found(rule, seen, context), ""
    except Exception as error:
        return [], type(error).__name__


async def _found(rule: Rule, seen: Seen, context: Context) -> list[Finding]:
    findings = [one for one in await _first(rule, seen, context) if one.score >= rule.threshold]
    return await _confirmed(rule, findings, seen.text, context)


async def _first(rule: Rule, seen: Seen, context: Context) -> Sequence[Finding]:
    """What the rule's own validator finds; for one that reads the text alone, what it found before."""
    alone = streams(rule.validator)
    kept = rule.key and alone and not getattr(rule.validator, "contextual", False)
    key = (f"{rule.key}{rule.views}", seen.digest) if kept else None
    known = REMEMBERED.get(key) if key else None
    if known is not None:
        return known
    if rule.views and BUSY < len(seen.text) <= LONG:
        await seen.look()
    if alone and len(seen.text) > LONG:
        findings = await _aside(rule, seen)
    elif alone:
        views = [view for view in seen.views if looks_at(rule, view)] if rule.views else []
        findings = await _in_views(rule, seen, views, context)
    else:
        findings = await _in_views(rule, seen, _disguised(seen) if rule.views else (), context)
    if key:
        REMEMBERED.put(key, findings)
    return findings


async def _in_views(rule: Rule, seen: Seen, views: Iterable[View], context: Context) -> list[Finding]:
    findings = list(await rule.validator.find(seen.text, context))
    for view in views:
        findings += findings_home(view, await rule.validator.find(view.text, context))
    return once(findings)


async def _aside(rule: Rule, seen: Seen) -> list[Finding]:
    """What a stream validator finds in a long text, read in a thread, so that other requests go on."""
    halted = False

    def work() -> list[Finding]:
        findings: list[Finding] = []
        for text, home in _texts(rule, seen):
            for reading in _readings(rule.validator):
                if halted:
                    return []
                findings += home(reading.read(text, True)[0])
        return once(findings)

    try:
        return await asyncio.to_thread(work)
    finally:
        halted = True


def _texts(rule: Rule, seen: Seen) -> Iterator[tuple[str, Callable[[Sequence[Finding]], Sequence[Finding]]]]:
    yield seen.text, lambda findings: findings
    for view in [view for view in seen.views if looks_at(rule, view)] if rule.views else []:
        yield view.text, lambda findings, view=view: findings_home(view, findings)  # type: ignore[misc]


def _disguised(seen: Seen) -> list[View]:
    """The views in which much of the text looks otherwise: what a model is shown beside the text itself."""
    least = max(DISGUISED_LEAST, DISGUISED * len(seen.text))
    much = {view.name: view for view in seen.views if view.changed >= least and view.name != "spread"}
    if "decoded" in much:
        much.pop("folded", None)
    return list(much.values())


async def _confirmed(rule: Rule, findings: list[Finding], text: str, context: Context) -> list[Finding]:
    """The findings, unless none of them is sure and the second validator finds nothing."""
    if rule.confirm is None or not findings or max(one.score for one in findings) >= rule.sure:
        return findings
    second = await rule.confirm.find(text, context)
    return findings if any(one.score >= 0.5 for one in second) else []


def _readings(validator: Validator) -> Sequence[Reading]:
    return validator.readings() if streams(validator) else ()


def once(findings: Iterable[Finding]) -> list[Finding]:
    """The findings without those that another view has found at the same place."""
    first: dict[tuple[str, int, int], Finding] = {}
    for one in findings:
        known = first.setdefault((one.label, one.start, one.end), one)
        if one.score > known.score:
            first[one.label, one.start, one.end] = one
    return sorted(first.values(), key=lambda one: (one.start, one.end, one.label))


class Reader:
    """One rule's progress through one growing text: what it has found, how far it has settled, whether it broke."""

    __slots__ = ("_asked", "_readings", "_seen", "_spent", "broken", "findings", "order", "rule", "settled")

    def __init__(self, order: int, rule: Rule):
        self.order, self.rule = order, rule
        self._readings: dict[str, Sequence[Reading]] = {}
        self._seen: set[tuple[str, int, int]] = set()
        self._asked, self._spent = 0, 0.0
        self.findings: list[Finding] = []
        self.settled = 0
        self.broken = ""

    @property
    def enforced(self) -> bool:
        """True where the rule decides."""
        return self.rule.mode == "enforce"

    def read(self, views: Views, final: bool) -> list[Finding]:
        """The new findings at or above the rule's threshold.

        A validator that raises, or whose readings take longer than the rule's budget together, breaks the rule, not
        the text.
        """
        if self.broken:
            return []
        began = perf_counter()
        try:
            new, settled = self._read(views.raw, final)
            for view in views.different:
                if not looks_at(self.rule, view):
                    continue
                more, reached = self._read(view, final)
                new += more
                settled = min(settled, reached)
            self._spent += perf_counter() - began
            if self._spent > self.rule.budget:
                raise TimeoutError
        except Exception as error:
            self.broken = type(error).__name__
            return []
        self.settled = settled
        return self._noted(new)

    def _read(self, view: View, final: bool) -> tuple[list[Finding], int]:
        """(new findings, settled) of one view, in places of the original text."""
        readings = self._readings.get(view.name)
        if readings is None:
            readings = self._readings[view.name] = _readings(self.rule.validator)
        own = view.source is None
        text = view.text[: view.cap] if self.rule.views else view.text
        new: list[Finding] = []
        settled = len(text)
        for reading in readings:
            found, reached = reading.read(text, final)
            new += found if own else findings_home(view, found)
            settled = min(settled, reached)
        return new, settled if own else view.home(settled)

    def _noted(self, found: Iterable[Finding]) -> list[Finding]:
        new = [one for one in found if one.score >= self.rule.threshold]
        if self._seen or len(new) > 1:
            new = [one for one in once(new) if (one.label, one.start, one.end) not in self._seen]
        self._seen.update((one.label, one.start, one.end) for one in new)
        self.findings += new
        return new

    def pieces(self, text: str, final: bool) -> list[tuple[int, int]]:
        """The new sentences of a text, certain by now, that a rule with `every = "sentence"` is to be asked about.

        None for a rule that broke: whoever asks until there are none would never end.
        """
        start, pieces = self._asked, list[tuple[int, int]]()
        while not self.broken and (end := sentence_end(text, start, final)) > start:
            pieces.append((start, end))
            start = end
        return pieces

    async def ask(self, text: str, pieces: Sequence[tuple[int, int]], context: Context) -> list[Finding]:
        """The new findings in these pieces of the text, each read by itself."""
        if self.broken:
            return []
        results = await asyncio.gather(*(find(self.rule, Seen(text[start:end]), context) for start, end in pieces))
        new: list[Finding] = []
        for (start, end), (found, broken) in zip(pieces, results, strict=True):
            if broken:
                self.broken = broken
                break
            new += [Finding(one.label, one.start + start, one.end + start, one.score, one.note) for one in found]
            self._asked = self.settled = end
        return self._noted(new)

    async def ask_whole(self, text: str, context: Context) -> list[Finding]:
        """The findings in the whole text, within the rule's budget."""
        self.findings, self.broken = await find(self.rule, Seen(text), context)
        self.settled = 0 if self.broken else len(text)
        return self.findings


def sentence_end(text: str, start: int, final: bool) -> int:
    """Where the piece that begins at `start` ends; `start` itself while that is not certain."""
    for match in _END.finditer(text, pos=start):
        end = match.end()
        if end == len(text) and not final:
            break  # more white space may come
        if end - start >= SENTENCE_CHARACTERS:
            return min(end, start + SENTENCE_MOST)
        if end - start > SENTENCE_MOST:
            break
    if len(text) - start >= SENTENCE_MOST + 64:
        return start + SENTENCE_MOST
    return len(text) if final else start
