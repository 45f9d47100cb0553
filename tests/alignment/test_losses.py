"""The maths against definitions, by hand or by brute force; in brackets the line of the PPO checklist."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from alignment import losses

N = 2 * losses.CHUNK + 7  # several chunks, the last one short


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    scores = torch.log_softmax((hidden @ weight.T).float() / temperature, -1)
    return scores.gather(-1, targets[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_logprobs_and_their_gradients_are_those_of_log_softmax(temperature: float) -> None:  # B8
    torch.manual_seed(0)
    targets, coefficients = torch.randint(0, 11, (N,)), torch.randn(N)
    found = []
    for how in (lambda *given: losses.logprobs_of(*given)[0], plain):
        hidden = torch.randn(N, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        weight = torch.randn(11, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
        out = how(hidden, weight, targets, temperature)
        (out * coefficients).sum().backward()
        found.append((out.detach(), hidden.grad, weight.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-5)


def test_the_gradient_of_logprobs_is_the_numerical_one() -> None:  # B8
    targets = torch.tensor([0, 2, 1])

    def of(hidden: Tensor, weight: Tensor) -> Tensor:
        return losses.logprobs_of(hidden, weight, targets, 1.3)[0]

    given = [torch.randn(3, 4, dtype=torch.double, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(of, given)


def test_logprobs_are_float32_whatever_the_model_is_in() -> None:  # B7
    hidden, weight = torch.randn(50, 16).bfloat16(), torch.randn(300, 16).bfloat16()
    targets = torch.randint(0, 300, (50,))
    found, _ = losses.logprobs_of(hidden, weight, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain(hidden, weight, targets, 1.0), rtol=1e-6, atol=1e-6)


def test_the_entropy_of_equal_chances_is_the_logarithm_of_their_number() -> None:  # C20
    _, entropy = losses.logprobs_of(torch.zeros(2, 4), torch.randn(10, 4), torch.tensor([0, 1]))
    torch.testing.assert_close(entropy, torch.full((2,), math.log(10)))
    assert not entropy.requires_grad


def test_means_and_variances_are_over_what_counts() -> None:
    values, mask = torch.tensor([[1.0, 2.0, 99.0], [4.0, -99.0, -99.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert losses.masked_mean(values, mask) == pytest.approx(7 / 3)
    assert losses.masked_var(values, mask) == pytest.approx(torch.tensor([1.0, 2.0, 4.0]).var())
    assert losses.masked_mean(values, mask & False) == 0 and losses.masked_var(values, mask & False) == 0


def test_whitened_values_have_mean_0_or_their_own_and_variance_1() -> None:  # C6
    values, mask = torch.randn(4, 9) * 3 + 5, torch.rand(4, 9) < 0.7
    mean, var = losses.masked_mean(values, mask), losses.masked_var(values, mask)
    white = losses.whitened(values, mask, mean, var)
    assert losses.masked_mean(white, mask) == pytest.approx(0, abs=1e-6)
    assert losses.masked_var(white, mask) == pytest.approx(1, abs=1e-5)
    assert (white[~mask] == 0).all()
    assert losses.masked_mean(losses.whitened(values, mask, mean, var, keep_mean=True), mask) == pytest.approx(mean)


def test_explained_variance_is_1_for_a_perfect_critic_and_0_for_a_constant_one() -> None:  # C21
    returns, mask = torch.randn(3, 5), torch.ones(3, 5).bool()
    mask[0, 4], returns[0, 4] = False, 1e6
    assert losses.explained_variance(returns.clone(), returns, mask) == pytest.approx(1)
    assert losses.explained_variance(torch.full_like(returns, 0.3), returns, mask) == pytest.approx(0, abs=1e-6)


def test_the_estimators_of_kl_have_its_expectation() -> None:  # B10
    torch.manual_seed(0)
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    exact = float((p * (p / q).log()).sum())
    drawn = torch.multinomial(p, 100_000, replacement=True)
    k1, k2, k3 = losses.kl_estimates(p.log()[drawn], q.log()[drawn])
    for one in (k1, k3):
        assert float(one.mean()) == pytest.approx(exact, abs=3 * float(one.std()) / math.sqrt(len(one)))
    assert float(k2.mean()) == pytest.approx(exact, rel=0.1) and (k3 >= 0).all()
    assert float(k3.std()) < float(k1.std())


def test_the_adaptive_coefficient_follows_the_table() -> None:  # B15
    coefficient, table = 0.1, []
    for kl in (12.0, 6.0, 3.0, 6.6, 5.4):
        coefficient = losses.adapted(coefficient, kl, target=6.0, horizon=100, steps=10)
        table.append(coefficient)
    assert table == pytest.approx([0.102, 0.102, 0.09996, 0.1009596, 0.099950004])


def brute(rewards: Tensor, values: Tensor, mask: Tensor, last: Tensor, discount: float, decay: float) -> Tensor:
    """Sums of (discount decay)^l delta over what follows, row by row."""
    out = torch.zeros_like(rewards)
    for i in range(len(rewards)):
        places = mask[i].nonzero()[:, 0].tolist()
        states = [*values[i, places].tolist(), float(last[i])]
        deltas = [float(rewards[i, t]) + discount * states[k + 1] - states[k] for k, t in enumerate(places)]
        for k, t in enumerate(places):
            out[i, t] = sum((discount * decay) ** n * delta for n, delta in enumerate(deltas[k:]))
    return out


@pytest.mark.parametrize(("discount", "decay"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_its_definition(discount: float, decay: float) -> None:  # C3, A8: other tokens may stand between
    torch.manual_seed(0)
    rewards, values, last = torch.randn(5, 8).double(), torch.randn(5, 8).double(), torch.randn(5).double()
    mask = torch.rand(5, 8) < 0.6
    mask[:, 3] = True
    found, returns = losses.gae(rewards, values, mask, last, discount, decay)
    expected = brute(rewards, values, mask, last, discount, decay)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(returns, torch.where(mask, expected + values, 0))  # C4: old values, not whitened


def test_what_stands_between_and_behind_does_not_reach_the_advantages() -> None:  # C5, A8
    rewards, values, mask = (
        torch.randn(2, 6),
        torch.randn(2, 6),
        torch.tensor([[0, 1, 1, 0, 1, 0], [1, 0, 1, 0, 0, 0]]).bool(),
    )
    found = losses.gae(rewards, values, mask, torch.zeros(2))
    garbage = torch.where(mask, 0, 1e9)
    again = losses.gae(rewards + garbage, values - garbage, mask, torch.zeros(2))
    for a, b in zip(found, again, strict=True):
        torch.testing.assert_close(a, b)


def test_the_last_action_of_every_reply_gets_its_score_undiscounted_by_decay() -> None:  # C1
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    rewards = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 1.0]])
    advantages, _ = losses.gae(rewards, torch.zeros(2, 4), mask, torch.zeros(2), 1.0, 0.95)
    assert advantages[0, 1] == 1 and advantages[1, 3] == 1
    assert advantages[0, 0] == pytest.approx(0.95) and advantages[1, 0] == pytest.approx(0.95**3)


def test_a_cut_reply_may_go_on_from_what_the_critic_expects() -> None:  # C2
    mask, values = torch.ones(1, 2).bool(), torch.tensor([[0.5, 0.25]])
    ended, _ = losses.gae(torch.zeros(1, 2), values, mask, torch.zeros(1), 1.0, 1.0)
    cut, _ = losses.gae(torch.zeros(1, 2), values, mask, torch.tensor([2.0]), 1.0, 1.0)
    assert ended.tolist() == [[-0.5, -0.25]] and cut.tolist() == [[1.5, 1.75]]


@pytest.mark.parametrize(
    ("advantage", "ratio", "slope"),
    [(1, 1.1, -1.1), (1, 1.5, 0), (1, 0.5, -0.5), (-1, 1.1, 1.1), (-1, 1.5, 1.5), (-1, 0.5, 0)],
)
def test_the_policy_loss_is_clipped_on_the_side_that_would_gain(
    advantage: float, ratio: float, slope: float
) -> None:  # C10
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    losses.policy_loss(
        logprobs, torch.zeros(1, 1), torch.tensor([[float(advantage)]]), torch.ones(1, 1).bool(), 0.2
    ).backward()
    assert logprobs.grad is not None and logprobs.grad.item() == pytest.approx(slope)


def test_padding_adds_nothing_to_the_losses() -> None:
    mask = torch.tensor([[True, False]])
    wild = torch.tensor([[0.0, 1e6]])
    assert losses.policy_loss(wild, -wild, torch.ones(1, 2), mask, 0.2) == -1
    assert losses.clipped(wild, -wild, mask, 0.2) == 0
    assert losses.value_loss(wild, wild * 0, torch.ones(1, 2), mask, 0.2) == 0.5
    assert losses.importance(wild, -wild, mask, 2.0).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("value", "slope"), [(0.1, -0.9), (0.5, -0.5), (-0.5, -1.5), (1.5, 0.5)]
)  # the old value is 0, the return 1: beyond 0.2 the value gains nothing, but a clipped error that is greater hides it
def test_a_value_far_from_the_old_one_is_pulled_back_only(value: float, slope: float) -> None:  # C9
    values = torch.tensor([[value]], requires_grad=True)
    losses.value_loss(values, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1).bool(), 0.2).backward()
    hidden = (max(-0.2, min(0.2, value)) - 1) ** 2 > (value - 1) ** 2
    assert values.grad is not None and values.grad.item() == pytest.approx(0 if hidden else slope)


def test_importance_weights_are_1_where_both_agree_and_capped_and_detached() -> None:  # B6
    old = torch.tensor([[-1.0, -1.0, -1.0]], requires_grad=True)
    weights = losses.importance(old, torch.tensor([[-1.0, -3.0, -0.5]]), torch.ones(1, 3).bool(), 2.0)
    assert weights.tolist()[0] == pytest.approx([1.0, 2.0, math.exp(-0.5)]) and not weights.requires_grad


def test_preferences_change_sign_when_the_replies_are_swapped() -> None:  # D5
    chosen, rejected = torch.tensor([1.0], requires_grad=True), torch.tensor([0.3], requires_grad=True)
    loss = losses.preference_loss(chosen, rejected)
    loss.sum().backward()
    slope = -torch.sigmoid(torch.tensor(-0.7))
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.7))))
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(float(slope)) and rejected.grad.item() == pytest.approx(-float(slope))


def test_margins_ties_and_smoothing() -> None:  # D5
    chosen, rejected = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0])
    tie = torch.tensor([False, True])
    plain, tied = losses.preference_loss(chosen, rejected, margin=torch.tensor([0.4, 0.4]), tie=tie).tolist()
    assert plain == pytest.approx(math.log(1 + math.exp(-0.6)))
    assert tied == pytest.approx(0.5 * (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))))
    smooth = losses.preference_loss(chosen[:1], rejected[:1], smoothing=0.1).item()
    assert smooth == pytest.approx(0.9 * math.log(1 + math.exp(-1)) + 0.1 * math.log(1 + math.exp(1)))
    score = torch.tensor([0.7], requires_grad=True)
    losses.centring(score, torch.tensor([0.3])).sum().backward()
    assert score.grad is not None and score.grad.item() == pytest.approx(2.0)


def test_dpo_starts_at_log_2_and_its_kinds_are_their_formulas() -> None:  # D9
    zero = torch.zeros(1)
    assert losses.dpo_loss(zero, zero, 0.1).item() == pytest.approx(math.log(2))
    chosen, rejected = torch.tensor([2.0]), torch.tensor([-1.0])
    right, wrong = math.log(1 + math.exp(-0.3)), math.log(1 + math.exp(0.3))
    assert losses.dpo_loss(chosen, rejected, 0.1).item() == pytest.approx(right)
    assert losses.dpo_loss(chosen, rejected, 0.1, smoothing=0.2).item() == pytest.approx(0.8 * right + 0.2 * wrong)
    assert losses.dpo_loss(chosen, rejected, 0.1, "ipo").item() == pytest.approx((3 - 5) ** 2)
    robust = losses.dpo_loss(chosen, rejected, 0.1, "robust", smoothing=0.2).item()
    assert robust == pytest.approx((0.8 * right - 0.2 * wrong) / 0.6)


def test_kto_weighs_good_and_bad_replies_against_the_baseline() -> None:
    gain, good = torch.tensor([1.0, 1.0]), torch.tensor([True, False])
    up, down = losses.kto_loss(gain, good, torch.tensor(0.5), beta=2.0, up=1.0, down=3.0).tolist()
    assert up == pytest.approx(1 - 1 / (1 + math.exp(-1))) and down == pytest.approx(3 * (1 - 1 / (1 + math.exp(1))))
