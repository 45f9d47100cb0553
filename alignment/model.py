"""A causal language model with adapters and scalar heads on one base: policy, reference, reward model and critic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from alignment.lora import Adapters, LoraShape
from alignment.losses import logprobs_of
from alignment.tokens import Batch, Template

transformers.logging.disable_progress_bar()  # a run tells itself how far it is

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

    def __init__(self, base: Any, tokenizer: Any, name: str = "", dtype: torch.dtype | None = None):
        """dtype: what it computes in, None for that of its weights.

        Raises ModelError for a model whose log-probabilities would be computed wrongly.
        """
        config = base.config.get_text_config()
        if bent := [one for one in BENDING if getattr(config, one, None) not in (None, 1, 1.0)]:
            raise ModelError(
                f"{name or type(base).__name__}: its logits are changed by {', '.join(bent)}; not supported"
            )
        self.base, self.name, self.dtype = base.eval(), name, dtype or base.dtype
        self.template = Template(tokenizer, end=_ends(base, tokenizer))
        self.adapters: Adapters | None = None
        self.heads = nn.ModuleDict()
        for module in base.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
            if _is_quantised(module):
                module.train()  # in eval mode bitsandbytes repacks the weights for a product without a gradient

    @classmethod
    def load(
        cls, folder: Path | str, device: str = "cpu", precision: Precision = "float32", frozen: bool = True
    ) -> Model:
        """The model in a checkpoint folder, with its tokenizer.

        frozen: its own weights are not trained, and so need not be float32. Raises ModelError, OSError when there is
        none.
        """
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        dtype = torch.float32 if precision == "float32" else torch.bfloat16
        how: dict[str, Any] = {"dtype": dtype if frozen else torch.float32}
        if precision == "nf4":
            if not frozen:
                raise ModelError('precision = "nf4" trains adapters on a frozen base: give the recipe a table [lora]')
            how |= {"quantization_config": _nf4(), "device_map": {"": device}}
        base = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, attn_implementation="sdpa", **how)
        return cls(base if precision == "nf4" else base.to(device), tokenizer, str(folder), dtype)

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
        """The head's weight, [V, D], in what the model computes in."""
        return cast(Tensor, self.base.get_output_embeddings().weight.to(self.dtype))

    @property
    def quantised(self) -> bool:
        """True where the base's weights are less than what they stand for, and cannot be changed."""
        return any(map(_is_quantised, self.base.modules()))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The base's parameters by name, in order, without adapters; of a quantised base those in its checkpoint."""
        if not self.quantised:
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

    def head(self, name: str, outputs: int = 1) -> list[nn.Parameter]:
        """The parameters of a new scalar head, N(0, 1 / sqrt(D + 1)) as in "The N+ Implementation Details", bias 0."""
        width = self.unembedding.shape[1]
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
