"""Resets, lengths and PackedSequences of the layers: each sample against the same sample cut at its resets and its length."""

import gc
import itertools
import re
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pytest
import torch
from cases import fixed_noise, needs_cpp, worst_error
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

from mann_fast import MANN, MemoryLayer, MemoryStack, MemoryState, ops
from mann_fast.layers import Memory, MemoryWeights

SIZES = {"num_slots": 7, "slot_size": 5, "num_heads": 2}
STEPS, BATCH = 9, 4
LENGTHS = torch.tensor([9, 0, 4, 7])
RESETS = torch.zeros(STEPS, BATCH, dtype=torch.bool)
for _sample, _steps in enumerate(([0, 4, 5], [2], [0, 3, 6], [2, 6, 8])):
    RESETS[_steps, _sample] = True
PADDING = torch.arange(STEPS)[:, None] >= LENGTHS


class Recurrent(nn.Module):
    """A controller of the user's own, whose state is () at the start."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRUCell(4 + 2 * 5, 6, dtype=torch.float64)

    def forward(self, z, state):
        hidden = self.rnn(z, *state[:1])
        count = torch.ones(len(z), dtype=torch.int64) if not state else state[1] + 1
        odd = torch.ones(len(z), dtype=torch.bool) if not state else ~state[2]
        assert count.dtype == torch.int64 and odd.dtype == torch.bool
        return hidden * (1 + 0.1 * count[:, None]) + odd[:, None], (hidden, count, odd)


class RingState(NamedTuple):
    """Without initial_like: the layer knows where a sequence starts."""

    memory: torch.Tensor
    place: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Ring(Memory):
    """A memory of the user's own: head r writes at step t to slot (t R + r) mod N."""

    def head_sizes(self):
        return [self.num_heads * self.slot_size, self.num_heads * self.slot_size]

    def initial_state(self, batch, *, dtype, device):
        memory = torch.full((batch, self.num_slots, self.slot_size), 0.1, dtype=dtype, device=device)
        place = torch.eye(self.num_slots, dtype=dtype, device=device)[: self.num_heads].repeat(batch, 1, 1)
        return RingState(memory, place)

    def split(self, values):
        shape = (self.num_heads, self.slot_size)
        return tuple(torch.tanh(part).unflatten(1, shape) for part in values.split(self.head_sizes(), 1))

    def step(self, state, heads, record=False):
        key, vector = heads
        memory, place = state
        memory = memory * (1 - place.sum(1).unsqueeze(2)) + place.transpose(1, 2) @ vector
        reads, weights = ops.content_read(memory, key, key.new_full(key.shape[:2], 3.0))
        return reads, RingState(memory, place.roll(self.num_heads, 2)), MemoryWeights(weights, place, None)


def called(layer):
    """With a module that has to be called at every step."""
    layer.heads.register_forward_hook(lambda module, inputs, output: output + 0.1)
    return layer


MEMORIES = ("lrua", "ntm", "content", "ring")
DNC = ("dnc", "dnc without links")
CONTROLLERS = ("lstm", "gru", "feedforward", "module")
WAYS = ("plain", "weights", "projection", "batch_first", "called")


def make_layer(memory="lrua", controller="lstm", dtype=torch.float64, **options):
    torch.manual_seed(0)
    controller = Recurrent() if controller == "module" else controller
    addressing = Ring() if memory == "ring" else memory
    if memory == "dnc without links":
        addressing, options = "dnc", {"link": False, **options}
    options = {"memory_start": "learned", **SIZES, **options}
    return MemoryLayer(4, 6, addressing=addressing, controller=controller, dtype=dtype, **options)


def drawn(layer, dtype=torch.float64):
    """x [T, B, ...], and a state in the middle of a sequence."""
    torch.manual_seed(1)
    x = torch.randn(STEPS, BATCH, 4, dtype=dtype)
    with torch.no_grad():
        state = layer(torch.randn(3, BATCH, 4, dtype=dtype).transpose(0, int(layer.batch_first)))[1]
    return x, state


def cut(layer, x, state, resets=None, lengths=None):
    """Output, state and weights, time first, of every piece of every sample run alone."""
    outputs, ends, recorded = [], [], []
    first = layer.initial_state(1)
    for b in range(x.shape[1]):
        length = x.shape[0] if lengths is None else int(lengths[b])
        places = [] if resets is None else [t for t in range(length) if resets[t, b]]
        now, rows = state.select(slice(b, b + 1)), []
        for start, end in itertools.pairwise(sorted({0, length, *places})):
            if start in places:
                kept = first.controller if layer.kind != "module" else ()
                now = first._replace(controller=kept)
            piece = x[start:end, b : b + 1].transpose(0, int(layer.batch_first))
            row, now, *weights = layer(piece, now, return_weights=True)
            rows.append((row.transpose(0, int(layer.batch_first)), weights[0]))
        whole = x.new_zeros(x.shape[0], 1, layer.output_size)
        outputs.append(torch.cat([*(row for row, _ in rows), whole[length:]]))
        ends.append(now)
        padding = [x.new_zeros(x.shape[0] - length, *part.shape[1:]) for part in weights[0][:2]]
        of_samples = [torch.cat([*(w[i] for _, w in rows), padding[i]]) for i in range(2)]
        recorded.append(of_samples)
    reads, writes = (torch.cat([sample[i] for sample in recorded], 1) for i in range(2))
    return torch.cat(outputs, 1), MemoryState.cat(ends), reads, writes


