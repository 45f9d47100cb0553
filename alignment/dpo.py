"""Direct preference optimisation: the policy itself is the reward model (Rafailov et al. 2023, arXiv:2305.18290).

Both replies of a pair stand in one row behind their shared prompt, and the reference's chances are computed once,
before the first update: the reference is the base without the adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from alignment import dataset, losses, release, report
from alignment import recipe as recipes
from alignment.loop import Adam, Optimiser, Parallel, Part, Run, Tell, fit
from alignment.lora import LoraShape
from alignment.model import Model, Precision
from alignment.records import PreferencePair
from alignment.tokens import Batch, Row, batch, fitting, plan, schedule, shared

ADAPTER = "dpo"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a policy learns from pairs; what is not said here is as in `sft.Recipe`.

    beta: how dear it is to leave the reference. kind, smoothing: see `losses.dpo_loss`. normalised: log-probabilities
    a token, as `ipo` needs them, in place of those of whole replies. replay: weight of -ln p a token of the chosen
    replies, against forgetting how to say them.
    """

    model: Path
    data: tuple[Path, ...]
    output: Path
    beta: float = 0.1
    kind: Literal["sigmoid", "ipo", "robust"] = "sigmoid"
    smoothing: float = 0.0
    normalised: bool = False
    replay: float = 0.0
    epochs: int = 1
    rows: int = 16
    tokens: int = 2048
    max_length: int = 1024
    lora: LoraShape = field(default_factory=LoraShape)
    optimiser: Adam = field(default_factory=lambda: Adam(lr=5e-5))
    seed: int = 0
    device: str = ""
    precision: Precision = "float32"
    often: int = 50
    checkpoint: int = 50

    def __post_init__(self) -> None:
        if self.beta <= 0 or not 0 <= self.smoothing < 0.5:
            raise ValueError("beta is more than 0, smoothing is at least 0 and less than 0.5")


def train(how: Recipe, tell: Tell = print) -> Path:
    """The release that the recipe makes; its run's folder has metrics, checkpoints and a report."""
    parallel = Parallel(how.device)
    torch.manual_seed(how.seed)
    model = Model.load(how.model, str(parallel.device), how.precision)
    sets = [dataset.read(path, PreferencePair, tell) for path in how.data]
    rows, held_out = (_rows(model, sets, split, how, tell) for split in ("train", "test"))
    if not rows:
        raise dataset.DatasetError(
            "there are no pairs to train on: none is of the split `train`, or all are longer than max_length"
        )
    updates = schedule([len(row) for row in rows], how.rows, how.tokens, how.epochs, how.seed)
    run = Run.open(how.output, recipes.dump(how), len(updates), parallel, tell, how.checkpoint)
    optimiser = Optimiser(model.adapt(ADAPTER, how.lora), how.optimiser, len(updates), parallel)
    tell(f"computing the reference's chances of {len(rows) + len(held_out)} pairs")
    references = {id(some): reference(model, some, how.tokens) for some in (rows, held_out)}

    def forward(lines: Sequence[Sequence[int]]) -> Part:
        numbers = [i for line in lines for i in line]
        return loss(model, [rows[i] for i in numbers], references[id(rows)][numbers], how)

    def measure() -> Mapping[str, float]:
        return evaluate(model, held_out, references[id(held_out)], how) if held_out else {}

    fit(run, optimiser, updates, forward, measure, how.often)
    results = measure()
    if parallel.leads:
        (how.output / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")
        data = {str(one.path): one.fingerprint for one in sets}
        release.write(
            model, ADAPTER, how.output / "release",
            release.Provenance("dpo", str(how.model), recipes.dump(how), data, results),
        )  # fmt: skip
        report.write(how.output, "Direct preference optimisation")
    parallel.wait()
    return how.output / "release"


def _rows(
    model: Model, sets: Sequence[dataset.Dataset[PreferencePair]], split: str, how: Recipe, tell: Tell
) -> list[Row]:
    pairs = [one for some in sets for one in some.records if one.split == split and not one.tie]
    reply = model.template.reply
    rows = [shared(reply(one.prompt, one.chosen), reply(one.prompt, one.rejected)) for one in pairs]
    return fitting(rows, how.max_length, tell)


def chances(model: Model, some: Batch, adapter: str | None) -> tuple[Tensor, Tensor]:
    """(sums of ln p, numbers of tokens), each [rows, 2]: of the chosen and of the rejected reply of each row."""
    told = model.told(some, model.states(some, adapter)).logprobs
    return _by_branch(some, told), _by_branch(some, some.trained.float())


def _by_branch(some: Batch, values: Tensor) -> Tensor:
    """Sums of values [B, T] over the trained tokens of each row's two branches, [rows, 2]."""
    rows, branches, found = some.rows[some.trained], some.branches[some.trained], values[some.trained]
    out = torch.zeros(int(some.rows.max()) + 1, 2, device=found.device)
    return out.index_put((rows, branches - 1), found, accumulate=True)


@torch.no_grad()
def reference(model: Model, rows: Sequence[Row], tokens: int) -> Tensor:
    """Sums of ln p by the base, [rows, 2]."""
    found = torch.zeros(len(rows), 2)
    for lines in plan([len(row) for row in rows], tokens, 0):
        numbers = [i for line in lines for i in line]
        some = batch([[rows[i]] for i in numbers]).to(model.device)
        found[numbers] = chances(model, some, None)[0].cpu()
    return found


def loss(model: Model, rows: Sequence[Row], references: Tensor, how: Recipe) -> Part:
    """The sum of the pairs' losses, and how many of them the policy prefers as their rater did."""
    some = batch([[row] for row in rows]).to(model.device)
    sums, counts = chances(model, some, ADAPTER)
    gain = sums - references.to(sums.device)
    if how.normalised or how.kind == "ipo":
        gain = gain / counts
    chosen, rejected = gain.unbind(-1)
    total = losses.dpo_loss(chosen, rejected, how.beta, how.kind, how.smoothing).sum()
    if how.replay:
        total = total - how.replay * (sums[:, 0] / counts[:, 0]).sum()
    lead = (chosen - rejected).detach()
    measured = {"accuracy": (lead > 0).sum(), "margin": how.beta * lead.sum()}
    measured |= {"gain/chosen": chosen.detach().sum(), "gain/rejected": rejected.detach().sum()}
    return Part(total, float(len(rows)), {name: float(value) for name, value in measured.items()})


@torch.no_grad()
def evaluate(model: Model, rows: Sequence[Row], references: Tensor, how: Recipe) -> dict[str, float]:
    """Loss, accuracy and margin on pairs that are not trained."""
    sums: dict[str, float] = {}
    for lines in plan([len(row) for row in rows], how.tokens, 0):
        numbers = [i for line in lines for i in line]
        part = loss(model, [rows[i] for i in numbers], references[numbers], how)
        for name, value in (("loss", float(part.loss)), *part.sums.items()):
            sums[name] = sums.get(name, 0.0) + value
    return {f"test/{name}": value / len(rows) for name, value in sums.items()}
