"""Continuous batching: sequences join and leave between two steps of one worker thread.

Text comes out as whole characters. A sequence that was cancelled, is full or has met a
stop string leaves before the next step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from alignment.decoder import CHUNK, Decoder, Sampler, Sampling, Scored, Segment

log = logging.getLogger("newel.engine")

Finish = Literal["stop", "length", "error"]


class Busy(Exception):
    """The queue is full; `retry_after` says in how many seconds there may be room."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the engine's queue is full, try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Piece:
    """What one or more steps added to a reply: whole characters, the tokens behind them, and at the end the reason."""

    text: str
    tokens: tuple[Scored, ...] = ()
    finish: Finish | None = None


class Decodes(Protocol):
    """The one thing that a text needs of a tokenizer."""

    def decode(self, token_ids: Any, skip_special_tokens: bool = ...) -> Any:
        """Returns the tokens as a string."""


class Text:
    """Turns tokens into text that never ends inside a character nor inside what may become a stop string."""

    def __init__(self, tokenizer: Decodes, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(s for s in stop if s)
        self._ids: list[int] = []
        self._start = self._read = 0  # decoded again with every token: ids[start:]; already in the text: ids[:read]
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Returns what may leave now that this token is known; sets `stopped` when a stop string is complete."""
        self._ids.append(token)
        known = self._decode(self._ids[self._start : self._read])
        longer = self._decode(self._ids[self._start :])
        # A replacement character at the end is half a character; an earlier one is what the model really wrote.
        if longer.endswith("\ufffd") or len(longer) <= len(known):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._release(longer[len(known) :])

    def flush(self) -> str:
        """Returns what was held back, for the reply ends here; half a character is dropped."""
        held, self._held = self._held, ""
        return "" if self.stopped else held

    def name(self, token: int) -> str:
        """Returns one token as text, special ones too (half a character is the replacement character)."""
        return str(self._tokenizer.decode([token], skip_special_tokens=False))

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _release(self, text: str) -> str:
        self._held += text
        ends = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if ends:
            self.stopped = True
            out, self._held = self._held[: min(ends)], ""
            return out
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


@dataclass(slots=True, eq=False)
class Sequence:
    """One reply in the making. `emit` is called in the worker thread; `cancelled` may be set by any thread."""

    prompt: list[int]
    limit: int
    sampling: Sampling
    text: Text
    emit: Callable[[Piece], None]
    salt: str = ""
    cancelled: bool = False
    ids: list[int] = field(default_factory=list)
    slot: int = -1
    cached: int = 0  # how many of `ids` lie in the cache
    reused: int = 0  # how many of them were there before
    sampler: Sampler = field(init=False)
    tokens: list[Scored] = field(default_factory=list)
    born: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.ids = list(self.prompt)
        self.sampler = Sampler(self.sampling)

    @property
    def written(self) -> int:
        """The number of tokens of the reply so far."""
        return len(self.ids) - len(self.prompt)


class Batch:
    """The work on one decoder: a bounded queue in front, up to one sequence per slot inside."""

    def __init__(self, decoder: Decoder, *, queue: int = 64) -> None:
        self._decoder = decoder
        self._limit = queue
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._seconds = 5.0  # a running mean of how long a reply takes
        self.alive = True

    def stop(self) -> None:
        """Makes `run` return after its present step."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    @property
    def load(self) -> tuple[int, int]:
        """How many sequences run and how many wait."""
        return len(self._running), len(self._waiting)

    def submit(self, sequence: Sequence) -> None:
        """Queues a sequence. Raises Busy when the queue is full."""
        with self._wake:
            self._waiting = deque(s for s in self._waiting if not s.cancelled)
            if len(self._waiting) >= self._limit:
                rounds = 1 + len(self._waiting) / len(self._decoder.slots)
                raise Busy(max(1, min(60, round(rounds * self._seconds))))
            self._waiting.append(sequence)
            self._wake.notify()

    def run(self) -> None:
        """Decodes until told to stop; the sequences that are still here then end with an error.

        Call it in the thread that made the decoder: OpenMP keeps a team of threads for each thread that ever computed,
        and two teams that fight for the cores make a step half as fast.
        """
        try:
            self._work()
        finally:
            self.alive = False
            for sequence in [*self._running, *self._waiting]:
                sequence.emit(Piece("", finish="error"))

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self._waiting or self._running)
                if self._stopping:
                    return
                self._admit()
            try:
                self._step()
            except Exception:  # the edge: one bad step must not end the engine, its sequences are told
                log.exception("a decoding step failed; %d sequences end with an error", len(self._running))
                for sequence in list(self._running):
                    self._leave(sequence, "error")

    def _admit(self) -> None:
        """Gives waiting sequences the free slots, in the order of their arrival."""
        while self._waiting and len(self._running) < len(self._decoder.slots):
            sequence = self._waiting.popleft()
            if sequence.cancelled:
                continue
            sequence.slot, sequence.cached = self._decoder.claim(sequence.ids, sequence.salt)
            sequence.reused = sequence.cached
            self._running.append(sequence)

    def _step(self) -> None:
        for sequence in [s for s in self._running if s.cancelled]:
            self._leave(sequence, None)
        work = self._plan()
        if not work:
            return
        logits = self._decoder.step([segment for _, segment in work])
        for (sequence, segment), row in zip(work, logits, strict=True):
            sequence.cached += len(segment.ids)
            if sequence.cached == len(sequence.ids):
                self._take(sequence, sequence.sampler.draw(row))

    def _plan(self) -> list[tuple[Sequence, Segment]]:
        """Returns what the next step computes: one token of each that writes, and up to CHUNK tokens of prompts.

        Chunks end at multiples of CHUNK whatever the company, so that a prompt is always computed in the same parts.
        """
        work: list[tuple[Sequence, Segment]] = []
        room = CHUNK
        for sequence in self._running:
            start = sequence.cached
            ids = sequence.ids[start : start + CHUNK - start % CHUNK]
            if sequence.written or len(ids) <= room:
                work.append((sequence, Segment(sequence.slot, start, ids)))
                room -= 0 if sequence.written else len(ids)
        return work

    def _take(self, sequence: Sequence, scored: Scored) -> None:
        """Adds a token to a reply and tells what it made certain."""
        sequence.ids.append(scored.token)
        if sequence.sampling.top is not None:
            sequence.tokens.append(scored)
        ended = scored.token in self._decoder.eos
        text = "" if ended else sequence.text.push(scored.token)
        finish: Finish | None = "stop" if ended or sequence.text.stopped else None
        if finish is None and (sequence.written >= sequence.limit or len(sequence.ids) >= self._decoder.context):
            finish = "length"
        if finish:
            self._leave(sequence, finish, text + sequence.text.flush())
        elif text:
            self._tell(sequence, text, None)

    def _leave(self, sequence: Sequence, finish: Finish | None, text: str = "") -> None:
        self._running.remove(sequence)
        self._decoder.release(sequence.slot, forget=finish == "error")
        self._seconds += 0.2 * (time.monotonic() - sequence.born - self._seconds)
        if finish:
            self._tell(sequence, text, finish)

    def _tell(self, sequence: Sequence, text: str, finish: Finish | None) -> None:
        tokens, sequence.tokens = tuple(sequence.tokens), []
        sequence.emit(Piece(text, tokens, finish))
