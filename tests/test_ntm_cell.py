"""ops.ntm_cell against its reference: values, gradients, and what is promised beside them."""

import pytest
import torch
from cases import BACKEND, fixed_noise, needs_kernels, worst_error

from mann_fast import ops, reference
from mann_fast.reference.cell import CONTROLLERS, ntm_head_sizes

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(BACKEND != "cpp", reason="elsewhere ntm_cell is a loop of ntm_step"),
]

SHAPES = [  # T, B, H, N, D, R
    pytest.param((12, 3, 200, 128, 40, 4), id="paper"),
    pytest.param((5, 17, 7, 9, 5, 3), id="several-blocks"),
    pytest.param((3, 1, 1, 1, 1, 1), id="ones"),
    pytest.param((20, 5, 16, 40, 3, 2), id="several-anchors"),
    pytest.param((3, 0, 5, 5, 4, 2), id="empty-batch"),
    pytest.param((3, 2, 0, 5, 4, 2), id="no-units"),
]
NAMES = (
    "gates hidden cell memory read_weights write_weights reads "
    "hidden_weight hidden_bias reads_weight head_weight head_bias"
).split()
PARAMETERS = NAMES[7:]


def cell_inputs(steps, batch, size, slots, width, heads, max_shift=1, controller="lstm"):
    """Arguments of ops.ntm_cell as a dict, in the order of NAMES; weights are as large as a layer's."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes):
        return torch.randn(*sizes, dtype=torch.float64, generator=generator)

    gates, states = CONTROLLERS[controller]
    values = sum(ntm_head_sizes(heads, width, max_shift))
    inputs = {
        "gates": normal(steps, batch, gates * size),
        "hidden": normal(batch, size),
        "cell": normal(batch, size),
        "memory": normal(batch, slots, width),
        "read_weights": torch.softmax(normal(batch, heads, slots), 2),
        "write_weights": torch.softmax(normal(batch, heads, slots), 2),
        "reads": normal(batch, heads, width),
        "hidden_weight": normal(gates * size, size) / max(size, 1) ** 0.5,
        "hidden_bias": normal(gates * size),
        "reads_weight": normal(gates * size, heads * width) / (heads * width) ** 0.5,
        "head_weight": 2 * normal(values, size) / max(size, 1) ** 0.5,
        "head_bias": normal(values),
    }
    missing = {"hidden", "cell"} - set(states) | (set() if states else {"hidden_weight", "hidden_bias"})
    return {name: None if name in missing else x for name, x in inputs.items()}


def call(function, inputs, **options):
    """All results as a dict: output, the controller's state, memory, read_weights, write_weights, the last reads."""
    gates, hidden, cell, *memory = (inputs[name] for name in NAMES[:6])
    state = tuple(x for x in (hidden, cell) if x is not None)
    rest = [inputs[name] for name in NAMES[6:]]
    output, state, memory, reads = function(gates, state, reference.NTMState(*memory), *rest, **options)
    state = dict(zip(("hidden", "cell"), state, strict=False))
    return {"output": output, **state, **memory._asdict(), "reads": reads}


def results_and_gradients(function, inputs, dtype, start=None, only=None, **options):
    """start comes in as one of the inputs: its gradient is among the others."""
    inputs = {
        name: None if x is None else x.detach().to(dtype, copy=True).requires_grad_(only in (None, name))
        for name, x in inputs.items()
    }
    wanted = {name: x for name, x in inputs.items() if x is not None and x.requires_grad}
    if start is not None:
        options["start"] = wanted["start"] = start.detach().to(dtype, copy=True).requires_grad_()
    results = call(function, inputs, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x.double() * fixed_noise(x, generator).double()).sum() for x in results.values())
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return results, dict(zip(wanted, gradients, strict=True))


