"""MemoryLayer against an independent NumPy transcription of SPEC, and what users of nn.LSTM expect of it."""

import copy
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import OPTIONS, worst_error

from mann_fast import MemoryLayer, MemoryState, ops

OPTION_SETS = [
    *OPTIONS,
    {"sharpness": None},
    {"sharpness": 4.0, "write_vector": "key"},
    {"write_vector": "key", "usage_decay": 0.5, "eps": 1e-3},
    {"output_size": 3},
    {"num_heads": 1},
]


def make(batch_first=False, dtype=torch.float64, **options):
    torch.manual_seed(3)
    sizes = {"num_slots": 7, "slot_size": 5, "num_heads": 2} | options
    return MemoryLayer(4, 6, **sizes, batch_first=batch_first, dtype=dtype)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_layer(layer, x):
    """The equations, one sample and one number at a time where that is clearer."""
    p = {name: value.detach().numpy() for name, value in layer.named_parameters()}
    slots, size, heads, hidden = layer.num_slots, layer.slot_size, layer.num_heads, layer.hidden_size
    outputs = []
    for b in range(x.shape[1]):
        h, c = np.zeros(hidden), np.zeros(hidden)
        memory, usage = np.full((slots, size), 1e-6), np.eye(slots)[0]
        weights, reads = np.tile(np.eye(slots)[0], (heads, 1)), np.zeros(heads * size)
        row = []
        for t in range(x.shape[0]):
            z = np.concatenate([x[t, b], reads])
            gates = p["controller.weight_ih"] @ z + p["controller.weight_hh"] @ h
            i, f, g, o = np.split(gates + p["controller.bias_ih"] + p["controller.bias_hh"], 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            raw = list(p["heads.weight"] @ h + p["heads.bias"])
            take = lambda n, raw=raw: np.array([raw.pop(0) for _ in range(n)])  # noqa: E731
            key = np.tanh(take(heads * size)).reshape(heads, size)
            vector = (
                np.tanh(take(heads * size)).reshape(heads, size) if layer.write_vector == "separate" else key
            )
            gate = take(heads)
            beta = (
                np.ones(heads)
                if layer.sharpness is None
                else np.full(heads, layer.sharpness)
                if layer.sharpness != "learned"
                else 1 + 10 * np.log1p(np.exp(take(heads)))
            )
            assert not raw
            least = sorted(range(slots), key=lambda n: (usage[n], n))[:heads]
            target = np.zeros((heads, slots))
            for r in range(heads):
                target[r, least[r] if layer.write_target == "per_head" else least] = 1
            write = sigmoid(gate)[:, None] * weights + sigmoid(-gate)[:, None] * target
            before = memory.copy()
            memory[least[0]] = 0
            memory = memory + write.T @ vector
            looked_at = memory if layer.order == "write_first" else before
            norms = (key**2).sum(1)[:, None] * (looked_at**2).sum(1)[None]
            score = beta[:, None] * (key @ looked_at.T) / np.sqrt(norms + layer.eps)
            weights = np.exp(score - score.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            reads = (weights @ memory).ravel()
            usage = layer.usage_decay * usage + (weights + write).sum(0)
            row.append(np.concatenate([h, reads]))
        outputs.append(row)
    output = np.array(outputs).swapaxes(0, 1)
    if layer.projection is not None:
        output = output @ p["projection.weight"].T + p["projection.bias"]
    return torch.from_numpy(output)


@pytest.mark.parametrize("options", OPTION_SETS, ids=str)
def test_matches_the_equations(options):
    layer, x = make(**options), torch.randn(9, 3, 4, dtype=torch.float64)
    output, _ = layer(x)
    assert output.shape[2] == layer.output_size
    assert worst_error(output, numpy_layer(layer, x.numpy()), 1) < 1e-10


@pytest.mark.parametrize("options", OPTION_SETS, ids=str)
def test_a_carried_state_gives_the_output_of_the_whole(options):
    layer, x = make(**options), torch.randn(8, 3, 4, dtype=torch.float64)
    whole, end = layer(x)
    first, state = layer(x[:3])
    second, state = layer(x[3:], state)
    assert worst_error(torch.cat([first, second]), whole, 1) < 1e-13
    for a, b in zip(
        (*end.controller, *end.memory, end.reads),
        (*state.controller, *state.memory, state.reads),
        strict=True,
    ):
        assert worst_error(a, b) < 1e-13


def test_layouts_of_the_input_agree():
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    output, state = make()(x)
    transposed, _ = make(batch_first=True)(x.transpose(0, 1))
    assert torch.equal(transposed.transpose(0, 1), output)
    for batch_first in (False, True):
        layer = make(batch_first=batch_first)
        alone, alone_state = layer(x[:3, 1])
        assert alone.shape == (3, layer.output_size) and alone_state.reads.shape == (2, 5)
        assert worst_error(alone[:, None], output[:3, 1:2], 1) < 1e-12
        more, _ = layer(x[3:, 1], alone_state)
        assert worst_error(more[:, None], output[3:, 1:2], 1) < 1e-12


@pytest.mark.parametrize("steps, batch", [(0, 3), (1, 1), (4, 0)])
def test_empty_and_single(steps, batch):
    layer = make()
    output, state = layer(torch.randn(steps, batch, 4, dtype=torch.float64))
    assert output.shape == (steps, batch, layer.output_size)
    assert state.memory.memory.shape == (batch, 7, 5)


def test_gradcheck():
    layer = make()
    state = layer.initial_state(2)
    usage = torch.stack([torch.randperm(7), torch.randperm(7)]).double() * 0.03
    memory = torch.randn(2, 7, 5, dtype=torch.float64)
    state = state._replace(memory=ops.LRUAState(memory, state.memory.read_weights, usage))
    x = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    parameters = list(layer.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: layer(x, state)[0], (x, *parameters))


def test_every_parameter_gets_a_gradient():
    for options in OPTION_SETS:
        layer = make(**options)
        output, _ = layer(torch.randn(4, 2, 4, dtype=torch.float64))
        output.square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


def test_reset_takes_samples_back_to_the_start():
    layer, x = make(), torch.randn(6, 3, 4, dtype=torch.float64)
    _, state = layer(x[:3])
    output, _ = layer(x[3:], state.reset(torch.tensor([False, True, False])))
    fresh, _ = layer(x[3:])
    carried, _ = layer(x[3:], state)
    assert torch.equal(output[:, [0, 2]], carried[:, [0, 2]])
    assert worst_error(output[:, 1:2], fresh[:, 1:2], 1) < 1e-13
    for mask, error in [
        (torch.tensor([1, 0, 0]), TypeError),
        (torch.tensor([True]), ValueError),
        (True, TypeError),
    ]:
        with pytest.raises(error, match="mask must"):
            state.reset(mask)


def test_detach_cuts_history_and_reset_keeps_it():
    layer = make()
    _, state = layer(torch.randn(3, 2, 4, dtype=torch.float64))
    assert state.reads.requires_grad and state.reset(torch.tensor([True, False])).reads.requires_grad
    detached = state.detach()
    assert isinstance(detached, MemoryState) and isinstance(detached.memory, ops.LRUAState)
    assert not any(x.requires_grad for x in (*detached.controller, *detached.memory, detached.reads))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_memory_in_float32(dtype):
    layer, x = make(dtype=torch.float32), torch.randn(5, 2, 4)
    expected, _ = layer(x)
    half = copy.deepcopy(layer).to(dtype)
    output, state = half(x.to(dtype))
    assert output.dtype == state.reads.dtype == state.controller[1].dtype == dtype
    assert {x.dtype for x in state.memory} == {torch.float32}
    assert worst_error(output, expected, 1) < (0.1 if dtype == torch.bfloat16 else 0.02)
    moved = layer(x)[1].to(dtype)
    assert moved.reads.dtype == dtype and moved.memory.memory.dtype == torch.float32
    half(x.to(dtype), moved)


def test_autocast():
    layer, x = make(dtype=torch.float32), torch.randn(5, 2, 4)
    expected, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = layer(x)
    output.float().sum().backward()
    assert worst_error(output.float(), expected, 1) < 0.1
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_copies_pickles_and_state_dicts(tmp_path):
    layer, x = make(), torch.randn(3, 2, 4, dtype=torch.float64)
    expected, state = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], expected)
    fresh = make()
    fresh.reset_parameters()
    assert not torch.equal(fresh(x)[0], expected)
    assert not any(key for key in layer.state_dict() if "memory" in key)  # the memory is state, not a buffer
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x)[0], expected)
    buffer = io.BytesIO()
    torch.save([tuple(state.controller), tuple(state.memory), state.reads], buffer)
    torch.save({"parameters": layer.state_dict(), "x": x, "expected": expected}, tmp_path / "layer.pt")
    program = (
        "import sys, torch; from mann_fast import MemoryLayer; d = torch.load(sys.argv[1], weights_only=True); "
        "l = MemoryLayer(4, 6, num_slots=7, slot_size=5, num_heads=2, dtype=torch.float64); "
        "l.load_state_dict(d['parameters']); assert torch.equal(l(d['x'])[0], d['expected'])"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "layer.pt")], check=True)


