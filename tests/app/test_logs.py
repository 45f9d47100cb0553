"""Lines of the log: together or at once, in order, and none lost when the process is stopped."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from app.logs import DELAY, MOST, SOURCES, JsonFormatter, Lines, configure, event, log

SERVER = """
import uvicorn
from app.logs import configure, event

async def app(scope, receive, send):
    if scope["type"] == "http":
        for number in range(100):
            event("request", number=number)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

def started():
    import app.logs
    app.logs.DELAY = 3600
    configure("info")

started()
uvicorn.run(app, port=0, log_config=None, access_log=False, lifespan="off")
"""

Start = Callable[[], io.StringIO]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Sets the logs up as in a running gateway, and returns what is written to stderr; call it in the test itself,
    since pytest adds handlers of its own before it."""
    loggers = [logging.getLogger(name) for name in SOURCES]
    before = [(list(one.handlers), one.propagate, one.level) for one in loggers]
    out = io.StringIO()

    def start() -> io.StringIO:
        monkeypatch.setattr(sys, "stderr", out)
        configure("info")
        return out

    yield start
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def read(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


async def test_lines_of_requests_are_written_together_a_moment_later(started: Start) -> None:
    stream = started()
    event("one", id="a", ms=1.5)
    event("two", id="b")
    assert stream.getvalue() == ""
    async with asyncio.timeout(5):
        while not stream.getvalue():
            await asyncio.sleep(DELAY / 5)
    first, second = read(stream)
    assert first | {"time": ""} == {
        "time": "", "level": "info", "logger": "newel", "event": "one", "id": "a", "ms": 1.5,
    }  # fmt: skip
    assert second["event"] == "two"


async def test_a_warning_is_written_at_once_after_what_waits(started: Start) -> None:
    stream = started()
    event("one")
    event("two", logging.WARNING)
    event("three")
    assert [line["event"] for line in read(stream)] == ["one", "two"]
    logging.getLogger("uvicorn.error").info("Finished")
    assert [line["event"] for line in read(stream)] == ["one", "two", "three", "Finished"]


async def test_many_lines_are_written_before_their_time(started: Start) -> None:
    stream = started()
    event("long", text="x" * MOST)
    assert len(read(stream)) == 1


def test_without_an_event_loop_a_line_is_written_at_once(started: Start) -> None:
    stream = started()
    event("one")
    assert [line["event"] for line in read(stream)] == ["one"]


def test_lines_that_a_closed_loop_left_are_written_with_the_next(started: Start) -> None:
    stream = started()

    async def work() -> None:
        event("one")

    async def work_on() -> None:
        await work()
        async with asyncio.timeout(5):
            while not stream.getvalue():
                await asyncio.sleep(DELAY / 5)

    asyncio.run(work())
    asyncio.run(work_on())
    assert [line["event"] for line in read(stream)] == ["one", "one"]


async def test_what_waits_is_written_when_the_process_ends(started: Start) -> None:
    stream = started()
    event("one")
    logging.shutdown([lambda: log.handlers[0]])
    assert [line["event"] for line in read(stream)] == ["one"]


async def test_who_listens_further_up_gets_records(started: Start) -> None:
    started()
    seen: list[logging.LogRecord] = []
    listener = logging.Handler()
    listener.emit = seen.append  # type: ignore[method-assign]
    logging.getLogger().addHandler(listener)
    log.propagate = True
    event("one")
    logging.getLogger().removeHandler(listener)
    assert [record.getMessage() for record in seen] == ["one"]


async def test_a_line_reads_the_same_whichever_way_it_went(started: Start) -> None:
    stream = started()
    event("one", id="a", number=3)
    other = io.StringIO()
    handler = logging.StreamHandler(other)
    handler.setFormatter(JsonFormatter())
    log.addHandler(handler)
    event("one", id="a", number=3)
    log.removeHandler(handler)
    first, second = read(stream)
    assert list(first) == list(second) and len(first["time"]) == len(second["time"])
    assert first | {"time": ""} == second | {"time": ""} == json.loads(other.getvalue()) | {"time": ""}


async def test_a_value_that_json_cannot_hold_does_not_stop_a_request(started: Start) -> None:
    stream = started()
    event("one", what="\ud800", number=2**70)
    log.handlers[0].flush()
    (line,) = read(stream)
    assert line["what"] == "'\\ud800'" and line["number"] == str(2**70)


async def test_a_stream_that_was_closed_stops_nothing(started: Start) -> None:
    stream = started()
    stream.close()
    event("one")
    log.handlers[0].flush()


async def test_an_exception_is_told_by_its_kind_and_place_also_at_level_info(started: Start) -> None:
    stream = started()
    try:
        raise ValueError("Geheimnis")
    except ValueError as error:
        event("failed", exc_info=error)
    (line,) = read(stream)
    assert line["exception"] == "ValueError" and "Geheimnis" not in stream.getvalue()


def test_tests_and_other_programs_get_records(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "newel"):
        event("one", id="a")
    assert caplog.records[-1].__dict__["fields"] == {"id": "a"}


async def test_lines_of_several_threads_are_all_there(started: Start) -> None:
    stream = started()

    def work(level: int) -> None:
        for number in range(200):
            event("line", level, number=number)

    threads = [threading.Thread(target=work, args=(level,)) for level in (logging.INFO, logging.WARNING) * 2]
    for thread in threads:
        thread.start()
    work(logging.INFO)
    for thread in threads:
        thread.join()
    log.handlers[0].flush()
    numbers = [line["number"] for line in read(stream)]
    assert sorted(numbers) == sorted(list(range(200)) * 5)


def test_nothing_is_lost_when_the_server_is_stopped() -> None:
    process = subprocess.Popen([sys.executable, "-c", SERVER], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        port = next(line for line in process.stderr if "running on" in line).split("127.0.0.1:")[1].split(" ")[0]
        asyncio.run(_get(int(port)))
        os.kill(process.pid, signal.SIGTERM)
        _, rest = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    lines = [json.loads(line) for line in rest.splitlines()]
    assert [line["number"] for line in lines if line["event"] == "request"] == list(range(100))
    assert "Finished server process" in lines[-1]["event"]


async def _get(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 204")
    writer.close()


async def test_a_line_costs_little(started: Start) -> None:
    started()
    assert [type(one) for one in log.handlers] == [Lines]
    fields = dict.fromkeys(("turn", "request", "conversation", "tenant", "policy"), "chatcmpl-0123456789abcdef")
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        for _ in range(500):
            event("turn", **fields, tokens=12, ms=1.25)
        best = min(best, time.perf_counter() - began)
    assert best / 500 < 40e-6, "five times the target: a slow machine, but no slow path"
