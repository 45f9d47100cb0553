"""`newel train`: models from recipes."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from alignment import progress
from alignment.progress import Tell
from app.shell import Refusal, told
from app.train_progress import UNITS, Display

app = typer.Typer(no_args_is_help=True, help="Training: a model from a recipe. It needs the extra `train`.")

File = Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="A TOML file; docs/training.md has its keys.")]
Changes = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="What the recipe says otherwise: optimiser.lr=1e-5")
]
Dry = Annotated[bool, typer.Option("--dry-run", help="Checks recipe and data, tells memory and time, and ends.")]
BEFORE = "stopped before the first update; the same command starts it again"
APART = 5.0
"""Seconds that the leading process has to tell an error, and to end the others, before one of these tells its own."""


@app.command()
def sft(recipe: File = None, changes: Changes = None, dry_run: Dry = False) -> None:
    """Tunes a model on demonstrations."""
    _train("sft", recipe, changes, dry_run)


@app.command()
def reward(recipe: File = None, changes: Changes = None, dry_run: Dry = False) -> None:
    """Makes a reward model from preferred replies."""
    _train("reward", recipe, changes, dry_run)


@app.command()
def ppo(recipe: File = None, changes: Changes = None, dry_run: Dry = False) -> None:
    """Makes a policy that is rewarded more."""
    _train("ppo", recipe, changes, dry_run)


@app.command()
def dpo(recipe: File = None, changes: Changes = None, dry_run: Dry = False) -> None:
    """Makes a policy straight from pairs."""
    _train("dpo", recipe, changes, dry_run)


@app.command()
def kto(recipe: File = None, changes: Changes = None, dry_run: Dry = False) -> None:
    """Makes a policy from thumbs up and down."""
    _train("kto", recipe, changes, dry_run)


def _train(method: str, path: Path | None, changes: list[str] | None, dry_run: bool) -> None:
    overrides, rank = list(changes or []), int(os.environ.get("RANK", "0"))  # as torchrun sets it
    if path and "=" in str(path) and not path.is_file():  # no recipe, only changes
        path, overrides = None, [str(path), *overrides]
    try:
        module = _imported(method)
    except KeyboardInterrupt:
        raise Refusal(BEFORE, 130) from None
    except ImportError as error:
        raise Refusal(f"{error}: training needs the extra `train` (pip install 'newel[train]')") from None
    from alignment import recipe as recipes
    from alignment import trackers

    try:
        how = recipes.load(module.Recipe, path, overrides)
        if dry_run:
            if not rank:
                _estimated(method, how)
            return
        trackers.check(how.trackers)
        with _telling(method, rank) as tell:
            folder = _trained(module, how, tell)
    except (ValueError, OSError, RuntimeError) as error:
        if not rank:
            raise Refusal(_said(error)) from None
        time.sleep(APART)
        raise Refusal(f"process {rank}: {_said(error)}") from None
    if not rank:
        print(folder)


def _trained(module: Any, how: Any, tell: Tell) -> Path:
    """The release; raises Refusal where Ctrl-C ends the run."""
    try:
        folder: Path = module.train(how, tell)
    except KeyboardInterrupt:
        raise Refusal(_stopped(how), 130) from None
    return folder


def _imported(method: str) -> Any:
    """The trainer; its libraries take some seconds to load."""
    if sys.stdout.isatty() and sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # their bars would tear the display
        told("loading libraries")
    return importlib.import_module(f"alignment.{method}")


@contextmanager
def _telling(method: str, rank: int) -> Iterator[Tell]:
    """What a run tells to: the leading process's live display in a terminal, and lines where there is none."""
    console = Console(stderr=True)
    if rank or not (sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal):
        yield _silent if rank else told
        return
    with Display(console, UNITS[method]) as display, progress.watched(display):
        yield display.tell


def _stopped(how: Any) -> str:
    """Where a run was stopped, and how it goes on."""
    try:
        lines = (how.output / "metrics.jsonl").read_text().splitlines()
        step = json.loads(lines[-1])["step"]
    except (OSError, ValueError, IndexError):
        return BEFORE
    if (how.output / "state.pt").is_file():
        again = f"the same command goes on from its last checkpoint, of update {step - step % how.checkpoint}"
    else:
        again = f"the same command starts it again (the first checkpoint is made at update {how.checkpoint})"
    return f"stopped after update {step}; {again}"


def _silent(line: str) -> None:
    """Tells nobody: the leading process does."""


def _estimated(method: str, how: Any) -> None:
    """Prints the whole recipe, and what it will take."""
    from alignment import recipe

    estimate = importlib.import_module("alignment.estimate")  # torch comes with it, which the gateway never loads
    print(recipe.dump(how))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    print(estimate.told(estimate.of(method, how, estimate.lengths(method, how, told), processes=processes)))


def _said(error: Any) -> str:
    """The message of an error, with the knob to turn where memory has run out."""
    text = str(error)
    if "out of memory" in text.lower() or "can't allocate memory" in text.lower():
        return f"{text}\nOut of memory: lower `tokens` (of a forward pass), then `max_length`, or train with `lora`."
    return text
