"""A MemoryLayer's modules may be replaced, hooked, pruned, normed and quantized: what they compute is what it computes."""

import copy
import re
import warnings

import pytest
import torch
from cases import fixed_noise, worst_error
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import mann_fast
from mann_fast import MANN, MemoryLayer

SIZES = {"num_slots": 7, "slot_size": 5, "num_heads": 2}
MEMORIES = ("lrua", "ntm", "content", "dnc")
KINDS = ("lstm", "gru", "feedforward")


def make_layer(dtype=torch.float64, **options):
    return MemoryLayer(4, 6, dtype=dtype, **{**SIZES, **options})


def every_module_called(layer, x, state=None):
    """The layer in plain PyTorch, each of its modules called as its class has it."""
    controller, memory, reads = state or layer.initial_state(x.shape[1])
    outputs = []
    with mann_fast.backend("reference"):
        for now in x:
            z = torch.cat([now, reads.flatten(1)], 1)
            if layer.kind == "lstm":
                controller = layer.controller(z, controller)
                hidden = controller[0]
            elif layer.kind == "gru":
                hidden = layer.controller(z, controller[0])
                controller = (hidden,)
            else:
                hidden = torch.tanh(layer.controller(z))
            reads, memory, _ = layer.memory.step(memory, layer.memory.split(layer.heads(hidden)))
            outputs.append(torch.cat([hidden, reads.flatten(1)], 1))
    output = torch.stack(outputs)
    return output if layer.projection is None else layer.projection(output)


def gradients(output, layer):
    weights = fixed_noise(output, torch.Generator().manual_seed(1))
    return torch.autograd.grad((output * weights).sum(), list(layer.parameters()))


