"""Learning from thumbs: the baseline, the weights, the loss by hand, and a toy taste."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.kto import ADAPTER, Rated, Recipe, _behind, _others, _weights, baseline, evaluate, loss, referred, train
from alignment.loop import Adam
from alignment.lora import LoraShape
from alignment.model import Model
from alignment.tokens import Row
from guardrails.types import Message
from tests.alignment import tiny
from tests.alignment.test_dpo import metrics, quiet, said, stirred

SHAPE = LoraShape(4, 8.0)
HOW = Recipe(
    model=Path("tiny"), data=(), output=Path("run"), rows=16, tokens=2048, lora=SHAPE,
    optimiser=Adam(lr=1e-2, warmup=0.0), device="cpu", often=0,
)  # fmt: skip
SAID = [("Hi", "Good day.", True), ("Why?", "Because it is, you see.", False), ("a b c", "d", True)]


def rated(model: Model, given: Sequence[tuple[str, str, bool]] = SAID) -> list[Rated]:
    """Replies as rows, with what the base says of them."""
    rows = [model.template.reply([Message("user", p)], [Message("assistant", r)]) for p, r, _ in given]
    made = [
        Rated(row, good, _behind(other, row)) for row, other, (*_, good) in zip(rows, _others(rows), given, strict=True)
    ]
    return referred(model, made, 1000)


def dpo_adapter(model: Model) -> Model:
    """The stirred adapter under the name that KTO has for its own."""
    assert model.adapters is not None
    model.adapt(ADAPTER, SHAPE)
    model.adapters.copy("dpo", ADAPTER)
    return model


def stirred_kto() -> Model:
    """A model whose adapter says something else than the base."""
    return dpo_adapter(stirred())


def test_a_reply_is_read_behind_another_prompt_even_where_one_was_rated_twice() -> None:
    model = tiny.model(0)
    given = [("Hi", "yes", True), ("Hi", "no", False), ("Why?", "yes", True), ("Why?", "so", True), ("Hi", "a", True)]
    for one in rated(model, given):
        end = one.row.ids[len(one.row.prompt) :]
        assert one.other.prompt != one.row.prompt and one.other.ids[len(one.other.prompt) :] == end
        assert sum(one.other.trained) == sum(one.row.trained) == len(end)


def test_replies_to_one_prompt_alone_stay_behind_it() -> None:
    model = tiny.model(0)
    for one in rated(model, [("Hi", "yes", True), ("Hi", "no", False)]):
        assert one.other == one.row


def test_the_reference_is_the_base_whatever_the_adapter_says() -> None:
    model = stirred_kto()
    for one in rated(model):
        assert one.reference == pytest.approx([said(model, row, None) for row in (one.row, one.other)], abs=1e-4)


@pytest.mark.parametrize("tokens", [20, 1000])
def test_the_baseline_is_what_replies_gain_behind_other_prompts(tokens: int) -> None:
    model = stirred_kto()
    some = rated(model)
    gains = [said(model, one.other, ADAPTER) - said(model, one.other, None) for one in some]
    found = baseline(model, some, tokens)
    assert float(found) == pytest.approx(max(0.0, sum(gains) / 3), abs=1e-4) and not found.requires_grad


def test_the_baseline_is_never_under_0() -> None:
    model = stirred_kto()
    some = rated(model)
    gains = [said(model, one.other, ADAPTER) - said(model, one.other, None) for one in some]
    for shift in (-100.0, 100.0):  # a base that says more or less of the replies than it does
        moved = [replace(one, reference=(0.0, one.reference[1] + shift)) for one in some]
        assert float(baseline(model, moved, 1000)) == pytest.approx(max(0.0, sum(gains) / 3 - shift), abs=1e-3)


def test_the_loss_is_that_of_the_paper() -> None:
    model = stirred_kto()
    some, by_hand = rated(model), 0.0
    for one in some:
        gain = said(model, one.row, ADAPTER) - said(model, one.row, None)
        value = 0.3 * (gain - 1.5) if one.good else 0.3 * (1.5 - gain)
        by_hand += (2.0 if one.good else 0.5) * (1 - 1 / (1 + math.exp(-value)))
    part = loss(model, some, torch.tensor(1.5), 0.3, (2.0, 0.5))
    assert part.count == 3 and float(part.loss.detach()) == pytest.approx(by_hand, abs=1e-4)
    assert part.sums["baseline"] == pytest.approx(4.5)


def test_measures_do_not_depend_on_how_replies_share_forward_passes() -> None:
    model = stirred_kto()
    some = rated(model)
    one, other = (evaluate(model, some, 0.1, (1.0, 1.0), tokens) for tokens in (20, 1000))
    assert one == pytest.approx(other, abs=1e-4)


def test_good_and_bad_replies_weigh_the_same_however_many_there_are() -> None:
    rows = [Rated(Row((), ()), good, Row((), ())) for good in (True, True, True, False)]
    up, down = _weights(rows, HOW)
    assert 3 * up == pytest.approx(down) and 3 * up + down == pytest.approx(4)
    assert _weights(rows, replace(HOW, up=2.0)) == (2.0, down)
    assert _weights(rows, replace(HOW, down=0.0)) == (up, 0.0)
    assert _weights(rows[:3], HOW) == (1.0, 1.0)


# --- a run


def written(folder: Path, count: int = 120, test: int = 40, **changes: Any) -> Recipe:
    """A toy taste: replies with an `a` in them are good, those with a `b` are bad; three in four are good."""
    draw = random.Random(0)
    model = tiny.model(0)
    model.base.save_pretrained(folder / "base")
    model.tokenizer.save_pretrained(folder / "base")
    lines = []
    for i in range(count + test):
        prompt, reply = ("".join(draw.choices(letters, k=4)) for letters in ("uvwxyz", "cdefgh"))
        good, at = i % 4 != 0, draw.randint(0, 2)
        row = {"prompt": prompt, "completion": reply[:at] + ("a" if good else "b") + reply[at:], "label": good}
        lines.append(json.dumps(row | {"split": "train" if i < count else "test"}))
    (folder / "rated.jsonl").write_text("\n".join(lines) + "\n")
    how = replace(HOW, model=folder / "base", data=(folder / "rated.jsonl",), output=folder / "run")
    return replace(how, **changes)


def test_a_simple_taste_is_learnt(tmp_path: Path) -> None:
    how = written(tmp_path, epochs=4)
    folder = train(how, quiet)
    found = metrics(how.output)
    assert len(found) == 32
    rise = [one["label"] for one in map(json.loads, how.data[0].read_text().splitlines()) if one["split"] == "train"]
    assert (sum(rise), len(rise)) == (90, 120)
    # sigmoid(0) = 1/2 of each weight; the held-out ones have the same shares of good and bad
    assert found[0]["baseline"] == pytest.approx(0, abs=1e-4) and found[0]["test/loss"] == pytest.approx(0.5, abs=1e-5)
    assert found[-1]["test/accuracy"] > 0.9 and found[-1]["test/loss"] < 0.4 and found[-1]["test/gain"] > 2
    assert all(one["baseline"] >= 0 for one in found)
    assert (how.output / "report.html").is_file() and (folder / "adapter").is_dir()


def test_a_run_does_not_depend_on_how_replies_share_forward_passes(tmp_path: Path) -> None:  # C11
    curves = []
    for tokens in (60, 2048):
        how = written(tmp_path, 48, 8, tokens=tokens, output=tmp_path / f"run-{tokens}")
        train(how, quiet)
        curves.append([one["loss"] for one in metrics(how.output)])
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)


def test_longer_replies_are_told(tmp_path: Path) -> None:
    how = written(tmp_path, 8, 2, max_length=80)
    rows = [json.loads(one) for one in how.data[0].read_text().splitlines()]
    rows.append(rows[0] | {"completion": "x" * 100})
    how.data[0].write_text("\n".join(map(json.dumps, rows)) + "\n")
    told: list[str] = []
    train(how, told.append)
    assert any(one.startswith("1 of 9 rows are longer than 80 tokens") for one in told)
    assert [one["count"] for one in metrics(how.output)] == [8]


def test_without_replies_to_train_on_nothing_begins(tmp_path: Path) -> None:
    how = written(tmp_path, 0, 4)
    with pytest.raises(ValueError, match="no replies to train on"):
        train(how, quiet)
    assert not how.output.exists()


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="beta is more than 0"):
        replace(HOW, beta=0.0)


def test_the_gradient_reaches_the_adapter_and_not_through_the_baseline() -> None:
    model = tiny.model(0)
    mine = model.adapt(ADAPTER, SHAPE)
    some = rated(model)
    part = loss(model, some, baseline(model, some, 1000), 0.1, (1.0, 1.0))
    part.loss.backward()
    grads: list[Tensor] = [one.grad for one in mine if one.grad is not None]
    assert any(float(one.abs().sum()) > 0 for one in grads)
    others = {id(one) for one in mine}
    assert all(one.grad is None for one in model.base.parameters() if id(one) not in others)
