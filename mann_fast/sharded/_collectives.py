"""What the ops over several ranks send, and the gradients of it."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

Mesh: TypeAlias = "DeviceMesh | distributed.ProcessGroup"


def group_of(mesh: Mesh) -> distributed.ProcessGroup:
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(
                f"mesh must have one dimension, got {mesh}; mesh['name'] is one of its dimensions"
            )
        return mesh.get_group()
    if not isinstance(mesh, distributed.ProcessGroup):
        raise TypeError(f"mesh must be a DeviceMesh or a process group, got {type(mesh).__name__}")
    return mesh


def gather(group: distributed.ProcessGroup, tensor: Tensor) -> Tensor:
    """Those of all ranks, with a leading axis of ranks."""
    found = tensor.new_empty(group.size(), *tensor.shape)
    distributed.all_gather(list(found), tensor.contiguous(), group)
    return found


class Gathered(torch.autograd.Function):
    """A rank's tensor to those of all ranks. What is made of them is the same on all, and so is its gradient, of which each
    takes its own."""

    @staticmethod
    def forward(ctx: Any, group: distributed.ProcessGroup, tensor: Tensor) -> Tensor:
        ctx.rank = group.rank()
        return gather(group, tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient[ctx.rank]


class Shared(torch.autograd.Function):
    """What is the same on all ranks, to where each makes something else of it: its gradient is the sum of theirs."""

    @staticmethod
    def forward(
        ctx: Any, group: distributed.ProcessGroup, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.group = group
        return tuple(None if x is None else x.view_as(x) for x in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [x for x in gradients if x is not None]
        total = torch.cat([x.flatten() for x in given])
        distributed.all_reduce(total, group=ctx.group)
        parts = iter(total.split([x.numel() for x in given]))
        return None, *(None if x is None else next(parts).view_as(x) for x in gradients)
