"""The sparse ops against their reference, and the reference against the equations in plain NumPy."""

import numpy as np
import pytest
import torch
from cases import INTERPRETED, RAW_OPS, fixed_noise, needs_cpp, needs_kernels, shorter, worst_error

from mann_fast import ops, reference

SHAPES = [  # T, B, N, D, R, K
    pytest.param(shorter((9, 2, 128, 40, 4, 4), (2, 1, 128, 40, 4, 4)), id="paper"),
    pytest.param(shorter((7, 3, 7, 5, 2, 3), (3, 2, 7, 5, 2, 3)), id="small-odd"),
    pytest.param(shorter((20, 2, 300, 17, 3, 5), (4, 1, 40, 9, 3, 5)), id="tiles"),
    pytest.param((3, 1, 1, 1, 1, 1), id="ones"),
    pytest.param(shorter((4, 2, 6, 3, 6, 6), (2, 1, 6, 3, 6, 6)), id="every-slot-and-head"),
    pytest.param((0, 2, 4, 3, 1, 2), id="no-steps"),
    pytest.param((3, 0, 4, 3, 1, 2), id="empty-batch"),
    pytest.param(shorter((4, 1, 5000, 33, 5, 20), (2, 1, 100, 33, 5, 20)), id="one-large-sample"),
]
too_long_to_interpret = pytest.mark.skipif(INTERPRETED, reason="takes minutes in Triton's interpreter")
every_shape = pytest.mark.parametrize("shape", SHAPES)
OPTIONAL = [(True, True), (False, False), (True, False)]  # sharpness, write gates
INTEGERS = (1, 3, 4)  # of the state


def sparse_inputs(shape, sharpness=True, write_gate=True, dtype=torch.float64):
    """State and inputs [T, ...], as a flat list."""
    T, B, N, D, R, K = shape
    lead = (T, B, R)

    def normal(*sizes):
        return torch.randn(sizes, dtype=dtype)

    slots = torch.rand(B, R, N).argsort(2)[:, :, :K]
    times = torch.randint(-1, 4, (B, N))
    state = [normal(B, N, D), slots, torch.softmax(normal(B, R, K), -1), times, torch.full((B,), 4)]
    return [
        *state,
        *(normal(*lead, D), normal(*lead, D), normal(*lead)),
        5 * normal(*lead).abs() if sharpness else None,
        normal(*lead) + 2 if write_gate else None,
    ]


def call(function, inputs, **options):
    reads, state = function(ops.SparseState(*inputs[:5]), *inputs[5:], **options)
    return [reads, *state]


def cast(inputs, dtype):
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    return [
        x if x is None or not x.is_floating_point() else x.detach().to(wide if i < 5 else dtype)
        for i, x in enumerate(inputs)
    ]


def results_and_gradients(function, inputs, dtype=torch.float64, **options):
    tensors = [
        x if x is None or i in INTEGERS else x.requires_grad_() for i, x in enumerate(cast(inputs, dtype))
    ]
    results = call(function, tensors, **options)
    generator = torch.Generator().manual_seed(1)
    floats = [x for x in results if x.is_floating_point()]
    loss = sum((x.double() * fixed_noise(x, generator).double()).sum() for x in floats)
    wanted = [x for x in tensors if x is not None and x.requires_grad]
    return results, torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)


def choices_of(inputs, dtype):
    """The oldest slots and the slots read at every step, as the kernels take them for these inputs."""
    tensors = cast(inputs, dtype)
    *_, oldest, read_slots, _, _ = RAW_OPS.sparse_scan(
        *tensors, None, None, None, tensors[0].shape[1], 0.005, 1e-6, 1
    )
    return oldest, read_slots


