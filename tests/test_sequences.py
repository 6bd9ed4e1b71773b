"""Resets and lengths in every scan: each sample against the same sample cut at its resets and its length, piece by piece."""

import os
import subprocess
import sys

import pytest
import torch
from cases import (
    BACKEND,
    INTERPRETED,
    distinct_state,
    fixed_noise,
    implemented,
    needs_kernels,
    scan_inputs,
    served_by,
    shorter,
    worst_error,
)
from test_dnc import dnc_inputs
from test_sparse import sparse_inputs

from mann_fast import MemoryLayer, ops, reference
from mann_fast.reference.cell import (
    CONTROLLERS,
    dnc_head_sizes,
    head_sizes,
    ntm_head_sizes,
    sparse_head_sizes,
)

SLOTS, WIDTH, HEADS, HIDDEN = 7, 5, 2, 6


class Family:
    """One scan: tensors of the state [B, ...], of the inputs [T, B, ...] and of what samples share, all in float64.

    ``run(state, inputs, shared, **sequences)`` gives outputs [T, B, ...] and the state after.
    """

    constant_start = 1e-6  # of every number of the memory

    def __init__(self, options):
        self.options = options

    def draw(self, steps, batch):
        raise NotImplementedError

    def first(self, memory):
        """The state of one sample at the start of a sequence, with the memory [N, D]."""
        raise NotImplementedError


def one_hot(*sizes):
    rows = torch.zeros(sizes, dtype=torch.float64)
    rows[..., 0] = 1
    return rows


class Lrua(Family):
    op = staticmethod(ops.lrua_scan)
    constants = (2,)  # of the state: usage

    def draw(self, steps, batch):
        return list(distinct_state(batch, SLOTS, WIDTH, HEADS)), scan_inputs(steps, batch, WIDTH, HEADS), []

    def first(self, memory):
        return [memory[None], one_hot(1, HEADS, SLOTS), one_hot(1, SLOTS)]

    def run(self, state, inputs, shared, **sequences):
        reads, state = self.op(ops.LRUAState(*state), *inputs, **sequences, **self.options)
        return reads, list(state)


def normal(*sizes):
    return torch.randn(sizes, dtype=torch.float64)


def ntm_state(batch):
    weights = [torch.softmax(normal(batch, HEADS, SLOTS), -1) for _ in range(2)]
    return [normal(batch, SLOTS, WIDTH), *weights]


class Ntm(Family):
    op = staticmethod(ops.ntm_scan)
    constants = ()

    def draw(self, steps, batch):
        state, inputs = ntm_state(batch), []
        for _ in range(2):
            sizes = (steps, batch, HEADS)
            inputs += [normal(*sizes, WIDTH), 5 * normal(*sizes).abs(), torch.sigmoid(normal(*sizes))]
            inputs += [torch.softmax(normal(*sizes, 3), -1), 1 + 2 * normal(*sizes).abs()]
        written = (steps, batch, HEADS, WIDTH)
        return state, [*inputs, torch.sigmoid(normal(*written)), normal(*written)], []

    def first(self, memory):
        return [memory[None], one_hot(1, HEADS, SLOTS), one_hot(1, HEADS, SLOTS)]

    def run(self, state, inputs, shared, **sequences):
        heads = ops.NTMHead(*inputs[:5]), ops.NTMHead(*inputs[5:10])
        reads, state = self.op(ops.NTMState(*state), *heads, *inputs[10:], **sequences, **self.options)
        return reads, list(state)


class Dnc(Family):
    op = staticmethod(ops.dnc_scan)
    constants = (5,)  # write weights
    constant_start = 0.0

    def draw(self, steps, batch):
        inputs = dnc_inputs(steps, batch, SLOTS, WIDTH, HEADS)
        return inputs[:6], inputs[6:], []

    def first(self, memory):
        state = ops.DNCState.initial(1, SLOTS, WIDTH, HEADS, dtype=torch.float64)
        return [memory[None], *state[1:]]

    def run(self, state, inputs, shared, **sequences):
        reads, state = self.op(ops.DNCState(*state), ops.DNCInterface(*inputs), **sequences, **self.options)
        return reads, list(state)


