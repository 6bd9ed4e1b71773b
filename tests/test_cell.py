"""ops.cell against its reference: values, gradients, and what is promised beside them."""

import itertools
import sys

import pytest
import torch
from cases import (
    BACKEND,
    OPTIONS,
    RAW_OPS,
    distinct_state,
    fixed_noise,
    implemented,
    needs_cpp,
    needs_kernels,
    served_by,
    worst_error,
)
from networks import HALVES, say_fast_bfloat16

from mann_fast import MemoryLayer, ops, reference
from mann_fast.reference.cell import CONTROLLERS, head_sizes

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(not implemented("cell"), reason="here cell is a loop of lrua_step"),
]

SHAPES = [  # T, B, H, N, D, R
    pytest.param((12, 3, 200, 128, 40, 4), id="paper"),
    pytest.param((5, 17, 7, 9, 5, 3), id="several-blocks"),
    pytest.param((3, 1, 1, 1, 1, 1), id="ones"),
    pytest.param((4, 8, 33, 6, 3, 6), id="as-many-heads-as-slots"),
    pytest.param((9, 2, 50, 33, 17, 5), id="5-heads"),
    pytest.param((20, 5, 16, 40, 3, 2), id="several-anchors"),
    pytest.param((3, 0, 5, 5, 4, 2), id="empty-batch"),
    pytest.param((3, 2, 0, 5, 4, 2), id="no-units"),
]
WIDE = [  # in float32 on a GPU of 132 multiprocessors: two samples to a cluster of 8 blocks, 16 blocks to a cluster, a loop
    pytest.param((2, 17, 199, 12, 40, 4), id="two-samples"),
    pytest.param((2, 2, 256, 128, 40, 4), id="16-blocks"),
    pytest.param((2, 1, 600, 4, 3, 1), id="no-room"),
]
HEADS = [
    {"write_vector": vector, "sharpness": sharpness}
    for vector, sharpness in itertools.product(("separate", "key"), ("learned", None, 2.5))
]
NAMES = (
    "gates hidden cell memory read_weights usage reads hidden_weight hidden_bias reads_weight head_weight head_bias"
).split()
CONSTANT = NAMES.index("usage")
OF_SAMPLES = ("gates", "hidden", "cell", "memory", "read_weights", "usage", "reads")


def cell_inputs(
    steps, batch, size, slots, width, heads, write_vector="separate", sharpness="learned", controller="lstm"
):
    """Arguments of ops.cell as a flat list, in the order of NAMES; slots differ in usage, weights are as large as a layer's."""

    def normal(*sizes):
        return torch.randn(*sizes, dtype=torch.float64)

    gates, states = CONTROLLERS[controller]
    values = sum(head_sizes(heads, width, write_vector, sharpness))
    inputs = {
        "gates": normal(steps, batch, gates * size),
        "hidden": normal(batch, size),
        "cell": normal(batch, size),
        **distinct_state(batch, slots, width, heads)._asdict(),
        "reads": normal(batch, heads, width),
        "hidden_weight": normal(gates * size, size) / size**0.5,
        "hidden_bias": normal(gates * size),
        "reads_weight": normal(gates * size, heads * width) / (heads * width) ** 0.5,
        "head_weight": 2 * normal(values, size) / size**0.5,
        "head_bias": normal(values),
    }
    missing = {"hidden", "cell"} - set(states) | (set() if states else {"hidden_weight", "hidden_bias"})
    return [None if name in missing else inputs[name] for name in NAMES]


def call(function, inputs, **options):
    """All results as a dict: output, the controller's state, memory, read_weights, usage, the last reads."""
    gates, hidden, cell, memory, read_weights, usage, *rest = inputs
    state = tuple(x for x in (hidden, cell) if x is not None)
    output, state, memory, reads = function(
        gates, state, reference.LRUAState(memory, read_weights, usage), *rest, **options
    )
    state = dict(zip(("hidden", "cell"), state, strict=False))
    return {"output": output, **state, **memory._asdict(), "reads": reads}


