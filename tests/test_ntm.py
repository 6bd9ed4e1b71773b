"""The NTM ops against their reference, and the reference against the equations in plain NumPy."""

import numpy as np
import pytest
import torch
from cases import BACKEND, INTERPRETED, fixed_noise, needs_cpp, served_by, shorter, worst_error
from hypothesis import given, settings
from hypothesis import strategies as st

import mann_fast
from mann_fast import _anchors, ops, reference

ORDERS = ("read_first", "write_first")
reason = mann_fast.backends()[BACKEND]
needs_ntm = pytest.mark.skipif(reason is not None, reason=f"{BACKEND}: {reason}")

SHAPES = [  # T, B, N, D, R, W, S
    pytest.param(shorter((13, 2, 128, 20, 1, 1, 1), (2, 2, 128, 20, 1, 1, 1)), id="paper"),
    # Sizes that a CUDA kernel knows when it is compiled, with padding and without.
    pytest.param(shorter((11, 2, 115, 19, 1, 1, 1), (2, 1, 115, 19, 1, 1, 1)), id="fixed-padded"),
    pytest.param(shorter((22, 2, 121, 37, 1, 1, 1), (2, 1, 121, 37, 1, 1, 1)), id="fixed-wide"),
    pytest.param(shorter((10, 2, 126, 40, 4, 1, 1), (2, 1, 126, 40, 4, 1, 1)), id="fixed-four-reads"),
    pytest.param(shorter((4, 3, 7, 5, 2, 3, 1), (2, 2, 7, 5, 2, 3, 1)), id="small-odd"),
    pytest.param(shorter((20, 2, 33, 17, 3, 2, 2), (10, 1, 20, 9, 3, 2, 2)), id="several-anchors"),
    pytest.param((3, 1, 1, 1, 1, 1, 1), id="ones"),
    pytest.param((3, 2, 5, 3, 2, 0, 1), id="no-write-head"),
    pytest.param((3, 2, 5, 3, 0, 2, 1), id="no-read-head"),
    pytest.param((6, 2, 3, 4, 1, 1, 3), id="shift-goes-round"),
    pytest.param(shorter((5, 2, 40, 9, 6, 5, 0), (2, 1, 40, 9, 6, 5, 0)), id="no-shift"),
    pytest.param((0, 2, 4, 3, 1, 1, 1), id="no-steps"),
    pytest.param((3, 0, 4, 3, 1, 1, 1), id="empty-batch"),
    pytest.param(
        shorter((11, 2, 300, 64, 2, 2, 1), (9, 1, 300, 64, 2, 2, 1)), id="too-large-for-a-triton-program"
    ),
]
NAMES = (
    "memory read_weights write_weights read_key read_sharpness read_gate read_shift read_sharpening "
    "write_key write_sharpness write_gate write_shift write_sharpening erase add"
).split()


def ntm_inputs(steps, batch, slots, width, reads, writes, reach, dtype=torch.float64):
    """State, heads, erase and add as a flat list, in the order of NAMES."""

    def normal(*sizes):
        return torch.randn(sizes, dtype=dtype)

    inputs = [normal(batch, slots, width)]
    inputs += [torch.softmax(normal(batch, heads, slots), -1) for heads in (reads, writes)]
    for heads in (reads, writes):
        sizes = (steps, batch, heads)
        inputs += [normal(*sizes, width), 5 * normal(*sizes).abs(), torch.sigmoid(normal(*sizes))]
        inputs += [torch.softmax(normal(*sizes, 2 * reach + 1), -1), 1 + 2 * normal(*sizes).abs()]
    return [*inputs, torch.sigmoid(normal(steps, batch, writes, width)), normal(steps, batch, writes, width)]


def call(function, inputs, **options):
    """reads, memory, read_weights, write_weights."""
    state, read_head, write_head = ops.NTMState(*inputs[:3]), inputs[3:8], inputs[8:13]
    reads, state = function(state, ops.NTMHead(*read_head), ops.NTMHead(*write_head), *inputs[13:], **options)
    return [reads, *state]


def results_and_gradients(function, inputs, dtype, **options):
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    tensors = [x.detach().to(wide if i < 3 else dtype).requires_grad_() for i, x in enumerate(inputs)]
    results = call(function, tensors, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x.double() * fixed_noise(x, generator).double()).sum() for x in results)
    return results, torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)


