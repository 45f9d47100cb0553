"""A run by itself or as one of several processes: `python -m tests.alignment.spread OUT`, or by torchrun.

Writes what a few updates of supervised learning and of PPO came to, for the test that compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from alignment.loop import Adam, Optimiser, Parallel, Part, Run, fit
from alignment.lora import LoraShape
from alignment.ppo import POLICY, Ppo, Settings
from alignment.rollout import Local, Reply
from alignment.tokens import Row, batch
from tests.alignment import tiny

ROWS = [Row(tuple(range(i, i + 4 + i % 3)), (False,) + (True,) * (3 + i % 3)) for i in range(16)]
PROMPTS = [(1, 2, 3), (4, 5, 6, 7, 8, 9), (2, 2), (9, 8, 7, 6)]


def learn(parallel: Parallel, folder: Path) -> list[torch.Tensor]:
    """The weights after four updates of eight rows in parts of two."""
    model = tiny.model(0)
    optimiser = Optimiser(model.adapt("sft", LoraShape(4, 8.0)), Adam(lr=1e-2, warmup=0), 4, parallel)

    def forward(part: list[int]) -> Part:
        some = batch([[ROWS[i]] for i in part])
        told = model.told(some, model.states(some, "sft"))
        return Part(-told.logprobs.sum(), float(some.trained.sum()))

    updates = [[[8 * (k % 2) + 2 * i, 8 * (k % 2) + 2 * i + 1] for i in range(4)] for k in range(4)]
    fit(Run.open(folder, "", 4, parallel, lambda line: None), optimiser, updates, forward)
    return [one.detach() for one in optimiser.parameters]


class Recorded:
    """An engine that says the same whoever asks."""

    def draw(
        self, prompts: list[tuple[int, ...]], samples: int, limit: int, temperature: float, seed: int
    ) -> list[Reply]:
        made = []
        for prompt in prompts:
            for k in range(samples):
                ids = tuple((len(prompt) * 3 + k * j) % 50 for j in range(1, 2 + (len(prompt) + k) % 4))
                made.append(Reply(prompt, ids, (0.0,) * len(ids), "stop" if k else "length"))
        return made


def policy(parallel: Parallel) -> list[torch.Tensor]:
    """The weights of policy and critic after three updates."""
    model = tiny.model(0)
    how = Settings(prompts=4, samples=3, limit=4, stop=None, tokens=10_000, epochs=2)

    def score(replies: list[Reply]) -> torch.Tensor:
        return torch.tensor([float(len(one.ids)) for one in replies])

    made = Ppo(model, how, Local(model, POLICY), score, Adam(lr=1e-2, warmup=0), 3, parallel, LoraShape(4, 8.0))
    made.engine = Recorded()
    for seed in range(3):
        made.update(parallel.share(PROMPTS), seed)
    return [one.detach() for one in (*made.policy.parameters, *made.critic.parameters)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    here = Path(sys.argv[1])
    among = Parallel("cpu")
    found = [*learn(among, here / "run"), *policy(among)]
    torch.save({"size": among.size, "found": found}, here / f"{among.rank}.pt")
    among.wait()
