"""Words that are English only when they are read backwards or in rot13."""

from __future__ import annotations

import codecs
from functools import lru_cache
from pathlib import Path

import regex

from guardrails.views.view import View

_WORDS, _LONG = regex.compile(r"[A-Za-z]+"), regex.compile(r"[a-z]{4,}")
_LAST = regex.compile(r"(?r)[A-Za-z]*")
_MODELS = Path(__file__).parent.parent / "models"
MARGIN = 2.0
"""How much more English a word must look when turned, in tenths of a nat a letter."""
RUN = 12
"""Words at most that are turned together."""


@lru_cache(maxsize=1)
def _bigrams() -> tuple[tuple[int, ...], ...]:
    """Costs of letter pairs in English words, -10 ln P(second | first); row and column 0 is the edge of a word."""
    return tuple(tuple(map(int, row.split())) for row in (_MODELS / "bigrams.txt").read_text().splitlines())


def _cost(word: str) -> float:
    """How little a word looks like English: the mean cost of its letter pairs."""
    costs, total, before = _bigrams(), 0, 0
    for sign in word:
        this = ord(sign) - 96
        total, before = total + costs[before][this], this
    return (total + costs[before][0]) / (len(word) + 1)


@lru_cache(maxsize=1)
def _plain_words() -> frozenset[str]:
    """Common words that look turned and are not, such as "need"."""
    return frozenset((_MODELS / "plain_words.txt").read_text().split())


@lru_cache(maxsize=16384)
def is_turned(word: str) -> bool:
    """True for a word of small letters that looks more English backwards or in rot13."""
    if not 4 <= len(word) <= 40 or word in _plain_words():
        return False
    other = min(_cost(codecs.encode(word, "rot13")), _cost(word[::-1]))
    return other < _cost(word) - MARGIN


def turned(view: View, final: bool) -> None:
    """Runs of words that look turned are written in all the ways they may be read; short words in them go along."""
    text = view.made_of
    whole = len(text) if final else _LAST.match(text).start()  # type: ignore[union-attr]  # it may be empty
    if not any(map(is_turned, set(_LONG.findall(text[view.at : whole].lower())))):
        view.keep(whole)
        return
    run: list[tuple[int, int]] = []
    end = view.at
    for match in _WORDS.finditer(text, pos=view.at):
        if match.end() == len(text) and not final:
            break
        gap = text[end : match.start()]
        if run and (len(run) == RUN or not (0 < len(gap) <= 2 and gap.isspace())):
            run = _close(view, text, run)
        odd, short = is_turned(match.group().lower()), len(match.group()) < 4
        if odd or (run and short):
            run.append(match.span())
        elif run:
            run = _close(view, text, run)
        end = match.end()
        if not run:
            view.keep(end)
    else:
        if run and (final or (len(text) > end and not text[end:].isspace()) or len(text) > end + 2):
            run = _close(view, text, run)
        if not run:
            view.keep(len(text))


def _close(view: View, text: str, run: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Writes a run, without the short words at its end."""
    while run and run[-1][1] - run[-1][0] < 4:
        run.pop()
    start, end = run[0][0], run[-1][1]
    whole = text[start:end]
    each = " ".join(word[::-1] for word in whole.split())
    view.keep(start)
    view.put(" \n".join((codecs.encode(whole, "rot13"), whole[::-1], each)), end)
    return []
