"""pytest-benchmark suite of the LRUA ops, for whoever changes one: `pytest benchmarks/bench_lrua.py`, and
`--benchmark-compare` to hold it against an earlier run. Results are checked against the reference before they are timed."""

import pytest
import torch

from mann_fast import ops, reference

SHAPES = {  # T, B, N, D, R
    "paper": (50, 16, 128, 40, 4),
    "one-sample": (50, 1, 128, 40, 4),
    "large-memory": (10, 1, 4096, 64, 4),
}


def inputs(steps, batch, slots, size, heads):
    torch.manual_seed(0)
    leading = (steps, batch, heads)
    tensors = [torch.tanh(torch.randn(*leading, size)) for _ in range(2)]
    tensors += [torch.randn(leading), 1 + 10 * torch.rand(leading)]
    return ops.LRUAState.initial(batch, slots, size, heads), [x.requires_grad_() for x in tensors]


def forward(module, state, tensors):
    with torch.no_grad():
        return module.lrua_scan(state, *tensors)[0]


def both(module, state, tensors):
    return torch.autograd.grad(module.lrua_scan(state, *tensors)[0].sum(), tensors)


@pytest.mark.parametrize("module", [ops, reference], ids=["fused", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("run", [forward, both], ids=["forward", "forward+backward"])
def test_lrua_scan(benchmark, run, shape, module):
    state, tensors = inputs(*SHAPES[shape])
    first = [x[:5].detach().requires_grad_() for x in tensors]
    expected = reference.lrua_scan(state, *first)[0]
    assert torch.allclose(module.lrua_scan(state, *first)[0], expected, atol=1e-4)
    benchmark.group = f"lrua_scan {shape} {run.__name__}"
    benchmark.pedantic(run, (module, state, tensors), rounds=15, warmup_rounds=2)


@pytest.mark.parametrize("module", [ops, reference], ids=["fused", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
def test_lrua_step(benchmark, shape, module):
    state, tensors = inputs(*SHAPES[shape])
    step = [x[0].detach() for x in tensors]
    assert torch.allclose(module.lrua_step(state, *step)[0], reference.lrua_step(state, *step)[0], atol=1e-4)
    benchmark.group = f"lrua_step {shape}"
    benchmark(module.lrua_step, state, *step)
