"""What all trainers share: a run's folder, the optimiser, the processes it is spread over, going on after a crash.

A run that is killed goes on from its last checkpoint and ends with the same bits: weights, optimiser, random state, how
far it had come in the data, and whatever else a trainer keeps are in one file that replaces the one before at once.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from alignment import progress, shard, trackers
from alignment.progress import Lines, Start, Tell, Watcher, doing, through
from alignment.trackers import TrackerName, Trackers

T = TypeVar("T")
METRICS, STATE, SAMPLES, RECIPE = "metrics.jsonl", "state.pt", "samples.jsonl", "recipe.toml"


class Diverged(RuntimeError):
    """A loss or a gradient is not a number; the message says at which step and what to change."""


class RunError(ValueError):
    """A run's folder cannot be used; the message says why, and what to do."""


# --- processes


class Parallel:
    """The processes of a run, one a device, as accelerate or torchrun started them; just this one where nobody did.

    Each works on its own part of every update; sums of what they find are the same in all, so that a run with two ends
    with the weights of a run with one, to rounding.
    """

    def __init__(self, device: str = "", sharded: bool = False, tell: Tell = print):
        """device: `cpu`, `cuda`, or empty for a GPU where there is one. sharded: each process keeps a part of the
        model's weights only (`alignment.shard`); a single process has them all, and says so."""
        self._accelerator: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator

            self._accelerator = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())
        accelerator = self._accelerator
        self.rank: int = accelerator.process_index if accelerator else 0
        self.size: int = accelerator.num_processes if accelerator else 1
        found = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = accelerator.device if accelerator else torch.device(device or found)
        self.mesh: DeviceMesh | None = None
        if sharded and accelerator:
            self.mesh = init_device_mesh(self.device.type, (self.size,))
        elif sharded:
            tell("shard = true: there is one process, which holds all weights; start several with torchrun")

    @property
    def leads(self) -> bool:
        """True in the process that writes the run's folder."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part: every size-th one."""
        return items[self.rank :: self.size]

    def passes(self, items: Sequence[T]) -> list[tuple[T, bool]]:
        """This process's part, each with True. Where weights are sharded all processes must make as many passes: one
        that has an item less gets one more, with False, that is not to count."""
        mine = [(one, True) for one in self.share(items)]
        if self.mesh is not None and len(mine) * self.size < len(items):
            mine.append((items[0], False))
        return mine

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self._accelerator is None:
            return values
        total: Tensor = self._accelerator.reduce(values.to(self.device), "sum")
        return total

    def gathered(self, items: Sequence[T]) -> list[T]:
        """What all processes have, in the order in which `share` dealt it out."""
        if self._accelerator is None:
            return list(items)
        parts: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(parts, list(items))
        longest = max(map(len, parts))
        return [part[i] for i in range(longest) for part in parts if i < len(part)]

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Adds up the gradients of all processes, in one message; a parameter that one has not used counts as 0.

        Those of sharded parameters have been added up by their passes.
        """
        mine = [one for one in parameters if one.requires_grad and not isinstance(one, DTensor)]
        if self._accelerator is None or not mine:
            return
        flat = torch.cat([(one.grad if one.grad is not None else torch.zeros_like(one)).flatten() for one in mine])
        for one, part in zip(mine, self.sum(flat).split([one.numel() for one in mine]), strict=True):
            one.grad = part.view_as(one)

    def norm(self, gradients: Sequence[Tensor]) -> float:
        """Of all gradients as one vector, after they were added up; 0 of none."""
        whole = [one for one in gradients if not isinstance(one, DTensor)]
        found = torch.nn.utils.get_total_norm(whole) if whole else torch.zeros((), device=self.device)
        if parts := shard.local([one for one in gradients if isinstance(one, DTensor)]):
            found = (found**2 + self.sum(torch.nn.utils.get_total_norm(parts) ** 2)).sqrt()
        return float(found)

    def wait(self) -> None:
        """Returns when all processes are here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()


# --- the optimiser


