"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): several named ones on one base, of which one at most is on.

One base serves as policy, reference, reward model and critic: the reference is the base with no adapter on. What is
saved is PEFT's format, which transformers and vLLM load.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from alignment import shard

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class LoraShape:
    """rank, alpha: the adapter adds alpha / rank * B A x. targets: names of the linear layers that get one."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = LINEAR

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


class _Switch:
    """Which adapter of a model is on."""

    def __init__(self) -> None:
        self.name: str | None = None


class LoraLinear(nn.Module):
    """A linear layer with adapters beside it: A is [rank, in], B is [out, rank], 0 at first.

    Adapters are kept in float32, so that small steps are not lost, and computed in what the model computes in.
    """

    def __init__(self, base: nn.Linear, switch: _Switch):
        super().__init__()
        self.base, self.switch = base, switch
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        self.scales: dict[str, float] = {}

    def add(self, name: str, shape: LoraShape) -> None:
        """Adds an adapter that does nothing yet."""
        like = torch.empty(0, device=self.base.weight.device)
        a = like.new_empty(shape.rank, self.base.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.a[name], self.scales[name] = nn.Parameter(a), shape.scale
        self.b[name] = nn.Parameter(like.new_zeros(self.base.out_features, shape.rank))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        out: Tensor = self.base(x)
        name = self.switch.name
        if name is None or name not in self.scales:
            return out
        low = F.linear(x, self.a[name].to(x.dtype)) * self.scales[name]
        whole = torch.addmm(out.flatten(0, -2), low.flatten(0, -2), self.b[name].to(x.dtype).T)
        return whole.view_as(out)

    def delta(self, name: str) -> Tensor:
        """What the adapter adds to the weight, [out, in]."""
        delta: Tensor = (self.b[name] @ self.a[name]) * self.scales[name]
        return delta


class Adapters:
    """The adapters of a model, whose linear layers it wraps; the base's own weights are frozen then."""

    def __init__(self, model: nn.Module):
        self._model, self._switch = model, _Switch()
        self.layers: dict[str, LoraLinear] = {}
        self.shapes: dict[str, LoraShape] = {}
        self._places: list[tuple[nn.Module, str, LoraLinear]] = []
        model.requires_grad_(False)

    def add(self, name: str, shape: LoraShape) -> list[nn.Parameter]:
        """The parameters of a new adapter; raises ValueError when the model has no such layers."""
        self._wrap(shape.targets)
        mine = [layer for path, layer in self.layers.items() if path.rpartition(".")[2] in shape.targets]
        if not mine:
            raise ValueError(
                f"the model has none of the layers {', '.join(shape.targets)}; name its own in `lora.targets`"
            )
        for layer in mine:
            layer.add(name, shape)
        self.shapes[name] = shape
        return self.parameters(name)

    def _wrap(self, targets: Sequence[str]) -> None:
        """Puts layers of these names, where they are not yet wrapped, behind places for adapters."""
        for path, parent in list(self._model.named_modules()):
            for name, child in list(parent.named_children()):
                if name in targets and isinstance(child, nn.Linear):
                    layer = LoraLinear(child, self._switch)
                    setattr(parent, name, layer)
                    self._places.append((parent, name, layer))
                    self.layers[f"{path}.{name}".lstrip(".")] = layer

    def drop(self, name: str) -> None:
        """Takes an adapter away."""
        self.shapes.pop(name, None)
        for layer in self.layers.values():
            if layer.scales.pop(name, None) is not None:
                del layer.a[name], layer.b[name]

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters of an adapter, in the order of the layers."""
        return [one for layer in self.layers.values() if name in layer.scales for one in (layer.a[name], layer.b[name])]

    def copy(self, source: str, target: str) -> None:
        """Gives an adapter the weights of another of the same shape."""
        with torch.no_grad():
            for mine, theirs in zip(self.parameters(target), self.parameters(source), strict=True):
                mine.copy_(theirs)

    @contextmanager
    def on(self, name: str | None) -> Iterator[None]:
        """Within it this adapter is on, or none."""
        before, self._switch.name = self._switch.name, name
        try:
            yield
        finally:
            self._switch.name = before

    @contextmanager
    def merged(self, name: str) -> Iterator[None]:
        """Within it the adapter is part of the weights; after it the weights are what they were, to the bit.

        Adding and taking away again would not bring them back, so a copy is kept.
        """
        kept = {layer: layer.base.weight.detach().clone() for layer in self.layers.values() if name in layer.scales}
        try:
            with torch.no_grad():
                for layer, weight in kept.items():
                    layer.base.weight.copy_(weight.float() + layer.delta(name))
            with self.on(None):
                yield
        finally:
            with torch.no_grad():
                for layer, weight in kept.items():
                    layer.base.weight.copy_(weight)

    def absorb(self, name: str) -> None:
        """Makes an adapter a part of the weights for good, and takes all adapters away."""
        with torch.no_grad():
            for layer in self.layers.values():
                if name in layer.scales:
                    layer.base.weight += shard.like(layer.delta(name).to(layer.base.weight.dtype), layer.base.weight)
        for parent, path, layer in self._places:
            setattr(parent, path, layer.base)

    @contextmanager
    def unwrapped(self) -> Iterator[None]:
        """Within it the model has its own linear layers again, so that it is saved as if there were no adapters."""
        for parent, name, layer in self._places:
            setattr(parent, name, layer.base)
        try:
            yield
        finally:
            for parent, name, layer in self._places:
                setattr(parent, name, layer)

    def weights(self, name: str) -> dict[str, Tensor]:
        """The adapter's tensors under the names that PEFT gives them."""
        return {
            f"base_model.model.{path}.lora_{letter}.weight": part[name].detach()
            for path, layer in self.layers.items()
            if name in layer.scales
            for letter, part in (("A", layer.a), ("B", layer.b))
        }

    def load(self, name: str, folder: Path) -> None:
        """Gives a new adapter the weights in a PEFT folder; raises ValueError when they fit other layers."""
        config = json.loads((folder / CONFIG).read_text())
        self.add(name, LoraShape(config["r"], config["lora_alpha"], tuple(config["target_modules"])))
        try:
            self.load_weights(name, load_file(folder / WEIGHTS))
        except ValueError:
            self.drop(name)
            raise

    def load_weights(self, name: str, weights: dict[str, Tensor]) -> None:
        """Gives an adapter the tensors of these names; raises ValueError when they are others."""
        mine = self.weights(name)
        if wrong := sorted(mine.keys() ^ weights.keys()):
            raise ValueError(f"the adapter does not fit this model: {len(wrong)} tensors differ, such as {wrong[0]}")
        if wrong := [key for key, tensor in mine.items() if tensor.shape != weights[key].shape]:
            shapes = f"{tuple(weights[wrong[0]].shape)} in place of {tuple(mine[wrong[0]].shape)}"
            raise ValueError(f"the adapter does not fit this model: {wrong[0]} is {shapes}")
        for key, tensor in mine.items():
            tensor.copy_(weights[key])

    def save(self, name: str, folder: Path, base: str) -> None:
        """Writes the adapter as PEFT does; base: the name or the folder of the model that it was trained on."""
        folder.mkdir(parents=True, exist_ok=True)
        shape = self.shapes[name]
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": shape.rank,
            "lora_alpha": shape.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted(shape.targets),
            "inference_mode": True,
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file({key: tensor.contiguous() for key, tensor in self.weights(name).items()}, folder / WEIGHTS)