class Sparse(Family):
    op = staticmethod(ops.sparse_scan)
    constants = (1, 3, 4)  # the integers
    reads = 3

    def draw(self, steps, batch):
        inputs = sparse_inputs((steps, batch, SLOTS, WIDTH, HEADS, self.reads))
        return inputs[:5], inputs[5:], []

    def first(self, memory):
        state = ops.SparseState.initial(1, SLOTS, WIDTH, HEADS, self.reads, dtype=torch.float64)
        return [memory[None], *state[1:]]

    def run(self, state, inputs, shared, **sequences):
        reads, state = self.op(ops.SparseState(*state), *inputs, **sequences, **self.options)
        return reads, list(state)


class Cell(Family):
    constants = (2,)
    op, memory = staticmethod(ops.cell), ops.LRUAState

    def of_memory(self, batch):
        """The memory's state, and how many values its heads have."""
        return distinct_state(batch, SLOTS, WIDTH, HEADS), head_sizes(HEADS, WIDTH, "separate", "learned")

    def first_of_memory(self, memory):
        return [memory[None], one_hot(1, HEADS, SLOTS), one_hot(1, SLOTS)]

    def draw(self, steps, batch):
        per_unit, names = CONTROLLERS[self.options["controller"]]
        memory, sizes = self.of_memory(batch)
        gates, values = per_unit * HIDDEN, sum(sizes)
        state = [*memory, normal(batch, HEADS, WIDTH), *(normal(batch, HIDDEN) for _ in names)]
        hidden = [normal(gates, HIDDEN) / 2, normal(gates) / 5] if names else [None, None]
        shared = [*hidden, normal(gates, HEADS * WIDTH) / 2, normal(values, HIDDEN), normal(values) / 5]
        return state, [normal(steps, batch, gates)], shared

    def first(self, memory):
        zero = [torch.zeros(1, HIDDEN, dtype=torch.float64)] * len(CONTROLLERS[self.options["controller"]][1])
        return [*self.first_of_memory(memory), torch.zeros(1, HEADS, WIDTH, dtype=torch.float64), *zero]

    def run(self, state, inputs, shared, **sequences):
        count = len(self.memory._fields)
        memory, reads, controller = self.memory(*state[:count]), state[count], tuple(state[count + 1 :])
        output, controller, memory, reads = self.op(
            *inputs, controller, memory, reads, *shared, **sequences, **self.options
        )
        return output, [*memory, reads, *controller]


class NtmCell(Cell):
    constants = ()
    op, memory = staticmethod(ops.ntm_cell), ops.NTMState

    def of_memory(self, batch):
        return ntm_state(batch), ntm_head_sizes(HEADS, WIDTH, self.options.get("max_shift", 1))

    def first_of_memory(self, memory):
        return [memory[None], one_hot(1, HEADS, SLOTS), one_hot(1, HEADS, SLOTS)]


class DncCell(Cell):
    constants = (5,)
    constant_start = 0.0
    op, memory = staticmethod(ops.dnc_cell), ops.DNCState

    def of_memory(self, batch):
        sizes = dnc_head_sizes(HEADS, WIDTH, link=True, masks=False, link_sharpening=False)
        return dnc_inputs(1, batch, SLOTS, WIDTH, HEADS)[:6], sizes

    def first_of_memory(self, memory):
        return Dnc({}).first(memory)


class SparseCell(Cell):
    constants = (1, 3, 4)
    op, memory = staticmethod(ops.sparse_cell), ops.SparseState

    def of_memory(self, batch):
        state = sparse_inputs((1, batch, SLOTS, WIDTH, HEADS, Sparse.reads))[:5]
        return state, sparse_head_sizes(HEADS, WIDTH)

    def first_of_memory(self, memory):
        return Sparse({}).first(memory)