def compare(actual, expected, tolerance, gradient_tolerance):
    for i, (x, y) in enumerate(zip(actual[0], expected[0], strict=True)):
        assert worst_error(x, y, batch_axis=1 if i == 0 else 0) < tolerance, i
    # Below this a gradient is 0 but for rounding, as of a single slot's or a single move's.
    rounding = 1e-13 * max([1.0, *(y.abs().max().item() for y in expected[1] if y.numel())])
    for name, x, y in zip(NAMES, actual[1], expected[1], strict=True):
        axis = 0 if name in NAMES[:3] else 1
        if y.numel() and y.abs().max() < rounding:
            assert x.abs().max() < gradient_tolerance, f"gradient of {name}"
        else:
            assert worst_error(x, y, batch_axis=axis) < gradient_tolerance, f"gradient of {name}"


def numpy_address(memory, key, sharpness, gate, shift, sharpening, previous, eps):
    """One head, one sample: Graves et al. 2014, eqs. 5 to 9, with the cosine's eps inside the root."""
    slots, reach = len(memory), len(shift) // 2
    cosine = np.array([key @ row / np.sqrt((key @ key) * (row @ row) + eps) for row in memory])
    content = np.exp(sharpness * cosine)
    content /= content.sum()
    gated = gate * content + (1 - gate) * previous
    shifted = np.zeros(slots)
    for i in range(slots):
        for j in range(-reach, reach + 1):
            shifted[i] += shift[j + reach] * gated[(i - j) % slots]
    sharpened = shifted**sharpening
    return sharpened / sharpened.sum()


@pytest.mark.parametrize("order", ORDERS)
def test_reference_is_the_equations(order):
    steps, batch, reads, writes = 50, 2, 2, 2
    inputs = ntm_inputs(steps, batch, 9, 4, reads, writes, 1)
    results = [x.cpu() for x in call(reference.ntm_scan, inputs, order=order)]
    numbers = [x.cpu().numpy() for x in inputs]
    for b in range(batch):
        memory, w_read, w_write = (numbers[i][b].copy() for i in range(3))
        for t in range(steps):
            read_head, write_head = ([x[t, b] for x in numbers[k : k + 5]] for k in (3, 8))

            def all_heads(head, previous, memory):
                return np.stack(
                    [
                        numpy_address(memory, *(x[h] for x in head), previous[h], 1e-6)
                        for h in range(len(previous))
                    ]
                )

            before = memory
            w_write = all_heads(write_head, w_write, memory)
            memory = before.copy()
            for h in range(writes):
                memory = memory * (1 - np.outer(w_write[h], numbers[13][t, b, h]))
            for h in range(writes):
                memory = memory + np.outer(w_write[h], numbers[14][t, b, h])
            addressed = before if order == "read_first" else memory
            w_read = all_heads(read_head, w_read, addressed)
            np.testing.assert_allclose(results[0][t, b], w_read @ addressed, rtol=1e-9, atol=1e-9)
        for actual, expected in zip(results[1:], (memory, w_read, w_write), strict=True):
            np.testing.assert_allclose(actual[b], expected, rtol=1e-9, atol=1e-9)


def test_shift_by_one_moves_the_focus_one_slot_up():
    memory, previous = torch.randn(1, 5, 3), torch.eye(5)[None, 1:2]
    head = ops.NTMHead(
        torch.randn(1, 1, 3), torch.ones(1, 1), torch.zeros(1, 1), torch.eye(3)[None, 2:], torch.ones(1, 1)
    )
    assert torch.equal(ops.ntm_address(memory, head, previous), torch.eye(5)[None, 2:3])


