"""Learning from thumbs: replies that were found good or bad, each by itself (Ethayarajh et al. 2024, arXiv:2402.01306).

What a reply gains over the reference is compared with what replies to other prompts gain: the KL of the policy, for
which each reply of an update is read behind the prompt of another. The reference's chances are computed once, before
the first update: the reference is the base without the adapter, or as it was before it was trained itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from alignment import dataset, losses, material, release, report
from alignment import recipe as recipes
from alignment.loop import Adam, Optimiser, Parallel, Part, Run, fit
from alignment.lora import LoraShape
from alignment.model import Model, Precision
from alignment.progress import Tell, doing, through
from alignment.records import SPLITS, Rating
from alignment.tokens import Row, batch, plan, schedule
from alignment.trackers import TrackerName

ADAPTER = "kto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a policy learns from ratings; what is not said here is as in `sft.Recipe`.

    beta: how dear it is to leave the reference. up, down: weights of good and of bad replies; None: so that both kinds
    weigh the same however many there are.
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
        if self.beta <= 0:
            raise ValueError("beta is more than 0")


@dataclass(frozen=True, slots=True)
class Rated:
    """A reply to its prompt, whether it is good, and the reply behind the prompt of another; ln p of both by the base,
    once it is known."""

    row: Row
    good: bool
    other: Row
    reference: tuple[float, float] = (0.0, 0.0)

    def __len__(self) -> int:
        return max(len(self.row), len(self.other))


@dataclass(frozen=True, slots=True)
class Item:
    """Replies, by their numbers, that share a forward pass of an update."""

    update: int
    numbers: Sequence[int]


def train(how: Recipe, tell: Tell = print) -> Path:
    """The release that the recipe makes; its run's folder has metrics, checkpoints and a report."""
    parallel = Parallel(how.device, how.shard, tell)
    torch.manual_seed(how.seed)
    model = Model.load(how.model, str(parallel.device), how.precision, how.lora is not None, parallel.mesh)
    learnt = material.Material.read(how.data, Rating, tell)
    rows, held_out = _rated(model, learnt, how)
    if not rows:
        raise dataset.DatasetError(
            "there are no replies to train on: none is of the split `train`, or all are longer than max_length"
        )
    parts = schedule([len(one) for one in rows], how.rows, how.tokens, how.epochs, how.seed)
    updates = [[Item(k, [i for line in lines for i in line]) for lines in some] for k, some in enumerate(parts)]
    run = Run.open(how.output, recipes.dump(how), len(updates), parallel, tell, how.checkpoint, how.trackers)
    if parallel.leads:
        material.write(how.output, learnt, tell=tell)
    parameters = model.adapt(ADAPTER, how.lora) if how.lora else list(model.base.parameters())
    optimiser = Optimiser(parameters, how.optimiser, len(updates), parallel)
    weights = _weights(rows, how)
    tell(f"computing the reference's chances of {len(rows) + len(held_out)} replies")
    rows, held_out = (referred(model, some, how.tokens) for some in (rows, held_out))
    baselines: dict[int, Tensor] = {}

    def forward(item: Item) -> Part:
        if item.update not in baselines:  # of the whole update, in all processes, with the weights before it
            numbers = [i for part in updates[item.update] for i in part.numbers]
            baselines.clear()
            baselines[item.update] = baseline(model, [rows[i] for i in numbers], how.tokens)
        return loss(model, [rows[i] for i in item.numbers], baselines[item.update], how.beta, weights)

    def measure() -> Mapping[str, float]:
        return evaluate(model, held_out, how.beta, weights, how.tokens) if held_out else {}

    results = fit(run, optimiser, updates, forward, measure, how.often) or measure()
    whole = model.gathered(parallel.leads)
    run.end(results)
    if parallel.leads:
        release.write(
            whole, _policy(model), how.output / "release",
            release.Provenance("kto", str(how.model), recipes.dump(how), learnt.fingerprints, results),
        )  # fmt: skip
        report.write(how.output, "Learning from ratings")
    parallel.wait()
    return how.output / "release"


def _rated(model: Model, learnt: material.Material[Rating], how: Recipe) -> tuple[list[Rated], list[Rated]]:
    """The replies that are trained, and those that measure."""

    def made(one: Rating) -> Row:
        return replace(model.template.reply(one.prompt, one.completion, one.tools), weight=one.weight)

    found = learnt.made(made)
    train, test = (_beside(found[split]) for split in SPLITS)
    kept = [learnt.fitting(some, how.max_length, "max_length", len) for some in (train, test)]
    return [one.what for one in kept[0]], [one.what for one in kept[1]]


