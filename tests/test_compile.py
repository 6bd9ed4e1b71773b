"""torch.compile of whole layers: the numbers of the eager layer, in one graph, compiled no more often than a plain layer."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from mann_fast import MANN, MemoryLayer
from mann_fast._state import tensors_of

SMALL = {"num_slots": 8, "slot_size": 5, "num_heads": 2, "dtype": torch.float64}
SIZES = [(6, 3), (7, 3), (8, 4), (9, 5), (33, 2), (2, 2), (1, 3), (5, 1), (12, 1), (1, 1)]


@pytest.fixture(autouse=True)
def anew():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def outputs(result):
    """Every tensor that a call gave."""
    return list(tensors_of(result))


def results_and_gradients(function, module, x, *state):
    x = x.detach().requires_grad_()
    module.zero_grad()
    results = outputs(function(x, *state))
    sum((i + 1) * y.square().sum() for i, y in enumerate(results) if y.requires_grad).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]
    return [*(y.detach() for y in results), x.grad, *gradients]


def assert_same(actual, expected, tolerance=1e-10):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def compilations(module, sizes, backend="aot_eager", carried=False):
    """How often forward and backward over these (T, B) compile, whose numbers are those of the module."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for steps, batch in sizes:
        x = torch.randn(steps, batch, 4, dtype=torch.float64)
        state = (module(torch.randn(2, batch, 4, dtype=torch.float64))[1].detach(),) if carried else ()
        actual = results_and_gradients(compiled, module, x, *state)
        assert_same(actual, results_and_gradients(module, module, x, *state))
    return counter.frame_count


def plain(sizes):
    return compilations(nn.Sequential(nn.Linear(4, 6, dtype=torch.float64), nn.Tanh()), sizes)


@pytest.mark.parametrize(
    "options, sizes, carried",
    [({}, SIZES, False), ({"controller": "gru", "memory_start": "learned"}, [*SIZES[:3], (1, 1)], True)],
    ids=["lstm", "gru"],
)
def test_compiles_no_more_often_than_a_plain_layer(options, sizes, carried):
    expected = plain(sizes)
    torch.compiler.reset()
    assert compilations(MemoryLayer(4, 6, **SMALL, **options), sizes, carried=carried) <= expected


def test_two_steps_of_one_sample_are_no_case_of_their_own():
    """Backward multiplies what T - 1 steps met: of no size that could be 1."""
    assert compilations(MemoryLayer(4, 6, **SMALL), [(5, 1), (12, 1), (2, 1)]) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"addressing": "ntm"},
        {"addressing": "content"},
        {"addressing": "sparse"},
        pytest.param(
            {"addressing": "dnc", "masks": True, "deallocate": True, "link_sharpening": True},
            marks=pytest.mark.thorough,
        ),
        pytest.param({"addressing": "dnc", "link": False}, marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_a_loop_over_steps_compiles_no_more_often(options):
    sizes = [(3, 2), (4, 3), (6, 3), (2, 5), (1, 1)]
    expected = plain(sizes)
    torch.compiler.reset()
    assert compilations(MemoryLayer(4, 6, **options, **SMALL), sizes) <= expected


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_modes(mode):
    layer, dynamic = MANN(4, 3, 6, **SMALL), mode == "default"
    compiled = torch.compile(layer, fullgraph=True, mode=mode, dynamic=dynamic)
    for steps in (4, 11) if dynamic else (4,):
        x = torch.randn(steps, 2, 4, dtype=torch.float64)
        assert_same(results_and_gradients(compiled, layer, x), results_and_gradients(layer, layer, x))


def test_a_size_that_is_found_out_later():
    """What follows the layer may ask for one T after all."""

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = MemoryLayer(4, 6, **SMALL)

        def forward(self, x):
            output, _ = self.layer(x)
            return output + torch.arange(12, dtype=torch.float64).view(12, 1, 1)

    module = Fixed()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(12, 2, 4, dtype=torch.float64)
    assert_same(results_and_gradients(compiled, module, x), results_and_gradients(module, module, x))
