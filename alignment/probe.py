"""A linear head fitted to what a frozen model says of pairs, before its adapters learn.

From a random head the first steps bend the model towards noise, and a few hundred pairs are soon used up. Fitting the
head first, then all together (LP-FT), is better on what was not seen (Kumar et al. 2022, arXiv:2202.10054).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alignment.losses import preference_loss

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Weights of the penalty on the squares of standardised weights, of which cross-validation takes one."""
FOLDS = 5


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs as a model's states after their replies. chosen, rejected: [N, D]; margin, weight, tie: [N]."""

    chosen: Tensor
    rejected: Tensor
    margin: Tensor
    weight: Tensor
    tie: Tensor

    def __getitem__(self, which: Tensor) -> Pairs:
        """Some of them, by number."""
        return Pairs(self.chosen[which], self.rejected[which], self.margin[which], self.weight[which], self.tie[which])

    def __len__(self) -> int:
        return len(self.tie)

    def again(self, seed: int) -> Pairs:
        """As many, drawn from these with replacement (bootstrap): members that are fitted to them differ."""
        draw = torch.Generator().manual_seed(seed)
        return self[torch.randint(len(self), (len(self),), generator=draw)]


def fit(pairs: Pairs, smoothing: float = 0.0) -> Tensor:
    """The head's weights, [D]: those that prefer the chosen replies, with the penalty under which they do so best on
    pairs that they are not fitted to."""
    lead = (pairs.chosen - pairs.rejected).double()
    scale = lead.square().mean(0).sqrt().clamp(min=1e-6)
    lead, order = lead / scale, torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    surprise = []
    for ridge in RIDGES:
        total = 0.0
        for k in range(FOLDS if len(pairs) >= 2 * FOLDS else 0):
            out = order[k::FOLDS]
            rest = torch.cat([order[i::FOLDS] for i in range(FOLDS) if i != k])
            weights = _weights(lead[rest], pairs[rest], ridge, smoothing)
            total += float(_loss(lead[out] @ weights, pairs[out], smoothing)) * len(out)
        surprise.append(total)
    best = RIDGES[min(range(len(RIDGES)), key=surprise.__getitem__)] if any(surprise) else RIDGES[-1]
    return (_weights(lead, pairs, best, smoothing) / scale).float()


def _loss(lead: Tensor, pairs: Pairs, smoothing: float) -> Tensor:
    each = preference_loss(lead, torch.zeros_like(lead), pairs.margin, pairs.tie, smoothing)
    return (pairs.weight * each).sum() / pairs.weight.sum()


def _weights(lead: Tensor, pairs: Pairs, ridge: float, smoothing: float) -> Tensor:
    weights = torch.zeros(lead.shape[1], dtype=lead.dtype, device=lead.device, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = _loss(lead @ weights, pairs, smoothing) + ridge * weights.square().sum() / 2
        loss.backward()
        return loss

    solver.step(closure)
    return weights.detach()
