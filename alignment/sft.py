"""Supervised fine-tuning on demonstrations: the assistant's own tokens are made more likely, nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from alignment import dataset, material, release, report
from alignment import recipe as recipes
from alignment.loop import Adam, Optimiser, Parallel, Part, Run, fit
from alignment.lora import LoraShape
from alignment.model import Model, Precision
from alignment.progress import Tell, through
from alignment.records import SPLITS, Demonstration
from alignment.tokens import Row, Turns, batch, plan, schedule
from alignment.trackers import TrackerName

ADAPTER = "sft"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a model is tuned on demonstrations.

    model: a checkpoint's folder. data: files of demonstrations; those of the split `test` measure. output: the run's
    folder. rows: of an update, over all processes. tokens: of a forward pass with its padding. max_length: longer rows
    are left out. turns: which of the assistant's turns are trained. packed: several rows in a line, which do not see
    each other. lora: None trains all weights. device: empty for a GPU where there is one. often: updates between two
    measurements, 0 for the first and the last only. shard: each process keeps a part of the weights (`shard`).
    """

    model: Path
    data: tuple[Path, ...]
    output: Path
    epochs: int = 1
    rows: int = 16
    tokens: int = 4096
    max_length: int = 1024
    turns: Turns = "all"
    packed: bool = True
    lora: LoraShape | None = field(default_factory=LoraShape)
    optimiser: Adam = field(default_factory=Adam)
    seed: int = 0
    device: str = ""
    precision: Precision = "float32"
    shard: bool = False
    often: int = 50
    checkpoint: int = 50
    trackers: tuple[TrackerName, ...] = ()


def train(how: Recipe, tell: Tell = print) -> Path:
    """The release that the recipe makes; its run's folder has metrics, checkpoints and a report."""
    parallel = Parallel(how.device, how.shard, tell)
    torch.manual_seed(how.seed)
    model = Model.load(how.model, str(parallel.device), how.precision, how.lora is not None, parallel.mesh)
    learnt = material.Material.read(how.data, Demonstration, tell)
    rows, held_out = _rows(model, learnt, how)
    if not rows:
        raise dataset.DatasetError(
            "there are no rows to train on: none is of the split `train`, or all are longer than max_length"
        )
    updates = schedule([len(row) for row in rows], how.rows, how.tokens, how.epochs, how.seed, how.packed)
    run = Run.open(how.output, recipes.dump(how), len(updates), parallel, tell, how.checkpoint, how.trackers)
    if parallel.leads:
        material.write(how.output, learnt, tell=tell)
    adapter = ADAPTER if how.lora else None
    parameters = model.adapt(ADAPTER, how.lora) if how.lora else list(model.base.parameters())
    optimiser = Optimiser(parameters, how.optimiser, len(updates), parallel)

    def forward(lines: Sequence[Sequence[int]]) -> Part:
        return loss(model, adapter, [[rows[i] for i in line] for line in lines])

    def measure() -> Mapping[str, float]:
        return evaluate(model, adapter, held_out, how.tokens) if held_out else {}

    results = fit(run, optimiser, updates, forward, measure, how.often) or measure()
    whole = model.gathered(parallel.leads)
    run.end(results)
    if parallel.leads:
        provenance = release.Provenance("sft", str(how.model), recipes.dump(how), learnt.fingerprints, results)
        release.write(whole, adapter, how.output / "release", provenance)
        report.write(how.output, "Supervised fine-tuning")
    parallel.wait()
    return how.output / "release"


def _rows(model: Model, learnt: material.Material[Demonstration], how: Recipe) -> tuple[list[Row], list[Row]]:
    """The rows that are trained, and those that measure."""

    def made(one: Demonstration) -> Row:
        turns: Turns = "last" if how.turns == "last" else one.turns
        return replace(model.template.conversation(one.messages, turns, one.tools, one.after), weight=one.weight)

    found = learnt.made(made)
    train, test = (learnt.fitting(found[split], how.max_length, "max_length", len) for split in SPLITS)
    return [one.what for one in train], [one.what for one in test]


def loss(model: Model, adapter: str | None, lines: Sequence[Sequence[Row]]) -> Part:
    """The sum of -ln p over the trained tokens, in nats, and their number, each counted as its row's weight says."""
    some = batch(lines).to(model.device)
    told = model.told(some, model.states(some, adapter))
    weights = torch.tensor([row.weight for line in lines for row in line], device=model.device)
    weight = weights[some.rows.clamp(min=0)] * some.trained
    return Part(-(weight * told.logprobs).sum(), float(weight.sum()), {"entropy": float((weight * told.entropy).sum())})


@torch.no_grad()
def evaluate(model: Model, adapter: str | None, rows: Sequence[Row], tokens: int) -> dict[str, float]:
    """The loss a token and the perplexity on rows that are not trained."""
    total = count = 0.0
    for lines in through(plan([len(row) for row in rows], tokens, 0), "measuring"):
        part = loss(model, adapter, [[rows[i] for i in line] for line in lines])
        total, count = total + float(part.loss), count + part.count
    return {"test/loss": total / count, "test/perplexity": math.exp(min(total / count, 700.0))}
