"""Proximal policy optimisation against rewards, with a critic and a penalty on leaving the reference.

Schulman et al. 2017 (arXiv:1707.06347) as Ouyang et al. 2022 (arXiv:2203.02155) used it on language models. One update:
draw replies to some prompts, reward them, compute advantages, then change policy and critic in small steps.

An action is a token of the reply. Its reward is minus `kl` times ln p - ln p_reference, and for the last one of a reply
the reply's score besides. All sums are over the whole minibatch of all processes, so that it does not matter how rows
are split into forward passes.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignment import dataset, losses, material, release, report
from alignment import recipe as recipes
from alignment.judging import Judge, samples
from alignment.loop import Adam, Optimiser, Parallel, Run
from alignment.lora import LoraShape
from alignment.model import Model, Precision
from alignment.monitor import Bounds
from alignment.progress import Tell, doing
from alignment.records import SPLITS, Demonstration
from alignment.rewards import Lagrange, Source
from alignment.roles import POLICY, SHAPE, VALUE, Apart, CriticKind, Roles
from alignment.rollout import Engine, Local, Reply
from alignment.server import Server
from alignment.tokens import Batch, Row, batch, plan
from alignment.trackers import TrackerName
from guardrails.types import Message

Score = Callable[[Sequence[Reply]], Tensor]
"""Rewards of replies, [N]."""


@dataclass(frozen=True, slots=True)
class Kl:
    """The penalty on leaving the reference. coefficient: of each nat. target: nats a reply at which an adaptive
    coefficient aims, None for a fixed one; horizon: replies in which it may change by a fifth of itself."""

    coefficient: float = 0.02
    target: float | None = None
    horizon: int = 10_000


@dataclass(frozen=True, slots=True)
class Settings:
    """How one update is made.

    prompts, samples: how many replies are drawn. limit: tokens of a reply. epochs, minibatches: how often the replies
    are gone through, in how many steps each time. stop: nats a token from the old policy at which the update ends.
    clip, value_clip: see `losses`. discount, decay: gamma and lambda. missing_end: taken from the score of a reply that
    was cut off. bootstrap: count what the critic expects after the cut, for a cut is not an end. critic: a head on an
    adapter of its own, on the states of the policy (`shared`), or on a model of its own, all of whose weights are
    trained (`model`). detach: a shared critic's gradient does not reach the policy. cap: of importance weights, None
    where the engine's chances are taken for the trainer's. warmup: updates in which the critic alone learns. replay:
    weight of the demonstrations' loss. tokens: in one forward pass.
    """

    prompts: int = 16
    samples: int = 1
    limit: int = 64
    temperature: float = 1.0
    epochs: int = 1
    minibatches: int = 1
    stop: float | None = 0.05
    clip: float = 0.2
    value_clip: float | None = 0.2
    discount: float = 1.0
    decay: float = 0.95
    kl: Kl = field(default_factory=Kl)
    missing_end: float = 1.0
    bootstrap: bool = False
    whiten: bool = True
    whiten_rewards: bool = False
    critic: CriticKind = "adapter"
    detach: bool = False
    value_weight: float = 0.1
    cap: float | None = None
    warmup: int = 0
    replay: float = 0.0
    tokens: int = 2048

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError("temperature is more than 0: nothing is learnt from replies that could not be others")
        if min(self.prompts, self.samples, self.limit, self.epochs, self.minibatches, self.tokens) < 1:
            raise ValueError("prompts, samples, limit, epochs, minibatches and tokens are at least 1")


@dataclass(slots=True)
class Experience:
    """Replies as tensors [N, T], of which `acts` are the actions; 0 elsewhere. scores: [N], of whole replies.

    old, reference: ln p of the actions. parts: numbers of the rows that share a forward pass, always the same ones, so
    that the first step's ratios are 1 to the bit.
    """

    replies: list[Reply]
    parts: list[list[int]]
    acts: Tensor
    old: Tensor
    reference: Tensor
    values: Tensor
    scores: Tensor
    entropy: Tensor
    advantages: Tensor = field(init=False)
    returns: Tensor = field(init=False)
    weights: Tensor | None = None

    def part(self, numbers: Sequence[int]) -> tuple[Batch, Callable[[Tensor], Tensor]]:
        """The batch of some rows, and what cuts tensors [N, T] to it."""
        made = batch([[self.replies[i].row] for i in numbers])
        width = made.ids.shape[1]
        return made.to(self.acts.device), lambda whole: whole[numbers, :width]


class Ppo:
    """The policy, its reference, its critic, and what changes them; `update` is one round.

    With adapters all of them are one base: the reference is the base itself, the policy an adapter on it, the critic a
    head on another adapter or on the policy's states. `apart` has the models beside it where all weights are trained.
    """

    def __init__(
        self, model: Model, settings: Settings, engine: Engine, score: Score, how: Adam, updates: int,
        parallel: Parallel, shape: LoraShape | None = SHAPE, critic_lr: float | None = None,
        critic_from: Path | None = None, apart: Apart | None = None,
    ):  # fmt: skip
        """shape: of the policy's adapter, None to train all its weights. critic_from: see `Roles.of`."""
        self.model, self.settings, self.engine, self.score, self.parallel = model, settings, engine, score, parallel
        self.roles = Roles.of(model, shape, settings.critic, apart, critic_from)
        policy, critic = self.roles.trained
        self.policy = Optimiser(policy, how, updates, parallel)
        self.critic = Optimiser(critic, replace(how, lr=critic_lr or how.lr), updates, parallel)
        self.kl, self.updates = settings.kl.coefficient, 0

    # --- one update, top to bottom

    def update(
        self, prompts: Sequence[tuple[int, ...]], seed: int, demonstrations: Sequence[Row] = ()
    ) -> dict[str, float]:
        """Its metrics. prompts: this process's part of them. demonstrations: rows to replay."""
        began, how = time.perf_counter(), self.settings
        own = seed + (self.parallel.rank << 40)  # no two processes draw by the same numbers
        doing("drawing replies")
        replies = self.engine.draw(prompts, how.samples, how.limit, how.temperature, own)
        drawn = time.perf_counter() - began
        doing("judging replies")
        experience = self.experience(replies, seed)
        metrics = self._measured(experience) | self.rewarded(experience)
        metrics |= self.learn(experience, seed, demonstrations)
        self._adapt_kl(metrics["kl/reply"], int(metrics["replies"]))
        self.updates += 1
        took = time.perf_counter() - began
        return metrics | {"time/draw": drawn, "time/update": took, "tokens/s": metrics["tokens"] / took}

    @torch.no_grad()
    def experience(self, replies: Sequence[Reply], seed: int) -> Experience:
        """What policy, reference and critic say of the replies, and their scores."""
        how, device = self.settings, self.model.device
        rows = [reply.row for reply in replies]
        parts = [[i for line in lines for i in line] for lines in plan([len(row) for row in rows], how.tokens, seed)]
        shape = (len(rows), max(map(len, rows)))
        acts = torch.zeros(shape, dtype=torch.bool, device=device)
        old, reference, values, entropy = (torch.zeros(shape, device=device) for _ in range(4))
        scores = self.score(replies).to(device)
        made = Experience(list(replies), parts, acts, old, reference, values, scores, entropy)
        for numbers, _ in self.model.even(parts):
            some, _ = made.part(numbers)
            width = some.ids.shape[1]
            told, value = self._said(some)
            still = self.roles.reference
            base = still.model.told(some, still.states(some), how.temperature)
            for whole, part in (
                (acts, some.trained), (old, told.logprobs), (entropy, told.entropy),
                (reference, base.logprobs), (values, value),
            ):  # fmt: skip
                whole[numbers, :width] = part
        if how.cap is not None:
            engine = torch.zeros(shape, device=device)
            for i, reply in enumerate(replies):
                engine[i, acts[i]] = torch.tensor(reply.drawn, device=device)
            made.weights = losses.importance(old, engine, acts, how.cap)
        return made

    def _said(self, some: Batch) -> tuple[Any, Tensor]:
        """What the policy says of the actions, and the value of the state before each, [B, T]."""
        roles = self.roles
        states = roles.policy.states(some)
        told = self.model.told(some, states, self.settings.temperature)
        if not roles.shared:
            states = roles.critic.states(some)
        elif self.settings.detach:
            states = states.detach()
        values = roles.critic.model.values(states, VALUE)
        return told, torch.where(some.trained, values.gather(1, some.before), 0)

    @torch.no_grad()
    def rewarded(self, made: Experience) -> dict[str, float]:
        """Sets the advantages and returns of the actions; returns metrics of both."""
        how, acts = self.settings, made.acts
        last = acts.shape[1] - 1 - acts.flip(1).int().argmax(1)  # the column of each row's last action
        cut = torch.tensor([reply.finish == "length" for reply in made.replies], device=acts.device)
        scores = made.scores - how.missing_end * cut
        rewards = torch.where(acts, -self.kl * (made.old - made.reference), 0)
        rewards[torch.arange(len(rewards)), last] += scores
        if how.whiten_rewards:
            rewards = losses.whitened(rewards, acts, *self._moments(rewards, acts), keep_mean=True)
        after = torch.where(cut, self._after(made), 0) if how.bootstrap else torch.zeros_like(scores)
        made.advantages, made.returns = losses.gae(rewards, made.values, acts, after, how.discount, how.decay)
        explained = losses.explained_variance(made.values, made.returns, acts)
        metrics = {"value/explained": float(explained), "return/mean": float(losses.masked_mean(made.returns, acts))}
        if how.whiten:
            made.advantages = losses.whitened(made.advantages, acts, *self._moments(made.advantages, acts))
        return metrics

    def _after(self, made: Experience) -> Tensor:
        """What the critic expects after the last token of each reply, [N]."""
        found = torch.zeros(len(made.replies), device=made.acts.device)
        for numbers, _ in self.model.even(made.parts):
            some, _ = made.part(numbers)
            critic = self.roles.critic
            line, column = some.last().unbind(-1)
            found[numbers] = critic.model.values(critic.states(some), VALUE)[line, column]
        return found

    def learn(self, made: Experience, seed: int, demonstrations: Sequence[Row] = ()) -> dict[str, float]:
        """Changes policy and critic; returns metrics of the last step."""
        how, steps, metrics = self.settings, 0, dict[str, float]()
        each = min(self.parallel.gathered([min(how.minibatches, len(made.parts))]))  # the same in all processes
        for epoch in range(how.epochs):
            for k, minibatch in enumerate(_shuffled(made.parts, each, f"{seed}:{epoch}")):
                doing("learning", steps, how.epochs * each)
                found = self._gradients(made, minibatch)
                if how.stop is not None and found["ppo/kl"] > how.stop:
                    self.policy.forget()
                    self.critic.forget()
                    return metrics | {"ppo/stopped": 1.0, "ppo/steps": steps}
                if demonstrations and how.replay:
                    found["replay/loss"] = self._replay(demonstrations[k::each] or demonstrations)
                steps += 1
                if self.updates < how.warmup:
                    self.policy.forget()
                else:
                    found["policy/grad"] = self.policy.step(count=steps == 1)
                found["value/grad"] = self.critic.step(count=steps == 1)
                metrics = found | {"ppo/stopped": 0.0, "ppo/steps": steps}
        return metrics

    def _gradients(self, made: Experience, minibatch: Sequence[Sequence[int]]) -> dict[str, float]:
        """Adds the gradients of a minibatch to those that are there; returns its losses, ratios and KL."""
        how = self.settings
        mine = [made.acts[list(part)].sum() for part in minibatch]
        count = self.parallel.sum(torch.stack(mine).sum())
        sums, farthest = torch.zeros(5, device=made.acts.device, dtype=torch.float64), 0.0
        for numbers, counts in self.model.even(minibatch):
            some, cut = made.part(numbers)
            told, values = self._said(some)
            acts, old = cut(made.acts), cut(made.old)
            weights = cut(made.weights) if made.weights is not None else None
            policy = losses.policy_loss(told.logprobs, old, cut(made.advantages), acts, how.clip, weights)
            value = losses.value_loss(values, cut(made.values), cut(made.returns), acts, how.value_clip)
            ((policy + how.value_weight * value) * counts / count).backward()
            if not counts:
                continue
            with torch.no_grad():
                ratio = torch.exp(torch.where(acts, told.logprobs - old, 0))
                kl = torch.where(acts, ratio - 1 - (told.logprobs - old), 0).sum()
                outside = losses.clipped(told.logprobs, old, acts, how.clip)
                sums += torch.stack([policy, value, outside, kl, told.entropy.sum()])
                farthest = max(farthest, float((ratio - 1).abs().max()))
        policy_sum, value_sum, outside_sum, kl_sum, entropy_sum = (self.parallel.sum(sums) / count).tolist()
        return {
            "policy/loss": policy_sum, "value/loss": value_sum, "policy/clipped": outside_sum, "ppo/kl": kl_sum,
            "policy/entropy": entropy_sum, "policy/farthest": max(self.parallel.gathered([farthest])),
        }  # fmt: skip

    def _replay(self, rows: Sequence[Row]) -> float:
        """Adds the gradient of the demonstrations' loss a token, against the alignment tax; returns that loss."""
        trained = sum([sum(row.trained) for row in rows])
        count = float(self.parallel.sum(torch.tensor(float(trained))))
        total = 0.0
        for lines, counts in self.model.even(plan([len(row) for row in rows], self.settings.tokens, 0)):
            some = batch([[rows[i] for i in line] for line in lines]).to(self.model.device)
            loss = -self.model.told(some, self.roles.policy.states(some)).logprobs.sum()
            (self.settings.replay * loss * counts / count).backward()
            total += counts * float(loss.detach())
        return float(self.parallel.sum(torch.tensor(total))) / count

    def _moments(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, variance) over the actions of all processes."""
        some = torch.where(mask, values, 0).double()
        count, total = self.parallel.sum(torch.stack([mask.sum().double(), some.sum()]))
        mean = total / count
        square = self.parallel.sum(torch.where(mask, (values.double() - mean) ** 2, 0).sum())
        return mean.float(), (square / (count - 1).clamp(min=1)).float()

    def _adapt_kl(self, nats: float, replies: int) -> None:
        how = self.settings.kl
        if how.target is not None:
            self.kl = losses.adapted(self.kl, nats, how.target, how.horizon, replies)

    @torch.no_grad()
    def _measured(self, made: Experience) -> dict[str, float]:
        """What the replies are like, over all processes."""
        acts, n = made.acts, len(made.replies)
        k1, k2, k3 = losses.kl_estimates(made.old, made.reference)
        sums = [torch.where(acts, one, 0).sum() for one in (k1, k2, k3, made.entropy)]
        ended = sum(reply.finish == "stop" for reply in made.replies)
        engine = sum(sum(reply.drawn) for reply in made.replies)
        scores = (made.scores.sum(), (made.scores**2).sum())
        mine = [float(one) for one in (acts.sum(), *scores, made.old.sum(), *sums)]
        counts = [float(n), float(ended), engine]
        total = self.parallel.sum(torch.tensor([*counts, *mine], dtype=torch.float64)).tolist()
        replies, stopped, drawn, tokens, score, squares, old, k1s, k2s, k3s, entropy = total
        mean = score / replies
        return {
            "reward/mean": mean, "reward/std": max(squares / replies - mean**2, 0.0) ** 0.5,
            "kl/reply": k1s / replies, "kl/k1": k1s / tokens, "kl/k2": k2s / tokens, "kl/k3": k3s / tokens,
            "kl/coefficient": self.kl, "reply/tokens": tokens / replies, "reply/ended": stopped / replies,
            "reply/entropy": entropy / tokens, "engine/k1": (drawn - old) / tokens,
            "replies": replies, "tokens": tokens, "lr": self.policy.lr,
        }  # fmt: skip

    # --- going on after a crash

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        return {"policy": self.policy.state(), "critic": self.critic.state(), "kl": self.kl, "updates": self.updates}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes everything back to the bit."""
        self.policy.restore(state["policy"])
        self.critic.restore(state["critic"])
        self.kl, self.updates = state["kl"], state["updates"]


