"""Policy, reference and critic as models of their own: all weights are trained, and what held for adapters holds."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.loop import Adam, Parallel
from alignment.lora import LoraShape
from alignment.model import Model
from alignment.ppo import Kl, Ppo, Settings
from alignment.reward_model import RewardModel
from alignment.roles import CRITIC, VALUE, Apart, Roles
from alignment.rollout import Local
from alignment.tokens import Row, batch
from tests.alignment import tiny
from tests.alignment.test_ppo import PROMPTS, SMALL, equal, even, few_words, weights


def whole(settings: Settings = SMALL, lr: float = 1e-3, updates: int = 10, make: Any = tiny.model, **more: Any) -> Ppo:
    model = make(0)
    apart = Apart(make(0), make(0) if settings.critic == "model" else None)
    how = Adam(lr=lr, warmup=0, eps=1e-5)
    score = more.pop("score", even)
    return Ppo(model, settings, Local(model, None), score, how, updates, Parallel("cpu"), None, apart=apart, **more)


@pytest.mark.parametrize("critic", ["adapter", "shared", "model"])
def test_the_policy_comes_to_the_optimum_that_the_penalty_allows(critic: Any) -> None:  # E5 (b)
    worth, beta = torch.linspace(-1, 1, 16), 0.5
    how = Settings(
        prompts=1, samples=256, limit=1, epochs=2, stop=None, kl=Kl(beta), missing_end=0.0, critic=critic,
        value_weight=0.1, tokens=2048,
    )  # fmt: skip
    made = whole(how, 3e-4, 100, few_words, score=lambda replies: worth[[one.ids[0] for one in replies]])
    for seed in range(100):
        made.update([(1, 2, 3)], seed)
    some = batch([[Row((1, 2, 3), (False,) * 3)]])
    with torch.no_grad():
        reference, policy = (
            torch.softmax(role.states(some)[0, -1] @ role.model.unembedding.T, -1)
            for role in (made.roles.reference, made.roles.policy)
        )
    optimum = torch.softmax(reference.log() + worth / beta, -1)
    assert float((reference - optimum).abs().sum() / 2) > 0.4
    assert float((policy - optimum).abs().sum() / 2) < 0.02


@pytest.mark.parametrize("critic", ["adapter", "shared", "model"])
def test_the_first_ratios_are_1_and_the_reference_stays(critic: Any) -> None:
    made = whole(replace(SMALL, critic=critic))
    still = weights([one for _, one in made.roles.reference.model.weights()])
    for seed in range(2):
        found = made.update(PROMPTS, seed)
        assert found["policy/farthest"] == 0
    assert found["kl/reply"] > 0
    assert equal(still, [one for _, one in made.roles.reference.model.weights()])


@pytest.mark.parametrize("critic", ["adapter", "model"])
def test_the_critic_begins_as_the_reward_model(critic: Any, tmp_path: Path) -> None:
    judge = RewardModel.new(tiny.model(0), 1, ["helpful"], LoraShape(8, 16.0))
    for one in judge.parameters(judge.members[0]):
        torch.nn.init.normal_(one, std=0.1)
    judge.save(tmp_path)
    made = whole(replace(SMALL, critic=critic), critic_from=tmp_path)
    row = Row((1, 2, 3, 4), (False, False, True, True))
    [score] = judge.scores([row])[0]
    role = made.roles.critic
    with torch.no_grad():
        value = role.model.values(role.states(batch([[row]])), VALUE)[0, -1]
    assert float(value) == pytest.approx(float(score), abs=1e-5)
    assert (role.adapter == CRITIC) == (critic == "adapter")


def test_a_run_of_whole_weights_goes_on_to_the_same_bits() -> None:
    how = replace(SMALL, critic="model")
    first, again = whole(how), whole(how)
    first.update(PROMPTS, 0)
    again.restore(deepcopy(first.state()))
    for made in (first, again):
        made.update(PROMPTS, 1)
    assert equal(first.policy.parameters, again.policy.parameters)
    assert equal(first.critic.parameters, again.critic.parameters)


def test_a_policy_cannot_be_its_own_reference() -> None:
    with pytest.raises(ValueError, match="the reference is a model of its own"):
        Roles.of(tiny.model(0), None, "shared", None, None)


def test_a_model_that_absorbed_an_adapter_says_what_it_said_with_it() -> None:
    model: Model = tiny.model(0)
    for one in model.adapt("policy", LoraShape(4, 8.0)):
        torch.nn.init.normal_(one, std=0.05)
    some = batch([[Row((1, 2, 3, 4), (False, False, True, True))]])
    with torch.no_grad():
        before = model.states(some, "policy")
        model.absorb("policy")
        assert model.adapters is None
        assert torch.allclose(model.states(some), before, atol=1e-5)
