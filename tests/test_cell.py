"""ops.cell against its reference: values, gradients, and what is promised beside them."""

import itertools

import pytest
import torch
from cases import OPTIONS, distinct_state, needs_cpp, worst_error

import mann_fast
from mann_fast import ops, reference
from mann_fast.reference.cell import head_sizes

pytestmark = needs_cpp

SHAPES = [  # T, B, H, N, D, R
    pytest.param((12, 3, 200, 128, 40, 4), id="paper"),
    pytest.param((5, 17, 7, 9, 5, 3), id="several-blocks"),
    pytest.param((3, 1, 1, 1, 1, 1), id="ones"),
    pytest.param((4, 8, 33, 6, 3, 6), id="as-many-heads-as-slots"),
    pytest.param((9, 2, 50, 33, 17, 5), id="5-heads"),
    pytest.param((20, 5, 16, 40, 3, 2), id="several-anchors"),
    pytest.param((0, 2, 5, 5, 4, 2), id="no-steps"),
    pytest.param((3, 0, 5, 5, 4, 2), id="empty-batch"),
]
HEADS = [
    {"write_vector": vector, "sharpness": sharpness}
    for vector, sharpness in itertools.product(("separate", "key"), ("learned", None, 2.5))
]
NAMES = "gates hidden cell memory read_weights usage reads hidden_weight reads_weight head_weight head_bias"
CONSTANT = NAMES.split().index("usage")


def cell_inputs(steps, batch, size, slots, width, heads, write_vector="separate", sharpness="learned"):
    """Arguments of ops.cell as a flat list, in the order of NAMES; slots differ in usage, weights are as large as a layer's."""

    def weight(rows, columns):
        return torch.randn(rows, columns, dtype=torch.float64) / columns**0.5

    values = sum(head_sizes(heads, width, write_vector, sharpness))
    state = distinct_state(batch, slots, width, heads)
    return [
        torch.randn(steps, batch, 4 * size, dtype=torch.float64),
        torch.randn(batch, size, dtype=torch.float64),
        torch.randn(batch, size, dtype=torch.float64),
        *state,
        torch.randn(batch, heads, width, dtype=torch.float64),
        weight(4 * size, size),
        weight(4 * size, heads * width),
        2 * weight(values, size),
        torch.randn(values, dtype=torch.float64),
    ]


def call(function, inputs, **options):
    """All results as a flat list: output, hidden, cell, memory, read weights, usage."""
    gates, hidden, cell, memory, read_weights, usage, *rest = inputs
    state = reference.LRUAState(memory, read_weights, usage)
    output, controller, state = function(gates, (hidden, cell), state, *rest, **options)
    return [output, *controller, *state]


def results_and_gradients(function, inputs, dtype, only=None, **options):
    tensors = [x.detach().to(dtype) for x in inputs]
    wanted = [x.requires_grad_() for i, x in enumerate(tensors) if i != CONSTANT and only in (None, i)]
    results = call(function, tensors, **options)
    assert not results[5].requires_grad
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x.double() * torch.randn(x.shape, generator=generator).double()).sum()
        for i, x in enumerate(results)
        if i != 5
    )
    return results, torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)


def compare(actual, expected, tolerance):
    for i, (x, y) in enumerate(zip(actual[0], expected[0], strict=True)):
        assert worst_error(x, y, batch_axis=1 if i == 0 else 0) < tolerance, f"result {i}"
    names = [name for name in NAMES.split() if name != "usage"]
    for name, x, y in zip(names, actual[1], expected[1], strict=True):
        if name in ("gates", "hidden", "cell", "memory", "read_weights", "reads"):
            error = worst_error(x, y, batch_axis=1 if name == "gates" else 0)
        else:
            error = worst_error(x[None], y[None])
        assert error < 10 * tolerance, name


