r"""Patterns read as trees that match at least what the pattern matches, so that a "no" from the tree is certain.

What a tree cannot say is relaxed: look-arounds are true, back-references are any text, atomic and possessive parts may
give back. Classes are exact for ASCII, asked of `regex` itself; beyond ASCII a class either matches nothing or may
match anything, so no table of letters or of upper and lower case has to agree with that of `regex`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import regex

ASCII = "".join(map(chr, range(128)))
ALL = (1 << 128) - 1
TWINS = "iIkKsS"
"""The ASCII letters that `regex` also sees in letters beyond ASCII where case does not count (İ, ı, K, ſ)."""


class Unreadable(ValueError):
    """A pattern with something that no tree can say, such as recursion or fuzzy matching."""


@dataclass(frozen=True, slots=True)
class Chars:
    """One character. mask: bit `i` for the ASCII character `i`; wide: whether characters beyond ASCII may match."""

    mask: int
    wide: bool

    def has(self, sign: str) -> bool:
        """True where the character may match."""
        return bool(self.mask >> ord(sign) & 1) if sign.isascii() else self.wide

    def meets(self, other: Chars) -> bool:
        """True where some character may match both."""
        return bool(self.mask & other.mask) or (self.wide and other.wide)


@dataclass(frozen=True, slots=True)
class Edge:
    """A place between two characters: the one before it (`behind`) or after it, if there is one, is among `chars`."""

    behind: bool
    chars: Chars


@dataclass(frozen=True, slots=True)
class Boundary:
    r"""The place `\b`."""


@dataclass(frozen=True, slots=True)
class Row:
    """Its parts, one after another; no parts match the empty text."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of its parts."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """Its part, `least` to `most` times (None: any number). start, end: where it is written."""

    part: Node
    least: int
    most: int | None
    start: int = 0
    end: int = 0


Node = Chars | Edge | Boundary | Row | Choice | Repeat

EMPTY = Row(())
ANY = Chars(ALL, True)
ANYTHING = Repeat(ANY, 0, None)
NEWLINE = Chars(1 << 10, False)

QUANTIFIER = regex.compile(r"(?:([*+?])|\{([0-9]+)\}|\{([0-9]*),([0-9]*)\})[?+]?")
GROUP = regex.compile(
    r"\?(?:(P?<(?![=!])[^>]*>)|(:)|(>)|(\|)|(#)|(<?[=!])|P=(\w+)\)|([a-zA-Z]*)(?:-([a-zA-Z]+))?([:)]))"
)
NARROW = regex.compile(r"(?s:.)|\\[^\w]|\\[ntrfva]|\[(?!\^)(?:[\x00-\x5a\x5e-\x7f]|\\[^\w]|\\[ntrfva])+\]")
"""A character, or a set of characters and ranges, that has nothing beyond ASCII if it is written in ASCII."""
POSIX = regex.compile(r"\[:\^?\w+:\]")
ESCAPED = regex.compile(r"\\(?:([dDwWsSh])|([pP](?:\{[^}]*\}|[A-Z]))|([AZzmM])|(b)|(B)|([ntrfva])|(x[0-9a-fA-F]{2}"
                        r"|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8})|([1-9][0-9]?|g<\w+>)|([^\w]))", regex.DOTALL)  # fmt: skip


class _Everywhere(Exception):
    """Says that a pattern has flags, such as `(?i)`, that count from its start on, wherever they stand."""


def parse(pattern: str) -> Node:
    """The tree of a pattern that `regex` compiles with MULTILINE; raises Unreadable."""
    flags: set[str] = set()
    while True:
        reader = _Reader(pattern, flags)
        try:
            node = reader.choice("i" in flags, "s" in flags)
        except _Everywhere as found:
            flags = flags | set(str(found))
            continue
        except (regex.error, RecursionError, ValueError) as error:
            raise Unreadable(str(error)) from None
        if reader.at < len(pattern):
            raise Unreadable(f"a bracket too many at character {reader.at}")
        return node


@cache
def _chars(source: str, ignore_case: bool) -> Chars:
    """What one character of the pattern, written as `source`, may match."""
    found = set(regex.findall(f"(?{'i' if ignore_case else ''}:{source})", ASCII))
    mask = sum(1 << ord(sign) for sign in found)
    twins = ignore_case and any(sign in TWINS for sign in found)
    return Chars(mask, twins or not (source.isascii() and NARROW.fullmatch(source)))