FAMILIES = {
    "lrua": Lrua({}),
    "lrua-read-first": Lrua({"order": "read_first", "write_target": "shared"}),
    "ntm": Ntm({}),
    "ntm-write-first": Ntm({"order": "write_first"}),
    "dnc": Dnc({"deallocate": True}),
    "sparse": Sparse({}),
    **{f"cell-{name}": Cell({"controller": name}) for name in CONTROLLERS},
    **{f"ntm-cell-{name}": NtmCell({"controller": name}) for name in CONTROLLERS},
    "dnc-cell-lstm": DncCell({"controller": "lstm", "deallocate": True}),
    "sparse-cell-lstm": SparseCell({"controller": "lstm"}),
}
every_family = pytest.mark.parametrize(
    "family",
    [
        # Where there is no such op, a loop over the memory's step, the same with each controller; and in Triton's interpreter,
        # where there is none, the step is tested by itself.
        pytest.param(
            family,
            marks=[pytest.mark.thorough]
            if name.endswith(("gru", "feedforward")) or INTERPRETED and name not in ("lrua", "ntm", "dnc")
            else [],
        )
        for name, family in FAMILIES.items()
    ],
    ids=FAMILIES,
)
on_backends = pytest.mark.parametrize(
    "name", [pytest.param("tested", marks=needs_kernels), "reference"], ids=[BACKEND, "reference"]
)

# Of these, a scan that keeps an anchor every 8 steps has several replays, cut by resets before, at and after an anchor.
STEPS = shorter(21, 11)
LENGTHS = [STEPS, 0, 1, STEPS - 4, 9]
RESETS = [[0, 3, 8, 9], [2], [0], [1, 5, 7, 16], [8, 10]]


def drawn(family, steps=STEPS, batch=5):
    torch.manual_seed(0)
    state, inputs, shared = family.draw(steps, batch)
    start = torch.randn(SLOTS, WIDTH, dtype=torch.float64)
    return state, inputs, shared, start


def flags(rows=RESETS, steps=STEPS):
    resets = torch.zeros(steps, len(rows), dtype=torch.bool)
    for sample, places in enumerate(rows):
        for place in places:
            if place < steps:
                resets[place, sample] = True
    return resets


def cut(family, state, inputs, shared, resets, lengths, start):
    """What the scan should give: every piece of every sample by itself."""
    steps, batch = inputs[0].shape[:2]
    outputs, states = [], []
    for b in range(batch):
        now, rows = [x[b : b + 1] for x in state], []
        length = steps if lengths is None else int(lengths[b])
        t = 0
        while t < length:
            if resets is not None and resets[t, b]:
                now = family.first(start)
            end = t + 1
            while end < length and not (resets is not None and resets[end, b]):
                end += 1
            piece = [x if x is None else x[t:end, b : b + 1] for x in inputs]
            row, now = family.run(now, piece, shared)
            rows.append(row)
            t = end
        out = torch.cat(rows) if rows else None
        width = family.run([x[:1] for x in state], [x if x is None else x[:1, :1] for x in inputs], shared)[0]
        padding = width.detach().new_zeros(steps - length, *width.shape[1:])
        outputs.append(padding if out is None else torch.cat([out, padding]))
        states.append(now)
    return torch.cat(outputs, 1), [torch.cat(parts) for parts in zip(*states, strict=True)]


def with_gradients(run, family, state, inputs, shared, start):
    """Results, and the gradients of a fixed random functional of them in everything that is differentiable."""
    state = [x.detach().clone().requires_grad_(i not in family.constants) for i, x in enumerate(state)]
    inputs, shared = (
        [x if x is None else x.detach().clone().requires_grad_() for x in part] for part in (inputs, shared)
    )
    start = start.detach().clone().requires_grad_()
    output, after = run(state, inputs, shared, start)
    generator = torch.Generator("cpu").manual_seed(1)
    loss = sum(
        (x * fixed_noise(x, generator).to(x.dtype)).sum()
        for i, x in enumerate((output, *after))
        if i - 1 not in family.constants
    )
    wanted = [x for x in (*state, *inputs, *shared, start) if x is not None and x.requires_grad]
    return [output, *after], torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)


def assert_same(actual, expected, tolerance=1e-9):
    for x, y in zip(actual[0], expected[0], strict=True):
        assert worst_error(x[None], y[None]) < tolerance
    for i, (x, y) in enumerate(zip(actual[1], expected[1], strict=True)):
        assert (x - y).abs().max() <= tolerance * max(1, y.abs().max()), i


