"""Whole layers in torch.func's transforms, in torch.export and in forward mode: the right gradient, or an error."""

import copy

import pytest
import torch
from cases import served_by
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jvp, stack_module_state, vmap

import mann_fast
from mann_fast import MemoryLayer

REPAIRS = {"masks": True, "deallocate": True, "link_sharpening": True}
KINDS = [
    pytest.param(
        {"addressing": addressing, "controller": controller, **(REPAIRS if addressing == "dnc" else {})},
        id=f"{addressing}-{controller}",
    )
    for addressing, controller in [
        ("lrua", "lstm"),
        ("lrua", "gru"),
        ("lrua", "feedforward"),
        ("ntm", "lstm"),
        ("ntm", "gru"),
        ("content", "feedforward"),
        ("dnc", "lstm"),
        ("sparse", "lstm"),
    ]
]
every_kind = pytest.mark.parametrize("options", KINDS)


def make(options):
    sizes = {"num_slots": 6, "slot_size": 4, "num_heads": 2}
    return MemoryLayer(3, 5, **sizes, **options, dtype=torch.float64)


def sequence(*leading):
    return torch.randn(*leading, 7, 2, 3, dtype=torch.float64)


def loss(layer, x):
    output, state = layer(x)
    return output.square().sum() + state.memory.memory.sum()


def plain_gradients(layer, x):
    gradients = torch.autograd.grad(loss(layer, x), list(layer.parameters()))
    return dict(zip((name for name, _ in layer.named_parameters()), gradients, strict=True))


def assert_alike(actual, expected):
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-10)


@every_kind
def test_an_ensemble_by_vmap_over_parameters(options):
    """stack_module_state, and a gradient outside or inside of vmap: the loop's."""
    layers, x = [make(options) for _ in range(3)], sequence()
    parameters, buffers = stack_module_state(layers)
    skeleton = copy.deepcopy(layers[0]).to("meta")

    def one(parameters, buffers):
        return functional_call(skeleton, (parameters, buffers), (x,))[0]

    outputs = vmap(one)(parameters, buffers)
    torch.testing.assert_close(outputs, torch.stack([layer(x)[0] for layer in layers]))
    expected = [
        dict(
            zip(
                parameters,
                torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters())),
                strict=True,
            )
        )
        for layer in layers
    ]
    expected = {name: torch.stack([each[name] for each in expected]) for name in parameters}
    outside = torch.autograd.grad(outputs.square().sum(), list(parameters.values()))
    assert_alike(dict(zip(parameters, outside, strict=True)), expected)
    constants = {name: x.detach() for name, x in parameters.items()}
    inside = vmap(grad(lambda p: one(p, {}).square().sum()))(constants)
    assert_alike(inside, expected)


@every_kind
@pytest.mark.parametrize("backend", ["tested", "reference"])
def test_gradients_per_sample(options, backend):
    layer, several = make(options), sequence(4)
    constants = {name: x.detach() for name, x in layer.named_parameters()}
    with served_by(backend):
        one = grad(lambda p, x: loss(lambda x: functional_call(layer, p, (x,)), x))
        actual = vmap(one, (None, 0))(constants, several)
        each = [plain_gradients(layer, x) for x in several]
    assert_alike(actual, {name: torch.stack([one[name] for one in each]) for name in constants})


@every_kind
def test_forward_mode_is_refused_and_the_reference_has_it(options):
    layer, x = make(options), sequence()
    tangent = torch.randn_like(x)

    def output(x):
        return layer(x)[0]

    torch.compiler.reset()
    compiled = torch.compile(output)

    def dual(function):
        with forward_ad.dual_level():
            return function(forward_ad.make_dual(x, tangent))

    for call in (
        lambda: jvp(output, (x,), (tangent,)),
        lambda: jacfwd(output)(x),
        lambda: dual(output),
        lambda: jvp(compiled, (x,), (tangent,)),
        lambda: dual(compiled),
        lambda: torch.no_grad()(dual)(compiled),
    ):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative .* mann_fast.reference"):
            call()
    with mann_fast.backend("reference"):
        value, along = jvp(output, (x,), (tangent,))
        leaf = x.clone().requires_grad_()
        factors = torch.randn_like(value)
        (back,) = torch.autograd.grad((output(leaf) * factors).sum(), leaf)
        torch.testing.assert_close((along * factors).sum(), (back * tangent).sum())
        assert hessian(lambda x: output(x).square().sum())(x[:1]).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch.export's own
@every_kind
@pytest.mark.parametrize("recorded", [True, False], ids=["with gradients", "without"])
def test_exported_and_then_trained(options, recorded):
    layer, x = make(options), sequence()
    expected = plain_gradients(layer, x)
    with torch.set_grad_enabled(recorded):
        program = torch.export.export(layer, (x,), strict=False)
    for stage in (program, program.run_decompositions()):
        module = stage.module()
        gradients = torch.autograd.grad(loss(module, x), list(module.parameters()))
        names = [name for name, _ in module.named_parameters()]
        assert_alike(dict(zip(names, gradients, strict=True)), expected)
