"""MemoryLayer with sparse memory: in place where it may be, and the same as steps one by one."""

import io
from functools import partial

import pytest
import torch
from cases import BACKEND, RAW_OPS, needs_kernels, served_by, worst_error

from mann_fast import MANN, MemoryLayer, ops
from mann_fast.layers import Sparse
from mann_fast.training.trace import slots_of

SIZES = {"num_slots": 30, "slot_size": 5, "num_heads": 2, "num_reads": 3}


def make(**options):
    torch.manual_seed(0)
    return MemoryLayer(4, 6, addressing="sparse", dtype=torch.float64, **{**SIZES, **options})


def run(layer, x, state=None, backend="tested", **sequences):
    """Output, the state's tensors, and the gradients of parameters, x and the memory that came in."""
    x = x.clone().requires_grad_()
    state = state or layer.initial_state(x.shape[1])
    memory = state.memory.memory.detach().clone().requires_grad_()
    given = state._replace(memory=state.memory._replace(memory=memory))
    with served_by(backend):
        output, after = layer(x, given, **sequences)
    loss = output.sin().sum() + after.memory.memory.square().sum() + after.memory.read_weights.sin().sum()
    wanted = [*layer.parameters(), x, memory]
    return [output, *after.flatten()], torch.autograd.grad(loss, wanted)


def assert_close(actual, expected):
    for x, y in zip((*actual[0], *actual[1]), (*expected[0], *expected[1]), strict=True):
        assert x.shape == y.shape and (x - y).abs().max() < 1e-10


@needs_kernels
@pytest.mark.parametrize("controller", ["lstm", "gru", "feedforward"])
def test_in_place_it_is_the_reference(controller):
    layer, x = make(controller=controller), torch.randn(8, 3, 4, dtype=torch.float64)
    state = layer(torch.randn(3, 3, 4, dtype=torch.float64))[1].detach()
    kept = state.clone()
    for given in (None, state):
        assert_close(run(layer, x, given), run(layer, x, given, "reference"))
    for x, y in zip(state.flatten(), kept.flatten(), strict=True):
        assert torch.equal(x, y)  # what came in is as it was


@needs_kernels
def test_a_learned_start_gets_its_gradient():
    layer, x = make(memory_start="learned"), torch.randn(8, 3, 4, dtype=torch.float64)
    found = []
    for backend in ("tested", "reference"):
        with served_by(backend):
            output, state = layer(x)
        found.append(
            torch.autograd.grad(output.sum() + state.memory.memory.sin().sum(), list(layer.parameters()))
        )
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() < 1e-10


@needs_kernels
@pytest.mark.parametrize("controller", ["lstm", "feedforward"])
@pytest.mark.parametrize(
    "given, start",
    [("resets", "constant"), ("resets", "learned"), ("lengths", "constant"), ("both", "learned")],
)
def test_resets_and_lengths_in_place(given, controller, start, monkeypatch):
    """As the reference has them, and nothing of the padding reaches anything; no step copies the memory."""
    layer, x = make(controller=controller, memory_start=start), torch.randn(8, 4, 4, dtype=torch.float64)
    state = layer(torch.randn(3, 4, 4, dtype=torch.float64))[1].detach()
    sequences = {}
    if given != "lengths":
        sequences["resets"] = torch.zeros(8, 4, dtype=torch.bool)
        for t, b in ((0, 1), (3, 1), (3, 2), (4, 1), (7, 3)):
            sequences["resets"][t, b] = True
    if given != "resets":
        sequences["lengths"] = torch.tensor([8, 5, 0, 1])
        for b, length in enumerate([8, 5, 0, 1]):
            x[length:, b] = 1e3
    expected = run(layer, x, state, "reference", **sequences)

    def copies(*arguments, **options):
        raise AssertionError("a step that copies the memory")

    monkeypatch.setattr("mann_fast.ops.sparse_step", copies)
    assert_close(run(layer, x, state, **sequences), expected)
    if given == "resets":
        return
    for b, length in enumerate([8, 5, 0, 1]):
        x[length:, b] = torch.nan
    padded = run(layer, x, state, **sequences)
    assert_close(padded, expected)
    of_x = padded[1][-2]
    assert not any(of_x[length:, b].any() for b, length in enumerate([8, 5, 0, 1]))