def _shuffled(parts: Sequence[list[int]], minibatches: int, seed: str) -> list[list[list[int]]]:
    """The parts in a new order, in so many minibatches of about as many parts; none is empty."""
    order = list(parts)
    random.Random(seed).shuffle(order)
    count = min(minibatches, len(order))
    return [order[i::count] for i in range(count)]


# --- a run


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a policy is made from a model that was tuned on demonstrations.

    model: that model's folder, also the reference. prompts: files of any records; those of the split `test` measure.
    rewards: at least one; those with a limit are constraints. critic: a reward model's folder, whose first member the
    critic begins as. held_out: a reward model that is not trained on, whose score tells of reward hacking.
    demonstrations: rows to replay with the weight `ppo.replay`. max_prompt: tokens; longer ones are left out. lora:
    None trains all weights of the policy; the reference, with reward models on it, is a model of its own then. engine:
    `local`, or the address, with `/v1`, of a vLLM server that takes what is trained (`alignment.server`); set `ppo.cap`
    then. batch: replies that the local one draws at once. often: updates between two measurements and samples, for
    which `shown` prompts are asked.
    """

    model: Path
    prompts: tuple[Path, ...]
    output: Path
    rewards: tuple[Source, ...]
    updates: int = 100
    ppo: Settings = field(default_factory=Settings)
    critic: Path | None = None
    held_out: Path | None = None
    demonstrations: tuple[Path, ...] = ()
    max_prompt: int = 512
    lora: LoraShape | None = field(default_factory=LoraShape)
    optimiser: Adam = field(default_factory=lambda: Adam(lr=2e-5, eps=1e-5, schedule="constant"))
    critic_lr: float | None = 1e-4
    lagrange: Lagrange = field(default_factory=Lagrange)
    bounds: Bounds = field(default_factory=Bounds)
    engine: str = "local"
    batch: int = 64
    seed: int = 0
    device: str = ""
    precision: Precision = "float32"
    shard: bool = False
    often: int = 25
    shown: int = 16
    checkpoint: int = 10
    trackers: tuple[TrackerName, ...] = ()

    def __post_init__(self) -> None:
        if not self.rewards or all(one.limit is not None for one in self.rewards):
            raise ValueError("rewards has at least one that is no constraint (without a limit)")
        names = [one.name for one in self.rewards]
        if len(set(names)) < len(names):
            raise ValueError("every reward has a name of its own")


def train(how: Recipe, tell: Tell = print) -> Path:
    """The release that the recipe makes; its run's folder has metrics, checkpoints, samples and a report.

    Raises Diverged, Hacked, RewardError; the run goes on from its last checkpoint when it is started again.
    """
    parallel = Parallel(how.device, how.shard, tell)
    torch.manual_seed(how.seed)
    model, apart = _models(how, parallel)
    frozen = apart.frozen if apart else model
    asked = material.Material[Any].read(how.prompts, tell=tell)
    train, test = _prompts(model, asked, how.max_prompt)
    judge = Judge(frozen, how.rewards, train | test, how.lagrange, how.bounds, how.held_out)
    shown_again = material.Material.read(how.demonstrations, Demonstration, tell)
    rows = shown_again.made(lambda one: model.template.conversation(one.messages, one.turns, one.tools, one.after))
    replayed = [one.what for one in rows["train"]]
    adapter = POLICY if how.lora else None
    local, first = Local(model, adapter, how.batch), Local(frozen, None, how.batch)
    far = how.engine != "local"
    engine: Engine = Server(how.engine, model, adapter, how.output / "pushed", parallel) if far else local
    made = Ppo(
        model, how.ppo, engine, judge.score, how.optimiser, how.updates, parallel, how.lora, how.critic_lr, how.critic,
        apart,
    )  # fmt: skip
    _check_enough(parallel, how.ppo.prompts, replayed)
    run = Run.open(how.output, recipes.dump(how), how.updates, parallel, tell, how.checkpoint, how.trackers)
    if parallel.leads:
        material.write(how.output, asked, shown_again, tell=tell)
    if state := run.resume():
        made.restore(state["ppo"])
        judge.restore(state["judge"])
    order, shown = _order(list(train), how), list(test)[: how.shown]
    drawn = how.ppo.limit, how.ppo.temperature
    doing("drawing the first samples")
    before = judge.replied(first, shown, *drawn)
    while run.step < how.updates:
        seed = how.seed * 1_000_003 + run.step
        again = random.Random(f"{seed}:replay").sample(replayed, min(len(replayed), how.ppo.prompts))
        found = made.update(parallel.share(order[run.step]), seed, parallel.share(again))
        found |= judge.settled(found, parallel)
        if shown and ((run.step + 1) % how.often == 0 or run.step + 1 == how.updates):
            doing("drawing samples")
            after = judge.replied(local, shown, *drawn)
            found["test/score"] = sum(score for _, score in after) / len(after)
            run.samples(samples(before, after))
        run.record(found, lambda: {"ppo": made.state(), "judge": judge.state()})
    doing("comparing replies before and after")
    results = judge.compared(local, first, list(test), *drawn)
    run.end(results)
    whole = model.gathered(parallel.leads)
    if parallel.leads:
        (how.output / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")
        data = asked.fingerprints | shown_again.fingerprints
        card = release.Provenance("ppo", str(how.model), recipes.dump(how), data, results)
        release.write(whole, adapter, how.output / "release", card)
        report.write(how.output, "Proximal policy optimisation")
    parallel.wait()
    return how.output / "release"


def _models(how: Recipe, parallel: Parallel) -> tuple[Model, Apart | None]:
    """The policy's model, and those beside it that the recipe needs."""

    def load(frozen: bool) -> Model:
        return Model.load(how.model, str(parallel.device), how.precision, frozen, parallel.mesh)

    model, own = load(how.lora is not None), how.ppo.critic == "model"
    if how.lora and not own:
        return model, None
    return model, Apart(model if how.lora else load(frozen=True), load(frozen=False) if own else None)