def compare(actual, expected, tolerance):
    assert actual[0].keys() == expected[0].keys()
    for name, y in expected[0].items():
        assert worst_error(actual[0][name], y, batch_axis=1 if name == "output" else 0) < tolerance, name
    for name, y in expected[1].items():
        x = actual[1][name]
        if name in (*PARAMETERS, "start"):
            x, y = x[None], y[None]
        error = worst_error(x, y, batch_axis=1 if name == "gates" else 0)
        assert error < 10 * tolerance, f"gradient of {name}"


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("order", ["read_first", "write_first"])
@pytest.mark.parametrize("max_shift", [None, 0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference_in_float64(shape, max_shift, order, controller):
    options = {"max_shift": max_shift, "controller": controller}
    inputs = cell_inputs(*shape, **options)
    options["order"] = order
    actual = results_and_gradients(ops.ntm_cell, inputs, torch.float64, **options)
    compare(actual, results_and_gradients(reference.ntm_cell, inputs, torch.float64, **options), 1e-10)


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_matches_reference_in_float32(shape, controller):
    inputs = {
        name: x if x is None else x.float() for name, x in cell_inputs(*shape, controller=controller).items()
    }
    actual = results_and_gradients(ops.ntm_cell, inputs, torch.float32, controller=controller)
    expected = results_and_gradients(reference.ntm_cell, inputs, torch.float64, controller=controller)
    compare(actual, expected, 5e-5)


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("max_shift", [None, 1])
@pytest.mark.parametrize("given", ["resets", "lengths", "both"])
def test_resets_and_lengths_match_reference(given, max_shift, controller):
    """Steps beyond one anchor, so that replays begin at anchors and at resets; a sample that takes no part at all."""
    steps, batch, slots, width = 19, 5, 12, 5
    inputs = cell_inputs(steps, batch, 9, slots, width, 2, max_shift=max_shift, controller=controller)
    generator = torch.Generator().manual_seed(2)
    options = {"max_shift": max_shift, "controller": controller}
    if given != "lengths":
        options["resets"] = torch.rand(steps, batch, generator=generator) < 0.2
        options["start"] = torch.randn(slots, width, dtype=torch.float64, generator=generator)
    if given != "resets":
        options["lengths"] = torch.tensor([steps, 0, 7, 1, 13])
    actual = results_and_gradients(ops.ntm_cell, inputs, torch.float64, **options)
    compare(actual, results_and_gradients(reference.ntm_cell, inputs, torch.float64, **options), 1e-10)


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_gradients_reach_only_what_asks_for_them(controller):
    inputs = cell_inputs(4, 3, 9, 8, 5, 2, controller=controller)
    _, expected = results_and_gradients(ops.ntm_cell, inputs, torch.float64, controller=controller)
    for name in expected:
        _, actual = results_and_gradients(
            ops.ntm_cell, inputs, torch.float64, only=name, controller=controller
        )
        assert list(actual) == [name] and torch.equal(actual[name], expected[name])


def test_without_gradients_the_same_values():
    inputs = cell_inputs(11, 3, 9, 8, 5, 2)
    expected, _ = results_and_gradients(ops.ntm_cell, inputs, torch.float64)
    for name, x in call(ops.ntm_cell, inputs).items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("max_shift", [None, 1])
def test_steps_in_turn_are_the_sequence(max_shift):
    inputs = cell_inputs(5, 2, 9, 8, 5, 2, max_shift=max_shift)
    whole = call(ops.ntm_cell, inputs, max_shift=max_shift)
    outputs = []
    for t in range(5):
        results = call(ops.ntm_cell, inputs | {"gates": inputs["gates"][t : t + 1]}, max_shift=max_shift)
        outputs.append(results.pop("output"))
        inputs |= results
    for name, x in (results | {"output": torch.cat(outputs)}).items():
        assert torch.allclose(x, whole[name], rtol=0, atol=1e-12), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_the_reference(dtype):
    """The memory's state stays float32; a bfloat16 rounds what the products of each step take."""
    inputs = cell_inputs(5, 3, 20, 12, 8, 2)
    state = NAMES[3:6]
    half = {name: x.to(torch.float32 if name in state else dtype) for name, x in inputs.items()}
    wide = {name: x.double() for name, x in half.items()}
    results, expected = call(ops.ntm_cell, half), call(reference.ntm_cell, wide)
    for name, x in results.items():
        assert x.dtype == (torch.float32 if name in state else dtype)
        assert torch.allclose(x.double(), expected[name], rtol=0, atol=0.06), name


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"max_shift": -1}, ValueError, "max_shift must be at least 0, got -1"),
        ({"max_shift": 1.0}, TypeError, "max_shift must be an int, got float"),
        ({"max_shift": 2}, ValueError, "head_weight must have shape"),
        ({"controller": "rnn"}, ValueError, "controller must be one of"),
        ({"order": "first"}, ValueError, "order must be one of"),
        ({"eps": 0}, ValueError, "eps must be positive"),
    ],
)
def test_bad_options(change, error, message):
    with pytest.raises(error, match=message):
        call(ops.ntm_cell, cell_inputs(2, 2, 4, 6, 3, 2), **change)
