"""What an engine sends, read: server-sent events, chunks and whole completions as `Delta`, log-probabilities."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import orjson

from guardrails.answers import weighed
from guardrails.guard_formats import ANSWER
from guardrails.types import Token

Fault = Literal["unreachable", "busy", "rejected", "timeout", "broken"]
DONE = b"[DONE]"
GUESSES = 3
"""How often what is around the text of a chunk is remembered in vain before it is given up."""
MAX_CALLS = 128
"""Tool calls in one reply."""
BYTE_ORDER_MARK = "\ufeff".encode()
MAX_EVENT = 4_194_304
"""Bytes of one event; a token with its log-probabilities has some hundred."""
TOP = frozenset(("id", "object", "created", "model", "choices", "usage", "error"))
CHOICE = frozenset(("index", "delta", "message", "logprobs", "finish_reason"))
MESSAGE = frozenset(
    (
        "role",
        "content",
        "refusal",
        "reasoning",
        "reasoning_content",
        "tool_calls",
        "function_call",
        "annotations",
        "audio",
    )
)
USAGE = frozenset(("prompt_tokens", "completion_tokens", "total_tokens"))
"""The fields that are read or written here; any other is passed on as it is, byte by byte."""
_RAW = msgspec.json.Decoder(dict[str, msgspec.Raw])
_RAWS = msgspec.json.Decoder(list[msgspec.Raw])


class BackendError(Exception):
    """The engine did not answer as it should.

    unreachable: no connection; busy: it said so (503, 429); rejected: it refused the request (4xx, `code` and
    message are its own); timeout; broken: the reply broke off or was no event stream. retry_after in seconds.
    """

    def __init__(self, fault: Fault, message: str, *, code: str = "", retry_after: int | None = None):
        super().__init__(message)
        self.fault, self.message, self.code, self.retry_after = fault, message, code, retry_after


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of the tool call of this number: of its name, of its arguments."""

    number: int
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class More:
    """Fields that are not read here, as the bytes that the engine sent: of the answer, its choice, message, usage."""

    top: Mapping[str, bytes] = field(default_factory=dict)
    choice: Mapping[str, bytes] = field(default_factory=dict)
    message: Mapping[str, bytes] = field(default_factory=dict)
    usage: Mapping[str, bytes] = field(default_factory=dict)

    def joined(self, before: More | None) -> More:
        """These fields, and those that came before them."""
        if before is None:
            return self
        both = ((getattr(before, name), getattr(self, name)) for name in self.__slots__)
        return More(*({**old, **new} for old, new in both))


class Delta(msgspec.Struct, frozen=True, gc=False):  # made for each token: a dataclass takes ten times as long
    """A piece of a reply, or all of it; the last ones carry the finish reason and the token counts.

    logprobs: (token, its entry in JSON) for what `text` is made of, where they were asked for. lengths: of the pieces
    that `text` was joined from, where there are several.
    """

    text: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()
    cached_tokens: int = 0
    logprobs: tuple[tuple[str, bytes], ...] = ()
    more: More | None = None
    lengths: tuple[int, ...] = ()

    @property
    def only_text(self) -> bool:
        """True when there is nothing but text in it."""
        return bool(self.text) and not (
            self.finish_reason or self.completion_tokens or self.reasoning or self.calls or self.logprobs or self.more
        )

    @property
    def pieces(self) -> int:
        """How many pieces of the engine's it is made of."""
        return len(self.lengths) or 1

    def first(self, pieces: int) -> Delta:
        """Of one that was joined, no more than so many pieces."""
        return self if self.pieces <= pieces else Delta(self.text[: sum(self.lengths[:pieces])])

    @property
    def says(self) -> bool:
        """True when the model has written something in it."""
        return bool(self.text or self.reasoning or self.calls)


