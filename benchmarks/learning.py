"""Whether models learn: SFT, a reward model, PPO and a judge on real pairs, by `newel train` as users run it.

    python -m benchmarks.learning ../shared/data/hh-rlhf/harmless-base_test.jsonl.gz runs/learning \\
        --model ~/.local/share/newel/models/smollm2-135m-instruct --write

The conversations are dealt out to three sets that share none: one trains the reward model, one a second reward model
that judges and that PPO never asks for a reward, one measures. What is done is not done again, and a step that was cut
short goes on. `--write` puts the figures into docs/learning.md.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignment import dataset
from alignment.records import BadRecords, Demonstration, PreferencePair, Prompt, Row, to_json

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "learning.md"
BEGIN, END = "<!-- begin: benchmarks.learning -->", "<!-- end: benchmarks.learning -->"
Json = dict[str, Any]

RECIPES = {
    "sft": """
data = ["../demonstrations.jsonl"]
turns = "last"
tokens = 1024
max_length = 512
rows = 16
epochs = 1
[lora]
rank = 16
[optimiser]
lr = 2e-4
schedule = "cosine"
""",
    "reward": """
data = ["../first.jsonl", "../measured.jsonl"]
objectives = ["harmless"]
pooling = "both"
members = 1
epochs = 1
rows = 16
max_length = 512
often = 0
[lora]
rank = 8
alpha = 16.0
[optimiser]
lr = 5e-5
""",
    "ppo": """
prompts = ["../prompts.jsonl"]
critic = "../reward/release"
held_out = "../judge/release"
max_prompt = 128
shown = 24
often = 24
critic_lr = 2e-4
[lora]
rank = 16
[optimiser]
lr = 2e-4
warmup = 0.0
[[rewards]]
name = "harmless"
kind = "model"
path = "../reward/release"
[ppo]
prompts = 24
limit = 48
minibatches = 4
warmup = 1
missing_end = 2.0
[ppo.kl]
coefficient = 0.05
[bounds]
kl = 25.0
""",
}


# --- data


def pairs(source: Path, folder: Path) -> Sequence[PreferencePair]:
    """The pairs of single replies that differ in a file of hh-rlhf; what cannot be read, as empty ones, is left out."""
    with gzip.open(source, "rt") if source.suffix == ".gz" else source.open() as file:
        lines = file.readlines()
    copy = folder / "whole.jsonl"
    copy.write_text("".join(lines))
    try:
        found = dataset.read(copy, PreferencePair)
    except BadRecords as bad:
        copy.write_text("".join(line for number, line in enumerate(lines, 1) if number not in bad.lines))
        found = dataset.read(copy, PreferencePair)
    return [one for one in found.records if len(one.chosen) == len(one.rejected) == 1 and one.chosen != one.rejected]


def _set(pair: PreferencePair) -> str:
    """Which of the sets a conversation belongs to: 40 % each to learn from, 20 % measure."""
    first = hashlib.sha256(pair.prompt[0].content.lower().encode()).digest()[0]
    return "first" if first < 102 else "second" if first < 205 else "measured"


def deal(source: Path, folder: Path) -> Mapping[str, int]:
    """Writes the files of the steps; returns how many pairs each set has."""
    sets: dict[str, list[PreferencePair]] = {"first": [], "second": [], "measured": []}
    for pair in pairs(source, folder):
        name = _set(pair)
        sets[name].append(replace(pair, slice="harmless", split="test" if name == "measured" else "train"))
    for name, some in sets.items():
        _write(folder / f"{name}.jsonl", some)
    learnt, measured = [*sets["first"], *sets["second"]], sets["measured"]
    told = [
        Demonstration(messages=(*one.prompt, *one.chosen), split=one.split) for one in (*sets["first"], *measured[:100])
    ]
    _write(folder / "demonstrations.jsonl", told)
    _write(folder / "prompts.jsonl", [Prompt(prompt=one.prompt, split=one.split) for one in (*learnt, *measured)])
    return {name: len(some) for name, some in sets.items()}


def _write(path: Path, records: Sequence[Row]) -> None:
    path.write_text("".join(f"{to_json(one)}\n" for one in records))


# --- steps


def step(name: str, method: str, model: Path, folder: Path, changes: Sequence[str]) -> None:
    """Trains one model by the method's recipe, unless its release is there."""
    if (folder / name / "release").is_dir():
        return
    where = folder / name
    where.mkdir(exist_ok=True)
    recipe = where / "asked.toml"
    recipe.write_text(f'model = "{model}"\noutput = "."\n{RECIPES[method]}')
    print(f"== {name}", file=sys.stderr, flush=True)
    subprocess.run(
        [str(Path(sys.executable).with_name("newel")), "train", method, str(recipe), *changes], cwd=ROOT, check=True
    )


