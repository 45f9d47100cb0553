"""Reward models: what a score is read from, what pairs teach, and what is kept. In brackets the checklist's lines."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignment.loop import Adam, Optimiser, Parallel, scaled
from alignment.lora import LoraShape
from alignment.model import Model, ModelError
from alignment.records import PreferencePair, to_json
from alignment.reward import (
    Item,
    Recipe,
    Together,
    by_kind,
    by_length,
    judged,
    leads,
    loss,
    scheduled,
    train,
    uncertainty,
)
from alignment.reward_model import Pair, Pooling, RewardModel, lineage, objective_of, paired
from alignment.rollout import Reply
from alignment.tokens import Row, batch
from guardrails.types import Message
from tests.alignment import tiny

SHAPE = LoraShape(4, 8.0)
HOW = Recipe(
    model=Path("tiny"), data=(), output=Path("run"), members=2, rows=4, tokens=256, centring=0.0, lora=SHAPE,
    optimiser=Adam(lr=1e-2, warmup=0.0, schedule="constant"),
)  # fmt: skip


def said(prompt: str, chosen: str, rejected: str) -> PreferencePair:
    return PreferencePair(
        prompt=(Message("user", prompt),),
        chosen=(Message("assistant", chosen),),
        rejected=(Message("assistant", rejected),),
    )


PROMPTS = [("Hi", "Good day to you.", "No."), ("Why is that so?", "So.", "Because it is, you see."), ("?", "a", "b")]


def reward(members: int = 2, objectives: Sequence[str] = ("reward",), stir: bool = True, seed: int = 0) -> RewardModel:
    """One whose adapters do something."""
    made = RewardModel.new(tiny.model(seed), members, objectives, SHAPE, tokens=256)
    if stir:
        for i, member in enumerate(made.members):
            random = torch.Generator().manual_seed(i)
            with torch.no_grad():
                for one in made.parameters(member):
                    one.add_(torch.randn(one.shape, generator=random) * 0.1)
    return made


def some(made: RewardModel) -> list[Pair]:
    return [paired(made.model, said(*one), made.objectives) for one in PROMPTS]


def alone(made: RewardModel, row: Row, member: str = "reward-0") -> Tensor:
    """A score by a forward pass over just these tokens, with nothing of ours but the adapter and the head."""
    with made.model.on(member), torch.no_grad():
        state = made.model.base.base_model(input_ids=torch.tensor([row.ids])).last_hidden_state[0, -1]
        score: Tensor = made.model.heads[member](state)
    return score


# --- where a score is read


@pytest.mark.parametrize("lines", [[[0]], [[1]], [[0], [1], [2]], [[0, 1], [2]], [[2, 1, 0]]])
def test_a_pair_in_one_row_scores_as_its_replies_do_alone(lines: list[list[int]]) -> None:  # D6
    made = reward()
    pairs = some(made)
    chosen, rejected = made.compared([[pairs[i] for i in line] for line in lines], "reward-1")
    for k, i in enumerate(i for line in lines for i in line):
        torch.testing.assert_close(chosen[k], alone(made, pairs[i].chosen, "reward-1"), atol=1e-5, rtol=0)
        torch.testing.assert_close(rejected[k], alone(made, pairs[i].rejected, "reward-1"), atol=1e-5, rtol=0)


def test_a_pair_in_one_row_teaches_what_two_rows_do() -> None:  # D6
    made = reward()
    pairs = [[one] for one in some(made)]
    found = []
    for once in (True, False):
        part = loss(made, Item(0, (), 1.0), pairs, replace(HOW, shared=once, centring=0.1))
        found.append(torch.autograd.grad(part.loss, made.parameters("reward-0")))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_score_is_read_after_the_token_that_ends_the_reply() -> None:  # D4
    made = reward()
    row = some(made)[0].chosen
    assert row.ids[-1] == made.model.tokenizer.eos_token_id == made.model.tokenizer.pad_token_id
    [score], _ = made.scores([row])
    assert float(score) != pytest.approx(float(made.scores([Row(row.ids[:-1], row.trained[:-1])])[0]), abs=1e-4)
    torch.testing.assert_close(made.each([row])[0, 0], alone(made, row), atol=1e-5, rtol=0)


def test_what_a_policy_said_scores_as_in_training(tmp_path: Path) -> None:  # D4
    made = reward()
    pairs = some(made)
    for pair, (prompt, good, _) in zip(pairs, PROMPTS, strict=True):
        ids = made.model.template.prompt((Message("user", prompt),))
        tokens = (*made.model.tokenizer(good, add_special_tokens=False)["input_ids"], made.model.tokenizer.eos_token_id)
        assert Reply(ids, tokens, (0.0,) * len(tokens), "stop").row == pair.chosen
    trained = made.compared([[one] for one in pairs], "reward-0")[0]
    torch.testing.assert_close(made.each([one.chosen for one in pairs])[0], trained, atol=1e-5, rtol=0)


def test_scores_do_not_depend_on_what_else_is_scored() -> None:  # A3, A7
    made = reward()
    rows = [row for one in some(made) for row in (one.chosen, one.rejected)]
    mean, spread = made.scores(rows)
    for i, row in enumerate(rows):
        torch.testing.assert_close(made.scores([row]), (mean[i : i + 1], spread[i : i + 1]), atol=1e-5, rtol=0)
    backwards = made.scores(rows[::-1])
    torch.testing.assert_close(backwards[0].flip(0), mean, atol=1e-5, rtol=0)


def test_mean_and_spread_are_of_the_members() -> None:
    made = reward(3)
    rows = [one.chosen for one in some(made)]
    each = torch.stack([torch.stack([alone(made, row, name)[0] for row in rows]) for name in made.members])
    mean, spread = made.scores(rows)
    torch.testing.assert_close(mean, each.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(spread, ((each - each.mean(0)) ** 2).mean(0).sqrt(), atol=1e-5, rtol=0)
    assert not mean.requires_grad and torch.equal(reward(1).scores(rows)[1], torch.zeros(3))


# --- what a pair teaches


def through_head(made: RewardModel, pairs: Sequence[Pair], how: Recipe) -> tuple[float, Tensor, Tensor]:
    """(the loss, its gradients by the head's weight and bias)."""
    part = loss(made, Item(0, (), 1.0), [[one] for one in pairs], how)
    weight, bias = torch.autograd.grad(part.loss, list(made.model.heads["reward-0"].parameters()))
    return float(part.loss.detach()), weight, bias


def test_to_swap_the_replies_turns_the_lead_and_the_gradient_round() -> None:  # D5
    made = reward()
    pair = some(made)[0]
    back = replace(pair, chosen=pair.rejected, rejected=pair.chosen)
    [ahead], [behind] = leads(made, [pair])[0], leads(made, [back])[0]
    assert float(ahead) == pytest.approx(-float(behind), abs=1e-5)
    (right, grad, _), (wrong, other, _) = through_head(made, [pair], HOW), through_head(made, [back], HOW)
    assert right == pytest.approx(math.log1p(math.exp(-float(ahead))), abs=1e-5)
    assert wrong - right == pytest.approx(float(ahead), abs=1e-5)  # -ln s(-x) + ln s(x) = x
    # d/dw = -s(-lead) (h+ - h-), and with the sides swapped s(lead) (h+ - h-).
    torch.testing.assert_close(grad * -torch.exp(ahead), other, atol=1e-4, rtol=1e-3)


def test_margins_ties_weights_and_smoothing_reach_the_loss() -> None:  # D5
    made = reward()
    pair = some(made)[0]
    lead = float(leads(made, [pair])[0, 0])
    ln = lambda x: -math.log1p(math.exp(-x))  # noqa: E731 - ln sigmoid
    for changed, how, expected in (
        (replace(pair, margin=0.7), HOW, -ln(lead - 0.7)),
        (replace(pair, tie=True, margin=0.7), HOW, -(ln(lead) + ln(-lead)) / 2),
        (replace(pair, weight=3.0), HOW, -3 * ln(lead)),
        (pair, replace(HOW, smoothing=0.1), -0.9 * ln(lead) - 0.1 * ln(-lead)),
    ):
        assert through_head(made, [changed], how)[0] == pytest.approx(expected, abs=1e-5)


def test_a_tie_pulls_scores_together_and_centring_pulls_them_to_nought() -> None:  # D5
    made = reward()
    pair = some(made)[0]
    chosen, rejected = (float(one.detach()) for one in made.compared([[pair]], "reward-0"))
    _, tied, bias = through_head(made, [replace(pair, tie=True)], HOW)
    _, won, _ = through_head(made, [pair], HOW)
    # A tie: (s(lead) - 1/2) (h+ - h-); a win: (s(lead) - 1) (h+ - h-). Neither moves the bias.
    chance = 1 / (1 + math.exp(rejected - chosen))
    torch.testing.assert_close(tied, won * (chance - 0.5) / (chance - 1), atol=1e-5, rtol=1e-3)
    assert float(bias) == pytest.approx(0, abs=1e-6)
    _, _, bias = through_head(made, [pair], replace(HOW, centring=0.25))
    assert float(bias) == pytest.approx(0.25 * 2 * (chosen + rejected) * 2, rel=1e-4)


def test_a_pair_trains_the_objective_that_its_slice_is_named_after() -> None:
    made = reward(1, ("helpful", "harmless", "honest"))
    names = made.objectives
    assert [objective_of(one, names) for one in ("harmless", "honest/law", "legal", "")] == [1, 2, 0, 0]
    for k, name in enumerate(names):
        pair = replace(some(made)[0], objective=k, slice=name)
        _, weight, _ = through_head(made, [pair], HOW)
        assert [bool(row.any()) for row in weight] == [i == k for i in range(3)]
        [score], _ = made.scores([pair.chosen], name)
        assert float(score) == pytest.approx(float(alone(made, pair.chosen)[k]), abs=1e-5)
    with pytest.raises(ModelError, match="no objective polite, but helpful, harmless, honest"):
        made.scores([some(made)[0].chosen], "polite")


# --- members


def steps(made: RewardModel, how: Recipe, pairs: Sequence[Pair]) -> None:
    """Trains by the whole schedule, as `fit` does."""
    updates = scheduled(pairs, how)
    together = Together(
        [Optimiser(made.parameters(one), how.optimiser, len(updates), Parallel("cpu")) for one in made.members]
    )
    for update in updates:
        count = 0.0
        for item in update:
            part = loss(made, item, [[pairs[i] for i in line] for line in item.lines], how)
            part.loss.backward()
            count += part.count
        scaled(together.parameters, 1 / count)
        together.step()


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_members_learn_as_if_each_were_alone_but_not_the_same(clip: float) -> None:
    how = replace(HOW, rows=4, epochs=3, optimiser=Adam(lr=1e-2, clip=clip, eps=0.1))  # where scale would show
    crowd, single = reward(3, stir=False), reward(1, stir=False)
    pairs = some(crowd) * 2  # the last update of an epoch has two pairs, at another place for each member
    steps(crowd, replace(how, members=3), pairs)
    steps(single, replace(how, members=1), pairs)
    for a, b in zip(crowd.parameters("reward-0"), single.parameters("reward-0"), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    assert float(crowd.scores([one.chosen for one in pairs])[1].min()) > 1e-4


def test_each_member_sees_every_pair_once_an_epoch_in_an_order_of_its_own() -> None:
    pairs = some(reward()) * 5
    updates = scheduled(pairs, replace(HOW, members=3))
    orders = [
        [i for update in updates for item in update if item.member == k for line in item.lines for i in line]
        for k in range(3)
    ]
    assert all(sorted(order) == list(range(15)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_members_that_stop_half_way_go_on_to_the_same_bits(tmp_path: Path) -> None:  # E1
    made = reward(stir=False)
    optimisers = [Optimiser(made.parameters(one), HOW.optimiser, 4, Parallel("cpu")) for one in made.members]
    together = Together(optimisers)

    def step() -> list[Tensor]:
        for k in range(2):
            loss(made, Item(k, (), 1.0), [[one] for one in some(made)], HOW).loss.backward()
        together.step()
        return [one.detach().clone() for one in together.parameters]

    step()
    torch.save(together.state(), tmp_path / "state.pt")
    went_on = step()
    together.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(step(), went_on, strict=True))


def test_scores_of_the_examples_are_nought_on_average_for_every_member_and_objective() -> None:
    made = reward(3, ("helpful", "harmless"))
    rows = [one.chosen for one in some(made)]
    assert float(made.each(rows).mean(1).abs().max()) > 0.01
    made.zero(rows)
    torch.testing.assert_close(made.each(rows).mean(1), torch.zeros(3, 2), atol=1e-6, rtol=0)


# --- what is kept


def test_a_saved_model_scores_the_same_on_another_copy_of_its_base(tmp_path: Path) -> None:
    made = reward(2, ("helpful", "harmless"))
    made.temperature = 1.7
    made.save(tmp_path)
    base = tiny.model(0)
    base.adapt("policy", SHAPE)  # what PPO adds does not matter
    loaded = RewardModel.load(base, tmp_path, "held-out")
    assert loaded.members == ("held-out-0", "held-out-1")
    assert (loaded.objectives, loaded.temperature) == (("helpful", "harmless"), 1.7)
    rows = [one.rejected for one in some(made)]
    assert torch.equal(loaded.each(rows), made.each(rows))
    assert not any(one.requires_grad for name in loaded.members for one in loaded.parameters(name))


def test_adapters_are_kept_in_the_format_of_peft(tmp_path: Path) -> None:
    made = reward(1)
    made.save(tmp_path)
    assert {one.name for one in (tmp_path / "members" / "0").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    assert json.loads((tmp_path / "members" / "0" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_another_tokenizer_template_or_base_is_refused(tmp_path: Path) -> None:  # D7
    reward().save(tmp_path)
    template, words, weights = (tiny.model(0) for _ in range(3))
    template.tokenizer.chat_template = tiny.CHATML.replace("assistant\n", "assistant:\n")
    words.tokenizer.add_tokens(["Hello"])
    with torch.no_grad():
        weights.base.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    for other, what in ((template, "template"), (words, "tokenizer"), (weights, "weights")):
        with pytest.raises(ModelError, match=f"trained on tiny; tiny has another {what}, so"):
            RewardModel.load(other, tmp_path)
    with pytest.raises(ModelError, match="another tokenizer and another template and another weights"):
        template.base = weights.base
        template.tokenizer.add_tokens(["Hello"])
        RewardModel.load(template, tmp_path)
    with pytest.raises(ModelError, match="holds no reward model"):
        RewardModel.load(tiny.model(0), tmp_path / "nowhere")


def test_lineage_is_the_same_in_any_precision_and_with_adapters_on() -> None:  # D7
    plain, adapted = tiny.model(0), tiny.model(0)
    adapted.adapt("policy", SHAPE)
    half = tiny.model(0, dtype=torch.bfloat16)
    assert lineage(plain) == lineage(adapted) == lineage(half)
    assert lineage(plain)["weights"] != lineage(tiny.model(1))["weights"]


# --- measuring


def rows_of(length: int) -> Row:
    return Row((1,) * (length + 1), (False, *(True,) * length))


def test_length_is_told_from_taste() -> None:
    pairs = [Pair(rows_of(a), rows_of(b)) for a, b in ((10, 5), (10, 9), (9, 10), (10, 10), (5, 10))]
    found = by_length(pairs, [1.0, -1.0, 2.0, 3.0, 1.0], close=0.15)
    assert (found["longer_wins"]["value"], found["longer_wins"]["n"]) == (0.5, 4)
    matched = found["length_matched"]
    assert (matched["accuracy"]["value"], matched["accuracy"]["n"]) == (pytest.approx(2 / 3, abs=1e-6), 3)
    assert (matched["longer_wins"]["value"], matched["longer_wins"]["n"]) == (0.5, 2)


def test_slices_and_needless_refusals_are_told_apart() -> None:
    slices = ["harmless", "harmless/over-refusal", "over-refusal", "", "harmless"]
    pairs = [Pair(rows_of(3), rows_of(4), objective_of(one, ("all", "harmless")), slice=one) for one in slices]
    found = by_kind(pairs, [1.0, 1.0, -1.0, 1.0, -1.0], ("all", "harmless"))
    assert {name: (one["value"], one["n"]) for name, one in found["slices"].items()} == {
        "(none)": (1, 1), "harmless": (0.5, 2), "harmless/over-refusal": (1, 1), "over-refusal": (0, 1),
    }  # fmt: skip
    assert (found["over_refusal"]["value"], found["over_refusal"]["n"]) == (0.5, 2)
    assert {name: one["n"] for name, one in found["objectives"].items()} == {"all": 2, "harmless": 3}


def test_members_that_differ_where_they_are_wrong_are_told() -> None:
    found = uncertainty([1.0, 1.0, 1.0, -1.0], [0.1, 0.2, 0.3, 0.9], parts=2)
    assert found["auroc"] == 1
    assert [(one["spread"], one["value"], one["n"]) for one in found["bins"]] == [
        (pytest.approx(0.15), 1, 2), (pytest.approx(0.6), 0.5, 2),
    ]  # fmt: skip


def test_the_temperature_is_set_by_one_half_and_measured_on_the_other() -> None:
    made = reward(2)
    letters = "abcdefghij"
    pairs = [paired(made.model, said(one, one * 2, "x"), made.objectives) for one in letters]
    found = judged(made, [*pairs, replace(pairs[0], tie=True)], 0.15)
    assert (found["pairs"], found["ties"], len(found["members"])) == (10, 1, 2)
    assert found["calibration"]["temperature"] == made.temperature
    assert 0 < sum(one["count"] for one in found["calibration"]["bins"]) < 10
    assert judged(made, [replace(pairs[0], tie=True)], 0.15) == {"pairs": 0, "ties": 1}


# --- learning


def written(folder: Path, pairs: int = 160, test: int = 40) -> Recipe:
    """A toy taste: the reply with an `a` in it is better than the one with a `b`, whatever else is in them."""
    draw = random.Random(0)
    model: Model = tiny.model(0)
    model.base.save_pretrained(folder / "base")
    model.tokenizer.save_pretrained(folder / "base")
    lines = []
    for i in range(pairs + test):
        one, two = ("".join(draw.choices("cdefgh", k=draw.randint(2, 6))) for _ in range(2))
        at = draw.randint(0, 2)
        pair = said("".join(draw.choices("uvwxyz", k=5)), one[:at] + "a" + one[at:], two[:at] + "b" + two[at:])
        lines.append(to_json(replace(pair, split="train" if i < pairs else "test")))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return replace(
        HOW, model=folder / "base", data=(folder / "pairs.jsonl",), output=folder / "run", rows=16, tokens=4096,
        epochs=3, centring=0.01, often=0, device="cpu",
    )  # fmt: skip


def test_a_simple_taste_is_learnt(tmp_path: Path) -> None:
    how = written(tmp_path)
    told: list[str] = []
    folder = train(how, told.append)
    results = json.loads((how.output / "evaluation.json").read_text())
    assert results["accuracy"]["value"] > 0.95 and results["accuracy"]["n"] == 40
    assert results["accuracy"]["low"] > 0.8 and results["loss"] < 0.2
    calibrated = json.loads((how.output / "calibration.json").read_text())
    assert set(calibrated) == {"bins", "ece", "temperature"} and calibrated["bins"]
    metrics = [json.loads(line) for line in (how.output / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 30 and metrics[0]["loss"] > metrics[-1]["loss"]
    assert metrics[0]["count"] == 32 and metrics[-1]["test/accuracy"] > 0.95
    loaded = RewardModel.load(Model.load(how.model), folder)
    assert loaded.temperature == calibrated["temperature"]
    good, bad = (Reply(loaded.model.template.prompt((Message("user", "uvw"),)), ids, (), "stop").row for ids in (
        (*loaded.model.tokenizer(text)["input_ids"], loaded.model.tokenizer.eos_token_id) for text in ("cda", "cdb")
    ))  # fmt: skip
    assert float(loaded.scores([good])[0]) > float(loaded.scores([bad])[0])
    assert (folder / "README.md").is_file() and "accuracy" in (folder / "README.md").read_text()


def test_an_objective_that_no_pair_trains_is_an_error(tmp_path: Path) -> None:
    how = written(tmp_path, 4, 0)
    with pytest.raises(ModelError, match=r"no pair trains the objective honest: .* the slices are \(none\)"):
        train(replace(how, objectives=("helpful", "honest")), lambda line: None)
    with pytest.raises(ModelError, match="no pairs to train on"):
        train(replace(how, max_length=3), lambda line: None)


def test_recipes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one member"):
        replace(HOW, members=0)
    with pytest.raises(ValueError, match="smoothing"):
        replace(HOW, smoothing=0.5)


@pytest.mark.parametrize("pooling", ["mean", "both"])
def test_a_score_of_all_tokens_is_the_same_alone_and_beside_another_and_after_a_load(
    pooling: Pooling, tmp_path: Path
) -> None:
    made = RewardModel.new(tiny.model(0), 1, ["reward"], SHAPE, pooling=pooling)
    for one in made.parameters(made.members[0]):
        torch.nn.init.normal_(one, std=0.1)
    pairs = some(made)
    with torch.no_grad():
        chosen, rejected = made.compared([pairs], made.members[0])
        apart = made.compared([[one] for one in pairs], made.members[0], once=False)
    assert torch.allclose(chosen, apart[0], atol=1e-5) and torch.allclose(rejected, apart[1], atol=1e-5)
    rows = [one.chosen for one in pairs]
    states = made.model.states(batch([[rows[0]]]), made.members[0])[0, torch.tensor(rows[0].trained)].detach()
    read = states.mean(0) if pooling == "mean" else torch.cat([states[-1], states.mean(0)])
    by_hand = made.model.heads[made.members[0]](read).detach()
    scores = made.scores(rows)[0]
    assert float(by_hand) == pytest.approx(float(scores[0]), abs=1e-5)
    loaded = RewardModel.load(tiny.model(0), made.save(tmp_path))
    assert loaded.pooling == pooling and torch.allclose(loaded.scores(rows)[0], scores, atol=1e-6)