@needs_ntm
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "dtype, tolerance, gradient_tolerance", [(torch.float64, 1e-11, 1e-10), (torch.float32, 2e-5, 5e-4)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_scan_matches_reference(shape, dtype, tolerance, gradient_tolerance, order):
    inputs = [x.to(dtype).double() for x in ntm_inputs(*shape)]
    actual = results_and_gradients(ops.ntm_scan, inputs, dtype, order=order)
    expected = results_and_gradients(reference.ntm_scan, inputs, torch.float64, order=order)
    compare(actual, expected, tolerance, gradient_tolerance)


FIXED = [
    (128, 20, 1, 1),
    (121, 37, 1, 1),
    (126, 40, 4, 1),
]  # N, D, R, W that a CUDA kernel knows when it is compiled
FIXED = shorter(FIXED, FIXED[:1])


@needs_ntm
@pytest.mark.skipif(
    INTERPRETED, reason="no Triton kernel has these sizes for itself: test_sequences.py is for it"
)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sizes", FIXED)
def test_sequences_of_fixed_sizes(sizes, order):
    steps = shorter(25, 4)
    inputs = [x.float().double() for x in ntm_inputs(steps, 4, *sizes, 1)]
    resets = torch.zeros(steps, 4, dtype=torch.bool)
    resets[0, 0] = resets[3, 0] = resets[2:4, 1] = resets[-1, 2] = True
    options = {"order": order, "resets": resets, "lengths": torch.tensor([steps, steps - 2, steps, 0])}
    actual = results_and_gradients(ops.ntm_scan, inputs, torch.float32, **options)
    expected = results_and_gradients(reference.ntm_scan, inputs, torch.float64, **options)
    compare(actual, expected, 2e-5, 5e-4)


@needs_ntm
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sizes", FIXED)
@pytest.mark.parametrize("sharpening", [1.0, 1.5, 12.0, 40.0])
def test_weights_of_nought_of_fixed_sizes(sizes, order, sharpening):
    """Shifted weights that are nought or nearly so, and powers of them that are far from 1."""
    steps = shorter(4, 2)
    inputs = [x.float().double() for x in ntm_inputs(steps, 3, *sizes, 1)]
    for i in (1, 2):
        inputs[i] = torch.zeros_like(inputs[i])
        inputs[i][..., 5] = 1
    for kind in ("read", "write"):
        inputs[NAMES.index(f"{kind}_gate")][:, :1] = 0
        inputs[NAMES.index(f"{kind}_gate")][:, 1:2] = 1e-33
        inputs[NAMES.index(f"{kind}_shift")][0, 2] = torch.tensor([0.0, 1.0, 0.0])
        inputs[NAMES.index(f"{kind}_sharpening")][:] = sharpening
    actual = results_and_gradients(ops.ntm_scan, inputs, torch.float32, order=order)
    expected = results_and_gradients(reference.ntm_scan, inputs, torch.float64, order=order)
    for x, y in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(x.double(), y, rtol=5e-4, atol=5e-4 * max(1, y.abs().max().item()))


@needs_ntm
@pytest.mark.filterwarnings("ignore:All-NaN")  # NumPy, of what Triton's interpreter finds the greatest
@pytest.mark.parametrize("sizes", FIXED)
def test_any_sharpness_and_sharpening_of_fixed_sizes(sizes):
    """Similarities that are no exponentials as they are, and sharpening that leaves one slot or two."""
    inputs = ntm_inputs(shorter(3, 2), 2, *sizes, 1, dtype=torch.float32)
    for kind in ("read", "write"):
        inputs[NAMES.index(f"{kind}_sharpness")][1:] *= 40
        inputs[NAMES.index(f"{kind}_sharpening")][:, 1:] *= 100
    actual, expected = call(ops.ntm_scan, inputs), call(reference.ntm_scan, [x.double() for x in inputs])
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-3)
    inputs[NAMES.index("read_sharpening")][:] = inputs[NAMES.index("write_sharpening")][:] = float("inf")
    for x, y in zip(call(ops.ntm_scan, inputs), call(reference.ntm_scan, inputs), strict=True):
        assert torch.isfinite(y).all() and torch.allclose(x, y, atol=1e-4)
    inputs[NAMES.index("read_key")][1, 0, 0, 0] = float("nan")
    reads, memory, read_weights, write_weights = call(ops.ntm_scan, inputs)
    assert reads[1:, 0, 0].isnan().all() and read_weights[0, 0].isnan().all()
    assert all(x.isfinite().all() for x in (reads[:, 1], memory, read_weights[1], write_weights))


@needs_ntm
@pytest.mark.skipif(BACKEND != "triton", reason="only Triton has a loop of steps beside a scan")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(5, 2, 7, 5, 2, 3, 1), (3, 2, 5, 3, 2, 0, 1), (9, 1, 5, 3, 0, 2, 2)])
def test_a_loop_of_steps_matches_reference(monkeypatch, shape, order):
    monkeypatch.setattr("mann_fast.kernels._sizes.RESIDENT_NUMBERS", 0)
    inputs = ntm_inputs(*shape)
    actual = results_and_gradients(ops.ntm_scan, inputs, torch.float64, order=order)
    expected = results_and_gradients(reference.ntm_scan, inputs, torch.float64, order=order)
    compare(actual, expected, 1e-11, 1e-10)


