"""A whole PPO run on files: prompts, rewards, a reward model, its report and its release; and one that goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alignment import ppo
from alignment.judging import Interval
from alignment.loop import STATE, Adam
from alignment.lora import LoraShape
from alignment.model import Model, ModelError
from alignment.monitor import Bounds, Hacked
from alignment.reward_model import MANIFEST, RewardModel
from alignment.rewards import Said, Source
from tests.alignment import tiny

OPEN = Bounds(kl=None, longer=None, repeated=None, distinct=None, held_out=None)


def early_letters(said: Sequence[Said]) -> list[float]:
    """How early in the alphabet the bytes of a reply are: something that a tiny model can learn to say."""
    return [sum(1 - id / 257 for id in one.reply.ids) / len(one.reply.ids) for one in said]


@pytest.fixture
def how(tmp_path: Path) -> ppo.Recipe:
    made = tiny.model(0)
    made.base.save_pretrained(tmp_path / "base")
    made.tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"Say {i}", "split": "test" if i % 5 == 0 else "train"} for i in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ppo.Recipe(
        model=tmp_path / "base",
        prompts=(tmp_path / "prompts.jsonl",),
        output=tmp_path / "run",
        rewards=(Source(name="early", kind="python", function=f"{__name__}:early_letters"),),
        updates=6,
        ppo=ppo.Settings(prompts=8, samples=4, limit=4, epochs=2, missing_end=0.0, stop=None, kl=ppo.Kl(0.001)),
        lora=LoraShape(8, 16.0),
        optimiser=Adam(lr=1e-2, warmup=0, eps=1e-5, schedule="constant"),
        bounds=OPEN,
        device="cpu",
        often=3,
        checkpoint=2,
    )


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "time" not in k and "/s" not in k} for line in lines]


def test_a_run_raises_its_reward_and_leaves_a_report_and_a_release(how: ppo.Recipe) -> None:
    folder = ppo.train(replace(how, updates=15), lambda line: None)
    told = metrics(how.output)
    assert len(told) == 15 and told[-1]["rewards/early"] > told[0]["rewards/early"] + 0.1
    found = json.loads((how.output / "evaluation.json").read_text())
    assert found["early/after"]["value"] > found["early/before"]["value"] and found["early/wins"]["n"] == 4
    samples = [json.loads(line) for line in (how.output / "samples.jsonl").read_text().splitlines()]
    assert {one["step"] for one in samples} == {3, 6, 9, 12, 15} and samples[0]["prompt"].startswith("Say ")
    page = (how.output / "report.html").read_text()
    assert "Proximal policy optimisation" in page and "kl/reply" in page
    assert Model.load(folder).template.tokenizer.chat_template == tiny.CHATML
    assert "[[rewards]]" in (how.output / "recipe.toml").read_text()


class Stopped(Exception):
    """The run is ended from outside."""


def test_a_run_that_was_ended_goes_on_to_the_same_numbers(how: ppo.Recipe, tmp_path: Path) -> None:
    ppo.train(how, lambda line: None)
    cut = replace(how, output=tmp_path / "cut")
    seen: list[str] = []

    def tell(line: str) -> None:
        seen.append(line)
        if line.startswith("update 5/6"):
            raise Stopped

    with pytest.raises(Stopped):
        ppo.train(cut, tell)
    assert torch.load(cut.output / STATE)["step"] == 4
    ppo.train(cut, seen.append)
    assert any(line.startswith("going on from update 4 of 6") for line in seen)
    assert metrics(cut.output) == metrics(how.output)


def test_a_reward_model_of_the_same_base_is_a_reward_and_the_critics_beginning(how: ppo.Recipe, tmp_path: Path) -> None:
    model = Model.load(how.model)
    made = RewardModel.new(model, 2, ["helpful"], LoraShape(8, 16.0), seed=1)
    made.save(tmp_path / "judge")
    source = Source(name="helpful", kind="model", path=tmp_path / "judge", spread=0.5)
    ppo.train(
        replace(how, rewards=(source,), critic=tmp_path / "judge", held_out=tmp_path / "judge"), lambda line: None
    )
    told = metrics(how.output)
    assert all("rewards/helpful" in one and "signs/held_out" in one for one in told)
    assert "held-out/wins" in json.loads((how.output / "evaluation.json").read_text())
    other = tiny.model(5)
    other.base.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError):
        ppo.train(replace(how, model=tmp_path / "other", rewards=(source,), output=tmp_path / "no"), lambda line: None)
    assert MANIFEST in {one.name for one in (tmp_path / "judge").iterdir()}


def test_a_policy_that_is_rewarded_for_the_wrong_thing_ends_the_run_with_its_checkpoint(how: ppo.Recipe) -> None:
    with pytest.raises(Hacked, match=r"kl is .* over its bound of 0\.001 for 2 updates"):
        ppo.train(replace(how, updates=20, bounds=replace(OPEN, kl=0.001, patience=2)), lambda line: None)
    assert (how.output / STATE).is_file()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rewards": ()}, "rewards has at least one that is no constraint"),
        ({"rewards": (Source(name="a", kind="length", limit=1.0),)}, "rewards has at least one that is no constraint"),
        ({"rewards": (Source(name="a", kind="length"),) * 2}, "every reward has a name of its own"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(how: ppo.Recipe, changes: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        replace(how, **changes)  # type: ignore[arg-type]


def test_too_few_prompts_are_an_error(how: ppo.Recipe) -> None:
    with pytest.raises(ValueError, match=r"there are 16 prompts to train on and ppo\.prompts is 64"):
        ppo.train(replace(how, ppo=replace(how.ppo, prompts=64)), lambda line: None)


def test_an_interval_is_a_mean_with_its_error() -> None:
    assert Interval.of([1.0]).told == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 1}
    found = Interval.of([0.0, 1.0] * 50)
    assert found.value == 0.5 and found.high - found.value == pytest.approx(0.098, abs=0.001)
