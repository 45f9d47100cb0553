"""Direct preference optimisation: the reference, the losses by hand, and a toy taste. In brackets the checklist."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.dpo import ADAPTER, Recipe, chances, evaluate, loss, reference, train
from alignment.loop import Adam
from alignment.lora import LoraShape
from alignment.model import Model
from alignment.tokens import Row, batch, shared
from guardrails.types import Message
from tests.alignment import tiny

SHAPE = LoraShape(4, 8.0)
HOW = Recipe(
    model=Path("tiny"), data=(), output=Path("run"), rows=16, tokens=2048, lora=SHAPE,
    optimiser=Adam(lr=1e-2, warmup=0.0), device="cpu", often=0,
)  # fmt: skip
PAIRS = [("Hi", "Good day.", "No."), ("Why?", "So.", "Because it is, you see."), ("a b c", "d", "e f")]


def apart(model: Model, pairs: Sequence[tuple[str, str, str]] = PAIRS) -> list[tuple[Row, Row]]:
    """The replies of each pair behind their prompt, as two rows."""
    ask = model.template.reply
    return [
        (ask([Message("user", p)], [Message("assistant", a)]), ask([Message("user", p)], [Message("assistant", b)]))
        for p, a, b in pairs
    ]


def stirred(seed: int = 0) -> Model:
    """A model whose adapter says something else than the base."""
    model = tiny.model(seed)
    draw = torch.Generator().manual_seed(1)
    for one in model.adapt(ADAPTER, SHAPE):
        one.data.normal_(std=0.2, generator=draw)
    return model


@torch.no_grad()
def said(model: Model, row: Row, adapter: str | None) -> float:
    """ln p of what is trained in a row, from the logits that transformers computes."""
    with model.on(adapter):
        logits = model.base(torch.tensor([row.ids])).logits[0].log_softmax(-1)
    return sum(float(logits[i - 1, row.ids[i]]) for i in range(len(row)) if row.trained[i])


def quiet(text: str) -> None:
    """Tells nobody."""


@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_chances_behind_a_shared_prompt_are_those_of_separate_passes(adapter: str | None) -> None:  # D6
    model = stirred()
    some = batch([[shared(a, b)] for a, b in apart(model)])
    with torch.no_grad():
        sums, counts = chances(model, some, adapter)
    by_hand = [[said(model, one, adapter) for one in pair] for pair in apart(model)]
    torch.testing.assert_close(sums, torch.tensor(by_hand), atol=1e-4, rtol=0)
    assert counts.tolist() == [[sum(a.trained), sum(b.trained)] for a, b in apart(model)]


@pytest.mark.parametrize("tokens", [20, 100, 10_000])
def test_the_reference_is_the_base_whatever_the_adapter_says(tokens: int) -> None:  # D9
    model = stirred()
    pairs = apart(model)
    found = reference(model, [shared(a, b) for a, b in pairs], tokens)
    by_hand = [[said(model, one, None) for one in pair] for pair in pairs]
    torch.testing.assert_close(found, torch.tensor(by_hand), atol=1e-4, rtol=0)
    assert abs(by_hand[0][0] - said(model, pairs[0][0], ADAPTER)) > 0.1


def of_hand(model: Model, how: Recipe) -> list[float]:
    """The losses of the first two pairs, from the papers' equations."""
    found = []
    for pair in apart(model)[:2]:
        a, b = (said(model, one, ADAPTER) - said(model, one, None) for one in pair)
        if how.normalised or how.kind == "ipo":
            a, b = a / sum(pair[0].trained), b / sum(pair[1].trained)
        right, wrong = (math.log(1 + math.exp(-sign * how.beta * (a - b))) for sign in (1, -1))
        found.append(
            {
                "sigmoid": (1 - how.smoothing) * right + how.smoothing * wrong,
                "robust": ((1 - how.smoothing) * right - how.smoothing * wrong) / (1 - 2 * how.smoothing),
                "ipo": (a - b - 1 / (2 * how.beta)) ** 2,
            }[how.kind]
        )
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta": 0.5, "smoothing": 0.2},
        {"kind": "robust", "smoothing": 0.2},
        {"kind": "ipo", "beta": 0.3},
        {"normalised": True, "beta": 2.0},
    ],
)
def test_losses_are_those_of_the_papers(changes: dict[str, Any]) -> None:
    how, model = replace(HOW, **changes), stirred()
    rows = [shared(a, b) for a, b in apart(model)[:2]]
    part = loss(model, rows, reference(model, rows, 1000), how)
    assert part.count == 2 and float(part.loss.detach()) == pytest.approx(sum(of_hand(model, how)), abs=1e-4)
    gains = [[said(model, one, ADAPTER) - said(model, one, None) for one in pair] for pair in apart(model)[:2]]
    if not how.normalised and how.kind == "sigmoid":
        assert part.sums["margin"] == pytest.approx(how.beta * sum(a - b for a, b in gains), abs=1e-4)
        assert part.sums["gain/chosen"] == pytest.approx(sum(a for a, _ in gains), abs=1e-4)
        assert part.sums["accuracy"] == sum(a > b for a, b in gains)


