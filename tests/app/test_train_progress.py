"""The live display of a run, and how a run that is stopped says how it goes on."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from alignment.progress import Lines, Pace, Start, Watcher, doing, through, watched
from app.train_cli import _stopped, _telling
from app.train_progress import Display, shown, trend


def display(updates: int = 100, step: int = 0) -> Display:
    made = Display(Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None), "tokens")
    if updates:
        made.began(Start(Path("run"), "", updates, step))
    return made


def seen(some: Display) -> str:
    with some.console.capture() as captured:
        some.console.print(some)
    return captured.get()


def test_the_time_left_is_that_of_recent_updates_without_the_first() -> None:
    pace = Pace()
    pace.ends.clear()
    for now in (0.0, 100.0):
        pace.ended(now)
    assert pace.left(10) == 1000  # nothing better is known
    for now in (102.0, 104.0):
        pace.ended(now)
    assert pace.left(10) == 20
    for k in range(60):
        pace.ended(104 + 5.0 * k + 5)
    assert pace.left(10) == pytest.approx(50)


def test_before_the_first_update_it_says_what_is_being_done() -> None:
    some = display(updates=0)
    with watched(some):
        doing("reading rows.jsonl")
    assert "reading rows.jsonl" in seen(some) and "left" not in seen(some)


def test_it_shows_how_far_a_run_is_and_what_it_has_learnt() -> None:
    some = display(updates=100, step=40)
    assert "40/100" in seen(some) and "-:--:-- left" in seen(some)
    for step in (41, 42, 43):
        metrics = {"loss": 3.0 - step / 100, "per_second": 1500.0, "test/accuracy": step / 50, "policy/clipped": 0.1}
        some.updated(step, metrics)
    text = seen(some)
    assert all(one in text for one in ("43/100", "0:00:00 left", "1,500 tokens/s", "2.57  █▅▁", "test/accuracy"))
    assert "policy/clipped" not in text
    some.ended({})
    assert "writing the release" in seen(some)


def test_parts_of_what_takes_long_are_counted() -> None:
    some = display()
    with watched(some):
        counts = [seen(some).count(f"measuring {i}/3") for i, _ in enumerate(through("abc", "measuring"))]
    assert counts == [1, 1, 1] and list(through("ab", "nobody watches")) == ["a", "b"]


@pytest.mark.parametrize(
    ("values", "bars"),
    [([1, 2, 3], "▁▅█"), ([2.0, 2.0], "▁▁"), ([1.0, float("nan")], "▁▁"), (list(range(240)), None)],
)
def test_trends_go_from_the_least_to_the_greatest(values: list[float], bars: str | None) -> None:
    found = trend(values)
    assert found == bars if bars else (len(found), found[0], found[-1]) == (24, "▁", "█")


def test_the_methods_own_metrics_come_before_held_out_ones() -> None:
    metrics = dict.fromkeys(("test/score", "value/loss", "kl/reply", "reward/mean", "lr"), 0.0)
    assert shown(metrics) == ["reward/mean", "kl/reply", "test/score"]


def test_lines_tell_the_first_metrics() -> None:
    lines: list[str] = []
    some = Lines(lines.append)
    some.began(Start(Path("run"), "", 3, 1))
    some.updated(2, {f"m{i}": i / 3 for i in range(9)})
    [line] = lines
    assert line.startswith("update 2/3  m0 0  m1 0.3333") and "m6" not in line and line.endswith("left")


def test_where_there_is_no_terminal_lines_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    for rank, told in ((0, "something\n"), (1, "")):
        with _telling("sft", rank) as tell:
            tell("something")
        assert capsys.readouterr() == ("", told)


def test_nobody_who_has_left_is_told() -> None:
    calls: list[str] = []

    class Listening(Watcher):
        def doing(self, what: str, done: int = 0, of: int = 0) -> None:
            calls.append(what)

    with pytest.raises(ZeroDivisionError), watched(Listening()):
        doing("first")
        raise ZeroDivisionError
    doing("second")
    assert calls == ["first"]


def test_a_run_that_is_stopped_says_how_it_goes_on(tmp_path: Path) -> None:
    how = SimpleNamespace(output=tmp_path, checkpoint=10)
    assert _stopped(how) == "stopped before the first update; the same command starts it again"
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": n}) + "\n" for n in range(1, 38)))
    assert _stopped(how).endswith("starts it again (the first checkpoint is made at update 10)")
    (tmp_path / "state.pt").touch()
    assert _stopped(how) == ("stopped after update 37; the same command goes on from its last checkpoint, of update 30")
