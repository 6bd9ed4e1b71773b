"""The DNC ops against their reference, and the reference against the equations in plain NumPy."""

import numpy as np
import pytest
import torch
from cases import RAW_OPS, fixed_noise, needs_kernels, shorter, worst_error

from mann_fast import ops, reference

# link, masks, sharpened, deallocate
OPTIONS = {
    "graves": (True, False, False, False),
    "csordas": (True, True, True, True),
    "sharpened": (True, False, True, False),
    "no-links": (False, False, False, False),
    "no-links-masks-deallocate": (False, True, False, True),
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
SHAPES = [  # T, B, N, D, R
    pytest.param(shorter((9, 2, 128, 40, 4), (2, 1, 128, 40, 4)), id="paper"),
    pytest.param(shorter((7, 3, 7, 5, 2), (3, 2, 7, 5, 2)), id="small-odd"),
    pytest.param(shorter((20, 2, 33, 17, 3), (6, 1, 20, 9, 3)), id="several-segments"),
    pytest.param((3, 1, 1, 1, 1), id="ones"),
    pytest.param((3, 2, 5, 3, 7), id="more-heads-than-slots"),
    pytest.param((0, 2, 4, 3, 1), id="no-steps"),
    pytest.param((3, 0, 4, 3, 1), id="empty-batch"),
    pytest.param(shorter((5, 1, 200, 70, 5), (2, 1, 80, 36, 5)), id="large"),
    # What the CUDA kernels keep in registers, padded: slots, numbers of a slot, heads; and the most of each.
    pytest.param(shorter((10, 2, 45, 17, 3), (2, 1, 45, 17, 3)), id="in-registers"),
    pytest.param(shorter((4, 2, 128, 64, 4), (2, 1, 33, 64, 4)), id="most-in-registers"),
    pytest.param((2, 1, 33, 41, 1), id="least-in-registers"),
]
NAMES = [
    *(f"state.{name}" for name in ops.DNCState._fields),
    *(f"interface.{name}" for name in ops.DNCInterface._fields),
]
STATES = len(ops.DNCState._fields)
CONSTANT = NAMES.index("state.write_weights")


def dnc_inputs(steps, batch, slots, width, heads, link=True, masks=True, sharpened=True, dtype=torch.float64):
    """State and interface as a flat list, in the order of NAMES. Nothing is near 0, where precision is lost."""

    def normal(*sizes):
        return torch.randn(sizes, dtype=dtype)

    def shares(*sizes):  # that sum to less than 1
        return 0.9 * torch.softmax(normal(*sizes), -1)

    lead = (steps, batch)
    links = shares(batch, slots, slots)
    state = [normal(batch, slots, width), torch.sigmoid(2 * normal(batch, slots))]
    state += [shares(batch, slots), links * (1 - torch.eye(slots, dtype=dtype))] if link else [None, None]
    state += [shares(batch, heads, slots), shares(batch, slots)]
    told = [normal(*lead, heads, width), 1 + 4 * normal(*lead, heads).abs()]
    told += [normal(*lead, width), 1 + 4 * normal(*lead).abs(), torch.sigmoid(normal(*lead, width))]
    told += [normal(*lead, width), torch.sigmoid(normal(*lead, heads))]
    told += [torch.sigmoid(normal(*lead)), torch.sigmoid(normal(*lead))]
    told += [torch.softmax(normal(*lead, heads, 3), -1) if link else None]
    told += (
        [torch.sigmoid(normal(*lead, heads, width)), torch.sigmoid(normal(*lead, width))]
        if masks
        else [None] * 2
    )
    told += [1 + normal(*lead, heads, 2).abs() if link and sharpened else None]
    return [*state, *told]


def call(function, inputs, **options):
    """reads and the tensors of the state after, of which those that there are not are None."""
    reads, state = function(ops.DNCState(*inputs[:STATES]), ops.DNCInterface(*inputs[STATES:]), **options)
    return [reads, *state]


def orders_of(inputs, deallocate, dtype, **sequences):
    """The orders of allocation that the kernels take for these inputs."""
    tensors = cast(inputs, dtype)
    of_sequences = [sequences.get(name) for name in ("resets", "lengths", "start")]
    return RAW_OPS.dnc_scan(*tensors, *of_sequences, deallocate, 1e-6, 1)[9]


def cast(inputs, dtype):
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    return [x if x is None else x.detach().to(wide if i < STATES else dtype) for i, x in enumerate(inputs)]


def results_and_gradients(function, inputs, dtype, **options):
    tensors = [x if x is None else x.requires_grad_(i != CONSTANT) for i, x in enumerate(cast(inputs, dtype))]
    results = call(function, tensors, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x.double() * fixed_noise(x, generator).double()).sum() for x in results if x is not None)
    wanted = [x for x in tensors if x is not None and x.requires_grad]
    gradients = iter(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
    return results, [next(gradients) if x is not None and x.requires_grad else None for x in tensors]


def compare(actual, expected, tolerance, gradient_tolerance):
    for i, (x, y) in enumerate(zip(actual[0], expected[0], strict=True)):
        assert (x is None) == (y is None)
        if x is not None:
            assert worst_error(x, y, batch_axis=1 if i == 0 else 0) < tolerance, i
    # Below this a gradient is 0 but for rounding, as of a single slot's content.
    rounding = 1e-13 * max([1.0, *(y.abs().max().item() for y in expected[1] if y is not None and y.numel())])
    for i, (name, x, y) in enumerate(zip(NAMES, actual[1], expected[1], strict=True)):
        assert (x is None) == (y is None), name
        if y is None or not y.numel():
            continue
        if y.abs().max() < rounding:
            assert x.abs().max() < gradient_tolerance, f"gradient of {name}"
        else:
            error = worst_error(x, y, batch_axis=0 if i < STATES else 1)
            assert error < gradient_tolerance, f"gradient of {name}: {error}"


# ---- the equations -----------------------------------------------------------------------------------------------------


def numpy_content(memory, key, sharpness, mask, eps):
    scores = []
    for row in memory:
        k, m = (key, row) if mask is None else (key * mask, row * mask)
        scores.append(sharpness * (k @ m) / np.sqrt((k @ k) * (m @ m) + eps))
    weights = np.exp(np.array(scores) - max(scores))
    return weights / weights.sum()


def numpy_sharpened(direction, exponent):
    direction = direction + 1e-6
    powers = (direction / direction.max()) ** exponent
    return powers / powers.sum()


def numpy_step(state, told, deallocate, eps=1e-6):
    """One sample: Graves et al. 2016, Methods; Csordas and Schmidhuber 2019, sections 3.1 to 3.3. Slot by slot."""
    memory, usage, precedence, links, read_weights, written = state
    keys, sharpness, write_key, write_sharpness, erase, vector, free = told[:7]
    allocation_gate, write_gate, modes, masks, write_mask, exponents = told[7:]
    slots, heads = len(usage), len(keys)
    retained = np.ones(slots)
    for r in range(heads):
        retained *= 1 - free[r] * read_weights[r]
    usage = (usage + written - usage * written) * retained
    allocation, product = np.zeros(slots), 1.0
    for i in sorted(range(slots), key=lambda i: usage[i]):  # a stable sort
        allocation[i] = (1 - usage[i]) * product
        product *= usage[i]
    content = numpy_content(memory, write_key, write_sharpness, write_mask, eps)
    weights = write_gate * (allocation_gate * allocation + (1 - allocation_gate) * content)
    remaining = 1 - np.outer(weights, erase)
    memory = memory * remaining * (retained[:, None] if deallocate else 1) + np.outer(weights, vector)
    content = np.array(
        [
            numpy_content(memory, keys[r], sharpness[r], None if masks is None else masks[r], eps)
            for r in range(heads)
        ]
    )
    if links is None:
        read_weights = content
    else:
        after = np.zeros_like(links)
        for i in range(slots):
            for j in range(slots):
                if i != j:
                    after[i, j] = (1 - weights[i] - weights[j]) * links[i, j] + weights[i] * precedence[j]
        links = after
        precedence = (1 - weights.sum()) * precedence + weights
        rows = []
        for r in range(heads):
            forward, backward = links @ read_weights[r], links.T @ read_weights[r]
            if exponents is not None:
                backward, forward = (
                    numpy_sharpened(d, e) for d, e in zip((backward, forward), exponents[r], strict=True)
                )
            rows.append(modes[r, 0] * backward + modes[r, 1] * content[r] + modes[r, 2] * forward)
        read_weights = np.array(rows)
    return read_weights @ memory, [memory, usage, precedence, links, read_weights, weights]


@every_option
@pytest.mark.parametrize("begin", ["drawn", "initial"])
def test_reference_is_the_equations(options, begin):
    *drawn, deallocate = options
    inputs = dnc_inputs(50, 2, 9, 4, 3, *drawn)
    if begin == "initial":
        inputs[:STATES] = ops.DNCState.initial(2, 9, 4, 3, link=drawn[0], dtype=torch.float64)
    results = call(reference.dnc_scan, inputs, deallocate=deallocate)
    for b in range(2):
        state = [x if x is None else x[b].cpu().numpy() for x in inputs[:STATES]]
        for t in range(50):
            told = [x if x is None else x[t, b].cpu().numpy() for x in inputs[STATES:]]
            read, state = numpy_step(state, told, deallocate)
            np.testing.assert_allclose(results[0][t, b].cpu(), read, rtol=1e-9, atol=1e-9)
        for actual, expected in zip(results[1:], state, strict=True):
            assert (actual is None) == (expected is None)
            if actual is not None:
                np.testing.assert_allclose(actual[b].cpu(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.once
@every_option
def test_gradients_of_the_reference(options):
    """Of one step: the write weights that come in and the order are constants."""
    *drawn, deallocate = options
    inputs = dnc_inputs(1, 2, 5, 3, 2, *drawn)
    order = torch.sort(call(reference.dnc_scan, inputs)[2], stable=True)[1][None]
    places = [i for i, x in enumerate(inputs) if x is not None and i != CONSTANT]

    def function(*tensors):
        given = list(inputs)
        for i, x in zip(places, tensors, strict=True):
            given[i] = x
        results = call(reference.dnc_scan, given, deallocate=deallocate, orders=order)
        return tuple(x for x in results if x is not None)

    leaves = [inputs[i].cpu().requires_grad_() for i in places]
    inputs, order = [x if x is None else x.cpu() for x in inputs], order.cpu()
    assert torch.autograd.gradcheck(function, leaves)


def test_what_was_written_is_found_in_the_order_of_writing():
    """Three vectors written to free slots, then read by content once and forward from there."""
    vectors = torch.eye(3)
    state = ops.DNCState.initial(1, 5, 3, 1)

    def step(state, key, vector, write, mode):
        told = ops.DNCInterface(
            key.view(1, 1, 3), torch.full((1, 1), 50.0), torch.zeros(1, 3), torch.ones(1), torch.zeros(1, 3), vector[None],
            torch.zeros(1, 1), torch.ones(1), torch.full((1,), write), torch.eye(3)[mode].view(1, 1, 3),
        )  # fmt: skip
        return ops.dnc_step(state, told)

    for vector in vectors:
        _, state = step(state, vector, vector, 1.0, 1)
    read, state = step(state, vectors[0], torch.zeros(3), 0.0, 1)
    assert torch.allclose(read[0, 0], vectors[0], atol=1e-3)
    for expected in vectors[1:]:
        read, state = step(state, torch.zeros(3), torch.zeros(3), 0.0, 2)
        assert torch.allclose(read[0, 0], expected, atol=1e-3)
    read, state = step(state, torch.zeros(3), torch.zeros(3), 0.0, 0)
    assert torch.allclose(read[0, 0], vectors[1], atol=1e-3)


def test_equal_usages_go_to_the_lower_slot_and_minus_zero_is_zero():
    state = ops.DNCState.initial(1, 4, 2, 1, link=False)
    told = ops.DNCInterface(
        *(x if x is None else x[0].float() for x in dnc_inputs(1, 1, 4, 2, 1, False, False)[STATES:])
    )
    told = told._replace(
        allocation_gate=torch.ones(1), write_gate=torch.ones(1), free_gates=torch.zeros(1, 1)
    )
    for usage, taken in (
        ([0.0, -0.0, 0.0, 0.0], 0),
        ([0.5, 0.0, -0.0, 0.0], 1),
        ([1.0, 1.0, 0.0, float("nan")], 2),
    ):
        after = ops.dnc_step(state._replace(usage=torch.tensor([usage])), told)[1]
        assert after.write_weights[0].nan_to_num().argmax() == taken


# ---- the kernels -------------------------------------------------------------------------------------------------------


@needs_kernels
@every_option
@pytest.mark.parametrize(
    "dtype, tolerance, gradient_tolerance", [(torch.float64, 1e-11, 1e-10), (torch.float32, 2e-5, 5e-4)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_scan_matches_reference(shape, dtype, tolerance, gradient_tolerance, options):
    *drawn, deallocate = options
    inputs = [x if x is None else x.to(dtype).double() for x in dnc_inputs(*shape, *drawn)]
    orders = orders_of(inputs, deallocate, dtype) if shape[0] else None
    actual = results_and_gradients(ops.dnc_scan, inputs, dtype, deallocate=deallocate)
    expected = results_and_gradients(
        reference.dnc_scan, inputs, torch.float64, deallocate=deallocate, orders=orders
    )
    compare(actual, expected, tolerance, gradient_tolerance)


@needs_kernels
@every_option
def test_from_the_start_of_a_sequence(options):
    """Where usages, links and directions are 0, or so small that their order is decided by rounding."""
    *drawn, deallocate = options
    inputs = dnc_inputs(shorter(12, 4), 2, shorter(20, 9), 5, 3, *drawn)
    inputs[:STATES] = ops.DNCState.initial(2, inputs[0].shape[1], 5, 3, link=drawn[0], dtype=torch.float64)
    orders = orders_of(inputs, deallocate, torch.float64)
    actual = results_and_gradients(ops.dnc_scan, inputs, torch.float64, deallocate=deallocate)
    expected = results_and_gradients(
        reference.dnc_scan, inputs, torch.float64, deallocate=deallocate, orders=orders
    )
    compare(actual, expected, 1e-10, 1e-8)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_order_is_that_of_the_usage_that_comes_out(dtype):
    inputs = cast(dnc_inputs(shorter(8, 3), 3, shorter(70, 20), 4, 2), dtype)
    orders = orders_of(inputs, False, dtype)
    state = inputs[:STATES]
    for t in range(orders.shape[0]):
        told = [x if x is None else x[t] for x in inputs[STATES:]]
        _, *state = call(ops.dnc_step, [*state, *told])
        assert torch.equal(torch.sort(state[1], dim=1, stable=True)[1], orders[t])


@needs_kernels
@pytest.mark.parametrize("repeats", [5, 80])  # few slots and many are sorted in different ways
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ties_and_nan_are_ordered_as_a_stable_sort_does(repeats, dtype):
    usage = [0.5, 0.0, -0.0, float("nan"), 0.5, 1.0, 1e30, -1.0, float("nan"), 0.25]
    usage = torch.tensor(usage * shorter(repeats, 5) + [0.75], dtype=dtype)[None]
    inputs = cast(dnc_inputs(1, 1, usage.shape[1], 3, 1, False, False), dtype)
    inputs[1], inputs[CONSTANT] = usage, torch.zeros_like(usage)
    inputs[STATES + 6] = torch.zeros(1, 1, 1)  # nothing is given free
    assert torch.equal(orders_of(inputs, False, dtype)[0], torch.sort(usage, dim=1, stable=True)[1])


@needs_kernels
@pytest.mark.parametrize("dtype", shorter([torch.bfloat16, torch.float16], [torch.float16]))
def test_half_precision_is_as_good_as_plain_pytorch(dtype):
    """Triton's interpreter cuts a bfloat16's bits off where a GPU rounds, so it is left out there."""
    inputs = dnc_inputs(shorter(6, 3), 2, shorter(33, 12), 9, 2)
    inputs = [
        x if x is None else x.to(dtype if i >= STATES else torch.float32).double()
        for i, x in enumerate(inputs)
    ]
    orders = orders_of(inputs, True, dtype)
    fused = results_and_gradients(ops.dnc_scan, inputs, dtype, deallocate=True)
    options = {"deallocate": True, "orders": orders}
    exact = results_and_gradients(reference.dnc_scan, inputs, torch.float64, **options)
    plain = results_and_gradients(reference.dnc_scan, inputs, dtype, **options)
    for part, factor in ((0, 2), (1, 3)):
        for x, y, z in zip(fused[part], plain[part], exact[part], strict=True):
            if x is not None:
                assert x.dtype == y.dtype
                assert worst_error(x, z) <= factor * worst_error(y, z) + 1e-6


@needs_kernels
@every_option
def test_steps_halves_and_whole_are_the_same_bits(options):
    *drawn, deallocate = options
    steps, half = shorter((13, 6), (4, 2))
    inputs = dnc_inputs(steps, 3, shorter(40, 10), 8, 2, *drawn, dtype=torch.float32)
    whole = call(ops.dnc_scan, inputs, deallocate=deallocate)

    def part(times, state):
        return [*state, *(x if x is None else x[times] for x in inputs[STATES:])]

    def same(states):
        return all(x is y is None or torch.equal(x, y) for x, y in zip(*states, strict=True))

    first = call(ops.dnc_scan, part(slice(0, half), inputs[:STATES]), deallocate=deallocate)
    second = call(ops.dnc_scan, part(slice(half, steps), first[1:]), deallocate=deallocate)
    assert torch.equal(whole[0], torch.cat([first[0], second[0]]))
    assert same((whole[1:], second[1:]))
    state, reads = inputs[:STATES], []
    for t in range(steps):
        read, *state = call(ops.dnc_step, part(t, state), deallocate=deallocate)
        reads.append(read)
    assert torch.equal(whole[0], torch.stack(reads)) and same((whole[1:], state))


@pytest.mark.parametrize("options", [OPTIONS["graves"], OPTIONS["csordas"], OPTIONS["no-links"]])
def test_what_is_saved_for_backward_has_no_links(options):
    """Of each step the weights, (R + 1) N numbers, the order of N slots, and where directions are sharpened these, 2 R N."""
    link, masks, sharpened, deallocate = options
    steps, batch, slots, heads = shorter((40, 2, 64, 3), (5, 1, 16, 3))
    inputs = dnc_inputs(steps, batch, slots, 5, heads, link, masks, sharpened, torch.float32)
    inputs = cast(inputs, torch.float32)
    inputs = [x if x is None else x.requires_grad_(i != CONSTANT) for i, x in enumerate(inputs)]
    own, saved = {x.data_ptr() for x in inputs if x is not None}, {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (saved.setdefault(x.data_ptr(), x.numel()), x)[1], lambda x: x
    ):
        call(ops.dnc_scan, inputs, deallocate=deallocate)
    extra = sum(count for pointer, count in saved.items() if pointer not in own)
    assert 0 < extra <= steps * batch * slots * (heads + 2 + (2 * heads if sharpened else 0))


@needs_kernels
def test_same_bits_on_every_number_of_threads_and_alone():
    inputs = dnc_inputs(shorter(9, 2), 5, shorter(24, 8), 6, 2, dtype=torch.float32)
    threads, outputs = torch.get_num_threads(), []
    try:
        for count in shorter((1, 2, 3), (1, 2)):
            torch.set_num_threads(count)
            results, gradients = results_and_gradients(ops.dnc_scan, inputs, torch.float32)
            outputs.append([x for x in (*results, *gradients) if x is not None])
    finally:
        torch.set_num_threads(threads)
    assert all(all(map(torch.equal, outputs[0], other)) for other in outputs[1:])
    alone = call(ops.dnc_scan, [x[3:4] if i < STATES else x[:, 3:4] for i, x in enumerate(inputs)])
    assert torch.equal(alone[0], outputs[0][0][:, 3:4])
    assert all(torch.equal(x, y[3:4]) for x, y in zip(alone[1:], outputs[0][1:7], strict=True))


# ---- errors ------------------------------------------------------------------------------------------------------------


def replaced(inputs, **parts):
    return [parts.get(name.replace(".", "_"), x) for name, x in zip(NAMES, inputs, strict=True)]


@pytest.mark.once
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"state_links": None}, TypeError, "state.precedence must be None where state.links is, got Tensor"),
        ({"interface_read_modes": None}, TypeError, "interface.read_modes must be a tensor where state.links is, got None"),
        ({"interface_write_mask": None}, TypeError, "interface.write_mask must be a tensor where interface.read_masks is"),
        ({"state_usage": torch.zeros(2, 4)}, ValueError, r"state.usage must have shape \[B, N\] = \[2, 5\], got \[2, 4\]"),
        ({"interface_read_modes": torch.zeros(3, 2, 2, 4)}, ValueError, r"interface.read_modes must have shape"),
        ({"interface_erase": torch.zeros(3, 2, 4, dtype=torch.float64)}, TypeError, "interface.erase must have the dtype"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_named(change, error, message):
    inputs = dnc_inputs(3, 2, 5, 4, 2, dtype=torch.float32)
    with pytest.raises(error, match=message):
        call(ops.dnc_scan, replaced(inputs, **change))


@pytest.mark.once
def test_options_are_checked():
    inputs = dnc_inputs(3, 2, 5, 4, 2, dtype=torch.float32)
    with pytest.raises(TypeError, match="deallocate must be a bool, got int"):
        call(ops.dnc_scan, inputs, deallocate=1)
    with pytest.raises(TypeError, match="deallocate must be a bool, got numpy.bool"):
        call(ops.dnc_scan, inputs, deallocate=np.True_)
    with pytest.raises(ValueError, match="eps must be positive"):
        call(ops.dnc_scan, inputs, eps=0.0)
    with pytest.raises(TypeError, match="link must be a bool, got int"):
        ops.DNCState.initial(2, 3, 4, 1, link=1)
    without = dnc_inputs(3, 2, 5, 4, 2, False, False, False, dtype=torch.float32)
    with pytest.raises(TypeError, match="link_sharpening must be None where state.links is, got Tensor"):
        call(ops.dnc_scan, replaced(without, interface_link_sharpening=torch.ones(3, 2, 2, 2)))
