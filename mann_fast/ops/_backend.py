"""Which backend serves a call."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from .._onnx import exporting
from ._checks import check_choice
from ._declare import Op
from ._loading import EMULATION, missing
from ._register import has_kernels

NAMES = ("auto", "cpp", "cuda", "triton", "reference")
# The kernels of each, and of which device they take tensors; besides those, "meta" (shapes alone).
DEVICES = {"cpp": "cpu", "cuda": "cuda", "triton": "cuda"}

_selected: str | None = None  # by `with backend(...)`
_default: str | None = None  # None: MANN_FAST_BACKEND has not been read yet
_said: set[str] = set()


def unable(backend: str, device: str) -> str | None:
    """None if the kernels of this backend take tensors of this type of device, else why not."""
    if device == "cpu" and backend == "cuda" and not EMULATION:
        return "CUDA kernels take CUDA tensors"
    if device == "cpu" and backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton kernels take CPU tensors only under TRITON_INTERPRET=1"
    if device not in ("cpu", "meta", DEVICES[backend]):
        kind = {"cpp": "C++", "cuda": "CUDA", "triton": "Triton"}[backend]
        return f"tensors on {device} have no {kind} kernels"
    return missing(backend)


def _from_environment() -> str:
    global _default
    if _default is None:
        name = os.environ.get("MANN_FAST_BACKEND", "auto")
        check_choice("MANN_FAST_BACKEND", name, NAMES)
        _default = name
    return _default


_from_environment._dynamo_marked_constant = True  # type: ignore[attr-defined] # for torch.compile, as _loading.missing


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend for the ops called inside the ``with`` block.

    name: ``"auto"`` (the first that can serve a call, the default), ``"cpp"`` (fused C++ kernels, CPU tensors),
    ``"cuda"`` (CUDA C++ kernels, CUDA tensors), ``"triton"`` (Triton kernels, CUDA tensors; CPU tensors under
    TRITON_INTERPRET=1, for tests) or ``"reference"`` (plain PyTorch, any device). A named backend that cannot serve a call
    raises RuntimeError, but an op that it has no kernels for is the reference's (docs/gpu.md says which); ``"auto"`` falls
    back: on a CUDA device from CUDA C++ to Triton, at last to the reference, which also serves what ``torch.onnx.export``
    exports. Backward always runs on the backend that forward used. The choice is one global of the process and holds for all
    threads. The environment variable MANN_FAST_BACKEND sets it at the first op.

    Raises ValueError for an unknown name.
    """
    global _selected
    check_choice("backend", name, NAMES)
    previous = _selected
    _selected = name
    try:
        yield
    finally:
        _selected = previous


def backends() -> dict[str, str | None]:
    """Every backend by name: None if it can run here, else the reason why it cannot."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    no_cuda = None if EMULATION or device == "cuda" else "no CUDA device is available"
    return {
        "cpp": unable("cpp", "cpu"),
        "cuda": no_cuda or unable("cuda", device),
        "triton": unable("triton", device),
        "reference": None,
    }


def _say_once(message: str) -> None:
    if message not in _said and not torch.compiler.is_compiling():
        _said.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Where PyTorch's operations stand in for kernels, which compute in the dtypes that they are given."""
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def serving(device: torch.device, op: Op) -> str:
    """The backend that serves a call of an op on tensors of this device: "cpp", "cuda", "triton" or "reference"."""
    kind = device.type  # once: torch writes it anew each time, which takes as long as all the rest of this
    backend = chosen(kind)
    if backend != "reference" and not has_kernels(op.name, backend, kind):
        return "reference"
    return backend


def chosen(device: str) -> str:
    """The backend that serves all ops that it has kernels for on tensors of this type of device."""
    selected = _selected or _from_environment()
    if selected == "reference" or (selected == "auto" and exporting()):
        return "reference"
    if selected != "auto":
        reason = unable(selected, device)
        if reason is None:
            return selected
        raise RuntimeError(f"backend {selected!r} cannot serve this call: {reason}")
    reasons = []
    for name in ("cuda", "triton") if device == "cuda" else ("cpp",):
        reason = unable(name, device)
        if reason is None:
            return name
        reasons.append(reason)
    _say_once(f"mann_fast runs on its plain-PyTorch reference: {'; '.join(reasons)}")
    return "reference"
