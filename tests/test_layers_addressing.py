"""MemoryLayer with other addressing, controllers of one's own, and the weights of every step."""

import numpy as np
import pytest
import torch
from cases import worst_error
from torch import nn

import mann_fast
from mann_fast import MANN, MemoryLayer, ops
from mann_fast.layers import DNC, LRUA, NTM, Content

SIZES = {"num_slots": 7, "slot_size": 3, "num_heads": 2}
KINDS = [
    {"addressing": name, "order": order} for name in ("ntm", "content") for order in (None, "write_first")
]


def make_layer(**options):
    torch.manual_seed(0)
    return MemoryLayer(4, 5, **{**SIZES, "dtype": torch.float64, **options})


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softplus(z):
    return np.log(1 + np.exp(z))


def numpy_layer(layer, x):
    """The layer for one sample x [T, input_size] in NumPy, from Graves et al. 2014 alone; output [T, hidden + R D]."""
    p = {name: value.detach().numpy() for name, value in layer.named_parameters()}
    slots, size, heads = layer.num_slots, layer.slot_size, layer.num_heads
    hidden, cell, reads = np.zeros(layer.hidden_size), np.zeros(layer.hidden_size), np.zeros(heads * size)
    memory, weights = np.full((slots, size), 1e-6), np.zeros((2, heads, slots))
    weights[:, :, 0] = 1
    outputs, record = [], []
    for x_t in x:
        gates = p["controller.weight_ih"] @ np.concatenate([x_t, reads]) + p["controller.bias_ih"]
        i, f, g, o = np.split(gates + p["controller.weight_hh"] @ hidden + p["controller.bias_hh"], 4)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(cell)
        values = list(p["heads.weight"] @ hidden + p["heads.bias"])
        take = lambda count: np.array([values.pop(0) for _ in range(count)])  # noqa: E731, B023
        of_kind = []
        for _ in range(2):
            key, sharpness = np.tanh(take(heads * size)).reshape(heads, size), 1 + softplus(take(heads))
            if layer.addressing == "ntm":
                moves = 2 * layer.max_shift + 1
                gate, shift = sigmoid(take(heads)), np.exp(take(heads * moves).reshape(heads, moves))
                of_kind.append(
                    (key, sharpness, gate, shift / shift.sum(1, keepdims=True), 1 + softplus(take(heads)))
                )
            else:
                of_kind.append((key, sharpness, np.ones(heads), np.ones((heads, 1)), np.ones(heads)))
        erase = sigmoid(take(heads * size)).reshape(heads, size)
        add = np.tanh(take(heads * size)).reshape(heads, size)
        assert not values

        def address(kind, memory, of_kind=of_kind):
            rows = []
            for key, sharpness, gate, shift, sharpening, before in zip(
                *of_kind[kind], weights[kind], strict=True
            ):
                cosine = memory @ key / np.sqrt((key @ key) * (memory * memory).sum(1) + layer.eps)
                content = np.exp(sharpness * cosine)
                gated = gate * content / content.sum() + (1 - gate) * before
                reach = len(shift) // 2
                shifted = sum(shift[j + reach] * np.roll(gated, j) for j in range(-reach, reach + 1))
                rows.append(shifted**sharpening / (shifted**sharpening).sum())
            return np.stack(rows)

        before = memory
        weights[1] = address(1, before)
        kept = np.prod([1 - np.outer(w, e) for w, e in zip(weights[1], erase, strict=True)], axis=0)
        memory = before * kept + sum(np.outer(w, a) for w, a in zip(weights[1], add, strict=True))
        addressed = before if layer.order == "read_first" else memory
        weights[0] = address(0, addressed)
        reads = (weights[0] @ addressed).reshape(-1)
        outputs.append(np.concatenate([hidden, reads]))
        record.append(weights.copy())
    return torch.from_numpy(np.stack(outputs)), torch.from_numpy(np.stack(record))


