"""What all ops promise alike: registration, compilation, refusals, backends, argument errors."""

import ctypes
import json
import re
import subprocess
import sys

import pytest
import torch
from cases import OPTIONS, distinct_state, needs_kernels, scan_inputs, worst_error

import mann_fast
from mann_fast import ops, reference
from mann_fast.cli._explain import explain
from mann_fast.ops._loading import EMULATION


def scan(state, inputs, **options):
    reads, end = ops.lrua_scan(reference.LRUAState(*state), *inputs, **options)
    return reads, *end


@pytest.mark.once
@needs_kernels
@pytest.mark.parametrize("options", OPTIONS)
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


@pytest.mark.once
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


@pytest.mark.once
@needs_kernels
def test_compiles_with_dynamic_sizes_without_recompiling():
    torch.compiler.reset()
    compiled = torch.compile(scan, fullgraph=True, dynamic=True)
    for steps, batch in [(12, 3), (4, 2), (30, 5)]:
        state, inputs = distinct_state(batch, 9, 5, 3), scan_inputs(steps, batch, 5, 3)
        inputs[0].requires_grad_()
        for x, y in zip(compiled(state, inputs), scan(state, inputs), strict=True):
            assert torch.equal(x, y)


# What test_contract.py shows of the kernels, of the reference.


def test_the_reference_backend_has_second_derivatives():
    state, inputs = distinct_state(2, 6, 4, 2), scan_inputs(3, 2, 4, 2)
    keys = inputs[0].requires_grad_()
    with mann_fast.backend("reference"):
        reads = ops.lrua_scan(state, *inputs)[0]
        (grad,) = torch.autograd.grad(reads.square().sum(), keys, create_graph=True)
        grad.square().sum().backward()
    assert keys.grad.abs().max() > 0


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_outputs_of_the_reference_share_no_storage_with_inputs_or_each_other(steps):
    state, inputs = distinct_state(2, 6, 4, 2), scan_inputs(steps, 2, 4, 2)
    with mann_fast.backend("reference"):
        reads, end = ops.lrua_scan(state, *inputs)
    tensors = [x for x in (*state, *inputs, reads, *end) if x.numel()]
    storages = [x.untyped_storage().data_ptr() for x in tensors]
    assert len(set(storages)) == len(storages)
    if steps == 0:
        assert all(torch.equal(x, y) for x, y in zip(state, end, strict=True))


def test_the_reference_takes_non_contiguous_and_expanded_inputs():
    state, inputs = distinct_state(2, 6, 4, 2), scan_inputs(5, 2, 4, 2)
    inputs[3] = inputs[3][:, :1].expand(5, 2, 2)
    turned = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in (*state, *inputs)]
    assert not any(x.is_contiguous() for x in turned)
    with mann_fast.backend("reference"):
        expected = ops.lrua_scan(state, *inputs)
        actual = ops.lrua_scan(reference.LRUAState(*turned[:3]), *turned[3:])
    for x, y in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        assert torch.allclose(x, y)


def test_a_gpu_takes_triton_where_cuda_cannot_and_the_reference_where_neither_can(monkeypatch):
    backend, gpu = mann_fast.ops._backend, "cuda"
    monkeypatch.setattr(backend, "_said", set())
    reasons = {"cuda": None, "triton": None}
    monkeypatch.setattr(backend, "missing", reasons.get)
    with mann_fast.backend("auto"):
        assert backend.chosen(gpu) == "cuda"
        reasons["cuda"] = "not built"
        assert backend.chosen(gpu) == "triton"
        reasons["triton"] = "not installed"
        with pytest.warns(RuntimeWarning, match="reference: not built; not installed"):
            assert backend.chosen(gpu) == "reference"


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


@pytest.mark.once
@pytest.mark.parametrize("name", ["nonsense", "reference", "auto"])
def test_backend_from_the_environment(name):
    program = """
import torch
from mann_fast import ops
ops.least_used(torch.rand(1, 3), 1)
print(ops._backend.serving(torch.device("cpu"), ops.lrua.LEAST_USED))
"""
    import os

    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "MANN_FAST_BACKEND": name},
        capture_output=True,
        text=True,
    )
    if name == "nonsense":
        assert result.returncode == 1 and "MANN_FAST_BACKEND must be one of" in result.stderr
    else:
        with ops.backend(name):
            serving = ops._backend.serving(torch.device("cpu"), ops.lrua.LEAST_USED)
        assert result.stdout.strip() == serving


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


