"""How many warps a kernel gets: a rule, or what was measured on this GPU and kept in a file.

Nothing is tuned unless :func:`tune` is called (``benchmarks/gpu_check tune`` does), and never for a sequence length or a
batch size of its own. The file is ``triton.json`` in the cache folder, or what MANN_FAST_TRITON_CONFIG names:
``{"NVIDIA H100 80GB HBM3": {"scan 128 40 4": 8}}``, to be edited by hand as well.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from .._cache import cache_folder

CANDIDATES = (1, 2, 4, 8, 16)


def config_file() -> Path:
    named = os.environ.get("MANN_FAST_TRITON_CONFIG")
    return Path(named) if named else cache_folder() / "triton.json"


@functools.cache
def _tuned() -> dict[str, dict[str, int]]:
    """The file's content, read once; nothing, and a warning, where it is not what it should be."""
    path = config_file()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for device, entries in content.items():
            for key, warps in entries.items():
                if warps not in CANDIDATES:
                    raise ValueError(f"{device}, {key}: warps must be one of {CANDIDATES}, got {warps!r}")
        return content
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, OSError) as error:
        warnings.warn(f"launch configurations in {path} are not used: {error}", RuntimeWarning, stacklevel=2)
        return {}


def _key(kernel: str, num_slots: int, slot_size: int, num_heads: int) -> str:
    return f"{kernel} {num_slots} {slot_size} {num_heads}"


def num_warps(
    kernel: str, device: torch.device, num_slots: int, slot_size: int, num_heads: int, rule: int
) -> int:
    """What was measured for this kernel, GPU and memory, else the rule's answer."""
    tuned = _tuned()
    if not tuned or device.type != "cuda":
        return rule
    entries = tuned.get(torch.cuda.get_device_name(device), {})
    return entries.get(_key(kernel, num_slots, slot_size, num_heads), rule)


def tune(
    kernels: dict[str, Callable[[int], float]],
    device_name: str,
    num_slots: int,
    slot_size: int,
    num_heads: int,
) -> dict[str, int]:
    """Measure every kernel with every number of warps and keep the fastest of each in the file.

    Args:
        kernels: per kernel, what takes a number of warps and returns a time; infinity where it cannot run.
        device_name, num_slots, slot_size, num_heads: what the result is kept for.

    Returns:
        the number of warps per kernel.
    """
    chosen = {}
    for name, measure in kernels.items():
        times = {warps: measure(warps) for warps in CANDIDATES}
        chosen[name] = min(times, key=times.__getitem__)
    path = config_file()
    content = {device: dict(entries) for device, entries in _tuned().items()}
    entries = content.setdefault(device_name, {})
    entries.update({_key(name, num_slots, slot_size, num_heads): warps for name, warps in chosen.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    _tuned.cache_clear()
    return chosen
