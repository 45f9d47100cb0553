"""Runs by all recipes in a folder, one after another: `python -m tests.alignment.sharded FOLDER`, or by torchrun.

A recipe is called METHOD-NAME.toml. What is told goes to standard output, behind the number of the process.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

import torch

from alignment import recipe as recipes


def train(path: Path, rank: int, pause: float = 0.0) -> None:
    """A run by one recipe, with a pause after every update so that it can be killed."""

    def tell(line: str) -> None:
        print(rank, path.stem, line, flush=True)
        if line.startswith("update "):
            time.sleep(pause)

    module = importlib.import_module(f"alignment.{path.stem.partition('-')[0]}")
    module.train(recipes.load(module.Recipe, path), tell)


if __name__ == "__main__":
    import os

    torch.set_num_threads(1)
    for one in sorted(Path(sys.argv[1]).glob("*.toml")):
        train(one, int(os.environ.get("RANK", "0")), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
