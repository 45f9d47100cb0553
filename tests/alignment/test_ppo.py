"""PPO on a tiny model: every line of the checklist that is about it; in brackets which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.loop import Adam, Diverged, Parallel
from alignment.lora import LoraShape
from alignment.model import Model
from alignment.ppo import Experience, Kl, Ppo, Settings
from alignment.roles import CRITIC, POLICY, VALUE
from alignment.rollout import Local, Reply
from alignment.tokens import Row, batch
from tests.alignment import tiny

PROMPTS = [(1, 2, 3), (4, 5, 6, 7, 8, 9), (2, 2), (9, 8, 7, 6)]
SMALL = Settings(prompts=4, samples=2, limit=6, stop=None, tokens=64)


def even(replies: Sequence[Reply]) -> Tensor:
    """The share of even tokens."""
    return torch.tensor([sum(id % 2 == 0 for id in one.ids) / len(one.ids) for one in replies])


def ppo(
    settings: Settings = SMALL, seed: int = 0, lr: float = 1e-2, updates: int = 10, clip: float = 1.0,
    score: Callable[[Sequence[Reply]], Tensor] = even, model: Model | None = None, **more: Any,
) -> Ppo:  # fmt: skip
    made = model or tiny.model(seed, **more)
    how = Adam(lr=lr, warmup=0, clip=clip, eps=1e-5)
    return Ppo(made, settings, Local(made, POLICY), score, how, updates, Parallel("cpu"), LoraShape(4, 8.0))


def weights(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [one.detach().clone() for one in parameters]


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def moved(made: Ppo) -> Ppo:
    """After a few updates, so that policy and reference differ."""
    for seed in range(3):
        made.update(PROMPTS, seed)
    return made


def few_words(seed: int) -> Model:
    """A model of 16 tokens, none of which ends a reply, which can give them any chances."""
    ends = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return tiny.model(seed, vocab_size=16, initializer_range=0.3, **ends)


# --- E5 (b): the fixed point


def bandit(whiten: bool, critic: Any, beta: float = 0.5) -> float:
    """The total variation between the trained policy and the optimum, reference * exp(reward / beta) / Z."""
    worth = torch.linspace(-1, 1, 16)
    model = few_words(0)
    how = Settings(
        prompts=1, samples=256, limit=1, epochs=2, stop=None, kl=Kl(beta), missing_end=0.0, whiten=whiten,
        critic=critic, value_weight=0.5, tokens=2048,
    )  # fmt: skip
    made = ppo(how, lr=3e-3, updates=100, score=lambda replies: worth[[one.ids[0] for one in replies]], model=model)
    for seed in range(100):
        made.update([(1, 2, 3)], seed)
    some = batch([[Row((1, 2, 3), (False,) * 3)]])
    with torch.no_grad():
        reference, policy = (
            torch.softmax(model.states(some, one)[0, -1] @ model.unembedding.T, -1) for one in (None, POLICY)
        )
    optimum = torch.softmax(reference.log() + worth / beta, -1)
    assert float((reference - optimum).abs().sum() / 2) > 0.4
    return float((policy - optimum).abs().sum() / 2)


@pytest.mark.parametrize(("whiten", "critic"), [(False, "adapter"), (True, "shared")])
def test_the_policy_comes_to_the_optimum_that_the_penalty_allows(whiten: bool, critic: str) -> None:
    assert bandit(whiten, critic) < 0.02


# --- ratios and KL


@pytest.mark.parametrize("critic", ["adapter", "shared"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_ratios_are_1_to_the_bit(critic: Any, temperature: float) -> None:  # B1, B3, B4
    how = replace(SMALL, critic=critic, temperature=temperature, minibatches=1)
    found = moved(ppo(how, dropout=0.5)).update(PROMPTS, 9)
    assert found["policy/farthest"] == 0 and found["policy/clipped"] == 0 and found["ppo/kl"] == 0


def test_without_a_learning_rate_nothing_moves_over_all_epochs() -> None:  # B2
    made = ppo(replace(SMALL, epochs=3, minibatches=2), lr=0.0)
    before = weights(made.policy.parameters)
    found = made.update(PROMPTS, 0)
    assert found["policy/farthest"] == 0 and found["policy/clipped"] == 0 and found["ppo/steps"] == 6
    assert equal(before, made.policy.parameters)


def test_the_reference_is_the_policy_at_first_and_stays_what_it_was() -> None:  # B14
    made = ppo()
    base = weights([layer.base.weight for layer in made.model.adapters.layers.values()])  # type: ignore[union-attr]
    first = made.update(PROMPTS, 0)
    assert first["kl/k1"] == first["kl/k2"] == first["kl/k3"] == 0
    assert moved(made).update(PROMPTS, 5)["kl/k3"] > 0
    assert equal(base, [layer.base.weight for layer in made.model.adapters.layers.values()])  # type: ignore[union-attr]


def test_what_the_engine_drew_has_the_chances_that_the_trainer_says() -> None:  # B4, A9
    made = moved(ppo(replace(SMALL, temperature=0.7)))
    replies = made.engine.draw(PROMPTS, 2, 6, 0.7, 1)
    experience = made.experience(replies, 0)
    for i, one in enumerate(replies):
        torch.testing.assert_close(experience.old[i][experience.acts[i]], torch.tensor(one.drawn), rtol=0, atol=4e-5)


class Noisy:
    """An engine whose chances are not the trainer's."""

    def __init__(self, engine: Local, noise: float):
        self._engine, self._noise = engine, noise

    def draw(self, *given: Any) -> list[Reply]:
        return [replace(one, drawn=tuple(x + self._noise for x in one.drawn)) for one in self._engine.draw(*given)]


