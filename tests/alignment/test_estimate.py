"""What a training will take, and the page that tells people of it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from alignment import recipe as recipes
from alignment.estimate import RUNTIME, Estimate, EstimateError, Shape, measured, of, told
from alignment.lora import LoraShape
from tests.alignment import tiny

ROOT = Path(__file__).parents[2]
METHODS = ("sft", "reward", "ppo", "dpo", "kto")


def slow(rows: int, width: int, columns: int) -> float:
    """A machine of a million operations a second, of which training reaches half."""
    return 1e6


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny.model(0).base.config.save_pretrained(tmp_path)
    return tmp_path


def recipe(method: str, base: Path, *changes: str) -> Any:
    """A recipe of a method with its needed keys."""
    given = [f"model={base}", f"output={base}/run"]
    given += ["prompts=[]", "rewards=[{name='l',kind='length'}]"] if method == "ppo" else ["data=[]"]
    return recipes.load(importlib.import_module(f"alignment.{method}").Recipe, None, [*given, *changes])


def test_parameters_are_counted_as_the_model_has_them(base: Path) -> None:
    model = tiny.model(0)
    shape = Shape.of(base)
    assert shape.parameters == sum(one.numel() for one in model.base.parameters())
    for lora in (LoraShape(4), LoraShape(8, targets=("q_proj", "down_proj"))):
        mine = tiny.model(0).adapt("some", lora)
        assert shape.adapter(lora.rank, lora.targets) == sum(one.numel() for one in mine)
    untied = tiny.model(0, tie_word_embeddings=False)
    untied.base.config.save_pretrained(base)
    assert Shape.of(base).parameters == sum(one.numel() for one in untied.base.parameters())


def test_all_weights_take_gradients_and_moments(base: Path) -> None:
    how = recipe("sft", base, "lora=none", "rows=2", "tokens=100", "packed=false", "epochs=2")
    found, n = of("sft", how, [10, 20, 30, 40], slow), Shape.of(base).parameters
    assert (found.updates, found.trained) == (4, n)
    assert found.tokens == 2 * (2 * 20 + 2 * 40)  # rows of like length come together and are padded to the longer
    assert found.flops == 6 * n * found.tokens
    assert (found.weights, found.gradients, found.optimiser) == (4 * n, 4 * n, 8 * n)
    assert found.seconds == pytest.approx(found.flops / 5e5)
    assert found.memory > 16 * n + RUNTIME and found.cache == 0


def test_an_adapter_takes_less(base: Path) -> None:
    whole, adapter = (of("sft", recipe("sft", base, f"lora={lora}"), [50] * 8, slow) for lora in ("none", "{rank=4}"))
    assert adapter.trained == Shape.of(base).adapter(4, LoraShape().targets)
    assert adapter.flops < whole.flops and adapter.optimiser < whole.optimiser and adapter.logits < whole.logits


def test_fewer_tokens_in_a_pass_take_less_memory_and_the_same_computation(base: Path) -> None:
    few, many = (of("sft", recipe("sft", base, f"tokens={n}", "packed=false"), [50] * 64, slow) for n in (100, 800))
    assert few.activations * 7 < many.activations and few.flops == many.flops


def test_other_methods_read_the_reference_besides(base: Path) -> None:
    found = {name: of(name, recipe(name, base, "rows=4", "tokens=1000"), [50] * 8, slow) for name in ("dpo", "kto")}
    n, adapter = Shape.of(base).parameters, found["dpo"].trained
    learnt = (4 * n + 6 * adapter) * 400
    assert found["dpo"].flops == learnt + 2 * n * 400  # once
    assert found["kto"].flops == learnt + 2 * n * 1200  # twice, and the baseline in every update


def test_members_learn_one_by_one(base: Path) -> None:
    one, three = (of("reward", recipe("reward", base, f"members={n}"), [50] * 8, slow) for n in (1, 3))
    assert three.trained == 3 * one.trained and three.flops == pytest.approx(3 * one.flops)
    assert three.activations == one.activations


def test_replies_need_a_cache(base: Path) -> None:
    how = recipe("ppo", base, "updates=3", "ppo.prompts=4", "ppo.samples=2", "ppo.limit=10", "batch=6")
    found, shape = of("ppo", how, [20, 30], slow), Shape.of(base)
    assert found.updates == 3 and found.tokens == 3 * 8 * 35
    assert found.cache == 6 * 40 * 2 * 2 * 2 * 16 * 4  # replies, tokens, layers, keys and values, heads, width, bytes
    shared = of("ppo", recipe("ppo", base, "updates=3", "ppo.critic=shared"), [20, 30], slow)
    apart = of("ppo", recipe("ppo", base, "updates=3"), [20, 30], slow)
    assert shared.activations < 0.6 * apart.activations and shared.flops < apart.flops
    assert shape.parameters == found.parameters
    far = of("ppo", recipe("ppo", base, "updates=3", "engine=http://gpu:8000/v1"), [20, 30], slow)
    assert far.cache == 0 and far.flops < apart.flops and far.weights < apart.weights


def test_models_that_are_no_plain_decoders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EstimateError, match=r"no readable config\.json"):
        of("sft", recipe("sft", tmp_path), [1])
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8, "vocab_size": 9}))
    with pytest.raises(EstimateError, match="has no num_hidden_layers, intermediate_size, num_attention_heads"):
        of("sft", recipe("sft", tmp_path), [1])
    with pytest.raises(EstimateError, match="no rows"):
        of("sft", recipe("sft", tmp_path), [])


def test_the_speed_of_this_machine_is_measured() -> None:
    assert measured("cpu", 0.01)(32, 64, 64) > 1e6


def test_an_estimate_is_told_in_a_few_lines() -> None:
    one = Estimate(
        134_515_008, 4_884_480, 120, 468_000, 2.5e14, weights=0.56e9, gradients=2e7, optimiser=4e7, activations=1.2e9,
        logits=6e8, cache=0, seconds=2100,
    )  # fmt: skip
    text = told(one, free=8e9)
    assert text.splitlines() == [
        "model        134.5 million parameters; 4.9 million are trained",
        "updates      120 with 468,000 tokens in all",
        "computation  2.5e+14 FLOP, about 35 min on this machine",
        f"memory       {(2.42e9 + RUNTIME) / 1e9:.2f} GB: weights 0.56, gradients 0.02, optimiser 0.04, "
        "activations 1.20, logits 0.60",
    ]
    assert told(one, free=1e9).endswith(
        "1.00 GB free: lower `tokens`, then `max_length`, or train with `lora`, or in less `precision`"
    )


# --- docs/training.md


def tables(kind: type[Any], name: str) -> Iterator[tuple[str, type[Any]]]:
    """(name, dataclass) of a recipe and of all tables in it; those that several methods share have their own name."""
    yield name, kind
    for key, wanted in get_type_hints(kind).items():
        for one in (wanted, *get_args(wanted)):
            if dataclasses.is_dataclass(one) and isinstance(one, type):
                yield from tables(one, key if key in ("lora", "optimiser", "rewards") else f"{name}.{key}")


def default(one: Any) -> str:
    """How the page has the default of a field."""
    if one.default is not dataclasses.MISSING:
        return f"`{recipes._inline(one.default)}`"
    return "table" if one.default_factory is not dataclasses.MISSING else "needed"


@pytest.mark.parametrize("method", METHODS)
def test_the_page_has_every_key_with_its_default(method: str) -> None:
    sections = dict(re.findall(r"^### (\S+)\n(.*?)(?=^##)", (ROOT / "docs" / "training.md").read_text(), re.M | re.S))
    for name, kind in tables(importlib.import_module(f"alignment.{method}").Recipe, method):
        rows = re.findall(r"^\| `(\w+)` \| (.*?) \| .+ \|$", sections[name], re.M)
        assert rows == [(one.name, default(one)) for one in dataclasses.fields(kind)], name


@pytest.mark.parametrize("method", METHODS)
def test_the_example_of_each_method_is_a_recipe(method: str) -> None:
    path = ROOT / "alignment" / "recipes" / f"{method}.toml"
    how = recipes.load(importlib.import_module(f"alignment.{method}").Recipe, path)
    assert how.output == ROOT / "alignment" / "runs" / method


ROWS = {
    "sft": {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]},
    "reward": {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."},
    "dpo": {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."},
    "kto": {"prompt": "Hi?", "completion": "No.", "label": False},
    "ppo": {"prompt": "Hi?"},
}


@pytest.mark.parametrize("method", ROWS)
def test_a_dry_run_checks_the_data_and_tells_what_a_run_takes(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from app.cli import main

    made = tiny.model()
    made.base.save_pretrained(tmp_path / "base")
    made.tokenizer.save_pretrained(tmp_path / "base")
    data, other = tmp_path / "rows.jsonl", {"split": "train"}
    data.write_text("".join(json.dumps(ROWS[method] | other) + "\n" for _ in range(8)))
    files = "prompts" if method == "ppo" else "data"
    changes = [f"model={tmp_path / 'base'}", f'{files}=["{data}"]', f"output={tmp_path / 'run'}"]
    changes += ['rewards=[{name="short", kind="length"}]', "ppo.prompts=4"] if method == "ppo" else []
    with pytest.raises(SystemExit) as ended:
        main(["train", method, *changes, "--dry-run"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "updates  " in out and "GB: weights" in out
    assert not (tmp_path / "run").exists()
    data.write_text("{\n")
    with pytest.raises(SystemExit) as ended:
        main(["train", method, *changes, "--dry-run"])
    assert ended.value.code == 1 and "line 1: no JSON" in capsys.readouterr().err
