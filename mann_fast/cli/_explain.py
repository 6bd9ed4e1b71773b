"""How each backend serves an op, in sentences: what `mann-fast doctor --explain` prints."""

from __future__ import annotations

import importlib

from ..ops._loading import missing
from ..ops._register import OPS

PUBLIC = tuple(
    name for op in OPS.values() for name in op.public if name != "cell"
)  # whose sizes are not N, D and R alone


def explain(op: str, num_slots: int, slot_size: int, num_heads: int) -> dict[str, str]:
    """How each backend serves an op at this size, in a sentence.

    Raises ValueError for an op that is not in PUBLIC, a size below 1, or R > N where heads write.
    """
    if op not in PUBLIC:
        raise ValueError(f"op must be one of {', '.join(PUBLIC)}, got {op!r}")
    for name, size in (("N", num_slots), ("D", slot_size), ("R", num_heads)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if op.startswith("lrua") and num_heads > num_slots:
        raise ValueError(f"R must be at most N = {num_slots}, got {num_heads}")
    return {
        "cpp": missing("cpp") or _cpp(op, num_slots, slot_size),
        "reference": "PyTorch operations" + (", a loop over the steps" if op.endswith("scan") else ""),
        "cuda": missing("cuda") or _cuda(op, num_slots, slot_size),
        "triton": missing("triton") or _triton(op, num_slots, slot_size, num_heads),
    }


def _triton(op: str, *sizes: int) -> str:
    raw = next(raw.name for raw in OPS.values() if op in raw.public)
    return str(importlib.import_module("mann_fast.kernels").explain(raw, op, *sizes))


def _cpp(op: str, num_slots: int, slot_size: int) -> str:
    held = f"a sample's memory, {4 * num_slots * slot_size / 1024:.0f} KiB in float32, is held in cache"
    if op == "least_used":
        work = "a pass over the usage per slot taken"
    elif op.endswith("scan"):
        work = f"{held} through all steps"
    elif op.endswith("step") or op == "ntm_address":
        work = held
    else:
        work = "a pass over the memory in tiles"
    slots = (
        ""
        if op.startswith("ntm")
        else ", and the slots of a sample where samples are fewer and it is worth it"
    )
    return f"one call: {work}; samples over threads{slots}"


def _cuda(op: str, num_slots: int, slot_size: int) -> str:
    if op == "least_used":
        return "one launch: each slot counts those before it"
    if op in ("content_read", "lrua_write"):
        return "a block for some slots of a sample, a second launch where a sample has several"
    # As plan.cuh lays a block out: 8 warps of 16 slots each, of up to 64 numbers; clusters have up to 8 blocks.
    if slot_size <= 64 and num_slots <= 128:
        where = "in the registers of a block"
    elif slot_size <= 64 and num_slots <= 1024:
        where = "in the registers of a cluster of blocks on sm_90 and newer, else in shared or device memory"
    else:
        where = "in shared memory where the blocks of a cluster have room, else in device memory"
    steps = " for all steps" if op.endswith("scan") else ""
    return f"one launch{steps}, a block or a cluster of blocks per sample; float32 memories lie {where}"