@pytest.mark.parametrize("heads_options", HEADS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference_in_float64(shape, options, heads_options):
    inputs = cell_inputs(*shape, **heads_options)
    options = options | heads_options
    actual = results_and_gradients(ops.cell, inputs, torch.float64, **options)
    compare(actual, results_and_gradients(reference.cell, inputs, torch.float64, **options), 1e-10)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize("shape", SHAPES[:6])
def test_matches_reference_in_float32(shape, options):
    """Usages differ by so much that float32 chooses the same slots; a learned sharpness makes the most of every error."""
    inputs = [x.float().double() for x in cell_inputs(*shape)]
    actual = results_and_gradients(ops.cell, inputs, torch.float32, **options)
    compare(actual, results_and_gradients(reference.cell, inputs, torch.float64, **options), 5e-5)


def test_decay_and_eps():
    inputs = cell_inputs(6, 3, 9, 12, 5, 2)
    options = {"usage_decay": 0.6, "eps": 1e-2}
    actual = results_and_gradients(ops.cell, inputs, torch.float64, **options)
    compare(actual, results_and_gradients(reference.cell, inputs, torch.float64, **options), 1e-11)


def test_gradients_reach_only_what_asks_for_them():
    inputs = cell_inputs(4, 3, 9, 8, 5, 2)
    _, expected = results_and_gradients(ops.cell, inputs, torch.float64)
    for i in range(len(inputs)):
        if i != CONSTANT:
            _, (actual,) = results_and_gradients(ops.cell, inputs, torch.float64, only=i)
            assert torch.equal(actual, expected[i - (i > CONSTANT)])


@pytest.mark.parametrize("index", range(5))
def test_gradient_of_one_result_alone(index):
    inputs = cell_inputs(5, 2, 9, 8, 5, 2)
    gradients = []
    for function in (ops.cell, reference.cell):
        tensors = [x.detach().requires_grad_(i != CONSTANT) for i, x in enumerate(inputs)]
        wanted = [x for x in tensors if x.requires_grad]
        gradients.append(
            torch.autograd.grad(
                call(function, tensors)[index].square().sum(),
                wanted,
                allow_unused=True,
                materialize_grads=True,
            )
        )
    for x, y in zip(*gradients, strict=True):
        assert worst_error(x[None], y[None]) < 1e-10


@pytest.mark.parametrize("heads_options", HEADS[:4], ids=lambda o: "-".join(map(str, o.values())))
def test_gradcheck(heads_options):
    inputs = cell_inputs(3, 2, 4, 6, 3, 2, **heads_options)
    tensors = [x.requires_grad_() for i, x in enumerate(inputs) if i != CONSTANT]

    def function(*tensors):
        results = call(
            ops.cell, [*tensors[:CONSTANT], inputs[CONSTANT], *tensors[CONSTANT:]], **heads_options
        )
        return tuple(x for i, x in enumerate(results) if i != 5)

    assert torch.autograd.gradcheck(function, tensors)


def test_halves_and_whole_and_single_samples_are_the_same_bits():
    inputs = [x.float() for x in cell_inputs(21, 11, 30, 40, 8, 3)]
    whole = call(ops.cell, inputs)
    first = call(ops.cell, [inputs[0][:13], *inputs[1:]])
    reads = first[0][-1, :, 30:].reshape(11, 3, 8)
    second = call(ops.cell, [inputs[0][13:], *first[1:], reads, *inputs[7:]])
    assert torch.equal(whole[0], torch.cat([first[0], second[0]]))
    for x, y in zip(whole[1:], second[1:], strict=True):
        assert torch.equal(x, y)
    alone = call(ops.cell, [inputs[0][:, 4:5], *(x[4:5] for x in inputs[1:7]), *inputs[7:]])
    assert torch.equal(alone[0], whole[0][:, 4:5])
    assert all(torch.equal(x, y[4:5]) for x, y in zip(alone[1:], whole[1:], strict=True))


def test_same_bits_on_every_number_of_threads():
    inputs = cell_inputs(9, 13, 20, 24, 6, 2)
    threads = torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results, gradients = results_and_gradients(ops.cell, inputs, torch.float32)
            outputs.append([*results, *gradients[:6]])  # the weights' are products of torch
    finally:
        torch.set_num_threads(threads)
    for other in outputs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(outputs[0], other, strict=True))


