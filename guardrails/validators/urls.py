"""Addresses that may not be shown: hosts that are not on a list, and the tricks that hide where a link leads."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast
from urllib.parse import unquote

import regex
from pydantic import BaseModel, ConfigDict, Field

from guardrails.spans import MOST, Span
from guardrails.types import Context, Finding, Reading
from guardrails.validators import domains

Label = Literal["scheme", "userinfo", "homograph", "ip", "host", "port", "text", "image"]


class Options(BaseModel):
    """Which addresses are welcome."""

    model_config = ConfigDict(extra="forbid")
    allow: list[str] = Field(
        default=[],
        description="Hosts that may be shown, all others not: `example.com`, `*.example.com` for what is below it, "
        "with a port (`:8443`, `:*`) or the beginning of a path (`github.com/acme`) if need be. Empty: all but `deny`.",
    )
    deny: list[str] = Field(default=[], description="Hosts that may not be shown, written so, too; they come first.")
    schemes: list[str] = Field(
        default=["https", "http", "mailto", "tel", "sms"], description="The schemes that may be used."
    )
    bare: bool = Field(default=True, description="Whether `evil.com` counts without a scheme before it.")
    images: Literal["any", "no_query", "none"] = Field(
        default="no_query",
        description="Which images may be shown, even of a welcome host; with a query or a long path one can carry the "
        "conversation out.",
    )


REST = r"[^\s<>\"`\u3001\u3008-\u300f\uff0c\uff1b\uff08\uff09“”]"
SCHEMED = (
    r"(?<![A-Za-z0-9+])(?:[a-z][a-z0-9+.-]{1,20}:(?://|\\\\|/\\|\\/)|(?:https?|wss?|ftps?):[/\\]?(?=[\w\[%])"
    r"|(?:javascript|vbscript|livescript):(?=[^\s\"'`,.;:)?!])|data:(?=[a-z]{2,12}/[\w.+-]|[;,][^\s\"'`,.;)])"
    r"|(?:blob|file|mailto|tel|sms):(?=[\w/+%]))"
)
INSIDE = regex.compile(rf"(?i){SCHEMED}[^\s<>\"`/\\?#&]{{1,300}}")
RELATIVE = rf"(?<![\w:/\\])//(?={domains.BARE})"
LONE = rf"(?<![\p{{L}}\p{{M}}\p{{N}}_@%+./\\=&#?~-]){domains.BARE}"
PARTS = regex.compile(
    r"(?is)(?:(?P<scheme>[a-z][a-z0-9+.-]{1,20}):(?![0-9]+(?:\Z|[/\\?#])))?[/\\]*(?P<authority>[^/\\?#]*)"
)
CUT = regex.compile(rf"(?is).{{1,250}}?{domains.DOT}{domains.SURE[: -len(domains.AFTER)]}(?=[^\x00-\x7f])")
ENTRY = regex.compile(
    r"(?i)(?:(?P<scheme>[a-z][a-z0-9+.-]*)://)?(?P<below>\*\.)?(?P<host>\[[0-9a-f:.]+\]|[^\s/:*@?#\[\]]+)"
    r"(?::(?P<port>[0-9]{1,5}|\*))?(?P<path>/[^\s?#]*)?"
)
PORT = regex.compile(r":([0-9]{0,6})$")
DEFAULTS = {"", "80", "443"}
IMAGE = regex.compile(r"(?i)!\[[^\[\]]{0,300}\]\(\s{0,3}<?\Z|<img\b[^<>]{0,300}=\s{0,3}[\"']?\Z")
SHOWN = regex.compile(r"(?<!!)\[([^\[\]]{1,300})\]\(\s{0,3}<?\Z")
BACK = 340
"""Characters before an address in which its link's text, or its image, is looked for."""
GATE = regex.compile(r"[:.。．｡/\\]")
HEAD = 64
"""What every address has, and within how many characters from its start."""
LONGEST = 2800
"""More characters than an address is read of: 8 labels, a port, and what comes behind."""
SPACE = regex.compile(r"(?r)\s")
STEP = 1 << 14
"""Characters that are read at a time."""
PLAIN_PATH = 120
"""Characters of an image's address that still carry nothing out."""


