"""What a training will take, before it begins: memory, computation and time, from the model's config.json alone.

No weights are loaded. The lengths of the rows are known, so the forward passes are those of the run itself.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from alignment import dataset
from alignment.lora import LoraShape
from alignment.losses import chunk
from alignment.material import Material
from alignment.records import Demonstration, PreferencePair, Rating
from alignment.tokens import Row, Template, schedule, shared

BYTES = 4
"""Of a number that is trained, and of all of them where nothing else is said: float32."""
HALF = 2
"""Of a number in bfloat16."""
NF4 = 0.516
"""Of a weight in nf4: half, and for each 64 of them a scale of 8 bits, which have scales of their own."""
RUNTIME = 300e6
"""Of the interpreter with torch and transformers."""
SLACK = 1.6
"""What adapters take of activations beyond what is kept of them: products of their own, and holes in the heap (Linux,
glibc, measured). With all weights the gradients come into the room that activations leave, which evens it out."""
SHARE = 0.5
"""How much of the speed of one matrix product a training reaches; the rest is norms, attention and memory."""
Speed = Callable[[int, int, int], float]
"""FLOP/s of [rows, width] @ [width, columns], in the recipe's precision."""


class EstimateError(ValueError):
    """A model of which nothing can be said; the message says why."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a decoder of transformers, from its config.json."""

    width: int
    layers: int
    inner: int
    heads: int
    key_heads: int
    head: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, folder: Path) -> Shape:
        """Raises EstimateError where there is no config.json, or one of a model that is not a plain decoder."""
        try:
            found = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise EstimateError(
                f"{folder} has no readable config.json ({error}); `model` is a checkpoint's folder"
            ) from None
        one: Mapping[str, Any] = found.get("text_config", found)
        names = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size")
        if lacking := [name for name in names if name not in one]:
            raise EstimateError(f"{folder}/config.json has no {', '.join(lacking)}: no estimate for such a model")
        heads = one["num_attention_heads"]
        return cls(
            one["hidden_size"], one["num_hidden_layers"], one["intermediate_size"], heads,
            one.get("num_key_value_heads") or heads, one.get("head_dim") or one["hidden_size"] // heads,
            one["vocab_size"], found.get("tie_word_embeddings", one.get("tie_word_embeddings", False)),
        )  # fmt: skip

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of a layer's linear maps."""
        q, k = self.heads * self.head, self.key_heads * self.head
        return {
            "q_proj": (self.width, q), "k_proj": (self.width, k), "v_proj": (self.width, k), "o_proj": (q, self.width),
            "gate_proj": (self.width, self.inner), "up_proj": (self.width, self.inner),
            "down_proj": (self.inner, self.width),
        }  # fmt: skip

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        layer = sum(a * b for a, b in self.linear.values()) + 2 * self.width
        return self.layers * layer + self.width + self.vocabulary * self.width * (1 if self.tied else 2)

    def adapter(self, rank: int, targets: Sequence[str]) -> int:
        """Parameters of an adapter."""
        return self.layers * rank * sum(a + b for name, (a, b) in self.linear.items() if name in targets)

    @property
    def kept(self) -> int:
        """Numbers that a layer keeps of a token for the backward pass.

        Of norms and residuals 5 times the width, of attention 3 times that of all heads and its keys and values, of the
        MLP 4 times its inner width. What torch saves of SmolLM2 is 0.6 % more (all weights), or 9 % less (LoRA).
        """
        return 5 * self.width + 3 * self.heads * self.head + 2 * self.key_heads * self.head + 4 * self.inner


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a training takes. Sizes are in bytes, at their highest; `seconds` are on this machine, evaluation apart.

    parameters, trained: numbers of the model, and of those that change. tokens: of all forward passes that are learnt
    from, with their padding. activations: kept for the backward pass. logits: of a chunk, thrice. cache: keys and
    values of replies that are drawn at once. processes: that the weights are shared out over; sizes are of one of them.
    """

    parameters: int
    trained: int
    updates: int
    tokens: int
    flops: float
    weights: float
    gradients: float
    optimiser: float
    activations: float
    logits: float
    cache: float
    seconds: float
    processes: int = 1

    @property
    def memory(self) -> float:
        """All of it, in bytes, with the interpreter's."""
        parts = (self.weights, self.gradients, self.optimiser, self.activations, self.logits, self.cache)
        return sum(parts) + RUNTIME