@pytest.mark.parametrize("index", [0, 1, 2, 3, 4, 6])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_value_stays_in_its_sample(index, value):
    inputs = [x.float() for x in cell_inputs(5, 4, 9, 12, 5, 2)]
    clean = results_and_gradients(ops.cell, inputs, torch.float32)
    inputs[index] = inputs[index].clone()
    sample = inputs[index].select(1 if index == 0 else 0, 1)
    sample[(0,) * sample.dim()] = value
    dirty = results_and_gradients(ops.cell, inputs, torch.float32)
    others = [0, 2, 3]
    if value != value:  # an infinity may saturate a gate
        assert not dirty[0][0][:, 1].isfinite().all()
    assert torch.equal(clean[0][0][:, others], dirty[0][0][:, others])
    assert all(torch.equal(x[others], y[others]) for x, y in zip(clean[0][1:], dirty[0][1:], strict=True))
    assert torch.equal(clean[1][0][:, others], dirty[1][0][:, others])
    assert all(torch.equal(x[others], y[others]) for x, y in zip(clean[1][1:6], dirty[1][1:6], strict=True))


def test_saturated_gates_stay_finite():
    inputs = [x.float() for x in cell_inputs(6, 3, 9, 12, 5, 2)]
    inputs[0] *= 1e4
    inputs[10] *= 1e4
    results, gradients = results_and_gradients(ops.cell, inputs, torch.float32)
    assert all(x.isfinite().all() for x in (*results, *gradients))


def test_strided_inputs():
    inputs = cell_inputs(5, 3, 9, 12, 5, 2)
    expected = call(ops.cell, inputs)

    def strided(x):
        larger = torch.full((*[n + 1 for n in reversed(x.shape)],), float("nan"), dtype=x.dtype)
        view = larger.permute(*reversed(range(x.dim())))[tuple(slice(0, n) for n in x.shape)]
        return view.copy_(x)

    for x, y in zip(call(ops.cell, list(map(strided, inputs))), expected, strict=True):
        assert torch.equal(x, y)
    wide = torch.full((36, 13), float("nan"), dtype=torch.float64)
    wide[:, 3:] = inputs[8]
    for x, y in zip(call(ops.cell, [*inputs[:8], wide[:, 3:], *inputs[9:]]), expected, strict=True):
        assert torch.equal(x, y)


def test_results_share_no_storage():
    for steps in (0, 2):
        inputs = cell_inputs(steps, 2, 9, 12, 5, 2)
        tensors = [x for x in [*inputs, *call(ops.cell, inputs)] if x.numel()]
        assert len({x.untyped_storage().data_ptr() for x in tensors}) == len(tensors)


def test_opcheck():
    for size, steps, anchor_every in itertools.product((5,), (7, 0), (0, 3)):
        inputs = [x.float() for x in cell_inputs(steps, 2, size, 6, 3, 2)]
        arguments = (*inputs, True, True, 1.0, 10.0, False, False, 0.95, 1e-6, anchor_every)
        torch.library.opcheck(torch.ops.mann_fast.cell.default, arguments)
        if anchor_every:
            output, *results = torch.ops.mann_fast.cell(*arguments)
            saved = (inputs[2], inputs[3], inputs[4], *inputs[7:10], *results[4:])
            torch.library.opcheck(
                torch.ops.mann_fast.cell_backward.default,
                (
                    output,
                    None,
                    None,
                    inputs[4],
                    *saved,
                    True,
                    True,
                    1.0,
                    10.0,
                    False,
                    False,
                    1e-6,
                    anchor_every,
                ),
            )


@pytest.mark.parametrize("heads_options", HEADS[::4], ids=lambda o: "-".join(map(str, o.values())))
def test_compiles_in_one_graph(heads_options):
    torch.compiler.reset()
    inputs = cell_inputs(5, 3, 9, 12, 5, 2, **heads_options)
    compiled = torch.compile(ops.cell, fullgraph=True)
    actual = results_and_gradients(compiled, inputs, torch.float64, **heads_options)
    compare(actual, results_and_gradients(ops.cell, inputs, torch.float64, **heads_options), 1e-12)


