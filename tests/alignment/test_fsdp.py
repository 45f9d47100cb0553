"""Weights that are shared out over two processes: the same is learnt and left as by one process that has them all."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignment import dpo, kto, ppo, reward, sft
from alignment import recipe as recipes
from alignment.loop import STATE, Adam, Parallel
from alignment.lora import LoraShape
from alignment.model import Model, ModelError
from alignment.reward_model import RewardModel
from alignment.rewards import Source
from tests.alignment import tiny

ROOT = Path(__file__).parents[2]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
SHAPE = LoraShape(4, 8.0)
ADAM = Adam(lr=1e-3, warmup=0.0)
WORDS = ["cat", "dog", "cow", "owl", "hen", "fox", "pig", "bee", "ant", "elk", "emu"]


def early_letters(said: Sequence[Any]) -> list[float]:
    """How early in the alphabet the bytes of a reply are."""
    return [sum(1 - id / 257 for id in one.reply.ids) / len(one.reply.ids) for one in said]


def files(folder: Path) -> None:
    """A base with a tied head, one with a head of its own, and rows for all methods: eleven, which two cannot share."""
    for name, tied in (("base", True), ("untied", False)):
        model = tiny.model(0, tie_word_embeddings=tied)
        model.base.save_pretrained(folder / name)
        model.tokenizer.save_pretrained(folder / name)
    splits = ["test" if i % 5 == 4 else "train" for i in range(len(WORDS))]
    rows = {
        "said": [{"prompt": one * (1 + i % 3), "completion": one + "!"} for i, one in enumerate(WORDS)],
        "pairs": [{"prompt": one, "chosen": one * (1 + i % 3), "rejected": "no"} for i, one in enumerate(WORDS)],
        "thumbs": [{"prompt": one, "completion": one * 2, "label": i % 3 > 0} for i, one in enumerate(WORDS)],
        "asked": [{"prompt": one * (1 + i % 4)} for i, one in enumerate(WORDS)],
    }
    for name, some in rows.items():
        lines = [json.dumps({**row, "split": split}) for row, split in zip(some, splits, strict=True)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def written(folder: Path) -> dict[str, Any]:
    """The recipes by name, whose runs go to folders of their names."""
    files(folder)

    def learning(kind: type[Any], data: str, **more: Any) -> Any:
        given = {
            "model": folder / "base", "data": (folder / f"{data}.jsonl",), "output": folder, "rows": 4, "tokens": 64,
            "epochs": 2, "lora": SHAPE, "optimiser": ADAM, "device": "cpu", "often": 2, "checkpoint": 2, "shard": True,
        }  # fmt: skip
        return kind(**{**given, **more})

    critic = folder / "judge"
    made = RewardModel.new(Model.load(folder / "base"), 2, ["helpful"], SHAPE, seed=1)
    made.save(critic)
    rewards = (
        Source(name="early", kind="python", function=f"{__name__}:early_letters"),
        Source(name="helpful", kind="model", path=critic),
    )
    found = {
        "sft-full": learning(sft.Recipe, "said", lora=None),
        "sft-untied": learning(sft.Recipe, "said", lora=None, model=folder / "untied"),
        "sft-lora": learning(sft.Recipe, "said"),
        "dpo-full": learning(dpo.Recipe, "pairs", lora=None),
        "kto-full": learning(kto.Recipe, "thumbs", lora=None),
        "reward-lora": learning(reward.Recipe, "pairs", members=2),
        "ppo-lora": ppo.Recipe(
            model=folder / "base", prompts=(folder / "asked.jsonl",), output=folder, rewards=rewards, updates=4,
            ppo=ppo.Settings(prompts=5, samples=2, limit=4, epochs=2, minibatches=2, tokens=48, stop=None, replay=0.1),
            critic=critic, held_out=critic, demonstrations=(folder / "said.jsonl",), lora=SHAPE, device="cpu",
            optimiser=replace(ADAM, eps=1e-5), often=2, checkpoint=2, shard=True,
        ),
    }  # fmt: skip
    own = replace(found["ppo-lora"].ppo, critic="model")
    found["ppo-models"] = replace(found["ppo-lora"], lora=None, ppo=own, optimiser=replace(ADAM, lr=1e-4, eps=1e-5))
    found |= {f"{name}-whole": replace(found[name], shard=False) for name in ("ppo-lora", "ppo-models")}
    return {name: replace(how, output=folder / name) for name, how in found.items()}


def started(folder: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*TWO, "-m", "tests.alignment.sharded", str(folder), *more], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The recipes of runs that two processes have done."""
    folder = tmp_path_factory.mktemp("sharded")
    hows = written(folder)
    (folder / "recipes").mkdir()
    for name, how in hows.items():
        (folder / "recipes" / f"{name}.toml").write_text(recipes.dump(how))
    process = started(folder / "recipes")
    told, _ = process.communicate(timeout=600)
    assert process.returncode == 0, told[-4000:]
    return hows


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in one.items() if "time" not in k and "/s" not in k and "second" not in k} for one in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All that is in a release."""
    return {
        f"{path.relative_to(folder)}:{name}": one
        for path in sorted(folder.rglob("*.safetensors"))
        for name, one in load_file(path).items()
    }


def one_process(how: Any, name: str, folder: Path) -> Any:
    """The run of a recipe in this process alone, which has all weights."""
    alone = replace(how, output=folder, shard=False)
    importlib.import_module(f"alignment.{name.partition('-')[0]}").train(alone, lambda line: None)
    return alone


@pytest.mark.parametrize(
    "name", ["sft-full", "sft-untied", "sft-lora", "dpo-full", "kto-full", "reward-lora", "ppo-lora", "ppo-models"]
)
def test_two_processes_with_half_of_the_weights_leave_what_whole_ones_do(
    runs: dict[str, Any], name: str, tmp_path: Path
) -> None:
    # How replies are drawn depends on the number of processes, so PPO is compared with two that have all weights.
    whole = runs.get(f"{name}-whole") or one_process(runs[name], name, tmp_path / "run")
    ours, theirs = metrics(whole.output), metrics(runs[name].output)
    assert len(ours) == len(theirs) >= 4 and ours[-1].keys() == theirs[-1].keys()
    for mine, other in zip(ours, theirs, strict=True):
        assert other == pytest.approx(mine, rel=2e-3, abs=2e-4)
    kept, found = weights(whole.output / "release"), weights(runs[name].output / "release")
    assert kept.keys() == found.keys() and len(kept) > 4
    for key in kept:
        torch.testing.assert_close(found[key], kept[key], rtol=1e-3, atol=1e-4)


def workers(process: subprocess.Popen[str]) -> list[int]:
    return [int(one) for one in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def killed(recipes: Path, run: Path, updates: int) -> None:
    """Starts the runs, slowly, and kills all processes when one run has come so far."""
    process = started(recipes, "0.3")
    assert process.stdout
    for line in process.stdout:
        if f"update {updates}/" in line and run.name in line:
            break
    for pid in workers(process):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode == 1 and updates - 1 <= torch.load(run / STATE)["step"] <= updates


def test_runs_of_two_processes_that_are_killed_go_on_to_the_same_bits(runs: dict[str, Any], tmp_path: Path) -> None:
    for name in (names := ["reward-lora", "sft-full"]):
        (tmp_path / f"{name}.toml").write_text(recipes.dump(replace(runs[name], output=tmp_path / name)))
    for name in names:
        killed(tmp_path, tmp_path / name, 3)
    process = started(tmp_path)
    told, _ = process.communicate(timeout=300)
    assert process.returncode == 0, told[-4000:]
    assert "going on from update 2 of" in told
    for name in names:
        assert metrics(tmp_path / name) == metrics(runs[name].output)
        found, kept = weights(tmp_path / name / "release"), weights(runs[name].output / "release")
        assert kept.keys() == found.keys() and all(torch.equal(found[key], kept[key]) for key in kept)


def test_a_checkpoint_of_two_processes_is_whole(runs: dict[str, Any]) -> None:
    state = torch.load(runs["sft-full"].output / STATE)["kept"]
    model = Model.load(runs["sft-full"].model)
    shapes = [one.shape for one in model.base.parameters()]
    assert [one.shape for one in state["weights"]] == shapes
    assert [state["adam"]["state"][i]["exp_avg"].shape for i in range(len(shapes))] == shapes
    kept, told = weights(runs["sft-full"].output / "release"), list[str]()
    sft.train(runs["sft-full"], told.append)  # one process goes on where two have been
    assert any(one.startswith("going on from update 6 of 6") for one in told)
    found = weights(runs["sft-full"].output / "release")
    assert kept.keys() == found.keys() and all(torch.equal(found[key], kept[key]) for key in kept)


def test_one_process_has_all_weights_and_says_so() -> None:
    told: list[str] = []
    assert Parallel("cpu", sharded=True, tell=told.append).mesh is None
    assert told == ["shard = true: there is one process, which holds all weights; start several with torchrun"]


def test_what_cannot_be_shared_out_is_an_error_before_it_is_loaded(tmp_path: Path) -> None:
    model = tiny.model()
    model.base.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match='a base in nf4 cannot be shared out; take precision = "bfloat16"'):
        Model.load(tmp_path, precision="nf4", mesh=object())  # type: ignore[arg-type]