def test_functional_call_and_compile():
    layer, x = make(), torch.randn(3, 2, 4, dtype=torch.float64)
    expected, _ = layer(x)
    doubled = {name: 2 * value for name, value in layer.named_parameters()}
    assert not torch.equal(torch.func.functional_call(layer, doubled, (x,))[0], expected)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True)
    output, state = compiled(x)
    assert worst_error(output, expected, 1) < 1e-12
    state = state.detach()
    assert worst_error(compiled(x, state)[0], layer(x, state)[0], 1) < 1e-12


def test_the_same_call_twice_gives_the_same():
    layer, x = make(), torch.randn(5, 2, 4, dtype=torch.float64)
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_extra_repr_names_the_sizes():
    text = repr(make(batch_first=True))
    assert "4, 6, num_slots=7, slot_size=5, num_heads=2" in text and "batch_first=True" in text


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"num_slots": 0}, ValueError, "num_slots must be at least 1, got 0"),
        ({"slot_size": 2.0}, TypeError, "slot_size must be an int, got float"),
        ({"num_heads": 8}, ValueError, "num_heads must be at most num_slots = 7, got 8"),
        ({"sharpness": "high"}, ValueError, "sharpness must be 'learned', a number or None, got 'high'"),
        ({"sharpness": True}, ValueError, "sharpness must be"),
        ({"write_vector": "none"}, ValueError, "write_vector must be one of 'separate', 'key', got 'none'"),
        ({"order": "both"}, ValueError, "order must be one of"),
        ({"write_target": "all"}, ValueError, "write_target must be one of"),
        ({"usage_decay": 2}, ValueError, r"usage_decay must be within \[0, 1\], got 2"),
        ({"eps": 0}, ValueError, "eps must be positive"),
        ({"output_size": 0}, ValueError, "output_size must be at least 1"),
        ({"dtype": torch.int64}, TypeError, "dtype must be a floating-point dtype"),
    ],
)
def test_wrong_constructor_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        make(**change)