def with_gradients(run, layer, x, state):
    """Results, and the gradients in x, in the state and in the parameters of a fixed random functional of them."""
    x = x.detach().clone().requires_grad_()
    carry_none = {ops.LRUAState: "usage", ops.DNCState: "write_weights"}
    constant = getattr(state.memory, carry_none.get(type(state.memory), ""), None)
    state = state.map(
        lambda part: part.detach().clone().requires_grad_(part.is_floating_point() and part is not constant)
    )
    output, end, *weights = run(x, state)
    generator = torch.Generator().manual_seed(2)
    results = [output, *end.flatten(), *weights]
    weighted = [
        (part, fixed_noise(part, generator).to(x.dtype)) for part in results if part.is_floating_point()
    ]
    loss = sum((part * noise).sum() for part, noise in weighted if part.requires_grad)
    wanted = [x, *(part for part in state.flatten() if part.requires_grad), *layer.parameters()]
    return results, torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)


def assert_same(actual, expected, tolerance=1e-9):
    for a, b in zip(actual[0], expected[0], strict=True):
        assert a.dtype == b.dtype
        assert worst_error(a[None], b[None]) <= tolerance
    for i, (a, b) in enumerate(zip(actual[1], expected[1], strict=True)):
        assert (a - b).abs().max() <= tolerance * max(1, b.abs().max()), i


@pytest.mark.parametrize(
    ("memory", "controller", "way"),
    [
        *itertools.product(MEMORIES, CONTROLLERS, WAYS),
        *itertools.product(DNC, ("lstm", "module"), ("plain", "weights")),
        *itertools.product(DNC, ("gru",), WAYS[2:]),
    ],
)
@pytest.mark.filterwarnings("ignore:MemoryLayer goes one step after the other")
def test_each_sample_is_as_if_cut(memory, controller, way):
    options = {"projection": {"output_size": 3}, "batch_first": {"batch_first": True}}.get(way, {})
    layer = make_layer(memory, controller, **options)
    if way == "called":
        called(layer)
    x, state = drawn(layer)
    time = int(layer.batch_first)

    def run(x, state):
        output, end, *weights = layer(
            x.transpose(0, time),
            state,
            resets=RESETS.t() if time else RESETS,
            lengths=LENGTHS,
            return_weights=way == "weights",
        )
        return output.transpose(0, time), end, *(part for one in weights for part in one[:2])

    def oracle(x, state):
        return cut(layer, x, state, RESETS, LENGTHS)[: 4 if way == "weights" else 2]

    actual, expected = (with_gradients(f, layer, x, state) for f in (run, oracle))
    assert_same(actual, expected)
    assert not actual[0][0][PADDING].any()
    assert not actual[1][0][PADDING].any()
    assert actual[1][-1 if layer.projection is None else 0].any()


@pytest.mark.parametrize("given", ["resets", "lengths"])
@pytest.mark.parametrize("memory", ["lrua", "ntm", "ring", *DNC])
def test_one_of_them_alone(memory, given):
    layer = make_layer(memory, "gru")
    x, state = drawn(layer)
    sequences = {"resets": RESETS} if given == "resets" else {"lengths": LENGTHS}
    actual = with_gradients(partial(layer, **sequences), layer, x, state)
    assert_same(
        actual, with_gradients(lambda x, state: cut(layer, x, state, **sequences)[:2], layer, x, state)
    )


@pytest.mark.parametrize("controller", ["lstm", "module"])
@pytest.mark.parametrize("memory", ["lrua", "ntm", *DNC])
def test_without_a_state(memory, controller):
    layer = make_layer(memory, controller)
    x, _ = drawn(layer)
    output, end = layer(x, resets=RESETS, lengths=LENGTHS)
    start = layer.initial_state(BATCH)
    if controller == "module":  # what it has for a sample that took no step
        counts = torch.zeros(BATCH, dtype=torch.int64)
        start = start._replace(controller=(start.reads.new_zeros(BATCH, 6), counts, counts.bool()))
    expected = cut(layer, x, start, RESETS, LENGTHS)
    assert_same(([output, *end.flatten()], []), ([expected[0], *expected[1].flatten()], []))


