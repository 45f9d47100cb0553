"""GGUF file -> safetensors checkpoint: `python -m alignment.convert SRC.gguf DST [--expect TEXT]`.

A process of its own, so that whoever asks for a model needs neither torch nor its memory. It imports nothing of newel
and so runs by path too (`python -P convert.py`), in any environment that has torch, transformers, accelerate and gguf.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

PROMPT = "What is the capital of France?"


class NotSane(Exception):
    """The converted model does not answer a plain question: the file is damaged or of a kind that is not understood."""


def convert(source: Path, target: Path, expect: str = "") -> str:
    """Returns the answer of the checkpoint that it writes (float32, tokenizer, chat template) to one plain question.

    `target` is made if it is not there. Raises NotSane when the answer is empty or lacks `expect`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say("reading the weights")
    where, name = str(source.parent), source.name
    quantised = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    # A fresh model: the one read from GGUF still calls itself quantised, and its checkpoint could not be loaded.
    config = quantised.config
    for stale in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        if hasattr(config, stale):
            delattr(config, stale)
    config.architectures = [type(quantised).__name__]
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.generation_config = quantised.generation_config
    del quantised
    say("writing safetensors")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    say("asking the converted model one question")
    return _check(target, expect)


def _check(checkpoint: Path, expect: str) -> str:
    """Returns the greedy answer of the checkpoint as it lies on disk."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, local_files_only=True, dtype=torch.float32).eval()
    if tokenizer.chat_template is None:
        raise NotSane(f"{checkpoint}: the file has no chat template: it is not a chat model")
    chat = [{"role": "user", "content": PROMPT}]
    ids: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=16, do_sample=False)
    answer = str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
    if not any(letter.isalpha() for letter in answer) or expect.lower() not in answer.lower():
        raise NotSane(f"asked {PROMPT!r}, the converted model said {answer!r}")
    return answer


def say(line: str) -> None:
    """Prints one line of progress at once."""
    print(line, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 when the checkpoint was written and answers sanely, 1 otherwise (reason on stderr)."""
    parser = argparse.ArgumentParser(prog="python -m alignment.convert", description=__doc__)
    parser.add_argument("source", type=Path, help="a .gguf file")
    parser.add_argument("target", type=Path, help="the folder to write")
    parser.add_argument("--expect", default="", help=f"text that the answer to {PROMPT!r} must hold")
    args = parser.parse_args(argv)
    try:
        answer = convert(args.source, args.target, args.expect)
    except ImportError as error:
        print(
            f"{error}: converting needs torch, transformers, accelerate and gguf (pip install 'newel[train]')",
            file=sys.stderr,
        )
        return 1
    except (NotSane, OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    say(f"it said: {answer}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