@pytest.mark.parametrize("options", [*KINDS, {"addressing": "ntm", "max_shift": 2}], ids=str)
def test_equals_the_equations_in_numpy(options):
    layer, x = make_layer(**options), torch.randn(50, 2, 4, dtype=torch.float64)
    with torch.no_grad():
        output, state, weights = layer(x, return_weights=True)
    assert state.memory.memory.shape == (2, 7, 3) and weights.usage is None
    for b in range(2):
        expected, record = numpy_layer(layer, x[:, b].numpy())
        torch.testing.assert_close(output[:, b], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(weights.read[:, b], record[:, 0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(weights.write[:, b], record[:, 1], rtol=1e-9, atol=1e-9)


def test_keys_and_write_vectors_of_lrua_start_three_times_as_large():
    bound = 400**-0.5  # of what nn.Linear draws
    lrua, ntm = (MemoryLayer(4, 400, addressing=name).heads.weight.detach().abs() for name in ("lrua", "ntm"))
    vectors = lrua[: 2 * 4 * 40]
    assert 2.9 * bound < vectors.max() <= 3 * bound and lrua[2 * 4 * 40 :].max() <= bound
    assert ntm.max() <= bound


@pytest.mark.parametrize(
    ("memory", "options"),
    [
        (LRUA(**SIZES, sharpness=2.0, usage_decay=0.5), {"sharpness": 2.0, "usage_decay": 0.5}),
        (NTM(**SIZES, max_shift=2), {"addressing": "ntm", "max_shift": 2}),
        (Content(eps=1e-3), {"addressing": "content", "eps": 1e-3}),
        (DNC(**SIZES, link=False), {"addressing": "dnc", "link": False}),
    ],
    ids=["lrua", "ntm", "content", "dnc"],
)
def test_a_memory_given_as_an_object_is_the_one_of_that_name(memory, options):
    named, given = make_layer(**options), make_layer(addressing=memory)
    assert repr(named) == repr(given) and named.memory == given.memory
    x, state = torch.randn(5, 2, 4, dtype=torch.float64), named.initial_state(2)
    slots = torch.randn_like(state.memory.memory)  # by content alone equal slots stay equal, whatever eps
    state = state._replace(memory=state.memory._replace(memory=slots))
    assert torch.equal(named(x, state)[0], given(x, state)[0])
    given.eps = 0.5  # where it is changed later it has its effect, and is checked
    assert not torch.equal(named(x, state)[0], given(x, state)[0])
    with pytest.raises(ValueError, match="eps must be positive and finite, got 0"):
        given.eps = 0


@pytest.mark.parametrize("controller", ["lstm", "gru", "feedforward"])
@pytest.mark.parametrize("options", KINDS[::2], ids=str)
def test_gradcheck_and_halves(options, controller):
    layer = make_layer(**options, controller=controller)
    x = torch.randn(4, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], x)
    whole, last = layer(x)
    first, state = layer(x[:1])
    second, state = layer(x[1:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(state.memory, last.memory)  # the product of the inputs has other bits
    whole.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_every_backend_gives_the_same(options):
    layer, x = make_layer(**options), torch.randn(5, 2, 4, dtype=torch.float64)
    output, _ = layer(x)
    with mann_fast.backend("reference"):
        expected, _ = layer(x)
    assert worst_error(output, expected, batch_axis=1) < 1e-12


@pytest.mark.parametrize("options", KINDS[:2], ids=str)
def test_state_resets_converts_and_is_checked(options):
    layer, x = make_layer(**options), torch.randn(3, 2, 4, dtype=torch.float64)
    _, state = layer(x)
    again = state.reset(torch.tensor([True, False]))
    start = layer.initial_state(2)
    for now, before, after in zip(again.memory, state.memory, start.memory, strict=True):
        assert torch.equal(now[0], after[0]) and torch.equal(now[1], before[1])
    assert isinstance(state.to(torch.float32).memory, ops.NTMState)
    _, nobody = layer(x[:, :0])
    assert nobody.reset(torch.zeros(0, dtype=torch.bool)).memory.memory.shape == (0, 7, 3)
    output, state = layer(x[:, 0])
    assert output.shape == (3, layer.output_size) and state.memory.read_weights.shape == (2, 7)
    of_lrua = make_layer().initial_state(2)
    with pytest.raises(TypeError, match="state must be a MemoryState of .* an NTMState and reads"):
        layer(x, of_lrua)
    assert "addressing='" + options["addressing"] in repr(layer)


class Own(nn.Module):
    """A controller of a user: two layers, and a state of its own shape that counts steps."""

    def __init__(self, inputs, hidden):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, hidden), nn.Tanh()).double()

    def forward(self, z, state):
        (count,) = state or (z.new_zeros(z.shape[0], 1, 2),)
        return self.layers(z) + count[:, 0, :1], (count + 1,)


@pytest.mark.parametrize("addressing", ["lrua", "ntm", "content", "dnc"])
def test_a_controller_of_one_s_own(addressing):
    layer = make_layer(controller=Own(4 + 6, 5), addressing=addressing)
    x = torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True)
    output, state = layer(x)
    assert output.shape == (5, 2, 11) and torch.equal(
        state.controller[0], torch.full((2, 1, 2), 5.0).double()
    )
    first, carried = layer(x[:2])
    second, _ = layer(x[2:], carried)
    torch.testing.assert_close(torch.cat([first, second]), output)
    if addressing == "dnc":  # whose usage takes what was written for a constant: nothing by allocation
        with torch.no_grad():
            place = sum(layer.memory.head_sizes()[:7])
            layer.heads.weight[place], layer.heads.bias[place] = 0, -1e4
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], x)
    assert carried.reset(torch.tensor([True, False])).controller[0][:, 0, 0].tolist() == [0, 2]
    assert (
        "layers" in dict(layer.controller.named_children())
        and "controller=" not in repr(layer).split("\n")[0]
    )