@pytest.mark.once
def test_importing_compiles_nothing_and_stays_light():
    program = (
        "import json, sys, torch; before = set(sys.modules); import mann_fast; from mann_fast import ops, reference; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    modules = json.loads(done.stdout)
    brought = {name.split(".")[0] for name in modules} - {"mann_fast", "torch"}
    assert brought <= sys.stdlib_module_names, brought  # neither Triton, matplotlib, PIL nor rich
    assert not [name for name in modules if name.startswith(("torch._dynamo", "torch._inductor"))]


@pytest.mark.skipif(
    not EMULATION, reason="only the emulated CUDA kernels can be asked how they were launched"
)
@pytest.mark.parametrize(
    "op, sizes, memories",
    [
        ("lrua_scan", (20, 8, 2), ("registers", "registers")),
        ("lrua_step", (300, 40, 4), ("registers", "registers")),  # in a cluster
        ("lrua_step", (100, 70, 4), ("shared memory", "shared memory")),
        ("lrua_step", (4096, 64, 1), ("shared memory", "device memory")),
        ("ntm_scan", (20, 5, 3), ("registers", "registers")),
        ("ntm_step", (1100, 64, 1), ("shared memory", "shared memory")),
        ("ntm_step", (5000, 128, 1), ("device memory", "device memory")),
        ("dnc_scan", (20, 5, 2), ("shared memory", "shared memory")),
        ("dnc_step", (300, 8, 2), ("shared memory", "shared memory")),  # its links in device memory
        ("dnc_step", (300, 200, 1), ("device memory", "device memory")),
    ],
)
def test_explain_says_how_the_cuda_kernels_are_launched(op, sizes, memories):
    library, how, launches = ctypes.CDLL(EMULATION), (ctypes.c_int64 * 3)(), []
    slots, size, heads = sizes
    time = (12,) if op.endswith("scan") else ()  # longer than what is replayed at a time
    vectors, scalars = torch.randn(*time, 1, heads, size), torch.rand(*time, 1, heads)
    memory = torch.randn(1, slots, size, requires_grad=True)
    weights = torch.rand(1, heads, slots)
    with mann_fast.backend("cuda"):
        if op.startswith("dnc"):
            begin = ops.DNCState.initial(1, slots, size, heads)
            vector, gate, modes = vectors[..., 0, :], scalars[..., 0], torch.rand(*scalars.shape, 3)
            told = (vectors, 1 + scalars, vector, 1 + gate, vector, vector, scalars, gate, gate, modes)
            reads, _ = getattr(ops, op)(begin._replace(memory=memory), ops.DNCInterface(*told))
        elif op.startswith("ntm"):
            head = ops.NTMHead(vectors, scalars, scalars, torch.rand(*scalars.shape, 3), 1 + scalars)
            none = ops.NTMHead(*(x[..., :0, :] if x.dim() > scalars.dim() else x[..., :0] for x in head))
            state = ops.NTMState(memory, weights, weights[:, :0])
            reads, _ = getattr(ops, op)(state, head, none, vectors[..., :0, :], vectors[..., :0, :])
        else:
            state = ops.LRUAState(memory, weights, torch.rand(1, slots))
            reads, _ = getattr(ops, op)(state, vectors, vectors, scalars)
        library.mann_fast_last_launch(how)
        launches.append(tuple(how))
        reads.sum().backward()
        library.mann_fast_last_launch(how)
        launches.append(tuple(how))
    sentence = explain(op, *sizes)["cuda"]
    said = re.findall(
        r"(?:forward|backward) a (?:block|cluster of (\d+) blocks) of (\d+) warps per sample, "
        r"its memory in (\w+(?: memory)?)(?:, its links in device memory)?, (\d+) bytes",
        sentence,
    )
    assert [(int(blocks or 1), int(warps), int(shared)) for blocks, warps, _, shared in said] == launches
    assert tuple(place for _, _, place, _ in said) == memories
    for place, (blocks, warps, shared) in zip(memories, launches, strict=True):
        in_registers = blocks * warps * 16 >= slots and size <= 64
        has_room = blocks * shared >= 4 * slots * size
        assert {"registers": in_registers, "shared memory": has_room, "device memory": not has_room}[place]


@pytest.mark.skipif(not EMULATION, reason="asks the emulated CUDA kernels")
def test_explain_says_what_the_cuda_kernels_refuse_and_what_depends_on_the_batch():
    assert explain("lrua_scan", 1 << 24, 4, 1)["cuda"].endswith("the kernel takes fewer than 2^24 slots")
    assert (
        "(with as many samples as multiprocessors: a block of 8 warps"
        in explain("lrua_scan", 1 << 20, 64, 4)["cuda"]
    )
    assert "multiprocessors" not in explain("lrua_scan", 128, 40, 4)["cuda"]


@pytest.mark.skipif(not EMULATION, reason="asks the emulated CUDA kernels")
def test_a_refused_launch_of_a_cuda_kernel_names_its_op():
    slots = 1 << 24
    state = ops.LRUAState(torch.zeros(1, slots, 1), torch.zeros(1, 1, slots), torch.zeros(1, slots))
    vector, gate = torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1)
    refused = "the CUDA kernel of lrua_scan cannot be launched: the kernel takes fewer than 2^24 slots"
    with mann_fast.backend("cuda"), pytest.raises(RuntimeError, match=re.escape(refused)):
        ops.lrua_scan(state, vector, vector, gate)
    state = ops.LRUAState.initial(1, 8, 1, 1)  # and the next one is taken
    with mann_fast.backend("cuda"):
        ops.lrua_scan(state, vector, vector, gate)


@pytest.mark.skipif(not EMULATION, reason="asks the emulated CUDA kernels")
@pytest.mark.parametrize("slots, size", [(128, 40), (113, 33), (128, 13), (120, 30), (128, 64)])
def test_sizes_that_the_cuda_kernels_know_when_compiled(slots, size):
    """113 to 128 slots and 4 heads, with as many columns a lane as there are kernels for."""
    results = []
    for backend, dtype in (("cuda", torch.float32), ("reference", torch.float64)):
        torch.manual_seed(0)
        memory, weights = torch.randn(2, slots, size), torch.rand(2, 4, slots).softmax(-1)
        usage = torch.rand(2, slots).round(decimals=1)  # many equal
        inputs = [torch.randn(9, 2, 4, size), torch.randn(9, 2, 4, size), torch.randn(9, 2, 4)]
        inputs = [x.to(dtype).requires_grad_() for x in inputs]
        with mann_fast.backend(backend):
            reads, state = ops.lrua_scan(
                ops.LRUAState(*(x.to(dtype) for x in (memory, weights, usage))), *inputs
            )
            (reads.sin().sum() + state.memory.cos().sum()).backward()
        results.append([reads, *state, *(x.grad for x in inputs)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
