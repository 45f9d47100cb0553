"""The upstream client: server-sent events for any split of the bytes, what frames mean, the grader's probability."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any
from unittest.mock import Mock

import aiohttp
import aiohttp.web
import pytest
from aiohttp.base_protocol import BaseProtocol
from hypothesis import given
from hypothesis import strategies as st

from app import frames
from app.backends import Alarm, OpenAIBackend, Prompt, Timeouts, Upstream, written
from app.frames import (
    BackendError,
    CallDelta,
    Chunks,
    Delta,
    More,
    events,
    joined,
    read_chunk,
    read_completion,
    tokens_of,
    yes_probability,
)
from guardrails.types import Message, ToolMessage
from tests.fakes import FakeUpstream, Script
from tests.gateway import free_port

PROMPT = Prompt((Message("user", "Hello"),), {})


async def fed(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def read(*chunks: bytes) -> list[bytes]:
    return [event async for event in events(fed(*chunks))]


def reference(stream: bytes) -> list[bytes]:
    """The events of a whole stream, after the words of the WHATWG specification."""
    lines = stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")[:-1]
    out, data = [], b""
    for line in lines:
        if not line:
            out += [data[:-1]] if data else []
            data = b""
        elif line == b"data" or line.startswith(b"data:"):
            value = line[5:]
            data += (value[1:] if value.startswith(b" ") else value) + b"\n"
    return out


LINES = st.one_of(
    st.sampled_from(
        [b"data: a", b"data:b", b"data:  c", b"data", b"data:", b": comment", b":", b"id: 7", b"event: x", b"retry: 5"]
    ),
    st.sampled_from([b"", b"", b"datax: no", b"data : no", b" data: no", "data: ü€😀".encode()]),
)
STREAMS = st.lists(st.tuples(LINES, st.sampled_from([b"\n", b"\r", b"\r\n"])), max_size=12)


@given(STREAMS, st.binary(max_size=3), st.data())
async def test_events_are_the_same_for_any_split_of_the_bytes(
    lines: Sequence[tuple[bytes, bytes]], tail: bytes, data: st.DataObject
) -> None:
    stream = b"".join(line + end for line, end in lines) + tail
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert await read(*chunks) == reference(stream)


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([b"data: a\n\n"], [b"a"]),
        ([b"data: a\r\rdata: b\r\r"], [b"a", b"b"]),
        ([b"data: a\r", b"\n\r", b"\ndata: b\n\n"], [b"a", b"b"]),
        ([b"data: a\r", b"\r"], [b"a"]),
        ([b"data: a\r", b"", b"\n", b"\n"], [b"a"]),
        ([b"data: a\ndata: b\n\n"], [b"a\nb"]),
        ([b": hi\n\ndata: a\n: hi\n\n"], [b"a"]),
        ([b"data: a\n"], []),
        ([b"data: a"], []),
        ([b"\n\n\n"], []),
        ([], []),
    ],
)
async def test_lines_comments_and_cut_ends(chunks: list[bytes], expected: list[bytes]) -> None:
    assert await read(*chunks) == expected


async def test_an_event_is_there_as_soon_as_its_empty_line_is() -> None:
    stream = events(fed(b"data: a\r", b"\r", b"never read"))
    assert await anext(stream) == b"a"


@pytest.mark.parametrize("piece", [b"x" * 1000, b"data: x" * 100 + b"\n", b"data: " + b"x" * 1000])
async def test_an_event_without_an_end_is_given_up(piece: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_EVENT", 5000)
    with pytest.raises(BackendError, match="without an end"):
        await read(*[piece] * 100)
    assert len(await read(*[b"data: " + b"x" * 4000 + b"\n\n"] * 100)) == 100


@pytest.mark.parametrize(
    ("event", "delta"),
    [
        (b'{"choices": [{"delta": {"content": "a"}}]}', Delta("a")),
        (b'{"choices": [{"delta": {"role": "assistant", "content": ""}}]}', Delta()),
        (b'{"choices": [{"delta": {"content": null, "reasoning_content": "hm"}}]}', Delta(reasoning="hm")),
        (b'{"choices": [{"delta": {"reasoning": "hm"}}]}', Delta(reasoning="hm")),
        (b'{"choices": [{"delta": {"reasoning": "hm", "reasoning_content": "hm"}}]}', Delta(reasoning="hm")),
        (
            b'{"choices": [{"delta": {"tool_calls": [{"index": 1, "id": "x", "function": {"name": "f"}}]}}]}',
            Delta(calls=(CallDelta(1, "f"),)),
        ),
        (
            b'{"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}}]}',
            Delta(calls=(CallDelta(0, "", "{"),)),
        ),
        (
            b'{"choices": [{"delta": {"tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}, {}]}}]}',
            Delta(calls=(CallDelta(0, "f", '{"a": 1}'), CallDelta(1))),
        ),
        (b'{"choices": [{"delta": {"tool_calls": null}}]}', Delta()),
        (b'{"choices": [{"delta": {}, "finish_reason": "length"}]}', Delta("", "length")),
        (b'{"choices": [{"finish_reason": "stop"}], "usage": null}', Delta("", "stop")),
        (b'{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}', Delta("", "", 3, 5)),
        (b"{}", Delta()),
    ],
)
def test_a_frame_is_read(event: bytes, delta: Delta) -> None:
    assert read_chunk(event) == delta


NO_FRAMES = b"""nothing
[]
3
{"choices": 3}
{"choices": [3]}
{"choices": {"a": 1}}
{"choices": [{"delta": "x"}]}
{"choices": [{"delta": {"tool_calls": 3}}]}
{"choices": [{"delta": {"tool_calls": ["x"]}}]}
{"choices": [{"delta": {"tool_calls": [{"index": 128}]}}]}
{"choices": [{"delta": {"tool_calls": [{"index": -1}]}}]}
{"usage": 3}
{"usage": {"prompt_tokens": "many"}}
{"error": "x"}
"\\ud800"
"""


@pytest.mark.parametrize("event", NO_FRAMES.split(b"\n"))
def test_a_frame_that_is_none_is_a_broken_reply(event: bytes) -> None:
    with pytest.raises(BackendError) as caught:
        read_chunk(event)
    assert caught.value.fault == "broken"


# --- the road to the engine


async def deltas(upstream: Upstream, timeouts: Timeouts | None = None, prompt: Prompt = PROMPT) -> list[Delta]:
    async with aiohttp.ClientSession() as session:
        return [delta async for delta in OpenAIBackend(session, timeouts).stream(upstream, prompt)]


async def test_the_pieces_the_reason_and_the_counts_arrive() -> None:
    async with FakeUpstream(Script(["a", "b"], finish_reason="length", usage=(7, 2))) as upstream:
        got = await deltas(Upstream(upstream.url + "/", "m", "key"))
    assert "".join(delta.text for delta in got) == "ab"
    assert got[-2].finish_reason == "length"
    assert (got[-1].prompt_tokens, got[-1].completion_tokens) == (7, 2)
    (seen,) = upstream.seen
    assert seen.headers["authorization"] == "Bearer key"
    assert seen.body == {
        "model": "m",
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_conversation_is_written_as_engines_read_it() -> None:
    calls = [ToolMessage("assistant", '{"a":1}', "c1", "f"), ToolMessage("assistant", "no JSON", "c2", "g")]
    results = [ToolMessage("tool", "1", "c1", ""), ToolMessage("tool", "2", "c2", "")]
    told = written([Message("user", "Hi"), *calls, *results, Message("assistant", "So:"), calls[0], results[0]])
    first = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    second = {"id": "c2", "type": "function", "function": {"name": "g", "arguments": '{"arguments": "no JSON"}'}}
    assert told == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [first, second]},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
        {"role": "tool", "content": "2", "tool_call_id": "c2"},
        {"role": "assistant", "content": "So:", "tool_calls": [first]},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
    ]


async def test_an_engine_is_not_sent_what_it_cannot_bear() -> None:
    prompt = Prompt(PROMPT.messages, {"seed": 7, "temperature": 0.5})
    async with FakeUpstream() as upstream:
        await deltas(Upstream(upstream.url, "m", without=frozenset({"seed"})), prompt=prompt)
        assert "seed" not in upstream.seen[0].body and upstream.seen[0].body["temperature"] == 0.5
        await deltas(Upstream(upstream.url, "m"), prompt=prompt)
        assert upstream.seen[1].body["seed"] == 7
        assert "authorization" not in {name.lower() for name in upstream.seen[1].headers}


async def test_an_engine_that_is_not_there_is_unreachable() -> None:
    with pytest.raises(BackendError) as caught:
        await deltas(Upstream(f"http://127.0.0.1:{free_port()}/v1", "m"))
    assert (caught.value.fault, caught.value.retry_after) == ("unreachable", 5)


async def test_closing_the_stream_hangs_up_at_once() -> None:
    async with FakeUpstream(Script(["a", "b"], end="hang")) as upstream, aiohttp.ClientSession() as session:
        stream = OpenAIBackend(session).stream(Upstream(upstream.url, "m"), PROMPT)
        while not (await anext(stream)).text.endswith("b"):  # perhaps both at once
            pass
        await stream.aclose()
        assert (await upstream.seen[0].finished(1.0)).gone


async def test_a_reply_that_was_read_to_its_end_leaves_its_connection_for_the_next_one() -> None:
    async with FakeUpstream() as upstream, aiohttp.ClientSession() as session:
        backend, engine = OpenAIBackend(session), Upstream(upstream.url, "m")
        for _ in range(3):
            assert [delta async for delta in backend.stream(engine, PROMPT)]
            assert (await backend.complete(engine, PROMPT)).text
        assert session.connector and len(session.connector._conns) == 1  # type: ignore[attr-defined]


async def test_the_time_that_a_consumer_takes_is_not_the_engines() -> None:
    async with FakeUpstream(Script(["a", "b", "c"])) as upstream, aiohttp.ClientSession() as session:
        timeouts = Timeouts(first_token=5, idle=0.1, total=30)
        said = ""
        async for delta in OpenAIBackend(session, timeouts).stream(Upstream(upstream.url, "m"), PROMPT):
            said += delta.text
            await asyncio.sleep(0.3)
    assert said == "abc"


# --- a reply that is asked for whole


async def test_a_whole_reply_is_asked_for_whole() -> None:
    script = Script(["a", "b"], finish_reason="length", usage=(7, 2))
    async with FakeUpstream(script) as upstream, aiohttp.ClientSession() as session:
        reply = await OpenAIBackend(session).complete(Upstream(upstream.url, "m"), PROMPT)
    assert reply == Delta("ab", "length", 7, 2)
    assert "stream" not in upstream.seen[0].body


async def test_fields_that_nobody_reads_here_are_kept_byte_by_byte() -> None:
    body = (
        b'{"id":"x","choices":[{"index":0,"message":{"content":"a","mood":1.0E5},"finish_reason":"stop",'
        b'"stop_reason":  {"b":1 }}],"usage":{"prompt_tokens":1,"completion_tokens":2,"speed":12345678901234567890123},'
        b'"system_fingerprint":"fp_1"}'
    )
    assert read_completion(body).more == More(
        {"system_fingerprint": b'"fp_1"'},
        {"stop_reason": b'{"b":1 }'},
        {"mood": b"1.0E5"},
        {"speed": b"12345678901234567890123"},
    )


async def test_log_probabilities_come_with_their_tokens() -> None:
    entry = b'{"token":"a","logprob":-0.10,"top_logprobs":[]}'
    body = b'{"choices":[{"delta":{"content":"a"},"logprobs":{"content":[' + entry + b"]}}]}"
    assert read_chunk(body).logprobs == (("a", entry),)


async def test_leaving_a_whole_reply_hangs_up_at_once() -> None:
    async with FakeUpstream(Script(wait=math.inf)) as upstream, aiohttp.ClientSession() as session:
        asking = asyncio.create_task(OpenAIBackend(session).complete(Upstream(upstream.url, "m"), PROMPT))
        await upstream.asked()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert (await upstream.seen[0].finished(1.0)).gone


# --- the grader


async def probability(upstream: FakeUpstream, timeouts: Timeouts | None = None) -> float:
    async with aiohttp.ClientSession() as session:
        return await OpenAIBackend(session, timeouts).probability(Upstream(upstream.url, "m"), PROMPT.messages)


@pytest.mark.parametrize("yes", [0.0, 0.3, 0.5, 0.99, 1.0])
async def test_a_grader_gives_the_probability_of_yes(yes: float) -> None:
    async with FakeUpstream(yes=yes) as upstream:
        assert await probability(upstream) == pytest.approx(yes)
        body = upstream.graded[0].body
        assert (body["max_tokens"], body["temperature"], body["logprobs"]) == (1, 0, True)


def completion(*alternatives: tuple[str, float]) -> dict[str, Any]:
    top = [{"token": token, "logprob": math.log(chance)} for token, chance in alternatives]
    return {"choices": [{"logprobs": {"content": [{"token": "?", "top_logprobs": top}]}}]}


@pytest.mark.parametrize(
    ("alternatives", "expected"),
    [
        ([("Yes", 0.6), ("No", 0.2)], 0.75),
        ([("yes", 0.2), (" Yes", 0.1), ("YES", 0.1), ("no.", 0.1), ("Maybe", 0.5)], 0.8),
        ([("▁yes", 0.3), ("Ġno", 0.1)], 0.75),
        ([("Yes", 0.1), ("Yesterday", 0.9)], 1.0),
        ([("no", 0.1), ("not", 0.9)], 0.0),
    ],
)
def test_only_yes_and_no_count(alternatives: list[tuple[str, float]], expected: float) -> None:
    assert yes_probability(tokens_of(completion(*alternatives))) == pytest.approx(expected)


@pytest.mark.parametrize(
    "answer",
    [completion(("Maybe", 1.0)), completion(), {}, {"choices": []}, {"choices": [{"logprobs": None}]}],
)
def test_an_answer_without_yes_or_no_is_an_error(answer: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"the engine returned no|is none of no, yes"):
        yes_probability(tokens_of(answer))


async def test_a_grader_that_is_late_or_broken_is_an_error_of_the_engine() -> None:
    async def slow(request: aiohttp.web.Request) -> aiohttp.web.Response:
        await asyncio.sleep(5)
        raise AssertionError

    async def silly(request: aiohttp.web.Request) -> aiohttp.web.Response:
        return aiohttp.web.Response(text="no JSON")

    for handler, kind in ((slow, BackendError), (silly, ValueError)):
        app = aiohttp.web.Application()
        app.router.add_post("/chat/completions", handler)
        runner = aiohttp.web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with aiohttp.ClientSession() as session:
            backend = OpenAIBackend(session, Timeouts(first_token=0.3))
            with pytest.raises(kind):
                await backend.probability(Upstream(url, "m"), PROMPT.messages)
        await runner.cleanup()


# --- what came together


def test_text_that_came_together_is_one_piece_that_knows_its_parts() -> None:
    logprobs, call = Delta("c", logprobs=(("c", b"{}"),)), Delta(calls=(CallDelta(0, "f"),))
    given = [Delta("a"), Delta("bb"), logprobs, Delta(reasoning="r"), Delta("d"), call, Delta("e"), Delta("f", "stop")]
    ab = Delta("abb", lengths=(1, 2))
    assert list(joined(given)) == [ab, logprobs, Delta(reasoning="r"), Delta("d"), call, Delta("e"), Delta("f", "stop")]
    assert ab.pieces == 2 and ab.first(1) == Delta("a") and ab.first(5) is ab and Delta("d").pieces == 1


def test_text_before_a_failure_is_not_lost() -> None:
    def deltas() -> Iterator[Delta]:
        yield from (Delta("a"), Delta("b"))
        raise BackendError("broken", "The engine reported an error.")

    told = joined(deltas())
    assert next(told).text == "ab"
    with pytest.raises(BackendError, match="reported"):
        next(told)


async def test_frames_that_came_in_one_read_are_told_as_one_piece_with_their_count() -> None:
    async with FakeUpstream(Script(list("abcdef"), end="done")) as upstream, aiohttp.ClientSession() as session:
        pieces = [delta async for delta in OpenAIBackend(session).stream(Upstream(upstream.url, "m"), PROMPT)]
    assert "".join(one.text for one in pieces) == "abcdef" and sum(one.pieces for one in pieces if one.text) == 6


async def bytes_of(content: aiohttp.StreamReader, after: float, data: bytes) -> None:
    await asyncio.sleep(after)
    content.feed_data(data)


def stream_reader() -> aiohttp.StreamReader:
    protocol = BaseProtocol(asyncio.get_running_loop())
    protocol.transport = Mock()
    return aiohttp.StreamReader(protocol, 2**16)


async def test_an_alarm_rings_for_the_wait_that_is_too_long_and_for_no_other() -> None:
    clock, content = asyncio.get_running_loop().time, stream_reader()
    with closing(Alarm(content)) as alarm:
        for _ in range(3):
            coming = asyncio.create_task(bytes_of(content, 0.1, b"data"))
            assert await alarm.read(clock() + 0.2, False) == b"data"  # 0.3 s in all
            await coming
        await asyncio.sleep(0.3)  # nobody waits
        began = clock()
        with pytest.raises(TimeoutError):
            await alarm.read(began + 0.1, False)
        assert clock() - began < 1


async def test_an_engine_that_has_finished_and_says_no_more_has_come_to_its_end() -> None:
    clock, content = asyncio.get_running_loop().time, stream_reader()
    with closing(Alarm(content)) as alarm:
        assert await alarm.read(clock() + 0.05, True) == b""


async def test_a_task_that_is_cancelled_while_an_alarm_is_set_is_cancelled() -> None:
    async def waiting() -> None:
        with closing(Alarm(stream_reader())) as alarm:
            await alarm.read(asyncio.get_running_loop().time() + 30, False)

    task = asyncio.create_task(waiting())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- chunks that are alike


ALIKE = b'data: {"id": "c", "choices": [{"index": 0, "delta": {"content": %b}, "finish_reason": null}]}\n\n'
ODD = [
    b'data: {"id": "c", "choices": [{"index": 0, "delta": {"content": "x", "role": "r"}, "finish_reason": null}]}\n\n',
    b'data: {"id": "c", "choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": "stop"}]}\n\n',
    b'data: {"id": "c", "choices": [{"index": 0, "delta": {"content": "x"}, "mine": 1, "finish_reason": null}]}\n\n',
    b'data:{"choices": [{"delta": {"content": "c"}}]}\r\n\r\n',
    b": still here\n\n",
    b'event: x\ndata: {"choices": [{"delta": {"reasoning": "hm"}}]}\n\n',
    b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}\n\n',
    ALIKE % b'"a", "tool_calls": [{"index": 0, "function": {"name": "f"}}], "content": "b"',
    ALIKE % b"null",
]
TEXTS = st.text(max_size=4).map(lambda text: ALIKE % json.dumps(text, ensure_ascii=len(text) % 2 == 0).encode())


def told(deltas: Iterable[Delta]) -> tuple[str, list[Delta]]:
    """All that is said in pieces, and the pieces that are more than text."""
    found = list(deltas)
    return "".join(one.text for one in found), [one for one in found if not one.only_text and one != Delta()]


@given(st.lists(st.one_of(TEXTS, TEXTS, TEXTS, st.sampled_from(ODD)), max_size=12), st.data())
def test_chunks_say_the_same_however_much_they_are_alike(stream: Sequence[bytes], data: st.DataObject) -> None:
    whole = b"".join(stream)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    if data.draw(st.booleans()):  # at the ends of events, as engines write them
        cuts = [len(b"".join(stream[:place])) for place in range(len(stream))]
    chunks = Chunks()
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    fed = [delta for piece in pieces for delta in chunks.feed(piece)]
    assert told(fed) == told(map(read_chunk, reference(whole)))


def test_a_chunk_like_the_last_one_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = Chunks()
    assert list(chunks.feed(ALIKE % b'"a"')) == [Delta("a")]
    monkeypatch.setattr(frames, "read_chunk", None)
    assert list(chunks.feed(ALIKE % b'"b"' + ALIKE % b'"\\u00fc"')) == [Delta("b\u00fc", lengths=(1, 1))]
    assert chunks.came and not chunks.ended


def test_an_engine_whose_chunks_are_never_alike_is_not_compared_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, guesses, guess = Chunks(), list[bytes](), Chunks._guess

    def counted(self: Chunks, event: bytes) -> None:
        guesses.append(event)
        guess(self, event)

    monkeypatch.setattr(Chunks, "_guess", counted)
    for number in range(50):
        event = b'data: {"created": %d, "choices": [{"delta": {"content": "word"}}]}\n\n' % number
        assert list(chunks.feed(event)) == [Delta("word")]
    assert len(guesses) == frames.GUESSES


@pytest.mark.parametrize("text", [b'"\xff"', b'"a\nb"', b'"a" "b"'])
def test_a_chunk_like_the_last_one_that_is_no_json_is_a_broken_reply(text: bytes) -> None:
    chunks = Chunks()
    list(chunks.feed(ALIKE % b'"a"'))
    with pytest.raises(BackendError, match="no chunk"):
        list(chunks.feed(ALIKE % text))