def test_wrong_inputs_and_states_are_named():
    layer, x = make(), torch.randn(3, 2, 4, dtype=torch.float64)
    _, state = layer(x)
    for call, error, message in [
        (lambda: layer(x.numpy()), TypeError, "x must be a tensor, got ndarray"),
        (lambda: layer(x[..., :3]), ValueError, r"x must have shape .* input_size = 4, got \[3, 2, 3\]"),
        (lambda: layer(x[None]), ValueError, "x must have shape"),
        (
            lambda: layer(x.float()),
            TypeError,
            "x must have the dtype of the parameters, torch.float64, got torch.float32",
        ),
        (lambda: layer(x.to("meta")), RuntimeError, "x must be on the device of the parameters"),
        (lambda: layer(x, x), TypeError, "state must be a MemoryState or None"),
        (
            lambda: layer(x[:, :1], state),
            ValueError,
            r"state.controller\[0\] must have shape \[1, 6\], got \[2, 6\]",
        ),
        (
            lambda: layer(x, state._replace(reads=state.reads[:, :1])),
            ValueError,
            "state.reads must have shape",
        ),
        (
            lambda: layer(x, state._replace(reads=state.reads.float())),
            TypeError,
            "state.reads must have dtype torch.float64, got torch.float32",
        ),
        (
            lambda: layer(x, state._replace(memory=state.memory._replace(usage=1.0))),
            TypeError,
            "state.memory.usage must be a tensor",
        ),
    ]:
        with pytest.raises(error, match=message):
            call()
