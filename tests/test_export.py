"""Layers that leave Python: torch.export, AOTInductor, ONNX and torch.jit.trace; and states that are saved."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.export import Dim, export

import mann_fast
from mann_fast import MANN, MemoryLayer, MemoryStack, MemoryState
from mann_fast.layers import register_state
from mann_fast.ops import LRUAState

SMALL = {"num_slots": 8, "slot_size": 5, "num_heads": 2}
SIZES = [(1, 1), (2, 1), (5, 3), (20, 2)]  # of an exported program: not those of its example

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch.export's own


def leaves(result):
    return torch.utils._pytree.tree_leaves(result)


def example(model, steps, batch, dtype=torch.float64):
    """An input, and a state to go on from."""
    x = torch.randn(steps, batch, 4, dtype=dtype)
    return x, model(x)[1].detach()


def any_sizes(state):
    steps, batch = Dim("T", min=1), Dim("B", min=1)
    return {"x": {0: steps, 1: batch}, "state": state.map(lambda _: {0: batch})}


def assert_same(actual, expected, tolerance=1e-12):
    for a, b in zip(leaves(actual), leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def gradients(model, x, state):
    x = x.detach().requires_grad_()
    parameters = dict(model.named_parameters())
    output, end = model(x, state)
    loss = output.square().sum() + end.memory[0].sum()
    tensors = [x, *(parameters[name] for name in sorted(parameters))]
    grads = torch.autograd.grad(loss, tensors, allow_unused=True)  # the learned start, beside a state
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(tensors, grads, strict=True)]


# In a new process: what was saved gives the output that was saved with it.
LOAD = """
import sys, torch, mann_fast
program, values = sys.argv[1:]
x, state, expected = torch.load(values)
if "aot" in program:
    run = torch._inductor.aoti_load_package(program)
else:
    run = torch.export.load(program).module()
output, end = run(x, state)
torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
assert type(end) is mann_fast.MemoryState and type(end.memory) is type(state.memory)
"""


def assert_loads(program, model, folder):
    x, state = example(model, 13, 2)
    values = folder / "values.pt"
    torch.save((x, state, model(x, state)[0].detach()), values)
    subprocess.run([sys.executable, "-W", "ignore", "-c", LOAD, program, values], check=True)


@pytest.mark.parametrize(
    "options, recorded",
    [
        ({}, False),
        ({}, True),
        ({"controller": "gru", "memory_start": "learned"}, True),
        ({"addressing": "ntm"}, True),
        ({"addressing": "sparse"}, True),
        pytest.param(
            {"addressing": "dnc", "masks": True, "deallocate": True, "link_sharpening": True},
            True,
            marks=pytest.mark.thorough,
        ),
        pytest.param({"addressing": "dnc", "link": False}, False, marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_exports_for_all_sizes(options, recorded, tmp_path):
    torch.compiler.reset()
    model = MANN(4, 3, 6, dtype=torch.float64, **SMALL, **options)
    x, state = example(model, 6, 3)
    with torch.set_grad_enabled(recorded):
        program = export(model, (x, state), dynamic_shapes=any_sizes(state))
    module = program.module()
    for steps, batch in SIZES:
        x, state = example(model, steps, batch)
        output, end = module(x, state)
        assert type(end) is MemoryState
        assert_same((output, end), model(x, state))
        if recorded:
            assert_same(gradients(module, x, state), gradients(model, x, state))
    if recorded and not options:
        torch.export.save(program, tmp_path / "program.pt2")
        assert_loads(tmp_path / "program.pt2", model, tmp_path)
        decomposed = program.run_decompositions().module()
        assert_same(decomposed(x, state), model(x, state))


def test_exports_without_a_state():
    layer = MemoryLayer(4, 6, batch_first=True, dtype=torch.float64, **SMALL)
    x = torch.randn(3, 6, 4, dtype=torch.float64)
    program = export(layer, (x,), dynamic_shapes={"x": {0: Dim("B", min=1), 1: Dim("T", min=1)}}).module()
    for batch, steps in SIZES:
        x = torch.randn(batch, steps, 4, dtype=torch.float64)
        assert_same(program(x), layer(x))


def test_ahead_of_time(tmp_path):
    model = MANN(4, 3, 6, dtype=torch.float64, **SMALL)
    x, state = example(model, 6, 3)
    with torch.no_grad():
        program = export(model, (x, state), dynamic_shapes=any_sizes(state))
    path = str(tmp_path / "aot.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    run = torch._inductor.aoti_load_package(path)
    for steps, batch in SIZES:
        x, state = example(model, steps, batch)
        assert_same(run(x, state), model(x, state))
    assert_loads(path, model, tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"addressing": "ntm"},
        {"addressing": "dnc"},
        {"addressing": "dnc", "link": False},
        {"controller": "feedforward"},
    ],
)
def test_states_are_loaded_as_torch_does_by_default(options, tmp_path):
    layer = MemoryLayer(4, 6, **SMALL, **options)
    _, state, weights = layer(torch.randn(3, 2, 4), return_weights=True)
    stack = MemoryStack(4, 6, 2, **SMALL, **options)(torch.randn(3, 2, 4))[1]
    for value in (state.detach(), weights._replace(read=weights.read.detach()), stack):
        torch.save(value, tmp_path / "state.pt")
        loaded = torch.load(tmp_path / "state.pt")
        assert type(loaded) is type(value)
        assert_same(loaded, value, 0)


def test_only_a_named_tuple_is_registered():
    register_state(MemoryState)  # once more
    with pytest.raises(TypeError, match="kind must be a NamedTuple class, got <class 'tuple'>"):
        register_state(tuple)


class Own(nn.Module):
    """A controller of a user."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, z, state):
        hidden = self.cell(z, *(state or ()))
        return hidden, (hidden,)


