"""newel's trainers beside TRL's, on a small model and the CPU: speed, memory, and what was learnt.

    python -m benchmarks.trainers --data ../shared/data/hh-rlhf/harmless-base_test.jsonl.gz --write

PPO is that of TRL 1.12, the last release that had it; fine-tuning and reward models are those of TRL 1.16. Both are
installed on the first run unless their environments are given. Each measured run is a process of its own; newel's and
the peer's take turns. `--tables ppo,learnt,sft,reward` adds what PPO learns. `--write` puts the section into
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from alignment.tokens import Template
from benchmarks.learning import pairs
from benchmarks.peers.page import table
from benchmarks.peers.running import Peer, environment
from guardrails.types import Message

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent / "peers"
PAGE = ROOT / "docs" / "benchmarks.md"
CACHE = Path.home() / ".cache" / "newel" / "peers"
MODEL = Path.home() / ".local" / "share" / "newel" / "models" / "smollm2-135m-instruct"
HEADING = "## Trainers (`benchmarks/trainers.py`)"
BATCH, PROMPT, REPLY, LONGEST = 16, 64, 64, 512
TRL = {
    # torch alone and first: left to itself pip takes a build of some gigabytes
    version: Peer(f"TRL {version}", f"trl-{version}", (("torch==2.13.0",), (f"trl=={version}.0", "peft==0.21.2")))
    for version in ("1.12", "1.16")
}
Json = dict[str, Any]


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- what is compared


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """One trainer in one setting. peer: the TRL whose script it is, empty for newel. how: what its script is asked.

    beside: the name of the way in the same table that it is compared with, at the same precision.
    """

    table: str
    name: str
    peer: str
    how: Json
    beside: str = ""

    @property
    def script(self) -> str:
        """The file that runs it."""
        return {"": "newel_trainers", "1.12": "trl_ppo", "1.16": "trl_rows"}[self.peer]


FULL, LORA = "TRL, all weights", "TRL, LoRA"
FOUR, ONE = "TRL, four models, 4 epochs", "TRL, four models, 1 epoch"


def ppo_ways(lr: float = 1e-5, lora_lr: float = 1e-4) -> Iterator[Way]:
    """TRL as shipped with all weights, newel as shipped with adapters on one base; then each as the other does it."""
    peer = {"task": "ppo", "lora": False, "lr": lr, "epochs": 4}
    own = {"task": "ppo", "lora": True, "lr": lora_lr, "epochs": 4, "critic": "adapter", "stop": None}
    whole = own | {"lora": False, "lr": lr, "critic": "model"}
    yield Way("ppo", "newel, critic on an adapter, 4 epochs", "", own, FOUR)
    yield Way("ppo", FOUR, "1.12", peer)
    yield Way("ppo", "newel, critic on the policy's states, 4 epochs", "", own | {"critic": "shared"}, FOUR)
    yield Way("ppo", "newel, all weights, three models, 4 epochs", "", whole, FOUR)
    yield Way("ppo", "TRL, policy with LoRA, 4 epochs", "1.12", peer | {"lora": True, "lr": lora_lr}, FOUR)
    yield Way("ppo", "newel, critic on an adapter, 1 epoch, KL stop", "", own | {"epochs": 1, "stop": 0.05}, FOUR)
    yield Way("ppo", ONE, "1.12", peer | {"epochs": 1}, FOUR)


def learnt_ways(lr: float = 1e-5, lora_lr: float = 1e-4) -> Iterator[Way]:
    """The PPO ways of which is shown what they learn."""
    for one in list(ppo_ways(lr, lora_lr))[:4]:
        yield Way("learnt", one.name, one.peer, one.how, one.beside)


def row_ways() -> Iterator[Way]:
    """Fine-tuning and reward models."""
    for lora, name, beside in ((True, "newel, LoRA", LORA), (False, "newel, all weights", FULL)):
        how = {"task": "sft", "lora": lora, "lr": 2e-4 if lora else 2e-5}
        yield Way("sft", name, "", how, beside)
        yield Way("sft", beside, "1.16", how)
    own, peer = ({"task": "reward", "lora": lora, "lr": 1e-4 if lora else 1e-5} for lora in (True, False))
    yield Way("reward", "newel, LoRA", "", own, LORA)
    yield Way("reward", LORA, "1.16", own)
    yield Way("reward", FULL, "1.16", peer, LORA)


# --- data


ASKED = (
    "how many days of leave I have left",
    "who signs my travel claim",
    "when the next payday is",
    "my notice period",
)
WHY = ("I start in May", "my manager is away", "I moved last month", "the portal shows an error", "I work part-time")
ADVICE = (
    "You find it on the first page of the portal.", "It stands in your contract, in the part about time.",
    "Your team's assistant can tell you today.", "Ask for it in writing, and keep the answer.",
    "The handbook has a table of all cases; yours is the second one.",
)  # fmt: skip
CURT = ("No idea.", "That is not my job.", "Look it up yourself, everybody else does.", "Why do you ask me that again?")


def made(number: int, seed: int = 0) -> Iterator[Json]:
    """Pairs of our own, in lengths as various as those of real talk: a reply that helps, and one that does not."""
    chance = random.Random(seed)
    for _ in range(number):
        talk: list[Json] = []
        for _ in range(chance.choice((1, 1, 2, 3))):
            more = " ".join(chance.choice(WHY) + "." for _ in range(chance.randint(1, 8)))
            talk.append({"role": "user", "content": f"Please tell me {chance.choice(ASKED)}. {more}"})
            talk.append({"role": "assistant", "content": helpful(chance)})
        bad = " ".join(chance.choice(CURT) for _ in range(chance.randint(1, 6)))
        rejected = [{"role": "assistant", "content": bad}]
        yield {"prompt": talk[:-1], "chosen": [talk[-1]], "rejected": rejected}


def helpful(chance: random.Random) -> str:
    return " ".join(chance.choice(ADVICE) for _ in range(chance.randint(1, 7)))


@dataclass(frozen=True, slots=True)
class Work:
    """What all trainers get. files: by what is asked for them. tokens: of all SFT rows, prompts included. pairs: to
    train a reward model on. wanted: the tokens that the rule of the quality table counts."""

    files: dict[str, str]
    tokens: int
    pairs: int
    wanted: list[int]


def dealt(model: Path, data: Path | None, rows: int, held_out: int, folder: Path) -> Work:
    """Writes the files; raises SystemExit where there are too few rows."""
    template = Template(AutoTokenizer.from_pretrained(model, local_files_only=True))
    found, prompts = [], []
    source = list(pairs(data) if data else made(4 * (rows + held_out)))
    random.Random(0).shuffle(source)
    for pair in source:
        both = [_row(template, pair, side) for side in ("chosen", "rejected")]
        if len(both[0].prompt) >= PROMPT:
            prompts.append({"ids": both[0].prompt[-PROMPT:]})
        if max(map(len, both)) <= LONGEST:
            told = {"completion": pair["chosen"], "ids": both[0].ids, "trained": both[0].trained}
            found.append({name: pair[name] for name in ("prompt", "chosen", "rejected")} | told)
    if len(found) < rows + held_out or len(prompts) < BATCH:
        raise SystemExit(
            f"{data or 'made'}: {len(found)} rows of at most {LONGEST} tokens, {len(prompts)} long prompts"
        )
    train, test = found[:rows], found[rows : rows + held_out]
    files = {name: str(folder / f"{name}.jsonl") for name in ("prompts", "sft", "sft-test", "reward", "reward-test")}
    _write(files["prompts"], prompts[:512])
    for name, some in (("", train), ("-test", test)):
        _write(files[f"sft{name}"], [_only(one, "prompt", "completion", "ids", "trained") for one in some])
        _write(files[f"reward{name}"], [_only(one, "prompt", "chosen", "rejected") for one in some])
    words = template.tokenizer.convert_ids_to_tokens(range(len(template.tokenizer)))
    wanted = [i for i, word in enumerate(words) if "a" in word.lower() and i not in template.end]
    return Work(files, sum(len(one["ids"]) for one in train), len(train), wanted)


def _row(template: Template, pair: Json, side: str) -> Any:
    talk = [Message(**one) for one in (*pair["prompt"], *pair[side])]
    return template.conversation(talk, "last")


def _only(row: Json, *names: str) -> Json:
    return {name: row[name] for name in names}


def _write(path: str, rows: Sequence[Json]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- measuring


@dataclass(slots=True)
class Runs:
    """What was measured, by way and precision, a dictionary a round."""

    found: dict[tuple[Way, str], list[Json]] = field(default_factory=dict)

    def median(self, way: Way, precision: str, what: str) -> float:
        values: list[float] = [one[what] for one in self.found[way, precision]]
        return statistics.median(values)

    def beside(self, way: Way, precision: str, what: str) -> float | None:
        """How many times that of the way it is compared with."""
        for other, at in self.found:
            if (other.table, other.name, at) == (way.table, way.beside, precision):
                return self.median(way, precision, what) / self.median(other, precision, what)
        return None


class Failed(RuntimeError):
    """A script that ended without an answer."""


def run(way: Way, how: Json, python: Path) -> Json:
    """What the way's script found; raises Failed with the end of what it said."""
    env = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    if not way.peer:
        env["PYTHONPATH"] = str(ROOT)
    command = [str(python), str(HERE / f"{way.script}.py")]
    done = subprocess.run(
        command, env=env, input=json.dumps(way.how | how), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Failed(f"{way.name}: {done.stderr[-2000:]}")
    found: Json = json.loads(done.stdout.splitlines()[-1])
    return found


def asked(way: Way, work: Work, options: argparse.Namespace, precision: str, seed: int, folder: str) -> Json:
    """What a script is told beside what its way says."""
    common = {"model": str(options.model), "precision": precision, "seed": seed, "folder": folder, "batch": BATCH}
    files = work.files
    if way.how["task"] == "ppo":
        learns = way.table == "learnt"
        return common | {
            "prompts": files["prompts"], "limit": REPLY, "updates": options.learnt if learns else options.updates,
            "wanted": work.wanted if learns else [], "scale": 10 / REPLY,
        }  # fmt: skip
    task = way.how["task"]
    return common | {"train": files[task], "test": files[f"{task}-test"], "epochs": 1}


def amount(way: Way, work: Work, options: argparse.Namespace) -> int:
    """What `per_second` counts: tokens of replies, tokens of rows, or pairs."""
    updates: int = options.learnt if way.table == "learnt" else options.updates
    amounts: dict[str, int] = {"ppo": BATCH * REPLY * updates, "sft": work.tokens, "reward": work.pairs}
    return amounts[way.how["task"]]


def measure(ways: Sequence[Way], work: Work, options: argparse.Namespace, pythons: dict[str, Path]) -> Runs:
    """Everything, way by way within a round, so that those compared are neighbours in time."""
    runs = Runs()
    for seed in range(options.rounds):
        for precision in options.precisions:
            for way in ways:
                tell(f"round {seed + 1} {way.table} {precision} {way.name}")
                with tempfile.TemporaryDirectory(prefix="newel-trainer-") as folder:
                    told = run(way, asked(way, work, options, precision, seed, folder), pythons[way.peer])
                told["per_second"] = amount(way, work, options) / told["seconds"]
                told["per_cpu"] = amount(way, work, options) / told["cpu"]
                runs.found.setdefault((way, precision), []).append(told)
                tell(f"  {told['per_second']:.1f}/s, {told['cpu']:.0f} CPU s, {told['megabytes']:,.0f} MB")
    return runs


# --- the section


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """The mean, and where there are several seeds their standard deviation."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def speed_rows(runs: Runs, name: str) -> Iterator[list[str]]:
    """Of one table: speed and memory, with the ratios to what each way is compared with, then what was learnt."""
    for (way, precision), found in runs.found.items():
        if way.table != name:
            continue
        row = [way.name, precision, f"{runs.median(way, precision, 'per_second'):.1f}"]
        row += [times(runs.beside(way, precision, "per_second")), f"{runs.median(way, precision, 'cpu'):.0f}"]
        row += [times(runs.beside(way, precision, "per_cpu")), f"{runs.median(way, precision, 'megabytes'):,.0f}"]
        row += [times(runs.beside(way, precision, "megabytes"))]
        row += [spread([one[what] for one in found]) for what in ("loss", "accuracy") if what in found[0]]
        yield row


def learnt_rows(runs: Runs) -> Iterator[list[str]]:
    for (way, precision), found in runs.found.items():
        if way.table == "learnt":
            ends = [statistics.fmean(one["rewards"][-2:]) for one in found]
            firsts = [one["rewards"][0] for one in found]
            kls = [statistics.fmean(one["kls"][-2:]) for one in found]
            yield [way.name, precision, spread(firsts, 2), spread(ends, 2), spread(kls, 2)]


SPEED = ("trainer", "precision")
COST = ("times TRL's", "CPU s", "work a CPU s, times TRL's", "peak MB", "share of TRL's")


def section(runs: Runs, work: Work, options: argparse.Namespace) -> str:
    """The section of the page, from its heading on."""
    data = options.data.name if options.data else "conversations made by the benchmark"
    parts = [
        HEADING,
        f"`python -m benchmarks.trainers --write`, {options.model.name}, {data}, {options.rounds} round(s): medians. "
        "Each run is\na process of its own, newel's and TRL's take turns on the same cores, loading is not timed, "
        "checkpoints are written by\nneither. Peak MB is VmHWM of the process, loading included. bfloat16: TRL's "
        "default, autocast over weights in float32;\nnewel's keeps a frozen base in bfloat16, and trains in float32 as "
        "TRL does.",
    ]
    if any(way.table == "ppo" for way, _ in runs.found):
        parts += [
            "### PPO",
            f"Tokens of replies a second over whole updates: {BATCH} prompts of {PROMPT} tokens, {REPLY} new tokens "
            f"each (no token ends a\nreply, in either), {options.updates} update(s). The rest is TRL 1.12's default "
            "for both: temperature 0.7, one minibatch of 16, KL 0.05,\nvalue weight 0.1, clips 0.2, lambda 0.95. TRL: "
            "policy, reference, value and reward model, gradient checkpointing,\n2 passes of 8 rows, all as shipped; "
            "newel: one base, a LoRA adapter (rank 16) each for policy, critic and reward model; with all weights "
            "the policy, its\ncritic, and a base that is the reference and has the reward model's adapter.",
            table([*SPEED, "tokens/s", *COST], speed_rows(runs, "ppo")),
        ]
    if any(way.table == "learnt" for way, _ in runs.found):
        parts += [
            f"What is learnt in {options.learnt} updates where the reward is a rule, 10 times the share of the reply's "
            "tokens with an `a`: the\nreward at first, that of the last two updates, and nats a reply from the "
            "reference. lr 1e-5 for all weights, 1e-4 for\nadapters, 4 epochs.",
            table([*SPEED, "reward at first", "at the end", "KL"], learnt_rows(runs)),
        ]
    if any(way.table == "sft" for way, _ in runs.found):
        parts += [
            "### Fine-tuning",
            f"{work.pairs} rows of at most {LONGEST} tokens, {work.tokens:,} in all, prompts included; the reply alone "
            f"is trained. {BATCH} rows an update, one\nepoch, lr 2e-4 for LoRA (rank 16, all linear layers), 2e-5 for "
            "all weights, falling linearly. TRL 1.16 otherwise as\nshipped: gradient checkpointing, 8 rows a pass, "
            "padded. newel: packed, at most 4096 tokens a pass. Loss: nats a held-out\ntoken, on the same tokens.",
            table([*SPEED, "tokens/s", *COST, "loss"], speed_rows(runs, "sft")),
        ]
    if any(way.table == "reward" for way, _ in runs.found):
        parts += [
            "### Reward model",
            f"{work.pairs} pairs, {BATCH} an update, one epoch, lr 1e-4 for LoRA, 1e-5 for all weights (which newel's "
            "reward models do not train),\nno centring. Loss and accuracy: of held-out pairs.",
            table([*SPEED, "pairs/s", *COST, "loss", "accuracy"], speed_rows(runs, "reward")),
        ]
    where = f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores"
    return "\n\n".join([*parts, f"{where}, {time.strftime('%Y-%m-%d')}."]) + "\n"


def put(text: str, page: Path) -> None:
    """Replaces the section of this heading in a page, or adds it at the end."""
    before, found, rest = page.read_text(encoding="utf-8").partition(HEADING)
    after = re.search(r"^## ", rest, re.MULTILINE) if found else None
    tail = f"\n{rest[after.start() :]}" if after else ""
    page.write_text(f"{before.rstrip()}\n\n{text}{tail}", encoding="utf-8")


def main() -> None:
    """Runs everything and prints the section; `--write` puts it where it belongs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help=f"a checkpoint's folder ({MODEL})")
    parser.add_argument("--data", type=Path, help="pairs as hh-rlhf has them; left out: made here")
    parser.add_argument("--trl-1.12", dest="ppo", type=Path, help="an environment with trl 1.12 and peft")
    parser.add_argument("--trl-1.16", dest="rows", type=Path, help="an environment with trl 1.16 and peft")
    parser.add_argument("--tables", default="ppo,sft,reward", help="some of ppo, sft, reward, learnt")
    parser.add_argument("--ways", default="", help="only ways whose name this regular expression finds")
    parser.add_argument("--precisions", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--updates", type=int, default=1, help="of PPO")
    parser.add_argument("--learnt", type=int, default=10, help="updates of PPO in the table `learnt`")
    parser.add_argument("--size", type=int, default=48, help="rows and pairs to train on")
    parser.add_argument("--held-out", type=int, default=48, help="rows and pairs that measure")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"where the peers are installed ({CACHE})")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md")
    options = parser.parse_args()
    options.precisions, tables = options.precisions.split(","), options.tables.split(",")
    options.model = options.model.expanduser().resolve()
    ways = [one for one in (*ppo_ways(), *learnt_ways(), *row_ways()) if one.table in tables]
    ways = [one for one in ways if re.search(options.ways, one.name)]
    pythons = {"": Path(sys.executable)}
    for version, given in (("1.12", options.ppo), ("1.16", options.rows)):
        if any(one.peer == version for one in ways):
            pythons[version] = given / "bin" / "python" if given else environment(TRL[version], options.cache, tell)
    with tempfile.TemporaryDirectory(prefix="newel-trainers-") as home:
        work = dealt(options.model, options.data, options.size, options.held_out, Path(home))
        text = section(measure(ways, work, options, pythons), work, options)
    print(text)
    if options.write:
        put(text, PAGE)


if __name__ == "__main__":
    main()