@pytest.mark.parametrize("memory", ["lrua", "ntm", *DNC])
def test_unbatched(memory):
    layer = make_layer(memory, batch_first=True)
    x, state = drawn(layer)
    expected, ends, *_ = cut(layer, x, state, RESETS, LENGTHS)
    for b in range(BATCH):
        output, end, weights = layer(
            x[:, b], state.select(b), resets=RESETS[:, b], lengths=LENGTHS[b], return_weights=True
        )
        plain, same = layer(x[:, b], state.select(b), resets=RESETS[:, b], lengths=LENGTHS[b])
        assert output.shape == (STEPS, layer.output_size)
        assert weights.read.shape == (STEPS, 1, 2, 7)
        for results in ((output, *end.flatten()), (plain, *same.flatten())):
            for a, c in zip(results, (expected[:, b], *ends.select(b).flatten()), strict=True):
                assert worst_error(a[None], c[None]) < 1e-9


@pytest.mark.parametrize("way", ["plain", "weights", "projection", "module"])
@pytest.mark.parametrize("memory", ["lrua", "ntm", "ring", *DNC])
def test_what_is_discarded_reaches_nothing(memory, way):
    """NaN in padding, and in a state that a reset discards: the same bits of values and gradients."""
    layer = make_layer(memory, output_size=3 if way in ("projection", "module") else None)
    if way == "module":
        # x / |x| has no finite gradient at 0.
        layer.projection = nn.Sequential(Norm(), nn.Linear(16, 3, dtype=torch.float64))
    x, state = drawn(layer)
    resets = RESETS.clone()
    resets[0] = torch.tensor([True, True, False, False])
    dirty = torch.where(PADDING[:, :, None], torch.nan, x)
    # Of the samples whose first step resets them, but for the one that takes no step: that keeps what it came with.
    broken = state.map(lambda part: torch.cat([torch.full_like(part[:1], torch.nan), part[1:]]))

    def run(x, state):
        output, end, *weights = layer(
            x, state, resets=resets, lengths=LENGTHS, return_weights=way == "weights"
        )
        return output, end, *(part for one in weights for part in one if part is not None)

    clean, discarded = (with_gradients(run, layer, *inputs) for inputs in ((x, state), (dirty, broken)))
    for a, b in zip((*clean[0], *clean[1]), (*discarded[0], *discarded[1]), strict=True):
        assert torch.equal(a, b)
    assert not discarded[0][0][PADDING].any()
    assert not discarded[1][0][PADDING].any()
    for gradient in discarded[1][1 : len(state.flatten()) - 1]:
        assert not gradient[0].any()


class Norm(nn.Module):
    def forward(self, x):
        return x / x.norm(dim=-1, keepdim=True)


def test_a_sample_of_no_steps_shields_the_others_from_its_state():
    for memory in ("lrua", "ntm"):
        layer = make_layer(memory)
        x, state = drawn(layer)
        broken = state.map(
            lambda part: torch.where(LENGTHS.view(-1, *(1,) * (part.dim() - 1)) == 0, torch.nan, part)
        )
        results, gradients = with_gradients(partial(layer, lengths=LENGTHS), layer, x, broken)
        assert results[0].isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients)
        for a, b in zip(results[1:], broken.flatten(), strict=True):
            assert torch.equal(a[1].isnan(), b[1].isnan())  # it comes out as it came in


# PackedSequence.


PACKINGS = [([9, 7, 4, 1], True), ([4, 9, 1, 7], False), ([4, 6, 1, 5], False), ([3, 3, 3, 3], True)]


