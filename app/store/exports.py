"""Which training files hold whose words: what `newel export` wrote where, and lines taken out of it again."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import and_, delete, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.records import now
from app.store import tables
from app.store.database import insert_new, upsert
from app.store.erasure import Mark

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What became of an export: how many lines were taken out, or that its folder is not on this machine."""

    host: str
    folder: str
    lines: int = 0
    found: bool = True


def here() -> str:
    """The name of this machine."""
    return socket.gethostname()


async def register(
    connection: AsyncConnection, folder: str, tenant: str | None, by: str, lines: Iterable[tuple[str, str]]
) -> None:
    """Notes what the files in `folder`, an absolute path, hold, each as (the turn that a line names, a turn whose words
    are in it)."""
    export, line, turn = tables.exports, tables.exported, tables.turns
    place = {"host": here(), "folder": folder}
    await upsert(connection, export, place | {"tenant": tenant or "", "by": by, "at": now()}, "tenant", "by", "at")
    where = and_(line.c.host == place["host"], line.c.folder == place["folder"])
    await connection.execute(delete(line).where(where))
    pairs = sorted(set(lines))
    for at in range(0, len(pairs), 500):
        some = pairs[at : at + 500]
        columns = (turn.c.id, turn.c.tenant, turn.c.conversation, turn.c.subject, turn.c.created_at)
        rows = await connection.execute(select(*columns).where(turn.c.id.in_({origin for _, origin in some})))
        whose = {row.id: row for row in rows}
        await insert_new(
            connection,
            line,
            [
                place
                | {"turn": named, "origin": origin, "tenant": one.tenant, "conversation": one.conversation}
                | {"subject": one.subject, "began": one.created_at}
                for named, origin in some
                if (one := whose.get(origin))
            ],
        )


async def holding(connection: AsyncConnection, mark: Mark) -> dict[tuple[str, str], set[str]]:
    """The turns that lines name which hold words that were erased, by the host and folder of the export.

    A person's words are also in the lines of others who took part in the same conversation.
    """
    line, whose = tables.exported, mark.whose
    mine = and_(whose.rows(line), line.c.began <= mark.at)
    if whose.subject:
        talks = select(line.c.conversation).where(mine)
        mine = and_(line.c.tenant == whose.tenant, or_(line.c.subject == whose.subject, line.c.conversation.in_(talks)))
    found: dict[tuple[str, str], set[str]] = {}
    for row in await connection.execute(select(line.c.host, line.c.folder, line.c.turn).where(mine)):
        found.setdefault((row.host, row.folder), set()).add(row.turn)
    return found


async def forget(connection: AsyncConnection, host: str, folder: str, turns: Sequence[str]) -> None:
    """Notes that an export holds no line of these turns any more."""
    line = tables.exported
    mine = and_(line.c.host == host, line.c.folder == folder)
    for at in range(0, len(turns), 500):
        await connection.execute(delete(line).where(mine, line.c.turn.in_(turns[at : at + 500])))


def clean(host: str, folder: str, turns: set[str]) -> Cleaned:
    """What became of the lines of these turns in an export; the files are replaced whole, and the manifest last."""
    path = Path(folder)
    if not (path / MANIFEST).exists() and not any(path.glob("*.jsonl")):
        return Cleaned(host, folder, found=False)
    lines = sum(_without(file, turns) for file in sorted(path.glob("*.jsonl")))
    if not lines and host != here():
        return Cleaned(host, folder, found=False)  # a folder of the same name, with other files in it
    if (path / MANIFEST).exists():
        _renew_manifest(path)
    return Cleaned(host, folder, lines)


def _without(file: Path, turns: set[str]) -> int:
    lines = file.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if not _names(line, turns)]
    if len(kept) < len(lines):
        _replace(file, b"".join(kept))
    return len(lines) - len(kept)


def _names(line: bytes, turns: set[str]) -> bool:
    """True for a line of one of these turns; one that is no JSON goes when it mentions one anywhere."""
    try:
        return json.loads(line).get("turn") in turns
    except (ValueError, AttributeError):
        return any(turn.encode() in line for turn in turns)


def _renew_manifest(folder: Path) -> None:
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    for name, listed in manifest.get("files", {}).items():
        if (folder / name).exists():
            content = (folder / name).read_bytes()
            records = [json.loads(line) for line in content.splitlines()]
            test = sum(record.get("split") == "test" for record in records)
            listed |= {"records": len(records), "test": test, "sha256": hashlib.sha256(content).hexdigest()}
    _replace(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
