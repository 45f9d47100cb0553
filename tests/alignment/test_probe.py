"""A head is fitted to a frozen model's states: it finds what decides, and keeps out of what does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from alignment import probe, reward
from alignment.lora import LoraShape
from alignment.reward import leads
from alignment.reward_model import RewardModel, paired
from tests.alignment import tiny
from tests.alignment.test_reward import said


def drawn(n: int, noise: float = 0.0, seed: int = 0) -> probe.Pairs:
    """Pairs of states in which the first of 20 numbers decides; noise: the share of wrong labels."""
    random = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, 20, generator=random) for _ in range(2))
    swap = (a[:, 0] < b[:, 0]) ^ (torch.rand(n, generator=random) < noise)
    chosen, rejected = torch.where(swap[:, None], b, a), torch.where(swap[:, None], a, b)
    return probe.Pairs(chosen, rejected, torch.zeros(n), torch.ones(n), torch.zeros(n, dtype=torch.bool))


def accuracy(weights: torch.Tensor, some: probe.Pairs) -> float:
    return float(((some.chosen - some.rejected) @ weights > 0).float().mean())


def test_what_decides_is_found_also_among_wrong_labels() -> None:
    assert accuracy(probe.fit(drawn(300)), drawn(2000, seed=1)) > 0.95
    assert accuracy(probe.fit(drawn(300, noise=0.3)), drawn(2000, seed=1)) > 0.8


def test_where_nothing_decides_the_weights_stay_small() -> None:
    nothing, something = (float(probe.fit(drawn(200, noise)).norm()) for noise in (0.5, 0.0))
    assert nothing < 0.2 * something


def test_the_scale_of_a_number_does_not_matter() -> None:
    one = drawn(200, noise=0.2)
    factor = torch.ones(20)
    factor[0] = 1e-3
    other = replace(one, chosen=one.chosen * factor, rejected=one.rejected * factor)
    assert torch.allclose(probe.fit(one), probe.fit(other) * factor, atol=1e-3)


def test_ties_and_weights_count() -> None:
    one = drawn(200)
    ties = replace(one, tie=torch.ones(200, dtype=torch.bool))
    assert float(probe.fit(ties).norm()) < 1e-3
    wrong = replace(one, chosen=one.rejected, rejected=one.chosen, weight=torch.full((200,), 0.01))
    both = probe.Pairs(*(torch.cat([getattr(x, k) for x in (one, wrong)]) for k in one.__slots__))
    assert accuracy(probe.fit(both), drawn(500, seed=2)) > 0.9


def test_few_pairs_are_fitted_with_the_strongest_penalty() -> None:
    few = drawn(4)
    assert torch.isfinite(probe.fit(few)).all() and float(probe.fit(few).norm()) < 2.0


def test_members_begin_with_heads_of_their_own_that_know_the_pairs(tmp_path: Path) -> None:
    model = tiny.model(0)
    made = RewardModel.new(model, 2, ["helpful"], LoraShape(4, 8.0))
    told = [said(f"Say {i}", f"yes, {i}!", f"no {i} no") for i in range(24)]
    pairs = [paired(model, one, ["helpful"]) for one in told]
    how = reward.Recipe(model=tmp_path, data=(), output=tmp_path, members=2)
    reward.begin(made, pairs, how)
    found = leads(made, pairs)
    assert float((found > 0).float().mean()) > 0.9 and not torch.allclose(found[0], found[1])