class Events:
    """Server-sent events as their bytes come, for any split of them (WHATWG HTML, section 9.2.6).

    Comments and other fields are skipped, data lines are joined by newlines, CR, LF and CRLF end a line; a byte order
    mark is skipped. An event that the stream cuts off is dropped.
    """

    __slots__ = ("_after_cr", "_data", "_mark", "_rest", "_size")

    def __init__(self) -> None:
        self._rest, self._after_cr, self._mark = b"", False, BYTE_ORDER_MARK
        self._data: list[bytes] = []
        self._size = 0

    @property
    def between(self) -> bool:
        """True where one event has ended and nothing of the next one has come."""
        return not (self._rest or self._data or self._after_cr or self._mark)

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of each event that is complete now; raises BackendError when one grows beyond MAX_EVENT bytes."""
        if self._mark:
            self._rest += chunk
            if self._mark.startswith(self._rest):
                return []
            chunk, self._rest, self._mark = self._rest.removeprefix(self._mark), b"", b""
        text = chunk.removeprefix(b"\n") if self._after_cr else chunk  # the second half of a CRLF
        self._after_cr = chunk.endswith(b"\r") or (self._after_cr and not chunk)
        whole = self._rest + text
        if b"\r" in whole:
            whole = whole.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._rest = whole.split(b"\n")
        found = [event for line in lines if (event := self._line(line)) is not None]
        if self._size + len(self._rest) > MAX_EVENT:
            raise BackendError("broken", "The engine sent an event without an end.")
        return found

    def _line(self, line: bytes) -> bytes | None:
        """The event that this line ends, if it does."""
        if not line:
            event = b"\n".join(self._data) if self._data else None
            self._data, self._size = [], 0
            return event
        self._size += len(line)
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
        return None


async def events(chunks: AsyncIterable[bytes]) -> AsyncGenerator[bytes, None]:
    """The data of each server-sent event of a stream, as `Events` reads them."""
    read = Events()
    async for chunk in chunks:
        for event in read.feed(chunk):
            yield event


class Chunks:
    """The chunks of one streamed chat completion, read as their bytes come.

    An engine writes its chunks alike but for the text in them. So what stood before and behind the text of one is
    looked for around the text of the next: a JSON string between the same bytes is read in a tenth of the time. came:
    whether the bytes that were fed last have ended an event; ended: whether `[DONE]` was among them.
    """

    __slots__ = ("_before", "_behind", "_events", "_guesses", "came", "ended")

    def __init__(self) -> None:
        self._events = Events()
        self._before = self._behind = b""
        self._guesses = GUESSES
        self.came = self.ended = False

    def feed(self, data: bytes) -> Iterable[Delta]:
        """What the chunks say that are complete now, text that came together as one piece; raises BackendError."""
        if self._before and (delta := self._alike(data)):
            self.came, self._guesses = True, GUESSES
            return (delta,)
        return joined(self._read(data))

    def _alike(self, data: bytes) -> Delta | None:
        """What is said in chunks like the last ones, where all of them are."""
        if not (data.endswith(b"\n\n") and self._events.between):
            return None
        before, behind, texts = self._before, self._behind, list[str]()
        start, end = len(before), -len(behind)
        for line in data[:-2].split(b"\n\n"):
            if not (line.startswith(before) and line.endswith(behind)):
                return None
            try:
                text = orjson.loads(line[start:end])
            except orjson.JSONDecodeError:
                return None
            if not (text and isinstance(text, str)):
                return None
            texts.append(text)
        return _of(texts)

    def _read(self, data: bytes) -> Iterator[Delta]:
        found = self._events.feed(data)
        self.came = bool(found)
        for event in found:
            if event == DONE:
                self.ended = True
                return
            delta = read_chunk(event)
            if self._guesses and delta.only_text:
                self._guess(event)
            yield delta

    def _guess(self, event: bytes) -> None:
        """Remembers what is around the text of this chunk, unless that was of no use for the last ones."""
        choice = _RAW.decode(_RAWS.decode(_RAW.decode(event)["choices"])[0])
        text = bytes(_RAW.decode(choice["delta"])["content"])
        before, text, behind = event.partition(text)
        if b"\n" not in event and text not in behind:
            self._guesses -= 1
            self._before, self._behind = b"data: " + before, behind


def joined(deltas: Iterable[Delta]) -> Iterator[Delta]:
    """The same pieces, those behind each other that hold nothing but text as one.

    What came together, because nobody had the time to read it before, is judged and told together.
    """
    texts: list[str] = []
    try:
        for delta in deltas:
            if delta.only_text:
                texts.append(delta.text)
                continue
            if texts:
                yield _of(texts)
                texts = []
            yield delta
    except BackendError:
        if texts:
            yield _of(texts)  # it was said before
        raise
    if texts:
        yield _of(texts)


def _of(texts: list[str]) -> Delta:
    return Delta("".join(texts), lengths=tuple(map(len, texts)) if len(texts) > 1 else ())


def read_chunk(event: bytes) -> Delta:
    """A chunk of a chat completion; raises BackendError."""
    return _read(event, "delta", "The engine sent an event that is no chunk of a chat completion.")


def read_completion(body: bytes) -> Delta:
    """A whole chat completion; raises BackendError."""
    return _read(body, "message", "The engine sent an answer that is no chat completion.")


def _read(body: bytes, part: str, complaint: str) -> Delta:
    try:
        frame = orjson.loads(body)
        if error := frame.get("error"):
            raise _error_frame(error)
        usage = frame.get("usage") or {}
        choice = (frame.get("choices") or _NO_CHOICE)[0]
        said = choice.get(part) or {}
        calls = said.get("tool_calls")
        unread = frame.keys() - TOP or choice.keys() - CHOICE or said.keys() - MESSAGE or usage.keys() - USAGE
        return Delta(
            str(said.get("content") or ""),
            str(choice.get("finish_reason") or ""),
            int(usage.get("prompt_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
            str(said.get("reasoning_content") or said.get("reasoning") or ""),
            tuple(_call(place, call) for place, call in enumerate(calls)) if calls else (),
            int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0) if usage else 0,
            _logprobs(choice["logprobs"], body) if choice.get("logprobs") else (),
            _more(body, part) if unread else None,
        )
    except (orjson.JSONDecodeError, msgspec.DecodeError, AttributeError, LookupError, TypeError, ValueError):
        raise BackendError("broken", complaint) from None


_NO_CHOICE: Sequence[dict[str, Any]] = ({},)


def _call(place: int, call: Any) -> CallDelta:
    number, function = call.get("index"), call.get("function") or {}
    number = place if number is None else int(number)
    if not 0 <= number < MAX_CALLS:
        raise ValueError
    arguments = function.get("arguments") or ""
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return CallDelta(number, str(function.get("name") or ""), written)


def _logprobs(logprobs: Mapping[str, Any], body: bytes) -> tuple[tuple[str, bytes], ...]:
    """(token, entry) pairs; the entries as they were sent."""
    choice = _RAW.decode(_RAWS.decode(_RAW.decode(body)["choices"])[0])
    entries = _RAW.decode(choice["logprobs"]).get("content")
    raws = _RAWS.decode(entries) if entries and logprobs.get("content") else ()
    return tuple((str(one["token"]), bytes(raw)) for one, raw in zip(logprobs.get("content") or (), raws, strict=True))


def _more(body: bytes, part: str) -> More:
    frame = _RAW.decode(body)
    choices = _RAWS.decode(frame.get("choices", b"[]"))
    choice = _RAW.decode(choices[0]) if choices else {}
    return More(
        _unread(frame, TOP),
        _unread(choice, CHOICE),
        _unread(_table(choice.get(part)), MESSAGE),
        _unread(_table(frame.get("usage")), USAGE),
    )


def _table(raw: bytes | None) -> dict[str, msgspec.Raw]:
    return _RAW.decode(raw) if raw and bytes(raw) != b"null" else {}


def _unread(fields: Mapping[str, msgspec.Raw], known: Collection[str]) -> dict[str, bytes]:
    return {name: bytes(raw) for name, raw in fields.items() if name not in known}


def _error_frame(error: Any) -> BackendError:
    """An error that came inside a 200 (vLLM does so when it is overloaded)."""
    code = error.get("code") if isinstance(error, dict) else None
    if code in (429, 503, "429", "503"):
        return BackendError("busy", "The engine is busy.")
    if code in (400, 404, 422) and isinstance(error.get("message"), str):
        return BackendError("rejected", error["message"], code="invalid_value")
    return BackendError("broken", "The engine reported an error in the middle of its reply.")


def tokens_of(completion: Any) -> list[Token]:
    """The tokens of a completion or chat completion with their alternatives; raises ValueError where there are none."""
    try:
        logprobs = completion["choices"][0]["logprobs"]
        if "content" in logprobs:
            return [
                Token(str(one["token"]), tuple((str(other["token"]), float(other["logprob"])) for other in _tops(one)))
                for one in logprobs["content"]
            ]
        pairs = zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True)
        return [
            Token(str(token), tuple((str(text), float(log)) for text, log in (tops or {}).items()))
            for token, tops in pairs
        ]
    except (AttributeError, LookupError, TypeError, ValueError):
        raise ValueError("the engine returned no log-probabilities; it must support `logprobs`") from None


def _tops(token: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return token["top_logprobs"] or ()


def yes_probability(tokens: Sequence[Token]) -> float:
    """P(yes) / (P(yes) + P(no)) over the first token's alternatives; raises ValueError when neither is among them."""
    return weighed(tokens[0].alternatives if tokens else (), tuple(ANSWER), least=0.0)["yes"]
