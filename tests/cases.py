"""Inputs, errors and oracles that the op tests share."""

from __future__ import annotations

import itertools
import os
from contextlib import nullcontext

import pytest
import torch

from mann_fast import backend, backends, reference
from mann_fast.ops._register import NAMESPACES, has_kernels

# Which kernels the op tests run on: "cpp", "cuda" (make emulate) or "triton" (make triton). conftest.py makes every op take
# them.
BACKEND = os.environ.get("MANN_FAST_TEST_BACKEND", "cpp")
INTERPRETED = BACKEND == "triton" and os.environ.get("TRITON_INTERPRET") == "1"

ORDERS = ("write_first", "read_first")
WRITE_TARGETS = ("per_head", "shared")
# The two in the middle go no way through the kernels that the first and the last do not.
OPTIONS = [
    pytest.param(
        {"order": order, "write_target": target},
        id=f"{order}-{target}",
        marks=[pytest.mark.thorough] if (order == "read_first") != (target == "shared") else [],
    )
    for order, target in itertools.product(ORDERS, WRITE_TARGETS)
]

needs_kernels = pytest.mark.skipif(
    backends()[BACKEND] is not None, reason=f"backend {BACKEND} cannot run here: {backends()[BACKEND]}"
)
needs_cpp = pytest.mark.skipif(
    BACKEND != "cpp" or backends()["cpp"] is not None,
    reason=f"for the C++ extension: {backends()['cpp'] or 'another backend is being tested'}",
)
RAW_OPS = getattr(torch.ops, NAMESPACES[BACKEND])


def implemented(name):
    """Whether the backend that is tested has kernels for the op of this name, on the device that is tested."""
    return backends()[BACKEND] is None and has_kernels(name, BACKEND, torch.empty(0).device.type)


def served_by(name):
    """Ops in this context run on the kernels that the run tests, for "tested", or on the backend named. (backend("auto") would
    undo the choice of the run.)"""
    return nullcontext() if name == "tested" else backend(name)


def shorter(value, interpreted):
    """A size, or a smaller one for Triton's interpreter, which takes some 50 ms per step and sample."""
    return interpreted if INTERPRETED else value


def distinct_state(batch, slots, size, heads, dtype=torch.float64):
    """A state whose usages differ by more than 0.01, so that rounding does not change which slots are chosen."""
    order = torch.stack([torch.randperm(slots) for _ in range(batch)]) if batch else torch.zeros(0, slots)
    usage = order.to(dtype) * 0.037 + 0.01 * torch.rand(batch, slots, dtype=dtype)
    weights = torch.softmax(torch.randn(batch, heads, slots, dtype=dtype), -1)
    return reference.LRUAState(torch.randn(batch, slots, size, dtype=dtype), weights, usage)


def scan_inputs(steps, batch, size, heads, dtype=torch.float64, sharpness=True):
    leading = (batch, heads) if steps is None else (steps, batch, heads)
    inputs = [torch.randn(*leading, size, dtype=dtype), torch.randn(*leading, size, dtype=dtype)]
    inputs.append(torch.randn(leading, dtype=dtype))
    inputs.append(3 * torch.randn(leading, dtype=dtype) if sharpness else None)
    return inputs


def worst_error(actual, expected, batch_axis=0):
    """max|x - y| / max|y| of the worst sample: one wrong element shows."""
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return 0.0
    actual = actual.detach().double().movedim(batch_axis, 0).flatten(1)
    expected = expected.detach().double().movedim(batch_axis, 0).flatten(1)
    scale = expected.abs().amax(1).clamp_min(1e-12)
    error = ((actual - expected).abs().amax(1) / scale).max().item()
    return float("inf") if error != error else error


def fixed_noise(x, generator):
    """Numbers for every element of x that are the same on every device."""
    return torch.randn(x.shape, generator=generator, device=generator.device).to(x.device)


def run_with_gradients(function, inputs, dtype, **options):
    """Outputs of function(state, keys, ...) and the gradients of a fixed random functional of all that is differentiable.

    ``inputs`` are memory, read_weights, usage, keys, write_vectors, gate_logits, sharpness (or None).
    """
    tensors = []
    for i, x in enumerate(inputs):
        wanted = torch.float32 if i < 3 and dtype in (torch.bfloat16, torch.float16) else dtype
        tensors.append(None if x is None else x.detach().to(wanted).requires_grad_(i != 2))
    reads, state = function(reference.LRUAState(*tensors[:3]), *tensors[3:], **options)
    assert not state.usage.requires_grad
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x.double() * fixed_noise(x, generator).bfloat16().double()).sum()
        for x in (reads, state.memory, state.read_weights)
    )
    wanted = [x for i, x in enumerate(tensors) if x is not None and i != 2]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [reads, *state], list(gradients)
