"""Trackers: a run's metrics, recipe and samples in TensorBoard, Weights & Biases or trackio, beside the run's folder.

Each is a library of its own that is loaded only when a recipe names it. None of them can end a run: one that fails is
told of once, and told nothing more. A run that goes on is the same one in its tracker, by the id in `trackers.json`.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from typing import Any, Literal

from alignment.progress import Start, Tell, Watcher

TrackerName = Literal["tensorboard", "wandb", "trackio"]
KEPT, EVENTS = "trackers.json", "tensorboard"
PROJECT = "newel"


class TrackerError(ValueError):
    """A tracker that a recipe names cannot be used; the message says what to type."""


def check(names: Sequence[TrackerName]) -> None:
    """Raises TrackerError where a library is missing, or nobody is logged in to its server; loads only what it must."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise TrackerError(
            f"trackers: {', '.join(missing)} is not installed: pip install 'newel[trackers]', or "
            f"pip install {' '.join(missing)}"
        )
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") == "online" and not _logged_in():
        raise TrackerError(
            "trackers: nobody is logged in to Weights & Biases: type `wandb login`, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline to write to the run's folder only"
        )


def _logged_in() -> bool:
    """Whether there are credentials for W&B. Its server is not asked: without a network the run should go on alone."""
    with redirect_stdout(sys.stderr):
        return bool(importlib.import_module("wandb").login(prompt=False, verify=False))


class Trackers(Watcher):
    """All trackers of a run, of which each is dropped when it fails."""

    def __init__(self, names: Sequence[TrackerName], tell: Tell):
        self._live: dict[TrackerName, Watcher] = {name: KINDS[name]() for name in dict.fromkeys(names)}
        self._tell = tell

    def began(self, start: Start) -> None:
        """Opens each for a new run, or for the one that goes on."""
        self._each(lambda one: one.began(start))

    def updated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tells them the metrics of an update."""
        self._each(lambda one: one.updated(step, metrics))

    def sampled(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Tells them replies, as a table."""
        self._each(lambda one: one.sampled(step, rows))

    def ended(self, results: Mapping[str, Any]) -> None:
        """Tells them the last measures, as `evaluation/...`, and closes them."""
        self._each(lambda one: one.ended(results))

    def _each(self, act: Callable[[Watcher], None]) -> None:
        for name, one in list(self._live.items()):
            try:
                with redirect_stdout(sys.stderr):  # whose lines are for people; stdout has the release's folder
                    act(one)
            except Exception as error:  # whatever it is, training goes on
                del self._live[name]
                reason = str(error).strip().partition("\n")[0]
                self._tell(f"{name} failed and is left out from here on ({type(error).__name__}: {reason})")


class TensorBoard(Watcher):
    """Event files in the run's folder. What came after the last checkpoint is cut off when a run goes on."""

    def __init__(self) -> None:
        self._writer: Any = None

    def began(self, start: Start) -> None:
        """Opens the files, with the recipe as a text."""
        kind = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = kind(str(start.folder / EVENTS), purge_step=start.step + 1 if start.step else 0)
        self._writer.add_text("recipe", _block(start.recipe), start.step)

    def updated(self, step: int, metrics: Mapping[str, float]) -> None:
        """A scalar a metric, at once in the file."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def sampled(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table as text."""
        self._writer.add_text("samples", _table(rows), step)

    def ended(self, results: Mapping[str, Any]) -> None:
        """The results as a text."""
        self._writer.add_text("evaluation", _block(json.dumps(results, indent=2)))
        self._writer.close()


class Wandb(Watcher):
    """A run of Weights & Biases; WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE and its other variables count."""

    def __init__(self) -> None:
        self._run: Any = None
        self._told = 0

    def began(self, start: Start) -> None:
        """Opens the run, or the one that goes on: updates that it was told of before are not told again."""
        wandb = importlib.import_module("wandb")
        id, self._told = kept("wandb", start)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=start.folder.name, id=id, resume="allow",
            dir=str(start.folder), config=tomllib.loads(start.recipe), reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip

    def updated(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step of its history."""
        if step > self._told:
            self._run.log(dict(metrics), step=step, commit=True)

    def sampled(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table."""
        if step > self._told:
            table = importlib.import_module("wandb").Table(list(rows[0]), [list(row.values()) for row in rows])
            self._run.log({"samples": table}, step=step)

    def ended(self, results: Mapping[str, Any]) -> None:
        """The results in its summary."""
        self._run.summary.update(flat(results))
        self._run.finish()


class Trackio(Watcher):
    """A run of trackio, on this machine unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names another place."""

    def __init__(self) -> None:
        self._run: Any = None
        self._told = self._step = 0

    def began(self, start: Start) -> None:
        """Opens the run, or the one that goes on: updates that it was told of before are not told again."""
        id, self._told = kept("trackio", start)
        name = f"{start.folder.name}-{id}"
        self._run = importlib.import_module("trackio").init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=name, resume="allow", embed=False,
            config=tomllib.loads(start.recipe),
        )  # fmt: skip

    def updated(self, step: int, metrics: Mapping[str, float]) -> None:
        """A row of its log."""
        self._step = step
        if step > self._told:
            self._run.log(dict(metrics), step=step)

    def sampled(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table."""
        if step > self._told:
            self._run.log({"samples": importlib.import_module("trackio").Table(data=list(rows))}, step=step)

    def ended(self, results: Mapping[str, Any]) -> None:
        """The results with the last update."""
        self._run.log(flat(results), step=self._step)
        self._run.finish()


KINDS: Mapping[TrackerName, Callable[[], Watcher]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def kept(name: TrackerName, start: Start) -> tuple[str, int]:
    """(the id of a run in a tracker, the last update that the tracker was told of): new ones for a run that begins.

    Updates between the last checkpoint and a crash come again when the run goes on, more than once if it crashes again
    before it is past them; the greatest is kept.
    """
    path = start.folder / KEPT
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if start.step and name in known:
        found = {"id": known[name]["id"], "told": max(known[name]["told"], start.told)}
    else:
        found = {"id": secrets.token_hex(4), "told": start.step}
    path.write_text(json.dumps(known | {name: found}, indent=2) + "\n")
    return found["id"], found["told"]


def flat(results: Mapping[str, Any], above: str = "evaluation") -> dict[str, float]:
    """The numbers in results by their paths: `evaluation/accuracy/low`."""
    found: dict[str, float] = {}
    for name, value in results.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}/{name}")
        elif isinstance(value, (int, float)):
            found[f"{above}/{name}"] = value
    return found


def _block(text: str) -> str:
    """A text as it is, in Markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table in Markdown."""
    names = list(rows[0])
    cells = [[f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in names] for row in rows]
    lines = [names, ["---"] * len(names), *cells]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", "<br>") for cell in one) + " |" for one in lines
    )
