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
from mann_fast.cli import _explain

pytest.importorskip("triton", reason="Triton is not installed")

from mann_fast.kernels import _tuning, lrua  # noqa: E402

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


@pytest.mark.parametrize(
    "sizes, expected",
    [
        (
            (128, 40, 4),
            "one launch per direction for all steps, a program per sample: its memory is 5120 numbers",
        ),
        (
            (4096, 64, 4),
            "a loop of steps, each least_used, lrua_write and content_read: the memory is 262144 numbers",
        ),
    ],
)
def test_explains_a_scan(sizes, expected):
    assert _explain.explain("lrua_scan", *sizes)["triton"].startswith(expected)
    of_ntm = _explain.explain("ntm_scan", *sizes)["triton"]
    parts = "content_read and PyTorch operations"
    assert of_ntm.startswith(expected.replace("least_used, lrua_write and content_read", parts))


def test_explain_follows_what_the_launcher_does(monkeypatch):
    launched = []
    monkeypatch.setattr(lrua, "launch", lambda kernel, *_, **__: launched.append(kernel))
    monkeypatch.setattr(lrua.content, "launch", lambda kernel, *_, **__: launched.append(kernel))
    for sizes in [(128, 40, 4), (256, 64, 2), (512, 33, 1), (4096, 64, 4), (400, 50, 2)]:
        slots, size, heads = sizes
        launched.clear()
        state = ops.LRUAState.initial(1, slots, size, heads)
        inputs = (torch.zeros(2, 1, heads, size), torch.zeros(2, 1, heads, size), torch.zeros(2, 1, heads))
        lrua.lrua_scan(*state, *inputs, None, False, False, 0.95, 1e-6, 0)
        one = "one launch" in lrua.explain("lrua_scan", *sizes)
        assert one == (launched == [lrua._scan_kernel])


@pytest.mark.parametrize(
    "size, pieces", [(1, (1, 1)), (3, (2, 1)), (40, (32, 8)), (64, (64, 1)), (63, (32, 32))]
)
def test_a_slot_is_held_in_two_powers_of_two(size, pieces):
    assert lrua.pieces(size) == pieces
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