def test_second_derivatives_and_forward_mode_are_refused():
    inputs = cell_inputs(3, 2, 4, 6, 3, 2)

    def output(gates):
        return call(ops.cell, [gates, *inputs[1:]])[0]

    gates = inputs[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(output(gates).square().sum(), gates, create_graph=True)
    with pytest.raises(NotImplementedError, match="cell has no second derivative"):
        grad.square().sum().backward()
    weight = inputs[7].clone().requires_grad_()
    result = call(ops.cell, [*inputs[:7], weight, *inputs[8:]])[0]
    (grad,) = torch.autograd.grad(result.square().sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="cell has no second derivative"):
        grad.square().sum().backward()
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.jvp(output, (inputs[0],), (torch.ones_like(inputs[0]),))
    loss = lambda x: output(x).square().sum()  # noqa: E731
    expected = torch.autograd.grad(loss(gates), gates)[0]
    assert torch.equal(torch.func.grad(loss)(inputs[0]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_fused_steps(dtype):
    inputs = [
        x.to(torch.float32 if i in (3, 4, 5) else dtype) for i, x in enumerate(cell_inputs(4, 2, 9, 12, 5, 2))
    ]
    actual, expected = call(ops.cell, inputs), call(reference.cell, inputs)
    assert [x.dtype for x in actual] == [dtype] * 3 + [torch.float32] * 3
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert worst_error(x, y, batch_axis=1 if i == 0 else 0) < 0.02


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(
    "place, value, error, message",
    [
        (
            0,
            torch.zeros(3, 2, 9).double(),
            ValueError,
            r"gates must have shape \[T, B, 4H\] = \[3, 2, 16\], got \[3, 2, 9\]",
        ),
        (0, torch.zeros(3, 2, 16), TypeError, "gates must have dtype torch.float64"),
        (1, 1.0, TypeError, r"controller\[0\] must be a tensor, got float"),
        (
            2,
            torch.zeros(2, 5).double(),
            ValueError,
            r"controller\[1\] must have shape \[B, H\] = \[2, 4\], got \[2, 5\]",
        ),
        (3, torch.zeros(2, 6).double(), ValueError, "memory.memory must have shape"),
        (6, torch.zeros(2, 2, 4).double(), ValueError, r"reads must have shape \[B, R, D\] = \[2, 2, 3\]"),
        (7, torch.zeros(16, 4), TypeError, "hidden_weight must have the dtype of gates"),
        (
            8,
            torch.zeros(16, 7).double(),
            ValueError,
            r"reads_weight must have shape .* = \[16, 6\], got \[16, 7\]",
        ),
        (
            9,
            torch.zeros(15, 4).double(),
            ValueError,
            r"head_weight must have shape .* = \[16, 4\], got \[15, 4\]",
        ),
        (
            10,
            torch.zeros(16, device="meta").double(),
            RuntimeError,
            "head_bias must be on the device of gates",
        ),
    ],
)
def test_wrong_arguments_are_named(place, value, error, message, backend):
    inputs = cell_inputs(3, 2, 4, 6, 3, 2)
    inputs[place] = value
    with mann_fast.backend(backend), pytest.raises(error, match=message):
        call(ops.cell, inputs)


def test_wrong_options_are_named():
    inputs = cell_inputs(3, 2, 4, 6, 3, 2)
    for options, error, message in (
        ({"write_vector": "both"}, ValueError, "write_vector must be one of 'separate', 'key', got 'both'"),
        ({"sharpness": "high"}, ValueError, "sharpness must be 'learned', a number or None, got 'high'"),
        ({"sharpness": float("inf")}, ValueError, "sharpness must be finite"),
        ({"order": 1}, ValueError, "order must be one of"),
        ({"eps": 0}, ValueError, "eps must be positive"),
    ):
        with pytest.raises(error, match=message):
            call(ops.cell, inputs, **options)
    with pytest.raises(TypeError, match=r"controller must be a tuple \(hidden, cell\), got Tensor"):
        ops.cell(inputs[0], inputs[1], reference.LRUAState(*inputs[3:6]), *inputs[6:])
    with pytest.raises(TypeError, match="memory must be an LRUAState"):
        ops.cell(inputs[0], (inputs[1], inputs[2]), inputs[3], *inputs[6:])
