r"""The arguments of a tool call: JSON that grows, with no escape in it but those that it must have.

A model may write `\u0073alary`, and the client's parser reads `salary`: what is given out here is what a client reads,
as plainly as JSON can say it. What stands in the place of a redacted span leaves JSON behind.
"""

from __future__ import annotations

import json
from bisect import bisect_left

import regex

_HEX, _FIRST, _SECOND = "[0-9a-fA-F]", "[dD][89abAB]", "[dD][c-fC-F]"
_SIGN = regex.compile(
    rf'"|\\u(?<high>{_FIRST}{_HEX}{{2}})\\u(?<low>{_SECOND}{_HEX}{{2}})|\\u(?<code>{_HEX}{{4}})|\\(?:.|\Z)',
    regex.DOTALL,
)
"""A quote or an escape; `code` may be half a character that has no other half."""
_BEGUN = regex.compile(rf"\\(?:u(?:{_HEX}{{0,3}}|{_FIRST}{_HEX}{{2}}(?:\\(?:u(?:{_SECOND}{_HEX}?|[dD]?))?)?))?")
"""An escape whose end has not come yet."""


class Arguments:
    """One text in JSON on its way: `feed` it pieces, take what comes back, `finish`."""

    __slots__ = ("_escapes", "_length", "_quotes", "_rest", "_starts")

    def __init__(self) -> None:
        self._rest, self._length = "", 0
        self._quotes, self._starts = list[int](), list[int]()
        self._escapes: list[str] = []

    def feed(self, delta: str, final: bool = False) -> str:
        """What `delta` adds to the text; an escape waits for its end."""
        text = _whole(self._rest + delta)
        self._rest, out, cursor, shorter = "", list[str](), 0, 0
        if not final and "\ud800" <= text[-1:] <= "\udbff":
            text, self._rest = text[:-1], text[-1]
        for sign in _SIGN.finditer(text):
            if not final and _BEGUN.fullmatch(text, pos=sign.start()):
                self._rest = text[sign.start() :] + self._rest
                text = text[: sign.start()]
                break
            said, place = _plainly(sign), self._length + sign.start() - shorter
            if sign.group() == '"':
                self._quotes.append(place)
            elif len(said) > 1:
                self._starts.append(place)
                self._escapes.append(said)
            out += (text[cursor : sign.start()], said)
            cursor, shorter = sign.end(), shorter + len(sign.group()) - len(said)
        piece = "".join((*out, text[cursor:]))
        self._length += len(piece)
        return piece

    def finish(self) -> str:
        """What was waited for: the text ends here."""
        return self.feed("", final=True)

    def placeholder(self, placeholder: str, start: int, end: int) -> str:
        """The placeholder in the place of `text[start:end]`: inside of a string, or a string where it stands alone.

        An escape that is cut there stays whole: to a rule, `\\nann` may look like a word that begins with an n.
        """
        before, after = (bisect_left(self._quotes, place) % 2 for place in (start, end))
        (_, kept), (begun, _) = self._cut(start), self._cut(end)
        return kept + ("" if before else '"') + inside(placeholder) + ("" if after else '"') + begun

    def _cut(self, place: int) -> tuple[str, str]:
        """The two parts of the escape that is cut at this place, if there is one."""
        i = bisect_left(self._starts, place) - 1
        at = place - self._starts[i] if i >= 0 else 0
        escape = self._escapes[i] if 0 < at < len(self._escapes[i]) else ""
        return escape[:at], escape[at:]


def _plainly(sign: regex.Match[str]) -> str:
    if sign["high"]:
        return chr(0x10000 + ((int(sign["high"], 16) & 0x3FF) << 10) + (int(sign["low"], 16) & 0x3FF))
    if sign["code"]:
        letter = chr(int(sign["code"], 16))
        return sign.group() if "\ud800" <= letter <= "\udfff" else inside(letter)
    return "/" if sign.group() == "\\/" else sign.group()


def _whole(text: str) -> str:
    """The text with both halves of a character that came apart (UTF-16) as one."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def inside(text: str) -> str:
    """The text as it is written inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def plain(text: str) -> str:
    """A whole text in JSON: compact, each value once and as plainly as can be; what is no JSON keeps its form."""
    try:
        compact = json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))
        compact.encode()
    except (ValueError, RecursionError):
        return Arguments().feed(text, final=True)
    return compact