@pytest.mark.parametrize(("lengths", "enforce_sorted"), PACKINGS, ids=str)
@pytest.mark.parametrize("memory", ["lrua", "ntm", "ring"])
def test_packed(memory, lengths, enforce_sorted):
    layer = make_layer(memory, output_size=3)
    x, state = drawn(layer)
    lengths = torch.tensor(lengths)
    x = x[: lengths.max()]

    def run(x, state):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
        output, end = layer(packed, state)
        reference, _ = nn.LSTM(4, 3, dtype=torch.float64)(packed)
        assert type(output) is PackedSequence
        assert output.data.shape == reference.data.shape
        for a, b in zip(output[1:], reference[1:], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
        padded, same_lengths = pad_packed_sequence(output)
        assert torch.equal(same_lengths, lengths)
        return padded, end

    actual = with_gradients(run, layer, x, state)
    expected = with_gradients(lambda x, state: layer(x, state, lengths=lengths), layer, x, state)
    assert_same(actual, expected)


def test_packed_states_are_in_the_order_of_the_batch():
    """As those of nn.LSTM, in and out."""
    sequences = [torch.randn(n, 4, dtype=torch.float64) for n in (2, 5, 3)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    layer = make_layer()
    state = layer(torch.randn(2, 3, 4, dtype=torch.float64))[1].detach()
    output, end, weights = layer(packed, state, return_weights=True)
    assert weights.read.shape == (5, 3, 2, 7)
    for b, sequence in enumerate(sequences):
        alone, last, one = layer(sequence, state.select(b), return_weights=True)
        padded, _ = pad_packed_sequence(output)
        assert worst_error(padded[: len(sequence), b], alone) < 1e-9
        assert worst_error(weights.read[: len(sequence), b], one.read[:, 0]) < 1e-9
        assert not weights.read[len(sequence) :, b].any()
        for x, y in zip(end.select(b).flatten(), last.flatten(), strict=True):
            assert worst_error(x[None], y[None]) < 1e-9


def test_packed_with_batch_first():
    """It changes nothing but how x is packed, as in nn.LSTM."""
    layer = make_layer(batch_first=True)
    x, _ = drawn(layer)
    lengths = torch.tensor([9, 7, 4, 1])
    packed = pack_padded_sequence(x, lengths)
    assert torch.equal(packed.data, pack_padded_sequence(x.transpose(0, 1), lengths, batch_first=True).data)
    padded, _ = pad_packed_sequence(layer(packed)[0], batch_first=True)
    assert worst_error(padded, layer(x.transpose(0, 1), lengths=lengths)[0]) < 1e-9


def test_packed_rows_are_the_callers():
    """Changing the output in place changes no gradient."""
    layer = make_layer()
    packed = pack_padded_sequence(drawn(layer)[0], [9, 7, 4, 1])
    gradients = []
    for change in (False, True):
        output, _ = layer(packed)
        loss = output.data.sum()
        if change:
            with torch.no_grad():
                output.data.zero_()
        gradients.append(torch.autograd.grad(loss, layer.heads.weight)[0])
    assert torch.equal(*gradients)


# What does not fit.


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"resets": RESETS.long()}, TypeError, "resets must be torch.bool, got torch.int64"),
        ({"resets": RESETS.tolist()}, TypeError, "resets must be a tensor, got list"),
        ({"resets": RESETS.t()}, ValueError, "resets must have shape [T, B] = [9, 4], got [4, 9]"),
        ({"resets": RESETS[0]}, ValueError, "resets must have shape [T, B] = [9, 4], got [4]"),
        ({"resets": RESETS.to("meta")}, RuntimeError, "resets must be on the device of x, cpu, got meta"),
        ({"lengths": LENGTHS.int()}, TypeError, "lengths must be torch.int64, got torch.int32"),
        ({"lengths": LENGTHS.tolist()}, TypeError, "lengths must be a tensor, got list"),
        ({"lengths": LENGTHS[:3]}, ValueError, "lengths must have shape [B] = [4], got [3]"),
        ({"lengths": LENGTHS[0]}, ValueError, "lengths must have shape [B] = [4], got []"),
        ({"lengths": LENGTHS + 1}, ValueError, "lengths must be within [0, T = 9], got [10, 1, 5, 8]"),
        ({"lengths": LENGTHS - 1}, ValueError, "lengths must be within [0, T = 9], got [8, -1, 3, 6]"),
        ({"lengths": LENGTHS.to("meta")}, RuntimeError, "lengths must be on the device of x, cpu, got meta"),
    ],
    ids=str,
)
@pytest.mark.parametrize("memory", ["lrua", "ntm"])
def test_refuses(memory, given, error, message):
    layer = make_layer(memory)
    x, _ = drawn(layer)
    with pytest.raises(error, match=re.escape(message)):
        layer(x, **given)
    with pytest.raises(error, match=re.escape(message)):
        MemoryStack(4, 6, 2, bidirectional=True, dtype=torch.float64, addressing=layer.addressing, **SIZES)(
            x, **given
        )


def test_names_axes_as_x_has_them():
    layer = make_layer(batch_first=True)
    x, _ = drawn(layer)
    with pytest.raises(ValueError, match=re.escape("resets must have shape [B, T] = [4, 9], got [9, 4]")):
        layer(x.transpose(0, 1), resets=RESETS)
    with pytest.raises(ValueError, match=re.escape("resets must have shape [T] = [9], got [9, 4]")):
        layer(x[:, 0], resets=RESETS)
    with pytest.raises(ValueError, match=re.escape("lengths must have shape [] = [], got [4]")):
        layer(x[:, 0], lengths=LENGTHS)


@pytest.mark.parametrize("mode", ["real", "fake"])
@pytest.mark.parametrize("memory", ["lrua", "ntm"])
def test_make_fx_writes_down_no_values(memory, mode):
    layer = make_layer(memory)
    x, state = drawn(layer)

    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def run(parameters, x, state, **given):
        return torch.func.functional_call(layer, parameters, (x, state), given)[0]

    never, whole = torch.zeros_like(RESETS), torch.full_like(LENGTHS, STEPS)
    for given, others in (
        ({"resets": never}, {"resets": RESETS}),
        ({"resets": never, "lengths": whole}, {"resets": RESETS, "lengths": LENGTHS}),
    ):
        graph = make_fx(lambda *tensors: run(*tensors[:3], **tensors[3]), tracing_mode=mode)(
            parameters, x, state, given
        )
        found, expected = graph(parameters, x, state, others), run(parameters, x, state, **others)
        assert worst_error(found, expected) < 1e-12


