"""ops.sparse_cell against its reference: values, gradients, and what is promised beside them."""

from functools import partial

import networks
import pytest
import torch
from cases import implemented, needs_kernels
from networks import HALVES, Called, compare, network_inputs, normals, say_fast_bfloat16
from test_sparse import sparse_inputs

from mann_fast import MemoryLayer, ops, reference
from mann_fast.reference.cell import CONTROLLERS, sparse_head_sizes

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(not implemented("sparse_cell"), reason="here sparse_cell is a loop of sparse_step"),
]

STATE = ops.SparseState._fields
every_controller = pytest.mark.parametrize("controller", CONTROLLERS)
SHAPES = [  # T, B, H, N, D, R, K
    pytest.param((10, 2, 200, 128, 40, 4, 4), id="paper"),
    pytest.param((5, 17, 7, 9, 5, 3, 2), id="several-blocks"),
    pytest.param((3, 1, 1, 1, 1, 1, 1), id="ones"),
    pytest.param((3, 2, 5, 4, 3, 4, 4), id="as-many-as-slots"),
    pytest.param((6, 1, 9, 1500, 33, 2, 5), id="slots-over-threads"),
    pytest.param((6, 9, 9, 2100, 8, 1, 3), id="slots-by-lists"),
    pytest.param((1, 3, 5, 12, 4, 2, 3), id="one-step"),
    pytest.param((3, 0, 5, 5, 4, 2, 2), id="empty-batch"),
    pytest.param((3, 2, 0, 5, 4, 2, 2), id="no-units"),
]


def cell_inputs(steps, batch, size, slots, width, heads, reads, controller="lstm", alike=False):
    """Arguments of ops.sparse_cell. alike: of a memory nearly all of whose rows are one."""
    normal = normals()
    torch.manual_seed(0)
    memory = dict(zip(STATE, sparse_inputs((1, batch, slots, width, heads, reads))[:5], strict=True))
    if alike:
        memory["memory"][:, 7:] = memory["memory"][:, -1:].clone()
    values = sum(sparse_head_sizes(heads, width))
    return network_inputs(normal, steps, batch, size, heads, width, memory, values, controller)


call = partial(networks.call, kind=ops.SparseState)
results_and_gradients = partial(networks.results_and_gradients, kind=ops.SparseState)


def both(shape, dtype=torch.float64, controller="lstm", alike=False, sequences=None, **options):
    """Results and gradients of ops.sparse_cell, and of the reference in float64 on the same numbers."""
    inputs = cell_inputs(*shape, controller, alike)
    inputs = {n: x if x is None or not x.is_floating_point() else x.to(dtype) for n, x in inputs.items()}
    options |= (sequences or {}) | {"controller": controller}
    actual = results_and_gradients(ops.sparse_cell, inputs=inputs, dtype=dtype, **options)
    return actual, results_and_gradients(reference.sparse_cell, inputs=inputs, dtype=torch.float64, **options)


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference_in_float64(shape, alike):
    compare(*both(shape, alike=alike), 1e-9)


@every_controller
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_every_controller(threshold, controller):
    compare(*both((6, 9, 11, 20, 6, 2, 3), controller=controller, threshold=threshold, eps=1e-3), 1e-9)


@every_controller
def test_matches_reference_in_float32(controller):
    compare(*both((4, 9, 20, 16, 8, 2, 4), torch.float32, controller=controller), 1e-4)


@pytest.mark.parametrize("slots", [12, 1100])
@pytest.mark.parametrize("given", ["resets", "lengths", "both"])
def test_resets_and_lengths_match_reference(given, slots):
    """A sample that takes no part at all, one that begins anew at its first step and twice in turn."""
    steps, batch, width = 19, 5, 5
    sequences = {}
    if given != "lengths":
        torch.manual_seed(1)
        sequences["resets"] = torch.rand(steps, batch) < 0.2
        sequences["resets"][0, 2] = sequences["resets"][4:6, 3] = True
        sequences["start"] = torch.randn(slots, width, dtype=torch.float64)
    if given != "resets":
        sequences["lengths"] = torch.tensor([steps, 0, 7, 1, 13])
    compare(*both((steps, batch, 9, slots, width, 2, 3), sequences=sequences), 1e-9)


@pytest.mark.thorough
def test_slots_too_many_for_a_block_of_samples():
    """What 8 samples know of their slots exceeds what their block may have in scratch: it is made smaller."""
    compare(*both((2, 9, 5, 300_000, 2, 1, 2), alike=True), 1e-9)


def test_gradients_reach_only_what_asks_for_them():
    given = {"inputs": cell_inputs(4, 3, 9, 8, 5, 2, 2), "dtype": torch.float64}
    _, expected = results_and_gradients(ops.sparse_cell, **given)
    assert expected.keys() >= {"memory", "read_weights", "gates"} and "read_slots" not in expected
    for name in expected:
        _, actual = results_and_gradients(ops.sparse_cell, only=name, **given)
        assert list(actual) == [name] and torch.equal(actual[name], expected[name])


