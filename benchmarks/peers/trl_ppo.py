"""TRL 1.12: PPO as its own example sets it up, with four models, or with an adapter as the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from measured import Json, answer, asked, measured, rows
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import ModelOutput
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Reader(nn.Module):
    """The running reward of a reply as if it were a hidden state."""

    def __init__(self, wanted: list[int], vocabulary: int, prompt: int, scale: float):
        super().__init__()
        worth = torch.zeros(vocabulary)
        worth[wanted] = scale
        self.register_buffer("worth", worth)
        self.prompt = prompt

    def forward(self, input_ids: torch.Tensor, **_: Any) -> ModelOutput:
        worth = self.worth[input_ids]
        worth[:, : self.prompt] = 0
        return ModelOutput(hidden_states=(worth.cumsum(1)[..., None],))


class Rule(nn.Module):
    """A rule in the form in which the trainer asks a reward model."""

    base_model_prefix = "reader"

    def __init__(self, reader: Reader):
        super().__init__()
        self.reader = reader

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def trainer(how: Json) -> PPOTrainer:
    tokenizer = AutoTokenizer.from_pretrained(how["model"], padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # as in TRL's example: no reply holds it
    prompts = [row["ids"] for row in rows(how["prompts"])]
    args = PPOConfig(
        output_dir=how["folder"], seed=how["seed"], use_cpu=True, report_to=[], save_strategy="no",
        bf16=how["precision"] == "bfloat16", learning_rate=how["lr"], num_ppo_epochs=how["epochs"],
        per_device_train_batch_size=8, gradient_accumulation_steps=how["batch"] // 8,
        total_episodes=how["batch"] * how["updates"], response_length=how["limit"], num_sample_generations=0,
        logging_steps=1, disable_tqdm=True,
    )  # fmt: skip

    def value() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(how["model"], num_labels=1, dtype="float32")

    def policy() -> Any:
        return AutoModelForCausalLM.from_pretrained(how["model"], dtype="float32")

    model = policy()
    rule = (
        Rule(Reader(how["wanted"], model.config.vocab_size, len(prompts[0]), how["scale"])) if how["wanted"] else None
    )
    shape = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if how["lora"] else None
    return PPOTrainer(
        args=args, processing_class=tokenizer, model=model, ref_model=None if shape else policy(),
        reward_model=rule or value(), value_model=value(), train_dataset=Dataset.from_dict({"input_ids": prompts}),
        peft_config=shape,
    )  # fmt: skip


def main() -> None:
    how = asked()
    Path(how["folder"]).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(how["seed"])
    made = trainer(how)
    with measured() as found:
        made.train()
    logs = [one for one in made.state.log_history if "objective/scores" in one]
    found["rewards"] = [one["objective/scores"] for one in logs]
    found["kls"] = [one["objective/kl"] for one in logs]
    answer(found)


if __name__ == "__main__":
    main()