@dataclass(frozen=True, slots=True)
class Place:
    """An entry of a list: a host, or what is below it, with a port or the beginning of a path."""

    host: str
    below: bool
    port: str
    path: str
    scheme: str

    @classmethod
    def of(cls, written: str) -> Place:
        """The entry as it is written; raises ValueError for one that names no host."""
        match = ENTRY.fullmatch(written.strip())
        if match is None:
            raise ValueError(f"{written!r} is no host; write example.com, *.example.com, example.com:8443 or a path")
        path = (match["path"] or "").rstrip("/")
        scheme = (match["scheme"] or "").lower()
        return cls(domains.plain(match["host"]), bool(match["below"]), match["port"] or "", path, scheme)

    def holds(self, address: Address) -> bool:
        """True for an address at this place, whatever its port."""
        here = address.host.endswith(f".{self.host}") if self.below else address.host == self.host
        path = not self.path or address.path == self.path or address.path.startswith(f"{self.path}/")
        return here and path and self.scheme in ("", address.scheme)

    def opens(self, port: str) -> bool:
        """True for a port that this entry lets in; the usual ones need not be written."""
        return self.port in ("*", port) or (not self.port and port in DEFAULTS)


@dataclass(frozen=True, slots=True)
class Address:
    """An address as a browser reads it; `host` in one form (`domains.plain`), `path` decoded and without dots.

    reach: characters up to the end of the host. named: whether something stands before the host, up to an `@`.
    carries: whether there is room to send something along.
    """

    written: str
    scheme: str
    reach: int
    named: bool
    host: str
    port: str
    path: str
    carries: bool

    @classmethod
    def of(cls, written: str) -> Address:
        """The parts of what is written."""
        match = cast(regex.Match[str], PARTS.match(written))  # every part of the pattern may be empty
        own = match["authority"].rpartition("@")[2]
        port = PORT.search(own)
        rest = written[match.end() :]
        path = unquote(regex.split("[?#]", rest, maxsplit=1)[0]).replace("\\", "/")
        return cls(
            written,
            (match["scheme"] or "").lower(),
            match.end(),
            "@" in regex.split("[/?#]", written[match.start("authority") :], maxsplit=1)[0],
            domains.plain(own[: port.start()] if port else own),
            port[1] if port else "",
            posixpath.normpath(path) if path else "",
            "?" in rest or "#" in rest or len(written) > PLAIN_PATH,
        )


class Urls(Span):
    """The addresses in a text, each judged where it ends."""

    __slots__ = ("_allow", "_deny", "_images", "_schemes")

    def __init__(self, options: Options):
        heads = f"{SCHEMED}{REST}{{1,2000}}+|{RELATIVE}{REST}{{1,2000}}+"
        bare = rf"|{LONE}(?::[0-9]{{1,5}})?(?:[/\\?#]{REST}{{0,2000}}+)?" if options.bare else ""
        super().__init__("host", f"(?i:{heads}{bare})")
        self._allow = [Place.of(entry) for entry in options.allow]
        self._deny = [Place.of(entry) for entry in options.deny]
        self._schemes = frozenset(map(str.lower, options.schemes))
        self._images = options.images

    def findings(self, text: str, start: int, settled: int) -> tuple[list[Finding], int]:
        """The findings whose address starts in `start..settled`, and the place to go on from."""
        found: list[Finding] = []
        while (match := self._search(text, start)) and match.start() < settled:
            first = match.start()
            address = Address.of(trimmed(text, first, match.end()))
            start = first + max(1, len(address.written))
            if label := self._judged(address, text[max(0, first - BACK) : first]):
                found.append(Finding(label, first, start))
            elif inside := self._inside(text, first + address.reach, start):
                found.append(inside)
        return found, max(start, settled)

    def _inside(self, text: str, first: int, last: int) -> Finding | None:
        """The first address in the path or query of a welcome one that is not welcome itself."""
        for match in INSIDE.finditer(text, first, last, timeout=MOST):
            if label := self._judged(Address.of(match.group()), ""):
                return Finding(label, match.start(), last)
        return None

    def _judged(self, address: Address, before: str) -> Label | None:
        """The gravest thing that is wrong with an address, or None."""
        if address.scheme and address.scheme not in self._schemes:
            return "scheme"
        if address.scheme in ("mailto", "tel", "sms") or address.host in domains.PRODUCTS:
            return None
        if address.named:
            return "userinfo"
        if any(place.holds(address) for place in self._deny):
            return "host"
        places = [place for place in self._allow if place.holds(address)]
        if not places and (wrong := self._foreign(address)):
            return wrong
        if places and not any(place.opens(address.port) for place in places):
            return "port"
        return self._misleads(address, before)

    def _foreign(self, address: Address) -> Label | None:
        """What is wrong with a host that is not on the list of those allowed."""
        if domains.imitates(address.host):
            return "homograph"
        if domains.is_address(address.host) and (self._allow or domains.is_disguised(address.host)):
            return "ip"
        return "host" if self._allow else None

    def _misleads(self, address: Address, before: str) -> Label | None:
        """What is wrong with the link or image that the address stands in."""
        if before.endswith(("(", "<", '"', "'", "=", " ")) and IMAGE.search(before):
            carries = self._images == "none" or (self._images == "no_query" and address.carries)
            return "image" if carries else None
        link = SHOWN.search(before) if before.endswith(("(", "<")) else None
        shown = HOST.search(link[1], timeout=MOST) if link else None
        return "text" if shown and not _same(Address.of(shown.group()).host, address.host) else None