@needs_kernels
def test_backward_twice_and_in_part():
    """The gradient of the memory is changed in place: nothing of one backward may be left for the next."""
    layer, x = make(), torch.randn(6, 2, 4, dtype=torch.float64)
    output, state = layer(x)
    parameters = list(layer.parameters())
    of_memory = torch.randn_like(state.memory.memory)
    given = of_memory.clone()
    twice = [
        torch.autograd.grad(state.memory.memory, parameters, given, retain_graph=True, allow_unused=True)
        for _ in range(2)
    ]
    assert torch.equal(given, of_memory)
    for x, y in zip(*twice, strict=True):
        assert torch.equal(x, y)
    loss = output[2].square().sum()  # not of the last step
    twice = [torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2)]
    for x, y in zip(*twice, strict=True):
        assert torch.equal(x, y)
    (first,) = torch.autograd.grad(loss, parameters[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative; use mann_fast.reference"):
        first.sum().backward()


@needs_kernels
@pytest.mark.skipif(not hasattr(RAW_OPS, "sparse_step_"), reason="Triton's kernels change nothing in place")
def test_what_changes_in_place_refuses_what_it_cannot_do():
    """A batch of gradients, and the raw op by whoever does not know that its gradient is the caller's own."""
    layer, x = make(), torch.randn(6, 2, 4, dtype=torch.float64)
    loss, parameters = layer(x)[0].square().sum(), list(layer.parameters())
    batch = partial(torch.autograd.grad, loss, parameters, retain_graph=True)
    if BACKEND == "cuda":  # the others take the whole sequence in one call, or copy the memory
        with pytest.raises(
            NotImplementedError, match="takes no batch of them .* differentiate one at a time"
        ):
            batch(torch.ones(2).double(), is_grads_batched=True)
    else:
        both = batch(torch.tensor([1.0, -3.0]).double(), is_grads_batched=True)
        for x, y in zip(both, batch(torch.tensor(1.0).double()), strict=True):
            assert worst_error(x, torch.stack([y, -3 * y])) < 1e-12
    op = RAW_OPS.sparse_step_.default
    state = ops.SparseState.initial(2, 5, 3, 2, 2, dtype=torch.float64)
    memory, slots, weights, times, clock = state
    key, gate = torch.randn(2, 2, 3).double().requires_grad_(), torch.randn(2, 2).double()
    told = (key, key.detach(), gate, gate, gate)
    values = (memory, slots, weights, times, clock, *told, *(None,) * 5, 0.005, 1e-6)
    with pytest.raises(NotImplementedError, match="sparse_step_ has no gradient; use the public functions"):
        op(*values)
    with torch.no_grad():
        op(*values)


@pytest.mark.parametrize("backend", [pytest.param("tested", marks=needs_kernels), "reference"])
def test_resets_lengths_and_carried_states(backend):
    layer, x = make(), torch.randn(7, 2, 4, dtype=torch.float64)
    with served_by(backend), torch.no_grad():
        whole, last = layer(x)
        first, state = layer(x[:3])
        second, state = layer(x[3:], state)
        assert (torch.cat([first, second]) - whole).abs().max() < 1e-12
        for a, b in zip(state.flatten(), last.flatten(), strict=True):
            assert (a - b).abs().max() < 1e-12
        resets = torch.zeros(7, 2, dtype=torch.bool)
        resets[3, 1] = True
        output, after = layer(x, resets=resets, lengths=torch.tensor([5, 7]))
        assert (output[:5, 0] - whole[:5, 0]).abs().max() < 1e-12 and not output[5:, 0].any()
        assert (output[3:, 1] - layer(x[3:, 1:])[0][:, 0]).abs().max() < 1e-12
        assert after.memory.clock.tolist() == [5, 4]
        anew = last.reset(torch.tensor([False, True]))
        assert anew.memory.clock.tolist() == [7, 0]


def test_weights_by_slots():
    layer, x = make(), torch.randn(5, 2, 4, dtype=torch.float64)
    output, state, weights = layer(x, return_weights=True)
    assert torch.allclose(output, layer(x)[0])
    assert weights.read.shape == weights.read_slots.shape == (5, 2, 2, 3)
    assert weights.write.shape == weights.write_slots.shape == (5, 2, 2, 4)
    assert torch.equal(weights.read_slots[-1], state.memory.read_slots)
    assert torch.equal(weights.write_slots[1:, ..., :3], weights.read_slots[:-1])
    assert weights.write_slots[0, 0, :, 3].tolist() == [1, 2] and weights.usage is None
    # What was written, by hand: the first step's oldest slot holds its weight times the vector.
    assert (weights.write.sum(3) <= 1).all()


@pytest.mark.once
def test_saved_trained_and_exported():
    model = MANN(4, 3, 8, addressing="sparse", **SIZES)
    buffer = io.BytesIO()
    torch.save(model.layer(torch.randn(3, 2, 4))[1], buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    assert isinstance(state.memory, ops.SparseState)
    assert isinstance(model.layer.memory, Sparse) and model.config["num_reads"] == 3
    optimizer, x = torch.optim.Adam(model.parameters(), lr=1e-2), torch.randn(6, 4, 4)
    losses = []
    for _ in range(30):
        loss = (model(x)[0] - x[..., :3].roll(1, 0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    with torch.no_grad():
        program = torch.export.export(model, (x,))
    assert torch.allclose(program.module()(x)[0], model(x)[0], atol=1e-5)


def test_bad_options():
    for error, text, options in (
        (ValueError, "num_reads must be at most num_slots = 30, got 31", {"num_reads": 31}),
        (TypeError, "num_reads must be an int, got float", {"num_reads": 2.0}),
        (ValueError, r"threshold must be within \[0, 1\), got 2", {"threshold": 2}),
        (ValueError, "eps must be positive", {"eps": 0}),
    ):
        with pytest.raises(error, match=text):
            make(**options)


def test_a_trace_shows_all_slots():
    layer, x = make(), torch.randn(5, 2, 4, dtype=torch.float64)
    slots = slots_of(layer(x, return_weights=True)[2], 30)
    assert slots.read.shape == slots.written.shape == (5, 30)
    assert torch.allclose(slots.read.sum(1), torch.full((5,), 2.0, dtype=torch.float64))
    assert (slots.written > 0).sum(1).min() >= 3


@pytest.mark.once
def test_compiled():
    layer, x = make(), torch.randn(2, 2, 4, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    parameters = list(layer.parameters())
    for a, b in zip(
        torch.autograd.grad(compiled(x)[0].sin().sum(), parameters),
        torch.autograd.grad(layer(x)[0].sin().sum(), parameters),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-10


@needs_kernels
def test_samples_mapped_over():
    """vmap goes by steps that copy, per-sample gradients too."""
    layer, x = make(), torch.randn(4, 3, 4, dtype=torch.float64)
    loss = lambda x: layer(x)[0].sin().sum()  # noqa: E731
    each = torch.func.vmap(torch.func.grad(loss), 1, 1)(x)
    leaf = x.clone().requires_grad_()
    assert (each - torch.autograd.grad(loss(leaf), leaf)[0]).abs().max() < 1e-10


@needs_kernels
def test_steps_of_one_call_hand_on_what_they_know():
    """Against calls of one step, each of which compares all slots: outputs, gradients and state, in which more rows have been
    written at the end than are listed."""
    torch.manual_seed(3)
    layer = MemoryLayer(
        3, 5, addressing="sparse", num_slots=1030, slot_size=4, num_heads=2, num_reads=3, dtype=torch.float64
    )
    x = torch.randn(160, 2, 3, dtype=torch.float64, requires_grad=True)
    resets, lengths = torch.rand(160, 2) < 0.01, torch.tensor([160, 101])
    output, state = layer(x, resets=resets, lengths=lengths)
    outputs, now = [], None
    for t in range(160):
        step, now = layer(x[t : t + 1], now, resets=resets[t : t + 1], lengths=(lengths > t).long())
        outputs.append(step)
    assert worst_error(output, torch.cat(outputs)) < 1e-11
    for part, want in zip(state.flatten(), now.flatten(), strict=True):
        assert worst_error(part, want) < 1e-11 if part.is_floating_point() else torch.equal(part, want)
    given = [x, *layer.parameters()]
    for grad, want in zip(
        torch.autograd.grad(output.square().sum() + state.memory.memory.sum(), given),
        torch.autograd.grad(torch.cat(outputs).square().sum() + now.memory.memory.sum(), given),
        strict=True,
    ):
        assert worst_error(grad.reshape(1, -1), want.reshape(1, -1)) < 1e-11