def test_an_engine_that_is_apart_from_the_trainer_shows_and_is_corrected() -> None:  # B6
    made = ppo(replace(SMALL, cap=2.0))
    exact = made.experience(made.engine.draw(PROMPTS, 2, 6, 1.0, 0), 0)
    assert exact.weights is not None
    torch.testing.assert_close(exact.weights[exact.acts], torch.ones(int(exact.acts.sum())), rtol=0, atol=1e-4)
    made.engine = Noisy(Local(made.model, POLICY), 0.3)
    apart = made.experience(made.engine.draw(PROMPTS, 2, 6, 1.0, 0), 0)
    assert apart.weights is not None and not apart.weights.requires_grad
    torch.testing.assert_close(
        apart.weights[apart.acts], torch.full((int(apart.acts.sum()),), -0.3).exp(), atol=1e-4, rtol=0
    )
    assert made.update(PROMPTS, 0)["engine/k1"] == pytest.approx(0.3, abs=1e-3)


# --- rewards and advantages


def replied(*finishes: str) -> list[Reply]:
    end = 257
    made = []
    for i, finish in enumerate(finishes):
        ids = (10 + i, 11) + ((end,) if finish == "stop" else (12,) * (i + 1))
        made.append(Reply((1, 2, 3), ids, (0.0,) * len(ids), finish))  # type: ignore[arg-type]
    return made


def test_the_token_that_ends_a_reply_is_an_action_with_a_gradient() -> None:  # A2: it is the pad token, too
    made = ppo()
    experience = made.experience(replied("stop", "length"), 0)
    made.rewarded(experience)
    assert experience.acts[0].sum() == 3 and bool(experience.acts[0, 5])
    some, _ = experience.part([0])
    told = made.model.told(some, made.model.states(some, POLICY))
    told.logprobs[0, 5].backward()  # type: ignore[no-untyped-call]
    assert any(one.grad is not None and one.grad.abs().sum() > 0 for one in made.policy.parameters)


def test_the_score_is_on_the_last_action_and_a_cut_reply_pays() -> None:  # C1, C7
    made = ppo(replace(SMALL, whiten=False, missing_end=0.75), score=lambda replies: torch.ones(len(replies)))
    experience = made.experience(replied("stop", "length", "stop"), 0)
    made.rewarded(experience)
    last = [int(row.nonzero()[-1]) for row in experience.acts]
    found = [float(experience.advantages[i, t]) for i, t in enumerate(last)]
    assert found == pytest.approx([1.0, 0.25, 1.0])  # the critic says 0 at first


def test_a_cut_reply_goes_on_from_what_the_critic_expects_where_that_is_asked_for() -> None:  # C2
    made = ppo(
        replace(SMALL, whiten=False, missing_end=0.0, bootstrap=True), score=lambda replies: torch.ones(len(replies))
    )
    torch.nn.init.constant_(made.model.heads[VALUE].bias, 3.0)  # type: ignore[arg-type]
    experience = made.experience(replied("stop", "length"), 0)
    made.rewarded(experience)
    last = [int(row.nonzero()[-1]) for row in experience.acts]
    ended, cut = (float(experience.advantages[i, t]) for i, t in enumerate(last))
    assert ended == pytest.approx(1 - 3) and cut == pytest.approx(1 + 3 - 3)


