"""Small classifiers on the encoder's windows: plain arrays, no pickles, numpy alone.

A head reads a window twice: its vector and its characters' n-grams (hashed) each give a number. The two are added, made
a probability, and mapped to a score by the head's own thresholds: 0.5 where 2 to 5 % of harmless texts
begin to be hit ("worth a second look"), 0.9 where about 0.2 % are ("sure").
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from guardrails.encoder import SIZE, Windows

SHIPPED = Path(__file__).with_name("models")
SUFFIX = ".npz"
ESCALATE, BLOCK = 0.5, 0.9
"""The scores of a head's two thresholds."""

Numbers = NDArray[np.float64]
Buckets = NDArray[np.uint32]

_PRIME, _MIX = np.uint32(16777619), np.uint32(2654435761)
ORDERS = (3, 4, 5)
"""Lengths of the character n-grams."""


class HeadError(ValueError):
    """A head that cannot be read; the message says which file, why, and what to do."""


def grams(text: str, bits: int) -> Buckets:
    """The distinct buckets, of 2**bits, of the n-grams of a text: any case, any white space as one space."""
    plain = f" {' '.join(text.casefold().split())} ".encode("utf-32-le", "surrogatepass")
    codes = np.frombuffer(plain, np.uint32)
    shift = np.uint32(32 - bits)
    found = []
    with np.errstate(over="ignore"):
        for order in ORDERS:
            if len(codes) >= order:
                hashes = np.full(len(codes) - order + 1, order, np.uint32)
                for i in range(order):
                    hashes = (hashes ^ codes[i : len(codes) - order + 1 + i]) * _PRIME
                found.append((hashes * _MIX) >> shift)
    return np.unique(np.concatenate(found)) if found else np.zeros(0, np.uint32)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a head thinks of one window."""

    start: int
    end: int
    score: float
    label: str


@dataclass(frozen=True, slots=True)
class Head:
    """The arrays of a head and what is known of them.

    A window's logit is vector @ weights, plus scale times the sum of its n-grams' weights (int8) over the root of
    their number, plus bias. escalate, block: probabilities of the two thresholds. labels: what may be found; with more
    than one, vector @ sorts + sorts_bias chooses. about: what it was made of and how it did, as JSON.
    """

    name: str
    labels: tuple[str, ...]
    weights: Numbers
    bias: float
    grams: NDArray[np.int8]
    scale: float
    escalate: float
    block: float
    sorts: Numbers
    sorts_bias: Numbers
    about: Mapping[str, Any]

    @property
    def bits(self) -> int:
        """The n-grams go into 2**bits buckets."""
        return len(self.grams).bit_length() - 1

    def letters(self, text: str) -> float:
        """The n-grams' part of the logit of a window's text."""
        buckets = grams(text, self.bits)
        return int(self.grams[buckets].sum(dtype=np.int64)) * self.scale / float(max(1, len(buckets)) ** 0.5)

    def logits(self, text: str, windows: Windows) -> Numbers:
        """The logit of each window."""
        letters = np.array([self.letters(text[start:end]) for start, end in windows.spans])
        return np.asarray(windows.vectors @ self.weights + letters + self.bias)

    def probability(self, text: str, windows: Windows) -> float:
        """The calibrated probability of the whole text: that of its worst window; 0 for a text without words."""
        return float(sigmoid(self.logits(text, windows)).max()) if windows.spans else 0.0

    def score(self, text: str, windows: Windows) -> float:
        """The score of the whole text: 0.5 at the threshold to escalate, 0.9 at that to block."""
        return float(self.scores(self.probability(text, windows)))

    def scores(self, probability: Numbers | float) -> Numbers:
        """Probabilities as scores: straight lines through (0, 0), (escalate, 0.5), (block, 0.9), (1, 1)."""
        knots = (0.0, self.escalate, self.block, 1.0)
        return np.asarray(np.interp(probability, knots, (0.0, ESCALATE, BLOCK, 1.0)))

    def read(self, text: str, windows: Windows) -> list[Seen]:
        """What is seen in each window, in their order."""
        if not windows.spans:
            return []
        scores = self.scores(sigmoid(self.logits(text, windows)))
        sorts = np.argmax(windows.vectors @ self.sorts + self.sorts_bias, axis=1)
        return [
            Seen(start, end, float(score), self.labels[sort])
            for (start, end), score, sort in zip(windows.spans, scores, sorts, strict=True)
        ]


def sigmoid(x: Numbers) -> Numbers:
    """1 / (1 + exp(-x)), without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))


