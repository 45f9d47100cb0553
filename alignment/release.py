"""What a training leaves: a folder that transformers and vLLM load, with a model card that says how it came to be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from alignment.lora import Adapters
from alignment.model import Model

CARD, PROVENANCE = "README.md", "provenance.json"
ADAPTER = "adapter"
KEPT = ("chat_template.jinja", "generation_config.json", "LICENSE", "NOTICE")
"""Files of the base that go with the weights as they are."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """How a model came to be: by which method from which base and data, with which results.

    data: fingerprints (SHA-256) by file. results: name -> value, or value with its interval.
    """

    method: str
    base: str
    recipe: str
    data: Mapping[str, str] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    licences: Sequence[str] = ()


def write(model: Model, adapter: str | None, folder: Path, provenance: Provenance) -> Path:
    """The folder with the whole model, an adapter merged into it, and the adapter by itself in `adapter/`.

    Tied embeddings stay tied; the chat template and the tokens that end a turn stay what they were. The adapter of a
    quantised base is merged into the weights that the base was made from, in bfloat16.
    """
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    if adapter is not None and model.adapters is not None:
        model.adapters.save(adapter, new / ADAPTER, model.name)
        whole = model if model.mesh is None and not model.quantised else _reloaded(model, adapter)
        with cast(Adapters, whole.adapters).merged(adapter), cast(Adapters, whole.adapters).unwrapped():
            whole.base.save_pretrained(new)
    else:
        model.base.save_pretrained(new)
    model.tokenizer.save_pretrained(new)
    for name in KEPT:
        if (source := Path(model.name) / name).is_file() and not (new / name).is_file():
            shutil.copy(source, new / name)
    (new / PROVENANCE).write_text(json.dumps(_plain(provenance), indent=2, ensure_ascii=False) + "\n")
    (new / CARD).write_text(card(provenance))
    shutil.rmtree(folder, ignore_errors=True)
    new.replace(folder)
    return folder


def _reloaded(model: Model, adapter: str) -> Model:
    """The base as its checkpoint has it, and the adapter: of a quantised or sharded one there is no other whole."""
    half = model.quantised or model.base.dtype == torch.bfloat16
    adapters, whole = (
        cast(Adapters, model.adapters),
        Model.load(model.name, precision="bfloat16" if half else "float32"),
    )
    whole.adapt(adapter, adapters.shapes[adapter])
    cast(Adapters, whole.adapters).load_weights(adapter, {k: v.cpu() for k, v in adapters.weights(adapter).items()})
    return whole


def _plain(provenance: Provenance) -> dict[str, Any]:
    return {
        "method": provenance.method,
        "base": provenance.base,
        "recipe": provenance.recipe,
        "data": dict(provenance.data),
        "results": dict(provenance.results),
        "licences": list(provenance.licences),
    }


def card(provenance: Provenance) -> str:
    """The model card, in Markdown."""
    data = "\n".join(f"- `{name}` (sha256 {digest[:16]})" for name, digest in provenance.data.items()) or "- none"
    results = "\n".join(f"| {name} | {_shown(value)} |" for name, value in provenance.results.items())
    table = f"\n## Measured\n\n| what | value |\n|---|---|\n{results}\n" if results else ""
    licences = "\n".join(f"- {one}" for one in provenance.licences) or "- as the base model's"
    return (
        f"# {provenance.method.upper()} of {Path(provenance.base).name}\n\n"
        f"Made by newel from `{provenance.base}`.\n\n## Data\n\n{data}\n{table}\n## Licences\n\n{licences}\n\n"
        f"## Recipe\n\n```toml\n{provenance.recipe}```\n"
    )


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['value']:.4g} (95 % interval {value['low']:.4g} to {value['high']:.4g}, n = {value['n']})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
