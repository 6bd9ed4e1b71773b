"""MemoryStack against its layers called by hand, as nn.LSTM's documentation has layers and directions."""

import re

import pytest
import torch
from cases import worst_error
from torch import nn

from mann_fast import MemoryStack
from mann_fast.layers import MemoryWeights, StackState

SIZES = {"num_slots": 7, "slot_size": 5, "num_heads": 2, "dtype": torch.float64}


def by_hand(stack, x, state):
    """Time first, without dropout; output and the states in the order of the stack's layers."""
    layers, starts, ends = iter(stack.layers), iter(state.layers), []
    for _ in range(stack.num_layers):
        outputs = []
        for backward in (False, True)[: 1 + stack.bidirectional]:
            order = range(len(x) - 1, -1, -1) if backward else range(len(x))
            layer, now, steps = next(layers), next(starts), {}
            for t in order:
                steps[t], now = layer(x[t : t + 1], now)
            outputs.append(torch.cat([steps[t] for t in range(len(x))]))
            ends.append(now)
        x = torch.cat(outputs, 2)
    return x, ends


@pytest.mark.parametrize("addressing", ["lrua", "ntm", "dnc"])
@pytest.mark.parametrize(
    "options", [{}, {"output_size": 3, "controller": "gru", "memory_start": "learned"}], ids=str
)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_equals_its_layers_by_hand(num_layers, bidirectional, options, addressing):
    options = {**SIZES, **options, "addressing": addressing}
    stack = MemoryStack(4, 6, num_layers, bidirectional=bidirectional, **options)
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    state = None
    for _ in range(2):  # the second time from a state in the middle of a sequence
        output, end = stack(x, state)
        expected, expected_ends = by_hand(stack, x, state or stack.initial_state(3))
        assert output.shape == (5, 3, stack.output_size)
        assert worst_error(output, expected, 1) < 1e-11
        for a, b in zip(end.layers, expected_ends, strict=True):
            assert worst_error(a.memory[0], b.memory[0]) < 1e-11 and worst_error(a.reads, b.reads) < 1e-11
        wanted = [x, *stack.parameters()]
        pairs = [torch.autograd.grad(y.square().sum(), wanted, allow_unused=True) for y in (output, expected)]
        for a, b in zip(*pairs, strict=True):
            if b is None:
                assert a is None and state is not None  # a learned start has no part in what goes on
            else:
                assert (a - b).abs().max() <= 1e-9 * b.abs().max().clamp(min=1e-3)
        state = StackState(tuple(part.detach() for part in end.layers))


@pytest.mark.parametrize("batch_first", [False, True])
def test_shapes_are_those_of_an_lstm(batch_first):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first, "dropout": 0.5}
    lstm = nn.LSTM(4, 6, **options, dtype=torch.float64)
    stack = MemoryStack(4, 6, **options, output_size=6, **SIZES)
    for shape in ((5, 3, 4), (1, 1, 4), (5, 4)):
        x = torch.randn(shape, dtype=torch.float64)
        assert stack(x)[0].shape == lstm(x)[0].shape
    assert stack(torch.randn(0, 3, 4, dtype=torch.float64).transpose(0, int(batch_first)))[0].numel() == 0
    stack.eval()
    first = MemoryStack(4, 6, **{**options, "batch_first": not batch_first}, output_size=6, **SIZES).eval()
    first.load_state_dict(stack.state_dict())
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    output = stack(x)[0]
    assert worst_error(first(x.transpose(0, 1))[0].transpose(0, 1), output) < 1e-11
    sample, of_sample = (x[1], output[1]) if batch_first else (x[:, 1], output[:, 1])
    assert worst_error(stack(sample)[0], of_sample) < 1e-11


def test_dropout_is_between_layers_and_in_training_only():
    stack = MemoryStack(4, 6, 2, dropout=1.0, **SIZES)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    above = stack.layers[1]
    dropped = above(torch.zeros(5, 3, stack.layers[0].output_size, dtype=torch.float64))[0]
    assert torch.equal(stack(x)[0], dropped)
    stack.eval()
    assert torch.equal(stack(x)[0], above(stack.layers[0](x)[0])[0])
    with pytest.warns(UserWarning, match="num_layers is 1: nothing is dropped"):
        MemoryStack(4, 6, dropout=0.5, **SIZES)