def test_margins_are_taken_from_the_lead_and_weights_multiply_losses() -> None:
    model = stirred()
    rows = [replace(shared(a, b), weight=w) for (a, b), w in zip(apart(model)[:2], (3.0, 0.5), strict=True)]
    references = reference(model, rows, 1000)
    part = loss(model, rows, references, HOW, torch.tensor([0.7, 0.0]))
    gains = [[said(model, one, ADAPTER) - said(model, one, None) for one in pair] for pair in apart(model)[:2]]
    leads = [HOW.beta * (a - b) - m for (a, b), m in zip(gains, (0.7, 0.0), strict=True)]
    first, second = (math.log(1 + math.exp(-lead)) for lead in leads)
    assert float(part.loss.detach()) == pytest.approx(3 * first + 0.5 * second, abs=1e-4) and part.count == 3.5


def test_replay_adds_the_surprise_a_token_of_the_chosen_replies() -> None:
    model = stirred()
    pairs = apart(model)
    rows = [shared(a, b) for a, b in pairs]
    plain, more = (
        float(loss(model, rows, reference(model, rows, 1000), replace(HOW, replay=weight)).loss.detach())
        for weight in (0.0, 0.7)
    )
    surprise = -sum(said(model, a, ADAPTER) / sum(a.trained) for a, _ in pairs)
    assert more - plain == pytest.approx(0.7 * surprise, abs=1e-4)


def test_the_gradient_reaches_the_adapter_alone() -> None:
    model = tiny.model(0)
    mine = model.adapt(ADAPTER, SHAPE)
    rows = [shared(a, b) for a, b in apart(model)]
    loss(model, rows, reference(model, rows, 1000), HOW).loss.backward()
    assert any(one.grad is not None and one.grad.abs().sum() > 0 for one in mine)
    others = {id(one) for one in mine}
    assert all(one.grad is None for one in model.base.parameters() if id(one) not in others)


@pytest.mark.parametrize("tokens", [30, 10_000])
def test_measures_do_not_depend_on_how_pairs_share_forward_passes(tokens: int) -> None:
    model = stirred()
    rows = [shared(a, b) for a, b in apart(model)]
    references = reference(model, rows, 1000)
    found = evaluate(model, rows, references, replace(HOW, tokens=tokens))
    with torch.no_grad():
        alone = [float(loss(model, [row], references[[i]], HOW).loss) for i, row in enumerate(rows)]
    assert found["test/loss"] == pytest.approx(sum(alone) / 3, abs=1e-5)


# --- a run


