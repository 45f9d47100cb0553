"""How often the shipped policies stop public text: benign sets and, for reference, prompts that ask for harm.

python benchmarks/packs.py DATA [PACK ...]   (DATA: a folder with the sets that docs/packs.md names)
"""

from __future__ import annotations

import asyncio
import csv
import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

# guardrails.py beside this file has the name of the package: it is not what is meant here.
sys.path[:] = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]

from guardrails import judge_messages  # noqa: E402
from guardrails.check import Rate  # noqa: E402
from guardrails.policy import SHIPPED, load  # noqa: E402
from guardrails.types import Action, Message, Policy  # noqa: E402


def table(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def task(row: dict[str, Any]) -> str:
    """An instruction of self-instruct, with its input if it has one."""
    return f"{row['instruction']}\n{row['instances'][0].get('input') or ''}".strip()


def sets(data: Path) -> dict[str, list[str]]:
    """The texts of every set, by its name; the last three ask for harm."""
    xstest = table(data / "xstest/by_type_dev__xstest_prompts.csv.gz")
    with gzip.open(data / "clinc-oos/data_small.json.gz", "rt", encoding="utf-8") as file:
        clinc = json.load(file)
    tasks = [data / f"self-instruct/{name}.jsonl.gz" for name in ("seed_tasks", "user_oriented_instructions")]
    return {
        "xstest, safe": [row["prompt"] for row in xstest if row["label"] == "safe"],
        "clinc-oos": [text for split in clinc.values() for text, _ in split],
        "banking77": [row["text"] for row in table(data / "banking77/train.csv.gz")],
        "self-instruct": [task(row) for path in tasks for row in lines(path)],
        "ifeval": [row["prompt"] for row in lines(data / "ifeval/input_data.jsonl.gz")],
        "coconot contrast": [row["prompt"] for row in lines(data / "coconot/coconot_pref.jsonl.gz")],
        "mt-bench": [turn for row in lines(data / "mt-bench/question.jsonl.gz") for turn in row["turns"]],
        "xstest, unsafe": [row["prompt"] for row in xstest if row["label"] != "safe"],
        "advbench": [row["goal"] for row in table(data / "advbench/advbench_harmful_behaviors.csv.gz")],
        "harmbench": [row["Behavior"] for row in table(data / "harmbench/harmbench_behaviors_text_val.csv.gz")],
    }


async def measured(policies: list[Policy], texts: list[str]) -> list[tuple[Rate, Counter[str]]]:
    """By policy: (how many of the texts are stopped, which rules decided how often)."""
    rules: list[Counter[str]] = [Counter() for _ in policies]
    stopped, distinct = [0] * len(policies), dict.fromkeys(texts)
    for text in distinct:  # all policies in turn: they share the encoder's pass over it
        for i, policy in enumerate(policies):
            verdict, _ = await judge_messages(policy.input, (Message("user", text),))
            stopped[i] += verdict.action.stops
            if verdict.action is not Action.ALLOW:
                rules[i][f"{verdict.rule} ({verdict.action.word})"] += 1
    return [(Rate(count, len(distinct)), those) for count, those in zip(stopped, rules, strict=True)]


async def main(data: Path, packs: list[str]) -> None:
    policies = [load(pack) for pack in packs or sorted(path.stem for path in SHIPPED.glob("*.toml"))]
    for name, those in sets(data).items():
        for policy, (rate, rules) in zip(policies, await measured(policies, those), strict=True):
            shown = ", ".join(f"{rule} {count}" for rule, count in rules.most_common())
            print(f"{policy.name:<8} {name:<17} stopped {rate}  {shown}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        print(__doc__)
        raise SystemExit(0)
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2:]))
