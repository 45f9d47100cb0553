"""Decoding many sequences at once on a CPU: packed weights, one cache slot per sequence, one forward pass per step.

A step is one flat row of tokens: the next token of every sequence that is writing, and a chunk of the prompt of those
that are being read. Attention runs per sequence over its own slot, so nothing is padded or masked across sequences, and
a sequence gets the same numbers alone and in company (bit by bit where oneDNN packs the weights, as on x86; to rounding
elsewhere).
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "newel_slots"
# Prompt tokens read in one step: what writing sequences wait for a newcomer at most (0.2 s for 135M on 2 cores).
CHUNK = 128
# Shorter common beginnings are not worth copying from a slot that is in use.
WORTH_COPYING = 16


class Unsupported(Exception):
    """This model cannot run on the embedded engine; the message says why. vLLM can run it."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens of one sequence: `ids` go to columns `start`, `start + 1`, ... of `slot`."""

    slot: int
    start: int
    ids: list[int]


@dataclass(slots=True)
class Slot:
    """One row of the cache: whose tokens lie in it, and whether a sequence is using it."""

    ids: list[int] = field(default_factory=list)
    salt: str = ""
    busy: bool = False
    used: int = 0


class PackedLinear(nn.Module):
    """A linear layer with weights in oneDNN's blocked order: measured 1.4 times as fast for 1 token, 2.4 for 4."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features = linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 8)
        self.bias = cast(torch.Tensor | None, linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x W^T + b; x is [..., in_features]."""
        flat = x.reshape(-1, x.shape[-1])
        # A single row takes another kernel with other rounding; as one of two it gets the numbers of any batch.
        rows = flat if flat.shape[0] > 1 else flat.expand(2, -1).contiguous()
        out = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        return cast(torch.Tensor, out[: flat.shape[0]].view(*x.shape[:-1], self.out_features))


def pack(model: nn.Module) -> bool:
    """Replaces every linear layer by a packed one; returns whether this machine can (one is compared first)."""
    layers = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    try:
        first = layers[0][2]
        probe = torch.randn(3, first.in_features, dtype=first.weight.dtype)
        if not torch.allclose(PackedLinear(first)(probe), first(probe), rtol=1e-2, atol=1e-2):
            return False
    except (RuntimeError, NotImplementedError, AttributeError, IndexError):
        return False
    for parent, name, child in layers:
        setattr(parent, name, PackedLinear(child))
    return True


def attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: object, **extra: Any
) -> tuple[torch.Tensor, None]:
    """Returns the attention output [1, tokens, heads, dim] of a flat step; the others are [1, heads, tokens, dim].

    transformers calls it in every layer, for the name in ATTENTION.
    """
    decoder = extra.get("decoder")
    if not isinstance(decoder, Decoder) or extra.get("softcap") or extra.get("s_aux") is not None:
        raise Unsupported(
            "its attention has a form (soft cap, sinks or hidden arguments) that the embedded engine lacks"
        )
    scale = extra.get("scaling")
    layer = cast(int, module.layer_idx)
    out = torch.empty_like(query)
    at = 0
    for segment in decoder.segments:
        n = len(segment.ids)
        keys, values = decoder.write(layer, segment, key[0, :, at : at + n], value[0, :, at : at + n])
        asked = query[:, :, at : at + n]
        if n == 1:
            # The query heads of one key head become its "tokens": no key is copied, no mask is needed.
            grouped = asked.view(1, keys.shape[1], -1, asked.shape[-1])
            out[:, :, at] = F.scaled_dot_product_attention(grouped, keys, values, scale=scale).view(
                1, -1, values.shape[-1]
            )
        else:
            mask = torch.ones(n, keys.shape[2], dtype=torch.bool).tril(segment.start)
            out[:, :, at : at + n] = F.scaled_dot_product_attention(
                asked, keys, values, attn_mask=mask, scale=scale, enable_gqa=asked.shape[1] != keys.shape[1]
            )
        at += n
    return out.transpose(1, 2).contiguous(), None


