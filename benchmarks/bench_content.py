"""pytest-benchmark suite of content_read: `pytest benchmarks/bench_content.py`."""

import pytest
import torch

from mann_fast import ops, reference

SHAPES = {  # B, N, D, R
    "paper": (16, 128, 40, 4),
    "one-sample": (1, 128, 40, 4),
    "large-memory": (1, 4096, 64, 4),
}


def forward(module, memory, key):
    with torch.no_grad():
        return module.content_read(memory, key)[0]


def both(module, memory, key):
    return torch.autograd.grad(module.content_read(memory, key)[0].sum(), (memory, key))


@pytest.mark.parametrize("module", [ops, reference], ids=["fused", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("run", [forward, both], ids=["forward", "forward+backward"])
def test_content_read(benchmark, run, shape, module):
    torch.manual_seed(0)
    batch, slots, size, heads = SHAPES[shape]
    memory = torch.randn(batch, slots, size, requires_grad=True)
    key = torch.randn(batch, heads, size, requires_grad=True)
    for x, y in zip(both(module, memory, key), both(reference, memory, key), strict=True):
        assert torch.allclose(x, y, atol=1e-4)
    benchmark.group = f"content_read {shape} {run.__name__}"
    benchmark(run, module, memory, key)
