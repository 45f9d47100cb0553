"""Whether a regular expression can be kept busy: it is run, for a bounded time, on texts made from its own parts.

A hostile text for a repeat is a beginning that leads to it, then what it repeats, two thousand characters of it, then
an end that lets the match fail.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import lru_cache

import regex

from guardrails import syntax
from guardrails.syntax import Chars, Choice, Node, Repeat, Row

LENGTH, PARTS = 20_000, 50_000
"""How many characters a pattern may have, and how many parts once its counted repeats are written out."""
TEXT = 2_000
"""Characters of a hostile text."""
SECONDS = 0.75
"""CPU time that one search through such a text may take. n squared steps take 0.1 to 0.35 s, n cubed above 10 s."""
PATIENCE = 1.5
"""CPU time of the whole process after which a search is given up: `regex` counts that of the other threads, too."""
BUDGET = 0.05
"""CPU time for all searches with a pattern that is not slow."""
MANY = 8
"""How often a part must be able to come before it counts as repeated."""
LIKES = ("a1 .-@/", "1a-", " \n", "-._@", "A")
"""Which characters to write for a class, in this order, where it has them."""


@lru_cache(4096)
def complaint(pattern: str, compiled: regex.Pattern[str] | None = None) -> str:
    """What is wrong with a pattern that `regex` compiles, and what to write instead; empty where nothing is.

    compiled: the pattern as it is searched for with partial matching, if not as it stands.
    """
    if len(pattern) > LENGTH:
        return f"it has {len(pattern)} characters, {LENGTH} are allowed: make several patterns of it"
    try:
        tree = syntax.parse(pattern)
    except syntax.Unreadable:
        tree = syntax.EMPTY
    if (parts := _size(tree)) > PARTS:
        return f"its counted repeats stand for {parts} parts, {PARTS} are allowed: lower the numbers in braces"
    compiled = compiled or regex.compile(f"(?:{pattern})(?s:.)(?!)", regex.MULTILINE)
    left = BUDGET
    for repeat, text in _texts(tree):
        spent = _spent(compiled, text)
        if spent > SECONDS:
            return _slow(pattern, repeat, spent)
        left -= spent
        if left < 0:
            break
    return ""


def _slow(pattern: str, repeat: Repeat | None, spent: float) -> str:
    """The complaint about a pattern, or about one repeat in it."""
    start, end = (repeat.start, repeat.end) if repeat else (0, len(pattern))
    part = pattern[start:end] if end - start <= 80 else f"{pattern[start : start + 77]}..."
    return (
        f"{part!r} at character {start} takes {spent * 1000:.0f} ms or more on {TEXT:,} hostile characters: bound it"
        " ({1,40} for +, {0,40} for *), make it possessive ({1,40}+), or let what is repeated begin with a sign that"
        " it does not contain"
    )


def _spent(compiled: regex.Pattern[str], text: str) -> float:
    """CPU seconds of this thread that a search through the text takes."""
    began = time.thread_time()
    try:
        compiled.search(text, partial=True, timeout=PATIENCE)
    except TimeoutError:
        return max(PATIENCE, time.thread_time() - began)
    return time.thread_time() - began


def _size(node: Node) -> int:
    """How many characters and repeats the node has, counted repeats written out."""
    if isinstance(node, Row | Choice):
        return sum(map(_size, node.parts))
    if isinstance(node, Repeat):
        return 1 + _size(node.part) * max(1, node.least, node.most or 1)
    return 1


def _texts(tree: Node) -> Iterator[tuple[Repeat | None, str]]:
    """Hostile texts, each with the repeat that it is meant for: first those for what has no bound or repeats repeats,
    the outer ones first."""
    done: set[str] = set()
    for risky in (True, False):
        for likes in LIKES:
            whole = _example(tree, likes)  # behind what fails, so that nothing that the pattern needs is missing
            for repeat, before in _repeats(tree, "", likes):
                if risky == (repeat.most is None or not isinstance(repeat.part, Chars)):
                    units = [unit for unit in _units(repeat.part, likes) if unit]
                    texts = {before + unit * (TEXT // len(unit)): None for unit in units if len(before) < TEXT}
                    for text in texts.keys() - done:
                        done.add(text)
                        yield from ((repeat, text + end) for end in ("\0" + whole, ""))
    for sign in "a1 -":
        yield None, sign * TEXT


def _repeats(node: Node, before: str, likes: str) -> Iterator[tuple[Repeat, str]]:
    """The repeats of a tree, each with a text that leads to it."""
    if isinstance(node, Row):
        for part in node.parts:
            yield from _repeats(part, before, likes)
            before += _example(part, likes)
    elif isinstance(node, Choice):
        for part in node.parts:
            yield from _repeats(part, before, likes)
    elif isinstance(node, Repeat):
        if node.most is None or node.most >= MANY:
            yield node, before
        yield from _repeats(node.part, before, likes)


def _units(node: Node, likes: str) -> Sequence[str]:
    """What a repeat may repeat: one text for each branch."""
    while isinstance(node, Row) and len(node.parts) == 1:
        node = node.parts[0]
    return [_example(part, likes) for part in (node.parts[:MANY] if isinstance(node, Choice) else (node,))]


def _example(node: Node, likes: str) -> str:
    """A text that the node matches."""
    if isinstance(node, Chars):
        return _sign(node, likes)
    if isinstance(node, Row):
        return "".join(_example(part, likes) for part in node.parts)
    if isinstance(node, Choice):
        return _example(node.parts[0], likes)
    if isinstance(node, Repeat):
        return _example(node.part, likes) * max(min(node.least, 64), 1 if node.most is None else 0)
    return ""


@lru_cache(4096)
def _sign(chars: Chars, likes: str) -> str:
    """A character that may be there, if possible one of `likes`."""
    return next((sign for sign in likes + syntax.ASCII[32:] + "\n" if chars.has(sign)), "é")
