"""What surrounds the Triton kernels: choice of backend, the explanation, tuned launch configurations. The kernels
themselves are tested by the op tests under MANN_FAST_TEST_BACKEND=triton (make triton)."""

import json
import os
import subprocess
import sys

import pytest
import torch

import mann_fast
from mann_fast import ops
from mann_fast._anchors import lrua_interval, ntm_interval
from mann_fast.cli import _explain
from mann_fast.ops._backend import DEVICES
from mann_fast.ops._loading import missing
from mann_fast.ops._register import OPS, has_kernels

pytest.importorskip("triton", reason="Triton is not installed")

from mann_fast import kernels  # noqa: E402
from mann_fast.kernels import (  # noqa: E402
    _launch,
    _sizes,
    _tuning,
    content,
    dnc,
    lrua,
    lrua_scan,
    ntm,
    sparse,
    sparse_backward,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_triton_refuses_cpu_tensors_without_the_interpreter():
    with mann_fast.backend("triton"), pytest.raises(RuntimeError, match="only under TRITON_INTERPRET=1"):
        ops.least_used(torch.rand(2, 5), 1)


def test_importing_does_not_import_triton():
    program = (
        "import sys, torch, mann_fast; print('triton' in sys.modules, 'mann_fast.kernels' in sys.modules)"
    )
    code = f"import sys, torch; before = 'triton' in sys.modules; {program}; print(before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    triton, kernels, before = done.stdout.split()
    assert kernels == "False" and triton == before  # torch itself may import it


def test_kernels_import_nothing_of_the_ops():
    """The ops load the kernels; the other way would be a circle."""
    program = """
import sys, types
package = types.ModuleType("mann_fast")
package.__path__ = [sys.argv[1]]
sys.modules["mann_fast"] = package
import mann_fast.kernels
print([name for name in sys.modules if name.startswith("mann_fast.") and name.split(".")[1] not in sys.argv[2:]])
"""
    allowed = ("kernels", "reference", "_anchors", "_cache", "_onnx", "_state")
    folder = os.path.dirname(mann_fast.__file__)
    done = subprocess.run([sys.executable, "-c", program, folder, *allowed], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr[-2000:]


def test_every_raw_op_has_one_implementation():
    names = [name for family in kernels.FAMILIES for name in family.RAW]
    assert len(names) == len(set(names))
    assert missing("triton") is None
    raw = {op.name for op in OPS.values()} | {f"{op.name}_backward" for op in OPS.values() if op.saved}
    assert set(names) == {name for name in raw if has_kernels(name, "triton", DEVICES["triton"])}
    backward = {f"{op.name}_backward" for op in OPS.values() if op.saved and op.name in names}
    assert backward == {name for name in names if name.endswith("_backward")}


@pytest.mark.parametrize(
    "sizes, expected",
    [
        (
            (128, 40, 4),
            "one launch per direction for all steps, a program per sample: its memory is 5120 numbers",
        ),
        ((4096, 64, 4), "a loop of steps, each PARTS: the memory is 262144 numbers"),
    ],
)
def test_explains_a_scan(sizes, expected):
    for op, parts in [
        ("lrua_scan", "least_used, lrua_write and content_read"),
        ("ntm_scan", "content_read and PyTorch operations"),
        ("dnc_scan", "PyTorch operations"),
    ]:
        expected = expected if op != "dnc_scan" else expected.replace("the memory is", "a program would hold")
        assert _explain.explain(op, *sizes)["triton"].startswith(expected.replace("PARTS", parts))


class Launches(list):
    """Takes notes of what the launchers of all kernels would launch: (kernel, num_warps, constants)."""

    def __init__(self, monkeypatch):
        for family in kernels.FAMILIES:
            monkeypatch.setattr(family, "launch", self.note)

    def note(self, kernel, grid, *arguments, options, num_warps=4, **constants):
        self.append((kernel.fn.__name__.strip("_").removesuffix("_kernel"), num_warps, constants))


def run_both_ways(op, slots, size, heads):
    """Calls the launcher of an op and of its backward."""
    memory, weights, usage = torch.zeros(1, slots, size), torch.zeros(1, heads, slots), torch.zeros(1, slots)
    key, scalar = torch.zeros(1, heads, size), torch.zeros(1, heads)
    if op == "least_used":
        lrua.least_used(usage, heads)
    elif op == "content_read":
        content.content_read_backward(
            None, weights, memory, key, None, content.content_read(memory, key, None, 1e-6)[1], 1e-6
        )
    elif op == "lrua_write":
        new, write_weights, chosen = lrua.lrua_write(memory, weights, usage, key, scalar, False)
        lrua.lrua_write_backward(new, write_weights, weights, key, scalar, chosen, False)
    elif op.startswith("ntm"):
        shapes = [(heads, *tail) for tail in ((size,), (), (), (3,), ())] + [(0, size)] * 2
        inputs = [torch.zeros(2, 1, *shape) for shape in shapes]
        every = ntm_interval(slots, size, heads)
        whole = [None] * 3
        _, *_, history, anchors = ntm.ntm_scan(memory, weights, *inputs, *whole, True, 1e-6, every)
        ntm.ntm_scan_backward(
            None, memory, None, memory, weights, *inputs, *whole, history, anchors, True, 1e-6, every
        )
    elif op == "sparse_read":
        read, chosen, weights, rows = sparse.sparse_read(memory, key, None, slots, 2, 1e-6)
        sparse_backward.sparse_read_backward(read, None, key, None, weights, chosen, rows, slots, 2, 1e-6)
    elif op.startswith("sparse"):
        state = ops.SparseState.initial(1, slots, size, heads, 2)
        told = [*(x.expand(1, *x.shape) for x in (key, key, scalar)), *[None] * 5]
        outputs = sparse.sparse_scan(*state, *told, slots, 0.005, 1e-6, 1)
        sparse_backward.sparse_scan_backward(
            outputs[0], None, None, *state[1:3], *told, *outputs[6:], slots, 1e-6, 1
        )
    elif op.startswith("dnc"):
        state = [memory, usage, None, None, weights, usage]
        shapes = [(heads, size), (heads,), (size,), (), (size,), (size,), (heads,), (), ()]
        told = [*(torch.zeros(2, 1, *shape) for shape in shapes), *[None] * 7]
        outputs = dnc.dnc_scan(*state, *told, False, 1e-6, 1)
        given = [None, memory, *[None] * 5]
        dnc.dnc_scan_backward(*given, *state, *told, *outputs[7:], False, 1e-6, 1)
    else:
        time = (2,) if op == "lrua_scan" else ()
        inputs = [*(torch.zeros(*time, *x.shape) for x in (key, key, scalar)), *[None] * 4]
        every = lrua_interval(slots, size, heads)
        *_, slots, anchors = lrua_scan.lrua_scan(
            memory, weights, usage, *inputs, False, False, 0.95, 1e-6, every
        )
        lrua_scan.lrua_scan_backward(
            None, memory, None, memory, weights, *inputs, slots, anchors, False, False, 1e-6, every
        )


@pytest.mark.parametrize("op", _explain.PUBLIC)
@pytest.mark.parametrize("sizes", [(128, 40, 4), (256, 64, 2), (512, 33, 1), (4096, 64, 4), (400, 50, 65)])
def test_explain_says_what_the_launchers_do(monkeypatch, op, sizes):
    launched, sentence = Launches(monkeypatch), _explain.explain(op, *sizes)["triton"]
    run_both_ways(op, *sizes)
    names = [name for name, _, _ in launched]
    scan = "scan" if op.startswith("lrua") else f"{op[:3]}_scan"
    if op == "least_used":
        assert names == ([] if sentence == "a sort" else ["least_used"])
    elif sentence.startswith("one launch per direction"):
        assert names == [scan, scan + "_backward"]
        forward, backward = (warps for _, warps, _ in launched)
        assert sentence.endswith(f"; {forward} warps forward, {backward} backward")
    elif op.startswith("dnc"):
        assert "PyTorch operations: a program would hold" in sentence and not names
    else:
        if op.startswith("sparse"):
            forward = ["sparse_oldest"][op == "sparse_read" :] + ["sparse_search", "sparse_read"]
            last = "sparse_read_backward" if op == "sparse_read" else "sparse_scan_backward"
            assert names == [*forward, last]
            assert sentence.startswith("a launch for" if op == "sparse_read" else "three launches a step")
        else:
            assert {"read", "backward"} <= set(names) or op == "lrua_write"
        tiles = {constants["TILE"] for _, _, constants in launched if "TILE" in constants}
        assert len(tiles) == 1 and f"tiles of {tiles.pop()} slots" in sentence
        assert ("loop of steps" in sentence or "a step of" in sentence) == (
            op.endswith(("_scan", "_step", "_address")) and not op.startswith("sparse")
        )


def test_a_tensor_that_is_not_contiguous_is_refused():
    with pytest.raises(RuntimeError, match="_write_kernel takes contiguous tensors only"):
        _launch.launch(lrua._write_kernel, (1,), torch.zeros(2, 3).T, options=_launch.FORWARD)


LOOP_OF_STEPS = """
import sys, torch, mann_fast
from mann_fast import ops
from mann_fast.kernels import _sizes
_sizes.RESIDENT_NUMBERS = 0
T, B, N, D, R = 17, 2, 7, 3, 2  # anchors before steps 8 and 16

def draw(*shape):
    return torch.randn(T, B, *shape, dtype=torch.float64)

def head():
    return [draw(R, D), draw(R), draw(R).sigmoid(), draw(R, 3).softmax(-1), 1 + draw(R).abs()]

torch.manual_seed(0)
sequences = {}
if sys.argv[2] == "cut":
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[[0, 5, 8, 13, 2, 4], [0, 0, 0, 0, 1, 1]] = True  # the last beyond its sample's end
    start = torch.randn(N, D, dtype=torch.float64)
    sequences = {"resets": resets, "lengths": torch.tensor([T, 3]), "start": start}
weights = [draw(R, N)[0].softmax(-1) for _ in range(2)]
if sys.argv[1] == "lrua_scan":
    tensors = [draw(N, D)[0], weights[0], draw(R, D), draw(R, D), draw(R), draw(R)]
    usage = draw(N)[0].abs()
    call = lambda m, w, *inputs: ops.lrua_scan(ops.LRUAState(m, w, usage), *inputs, **sequences)
elif sys.argv[1] == "dnc_scan":
    tensors = [draw(N, D)[0], draw(N)[0].sigmoid(), *[draw(N)[0].softmax(-1) / 2 for _ in range(2)]]
    tensors += [draw(N, N)[0].softmax(-1) / 2, weights[0] / 2, draw(R, D), 1 + draw(R).abs(), draw(D), 1 + draw().abs()]
    tensors += [draw(D).sigmoid(), draw(D), draw(R).sigmoid(), draw().sigmoid(), draw().sigmoid(), draw(R, 3).softmax(-1)]
    tensors += [draw(R, D).sigmoid(), draw(D).sigmoid(), 1 + draw(R, 2).abs()]
    call = lambda m, u, w, p, l, r, *told: ops.dnc_scan(
        ops.DNCState(m, u, p, l, r, w.detach()), ops.DNCInterface(*told), deallocate=True, **sequences
    )
else:
    tensors = [draw(N, D)[0], *weights, *head(), *head(), draw(R, D).sigmoid(), draw(R, D)]
    call = lambda m, r, w, *x: ops.ntm_scan(
        ops.NTMState(m, r, w), ops.NTMHead(*x[:5]), ops.NTMHead(*x[5:10]), *x[10:], **sequences
    )
results = []
for backend in ("triton", "reference"):
    with mann_fast.backend(backend):
        leaves = [x.clone().requires_grad_() for x in tensors]
        if sequences:
            sequences["start"] = start.clone().requires_grad_()
            leaves.append(sequences["start"])
        reads, state = call(*leaves[: len(tensors)])
        loss = reads.square().sum() + sum((i + x).square().sum() for i, x in enumerate(state))
        results.append([reads, *state, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)])
for x, y in zip(*results, strict=True):
    torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
"""


@pytest.mark.parametrize("sequences", ["whole", "cut"])
@pytest.mark.parametrize("op", ["lrua_scan", "ntm_scan", "dnc_scan"])
def test_a_loop_of_steps_over_several_samples_and_anchors(op, sequences):
    """In a process of its own: Triton is interpreted or not from its import on."""
    done = subprocess.run(
        [sys.executable, "-c", LOOP_OF_STEPS, op, sequences],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "size, pieces", [(1, (1, 1)), (3, (2, 1)), (40, (32, 8)), (64, (64, 1)), (63, (32, 32))]
)
def test_a_slot_is_held_in_two_powers_of_two(size, pieces):
    assert _sizes.pieces(size) == pieces
    assert sum(pieces) >= size


@pytest.fixture
def config(monkeypatch, tmp_path):
    file = tmp_path / "folder" / "tuned.json"
    monkeypatch.setenv("MANN_FAST_TRITON_CONFIG", str(file))
    _tuning._tuned.cache_clear()
    yield file
    _tuning._tuned.cache_clear()


def num_warps(monkeypatch, name="GPU", sizes=(128, 40, 4)):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    return _tuning.num_warps("scan", torch.device("cuda"), *sizes, 8)


def test_tuning_keeps_the_fastest_per_gpu_and_size(config, monkeypatch):
    assert num_warps(monkeypatch) == 8
    chosen = _tuning.tune({"scan": lambda warps: abs(warps - 4), "scan_backward": float}, "GPU", 128, 40, 4)
    assert chosen == {"scan": 4, "scan_backward": 1}
    assert num_warps(monkeypatch) == 4
    assert num_warps(monkeypatch, "another GPU") == 8
    assert num_warps(monkeypatch, sizes=(64, 40, 4)) == 8
    _tuning.tune({"scan": lambda warps: -warps}, "GPU", 64, 40, 4)
    assert num_warps(monkeypatch) == 4 and num_warps(monkeypatch, sizes=(64, 40, 4)) == 16
    assert list(config.parent.iterdir()) == [config]


@pytest.mark.parametrize("content", ["{", '{"GPU": {"scan 128 40 4": 3}}', '{"GPU": 4}', "[1]"])
def test_a_broken_file_is_said_and_not_used(config, monkeypatch, content):
    config.parent.mkdir()
    config.write_text(content)
    with pytest.warns(RuntimeWarning, match="launch configurations in .*tuned.json are not used"):
        assert num_warps(monkeypatch) == 8


def test_the_file_can_be_written_by_hand(config, monkeypatch):
    config.parent.mkdir()
    config.write_text(json.dumps({"GPU": {"scan 128 40 4": 16}}))
    assert num_warps(monkeypatch) == 16


def test_the_first_call_of_all_may_be_a_compiled_one():
    """torch.compile cannot trace an import, and the kernels are imported by the first call."""
    code = """
import torch
from mann_fast import ops
memory, key = torch.randn(1, 5, 4), torch.randn(1, 2, 4)
read = torch.compile(lambda m, k: ops.content_read(m, k)[0], fullgraph=True, backend="aot_eager")
assert torch.equal(read(memory, key), ops.content_read(memory, key)[0])
"""
    environment = {**os.environ, "MANN_FAST_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
