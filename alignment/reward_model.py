"""A reward model: several members on one frozen base, each an adapter and a head, which score replies.

A member's score of a reply is what its head reads after the reply's last token, or of all its tokens. Where members
differ, none of them is to be believed (Coste et al. 2023, arXiv:2310.02743). A head has one output an objective.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignment.lora import Adapters, LoraShape
from alignment.model import Model, ModelError
from alignment.records import PreferencePair
from alignment.tokens import Batch, Row, batch, plan, shared

NAME = "reward"
Pooling = Literal["last", "mean", "both"]
"""Of which states a score is read: that after a reply's last token, the mean of those after all its tokens, or both."""
WIDTHS: Mapping[str, int] = {"last": 1, "mean": 1, "both": 2}
MANIFEST, HEADS = "reward.json", "heads.safetensors"
PROBE = "Zürich, 3 x 4 = 12?\n\tdef f(): return '…'  END"
"""A text that tokenizers which are not the same cut differently."""


# --- pairs as tokens


@dataclass(frozen=True, slots=True)
class Pair:
    """Two replies to a prompt, the better one first, as rows of tokens. objective: the output that it trains."""

    chosen: Row
    rejected: Row
    objective: int = 0
    margin: float = 0.0
    tie: bool = False
    weight: float = 1.0
    slice: str = ""

    @property
    def both(self) -> Row:
        """Both as one row, with the prompt once."""
        return shared(self.chosen, self.rejected)

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of the two replies."""
        return sum(self.chosen.trained), sum(self.rejected.trained)


def paired(model: Model, record: PreferencePair, objectives: Sequence[str]) -> Pair:
    """A pair's tokens: each reply with the token that ends it, as a policy says it. Raises TemplateError."""
    return Pair(
        model.template.reply(record.prompt, record.chosen, record.tools),
        model.template.reply(record.prompt, record.rejected, record.tools),
        objective_of(record.slice, objectives),
        record.margin,
        record.tie,
        record.weight,
        record.slice,
    )


def objective_of(slice: str, objectives: Sequence[str]) -> int:
    """The number of the objective that a slice is named after, 0 for any other."""
    name = slice.partition("/")[0]
    return objectives.index(name) if name in objectives else 0


# --- the model


class RewardModel:
    """Members on a model's base, each an adapter and a head of the same name; scores are higher for better replies.

    objectives: of the heads' outputs, in order. temperature: sigmoid of a difference of scores by it is the chance that
    the first reply is preferred. tokens: of a forward pass with its padding.
    """

    def __init__(
        self, model: Model, members: Sequence[str], objectives: Sequence[str], temperature: float = 1.0,
        tokens: int = 4096, pooling: Pooling = "last",
    ):  # fmt: skip
        self.model, self.members, self.objectives = model, tuple(members), tuple(objectives)
        self.temperature, self.tokens, self.pooling = temperature, tokens, pooling

    @classmethod
    def new(
        cls, model: Model, members: int, objectives: Sequence[str], shape: LoraShape, seed: int = 0, name: str = NAME,
        tokens: int = 4096, pooling: Pooling = "last",
    ) -> RewardModel:  # fmt: skip
        """One that knows nothing yet; a member begins the same however many others there are."""
        names = [f"{name}-{i}" for i in range(members)]
        for i, one in enumerate(names):
            torch.manual_seed(seed_of(seed, i))
            model.adapt(one, shape)
            model.head(one, len(objectives), WIDTHS[pooling])
        return cls(model, names, objectives, tokens=tokens, pooling=pooling)

    def parameters(self, member: str) -> list[nn.Parameter]:
        """The parameters of a member: of its adapter and of its head."""
        return [*self.adapters.parameters(member), *self.model.heads[member].parameters()]

    @property
    def adapters(self) -> Adapters:
        """The base's adapters, the members' among them."""
        if self.model.adapters is None:
            raise ModelError("the model has no adapters, and so no members of a reward model")
        return self.model.adapters

    def read(self, some: Batch, member: str, branches: Sequence[int] = (0,)) -> list[Tensor]:
        """A member's scores of these branches of each row, each [rows, objectives] in float32."""
        states, head = self.model.states(some, member), self.model.heads[member]
        return [head(pooled(states, some, branch, self.pooling)) for branch in branches]

    def compared(self, lines: Sequence[Sequence[Pair]], member: str, once: bool = True) -> tuple[Tensor, Tensor]:
        """A member's scores of (chosen, rejected), each [pairs, objectives]. once: the prompt is computed once."""
        device = self.model.device
        if once:
            chosen, rejected = self.read(
                batch([[one.both for one in line] for line in lines]).to(device), member, (1, 2)
            )
            return chosen, rejected
        apart = [[row] for line in lines for one in line for row in (one.chosen, one.rejected)]
        [found] = self.read(batch(apart).to(device), member)
        return found[::2], found[1::2]

    @torch.no_grad()
    def each(self, rows: Sequence[Row]) -> Tensor:
        """What every member says of every reply, [members, rows, objectives]."""
        found = torch.zeros(len(self.members), len(rows), len(self.objectives), device=self.model.device)
        for lines, _ in self.model.even(plan([len(row) for row in rows], self.tokens, 0)):
            some = batch([[rows[i] for i in line] for line in lines]).to(self.model.device)
            numbers = [i for line in lines for i in line]
            for k, member in enumerate(self.members):
                [found[k, numbers]] = self.read(some, member)
        return found

    def scores(self, rows: Sequence[Row], objective: str | None = None) -> tuple[Tensor, Tensor]:
        """(mean, spread) of the members' scores of replies, each [rows].

        rows: prompt and reply with the token that ends it, or without where it was cut off. objective: None for the
        first. spread: the standard deviation over the members, 0 of a single one. Raises ModelError.
        """
        found = self.each(rows)[..., self._output(objective)]
        return found.mean(0), found.std(0, correction=0)

    def _output(self, objective: str | None) -> int:
        if objective is not None and objective not in self.objectives:
            raise ModelError(f"the reward model knows no objective {objective}, but {', '.join(self.objectives)}")
        return self.objectives.index(objective) if objective else 0

    @torch.no_grad()
    def zero(self, rows: Sequence[Row]) -> None:
        """Sets the biases so that every member's scores of these replies are 0 on average.

        Pairs say nothing of where 0 is; without this members would differ by it, and their spread mean nothing.
        """
        for member, mean in zip(self.members, self.each(rows).mean(1), strict=True):
            cast(nn.Linear, self.model.heads[member]).bias.sub_(mean)

    def save(self, folder: Path) -> Path:
        """The folder: `members/N/` with the adapters as PEFT has them, the heads, and what they belong to."""
        heads: dict[str, Tensor] = {}
        for i, member in enumerate(self.members):
            self.adapters.save(member, folder / "members" / str(i), self.model.name)
            heads |= {
                f"{i}.{name}": one.detach().contiguous() for name, one in self.model.heads[member].named_parameters()
            }
        save_file(heads, folder / HEADS)
        manifest = {
            "base": self.model.name,
            **lineage(self.model),
            "objectives": self.objectives,
            "members": len(self.members),
            "temperature": self.temperature,
            "pooling": self.pooling,
            "shape": asdict(self.adapters.shapes[self.members[0]]),
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        return folder

    @classmethod
    def load(cls, model: Model, folder: Path, name: str = NAME, tokens: int = 4096) -> RewardModel:
        """The reward model in a folder, its members added to a model of the same base as `NAME-0` and so on.

        Raises ModelError where the model has another tokenizer, chat template or weights, or there is no such folder.
        """
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder} holds no reward model: {error}") from None
        _check_lineage(model, manifest, folder)
        heads = load_file(folder / HEADS, device=str(model.device))
        made = cls(
            model, [f"{name}-{i}" for i in range(manifest["members"])], manifest["objectives"],
            manifest["temperature"], tokens, manifest["pooling"],
        )  # fmt: skip
        for i, member in enumerate(made.members):
            _load_adapter(model, member, folder / "members" / str(i))
            model.head(member, len(made.objectives), WIDTHS[made.pooling])
            model.heads[member].load_state_dict({key: heads[f"{i}.{key}"] for key in ("weight", "bias")})
            for one in made.parameters(member):
                one.requires_grad_(False)
        return made


