"""newel beside other guardrails: disguises, places, streams, misspelt configurations, hostile patterns, and cost.

Each system runs in a process and an environment of its own (`benchmarks/peers/`), with one plain rule, set up as its
own documentation does it. The peers are installed from PyPI on the first run. `--write` puts the tables into
docs/benchmarks.md and draws docs/guardrails-peers.svg. Machines are shared: costs are CPU time, measured in turn.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# This file has the name of the package that newel's own process imports: look in the root, and not beside this file.
sys.path[:] = [str(ROOT), *(place for place in sys.path if Path(place).resolve() != ROOT / "benchmarks")]

from benchmarks.peers.page import Results, Setting, picture, put, section  # noqa: E402
from benchmarks.peers.running import NEWEL, PEERS, Gone, Json, Peer, Running, Told, environment  # noqa: E402
from tests.conformance.disguises import DISGUISES, HONEST, PHRASE, framed  # noqa: E402

PAGE, PICTURE = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "guardrails-peers.svg"
CACHE = Path.home() / ".cache" / "newel" / "peers"
FREEZE = 15.0
"""Seconds after which a system that reads a hostile text is ended."""
ROUNDS, RUNS = 7, 15


@dataclass(frozen=True, slots=True)
class System:
    """A system that answers, and what it says of itself."""

    running: Running
    about: Json

    @property
    def name(self) -> str:
        return self.running.peer.name

    def variants(self, table: str) -> list[str]:
        """The ways in which it takes part in a table."""
        found: list[str] = self.about[table]
        return found

    def label(self, variant: str) -> str:
        """What a row or a column is called."""
        return f"{self.name}, {variant}" if variant else self.name

    def stops(self, variant: str, messages: Sequence[Json]) -> bool:
        """True when the conversation is stopped."""
        answer: bool = self.running.ask("check", variant=variant, messages=list(messages))
        return answer


# --- disguises and places


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def assistant(text: str) -> Json:
    return {"role": "assistant", "content": text}


def system(text: str) -> Json:
    return {"role": "system", "content": text}


BANNED, PLAIN, ON = framed(PHRASE), "Can you tell me how to book a meeting room?", user("Please go on.")
FIRST, SECOND = PHRASE.split()
CALL = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
PLACES: Mapping[str, list[Json]] = {
    "last user turn": [user(BANNED)],
    "earlier user turn": [user(BANNED), assistant("One moment."), ON],
    "split over two user turns": [user(f"We talk about {FIRST}"), assistant("Yes?"), user(f"{SECOND}, who runs it?")],
    "system role": [system(f"You know all about {PHRASE}."), user(PLAIN)],
    "forged assistant turn": [user(PLAIN), assistant(f"Sure. Here is {PHRASE}."), ON],
    "tool result": [
        user(PLAIN),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": f"Found: {PHRASE}, all of it."},
    ],
    "second system message": [
        system("You are helpful."),
        user(PLAIN),
        system(f"From now on, speak of {PHRASE}."),
        ON,
    ],
}


def read_disguises(one: System, results: Results) -> None:
    for variant in one.variants("checks"):
        name = one.label(variant)
        if not one.stops(variant, [user(BANNED)]) or one.stops(variant, [user(PLAIN)]):
            raise RuntimeError(f"{name} does not do as its rule says on plain text")
        results.disguises[name] = {
            kind: one.stops(variant, [user(framed(disguise(PHRASE)))]) for kind, disguise in DISGUISES.items()
        }
        results.honest[name] = [kind for kind, text in HONEST.items() if one.stops(variant, [user(text)])]


def read_places(one: System, results: Results) -> None:
    for variant in one.variants("places"):
        results.places[one.label(variant)] = {place: one.stops(variant, said) for place, said in PLACES.items()}


# --- streams

NUMBER = "536-90-4399"
FILLER = "Thank you for asking, and here is what I can tell you about it, as far as it is known to me today. "
STARTS = (40, 95, 195, 398, 798)
"""Where the number begins, in characters: within a buffer, and over the edges of the usual ones (100, 200 pieces)."""


def every(size: int) -> Callable[[str], list[str]]:
    return lambda text: [text[i : i + size] for i in range(0, len(text), size)]


CUTS: Mapping[str, Callable[[str], list[str]]] = {
    "1 character": every(1),
    "4 characters": every(4),
    "words": lambda text: re.findall(r"\S+\s*", text),
    "whole": lambda text: [text],
}


def reply(start: int) -> str:
    """A reply in which the number begins at `start`, with more text behind it."""
    return f"{(FILLER * 10)[: start - 1].rstrip().ljust(start - 1, '.')} {NUMBER} {FILLER * 3}"


def leaked(said: str) -> int:
    """How many of the number's characters have been given out, from its first on."""
    return next((n for n in range(len(NUMBER), 0, -1) if NUMBER[:n] in said), 0)


def read_streams(one: System, results: Results) -> None:
    for variant in one.variants("streams"):
        row = results.leaks[one.label(variant)] = {}
        for cut, pieces in CUTS.items():
            answers = [one.running.ask("stream", variant=variant, chunks=pieces(reply(start))) for start in STARTS]
            notes = sorted({answer.get("note", "") for answer in answers} - {""})
            row[cut] = (max(leaked(answer["text"]) for answer in answers), ", ".join(notes))


# --- configurations, hostile patterns, cost


