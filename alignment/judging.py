"""What the replies of a PPO run are worth, and whether they are still what anybody wants."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignment.loop import Parallel
from alignment.model import Model
from alignment.monitor import Bounds, Monitor, signs_of
from alignment.reward_model import RewardModel
from alignment.rewards import Lagrange, Mixed, Reward, Said, Source, built
from alignment.rollout import Engine, Reply
from guardrails.types import Message

Ids = tuple[int, ...]
SEED = 0
"""Of the draws that are measured: before and after a run the same."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """The mean of some values, with 1.96 standard errors to both sides."""
        mean = statistics.fmean(values)
        error = 1.96 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        return cls(mean, mean - error, mean + error, len(values))

    @property
    def told(self) -> dict[str, float]:
        """As reports and model cards take it."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


class Judge:
    """Scores replies by a run's rewards, finds the weights of its constraints, watches for reward hacking.

    prompts: what stands behind the tokens of each prompt.
    """

    def __init__(
        self,
        model: Model,
        sources: Sequence[Source],
        prompts: Mapping[Ids, tuple[Message, ...]],
        lagrange: Lagrange,
        bounds: Bounds,
        held_out: Path | None = None,
    ):
        """Raises RewardError for a reward that cannot be had, ModelError for a reward model of another base."""
        self._model, self._prompts = model, prompts
        rewards = {
            one.name: self._by_model(one, f"reward-{one.name}") if one.kind == "model" else built(one)
            for one in sources
        }
        self.mixed = Mixed(sources, rewards, lagrange)
        self.monitor = Monitor(bounds)
        self._held_out = self._held(held_out) if held_out else None
        self._seen: list[tuple[list[Said], dict[str, list[float]]]] = []

    def _by_model(self, source: Source, name: str) -> Reward:
        judge = RewardModel.load(self._model, _there(source.path), name)

        def scores(said: Sequence[Said]) -> list[float]:
            mean, spread = judge.scores([one.reply.row for one in said], source.objective)
            values: list[float] = (mean - source.spread * spread).tolist()
            return values

        return scores

    def _held(self, folder: Path) -> Reward:
        return self._by_model(Source(name="held-out", kind="model", path=folder), "held-out")

    def said(self, replies: Sequence[Reply]) -> list[Said]:
        """The replies as texts, behind what they answer."""
        decode = self._model.tokenizer.decode
        texts = [str(decode(one.ids, skip_special_tokens=True)) for one in replies]
        return [Said(self._prompts[one.prompt], text, one) for one, text in zip(replies, texts, strict=True)]

    def score(self, replies: Sequence[Reply]) -> Tensor:
        """The scores of an update's replies, [N]; what they were is kept for `settled`."""
        said = self.said(replies)
        scores, found = self.mixed(said)
        self._seen.append((said, found))
        return torch.tensor(scores)

    def settled(self, metrics: Mapping[str, float], parallel: Parallel) -> dict[str, float]:
        """Ends an update: its rewards by name, the constraints' weights, and the signs, which the monitor has seen.

        Raises Hacked.
        """
        said = [one for some, _ in self._seen for one in some]
        mine = {name: [x for _, found in self._seen for x in found[name]] for name in self.mixed.rewards}
        self._seen = []
        means = {name: statistics.fmean(parallel.gathered(values)) for name, values in mine.items()}
        told = {f"rewards/{name}": mean for name, mean in means.items()}
        told |= self.mixed.settle(means, int(metrics["replies"]))
        signs = signs_of(parallel.gathered([one.text for one in said])) | {"kl": metrics["kl/reply"]}
        if self._held_out:
            values = parallel.gathered([float(x) for x in self._held_out(said)])
            signs |= {"held_out": statistics.fmean(values), "spread": statistics.pstdev(values)}
        self.monitor.look(signs)
        return told | {f"signs/{name}": value for name, value in signs.items() if name not in ("kl", "spread")}

    def replied(
        self, engine: Engine, prompts: Sequence[Ids], limit: int, temperature: float
    ) -> list[tuple[Said, float]]:
        """A reply to each prompt, drawn as in training, and its score."""
        said = self.said(engine.draw(prompts, 1, limit, temperature, SEED))
        return list(zip(said, self.mixed(said)[0], strict=True))

    def compared(
        self, after: Engine, before: Engine, prompts: Sequence[Ids], limit: int, temperature: float
    ) -> dict[str, Any]:
        """Measures on held-out prompts, with intervals: the score before and after, how often the new reply is better
        by each reward, by the held-out one too, and the rewards' means."""
        if not prompts:
            return {}
        old, new = ([one for one, _ in self.replied(engine, prompts, limit, temperature)] for engine in (before, after))
        (old_scores, old_found), (new_scores, new_found) = self.mixed(old), self.mixed(new)
        judges = {name: (old_found[name], new_found[name]) for name in new_found} | {"score": (old_scores, new_scores)}
        if self._held_out:
            judges["held-out"] = list(self._held_out(old)), list(self._held_out(new))
        told: dict[str, Any] = {}
        for name, (a, b) in judges.items():
            told[f"{name}/before"], told[f"{name}/after"] = Interval.of(a).told, Interval.of(b).told
            wins = [0.5 if x == y else float(y > x) for x, y in zip(a, b, strict=True)]
            told[f"{name}/wins"] = Interval.of(wins).told
        return told

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        return {"mixed": self.mixed.state(), "monitor": self.monitor.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes weights of constraints and what the monitor saw back."""
        self.mixed.restore(state["mixed"])
        self.monitor.restore(state["monitor"])


def _there(path: Path | None) -> Path:
    if path is None:
        raise ValueError("a reward of kind model has a path")  # Source has checked it
    return path


def samples(before: Sequence[tuple[Said, float]], after: Sequence[tuple[Said, float]]) -> list[dict[str, Any]]:
    """Rows for a report's table: what was said to a prompt before and after, and its scores."""
    return [
        {
            "prompt": old.prompt[-1].content,
            "before": old.text,
            "after": new.text,
            "reward_before": old_score,
            "reward_after": new_score,
        }
        for (old, old_score), (new, new_score) in zip(before, after, strict=True)
    ]