@on_backends
@every_family
@pytest.mark.parametrize(
    "what", [*(pytest.param(x, marks=pytest.mark.thorough) for x in ("resets", "lengths")), "both"]
)
def test_each_sample_is_as_if_cut(family, what, name):
    state, inputs, shared, start = drawn(family)
    resets = None if what == "lengths" else flags()
    lengths = None if what == "resets" else torch.tensor(LENGTHS)
    sequences = {"resets": resets, "lengths": lengths}

    def run(state, inputs, shared, start):
        given = {} if resets is None else {"start": start}
        with served_by(name):
            return family.run(state, inputs, shared, **sequences, **given)

    def oracle(state, inputs, shared, start):
        with served_by("reference"):
            return cut(family, state, inputs, shared, resets, lengths, start)

    assert_same(*(with_gradients(f, family, state, inputs, shared, start) for f in (run, oracle)))


def assert_same_bits(x, y, family, name):
    """Bit for bit, but for the reference on a GPU: where PyTorch adds to the same row twice there, it adds in any order."""
    if x.is_cuda and (name == "reference" or isinstance(family, Sparse)):
        torch.testing.assert_close(x, y)
    else:
        assert torch.equal(x, y)


@on_backends
@every_family
def test_the_constant_start(family, name):
    state, inputs, shared, start = drawn(family)
    with served_by(name):
        actual = family.run(state, inputs, shared, resets=flags())
        expected = family.run(
            state, inputs, shared, resets=flags(), start=torch.full_like(start, family.constant_start)
        )
    for x, y in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        assert_same_bits(x, y, family, name)


@needs_kernels
@every_family
def test_the_bits_are_those_of_the_pieces(family):
    if not implemented(family.op.__name__):
        pytest.skip("products or all of it are PyTorch's there, whose bits depend on the size of the batch")
    state, inputs, shared, start = drawn(family)
    resets, lengths = flags(), torch.tensor(LENGTHS)
    actual = family.run(state, inputs, shared, resets=resets, lengths=lengths, start=start)
    expected = cut(family, state, inputs, shared, resets, lengths, start)
    for x, y in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        assert torch.equal(x, y)


@on_backends
@every_family
def test_padding_reaches_nothing(family, name):
    """Whatever it holds: bits of values and gradients stay, and its own gradient is exactly 0."""
    state, inputs, shared, start = drawn(family)
    lengths = torch.tensor(LENGTHS)
    padding = torch.arange(STEPS)[:, None] >= lengths
    filled = [
        x if x is None else torch.where(padding.view(*padding.shape, *(1,) * (x.dim() - 2)), torch.nan, x)
        for x in inputs
    ]

    def run(state, inputs, shared, start):
        with served_by(name):
            return family.run(state, inputs, shared, lengths=lengths)

    clean, dirty = (with_gradients(run, family, state, x, shared, start) for x in (inputs, filled))
    for x, y in zip((*clean[0], *clean[1]), (*dirty[0], *dirty[1]), strict=True):
        assert_same_bits(x, y, family, name)
    assert not clean[0][0][padding].any()
    of_inputs = dirty[1][len(state) - len(family.constants) :][: sum(x is not None for x in inputs)]
    for x in of_inputs:
        assert not x[padding].any()


@on_backends
@every_family
def test_a_reset_at_the_first_step_discards_the_state(family, name):
    state, inputs, shared, start = drawn(family)
    resets = flags([[0]] * 5)
    broken = [torch.full_like(x, torch.nan if x.is_floating_point() else 5) for x in state]

    def run(state, inputs, shared, start):
        with served_by(name):
            return family.run(state, inputs, shared, resets=resets, start=start)

    whole, discarded = (with_gradients(run, family, x, inputs, shared, start) for x in (state, broken))
    for x, y in zip((*whole[0], *whole[1]), (*discarded[0], *discarded[1]), strict=True):
        assert_same_bits(x, y, family, name)
    for x in discarded[1][: len(state) - len(family.constants)]:
        assert not x.any()


@on_backends
@every_family
def test_all_lengths_zero(family, name):
    state, inputs, shared, _ = drawn(family)
    with served_by(name):
        output, after = family.run(state, inputs, shared, lengths=torch.zeros(5, dtype=torch.int64))
    assert not output.any()
    for x, y in zip(after, state, strict=True):
        assert torch.equal(x, y)


