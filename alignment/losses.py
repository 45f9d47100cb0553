"""The maths of the trainers, as pure functions of tensors.

Shapes: B sequences of T tokens, of a vocabulary of V. A mask is bool and true on the tokens that count. Sums and means
are over true tokens alone, so that padding never matters; divisions by a count are left to the caller where the count
is that of a whole batch and not of the part at hand (`total`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 1024
"""Tokens whose logits exist at the same time: 200 MB in float32 for a vocabulary of 49,152."""
CACHED = 64
"""As many on a CPU: their logits stay in its cache, which saves two fifths of the time in bfloat16."""


# --- log-probabilities


def chunk(device: torch.device) -> int:
    """Tokens whose logits exist at the same time."""
    return CACHED if device.type == "cpu" else CHUNK


class _ChunkedLogprobs(torch.autograd.Function):
    """log p of the targets, and the entropy, from hidden states, with logits of only `chunk` tokens at a time.

    The backward pass computes them again: d log p[t] / d logits = onehot - softmax. In float32 whatever the model is
    in: log-softmax in bfloat16 is off by more than what a policy changes in one step.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logprobs = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        entropy = torch.empty_like(logprobs)
        size = chunk(hidden.device)
        for at in range(0, len(hidden), size):
            some = slice(at, at + size)
            scores = torch.log_softmax(_logits(hidden[some], weight, temperature), -1)
            logprobs[some] = scores.gather(-1, targets[some, None])[:, 0]
            entropy[some] = -(scores.exp() * scores).sum(-1)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _entropy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, targets = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = (
            torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            if ctx.needs_input_grad[1]
            else None
        )
        size = chunk(hidden.device)
        for at in range(0, len(hidden), size):
            some = slice(at, at + size)
            change = torch.softmax(_logits(hidden[some], weight, ctx.temperature), -1).neg_()
            change.scatter_add_(-1, targets[some, None], torch.ones_like(change[:, :1]))
            change *= grad[some, None] / ctx.temperature
            change = change.to(weight.dtype)
            if to_hidden is not None:
                to_hidden[some] = change @ weight
            if to_weight is not None:
                to_weight += (change.T @ hidden[some]).to(to_weight.dtype)
        return to_hidden, None if to_weight is None else to_weight.to(weight.dtype), None, None


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature


def logprobs_of(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(log p(targets), entropy), each [N] in float32, nats (float64 of float64).

    hidden: [N, D]. weight: [V, D], the head's. targets: [N]. The entropy has no gradient. No [N, V] is ever held.
    """
    logprobs, entropy = _ChunkedLogprobs.apply(hidden, weight, targets, temperature)  # type: ignore[no-untyped-call]
    return logprobs, entropy


# --- means over what counts


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of the values where the mask is true, 0 where it is nowhere."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """The unbiased variance of the values where the mask is true; 0 for fewer than two."""
    mean = masked_mean(values, mask)
    return torch.where(mask, (values - mean) ** 2, 0).sum() / (mask.sum() - 1).clamp(min=1)


def whitened(values: Tensor, mask: Tensor, mean: Tensor, var: Tensor, keep_mean: bool = False) -> Tensor:
    """The values with mean 0 (or their own, for rewards) and variance 1, 0 where the mask is false.

    mean, var: over the whole batch of all processes, not of the part at hand ("The N+ Implementation Details of RLHF").
    """
    scaled = (values - mean) * torch.rsqrt(var + 1e-8)
    return torch.where(mask, scaled + mean if keep_mean else scaled, 0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for a constant one."""
    return 1 - masked_var(returns - values, mask) / masked_var(returns, mask).clamp(min=1e-8)


# --- KL


def kl_estimates(logprobs: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(k1, k2, k3) of KL(policy, reference) in nats a token, for tokens that the policy drew (Schulman 2020).

    k1 = log p - log q is unbiased, k2 = k1^2 / 2 has less variance, k3 = q/p - 1 + k1 is unbiased and never negative.
    """
    k1 = logprobs - reference
    return k1, k1**2 / 2, torch.expm1(-k1) + k1


def adapted(coefficient: float, kl: float, target: float, horizon: float, steps: int) -> float:
    """The next KL coefficient: up where `kl` (nats a sequence) is over `target`, down where it is under.

    The proportional controller of Ziegler et al. 2019 (arXiv:1909.08593), section 2.2: after `horizon` episodes of the
    greatest error, 20 %, it has changed by a factor of about 1.2; `steps` is how many episodes the batch had.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * steps / horizon)


# --- advantages


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, last: Tensor, discount: float = 1.0, decay: float = 0.95
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each [B, T], 0 where the mask is false (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

    rewards, values, mask: [B, T] over the actions, of which a row may have any, in order, with others between. last:
    [B], the value of the state after the last action: 0 where the reply has ended, what the critic says where it was
    cut off. returns = advantages + values.
    """
    advantages = torch.zeros_like(rewards)
    after, running = last, torch.zeros_like(last)
    for t in reversed(range(rewards.shape[1])):
        acts = mask[:, t]
        delta = rewards[:, t] + discount * after - values[:, t]
        running = torch.where(acts, delta + discount * decay * running, running)
        after = torch.where(acts, values[:, t], after)
        advantages[:, t] = torch.where(acts, running, 0)
    return advantages, torch.where(mask, advantages + values, 0)


# --- PPO


def policy_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float, weights: Tensor | None = None
) -> Tensor:
    """The sum over tokens of max(-A r, -A clip(r, 1 - clip, 1 + clip)), r = p / p_old (arXiv:1707.06347, eq. 7).

    weights: of each token, detached, for what another engine drew (`importance`).
    """
    ratio = torch.exp(torch.where(mask, logprobs - old, 0))
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return torch.where(mask, loss if weights is None else loss * weights, 0).sum()


def clipped(logprobs: Tensor, old: Tensor, mask: Tensor, clip: float) -> Tensor:
    """How many tokens' ratios lie outside of 1 - clip .. 1 + clip."""
    ratio = torch.exp(torch.where(mask, logprobs - old, 0))
    return ((ratio - 1).abs() > clip).sum()


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float | None) -> Tensor:
    """The sum over tokens of half the squared error, the greater of that of the value and of the value kept within
    `clip` of the old one (as in OpenAI's baselines)."""
    loss = (values - returns) ** 2
    if clip is not None:
        loss = torch.maximum(loss, (old + (values - old).clamp(-clip, clip) - returns) ** 2)
    return torch.where(mask, loss, 0).sum() / 2


def importance(old: Tensor, drawn: Tensor, mask: Tensor, cap: float) -> Tensor:
    """min(p_old / p_drawn, cap) a token, 0 where the mask is false: truncated importance sampling (Ionides 2008).

    old: by the trainer, drawn: by the engine that made the reply, whose kernels and precision may differ.
    """
    return torch.where(mask, torch.exp(torch.where(mask, old - drawn, 0)).clamp(max=cap), 0).detach()


# --- rewards from pairs


def preference_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, tie: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Bradley-Terry: -log sigmoid(chosen - rejected - margin) a pair [B] (arXiv:2307.09288, eq. 2).

    tie: [B] bool; a tie is half a win of each side. smoothing: the share of pairs that are held to be labelled the
    wrong way round.
    """
    lead = chosen - rejected - margin
    wrong = torch.full_like(lead, smoothing)
    if tie is not None:
        wrong, lead = torch.where(tie, 0.5, wrong), torch.where(tie, chosen - rejected, lead)
    return -(1 - wrong) * F.logsigmoid(lead) - wrong * F.logsigmoid(-lead)


def centring(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(chosen + rejected)^2 a pair [B]: it keeps rewards around 0 (Eisenstein et al. 2023, arXiv:2312.09244)."""
    return (chosen + rejected) ** 2


# --- DPO and KTO


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    beta: float,
    kind: Literal["sigmoid", "ipo", "robust"] = "sigmoid",
    smoothing: float = 0.0,
) -> Tensor:
    """The loss a pair [B]; chosen and rejected are log p - log p_ref of the replies (or, length-normalised, a token).

    sigmoid: arXiv:2305.18290, eq. 7, with `smoothing` as in cDPO. ipo: arXiv:2310.12036, eq. 17. robust:
    arXiv:2403.00409, eq. 12, unbiased where a share `smoothing` of the labels is flipped.
    """
    lead = chosen - rejected
    if kind == "ipo":
        return (lead - 1 / (2 * beta)) ** 2
    right, wrong = -F.logsigmoid(beta * lead), -F.logsigmoid(-beta * lead)
    if kind == "robust":
        return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
    return (1 - smoothing) * right + smoothing * wrong


def kto_loss(gain: Tensor, good: Tensor, baseline: Tensor, beta: float, up: float = 1.0, down: float = 1.0) -> Tensor:
    """The loss a reply [B] (arXiv:2402.01306, eq. 8); gain is log p - log p_ref of it, good [B] bool.

    baseline: the KL of the policy from the reference, as the mean gain of replies to other prompts, at least 0 and
    detached. up, down: the weights of good and of bad replies.
    """
    value = torch.where(good, beta * (gain - baseline), beta * (baseline - gain))
    return torch.where(good, up, down) * (1 - torch.sigmoid(value))
