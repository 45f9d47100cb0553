"""A training on a Ray cluster: python deploy/train/on_ray.py --workers 16 --gpu sft recipe.toml [KEY=VALUE]...

Ray starts the workers, says where they meet and starts them again when one has died; they go on from the last
checkpoint. Recipe, data, model and run's folder are on storage that all nodes see. Needs `pip install 'ray[train]'`
beside newel[train] on all nodes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def work(config: dict[str, Any]) -> None:
    """What each worker does: `newel train`, whose process group Ray has made."""
    from app.cli import main

    try:
        main(["train", *config["arguments"]])
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"newel train ended with {ended.code}; its reason stands in the worker's log") from None


def absolute(arguments: Sequence[str]) -> list[str]:
    """Paths as they are here: a worker begins in a folder of Ray's."""
    return [str(Path(one).resolve()) if "=" not in one and Path(one).is_file() else one for one in arguments]


def main() -> None:
    """Trains, and ends when the run has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes; with --gpu one a GPU")
    parser.add_argument("--gpu", action="store_true", help="each worker has a GPU")
    parser.add_argument("--restarts", type=int, default=3, help="how often the workers are started again")
    parser.add_argument("--storage", default=str(Path("runs/ray").resolve()), help="of Ray's own notes")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="METHOD RECIPE [KEY=VALUE]...")
    said = parser.parse_args()
    trainer = TorchTrainer(
        work,
        train_loop_config={"arguments": absolute(said.arguments)},
        scaling_config=ScalingConfig(num_workers=said.workers, use_gpu=said.gpu),
        run_config=RunConfig(storage_path=said.storage, failure_config=FailureConfig(max_failures=said.restarts)),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
