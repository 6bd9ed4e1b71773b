"""The processes of a training run: those that torchrun started, else the only one.

Each draws the same batch and computes with its part. Their gradients are averaged, so all hold the same model; the first of
them prints and writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed


@contextmanager
def joined() -> Iterator[None]:
    """While entered, a process that torchrun started is one of its group."""
    if not (distributed.is_available() and distributed.is_torchelastic_launched()):
        yield
        return
    distributed.init_process_group("gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _in_group() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    return distributed.get_rank() if _in_group() else 0


def count() -> int:
    return distributed.get_world_size() if _in_group() else 1


def part_of(batch: int) -> slice:
    """Which of a batch this process computes with. ValueError where the parts would be unequal: the mean over all would not be
    the mean of theirs."""
    size, rest = divmod(batch, count())
    if rest:
        raise ValueError(f"batch must be a multiple of the number of processes, {count()}, got {batch}")
    return slice(rank() * size, (rank() + 1) * size)


def average(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one dtype by their mean over all processes; one collective for all of them."""
    if count() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= count()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def any_of(condition: bool) -> bool:
    """Whether it holds in one of the processes."""
    if count() == 1:
        return condition
    flag = torch.tensor(int(condition))
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag)


@contextmanager
def one_ahead() -> Iterator[None]:
    """The block in the first process of each machine, then in its others, which find what that has fetched."""
    if count() == 1:
        yield
        return
    ahead = distributed.get_node_local_rank(fallback_rank=rank()) == 0
    if not ahead:
        distributed.barrier()
    yield
    if ahead:
        distributed.barrier()
