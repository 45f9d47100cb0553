"""TRL 1.16: supervised fine-tuning and reward models, by its trainers' own defaults for what is not asked."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from measured import Json, answer, asked, measured, rows
from peft import LoraConfig
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer


def common(how: Json) -> Json:
    return {
        "output_dir": how["folder"], "seed": how["seed"], "use_cpu": True, "report_to": [], "save_strategy": "no",
        "bf16": how["precision"] == "bfloat16", "learning_rate": how["lr"], "num_train_epochs": how["epochs"],
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": how["batch"] // 8, "logging_steps": 1,
        "disable_tqdm": True,
    }  # fmt: skip


def shape(how: Json, task: str, **more: Any) -> LoraConfig | None:
    if not how["lora"]:
        return None
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=task, **more)


def tuned(how: Json) -> Json:
    """Measures fine-tuning on prompts and completions; `loss`: of a held-out token, in nats."""
    data = Dataset.from_list([{name: row[name] for name in ("prompt", "completion")} for row in rows(how["train"])])
    trainer = SFTTrainer(
        model=how["model"], args=SFTConfig(**common(how)), train_dataset=data, peft_config=shape(how, "CAUSAL_LM")
    )
    with measured() as found:
        trainer.train()
    return found | {"loss": held_out(trainer.model, rows(how["test"]), how["precision"] == "bfloat16")}


@torch.no_grad()
def held_out(model: Any, test: list[Json], half: bool) -> float:
    """Nats a trained token, over all of them."""
    model.eval()
    total = count = 0.0
    for row in test:
        ids = torch.tensor([row["ids"]])
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = model(input_ids=ids).logits
        told = torch.log_softmax(logits[0, :-1].float(), -1).gather(-1, ids[0, 1:, None])[:, 0]
        trained = torch.tensor(row["trained"][1:])
        total, count = total - float(told[trained].sum()), count + float(trained.sum())
    return total / count


def judging(how: Json) -> Json:
    """Measures a reward model on pairs; `loss` and `accuracy` of held-out ones."""
    train, test = (
        Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows(how[split])])
        for split in ("train", "test")
    )
    trainer = RewardTrainer(
        model=how["model"], args=RewardConfig(**common(how), per_device_eval_batch_size=8), train_dataset=train,
        eval_dataset=test, peft_config=shape(how, "SEQ_CLS", modules_to_save=["score"]),
    )  # fmt: skip
    with measured() as found:
        trainer.train()
    told = trainer.evaluate()
    return found | {"loss": told["eval_loss"], "accuracy": told["eval_accuracy"]}


def main() -> None:
    how = asked()
    torch.manual_seed(how["seed"])
    answer(tuned(how) if how["task"] == "sft" else judging(how))


if __name__ == "__main__":
    main()
