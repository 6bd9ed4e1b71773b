"""What all ops promise alike: registration, compilation, refusals, backends, argument errors."""

import subprocess
import sys

import pytest
import torch
from cases import OPTIONS, RAW_OPS, distinct_state, needs_kernels, scan_inputs, worst_error

import mann_fast
from mann_fast import ops, reference


def raw_samples():
    """Arguments of every raw op: odd sizes, one slot, no steps, empty batch, strided and expanded inputs, half precision."""
    for steps, batch, slots, size, heads in [
        (3, 2, 7, 5, 3),
        (None, 2, 7, 5, 3),
        (1, 1, 1, 1, 1),
        (0, 2, 5, 4, 2),
        (3, 0, 5, 4, 2),
        (10, 2, 20, 3, 2),
    ]:
        state, inputs = (
            distinct_state(batch, slots, size, heads, torch.float32),
            scan_inputs(steps, batch, size, heads),
        )
        for read_first, shared, sharpness, keep in [
            (False, False, True, 8),
            (True, True, False, 8),
            (False, True, True, 0),
        ]:
            tensors = [x.float() for x in inputs[:3]] + [inputs[3].float() if sharpness else None]
            yield "lrua_scan", (*state, *tensors, read_first, shared, 0.95, 1e-6, keep)
    state, inputs = distinct_state(2, 7, 5, 3, torch.float32), scan_inputs(4, 2, 5, 3)
    strided = [x.float().transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    expanded = strided[0][:1].expand(4, 2, 3, 5)
    yield "lrua_scan", (*state, expanded, *strided[1:], False, False, 0.95, 1e-6, 8)
    yield "lrua_scan", (*state, *(x.bfloat16() for x in inputs), False, False, 0.95, 1e-6, 8)
    memory = state.memory.transpose(1, 2).contiguous().transpose(1, 2)
    key, vector, gate, sharpness = (x[0].float() for x in inputs)
    yield "content_read", (memory, key, sharpness, 1e-6)
    yield "content_read", (state.memory, key[:1].expand(2, 3, 5).half(), None, 1e-6)
    yield "lrua_write", (memory, state.read_weights, state.usage, vector, gate, False)
    yield "lrua_write", (state.memory, state.read_weights, state.usage, vector.half(), gate.half(), True)
    yield "least_used", (state.usage, 3)
    yield "least_used", (state.usage.double(), 0)


def raw_backward_samples():
    state, inputs = distinct_state(2, 7, 5, 3, torch.float32), scan_inputs(10, 2, 5, 3)
    inputs = [x.float() for x in inputs]
    for steps, sharpness, which in [(10, True, 0), (1, False, 1), (None, True, 2), (0, True, 0)]:
        tensors = [x[0] if steps is None else x[:steps] for x in inputs]
        tensors[3] = tensors[3] if sharpness else None
        raw = RAW_OPS.lrua_scan(*state, *tensors, False, False, 0.95, 1e-6, 8)
        grads = [torch.randn_like(x) if i >= which else None for i, x in enumerate(raw[:3])]
        yield "lrua_scan_backward", (*grads, *state[:2], *tensors, *raw[4:], False, False, 1e-6, 8)
    key, vector, gate, sharpness = (x[0] for x in inputs)
    read, weights = RAW_OPS.content_read(state.memory, key, sharpness, 1e-6)
    yield "content_read_backward", (read, None, state.memory, key, sharpness, read, weights, 1e-6)
    yield "content_read_backward", (None, weights, state.memory, key, None, read, weights, 1e-6)
    memory, weights, slots = RAW_OPS.lrua_write(*state, vector, gate, True)
    yield "lrua_write_backward", (memory, None, state.read_weights, vector, gate, slots, True)


@needs_kernels
def test_opcheck():
    """Schema, fake rule and tracing with symbolic sizes of every raw op."""
    count = 0
    for name, arguments in [*raw_samples(), *raw_backward_samples()]:
        torch.library.opcheck(getattr(RAW_OPS, name).default, arguments)
        count += 1
    assert count > 25


def scan(state, inputs, **options):
    reads, end = ops.lrua_scan(reference.LRUAState(*state), *inputs, **options)
    return reads, *end


@needs_kernels
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
def test_compiles_in_one_graph_with_gradients(options):
    torch.compiler.reset()
    state, inputs = distinct_state(2, 9, 5, 3), scan_inputs(4, 2, 5, 3)
    for x in inputs:
        x.requires_grad_()

    def everything(state, keys, vectors, gates, sharpness):
        memory, weights = ops.lrua_write(*state, vectors[0], gates[0], write_target=options["write_target"])
        read, _ = ops.content_read(memory, keys[0], sharpness[0])
        slots = ops.least_used(state[2], 2)
        step_read, state = ops.lrua_step(
            ops.LRUAState(*state), keys[1], vectors[1], gates[1], sharpness[1], **options
        )
        reads, state = ops.lrua_scan(state, keys, vectors, gates, sharpness, **options)
        return (
            reads.sum() + read.square().sum() + step_read.sum() + weights.square().sum() + state.memory.sum(),
            slots,
        )

    loss, slots = torch.compile(everything, fullgraph=True)(state, *inputs)
    actual = torch.autograd.grad(loss, inputs)
    expected_loss, expected_slots = everything(state, *inputs)
    assert torch.equal(slots, expected_slots) and torch.allclose(loss, expected_loss)
    for x, y in zip(actual, torch.autograd.grad(expected_loss, inputs), strict=True):
        assert worst_error(x, y) < 1e-12


@needs_kernels
def test_compiles_where_one_tensor_is_given_twice():
    torch.compiler.reset()
    state, inputs = distinct_state(2, 9, 5, 3), scan_inputs(4, 2, 5, 3)
    keys = inputs[0].requires_grad_()

    def call(state, keys, gates):
        return ops.lrua_scan(ops.LRUAState(*state), keys, keys, gates, gates)[0]

    compiled = torch.compile(call, fullgraph=True)(state, keys, inputs[2])
    actual = torch.autograd.grad(compiled.sum(), keys)[0]
    assert worst_error(actual, torch.autograd.grad(call(state, keys, inputs[2]).sum(), keys)[0]) < 1e-12


@needs_kernels
def test_compiles_with_dynamic_sizes_without_recompiling():
    torch.compiler.reset()
    compiled = torch.compile(scan, fullgraph=True, dynamic=True)
    for steps, batch in [(12, 3), (4, 2), (30, 5)]:
        state, inputs = distinct_state(batch, 9, 5, 3), scan_inputs(steps, batch, 5, 3)
        inputs[0].requires_grad_()
        for x, y in zip(compiled(state, inputs), scan(state, inputs), strict=True):
            assert torch.equal(x, y)


@needs_kernels
def test_torch_func_grad():
    state, inputs = distinct_state(2, 6, 4, 2), scan_inputs(3, 2, 4, 2)
    loss = lambda keys: ops.lrua_scan(state, keys, *inputs[1:])[0].square().sum()  # noqa: E731
    keys = inputs[0].clone().requires_grad_()
    expected = torch.autograd.grad(loss(keys), keys)[0]
    assert torch.equal(torch.func.grad(loss)(inputs[0]), expected)


def differentiable_calls():
    state, inputs = distinct_state(2, 6, 4, 2), scan_inputs(3, 2, 4, 2)
    step = [x[0] for x in inputs]
    yield "content_read", lambda x: ops.content_read(state.memory, x)[0], step[0]
    yield "lrua_write", lambda x: ops.lrua_write(*state, x, step[2])[0], step[1]
    yield "lrua_step", lambda x: ops.lrua_step(state, x, *step[1:])[0], step[0]
    yield "lrua_scan", lambda x: ops.lrua_scan(state, x, *inputs[1:])[0], inputs[0]


@needs_kernels
@pytest.mark.parametrize("index", range(4), ids=["content_read", "lrua_write", "lrua_step", "lrua_scan"])
def test_second_derivatives_and_forward_mode_are_refused(index):
    name, call, x = list(differentiable_calls())[index]
    x = x.clone().requires_grad_()
    for reduce in (lambda y: y.square().sum(), torch.sum):  # also where the incoming gradient is a constant
        (grad,) = torch.autograd.grad(reduce(call(x)), x, create_graph=True)
        with pytest.raises(
            NotImplementedError, match=f"{name.replace('step', 'scan')} has no second derivative"
        ):
            grad.square().sum().backward()
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.func.grad(lambda y: torch.func.grad(lambda z: call(z).square().sum())(y).square().sum())(
            x.detach()
        )
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.jvp(call, (x.detach(),), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError)):
        call(torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x)))


