"""least_used, lrua_write, lrua_step and lrua_scan against the float64 reference, and what SPEC promises beside values."""

import pytest
import torch
from cases import (
    OPTIONS,
    RAW_OPS,
    WRITE_TARGETS,
    distinct_state,
    fixed_noise,
    needs_cpp,
    needs_kernels,
    run_with_gradients,
    scan_inputs,
    shorter,
    worst_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mann_fast import _anchors, ops, reference

pytestmark = needs_kernels


def scan_case(name, *sizes, interpreted=None, marks=()):
    return pytest.param(*shorter(sizes, interpreted or sizes), id=name, marks=marks)


SCANS = [  # T, B, N, D, R
    scan_case("paper", 13, 2, 128, 40, 4, interpreted=(2, 2, 128, 40, 4)),
    scan_case("small-odd", 5, 3, 7, 5, 3, interpreted=(3, 2, 7, 5, 3)),
    scan_case("ones", 1, 1, 1, 1, 1),
    scan_case("as-many-heads-as-slots", 4, 2, 6, 3, 6, interpreted=(2, 1, 6, 3, 6)),
    scan_case("5-heads", 9, 2, 33, 17, 5, interpreted=(2, 1, 33, 17, 5)),
    scan_case("several-anchors", 20, 2, 130, 3, 2, interpreted=(10, 1, 20, 3, 2)),
    scan_case("no-steps", 0, 2, 5, 4, 2),
    scan_case("empty-batch", 3, 0, 5, 4, 2),
    scan_case("slots-over-threads", 3, 1, 4096, 40, 4, interpreted=(2, 1, 700, 33, 2)),
    scan_case(
        "slots-over-threads-6-heads",
        11,
        1,
        1500,
        33,
        6,
        interpreted=(10, 1, 160, 130, 3),
        marks=pytest.mark.thorough,
    ),
]


def compare(actual, expected, tolerance, gradient_tolerance):
    for i, (x, y) in enumerate(zip(actual[0], expected[0], strict=True)):
        assert x.is_contiguous()
        assert worst_error(x, y, batch_axis=1 if i == 0 else 0) < tolerance, f"output {i}"
    for i, (x, y) in enumerate(zip(actual[1], expected[1], strict=True)):
        assert worst_error(x, y, batch_axis=1 if i > 1 else 0) < gradient_tolerance, f"gradient {i}"


@pytest.mark.parametrize("sharpness", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("steps, batch, slots, size, heads", SCANS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), *shorter([(torch.float64, 1e-11)], [])])
def test_scan_matches_reference(steps, batch, slots, size, heads, options, sharpness, dtype, tolerance):
    inputs = [
        *distinct_state(batch, slots, size, heads),
        *scan_inputs(steps, batch, size, heads, sharpness=sharpness),
    ]
    inputs = [None if x is None else x.to(dtype) for x in inputs]
    actual = run_with_gradients(ops.lrua_scan, inputs, dtype, **options)
    expected = run_with_gradients(reference.lrua_scan, inputs, torch.float64, **options)
    if (
        slots == 1
    ):  # all weights are 1, whatever key, gate and sharpness are: gradients of 0 have no relative error
        assert all(actual[1][i].abs().max() < tolerance for i in range(len(actual[1])) if i not in (0, 1, 3))
        actual, expected = ([x[0], [x[1][i] for i in (0, 1, 3)]] for x in (actual, expected))
    compare(actual, expected, tolerance, 10 * tolerance)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "batch, slots, size, heads", [(2, 128, 40, 4), (3, 9, 5, 3), (1, shorter(4096, 700), 40, 2)]
)
def test_step_matches_reference(batch, slots, size, heads, options):
    inputs = [*distinct_state(batch, slots, size, heads), *scan_inputs(None, batch, size, heads)]
    actual = run_with_gradients(ops.lrua_step, inputs, torch.float64, **options, usage_decay=0.7, eps=1e-3)
    expected = run_with_gradients(
        reference.lrua_step, inputs, torch.float64, **options, usage_decay=0.7, eps=1e-3
    )
    for x, y in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        assert worst_error(x, y) < 1e-11


