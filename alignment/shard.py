"""A model's weights shared out over processes (FSDP2): each keeps a part of every weight, and a layer is whole only
while it computes (Rajbhandari et al. 2020, arXiv:1910.02054; Zhao et al. 2023, arXiv:2304.11277).

Adapters and heads are small and stay whole in every process. What is computed is what one process would compute, to
rounding: gradients are added up and not averaged, and all processes make the same number of passes, for every pass is a
meeting of all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

T = TypeVar("T")


def split(base: Any, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shares out the weights of a model of transformers, each layer, the embedding, the head and the rest by itself.

    Each layer goes to its device only when it is cut, so that there is never room for the whole model there. dtype: in
    which weights are gathered, while parts and sums of gradients stay what they are. A head that is tied to the
    embedding stays so. Raises ValueError where the layers cannot be told.
    """
    body, head, embedding = base.base_model, base.get_output_embeddings(), base.get_input_embeddings()
    layers = [one for one in body.modules() if type(one).__name__ in set(base._no_split_modules or ())]
    if not layers or head.bias is not None:
        raise ValueError(f"shard = true: it is not known how to share out a {type(base).__name__}; leave `shard` out")
    tied = head.weight is embedding.weight
    policy = MixedPrecisionPolicy(dtype if dtype != base.dtype else None, torch.float32)
    for one in (*layers, embedding, *(() if tied else (head,)), body):
        part = cast(FSDPModule, fully_shard(one, mesh=mesh, mp_policy=policy, reshard_after_forward=True))
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo can do no other
    if tied:
        head.weight = embedding.weight


def full(weight: Tensor) -> Tensor:
    """A weight as a whole; its gradient goes, added up, to the parts of all processes."""
    if not isinstance(weight, DTensor):
        return weight
    return weight.full_tensor(grad_placements=[Partial()])


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This process's parts, which share memory with what they are parts of."""
    return [one.to_local() if isinstance(one, DTensor) else one for one in tensors]


def gathered(value: Any, keep: bool) -> Any:
    """A tensor as a whole, in main memory, or empty where it is not to be kept; anything else as it is."""
    if not isinstance(value, DTensor):
        return value
    whole = cast(DTensor, value.detach()).full_tensor()
    return whole.cpu() if keep else whole.new_empty(0)


def like(whole: Any, parameter: Tensor) -> Any:
    """A tensor of a parameter's shape, shared out as the parameter is; anything else as it is."""
    if not isinstance(parameter, DTensor) or not isinstance(whole, Tensor) or whole.shape != parameter.shape:
        return whole
    there = whole.to(parameter.device)
    return distribute_tensor(there, parameter.device_mesh, parameter.placements, src_data_rank=None)


@contextmanager
def in_turn(mesh: DeviceMesh | None) -> Iterator[None]:
    """Within it is one process of each machine at a time: a model is read whole before it is shared out."""
    turns = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if mesh is not None else 1
    for turn in range(turns):
        if turns == 1 or turn == int(os.environ["LOCAL_RANK"]):
            yield
        if mesh is not None:
            _most(turn, mesh)  # they meet


@contextmanager
def whole(base: nn.Module) -> Iterator[None]:
    """Within it every process has all weights, and passes are meetings no more; changes to the weights are lost."""
    parts = [one for one in base.modules() if isinstance(one, FSDPModule)]
    for one in parts:
        one.set_reshard_after_forward(False, recurse=False)
        one.unshard()
    try:
        yield
    finally:
        for one in parts:
            one.set_reshard_after_forward(True, recurse=False)
            one.reshard()


def even(items: Sequence[T], mesh: DeviceMesh | None) -> Iterator[tuple[T, bool]]:
    """The items, with True; then the first ones again, with False, until every process has had as many as any.

    There is at least one. Without a mesh it is the items alone.
    """
    missing = _most(len(items), mesh) - len(items) if mesh is not None else 0
    yield from ((one, True) for one in items)
    yield from ((items[i % len(items)], False) for i in range(missing))


def _most(number: int, mesh: DeviceMesh) -> int:
    """The greatest of what the processes say."""
    said = torch.tensor(number, device=mesh.device_type)
    torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX, mesh.get_group())
    return int(said)