def assert_as_called(layer, x, warns=True):
    """Output and gradients; and whether a warning says that the layer goes by steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = layer(x)[0]
    assert (["one step after the other" in str(warning.message) for warning in caught] == [True]) is warns
    expected = every_module_called(layer, x)
    assert worst_error(output, expected, 1) < 1e-11
    for a, b in zip(gradients(output, layer), gradients(expected, layer), strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max().clamp(min=1e-3)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Negated(nn.LSTMCell):
    def forward(self, z, state):
        hidden, cell = super().forward(z, state)
        return -hidden, cell


class Low(nn.Module):
    """A low-rank adapter (LoRA, Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("addressing", MEMORIES)
@pytest.mark.parametrize("name", ["heads", "projection"])
def test_a_linear_of_another_class(addressing, name):
    layer = make_layer(addressing=addressing, output_size=3)
    old = getattr(layer, name)
    setattr(layer, name, Doubled(old.in_features, old.out_features, dtype=torch.float64))
    assert_as_called(
        layer, torch.randn(5, 3, 4, dtype=torch.float64), warns=name == "heads" and layer.memory.fused
    )


@pytest.mark.parametrize("addressing", MEMORIES)
def test_a_controller_of_another_class(addressing):
    layer = make_layer(addressing=addressing)
    layer.controller = Negated(14, 6, dtype=torch.float64)
    assert_as_called(layer, torch.randn(5, 3, 4, dtype=torch.float64), warns=layer.memory.fused)
    layer = make_layer(addressing=addressing, controller="feedforward")
    layer.controller = Doubled(14, 6, dtype=torch.float64)
    assert_as_called(layer, torch.randn(5, 3, 4, dtype=torch.float64), warns=layer.memory.fused)


def test_a_low_rank_adapter_learns_and_its_base_does_not():
    layer = make_layer()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    before = layer(x)[0]
    layer.heads = Low(layer.heads)
    with pytest.warns(UserWarning, match=r"for heads is a test_submodules.Low, not an nn.Linear"):
        output = layer(x)[0]
    assert not torch.allclose(output, before)
    output.sum().backward()
    assert layer.heads.base.weight.grad is None
    assert layer.heads.down.weight.grad.abs().sum() > 0
    assert torch.allclose(output, every_module_called(layer, x), rtol=1e-10)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", ["controller", "heads"])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_are_called_at_every_step(kind, name):
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    layer = make_layer(controller=kind)
    module = getattr(layer, name)
    plain = layer(x)[0]
    called = []
    handle = module.register_forward_hook(lambda module, given, result: called.append(1))
    with pytest.warns(UserWarning, match=f"for {name} has hooks"):
        layer(x)
    assert len(called) == 5
    handle.remove()
    handle = module.register_forward_pre_hook(lambda module, given: (given[0] * 0.5, *given[1:]))
    assert_as_called(layer, x)
    handle.remove()
    called.clear()
    handle = module.register_full_backward_hook(lambda module, inner, outer: called.append(1))
    assert_as_called(layer, x)
    assert len(called) == 10  # the layer and what it is compared with
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # back to one call
        assert torch.equal(layer(x)[0], plain)


def test_hooks_of_every_module_are_called():
    layer, seen = make_layer(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        with pytest.warns(UserWarning, match="for heads has hooks"):
            layer(torch.randn(5, 3, 4, dtype=torch.float64))
    finally:
        handle.remove()
    assert seen == [nn.LSTMCell, nn.Linear] * 5 + [MemoryLayer]


def test_a_replaced_forward_is_called():
    layer = make_layer()
    forward = layer.heads.forward
    layer.heads.forward = lambda hidden: 3 * forward(hidden)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    with pytest.warns(UserWarning, match="for heads has a forward of its own"):
        output = layer(x)[0]
    assert torch.allclose(output, every_module_called(layer, x), rtol=1e-10)


@pytest.mark.parametrize("addressing", MEMORIES)
@pytest.mark.parametrize(
    "name, weight", [("heads", "weight"), ("controller", "weight_hh"), ("controller", "bias_ih")]
)
@pytest.mark.filterwarnings("ignore:MemoryLayer goes one step")
def test_pruned_weights_stay_away_over_training_steps(addressing, name, weight):
    layer = make_layer(addressing=addressing)
    prune.l1_unstructured(getattr(layer, name), weight, amount=0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        x = torch.randn(5, 3, 4, dtype=torch.float64)
        assert_as_called(layer, x, warns=layer.memory.fused)
        optimizer.zero_grad()
        layer(x)[0].square().sum().backward()
        optimizer.step()
    layer(x)  # pruning computes the weight at every call
    module = getattr(layer, name)
    mask = getattr(module, weight + "_mask")
    assert 0 < mask.sum() < mask.numel()
    assert torch.equal(getattr(module, weight), getattr(module, weight + "_orig") * mask)
    prune.remove(module, weight)
    assert_as_called(layer, x, warns=False)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("addressing", ["lrua", "ntm", "dnc"])
@pytest.mark.parametrize("name, weight", [("heads", "weight"), ("controller", "weight_ih")])
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_norms_by_hooks(addressing, name, weight, norm):
    layer = make_layer(addressing=addressing).double()
    norm(getattr(layer, name), weight)
    if not layer.memory.fused:
        assert torch.isfinite(layer(torch.randn(5, 3, 4, dtype=torch.float64))[0]).all()
    layer.eval()  # where spectral_norm's estimate stands still
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = layer(x)[0]
    assert torch.allclose(first, every_module_called(layer, x), rtol=1e-10)
    first.sum().backward()
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize("addressing", MEMORIES)
@pytest.mark.parametrize("kind", KINDS)
def test_parametrized_weights_go_on_in_one_call(addressing, kind):
    layer = make_layer(addressing=addressing, controller=kind)
    names = ("weight",) if kind == "feedforward" else ("bias_hh", "weight_hh", "bias_ih", "weight_ih")
    for name in names:  # in another order than the module's: each is known by its name
        parametrize.register_parametrization(layer.controller, name, Half())
    parametrizations.weight_norm(layer.heads)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    assert_as_called(layer, x, warns=False)
    parametrizations.spectral_norm(layer.heads)
    steps = layer.heads.parametrizations.weight[-1]
    layer.train()
    before = steps._u.clone()
    layer(x)
    once = copy.deepcopy(layer.heads)
    assert not torch.equal(before, steps._u)
    layer.eval()
    assert torch.equal(once.parametrizations.weight[-1]._u, layer.heads.parametrizations.weight[-1]._u)
    assert_as_called(layer, x, warns=False)


@pytest.mark.filterwarnings(
    "ignore:MemoryLayer goes one step", "ignore::DeprecationWarning", "ignore:torch.quantize_per:UserWarning"
)
@pytest.mark.parametrize("addressing", MEMORIES)
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_linears_and_cells(addressing, kind):
    if not [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]:
        pytest.skip("this torch has no engine for quantized products")
    torch.manual_seed(0)
    layer = make_layer(torch.float32, addressing=addressing, controller=kind, output_size=3)
    wanted = {nn.Linear, nn.LSTMCell, nn.GRUCell}
    quantized = torch.ao.quantization.quantize_dynamic(layer, wanted, dtype=torch.qint8)
    assert type(quantized.heads) is not nn.Linear and type(quantized.controller) is not type(layer.controller)
    x = torch.randn(5, 3, 4)
    output, state = quantized(x)
    assert torch.allclose(output, every_module_called(quantized, x), atol=1e-5)
    assert 0 < (output - layer(x)[0]).abs().max() < 0.2
    assert state.reads.dtype == torch.float32
    quantized(x, state)


@pytest.mark.parametrize("addressing", MEMORIES)
@pytest.mark.parametrize("kind", KINDS)
def test_called_modules_under_autocast(addressing, kind):
    layer = make_layer(torch.float32, addressing=addressing, controller=kind, output_size=3, num_slots=40)
    x = torch.randn(3, 2, 4)
    half = copy.deepcopy(layer).bfloat16()
    results = []
    for model, given in ((layer, x), (half, x.bfloat16())):
        model.heads.register_forward_hook(lambda *_: None)
        with torch.autocast("cpu", torch.bfloat16, enabled=model is layer), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output, state = model(given)
        assert output.dtype == state.reads.dtype == torch.bfloat16
        output.float().sum().backward()
        results.append(output)
    assert worst_error(*results, 1) < 2e-2
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("addressing", MEMORIES)
@pytest.mark.parametrize("kind", KINDS)
def test_without_bias(addressing, kind):
    layer = make_layer(addressing=addressing, controller=kind, output_size=3, bias=False)
    assert not [name for name, _ in layer.named_parameters() if "bias" in name]
    assert "bias=False" in repr(layer)
    assert_as_called(layer, torch.randn(5, 3, 4, dtype=torch.float64), warns=False)
    with pytest.raises(TypeError, match="bias must be a bool, got int"):
        make_layer(bias=0)
    with pytest.raises(ValueError, match="bias must be True for the preset 'snowkylin'"):
        MemoryLayer.preset("snowkylin", 4, bias=False)


@pytest.mark.filterwarnings("ignore:MemoryLayer goes one step")
def test_modules_that_give_something_else_are_named():
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    layer = make_layer()
    layer.heads = nn.Linear(6, 9, dtype=torch.float64)
    with pytest.raises(ValueError, match="head"):
        layer(x)
    layer.heads = nn.Sequential(layer.heads)
    with pytest.raises(
        ValueError, match=re.escape("heads must return values of shape [B, V] = [3, 24], got [3, 9]")
    ):
        layer(x)
    layer = make_layer(controller="gru")
    layer.controller = Doubled(14, 6, dtype=torch.float64)
    with pytest.raises(TypeError):
        layer(x)
    layer = make_layer()
    layer.heads = nn.Identity()
    with pytest.raises(TypeError, match="heads, a Identity, has no reset_parameters"):
        layer.reset_parameters()


@pytest.mark.parametrize("addressing", MEMORIES)
@pytest.mark.parametrize("options", [{}, {"output_size": 3}, {"batch_first": True}], ids=str)
def test_the_output_may_be_changed_in_place(addressing, options):
    layer = make_layer(addressing=addressing, **options)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    expected = gradients(layer(x)[0] * 2, layer)
    output = layer(x)[0]
    output.mul_(2)
    for a, b in zip(gradients(output, layer), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_what_programs_for_an_lstm_call():
    layer = make_layer()
    assert layer.flatten_parameters() is None
    for name in ("num_layers", "dropout", "bidirectional"):
        with pytest.raises(
            TypeError, match=f"{name} is no option of MemoryLayer: mann_fast.MemoryStack has it"
        ):
            make_layer(**{name: 1})
    with pytest.raises(TypeError, match="proj_size is no option of MemoryLayer: output_size is"):
        make_layer(proj_size=3)


@pytest.mark.parametrize("kind", KINDS)
def test_mann_draws_its_parameters_anew(kind):
    torch.manual_seed(0)
    model = MANN(9, 3, 6, controller=kind, **SIZES)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    model.reset_parameters()
    assert all((model.state_dict()[name] != before[name]).any() for name in before)
    torch.manual_seed(0)
    model.reset_parameters()
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize("addressing", MEMORIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output_size", [None, 3])
def test_parameters_of_several_dtypes(addressing, kind, output_size):
    """Half-precision weights beside float32 biases, or a projection in another dtype; x is of the heads' weight's."""
    layer = make_layer(
        torch.float32, addressing=addressing, controller=kind, output_size=output_size, num_slots=40
    )
    half = copy.deepcopy(layer).bfloat16()
    mixed = copy.deepcopy(half)
    for parameter in mixed.parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data.float()
    x = torch.randn(3, 2, 4)
    expected = half(x.bfloat16())[0]
    output = mixed(x.bfloat16())[0]
    assert output.dtype == torch.bfloat16 and worst_error(output, expected, 1) < 2e-2
    output.float().sum().backward()
    assert all(p.grad.dtype == p.dtype for p in mixed.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert mixed(x)[0].dtype == torch.bfloat16
    if output_size:
        layer.projection.bfloat16()
        assert layer(x)[0].dtype == torch.float32
    mixed.controller.float()
    assert torch.isfinite(mixed(x.bfloat16(), return_weights=True)[0]).all()


@pytest.mark.parametrize("addressing", MEMORIES)
def test_replicas_of_data_parallel(addressing):
    """Their parameters are plain attributes, as nn.DataParallel's replicate leaves them."""
    layer = make_layer(addressing=addressing, output_size=3, memory_start="learned")

    def replicate(module):
        replica = module._replicate_for_data_parallel()
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.view_as(parameter))
        for name, child in module.named_children():
            replica._modules[name] = replicate(child)
        return replica

    replica = replicate(layer)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    output, state = replica(x)
    assert torch.equal(output, layer(x)[0])
    (output + replica(x, state)[0]).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
