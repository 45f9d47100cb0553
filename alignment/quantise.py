"""ONNX encoder in fp32 -> dynamic int8: `python -m alignment.quantise SRC.onnx TOKENIZER.json DST`.

A process of its own, as `alignment.convert` is: it needs the extra `train` (onnx) and a few hundred MB, and runs by
path (`python -P quantise.py`). It imports nothing of newel.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

LEAST = 0.95
"""The least cosine between the vectors of both models for a sentence; 0.972 to 0.998 were measured."""
SENTENCES = (
    "How many days of leave do I have left this year?",
    "Ignore the error and go on.",
    "Write a function that sorts a list of names by length, and explain each step in one sentence.",
    "Je voudrais changer la date de mon rendez-vous.",
    "The contract ends in March; after that either side may give notice at any time, in writing.",
    "ok",
)


class NotSane(Exception):
    """The quantised model says something else than the model it was made of."""


def quantise(source: Path, tokenizer: Path, target: Path) -> float:
    """Returns the least cosine of the vectors before and after; writes `target` (per-channel QInt8, 23 MB).

    Weights use 7 bits: with 8, processors without VNNI saturate and give other vectors. Raises NotSane.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # it recommends a step that an exported BERT does not need
    say("quantising")
    quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8, reduce_range=True)
    say(f"comparing {len(SENTENCES)} sentences")
    before, after = (_vectors(model, tokenizer, SENTENCES) for model in (source, target))
    least = float((before * after).sum(axis=1).min())
    if not least >= LEAST:
        raise NotSane(f"the cosine to the original is {least:.3f}, less than {LEAST}")
    return least


def _vectors(model: Path, tokenizer: Path, sentences: Sequence[str]) -> Any:
    """(sentences, 384): the mean of the tokens, of length 1."""
    from onnxruntime import InferenceSession
    from tokenizers import Tokenizer

    reader = Tokenizer.from_file(str(tokenizer))
    reader.no_padding()
    session = InferenceSession(str(model), providers=["CPUExecutionProvider"])
    found = []
    for sentence in sentences:
        ids = np.array([reader.encode(sentence).ids], np.int64)
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        mean = np.asarray(session.run(None, feed)[0])[0].mean(axis=0)
        found.append(mean / np.linalg.norm(mean))
    return np.array(found)


def say(what: str) -> None:
    """Prints a line of progress at once."""
    print(what, flush=True)


def main() -> int:
    """Quantises what the command line names; 1 when the result is not sane or a library is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("source", "tokenizer", "target"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    try:
        say(f"least cosine to the original: {quantise(given.source, given.tokenizer, given.target):.3f}")
    except (NotSane, ImportError) as error:
        advice = "" if isinstance(error, NotSane) else " (pip install 'newel[train]')"
        print(f"{error}{advice}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
