"""Who speaks as policy, reference and critic: adapters on one base, or models of their own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from alignment.lora import LoraShape
from alignment.model import Model, ModelError
from alignment.reward_model import MANIFEST, RewardModel
from alignment.tokens import Batch

POLICY, CRITIC, VALUE = "policy", "critic", "value"
CriticKind = Literal["adapter", "shared", "model"]
SHAPE = LoraShape()


@dataclass(frozen=True, slots=True)
class Role:
    """A model, with which of its adapters on; None for the model itself."""

    model: Model
    adapter: str | None

    def states(self, batch: Batch) -> Tensor:
        """The last hidden states, [B, T, D]."""
        return self.model.states(batch, self.adapter)


@dataclass(frozen=True, slots=True)
class Apart:
    """Models beside the policy's: a frozen one of the same weights, on which reward models are adapters, and one that
    becomes the critic, all of its weights trained."""

    frozen: Model
    critic: Model | None = None


@dataclass(frozen=True, slots=True)
class Roles:
    """The three, and what of them is trained. shared: the critic reads the policy's own states."""

    policy: Role
    reference: Role
    critic: Role
    shared: bool
    trained: tuple[list[nn.Parameter], list[nn.Parameter]]

    @classmethod
    def of(
        cls, model: Model, shape: LoraShape | None, kind: CriticKind, apart: Apart | None, judge: Path | None
    ) -> Roles:
        """shape: of the adapters, None where all weights of the policy are trained. judge: a reward model of the same
        weights, as whose first member the critic begins; without one it says 0 at first.

        Raises ValueError for a model that would be policy and reference at once.
        """
        frozen = apart.frozen if apart else model
        if shape is None and frozen is model:
            raise ValueError("all weights of the policy are trained, so the reference is a model of its own")
        policy = Role(model, POLICY if shape else None)
        learnt = model.adapt(POLICY, shape) if shape else list(model.base.parameters())
        if kind == "shared":
            critic, weights = policy, list[nn.Parameter]()
        elif kind == "adapter":
            critic, weights = Role(frozen, CRITIC), frozen.adapt(CRITIC, _shape(judge) if judge else shape or SHAPE)
        else:
            critic = Role(_own(apart), None)
            weights = list(critic.model.base.parameters())
        head = critic.model.head(VALUE)
        torch.nn.init.zeros_(critic.model.heads[VALUE].weight)  # type: ignore[arg-type]
        if judge:
            _begin(critic, kind, frozen, judge)
        return cls(policy, Role(frozen, None), critic, kind == "shared", (learnt, [*weights, *head]))


def _shape(judge: Path) -> LoraShape:
    """Of a reward model's adapters, which the critic's takes over."""
    try:
        told = json.loads((judge / MANIFEST).read_text())["shape"]
    except (OSError, ValueError) as error:
        raise ModelError(f"{judge} holds no reward model: {error}") from None
    return LoraShape(told["rank"], told["alpha"], tuple(told["targets"]))


def _own(apart: Apart | None) -> Model:
    if apart is None or apart.critic is None:
        raise ValueError('a critic of the kind "model" needs a model of its own')
    return apart.critic


def _begin(critic: Role, kind: CriticKind, frozen: Model, folder: Path) -> None:
    """Gives the critic what a reward model knows: of a whole reply it says then what the reward will be."""
    where = critic.model if kind == "model" else frozen
    judge = RewardModel.load(where, folder, "critic-from")
    first = judge.members[0]
    if kind == "adapter":
        judge.adapters.copy(first, CRITIC)
    elif kind == "model":
        where.absorb(first)
    with torch.no_grad():
        value, theirs = (cast(nn.Linear, one) for one in (critic.model.heads[VALUE], where.heads[first]))
        value.weight.copy_(theirs.weight[:1].view(1, -1, value.in_features).sum(1))  # of each state that it reads
        value.bias.copy_(theirs.bias[:1])
