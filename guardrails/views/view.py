"""A growing text made of another one, and the way back from each of its characters."""

from __future__ import annotations

from bisect import bisect_right
from operator import ne


class View:
    """A growing text made of another view's, and where each character of it comes from.

    `at`: how much of the source has been turned into `text`. `same`: the two are equal so far. `twin`: a view that is
    equal to this one until it is `shown`. `edited`: how many characters look otherwise here. `cap`: how much of this
    text may be read: no more than what the views that are the same so far have taken over. Offsets are kept as runs:
    a run maps character by character, or (`_ends` not negative) all of it to one piece of the source.
    """

    __slots__ = (
        "_ends", "_froms", "_length", "_new", "_starts", "_text",
        "at", "cap", "edited", "name", "parts", "same", "shown", "source", "twin",
    )  # fmt: skip

    def __init__(self, name: str, source: View | None = None):
        self.name, self.source = name, source
        self.parts: list[View] = []
        self.twin: View | None = None
        self.at, self.cap, self.edited, self.same, self.shown = 0, 0, 0, True, True
        self._text, self._length = "", 0  # and, once it is not the same, `_new` and the runs
        if source is not None:
            source.parts.append(self)

    def __len__(self) -> int:
        return self.at if self.same or self.source is None else self._length

    @property
    def text(self) -> str:
        """What has been made so far."""
        if self.source is None:
            return self._text
        if self.same:
            return self.source.text[: self.at]
        if self._new:
            self._text += "".join(self._new)
            self._new.clear()
        return self._text

    @property
    def made_of(self) -> str:
        """The text that this one is made of."""
        return self._text if self.source is None else self.source.text

    @property
    def changed(self) -> int:
        """How many characters of the text, and of what it was made of, look otherwise here."""
        return self.edited + (0 if self.source is None else self.source.changed)

    def grow(self, text: str) -> None:
        """Makes `text` the whole of this view, which has no source."""
        self._text, self.at = text, len(text)

    def measure(self) -> None:
        """Sets `cap`, where the parts of this view know theirs."""
        cap = len(self)
        for part in self.parts:
            if part.same and part.cap < cap:
                cap = part.cap
        if self.twin is not None and not self.twin.same and not self.twin.shown:
            cap = min(cap, len(self.twin))
        self.cap = cap

    def keep(self, upto: int) -> None:
        """Takes the source over as it is, up to there."""
        start, self.at = self.at, max(self.at, upto)
        if self.same or start >= upto or self.source is None:
            return
        if self._ends[-1] >= 0 or self._froms[-1] + self._length - self._starts[-1] != start:
            self._run(start, -1)
        self._add(self.source.text[start:upto])

    def put(self, text: str, upto: int) -> None:
        """Writes `text` for the source up to there."""
        if self.same:
            self._text, self.same = self.text, False
            self._length, self._new = len(self._text), list[str]()
            self._starts, self._froms, self._ends = [0], [0], [-1]
        start, self.at = self.at, upto
        before = self.made_of[start:upto]
        self.edited += sum(map(ne, before, text)) + abs(len(before) - len(text))
        if text:
            self._run(start, upto)
            self._add(text)

    def _add(self, text: str) -> None:
        self._new.append(text)
        self._length += len(text)

    def _run(self, start: int, end: int) -> None:
        self._starts.append(self._length)
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
        return self.source.home(self.at if place >= len(self) else self._back(place, place)[0])