def _beside(some: Sequence[material.Made[Rating, Row]]) -> list[material.Made[Rating, Rated]]:
    """The replies, each with itself behind the prompt of another."""
    rows = [one.what for one in some]
    rated = [
        Rated(row, one.record.label, _behind(other, row))
        for row, one, other in zip(rows, some, _others(rows), strict=True)
    ]
    return [material.Made(one.file, one.line, one.record, what) for one, what in zip(some, rated, strict=True)]


def _others(rows: Sequence[Row]) -> list[Row]:
    """For each row one before it, or from the end, that has another prompt: the same prompt is often rated twice."""
    found: list[Row] = []
    other = next((row for row in reversed(rows) if row.prompt != rows[0].prompt), None)
    for i, row in enumerate(rows):
        if i and rows[i - 1].prompt != row.prompt:
            other = rows[i - 1]
        found.append(other or row)
    return found


def _behind(other: Row, row: Row) -> Row:
    """The reply of a row behind the prompt of another."""
    prompt, start = other.prompt, len(row.prompt)
    return Row(prompt + row.ids[start:], (False,) * len(prompt) + row.trained[start:])


def _weights(rows: Sequence[Rated], how: Recipe) -> tuple[float, float]:
    """The weights of good and of bad replies: where none is given, those that make both kinds weigh the same."""
    both = sum(one.row.weight for one in rows)
    good = sum(one.row.weight for one in rows if one.good)
    bad = both - good
    even = (both / (2 * good), both / (2 * bad)) if good and bad else (1.0, 1.0)
    return how.up if how.up is not None else even[0], how.down if how.down is not None else even[1]


def _policy(model: Model) -> str | None:
    """The adapter that is trained, None where the model's own weights are."""
    return ADAPTER if model.adapters else None


def sums(model: Model, rows: Sequence[Row], adapter: str | None) -> Tensor:
    """ln p of each reply, [rows]."""
    some = batch([[row] for row in rows]).to(model.device)
    return model.told(some, model.states(some, adapter)).logprobs.sum(-1)


@torch.no_grad()
def _whole(model: Model, rows: Sequence[Row], tokens: int, adapter: str | None) -> Tensor:
    """ln p of any number of replies, without a gradient, [rows]."""
    found = torch.zeros(len(rows), device=model.device)
    for lines in plan([len(row) for row in rows], tokens, 0):
        numbers = [i for line in lines for i in line]
        found[numbers] = sums(model, [rows[i] for i in numbers], adapter)
    return found


def referred(model: Model, rated: Sequence[Rated], tokens: int) -> list[Rated]:
    """The replies with what the base says of them."""
    doing("computing the reference's chances")
    said = _whole(model, [one.row for one in rated], tokens, None).tolist()
    others = _whole(model, [one.other for one in rated], tokens, None).tolist()
    return [replace(one, reference=pair) for one, pair in zip(rated, zip(said, others, strict=True), strict=True)]


def baseline(model: Model, rated: Sequence[Rated], tokens: int) -> Tensor:
    """The KL of the policy from the base: what replies gain behind other prompts on average, at least 0; a scalar."""
    base = torch.tensor([one.reference[1] for one in rated], device=model.device)
    return (_whole(model, [one.other for one in rated], tokens, _policy(model)) - base).mean().clamp(min=0)


def loss(model: Model, rated: Sequence[Rated], baseline: Tensor, beta: float, weights: tuple[float, float]) -> Part:
    """The sum of the replies' losses, and what good and bad ones gain; each counts its weight."""
    base = torch.tensor([one.reference[0] for one in rated], device=model.device)
    gain = sums(model, [one.row for one in rated], _policy(model)) - base
    good = torch.tensor([one.good for one in rated], device=gain.device)
    weight = torch.tensor([one.row.weight for one in rated], device=gain.device)
    total = (weight * losses.kto_loss(gain, good, baseline, beta, *weights)).sum()
    gained = gain.detach()
    right = torch.where(good, gained > baseline, gained < baseline)
    told = {"accuracy": right, "baseline": baseline, "gain": torch.where(good, gained, -gained)}
    return Part(total, float(weight.sum()), {name: float((weight * value).sum()) for name, value in told.items()})


@torch.no_grad()
def evaluate(
    model: Model, rated: Sequence[Rated], beta: float, weights: tuple[float, float], tokens: int
) -> dict[str, float]:
    """Loss, accuracy and gain on replies that are not trained."""
    kl, found = baseline(model, rated, tokens), dict[str, float]()
    for lines in through(plan([len(one) for one in rated], tokens, 0), "measuring"):
        part = loss(model, [rated[i] for line in lines for i in line], kl, beta, weights)
        for name, value in (("loss", float(part.loss)), *part.sums.items()):
            found[name] = found.get(name, 0.0) + value
    return {f"test/{name}": value / (sum(one.row.weight for one in rated) or 1.0) for name, value in found.items()}