@needs_ntm
@pytest.mark.parametrize("dtype", shorter([torch.bfloat16, torch.float16], [torch.float16]))
@pytest.mark.parametrize("sizes", [(33, 9, 2, 1), *FIXED])
def test_half_precision_is_as_good_as_plain_pytorch(dtype, sizes):
    """Triton's interpreter cuts a bfloat16's bits off where a GPU rounds, so it is left out there. Sharpening makes much of the
    state's rounding, with many slots more."""
    rounding = 1e-6 if sizes[0] < 100 else 3e-5
    inputs = [
        x.to(dtype if i > 2 else torch.float32).double() for i, x in enumerate(ntm_inputs(6, 2, *sizes, 1))
    ]
    exact = results_and_gradients(reference.ntm_scan, inputs, torch.float64)
    fused = results_and_gradients(ops.ntm_scan, inputs, dtype)
    plain = results_and_gradients(reference.ntm_scan, inputs, dtype)
    for part, factor in ((0, 2), (1, 3)):
        for x, y, z in zip(fused[part], plain[part], exact[part], strict=True):
            assert x.dtype == y.dtype
            assert worst_error(x, z) <= factor * worst_error(y, z) + rounding


@needs_ntm
def test_an_infinite_sharpening_leaves_the_greatest():
    inputs = ntm_inputs(3, 2, 9, 4, 2, 2, 1, dtype=torch.float32)
    for i in (NAMES.index("read_sharpening"), NAMES.index("write_sharpening")):
        inputs[i] = torch.full_like(inputs[i], float("inf"))
    for x, y in zip(call(ops.ntm_scan, inputs), call(reference.ntm_scan, inputs), strict=True):
        assert torch.isfinite(y).all() and torch.allclose(x, y, atol=1e-5)


@needs_ntm
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sizes", [(40, 8, 2, 1), *FIXED])
def test_steps_halves_and_whole_are_the_same_bits(sizes, order):
    steps, half = shorter((21, 13), (5, 3))
    inputs = ntm_inputs(steps, 3, *sizes, 1, dtype=torch.float32)
    whole = call(ops.ntm_scan, inputs, order=order)

    def part(times, state):
        return [*state, *(x[times] for x in inputs[3:])]

    first = call(ops.ntm_scan, part(slice(0, half), inputs[:3]), order=order)
    second = call(ops.ntm_scan, part(slice(half, steps), first[1:]), order=order)
    assert torch.equal(whole[0], torch.cat([first[0], second[0]]))
    assert all(map(torch.equal, whole[1:], second[1:]))
    state, reads = inputs[:3], []
    for t in range(steps):
        read, *state = call(ops.ntm_step, part(t, state), order=order)
        reads.append(read)
    assert torch.equal(whole[0], torch.stack(reads)) and all(map(torch.equal, whole[1:], state))


@needs_ntm
@pytest.mark.parametrize("heads", [(2, 1), (1, 0)])
def test_what_is_saved_for_backward_is_bounded(heads):
    """Beside the inputs: the weights of every step, anchors that take no more than these, and, as the heads that read and
    those that write lie in one tensor, what they were told and their weights at first once more. To the number."""
    steps, batch, slots, width = shorter((60, 2, 64, 12), (20, 1, 16, 6))
    inputs = ntm_inputs(steps, batch, slots, width, *heads, 1, dtype=torch.float32)
    inputs = [x.requires_grad_() for x in inputs]
    own, saved = {x.data_ptr() for x in inputs}, {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (saved.setdefault(x.data_ptr(), x.numel()), x)[1], lambda x: x
    ):
        call(ops.ntm_scan, inputs)
    extra = sum(count for pointer, count in saved.items() if pointer not in own)
    weights, anchors = (
        steps * sum(heads) * slots,
        (steps - 1) // _anchors.ntm_interval(slots, width, sum(heads)) * slots * width,
    )
    told = steps * sum(heads) * (width + 6) + sum(heads) * slots  # key, sharpness, gate, 3 shifts, sharpening
    assert anchors <= weights and extra == batch * (weights + anchors + told)


@needs_ntm
@pytest.mark.parametrize("numbers, every", [(1, 8), (10 * 33 * 28, 10), (2**25, 14)])
def test_a_replay_has_a_bound_and_the_same_bits_within_any(monkeypatch, numbers, every):
    """A memory too large for 14 steps at once is kept more often."""
    steps, batch, slots, width = shorter(30, 16), 2, 33, 28
    inputs = ntm_inputs(steps, batch, slots, width, 1, 1, 1, dtype=torch.float32)
    usual = results_and_gradients(ops.ntm_scan, inputs, torch.float32)
    monkeypatch.setattr(_anchors, "REPLAY_NUMBERS", numbers)
    assert _anchors.ntm_interval(slots, width, 2) == every
    bounded = results_and_gradients(ops.ntm_scan, inputs, torch.float32)
    for x, y in zip((*usual[0], *usual[1]), (*bounded[0], *bounded[1]), strict=True):
        assert torch.equal(x, y)


