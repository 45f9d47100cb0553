"""The spill: turns on disk, one JSON object a line with a checksum, until the database is back.

A line is written whole and synced before `append` returns, or not at all. Files are named by day and sequence; a
replay first renames them, so that new turns go to a new file meanwhile. Several processes may share the folder.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

from pydantic import TypeAdapter, ValidationError

from app.records import Turn, now
from app.store.errors import SpillFull, StoreDown, StoreError

MAX_BYTES = 16 * 2**20
ASIDE = "aside.jsonl"
"""Where a replay puts lines that it cannot read or that the database does not take."""
SLICE = 32
"""Turns that are encoded before other tasks have their turn: about a millisecond."""
_TURN = TypeAdapter(Turn)


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay did: turns written, turns that were in the database already, torn lines, turns turned down."""

    written: int = 0
    known: int = 0
    torn: int = 0
    rejected: int = 0

    def __add__(self, other: Replayed) -> Replayed:
        """The sum, field by field."""
        return Replayed(
            self.written + other.written,
            self.known + other.known,
            self.torn + other.torn,
            self.rejected + other.rejected,
        )


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def encode(turn: Turn) -> bytes:
    """The turn as a line: its JSON (ASCII only) and the SHA-256 of that."""
    body = _canonical(_TURN.dump_python(turn, mode="json"))
    return f'{{"sha256":"{hashlib.sha256(body.encode()).hexdigest()}","turn":{body}}}\n'.encode()


def decode(line: bytes) -> Turn:
    """The turn in a line; raises ValueError when the line is torn or was changed."""
    try:
        record = json.loads(line)
        body = _canonical(record["turn"])
        if hashlib.sha256(body.encode()).hexdigest() != record["sha256"]:
            raise ValueError("the checksum is wrong")
        return _TURN.validate_python(record["turn"])
    except (KeyError, TypeError, ValidationError) as error:
        raise ValueError(f"not a spilled turn: {type(error).__name__}") from None


async def _encoded(some: Sequence[Turn]) -> bytes:
    """The turns as lines; others have their turn in between."""
    lines = []
    for turn in some:
        lines.append(encode(turn))
        if len(lines) % SLICE == 0:
            await asyncio.sleep(0)
    return b"".join(lines)


def _write(path: Path, lines: bytes) -> None:
    """Appends and syncs `lines`; after an error the file is as it was. A torn line before them is ended first."""
    fresh = not path.exists()
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        size = os.fstat(file).st_size
        rest = lines if not size or os.pread(file, 1, size - 1) == b"\n" else b"\n" + lines
        try:
            while rest:
                rest = rest[os.write(file, rest) :]
            os.fsync(file)
        except OSError:
            with suppress(OSError):
                os.ftruncate(file, size)
            raise
    finally:
        os.close(file)
    if fresh:
        _sync_folder(path.parent)


def _goes(line: bytes, gone: Callable[[Turn], bool]) -> bool:
    try:
        return gone(decode(line))
    except ValueError:
        return True


def _replace(path: Path, lines: bytes) -> None:
    """Puts `lines` in the place of a file, or nothing where there are none."""
    if lines:
        part = path.with_name(f".{path.name}.part")
        part.unlink(missing_ok=True)
        _write(part, lines)
        part.rename(path)
    else:
        path.unlink()
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    entry = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)