def loss_of(results):
    """A fixed random functional of all that is differentiable, but the last reads, which the output has, too; test_sequences
    looks at theirs."""
    generator = torch.Generator("cpu").manual_seed(1)
    return sum(
        (x.double() * fixed_noise(x, generator).double()).sum()
        for name, x in results.items()
        if name not in ("usage", "reads")
    )


def results_and_gradients(function, inputs, dtype, only=None, **options):
    tensors = [None if x is None else x.detach().to(dtype or x.dtype, copy=True) for x in inputs]
    wanted = {
        name: x.requires_grad_()
        for i, (name, x) in enumerate(zip(NAMES, tensors, strict=True))
        if x is not None and i != CONSTANT and only in (None, i)
    }
    results = call(function, tensors, **options)
    assert not results["usage"].requires_grad
    gradients = torch.autograd.grad(
        loss_of(results), list(wanted.values()), allow_unused=True, materialize_grads=True
    )
    return results, dict(zip(wanted, gradients, strict=True))


def compare(actual, expected, tolerance):
    assert actual[0].keys() == expected[0].keys()
    for name, y in expected[0].items():
        assert worst_error(actual[0][name], y, batch_axis=1 if name == "output" else 0) < tolerance, name
    for name, y in expected[1].items():
        x = actual[1][name]
        if name not in OF_SAMPLES:
            x, y = x[None], y[None]
        assert worst_error(x, y, batch_axis=1 if name == "gates" else 0) < 10 * tolerance, (
            f"gradient of {name}"
        )


RESULTS = [
    (controller, name)
    for controller, (_, states) in CONTROLLERS.items()
    for name in ("output", *states, "memory", "read_weights")
]
SAMPLE_INPUTS = [
    (controller, name)
    for controller, (_, states) in CONTROLLERS.items()
    for name in ("gates", *states, "memory", "read_weights", "reads")
]


def same_bits(x, y, select=lambda name, tensor: tensor):
    return all(torch.equal(select(name, x[name]), select(name, y[name])) for name in x)


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("heads_options", HEADS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("options", OPTIONS[::3])
@pytest.mark.parametrize(
    "shape", SHAPES if BACKEND == "cpp" else SHAPES[1:]
)  # the CUDA kernels have no room for the first
def test_matches_reference_in_float64(shape, options, heads_options, controller):
    heads_options = heads_options | {"controller": controller}
    inputs = cell_inputs(*shape, **heads_options)
    options = options | heads_options
    actual = results_and_gradients(ops.cell, inputs, torch.float64, **options)
    compare(actual, results_and_gradients(reference.cell, inputs, torch.float64, **options), 1e-10)


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [*SHAPES[:6], *WIDE])
def test_matches_reference_in_float32(shape, options, controller):
    """Usages differ by so much that float32 chooses the same slots; a learned sharpness makes the most of every error."""
    options = options | {"controller": controller}
    inputs = [None if x is None else x.float().double() for x in cell_inputs(*shape, controller=controller)]
    actual = results_and_gradients(ops.cell, inputs, torch.float32, **options)
    tolerance = 5e-5 if BACKEND == "cpp" else 1e-4  # plain PyTorch in float32: up to 4.5e-5 here
    compare(actual, results_and_gradients(reference.cell, inputs, torch.float64, **options), tolerance)


def test_decay_and_eps():
    inputs = cell_inputs(6, 3, 9, 12, 5, 2)
    options = {"usage_decay": 0.6, "eps": 1e-2}
    actual = results_and_gradients(ops.cell, inputs, torch.float64, **options)
    compare(actual, results_and_gradients(reference.cell, inputs, torch.float64, **options), 1e-11)


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_gradients_reach_only_what_asks_for_them(controller):
    inputs = cell_inputs(4, 3, 9, 8, 5, 2, controller=controller)
    _, expected = results_and_gradients(ops.cell, inputs, torch.float64, controller=controller)
    for i, name in enumerate(NAMES):
        if name in expected:
            _, actual = results_and_gradients(ops.cell, inputs, torch.float64, only=i, controller=controller)
            assert list(actual) == [name] and torch.equal(actual[name], expected[name])