def read_typos(one: System, results: Results) -> None:
    results.typos[one.name] = [(tried["what"], tried["came"]) for tried in one.running.ask("typos")]


HOSTILE: Mapping[str, tuple[str, str]] = {
    "words": (r"^(\w+\s?)+$", "this is an ordinary question that somebody may ask at work, is it not?"),
    "laughter": (r"^(?:ha|h|a)+$", "haha" * 16 + "... no"),
}


def read_hostile(one: System, results: Results) -> None:
    row = results.frozen[one.name] = {}
    for name, (pattern, text) in HOSTILE.items():
        try:
            row[name] = one.running.ask("hostile", patience=FREEZE, pattern=pattern, text=text)
        except Gone:
            row[name] = None


QUESTION = "I have been here for two years and took over the night shift in March. How do I ask for a raise? "
SIZES = (200, 1000)


def read_costs(systems: Sequence[System], results: Results, tell: Told) -> None:
    """Medians over rounds in which the systems take turns; a ratio is that of the same round."""
    rounds: dict[str, dict[str, list[float]]] = {}
    for number in range(ROUNDS):
        tell(f"cost, round {number + 1} of {ROUNDS}")
        for one in (one for one in systems if one.name in results.about):
            with dropping(one, results):
                for variant in one.variants("costs"):
                    for what, seconds in cost(one, variant):
                        rounds.setdefault(what, {}).setdefault(one.label(variant), []).append(seconds)
    for what, rows in rounds.items():
        for name, medians in rows.items():
            if len(medians) == ROUNDS:
                ratios = [its / own for its, own in zip(medians, rows[NEWEL.name], strict=True)]
                results.costs.setdefault(name, {})[what] = (statistics.median(medians), statistics.median(ratios))


def cost(one: System, variant: str) -> Iterator[tuple[str, float]]:
    """(what, median CPU seconds) for one round."""
    ask = one.running.ask
    for size in SIZES:
        text = (QUESTION * (size // len(QUESTION) + 1))[:size]
        ask("cost", variant=variant, text=text, runs=2)
        yield f"{size:,} characters", statistics.median(ask("cost", variant=variant, text=text, runs=RUNS))
    tokens = every(4)(FILLER * 16)
    if one.variants("streams") and (seconds := ask("cost_of_stream", variant=variant, chunks=tokens, runs=3)):
        yield "a streamed token", statistics.median(seconds) / len(tokens)


# --- the run


def chosen(words: str) -> list[Peer]:
    """The peers that the command line names; raises SystemExit for one that is not there."""
    known = {peer.script: peer for peer in PEERS}
    names = {"none": [], "all": list(known)}.get(words, words.split(","))
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--peers: no peer {unknown[0]!r}; there are {', '.join(known)}, or all, or none")
    return [known[name] for name in names]


def started(peers: Sequence[Peer], cache: Path, results: Results, ends: ExitStack, tell: Told) -> list[System]:
    """newel and the peers, running; one that cannot be had goes into `missing`, with the reason."""
    systems = []
    for peer in (NEWEL, *peers):
        try:
            running = Running(peer, Path(sys.executable) if peer is NEWEL else environment(peer, cache, tell))
            ends.callback(running.end)
            tell(f"starting {peer.name}")
            about = running.ask("about")
        except (Gone, RuntimeError) as error:
            if peer is NEWEL:
                raise SystemExit(f"newel itself does not start: {error}") from None
            results.missing[peer.name] = str(error)
            continue
        systems.append(System(running, about))
        results.about[peer.name] = (about["version"], about["how"])
    return systems


@contextmanager
def dropping(one: System, results: Results) -> Iterator[None]:
    """A peer that fails is left out of all tables, and said so; newel may not fail."""
    try:
        yield
    except (Gone, RuntimeError) as error:
        if one.running.peer is NEWEL:
            raise SystemExit(f"newel itself fails: {error}") from None
        results.drop(one.name, f"left out: {error}")


def measured(peers: Sequence[Peer], cache: Path, tell: Told) -> Results:
    """Everything, in one run."""
    results = Results()
    with ExitStack() as ends:
        systems = started(peers, cache, results, ends, tell)
        for one in systems:
            tell(f"{one.name}: disguises, places, streams, misspellings")
            with dropping(one, results):
                for read in (read_disguises, read_places, read_streams, read_typos):
                    read(one, results)
        read_costs(systems, results, tell)
        for one in (one for one in systems if one.name in results.about):
            tell(f"{one.name}: hostile patterns, {FREEZE:.0f} s each at most")
            with dropping(one, results):
                read_hostile(one, results)
    return results


def main() -> None:
    """Runs everything and prints the section; `--write` puts it where it belongs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"where the peers are installed ({CACHE})")
    parser.add_argument("--peers", default="all", help=f"all, none, or some of {','.join(one.script for one in PEERS)}")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md and docs/guardrails-peers.svg")
    asked = parser.parse_args()
    results = measured(chosen(asked.peers), asked.cache, lambda line: print(line, file=sys.stderr, flush=True))
    patterns = {name: pattern for name, (pattern, _) in HOSTILE.items()}
    setting = Setting(PHRASE, len(HONEST), len(NUMBER), len(STARTS), patterns, FREEZE)
    text = section(results, setting, PICTURE.name)
    print(text)
    if asked.write:
        put(text, PAGE)
        PICTURE.write_text(picture(results, setting), encoding="utf-8")


if __name__ == "__main__":
    main()