def test_the_penalty_is_taken_once_from_every_action() -> None:  # B12
    made = moved(ppo(replace(SMALL, whiten=False, kl=Kl(0.5), missing_end=0.0, decay=1.0)))
    made.score = lambda replies: torch.zeros(len(replies))
    torch.nn.init.zeros_(made.model.heads[VALUE].weight)  # type: ignore[arg-type]
    torch.nn.init.zeros_(made.model.heads[VALUE].bias)  # type: ignore[arg-type]
    experience = made.experience(made.engine.draw(PROMPTS, 2, 6, 1.0, 0), 0)
    made.rewarded(experience)
    k1 = torch.where(experience.acts, experience.old - experience.reference, 0)
    assert float(k1.abs().sum()) > 0
    first = [int(row.nonzero()[0]) for row in experience.acts]
    found = torch.stack([experience.advantages[i, t] for i, t in enumerate(first)])
    torch.testing.assert_close(found, -0.5 * k1.sum(1), rtol=1e-4, atol=1e-5)


# --- gradients


def gradient(tokens: int, minibatches: int = 1) -> list[Tensor]:
    made = ppo(replace(SMALL, tokens=tokens))
    replies = made.engine.draw(PROMPTS, 2, 6, 1.0, 0)
    experience = made.experience(replies, 0)
    made.rewarded(experience)
    made._gradients(experience, experience.parts)
    return [
        one.grad.clone() if one.grad is not None else torch.zeros_like(one)
        for one in (*made.policy.parameters, *made.critic.parameters)
    ]


