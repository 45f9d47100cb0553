"""A causal language model with adapters and scalar heads on one base: policy, reference, reward model and critic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from alignment import shard
from alignment.lora import Adapters, LoraShape
from alignment.losses import logprobs_of
from alignment.tokens import Batch, Template

transformers.logging.disable_progress_bar()  # a run tells itself how far it is

T = TypeVar("T")
Precision = Literal["float32", "bfloat16", "nf4"]
"""What a model computes in. `bfloat16`: half the memory and, on hardware that has it, two to five times the speed; what
is trained is float32 all the same. `nf4`: a frozen base besides in 4 bits a weight (QLoRA, arXiv:2305.14314)."""
BENDING = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Settings of models whose logits are not plainly head times state; 1 and None leave them so."""


class ModelError(ValueError):
    """A model that the trainers cannot work with; the message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a model says of the tokens of a batch, each [B, T], in float32, 0 where there is nothing to say.

    logprobs: of the trained tokens, nats. entropy: before each of them, nats, without a gradient.
    """

    logprobs: Tensor
    entropy: Tensor


class Model:
    """A model and its chat template. Adapters are named; the base itself is None.

    Dropout is off for good: a policy that differs each time it is asked has no ratio to what it was.
    """

    def __init__(
        self,
        base: Any,
        tokenizer: Any,
        name: str = "",
        dtype: torch.dtype | None = None,
        mesh: DeviceMesh | None = None,
    ):
        """dtype: what it computes in, None for that of its weights. mesh: the processes that its weights are shared
        out over, None where each has all.

        Raises ModelError for a model whose log-probabilities would be computed wrongly.
        """
        config = base.config.get_text_config()
        if bent := [one for one in BENDING if getattr(config, one, None) not in (None, 1, 1.0)]:
            raise ModelError(
                f"{name or type(base).__name__}: its logits are changed by {', '.join(bent)}; not supported"
            )
        self.base, self.name, self.dtype, self.mesh = base.eval(), name, dtype or base.dtype, mesh
        self.template = Template(tokenizer, end=_ends(base, tokenizer))
        self.adapters: Adapters | None = None
        self.heads = nn.ModuleDict()
        self._tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
        for module in base.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
            if _is_quantised(module):
                module.train()  # in eval mode bitsandbytes repacks the weights for a product without a gradient

    @classmethod
    def load(
        cls,
        folder: Path | str,
        device: str = "cpu",
        precision: Precision = "float32",
        frozen: bool = True,
        mesh: DeviceMesh | None = None,
    ) -> Model:
        """The model in a checkpoint folder, with its tokenizer.

        frozen: its own weights are not trained, and so need not be float32. mesh: processes that share its weights out,
        each on its device of the mesh. Raises ModelError, OSError when there is none.
        """
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        dtype = torch.float32 if precision == "float32" else torch.bfloat16
        how: dict[str, Any] = {"dtype": dtype if frozen else torch.float32}
        if precision == "nf4":
            if not frozen:
                raise ModelError('precision = "nf4" trains adapters on a frozen base: give the recipe a table [lora]')
            if mesh is not None:
                raise ModelError('shard = true: a base in nf4 cannot be shared out; take precision = "bfloat16"')
            how |= {"quantization_config": _nf4(), "device_map": {"": device}}
        how |= {"local_files_only": True, "attn_implementation": "sdpa"}
        with shard.in_turn(mesh):
            base = AutoModelForCausalLM.from_pretrained(folder, **how)
            if mesh is not None:
                shard.split(base, mesh, dtype)
            elif precision != "nf4":
                base.to(device)
        return cls(base, tokenizer, str(folder), dtype, mesh)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return cast(torch.device, self.base.device)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self.template.tokenizer

    @property
    def unembedding(self) -> Tensor:
        """The head's weight, [V, D], in what the model computes in; of a sharded model each time gathered anew."""
        weight = (self.base.get_input_embeddings() if self._tied else self.base.get_output_embeddings()).weight
        return shard.full(weight).to(self.dtype)

    @property
    def quantised(self) -> bool:
        """True where the base's weights are less than what they stand for, and cannot be changed."""
        return any(map(_is_quantised, self.base.modules()))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The base's parameters by name, in order, without adapters; of a quantised or sharded base those in its
        checkpoint, which are not trained."""
        if not self.quantised and self.mesh is None:
            with self.adapters.unwrapped() if self.adapters else self.on(None):
                yield from sorted((name, one.detach()) for name, one in self.base.named_parameters())
            return
        files: list[Any] = [safe_open(path, "pt") for path in Path(self.name).glob("*.safetensors")]
        places = sorted((name, k) for k, file in enumerate(files) for name in list(file.keys()))
        for name, k in places:
            yield name, files[k].get_tensor(name)

    def adapt(self, name: str, shape: LoraShape) -> list[nn.Parameter]:
        """The parameters of a new adapter, which changes nothing yet; from now on the base is frozen."""
        if self.adapters is None:
            self.adapters = Adapters(self.base)
        return self.adapters.add(name, shape)

    def absorb(self, name: str) -> None:
        """Makes an adapter a part of the model's own weights for good, and takes all adapters away."""
        if self.adapters is not None:
            self.adapters.absorb(name)
            self.adapters = None

    def head(self, name: str, outputs: int = 1, times: int = 1) -> list[nn.Parameter]:
        """The parameters of a new scalar head, N(0, 1 / sqrt(D + 1)) as in "The N+ Implementation Details", bias 0.

        times: the states that it reads beside each other.
        """
        width = self.base.get_output_embeddings().weight.shape[1] * times
        made = nn.Linear(width, outputs, device=self.device)
        nn.init.normal_(made.weight, std=(width + 1) ** -0.5)
        nn.init.zeros_(made.bias)
        self.heads[name] = made
        return list(made.parameters())

    @contextmanager
    def on(self, adapter: str | None) -> Iterator[None]:
        """Within it the model speaks with this adapter, or as the base."""
        if self.adapters is None:
            if adapter is not None:
                raise ModelError(f"there is no adapter {adapter}")
            yield
        else:
            with self.adapters.on(adapter):
                yield

    def whole(self) -> AbstractContextManager[None]:
        """Within it each process has all weights, for passes that others do not make too, without a gradient."""
        return nullcontext() if self.mesh is None else shard.whole(self.base)

    def even(self, items: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """The items, with True; of a sharded model, whose passes all processes make together, then the first ones again
        with False, until the others have had theirs."""
        return shard.even(items, self.mesh)

    def gathered(self, keep: bool) -> Model:
        """This model, or of a sharded one that is trained whole a copy in main memory, where it is to be kept.

        All processes call it; with adapters the base has not changed, so that nothing need be gathered.
        """
        if self.mesh is None or self.adapters is not None:
            return self
        weights = {name: shard.gathered(one, keep) for name, one in self.base.named_parameters()}
        if not keep:
            return self
        made = Model.load(self.name, frozen=False)
        with torch.no_grad():
            for name, one in made.base.named_parameters():
                one.copy_(weights[name])
        return made

    def states(self, batch: Batch, adapter: str | None = None) -> Tensor:
        """The last hidden states, [B, T, D]."""
        mixed = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != self.base.dtype)
        with self.on(adapter), mixed:
            out = self.base.base_model(
                input_ids=batch.ids, attention_mask=batch.allowed, position_ids=batch.positions, use_cache=False
            )
        return cast(Tensor, out.last_hidden_state).to(self.dtype)

    def told(self, batch: Batch, states: Tensor, temperature: float = 1.0) -> Told:
        """What the model says of the trained tokens, from its hidden states: logits are computed for those alone."""
        line, column = batch.trained.nonzero(as_tuple=True)
        chosen = states[line, batch.before[line, column]]
        logprobs, entropy = logprobs_of(chosen, self.unembedding, batch.ids[line, column], temperature)
        empty = torch.zeros(batch.ids.shape, device=states.device)
        return Told(empty.index_put((line, column), logprobs), empty.index_put((line, column), entropy))

    def values(self, states: Tensor, head: str) -> Tensor:
        """A head's value after every token, [B, T] in float32; [B, T, outputs] where it has several."""
        out: Tensor = self.heads[head](states.float())
        return out[..., 0] if out.shape[-1] == 1 else out


def _is_quantised(module: nn.Module) -> bool:
    return hasattr(module, "quant_state")


def _nf4() -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ModelError("precision = \"nf4\" needs bitsandbytes: pip install 'newel[qlora]'") from None
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip


def _ends(base: Any, tokenizer: Any) -> Sequence[int]:
    """The tokens that end a turn, as the checkpoint says; those that only end a document are among them."""
    named = base.generation_config.eos_token_id if base.generation_config else None
    found = [named] if isinstance(named, int) else list(named or [])
    return [one for one in dict.fromkeys([*found, tokenizer.eos_token_id]) if one is not None]
