"""Training a reward model on preferences: what its heads begin as, how its members learn, how it is measured.

Members differ in how they begin and in the order in which they see the pairs. A pair whose slice is named after an
objective (`harmless`, or `harmless/...`) trains that one, any other pair the first.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from alignment import calibration, dataset, material, probe, release, report
from alignment import recipe as recipes
from alignment.calibration import Interval, wilson
from alignment.loop import STATE, Adam, Optimiser, Parallel, Part, Run, fit
from alignment.lora import LoraShape
from alignment.losses import centring, preference_loss
from alignment.model import Model, ModelError, Precision
from alignment.progress import Tell, through
from alignment.records import SPLITS, Demonstration, PreferencePair
from alignment.reward_model import NAME, Pair, Pooling, RewardModel, paired, pooled, seed_of
from alignment.tokens import Row, batch, plan, schedule
from alignment.trackers import TrackerName

EVALUATION, CALIBRATION = "evaluation.json", "calibration.json"
OVER_REFUSAL = "over-refusal"
"""The slice, or the last part of one's name, of pairs in which help is preferred to a needless refusal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a reward model is trained.

    model: the checkpoint's folder that the policy will start from too. data: files of preference pairs; those of the
    split `test` measure, and half of them set the temperature. output: the run's folder. objectives: what the heads
    have outputs for. members: of the ensemble. rows: pairs an update, of each member. tokens: of a forward pass with
    its padding. max_length: of a prompt with both replies; longer pairs are left out. shared: the prompt is computed
    once for both replies. packed: several pairs in a line. smoothing: the share of labels that are held to be wrong.
    centring: weight of (chosen + rejected)^2, which keeps scores around 0. pooling: what heads read. probe: heads are
    fitted to the model as it is before adapters learn. zeroed: biases are set at the end so that
    scores are 0 on average on the demonstrations in `zero`, or on chosen replies where there are none. close: lengths
    that differ by less than this share count as the same. often: updates between two measurements on `watched`
    held-out pairs, 0 for the first and the last only. device: empty for a GPU where there is one.
    """

    model: Path
    data: tuple[Path, ...]
    output: Path
    objectives: tuple[str, ...] = (NAME,)
    members: int = 3
    epochs: int = 1
    rows: int = 32
    tokens: int = 2048
    max_length: int = 1024
    shared: bool = True
    packed: bool = False
    smoothing: float = 0.0
    centring: float = 0.01
    pooling: Pooling = "last"
    probe: bool = True
    zeroed: bool = True
    zero: tuple[Path, ...] = ()
    lora: LoraShape = field(default_factory=LoraShape)
    optimiser: Adam = field(default_factory=Adam)
    close: float = 0.15
    watched: int = 200
    seed: int = 0
    device: str = ""
    precision: Precision = "float32"
    shard: bool = False
    often: int = 50
    checkpoint: int = 50
    trackers: tuple[TrackerName, ...] = ()

    def __post_init__(self) -> None:
        if self.members < 1 or not self.objectives:
            raise ValueError("a reward model has at least one member and one objective")
        if not 0 <= self.smoothing < 0.5:
            raise ValueError("smoothing is at least 0 and under 0.5, where labels would say nothing")


def train(how: Recipe, tell: Tell = print) -> Path:
    """The folder of the reward model that the recipe makes; its run's folder has metrics, calibration and a report."""
    parallel = Parallel(how.device, how.shard, tell)
    model = Model.load(how.model, str(parallel.device), how.precision, mesh=parallel.mesh)
    learnt = material.Material.read(how.data, PreferencePair, tell)
    pairs, held_out = _pairs(model, learnt, how)
    _check_objectives(pairs, how.objectives)
    reward = RewardModel.new(
        model, how.members, how.objectives, how.lora, how.seed, tokens=how.tokens, pooling=how.pooling
    )
    updates = scheduled(pairs, how)
    run = Run.open(how.output, recipes.dump(how), len(updates), parallel, tell, how.checkpoint, how.trackers)
    if parallel.leads:
        material.write(how.output, learnt, tell=tell)
    optimisers = [Optimiser(reward.parameters(name), how.optimiser, len(updates), parallel) for name in reward.members]

    if how.probe and not (how.output / STATE).is_file():
        tell(f"fitting the heads to {len(pairs)} pairs, before the adapters learn")
        begin(reward, pairs, how)

    def forward(item: Item) -> Part:
        return loss(reward, item, [[pairs[i] for i in line] for line in item.lines], how)

    def measure() -> Mapping[str, float]:
        return watched(reward, held_out[: how.watched], how.close) if held_out else {}

    fit(run, Together(optimisers), updates, forward, measure, how.often)
    if how.zeroed:
        reward.zero(_examples(model, how, pairs))
    results = judged(reward, held_out, how.close) if held_out else {}
    run.end(results)
    if parallel.leads:
        _write(how, reward, results, learnt.fingerprints)
    parallel.wait()
    return how.output / "release"