# ---- the equations -----------------------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_step(state, key, vector, alpha, beta, eta, threshold, eps=1e-6):
    """One sample, slot by slot, after the paper; state as a list of arrays."""
    memory, slots, weights, last, clock = state
    memory, last, (N, _), (R, K) = memory.copy(), last.copy(), memory.shape, slots.shape
    oldest = sorted(range(N), key=lambda i: (last[i], i))[:R]
    written = np.zeros((R, N))
    for r in range(R):
        for k in range(K):
            written[r, slots[r, k]] += eta[r] * sigmoid(alpha[r]) * weights[r, k]
        written[r, oldest[r]] += eta[r] * (1 - sigmoid(alpha[r]))
    for i in oldest:
        memory[i] = 0
    for r in range(R):
        for i in {*slots[r], oldest[r]}:
            memory[i] += written[r, i] * vector[r]
    read, read_slots, read_weights = np.zeros_like(vector), np.zeros_like(slots), np.zeros_like(weights)
    accessed = np.zeros(N)
    for r in range(R):
        cosine = [key[r] @ row / np.sqrt((key[r] @ key[r]) * (row @ row) + eps) for row in memory]
        read_slots[r] = sorted(range(N), key=lambda i: -cosine[i])[:K]  # stable
        scores = beta[r] * np.array([cosine[i] for i in read_slots[r]])
        read_weights[r] = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        read[r] = read_weights[r] @ memory[read_slots[r]]
        spread = np.zeros(N)
        spread[read_slots[r]] = read_weights[r]
        accessed += spread + written[r]
    last[accessed > threshold] = clock + 1
    return read, [memory, read_slots, read_weights, last, clock + 1]


@pytest.mark.parametrize("threshold", [0.005, 0.4])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("heads, reads", [(1, 1), (2, 3), (3, 9)])
def test_the_reference_is_the_equations(heads, reads, gated, threshold):
    torch.manual_seed(0)
    T, B, N, D = 50, 2, 9, 4
    state = reference.SparseState.initial(B, N, D, heads, reads, dtype=torch.float64)
    inputs = sparse_inputs((T, B, N, D, heads, reads), gated, gated)[5:]
    actual, after = reference.sparse_scan(state, *inputs, threshold=threshold)
    for b in range(B):
        now = [x[b].numpy() for x in state]
        for t in range(T):
            key, vector, alpha = (x[t, b].numpy() for x in inputs[:3])
            beta, eta = (
                (inputs[3][t, b].numpy(), sigmoid(inputs[4][t, b].numpy())) if gated else np.ones((2, heads))
            )
            read, now = numpy_step(now, key, vector, alpha, beta, eta, threshold)
            assert np.abs(read - actual[t, b].numpy()).max() < 1e-9
        for x, y in zip(now, after, strict=True):
            assert np.abs(x - y[b].numpy()).max() < 1e-9


@pytest.mark.parametrize("gated", [True, False])
def test_the_gradient_of_a_step(gated):
    torch.manual_seed(1)
    tensors = sparse_inputs((1, 2, 6, 3, 2, 3), gated, gated)
    tensors[5:] = [None if x is None else x[0] for x in tensors[5:]]
    places = [i for i, x in enumerate(tensors) if x is not None and i not in INTEGERS]

    def step(*given):
        inputs = list(tensors)
        for i, x in zip(places, given, strict=True):
            inputs[i] = x
        return [x for x in call(reference.sparse_step, inputs) if x.is_floating_point()]

    leaves = [tensors[i].clone().requires_grad_() for i in places]
    assert torch.autograd.gradcheck(step, leaves, fast_mode=True)


