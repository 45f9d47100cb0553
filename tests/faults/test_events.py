"""Server-sent events, read at any split of their bytes: the same events as a slow and simple reader finds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from app.frames import events

LINES = [b"data: a", b"data:b", b"data", b"data:", b"data:  two blanks", b": comment", b":", b"event: x", b"id: 1"]
LINES += [
    b"retry: 5",
    b"",
    b"",
    b"",
    b"dat",
    b"DATA: c",
    b"data: \xf0\x9f\x9a\x80",
    b'data: {"a": "b: c"}',
    b"da: ta: d",
]
ENDS = [b"\n", b"\r\n", b"\r"]
streams = st.lists(st.tuples(st.sampled_from(LINES), st.sampled_from(ENDS)), max_size=12).map(
    lambda lines: b"".join(line + end for line, end in lines)
)
anything = st.lists(st.sampled_from([b"\r", b"\n", b"data", b":", b" ", b"x", b"data:"]), max_size=24).map(b"".join)
written = streams | anything


def simple(raw: bytes) -> list[bytes]:
    """The data of each event, byte by byte as WHATWG HTML 9.2.6 has it."""
    lines, line, i = [], b"", 0
    while i < len(raw):
        if raw[i : i + 1] in (b"\r", b"\n"):
            lines.append(line)
            line = b""
            i += raw[i : i + 2] == b"\r\n"
        else:
            line += raw[i : i + 1]
        i += 1
    found: list[bytes] = []
    data: list[bytes] = []
    for one in lines:
        if not one:
            found += [b"\n".join(data)] if data else []
            data = []
        elif not one.startswith(b":"):
            name, _, value = one.partition(b":")
            data += [value[1:] if value.startswith(b" ") else value] if name == b"data" else []
    return found


def read(chunks: Iterable[bytes]) -> list[bytes]:
    async def source() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    async def collect() -> list[bytes]:
        return [event async for event in events(source())]

    return asyncio.run(collect())


def cut(raw: bytes, at: Iterable[int]) -> list[bytes]:
    places = [0, *sorted({place % (len(raw) + 1) for place in at}), len(raw)]
    return [raw[start:end] for start, end in pairwise(places)]


@settings(max_examples=400, deadline=None)
@given(written, st.lists(st.integers(0, 500), max_size=8))
def test_any_split_gives_the_events_of_the_simple_reader(raw: bytes, places: list[int]) -> None:
    assert read(cut(raw, places)) == simple(raw)


@settings(max_examples=100, deadline=None)
@given(written)
def test_byte_by_byte_with_empty_pieces_between(raw: bytes) -> None:
    pieces = [piece for i in range(len(raw)) for piece in (raw[i : i + 1], b"")]
    assert read(pieces) == simple(raw)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(min_size=1).filter(lambda text: not set(text) & {10, 13}), max_size=6), st.sampled_from(ENDS))
def test_what_was_written_as_events_is_read_as_such(texts: list[bytes], end: bytes) -> None:
    assert read([b"".join(b"data: " + text + end + end for text in texts)]) == texts


def test_a_byte_order_mark_hides_no_event() -> None:
    assert read([b"\xef\xbb\xbfdata: first\n\ndata: second\n\n"]) == [b"first", b"second"]
    assert read([b"\xef", b"\xbb", b"\xbfdata: first\n\n"]) == [b"first"]
