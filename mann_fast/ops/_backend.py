"""Which backend serves a call, and loading what it needs."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

NAMES = ("auto", "cpp", "cuda", "triton", "reference")

# Schemas and fake rules stand beside the public functions (ops/*.py). Each kind of kernel implements the raw ops of a
# library of its own: C++ those of the first, CUDA C++ and Triton those of the others.
LIBRARIES = {
    name: torch.library.Library(name, "DEF") for name in ("mann_fast", "mann_fast_cuda", "mann_fast_triton")
}


LIBRARIES["mann_fast_cuda"].define("probe(Tensor tensor) -> Tensor")
LIBRARIES["mann_fast_cuda"].define(
    "cell_fits(int N, int D, int R, int H, int controller, bool separate_vector, bool learned_sharpness, bool wide) -> bool"
)


def define(schema: str) -> None:
    """Define a raw op, "name(arguments) -> results", for all kernels."""
    for library in LIBRARIES.values():
        library.define(schema)


def fake(name: str) -> Callable:
    """Decorates the fake rule of a raw op."""

    def register(rule: Callable) -> Callable:
        for library in LIBRARIES:
            torch.library.register_fake(f"{library}::{name}", rule)
        return rule

    return register


def raw(serving: str):
    """The raw ops of a backend."""
    return getattr(torch.ops, "mann_fast" if serving == "cpp" else f"mann_fast_{serving}")


EXTENSION = Path(__file__).parent.parent / "_C.abi3.so"
CUDA_EXTENSION = EXTENSION.with_name("_C_cuda.abi3.so")
# For tests: the CUDA kernels compiled for a processor (scripts/emulate.py), which then serve CPU tensors.
EMULATION = os.environ.get("MANN_FAST_EMULATION")


def _load_library(name: str, path: Path) -> str | None:
    """Load a compiled extension; None if it can be used, else why not."""
    if not path.exists():
        return f"the {name} extension was not built (`mann-fast doctor` says why)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the {name} extension cannot be loaded: {error}"
    return None


_extension_missing: str | None = "the C++ extension has not been loaded yet"
# The other kernels are loaded by the first call that could use them.
_cuda_missing: str | None = "untried"
_triton_missing: str | None = "untried"
_selected: str | None = None  # None: MANN_FAST_BACKEND has not been read yet
_said: set[str] = set()


def load() -> None:
    """Called once, by mann_fast.ops, when all schemas are defined."""
    global _extension_missing
    _extension_missing = _load_library("C++", EXTENSION)


def _load_triton() -> str | None:
    """Import the Triton kernels, once; None if they can be used, else why not."""
    global _triton_missing
    if _triton_missing == "untried":
        try:
            kernels = importlib.import_module("mann_fast.kernels")
        except ImportError as error:
            _triton_missing = f"Triton cannot be imported: {error}"
        else:
            kernels.register(LIBRARIES["mann_fast_triton"])
            _triton_missing = None
    return _triton_missing


def _load_cuda() -> str | None:
    """Load the CUDA kernels, once; None if they can be used, else why not."""
    global _cuda_missing
    if _cuda_missing == "untried":
        if EMULATION:
            _cuda_missing = _load_library("emulated CUDA", Path(EMULATION))
        elif torch.version.cuda is None:
            _cuda_missing = "this torch was built without CUDA"
        else:
            _cuda_missing = _load_library("CUDA", CUDA_EXTENSION) or _probe_cuda()
    return _cuda_missing


def _probe_cuda() -> str | None:
    """None if driver and current device can run the CUDA kernels, else why not."""
    try:
        torch.ops.mann_fast_cuda.probe(torch.empty(0, device="cuda"))
    except RuntimeError as error:
        return f"the CUDA kernels cannot run here: {str(error).splitlines()[0]}"
    return None


# For torch.compile, which cannot trace an import: called while tracing, their results constants. This is all that
# torch.compiler.assume_constant_result does, which would import Dynamo here.
_load_triton._dynamo_marked_constant = True
_load_cuda._dynamo_marked_constant = True


def _cuda_unable(device: torch.device) -> str | None:
    """None if the CUDA kernels take tensors of this device, else why not."""
    if device.type not in ("cpu", "cuda", "meta"):
        return f"tensors on {device.type} have no CUDA kernels"
    if device.type == "cpu" and not EMULATION:
        return "CUDA kernels take CUDA tensors"
    return _load_cuda()


def _triton_unable(device: torch.device) -> str | None:
    """None if the Triton kernels take tensors of this device, else why not."""
    if device.type not in ("cpu", "cuda", "meta"):
        return f"tensors on {device.type} have no Triton kernels"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton kernels take CPU tensors only under TRITON_INTERPRET=1"
    return _load_triton()


def _check_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, NAMES))}, got {name!r}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend for the ops called inside the ``with`` block.

    name: ``"auto"`` (the first that can serve a call, the default), ``"cpp"`` (fused C++ kernels, CPU tensors),
    ``"cuda"`` (CUDA C++ kernels, CUDA tensors), ``"triton"`` (Triton kernels, CUDA tensors; CPU tensors under
    TRITON_INTERPRET=1, for tests) or ``"reference"`` (plain PyTorch, any device). A named backend that cannot serve a call
    raises RuntimeError; ``"auto"`` falls back: on a CUDA device from CUDA C++ to Triton, at last to the reference. Backward
    always runs on the backend that forward used. The choice is one global of the process and holds for all threads. The
    environment variable MANN_FAST_BACKEND sets it at the first op.

    Raises ValueError for an unknown name.
    """
    global _selected
    _check_name(name, "backend")
    previous = _selected
    _selected = name
    try:
        yield
    finally:
        _selected = previous


