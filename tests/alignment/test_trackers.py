"""Trackers get a run once, go on with it after a crash, and never end it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from alignment import trackers
from alignment.loop import METRICS, Adam, Optimiser, Parallel, Part, Run, fit
from alignment.progress import Start, Watcher
from alignment.trackers import Trackers, Trackio, Wandb, check, flat, kept

RECIPE = 'model = "base"\nrows = 4\n\n[optimiser]\nlr = 0.1\n'


class Fake(ModuleType):
    """A tracker's library: what it was told, by run."""

    Table = staticmethod(lambda *args, **more: ("table", args, more))
    Settings = staticmethod(lambda **more: more)

    def __init__(self, name: str):
        super().__init__(name)
        self.opened: list[dict[str, Any]] = []
        self.told: list[tuple[int, dict[str, Any]]] = []
        self.summary: dict[str, Any] = {}
        self.finished = 0

    def init(self, **how: Any) -> Any:
        self.opened.append(how)

        def log(values: Mapping[str, Any], step: int, commit: bool | None = None) -> None:
            self.told.append((step, dict(values)))

        def finish() -> None:
            self.finished += 1

        return SimpleNamespace(log=log, finish=finish, summary=self.summary)


def library(monkeypatch: pytest.MonkeyPatch, name: str) -> Fake:
    fake = Fake(name)
    monkeypatch.setitem(sys.modules, name, fake)
    return fake


def learnt(folder: Path, watchers: Sequence[Watcher], crash: int | None = None) -> None:
    """A run of six updates with checkpoints at two and four, which may crash in one of them."""
    weight = nn.Parameter(torch.tensor([1.0]))
    optimiser = Optimiser([weight], Adam(lr=0.1, warmup=0), 6, Parallel("cpu"))
    run = Run.open(folder, RECIPE, 6, Parallel("cpu"), lambda line: None, every=2)
    run.watchers = watchers

    def forward(part: float) -> Part:
        if part == crash:
            raise KeyboardInterrupt
        return Part((weight * part).sum(), 1.0)

    try:
        fit(run, optimiser, [[float(i)] for i in range(1, 7)], forward)
    except KeyboardInterrupt:
        return
    run.end({"accuracy": {"value": 0.75}, "members": [1, 2]})


@pytest.mark.parametrize(("name", "kind"), [("wandb", Wandb), ("trackio", Trackio)])
def test_a_run_that_crashes_twice_is_one_run_with_each_step_once(
    name: str, kind: type[Watcher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = library(monkeypatch, name)
    learnt(tmp_path, [kind()], crash=6)  # five updates are told, four are kept
    learnt(tmp_path, [kind()], crash=5)
    learnt(tmp_path, [kind()])
    assert [step for step, values in fake.told if "loss" in values] == [1, 2, 3, 4, 5, 6]
    assert len({str(how.get("id")) + how["name"] for how in fake.opened}) == 1 and fake.finished == 1
    assert {how["resume"] for how in fake.opened} == {"allow"}
    assert fake.opened[0]["config"]["optimiser"] == {"lr": 0.1}
    assert {"evaluation/accuracy/value": 0.75} in [fake.summary, *(values for _, values in fake.told)]


def test_a_run_that_begins_anew_is_another_one(tmp_path: Path) -> None:
    first, _ = kept("wandb", Start(tmp_path, RECIPE, 6))
    assert kept("wandb", Start(tmp_path, RECIPE, 6, step=2, told=3)) == (first, 3)
    assert kept("wandb", Start(tmp_path, RECIPE, 6, step=2, told=2)) == (first, 3)
    again, told = kept("wandb", Start(tmp_path, RECIPE, 6, told=5))
    assert again != first and told == 0


def test_a_tracker_that_fails_is_told_of_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Watcher):
        def updated(self, step: int, metrics: Mapping[str, float]) -> None:
            raise OSError("no network\nand more")

    class Healthy(Watcher):
        def updated(self, step: int, metrics: Mapping[str, float]) -> None:
            steps.append(step)

    steps: list[int] = []
    lines: list[str] = []
    monkeypatch.setattr(trackers, "KINDS", {"wandb": Broken, "trackio": Healthy})
    learnt(tmp_path, [Trackers(("wandb", "trackio"), lines.append)])
    assert lines == ["wandb failed and is left out from here on (OSError: no network)"]
    assert steps == [1, 2, 3, 4, 5, 6] and len((tmp_path / METRICS).read_text().splitlines()) == 6


def test_what_cannot_be_used_is_an_error_that_says_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "trackio" else object())
    with pytest.raises(trackers.TrackerError, match=r"trackio is not installed: pip install 'newel\[trackers\]'"):
        Run.open(tmp_path / "run", RECIPE, 6, Parallel("cpu"), tracked=("tensorboard", "trackio"))
    assert not (tmp_path / "run").exists()
    fake = library(monkeypatch, "wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(fake, "login", lambda prompt, verify: prompt or verify, raising=False)
    with pytest.raises(trackers.TrackerError, match="type `wandb login`"):
        check(("wandb",))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check(("wandb",))


def test_what_libraries_print_stays_off_stdout(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    class Loud(Watcher):
        def ended(self, results: Mapping[str, Any]) -> None:
            print("* uploading")

    monkeypatch.setattr(trackers, "KINDS", {"trackio": Loud})
    Trackers(("trackio",), print).ended({})
    assert capsys.readouterr() == ("", "* uploading\n")


def test_results_have_names_with_slashes() -> None:
    assert flat({"loss": 1, "by": {"a": 0.5, "list": [1], "text": "x"}}) == {
        "evaluation/loss": 1,
        "evaluation/by/a": 0.5,
    }


def test_tensorboard_has_each_step_once_as_it_came_last(tmp_path: Path) -> None:
    learnt(tmp_path, [trackers.TensorBoard()], crash=6)
    board = trackers.TensorBoard()
    learnt(tmp_path, [board])
    found = EventAccumulator(str(tmp_path / trackers.EVENTS)).Reload()
    losses = [json.loads(line)["loss"] for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [(one.step, one.value) for one in found.Scalars("loss")] == [
        (step, pytest.approx(loss, rel=1e-4)) for step, loss in enumerate(losses, 1)
    ]
    assert "recipe/text_summary" in found.Tags()["tensors"]