def pooled(states: Tensor, some: Batch, branch: int, how: Pooling) -> Tensor:
    """What a head reads of a branch of each row (0: of the whole row): [rows, D] in float32, or twice D of `both`."""
    line, column = some.last(branch).unbind(-1)
    last = states[line, column].float()
    if how == "last":
        return last
    wanted = some.trained & (some.branches == branch) if branch else some.trained
    line, column = wanted.nonzero(as_tuple=True)
    numbers = some.rows[line, column]
    counts = torch.bincount(numbers, minlength=len(last)).clamp(min=1)
    mean = torch.zeros_like(last).index_add(0, numbers, states[line, column].float()) / counts[:, None]
    return mean if how == "mean" else torch.cat([last, mean], -1)


def _load_adapter(model: Model, name: str, folder: Path) -> None:
    if model.adapters is None:
        model.adapters = Adapters(model.base)
    try:
        model.adapters.load(name, folder)
    except ValueError as error:
        raise ModelError(f"{folder}: {error}") from None


def seed_of(seed: int, member: int) -> int:
    """Of what is random of a member."""
    return seed * 1009 + member


# --- what belongs together


def lineage(model: Model) -> dict[str, str]:
    """Hashes of what scores depend on beside the adapters: tokenizer, chat template and the base's weights.

    Of each weight up to 64 values, in bfloat16: the hash is the same in whatever precision the model is loaded.
    """
    words = model.tokenizer
    said = [sorted(words.get_vocab().items()), words(PROBE, add_special_tokens=False)["input_ids"]]
    weights = hashlib.sha256()
    for name, one in model.weights():
        flat = one.flatten()
        some = flat[:: max(1, len(flat) // 64)][:64].to(torch.bfloat16).float().cpu()
        weights.update(f"{name}{tuple(one.shape)}".encode() + some.numpy().tobytes())
    return {
        "tokenizer": hashlib.sha256(json.dumps(said).encode()).hexdigest(),
        "template": hashlib.sha256(words.chat_template.encode()).hexdigest(),
        "weights": weights.hexdigest(),
    }


def _check_lineage(model: Model, manifest: Mapping[str, Any], folder: Path) -> None:
    mine = lineage(model)
    if differ := [name for name, one in mine.items() if manifest.get(name) != one]:
        raise ModelError(
            f"the reward model in {folder} was trained on {manifest.get('base')}; {model.name} has another "
            f"{' and another '.join(differ)}, so its scores would mean nothing. Start from the model that the reward "
            "model was trained on, or train a reward model on this one."
        )