def test_the_gradient_does_not_depend_on_how_rows_share_forward_passes() -> None:  # C11, A7
    whole = gradient(10_000)
    assert any(one.abs().sum() > 0 for one in whole)
    for tokens in (12, 30, 64):
        for mine, theirs in zip(gradient(tokens), whole, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_huge_reward_moves_the_weights_no_farther_than_the_clip_allows() -> None:  # C12
    made = ppo(replace(SMALL, whiten=False), clip=1e-3, score=lambda r: even(r) * 1e6)
    assert made.update(PROMPTS, 0)["policy/grad"] > 1e3
    state = made.policy.state()["adam"]["state"]
    total = sum(float((one["exp_avg"] / 0.1).square().sum()) for one in state.values()) ** 0.5
    assert total <= 1e-3 * 1.001


def test_a_reward_that_is_no_number_ends_the_run_and_keeps_the_weights() -> None:
    made = ppo(score=lambda replies: torch.full((len(replies),), torch.nan))
    before = weights(made.policy.parameters)
    with pytest.raises(Diverged, match=r"update 0: the gradient is not a number. Lower optimiser.lr"):
        made.update(PROMPTS, 0)
    assert equal(before, made.policy.parameters)


def test_while_the_critic_warms_up_the_policy_stays_what_it_is() -> None:  # C18
    for critic in ("adapter", "shared"):
        made = ppo(replace(SMALL, warmup=2, critic=critic))  # type: ignore[arg-type]
        before, values = weights(made.policy.parameters), weights(made.critic.parameters)
        made.update(PROMPTS, 0)
        made.update(PROMPTS, 1)
        assert equal(before, made.policy.parameters) and not equal(values, made.critic.parameters)
        made.update(PROMPTS, 2)
        assert not equal(before, made.policy.parameters)


@pytest.mark.parametrize("detach", [False, True])
def test_the_critics_gradient_reaches_the_shared_trunk_unless_it_is_detached(detach: bool) -> None:  # C19
    found = []
    for weight in (0.0, 10.0):
        made = ppo(replace(SMALL, critic="shared", detach=detach, value_weight=weight))
        made.model.heads[VALUE].weight.data.normal_(generator=torch.Generator().manual_seed(0))
        experience = made.experience(replied("stop", "length", "stop"), 0)
        made.rewarded(experience)
        made._gradients(experience, experience.parts)
        found.append([one.grad.clone() for one in made.policy.parameters if one.grad is not None])
    assert equal(*found) is detach


def test_a_step_too_far_from_the_old_policy_is_not_made() -> None:  # C16
    made = ppo(replace(SMALL, epochs=8, stop=1e-4), lr=0.05)
    before = made.policy.state()["adam"]["state"]
    assert not before
    found = made.update(PROMPTS, 0)
    assert found["ppo/stopped"] == 1 and 1 <= found["ppo/steps"] < 8
    steps = {int(one["step"]) for one in made.policy.state()["adam"]["state"].values()}
    assert steps == {int(found["ppo/steps"])}
    assert all(one.grad is None for one in (*made.policy.parameters, *made.critic.parameters))


def test_the_learning_rate_falls_once_an_update() -> None:  # C14
    made = ppo(replace(SMALL, epochs=2, minibatches=2), updates=4)
    assert [made.update(PROMPTS, seed)["lr"] for seed in range(4)] == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


def test_demonstrations_are_replayed_beside_the_policy() -> None:
    rows = [Row((1, 2, 3, 4, 5), (False, False, True, True, True))]
    made = ppo(replace(SMALL, replay=50.0), lr=2e-2, score=lambda replies: torch.zeros(len(replies)))
    found = [made.update(PROMPTS, seed, rows)["replay/loss"] for seed in range(8)]
    assert found[-1] < found[0] - 1


# --- learning


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_reward_rises(seed: int) -> None:  # E5 (a): another token is right after each prompt
    def right(replies: Sequence[Reply]) -> Tensor:
        return torch.tensor([float(one.ids[0] % 4 == len(one.prompt) % 4) for one in replies])

    how = replace(SMALL, samples=32, limit=1, epochs=2, kl=Kl(0.001), missing_end=0.0, tokens=4096)
    made = ppo(how, lr=1e-2, updates=40, score=right, model=few_words(seed))
    found = [made.update(PROMPTS, step)["reward/mean"] for step in range(40)]
    assert found[0] < 0.5 and sum(found[-5:]) / 5 >= 0.95


def test_the_critic_learns_what_to_expect() -> None:  # C17
    how = replace(SMALL, samples=8, limit=2, epochs=2, warmup=100, missing_end=0.0, tokens=4096, value_clip=None)
    made = ppo(how, lr=1e-2, updates=100, score=lambda r: torch.tensor([float(len(one.prompt) > 3) for one in r]))
    found = [made.update(PROMPTS, step)["value/explained"] for step in range(25)]
    assert found[0] == pytest.approx(0, abs=1e-5) and found[-1] > 0.9


def test_two_runs_of_one_seed_are_the_same_run() -> None:  # E6
    found = []
    for _ in range(2):
        made = ppo(replace(SMALL, epochs=2, minibatches=2))
        told = [made.update(PROMPTS, seed) for seed in range(3)]
        found.append([{k: v for k, v in one.items() if "time" not in k and "/s" not in k} for one in told])
    assert found[0] == found[1]


def test_a_run_goes_on_to_the_same_bits() -> None:  # E1, in memory
    whole = ppo(replace(SMALL, kl=Kl(0.1, target=0.5)))
    for seed in range(4):
        whole.update(PROMPTS, seed)
    half = ppo(replace(SMALL, kl=Kl(0.1, target=0.5)))
    for seed in range(2):
        half.update(PROMPTS, seed)
    after = ppo(replace(SMALL, kl=Kl(0.1, target=0.5)))
    after.restore(half.state())
    for seed in range(2, 4):
        after.update(PROMPTS, seed)
    assert after.kl == whole.kl and equal(after.policy.parameters, whole.policy.parameters)
    assert equal(after.critic.parameters, whole.critic.parameters)


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"epochs": 0}, {"prompts": 0}])
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:  # B5
    with pytest.raises(ValueError, match=r"at least 1|more than 0"):
        replace(SMALL, **changes)


def test_parts_are_the_same_in_all_epochs() -> None:  # B1 depends on it
    made = ppo(replace(SMALL, tokens=20))
    experience = made.experience(made.engine.draw(PROMPTS, 2, 6, 1.0, 0), 0)
    assert isinstance(experience, Experience) and len(experience.parts) > 2
    assert sorted(i for part in experience.parts for i in part) == list(range(8))
    assert CRITIC in made.model.adapters.shapes  # type: ignore[union-attr]
