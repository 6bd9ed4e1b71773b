"""How each backend serves an op, in sentences: what `mann-fast doctor --explain` prints."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from .._anchors import lrua_interval, ntm_interval
from ..ops._backend import DEVICES
from ..ops._loading import EMULATION, missing
from ..ops._register import OPS, has_kernels

PUBLIC = tuple(
    name for op in OPS.values() for name in op.public if not name.endswith("cell")
)  # whose sizes are not N, D and R alone

NO_KERNEL = "no kernel: as the reference"


def explain(op: str, num_slots: int, slot_size: int, num_heads: int) -> dict[str, str]:
    """How each backend serves an op at this size, in a sentence.

    Raises ValueError for an op that is not in PUBLIC, a size below 1, or R > N where heads write.
    """
    if op not in PUBLIC:
        raise ValueError(f"op must be one of {', '.join(PUBLIC)}, got {op!r}")
    for name, size in (("N", num_slots), ("D", slot_size), ("R", num_heads)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if op.startswith(("lrua", "sparse")) and num_heads > num_slots:
        raise ValueError(f"R must be at most N = {num_slots}, got {num_heads}")
    raw = next(raw.name for raw in OPS.values() if op in raw.public)
    sizes = num_slots, slot_size, num_heads

    def of(backend: str, sentence: Callable[[], str]) -> str:
        devices = {"cpu", DEVICES[backend]}  # on a processor those that are emulated or interpreted
        served = missing(backend) is None and any(has_kernels(raw, backend, device) for device in devices)
        return missing(backend) or (sentence() if served else NO_KERNEL)

    return {
        "cpp": of("cpp", lambda: _cpp(op, num_slots, slot_size)),
        "reference": "PyTorch operations" + (", a loop over the steps" if op.endswith("scan") else ""),
        "cuda": of("cuda", lambda: _cuda(op, *sizes)),
        "triton": of("triton", lambda: _triton(raw, op, *sizes)),
    }


def _triton(raw: str, op: str, *sizes: int) -> str:
    return str(importlib.import_module("mann_fast.kernels").explain(raw, op, *sizes))


def _cpp(op: str, num_slots: int, slot_size: int) -> str:
    kib = 4 * num_slots * slot_size / 1024
    held = f"a sample's memory, {kib:.0f} KiB in float32, is held in cache"
    if op.startswith("dnc"):
        held = f"a sample's memory and links, {kib:.0f} and {4 * num_slots**2 / 1024:.0f} KiB in float32, are held in cache"
    if op == "least_used":
        work = "a pass over the usage, which keeps the least as it goes"
    elif op.startswith("sparse"):
        work = "a pass over the memory per step, in tiles"
    elif op.endswith("scan"):
        work = f"{held} through all steps"
    elif op.endswith("step") or op == "ntm_address":
        work = held
    else:
        work = "a pass over the memory in tiles" + (", backward two" if op == "content_read" else "")
    slots = (
        ""
        if op.startswith(("ntm", "dnc", "least"))
        else ", and the slots of a sample where samples are fewer and it is worth it"
    )
    return f"one call: {work}; samples over threads{slots}"


def _cuda(op: str, num_slots: int, slot_size: int, num_heads: int) -> str:
    if op == "least_used":
        if num_slots <= 256:
            return "one launch: each slot counts those before it"
        return "a launch in which blocks put 2,048 slots each in order, and more, which take the least of them, for more slots"
    if op in ("content_read", "lrua_write"):
        backward = "; backward two passes" if op == "content_read" else ""
        return f"a block for some slots of a sample, a second launch where a sample has several{backward}"
    if op.startswith("sparse"):
        blocks = torch.ops.mann_fast_cuda.sparse_blocks(1, num_slots, slot_size)
        alone = "one launch per direction, a block per sample"
        if blocks == 1:
            return alone
        return (
            f"{blocks} blocks search a sample, then one joins what they found: two launches a step; backward a block per "
            f"sample; with as many samples as blocks run at once, {alone}"
        )
    sizes = (num_slots, slot_size, num_heads)
    if op.startswith("dnc"):
        sizes += (True,)  # with links
        every, layout = 1, torch.ops.mann_fast_cuda.dnc_scan_layout
    elif op.startswith("ntm"):
        sizes += (0, 3)  # all heads read, none writes; moves of a shift
        every, layout = ntm_interval(slot_size, num_heads), torch.ops.mann_fast_cuda.ntm_scan_layout
    else:
        device = torch.device("cpu" if EMULATION else "cuda")
        every, layout = lrua_interval(*sizes, device), torch.ops.mann_fast_cuda.lrua_scan_layout
    scan = op.endswith("scan")
    try:
        ways = [_layout(layout, sizes, anchor_every) for anchor_every in (0, every if scan else 1)]
    except RuntimeError as error:
        return str(error).splitlines()[0]
    steps = " for all steps" if scan else ""
    return f"one launch per direction{steps}; in float32, forward {ways[0]}; backward {ways[1]}"


def _layout(
    layout: Callable[..., tuple[int, int, str, int]], sizes: tuple[int, ...], anchor_every: int
) -> str:
    """How the launcher lays a sample out: where nothing is near enough, by how many samples there are."""
    few, many = (layout(batch, *sizes, anchor_every) for batch in (1, 1 << 20))
    return (
        _blocks(*few)
        if few == many
        else f"{_blocks(*few)} (with as many samples as multiprocessors: {_blocks(*many)})"
    )


def _blocks(blocks: int, warps: int, memory: str, shared: int) -> str:
    cluster = "a block" if blocks == 1 else f"a cluster of {blocks} blocks"
    return f"{cluster} of {warps} warps per sample, its memory in {memory}, {shared} bytes of shared memory a block"
