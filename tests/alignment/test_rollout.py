"""Replies that our own loop draws: right tokens, right chances, right ends."""

from __future__ import annotations

import pytest
import torch

from alignment.lora import LoraShape
from alignment.model import Model
from alignment.rollout import Local, Reply
from alignment.tokens import batch
from tests.alignment import tiny

PROMPTS = [(1, 2, 3), (4, 5, 6, 7, 8, 9, 10), (2, 2)]


@pytest.fixture
def model() -> Model:
    """A model that ends a reply once in a while, and has an adapter."""
    made = tiny.model(3)
    for one in made.adapt("policy", LoraShape(4, 8.0)):
        one.data.normal_(0, 0.1)
    made.template.end = frozenset(range(60))  # about a quarter of the tokens
    return made


def test_greedy_replies_are_those_of_transformers(model: Model) -> None:
    found = Local(model, None).draw(PROMPTS, 1, 12, 0, 0)
    for prompt, reply in zip(PROMPTS, found, strict=True):
        theirs = model.base.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=12, do_sample=False,
            eos_token_id=sorted(model.template.end), pad_token_id=0,
        )  # fmt: skip
        assert reply.ids == tuple(theirs[0, len(prompt) :].tolist())


def test_a_reply_ends_with_its_first_end_or_at_the_limit(model: Model) -> None:  # A6, A10
    found = Local(model, "policy").draw(PROMPTS, 20, 6, 1.0, 0)
    assert len(found) == 60 and {one.finish for one in found} == {"stop", "length"}
    for one in found:
        ends = [id in model.template.end for id in one.ids]
        assert sum(ends) == (one.finish == "stop") and not any(ends[:-1])
        assert (len(one.ids) == 6 or one.finish == "stop") and len(one.drawn) == len(one.ids)
    assert [one.prompt for one in found] == [prompt for prompt in PROMPTS for _ in range(20)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_what_was_drawn_has_the_chances_of_the_adapter_at_that_temperature(model: Model, temperature: float) -> None:
    found = Local(model, "policy", batch=16).draw(PROMPTS, 9, 8, temperature, 5)
    some = batch([[one.row] for one in found])
    with torch.no_grad():
        told = model.told(some, model.states(some, "policy"), temperature).logprobs
    for i, one in enumerate(found):
        torch.testing.assert_close(told[i][some.trained[i]], torch.tensor(one.drawn), rtol=0, atol=4e-5)


def test_tokens_are_drawn_as_often_as_they_are_likely(model: Model) -> None:
    found = Local(model, None, batch=20_000).draw([PROMPTS[0]], 20_000, 1, 1.0, 0)
    logits = model.base(torch.tensor([PROMPTS[0]])).logits[0, -1]
    chances = torch.softmax(logits, -1)
    counts = torch.bincount(torch.tensor([one.ids[0] for one in found]), minlength=len(chances))
    assert float((counts / 20_000 - chances).abs().sum() / 2) < 0.06


def test_the_same_seed_draws_the_same(model: Model) -> None:
    one, same, other = (Local(model, "policy", 8).draw(PROMPTS, 4, 8, 1.0, seed) for seed in (1, 1, 2))
    assert one == same != other


def test_a_row_of_a_reply_trains_the_reply_alone() -> None:
    row = Reply((1, 2), (3, 4), (0.0, 0.0), "stop").row
    assert row.ids == (1, 2, 3, 4) and row.trained == (False, False, True, True)