@pytest.mark.parametrize("memory", ["lrua", "ntm"])
def test_fake_tensors_have_no_values_to_look_at(memory):
    with FakeTensorMode():
        layer = make_layer(memory)
        x, state = drawn(layer)
        output, end = layer(
            x, state, resets=torch.zeros(9, 4, dtype=torch.bool), lengths=torch.zeros(4, dtype=torch.int64)
        )
        assert output.shape == (9, 4, layer.output_size) and output.requires_grad
        assert [part.shape for part in end.flatten()] == [part.shape for part in state.flatten()]


def test_refuses_beside_a_packed_sequence():
    layer = make_layer()
    packed = pack_padded_sequence(drawn(layer)[0], [9, 7, 4, 1])
    for model in (layer, MemoryStack(4, 6, 2, dtype=torch.float64, **SIZES)):
        with pytest.raises(
            TypeError, match="lengths must be None beside a PackedSequence, which has its own"
        ):
            model(packed, lengths=LENGTHS)
        with pytest.raises(
            TypeError, match="PackedSequence: give the padded x, lengths and resets, got Tensor"
        ):
            model(packed, resets=RESETS)
        with pytest.raises(TypeError, match="x.data must have the dtype of the parameters"):
            model(packed.to(torch.float32))
    with pytest.raises(
        ValueError, match=re.escape("x.data must have shape [rows, input_size] with input_size = 4")
    ):
        layer(pack_padded_sequence(torch.zeros(5, 2, 3, dtype=torch.float64), [5, 2]))
    with pytest.raises(
        ValueError, match=re.escape("state.controller.hidden must have shape [4, 6], got [3, 6]")
    ):
        layer(packed, layer.initial_state(3))


def test_refuses_a_controller_that_keeps_no_samples():
    class Counting(Recurrent):
        def forward(self, z, state):
            return self.rnn(z), (torch.ones(()),)

    layer = make_layer()
    layer = MemoryLayer(4, 6, controller=Counting(), dtype=torch.float64, **SIZES)
    with pytest.raises(
        ValueError, match=re.escape("controller must keep tensors [B, ...] where resets or lengths")
    ):
        layer(drawn(layer)[0], lengths=LENGTHS)


# The edges.


@pytest.mark.parametrize("memory", ["lrua", "ntm"])
def test_nothing_to_do(memory):
    layer = make_layer(memory, output_size=3)
    x, state = drawn(layer)
    output, end = layer(x[:0], state, resets=RESETS[:0], lengths=torch.zeros(BATCH, dtype=torch.int64))
    assert output.shape == (0, BATCH, 3)
    zero, same = layer(x, state, resets=RESETS, lengths=torch.zeros(BATCH, dtype=torch.int64))
    assert not zero.any()
    for a, b, c in zip(end.flatten(), same.flatten(), state.flatten(), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, c)
    none = layer(x[:, :0], resets=RESETS[:, :0], lengths=LENGTHS[:0])[0]
    assert none.shape == (STEPS, 0, 3)


