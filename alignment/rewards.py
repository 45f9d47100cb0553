"""What replies are worth: rewards by name and weight, and constraints that hold on average.

A constraint's weight is found while training, as a Lagrange multiplier that rises while the constraint is broken and
falls while it is kept (Dai et al. 2023, "Safe RLHF", arXiv:2310.12773).
"""

from __future__ import annotations

import asyncio
import importlib
import json
import math
import re
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from alignment.rollout import Reply
from guardrails import policy as policies
from guardrails.engine import judge
from guardrails.types import Action, Context, Message

Kind = Literal["model", "guard", "pattern", "length", "http", "python"]
SECONDS = 60.0
"""Seconds that a reward server may take."""


class RewardError(ValueError):
    """A reward that cannot be had; the message says which, why, and what to do."""


@dataclass(frozen=True, slots=True)
class Said:
    """A reply and what it answers."""

    prompt: tuple[Message, ...]
    text: str
    reply: Reply


Reward = Callable[[Sequence[Said]], Sequence[float]]
"""A number for each reply."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A reward in a recipe. kind says which of the others are read:

    model: a reward model's folder `path`, its `objective`, less `spread` times what its members differ by. guard: 1
    where the output rules of `policy` let the reply pass as it is, else 0. pattern: 1 where it is found in the reply.
    length: characters beyond `most`, in thousands, negative. http: what the server at `url` answers to
    {"replies": [{"prompt", "text"}]}, {"rewards": [...]}. python: `function`, as `package.module:name`, a Reward.

    weight: of the reward. limit: makes it a constraint: on average at most (for the guard: at least) this much.
    """

    name: str
    kind: Kind
    weight: float = 1.0
    limit: float | None = None
    path: Path | None = None
    objective: str | None = None
    spread: float = 0.0
    policy: str = ""
    pattern: str = ""
    most: int = 1000
    url: str = ""
    function: str = ""

    def __post_init__(self) -> None:
        needed = {"model": "path", "guard": "policy", "pattern": "pattern", "http": "url", "python": "function"}
        name = needed.get(self.kind)
        if name and not getattr(self, name):
            raise ValueError(f"the reward '{self.name}' is of kind {self.kind} and needs `{name}`")


def built(source: Source) -> Reward:
    """The reward that a source of any kind but `model` names; raises RewardError."""
    match source.kind:
        case "guard":
            return guard(source.policy)
        case "pattern":
            found = re.compile(source.pattern, re.IGNORECASE)
            return lambda said: [float(bool(found.search(one.text))) for one in said]
        case "length":
            return lambda said: [-max(0, len(one.text) - source.most) / 1000 for one in said]
        case "http":
            return lambda said: asked(source, said)
        case "python":
            return _named(source)
    raise RewardError(f"the reward '{source.name}' is a model, which is loaded with the policy")


def guard(name: str) -> Reward:
    """1 for a reply that a policy's output rules let pass as it is, 0 for one that they change or stop."""
    try:
        policy = policies.load(name)
    except (policies.PolicyError, OSError) as error:
        raise RewardError(f"the policy '{name}' of a reward cannot be loaded: {error}") from None

    async def all_of(said: Sequence[Said]) -> list[float]:
        verdicts = [await judge(policy.output, one.text, Context(one.prompt)) for one in said]
        return [float(verdict.action < Action.REDACT) for verdict in verdicts]

    return lambda said: asyncio.run(all_of(said))


def asked(source: Source, said: Sequence[Said]) -> list[float]:
    """What a reward server answers; raises RewardError when it does not, or not in the form it should."""
    told = [{"prompt": [{"role": m.role, "content": m.content} for m in one.prompt], "text": one.text} for one in said]
    body = json.dumps({"replies": told}).encode()
    request = urllib.request.Request(source.url, body, {"content-type": "application/json"})  # noqa: S310 - operator's
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:  # noqa: S310
            rewards = [float(one) for one in json.load(answer)["rewards"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RewardError(f"the reward '{source.name}' at {source.url}: {type(error).__name__}: {error}") from None
    if len(rewards) != len(said) or not all(map(math.isfinite, rewards)):
        raise RewardError(
            f"the reward '{source.name}' at {source.url} answered no number for each of {len(said)} replies"
        )
    return rewards


def _named(source: Source) -> Reward:
    module, _, name = source.function.partition(":")
    try:
        found: Reward = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RewardError(f"the reward '{source.name}': there is no {source.function} ({error})") from None
    return found


@dataclass(frozen=True, slots=True)
class Lagrange:
    """How the weights of constraints are found: log weight += rate * (mean cost of the last `window` replies - limit).

    first, most: the weight at first, and at most. delay: updates before it changes.
    """

    first: float = 1.0
    most: float = 20.0
    rate: float = 0.1
    window: int = 128
    delay: int = 0


@dataclass(slots=True)
class Mixed:
    """All rewards and constraints of a run as one score: (sum of w r - sum of lambda c) / (1 + sum of lambda).

    A constraint's cost c is its reward, or minus that for the guard, whose limit is a lower one.
    """

    sources: Sequence[Source]
    rewards: Mapping[str, Reward]
    lagrange: Lagrange = field(default_factory=Lagrange)
    weights: dict[str, float] = field(default_factory=dict)
    updates: int = 0
    _costs: dict[str, deque[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for one in self.constraints:
            self.weights.setdefault(one.name, self.lagrange.first)
            self._costs.setdefault(one.name, deque(maxlen=self.lagrange.window))

    @property
    def constraints(self) -> list[Source]:
        """The sources with a limit."""
        return [one for one in self.sources if one.limit is not None]

    def __call__(self, said: Sequence[Said]) -> tuple[list[float], dict[str, list[float]]]:
        """(scores, rewards by name) of the replies; raises RewardError for a reward that is not a number for each."""
        found = {one.name: [float(x) for x in self.rewards[one.name](said)] for one in self.sources}
        for name, rewards in found.items():
            if len(rewards) != len(said):
                raise RewardError(f"the reward '{name}' gave {len(rewards)} numbers for {len(said)} replies")
        total = 1 + sum(self.weights.values())
        scores = [0.0] * len(said)
        for one in self.sources:
            weight = one.weight if one.limit is None else -self.weights[one.name] * _sign(one)
            scores = [score + weight * x / total for score, x in zip(scores, found[one.name], strict=True)]
        return scores, found

    def settle(self, means: Mapping[str, float], replies: int) -> dict[str, float]:
        """Changes the constraints' weights by what an update's replies cost on average; returns the weights."""
        self.updates += 1
        for one in self.constraints:
            costs = self._costs[one.name]
            costs.extend([_sign(one) * means[one.name]] * min(replies, self.lagrange.window))
            if self.updates > self.lagrange.delay:
                over = sum(costs) / len(costs) - _sign(one) * (one.limit or 0.0)
                weight = self.weights[one.name] * math.exp(self.lagrange.rate * over)
                self.weights[one.name] = min(max(weight, 1e-6), self.lagrange.most)
        return {f"constraint/{name}": weight for name, weight in self.weights.items()}

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        return {
            "weights": dict(self.weights),
            "updates": self.updates,
            "costs": {k: list(v) for k, v in self._costs.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes weights and costs back."""
        self.weights, self.updates = dict(state["weights"]), state["updates"]
        self._costs = {name: deque(costs, maxlen=self.lagrange.window) for name, costs in state["costs"].items()}


def _sign(source: Source) -> int:
    return -1 if source.kind == "guard" else 1