@pytest.mark.parametrize("sharpness", [100.0, -100.0])
@pytest.mark.parametrize("slots, heads", [(40, 3), (shorter(300, 40), 4), (17, 1)])
@pytest.mark.parametrize("options", OPTIONS[::3])
def test_large_sharpness(options, slots, heads, sharpness):
    """An exponential of a similarity this large overflows unless the greatest is taken off. Gradients are compared with an
    eps that keeps the softmax from saturating, which leaves nothing of them."""
    state, inputs = distinct_state(2, slots, 9, heads), scan_inputs(shorter(6, 2), 2, 9, heads)
    inputs[3] = sharpness * (0.5 + 0.5 * torch.rand_like(inputs[3]))
    inputs = [x.float().double() for x in (*state, *inputs)]
    for eps in (1e-6, 1e4):
        actual = run_with_gradients(ops.lrua_scan, inputs, torch.float32, eps=eps, **options)
        expected = run_with_gradients(reference.lrua_scan, inputs, torch.float64, eps=eps, **options)
        for i, (x, y) in enumerate(zip(actual[0], expected[0], strict=True)):
            assert worst_error(x, y, batch_axis=1 if i == 0 else 0) < 1e-4
        assert all(x.isfinite().all() for x in actual[1])
    for i, (x, y) in enumerate(zip(actual[1], expected[1], strict=True)):
        assert worst_error(x, y, batch_axis=1 if i > 1 else 0) < 1e-4


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_than_plain_pytorch(dtype, options):
    """Plain PyTorch here keeps memory and read weights in half precision too; usage and choice of slots are given."""
    state, inputs = distinct_state(2, 40, 24, 3), scan_inputs(shorter(12, 4), 2, 24, 3)
    inputs = [x.to(dtype) for x in inputs]
    state = reference.LRUAState(*(x.float() for x in state))
    actual = run_with_gradients(ops.lrua_scan, [*state, *inputs], dtype, **options)
    assert actual[0][0].dtype == dtype and actual[0][1].dtype == torch.float32
    assert [g.dtype for g in actual[1]] == [torch.float32, torch.float32, dtype, dtype, dtype, dtype]
    slots = chosen_slots(state, inputs, **options)
    oracle = run_with_gradients(reference.lrua_scan, [*state, *inputs], torch.float64, slots=slots, **options)

    def plain(half_state, *arguments, **kwargs):
        return reference.lrua_scan(
            reference.LRUAState(*(x.to(dtype) for x in half_state)), *arguments, **kwargs
        )

    baseline = run_with_gradients(plain, [*state, *inputs], dtype, slots=slots, **options)
    for factor, kind in ((2, 0), (3, 1)):
        for i, (x, b, y) in enumerate(zip(actual[kind], baseline[kind], oracle[kind], strict=True)):
            assert worst_error(x, y) <= factor * worst_error(b, y) + 1e-6, (
                f"{('output', 'gradient')[kind]} {i}"
            )


def chosen_slots(state, inputs, order="write_first", write_target="per_head"):
    """The slots that the kernel itself chose, which its raw op keeps for backward."""
    options = (order == "read_first", write_target == "shared", 0.95, 1e-6, 8)
    return RAW_OPS.lrua_scan(*state, *inputs, None, None, None, *options)[4]


@pytest.mark.parametrize(
    "steps, tolerance, gradient_tolerance", [(50, 1e-5, 1e-4), *shorter([(1000, 1e-5, 1e-3)], [])]
)
def test_long_runs_stay_accurate(steps, tolerance, gradient_tolerance):
    """From the initial state, full of ties: the reference replays the kernel's slots, since in float32 some usages nearly
    tie within a few steps."""
    state = ops.LRUAState.initial(1, 40, 16, 2)
    inputs = [torch.tanh(x.float()) for x in scan_inputs(steps, 1, 16, 2)[:2]]
    inputs += [torch.randn(steps, 1, 2), 1 + 10 * torch.rand(steps, 1, 2)]
    actual = run_with_gradients(ops.lrua_scan, [*state, *inputs], torch.float32)
    slots = chosen_slots(state, inputs)
    expected = run_with_gradients(reference.lrua_scan, [*state, *inputs], torch.float64, slots=slots)
    compare(actual, expected, tolerance, gradient_tolerance)


@pytest.mark.parametrize("slots", [19, 64, 131])
def test_equal_slots_keep_equal_bits_and_the_lower_is_chosen(slots):
    state = ops.LRUAState.initial(2, slots, 24, 3)
    keys, vectors, gates, sharpness = (x.float() for x in scan_inputs(12, 2, 24, 3))
    for t in range(12):
        chosen = ops.least_used(state.usage, 3)
        assert torch.equal(chosen, torch.sort(state.usage, stable=True).indices[:, :3])
        touched = torch.zeros(2, slots, dtype=torch.bool).scatter_(1, chosen, True)
        before = state
        _, state = ops.lrua_step(state, keys[t], vectors[t], gates[t], sharpness[t])
        for b in range(2):  # slots that were equal and were treated equally are equal
            rows = torch.cat(
                [before.memory[b], before.usage[b, :, None], before.read_weights[b].T, touched[b, :, None]], 1
            )
            _, group = rows.unique(dim=0, return_inverse=True)
            after = torch.cat([state.memory[b], state.usage[b, :, None], state.read_weights[b].T], 1)
            for g in range(int(group.max()) + 1):
                members = after[group == g]
                if not touched[b][group == g].any():
                    assert torch.equal(members, members[:1].expand_as(members))