@pytest.mark.parametrize("controller, name", RESULTS)
def test_gradient_of_one_result_alone(controller, name):
    inputs = cell_inputs(5, 2, 9, 8, 5, 2, controller=controller)
    gradients = []
    for function in (ops.cell, reference.cell):
        tensors = [x if x is None else x.detach().requires_grad_(i != CONSTANT) for i, x in enumerate(inputs)]
        loss = call(function, tensors, controller=controller)[name].square().sum()
        wanted = [x for x in tensors if x is not None and x.requires_grad]
        gradients.append(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
    for x, y in zip(*gradients, strict=True):
        assert worst_error(x[None], y[None]) < 1e-10


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("heads_options", HEADS[:4], ids=lambda o: "-".join(map(str, o.values())))
def test_gradcheck(heads_options, controller):
    options = heads_options | {"controller": controller}
    inputs = cell_inputs(3, 2, 4, 6, 3, 2, **options)
    wanted = [i for i, x in enumerate(inputs) if x is not None and i != CONSTANT]

    def function(*tensors):
        everything = list(inputs)
        for i, x in zip(wanted, tensors, strict=True):
            everything[i] = x
        return tuple(x for name, x in call(ops.cell, everything, **options).items() if name != "usage")

    # Each number's derivative by itself on processors; elsewhere along random directions, which takes a few calls only.
    assert torch.autograd.gradcheck(
        function, [inputs[i].requires_grad_() for i in wanted], fast_mode=BACKEND != "cpp"
    )


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_halves_and_whole_and_single_samples_are_the_same_bits(controller):
    inputs = cell_inputs(21, 11, 30, 40, 8, 3, controller=controller)
    inputs = {name: x if x is None else x.float() for name, x in zip(NAMES, inputs, strict=True)}
    gates = inputs["gates"]

    def run(**changes):
        return call(ops.cell, list((inputs | changes).values()), controller=controller)

    whole = run()
    first = run(gates=gates[:13])
    carried = {name: x for name, x in first.items() if name != "output"}
    assert torch.equal(first["output"][-1, :, 30:], carried["reads"].flatten(1))
    second = run(gates=gates[13:], **carried)
    assert torch.equal(whole["output"], torch.cat([first["output"], second["output"]]))
    assert all(torch.equal(x, whole[name]) for name, x in second.items() if name != "output")
    one = {name: x[4:5] for name, x in inputs.items() if name in OF_SAMPLES[1:] and x is not None}
    alone = run(gates=gates[:, 4:5], **one)
    assert torch.equal(alone["output"], whole["output"][:, 4:5])
    assert all(torch.equal(x, whole[name][4:5]) for name, x in alone.items() if name != "output")


@needs_cpp
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_same_bits_on_every_number_of_threads(controller):
    inputs = cell_inputs(9, 13, 20, 24, 6, 2, controller=controller)
    threads = torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results, gradients = results_and_gradients(ops.cell, inputs, torch.float32, controller=controller)
            # The weights' gradients are products of torch
            outputs.append(
                results | {f"grad {name}": gradients[name] for name in OF_SAMPLES if name in gradients}
            )
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("controller, name", SAMPLE_INPUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_value_stays_in_its_sample(name, value, controller):
    inputs = cell_inputs(5, 4, 9, 12, 5, 2, controller=controller)
    bad = NAMES.index(name)
    clean = results_and_gradients(ops.cell, inputs, torch.float32, controller=controller)
    inputs[bad] = inputs[bad].clone()
    sample = inputs[bad].select(1 if name == "gates" else 0, 1)
    sample[(0,) * sample.dim()] = value
    dirty = results_and_gradients(ops.cell, inputs, torch.float32, controller=controller)
    if value != value:  # an infinity may saturate a gate
        assert not dirty[0]["output"][:, 1].isfinite().all()

    def others(name, x):
        return x[:, [0, 2, 3]] if name in ("output", "gates") else x[[0, 2, 3]]

    assert same_bits(clean[0], dirty[0], others)
    of_samples = [{name: x[1][name] for name in OF_SAMPLES if name in x[1]} for x in (clean, dirty)]
    assert same_bits(*of_samples, others)


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_saturated_gates_stay_finite(controller):
    inputs = cell_inputs(6, 3, 9, 12, 5, 2, controller=controller)
    inputs[0] *= 1e4
    inputs[-1] *= 1e4
    results, gradients = results_and_gradients(ops.cell, inputs, torch.float32, controller=controller)
    assert all(x.isfinite().all() for x in (*results.values(), *gradients.values()))


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_autocast_does_not_reach_the_weights_gradients(controller):
    inputs = cell_inputs(6, 3, 9, 12, 5, 2, controller=controller)
    expected = results_and_gradients(ops.cell, inputs, torch.float32, controller=controller)
    with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
        actual = results_and_gradients(ops.cell, inputs, torch.float32, controller=controller)
    assert all(same_bits(x, y) for x, y in zip(actual, expected, strict=True))


def test_a_weight_may_be_part_of_the_columns_of_a_wider_one():
    inputs = cell_inputs(5, 3, 9, 12, 5, 2)
    expected = call(ops.cell, inputs)
    place = NAMES.index("reads_weight")
    wide = torch.full((36, 13), float("nan"), dtype=torch.float64)
    wide[:, 3:] = inputs[place]
    assert same_bits(call(ops.cell, [*inputs[:place], wide[:, 3:], *inputs[place + 1 :]]), expected)


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("steps", [0, 2])
def test_results_share_no_storage(steps, controller):
    inputs = cell_inputs(steps, 2, 9, 12, 5, 2, controller=controller)
    results = call(ops.cell, inputs, controller=controller)
    tensors = [x for x in [*inputs, *results.values()] if x is not None and x.numel()]
    assert len({x.untyped_storage().data_ptr() for x in tensors}) == len(tensors)


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_no_steps_give_the_state_back(controller):
    inputs = [
        x if x is None else x.requires_grad_() for x in cell_inputs(0, 2, 5, 9, 4, 2, controller=controller)
    ]
    results = call(ops.cell, inputs, controller=controller)
    assert results["output"].shape == (0, 2, 5 + 2 * 4)
    for name in set(results) - {"output"}:
        given = inputs[NAMES.index(name)]
        assert torch.equal(results[name], given)
        if name != "usage":
            assert torch.equal(torch.autograd.grad(results[name].sum(), given)[0], torch.ones_like(given))


@pytest.mark.parametrize("anchor_every", [0, 3])
@pytest.mark.parametrize("steps", [0, 7])
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_opcheck(controller, steps, anchor_every):
    inputs = [x if x is None else x.float() for x in cell_inputs(steps, 2, 5, 6, 3, 2, controller=controller)]
    options = (list(CONTROLLERS).index(controller), True, True, 1.0, 10.0, False, False)
    sequences = (None, None, None)
    arguments = (*inputs, *sequences, *options, 0.95, 1e-6, False, anchor_every)
    torch.library.opcheck(RAW_OPS.cell.default, arguments)
    if anchor_every:
        output, *results = RAW_OPS.cell(*arguments)
        named = dict(zip(NAMES, inputs, strict=True))
        saved = [named[name] for name in ("hidden", "cell", "memory", "read_weights", "hidden_weight")]
        saved += [named["reads_weight"], named["head_weight"], *results[6:]]
        grads = (output, None, None, named["reads"], None, named["read_weights"])
        arguments = (*grads, *saved, *sequences, *options, 1e-6, False, anchor_every)
        torch.library.opcheck(RAW_OPS.cell_backward.default, arguments)


@pytest.mark.once
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_compiles_in_one_graph(controller, dynamic):
    torch.compiler.reset()
    inputs = cell_inputs(5, 3, 9, 12, 5, 2, controller=controller)
    compiled = torch.compile(ops.cell, fullgraph=True, dynamic=dynamic)
    actual = results_and_gradients(compiled, inputs, torch.float64, controller=controller)
    compare(actual, results_and_gradients(ops.cell, inputs, torch.float64, controller=controller), 1e-12)


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize(("dtype", "fast"), HALVES)
@pytest.mark.parametrize("shape", [(6, 9, 50, 33, 17, 2), (3, 2, 7, 9, 5, 3)])
def test_half_precision_is_as_good_as_plain_pytorch(shape, dtype, fast, controller, monkeypatch):
    """Odd sizes, so that the last pair of a product has one factor only. Rounding hardly ever changes which slot is least used
    here: the slots' usage is far apart."""
    say_fast_bfloat16(monkeypatch, fast)
    inputs = cell_inputs(*shape, controller=controller)
    state = ("memory", "read_weights", "usage")
    rounded = [
        None if x is None else x.to(torch.float32 if name in state else dtype)
        for name, x in zip(NAMES, inputs, strict=True)
    ]
    exact_inputs = [None if x is None else x.double() for x in rounded]
    exact = results_and_gradients(reference.cell, exact_inputs, None, controller=controller)
    fused = results_and_gradients(ops.cell, rounded, None, controller=controller)
    plain = results_and_gradients(reference.cell, rounded, None, controller=controller)
    wide = [None if x is None else x.float() for x in rounded]
    output = results_and_gradients(ops.cell, wide, None, controller=controller)[0]["output"]
    in_float32 = not fast or BACKEND != "cpp"
    assert torch.equal(fused[0]["output"], output.to(dtype)) == in_float32
    for part, factor in ((0, 2), (1, 3)):
        for name, y in plain[part].items():
            assert fused[part][name].dtype == y.dtype
            if part == 0 and name == "reads":  # too few to compare their worst; the output has them, too
                assert torch.equal(fused[0]["reads"].flatten(1), fused[0]["output"][-1, :, shape[2] :])
                continue
            error, bound = (
                worst_error(x.flatten()[None], exact[part][name].flatten()[None])
                for x in (fused[part][name], y)
            )
            assert error <= factor * bound + 1e-6, name


WRONG = [
    ("gates", torch.zeros(3, 2, 9).double(), ValueError, r"= \[3, 2, 16\], got \[3, 2, 9\]"),
    ("gates", torch.zeros(3, 2, 16), TypeError, "gates must have dtype torch.float64"),
    ("hidden", 1.0, TypeError, r"state.hidden must be a tensor, got float"),
    ("hidden", None, TypeError, "state.hidden must be a tensor, got NoneType"),
    ("cell", None, TypeError, "state.cell must be a tensor, got NoneType"),
    ("cell", torch.zeros(2, 5).double(), ValueError, r"state.cell must have .* = \[2, 4\], got \[2, 5\]"),
    ("memory", torch.zeros(2, 6).double(), ValueError, "memory.memory must have shape"),
    ("reads", torch.zeros(2, 2, 4).double(), ValueError, r"reads must have shape \[B, R, D\] = \[2, 2, 3\]"),
    ("hidden_weight", torch.zeros(16, 4), TypeError, "hidden_weight must have the dtype of gates"),
    ("hidden_weight", None, TypeError, "hidden_weight must be a tensor, got NoneType"),
    ("hidden_bias", torch.zeros(4).double(), ValueError, r"hidden_bias must have .* = \[16\], got \[4\]"),
    ("reads_weight", torch.zeros(16, 7).double(), ValueError, r"reads_weight must have .* = \[16, 6\]"),
    ("head_weight", torch.zeros(15, 4).double(), ValueError, r"head_weight must have .* = \[16, 4\]"),
    (
        "head_bias",
        torch.zeros(16, device="meta").double(),
        RuntimeError,
        "head_bias must be on the device of",
    ),
]


@pytest.mark.parametrize("backend", ["reference", "tested"])
@pytest.mark.parametrize("name, value, error, message", WRONG)
def test_wrong_arguments_are_named(name, value, error, message, backend):
    inputs = cell_inputs(3, 2, 4, 6, 3, 2)
    gates, hidden, cell, *rest = [
        value if name == other else x for other, x in zip(NAMES, inputs, strict=True)
    ]
    with served_by(backend), pytest.raises(error, match=message):
        ops.cell(gates, (hidden, cell), reference.LRUAState(*rest[:3]), *rest[3:])


def test_wrong_options_are_named():
    inputs = cell_inputs(3, 2, 4, 6, 3, 2)
    call(ops.cell, inputs, eps=1.0)
    for options, error, message in (
        (
            {"controller": "rnn"},
            ValueError,
            "controller must be one of 'lstm', 'gru', 'feedforward', got 'rnn'",
        ),
        (
            {"controller": "gru"},
            TypeError,
            r"state must be a tuple \(hidden\) of this controller, got 2 entries",
        ),
        ({"write_vector": "both"}, ValueError, "write_vector must be one of 'separate', 'key', got 'both'"),
        ({"sharpness": "high"}, ValueError, "sharpness must be 'learned', a number or None, got 'high'"),
        ({"sharpness": float("inf")}, ValueError, "sharpness must be finite"),
        ({"order": 1}, ValueError, "order must be one of"),
        ({"eps": 0}, ValueError, "eps must be positive"),
        ({"eps": True}, TypeError, "eps must be a number, got bool"),  # though equal to one that has passed
    ):
        with pytest.raises(error, match=message):
            call(ops.cell, inputs, **options)
    memory = reference.LRUAState(*inputs[3:6])
    with pytest.raises(
        TypeError, match=r"state must be a tuple \(hidden, cell\) of this controller, got Tensor"
    ):
        ops.cell(inputs[0], inputs[1], memory, *inputs[6:])
    with pytest.raises(TypeError, match="memory must be an LRUAState"):
        ops.cell(inputs[0], (inputs[1], inputs[2]), inputs[3], *inputs[6:])
    inputs = cell_inputs(3, 2, 4, 6, 3, 2, controller="feedforward")
    with pytest.raises(
        TypeError, match="hidden_weight must be None for a feed-forward controller, got Tensor"
    ):
        ops.cell(inputs[0], (), memory, inputs[6], torch.zeros(4, 4), *inputs[8:], controller="feedforward")


@pytest.mark.skipif(BACKEND == "cpp", reason="only the CUDA kernels are asked for room")
def test_asking_for_room_is_no_part_of_an_exported_graph(monkeypatch):
    monkeypatch.setattr(
        sys.modules["mann_fast.ops._cell"], "_answers", {}
    )  # as at the first call of a process
    layer = MemoryLayer(3, 5, num_slots=6, slot_size=4, num_heads=2)
    program = torch.export.export(layer, (torch.randn(4, 2, 3),), strict=False)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "mann_fast_cuda.cell.default" in called and not any("cell_fits" in name for name in called)


@needs_cpp
def test_shapes_alone_have_gradients_of_shapes():
    inputs = [x.to("meta").requires_grad_(i != CONSTANT) for i, x in enumerate(cell_inputs(3, 2, 4, 6, 3, 2))]
    wanted = [x for x in inputs if x.requires_grad]
    gradients = torch.autograd.grad(call(ops.cell, inputs)["output"].sum(), wanted)
    assert [x.shape for x in gradients] == [x.shape for x in wanted]