def folder(named: str = "") -> Path:
    """Where heads are looked for first: `named`, or NEWEL_HEADS, or the ones that ship with newel."""
    return Path(named or os.environ.get("NEWEL_HEADS", "") or SHIPPED).expanduser()


def find(name: str, named: str = "") -> Path:
    """The file of a head: `named` if that is a file, else NAME.npz in `folder(named)`, else the one that ships.

    Raises HeadError where a place that was named has no such head.
    """
    place = folder(named)
    path = place if place.suffix == SUFFIX else place / f"{name}{SUFFIX}"
    if path.is_file():
        return path
    shipped = SHIPPED / f"{name}{SUFFIX}"
    if not named and shipped.is_file():  # NEWEL_HEADS may hold only some of them
        return shipped
    raise HeadError(f"there is no head {path}: train it (newel guard train {name}) or name another file")


def load(name: str, named: str = "") -> Head:
    """The head of this name, read once for each file and time of change; raises HeadError."""
    path = find(name, named)
    return _load(path, path.stat().st_mtime_ns)


@cache
def _load(path: Path, changed: int) -> Head:
    return read(path)


def read(path: Path) -> Head:
    """The head in a file; raises HeadError for one that is damaged or not a head."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            said = json.loads(file["head"].tobytes())
            head = Head(
                name=said["name"],
                labels=tuple(said["labels"]),
                weights=file["weights"].astype(np.float64),
                bias=said["bias"],
                grams=file["grams"],
                scale=said["scale"],
                escalate=said["escalate"],
                block=said["block"],
                sorts=file["sorts"].astype(np.float64),
                sorts_bias=file["sorts_bias"].astype(np.float64),
                about=said["about"],
            )
        _check(head)
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise HeadError(f"{path} is not a head that can be read ({error}); train it again or restore it") from error
    return head


def _check(head: Head) -> None:
    """Raises ValueError where the shapes or the thresholds do not fit together."""
    many = len(head.labels)
    fits = head.weights.shape == (SIZE,) and head.sorts.shape == (SIZE, many) and head.sorts_bias.shape == (many,)
    if not fits or not many or head.grams.dtype != np.int8 or head.grams.shape != (1 << head.bits,):
        raise ValueError("its arrays do not fit together")
    if not 0 < head.escalate < head.block < 1:
        raise ValueError("its thresholds are not in order")
    if not all(np.isfinite(part).all() for part in (head.weights, head.bias, head.scale, head.sorts, head.sorts_bias)):
        raise ValueError("it has numbers that are not finite")


def write(head: Head, path: Path, more: Mapping[str, NDArray[Any]] | None = None) -> None:
    """Writes a head, whole or not at all; `more` are arrays that only training reads again."""
    said = {name: getattr(head, name) for name in ("name", "labels", "bias", "scale", "escalate", "block", "about")}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        np.savez_compressed(
            file,
            head=np.frombuffer(json.dumps(said).encode(), np.uint8),
            weights=head.weights.astype(np.float32),
            grams=head.grams,
            sorts=head.sorts.astype(np.float16),
            sorts_bias=head.sorts_bias.astype(np.float32),
            **(more or {}),  # type: ignore[arg-type]
        )
    part.replace(path)