@needs_ntm
def test_same_bits_on_every_number_of_threads_and_alone():
    inputs = ntm_inputs(shorter(9, 2), 5, 24, 6, 2, 2, 1, dtype=torch.float32)
    threads, outputs = torch.get_num_threads(), []
    try:
        for count in shorter((1, 2, 3), (1, 2)):
            torch.set_num_threads(count)
            results, gradients = results_and_gradients(ops.ntm_scan, inputs, torch.float32)
            outputs.append([*results, *gradients])
    finally:
        torch.set_num_threads(threads)
    assert all(all(map(torch.equal, outputs[0], other)) for other in outputs[1:])
    alone = call(ops.ntm_scan, [x[3:4] if i < 3 else x[:, 3:4] for i, x in enumerate(inputs)])
    assert torch.equal(alone[0], outputs[0][0][:, 3:4])
    assert all(torch.equal(x, y[3:4]) for x, y in zip(alone[1:], outputs[0][1:4], strict=True))


@needs_ntm
def test_address_is_a_step_s_addressing_with_gradients():
    memory, weights, _, *head = ntm_inputs(1, 3, 17, 5, 2, 2, 1)[:8]
    head = [x[0] for x in head]
    tensors = [x.requires_grad_() for x in (memory, weights, *head)]

    def address(function):
        result = function(tensors[0], ops.NTMHead(*tensors[2:]), tensors[1])
        return result, torch.autograd.grad(result.square().sum(), tensors)

    actual, expected = address(ops.ntm_address), address(reference.ntm_address)
    assert worst_error(actual[0], expected[0]) < 1e-12
    assert all(worst_error(x, y) < 1e-11 for x, y in zip(actual[1], expected[1], strict=True))


@pytest.mark.parametrize("backend", ["tested", "reference"])
@pytest.mark.parametrize("sharpening", [1.0, 1.5, 50.0, 1000.0])
def test_sharpening_stays_finite(backend, sharpening):
    """Weights of exactly zero, and powers that underflow."""
    memory = torch.randn(2, 12, 3)
    previous = torch.eye(12)[None, :1].expand(2, 1, 12).clone()
    head = [torch.randn(2, 1, 3), torch.full((2, 1), 30.0), torch.zeros(2, 1)]
    head += [torch.tensor([0.0, 0.7, 0.3]).expand(2, 1, 3).clone(), torch.full((2, 1), sharpening)]
    tensors = [x.requires_grad_() for x in (memory, previous, *head)]
    with served_by(backend):
        weights = ops.ntm_address(memory, ops.NTMHead(*tensors[2:]), previous)
        gradients = torch.autograd.grad((weights * torch.randn(12)).sum(), tensors)
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 1))
    assert all(x.isfinite().all() for x in (weights, *gradients))


@needs_ntm
@settings(max_examples=10 if INTERPRETED else 40)
@given(st.data())
def test_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    reads = draw(0, 5)
    shape = (
        draw(0, shorter(10, 3)),
        draw(0, shorter(3, 2)),
        draw(1, 40),
        draw(1, 9),
        reads,
        draw(0 if reads else 1, 5),
        draw(0, 3),
    )
    torch.manual_seed(draw(0, 1000))
    inputs, order = ntm_inputs(*shape), data.draw(st.sampled_from(ORDERS))
    actual = results_and_gradients(ops.ntm_scan, inputs, torch.float64, order=order)
    compare(actual, results_and_gradients(reference.ntm_scan, inputs, torch.float64, order=order), 1e-8, 1e-6)


@needs_ntm
@pytest.mark.thorough
@pytest.mark.parametrize("order", ORDERS)
def test_gradcheck(order):
    inputs = [x.requires_grad_() for x in ntm_inputs(*shorter((3, 1, 5, 3, 2, 1, 1), (2, 1, 3, 2, 1, 1, 1)))]
    assert torch.autograd.gradcheck(lambda *x: tuple(call(ops.ntm_scan, x, order=order)), inputs)


