"""Runs that are killed, go on, or are spread over processes end with the same weights."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from alignment.loop import METRICS, STATE, Adam, Diverged, Optimiser, Parallel, Part, Run, RunError, fit

ROOT = Path(__file__).parents[2]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def test_two_processes_end_with_the_weights_of_one(tmp_path: Path) -> None:  # C6, C11
    found = []
    for name, command in (("one", ["-m"]), ("two", [*TWO, "-m"])):
        folder = tmp_path / name
        folder.mkdir()
        command = [sys.executable, *command, "tests.alignment.spread", str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append([torch.load(path) for path in sorted(folder.glob("*.pt"))])
    [one], [first, second] = found
    assert (one["size"], first["size"], second["size"]) == (1, 2, 2)
    for alone, a, b in zip(one["found"], first["found"], second["found"], strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, alone, rtol=1e-4, atol=1e-5)


CRASHING = """
import sys, time, torch
from pathlib import Path
from alignment.loop import Adam, Optimiser, Parallel, Part, Run, fit
torch.manual_seed(0)
weights = torch.nn.Parameter(torch.randn(5, 5))
parallel = Parallel("cpu")
optimiser = Optimiser([weights], Adam(lr=1e-2), 40, parallel)
run = Run.open(Path(sys.argv[1]), "seed = 0", 40, parallel, print, every=4)
def forward(part):
    time.sleep(float(sys.argv[2]))
    noise = torch.randn(5)  # random state is a part of what goes on
    return Part(((weights @ noise - part) ** 2).sum(), 1.0)
fit(run, optimiser, [[float(i), float(i + 1)] for i in range(40)], forward)
torch.save(weights.detach(), Path(sys.argv[1]) / "end.pt")
"""


def crashing(folder: Path, pause: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", CRASHING, str(folder), str(pause)], cwd=ROOT, stdout=subprocess.DEVNULL
    )


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "per_second")} for line in lines]


def test_a_run_that_is_killed_goes_on_to_the_same_bits(tmp_path: Path) -> None:  # E1
    assert crashing(tmp_path / "whole", 0).wait(120) == 0
    killed = tmp_path / "killed"
    process = crashing(killed, 0.02)
    deadline = time.monotonic() + 60
    while not (killed / METRICS).is_file() or len((killed / METRICS).read_text().splitlines()) < 10:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 4 <= torch.load(killed / STATE)["step"] < 40
    assert crashing(killed, 0).wait(120) == 0
    assert torch.equal(torch.load(killed / "end.pt"), torch.load(tmp_path / "whole" / "end.pt"))
    assert metrics(killed) == metrics(tmp_path / "whole")


def opened(folder: Path, recipe: str = "", updates: int = 3) -> Run:
    return Run.open(folder, recipe, updates, Parallel("cpu"), lambda line: None)


def learning(start: float = 1.0) -> tuple[nn.Parameter, Optimiser]:
    weight = nn.Parameter(torch.tensor([start]))
    return weight, Optimiser([weight], Adam(lr=0.1, warmup=0), 3, Parallel("cpu"))


def test_a_folder_of_another_recipe_is_not_gone_on_with(tmp_path: Path) -> None:
    weight, optimiser = learning()
    fit(opened(tmp_path, "lr = 1"), optimiser, [[1.0]] * 3, lambda part: Part((weight * part).sum(), 1.0))
    with pytest.raises(RunError, match=r"holds a run of another recipe .*recipe.toml.*; give this one a folder"):
        opened(tmp_path, "lr = 2")


def test_a_loss_that_is_no_number_ends_the_run_before_it_changes_anything(tmp_path: Path) -> None:
    weight, optimiser = learning()
    with pytest.raises(Diverged, match=r"update 1: the loss is nan. Lower optimiser.lr"):
        fit(opened(tmp_path), optimiser, [[1.0], [float("nan")]], lambda part: Part((weight * part).sum(), 1.0))
    assert torch.isfinite(weight).all() and len((tmp_path / METRICS).read_text().splitlines()) == 1


def test_parts_weigh_by_what_they_count(tmp_path: Path) -> None:  # D3
    found = []
    for name, parts in (("split", [[1.0, 2.0], [6.0]]), ("whole", [[1.0, 2.0, 6.0]])):
        weight, optimiser = learning()

        def forward(part: list[float], weight: nn.Parameter = weight) -> Part:
            return Part(((weight - torch.tensor(part)) ** 2).sum(), float(len(part)))

        fit(opened(tmp_path / name, updates=1), optimiser, [parts], forward)
        found.append((weight.item(), metrics(tmp_path / name)))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("constant", [0.5, 1, 1, 1]), ("linear", [0.5, 1, 2 / 3, 1 / 3]), ("cosine", [0.5, 1, 0.75, 0.25])],
)
def test_the_learning_rate_rises_and_falls(schedule: str, rates: list[float]) -> None:
    how = Adam(lr=1.0, warmup=0.5, schedule=schedule)  # type: ignore[arg-type]
    if schedule != "constant":
        how = Adam(lr=1.0, warmup=0.25, schedule=schedule)  # type: ignore[arg-type]
        rates = [1.0, *rates[1:]]
    assert [how.at(update, 4) for update in range(4)] == pytest.approx(rates)


def test_the_first_update_is_adams(tmp_path: Path) -> None:  # C13: bias correction makes it lr * g / (|g| + eps)
    weight, optimiser = learning()
    fit(opened(tmp_path, updates=1), optimiser, [[3.0]], lambda part: Part((weight * part).sum(), 1.0))
    assert weight.item() == pytest.approx(1 - 0.1)