@pytest.mark.parametrize("options", OPTIONS)
def test_steps_halves_and_whole_are_the_same_bits(options):
    inputs = [x.float() for x in scan_inputs(11, 3, 10, 4)]
    state = ops.LRUAState.initial(3, 21, 10, 4)
    whole, end = ops.lrua_scan(state, *inputs, **options)
    first, middle = ops.lrua_scan(state, *(x[:6] for x in inputs), **options)
    second, end_of_halves = ops.lrua_scan(middle, *(x[6:] for x in inputs), **options)
    assert torch.equal(whole, torch.cat([first, second]))
    for t in range(11):
        read, state = ops.lrua_step(state, *(x[t] for x in inputs), **options)
        assert torch.equal(read, whole[t])
    for x, y, z in zip(end, end_of_halves, state, strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


def test_step_is_write_then_read():
    state, (key, vector, gate, sharpness) = distinct_state(2, 9, 5, 3), scan_inputs(None, 2, 5, 3)
    read, after = ops.lrua_step(state, key, vector, gate, sharpness)
    memory, write_weights = ops.lrua_write(*state, vector, gate)
    expected_read, weights = ops.content_read(memory, key, sharpness)
    for x, y in [(after.memory, memory), (after.read_weights, weights), (read, expected_read)]:
        assert worst_error(x, y) < 1e-13
    assert worst_error(after.usage, 0.95 * state.usage + (weights + write_weights).sum(1)) < 1e-13


@pytest.mark.parametrize("write_target", WRITE_TARGETS)
@pytest.mark.parametrize(
    "batch, slots, size, heads",
    [(2, 128, 40, 4), (3, 7, 5, 3), (1, 1, 1, 1), (1, shorter(4096, 1100), 64, 4), (2, 70, 9, 5)],
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_write_matches_reference(batch, slots, size, heads, write_target, dtype, tolerance):
    state = [x.to(dtype) for x in distinct_state(batch, slots, size, heads)]
    _, vector, gate, _ = scan_inputs(None, batch, size, heads, dtype)

    def run(function, wanted):
        tensors = [x.detach().to(wanted).requires_grad_(i != 2) for i, x in enumerate((*state, vector, gate))]
        outputs = function(*tensors, write_target=write_target)
        generator = torch.Generator().manual_seed(1)
        loss = sum((x.double() * fixed_noise(x, generator).bfloat16().double()).sum() for x in outputs)
        del tensors[2]
        return [*outputs, *torch.autograd.grad(loss, tensors)]

    for i, (x, y) in enumerate(
        zip(run(ops.lrua_write, dtype), run(reference.lrua_write, torch.float64), strict=True)
    ):
        if slots > 1 or i != 5:  # with one slot dL/d(gate) is exactly 0
            assert worst_error(x, y) < tolerance, i


def test_write_with_gradient_to_one_output_alone():
    state = distinct_state(2, 9, 5, 3)
    _, vector, gate, _ = scan_inputs(None, 2, 5, 3)
    vector.requires_grad_(), gate.requires_grad_()
    for index in (0, 1):
        wanted = (vector, gate) if index == 0 else (gate,)
        actual = torch.autograd.grad(ops.lrua_write(*state, vector, gate)[index].square().sum(), wanted)
        expected = torch.autograd.grad(
            reference.lrua_write(*state, vector, gate)[index].square().sum(), wanted
        )
        for x, y in zip(actual, expected, strict=True):
            assert worst_error(x, y) < 1e-12


@settings(max_examples=shorter(60, 25))
@given(
    st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, float("nan"), float("inf"), float("-inf"), 1e-40]),
        min_size=1,
        max_size=70,
    ),
    st.data(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_least_used_orders_as_a_stable_sort(values, data, dtype):
    n = data.draw(st.integers(0, len(values)))
    usage = torch.tensor([values, values[::-1]], dtype=dtype)
    expected = torch.sort(usage, dim=1, stable=True).indices[:, :n]
    actual = ops.least_used(usage, n)
    assert actual.dtype == torch.int64 and torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", ["random", "ascending", "descending", "equal"])
def test_least_used_of_more_slots_than_a_kernel_takes_at_a_time(order, dtype):
    usage = torch.randint(0, 300, (2, 1001)).to(dtype)  # with ties
    usage[0, ::97], usage[1, 5] = float("nan"), -0.0
    if order == "equal":
        usage.zero_()
    elif order != "random":
        usage = usage.sort(dim=1, descending=order == "descending").values
    expected = torch.sort(usage, dim=1, stable=True).indices
    for n in (1, 4, 33, 200, 1001):
        assert torch.equal(ops.least_used(usage, n), expected[:, :n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "batch, slots", [(2, 256), (3, 257), (2, 1025), (1, 2048), (3, 2049), (2, 4097), (1, 9000)]
)
def test_least_used_on_both_sides_of_every_size_that_a_kernel_changes_its_way_at(batch, slots, dtype):
    """The CUDA kernel counts up to 256 slots, takes chunks of 2,048, and merges four of them at a time for more than 512."""
    usage = torch.randint(-20, 200, (batch, slots)).to(dtype) * 0.1  # with ties
    usage[0, ::97], usage[-1, 3], usage[-1, 4] = float("nan"), float("inf"), -float("inf")
    usage[0, 5], usage[0, 8] = -0.0, 0.0
    expected = torch.sort(usage, dim=1, stable=True).indices
    for n in (1, 4, 5, 512, 513, 2048, 2500, slots - 1, slots):
        if n <= slots:
            assert torch.equal(ops.least_used(usage, n), expected[:, :n]), n


def test_a_write_to_more_slots_than_a_kernel_takes_at_a_time():
    state = distinct_state(1, shorter(4200, 300), 5, 3)
    _, vector, gate, _ = scan_inputs(None, 1, 5, 3)
    for actual, expected in zip(
        ops.lrua_write(*state, vector, gate), reference.lrua_write(*state, vector, gate), strict=True
    ):
        assert worst_error(actual, expected) < 1e-12


def test_a_negative_nan_is_last_too():
    usage = torch.tensor([[1.0, -float("nan"), 0.0]])
    usage[0, 1] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # all bits set
    assert ops.least_used(usage, 3).tolist() == [[2, 0, 1]]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bad", ["key", "vector", "gate", "sharpness", "memory", "read_weights"])
@pytest.mark.parametrize("value", shorter([float("nan"), float("inf")], [float("nan")]))
def test_a_non_finite_value_stays_in_its_sample(bad, value, options):
    state = [x.float() for x in distinct_state(3, 21, 6, 2)]
    inputs = [x.float() for x in scan_inputs(shorter(5, 3), 3, 6, 2)]
    clean = run_with_gradients(ops.lrua_scan, [*state, *inputs], torch.float32, **options)
    names = {"memory": state[0], "read_weights": state[1], "key": inputs[0][2], "vector": inputs[1][2]}
    names |= {"gate": inputs[2][2], "sharpness": inputs[3][2]}
    names[bad][1, 0] = value
    dirty = run_with_gradients(ops.lrua_scan, [*state, *inputs], torch.float32, **options)
    for kind in (0, 1):
        for i, (x, y) in enumerate(zip(clean[kind], dirty[kind], strict=True)):
            leading_time = i == 0 if kind == 0 else i > 1
            x, y = (x[:, [0, 2]], y[:, [0, 2]]) if leading_time else (x[[0, 2]], y[[0, 2]])
            assert torch.equal(x, y)


@pytest.mark.parametrize("options", OPTIONS)
def test_non_finite_values_go_where_the_reference_takes_them(options):
    state, inputs = distinct_state(1, 21, 6, 2), scan_inputs(4, 1, 6, 2)
    state.memory[0, int(state.usage.argmax()), 0] = float("inf")
    actual, expected = (f(state, *inputs, **options) for f in (ops.lrua_scan, reference.lrua_scan))
    assert torch.equal(actual[0].isfinite(), expected[0].isfinite())
    assert torch.equal(actual[1].memory.isfinite(), expected[1].memory.isfinite())


def test_the_erased_slot_is_assigned_not_multiplied():
    state, inputs = distinct_state(1, 21, 6, 2), scan_inputs(None, 1, 6, 2)
    state.memory[0, int(state.usage.argmin())] = float("nan")
    read, after = ops.lrua_step(state, *inputs)
    assert read.isfinite().all() and after.memory.isfinite().all()


@pytest.mark.thorough
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sharpness", [True, False])
def test_gradcheck(options, sharpness):
    state, inputs = distinct_state(2, 6, 3, 2), scan_inputs(3, 2, 3, 2, sharpness=sharpness)
    tensors = [x for x in (state[0], state[1], *inputs) if x is not None]
    for x in tensors:
        x.requires_grad_()

    def function(memory, weights, *rest):
        reads, end = ops.lrua_scan(reference.LRUAState(memory, weights, state.usage), *rest, **options)
        return reads, end.memory, end.read_weights

    assert torch.autograd.gradcheck(function, tensors, fast_mode=shorter(False, True))


def test_same_bits_twice_and_on_every_thread_count_that_does_not_split_slots():
    inputs = [*distinct_state(5, 33, 9, 3), *scan_inputs(7, 5, 9, 3)]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            outputs, gradients = run_with_gradients(ops.lrua_scan, inputs, torch.float32)
            results.append(outputs + gradients)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@needs_cpp
def test_slots_split_over_threads_choose_the_same_slots():
    state = ops.LRUAState.initial(1, 4096, 40, 4)
    inputs = [x.float() for x in scan_inputs(6, 1, 40, 4)]
    threads = torch.get_num_threads()
    chosen = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            chosen.append(chosen_slots(state, inputs))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(chosen[0], chosen[1]) and torch.equal(chosen[0], chosen[2])


@pytest.mark.parametrize("steps", shorter([50, 200], [20]))
def test_what_is_saved_for_backward_is_bounded(steps):
    """At most R N + 3 R D numbers per step and sample beside the inputs, linear in T."""
    batch, slots, size, heads = shorter(3, 1), 128, 40, 4
    state = ops.LRUAState.initial(batch, slots, size, heads)
    inputs = [x.float().requires_grad_() for x in scan_inputs(steps, batch, size, heads)]
    own = {x.data_ptr() for x in (*state, *inputs)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ops.lrua_scan(state, *inputs)
    extra = sum(x.numel() * x.element_size() for x in saved if x.data_ptr() not in own)
    assert 0 < extra / 4 <= steps * batch * (heads * slots + 3 * heads * size)


@pytest.mark.parametrize("numbers, every", [(1, 8), (15 * 160 * 23, 15), (2**25, 19)])
def test_a_replay_has_a_bound_and_the_same_bits_within_any(monkeypatch, numbers, every):
    """A memory too large for 19 steps at once is kept more often: 160 slots, of 20 numbers and three rows in a replay."""
    steps, batch, slots, size, heads = shorter(40, 20), 2, 160, 20, 1
    memory, weights, usage = distinct_state(batch, slots, size, heads)
    inputs = [memory, weights, usage, *scan_inputs(steps, batch, size, heads)]
    usual = run_with_gradients(ops.lrua_scan, inputs, torch.float32)
    monkeypatch.setattr(_anchors, "REPLAY_NUMBERS", numbers)
    assert _anchors.lrua_interval(slots, size, heads) == every
    bounded = run_with_gradients(ops.lrua_scan, inputs, torch.float32)
    for x, y in zip((*usual[0], *usual[1]), (*bounded[0], *bounded[1]), strict=True):
        assert torch.equal(x, y)


@pytest.mark.once
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("slots, size, heads", [(9, 5, 3), shorter((1500, 33, 4), (700, 33, 2))])
def test_autocast_changes_nothing(slots, size, heads, options):
    inputs = [*distinct_state(1, slots, size, heads), *scan_inputs(2, 1, size, heads)]
    expected = run_with_gradients(ops.lrua_scan, inputs, torch.float32, **options)
    with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
        actual = run_with_gradients(ops.lrua_scan, inputs, torch.float32, **options)
    for kind in (0, 1):
        assert all(torch.equal(x, y) for x, y in zip(actual[kind], expected[kind], strict=True))


def test_each_gradient_where_it_alone_is_asked_for():
    state, inputs = distinct_state(2, 9, 5, 3), scan_inputs(4, 2, 5, 3)
    expected = run_with_gradients(reference.lrua_scan, [*state, *inputs], torch.float64)[1]
    for i, x in enumerate((state.memory, state.read_weights, *inputs)):
        x.requires_grad_()
        reads, end = ops.lrua_scan(state, *inputs)
        generator = torch.Generator().manual_seed(1)
        loss = sum(
            (y * fixed_noise(y, generator).bfloat16().double()).sum()
            for y in (reads, end.memory, end.read_weights)
        )
        assert worst_error(torch.autograd.grad(loss, x)[0], expected[i]) < 1e-11
        x.requires_grad_(False)
