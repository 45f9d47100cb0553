"""newel: PPO, supervised fine-tuning and reward models, from the parts that `newel train` puts together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measured import Json, answer, asked, measured, rows
from torch import Tensor

from alignment import dataset, reward, sft
from alignment.loop import Adam, Optimiser, Parallel, Run, fit
from alignment.lora import LoraShape
from alignment.losses import preference_loss
from alignment.model import Model
from alignment.ppo import Kl, Ppo, Settings
from alignment.records import Demonstration, PreferencePair
from alignment.reward_model import RewardModel, paired
from alignment.roles import POLICY, Apart
from alignment.rollout import Local, Reply
from alignment.tokens import schedule

SHAPE = LoraShape(16, 32.0)


@dataclass(slots=True)
class Unsaved(Run):
    """A run without checkpoints, which the peer does not write either."""

    def save(self, kept: Any) -> None:
        pass


def told(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def opened(how: Json, updates: int) -> Unsaved:
    return Unsaved.open(Path(how["folder"]), "", updates, Parallel("cpu"), told)  # type: ignore[return-value]


# --- PPO


def policy(how: Json) -> Json:
    """Measures PPO; `rewards` and `kls` (nats a reply): of each update's replies."""
    model, frozen, critic = loaded(how)
    model.template.end = frozenset()  # every reply has as many tokens as the peer's, which go on after the end
    settings = Settings(
        prompts=how["batch"], limit=how["limit"], temperature=0.7, epochs=how["epochs"], stop=how["stop"],
        kl=Kl(0.05), missing_end=0.0, critic=how["critic"],
    )  # fmt: skip
    made = Ppo(
        model, settings, Local(model, POLICY if how["lora"] else None), score(how, frozen),
        Adam(how["lr"], eps=1e-8, warmup=0.0), how["updates"], Parallel("cpu"), SHAPE if how["lora"] else None,
        apart=None if how["lora"] else Apart(frozen, critic),
    )  # fmt: skip
    prompts = [tuple(row["ids"]) for row in rows(how["prompts"])]
    logs = []
    with measured() as found:
        for step in range(how["updates"]):
            at = step * how["batch"] % len(prompts)
            logs.append(made.update(prompts[at : at + how["batch"]], how["seed"] * 1_000_003 + step))
            told(f"update {step + 1}: {logs[-1]}")
    return found | {"rewards": [one["reward/mean"] for one in logs], "kls": [one["kl/reply"] for one in logs]}


def loaded(how: Json) -> tuple[Model, Model, Model | None]:
    """The policy's model, the one that stays as it is, and that of a critic of its own."""

    def model(frozen: bool) -> Model:
        return Model.load(how["model"], "cpu", how["precision"], frozen)

    first = model(how["lora"])
    still = first if how["lora"] else model(True)
    return first, still, model(False) if how["critic"] == "model" else None


def score(how: Json, model: Model) -> Any:
    """A rule where tokens are wanted, else a reward model, which has learnt nothing: it takes as long as any other."""
    worth = torch.zeros(model.base.config.vocab_size)
    worth[how["wanted"]] = how["scale"]
    judge = None if how["wanted"] else RewardModel.new(model, 1, ["reward"], SHAPE, how["seed"])

    def found(replies: Sequence[Reply]) -> Tensor:
        if judge:
            return judge.scores([one.row for one in replies])[0]
        return torch.stack([worth[list(one.ids)].sum() for one in replies])

    return found


# --- fine-tuning


def tuned(how: Json) -> Json:
    """Measures fine-tuning; `loss`: of a held-out token, in nats."""
    model = Model.load(how["model"], "cpu", how["precision"], frozen=how["lora"])
    train, test = (
        [
            model.template.conversation(one.messages, one.turns)
            for one in dataset.read(Path(how[split]), Demonstration, told).records
        ]
        for split in ("train", "test")
    )
    updates = schedule([len(row) for row in train], how["batch"], 4096, how["epochs"], how["seed"], True)
    adapter = sft.ADAPTER if how["lora"] else None
    parameters = model.adapt(sft.ADAPTER, SHAPE) if how["lora"] else list(model.base.parameters())
    optimiser = Optimiser(parameters, Adam(how["lr"], warmup=0.0), len(updates), Parallel("cpu"))
    run = opened(how, len(updates))
    with measured() as found:
        fit(run, optimiser, updates, lambda some: sft.loss(model, adapter, [[train[i] for i in one] for one in some]))
    return found | {"loss": sft.evaluate(model, adapter, test, 2048)["test/loss"]}


# --- reward models


def judging(how: Json) -> Json:
    """Measures a reward model on pairs; `loss` and `accuracy` of held-out ones."""
    model = Model.load(how["model"], "cpu", how["precision"])
    recipe = reward.Recipe(
        model=Path(how["model"]), data=(), output=Path(how["folder"]), members=1, epochs=how["epochs"],
        rows=how["batch"], centring=0.0, seed=how["seed"],
    )  # fmt: skip
    train, test = (
        [paired(model, one, recipe.objectives) for one in dataset.read(Path(how[split]), PreferencePair, told).records]
        for split in ("train", "test")
    )
    made = RewardModel.new(model, 1, recipe.objectives, SHAPE, how["seed"], tokens=recipe.tokens)
    updates = reward.scheduled(train, recipe)
    parameters = made.parameters(made.members[0])
    optimiser = Optimiser(parameters, Adam(how["lr"], warmup=0.0), len(updates), Parallel("cpu"))
    run = opened(how, len(updates))

    def forward(item: reward.Item) -> Any:
        return reward.loss(made, item, [[train[i] for i in line] for line in item.lines], recipe)

    with measured() as found:
        fit(run, optimiser, updates, forward)
    leads = reward.leads(made, test)[0]
    loss = preference_loss(leads, torch.zeros_like(leads)).mean()
    return found | {"loss": float(loss), "accuracy": float((leads > 0).float().mean())}


def main() -> None:
    how = asked()
    torch.manual_seed(how["seed"])
    answer({"ppo": policy, "sft": tuned, "reward": judging}[how["task"]](how))


if __name__ == "__main__":
    main()
