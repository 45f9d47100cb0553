"""Supervised fine-tuning from a recipe: what is learnt, what is left, and what is refused before anything is."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment import recipe as recipes
from alignment.loop import Adam, Diverged
from alignment.lora import LoraShape
from alignment.model import Model
from alignment.records import BadRecords
from alignment.sft import ADAPTER, Recipe, evaluate, loss, train
from alignment.tokens import Row
from guardrails.types import Message
from tests.alignment import tiny

ANIMALS = ["cat", "dog", "cow", "owl", "hen", "fox", "pig", "bee", "ant", "elk", "emu", "ram"]


def line(question: str, answer: str, split: str = "train") -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns, "split": split})


def written(folder: Path, more: Sequence[str] = (), **changes: Any) -> Recipe:
    """A recipe whose demonstrations repeat what was asked, in lines of several lengths."""
    if not (folder / "base").is_dir():
        model = tiny.model(0)
        model.base.save_pretrained(folder / "base")
        model.tokenizer.save_pretrained(folder / "base")
    lines = [line(one * (1 + i % 3), one + "!") for i, one in enumerate(ANIMALS)]
    lines += [line(one, one + "!", "test") for one in ("cat", "yak")]
    (folder / "said.jsonl").write_text("\n".join([*lines, *more]) + "\n")
    how = Recipe(
        model=folder / "base", data=(folder / "said.jsonl",), output=folder / "run", rows=6, tokens=256, epochs=10,
        lora=LoraShape(8, 16.0), optimiser=Adam(lr=1e-2, warmup=0.0), device="cpu", often=10, checkpoint=5,
    )  # fmt: skip
    return replace(how, **changes)


def quiet(text: str) -> None:
    """Tells nobody."""


def metrics(how: Recipe) -> list[dict[str, float]]:
    """Of every update of a run."""
    return [json.loads(one) for one in (how.output / "metrics.jsonl").read_text().splitlines()]


def curve(how: Recipe) -> list[float]:
    return [one["loss"] for one in metrics(how)]


@torch.no_grad()
def surprises(base: Any, row: Row) -> list[float]:
    """-ln p of each trained token, from the logits that transformers computes."""
    chances = base(torch.tensor([row.ids])).logits[0].log_softmax(-1)
    return [-float(chances[i - 1, row.ids[i]]) for i in range(len(row)) if row.trained[i]]


@pytest.mark.parametrize("lora", [LoraShape(8, 16.0), None])
def test_demonstrations_are_learnt_and_what_is_left_loads(tmp_path: Path, lora: LoraShape | None) -> None:
    how = written(tmp_path, lora=lora, optimiser=Adam(lr=2e-2 if lora else 3e-3, warmup=0.0))
    folder = train(how, quiet)
    found = metrics(how)
    assert len(found) == 20 and found[-1]["loss"] < 0.5 * found[0]["loss"]
    assert {i for i, one in enumerate(found) if "test/loss" in one} == {0, 10, 19}
    assert found[-1]["test/loss"] < found[0]["test/loss"]
    assert found[-1]["test/perplexity"] == pytest.approx(math.exp(found[-1]["test/loss"]), rel=1e-4)
    assert (how.output / "report.html").is_file() and (folder / "adapter").is_dir() is (lora is not None)
    assert recipes.load(Recipe, how.output / "recipe.toml") == how
    told = json.loads((folder / "provenance.json").read_text())
    assert told["method"] == "sft" and str(how.data[0]) in told["data"]
    loaded = Model.load(folder)
    assert loaded.base.config.tie_word_embeddings
    row = loaded.template.conversation([Message("user", "cat"), Message("assistant", "cat!")])
    measured = evaluate(loaded, None, [row], 256)["test/loss"]
    assert measured < 0.5 * evaluate(Model.load(how.model), None, [row], 256)["test/loss"]
    assert AutoTokenizer.from_pretrained(folder).chat_template == tiny.CHATML
    plain = surprises(AutoModelForCausalLM.from_pretrained(folder), row)
    assert measured == pytest.approx(sum(plain) / len(plain), abs=1e-4)


@pytest.mark.parametrize("tokens", [64, 100, 1000])
def test_how_rows_are_packed_changes_nothing(tmp_path: Path, tokens: int) -> None:  # D2, D3
    curves = []
    for packed, room in ((False, 256), (True, tokens)):
        how = written(tmp_path, packed=packed, tokens=room, epochs=3, output=tmp_path / f"run-{packed}")
        train(how, quiet)
        curves.append(curve(how))
    assert curves[0] == pytest.approx(curves[1], abs=2e-3) and curves[0][0] == pytest.approx(curves[1][0], abs=1e-5)


def test_only_what_the_assistant_says_is_trained() -> None:  # D1
    model = tiny.model(0)
    turns = [Message("user", "a"), Message("assistant", "bc"), Message("user", "d"), Message("assistant", "e")]
    row = model.template.conversation(turns)
    with torch.no_grad():
        part = loss(model, None, [[row]])
    assert part.count == 5  # b, c, e and the end of either turn
    assert float(part.loss) == pytest.approx(sum(surprises(model.base, row)), abs=1e-4)


def test_the_last_turn_alone_is_trained_where_the_recipe_or_the_row_says_so(tmp_path: Path) -> None:
    turns = [{"role": role, "content": "ab"} for role in ("user", "assistant", "user", "assistant")]
    asked = json.dumps({"prompt": turns[:3], "completion": turns[3:], "split": "train"})
    for content, how, count in (
        (json.dumps({"messages": turns, "split": "train"}), "all", 6),
        (json.dumps({"messages": turns, "split": "train"}), "last", 3),
        (asked, "all", 3),
    ):
        recipe = written(tmp_path, turns=how, epochs=1, output=tmp_path / f"{how}-{count}")
        (tmp_path / "said.jsonl").write_text(content + "\n")
        train(recipe, quiet)
        assert metrics(recipe)[0]["count"] == count


def test_without_held_out_rows_nothing_is_measured(tmp_path: Path) -> None:
    how = written(tmp_path, epochs=1)
    (tmp_path / "said.jsonl").write_text(line("cat", "cat!") + "\n")
    folder = train(how, quiet)
    assert not any(name.startswith("test/") for one in metrics(how) for name in one)
    assert json.loads((folder / "provenance.json").read_text())["results"] == {}


def test_all_broken_lines_are_told_and_nothing_is_trained(tmp_path: Path) -> None:
    how = written(
        tmp_path, more=['{"messages": [', line("cat", "cat!"), '{"messages": [{"role": "cook"}]}', '{"a": 1}']
    )
    with pytest.raises(BadRecords) as found:
        train(how, quiet)
    assert set(found.value.lines) == {15, 17, 18} and "3 of its lines cannot be read" in str(found.value)
    assert not how.output.exists()


def test_without_rows_to_train_on_nothing_begins(tmp_path: Path) -> None:
    how = written(tmp_path)
    (tmp_path / "said.jsonl").write_text(line("cat", "cat!", "test") + "\n")
    with pytest.raises(ValueError, match=r"no rows to train on: .*split `train`.*max_length"):
        train(how, quiet)
    assert not how.output.exists()


def test_longer_rows_are_told_and_left_out(tmp_path: Path) -> None:
    told: list[str] = []
    how = written(tmp_path, more=[line("x" * 200, "y"), line("x" * 300, "y", "test")], max_length=100, epochs=1)
    train(how, told.append)
    over = [one for one in told if "longer than 100 tokens and left out (max_length" in one]
    assert [one.partition(" rows")[0] for one in over] == ["1 of 13", "1 of 3"] and over[0].endswith("said.jsonl:15")
    assert sum(one["count"] for one in metrics(how)) == 12 * 5


def test_columns_that_are_not_read_are_told(tmp_path: Path) -> None:
    told: list[str] = []
    how = written(tmp_path, more=[line("cat", "cat!")[:-1] + ', "mood": "good"}'], epochs=1)
    train(how, told.append)
    assert any("columns that are not read: mood" in one for one in told)


@pytest.mark.parametrize("lora", [LoraShape(8, 16.0), None])
def test_a_run_that_ends_half_way_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: LoraShape | None
) -> None:  # E1
    whole = written(tmp_path, lora=lora, epochs=6, output=tmp_path / "whole")
    train(whole, quiet)
    how = replace(whole, output=tmp_path / "half")
    real, calls = loss, [0]

    def failing(*given: Any) -> Any:
        calls[0] += 1
        if calls[0] > 10:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("alignment.sft.loss", failing)
        train(how, quiet)
    assert not (how.output / "release").exists()
    told: list[str] = []
    train(how, told.append)
    assert any("going on from update 5 of 12" in one for one in told)
    assert curve(how) == curve(whole)
    weights = [load_file(one.output / "release" / "model.safetensors") for one in (whole, how)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_run_that_has_ended_makes_its_release_again(tmp_path: Path) -> None:
    how = written(tmp_path, epochs=1)
    first = load_file(train(how, quiet) / "model.safetensors")
    shutil.rmtree(how.output / "release")
    again = load_file(train(how, quiet) / "model.safetensors")
    assert len(metrics(how)) == 2 and all(torch.equal(first[name], again[name]) for name in first)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    how = written(tmp_path, lora=None, optimiser=Adam(lr=1e30, clip=0.0, warmup=0.0))
    with pytest.raises(Diverged, match=r"Lower optimiser.lr"):
        train(how, quiet)
    assert not (how.output / "release").exists()


def test_an_adapter_that_does_nothing_yet_has_the_bases_loss() -> None:
    model = tiny.model(0)
    rows = [Row(tuple(range(n)), (False, *[True] * (n - 1))) for n in (3, 9, 5)]
    before = evaluate(model, None, rows, 64)
    model.adapt(ADAPTER, LoraShape(4))
    assert evaluate(model, ADAPTER, rows, 8) == pytest.approx(before, rel=1e-5)
