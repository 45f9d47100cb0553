"""One text in pieces, in all the ways that models, tokenizers and networks cut it."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

SEEDS = 6


def every(text: str, size: int) -> list[str]:
    """Pieces of `size` characters."""
    return [text[i : i + size] for i in range(0, len(text), size)]


def at(text: str, places: Sequence[int]) -> list[str]:
    """The pieces between these places."""
    ends = sorted({0, len(text), *(place for place in places if 0 < place < len(text))})
    return [text[start:end] for start, end in pairwise(ends)]


def seeded(text: str, seed: int) -> list[str]:
    """Pieces of random sizes, some of them empty; the same for the same seed."""
    dice = random.Random(seed)
    places = [place for place in range(1, len(text)) if dice.random() < 0.3]
    return [piece for part in at(text, places) for piece in ([part, ""] if dice.random() < 0.2 else [part])]


def halves(text: str) -> list[str]:
    """One UTF-16 unit a piece: a character beyond the first plane comes as two halves that are no character alone."""
    units = text.encode("utf-16-le", "surrogatepass")
    return [units[i : i + 2].decode("utf-16-le", "surrogatepass") for i in range(0, len(units), 2)]


def joined(pieces: Sequence[str]) -> str:
    """The text of these pieces; halves that came apart are one character again."""
    return "".join(pieces).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def chunkings(text: str, spans: Sequence[tuple[int, int]], thorough: bool = True) -> Iterator[tuple[str, list[str]]]:
    """(name, pieces), each way once. Not `thorough` leaves out most: a tenth of the time, for slow targets."""
    yield "whole", [text]
    yield "1 character", every(text, 1)
    yield "words", re.findall(r"\s*\S+|\s+$", text)
    yield "3 characters", every(text, 3)
    for seed in range(SEEDS if thorough else 1):
        yield f"random, seed {seed}", seeded(text, seed)
    for start, end in spans:
        places = range(start - 1, end + 2) if thorough else (start + 1, (start + end) // 2, end - 1, end)
        for place in places:
            yield f"cut at {place}", at(text, [place])
    if not thorough:
        return
    yield "2 characters", every(text, 2)
    yield "7 characters", every(text, 7)
    yield "empty pieces between", [piece for letter in text for piece in ("", letter, "")]
    for start, end in spans:
        yield f"one piece around {start}", at(text, [start, end])
        yield f"characters around {start}", at(text, range(start - 2, end + 3))
