"""Direct preference optimisation: the policy itself is the reward model (Rafailov et al. 2023, arXiv:2305.18290).

Both replies of a pair stand in one row behind their shared prompt, and the reference's chances are computed once,
before the first update: the reference is the base without the adapter, or as it was before it was trained itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from alignment import dataset, losses, material, release, report
from alignment import recipe as recipes
from alignment.loop import Adam, Optimiser, Parallel, Part, Run, fit
from alignment.lora import LoraShape
from alignment.model import Model, Precision
from alignment.progress import Tell, through
from alignment.records import SPLITS, PreferencePair
from alignment.tokens import Batch, Row, batch, plan, schedule, shared
from alignment.trackers import TrackerName

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
    lora: LoraShape | None = field(default_factory=LoraShape)
    optimiser: Adam = field(default_factory=lambda: Adam(lr=5e-5))
    seed: int = 0
    device: str = ""
    precision: Precision = "float32"
    shard: bool = False
    often: int = 50
    checkpoint: int = 50
    trackers: tuple[TrackerName, ...] = ()

    def __post_init__(self) -> None:
        if self.beta <= 0 or not 0 <= self.smoothing < 0.5:
            raise ValueError("beta is more than 0, smoothing is at least 0 and less than 0.5")


def train(how: Recipe, tell: Tell = print) -> Path:
    """The release that the recipe makes; its run's folder has metrics, checkpoints and a report."""
    parallel = Parallel(how.device, how.shard, tell)
    torch.manual_seed(how.seed)
    model = Model.load(how.model, str(parallel.device), how.precision, how.lora is not None, parallel.mesh)
    learnt = material.Material.read(how.data, PreferencePair, tell)
    (rows, margins), (held_out, others) = _rows(model, learnt, how)
    if not rows:
        raise dataset.DatasetError(
            "there are no pairs to train on: none is of the split `train`, or all are longer than max_length"
        )
    updates = schedule([len(row) for row in rows], how.rows, how.tokens, how.epochs, how.seed)
    run = Run.open(how.output, recipes.dump(how), len(updates), parallel, tell, how.checkpoint, how.trackers)
    if parallel.leads:
        material.write(how.output, learnt, tell=tell)
    adapter = ADAPTER if how.lora else None
    parameters = model.adapt(ADAPTER, how.lora) if how.lora else list(model.base.parameters())
    optimiser = Optimiser(parameters, how.optimiser, len(updates), parallel)
    tell(f"computing the reference's chances of {len(rows) + len(held_out)} pairs")
    references = {id(some): reference(model, some, how.tokens) for some in (rows, held_out)}

    def forward(lines: Sequence[Sequence[int]]) -> Part:
        numbers = [i for line in lines for i in line]
        return loss(model, [rows[i] for i in numbers], references[id(rows)][numbers], how, margins[numbers])

    def measure() -> Mapping[str, float]:
        return evaluate(model, held_out, references[id(held_out)], how, others) if held_out else {}

    results = fit(run, optimiser, updates, forward, measure, how.often) or measure()
    whole = model.gathered(parallel.leads)
    run.end(results)
    if parallel.leads:
        (how.output / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")
        release.write(
            whole, adapter, how.output / "release",
            release.Provenance("dpo", str(how.model), recipes.dump(how), learnt.fingerprints, results),
        )  # fmt: skip
        report.write(how.output, "Direct preference optimisation")
    parallel.wait()
    return how.output / "release"


_Pairs = tuple[list[Row], Tensor]


def _rows(model: Model, learnt: material.Material[PreferencePair], how: Recipe) -> tuple[_Pairs, _Pairs]:
    """(rows, their margins) of the pairs that are trained, and of those that measure.

    Ties are left out and told: DPO has no outcome for them, and counted as a win of either side they are only noise.
    """

    def made(one: PreferencePair) -> Row:
        replies = (model.template.reply(one.prompt, said, one.tools) for said in (one.chosen, one.rejected))
        return replace(shared(*replies), weight=one.weight)

    found = learnt.made(made, lambda one: "tie" if one.tie else "")
    if ties := sum(some["tie"] for some in learnt.left_out):
        learnt.tell(
            f"{ties} pairs are ties and left out: DPO learns from a preference alone (a reward model from both)"
        )
    train, test = (learnt.fitting(found[split], how.max_length, "max_length", len) for split in SPLITS)
    if how.kind == "ipo" and any(one.record.margin for one in (*train, *test)):
        raise dataset.DatasetError('some pairs have a `margin`, for which kind = "ipo" has no place: take "sigmoid"')
    return _with_margins(train), _with_margins(test)


def _with_margins(some: Sequence[material.Made[PreferencePair, Row]]) -> _Pairs:
    return [one.what for one in some], torch.tensor([one.record.margin for one in some])


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
    for lines in through(plan([len(row) for row in rows], tokens, 0), "computing the reference's chances"):
        numbers = [i for line in lines for i in line]
        some = batch([[rows[i]] for i in numbers]).to(model.device)
        found[numbers] = chances(model, some, None)[0].cpu()
    return found


def loss(model: Model, rows: Sequence[Row], references: Tensor, how: Recipe, margins: Tensor | float = 0.0) -> Part:
    """The sum of the pairs' losses, and how many of them the policy prefers as their rater did; each counts its weight.

    margins: [rows], by how much chosen replies have to lead, in rewards (Amini et al. 2024, arXiv:2402.10571, eq. 8).
    """
    some = batch([[row] for row in rows]).to(model.device)
    sums, counts = chances(model, some, ADAPTER if how.lora else None)
    gain = sums - references.to(sums.device)
    if how.normalised or how.kind == "ipo":
        gain = gain / counts
    chosen, rejected = gain.unbind(-1)
    offset = torch.as_tensor(margins, device=chosen.device) / how.beta
    each = losses.dpo_loss(chosen - offset, rejected, how.beta, how.kind, how.smoothing)
    if how.replay:
        each = each - how.replay * sums[:, 0] / counts[:, 0]
    lead = (chosen - rejected).detach()
    measured = {"accuracy": lead > 0, "margin": how.beta * lead}
    measured |= {"gain/chosen": chosen.detach(), "gain/rejected": rejected.detach()}
    weight = torch.tensor([row.weight for row in rows], device=each.device)
    sums_of = {name: float((weight * value).sum()) for name, value in measured.items()}
    return Part((weight * each).sum(), float(weight.sum()), sums_of)


@torch.no_grad()
def evaluate(
    model: Model, rows: Sequence[Row], references: Tensor, how: Recipe, margins: Tensor | None = None
) -> dict[str, float]:
    """Loss, accuracy and margin on pairs that are not trained; margins: [rows], none for 0."""
    sums: dict[str, float] = {}
    offsets = torch.zeros(len(rows)) if margins is None else margins
    for lines in through(plan([len(row) for row in rows], how.tokens, 0), "measuring"):
        numbers = [i for line in lines for i in line]
        part = loss(model, [rows[i] for i in numbers], references[numbers], how, offsets[numbers])
        for name, value in (("loss", float(part.loss)), *part.sums.items()):
            sums[name] = sums.get(name, 0.0) + value
    return {f"test/{name}": value / (sum(row.weight for row in rows) or 1.0) for name, value in sums.items()}