@dataclass(frozen=True, slots=True)
class Adam:
    """How weights are changed: AdamW.

    lr: at its highest. warmup: share of the updates in which it rises from 0; then it stays, or falls to 0 along a line
    or a cosine. clip: the greatest norm of all gradients together, 0 for none. eps: 1e-5 is what PPO was tuned with.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay: float = 0.0
    clip: float = 1.0
    warmup: float = 0.05
    schedule: Literal["constant", "linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        if self.lr < 0 or self.clip < 0 or not 0 <= self.warmup <= 1:
            raise ValueError("lr and clip are at least 0, warmup is between 0 and 1")

    def at(self, update: int, updates: int) -> float:
        """The learning rate of an update, counted from 0."""
        rise = self.warmup * updates
        if update < rise:
            return self.lr * (update + 1) / max(rise, 1)
        left = (updates - update) / max(updates - rise, 1)
        shapes = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}
        return self.lr * min(shapes[self.schedule], 1.0)


class Optimiser:
    """AdamW over some parameters, with the gradients of all processes added up and clipped together."""

    def __init__(self, parameters: Sequence[nn.Parameter], how: Adam, updates: int, parallel: Parallel):
        self.parameters, self._how, self._updates, self._parallel = list(parameters), how, updates, parallel
        for one in self.parameters:
            one.requires_grad_(True)
        mixed = len({isinstance(one, DTensor) for one in self.parameters}) > 1  # which cannot be changed in one go
        foreach = False if mixed else None
        self._adam = torch.optim.AdamW(self.parameters, how.lr, how.betas, how.eps, how.decay, foreach=foreach)
        self.done = 0

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return self._how.at(self.done, self._updates)

    def step(self, count: bool = True) -> float:
        """The norm of the gradients before they were clipped; the weights have changed. Raises Diverged.

        count: the schedule goes on; PPO's does once for all steps on the same rollouts.
        """
        self._parallel.add_gradients(self.parameters)
        grads = [one.grad for one in self.parameters if one.grad is not None]
        norm = self._parallel.norm(grads)
        if not math.isfinite(norm):
            raise Diverged(
                f"update {self.done}: the gradient is not a number. Lower optimiser.lr, or look at the rows of this "
                "update (their order is in the checkpoint); the run goes on from its last checkpoint."
            )
        for group in self._adam.param_groups:
            group["lr"] = self.lr
        if self._how.clip and norm > self._how.clip:
            torch._foreach_mul_(shard.local(grads), self._how.clip / norm)
        self._adam.step()
        self.forget()
        self.done += count
        return norm

    def forget(self) -> None:
        """Drops the gradients."""
        self._adam.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """What `restore` takes, in however many processes; the leading one has all of what is sharded, others none."""
        leads, adam = self._parallel.leads, self._adam.state_dict()
        adam["state"] = {
            number: {name: shard.gathered(one, leads) for name, one in kept.items()}
            for number, kept in adam["state"].items()
        }
        weights = [shard.gathered(one.detach(), leads) for one in self.parameters]
        return {"adam": adam, "done": self.done, "weights": weights}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes weights and moments back to the bit."""
        with torch.no_grad():
            for mine, kept in zip(self.parameters, state["weights"], strict=True):
                mine.copy_(shard.like(kept, mine))
        moments = {
            number: {name: shard.like(one, self.parameters[number]) for name, one in kept.items()}
            for number, kept in state["adam"]["state"].items()
        }
        self._adam.load_state_dict({**state["adam"], "state": moments})
        self.done = state["done"]


