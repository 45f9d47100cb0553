"""Where a TOML document says what: `tomllib` gives values without places, and an error wants a line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field

Path = tuple[str | int, ...]
"""The way to a value, as pydantic writes it: `("input", 0, "patterns", 2)`."""

TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"""(?:"{0,2})'
    r"|'''.*?'''(?:'{0,2})"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'"
    r"|\#[^\n]*"
    r"|\n|[\[\]{}=,.]"
    r"""|[^\s\[\]{}=,.\#"']+""",
    re.DOTALL,
)


def lines(source: str) -> dict[Path, int]:
    """The 1-based line of every table, key and list item of a valid TOML document."""
    return _Scan(list(_tokens(source))).document()


def nearest(places: dict[Path, int], path: Path) -> int:
    """The line of `path`, or of the nearest table around it that is written down; 1 when there is none."""
    while path and path not in places:
        path = path[:-1]
    return places.get(path, 1)


def _tokens(source: str) -> Iterator[tuple[str, int]]:
    """(token, line), without white space and comments."""
    line, last = 1, 0
    for match in TOKEN.finditer(source):
        line, last = line + source.count("\n", last, match.start()), match.start()
        if not match.group().startswith("#"):
            yield match.group(), line
    yield "\n", line


@dataclass(slots=True)
class _Scan:
    """A walk over the tokens; the document is known to be valid, so the walk checks nothing."""

    tokens: list[tuple[str, int]]
    at: int = 0
    places: dict[Path, int] = field(default_factory=dict)
    counts: dict[Path, int] = field(default_factory=dict)

    @property
    def sign(self) -> str:
        return self.tokens[self.at][0]

    def document(self) -> dict[Path, int]:
        """The places of all that is written."""
        table: Path = ()
        while self.at < len(self.tokens):
            if self.sign == "\n":
                self.at += 1
            elif self.sign == "[":
                table = self.header()
            else:
                self.pair(table)
        return self.places

    def header(self) -> Path:
        """The table that a `[header]` or `[[header]]` opens."""
        line = self.tokens[self.at][1]
        self.at += 1
        repeated = self.sign == "["
        self.at += repeated
        path: Path = ()
        for part in self.key():
            path = (*path, part)
            path = (*path, self.counts[path]) if path in self.counts else path
        self.at += 1 + repeated
        if repeated:
            path = path[:-1] if path and isinstance(path[-1], int) else path
            self.counts[path] = self.counts.get(path, -1) + 1
            self.places.setdefault(path, line)
            path = (*path, self.counts[path])
        self.places.setdefault(path, line)
        return path

    def key(self) -> list[str]:
        """The parts of a dotted key, read up to what follows it."""
        parts: list[str] = []
        while (sign := self.sign) not in ("=", "]"):
            if sign != ".":
                quoted = sign[0] in "\"'"
                parts.append(tomllib.loads(f"x = {sign}")["x"] if quoted else sign)
            self.at += 1
        return parts

    def pair(self, table: Path) -> None:
        """Reads `key = value` in `table`."""
        line, path = self.tokens[self.at][1], table
        for part in self.key():
            path = (*path, part)
            self.places.setdefault(path, line)
        self.at += 1
        self.value(path)

    def value(self, path: Path) -> None:
        """Reads the value at `path`, with what is inside it."""
        if self.sign == "[":
            self.items(path)
        elif self.sign == "{":
            self.at += 1
            while self.sign != "}":
                if self.sign in (",", "\n"):
                    self.at += 1
                else:
                    self.pair(path)
            self.at += 1
        else:
            while self.sign not in (",", "]", "}", "\n"):
                self.at += 1

    def items(self, path: Path) -> None:
        """Reads a list, item by item."""
        self.at, number = self.at + 1, 0
        while self.sign != "]":
            if self.sign in (",", "\n"):
                self.at += 1
            else:
                self.places[(*path, number)] = self.tokens[self.at][1]
                self.value((*path, number))
                number += 1
        self.at += 1
