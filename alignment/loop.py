"""What all trainers share: a run's folder, the optimiser, the processes it is spread over, going on after a crash.

A run that is killed goes on from its last checkpoint and ends with the same bits: weights, optimiser, random state, how
far it had come in the data, and whatever else a trainer keeps are in one file that replaces the one before at once.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
Tell = Callable[[str], object]
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

    def __init__(self, device: str = ""):
        """device: `cpu`, `cuda`, or empty for a GPU where there is one."""
        self._accelerator: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator

            self._accelerator = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())
        accelerator = self._accelerator
        self.rank: int = accelerator.process_index if accelerator else 0
        self.size: int = accelerator.num_processes if accelerator else 1
        found = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = accelerator.device if accelerator else torch.device(device or found)

    @property
    def leads(self) -> bool:
        """True in the process that writes the run's folder."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part: every size-th one."""
        return items[self.rank :: self.size]

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
        """Adds up the gradients of all processes, in one message; a parameter that one has not used counts as 0."""
        if self._accelerator is None:
            return
        mine = [one for one in parameters if one.requires_grad]
        flat = torch.cat([(one.grad if one.grad is not None else torch.zeros_like(one)).flatten() for one in mine])
        for one, part in zip(mine, self.sum(flat).split([one.numel() for one in mine]), strict=True):
            one.grad = part.view_as(one)

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
        self._adam = torch.optim.AdamW(self.parameters, how.lr, how.betas, how.eps, how.decay)
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
        norm = float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
        if not math.isfinite(norm):
            raise Diverged(
                f"update {self.done}: the gradient is not a number. Lower optimiser.lr, or look at the rows of this "
                "update (their order is in the checkpoint); the run goes on from its last checkpoint."
            )
        for group in self._adam.param_groups:
            group["lr"] = self.lr
        if self._how.clip and norm > self._how.clip:
            torch._foreach_mul_(grads, self._how.clip / norm)
        self._adam.step()
        self.forget()
        self.done += count
        return norm

    def forget(self) -> None:
        """Drops the gradients."""
        self._adam.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        return {"adam": self._adam.state_dict(), "done": self.done, "weights": [p.detach() for p in self.parameters]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes weights and moments back to the bit."""
        with torch.no_grad():
            for mine, kept in zip(self.parameters, state["weights"], strict=True):
                mine.copy_(kept)
        self._adam.load_state_dict(state["adam"])
        self.done = state["done"]


def scaled(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiplies the gradients: sums of losses become means once it is known of how many."""
    if grads := [one.grad for one in parameters if one.grad is not None]:  # none where a process had no part to do
        torch._foreach_mul_(grads, factor)


# --- the folder


@dataclass(slots=True)
class Run:
    """The folder of a run, its metrics and its checkpoints. every: updates between two checkpoints."""

    folder: Path
    updates: int
    parallel: Parallel
    tell: Tell = print
    every: int = 50
    step: int = 0
    _began: float = field(default_factory=time.monotonic)
    _first: int = 0

    @classmethod
    def open(
        cls, folder: Path, recipe: str, updates: int, parallel: Parallel, tell: Tell = print, every: int = 50
    ) -> Run:
        """A new run, or the one that lies in the folder; raises RunError when that one was made by another recipe."""
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / RECIPE
        if kept.is_file() and (folder / STATE).is_file() and kept.read_text() != recipe:
            raise RunError(f"{folder} holds a run of another recipe ({kept}); give this one a folder of its own")
        if parallel.leads:
            kept.write_text(recipe)
        parallel.wait()
        return cls(folder, updates, parallel, tell, every)

    def resume(self) -> Mapping[str, Any]:
        """What the last checkpoint kept, its random state restored; empty where there is none.

        Metrics that came after it are cut off: they will come again, the same.
        """
        path = self.folder / STATE
        if not path.is_file():
            if self.parallel.leads:
                for name in (METRICS, SAMPLES):
                    (self.folder / name).unlink(missing_ok=True)
            return {}
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        self.step = self._first = state["step"]
        torch.set_rng_state(state["torch"])
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        if torch.cuda.is_available() and state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])
        if self.parallel.leads:
            self._cut()
        self.parallel.wait()
        self.tell(f"going on from update {self.step} of {self.updates} ({path})")
        kept: Mapping[str, Any] = state["kept"]
        return kept

    def _cut(self) -> None:
        for name in (METRICS, SAMPLES):
            path = self.folder / name
            lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step]
            _replace(path, "".join(kept).encode())

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
            self.tell(self._line(metrics))
        if self.step % self.every == 0 or self.step == self.updates:
            self.save(kept())

    def samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows to the samples of the report; each gets the step of the update that is under way."""
        if self.parallel.leads:
            with (self.folder / SAMPLES).open("a") as file:
                file.writelines(json.dumps({"step": self.step + 1, **row}) + "\n" for row in rows)

    def _line(self, metrics: Mapping[str, float]) -> str:
        done = self.step - self._first
        left = (time.monotonic() - self._began) / done * (self.updates - self.step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[:6])
        return f"update {self.step}/{self.updates}  {shown}  {_clock(left)} left"

    @property
    def room(self) -> int:
        """Bytes that are free where the folder is."""
        return shutil.disk_usage(self.folder).free


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


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
) -> None:
    """Changes the weights by all updates, from the last checkpoint on; metrics are means over whole updates.

    updates: of each its parts, which are shared out among the processes. evaluate: measures on held-out rows, before
    the first update, after every `often`, and after the last. Raises Diverged.
    """
    if state := run.resume():
        optimiser.restore(state)
    while run.step < len(updates):
        began, found = time.perf_counter(), dict[str, float]()
        if evaluate and (run.step == 0 or (often and run.step % often == 0)):
            found |= evaluate()
        sums = {"loss": 0.0, "count": 0.0}
        for item in run.parallel.share(updates[run.step]):
            part = forward(item)
            part.loss.backward()
            for name, value in (("loss", float(part.loss.detach())), ("count", part.count), *part.sums.items()):
                sums[name] = sums.get(name, 0.0) + value
        sums = _summed(sums, run.parallel)
        count = sums.pop("count")
        _check_finite(sums["loss"], run.step)
        scaled(optimiser.parameters, 1 / max(count, 1))
        lr, norm = optimiser.lr, optimiser.step()
        found |= {name: value / max(count, 1) for name, value in sums.items()}
        found |= {"grad": norm, "lr": lr, "count": count, "per_second": count / (time.perf_counter() - began)}
        if evaluate and run.step + 1 == len(updates):
            found |= evaluate()
        run.record(found, optimiser.state)


def _summed(sums: dict[str, float], parallel: Parallel) -> dict[str, float]:
    if parallel.size == 1:
        return sums
    names = sorted({name for part in parallel.gathered([sorted(sums)]) for name in part})
    total = parallel.sum(torch.tensor([sums.get(name, 0.0) for name in names], dtype=torch.float64))
    return dict(zip(names, total.tolist(), strict=True))


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise Diverged(
            f"update {step}: the loss is {loss}. Lower optimiser.lr, or look at the rows of this update; the run goes "
            "on from its last checkpoint."
        )
