"""Source code in a text: fenced blocks, and lines or phrases that only code has.

A fenced block is two findings, so that a stream stops where it opens and a redaction still hides all of it: its opening
line, and the rest from the last character of that line on, told when the block closes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import regex
from pydantic import BaseModel, ConfigDict, Field

from guardrails.spans import Span, Spans
from guardrails.types import Context, Finding, Reading

Language = Literal["c", "css", "go", "html", "java", "javascript", "php", "powershell", "python", "ruby", "rust",
                   "shell", "sql", "data", "other"]  # fmt: skip
LANGUAGES: tuple[Language, ...] = get_args(Language)


class Options(BaseModel):
    """Which code to find."""

    model_config = ConfigDict(extra="forbid")
    languages: list[Language] = Field(
        default=[language for language in LANGUAGES if language != "data"],
        min_length=1,
        description="The languages, by label; all but `data` (JSON, YAML, XML, CSV in a fence) by default. `other` is "
        "a fence that names another language or none.",
    )
    fenced: bool = Field(default=True, description="Whether fenced blocks count.")
    loose: bool = Field(default=True, description="Whether code outside of a fence counts.")


NAMES: dict[Language, str] = {
    "c": "c c++ cpp cxx h hpp objective-c objc csharp c# cs", "css": "css scss sass less", "go": "go golang",
    "html": "html htm xhtml svg vue", "java": "java kotlin kt scala groovy swift dart",
    "javascript": "javascript js jsx ts tsx typescript node mjs", "php": "php",
    "powershell": "powershell ps1 pwsh bat cmd batch dos", "python": "python py python3 ipython pycon",
    "ruby": "ruby rb erb perl pl lua", "rust": "rust rs",
    "shell": "shell sh bash zsh fish console shell-session terminal dockerfile makefile",
    "sql": "sql mysql postgresql postgres plsql sqlite tsql",
    "data": "json jsonc json5 yaml yml xml toml ini csv tsv diff",
}  # fmt: skip
BY_NAME: dict[str, Language] = {name: language for language, names in NAMES.items() for name in names.split()}
PROSE = frozenset({"text", "txt", "plain", "plaintext", "markdown", "md", "output", "quote", "mermaid"})
"""What a fence may name that is no code."""
MACROS = {"%w": r"[A-Za-z_]\w{0,40}", "%s": r"[ \t]", "%a": r"[^()\n]{0,120}"}
"""In the patterns below: a name, a space, what stands between the brackets of a call."""
COMMANDS = (
    "apt|apt-get|brew|cat|cd|chmod|chown|cp|curl|dnf|docker|find|git|grep|kill|kubectl|ls|make|mkdir|mv|npm|pip|pip3"
    "|python|python3|rm|scp|sed|ssh|systemctl|tar|wget|yum"
)
LINES: dict[Language, tuple[str, ...]] = {
    "c": (
        r"^%s{0,8}#include%s{0,4}[<\"][\w./]{1,60}[>\"]",
        r"\bint main%s?\(%a\)\s{0,3}\{",
        r"\bprintf\(\"",
        r"\bstd::(?:cout|vector|string|map|endl|unique_ptr)\b",
        r"\bConsole\.Write(?:Line)?\(",
    ),
    "css": (r"[.#]?[\w-]{1,40}%s?\{\s{0,8}(?:[a-z-]{3,30}:%s?[^;{}\n]{1,60};\s{0,8}){1,20}\}",),
    "go": (
        r"^package %w$",
        r"^func (?:\(%a\) )?%w\(%a\)[^\n{]{0,40}\{",
        r"\bfmt\.(?:Print|Sprint|Errorf)",
    ),
    "html": (
        r"<!DOCTYPE html",
        r"</(?:html|head|body|div|span|script|style|table|ul|ol|li|form|button|p|a|h[1-6]|iframe)>",
        r"<(?:script|iframe|img|input|link|meta)\s[^<>\n]{1,300}=[^<>\n]{1,300}>",
        r"<script>",
    ),
    "java": (
        r"\bpublic (?:static |final |abstract ){0,3}(?:(?:class|interface) %w\s{0,3}(?:\{|extends |implements )"
        r"|(?:void|int|boolean|String) %w%s?[(=;])",
        r"\bSystem\.out\.print",
        r"^import (?:static )?(?:java|javax|org|com|kotlin)\.[\w.]{2,80};?$",
        r"\bfun %w\(%a\)[^\n{]{0,40}\{",
    ),
    "javascript": (
        r"(?:^%s{0,40}|[;{}(`>]%s?)(?:const|let|var) (?:%w|\{[\w ,]{1,80}\})%s?=[^=\n]",
        r"\bfunction %w%s?\(%a\)%s?\{",
        r"(?:\(%a\)|\b%w)%s?=>%s?\{",
        r"\bconsole\.(?:log|error|warn)\(",
        r"\bdocument\.(?:getElement|querySelector|cookie)",
        r"^import [^;\n]{1,120} from ['\"]",
        r"\brequire\(['\"]%w",
    ),
    "php": (r"<\?php\b", r"\$[A-Za-z_]\w{0,40}%s?(?:=%s?|->)[^\n;$]{1,120};"),
    "powershell": (
        r"\b(?:Get|Set|New|Remove|Invoke|Start|Stop|Install|Import|Export)-[A-Z][A-Za-z]{3,30}%s{1,3}-[A-Z]\w",
        r"\bIEX ?\(",
        r"(?i:\bpowershell(?:\.exe)?\s{1,3}-(?:enc|e|nop|command|file|exec)\w{0,20}\b)",
    ),
    "python": (
        r"^%s{0,40}(?:async )?def %w\(%a\)[^\n:]{0,60}:",
        r"^%s{0,40}class %w(?:\(%a\))?:%s{0,4}$",
        r"^%s{0,40}from [\w.]{1,60} import %w",
        r"^%s{0,40}import [a-z_][a-z0-9_.]{0,60}(?: as %w)?%s{0,4}$",
        r"\bif __name__ ?== ?['\"]",
        r"\bprint\((?:f?['\"]|%w\))",
        r"^%s{0,40}for %w(?:, ?%w)? in [^\n:]{1,60}:%s{0,4}$",
    ),
    "ruby": (r"^%s{0,20}def %w[?!]?(?:\(%a\))?%s{0,4}\n", r"\bputs [\"']", r"\.each do \|%w\|", r"^use strict;"),
    "rust": (r"\bfn %w(?:<[^<>\n]{1,60}>)?\(%a\)[^\n{]{0,60}\{", r"\blet mut %w", r"\bprintln!\("),
    "shell": (
        r"^#!%s?/(?:usr/)?bin/[\w /]{2,40}",
        rf"(?:^%s{{0,8}}[$#]%s|`)(?:sudo%s{{1,3}})?(?:{COMMANDS})%s[^\s`]",
        rf"\bsudo%s{{1,3}}(?:{COMMANDS}|su|bash|sh|dd|mount|service)\b",
        r"\brm%s{1,3}-(?:rf|fr|r|f)\b",
        r"\bchmod%s{1,3}(?:\+x|[0-7]{3,4})%s{1,3}\S",
        r"\b(?:curl|wget)%s{1,3}(?:-\w{1,20}%s{1,3}){0,6}['\"]?(?:https?://|-)\S",
        r"\bgit (?:clone|commit|push|pull|checkout|rebase) (?:-|https?:|git@|origin\b)",
        r"\b(?:pip3?|npm|apt-get|apt|brew|yum|gem|cargo) install (?:--?[a-z][\w-]{0,20} ){0,4}[a-z@][\w@/.=<>~^-]{1,60}"
        r"%s{0,3}(?:$|[`;&|])",
        r"\|%s{0,3}(?:sudo )?(?:ba|z)?sh\b(?:%s|$|`)",
        r"^%s{0,8}export [A-Z_]{2,40}=\S",
    ),
    "sql": (
        r"\bSELECT\s[^;\n]{1,200}\sFROM\s{1,4}[\w.\"\[`]",
        r"\bINSERT INTO\s{1,4}[\w.\"`]{1,80}\s?(?:\(|VALUES|SELECT)",
        r"\bUPDATE\s{1,4}[\w.\"`]{1,80}\s{1,4}SET\s{1,4}[\w.\"`]{1,80}\s?=",
        r"\bDELETE FROM\s{1,4}[\w.\"`]{1,80}(?:\s{1,4}WHERE\b|;)",
        r"\b(?:DROP|ALTER|TRUNCATE|CREATE) (?:TABLE|DATABASE|INDEX|VIEW)\s{1,4}[\w.\"`]",
        r"(?i:'\s{0,3}or\s{0,3}'?1'?\s{0,3}=\s{0,3}'?1)",
        r"(?i:\bselect\s\*\sfrom\s{1,4}[\w.\"\[`])",
        r"(?i:\bunion\s{1,4}(?:all\s{1,4})?select\b)",
    ),
}
"""What is hardly ever written outside of code, by language."""
FENCE = regex.compile(r"[ \t>]{0,40}(?P<mark>`{3,40}|~{3,40})(?P<info>.*)")
MAY_FENCE = regex.compile(r"[ \t>]{0,40}(?:`{0,2}|~{0,2}|`{3,40}[^`\n]*|~{3,40}[^\n]*)")


def spans(language: Language) -> list[Span]:
    """The lines of a language as spans."""
    out = []
    for pattern in LINES.get(language, ()):
        for macro, meaning in MACROS.items():
            pattern = pattern.replace(macro, meaning)
        out.append(Span(language, pattern))
    return out


def named(info: str) -> Language | None:
    """The language that a fence names; None for prose."""
    word = regex.split(r"[\s{}:,(]", info.strip().lstrip("{."), maxsplit=1)[0].lower()
    return None if word in PROSE else BY_NAME.get(word, "other")


@dataclass(frozen=True, slots=True)
class Block:
    """An open fence: its mark, the last character of its opening line, what to call it (empty: it is let be)."""

    mark: str
    start: int
    label: str


class FenceReading:
    """The fenced blocks of one text, line by line."""

    __slots__ = ("_block", "_languages", "_next")

    def __init__(self, languages: Sequence[Language]):
        self._languages = languages
        self._next = 0
        self._block: Block | None = None

    def read(self, text: str, final: bool) -> tuple[Sequence[Finding], int]:
        """The new certain findings and how far the text is settled (see `guardrails.types.Reading`)."""
        found: list[Finding] = []
        while (end := text.find("\n", self._next)) >= 0:
            self._line(text[self._next : end], self._next, found)
            self._next = end + 1
        if final:
            self._line(text[self._next :], self._next, found)
            self._next = len(text)
            self._close(len(text), found)
        elif self._block:
            return found, self._block.start if self._block.label else len(text)
        elif MAY_FENCE.fullmatch(text, self._next):
            return found, self._next
        return found, len(text)

    def _line(self, line: str, start: int, found: list[Finding]) -> None:
        fence = FENCE.match(line)
        if fence is None:
            return
        mark, info = fence["mark"], fence["info"]
        if self._block:
            if mark.startswith(self._block.mark) and not info.strip():
                self._close(start + len(line), found)
        elif mark[0] == "~" or "`" not in info:
            language = named(info)
            label = language if language and language in self._languages else ""
            end = start + len(line)
            if label:
                found.append(Finding(label, start, end))
            self._block = Block(mark, end - 1, label)

    def _close(self, end: int, found: list[Finding]) -> None:
        if self._block and self._block.label and end > self._block.start + 1:
            found.append(Finding(self._block.label, self._block.start, end))
        self._block = None


class Code:
    """A stream validator for source code."""

    views = ()  # what is encoded is not shown as code: its rule reads no views

    def __init__(self, options: Options):
        self._options = options
        loose = [span for language in options.languages for span in spans(language)] if options.loose else []
        self._loose = Spans(loose) if loose else None

    def readings(self) -> Sequence[Reading]:
        """Fresh readings: of the fences, and of what stands outside of them."""
        fences: list[Reading] = [FenceReading(self._options.languages)] if self._options.fenced else []
        return [*fences, *self._loose.readings()] if self._loose else fences

    async def find(self, text: str, context: Context) -> Sequence[Finding]:
        """The findings in the order of their start."""
        found = [finding for reading in self.readings() for finding in reading.read(text, True)[0]]
        return sorted(found, key=lambda finding: finding.start)


def build(options: Options) -> Code:
    """The validator for these languages; raises ValueError where nothing is left to look for."""
    if not options.fenced and not (options.loose and any(language in LINES for language in options.languages)):
        raise ValueError("fenced and loose: one of them must be true, and find one of the languages")
    return Code(options)
