"""What every script of `benchmarks/trainers.py` says of its run: seconds, CPU seconds, peak memory.

Only the standard library is used here: every trainer's script imports this in an environment of its own. A script reads
a JSON object, and the last line that it prints is another.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def asked() -> Json:
    """What to do."""
    found: Json = json.load(sys.stdin)
    return found


@contextmanager
def measured() -> Iterator[Json]:
    """Has, after the block, how long it took, and the most memory that the process has had so far, loading included."""
    found: Json = {}
    began, used = time.perf_counter(), time.process_time()
    yield found
    found |= {"seconds": time.perf_counter() - began, "cpu": time.process_time() - used, "megabytes": peak()}


def peak() -> float:
    """The most resident memory of this process so far, in MB (proc(5))."""
    [found] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found) * 1024 / 1e6


def answer(found: Json) -> None:
    """Ends the script with what it found."""
    print(json.dumps(found), flush=True)


def rows(path: str) -> list[Json]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
