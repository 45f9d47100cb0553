"""Structured logs: one JSON object a line on stderr, with fields and never with the text of messages."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import orjson

log = logging.getLogger("newel")
SOURCES = ("newel", "app", "alignment", "guardrails", "uvicorn.error", "asyncio")
"""The loggers whose lines are written; `asyncio` tells of tasks that failed unseen."""


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
        return orjson.dumps(line, default=str).decode()


def _where(trace: TracebackType | None) -> list[str]:
    """The innermost frames as `file:line function`: enough to find the place, nothing of the data."""
    frames = []
    while trace:
        code = trace.tb_frame.f_code
        frames.append(f"{code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return frames[-6:]


def event(name: str, level: int = logging.INFO, exc_info: BaseException | None = None, **fields: Any) -> None:
    """Writes one structured line; pass ids, counts and durations, never text that a person wrote."""
    if log.isEnabledFor(level):
        log.log(level, name, extra={"fields": fields}, exc_info=exc_info)


def configure(level: str) -> None:
    """Sends newel's and uvicorn's logs to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in SOURCES:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