def test_with_all_slots_read_it_is_lrua():
    """One head, no write gate, and the same least used slots: reads, memory and gradients."""
    torch.manual_seed(2)
    T, B, N, D = 6, 2, 5, 4
    inputs = sparse_inputs((T, B, N, D, 1, N), True, False)
    memory, slots, weights, last, clock = inputs[:5]
    oldest, states, state = [], [], ops.SparseState(*inputs[:5])
    for t in range(T):
        oldest.append(torch.sort(state.last_access, dim=1, stable=True).indices[:, :1])
        _, state = reference.sparse_step(state, *(x[t] for x in inputs[5:9]))
        states.append(state)
    leaves = [x.clone().requires_grad_() for x in (memory, weights, *inputs[5:9])]
    reads, after = reference.sparse_scan(
        ops.SparseState(leaves[0], slots, leaves[1], last, clock), *leaves[2:]
    )
    expected, of_lrua = reference.lrua_scan(
        reference.LRUAState(
            leaves[0], torch.zeros(B, 1, N).double().scatter(2, slots, leaves[1]), torch.zeros(B, N).double()
        ),
        *leaves[2:],
        slots=torch.stack(oldest),
    )
    noise = torch.randn_like(reads), torch.randn_like(memory)
    losses = [
        (x * noise[0]).sum() + (m * noise[1]).sum() for x, m in ((reads, after[0]), (expected, of_lrua[0]))
    ]
    assert worst_error(reads, expected, 1) < 1e-12 and worst_error(after[0], of_lrua[0]) < 1e-12
    for x, y in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert worst_error(x.flatten()[None], y.flatten()[None]) < 1e-11


# ---- ties, and numbers that are not finite ---------------------------------------------------------------------------

on_both = pytest.mark.parametrize(
    "module", [reference, pytest.param(ops, marks=needs_kernels)], ids=["reference", "tested"]
)


@on_both
def test_equal_slots_go_by_number(module):
    N, R, K = 40, 2, 3
    state = module.SparseState.initial(1, N, 5, R, K)
    zero, ones = torch.zeros(1, R), torch.ones(1, R, 5)
    _, after = module.sparse_step(state, ones, 0 * ones, zero)
    assert after.read_slots.tolist() == [[[0, 3, 4], [0, 3, 4]]]  # 1 and 2 were erased, the oldest
    assert after.last_access[0, :6].tolist() == [1, 1, 1, 1, 1, -1]
    _, after = module.sparse_step(after, ones, ones, zero - 30)
    assert set(after.read_slots[0, 0, :2].tolist()) == {5, 6}
    values = torch.randn(1, 7, 5).repeat(1, 9, 1)  # each of 7 rows 9 times
    _, slots, weights = module.sparse_read(values, values[:, :R].contiguous(), num_reads=9)
    for r in range(R):
        assert slots[0, r].tolist() == list(range(r, 63, 7))
    assert weights.unique().numel() == 1


@on_both
def test_a_nan_slot_is_read_first_and_erasing_clears_it(module):
    torch.manual_seed(0)
    memory = torch.randn(1, 50, 4)
    memory[0, 30], memory[0, 17] = torch.nan, torch.nan
    slots = module.sparse_read(memory, torch.randn(1, 2, 4), num_reads=3)[1]
    assert slots[0, :, :2].tolist() == [[17, 30], [17, 30]]
    state = module.SparseState.initial(1, 50, 4, 1, 2)
    memory[0, 30], memory[0, 17], memory[0, 1] = 0, 0, torch.nan
    read, after = module.sparse_step(
        state._replace(memory=memory), *torch.randn(2, 1, 1, 4).unbind(0), torch.zeros(1, 1)
    )
    assert read.isfinite().all() and after.memory.isfinite().all()


@pytest.mark.filterwarnings("ignore:All-NaN")  # NumPy, of what Triton's interpreter finds the greatest
@on_both
def test_an_infinite_vector_reaches_the_slots_of_its_head_alone(module):
    torch.manual_seed(0)
    state = module.SparseState.initial(1, 20, 4, 2, 2)
    vector = torch.zeros(1, 2, 4)
    vector[0, 1] = torch.inf
    _, after = module.sparse_step(state, torch.randn(1, 2, 4), vector, torch.zeros(1, 2))
    assert (~after.memory[0].isfinite()).any(1).nonzero().flatten().tolist() == [0, 1, 2]


# ---- the kernels -------------------------------------------------------------------------------------------------------


