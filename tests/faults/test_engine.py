"""The engine drips, lies, breaks off, dies, or is overloaded: a real status before the first frame, an end after it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp

from tests.faults.client import Heard, ask
from tests.faults.conftest import Started
from tests.faults.engine import (
    DONE,
    EVENT_STREAM,
    FIRST,
    LAST,
    OVERLOADED,
    Call,
    Engine,
    Script,
    chunk,
    completion,
    event,
    good,
    slow,
)
from tests.faults.newel import QUICK, ROOT, Newel
from tests.faults.page import Fault
from tests.gateway import free_port

GROUP = "The engine"
TEXT = ("The first thing to know", " is how it works. ", "The second is more", " than that,")
SLACK = 1.0
"""Seconds that an error may come after the time-out that it is about: the machine is shared."""


async def until_good(http: aiohttp.ClientSession, gateway: Newel, timeout: float = 15.0) -> float:
    """The seconds until a request is answered again."""
    began = time.monotonic()
    while not (heard := await ask(http, gateway)).complete:
        assert time.monotonic() - began < timeout, f"not answered again: {heard}"
        await asyncio.sleep(0.05)
    return time.monotonic() - began


@contextmanager
def engine_process(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """An engine that can be killed."""
    command = [sys.executable, "-m", "tests.faults.engine", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout and process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


async def test_an_engine_killed_in_the_middle_of_a_stream(
    started: Started, http: aiohttp.ClientSession, fault: Fault
) -> None:
    fault.tell(
        GROUP,
        "Engine killed (SIGKILL) in the middle of a stream",
        "the text so far, an error event, `[DONE]`; a client that does not stream: 503 with `Retry-After`",
        "the turn as far as it was said, with its error",
    )
    port = free_port()
    with engine_process(port) as process:
        gateway = await started(engine=f"http://127.0.0.1:{port}/v1")
        pieces: list[str] = []
        streamed = asyncio.create_task(ask(http, gateway, stream=True, seen=pieces))
        whole = asyncio.create_task(ask(http, gateway))
        async with asyncio.timeout(10):
            while len(pieces) < 3:
                await asyncio.sleep(0.01)
        process.kill()
        killed = time.monotonic()
        heard = await streamed
        fault.took("to the error", time.monotonic() - killed)
        assert heard.ended and heard.error and not heard.finish
        assert heard.text.startswith(" word0 word1") and heard.text == "".join(pieces)
        assert (await whole).unavailable
        assert (await ask(http, gateway)).unavailable, "there is no engine now"
    with engine_process(port):
        began = time.monotonic()
        async with asyncio.timeout(20):
            while not (await ask(http, gateway, stream=True)).text:
                await asyncio.sleep(0.05)
        fault.took("to the first answer of the new engine", time.monotonic() - began)
    store = await gateway.store()
    turn = await store.turn(heard.id, "default")
    await store.close()
    assert turn and turn.said == heard.text and turn.error


# --- time-outs


async def dripping_head(call: Call) -> None:
    for byte in EVENT_STREAM * 100:
        await call.send(bytes([byte]))
        await asyncio.sleep(0.05)


async def dripping_comments(call: Call) -> None:
    await call.send(EVENT_STREAM)
    while True:
        await call.piece(b": still thinking\n\n")
        await asyncio.sleep(0.05)


async def empty_chunks(call: Call) -> None:
    await call.send(EVENT_STREAM)
    while True:
        await call.piece(FIRST)
        await asyncio.sleep(0.05)


async def silence(call: Call) -> None:
    await asyncio.Event().wait()


def named(engine: Engine, *scripts: Script) -> list[str]:
    """The questions that are met with these scripts."""
    engine.scripts |= {f"Please do {script.__name__}": script for script in scripts}
    return list(engine.scripts)


async def test_an_engine_that_never_comes_to_a_first_token(
    started: Started, http: aiohttp.ClientSession, engine: Engine, fault: Fault
) -> None:
    fault.tell(
        GROUP,
        "Slow loris before the first token: header bytes, comments, or empty chunks without an end, or nothing",
        "504 with `Retry-After` after `first_token_timeout`; whole replies after `total_timeout`",
        "the turn, with its error",
    )
    questions = named(engine, dripping_head, dripping_comments, empty_chunks, silence)
    gateway = await started(more=QUICK)
    streamed = asyncio.gather(*(ask(http, gateway, question, stream=True) for question in questions))
    whole = asyncio.gather(*(ask(http, gateway, question) for question in questions))
    for heard, limit in [*((one, "first_token_timeout") for one in await streamed)] + [
        (one, "total_timeout") for one in await whole
    ]:
        assert heard.status == 504 and heard.error and heard.headers["retry-after"], heard
        assert heard.seconds < float(QUICK[limit]) + SLACK
    fault.took("to the 504, with a time-out of 1 s", max(one.seconds for one in await streamed))
    async with asyncio.timeout(1):
        while not all(call.gone_at for call in engine.calls):
            await asyncio.sleep(0.01)
    fault.took("to the next answer", await until_good(http, gateway))


async def dripping_body(call: Call) -> None:
    await call.begin(*TEXT)
    for byte in chunk({"content": "never" * 1000}):
        await call.piece(bytes([byte]))
        await asyncio.sleep(0.05)


async def dripping_comments_later(call: Call) -> None:
    await call.begin(*TEXT)
    while True:
        await call.piece(b": still thinking\n\n")
        await asyncio.sleep(0.05)


async def silence_later(call: Call) -> None:
    await call.begin(*TEXT)
    await silence(call)


def settled(heard: Heard) -> bool:
    """True for a good part of TEXT and nothing else: its end may be held back by a rule until more is known."""
    return "".join(TEXT).startswith(heard.text) and heard.text.startswith("".join(TEXT[:2]).strip())


async def test_an_engine_that_stops_in_the_middle_of_a_reply(
    started: Started, http: aiohttp.ClientSession, engine: Engine, fault: Fault
) -> None:
    fault.tell(
        GROUP,
        "Slow loris in the middle of a reply: one event byte by byte, comments without an end, or nothing",
        "the text so far, an error event after `idle_timeout`, `[DONE]`",
        "the turn as far as it was said, with its error",
    )
    questions = named(engine, dripping_body, dripping_comments_later, silence_later)
    gateway = await started(more=QUICK)
    for heard in await asyncio.gather(*(ask(http, gateway, question, stream=True) for question in questions)):
        assert heard.ended and heard.error and settled(heard), heard
        assert heard.seconds < float(QUICK["idle_timeout"]) + SLACK
        fault.took("to the error, with a time-out of 1 s", heard.seconds)


# --- broken off


async def fin_in_the_body(call: Call) -> None:
    if not call.streamed:
        raw = b'{"id": "x", "choices": ['
        await call.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n" + raw)
        call.hang_up()
    await call.begin(*TEXT)
    await asyncio.sleep(0.1)
    call.hang_up()


async def rst_in_the_body(call: Call) -> None:
    if not call.streamed:
        await call.send(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{")
        call.hang_up(hard=True)
    await call.begin(*TEXT)
    await asyncio.sleep(0.1)
    call.hang_up(hard=True)


async def half_an_event(call: Call) -> None:
    if not call.streamed:
        return await fin_in_the_body(call)
    await call.begin(*TEXT)
    await call.piece(chunk({"content": " and"})[:-30])
    await call.end()


async def no_last_chunk(call: Call) -> None:
    """A body that HTTP calls whole, without a finish reason."""
    if not call.streamed:
        body = completion("Hello there")
        body["choices"][0]["finish_reason"] = None
        return await call.json(body)
    await call.begin(*TEXT)
    await call.end()


async def done_without_a_last_chunk(call: Call) -> None:
    if not call.streamed:
        return await no_last_chunk(call)
    await call.begin(*TEXT)
    await call.piece(DONE)
    await call.end()


async def no_chunk_at_all(call: Call) -> None:
    if not call.streamed:
        return await no_last_chunk(call)
    await call.begin(*TEXT)
    await call.piece(b"data: this is no JSON\n\n")
    await call.end()


BROKEN = [fin_in_the_body, rst_in_the_body, half_an_event, no_last_chunk, done_without_a_last_chunk, no_chunk_at_all]


async def test_a_reply_that_breaks_off(
    started: Started, http: aiohttp.ClientSession, engine: Engine, fault: Fault
) -> None:
    fault.tell(
        GROUP,
        "Reply broken off: FIN or RST in the body, half an event, no finish reason, no JSON",
        "the text so far, an error event, `[DONE]`; a client that does not stream: 503 with `Retry-After`",
        "the turn as far as it was said, with its error",
    )
    questions = named(engine, *BROKEN)
    gateway = await started(more=QUICK)
    streamed = asyncio.gather(*(ask(http, gateway, question, stream=True) for question in questions))
    whole = asyncio.gather(*(ask(http, gateway, question) for question in questions))
    for heard in await streamed:
        assert heard.ended and heard.error and not heard.finish and settled(heard), heard
    assert all(heard.unavailable for heard in await whole), await whole
    fault.took("to the error, which came 0.1 s after the text", max(heard.seconds for heard in await streamed))
    fault.took("to the next answer", await until_good(http, gateway))


async def test_a_reply_without_done_is_complete(started: Started, http: aiohttp.ClientSession, engine: Engine) -> None:
    async def without(call: Call) -> None:
        if not call.streamed:
            return await good(call)
        await call.begin(*TEXT)
        await call.piece(LAST)
        await call.end()

    engine.script = without
    heard = await ask(http, await started(), stream=True)
    assert heard.complete and heard.done and heard.text == "".join(TEXT)


async def test_a_reply_that_is_finished_but_whose_connection_stays_open(
    started: Started, http: aiohttp.ClientSession, engine: Engine, fault: Fault
) -> None:
    fault.tell(
        GROUP,
        "No terminal frame: a finish reason, then neither `[DONE]` nor an end of the connection",
        "the whole reply and `[DONE]`, at the latest after `idle_timeout`",
        "the turn",
    )

    async def open_end(call: Call) -> None:
        await call.begin(*TEXT)
        await call.piece(LAST)
        await silence(call)

    engine.script = open_end
    heard = await ask(http, await started(more=QUICK), stream=True)
    assert heard.ended and heard.text == "".join(TEXT)
    assert heard.seconds < float(QUICK["idle_timeout"]) + SLACK
    fault.took("to `[DONE]`, with a time-out of 1 s", heard.seconds)


async def not_http(call: Call) -> None:
    await call.send(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
    call.hang_up()


async def not_events(call: Call) -> None:
    raw = b"<html>Bad gateway</html>"
    await call.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: %d\r\n\r\n%b" % (len(raw), raw))


async def server_error(call: Call) -> None:
    await call.json({"detail": "Internal Server Error"}, "500 Internal Server Error")


async def test_an_answer_that_is_none(
    started: Started, http: aiohttp.ClientSession, engine: Engine, fault: Fault
) -> None:
    fault.tell(
        GROUP, "An answer that is no HTTP, no event stream, or a 500", "502 or 503, with `Retry-After`", "the turn"
    )
    questions = named(engine, not_http, not_events, server_error)
    gateway = await started(more=QUICK)
    asked = [ask(http, gateway, question, stream=stream) for question in questions for stream in (True, False)]
    for heard in await asyncio.gather(*asked):
        assert heard.status in (502, 503) and heard.error and heard.headers["retry-after"], heard
        fault.took("to the error", heard.seconds)


async def test_an_event_without_an_end_does_not_fill_the_memory(
    started: Started, http: aiohttp.ClientSession, engine: Engine, fault: Fault
) -> None:
    fault.tell(GROUP, "One event of 200 MB", "an error event or 503", "the turn")

    async def endless(call: Call) -> None:
        await call.begin("Hello")
        await call.piece(b'data: {"choices": [{"delta": {"content": "')
        for _ in range(200):
            await call.piece(b"x" * 1_000_000)

    engine.script = endless
    gateway = await started(more=QUICK)
    before = gateway.rss
    heard = await ask(http, gateway, stream=True)
    assert heard.ended and heard.error
    grown = gateway.rss - before
    assert grown < 64
    fault.took("memory of the gateway", f"+{grown:.0f} MB")


# --- overload


async def test_an_error_frame_instead_of_the_first_token(
    started: Started, http: aiohttp.ClientSession, engine: Engine, fault: Fault
) -> None:
    fault.tell(
        GROUP,
        "200 and then an error frame, before any text (vLLM when it is overloaded)",
        "503 with `Retry-After`, as if the engine had said so",
        "the turn, with its error",
    )

    async def overloaded(call: Call) -> None:
        if not call.streamed:
            return await call.json(OVERLOADED, "503 Service Unavailable")
        await call.send(EVENT_STREAM)
        await call.piece(event(OVERLOADED))
        await call.piece(DONE)
        await call.end()

    engine.script = overloaded
    gateway = await started()
    for heard in await asyncio.gather(ask(http, gateway, stream=True), ask(http, gateway)):
        assert heard.unavailable
        fault.took("to the 503", heard.seconds)
    engine.script = good
    fault.took("to the next answer", await until_good(http, gateway))


async def test_an_error_frame_after_the_role_is_still_before_the_first_token(
    started: Started, http: aiohttp.ClientSession, engine: Engine
) -> None:
    async def overloaded(call: Call) -> None:
        await call.begin()
        await call.piece(event(OVERLOADED))
        await call.end()

    engine.script = overloaded
    assert (await ask(http, await started(), stream=True)).unavailable


async def test_an_error_frame_later(
    started: Started, http: aiohttp.ClientSession, engine: Engine, fault: Fault
) -> None:
    fault.tell(
        GROUP,
        "An error frame in the middle of a stream",
        "the text so far, an error event, `[DONE]`; no final chunk",
        "the turn as far as it was said, with its error",
    )

    async def later(call: Call) -> None:
        await call.begin(*TEXT)
        await call.piece(event(OVERLOADED))
        await call.piece(DONE)
        await call.end()

    engine.script = later
    heard = await ask(http, await started(), stream=True)
    assert heard.ended and heard.error and not heard.finish and settled(heard)
    fault.took("to the error", heard.seconds)


async def test_a_storm_of_503(started: Started, http: aiohttp.ClientSession, engine: Engine, fault: Fault) -> None:
    fault.tell(
        GROUP,
        "503 storm: the engine answers everything with 503 for 2 s, while 32 clients keep asking",
        "503 with `Retry-After`, at once",
        "the turns, with their error",
    )

    async def overloaded(call: Call) -> None:
        await call.json(OVERLOADED, "503 Service Unavailable", "retry-after: 1")

    gateway = await started()
    engine.script = overloaded
    storm = asyncio.Event()
    heard: list[Heard] = []

    async def client(number: int) -> None:
        while not storm.is_set():
            heard.append(await ask(http, gateway, f"Question {len(heard)}", stream=number % 2 == 0))
            await asyncio.sleep(0.05)

    clients = [asyncio.create_task(client(number)) for number in range(32)]
    await asyncio.sleep(2)
    storm.set()
    await asyncio.gather(*clients)
    asked = len(engine.calls)
    engine.script = good
    back = await until_good(http, gateway)
    assert len(heard) > 64 and all(one.unavailable for one in heard)
    assert asked <= 2 * len(heard), "retries must not make a storm worse"
    fault.took("longest 503", max(one.seconds for one in heard))
    fault.took("requests to the engine for each of a client", f"{asked / len(heard):.2f}")
    fault.took("to the first answer afterwards", back)
    assert back < 10


# --- the client goes


async def test_a_client_that_goes_away(
    started: Started, http: aiohttp.ClientSession, engine: Engine, fault: Fault
) -> None:
    fault.tell(
        GROUP,
        "The client disconnects, before or after the first token",
        "(it is gone)",
        "the turn as it stands, with the error `client_gone`; the engine's work is ended by closing its connection",
    )
    gateway = await started()
    ways = [(script, stream) for script in (slow, silence) for stream in (True, False)]
    for number, (script, stream) in enumerate(ways, 1):
        engine.script, pieces = script, []
        asking = asyncio.create_task(ask(http, gateway, stream=stream, seen=pieces))
        call = await engine.asked(number)
        async with asyncio.timeout(5):
            while stream and script is slow and len(pieces) < 2:
                await asyncio.sleep(0.01)
        asking.cancel()
        gone = time.monotonic()
        async with asyncio.timeout(3):
            while call.gone_at is None:
                await asyncio.sleep(0.005)
        assert call.gone_at - gone < 1.0, (script.__name__, stream)
        fault.took("to the end of the engine's work", max(call.gone_at - gone, 0.0))


async def test_a_reply_split_at_every_byte(started: Started, http: aiohttp.ClientSession, engine: Engine) -> None:
    said = ["Grüße", " 👩‍🚀 ", 'a "quoted" \\ line\n', " and the end."]

    async def bytewise(call: Call) -> None:
        if not call.streamed:
            return await call.reply(*said)
        await call.send(EVENT_STREAM)
        raw = b"\r\n\r\n: hello\n\n" + FIRST + b"".join(chunk({"content": one}) for one in said) + LAST + DONE
        for byte in raw:
            await call.piece(bytes([byte]))
        await call.end()

    engine.script = bytewise
    heard = await ask(http, await started(), stream=True)
    assert heard.complete and heard.done and heard.text == "".join(said)