def backends() -> dict[str, str | None]:
    """Every backend by name: None if it can run here, else the reason why it cannot."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = _cuda_unable(device) if EMULATION or device.type == "cuda" else "no CUDA device is available"
    return {"cpp": _extension_missing, "cuda": cuda, "triton": _triton_unable(device), "reference": None}


def _say_once(message: str) -> None:
    if message not in _said and not torch.compiler.is_compiling():
        _said.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def _cpp_unable(device: torch.device) -> str | None:
    if device.type in ("cpu", "meta"):
        return _extension_missing
    return f"tensors on {device.type} have no fused kernels in this version"


def serving(device: torch.device) -> str:
    """The backend that serves a call on tensors of this device: "cpp", "cuda", "triton" or "reference"."""
    global _selected
    if _selected is None:
        _selected = _check_name(os.environ.get("MANN_FAST_BACKEND", "auto"), "MANN_FAST_BACKEND")
    if _selected == "reference":
        return "reference"
    if _selected != "auto":
        names = (_selected,)
    elif device.type == "cuda":
        names = ("cuda", "triton")
    else:
        names = ("cpp",)
    reasons = []
    for name in names:
        unable = _cuda_unable if name == "cuda" else _triton_unable if name == "triton" else _cpp_unable
        reason = unable(device)
        if reason is None:
            return name
        reasons.append(reason)
    if _selected != "auto":
        raise RuntimeError(f"backend {_selected!r} cannot serve this call: {reasons[0]}")
    _say_once(f"mann_fast runs on its plain-PyTorch reference: {'; '.join(reasons)}")
    return "reference"


OPS = ("content_read", "least_used", "lrua_write", "lrua_step", "lrua_scan", "ntm_scan")


def explain(op: str, num_slots: int, slot_size: int, num_heads: int) -> dict[str, str]:
    """How each backend serves an op at this size, in a sentence.

    Raises ValueError for an op that is not in OPS, a size below 1, or R > N where heads write.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    for name, size in (("N", num_slots), ("D", slot_size), ("R", num_heads)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if op.startswith("lrua") and num_heads > num_slots:
        raise ValueError(f"R must be at most N = {num_slots}, got {num_heads}")
    held = f"a sample's memory, {4 * num_slots * slot_size / 1024:.0f} KiB in float32, is held in cache"
    work = {
        "lrua_scan": f"{held} through all steps",
        "ntm_scan": f"{held} through all steps",
        "lrua_step": held,
        "least_used": "a pass over the usage per slot taken",
    }
    answers = {
        "cpp": f"one call: {work.get(op, 'a pass over the memory in tiles')}; samples over threads"
        + (
            ""
            if op == "ntm_scan"
            else ", and the slots of a sample where samples are fewer and it is worth it"
        ),
        "reference": "PyTorch operations" + (", a loop over the steps" if op.endswith("scan") else ""),
    }
    # As plan.cuh lays a block out: 8 warps of 16 slots each, of up to 64 numbers; clusters have up to 8 blocks.
    if slot_size <= 64 and num_slots <= 128:
        where = "in the registers of a block"
    elif slot_size <= 64 and num_slots <= 1024:
        where = "in the registers of a cluster of blocks on sm_90 and newer, else in shared or device memory"
    else:
        where = "in shared memory where the blocks of a cluster have room, else in device memory"
    answers["cuda"] = _load_cuda() or {
        "lrua_scan": f"one launch for all steps, a block or a cluster of blocks per sample; float32 memories lie {where}",
        "lrua_step": f"one launch, a block or a cluster of blocks per sample; float32 memories lie {where}",
        "ntm_scan": f"one launch for all steps, a block or a cluster of blocks per sample; float32 memories lie {where}",
        "least_used": "one launch: each slot counts those before it",
    }.get(op, "a block for some slots of a sample, a second launch where a sample has several")
    reason = _load_triton()
    if reason is None:
        kernels = importlib.import_module("mann_fast.kernels")
        answers["triton"] = kernels.lrua.explain(op, num_slots, slot_size, num_heads)
    else:
        answers["triton"] = reason
    return answers