@needs_kernels
def test_second_derivatives_of_a_compiled_call_are_refused():
    torch.compiler.reset()
    _, call, x = list(differentiable_calls())[3]
    x = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative|double backward"):
        (grad,) = torch.autograd.grad(torch.compile(call)(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()


@needs_kernels
def test_the_reference_backend_has_second_derivatives():
    _, call, x = list(differentiable_calls())[3]
    x = x.clone().requires_grad_()
    with mann_fast.backend("reference"):
        (grad,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
    assert x.grad.abs().max() > 0


def test_outputs_share_no_storage_with_inputs_or_each_other():
    for backend in ("auto", "reference"):
        with mann_fast.backend(backend):
            for steps in (0, 1, 3):
                state, inputs = distinct_state(2, 6, 4, 2), scan_inputs(steps, 2, 4, 2)
                reads, end = ops.lrua_scan(state, *inputs)
                tensors = [
                    *state,
                    *(x for x in inputs if x.numel()),
                    *end,
                    *([reads] if reads.numel() else []),
                ]
                storages = [x.untyped_storage().data_ptr() for x in tensors]
                assert len(set(storages)) == len(storages)
                if steps == 0:
                    assert all(torch.equal(x, y) for x, y in zip(state, end, strict=True))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_non_contiguous_and_expanded_inputs(backend):
    state, inputs = distinct_state(2, 6, 4, 2), scan_inputs(5, 2, 4, 2)
    inputs[3] = inputs[3][:, :1].expand(5, 2, 2)

    def strided(x):  # the same numbers in a slice of a larger, transposed tensor
        larger = torch.full((*[n + 1 for n in reversed(x.shape)],), float("nan"), dtype=x.dtype)
        view = larger.permute(*reversed(range(x.dim())))[tuple(slice(0, n) for n in x.shape)]
        view.copy_(x)
        assert not view.is_contiguous()
        return view

    with mann_fast.backend(backend):
        expected = ops.lrua_scan(state, *inputs)
        actual = ops.lrua_scan(reference.LRUAState(*map(strided, state)), *map(strided, inputs))
    for x, y in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        assert torch.equal(x, y) if backend == "auto" else torch.allclose(x, y)


def test_a_gpu_takes_triton_where_cuda_cannot_and_the_reference_where_neither_can(monkeypatch):
    backend, gpu = mann_fast.ops._backend, torch.device("cuda")
    monkeypatch.setattr(backend, "_said", set())
    reasons = {"cuda": None, "triton": None}
    monkeypatch.setattr(backend, "missing", reasons.get)
    with mann_fast.backend("auto"):
        assert backend.serving(gpu) == "cuda"
        reasons["cuda"] = "not built"
        assert backend.serving(gpu) == "triton"
        reasons["triton"] = "not installed"
        with pytest.warns(RuntimeWarning, match="reference: not built; not installed"):
            assert backend.serving(gpu) == "reference"


def test_backend_selection():
    with pytest.raises(ValueError, match="backend must be one of 'auto', .* got 'cuda9'"):
        with mann_fast.backend("cuda9"):
            pass
    reports = mann_fast.backends()
    assert reports["reference"] is None and set(reports) == {"cpp", "cuda", "triton", "reference"}
    if reports["cpp"] is None:
        with mann_fast.backend("cpp"), pytest.raises(RuntimeError, match="cpp"):
            ops.least_used(FakeDevice.usage(), 1)


class FakeDevice:
    """A tensor that says it is on a device without kernels."""

    @staticmethod
    def usage():
        class Elsewhere(torch.Tensor):
            device = torch.device("xpu")

        return torch.rand(2, 3).as_subclass(Elsewhere)


@pytest.mark.parametrize(
    "name, code",
    [("nonsense", 1), ("reference", 0), ("auto", 0)],
)
def test_backend_from_the_environment(name, code):
    program = "import torch; from mann_fast import ops; ops.least_used(torch.rand(1, 3), 1)"
    import os

    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "MANN_FAST_BACKEND": name},
        capture_output=True,
        text=True,
    )
    assert (result.returncode != 0) == bool(code)
    if code:
        assert "MANN_FAST_BACKEND must be one of" in result.stderr


ERRORS = [
    ({"keys": 1.0}, TypeError, "keys must be a tensor, got float"),
    ({"keys": torch.zeros(3, 2, 2)}, ValueError, r"keys must have shape \[T, B, R, D\], got \[3, 2, 2\]"),
    (
        {"keys": torch.zeros(3, 2, 2, 5)},
        ValueError,
        r"keys must have shape \[T, B, R, D\] = \[3, 2, 2, 4\], got \[3, 2, 2, 5\]",
    ),
    (
        {"keys": torch.zeros(3, 2, 2, 4).double()},
        TypeError,
        "keys must have dtype torch.float32, .*got torch.float64",
    ),
    ({"keys": torch.zeros(3, 2, 2, 4).to_sparse()}, TypeError, "keys must be a dense tensor"),
    (
        {"write_vectors": torch.zeros(2, 2, 2, 4)},
        ValueError,
        r"write_vectors must have shape .* = \[3, 2, 2, 4\], got \[2, 2, 2, 4\]",
    ),
    (
        {"write_vectors": torch.zeros(3, 2, 2, 4).half()},
        TypeError,
        "write_vectors must have the dtype of keys",
    ),
    ({"gate_logits": torch.zeros(3, 2)}, ValueError, "gate_logits must have shape"),
    ({"gate_logits": None}, TypeError, "gate_logits must be a tensor, got NoneType"),
    ({"sharpness": 1.0}, TypeError, "sharpness must be a tensor, got float"),
    ({"sharpness": torch.zeros(3, 2, 1)}, ValueError, "sharpness must have shape"),
    ({"state": torch.zeros(3)}, TypeError, "state must be an LRUAState"),
    (
        {"memory": torch.zeros(2, 6, 4).half()},
        TypeError,
        "state.memory must be torch.float32 or torch.float64",
    ),
    ({"memory": torch.zeros(2, 0, 4)}, ValueError, "may be empty in B only"),
    ({"read_weights": torch.zeros(2, 7, 6)}, ValueError, "1 <= R <= N = 6 heads"),
    (
        {"read_weights": torch.zeros(2, 2, 6).double()},
        TypeError,
        "state.read_weights must have the dtype of state.memory",
    ),
    (
        {"usage": torch.zeros(2, 5)},
        ValueError,
        r"state.usage must have shape \[B, N\] = \[2, 6\], got \[2, 5\]",
    ),
    (
        {"usage": torch.zeros(2, 6, device="meta")},
        RuntimeError,
        "state.usage must be on the device of state.memory",
    ),
    ({"order": "sideways"}, ValueError, "order must be one of 'write_first', 'read_first', got 'sideways'"),
    ({"write_target": None}, ValueError, "write_target must be one of"),
    ({"usage_decay": 1.5}, ValueError, r"usage_decay must be within \[0, 1\], got 1.5"),
    ({"usage_decay": float("nan")}, ValueError, "usage_decay must be within"),
    ({"usage_decay": torch.tensor(0.5)}, TypeError, "usage_decay must be a number, got Tensor"),
    ({"eps": 0}, ValueError, "eps must be positive and finite, got 0"),
    ({"eps": float("nan")}, ValueError, "eps must be positive"),
    ({"eps": True}, TypeError, "eps must be a number, got bool"),
]


@pytest.mark.parametrize(
    "change, error, message", ERRORS, ids=lambda x: "-".join(x) if isinstance(x, dict) else ""
)
def test_wrong_arguments_are_named(change, error, message):
    state = {"memory": torch.zeros(2, 6, 4), "read_weights": torch.zeros(2, 2, 6), "usage": torch.zeros(2, 6)}
    arguments = {name: torch.zeros(3, 2, 2, 4) for name in ("keys", "write_vectors")}
    arguments |= {name: torch.zeros(3, 2, 2) for name in ("gate_logits", "sharpness")}
    for name, value in change.items():
        (state if name in state else arguments)[name] = value
    arguments = {"state": ops.LRUAState(**state), **arguments}
    with pytest.raises(error, match=message):
        ops.lrua_scan(**arguments)


def test_wrong_arguments_of_the_other_ops():
    memory, key, usage = torch.zeros(2, 6, 4), torch.zeros(2, 3, 4), torch.zeros(2, 6)
    for call, error, message in [
        (lambda: ops.content_read(memory, torch.zeros(2, 0, 4)), ValueError, "at least one head"),
        (
            lambda: ops.content_read(memory, torch.zeros(3, 2, 4)),
            ValueError,
            r"key must have shape \[B, R, D\] = \[2, 2, 4\], got \[3, 2, 4\]",
        ),
        (lambda: ops.content_read(memory, key, torch.zeros(2)), ValueError, "sharpness must have shape"),
        (
            lambda: ops.content_read(memory.long(), key),
            TypeError,
            "memory must be torch.float32 or torch.float64, got torch.int64",
        ),
        (lambda: ops.content_read(memory, key, eps=-1.0), ValueError, "eps must be positive"),
        (lambda: ops.least_used(usage, 7), ValueError, r"n must be within \[0, N = 6\], got 7"),
        (lambda: ops.least_used(usage, -1), ValueError, "n must be within"),
        (lambda: ops.least_used(usage, 1.0), TypeError, "n must be an int, got float"),
        (lambda: ops.least_used(usage.half(), 1), TypeError, "usage must be"),
        (
            lambda: ops.lrua_write(memory, torch.zeros(2, 3, 6), usage, key, torch.zeros(2, 2)),
            ValueError,
            "gate_logit must have shape",
        ),
        (
            lambda: ops.lrua_step(ops.LRUAState.initial(2, 6, 4, 3), key[None], key, usage, None),
            ValueError,
            r"key must have shape \[B, R, D\]",
        ),
        (
            lambda: ops.LRUAState.initial(2, 6, 4, 7),
            ValueError,
            "num_heads must be at most num_slots = 6, got 7",
        ),
        (lambda: ops.LRUAState.initial(2, 6.0, 4, 2), TypeError, "num_slots must be an int, got float"),
        (lambda: ops.LRUAState.initial(2, 6, 0, 2), ValueError, "slot_size must be at least 1, got 0"),
        (lambda: ops.LRUAState.initial(2, 6, 4, 2, dtype=torch.half), TypeError, "dtype of an LRUA state"),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_initial_state():
    state = ops.LRUAState.initial(2, 5, 3, 2, dtype=torch.float64)
    assert (state.memory == 1e-6).all() and state.memory.dtype == torch.float64
    assert state.usage.tolist() == [[1, 0, 0, 0, 0]] * 2
    assert state.read_weights.tolist() == [[[1, 0, 0, 0, 0]] * 2] * 2


def test_importing_compiles_nothing_and_stays_light():
    program = (
        "import sys, mann_fast; from mann_fast import ops; "
        "heavy = {'matplotlib', 'PIL', 'rich', 'triton'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