def of(method: str, how: Any, rows: Sequence[int], speed: Speed | None = None, processes: int = 1) -> Estimate:
    """What a recipe takes. method: `sft`, `reward`, `ppo`, `dpo` or `kto`; how: its recipe.

    processes: that run it, each on a device of its own; with `shard` they share the weights out.

    rows: lengths in tokens: of a row, of a prompt with both replies, of a prompt for `ppo`. speed: None measures this
    machine for a second. Raises EstimateError.
    """
    if not rows:
        raise EstimateError("there are no rows to train on, so there is nothing to estimate")
    shape = Shape.of(how.model)
    found = _ppo(shape, how, rows) if method == "ppo" else _rows(method, shape, how, rows)
    speed = speed or measured(how.device, how.precision)
    number = BYTES if how.precision == "float32" else HALF
    seconds = found.learnt / (SHARE * speed(found.widest, shape.width, shape.inner))
    if found.drawn:
        seconds += found.drawn / (SHARE * speed(found.replies, shape.width, shape.inner))
    trained = found.adapters + found.whole * shape.parameters
    linear = shape.layers * sum(a * b for a, b in shape.linear.values())
    parts = processes if how.shard else 1
    weights = found.frozen * _weights(shape, how.precision, linear, True, parts) + found.adapters * BYTES
    weights += found.whole * _weights(shape, how.precision, linear, False, parts)
    trained_here = found.adapters + found.whole * shape.parameters / parts
    drawing = shape.parameters * number if found.replies and parts > 1 else 0  # all weights, while replies are drawn
    kept = shape.kept * shape.layers * found.widest * found.trunks * number * (1 if found.whole else SLACK)
    copied = found.merged and how.precision != "nf4"  # the weights without the adapter that is merged meanwhile
    return Estimate(
        shape.parameters, trained, found.updates, found.tokens, found.learnt + found.drawn,
        weights=weights + drawing + (linear * number if copied else 0),
        gradients=trained_here * BYTES,
        optimiser=2 * trained_here * BYTES,
        activations=kept + found.widest * found.longest * (number + 1),  # the mask of rows beside each other
        logits=_logits(shape, min(found.widest, chunk(_device(how.device))), found.whole > 0),
        cache=found.replies * found.longest * shape.layers * 2 * shape.key_heads * shape.head * number,
        seconds=seconds,
        processes=parts,
    )  # fmt: skip


def _weights(shape: Shape, precision: str, linear: int, frozen: bool, parts: int = 1) -> float:
    """Bytes of the base, `linear` of whose parameters are in linear maps of layers.

    In parts: of one of them, and of what is whole at a time: two layers, for the next one is gathered meanwhile, and
    the head.
    """
    if parts > 1:
        number = BYTES if precision == "float32" else HALF
        kept = number if frozen else BYTES
        return (
            shape.parameters * kept / parts + 2 * linear / shape.layers * number + shape.vocabulary * shape.width * kept
        )
    if precision == "float32":
        return float(shape.parameters * BYTES)
    if not frozen:
        return float(shape.parameters * (BYTES + HALF))  # what is trained, and a copy to compute with
    return shape.parameters * HALF if precision == "bfloat16" else linear * NF4 + (shape.parameters - linear) * HALF


def lengths(method: str, how: Any, tell: Callable[[str], object]) -> list[int]:
    """The tokens of each row of a recipe that is trained on, as `of` takes them; only its tokenizer is loaded.

    Raises BadRecords, DatasetError, TemplateError.
    """
    template = Template(AutoTokenizer.from_pretrained(how.model, local_files_only=True))
    files = how.prompts if method == "ppo" else how.data
    learnt = Material[Any].read(files, KINDS.get(method), tell)
    found = learnt.made(lambda one: len(_row(template, one, method, how)))["train"]
    knob = "max_prompt" if method == "ppo" else "max_length"
    return [one.what for one in learnt.fitting(found, getattr(how, knob), knob, int)]


KINDS: Mapping[str, Any] = {"sft": Demonstration, "reward": PreferencePair, "dpo": PreferencePair, "kto": Rating}


def _row(template: Template, record: Any, method: str, how: Any) -> Sequence[int] | Row:
    match record:
        case _ if method == "ppo":
            return template.prompt(dataset.prompt_of(record), record.tools)
        case Demonstration():
            turns = "last" if how.turns == "last" else record.turns
            return template.conversation(record.messages, turns, record.tools, record.after)
        case PreferencePair():
            replies = (template.reply(record.prompt, one, record.tools) for one in (record.chosen, record.rejected))
            return shared(*replies)
    return template.reply(record.prompt, record.completion, record.tools)


@dataclass(frozen=True, slots=True)
class _Work:
    """What is computed. learnt, drawn: FLOPs of whole rows, and of single tokens. widest: tokens of the largest pass.

    adapters: their parameters. whole, frozen: models, all of whose weights are trained, or none. trunks: passes whose
    activations are kept at once. replies: drawn at once; merged: with an adapter made part of the weights meanwhile.
    """

    updates: int
    tokens: int
    learnt: float
    widest: int
    longest: int
    adapters: int
    whole: int = 0
    frozen: int = 1
    trunks: int = 1
    drawn: float = 0.0
    replies: int = 0
    merged: bool = False