class Stepwise(nn.Module):
    """With a state of plain tuples, as torch.jit has them."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, controller, memory, reads):
        return self.layer(x, MemoryState(controller, LRUAState(*memory), reads))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
class TestTrace:
    @pytest.mark.parametrize(
        "options", [{}, {"controller": "gru", "memory_start": "learned", "output_size": 3}]
    )
    @pytest.mark.parametrize("carried", [False, True])
    def test_takes_other_sizes(self, options, carried, tmp_path):
        layer = MemoryLayer(4, 6, dtype=torch.float64, **SMALL, **options)
        model = Stepwise(layer) if carried else layer
        x, state = example(layer, 6, 3)
        traced = torch.jit.trace(model, (x, *state) if carried else (x,))
        torch.jit.save(traced, tmp_path / "traced.pt")
        traced = torch.jit.load(tmp_path / "traced.pt")
        for steps, batch in SIZES:
            x, state = example(layer, steps, batch)
            arguments = (x, *state) if carried else (x,)
            assert_same(traced(*arguments), model(*arguments))
        ours, theirs = (
            torch.autograd.grad(run(*arguments)[0].square().sum(), dict(run.named_parameters())[name])
            for run in (traced, model)
            for name in ["layer.heads.weight" if carried else "heads.weight"]
        )
        assert_same(ours, theirs)

    def test_sparse_access_takes_other_sizes(self):
        layer = MemoryLayer(4, 6, addressing="sparse", dtype=torch.float64, **SMALL)
        traced = torch.jit.trace(layer, (torch.randn(6, 3, 4, dtype=torch.float64),))
        for steps, batch in SIZES:
            x = torch.randn(steps, batch, 4, dtype=torch.float64)
            assert_same(traced(x), layer(x))

    def test_refuses_what_it_does_not_hold_for(self):
        controller = nn.RNNCell(4 + SMALL["num_heads"] * SMALL["slot_size"], 6)
        layer = MemoryLayer(4, 6, controller=Own(controller), **SMALL)  # a loop of steps
        traced = torch.jit.trace(layer, (torch.randn(3, 2, 4),))
        x = torch.randn(3, 5, 4)
        assert_same(traced(x), layer(x), 1e-6)
        with pytest.raises(RuntimeError, match="Expected 3 elements in a list but found 4"):
            traced(torch.randn(4, 2, 4))
        with pytest.raises(ValueError, match="x must have T >= 1 in torch.jit.trace"):
            torch.jit.trace(MemoryLayer(4, 6, **SMALL), (torch.randn(0, 2, 4),))


def test_onnx_asks_the_reference(monkeypatch):
    """What the exporter traces, without the exporter."""
    import torch.onnx

    layer = MemoryLayer(4, 6, dtype=torch.float64, **SMALL)
    x, state = example(layer, 3, 2)
    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        program = export(layer, (x, state))
    assert not [node for node in program.graph.nodes if "mann_fast" in str(node.target)]


@pytest.mark.filterwarnings("ignore")  # the exporter's
@pytest.mark.parametrize("options", [{}, {"addressing": "ntm"}])
def test_onnx(options, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    import onnxruntime

    model = MANN(4, 3, 6, **SMALL, **options)
    x, state = example(model, 3, 2, torch.float32)
    with torch.no_grad():
        torch.onnx.export(model, (x, state), str(tmp_path / "model.onnx"), dynamo=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    names = [given.name for given in session.get_inputs()]
    values = {name: value.numpy() for name, value in zip(names, leaves((x, state)), strict=True)}
    actual = [torch.from_numpy(result) for result in session.run(None, values)]
    assert_same(actual, leaves(model(x, state)), 1e-5)


def test_a_backend_that_is_named_serves_onnx_too(monkeypatch):
    import torch.onnx

    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with mann_fast.backend("auto"):
        assert mann_fast.ops._backend.chosen("cpu") == "reference"
    with mann_fast.backend("cpp"):
        assert mann_fast.ops._backend.chosen("cpu") == "cpp"
