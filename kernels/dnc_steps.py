"""dnc_scan in Triton for a memory too large for one program: a loop of steps, each the reference's PyTorch operations. Backward
takes the orders that forward kept, and differentiates the steps segment by segment, so that the links of one segment alone are
there at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .. import reference
from ..reference.dnc import DNCInterface, DNCState
from ..reference.sequences import Steps


def interval(steps: int) -> int:
    """Every how many steps backward remembers the state: so many states as there are steps between two of them."""
    return max(math.isqrt(max(steps - 1, 0)) + 1, 1)


def _at(parts: Any, t: int | slice) -> list[Any]:
    return [None if x is None else x[t] for x in parts]


def scan(state, told, sequences, deallocate, eps, reads, histories):
    """Writes reads and, where they have room, weights and orders of each step; the state after the last. Directions, which are
    only kept for the kernel's backward, become 0."""
    read_history, write_history, orders, directions = histories
    sequences, state = Steps(*sequences), DNCState(*state).clone()
    directions.zero_()
    with torch.autocast(reads.device.type, enabled=False):
        for t in range(reads.shape[0]):
            given = DNCInterface(*sequences.inputs(t, *_at(told, t)))
            begun = sequences.begin(t, state)
            read, after = reference.dnc_step(begun, given, deallocate=deallocate, eps=eps)
            if len(orders):
                order = torch.sort(after.usage, dim=1, stable=True)[1]
                read_history[t], write_history[t], orders[t] = after.read_weights, after.write_weights, order
            state = DNCState(*sequences.end(t, after, state))
            (reads[t],) = sequences.outputs(t, read)
    return state


@contextmanager
def _recorded() -> Iterator[None]:
    """Gradients are recorded, within an op that is past autograd."""
    keys = [
        torch._C.DispatchKey.AutogradCPU,
        torch._C.DispatchKey.AutogradCUDA,
        torch._C.DispatchKey.ADInplaceOrView,
    ]
    keys += [torch._C.DispatchKey.AutogradOther, torch._C.DispatchKey.AutogradFunctionality]
    before = [torch._C._dispatch_tls_is_dispatch_key_excluded(key) for key in keys]
    try:
        for key in keys:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        with torch.enable_grad():
            yield
    finally:
        for key, excluded in zip(keys, before, strict=True):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded)


def scan_backward(grads, state, told, sequences, orders, deallocate, eps, every, results):
    """Writes the gradients of the state and of the interface, and adds to that of the start."""
    of_state, of_told, grad_start = results
    resets, lengths, start = sequences
    steps, (memory, *_) = told[0].shape[0], state
    state = DNCState(*state)
    if start is not None:
        start = start.expand_as(memory)  # each sample's own

    def segment(first, before, interface, start):
        span = slice(first, first + every)
        return reference.dnc_scan(
            DNCState(*before), DNCInterface(*interface), deallocate=deallocate, eps=eps,
            resets=None if resets is None else resets[span], lengths=None if lengths is None else lengths - first,
            start=start, orders=orders[span],
        )  # fmt: skip

    with torch.autocast(memory.device.type, enabled=False):
        states = [state]
        for first in range(0, steps - every, every):
            states.append(segment(first, states[-1], _at(told, slice(first, first + every)), start)[1])
        of_after = [None if x is None else torch.zeros_like(x) for x in state]
        for i, grad in enumerate(grads[1:]):
            if grad is not None and of_after[i] is not None:
                of_after[i] = grad
        for first in reversed(range(0, steps, every)):
            span = slice(first, first + every)
            with _recorded():
                groups = [*states[first // every], *_at(told, span), start]
                leaves = [None if x is None else x.detach().clone().requires_grad_() for x in groups]
                reads, after = segment(first, leaves[:6], leaves[6:19], leaves[19])
                pairs = list(zip(after, of_after, strict=True))
                if grads[0] is not None:
                    pairs.append((reads, grads[0][span]))
                pairs = [(x, g) for x, g in pairs if x is not None and x.requires_grad]
                found = iter(
                    torch.autograd.grad(
                        [x for x, _ in pairs], [x for x in leaves if x is not None], [g for _, g in pairs],
                        allow_unused=True, materialize_grads=True,
                    )
                )  # fmt: skip
            found = [None if x is None else next(found) for x in leaves]
            of_after = found[:6]

            for result, grad in zip(of_told, found[6:19], strict=True):
                if grad is not None:
                    result[span] = grad
            if start is not None:
                grad_start += found[19]
    for result, grad in zip(of_state, of_after, strict=False):
        if grad is not None:
            result.copy_(grad)
