"""The same text as it may have been disguised, read while it grows, with the way back to the original.

A rule that looks for "salary" should see it in `s a l a r y`, in Cyrillic letters and in base64. Each `View` is a text
of its own, made of another one by a stage that only ever appends:

    raw -> folded    look-alike letters, full width, invisible signs
        -> decoded   base64, hex, URL, HTML, escapes, morse, bidi overrides, markup inside words; nested
        -> loose     leet, accents, spaced and dotted letters, signs inside words
        -> spread    the same, but 1 is an l, and signs inside words and line ends are spaces
        -> turned    words that are English only when read backwards or in rot13

A view that is so far the same as the one it is made of costs no reading. Nothing is taken for an attack because it is
written unusually (emoji joiners, Persian and Indic joiners, soft hyphens): a view only shows a rule more text, and what
the rule finds there is mapped back to the original.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from guardrails.types import Finding
from guardrails.views.codes import decoded
from guardrails.views.folding import folded
from guardrails.views.ordinary import ALL, DECODED, FOLDED, GAPPED, LOOSE, SPREAD, TURNED, certain, unusual
from guardrails.views.turning import turned
from guardrails.views.view import View
from guardrails.views.words import gapped, loosened, spread

__all__ = ["View", "Views", "findings_home", "unusual"]

MOST = 1_000_000
"""Characters of a text from which on its views are not made: rules that want to read them are broken, and decide so."""

Stage = Callable[[View, bool], None]


class Views:
    """All views of one growing text; `raw` is the text itself.

    As long as the text is ordinary, no other view is made, but for the one in which gaps read differently: what is
    certain of the text, up to `_at`, is what each of them would show.
    """

    __slots__ = ("_at", "_full", "_made", "_measured", "_stages", "raw")

    def __init__(self) -> None:
        self.raw, self._at, self._full = View("raw"), 0, False
        self._made: tuple[View, ...] = ()

    def _wide(self) -> View:
        """The view in which gaps read differently."""
        if not self._made:
            wide = View("spread", self.raw)
            wide.at, wide.shown = self._at, False
            self._made = (wide,)
        return self._made[0]

    def _make(self) -> None:
        """Makes all views of a text that was ordinary so far."""
        wide = self._wide()
        self.raw.parts.clear()
        plain = View("folded", self.raw)
        read = View("decoded", plain)
        loose, back = View("loose", read), View("turned", read)
        loose.twin, wide.source = wide, read
        read.parts.append(wide)
        self._full = True
        self._made = (plain, read, loose, wide, back)
        self._measured = (back, wide, loose, read, plain, self.raw)
        self._stages: tuple[tuple[int, View, Stage], ...] = (
            (FOLDED, plain, folded),
            (DECODED, read, decoded),
            (LOOSE, loose, loosened),
            (SPREAD, wide, spread),
            (TURNED, back, turned),
        )
        for view in self._made:
            view.at = self._at

    def grow(self, text: str, final: bool) -> bool:
        """Makes the views of `text`, which starts with what it was before; `final` says that it ends here.

        False where nothing more of it is certain than before. Raises ValueError for a text that is too long, and
        TimeoutError for one that takes too long.
        """
        new = text[len(self.raw.text) :]
        self.raw.grow(text)
        if len(text) > MOST:
            raise ValueError(f"a text of more than {MOST} characters is not made out")
        if not final and new.isalnum() and new.isascii() and self._plain:
            return False  # a word goes on
        stages = self._kept(text, final)
        if stages < 0:
            return False
        if not self._full:
            self.raw.cap = self._at
            for view in self._made:
                view.measure()
            return True
        if stages:
            for bit, view, stage in self._stages:
                if stages & bit:
                    stage(view, final)
        for view in self._measured:
            view.measure()
        return True

    def _kept(self, text: str, final: bool) -> int:
        """Takes over what reads the same in every view; the stages that have to look for themselves, -1 if nothing
        more is certain."""
        if not self._plain:
            return ALL
        start = min([view.at for view in self._made], default=self._at)
        end, upto = (len(text), len(text)) if final else certain(text, start)
        stages = ALL if end < 0 else unusual(text[start:upto]) if upto > start else 0
        odd = stages & ~GAPPED
        if end <= start and not odd:
            return -1
        if odd and not self._full:
            self._make()
        if not self._full:
            if stages:
                gapped(self._wide(), end)
            for view in self._made:
                view.keep(end)
            self._at = end
            return 0
        for bit, view, _ in self._stages:
            if bit == SPREAD and stages & GAPPED and not odd & bit:
                gapped(view, end)
            elif not odd & bit:
                view.keep(end)
        return odd

    @property
    def _plain(self) -> bool:
        """True where what the last three are made of is the text itself so far."""
        return not self._full or (self._made[0].same and self._made[1].same)

    @property
    def different(self) -> Collection[View]:
        """The views that are not the same as what they are made of."""
        return [view for view in self._made if view.shown and not view.same] if self._made else ()


def findings_home(view: View, findings: Sequence[Finding]) -> list[Finding]:
    """The findings in a view as findings in the original text."""
    return [Finding(one.label, *view.origin(one.start, one.end), one.score, one.note) for one in findings]