def written(folder: Path, pairs: int = 96, test: int = 40, **changes: Any) -> Recipe:
    """A toy taste: the reply with an `a` in it is better than the one with a `b`, whatever else is in them."""
    draw = random.Random(0)
    model = tiny.model(0)
    model.base.save_pretrained(folder / "base")
    model.tokenizer.save_pretrained(folder / "base")
    lines = []
    for i in range(pairs + test):
        prompt, one, two = ("".join(draw.choices(letters, k=4)) for letters in ("uvwxyz", "cdefgh", "cdefgh"))
        at = draw.randint(0, 2)
        row = {"prompt": prompt, "chosen": one[:at] + "a" + one[at:], "rejected": two[:at] + "b" + two[at:]}
        lines.append(json.dumps(row | {"split": "train" if i < pairs else "test"}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    how = replace(HOW, model=folder / "base", data=(folder / "pairs.jsonl",), output=folder / "run")
    return replace(how, **changes)


def metrics(folder: Path) -> list[dict[str, float]]:
    """Of every update of a run."""
    return [json.loads(one) for one in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_simple_taste_is_learnt(tmp_path: Path) -> None:
    how = written(tmp_path, epochs=2)
    folder = train(how, quiet)
    found = metrics(how.output)
    assert len(found) == 12
    assert found[0]["loss"] == found[0]["test/loss"] == pytest.approx(math.log(2), abs=1e-5)  # D9
    assert found[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert found[-1]["test/accuracy"] > 0.9 and found[-1]["test/loss"] < 0.5 and found[-1]["test/margin"] > 0.5
    assert json.loads((how.output / "evaluation.json").read_text())["test/accuracy"] == found[-1]["test/accuracy"]
    assert (how.output / "report.html").is_file() and (folder / "adapter").is_dir()
    learnt, base = Model.load(folder), Model.load(how.model)
    [pair] = apart(learnt, [("vwx", "cda", "cdb")])
    assert said(learnt, pair[0], None) - said(base, pair[0], None) > said(learnt, pair[1], None) - said(
        base, pair[1], None
    )


@pytest.mark.parametrize(("kind", "beta", "first"), [("ipo", 0.1, 25.0), ("robust", 0.1, math.log(2))])
def test_other_losses_begin_where_they_should_and_fall(tmp_path: Path, kind: Any, beta: float, first: float) -> None:
    how = written(tmp_path, 48, 8, kind=kind, beta=beta, smoothing=0.1 if kind == "robust" else 0.0)
    train(how, quiet)
    found = metrics(how.output)
    assert found[0]["loss"] == pytest.approx(first, abs=1e-3) and found[-1]["test/loss"] < found[0]["test/loss"]


def test_ties_teach_nothing_and_longer_pairs_are_told(tmp_path: Path) -> None:
    how = written(tmp_path, 4, 2, max_length=80)
    rows = [json.loads(one) for one in how.data[0].read_text().splitlines()]
    rows += [rows[0] | {"tie": True}, rows[0] | {"prompt": "x" * 100}]
    how.data[0].write_text("\n".join(map(json.dumps, rows)) + "\n")
    told: list[str] = []
    train(how, told.append)
    [over] = [one for one in told if "longer than 80 tokens and left out (max_length" in one]
    assert over.startswith("1 of 5 rows ") and over.endswith(": pairs.jsonl:8")
    assert any(one.startswith("1 pairs are ties and left out") for one in told)
    listed = json.loads((how.output / "data.json").read_text())["files"][0]
    assert listed["rows"] == {"train": 6, "test": 2} and listed["left_out"] == {"tie": 1, "longer than max_length": 1}
    assert [one["count"] for one in metrics(how.output)] == [4]


def test_without_pairs_to_train_on_nothing_begins(tmp_path: Path) -> None:
    how = written(tmp_path, 0, 2)
    with pytest.raises(ValueError, match="no pairs to train on"):
        train(how, quiet)
    assert not how.output.exists()


@pytest.mark.parametrize("changes", [{"beta": 0.0}, {"smoothing": 0.5}, {"smoothing": -0.1}])
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="beta is more than 0, smoothing is at least 0"):
        replace(HOW, **changes)
