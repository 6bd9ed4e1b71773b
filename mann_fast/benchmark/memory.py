"""What a call asks of the memory of the machine."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .cases import Call


def saved_bytes(call: Call) -> int:
    """Bytes of the tensors that autograd keeps between forward and backward of a call, each storage once."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return sum(storages.values())


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most bytes of tensors that a call holds at a time beside what was there before it; on a GPU with the kernels' own
    buffers, which on the CPU PyTorch's allocator does not see."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would say on stderr that it starts and stops
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
