"""In bfloat16 and on a base of 4 bits the trainers learn what they learn in float32, to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from alignment import release
from alignment.lora import LoraShape
from alignment.model import Model, ModelError, Precision
from alignment.reward_model import lineage
from alignment.rollout import Local
from alignment.tokens import Row, batch
from guardrails.types import Message
from tests.alignment import tiny

SHAPE = LoraShape(4, 8.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return release.write(
        tiny.model(0), None, tmp_path_factory.mktemp("base") / "base", release.Provenance("sft", "tiny", "")
    )


def rows(model: Model) -> list[Row]:
    texts = ("Ask the people team.", "Nobody may tell you that.", "Leave is 25 days.")
    return [
        model.template.reply([Message("user", f"Question {i}?")], [Message("assistant", text)])
        for i, text in enumerate(texts)
    ]


def told(model: Model, adapter: str | None = None) -> torch.Tensor:
    some = batch([[row] for row in rows(model)])
    return model.told(some, model.states(some, adapter)).logprobs


def learnt(model: Model, parameters: Sequence[torch.nn.Parameter], adapter: str | None) -> list[float]:
    """The losses of some steps."""
    adam, losses = torch.optim.AdamW(parameters, 1e-2 if adapter else 1e-3), []
    for _ in range(8):
        loss = -told(model, adapter).sum() / 40
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(("precision", "near"), [("bfloat16", 0.02), ("nf4", 0.1)])
def test_an_adapter_learns_as_in_float32(folder: Path, precision: Precision, near: float) -> None:
    torch.manual_seed(0)
    exact, model = Model.load(folder), Model.load(folder, precision=precision)
    assert told(model).dtype == torch.float32
    found = []
    for one in (exact, model):
        torch.manual_seed(1)
        parameters = one.adapt("sft", SHAPE)
        assert all(p.dtype == torch.float32 for p in parameters)
        found.append(learnt(one, parameters, "sft"))
    assert found[1] == pytest.approx(found[0], rel=near)
    assert found[1][-1] < 0.9 * found[1][0]


def test_all_weights_learn_in_float32_while_bfloat16_computes(folder: Path) -> None:
    exact, model = Model.load(folder), Model.load(folder, precision="bfloat16", frozen=False)
    found = []
    for one in (exact, model):
        parameters = list(one.base.parameters())
        one.base.requires_grad_(True)
        found.append(learnt(one, parameters, None))
    assert model.base.dtype == torch.float32 and model.dtype == torch.bfloat16
    assert found[1] == pytest.approx(found[0], rel=0.02)
    assert found[1][-1] < 0.9 * found[1][0]


@pytest.mark.parametrize("precision", ["bfloat16", "nf4"])
def test_replies_are_drawn_with_the_chances_that_the_trainer_says(folder: Path, precision: Precision) -> None:
    model = Model.load(folder, precision=precision)
    for one in model.adapt("policy", SHAPE):
        torch.nn.init.normal_(one, std=0.05)
    drawn = Local(model, "policy").draw([rows(model)[0].ids[:12]], 8, 12, 1.0, 0)
    some = batch([[reply.row] for reply in drawn])
    said = model.told(some, model.states(some, "policy")).logprobs
    for reply, line, trained in zip(drawn, said, some.trained, strict=True):
        assert torch.allclose(line[trained], torch.tensor(reply.drawn), atol=0.1)


def test_a_merge_into_bfloat16_is_undone_to_the_bit(folder: Path) -> None:
    model = Model.load(folder, precision="bfloat16")
    for one in model.adapt("policy", SHAPE):
        torch.nn.init.normal_(one, std=0.05)
    before, merged = told(model), None
    assert model.adapters is not None
    with model.adapters.merged("policy"):
        merged = told(model)
    assert not torch.equal(before, merged) and torch.equal(before, told(model))
    assert torch.allclose(merged, told(model, "policy"), atol=0.15)


def test_the_release_of_a_quantised_base_is_the_whole_model(folder: Path, tmp_path: Path) -> None:
    model = Model.load(folder, precision="nf4")
    for one in model.adapt("sft", SHAPE):
        torch.nn.init.normal_(one, std=0.05)
    made = Model.load(release.write(model, "sft", tmp_path / "release", release.Provenance("sft", "tiny", "")))
    assert not made.quantised and (tmp_path / "release" / "adapter" / "adapter_config.json").is_file()
    assert model.adapters is not None
    weights, exact = model.adapters.weights("sft"), Model.load(folder)
    exact.adapt("sft", SHAPE)
    assert exact.adapters is not None
    exact.adapters.load_weights("sft", weights)
    assert torch.allclose(told(made), told(exact, "sft"), atol=0.1)


def test_lineage_is_that_of_the_checkpoint_whatever_the_precision(folder: Path) -> None:
    exact = lineage(Model.load(folder))
    assert exact == lineage(Model.load(folder, precision="nf4")) == lineage(Model.load(folder, precision="bfloat16"))


def test_a_quantised_base_cannot_be_trained_itself(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"give the recipe a table \[lora\]"):
        Model.load(folder, precision="nf4", frozen=False)