@pytest.mark.once
@needs_cpp
def test_compiles_in_one_graph():
    torch.compiler.reset()
    inputs = ntm_inputs(4, 2, 9, 3, 1, 2, 1)
    compiled = torch.compile(ops.ntm_scan, fullgraph=True)
    actual = results_and_gradients(compiled, inputs, torch.float64)
    compare(actual, results_and_gradients(ops.ntm_scan, inputs, torch.float64), 1e-12, 1e-12)


@pytest.mark.parametrize("backend", ["tested", "reference"])
@pytest.mark.parametrize("steps", [0, 2])
def test_results_share_no_storage(backend, steps):
    inputs = ntm_inputs(steps, 2, 7, 3, 2, 1, 1)
    with served_by(backend):
        results = call(ops.ntm_scan, inputs)
    tensors = [x for x in (*inputs, *results) if x.numel()]
    assert len({x.untyped_storage().data_ptr() for x in tensors}) == len(tensors)


def test_initial_state():
    state = ops.NTMState.initial(2, 5, 3, 2, 1, dtype=torch.float64)
    assert torch.equal(state.memory, torch.full((2, 5, 3), 1e-6, dtype=torch.float64))
    assert torch.equal(state.read_weights, torch.eye(5, dtype=torch.float64)[:1].expand(2, 2, 5))
    assert state.write_weights.shape == (2, 1, 5)
    with mann_fast.backend("reference"):
        ops.ntm_step(state, *wrong_case()[1:])


def wrong_case():
    inputs = [x[0] if i > 2 else x for i, x in enumerate(ntm_inputs(1, 2, 5, 3, 2, 1, 1))]
    return [ops.NTMState(*inputs[:3]), ops.NTMHead(*inputs[3:8]), ops.NTMHead(*inputs[8:13]), *inputs[13:]]


@pytest.mark.parametrize(
    ("place", "field", "value", "error", "message"),
    [
        (0, "memory", torch.zeros(2, 5).double(), ValueError, r"state.memory must have shape \[B, N, D\]"),
        (0, "read_weights", torch.zeros(2, 2, 4).double(), ValueError, r"state.read_weights .* got \[2, 2, 4\]"),
        (0, "write_weights", torch.zeros(2, 1, 5), TypeError, "state.write_weights must have the dtype of state.memory"),
        (1, "key", torch.zeros(2, 2, 4).double(), ValueError, r"read_head.key .* = \[2, 2, 3\], got \[2, 2, 4\]"),
        (1, "gate", 0.5, TypeError, "read_head.gate must be a tensor, got float"),
        (2, "shift", torch.zeros(2, 1, 4).double(), ValueError, r"write_head.shift must have shape .* = \[2, 1, 3\]"),
        (2, "shift", torch.zeros(2, 1, 5).double(), ValueError, r"write_head.shift must have shape .* = \[2, 1, 3\]"),
        (2, "sharpening", torch.zeros(2, 2).double(), ValueError, r"write_head.sharpening .* got \[2, 2\]"),
        (3, None, torch.zeros(2, 2, 3).double(), ValueError, r"erase must have shape .* = \[2, 1, 3\]"),
        (4, None, torch.zeros(2, 1, 3), TypeError, "add must have the dtype of erase"),
        (0, None, torch.zeros(2), TypeError, "state must be an NTMState"),
        (1, None, (), TypeError, "read_head must be an NTMHead"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(place, field, value, error, message):
    arguments = wrong_case()
    arguments[place] = value if field is None else arguments[place]._replace(**{field: value})
    with pytest.raises(error, match=message):
        ops.ntm_step(*arguments)


def test_an_even_number_of_moves_is_refused():
    state, read_head, write_head, erase, add = wrong_case()
    read_head, write_head = (
        head._replace(shift=torch.zeros(2, heads, 4).double())
        for head, heads in ((read_head, 2), (write_head, 1))
    )
    with pytest.raises(ValueError, match=r"read_head.shift must have an odd number 2S \+ 1 of moves, got 4"):
        ops.ntm_step(state, read_head, write_head, erase, add)
    with pytest.raises(ValueError, match=r"head.shift must have an odd number 2S \+ 1 of moves, got 4"):
        ops.ntm_address(state.memory, read_head, state.read_weights)


def test_wrong_options_are_named():
    for options, error, message in (
        ({"order": "last"}, ValueError, "order must be one of"),
        ({"eps": 0}, ValueError, "eps must be positive"),
    ):
        with pytest.raises(error, match=message):
            ops.ntm_step(*wrong_case(), **options)