def test_without_gradients_the_same_values():
    inputs = cell_inputs(11, 3, 9, 8, 5, 2, 2)
    expected, _ = results_and_gradients(ops.sparse_cell, inputs=inputs, dtype=torch.float64)
    for name, x in call(ops.sparse_cell, inputs=inputs).items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("slots", [8, 1100])
def test_steps_in_turn_are_the_sequence(slots):
    inputs = cell_inputs(5, 2, 9, slots, 5, 2, 2)
    whole = call(ops.sparse_cell, inputs=inputs)
    outputs = []
    for t in range(5):
        results = call(ops.sparse_cell, inputs=inputs | {"gates": inputs["gates"][t : t + 1]})
        outputs.append(results.pop("output"))
        inputs |= results
    for name, x in (results | {"output": torch.cat(outputs)}).items():
        assert torch.allclose(x, whole[name], rtol=0, atol=1e-12), name


@pytest.mark.parametrize(("dtype", "fast"), HALVES)
def test_half_precision_is_near_the_reference(dtype, fast, monkeypatch):
    """The memory's state stays float32; where that is fast, a bfloat16 rounds what the products of each step take."""
    say_fast_bfloat16(monkeypatch, fast)
    inputs = cell_inputs(1, 3, 20, 12, 8, 2, 3)  # with more steps what is read may be another slot

    def cast(to, of_state):
        return {
            name: x.to(of_state if name in STATE else to) if x.is_floating_point() else x
            for name, x in inputs.items()
        }

    half = cast(dtype, torch.float32)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in half.items()}
    expected = call(reference.sparse_cell, inputs=wide)
    for name, x in call(ops.sparse_cell, inputs=half).items():
        floating = torch.float32 if name in STATE else dtype
        assert x.dtype == (floating if expected[name].is_floating_point() else torch.int64)
        assert torch.allclose(x.double(), expected[name].double(), rtol=0, atol=0.06), name


def test_what_is_saved_for_backward_does_not_grow_with_the_slots():
    def saved(slots):
        inputs = {
            n: x.requires_grad_(x.is_floating_point())
            for n, x in cell_inputs(6, 2, 9, slots, 5, 2, 2).items()
        }
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: (kept.setdefault(x.data_ptr(), x.numel()), x)[1], lambda x: x
        ):
            call(ops.sparse_cell, inputs=inputs)
        return sum(kept.values())

    assert saved(10) == saved(3000)


@pytest.mark.parametrize("slots", [9, 1100])
def test_a_layer_is_one_call_and_gives_what_it_gives_by_steps(slots):
    torch.manual_seed(0)
    sizes = {"num_slots": slots, "slot_size": 5, "num_heads": 2, "num_reads": 3}
    layer = MemoryLayer(4, 7, addressing="sparse", dtype=torch.float64, **sizes)
    x, resets = torch.randn(12, 3, 4, dtype=torch.float64), torch.rand(12, 3) < 0.1
    given = {"resets": resets, "lengths": torch.tensor([12, 0, 9])}

    def run(**by_steps):
        layer.zero_grad()
        with Called() as called:
            output, state, *_ = layer(x, **given, **by_steps)
            (output.square().sum() + state.memory.memory.sum()).backward()
        state = torch.utils._pytree.tree_leaves(state)
        return called.names, [output, *state, *(p.grad.clone() for p in layer.parameters())]

    (names, whole), (_, by_steps) = run(), run(return_weights=True)
    assert names == {"sparse_cell", "sparse_cell_backward"}
    for x_, y in zip(whole, by_steps, strict=True):
        assert torch.allclose(x_, y, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"threshold": 1.0}, ValueError, "threshold must be"),
        ({"controller": "rnn"}, ValueError, "controller must be one of"),
        ({"eps": 0}, ValueError, "eps must be positive"),
    ],
)
def test_bad_options(change, error, message):
    with pytest.raises(error, match=message):
        call(ops.sparse_cell, inputs=cell_inputs(2, 2, 4, 6, 3, 2, 2), **change)


def test_bad_states():
    inputs = cell_inputs(2, 2, 4, 6, 3, 2, 2)
    slots, times = inputs["read_slots"].clone(), inputs["last_access"].clone()
    slots[0, 0, 0], times[1, 2] = 6, 5
    with pytest.raises(ValueError, match=r"memory.read_slots must be within \[0, N = 6\), got 6"):
        call(ops.sparse_cell, inputs=inputs | {"read_slots": slots})
    with pytest.raises(
        ValueError, match="memory.last_access must be at most memory.clock, 4 of sample 1, got 5"
    ):
        call(ops.sparse_cell, inputs=inputs | {"last_access": times})
    many = {
        "read_slots": torch.zeros(2, 2, 7, dtype=torch.int64),
        "read_weights": torch.ones(2, 2, 7).double(),
    }
    with pytest.raises(ValueError, match=r"memory.read_slots \[B, R, K\] must have 1 <= K <= N = 6 slots"):
        call(ops.sparse_cell, inputs=inputs | many)
    with pytest.raises(
        ValueError, match=r"head_weight must have shape \[heads, H\] = \[18, 4\], got \[20, 4\]"
    ):
        call(ops.sparse_cell, inputs=inputs | {"head_weight": torch.ones(20, 4).double()})
