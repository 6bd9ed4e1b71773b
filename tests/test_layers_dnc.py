"""MemoryLayer with a Differentiable Neural Computer, against heads split and squashed by hand and the reference's step."""

import math

import pytest
import torch
from cases import worst_error
from torch.nn import functional as F

from mann_fast import MANN, MemoryLayer, reference
from mann_fast.layers import DNC, MemoryWeights
from mann_fast.training.plots import draw_steps, slot_panels
from mann_fast.training.trace import slots_of

SIZES = {"num_slots": 7, "slot_size": 3, "num_heads": 2}
REPAIRS = {"masks": True, "deallocate": True, "link_sharpening": True}
KINDS = {
    "plain": {},
    "without links": {"link": False},
    "repaired": {**REPAIRS, "mask_min": 0.1, "clip": 0.2},
    "repaired without links": {"link": False, "masks": True, "deallocate": True, "eps": 1e-3},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def make_layer(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return MemoryLayer(4, 5, addressing="dnc", dtype=dtype, **{**SIZES, **options})


def by_hand(layer, x):
    """Output [T, B, H + R D], read weights and write weights of every step, and the last state of the memory."""
    batch, slots, size, heads = x.shape[1], layer.num_slots, layer.slot_size, layer.num_heads
    hidden = cell = x.new_zeros(batch, 5)
    reads, rows = x.new_zeros(batch, heads, size), x.new_zeros(batch, slots)
    linked = (rows, x.new_zeros(batch, slots, slots)) if layer.link else (None, None)
    state = reference.DNCState(
        x.new_zeros(batch, slots, size), rows, *linked, x.new_zeros(batch, heads, slots), rows
    )
    outputs, read, written = [], [], []
    for now in x:
        c = layer.controller
        gates = F.linear(torch.cat([now, reads.flatten(1)], 1), c.weight_ih, c.bias_ih)
        i, f, g, o = (gates + F.linear(hidden, c.weight_hh, c.bias_hh)).chunk(4, 1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        values = F.linear(hidden, layer.heads.weight, layer.heads.bias)
        if layer.clip is not None:
            values = values.minimum(values.new_tensor(layer.clip)).maximum(-values.new_tensor(layer.clip))
        at = 0

        def take(*sizes, values=values):
            nonlocal at
            part = values[:, at : at + math.prod(sizes)].reshape(batch, *sizes)
            at += math.prod(sizes)
            return part

        def oneplus(z):
            return 1 + (1 + z.exp()).log()

        def logistic(z):
            return 1 / (1 + (-z).exp())

        def mask(z):
            return layer.mask_min + (1 - layer.mask_min) * logistic(z)

        told = {
            "read_keys": take(heads, size),
            "read_sharpness": oneplus(take(heads)),
            "write_key": take(size),
            "write_sharpness": oneplus(take()),
            "erase": logistic(take(size)),
            "write_vector": take(size),
            "free_gates": logistic(take(heads)),
            "allocation_gate": logistic(take()),
            "write_gate": logistic(take()),
        }
        if layer.link:
            powers = take(heads, 3).exp()
            told["read_modes"] = powers / powers.sum(2, keepdim=True)
        if layer.masks:
            told |= {"read_masks": mask(take(heads, size)), "write_mask": mask(take(size))}
        if layer.link_sharpening:
            told["link_sharpening"] = oneplus(take(heads, 2))
        assert at == values.shape[1]
        reads, state = reference.dnc_step(
            state, reference.DNCInterface(**told), deallocate=layer.deallocate, eps=layer.eps
        )
        outputs.append(torch.cat([hidden, reads.flatten(1)], 1))
        read.append(state.read_weights)
        written.append(state.write_weights.unsqueeze(1))
    return torch.stack(outputs), torch.stack(read), torch.stack(written), state


@kinds
def test_equals_heads_by_hand(kind):
    layer = make_layer(**KINDS[kind])
    with torch.no_grad():
        layer.heads.weight *= 4  # gates that differ, and values beyond the clip
    x = torch.randn(10, 2, 4, dtype=torch.float64)
    output, state = layer(x)
    again, _, weights = layer(x, return_weights=True)
    expected, read, written, end = by_hand(layer, x)
    assert worst_error(output, expected, 1) < 1e-11 and worst_error(again, expected, 1) < 1e-11
    assert worst_error(weights.read, read, 1) < 1e-11 and worst_error(weights.write, written, 1) < 1e-11
    for actual, wanted in zip(state.memory, end, strict=True):
        assert (actual is None) == (wanted is None)
        assert actual is None or worst_error(actual, wanted) < 1e-11
    parameters = list(layer.parameters())
    pairs = (torch.autograd.grad(y.square().sum(), parameters) for y in (output, expected))
    for actual, wanted in zip(*pairs, strict=True):
        assert (actual - wanted).abs().max() <= 1e-9 * wanted.abs().max()


@kinds
def test_heads_give_as_many_values_as_they_should(kind):
    layer = make_layer(**KINDS[kind])
    heads, size = 2, 3
    count = heads * size + 3 * size + 5 * heads + 3
    count -= 0 if layer.link else 3 * heads
    count += (heads * size + size) * layer.masks + 2 * heads * layer.link_sharpening
    assert layer.heads.weight.shape == (count, 5)


def test_weights_say_by_what():
    layer, x = make_layer(), torch.randn(6, 2, 4, dtype=torch.float64)
    with torch.no_grad():
        layer.heads.weight *= 4
    _, state, weights = layer(x, return_weights=True)
    assert weights.write.shape == (6, 2, 1, 7) and weights.allocated.shape == (6, 2)
    assert torch.equal(weights.usage[-1], state.memory.usage)
    assert torch.allclose(weights.modes.sum(3), torch.ones(6, 2, 2, dtype=torch.float64))
    short = layer(x, lengths=torch.tensor([6, 2]), return_weights=True)[2]
    short = [part for part in short if part is not None]
    assert len(short) == 5
    assert not any(part[2:, 1].any() for part in short) and all(part[2:, 0].any() for part in short)
    with torch.no_grad():  # by allocation alone, and nothing at all
        place = sum(layer.memory.head_sizes()[:7])
        layer.heads.weight[place : place + 2], layer.heads.bias[place : place + 2] = 0, 1e4
        allocated = layer(x, return_weights=True)[2]
        layer.heads.bias[place + 1] = -1e4
        nothing = layer(x, return_weights=True)[2]
    assert torch.equal(allocated.allocated, torch.ones(6, 2, dtype=torch.float64))
    assert not nothing.allocated.any() and not nothing.write.any()
    one = slots_of(weights, weights.read.shape[-1])
    torch.testing.assert_close(one.written_by.sum(2), one.written)
    torch.testing.assert_close(one.read_by.sum(2), one.read)
    assert (one.written_by[:, :, 1] > 0).any()
    assert not slots_of(allocated, allocated.read.shape[-1]).written_by[:, :, 1].gt(1e-12).any()


@pytest.mark.parametrize("link", [True, False])
def test_pictures_are_coloured_by_kind(link):
    from matplotlib.figure import Figure

    layer, x = make_layer(link=link), torch.randn(6, 1, 4, dtype=torch.float64)
    with torch.no_grad():
        (_, written, of_writes), (_, read, of_reads) = slot_panels(
            slots_of(layer(x, return_weights=True)[2], layer.memory.num_slots)
        )
    assert written.shape == (6, 7, 2) and read.shape == ((6, 7, 3) if link else (6, 7))
    axes = Figure().subplots()
    draw_steps(axes, written, of_writes, "weight")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["by allocation", "by content"]
    one = torch.zeros(1, 2, 2)
    one[0, 0, 0] = 3
    axes = Figure().subplots()
    draw_steps(axes, one, (("first", "red"), ("second", "blue")), "weight")
    assert axes.images[0].get_array().tolist() == [[[1, 0, 0]], [[1, 1, 1]]]
    draw_steps(axes, torch.zeros(1, 2, 2), of_writes, "weight")  # nothing at all is white
    assert axes.images[1].get_array().min() == 1


def test_presets():
    torch.manual_seed(0)
    graves, csordas = (MemoryLayer.preset(name, 128) for name in ("graves2016", "csordas2019"))
    for layer in (graves, csordas):
        assert (layer.hidden_size, layer.num_slots, layer.slot_size, layer.num_heads) == (256, 256, 64, 4)
        bias = layer.controller.bias_ih + layer.controller.bias_hh
        assert bias.view(4, 256)[1].eq(1).all() and bias.sum() == 256 and not layer.heads.bias.any()
    assert graves.memory == DNC(num_slots=256, slot_size=64)
    assert csordas.memory == DNC(num_slots=256, slot_size=64, **REPAIRS, clip=20.0)
    inputs = 128 + 4 * 64 + 256
    for weight, fan_in in ((graves.controller.weight_hh, inputs), (graves.heads.weight, 256)):
        assert 0.99 < weight.abs().max() * fan_in**0.5 / 2 <= 1
        assert weight.detach().std() * fan_in**0.5 == pytest.approx(
            0.88, abs=0.01
        )  # of a normal cut off at two deviations
    bound = math.sqrt(6 / (inputs + 256))
    for weight in (csordas.controller.weight_ih, csordas.controller.weight_hh):
        for gate, gain in zip(weight.chunk(4), (1, 1, 5 / 3, 1), strict=True):
            assert 0.99 < gate.abs().max() / bound / gain <= 1
    outputs = csordas.heads.out_features
    assert 0.99 < csordas.heads.weight.abs().max() / math.sqrt(6 / (256 + outputs)) <= 1
    small = MemoryLayer.preset(
        "csordas2019", 4, hidden_size=6, controller="feedforward", output_size=3, masks=False, **SIZES
    )
    assert not small.controller.bias.any() and not small.projection.bias.any()
    with pytest.raises(ValueError, match="bias must be True for the preset 'graves2016'"):
        MemoryLayer.preset("graves2016", 4, bias=False)


def test_a_model_keeps_the_options_in_its_config():
    model = MANN(4, 3, 6, addressing="dnc", **SIZES, **REPAIRS, mask_min=0.1, clip=20)
    again = MANN(**model.config)
    assert again.layer.memory == model.layer.memory and model.config["link_sharpening"] is True
    again.load_state_dict(model.state_dict())
    x = torch.randn(5, 2, 4)
    assert torch.equal(again(x)[0], model(x)[0])


@kinds
def test_half_precision(kind):
    layer = make_layer(torch.float32, **KINDS[kind])
    x = torch.randn(6, 2, 4)
    expected, _ = layer(x)
    output, state, weights = layer.bfloat16()(x.bfloat16(), return_weights=True)
    assert output.dtype == torch.bfloat16 and worst_error(output, expected, batch_axis=1) < 0.1
    tensors = [part for part in (*state.memory, *weights) if part is not None]
    assert all(part.dtype == torch.float32 for part in tensors)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"link": 1}, TypeError, "link must be a bool, got int"),
        ({"deallocate": None}, TypeError, "deallocate must be a bool, got NoneType"),
        (
            {"link": False, "link_sharpening": True},
            ValueError,
            "link_sharpening must be False without link, got True",
        ),
        ({"masks": True, "mask_min": 1.0}, ValueError, r"mask_min must be within \[0, 1\), got 1.0"),
        ({"masks": True, "mask_min": math.nan}, ValueError, r"mask_min must be within \[0, 1\), got nan"),
        ({"mask_min": 0.1}, ValueError, "mask_min must be 0 without masks, got 0.1"),
        ({"mask_min": "0"}, TypeError, "mask_min must be a number, got str"),
        ({"clip": 0}, ValueError, "clip must be a positive number or None, got 0"),
        ({"clip": math.inf}, ValueError, "clip must be a positive number or None, got inf"),
        ({"clip": True}, TypeError, "clip must be a number or None, got bool"),
        ({"eps": 0}, ValueError, "eps must be positive and finite, got 0"),
        ({"max_shift": 2}, TypeError, "max_shift is no option here, .* addressing 'dnc' has .* clip, eps"),
    ],
)
def test_refuses_options(options, error, message):
    with pytest.raises(error, match=message):
        make_layer(**options)


def test_refuses_the_state_of_a_layer_with_other_links():
    linked, plain = make_layer(), make_layer(link=False)
    x = torch.zeros(3, 2, 4, dtype=torch.float64)
    for layer, state, message in (
        (linked, plain.initial_state(2), "state.memory.precedence must be a tensor, got NoneType"),
        (plain, linked.initial_state(2), "state.memory.precedence must be None, got Tensor"),
    ):
        with pytest.raises(TypeError, match=message):
            layer(x, state)
        with pytest.raises(TypeError, match=message.replace("state", "start", 1)):
            layer.initial_state(2).reset(torch.tensor([True, False]), state.select([0]))


def test_other_memories_have_no_modes():
    layer = MemoryLayer(4, 5, **SIZES)
    weights = layer(torch.randn(3, 2, 4), return_weights=True)[2]
    assert isinstance(weights, MemoryWeights) and weights.modes is None and weights.allocated is None