@pytest.mark.parametrize("memory", ["lrua", "ntm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(memory, dtype):
    layer = make_layer(memory, dtype=torch.float32, output_size=3)
    x, state = drawn(layer, torch.float32)
    lengths = torch.tensor([9, 1, 4, 7])
    expected = layer(x, state, resets=RESETS, lengths=lengths)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    with torch.autocast("cpu", dtype):
        result = layer(x, state, resets=RESETS, lengths=lengths)
        rows = layer(packed)[0]
    assert rows.data.dtype == dtype
    result[0].float().sum().backward()
    assert layer.start.grad.any()
    halved = make_layer(memory, dtype=torch.float32, output_size=3).to(dtype)
    for output, end in (result, halved(x.to(dtype), state.to(dtype), resets=RESETS, lengths=lengths)):
        assert output.dtype == dtype
        assert end.memory.memory.dtype == torch.float32
        assert not output[torch.arange(STEPS)[:, None] >= lengths].any()
        assert worst_error(output, expected[0]) < 0.3


# Stacks and models.


def stack_cut(stack, x, state, resets, lengths):
    """Each layer and direction over each piece alone; time first."""
    ends, count = [], 2 if stack.bidirectional else 1
    for number in range(stack.num_layers):
        outputs = []
        for direction in range(count):
            place = number * count + direction
            layer, start = stack.layers[place], state.layers[place]
            if not direction:
                output, end, *_ = cut(layer, x, start, resets, lengths)
            else:  # each sample turned by hand
                turned, flags = torch.zeros_like(x), torch.zeros_like(resets)
                for b, length in enumerate(lengths.tolist()):
                    turned[:length, b] = x[:length, b].flip(0)
                    for t in range(1, length):
                        flags[length - t, b] = resets[t, b]
                back, end, *_ = cut(layer, turned, start, flags, lengths)
                output = torch.cat(
                    [
                        torch.cat([back[:length, b : b + 1].flip(0), back[length:, b : b + 1]])
                        for b, length in enumerate(lengths.tolist())
                    ],
                    1,
                )
            outputs.append(output)
            ends += end.flatten()
        x = torch.cat(outputs, -1)
    return x, ends


def make_stack(**options):
    torch.manual_seed(0)
    return MemoryStack(4, 6, 2, dtype=torch.float64, memory_start="learned", **SIZES, **options)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("memory", ["lrua", "ntm"])
def test_stack(memory, bidirectional, batch_first):
    stack = make_stack(addressing=memory, bidirectional=bidirectional, batch_first=batch_first)
    time = int(batch_first)
    x = torch.randn(STEPS, BATCH, 4, dtype=torch.float64)
    state = stack(torch.randn(BATCH, BATCH, 4, dtype=torch.float64))[1].detach()

    def run(x, state):
        x = torch.where(PADDING[:, :, None], torch.nan, x).transpose(0, time)
        output, end = stack(x, state, resets=RESETS.t() if time else RESETS, lengths=LENGTHS)
        return output.transpose(0, time), end

    output, end = run(x, state)
    expected, ends = stack_cut(stack, x, state, RESETS, LENGTHS)
    assert worst_error(output, expected, 1) < 1e-9
    assert not output[PADDING].any()
    for a, b in zip(end.flatten(), ends, strict=True):
        assert worst_error(a, b) < 1e-9
    gradients = [
        torch.autograd.grad(part.square().sum(), list(stack.parameters())) for part in (output, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-8 * max(1, b.abs().max())


@pytest.mark.parametrize("bidirectional", [False, True])
def test_stack_unbatched_and_recorded(bidirectional):
    stack = make_stack(bidirectional=bidirectional)
    x = torch.randn(STEPS, BATCH, 4, dtype=torch.float64)
    output, end, weights = stack(x, resets=RESETS, lengths=LENGTHS, return_weights=True)
    for b, length in enumerate(LENGTHS):
        alone, last, recorded = stack(x[:, b], resets=RESETS[:, b], lengths=length, return_weights=True)
        assert worst_error(alone[None], output[None, :, b]) < 1e-9
        for of_one, of_all in zip(recorded, weights, strict=True):
            assert worst_error(of_one.write[None, :, 0], of_all.write[None, :, b]) < 1e-9
            assert not of_all.write[length:, b].any()
        for one, every in zip(last.flatten(), end.flatten(), strict=True):
            assert worst_error(one[None], every[b][None]) < 1e-9


@pytest.mark.parametrize(("lengths", "enforce_sorted"), PACKINGS, ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_stack_of_a_packed_sequence(bidirectional, lengths, enforce_sorted):
    stack = make_stack(bidirectional=bidirectional)
    lengths = torch.tensor(lengths)
    x = torch.randn(int(lengths.max()), BATCH, 4, dtype=torch.float64)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    output, end, weights = stack(packed, return_weights=True)
    expected, last, recorded = stack(x, lengths=lengths, return_weights=True)
    assert worst_error(pad_packed_sequence(output)[0], expected, 1) < 1e-9
    for a, b in zip((*end.flatten(), *weights), (*last.flatten(), *recorded), strict=True):
        for one, other in zip(a[:2], b[:2], strict=True):
            assert worst_error(one[None], other[None]) < 1e-9
    torch.manual_seed(5)
    stack.dropout = 0.5
    dropped = stack(packed)[0].data
    assert not torch.equal(dropped, output.data)
    stack.eval()
    assert torch.equal(stack(packed)[0].data, stack(packed)[0].data)


def test_mann():
    for batch_first, time in ((False, 0), (True, 1)):
        torch.manual_seed(0)
        model = MANN(4, 3, 6, batch_first=batch_first, dtype=torch.float64, **SIZES)
        x = torch.randn(STEPS, BATCH, 4, dtype=torch.float64)
        dirty = torch.where(PADDING[:, :, None], torch.nan, x).requires_grad_()
        logits, state = model(
            dirty.transpose(0, time), resets=RESETS.t() if time else RESETS, lengths=LENGTHS
        )
        logits = logits.transpose(0, time)
        assert not logits[PADDING].any()  # though the classifier has a bias
        gradients = torch.autograd.grad(logits.square().sum(), [dirty, *model.parameters()])
        assert not gradients[0][PADDING].any()
        whole, _ = model(x.transpose(0, time), resets=RESETS.t() if time else RESETS)
        whole = torch.where(PADDING[:, :, None], 0, whole.transpose(0, time))
        assert worst_error(logits, whole, 1) < 1e-9
        expected = torch.autograd.grad(whole.square().sum(), list(model.parameters()))
        for a, b in zip(gradients[1:], expected, strict=True):
            assert (a - b).abs().max() <= 1e-9 * max(1, b.abs().max())
        for b, length in enumerate(LENGTHS):
            alone, end = model(x[:, b], resets=RESETS[:, b], lengths=length)
            assert worst_error(alone[None], logits[None, :, b]) < 1e-9
            for one, every in zip(end.flatten(), state.flatten(), strict=True):
                assert worst_error(one[None], every[b][None]) < 1e-9
        lengths = torch.tensor([4, 9, 1, 7])
        packed, _ = model(pack_padded_sequence(x, lengths, enforce_sorted=False))
        padded, _ = pad_packed_sequence(packed)
        assert (
            worst_error(padded, model(x.transpose(0, time), lengths=lengths)[0].transpose(0, time), 1) < 1e-9
        )


def test_hooked_classifier_and_projection_see_the_whole_shape():
    model = MANN(4, 3, 6, dtype=torch.float64, **SIZES)
    model.classifier.weight.requires_grad_()
    shapes = []
    model.classifier.register_forward_hook(lambda module, inputs, output: shapes.append(inputs[0].shape))
    x = torch.randn(STEPS, BATCH, 4, dtype=torch.float64)
    logits, _ = model(x, lengths=LENGTHS)
    assert shapes == [(STEPS, BATCH, 16)]
    assert not logits[PADDING].any()


# Compilers and transforms.


@pytest.fixture
def anew():
    torch.compiler.reset()
    yield torch.compiler.reset
    torch.compiler.reset()


def compared(function, module, x, state, resets, lengths):
    x = x.detach().requires_grad_()
    module.zero_grad()
    output, end = function(x, state, resets=resets, lengths=lengths)
    (output.square().sum() + end.memory[0].sum()).backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]
    return [output.detach(), *(part.detach() for part in end.flatten()), x.grad, *grads]


def inputs(model, steps, batch):
    x = torch.randn(steps, batch, 4, dtype=torch.float64)
    with torch.no_grad():
        state = model(torch.randn(2, batch, 4, dtype=torch.float64))[1]
    resets, lengths = torch.rand(steps, batch) < 0.3, torch.randint(0, steps + 1, (batch,))
    x = torch.where(torch.arange(steps)[:, None, None] >= lengths[:, None], torch.nan, x)
    return x, state, resets, lengths


@pytest.mark.parametrize(
    ("memory", "sizes"),
    [
        pytest.param("lrua", [(6, 3), (7, 3), (8, 4), (33, 2), (1, 3), (5, 1), (1, 1)], marks=needs_cpp),
        pytest.param("ntm", [(3, 2), (4, 3), (6, 3)], marks=pytest.mark.thorough),
    ],
    ids=["lrua", "ntm"],
)
def test_compiles_no_more_often(memory, sizes, anew):
    counts = []
    for model in (
        MANN(4, 3, 6, addressing=memory, memory_start="learned", dtype=torch.float64, **SIZES),
        nn.Sequential(nn.Linear(4, 6, dtype=torch.float64), nn.Tanh()),
    ):
        anew()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for steps, batch in sizes:
            if isinstance(model, MANN):
                given = inputs(model, steps, batch)
                actual = compared(compiled, model, *given)
                for a, b in zip(actual, compared(model, model, *given), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
            else:
                compiled(torch.randn(steps, batch, 4, dtype=torch.float64)).sum().backward()
        counts.append(counter.frame_count)
    assert counts[0] <= counts[1]


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch.compile's own
@pytest.mark.parametrize(
    "make", [MemoryLayer, MemoryStack, partial(MANN, num_classes=3)], ids=["layer", "stack", "mann"]
)
def test_a_packed_sequence_is_not_compiled(make, anew):
    """As of nn.LSTM: what is around is."""
    model = make(4, hidden_size=6, **SIZES)
    packed = pack_padded_sequence(torch.randn(STEPS, BATCH, 4), [4, 9, 1, 7], enforce_sorted=False)

    def run(packed):
        return model(packed)[0].data * 2

    torch.testing.assert_close(torch.compile(run, backend="eager")(packed), run(packed))
    output, _ = torch.compile(model, backend="eager")(packed)
    assert type(output) is PackedSequence
    assert torch.equal(output.unsorted_indices, packed.unsorted_indices)
    anew()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="packed_uncompiled"):
        torch.compile(model, fullgraph=True, backend="eager")(packed)


def test_ensembles():
    layers = [make_layer("ntm"), make_layer("ntm")]
    with torch.no_grad():
        layers[1].heads.weight.mul_(2)
    x, _ = drawn(layers[0])
    lengths = torch.tensor([4, 9, 1, 7])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    parameters, _ = torch.func.stack_module_state(layers)

    def padded(parameters):
        return torch.func.functional_call(layers[0], parameters, (x,), {"lengths": lengths})[0]

    def rows(parameters):
        return torch.func.functional_call(layers[0], parameters, (packed,))[0].data

    for function, argument, given in ((padded, x, {"lengths": lengths}), (rows, packed, {})):
        together = torch.func.vmap(function)(parameters)
        for layer, one in zip(layers, together, strict=True):
            expected, _ = layer(argument, **given)
            torch.testing.assert_close(one, getattr(expected, "data", expected), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch.export's own
@pytest.mark.parametrize("memory", [pytest.param("lrua", marks=needs_cpp), "ntm"])
def test_exports(memory, anew):
    model = MANN(4, 3, 6, addressing=memory, memory_start="learned", dtype=torch.float64, **SIZES)
    x, state, resets, lengths = inputs(model, 6, 3)
    steps, batch = Dim("T", min=1), Dim("B", min=1)
    shapes = {
        "x": {0: steps, 1: batch},
        "state": torch.utils._pytree.tree_map(lambda _: {0: batch}, state),
        "resets": {0: steps, 1: batch},
        "lengths": {0: batch},
    }
    program = export(
        model, (x, state), {"resets": resets, "lengths": lengths}, dynamic_shapes=shapes
    ).module()
    for sizes in ((5, 2), (1, 1))[: 2 if memory == "lrua" else 1]:
        x, state, resets, lengths = inputs(model, *sizes)
        actual = program(x, state, resets=resets, lengths=lengths)
        expected = model(x, state, resets=resets, lengths=lengths)
        for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="lengths must be within"):
        program(x, state, resets=resets, lengths=lengths + 100)


class Traced(nn.Module):
    """By places, as torch.jit has arguments."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, resets, lengths):
        output, end = self.layer(x, resets=resets, lengths=lengths)
        return output, end.reads


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("memory", [pytest.param("lrua", marks=needs_cpp), "ntm"])
def test_traces(memory):
    """For other resets and lengths; with a fused memory also for another T."""
    layer = make_layer(memory, "gru")
    run = Traced(layer)
    x, _, resets, lengths = inputs(layer, 6, 3)
    traced = torch.jit.trace(run, (x, resets, lengths))
    for steps, batch in ((6, 3), (6, 2), (9, 4))[: 3 if memory == "lrua" else 2]:
        x, _, resets, lengths = inputs(layer, steps, batch)
        for a, b in zip(traced(x, resets, lengths), run(x, resets, lengths), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory", ["lrua", "ntm"])
def test_vmap_and_gradients_of_it(memory):
    layer = make_layer(memory, memory_start="constant")
    given = [inputs(layer, 5, 3) for _ in range(2)]
    x, resets, lengths = (torch.stack([one[i] for one in given]) for i in (0, 2, 3))

    def loss(x, resets, lengths):
        return layer(x, resets=resets, lengths=lengths)[0].square().sum()

    together = torch.func.vmap(torch.func.grad(loss))(x, resets, lengths)
    for i in range(2):
        now = x[i].clone().requires_grad_()
        (alone,) = torch.autograd.grad(loss(now, resets[i], lengths[i]), now)
        torch.testing.assert_close(together[i], alone, rtol=1e-9, atol=1e-9)


# A stream without an end.


def tensors_alive():
    gc.collect()
    parts = [part for part in gc.get_objects() if type(part) in (torch.Tensor, nn.Parameter)]
    return [
        part for part in parts if part.layout is torch.strided
    ]  # of others' there are some without a storage


@pytest.mark.parametrize(
    ("memory", "size"), [pytest.param("lrua", 100, marks=needs_cpp), ("ntm", 10)], ids=["lrua", "ntm"]
)
def test_a_hundred_chunks(memory, size):
    """10,000 steps, with backpropagation through each chunk: what is alive after the hundredth is what was after the tenth."""
    of_others = tensors_alive()  # which stay, so that none of them is missing later
    layer = MemoryLayer(2, 3, addressing=memory, num_slots=3, slot_size=2, num_heads=1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    state, alive = layer.initial_state(2), []
    for chunk in range(100):
        x = fixed_noise(torch.empty(size, 2, 2), generator)
        ends = torch.rand(size, 2, generator=generator, device=generator.device).to(x.device) < 0.02
        state = state.detach()
        output, state = layer(x, state, resets=ends)
        optimizer.zero_grad()
        output.square().mean().backward()
        optimizer.step()
        if chunk in (10, 99):
            tensors = tensors_alive()
            alive.append((len(tensors), sum(part.untyped_storage().nbytes() for part in tensors)))
            del tensors
    assert alive[0] == alive[1]
    assert len(of_others) < alive[0][0]
    assert all(part.isfinite().all() for part in state.flatten())


@pytest.mark.parametrize("memory", ["lrua", "ntm"])
def test_a_stream_is_restored_to_the_bit(memory, tmp_path):
    layer = make_layer(memory, dtype=torch.float32)
    chunks = [torch.randn(7, 3, 4) for _ in range(4)]
    ends = [torch.rand(7, 3) < 0.2 for _ in chunks]
    state = None
    with torch.no_grad():
        for place, (x, resets) in enumerate(zip(chunks, ends, strict=True)):
            output, state = layer(x, state, resets=resets)
            if place == 1:
                torch.save({"layer": layer.state_dict(), "stream": state}, tmp_path / "stream.pt")
        saved = torch.load(tmp_path / "stream.pt")
        other = make_layer(memory, dtype=torch.float32, controller="lstm")
        other.load_state_dict(saved["layer"])
        again = saved["stream"]
        for x, resets in zip(chunks[2:], ends[2:], strict=True):
            same, again = other(x, again, resets=resets)
    assert torch.equal(output, same)
    for a, b in zip(state.flatten(), again.flatten(), strict=True):
        assert torch.equal(a, b)