def scaled(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiplies the gradients: sums of losses become means once it is known of how many."""
    if grads := [one.grad for one in parameters if one.grad is not None]:  # none where a process had no part to do
        torch._foreach_mul_(shard.local(grads), factor)


# --- the folder


@dataclass(slots=True)
class Run:
    """The folder of a run, its metrics and its checkpoints. every: updates between two checkpoints.

    watchers: who is told of it; none but in the leading process.
    """

    folder: Path
    updates: int
    parallel: Parallel
    tell: Tell = print
    every: int = 50
    watchers: Sequence[Watcher] = ()
    step: int = 0

    @classmethod
    def open(
        cls, folder: Path, recipe: str, updates: int, parallel: Parallel, tell: Tell = print, every: int = 50,
        tracked: Sequence[TrackerName] = (),
    ) -> Run:  # fmt: skip
        """A new run, or the one that lies in the folder; raises RunError when that one was made by another recipe.

        tracked: the trackers that are told of it. Raises TrackerError where one of them cannot be used.
        """
        trackers.check(tracked)
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / RECIPE
        if kept.is_file() and (folder / STATE).is_file() and kept.read_text() != recipe:
            raise RunError(f"{folder} holds a run of another recipe ({kept}); give this one a folder of its own")
        watchers: list[Watcher] = []
        if parallel.leads:
            if not (kept.is_file() and kept.read_text() == recipe):  # the others may be reading it
                kept.write_text(recipe)
            watchers = [*([Trackers(tracked, tell)] if tracked else []), progress.watcher() or Lines(tell)]
        parallel.wait()
        return cls(folder, updates, parallel, tell, every, watchers)

    def resume(self) -> Mapping[str, Any]:
        """What the last checkpoint kept, its random state restored; empty where there is none.

        Metrics that came after it are cut off: they will come again, the same.
        """
        path, kept = self.folder / STATE, dict[str, Any]()
        if path.is_file():
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # once a machine
            self.step, kept = state["step"], state["kept"]
            _restore_random(state)
        told = self._cut() if self.parallel.leads else 0
        self.parallel.wait()
        if self.step:
            self.tell(f"going on from update {self.step} of {self.updates} ({path})")
        start = Start(self.folder, (self.folder / RECIPE).read_text(), self.updates, self.step, told)
        for watcher in self.watchers:
            watcher.began(start)
        return kept

    def _cut(self) -> int:
        """Cuts off what came after the last checkpoint; returns the last update that was recorded."""
        told = 0
        for name in (METRICS, SAMPLES):
            path = self.folder / name
            lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
            steps = {line: json.loads(line)["step"] for line in lines if line.endswith("\n")}
            told = max([told, *steps.values()])
            if lines:
                _replace(path, "".join(line for line in lines if steps.get(line, math.inf) <= self.step).encode())
        return told

    def save(self, kept: Mapping[str, Any]) -> None:
        """Writes a checkpoint in the place of the last: whole, or not at all."""
        if not self.parallel.leads:
            return
        state = {
            "step": self.step,
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "kept": dict(kept),
        }
        path = self.folder / STATE
        torch.save(state, path.with_suffix(".new"))
        _settle(path.with_suffix(".new"), path)

    def record(self, metrics: Mapping[str, float], kept: Callable[[], Mapping[str, Any]]) -> None:
        """Ends an update: writes its metrics, tells of it, and keeps a checkpoint when one is due."""
        self.step += 1
        if self.parallel.leads:
            line = {"step": self.step, "time": round(time.time(), 3)} | {k: _number(v) for k, v in metrics.items()}
            with (self.folder / METRICS).open("a") as file:
                file.write(json.dumps(line) + "\n")
        for watcher in self.watchers:
            watcher.updated(self.step, metrics)
        if self.step % self.every == 0 or self.step == self.updates:
            self.save(kept())

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows to the samples of the report; each gets the step of the update that is under way."""
        for watcher in self.watchers:
            watcher.sampled(self.step + 1, rows)
        if self.parallel.leads:
            with (self.folder / SAMPLES).open("a") as file:
                file.writelines(json.dumps({"step": self.step + 1, **row}) + "\n" for row in rows)

    def end(self, results: Mapping[str, Any]) -> None:
        """Tells what was measured after the last update; who watches is told nothing more."""
        for watcher in self.watchers:
            watcher.ended(results)


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _restore_random(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _replace(path: Path, content: bytes) -> None:
    new = path.with_name(path.name + ".new")
    new.write_bytes(content)
    _settle(new, path)


def _settle(new: Path, path: Path) -> None:
    """Puts a file in another's place, so that after a crash there is one or the other."""
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(path)


# --- learning from rows


@dataclass(frozen=True, slots=True)
class Part:
    """What one forward pass says: the sum of the losses of `count` tokens or rows, and of other measures of them."""

    loss: Tensor
    count: float
    sums: Mapping[str, float] = field(default_factory=dict)


def fit(
    run: Run,
    optimiser: Optimiser,
    updates: Sequence[Sequence[T]],
    forward: Callable[[T], Part],
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    often: int = 0,
) -> Mapping[str, float]:
    """Changes the weights by all updates, from the last checkpoint on; metrics are means over whole updates.

    Returns what was measured after the last one, nothing where no update was left to make.

    updates: of each its parts, which are shared out among the processes. evaluate: measures on held-out rows, before
    the first update, after every `often`, and after the last. Raises Diverged.
    """
    if state := run.resume():
        optimiser.restore(state)
    last: Mapping[str, float] = {}
    while run.step < len(updates):
        began, found = time.perf_counter(), dict[str, float]()
        if evaluate and (run.step == 0 or (often and run.step % often == 0)):
            doing("measuring")
            found |= evaluate()
        sums = {"loss": 0.0, "count": 0.0}
        for item, counts in through(run.parallel.passes(updates[run.step]), "learning"):
            part = forward(item)
            (part.loss * counts).backward()
            if not counts:
                continue
            for name, value in (("loss", float(part.loss.detach())), ("count", part.count), *part.sums.items()):
                sums[name] = sums.get(name, 0.0) + value
        sums = _summed(sums, run.parallel)
        count = sums.pop("count")
        _check_finite(sums["loss"], run.step)
        scaled(optimiser.parameters, 1 / (count or 1))
        lr, norm = optimiser.lr, optimiser.step()
        found |= {name: value / (count or 1) for name, value in sums.items()}
        found |= {"grad": norm, "lr": lr, "count": count, "per_second": count / (time.perf_counter() - began)}
        if evaluate and run.step + 1 == len(updates):
            doing("measuring")
            last = evaluate()
            found |= last
        run.record(found, optimiser.state)
    return last


def _summed(sums: dict[str, float], parallel: Parallel) -> dict[str, float]:
    if parallel.size == 1:
        return sums
    names = list(dict.fromkeys(name for part in parallel.gathered([list(sums)]) for name in part))
    total = parallel.sum(torch.tensor([sums.get(name, 0.0) for name in names], dtype=torch.float64))
    return dict(zip(names, total.tolist(), strict=True))


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise Diverged(
            f"update {step}: the loss is {loss}. Lower optimiser.lr, or look at the rows of this update; the run goes "
            "on from its last checkpoint."
        )