def _word(text: str) -> int:
    """Where the last run without white space begins; no address is longer than one."""
    space = SPACE.search(text)
    return space.end() if space else 0


class UrlsReading:
    """The addresses' progress through one text; a long text is read in steps, each within the time of a search."""

    __slots__ = ("_next", "_urls")

    def __init__(self, urls: Urls):
        self._urls, self._next = urls, 0

    def read(self, text: str, final: bool) -> tuple[Sequence[Finding], int]:
        """The new certain findings and how far the text is settled (see `guardrails.types.Reading`)."""
        found: list[Finding] = []
        settled = self._next
        for end in (*range(self._next + STEP, len(text), STEP), len(text)):
            before = max(0, self._next - BACK)
            part, start = text[before:end], self._next - before
            last = final and end == len(text)
            word = max(start, _word(part), len(part) - LONGEST)
            if not GATE.search(part, start):
                upto = len(part) if last else max(word, len(part) - HEAD)
                self._next = settled = before + upto
                continue
            upto = len(part) if last else self._urls.live(part, word)
            new, reached = self._urls.findings(part, start, upto)
            found += (replace(one, start=one.start + before, end=one.end + before) for one in new)
            self._next, settled = reached + before, upto + before
        return found, settled


class Addresses:
    """The stream validator for addresses."""

    views = ()  # it decodes hosts itself: its rule reads no views

    def __init__(self, urls: Urls):
        self._urls = urls

    def readings(self) -> Sequence[Reading]:
        """A fresh reading."""
        return [UrlsReading(self._urls)]

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        """The findings in the order of their start."""
        return UrlsReading(self._urls).read(text, True)[0]


HOST = regex.compile(rf"(?i:(?:https?://)?{domains.BARE})")


def _same(shown: str, real: str) -> bool:
    """True where one host is the other, or one below it."""
    one, other = shown.removeprefix("www."), real.removeprefix("www.")
    return one in domains.PRODUCTS or one == other or one.endswith(f".{other}") or other.endswith(f".{one}")


def trimmed(text: str, first: int, last: int) -> str:
    """The address in `text[first:last]` without what belongs to the text around it: quotes, brackets, full stops."""
    before, whole = text[max(0, first - 2) : first], text[first:last]
    if before.endswith("'"):
        whole = whole.partition("'")[0]
    if before == "](":
        whole = whole[: _closing(whole)]
    parts = cast(regex.Match[str], PARTS.match(whole))
    if not parts["authority"].isascii() and (cut := CUT.match(parts["authority"])):
        ending = parts["authority"].rpartition(".")[2]
        if (
            ending not in domains.COUNTRIES.split() and not ending.isascii()
        ):  # no such ending: the text goes on behind the host
            whole = whole[: parts.start("authority") + cut.end()]
    for closing, opening in ((")", "("), ("]", "["), ("}", "{")):
        while (whole := whole.rstrip(".,;:!?'*_~|。！？：…")).endswith(closing) and whole.count(closing) > whole.count(
            opening
        ):
            whole = whole[:-1]
    return whole or text[first:last]


def _closing(whole: str) -> int:
    """Where the bracket closes that was opened before `whole`."""
    depth = 0
    for at, letter in enumerate(whole):
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            return at
    return len(whole)


def build(options: Options) -> Addresses:
    """The validator for these lists; raises ValueError for an entry that names no host."""
    for key, entries in (("allow", options.allow), ("deny", options.deny)):
        for number, entry in enumerate(entries, 1):
            try:
                Place.of(entry)
            except ValueError as error:
                raise ValueError(f"{key}: number {number}, {error}") from None
    return Addresses(Urls(options))