@needs_kernels
@every_shape
@pytest.mark.parametrize("optional", OPTIONAL, ids=["all", "none", "sharpness"])
def test_scan_in_float64(shape, optional):
    torch.manual_seed(0)
    inputs = sparse_inputs(shape, *optional)
    actual = results_and_gradients(ops.sparse_scan, inputs)
    expected = results_and_gradients(reference.sparse_scan, inputs)
    for i, (x, y) in enumerate(zip(actual[0], expected[0], strict=True)):
        if x.is_floating_point():
            assert worst_error(x, y, batch_axis=1 if i == 0 else 0) < 1e-11, i
        else:
            assert torch.equal(x, y), i
    for i, (x, y) in enumerate(zip(actual[1], expected[1], strict=True)):
        assert worst_error(x, y, batch_axis=0 if i < 2 else 1) < 1e-9 or (x - y).abs().max() < 1e-13, i


@needs_kernels
@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=str
)
def test_scan_in_single_and_half_precision(dtype, bound):
    """Against float64, with the slots that were chosen."""
    torch.manual_seed(0)
    inputs = cast(sparse_inputs(shorter((12, 2, 90, 24, 3, 4), (3, 1, 40, 9, 3, 4))), dtype)
    actual = results_and_gradients(ops.sparse_scan, inputs, dtype)
    assert actual[0][0].dtype == dtype and actual[0][1].dtype == torch.float32
    expected = results_and_gradients(reference.sparse_scan, inputs, slots=choices_of(inputs, dtype))
    for i in (0, 1, 3):
        assert worst_error(actual[0][i], expected[0][i], batch_axis=1 if i == 0 else 0) < bound
    for i, (x, y) in enumerate(zip(actual[1], expected[1], strict=True)):
        assert worst_error(x, y, batch_axis=0 if i < 2 else 1) < bound, i


@needs_kernels
@every_shape
def test_read(shape):
    torch.manual_seed(0)
    _, B, N, D, R, K = shape
    memory = torch.randn(B, N, D, dtype=torch.float64)
    key, sharpness = torch.randn(B, R, D, dtype=torch.float64), torch.rand(B, R, dtype=torch.float64)
    found = []
    for module in (ops, reference):
        leaves = [x.clone().requires_grad_() for x in (memory, key, sharpness)]
        read, slots, weights = module.sparse_read(*leaves, num_reads=K)
        loss = (read * fixed_noise(read, torch.Generator().manual_seed(1))).sum() + weights.square().sum()
        found.append((slots, [read, weights, *torch.autograd.grad(loss, leaves)]))
    assert torch.equal(found[0][0], found[1][0])
    for x, y in zip(found[0][1], found[1][1], strict=True):
        assert worst_error(x, y) < 1e-10 or (x - y).abs().max() < 1e-13


def assert_as_the_reference(inputs, scan=lambda of: of.sparse_scan):
    actual, expected = (results_and_gradients(scan(of), inputs) for of in (ops, reference))
    for x, y in zip((*actual[0], *actual[1]), (*expected[0], *expected[1]), strict=True):
        assert worst_error(x[None], y[None]) < 1e-10


@needs_kernels
def test_samples_that_begin_anew_and_end():
    """A few of them, for kernels to which test_sequences.py is too long; more slots than a Triton program takes, and a
    threshold that not every write exceeds."""
    T, B, N, D = 4, 3, 70, 33
    resets = torch.tensor([[0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 0, 1]]).bool()
    options = {"resets": resets, "lengths": torch.tensor([T, 0, 3]), "threshold": 0.3}

    def scan(of):
        return lambda state, *told: of.sparse_scan(state, *told[:-1], start=told[-1], **options)

    start = torch.randn(N, D, dtype=torch.float64)
    assert_as_the_reference([*sparse_inputs((T, B, N, D, 2, 3)), start], scan)


@needs_kernels
def test_a_slot_named_twice_is_written_with_both_weights():
    """A state may be made by hand, with read slots that are alike."""
    inputs = sparse_inputs((2, 2, 9, 5, 2, 4))
    inputs[1] = inputs[1] % 2
    assert_as_the_reference(inputs)


@pytest.mark.skipif(not INTERPRETED, reason="only Triton's programs look at parts of what they choose from")
def test_lists_and_rows_in_several_parts(monkeypatch):
    from mann_fast.kernels import sparse

    monkeypatch.setattr(sparse, "LIST_NUMBERS", 16)
    monkeypatch.setattr(sparse, "PIECE_NUMBERS", 128)
    assert_as_the_reference(sparse_inputs((2, 1, 70, 33, 3, 5)))