def _pairs(model: Model, learnt: material.Material[PreferencePair], how: Recipe) -> tuple[list[Pair], list[Pair]]:
    """The pairs that are trained, and those that measure."""
    found = learnt.made(lambda one: paired(model, one, how.objectives))
    train, test = (
        learnt.fitting(found[split], how.max_length, "max_length", lambda pair: len(pair.both)) for split in SPLITS
    )
    return [one.what for one in train], [one.what for one in test]


def _check_objectives(pairs: Sequence[Pair], objectives: Sequence[str]) -> None:
    if not pairs:
        raise ModelError("there are no pairs to train on: none is of the split `train`, or all are over max_length")
    if untrained := [name for k, name in enumerate(objectives) if not any(one.objective == k for one in pairs)]:
        slices = ", ".join(sorted({one.slice or "(none)" for one in pairs})[:12])
        raise ModelError(
            f"no pair trains the objective {untrained[0]}: pairs do whose slice has its name; the slices are {slices}"
        )


# --- learning


@dataclass(frozen=True, slots=True)
class Item:
    """A member's part of an update. lines: numbers of pairs that share a forward pass. share: what they count, so that
    the update's mean is the mean of the members' own means."""

    member: int
    lines: Sequence[Sequence[int]]
    share: float


def scheduled(pairs: Sequence[Pair], how: Recipe) -> list[list[Item]]:
    """The updates: of each, the parts of all members, which see the pairs in orders of their own."""
    lengths = [len(one.both) for one in pairs]
    room = how.tokens if how.shared else how.tokens // 2  # two whole rows are less than twice as long
    orders = [
        schedule(lengths, how.rows, room, how.epochs, seed_of(how.seed, k), how.packed and how.shared)
        for k in range(how.members)
    ]
    updates = []
    for parts in zip(*orders, strict=True):
        counts = [sum(len(line) for lines in some for line in lines) for some in parts]
        shares = [sum(counts) / (how.members * count) for count in counts]
        updates.append([Item(k, lines, shares[k]) for k, some in enumerate(parts) for lines in some])
    return updates


def loss(reward: RewardModel, item: Item, lines: Sequence[Sequence[Pair]], how: Recipe) -> Part:
    """The sum of the losses of a member's pairs: Bradley-Terry, and the centring."""
    pairs = [one for line in lines for one in line]
    device = reward.model.device
    chosen, rejected = (
        one[torch.arange(len(pairs)), [pair.objective for pair in pairs]]
        for one in reward.compared(lines, reward.members[item.member], how.shared)
    )
    margin, weight = (
        torch.tensor(one, device=device) for one in ([p.margin for p in pairs], [p.weight for p in pairs])
    )
    tie = torch.tensor([pair.tie for pair in pairs], device=device)
    each = preference_loss(chosen, rejected, margin, tie, how.smoothing) + how.centring * centring(chosen, rejected)
    lead = (chosen - rejected).detach()
    sums = {
        "accuracy": float(torch.where(tie, 0.5, (lead > 0).float()).sum()),
        "reward/lead": float(lead.sum()),
        "reward/mean": float((chosen + rejected).sum().detach() / 2),
    }
    return Part(item.share * (weight * each).sum(), len(pairs), {k: item.share * v for k, v in sums.items()})


def begin(reward: RewardModel, pairs: Sequence[Pair], how: Recipe) -> None:
    """Fits the heads to the model as it is, each member's to pairs drawn for it."""
    device = reward.model.device
    states = _states(reward, pairs)
    columns = ([one.margin for one in pairs], [one.weight for one in pairs], [one.tie for one in pairs])
    seen = probe.Pairs(*states, *(torch.tensor(one, device=device) for one in columns))
    objective = torch.tensor([one.objective for one in pairs], device=device)
    for k, member in enumerate(reward.members):
        head = cast(nn.Linear, reward.model.heads[member])
        for output in range(len(reward.objectives)):
            mine = seen[(objective == output).nonzero()[:, 0]]
            weights = probe.fit(mine.again(seed_of(how.seed, k)) if how.members > 1 else mine, how.smoothing)
            with torch.no_grad():  # pairs say nothing of where 0 is, and the centring wants it in their middle
                head.weight[output] = weights
                head.bias[output] = -((mine.chosen + mine.rejected) @ weights).mean() / 2


