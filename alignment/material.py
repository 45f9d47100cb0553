"""What a run learns from: its files' records as rows of tokens, what was left out of them, and what it says of them.

All records that the chat template turns down are told at once, with file, line and reason, like lines that are none.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from alignment.dataset import Dataset, Overlap, overlap
from alignment.dataset import read as read_file
from alignment.progress import Tell
from alignment.records import BadRecords, R, Split
from alignment.tokens import TemplateError

NAME = "data.json"
LISTED = 20
"""Lines that are listed of an overlap, or of what is too long."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Made(Generic[R, T]):
    """What a record became, and where the record is: the number of its file, and the line there."""

    file: int
    line: int
    record: R
    what: T


@dataclass(slots=True)
class Material(Generic[R]):
    """Some files' records. left_out: how many of each file, by reason."""

    sets: Sequence[Dataset[R]]
    tell: Tell = print
    left_out: list[Counter[str]] = field(default_factory=list)

    @classmethod
    def read(cls, paths: Sequence[Path], kind: type[R] | None = None, tell: Tell = print) -> Material[R]:
        """The records of files; raises BadRecords with the bad lines of all of them, DatasetError."""
        sets, bad = list[Dataset[R]](), dict[Path, Any]()
        for path in paths:
            try:
                sets.append(read_file(path, kind, tell))
            except BadRecords as error:
                bad |= error.files
        if bad:
            raise BadRecords(bad)
        return cls(sets, tell, [Counter() for _ in sets])

    @property
    def fingerprints(self) -> dict[str, str]:
        """SHA-256 by file."""
        return {str(one.path): one.fingerprint for one in self.sets}

    def made(self, make: Callable[[R], T], skip: Callable[[R], str] | None = None) -> dict[Split, list[Made[R, T]]]:
        """What `make` makes of the records, by split. skip: why a record is left out, empty where it is not.

        Raises BadRecords with every record that the template turns down.
        """
        found: dict[Split, list[Made[R, T]]] = {"train": [], "test": []}
        bad: dict[Path, dict[int, str]] = {}
        for number, some in enumerate(self.sets):
            for line, record in zip(some.lines, some.records, strict=True):
                if skip and (why := skip(record)):
                    self.left_out[number][why] += 1
                    continue
                try:
                    found[record.split].append(Made(number, line, record, make(record)))
                except TemplateError as error:
                    bad.setdefault(some.path, {})[line] = str(error)
        if bad:
            raise BadRecords(bad)
        return found

    def fitting(
        self, some: Sequence[Made[R, T]], longest: int, knob: str, length: Callable[[T], int]
    ) -> list[Made[R, T]]:
        """Those of at most `longest` tokens; of the others it is told how many, where, and how long they are."""
        kept = [one for one in some if length(one.what) <= longest]
        over = [one for one in some if length(one.what) > longest]
        for one in over:
            self.left_out[one.file][f"longer than {knob}"] += 1
        if over:
            places = ", ".join(f"{self.sets[one.file].path.name}:{one.line}" for one in over[:LISTED])
            more = f" and {len(over) - LISTED} more" if len(over) > LISTED else ""
            most = max(length(one.what) for one in over)
            self.tell(
                f"{len(over)} of {len(some)} rows are longer than {longest} tokens and left out ({knob}; the longest "
                f"has {most}): {places}{more}"
            )
        return kept


def write(folder: Path, *materials: Material[Any], tell: Tell = print) -> None:
    """Writes `data.json` into a run's folder: of each file rows by split and slice, its fingerprint and what was left
    out, and what files, and the splits of all of them, have in common. Held-out prompts that are trained on are told.
    """
    sets = [(one, left) for some in materials for one, left in zip(some.sets, some.left_out, strict=True)]
    files = [_described(one, left) for one, left in sets]
    found = [
        _told(overlap(str(a.path), a.records, str(b.path), b.records), b.lines)
        for i, (a, _) in enumerate(sets)
        for b, _ in sets[i + 1 :]
    ]
    records = [one for some, _ in sets for one in some.records]
    train, test = ([one for one in records if one.split == split] for split in ("train", "test"))
    between = overlap("train", train, "test", test)
    if between.rows:
        places = [(some.path.name, line) for some, _ in sets for line, one in _places(some) if one.split == "test"]
        where = [f"{name}:{line}" for name, line in (places[row] for row in sorted(between.rows))]
        found.append(_told(between) | {"where": where[:LISTED]})
        tell(
            f"WARNING: {len(between.rows)} of {len(test)} held-out prompts are trained on ({len(between.exact)} word "
            f"for word, {len(between.near)} nearly): what is measured on them says less of new ones. They are at "
            f"{', '.join(where[:LISTED])}{' ...' if len(where) > LISTED else ''}; take them out, or give all rows of a "
            "conversation one `split`"
        )
    overlaps = [one for one in found if one["same"] or one["nearly"]]
    (folder / NAME).write_text(json.dumps({"files": files, "overlaps": overlaps}, indent=2, ensure_ascii=False) + "\n")


def _places(some: Dataset[Any]) -> Sequence[tuple[int, Any]]:
    return list(zip(some.lines, some.records, strict=True))


def _described(one: Dataset[Any], left_out: Counter[str]) -> dict[str, Any]:
    splits = Counter(record.split for record in one.records)
    slices = Counter(record.slice or "(none)" for record in one.records)
    return {
        "path": str(one.path),
        "fingerprint": one.fingerprint,
        "rows": dict(splits),
        "slices": dict(slices),
        "left_out": dict(left_out),
        "columns_not_read": list(one.ignored),
    }


def _told(one: Overlap, lines: Sequence[int] = ()) -> dict[str, Any]:
    rows = sorted(one.rows)[:LISTED]
    told = {"first": one.first, "second": one.second, "same": len(one.exact), "nearly": len(one.near)}
    return told | ({"where": [lines[row] for row in rows]} if lines else {})
