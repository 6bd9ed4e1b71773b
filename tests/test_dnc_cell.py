"""ops.dnc_cell against its reference: values, gradients, and what is promised beside them."""

from functools import partial

import networks
import pytest
import torch
from cases import BACKEND, RAW_OPS, implemented, needs_kernels
from networks import HALVES, Called, compare, network_inputs, normals, say_fast_bfloat16

from mann_fast import MemoryLayer, ops, reference
from mann_fast.reference.cell import CONTROLLERS, dnc_head_sizes

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(not implemented("dnc_cell"), reason="here dnc_cell is a loop of dnc_step"),
]

REPAIRS = {"masks": True, "deallocate": True, "link_sharpening": True}
OPTIONS = {
    "graves": {},
    "csordas": REPAIRS,
    "clipped": {**REPAIRS, "mask_min": 0.1, "clip": 0.7},
    "no-links": {"link": False},
    "no-links-masks-deallocate": {"link": False, "masks": True, "deallocate": True, "eps": 1e-3},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
every_controller = pytest.mark.parametrize("controller", CONTROLLERS)
SHAPES = [  # T, B, H, N, D, R
    pytest.param((10, 2, 200, 128, 40, 4), id="paper"),
    pytest.param((5, 17, 7, 9, 5, 3), id="several-blocks"),
    pytest.param((3, 1, 1, 1, 1, 1), id="ones"),
    pytest.param((20, 5, 16, 40, 3, 5), id="several-anchors"),
    pytest.param((3, 2, 5, 4, 3, 7), id="more-heads-than-slots"),
    pytest.param((3, 0, 5, 5, 4, 2), id="empty-batch"),
    pytest.param((3, 2, 0, 5, 4, 2), id="no-units"),
]


def cell_inputs(
    steps,
    batch,
    size,
    slots,
    width,
    heads,
    controller="lstm",
    link=True,
    masks=False,
    link_sharpening=False,
    **options,
):
    """Arguments of ops.dnc_cell."""
    normal = normals()

    def shares(*sizes):  # that sum to less than 1
        return 0.9 * torch.softmax(normal(*sizes), -1)

    memory = {
        "memory": normal(batch, slots, width),
        "usage": torch.sigmoid(2 * normal(batch, slots)),
        "precedence": shares(batch, slots) if link else None,
        "links": shares(batch, slots, slots) * (1 - torch.eye(slots, dtype=torch.float64)) if link else None,
        "read_weights": shares(batch, heads, slots),
        "write_weights": shares(batch, slots),
    }
    values = sum(dnc_head_sizes(heads, width, link=link, masks=masks, link_sharpening=link_sharpening))
    return network_inputs(normal, steps, batch, size, heads, width, memory, values, controller)


def both(shape, dtype=torch.float64, controller="lstm", sequences=None, **options):
    """Results and gradients of ops.dnc_cell, and of the reference in float64 on the same numbers."""
    inputs = cell_inputs(*shape, controller=controller, **options)
    inputs = {name: x if x is None else x.to(dtype) for name, x in inputs.items()}
    options = {name: x for name, x in options.items() if name != "link"} | (sequences or {})
    options["controller"] = controller
    actual = results_and_gradients(ops.dnc_cell, inputs=inputs, dtype=dtype, **options)
    return actual, results_and_gradients(reference.dnc_cell, inputs=inputs, dtype=torch.float64, **options)


call = partial(networks.call, kind=ops.DNCState)
results_and_gradients = partial(
    networks.results_and_gradients, kind=ops.DNCState, constant=("write_weights",)
)


@pytest.mark.parametrize("shape", SHAPES)
@every_option
def test_matches_reference_in_float64(options, shape):
    compare(*both(shape, **options), 1e-9)


@every_controller
@every_option
def test_every_controller(options, controller):
    compare(*both((6, 9, 11, 20, 6, 2), controller=controller, **options), 1e-9)


@pytest.mark.skipif(BACKEND != "cuda", reason="only the CUDA kernels are asked for room")
@pytest.mark.parametrize(
    "shape, options, room",
    [
        pytest.param((3, 2, 7, 9, 5, 2), REPAIRS, True, id="all-in-shared-memory"),
        pytest.param((2, 3, 150, 40, 12, 5), {}, True, id="weights-of-a-cluster"),
        pytest.param((2, 1, 20, 260, 20, 3), REPAIRS, True, id="links-in-device-memory"),
        pytest.param((2, 1, 5, 300, 250, 1), {}, True, id="the-memory-in-device-memory"),
        pytest.param(
            (2, 1, 5, 300, 250, 1), {"link": False}, True, id="the-memory-in-device-memory-no-links"
        ),
        pytest.param((2, 1, 600, 4, 3, 1), REPAIRS, False, id="no-room"),
    ],
)
def test_one_call_where_there_is_room_and_a_loop_where_there_is_none(shape, options, room):
    choices = (options.get("link", True), options.get("masks", False), options.get("link_sharpening", False))
    assert RAW_OPS.dnc_cell_fits(shape[3], shape[4], shape[5], shape[2], 0, *choices, False) == room
    with Called() as called:
        actual, expected = both(shape, torch.float32, **options)
    assert called.names == ({"dnc_cell", "dnc_cell_backward"} if room else {"dnc_scan", "dnc_scan_backward"})
    compare(actual, expected, 5e-5)


@every_controller
def test_matches_reference_in_float32(controller):
    """With few steps: the order of allocation turns on the last bit of usages, which come near one another with time."""
    compare(*both((3, 9, 20, 16, 8, 2), torch.float32, controller=controller, **REPAIRS), 5e-5)


@every_option
@pytest.mark.parametrize("given", ["resets", "lengths", "both"])
def test_resets_and_lengths_match_reference(given, options):
    """Steps beyond one segment, so that replays begin at anchors and at resets; a sample that takes no part at all."""
    steps, batch, slots, width = 19, 5, 12, 5
    sequences = {}
    if given != "lengths":
        sequences["resets"] = torch.rand(steps, batch) < 0.2
        sequences["start"] = torch.randn(slots, width, dtype=torch.float64)
    if given != "resets":
        sequences["lengths"] = torch.tensor([steps, 0, 7, 1, 13])
    compare(*both((steps, batch, 9, slots, width, 2), sequences=sequences, **options), 1e-9)


@pytest.mark.thorough
def test_links_too_large_for_a_block_of_samples():
    """In float64 the links of 8 samples exceed what their block may have in scratch: it is made smaller."""
    compare(*both((4, 9, 5, 520, 4, 2)), 1e-9)


def test_gradients_reach_only_what_asks_for_them():
    inputs = cell_inputs(4, 3, 9, 8, 5, 2, **REPAIRS)
    given = {"inputs": inputs, "dtype": torch.float64, **REPAIRS}
    _, expected = results_and_gradients(ops.dnc_cell, **given)
    assert "write_weights" not in expected
    for name in expected:
        _, actual = results_and_gradients(ops.dnc_cell, only=name, **given)
        assert list(actual) == [name] and torch.equal(actual[name], expected[name])


def test_write_weights_are_a_constant():
    inputs = cell_inputs(2, 3, 9, 8, 5, 2)
    inputs["write_weights"].requires_grad_()
    assert not any(x.requires_grad for x in call(ops.dnc_cell, inputs=inputs).values())


def test_without_gradients_the_same_values():
    inputs = cell_inputs(11, 3, 9, 8, 5, 2, **REPAIRS)
    expected, _ = results_and_gradients(ops.dnc_cell, inputs=inputs, dtype=torch.float64, **REPAIRS)
    for name, x in call(ops.dnc_cell, inputs=inputs, **REPAIRS).items():
        assert torch.equal(x, expected[name]), name


@every_option
def test_steps_in_turn_are_the_sequence(options):
    inputs = cell_inputs(5, 2, 9, 8, 5, 2, **options)
    options = {name: x for name, x in options.items() if name != "link"}
    whole = call(ops.dnc_cell, inputs=inputs, **options)
    outputs = []
    for t in range(5):
        results = call(ops.dnc_cell, inputs=inputs | {"gates": inputs["gates"][t : t + 1]}, **options)
        outputs.append(results.pop("output"))
        inputs |= results
    for name, x in (results | {"output": torch.cat(outputs)}).items():
        assert (x is None and whole[name] is None) or torch.allclose(x, whole[name], rtol=0, atol=1e-12), name


@pytest.mark.parametrize(("dtype", "fast"), HALVES)
def test_half_precision_is_near_the_reference(dtype, fast, monkeypatch):
    """The memory's state stays float32; where that is fast, a bfloat16 rounds what the products of each step take."""
    say_fast_bfloat16(monkeypatch, fast)
    inputs = cell_inputs(3, 3, 20, 12, 8, 2, **REPAIRS)
    state = ops.DNCState._fields
    half = {name: x.to(torch.float32 if name in state else dtype) for name, x in inputs.items()}
    wide = {name: x.double() for name, x in half.items()}
    expected = call(reference.dnc_cell, inputs=wide, **REPAIRS)
    for name, x in call(ops.dnc_cell, inputs=half, **REPAIRS).items():
        assert x.dtype == (torch.float32 if name in state else dtype)
        assert torch.allclose(x.double(), expected[name], rtol=0, atol=0.06), name


def test_a_gradient_where_clipping_ends_is_the_references():
    """Values of exactly -clip and clip have one, beyond they have none."""
    inputs = cell_inputs(1, 1, 4, 5, 3, 1)
    inputs["head_weight"].zero_()
    inputs["head_bias"] = torch.tensor([-2.0, -1.0, 0.5, 1.0, 1.5], dtype=torch.float64).repeat(9)[
        : len(inputs["head_bias"])
    ]
    given = {"inputs": inputs, "dtype": torch.float64, "clip": 1.0}
    actual, expected = (results_and_gradients(f, **given) for f in (ops.dnc_cell, reference.dnc_cell))
    compare(actual, expected, 1e-12)
    outside = inputs["head_bias"].abs() > 1
    assert not actual[1]["head_bias"][outside].any() and actual[1]["head_bias"][~outside].all()


@every_option
def test_a_layer_gives_what_it_gives_by_steps(options):
    torch.manual_seed(0)
    sizes = {"num_slots": 9, "slot_size": 5, "num_heads": 2}
    layer = MemoryLayer(4, 7, addressing="dnc", dtype=torch.float64, **sizes, **options)
    x, resets = torch.randn(12, 3, 4, dtype=torch.float64), torch.rand(12, 3) < 0.1
    given = {"resets": resets, "lengths": torch.tensor([12, 0, 9])}

    def run(**by_steps):
        layer.zero_grad()
        output, state, *_ = layer(x, **given, **by_steps)
        (output.square().sum() + state.memory.memory.sum()).backward()
        state = (x for x in torch.utils._pytree.tree_leaves(state) if x is not None)
        return [output, *state, *(p.grad.clone() for p in layer.parameters())]

    for x_, y in zip(run(), run(return_weights=True), strict=True):
        assert torch.allclose(x_, y, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"masks": 1}, TypeError, "masks must be a bool, got int"),
        ({"deallocate": None}, TypeError, "deallocate must be a bool, got NoneType"),
        ({"mask_min": 0.1}, ValueError, "mask_min must be 0 without masks, got 0.1"),
        ({"clip": 0}, ValueError, "clip must be a positive number or None, got 0"),
        ({"link_sharpening": True}, ValueError, r"head_weight must have shape \[heads, H\]"),
        ({"controller": "rnn"}, ValueError, "controller must be one of"),
        ({"eps": 0}, ValueError, "eps must be positive"),
    ],
)
def test_bad_options(change, error, message):
    with pytest.raises(error, match=message):
        call(ops.dnc_cell, inputs=cell_inputs(2, 2, 4, 6, 3, 2), **change)


@pytest.mark.parametrize("missing, other", [("precedence", "links"), ("links", "precedence")])
def test_links_and_precedence_go_together(missing, other):
    link = missing != "links"
    inputs = cell_inputs(2, 2, 4, 6, 3, 2, link=link)
    inputs["precedence"] = torch.rand(2, 6, dtype=torch.float64) if not link else None
    with pytest.raises(TypeError, match="memory.precedence must be .* where memory.links is, got "):
        call(ops.dnc_cell, inputs=inputs)
    with pytest.raises(ValueError, match="link_sharpening must be False without link, got True"):
        call(ops.dnc_cell, inputs=cell_inputs(2, 2, 4, 6, 3, 2, link=False), link_sharpening=True)
