"""`newel train`: models from recipes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from app.shell import Refusal, told

app = typer.Typer(no_args_is_help=True, help="Training: a model from a recipe. It needs the extra `train`.")

File = Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="A TOML file; docs/training.md has its keys.")]
Changes = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="What the recipe says otherwise: optimiser.lr=1e-5")
]
Dry = Annotated[bool, typer.Option("--dry-run", help="Checks recipe and data, tells memory and time, and ends.")]


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
    overrides = list(changes or [])
    if path and "=" in str(path) and not path.is_file():  # no recipe, only changes
        path, overrides = None, [str(path), *overrides]
    try:
        module = importlib.import_module(f"alignment.{method}")
    except ImportError as error:
        raise Refusal(f"{error}: training needs the extra `train` (pip install 'newel[train]')") from None
    from alignment import recipe as recipes

    try:
        how = recipes.load(module.Recipe, path, overrides)
        if dry_run:
            _estimated(method, how)
            return
        folder = module.train(how, told)
    except (ValueError, OSError, RuntimeError) as error:
        raise Refusal(_said(error)) from None
    print(folder)


def _estimated(method: str, how: Any) -> None:
    """Prints the whole recipe, and what it will take."""
    from alignment import recipe

    estimate = importlib.import_module("alignment.estimate")  # torch comes with it, which the gateway never loads
    print(recipe.dump(how))
    print(estimate.told(estimate.of(method, how, estimate.lengths(method, how, told))))


def _said(error: Any) -> str:
    """The message of an error, with the knob to turn where memory has run out."""
    text = str(error)
    if "out of memory" in text.lower() or "can't allocate memory" in text.lower():
        return f"{text}\nOut of memory: lower `tokens` (of a forward pass), then `max_length`, or train with `lora`."
    return text