def test_a_wrong_controller_is_named():
    class Wrong(nn.Module):
        def __init__(self, result):
            super().__init__()
            self.result = result

        def forward(self, z, state):
            return self.result

    x = torch.randn(2, 3, 4, dtype=torch.float64)
    for result, error, message in (
        ((torch.zeros(3, 4), ()), ValueError, r"hidden of shape \[B, hidden_size\] = \[3, 5\], got \[3, 4\]"),
        ((torch.zeros(3, 5).double(), None), TypeError, "its state as a tuple, got NoneType"),
    ):
        with pytest.raises(error, match=message):
            make_layer(controller=Wrong(result))(x)


@pytest.mark.parametrize(
    "options", [{}, {"order": "read_first", "write_target": "shared"}, {"controller": "gru"}], ids=str
)
def test_weights_of_lrua(options):
    """The same outputs as without; read weights and usage are those of the state, and usage counts what was written."""
    layer, x = make_layer(**options), torch.randn(6, 2, 4, dtype=torch.float64)
    output, state = layer(x)
    again, last, weights = layer(x, return_weights=True)
    assert worst_error(again, output, batch_axis=1) < 1e-12
    assert worst_error(last.memory.memory, state.memory.memory) < 1e-12
    assert torch.equal(weights.read[-1], last.memory.read_weights)
    assert torch.equal(weights.usage[-1], last.memory.usage)
    before = torch.cat([layer.initial_state(2).memory.usage[None], weights.usage[:-1]])
    expected = layer.usage_decay * before + weights.read.sum(2) + weights.write.sum(2)
    torch.testing.assert_close(weights.usage, expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"addressing": "ntm"}, {"addressing": "dnc"}, {"addressing": "dnc", "link": False}],
    ids=str,
)
def test_no_steps(options):
    layer = make_layer(**options)
    output, state, weights = layer(torch.zeros(0, 2, 4, dtype=torch.float64), return_weights=True)
    assert output.shape == (0, 2, layer.output_size)
    assert weights.read.shape == (0, 2, 2, 7)
    assert weights.write.shape == (0, 2, 1 if layer.addressing == "dnc" else 2, 7)
    assert torch.equal(state.memory.memory, layer.initial_state(2).memory.memory)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"addressing": "sam"},
            ValueError,
            "addressing must be one of 'lrua', 'ntm', 'content', 'dnc', 'sparse', got 'sam'",
        ),
        ({"addressing": "ntm", "max_shift": -1}, ValueError, "max_shift must be at least 0, got -1"),
        ({"addressing": "ntm", "max_shift": 1.5}, TypeError, "max_shift must be an int, got float"),
        (
            {"max_shift": 2},
            TypeError,
            "max_shift is no option here, got 2; addressing 'lrua' has num_slots, ",
        ),
        (
            {"addressing": "ntm", "usage_decay": 0.9},
            TypeError,
            "usage_decay is no option here, got 0.9; .*, max_shift",
        ),
        (
            {"addressing": "content", "decay": 0.9},
            TypeError,
            "decay is no option here, got 0.9; .* order, eps$",
        ),
        ({"addressing": "sparse", "order": "read_first"}, TypeError, "order is no option here"),
        ({"addressing": "dnc", "order": None}, TypeError, "order is no option here"),
    ],
)
def test_refuses_arguments(options, error, message):
    with pytest.raises(error, match=message):
        make_layer(**options)


@pytest.mark.parametrize("addressing", ["ntm", "content", "dnc"])
def test_half_precision_and_autocast(addressing):
    torch.manual_seed(0)
    layer = MemoryLayer(4, 5, addressing=addressing, **SIZES)
    x = torch.randn(6, 2, 4)
    expected, _ = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = layer(x)
    assert output.dtype == torch.bfloat16 and state.memory.memory.dtype == torch.float32
    assert worst_error(output, expected, batch_axis=1) < 0.1


def test_a_model_learns_to_copy_one_step():
    """MANN with NTM addressing: the state carries what came a step ago."""
    torch.manual_seed(0)
    model = MANN(3, 3, 16, num_slots=8, slot_size=6, num_heads=1, addressing="ntm")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        x = torch.randint(2, (6, 16, 3)).float()
        logits, _ = model(x)
        loss = nn.functional.binary_cross_entropy_with_logits(logits[1:], x[:-1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
