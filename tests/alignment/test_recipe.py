"""Recipes: what is read is what was written, and whatever is wrong is told with its place and what to do."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

from alignment.recipe import RecipeError, dump, load


@dataclass(frozen=True, slots=True)
class Adam:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["constant", "linear"] = "linear"
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ValueError("lr is at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    name: str
    weight: float = 1.0
    limit: float | None = None
    words: tuple[str, ...] = ()
    optimisers: tuple[Adam, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    model: Path
    data: tuple[Path, ...] = ()
    rewards: tuple[Source, ...] = ()
    optimiser: Adam = field(default_factory=lambda: Adam(lr=1e-5, clip=0.5))
    lora: Adam | None = field(default_factory=Adam)
    held_out: Path | None = None
    epochs: int = 1
    packed: bool = True
    device: str = ""
    stop: float | None = 0.05
    shares: Mapping[str, float] = field(default_factory=dict)
    levels: tuple[tuple[int, ...], ...] = ()


RICH = Recipe(
    model=Path("/models/base one"),
    data=(Path('/a "quoted".jsonl'), Path("/b.jsonl")),
    rewards=(
        Source(name='say "no"\\ and\nlines\t\x7f ü', words=("a'b", ""), optimisers=(Adam(lr=1e-5), Adam(clip=None))),
        Source(name="none", weight=1e-30, limit=-2.0),
    ),
    optimiser=Adam(lr=3e22, betas=(0.5, 1 / 3), schedule="constant", clip=None),
    lora=None,
    epochs=10**12,
    packed=False,
    device="cuda:0",
    stop=None,
    shares={"a.b": 0.1, "plain": math.inf},
    levels=((1, 2), (), (3,)),
)


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def problems(path: Path | None, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as raised:
        load(Recipe, path, overrides)
    assert str(raised.value) == "\n".join(raised.value.problems)
    return raised.value.problems


# --- reading


def test_a_recipe_has_what_its_file_says_and_defaults_for_the_rest(tmp_path):
    path = written(
        tmp_path, 'model = "m"\nepochs = 3\n[optimiser]\nschedule = "constant"\n[[rewards]]\nname = "kind"\n'
    )
    read = load(Recipe, path)
    assert read == Recipe(
        model=tmp_path / "m",
        epochs=3,
        optimiser=Adam(lr=1e-5, clip=0.5, schedule="constant"),  # the rest of the recipe's own optimiser
        rewards=(Source(name="kind"),),
    )


def test_a_number_may_be_written_without_a_point_and_is_still_one_with_it(tmp_path):
    lr = load(Recipe, written(tmp_path, 'model = "m"\noptimiser.lr = 1\n')).optimiser.lr
    assert lr == 1.0 and isinstance(lr, float)


def test_paths_are_relative_to_the_recipe_and_those_of_overrides_to_the_shell(tmp_path, monkeypatch):
    (tmp_path / "shell").mkdir()
    monkeypatch.chdir(tmp_path / "shell")
    path = written(tmp_path, 'model = "../models/m"\ndata = ["a.jsonl", "/b.jsonl"]\n')
    read = load(Recipe, path, ["held_out=c.jsonl"])
    assert read.model == tmp_path.parent / "models/m"
    assert read.data == (tmp_path / "a.jsonl", Path("/b.jsonl"))
    assert read.held_out == tmp_path / "shell/c.jsonl"


def test_a_home_folder_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert load(Recipe, None, ["model=~/m"]).model == Path("/home/someone/m")


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("epochs=5", {"epochs": 5}),
        ("device=cuda:1", {"device": "cuda:1"}),
        ('device="a b"', {"device": "a b"}),
        ("device=", {"device": ""}),
        ("device=a=b", {"device": "a=b"}),
        ("packed = false", {"packed": False}),
        ("stop=none", {"stop": None}),
        ("lora=none", {"lora": None}),
        ("lora.lr=2e-3", {"lora": Adam(lr=2e-3)}),
        ("optimiser.lr=1e-6", {"optimiser": Adam(lr=1e-6, clip=0.5)}),
        ("optimiser={lr = 0.5}", {"optimiser": Adam(lr=0.5, clip=0.5)}),
        ("levels=[[1], [2, 3]]", {"levels": ((1,), (2, 3))}),
        ("rewards.0.weight=2", {"rewards": (Source(name="kind", weight=2.0),)}),
        ("shares.a=0.5", {"shares": {"a": 0.5}}),
    ],
)
def test_an_override_changes_one_value(tmp_path, override, change):
    path = written(tmp_path, 'model = "/m"\n[[rewards]]\nname = "kind"\n')
    assert load(Recipe, path, [override]) == replace(load(Recipe, path), **change)


def test_the_last_override_counts_and_a_table_can_be_given_back_after_none(tmp_path):
    path = written(tmp_path, 'model = "/m"\nlora = "none"\n')
    assert load(Recipe, path).lora is None
    assert load(Recipe, path, ["lora.lr=1", "lora.lr=2"]).lora == Adam(lr=2.0)


# --- what is wrong


def test_unknown_keys_are_all_told_with_their_lines_and_the_nearest_known_key(tmp_path):
    path = written(tmp_path, 'model = "m"\nepoch = 1\nlr = 2\nzzz = 1\n\n[optimiser]\nshedule = "linear"\n')
    assert problems(path) == (
        f"{path}:2: unknown key 'epoch'; did you mean 'epochs'?",
        f"{path}:3: unknown key 'lr'; did you mean 'optimiser.lr'?",
        f"{path}:4: unknown key 'zzz'; there are model, data, rewards, optimiser, lora, held_out, epochs, packed, "
        "device, stop, shares, levels",
        f"{path}:7: unknown key 'optimiser.shedule'; did you mean 'schedule'?",
    )


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('epochs = "two"', 'epochs = "two" is not a whole number'),
        ("epochs = true", "epochs = true is not a whole number"),
        ("epochs = 1.5", "epochs = 1.5 is not a whole number"),
        ("packed = 1", "packed = 1 is not true or false"),
        ("device = 3", "device = 3 is not text"),
        ("model = 3", "model = 3 is not a path"),
        ('held_out = ""', 'held_out = "" is not a path or "none"'),
        ('stop = "often"', 'stop = "often" is not a number or "none"'),
        ("stop = true", 'stop = true is not a number or "none"'),
        ('optimiser.lr = "fast"', 'optimiser.lr = "fast" is not a number'),
        ("optimiser = 3", "optimiser = 3 is not a table of lr, betas, schedule, clip"),
        ('optimiser.schedule = "cos"', 'optimiser.schedule = "cos" is not one of "constant", "linear"'),
        ("optimiser.betas = [0.5]", "optimiser.betas = [0.5] is not a list of 2 values: a number, a number"),
        ('data = "a.jsonl"', 'data = "a.jsonl" is not a list, each a path'),
        ("data = [\n'a',\n\n3]", "data.1 = 3 is not a path"),
        ("packed = 2020-01-01", "packed = 2020-01-01 is not true or false"),
    ],
)
def test_a_value_of_the_wrong_type_is_told_with_key_type_and_value(tmp_path, line, told):
    path = written(tmp_path, f"{line}\n" if line.startswith("model") else f'{line}\nmodel = "m"\n')
    place = 4 if line.startswith("data = [") else 1
    assert problems(path) == (f"{path}:{place}: {told}",)


def test_a_value_that_the_class_turns_down_is_told_at_its_line(tmp_path):
    path = written(tmp_path, 'model = "m"\n[optimiser]\nclip = 1\nlr = -1\n')
    assert problems(path) == (f"{path}:4: optimiser: lr is at least 0",)
    assert problems(None, "model=m", "optimiser.lr=-2") == ("override 'optimiser.lr=-2': optimiser: lr is at least 0",)


def test_a_mistake_in_a_list_of_tables_is_told_at_its_line(tmp_path):
    path = written(tmp_path, 'model = "m"\n[[rewards]]\nname = "a"\n\n[[rewards]]\nweight = "much"\n')
    assert problems(path) == (
        f'{path}:6: rewards.1.weight = "much" is not a number',
        f"{path}:5: there is no 'rewards.1.name'; add rewards.1.name = ... (text)",
    )


def test_a_missing_key_is_told_with_what_to_add(tmp_path):
    path = written(tmp_path, "epochs = 1\n")
    assert problems(path) == (f"{path}:1: there is no 'model'; add model = ... (a path)",)
    assert problems(None) == ("the recipe: there is no 'model'; add model = ... (a path)",)


def test_a_file_that_is_no_toml_is_told_with_its_line(tmp_path):
    (told,) = problems(written(tmp_path, 'model = "m"\nepochs = \n'))
    assert told.startswith(f"{tmp_path / 'recipe.toml'}:2: not valid TOML: ")
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xff")
    assert problems(path) == (f"{path}: is not UTF-8; save it as UTF-8",)


def test_a_file_that_is_not_there_is_told_with_the_nearest_that_is(tmp_path):
    written(tmp_path, "")
    (told,) = problems(tmp_path / "recipes.toml")
    assert (
        told == f"{tmp_path / 'recipes.toml'}: cannot be read (No such file or directory); did you mean 'recipe.toml'?"
    )


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("epochs", "is not key=value; write a key, `=`, and a value of TOML"),
        ("=3", "is not key=value; write a key, `=`, and a value of TOML"),
        ("optimiser..lr=3", "is not key=value; write a key, `=`, and a value of TOML"),
        ("epoch=3", "unknown key 'epoch'; did you mean 'epochs'?"),
        ("epochs=two", 'epochs = "two" is not a whole number'),
        ("optimiser.clp=2", "unknown key 'optimiser.clp'; did you mean 'clip'?"),
        ("rewards.1.weight=2", "the list has 1 items; write a number under 1, not '1'"),
        ("epochs=1\npacked=false", 'epochs = "1\\npacked=false" is not a whole number'),
    ],
)
def test_an_override_that_cannot_be_used_is_told_as_it_was_given(tmp_path, override, told):
    path = written(tmp_path, 'model = "m"\n[[rewards]]\nname = "kind"\n')
    assert problems(path, override) == (f"override {override!r}: {told}",)


def test_of_two_overrides_the_one_that_counts_is_told():
    (told,) = problems(None, "model=m", "optimiser.lr=2", 'optimiser={lr = "fast"}')
    assert told.startswith("override 'optimiser={lr = \"fast\"}': optimiser.lr")


def test_an_override_of_a_list_without_quotes_says_what_lacks(tmp_path):
    (told,) = problems(None, "model=m", "data=[a.jsonl]")
    assert told.startswith("override 'data=[a.jsonl]': the value is not valid TOML: ")
    assert told.endswith("; texts in lists have quotes")


# --- writing


@pytest.mark.parametrize(
    "recipe", [RICH, Recipe(model=Path("/m")), replace(RICH, optimiser=Adam(clip=None), rewards=())]
)
def test_what_is_written_loads_back_equal(tmp_path, recipe):
    path = written(tmp_path, dump(recipe))
    assert load(Recipe, path) == recipe
    assert dump(load(Recipe, path)) == dump(recipe)


def test_a_recipe_is_written_as_a_person_would():
    text = dump(Recipe(model=Path("/m"), rewards=(Source(name="a"),), stop=None, optimiser=Adam(lr=1e-5, clip=None)))
    assert text == (
        'model = "/m"\ndata = []\nepochs = 1\npacked = true\ndevice = ""\nstop = "none"\nlevels = []\n'
        '\n[[rewards]]\nname = "a"\nweight = 1.0\nwords = []\noptimisers = []\n'
        '\n[optimiser]\nlr = 1e-05\nbetas = [0.9, 0.999]\nschedule = "linear"\nclip = "none"\n'
        '\n[lora]\nlr = 0.0001\nbetas = [0.9, 0.999]\nschedule = "linear"\nclip = 1.0\n'
        "\n[shares]\n"
    )  # limit and held_out are None by default and left out


def test_whole_numbers_of_numbers_are_written_as_they_will_be_read():
    text = dump(Recipe(model=Path("/m"), stop=1, optimiser=Adam(lr=2)))
    assert "stop = 1.0\n" in text and "lr = 2.0\n" in text and "epochs = 1\n" in text


def test_relative_paths_are_written_so_that_they_mean_the_same_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f'model = "{tmp_path}/m"\n' in dump(Recipe(model=Path("m")))


def test_what_toml_cannot_say_is_an_error():
    @dataclass(frozen=True)
    class Odd:
        what: object = None

    with pytest.raises(RecipeError, match=r"a recipe cannot hold <object"):
        dump(Odd(object()))
    with pytest.raises(RecipeError, match="cannot be the text 'none'"):
        dump(Titled("none"))


@dataclass(frozen=True, slots=True)
class Titled:
    title: str | None = None


def test_reading_recipes_needs_no_torch():
    code = "import sys, alignment.recipe, alignment.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