class Decoder:
    """The model, its tokenizer and the cache. Not thread-safe: one thread steps it."""

    def __init__(self, path: Path, *, slots: int = 8, context: int = 8192, dtype: torch.dtype = torch.float32) -> None:
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
        self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        if self.tokenizer.chat_template is None:
            raise Unsupported(f"{path}: it has no chat template, so it is not a chat model")
        self.model = AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, dtype=dtype, attn_implementation=ATTENTION
        ).eval()
        self.context = _context(self.model.config.get_text_config(), context)
        self.packed = pack(self.model)
        self.slots = [Slot() for _ in range(slots)]
        self.segments: list[Segment] = []
        self.eos = _eos(self.model, self.tokenizer)
        self.usual = _usual(self.model)
        self._clock = 0
        self._cache: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._allocate(dtype)
        self.step([Segment(0, 0, [0, 0])])  # an unsupported model says so now, not at the first request
        self.slots[0].ids = []

    def _allocate(self, dtype: torch.dtype) -> None:
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (len(self.slots), heads, self.context, dim)
        size = math.prod(shape) * dtype.itemsize
        for _ in range(config.num_hidden_layers):
            k, v = (torch.frombuffer(_pages(size), dtype=dtype).view(shape) for _ in "kv")
            self._cache.append((k, v))

    def write(
        self, layer: int, segment: Segment, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new keys and values [heads, tokens, dim]; returns all of that slot, [1, heads, columns, dim]."""
        keys, values = self._cache[layer]
        end = segment.start + len(segment.ids)
        keys[segment.slot, :, segment.start : end] = key
        values[segment.slot, :, segment.start : end] = value
        one = slice(segment.slot, segment.slot + 1)
        return keys[one, :, :end], values[one, :, :end]

    @torch.inference_mode()
    def step(self, segments: list[Segment]) -> torch.Tensor:
        """Returns the logits after the last token of each segment, [segments, vocabulary] in float32."""
        self.segments = segments
        flat = [token for s in segments for token in s.ids]
        places = [s.start + i for s in segments for i in range(len(s.ids))]
        last = [end - 1 for end in accumulate(len(s.ids) for s in segments)]
        out = self.model(
            input_ids=torch.tensor([flat]),
            position_ids=torch.tensor([places]),
            use_cache=False,
            logits_to_keep=torch.tensor(last),
            decoder=self,
        )
        for s in segments:
            self.slots[s.slot].ids[s.start :] = s.ids
        return cast(torch.Tensor, out.logits[0].float())

    @torch.inference_mode()
    def claim(self, prompt: list[int], salt: str = "") -> tuple[int, int]:
        """Returns a free slot for a new sequence, and how many of its first tokens already lie there.

        What earlier sequences left is used again: of the same `salt` only, for how long an answer takes tells whether
        its beginning was cached. Raises StopIteration when no slot is free.
        """
        # The last token is always computed: its logits are wanted.
        common = [_common(slot.ids, prompt[:-1]) if slot.salt == salt else 0 for slot in self.slots]
        free = [i for i, slot in enumerate(self.slots) if not slot.busy]
        best = max(range(len(common)), key=common.__getitem__)
        mine = max(free, key=lambda i: (common[i], -self.slots[i].used), default=None)
        if mine is None:
            raise StopIteration
        if common[best] - common[mine] >= WORTH_COPYING:
            mine = min(free, key=lambda i: self.slots[i].used)
            for keys, values in self._cache:
                keys[mine, :, : common[best]] = keys[best, :, : common[best]]
                values[mine, :, : common[best]] = values[best, :, : common[best]]
            common[mine] = common[best]
        self._clock += 1
        self.slots[mine] = Slot(prompt[: common[mine]], salt, True, self._clock)
        return mine, common[mine]

    def release(self, slot: int, forget: bool = False) -> None:
        """Frees a slot; its tokens stay for a sequence that begins alike, unless they are to be forgotten."""
        self.slots[slot].busy = False
        if forget:
            self.slots[slot].ids = []


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen: temperature 0 takes the most likely; `top` asks for so many log-probabilities."""

    temperature: float = 1.0
    top_p: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    seed: int | None = None
    top: int | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """A token, the natural logarithm of its probability before temperature, and the most likely ones in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Draws one sequence's tokens; with a seed it draws the same ones in whatever company the sequence runs."""

    def __init__(self, sampling: Sampling) -> None:
        self._how = sampling
        self._counts: dict[int, int] = {}
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed % 2**63)

    @torch.inference_mode()
    def draw(self, logits: torch.Tensor) -> Scored:
        """Returns the next token for logits [vocabulary]."""
        token = self._choose(self._penalised(logits))
        self._counts[token] = self._counts.get(token, 0) + 1
        if self._how.top is None:
            return Scored(token, 0.0)
        scores = torch.log_softmax(logits, -1)
        best = torch.topk(scores, min(self._how.top, scores.shape[-1]))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Scored(token, float(scores[token]), top)

    def _penalised(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._counts or not (self._how.presence or self._how.frequency):
            return logits
        ids = torch.tensor(list(self._counts))
        counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype)
        return logits.index_add(0, ids, -(self._how.presence + self._how.frequency * counts))

    def _choose(self, logits: torch.Tensor) -> int:
        if self._how.temperature < 1e-5:
            return int(logits.argmax())
        chances = torch.softmax(logits / self._how.temperature, -1)
        if self._how.top_p >= 1.0:
            return int(torch.multinomial(chances, 1, generator=self._random))
        ordered, ids = chances.sort(descending=True)
        # Kept: every token before which less than top_p of the chances was gathered (so always the first).
        kept = torch.where(ordered.cumsum(-1) - ordered < self._how.top_p, ordered, 0.0)
        kept[0] = ordered[0]
        return int(ids[torch.multinomial(kept, 1, generator=self._random)])


def _pages(size: int) -> mmap.mmap:
    """Returns zeroed memory that takes up room only where it is written: the cache is as large as the texts in it."""
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # with huge pages one token would take 2 MB in every head of every layer
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages


def _common(a: list[int], b: list[int]) -> int:
    """Returns the length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _context(config: Any, wanted: int) -> int:
    """Returns the longest sequence in tokens. Raises Unsupported for layers that are not plain attention."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        raise Unsupported(
            f"it has layers of the kinds {', '.join(sorted(kinds))}; the embedded engine knows plain attention only"
        )
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds or (window and not getattr(config, "layer_types", None))
    limits = [
        wanted,
        getattr(config, "max_position_embeddings", None) or wanted,
        window if slides and window else wanted,
    ]
    return int(min(limits))


def _usual(model: Any) -> tuple[float, float]:
    """Returns (temperature, top_p) as the checkpoint's own generation_config.json says, each 1 where it does not."""
    config = model.generation_config
    return float(getattr(config, "temperature", None) or 1.0), float(getattr(config, "top_p", None) or 1.0)


def _eos(model: Any, tokenizer: Any) -> frozenset[int]:
    """Returns the tokens that end a reply."""
    named = model.generation_config.eos_token_id
    found = [named] if isinstance(named, int) else list(named or [])
    return frozenset([*found, tokenizer.eos_token_id]) - {None}
