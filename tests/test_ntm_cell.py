"""ops.ntm_cell against its reference: values, gradients, and what is promised beside them."""

from functools import partial

import networks
import pytest
import torch
from cases import BACKEND, RAW_OPS, implemented, needs_kernels
from networks import HALVES, Called, compare, network_inputs, normals, say_fast_bfloat16

from mann_fast import ops, reference
from mann_fast.reference.cell import CONTROLLERS, ntm_head_sizes

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(not implemented("ntm_cell"), reason="here ntm_cell is a loop of ntm_step"),
]

SHAPES = [  # T, B, H, N, D, R
    pytest.param((12, 3, 200, 128, 40, 4), id="paper"),
    pytest.param((5, 17, 7, 9, 5, 3), id="several-blocks"),
    pytest.param((3, 1, 1, 1, 1, 1), id="ones"),
    pytest.param((20, 5, 16, 40, 3, 2), id="several-anchors"),
    pytest.param((3, 0, 5, 5, 4, 2), id="empty-batch"),
    pytest.param((3, 2, 0, 5, 4, 2), id="no-units"),
]


def cell_inputs(steps, batch, size, slots, width, heads, max_shift=1, controller="lstm"):
    """Arguments of ops.ntm_cell."""
    normal = normals()
    memory = {
        "memory": normal(batch, slots, width),
        "read_weights": torch.softmax(normal(batch, heads, slots), 2),
        "write_weights": torch.softmax(normal(batch, heads, slots), 2),
    }
    values = sum(ntm_head_sizes(heads, width, max_shift))
    return network_inputs(normal, steps, batch, size, heads, width, memory, values, controller)


call = partial(networks.call, kind=ops.NTMState)
results_and_gradients = partial(networks.results_and_gradients, kind=ops.NTMState)


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("order", ["read_first", "write_first"])
@pytest.mark.parametrize("max_shift", [None, 0, 1, 2])
@pytest.mark.parametrize(
    "shape", SHAPES if BACKEND == "cpp" else SHAPES[1:]
)  # the CUDA kernels have no room for the first
def test_matches_reference_in_float64(shape, max_shift, order, controller):
    options = {"max_shift": max_shift, "controller": controller}
    inputs = cell_inputs(*shape, **options)
    options["order"] = order
    actual = results_and_gradients(ops.ntm_cell, inputs=inputs, dtype=torch.float64, **options)
    compare(
        actual,
        results_and_gradients(reference.ntm_cell, inputs=inputs, dtype=torch.float64, **options),
        1e-10,
    )


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_matches_reference_in_float32(shape, controller):
    inputs = {
        name: x if x is None else x.float() for name, x in cell_inputs(*shape, controller=controller).items()
    }
    actual = results_and_gradients(ops.ntm_cell, inputs=inputs, dtype=torch.float32, controller=controller)
    expected = results_and_gradients(
        reference.ntm_cell, inputs=inputs, dtype=torch.float64, controller=controller
    )
    compare(actual, expected, 5e-5)


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("max_shift", [None, 1])
@pytest.mark.parametrize("given", ["resets", "lengths", "both"])
def test_resets_and_lengths_match_reference(given, max_shift, controller):
    """Steps beyond one anchor, so that replays begin at anchors and at resets; a sample that takes no part at all."""
    steps, batch, slots, width = 19, 5, 12, 5
    inputs = cell_inputs(steps, batch, 9, slots, width, 2, max_shift=max_shift, controller=controller)
    options = {"max_shift": max_shift, "controller": controller}
    if given != "lengths":
        options["resets"] = torch.rand(steps, batch) < 0.2
        options["start"] = torch.randn(slots, width, dtype=torch.float64)
    if given != "resets":
        options["lengths"] = torch.tensor([steps, 0, 7, 1, 13])
    actual = results_and_gradients(ops.ntm_cell, inputs=inputs, dtype=torch.float64, **options)
    compare(
        actual,
        results_and_gradients(reference.ntm_cell, inputs=inputs, dtype=torch.float64, **options),
        1e-10,
    )


@pytest.mark.skipif(BACKEND != "cuda", reason="only the CUDA kernels are asked for room")
@pytest.mark.parametrize(
    "shape, room",
    [((3, 2, 7, 9, 5, 2), True), ((2, 1, 40, 300, 3, 1), True), ((2, 1, 600, 4, 3, 1), False)],
)
def test_one_call_where_there_is_room_and_a_loop_where_there_is_none(shape, room):
    inputs = {name: x.float() for name, x in cell_inputs(*shape).items()}
    sizes = (shape[3], shape[4], shape[5], shape[2], 0, 3, False)
    assert RAW_OPS.ntm_cell_fits(*sizes) == room
    with Called() as called:
        actual = results_and_gradients(ops.ntm_cell, inputs=inputs, dtype=torch.float32)
    assert called.names == ({"ntm_cell", "ntm_cell_backward"} if room else {"ntm_scan", "ntm_scan_backward"})
    compare(actual, results_and_gradients(reference.ntm_cell, inputs=inputs, dtype=torch.float64), 5e-5)


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_gradients_reach_only_what_asks_for_them(controller):
    inputs = cell_inputs(4, 3, 9, 8, 5, 2, controller=controller)
    _, expected = results_and_gradients(
        ops.ntm_cell, inputs=inputs, dtype=torch.float64, controller=controller
    )
    for name in expected:
        _, actual = results_and_gradients(
            ops.ntm_cell, inputs=inputs, dtype=torch.float64, only=name, controller=controller
        )
        assert list(actual) == [name] and torch.equal(actual[name], expected[name])


def test_without_gradients_the_same_values():
    inputs = cell_inputs(11, 3, 9, 8, 5, 2)
    expected, _ = results_and_gradients(ops.ntm_cell, inputs=inputs, dtype=torch.float64)
    for name, x in call(ops.ntm_cell, inputs=inputs).items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("max_shift", [None, 1])
def test_steps_in_turn_are_the_sequence(max_shift):
    inputs = cell_inputs(5, 2, 9, 8, 5, 2, max_shift=max_shift)
    whole = call(ops.ntm_cell, inputs=inputs, max_shift=max_shift)
    outputs = []
    for t in range(5):
        results = call(
            ops.ntm_cell, inputs=inputs | {"gates": inputs["gates"][t : t + 1]}, max_shift=max_shift
        )
        outputs.append(results.pop("output"))
        inputs |= results
    for name, x in (results | {"output": torch.cat(outputs)}).items():
        assert torch.allclose(x, whole[name], rtol=0, atol=1e-12), name


@pytest.mark.parametrize(("dtype", "fast"), HALVES)
def test_half_precision_is_near_the_reference(dtype, fast, monkeypatch):
    """The memory's state stays float32; where that is fast, a bfloat16 rounds what the products of each step take."""
    say_fast_bfloat16(monkeypatch, fast)
    inputs = cell_inputs(5, 3, 20, 12, 8, 2)
    state = ops.NTMState._fields
    half = {name: x.to(torch.float32 if name in state else dtype) for name, x in inputs.items()}
    wide = {name: x.double() for name, x in half.items()}
    results, expected = call(ops.ntm_cell, inputs=half), call(reference.ntm_cell, inputs=wide)
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
        call(ops.ntm_cell, inputs=cell_inputs(2, 2, 4, 6, 3, 2), **change)