def _check_enough(parallel: Parallel, prompts: int, replayed: Sequence[Row]) -> None:
    """Raises ValueError where a process would have nothing to do, for which the others would wait."""
    if prompts < parallel.size or 0 < len(replayed) < parallel.size:
        raise ValueError(
            f"there are {parallel.size} processes, and ppo.prompts, or the demonstrations, are fewer; start fewer "
            "processes, or raise ppo.prompts"
        )


_Prompts = dict[tuple[int, ...], tuple[Message, ...]]


def _prompts(model: Model, asked: material.Material[Any], longest: int) -> tuple[_Prompts, _Prompts]:
    """The messages behind the tokens of each prompt, each once: those that are trained, and those that measure."""
    found = asked.made(lambda one: model.template.prompt(dataset.prompt_of(one), one.tools))
    train, test = (asked.fitting(found[split], longest, "max_prompt", len) for split in SPLITS)
    return _by_ids(train), _by_ids(test)


def _by_ids(some: Sequence[material.Made[Any, tuple[int, ...]]]) -> _Prompts:
    return {one.what: dataset.prompt_of(one.record) for one in some}


def _order(prompts: Sequence[tuple[int, ...]], how: Recipe) -> list[list[tuple[int, ...]]]:
    """The prompts of every update: all of them once, in random order, before one comes again."""
    if len(prompts) < how.ppo.prompts:
        raise ValueError(f"there are {len(prompts)} prompts to train on and ppo.prompts is {how.ppo.prompts}")
    found: list[tuple[int, ...]] = []
    for epoch in range(-(-how.updates * how.ppo.prompts // len(prompts))):
        again = list(prompts)
        random.Random(f"{how.seed}:{epoch}:prompts").shuffle(again)
        found += again
    return [found[i * how.ppo.prompts : (i + 1) * how.ppo.prompts] for i in range(how.updates)]
