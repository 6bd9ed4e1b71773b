"""Inputs and results of the ops of whole sequences, as dicts: what their tests share."""

import sys

import torch
from cases import fixed_noise, worst_error
from torch.utils._python_dispatch import TorchDispatchMode

from mann_fast.reference.cell import CONTROLLERS

PARAMETERS = ("hidden_weight", "hidden_bias", "reads_weight", "head_weight", "head_bias")


class Called(TorchDispatchMode):
    """The names of the raw ops that are called meanwhile."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace.startswith("mann_fast"):
            self.names.add(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


# Half precision, and whether products of bfloat16 are said to be fast: of a processor only one is true.
HALVES = [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, False)]


def say_fast_bfloat16(monkeypatch, fast):
    answers = sys.modules["mann_fast.ops._cell"]._answers
    monkeypatch.setitem(answers, (torch.empty(0).device, "fast_bfloat16"), fast)


def normals():
    """A function that draws normal numbers of the sizes that it is given, from a seed of its own: the same on every device."""
    generator = torch.Generator().manual_seed(0)
    return lambda *sizes: torch.randn(
        *sizes, dtype=torch.float64, generator=generator, device=generator.device
    ).to(torch.get_default_device())


def network_inputs(normal, steps, batch, size, heads, width, memory, values, controller):
    """All tensors of an op but resets and lengths, ``memory`` as given; weights are as large as a layer's. values: how many
    the heads have."""
    gates, states = CONTROLLERS[controller]
    inputs = {
        "gates": normal(steps, batch, gates * size),
        "hidden": normal(batch, size),
        "cell": normal(batch, size),
        **memory,
        "reads": normal(batch, heads, width),
        "hidden_weight": normal(gates * size, size) / max(size, 1) ** 0.5,
        "hidden_bias": normal(gates * size),
        "reads_weight": normal(gates * size, heads * width) / (heads * width) ** 0.5,
        "head_weight": 2 * normal(values, size) / max(size, 1) ** 0.5,
        "head_bias": normal(values),
    }
    missing = {"hidden", "cell"} - set(states) | (set() if states else {"hidden_weight", "hidden_bias"})
    return {name: None if name in missing else x for name, x in inputs.items()}


def call(function, kind, inputs, **options):
    """All results: output, the controller's state, the memory's, of the NamedTuple ``kind``, and the last reads."""
    inputs = dict(inputs)
    state = tuple(x for x in (inputs.pop("hidden"), inputs.pop("cell")) if x is not None)
    memory = kind(*(inputs.pop(name) for name in kind._fields))
    output, state, memory, reads = function(state=state, memory=memory, **inputs, **options)
    assert type(memory) is kind
    state = dict(zip(("hidden", "cell"), state, strict=False))
    return {"output": output, **state, **memory._asdict(), "reads": reads}


def results_and_gradients(function, kind, inputs, dtype, constant=(), start=None, only=None, **options):
    """start comes in as one of the inputs: its gradient is among the others. constant: inputs without a gradient."""
    inputs = {
        name: x
        if x is None or not x.is_floating_point()
        else x.detach().to(dtype, copy=True).requires_grad_(name not in constant and only in (None, name))
        for name, x in inputs.items()
    }
    wanted = {name: x for name, x in inputs.items() if x is not None and x.requires_grad}
    if start is not None:
        options["start"] = wanted["start"] = start.detach().to(dtype, copy=True).requires_grad_()
    results = call(function, kind, inputs, **options)
    generator = torch.Generator().manual_seed(1)
    noise = {name: fixed_noise(x, generator).double() for name, x in results.items() if x is not None}
    loss = sum((results[name].double() * x).sum() for name, x in noise.items() if results[name].requires_grad)
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return results, dict(zip(wanted, gradients, strict=True))


def compare(actual, expected, tolerance):
    """Results and gradients; what is None must be, and integers are the same."""
    assert actual[0].keys() == expected[0].keys()
    for name, y in expected[0].items():
        assert (actual[0][name] is None) == (y is None), name
        if y is not None and not y.is_floating_point():
            assert torch.equal(actual[0][name], y), name
        elif y is not None:
            error = worst_error(actual[0][name], y, batch_axis=1 if name == "output" else 0)
            assert error < tolerance, name
    assert actual[1].keys() == expected[1].keys()
    for name, y in expected[1].items():
        x = actual[1][name]
        if name in (*PARAMETERS, "start"):
            x, y = x[None], y[None]
        error = worst_error(x, y, batch_axis=1 if name == "gates" else 0)
        assert error < 10 * tolerance, f"gradient of {name}: {error}"