class Spill:
    """A folder of spilled turns; `waiting` counts those that are not in the database yet."""

    __slots__ = ("_folder", "_max_bytes", "_order", "waiting")

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES):
        """Raises SpillFull when nothing can be written there: better at the start than when it is needed."""
        self._folder, self._max_bytes, self._order = folder, max_bytes, asyncio.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._locked("append.lock"):
                self.waiting = self._count()
        except OSError as error:
            raise SpillFull(f"the spill folder {folder} cannot be used: {error.strerror}") from error

    async def append(self, *some: Turn) -> None:
        """Returns when the turns are on the disk, all of them; raises SpillFull when they cannot be, and none is."""
        lines = await _encoded(some)
        async with self._order:
            try:
                await asyncio.to_thread(self._append, lines)
            except OSError as error:
                names = f"turn {some[0].id}" if len(some) == 1 else f"{len(some)} turns"
                message = f"{names} cannot be spilled to {self._folder}: {error.strerror}; make room there"
                raise SpillFull(message) from error
            self.waiting += len(some)

    async def put_aside(self, turn: Turn) -> None:
        """Keeps a turn that the database does not take, beside the lines that a replay has put away."""
        async with self._order:
            try:
                await asyncio.to_thread(_write, self._folder / ASIDE, encode(turn))
            except OSError as error:
                raise SpillFull(f"turn {turn.id} cannot be put aside in {self._folder}: {error.strerror}") from error

    async def replay(self, put: Callable[[Turn], Awaitable[int]]) -> Replayed:
        """What became of the waiting turns, each given to `put` (how many rows it wrote: 0 for a known turn).

        Does nothing while another process replays. Raises StoreDown, and then all that is left stays.
        """
        done = Replayed()
        try:
            with self._locked("replay.lock", fcntl.LOCK_NB):
                for path in await asyncio.to_thread(self._seal):
                    done += await self._replay_file(path, put)
                self.waiting = await asyncio.to_thread(self._count)
        except BlockingIOError:
            return done
        except OSError as error:
            raise SpillFull(f"the spill folder {self._folder} cannot be replayed: {error.strerror}") from error
        return done

    @property
    def aside(self) -> bool:
        """True when something was put aside."""
        return (self._folder / ASIDE).exists()

    async def remove(self, gone: Callable[[Turn], bool]) -> int:
        """How many lines were taken out, of those put aside, too: the turns for which `gone` says so, and what nobody
        can read, since nobody can tell whose that is. Waits for a replay to end; raises SpillFull."""
        try:
            return await asyncio.to_thread(self._remove, gone)
        except OSError as error:
            raise SpillFull(f"the spill folder {self._folder} cannot be cleaned: {error.strerror}") from error

    def _remove(self, gone: Callable[[Turn], bool]) -> int:
        removed = 0
        with self._locked("replay.lock"), self._locked("append.lock"):
            for path in (path for ending in ("jsonl", "replaying") for path in self._folder.glob(f"*.{ending}")):
                lines = path.read_bytes().splitlines(keepends=True)
                kept = [line for line in lines if not _goes(line, gone)]
                removed += len(lines) - len(kept)
                if len(kept) < len(lines):
                    _replace(path, b"".join(kept))
            self.waiting = self._count()
        return removed

    async def _replay_file(self, path: Path, put: Callable[[Turn], Awaitable[int]]) -> Replayed:
        done, aside = Replayed(), b""
        for line in (await asyncio.to_thread(path.read_bytes)).splitlines(keepends=True):
            try:
                wrote = await put(decode(line))
            except ValueError:
                done += Replayed(torn=1)
                aside += line
            except StoreDown:
                raise
            except StoreError:
                done += Replayed(rejected=1)
                aside += line
            else:
                done += Replayed(written=1) if wrote else Replayed(known=1)
        if aside:
            await asyncio.to_thread(_write, self._folder / ASIDE, aside)
        await asyncio.to_thread(path.unlink)
        return done

    def _append(self, line: bytes) -> None:
        with self._locked("append.lock"):
            _write(self._current(), line)

    def _current(self) -> Path:
        day = f"turns-{now():%Y%m%d}"
        newest = max(self._folder.glob(f"{day}-*.jsonl"), default=None)
        if newest is None:
            return self._folder / f"{day}-0000.jsonl"
        if newest.stat().st_size < self._max_bytes:
            return newest
        return self._folder / f"{day}-{int(newest.stem.rpartition('-')[2]) + 1:04}.jsonl"

    def _seal(self) -> list[Path]:
        with self._locked("append.lock"):
            for path in self._folder.glob("turns-*.jsonl"):
                path.rename(path.with_name(f"{path.stem}.{token_hex(4)}.replaying"))
        return sorted(self._folder.glob("turns-*.replaying"))

    def _count(self) -> int:
        files = (path for ending in ("jsonl", "replaying") for path in self._folder.glob(f"turns-*.{ending}"))
        return sum(len(path.read_bytes().splitlines()) for path in files)

    @contextmanager
    def _locked(self, name: str, how: int = 0) -> Iterator[None]:
        lock = os.open(self._folder / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | how)
            yield
        finally:
            os.close(lock)