class _Reader:
    """Reads a pattern from left to right."""

    def __init__(self, pattern: str, flags: set[str]):
        self.pattern, self.at, self.flags = pattern, 0, flags

    def choice(self, ignore_case: bool, dot_all: bool) -> Node:
        """All up to a closing bracket or the end."""
        rows: list[Node] = []
        parts: list[Node] = []
        while self.at < len(self.pattern) and self.pattern[self.at] != ")":
            if self.pattern[self.at] == "|":
                self.at += 1
                rows.append(Row(tuple(parts)))
                parts = []
                continue
            start = self.at
            parts.append(self._repeated(self._atom(ignore_case, dot_all), start))
        rows.append(Row(tuple(parts)))
        return Choice(tuple(rows)) if len(rows) > 1 else rows[0]

    def _atom(self, ignore_case: bool, dot_all: bool) -> Node:
        sign = self.pattern[self.at]
        if sign == "(":
            return self._group(ignore_case, dot_all)
        if sign == "[":
            return _chars(self._set(), ignore_case)
        if sign == "\\":
            return self._escape(ignore_case)
        if sign in "*+?{":
            raise Unreadable(f"{sign!r} at character {self.at}")
        self.at += 1
        if sign == ".":
            return ANY if dot_all else Chars(ALL ^ NEWLINE.mask, True)
        if sign in "^$":
            return Edge(sign == "^", NEWLINE)
        return _chars(regex.escape(sign), ignore_case)

    def _escape(self, ignore_case: bool) -> Node:
        found = ESCAPED.match(self.pattern, self.at)
        if not found:
            raise Unreadable(f"{self.pattern[self.at : self.at + 2]!r} at character {self.at}")
        self.at = found.end()
        if found[3] or found[5]:
            return EMPTY
        if found[4]:
            return Boundary()
        if found[8]:
            return ANYTHING
        return _chars(found[0], ignore_case)

    def _set(self) -> str:
        """The source of the set that starts here."""
        start = self.at
        self.at += 2 if self.pattern[start + 1 : start + 2] == "^" else 1
        first = self.at
        while (sign := self.pattern[self.at : self.at + 1]) != "]" or self.at == first:
            if not sign:
                raise Unreadable("a set without its end")
            named = POSIX.match(self.pattern, self.at)
            self.at = named.end() if named else self.at + (2 if sign == "\\" else 1)
        self.at += 1
        return self.pattern[start : self.at]

    def _group(self, ignore_case: bool, dot_all: bool) -> Node:
        start = self.at
        self.at += 1
        if self.pattern[self.at : self.at + 1] != "?":
            return self._inside(ignore_case, dot_all)
        kind = GROUP.match(self.pattern, self.at)
        if not kind or kind[4]:
            raise Unreadable(f"{self.pattern[start : start + 4]!r} at character {start}")
        self.at = kind.end()
        if kind[5]:
            self.at = self.pattern.index(")", self.at) + 1
            return EMPTY
        if kind[7]:
            return ANYTHING
        if kind[10]:
            turned = _turned(kind[8], kind[9] or "", ignore_case, dot_all)
            if kind[10] == ")":
                if kind[9]:
                    raise Unreadable(f"flags turned off at character {start}")
                if set(kind[8]) - self.flags:
                    raise _Everywhere(kind[8])
                if ("i" in kind[8] and not ignore_case) or ("s" in kind[8] and not dot_all):
                    raise Unreadable(f"a flag that is turned off around it at character {start}")
                return EMPTY
            ignore_case, dot_all = turned
        node = self._inside(ignore_case, dot_all)
        return _edge(kind[6], node) if kind[6] else node

    def _inside(self, ignore_case: bool, dot_all: bool) -> Node:
        node = self.choice(ignore_case, dot_all)
        if self.at >= len(self.pattern):
            raise Unreadable("a bracket too few")
        self.at += 1
        return node

    def _repeated(self, node: Node, start: int) -> Node:
        found = QUANTIFIER.match(self.pattern, self.at)
        if not found:
            return node
        self.at = found.end()
        sign, exact, low, high = found.groups()
        if sign:
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
        else:
            least, most = int(exact or low or 0), int(exact or high) if exact or high else None
        if isinstance(node, Edge | Boundary):
            return EMPTY
        return Repeat(node, least, most, start, self.at)


def _turned(on: str, off: str, ignore_case: bool, dot_all: bool) -> tuple[bool, bool]:
    """The two flags after `(?on-off:`; raises Unreadable for flags that change more than them."""
    if set(on + off) - set("imsu"):
        raise Unreadable(f"the flags {on}-{off}")
    return ("i" in on or ignore_case) and "i" not in off, ("s" in on or dot_all) and "s" not in off


def _edge(kind: str, node: Node) -> Node:
    """A look-around: the place that it asks for where it is about one character, else true everywhere."""
    while isinstance(node, Row) and len(node.parts) == 1:
        node = node.parts[0]
    if not isinstance(node, Chars):
        return EMPTY
    chars = Chars(ALL & ~node.mask, True) if kind.endswith("!") else node
    return Edge(kind.startswith("<"), chars)


def nullable(node: Node) -> bool:
    """True where the node may match the empty text."""
    if isinstance(node, Row):
        return all(map(nullable, node.parts))
    if isinstance(node, Choice):
        return any(map(nullable, node.parts))
    if isinstance(node, Repeat):
        return not node.least or nullable(node.part)
    return not isinstance(node, Chars)


def rim(parts: Sequence[Node], last: bool = False) -> Chars:
    """What the first (or last) character of a row may be."""
    mask, wide = 0, False
    for node in reversed(parts) if last else parts:
        if isinstance(node, Chars):
            one = node
        elif isinstance(node, Row):
            one = rim(node.parts, last)
        elif isinstance(node, Choice):
            each = [rim([part], last) for part in node.parts]
            one = Chars(0, any(chars.wide for chars in each))
            for chars in each:
                one = Chars(one.mask | chars.mask, one.wide)
        else:
            one = rim([node.part], last) if isinstance(node, Repeat) else Chars(0, False)
        mask, wide = mask | one.mask, wide or one.wide
        if not nullable(node):
            break
    return Chars(mask, wide)


WORD = _chars(r"\w", False)
BESIDE = Chars(ALL & ~WORD.mask, True)
"""What may stand beside a word of ASCII letters."""


def edges(parts: Sequence[Node]) -> list[Node]:
    r"""The parts of a row with each `\b` as the edge that it is there, or left out where that cannot be told."""
    out: list[Node] = []
    for i, node in enumerate(parts):
        if not isinstance(node, Boundary):
            out.append(node)
            continue
        before, after = parts[:i], parts[i + 1 :]
        if not all(map(nullable, after)) and _is_word(rim(after)):
            out.append(Edge(True, BESIDE))
        elif not all(map(nullable, before)) and _is_word(rim(before, last=True)):
            out.append(Edge(False, BESIDE))
    return out


def _is_word(chars: Chars) -> bool:
    return not chars.wide and not chars.mask & ~WORD.mask
