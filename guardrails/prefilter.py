r"""One linear pass over a text for many patterns (RE2): which of them may match, or may be under way at its end.

Each pattern is rewritten for RE2 so that it matches at least what `regex` matches (see `guardrails.syntax`); one that
cannot be rewritten is always a candidate. RE2 reads one byte a character: Latin-1, with `?` for all beyond it, so every
class that may match beyond ASCII has the bytes from 0x80 on and `?`. Lone surrogates are characters like others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import re2

from guardrails import syntax
from guardrails.syntax import Chars, Choice, Edge, Node, Repeat, Row

MEMORY = 64 << 20
"""Bytes that one set may use, its program and its states together."""
COPIES, GROUP_COPIES = 6, 3
"""How often a counted repeat of one character, or of more, is written out; what is beyond becomes any number."""
PROGRAM = 200_000
"""Characters of a rewritten pattern from which on it is not worth its memory."""
BEGUN_PROGRAM = 1_000_000
"""The same for the beginnings of a pattern."""
BEGUN_COPIES, NEAR = 16, 3
"""How often a counted repeat of one character is written out in a beginning, and how near its bounds must be."""
UNANCHORED = re2._re2.RE2.Anchor.UNANCHORED
START = "\0"
"""What stands before a text whose beginning is asked for: it may be any character."""


def _options() -> re2.Options:
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    options.max_mem = MEMORY
    options.log_errors = False
    return options


class Prefilter:
    """Many patterns as one set (of spans: what each of them needs, `Span.needed`)."""

    __slots__ = ("_always", "_numbers", "_set")

    def __init__(self, needs: Sequence[str]):
        self._set = re2.Set.SearchSet(_options())
        self._set.Add(b"")  # matches always: without it in the answer RE2 ran out of memory, which is no answer
        self._numbers, self._always = [-1], []
        for number, need in enumerate(needs):
            try:
                self._set.Add(rewritten(need))
            except (syntax.Unreadable, re2.error):
                self._always.append(number)
            else:
                self._numbers.append(number)
        try:
            self._set.Compile()
        except re2.error:
            self._always, self._numbers = list(range(len(needs))), []

    def candidates(self, text: str) -> set[int]:
        """The numbers of the patterns that may match in `text`; no other one does."""
        if not self._numbers:
            return set(self._always)
        matched = self._set.Match(text.encode("latin-1", "replace"))
        if matched == _NOTHING:
            return set(self._always)
        if 0 not in matched:
            return {*self._always, *self._numbers[1:]}
        return {*self._always, *(self._numbers[i] for i in matched if i)}


_NOTHING = [0]


class Begun:
    """What may be under way at the end of a growing text: the beginnings of many patterns as one."""

    __slots__ = ("_begun", "_first", "_set", "unread")

    def __init__(self, patterns: Sequence[str]):
        self._begun: list[tuple[int, bytes]] = []
        unread: list[int] = []
        for number, pattern in enumerate(patterns):
            try:
                self._begun.append((number, begun(pattern)))
            except syntax.Unreadable:
                unread.append(number)
        self.unread = tuple(unread)
        """The patterns of which no beginning can be told."""
        self._first: re2._Regexp | None = None
        self._set: re2.Set | None = None

    def first(self, text: str, start: int, end: int) -> int:
        """The first place from `start` on at which something may begin that is under way at `end`; `end` if none."""
        if self._first is None:  # made when the first text streams, since it may take a while
            self._first = self._made()
        window = _window(text, start, end)
        # What `search` calls, which takes twice as long itself; the one span is (-1, -1) where nothing is found.
        place: int = self._first._regexp.Match(UNANCHORED, window, 0, len(window))[0][0]
        return end if place < 0 else min(end, start + place)

    def _made(self) -> re2._Regexp:
        whole = b"|".join(dict.fromkeys(beginning for _, beginning in self._begun))
        try:
            return re2.compile(rb"(?:%s)\z" % (whole or ANY_SIGN), _options())
        except re2.error:
            return re2.compile(rb"%s*\z" % ANY_SIGN, _options())

    def alive(self, text: str, start: int, end: int) -> set[int]:
        """The numbers of the patterns that may be under way at `end`, of those that may begin from `start` on."""
        every = {number for number, _ in self._begun}
        try:
            if self._set is None:
                made = re2.Set.SearchSet(_options())
                made.Add(b"")
                for _, beginning in self._begun:
                    made.Add(rb"(?:%s)\z" % beginning)
                made.Compile()
                self._set = made
            matched = self._set.Match(_window(text, start, end))
        except re2.error:
            return every
        return {self._begun[i - 1][0] for i in matched if i} if 0 in matched else every


def _window(text: str, start: int, end: int) -> bytes:
    """The bytes of `text[start:end]` after the one that stands before it."""
    part = text[start - 1 : end] if start else START + text[:end]
    return part.encode("latin-1", "replace")


@lru_cache(1024)
def begun(pattern: str) -> bytes:
    """What matches, after the character before it, every beginning of what `pattern` matches, the whole of it too.

    Raises Unreadable where there is none.
    """
    node = syntax.parse(pattern)
    if syntax.nullable(node):
        raise syntax.Unreadable("it may match the empty text")
    parts: list[Node] = [node]
    while parts and isinstance(parts[0], Row):
        parts[:1] = syntax.edges(parts[0].parts)
    out = _started(parts[0]) + _begun(node)
    if len(out) > BEGUN_PROGRAM:
        raise syntax.Unreadable("too long")
    return out


ANY_SIGN = rb"[\x00-\xff]"


def _started(node: Node) -> bytes:
    """The character before a pattern whose first part this is; what stands for the start of the text is any."""
    if isinstance(node, Edge) and node.behind:
        return _set(Chars(node.chars.mask | 1, node.chars.wide))
    return ANY_SIGN


def _begun(node: Node, rest: bytes = b"") -> bytes:
    """Every beginning, but for the empty one, of the node and what follows it, of which `rest` says the same."""
    more = b"(?:%s)?" % rest if rest else b""
    if isinstance(node, Chars):
        return _set(node) + more
    if isinstance(node, Row):
        for part in reversed(syntax.edges(node.parts)):
            rest = _begun(part, rest)
        return rest
    if isinstance(node, Choice):
        ways = dict.fromkeys(filter(None, map(_begun, node.parts)))
        return b"(?:%s)" % b"|".join([*ways, _whole(node) + rest] if rest else ways) if ways else rest
    if not isinstance(node, Repeat) or not (whole := _whole(node.part)):
        return rest
    if not isinstance(node.part, Chars):
        often = b"?" if node.most == 1 else b"*"
        return b"(?:%s)%s(?:%s)" % (whole, often, b"|".join(filter(None, [_begun(node.part), rest])))
    upto = b"{1,%d}" % node.most if node.most is not None and 0 < node.most <= BEGUN_COPIES + NEAR else b"+"
    ways_on = [whole + upto + more] if node.least <= 1 or not rest else [whole + upto, _whole(node) + rest]
    return b"(?:%s)" % b"|".join([*ways_on, rest] if rest and not node.least else ways_on)


def _whole(node: Node) -> bytes:
    """What matches where the node does, whatever is beside it; empty for what takes no character."""
    if isinstance(node, Chars):
        return _set(node)
    if isinstance(node, Row):
        return b"".join(map(_whole, node.parts))
    if isinstance(node, Choice):
        return b"(?:%s)" % b"|".join(dict.fromkeys(map(_whole, node.parts))) if any(map(_whole, node.parts)) else b""
    if not isinstance(node, Repeat) or not (inner := _whole(node.part)):
        return b""
    single = isinstance(node.part, Chars)
    least = min(node.least, BEGUN_COPIES if single else NEAR)
    often = b"{%d,}" % least
    if node.most is not None and node.most - least <= NEAR:
        often = b"{%d,%d}" % (least, node.most)
    return (inner if single else b"(?:%s)" % inner) + often


@lru_cache(1024)
def rewritten(pattern: str) -> bytes:
    """The pattern for RE2, which matches at least where `pattern` does; raises Unreadable where there is none."""
    out = _rewritten(syntax.parse(pattern), True, True)
    if len(out) > PROGRAM:
        raise syntax.Unreadable("too long")
    return out


def _rewritten(node: Node, left: bool, right: bool) -> bytes:
    """The node for RE2. left, right: whether nothing of the pattern stands before it, after it: only there a
    look-around can be said, as the character beside the match."""
    if isinstance(node, Chars):
        return _set(node)
    if isinstance(node, Row):
        return _row(syntax.edges(node.parts), left, right)
    if isinstance(node, Choice):
        parts = dict.fromkeys(_rewritten(part, left, right) for part in node.parts)
        return b"(?:%s)" % b"|".join(parts)
    if isinstance(node, Repeat):
        return _repeat(node, left, right)
    if isinstance(node, Edge) and (left if node.behind else right):
        return rb"(?:%s|%s)" % (rb"\A" if node.behind else rb"\z", _set(node.chars))
    return b""


def _row(parts: Sequence[Node], left: bool, right: bool) -> bytes:
    """The parts one after another; on each side one look-around is kept, since it takes a character."""
    out: list[bytes] = []
    for part in parts:
        out.append(_rewritten(part, left and not any(out), False))
    for i in reversed(range(len(parts) if right else 0)):
        out[i] = _rewritten(parts[i], left and not any(out[:i]), True)
        if out[i]:
            break
    return b"".join(out)


def _repeat(node: Repeat, left: bool, right: bool) -> bytes:
    """The part as often as it must come at least, and any number of times more where something follows."""
    if node.most == 1:
        inner = _rewritten(node.part, left, right)
        return inner if node.least or not inner else b"" if right else b"(?:%s)?" % inner
    single = isinstance(node.part, Chars)
    copies = min(node.least, COPIES if single else GROUP_COPIES)
    inner = _rewritten(node.part, False, False)
    if inner and not single:
        inner = b"(?:%s)" % inner
    exact = right or node.most == copies
    return inner * copies if exact or not inner else inner * copies + inner + b"*"


@lru_cache(4096)
def _set(chars: Chars) -> bytes:
    """A class of bytes."""
    mask = chars.mask | (1 << ord("?") if chars.wide else 0)
    bits = [i for i in range(128) if mask >> i & 1]
    ranges: list[list[int]] = []
    for bit in bits:
        if ranges and ranges[-1][1] == bit - 1:
            ranges[-1][1] = bit
        else:
            ranges.append([bit, bit])
    if chars.wide:
        ranges.append([128, 255])
    if not ranges:
        return rb"[^\x00-\xff]"
    return b"[%s]" % b"".join(rb"\x%02x-\x%02x" % (first, last) for first, last in ranges)
