"""What the embedded classifiers cost: CPU and wall time of one text through the encoder and all heads, one thread.

python benchmarks/classifiers.py   (needs `newel guard pull`)
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

# guardrails.py beside this file has the name of the package: it is not what is meant here.
sys.path[:] = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]
os.environ["OMP_NUM_THREADS"] = "1"

from guardrails import heads  # noqa: E402
from guardrails.catalog import build, options  # noqa: E402
from guardrails.encoder import Encoder  # noqa: E402
from guardrails.types import Context, Validator  # noqa: E402

SENTENCES = (
    "The quarterly report is due on Friday, and the figures for the northern region are still missing. "
    "Could you tell me who is responsible, and how I can reach them before noon? "
    "Last year we had the same trouble: the numbers came late, nobody had checked them, and two tables were wrong. "
    "I would like to avoid that, so please write a short and friendly reminder in my name. "
)
HEADS = ("injection", "harm", "refusal")
SCOPE = [f"How do I {verb} my {thing}?" for verb in ("find", "change", "send", "print", "sign")
         for thing in ("report", "contract", "invoice", "address", "badge", "laptop", "desk", "salary")]  # fmt: skip


def text(characters: int) -> str:
    """English prose of so many characters."""
    return (SENTENCES * (characters // len(SENTENCES) + 1))[:characters]


def measured(work: Callable[[], object], times: int) -> tuple[float, float]:
    """(CPU, wall) in ms: the medians of so many calls."""
    work()
    cpu, wall = [], []
    for _ in range(times):
        a, b = time.process_time(), time.perf_counter()
        work()
        cpu.append(time.process_time() - a)
        wall.append(time.perf_counter() - b)
    return 1000 * median(cpu), 1000 * median(wall)


def main() -> None:
    """Prints two tables."""
    encoder = Encoder()
    loaded = {name: heads.load(name) for name in HEADS}
    print("| characters | windows | encoder, CPU ms | three heads, CPU ms | together, CPU ms | wall ms |")
    print("|---|---|---|---|---|---|")
    for characters in (50, 200, 1000, 4000, 1_000_000):
        said = text(characters)
        windows = encoder.windows(said)
        times = 9 if characters > 9999 else 41
        alone, wall = measured(lambda said=said: encoder.windows(said), times)  # type: ignore[misc]
        read, _ = measured(lambda said=said, w=windows: [h.read(said, w) for h in loaded.values()], times)  # type: ignore[misc]
        row = (
            f"{characters:,}",
            str(len(windows.spans)),
            f"{alone:.1f}",
            f"{read:.2f}",
            f"{alone + read:.1f}",
            f"{wall:.1f}",
        )
        print(f"| {' | '.join(row)} |")
    print()
    asyncio.run(rules())


async def rules() -> None:
    """One text through rules: one pass for all of them, none for a text that was seen."""
    plain = {"injection_model": {}, "harm": {}, "refusal": {}, "scope": {"in_scope": SCOPE}}
    built = {name: build(name, options(name).model_validate(chosen)) for name, chosen in plain.items()}
    for validator in built.values():
        await validator.find("warm", Context())
    print("| rules on one text of 200 characters | CPU ms |")
    print("|---|---|")
    for title, chosen in (("one", ["harm"]), ("all four", list(built))):
        print(f"| {title} | {await cost([built[name] for name in chosen], fresh=True):.1f} |")
    print(f"| all four, a text that was seen before | {await cost(list(built.values()), fresh=False):.1f} |")


async def cost(validators: list[Validator], fresh: bool) -> float:
    """The median CPU ms of one text through all of these."""
    spent = []
    for i in range(42):
        said = f"{i if fresh else 0} {len(validators)} {text(194)}"
        before = time.process_time()
        await asyncio.gather(*(one.find(said, Context()) for one in validators))
        spent.append(time.process_time() - before)
    return 1000 * median(spent)


if __name__ == "__main__":
    main()
