"""Adapters: what they change, that they can be taken out again, and that PEFT reads what is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from alignment import release
from alignment.lora import LoraShape
from alignment.model import Model
from alignment.tokens import Row, batch
from tests.alignment import tiny

SOME = batch([[Row((1, 2, 3, 4, 5, 6), (False, True, True, True, True, True))]])
SHAPE = LoraShape(4, 8.0)


def adapted(*names: str) -> Model:
    """A model whose adapters say something, each another thing."""
    model = tiny.model()
    for seed, name in enumerate(names):
        random = torch.Generator().manual_seed(seed)
        for one in model.adapt(name, SHAPE):
            one.data.normal_(0, 0.2, generator=random)
    return model


def said(model: Model, adapter: str | None) -> Tensor:
    with torch.no_grad():
        return model.told(SOME, model.states(SOME, adapter)).logprobs


def test_a_new_adapter_changes_nothing_and_each_has_its_own_say() -> None:
    model = tiny.model()
    before = said(model, None)
    model.adapt("new", SHAPE)
    assert torch.equal(said(model, "new"), before)
    model = adapted("a", "b")
    a, b = said(model, "a"), said(model, "b")
    assert not torch.allclose(a, b) and not torch.allclose(a, before)
    assert torch.equal(said(model, None), before)  # the reference stays the base
    with model.on("a"):
        assert torch.equal(said(model, "b"), b)


def test_a_merged_adapter_says_the_same_and_leaves_no_bit_behind() -> None:  # E3, E4
    model = adapted("a", "b")
    layers = model.adapters.layers.values()  # type: ignore[union-attr]
    before, apart = [one.base.weight.clone() for one in layers], said(model, "a")
    with model.adapters.merged("a"):  # type: ignore[union-attr]
        torch.testing.assert_close(said(model, None), apart, rtol=0, atol=1e-4)
        assert not torch.equal(before[0], next(iter(layers)).base.weight)
    assert all(torch.equal(one.base.weight, kept) for one, kept in zip(layers, before, strict=True))


def test_only_the_adapter_that_is_on_is_trained() -> None:
    model = adapted("a", "b")
    model.told(SOME, model.states(SOME, "a")).logprobs.sum().backward()  # type: ignore[no-untyped-call]
    grads = {name: [one.grad for one in model.adapters.parameters(name)] for name in "ab"}  # type: ignore[union-attr]
    assert all(one is not None for one in grads["a"]) and all(one is None for one in grads["b"])
    assert all(one.base.weight.grad is None for one in model.adapters.layers.values())  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers for it
def test_peft_reads_what_is_written_and_it_is_read_again(tmp_path: Path) -> None:
    from peft import PeftModel

    model = adapted("a")
    expected = said(model, "a")
    model.adapters.save("a", tmp_path, "tiny")  # type: ignore[union-attr]
    other = tiny.model()
    theirs = PeftModel.from_pretrained(other.base, tmp_path)
    with torch.no_grad():
        states = theirs(SOME.ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(other.told(SOME, states).logprobs, expected, rtol=0, atol=1e-5)
    again = tiny.model()
    again.adapt("first", SHAPE)
    again.adapters.load("a", tmp_path)  # type: ignore[union-attr]
    assert torch.equal(said(again, "a"), expected)
    with pytest.raises(ValueError, match=r"does not fit this model: .* tensors differ"):
        wider = tiny.model(num_hidden_layers=1)
        wider.adapt("first", SHAPE)
        wider.adapters.load("a", tmp_path)  # type: ignore[union-attr]


def test_a_model_without_the_named_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"none of the layers wqkv; name its own in `lora.targets`"):
        tiny.model().adapt("a", LoraShape(4, 8.0, ("wqkv",)))


def test_a_release_is_what_transformers_loads_with_tied_weights_template_and_ends(tmp_path: Path) -> None:  # E3
    base = tmp_path / "base"
    first = adapted()
    first.base.save_pretrained(base)
    first.tokenizer.save_pretrained(base)
    model = Model.load(base)
    for one in model.adapt("a", SHAPE):
        one.data.normal_(0, 0.2)
    expected, before = said(model, "a"), said(model, None)
    provenance = release.Provenance("sft", str(base), "epochs = 1\n", {"d.jsonl": "0" * 64}, {"test/loss": 1.25})
    folder = release.write(model, "a", tmp_path / "release", provenance)
    assert torch.equal(said(model, "a"), expected) and torch.equal(said(model, None), before)  # it goes on as it was
    again = Model.load(folder)
    torch.testing.assert_close(said(again, None), expected, rtol=0, atol=1e-4)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.tie_word_embeddings and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert again.template.end == model.template.end and again.tokenizer.chat_template == tiny.CHATML
    assert "| test/loss | 1.25 |" in (folder / "README.md").read_text()
    assert {one.name for one in (folder / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
