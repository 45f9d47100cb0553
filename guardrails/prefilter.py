r"""One linear pass over a text for many patterns (RE2) that says which of them may match at all.

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


class Prefilter:
    """Many patterns as one set (of spans: what each of them needs, `Span.needed`)."""

    __slots__ = ("_always", "_numbers", "_set")

    def __init__(self, needs: Sequence[str]):
        options = re2.Options()
        options.encoding = re2.Options.Encoding.LATIN1
        options.max_mem = MEMORY
        options.log_errors = False
        self._set = re2.Set.SearchSet(options)
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
        if not matched or 0 not in matched:
            return {*self._always, *self._numbers[1:]}
        return {*self._always, *(self._numbers[i] for i in matched if i)}


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