@every_family
def test_bad_values_are_refused(family):
    state, inputs, shared, start = drawn(family)
    resets, lengths = flags(), torch.tensor(LENGTHS)
    for error, text, sequences in (
        (TypeError, r"resets must be torch.bool, got torch.int64", {"resets": resets.long()}),
        (ValueError, r"resets must have shape \[T, B\]", {"resets": resets[:-1]}),
        (TypeError, r"lengths must be torch.int64, got torch.int32", {"lengths": lengths.int()}),
        (TypeError, r"lengths must be a tensor, got list", {"lengths": LENGTHS}),
        (ValueError, r"lengths must be within \[0, T = \d+\], got \[-1", {"lengths": torch.full((5,), -1)}),
        (ValueError, r"lengths must be within \[0, T = \d+\]", {"lengths": torch.full((5,), STEPS + 1)}),
        (ValueError, r"lengths must have shape \[B\]", {"lengths": lengths[:-1]}),
        (TypeError, r"resets must be given with it, got None", {"start": start}),
        (ValueError, r"start must have shape \[N, D\]", {"resets": resets, "start": start[:-1]}),
        (TypeError, r"start must have the dtype of", {"resets": resets, "start": start.float()}),
    ):
        if "within" in text and start.is_cuda:
            continue  # an assertion on the device, after which the process can use it no more: the next test
        with pytest.raises(error, match=text):
            family.run(state, inputs, shared, **sequences)


@pytest.mark.skipif(os.environ.get("MANN_FAST_TEST_DEVICE") != "cuda", reason="asks a GPU")
def test_a_gpu_asserts_that_lengths_are_within_the_steps():
    program = (
        "import torch; from mann_fast import ops; torch.set_default_device('cuda')\n"
        "state, x = ops.LRUAState.initial(2, 5, 3, 2), torch.randn(3, 2, 2, 3)\n"
        "ops.lrua_scan(state, x, x, x[..., 0], lengths=torch.tensor([3, 4])); torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0 and "device-side assert" in done.stderr


@needs_kernels
def test_half_precision():
    """The state is float32 beside it, the start, too."""
    state, inputs, _, start = drawn(FAMILIES["lrua"])
    state, start = [x.float() for x in state], start.float()
    inputs = [x.bfloat16() for x in inputs]
    sequences = {"resets": flags(), "lengths": torch.tensor(LENGTHS), "start": start}
    reads, after = FAMILIES["lrua"].run(state, inputs, [], **sequences)
    with served_by("reference"):
        expected, states = FAMILIES["lrua"].run(state, inputs, [], **sequences)
    assert reads.dtype == torch.bfloat16
    assert worst_error(reads[None], expected[None]) < 2e-2
    assert worst_error(after[0], states[0]) < 1e-4
    assert isinstance(reference.LRUAState(*after), ops.LRUAState)


def test_a_rollout_as_a_cuda_graph():
    """As docs/sequences.md has it: every step is a replay of one, whose tensors stay where they are."""
    device = torch.get_default_device()
    if device.type != "cuda":
        pytest.skip("a CUDA graph takes a GPU")
    layer = MemoryLayer(3, 6, num_slots=7, slot_size=5, num_heads=2, memory_start="learned")
    inputs, resets = torch.randn(12, 1, 4, 3), torch.rand(12, 1, 4) < 0.3
    resets[0] = True
    x, begins, state = inputs[0].clone(), resets[0].clone(), layer.initial_state(4)
    beside = torch.cuda.Stream()
    with torch.no_grad():
        with torch.cuda.stream(beside):
            layer(x, state, resets=begins)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output, after = layer(x, state, resets=begins)
            for old, new in zip(state.flatten(), after.flatten(), strict=True):
                old.copy_(new)
        expected, outputs = [], []
        plain = None
        for t, (now, begin) in enumerate(zip(inputs, resets, strict=True)):
            if t == 6:
                layer.heads.weight.mul_(0.9)  # as an optimizer changes it
            x.copy_(now)
            begins.copy_(begin)
            graph.replay()
            outputs.append(output.clone())
            step, plain = layer(now, plain, resets=begin)
            expected.append(step)
    assert torch.equal(torch.cat(outputs), torch.cat(expected))
    for part, want in zip(state.flatten(), plain.flatten(), strict=True):
        assert torch.equal(part, want)