def _rows(method: str, shape: Shape, how: Any, rows: Sequence[int]) -> _Work:
    """Of a method that learns from rows: the passes are those of the run."""
    room = how.tokens if getattr(how, "shared", True) else how.tokens // 2
    updates = schedule(rows, how.rows, room, how.epochs, how.seed, getattr(how, "packed", False))
    sizes = [_size(lines, rows) for parts in updates for lines in parts]
    members = getattr(how, "members", 1)
    tokens, adapters = sum(sizes) * members, shape.adapter(how.lora.rank, how.lora.targets) * members if how.lora else 0
    n, backward = shape.parameters, 4 if how.lora else 6
    flops = float(backward * n * tokens + 6 * adapters // members * tokens)
    flops += {"dpo": 2 * n * sum(rows), "kto": 2 * n * (2 * sum(rows) + tokens)}.get(method, 0)
    whole = 0 if how.lora else 1
    return _Work(len(updates), tokens, flops, max(sizes), max(rows), adapters, whole, 1 - whole)


def _size(lines: Sequence[Sequence[int]], rows: Sequence[int]) -> int:
    """Tokens of a pass with its padding."""
    return len(lines) * max(sum(rows[i] for i in line) for line in lines)


def _ppo(shape: Shape, how: Any, rows: Sequence[int]) -> _Work:
    """Of PPO, as if no reply ended before its limit and all reward models had three members."""
    ppo, n = how.ppo, shape.parameters
    replies = ppo.prompts * ppo.samples
    mean, longest = sum(rows) / len(rows) + ppo.limit, max(rows) + ppo.limit
    whole, trunks = (how.lora is None) + (ppo.critic == "model"), 1 if ppo.critic == "shared" else 2
    tokens = int(how.updates * replies * mean)
    scored = 3 * sum(one.kind == "model" for one in how.rewards) + (3 if how.held_out else 0)
    each = 2 * n * (trunks + 1 + scored) + (4 * trunks + 2 * whole) * n * ppo.epochs
    local = how.engine == "local"  # a server's memory and time are its own
    prompts = 2 * n * how.updates * ppo.prompts * sum(rows) / len(rows) if local else 0
    lora = how.lora or LoraShape()
    adapters = (trunks - whole) * shape.adapter(lora.rank, lora.targets) if trunks > whole else 0
    at_once = min(replies, how.batch) if local else 0
    widest = max(longest, min(ppo.tokens, int(replies * mean)))
    drawn = 2 * n * how.updates * replies * ppo.limit if local else 0
    return _Work(
        how.updates, tokens, each * tokens + prompts, widest, longest, adapters, whole, 1, trunks, drawn, at_once,
        local and how.lora is not None,
    )  # fmt: skip


def _logits(shape: Shape, tokens: int, full: bool) -> float:
    """Of a chunk: scores, their exponents and a product; where the head learns, its gradient twice besides."""
    head = shape.vocabulary * shape.width * BYTES
    return 3 * tokens * shape.vocabulary * BYTES + (2 * head if full else 0)


def _device(name: str) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def measured(device: str = "", precision: str = "float32", seconds: float = 0.3) -> Speed:
    """How fast this machine multiplies matrices: the best of some products in so many seconds, for each shape."""
    where = _device(device)
    dtype = torch.float32 if precision == "float32" else torch.bfloat16

    def speed(rows: int, width: int, columns: int) -> float:
        a, b = (torch.randn(x, y, device=where, dtype=dtype) for x, y in ((rows, width), (width, columns)))
        best, began = float("inf"), time.perf_counter()
        while time.perf_counter() - began < seconds:
            start = time.perf_counter()
            (a @ b)[0, 0].item()  # waits until it is there
            best = min(best, time.perf_counter() - start)
        return 2 * rows * width * columns / best

    return speed


def told(one: Estimate, free: float | None = None) -> str:
    """An estimate in a few lines; with what to lower where it is more than what is free, in bytes (None: asks)."""
    free = _free() if free is None else free
    parts = {
        "weights": one.weights, "gradients": one.gradients, "optimiser": one.optimiser,
        "activations": one.activations, "logits": one.logits, "cache": one.cache,
    }  # fmt: skip
    listed = ", ".join(f"{name} {_gigabytes(size)}" for name, size in parts.items() if size)
    each = f" in each of {one.processes} processes" if one.processes > 1 else ""
    lines = [
        f"model        {one.parameters / 1e6:,.1f} million parameters; {one.trained / 1e6:,.1f} million are trained",
        f"updates      {one.updates:,} with {one.tokens:,} tokens in all",
        f"computation  {one.flops:.2g} FLOP, about {_lasting(one.seconds)} on this machine",
        f"memory       {_gigabytes(one.memory)} GB{each}: {listed}",
    ]
    if one.memory > free:
        lines.append(
            f"             this machine has {_gigabytes(free)} GB free: lower `tokens`, then `max_length`, or train "
            "with `lora`, or in less `precision`"
        )
    return "\n".join(lines)


def _free() -> float:
    """Bytes that are free, of the GPU where there is one."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return float(found[0] if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}" if size < 9.95e9 else f"{size / 1e9:,.0f}"


def _lasting(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