# --- what came of it


def figures(folder: Path, sizes: Mapping[str, int], asked: str) -> str:
    """The page's section: what each step measured on conversations that none of them was trained on."""
    sft, ppo = (_metrics(folder / name) for name in ("sft", "ppo"))
    reward, judge, found = (_json(folder / name / "evaluation.json") for name in ("reward", "judge", "ppo"))
    perplexity = [row["test/perplexity"] for row in sft if "test/perplexity" in row]
    rows = [
        ("SFT: perplexity of held-out replies", f"{perplexity[0]:.1f} before, {perplexity[-1]:.1f} after"),
        ("reward model: accuracy on held-out pairs", _interval(reward["accuracy"])),
        ("... of replies of like length", _interval(reward["length_matched"]["accuracy"])),
        ("... calibration error (ECE), temperature", _calibration(_json(folder / "reward" / "calibration.json"))),
        ("judge (other pairs, other seed): accuracy", _interval(judge["accuracy"])),
        ("PPO: reward on held-out prompts, before", _interval(found["harmless/before"])),
        ("... after", _interval(found["harmless/after"])),
        ("... share of prompts with the better reward", _interval(found["harmless/wins"])),
        ("**judge's score, before**", _interval(found["held-out/before"])),
        ("**... after**", _interval(found["held-out/after"])),
        ("**win rate by the judge**", _interval(found["held-out/wins"])),
        ("KL from the reference, nats a reply", f"{ppo[-1]['kl/reply']:.2f} (bound 25)"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    every = [row for row in ppo if row["step"] in (1, ppo[-1]["step"]) or row["step"] % 5 == 0]
    curve = "\n".join(
        f"| {row['step']} | {row['rewards/harmless']:.2f} | {row['signs/held_out']:.2f} | {row['kl/reply']:.2f} "
        f"| {row['reply/tokens']:.0f} | {row['value/explained']:.2f} |"
        for row in every
    )
    dealt = f"{sizes['first']} pairs to learn from, {sizes['second']} for the judge, {sizes['measured']} to measure"
    return (
        f"`{asked}`; {dealt}.\n\n| what | value (95 % interval) |\n|---|---|\n{table}\n\n"
        "The curve of PPO, on the prompts of each update:\n\n"
        "| update | reward | judge's score | KL a reply | tokens a reply | value explained |\n|"
        f"{'---|' * 6}\n"
        f"{curve}\n"
    )


def _json(path: Path) -> Json:
    found: Json = json.loads(path.read_text())
    return found


def _metrics(folder: Path) -> list[Json]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _interval(one: Json) -> str:
    return f"{one['value']:.3f} ({one['low']:.3f} to {one['high']:.3f}, n = {one['n']})"


def _calibration(found: Json) -> str:
    return f"{found['ece']:.3f}, {found['temperature']:.2f}"


def put(section: str) -> None:
    """Replaces the section of the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{section}{END}{after}")


def main() -> None:
    """Trains what is not yet trained, and tells what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="a file of hh-rlhf")
    parser.add_argument("folder", type=Path, help="where the runs are")
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint's folder")
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--updates", type=int, default=24, help="of PPO")
    parser.add_argument("--until", choices=("sft", "reward", "judge", "ppo"), default="ppo", help="the last step")
    parser.add_argument("--write", action="store_true", help="put the figures into docs/learning.md")
    how = parser.parse_args()
    folder = how.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sizes, common = deal(how.pairs, folder), [f"precision={how.precision}"]
    print(sizes, file=sys.stderr)
    tuned = folder / "sft" / "release"
    judge = [f'data=["{folder}/second.jsonl", "{folder}/measured.jsonl"]', "epochs=0", "seed=1"]
    for name, method, model, changes in (
        ("sft", "sft", how.model.resolve(), []), ("reward", "reward", tuned, []), ("judge", "reward", tuned, judge),
        ("ppo", "ppo", tuned, [f"updates={how.updates}"]),
    ):  # fmt: skip
        step(name, method, model, folder, [*common, *changes])
        if name == how.until:
            break
    if how.until == "ppo":
        asked = f"python -m benchmarks.learning {how.pairs.name} FOLDER --updates {how.updates}"
        section = figures(folder, sizes, f"{asked} --precision {how.precision}")
        print(section)
        if how.write:
            put(section)


if __name__ == "__main__":
    main()