@needs_kernels
@too_long_to_interpret
def test_a_sample_that_several_blocks_or_threads_search():
    """With samples that begin anew, and more reads than a warp has lanes."""
    torch.manual_seed(0)
    shape = shorter((4, 2, 2100, 32, 2, 37), (2, 2, 40, 8, 2, 37))
    steps, batch, N, D, R, K = shape
    inputs = sparse_inputs(shape)
    inputs[0][:, N // 2 :] = inputs[0][:, : N - N // 2]  # the same rows twice
    start = torch.randn(N, D, dtype=torch.float64)
    options = {
        "resets": torch.arange(steps * batch).view(steps, batch) % 3 == 2,
        "lengths": torch.tensor([steps, steps - 1]),
        "start": start,
    }
    actual = results_and_gradients(ops.sparse_scan, inputs, **options)
    expected = results_and_gradients(reference.sparse_scan, inputs, **options)
    for x, y in zip(actual[0], expected[0], strict=True):
        assert worst_error(x, y) < 1e-11 if x.is_floating_point() else torch.equal(x, y)
    for x, y in zip(actual[1], expected[1], strict=True):
        assert worst_error(x.flatten()[None], y.flatten()[None]) < 1e-9
    equal, key = inputs[0].detach()[:, : N // 9].repeat(1, 9, 1).float(), inputs[5].detach()[0].float()
    slots, weights = ops.sparse_read(equal, key, num_reads=9)[1:]
    assert torch.equal(
        slots.diff(), torch.full_like(slots[..., 1:], N // 9)
    )  # one row in all its places, in their order
    assert weights.unique().numel() == 1


@needs_kernels
@too_long_to_interpret
def test_all_of_many_slots_read():
    """More than a block of a GPU has shared memory for."""
    torch.manual_seed(0)
    N = shorter(600, 20)
    memory, key = torch.randn(1, N, 3, dtype=torch.float64), torch.randn(1, 4, 3, dtype=torch.float64)
    actual = ops.sparse_read(memory, key, num_reads=N)
    expected = reference.sparse_read(memory, key, num_reads=N)
    assert torch.equal(actual[1], expected[1])
    assert worst_error(actual[0], expected[0]) < 1e-11 and worst_error(actual[2], expected[2]) < 1e-11


@needs_kernels
def test_steps_are_a_scan():
    """To the bit, and in halves: the order of the slots by age is made anew for each call."""
    torch.manual_seed(0)
    inputs = sparse_inputs(shorter((8, 2, 40, 6, 2, 3), (5, 1, 40, 6, 2, 3)), dtype=torch.float32)
    whole = call(ops.sparse_scan, inputs)
    state, reads = ops.SparseState(*inputs[:5]), []
    for part in shorter(((0, 1), (1, 2), (2, 5), (5, 8)), ((0, 1), (1, 3), (3, 5))):
        given = [x[slice(*part)] for x in inputs[5:]]
        if part[1] - part[0] == 1:
            read, state = ops.sparse_step(state, *(x[0] for x in given))
            reads.append(read[None])
        else:
            read, state = ops.sparse_scan(state, *given)
            reads.append(read)
    for x, y in zip(whole, (torch.cat(reads), *state), strict=True):
        assert torch.equal(x, y)


@needs_cpp  # which alone looks for rows that are alike
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", ["alike", "a few others", "none alike", "not finite"])
def test_where_rows_are_alike_a_scan_finds_what_a_search_of_all_finds(start, dtype):
    """A scan compares the rows that differ, as far as they are a quarter of the slots; a step by itself compares all."""
    T, B, N, D, R, K = 300, 2, 1030, 5, 1, 3
    inputs = cast(sparse_inputs((T, B, N, D, R, K)), dtype)
    state = ops.SparseState.initial(B, N, D, R, K, dtype=dtype)
    few = torch.randperm(N)[:40]
    if start == "a few others":
        state.memory[0, few] = torch.randn(40, D, dtype=dtype)
        state.memory[1, few[:20]] = -state.memory[1, few[:20]]  # of equal cosine but for the sign
    elif start == "none alike":
        state.memory.copy_(inputs[0])
    elif start == "not finite":
        state.memory[:] = float("nan")
        state.memory[0, few] = torch.randn(40, D, dtype=dtype)
        state.memory[1, few] = float("inf")
    told = [x.detach() for x in inputs[5:]]
    told[0][7] = told[0][6]  # a key that finds what was written for it
    resets, begin = torch.rand(T, B) < 0.004, torch.full((N, D), 0.5, dtype=dtype)
    reads, after = ops.sparse_scan(state, *told, resets=resets, start=begin)
    alone, now = [], state
    for t in range(T):
        one = [x[t : t + 1] for x in (*told, resets)]
        read, now = ops.sparse_scan(now, *one[:-1], resets=one[-1], start=begin)
        alone.append(read)
    assert torch.equal(reads.nan_to_num(7), torch.cat(alone).nan_to_num(7))
    for name, part, want in zip(after._fields, after, now, strict=True):
        assert torch.equal(part.nan_to_num(7), want.nan_to_num(7)), name


@needs_kernels
def test_what_is_kept_does_not_grow_with_the_slots():
    kept = []
    for N in (50, 500):
        total = 0

        def pack(x):
            nonlocal total
            total += x.numel() * x.element_size()
            return x

        inputs = sparse_inputs(shorter((6, 2, N, 5, 2, 3), (2, 1, N, 5, 2, 3)))
        inputs[5].requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            call(ops.sparse_scan, inputs)
        kept.append(total)
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    "error, text, changed",
    [
        (ValueError, r"num_reads must be within \[1, N = 5\], got 6", {"num_reads": 6}),
        (ValueError, r"num_reads must be within \[1, N = 5\], got 0", {"num_reads": 0}),
        (TypeError, "num_reads must be an int, got float", {"num_reads": 2.0}),
        (ValueError, "eps must be positive", {"eps": 0.0}),
    ],
)
def test_bad_options_of_a_read(error, text, changed):
    with pytest.raises(error, match=text):
        ops.sparse_read(torch.rand(2, 5, 3), torch.rand(2, 1, 3), **{"num_reads": 2, **changed})


def test_bad_values_of_a_step():
    state = ops.SparseState.initial(2, 5, 3, 2, 2)
    key, gate = torch.rand(2, 2, 3), torch.rand(2, 2)

    def step(state=state, **options):
        ops.sparse_step(state, key, key, gate, **options)

    step()
    for threshold in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"threshold must be within \[0, 1\), got"):
            step(threshold=threshold)
    with pytest.raises(TypeError, match="threshold must be a number, got str"):
        step(threshold="low")
    for slot in (-1, 5):
        with pytest.raises(ValueError, match=r"state.read_slots must be within \[0, N = 5\), got"):
            step(state._replace(read_slots=state.read_slots.clone().fill_(slot)))
    with pytest.raises(ValueError, match=r"state.read_slots \[B, R, K\] must have 1 <= K <= N = 5"):
        step(
            state._replace(
                read_slots=state.read_slots.repeat(1, 1, 3), read_weights=state.read_weights.repeat(1, 1, 3)
            )
        )
    later = state.last_access.clone()
    later[-1, 2] = 9
    message = f"state.last_access must be at most state.clock, {int(state.clock[-1])} of sample {len(later) - 1}, got 9"
    with pytest.raises(ValueError, match=message):
        step(state._replace(last_access=later))
    with pytest.raises(TypeError, match=r"state.clock must be torch.int64, got torch.int32"):
        step(state._replace(clock=state.clock.int()))
    with pytest.raises(ValueError, match="num_reads must be at most num_slots = 3, got 4"):
        ops.SparseState.initial(1, 3, 2, 1, 4)
    assert state.to(torch.float64).clock.dtype == torch.int64
