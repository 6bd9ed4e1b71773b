"""How each backend serves an op, in sentences: what `mann-fast doctor --explain` prints."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from ..ops._backend import DEVICES
from ..ops._declare import Op
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
    raw = next(raw for raw in OPS.values() if op in raw.public)
    if num_heads > num_slots and any(argument.heads_in == "N" for argument in raw.arguments):
        raise ValueError(f"R must be at most N = {num_slots}, got {num_heads}")
    sizes = num_slots, slot_size, num_heads

    def of(backend: str, sentence: Callable[[], str]) -> str:
        devices = {"cpu", DEVICES[backend]}  # on a processor those that are emulated or interpreted
        return missing(backend) or (
            sentence() if any(has_kernels(raw.name, backend, device) for device in devices) else NO_KERNEL
        )

    return {
        "cpp": of("cpp", lambda: _cpp(op, num_slots, slot_size)),
        "reference": "PyTorch operations" + (", a loop over the steps" if op.endswith("scan") else ""),
        "cuda": of("cuda", lambda: _cuda(raw, op, *sizes)),
        "triton": of("triton", lambda: _triton(raw.name, op, *sizes)),
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


def _cuda(raw: Op, op: str, num_slots: int, slot_size: int, num_heads: int) -> str:
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
    every = _interval(raw, num_slots, slot_size, num_heads)
    layout = getattr(torch.ops.mann_fast_cuda, f"{raw.name}_layout")
    # All of an NTM's heads read, none writes; moves of a shift; a DNC has links.
    of_op = {"R": num_heads, "W": 0, "shifts": 3, "link": True}
    sizes = (num_slots, slot_size, *(of_op[size.split()[1]] for size in raw.layout.split(", ")))
    scan = op.endswith("scan")
    try:
        ways = [_layout(layout, sizes, anchor_every) for anchor_every in (0, every if scan else 1)]
    except RuntimeError as error:
        return str(error).splitlines()[0]
    steps = " for all steps" if scan else ""
    return f"one launch per direction{steps}; in float32, forward {ways[0]}; backward {ways[1]}"


def _interval(raw: Op, num_slots: int, slot_size: int, num_heads: int) -> int:
    """Every how many steps the CUDA kernels keep something, of memory and weights that take no room."""
    one = torch.zeros(1, 1, 1, device="cpu" if EMULATION else "cuda")
    tensors = one.expand(1, num_slots, slot_size), one.expand(1, num_heads, num_slots)
    return raw.interval(tensors, "cuda")


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