@torch.no_grad()
def _states(reward: RewardModel, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """What heads would read of the base after the chosen and the rejected replies, each [pairs, width] in float32."""
    rows, model = [one.both for one in pairs], reward.model
    width = cast(nn.Linear, model.heads[reward.members[0]]).in_features
    found = torch.zeros(2, len(rows), width, device=model.device)
    for lines in through(plan([len(row) for row in rows], reward.tokens, 0), "fitting the heads"):
        some = batch([[rows[i] for i in line] for line in lines]).to(model.device)
        numbers, states = [i for line in lines for i in line], model.states(some)
        for side in (0, 1):
            found[side, numbers] = pooled(states, some, side + 1, reward.pooling)
    return found[0], found[1]


class Together(Optimiser):
    """The optimisers of members that learn side by side, each as if it were alone."""

    def __init__(self, each: Sequence[Optimiser]):
        self.each = list(each)
        self.parameters = [one for optimiser in self.each for one in optimiser.parameters]

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return self.each[0].lr

    def step(self, count: bool = True) -> float:
        """The mean of the norms of the members' gradients, of which each is clipped by itself. Raises Diverged.

        The gradients are of a mean over all members; each member's own is so many times as large.
        """
        torch._foreach_mul_([one.grad for one in self.parameters if one.grad is not None], float(len(self.each)))
        return sum(optimiser.step(count) for optimiser in self.each) / len(self.each)

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        return {"each": [optimiser.state() for optimiser in self.each]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes weights and moments of all members back to the bit."""
        for optimiser, kept in zip(self.each, state["each"], strict=True):
            optimiser.restore(kept)


def _examples(model: Model, how: Recipe, pairs: Sequence[Pair], most: int = 256) -> list[Row]:
    """Replies that are worth 0 on average, evenly from all there are."""
    if how.zero:
        records = [one for path in how.zero for one in dataset.read(path, Demonstration).records]
        rows = [model.template.conversation(one.messages, "last", one.tools) for one in records]
        rows = [row for row in rows if len(row) <= how.max_length]
    else:
        rows = [one.chosen for one in pairs]
    return rows[:: max(1, len(rows) // most)][:most]


# --- measuring


@torch.no_grad()
def leads(reward: RewardModel, pairs: Sequence[Pair]) -> Tensor:
    """By how much each member prefers the chosen reply of each pair, in the pair's own objective: [members, pairs]."""
    found = torch.zeros(len(reward.members), len(pairs), device=reward.model.device)
    rows = [one.both for one in pairs]
    for lines in through(plan([len(row) for row in rows], reward.tokens, 0), "measuring"):
        some = batch([[rows[i] for i in line] for line in lines]).to(reward.model.device)
        numbers = [i for line in lines for i in line]
        outputs = [pairs[i].objective for i in numbers]
        for k, member in enumerate(reward.members):
            chosen, rejected = reward.read(some, member, (1, 2))
            found[k, numbers] = (chosen - rejected)[torch.arange(len(numbers)), outputs]
    return found


def watched(reward: RewardModel, pairs: Sequence[Pair], close: float) -> dict[str, float]:
    """What is measured on held-out pairs while training."""
    firm = [one for one in pairs if not one.tie]
    found = leads(reward, firm)
    mean = found.mean(0).tolist()
    length_matched = [lead > 0 for lead, one in zip(mean, firm, strict=True) if near(one, close)]
    measured = {
        "test/accuracy": sum(lead > 0 for lead in mean) / max(len(mean), 1),
        "test/loss": calibration.surprise(mean) if mean else 0.0,
        "test/spread": float(found.std(0, correction=0).mean()) if mean else 0.0,
    }
    if length_matched:
        measured["test/accuracy_close"] = sum(length_matched) / len(length_matched)
    return measured


def near(pair: Pair, close: float) -> bool:
    """Whether the replies are of about the same length, so that length cannot decide."""
    return abs(pair.lengths[0] - pair.lengths[1]) <= close * max(pair.lengths)


def judged(reward: RewardModel, pairs: Sequence[Pair], close: float) -> dict[str, Any]:
    """What held-out pairs say of a reward model, whose temperature is set by one half of them.

    Which half a pair is in depends on its prompt, so that both replies to it, and others, are on one side. Ties count
    nowhere. `calibration` is measured on the other half.
    """
    firm = [one for one in pairs if not one.tie]
    if not firm:
        return {"pairs": 0, "ties": len(pairs)}
    found = leads(reward, firm)
    mean, spread = found.mean(0).tolist(), found.std(0, correction=0).tolist()
    sides = [_side(one) for one in firm]
    fitted = [lead for lead, side in zip(mean, sides, strict=True) if side]
    others = [lead for lead, side in zip(mean, sides, strict=True) if not side]
    reward.temperature = calibration.temperature(fitted)
    bins = calibration.reliability(*calibration.predictions(others, reward.temperature))
    return {
        "pairs": len(firm),
        "ties": len(pairs) - len(firm),
        "accuracy": right(mean).plain(),
        "members": [right(one).plain() for one in found.tolist()],
        **by_kind(firm, mean, reward.objectives),
        **by_length(firm, mean, close),
        "uncertainty": uncertainty(mean, spread),
        "loss": calibration.surprise(others, reward.temperature) if others else None,
        "loss_uncalibrated": calibration.surprise(others) if others else None,
        "calibration": calibration.plain(bins, reward.temperature),
    }


def right(leads: Sequence[float]) -> Interval:
    """The share of pairs of which the chosen reply leads."""
    return wilson(sum(lead > 0 for lead in leads), len(leads))


def _side(pair: Pair) -> bool:
    return hashlib.sha256(repr(pair.chosen.prompt).encode()).digest()[0] % 2 == 0


def by_kind(pairs: Sequence[Pair], leads: Sequence[float], objectives: Sequence[str]) -> dict[str, Any]:
    """Accuracy by slice, by objective, and on needless refusals where some pairs are of that slice."""
    slices: dict[str, list[float]] = {}
    outputs: dict[str, list[float]] = {}
    for pair, lead in zip(pairs, leads, strict=True):
        slices.setdefault(pair.slice or "(none)", []).append(lead)
        outputs.setdefault(objectives[pair.objective], []).append(lead)
    refused = [lead for name, some in slices.items() if name.rpartition("/")[2] == OVER_REFUSAL for lead in some]
    found: dict[str, Any] = {
        "slices": {name: right(some).plain() for name, some in sorted(slices.items())},
        "objectives": {name: right(some).plain() for name, some in outputs.items()},
    }
    return found | ({"over_refusal": right(refused).plain()} if refused else {})


def by_length(pairs: Sequence[Pair], leads: Sequence[float], close: float) -> dict[str, Any]:
    """How much of it is length: accuracy on replies of like length, and that of preferring the longer reply."""
    longer = [float(a - b) for a, b in (one.lengths for one in pairs)]
    alike = [i for i, one in enumerate(pairs) if near(one, close)]
    found: dict[str, Any] = {}
    if some := [lead for lead in longer if lead]:
        found["longer_wins"] = right(some).plain()
    if alike:
        found["length_matched"] = {"within": close, "accuracy": right([leads[i] for i in alike]).plain()}
        if some := [longer[i] for i in alike if longer[i]]:
            found["length_matched"]["longer_wins"] = right(some).plain()
    return found


def uncertainty(leads: Sequence[float], spread: Sequence[float], parts: int = 4) -> dict[str, Any]:
    """Whether members disagree where they are wrong: accuracy from the least to the most spread of the leads.

    auroc: the chance that a wrong pair has more spread than a right one, 0.5 where the spread says nothing.
    """
    order = sorted(range(len(leads)), key=lambda i: spread[i])
    cuts = [len(order) * k // parts for k in range(parts + 1)]
    some = [order[a:b] for a, b in pairwise(cuts) if b > a]
    return {
        "auroc": calibration.auroc(spread, [lead <= 0 for lead in leads]),
        "bins": [
            {"spread": sum(spread[i] for i in one) / len(one), **right([leads[i] for i in one]).plain()} for one in some
        ],
    }


# --- what is left


def _write(how: Recipe, reward: RewardModel, results: dict[str, Any], data: Mapping[str, str]) -> None:
    calibrated = results.pop("calibration", None)
    for name, found in ((EVALUATION, results), (CALIBRATION, calibrated)):
        if found:
            (how.output / name).write_text(json.dumps(found, indent=2) + "\n")
    shown: dict[str, Any] = {
        name: results[name] for name in ("accuracy", "longer_wins", "over_refusal") if name in results
    }
    shown |= {"accuracy, like lengths": results["length_matched"]["accuracy"]} if "length_matched" in results else {}
    shown |= {name: calibrated[name] for name in ("ece", "temperature")} if calibrated else {}
    provenance = release.Provenance("reward", str(how.model), recipes.dump(how), data, shown)
    folder, new = how.output / "release", how.output / "release.new"
    shutil.rmtree(new, ignore_errors=True)
    reward.save(new)
    (new / release.PROVENANCE).write_text(json.dumps(asdict(provenance), indent=2, ensure_ascii=False) + "\n")
    (new / release.CARD).write_text(release.card(provenance))
    shutil.rmtree(folder, ignore_errors=True)
    new.replace(folder)
    report.write(how.output, "Reward model")
