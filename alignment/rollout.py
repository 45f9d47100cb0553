"""Replies drawn from the model that is trained: by our own loop over its cache, or by a vLLM server.

What is drawn stays tokens: a text that is encoded again may be others. The chances of the tokens are computed by the
trainer itself, later; those that the engine used are kept beside them to tell how far the two are apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from alignment.model import Model
from alignment.tokens import Row

SPARE = 0.75
"""Finished rows are taken out of the cache when no more than this share of them is still being written."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What was drawn for one prompt. drawn: ln p of each token as the engine had it, at the temperature of the draw.

    finish: `stop` with the token that ends a turn, which is the last of `ids`, or `length`. version: of the weights.
    """

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    drawn: tuple[float, ...]
    finish: Literal["stop", "length"]
    version: int = 0

    @property
    def row(self) -> Row:
        """Prompt and reply, of which the reply is trained."""
        return Row(self.prompt + self.ids, (False,) * len(self.prompt) + (True,) * len(self.ids))


class Engine(Protocol):
    """What draws replies."""

    def draw(
        self, prompts: Sequence[tuple[int, ...]], samples: int, limit: int, temperature: float, seed: int
    ) -> list[Reply]:
        """`samples` replies of at most `limit` tokens to each prompt, those to one prompt behind each other.

        At temperature 0 the most likely tokens. Nothing else shapes the draw: with top-k or top-p what was drawn would
        have other chances than the trainer says.
        """


class Local:
    """Draws with the model itself: `batch` replies at once, with one cache."""

    def __init__(self, model: Model, adapter: str | None, batch: int = 64):
        self._model, self._adapter, self._batch = model, adapter, batch

    def draw(
        self, prompts: Sequence[tuple[int, ...]], samples: int, limit: int, temperature: float, seed: int
    ) -> list[Reply]:
        """As Engine.draw; the weights are merged meanwhile where they can be, for an adapter beside them is slower.

        Of a sharded model each process has all of them meanwhile, for no two draw replies of the same lengths.
        """
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        each = max(1, self._batch // samples)
        found: dict[int, list[Reply]] = {}
        random = torch.Generator(self._model.device).manual_seed(seed)
        with self._model.whole(), self._merged(), torch.no_grad():
            for at in range(0, len(order), each):
                some = order[at : at + each]
                replies = self._some([prompts[i] for i in some], samples, limit, temperature, random)
                found |= {i: replies[k * samples : (k + 1) * samples] for k, i in enumerate(some)}
        return [reply for i in range(len(prompts)) for reply in found[i]]

    def _merged(self) -> AbstractContextManager[None]:
        model = self._model
        if model.adapters is None or self._adapter is None or model.quantised:
            return model.on(self._adapter)
        return model.adapters.merged(self._adapter)

    def _some(
        self, prompts: Sequence[tuple[int, ...]], samples: int, limit: int, temperature: float, random: torch.Generator
    ) -> list[Reply]:
        model = self._model
        ids, mask = _left_padded(prompts, model.device)
        cache = DynamicCache(config=model.base.config)
        logits = self._step(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
        cache.batch_repeat_interleave(samples)
        logits, mask = logits.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
        said: list[list[int]] = [[] for _ in range(len(prompts) * samples)]
        drawn: list[list[float]] = [[] for _ in said]
        alive = list(range(len(said)))
        for length in range(limit):
            tokens, chances = _drawn(logits, temperature, random)
            for i, token, chance in zip(alive, tokens.tolist(), chances.tolist(), strict=True):
                if not said[i] or said[i][-1] not in model.template.end:
                    said[i].append(token)
                    drawn[i].append(chance)
            going = torch.tensor([said[i][-1] not in model.template.end for i in alive], device=model.device)
            if not going.any() or length == limit - 1:
                break
            if going.float().mean() <= SPARE:
                keep = going.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                alive, tokens, mask = [alive[k] for k in keep.tolist()], tokens[keep], mask[keep]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], -1)
            logits = self._step(tokens[:, None], mask, mask.sum(-1, keepdim=True) - 1, cache)
        return [
            Reply(
                prompts[i // samples], tuple(ids), tuple(chances), "stop" if ids[-1] in model.template.end else "length"
            )
            for i, (ids, chances) in enumerate(zip(said, drawn, strict=True))
        ]

    def _step(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """The logits after the last column, [B, V] in float32."""
        base = self._model.base
        out = base.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        last: Tensor = out.last_hidden_state[:, -1]
        return (last @ self._model.unembedding.T).float()


def _drawn(logits: Tensor, temperature: float, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """(tokens, their ln p), each [B]; at temperature 0 the most likely, whose chances are those of temperature 1."""
    scores = torch.log_softmax(logits / (temperature or 1.0), -1)
    tokens = torch.multinomial(scores.exp(), 1, generator=random)[:, 0] if temperature else scores.argmax(-1)
    return tokens, scores.gather(-1, tokens[:, None])[:, 0]


def _left_padded(prompts: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, mask), each [B, longest], from lengths: the end of all prompts is in the last column."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[prompt[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids.to(device), mask.to(device)
