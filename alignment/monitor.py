"""Signs that a policy has found a way to be rewarded for something that nobody wants (reward hacking).

The reward that is trained on keeps rising then, so it tells nothing; these do. Each has a bound, and a run that
passes one for several updates ends with the reason, its last good checkpoint kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


class Hacked(RuntimeError):
    """The policy is rewarded for the wrong thing; the message says by which sign, since when, and what to do."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a healthy run keeps to; None for no bound. patience: updates in a row beyond one that end the run.

    kl: nats a reply. longer: mean length, times that of the first updates. repeated: the share of four-word sequences
    that a reply has said before. distinct: the share of two-word sequences of an update that are its only ones, times
    that of the first updates. refused: the share of replies that a pattern or head tells as refusals. held_out: how
    far the held-out reward may fall below its best, in its own standard deviations at the first update.
    """

    kl: float | None = 50.0
    longer: float | None = 3.0
    repeated: float | None = 0.3
    distinct: float | None = 0.3
    refused: float | None = None
    held_out: float | None = 0.5
    patience: int = 5


FIRST = 3
"""Updates whose means are what later ones are compared with."""
ADVICE = "look at samples.jsonl, raise kl.coefficient or add a reward against it, and go on from the last checkpoint"


@dataclass(slots=True)
class Monitor:
    """Watches a run; `look` is called once an update."""

    bounds: Bounds
    seen: list[dict[str, float]] = field(default_factory=list)
    beyond: dict[str, int] = field(default_factory=dict)
    best: float = float("-inf")

    def look(self, signs: Mapping[str, float]) -> None:
        """Takes an update's signs (`signs_of`, and `kl`, `refused`, `held_out`, `spread`); raises Hacked."""
        if len(self.seen) < FIRST:
            self.seen.append(dict(signs))
        self.best = max(self.best, signs.get("held_out", self.best))
        for name, (value, bound, high) in self._bounded(signs).items():
            passed = value > bound if high else value < bound
            self.beyond[name] = self.beyond.get(name, 0) + 1 if passed else 0
            if self.beyond[name] >= self.bounds.patience:
                raise Hacked(
                    f"{name} is {value:.3g}, {'over' if high else 'under'} its bound of {bound:.3g} for "
                    f"{self.bounds.patience} updates: the policy may be rewarded for the wrong thing; {ADVICE}"
                )

    def _bounded(self, signs: Mapping[str, float]) -> dict[str, tuple[float, float, bool]]:
        """(value, bound, whether the bound is an upper one) of every sign that has one."""
        b, found = self.bounds, dict[str, tuple[float, float, bool]]()
        for name, bound in (("kl", b.kl), ("repeated", b.repeated), ("refused", b.refused)):
            if bound is not None and name in signs:
                found[name] = signs[name], bound, True
        if b.longer is not None:
            found["words"] = signs["words"], b.longer * max(self._first("words"), 1), True
        if b.distinct is not None:
            found["distinct"] = signs["distinct"], b.distinct * self._first("distinct"), False
        if b.held_out is not None and "held_out" in signs:
            spread = self.seen[0].get("spread", 1.0)
            found["held_out"] = signs["held_out"], self.best - b.held_out * spread, False
        return found

    def _first(self, name: str) -> float:
        return sum(one[name] for one in self.seen) / len(self.seen)

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        return {"seen": [dict(one) for one in self.seen], "beyond": dict(self.beyond), "best": self.best}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes back what was seen."""
        self.seen, self.beyond, self.best = list(state["seen"]), dict(state["beyond"]), state["best"]


def signs_of(texts: Sequence[str]) -> dict[str, float]:
    """words: mean number of a reply. repeated: mean share of four-word sequences said before in the same reply.
    distinct: distinct two-word sequences of all replies as a share of all."""
    words = [text.lower().split() for text in texts]
    pairs = Counter(pair for one in words for pair in pairwise(one))
    return {
        "words": sum(map(len, words)) / max(len(words), 1),
        "repeated": sum(map(_repeated, words)) / max(len(words), 1),
        "distinct": len(pairs) / max(sum(pairs.values()), 1),
    }


def _repeated(words: Sequence[str]) -> float:
    runs = Counter(zip(*(words[i:] for i in range(4)), strict=False))
    total = sum(runs.values())
    return (total - len(runs)) / total if total else 0.0
