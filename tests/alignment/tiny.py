"""A tiny random chat model: a Llama of two layers and a tokenizer of bytes, made in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignment.model import Model

torch.set_num_threads(1)  # threads that wait for each other cost more than such a model takes
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>"]


def tokenizer(template: str = CHATML, special: list[str] = SPECIAL, end: str = "<|im_end|>") -> Any:
    """A tokenizer of bytes, whose pad token is the one that ends a turn, as SmolLM2's is."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, pad_token=end)
    fast.chat_template = template
    return fast


def model(seed: int = 0, dropout: float = 0.0, dtype: torch.dtype = torch.float32, **more: Any) -> Model:
    """A model with random weights: the same seed, the same model."""
    torch.manual_seed(seed)
    words = tokenizer()
    shape = {
        "vocab_size": len(words), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": True, "attention_dropout": dropout, "initializer_range": 0.1,
        "bos_token_id": words.convert_tokens_to_ids("<|im_start|>"), "eos_token_id": words.eos_token_id,
        "pad_token_id": words.eos_token_id,
    }  # fmt: skip
    config = LlamaConfig(**(shape | more), attn_implementation="sdpa")
    return Model(LlamaForCausalLM(config).to(dtype), words, "tiny")
