"""The audit log's chain: each entry's hash covers the entry and the hash before it. Values only, no database.

The hash is SHA-256 and needs no secret, so that an auditor can check an exported log. That nobody who can write to the
database made the whole chain anew is told by the head: it is signed (`app.sealing`), and can be kept elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

FIRST = "0" * 64
"""What stands for the hash before the first entry."""


@dataclass(frozen=True, slots=True)
class Head:
    """Where a chain ends: how many entries it has, and the hash of the last one."""

    entries: int
    hash: str

    @property
    def value(self) -> str:
        """`ENTRIES:HASH`, as it is signed, printed and kept elsewhere."""
        return f"{self.entries}:{self.hash}"


EMPTY = Head(0, FIRST)


def read_head(value: str) -> Head:
    """The head that was written as `ENTRIES:HASH`; raises ValueError."""
    entries, _, hash = value.strip().partition(":")
    if not entries.isdecimal() or len(hash) != 64 or set(hash) - set("0123456789abcdef"):
        raise ValueError("a head is ENTRIES:HASH, as `newel audit head` prints it")
    return Head(int(entries), hash)


def link(head: Head, at: datetime, actor: str, action: str, subject: str, detail: Mapping[str, object]) -> Head:
    """The head after one more entry: SHA-256 of the JSON array of its place, time (UTC, microseconds), texts, detail
    (keys sorted) and the hash before."""
    moment = (at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)).isoformat(timespec="microseconds")
    entry = [head.entries + 1, moment, actor, action, subject, detail, head.hash]
    canonical = json.dumps(entry, sort_keys=True, separators=(",", ":"))
    return Head(head.entries + 1, hashlib.sha256(canonical.encode()).hexdigest())
