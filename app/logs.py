"""Structured logs: one JSON object a line on stderr, with fields and never with the text of messages.

The lines of requests are gathered for a moment and written together; a line that comes as a record of `logging` (a
warning, an error, one of uvicorn's) is written at once, after those that wait.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import deque
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

import orjson

log = logging.getLogger("newel")
SOURCES = ("newel", "app", "alignment", "guardrails", "uvicorn.error", "asyncio", "opentelemetry")
"""The loggers whose lines are written; `asyncio` tells of tasks that failed unseen, `opentelemetry` of lost spans."""
DELAY = 0.05
"""Seconds that a line may wait for others."""
MOST = 65_536
"""Bytes that wait at most."""


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON: time, level, event, and the fields given to `event()`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON; of an exception only its kind and place, since its text may quote a person."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            # asyncio and uvicorn put the text of an exception into further lines
            "event": record.getMessage().partition("\n")[0] if record.exc_info else record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[0]:
            line["exception"] = record.exc_info[0].__name__
            line["at"] = _where(record.exc_info[2])
        return _json(line).decode()


def _json(line: dict[str, Any]) -> bytes:
    """One line; of values that JSON cannot hold (half a character, a huge number) how Python would write them."""
    try:
        return orjson.dumps(line, default=str)
    except TypeError:
        return orjson.dumps({name: ascii(value) for name, value in line.items()})


def _where(trace: TracebackType | None) -> list[str]:
    """The innermost frames as `file:line function`: enough to find the place, nothing of the data."""
    frames = []
    while trace:
        code = trace.tb_frame.f_code
        frames.append(f"{code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return frames[-6:]


class Lines(logging.Handler):
    """Writes lines to a stream: `put` together with others a moment later, those of records at once, all in order."""

    def __init__(self, stream: TextIO):
        super().__init__()
        self.setFormatter(JsonFormatter())
        self._stream = stream
        self._waiting: deque[bytes] = deque()  # appended to without the lock
        self._size = 0
        self._armed: tuple[asyncio.AbstractEventLoop, asyncio.TimerHandle] | None = None
        self._second = (0, "")

    def emit(self, record: logging.LogRecord) -> None:
        """Writes what waits, then the record."""
        try:
            self._waiting.append(self.format(record).encode() + b"\n")
            self._write()
        except Exception:
            self.handleError(record)

    def put(self, name: str, level: str, fields: dict[str, Any]) -> None:
        """Takes a line of `event`; without a running event loop, or when many wait, all are written now."""
        line = _json({"time": self._time(), "level": level, "logger": log.name, "event": name, **fields}) + b"\n"
        self._waiting.append(line)
        self._size += len(line)
        if self._size > MOST or not self._arm():
            self.flush()

    def flush(self) -> None:
        """Writes what waits; `logging` calls it when the process ends."""
        with self.lock or nullcontext(), suppress(OSError, ValueError):  # a stream that is closed takes nothing more
            self._write()

    def _arm(self) -> bool:
        """True when what waits will be written in a moment."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return False
        if self._armed is None or self._armed[0] is not loop:
            self._armed = loop, loop.call_later(DELAY, self._due)
        return True

    def _due(self) -> None:
        self._armed = None
        self.flush()

    def _write(self) -> None:
        lines, self._size = [], 0
        with suppress(IndexError):
            while True:
                lines.append(self._waiting.popleft())
        if lines:
            self._stream.write(b"".join(lines).decode())
            self._stream.flush()

    def _time(self) -> str:
        """Now, as `JsonFormatter` writes it."""
        seconds, milliseconds = divmod(int(time.time() * 1000), 1000)
        known, written = self._second
        if seconds != known:
            written = datetime.fromtimestamp(seconds, UTC).isoformat()[:19]
            self._second = seconds, written
        return f"{written}.{milliseconds:03d}+00:00"


def event(name: str, level: int = logging.INFO, exc_info: BaseException | None = None, **fields: Any) -> None:
    """Writes one structured line; pass ids, counts and durations, never text that a person wrote."""
    if not log.isEnabledFor(level):
        return
    handlers = log.handlers
    alone = len(handlers) == 1 and not log.propagate  # nobody else would see the record
    if alone and level == logging.INFO and exc_info is None and type(handlers[0]) is Lines:
        handlers[0].put(name, "info", fields)
    else:
        log.log(level, name, extra={"fields": fields}, exc_info=exc_info)


def configure(level: str) -> None:
    """Sends newel's and uvicorn's logs to stderr as JSON lines."""
    handler = Lines(sys.stderr)
    for name in SOURCES:
        logger = logging.getLogger(name)
        for earlier in logger.handlers:
            earlier.flush()
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