def test_weights_of_every_layer_by_the_step_of_the_input():
    stack = MemoryStack(4, 6, 2, bidirectional=True, **SIZES)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    output, _, weights = stack(x, return_weights=True)
    assert worst_error(output, stack(x)[0], 1) < 1e-11
    assert len(weights) == 4 and all(isinstance(one, MemoryWeights) for one in weights)
    for forward, backward in ((weights[0], stack.layers[0](x, return_weights=True)[2]),):
        assert torch.equal(forward.read, backward.read)
    expected = stack.layers[1](x.flip(0), return_weights=True)[2]
    assert torch.equal(weights[1].read.flip(0), expected.read)
    assert torch.equal(weights[1].usage.flip(0), expected.usage)


def test_trains_saves_compiles_and_draws_anew():
    stack = MemoryStack(4, 6, 2, bidirectional=True, **SIZES)
    assert [name for name in stack.state_dict() if name.endswith("weight_hh")] == [
        f"layers.{number}.controller.weight_hh" for number in range(4)
    ]
    assert (stack.input_size, stack.hidden_size, stack.num_layers) == (4, 6, 2)
    assert "bidirectional=True" in repr(stack) and stack.flatten_parameters() is None
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    output, state = compiled(x)
    assert isinstance(state, StackState) and worst_error(output, stack(x)[0], 1) < 1e-11
    output.sum().backward()
    assert all(p.grad is not None for p in stack.parameters())
    before = stack(x)[0]
    stack.reset_parameters()
    assert not torch.allclose(stack(x)[0], before)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
        ({"num_layers": True}, TypeError, "num_layers must be an int, got bool"),
        ({"dropout": 1.5}, ValueError, "dropout must be within [0, 1], got 1.5"),
        ({"dropout": True}, TypeError, "dropout must be a number, got bool"),
        ({"bidirectional": 1}, TypeError, "bidirectional must be a bool, got int"),
        ({"controller": nn.GRUCell(4, 6)}, TypeError, "controller must be a name"),
        ({"proj_size": 3}, TypeError, "proj_size is no option of MemoryLayer: output_size is"),
    ],
    ids=str,
)
def test_refuses_arguments(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        MemoryStack(4, 6, **SIZES, **options)


def test_refuses_other_states():
    stack = MemoryStack(4, 6, 2, **SIZES)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    state = stack.initial_state(3)
    with pytest.raises(TypeError, match="state must be a StackState of 2 layers or None, got one of 1"):
        stack(x, StackState(state.layers[:1]))
    with pytest.raises(TypeError, match="state must be a StackState of 2 layers or None, got MemoryState"):
        stack(x, state.layers[0])
    with pytest.raises(ValueError, match="state.controller.hidden must have shape"):
        stack(x[:, :2], state)
    with pytest.raises(TypeError, match="start must be a StackState of 2 layers or None, got MemoryState"):
        state.reset(torch.ones(3, dtype=torch.bool), state.layers[0])


def test_states_have_the_methods_of_a_layers():
    stack = MemoryStack(4, 6, 2, memory_start="learned", **SIZES)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    _, state = stack(x)
    plain = tuple(tuple(part) for part in state)  # as programs leave it that map over tuples
    for other in (state.detach(), state.clone(), state.unflatten(state.flatten()), plain):
        assert torch.equal(stack(x, other)[0], stack(x, state)[0])
    assert not any(part.requires_grad for part in state.detach().flatten())
    halves = [state.select(slice(0, 1)), state.select([1, 2])]
    assert torch.equal(stack(x, StackState.cat(halves))[0], stack(x, state)[0])
    assert (
        worst_error(stack(x[:, 1], state.select(1))[0].unsqueeze(0), stack(x, state)[0][:, 1].unsqueeze(0))
        < 1e-11
    )
    assert [part.dtype for part in state.to(torch.bfloat16).layers[0].memory] == [torch.float32] * 3
    done = torch.tensor([False, True, False])
    output = stack(x, state.reset(done, stack.initial_state(1)))[0]
    assert worst_error(output[:, 1:2], stack(x[:, 1:2])[0], 1) < 1e-11
    assert worst_error(output[:, ::2], stack(x, state)[0][:, ::2], 1) < 1e-11
    constant = state.reset(done).layers[0].memory.memory
    assert (constant[1] == 1e-6).all() and torch.equal(constant[0], state.layers[0].memory.memory[0])
