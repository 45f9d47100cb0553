"""Rules and one text: what they find in it, as it is and as it may be disguised, whole or while it grows."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from time import perf_counter

import regex

from guardrails.plan import Joint, Plan, looks_at, streams, whole
from guardrails.spans import Spans, SpansReading
from guardrails.types import Context, Finding, Reading, Rule, Validator
from guardrails.views import View, Views, findings_home, unusual

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


class Seen:
    """A whole text that several rules read: its views are made once, and what was found before is remembered.

    plan: of those rules, whose patterns are told in one pass.
    """

    __slots__ = ("_digest", "_likely", "_plan", "_views", "text")

    def __init__(self, text: str, plan: Plan | None = None):
        self.text, self._plan = text, plan
        self._views: Views | None = None
        self._likely: Collection[int] | None = None
        self._digest = b""

    def is_quiet(self, place: int) -> bool:
        """True where the rule at this place is known to find nothing: it reads by patterns of which none can match in
        the text or in its views, or tells so itself."""
        if self._plan is None:
            return False
        if clears := self._plan.clears.get(place):
            return clears(self.text)
        joint = self._plan.patterns
        if joint is None or place not in joint.rules:
            return False
        if self._likely is None:
            try:
                self._likely = self._found_likely(joint)
            except Exception:  # the rules meet it themselves, and are broken by it
                self._likely = joint.rules
        return place not in self._likely

    def _found_likely(self, joint: Joint) -> Collection[int]:
        """The places of the rules that may find something."""
        if len(self.text) > LONG or (len(self.text) > BUSY and unusual(self.text)):
            return joint.rules
        likely = joint.candidates(self.text)
        for view in self.views:
            if len(likely) < len(joint.rules) and (part := joint.within(view)):
                likely |= part.candidates(view.text)
        return likely

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

    __slots__ = ("_asked", "_readings", "_seen", "broken", "findings", "order", "rule", "settled", "spent")

    def __init__(self, order: int, rule: Rule):
        self.order, self.rule = order, rule
        self._readings: dict[str, Sequence[Reading]] | None = None
        self._seen: set[tuple[str, int, int]] | None = None
        self._asked, self.spent = 0, 0.0
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
            self.spent += perf_counter() - began
            if self.spent > self.rule.budget:
                raise TimeoutError
        except Exception as error:
            self.broken = type(error).__name__
            return []
        self.settled = settled
        return self.noted(new)

    def _read(self, view: View, final: bool) -> tuple[list[Finding], int]:
        """(new findings, settled) of one view, in places of the original text."""
        if self._readings is None:
            self._readings = {}
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

    def noted(self, found: Iterable[Finding]) -> list[Finding]:
        """The findings that reach the threshold and are new; they are kept."""
        new = [one for one in found if one.score >= self.rule.threshold]
        if not new:
            return new
        if self._seen or len(new) > 1:
            known = self._seen or ()
            new = [one for one in once(new) if (one.label, one.start, one.end) not in known]
        self._seen = (self._seen or set()).union((one.label, one.start, one.end) for one in new)
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
        return self.noted(new)

    async def ask_whole(self, text: str, context: Context) -> list[Finding]:
        """The findings in the whole text, within the rule's budget."""
        self.findings, self.broken = await find(self.rule, Seen(text), context)
        self.settled = 0 if self.broken else len(text)
        return self.findings


class Readers(dict[int, Reader]):
    """The readers of one text, by the place of their rule; each is made when it is first asked for."""

    __slots__ = ("_rules",)

    def __init__(self, rules: Sequence[Rule]):
        super().__init__()
        self._rules = rules

    def __missing__(self, place: int) -> Reader:
        reader = self[place] = Reader(place, self._rules[place])
        return reader


class Together:
    """Rules whose patterns are read together, and one growing text. readers: of all rules; left: how many of these are
    not broken.

    The time of a pass is shared among the rules; that of an exact search is its own rule's.
    """

    __slots__ = ("_joint", "_readers", "_readings", "_searched", "_shared", "enforced", "left", "settled", "viewed")

    def __init__(self, joint: Joint, readers: Readers):
        self._joint, self._readers = joint, readers
        self._readings: dict[str, SpansReading] = {}
        self._searched = self._shared = 0.0
        self.enforced, self.viewed = joint.enforced, joint.viewed
        self.settled, self.left = 0, len(joint.rules)

    def read(self, views: Views, final: bool) -> list[tuple[Reader, list[Finding]]]:
        """(reader, its new findings) for each rule that found something, or broke now."""
        began, searched = perf_counter(), self._searched
        told: dict[int, list[Finding]] = {}
        try:
            settled = self._read(views.raw, self._joint, final, told)
            for view in views.different if self.viewed else ():
                if part := self._joint.within(view):
                    settled = min(settled, self._read(view, part, final, told))
        except Exception as error:
            self._break_all(type(error).__name__, told)
            settled = self.settled
        self._shared += (perf_counter() - began - self._searched + searched) / len(self._joint.rules)
        if self._shared + self._searched > self._joint.budget:
            for place, rule in self._joint.rules.items():
                if self._shared + self._readers[place].spent > rule.budget:
                    self._break(place, "TimeoutError", told)
        self.settled = settled
        if not told:
            return []
        return [(self._readers[place], self._readers[place].noted(found)) for place, found in told.items()]

    def give_up(self, kind: str) -> list[Reader]:
        """Breaks the rules that are not broken yet, where they had settled; these are returned."""
        told: dict[int, list[Finding]] = {}
        self._break_all(kind, told)
        return [self._readers[place] for place in told]

    def _break_all(self, kind: str, told: dict[int, list[Finding]]) -> None:
        for place in self._joint.rules:
            self._break(place, kind, told)

    def _read(self, view: View, joint: Joint, final: bool, told: dict[int, list[Finding]]) -> int:
        """How far one view has settled, as a place of the original text; `told` gets what is found."""
        reading = self._readings.get(view.name)
        if reading is None:
            reading = self._readings[view.name] = SpansReading(joint.spans)
        text = view.text
        end = view.cap if self.viewed else len(text)
        numbers, settled = reading.look(text, end, final)
        text = text[:end] if numbers else text
        for number in numbers:
            settled = min(settled, self._search(reading, number, joint.owners[number], view, text, final, told))
        reading.settled = max(reading.settled, settled)
        return reading.settled if view.source is None else view.home(reading.settled)

    def _search(
        self, reading: SpansReading, number: int, place: int, view: View, text: str, final: bool,
        told: dict[int, list[Finding]],
    ) -> int:  # fmt: skip
        """How far one pattern has settled; what raises breaks its rule, and holds nothing back."""
        reader = self._readers[place]
        if reader.broken:
            return len(text)
        began = perf_counter()
        try:
            found, reached = reading.exact(number, text, final)
            if isinstance(reader.rule.validator, Spans):
                found = reader.rule.validator.kept(text, found)
            if found:
                told.setdefault(place, []).extend(found if view.source is None else findings_home(view, found))
            return reached
        except Exception as error:
            self._break(place, type(error).__name__, told)
            return len(text)
        finally:
            took = perf_counter() - began
            reader.spent += took
            self._searched += took

    def _break(self, place: int, kind: str, told: dict[int, list[Finding]]) -> None:
        """Breaks a rule where it had settled before; what it found in this pass does not count."""
        reader = self._readers[place]
        if not reader.broken:
            reader.broken, reader.settled = kind, self.settled
            self.left -= 1
            told[place] = []


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
