"""Learning from thumbs: replies that were found good or bad, each by itself (Ethayarajh et al. 2024, arXiv:2402.01306).

What a reply gains over the reference is compared with what replies to other prompts gain: the KL of the policy, for
which each reply of a part is read behind the prompt of another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from alignment import dataset, losses, release, report
from alignment import recipe as recipes
from alignment.loop import Adam, Optimiser, Parallel, Part, Run, Tell, fit
from alignment.lora import LoraShape
from alignment.model import Model
from alignment.records import Rating
from alignment.tokens import Row, batch, schedule

ADAPTER = "kto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a policy learns from ratings; what is not said here is as in `sft.Recipe`.

    beta: how dear it is to leave the reference. up, down: weights of good and of bad replies; None: so that both kinds
    weigh the same however many there are. tokens: of a forward pass; it has at least two replies.
    """

    model: Path
    data: tuple[Path, ...]
    output: Path
    beta: float = 0.1
    up: float | None = None
    down: float | None = None
    epochs: int = 1
    rows: int = 16
    tokens: int = 4096
    max_length: int = 1024
    lora: LoraShape = field(default_factory=LoraShape)
    optimiser: Adam = field(default_factory=lambda: Adam(lr=5e-5))
    seed: int = 0
    device: str = ""
    often: int = 50
    checkpoint: int = 50


@dataclass(frozen=True, slots=True)
class Rated:
    """A reply to its prompt, whether it is good, and the reply behind the prompt of another."""

    row: Row
    good: bool
    other: Row


def train(how: Recipe, tell: Tell = print) -> Path:
    """The release that the recipe makes; its run's folder has metrics, checkpoints and a report."""
    parallel = Parallel(how.device)
    torch.manual_seed(how.seed)
    model = Model.load(how.model, str(parallel.device))
    sets = [dataset.read(path, Rating) for path in how.data]
    rows, held_out = (_rated(model, sets, split, how, tell) for split in ("train", "test"))
    updates = schedule([len(one.row) for one in rows], how.rows, how.tokens, how.epochs, how.seed)
    run = Run.open(how.output, recipes.dump(how), len(updates), parallel, tell, how.checkpoint)
    optimiser = Optimiser(model.adapt(ADAPTER, how.lora), how.optimiser, len(updates), parallel)
    weights = _weights(rows, how)

    def forward(lines: Sequence[Sequence[int]]) -> Part:
        return loss(model, [rows[i] for line in lines for i in line], how.beta, weights)

    def measure() -> Mapping[str, float]:
        return evaluate(model, held_out, how.beta, weights) if held_out else {}

    fit(run, optimiser, updates, forward, measure, how.often)
    if parallel.leads:
        data = {str(one.path): one.fingerprint for one in sets}
        release.write(
            model, ADAPTER, how.output / "release",
            release.Provenance("kto", str(how.model), recipes.dump(how), data, measure()),
        )  # fmt: skip
        report.write(how.output, "Learning from ratings")
    parallel.wait()
    return how.output / "release"


def _rated(model: Model, sets: Sequence[dataset.Dataset[Rating]], split: str, how: Recipe, tell: Tell) -> list[Rated]:
    ratings = [one for some in sets for one in some.records if one.split == split]
    rows = [model.template.reply(one.prompt, one.completion) for one in ratings]
    others = [_behind(rows[i - 1], row) for i, row in enumerate(rows)]
    rated = [Rated(row, one.label, other) for row, one, other in zip(rows, ratings, others, strict=True)]
    kept = [one for one in rated if max(len(one.row), len(one.other)) <= how.max_length]
    if len(kept) < len(rated):
        tell(f"{len(rated) - len(kept)} of {len(rated)} replies are longer than {how.max_length} tokens and left out")
    return kept


def _behind(other: Row, row: Row) -> Row:
    """The reply of a row behind the prompt of another."""
    prompt, said = other.prompt, row.ids[len(row.prompt) :]
    return Row(prompt + said, (False,) * len(prompt) + (True,) * len(said))


def _weights(rows: Sequence[Rated], how: Recipe) -> tuple[float, float]:
    """The weights of good and of bad replies: where none is given, those that make both kinds weigh the same."""
    good = sum(one.good for one in rows)
    bad = len(rows) - good
    even = (len(rows) / (2 * good), len(rows) / (2 * bad)) if good and bad else (1.0, 1.0)
    return how.up if how.up is not None else even[0], how.down if how.down is not None else even[1]


def gains(model: Model, rows: Sequence[Row]) -> Tensor:
    """ln p - ln p_reference of each reply, [rows]."""
    some = batch([[row] for row in rows]).to(model.device)
    with torch.no_grad():
        base = model.told(some, model.states(some)).logprobs.sum(-1)
    return model.told(some, model.states(some, ADAPTER)).logprobs.sum(-1) - base


def loss(model: Model, rated: Sequence[Rated], beta: float, weights: tuple[float, float]) -> Part:
    """The sum of the replies' losses, and what good and bad ones gain."""
    with torch.no_grad():
        baseline = gains(model, [one.other for one in rated]).mean().clamp(min=0)
    gain = gains(model, [one.row for one in rated])
    good = torch.tensor([one.good for one in rated], device=gain.device)
    total = losses.kto_loss(gain, good, baseline, beta, *weights).sum()
    gained = gain.detach()
    right = torch.where(good, gained > baseline, gained < baseline).sum()
    sums = {"accuracy": right, "baseline": baseline * len(rated), "gain": torch.where(good, gained, -gained).sum()}
    return Part(total, float(len(rated)), {name: float(value) for name, value in sums.items()})


@torch.no_grad()
def evaluate(model: Model, rated: Sequence[Rated], beta: float, weights: tuple[float, float]) -> dict[str, float]:
    """Loss, accuracy and gain on replies that are not trained."""
    sums: dict[str, float] = {}
    for at in range(0, len(rated), 8):
        part = loss(model, rated[at : at + 8], beta, weights)
        for name, value in (("loss", float(part.loss)), *part.sums.items()):
            sums[name] = sums.get(name, 0.0) + value
    return {f"test/{name}": value / len(rated) for name, value in sums.items()}
